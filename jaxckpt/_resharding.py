"""Which bytes must be read for the wanted boxes, and how do they get there?

A restore wants, for each leaf, the boxes that its devices need (`Destination`); storage has chunks. Which of them were
the shards of a saved array does not matter any more: everything is boxes against boxes.

1. `plan_reads` (pure) finds for every chunk the destinations that it overlaps and the checksum blocks that they need.
   Each block is listed once, however many destinations want it. Neighbouring blocks are joined into read *units*;
   chunks that lie side by side in a pack are read together.
2. `ReadExecutor` reads the units in a few threads. Three ways, the cheapest that fits: a run of blocks that is also a
   contiguous range of one destination is read in place; a packed chunk that is a whole destination keeps the memory
   that it was read into; everything else goes through a small buffer and is copied box by box.
3. Every block is verified before anything else looks at it. All damage is collected, then raised as one
   `CorruptError`: no wrong byte is ever returned.

Deliberately not here: devices (`_placement`).
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import errno
import itertools
import math
import threading
from collections.abc import Collection, Iterable, Sequence
from typing import Any, final

import numpy as np
import xxhash

from ._config import BLOCK_BYTES
from ._errors import CorruptError, Problem, list_problems
from ._layout import blocks_of_box, flat_boxes, intersect
from ._manifest import LeafSpec, Manifest, StoredObject
from ._parts import ChunkIndex, ChunkPlace, box_of_chunk
from ._progress import ProgressMeter
from ._shardings import Box
from ._store import Buffer, Store, allocate_aligned
from ._tables import PIECE_ALIGNMENT

# The unsigned type of each element size, to move elements without looking at them.
_MOVABLE = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64, 16: np.complex128}

# Small destinations share an allocation of this size, since a mapping of its own costs a system call and a page each.
_SHARED_ALLOCATION_BYTES = 1 << 20
_ALIGNMENT = 64


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
            if length != spec.chunk_nbytes or targets[0][0].nbytes < _SHARED_ALLOCATION_BYTES:
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
                local = (_minus(lo, chunk_box[0]), _minus(hi, chunk_box[0]))
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


def _minus(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...]:
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
    sizes = _minus(hi, lo)
    is_inside = False
    for size, chunk in zip(sizes, spec.chunk_shape, strict=True):
        if is_inside and size != chunk:
            return None
        is_inside = is_inside or chunk > 1
    element = 0
    for place, size in zip(_minus(chunk_box[0], lo), sizes, strict=True):
        element = element * size + place
    return destination, element * spec.stored_itemsize + start


# --- reading --------------------------------------------------------------------------------------------------


@final
class ReadExecutor:
    """Reads and verifies; counts the bytes it asked storage for.

    Args:
      store: Where from.
      manifest: What is stored there.
      threads: How many read at a time.
      meter: Is told of bytes read.
    """

    def __init__(
        self, store: Store, manifest: Manifest, *, threads: int, meter: ProgressMeter | None = None
    ) -> None:
        self._store = store
        self._manifest = manifest
        self._threads = threads
        self._meter = meter
        self._lock = threading.Lock()
        self._problems: list[Problem] = []
        self._scratch = threading.local()
        self.bytes_read = 0

    @property
    def problems(self) -> list[Problem]:
        """What was found to be wrong so far, by key and place."""
        return sorted(self._problems, key=lambda problem: (problem.key or "", problem.message))

    def check_objects(self, plan: ReadPlan) -> None:
        """Finds missing objects and objects of a wrong length, before any memory is taken for the arrays."""
        for name, length in plan.object_lengths.items():
            try:
                if not self._store.has_length(name, length):
                    self._report_object(
                        plan, name, "length", f"does not have the {length} bytes that it was written with"
                    )
            except OSError as error:
                self._report_object(plan, name, _kind_of(error), _describe_os_error(error))

    def check_metadata(self, entries: Iterable[StoredObject]) -> None:
        """Verifies metadata objects."""
        for entry in entries:
            self.read_metadata(entry)

    def read_metadata(self, entry: StoredObject) -> bytes | None:
        """A metadata object, verified; None when something is wrong with it."""
        try:
            data = self._store.read(entry.name, entry.length)
        except OSError as error:
            self._report(None, _kind_of(error), f"object {entry.name}: {_describe_os_error(error)}")
            return None
        self._count(len(data))
        if len(data) != entry.length:
            message = f"object {entry.name}: does not have the {entry.length} bytes that it was written with"
            self._report(None, "length", message)
            return None
        if xxhash.xxh3_128_digest(data) != entry.checksum:
            self._report(None, "checksum", f"object {entry.name}: its checksum differs")
            return None
        return data

    def read(self, plan: ReadPlan) -> None:
        """Fills the destinations of a plan. Damage is collected; see `raise_problems`."""
        self._allocate(plan)
        self._run(plan.units, self._read_unit)

    def verify(self, plan: ReadPlan) -> None:
        """Reads and verifies without filling destinations."""
        self._run(plan.units, self._verify_unit)

    def raise_problems(self, doing: str) -> None:
        """Raises `CorruptError` if anything was found.

        Args:
          doing: What failed, such as ``"restore 'run/step_3'"``.
        """
        if self._problems:
            problems = self.problems
            headline = f"cannot {doing}: stored data is damaged in {len(problems)} places"
            advice = ["nothing was returned; use another checkpoint, or select= the leaves that are whole"]
            raise CorruptError(list_problems(headline, problems, advice), problems)

    def _run(self, units: Sequence[Unit], work: Any) -> None:
        if len(units) <= 1 or self._threads == 1:
            for unit in units:
                work(unit)
            return
        with concurrent.futures.ThreadPoolExecutor(self._threads, "jaxckpt-read") as executor:
            for _ in executor.map(work, units):
                pass

    def _allocate(self, plan: ReadPlan) -> None:
        """Takes memory for the destinations that are not packed chunks read in one go."""
        adopted = {id(destination) for unit in plan.units for destination in _adopting(self._manifest, unit)}
        shared = np.empty(0, np.uint8)
        for destination in plan.destinations:
            if destination.buffer is not None or id(destination) in adopted:
                continue
            if destination.nbytes >= _SHARED_ALLOCATION_BYTES:
                destination.buffer = allocate_aligned(destination.nbytes)
                continue
            if len(shared) < destination.nbytes:
                shared = allocate_aligned(_SHARED_ALLOCATION_BYTES)
            destination.buffer = shared[: destination.nbytes]
            shared = shared[-(-destination.nbytes // _ALIGNMENT) * _ALIGNMENT :]

    def _read_unit(self, unit: Unit) -> None:
        adopting = _adopting(self._manifest, unit)
        if unit.in_place is not None:
            destination, start = unit.in_place
            assert destination.buffer is not None
            buffer = destination.buffer[start : start + unit.length]
        elif adopting:
            buffer = allocate_aligned(unit.length, unit.offset)
        else:
            buffer = self._scratch_buffer(unit)
        if not self._fill(unit, buffer):
            return
        for part in unit.parts:
            if not self._verify_part(unit, part, buffer) or unit.in_place is not None:
                continue
            if part.targets[0][0] in adopting:
                destination = part.targets[0][0]
                destination.buffer = buffer[part.at : part.at + destination.nbytes]
            else:
                self._scatter(part, buffer)

    def _verify_unit(self, unit: Unit) -> None:
        buffer = self._scratch_buffer(unit)
        if self._fill(unit, buffer):
            for part in unit.parts:
                self._verify_part(unit, part, buffer)

    def _scratch_buffer(self, unit: Unit) -> Buffer:
        """Memory of the calling thread, reused from unit to unit; as far behind a page as the unit in its object."""
        lead = unit.offset % PIECE_ALIGNMENT
        held: Buffer | None = getattr(self._scratch, "buffer", None)
        if held is None or len(held) < lead + unit.length:
            held = allocate_aligned(max(lead + unit.length, BLOCK_BYTES))
            self._scratch.buffer = held
        return held[lead : lead + unit.length]

    def _fill(self, unit: Unit, buffer: Buffer) -> bool:
        """Reads a unit; reports it and returns False when storage does not give it whole."""
        try:
            count = self._store.read_into(unit.object, unit.offset, buffer)
        except OSError as error:
            for part in unit.parts:
                self._report_part(unit, part, _kind_of(error), _describe_os_error(error))
            return False
        self._count(count)
        if count < unit.length:
            for part in unit.parts:
                self._report_part(unit, part, "length", f"the object ends at byte {unit.offset + count}")
            return False
        return True

    def _verify_part(self, unit: Unit, part: Part, buffer: Buffer) -> bool:
        view = memoryview(buffer)[part.at : part.at + part.length]
        first = part.first_block
        for block in range(part.block_count):
            data = view[block * BLOCK_BYTES : (block + 1) * BLOCK_BYTES]
            if xxhash.xxh3_128_digest(data) != part.place.table.checksum(part.place.row, first + block):
                place = unit.offset + part.at + block * BLOCK_BYTES
                self._report_part(
                    unit, part, "checksum", f"the checksum of the block at byte {place} differs"
                )
                return False
        return True

    def _scatter(self, part: Part, buffer: Buffer) -> None:
        """Copies what the destinations want from verified blocks."""
        spec = self._manifest.spec(part.leaf)
        itemsize = spec.stored_itemsize
        chunk_lo = box_of_chunk(spec, self._manifest.chunk_index(part.leaf, part.chunk))[0]
        first = part.first_block * BLOCK_BYTES // itemsize
        last = min(first + part.length // itemsize, spec.chunk_nbytes // itemsize)
        elements = buffer[part.at : part.at + (last - first) * itemsize].view(_MOVABLE[itemsize])
        at = 0
        for lo, hi in flat_boxes(first, last, spec.chunk_shape):
            sizes = _minus(hi, lo)
            count = math.prod(sizes)
            source = elements[at : at + count].reshape(sizes)
            at += count
            source_box = (_plus(lo, chunk_lo), _plus(hi, chunk_lo))
            for destination, region in part.targets:
                shared = intersect(region, source_box)
                if shared is not None:
                    target = destination_array(destination, itemsize)
                    target[_slices(shared, destination.box[0])] = source[_slices(shared, source_box[0])]

    def _count(self, nbytes: int) -> None:
        with self._lock:
            self.bytes_read += nbytes
        if self._meter is not None:
            self._meter.add(nbytes)

    def _report(self, key: str | None, kind: str, message: str) -> None:
        with self._lock:
            self._problems.append(Problem(key, kind, message))

    def _report_part(self, unit: Unit, part: Part, kind: str, what: str) -> None:
        chunk = self._manifest.chunk_index(part.leaf, part.chunk)
        self._report(self._manifest.keys[part.leaf], kind, f"chunk {chunk} in object {unit.object}: {what}")

    def _report_object(self, plan: ReadPlan, name: str, kind: str, what: str) -> None:
        for leaf, chunk in plan.leaves_of_object[name]:
            index = self._manifest.chunk_index(leaf, chunk)
            self._report(self._manifest.keys[leaf], kind, f"chunk {index} in object {name}: {what}")


def destination_array(destination: Destination, itemsize: int) -> np.ndarray[Any, Any]:
    """The bytes of a destination as an array of opaque elements in the shape of its box."""
    assert destination.buffer is not None
    sizes = _minus(destination.box[1], destination.box[0])
    elements = destination.buffer.view(_MOVABLE[itemsize])
    if not destination.fortran_axes:
        return elements.reshape(sizes)
    turned = range(destination.fortran_axes - 1, -1, -1)
    rest = range(destination.fortran_axes, len(sizes))
    axes = (*turned, *rest)  # its own inverse
    return elements.reshape([sizes[axis] for axis in axes]).transpose(axes)


def _adopting(manifest: Manifest, unit: Unit) -> set[Destination]:
    """Destinations that are exactly one packed chunk of the unit; they keep the memory that it is read into."""
    adopting: set[Destination] = set()
    if unit.in_place is not None:
        return adopting
    for part in unit.parts:
        if part.place.pack is None or len(part.targets) != 1:
            continue
        destination, region = part.targets[0]
        is_whole_chunk = part.first_block == 0 and part.length == part.place.length
        if (
            is_whole_chunk
            and not destination.fortran_axes
            and region == destination.box
            and destination.nbytes == manifest.spec(part.leaf).chunk_nbytes
        ):
            adopting.add(destination)
    return adopting


def _plus(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(x + y for x, y in zip(a, b, strict=True))


def _slices(box: Box, origin: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(slice(lo - start, hi - start) for lo, hi, start in zip(*box, origin, strict=True))


def _kind_of(error: OSError) -> str:
    """``"missing"`` when bytes are lost; ``"unreadable"`` when the process or the machine lacks something."""
    is_lost = error.errno in (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EIO)
    return "missing" if is_lost else "unreadable"


def _describe_os_error(error: OSError) -> str:
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        return "it is missing"
    return f"it cannot be read ({error.strerror or error})"
