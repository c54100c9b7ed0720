"""Files of ``numpy.savez``, read lazily and written in bounded memory.

`open` shows what an archive holds without reading it, `read` restores it as a tree of JAX arrays, `write` writes one
that ``numpy.load`` reads. What is read whole is verified by the archive's CRC-32; a part of an array that is not
compressed is read alone, and is not.

NumPy's files have no names for the types of `ml_dtypes`, such as bfloat16: NumPy saves these as raw bytes, ``V2`` for
bfloat16, and ``numpy.load`` gives those (``array.view(ml_dtypes.bfloat16)`` is the array). `write` does the same, and
notes the type as the comment of the archive's entry, so that such arrays come back as they were. Of arrays without such
a note ``V2`` is taken for bfloat16.

Example:
  >>> from jaxckpt.interop import npz
  >>> npz.write(tmp / "model.npz", {"dense": {"kernel": jnp.arange(6.0).reshape(2, 3)}})
  >>> print(npz.open(tmp / "model.npz"))
  dense/kernel (float32) [2,3]

Source: https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html
"""

from __future__ import annotations

import dataclasses
import io
import math
import os
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from typing import Any, Unpack, final

import numpy as np

from jaxckpt._adopting import RestoreKeywords, check_keywords, restore_foreign
from jaxckpt._config import MIB
from jaxckpt._dtypes import dtype_from, is_jax_dtype
from jaxckpt._errors import (
    CheckpointError,
    NotFoundError,
    Problem,
    UnsupportedLeafError,
    printable_key,
)
from jaxckpt._foreign import ForeignCheckpoint, ForeignLeaf
from jaxckpt._manifest import RANK_MAX
from jaxckpt._storage import Buffer, allocate_aligned

from ._archiving import NPY_SUFFIX, write
from ._files import (
    FileView,
    SourceFile,
    absolute_path,
    corrupt,
    is_url,
    list_directory,
    read_box,
    split_path,
)

__all__ = ["NpzCheckpoint", "can_read", "open", "read", "write"]

_LOCAL_HEADER = struct.Struct("<4s5H3L2H")
_LOCAL_MAGIC = b"PK\x03\x04"
# What NumPy's reader takes.
_HEADER_BYTES_MAX = 64 << 10
_PIECE_BYTES = 4 * MIB
# Bytes that one byte can become at most when it is expanded; zlib's manual has the number.
_DEFLATE_RATIO_MAX = 1032
_COMPRESSIONS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_BROKEN = (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError, ValueError, NotImplementedError)
# Beside these, what NumPy's reader of headers raises, which makes a tree of Python's syntax of up to 10,000 characters.
_UNREADABLE = (SyntaxError, TypeError, LookupError, OverflowError, MemoryError, tokenize.TokenError)


@dataclasses.dataclass(frozen=True, slots=True)
class _Member:
    """An array in an archive.

    Attributes:
      info: Its entry.
      leaf: What it is.
      header_bytes: Bytes of the ``.npy`` header before its elements.
      offset: Where the elements begin in the file; None where they are compressed.
      stored_dtype: Type of the elements, in the byte order of the file.
      is_fortran: Whether they lie in Fortran order.
    """

    info: zipfile.ZipInfo
    leaf: ForeignLeaf
    header_bytes: int
    offset: int | None
    stored_dtype: np.dtype[Any]
    is_fortran: bool


@final
class NpzCheckpoint(ForeignCheckpoint):
    """An archive of arrays, open for reading from any thread; `open` makes these.

    Arrays have the names of the archive, without ``.npy``. Arrays of Python objects are listed, and an error when they
    are read: that would run code of whoever wrote them.
    """

    is_nested = True

    def __init__(self, path: str) -> None:
        ForeignCheckpoint.__init__(self, path, "npz")
        self._source = SourceFile(path, self._count_read)
        self._streams: dict[str, _Stream] = {}
        self._archive: zipfile.ZipFile | None = None
        try:
            self._archive = self._open_archive()
            self._members = self._find_members(self._archive)
        except BaseException:
            self.close()
            raise
        self._leaves = {name: member.leaf for name, member in self._members.items()}

    def _open_archive(self) -> zipfile.ZipFile:
        try:
            return zipfile.ZipFile(FileView(self._source))
        except _BROKEN as error:
            if not split_path(self.path)[1].endswith(".npz"):
                raise NotFoundError(f"{self.path!r} is no archive of arrays: {error}") from error
            raise corrupt(self.path, "manifest", f"is damaged, or no archive: {error}") from error

    def _find_members(self, archive: zipfile.ZipFile) -> dict[str, _Member]:
        members: dict[str, _Member] = {}
        for info in archive.infolist():
            if not info.filename.endswith(NPY_SUFFIX):
                raise NotFoundError(
                    f"{self.path!r} is an archive of other things than arrays: {info.filename!r}"
                )
            name = info.filename.removesuffix(NPY_SUFFIX)
            if name in members:
                raise corrupt(self.path, "manifest", f"has two arrays {name!r}", name)
            members[name] = self._member(archive, name, info)
        return members

    def _member(self, archive: zipfile.ZipFile, name: str, info: zipfile.ZipInfo) -> _Member:
        self._check_sizes(name, info)
        try:
            with archive.open(info) as file:
                header = io.BytesIO(file.read(_HEADER_BYTES_MAX))
            shape, is_fortran, stored_dtype = _read_header(header)
        except (*_BROKEN, *_UNREADABLE) as error:
            kind = "checksum" if "Bad CRC-32" in str(error) else "manifest"
            raise corrupt(self.path, kind, f"{info.filename} is no array: {error}", name) from error
        header_bytes = header.tell()
        nbytes = math.prod(shape) * stored_dtype.itemsize
        if not stored_dtype.hasobject and header_bytes + nbytes != info.file_size:
            message = (
                f"{info.filename} has {info.file_size} bytes, and its header says {header_bytes + nbytes}"
            )
            raise corrupt(self.path, "length", message, name)
        offset = None
        if info.compress_type == zipfile.ZIP_STORED:
            offset = self._begin_of(name, info) + header_bytes
        dtype = None if stored_dtype.hasobject else _dtype_of(stored_dtype, info.comment)
        stored_as = "objects" if dtype is None else str(dtype if dtype.kind == "V" else stored_dtype)
        leaf = ForeignLeaf(name, dtype, shape, stored_as)
        return _Member(info, leaf, header_bytes, offset, stored_dtype, is_fortran)

    def _check_sizes(self, name: str, info: zipfile.ZipInfo) -> None:
        """Refuses an entry that cannot hold what it says it holds."""
        if info.compress_type not in _COMPRESSIONS:
            raise corrupt(
                self.path, "manifest", f"{info.filename} is compressed in a way that NumPy does not use", name
            )
        size_max = info.compress_size
        if info.compress_type == zipfile.ZIP_DEFLATED:
            size_max = size_max * _DEFLATE_RATIO_MAX
        if info.compress_size > self._source.size or info.file_size > size_max:
            message = (
                f"{info.filename} has {info.compress_size} bytes, which cannot become {info.file_size} bytes"
            )
            raise corrupt(self.path, "length", message, name)

    def _begin_of(self, name: str, info: zipfile.ZipInfo) -> int:
        """Where the bytes of an entry begin."""
        fields = _LOCAL_HEADER.unpack(self._source.read(info.header_offset, _LOCAL_HEADER.size))
        if fields[0] != _LOCAL_MAGIC:
            raise corrupt(self.path, "manifest", f"has no entry at byte {info.header_offset}", name)
        begin = info.header_offset + _LOCAL_HEADER.size + fields[-2] + fields[-1]
        if begin + info.file_size > self._source.size:
            raise corrupt(self.path, "length", f"ends within {info.filename}", name)
        return int(begin)

    def leaves(self) -> Mapping[str, ForeignLeaf]:
        """The arrays by name, in the order of the archive.

        Returns:
          For each its dtype and its shape.
        """
        return self._leaves

    def read_box(self, key: str, lo: tuple[int, ...], hi: tuple[int, ...]) -> np.ndarray[Any, Any]:
        """A box of an array; see `ForeignCheckpoint.read_box`.

        Raises:
          CorruptError: What had to be read is damaged.
          UnsupportedLeafError: The array has Python objects.
        """
        member = self._readable(key)
        shape = member.leaf.shape
        is_whole = not any(lo) and hi == shape
        if member.offset is None or is_whole:
            array = self._read_whole(key, member)
            return array if is_whole else np.ascontiguousarray(array[tuple(map(slice, lo, hi))])
        if member.is_fortran:
            shape, lo, hi = shape[::-1], lo[::-1], hi[::-1]
        box = read_box(self._source, member.offset, shape, member.stored_dtype, lo, hi)
        return _native(box.T if member.is_fortran else box, member)

    def stream(self, key: str, lo: int, hi: int) -> Buffer:
        """Bytes of an array; see `ForeignCheckpoint.stream`.

        Those of one in Fortran order, or in the other byte order, are in memory whole until the last ones were asked
        for.

        Raises:
          CorruptError: The array is damaged.
          UnsupportedLeafError: It has Python objects.
        """
        member = self._readable(key)
        stream = self._streams.get(key)
        if stream is None or stream.at != lo:
            stream = self._streams[key] = _Stream(self._bytes_of(key, member))
            stream.skip(lo)
        found = stream.take(hi - lo)
        if hi == member.leaf.nbytes:
            stream.finish()
            del self._streams[key]
        return found

    def _bytes_of(self, key: str, member: _Member) -> Iterator[Buffer]:
        """The bytes of an array in C order and native byte order, in pieces; the last one only if they are whole."""
        if not member.is_fortran and member.stored_dtype.isnative:
            return self._pieces(key, member)
        return iter([self._read_whole(key, member).reshape(-1).view(np.uint8)])

    def close(self) -> None:
        """Closes the file; nothing more can be read."""
        self._streams.clear()
        if self._archive is not None:
            self._archive.close()
        self._source.close()

    def _readable(self, key: str) -> _Member:
        if key not in self._members:
            raise KeyError(f"{key!r} is not in {self.path!r}")
        member = self._members[key]
        if member.leaf.dtype is None:
            what = "has Python objects, and reading them would run code"
            raise UnsupportedLeafError(
                f"{self.path}: {printable_key(key)} {what}", [Problem(key, "dtype", what)]
            )
        return member

    def _read_whole(self, key: str, member: _Member) -> np.ndarray[Any, Any]:
        """An array, verified."""
        shape = member.leaf.shape
        data = allocate_aligned(member.leaf.nbytes)
        filled = 0
        for piece in self._pieces(key, member):
            data[filled : filled + len(piece)] = piece
            filled += len(piece)
        array = np.ndarray(shape, member.stored_dtype, data, order="F" if member.is_fortran else "C")
        return _native(array, member)

    def _pieces(self, key: str, member: _Member) -> Iterator[Buffer]:
        """The bytes of the elements as they are stored, in pieces; the last one only if the checksum is right."""
        assert self._archive is not None
        rest = member.leaf.nbytes
        try:
            with self._archive.open(member.info) as file:
                file.read(member.header_bytes)
                while rest:
                    piece = file.read(min(_PIECE_BYTES, rest))
                    if not piece:
                        raise EOFError(f"{rest} bytes are missing")
                    rest -= len(piece)
                    if not rest and file.read(1):
                        raise EOFError("there are more bytes than there should be")
                    yield np.frombuffer(piece, np.uint8)
        except _BROKEN as error:
            raise corrupt(self.path, "checksum", f"{member.info.filename}: {error}", key) from error


@final
class _Stream:
    """Bytes that come in pieces, taken in order."""

    def __init__(self, pieces: Iterator[Buffer]) -> None:
        self._pieces = pieces
        self._rest: Buffer = np.empty(0, np.uint8)
        self.at = 0

    def take(self, nbytes: int) -> Buffer:
        """The next bytes, so many."""
        if nbytes <= len(self._rest):
            found = self._rest[:nbytes]
            self._rest = self._rest[nbytes:]
            self.at += nbytes
            return found
        found = np.empty(nbytes, np.uint8)
        filled = 0
        while filled < nbytes:
            if not len(self._rest):
                self._rest = next(self._pieces)
            part = self._rest[: nbytes - filled]
            found[filled : filled + len(part)] = part
            filled += len(part)
            self._rest = self._rest[len(part) :]
        self.at += nbytes
        return found

    def skip(self, nbytes: int) -> None:
        """Goes on behind the next bytes, so many."""
        while self.at < nbytes:
            self.take(min(nbytes - self.at, _PIECE_BYTES))

    def finish(self) -> None:
        """Reads on to the end, where the checksum is."""
        for _ in self._pieces:
            pass


def _read_header(file: io.BytesIO) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, order and dtype that a ``.npy`` header says."""
    version = np.lib.format.read_magic(file)
    is_first = version == (1, 0)
    read = np.lib.format.read_array_header_1_0 if is_first else np.lib.format.read_array_header_2_0
    shape, is_fortran, dtype = read(file)
    sizes = tuple(map(int, shape))
    if min(sizes, default=0) < 0 or len(sizes) > RANK_MAX:
        raise ValueError(f"the shape {sizes} is impossible")
    return sizes, bool(is_fortran), dtype


def _dtype_of(stored: np.dtype[Any], comment: bytes) -> np.dtype[Any]:
    """The dtype of elements in native byte order: that of `ml_dtypes` which is meant, where they are stored raw."""
    if stored.kind != "V" or stored.fields is not None or stored.subdtype is not None:
        return stored.newbyteorder("=")
    name = comment.decode("ascii", "replace") or ("bfloat16" if stored.itemsize == 2 else "")
    try:
        noted = dtype_from(name)
    except ValueError:
        return stored
    return noted if is_jax_dtype(noted) and noted.itemsize == stored.itemsize else stored


def _native(array: np.ndarray[Any, Any], member: _Member) -> np.ndarray[Any, Any]:
    """Elements as they are stored, in C order and their own dtype."""
    dtype = member.leaf.dtype
    assert dtype is not None
    in_order = np.ascontiguousarray(array).reshape(array.shape)
    is_raw = member.stored_dtype.kind == "V" and member.stored_dtype.fields is None
    return in_order.view(dtype) if is_raw else in_order.astype(dtype, copy=False)


def can_read(path: str | os.PathLike[str]) -> bool:
    """Whether a path means an archive of arrays, as `open` takes it.

    Args:
      path: Any path or URL.

    Returns:
      Whether there is one whose headers are not damaged.

    Example:
      >>> from jaxckpt.interop import npz
      >>> npz.can_read("/nowhere")
      False
    """
    try:
        open(path).close()
    except CheckpointError:
        return False
    return True


def open(path: str | os.PathLike[str]) -> NpzCheckpoint:
    """Opens an archive of arrays; reads its directory and the header of each array.

    Args:
      path: The file. A path, or the URL of an object store.

    Returns:
      The open checkpoint: ``checkpoint.keys()``, ``checkpoint["w"].shape``, ``checkpoint["w"][10:20]``. Closing it, or
      ``with``, gives back its file.

    Raises:
      NotFoundError: There is none.
      CorruptError: It is damaged.

    Example:
      >>> from jaxckpt.interop import npz
      >>> np.savez(tmp / "a.npz", w=np.arange(4))
      >>> with npz.open(tmp / "a.npz") as checkpoint:
      ...     checkpoint.keys(), checkpoint["w"][1:3]
      (('w',), array([1, 2]))
    """
    text = absolute_path(path)
    if not is_url(text) and list_directory(text) is not None:
        raise NotFoundError(f"{text!r} is a directory, and no archive of arrays")
    return NpzCheckpoint(text)


def read(
    path: str | os.PathLike[str] | ForeignCheckpoint,
    like: Any = None,
    **keywords: Unpack[RestoreKeywords],
) -> Any:
    """Restores an archive of arrays as a tree of JAX arrays.

    Each ``/`` of a name begins another level of the tree. Without ``like`` the result is nested dicts, with integers as
    keys where names have them, and 64-bit types come as NumPy arrays unless ``jax_enable_x64`` is set.

    Args:
      path: As for `open`, or an open checkpoint.
      like: As for `jaxckpt.restore`.
      keywords: ``mesh``, ``sharding``, ``select``, ``rename``, ``missing``, ``unexpected``, ``cast``, ``reshape``,
        ``report`` and ``options``, as for `jaxckpt.restore`. An archive has no shardings, so that
        with ``mesh`` all arrays are replicated.

    Returns:
      The tree, or the tree and a `RestoreReport`.

    Raises:
      NotFoundError: There is no archive.
      CorruptError: It is damaged.
      MismatchError: Its arrays and ``like`` differ; `.problems` lists every difference.
      UnsupportedLeafError: An array that is wanted has Python objects.

    Collective: no; each process of a group reads for its own devices.
    Host memory: at most ``host_bytes_max``, or the largest array; on CPU the arrays themselves, too.

    Example:
      >>> from jaxckpt.interop import npz
      >>> npz.write(tmp / "a.npz", {"w": jnp.ones(2)})
      >>> npz.read(tmp / "a.npz")
      {'w': Array([1., 1.], dtype=float32)}
    """
    check_keywords(keywords)
    if isinstance(path, ForeignCheckpoint):
        return restore_foreign(path, like, **keywords)
    with open(path) as checkpoint:
        return restore_foreign(checkpoint, like, **keywords)
