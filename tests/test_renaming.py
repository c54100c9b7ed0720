"""A model that changed: its leaves have other names, other pieces and other vocabularies than what was saved.

What ``tf.train.init_from_checkpoint`` and ``tf.train.warm_start`` do, by ``rename=`` and the other arguments of
`restore`. NumPy says what is right.
"""

from __future__ import annotations

import dataclasses
import pathlib
import re
import types
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P

import jaxckpt
from jaxckpt import MismatchError, Pieces, SaveOptions, Vocabulary
from jaxckpt._deriving import Derivation
from jaxckpt._gathering import gather
from jaxckpt._manifest import NO_CHUNKS, LeafSpec, Manifest
from jaxckpt._placement import Target
from jaxckpt._restoring import plan_waves

from .helpers import assert_same_tree, make_mesh
from .processes import Worker, run_processes


def problems_of(path: Any, *arguments: Any, **keywords: Any) -> list[str]:
    """What a restore that must fail lists."""
    with pytest.raises(MismatchError) as caught:
        jaxckpt.restore(path, *arguments, **keywords)
    return [str(problem) for problem in caught.value.problems]


def id_of(value: Any) -> str:
    return str(value)


def blank_of(leaf: Any) -> Any:
    return jnp.zeros_like(leaf) if isinstance(leaf, jax.Array) else np.zeros_like(leaf)


# --- scopes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rename", "expected"),
    [
        ({"a/": "b/"}, {"b": {"w": 1, "v": 2}, "c": 3}),
        ({"a/": "b/d/"}, {"b": {"d": {"w": 1, "v": 2}}, "c": 3}),
        ({"/": "b/"}, {"b": {"a": {"w": 1, "v": 2}, "c": 3}}),
        ({"a/": "/"}, {"w": 1, "v": 2, "c": 3}),
        ({"a/": "b/", "/": "d/"}, {"b": {"w": 1, "v": 2}, "d": {"c": 3}}),
        ({"a/w": "b/x"}, {"b": {"x": 1}, "a": {"v": 2}, "c": 3}),
        ({"a/": ["b/", "d/"]}, {"b": {"w": 1, "v": 2}, "d": {"w": 1, "v": 2}, "c": 3}),
        ({"/": ["b/", "/"]}, {"b": {"a": {"w": 1, "v": 2}, "c": 3}, "a": {"w": 1, "v": 2}, "c": 3}),
        ({"a/w": ("a/w", "x", "y")}, {"a": {"w": 1, "v": 2}, "x": 1, "y": 1, "c": 3}),
        ([("a/(.*)", [r"b/\1", r"d/\1"])], {"b": {"w": 1, "v": 2}, "d": {"w": 1, "v": 2}, "c": 3}),
        ({"a/w": []}, {"a": {"v": 2}, "c": 3}),
    ],
    ids=id_of,
)
def test_assignment_maps(path, rename, expected):
    jaxckpt.save(path, {"a": {"w": 1, "v": 2}, "c": 3})
    assert jaxckpt.restore(path, rename=rename) == expected
    assert jaxckpt.restore(path, jax.tree.map(lambda _: 0, expected), rename=rename) == expected


def test_a_slash_says_that_only_what_is_below_is_meant(tmp_path: pathlib.Path) -> None:
    """Names of TensorFlow: a variable, and below it what the optimizer keeps for it."""
    from jaxckpt._naming import rename_keys

    keys = ["w", "w/Adam", "wide"]

    def renamed(rename: Any) -> list[str]:
        return list(rename_keys(keys, [True] * 3, rename).sources)

    assert renamed({"w": "x"}) == ["x", "x/Adam", "wide"]
    assert renamed({"w/": "x/"}) == ["w", "x/Adam", "wide"]
    assert renamed({"w": "x", "w/": "slots/"}) == ["x", "slots/Adam", "wide"]
    assert renamed({"w/": "slots/", "w": "x"}) == ["x", "slots/Adam", "wide"]


@pytest.mark.parametrize(
    "rename",
    [{"a/": "b"}, {"a": "b/"}, {"/": "b"}, {"a/": ["b/", "d"]}, {"a/": Pieces(("b", "c"))}],
    ids=id_of,
)
def test_a_scope_on_one_side_only_is_an_error(path, rename):
    jaxckpt.save(path, {"a": {"w": 1}})
    (old,) = rename
    expected = f"{old}: a scope and a name: write the slash behind both or behind none"
    assert problems_of(path, rename=rename) == [expected]


def test_rules_that_are_none_are_errors_that_name_them(path):
    jaxckpt.save(path, {"a": {"w": 1}})
    (problem,) = problems_of(path, rename=[("a/(", "b")])
    assert problem.startswith("a/(: is no regular expression: missing )")
    (problem,) = problems_of(path, rename=[("(a)/.", r"\2")])
    assert problem.startswith("(a)/.: its replacement cannot be applied: invalid group reference 2")
    (problem,) = problems_of(path, rename=[("(a)/.", r"\g<name>")])
    assert problem.startswith("(a)/.: its replacement cannot be applied: unknown group name 'name'")
    for new in (7, None, ["b", 7]):
        with pytest.raises(TypeError, match="rename= takes str, Pieces, Vocabulary or several of them"):
            jaxckpt.restore(path, rename={"a": new})
    wrong: Any
    for wrong in ("a", len, ["a"], [("a", "b", "c")], {1: "b"}, {re.compile("a"): "b"}, [(1, "b")]):
        with pytest.raises(TypeError, match="rename= takes"):
            jaxckpt.restore(path, rename=wrong)


def test_a_rule_that_gives_like_nothing_is_an_error(path):
    """A typing error in a new name would go unseen where leaves may be missing and left out."""
    jaxckpt.save(path, {"a": {"w": jnp.ones(2), "v": jnp.zeros(3)}, "c": 3})
    like = {"b": {"w": jnp.zeros(2)}, "d": 1}
    for rename, problem in (
        ({"a/": "bb/"}, "a/: `like` has no 'bb/w'"),
        ({"a/w": ["b/w", "b/x"]}, "a/w: `like` has no 'b/x'"),
        ([("a/(.)", r"b\1")], "a/(.): `like` has no 'bw'"),
        ({"a/w": Vocabulary("e", [0, 1], [1])}, "a/w: `like` has no 'e'"),
        ({Pieces(("a/w", "a/v")): "e"}, "a/w, a/v: `like` has no 'e'"),
    ):
        found = problems_of(path, like, rename=rename, missing="keep", unexpected="ignore")
        assert [line.replace("bb/v", "bb/w").replace("'bv'", "'bw'") for line in found] == [problem]
    # A scope may have more than `like` wants, and what is not selected needs no place.
    restored = jaxckpt.restore(path, {"b": {"w": jnp.zeros(2)}}, rename={"a/": "b/"}, unexpected="ignore")
    assert restored["b"]["w"].tolist() == [1.0, 1.0]
    rename = {"a/": "b/", "c": "x"}
    jaxckpt.restore(path, like, rename=rename, select="a/w", missing="keep", unexpected="ignore")
    assert jaxckpt.restore(path, {"d": 1}, rename={"c": "d", "a": []}, unexpected="ignore") == {"d": 3}


def test_names_beside_numbers_make_a_tree_that_jax_can_sort(path):
    jaxckpt.save(path, {"layers": [1, 2, 3], "step": 4})
    restored = jaxckpt.restore(path, rename={"layers/1": "layers/middle"})
    assert dict(restored["layers"]) == {0: 1, "middle": 2, 2: 3}
    assert sorted(jax.tree.leaves(restored)) == [1, 2, 3, 4]


# --- one leaf to several places -------------------------------------------------------------------------------


def test_a_leaf_goes_to_several_places_and_is_read_once(path):
    mesh = make_mesh({"x": 8})
    stored = np.random.default_rng(0).standard_normal((512, 1024)).astype(np.float32)
    jaxckpt.save(path, {"w": jnp.asarray(stored)}, options=SaveOptions(pack_bytes_max=0))
    like = {
        "sharded": jax.ShapeDtypeStruct(stored.shape, jnp.float32, sharding=NamedSharding(mesh, P("x"))),
        "small": jax.ShapeDtypeStruct(stored.shape, jnp.bfloat16),
        "flat": jax.ShapeDtypeStruct((stored.size,), jnp.float32),
        "numpy": np.zeros(stored.shape, np.float32),
        "other": np.zeros(stored.shape, np.float32),
    }
    rename = {"w": list(like)}
    restored, report = jaxckpt.restore(path, like, rename=rename, cast=True, reshape=True, report=True)
    assert restored["sharded"].sharding == like["sharded"].sharding
    assert_same_tree(restored["sharded"], jax.device_put(stored, like["sharded"].sharding))
    assert_same_tree(restored["small"], jnp.asarray(stored.astype(jnp.bfloat16)))
    assert_same_tree(restored["flat"], jnp.asarray(stored.ravel()))
    assert_same_tree(restored["numpy"], stored)
    restored["numpy"][:] = 0  # each place has its own memory
    assert_same_tree(restored["other"], stored)
    assert report.bytes_read < stored.nbytes + 20_000
    assert report.renamed == tuple(("w", key) for key in sorted(like))
    assert (report.cast, report.reshaped) == (("small",), ("flat",))


def test_a_leaf_goes_to_places_in_both_orders_of_axes(path):
    fortran = np.asfortranarray(np.arange(12.0, dtype=np.float32).reshape(3, 4))
    jaxckpt.save(path, {"w": fortran})
    like = {
        "f": np.zeros((3, 4), np.float32, order="F"),
        "g": np.zeros((4, 3), np.float32),
        "h": jnp.zeros((3, 4)),
    }
    restored = jaxckpt.restore(path, like, rename={"w": ["f", "g", "h"]}, reshape=True)
    assert_same_tree(restored, {"f": fortran, "g": fortran.reshape(4, 3), "h": jnp.asarray(fortran)})
    assert restored["f"].flags.f_contiguous


@dataclasses.dataclass(frozen=True, eq=False)
class FakeDevices:
    """Stands for a sharding on an accelerator."""

    device_set: tuple[types.SimpleNamespace, ...] = (types.SimpleNamespace(platform="gpu"),)


def test_all_places_of_a_leaf_are_in_one_wave() -> None:
    """So is it read once where not everything fits the host memory."""
    specs = (LeafSpec("array", "uint8", (100,)),)
    manifest = Manifest(
        "", 0.0, {}, None, [], ("a", "b"), specs, np.array([0, 0]), {}, (), {}, (), NO_CHUNKS, ()
    )
    leaves = [1, 0, 1, 0, 1]
    targets = {number: Target(leaf, "array", FakeDevices()) for number, leaf in enumerate(leaves)}  # type: ignore[arg-type]
    assert plan_waves(manifest, targets, host_bytes_max=150) == [[1, 3], [0, 2, 4]]
    assert plan_waves(manifest, targets, host_bytes_max=350) == [[1, 3, 0, 2, 4]]


def test_places_that_two_leaves_would_have_are_errors(path):
    jaxckpt.save(path, {"a": jnp.ones(2), "b": jnp.zeros(2)})
    assert problems_of(path, rename={"a": ["b", "c"]}) == ["b: would be both 'a' and 'b'"]
    assert problems_of(path, rename={"a": ["c", "c"]}) == ["c: would be both 'a' and 'a'"]
    assert problems_of(path, rename={"a": Pieces(("b", "c"))}) == ["b: would be both 'a' and 'b'"]
    assert problems_of(path, rename={Pieces(("a", "b")): ["c", "c"]}) == ["c: would be both 'a' and 'a'"]
    both = {"a": Vocabulary("c", [0, 1], [1]), "b": "c"}
    assert problems_of(path, rename=both) == ["c: would be both 'a' and 'b'"]


def test_pairs_with_one_old_name_give_it_several_new_ones(path):
    jaxckpt.save(path, {"a": {"w": 1, "v": 2}})
    assert jaxckpt.restore(path, rename=[("a/w", "x"), ("a/w", "y"), ("a/(.)", r"\1")]) == {
        "x": 1,
        "y": 1,
        "v": 2,
    }
    assert jaxckpt.restore(path, rename=[(re.compile("A/(.)", re.IGNORECASE), r"\1")]) == {"w": 1, "v": 2}
    with pytest.raises(MismatchError, match="a mapping renames all that lies below a name"):
        jaxckpt.restore(path, rename=[("a/", "b/")])


# --- pieces ---------------------------------------------------------------------------------------------------


def cut(array: Any, sizes: Sequence[int], axis: int) -> list[Any]:
    return np.split(array, np.cumsum(sizes)[:-1], axis=axis)


@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("make", [np.asarray, jnp.asarray])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.int4])
def test_pieces_are_cut_joined_and_cut_anew(path, axis, make, dtype):
    whole = np.arange(6 * 6 * 2).reshape(6, 6, 2).astype(dtype)
    sizes = (1, 1) if axis == -1 else (1, 3, 2)
    pieces = {f"p{number}": make(piece) for number, piece in enumerate(cut(whole, sizes, axis))}
    jaxckpt.save(path, {"emb": make(whole)})
    blank = jax.tree.map(blank_of, pieces)
    restored, report = jaxckpt.restore(path, blank, rename={"emb": Pieces(pieces, axis)}, report=True)
    assert_same_tree(restored, pieces)
    assert report.derived == report.restored == tuple(pieces)
    assert report.renamed == tuple(("emb", name) for name in pieces)
    assert report.nbytes == whole.nbytes

    jaxckpt.save(path, {**pieces, "other": 1}, overwrite=True)
    join = {Pieces(pieces, axis): "emb"}
    assert_same_tree(jaxckpt.restore(path, rename=join), {"emb": make(whole), "other": 1})
    like = {"emb": make(np.zeros_like(whole)), "other": 0}
    assert_same_tree(jaxckpt.restore(path, like, rename=join), {"emb": make(whole), "other": 1})
    again = {f"q{number}": make(piece) for number, piece in enumerate(cut(whole, sizes[::-1], axis))}
    blank = jax.tree.map(blank_of, again)
    recut = {Pieces(pieces, axis): [Pieces(again, axis), "emb"]}
    restored, report = jaxckpt.restore(path, {**blank, **like}, rename=recut, report=True)
    assert_same_tree(restored, {**again, "emb": make(whole), "other": 1})
    assert report.ignored == ()


def test_pieces_take_any_sharding_and_dtype(path):
    mesh = make_mesh({"x": 4, "y": 2})
    whole = np.random.default_rng(0).standard_normal((24, 8)).astype(np.float32)
    stored = jax.device_put(whole, NamedSharding(mesh, P("y", "x")))
    jaxckpt.save(path, {"emb": stored}, options=SaveOptions(pack_bytes_max=0))
    rename = {"emb": Pieces(("a", "b"))}
    first = jax.ShapeDtypeStruct((16, 8), jnp.bfloat16, sharding=NamedSharding(mesh, P(("x", "y"))))
    second = jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=NamedSharding(mesh, P(None, "x")))
    restored = jaxckpt.restore(path, {"a": first, "b": second}, rename=rename, cast=True)
    assert restored["a"].sharding == first.sharding
    assert restored["b"].sharding == second.sharding
    assert_same_tree(restored["a"], jax.device_put(whole[:16].astype(jnp.bfloat16), first.sharding))
    assert_same_tree(restored["b"], jax.device_put(whole[16:], second.sharding))
    like = {"a": jnp.zeros((16, 8)), "b": jnp.zeros((8, 8))}
    restored = jaxckpt.restore(path, like, rename=rename, mesh=make_mesh({"y": 8}))
    assert restored["a"].sharding.spec == P("y", None)
    assert_same_tree(np.asarray(restored["b"]), whole[16:])
    # Without any wish a piece is on the saved mesh.
    jaxckpt.save(path, {"c": stored, "d": stored}, overwrite=True)
    joined = jaxckpt.restore(path, rename={Pieces(("c", "d")): "emb"})["emb"]
    assert joined.sharding == stored.sharding
    assert_same_tree(np.asarray(joined), np.concatenate([whole, whole]))


def test_a_piece_reads_its_own_part(path):
    stored = jnp.arange(8 << 20, dtype=jnp.uint8).reshape(8, -1)
    jaxckpt.save(path, {"emb": stored}, options=SaveOptions(pack_bytes_max=0))
    like = {"a": np.zeros((6, 1 << 20), np.uint8), "b": np.zeros((2, 1 << 20), np.uint8)}
    rename = {"emb": Pieces(("a", "b"))}
    _, report = jaxckpt.restore(path, like, rename=rename, report=True)
    assert stored.nbytes <= report.bytes_read < stored.nbytes + 20_000


def test_pieces_whose_sizes_do_not_fit_are_errors(path):
    jaxckpt.save(
        path,
        {
            "emb": jnp.ones((5, 2)),
            "a": jnp.ones((2, 2)),
            "a2": jnp.ones((2, 2)),
            "b": jnp.ones((2, 3)),
            "n": 1,
        },
    )
    rename = {"emb": Pieces(("x", "y"))}

    def cut_like(x: Any, y: Any, rename: Any = rename) -> list[str]:
        return problems_of(path, {"x": x, "y": y}, rename=rename, select="emb")

    assert cut_like(jnp.zeros((2, 2)), jnp.zeros((2, 2))) == [
        "x: 5 rows along axis 0 on disk, 2 + 2 = 4 in `like`",
        "y: 5 rows along axis 0 on disk, 2 + 2 = 4 in `like`",
    ]
    assert cut_like(jnp.zeros((2, 2)), jnp.zeros((3, 3))) == ["y: shape (3, 2) on disk, (3, 3) in `like`"]
    assert cut_like(jnp.zeros((2, 2)), jnp.zeros(3)) == ["y: shape (3, 2) on disk, (3,) in `like`"]
    assert cut_like(jnp.zeros((2, 2)), jnp.zeros((3, 2), bool)) == [
        "y: dtype float32 on disk, bool in `like`"
    ]
    assert "y: 'y' in `like` has no axis 0" in cut_like(jnp.zeros((2, 2)), 3.0)
    assert "x: shape (5, 2) on disk has no axis 2" in cut_like(
        jnp.zeros(2), jnp.zeros(3), {"emb": Pieces(("x", "y"), axis=2)}
    )
    like = {"x": jnp.zeros((2, 2))}
    assert problems_of(path, like, rename=rename, select="emb", unexpected="ignore") == [
        "x: the piece 'y' is not in `like`, and nothing else says how large it is"
    ]
    assert problems_of(path, rename=rename) == [
        "x: is a piece, and without `like` nothing says how large",
        "y: is a piece, and without `like` nothing says how large",
    ]
    joined = {Pieces(("a", "a2")): "x"}  # rows are whole: nothing that is made of them is reshaped
    assert problems_of(path, {"x": jnp.zeros(8)}, rename=joined, select="a*", reshape=True) == [
        "x: shape (4, 2) on disk, (8,) in `like`"
    ]
    assert problems_of(path, rename={Pieces(("a", "b")): "emb2"}) == [
        "emb2: 'a' and 'b' on disk: float32 (2, 2) and float32 (2, 3) do not fit together along axis 0"
    ]
    assert problems_of(path, rename={Pieces(("a", "n")): "emb2"}) == [
        "emb2: 'n' on disk is no array of numbers, whose rows can be taken"
    ]
    mixed = {Pieces(("a", "emb")): Pieces(("x", "y"), axis=1)}
    assert problems_of(
        path, {"x": jnp.zeros((7, 1)), "y": jnp.zeros((7, 1))}, rename=mixed, select=["a", "emb"]
    ) == [
        "x: its pieces lie along axis 0, but it is wanted along axis 1",
        "y: its pieces lie along axis 0, but it is wanted along axis 1",
    ]


def test_pieces_may_be_of_both_kinds_of_arrays(path):
    jaxckpt.save(path, {"a": jnp.ones(2), "b": np.zeros(1, np.float32)})
    assert_same_tree(jaxckpt.restore(path, rename={Pieces(("b", "a")): "c"}), {"c": np.float32([0, 1, 1])})
    assert_same_tree(jaxckpt.restore(path, rename={Pieces(("a", "b")): "c"}), {"c": jnp.float32([1, 1, 0])})


def test_pieces_that_are_not_there_or_taken_twice_are_errors(path):
    jaxckpt.save(path, {"a": jnp.ones(2), "b": jnp.ones(2), "c": jnp.ones(2)})
    assert problems_of(path, rename={Pieces(("a", "x", "y")): "e"}) == ["a, x, y: 'x', 'y': no saved key"]
    assert problems_of(path, rename={Pieces(("a", "b")): "e", Pieces(("b", "c")): "f"}) == [
        "b, c: another rule joins some of these"
    ]
    assert problems_of(path, rename={Pieces(("a", "b")): "e", "a": "f"}) == [
        "a: this rule renames no saved key"
    ]
    assert problems_of(path, rename={Pieces(("a", "b")): "e"}, select="a") == [
        "a, b: select= leaves out some of these"
    ]
    assert jaxckpt.restore(path, rename={Pieces(("a", "b")): "e"}, select="c")["c"].shape == (2,)
    with pytest.raises(TypeError, match="Pieces takes several names, not 'emb'"):
        Pieces("emb")
    for names in ((), ("a", "a")):
        with pytest.raises(ValueError, match="Pieces takes names that are all different"):
            Pieces(names)


def test_regular_expressions_give_pieces_and_vocabularies_their_names(path):
    jaxckpt.save(path, {"old": {"u": jnp.arange(3.0), "v": jnp.arange(4.0)}})
    like = {"new": {"u": [jnp.zeros(1), jnp.zeros(2)], "v": [jnp.zeros(3), jnp.zeros(1)]}}
    restored = jaxckpt.restore(path, like, rename=[("old/(.)", Pieces((r"new/\1/0", r"new/\1/1")))])
    assert jax.tree.map(lambda leaf: leaf.tolist(), restored) == {
        "new": {"u": [[0.0], [1.0, 2.0]], "v": [[0.0, 1.0, 2.0], [3.0]]}
    }
    rename = [("old/(.)", Vocabulary(r"new/\1", old=list("abc"), new=["c", "a"]))]
    assert jax.tree.map(lambda leaf: leaf.tolist(), jaxckpt.restore(path, rename=rename)) == {
        "new": {"u": [2.0, 0.0], "v": [2.0, 0.0]}
    }


# --- vocabularies ---------------------------------------------------------------------------------------------

OLD = ["the", "cat", "sat", "on", "mat"]
NEW = ["mat", "dog", "the", "sat", "owl", "cat"]


def remapped(stored: np.ndarray[Any, Any], base: np.ndarray[Any, Any], axis: int) -> np.ndarray[Any, Any]:
    """What NumPy makes of it."""
    result = base.copy()
    for row, word in enumerate(NEW):
        if word in OLD:
            np.moveaxis(result, axis, 0)[row] = np.moveaxis(stored, axis, 0)[OLD.index(word)]
    return result


@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("buckets", [0, 2])
@pytest.mark.parametrize("make", [np.asarray, jnp.asarray])
def test_rows_go_where_their_words_are(path, axis, buckets, make):
    generator = np.random.default_rng(0)

    def table(rows: int) -> np.ndarray[Any, Any]:
        shape = [3, 4, 5]
        shape[axis] = rows
        return generator.standard_normal(shape).astype(np.float32)

    stored, base = table(len(OLD) + 1), table(len(NEW) + buckets)
    jaxckpt.save(path, {"emb": stored})
    like = {"emb": make(base)}
    rename = {"emb": Vocabulary("emb", OLD, NEW, axis)}
    restored, report = jaxckpt.restore(path, like, rename=rename, report=True)
    assert_same_tree(restored, {"emb": make(remapped(stored, base, axis))})
    assert (report.derived, report.renamed) == (("emb",), ())
    assert_same_tree(like, {"emb": make(base)})


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("spec", [P("x"), P(None, "x"), P("y", "x"), P()], ids=str)
@pytest.mark.parametrize("asked", [None, P(None, "y")], ids=str)
def test_rows_go_to_the_devices_that_have_their_words(path, spec, asked, axis_type):
    devices = np.array(jax.devices()[:8], dtype=object).reshape(2, 4)
    mesh = Mesh(devices, ("x", "y"), axis_types=(axis_type, axis_type))
    generator = np.random.default_rng(0)
    stored, base = (generator.standard_normal((rows, 8)).astype(np.float32) for rows in (5, 8))
    jaxckpt.save(path, {"emb": stored})
    like = {"emb": jax.device_put(base, NamedSharding(mesh, spec))}
    sharding = like["emb"].sharding if asked is None else NamedSharding(mesh, asked)
    rename = {"emb": Vocabulary("emb", OLD, NEW)}
    restored = jaxckpt.restore(path, like, rename=rename, sharding=asked and sharding)
    assert restored["emb"].sharding.is_equivalent_to(sharding, 2)
    assert_same_tree(restored["emb"], jax.device_put(remapped(stored, base, 0), sharding))


def test_rows_that_are_kept_are_not_rounded_to_the_saved_dtype(path):
    jaxckpt.save(path, {"emb": jnp.full(5, 1.5, jnp.bfloat16)})
    like = {"emb": jnp.full(6, 1 / 3)}
    rename = {"emb": Vocabulary("emb", OLD, NEW)}
    assert problems_of(path, like, rename=rename) == ["emb: dtype bfloat16 on disk, float32 in `like`"]
    restored, report = jaxckpt.restore(path, like, rename=rename, cast=True, report=True)
    third = float(np.float32(1 / 3))
    assert restored["emb"].tolist() == [1.5, third, 1.5, 1.5, third, 1.5]
    assert report.cast == ("emb",)


def test_vocabularies_of_a_table_that_was_saved_in_pieces(path):
    stored = np.arange(10.0).reshape(5, 2)
    jaxckpt.save(path, {"emb": [stored[:2], stored[2:]]})
    rename = {Pieces(("emb/0", "emb/1")): Vocabulary("table", OLD, NEW)}
    base = np.full((7, 2), -1.0)
    restored = jaxckpt.restore(path, {"table": base}, rename=rename)
    assert_same_tree(restored, {"table": remapped(stored, base, 0)})


def test_vocabularies_come_from_text_files(path, tmp_path):
    (tmp_path / "old.txt").write_bytes("the\nc\u00e4t\u2028\r\nsat".encode())
    (tmp_path / "new.txt").write_bytes("sat\nthe\nc\u00e4t\u2028\n".encode())
    jaxckpt.save(path, {"emb": jnp.arange(3)})
    vocabulary = Vocabulary("emb", tmp_path / "old.txt", str(tmp_path / "new.txt"))
    assert vocabulary.old == ("the", "c\u00e4t\u2028", "sat")
    assert jaxckpt.restore(path, rename={"emb": vocabulary})["emb"].tolist() == [2, 0, 1]
    assert len(repr(vocabulary)) < 50


def test_vocabularies_that_do_not_fit_are_errors(path):
    jaxckpt.save(path, {"emb": jnp.ones((5, 2)), "key": jax.random.key(0)})
    rename = {"emb": Vocabulary("emb", OLD, NEW)}

    def with_like(like: Any, rename: Any = rename) -> list[str]:
        return problems_of(path, {"emb": like}, rename=rename, select="emb")

    assert with_like(jnp.ones((5, 2))) == [
        "emb: 5 rows along axis 0 in `like`, but its new vocabulary has 6 words"
    ]
    assert with_like(jnp.ones((6, 3))) == ["emb: shape (6, 2) on disk, (6, 3) in `like`"]
    lacks = "emb: 2 of its rows are not on disk, and `like` has no values to keep there"
    assert with_like(jax.ShapeDtypeStruct((6, 2), jnp.float32)) == [lacks]
    assert problems_of(path, rename=rename, select="emb") == [lacks]
    longer = {"emb": Vocabulary("emb", [*OLD, "hat"], OLD)}
    assert with_like(jnp.ones((5, 2)), longer) == [
        "emb: 5 rows along axis 0 on disk, but its old vocabulary has 6 words"
    ]
    assert problems_of(path, rename={"key": Vocabulary("key", [0], [0])}) == [
        "key: 'key' on disk is no array of numbers, whose rows can be taken"
    ]
    known = {"emb": Vocabulary("emb", OLD, OLD[::-1])}  # no row is kept: no values are needed
    restored = jaxckpt.restore(
        path, {"emb": jax.ShapeDtypeStruct((5, 2), jnp.float32)}, rename=known, select="emb"
    )
    assert restored["emb"].shape == (5, 2)
    with pytest.raises(ValueError, match="'cat' is in the old vocabulary of 'emb' twice"):
        Vocabulary("emb", ["cat", "dog", "cat"], [])
    with pytest.raises(ValueError, match="3 is in the new vocabulary of 'emb' twice"):
        Vocabulary("emb", [], [3, 3])
    with pytest.raises(TypeError, match="in the order of the rows, which a set does not have"):
        Vocabulary("emb", set(OLD), OLD)


def test_damage_in_what_a_leaf_is_made_of_is_found(path):
    jaxckpt.save(path, {"a": jnp.ones(64), "b": jnp.zeros(64)}, options=SaveOptions(pack_bytes_max=0))
    (damaged,) = path.glob("data-*/arrays/b/c.0")
    data = bytearray(damaged.read_bytes())
    data[17] ^= 4
    damaged.write_bytes(data)
    with pytest.raises(jaxckpt.CorruptError) as caught:
        jaxckpt.restore(path, rename={Pieces(("a", "b")): "c"})
    assert [(problem.key, problem.kind) for problem in caught.value.problems] == [("b", "checksum")]
    damaged.unlink()
    with pytest.raises(jaxckpt.CorruptError, match="missing"):
        jaxckpt.restore(path, rename={Pieces(("a", "b")): "c"})


# --- slabs ----------------------------------------------------------------------------------------------------


@settings(max_examples=80, derandomize=True, deadline=None)
@given(st.data())
def test_any_rows_for_any_devices_are_read_within_a_slab_and_no_element_twice(data: st.DataObject) -> None:
    rank = data.draw(st.integers(1, 3))
    axis = data.draw(st.integers(0, rank - 1))
    counts = data.draw(st.lists(st.integers(0, 7), min_size=1, max_size=3))
    across = [data.draw(st.sampled_from([0, 1, 2, 4, 6])) for _ in range(rank)]
    sources = []
    for number, count in enumerate(counts):
        shape = (*across[:axis], count, *across[axis + 1 :])
        sources.append((1000 * number + np.arange(np.prod(shape, dtype=int))).reshape(shape).astype(np.int32))
    total = sum(counts)
    whole = np.concatenate(sources, axis)
    rows: Any
    if data.draw(st.booleans()):
        start = data.draw(st.integers(0, total))
        rows = range(start, data.draw(st.integers(start, total)))
    else:
        chosen = data.draw(st.permutations(range(total)))[: data.draw(st.integers(0, total))]
        rows = np.array([*chosen, *[-1] * data.draw(st.integers(0, 2))], np.int64)
        rows = rows[data.draw(st.permutations(range(len(rows))))] if len(rows) else rows
    size = len(rows)
    shape = (*across[:axis], size, *across[axis + 1 :])
    base = -1 - np.arange(np.prod(shape, dtype=int)).reshape(shape).astype(np.int32)
    expected = base.copy()
    for place, row in enumerate(rows):
        if row >= 0:
            np.moveaxis(expected, axis, 0)[place] = np.moveaxis(whole, axis, 0)[row]

    mesh = make_mesh({"x": 2})
    spec = [None] * rank
    divisible = [each for each in range(rank) if shape[each] % 2 == 0]
    if divisible:
        spec[data.draw(st.sampled_from(divisible))] = "x"
    sharding = NamedSharding(mesh, P(*spec))
    specs = tuple(LeafSpec("array", "int32", source.shape) for source in sources)
    derivation = Derivation(
        tuple(range(len(sources))),
        axis,
        rows,
        jax.device_put(base, sharding) if np.any(np.asarray(rows) < 0) else None,
        LeafSpec("array", "int32", shape),
    )
    manifest = Manifest(
        "", 0.0, {}, None, [], tuple(map(str, range(len(specs)))), specs, np.arange(len(specs)), {}, (), {}, (),
        NO_CHUNKS, (),
    )  # fmt: skip
    slab_bytes = data.draw(st.integers(1, 100))
    reads = [np.zeros(source.shape, int) for source in sources]

    def read_box(leaf: int, box: Any) -> np.ndarray[Any, Any]:
        places = tuple(slice(lo, hi) for lo, hi in zip(*box, strict=True))
        found = sources[leaf][places]
        assert found.shape == tuple(hi - lo for lo, hi in zip(*box, strict=True))
        # One place of the first axis is read at least.
        least = 4 * int(np.prod(sources[leaf].shape[1:], dtype=int))
        assert found.nbytes <= max(slab_bytes, least)
        reads[leaf][places] += 1
        return found

    target = Target(0, "array", sharding, shape, np.dtype(np.int32), derivation=derivation)
    made = gather(manifest, target, read_box, slab_bytes)
    assert_same_tree(made, jax.device_put(expected, sharding))
    assert max((count.max(initial=0) for count in reads), default=0) <= 1


# --- everything together --------------------------------------------------------------------------------------


def test_a_warm_start_as_that_of_tensorflow(path):
    """Regular expressions say what is started from the checkpoint; the rest keeps its fresh values."""
    stored = {
        "linear": {"weights": jnp.arange(4.0), "bias": jnp.full(1, 5.0)},
        "input": {"words": np.arange(10.0, dtype=np.float32).reshape(5, 2), "users": jnp.ones((4, 2))},
        "global_step": 70,
    }
    jaxckpt.save(path, stored)
    like = {
        "linear": {"weights": jnp.zeros(4), "bias": jnp.zeros(1)},
        "input": {"sentence": jnp.full((6, 2), -1.0), "users": jnp.zeros((9, 2))},
        "head": jnp.zeros(2),
        "global_step": 0,
    }
    restored, report = jaxckpt.restore(
        path,
        like,
        select=re.compile("linear/.*|input/words").fullmatch,  # vars_to_warm_start
        rename={
            "input/words": Vocabulary("input/sentence", OLD, NEW)
        },  # var_name_to_vocab_info, ..._prev_var_name
        missing="keep",
        unexpected="ignore",
        report=True,
    )
    assert restored["linear"]["weights"].tolist() == [0.0, 1.0, 2.0, 3.0]
    expected = remapped(stored["input"]["words"], np.full((6, 2), -1.0, np.float32), 0)
    assert restored["input"]["sentence"].tolist() == expected.tolist()
    assert restored["head"] is like["head"]
    assert restored["input"]["users"] is like["input"]["users"]
    assert restored["global_step"] == 0
    assert report.kept == ("global_step", "head", "input/users")
    assert report.ignored == ("global_step", "input/users")
    # A typing error in any of them is an error.
    for keywords in (
        {"select": "liner/*"},
        {"rename": {"input/word": "x"}},
        {"rename": {"input/word": Vocabulary("x", OLD, NEW)}},
        {"rename": {"input/words": Vocabulary("input/sentense", OLD, NEW)}},
    ):
        with pytest.raises(MismatchError):
            jaxckpt.restore(path, like, missing="keep", unexpected="ignore", **keywords)


def test_a_report_says_what_was_done(path):
    stored = {f"a{number:02d}": jnp.ones(2) for number in range(12)} | {"emb": jnp.arange(4.0), "old": 1}
    jaxckpt.save(path, stored)
    like = {f"b{number:02d}": jnp.zeros(2, jnp.int32) for number in range(12)}
    like |= {"x": jnp.zeros(1), "y": jnp.zeros(3), "b00": jnp.zeros((1, 2), jnp.int32), "more": 3}
    _, report = jaxckpt.restore(
        path,
        like,
        rename=[(r"a(\d\d)", r"b\1"), ("emb", Pieces(("x", "y")))],
        missing="keep",
        unexpected="ignore",
        cast=True,
        reshape=True,
        report=True,
    )
    assert report.renamed[0] == ("a00", "b00")
    assert report.renamed[-2:] == (("emb", "x"), ("emb", "y"))
    assert report.derived == ("x", "y")
    assert report.reshaped == ("b00",)
    lines = str(report).splitlines()
    assert lines[0].startswith(f"{path}: 14 leaves restored in ")
    assert lines[1:4] == ["renamed: 14", "  a00 -> b00", "  a01 -> b01"]
    assert lines[12:15] == ["  ... and 4 more", "converted to another dtype: 12", "  b00"]
    assert lines[-10:] == [
        "  ... and 2 more",
        "in another shape: 1",
        "  b00",
        "made of parts of saved leaves: 2",
        "  x",
        "  y",
        "kept as in `like`: 1",
        "  more",
        "on disk, left unread: 1",
        "  old",
    ]
    with pytest.raises(MismatchError) as caught:
        report.assert_consumed()
    assert str(caught.value) == (
        f"restore of '{path}': not everything was used\n"
        "  more: kept the leaf of `like`\n"
        "  old: on disk, left unread"
    )
    with pytest.raises(MismatchError, match="not everything came from storage") as caught:
        report.assert_all_restored()
    assert [problem.key for problem in caught.value.problems] == ["more"]


def test_a_report_of_a_whole_restore_asserts_that_it_was_one(path):
    jaxckpt.save(path, {"a": 1, "b": 2})
    _, whole = jaxckpt.restore(path, report=True)
    whole.assert_consumed()
    whole.assert_all_restored()
    assert whole.renamed == whole.reshaped == whole.derived == ()
    assert len(str(whole).splitlines()) == 1
    _, part = jaxckpt.restore(path, {"a": 0}, unexpected="ignore", report=True)
    part.assert_all_restored()
    with pytest.raises(MismatchError, match="b: on disk, left unread"):
        part.assert_consumed()


# --- groups of processes --------------------------------------------------------------------------------------


def restore_derived(worker: Worker, path: str) -> bool:
    mesh = Mesh(np.array(jax.devices(), dtype=object), ("x",))
    rows, columns = NamedSharding(mesh, P("x")), NamedSharding(mesh, P(None, "x"))

    def place(array: np.ndarray[Any, Any], sharding: NamedSharding) -> jax.Array:
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    base = -np.arange(64.0, dtype=np.float32).reshape(8, 8)
    like = {
        "a": jax.ShapeDtypeStruct((4, 8), np.float32, sharding=rows),
        "b": jax.ShapeDtypeStruct((4, 8), np.float32, sharding=columns),
        "words": place(base, columns),
        "copy": jax.ShapeDtypeStruct((8, 8), np.float32, sharding=columns),
        "other": jax.ShapeDtypeStruct((8, 8), np.float32),
    }
    rename = {"emb": Pieces(("a", "b")), "table": Vocabulary("words", OLD, NEW), "w": ["copy", "other"]}
    stored = np.arange(64.0, dtype=np.float32).reshape(8, 8)
    expected = {
        "a": stored[:4],
        "b": stored[4:],
        "words": remapped(stored[:5], base, 0),
        "copy": stored,
        "other": stored,
    }
    for exchange in (None, True):
        restored = jaxckpt.restore(path, like, rename=rename, exchange=exchange)
        for key, array in restored.items():
            for shard in array.addressable_shards:
                assert np.asarray(shard.data).tolist() == expected[key][shard.index].tolist(), key
    # Rows of `like` that are spread otherwise cannot be fetched.
    with pytest.raises(MismatchError, match="spread over processes in another way than is asked for"):
        jaxckpt.restore(path, like, rename=rename, sharding=lambda key, _: rows if key == "words" else None)
    # All processes must want the same.
    new = NEW if worker.index == 0 else NEW[::-1]
    with pytest.raises(jaxckpt.ProcessMismatchError, match="words"):
        jaxckpt.restore(path, like, rename={**rename, "table": Vocabulary("words", OLD, new)})
    return True


@pytest.mark.slow
def test_processes_of_a_group_make_what_their_devices_need(path):
    stored = np.arange(64.0, dtype=np.float32).reshape(8, 8)
    jaxckpt.save(path, {"emb": stored, "table": stored[:5], "w": stored})
    outcomes = run_processes(restore_derived, 2, devices=2, arguments=(str(path),))
    for outcome in outcomes:
        assert outcome.status == "returned", f"{outcome.error_text}\n{outcome.output}"
