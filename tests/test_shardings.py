"""The sharding of an array is stored, shown, and rebuilt equal on the same devices; on others the nearest one is taken.

Every kind of partition spec goes through `describe_sharding` and a real checkpoint. What `restore` does with processes
of other device counts is in test_devices.py.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import msgpack
import numpy as np
import pytest
from jax.sharding import (
    AbstractMesh,
    AxisType,
    Mesh,
    NamedSharding,
    PartitionSpec as P,
    Sharding,
    SingleDeviceSharding,
)

import jaxckpt
from jaxckpt._shardings import describe_sharding, fit_to_mesh, format_sharding, rebuild_sharding, shard_boxes

from .helpers import assert_same_leaf, assert_same_tree, make_mesh, run_fork

SHAPE = (16, 8, 24)


def explicit_mesh() -> Mesh:
    devices = np.array(jax.devices()[4:12], dtype=object).reshape(4, 2)
    return Mesh(devices, ("a", "b"), axis_types=(AxisType.Explicit, AxisType.Explicit))


def mixed_mesh() -> Mesh:
    devices = np.array(jax.devices()[:8], dtype=object).reshape(4, 2)
    return Mesh(devices, ("a", "b"), axis_types=(AxisType.Explicit, AxisType.Auto))


def permuted_mesh() -> Mesh:
    """A mesh whose devices are in no order that anybody would guess."""
    numbers = np.array([[5, 12], [3, 0], [15, 7], [1, 10]])
    devices = np.array(jax.devices(), dtype=object)[numbers]
    return Mesh(devices, ("a", "b"), axis_types=(AxisType.Auto, AxisType.Auto))


# Name: how it is made, and how it is shown.
SHARDINGS: dict[str, tuple[Callable[[], Sharding], str]] = {
    "rows": (lambda: NamedSharding(make_mesh({"a": 8}), P("a")), "P('a') on a=8"),
    "rows, all dimensions": (
        lambda: NamedSharding(make_mesh({"a": 8}), P("a", None, None)),
        "P('a', None, None) on a=8",
    ),
    "columns": (lambda: NamedSharding(make_mesh({"a": 8}), P(None, None, "a")), "P(None, None, 'a') on a=8"),
    "grid": (lambda: NamedSharding(make_mesh({"a": 4, "b": 2}), P("a", "b")), "P('a', 'b') on a=4,b=2"),
    "two axes": (
        lambda: NamedSharding(make_mesh({"a": 4, "b": 2}), P(("a", "b"))),
        "P(('a', 'b')) on a=4,b=2",
    ),
    "two axes, swapped": (
        lambda: NamedSharding(make_mesh({"a": 4, "b": 2}), P(None, ("b", "a"))),
        "P(None, ('b', 'a')) on a=4,b=2",
    ),
    "three axes": (
        lambda: NamedSharding(make_mesh({"x": 2, "y": 2, "z": 2}), P(("z", "x"), None, "y")),
        "P(('z', 'x'), None, 'y') on x=2,y=2,z=2",
    ),
    "replicated": (lambda: NamedSharding(make_mesh({"a": 4, "b": 2}), P()), "P() on a=4,b=2"),
    "partly replicated": (
        lambda: NamedSharding(make_mesh({"a": 4, "b": 2}), P(None, "b")),
        "P(None, 'b') on a=4,b=2",
    ),
    "other devices": (
        lambda: NamedSharding(make_mesh({"a": 8}, first_device=8), P("a")),
        "P('a') on a=8",
    ),
    "permuted": (lambda: NamedSharding(permuted_mesh(), P("b", None, "a")), "P('b', None, 'a') on a=4,b=2"),
    "one device in a mesh": (
        lambda: NamedSharding(make_mesh({"a": 1, "b": 1}), P("a", "b")),
        "P('a', 'b') on a=1,b=1",
    ),
    "explicit": (lambda: NamedSharding(explicit_mesh(), P("a", "b", None)), "P('a', 'b', None) on a=4,b=2"),
    "mixed": (lambda: NamedSharding(mixed_mesh(), P("a", "b")), "P('a', 'b') on a=4,b=2"),
    "reduced": (
        lambda: NamedSharding(explicit_mesh(), P("a", None, reduced={"b"})),
        "P('a', None, reduced={'b'}) on a=4,b=2",
    ),
    "pinned": (
        lambda: NamedSharding(make_mesh({"a": 4, "b": 2}), P("b"), memory_kind="pinned_host"),
        "P('b') on a=4,b=2 in pinned_host",
    ),
    "first device": (lambda: SingleDeviceSharding(jax.devices()[0]), "device 0"),
    "another device": (lambda: SingleDeviceSharding(jax.devices()[11]), "device 11"),
    "a device's pinned memory": (
        lambda: SingleDeviceSharding(jax.devices()[2], memory_kind="pinned_host"),
        "device 2 in pinned_host",
    ),
}


def make_array(sharding: Sharding, shape: tuple[int, ...] = SHAPE) -> jax.Array:
    return jax.device_put(np.arange(np.prod(shape, dtype=int), dtype=np.float32).reshape(shape), sharding)


@pytest.mark.parametrize("name", SHARDINGS)
def test_a_sharding_is_rebuilt_equal_from_plain_data(name: str):
    make, shown = SHARDINGS[name]
    sharding = make()
    descriptor = msgpack.unpackb(msgpack.packb(describe_sharding(sharding)))
    rebuilt = rebuild_sharding(descriptor, SHAPE)
    assert rebuilt == sharding
    assert rebuilt.memory_kind == sharding.memory_kind
    assert list(rebuilt.device_set) == list(sharding.device_set)
    assert format_sharding(descriptor) == shown


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory):
    """A checkpoint with a leaf for every sharding, and the tree."""
    path = tmp_path_factory.mktemp("shardings") / "checkpoint"
    tree = {name: make_array(make()) for name, (make, _) in SHARDINGS.items()}
    tree["uncommitted"] = jnp.arange(6.0)
    jaxckpt.save(path, tree)
    return path, tree


def test_restored_arrays_lie_as_the_saved_ones_did(saved: tuple[pathlib.Path, dict[str, jax.Array]]):
    path, tree = saved
    restored = jaxckpt.restore(path)
    assert_same_tree(restored, tree)
    for name, leaf in tree.items():
        assert restored[name].sharding == leaf.sharding, name
        assert restored[name].committed == leaf.committed, name
        for mine, theirs in zip(restored[name].addressable_shards, leaf.addressable_shards, strict=True):
            assert mine.device == theirs.device
            assert np.array_equal(np.asarray(mine.data), np.asarray(theirs.data))


def test_a_step_compiled_for_the_saved_arrays_takes_the_restored_ones(
    saved: tuple[pathlib.Path, dict[str, jax.Array]],
):
    path, tree = saved
    step = jax.jit(lambda leaf: leaf * 2)
    for name in ("explicit", "permuted", "one device in a mesh", "another device", "uncommitted"):
        step(tree[name])
        count = step._cache_size()
        step(jaxckpt.restore(path, select=name)[name])
        assert step._cache_size() == count, name


def test_describe_shows_every_sharding(saved: tuple[pathlib.Path, dict[str, jax.Array]]):
    path, _ = saved
    description = jaxckpt.describe(path)
    shown = {leaf.key: leaf.sharding for leaf in description.leaves}
    assert {name: shown[name] for name in SHARDINGS} == {name: text for name, (_, text) in SHARDINGS.items()}
    for _, text in SHARDINGS.values():
        assert text in str(description)
    sharding = jaxckpt.open(path)["grid"].sharding
    assert sharding is not None
    assert sharding["axes"] == [["a", 4], ["b", 2]]
    assert sharding["spec"] == [["a"], ["b"]]


@pytest.mark.slow
def test_prng_keys_and_empty_arrays_keep_their_shardings(path: pathlib.Path):
    mesh = make_mesh({"a": 4, "b": 2})
    tree = {
        "keys": jax.device_put(jax.random.split(jax.random.key(3), 8), NamedSharding(mesh, P(("a", "b")))),
        "key": jax.device_put(jax.random.key(4), SingleDeviceSharding(jax.devices()[9])),
        "grid": jax.device_put(
            jax.random.split(jax.random.key(5, impl="rbg"), (4, 6)), NamedSharding(mesh, P("a", "b"))
        ),
        "replicated": jax.device_put(jax.random.split(jax.random.key(6), 3), NamedSharding(mesh, P())),
        "empty": make_array(NamedSharding(mesh, P("a", "b")), (0, 2, 3)),
        "scalar": make_array(NamedSharding(mesh, P()), ()),
    }
    jaxckpt.save(path, tree)
    restored = jaxckpt.restore(path)
    assert_same_tree(restored, tree)
    assert {key: leaf.sharding for key, leaf in restored.items()} == {
        key: leaf.sharding for key, leaf in tree.items()
    }


def test_a_sharding_that_has_no_description_is_shown_and_restored_somewhere(path: pathlib.Path):
    internal = pytest.importorskip("jax._src.sharding_impls")
    named = NamedSharding(make_mesh({"a": 8}), P("a"))
    opaque = internal.GSPMDSharding(named._device_assignment, named._to_xla_hlo_sharding(len(SHAPE)))
    array = make_array(opaque)
    jaxckpt.save(path, {"w": array})
    assert jaxckpt.describe(path).leaves[0].sharding.startswith("GSPMDSharding")
    assert_same_leaf(jaxckpt.restore(path)["w"], array)
    assert_same_leaf(jaxckpt.restore(path, mesh=make_mesh({"a": 4}))["w"], array)


# --- a mesh of the caller's -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "mesh", "shape", "fitted", "is_said"),
    [
        (P("a", "b"), {"a": 2, "b": 4}, (8, 8), P("a", "b"), False),
        (P("a", "b"), {"b": 4, "a": 2}, (8, 8), P("a", "b"), False),
        (P("a", "b"), {"a": 8}, (8, 8), P("a", None), False),
        (P("a", "b"), {"x": 8}, (8, 8), P(None, None), False),
        (P(("a", "b")), {"b": 4}, (8,), P("b"), False),
        (P("a", "b"), {"a": 3, "b": 2}, (8, 8), P(None, "b"), True),
        (P(("a", "b")), {"a": 2, "b": 3}, (8,), P("a"), True),
        (P(("a", "b"), None), {"a": 3, "b": 2}, (8, 1), P(None, None), True),
        (P(("a", "b")), {"a": 4, "b": 4}, (8,), P("a"), True),
        (P(), {"a": 3}, (8,), P(), False),
        (P("a"), {"a": 4}, (0,), P("a"), False),
    ],
)
def test_specs_fit_another_mesh(
    spec: P, mesh: dict[str, int], shape: tuple[int, ...], fitted: P, is_said: bool
):
    descriptor = describe_sharding(NamedSharding(make_mesh({"a": 2, "b": 2}), spec))
    wanted = make_mesh(mesh)
    sharding, retreat = fit_to_mesh(descriptor, wanted, shape)
    assert sharding == NamedSharding(wanted, fitted)
    sharding.shard_shape(shape)
    assert (retreat is not None and "does not divide" in retreat) == is_said


def test_memory_kinds_survive_another_mesh(path: pathlib.Path):
    names = ("pinned", "a device's pinned memory")
    tree = {name: make_array(SHARDINGS[name][0]()) for name in names}
    jaxckpt.save(path, tree)
    restored = jaxckpt.restore(path, mesh=make_mesh({"b": 2}))
    assert_same_tree(restored, tree)
    assert [restored[name].sharding.memory_kind for name in names] == ["pinned_host"] * 2
    assert [restored[name].sharding.mesh.shape for name in names] == [{"b": 2}] * 2


def test_reduced_axes_stay_where_the_mesh_allows_them(path: pathlib.Path):
    tree = {"w": make_array(SHARDINGS["reduced"][0]())}
    jaxckpt.save(path, tree)
    explicit = jax.make_mesh((2, 2), ("a", "b"), (AxisType.Explicit,) * 2, devices=jax.devices()[:4])
    for mesh, spec in (
        (explicit, P("a", None, reduced={"b"})),
        (make_mesh({"a": 2, "b": 2}), P("a", None)),
        (make_mesh({"a": 2}), P("a", None)),
    ):
        restored = jaxckpt.restore(path, mesh=mesh)
        assert_same_tree(restored, tree)
        assert restored["w"].sharding == NamedSharding(mesh, spec)


# --- shardings without devices --------------------------------------------------------------------------------


def test_shapes_of_eval_shape_under_an_explicit_mesh_are_a_like(path: pathlib.Path):
    mesh = explicit_mesh()
    tree = {
        "w": make_array(NamedSharding(mesh, P("a", "b", None))),
        "v": make_array(NamedSharding(mesh, P(None, "b", None))),
    }
    jaxckpt.save(path, tree)
    like = jax.eval_shape(lambda state: jax.tree.map(lambda leaf: leaf + 1, state), tree)
    assert isinstance(like["w"].sharding.mesh, AbstractMesh)
    moved = Mesh(mesh.devices[::-1], mesh.axis_names, axis_types=mesh.axis_types)
    for context, devices in ((None, mesh), (mesh, mesh), (moved, moved)):
        if context is None:
            restored = jaxckpt.restore(path, like)
        else:
            with jax.set_mesh(context):
                restored = jaxckpt.restore(path, like)
        assert_same_tree(restored, tree)
        assert {key: leaf.sharding for key, leaf in restored.items()} == {
            key: NamedSharding(devices, leaf.sharding.spec) for key, leaf in tree.items()
        }


def test_an_abstract_mesh_that_was_never_saved_gets_the_first_devices(path: pathlib.Path):
    array = make_array(SHARDINGS["another device"][0]())
    jaxckpt.save(path, {"w": array})
    abstract = AbstractMesh((2, 3), ("x", "y"), axis_types=(AxisType.Explicit,) * 2)
    sharding = NamedSharding(abstract, P("x", None, "y"))
    like = {"w": jax.ShapeDtypeStruct(SHAPE, np.float32, sharding=sharding)}
    for restored in (jaxckpt.restore(path, like), jaxckpt.restore(path, sharding=sharding)):
        assert_same_leaf(restored["w"], array)
        assert restored["w"].sharding.spec == sharding.spec
        assert list(restored["w"].sharding.mesh.devices.flat) == jax.devices()[:6]


def test_a_mesh_of_one_device_comes_back_where_there_is_only_one(path: pathlib.Path):
    jaxckpt.save(
        path,
        {
            "mesh": make_array(SHARDINGS["one device in a mesh"][0]()),
            "single": make_array(SHARDINGS["another device"][0]()),
            "wide": make_array(SHARDINGS["grid"][0]()),
        },
    )
    program = """
        import sys
        import jax, jaxckpt
        from jax.sharding import NamedSharding, PartitionSpec as P, SingleDeviceSharding
        from tests.helpers import make_mesh
        restored = jaxckpt.restore(sys.argv[1])
        (device,) = jax.devices()
        assert restored["mesh"].sharding == NamedSharding(make_mesh({"a": 1, "b": 1}), P("a", "b"))
        assert restored["single"].sharding == SingleDeviceSharding(device)
        assert restored["wide"].sharding == SingleDeviceSharding(device)
        """
    run_fork(program, path)


# --- what callers ask for -------------------------------------------------------------------------------------


def test_boxes_of_equal_shards_are_listed_once():
    sharding = SHARDINGS["partly replicated"][0]()
    boxes = shard_boxes(sharding, SHAPE)
    assert list(boxes) == [((0, 0, 0), (16, 4, 24)), ((0, 4, 0), (16, 8, 24))]
    assert sorted(device.id for devices in boxes.values() for device in devices) == list(range(8))


def test_every_leaf_that_a_sharding_does_not_fit_is_named(path: pathlib.Path):
    jaxckpt.save(path, {"a": jnp.ones(8), "b": jnp.ones(6), "c": jnp.ones(()), "d": 3})
    sharding = NamedSharding(make_mesh({"x": 4}), P("x"))
    with pytest.raises(jaxckpt.MismatchError, match="do not fit 2 leaves") as caught:
        jaxckpt.restore(path, sharding=sharding)
    assert [problem.key for problem in caught.value.problems] == ["b", "c"]
    assert "shape (6,) cannot be sharded as" in str(caught.value)


@pytest.mark.parametrize(
    "wrong", [P("x"), {"a": P("x"), "b": None}, lambda key, struct: "cpu:0" if key == "a" else None]
)
def test_what_is_no_sharding_is_refused_by_key(path: pathlib.Path, wrong: Any):
    jaxckpt.save(path, {"a": jnp.ones(8), "b": 2})
    with pytest.raises(jaxckpt.MismatchError, match=r"a: .* not a jax\.sharding\.Sharding"):
        jaxckpt.restore(path, sharding=wrong)


def test_a_prefix_that_does_not_fit_the_tree_is_refused(path: pathlib.Path):
    jaxckpt.save(path, {"a": jnp.ones(8), "b": [jnp.ones(2), jnp.ones(3)]})
    single = SingleDeviceSharding(jax.devices()[1])
    with pytest.raises(jaxckpt.MismatchError, match="not a prefix"):
        jaxckpt.restore(path, sharding={"a": single, "b": [single]})


@pytest.mark.slow
def test_a_callable_tree_of_shardings_is_a_tree(path: pathlib.Path):
    equinox = pytest.importorskip("equinox")
    model = equinox.nn.MLP(2, 2, 4, 1, key=jax.random.key(0), activation=equinox.nn.PReLU())
    arrays, _ = equinox.partition(model, equinox.is_array)
    jaxckpt.save(path, arrays)
    wanted = SingleDeviceSharding(jax.devices()[6])
    restored = jaxckpt.restore(path, like=arrays, sharding=jax.tree.map(lambda _: wanted, arrays))
    assert_same_tree(restored, arrays)
    assert {leaf.sharding for leaf in jax.tree.leaves(restored)} == {wanted}


def test_arrays_of_opaque_dtypes_can_be_cast_onto_a_sharding(path: pathlib.Path):
    values = np.arange(16, dtype=">f4").reshape(8, 2)
    jaxckpt.save(path, {"w": values})
    wanted = NamedSharding(make_mesh({"x": 4, "y": 2}), P("x", "y"))
    like = {"w": jax.ShapeDtypeStruct((8, 2), np.float32, sharding=wanted)}
    restored = jaxckpt.restore(path, like, cast=True)["w"]
    assert restored.sharding == wanted
    assert np.array_equal(restored, values)
