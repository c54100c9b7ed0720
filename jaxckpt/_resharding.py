"""Which bytes must be read for the wanted boxes?

A restore wants, for each leaf, the boxes that its devices need (`Destination`); storage has chunks. Which of them were
the shards of a saved array does not matter any more: everything is boxes against boxes. `plan_reads` finds for every
chunk the destinations that it overlaps and the checksum blocks that they need. Each block is listed once, however many
destinations want it. Neighbouring blocks are joined into read *units*; chunks that lie side by side in a pack are read
together.

Everything here is pure. `_fetching` carries the reads out.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Collection, Iterable, Sequence
from typing import final

from ._config import BLOCK_BYTES
from ._layout import blocks_of_box, intersect
from ._manifest import LeafSpec
from ._parts import ChunkIndex, ChunkPlace, box_of_chunk
from ._shardings import Box
from ._store import Buffer

# Small destinations share an allocation of this size, since a mapping of its own costs a system call and a page each.
SHARED_ALLOCATION_BYTES = 1 << 20


@dataclasses.dataclass(slots=True, eq=False)
class Destination:
    """A box of a leaf that is wanted, and, once it is read, its bytes (64-byte aligned).

    The first ``fortran_axes`` axes lie in Fortran order, what is left in C order.
    """

    leaf: int
    box: Box
    nbytes: int
    fortran_axes: int = 0
    buffer: Buffer | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Part:
    """Blocks of one chunk within a unit.

    Attributes:
      leaf, chunk: Leaf, and number of the chunk among all.
      place: Where the chunk lies.
      first_block, block_count: Which blocks.
      at: Byte of the unit at which they start.
      length: Their bytes as stored.
      targets: Destinations, each with the box (in the leaf's coordinates) that it takes from the chunk.
    """

    leaf: int
    chunk: int
    place: ChunkPlace
    first_block: int
    block_count: int
    at: int
    length: int
    targets: tuple[tuple[Destination, Box], ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Unit:
    """One read: ``length`` bytes at ``offset`` of an object.

    Attributes:
      in_place: Destination and first byte in it, when the unit is a contiguous range of that destination.
    """

    object: str
    offset: int
    length: int
    parts: tuple[Part, ...]
    in_place: tuple[Destination, int] | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class ReadPlan:
    """All reads for some leaves, and the length that each object must have."""

    destinations: tuple[Destination, ...]
    units: tuple[Unit, ...]
    object_lengths: dict[str, int]
    leaves_of_object: dict[str, list[tuple[int, int]]]

    @property
    def nbytes(self) -> int:
        """Bytes that will be read."""
        return sum(unit.length for unit in self.units)


def plan_reads(
    index: ChunkIndex,
    wanted: Iterable[tuple[int, Sequence[Box]]],
    unit_bytes: int,
    fortran: Collection[int] = (),
) -> ReadPlan:
    """Plans the reads for boxes of leaves.

    Args:
      index: Where the chunks lie; what it has to read for that is read.
      wanted: Leaves, each with the distinct boxes of its stored form that are needed.
      unit_bytes: Most bytes of one read; at least a block.
      fortran: Leaves whose boxes are to lie in Fortran order.
    """
    planner = _ReadPlanner(index, max(unit_bytes // BLOCK_BYTES, 1), fortran)
    for leaf, boxes in wanted:
        planner.add_leaf(leaf, boxes)
    return planner.finish()


@final
class _ReadPlanner:
    def __init__(self, index: ChunkIndex, unit_blocks: int, fortran: Collection[int]) -> None:
        self._index = index
        self._manifest = index.manifest
        self._unit_blocks = unit_blocks
        self._fortran = fortran
        self._destinations: list[Destination] = []
        self._units: list[Unit] = []
        self._packed: list[_PackedPart] = []
        self._object_lengths: dict[str, int] = {}
        self._leaves_of_object: dict[str, list[tuple[int, int]]] = {}

    def add_leaf(self, leaf: int, boxes: Sequence[Box]) -> None:
        if not boxes:  # a value, which lies in the manifest
            return
        spec = self._manifest.spec(leaf)
        itemsize = spec.stored_itemsize
        targets_of_chunk: dict[int, list[tuple[Destination, Box]]] = {}
        for box in boxes:
            count = math.prod(hi - lo for lo, hi in zip(*box, strict=True))
            fortran_axes = len(spec.shape) if leaf in self._fortran else 0
            destination = Destination(leaf, box, count * itemsize, fortran_axes)
            self._destinations.append(destination)
            if count:
                for chunk, region in self._overlaps(leaf, spec, box):
                    targets_of_chunk.setdefault(chunk, []).append((destination, region))
        for chunk, targets in targets_of_chunk.items():
            self._add_chunk(leaf, spec, chunk, tuple(targets))

    def _overlaps(self, leaf: int, spec: LeafSpec, box: Box) -> Iterable[tuple[int, Box]]:
        """Rows of the chunks that a box touches, each with the shared box."""
        first = int(self._manifest.chunk_starts[leaf])
        if spec.chunk_count == 1:
            yield first, box
            return
        ranges = [
            range(lo // chunk, -(-hi // chunk)) for lo, hi, chunk in zip(*box, spec.chunk_shape, strict=True)
        ]
        grid = spec.grid
        for index in itertools.product(*ranges):
            row = 0
            for place, size in zip(index, grid, strict=True):
                row = row * size + place
            region = intersect(box, box_of_chunk(spec, index))
            assert region is not None
            yield first + row, region

    def _add_chunk(
        self, leaf: int, spec: LeafSpec, chunk: int, targets: tuple[tuple[Destination, Box], ...]
    ) -> None:
        place = self._index.place(leaf, chunk)
        self._object_lengths[place.object] = place.object_length
        self._leaves_of_object.setdefault(place.object, []).append((leaf, chunk))
        length = place.length
        chunk_box = self._box_of_chunk(leaf, spec, chunk)
        for first_block, block_count in self._block_runs(spec, chunk_box, length, targets):
            start = first_block * BLOCK_BYTES
            run_length = min(block_count * BLOCK_BYTES, length - start)
            part = Part(leaf, chunk, place, first_block, block_count, 0, run_length, targets)
            in_place = _range_in_place(spec, chunk_box, start, targets)
            if place.pack is None:
                self._units.append(Unit(place.object, start, run_length, (part,), in_place))
                continue
            # A destination that is one chunk keeps the memory it is read into, with its neighbours in the pack; nor is
            # there room for the padding behind a chunk.
            if length != spec.chunk_nbytes or targets[0][0].nbytes < SHARED_ALLOCATION_BYTES:
                in_place = None
            self._packed.append(_PackedPart(place.pack, place.offset + start, part, in_place))

    def _box_of_chunk(self, leaf: int, spec: LeafSpec, chunk: int) -> Box:
        if spec.chunk_count == 1:
            return (0,) * len(spec.stored_shape), spec.stored_shape
        return box_of_chunk(spec, self._manifest.chunk_index(leaf, chunk))

    def _block_runs(
        self, spec: LeafSpec, chunk_box: Box, length: int, targets: tuple[tuple[Destination, Box], ...]
    ) -> Iterable[tuple[int, int]]:
        """Runs of needed blocks as (first, count), none longer than a unit."""
        block_count = -(-length // BLOCK_BYTES)
        if block_count == 1 or any(region == chunk_box for _, region in targets):
            needed: Sequence[int] = range(block_count)
        else:
            blocks: set[int] = set()
            for _, (lo, hi) in targets:
                local = (minus(lo, chunk_box[0]), minus(hi, chunk_box[0]))
                blocks |= blocks_of_box(local, spec.chunk_shape, spec.stored_itemsize)
            needed = sorted(blocks)
        first = previous = needed[0]
        for block in needed[1:]:
            if block != previous + 1 or block - first == self._unit_blocks:
                yield first, previous - first + 1
                first = block
            previous = block
        yield first, previous - first + 1

    def finish(self) -> ReadPlan:
        self._join_packed()
        return ReadPlan(
            tuple(self._destinations), tuple(self._units), self._object_lengths, self._leaves_of_object
        )

    def _join_packed(self) -> None:
        """Joins parts that lie side by side in a pack, and in their destination if they are read in place."""
        self._packed.sort(key=lambda entry: (entry.pack, entry.offset))
        joined: list[_PackedPart] = []
        for entry in self._packed:
            if joined and not self._can_join(joined[0], joined[-1], entry):
                self._add_pack_unit(joined)
                joined = []
            joined.append(entry)
        if joined:
            self._add_pack_unit(joined)

    def _can_join(self, first: _PackedPart, last: _PackedPart, entry: _PackedPart) -> bool:
        """Whether a part follows the last one of a unit, and goes where that goes."""
        if entry.pack != last.pack or entry.offset != last.offset + last.part.length:
            return False
        if entry.offset + entry.part.length - first.offset > self._unit_blocks * BLOCK_BYTES:
            return False
        if entry.in_place is None or last.in_place is None:
            return entry.in_place is last.in_place
        destination, start = last.in_place
        return entry.in_place[0] is destination and entry.in_place[1] == start + last.part.length

    def _add_pack_unit(self, entries: list[_PackedPart]) -> None:
        first, last = entries[0], entries[-1]
        parts = tuple(dataclasses.replace(entry.part, at=entry.offset - first.offset) for entry in entries)
        length = last.offset + last.part.length - first.offset
        self._units.append(Unit(first.part.place.object, first.offset, length, parts, first.in_place))


@dataclasses.dataclass(frozen=True, slots=True)
class _PackedPart:
    """Blocks of a chunk in a pack.

    Attributes:
      pack: Process and number.
      offset: Byte of the pack at which they start.
      part: The blocks.
      in_place: As of `Unit`.
    """

    pack: tuple[int, int]
    offset: int
    part: Part
    in_place: tuple[Destination, int] | None


def minus(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(x - y for x, y in zip(a, b, strict=True))


def _range_in_place(
    spec: LeafSpec, chunk_box: Box, start: int, targets: tuple[tuple[Destination, Box], ...]
) -> tuple[Destination, int] | None:
    """Where byte ``start`` of a chunk lies in its one destination, if the chunk is a contiguous range of that."""
    if len(targets) != 1 or targets[0][1] != chunk_box:
        return None
    destination = targets[0][0]
    if destination.fortran_axes:
        return None
    lo, hi = destination.box
    sizes = minus(hi, lo)
    is_inside = False
    for size, chunk in zip(sizes, spec.chunk_shape, strict=True):
        if is_inside and size != chunk:
            return None
        is_inside = is_inside or chunk > 1
    element = 0
    for place, size in zip(minus(chunk_box[0], lo), sizes, strict=True):
        element = element * size + place
    return destination, element * spec.stored_itemsize + start
