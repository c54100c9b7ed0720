"""A snapshot that training cannot disturb (requirements 12 and 13).

Each step adds one to every leaf and donates the state, so that the values of a checkpoint say to which moment they
belong. Several steps are in flight while saves are taken, through all ways: ``"pool"``, which copies on the host, and
``"pinned"`` and ``"device"``, the ways of accelerators, which the CPU backend has too. The negative controls show that
the obvious ways to take a snapshot do fail here.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import gc
import os
import pathlib
import threading
import weakref
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

import jaxckpt
from jaxckpt._layout import LeafExtent, contiguous_runs, plan_writes
from jaxckpt._leaves import inspect_leaves
from jaxckpt._planning import plan_save
from jaxckpt._snapshot import take_snapshot
from jaxckpt._staging import DEVICE_MEMORY, HOST_MEMORY, PINNED_MEMORY
from jaxckpt._storage import allocate_aligned
from jaxckpt._store import Kernel, LocalStore
from jaxckpt._viewing import cut

from .helpers import assert_same_tree, make_mesh
from .storage_faults import RefusingKernel
from .test_commit import WatchedStore

pytestmark = pytest.mark.slow

MIB = 1 << 20
WAYS = ("pool", "pinned", "device")
# The pinned way has half of the cap for transfers: of 2 MiB, that is less than some leaves have.
CAPS = (None, 2 * MIB, 3 * MIB)
DTYPES = ("float32", "bfloat16", "int32", "float8_e4m3fn", "int4", "uint8")


def mesh_of(axis_type: AxisType, devices: int = 4) -> Mesh:
    return Mesh(np.array(jax.devices()[:devices]), ("x",), axis_types=(axis_type,))


def make_state(mesh: Mesh, rows: int = 192) -> dict[str, jax.Array]:
    """Zeros of several dtypes: cut by rows, by columns, replicated."""
    specs = [PartitionSpec("x"), PartitionSpec(None, "x"), PartitionSpec()]
    return {
        f"{dtype}-{number}": jax.device_put(jnp.zeros((rows, 512), dtype), NamedSharding(mesh, spec))
        for dtype in DTYPES
        for number, spec in enumerate(specs)
    }


@jax.jit
def zeros_like(state: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return jax.tree.map(jnp.zeros_like, state)


@functools.partial(jax.jit, donate_argnums=0)
def add_one(state: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return {key: (leaf.astype(jnp.float32) + 1).astype(leaf.dtype) for key, leaf in state.items()}


@jax.jit
def minus_two(state: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return {key: (leaf.astype(jnp.float32) - 2).astype(leaf.dtype) for key, leaf in state.items()}


@functools.partial(jax.jit, donate_argnums=0)
def add_one_slowly(state: dict[str, jax.Array], matrix: jax.Array, rounds: int) -> dict[str, jax.Array]:
    """As `add_one`, after a computation that takes some tenths of a second with 20 rounds."""
    matrix = jax.lax.fori_loop(0, rounds, lambda _, product: jnp.tanh(product @ product), matrix)
    zero = 0 * matrix[0, 0]
    return {key: (leaf.astype(jnp.float32) + 1 + zero).astype(leaf.dtype) for key, leaf in state.items()}


def values_in(tree: Any) -> set[float]:
    """The least and the largest value of each leaf: a single one if all are equal."""
    arrays = [np.asarray(leaf, np.float32) for leaf in jax.tree.leaves(tree)]
    return {float(value) for array in arrays for value in (array.min(), array.max())}


def assert_memory_is_given_back() -> None:
    assert HOST_MEMORY.bytes_in_use == 0
    assert PINNED_MEMORY.bytes_in_use == 0
    assert DEVICE_MEMORY.bytes_in_use == 0


# --- donated --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("context", "host_bytes_max"),
    [(None, 2 * MIB), (None, 3 * MIB), (AxisType.Auto, 2 * MIB), (AxisType.Explicit, None)],
)
@pytest.mark.parametrize("staging", WAYS)
def test_donating_steps_in_flight_do_not_disturb_it(
    tmp_path: pathlib.Path, staging: Any, host_bytes_max: int | None, context: AxisType | None
) -> None:
    options = jaxckpt.SaveOptions(staging=staging, host_bytes_max=host_bytes_max)
    mesh = mesh_of(context or AxisType.Auto)
    saves = []
    with jax.set_mesh(mesh) if context is not None else contextlib.nullcontext():
        state = make_state(mesh)
        for step in range(1, 5):
            state = add_one(state)
            if step % 2:
                saves.append((step, jaxckpt.save_async(tmp_path / str(step), state, options=options)))
            before = state
            state = add_one(state)
            state = add_one(state)
            assert all(leaf.is_deleted() for leaf in before.values()), "the step did not donate"
            state = minus_two(state)
    for step, save in saves:
        save.wait(60)
        assert values_in(jaxckpt.restore(tmp_path / str(step))) == {float(step)}
    assert_memory_is_given_back()


@pytest.mark.parametrize("host_bytes_max", [2 * MIB, 64 * MIB])
@pytest.mark.parametrize("staging", WAYS)
def test_leaves_of_many_sizes_and_cuts_with_little_memory(
    path: pathlib.Path, staging: Any, host_bytes_max: int
) -> None:
    """Shards much larger than the memory for them, in shapes that cannot be cut by rows alone."""
    shapes = [
        (3 * MIB // 4,),
        (1, 3 * MIB // 4),
        (2, 1, 700_001),
        (5, 300_000),
        (513, 1031),
        (),
        (0, 3),
        (1,),
    ]
    random = np.random.default_rng(0)
    tree: dict[str, Any] = {
        str(number): jnp.asarray(random.integers(0, 1 << 30, shape, np.int32))
        for number, shape in enumerate(shapes)
    }
    want = {key: jnp.array(leaf, copy=True) for key, leaf in tree.items()}
    options = jaxckpt.SaveOptions(staging=staging, host_bytes_max=host_bytes_max, chunk_bytes_max=MIB)
    pending = jaxckpt.save_async(path, tree, options=options)
    for leaf in tree.values():
        leaf.delete()
    pending.wait(60)
    assert_same_tree(jaxckpt.restore(path), want)
    assert_memory_is_given_back()


@pytest.mark.parametrize(
    ("spec", "pack_bytes_max"),
    [(("x",), 0), ((None, "x"), 0), ((None, "x"), 4 * MIB), (("y", "x"), 4 * MIB), ((("x", "y"), None), 0)],
)
@pytest.mark.parametrize("staging", WAYS)
def test_shards_of_several_chunks_with_little_memory(
    path: pathlib.Path, staging: Any, spec: tuple[Any, ...], pack_bytes_max: int
) -> None:
    """The grid's order of chunks goes to and fro between shards cut by columns; they do not all fit at once."""
    mesh = make_mesh({"x": 4, "y": 2})
    leaf = jax.device_put(
        jnp.arange(3 * MIB, dtype=jnp.float32).reshape(1536, 2048), NamedSharding(mesh, PartitionSpec(*spec))
    )
    options = jaxckpt.SaveOptions(
        staging=staging, host_bytes_max=2 * MIB, chunk_bytes_max=MIB // 4, pack_bytes_max=pack_bytes_max
    )
    want = jnp.array(leaf, copy=True)
    pending = jaxckpt.save_async(path, {"leaf": leaf}, options=options)
    leaf.delete()
    pending.wait(60)
    np.testing.assert_array_equal(jaxckpt.restore(path)["leaf"], want)
    assert_memory_is_given_back()


def test_a_plan_writes_shard_by_shard() -> None:
    extent = LeafExtent((8, 8), 4, (4, 4), (((0, 0), 0), ((0, 4), 1), ((4, 0), 2), ((4, 4), 3)))
    for pack_bytes_max in (0, 1 << 20):
        plan = plan_writes([extent], chunk_bytes_max=16, pack_bytes_max=pack_bytes_max, piece_bytes=MIB)
        segments = [segment for piece in plan.pieces for segment in piece.segments]
        assert [segment.shard for segment in segments] == sorted([0, 1, 2, 3] * 4)
        assert [segment.lo for segment in segments] == [0, 16, 32, 48] * 4
        assert sorted(segment.chunk for segment in segments) == list(range(16))


@pytest.mark.parametrize("shape", [(7,), (1, 40), (3, 5, 7), (4, 1, 9), (), (6, 4)])
@pytest.mark.parametrize("bytes_max", [4, 20, 32, 1000])
def test_runs_cut_an_array_into_its_bytes_in_order(shape: tuple[int, ...], bytes_max: int) -> None:
    array = np.arange(np.prod(shape, dtype=int), dtype=np.int32).reshape(shape)
    runs = list(contiguous_runs(shape, 4, bytes_max))
    assert [run.lo for run in runs] == [0, *(run.hi for run in runs[:-1])]
    assert all(run.hi - run.lo <= bytes_max for run in runs)
    joined = b"".join(array[tuple(map(slice, *run.box))].tobytes() for run in runs)
    assert joined == array.tobytes()


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_a_shard_is_cut_on_its_device_whatever_the_caller_has_set(axis_type: AxisType) -> None:
    mesh = mesh_of(axis_type)
    leaf = jax.device_put(jnp.full((64, 16), jnp.nan), NamedSharding(mesh, PartitionSpec("x")))
    shard = leaf.addressable_data(2)
    with jax.set_mesh(mesh), jax.transfer_guard("disallow"), jax.debug_nans(True):
        parts = [cut(shard, run) for run in contiguous_runs(shard.shape, 4, 100)]
    assert all(part.devices() == shard.devices() for part in parts)
    assert b"".join(np.asarray(part).tobytes() for part in parts) == np.asarray(shard).tobytes()


@pytest.mark.parametrize("staging", WAYS)
def test_a_guard_against_implicit_transfers_does_not_mean_saves(path: pathlib.Path, staging: Any) -> None:
    tree = {
        "int4": jnp.arange(-8, 8).astype(jnp.int4),
        "large": jnp.arange(1.0 * MIB),
        "key": jax.random.key(1),
    }
    with jax.transfer_guard("disallow"):
        options = jaxckpt.SaveOptions(staging=staging, host_bytes_max=2 * MIB)
        jaxckpt.save_async(path, tree, options=options).wait(60)
    assert_same_tree(jaxckpt.restore(path), tree)


@functools.partial(jax.jit, donate_argnums=0)
def count_up(keys: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Other keys in the memory of the given ones."""
    return {
        name: jax.random.wrap_key_data(jax.random.key_data(key) + 1, impl=jax.random.key_impl(key))
        for name, key in keys.items()
    }


@pytest.mark.parametrize("host_bytes_max", CAPS)
@pytest.mark.parametrize("staging", WAYS)
def test_prng_keys_can_be_donated(path: pathlib.Path, staging: Any, host_bytes_max: int | None) -> None:
    mesh = make_mesh({"x": 4})
    keys = {
        "one": jax.random.key(1),
        "rbg": jax.random.split(jax.random.key(2, impl="rbg"), 8),
        "sharded": jax.device_put(
            jax.random.split(jax.random.key(3), 64), NamedSharding(mesh, PartitionSpec("x"))
        ),
    }
    want = jax.tree.map(jax.random.clone, keys)
    options = jaxckpt.SaveOptions(staging=staging, host_bytes_max=host_bytes_max)
    with jax.set_mesh(mesh):
        pending = jaxckpt.save_async(path, keys, options=options)
    count_up(keys)
    assert all(key.is_deleted() for key in keys.values())
    pending.wait(60)
    assert_same_tree(jaxckpt.restore(path), want)


@pytest.mark.parametrize("staging", WAYS)
def test_arrays_in_pinned_host_memory_can_be_deleted(path: pathlib.Path, staging: Any) -> None:
    sharding = SingleDeviceSharding(jax.devices()[1], memory_kind="pinned_host")
    tree = {
        "large": jax.device_put(jnp.arange(1.0 * MIB), sharding),
        "small": jax.device_put(jnp.ones(3), sharding),
    }
    options = jaxckpt.SaveOptions(staging=staging, host_bytes_max=2 * MIB)
    pending = jaxckpt.save_async(path, tree, options=options)
    for leaf in tree.values():
        leaf.delete()
    pending.wait(60)
    restored = jaxckpt.restore(path)
    np.testing.assert_array_equal(restored["large"], np.arange(1.0 * MIB, dtype=np.float32))
    np.testing.assert_array_equal(restored["small"], np.ones(3))


# --- overwritten ----------------------------------------------------------------------------------------------


def host_leaves() -> dict[str, np.ndarray]:
    random = np.random.default_rng(1)
    base = random.integers(0, 255, (600, 700, 8), np.uint8)
    return {
        "c": base.copy(),
        "f": np.asfortranarray(base[:, :, 0]),
        "strided": base.copy()[::-1, ::3, 1::2],
        "transposed": base.copy().transpose(2, 0, 1),
        "int64": random.integers(-(1 << 60), 1 << 60, 1000),
        "structured": np.array([(1, b"ab"), (2, b"c")], [("number", "<i4"), ("text", "S3")]),
        "datetime": np.array(["2024-01-01", "2025-02-03"], "datetime64[s]"),
        "scalar": np.array(7.5),
        "long": np.array("x" * 600_000),
    }


@pytest.mark.parametrize("host_bytes_max", CAPS)
@pytest.mark.parametrize("staging", WAYS)
def test_numpy_leaves_can_be_overwritten(
    path: pathlib.Path, staging: Any, host_bytes_max: int | None
) -> None:
    leaves = host_leaves()
    tree = {"leaves": leaves, "list": [1, "two"], "nested": {"a": 1.5}}
    want = {"leaves": host_leaves(), "list": [1, "two"], "nested": {"a": 1.5}}
    metadata = {"losses": [1.0]}
    options = jaxckpt.SaveOptions(staging=staging, host_bytes_max=host_bytes_max)
    pending = jaxckpt.save_async(path, tree, metadata=metadata, options=options)
    for leaf in leaves.values():
        leaf.view(np.uint8 if leaf.flags.c_contiguous and leaf.ndim else leaf.dtype)[...] = 0
    leaves.clear()
    tree["list"][0] = 99
    tree["nested"]["b"] = tree.pop("list")
    metadata["losses"].append(2.0)
    pending.wait(60)
    restored = jaxckpt.restore(path)
    assert restored["list"] == want["list"]
    assert restored["nested"] == want["nested"]
    for key, leaf in want["leaves"].items():
        np.testing.assert_array_equal(restored["leaves"][key], leaf, strict=True)
    assert jaxckpt.open(path).metadata == {"losses": [1.0]}
    assert_memory_is_given_back()


# --- many at a time -------------------------------------------------------------------------------------------


@pytest.mark.timeout(120)
@pytest.mark.parametrize("host_bytes_max", [None, 2 * MIB])
@pytest.mark.parametrize("staging", WAYS)
def test_many_overlapping_saves(tmp_path: pathlib.Path, staging: Any, host_bytes_max: int | None) -> None:
    options = jaxckpt.SaveOptions(staging=staging, host_bytes_max=host_bytes_max)
    state = make_state(mesh_of(AxisType.Auto), rows=64)
    saves = []
    for step in range(12):
        saves.append(jaxckpt.save_async(tmp_path / str(step), state, options=options))
        state = add_one(state) if step % 8 != 7 else zeros_like(state)
    for step, save in enumerate(saves):
        save.wait(60)
        want = step if step < 8 else step - 8
        assert values_in(jaxckpt.restore(tmp_path / str(step))) == {float(want)}, step
    assert_memory_is_given_back()


@pytest.mark.timeout(120)
@pytest.mark.parametrize("ways", [("pinned", "pinned", "pinned"), ("pool", "pinned", "device")])
def test_saves_from_several_threads_share_little_memory(
    tmp_path: pathlib.Path, ways: tuple[Any, ...]
) -> None:
    tree = {"large": jnp.arange(3.0 * MIB // 4), "small": [jnp.full((9000,), number) for number in range(20)]}
    failures: list[BaseException] = []

    def save_some(number: int, staging: Any) -> None:
        try:
            options = jaxckpt.SaveOptions(staging=staging, host_bytes_max=2 * MIB)
            saves = [jaxckpt.save_async(tmp_path / f"{number}-{k}", tree, options=options) for k in range(3)]
            for save in saves:
                save.wait(60)
        except Exception as error:  # noqa: BLE001  any failure of the thread is one of the test
            failures.append(error)

    threads = [threading.Thread(target=save_some, args=(number, way)) for number, way in enumerate(ways)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(100)
    assert not failures
    for number in range(len(ways)):
        for k in range(3):
            assert_same_tree(jaxckpt.restore(tmp_path / f"{number}-{k}"), tree)
    assert_memory_is_given_back()


def large_tree() -> dict[str, jax.Array]:
    """Enough to copy for two threads, where there are two processors."""
    return {f"w{number}": jnp.full((1024, 1024), number, jnp.float32) for number in range(12)}


@pytest.mark.timeout(120)
@pytest.mark.parametrize("host_bytes_max", [None, 16 * MIB, 2 * MIB])
def test_large_leaves_are_whole_whoever_copies_them(path: pathlib.Path, host_bytes_max: int | None) -> None:
    add = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf + 1, tree), donate_argnums=0)
    tree = large_tree()
    options = jaxckpt.SaveOptions(staging="pool", host_bytes_max=host_bytes_max)
    saves = []
    for number in range(3):
        saves.append(jaxckpt.save_async(path / str(number), tree, options=options))
        tree = add(add(tree))
    for number, save in enumerate(saves):
        save.wait(60)
        restored = jaxckpt.restore(path / str(number))
        assert {key: values_in(leaf) for key, leaf in restored.items()} == {
            f"w{leaf}": {leaf + 2.0 * number} for leaf in range(12)
        }
    assert_memory_is_given_back()


@pytest.mark.timeout(120)
@pytest.mark.parametrize("at", [1, 3, 9])
def test_a_failure_while_large_leaves_are_copied_ends_all_who_copy(path: pathlib.Path, at: int) -> None:
    store = LocalStore(str(path), RefusingKernel(errno.ENOSPC, ("pwrite",), at=at, is_lasting=True))
    with pytest.raises(jaxckpt.WriteError):
        jaxckpt.save_async(store, large_tree(), options=jaxckpt.SaveOptions(staging="pool")).wait(60)
    assert not [thread for thread in threading.enumerate() if thread.name == "jaxckpt-copy"]
    assert_memory_is_given_back()


def test_one_thread_copies_everything_where_no_second_one_can_start() -> None:
    tree = large_tree()
    leaves = inspect_leaves(tuple(tree), list(tree.values()))
    plan = plan_save(
        tuple(tree),
        leaves.kinds,
        chunk_bytes_max=64 * MIB,
        pack_bytes_max=MIB,
        piece_bytes=8 * MIB,
        group=None,
    )
    snapshot = take_snapshot("pool", leaves, plan.writes, 64 * MIB, 8 * MIB)
    copied: list[int] = []

    def submit(piece: Any, data: Any, give_back: Any) -> None:
        copied.append(len(data))
        assert len(data) == piece.length
        give_back()

    before = threading.stack_size(1 << 46)  # more than there are addresses
    try:
        snapshot.stage(submit)
    finally:
        threading.stack_size(before)
    assert sum(copied) == 12 * 4 * MIB
    assert_memory_is_given_back()


@pytest.mark.timeout(60)
def test_pinned_saves_are_drained_in_the_order_in_which_they_were_staged(tmp_path: pathlib.Path) -> None:
    """Otherwise the second one could take the only buffer and wait for room that the first one has, which waits for
    the buffer. Here the first one needs the buffer three times, and the second one asks for it in the meantime."""
    may_write = threading.Event()
    order: list[str] = []

    def tell_of_first(what: str, _name: str) -> None:
        if what == "write":
            assert may_write.wait(50)
            order.append("first")

    def tell_of_second(what: str, _name: str) -> None:
        may_write.set()
        if what == "write":
            order.append("second")

    # In a pack each of these chunks of four bytes takes 64: two pieces of 1 MiB, and a third.
    tiny = jaxckpt.SaveOptions(staging="pinned", host_bytes_max=2 * MIB, chunk_bytes_max=4)
    options = jaxckpt.SaveOptions(staging="pinned", host_bytes_max=2 * MIB)
    first = {"tiny": jnp.arange(34_000, dtype=jnp.int32)}
    second = {"small": jnp.arange(1000.0)}
    saves = [
        jaxckpt.save_async(WatchedStore(tmp_path / "first", tell_of_first), first, options=tiny),  # type: ignore[arg-type]
        jaxckpt.save_async(WatchedStore(tmp_path / "second", tell_of_second), second, options=options),  # type: ignore[arg-type]
    ]
    for save in saves:
        save.wait(40)
    assert order == ["first"] * 3 + ["second"]
    assert_same_tree(jaxckpt.restore(tmp_path / "first"), first)
    assert_same_tree(jaxckpt.restore(tmp_path / "second"), second)


# --- not waiting ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("staging", WAYS)
def test_save_async_does_not_wait_for_storage(path: pathlib.Path, staging: Any) -> None:
    """Storage accepts nothing until `save_async` has returned and the state is donated."""
    may_write = threading.Event()

    def tell(_what: str, _name: str) -> None:
        assert may_write.wait(50)

    state = add_one(make_state(mesh_of(AxisType.Auto)))
    options = jaxckpt.SaveOptions(staging=staging)
    pending = jaxckpt.save_async(WatchedStore(path, tell), state, options=options)  # type: ignore[arg-type]
    state = add_one(state)
    jax.block_until_ready(state)
    assert not pending.done()
    assert pending.progress().bytes_done == 0
    may_write.set()
    pending.wait(60)
    assert values_in(jaxckpt.restore(path)) == {1.0}


@pytest.mark.parametrize(
    ("staging", "context"), [("pinned", None), ("pinned", AxisType.Explicit), ("device", AxisType.Auto)]
)
def test_the_ways_of_accelerators_do_not_wait_for_the_computation_in_flight(
    tmp_path: pathlib.Path, staging: Any, context: AxisType | None
) -> None:
    mesh = mesh_of(context or AxisType.Auto, devices=1)
    options = jaxckpt.SaveOptions(staging=staging)
    with jax.set_mesh(mesh) if context is not None else contextlib.nullcontext():
        matrix = jnp.full((1000, 1000), 1e-3)
        state = jax.block_until_ready(add_one_slowly(make_state(mesh), matrix, 0))
        state = jax.block_until_ready(add_one(state))  # compiled, all of them
        jaxckpt.save_async(tmp_path / "warm", state, options=options).wait(60)
        state = add_one_slowly(state, matrix, 20)
        pending = jaxckpt.save_async(tmp_path / "measured", state, options=options)
        was_ready = any(leaf.is_ready() for leaf in state.values())
        state = add_one(state)
        was_ready_after_the_next_step = any(leaf.is_ready() for leaf in state.values())
    assert not was_ready
    assert not was_ready_after_the_next_step
    pending.wait(60)
    assert values_in(jaxckpt.restore(tmp_path / "measured")) == {3.0}


def test_the_pool_way_waits_for_the_values(path: pathlib.Path) -> None:
    """The control of the test above: its computation does take longer than a save."""
    mesh = mesh_of(AxisType.Auto, devices=1)
    state = add_one_slowly(make_state(mesh), jnp.full((1000, 1000), 1e-3), 20)
    assert not any(leaf.is_ready() for leaf in state.values())
    pending = jaxckpt.save_async(path, state, options=jaxckpt.SaveOptions(staging="pool"))
    assert all(leaf.is_ready() for leaf in state.values())
    pending.wait(60)


# --- nothing is left ------------------------------------------------------------------------------------------


def address_of(array: jax.Array) -> int:
    return array.addressable_data(0).unsafe_buffer_pointer()


@pytest.mark.parametrize("staging", [*WAYS, "blocking"])
def test_nothing_stays_cached_on_the_arrays_and_their_memory_can_be_donated(
    tmp_path: pathlib.Path, staging: Any
) -> None:
    mesh = mesh_of(AxisType.Auto)
    state = make_state(mesh, rows=1024)
    state["one"] = jnp.ones((1024, 512))
    jax.block_until_ready(state)
    if staging == "blocking":
        jaxckpt.save(tmp_path / "a", state)
    else:
        jaxckpt.save_async(tmp_path / "a", state, options=jaxckpt.SaveOptions(staging=staging)).wait(60)
    for key, leaf in state.items():
        assert leaf._npy_value is None, key
        assert all(shard.data._npy_value is None for shard in leaf.addressable_shards), key
    # A view that somebody still held would make the donating step copy.
    before = address_of(state["one"])
    after = jax.jit(lambda leaf: leaf + 1, donate_argnums=0)(state["one"])
    assert address_of(after) == before


def test_reading_values_off_an_array_does_cache_them() -> None:
    """The control of the test above."""
    leaf = jax.device_put(jnp.ones((8, 8)), NamedSharding(mesh_of(AxisType.Auto), PartitionSpec("x")))
    np.asarray(leaf)
    assert leaf._npy_value is not None


@pytest.mark.parametrize("staging", WAYS)
def test_the_leaves_are_not_referenced_once_they_are_staged(path: pathlib.Path, staging: Any) -> None:
    """Storage is held up, so that the save is still going on."""
    may_write = threading.Event()

    def tell(_what: str, _name: str) -> None:
        assert may_write.wait(50)

    tree = {"jax": jnp.arange(1000.0), "numpy": np.arange(1000.0), "small": np.ones((3, 4), order="F")}
    leaves = [weakref.ref(leaf) for leaf in tree.values()]
    options = jaxckpt.SaveOptions(staging=staging)
    pending = jaxckpt.save_async(WatchedStore(path, tell), tree, options=options)  # type: ignore[arg-type]
    tree.clear()
    gc.collect()
    assert [leaf() for leaf in leaves] == [None] * 3
    may_write.set()
    pending.wait(60)


# --- negative controls ----------------------------------------------------------------------------------------


def test_copy_to_host_async_and_reading_later_loses_the_value() -> None:
    state = add_one(make_state(mesh_of(AxisType.Auto)))
    shards = [leaf.addressable_data(0) for leaf in state.values()]
    for shard in shards:
        shard.copy_to_host_async()
    add_one(state)
    lost = 0
    for shard in shards:
        try:
            lost += values_in(shard) != {1.0}
        except RuntimeError:  # "Array has been deleted"
            lost += 1
    assert lost == len(shards)


def test_device_put_to_the_same_sharding_is_no_copy() -> None:
    leaf = jnp.arange(1000.0)
    copy = jax.device_put(leaf, leaf.sharding)
    jax.jit(lambda array: array + 1, donate_argnums=0)(leaf)
    assert copy.is_deleted()


def test_a_held_view_keeps_the_next_step_from_donating() -> None:
    leaf = jnp.ones((1024, 512))
    view = np.asarray(leaf)
    before = address_of(leaf)
    after = jax.jit(lambda array: array + 1, donate_argnums=0)(leaf)
    assert address_of(after) != before
    assert view[0, 0] == 1


class MeddlingKernel(Kernel):
    """Changes an array right before each write, as another thread of the program could."""

    def __init__(self, array: np.ndarray) -> None:
        self._array = array

    def pwrite(self, descriptor: int, data: memoryview, offset: int) -> int:
        self._array += 1
        return os.pwrite(descriptor, data, offset)


def test_a_numpy_array_that_changes_while_it_is_written_does_not_make_the_checkpoint_unreadable(
    tmp_path: pathlib.Path,
) -> None:
    array = allocate_aligned(8 * MIB)
    store = LocalStore(str(tmp_path / "a"), MeddlingKernel(array))
    jaxckpt.save(store, {"array": array})
    assert array[0] > 0
    assert jaxckpt.verify(tmp_path / "a").ok
