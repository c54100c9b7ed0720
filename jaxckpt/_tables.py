"""Where do chunks lie, and is that possible?

A *table* has one row for each chunk that one process wrote, in the order of the leaves and of their chunk grids: the
pack or the object of its own that holds it, and the checksums of its blocks. A checkpoint of one process has one table,
in its manifest; in one of many processes each has its own, in an object of its own (`_parts`).

`parse_table` checks what a table says before anybody believes it: chunks have the lengths of their shapes, and fill
their packs without holes and overlaps. Deliberately not here: which leaf a row belongs to.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np

from ._config import BLOCK_BYTES

CHECKSUM_BYTES = 16

# In packs every chunk starts at a multiple of this, so that a buffer read from disk can become an array in place.
PACK_ALIGNMENT = 64
# A pack's write pieces start at multiples of this (O_DIRECT), so a packed chunk is padded by less than this + 64.
PIECE_ALIGNMENT = 4096

OWN_OBJECT = -1  # in the pack column: the chunk is an object of its own

_OBJECT_BYTES_MAX = 1 << 50  # keeps all sums of the columns far from the end of int64


class TableError(ValueError):
    """What a table says is impossible."""


@dataclasses.dataclass(frozen=True, eq=False)
class ChunkTable:
    """Where every chunk lies: one row a chunk, in the order of the leaves and of their chunk grids (C order).

    Attributes:
      pack: ``int32[n]``, index of the pack, or `OWN_OBJECT`.
      offset: ``uint64[n]``, bytes from the start of the pack; 0 for objects of their own.
      length: ``uint64[n]``, bytes as stored, padding included.
      checksums: 16 bytes for each block of each chunk, in row order.
    """

    pack: np.ndarray[Any, Any]
    offset: np.ndarray[Any, Any]
    length: np.ndarray[Any, Any]
    checksums: bytes

    @functools.cached_property
    def block_starts(self) -> np.ndarray[Any, Any]:
        """``int64[n + 1]``: number of the first block of each chunk, and of all blocks."""
        starts = np.zeros(len(self.length) + 1, np.int64)
        np.cumsum(-(-self.length.astype(np.int64) // BLOCK_BYTES), out=starts[1:])
        return starts

    def checksum(self, chunk: int, block: int) -> bytes:
        """Checksum of one block of a chunk."""
        at = (int(self.block_starts[chunk]) + block) * CHECKSUM_BYTES
        return self.checksums[at : at + CHECKSUM_BYTES]

    def fingerprint(self, chunk: int) -> bytes:
        """All checksums of a chunk: equal for equal stored bytes."""
        first, last = self.block_starts[chunk : chunk + 2]
        return self.checksums[int(first) * CHECKSUM_BYTES : int(last) * CHECKSUM_BYTES]


def encode_table(chunks: ChunkTable, packs: tuple[int, ...]) -> dict[str, Any]:
    """The fields that a table has in a manifest or a part."""
    return {
        "packs": list(packs),
        "chunk_pack": chunks.pack.astype("<i4").tobytes(),
        "chunk_offset": chunks.offset.astype("<u8").tobytes(),
        "chunk_length": chunks.length.astype("<u8").tobytes(),
        "checksums": chunks.checksums,
    }


def parse_table(fields: dict[str, Any], nbytes: np.ndarray[Any, Any]) -> tuple[ChunkTable, tuple[int, ...]]:
    """Decodes and validates the fields of a table.

    Args:
      fields: As `encode_table` makes them.
      nbytes: ``int64[rows]``, bytes of each chunk by its shape; see `check_size`.

    Returns:
      The table, and the length of each pack.

    Raises:
      TableError: They contradict themselves, or the shapes.
    """
    packs = fields["packs"]
    if not isinstance(packs, list) or not all(type(size) is int and 0 <= size < 2**63 for size in packs):
        raise TableError("its packs are not a list of sizes")
    checksums = fields["checksums"]
    if not isinstance(checksums, bytes):
        raise TableError("its checksums are not bytes")
    table = ChunkTable(
        pack=parse_column(fields, "chunk_pack", "<i4", len(nbytes)),
        offset=parse_column(fields, "chunk_offset", "<u8", len(nbytes)),
        length=parse_column(fields, "chunk_length", "<u8", len(nbytes)),
        checksums=checksums,
    )
    if len(nbytes) and max(int(table.length.max()), int(table.offset.max())) >= _OBJECT_BYTES_MAX:
        raise TableError("a chunk beyond all storage")
    if len(table.checksums) != int(table.block_starts[-1]) * CHECKSUM_BYTES:
        raise TableError("its checksums are not those of its chunks")
    _check_lengths(table, nbytes)
    _check_packs(table, packs)
    return table, tuple(packs)


def check_size(chunk_nbytes: int) -> None:
    """Raises `TableError` for a chunk that nothing could hold."""
    if chunk_nbytes >= _OBJECT_BYTES_MAX:
        raise TableError("a chunk beyond all storage")


def parse_column(fields: dict[str, Any], name: str, dtype: str, rows: int) -> np.ndarray[Any, Any]:
    """A column of so many rows."""
    data = fields[name]
    if not isinstance(data, bytes) or len(data) != rows * np.dtype(dtype).itemsize:
        raise TableError(f"its column {name} does not have {rows} rows")
    return np.frombuffer(data, dtype)


def _check_lengths(table: ChunkTable, nbytes: np.ndarray[Any, Any]) -> None:
    length = table.length.astype(np.int64)
    is_packed = table.pack != OWN_OBJECT
    if np.any(length[~is_packed] != nbytes[~is_packed]):
        raise TableError("a chunk whose length is not that of its shape")
    padding = (length - nbytes)[is_packed]
    if np.any(padding < 0) or np.any(padding >= PIECE_ALIGNMENT + PACK_ALIGNMENT):
        raise TableError("a packed chunk whose length is not that of its shape")


def _check_packs(table: ChunkTable, packs: list[int]) -> None:
    """Packed chunks fill their packs: no holes, no overlaps, nothing beyond the end."""
    is_packed = table.pack != OWN_OBJECT
    pack = table.pack[is_packed].astype(np.int64)
    offset = table.offset.astype(np.int64)[is_packed]
    end = offset + table.length.astype(np.int64)[is_packed]
    if len(pack) and not (int(pack.min()) >= 0 and int(pack.max()) < len(packs)):
        raise TableError("a chunk in a pack that is not there")
    if np.any(table.offset[~is_packed] != 0) or np.any(offset % PACK_ALIGNMENT):
        raise TableError("a chunk at a bad offset")
    order = np.lexsort((offset, pack))
    pack, offset, end = pack[order], offset[order], end[order]
    is_first = np.ones(len(pack), bool)
    is_first[1:] = pack[1:] != pack[:-1]
    expected = np.where(is_first, 0, np.roll(end, 1)) if len(pack) else end
    if np.any(offset != expected):
        raise TableError("chunks that overlap or leave a hole in a pack")
    is_last = np.roll(is_first, -1)
    ends = dict(zip(pack[is_last].tolist(), end[is_last].tolist(), strict=True))
    if any(ends.get(number) != size for number, size in enumerate(packs)):
        raise TableError("a pack that is longer or shorter than its chunks")
