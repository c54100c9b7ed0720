"""Every tree comes back: with `like` as the same node types, without it as plain containers, and never by an import.

Leaves are small numbers and arrays here; test_leaves.py is about leaves.
"""

from __future__ import annotations

import collections
import dataclasses
import enum
import functools
import math
import string
import sys
import tempfile
import typing
from typing import Any

import equinox as eqx
import flax
import flax.training.train_state
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from hypothesis import given, settings, strategies as st
from jax.tree_util import DictKey, GetAttrKey

import jaxckpt
from jaxckpt import CheckpointError, SaveOptions, UnsupportedLeafError
from jaxckpt._keys import check_nodes, escape_component, flatten

from .helpers import assert_same_tree, run_fork

OWN_OBJECTS = SaveOptions(pack_bytes_max=0)


def assert_round_trip(path: Any, tree: Any) -> Any:
    """The tree comes back with itself, and with abstract arrays, as `like`; returns what comes back without."""
    jaxckpt.save(path, tree)
    assert_same_tree(jaxckpt.restore(path, tree), tree)
    abstract = jax.tree.map(_abstract, tree)
    assert_same_tree(jaxckpt.restore(path, abstract), tree)
    return jaxckpt.restore(path)


def _abstract(leaf: Any) -> Any:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if isinstance(leaf, jax.Array) else leaf


# --- plain containers -----------------------------------------------------------------------------------------

PLAIN_TREES = [
    {},
    [],
    (),
    None,
    collections.OrderedDict(),
    {"a": {}, "b": [], "c": (), "d": None},
    [None, [None], (None,), {"a": None}],
    [[[]], ((),), {"a": {"b": {}}}],
    7,
    "a leaf that is a string",
    {"a": 1},
    {"b": 1, "a": [2, (3, None, {"c": 4.5})]},
    [1, [2, [3, [4]]]],
    (1,),
    ((), 1, ()),
    collections.OrderedDict([("z", 1), ("a", 2), (("t", 1), 3)]),
    {"o": collections.OrderedDict([(3, 1), (1, collections.OrderedDict(b=1, a=2))])},
]


@pytest.mark.parametrize("tree", PLAIN_TREES, ids=repr)
def test_plain_containers_come_back_exactly(path, tree):
    jaxckpt.save(path, tree)
    for restored in (jaxckpt.restore(path), jaxckpt.restore(path, tree)):
        assert_same_tree(restored, tree)
        assert restored == tree
        assert repr(restored) == repr(jax.tree.map(lambda leaf: leaf, tree))  # types and order of all nodes


def test_a_tree_that_is_one_array(path):
    tree = jnp.arange(6.0).reshape(2, 3)
    jaxckpt.save(path, tree, options=OWN_OBJECTS)
    assert_same_tree(jaxckpt.restore(path), tree)
    assert_same_tree(jaxckpt.restore(path, jnp.zeros((2, 3))), tree)
    assert jaxckpt.open(path).keys() == ("",)
    assert jaxckpt.open(path)[""][1].tolist() == [3.0, 4.0, 5.0]


def test_a_default_dict_comes_back_as_a_dict_or_like_itself(path):
    tree = collections.defaultdict(list, {"b": 1, "a": {"c": 2}})
    assert assert_round_trip(path, tree) == {"a": {"c": 2}, "b": 1}
    restored = jaxckpt.restore(path, tree)
    assert type(restored) is collections.defaultdict
    assert restored.default_factory is list
    assert type(jaxckpt.restore(path)) is dict


@pytest.mark.parametrize(
    "wrap", [lambda node: {"a": node}, lambda node: [node], lambda node: (0, node), lambda node: [[], node]]
)
def test_deep_trees(path, wrap):
    tree: Any = 1.5
    for _ in range(390):
        tree = wrap(tree)
    jaxckpt.save(path, tree, options=OWN_OBJECTS)
    assert_same_tree(jaxckpt.restore(path), tree)
    assert_same_tree(jaxckpt.restore(path, tree), tree)


def test_an_array_deep_down(path):
    tree: Any = jnp.arange(3)
    for number in range(390):
        tree = {f"a long name for level {number}": tree}
    jaxckpt.save(path, tree, options=OWN_OBJECTS)
    assert_same_tree(jaxckpt.restore(path), tree)


@pytest.mark.parametrize("depth", [402, 20_000])
def test_trees_that_are_too_deep_are_refused_before_any_io(tmp_path, depth):
    tree: Any = 1
    for _ in range(depth):
        tree = [tree]
    with pytest.raises(CheckpointError, match="deep"):
        jaxckpt.save(tmp_path / "checkpoint", tree)
    assert list(tmp_path.iterdir()) == []
    while isinstance(tree, list):  # taken apart from the outside: Python's own destructor would recurse
        tree = tree[0]


def test_wide_trees(path):
    tree = {f"layer_{number:04d}": [number, {"x": number}] for number in range(2000)}
    jaxckpt.save(path, tree)
    assert jaxckpt.restore(path) == tree


# --- keys -----------------------------------------------------------------------------------------------------


class Text(str, enum.Enum):  # noqa: UP042  StrEnum would print differently, and this form is still common
    """Strings with names."""

    ONE = "one"


class Number(enum.IntEnum):
    """Integers with names."""

    TWO = 2


ODD_STRINGS = [
    *(
        "",
        "/",
        "//",
        "a/b",
        "/a",
        "a/",
        ".",
        "..",
        "...",
        "../..",
        "~",
        "~0",
        "~1",
        "~01",
        "~e",
        "~s1",
        "~j1",
        "~~",
    ),
    *("%", "%2F", "%empty", "%long", "a%20b", "zarr.json", "c", "c.0", "c.0.0", "__x", "__init__", ".zarray"),
    *("0", "1", "01", "-1", "-", "+1", "1.0", "٣", "1_000", " 1", "None", "null", "true"),
    *(" ", "\t", "\n", "a\nb", "\0", "a\0", "\\", '"', "'", "*", "?", "[a]", "a:b", "CON", "aux.", "A", "a"),
    *("é", "e\u0301", "漢字", "\U0001f600", "\ud800", "\udfff", "\ud83d\ude00", "\u200b", "\ufeff"),
    *("x" * 300, "x" * 299 + "y", "漢" * 300, "/" * 300, "~" * 300, ("long/" * 300), "x" * 5000),
]

ODD_KEYED_DICTS = [
    dict.fromkeys(ODD_STRINGS, 1),
    dict.fromkeys([0, 1, -1, 2**31, -(2**63), 2**63, 2**64 - 1, 2**64, -(10**30)], 1),
    {(): 1, ("a",): 2, ("a", "b"): 3, ("a/b",): 4},
    {(1, 2): 1, (2, (2, 3)): 2, (0,): 3},
    {(True, None): 1},
    {(b"\xff", 0.5, "\ud800"): 1},
    {0.5: 1, -0.0: 2, float("inf"): 3, 1e300: 4},
    {float("nan"): 1},
    {True: 1, False: 2},
    {None: 1},
    {b"": 1, b"/": 2, b"\0\xff": 3},
    {1: 1, 2.5: 2},
    {Number.TWO: 1},
    {Text.ONE: 1},
    {np.int64(3): 1, np.int8(-1): 2},
    {np.str_("a"): 1},
    {np.bool_(True): 1},
    {np.float64(0.25): 1},
]


@pytest.mark.parametrize("keyed", ODD_KEYED_DICTS, ids=lambda keyed: repr(list(keyed))[:40])
@pytest.mark.parametrize("kind", [dict, collections.OrderedDict])
def test_odd_keys(path, keyed, kind):
    tree = {"outer": kind((key, [index, {key: jnp.int32(index)}]) for index, key in enumerate(keyed))}
    jaxckpt.save(path, tree, options=OWN_OBJECTS if len(keyed) < 10 else SaveOptions())
    assert_same_tree(jaxckpt.restore(path, tree), tree)
    restored = jaxckpt.restore(path)
    assert type(restored["outer"]) is kind
    if not any(isinstance(key, float) and math.isnan(key) for key in keyed):  # NaN equals nothing
        assert_same_tree(restored, tree)
        assert restored["outer"].keys() == tree["outer"].keys()
    assert len(set(jaxckpt.open(path).keys())) == 2 * len(keyed)


def test_odd_strings_as_directories(path):
    tree = {text: {text: jnp.full(3, number)} for number, text in enumerate(ODD_STRINGS)}
    jaxckpt.save(path, tree, options=OWN_OBJECTS)
    assert_same_tree(jaxckpt.restore(path), tree)
    assert jaxckpt.verify(path).ok
    inside = {entry.relative_to(path).parts[0] for entry in path.rglob("*")}
    assert {name for name in inside if not name.startswith("data-")} == {"manifest.msgpack", "zarr.json"}


def test_keys_that_are_equal_to_python_are_not_mixed_up(path):
    # The structure of a tree is remembered from save to save; 1, 1.0 and True are equal and hash alike.
    for number, key in enumerate([1, True, 1.0, 0, False, 0.0, -0.0, (1,), (True,), (1.0,), Number.TWO, 2]):
        target = path / str(number)
        jaxckpt.save(target, {key: 5})
        (restored,) = jaxckpt.restore(target)
        plain = int(key) if isinstance(key, Number) else key
        assert repr(restored) == repr(plain)


@pytest.mark.parametrize(
    "key",
    [frozenset([1]), 1j, range(3), 10**5000, object],
    ids=["frozenset", "complex", "range", "digits", "class"],
)
def test_keys_that_cannot_be_stored_are_refused_before_any_io(tmp_path, key):
    with pytest.raises(UnsupportedLeafError, match=r"a dict key of type .*use str, int, tuple") as caught:
        jaxckpt.save(tmp_path / "checkpoint", {"layer": {key: 1}})
    assert caught.value.problems[0].key == "layer"
    assert list(tmp_path.iterdir()) == []


def test_dicts_that_jax_cannot_sort_are_refused_before_any_io(tmp_path):
    with pytest.raises(CheckpointError, match="JAX cannot flatten the tree"):
        jaxckpt.save(tmp_path / "checkpoint", {"a": 1, 2: 3})
    assert list(tmp_path.iterdir()) == []


texts = st.text(alphabet=st.sampled_from("ab/~%.01-esj_ é\ud800"), max_size=5)
scalar_keys = st.one_of(
    texts, st.integers(-(2**70), 2**70), st.floats(allow_nan=False), st.booleans(), st.binary(max_size=2)
)
tuple_keys = st.recursive(scalar_keys, lambda inner: st.lists(inner, max_size=3).map(tuple), max_leaves=4)


def nests(kinds: tuple[str, ...]) -> Any:
    """Trees of dicts (keys of one sort each, as JAX wants it), lists and tuples."""
    key_sorts = [
        texts,
        st.integers(-(2**70), 2**70),
        st.floats(allow_nan=False),
        st.lists(texts, max_size=3).map(tuple),
    ]

    def containers(inner: Any) -> Any:
        options = [st.dictionaries(sort, inner, max_size=3) for sort in key_sorts]
        if "ordered" in kinds:
            options.append(st.dictionaries(tuple_keys, inner, max_size=3).map(collections.OrderedDict))
        options += [st.lists(inner, max_size=3), st.lists(inner, max_size=3).map(tuple)]
        return st.one_of(options)

    return st.recursive(st.integers(0, 9) | st.none(), containers, max_leaves=12)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(nests(("ordered",)))
def test_any_nest_of_dicts_lists_and_tuples_comes_back(tree):
    with tempfile.TemporaryDirectory() as folder:
        jaxckpt.save(f"{folder}/checkpoint", tree)
        restored = jaxckpt.restore(f"{folder}/checkpoint")
        assert restored == tree
        assert jax.tree.structure(restored) == jax.tree.structure(tree)
        assert repr(restored) == repr(jax.tree.map(lambda leaf: leaf, tree))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.lists(st.lists(tuple_keys, min_size=1, max_size=3), min_size=2, max_size=6))
def test_different_paths_have_different_keys(paths):
    """The key of a path does not depend on the rest of the tree, so chains of one-key dicts show all of them."""

    seen: dict[str, str] = {}
    for steps in paths:
        tree: Any = 0
        for step in reversed(steps):
            tree = {step: tree}
        (key,) = flatten(tree).keys
        # JAX itself does not tell apart equal keys such as 1, 1.0 and True, which cannot be in one dict.
        assert seen.setdefault(key, repr(steps)) == repr(steps)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.dictionaries(texts, st.dictionaries(texts, st.integers(0, 9), max_size=3), max_size=4))
def test_keys_name_directories_one_to_one(tree):
    from jaxckpt._zarr import leaf_directory

    keys = flatten(tree).keys
    assert len({leaf_directory(key) for key in keys}) == len(keys)


# --- registered node types ------------------------------------------------------------------------------------

Pair = collections.namedtuple("Pair", ["first", "second"])  # noqa: PYI024


class Typed(typing.NamedTuple):
    """A namedtuple with annotations, a default and a method."""

    weight: Any
    bias: Any = None

    def norm(self) -> Any:
        return abs(self.weight)


class Grown(Pair):
    """A subclass of a namedtuple."""


def test_namedtuples_come_back_by_their_fields(path):
    tree = {
        "pair": Pair(1, {"a": 2}),
        "typed": Typed(3),
        "empty": optax.EmptyState(),
        "grown": Grown(Pair(1, 2), []),
    }
    restored = assert_round_trip(path, tree)
    assert restored["pair"].first == 1
    assert restored["pair"].second == {"a": 2}
    assert restored["pair"] == (1, {"a": 2})
    assert type(restored["pair"]).__name__ == "Pair"
    assert restored["typed"]._asdict() == {"weight": 3, "bias": None}
    assert not hasattr(restored["typed"], "norm")
    assert restored["empty"]._fields == ()
    assert restored["grown"].first.second == 2
    assert jaxckpt.restore(path, tree)["typed"].norm() == 3


class StaticPair(collections.namedtuple("StaticPair", ["value", "name"])):  # noqa: PYI024
    """A namedtuple that tells JAX of one of its fields only."""

    __slots__ = ()


jax.tree_util.register_pytree_node(
    StaticPair, lambda pair: ((pair.value,), pair.name), lambda name, children: StaticPair(children[0], name)
)


def test_a_namedtuple_with_flatten_functions_of_its_own(path):
    tree = [StaticPair(jnp.ones(2), "a name"), 5]
    restored = assert_round_trip(path, tree)
    assert restored[0][0].tolist() == [1.0, 1.0]
    assert jaxckpt.restore(path, tree)[0].name == "a name"


class Plain:
    """A node type; how it flattens is up to the subclass."""

    def __init__(self, *children: Any, static: Any = None) -> None:
        self.children = children
        self.static = static


class WithoutKeys(Plain):
    """Registered with no names for its children."""


class WithKeys(Plain):
    """Registered with names."""


class WithOddKeys(Plain):
    """Registered with keys of all sorts."""


class Childless(Plain):
    """Has only static data."""


class Unhashable(Plain):
    """Its static data has no hash."""


def register(kind: type[Plain], keys: list[Any] | None) -> None:
    def unflatten(static: Any, children: Any) -> Plain:
        return kind(*children, static=static)

    if keys is None:
        jax.tree_util.register_pytree_node(kind, lambda node: (node.children, node.static), unflatten)
        return
    jax.tree_util.register_pytree_with_keys(
        kind, lambda node: (list(zip(keys, node.children, strict=True)), node.static), unflatten
    )


register(WithoutKeys, None)
register(WithKeys, [GetAttrKey("weight"), GetAttrKey("bias/~")])
register(WithOddKeys, [DictKey(("a", 1)), DictKey(-3), "a string for a key"])
register(Childless, None)
register(Unhashable, [DictKey("x")])


def test_custom_nodes(path):
    tree = {
        "without": WithoutKeys(1, [2, None], WithKeys(3, 4)),
        "with": WithKeys(jnp.ones(2), {"a": None}, static="kept in the class"),
        "odd": WithOddKeys(1, 2, 3),
        "childless": Childless(static=3),
        "unhashable": Unhashable(1, static={"a": [1]}),
    }
    restored = assert_round_trip(path, tree)
    assert restored["without"] == {0: 1, 1: [2, None], 2: {"weight": 3, "bias/~": 4}}
    assert restored["with"]["weight"].tolist() == [1.0, 1.0]
    assert restored["odd"] == {("a", 1): 1, -3: 2, "a string for a key": 3}
    assert restored["childless"] == {}
    assert restored["unhashable"] == {"x": 1}
    assert jaxckpt.restore(path, tree)["with"].static == "kept in the class"


class SameKeyTwice(Plain):
    """Gives two children one name."""


class EqualKeys(Plain):
    """Gives its children names that Python takes for equal."""


register(SameKeyTwice, [DictKey("x"), GetAttrKey("x")])
register(EqualKeys, [DictKey(1), DictKey(True)])


@pytest.mark.parametrize("kind", [SameKeyTwice, EqualKeys])
def test_nodes_whose_children_cannot_be_told_apart_are_refused_before_any_io(tmp_path, kind):
    with pytest.raises(CheckpointError, match=r"two leaves of the tree have this key|a key twice"):
        jaxckpt.save(tmp_path / "checkpoint", {"node": kind(1, 2)})
    assert list(tmp_path.iterdir()) == []


@functools.partial(jax.tree_util.register_dataclass, data_fields=["weight", "inner"], meta_fields=["name"])
@dataclasses.dataclass
class Layer:
    """A dataclass registered with JAX."""

    weight: Any
    inner: Any
    name: str = "layer"


@flax.struct.dataclass
class FlaxLayer:
    """A dataclass of flax."""

    weight: Any
    name: str = flax.struct.field(pytree_node=False, default="layer")


def test_dataclasses(path):
    tree = [Layer(jnp.ones(2), Layer(1, None, "inner"), "outer"), FlaxLayer(2, "flax")]
    restored = assert_round_trip(path, tree)
    assert restored[0]["inner"] == {"weight": 1, "inner": None}
    assert restored[1] == {"weight": 2}
    same = jaxckpt.restore(path, tree)
    assert (same[0].name, same[0].inner.name, same[1].name) == ("outer", "inner", "flax")


def test_partial_functions_that_jax_knows(path):
    tree = jax.tree_util.Partial(jnp.add, jnp.ones(2))
    assert_round_trip(path, tree)
    assert jaxckpt.restore(path, tree)(1.0).tolist() == [2.0, 2.0]


# --- libraries ------------------------------------------------------------------------------------------------

PARAMS = {"dense": {"kernel": jnp.full((3, 4), 0.5), "bias": jnp.zeros(4)}, "scale": jnp.ones(())}


def test_optax_states_without_like_have_their_fields(path):
    jaxckpt.save(path, optax.adamw(1e-3).init(PARAMS))
    adam, decay, rate = jaxckpt.restore(path)
    assert adam._fields == ("count", "mu", "nu")
    assert adam.mu["dense"]["kernel"].shape == (3, 4)
    assert (decay._fields, rate._fields) == ((), ())


class Network(linen.Module):
    """A network of flax.linen with parameters and batch statistics."""

    @linen.compact
    def __call__(self, x: Any) -> Any:
        return linen.BatchNorm(use_running_average=False)(linen.Dense(3)(x))


@pytest.mark.slow
def test_flax_train_state(path):
    network = Network()
    variables = network.init(jax.random.key(0), jnp.ones((2, 3)))
    state = flax.training.train_state.TrainState.create(
        apply_fn=network.apply, params=variables["params"], tx=optax.adamw(1e-3)
    )
    state = state.apply_gradients(grads=jax.tree.map(jnp.ones_like, state.params))
    restored = assert_round_trip(path, state)
    assert set(restored) == {"step", "params", "opt_state"}
    again = jaxckpt.restore(path, state)
    assert type(again) is flax.training.train_state.TrainState
    grads = jax.tree.map(jnp.ones_like, state.params)
    assert_same_tree(again.apply_gradients(grads=grads), state.apply_gradients(grads=grads))


def test_flax_frozen_dicts(path):
    tree = flax.core.freeze({"a": {"b/c": jnp.ones(2)}, "d": 1})
    restored = assert_round_trip(path, tree)
    assert type(restored["a"]) is dict
    assert restored["a"]["b/c"].tolist() == [1.0, 1.0]
    assert type(jaxckpt.restore(path, tree)) is flax.core.FrozenDict


class NnxNetwork(nnx.Module):
    """A network of flax.nnx with parameters, statistics, and a stream of PRNG keys."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.first = nnx.Linear(3, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(4, 4, rngs=rngs) for _ in range(2)])

    def __call__(self, x: Any) -> Any:
        x = self.drop(self.norm(self.first(x)))
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.mark.slow
def test_nnx_states_and_models(path):
    model = NnxNetwork(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)
    graph, state = nnx.split((model, optimizer))
    restored = assert_round_trip(path, state)
    assert restored[0]["layers"][1]["kernel"]["value"].shape == (4, 4)
    again, _ = nnx.merge(graph, jaxckpt.restore(path, state))
    x = jnp.ones((2, 3))
    assert again(x).tolist() == model(x).tolist()


def test_an_nnx_model_is_a_tree_of_its_own(path):
    model = NnxNetwork(nnx.Rngs(0))
    jaxckpt.save(path, model)
    restored = jaxckpt.restore(path, NnxNetwork(nnx.Rngs(1)))
    assert type(restored) is NnxNetwork
    x = jnp.ones((2, 3))
    assert restored(x).tolist() == model(x).tolist()


@pytest.mark.slow
def test_equinox_modules(path):
    model = eqx.nn.MLP(2, 3, 4, 2, key=jax.random.key(0))
    with pytest.raises(UnsupportedLeafError, match=r"activation: .*equinox.partition") as caught:
        jaxckpt.save(path, model)
    assert [problem.key for problem in caught.value.problems] == ["activation", "final_activation"]
    arrays, static = eqx.partition(model, eqx.is_array)
    restored = assert_round_trip(path, arrays)
    assert restored["layers"][0]["weight"].shape == (4, 2)
    assert restored["activation"] is None
    x = jnp.ones(2)
    again = eqx.combine(jaxckpt.restore(path, arrays), static)
    assert again(x).tolist() == model(x).tolist()
    # The whole model as `like`: its functions are not on disk, and are kept.
    other = eqx.nn.MLP(2, 3, 4, 2, key=jax.random.key(1))
    whole = jaxckpt.restore(path, other, missing="keep")
    assert type(whole) is eqx.nn.MLP
    assert whole(x).tolist() == model(x).tolist()


def test_equinox_state(path):
    model, state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(3, "batch", mode="batch")
    assert_round_trip(path, (eqx.filter(model, eqx.is_array), state))


# --- no pickle, no import -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_restore_imports_no_user_code(path, tmp_path):
    folder = tmp_path / "modules"
    folder.mkdir()
    (folder / "user_code.py").write_text(
        "import collections, dataclasses, functools, jax\n"
        "Pair = collections.namedtuple('Pair', 'first second')\n"
        "@functools.partial(jax.tree_util.register_dataclass, data_fields=['weight'], meta_fields=['name'])\n"
        "@dataclasses.dataclass\n"
        "class Layer:\n    weight: object\n    name: str = 'x'\n"
    )
    saver = """
        import sys; sys.path.insert(0, sys.argv[1])
        import jax.numpy as jnp, numpy as np, user_code, jaxckpt
        record = np.zeros(2, [("a", "i4")])
        jaxckpt.save(sys.argv[2], [user_code.Pair(1, user_code.Layer(jnp.ones(2))), record, np.datetime64(1, "s")])
    """
    run_fork(saver, folder, path)
    restorer = """
        import builtins, sys
        import jax, jaxckpt
        def refuse(*arguments, **keywords):
            raise AssertionError("pickle was used")
        import pickle, _pickle
        for module in (pickle, _pickle):
            module.loads = module.load = module.Unpickler = refuse
        tree = jaxckpt.restore(sys.argv[1])
        pair, record, date = tree
        assert pair._fields == ("first", "second") and type(pair).__module__ != "user_code"
        assert list(pair.second) == ["weight"] and pair.second["weight"].tolist() == [1.0, 1.0]
        assert "user_code" not in sys.modules
        try:
            import user_code
        except ModuleNotFoundError:
            print("cannot be imported")
    """
    assert run_fork(restorer, path).stdout == "cannot be imported\n"


def test_a_class_name_on_disk_is_only_shown(path, tmp_path, monkeypatch):
    # A class of a module that would leave a trace if anything imported it.
    trap = tmp_path / "trap_module.py"
    trap.write_text("raise RuntimeError('imported')\n")
    monkeypatch.syspath_prepend(tmp_path)
    kind = type("Trap", (Plain,), {"__module__": "trap_module"})
    register(kind, None)
    pair = collections.namedtuple("Pair", ["a"], module="trap_module")  # noqa: PYI024
    jaxckpt.save(path, {"node": kind(1, 2), "pair": pair(3)})
    restored = jaxckpt.restore(path)
    assert restored["node"] == {0: 1, 1: 2}
    assert restored["pair"].a == 3
    assert "trap_module" not in sys.modules


def test_names_that_python_does_not_allow(path):
    kind = type("Odd", (tuple,), {"_fields": tuple(string.ascii_lowercase[:2]), "__module__": "m"})
    kind.__qualname__ = "a class/with.odd name"
    jaxckpt.save(path, kind((1, 2)))
    restored = jaxckpt.restore(path)
    assert (restored.a, restored.b) == (1, 2)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(names=st.lists(st.text("ab_01-~/\0\n", max_size=4), max_size=6, unique=True))
def test_names_that_are_escaped_together_are_as_each_by_itself(names: list[str]) -> None:
    """A manifest with other keys than those of its structure would be refused, and these come from two functions."""
    keys = flatten(dict.fromkeys(names, 0)).keys
    assert check_nodes([["dict", sorted(names)], *[0] * len(names)], keys) is None
    assert keys == tuple(escape_component(name) for name in sorted(names))
