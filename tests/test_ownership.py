"""Every chunk of a tree is written by one process that holds it, all processes write equally much, and quickly planned.

`map_shards` is compared with what JAX says of each device, and the plan with the geometry of the boxes and with a naive
count of bytes. Devices of other processes are plain objects: a mesh takes them.
"""

from __future__ import annotations

import dataclasses
import math
import time
import tracemalloc
from typing import Any, final

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings, strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P, Sharding, SingleDeviceSharding

from jaxckpt._config import MIB
from jaxckpt._layout import LeafExtent, Share
from jaxckpt._ownership import _deal, share_writes
from jaxckpt._shardings import ShardMap, box_of, map_shards

from .helpers import make_mesh

SETTINGS = settings(
    max_examples=200, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None
)

KIB = 1 << 10


@dataclasses.dataclass(frozen=True)
class FakeDevice:
    """A device of any process."""

    id: int
    process_index: int
    # What a mesh of jax 0.12 asks of its devices.
    platform: str = "cpu"
    device_kind: str = "cpu"


def fake_mesh(axes: dict[str, int], devices_per_process: int) -> Mesh:
    """A mesh over consecutive devices of consecutive processes."""
    count = math.prod(axes.values())
    devices = [FakeDevice(number, number // devices_per_process) for number in range(count)]
    return Mesh(np.array(devices, object).reshape(tuple(axes.values())), tuple(axes))


@final
class OpaqueSharding(Sharding):
    """The same shards as another sharding has, but nobody can see how they come about."""

    def __init__(self, sharding: Sharding) -> None:
        self._sharding = sharding

    @property
    def device_set(self) -> set[Any]:
        return self._sharding.device_set

    def shard_shape(self, global_shape: tuple[int, ...]) -> tuple[int, ...]:
        return self._sharding.shard_shape(global_shape)

    def devices_indices_map(self, global_shape: tuple[int, ...]) -> Any:
        return self._sharding.devices_indices_map(global_shape)


# --- map_shards -----------------------------------------------------------------------------------------------


@st.composite
def named_cases(draw: Any) -> tuple[NamedSharding, tuple[int, ...]]:
    """A mesh over some devices in any order, a spec that uses some of its axes in any order, and a shape."""
    sizes: list[int] = []
    for size in draw(st.lists(st.sampled_from((1, 2, 2, 3, 4, 5)), min_size=1, max_size=4)):
        if math.prod(sizes) * size <= 16:
            sizes.append(size)
    names = tuple("abcd"[: len(sizes)])
    numbers = draw(st.permutations(range(16)))[: math.prod(sizes)]
    mesh = Mesh(np.array(jax.devices(), object)[numbers].reshape(sizes), names)
    rank = draw(st.integers(0, 4))
    entries: list[list[str]] = [[] for _ in range(rank)]
    for name in draw(st.permutations(names)):
        axis = draw(st.integers(-1, rank - 1))
        if axis >= 0:
            entries[axis].append(name)
    shape = tuple(
        draw(st.sampled_from((0, 1, 2, 3))) * math.prod(mesh.shape[name] for name in entry)
        for entry in entries
    )
    spec: list[Any] = []
    for entry in entries:
        one = entry[0] if len(entry) == 1 else tuple(entry) or draw(st.sampled_from((None, P.UNCONSTRAINED)))
        spec.append(one)
    while spec and spec[-1] is None and draw(st.booleans()):
        spec.pop()
    return NamedSharding(mesh, P(*spec)), shape


def assert_is_what_jax_says(shards: ShardMap, sharding: Sharding, shape: tuple[int, ...]) -> None:
    indices = sharding.devices_indices_map(shape)
    assert shards.shard_shape == sharding.shard_shape(shape)
    assert shards.grid == tuple(
        size // part if part else 1 for size, part in zip(shape, shards.shard_shape, strict=True)
    )
    assert shards.shards.shape == shards.processes.shape == (len(indices),)
    assert (shards.shards.dtype, shards.processes.dtype) == (np.int64, np.int32)
    assert set(shards.shards.tolist()) == set(range(math.prod(shards.grid)))
    for number, device_shard in enumerate(zip(indices, shards.shards.tolist(), strict=True)):
        device, shard = device_shard
        place = np.unravel_index(shard, shards.grid) if shards.grid else ()
        lo = tuple(int(at) * part for at, part in zip(place, shards.shard_shape, strict=True))
        hi = tuple(at + part for at, part in zip(lo, shards.shard_shape, strict=True))
        assert box_of(indices[device], shape) == (lo, hi)
        assert shards.processes[number] == device.process_index


@SETTINGS
@given(named_cases())
def test_a_named_sharding_is_mapped_as_jax_maps_it(case: tuple[NamedSharding, tuple[int, ...]]):
    sharding, shape = case
    assert list(sharding.devices_indices_map(shape)) == list(sharding.mesh.devices.flat)
    assert_is_what_jax_says(map_shards(sharding, shape), sharding, shape)


@SETTINGS
@given(named_cases())
def test_a_sharding_without_names_is_mapped_device_by_device(case: tuple[NamedSharding, tuple[int, ...]]):
    sharding, shape = case
    opaque = OpaqueSharding(sharding)
    shards = map_shards(opaque, shape)
    assert_is_what_jax_says(shards, opaque, shape)
    assert shards.shards.tolist() == map_shards(sharding, shape).shards.tolist()


def test_a_single_device_has_the_only_shard():
    sharding = SingleDeviceSharding(jax.devices()[3])
    for shape in ((), (4, 6), (0,)):
        shards = map_shards(sharding, shape)
        assert_is_what_jax_says(shards, sharding, shape)
        assert shards.shards.tolist() == [0]


def test_the_processes_are_those_of_the_devices_in_the_order_of_the_mesh():
    mesh = fake_mesh({"a": 4, "b": 2}, 2)
    turned = Mesh(mesh.devices[::-1], mesh.axis_names)
    assert map_shards(NamedSharding(mesh, P("a")), (4,)).processes.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert map_shards(NamedSharding(turned, P("a")), (4,)).processes.tolist() == [3, 3, 2, 2, 1, 1, 0, 0]


def test_maps_with_one_spec_share_their_arrays_and_nobody_can_change_them():
    mesh = make_mesh({"a": 4, "b": 2})
    one = map_shards(NamedSharding(mesh, P("a", "b")), (4, 2))
    other = map_shards(NamedSharding(mesh, P("a", "b", None)), (8, 6, 5))
    assert one.shards is other.shards
    assert one.processes is other.processes
    assert not one.shards.flags.writeable
    assert not one.processes.flags.writeable


# --- what a plan must be --------------------------------------------------------------------------------------


def leaf_of(shape: tuple[int, ...], itemsize: int, shards: ShardMap | None) -> LeafExtent:
    """A leaf, as far as sharing its writing needs to know it."""
    shard_shape = shape if shards is None else shards.shard_shape
    return LeafExtent(shape, itemsize, shard_shape, (), shards)


def holders_of_shards(leaf: LeafExtent) -> dict[tuple[int, ...], set[int]]:
    """The processes that hold the shard at each place of the stored form's grid of shards."""
    if leaf.shards is None:
        return {(0,) * len(leaf.shape): {0}}
    tail = (0,) * (len(leaf.shape) - len(leaf.shards.grid))
    holders: dict[tuple[int, ...], set[int]] = {}
    for shard, process in zip(leaf.shards.shards.tolist(), leaf.shards.processes.tolist(), strict=True):
        place = np.unravel_index(shard, leaf.shards.grid) if leaf.shards.grid else ()
        holders.setdefault((*map(int, place), *tail), set()).add(process)
    return holders


def assert_is_written_once_by_a_holder(leaf: LeafExtent, share: Share) -> None:
    assert share.owners.dtype == np.uint32
    assert share.owners.ndim == 1
    assert not share.owners.flags.writeable
    if 0 in leaf.shape:
        assert share.owners.size == 0
        return
    shard_shape = () if leaf.shards is None else leaf.shards.shard_shape
    shard_shape += leaf.shape[len(shard_shape) :]
    assert all(part % size == 0 for part, size in zip(shard_shape, share.chunk_shape, strict=True))
    grid = tuple(size // part for size, part in zip(leaf.shape, share.chunk_shape, strict=True))
    holders = holders_of_shards(leaf)
    owners = share.owners.tolist()
    assert len(owners) == math.prod(grid)
    for index, owner in zip(np.ndindex(grid), owners, strict=True):
        lo = [place * size for place, size in zip(index, share.chunk_shape, strict=True)]
        shard = tuple(at // size for at, size in zip(lo, shard_shape, strict=True))
        assert owner in holders[shard]


def loads_of(leaves: list[LeafExtent], shares: list[Share | None], process_count: int) -> list[int]:
    """Bytes that each process writes."""
    loads = [0] * process_count
    for leaf, share in zip(leaves, shares, strict=True):
        assert share is not None
        for owner in share.owners.tolist():
            loads[owner] += math.prod(share.chunk_shape) * leaf.itemsize
    assert sum(loads) == sum(math.prod(leaf.shape) * leaf.itemsize for leaf in leaves)
    return loads


@st.composite
def any_shards(draw: Any, process_count: int) -> tuple[ShardMap, tuple[int, ...]]:
    """A map in which any processes hold any shards, as no mesh would have it, and the shape of the array."""
    rank = draw(st.integers(0, 3))
    grid = tuple(draw(st.integers(1, 3)) for _ in range(rank))
    shard_shape = tuple(draw(st.sampled_from((1, 2, 3, 4, 6, 7))) for _ in range(rank))
    count = math.prod(grid)
    held = [*range(count), *draw(st.lists(st.integers(0, count - 1), max_size=12))]
    shards = np.array(draw(st.permutations(held)), np.int64)
    holder = st.integers(0, process_count - 1)
    processes = np.array(draw(st.lists(holder, min_size=len(held), max_size=len(held))), np.int32)
    shape = tuple(parts * size for parts, size in zip(grid, shard_shape, strict=True))
    return ShardMap(shard_shape, grid, shards, processes), shape


@st.composite
def trees(draw: Any) -> tuple[list[LeafExtent | None], int]:
    """Leaves of every kind, and the number of processes."""
    process_count = draw(st.integers(1, 6))
    mesh = fake_mesh({"data": process_count, "model": 4}, draw(st.sampled_from((1, 2, 4))))
    process_count = 1 + max(device.process_index for device in mesh.devices.flat)
    leaves: list[LeafExtent | None] = []
    for kind in draw(st.lists(st.sampled_from(("any", "named", "host", "empty", "value")), max_size=8)):
        itemsize = draw(st.sampled_from((1, 2, 8)))
        if kind == "value":
            leaves.append(None)
        elif kind == "empty":
            leaves.append(leaf_of((4, 0), itemsize, map_shards(NamedSharding(mesh, P("model")), (4, 0))))
        elif kind == "host":
            leaves.append(leaf_of((draw(st.integers(0, 9)), 3), itemsize, None))
        else:
            if kind == "any":
                shards, shape = draw(any_shards(process_count))
            else:
                spec = draw(
                    st.sampled_from((P(), P("data"), P("model"), P(None, "data"), P("model", "data")))
                )
                shape = (mesh.shape["data"] * 4 * draw(st.integers(1, 3)),) * 2
                shards = map_shards(NamedSharding(mesh, spec), shape)
            stored_axis = draw(st.sampled_from(((), (5,))))
            leaves.append(leaf_of(shape + stored_axis, itemsize, shards))
    return leaves, process_count


@pytest.mark.slow
@SETTINGS
@given(trees(), st.sampled_from((1, 16, 64, 10**6)), st.sampled_from((1, 8, 40, 10**6)))
def test_every_chunk_is_written_once_by_a_process_that_holds_it(
    tree: tuple[list[LeafExtent | None], int], chunk_bytes_max: int, split_bytes_min: int
):
    leaves, process_count = tree
    shares = share_writes(
        leaves, process_count, chunk_bytes_max=chunk_bytes_max, split_bytes_min=split_bytes_min
    )
    assert len(shares) == len(leaves)
    for leaf, share in zip(leaves, shares, strict=True):
        assert (leaf is None) == (share is None)
        if leaf is not None and share is not None:
            assert_is_written_once_by_a_holder(leaf, share)


@SETTINGS
@given(trees())
def test_the_same_input_gives_the_same_plan(tree: tuple[list[LeafExtent | None], int]):
    leaves, process_count = tree
    # Equal leaves that share no objects, as those of another process are.
    others = [
        leaf
        if leaf is None or leaf.shards is None
        else dataclasses.replace(
            leaf,
            shards=dataclasses.replace(
                leaf.shards, shards=leaf.shards.shards.copy(), processes=leaf.shards.processes.copy()
            ),
        )
        for leaf in leaves
    ]
    plans = [
        share_writes(tree, process_count, chunk_bytes_max=64, split_bytes_min=8) for tree in (leaves, others)
    ]
    for one, other in zip(*plans, strict=True):
        if one is not None and other is not None:
            assert one.chunk_shape == other.chunk_shape
            assert one.owners.tolist() == other.owners.tolist()


@SETTINGS
@given(
    st.lists(
        st.tuples(st.lists(st.integers(0, 60), min_size=3, max_size=3), st.integers(0, 20)),
        min_size=1,
        max_size=4,
    ),
    st.integers(1, 12),
)
@example([([0, 2**62, 5], 7)], 1)
def test_dealing_is_giving_one_item_after_the_other_to_the_least_loaded(rows: Any, nbytes: int):
    dealt = _deal(np.array([loads for loads, _ in rows]), np.array([count for _, count in rows]), nbytes)
    for (loads, count), counts in zip(rows, dealt.tolist(), strict=True):
        expected = [0] * len(loads)
        for _ in range(count):
            now = [load + got * nbytes for load, got in zip(loads, expected, strict=True)]
            expected[now.index(min(now))] += 1
        assert counts == expected


# --- balance --------------------------------------------------------------------------------------------------


def named_leaf(mesh: Mesh, spec: P, shape: tuple[int, ...]) -> LeafExtent:
    return leaf_of(shape, 4, map_shards(NamedSharding(mesh, spec), shape))


def plan(leaves: list[LeafExtent], process_count: int) -> list[Share | None]:
    return share_writes(leaves, process_count, chunk_bytes_max=64 * MIB, split_bytes_min=256 * KIB)


def balance_of(leaves: list[LeafExtent], process_count: int) -> float:
    """Bytes that the busiest process writes, over the average of all."""
    shares = plan(leaves, process_count)
    for leaf, share in zip(leaves, shares, strict=True):
        assert share is not None
        assert_is_written_once_by_a_holder(leaf, share)
    loads = loads_of(leaves, shares, process_count)
    return max(loads) * process_count / sum(loads)


@pytest.mark.parametrize("process_count", [1, 2, 3, 4, 5, 7, 8])
@pytest.mark.parametrize("shape", [(2 * MIB,), (2048, 1024), (1, 2 * MIB), (1000, 2000), (3, 5, 7, 16384)])
def test_one_large_replicated_leaf_is_written_by_all(process_count: int, shape: tuple[int, ...]):
    leaf = named_leaf(fake_mesh({"data": process_count}, 1), P(), shape)
    assert balance_of([leaf], process_count) <= 1.2


@pytest.mark.parametrize("process_count", [2, 4, 8])
def test_many_small_replicated_leaves_are_written_by_all(process_count: int):
    mesh = fake_mesh({"data": process_count, "model": 2}, 2)
    leaves = [named_leaf(mesh, P(), (1 + number * 37 % 500, 1 + number * 11 % 60)) for number in range(100)]
    assert balance_of(leaves, process_count) <= 1.05


@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize("process_count", [2, 4, 8])
@pytest.mark.parametrize("spec", [P("data"), P("model"), P(None, "model"), P(("model", "data")), P()])
def test_partly_replicated_leaves_are_written_by_all(process_count: int, devices: int, spec: P):
    mesh = fake_mesh({"data": process_count * devices // 2, "model": 2}, devices)
    one = named_leaf(mesh, spec, (2048, 1024))
    many = [named_leaf(mesh, spec, (16 * (1 + number * 7 % 13), 64 + 2 * number)) for number in range(100)]
    assert balance_of([one], process_count) <= 1.2
    assert balance_of(many, process_count) <= 1.2
    assert balance_of([one, *many], process_count) <= 1.2


@pytest.mark.parametrize("process_count", [2, 4, 8])
def test_the_others_write_more_of_the_replicas_when_process_0_has_much_of_its_own(process_count: int):
    mesh = fake_mesh({"data": process_count, "model": 2}, 2)
    host = leaf_of((MIB // 4,), 4, None)
    replicated = [named_leaf(mesh, P(), (64, 256 + number)) for number in range(24 * process_count)]
    sharded = [named_leaf(mesh, P("data"), (process_count * 32, 256)) for _ in range(10)]
    leaves = [*replicated, host, *sharded]
    assert balance_of(leaves, process_count) <= 1.2
    assert balance_of(leaves[::-1], process_count) <= 1.2


def test_replicas_fill_up_what_shards_of_some_processes_leave():
    """Large replicated leaves come after the smaller ones that only half of the processes hold."""
    mesh = fake_mesh({"data": 8}, 1)
    half = Mesh(mesh.devices[:4], ("data",))
    leaves = [named_leaf(mesh, P(), (8, 256 * KIB // 4))]
    leaves += [named_leaf(half, P(), (128 * KIB // 4,)) for _ in range(16)]
    assert balance_of(leaves, 8) <= 1.01


def test_sets_of_processes_that_overlap_are_balanced_too():
    """Shard n is held by the processes n and n + 1, and the last one by the last process and process 0."""
    count = 9
    shards = np.repeat(np.arange(count, dtype=np.int64), 2)
    processes = np.stack([np.arange(count), np.arange(1, count + 1) % count], axis=1).reshape(-1)
    ring = ShardMap((1024,), (count,), shards, processes.astype(np.int32))
    assert balance_of([leaf_of((count * 1024,), 4, ring)], count) == 1.0


def test_shards_that_are_held_by_different_numbers_of_processes_are_each_shared_by_their_own():
    shards = ShardMap((6, 256 * KIB), (2, 1), np.array([0, 0, 0, 1, 1]), np.arange(5, dtype=np.int32))
    leaf = leaf_of((12, 256 * KIB), 4, shards)
    assert loads_of([leaf], plan([leaf], 5), 5) == [2 * MIB, 2 * MIB, 2 * MIB, 3 * MIB, 3 * MIB]


def test_only_processes_that_hold_an_array_write_it():
    mesh = fake_mesh({"data": 8}, 1)
    leaf = named_leaf(Mesh(mesh.devices[[2, 5, 6]], ("data",)), P(), (12, 64 * KIB))
    loads = loads_of([leaf], plan([leaf], 8), 8)
    assert [process for process, load in enumerate(loads) if load] == [2, 5, 6]
    assert max(loads) * 3 <= 1.2 * sum(loads)


# --- cuts -----------------------------------------------------------------------------------------------------


def chunk_bytes_of(leaf: LeafExtent, share: Share | None) -> int:
    assert share is not None
    return math.prod(share.chunk_shape) * leaf.itemsize


def test_shards_that_one_process_holds_are_cut_as_if_it_were_alone():
    mesh = fake_mesh({"data": 4, "model": 2}, 2)
    leaf = named_leaf(mesh, P("data"), (32768, 1024))
    (share,) = plan([leaf], 4)
    assert chunk_bytes_of(leaf, share) == 32 * MIB


def test_small_shards_are_cut_where_a_sharding_over_more_devices_divides_them():
    mesh = fake_mesh({"data": 4}, 1)
    leaves = [named_leaf(mesh, P("data"), (4 * rows, 1024)) for rows in (2048, 100, 101, 40)]
    leaves.append(named_leaf(mesh, P(None, "data"), (64, 65536)))
    shares = plan(leaves, 4)
    assert [share.chunk_shape[0] for share in shares if share is not None] == [256, 50, 101, 40, 64]


def test_a_replicated_shard_is_cut_no_finer_than_allowed():
    mesh = fake_mesh({"data": 64}, 1)
    large = named_leaf(mesh, P(), (1024, 1024))
    small = named_leaf(mesh, P(), (126, 1024))
    shares = plan([large, small], 64)
    assert chunk_bytes_of(large, shares[0]) == 256 * KIB
    # Less than twice the bytes that a part must have.
    assert chunk_bytes_of(small, shares[1]) == 126 * 4 * KIB


def test_a_replicated_shard_is_not_cut_where_there_are_enough_others():
    mesh = fake_mesh({"data": 4}, 1)
    leaves = [named_leaf(mesh, P(), (1024, 1024)) for _ in range(64)]
    shares = plan(leaves, 4)
    assert {chunk_bytes_of(leaf, share) for leaf, share in zip(leaves, shares, strict=True)} == {4 * MIB}
    assert balance_of(leaves, 4) == 1.0


def test_no_chunk_is_larger_than_the_limit_of_all_chunks():
    mesh = fake_mesh({"data": 2}, 1)
    leaf = named_leaf(mesh, P(), (1024, 1024, 1024))
    (share,) = plan([leaf], 2)
    assert chunk_bytes_of(leaf, share) == 64 * MIB


def test_a_process_writes_runs_of_neighbouring_chunks():
    (share,) = plan([named_leaf(fake_mesh({"data": 4}, 1), P(), (4096, 1024))], 4)
    assert share is not None
    owners = share.owners.tolist()
    assert len(owners) == 32
    assert owners == sorted(owners)


def test_leaves_without_replicas_that_are_cut_alike_have_one_array_of_owners():
    mesh = fake_mesh({"data": 4, "model": 2}, 2)
    leaves = [
        named_leaf(mesh, P("data"), (8, 6)),
        named_leaf(mesh, P("data"), (64, 5)),
        named_leaf(mesh, P("data"), (8,)),
        leaf_of((3,), 4, None),
        leaf_of((700,), 8, None),
    ]
    owners = [share.owners for share in plan(leaves, 4) if share is not None]
    assert owners[0] is owners[1]
    assert owners[3] is owners[4]
    assert owners[0].tolist() == owners[2].tolist() == [0, 1, 2, 3]
    assert owners[3].tolist() == [0]


# --- scale ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", [P(("replica", "shard")), P("shard"), P()])
def test_a_thousand_leaves_on_16384_devices_are_planned_quickly_in_little_memory(spec: P):
    """In a few tenths of a second and some MiB; the limits leave room for slow and busy machines."""
    mesh = fake_mesh({"replica": 16, "shard": 1024}, 4)
    shapes = [(16384 * (1 + number % 3), 1 + number) for number in range(1000)]
    tracemalloc.start()
    try:
        began_s = time.perf_counter()
        leaves = [named_leaf(mesh, spec, shape) for shape in shapes]
        shares = share_writes(leaves, 4096, chunk_bytes_max=64 * MIB, split_bytes_min=4 * MIB)
        seconds = time.perf_counter() - began_s
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert all(share is not None for share in shares)
    assert seconds < 10
    assert peak < 100 * MIB
