"""Parts of checkpoints, and trees that changed: what select, rename, missing, unexpected, cast and reshape do.

Messages are part of the interface, so whole texts are compared.
"""

from __future__ import annotations

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec as P

import jaxckpt
from jaxckpt import MismatchError, SaveOptions

from .helpers import assert_same_tree, make_mesh


def saved_tree() -> dict[str, Any]:
    """Parameters, an optimizer's state and a few odd places."""
    return {
        "params": {"dense": {"kernel": jnp.ones((2, 3)), "bias": jnp.zeros(3)}, "out/put": jnp.full(2, 7.0)},
        "opt": [jnp.arange(3), (jnp.arange(4), None), optax.EmptyState()],
        "step": 12,
        "note": "a text",
        "none": None,
        "empty": {},
    }


def id_of(value: Any) -> str:
    """The same in each process."""
    return "function" if callable(value) else str(value)


@pytest.fixture(params=[SaveOptions(), SaveOptions(pack_bytes_max=0)], ids=["packed", "own_objects"])
def saved(request, path):
    """Where `saved_tree` was saved."""
    jaxckpt.save(path, saved_tree(), options=request.param)
    return path


def keys_of(tree: Any) -> list[str]:
    """The keys that the tree's leaves have."""
    from jaxckpt._keys import flatten

    return list(flatten(tree).keys)


def leaves_by_name(tree: Any) -> dict[str, Any]:
    """Leaves by JAX's own names of their places."""
    return {jax.tree_util.keystr(place): leaf for place, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def problems_of(path: Any, *arguments: Any, **keywords: Any) -> list[str]:
    """What a restore that must fail lists."""
    with pytest.raises(MismatchError) as caught:
        jaxckpt.restore(path, *arguments, **keywords)
    return [str(problem) for problem in caught.value.problems]


# --- select ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("select", "keys"),
    [
        ("step", ["step"]),
        ("params/*", ["params/dense/bias", "params/dense/kernel", "params/out~1put"]),
        ("*/kernel", ["params/dense/kernel"]),
        (
            "*",
            [
                "note",
                "opt/0",
                "opt/1/0",
                "params/dense/bias",
                "params/dense/kernel",
                "params/out~1put",
                "step",
            ],
        ),
        (["step", "opt/?"], ["opt/0", "step"]),
        (["step", "st*"], ["step"]),
        (("params/dense/[bk]*",), ["params/dense/bias", "params/dense/kernel"]),
        ("params/*[!s]", ["params/dense/kernel", "params/out~1put"]),
        (lambda key: key.startswith("opt/"), ["opt/0", "opt/1/0"]),
        (lambda key: "~1" in key, ["params/out~1put"]),
    ],
    ids=id_of,
)
def test_select_brings_just_those_leaves(saved, select, keys):
    restored, report = jaxckpt.restore(saved, select=select, report=True)
    assert report.restored == tuple(keys)
    assert sorted([*report.restored, *report.ignored]) == keys_of(saved_tree())
    got, whole = leaves_by_name(restored), leaves_by_name(saved_tree())
    assert len(got) == len(keys)
    assert_same_tree(got, {name: whole[name] for name in got})


def test_what_select_leaves_out_has_no_place_in_dicts_and_none_in_sequences(saved):
    restored = jaxckpt.restore(saved, select="step")
    assert restored == {"step": 12, "opt": [None, (None, None), ()], "none": None, "empty": {}}
    restored = jaxckpt.restore(saved, select="opt/1/0")
    assert restored["opt"][0] is None
    assert restored["opt"][1][0].tolist() == [0, 1, 2, 3]
    assert "params" not in restored


def test_select_with_like_keeps_the_other_leaves_of_like(saved):
    like = jax.tree.map(lambda leaf: leaf * 0 if isinstance(leaf, jax.Array) else leaf, saved_tree())
    like["step"] = 99
    restored, report = jaxckpt.restore(saved, like, select="params/*", report=True)
    assert restored["params"]["out/put"].tolist() == [7.0, 7.0]
    assert restored["step"] == 99
    assert restored["opt"][0] is like["opt"][0]
    assert set(report.kept) == {"opt/0", "opt/1/0", "step", "note"}
    # Shapes of leaves that were not asked for do not matter.
    like["opt"][0] = jnp.zeros((5, 5))
    assert jaxckpt.restore(saved, like, select="params/*")["opt"][0].shape == (5, 5)


def test_a_pattern_that_matches_nothing_is_an_error(saved):
    with pytest.raises(MismatchError) as caught:
        jaxckpt.restore(saved, select=["params/*", "weights/*", "Step"])
    assert str(caught.value).splitlines() == [
        "select= names leaves that are not there",
        "  weights/*: matches no saved key",
        "  Step: matches no saved key",
        "saved keys: 'note', 'opt/0', 'opt/1/0', 'params/dense/bias', 'params/dense/kernel', ... (7 in all)",
    ]


def test_a_predicate_may_select_nothing(path):
    jaxckpt.save(path, {"a": {"b": 1}, "c": jnp.ones(2)})
    assert jaxckpt.restore(path, select=lambda key: False) is None
    like = {"a": {"b": 5}, "c": jnp.zeros(2)}
    assert_same_tree(jaxckpt.restore(path, like, select=lambda key: False), like)
    assert jaxckpt.restore(path, select=[]) is None


def test_unselected_leaves_are_not_read(path):
    jaxckpt.save(
        path, {"big": jnp.ones(1 << 20), "small": jnp.ones(4)}, options=SaveOptions(pack_bytes_max=0)
    )
    _, report = jaxckpt.restore(path, select="small", report=True)
    assert report.bytes_read < 20_000


# --- rename ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rename", "expected"),
    [
        ({"a/w": "a/kernel"}, {"a": {"kernel": 1, "v": 2}, "ab": {"w": 3}}),
        ({"a": "layer"}, {"layer": {"w": 1, "v": 2}, "ab": {"w": 3}}),
        ({"a": "x/y"}, {"x": {"y": {"w": 1, "v": 2}}, "ab": {"w": 3}}),
        ({"a": "", "ab/w": "top"}, {"w": 1, "v": 2, "top": 3}),
        ({"": "model"}, {"model": {"a": {"w": 1, "v": 2}, "ab": {"w": 3}}}),
        ({"a": "b", "a/w": "c"}, {"c": 1, "b": {"v": 2}, "ab": {"w": 3}}),
        ({"a": "ab", "ab": "a"}, {"ab": {"w": 1, "v": 2}, "a": {"w": 3}}),
        ({"a/w": "a~1w"}, {"a/w": 1, "a": {"v": 2}, "ab": {"w": 3}}),
        ({"a/w": "x/7/~s7/~e"}, {"x": {7: {"7": {"": 1}}}, "a": {"v": 2}, "ab": {"w": 3}}),
        ([(r"(.*)/w", r"\1/kernel")], {"a": {"kernel": 1, "v": 2}, "ab": {"kernel": 3}}),
        ([(r"a/(?P<leaf>.)", r"b/\g<leaf>")], {"b": {"w": 1, "v": 2}, "ab": {"w": 3}}),
        ([(r"a/w", "first"), (r"a/.*", "second")], {"first": 1, "second": 2, "ab": {"w": 3}}),
        ({}, {"a": {"w": 1, "v": 2}, "ab": {"w": 3}}),
        ([], {"a": {"w": 1, "v": 2}, "ab": {"w": 3}}),
    ],
    ids=id_of,
)
def test_rename(path, rename, expected):
    jaxckpt.save(path, {"a": {"w": 1, "v": 2}, "ab": {"w": 3}})
    assert jaxckpt.restore(path, rename=rename) == expected
    assert jaxckpt.restore(path, jax.tree.map(lambda _: 0, expected), rename=rename) == expected


def test_rename_of_a_tree_that_is_one_leaf(path):
    jaxckpt.save(path, jnp.ones(3))
    assert jaxckpt.restore(path, rename={"": "params/w"})["params"]["w"].shape == (3,)
    jaxckpt.save(path, {"w": 5}, overwrite=True)
    assert jaxckpt.restore(path, rename={"w": ""}) == 5
    assert jaxckpt.restore(path, 0, rename={"w": ""}) == 5


def test_an_unused_rule_is_an_error(path):
    jaxckpt.save(path, {"a": {"w": 1}, "b": 2})
    expected = ["c: this rule renames no saved key"]
    assert problems_of(path, rename={"a": "x", "c": "y"}) == expected
    assert problems_of(path, rename=[("a/.*", "x"), ("c", "y")]) == expected
    # A rule that an earlier one leaves nothing is unused too, and a part of a component is no prefix.
    assert problems_of(path, rename=[("a/.*", "x"), ("a/w", "y")]) == ["a/w: this rule renames no saved key"]
    assert problems_of(path, rename=[("a", "x")]) == ["a: this rule renames no saved key"]


def test_collisions_are_errors(path):
    jaxckpt.save(path, {"a": 1, "b": 2, "c": {"d": 3}})
    expected = ["b: would be both 'a' and 'b'"]
    assert problems_of(path, rename={"a": "b"}) == expected
    assert problems_of(path, {"b": 0}, rename={"a": "b"}, unexpected="ignore") == expected
    assert problems_of(path, rename=[(".*", "x")]) == [
        "x: would be both 'a' and 'b'",
        "x: would be both 'b' and 'c/d'",
    ]


@pytest.mark.parametrize(
    ("rename", "expected"),
    [
        ({"a": "c"}, "c/d: lies below another leaf"),
        ({"b": "a/x"}, "a/x: lies below another leaf"),
        ({"c/d": "a/x/y"}, "a/x/y: lies below another leaf"),
        ({"a": "e/f", "c/d": "e"}, "e: names the same place as another leaf, or lies above it"),
        ({"a": ""}, "(root): the root cannot be a leaf where there are other leaves"),
        ({"a": "7", "b": "07"}, "07: names the same place as another leaf, or lies above it"),
        ({"a": "~jno json"}, "~jno json: is no key: after ~ only 0, 1, e, s and j have a meaning"),
    ],
    ids=id_of,
)
def test_new_keys_that_make_up_no_tree_are_errors(path, rename, expected):
    jaxckpt.save(path, {"a": 1, "b": 2, "c": {"d": 3}})
    assert problems_of(path, rename=rename) == [expected]


def test_select_goes_by_the_saved_keys_and_frees_the_names_of_what_is_left_out(path):
    jaxckpt.save(path, {"ema": {"w": jnp.full(2, 0.5)}, "params": {"w": jnp.full(2, 1.0)}})
    restored = jaxckpt.restore(path, select="ema/*", rename={"ema": "params"})
    assert list(restored) == ["params"]
    assert restored["params"]["w"].tolist() == [0.5, 0.5]
    like = {"params": {"w": jnp.zeros(2)}}
    restored, report = jaxckpt.restore(path, like, select="ema/*", rename={"ema": "params"}, report=True)
    assert restored["params"]["w"].tolist() == [0.5, 0.5]
    assert report.ignored == ("params/w",)


# --- missing and unexpected -----------------------------------------------------------------------------------


def test_missing_leaves(path):
    jaxckpt.save(path, {"a": 1})
    like = {"a": 0, "b": jnp.full(2, 3.0), "f": print}
    assert problems_of(path, like) == ["b: not on disk", "f: not on disk"]
    restored, report = jaxckpt.restore(path, like, missing="keep", report=True)
    assert restored["a"] == 1
    assert restored["b"] is like["b"]
    assert restored["f"] is print
    assert report.kept == ("b", "f")
    struct = {"a": 0, "b": jax.ShapeDtypeStruct((2,), jnp.float32)}
    assert problems_of(path, struct, missing="keep") == [
        "b: not on disk, and `like` has no value to keep there"
    ]
    stored = {"a": 0, "b": jaxckpt.open(path)["a"]}
    assert problems_of(path, stored, missing="keep") == [
        "b: not on disk, and `like` has no value to keep there"
    ]


def test_unexpected_leaves(path):
    jaxckpt.save(path, {"a": 1, "b": {"c": 2, "d": 3}, "e": None})
    assert problems_of(path, {"a": 0}) == ["b/c: on disk, not in `like`", "b/d: on disk, not in `like`"]
    restored, report = jaxckpt.restore(path, {"a": 0}, unexpected="ignore", report=True)
    assert restored == {"a": 1}
    assert report.ignored == ("b/c", "b/d")


def test_other_words_are_refused(path):
    jaxckpt.save(path, {"a": 1})
    with pytest.raises(ValueError, match="missing must be one of 'error', 'keep', not 'ignore'"):
        jaxckpt.restore(path, {"a": 0}, missing="ignore")
    with pytest.raises(ValueError, match="unexpected must be one of 'error', 'ignore', not 'keep'"):
        jaxckpt.restore(path, {"a": 0}, unexpected="keep")


# --- cast -----------------------------------------------------------------------------------------------------

CASTS = [
    (jnp.full((4, 2), 1.0 / 3), jnp.zeros((4, 2), jnp.bfloat16)),
    (jnp.full(3, 300.0), jnp.zeros(3, jnp.float8_e5m2)),
    (jnp.arange(3), jnp.zeros(3)),
    (jnp.full(3, 1.75), jnp.zeros(3, jnp.int32)),
    (jnp.arange(-2, 3), jnp.zeros(5, bool)),
    (jnp.ones(3, bool), jnp.zeros(3, jnp.uint8)),
    (jnp.arange(4).astype(jnp.int4), jnp.zeros(4)),
    (jnp.ones(3), jnp.zeros(3, jnp.complex64)),
    (np.full(3, 1e300), np.zeros(3, np.float32)),
    (np.full(3, np.nan), np.zeros(3, np.int8)),
    (np.arange(3, dtype=">i4"), np.zeros(3, "<i4")),
    (np.arange(3, dtype=">f8"), jnp.zeros(3)),
    (np.arange(6.0).reshape(2, 3, order="F"), np.zeros((2, 3), ml_dtypes.bfloat16)),
    (np.array(["a", "bc"]), np.zeros(2, "U9")),
    (np.zeros(2, "M8[s]"), np.zeros(2, "M8[ns]")),
]


@pytest.mark.parametrize(("stored", "like"), CASTS, ids=lambda array: f"{type(array).__name__}-{array.dtype}")
def test_cast_converts_arrays(path, stored, like):
    jaxckpt.save(path, {"x": stored})
    assert problems_of(path, {"x": like}) == [f"x: dtype {stored.dtype} on disk, {like.dtype} in `like`"]
    restored, report = jaxckpt.restore(path, {"x": like}, cast=True, report=True)
    with np.errstate(all="ignore"):
        wanted = np.asarray(stored).astype(like.dtype)
    assert isinstance(restored["x"], jax.Array) == isinstance(like, jax.Array)
    assert restored["x"].dtype == like.dtype
    assert np.asarray(restored["x"]).tobytes() == wanted.tobytes()
    assert report.cast == ("x",)


def test_cast_converts_between_the_smallest_types(path):
    """NumPy has no way between many of them."""
    names = ["int2", "int4", "uint2", "uint4", "float4_e2m1fn", "float8_e4m3fn", "float8_e8m0fnu"]
    stored = {name: jnp.ones(3).astype(name) for name in names}
    jaxckpt.save(path, stored)
    for name in names:
        wanted = jax.tree.map(lambda array, name=name: array.astype(name), stored)
        for like in (wanted, jax.tree.map(np.asarray, wanted)):
            assert_same_tree(jaxckpt.restore(path, like, cast=True), like)


def test_cast_wraps_the_smallest_integers_as_it_does_all(path):
    stored = jnp.arange(-8, 8).astype(jnp.int4)
    jaxckpt.save(path, stored)
    for name in ("int2", "uint2", "uint4"):
        wanted = stored.astype(name)
        assert_same_tree(jaxckpt.restore(path, wanted, cast=True), wanted)


def test_cast_converts_shards(path):
    mesh = make_mesh({"data": 4, "model": 2})
    stored = jax.device_put(jnp.arange(64.0).reshape(8, 8) / 3, NamedSharding(mesh, P("data", "model")))
    jaxckpt.save(path, stored)
    like = jax.ShapeDtypeStruct((8, 8), jnp.bfloat16, sharding=NamedSharding(mesh, P(None, "data")))
    restored = jaxckpt.restore(path, like, cast=True)
    assert restored.sharding == like.sharding
    assert_same_tree(restored, jax.device_put(stored.astype(jnp.bfloat16), like.sharding))


@pytest.mark.parametrize(
    ("stored", "like"),
    [
        (np.ones(2, np.complex64), np.ones(2, np.float32)),
        (jnp.ones(2, jnp.complex64), jnp.ones(2)),
        (np.array(["1", "2"]), np.zeros(2)),
        (np.zeros(2), np.array(["1", "2"])),
        (np.array(["abc"]), np.array(["a"])),
        (np.zeros(2, [("a", "i4")]), np.zeros(2)),
        (np.zeros(2, "M8[s]"), np.zeros(2, np.int64)),
        (np.zeros(2, "m8[s]"), np.zeros(2, np.float64)),
    ],
    ids=lambda array: str(array.dtype),
)
def test_cast_is_for_numbers_and_loses_no_imaginary_parts(path, stored, like):
    jaxckpt.save(path, {"x": stored})
    expected = [f"x: dtype {stored.dtype} on disk, {like.dtype} in `like`"]
    assert problems_of(path, {"x": like}, cast=True) == expected
    with pytest.raises(MismatchError) as caught:
        jaxckpt.restore(path, {"x": like})
    assert "cast=True" not in str(caught.value)


NUMBERS = [
    (3, 0.0, 3.0),
    (3.75, 0, 3),
    (1, True, True),
    (True, 0, 1),
    (2, 1j, 2 + 0j),
    (3, np.float32(0), np.float32(3)),
    (np.float32(2.5), 0.0, 2.5),
    (np.int64(7), np.uint8(0), np.uint8(7)),
    (ml_dtypes.bfloat16(1.5), 0.0, 1.5),
    (2**70, 0.0, float(2**70)),
    (jnp.float32(3), 0, 3),
    (np.array(2.5), 0.0, 2.5),
    (3, np.zeros((), np.int8), np.array(3, np.int8)),
    (3, jnp.zeros(()), jnp.float32(3)),
    (np.float64(1e300), np.zeros((), np.float32), np.array(np.inf, np.float32)),
    (jnp.int32(3), np.float16(0), np.float16(3)),
]


@pytest.mark.parametrize(("stored", "like", "wanted"), NUMBERS, ids=repr)
def test_cast_converts_between_numbers_and_arrays_without_axes(path, stored, like, wanted):
    jaxckpt.save(path, {"x": stored})
    with pytest.raises(MismatchError) as caught:
        jaxckpt.restore(path, {"x": like})
    assert str(caught.value).endswith("\npass cast=True to convert between numbers")
    restored, report = jaxckpt.restore(path, {"x": like}, cast=True, report=True)
    assert_same_tree(restored, {"x": wanted})
    assert report.cast == ("x",)


@pytest.mark.parametrize(
    ("stored", "like", "message"),
    [
        (2**40, jnp.int32(0), f"{2**40} on disk does not fit int32 in `like`"),
        (300, np.int8(0), "300 on disk does not fit int8 in `like`"),
        (-1, np.zeros((), np.uint8), "-1 on disk does not fit uint8 in `like`"),
        (10**400, 0.0, f"1{'0' * 39} on disk does not fit float64 in `like`"),
        (float("nan"), 0, "nan on disk does not fit int64 in `like`"),
        (float("inf"), 0, "inf on disk does not fit int64 in `like`"),
        (1j, 0.0, "complex on disk, float in `like`"),
        ("1", 0, "str on disk, int in `like`"),
        (b"1", 0, "bytes on disk, int in `like`"),
        (0, "1", "int on disk, str in `like`"),
        (np.bytes_(b"1"), 0, "numpy.bytes_ on disk, int in `like`"),
        (np.str_("1"), 0, "numpy.str_ on disk, int in `like`"),
        (np.timedelta64(1, "s"), 0, "numpy.timedelta64[s] on disk, int in `like`"),
        (np.array("1"), 0.0, "a NumPy array on disk, float in `like`"),
        (jnp.ones(2), 0.0, "a jax.Array on disk, float in `like`"),
        (1.0, jnp.ones(1), "float on disk, a jax.Array in `like`"),
        (jax.random.key(0), 0, "PRNG keys on disk, int in `like`"),
        ("text " * 10_000, 0, "str on disk, int in `like`"),
        (1, print, "`like` has a builtin_function_or_method, which is no array or number"),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_numbers_that_do_not_fit_are_mismatches(path, stored, like, message):
    jaxckpt.save(path, {"x": stored})
    assert problems_of(path, {"x": like}, cast=True) == [f"x: {message}"]


def test_a_number_of_an_array_that_does_not_fit_a_python_type_is_a_mismatch(path):
    jaxckpt.save(path, {"x": jnp.float32("nan")})
    assert problems_of(path, {"x": 0}, cast=True) == [
        "x: does not fit <class 'int'> in `like`: cannot convert float NaN to integer"
    ]


def test_a_cast_array_is_as_weakly_typed_as_it_is_in_like(path):
    jaxckpt.save(path, {"x": jnp.asarray(1.0), "y": 2.0})
    like = {"x": jnp.bfloat16(0), "y": jnp.asarray(0.5)}
    restored = jaxckpt.restore(path, like, cast=True)
    assert (restored["x"].dtype, restored["x"].weak_type) == (jnp.bfloat16, False)
    assert (restored["y"].dtype, restored["y"].weak_type) == (jnp.float32, True)


def test_lossy_casts_warn_nobody(path):
    jaxckpt.save(path, [np.full(3, np.nan), np.full(3, 1e300), np.float64(1e300)])
    like = [np.zeros(3, np.int32), jnp.zeros(3, jnp.float32), np.float32(0)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        restored = jaxckpt.restore(path, like, cast=True)
    assert np.isinf(restored[1]).all()
    assert np.isinf(restored[2])


# --- reshape --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "new_shape"),
    [((4, 6), (24,)), ((24,), (2, 3, 4)), ((1,), ()), ((), (1, 1)), ((0, 3), (5, 0)), ((2, 3), (3, 2))],
)
def test_reshape(path, shape, new_shape):
    count = int(np.prod(shape))
    tree = {
        "free": jnp.arange(count).reshape(shape),
        "bound": jax.device_put(jnp.arange(count).reshape(shape), jax.devices()[2]),
        "replicated": jax.device_put(
            jnp.arange(count).reshape(shape), NamedSharding(make_mesh({"x": 8}), P())
        ),
        "small": jnp.arange(count).reshape(shape).astype(jnp.int4),
        "numpy": np.arange(count).reshape(shape),
        "fortran": np.asfortranarray(np.arange(count).reshape(shape)),
    }
    like = {name: array.reshape(new_shape) for name, array in tree.items()}
    like["bound"] = jax.device_put(like["bound"], jax.devices()[5])
    jaxckpt.save(path, tree)
    assert len(problems_of(path, like)) == len(tree)
    restored = jaxckpt.restore(path, like, reshape=True)
    assert_same_tree(restored, like)
    assert restored["bound"].devices() == {jax.devices()[5]}


def test_reshape_onto_another_sharding_and_dtype(path):
    mesh = make_mesh({"data": 4, "model": 2})
    stored = jax.device_put(jnp.arange(64.0).reshape(8, 8), NamedSharding(mesh, P("model", "data")))
    jaxckpt.save(path, stored, options=SaveOptions(pack_bytes_max=0))
    like = jax.ShapeDtypeStruct((4, 16), jnp.int8, sharding=NamedSharding(mesh, P("data", "model")))
    restored = jaxckpt.restore(path, like, reshape=True, cast=True)
    assert restored.sharding == like.sharding
    assert_same_tree(restored, jnp.arange(64, dtype=jnp.int8).reshape(4, 16))


def test_reshape_needs_equally_many_elements_and_leaves_keys_alone(path):
    jaxckpt.save(path, {"a": jnp.ones(6), "k": jax.random.split(jax.random.key(0), 4)})
    like = {"a": jnp.ones(7), "k": jax.random.split(jax.random.key(0), 4).reshape(2, 2)}
    expected = ["a: shape (6,) on disk, (7,) in `like`", "k: shape (4,) on disk, (2, 2) in `like`"]
    assert problems_of(path, like, reshape=True) == expected
    with pytest.raises(MismatchError) as caught:
        jaxckpt.restore(path, like)
    assert "reshape=True" not in str(caught.value)  # it would not help


# --- messages -------------------------------------------------------------------------------------------------


def test_every_mismatch_is_listed_at_once(tmp_path):
    path = tmp_path / "step_1200"
    stored = {
        "params": {"dense": {"kernel": jnp.zeros((4, 4)), "wide": jnp.zeros((2, 2))}},
        "opt": {"mu": {"dense": {"kernel": jnp.zeros((4, 4))}}, "old": jnp.zeros(1)},
        "step": 3,
        "rate": 0.5,
        "fine": jnp.zeros(3),
    }
    like = {
        "params": {
            "dense": {"kernel": jnp.zeros((4, 8), jnp.bfloat16), "scale": jnp.zeros(4), "wide": jnp.zeros(4)}
        },
        "opt": {"mu": {"dense": {"kernel": jnp.zeros((4, 4), jnp.bfloat16)}}},
        "step": 3,
        "rate": 1,
        "fine": jnp.zeros(3),
    }
    jaxckpt.save(path, stored)
    with pytest.raises(MismatchError) as caught:
        jaxckpt.restore(path, like)
    assert str(caught.value) == (
        f"cannot restore '{path}' like the given tree: 6 of 8 leaves differ\n"
        "  opt/mu/dense/kernel: dtype float32 on disk, bfloat16 in `like`\n"
        "  params/dense/kernel: shape (4, 4) on disk, (4, 8) in `like`\n"
        "  params/dense/kernel: dtype float32 on disk, bfloat16 in `like`\n"
        "  params/dense/scale: not on disk\n"
        "  params/dense/wide: shape (2, 2) on disk, (4,) in `like`\n"
        "  rate: float on disk, int in `like`\n"
        "  opt/old: on disk, not in `like`\n"
        "pass cast=True to convert dtypes; pass cast=True to convert between numbers; "
        "pass reshape=True to give arrays with equally many elements another shape; "
        'pass missing="keep" to keep the leaves of `like` that are not on disk; '
        'pass unexpected="ignore" to leave out what `like` does not have'
    )
    assert [problem.kind for problem in caught.value.problems] == [
        "dtype",
        "shape",
        "dtype",
        "missing",
        "shape",
        "kind",
        "unexpected",
    ]


def test_the_message_of_the_design(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    dense = {"kernel": jnp.zeros((4096, 4096), jnp.int4)}
    stored = {"a_params": {"dense": dense}, "opt": {"mu": jnp.zeros(2)}}
    jaxckpt.save("run", stored)
    like = {
        "a_params": {
            "dense": {"kernel": jax.ShapeDtypeStruct((4096, 8192), jnp.int4), "scale": jnp.zeros(1)}
        },
        "opt": {"mu": jnp.zeros(2, jnp.bfloat16)},
    }
    with pytest.raises(MismatchError) as caught:
        jaxckpt.restore("run", like)
    headline, *rest = str(caught.value).splitlines()
    assert headline.endswith("run' like the given tree: 3 of 3 leaves differ")
    assert rest == [
        "  a_params/dense/kernel: shape (4096, 4096) on disk, (4096, 8192) in `like`",
        "  a_params/dense/scale: not on disk",
        "  opt/mu: dtype float32 on disk, bfloat16 in `like`",
        'pass cast=True to convert dtypes; pass missing="keep" to keep the leaves of `like` that are not on disk',
    ]


def test_ten_problems_are_shown_and_all_are_kept(path):
    jaxckpt.save(path, {f"leaf_{number:03d}": jnp.zeros(2) for number in range(200)})
    with pytest.raises(MismatchError) as caught:
        jaxckpt.restore(path, {f"leaf_{number:03d}": jnp.zeros(3) for number in range(200)})
    lines = str(caught.value).splitlines()
    assert len(lines) == 12
    assert lines[0].endswith("200 of 200 leaves differ")
    assert lines[-1] == "  ... and 190 more"
    assert len(caught.value.problems) == 200
    assert isinstance(caught.value, ValueError)


def test_a_stored_leaf_in_like_takes_the_leaf_as_it_was_saved(saved):
    tree = jaxckpt.open(saved).tree()
    assert_same_tree(jaxckpt.restore(saved, tree)["params"], saved_tree()["params"])
    tree["params"]["dense"]["kernel"] = jax.ShapeDtypeStruct((2, 3), jnp.bfloat16)
    restored = jaxckpt.restore(saved, tree, cast=True)
    assert restored["params"]["dense"]["kernel"].dtype == jnp.bfloat16
    assert restored["params"]["dense"]["bias"].dtype == jnp.float32


def test_select_asks_nothing_of_leaves_of_like_that_it_does_not_name(path):
    """A checkpoint of parameters only starts a whole training state."""
    jaxckpt.save(path, {"params": {"w": jnp.arange(3.0)}})
    like = {"params": {"w": jnp.zeros(3)}, "opt": {"mu": jnp.full(3, 7.0)}}
    restored = jaxckpt.restore(path, like=like, select="params/*")
    assert restored["params"]["w"].tolist() == [0.0, 1.0, 2.0]
    assert restored["opt"]["mu"] is like["opt"]["mu"]
