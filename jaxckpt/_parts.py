"""Which process wrote a chunk, and where does it lie?

In a checkpoint of one process the manifest itself has the table of all chunks. In one of many processes the manifest
says for each leaf which process *owns* which chunk, and each process has put the table of what it wrote into an object
of its own, a *part*. So the manifest stays small, nobody gathers what all wrote, and whoever restores a few shards
reads the parts of a few processes.

`ChunkIndex` looks a chunk up, whichever way it is, and reads a part when it first needs it.

Deliberately not here: who should own which chunk (`_ownership`).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, final

import msgpack
import numpy as np

from ._errors import CorruptError, MismatchError, Problem
from ._manifest import ABSENT, LeafSpec, Manifest, check_directories
from ._shardings import Box
from ._tables import OWN_OBJECT, ChunkTable, encode_table, parse_column, parse_table
from ._values import unpack


# Not frozen, which would make it three times as slow: there is one for each chunk.
@dataclasses.dataclass(slots=True, eq=False)
class ChunkPlace:
    """Where one chunk lies.

    Attributes:
      object: Path of its object below the checkpoint.
      pack: Process and number of its pack, or None for an object of its own.
      object_length: Bytes of the object.
      table, row: What is said of the chunk.
    """

    object: str
    pack: tuple[int, int] | None
    object_length: int
    table: ChunkTable
    row: int

    @property
    def offset(self) -> int:
        """Byte of the object at which the chunk starts."""
        return int(self.table.offset[self.row])

    @property
    def length(self) -> int:
        """Its bytes as stored, padding included."""
        return int(self.table.length[self.row])


@final
class ChunkIndex:
    """Says where each chunk of a checkpoint lies.

    Args:
      manifest: Of the checkpoint.
      read_part: Returns the bytes of a process's part, verified; None when the manifest has the only table.
    """

    def __init__(self, manifest: Manifest, read_part: Callable[[int], bytes] | None = None) -> None:
        self.manifest = manifest
        self._read_part = read_part
        self._tables: dict[int, _Table] = {}
        self.bytes_read = 0  # of parts

    def place(self, leaf: int, chunk: int) -> ChunkPlace:
        """Where a chunk lies.

        Args:
          leaf: Number of the leaf.
          chunk: Number of the chunk among all, see `Manifest.chunk_starts`.

        Raises:
          CorruptError: The part that says so is damaged.
          MismatchError: Another process keeps the chunk, in a directory of its own.
        """
        manifest = self.manifest
        if not manifest.owners:
            return _place(manifest, 0, manifest.packs, manifest.chunks, leaf, chunk, chunk)
        pattern = int(manifest.owner_index[leaf])
        at = chunk - int(manifest.chunk_starts[leaf])
        owner = int(manifest.owners[pattern][at])
        if owner == ABSENT:
            raise self._absent(leaf)
        table = self._table(owner)
        row = table.row(leaf, pattern, at)
        return _place(manifest, owner, table.packs, table.chunks, leaf, chunk, row)

    def load(self, process: int) -> None:
        """Reads the part of a process, unless it is read.

        Raises:
          CorruptError: It is damaged.
        """
        self._table(process)

    def present_boxes(self, leaf: int) -> list[Box]:
        """What is there of a leaf: the whole of it, or the chunks that this process kept for itself."""
        manifest = self.manifest
        spec = manifest.spec(leaf)
        whole = (0,) * len(spec.stored_shape), spec.stored_shape
        if manifest.local is None or not spec.chunk_count:
            return [whole]
        column = manifest.owners[int(manifest.owner_index[leaf])]
        if not np.any(column == ABSENT):
            return [whole]
        first = int(manifest.chunk_starts[leaf])
        return [
            box_of_chunk(spec, manifest.chunk_index(leaf, first + int(at)))
            for at in np.flatnonzero(column != ABSENT)
        ]

    def places(self) -> Iterator[ChunkPlace]:
        """Where each chunk lies, but for those that other processes keep for themselves.

        Raises:
          CorruptError: A part that says so is damaged.
        """
        manifest = self.manifest
        for leaf in range(len(manifest.keys)):
            first, last = map(int, manifest.chunk_starts[leaf : leaf + 2])
            column = (
                manifest.owners[int(manifest.owner_index[leaf])] if manifest.owners and last > first else None
            )
            for chunk in range(first, last):
                if column is None or column[chunk - first] != ABSENT:
                    yield self.place(leaf, chunk)

    def _table(self, process: int) -> _Table:
        table = self._tables.get(process)
        if table is None:
            manifest = self.manifest
            if manifest.parts:
                assert self._read_part is not None
                data = self._read_part(process)
                self.bytes_read += len(data)
                chunks, packs = parse_part(data, manifest, process)
            else:
                chunks, packs = manifest.chunks, manifest.packs
            table = self._tables[process] = _Table(manifest, process, chunks, packs)
        return table

    def _absent(self, leaf: int) -> MismatchError:
        manifest = self.manifest
        assert manifest.local is not None
        process, count = manifest.local
        key = manifest.keys[leaf]
        message = (
            f"another process keeps a part of it, for {count} processes saved this with local=True, of which this one"
            f" is {process}: restore with {count} processes on the same mesh"
        )
        problem = Problem(key, "sharding", message)
        return MismatchError(f"cannot read {problem}", [problem])


@final
class _Table:
    """The table of one process, with the row of each chunk that it owns."""

    def __init__(self, manifest: Manifest, process: int, chunks: ChunkTable, packs: tuple[int, ...]) -> None:
        self.chunks = chunks
        self.packs = packs
        self._manifest = manifest
        self._process = process
        counts = manifest.counts_of(process)
        self._starts = np.cumsum(counts) - counts
        self._owned: dict[int, np.ndarray[Any, Any]] = {}  # by pattern

    def row(self, leaf: int, pattern: int, at: int) -> int:
        owned = self._owned.get(pattern)
        if owned is None:
            owned = self._owned[pattern] = self._manifest.owned_in(pattern, self._process)
        return int(self._starts[leaf]) + int(np.searchsorted(owned, at))


def _place(
    manifest: Manifest,
    process: int,
    packs: tuple[int, ...],
    table: ChunkTable,
    leaf: int,
    chunk: int,
    row: int,
) -> ChunkPlace:
    number = int(table.pack[row])
    if number != OWN_OBJECT:
        return ChunkPlace(*_pack(manifest.data, process, number), packs[number], table, row)
    index = ".".join(["c", *map(str, manifest.chunk_index(leaf, chunk))])
    name = f"{manifest.data}/{manifest.directories[leaf]}/{index}"
    return ChunkPlace(name, None, int(table.length[row]), table, row)


@functools.lru_cache(maxsize=1024)
def _pack(data: str, process: int, number: int) -> tuple[str, tuple[int, int]]:
    """Path of a pack, and what it is called in a `ChunkPlace`."""
    return f"{data}/packs/{process}-{number}", (process, number)


def box_of_chunk(spec: LeafSpec, index: tuple[int, ...]) -> Box:
    """The box of the chunk at a place of the chunk grid."""
    lo = tuple(place * size for place, size in zip(index, spec.chunk_shape, strict=True))
    return lo, tuple(start + size for start, size in zip(lo, spec.chunk_shape, strict=True))


def encode_part(process: int, chunks: ChunkTable, packs: tuple[int, ...]) -> bytes:
    """The bytes of a part."""
    return bytes(msgpack.packb({"process": process} | encode_table(chunks, packs)) or b"")


def parse_part(data: bytes, manifest: Manifest, process: int) -> tuple[ChunkTable, tuple[int, ...]]:
    """Decodes and validates a part: the table, and the lengths of the packs.

    Raises:
      CorruptError: It says something else than what the manifest needs.
    """
    name = manifest.parts[process].name
    try:
        fields = unpack(data)
        if fields["process"] != process:
            raise ValueError("it is another process's")
        counts = manifest.counts_of(process)
        # Before memory is taken: leaves that share a column of owners can have many more chunks than that is long.
        parse_column(fields, "chunk_pack", "<i4", sum(counts.tolist()))
        chunks, packs = parse_table(fields, np.repeat(manifest.chunk_nbytes, counts))
        check_directories(manifest, chunks, counts)
    except Exception as error:  # a hostile part can make Python raise almost anything; all of it means this
        message = f"object {name}: the part is malformed: {type(error).__name__}: {str(error)[:200]}"
        problem = Problem(None, "manifest", message)
        raise CorruptError(f"cannot read the checkpoint: {problem}", [problem]) from error
    return chunks, packs
