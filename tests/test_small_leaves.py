"""Trees of many small leaves: what is remembered of a tree from save to save, and what is copied together.

Nothing that is remembered may hide a change of the tree, or keep an array alive.
"""

from __future__ import annotations

import gc
import pathlib
import sys
import threading
import weakref
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.experimental.layout import Format, Layout
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

import jaxckpt
from jaxckpt import _leaves
from jaxckpt._encoding import MANIFEST_BYTES_MAX, parse_manifest
from jaxckpt._leaves import Leaves, inspect_leaves
from jaxckpt._manifest import MANIFEST_NAME
from jaxckpt._planning import SavePlan, plan_save
from jaxckpt._store import open_store
from jaxckpt._tables import CHECKSUM_BYTES

from .helpers import assert_same_tree, make_mesh

MIB = 1 << 20


def inspect(tree: dict[str, Any]) -> Leaves:
    return inspect_leaves(tuple(tree), tuple(tree.values()))


def place(leaf: Any, spec: Any = None) -> jax.Array:
    """On two devices, cut or replicated."""
    return jax.device_put(leaf, NamedSharding(make_mesh({"x": 2}), PartitionSpec(*(spec or ()))))


# --- what is remembered ---------------------------------------------------------------------------------------


def test_equal_trees_have_one_object_for_their_kinds() -> None:
    tree = {"a": place(np.ones((4, 2))), "b": jnp.arange(3), "n": 7, "h": np.zeros(3)}
    kinds = inspect(tree).kinds
    assert inspect(tree).kinds is kinds
    assert (
        inspect({"a": place(np.zeros((4, 2))), "b": jnp.ones(3, int), "n": 8, "h": np.ones(3)}).kinds is kinds
    )
    step = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf + 1, tree), donate_argnums=0)
    state = step(step({"a": place(np.ones((4, 2)), ["x"]), "b": place(np.ones(3))}))
    kinds = inspect(state).kinds
    assert inspect(step(state)).kinds is kinds


def test_the_plan_of_equal_trees_is_made_once() -> None:
    def plan(value: float) -> SavePlan:
        leaves = inspect({"a": jnp.full((64, 64), value), "b": value})
        return plan_save(
            ("a", "b"),
            leaves.kinds,
            chunk_bytes_max=MIB,
            pack_bytes_max=MIB,
            piece_bytes=MIB,
            group=None,
        )

    assert plan(1.0) is plan(2.0)
    assert plan(1.0).specs is plan(2.0).specs


CHANGES: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "shape": (lambda: jnp.zeros((2, 3)), lambda: jnp.zeros((3, 2))),
    "dtype": (lambda: jnp.zeros(4, jnp.float32), lambda: jnp.zeros(4, jnp.int32)),
    "weak_type": (lambda: jnp.asarray(1.0), lambda: jnp.asarray(1.0, jnp.float32)),
    "committed": (lambda: jnp.ones(4), lambda: jax.device_put(jnp.ones(4), jax.devices()[0])),
    "device": (
        lambda: jax.device_put(np.ones(4), jax.devices()[0]),
        lambda: jax.device_put(np.ones(4), jax.devices()[1]),
    ),
    "memory_kind": (
        lambda: jax.device_put(np.ones(4), SingleDeviceSharding(jax.devices()[0])),
        lambda: jax.device_put(np.ones(4), SingleDeviceSharding(jax.devices()[0], memory_kind="pinned_host")),
    ),
    "spec": (lambda: place(np.ones((4, 4)), ["x"]), lambda: place(np.ones((4, 4)), [None, "x"])),
    "replicated": (lambda: place(np.ones((4, 4)), ["x"]), lambda: place(np.ones((4, 4)))),
    "order of devices": (
        lambda: jax.device_put(np.arange(2), NamedSharding(make_mesh({"x": 2}), PartitionSpec("x"))),
        lambda: jax.device_put(
            np.arange(2),
            NamedSharding(
                jax.sharding.Mesh(np.array(jax.devices()[:2][::-1], dtype=object), ("x",)), PartitionSpec("x")
            ),
        ),
    ),
    "implementation of keys": (lambda: jax.random.key(1), lambda: jax.random.key(1, impl="rbg")),
    "keys and their data": (lambda: jax.random.key(1), lambda: jax.random.key_data(jax.random.key(1))),
    "an array of NumPy": (lambda: jnp.ones(3), lambda: np.ones(3, np.float32)),
    "dtype of NumPy": (lambda: np.ones(3, "<f4"), lambda: np.ones(3, ">f4")),
    "order of NumPy": (lambda: np.ones((2, 3)), lambda: np.ones((2, 3), order="F")),
    "a value": (lambda: jnp.asarray(3), lambda: 3),
    "equal values": (lambda: 1, lambda: True),
    "long strings": (lambda: "x" * 30_000, lambda: b"x" * 30_000),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("is_back", [False, True], ids=["", "back"])
def test_every_change_of_a_leaf_is_seen(tmp_path: pathlib.Path, change: str, is_back: bool) -> None:
    """The rest of the tree stays as it is, and the tree was saved before."""
    before, after = reversed(CHANGES[change]) if is_back else CHANGES[change]
    other = place(np.arange(8.0), ["x"])
    jaxckpt.save(tmp_path / "before", {"a": other, "b": before(), "c": other})
    leaf = after()
    jaxckpt.save_async(tmp_path / "after", {"a": other, "b": leaf, "c": other}).wait(60)
    got = jaxckpt.restore(tmp_path / "after")
    assert_same_tree(got, {"a": other, "b": leaf, "c": other})
    if isinstance(leaf, jax.Array):
        assert got["b"].sharding == leaf.sharding
        assert got["b"].committed == leaf.committed
        assert getattr(got["b"], "weak_type", None) == getattr(leaf, "weak_type", None)
    if isinstance(leaf, np.ndarray):
        assert got["b"].flags.f_contiguous == leaf.flags.f_contiguous


def test_all_leaves_that_are_refused_are_listed_in_order_though_the_tree_is_known() -> None:
    tree: dict[str, Any] = {"a": jnp.ones(3), "b": 1, "c": jnp.ones(3), "d": jnp.ones(2)}
    inspect(tree)
    tree["a"].delete()
    tree["b"] = print
    tree["c"] = object()
    with pytest.raises(jaxckpt.UnsupportedLeafError, match="3 of 4 leaves") as caught:
        inspect(tree)
    assert [problem.key for problem in caught.value.problems] == ["a", "b", "c"]


def test_what_is_remembered_is_bounded_and_holds_no_arrays() -> None:
    watched: list[weakref.ref[Any]] = []
    for size in range(1, 40):
        tree = {"a": jax.device_put(np.ones(size)), "b": place(np.ones(2 * size), ["x"]), "c": np.ones(size)}
        watched += [weakref.ref(leaf) for leaf in tree.values()]
        inspect(tree)
        del tree
    gc.collect()
    assert [leaf for leaf in watched if leaf() is not None] == []
    assert len(_leaves._known_kinds) == _leaves._KINDS_MAX


def test_threads_that_look_at_many_trees_at_once_find_the_right_kinds() -> None:
    found: list[bool] = []

    def look(seed: int) -> None:
        for turn in range(60):
            size = 1 + (seed + turn) % 12
            leaves = inspect({"a": jax.device_put(np.ones(size)), "b": turn})
            found.append(leaves.kinds.templates[0].spec.shape == (size,) and leaves.values.keys() == {1})

    threads = [threading.Thread(target=look, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == [True] * 240


def test_a_save_of_a_known_tree_does_nothing_in_python_for_each_leaf(path: pathlib.Path) -> None:
    """Counted, on the thread that is blocked: functions of the package that are entered, not what they call."""
    tree = {str(number): place(np.full(16, number, np.float32)) for number in range(500)}
    folder = str(pathlib.Path(jaxckpt.__file__).parent)
    entered = 0

    def count(frame: Any, event: str, _argument: Any) -> None:
        nonlocal entered
        entered += event == "call" and frame.f_code.co_filename.startswith(folder)

    def calls_of_save(name: str) -> int:
        nonlocal entered
        entered = 0
        sys.setprofile(count)
        try:
            pending = jaxckpt.save_async(path / name, tree)
        finally:
            sys.setprofile(None)
        pending.wait(60)
        return entered

    assert calls_of_save("first") > len(tree)
    assert calls_of_save("second") < len(tree)
    assert_same_tree(jaxckpt.restore(path / "second"), tree)


# --- what is copied together ----------------------------------------------------------------------------------

DTYPES = ("float32", "bfloat16", "bool", "int4", "float8_e4m3fn", "int32", "uint8", "complex64", "float16")
SHAPES = ((), (1,), (3,), (5, 2), (16,), (7, 3), (0, 2), (64,), (2, 2, 3), (300,))


def mixed_tree() -> dict[str, Any]:
    """Neighbours with equal and with different elements, whole and cut, with and without padding behind them."""
    random = np.random.default_rng(3)
    tree: dict[str, Any] = {}
    for number in range(300):
        dtype = np.dtype(
            getattr(ml_dtypes, DTYPES[number // 7 % len(DTYPES)], None) or DTYPES[number // 7 % 9]
        )
        shape = SHAPES[int(random.integers(len(SHAPES)))]
        values = random.integers(0, 2, shape).astype(dtype)
        where = number % 5
        if where == 0:
            tree[str(number)] = np.asfortranarray(values)
        elif where == 1:
            tree[str(number)] = place(values)
        elif where == 2 and shape and shape[0] % 2 == 0:
            tree[str(number)] = place(values, ["x"])
        elif number in (103, 104):
            tree[str(number)] = jax.random.key(number)
        else:
            tree[str(number)] = jax.device_put(values)
    return tree


def test_arrays_that_are_laid_out_in_another_order(path: pathlib.Path) -> None:
    """Their memory is not what is stored; jax shows it to nobody as plain bytes."""
    columns_first = Format(Layout(major_to_minor=(1, 0)), SingleDeviceSharding(jax.devices()[0]))
    values = np.arange(12.0, dtype=np.float32).reshape(3, 4)
    tree = {"a": jnp.ones(3), "b": jax.device_put(values, columns_first), "c": jnp.zeros(5)}
    assert not np.asarray(tree["b"]).flags.c_contiguous
    with pytest.raises((TypeError, BufferError)):
        b"".join([tree["b"]])  # type: ignore[list-item]  # pyright: ignore[reportCallIssue, reportArgumentType]
    jaxckpt.save_async(path, tree).wait(60)
    assert_same_tree(jaxckpt.restore(path), tree)


@pytest.mark.parametrize("way", ["async", "blocking", "little memory", "cut into chunks"])
def test_small_leaves_of_all_kinds_side_by_side(path: pathlib.Path, way: str) -> None:
    tree = mixed_tree()
    want = mixed_tree()
    if way == "blocking":
        jaxckpt.save(path, tree)
    else:
        options = jaxckpt.SaveOptions(
            host_bytes_max=2 * MIB if way == "little memory" else None,
            chunk_bytes_max=64 if way == "cut into chunks" else 64 * MIB,
        )
        pending = jaxckpt.save_async(path, tree, options=options)
        for leaf in tree.values():
            if isinstance(leaf, jax.Array):
                leaf.delete()
            else:
                leaf[...] = 1
        pending.wait(60)
    assert_same_tree(jaxckpt.restore(path), want)
    assert jaxckpt.verify(path).ok


def test_between_packed_leaves_there_are_zeros(tmp_path: pathlib.Path) -> None:
    """Not what an earlier save left in the buffer."""
    jaxckpt.save_async(tmp_path / "ones", {"a": np.full(9 * MIB, 255, np.uint8)}).wait(60)
    tree = mixed_tree()
    jaxckpt.save_async(tmp_path / "a", tree).wait(60)
    store = open_store(tmp_path / "a")
    manifest = parse_manifest(store.read(MANIFEST_NAME, MANIFEST_BYTES_MAX), store.path)
    table = manifest.chunks
    assert len(manifest.packs) == 1
    assert len(table.checksums) == len(table.length) * CHECKSUM_BYTES
    (pack,) = (tmp_path / "a" / manifest.data / "packs").iterdir()
    data = np.frombuffer(pack.read_bytes(), np.uint8)
    nbytes = np.repeat(manifest.chunk_nbytes, np.diff(manifest.chunk_starts))
    padding = 0
    for offset, length, used in zip(
        table.offset.tolist(), table.length.tolist(), nbytes.tolist(), strict=True
    ):
        assert not data[offset + used : offset + length].any()
        padding += length - used
    assert padding > 0
