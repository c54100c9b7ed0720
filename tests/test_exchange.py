"""Several processes that need the same bytes read them once, and XLA moves them: bit for bit, and little is read twice.

Real processes restore what others saved. How a leaf is cut is shown without them, for any shape.
"""

from __future__ import annotations

import logging
import math
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given, settings, strategies as st
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P

import jaxckpt
from jaxckpt._config import BLOCK_BYTES
from jaxckpt._exchange import Cut, Recipe, compile_move, cut_leaf
from jaxckpt._layout import blocks_of_box, intersect

from .processes import Outcome, Worker, run_processes

OPTIONS = jaxckpt.SaveOptions(pack_bytes_max=1 << 20, timeout_s=30)
RESTORE = jaxckpt.RestoreOptions(timeout_s=30)

Leaves = dict[str, np.ndarray[Any, Any]]


def global_mesh(columns: int = 1, axis_type: AxisType = AxisType.Auto) -> Mesh:
    devices = np.array(jax.devices(), dtype=object)
    return Mesh(devices.reshape(-1, columns), ("x", "y"), axis_types=(axis_type, axis_type))


def bits(shape: tuple[int, ...], dtype: Any = np.float32, seed: int = 0) -> np.ndarray[Any, Any]:
    """Random bits, NaNs with payloads among them."""
    dtype = np.dtype(dtype)
    data = np.random.default_rng(seed).integers(0, 256, math.prod(shape) * dtype.itemsize, np.uint8)
    if dtype == np.bool_:
        data &= 1
    if dtype.name in ("int2", "uint2"):
        return (data & 3).astype(np.int8).astype(dtype).reshape(shape)
    if dtype.name in ("int4", "uint4"):
        return (data & 15).astype(np.int8).astype(dtype).reshape(shape)
    if dtype.name == "float4_e2m1fn":
        data &= 15
    return data.view(dtype).reshape(shape)


def place(array: np.ndarray[Any, Any], sharding: NamedSharding) -> jax.Array:
    return jax.make_array_from_callback(
        array.shape, sharding, lambda index: np.asarray(array[index], order="C"), dtype=array.dtype
    )


def assert_is(got: jax.Array, want: np.ndarray[Any, Any], sharding: NamedSharding, where: str = "") -> None:
    """What this process has of an array is right bit for bit, and the array has this sharding."""
    assert got.shape == want.shape, where
    assert got.dtype == want.dtype, where
    assert got.sharding == sharding, where
    for shard in got.addressable_shards:
        expected = np.ascontiguousarray(want[shard.index])
        assert np.asarray(shard.data).tobytes() == expected.tobytes(), where


def check(outcomes: list[Outcome]) -> list[Any]:
    """All returned; what they returned."""
    for outcome in outcomes:
        assert outcome.status == "returned", f"{outcome.error_text}\n{outcome.output}"
    return [outcome.value for outcome in outcomes]


def save_leaves(worker: Worker, path: str, make: Callable[[], Leaves], specs: dict[str, P]) -> None:
    mesh = global_mesh()
    tree = {key: place(leaf, NamedSharding(mesh, specs.get(key, P("x")))) for key, leaf in make().items()}
    jaxckpt.save(path, tree, options=OPTIONS)


# --- shardings ------------------------------------------------------------------------------------------------


def leaves() -> Leaves:
    """Saved by rows, but for `columns` and `replicated`."""
    return {
        "rows": bits((1024, 2048), seed=1),
        "columns": bits((1024, 2048), seed=2),
        "replicated": bits((1024, 1024), seed=3),
        "odd rows": bits((1036, 1008), seed=4),
        "three axes": bits((32, 48, 1024), seed=5),
        "packed 1": bits((128, 128), seed=6),
        "packed 2": bits((128, 128), seed=7),
        "packed 3": bits((128, 128), seed=8),
    }


SAVED = {"columns": P(None, "x"), "replicated": P(), "packed 2": P()}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The leaves, saved by four processes."""
    path = tmp_path_factory.mktemp("exchange") / "checkpoint"
    check(run_processes(save_leaves, 4, arguments=(str(path), leaves, SAVED)))
    return path


def restore_leaves(
    worker: Worker,
    path: str,
    columns: int,
    specs: dict[str, P],
    exchange: bool | None,
    keys: list[str] | None,
) -> tuple[int, int]:
    mesh = global_mesh(columns)
    want = {key: leaf for key, leaf in leaves().items() if keys is None or key in keys}
    shardings = {key: NamedSharding(mesh, specs.get(key, P(None, ("x", "y")))) for key in want}
    tree, report = jaxckpt.restore(
        path,
        select=keys,
        sharding=lambda key, _: shardings[key],
        exchange=exchange,
        report=True,
        options=RESTORE,
    )
    for key, leaf in want.items():
        assert_is(tree[key], leaf, shardings[key], key)
    return report.nbytes, report.group_bytes_read


COLUMNS = {"columns": P(("x", "y")), "packed 1": P(), "packed 2": P(), "packed 3": P("x"), "replicated": P()}
PARTLY = {
    "rows": P(None, "y"),
    "columns": P("y"),
    "replicated": P("x", "y"),
    "odd rows": P("y"),
    "three axes": P("y", None, "x"),
    "packed 1": P("x"),
    "packed 2": P("y"),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "devices", "columns", "specs", "keys"),
    [
        (2, 2, 2, PARTLY, None),
        (4, 1, 1, COLUMNS, None),
        (8, 2, 4, PARTLY, ["rows", "replicated"]),
    ],
)
def test_each_byte_is_read_once_whatever_the_shardings(
    saved: pathlib.Path, count: int, devices: int, columns: int, specs: dict[str, P], keys: list[str] | None
) -> None:
    arguments = (str(saved), columns, specs, True, keys)
    for nbytes, group_bytes in check(run_processes(restore_leaves, count, devices, arguments=arguments)):
        assert nbytes <= group_bytes <= 1.1 * nbytes


@pytest.mark.slow
def test_a_restore_reads_each_byte_once_for_each_process_if_that_is_asked_for(saved: pathlib.Path) -> None:
    arguments = (str(saved), 1, {}, False, ["rows"])
    for nbytes, group_bytes in check(run_processes(restore_leaves, 4, arguments=arguments)):
        assert 4 * nbytes <= group_bytes <= 4.1 * nbytes


@pytest.mark.slow
def test_leaves_are_exchanged_unasked_where_reading_them_costs_the_group_too_much(
    tmp_path: pathlib.Path,
) -> None:
    path = tmp_path / "checkpoint"
    check(run_processes(save_leaves, 2, arguments=(str(path), large_and_small, {})))
    read = check(run_processes(restore_unasked, 4, arguments=(str(path),)))
    small, many, large = (group_bytes / nbytes for nbytes, group_bytes in read[0])
    assert small >= 4  # the manifest has as many bytes
    assert many <= 1.1  # in a bundle
    assert large <= 1.1


def large_and_small() -> Leaves:
    many = {f"many {number}": bits((16384,), np.uint8, seed=number) for number in range(256)}
    return many | {"large": bits((4096, 1024), np.uint8, seed=1), "small": bits((128, 128), np.uint8, seed=2)}


def restore_unasked(worker: Worker, path: str) -> list[tuple[int, int]]:
    sharding = NamedSharding(global_mesh(), P())
    read = []
    want = large_and_small()
    for select in ("small", "many *", "large"):
        tree, report = jaxckpt.restore(path, select=select, sharding=sharding, report=True, options=RESTORE)
        for key, leaf in tree.items():
            assert_is(leaf, want[key], sharding, key)
        read.append((report.nbytes, report.group_bytes_read))
    return read


def restore_on_some(worker: Worker, path: str) -> tuple[int, int]:
    """On the devices of the processes 1 and 2 only, in an order of their own, with explicit axes that are set."""
    devices = np.array([jax.devices()[2], jax.devices()[1]], dtype=object)
    mesh = Mesh(devices, ("x",), axis_types=(AxisType.Explicit,))
    want = leaves()
    shardings = {"rows": NamedSharding(mesh, P(None, "x")), "replicated": NamedSharding(mesh, P())}
    with jax.set_mesh(mesh):
        tree, report = jaxckpt.restore(
            path,
            select=list(shardings),
            sharding=lambda key, _: shardings[key],
            exchange=True,
            report=True,
            options=RESTORE,
        )
    for key, sharding in shardings.items():
        assert_is(tree[key], want[key], sharding, key)
    return report.nbytes, report.group_bytes_read


@pytest.mark.slow
def test_a_mesh_may_have_devices_of_some_processes_only(saved: pathlib.Path) -> None:
    for nbytes, group_bytes in check(run_processes(restore_on_some, 4, arguments=(str(saved),))):
        assert group_bytes <= 1.1 * nbytes


# --- dtypes ---------------------------------------------------------------------------------------------------

DTYPES: tuple[Any, ...] = (
    np.bool_,
    ml_dtypes.int4,
    ml_dtypes.uint4,
    np.uint8,
    ml_dtypes.float8_e4m3fn,
    ml_dtypes.float8_e4m3,
    ml_dtypes.bfloat16,
    np.float16,
    np.float32,
    np.complex64,
    np.int64,
    np.float64,
    np.complex128,
)


def all_dtypes() -> Leaves:
    """Of each dtype one leaf of 256 KiB."""
    leaves = {}
    for number, dtype in enumerate(map(np.dtype, DTYPES)):
        leaves[dtype.name] = bits((64, 4096 // dtype.itemsize), dtype, seed=number)
    return leaves


def save_dtypes(path: pathlib.Path) -> None:
    """One process saves them, and some that are wanted in other forms."""
    tree: dict[str, Any] = dict(all_dtypes())
    tree["keys"] = jax.random.split(jax.random.key(7), (64, 512))
    tree["weak"] = jax.numpy.full((64, 2048), 2.5)
    tree["to cast"] = np.random.default_rng(1).normal(size=(64, 2048)).astype(np.float32)
    tree["to reshape"] = bits((64, 4096), seed=2)
    with jax.enable_x64(True):
        jaxckpt.save(path, tree, options=OPTIONS)


def restore_dtypes(worker: Worker, path: str, exchange: bool) -> tuple[int, int, Any]:
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_debug_nans", True)
    sharding, replicated = NamedSharding(global_mesh(), P(None, "x")), NamedSharding(global_mesh(), P())
    shardings = {key: sharding if number % 2 else replicated for number, key in enumerate(all_dtypes())}
    like: dict[str, Any] = {
        key: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=shardings[key])
        for key, leaf in all_dtypes().items()
    }
    like["keys"] = jax.ShapeDtypeStruct((64, 512), jax.random.key(0).dtype, sharding=sharding)
    like["weak"] = jax.ShapeDtypeStruct((64, 2048), np.float32, sharding=sharding, weak_type=True)
    like["to cast"] = jax.ShapeDtypeStruct((64, 2048), ml_dtypes.bfloat16, sharding=sharding)
    like["to reshape"] = jax.ShapeDtypeStruct((128, 2048), np.float32, sharding=sharding)
    tree, report = jaxckpt.restore(
        path, like, cast=True, reshape=True, exchange=exchange, report=True, options=RESTORE
    )
    for key, leaf in all_dtypes().items():
        assert_is(tree[key], leaf, shardings[key], key)
    assert_is(tree["to reshape"], bits((64, 4096), seed=2).reshape(128, 2048), sharding)
    assert tree["weak"].weak_type
    assert tree["keys"].dtype == jax.random.key(0).dtype
    assert tree["keys"].sharding.is_equivalent_to(sharding, 2)
    others = [jax.random.key_data(tree["keys"]), tree["weak"], tree["to cast"]]
    shards = [[np.asarray(shard.data).tobytes() for shard in leaf.addressable_shards] for leaf in others]
    return report.nbytes, report.group_bytes_read, shards


@pytest.mark.slow
def test_elements_of_every_dtype_keep_their_bits(path: pathlib.Path) -> None:
    save_dtypes(path)
    exchanged = check(run_processes(restore_dtypes, 2, arguments=(str(path), True)))
    local = check(run_processes(restore_dtypes, 2, arguments=(str(path), False)))
    for (nbytes, group_bytes, shards), (_, local_bytes, local_shards) in zip(exchanged, local, strict=True):
        assert group_bytes <= 1.1 * nbytes
        assert local_bytes >= 1.9 * nbytes
        assert shards == local_shards


# --- memory ---------------------------------------------------------------------------------------------------


def restore_within(worker: Worker, path: str, host_bytes_max: int | None, device_bytes_max: int) -> Any:
    mesh = global_mesh()
    shardings = {"rows": NamedSharding(mesh, P(None, "x")), "replicated": NamedSharding(mesh, P())}
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    logging.getLogger("jaxckpt").addHandler(handler)
    logging.getLogger("jaxckpt").setLevel(logging.INFO)
    tree, report = jaxckpt.restore(
        path,
        select=list(shardings),
        sharding=lambda key, _: shardings[key],
        exchange=True,
        report=True,
        options=jaxckpt.RestoreOptions(
            # Processes may have been given different bounds; the least ones hold.
            host_bytes_max=host_bytes_max if worker.index == 1 else None,
            device_bytes_max=device_bytes_max if worker.index == 1 else 1 << 30,
            timeout_s=30,
        ),
    )
    for key, sharding in shardings.items():
        assert_is(tree[key], leaves()[key], sharding, key)
    return report.nbytes, report.group_bytes_read, records


@pytest.mark.slow
def test_a_small_host_budget_makes_more_waves(saved: pathlib.Path) -> None:
    for nbytes, group_bytes, _ in check(run_processes(restore_within, 2, arguments=(str(saved), 1, 1 << 30))):
        assert group_bytes <= 1.1 * nbytes


@pytest.mark.slow
def test_a_leaf_that_takes_too_much_device_memory_is_read_by_each_process(saved: pathlib.Path) -> None:
    read = check(run_processes(restore_within, 2, arguments=(str(saved), None, 1 << 20)))
    for nbytes, group_bytes, _ in read:
        assert group_bytes >= 1.9 * nbytes
    assert any("rows: each process reads it" in line for line in read[0][2])


# --- bundles --------------------------------------------------------------------------------------------------


def small_leaves() -> Leaves:
    dtypes = (np.float32, ml_dtypes.bfloat16, np.int8, np.complex64, np.bool_, ml_dtypes.int4, np.uint16)
    return {
        f"leaf {number:03}": bits((8, 8 + number), dtypes[number % len(dtypes)], seed=number)
        for number in range(300)
    }


def restore_small(worker: Worker, path: str, columns: int) -> tuple[int, int]:
    mesh = global_mesh(columns)
    half = Mesh(np.array(jax.devices()[: len(jax.devices()) // 2], dtype=object), ("x",))
    shardings = {
        key: NamedSharding(half, P())
        if number % 5 == 4
        else NamedSharding(mesh, P("x" if number % 3 == 0 else None))
        for number, key in enumerate(small_leaves())
    }
    like = {
        key: jax.ShapeDtypeStruct(
            leaf.shape, np.float32 if key == "leaf 002" else leaf.dtype, sharding=shardings[key]
        )
        for key, leaf in small_leaves().items()
    }
    tree, report = jaxckpt.restore(path, like, cast=True, report=True, options=RESTORE)
    for key, leaf in small_leaves().items():
        assert_is(tree[key], leaf.astype(np.float32) if key == "leaf 002" else leaf, shardings[key], key)
    return report.nbytes, report.group_bytes_read


def restore_damaged_bundle(worker: Worker, path: str) -> str:
    sharding = NamedSharding(global_mesh(), P())
    with pytest.raises(jaxckpt.CorruptError) as caught:
        jaxckpt.restore(path, sharding=sharding, options=RESTORE)
    whole = [key for key in small_leaves() if key not in str(caught.value)]
    tree = jaxckpt.restore(path, select=whole, sharding=sharding, options=RESTORE)
    assert_is(tree["leaf 000"], small_leaves()["leaf 000"], sharding)
    return str(caught.value)


@pytest.mark.slow
def test_small_leaves_are_read_once_and_travel_together(path: pathlib.Path) -> None:
    check(
        run_processes(save_leaves, 2, arguments=(str(path), small_leaves, dict.fromkeys(small_leaves(), P())))
    )
    for count, devices, columns in ((2, 2, 2), (8, 1, 1)):
        read = check(run_processes(restore_small, count, devices, arguments=(str(path), columns)))
        manifests = 2 * count * (path / "manifest.msgpack").stat().st_size
        for nbytes, group_bytes in read:
            assert group_bytes <= 1.1 * nbytes + manifests
    pack = next((path / jaxckpt.open(path).manifest.data / "packs").iterdir())
    data = bytearray(pack.read_bytes())
    data[len(data) // 2] ^= 1
    pack.write_bytes(data)
    messages = check(run_processes(restore_damaged_bundle, 4, arguments=(str(path),)))
    assert all("checksum" in message for message in messages)


# --- failures -------------------------------------------------------------------------------------------------


def restore_damaged(worker: Worker, path: str, whole: str) -> tuple[str, float]:
    sharding = NamedSharding(global_mesh(), P(None, "x"))
    began_s = time.monotonic()
    with pytest.raises(jaxckpt.CorruptError) as caught:
        jaxckpt.restore(path, sharding=sharding, exchange=True, options=RESTORE)
    seconds = time.monotonic() - began_s
    tree = jaxckpt.restore(whole, select="rows", sharding=sharding, exchange=True, options=RESTORE)
    assert_is(tree["rows"], leaves()["rows"], sharding)
    return str(caught.value), seconds


def only_rows() -> Leaves:
    return {"damaged": bits((1024, 2048), seed=1)}


@pytest.mark.slow
def test_damage_that_one_process_finds_is_raised_by_all_and_the_next_restore_works(
    path: pathlib.Path, saved: pathlib.Path
) -> None:
    check(run_processes(save_leaves, 2, arguments=(str(path), only_rows, {})))
    chunk = max(
        (entry for entry in path.rglob("*") if entry.is_file()), key=lambda entry: entry.stat().st_size
    )
    data = bytearray(chunk.read_bytes())
    data[-100] ^= 1
    chunk.write_bytes(data)
    for message, seconds in check(run_processes(restore_damaged, 4, arguments=(str(path), str(saved)))):
        assert "damaged" in message
        assert "checksum" in message
        assert seconds < 5


def restore_differently(worker: Worker, path: str) -> str:
    sharding = NamedSharding(global_mesh(), P(None, "x"))
    with pytest.raises(jaxckpt.ProcessMismatchError) as caught:
        jaxckpt.restore(path, sharding=sharding, exchange=worker.index == 0, options=RESTORE)
    return str(caught.value)


@pytest.mark.slow
def test_processes_that_ask_for_different_exchanges_are_told_so(saved: pathlib.Path) -> None:
    for message in check(run_processes(restore_differently, 2, arguments=(str(saved),))):
        assert "exchange is False here, True in process 0" in message


# --- cutting --------------------------------------------------------------------------------------------------


@st.composite
def chunked_shapes(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    """A shape, that of its chunks, and the bytes of an element: up to some hundred blocks."""
    rank = draw(st.integers(1, 3))
    itemsize = draw(st.sampled_from([1, 2, 4, 8]))
    grid = [draw(st.integers(1, 4)) for _ in range(rank)]
    chunk = [draw(st.sampled_from([1, 2, 3, 7, 16, 100, 128, 1000])) for _ in range(rank)]
    if draw(st.booleans()):
        chunk[-1] = BLOCK_BYTES // itemsize // draw(st.sampled_from([1, 2, 8, 100]))
    return tuple(a * b for a, b in zip(grid, chunk, strict=True)), tuple(chunk), itemsize


def slabs_of(shape: tuple[int, ...], cut: Cut) -> list[Any]:
    """The part of each slab that lies in the array."""
    boxes = []
    for place in np.ndindex(cut.parts):
        lo = tuple(index * size for index, size in zip(place, cut.slab, strict=True))
        hi = tuple(start + size for start, size in zip(lo, cut.slab, strict=True))
        boxes.append(intersect((lo, hi), ((0,) * len(shape), shape)))
    return boxes


def bytes_to_read(shape: tuple[int, ...], chunk: tuple[int, ...], itemsize: int, boxes: list[Any]) -> int:
    """Bytes of the blocks that the boxes need, each counted once for each box."""
    chunk_bytes = math.prod(chunk) * itemsize
    total = 0
    for place in np.ndindex(tuple(size // part for size, part in zip(shape, chunk, strict=True))):
        lo = tuple(index * size for index, size in zip(place, chunk, strict=True))
        hi = tuple(start + size for start, size in zip(lo, chunk, strict=True))
        for box in boxes:
            shared = None if box is None else intersect(box, (lo, hi))
            if shared is not None:
                local = tuple(
                    tuple(at - start for at, start in zip(corner, lo, strict=True)) for corner in shared
                )
                blocks = blocks_of_box((local[0], local[1]), chunk, itemsize)
                total += sum(min(BLOCK_BYTES, chunk_bytes - block * BLOCK_BYTES) for block in blocks)
    return total


@settings(max_examples=60, deadline=None)
@given(case=chunked_shapes(), device_count=st.sampled_from([2, 3, 4, 6, 8, 16]))
@example(case=((16, 1000, 1000), (16, 1000, 1000), 2), device_count=3)
def test_slabs_cover_an_array_once_and_need_hardly_a_block_twice(
    case: tuple[tuple[int, ...], tuple[int, ...], int], device_count: int
) -> None:
    shape, chunk, itemsize = case
    nbytes = math.prod(shape) * itemsize
    cut = cut_leaf(shape, chunk, itemsize, device_count, (device_count,))
    if cut is None:  # small, or the blocks that lie across cuts are too large a share of it
        assert nbytes <= 16 * BLOCK_BYTES or nbytes * 0.05 < (device_count - 1) * BLOCK_BYTES
        return
    assert math.prod(cut.parts) == device_count
    boxes = slabs_of(shape, cut)
    assert nbytes > 16 * BLOCK_BYTES or sum(box is not None for box in boxes) * 2 > device_count
    volumes = [math.prod(np.subtract(box[1], box[0])) for box in boxes if box is not None]
    assert sum(volumes) == math.prod(shape)
    assert all(volume <= math.prod(cut.slab) for volume in volumes)
    read = bytes_to_read(shape, chunk, itemsize, boxes)
    assert nbytes <= read <= nbytes + cut.repeated_bytes
    assert cut.repeated_bytes <= 0.05 * nbytes


def test_a_large_leaf_is_cut_evenly_along_its_rows() -> None:
    cut = cut_leaf((65536, 1024), (16384, 1024), 4, 64, (1, 64))
    assert cut == Cut((64, 1), (1024, 1024), 0)


def test_of_two_equal_cuts_the_one_that_is_wanted_is_taken() -> None:
    cut = cut_leaf((4096, 4096), (1024, 1024), 4, 4, (2, 2))
    assert cut == Cut((2, 2), (2048, 2048), 0)


def test_a_leaf_of_one_block_is_not_cut() -> None:
    assert cut_leaf((128, 128), (128, 128), 4, 4, (1, 1)) is None


# --- moving, on the devices of one process --------------------------------------------------------------------


@st.composite
def recipes(draw: st.DrawFn) -> Recipe:
    """A leaf of many small chunks, and any sharding of it on devices in any order."""
    sizes = draw(st.sampled_from([(4,), (6,), (16,), (2, 4), (4, 2), (3, 2), (2, 2, 3), (4, 2, 2)]))
    devices = draw(st.permutations(jax.devices()))[: math.prod(sizes)]
    axis_type = draw(st.sampled_from([AxisType.Auto, AxisType.Explicit]))
    names = ("x", "y", "z")[: len(sizes)]
    mesh = Mesh(np.array(devices, dtype=object).reshape(sizes), names, axis_types=(axis_type,) * len(sizes))
    rank = draw(st.integers(1, 3))
    entries: list[list[str]] = [[] for _ in range(rank)]
    for name in draw(st.permutations(names)):
        dimension = draw(st.integers(0, rank))
        if dimension < rank:  # else the array is replicated along this axis
            entries[dimension].append(name)
    target_grid = tuple(math.prod(mesh.shape[name] for name in names) for names in entries)
    grid = tuple(draw(st.sampled_from([1, 2, 3, 5, 16])) for _ in range(rank))
    shape = tuple(
        parts * chunks * draw(st.integers(1, 3)) for parts, chunks in zip(target_grid, grid, strict=True)
    )
    chunk = tuple(size // chunks for size, chunks in zip(shape, grid, strict=True))
    spec = P(*(tuple(names) if names else None for names in entries))
    sharding = NamedSharding(mesh, spec)
    if draw(st.integers(0, 3)) == 0:  # it gets another shape than it was saved with
        flat, piece = (math.prod(shape),), (math.prod(chunk),)
        return Recipe(
            flat, np.dtype(np.float32), shape, sharding, cut_leaf(flat, piece, 4, len(devices), (1,))
        )
    cut = cut_leaf(shape, chunk, 4, len(devices), target_grid)
    return Recipe(shape, np.dtype(np.float32), shape, sharding, cut)


@pytest.mark.slow
@settings(max_examples=20, deadline=None)
@given(recipe=recipes())
def test_slabs_become_the_shards_that_are_wanted(recipe: Recipe) -> None:
    want = np.arange(math.prod(recipe.shape), dtype=np.uint32).reshape(recipe.shape)
    slabs_shape, slabs_sharding = recipe.slabs()
    slabs = np.zeros(slabs_shape, np.uint32)
    if recipe.cut is None:
        slabs[-1] = want
    else:
        slabs[tuple(map(slice, want.shape))] = want
    moved = compile_move(recipe)(jax.device_put(slabs, slabs_sharding))
    want = want.reshape(recipe.target_shape)
    assert moved.shape == want.shape
    assert moved.dtype == recipe.dtype
    assert moved.sharding.is_equivalent_to(recipe.sharding, moved.ndim)
    for shard in moved.addressable_shards:
        assert np.asarray(shard.data).tobytes() == np.ascontiguousarray(want[shard.index]).tobytes()


@pytest.mark.parametrize(
    ("parts", "spec", "room"),
    [
        ((8, 1), P(None, ("x", "y")), 3),
        ((8, 1), P(None, "x"), 2),
        ((4, 2), P(None, ("x", "y")), 3),
        ((2, 4), P(("y", "x")), 3),
        ((8, 1), P("x", "y"), 3),
    ],
)
def test_a_move_takes_little_more_device_memory_than_its_result(
    parts: tuple[int, int], spec: P, room: int
) -> None:
    mesh = Mesh(np.array(jax.devices()[:8], dtype=object).reshape(4, 2), ("x", "y"))
    slab = (1024 // parts[0], 1024 // parts[1])
    sharding = NamedSharding(mesh, spec)
    recipe = Recipe((1024, 1024), np.dtype(np.uint32), (1024, 1024), sharding, Cut(parts, slab, 0))
    shard_bytes = math.prod(sharding.shard_shape((1024, 1024))) * 4
    needed = compile_move(recipe).memory_analysis().temp_size_in_bytes
    assert needed <= room * shard_bytes + 4096


def test_small_floats_are_not_moved_as_larger_ones() -> None:
    mesh = Mesh(np.array(jax.devices()[:8], dtype=object).reshape(2, 4), ("x", "y"))
    for spec in (P(), P(None, "y"), P("y")):
        recipe = Recipe(
            (1024, 64),
            np.dtype(ml_dtypes.bfloat16),
            (64, 1024),
            NamedSharding(mesh, spec),
            Cut((8, 1), (128, 64), 0),
        )
        text = compile_move(recipe).as_text()
        assert "all-gather" in text
        assert "f32[" not in text
