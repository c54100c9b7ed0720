"""How is a file read at places, and a box of an array that lies in it in C order?

A file is local, or an object of an object store, which a URL names. It is never read past its end, and what is missing
or unreadable is damage that names the file. Reads of a box are few: where the gaps between its runs of bytes are small,
they are read too.
"""

from __future__ import annotations

import errno
import io
import math
import mmap
import os
import stat
import sys
from collections.abc import Callable
from typing import Any, final

import numpy as np

from jaxckpt._errors import CheckpointError, CorruptError, NotFoundError, Problem
from jaxckpt._storage import Buffer, allocate_aligned, local_path
from jaxckpt._store import open_store

# Bytes that are in memory beside the box.
_PIECE_BYTES = 4 << 20
# Flag of mmap(2) that Python does not name: no memory is set aside for copies of pages, of which there may be more than
# the machine has memory.
_MAP_NORESERVE = 0x4000
# Reading this many bytes takes as long as asking for bytes elsewhere.
_SEEK_BYTES = 32 << 10


def corrupt(path: str, kind: str, message: str, key: str | None = None) -> CorruptError:
    """The error for damage in a file, with its one problem; see `jaxckpt.Problem` for the kinds."""
    return CorruptError(f"{path}: {message}", [Problem(key, kind, f"{path}: {message}")])


# --- paths ----------------------------------------------------------------------------------------------------


def is_url(path: str) -> bool:
    """Whether a path names an object of an object store."""
    return "://" in path


def absolute_path(path: str | os.PathLike[str]) -> str:
    """A path that stays right when the working directory changes; URLs of object stores are so already."""
    text = local_path(os.fspath(path))
    return text if is_url(text) else os.path.abspath(text)


def split_path(path: str) -> tuple[str, str]:
    """The directory of a file, and its name; what follows the ``?`` of a URL stays with the directory."""
    if not is_url(path):
        return os.path.split(path)
    place, mark, options = path.partition("?")
    directory, _, name = place.rpartition("/")
    return directory + mark + options, name


def join_path(directory: str, name: str) -> str:
    """The path of a file; `split_path` reversed."""
    if not is_url(directory):
        return os.path.join(directory, name)
    place, mark, options = directory.partition("?")
    return f"{place.rstrip('/')}/{name}{mark}{options}"


def list_directory(path: str) -> list[str] | None:
    """The names in a directory, in order; None where there is none.

    Raises:
      CheckpointError: It cannot be read.
    """
    if not is_url(path) and not os.path.isdir(path):
        return None
    try:
        names = open_store(path).names() if is_url(path) else sorted(os.listdir(path))
    except OSError as error:
        raise CheckpointError(f"cannot read {path!r}: {error.strerror or error}") from error
    return names or (None if is_url(path) else [])


# --- files ----------------------------------------------------------------------------------------------------


@final
class SourceFile:
    """A file that is read at places, from any thread; never past its end.

    Args:
      path: Its path, or the URL of an object.
      count: Is told how many bytes were asked for.
    """

    def __init__(self, path: str, count: Callable[[int], None]) -> None:
        self.path = path
        self._count = count
        self._descriptor = -1
        self._is_open = True
        try:
            if is_url(path):
                directory, self._name = split_path(path)
                self._store = open_store(directory)
                self.size = self._store.length(self._name)
                return
            # Without O_NONBLOCK, opening a pipe would wait for somebody who writes into it.
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            found = os.fstat(self._descriptor)
        except FileNotFoundError as error:
            raise NotFoundError(f"there is no file {path!r}") from error
        except OSError as error:
            raise CheckpointError(f"cannot read {path!r}: {error.strerror or error}") from error
        if not stat.S_ISREG(found.st_mode):
            raise corrupt(path, "unreadable", "is no regular file")
        self.size = found.st_size

    def read(self, offset: int, length: int) -> memoryview:
        """Bytes from an offset on.

        Raises:
          CorruptError: The file has less.
        """
        buffer = np.empty(self._check(offset, length), np.uint8)
        self.read_into(offset, buffer)
        return memoryview(buffer)

    def read_into(self, offset: int, buffer: np.ndarray[Any, Any]) -> None:
        """Fills a contiguous array with the bytes from an offset on.

        Raises:
          CorruptError: The file has less.
        """
        self._check(offset, buffer.nbytes)
        self._count(buffer.nbytes)
        rest = buffer.reshape(-1).view(np.uint8)
        while len(rest):
            try:
                done = self._read_some(offset, rest)
            except OSError as error:
                message = f"cannot be read at byte {offset}: {error.strerror or error}"
                raise corrupt(self.path, "unreadable", message) from error
            if done == 0:
                raise corrupt(self.path, "length", f"ends at byte {offset}, while it is read")
            rest = rest[done:]
            offset += done

    def _read_some(self, offset: int, rest: Buffer) -> int:
        if self._descriptor < 0:
            return self._store.read_into(self._name, offset, rest)
        return os.preadv(self._descriptor, [memoryview(rest)], offset)

    def map(self) -> Buffer | None:
        """All of the file as memory that shows it, or None where that cannot be; nothing is read.

        What is written into the memory is never written to the file.
        """
        self._check(0, 0)
        if self._descriptor < 0 or self.size == 0:
            return None
        try:
            return np.frombuffer(_map(self._descriptor, self.size), np.uint8)
        except OSError:  # not every file system can
            return None

    def close(self) -> None:
        """Closes the file; it can't be read any more."""
        self._is_open = False
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            self.close()

    def _check(self, offset: int, length: int) -> int:
        if not self._is_open:
            raise ValueError(f"{self.path!r} is closed")
        if offset < 0 or length < 0 or offset + length > self.size:
            message = f"has {self.size} bytes, but bytes [{offset}, {offset + length}) must be there"
            raise corrupt(self.path, "length", message)
        return length


def _map(descriptor: int, length: int) -> mmap.mmap:
    flags = mmap.MAP_PRIVATE | (_MAP_NORESERVE if sys.platform == "linux" else 0)
    return mmap.mmap(descriptor, length, flags, mmap.PROT_READ | mmap.PROT_WRITE)


@final
class FileView(io.RawIOBase):
    """A `SourceFile` as a file of Python's, for libraries that want one."""

    def __init__(self, source: SourceFile) -> None:
        super().__init__()
        self._source = source
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._source.size}[whence]
        if base + offset < 0:
            raise OSError(errno.EINVAL, f"there is no byte {base + offset}")
        self._at = base + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        target = np.frombuffer(buffer, np.uint8)
        length = max(min(len(target), self._source.size - self._at), 0)
        self._source.read_into(self._at, target[:length])
        self._at += length
        return length


def read_box(
    source: SourceFile,
    offset: int,
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
    lo: tuple[int, ...],
    hi: tuple[int, ...],
) -> np.ndarray[Any, Any]:
    """A box of an array whose elements lie in a file in C order; C-contiguous, in memory of its own.

    Args:
      source: The file.
      offset: Where the array begins in it.
      shape: Shape of the whole array.
      dtype: Type of its elements.
      lo: First place of the box along each axis.
      hi: The places after the last ones.
    """
    sizes = tuple(stop - start for start, stop in zip(lo, hi, strict=True))
    if math.prod(sizes) == 0:
        return np.empty(sizes, dtype)
    box = allocate_aligned(math.prod(sizes) * dtype.itemsize).view(dtype).reshape(sizes)
    if not shape:
        source.read_into(offset, box)
        return box
    strides = [math.prod(shape[axis + 1 :]) * dtype.itemsize for axis in range(len(lo))]
    depth = _split_axis(lo, hi, strides, dtype.itemsize)
    # Rows with gaps are read through memory of their own: one must not be larger than a piece.
    while sizes[depth + 1 :] != shape[depth + 1 :] and strides[depth] > _PIECE_BYTES:
        depth += 1
    is_in_one_run = sizes[depth + 1 :] == shape[depth + 1 :]
    # One read for each index of the axes before `depth`, and along that axis for as many rows as fit a piece.
    rows_max = max(1, _PIECE_BYTES // max(strides[depth], 1))
    for index in np.ndindex(box.shape[:depth]):
        outer = sum((lo[axis] + at) * strides[axis] for axis, at in enumerate(index))
        if is_in_one_run:
            source.read_into(offset + outer + lo[depth] * strides[depth], box[index])
            continue
        for row in range(0, box.shape[depth], rows_max):
            target = box[index][row : row + rows_max]
            start = outer + (lo[depth] + row) * strides[depth]
            start += sum(lo[axis] * strides[axis] for axis in range(depth + 1, len(lo)))
            last = sum(
                (size - 1) * stride for size, stride in zip(target.shape, strides[depth:], strict=True)
            )
            data = np.empty(last + dtype.itemsize, np.uint8)
            source.read_into(offset + start, data)
            target[...] = np.ndarray(target.shape, dtype, data, strides=strides[depth:])
    return box


def _split_axis(lo: tuple[int, ...], hi: tuple[int, ...], strides: list[int], itemsize: int) -> int:
    """The axis below which a box is read in one go: the one at which reads and bytes together cost least."""
    costs: list[int] = []
    reads = 1
    for axis in range(len(lo)):
        span = itemsize + sum(
            (stop - start - 1) * stride
            for start, stop, stride in zip(lo[axis:], hi[axis:], strides[axis:], strict=True)
        )
        costs.append(reads * (_SEEK_BYTES + span))
        reads *= hi[axis] - lo[axis]
    return costs.index(min(costs))
