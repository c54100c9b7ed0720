"""How is a file read at places, and a box of an array that lies in it in C order?

A file is never read past its end, and what is missing or unreadable is damage that names the file. Reads of a box are
few: where the gaps between its runs of bytes are small, they are read too.
"""

from __future__ import annotations

import math
import os
import stat
from collections.abc import Callable
from typing import Any, final

import numpy as np

from jaxckpt._errors import CheckpointError, CorruptError, NotFoundError, Problem
from jaxckpt._storage import allocate_aligned

# Bytes that are in memory beside the box.
_PIECE_BYTES = 4 << 20
# Reading this many bytes takes as long as asking for bytes elsewhere.
_SEEK_BYTES = 32 << 10


def corrupt(path: str, kind: str, message: str, key: str | None = None) -> CorruptError:
    """The error for damage in a file, with its one problem; see `jaxckpt.Problem` for the kinds."""
    return CorruptError(f"{path}: {message}", [Problem(key, kind, f"{path}: {message}")])


@final
class SourceFile:
    """A file that is read at places, from any thread; never past its end.

    Args:
      path: Its path.
      count: Is told how many bytes were asked for.
    """

    def __init__(self, path: str, count: Callable[[int], None]) -> None:
        self.path = path
        self._count = count
        try:
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
        rest = memoryview(buffer.reshape(-1).view(np.uint8))
        while rest:
            try:
                done = os.preadv(self._descriptor, [rest], offset)
            except OSError as error:
                message = f"cannot be read at byte {offset}: {error.strerror or error}"
                raise corrupt(self.path, "unreadable", message) from error
            if done == 0:
                raise corrupt(self.path, "length", f"ends at byte {offset}, while it is read")
            rest = rest[done:]
            offset += done

    def close(self) -> None:
        """Closes the file; it can't be read any more."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            self.close()

    def _check(self, offset: int, length: int) -> int:
        if self._descriptor < 0:
            raise ValueError(f"{self.path!r} is closed")
        if offset < 0 or length < 0 or offset + length > self.size:
            message = f"has {self.size} bytes, but bytes [{offset}, {offset + length}) must be there"
            raise corrupt(self.path, "length", message)
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
    # One read for each index of the axes before `depth`, and along that axis for as many rows as fit a piece.
    rows_max = max(1, _PIECE_BYTES // max(strides[depth], 1))
    is_in_one_run = box[(0,) * depth].nbytes == box.shape[depth] * strides[depth]
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
