"""The pure plans: for any two shardings every element is written once and read once, and packs have no holes.

`simulate_write` carries a write plan out in memory, and `MemoryStore` gives the bytes to the real reading code, so that
what the plans say is compared with NumPy and not with another plan.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any, NoReturn, final

import numpy as np
import pytest
import xxhash
from hypothesis import HealthCheck, given, settings, strategies as st

from jaxckpt._config import BLOCK_BYTES, MIB
from jaxckpt._fetching import ReadExecutor
from jaxckpt._layout import (
    LeafExtent,
    WritePlan,
    blocks_of_box,
    cut_shard,
    flat_boxes,
    intersect,
    plan_writes,
)
from jaxckpt._manifest import LeafSpec, Manifest
from jaxckpt._parts import ChunkIndex
from jaxckpt._resharding import ReadPlan, plan_reads
from jaxckpt._shardings import Box, shrink_axes
from jaxckpt._storage import Buffer, ObjectWriter, Store
from jaxckpt._tables import OWN_OBJECT, PACK_ALIGNMENT, PIECE_ALIGNMENT, ChunkTable

SETTINGS = settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None
)
# One of these examples is a tree of several arrays, written and read as a whole.
SOME = settings(SETTINGS, max_examples=60)
FEW = settings(SETTINGS, max_examples=25)

DTYPES = ("uint8", "uint16", "float32", "float64", "complex128")


# --- a tree in memory -----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Case:
    """An array and the grid of shards that it is written in."""

    array: np.ndarray
    grid: tuple[int, ...]

    @property
    def shard_shape(self) -> tuple[int, ...]:
        return tuple(size // count for size, count in zip(self.array.shape, self.grid, strict=True))

    @property
    def extent(self) -> LeafExtent:
        corners = {}
        for number, (lo, _) in enumerate(grid_boxes(self.array.shape, self.grid)):
            corners.setdefault(lo, number)
        shard_shape = tuple(max(size, 1) for size in self.shard_shape)
        return LeafExtent(self.array.shape, self.array.itemsize, shard_shape, tuple(corners.items()))

    def shard_bytes(self, number: int) -> bytes:
        lo, hi = grid_boxes(self.array.shape, self.grid)[number]
        return np.ascontiguousarray(self.array[slices(lo, hi)]).tobytes()


def grid_boxes(shape: tuple[int, ...], grid: tuple[int, ...]) -> list[Box]:
    """The boxes of an array that is cut into so many equal parts along each axis."""
    sizes = [size // count for size, count in zip(shape, grid, strict=True)]
    boxes = []
    for index in itertools.product(*map(range, grid)):
        lo = tuple(place * size for place, size in zip(index, sizes, strict=True))
        boxes.append((lo, tuple(start + size for start, size in zip(lo, sizes, strict=True))))
    return boxes


def slices(lo: tuple[int, ...], hi: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(map(slice, lo, hi))


def make_array(shape: tuple[int, ...], dtype: str, seed: int) -> np.ndarray:
    """Random bytes, so that any two elements differ."""
    nbytes = math.prod(shape) * np.dtype(dtype).itemsize
    return np.frombuffer(np.random.default_rng(seed).bytes(nbytes), dtype).reshape(shape)


def simulate_write(cases: list[Case], plan: WritePlan) -> tuple[Manifest, dict[str, bytearray]]:
    """The objects and the manifest that a plan leads to; fails where two pieces write the same byte."""
    objects = [bytearray(entry.length) for entry in plan.objects]
    written = [np.zeros(entry.length, np.uint8) for entry in plan.objects]
    for piece in plan.pieces:
        written[piece.object][piece.offset : piece.offset + piece.length] += 1
        end = 0
        for segment in piece.segments:
            assert segment.at == end
            end += segment.stored
            data = cases[segment.leaf].shard_bytes(segment.shard)[segment.lo : segment.hi]
            assert len(data) == segment.hi - segment.lo
            start = piece.offset + segment.at
            objects[piece.object][start : start + len(data)] = data
        assert end == piece.length
    for counts in written:
        assert np.all(counts == 1)

    specs = tuple(
        LeafSpec("array", case.array.dtype.name, case.array.shape, chunk_shape)
        for case, chunk_shape in zip(cases, plan.chunk_shapes, strict=True)
    )
    empty = ChunkTable(plan.pack, plan.offset, plan.length, b"")
    manifest = Manifest(
        data="data-0",
        created_s=0.0,
        writer={},
        metadata=None,
        nodes=[],
        keys=tuple(str(number) for number in range(len(cases))),
        specs=specs,
        spec_index=np.arange(len(cases), dtype=np.uint32),
        values={},
        shardings=(),
        directories={number: f"arrays/{number}" for number in range(len(cases))},
        packs=plan.packs,
        chunks=empty,
        objects=(),
    )
    names = [
        f"data-0/packs/0-{entry.index[0]}"
        if entry.leaf is None
        else f"data-0/arrays/{entry.leaf}/" + ".".join(["c", *map(str, entry.index)])
        for entry in plan.objects
    ]
    stored = dict(zip(names, objects, strict=True))
    assert len(stored) == len(objects)
    checksums = b""
    for leaf in range(len(cases)):
        for chunk in range(int(manifest.chunk_starts[leaf]), int(manifest.chunk_starts[leaf + 1])):
            place = ChunkIndex(manifest).place(leaf, chunk)
            name = place.object
            assert len(stored[name]) == place.object_length
            start, count = int(plan.offset[chunk]), int(plan.length[chunk])
            for block in range(start, start + count, BLOCK_BYTES):
                data = bytes(stored[name][block : min(block + BLOCK_BYTES, start + count)])
                checksums += xxhash.xxh3_128_digest(data)
    chunks = dataclasses.replace(empty, checksums=checksums)
    return dataclasses.replace(manifest, chunks=chunks), stored


@final
class MemoryStore(Store):
    """Objects in memory that remember which of their bytes were read."""

    def __init__(self, objects: dict[str, bytearray]) -> None:
        self.path = "in memory"
        self.objects = objects
        self.reads = {name: np.zeros(len(data), np.int64) for name, data in objects.items()}

    def has_length(self, name: str, length: int) -> bool:
        return len(self.objects[name]) == length

    def read_into(self, name: str, offset: int, buffer: Buffer) -> int:
        data = self.objects[name][offset : offset + len(buffer)]
        buffer[: len(data)] = np.frombuffer(data, np.uint8)
        self.reads[name][offset : offset + len(buffer)] += 1
        return len(data)

    def read(self, name: str) -> bytes:
        return bytes(self.objects[name])

    def exists(self, name: str) -> bool:
        return name in self.objects

    def create(self, name: str, length: int) -> ObjectWriter:
        self._refuse()

    def put(self, name: str, data: bytes) -> None:
        self._refuse()

    def sync(self) -> None:
        self._refuse()

    def publish(self, name: str, data: bytes) -> None:
        self._refuse()

    def delete_tree(self, name: str) -> None:
        self._refuse()

    def names(self) -> list[str]:
        self._refuse()

    def delete(self, name: str) -> None:
        self._refuse()

    def confirm(self) -> None:
        self._refuse()

    def child(self, name: str) -> Store:
        self._refuse()

    def remove_if_empty(self) -> None:
        self._refuse()

    def make_directory(self, name: str) -> None:
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise NotImplementedError("this store is only read")


# --- strategies -----------------------------------------------------------------------------------------------


@st.composite
def cases(draw: st.DrawFn, *, has_empty: bool = True) -> Case:
    """Small arrays of any rank in any grid of shards."""
    rank = draw(st.integers(0, 4))
    grid = tuple(draw(st.integers(1, 3)) for _ in range(rank))
    shard = tuple(draw(st.integers(0 if has_empty else 1, 5)) for _ in range(rank))
    shape = tuple(map(int.__mul__, grid, shard))
    return Case(make_array(shape, draw(st.sampled_from(DTYPES)), draw(st.integers(0, 99))), grid)


@st.composite
def large_cases(draw: st.DrawFn) -> Case:
    """Arrays of some MiB, whose chunks have several blocks."""
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(
        st.sampled_from(
            [
                (6, 700, 900),
                (2520, 1260),
                (3_000_000,),
                (4, 6, 30, 2000),
                (1_200_000, 2),
                (5, 700_000),
                (2, 2, 800_000),
            ]
        )
    )
    grid = tuple(draw(st.sampled_from([n for n in (1, 2, 3) if size % n == 0])) for size in shape)
    if np.dtype(dtype).itemsize > 4:
        shape, grid = shape[1:] or (600_000,), grid[1:] or (1,)
    return Case(make_array(shape, dtype, 7), grid)


def divisor_grids(shape: tuple[int, ...]) -> st.SearchStrategy[tuple[int, ...]]:
    """Grids that cut a shape into equal parts."""
    choices = [[n for n in (1, 2, 3, 4, 5) if size % n == 0] for size in shape]
    return st.tuples(*(st.sampled_from(counts) for counts in choices))


def boxes_in(shape: tuple[int, ...]) -> st.SearchStrategy[Box]:
    """Boxes of an array, empty ones too."""
    pairs = [st.tuples(st.integers(0, size), st.integers(0, size)).map(sorted) for size in shape]
    return st.tuples(*pairs).map(lambda ends: (tuple(lo for lo, _ in ends), tuple(hi for _, hi in ends)))


# --- boxes ----------------------------------------------------------------------------------------------------


@SETTINGS
@given(st.data(), st.lists(st.integers(1, 5), max_size=4).map(tuple))
def test_flat_boxes_tile_the_range_in_order(data: st.DataObject, shape: tuple[int, ...]):
    count = math.prod(shape)
    lo, hi = sorted(data.draw(st.tuples(st.integers(0, count), st.integers(0, count))))
    numbers = np.arange(count).reshape(shape)
    tiles = [numbers[slices(*box)].reshape(-1) for box in flat_boxes(lo, hi, shape)]
    assert np.concatenate([np.arange(0), *tiles]).tolist() == list(range(lo, hi))
    assert len(tiles) <= max(1, 2 * len(shape) - 1)


@SETTINGS
@given(st.data(), st.sampled_from([1, 2, 4, 8, 16]))
def test_blocks_of_box_are_those_of_its_elements(data: st.DataObject, itemsize: int):
    shape = data.draw(
        st.sampled_from(
            [
                (),
                (2_000_000,),
                (40, 70_000),
                (7, 5, 60_000),
                (3, 2, 5, 70_000),
                (1500, 1500),
                (90_000, 3, 7),
                (9, 1, 300_000),
            ]
        )
    )
    box = data.draw(boxes_in(shape).filter(lambda box: all(lo < hi for lo, hi in zip(*box, strict=True))))
    # First and last byte of each row of the box; blocks between them are touched too.
    starts = np.zeros(1, np.int64)
    for axis, (lo, hi) in enumerate(zip(*box, strict=True)):
        places = np.arange(lo, hi) if axis < len(shape) - 1 else np.array([lo])
        starts = (starts[:, None] * shape[axis] + places).reshape(-1)
    row = box[1][-1] - box[0][-1] if shape else 1
    touched = set()
    for first, last in set(
        zip(
            (starts * itemsize // BLOCK_BYTES).tolist(),
            (((starts + row) * itemsize - 1) // BLOCK_BYTES).tolist(),
            strict=True,
        )
    ):
        touched.update(range(first, last + 1))
    assert blocks_of_box(box, shape, itemsize) == touched


@SETTINGS
@given(st.data(), st.lists(st.integers(0, 5), max_size=3).map(tuple))
def test_intersect_holds_what_both_boxes_hold(data: st.DataObject, shape: tuple[int, ...]):
    boxes = [data.draw(boxes_in(shape)) for _ in range(2)]
    held = []
    for box in boxes:
        mask = np.zeros(shape, bool)
        mask[slices(*box)] = True
        held.append(mask)
    shared = intersect(*boxes)
    mask = np.zeros(shape, bool)
    if shared is not None:
        mask[slices(*shared)] = True
        assert mask.any()
    assert np.array_equal(mask, held[0] & held[1])


# --- cutting shards -------------------------------------------------------------------------------------------


@settings(SETTINGS, max_examples=500)
@given(
    st.lists(st.one_of(st.integers(0, 64), st.sampled_from([97, 1009, 4096, 65_536])), max_size=4).map(tuple),
    st.sampled_from([1, 2, 4, 8, 16]),
    st.integers(1, 64 * MIB),
)
def test_chunks_are_equal_contiguous_parts_of_the_shard_within_the_limit(
    shape: tuple[int, ...], itemsize: int, chunk_bytes_max: int
):
    chunk = cut_shard(shape, itemsize, chunk_bytes_max)
    full = tuple(max(size, 1) for size in shape)
    assert all(size % part == 0 for size, part in zip(full, chunk, strict=True))
    cut = next((axis for axis, part in enumerate(chunk) if part != 1), len(chunk))
    assert chunk[cut + 1 :] == full[cut + 1 :], "chunks are not contiguous in the shard"
    nbytes = math.prod(chunk) * itemsize
    if nbytes > chunk_bytes_max and nbytes > itemsize:
        # Larger only where the next cut would give chunks of less than a sixteenth of the limit.
        smaller = [rows for rows in range(1, chunk[cut]) if full[cut] % rows == 0]
        assert smaller
        assert max(smaller) * (nbytes // chunk[cut]) * 16 < chunk_bytes_max
    if nbytes < math.prod(full) * itemsize and nbytes <= chunk_bytes_max:
        assert nbytes * 16 >= chunk_bytes_max, "chunks are much smaller than the limit"


# --- writing --------------------------------------------------------------------------------------------------

OPTIONS = st.fixed_dictionaries(
    {
        "chunk_bytes_max": st.sampled_from([1, 16, 100, 1000, MIB, 64 * MIB]),
        "pack_bytes_max": st.sampled_from([0, 8, 64, 500, MIB, 4 * MIB]),
        "piece_bytes": st.sampled_from([MIB, 2 * MIB, 8 * MIB]),
    }
)


@pytest.mark.slow
@SOME
@given(st.lists(cases(), max_size=6), OPTIONS)
def test_every_element_is_written_once(written: list[Case], options: dict[str, Any]):
    plan = plan_writes([case.extent for case in written], **options)
    assert plan.nbytes == sum(case.array.nbytes for case in written)
    manifest, objects = simulate_write(written, plan)
    for leaf, case in enumerate(written):
        copy = np.zeros(case.array.nbytes, np.uint8).view(case.array.dtype).reshape(case.array.shape)
        times = np.zeros(case.array.shape, int)
        spec = manifest.spec(leaf)
        for chunk in range(int(manifest.chunk_starts[leaf]), int(manifest.chunk_starts[leaf + 1])):
            index = manifest.chunk_index(leaf, chunk)
            lo = tuple(map(int.__mul__, index, spec.chunk_shape))
            where = slices(lo, tuple(map(int.__add__, lo, spec.chunk_shape)))
            name = ChunkIndex(manifest).place(leaf, chunk).object
            start = int(plan.offset[chunk])
            data = objects[name][start : start + spec.chunk_nbytes]
            copy[where] = np.frombuffer(data, case.array.dtype).reshape(spec.chunk_shape)
            times[where] += 1
        assert copy.tobytes() == case.array.tobytes()
        assert np.all(times == 1)


def test_pieces_that_are_written_at_the_same_time_belong_to_several_objects():
    extent = LeafExtent((1024, MIB), 1, (1024, MIB), (((0, 0), 0),))
    plan = plan_writes([extent], chunk_bytes_max=64 * MIB, pack_bytes_max=0, piece_bytes=8 * MIB)
    objects = [plan.pieces[number].object for number in plan.interleaved]
    for first in range(0, len(objects), 8):
        assert len(set(objects[first : first + 8])) == 8


@st.composite
def extents(draw: st.DrawFn) -> LeafExtent:
    """Leaves from bytes to GiB; nothing of them is ever allocated."""
    rank = draw(st.integers(0, 3))
    shard = tuple(draw(st.sampled_from([1, 2, 3, 64, 700, 4096])) for _ in range(rank))
    grid = tuple(draw(st.sampled_from([1, 2])) for _ in range(rank))
    shape = tuple(map(int.__mul__, shard, grid))
    corners = [lo for lo, _ in grid_boxes(shape, grid)]
    owners = tuple((corner, number) for number, corner in enumerate(corners))
    return LeafExtent(shape, draw(st.sampled_from([1, 2, 4])), shard, owners)


@SETTINGS
@given(st.lists(extents(), max_size=4), st.integers(0, 40), st.sampled_from([64 * 1024, MIB, 4 * MIB]))
def test_objects_of_any_size_are_tiled_by_aligned_pieces(
    leaves: list[LeafExtent], copies: int, pack_bytes_max: int
):
    several = [LeafExtent((1000, 1000), 2, (1000, 1000), (((0, 0), 0),))] * copies
    piece_bytes = 8 * MIB
    plan = plan_writes(
        [*leaves, *several], chunk_bytes_max=64 * MIB, pack_bytes_max=pack_bytes_max, piece_bytes=piece_bytes
    )
    ends = [0] * len(plan.objects)
    for piece in plan.pieces:
        assert piece.offset == ends[piece.object], "a hole or an overlap"
        assert piece.offset % PIECE_ALIGNMENT == 0
        assert 0 < piece.length <= piece_bytes
        assert sum(segment.stored for segment in piece.segments) == piece.length
        ends[piece.object] += piece.length
    assert ends == [entry.length for entry in plan.objects]
    assert list(plan.packs) == [entry.length for entry in plan.objects if entry.leaf is None]
    is_packed = plan.pack != OWN_OBJECT
    assert np.all(plan.offset[is_packed] % PACK_ALIGNMENT == 0)
    for number, length in enumerate(plan.packs):
        rows = np.flatnonzero(plan.pack == number)
        order = rows[np.argsort(plan.offset[rows])]
        stops = (plan.offset + plan.length)[order]
        assert plan.offset[order].tolist() == [0, *stops[:-1].tolist()]
        assert stops[-1] == length
    order = plan.interleaved
    assert sorted(order) == list(range(len(plan.pieces)))
    ends = [0] * len(plan.objects)
    for number in order:
        piece = plan.pieces[number]
        assert piece.offset >= ends[piece.object], "an object does not grow from its start"
        ends[piece.object] = piece.offset + piece.length
    # Every byte of every shard is in one segment, and blocks of a chunk are not torn apart.
    seen: dict[tuple[int, int], int] = {}
    for piece in plan.pieces:
        for segment in piece.segments:
            seen[segment.leaf, segment.shard] = (
                seen.get((segment.leaf, segment.shard), 0) + segment.hi - segment.lo
            )
            assert segment.block * BLOCK_BYTES % piece_bytes == 0
    for (leaf, _), nbytes in seen.items():
        extent = [*leaves, *several][leaf]
        assert nbytes == math.prod(extent.shard_shape) * extent.itemsize


# --- reading --------------------------------------------------------------------------------------------------


def check_read_plan(manifest: Manifest, plan: ReadPlan) -> None:
    """Each block is in at most one part, and each element of each destination comes from exactly one chunk."""
    blocks = [
        (part.chunk, block)
        for unit in plan.units
        for part in unit.parts
        for block in range(part.run.first_block, part.run.first_block + part.run.block_count)
    ]
    assert len(set(blocks)) == len(blocks), "a block is read twice"
    counts = {
        id(destination): np.zeros([hi - lo for lo, hi in zip(*destination.box, strict=True)], int)
        for destination in plan.destinations
    }
    regions = {
        (part.chunk, id(destination)): (destination, region)
        for unit in plan.units
        for part in unit.parts
        for destination, region in part.targets
    }
    for destination, region in regions.values():
        shifted = [tuple(a - b for a, b in zip(end, destination.box[0], strict=True)) for end in region]
        counts[id(destination)][slices(*shifted)] += 1
    for count in counts.values():
        assert np.all(count == 1), "an element comes from no chunk, or from several"


def read_all(manifest: Manifest, objects: dict[str, bytearray], plan: ReadPlan) -> MemoryStore:
    store = MemoryStore(objects)
    executor = ReadExecutor(store, manifest, threads=2)
    executor.check_objects(plan)
    executor.read(plan)
    executor.raise_problems("read")
    assert executor.bytes_read == plan.nbytes == sum(int(reads.sum()) for reads in store.reads.values())
    return store


def check_destinations(written: list[Case], plan: ReadPlan) -> None:
    for destination in plan.destinations:
        want = written[destination.leaf].array[slices(*destination.box)]
        got = b"" if destination.buffer is None else destination.buffer.tobytes()
        assert got == np.ascontiguousarray(want).tobytes()
        if destination.buffer is not None and destination.nbytes:
            assert destination.buffer.ctypes.data % 64 == 0, "XLA would copy it"


UNIT_BYTES = st.sampled_from([1, MIB, 8 * MIB])


@pytest.mark.slow
@SOME
@given(st.data(), st.lists(cases(), min_size=1, max_size=5), OPTIONS, UNIT_BYTES)
def test_from_any_sharding_to_any_other_every_element_is_read_once(
    data: st.DataObject, written: list[Case], options: dict[str, Any], unit_bytes: int
):
    manifest, objects = simulate_write(written, plan_writes([case.extent for case in written], **options))
    wanted = []
    for leaf, case in enumerate(written):
        grid = data.draw(divisor_grids(case.array.shape))
        wanted.append((leaf, list(dict.fromkeys(grid_boxes(case.array.shape, grid)))))
    plan = plan_reads(ChunkIndex(manifest), wanted, unit_bytes)
    check_read_plan(manifest, plan)
    store = read_all(manifest, objects, plan)
    check_destinations(written, plan)
    assert all(np.all(reads == 1) for reads in store.reads.values()), "a stored byte is not read once"


@pytest.mark.slow
@FEW
@given(
    st.data(), large_cases(), OPTIONS.filter(lambda options: options["chunk_bytes_max"] > 1000), UNIT_BYTES
)
def test_large_arrays_are_read_once_too(
    data: st.DataObject, case: Case, options: dict[str, Any], unit_bytes: int
):
    manifest, objects = simulate_write([case], plan_writes([case.extent], **options))
    grid = data.draw(divisor_grids(case.array.shape))
    plan = plan_reads(ChunkIndex(manifest), [(0, grid_boxes(case.array.shape, grid))], unit_bytes)
    check_read_plan(manifest, plan)
    store = read_all(manifest, objects, plan)
    check_destinations([case], plan)
    assert all(np.all(reads == 1) for reads in store.reads.values())


@pytest.mark.slow
@SOME
@given(st.data(), cases(has_empty=False), OPTIONS, UNIT_BYTES)
def test_boxes_of_any_kind_are_filled(
    data: st.DataObject, case: Case, options: dict[str, Any], unit_bytes: int
):
    manifest, objects = simulate_write([case], plan_writes([case.extent], **options))
    boxes = data.draw(st.lists(boxes_in(case.array.shape), min_size=1, max_size=4))
    plan = plan_reads(ChunkIndex(manifest), [(0, boxes)], unit_bytes)
    check_read_plan(manifest, plan)
    store = read_all(manifest, objects, plan)
    check_destinations([case], plan)
    assert all(np.all(reads <= 1) for reads in store.reads.values())


@FEW
@given(
    st.data(), large_cases(), OPTIONS.filter(lambda options: options["chunk_bytes_max"] > 1000), UNIT_BYTES
)
def test_a_part_of_a_large_array_needs_the_blocks_that_hold_it_only(
    data: st.DataObject, case: Case, options: dict[str, Any], unit_bytes: int
):
    manifest, objects = simulate_write([case], plan_writes([case.extent], **options))
    box = data.draw(boxes_in(case.array.shape))
    plan = plan_reads(ChunkIndex(manifest), [(0, [box])], unit_bytes)
    store = read_all(manifest, objects, plan)
    check_destinations([case], plan)
    spec = manifest.spec(0)
    touched = np.zeros(case.array.shape, bool)
    touched[slices(*box)] = True
    for chunk in range(spec.chunk_count):
        lo = tuple(map(int.__mul__, manifest.chunk_index(0, chunk), spec.chunk_shape))
        bits = touched[slices(lo, tuple(map(int.__add__, lo, spec.chunk_shape)))].reshape(-1)
        per_block = BLOCK_BYTES // case.array.itemsize
        name = ChunkIndex(manifest).place(0, chunk).object
        start, length = int(manifest.chunks.offset[chunk]), int(manifest.chunks.length[chunk])
        reads = store.reads[name][start : start + length]
        for block in range(-(-length // BLOCK_BYTES)):
            is_needed = bool(bits[block * per_block : (block + 1) * per_block].any())
            assert np.all(reads[block * BLOCK_BYTES : (block + 1) * BLOCK_BYTES] == is_needed)


@pytest.mark.parametrize("unit_bytes", [1, 8 * MIB])
def test_blocks_between_the_rows_of_a_box_are_not_read(unit_bytes: int):
    case = Case(make_array((4, 800_000), "float32", 1), (1, 1))
    options = {"chunk_bytes_max": 64 * MIB, "pack_bytes_max": MIB, "piece_bytes": 8 * MIB}
    manifest, objects = simulate_write([case], plan_writes([case.extent], **options))
    plan = plan_reads(ChunkIndex(manifest), [(0, [((0, 10), (3, 20))])], unit_bytes)
    read_all(manifest, objects, plan)
    check_destinations([case], plan)
    assert plan.nbytes == 3 * BLOCK_BYTES


# --- meshes ---------------------------------------------------------------------------------------------------


@settings(SETTINGS, max_examples=500)
@given(st.lists(st.integers(1, 24), max_size=4), st.integers(1, 40))
def test_axes_shrink_to_divisors_the_first_axis_first_and_no_more_than_they_must(
    sizes: list[int], devices: int
):
    shrunk = shrink_axes(sizes, devices)
    assert math.prod(shrunk) <= devices
    assert all(size % small == 0 for size, small in zip(sizes, shrunk, strict=True))
    changed = [axis for axis, size in enumerate(sizes) if shrunk[axis] != size]
    if not changed:
        assert shrunk == sizes
        return
    last = changed[-1]
    assert all(size == 1 for size in shrunk[:last]), "a later axis shrank before an earlier one was used up"
    for size in range(shrunk[last] + 1, sizes[last] + 1):
        if sizes[last] % size == 0:
            assert math.prod(shrunk) // shrunk[last] * size > devices, "it could have stayed larger"


@pytest.mark.parametrize(
    ("sizes", "devices", "shrunk"),
    [
        ([4, 2], 8, [4, 2]),
        ([4, 2], 6, [2, 2]),
        ([4, 2], 3, [1, 2]),
        ([4, 2], 1, [1, 1]),
        ([8], 6, [4]),
        ([2, 2, 2], 4, [1, 2, 2]),
        ([6, 4], 9, [2, 4]),
        ([], 3, []),
    ],
)
def test_axes_shrink_as_documented(sizes: list[int], devices: int, shrunk: list[int]):
    assert shrink_axes(sizes, devices) == shrunk
