"""Writes the golden checkpoints: ``python -m tests.golden.generate`` from the root of the repository.

The checkpoints of a released version are never generated again: every later version must read them as they are. A new
version of the format, or something new in an old one, gets a checkpoint of its own beside them. Before the first
release of format 1 the command may be repeated as often as the format changes; it replaces what is there.

`TREES` says what each checkpoint holds. It is computed, not stored: `test_golden.py` compares with it, so it must stay
what it is, too. ``checksums.json`` lists every file, so that no change of one goes unnoticed.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jaxckpt
from tests.helpers import make_mesh
from tests.processes import Worker, run_processes

DEVICES = 8
ROOT = pathlib.Path(__file__).resolve().parent
CHECKSUMS = ROOT / "checksums.json"

DTYPES = (
    *(
        "bool",
        "int2",
        "int4",
        "int8",
        "int16",
        "int32",
        "int64",
        "uint2",
        "uint4",
        "uint8",
        "uint16",
        "uint32",
    ),
    *("uint64", "float16", "bfloat16", "float32", "float64", "complex64", "complex128", "float4_e2m1fn"),
    *("float8_e3m4", "float8_e4m3", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e4m3b11fnuz", "float8_e5m2"),
    *("float8_e5m2fnuz", "float8_e8m0fnu"),
)

Point = collections.namedtuple("Point", ["x", "y"])  # noqa: PYI024  what a checkpoint must take, typed or not


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Model:
    """A node that only its own class can rebuild."""

    weights: Any
    bias: Any


# Their elements have bits that mean nothing, so that not every byte is one of them.
FEW_BITS = ("bool", "int2", "uint2", "int4", "uint4", "float4_e2m1fn")


def bits(dtype: str, count: int) -> np.ndarray:
    """Elements with many different bit patterns, NaN payloads included."""
    kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
    if dtype in FEW_BITS:
        return (np.arange(count) % 2).astype(kind)
    return (np.arange(count * kind.itemsize) * 37 + 11).astype(np.uint8).view(kind)


def make_keys_of(impl: str, shape: tuple[int, ...]) -> jax.Array:
    """Typed PRNG keys with given bits: how JAX makes keys from a seed may change."""
    return jax.random.wrap_key_data(
        jnp.asarray(bits("uint32", int(np.prod(shape))).reshape(shape)), impl=impl
    )


def make_leaves() -> Any:
    """Every kind of leaf; those that JAX has as arrays of both kinds."""
    structured = np.dtype([("a", "<i2"), ("b", "S3"), ("c", [("x", ">f4")], (2,))], align=True)
    return {
        "numpy": {dtype: bits(dtype, 6).reshape(2, 3) for dtype in DTYPES},
        "jax": {
            dtype: jnp.asarray(bits(dtype, 4))
            for dtype in DTYPES
            if dtype not in ("int64", "uint64", "float64", "complex128")
        },
        "jax_scalar": jnp.float32(-0.0),
        "jax_weak": jnp.asarray(2.5),
        "keys": {
            "threefry": make_keys_of("threefry2x32", (2,)),
            "rbg": make_keys_of("rbg", (2, 4)),
        },
        "others": {
            "structured": np.frombuffer(bytes(range(structured.itemsize * 2)), structured),
            "dates": np.array(["2020-02-29", "NaT"], "M8[D]"),
            "spans": np.arange(3, dtype="m8[25ns]"),
            "text": np.array(["", "a\u00e9"]),
            "strings": np.array([b"", b"abc"]),
            "raw": np.frombuffer(bytes(range(14)), "V7"),
            "big_endian": np.arange(5, dtype=">f4"),
            "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
            "rank_0": np.array(1.5),
            "zero_size": np.zeros((0, 3), np.int16),
            "zero_size_text": np.zeros((2, 0), "U4"),
        },
        "python": {
            "int": -(3**100),
            "zero": 0,
            "float": float.fromhex("0x1.5555555555555p-2"),
            "negative_zero": -0.0,
            "complex": complex(-0.0, float("inf")),
            "bool": True,
            "str": "a\ud800\u00e9",
            "bytes": b"\x00\xff",
            "empty": "",
            "long_str": "\u00e9" * 4100,
            "long_bytes": bytes(range(256)) * 65,
        },
        "scalars": [
            np.float32(0.1),
            np.int8(-3),
            ml_dtypes.bfloat16(3),
            np.datetime64("2020-01-01"),
            np.bool_(1),
        ],
    }


def make_sharded() -> Any:
    """Arrays over 8 devices in several ways; chunks of several shapes."""
    mesh = make_mesh({"data": 4, "model": 2})

    def put(array: np.ndarray, *spec: Any) -> jax.Array:
        return jax.device_put(array, NamedSharding(mesh, PartitionSpec(*spec)))

    return {
        "rows": put(np.arange(96, dtype=np.float32).reshape(16, 6), "data"),
        "columns": put(np.arange(64, dtype=np.int16).reshape(4, 16), None, ("model", "data")),
        "grid": put(np.arange(192, dtype=np.uint8).reshape(8, 6, 4), "data", "model"),
        "replicated": put(np.arange(7, dtype=np.float32)),
        "bfloat16": put(bits("bfloat16", 32).reshape(8, 4), "data", "model"),
        "opaque": put(bits("float8_e4m3", 16), ("data", "model")),
        "keys": jax.device_put(
            make_keys_of("threefry2x32", (8, 2)), NamedSharding(mesh, PartitionSpec("data"))
        ),
        "one_device": jax.device_put(jnp.arange(3), jax.devices()[5]),
        "anywhere": jnp.arange(4),
    }


def make_keys() -> Any:
    """Keys of every type, and strings that look like something else."""
    strings = [
        "",
        "a/b",
        "a~b",
        "~e",
        "..",
        "zarr.json",
        "c.0",
        "__x",
        "5",
        "-5",
        "\u00e9\U0001f600",
        "\ud800",
    ]
    return {
        "strings": {key: np.arange(number + 1) for number, key in enumerate([*strings, "k" * 300])},
        "ints": {key: np.int32(key) for key in (-3, 0, 5, 6)},
        "big_ints": {2**63: 1, 2**70: 2},
        "tuples": {(1, "a"): 1, (1, "b"): np.arange(2), (2, "\u00e9/~"): 3},
        "floats": {0.1: 1, float("inf"): 2},
        "bytes": {b"\x00": 1, b"/": 2},
        "bools": {False: 1, True: 2},
    }


def make_containers() -> Any:
    """Every kind of node, empty ones too."""
    return {
        "list": [1, [2, [np.arange(3)]], []],
        "tuple": (1, (), (np.arange(2),)),
        "ordered": collections.OrderedDict([("z", 1), ("a", np.arange(4))]),
        "namedtuple": Point(np.arange(5), None),
        "node": Model(weights=np.ones((2, 2)), bias={"deep": 0.5}),
        "none": None,
        "empty": {},
    }


def make_spanning() -> Any:
    """Arrays over the devices of several processes, and what each process has for itself."""
    mesh = make_mesh({"data": 4, "model": 2})
    half = make_mesh({"x": 4})

    def put(array: np.ndarray, *spec: Any, mesh: Mesh = mesh) -> jax.Array:
        sharding = NamedSharding(mesh, PartitionSpec(*spec))
        return jax.make_array_from_callback(
            array.shape, sharding, lambda index: array[index], dtype=array.dtype
        )

    return {
        "rows": put(np.arange(96, dtype=np.float32).reshape(16, 6), "data"),
        "columns": put(np.arange(64, dtype=np.int16).reshape(4, 16), None, ("model", "data")),
        "grid": put(np.arange(192, dtype=np.uint8).reshape(8, 6, 4), "data", "model"),
        "replicated": put(np.arange(7, dtype=np.float32)),
        "half": put(bits("bfloat16", 32).reshape(8, 4), "x", mesh=half),
        "opaque": put(bits("float8_e4m3", 16), ("data", "model")),
        "zero_size": put(np.zeros((0, 8), np.float32), None, "data"),
        "keys": jax.random.wrap_key_data(put(bits("uint32", 16).reshape(8, 2), "data"), impl="threefry2x32"),
        "host": np.arange(5, dtype=np.int64),
        "step": 7,
        "process": jax.process_index(),
    }


def make_with_programs() -> Any:
    """A small state, with whole numbers in it, so that sums come out the same everywhere."""
    return {
        "params": {"w": jnp.arange(6, dtype=jnp.float32).reshape(3, 2)},
        "moments": Point(jnp.zeros((3, 2)), jnp.int32(0)),
        "name": "linear",
        "key": jax.random.key(5),
    }


def predict(tree: Any, x: jax.Array) -> jax.Array:
    """A prediction with a value inside that has a name."""
    return checkpoint_name(x @ tree["params"]["w"], "product") + 1


def train_step(tree: Any, x: jax.Array) -> tuple[Any, jax.Array]:
    """Gives back a tree with the classes of this module."""
    moments = Point(tree["moments"].x + 1, tree["moments"].y + 1)
    return {**tree, "moments": moments}, predict(tree, x).sum()


def make_programs() -> dict[str, jaxckpt.Program]:
    """The programs of `make_with_programs`."""
    (batch,) = jax.export.symbolic_shape("batch")
    x = jax.ShapeDtypeStruct((batch, 3), jnp.float32)
    return {
        "predict": jaxckpt.Program(predict, (x,), vjp_order=1),
        "train_step": jaxckpt.Program(train_step, (x,)),
    }


@dataclasses.dataclass(frozen=True)
class Golden:
    """One checkpoint: what makes its tree, how it was cut, and how many processes wrote it.

    Several processes also have an item each.
    """

    make: Callable[[], Any]
    options: jaxckpt.SaveOptions
    metadata: Any = None
    processes: int = 1
    make_programs: Callable[[], dict[str, jaxckpt.Program]] = dict


IN_PACKS = jaxckpt.SaveOptions()
IN_OBJECTS = jaxckpt.SaveOptions(pack_bytes_max=0)

TREES = {
    "leaves-in-packs": Golden(make_leaves, IN_PACKS, {"step": 7, "nested": [None, 0.5, b"\x00", "\u00e9"]}),
    "leaves-in-objects": Golden(make_leaves, IN_OBJECTS),
    "sharded-in-packs": Golden(make_sharded, jaxckpt.SaveOptions(chunk_bytes_max=32)),
    "sharded-in-objects": Golden(make_sharded, jaxckpt.SaveOptions(pack_bytes_max=0, chunk_bytes_max=32)),
    "sharded-in-both": Golden(make_sharded, jaxckpt.SaveOptions(pack_bytes_max=33, chunk_bytes_max=64)),
    "keys": Golden(make_keys, IN_OBJECTS),
    "containers": Golden(make_containers, IN_PACKS),
    "root-leaf": Golden(lambda: np.arange(6.0).reshape(2, 3), IN_OBJECTS),
    "empty": Golden(dict, IN_PACKS),
    "four-processes": Golden(
        make_spanning, jaxckpt.SaveOptions(pack_bytes_max=33, chunk_bytes_max=64), processes=4
    ),
    "with-programs": Golden(make_with_programs, IN_PACKS, make_programs=make_programs),
}


def write(name: str, root: pathlib.Path) -> None:
    """Writes one of the checkpoints below a directory."""
    golden = TREES[name]
    if golden.processes == 1:
        jaxckpt.save(
            root / name,
            golden.make(),
            programs=golden.make_programs(),
            options=golden.options,
            metadata=golden.metadata,
        )
        return
    outcomes = run_processes(
        write_together,
        golden.processes,
        devices=DEVICES // golden.processes,
        arguments=(name, str(root)),
    )
    failures = [outcome.error_text or outcome.status for outcome in outcomes if outcome.status != "returned"]
    if failures:
        raise RuntimeError(failures[0])


def write_together(worker: Worker, name: str, root: str) -> None:
    """What each of several processes does."""
    golden = TREES[name]
    jaxckpt.save(
        pathlib.Path(root, name),
        golden.make(),
        options=golden.options,
        metadata=golden.metadata,
        items={"process": worker.index},
    )


def checksums() -> dict[str, str]:
    """SHA-256 of every file of the golden checkpoints, by path."""
    files = sorted(file for name in TREES for file in (ROOT / name).rglob("*") if file.is_file())
    return {str(file.relative_to(ROOT)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def main() -> None:
    """Writes all of them anew."""
    os.environ["XLA_FLAGS"] = (
        f"--xla_force_host_platform_device_count={DEVICES}"  # before JAX looks for devices
    )
    for name in TREES:
        shutil.rmtree(ROOT / name, ignore_errors=True)
        write(name, ROOT)
    CHECKSUMS.write_text(json.dumps(checksums(), indent=1) + "\n")


if __name__ == "__main__":
    # Its classes are recorded with the name of their module, which must not be "__main__".
    from tests.golden.generate import main as write_all

    write_all()
