"""Which bytes must be read for the wanted boxes?

A restore wants, for each leaf, the boxes that its devices need (`Destination`); storage has chunks. Which of them were
the shards of a saved array does not matter any more: everything is boxes against boxes. `plan_reads` finds for every
chunk the destinations that it overlaps and the checksum blocks that they need. Each block is listed once, however many
destinations want it. Neighbouring blocks are joined into read *units*; chunks that lie side by side in a pack are read
together, and, where a request costs more than bytes do, what lies between them is read in vain. A large tree has few
shapes, so what was found for one leaf (`Cut`) serves all with the same spec of which the same boxes are wanted; each
chunk is only looked up in its table then.

Everything here is pure. `_fetching` carries the reads out.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import operator
from collections.abc import Collection, Iterable, Sequence
from typing import Any, final

from ._config import BLOCK_BYTES
from ._layout import blocks_of_box, intersect
from ._manifest import LeafSpec
from ._parts import ChunkIndex, ChunkPlace, box_of_chunk
from ._shardings import Box
from ._storage import Buffer

# Small destinations share an allocation of this size, since a mapping of its own costs a system call and a page each.
SHARED_ALLOCATION_BYTES = 1 << 20


@dataclasses.dataclass(slots=True, eq=False)
class Destination:
    """A box of a leaf that is wanted, and, once it is read, its bytes (64-byte aligned).

    The first ``fortran_axes`` axes lie in Fortran order, what is left in C order. One that ``is_chunk`` is exactly one
    packed chunk that is read whole, and keeps the memory that it is read into.
    """

    leaf: int
    box: Box
    nbytes: int
    fortran_axes: int = 0
    buffer: Buffer | None = None
    is_chunk: bool = False


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class Cut:
    """How boxes lie to one chunk; the same for all leaves with equal specs of which equal boxes are wanted.

    Attributes:
      at: Number of the chunk among those of its leaf.
      box: The chunk.
      regions: Numbers of the boxes that overlap it, each with what they share.
      is_box: Whether the chunk is the one box that overlaps it, so that one can have the memory of the other.
      runs: What is read of the chunk, by its length, padding included, and whether it is an object of its own.
    """

    at: int
    box: Box
    regions: tuple[tuple[int, Box], ...]
    is_box: bool
    runs: dict[tuple[int, bool], list[Run]]


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class Run:
    """Blocks of a chunk that follow one another.

    Attributes:
      first_block, block_count: Which ones.
      start, length: Where they lie in the chunk, in bytes as stored.
      in_place: Byte of a box at which they start, if they are a contiguous range of that, and of no other.
      region: Which region of the chunk that box has.
    """

    first_block: int
    block_count: int
    start: int
    length: int
    in_place: int | None
    region: int = 0


# Not frozen, and most of it shared: half a million are no rarity, and the garbage collector goes through all of them.
@dataclasses.dataclass(slots=True, eq=False)
class Part:
    """Blocks of one chunk within a unit.

    Attributes:
      leaf, chunk: Leaf, and number of the chunk among all.
      place: Where the chunk lies.
      run: Which blocks.
      cut: What is wanted of the chunk.
      destinations: Those of the leaf; the cut says which of them want something.
      first: The first of those that do, or the one that the blocks are a range of.
      at: Byte of the unit at which the blocks start.
    """

    leaf: int
    chunk: int
    place: ChunkPlace
    run: Run
    cut: Cut
    destinations: list[Destination]
    first: Destination
    at: int

    @property
    def length(self) -> int:
        """Bytes of the blocks as stored."""
        return self.run.length

    @property
    def targets(self) -> Iterable[tuple[Destination, Box]]:
        """All that want something, each with the box (in the leaf's coordinates) that it takes from the chunk."""
        return [(self.destinations[number], region) for number, region in self.cut.regions]


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

    def chunks_of(self, name: str) -> list[tuple[int, int]]:
        """Leaf and number of each chunk that an object holds."""
        parts = [part for unit in self.units if unit.object == name for part in unit.parts]
        return list(dict.fromkeys((part.leaf, part.chunk) for part in parts))

    @property
    def nbytes(self) -> int:
        """Bytes that will be read."""
        return sum(unit.length for unit in self.units)


def plan_reads(
    index: ChunkIndex,
    wanted: Iterable[tuple[int, Sequence[Box]]],
    unit_bytes: int,
    fortran: Collection[int] = (),
    gap_bytes_max: int = 0,
) -> ReadPlan:
    """Plans the reads for boxes of leaves.

    Args:
      index: Where the chunks lie; what it has to read for that is read.
      wanted: Leaves, each with the distinct boxes of its stored form that are needed.
      unit_bytes: Most bytes of one read; at least a block.
      fortran: Leaves whose boxes are to lie in Fortran order.
      gap_bytes_max: Most bytes between two wanted chunks of a pack that are read together; see `Store`.
    """
    planner = _ReadPlanner(index, max(unit_bytes // BLOCK_BYTES, 1), fortran, gap_bytes_max)
    for leaf, boxes in wanted:
        planner.add_leaf(leaf, boxes)
    return planner.finish()


@final
class _ReadPlanner:
    def __init__(
        self, index: ChunkIndex, unit_blocks: int, fortran: Collection[int], gap_bytes_max: int
    ) -> None:
        self._index = index
        self._manifest = index.manifest
        self._unit_blocks = unit_blocks
        self._fortran = fortran
        self._gap_bytes_max = gap_bytes_max
        self._destinations: list[Destination] = []
        self._units: list[Unit] = []
        self._packed: dict[tuple[int, int], list[Part]] = {}
        self._object_lengths: dict[str, int] = {}
        self._cuts: dict[Any, tuple[list[Cut], list[int]]] = {}

    def add_leaf(self, leaf: int, boxes: Sequence[Box]) -> None:
        if not boxes:  # a value, which lies in the manifest
            return
        number = self._manifest.spec_numbers[leaf]
        spec = self._manifest.specs[number]
        fortran_axes = len(spec.shape) if leaf in self._fortran else 0
        form = number, fortran_axes, tuple(boxes)
        known = self._cuts.get(form)
        if known is None:
            known = self._cuts[form] = _cut(spec, boxes, fortran_axes)
        cuts, sizes = known
        destinations = [
            Destination(leaf, box, nbytes, fortran_axes) for box, nbytes in zip(boxes, sizes, strict=True)
        ]
        self._destinations += destinations
        first = int(self._manifest.chunk_starts[leaf])
        for cut in cuts:
            self._add_chunk(leaf, spec, first + cut.at, cut, destinations)

    def _add_chunk(
        self, leaf: int, spec: LeafSpec, chunk: int, cut: Cut, destinations: list[Destination]
    ) -> None:
        place = self._index.place(leaf, chunk)
        self._object_lengths[place.object] = place.object_length
        first = destinations[cut.regions[0][0]]
        form = place.length, place.pack is None
        runs = cut.runs.get(form)
        if runs is None:
            runs = cut.runs[form] = list(self._runs(spec, cut, place, destinations))
        if place.pack is None:
            for run in runs:
                first = destinations[cut.regions[run.region][0]]
                part = Part(leaf, chunk, place, run, cut, destinations, first, 0)
                in_place = None if run.in_place is None else (first, run.in_place)
                self._units.append(Unit(place.object, run.start, run.length, (part,), in_place))
            return
        first.is_chunk = cut.is_box and len(runs) == 1 and runs[0].in_place is None
        parts = self._packed.setdefault(place.pack, [])
        offset = place.offset
        for run in runs:
            # From the start of the pack, until it is known which ones are read together.
            parts.append(Part(leaf, chunk, place, run, cut, destinations, first, offset + run.start))

    def _runs(
        self, spec: LeafSpec, cut: Cut, place: ChunkPlace, destinations: list[Destination]
    ) -> Iterable[Run]:
        """Runs of needed blocks, none longer than a unit."""
        first = destinations[cut.regions[0][0]]
        if place.pack is None and not first.fortran_axes and cut.regions[0][1] != cut.box:
            boxes = [destinations[number].box for number, _ in cut.regions]
            slabs = _slabs(spec, cut, boxes, place.length)
            if slabs is not None:
                for slab in slabs:
                    yield from _split_run(slab, self._unit_blocks)
                return
        can_be_in_place = len(cut.regions) == 1 and not first.fortran_axes
        # A destination that is one chunk keeps the memory it is read into, with its neighbours in the pack; nor is
        # there room for the padding behind a chunk.
        if place.pack is not None and (
            place.length != spec.chunk_nbytes or first.nbytes < SHARED_ALLOCATION_BYTES
        ):
            can_be_in_place = False
        for block, count in _block_runs(spec, cut, place.length, self._unit_blocks):
            start = block * BLOCK_BYTES
            in_place = _place_in_box(spec, cut, first.box, start) if can_be_in_place else None
            yield Run(block, count, start, min(count * BLOCK_BYTES, place.length - start), in_place)

    def finish(self) -> ReadPlan:
        for parts in self._packed.values():
            self._join_packed(parts)
        return ReadPlan(tuple(self._destinations), tuple(self._units), self._object_lengths)

    def _join_packed(self, parts: list[Part]) -> None:
        """Joins parts that are neighbours in a pack, and in their destination if they are read in place."""
        parts.sort(key=operator.attrgetter("at"))
        begin = 0
        for end in range(1, len(parts) + 1):
            if end == len(parts) or not self._can_join(parts[begin], parts[end - 1], parts[end]):
                self._add_pack_unit(parts[begin:end])
                begin = end

    def _can_join(self, first: Part, last: Part, part: Part) -> bool:
        """Whether a part follows the last one of a unit, and goes where that goes."""
        end = last.at + last.run.length
        if part.at + part.run.length - first.at > self._unit_blocks * BLOCK_BYTES:
            return False
        place, last_place = part.run.in_place, last.run.in_place
        if place is None or last_place is None:
            return place is last_place and 0 <= part.at - end <= self._gap_bytes_max
        return part.at == end and part.first is last.first and place == last_place + last.run.length

    def _add_pack_unit(self, parts: list[Part]) -> None:
        first, last = parts[0], parts[-1]
        start = first.at
        length = last.at + last.run.length - start
        in_place = None if first.run.in_place is None else (first.first, first.run.in_place)
        if sum(part.run.length for part in parts) < length:
            for part in parts:
                part.first.is_chunk = False  # nobody is to keep what is read in vain
        for part in parts:
            part.at -= start
        self._units.append(Unit(first.place.object, start, length, tuple(parts), in_place))


def _cut(spec: LeafSpec, boxes: Sequence[Box], fortran_axes: int) -> tuple[list[Cut], list[int]]:
    """The chunks that boxes overlap, and the bytes of each box."""
    sizes: list[int] = []
    regions_of_chunk: dict[tuple[int, Box], list[tuple[int, Box]]] = {}
    for number, box in enumerate(boxes):
        count = math.prod(minus(box[1], box[0]))
        sizes.append(count * spec.stored_itemsize)
        if count:
            for at, chunk_box, region in _overlaps(spec, box):
                regions_of_chunk.setdefault((at, chunk_box), []).append((number, region))
    cuts: list[Cut] = []
    for (at, chunk_box), regions in regions_of_chunk.items():
        is_box = len(regions) == 1 and boxes[regions[0][0]] == chunk_box and not fortran_axes
        cuts.append(Cut(at, chunk_box, tuple(regions), is_box, {}))
    return cuts, sizes


def _overlaps(spec: LeafSpec, box: Box) -> Iterable[tuple[int, Box, Box]]:
    """Chunks of the leaf that a box touches: their numbers, their boxes, and the shared boxes."""
    if spec.chunk_count == 1:
        yield 0, ((0,) * len(spec.stored_shape), spec.stored_shape), box
        return
    ranges = [
        range(lo // chunk, -(-hi // chunk)) for lo, hi, chunk in zip(*box, spec.chunk_shape, strict=True)
    ]
    grid = spec.grid
    for index in itertools.product(*ranges):
        at = 0
        for place, size in zip(index, grid, strict=True):
            at = at * size + place
        chunk_box = box_of_chunk(spec, index)
        region = intersect(box, chunk_box)
        assert region is not None
        yield at, chunk_box, region


def _block_runs(spec: LeafSpec, cut: Cut, length: int, unit_blocks: int) -> Iterable[tuple[int, int]]:
    """Runs of needed blocks as (first, count), none longer than a unit."""
    block_count = -(-length // BLOCK_BYTES)
    if block_count == 1 or any(region == cut.box for _, region in cut.regions):
        needed: Sequence[int] = range(block_count)
    else:
        blocks: set[int] = set()
        for _, (lo, hi) in cut.regions:
            local = (minus(lo, cut.box[0]), minus(hi, cut.box[0]))
            blocks |= blocks_of_box(local, spec.chunk_shape, spec.stored_itemsize)
        needed = sorted(blocks)
    first = previous = needed[0]
    for block in needed[1:]:
        if block != previous + 1 or block - first == unit_blocks:
            yield first, previous - first + 1
            first = block
        previous = block
    yield first, previous - first + 1


def _slabs(spec: LeafSpec, cut: Cut, boxes: Sequence[Box], length: int) -> list[Run] | None:
    """A run for each box that overlaps a chunk, if each needs whole blocks of it that no other needs, in one range.

    So do rows of an array that was saved whole. None where any box needs something else.
    """
    slabs: list[Run] = []
    for region, ((_, shared), box) in enumerate(zip(cut.regions, boxes, strict=True)):
        in_chunk = _range_of(shared, cut.box)
        in_box = _range_of(shared, box)
        if in_chunk is None or in_box is None:
            return None
        start, end = (element * spec.stored_itemsize for element in in_chunk)
        if start % BLOCK_BYTES or (end % BLOCK_BYTES and end != length):
            return None
        block, count = start // BLOCK_BYTES, -(-(end - start) // BLOCK_BYTES)
        slabs.append(Run(block, count, start, end - start, in_box[0] * spec.stored_itemsize, region))
    slabs.sort(key=operator.attrgetter("start"))
    are_apart = all(one.start + one.length <= other.start for one, other in itertools.pairwise(slabs))
    return slabs if are_apart else None


def _range_of(inner: Box, outer: Box) -> tuple[int, int] | None:
    """Elements ``[first, last)`` of a box that another one within it has, if they follow one another in C order."""
    sizes = minus(outer[1], outer[0])
    inner_sizes = minus(inner[1], inner[0])
    is_partial = False
    first = 0
    for place, size, inner_size in zip(minus(inner[0], outer[0]), sizes, inner_sizes, strict=True):
        if is_partial and inner_size != size:
            return None
        is_partial = is_partial or inner_size > 1
        first = first * size + place
    return first, first + math.prod(inner_sizes)


def _split_run(run: Run, unit_blocks: int) -> Iterable[Run]:
    """The same blocks in runs that are no longer than a unit."""
    assert run.in_place is not None
    for block in range(0, run.block_count, unit_blocks):
        at = block * BLOCK_BYTES
        count = min(unit_blocks, run.block_count - block)
        length = min(count * BLOCK_BYTES, run.length - at)
        yield Run(run.first_block + block, count, run.start + at, length, run.in_place + at, run.region)


def minus(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(x - y for x, y in zip(a, b, strict=True))


def _place_in_box(spec: LeafSpec, cut: Cut, box: Box, start: int) -> int | None:
    """Where byte ``start`` of a chunk lies in the box that overlaps it, if the chunk is a contiguous range of that."""
    if cut.regions[0][1] != cut.box:
        return None
    lo, hi = box
    sizes = minus(hi, lo)
    is_inside = False
    for size, chunk in zip(sizes, spec.chunk_shape, strict=True):
        if is_inside and size != chunk:
            return None
        is_inside = is_inside or chunk > 1
    element = 0
    for place, size in zip(minus(cut.box[0], lo), sizes, strict=True):
        element = element * size + place
    return element * spec.stored_itemsize + start
