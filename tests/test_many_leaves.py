"""Trees of many leaves: what one leaf costs is counted, and leaves that are alike come back each as it is wanted.

A restore decides for leaves with equal specs at once. Times are for `benchmarks`; here calls are counted, which no busy
machine changes.
"""

from __future__ import annotations

import gc
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import msgpack
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec as P, SingleDeviceSharding

import jaxckpt
from jaxckpt._encoding import checksum_of_manifest, parse_manifest
from jaxckpt._keys import check_nodes

from .helpers import make_mesh

PACKAGE = str(pathlib.Path(jaxckpt.__file__).parent)


def count_calls(function: Callable[[], Any]) -> int:
    """How many calls of functions of the package a call makes, on this thread."""
    calls = 0

    def note(frame: Any, event: str, _argument: Any) -> None:
        nonlocal calls
        calls += event == "call" and frame.f_code.co_filename.startswith(PACKAGE)

    sys.setprofile(note)
    try:
        function()
    finally:
        sys.setprofile(None)
    return calls


def calls_per_leaf(path: pathlib.Path, sharding: Any, function: Callable[[pathlib.Path], Any]) -> float:
    """How many more calls each further leaf costs."""
    calls = []
    for count in (100, 300):
        values = {f"leaf_{number:03d}": np.full(64, number, np.float32) for number in range(count)}
        place = path / str(count)
        jaxckpt.save(place, jax.device_put(values, sharding))
        function(place)  # imports and caches
        calls.append(count_calls(lambda place=place: function(place)))
    return (calls[1] - calls[0]) / 200


# --- what a leaf costs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "most"),
    [(None, 50), (P(), 50), (P("x"), 200)],
    ids=["one device", "replicated", "eight chunks"],
)
def test_what_leaves_have_in_common_is_worked_out_once(tmp_path: pathlib.Path, spec: P | None, most: int):
    sharding = SingleDeviceSharding(jax.devices()[0])
    if spec is not None:
        sharding = NamedSharding(make_mesh({"x": 8}), spec)
    assert calls_per_leaf(tmp_path, sharding, jaxckpt.restore) < most


def test_opening_takes_no_call_for_each_leaf(tmp_path: pathlib.Path):
    assert calls_per_leaf(tmp_path, jax.devices()[0], jaxckpt.open) < 0.1


def test_listing_a_thousand_steps_sets_off_no_collection_of_garbage(path: pathlib.Path):
    """One takes longer than the listing: it goes through all objects of JAX."""
    for step in range(1000):
        (path / f"step_{step:08d}").mkdir(parents=True)
        (path / f"step_{step:08d}" / "manifest.msgpack").touch()
    manager = jaxckpt.CheckpointManager(path)
    assert manager.latest_step() == 999
    gc.collect()
    before = [generation["collections"] for generation in gc.get_stats()]
    assert manager.steps() == list(range(1000))
    assert [generation["collections"] for generation in gc.get_stats()] == before


# --- leaves that are saved alike ------------------------------------------------------------------------------


def test_leaves_that_are_saved_alike_come_back_each_as_it_is_wanted(path: pathlib.Path):
    values = np.arange(16, dtype=np.float32)
    mesh = make_mesh({"x": 8})
    rows, everywhere = NamedSharding(mesh, P("x")), NamedSharding(mesh, P())
    third = jax.devices()[3]
    like: dict[str, Any] = {
        "rows": jax.ShapeDtypeStruct((16,), np.float32, sharding=rows),
        "replicated": jax.ShapeDtypeStruct((16,), np.float32, sharding=everywhere),
        "device": jax.device_put(values, third),
        "uncommitted": jnp.zeros(16),
        "as saved": jax.ShapeDtypeStruct((16,), np.float32),
        "numpy": np.zeros(16, np.float32),
        "half": jax.ShapeDtypeStruct((16,), np.float16, sharding=rows),
        "weak": jax.ShapeDtypeStruct((16,), np.float32, weak_type=True),
        "matrix": jax.ShapeDtypeStruct((4, 4), np.float32),
    }
    saved = jax.device_put(values, jax.devices()[1])
    jaxckpt.save(path, dict.fromkeys([*like, "stored"], saved))
    like["stored"] = jaxckpt.open(path)["stored"]
    for names in (list(like), list(reversed(like))):  # whichever is decided first
        restored = jaxckpt.restore(path, {name: like[name] for name in names}, cast=True, reshape=True)
        for name, leaf in restored.items():
            assert np.array_equal(np.asarray(leaf).reshape(-1), values), name
        assert restored["rows"].sharding == restored["half"].sharding == rows
        assert restored["replicated"].sharding == everywhere
        assert restored["device"].devices() == {third}
        assert not restored["uncommitted"].committed
        assert restored["as saved"].devices() == restored["stored"].devices() == {jax.devices()[1]}
        assert isinstance(restored["numpy"], np.ndarray)
        assert restored["half"].dtype == np.float16
        assert restored["matrix"].shape == (4, 4)
        assert not any(restored[name].weak_type for name in ("as saved", "weak", "stored"))


def test_a_function_of_shardings_is_asked_for_each_leaf(path: pathlib.Path):
    names = [f"leaf_{number}" for number in range(16)]
    jaxckpt.save(path, dict.fromkeys(names, jnp.ones(8)))
    asked: dict[str, Any] = {}

    def choose(key: str, leaf: jax.ShapeDtypeStruct) -> jax.sharding.Sharding:
        asked[key] = leaf
        return SingleDeviceSharding(jax.devices()[len(asked) % 8])

    restored = jaxckpt.restore(path, sharding=choose)
    assert list(asked) == sorted(names)
    assert {(leaf.shape, leaf.dtype) for leaf in asked.values()} == {((8,), np.dtype(np.float32))}
    for place, name in enumerate(asked):
        assert restored[name].devices() == {jax.devices()[(place + 1) % 8]}


def test_of_leaves_that_are_alike_each_that_differs_is_named(path: pathlib.Path):
    jaxckpt.save(path, {f"leaf_{number}": jnp.ones(8) for number in range(6)})
    like = {f"leaf_{number}": jax.ShapeDtypeStruct((8 + number % 2,), np.float32) for number in range(6)}
    with pytest.raises(jaxckpt.MismatchError) as raised:
        jaxckpt.restore(path, like)
    assert [problem.key for problem in raised.value.problems] == ["leaf_1", "leaf_3", "leaf_5"]
    with pytest.raises(jaxckpt.MismatchError) as raised:
        jaxckpt.restore(path, sharding=NamedSharding(make_mesh({"x": 3}), P("x")))
    assert [problem.key for problem in raised.value.problems] == [f"leaf_{number}" for number in range(6)]


def test_alike_values_are_compared_each_by_itself(path: pathlib.Path):
    """Values of all types have the same spec."""
    jaxckpt.save(path, {"a": np.int8(3), "b": np.int16(3), "c": np.int8(4)})
    with pytest.raises(jaxckpt.MismatchError) as raised:
        jaxckpt.restore(path, dict.fromkeys("abc", np.int8(0)))
    assert [problem.key for problem in raised.value.problems] == ["b"]


# --- structure and frame of the manifest ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("nodes", "keys"),
    [
        ([["dict", ["a", "b"]], 0, False], ["a", "b"]),
        ([["dict", ["a", "b"]], 0, 0.0], ["a", "b"]),
        ([["dict", ["a", "b"]], 0, 1], ["a", "b"]),
        ([["dict", ["a", "b"]], 0], ["a"]),
        ([["dict", ["a"]], 0, 0], ["a", "b"]),
        ([["dict", ["a", "b"]], 0, 0], ["a", "c"]),
        ([["dict", ["a", "b"]], 0, 0], ["a"]),
        ([["dict", ["a"]], 0], ["a", "b"]),
        ([["dict", ["a", "a"]], 0, 0], ["a", "a"]),
        ([["dict", [1, True]], 0, 0], ["1", "1"]),
        ([["namedtuple", "m:P", ["a", "a"]], 0, 0], ["a", "a"]),
        ([["namedtuple", "m:P", ["a", 1]], 0, 0], ["a", "1"]),
        ([["list", 2**62]], []),
        ([["list", -1]], []),
        ([[]], []),
        ([0, 0], ["", ""]),
        ([], []),
        ({}, []),
    ],
    ids=repr,
)
def test_structures_that_are_none_are_found(nodes: Any, keys: list[str]):
    assert check_nodes(nodes, keys) is not None


TREES = [
    ([0], [""]),
    ([None], []),
    ([["dict", []]], []),
    ([["dict", ["a", "b/c", 7, "7", ""]], 0, 0, 0, 0, 0], ["a", "b~1c", "7", "~s7", "~e"]),
    ([["list", 3], ["tuple", 2], 0, 0, None, ["dict", ["x"]], 0], ["0/0", "0/1", "2/x"]),
    ([["dict", ["a", "b"]], ["dict", ["c"]], ["list", 0], 0], ["b"]),
]


@pytest.mark.parametrize(("nodes", "keys"), TREES, ids=repr)
def test_structures_are_held_against_their_keys(nodes: Any, keys: list[str]):
    assert check_nodes(nodes, keys) is None


def test_a_frame_is_what_msgpack_writes_whatever_its_length(path: pathlib.Path):
    jaxckpt.save(path, {})
    rest = (path / "manifest.msgpack").stat().st_size
    for length in range(65536 - rest - 8, 65536 - rest + 60, 4):  # around where a longer header begins
        jaxckpt.save(path, {}, metadata="x" * length, overwrite=True)
        data = (path / "manifest.msgpack").read_bytes()
        assert msgpack.packb(msgpack.unpackb(data)) == data
        assert len(parse_manifest(data, "here").metadata) == length
        assert checksum_of_manifest(data) == msgpack.unpackb(data)[1]
        assert checksum_of_manifest(data[:-1]) is None
        assert checksum_of_manifest(data + b"x") is None
