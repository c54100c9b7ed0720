"""Every kind of leaf comes back bit for bit, or is refused before anything is written.

Each round trip runs through three layouts: packed (the default), every chunk an object of its own, and chunks of a few
bytes. Arrays hold all bit patterns of their dtype where there are few enough, else those that conversions spoil:
NaN with payloads, -0.0, denormals, infinities.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import decimal
import functools
import math
import pathlib
import struct
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P

import jaxckpt
from jaxckpt import MismatchError, SaveOptions, UnsupportedLeafError

from .helpers import assert_same_tree, make_mesh, run_fork

LAYOUTS = {
    "packed": SaveOptions(),
    "own_objects": SaveOptions(pack_bytes_max=0),
    "small_chunks": SaveOptions(pack_bytes_max=0, chunk_bytes_max=512),
}


@pytest.fixture(params=list(LAYOUTS))
def options(request) -> SaveOptions:
    return LAYOUTS[request.param]


def assert_round_trip(path: pathlib.Path, tree: Any, options: SaveOptions = LAYOUTS["packed"]) -> None:
    """Saves the tree; it comes back without `like`, and with itself as `like`."""
    jaxckpt.save(path, tree, options=options)
    assert_same_tree(jaxckpt.restore(path), tree)
    assert_same_tree(jaxckpt.restore(path, tree), tree)


# --- arrays ---------------------------------------------------------------------------------------------------


@functools.cache
def jax_dtypes() -> list[np.dtype[Any]]:
    """Every dtype that has a name in jax.numpy, needs no 64-bit mode, and exists on this backend."""
    scalar_type = type(jnp.float32)
    found = {np.dtype(value) for value in vars(jnp).values() if isinstance(value, scalar_type)}
    kept = [dtype for dtype in found if jax.dtypes.canonicalize_dtype(dtype) == dtype and is_on_device(dtype)]
    return sorted(kept, key=lambda dtype: dtype.name)


def is_on_device(dtype: np.dtype[Any]) -> bool:
    """Whether there are arrays of it: JAX names 6-bit floats, and has no buffers for them on CPU."""
    try:
        jax.device_put(np.zeros(1, dtype))
    except jax.errors.JaxRuntimeError:
        return False
    return True


SUB_BYTE_BITS = {"1": 1, "2": 2, "4": 4, "float4_e2m1fn": 4, "float6_e2m3fn": 6, "float6_e3m2fn": 6}


def bit_patterns(dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
    """All bit patterns of an element, or the delicate ones and some random ones."""
    if dtype == np.bool_:
        return np.array([False, True])
    digits = dtype.name.removeprefix("u").removeprefix("int")
    bits = SUB_BYTE_BITS.get(dtype.name) or SUB_BYTE_BITS.get(digits)
    if bits is not None and "int" in dtype.name:
        least = 0 if dtype.name.startswith("u") else -(2 ** (bits - 1))
        return np.arange(least, least + 2**bits).astype(np.int8).astype(dtype)
    if dtype.itemsize <= 2:
        count = 2 ** (bits or 8 * dtype.itemsize)
        return np.arange(count, dtype=f"u{dtype.itemsize}").view(dtype)
    # Both halves of a complex number are numbers of their own.
    width = dtype.itemsize // 2 if dtype.kind == "c" else dtype.itemsize
    mantissa = {4: 23, 8: 52}[width]
    exponent = (2 ** (8 * width - 1) - 1) >> mantissa << mantissa
    sign = 2 ** (8 * width - 1)
    delicate = [0, 1, sign, sign + 1, exponent, exponent + sign]
    delicate += [exponent + 1, exponent + 2**mantissa // 2, exponent + 12345, sign + exponent + 12345]
    random = np.random.default_rng(7).integers(0, 2**63, 54, dtype=np.uint64)
    words = np.concatenate([np.array(delicate, np.uint64), random]).astype(f"u{width}")
    return words.view(dtype)


def test_the_dtypes_of_jax_are_all_tried():
    names = {dtype.name for dtype in jax_dtypes()}
    wanted = """bool bfloat16 float16 float32 complex64 int2 int4 int8 int16 int32 uint2 uint4 uint8 uint16 uint32
        float4_e2m1fn float8_e3m4 float8_e4m3 float8_e4m3b11fnuz float8_e4m3fn float8_e4m3fnuz float8_e5m2
        float8_e5m2fnuz float8_e8m0fnu"""
    assert set(wanted.split()) <= names


def test_every_dtype_comes_back_bit_for_bit(path, options):
    tree = {dtype.name: jax.device_put(bit_patterns(dtype)) for dtype in jax_dtypes()}
    assert (
        len(np.unique(np.asarray(tree["float8_e4m3"]).view(np.uint8))) == 256
    )  # the patterns survive JAX itself
    assert len(np.unique(np.asarray(tree["bfloat16"]).view(np.uint16))) == 65536
    assert_round_trip(path, tree, options)


def test_every_dtype_comes_back_sharded(path, options):
    mesh = make_mesh({"data": 4, "model": 2})
    tree = {}
    for dtype in jax_dtypes():
        values = np.resize(bit_patterns(dtype), (8, 6))
        tree[dtype.name] = jax.device_put(values, NamedSharding(mesh, P("data", "model")))
    jaxckpt.save(path, tree, options=options)
    restored = jaxckpt.restore(path)
    assert_same_tree(restored, tree)
    assert all(restored[name].sharding == tree[name].sharding for name in tree)


def test_every_dtype_is_read_as_numpy(path, options):
    tree = {dtype.name: jax.device_put(bit_patterns(dtype)) for dtype in jax_dtypes()}
    jaxckpt.save(path, tree, options=options)
    checkpoint = jaxckpt.open(path)
    for name, array in tree.items():
        got = checkpoint[name][...]
        assert got.dtype == array.dtype
        assert got.tobytes() == np.asarray(array).tobytes(), name
        assert checkpoint[name][1:].tobytes() == np.asarray(array)[1:].tobytes(), name


def test_arrays_without_axes_and_without_elements(path, options):
    tree = {
        dtype.name: [
            jax.device_put(bit_patterns(dtype)[-1]),
            jax.device_put(np.zeros((0,), dtype)),
            jax.device_put(np.zeros((3, 0, 2), dtype)),
            jax.device_put(np.zeros((0, 5), dtype)),
        ]
        for dtype in jax_dtypes()
    }
    assert_round_trip(path, tree, options)


@pytest.mark.parametrize(
    ("shape", "spec"),
    [
        ((0, 8), P("data")),
        ((0, 8), P(None, "model")),
        ((8, 0), P("data", "model")),
        ((4, 0, 2), P("data", None, "model")),
        ((0,), P(("data", "model"))),
        ((0, 0), P()),
    ],
)
def test_sharded_arrays_without_elements(path, options, shape, spec):
    sharding = NamedSharding(make_mesh({"data": 4, "model": 2}), spec)
    tree = {"none": jax.device_put(jnp.zeros(shape, jnp.bfloat16), sharding), "some": jnp.arange(3)}
    assert_round_trip(path, tree, options)
    assert jaxckpt.restore(path)["none"].sharding == sharding


def test_the_largest_rank_and_a_long_axis_without_elements(path, options):
    tree = {"rank": jnp.ones((1,) * 32), "numpy": np.ones((1,) * 64), "long": jnp.zeros((0, 2**40), jnp.int8)}
    assert_round_trip(path, tree, options)


@dataclasses.dataclass
class TraceCount:
    """A jitted function that counts how often it is traced."""

    traces: int = 0

    def __post_init__(self) -> None:
        self.jitted = jax.jit(self._double)

    def _double(self, x: Any) -> Any:
        self.traces += 1
        return x * 2


@pytest.mark.slow
@pytest.mark.parametrize("with_like", [False, True])
def test_weak_types_need_no_retrace_after_a_restore(path, options, with_like):
    replicated = NamedSharding(make_mesh({"data": 8}), P())
    weak = {
        "int": jnp.asarray(3),
        "float": jnp.asarray(0.5),
        "complex": jnp.asarray(1j),
        "vector": jnp.full((8,), 2.0),
        "committed": jax.device_put(jnp.asarray(0.5), jax.devices()[3]),
        "sharded": jax.device_put(jnp.full((8,), 2.0), NamedSharding(make_mesh({"data": 8}), P("data"))),
        "replicated": jax.device_put(jnp.asarray(7), replicated),
    }
    strong = {name: jax.lax.convert_element_type(array, array.dtype) for name, array in weak.items()}
    strong["int"] = jnp.int32(3)
    assert weak["int"].weak_type
    assert weak["vector"].weak_type
    assert not strong["int"].weak_type
    tree = {"weak": weak, "strong": strong}
    counts = jax.tree.map(lambda _: TraceCount(), tree)
    jax.tree.map(lambda count, array: count.jitted(array), counts, tree)

    jaxckpt.save(path, tree, options=options)
    restored = jaxckpt.restore(path, tree if with_like else None)
    assert_same_tree(restored, tree)
    jax.tree.map(lambda count, array: count.jitted(array), counts, restored)
    assert {count.traces for count in jax.tree.leaves(counts)} == {1}
    got = jax.tree.map(lambda array: (array.weak_type, array.committed), restored)
    assert got == jax.tree.map(lambda array: (array.weak_type, array.committed), tree)


def test_the_trace_counter_sees_a_lost_weak_type():
    count = TraceCount()
    count.jitted(jnp.asarray(3))
    count.jitted(jnp.int32(3))
    assert count.traces == 2


def test_committed_and_uncommitted_arrays_stay_so(path, options):
    tree = {"free": jnp.arange(4.0), "bound": jax.device_put(jnp.arange(4.0), jax.devices()[5])}
    jaxckpt.save(path, tree, options=options)
    for like in (None, tree):
        restored = jaxckpt.restore(path, like)
        assert not restored["free"].committed
        assert restored["bound"].committed
        assert restored["bound"].devices() == {jax.devices()[5]}
    # An uncommitted array can be used together with one on any device, a committed one only on its own.
    total = restored["free"] + jax.device_put(jnp.ones(4), jax.devices()[2])
    assert total.devices() == {jax.devices()[2]}


def test_one_array_at_two_places(path, options):
    array = jnp.arange(10.0)
    host = np.arange(6)
    assert_round_trip(path, {"a": array, "b": [array, host], "c": host}, options)


# --- PRNG keys ------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("impl", ["threefry2x32", "rbg", "unsafe_rbg"])
def test_typed_prng_keys(path, options, impl):
    key = jax.random.key(5, impl=impl)
    batch = jax.random.split(key, 8)
    mesh = make_mesh({"data": 4, "model": 2})
    tree = {
        "one": key,
        "batch": batch,
        "grid": batch.reshape(4, 2),
        "none": batch[:0],
        "sharded": jax.device_put(batch, NamedSharding(mesh, P(("data", "model")))),
        "sharded_grid": jax.device_put(batch.reshape(4, 2), NamedSharding(mesh, P("data", "model"))),
        "replicated": jax.device_put(key, NamedSharding(mesh, P())),
        "raw": jax.random.key_data(key),
    }
    jaxckpt.save(path, tree, options=options)
    structs = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)
    for like in (None, tree, structs):
        restored = jaxckpt.restore(path, like)
        assert_same_tree(restored, tree)
        for name, leaf in tree.items():
            assert restored[name].committed == leaf.committed, name
            assert restored[name].sharding == leaf.sharding, name
    assert jax.random.bits(restored["one"]) == jax.random.bits(key)


def test_keys_of_another_implementation_or_plain_numbers_do_not_match(path):
    jaxckpt.save(path, {"rng": jax.random.key(0, impl="rbg"), "seed": jnp.zeros(2, jnp.uint32)})
    like = {"rng": jax.random.key(0, impl="threefry2x32"), "seed": jax.random.key(0)}
    with pytest.raises(MismatchError) as caught:
        jaxckpt.restore(path, like)
    assert [str(problem) for problem in caught.value.problems] == [
        "rng: dtype key<rbg> on disk, key<fry> in `like`",
        "seed: an array on disk, PRNG keys in `like`",
    ]


# --- 64 bits --------------------------------------------------------------------------------------------------

X64_PROGRAM = """
    import sys, jax, numpy as np
    import jax.numpy as jnp
    jax.config.update("jax_enable_x64", True)
    import jaxckpt
    from jaxckpt import SaveOptions
    from tests.helpers import assert_same_tree, make_mesh
    from tests.test_leaves import bit_patterns
    from jax.sharding import NamedSharding, PartitionSpec as P

    rows = NamedSharding(make_mesh({"data": 4}), P("data"))
    tree = {}
    for name in ("int64", "uint64", "float64", "complex128"):
        values = bit_patterns(np.dtype(name))[:8]
        tree[name] = [jax.device_put(values), jax.device_put(values, rows), jax.device_put(values[0])]
    tree["weak"] = [jnp.asarray(2**40), jnp.asarray(0.1)]
    assert tree["weak"][0].weak_type and tree["weak"][0].dtype == np.int64
    for name, options in {
        "packed": SaveOptions(), "own": SaveOptions(pack_bytes_max=0, chunk_bytes_max=16)
    }.items():
        path = f"{sys.argv[1]}/{name}"
        jaxckpt.save(path, tree, options=options)
        for like in (None, tree):
            restored = jaxckpt.restore(path, like)
            assert_same_tree(restored, tree)
            assert restored["weak"][0].weak_type
"""


def test_64_bit_arrays_need_64_bit_mode(tmp_path):
    run_fork(X64_PROGRAM, tmp_path, devices=4)
    path = tmp_path / "packed"
    with pytest.raises(MismatchError) as caught:
        jaxckpt.restore(path)
    assert len(caught.value.problems) == 14
    lines = str(caught.value).splitlines()
    assert lines[0] == f"cannot restore {str(path)!r}: 14 leaves need 64-bit types"
    assert lines[1] == "  complex128/0: dtype complex128 on disk, which JAX has only with jax_enable_x64"
    assert 'jax.config.update("jax_enable_x64", True)' in lines[-1]
    # They can still be looked at, come back as NumPy arrays, and be converted.
    values = jaxckpt.open(path)["float64/0"][...]
    assert values.dtype == np.float64
    like = {"float64": [np.zeros(8), jnp.zeros(8, jnp.float32), jnp.float32(0)]}
    restored = jaxckpt.restore(path, like, select="float64/*", cast=True)
    assert restored["float64"][0].tobytes() == values.tobytes()
    with np.errstate(all="ignore"):
        assert np.asarray(restored["float64"][1]).tobytes() == values.astype(np.float32).tobytes()


# --- NumPy ----------------------------------------------------------------------------------------------------

ALIGNED = np.dtype([("a", np.int8), ("b", np.float64), ("c", np.int16)], align=True)
NESTED = np.dtype(
    [("x", np.float32, (2, 3)), ("y", [("z", ">i2"), ("s", "S3", (2,))]), ("t", "M8[us]"), ("é", "?")]
)


def filled(dtype: Any, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """An array of a dtype that may have any bytes."""
    dtype = np.dtype(dtype)
    data = np.random.default_rng(11).integers(0, 256, math.prod(shape) * dtype.itemsize, dtype=np.uint8)
    return np.frombuffer(data.tobytes(), dtype).reshape(shape).copy()


def numpy_arrays() -> dict[str, np.ndarray[Any, Any]]:
    """One array for each dtype of NumPy and way to describe one."""
    records = np.zeros((5, 4), ALIGNED)
    records["a"] = np.arange(20).reshape(5, 4)
    records["b"] = np.linspace(-1, 1, 20).reshape(5, 4)
    nested = filled("u1", (4, NESTED.itemsize)).copy()
    nested[:, -1] &= 1
    arrays = {
        "dates": np.array(["2024-02-29", "NaT", "1815-12-10"], "M8[D]"),
        "dates_25s": np.array([1, 2], "M8[25s]"),
        "dates_big": np.array([1, -5], ">M8[ns]"),
        "spans": np.array([1, -2, "NaT"], "m8[ms]"),
        "text": np.array(["", "a", "äöü 漢字 \U0001f600", "\ud800"]),
        "text_big": np.array(["ab", "漢"], ">U2"),
        "text_zeros": np.array(["a\0b", "\0"]),
        "raw_text": np.array([b"", b"a\0b", b"\xff"]),
        "void": filled("V5", (3,)),
        "void_one": filled("V1", (3,)),
        "records": records,
        "nested": nested.view(NESTED).reshape(4),
        "titled": filled([(("a title", "name"), "i4"), ("other", "u2")], (3,)),
        "gaps": filled([("a", "i4"), ("b", "i4"), ("c", "i4")], (3,))[["a", "c"]],
        "no_fields": np.zeros(3, np.dtype([])),
        "float0": np.zeros((2, 3), jax.dtypes.float0),
        "long_double": np.array([1.5, -0.0, np.pi], np.longdouble),
        "long_complex": np.array([1.5 - 2j], np.clongdouble),
        "plain_metadata": np.arange(3, dtype=np.dtype("i4", metadata={"unit": "m"})),
        "field_metadata": np.zeros(3, np.dtype([("a", "i4")], metadata={"unit": "m"})),
    }
    for code in "?bhilqBHILQefdFD":
        arrays[f"native_{code}"] = np.array([0, 1], code) if code == "?" else filled(code, (5,))
    for code in "hilHILefdFD":
        arrays[f"big_{code}"] = filled(f">{code}", (3, 2))
    for name in ("bfloat16", "float8_e4m3fn", "int4", "uint2", "float4_e2m1fn"):
        arrays[name] = bit_patterns(np.dtype(getattr(ml_dtypes, name)))
    return arrays


def test_every_numpy_dtype(path, options):
    assert_round_trip(path, numpy_arrays(), options)


def test_numpy_arrays_without_axes_and_without_elements(path, options):
    tree = {}
    for name, array in numpy_arrays().items():
        flat = array.reshape(-1)
        tree[name] = [flat[:1].reshape(()), flat[:0], flat[:0].reshape(3, 0, 2), flat[:1].reshape(1, 1, 1)]
    assert_round_trip(path, tree, options)


def views(array: np.ndarray[Any, Any]) -> dict[str, np.ndarray[Any, Any]]:
    """The same kind of values in every memory order."""
    read_only = array.copy()
    read_only.flags.writeable = False
    return {
        "fortran": np.asfortranarray(array),
        "transposed": array.T,
        "strided": array[::2, 1::2],
        "reversed": array[::-1, ::-1],
        "columns": array[:, 2:5],
        "broadcast": np.broadcast_to(array[:1], (3, *array.shape)),
        "permuted": np.moveaxis(np.stack([array, array]), 0, 1),
        "read_only": read_only,
    }


@pytest.mark.parametrize(
    "dtype", ["<i4", ">i4", ">f8", "<c16", ">U3", "V3", ALIGNED, NESTED, ml_dtypes.bfloat16, "u1"], ids=str
)
def test_memory_orders(path, options, dtype):
    dtype = np.dtype(dtype)
    base = np.array(["abc", "", "漢"], dtype) if dtype.kind == "U" else filled(dtype, (8 * 12,))
    if dtype == NESTED:
        base["é"] = True
    tree = views(np.resize(base, 8 * 12).reshape(8, 12))
    jaxckpt.save(path, tree, options=options)
    for like in (None, tree):
        restored = jaxckpt.restore(path, like)
        for name, array in tree.items():
            assert restored[name].dtype == array.dtype, name
            assert restored[name].shape == array.shape, name
            assert fields_of(restored[name]) == fields_of(array), name
        assert restored["fortran"].flags.f_contiguous
        assert restored["transposed"].flags.f_contiguous
        assert not restored["fortran"].flags.c_contiguous
        assert restored["strided"].flags.c_contiguous
        assert restored["read_only"].flags.writeable


def fields_of(array: np.ndarray[Any, Any]) -> list[bytes]:
    """The bytes of an array, field by field, since padding between fields has no value."""
    if array.dtype.names:
        return [data for name in array.dtype.names for data in fields_of(array[name])]
    return [array.tobytes()]


def test_strings_without_characters(path, options):
    empty = np.zeros(3, [("text", "U0"), ("raw", "S0"), ("number", "i4")])
    tree = {"text": empty["text"], "raw": empty["raw"], "void": np.zeros((2, 2), "V0")}
    jaxckpt.save(path, tree, options=options)
    restored = jaxckpt.restore(path, tree)
    got = {name: (array.dtype, array.shape) for name, array in restored.items()}
    assert got == {name: (array.dtype, array.shape) for name, array in tree.items()}


def test_memory_maps_come_back_as_arrays(path, tmp_path, options):
    values = np.memmap(tmp_path / "values", np.float32, "w+", shape=(100, 3))
    values[:] = np.arange(300).reshape(100, 3)
    jaxckpt.save(path, {"map": values}, options=options)
    restored = jaxckpt.restore(path, {"map": values})["map"]
    assert type(restored) is np.ndarray
    assert (restored == values).all()


# --- scalars --------------------------------------------------------------------------------------------------

NAN_WITH_PAYLOAD = struct.unpack("<d", struct.pack("<Q", 0xFFF8_0000_DEAD_BEEF))[0]

NUMPY_SCALARS = [
    *(np.dtype(code).type(1) for code in "?bhilBHILefdFD"),
    np.array([0x7FC0_1234], np.uint32).view(np.float32)[0],
    np.float64(-0.0),
    np.float16(6e-8),
    np.uint64(2**64 - 1),
    np.datetime64("2024-02-29T12:00"),
    np.datetime64("NaT", "s"),
    np.datetime64(3, "25s"),
    np.timedelta64(-5, "ms"),
    np.timedelta64(5, "ms"),
    np.str_(""),
    np.str_("ends in zeros\0\0"),
    np.str_("漢 \U0001f600 \ud800"),
    np.str_("long " * 10_000),
    np.bytes_(b""),
    np.bytes_(b"\0ends in zeros\0\0"),
    np.bytes_(b"x" * 100_000),
    np.void(b"\0abc\0"),
    np.array((1, 2.5), [("a", "i4"), ("b", ">f8")])[()],
    np.zeros((), NESTED)[()],
    *(
        getattr(ml_dtypes, name)(1)
        for name in (
            "bfloat16",
            "float8_e4m3fn",
            "float8_e5m2",
            "int4",
            "uint2",
            "float4_e2m1fn",
            "float8_e8m0fnu",
        )
    ),
]

PYTHON_VALUES = [
    *(0, 1, -1, 2**31, 2**53 + 1, -(2**63), 2**63, 2**64 - 1, 2**64, -(10**40), 7**20_000, -(2**200_000)),
    *(0.0, -0.0, 5e-324, 1.7976931348623157e308, math.inf, -math.inf, math.nan, NAN_WITH_PAYLOAD, 0.1),
    *(complex(-0.0, 0.0), complex(NAN_WITH_PAYLOAD, -math.inf), complex(1, -0.0)),
    *(True, False),
    *(
        "",
        "a",
        "\0",
        "ends in zero\0",
        "äöü 漢字 \U0001f600",
        "\ud800",
        "\udc80\ud83d\ude00",
        "line\nline\r\n",
    ),
    *("x" * 4096, "x" * 4097, "漢" * 30_000, "\ud800" * 70_000, "long " * 40_000),
    *(b"", b"\0", bytes(range(256)), b"\xff" * 16_384, b"\xfe" * 16_385, bytes(range(256)) * 1000),
]


def test_numpy_scalars(path, options):
    assert_round_trip(path, NUMPY_SCALARS, options)


def test_long_doubles(path, options):
    # Of their 16 bytes NumPy copies the 10 that count; the others differ from copy to copy.
    tree = [
        np.longdouble("0.1"),
        np.longdouble("-0.0"),
        np.longdouble("inf"),
        np.clongdouble(1 / np.longdouble(3)),
    ]
    jaxckpt.save(path, tree, options=options)
    for like in (None, tree):
        restored = jaxckpt.restore(path, like)
        assert [type(value) for value in restored] == [type(value) for value in tree]
        assert repr(restored) == repr(tree)


def test_python_values(path, options):
    assert_round_trip(path, [*PYTHON_VALUES, None], options)


def test_scalars_are_read_alone(path, options):
    jaxckpt.save(path, [*PYTHON_VALUES, *NUMPY_SCALARS], options=options)
    checkpoint = jaxckpt.open(path)
    got = [checkpoint[str(number)][...] for number in range(len(checkpoint))]
    assert_same_tree(got, [*PYTHON_VALUES, *NUMPY_SCALARS])


def test_one_type_of_scalar_is_not_another(path):
    saved = [
        1,
        1.0,
        True,
        1j,
        "1",
        b"1",
        np.int64(1),
        np.float64(1),
        np.bool_(True),
        np.str_("1"),
        np.bytes_(b"1"),
    ]
    jaxckpt.save(path, saved)
    for shift in range(1, len(saved)):
        like = saved[shift:] + saved[:shift]
        with pytest.raises(MismatchError) as caught:
            jaxckpt.restore(path, like)
        assert len(caught.value.problems) == len(saved)


def test_units_of_dates_are_compared(path):
    jaxckpt.save(path, {"when": np.datetime64(5, "s")})
    with pytest.raises(
        MismatchError, match=r"when: numpy.datetime64\[s\] on disk, numpy.datetime64\[ms\] in `like`"
    ):
        jaxckpt.restore(path, {"when": np.datetime64(5, "ms")})


# --- refused --------------------------------------------------------------------------------------------------


class Colour:
    """A class that JAX does not know."""


class Variable:
    """Holds an array, as the variables of Keras do."""

    def __init__(self, value: jax.Array) -> None:
        self._value = value

    @property
    def value(self) -> jax.Array:
        return self._value


def deleted_array() -> jax.Array:
    array = jnp.arange(3.0)
    array.delete()
    return array


def donated_array() -> jax.Array:
    array = jnp.arange(3.0)
    jax.jit(lambda x: x + 1, donate_argnums=0)(array)
    assert array.is_deleted()
    return array


def unreduced_array() -> jax.Array:
    mesh = Mesh(np.array(jax.devices()[:2], dtype=object), ("x",), axis_types=(AxisType.Explicit,))
    rows = jax.device_put(jnp.ones((4, 4)), NamedSharding(mesh, P(None, "x")))
    columns = jax.device_put(jnp.ones((4, 4)), NamedSharding(mesh, P("x", None)))
    with jax.set_mesh(mesh):
        product = jax.jit(lambda a, b: jnp.einsum("ij,jk->ik", a, b, out_sharding=P(unreduced={"x"})))
        return product(rows, columns)


def a_function() -> None:
    """Stands for an activation function."""


REFUSED = {
    "function": (lambda: a_function, "code is not stored; take it out of the tree"),
    "lambda": (lambda: lambda x: x, "code is not stored"),
    "class": (lambda: Colour, "code is not stored"),
    "jitted": (lambda: jax.jit(a_function), "code is not stored"),
    "objects": (lambda: np.array([None, 1], object), "convert it to a dtype with a fixed size"),
    "field_of_objects": (lambda: np.zeros(2, [("a", object)]), "convert it to a dtype with a fixed size"),
    "object_record": (lambda: np.zeros(2, [("a", object)])[0], "holds Python objects"),
    "variable_strings": (
        lambda: np.array(["a"], np.dtypes.StringDType()),
        "convert it to a dtype with a fixed size",
    ),
    "fields_out_of_order": (
        lambda: np.zeros(2, [("a", "i4"), ("b", "i4")])[["b", "a"]],
        "save its fields, or a copy in a plain dtype",
    ),
    "masked": (lambda: np.ma.masked_array([1, 2], [True, False]), "convert it with numpy.asarray"),
    "recarray": (lambda: np.rec.array([(1,)]), "convert it with numpy.asarray"),
    "unreduced": (unreduced_array, "jax.reshard it to a reduced sharding first"),
    "deleted": (deleted_array, "save before the step that donates it"),
    "donated": (donated_array, "save before the step that donates it"),
    "struct": (lambda: jax.ShapeDtypeStruct((2,), jnp.float32), "has no values; save arrays"),
    "ref": (lambda: jax.new_ref(jnp.ones(2)), "save the array that it holds, ref[...]"),
    "set": (lambda: {1, 2}, "store arrays, numbers, strings or bytes"),
    "frozenset": (lambda: frozenset([1]), "store arrays, numbers, strings or bytes"),
    "range": (lambda: range(3), "store arrays, numbers, strings or bytes"),
    "bytearray": (lambda: bytearray(b"a"), "store arrays, numbers, strings or bytes"),
    "path": (lambda: pathlib.PurePath("a"), "store arrays, numbers, strings or bytes"),
    "date": (lambda: dt.date(2024, 2, 29), "store arrays, numbers, strings or bytes"),
    "decimal": (lambda: decimal.Decimal("0.1"), "store arrays, numbers, strings or bytes"),
    "variable": (lambda: Variable(jnp.ones(2)), "store its .value, or register the type"),
    "own_class": (Colour, "or register the type as a pytree node"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("is_async", [False, True])
def test_a_leaf_that_cannot_be_stored_is_refused_before_any_io(tmp_path, name, is_async):
    make, advice = REFUSED[name]
    tree = {"good": jnp.ones(3), "layer": {"bad": make()}}
    save = jaxckpt.save_async if is_async else jaxckpt.save
    with pytest.raises(UnsupportedLeafError) as caught:
        save(tmp_path / "run" / "checkpoint", tree)
    (problem,) = caught.value.problems
    assert problem.key == "layer/bad"
    assert advice in problem.message
    assert str(caught.value).splitlines()[:2] == [
        "cannot save the tree: 1 of 2 leaves cannot be stored",
        f"  layer/bad: {problem.message}",
    ]
    assert list(tmp_path.iterdir()) == []


def test_all_refused_leaves_are_listed_at_once(tmp_path):
    tree = {name: make() for name, (make, _) in REFUSED.items()}
    with pytest.raises(UnsupportedLeafError) as caught:
        jaxckpt.save(tmp_path / "checkpoint", {"bad": tree, "good": 1})
    assert [problem.key for problem in caught.value.problems] == [f"bad/{name}" for name in sorted(REFUSED)]
    assert f"{len(REFUSED)} of {len(REFUSED) + 1} leaves" in str(caught.value)
    assert f"... and {len(REFUSED) - 10} more" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_an_overwrite_with_a_refused_leaf_leaves_the_old_checkpoint(path):
    jaxckpt.save(path, {"a": 1})
    before = sorted(path.rglob("*"))
    with pytest.raises(UnsupportedLeafError):
        jaxckpt.save(path, {"a": a_function}, overwrite=True)
    assert sorted(path.rglob("*")) == before
    assert jaxckpt.restore(path) == {"a": 1}


@pytest.mark.parametrize("transform", [jax.jit, jax.vmap, lambda f: jax.grad(lambda x: f(x).sum())])
def test_tracers_are_refused(tmp_path, transform):
    def step(x: jax.Array) -> jax.Array:
        jaxckpt.save(tmp_path / "checkpoint", {"x": x, "key": jax.random.key(0)})
        return x

    with pytest.raises(
        UnsupportedLeafError, match=r"x: is a tracer: call save outside of jit, grad and vmap"
    ):
        transform(step)(jnp.ones(3))
    assert list(tmp_path.iterdir()) == []


def test_traced_keys_are_refused(tmp_path):
    def step(key: jax.Array) -> jax.Array:
        jaxckpt.save(tmp_path / "checkpoint", {"key": key})
        return key

    with pytest.raises(UnsupportedLeafError, match="is a tracer"):
        jax.jit(step)(jax.random.key(0))
    assert list(tmp_path.iterdir()) == []


def test_matrices_are_refused(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PendingDeprecationWarning)
        matrix = np.matrix([[1, 2]])
    with pytest.raises(UnsupportedLeafError, match=r"is a matrix; convert it with numpy.asarray"):
        jaxckpt.save(tmp_path / "checkpoint", matrix)
