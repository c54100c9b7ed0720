"""Files of safetensors: against the package both ways, against damage, and straight onto devices.

A parser of thirty lines in this file says what a file holds where the package must not be the only judge.
"""

from __future__ import annotations

import errno
import json
import math
import os
import pathlib
import tracemalloc
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

import jaxckpt
from jaxckpt import CorruptError, ExistsError, MismatchError, NotFoundError, UnsupportedLeafError
from jaxckpt._cli import main
from jaxckpt._converting import convert
from jaxckpt._progress import ProgressMeter
from jaxckpt._store import LocalStore
from jaxckpt.interop import safetensors, tensorflow
from jaxckpt.interop._headers import INDEX_NAME
from jaxckpt.interop._tensorfiles import plan_tensors, split_tensors, write_files

from .helpers import assert_same_tree, make_mesh, run_program
from .processes import Worker, run_processes
from .storage_faults import RefusingKernel

core = pytest.importorskip("safetensors")
package = pytest.importorskip("safetensors.numpy")

SETTINGS = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
    database=None,
)

# The package's own loader for NumPy knows these.
COMMON = ("bool", "uint8", "int8", "int16", "uint16", "float16", "int32", "uint32", "float32")
COMMON += ("float64", "int64", "uint64", "bfloat16")
SMALL_FLOATS = ("float8_e5m2", "float8_e4m3fn", "float8_e8m0fnu", "float8_e4m3fnuz", "float8_e5m2fnuz")
ALL_DTYPES = (*COMMON, *SMALL_FLOATS, "complex64")


def make_array(dtype: str, shape: tuple[int, ...], seed: int = 0) -> np.ndarray[Any, Any]:
    """Random bits; of booleans, random booleans."""
    wanted = np.dtype(getattr(ml_dtypes, dtype, dtype))
    random = np.random.default_rng(seed)
    if dtype == "bool":
        return random.integers(0, 2, shape).astype(bool)
    raw = random.integers(0, 256, (*shape, wanted.itemsize), np.uint8)
    return raw.view(wanted).reshape(shape)


def parse(path: pathlib.Path) -> tuple[dict[str, Any], bytes]:
    """The header and the bytes behind it."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def with_header(path: pathlib.Path, header: Any, body: bytes) -> pathlib.Path:
    """A file with any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)
    return path


@pytest.fixture
def path(tmp_path: pathlib.Path) -> pathlib.Path:
    return tmp_path / "model.safetensors"


TREE = {
    "model": {
        "layers": [
            {"w": np.arange(24, dtype=np.float32).reshape(4, 6), "b": np.ones(3, ml_dtypes.bfloat16)},
            {"w": np.arange(24, dtype=np.float32).reshape(4, 6) + 1, "b": np.zeros(3, ml_dtypes.bfloat16)},
        ]
    },
    "step": np.int64(7),
}
NAMES = {"model.layers.0.w", "model.layers.0.b", "model.layers.1.w", "model.layers.1.b", "step"}


# --- against the package --------------------------------------------------------------------------------------


@SETTINGS
@given(
    arrays=st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8).filter(
            lambda name: not set(name) & set("/~.") and not name.isdigit()
        ),
        st.tuples(st.sampled_from(COMMON), st.lists(st.integers(0, 4), max_size=4).map(tuple)),
        min_size=1,
        max_size=6,
    ),
    metadata=st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=1),
)
def test_a_file_has_the_header_and_the_bytes_that_the_package_writes(
    tmp_path_factory: pytest.TempPathFactory, arrays: Any, metadata: dict[str, str]
):
    folder = tmp_path_factory.mktemp("files")
    tree = {name: make_array(dtype, shape) for name, (dtype, shape) in arrays.items()}
    package.save_file(tree, folder / "theirs", metadata=metadata or None)
    safetensors.write(folder / "ours.safetensors", tree, metadata=metadata)
    (header, body), (their_header, their_body) = map(parse, (folder / "ours.safetensors", folder / "theirs"))
    assert list(header.items()) == list(their_header.items())
    assert body == their_body
    # The elements begin where JAX takes mapped memory without a copy.
    assert ((folder / "ours.safetensors").stat().st_size - len(body)) % 64 == 0


@pytest.mark.parametrize("dtype", COMMON)
def test_the_package_reads_what_is_written_and_what_it_writes_is_read(path: pathlib.Path, dtype: str):
    tree = {"a": make_array(dtype, (3, 5)), "empty": make_array(dtype, (0, 2)), "one": make_array(dtype, ())}
    safetensors.write(path, tree)
    theirs = package.load_file(path)
    assert {name: (array.dtype, array.shape, array.tobytes()) for name, array in theirs.items()} == {
        name: (array.dtype, array.shape, array.tobytes()) for name, array in tree.items()
    }
    package.save_file(tree, path)
    with safetensors.open(path) as checkpoint:
        assert checkpoint.shapes() == {name: array.shape for name, array in tree.items()}
        for name, array in tree.items():
            assert checkpoint[name].dtype == array.dtype
            assert checkpoint[name][...].tobytes() == array.tobytes()


@pytest.mark.parametrize("dtype", [*SMALL_FLOATS, "complex64", "bfloat16"])
def test_the_core_of_the_package_has_the_same_types(path: pathlib.Path, dtype: str):
    """Its loader for NumPy lacks some of them, its core has all."""
    array = make_array(dtype, (3, 8))
    safetensors.write(path, {"a": array})
    ((name, found),) = core.deserialize(path.read_bytes())
    assert (name, found["shape"], bytes(found["data"])) == ("a", [3, 8], array.tobytes())
    spec = core.TensorSpec(dtype=dtype, shape=[3, 8], data_ptr=array.ctypes.data, data_len=array.nbytes)
    path.write_bytes(bytes(core.serialize({"a": spec}, None)))
    assert parse(path)[0]["a"]["dtype"] == found["dtype"]
    with safetensors.open(path) as checkpoint:
        assert checkpoint["a"].dtype == array.dtype
        assert checkpoint["a"][...].tobytes() == array.tobytes()


@pytest.mark.parametrize("dtype", ALL_DTYPES)
def test_every_type_comes_back_bit_for_bit(path: pathlib.Path, dtype: str):
    array = make_array(dtype, (7, 4, 3))
    safetensors.write(path, {"a": array})
    header, body = parse(path)
    assert header["a"]["data_offsets"] == [0, array.nbytes]
    assert body == array.tobytes()
    with safetensors.open(path) as checkpoint:
        assert checkpoint.dtypes() == {"a": array.dtype}
        assert checkpoint["a"][1:3, :, 2].tobytes() == array[1:3, :, 2].tobytes()
    with jax.enable_x64(True):
        restored = safetensors.read(path)["a"]
    assert isinstance(restored, jax.Array)
    assert np.asarray(restored).tobytes() == array.tobytes()


@pytest.mark.parametrize("name", ["F4", "F6_E2M3", "F6_E3M2"])
def test_types_without_a_whole_byte_are_listed_and_refused(path: pathlib.Path, name: str):
    nbytes = 8 * {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}[name] // 8
    record = {"dtype": name, "shape": [2, 4], "data_offsets": [0, nbytes]}
    with_header(path, {"a": record}, bytes(nbytes))
    with safetensors.open(path) as checkpoint:
        assert checkpoint.describe() == f"a ({name}) [2,4]"
        with pytest.raises(UnsupportedLeafError, match="elements share bytes"):
            checkpoint["a"][...]
        with pytest.raises(UnsupportedLeafError):
            checkpoint.view("a")


# --- names and trees ------------------------------------------------------------------------------------------


def test_names_have_a_dot_for_each_level_of_the_tree_and_lead_back_to_it(path: pathlib.Path):
    safetensors.write(path, TREE, metadata={"format": "np"})
    assert set(package.load_file(path)) == NAMES
    expected = {"model": {"layers": dict(enumerate(TREE["model"]["layers"]))}, "step": TREE["step"]}
    found = safetensors.read(path)
    assert_same_tree(jax.tree.map(np.asarray, found), jax.tree.map(np.asarray, expected))
    like = {**TREE, "step": np.asarray(TREE["step"])}
    assert_same_tree(safetensors.read(path, like=like), like)
    flat = dict.fromkeys(sorted(NAMES), 0)
    flat = {name: package.load_file(path)[name] for name in flat}
    assert_same_tree(safetensors.read(path, like=flat), flat)
    assert set(safetensors.read(path, separator=None)) == NAMES


def test_another_separator_may_stand_in_names(path: pathlib.Path):
    tree = {"a.b": {"c": np.ones(2, np.float32)}}
    safetensors.write(path, tree, separator="/")
    assert list(package.load_file(path)) == ["a.b/c"]
    assert_same_tree(safetensors.read(path, like=tree, separator="/"), tree)
    assert list(safetensors.read(path)) == ["a"]
    with safetensors.open(path, separator="/") as checkpoint:
        assert list(safetensors.read(checkpoint)) == ["a.b"]


def test_rename_and_select_take_names_and_keys(path: pathlib.Path):
    safetensors.write(path, TREE)
    renamed = safetensors.read(path, rename={"model/layers": "blocks"})
    assert sorted(renamed) == ["blocks", "step"]
    assert np.array_equal(renamed["blocks"][1]["w"], TREE["model"]["layers"][1]["w"])
    for old, new in (("model/layers", "decoder/blocks"), ("model.layers", "decoder.blocks")):
        blocks = safetensors.read(path, rename={old: new})["decoder"]["blocks"]
        assert np.array_equal(blocks[1]["w"], TREE["model"]["layers"][1]["w"])
    first = safetensors.read(path, rename={"model.layers.0.w": "first"}, select="model.layers.0.w")
    assert set(first) == {"first"}
    assert set(safetensors.read(path, select="model/layers/0/*")["model"]["layers"][0]) == {"w", "b"}
    biases = safetensors.read(path, select=lambda key: key.endswith(".b"))["model"]["layers"]
    assert {number: set(layer) for number, layer in biases.items()} == {0: {"b"}, 1: {"b"}}


def test_the_arguments_of_restore_do_what_they_do_there(path: pathlib.Path):
    safetensors.write(path, {"w": np.arange(6, dtype=np.float32), "extra": np.ones(1, np.int32)})
    like = {"w": jnp.zeros((2, 3), jnp.bfloat16), "other": jnp.full(2, 7.0)}
    with pytest.raises(MismatchError) as caught:
        safetensors.read(path, like=like)
    assert {problem.key for problem in caught.value.problems} == {"w", "other", "extra"}
    found, report = safetensors.read(
        path,
        like=like,
        cast=True,
        reshape=True,
        missing="keep",
        unexpected="ignore",
        report=True,
        options=jaxckpt.RestoreOptions(io_threads=1, host_bytes_max=1 << 21),
    )
    assert_same_tree(found, {"w": jnp.arange(6, dtype=jnp.bfloat16).reshape(2, 3), "other": like["other"]})
    assert (report.kept, report.ignored, report.cast, report.reshaped) == (
        ("other",),
        ("extra",),
        ("w",),
        ("w",),
    )


def test_a_name_below_another_stands_beside_it(path: pathlib.Path):
    package.save_file({"w": np.ones(2, np.float32), "w.scale": np.zeros(1, np.float32)}, path)
    assert set(safetensors.read(path)) == {"w", "w.scale"}
    renamed = safetensors.read(path, rename={"w": "v"}, select="w")
    assert set(renamed) == {"v"}


@pytest.mark.parametrize("name", ["a/b", "a~b", "", "007", "..", "a..b", ".", "a." * 80, "über.straße"])
def test_any_name_is_read_and_converted_and_comes_back(tmp_path: pathlib.Path, name: str):
    source, ours, back = tmp_path / "s.safetensors", tmp_path / "ours", tmp_path / "b.safetensors"
    package.save_file({name: np.arange(3, dtype=np.int32), "other": np.zeros(1, np.int32)}, source)
    assert set(safetensors.read(source, separator=None)) == {name, "other"}
    assert len(jax.tree.leaves(safetensors.read(source))) == 2
    assert convert(source, ours).ok
    assert convert(ours, back, to="safetensors").ok
    assert parse(back) == parse(source)


def test_what_has_no_place_in_the_format_is_listed(path: pathlib.Path):
    tree = {
        "a": {"b": np.ones(2)},
        "a.b": np.ones(2),
        "text": "text",
        "wide": np.ones(2, np.complex128),
        "__metadata__": np.ones(2),
    }
    with pytest.raises(UnsupportedLeafError) as caught:
        safetensors.write(path, tree)
    assert {problem.key for problem in caught.value.problems} >= {"text", "wide", "__metadata__"}
    assert len(caught.value.problems) == 4
    assert not path.exists()
    with pytest.raises(UnsupportedLeafError, match="has no name"):
        safetensors.write(path, np.ones(2))
    with pytest.raises(TypeError, match="texts by name"):
        safetensors.write(path, TREE, metadata={"step": 3})  # type: ignore[dict-item]


# --- devices --------------------------------------------------------------------------------------------------


def test_each_device_gets_its_part_and_no_more_is_read(path: pathlib.Path):
    values = np.arange(512 * 1024, dtype=np.float32).reshape(512, 1024)
    safetensors.write(path, {"w": values, "other": values})
    mesh = make_mesh({"x": 8})
    rows = NamedSharding(mesh, P("x"))
    restored, report = safetensors.read(path, select="w", sharding=rows, report=True)
    assert restored["w"].sharding == rows
    assert np.array_equal(restored["w"], values)
    assert report.bytes_read <= 1.02 * values.nbytes
    with safetensors.open(path) as checkpoint:
        before = checkpoint.bytes_read
        assert np.array_equal(checkpoint["w"][100:200], values[100:200])
        assert checkpoint.bytes_read - before == 100 * 1024 * 4
    columns = NamedSharding(mesh, P(None, "x"))
    assert np.array_equal(safetensors.read(path, sharding=columns)["other"], values)
    restored = safetensors.read(
        path, like={"w": jax.ShapeDtypeStruct((512, 1024), np.float32, sharding=rows)}, unexpected="ignore"
    )
    assert restored["w"].sharding == rows
    assert safetensors.read(path, mesh=mesh)["w"].sharding.mesh == mesh


def read_rows(worker: Worker, path: str) -> None:
    """Restores half of the rows, and reads no more; the kernel counts, too."""
    before = kernel_bytes_read()
    rows = NamedSharding(Mesh(np.array(jax.devices()), ("x",)), P("x"))
    restored, report = safetensors.read(path, select="w", sharding=rows, report=True)
    assert report.bytes_read == 1 << 20
    assert kernel_bytes_read() - before < 1.1 * (1 << 20)
    (shard,) = restored["w"].addressable_shards
    assert np.asarray(shard.data)[0, 0] == jax.process_index() * 256 * 1024


def kernel_bytes_read() -> int:
    text = pathlib.Path("/proc/self/io").read_text()
    return int(text.partition("rchar:")[2].split()[0])


@pytest.mark.slow
def test_each_process_reads_the_bytes_of_its_own_devices(path: pathlib.Path):
    values = np.arange(512 * 1024, dtype=np.float32).reshape(512, 1024)
    safetensors.write(path, {"other": values, "w": values})
    outcomes = run_processes(read_rows, 2, arguments=(str(path),))
    assert [outcome.error_text for outcome in outcomes] == ["", ""]


def test_a_file_larger_than_memory_is_opened_at_once(path: pathlib.Path):
    """A terabyte without blocks on disk."""
    shape = [1 << 18, 1 << 20]
    with_header(path, {"w": {"dtype": "F32", "shape": shape, "data_offsets": [0, 1 << 40]}}, b"")
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size + (1 << 40))
    with safetensors.open(path) as checkpoint:
        assert checkpoint["w"][1 << 17, :3].tolist() == [0, 0, 0]
        assert checkpoint["w"][-1, -1] == 0
        view = checkpoint.view("w")
        assert (view.shape, view[12345, 678]) == (tuple(shape), 0)
        assert checkpoint.bytes_read < 1000


def test_columns_of_wide_rows_are_read_without_what_is_between_them(path: pathlib.Path):
    values = make_array("bfloat16", (16, 1 << 18))
    safetensors.write(path, {"w": values})
    with safetensors.open(path) as checkpoint:
        before = checkpoint.bytes_read
        part = checkpoint["w"][:, 1000 : 1000 + (1 << 16)]
        assert part.tobytes() == values[:, 1000 : 1000 + (1 << 16)].tobytes()
        assert checkpoint.bytes_read - before == part.nbytes


def test_a_box_with_gaps_is_read_in_pieces_whatever_its_first_axes(path: pathlib.Path):
    """The gaps are read with it, and all of them at once would be the whole array."""
    shape = (2, 1 << 15, 1 << 10)
    nbytes = math.prod(shape)
    with_header(path, {"w": {"dtype": "U8", "shape": list(shape), "data_offsets": [0, nbytes]}}, b"")
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size + nbytes)
        file.seek(-nbytes + 5 * shape[2] + 7, os.SEEK_END)
        file.write(b"\x2a")
    with safetensors.open(path) as checkpoint:
        for first in (slice(0, 1), slice(0, 2)):
            box, peak_bytes = traced(lambda first=first: checkpoint["w"][first, :, 7:8])
            assert (box[0, 5, 0], box.sum()) == (42, 42)
            assert peak_bytes < 10 << 20


def test_an_array_is_in_memory_once_beside_its_shards(path: pathlib.Path):
    """What a shard is cut into begins where JAX takes it without another copy."""
    values = make_array("float32", (1 << 11, 1 << 11))
    safetensors.write(path, {"w": values})
    sharding = NamedSharding(make_mesh({"x": 8}), P(None, "x"))
    tree, peak_bytes = traced(lambda: safetensors.read(path, sharding=sharding))
    assert np.asarray(tree["w"]).tobytes() == values.tobytes()
    assert peak_bytes < values.nbytes // 2


def traced(work: Callable[[], Any]) -> tuple[Any, int]:
    """What some work gives, and the most bytes that NumPy had beside mapped memory meanwhile."""
    tracemalloc.start()
    try:
        return work(), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_view_shows_the_file(path: pathlib.Path):
    safetensors.write(path, TREE)
    with safetensors.open(path) as checkpoint:
        before = checkpoint.bytes_read
        view = checkpoint.view("model.layers.1.w")
        assert checkpoint.bytes_read == before
    assert np.array_equal(view, TREE["model"]["layers"][1]["w"])
    before_writing = path.read_bytes()
    view[0, 0] = 77
    assert path.read_bytes() == before_writing


def test_arrays_on_cpu_show_the_file_where_their_places_allow_that(path: pathlib.Path):
    mesh = make_mesh({"x": 4})
    tree = {
        "a": np.arange(64 * 16, dtype=np.float32).reshape(64, 16),
        "b": np.arange(3, dtype=np.float32),  # what is behind it begins at no multiple of 64
        "c": np.arange(32, dtype=np.float32),
    }
    safetensors.write(path, tree)
    restored, report = safetensors.read(path, mmap=True, report=True)
    assert_same_tree(jax.tree.map(np.asarray, restored), tree)
    assert set(report.mapped) == {"a", "b"}
    with safetensors.open(path) as checkpoint:
        header_bytes = checkpoint.bytes_read
        places = [checkpoint.view(name).ctypes.data % 64 for name in "abc"]
    assert places[:2] == [0, 0]
    assert report.bytes_read == tree["c"].nbytes  # `read` counts from when it is open
    assert header_bytes > 0
    rows = NamedSharding(mesh, P("x"))
    restored, report = safetensors.read(path, select="a", sharding=rows, mmap=True, report=True)
    assert (report.mapped, report.bytes_read) == (("a",), 0)
    assert np.array_equal(restored["a"], tree["a"])
    before = path.read_bytes()
    doubled = jax.jit(lambda x: x * 2, donate_argnums=0)(restored["a"])
    assert np.array_equal(doubled, tree["a"] * 2)
    assert path.read_bytes() == before
    like = {"a": np.zeros((64, 16), np.float32)}
    arrays = safetensors.read(path, like=like, unexpected="ignore", mmap=True)
    arrays["a"][0, 0] = 5
    assert path.read_bytes() == before


def test_what_the_package_writes_is_restored_with_mmap_from_any_place(tmp_path: pathlib.Path):
    for length in range(1, 20):  # of the name, and so of the header
        name = "n" * length
        values = {name: np.arange(100, dtype=np.float32) + length}
        package.save_file(values, tmp_path / "a.safetensors")
        restored = safetensors.read(tmp_path / "a.safetensors", mmap=True)
        assert_same_tree(jax.tree.map(np.asarray, restored), values)
        package.save_file({"other": np.zeros(1)}, tmp_path / "b.safetensors")


# --- object stores --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shard_bytes_max", [None, 1000])
def test_an_object_store_is_a_place_like_others(tmp_path: pathlib.Path, shard_bytes_max: int | None):
    place = f"memory://safetensors-{shard_bytes_max}/models/m"
    tree = {f"w{number}": np.full(100, number, np.float32) for number in range(7)}
    safetensors.write(place, tree, shard_bytes_max=shard_bytes_max)
    with pytest.raises(ExistsError):
        safetensors.write(place, tree, shard_bytes_max=shard_bytes_max)
    safetensors.write(place, tree, shard_bytes_max=shard_bytes_max, overwrite=True)
    assert_same_tree(safetensors.read(place, like=tree), tree)
    with safetensors.open(place) as checkpoint:
        before = checkpoint.bytes_read
        assert checkpoint["w3"][5:8].tolist() == [3, 3, 3]
        assert checkpoint.bytes_read - before == 12
        assert checkpoint.view("w3") is None
    assert convert(place, tmp_path / "ours").ok
    assert convert(tmp_path / "ours", f"{place}/single.safetensors").ok
    assert_same_tree(safetensors.read(f"{place}/single.safetensors", like=tree, mmap=True), tree)
    for missing in ("memory://safetensors/nowhere.safetensors", "memory://safetensors/nowhere"):
        assert not safetensors.can_read(missing)


def test_arrays_of_devices_are_written(path: pathlib.Path):
    mesh = make_mesh({"x": 4, "y": 2})
    values = np.arange(64 * 16, dtype=np.float32).reshape(64, 16)
    tree = {
        "sharded": jax.device_put(values, NamedSharding(mesh, P("x", "y"))),
        "key": jax.random.key(3),
        "number": 3,
    }
    safetensors.write(path, tree)
    theirs = package.load_file(path)
    assert np.array_equal(theirs["sharded"], values)
    assert np.array_equal(theirs["key"], jax.random.key_data(tree["key"]))
    assert theirs["number"] == np.int64(3)


# --- several files --------------------------------------------------------------------------------------------


def test_shards_hold_no_more_than_was_asked_and_the_index_says_what_is_where(tmp_path: pathlib.Path):
    tree = {f"w{number}": np.full(100, number, np.float32) for number in range(7)}
    safetensors.write(tmp_path / "m", tree, shard_bytes_max=1000, metadata={"format": "pt"})
    files = sorted(each.name for each in (tmp_path / "m").iterdir())
    assert files == [
        *(f"model-{number:05d}-of-00004.safetensors" for number in range(1, 5)),
        "model.safetensors.index.json",
    ]
    index = json.loads((tmp_path / "m" / files[-1]).read_text())
    assert index["metadata"] == {"total_size": 2800}
    for name, file in index["weight_map"].items():
        assert np.array_equal(package.load_file(tmp_path / "m" / file)[name], tree[name])
    for given_path in (tmp_path / "m", tmp_path / "m" / files[-1]):
        with safetensors.open(given_path) as checkpoint:
            assert checkpoint.metadata == {"format": "pt"}
            assert set(checkpoint.keys()) == set(tree)
        assert_same_tree(safetensors.read(given_path, like=tree), tree)


def test_a_single_tensor_may_be_larger_than_a_shard(tmp_path: pathlib.Path):
    tree = {"a": np.ones(10, np.float32), "b": np.ones(1000, np.float32), "c": np.ones(10, np.float32)}
    safetensors.write(tmp_path, tree, shard_bytes_max=100)
    assert_same_tree(safetensors.read(tmp_path, like=tree), tree)
    safetensors.write(tmp_path / "small", {"a": np.ones(3)}, shard_bytes_max=100)
    assert [each.name for each in (tmp_path / "small").iterdir()] == ["model.safetensors"]


@pytest.mark.parametrize("before", [None, 1000])
@pytest.mark.parametrize("after", [None, 500, 1000])
def test_an_overwrite_replaces_files_of_any_number(
    tmp_path: pathlib.Path, before: int | None, after: int | None
):
    old = {f"w{number}": np.full(100, number, np.float32) for number in range(7)}
    new = {f"v{number}": np.full(100, number + 10, np.float32) for number in range(7)}
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text("{}")
    safetensors.write(tmp_path / "m", old, shard_bytes_max=before)
    with pytest.raises(ExistsError, match="overwrite=True"):
        safetensors.write(tmp_path / "m", new, shard_bytes_max=after)
    assert_same_tree(safetensors.read(tmp_path / "m", like=old), old)
    safetensors.write(tmp_path / "m", new, shard_bytes_max=after, overwrite=True)
    assert_same_tree(safetensors.read(tmp_path / "m", like=new), new)
    files = {each.name for each in (tmp_path / "m").iterdir()}
    expected = {None: 2, 500: 9, 1000: 6}[after]
    assert len(files) == expected
    assert "config.json" in files


@pytest.mark.parametrize("after", [None, 10])
def test_an_overwrite_deletes_no_file_that_it_wrote_and_none_without_tensors(
    tmp_path: pathlib.Path, after: int | None
):
    """Some indexes name ``model.safetensors``, and a damaged one names anything."""
    safetensors.write(tmp_path, {"v": np.zeros(3), "w": np.zeros(3)})
    (tmp_path / "config.json").write_text("{}")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"v": "config.json", "w": "model.safetensors"}}))
    new = {"v": np.ones(3, np.float32), "w": np.ones(3, np.float32)}
    safetensors.write(tmp_path, new, overwrite=True, shard_bytes_max=after)
    assert_same_tree(safetensors.read(tmp_path, like=new), new)
    assert (tmp_path / "config.json").exists()
    index.write_text("[" * 100_000)
    safetensors.write(tmp_path, new, overwrite=True, shard_bytes_max=after)
    assert_same_tree(safetensors.read(tmp_path, like=new), new)


@pytest.mark.parametrize("shard_bytes_max", [0, -1])
def test_shards_of_nothing_are_refused(tmp_path: pathlib.Path, shard_bytes_max: int):
    with pytest.raises(ValueError, match="a number of bytes above 0"):
        safetensors.write(tmp_path / "m", {"w": np.ones(3)}, shard_bytes_max=shard_bytes_max)


@pytest.mark.parametrize("shard_bytes_max", [None, 1000])
def test_a_write_that_storage_refuses_leaves_what_was_there(
    tmp_path: pathlib.Path, shard_bytes_max: int | None
):
    """At each call in turn, until one run goes through."""
    old = {f"w{number}": np.full(100, number, np.float32) for number in range(7)}
    new = {f"v{number}": np.full(100, number + 10, np.float32) for number in range(7)}
    place = tmp_path / "m"
    safetensors.write(place, old, shard_bytes_max=shard_bytes_max)
    before = sorted(each.name for each in place.iterdir())
    files = split_tensors(plan_tensors(new, "m"), shard_bytes_max)
    failures = 0
    while True:
        kernel = RefusingKernel(errno.ENOSPC, at=failures + 1)
        store = LocalStore(str(place), kernel)
        meter = ProgressMeter(0, "write", None)
        try:
            write_files(store, "model.safetensors", files, {}, meter, overwrite=True, has_index=True)
        except OSError:
            failures += 1
        else:
            break
        names = set(safetensors.open(place).keys())
        assert names in (set(old), set(new))
        if names == set(new):  # what was refused came after the commit
            break
        assert set(before) <= {each.name for each in place.iterdir()}
        assert_same_tree(safetensors.read(place, like=old), old)
    assert failures >= 5
    assert set(safetensors.open(place).keys()) == set(new)


# --- damage ---------------------------------------------------------------------------------------------------

GOOD = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("header", "body"),
    [
        (b"", b""),
        (b" {}", b""),
        (b"{", b""),
        (b"[]", b""),
        (b"\xff", b""),
        (b"{" * 100_000, b""),
        (b'{"a":1,"a":2}', b""),
        ({"a": 3}, bytes(8)),
        ({"a": GOOD}, bytes(9)),
        ({"a": GOOD}, bytes(7)),
        ({"a": GOOD, "b": GOOD}, bytes(8)),
        ({"a": {**GOOD, "data_offsets": [4, 12]}}, bytes(12)),
        ({"a": {**GOOD, "data_offsets": [8, 0]}}, bytes(8)),
        ({"a": {**GOOD, "data_offsets": [0, 8, 8]}}, bytes(8)),
        ({"a": {**GOOD, "data_offsets": [-8, 0]}}, bytes(8)),
        ({"a": {**GOOD, "data_offsets": [0, 8.0]}}, bytes(8)),
        ({"a": {**GOOD, "shape": [3]}}, bytes(8)),
        ({"a": {**GOOD, "shape": [-1, -2]}}, bytes(8)),
        ({"a": {**GOOD, "shape": [True, 2]}}, bytes(8)),
        ({"a": {**GOOD, "shape": "2"}}, bytes(8)),
        ({"a": {**GOOD, "shape": [1] * 100 + [2]}}, bytes(8)),
        ({"a": {**GOOD, "shape": [1 << 62, 1 << 62]}}, bytes(8)),
        ({"a": {**GOOD, "dtype": "F31"}}, bytes(8)),
        ({"a": {**GOOD, "dtype": ["F32"]}}, bytes(8)),
        ({"a": GOOD, "__metadata__": {"a": 1}}, bytes(8)),
        ({"a": GOOD, "__metadata__": [1]}, bytes(8)),
    ],
)
def test_a_damaged_header_is_refused(path: pathlib.Path, header: Any, body: bytes):
    with_header(path, header, body)
    with pytest.raises(CorruptError) as caught:
        safetensors.open(path)
    assert str(path) in str(caught.value)
    assert not safetensors.can_read(path)


def test_a_file_that_is_cut_off_anywhere_is_refused(path: pathlib.Path):
    safetensors.write(path, TREE)
    data = path.read_bytes()
    for length in range(len(data)):
        path.write_bytes(data[:length])
        with pytest.raises(CorruptError):
            safetensors.open(path)


@SETTINGS
@given(data=st.data())
def test_no_changed_byte_of_a_header_does_more_than_raise(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
):
    path = tmp_path_factory.mktemp("files") / "a.safetensors"
    safetensors.write(path, TREE, metadata={"a": "b"})
    content = bytearray(path.read_bytes())
    end = 8 + int.from_bytes(content[:8], "little")
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, end - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    try:
        with safetensors.open(path) as checkpoint:
            for key in checkpoint:
                checkpoint[key][...]
    except (CorruptError, UnsupportedLeafError):
        pass


def test_a_header_that_claims_gigabytes_is_refused_before_anything_is_read(path: pathlib.Path):
    path.write_bytes((1 << 40).to_bytes(8, "little") + b"{}")
    with pytest.raises(CorruptError, match="header of 1099511627776 bytes"):
        safetensors.open(path)


def write_shards(folder: pathlib.Path) -> None:
    safetensors.write(folder, {"a": np.ones(10), "b": np.ones(10)}, shard_bytes_max=80)


def remove_a_shard(folder: pathlib.Path) -> None:
    (folder / "model-00002-of-00002.safetensors").unlink()


def lead_outside(folder: pathlib.Path) -> None:
    index = {"weight_map": {"a": "../model-00001-of-00002.safetensors"}}
    (folder / INDEX_NAME).write_text(json.dumps(index))


def name_a_tensor_that_is_not_there(folder: pathlib.Path) -> None:
    index = {"weight_map": {"c": "model-00001-of-00002.safetensors"}}
    (folder / INDEX_NAME).write_text(json.dumps(index))


def leave_out_the_map(folder: pathlib.Path) -> None:
    (folder / INDEX_NAME).write_text("{}")


@pytest.mark.parametrize(
    "damage", [remove_a_shard, lead_outside, name_a_tensor_that_is_not_there, leave_out_the_map]
)
def test_a_damaged_index_is_refused(tmp_path: pathlib.Path, damage: Callable[[pathlib.Path], None]):
    write_shards(tmp_path)
    damage(tmp_path)
    with pytest.raises(CorruptError):
        safetensors.open(tmp_path)


def test_one_of_several_files_without_their_index_is_not_all_of_them(tmp_path: pathlib.Path):
    """So a write leaves a directory that was killed after a file, or after the last one."""
    write_shards(tmp_path)
    (tmp_path / INDEX_NAME).unlink()
    with pytest.raises(NotFoundError, match="is one of several files"):
        safetensors.open(tmp_path)
    remove_a_shard(tmp_path)
    with pytest.raises(NotFoundError, match="is one of several files"):
        safetensors.open(tmp_path)
    assert main(["convert", str(tmp_path), str(tmp_path / "ours")]) == 3
    with safetensors.open(tmp_path / "model-00001-of-00002.safetensors") as checkpoint:
        assert len(checkpoint) == 1
    (tmp_path / "model-00001-of-00002.safetensors").rename(tmp_path / "model-00001-of-00001.safetensors")
    safetensors.open(tmp_path).close()


def test_what_is_not_there_is_not_found(tmp_path: pathlib.Path):
    with pytest.raises(NotFoundError):
        safetensors.open(tmp_path / "nowhere.safetensors")
    with pytest.raises(NotFoundError, match=r"ends in \.safetensors"):
        safetensors.open(tmp_path)
    package.save_file({"a": np.ones(2)}, tmp_path / "one.safetensors")
    assert safetensors.open(tmp_path).keys() == ("a",)
    package.save_file({"a": np.ones(2)}, tmp_path / "two.safetensors")
    with pytest.raises(NotFoundError, match="name one of them"):
        safetensors.open(tmp_path)


def test_damage_in_a_restore_is_one_error(path: pathlib.Path):
    safetensors.write(path, TREE)
    with safetensors.open(path) as checkpoint:
        with path.open("r+b") as file:
            file.truncate(path.stat().st_size - 200)
        with pytest.raises(CorruptError):
            safetensors.read(checkpoint)
    safetensors.write(path, TREE, overwrite=True)
    with pytest.raises(MismatchError):
        safetensors.read(path, like={"nothing": np.ones(2)})


# --- conversions ----------------------------------------------------------------------------------------------


def test_a_checkpoint_goes_there_and_back(tmp_path: pathlib.Path):
    mesh = make_mesh({"x": 8})
    tree = {
        "layers": [
            {"w": jax.device_put(jnp.arange(32.0).reshape(8, 4), NamedSharding(mesh, P("x")))},
            {"w": jnp.ones((8, 4), jnp.bfloat16)},
        ],
        "scale": np.ones(2, ml_dtypes.float8_e4m3fn),
    }
    jaxckpt.save(tmp_path / "ours", tree, metadata={"format": "pt"})
    found = convert(tmp_path / "ours", tmp_path / "m.safetensors", to="safetensors")
    assert (found.ok, found.leaves, found.source_format) == (True, 3, "jaxckpt")
    assert safetensors.open(tmp_path / "m.safetensors").metadata == {"format": "pt"}
    found = convert(tmp_path / "m.safetensors", tmp_path / "again")
    assert (found.ok, found.source_format) == (True, "safetensors")
    checkpoint = jaxckpt.open(tmp_path / "again")
    assert checkpoint.metadata == {"format": "pt"}
    assert set(checkpoint.keys()) == {"layers/0/w", "layers/1/w", "scale"}
    restored = jaxckpt.restore(tmp_path / "again", like=tree)
    assert_same_tree(jax.tree.map(np.asarray, restored), jax.tree.map(np.asarray, tree))


def test_the_command_converts_with_names_and_types(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
):
    safetensors.write(tmp_path / "m.safetensors", TREE)
    arguments = [
        str(tmp_path / "m.safetensors"),
        str(tmp_path / "ours"),
        "--select",
        "model/*",
        "--rename",
        "model/layers=blocks",
        "--dtype",
        "float16",
    ]
    assert main(["convert", *arguments]) == 0
    assert "verified" in capsys.readouterr().out
    checkpoint = jaxckpt.open(tmp_path / "ours")
    assert set(checkpoint.keys()) == {"blocks/0/w", "blocks/0/b", "blocks/1/w", "blocks/1/b"}
    assert set(map(str, checkpoint.dtypes().values())) == {"float16"}


def test_tensorflow_becomes_safetensors(tmp_path: pathlib.Path):
    tensorflow.write(tmp_path / "model.ckpt", {"dense": {"kernel": np.ones((2, 3), np.float32)}})
    assert convert(tmp_path / "model.ckpt", tmp_path / "m.safetensors", to="safetensors").ok
    assert set(package.load_file(tmp_path / "m.safetensors")) == {"dense.kernel"}


def test_the_package_is_not_needed(tmp_path: pathlib.Path):
    run_program(
        """
        import sys
        import numpy as np
        from jaxckpt.interop import safetensors
        safetensors.write(sys.argv[1], {"a": np.ones(3)})
        assert safetensors.read(sys.argv[1])["a"].shape == (3,)
        assert safetensors.open(sys.argv[1])["a"][1] == 1
        assert "safetensors" not in sys.modules
        """,
        tmp_path / "a.safetensors",
    )
