"""How is a tree written as an archive that ``numpy.load`` reads?

1. All leaves are looked at, and all that an archive cannot have are named at once. Nothing is written before that.
2. The arrays are written one after another, a piece at a time, into a file with another name beside the target; it is
   synced and renamed: that is the commit. The same arrays make the same bytes.

Types of `ml_dtypes` are written as raw bytes, with their name as the comment of the entry; `npz` says why. Deliberately
not here: compression, and object stores, on which an archive cannot be written in pieces.

Source: https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html
"""

from __future__ import annotations

import contextlib
import os
import zipfile
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jaxckpt._dtypes import is_jax_dtype
from jaxckpt._errors import (
    CheckpointError,
    ExistsError,
    Problem,
    UnsupportedLeafError,
    WriteError,
    list_problems,
)
from jaxckpt._keys import flatten
from jaxckpt._nesting import name_of_key
from jaxckpt._progress import Progress, ProgressMeter
from jaxckpt._storage import Hold, temporary_name
from jaxckpt._store import Kernel, LocalStore

from ._arrays import ArrayContents, RefusedError, StringContents, contents_of
from ._files import absolute_path, is_url

# The end of the name of an array's entry.
NPY_SUFFIX = ".npy"
# The least that the calendar of archives knows, so that the same arrays make the same file.
_EPOCH = (1980, 1, 1, 0, 0, 0)


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
    target = absolute_path(path)
    if is_url(target):
        raise ValueError(
            f"archives are written to local files, and {target!r} is none: write it there, and copy it"
        )
    arrays = plan_arrays(tree, target)
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


def plan_arrays(tree: Any, path: str) -> dict[str, ArrayContents]:
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
            if not key:
                raise RefusedError("has no name: put the leaf into a dict")
            if name in arrays:
                raise RefusedError(f"has the name {name!r}, and so has another leaf")
            contents = _contents_of(leaf)
            arrays[name] = contents
        except RefusedError as refusal:
            problems.append(Problem(key, "leaf", str(refusal)))
    if problems:
        headline = f"cannot write {path!r}: an archive can't have {len(problems)} of {len(flat.keys)} leaves"
        raise UnsupportedLeafError(list_problems(headline, problems, ["nothing was written"]), problems)
    return arrays


def _contents_of(leaf: Any) -> ArrayContents:
    """What is to be written for a leaf.

    Raises:
      RefusedError: Archives have no place for it.
    """
    if isinstance(leaf, np.ndarray) and leaf.dtype.kind in "SU":
        strings: np.ndarray[Any, Any] = leaf
        return ArrayContents(strings.shape, strings.dtype, lambda run: strings[tuple(map(slice, *run.box))])
    contents = contents_of(leaf)
    if isinstance(contents, StringContents):
        raise RefusedError("is a string, or holds Python objects: NumPy has arrays of strings for that")
    if _is_extension(contents.dtype) and not is_jax_dtype(contents.dtype):
        raise RefusedError(f"has the dtype {contents.dtype}, which NumPy's files do not have")
    return contents


def _is_extension(dtype: np.dtype[Any]) -> bool:
    """Whether it is of `ml_dtypes`, or of another package that registers types with NumPy."""
    return dtype.isbuiltin == 2


def write_archive(
    target: str, arrays: Mapping[str, ArrayContents], meter: ProgressMeter, kernel: Kernel
) -> None:
    """Writes the archive under another name, syncs it, and renames it: that is the commit."""
    temporary = temporary_name(target)
    store = LocalStore(os.path.dirname(target), kernel)
    store.forget_cut_off(os.path.basename(target))
    hold: Hold | None = None
    try:
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        with os.fdopen(kernel.open(temporary, flags, 0o666), "w+b") as file:
            hold = store.hold_temporary(temporary)
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
    finally:
        if hold is not None:
            hold.release()
    directory = kernel.open(os.path.dirname(target), os.O_RDONLY | os.O_DIRECTORY)
    try:
        kernel.fsync(directory)
    finally:
        kernel.close(directory)


def _write_array(archive: zipfile.ZipFile, name: str, contents: ArrayContents, meter: ProgressMeter) -> None:
    dtype = contents.dtype
    header = {
        "descr": f"|V{dtype.itemsize}" if _is_extension(dtype) else np.lib.format.dtype_to_descr(dtype),
        "fortran_order": False,
        "shape": contents.shape,
    }
    entry = zipfile.ZipInfo(name + NPY_SUFFIX, _EPOCH)
    entry.external_attr = 0o600 << 16
    if _is_extension(dtype):
        entry.comment = dtype.name.encode()
    with archive.open(entry, "w", force_zip64=True) as file:
        np.lib.format.write_array_header_1_0(file, header)
        for piece in contents.pieces():
            file.write(piece)
            meter.add(len(piece))
