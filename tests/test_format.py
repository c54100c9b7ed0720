"""FORMAT.md is enough to read a checkpoint: `read_checkpoint` was written from it, with NumPy, ml_dtypes and msgpack.

The reader knows nothing of jaxckpt. It is compared with what was saved for every kind of leaf, for packs and objects of
their own, and for arrays that were cut into chunks. So is `read_items`, for items.
"""

from __future__ import annotations

import ast
import datetime as dt
import inspect
import itertools
import json
import pathlib
import re
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import msgpack
import numpy as np
import pytest
import xxhash
from jax.sharding import NamedSharding, PartitionSpec

import jaxckpt
from jaxckpt._config import BLOCK_BYTES

from .golden import generate
from .helpers import make_mesh

KIB = 1 << 10
ZARR_DTYPES = (
    *("bool", "int2", "int4", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    *("float16", "bfloat16", "float32", "float64", "complex64", "complex128", "float4_e2m1fn", "float8_e3m4"),
    *("float8_e4m3fn", "float8_e4m3fnuz", "float8_e4m3b11fnuz", "float8_e5m2", "float8_e5m2fnuz"),
    "float8_e8m0fnu",
)


# --- the reader, written from FORMAT.md -----------------------------------------------------------------------


def read_format(form: Any) -> Any:
    if isinstance(form, str):
        return form
    if len(form) == 2 and isinstance(form[1], list) and all(isinstance(size, int) for size in form[1]):
        return read_format(form[0]), tuple(form[1])
    names = [tuple(field[0]) if isinstance(field[0], list) else field[0] for field in form]
    return [
        (name, read_format(field[1]), *map(tuple, field[2:])) for name, field in zip(names, form, strict=True)
    ]


def read_dtype(descriptor: Any) -> np.dtype:
    if isinstance(descriptor, str):
        return np.dtype(getattr(ml_dtypes, descriptor, descriptor))
    return np.lib.format.descr_to_dtype(read_format(descriptor))


def read_value(tag: str, *parts: Any) -> Any:
    if tag == "int":
        return int(parts[0], 16)
    if tag in ("float", "complex"):
        return np.frombuffer(parts[0], "<f8" if tag == "float" else "<c16")[0].item()
    return np.frombuffer(parts[1], read_dtype(parts[0]))[0] if tag == "numpy" else parts[0]


def read_manifest(root: pathlib.Path) -> dict[str, Any]:
    magic, checksum, payload = msgpack.unpackb((root / "manifest.msgpack").read_bytes())
    assert (magic, checksum) == ("jaxckpt", xxhash.xxh3_128_digest(payload))
    m = msgpack.unpackb(payload, unicode_errors="surrogatepass")
    assert m["min_reader"] == 1
    assert m["features"] in ([], ["parts"])
    return {"metrics": {}} | m


def read_tables(root: pathlib.Path, m: dict[str, Any]) -> list[tuple[Any, Any]]:
    tables = [m] if "parts" not in m["features"] else []
    for process, (length, checksum, *_) in enumerate(m.get("parts", ())):
        data = (root / m["data"] / f"parts/{process}").read_bytes()
        assert (len(data), xxhash.xxh3_128_digest(data)) == (length, checksum)
        tables.append(msgpack.unpackb(data))
    columns = (("chunk_pack", "<i4"), ("chunk_offset", "<u8"), ("chunk_length", "<u8"))
    return [
        (
            zip(*(np.frombuffer(table[name], dtype).tolist() for name, dtype in columns), strict=True),
            iter([table["checksums"][at : at + 16] for at in range(0, len(table["checksums"]), 16)]),
        )
        for table in tables
    ]


def read_checkpoint(root: pathlib.Path) -> dict[str, Any]:
    m = read_manifest(root)
    spec_index = np.frombuffer(m["spec_index"], "<u4")
    owner_index = np.frombuffer(m.get("owner_index", b""), "<i4")
    tables = read_tables(root, m)
    values, directories, leaves = dict(m["values"]), dict(m["directories"]), {}
    for leaf, key in enumerate(m["keys"]):
        spec = m["specs"][spec_index[leaf]]
        if spec["kind"] == "value":
            leaves[key] = read_value(*values[leaf])
            continue
        dtype = read_dtype(spec["dtype"])
        is_plain = spec["dtype"] in ZARR_DTYPES or dtype.itemsize == 1
        stored_shape = [*spec["shape"], *([] if is_plain else [dtype.itemsize])]
        element = f"V{dtype.itemsize}" if is_plain else "u1"
        stored = np.empty(stored_shape, element)
        box = spec["chunk_shape"]
        indices = itertools.product(*(range(n // step) for n, step in zip(stored_shape, box, strict=True)))
        has_owners = len(owner_index) and owner_index[leaf] >= 0
        owners = np.frombuffer(m["owners"][owner_index[leaf]], "<u2") if has_owners else itertools.repeat(0)
        for index, owner in zip(indices, owners, strict=False):
            rows, checksums = tables[owner]
            pack, offset, length = next(rows)
            name = (
                f"packs/{owner}-{pack}"
                if pack >= 0
                else ".".join([f"{directories[leaf]}/c", *map(str, index)])
            )
            data = (root / m["data"] / name).read_bytes()[offset : offset + length]
            for at in range(0, length, m["block_bytes"]):
                assert xxhash.xxh3_128_digest(data[at : at + m["block_bytes"]]) == next(checksums)
            place = tuple(slice(i * step, (i + 1) * step) for i, step in zip(index, box, strict=True))
            stored[place] = np.frombuffer(data, element, int(np.prod(box))).reshape(box)
        array = np.frombuffer(stored.tobytes(), dtype) if stored.size else np.empty(0, dtype)
        array = array.reshape(spec["shape"])
        texts = {"bytes": bytes, "str": lambda text: bytes(text).decode("utf-8", "surrogatepass")}
        leaves[key] = texts.get(spec["kind"], np.asarray)(array)
    return leaves


def read_item(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: read_item(child) for key, child in value.items()}
    if isinstance(value, msgpack.ExtType) and value.code == 1:
        return int.from_bytes(value.data, "little", signed=True)
    if isinstance(value, msgpack.ExtType):
        return np.frombuffer(value.data, "<c16")[0].item()
    if not isinstance(value, list):
        return value
    if not value or not isinstance(value[0], msgpack.ExtType) or value[0].code < 3:
        return [read_item(child) for child in value]
    form, *members = value
    if form.code == 3:
        return tuple(map(read_item, members))
    if form.code == 4:
        return dict(zip(map(read_item, members[::2]), map(read_item, members[1::2]), strict=True))
    array = np.ndarray(members[2:], read_dtype(members[0]), bytearray(members[1]))
    return array if form.code == 5 else array[()]


def read_items(root: pathlib.Path, process: int = 0) -> dict[str, Any]:
    m = read_manifest(root)
    name = f"{m['data']}/items/{process}"
    ((length, checksum),) = [entry[1:] for entry in m["objects"] if entry[0] == name]
    data = (root / name).read_bytes()
    assert (len(data), xxhash.xxh3_128_digest(data)) == (length, checksum)
    return read_item(msgpack.unpackb(data, unicode_errors="surrogatepass"))


# --- the tests ------------------------------------------------------------------------------------------------


def every_leaf() -> dict[str, Any]:
    """One leaf of each kind, by key."""
    numbers = np.arange(-4, 4)
    structured = np.dtype([("a", "<i2"), ("b", "S3"), ("c", [("x", ">f4")], (2,))], align=True)
    leaves = {
        "numpy/structured": np.frombuffer(bytes(range(structured.itemsize * 4)), structured),
        "numpy/titles": np.zeros(2, [(("title", "name"), "<f8")]),
        "numpy/dates": np.array(["2020-02-29", "NaT"], "M8[D]"),
        "numpy/spans": np.arange(3, dtype="m8[25ns]"),
        "numpy/text": np.array(["", "aé", "\U0001f600"]),
        "numpy/strings": np.array([b"", b"abc"]),
        "numpy/raw": np.frombuffer(bytes(14), "V7"),
        "numpy/big_endian": np.arange(5, dtype=">f4"),
        "numpy/long_double": np.ones(3, np.longdouble),
        "numpy/fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "numpy/scalar": np.array(1.5),
        "numpy/zero_size": np.zeros((0, 3), np.int16),
        "numpy/zero_size_text": np.zeros((2, 0), "U4"),
        "numpy/zero_bytes": np.zeros(3, "S0"),
        "python/int": -(3**500),
        "python/float": float.fromhex("0x1.5555555555555p-2"),
        "python/negative_zero": -0.0,
        "python/complex": complex(-0.0, float("inf")),
        "python/bool": True,
        "python/str": "a\ud800é",
        "python/bytes": b"\x00\xff",
        "python/long_str": "é\ud800" * 5000,
        "python/long_bytes": bytes(range(256)) * 100,
        "python/empty_str": "",
        "scalar/float32": np.float32(0.1),
        "scalar/bfloat16": ml_dtypes.bfloat16(3),
        "scalar/date": np.datetime64("2020-01-01"),
        "scalar/structured": np.zeros((), [("x", "<i4"), ("y", "S2")])[()],
        "jax/key": jax.random.key(7),
        "jax/key_batch": jax.random.split(jax.random.key(7, impl="rbg"), 3),
        "jax/scalar": jnp.float32(2.5),
        "jax/weak": jnp.asarray(2.5),
    }
    for dtype in (*ZARR_DTYPES, "uint2", "uint4", "float8_e4m3"):
        leaves[f"dtypes/{dtype}"] = numbers.astype(read_dtype(dtype))
    for dtype in ("bfloat16", "float8_e4m3", "int4", "uint2", "complex64", "bool"):
        leaves[f"jax/{dtype}"] = jnp.asarray(numbers % 2, read_dtype(dtype))
    return leaves


def assert_equal_bytes(got: dict[str, Any], want: dict[str, Any]) -> None:
    assert list(got) == sorted(want)
    for key, saved in want.items():
        is_key = isinstance(saved, jax.Array) and jax.dtypes.issubdtype(saved.dtype, jax.dtypes.prng_key)
        leaf = jax.random.key_data(saved) if is_key else saved
        if isinstance(leaf, (np.ndarray, jax.Array, np.generic)):
            assert (key, got[key].dtype, got[key].shape) == (key, leaf.dtype, leaf.shape)
            assert got[key].tobytes() == np.asarray(leaf).tobytes(), key
        else:
            assert (key, type(got[key]), repr(got[key])) == (key, type(leaf), repr(leaf))


@pytest.mark.parametrize("pack_bytes_max", [0, 64, 4 << 20])
def test_every_kind_of_leaf(path: pathlib.Path, pack_bytes_max: int) -> None:
    leaves = every_leaf()
    nested: dict[str, dict[str, Any]] = {}
    for key, leaf in leaves.items():
        group, name = key.split("/")
        nested.setdefault(group, {})[name] = leaf
    jaxckpt.save(path, nested, options=jaxckpt.SaveOptions(pack_bytes_max=pack_bytes_max))
    assert_equal_bytes(read_checkpoint(path), leaves)


@pytest.mark.parametrize("pack_bytes_max", [0, 100, 4 << 20])
def test_sharded_arrays_in_many_chunks(path: pathlib.Path, pack_bytes_max: int) -> None:
    mesh = make_mesh({"x": 4, "y": 2})
    arrays = {
        "rows": (np.arange(64 * 6, dtype=np.float32).reshape(64, 6), PartitionSpec("x")),
        "columns": (np.arange(5 * 8, dtype=np.int16).reshape(5, 8), PartitionSpec(None, ("x", "y"))),
        "both": (np.arange(8 * 4 * 3, dtype=np.uint8).reshape(8, 4, 3), PartitionSpec("x", "y")),
        "replicated": (np.arange(7.0, dtype=np.float32), PartitionSpec()),
    }
    leaves = {key: jax.device_put(array, NamedSharding(mesh, spec)) for key, (array, spec) in arrays.items()}
    options = jaxckpt.SaveOptions(pack_bytes_max=pack_bytes_max, chunk_bytes_max=96)
    jaxckpt.save(path, leaves, options=options)
    assert_equal_bytes(read_checkpoint(path), leaves)


def test_chunks_of_several_blocks(path: pathlib.Path) -> None:
    generator = np.random.default_rng(0)
    leaves = {
        "packed": generator.integers(0, 256, 2 * BLOCK_BYTES + 5 * KIB, np.uint8),
        "own": generator.integers(0, 256, (3, BLOCK_BYTES + 7), np.uint8),
        "small": generator.random(3),
    }
    jaxckpt.save(path, leaves, options=jaxckpt.SaveOptions(pack_bytes_max=5 << 19))
    assert_equal_bytes(read_checkpoint(path), leaves)


def test_the_root_of_a_tree_may_be_a_leaf(path: pathlib.Path) -> None:
    jaxckpt.save(path, np.arange(3))
    assert_equal_bytes(read_checkpoint(path), {"": np.arange(3)})


def test_metrics(path: pathlib.Path) -> None:
    metrics = {"loss": np.float32(0.1), "steps": 3, "best": np.nan, "\ud800": -np.inf}
    with jaxckpt.CheckpointManager(path) as manager:
        manager.save(0, {"a": 1}, metrics=metrics)
    read = read_manifest(path / "step_00000000")["metrics"]
    assert repr(read) == repr({name: float(value) for name, value in metrics.items()})


def test_every_kind_of_item(path: pathlib.Path) -> None:
    structured = np.dtype([("a", "<i2"), ("b", "S3"), ("c", [("x", ">f4")], (2,))], align=True)
    arrays = {
        "structured": np.frombuffer(bytes(range(structured.itemsize * 2)), structured),
        "bfloat16": np.arange(6).reshape(2, 3).astype(ml_dtypes.bfloat16),
        "int4": np.arange(-8, 8).astype(ml_dtypes.int4),
        "fortran": np.asfortranarray(np.arange(6).reshape(2, 3)),
        "text": np.array(["", "aé"]),
        "empty": np.zeros((0, 3), "M8[ns]"),
        "zero_rank": np.array(2.5),
    }
    values = {
        "plain": [None, True, -(2**63), 2**64 - 1, 0.1, -0.0, "a\ud800é", b"\x00\xff", [], {}, {"": 1}],
        "ints": [2**64, -(2**63) - 1, 3**500, -(1 << 71)],
        "complex": [complex(-0.0, float("inf"))],
        "tuples": ((), (1, ()), [(2,)]),
        "dicts": {1: "a", (2, None): "b", b"": {0.5: 1}, np.int8(3): "c"},
        "scalars": [np.float32(0.1), ml_dtypes.bfloat16(3), np.datetime64("2020-01-01")],
    }
    jaxckpt.save(path, {"a": np.arange(3)}, items={"arrays": arrays, **values})
    read = read_items(path)
    read_arrays = read.pop("arrays")
    assert repr(read) == repr(values)
    assert list(read_arrays) == list(arrays)
    for name, array in arrays.items():
        got = read_arrays[name]
        assert (got.dtype, got.shape, got.tobytes()) == (array.dtype, array.shape, array.tobytes())


def test_the_directory_of_steps(path: pathlib.Path) -> None:
    metrics = {"loss": 0.1, "nan": np.nan, "inf": np.inf, "é\n": -np.inf}
    with jaxckpt.CheckpointManager(path, max_to_keep=2) as manager:
        for step in range(8, 11):
            manager.save(step, {"a": 1}, metrics=metrics)
        manager.wait()
        manager.pin(9)
    assert {file.name for file in path.iterdir()} == {"step_00000009", "step_00000010", "checkpoint.json"}
    assert (path / "step_00000009" / "pinned").read_bytes() == b""
    document = json.loads((path / "checkpoint.json").read_text())
    assert document.keys() == {"latest", "checkpoints", "checksum"}
    assert document["latest"] == "step_00000010"
    text = json.dumps(document["checkpoints"], sort_keys=True)
    assert document["checksum"] == xxhash.xxh3_128_hexdigest(text.encode())
    assert [entry["step"] for entry in document["checkpoints"]] == [9, 10]
    for entry in document["checkpoints"]:
        assert entry.keys() == {"step", "name", "time", "time_s", "metrics", "manifest"}
        head = (path / entry["name"] / "manifest.msgpack").read_bytes()[:27]
        assert head == b"\x93\xa7jaxckpt\xc4\x10" + bytes.fromhex(entry["manifest"])
        assert entry["time_s"] == read_manifest(path / entry["name"])["created_s"]
        assert abs(dt.datetime.fromisoformat(entry["time"]).timestamp() - entry["time_s"]) < 0.001
        assert entry["metrics"] == {"loss": 0.1, "nan": "nan", "inf": "inf", "é\n": "-inf"}


def test_the_reader_has_at_most_eighty_lines_and_uses_no_other_package() -> None:
    functions = (read_format, read_dtype, read_value, read_manifest, read_tables, read_checkpoint)
    sources = [inspect.getsource(function) for function in functions]
    lines = [line for source in sources for line in source.splitlines() if line.strip()]
    assert len(lines) <= 80
    sources += [inspect.getsource(function) for function in (read_item, read_items)]
    names = {
        node.id for source in sources for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Name)
    }
    assert not names & {"jaxckpt", "jax", "jnp", "BLOCK_BYTES"}


def test_the_specification_names_every_field_of_the_manifest_and_every_plain_dtype(
    path: pathlib.Path,
) -> None:
    text = (pathlib.Path(jaxckpt.__file__).parent / "FORMAT.md").read_text(encoding="utf-8")
    words = set(re.findall(r"`\"?([A-Za-z0-9_]+)\"?`", text))
    jaxckpt.save(path, {"a": np.arange(3), "k": jax.random.key(0), "v": 1}, items={"x": 1})
    _, _, payload = msgpack.unpackb((path / "manifest.msgpack").read_bytes())
    fields = msgpack.unpackb(payload)
    named = {*fields, *(name for spec in fields["specs"] for name in spec)}
    checkpoint = generate.ROOT / "four-processes"
    named |= set(read_manifest(checkpoint)) | {"local"}
    for part in checkpoint.glob("data-*/parts/*"):
        named |= set(msgpack.unpackb(part.read_bytes()))
    assert named - words == set()
    assert set(ZARR_DTYPES) - words == set()
