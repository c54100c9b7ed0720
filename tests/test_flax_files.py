"""Msgpack files of Flax: against Flax both ways, lazily, and against damage."""

from __future__ import annotations

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from jax.sharding import NamedSharding, PartitionSpec as P

import jaxckpt
from jaxckpt import CorruptError, ExistsError, NotFoundError, UnsupportedLeafError
from jaxckpt._converting import convert
from jaxckpt.interop import _packing, flax

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


@SETTINGS
@given(
    arrays=st.dictionaries(
        st.text(st.characters(categories=["L", "N"]), min_size=1, max_size=40),
        st.one_of(
            st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 5), max_size=4).map(tuple)).map(
                lambda pair: make_array(*pair)
            ),
            st.integers(-(1 << 63), (1 << 64) - 1),
            st.floats(),
            st.booleans(),
            st.text(max_size=40),
            st.binary(max_size=40),
            st.complex_numbers(),
        ),
        max_size=20,
    )
)
def test_a_file_is_what_flax_packs(tmp_path_factory: pytest.TempPathFactory, arrays: dict[str, Any]):
    path = tmp_path_factory.mktemp("files") / "a"
    tree = {"inner": arrays, "array": np.arange(3)}
    flax.write(path, tree)
    in_order = jax.tree.unflatten(*reversed(jax.tree.flatten(tree)))
    assert path.read_bytes() == serialization.to_bytes(in_order)
    checkpoint = flax.open(path)
    for name, value in arrays.items():
        found = checkpoint[f"inner/{name}"][...]
        if isinstance(value, np.ndarray):
            assert (found.dtype, found.shape, found.tobytes()) == (value.dtype, value.shape, value.tobytes())
        elif isinstance(value, (str, bytes)):
            assert found == (value.encode() if isinstance(value, str) else value)
        else:
            assert np.array_equal(found, np.asarray(value), equal_nan=True)


def test_flax_restores_what_is_written(path: pathlib.Path):
    flax.write(path, TREE)
    restored = serialization.from_bytes(TREE, path.read_bytes())
    assert_same_tree(restored, TREE)


def test_what_flax_packs_is_restored_onto_devices(path: pathlib.Path):
    path.write_bytes(serialization.to_bytes(TREE))
    assert flax.can_read(path)
    like = jax.tree.map(jnp.asarray, TREE)
    restored = flax.read(path, like=like, cast=True)
    assert_same_tree(restored, like)
    mesh = make_mesh({"x": 4})
    rows = NamedSharding(mesh, P("x"))
    kernel = flax.read(path, select="params/dense/kernel", sharding=rows)["params/dense/kernel"]
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
    monkeypatch.setattr(_packing, "CHUNK_BYTES", 1024)
    monkeypatch.setattr(serialization, "MAX_CHUNK_SIZE", 1024)
    tree = {"a": make_array("float32", (30, 20)), "b": make_array("bfloat16", (600,))}
    path.write_bytes(serialization.to_bytes(tree))
    theirs = path.read_bytes()
    with flax.open(path) as checkpoint:
        assert checkpoint.shapes() == {"a": (30, 20), "b": (600,)}
        assert checkpoint["a"][3:17, 5].tobytes() == tree["a"][3:17, 5].tobytes()
        assert bytes(checkpoint.stream("b", 1000, 1200)) == tree["b"].tobytes()[1000:1200]
    flax.write(path, tree, overwrite=True)
    assert path.read_bytes() == theirs


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


def test_what_cannot_be_packed_is_listed(path: pathlib.Path):
    tree = {"texts": np.asarray(["a", "b"]), "big": 1 << 70, 3: np.ones(2), "3": np.ones(2)}
    with pytest.raises(UnsupportedLeafError) as caught:
        flax.write(path, dict(tree))
    assert len(caught.value.problems) >= 2
    assert not path.exists()
    with pytest.raises(UnsupportedLeafError, match="has no name"):
        flax.write(path, np.ones(2))


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


@pytest.mark.parametrize("data", [b"", b"text", b"\x93\x01\x02\x03", b"PK\x03\x04"])
def test_other_files_are_not_found_to_be_flax(path: pathlib.Path, data: bytes):
    path.write_bytes(data)
    with pytest.raises(NotFoundError):
        flax.open(path)
    with pytest.raises(NotFoundError):
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
