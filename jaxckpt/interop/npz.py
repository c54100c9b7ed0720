"""Files of ``numpy.savez``, read lazily and written in bounded memory.

`open` shows what an archive holds without reading it, `read` restores it as a tree of JAX arrays, `write` writes one
that ``numpy.load`` reads. What is read whole is verified by the archive's CRC-32; a part of an array that is not
compressed is read alone, and is not.

NumPy's files have no name for the types of `ml_dtypes`, such as bfloat16: NumPy itself saves these as raw bytes, which
come back so here too. They are refused by `write`; ``jaxckpt convert --dtype float32`` writes them as float32.

Example:
  >>> from jaxckpt.interop import npz
  >>> npz.write(tmp / "model.npz", {"dense": {"kernel": jnp.arange(6.0).reshape(2, 3)}})
  >>> print(npz.open(tmp / "model.npz"))
  dense/kernel (float32) [2,3]

Source: https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html
"""

from __future__ import annotations

import builtins
import contextlib
import dataclasses
import io
import math
import os
import secrets
import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping
from typing import Any, final

import numpy as np
from jax.sharding import Mesh

from jaxckpt._config import MIB, RestoreOptions
from jaxckpt._errors import (
    CheckpointError,
    ExistsError,
    NotFoundError,
    Problem,
    UnsupportedLeafError,
    WriteError,
    list_problems,
    printable_key,
)
from jaxckpt._foreign import ForeignCheckpoint, ForeignLeaf, name_of_key, restore_foreign
from jaxckpt._keys import flatten
from jaxckpt._naming import Rename, Select
from jaxckpt._progress import Progress, ProgressMeter
from jaxckpt._storage import Buffer, local_path
from jaxckpt._store import Kernel

from ._arrays import ArrayContents, RefusedError, StringContents, contents_of
from ._files import SourceFile, corrupt, read_box

__all__ = ["NpzCheckpoint", "can_read", "open", "read", "write"]

_SUFFIX = ".npy"
_LOCAL_HEADER = struct.Struct("<4s5H3L2H")
_LOCAL_MAGIC = b"PK\x03\x04"
# What NumPy's reader takes.
_HEADER_BYTES_MAX = 64 << 10
_PIECE_BYTES = 4 * MIB
# The least that the calendar of archives knows, so that the same arrays make the same file.
_EPOCH = (1980, 1, 1, 0, 0, 0)


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

    def __init__(self, path: str) -> None:
        ForeignCheckpoint.__init__(self, path, "npz")
        self._source = SourceFile(path, self._count_read)
        try:
            self._archive = zipfile.ZipFile(path)
        except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
            self._source.close()
            if self._source.size == 0 or not path.endswith(".npz"):
                raise NotFoundError(f"{path!r} is no archive of arrays: {error}") from error
            raise corrupt(path, "manifest", f"is damaged, or no archive: {error}") from error
        try:
            self._members = self._find_members()
        except BaseException:
            self.close()
            raise
        self._whole: dict[str, np.ndarray[Any, Any]] = {}

    def _find_members(self) -> dict[str, _Member]:
        members: dict[str, _Member] = {}
        for info in self._archive.infolist():
            if info.is_dir():
                continue
            if not info.filename.endswith(_SUFFIX):
                raise NotFoundError(
                    f"{self.path!r} is an archive of other things than arrays: {info.filename!r}"
                )
            name = info.filename.removesuffix(_SUFFIX)
            if name in members:
                raise corrupt(self.path, "manifest", f"has two arrays {name!r}", name)
            members[name] = self._member(name, info)
        return members

    def _member(self, name: str, info: zipfile.ZipInfo) -> _Member:
        try:
            with self._archive.open(info) as file:
                header = io.BytesIO(file.read(_HEADER_BYTES_MAX))
            version = np.lib.format.read_magic(header)
            read_header = (
                np.lib.format.read_array_header_1_0
                if version == (1, 0)
                else np.lib.format.read_array_header_2_0
            )
            shape, is_fortran, stored_dtype = read_header(header)
        except (ValueError, EOFError, OSError, zipfile.BadZipFile, zlib.error, RuntimeError) as error:
            if "Bad CRC-32" in str(error):
                raise corrupt(self.path, "checksum", f"{info.filename}: {error}", name) from error
            raise corrupt(self.path, "manifest", f"{info.filename} is no array: {error}", name) from error
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
        dtype = None if stored_dtype.hasobject else stored_dtype.newbyteorder("=")
        stored_as = "objects" if dtype is None else str(stored_dtype)
        leaf = ForeignLeaf(name, dtype, tuple(map(int, shape)), stored_as)
        return _Member(info, leaf, header_bytes, offset, stored_dtype, bool(is_fortran))

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
        return {name: member.leaf for name, member in self._members.items()}

    def read_box(self, key: str, lo: tuple[int, ...], hi: tuple[int, ...]) -> np.ndarray[Any, Any]:
        """A box of an array, C-contiguous. May be called from several threads.

        Args:
          key: Name.
          lo: First place along each axis.
          hi: The places after the last ones.

        Returns:
          The box; the memory is the caller's alone.

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
            turned = read_box(
                self._source, member.offset, shape[::-1], member.stored_dtype, lo[::-1], hi[::-1]
            )
            return np.ascontiguousarray(turned.T, member.leaf.dtype)
        box = read_box(self._source, member.offset, shape, member.stored_dtype, lo, hi)
        return np.ascontiguousarray(box, member.leaf.dtype)

    def stream(self, key: str, lo: int, hi: int) -> Buffer:
        """Bytes of an array; see `ForeignCheckpoint.stream`.

        Those of one that is compressed, or in Fortran order, are in memory whole until the last ones were asked for.

        Raises:
          CorruptError: The array is damaged.
          UnsupportedLeafError: It has Python objects.
        """
        member = self._readable(key)
        if member.offset is not None and not member.is_fortran and member.stored_dtype.isnative:
            if lo == 0:
                self._verify(key, member)
            return np.frombuffer(self._source.read(member.offset + lo, hi - lo), np.uint8)
        if key not in self._whole:
            self._whole[key] = self._read_whole(key, member).reshape(-1).view(np.uint8)
        found = self._whole[key][lo:hi]
        if hi == member.leaf.nbytes:
            del self._whole[key]
        return found

    def close(self) -> None:
        """Closes the file; nothing more can be read."""
        self._source.close()
        self._archive.close()

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
        stored = np.empty(math.prod(member.leaf.shape), member.stored_dtype)
        target = memoryview(stored.reshape(-1).view(np.uint8)) if stored.nbytes else memoryview(bytearray())
        filled = 0
        for piece in self._pieces(key, member):
            target[filled : filled + len(piece)] = piece
            filled += len(piece)
        shape = member.leaf.shape
        array = stored.reshape(shape[::-1]).T if member.is_fortran else stored.reshape(shape)
        return np.ascontiguousarray(array, member.leaf.dtype).reshape(shape)

    def _verify(self, key: str, member: _Member) -> None:
        for _ in self._pieces(key, member):
            pass

    def _pieces(self, key: str, member: _Member) -> Any:
        """The bytes of the elements, in pieces; the last one only if the checksum is right."""
        try:
            with self._archive.open(member.info) as file:
                file.read(member.header_bytes)
                while piece := file.read(_PIECE_BYTES):
                    self._count_read(len(piece))
                    yield piece
        except (zipfile.BadZipFile, zlib.error, EOFError, OSError) as error:
            raise corrupt(self.path, "checksum", f"{member.info.filename}: {error}", key) from error


def can_read(path: str | os.PathLike[str]) -> bool:
    """Whether a path means an archive of arrays, as `open` takes it.

    Args:
      path: Any local path.

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
      path: The file. Local.

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
    text = os.path.abspath(local_path(os.fspath(path)))
    if os.path.isdir(text):
        raise NotFoundError(f"{text!r} is a directory, and no archive of arrays")
    return NpzCheckpoint(text)


def read(
    path: str | os.PathLike[str] | ForeignCheckpoint,
    like: Any = None,
    *,
    mesh: Mesh | None = None,
    sharding: Any = None,
    select: Select = None,
    rename: Rename = None,
    missing: str = "error",
    unexpected: str = "error",
    cast: bool = False,
    reshape: bool = False,
    report: bool = False,
    options: RestoreOptions | None = None,
) -> Any:
    """Restores an archive of arrays as a tree of JAX arrays.

    Without ``like`` the result is ``{name: array}``; with ``like``, or ``rename``, a tree whose keys match the names.
    Without ``like``, 64-bit types come as NumPy arrays unless ``jax_enable_x64`` is set.

    Args:
      path: As for `open`, or an open checkpoint.
      like: As for `jaxckpt.restore`.
      mesh: As for `jaxckpt.restore`; an archive has no shardings, so that all arrays are replicated.
      sharding: As for `jaxckpt.restore`.
      select: As for `jaxckpt.restore`.
      rename: As for `jaxckpt.restore`.
      missing: As for `jaxckpt.restore`.
      unexpected: As for `jaxckpt.restore`.
      cast: As for `jaxckpt.restore`.
      reshape: As for `jaxckpt.restore`.
      report: As for `jaxckpt.restore`.
      options: As for `jaxckpt.restore`.

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
    with contextlib.ExitStack() as stack:
        checkpoint = path if isinstance(path, ForeignCheckpoint) else stack.enter_context(open(path))
        return restore_foreign(
            checkpoint,
            like,
            mesh=mesh,
            sharding=sharding,
            select=select,
            rename=rename,
            missing=missing,
            unexpected=unexpected,
            cast=cast,
            reshape=reshape,
            report=report,
            options=options,
        )


# --- writing --------------------------------------------------------------------------------------------------


def write(
    path: str | os.PathLike[str],
    tree: Any,
    *,
    overwrite: bool = False,
    on_progress: Callable[[Progress], None] | None = None,
) -> None:
    """Writes a pytree as an archive that ``numpy.load`` reads; not compressed.

    An array's name is the path of its leaf, with ``/`` between the parts and nothing escaped. Python's int becomes
    int64, float float64, complex complex128. Typed PRNG keys are written as their key data. Leaves of open checkpoints
    are read while they are written. None is no leaf.

    The file is there whole and durable when the function returns, and the old one as it was when it fails.

    Args:
      path: Path of the file; missing directories are made. Local.
      tree: Pytree with at least one level: a single leaf has no name.
      overwrite: Whether a file at ``path`` may be replaced.
      on_progress: Called with a `Progress` after each piece of a few megabytes.

    Raises:
      UnsupportedLeafError: Leaves that NumPy's files have no type for, or that would have one name; all are listed.
      ExistsError: A file is there, and ``overwrite`` is False.
      CorruptError: A leaf of an open checkpoint is damaged.
      WriteError: Storage refused a write.

    Host memory: Some 16 MiB.

    Example:
      >>> from jaxckpt.interop import npz
      >>> npz.write(tmp / "a.npz", {"layers": [jnp.ones(3)]})
      >>> np.load(tmp / "a.npz")["layers/0"]
      array([1., 1., 1.], dtype=float32)
    """
    target = os.path.abspath(local_path(os.fspath(path)))
    arrays = _plan(tree, target)
    meter = ProgressMeter(sum(contents.nbytes for contents in arrays.values()), "write", on_progress)
    try:
        if os.path.lexists(target) and not overwrite:
            raise ExistsError(
                f"{target!r} is there already\npass overwrite=True to replace it, or choose another path"
            )
        os.makedirs(os.path.dirname(target), exist_ok=True)
        write_archive(target, arrays, meter, Kernel())
    except OSError as error:
        if isinstance(error, CheckpointError):
            raise
        reason = error.strerror or error
        raise WriteError(
            f"cannot write {target!r}: storage refused a write: {reason}\na file that was there before is as it was",
            error.errno,
        ) from error
    meter.enter("done")


def _plan(tree: Any, path: str) -> dict[str, ArrayContents]:
    """The arrays by name.

    Raises:
      UnsupportedLeafError: Some leaves cannot be written.
    """
    flat = flatten(tree)
    arrays: dict[str, ArrayContents] = {}
    problems: list[Problem] = []
    for key, leaf in zip(flat.keys, flat.leaves, strict=True):
        name = name_of_key(key)
        try:
            if not name:
                raise RefusedError("has no name: put the leaf into a dict")
            if name in arrays:
                raise RefusedError(f"has the name {name!r}, and so has another leaf")
            contents = contents_of(leaf)
            if isinstance(contents, StringContents):
                raise RefusedError("is a string or an array of strings, which is not written here")
            if np.dtype(np.lib.format.dtype_to_descr(contents.dtype)) != contents.dtype:
                raise RefusedError(
                    f"has the dtype {contents.dtype}, for which NumPy's files have no name; convert it to another one"
                )
            arrays[name] = contents
        except RefusedError as refusal:
            problems.append(Problem(key, "leaf", str(refusal)))
    if problems:
        headline = f"cannot write {path!r}: an archive can't have {len(problems)} of {len(flat.keys)} leaves"
        raise UnsupportedLeafError(list_problems(headline, problems, ["nothing was written"]), problems)
    return arrays


def write_archive(
    target: str, arrays: Mapping[str, ArrayContents], meter: ProgressMeter, kernel: Kernel
) -> None:
    """Writes the archive under another name, syncs it, and renames it: that is the commit."""
    temporary = f"{target}.tmp-{secrets.token_hex(8)}"
    try:
        with builtins.open(temporary, "xb") as file:
            with zipfile.ZipFile(file, "w", allowZip64=True) as archive:
                for name, contents in arrays.items():
                    _write_array(archive, name, contents, meter)
            file.flush()
            kernel.fsync(file.fileno())
        meter.enter("commit")
        kernel.rename(temporary, target)
    except BaseException:
        with contextlib.suppress(OSError):  # the failure that matters is the one that led here
            os.unlink(temporary)
        raise
    directory = kernel.open(os.path.dirname(target), os.O_RDONLY | os.O_DIRECTORY)
    try:
        kernel.fsync(directory)
    finally:
        kernel.close(directory)


def _write_array(archive: zipfile.ZipFile, name: str, contents: ArrayContents, meter: ProgressMeter) -> None:
    header = {
        "descr": np.lib.format.dtype_to_descr(contents.dtype),
        "fortran_order": False,
        "shape": contents.shape,
    }
    entry = zipfile.ZipInfo(name + _SUFFIX, _EPOCH)
    entry.external_attr = 0o600 << 16
    with archive.open(entry, "w", force_zip64=True) as file:
        np.lib.format.write_array_header_1_0(file, header)
        for piece in contents.pieces():
            file.write(piece)
            meter.add(len(piece))
