"""A checkpoint opens as a Zarr v3 group, for TensorStore and for zarr-python, which know nothing of jaxckpt.

TensorStore reads every leaf that has objects of its own; zarr-python those whose dtype it has. dtypes that TensorStore
lacks are bytes, with an attribute that says so.
"""

from __future__ import annotations

import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tensorstore as ts
import zarr
from jax.sharding import NamedSharding, PartitionSpec

import jaxckpt

from .helpers import make_mesh

ZARR_ONLY = jaxckpt.SaveOptions(pack_bytes_max=0)

# What zarr-python 3.1 has of the dtypes that the format stores under their own name.
KNOWN_TO_ZARR_PYTHON = (
    *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    *("float16", "float32", "float64", "complex64", "complex128"),
)
UNKNOWN_TO_ZARR_PYTHON = (
    *("int2", "int4", "bfloat16", "float4_e2m1fn", "float8_e3m4", "float8_e4m3fn", "float8_e4m3fnuz"),
    *("float8_e4m3b11fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"),
)
OPAQUE = {
    "uint2": np.arange(4).astype(ml_dtypes.uint2),
    "uint4": np.arange(6).reshape(2, 3).astype(ml_dtypes.uint4),
    "float8_e4m3": np.arange(4).astype(ml_dtypes.float8_e4m3),
    "structured": np.array([(1, 2.5), (3, -0.0)], [("a", "<i4"), ("b", "<f8")]),
    "dates": np.array([["2020-02-29", "NaT"]], "M8[D]"),
    "spans": np.arange(3, dtype="m8[s]"),
    "text": np.array(["", "aé"]),
    "strings": np.array([b"", b"abc"]),
    "one_byte_strings": np.array([b"a", b"b"]),
    "raw": np.frombuffer(bytes(range(14)), "V7"),
    "big_endian": np.arange(5, dtype=">f4"),
    "long_double": np.frombuffer(bytes(32), np.longdouble),
    "zero_size": np.zeros((0, 2), "U3"),
    "scalar": np.array("2020-01-01", "M8[D]"),
}


def directories(path: pathlib.Path) -> dict[str, str]:
    """Where the Zarr arrays lie below the root, by key; found through their own metadata."""
    found = {}
    for metadata in path.rglob("zarr.json"):
        document = json.loads(metadata.read_text())
        if document["node_type"] == "array":
            found[document["attributes"]["jaxckpt"]["key"]] = str(metadata.parent.relative_to(path))
    return found


def read_with_tensorstore(path: pathlib.Path, directory: str) -> np.ndarray:
    spec = {
        "driver": "zarr3",
        "kvstore": {"driver": "file", "path": f"{path / directory}/"},
        # A missing chunk must not look like zeros.
        "fill_missing_data_reads": False,
    }
    return ts.open(spec, read=True).result().read().result()


def read_with_zarr(path: pathlib.Path, directory: str) -> np.ndarray:
    """Walks from the root group to the array, one name at a time."""
    node: Any = zarr.open_group(path, mode="r")
    for name in directory.split("/"):
        assert isinstance(node, zarr.Group)
        node = node[name]
    assert isinstance(node, zarr.Array)
    return np.asarray(node[...])


def assert_same_array(got: np.ndarray, want: np.ndarray) -> None:
    assert (got.dtype, got.shape) == (want.dtype, want.shape)
    assert got.tobytes() == want.tobytes()


def samples(names: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Arrays of rank 0, 1 and 3, and ones without elements."""
    arrays = {}
    for name in names:
        dtype = np.dtype(getattr(ml_dtypes, name, name))
        arrays[f"{name}/scalar"] = np.ones((), dtype)
        arrays[f"{name}/row"] = np.arange(-2, 6).astype(dtype)
        arrays[f"{name}/box"] = np.arange(24).reshape(2, 3, 4).astype(dtype)
        arrays[f"{name}/zero_size"] = np.zeros((3, 0), dtype)
    return arrays


def nest(arrays: dict[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key, array in arrays.items():
        group, _, name = key.partition("/")
        tree.setdefault(group, {})[name] = array
    return tree


def test_tensorstore_and_zarr_python_read_every_common_dtype(path: pathlib.Path) -> None:
    arrays = samples(KNOWN_TO_ZARR_PYTHON)
    jaxckpt.save(path, nest(arrays), options=ZARR_ONLY)
    found = directories(path)
    assert set(found) == set(arrays)
    for key, array in arrays.items():
        assert_same_array(read_with_tensorstore(path, found[key]), array)
        assert_same_array(read_with_zarr(path, found[key]), array)


def test_tensorstore_reads_every_extension_dtype(path: pathlib.Path) -> None:
    arrays = samples(UNKNOWN_TO_ZARR_PYTHON)
    jaxckpt.save(path, nest(arrays), options=ZARR_ONLY)
    found = directories(path)
    assert set(found) == set(arrays)
    for key, array in arrays.items():
        assert_same_array(read_with_tensorstore(path, found[key]), array)


@pytest.mark.parametrize("name", UNKNOWN_TO_ZARR_PYTHON)
def test_zarr_python_still_lacks_the_extension_dtypes(path: pathlib.Path, name: str) -> None:
    """When this fails, the dtype can move to the ones that both must read."""
    jaxckpt.save(path, {"a": np.zeros(3, getattr(ml_dtypes, name))}, options=ZARR_ONLY)
    with pytest.raises(ValueError, match="No Zarr data type found"):
        read_with_zarr(path, directories(path)["a"])


def test_dtypes_that_tensorstore_lacks_are_bytes_with_an_attribute(path: pathlib.Path) -> None:
    jaxckpt.save(path, OPAQUE, options=ZARR_ONLY)
    found = directories(path)
    assert set(found) == set(OPAQUE)
    for key, array in OPAQUE.items():
        axis = () if array.dtype.itemsize == 1 else (array.dtype.itemsize,)
        want = np.frombuffer(array.tobytes(), np.uint8).reshape(*array.shape, *axis)
        assert_same_array(read_with_tensorstore(path, found[key]), want)
        assert_same_array(read_with_zarr(path, found[key]), want)
        attributes = zarr.open_array(path / found[key], mode="r").attrs["jaxckpt"]
        assert attributes["stored_as"] == "bytes"
        assert attributes["dtype"] is not None


def test_the_attribute_says_the_dtype(path: pathlib.Path) -> None:
    jaxckpt.save(path, {"wide": OPAQUE["uint4"], "plain": np.zeros(3)}, options=ZARR_ONLY)
    found = directories(path)
    wide = zarr.open_array(path / found["wide"], mode="r").attrs["jaxckpt"]
    plain = zarr.open_array(path / found["plain"], mode="r").attrs["jaxckpt"]
    assert wide == {"key": "wide", "kind": "numpy", "dtype": "uint4", "stored_as": "bytes"}
    assert plain == {"key": "plain", "kind": "numpy", "dtype": "float64"}


@pytest.mark.parametrize("pack_bytes_max", [0, 256])
def test_sharded_arrays_in_many_chunks(path: pathlib.Path, pack_bytes_max: int) -> None:
    mesh = make_mesh({"x": 4, "y": 2})
    numbers = np.arange(64 * 48, dtype=np.float32)
    arrays = {
        "rows": (numbers.reshape(64, 48), PartitionSpec("x")),
        "columns": (numbers.reshape(48, 64), PartitionSpec(None, ("y", "x"))),
        "grid": (numbers.reshape(16, 12, 16), PartitionSpec("y", None, "x")),
        "replicated": (numbers, PartitionSpec()),
    }
    tree = {key: jax.device_put(array, NamedSharding(mesh, spec)) for key, (array, spec) in arrays.items()}
    options = jaxckpt.SaveOptions(pack_bytes_max=pack_bytes_max, chunk_bytes_max=1024)
    jaxckpt.save(path, tree, options=options)
    found = directories(path)
    assert set(found) == set(arrays)
    for key, (array, _) in arrays.items():
        assert_same_array(read_with_tensorstore(path, found[key]), array)
        assert_same_array(read_with_zarr(path, found[key]), array)
        assert zarr.open_array(path / found[key], mode="r").nchunks > 8


def test_a_part_of_an_array_is_read_from_its_chunks(path: pathlib.Path) -> None:
    array = np.arange(600.0).reshape(60, 10)
    jaxckpt.save(path, {"w": array}, options=jaxckpt.SaveOptions(pack_bytes_max=0, chunk_bytes_max=800))
    directory = directories(path)["w"]
    node = zarr.open_group(path, mode="r")[directory]
    assert isinstance(node, zarr.Array)
    np.testing.assert_array_equal(node[17:42:5, 3], array[17:42:5, 3])


@pytest.mark.parametrize(
    "key",
    [
        "a/b",
        "a.b",
        "..",
        ".",
        "",
        "é\U0001f600",
        "c",
        "c.0",
        "zarr.json",
        "__x",
        "%",
        "x" * 300,
        "A b\n",
    ],
)
def test_odd_keys_are_names_that_zarr_takes(path: pathlib.Path, key: str) -> None:
    tree = {key: {"inner": np.arange(3), key: np.arange(4)}, "other": np.arange(5)}
    jaxckpt.save(path, tree, options=ZARR_ONLY)
    found = directories(path)
    assert len(found) == 3
    checkpoint = jaxckpt.open(path)
    for name, directory in found.items():
        assert_same_array(read_with_tensorstore(path, directory), checkpoint[name][...])
        assert_same_array(read_with_zarr(path, directory), checkpoint[name][...])


def test_keys_that_json_lacks_leave_the_arrays_readable(path: pathlib.Path) -> None:
    jaxckpt.save(path, {"\ud800": np.arange(3)}, options=ZARR_ONLY)
    found = directories(path)
    assert set(found) == {"?"}
    assert_same_array(read_with_tensorstore(path, found["?"]), np.arange(3))
    assert_same_array(read_with_zarr(path, found["?"]), np.arange(3))
    assert jaxckpt.open(path).keys() == ("\ud800",)


def test_prng_keys_and_long_strings_are_arrays_too(path: pathlib.Path) -> None:
    keys = jax.random.split(jax.random.key(0), 3)
    jaxckpt.save(path, {"keys": keys, "text": "é" * 9000, "weak": jnp.asarray(2.5)}, options=ZARR_ONLY)
    found = directories(path)
    assert_same_array(read_with_zarr(path, found["keys"]), np.asarray(jax.random.key_data(keys)))
    assert read_with_zarr(path, found["text"]).tobytes().decode() == "é" * 9000
    assert_same_array(read_with_tensorstore(path, found["weak"]), np.array(2.5, np.float32))


@pytest.mark.filterwarnings("ignore:Object at (manifest.msgpack|packs) is not:zarr.errors.ZarrUserWarning")
def test_every_directory_above_an_array_is_a_group_and_the_walk_finds_all(path: pathlib.Path) -> None:
    jaxckpt.save(path, {"a": {"b": {"c": np.arange(3)}}, "d": [np.arange(2)]}, options=ZARR_ONLY)
    root = zarr.open_group(path, mode="r")
    assert root.attrs["jaxckpt"] == {"format": 1}
    arrays = {name for name, node in root.members(max_depth=None) if isinstance(node, zarr.Array)}
    assert arrays == set(directories(path).values())


@pytest.mark.filterwarnings("ignore:Object at (manifest.msgpack|packs) is not:zarr.errors.ZarrUserWarning")
def test_a_checkpoint_of_packs_is_an_empty_group(path: pathlib.Path) -> None:
    jaxckpt.save(path, {"a": np.arange(3)})
    root = zarr.open_group(path, mode="r")
    assert [type(node) for _, node in root.members(max_depth=None)] == [zarr.Group]


def test_after_an_overwrite_the_group_holds_the_new_attempt_only(path: pathlib.Path) -> None:
    jaxckpt.save(path, {"a": np.arange(3)}, options=ZARR_ONLY)
    jaxckpt.save(path, {"a": np.arange(4)}, options=ZARR_ONLY, overwrite=True)
    assert_same_array(read_with_zarr(path, directories(path)["a"]), np.arange(4))
