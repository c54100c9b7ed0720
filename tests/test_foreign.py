"""Restoring checkpoints of other libraries: names, matching, shardings, what is read, and damage.

The formats themselves have tests of their own; here a checkpoint in memory stands for one in files.
"""

from __future__ import annotations

import collections
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from jax.sharding import NamedSharding, PartitionSpec as P, SingleDeviceSharding

import jaxckpt
from jaxckpt import CorruptError, MismatchError, RestoreOptions
from jaxckpt._adopting import restore_foreign
from jaxckpt._foreign import ForeignCheckpoint, ForeignLeaf
from jaxckpt._keys import flatten
from jaxckpt._nesting import keys_of_names, name_of_key, nest
from jaxckpt.interop import flax, npz, orbax, safetensors, tensorflow

from .helpers import assert_same_leaf, make_mesh

Box = tuple[tuple[int, ...], tuple[int, ...]]


class MemoryCheckpoint(ForeignCheckpoint):
    """Arrays in memory, with a record of the boxes that were read. Object arrays are strings."""

    def __init__(
        self,
        arrays: Mapping[str, Any],
        aliases: Mapping[str, Sequence[str]] | None = None,
        damaged: Sequence[str] = (),
    ) -> None:
        ForeignCheckpoint.__init__(self, "memory", "Memory")
        self._arrays = {name: np.asarray(array) for name, array in arrays.items()}
        self._aliases = aliases or {}
        self._damaged = damaged
        self.boxes: list[tuple[str, Box]] = []
        self.is_closed = False

    def leaves(self) -> Mapping[str, ForeignLeaf]:
        return {
            name: ForeignLeaf(name, None if array.dtype == object else array.dtype, array.shape)
            for name, array in self._arrays.items()
        }

    def read_box(self, key: str, lo: tuple[int, ...], hi: tuple[int, ...]) -> np.ndarray[Any, Any]:
        if key in self._damaged:
            problem = jaxckpt.Problem(key, "checksum", "its checksum differs")
            raise CorruptError(f"cannot read 'memory':\n  {problem}", [problem])
        part = self._arrays[key][(*map(slice, lo, hi), ...)].copy()
        with self._lock:
            self.boxes.append((key, (lo, hi)))
        self._count_read(part.nbytes)
        return part

    def stream(self, key: str, lo: int, hi: int) -> bytes:
        return self._arrays[key].tobytes()[lo:hi]

    def close(self) -> None:
        self.is_closed = True

    def aliases(self) -> Mapping[str, Sequence[str]]:
        return self._aliases


def strings(*values: bytes) -> np.ndarray[Any, Any]:
    array = np.empty(len(values), object)
    array[:] = values
    return array


def one_string(value: bytes) -> np.ndarray[Any, Any]:
    array = np.empty((), object)
    array[()] = value
    return array


W = np.arange(24, dtype=np.float32).reshape(4, 6)
B = np.arange(6, dtype=np.float32)


def adam_like() -> MemoryCheckpoint:
    """Names as TensorFlow's Saver gives them: slots lie below their variables."""
    return MemoryCheckpoint({"w": W, "w/Adam": W + 1, "dense/bias": B, "step": np.int32(7)})


# --- what a checkpoint shows ----------------------------------------------------------------------------------


def test_a_checkpoint_lists_what_it_holds_without_reading():
    checkpoint = MemoryCheckpoint({"w": W, "text": strings(b"a", b"b")})
    assert checkpoint.keys() == tuple(checkpoint) == ("w", "text")
    assert len(checkpoint) == 2
    assert "w" in checkpoint
    assert "v" not in checkpoint
    assert checkpoint.shapes() == {"w": (4, 6), "text": (2,)}
    assert checkpoint.dtypes() == {"w": np.dtype("float32"), "text": None}
    assert str(checkpoint) == "w (float32) [4,6]\ntext (strings) [2]"
    assert (checkpoint["w"].shape, checkpoint["w"].dtype, checkpoint["w"].nbytes) == ((4, 6), np.float32, 96)
    assert repr(checkpoint["text"]) == "ForeignArray('text', strings, (2,))"
    assert checkpoint.boxes == []


def test_an_unknown_name_suggests_those_that_are_near():
    with pytest.raises(KeyError, match=r"'dense/bais' is not in 'memory'.*did you mean 'dense/bias'"):
        adam_like()["dense/bais"]


def test_an_alias_stands_for_its_array():
    checkpoint = MemoryCheckpoint({"model/w": W}, {"model/w": ("net/w", "w")})
    assert "net/w" in checkpoint
    assert checkpoint["w"].key == "model/w"


def test_a_checkpoint_is_closed_at_the_end_of_its_block():
    with MemoryCheckpoint({"w": W}) as checkpoint:
        pass
    assert checkpoint.is_closed


INDICES: list[Any] = [
    ...,
    (),
    1,
    -1,
    slice(1, 3),
    (slice(None), 2),
    (slice(None, None, -2), slice(1, None, 2)),
]


@pytest.mark.parametrize("index", INDICES, ids=str)
def test_indexing_gives_what_numpy_gives(index: Any):
    found = MemoryCheckpoint({"w": W})["w"][index]
    np.testing.assert_array_equal(found, W[index])
    assert type(found) is type(W[index])


def test_indexing_reads_the_rows_that_are_asked_for():
    checkpoint = MemoryCheckpoint({"w": W})
    checkpoint["w"][1:3]
    assert checkpoint.boxes == [("w", ((1, 0), (3, 6)))]


def test_a_long_step_reads_row_by_row():
    checkpoint = MemoryCheckpoint({"w": np.zeros((9, 1 << 18), np.float32)})
    assert checkpoint["w"][::4].shape == (3, 1 << 18)
    assert [lo[0] for _, (lo, _) in checkpoint.boxes] == [0, 4, 8]


def test_a_single_string_is_bytes_and_several_are_an_array():
    checkpoint = MemoryCheckpoint({"one": one_string(b"a\0b\xff\0"), "many": strings(b"", b"x\0")})
    assert checkpoint["one"][...] == b"a\0b\xff\0"
    assert checkpoint["many"][...].tolist() == [b"", b"x\0"]
    assert checkpoint["many"][1] == b"x\0"


# --- names ----------------------------------------------------------------------------------------------------


def test_names_become_a_tree_whose_keys_are_the_names():
    names = ["dense/kernel", "dense/bias", "layers/0/w", "layers/10/w", "step"]
    tree = nest(names, range(5))
    assert tree == {"dense": {"kernel": 0, "bias": 1}, "layers": {0: {"w": 2}, 10: {"w": 3}}, "step": 4}
    assert sorted(flatten(tree).keys) == sorted(names)


def test_a_name_below_another_stands_beside_it():
    tree = nest(["a/w", "a/w/Adam/x", "a/w/Adam", "a/v"], range(4))
    assert tree == {"a": {"w": 0, "w/Adam/x": 1, "w/Adam": 2, "v": 3}}
    assert keys_of_names(["a/w", "a/w/Adam"]) == ["a/w", "a/w~1Adam"]


def test_integers_beside_other_parts_are_in_an_ordered_dict():
    tree = nest(["layers/0", "layers/out", "layers/2"], range(3))
    assert type(tree["layers"]) is collections.OrderedDict
    assert flatten(tree).keys == ("layers/0", "layers/out", "layers/2")


def test_a_file_does_not_decide_how_deep_a_tree_gets():
    name = "/".join("x" * 100_000)
    (key,) = flatten(nest([name], [0])).keys
    assert key.count("/") == 63
    assert name_of_key(key) == name


NAMES = st.text("a~/01-s", max_size=7) | st.lists(st.sampled_from(["a", "0", "~1", ""])).map("/".join)


@given(st.lists(NAMES, unique=True, max_size=12))
@settings(deadline=None, max_examples=300)
def test_every_name_has_a_key_of_its_own_that_tells_it(names: list[str]):
    keys = keys_of_names(names)
    assert list(map(name_of_key, keys)) == names
    flat = flatten(nest(names, range(len(names))))
    assert {key: names[leaf] for key, leaf in zip(flat.keys, flat.leaves, strict=True)} == dict(
        zip(keys, names, strict=True)
    )


# --- restoring ------------------------------------------------------------------------------------------------


def test_without_like_the_names_of_the_file_lead_to_arrays():
    tree = restore_foreign(adam_like())
    assert list(tree) == ["w", "w/Adam", "dense/bias", "step"]
    assert all(isinstance(leaf, jax.Array) for leaf in tree.values())
    np.testing.assert_array_equal(tree["w/Adam"], W + 1)
    assert not tree["w"].committed


def test_every_type_that_jax_has_comes_back_bit_for_bit():
    rng = np.random.default_rng(0)
    names = ["bool", "int8", "uint16", "int32", "float16", "float32", "complex64"]
    names += ["bfloat16", "float8_e4m3fn", "float8_e5m2", "int4", "uint4"]
    arrays = {name: rng.integers(0, 2, (3, 5)).astype(getattr(ml_dtypes, name, name)) for name in names} | {
        "empty": np.zeros((0, 3), np.float32),
        "scalar": np.float32(-0.0),
    }
    tree = restore_foreign(MemoryCheckpoint(arrays))
    for name, array in arrays.items():
        assert_same_leaf(tree[name], jnp.asarray(array), name)


def test_strings_come_back_as_bytes_and_arrays_of_bytes():
    checkpoint = MemoryCheckpoint({"one": one_string(b"\xff\0"), "many": strings(b"a", b"\0")})
    tree = restore_foreign(checkpoint)
    assert tree["one"] == b"\xff\0"
    assert tree["many"].tolist() == [b"a", b"\0"]
    checkpoint = MemoryCheckpoint({"one": one_string("gr\u00fcn".encode()), "many": strings(b"a", b"\0")})
    like = {"one": "", "many": strings(b"", b"")}
    tree = restore_foreign(checkpoint, like)
    assert tree["one"] == "gr\u00fcn"
    assert tree["many"].tolist() == [b"a", b"\0"]
    assert restore_foreign(checkpoint, {"one": b"", "many": like["many"]})["one"] == "gr\u00fcn".encode()


def test_strings_do_not_match_anything_else():
    checkpoint = MemoryCheckpoint({"a": one_string(b"\xff"), "b": strings(b"a"), "c": strings(b"a"), "w": W})
    like = {"a": 1, "b": jnp.zeros(1), "c": strings(b"", b""), "w": one_string(b"")}
    with pytest.raises(MismatchError) as caught:
        restore_foreign(checkpoint, like)
    assert str(caught.value).splitlines()[1:5] == [
        "  a: strings on disk, int in `like`",
        "  b: strings on disk, ArrayImpl float32 in `like`",
        "  c: shape (1,) on disk, (2,) in `like`",
        "  w: shape (4, 6) on disk, () in `like`",
    ]
    with pytest.raises(MismatchError, match="a: is no UTF-8, `like` wants str"):
        restore_foreign(checkpoint, {"a": ""}, unexpected="ignore")


def test_like_decides_types_shapes_and_shardings():
    sharding = NamedSharding(make_mesh({"x": 2}), P("x"))
    like = {
        "w": jax.ShapeDtypeStruct((4, 6), jnp.float32, sharding=sharding),
        "w/Adam": np.zeros((4, 6), np.float16),
        "dense": {"bias": jnp.zeros((2, 3))},
        "step": 0,
    }
    tree = restore_foreign(adam_like(), like, cast=True, reshape=True)
    assert tree["w"].sharding == sharding
    np.testing.assert_array_equal(tree["w"], W)
    assert type(tree["w/Adam"]) is np.ndarray
    assert tree["w/Adam"].dtype == np.float16
    np.testing.assert_array_equal(tree["dense"]["bias"], B.reshape(2, 3))
    assert (tree["step"], type(tree["step"])) == (7, int)


def test_every_difference_is_listed_as_for_our_own_checkpoints(path):
    arrays = {"w": jnp.asarray(W), "b": jnp.asarray(B), "c": jnp.asarray(B)}
    jaxckpt.save(path, arrays)
    like = {"w": jnp.zeros((4, 5)), "b": jnp.zeros(6, jnp.int32), "d": jnp.zeros(2)}
    with pytest.raises(MismatchError) as theirs:
        restore_foreign(MemoryCheckpoint(arrays), like)
    with pytest.raises(MismatchError) as ours:
        jaxckpt.restore(path, like)
    assert str(theirs.value).splitlines()[1:] == str(ours.value).splitlines()[1:]
    assert len(theirs.value.problems) == 4


def test_types_of_64_bits_come_as_numpy_arrays_unless_like_asks_for_others():
    checkpoint = MemoryCheckpoint({"n": np.int64(3), "w": W})
    tree = restore_foreign(checkpoint)
    assert_same_leaf(tree["n"], np.array(3, np.int64), "n")
    assert isinstance(tree["w"], jax.Array)
    with jax.enable_x64(True):
        assert isinstance(restore_foreign(checkpoint)["n"], jax.Array)
    with pytest.raises(MismatchError, match="1 leaves need 64-bit types"):
        restore_foreign(checkpoint, {"n": jax.ShapeDtypeStruct((), np.int64), "w": W})
    tree = restore_foreign(MemoryCheckpoint({"n": np.int64(3)}), {"n": np.zeros((), np.int64)})
    assert tree["n"] == 3


def test_wrong_choices_are_refused():
    with pytest.raises(ValueError, match="missing must be one of 'error', 'keep', not 'no'"):
        restore_foreign(adam_like(), missing="no")
    with pytest.raises(ValueError, match="unexpected must be one of 'error', 'ignore', not 'no'"):
        restore_foreign(adam_like(), unexpected="no")


@pytest.mark.parametrize("verbs", [flax, npz, orbax, safetensors, tensorflow], ids=lambda each: each.__name__)
def test_keywords_that_a_read_does_not_have_are_refused_in_its_name(verbs: Any):
    with pytest.raises(
        TypeError, match=r"^read\(\) got an unexpected .* 'shardng'; did you mean 'sharding'\?$"
    ):
        verbs.read("/nowhere", shardng=None)
    if verbs is not safetensors:
        with pytest.raises(TypeError, match=r"^read\(\) got an unexpected keyword argument 'mmap'$"):
            verbs.read(adam_like(), mmap=True)
    assert verbs.read(adam_like(), {"step": 0}, unexpected="ignore", cast=True) == {"step": 7}


def test_a_part_is_selected_and_the_rest_kept():
    checkpoint = adam_like()
    assert list(restore_foreign(checkpoint, select="w*")) == ["w", "w/Adam"]
    like = {"w": jnp.zeros((4, 6)), "v": jnp.ones(2)}
    tree, report = restore_foreign(checkpoint, like, missing="keep", unexpected="ignore", report=True)
    assert tree["v"] is like["v"]
    assert report.restored == ("w",)
    assert report.kept == ("v",)
    assert report.ignored == ("w/Adam", "dense/bias", "step")
    assert report.nbytes == report.bytes_read == W.nbytes


def test_renamed_leaves_make_nested_dicts():
    tree = restore_foreign(adam_like(), rename={"w/Adam": "opt/mu/w", "w": "params/w"})
    assert jax.tree.map(jnp.shape, tree) == {
        "opt": {"mu": {"w": (4, 6)}},
        "params": {"w": (4, 6)},
        "dense": {"bias": (6,)},
        "step": (),
    }
    tree = restore_foreign(adam_like(), rename={"step": "count", "w": "net/w"})
    assert jax.tree.map(jnp.shape, tree) == {
        "net": {"w": (4, 6), "w/Adam": (4, 6)},
        "dense": {"bias": (6,)},
        "count": (),
    }
    with pytest.raises(MismatchError, match="the keys do not make up a tree"):
        restore_foreign(adam_like(), rename={"step": "w~1Adam"})


def test_like_may_have_lists_and_slots_beside_their_variables():
    checkpoint = MemoryCheckpoint({"l/0": B, "l/1": B + 1, "w": W, "w/Adam": W + 1, "a~b//c": B})
    like = {
        "l": [jnp.zeros(6), jnp.zeros(6)],
        "w": jnp.zeros((4, 6)),
        "w/Adam": jnp.zeros((4, 6)),
        "a~b": {"": {"c": jnp.zeros(6)}},
    }
    tree = restore_foreign(checkpoint, like)
    np.testing.assert_array_equal(tree["l"][1], B + 1)
    np.testing.assert_array_equal(tree["w/Adam"], W + 1)


def test_numbers_in_names_match_texts_and_integers_of_like():
    """Files have texts alone; so has the state of a Flax module whose layers are named after their numbers."""
    checkpoint = MemoryCheckpoint({"layer/0/w": np.arange(2), "layer/1/w": np.arange(3)})
    values = [{"w": np.zeros(2, int)}, {"w": np.zeros(3, int)}]
    for layers in (
        values,
        dict(enumerate(values)),
        {str(number): each for number, each in enumerate(values)},
    ):
        found = restore_foreign(checkpoint, like={"layer": layers})["layer"]
        assert type(found) is type(layers)
        keys = list(layers) if isinstance(layers, dict) else [0, 1]
        assert [found[key]["w"].tolist() for key in keys] == [[0, 1], [0, 1, 2]]


def test_like_select_and_rename_know_the_aliases():
    aliases = {"model/w": ("net/kernel", "k"), "model/b": ("net/bias",)}
    checkpoint = MemoryCheckpoint({"model/w": W, "model/b": B, "other": B}, aliases)
    like = {"net": {"kernel": jnp.zeros((4, 6)), "bias": jnp.zeros(6)}, "other": jnp.zeros(6)}
    np.testing.assert_array_equal(restore_foreign(checkpoint, like)["net"]["kernel"], W)
    tree = restore_foreign(checkpoint, like, select="net/*")
    assert tree["other"] is like["other"]
    np.testing.assert_array_equal(tree["net"]["bias"], B)
    assert list(restore_foreign(checkpoint, select="k")) == ["model/w"]
    renamed = restore_foreign(checkpoint, rename={"net": "params"})
    assert set(renamed) == {"params", "other"}
    assert set(renamed["params"]) == {"kernel", "bias"}
    with pytest.raises(MismatchError, match="matches no saved key"):
        restore_foreign(checkpoint, select="nothing")


def test_rules_and_patterns_that_fit_names_do_not_see_aliases():
    aliases = {"opt/w": ("model/opt/w", "adam/w"), "model/w": ("opt/all/0",)}
    checkpoint = MemoryCheckpoint({"model/w": W, "opt/w": W}, aliases)
    assert list(restore_foreign(checkpoint, select="model/*")) == ["model/w"]
    assert list(restore_foreign(checkpoint, select=["model/*", "adam/*"])) == ["model/w", "opt/w"]
    assert list(restore_foreign(checkpoint, select=lambda key: "opt" not in key)) == ["model/w"]
    renamed = restore_foreign(checkpoint, rename={"model": "params", "adam": "moments"})
    assert jax.tree.map(jnp.shape, renamed) == {"params": {"w": (4, 6)}, "moments": {"w": (4, 6)}}


def test_an_alias_that_could_mean_two_arrays_means_none():
    checkpoint = MemoryCheckpoint({"a": B, "b": B + 1}, {"a": ("x", "b"), "b": ("x",)})
    tree = restore_foreign(checkpoint, {"b": jnp.zeros(6)}, unexpected="ignore")
    np.testing.assert_array_equal(tree["b"], B + 1)
    with pytest.raises(MismatchError, match="x: not on disk"):
        restore_foreign(checkpoint, {"x": jnp.zeros(6)}, unexpected="ignore")


def test_one_array_goes_to_several_places_and_is_read_once():
    checkpoint = MemoryCheckpoint({"w": W, "s": strings(b"a")})
    tree = restore_foreign(checkpoint, rename={"w": ["a", "b/c"], "s": ["s", "t"]})
    assert_same_leaf(tree["a"], jnp.asarray(W))
    assert_same_leaf(tree["b"]["c"], jnp.asarray(W))
    assert tree["s"].tolist() == tree["t"].tolist() == [b"a"]
    assert tree["s"] is not tree["t"]
    assert len(checkpoint.boxes) == 2
    like = {"a": np.zeros((4, 6), np.float32), "b": np.zeros((4, 6), np.float32)}
    tree = restore_foreign(checkpoint, like, rename={"w": ["a", "b"]}, unexpected="ignore")
    tree["a"][...] = 0
    np.testing.assert_array_equal(tree["b"], W)


def test_pieces_are_cut_and_joined_by_name_or_alias():
    aliases = {"emb/part_0": ("net/0",), "emb/part_1": ("net/1",)}
    checkpoint = MemoryCheckpoint({"emb/part_0": W[:3], "emb/part_1": W[3:], "w": W}, aliases)
    joined = restore_foreign(checkpoint, rename={jaxckpt.Pieces(("net/0", "net/1")): "emb"})
    assert_same_leaf(joined["emb"], jnp.asarray(W))
    checkpoint.boxes.clear()
    sharding = NamedSharding(make_mesh({"x": 2}), P(None, "x"))
    like = {"a": jnp.zeros((1, 6)), "b": jax.ShapeDtypeStruct((3, 6), jnp.float32, sharding=sharding)}
    tree = restore_foreign(
        checkpoint, like, rename={"w": jaxckpt.Pieces(("a", "b"))}, select="w", missing="keep"
    )
    np.testing.assert_array_equal(tree["a"], W[:1])
    np.testing.assert_array_equal(tree["b"], W[1:])
    assert tree["b"].sharding == sharding
    assert max(hi[0] - lo[0] for _, (lo, hi) in checkpoint.boxes) == 3


def test_rows_follow_their_words():
    checkpoint = MemoryCheckpoint({"emb": W})
    vocabulary = jaxckpt.Vocabulary("emb", old=["a", "b", "c", "d"], new=["d", "x", "b"])
    tree, report = restore_foreign(
        checkpoint, {"emb": jnp.full((3, 6), 9.0)}, rename={"emb": vocabulary}, report=True
    )
    np.testing.assert_array_equal(tree["emb"], [W[3], np.full(6, 9.0), W[1]])
    assert report.derived == ("emb",)


def test_damage_below_a_derived_leaf_is_listed_too():
    checkpoint = MemoryCheckpoint({"a": B, "b": B, "c": B}, damaged=["a", "c"])
    with pytest.raises(CorruptError) as caught:
        restore_foreign(checkpoint, rename={jaxckpt.Pieces(("a", "b")): "ab"})
    assert sorted(str(problem.key) for problem in caught.value.problems) == ["a", "c"]


def test_a_lazy_array_in_like_asks_for_the_array_as_it_was_saved():
    checkpoint = adam_like()
    tree = restore_foreign(
        checkpoint, {"kernel": checkpoint["w"]}, rename={"w": "kernel"}, unexpected="ignore"
    )
    np.testing.assert_array_equal(tree["kernel"], W)


# --- what is read ---------------------------------------------------------------------------------------------


def test_each_box_is_read_once_however_many_devices_need_it():
    checkpoint = MemoryCheckpoint({"w": W})
    sharding = NamedSharding(make_mesh({"x": 2, "y": 4}), P())
    tree = restore_foreign(checkpoint, sharding=sharding)
    assert len(tree["w"].addressable_shards) == 8
    assert checkpoint.boxes == [("w", ((0, 0), (4, 6)))]


@pytest.mark.parametrize("spec", [P("x"), P(None, "x"), P("x", "y"), P(("x", "y"))], ids=str)
def test_an_array_that_is_needed_whole_is_read_whole_so_that_it_can_be_verified(spec: P):
    checkpoint = MemoryCheckpoint({"w": W})
    sharding = NamedSharding(make_mesh({"x": 2, "y": 2}), spec)
    tree = restore_foreign(checkpoint, sharding=lambda _key, _struct: sharding)
    np.testing.assert_array_equal(tree["w"], W)
    for shard in tree["w"].addressable_shards:
        np.testing.assert_array_equal(shard.data, W[shard.index])
    assert checkpoint.boxes == [("w", ((0, 0), (4, 6)))]


def test_an_array_in_chunks_is_read_in_the_boxes_of_its_devices():
    checkpoint = MemoryCheckpoint({"w": W})
    checkpoint.is_cheaper_whole = False
    sharding = NamedSharding(make_mesh({"x": 2, "y": 2}), P("x"))
    tree = restore_foreign(checkpoint, sharding=lambda _key, _struct: sharding)
    np.testing.assert_array_equal(tree["w"], W)
    assert sorted(checkpoint.boxes) == [("w", ((0, 0), (2, 6))), ("w", ((2, 0), (4, 6)))]


def test_what_is_not_wanted_is_not_read():
    checkpoint = adam_like()
    restore_foreign(checkpoint, select="dense/*")
    assert checkpoint.boxes == [("dense/bias", ((0,), (6,)))]


def test_a_mesh_replicates_what_has_no_saved_sharding():
    mesh = make_mesh({"x": 2})
    tree = restore_foreign(MemoryCheckpoint({"w": W}), mesh=mesh)
    assert tree["w"].sharding == NamedSharding(mesh, P())


def test_several_threads_read_several_leaves_at_once():
    met = threading.Barrier(3, timeout=20)

    class Meeting(MemoryCheckpoint):
        """Each read waits until three are under way."""

        def read_box(self, key: str, lo: tuple[int, ...], hi: tuple[int, ...]) -> np.ndarray[Any, Any]:
            met.wait()
            return MemoryCheckpoint.read_box(self, key, lo, hi)

    checkpoint = Meeting({"a": B, "b": B, "c": B})
    restore_foreign(checkpoint, options=RestoreOptions(io_threads=3))
    assert sorted(key for key, _ in checkpoint.boxes) == ["a", "b", "c"]


def test_all_damage_is_listed_at_once():
    checkpoint = MemoryCheckpoint({"a": B, "b": B, "c": B}, damaged=["a", "c"])
    with pytest.raises(CorruptError) as caught:
        restore_foreign(checkpoint)
    assert str(caught.value).splitlines() == [
        "cannot restore 'memory': stored data is damaged in 2 places",
        "  a: its checksum differs",
        "  c: its checksum differs",
        "nothing was returned; use another checkpoint, or select= the leaves that are whole",
    ]


def test_an_interrupt_ends_the_reading():
    never = threading.Event()

    class Interrupted(MemoryCheckpoint):
        """Stands for Control-C while the first array is read."""

        def read_box(self, key: str, lo: tuple[int, ...], hi: tuple[int, ...]) -> np.ndarray[Any, Any]:
            if key == "a0":
                raise KeyboardInterrupt
            never.wait(timeout=0.01)  # 500 of these take far longer than hearing of the interrupt does
            return MemoryCheckpoint.read_box(self, key, lo, hi)

    checkpoint = Interrupted({f"a{number}": B for number in range(500)})
    with pytest.raises(KeyboardInterrupt):
        restore_foreign(checkpoint, options=RestoreOptions(io_threads=1))
    assert len(checkpoint.boxes) < 499


def test_arrays_on_one_device_are_committed_there():
    device = jax.devices()[3]
    tree = restore_foreign(MemoryCheckpoint({"w": W}), sharding=SingleDeviceSharding(device))
    assert tree["w"].devices() == {device}
    assert tree["w"].committed
