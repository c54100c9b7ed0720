"""Msgpack files of Flax: against Flax both ways, lazily, and against damage."""

from __future__ import annotations

import collections
import pathlib
import tracemalloc
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import msgpack
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from jax.sharding import NamedSharding, PartitionSpec as P

import jaxckpt
from jaxckpt import CorruptError, ExistsError, NotFoundError, UnsupportedLeafError
from jaxckpt._cli import main
from jaxckpt._converting import convert
from jaxckpt.interop import flax
from jaxckpt.interop._packing import pieces_of, plan_parts

from .helpers import assert_same_tree, make_mesh, run_program

serialization = pytest.importorskip("flax.serialization")

SETTINGS = settings(
    max_examples=80,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
    database=None,
)

DTYPES = ("bool", "int8", "uint16", "int32", "int64", "uint64", "float16", "float32", "float64")
DTYPES += ("bfloat16", "float8_e4m3fn", "complex64", "complex128")


def make_array(dtype: str, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    wanted = np.dtype(getattr(ml_dtypes, dtype, dtype))
    random = np.random.default_rng(0)
    if dtype == "bool":
        return random.integers(0, 2, shape).astype(bool)
    return random.integers(0, 200, (*shape, wanted.itemsize), np.uint8).view(wanted).reshape(shape)


TREE = {
    "params": {"dense": {"kernel": make_array("float32", (4, 6)), "bias": make_array("bfloat16", (6,))}},
    "opt": [make_array("float32", (4, 6)), make_array("int32", ())],
    "step": 7,
}


@pytest.fixture
def path(tmp_path: pathlib.Path) -> pathlib.Path:
    return tmp_path / "state.msgpack"


VALUES = st.one_of(
    st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 5), max_size=4).map(tuple)).map(
        lambda pair: make_array(*pair)
    ),
    st.integers(-(1 << 63), (1 << 64) - 1),
    st.floats(),
    st.booleans(),
    st.none(),
    st.just({}),
    st.sampled_from([np.float32(2.5), np.int8(3), np.complex64(1j)]),
    st.text(max_size=40),
    st.binary(max_size=40),
    st.complex_numbers(),
)


@SETTINGS
@given(arrays=st.dictionaries(st.text(st.characters(categories=["L", "N"]), min_size=1), VALUES, max_size=8))
def test_a_file_is_what_flax_packs(tmp_path_factory: pytest.TempPathFactory, arrays: dict[str, Any]):
    path = tmp_path_factory.mktemp("files") / "a"
    arrays = dict(sorted(arrays.items()))  # as JAX has the keys of dicts
    tree = {"array": np.arange(3), "inner": arrays}
    flax.write(path, tree)
    assert path.read_bytes() == serialization.to_bytes(tree)
    checkpoint = flax.open(path)
    for name, value in arrays.items():
        if value is None or isinstance(value, dict):
            assert f"inner/{name}" not in checkpoint
            continue
        found = checkpoint[f"inner/{name}"][...]
        if isinstance(value, np.ndarray):
            assert (found.dtype, found.shape, found.tobytes()) == (value.dtype, value.shape, value.tobytes())
        elif isinstance(value, (str, bytes)):
            assert found == (value.encode() if isinstance(value, str) else value)
        else:
            assert np.array_equal(found, np.asarray(value), equal_nan=True)


def from_flax(target: Any, path: pathlib.Path) -> Any:
    """What Flax itself restores."""
    return on_host(serialization.from_bytes(target, path.read_bytes()))


def on_host(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: np.asarray(leaf) if isinstance(leaf, jax.Array) else leaf, tree)


def test_a_state_with_an_optimizer_goes_to_flax_and_back(path: pathlib.Path):
    """Namedtuples, empty ones, masked leaves and dataclasses: what a `TrainState` with Optax is made of."""
    optax = pytest.importorskip("optax")
    train_state = pytest.importorskip("flax.training.train_state")
    params = {"dense": {"kernel": jnp.ones((2, 3), jnp.bfloat16)}, "frozen": {"b": jnp.zeros(3)}}
    tx = optax.chain(
        optax.clip(1.0),
        optax.masked(optax.adam(1e-3), {"dense": {"kernel": True}, "frozen": {"b": False}}),
    )
    state = train_state.TrainState.create(apply_fn=None, params=params, tx=tx)
    flax.write(path, state)
    empty = jax.tree.map(jnp.zeros_like, state)
    assert_same_tree(from_flax(empty, path), on_host(state))
    path.write_bytes(serialization.to_bytes(state))
    assert_same_tree(flax.read(path, like=state), state)
    jaxckpt.save(path.parent / "ours", state)
    assert convert(path.parent / "ours", path.parent / "b.msgpack").ok
    assert_same_tree(from_flax(empty, path.parent / "b.msgpack"), on_host(state))


def test_slashes_within_names_are_kept_apart_from_those_between_them(path: pathlib.Path):
    tree = {
        "a/b": {"w": np.ones(2, np.float32)},
        "a": {"b": {"w": np.zeros(1, np.float32)}},
        "~": np.ones(1, np.int8),
    }
    path.write_bytes(serialization.to_bytes(tree))
    assert_same_tree(flax.read(path, like=tree), tree)
    assert_same_tree(jax.tree.map(np.asarray, flax.read(path)), tree)
    flax.write(path, tree, overwrite=True)
    assert_same_tree(serialization.from_bytes(tree, path.read_bytes()), tree)
    assert convert(path, path.parent / "ours").ok
    assert_same_tree(jaxckpt.restore(path.parent / "ours", like=tree), tree)


def test_msgpack_serialize_packs_lists_too(path: pathlib.Path):
    tree = {"layers": [np.ones(2, np.float32), {"w": np.zeros(3, np.int32)}], "3": np.ones(1, np.int8)}
    path.write_bytes(serialization.msgpack_serialize(tree))
    with flax.open(path) as checkpoint:
        assert set(checkpoint.keys()) == {"layers/0", "layers/1/w", "3"}
    assert_same_tree(
        flax.read(path, like={"layers": tree["layers"]}, unexpected="ignore")["layers"], tree["layers"]
    )


def test_flax_restores_what_is_written(path: pathlib.Path):
    flax.write(path, TREE)
    restored = serialization.from_bytes(TREE, path.read_bytes())
    assert_same_tree(restored, TREE)


def test_what_flax_packs_is_restored_onto_devices(path: pathlib.Path):
    path.write_bytes(serialization.to_bytes(TREE))
    assert flax.can_read(path)
    like = {**jax.tree.map(jnp.asarray, TREE), "step": 0}
    assert_same_tree(flax.read(path, like=like), {**like, "step": 7})
    nested = flax.read(path)
    assert set(nested) == {"params", "opt", "step"}
    assert set(nested["opt"]) == {0, 1}
    assert nested["step"] == 7
    renamed = flax.read(path, rename={"params/dense": "model"}, select="params/*")
    assert set(renamed["model"]) == {"kernel", "bias"}
    mesh = make_mesh({"x": 4})
    rows = NamedSharding(mesh, P("x"))
    kernel = flax.read(path, select="params/dense/kernel", sharding=rows)["params"]["dense"]["kernel"]
    assert kernel.sharding == rows
    assert np.array_equal(kernel, TREE["params"]["dense"]["kernel"])


def test_a_part_is_read_alone(path: pathlib.Path):
    values = make_array("float32", (4096, 256))
    flax.write(path, {"w": values, "other": values})
    with flax.open(path) as checkpoint:
        before = checkpoint.bytes_read
        assert before < 200_000
        assert checkpoint["w"][10:20].tobytes() == values[10:20].tobytes()
        assert checkpoint.bytes_read - before == 10 * 1024


def test_arrays_in_chunks(path: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
    """With chunks of a KiB on both sides: those of a GiB differ in nothing else."""
    monkeypatch.setattr(serialization, "MAX_CHUNK_SIZE", 1024)
    tree = {"a": make_array("float32", (30, 20)), "b": make_array("bfloat16", (600,))}
    path.write_bytes(serialization.to_bytes(tree))
    theirs = path.read_bytes()
    with flax.open(path) as checkpoint:
        assert checkpoint.shapes() == {"a": (30, 20), "b": (600,)}
        assert checkpoint["a"][3:17, 5].tobytes() == tree["a"][3:17, 5].tobytes()
        assert bytes(checkpoint.stream("b", 1000, 1200)) == tree["b"].tobytes()[1000:1200]
    ours = [piece.tobytes() for part in plan_parts(tree, "", 1024) for piece in pieces_of(part)]
    assert b"".join(ours) == theirs


def test_the_newest_of_a_directory_is_opened(tmp_path: pathlib.Path):
    for step in (9, 10, 2):
        (tmp_path / f"checkpoint_{step}").write_bytes(serialization.to_bytes({"step": step}))
    (tmp_path / "checkpoint_11").mkdir()
    (tmp_path / "checkpoint_12.tmp").write_bytes(b"")
    assert flax.open(tmp_path)["step"][...] == 10
    (tmp_path / "best_3").write_bytes(serialization.to_bytes({"step": 3}))
    assert flax.open(tmp_path, prefix="best_")["step"][...] == 3
    with pytest.raises(NotFoundError, match="Orbax"):
        flax.open(tmp_path, prefix="none_")
    assert flax.open(tmp_path, step=9)["step"][...] == 9
    assert flax.read(tmp_path, {"step": 0}, step=2) == {"step": 2}
    with pytest.raises(NotFoundError, match="has no step 3; it has 2, 9, 10"):
        flax.open(tmp_path, step=3)
    (tmp_path / "best_3").rename(tmp_path / "best_9")
    with pytest.raises(
        NotFoundError, match="several checkpoints of step 9; give the path of one: best_9, checkpoint_9"
    ):
        convert(tmp_path, tmp_path / "ours", step=9)
    (tmp_path / "best_9").unlink()
    assert main(["convert", str(tmp_path), str(tmp_path / "ours"), "--step", "9"]) == 0
    assert jaxckpt.restore(tmp_path / "ours")["step"] == 9


@pytest.mark.filterwarnings("ignore:Flax Checkpointing will soon be deprecated")
def test_what_the_checkpoints_of_flax_leave_is_opened(tmp_path: pathlib.Path):
    checkpoints = pytest.importorskip("flax.training.checkpoints")
    import flax as flax_package

    before = flax_package.config.flax_use_orbax_checkpointing
    flax_package.config.update("flax_use_orbax_checkpointing", False)
    try:
        for step in (1, 3, 20):
            checkpoints.save_checkpoint(tmp_path, {"w": np.full(3, step)}, step, keep=5, overwrite=True)
    finally:
        flax_package.config.update("flax_use_orbax_checkpointing", before)
    latest = checkpoints.latest_checkpoint(tmp_path)
    assert flax.open(tmp_path).path == latest
    assert flax.open(tmp_path)["w"][...].tolist() == [20] * 3
    assert flax.open(tmp_path, step=3)["w"][...].tolist() == [3] * 3
    flax.write(tmp_path / "checkpoint_30", {"w": np.full(3, 30)})
    assert checkpoints.restore_checkpoint(tmp_path, {"w": np.zeros(3)})["w"].tolist() == [30] * 3


def test_what_cannot_be_packed_is_listed(path: pathlib.Path):
    record = np.zeros(2, [("x", "f4")])
    same = collections.OrderedDict([(3, np.ones(2)), ("3", np.ones(2))])
    tree = {"texts": np.asarray(["a", "b"]), "big": 1 << 70, "same": same, "record": record}
    with pytest.raises(UnsupportedLeafError) as caught:
        flax.write(path, tree)
    assert {problem.key for problem in caught.value.problems} == {"texts", "big", "record", "same/~s3"}
    assert not path.exists()
    with pytest.raises(UnsupportedLeafError, match="has no name"):
        flax.write(path, np.ones(2))


def test_what_is_written_is_not_too_deep_to_be_read(path: pathlib.Path):
    def nest(levels: int) -> Any:
        tree: Any = np.arange(3)
        for _ in range(levels):
            tree = {"a": tree}
        return tree

    path.write_bytes(
        b"".join(bytes(each) for part in plan_parts(nest(96), "", 8) for each in pieces_of(part))
    )
    with flax.open(path) as checkpoint:
        assert checkpoint["/".join("a" * 96)][...].tolist() == [0, 1, 2]
    with pytest.raises(UnsupportedLeafError, match="too deep"):
        flax.write(path, nest(97), overwrite=True)


def test_a_file_is_replaced_only_when_that_is_wanted(path: pathlib.Path):
    flax.write(path, {"a": np.ones(2)})
    with pytest.raises(ExistsError):
        flax.write(path, {"b": np.ones(2)})
    flax.write(path, {"b": np.ones(2)}, overwrite=True)
    assert flax.open(path).keys() == ("b",)
    assert [each.name for each in path.parent.iterdir()] == [path.name]


def test_a_file_that_is_cut_off_anywhere_is_refused(path: pathlib.Path):
    data = serialization.to_bytes(TREE)
    for length in range(len(data)):
        path.write_bytes(data[:length])
        with pytest.raises((CorruptError, NotFoundError)):
            flax.open(path)
    path.write_bytes(data + b"\0")
    with pytest.raises(CorruptError):
        flax.open(path)


@SETTINGS
@given(data=st.data())
def test_changed_bytes_do_no_more_than_raise(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject):
    path = tmp_path_factory.mktemp("files") / "a"
    content = bytearray(serialization.to_bytes(TREE))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    try:
        with flax.open(path) as checkpoint:
            for key in checkpoint:
                checkpoint[key][...]
    except (CorruptError, NotFoundError):
        pass


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"text",
        b"\x80\x04K\x01.",
        b"\x81\x01\x02",
        b"\x89HDF",
        b"\xde",
        b"\xdf\0\0\0\1",
        b"\x93\x01\x02\x03",
        b"PK\x03\x04",
    ],
)
def test_other_files_are_not_found_to_be_flax(path: pathlib.Path, data: bytes):
    path.write_bytes(data)
    with pytest.raises(NotFoundError):
        flax.open(path)
    with pytest.raises(NotFoundError if data else CorruptError):  # nothing may be what is left of anything
        convert(path, path.parent / "out")


def test_a_checkpoint_goes_there_and_back(tmp_path: pathlib.Path):
    tree = jax.tree.map(np.asarray, TREE)
    jaxckpt.save(tmp_path / "ours", tree)
    found = convert(tmp_path / "ours", tmp_path / "state", to="flax")
    assert (found.ok, found.leaves) == (True, 5)
    assert_same_tree(serialization.from_bytes(tree, (tmp_path / "state").read_bytes()), tree)
    found = convert(tmp_path / "state", tmp_path / "again")
    assert (found.ok, found.source_format) == (True, "flax")
    assert_same_tree(jaxckpt.restore(tmp_path / "again", like=tree), tree)


def packed_array(shape: Any, name: Any, data: bytes) -> bytes:
    inner = msgpack.packb((shape, name, data))
    return msgpack.packb({"a": msgpack.ExtType(1, inner)})


@pytest.mark.parametrize(
    "data",
    [
        packed_array([2], "float32", bytes(7)),
        packed_array([1 << 40], "float32", bytes(8)),
        packed_array([1 << 62, 1 << 62], "float32", bytes(8)),
        packed_array([-2, -1], "float32", bytes(8)),
        packed_array([True, 2], "float32", bytes(8)),
        packed_array([1] * 70, "float32", bytes(4)),
        packed_array("2", "float32", bytes(8)),
        packed_array([1], "O", bytes(8)),
        packed_array([1], "no type", bytes(8)),
        packed_array([1], 7, bytes(8)),
        packed_array([1], "float32", 4),
        packed_array([1], "float32", "text"),
        packed_array([1], "V1000000000", bytes(8)),
        msgpack.packb({"a": msgpack.ExtType(1, b"")}),
        msgpack.packb({"a": msgpack.ExtType(2, b"\x92\xa1a\x01")}),
        msgpack.packb({"a": msgpack.ExtType(9, b"\x01")}),
        msgpack.packb({"a": {"__msgpack_chunked_array__": True}}),
        msgpack.packb({"__msgpack_chunked_array__": True, "shape": {"0": 1 << 50}, "chunks": {"0": 1}}),
        msgpack.packb({"a": {1.5: 1}}),
        msgpack.packb({"a": {b"a": 1}}),
        b"\x81\xa1a" + b"\x81" * 10_000,
        b"\x81\xa1a" * 400,
        b"\x81\xa1a" + b"\x91" * 1_000,
        b"\xdf\xff\xff\xff\xff\xa1a",
        b"\x81\xa1a\xdd\xff\xff\xff\xff",
        b"\x81\xa1a\xc6\xff\xff\xff\xff",
        b"\x81\xa1a\xc1",
        b"\x82\xa1a\x01\xa1a\x02",
        b"\x81\xa1\xff\x01",
        b"\x81\xa1a\xdd\x00\x11\x00\x00" + bytes(0x110000),
        b"\x81\xa1a" + (b"\x93" * 20 + b"\xdd\x00\x11\x00\x00" + bytes(0x110000)),
    ],
)
def test_a_hostile_file_is_refused_in_little_memory(path: pathlib.Path, data: bytes):
    path.write_bytes(data)
    tracemalloc.start()
    try:
        with pytest.raises(CorruptError) as caught:
            flax.open(path)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("place", ["memory://flax/run", "directory"])
def test_files_are_written_and_read_on_object_stores_as_in_directories(tmp_path: pathlib.Path, place: str):
    place = place if "://" in place else str(tmp_path / place)
    for step in (2, 10):
        flax.write(f"{place}/checkpoint_{step}", {"w": np.full(100, step, np.float32), "step": step})
    assert flax.open(place)["step"][...] == 10
    with flax.open(place, step=2) as checkpoint:
        before = checkpoint.bytes_read
        assert checkpoint["w"][5:7].tolist() == [2, 2]
        assert checkpoint.bytes_read - before == 8
    assert flax.read(place)["w"].shape == (100,)
    assert convert(place, tmp_path / "ours", step=2).ok
    assert jaxckpt.restore(tmp_path / "ours")["step"] == 2


def test_flax_is_not_needed(tmp_path: pathlib.Path):
    run_program(
        """
        import sys
        import numpy as np
        from jaxckpt.interop import flax
        flax.write(sys.argv[1], {"a": np.ones(3)})
        assert flax.read(sys.argv[1])["a"].shape == (3,)
        assert "flax" not in sys.modules
        """,
        tmp_path / "a",
    )
