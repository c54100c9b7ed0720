"""Which chunks does a tree become, in which objects do they lie, and in which pieces are they written?

All functions here are pure. Boxes are half-open, shapes are those of the stored form.

1. `cut_shard`: a shard is cut along its leading axis (and the next, where one row is still too long), so that every
   chunk is one contiguous range of the shard's bytes and can be written without a copy.
2. `plan_writes`: chunks below ``pack_bytes_max`` are laid into packs one after the other, the others become objects
   of their own.
3. Both are cut into *pieces*, what one write call carries: a part of one chunk, or several packed chunks. Pieces of
   packs start at multiples of 4096 bytes for O_DIRECT, chunks in packs at multiples of 64 for zero-copy restores.
   A packed chunk's stored length runs to the start of the next one, so that checksums cover the padding too.
   All chunks of a shard are written before those of the next shard: whoever passes shards through bounded memory
   can give each one's memory back before it takes the next. Only the columns are in the order of the chunk grid.
4. `flat_boxes` goes the other way: the boxes that a range of a chunk's elements covers. `contiguous_runs` cuts what is
   too large to be in memory whole.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from ._config import BLOCK_BYTES
from ._manifest import ABSENT
from ._shardings import Box, ShardMap
from ._tables import OWN_OBJECT, PACK_ALIGNMENT, PIECE_ALIGNMENT

# A pack is closed when it has this many bytes: large enough for full disk speed, small enough for one request to an
# object store.
PACK_BYTES = 64 << 20

# Every object stays below 4 GiB, whatever the options say: object stores take up to 5 GB in one request, and what was
# saved to files shall fit into a bucket too.
OBJECT_BYTES_MAX = (4 << 30) - PIECE_ALIGNMENT
# Of a shard that nothing divides but what gives more chunks than this, no checkpoint is made: a billion of one element
# each would be all that is left.
_CHUNKS_MAX = 1 << 24

# As many as there are threads that write, unless somebody wants more.
GROWING_OBJECTS = 8


@dataclasses.dataclass(frozen=True, slots=True)
class LeafExtent:
    """What the layout has to know of a leaf that has bytes.

    Attributes:
      shape: Stored shape.
      itemsize: Bytes of a stored element.
      shard_shape: Shape of every shard.
      owners: For the low corner of each distinct shard of this process, the number of the one that is written.
      shards: Who holds which shard, for an array that spans processes.
    """

    shape: tuple[int, ...]
    itemsize: int
    shard_shape: tuple[int, ...]
    owners: tuple[tuple[tuple[int, ...], int], ...]
    shards: ShardMap | None = None


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class Share:
    """Who writes which chunk of a leaf.

    Attributes:
      chunk_shape: Shape of every chunk of the stored form.
      owners: ``uint32[chunks]``, process that writes each chunk, in C order of the chunk grid.
    """

    chunk_shape: tuple[int, ...]
    owners: np.ndarray[Any, Any]


@dataclasses.dataclass(frozen=True, slots=True)
class Segment:
    """A byte range of a shard and where it goes.

    Attributes:
      leaf: Number of the leaf.
      shard: Number of the shard.
      lo, hi: Bytes of the shard, in C order.
      at: Bytes from the start of the piece.
      stored: Bytes that it takes in the piece, padding included.
      chunk: Row of its chunk.
      block: Number of its first checksum block in the chunk.
    """

    leaf: int
    shard: int
    lo: int
    hi: int
    at: int
    stored: int
    chunk: int
    block: int


@dataclasses.dataclass(frozen=True, slots=True)
class Piece:
    """What one write call carries: ``length`` bytes at ``offset`` of an object."""

    object: int
    offset: int
    length: int
    segments: tuple[Segment, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class PlannedObject:
    """An object to write. ``leaf`` and ``index`` name a chunk; a pack has leaf None and its number as index."""

    leaf: int | None
    index: tuple[int, ...]
    length: int


@dataclasses.dataclass(frozen=True, eq=False)
class WritePlan:
    """Everything that this process will write for the arrays of a tree, and the columns of its chunk table.

    Attributes:
      chunk_shapes: Of each leaf.
      unpacked: The leaves whose chunks are objects of their own, whoever writes them.
      objects, pieces: What is written.
      pack, offset, length: Columns of the table, one row for each chunk that is written.
      packs: Length of each pack.
      nbytes: Bytes of the chunks, without padding.
    """

    chunk_shapes: tuple[tuple[int, ...], ...]
    unpacked: tuple[int, ...]
    objects: tuple[PlannedObject, ...]
    pieces: tuple[Piece, ...]
    pack: np.ndarray[Any, Any]
    offset: np.ndarray[Any, Any]
    length: np.ndarray[Any, Any]
    packs: tuple[int, ...]
    nbytes: int

    @functools.cached_property
    def interleaved(self) -> tuple[int, ...]:
        """Numbers of the pieces, in an order in which several objects grow at a time.

        Many file systems write a growing file piece by piece, whoever writes: in the order of the pieces most threads
        would wait for each other.
        """
        pieces = self.pieces
        return tuple(
            sorted(
                range(len(pieces)),
                key=lambda number: (pieces[number].object // GROWING_OBJECTS, pieces[number].offset),
            )
        )

    @functools.cached_property
    def ranges_of_shard(self) -> dict[tuple[int, int], list[tuple[int, int]]]:
        """Byte ranges that are written of each (leaf, shard), in the order in which they are needed."""
        ranges: dict[tuple[int, int], list[tuple[int, int]]] = {}
        for piece in self.pieces:
            for segment in piece.segments:
                known = ranges.setdefault((segment.leaf, segment.shard), [])
                if known and known[-1][1] == segment.lo:
                    known[-1] = (known[-1][0], segment.hi)
                else:
                    known.append((segment.lo, segment.hi))
        return ranges


@functools.lru_cache(maxsize=4096)
def cut_shard(shape: tuple[int, ...], itemsize: int, chunk_bytes_max: int) -> tuple[int, ...]:
    """Shape of the chunks of a shard: contiguous in it, dividing it, at most ``chunk_bytes_max`` bytes.

    Where no divisor of an axis gives a chunk between a sixteenth of the limit and the limit, the chunk is larger, but
    never larger than an object may be.
    """
    chunk_bytes_max = min(chunk_bytes_max, OBJECT_BYTES_MAX)
    chunk = [max(size, 1) for size in shape]
    for axis in range(len(chunk)):
        row_bytes = math.prod(chunk[axis + 1 :]) * itemsize
        if chunk[axis] * row_bytes <= chunk_bytes_max:
            break
        if row_bytes > chunk_bytes_max:
            chunk[axis] = 1
            continue
        divisors = [rows for rows in _divisors(chunk[axis]) if rows * row_bytes <= chunk_bytes_max]
        larger = min(rows for rows in _divisors(chunk[axis]) if rows * row_bytes > chunk_bytes_max)
        is_fair = divisors[-1] * row_bytes * 16 >= chunk_bytes_max
        chunk[axis] = divisors[-1] if is_fair or larger * row_bytes > OBJECT_BYTES_MAX else larger
        break
    return tuple(chunk)


def is_divisible(extent: LeafExtent, chunk_bytes_max: int) -> bool:
    """Whether the shards of a leaf can be cut into chunks that are few enough."""
    if 0 in extent.shape:
        return True
    chunk = cut_shard(extent.shard_shape, extent.itemsize, chunk_bytes_max)
    return math.prod(extent.shard_shape) // math.prod(chunk) <= _CHUNKS_MAX


def _divisors(number: int) -> list[int]:
    small = [divisor for divisor in range(1, math.isqrt(number) + 1) if number % divisor == 0]
    return sorted({*small, *(number // divisor for divisor in small)})


def plan_writes(
    leaves: Sequence[LeafExtent | None],
    *,
    chunk_bytes_max: int,
    pack_bytes_max: int,
    piece_bytes: int,
    pack_object_bytes: int = PACK_BYTES,
    shares: Sequence[Share | None] | None = None,
    process: int = 0,
) -> WritePlan:
    """Lays out the chunks of a tree.

    Args:
      leaves: One extent for each leaf; None for leaves that lie in the manifest.
      chunk_bytes_max: Most bytes of a chunk, see `cut_shard`.
      pack_bytes_max: Chunks of fewer bytes are packed.
      piece_bytes: Most bytes of a piece; a multiple of the block size.
      pack_object_bytes: A pack is closed when it has so many.
      shares: Whose chunks are whose; None: what is here is written.
      process: The one whose chunks are written.
    """
    planner = _Planner(min(pack_bytes_max, piece_bytes - PIECE_ALIGNMENT), piece_bytes, pack_object_bytes)
    chunk_shapes: list[tuple[int, ...]] = []
    for number, extent in enumerate(leaves):
        if extent is None:
            chunk_shapes.append(())
            continue
        share = None if shares is None else shares[number]
        if share is None:
            chunk_shape = cut_shard(extent.shard_shape, extent.itemsize, chunk_bytes_max)
            chunks = chunks_of(extent, chunk_shape)
        else:
            chunk_shape = share.chunk_shape
            chunks = [chunk for chunk in chunks_of(extent, chunk_shape) if share.owners[chunk.row] == process]
        chunk_shapes.append(chunk_shape)
        planner.add_leaf(number, extent, chunk_shape, chunks)
    return planner.finish(tuple(chunk_shapes))


@dataclasses.dataclass(frozen=True, slots=True)
class ShardChunk:
    """A chunk of a shard.

    Attributes:
      row: Its number in the chunk grid of the leaf.
      index: Its place there.
      shard: Number of the shard.
      first: Byte of the shard at which it begins.
    """

    row: int
    index: tuple[int, ...]
    shard: int
    first: int


@functools.lru_cache(maxsize=4096)
def chunks_of(extent: LeafExtent, chunk_shape: tuple[int, ...]) -> tuple[ShardChunk, ...]:
    """The chunks of the shards of this process, shard by shard, in the order of their bytes."""
    if 0 in extent.shape:
        return ()
    grid = tuple(size // chunk for size, chunk in zip(extent.shape, chunk_shape, strict=True))
    inside = tuple(size // chunk for size, chunk in zip(extent.shard_shape, chunk_shape, strict=True))
    chunks: list[ShardChunk] = []
    for corner, shard in sorted(extent.owners, key=lambda owner: owner[1]):
        for place in np.ndindex(inside):
            row = first = 0
            index = []
            for axis, step in enumerate(place):
                at = corner[axis] // chunk_shape[axis] + step
                index.append(at)
                row = row * grid[axis] + at
                first = first * extent.shard_shape[axis] + step * chunk_shape[axis]
            chunks.append(ShardChunk(row, tuple(index), shard, first * extent.itemsize))
    return tuple(chunks)


def present_chunks(extent: LeafExtent, chunk_shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """``uint16[chunks]``: 0 for the chunks of the shards of this process, `ABSENT` for all others."""
    count = math.prod(size // chunk for size, chunk in zip(extent.shape, chunk_shape, strict=True))
    column = np.full(count, ABSENT, np.uint16)
    column[[chunk.row for chunk in chunks_of(extent, chunk_shape)]] = 0
    return column


class _Planner:
    """Appends leaf after leaf to the objects, pieces and columns of a plan."""

    def __init__(self, pack_bytes_max: int, piece_bytes: int, pack_object_bytes: int) -> None:
        self._pack_bytes_max = pack_bytes_max
        self._pack_object_bytes = pack_object_bytes
        self._piece_bytes = piece_bytes
        self._objects: list[PlannedObject] = []
        self._pieces: list[Piece] = []
        self._pack: list[int] = []
        self._offset: list[int] = []
        self._length: list[int] = []
        self._packs: list[int] = []
        self._unpacked: list[int] = []
        self._nbytes = 0
        # The pack being filled: bytes in closed pieces, bytes in the open piece, and what is in it.
        self._pack_object: int | None = None
        self._pack_bytes = 0
        self._piece_fill = 0
        self._piece_segments: list[Segment] = []

    def add_leaf(
        self, leaf: int, extent: LeafExtent, chunk_shape: tuple[int, ...], chunks: Sequence[ShardChunk]
    ) -> None:
        nbytes = math.prod(chunk_shape) * extent.itemsize
        is_packed = nbytes < self._pack_bytes_max
        if not is_packed and 0 not in extent.shape:
            self._unpacked.append(leaf)
        first_row = len(self._pack)
        for column in (self._pack, self._offset, self._length):
            column.extend([0] * len(chunks))
        self._nbytes += nbytes * len(chunks)
        # The table is in the order of the grid, what is written in the order of the shards.
        grid_order = sorted(chunk.row for chunk in chunks)
        row_of = {row: first_row + number for number, row in enumerate(grid_order)}
        for chunk in chunks:
            row = row_of[chunk.row]
            if is_packed:
                self._add_packed(leaf, row, chunk.shard, chunk.first, nbytes)
            else:
                self._add_object(leaf, row, chunk.index, chunk.shard, chunk.first, nbytes)

    def _add_object(
        self, leaf: int, chunk: int, index: tuple[int, ...], shard: int, first: int, nbytes: int
    ) -> None:
        number = len(self._objects)
        self._objects.append(PlannedObject(leaf, index, nbytes))
        self._pack[chunk] = OWN_OBJECT
        self._length[chunk] = nbytes
        for offset in range(0, nbytes, self._piece_bytes):
            length = min(self._piece_bytes, nbytes - offset)
            block = offset // BLOCK_BYTES
            segment = Segment(leaf, shard, first + offset, first + offset + length, 0, length, chunk, block)
            self._pieces.append(Piece(number, offset, length, (segment,)))

    def _add_packed(self, leaf: int, chunk: int, shard: int, first: int, nbytes: int) -> None:
        stored = _align(nbytes, PACK_ALIGNMENT)
        if self._piece_fill and _align(self._piece_fill + stored, PIECE_ALIGNMENT) > self._piece_bytes:
            self._close_piece()
            if self._pack_bytes >= self._pack_object_bytes:
                self._close_pack()
        if self._pack_object is None:
            self._pack_object = len(self._objects)
            self._objects.append(PlannedObject(None, (len(self._packs),), 0))
        self._piece_segments.append(
            Segment(leaf, shard, first, first + nbytes, self._piece_fill, stored, chunk, 0)
        )
        self._pack[chunk] = len(self._packs)
        self._offset[chunk] = self._pack_bytes + self._piece_fill
        self._length[chunk] = stored
        self._piece_fill += stored

    def _close_piece(self) -> None:
        """Ends the open piece of the pack at a multiple of 4096; the last chunk is stored with the padding."""
        if not self._piece_segments:
            return
        assert self._pack_object is not None
        length = _align(self._piece_fill, PIECE_ALIGNMENT)
        padding = length - self._piece_fill
        last = self._piece_segments[-1]
        self._piece_segments[-1] = dataclasses.replace(last, stored=last.stored + padding)
        self._length[last.chunk] += padding
        self._pieces.append(Piece(self._pack_object, self._pack_bytes, length, tuple(self._piece_segments)))
        self._pack_bytes += length
        self._piece_fill = 0
        self._piece_segments = []

    def _close_pack(self) -> None:
        if self._pack_object is None:
            return
        self._objects[self._pack_object] = PlannedObject(None, (len(self._packs),), self._pack_bytes)
        self._packs.append(self._pack_bytes)
        self._pack_object = None
        self._pack_bytes = 0

    def finish(self, chunk_shapes: tuple[tuple[int, ...], ...]) -> WritePlan:
        self._close_piece()
        self._close_pack()
        return WritePlan(
            chunk_shapes=chunk_shapes,
            unpacked=tuple(self._unpacked),
            objects=tuple(self._objects),
            pieces=tuple(self._pieces),
            pack=np.array(self._pack, np.int32),
            offset=np.array(self._offset, np.uint64),
            length=np.array(self._length, np.uint64),
            packs=tuple(self._packs),
            nbytes=self._nbytes,
        )


def _align(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment


# --- ranges of elements as boxes, and boxes as ranges of blocks -----------------------------------------------


def flat_boxes(lo: int, hi: int, shape: tuple[int, ...]) -> Iterator[Box]:
    """The boxes, disjoint and in order, that elements ``[lo, hi)`` of an array in C order make up.

    Example:
      >>> list(flat_boxes(3, 10, (3, 4)))
      [((0, 3), (1, 4)), ((1, 0), (2, 4)), ((2, 0), (3, 2))]
    """
    if lo >= hi:
        return
    if not shape:
        yield (), ()
        return
    if len(shape) == 1:
        yield (lo,), (hi,)
        return
    row = math.prod(shape[1:])
    first, first_at = divmod(lo, row)
    last, last_at = divmod(hi, row)
    if first_at or first == last:
        for inner_lo, inner_hi in flat_boxes(first_at, min(hi - first * row, row), shape[1:]):
            yield (first, *inner_lo), (first + 1, *inner_hi)
        first += 1
    if first < last:
        yield (first, *(0,) * (len(shape) - 1)), (last, *shape[1:])
    if last_at and last >= first:
        for inner_lo, inner_hi in flat_boxes(0, last_at, shape[1:]):
            yield (last, *inner_lo), (last + 1, *inner_hi)


@dataclasses.dataclass(frozen=True, slots=True)
class Run:
    """A box that is a contiguous range of an array in C order: bytes ``[lo, hi)``."""

    lo: int
    hi: int
    box: Box

    @property
    def sizes(self) -> tuple[int, ...]:
        """Shape of the box."""
        return tuple(stop - start for start, stop in zip(*self.box, strict=True))

    def within(self, outer: Run) -> Run:
        """This run of the box of another one as a run of what that box is cut from."""
        lo, hi = (
            tuple(place + start for place, start in zip(corner, outer.box[0], strict=True))
            for corner in self.box
        )
        return Run(self.lo + outer.lo, self.hi + outer.lo, (lo, hi))


def whole_run(shape: tuple[int, ...], itemsize: int) -> Run:
    """All of an array."""
    return Run(0, math.prod(shape) * itemsize, ((0,) * len(shape), shape))


def contiguous_runs(shape: tuple[int, ...], itemsize: int, bytes_max: int) -> Iterator[Run]:
    """Cuts an array, in order, into runs of at most ``bytes_max`` bytes, or of one element if that is larger.

    Example:
      >>> [(run.lo, run.hi) for run in contiguous_runs((2, 3), 4, 8)]
      [(0, 8), (8, 12), (12, 20), (20, 24)]
    """
    nbytes = math.prod(shape) * itemsize
    if nbytes <= bytes_max or not shape:
        yield whole_run(shape, itemsize)
        return
    # The first axis along which one step fits.
    axis, step = 0, nbytes // shape[0]
    while step > bytes_max and axis + 1 < len(shape):
        axis += 1
        step //= shape[axis]
    steps = max(bytes_max // step, 1)
    rest = shape[axis + 1 :]
    lo = 0
    for outer in np.ndindex(shape[:axis]):
        for first in range(0, shape[axis], steps):
            last = min(first + steps, shape[axis])
            hi = lo + (last - first) * step
            box = (*outer, first, *(0,) * len(rest)), (*(place + 1 for place in outer), last, *rest)
            yield Run(lo, hi, box)
            lo = hi


def blocks_of_box(box: Box, shape: tuple[int, ...], itemsize: int) -> set[int]:
    """Numbers of the checksum blocks of a chunk that a box of it touches.

    Args:
      box: Box in the coordinates of the chunk; not empty.
      shape: Shape of the chunk.
      itemsize: Bytes of an element.
    """
    lo, hi = box
    strides = [math.prod(shape[axis + 1 :]) * itemsize for axis in range(len(shape))]
    # Steps of at most one block leave no block out, so that only the axes with longer steps must be walked.
    walked = [axis for axis, stride in enumerate(strides) if stride > BLOCK_BYTES]
    rest = range(len(walked), len(shape))
    inner_first = sum(lo[axis] * strides[axis] for axis in rest)
    inner_last = sum((hi[axis] - 1) * strides[axis] for axis in rest) + itemsize - 1
    blocks: set[int] = set()
    for place in np.ndindex(*(hi[axis] - lo[axis] for axis in walked)):
        start = sum((lo[axis] + step) * strides[axis] for axis, step in zip(walked, place, strict=True))
        blocks.update(range((start + inner_first) // BLOCK_BYTES, (start + inner_last) // BLOCK_BYTES + 1))
    return blocks


def intersect(a: Box, b: Box) -> Box | None:
    """The box that two boxes share, or None."""
    lo = tuple(map(max, a[0], b[0]))
    hi = tuple(map(min, a[1], b[1]))
    return None if any(start >= stop for start, stop in zip(lo, hi, strict=True)) else (lo, hi)
