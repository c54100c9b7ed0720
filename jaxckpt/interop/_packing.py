"""How is a pytree written as a msgpack file of Flax's?

The file is what ``flax.serialization.to_bytes`` gives for the same tree: nested dicts with texts as keys, arrays as
extensions (`_packed`). It is never in memory: what stands between the arrays is packed first, so that the length is
known, then all is written in order under another name, synced and renamed.

Deliberately not here: groups of processes; one process writes all, and refuses arrays of which it has only a part.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Iterator
from typing import Any, final

import msgpack
import numpy as np

from jaxckpt._dtypes import dtype_from
from jaxckpt._errors import (
    CheckpointError,
    ExistsError,
    Problem,
    UnsupportedLeafError,
    WriteError,
    list_problems,
    printable_key,
)
from jaxckpt._keys import flatten, rebuild
from jaxckpt._nesting import name_of_key
from jaxckpt._progress import Progress, ProgressMeter
from jaxckpt._storage import Buffer
from jaxckpt._store import open_store

from ._arrays import ArrayContents, RefusedError, StringContents, WriteBuffer, contents_of
from ._files import absolute_path, split_path
from ._packed import ARRAY, CHUNKED_KEY, COMPLEX, DEPTH_MAX, SCALAR

# From here on Flax packs an array in chunks.
_CHUNK_BYTES = 1 << 30


@final
class _Elements:
    """The bytes of an array, taken in order."""

    def __init__(self, contents: ArrayContents) -> None:
        self._pieces = contents.pieces()
        self._rest: Buffer = np.empty(0, np.uint8)

    def take(self, nbytes: int) -> Iterator[Buffer]:
        """The next so many bytes, in pieces."""
        while nbytes:
            if not len(self._rest):
                self._rest = next(self._pieces)
            piece = self._rest[:nbytes]
            self._rest = self._rest[len(piece) :]
            nbytes -= len(piece)
            yield piece


# Bytes of msgpack, or of an array so many.
Part = bytes | tuple[_Elements, int]


@final
@dataclasses.dataclass(frozen=True, slots=True)
class _Packed:
    """A leaf, packed."""

    parts: list[Part]


def write(
    path: str | os.PathLike[str],
    tree: Any,
    *,
    overwrite: bool = False,
    on_progress: Callable[[Progress], None] | None = None,
) -> None:
    """Writes a pytree as a msgpack file that ``flax.serialization.from_bytes`` takes.

    Lists, tuples and other nodes become dicts, as in Flax's state dicts, also empty ones. Arrays keep their dtype;
    Python's numbers, texts and bytes, and None, are packed as they are. Typed PRNG keys are written as their key data.
    Leaves of open checkpoints are read while they are written.

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
    directory, name = split_path(absolute_path(text))
    if not name:
        raise ValueError(f"path must end in the name of a file, not {text!r}")
    parts = list(plan_parts(tree, text))
    lengths = [len(part) if isinstance(part, bytes) else part[1] for part in parts]
    meter = ProgressMeter(sum(lengths), "write", on_progress)
    store = open_store(directory)
    try:
        if store.exists(name) and not overwrite:
            raise ExistsError(
                f"{text!r} is there already\npass overwrite=True to replace it, or choose another path"
            )
        writer = store.create_replacement(name, sum(lengths))
        try:
            buffer = WriteBuffer(writer)
            for part in parts:
                for piece in pieces_of(part):
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


def pieces_of(part: Part) -> Iterator[Buffer]:
    """The bytes of a part, once."""
    if isinstance(part, bytes):
        return iter([np.frombuffer(part, np.uint8)])
    elements, nbytes = part
    return elements.take(nbytes)


# --- planning -------------------------------------------------------------------------------------------------


def plan_parts(tree: Any, path: str, chunk_bytes: int = _CHUNK_BYTES) -> Iterator[Part]:
    """The file, part by part; arrays of more than ``chunk_bytes`` are packed in chunks.

    Raises:
      UnsupportedLeafError: Some leaves cannot be packed.
    """
    flat = flatten(tree)
    packed: list[_Packed] = []
    problems: list[Problem] = []
    owners: dict[tuple[str, ...], str] = {}
    for key, leaf in zip(flat.keys, flat.leaves, strict=True):
        try:
            if not key:
                raise RefusedError("has no name: put the leaf into a dict")
            # An array in chunks goes a few levels deeper.
            if key.count("/") > DEPTH_MAX - 5:
                raise RefusedError(f"lies below {key.count('/')} levels, too deep for `read`")
            # Flax has texts as keys only: the int 3 and the text "3" are one.
            owner = owners.setdefault(tuple(map(name_of_key, key.split("/"))), key)
            if owner != key:
                raise RefusedError(f"has the path of the leaf {printable_key(owner)} in Flax")
            packed.append(_Packed(_plan_leaf(leaf, chunk_bytes)))
        except RefusedError as refusal:
            problems.append(Problem(key, "leaf", str(refusal)))
    if problems:
        headline = f"cannot write {path!r}: Flax can't have {len(problems)} of {len(flat.keys)} leaves"
        raise UnsupportedLeafError(list_problems(headline, problems, ["nothing was written"]), problems)
    return _joined(_pack(rebuild(flat.nodes, packed)))


def _plan_leaf(leaf: Any, chunk_bytes: int) -> list[Part]:
    is_scalar = isinstance(leaf, np.generic)
    if isinstance(leaf, (bool, int, float, str, bytes)) and not is_scalar:
        try:
            return [_packb(leaf)]
        except (OverflowError, UnicodeEncodeError) as error:
            raise RefusedError(f"cannot be packed: {error}") from error
    if isinstance(leaf, complex) and not is_scalar:
        return [_packb(msgpack.ExtType(COMPLEX, _packb((leaf.real, leaf.imag))))]
    contents = contents_of(leaf)
    if isinstance(contents, StringContents):
        if contents.shape:
            raise RefusedError("is an array of strings, which Flax cannot pack")
        return _plan_leaf(contents.strings[0], chunk_bytes)
    if not _has_name(contents.dtype):
        raise RefusedError(f"has the dtype {contents.dtype}, which Flax cannot pack")
    elements = _Elements(contents)
    count = math.prod(contents.shape)
    if contents.nbytes <= chunk_bytes:
        code = SCALAR if is_scalar else ARRAY
        return _plan_array(elements, contents.shape, contents.dtype, code)
    step = max(1, chunk_bytes // contents.dtype.itemsize)
    sizes = [min(step, count - first) for first in range(0, count, step)]
    chunks = {
        str(number): _Packed(_plan_array(elements, (size,), contents.dtype, ARRAY))
        for number, size in enumerate(sizes)
    }
    shape = {str(axis): _Packed([_packb(size)]) for axis, size in enumerate(contents.shape)}
    return list(_pack({CHUNKED_KEY: _Packed([_packb(True)]), "shape": shape, "chunks": chunks}))


def _has_name(dtype: np.dtype[Any]) -> bool:
    try:
        return dtype_from(dtype.name) == dtype
    except ValueError:
        return False


def _plan_array(elements: _Elements, shape: tuple[int, ...], dtype: np.dtype[Any], code: int) -> list[Part]:
    nbytes = math.prod(shape) * dtype.itemsize
    inner = b"\x93" + _packb(shape) + _packb(dtype.name) + _header_of(nbytes, (0xC4, 0xC5, 0xC6))
    length = len(inner) + nbytes
    if length in (1, 2, 4, 8, 16):
        extension = bytes([0xD4 + length.bit_length() - 1, code])
    else:
        extension = _header_of(length, (0xC7, 0xC8, 0xC9)) + bytes([code])
    return [extension + inner, (elements, nbytes)]


def _packb(value: Any) -> bytes:
    packed: Any = msgpack.packb(value)
    return packed


def _header_of(length: int, kinds: tuple[int, int, int]) -> bytes:
    """The first bytes of something of msgpack that has a length of one, two or four bytes."""
    for kind, size in zip(kinds, (1, 2, 4), strict=True):
        if length < 1 << (8 * size):
            return bytes([kind]) + length.to_bytes(size, "big")
    raise RefusedError(f"has {length} bytes, which is too much for msgpack")


def _pack(node: Any) -> Iterator[Part]:
    """A tree of dicts, lists, tuples, leaves and None."""
    if isinstance(node, _Packed):
        yield from node.parts
        return
    if node is None:
        yield _packb(None)
        return
    if hasattr(node, "_asdict"):
        node = node._asdict()
    children: dict[Any, Any] = node if isinstance(node, dict) else dict(enumerate(node))
    packer = msgpack.Packer(autoreset=False)
    packer.pack_map_header(len(children))
    yield packer.bytes()
    for name, child in children.items():
        yield _packb(str(name))
        yield from _pack(child)


def _joined(parts: Iterator[Part]) -> Iterator[Part]:
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
