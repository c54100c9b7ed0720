"""How is a pytree written as a msgpack file of Flax's?

The file is what ``flax.serialization.to_bytes`` gives for the same tree: nested dicts with texts as keys, arrays as
extensions (`_packed`). It is never in memory: what stands between the arrays is packed first, so that the length is
known, then all is written in order under another name, synced and renamed.

Deliberately not here: groups of processes; one process writes all, and refuses arrays of which it has only a part.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from typing import Any

import msgpack
import numpy as np

from jaxckpt._errors import (
    CheckpointError,
    ExistsError,
    Problem,
    UnsupportedLeafError,
    WriteError,
    list_problems,
)
from jaxckpt._foreign import name_of_key
from jaxckpt._keys import flatten
from jaxckpt._progress import Progress, ProgressMeter
from jaxckpt._store import open_store

from ._arrays import ArrayContents, RefusedError, StringContents, WriteBuffer, contents_of
from ._packed import ARRAY, CHUNKED_KEY, COMPLEX

# From here on Flax packs an array in chunks.
CHUNK_BYTES = 1 << 30


# Bytes of msgpack, or elements `[first, last)` of an array.
_Part = bytes | tuple[ArrayContents, int, int]


def write(
    path: str | os.PathLike[str],
    tree: Any,
    *,
    overwrite: bool = False,
    on_progress: Callable[[Progress], None] | None = None,
) -> None:
    """Writes a pytree as a msgpack file that ``flax.serialization.from_bytes`` takes.

    Lists, tuples and other nodes become dicts, as in Flax's state dicts. Arrays keep their dtype; Python's numbers,
    texts and bytes are packed as they are. Typed PRNG keys are written as their key data. Leaves of open checkpoints
    are read while they are written. None is no leaf.

    The file is there whole and durable when the function returns, and the old one as it was when it fails.

    Args:
      path: Path or URL of the file; missing directories are made.
      tree: Pytree with at least one level: a single leaf has no name.
      overwrite: Whether a file at ``path`` may be replaced.
      on_progress: Called with a `Progress` after each piece of a few megabytes.

    Raises:
      UnsupportedLeafError: Leaves that cannot be packed; all are listed.
      ExistsError: A file is there, and ``overwrite`` is False.
      CorruptError: A leaf of an open checkpoint is damaged.
      WriteError: Storage refused a write.

    Host memory: Some 16 MiB. On an object store, the file.

    Example:
      >>> from jaxckpt.interop import flax
      >>> flax.write(tmp / "state.msgpack", {"params": [jnp.ones(3)], "step": 7})
      >>> flax.open(tmp / "state.msgpack").keys()
      ('params/0', 'step')
    """
    text = os.fspath(path)
    directory, name = os.path.split(text)
    if not name:
        raise ValueError(f"path must end in the name of a file, not {text!r}")
    parts = _plan(tree, text)
    lengths = [len(part) if isinstance(part, bytes) else _nbytes(part) for part in parts]
    meter = ProgressMeter(sum(lengths), "write", on_progress)
    try:
        store = open_store(directory)
        if store.exists(name) and not overwrite:
            raise ExistsError(
                f"{text!r} is there already\npass overwrite=True to replace it, or choose another path"
            )
        writer = store.create_replacement(name, sum(lengths))
        try:
            buffer = WriteBuffer(writer)
            for part in parts:
                for piece in _pieces(part):
                    buffer.append(piece)
                    meter.add(len(piece))
            buffer.flush()
            meter.enter("commit")
            writer.finish()
        except BaseException:
            writer.abandon()
            raise
    except OSError as error:
        if isinstance(error, CheckpointError):
            raise
        reason = error.strerror or error
        raise WriteError(
            f"cannot write {text!r}: storage refused a write: {reason} ({error.filename or directory})\n"
            "a file that was there before is as it was",
            error.errno,
        ) from error
    meter.enter("done")


def _nbytes(part: tuple[ArrayContents, int, int]) -> int:
    contents, first, last = part
    return (last - first) * contents.dtype.itemsize


def _pieces(part: _Part) -> Iterator[np.ndarray[Any, np.dtype[np.uint8]]]:
    if isinstance(part, bytes):
        yield np.frombuffer(part, np.uint8)
        return
    contents, first, last = part
    yield from contents.pieces(first, last)


# --- planning -------------------------------------------------------------------------------------------------


def _plan(tree: Any, path: str) -> list[_Part]:
    """The file, part by part.

    Raises:
      UnsupportedLeafError: Some leaves cannot be packed.
    """
    flat = flatten(tree)
    root: dict[str, Any] = {}
    problems: list[Problem] = []
    for key, leaf in zip(flat.keys, flat.leaves, strict=True):
        try:
            if not key:
                raise RefusedError("has no name: put the leaf into a dict")
            names = [name_of_key(component) for component in key.split("/")]
            _put(root, names, _plan_leaf(leaf))
        except RefusedError as refusal:
            problems.append(Problem(key, "leaf", str(refusal)))
    if problems:
        headline = f"cannot write {path!r}: Flax can't have {len(problems)} of {len(flat.keys)} leaves"
        raise UnsupportedLeafError(list_problems(headline, problems, ["nothing was written"]), problems)
    return list(_joined(_pack(root)))


def _put(root: dict[str, Any], names: list[str], leaf: list[_Part]) -> None:
    for name in names[:-1]:
        root = root.setdefault(name, {})
        if not isinstance(root, dict):
            raise RefusedError(
                "has the path of another leaf, but for types of keys that Flax does not tell apart"
            )
    if names[-1] in root:
        raise RefusedError(
            "has the path of another leaf, but for types of keys that Flax does not tell apart"
        )
    root[names[-1]] = leaf


def _plan_leaf(leaf: Any) -> list[_Part]:
    if isinstance(leaf, (bool, int, float, str, bytes)) and not isinstance(leaf, np.generic):
        try:
            return [msgpack.packb(leaf, use_bin_type=True)]
        except (OverflowError, UnicodeEncodeError) as error:
            raise RefusedError(f"cannot be packed: {error}") from error
    if isinstance(leaf, complex) and not isinstance(leaf, np.generic):
        return [msgpack.packb(msgpack.ExtType(COMPLEX, msgpack.packb((leaf.real, leaf.imag))))]
    contents = contents_of(leaf)
    if isinstance(contents, StringContents):
        if contents.shape:
            raise RefusedError("is an array of strings, which Flax cannot pack")
        return _plan_leaf(contents.strings[0])
    count = math.prod(contents.shape)
    if contents.nbytes <= CHUNK_BYTES:
        return _plan_array(contents, contents.shape, 0, count)
    step = max(1, CHUNK_BYTES // contents.dtype.itemsize)
    chunks = {
        str(number): _plan_array(
            contents, (min(first + step, count) - first,), first, min(first + step, count)
        )
        for number, first in enumerate(range(0, count, step))
    }
    shape = {str(axis): [msgpack.packb(size)] for axis, size in enumerate(contents.shape)}
    return list(_pack({CHUNKED_KEY: [msgpack.packb(True)], "shape": shape, "chunks": chunks}))


def _plan_array(contents: ArrayContents, shape: tuple[int, ...], first: int, last: int) -> list[_Part]:
    nbytes = (last - first) * contents.dtype.itemsize
    packer = msgpack.Packer(use_bin_type=True, autoreset=False)
    packer.pack_array_header(3)
    packer.pack(shape)
    packer.pack(contents.dtype.name)
    inner = packer.bytes() + _header_of(nbytes, (0xC4, 0xC5, 0xC6))
    length = len(inner) + nbytes
    if length in (1, 2, 4, 8, 16):
        extension = bytes([0xD4 + length.bit_length() - 1, ARRAY])
    else:
        extension = _header_of(length, (0xC7, 0xC8, 0xC9)) + bytes([ARRAY])
    return [extension + inner, (contents, first, last)]


def _header_of(length: int, kinds: tuple[int, int, int]) -> bytes:
    """The first bytes of something of msgpack that has a length of one, two or four bytes."""
    for kind, size in zip(kinds, (1, 2, 4), strict=True):
        if length < 1 << (8 * size):
            return bytes([kind]) + length.to_bytes(size, "big")
    raise RefusedError(f"has {length} bytes, which is too much for msgpack")


def _pack(node: Any) -> Iterator[_Part]:
    """A dict of dicts and leaves."""
    if not isinstance(node, dict):
        yield from node
        return
    packer = msgpack.Packer(autoreset=False)
    packer.pack_map_header(len(node))
    yield packer.bytes()
    for name, inner in node.items():
        yield msgpack.packb(name)
        yield from _pack(inner)


def _joined(parts: Iterator[_Part]) -> Iterator[_Part]:
    """The same with bytes that stand side by side in one."""
    gathered: list[bytes] = []
    for part in parts:
        if isinstance(part, bytes):
            gathered.append(part)
            continue
        yield b"".join(gathered)
        gathered.clear()
        yield part
    yield b"".join(gathered)
