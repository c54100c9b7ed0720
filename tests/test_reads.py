"""How much is read: each chunk once however the devices want it, and of a part no more than the blocks that hold it.

What the library says it read is compared with what the kernel counted (``rchar`` in /proc/self/io), and what it should
have read with a count of checksum blocks over NumPy masks. Values are compared with NumPy's own indexing.
"""

from __future__ import annotations

import itertools
import os
import pathlib
import threading
from collections.abc import Callable, Iterator
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from hypothesis.extra.numpy import basic_indices
from jax.sharding import NamedSharding, PartitionSpec as P, Sharding, SingleDeviceSharding

import jaxckpt
from jaxckpt._config import BLOCK_BYTES, MIB
from jaxckpt._fetching import ReadExecutor
from jaxckpt._resharding import plan_reads
from jaxckpt._storage import Buffer, Store, processor_count
from jaxckpt._store import LocalStore

from .helpers import assert_same_leaf, assert_same_tree, make_mesh, run_fork

SETTINGS = settings(
    max_examples=100, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None
)
IO_COUNTERS = pathlib.Path("/proc/self/io")
# Reading the counters, and the list of mounts that says which file systems are memory.
NOISE_BYTES = 64 << 10

needs_counters = pytest.mark.skipif(not IO_COUNTERS.exists(), reason="the kernel counts no bytes here")

UNPACKED = jaxckpt.SaveOptions(pack_bytes_max=0, chunk_bytes_max=MIB)


SHARDINGS = ("rows", "columns", "grid", "transposed", "cube", "replicated", "partly", "single")


def kernel_bytes_read() -> int:
    """Bytes that this process has read so far, from files and whatever else."""
    (line,) = [line for line in IO_COUNTERS.read_text().splitlines() if line.startswith("rchar")]
    return int(line.split()[1])


def shardings() -> dict[str, Sharding]:
    """Ways to lay a matrix over eight devices, and over one."""
    line, plane, cube = make_mesh({"x": 8}), make_mesh({"a": 4, "b": 2}), make_mesh({"p": 2, "q": 2, "r": 2})
    return {
        "rows": NamedSharding(line, P("x", None)),
        "columns": NamedSharding(line, P(None, "x")),
        "grid": NamedSharding(plane, P("a", "b")),
        "transposed": NamedSharding(plane, P("b", "a")),
        "cube": NamedSharding(cube, P(("r", "p"), "q")),
        "replicated": NamedSharding(line, P()),
        "partly": NamedSharding(plane, P(None, "b")),
        "single": SingleDeviceSharding(jax.devices()[5]),
    }


def make_matrix(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2**32, (rows, columns), np.uint32)


# --- resharding -----------------------------------------------------------------------------------------------


@pytest.mark.slow
@needs_counters
@pytest.mark.parametrize("options", [jaxckpt.SaveOptions(), UNPACKED], ids=["packed", "objects"])
@pytest.mark.parametrize("saved", SHARDINGS)
def test_every_resharding_reads_what_is_stored_once(
    path: pathlib.Path, saved: str, options: jaxckpt.SaveOptions
):
    values = make_matrix(1024, 1024)
    jaxckpt.save(path, {"w": jax.device_put(values, shardings()[saved])}, options=options)
    jaxckpt.restore(path)  # imports and caches
    for name, wanted in shardings().items():
        before = kernel_bytes_read()
        restored, report = jaxckpt.restore(path, sharding=wanted, report=True)
        counted = kernel_bytes_read() - before
        assert restored["w"].sharding == wanted
        assert np.array_equal(restored["w"], values)
        assert report.nbytes == values.nbytes
        assert values.nbytes <= report.bytes_read <= 1.02 * values.nbytes, f"{saved} to {name}"
        assert report.bytes_read <= counted <= report.bytes_read + NOISE_BYTES, f"{saved} to {name}"


@needs_counters
def test_chunks_far_larger_than_the_wanted_boxes_are_read_once(path: pathlib.Path):
    values = make_matrix(2048, 4096)
    jaxckpt.save(path, {"w": jax.device_put(values, jax.devices()[0])})  # one chunk of 32 MiB
    for name in ("rows", "columns", "grid"):
        options = jaxckpt.RestoreOptions(host_bytes_max=2 * MIB, io_threads=2)  # and units of one block
        before = kernel_bytes_read()
        restored, report = jaxckpt.restore(path, sharding=shardings()[name], options=options, report=True)
        counted = kernel_bytes_read() - before
        assert np.array_equal(restored["w"], values)
        assert report.bytes_read <= counted <= report.bytes_read + NOISE_BYTES
        assert counted <= 1.02 * values.nbytes


@pytest.mark.slow
@needs_counters
def test_many_small_leaves_are_read_once(path: pathlib.Path):
    values = {f"layer_{number:03d}": make_matrix(64, 64, number) for number in range(400)}
    layouts = itertools.cycle(shardings().values())
    jaxckpt.save(path, {key: jax.device_put(value, next(layouts)) for key, value in values.items()})
    for wanted in shardings().values():
        before = kernel_bytes_read()
        restored, report = jaxckpt.restore(path, sharding=wanted, report=True)
        counted = kernel_bytes_read() - before
        assert all(np.array_equal(restored[key], value) for key, value in values.items())
        assert report.nbytes == 400 * 64 * 64 * 4
        assert report.bytes_read <= 1.02 * report.nbytes
        assert report.bytes_read <= counted <= report.bytes_read + NOISE_BYTES


@needs_counters
def test_a_fresh_process_with_one_device_reads_once(path: pathlib.Path):
    values = {name: make_matrix(512, 512, number) for number, name in enumerate(SHARDINGS)}
    jaxckpt.save(path, {name: jax.device_put(values[name], wanted) for name, wanted in shardings().items()})
    program = """
        import sys
        import jax, jaxckpt

        def kernel_bytes_read():
            with open("/proc/self/io") as counters:
                return next(int(line.split()[1]) for line in counters if line.startswith("rchar"))

        jaxckpt.restore(sys.argv[1], select="rows")  # imports what is imported at use
        before = kernel_bytes_read()
        tree, report = jaxckpt.restore(sys.argv[1], report=True)
        counted = kernel_bytes_read() - before
        assert len(tree) == 8 and len(jax.devices()) == 1
        assert report.bytes_read <= 1.02 * report.nbytes, report
        assert report.bytes_read <= counted <= report.bytes_read + 65536, (report, counted)
        print(report.nbytes)
        """
    assert run_fork(program, path).stdout.strip() == str(8 * MIB)


# --- some leaves ----------------------------------------------------------------------------------------------


@needs_counters
@pytest.mark.parametrize("options", [jaxckpt.SaveOptions(), UNPACKED], ids=["packed", "objects"])
def test_selected_leaves_are_read_and_the_others_are_not(path: pathlib.Path, options: jaxckpt.SaveOptions):
    layouts = list(shardings().values())
    tree = {
        f"w{number}": jax.device_put(make_matrix(512, 512, number), layouts[number]) for number in range(8)
    }
    jaxckpt.save(path, tree, options=options)
    jaxckpt.restore(path)
    for select in ("w3", ["w0", "w5"], lambda key: key >= "w6"):
        before = kernel_bytes_read()
        restored, report = jaxckpt.restore(path, select=select, report=True)
        counted = kernel_bytes_read() - before
        assert_same_tree(restored, {key: tree[key] for key in restored})
        assert report.bytes_read <= 1.02 * len(restored) * MIB
        assert report.bytes_read <= counted <= report.bytes_read + NOISE_BYTES


# --- parts of leaves ------------------------------------------------------------------------------------------

ROWS, COLUMNS = 1280, 2048
INDICES: dict[str, Any] = {
    "rows": np.s_[10:20],
    "many rows": np.s_[100:900],
    "a row across a block": np.s_[127:129],
    "last rows": np.s_[-3:],
    "a row": np.s_[700],
    "an element": np.s_[1000, 2000],
    "a negative element": np.s_[-1, -1],
    "columns": np.s_[:, 5:9],
    "a column of some rows": np.s_[640:650, 1999],
    "every row of three": np.s_[::3],
    "far rows": np.s_[5::400],
    "far rows backwards": np.s_[::-500],
    "far columns": np.s_[:, ::1500],
    "far both ways": np.s_[100::600, 1::1300],
    "backwards": np.s_[::-1],
    "some backwards": np.s_[300:290:-2, 4:1:-1],
    "nothing": np.s_[5:5],
    "all": np.s_[...],
}
LAYOUTS = {
    # name: sharding, options; the matrix has 10 MiB
    "one chunk": ("single", jaxckpt.SaveOptions()),
    "rows of chunks": ("rows", jaxckpt.SaveOptions(pack_bytes_max=0)),
    "columns of chunks": ("columns", jaxckpt.SaveOptions(pack_bytes_max=0)),
    "packed rows": ("rows", jaxckpt.SaveOptions()),
    "packed grid": ("grid", jaxckpt.SaveOptions()),
    "small chunks": ("single", jaxckpt.SaveOptions(chunk_bytes_max=MIB // 2)),
    "chunks of a few rows": ("single", jaxckpt.SaveOptions(chunk_bytes_max=100_000)),
}


@pytest.fixture(scope="module", params=LAYOUTS)
def saved_matrix(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """A checkpoint with a matrix of 10 MiB, and the matrix."""
    sharding, options = LAYOUTS[request.param]
    path = tmp_path_factory.mktemp("reads") / "checkpoint"
    values = make_matrix(ROWS, COLUMNS)
    jaxckpt.save(path, {"w": jax.device_put(values, shardings()[sharding])}, options=options)
    return jaxckpt.open(path), values


def chunk_masks(leaf: jaxckpt.StoredLeaf, wanted: np.ndarray) -> Iterator[np.ndarray]:
    """A mask of the array as one mask for each chunk, flat, in the order of the stored elements."""
    spec = leaf.spec
    for index in np.ndindex(*spec.grid):
        where = tuple(
            slice(at * size, (at + 1) * size) for at, size in zip(index, spec.chunk_shape, strict=True)
        )
        yield wanted[where].reshape(-1)


def touched_bytes(leaf: jaxckpt.StoredLeaf, wanted: np.ndarray) -> int:
    """Bytes of the checksum blocks that hold an element of a mask."""
    per_block = BLOCK_BYTES // leaf.spec.stored_itemsize
    total = 0
    for bits in chunk_masks(leaf, wanted):
        for first in range(0, bits.size, per_block):
            block = bits[first : first + per_block]
            total += block.size * leaf.spec.stored_itemsize if block.any() else 0
    return total


def stored_ranges(leaf: jaxckpt.StoredLeaf, wanted: np.ndarray) -> int:
    """How many contiguous ranges of stored bytes a mask makes up."""
    edges = [np.diff(bits.astype(np.int8), prepend=0) for bits in chunk_masks(leaf, wanted)]
    return sum(int(np.count_nonzero(edge == 1)) for edge in edges)


@pytest.mark.slow
@needs_counters
@pytest.mark.parametrize("name", INDICES)
def test_a_part_reads_the_blocks_that_hold_it(saved_matrix: tuple[jaxckpt.Checkpoint, np.ndarray], name: str):
    checkpoint, values = saved_matrix
    index = INDICES[name]
    before, reported = kernel_bytes_read(), checkpoint.bytes_read
    part = checkpoint["w"][index]
    counted, reported = kernel_bytes_read() - before, checkpoint.bytes_read - reported
    assert_same_leaf(part, values[index])
    assert reported <= counted <= reported + NOISE_BYTES
    wanted = np.zeros(values.shape, bool)
    wanted[index] = True
    # Packed chunks end with padding; between the rows of a short step there may be a block at the end of a chunk.
    exact = touched_bytes(checkpoint["w"], wanted)
    chunks = checkpoint["w"].spec.chunk_count
    is_strided = "every" in name or "some" in name
    assert exact <= reported <= exact + 4096 * chunks + is_strided * 2 * BLOCK_BYTES * chunks
    needed = int(wanted.sum()) * values.itemsize
    assert reported <= needed + 2 * BLOCK_BYTES * stored_ranges(checkpoint["w"], wanted)


def test_rows_of_more_than_a_block_are_read_alone(path: pathlib.Path):
    values = make_matrix(6, 700_000)
    jaxckpt.save(path, {"w": jnp.asarray(values)})
    checkpoint = jaxckpt.open(path)
    for index in (
        np.s_[::2],
        np.s_[::-3],
        np.s_[1:5:3, 7::600_000],
        np.s_[2:4],
        np.s_[::5, 0],
        np.s_[4:1:-1, :3],
    ):
        before = checkpoint.bytes_read
        part = checkpoint["w"][index]
        assert_same_leaf(part, values[index])
        wanted = np.zeros(values.shape, bool)
        wanted[index] = True
        assert checkpoint.bytes_read - before == touched_bytes(checkpoint["w"], wanted)


# --- values as NumPy indexes them -----------------------------------------------------------------------------

TREE_ARRAYS: dict[str, Callable[[], Any]] = {
    "cube": lambda: np.arange(5 * 6 * 7, dtype=np.int16).reshape(5, 6, 7),
    "scalar": lambda: np.array(3.5, np.float32),
    "empty": lambda: np.zeros((3, 0, 2), np.int8),
    "one": lambda: np.ones((1, 1), np.bool_),
    "structured": lambda: np.array([(1, 2.0), (3, 4.0), (5, 6.0)], [("a", "<i4"), ("b", "<f8")]),
    "swapped": lambda: np.arange(12, dtype=">f4").reshape(3, 4),
    "text": lambda: np.array([["a", "bcd"], ["", "é"]]),
    "dates": lambda: np.arange("2020-01", "2020-07", dtype="datetime64[M]"),
    "fortran": lambda: np.asfortranarray(np.arange(12.0).reshape(3, 4)),
    "bfloat16": lambda: np.asarray(jnp.arange(40, dtype=jnp.bfloat16).reshape(8, 5)),
    "int4": lambda: np.asarray(jnp.arange(-8, 8, dtype=jnp.int8).astype(jnp.int4).reshape(4, 4)),
    "long": lambda: np.arange(100_000, dtype=np.float64).reshape(50, 2000),
}


@pytest.fixture(scope="module")
def saved_arrays(tmp_path_factory: pytest.TempPathFactory):
    """An open checkpoint of arrays of many kinds, with chunks of many shapes."""
    path = tmp_path_factory.mktemp("arrays") / "checkpoint"
    arrays = {name: make() for name, make in TREE_ARRAYS.items()}
    mesh = make_mesh({"a": 4, "b": 2})
    tree: dict[str, Any] = dict(arrays)
    tree["sharded"] = jax.device_put(
        jnp.arange(16 * 6 * 3.0).reshape(16, 6, 3), NamedSharding(mesh, P("a", "b"))
    )
    tree["cut"] = jnp.arange(24 * 50).reshape(24, 50)
    arrays |= {name: np.asarray(tree[name]) for name in ("sharded", "cut")}
    jaxckpt.save(path, tree, options=jaxckpt.SaveOptions(chunk_bytes_max=2000, pack_bytes_max=500))
    whole = path.with_name("whole")
    jaxckpt.save(whole, tree)
    return jaxckpt.open(path), jaxckpt.open(whole), arrays


@pytest.mark.slow
@SETTINGS
@pytest.mark.parametrize("name", [*TREE_ARRAYS, "sharded", "cut"])
@given(data=st.data())
def test_basic_indexing_is_that_of_numpy(saved_arrays: Any, name: str, data: st.DataObject):
    cut, whole, arrays = saved_arrays
    index = data.draw(basic_indices(arrays[name].shape, allow_newaxis=False))
    want = arrays[name][index]
    for checkpoint in (cut, whole):
        got = checkpoint[name][index]
        if isinstance(want, np.ndarray):
            assert_same_leaf(got, want, f"{name}[{index}]")
        else:
            assert type(got) is type(want)
            assert np.asarray(got).tobytes() == np.asarray(want).tobytes()


def test_integers_of_any_type_index_a_leaf(saved_arrays: Any):
    checkpoint, _, arrays = saved_arrays
    for place in (2, np.int8(2), np.array(2), jnp.asarray(2)):
        assert np.array_equal(checkpoint["cube"][place], arrays["cube"][2])
        assert np.array_equal(checkpoint["cube"][:place], arrays["cube"][:2])


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (5, "index 5 is out of bounds for axis 0 with size 5"),
        ((0, -7), "index -7 is out of bounds for axis 1 with size 6"),
        ((0, 0, 0, 0), "4 indices for an array of rank 3"),
        ((..., 0, ...), "only one ellipsis"),
        (True, "only integers, slices and ... index a stored leaf, not bool"),
        (None, "not NoneType"),
        (1.0, "not float"),
        ([0, 1], "not list"),
        (np.array([0, 1]), "not ndarray"),
        ((..., np.array([True, False])), "not ndarray"),
    ],
)
def test_other_indices_are_refused(saved_arrays: Any, index: Any, message: str):
    with pytest.raises(IndexError, match=message):
        saved_arrays[0]["cube"][index]


def test_an_index_of_strings_is_that_of_python(path: pathlib.Path):
    text = "äbc" * 9000
    jaxckpt.save(path, {"text": text, "bytes": bytes(range(256)) * 200, "n": 7})
    checkpoint = jaxckpt.open(path)
    assert checkpoint["text"][...] == text
    assert checkpoint["text"][5:9] == text[5:9]
    assert checkpoint["bytes"][-1] == 255
    assert checkpoint["n"][()] == 7
    with pytest.raises(IndexError, match="is a scalar"):
        checkpoint["n"][0]


# --- damage ---------------------------------------------------------------------------------------------------


def flip_bit(path: pathlib.Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 4
    path.write_bytes(data)


def test_damage_is_found_in_the_blocks_that_are_read_and_elsewhere_does_not_matter(path: pathlib.Path):
    values = make_matrix(2048, 1024)
    jaxckpt.save(path, {"w": jnp.asarray(values)})
    (chunk,) = path.glob("data-*/arrays/w/c.0.0")
    flip_bit(chunk, 3 * MIB + 17)  # rows 768 to 1023
    checkpoint = jaxckpt.open(path)
    for index in (np.s_[:768], np.s_[1024:], np.s_[10], np.s_[::1024]):
        assert_same_leaf(checkpoint["w"][index], values[index])
    for index in (np.s_[900], np.s_[1023:1025], np.s_[:, 3], np.s_[::-1147], np.s_[...]):
        with pytest.raises(jaxckpt.CorruptError, match="byte 3145728") as caught:
            checkpoint["w"][index]
        assert [problem.key for problem in caught.value.problems] == ["w"]


def test_damage_of_a_leaf_that_is_not_selected_does_not_matter(path: pathlib.Path):
    tree = {name: jnp.asarray(make_matrix(64, 64, number)) for number, name in enumerate("abc")}
    jaxckpt.save(path, tree)
    (pack,) = path.glob("data-*/packs/0-0")
    flip_bit(pack, 64 * 64 * 4 + 1)  # in b
    assert_same_tree(jaxckpt.restore(path, select=["a", "c"]), {"a": tree["a"], "c": tree["c"]})
    assert_same_leaf(jaxckpt.open(path)["c"][3:5], np.asarray(tree["c"])[3:5])
    for attempt in (lambda: jaxckpt.restore(path), lambda: jaxckpt.open(path)["b"][0]):
        with pytest.raises(jaxckpt.CorruptError) as caught:
            attempt()
        assert [problem.key for problem in caught.value.problems] == ["b"]


@pytest.mark.parametrize(
    ("rows", "are_in_place"),
    [
        ([(0, 1024), (1024, 2048), (2048, 4096)], True),
        ([(2048, 4096), (0, 1024)], True),
        ([(1024, 2048)], True),
        ([(0, 1000), (1000, 4096)], False),  # they share a block
        ([(0, 2048), (1024, 4096)], False),  # and some rows
    ],
)
def test_rows_of_an_array_that_was_saved_whole_are_read_to_where_they_stay(
    path: pathlib.Path, rows: list[tuple[int, int]], are_in_place: bool
):
    value = make_matrix(4096, 1024)
    jaxckpt.save(path, {"w": value})
    checkpoint = jaxckpt.open(path)
    boxes = [((first, 0), (last, 1024)) for first, last in rows]
    plan = plan_reads(checkpoint.index, [(0, boxes)], 2 * MIB)
    assert all((unit.in_place is not None) == are_in_place for unit in plan.units)
    assert all(unit.length <= 2 * MIB for unit in plan.units)
    for (first, last), part in zip(rows, checkpoint.read_boxes(0, boxes), strict=True):
        assert part.buffer is not None
        assert np.array_equal(part.buffer.view(value.dtype).reshape(-1, 1024), value[first:last])


# --- how many threads read ------------------------------------------------------------------------------------


class StoreOfKnownPlace:
    """A local store whose objects are in memory, or are not; it knows which threads have read."""

    def __init__(self, store: Store, *, is_in_memory: bool, together: int) -> None:
        self._store = store
        self._is_in_memory = is_in_memory
        self._together = threading.Barrier(together)
        self.threads: set[int] = set()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def is_in_memory(self, name: str, offset: int, length: int) -> bool:
        del name, offset, length
        return self._is_in_memory

    def read_steps(self, name: str, offset: int, buffer: Buffer) -> Iterator[int]:
        if threading.get_ident() not in self.threads:
            self.threads.add(threading.get_ident())
            self._together.wait(60)
        yield from self._store.read_steps(name, offset, buffer)


@pytest.mark.parametrize("is_in_memory", [True, False])
def test_more_threads_than_processors_read_only_what_is_not_in_memory(path: pathlib.Path, is_in_memory: bool):
    processors = processor_count()
    allowed = processors + 3
    value = make_matrix(2 * allowed * 256, 1024)
    checkpoint = open_saved(path, value)
    expected = processors if is_in_memory else allowed
    store = StoreOfKnownPlace(checkpoint.store, is_in_memory=is_in_memory, together=expected)
    plan = plan_reads(checkpoint.index, [(0, [((0, 0), value.shape)])], MIB)
    executor = ReadExecutor(cast("Store", store), checkpoint.manifest, threads=allowed)
    executor.read(plan)
    executor.raise_problems("read")
    assert len(store.threads) == expected
    (destination,) = plan.destinations
    assert destination.buffer is not None
    assert np.array_equal(destination.buffer.view(value.dtype).reshape(value.shape), value)


def open_saved(path: pathlib.Path, value: np.ndarray) -> jaxckpt.Checkpoint:
    jaxckpt.save(path, {"w": value}, options=UNPACKED)
    return jaxckpt.open(path)


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="the cache cannot be emptied here")
def test_what_was_read_is_in_memory_and_what_was_forgotten_is_not(tmp_path: pathlib.Path):
    store = LocalStore(str(tmp_path))
    store.put("object", bytes(4 * MIB))
    descriptor = os.open(tmp_path / "object", os.O_RDONLY)
    try:
        assert os.pread(descriptor, 4 * MIB, 0) == bytes(4 * MIB)
        if not store.is_in_memory("object", 0, 4 * MIB):
            pytest.skip("this kernel does not say what it caches")
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)
    if not is_file_system_of_memory(tmp_path):
        assert not store.is_in_memory("object", 0, 4 * MIB)


def is_file_system_of_memory(path: pathlib.Path) -> bool:
    number = f"{os.major(path.stat().st_dev)}:{os.minor(path.stat().st_dev)}"
    mounts = pathlib.Path("/proc/self/mountinfo").read_text().splitlines()
    return any(line.split()[2] == number and " - tmpfs " in line for line in mounts)
