"""Items come back exactly, whatever they hold; what cannot come back exactly is refused, all of it at once, and no
bytes make the decoder raise anything but `FormatError`, or take much memory.
"""

from __future__ import annotations

import collections
import enum
import math
import pathlib
import random
import struct
import time
import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import msgpack
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from jaxckpt import FormatError, MismatchError, UnsupportedLeafError
from jaxckpt._dtypes import _JAX_ONLY_NAMES, _ZARR_NAMES
from jaxckpt._items import (
    _VALUES_MAX,
    DEPTH_MAX,
    _Encoder,
    check_items,
    decode_items,
    encode_items,
    load_items,
)

from .helpers import make_mesh

SETTINGS = settings(max_examples=300, deadline=None, derandomize=True)

STRUCTURED = np.dtype([("count", "<i4"), ("box", ">f8", (2, 3)), ("name", "<U3"), ("inner", [("flag", "?")])])
PADDED = np.dtype([("small", "i1"), ("large", "<i8")], align=True)
DTYPES = [
    *(np.dtype(getattr(ml_dtypes, name, name)) for name in sorted(_ZARR_NAMES | _JAX_ONLY_NAMES)),
    *(
        np.dtype(name)
        for name in ("float128", "complex256", "<U5", ">U5", "S3", "V7", ">f4", ">i8", "<U0", "S0")
    ),
    *(np.dtype(name) for name in ("datetime64[ns]", "timedelta64[D]", ">M8[s]", "datetime64")),
    STRUCTURED,
    PADDED,
]
DTYPE_NAMES = [str(dtype) for dtype in DTYPES]


def round_trip(value: Any) -> Any:
    return decode_items(encode_items({"item": value}), "test")["item"]


def assert_exact(got: Any, want: Any) -> None:
    """Both values have one type, one order and the same bits, all the way down."""
    assert type(got) is type(want)
    if isinstance(want, (np.ndarray, np.generic)):
        assert got.dtype == want.dtype
        assert got.shape == want.shape
        assert got.tobytes() == want.tobytes()
    elif isinstance(want, dict):
        assert len(got) == len(want)
        for got_pair, want_pair in zip(got.items(), want.items(), strict=True):
            assert_exact(got_pair, want_pair)
    elif isinstance(want, (list, tuple)):
        assert len(got) == len(want)
        for got_member, want_member in zip(got, want, strict=True):
            assert_exact(got_member, want_member)
    elif isinstance(want, float):
        assert struct.pack("<d", got) == struct.pack("<d", want)
    elif isinstance(want, complex):
        assert_exact((got.real, got.imag), (want.real, want.imag))
    else:
        assert got == want


def assert_comes_back(value: Any) -> None:
    assert_exact(round_trip(value), value)


def nested(depth: int, inner: Any = None) -> Any:
    for _ in range(depth):
        inner = [inner]
    return inner


def filled(dtype: np.dtype[Any], shape: tuple[int, ...], seed: int = 0) -> np.ndarray[Any, Any]:
    """An array with random bytes, in so far as the dtype allows any."""
    count = math.prod(shape)
    generator = np.random.default_rng(seed)
    if dtype.kind == "U":
        text = "".join(map(chr, generator.integers(1, 0xD7FF, dtype.itemsize // 4)))
        array = np.ndarray((count,), dtype, bytearray(count * dtype.itemsize))
        array[:] = text
        return array.reshape(shape)
    if dtype == STRUCTURED:
        array = np.zeros(shape, dtype)
        array["count"] = generator.integers(100, size=shape)
        array["box"] = generator.normal(size=(*shape, 2, 3))
        array["name"] = "né"
        array["inner"]["flag"] = True
        return array
    data = bytearray(generator.bytes(count * dtype.itemsize))
    if dtype.kind == "b":
        data = bytearray(byte & 1 for byte in data)
    return np.ndarray(shape, dtype, data)


def refusal(value: Any) -> str:
    """What is said of an item that is refused for one reason."""
    with pytest.raises(UnsupportedLeafError) as raised:
        encode_items({"item": value})
    (problem,) = raised.value.problems
    assert problem.kind == "leaf"
    assert str(problem) in str(raised.value)
    return str(problem)


# --- plain values ---------------------------------------------------------------------------------------------


def bits_to_float(bits: int) -> float:
    return struct.unpack("<d", struct.pack("<Q", bits))[0]


floats = st.integers(0, (1 << 64) - 1).map(bits_to_float) | st.floats()
scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-(1 << 200), 1 << 200)
    | floats
    | st.builds(complex, floats, floats)
    | st.text(st.characters(exclude_categories=()))
    | st.binary()
)
numpy_scalars = (
    st.integers(-128, 127).map(np.int8)
    | st.integers(0, (1 << 64) - 1).map(np.uint64)
    | floats.map(np.float64)
    | st.floats(width=32).map(np.float32)
    | st.floats(width=16).map(ml_dtypes.bfloat16)
    | st.text(max_size=4).map(np.str_)
    | st.binary(max_size=4).map(np.bytes_)
    | st.booleans().map(np.bool_)
    | st.integers(-(1 << 40), 1 << 40).map(lambda count: np.datetime64(count, "s"))
)
arrays = st.builds(
    filled,
    st.sampled_from(DTYPES),
    st.lists(st.integers(0, 3), max_size=3).map(tuple),
    st.integers(0, 1000),
)
keys = scalars | numpy_scalars | st.lists(scalars, max_size=3).map(tuple)
values = st.recursive(
    scalars | numpy_scalars | arrays,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(st.text(), inner, max_size=4)
        | st.dictionaries(keys, inner, max_size=4)
    ),
    max_leaves=20,
)


@pytest.mark.slow
@SETTINGS
@given(st.dictionaries(st.text(st.characters(exclude_categories=()), min_size=1), values, max_size=3))
def test_nested_values_come_back_exactly(items: dict[str, Any]) -> None:
    assert_exact(decode_items(encode_items(items), "test"), items)


@pytest.mark.parametrize("bits", range(59, 70))
@pytest.mark.parametrize("offset", [-1, 0, 1])
@pytest.mark.parametrize("sign", [-1, 1])
def test_ints_around_the_limits_of_msgpack_come_back(bits: int, offset: int, sign: int) -> None:
    assert_comes_back(sign * ((1 << bits) + offset))


def test_an_int_of_100_000_bits_comes_back() -> None:
    assert_comes_back(-(1 << 100_000))


@pytest.mark.parametrize("bits", [0x7FF0000000000001, 0x7FF8DEADBEEF0001, 0xFFFFFFFFFFFFFFFF, 1 << 63])
def test_every_bit_of_nans_and_of_minus_zero_comes_back(bits: int) -> None:
    assert_comes_back([bits_to_float(bits), complex(bits_to_float(bits), bits_to_float(bits))])


def test_bools_are_no_ints_and_tuples_are_no_lists() -> None:
    assert_comes_back([True, 1, 1.0, (), [], {}, ((),), [()], b"", ""])


def test_keys_of_dicts_keep_their_types_and_their_order() -> None:
    assert_comes_back({"z": 1, "a": 2})
    assert_comes_back(
        {True: 1, 2: 2, 3.5: 3, None: 4, "5": 5, b"5": 6, 1j: 7, (1, "a"): 8, 1 << 70: 9, (): 10}
    )
    assert_comes_back({np.int8(3): 1, np.float32(0.5): 2, ml_dtypes.bfloat16(2): 3, np.datetime64(1, "s"): 4})
    assert_comes_back({b"bytes": 1})
    assert_comes_back({(): {1: {"a": {2: ()}}}})


def test_several_nan_keys_come_back() -> None:
    assert_comes_back({float("nan"): 1, float("nan"): 2, 0: 3})


def test_lone_surrogates_come_back_in_values_keys_and_names() -> None:
    items = {"\ud800": {"\udfff": "a\udc80", 1: "\ud800\udc00"}}
    assert_exact(decode_items(encode_items(items), "test"), items)


def test_no_items_have_an_encoding() -> None:
    assert encode_items({}) == b"\x80"
    assert decode_items(b"\x80", "test") == {}


def test_what_happens_after_encoding_changes_nothing() -> None:
    state = {"list": [1], "array": np.arange(3)}
    data = encode_items({"state": state})
    state["list"].append(2)
    state["array"][:] = 9
    assert_exact(decode_items(data, "test"), {"state": {"list": [1], "array": np.arange(3)}})


# --- arrays ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_NAMES)
@pytest.mark.parametrize("shape", [(), (3,), (2, 0, 3), (2, 3)])
def test_arrays_of_every_dtype_come_back(dtype: np.dtype[Any], shape: tuple[int, ...]) -> None:
    got = round_trip(filled(dtype, shape))
    assert_exact(got, filled(dtype, shape))
    assert got.flags.c_contiguous
    assert got.flags.writeable
    assert got.flags.aligned


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_NAMES)
def test_numpy_scalars_of_every_dtype_come_back(dtype: np.dtype[Any]) -> None:
    scalar = filled(dtype, ())[()]
    assert isinstance(scalar, np.generic)
    assert_comes_back(scalar)


def test_numpy_strings_keep_the_zeros_at_their_end() -> None:
    assert_comes_back([np.str_("a\0\0"), np.bytes_(b"a\0\0"), np.str_("\0"), np.str_(""), np.bytes_(b"")])


def test_the_padding_of_a_structured_dtype_keeps_its_bits() -> None:
    array = filled(PADDED, (4,))
    assert any(array.tobytes()[1:8])
    assert_comes_back(array)


def test_arrays_that_are_not_contiguous_come_back_contiguous() -> None:
    array = np.arange(24).reshape(2, 3, 4)
    for view in (
        array.T,
        array[:, ::-1, ::2],
        np.broadcast_to(np.float32(1), (2, 2)),
        np.asfortranarray(array),
    ):
        got = round_trip(view)
        assert got.flags.c_contiguous
        assert got.flags.writeable
        np.testing.assert_array_equal(got, view, strict=True)


def test_memory_mapped_files_come_back_as_arrays(tmp_path: pathlib.Path) -> None:
    np.save(tmp_path / "a.npy", np.arange(5))
    assert_exact(round_trip(np.load(tmp_path / "a.npy", mmap_mode="r")), np.arange(5))


def test_arrays_of_jax_come_back_as_numpy_arrays() -> None:
    mesh = make_mesh({"x": 4})
    sharded = jax.device_put(jnp.arange(8.0), NamedSharding(mesh, PartitionSpec("x")))
    assert_exact(round_trip(sharded), np.arange(8, dtype=np.float32))
    assert_exact(round_trip(jnp.ones((), jnp.bfloat16)), np.ones((), ml_dtypes.bfloat16))
    assert_exact(round_trip([jnp.arange(3, dtype=jnp.int4)]), [np.arange(3).astype(ml_dtypes.int4)])


# --- objects --------------------------------------------------------------------------------------------------


class Counter:
    """An object with a state, in the manner of Grain."""

    def __init__(self, count: Any = 0) -> None:
        self.count = count

    def get_state(self) -> Any:
        return self.count

    def set_state(self, state: Any) -> None:
        self.count = state


class Loader:
    """An object with a state, in the manner of torch."""

    def __init__(self, epoch: int = 0) -> None:
        self.epoch = epoch

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "workers": {0: (1, 2)}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert state["workers"] == {0: (1, 2)}
        self.epoch = state["epoch"]


class Both(Counter):
    def state_dict(self) -> dict[str, Any]:
        raise AssertionError("get_state comes first")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise AssertionError("set_state comes first")


class DictWithState(dict[str, int]):
    def get_state(self) -> dict[str, int]:
        return dict(self)

    def set_state(self, state: dict[str, int]) -> None:
        self.update(state)


class Moody:
    """An object that does not give or take its state."""

    def get_state(self) -> Any:
        raise RuntimeError("not now")

    def set_state(self, state: Any) -> None:
        raise RuntimeError("not that")


def carry_over(source: Any, target: Any) -> None:
    """What a save and a restore do with one item."""
    states = decode_items(encode_items({"item": source}), "test")
    load_items({"item": target}, states, "test")


def test_a_random_state_of_numpy_goes_on_where_it_was() -> None:
    source = np.random.RandomState(3)
    source.normal(size=7)
    target = np.random.RandomState(4)
    carry_over(source, target)
    np.testing.assert_array_equal(target.normal(size=5), source.normal(size=5))


@pytest.mark.parametrize("kind", [np.random.PCG64, np.random.MT19937, np.random.Philox, np.random.SFC64])
def test_the_state_of_a_generator_of_numpy_comes_back(kind: type[Any]) -> None:
    source = np.random.Generator(kind(3))
    source.integers(10, size=3, dtype=np.uint8)
    assert_comes_back(source.bit_generator.state)
    target = np.random.Generator(kind(4))
    target.bit_generator.state = round_trip(source.bit_generator.state)
    np.testing.assert_array_equal(target.integers(10, size=9), source.integers(10, size=9))


def test_the_state_of_a_python_generator_comes_back() -> None:
    source = random.Random(3)
    source.gauss(0, 1)
    assert_comes_back(source.getstate())
    target = random.Random(4)
    target.setstate(round_trip(source.getstate()))
    assert target.gauss(0, 1) == source.gauss(0, 1)


class Numbers:
    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> int:
        return index

    def __repr__(self) -> str:  # part of the state, and must be the same in both loaders
        return "Numbers()"


def grain_iterators() -> dict[str, Callable[[], Iterator[Any]]]:
    grain = pytest.importorskip("grain.python")
    dataset = grain.MapDataset.source(Numbers()).shuffle(seed=1).map(lambda number: 2 * number).batch(2)

    def load() -> Iterator[Any]:
        sampler = grain.IndexSampler(20, grain.ShardOptions(0, 1), shuffle=True, seed=3, num_epochs=1)
        return iter(grain.DataLoader(data_source=Numbers(), sampler=sampler, worker_count=0))

    return {
        "loader": load,
        "dataset": lambda: iter(dataset.to_iter_dataset()),
        "batches": lambda: iter(dataset.to_iter_dataset().batch(2)),
    }


def test_iterators_of_grain_go_on_where_they_were() -> None:
    makers = grain_iterators()
    sources = {name: make() for name, make in makers.items()}
    for source in sources.values():
        next(source)
        next(source)
    data = encode_items(sources)
    rest = {name: list(source) for name, source in sources.items()}
    targets = {name: make() for name, make in makers.items()}
    states = decode_items(data, "test")
    assert isinstance(states["loader"], bytes)
    assert isinstance(states["dataset"], dict)
    load_items(targets, states, "test")
    for name, target in targets.items():
        assert rest[name]
        for got, want in zip(target, rest[name], strict=True):
            np.testing.assert_array_equal(got, want)


def test_objects_in_the_manner_of_torch_take_their_state() -> None:
    target = Loader()
    carry_over(Loader(epoch=3), target)
    assert target.epoch == 3


def test_get_state_wins_over_state_dict() -> None:
    target = Both()
    carry_over(Both(5), target)
    assert target.count == 5


def test_a_subclass_of_dict_with_a_state_is_an_object() -> None:
    target = DictWithState()
    carry_over(DictWithState(a=1), target)
    assert target == {"a": 1}


def test_the_state_of_an_object_is_of_the_time_of_the_call() -> None:
    counter = Counter([1])
    data = encode_items({"counter": counter})
    counter.count.append(2)
    assert decode_items(data, "test") == {"counter": [1]}


def test_an_object_that_gives_no_state_raises_its_own_error_with_the_name_of_the_item() -> None:
    with pytest.raises(RuntimeError, match="not now") as raised:
        encode_items({"moody": Moody()})
    assert raised.value.__notes__ == ["when the item 'moody' was asked for its state by get_state()"]


def test_an_object_that_takes_no_state_raises_its_own_error_with_the_name_of_the_item() -> None:
    with pytest.raises(RuntimeError, match="not that") as raised:
        load_items({"moody": Moody()}, {"moody": 1}, "run/step_1")
    assert raised.value.__notes__ == [
        "when the item 'moody' of 'run/step_1' was given its state by set_state()"
    ]


def test_missing_items_are_all_named_before_any_object_is_changed() -> None:
    counter = Counter()
    targets = {"counter": counter, "b": Counter(), "c": Loader()}
    with pytest.raises(MismatchError) as raised:
        load_items(targets, {"counter": 5, "loader": 1, "config": {}}, "run/step_1")
    assert str(raised.value) == (
        "cannot restore the items of 'run/step_1': 2 of 3 are not there\n"
        "  item 'b': not in the checkpoint\n"
        "  item 'c': not in the checkpoint\n"
        "the checkpoint has the items 'config', 'counter', 'loader'"
    )
    assert [problem.kind for problem in raised.value.problems] == ["missing", "missing"]
    assert counter.count == 0


def test_a_checkpoint_without_items_says_so() -> None:
    with pytest.raises(MismatchError, match="the checkpoint has no items"):
        load_items({"counter": Counter()}, {}, "test")


@pytest.mark.parametrize(
    "target", [{}, None, 3, np.zeros(3), Counter, object()], ids=lambda x: type(x).__name__
)
def test_what_takes_no_state_is_refused_before_any_object_is_changed(target: Any) -> None:
    counter = Counter()
    with pytest.raises(TypeError, match=r"read a plain value from `jaxckpt\.open\(path\)\.items\['b'\]`"):
        load_items({"a": counter, "b": target}, {"a": 1, "b": 2}, "test")
    assert counter.count == 0


def test_checking_changes_no_object() -> None:
    counter = Counter()
    check_items({"a": counter}, {"a": 1}, "test")
    assert counter.count == 0
    with pytest.raises(MismatchError, match="1 of 1 are not there"):
        check_items({"a": counter}, {"b": 1}, "test")
    with pytest.raises(TypeError, match="takes no state"):
        check_items({"a": {}}, {"a": 1}, "test")


def test_items_that_no_object_waits_for_are_left_alone() -> None:
    counter = Counter()
    load_items({"a": counter}, {"a": 1, "b": 2}, "test")
    assert counter.count == 1
    load_items({}, {"a": 1}, "test")


# --- what is refused ------------------------------------------------------------------------------------------


class Color(enum.Enum):
    RED = 1


class Level(enum.IntEnum):
    LOW = 1


class Text(str):
    __slots__ = ()


class Point(NamedTuple):
    x: int
    y: int


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({1, 2}, "is of type set; store None, numbers"),
        (bytearray(b"a"), "is of type bytearray; store None"),
        (object(), "is of type object; store None"),
        (Color.RED, "Color; store None"),
        (Level.LOW, "Level and would come back as a plain int"),
        (Text("a"), "Text and would come back as a plain str"),
        (Point(1, 2), "Point and would come back as a plain tuple"),
        (
            collections.OrderedDict(a=1),
            "is of type collections.OrderedDict and would come back as a plain dict",
        ),
        (collections.defaultdict(int), "would come back as a plain dict"),
        (np.ma.masked_array([1], [True]), "convert it with numpy.asarray"),
        (np.array([1, None], object), "dtype object holds Python objects"),
        (np.array(["a"], np.dtypes.StringDType()), "holds Python objects"),
        (np.zeros(2, STRUCTURED).view(np.recarray), "convert it with numpy.asarray"),
        (np.zeros(2, np.dtype((np.record, STRUCTURED))), "numpy.record"),
        (np.zeros(2, np.dtype((np.record, STRUCTURED)))[0], "numpy.record"),
        (np.random.default_rng(), "store its .bit_generator.state"),
        (random.Random(), "store its .getstate()"),
        (Counter, "is the class Counter; pass an instance"),
        ([Counter()], "is an object with a state of its own"),
        (Counter(Counter()), "is an object with a state of its own"),
        ({frozenset(): 1}, "has a dict key of type frozenset"),
        ({(1, (2,)): 1}, "has a dict key of type tuple"),
        ({Level.LOW: 1}, "has a dict key of type"),
        ({np.frombuffer(b"x", [("a", "i1")])[0]: 1}, "has a dict key of type numpy.void"),
        (jax.ShapeDtypeStruct((1,), "int8"), "ShapeDtypeStruct; store None"),
        (np.zeros(1 << 33, np.int8), "has 8589934592 bytes"),
        (np.broadcast_to(np.int64(1), 1 << 30), "has 8589934592 bytes"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_what_would_not_come_back_exactly_is_refused(value: Any, message: str) -> None:
    assert message in refusal(value)


def test_typed_keys_tracers_and_deleted_arrays_are_refused() -> None:
    assert "store jax.random.key_data of them" in refusal(jax.random.key(0))
    deleted = jnp.ones(3)
    deleted.delete()
    assert "was deleted or donated" in refusal(deleted)
    found: list[str] = []
    jax.jit(lambda tracer: found.append(refusal(tracer)))(1.0)
    assert "is a tracer" in found[0]


def test_every_refusal_is_told_with_its_place() -> None:
    state = {
        "a": [1, 2, 3, set()],
        "x y": ({7: {8}, b"k": [1, {9}]},),
        "n" * 80: [set()],
        1 << 100_000: {(1, 2): set()},
        frozenset([1]): frozenset(),
    }
    with pytest.raises(UnsupportedLeafError) as raised:
        encode_items({"loader": state, "fine": 1, "other": set()})
    places = [problem.message.partition("; ")[0] for problem in raised.value.problems]
    assert places == [
        "item 'loader': .a[3]: is of type set",
        "item 'loader': ['x y'][0][7]: is of type set",
        "item 'loader': ['x y'][0][b'k'][1]: is of type set",
        f"item 'loader': .{'n' * 80}[0]: is of type set",
        "item 'loader': [<int>][<tuple>]: is of type set",
        "item 'loader': has a dict key of type frozenset",
        "item 'loader': [<frozenset>]: is of type frozenset",
        "item 'other': is of type set",
    ]
    assert str(raised.value).startswith(
        "cannot save the items: 8 values in them cannot be stored\n  item 'loader': .a[3]:"
    )
    assert str(raised.value).endswith("\nnothing was written")


def test_messages_disturb_no_terminal() -> None:
    with pytest.raises(UnsupportedLeafError) as raised:
        encode_items({"\x1b[2J": {"\x1b\n": type("\x1b", (), {})()}})
    assert str(raised.value).replace("\n", "").isprintable()


@pytest.mark.parametrize("items", [[("a", 1)], None, "a"])
def test_items_are_a_mapping(items: Any) -> None:
    with pytest.raises(TypeError, match="must be a mapping"):
        encode_items(items)


@pytest.mark.parametrize("name", [1, None, b"a", Text("a"), np.str_("a")])
def test_names_are_str(name: Any) -> None:
    with pytest.raises(TypeError, match="the name of an item must be a str"):
        encode_items({name: 1})
    with pytest.raises(TypeError, match="the name of an item must be a str"):
        load_items({name: Counter()}, {}, "test")


def test_names_are_not_empty() -> None:
    with pytest.raises(ValueError, match="must not be empty"):
        encode_items({"": 1})


# --- bounds of encoding ---------------------------------------------------------------------------------------


def test_values_nest_up_to_the_limit_and_no_further() -> None:
    assert round_trip(nested(DEPTH_MAX)) == nested(DEPTH_MAX)
    assert refusal(nested(DEPTH_MAX + 1)).endswith("is nested more than 100 deep")
    assert refusal(nested(100_000)).endswith("is nested more than 100 deep")


@pytest.mark.parametrize(
    "value", [np.arange(3), np.float32(1), np.zeros(2, STRUCTURED), {1: 2}, {"a": 1}, (1,)], ids=str
)
def test_what_is_accepted_at_any_depth_is_decoded(value: Any) -> None:
    accepted = 0
    for depth in range(DEPTH_MAX - 6, DEPTH_MAX + 2):
        try:
            data = encode_items({"item": nested(depth, value)})
        except UnsupportedLeafError:
            continue
        accepted += 1
        assert_exact(decode_items(data, "test"), {"item": nested(depth, value)})
    assert 0 < accepted < 8


def test_values_that_contain_themselves_are_refused() -> None:
    cycle: list[Any] = [1]
    cycle += [cycle, {"a": (cycle,)}, [cycle] * 3]
    with pytest.raises(UnsupportedLeafError) as raised:
        encode_items({"item": cycle})
    assert len(raised.value.problems) == 5
    assert raised.value.problems[1].message == "item 'item': [2].a[0]: contains itself"


def test_a_value_may_be_there_twice() -> None:
    shared = [1, (2,)]
    assert_comes_back({"a": shared, "b": [shared, shared]})


def test_a_small_object_that_stands_for_endless_values_is_refused() -> None:
    value: Any = 1
    for _ in range(DEPTH_MAX):
        value = [value, value]
    encoder = _Encoder("item", values_max=10_000)
    encoder.encode(value)
    assert [problem.message for problem in encoder.problems] == [
        "item 'item': holds more than 10000 values; store long lists of numbers as arrays"
    ]
    assert _Encoder("item")._values_left == _VALUES_MAX == 1 << 22


def test_as_many_values_as_are_allowed_are_encoded() -> None:
    encoder = _Encoder("item", values_max=100)
    assert encoder.encode(list(range(99))) == list(range(99))
    assert encoder.problems == []
    encoder = _Encoder("item", values_max=99)
    encoder.encode(list(range(99)))
    assert len(encoder.problems) == 1


# --- bytes ----------------------------------------------------------------------------------------------------


def pack(value: Any) -> bytes:
    return msgpack.packb({"a": value}, strict_types=True)


def mark(number: int) -> Any:
    return msgpack.ExtType(number, b"")


INT, COMPLEX, TUPLE, DICT, ARRAY, SCALAR = range(1, 7)


def test_the_encoding_is_the_specified_one() -> None:
    """These bytes are for ever: checkpoints hold them."""
    small = np.array([[1], [2]], np.uint8)
    items = {"a": [None, True, -1, 0.5, "é", b"b"], "t": (1,), "d": {1: "x"}, "n": small, "s": np.int16(-2)}
    items |= {"i": -(1 << 64), "j": -(1 << 71), "u": (1 << 64) - 1, "c": 1 + 2j}
    want = bytes.fromhex(
        "89"
        "a161 96 c0 c3 ff cb3fe0000000000000 a2c3a9 c40162"
        "a174 92 c70003 01"
        "a164 93 c70004 01 a178"
        "a16e 95 c70005 a575696e7438 c4020102 02 01"
        "a173 93 c70006 a5696e743136 c402feff"
        "a169 c709 01 0000000000000000 ff"
        "a16a c709 01 0000000000000000 80"
        "a175 cfffffffffffffffff"
        "a163 d802 000000000000f03f 0000000000000040"
    )
    assert encode_items(items) == want
    assert_exact(decode_items(want, "test"), items)


EXAMPLE: dict[str, Any] = {
    "state": {"next": 3, "rng": (1 << 70, 1j, -0.5), "keys": {1: b"x", None: "é"}},
    "array": np.arange(6, dtype=np.int16).reshape(2, 3),
    "more": [np.float32(1.5), np.str_("ab"), ml_dtypes.bfloat16(2), np.zeros((), STRUCTURED), [], True],
}


def decode_or_refuse(data: bytes) -> bool:
    """Whether the bytes were decoded; then the items can be used, and encoded again. Other errors pass through."""
    try:
        items = decode_items(data, "test")
    except FormatError:
        return False
    assert type(items) is dict
    again = decode_items(encode_items(items), "test")
    assert_exact(again, items)
    return True


def test_every_truncation_is_refused() -> None:
    data = encode_items(EXAMPLE)
    assert decode_or_refuse(data)
    for length in range(len(data)):
        with pytest.raises(FormatError):
            decode_items(data[:length], "test")


@pytest.mark.filterwarnings("ignore")  # NumPy warns of some names of dtypes
def test_every_flipped_bit_gives_a_value_or_is_refused() -> None:
    data = encode_items(EXAMPLE)
    outcomes = collections.Counter[bool]()
    for bit in range(8 * len(data)):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        outcomes[decode_or_refuse(bytes(changed))] += 1
    assert outcomes[True] > 100
    assert outcomes[False] > 100


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@settings(SETTINGS, max_examples=1000)
@given(st.data())
def test_bytes_that_were_changed_anywhere_give_a_value_or_are_refused(draw: st.DataObject) -> None:
    data = bytearray(encode_items(EXAMPLE))
    for _ in range(draw.draw(st.integers(1, 4))):
        at = draw.draw(st.integers(0, len(data)))
        data[at : at + draw.draw(st.integers(0, 4))] = draw.draw(st.binary(max_size=6))
    decode_or_refuse(bytes(data))


@settings(SETTINGS, max_examples=1000)
@given(st.binary(max_size=40))
def test_any_bytes_give_a_value_or_are_refused(data: bytes) -> None:
    decode_or_refuse(b"\x81\xa1a" + data)
    decode_or_refuse(data)


HOSTILE = {
    "no map": msgpack.packb([1]),
    "a scalar": msgpack.packb(1),
    "trailing bytes": b"\x80\xc0",
    "a second value": b"\x80\x80",
    "an empty name": msgpack.packb({"": 1}),
    "a name of bytes": msgpack.packb({b"a": 1}),
    "a name that is an int": msgpack.packb({1: 1}),
    "a name twice": b"\x82\xa1a\x01\xa1a\x02",
    "a key twice": pack({"b": 1})[:3] + b"\x82\xa1b\x01\xa1b\x02",
    "a key of bytes in a map": pack({b"b": 1}),
    "an int as key in a map": pack({1: 1}),
    "a mark as key in a map": b"\x81\xa1a\x81\xc7\x00\x03\x01",
    "bytes that are no UTF-8": b"\x81\xa1a\xa1\xff",
    "the byte that msgpack has not": b"\x81\xa1a\xc1",
    "a time stamp": pack(msgpack.Timestamp(0)),
    "an unknown type": pack(mark(7)),
    "an unknown type in a list": pack([mark(7), 1]),
    "an unknown type with a payload": pack([msgpack.ExtType(9, b"abc")]),
    "a mark with a payload": pack([msgpack.ExtType(TUPLE, b"x"), 1]),
    "a mark alone": pack(mark(TUPLE)),
    "a mark in the middle": pack([1, mark(TUPLE)]),
    "two marks": pack([mark(TUPLE), mark(TUPLE), 1]),
    "a mark in a map": pack({"b": mark(DICT)}),
    "a short int": pack(msgpack.ExtType(INT, b"\x01")),
    "an int without bytes": pack(msgpack.ExtType(INT, b"")),
    "an int that is too long": pack(msgpack.ExtType(INT, b"\xff" * 9 + b"\x00\x00")),
    "a complex that is too short": pack(msgpack.ExtType(COMPLEX, b"\0" * 15)),
    "a complex that is too long": pack(msgpack.ExtType(COMPLEX, b"\0" * 17)),
    "a dict with a key alone": pack([mark(DICT), 1]),
    "a dict with equal keys": pack([mark(DICT), 1, 2, True, 3]),
    "a dict with a list as key": pack([mark(DICT), [], 2]),
    "a dict with a nested tuple as key": pack([mark(DICT), [mark(TUPLE), [mark(TUPLE)]], 2]),
    "a dict with a void scalar as key": pack([mark(DICT), [mark(SCALAR), "|V1", b"x"], 2]),
    "an array of nothing": pack([mark(ARRAY)]),
    "an array without bytes": pack([mark(ARRAY), "int8"]),
    "an array that is too short": pack([mark(ARRAY), "int16", b"abc", 2]),
    "an array that is too long": pack([mark(ARRAY), "int16", b"abcde", 2]),
    "an array of text": pack([mark(ARRAY), "int8", "ab", 2]),
    "an array with a negative size": pack([mark(ARRAY), "int8", b"ab", -1, -2]),
    "an array with a size that is a bool": pack([mark(ARRAY), "int8", b"a", True]),
    "an array with a size that is a float": pack([mark(ARRAY), "int8", b"ab", 2.0]),
    "an array with a size that is a list": pack([mark(ARRAY), "int8", b"ab", [2]]),
    "an array with a huge size": pack([mark(ARRAY), "int8", b"", (1 << 64) - 1, 0]),
    "an array beyond the address space": pack([mark(ARRAY), "float32", b"", 1 << 62, 0]),
    "an array with 65 axes": pack([mark(ARRAY), "int8", b"a", *[1] * 65]),
    "an array of objects": pack([mark(ARRAY), "O", b"\0" * 8, 1]),
    "an array of objects by name": pack([mark(ARRAY), "object", b"\0" * 8, 1]),
    "an array of objects in a field": pack([mark(ARRAY), [["a", "|O"]], b"\0" * 8, 1]),
    "an array of strings of any length": pack([mark(ARRAY), "T", b"\0" * 16, 1]),
    "an array of an unknown dtype": pack([mark(ARRAY), "float99", b"a", 1]),
    "an array of no dtype": pack([mark(ARRAY), None, b"a", 1]),
    "an array of a dtype that is a tuple": pack([mark(ARRAY), [mark(TUPLE), "int8"], b"a", 1]),
    "an array of huge elements": pack([mark(ARRAY), "|V2000000000", b"", 0]),
    "a NumPy scalar with a shape": pack([mark(SCALAR), "int8", b"a", 1]),
    "a NumPy scalar that is too short": pack([mark(SCALAR), "int16", b"a"]),
    "a NumPy scalar that is too long": pack([mark(SCALAR), "int8", b"ab"]),
    "a NumPy scalar that is no text": pack([mark(SCALAR), "<U1", b"\xff\xff\xff\xff"]),
    "a NumPy scalar of objects": pack([mark(SCALAR), "O", b"\0" * 8]),
    "values that are too deep": pack(nested(DEPTH_MAX + 1)),
    "maps that are too deep": b"\x81\xa1a" * 150 + b"\xc0",
    "values that are too deep for msgpack": b"\x81\xa1a" + b"\x91" * 100_000 + b"\xc0",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_bytes_are_refused(name: str) -> None:
    with pytest.raises(FormatError) as raised:
        decode_items(HOSTILE[name], "run/step_1")
    assert str(raised.value).startswith(
        "cannot read the items of 'run/step_1': their bytes are no valid encoding\n"
    )
    assert [problem.kind for problem in raised.value.problems] == ["object"]


CLAIMS = {
    "a list": b"\xdd\xff\xff\xff\xff",
    "a map": b"\xdf\xff\xff\xff\xff",
    "a str": b"\xdb\xff\xff\xff\xff",
    "bytes": b"\xc6\xff\xff\xff\xff",
    "an int": b"\xc9\xff\xff\xff\xff\x01",
    "an array": bytes(msgpack.packb([mark(ARRAY), "int8", b"", 1 << 40])),
    "an array of huge elements": bytes(msgpack.packb([mark(ARRAY), "|V1000000000", b"", 1 << 30])),
    "a scalar": bytes(msgpack.packb([mark(SCALAR), "|V1000000000", b""])),
    "lists in lists": b"\xdd\x00\x01\x00\x00" * 900,
}


@pytest.mark.parametrize("name", CLAIMS)
def test_huge_claims_take_no_memory(name: str) -> None:
    data = b"\x81\xa1a" + CLAIMS[name] + bytes(70_000)
    tracemalloc.start()
    began_s = time.monotonic()
    try:
        with pytest.raises(FormatError):
            decode_items(data, "test")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 4 << 20
    assert time.monotonic() - began_s < 10


def test_an_array_takes_memory_in_proportion_to_its_bytes() -> None:
    array = np.zeros(1 << 22, np.uint8)
    data = encode_items({"a": array})
    tracemalloc.start()
    try:
        decode_items(data, "test")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 4 * array.nbytes
