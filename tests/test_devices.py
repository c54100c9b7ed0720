"""A checkpoint of eight devices comes back bit for bit on any number of devices, in whatever way it is asked for.

One checkpoint is saved on eight devices, under many meshes and specs, and one on a single device. A fresh process
for each device count restores both: with nothing given, with ``like=``, ``mesh=`` and ``sharding=``, inside and
outside `jax.set_mesh`. `check_restores` is what such a process runs; the values to expect are computed, not stored.
"""

from __future__ import annotations

import logging
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P, Sharding, SingleDeviceSharding

import jaxckpt

from .helpers import assert_same_tree, make_mesh, run_fork

pytestmark = pytest.mark.slow

SAVED_COUNT = 8
# More devices than the eight are those of this process.
COUNTS = (1, 6, 8)

# Axes of the mesh, spec, shape, dtype. A mesh of 6 does not divide the shapes that are as small as the axes.
LAYOUTS: dict[str, tuple[dict[str, int], P, tuple[int, ...], Any]] = {
    "rows": ({"a": 8}, P("a"), (48, 5), np.float32),
    "tight rows": ({"a": 8}, P("a", None), (8, 3), jnp.bfloat16),
    "columns": ({"a": 8}, P(None, "a"), (5, 40), np.int16),
    "grid": ({"a": 4, "b": 2}, P("a", "b"), (24, 10), np.float32),
    "transposed": ({"a": 4, "b": 2}, P("b", "a"), (6, 4), np.complex64),
    "one dimension over two axes": ({"a": 4, "b": 2}, P(("a", "b")), (16,), np.uint8),
    "last over two axes": ({"a": 4, "b": 2}, P(None, ("b", "a")), (3, 24), jnp.float8_e4m3fn),
    "cube": ({"p": 2, "q": 2, "r": 2}, P("r", "p", "q"), (4, 6, 2), np.float16),
    "cube on a line": ({"p": 2, "q": 2, "r": 2}, P(("q", "r", "p")), (40,), jnp.int4),
    "replicated": ({"a": 4, "b": 2}, P(), (7, 3), np.float32),
    "partly replicated": ({"a": 4, "b": 2}, P(None, "b"), (7, 6), np.int32),
    "scalar": ({"a": 8}, P(), (), np.float32),
    "empty": ({"a": 4, "b": 2}, P("a", "b"), (8, 0), np.float32),
    "explicit": ({"a": 4, "b": 2}, P("a", "b"), (8, 8), np.float32),
    "large": ({"a": 4, "b": 2}, P("b", "a"), (600, 1200), np.uint32),
}
PINNED = "pinned"


def make_values() -> dict[str, np.ndarray]:
    """What the leaves hold: every bit pattern of their dtypes, NaN payloads included."""
    values = {}
    for number, (name, (_, _, shape, dtype)) in enumerate(LAYOUTS.items()):
        generator = np.random.default_rng(number)
        if dtype is jnp.int4:
            values[name] = generator.integers(-8, 8, shape).astype(dtype)
        else:
            data = generator.bytes(int(np.prod(shape)) * np.dtype(dtype).itemsize)
            values[name] = np.frombuffer(data, dtype).reshape(shape)
    return values


def make_tree(device_count: int) -> dict[str, Any]:
    """The tree on eight devices, or on one."""
    values = make_values()
    arrays: dict[str, Any] = {}
    for name, (axes, spec, _, _) in LAYOUTS.items():
        arrays[name] = jax.device_put(values[name], _saved_sharding(name, axes, spec, device_count))
    axis = (
        NamedSharding(make_mesh({"a": 8}), P("a"))
        if device_count > 1
        else SingleDeviceSharding(jax.devices()[0])
    )
    return {
        "arrays": arrays,
        PINNED: jax.device_put(values["rows"], axis.with_memory_kind("pinned_host")),
        "keys": jax.device_put(jax.random.split(jax.random.key(1), 8), axis),
        "device": jax.device_put(values["grid"], jax.devices()[device_count - 1]),
        "uncommitted": jnp.asarray(values["grid"]),
        "weak": jnp.asarray(2.5),
        "host": values["grid"].copy(),
        "list": [3, None, (1.5, "text")],
    }


def _saved_sharding(name: str, axes: dict[str, int], spec: P, device_count: int) -> Sharding:
    if device_count == 1:
        return SingleDeviceSharding(jax.devices()[0])
    mesh = make_mesh(axes)
    if name == "explicit":
        mesh = Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Explicit,) * 2)
    return NamedSharding(mesh, spec)


def plain_tree() -> dict[str, Any]:
    """The tree on the default device of any process, to compare with."""
    tree = make_tree(1)
    return tree | {PINNED: jax.device_put(tree[PINNED], SingleDeviceSharding(jax.devices()[0]))}


# --- what a process with n devices does -----------------------------------------------------------------------


def check_restores(path: str) -> None:
    """Restores a checkpoint in every way on all devices of this process."""
    want = plain_tree()
    for check in (check_nothing, check_like, check_mesh, check_sharding, check_set_mesh, check_donation):
        check(path, want)


def compare(restored: Any, want: Any) -> None:
    """Bit for bit equal trees. The arrays are looked at as a whole and shard by shard."""
    assert_same_tree(restored, want)
    for name, array in restored["arrays"].items():
        values = np.asarray(want["arrays"][name])
        for shard in array.addressable_shards:
            assert np.asarray(shard.data).tobytes() == values[shard.index].tobytes(), name
    assert restored["uncommitted"].committed is False
    assert restored["weak"].weak_type


def check_nothing(path: str, want: Any) -> None:
    restored = jaxckpt.restore(path)
    compare(restored, want)
    assert restored[PINNED].sharding.memory_kind == "pinned_host"


def check_like(path: str, want: Any) -> None:
    structs = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if isinstance(leaf, jax.Array) else leaf,
        want,
    )
    compare(jaxckpt.restore(path, structs), want)
    compare(jaxckpt.restore(path, want), want)
    for mesh in meshes():
        structs["arrays"] = {
            name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=fitting(mesh, leaf.shape))
            for name, leaf in want["arrays"].items()
        }
        restored = jaxckpt.restore(path, structs)
        compare(restored, want)
        again = jaxckpt.restore(path, restored)
        compare(again, want)
        for name, struct in structs["arrays"].items():
            assert restored["arrays"][name].sharding == struct.sharding == again["arrays"][name].sharding


def check_mesh(path: str, want: Any) -> None:
    for mesh in meshes():
        restored = jaxckpt.restore(path, mesh=mesh)
        assert_same_tree(restored | {"uncommitted": want["uncommitted"], "weak": want["weak"]}, want)
        assert_same_tree(restored["uncommitted"], want["uncommitted"])
        assert {array.sharding.mesh for array in restored["arrays"].values()} == {mesh}
        assert restored[PINNED].sharding.memory_kind == "pinned_host"
        assert restored["keys"].sharding.mesh == mesh


def check_sharding(path: str, want: Any) -> None:
    for mesh in meshes():
        everywhere = NamedSharding(mesh, P())
        first = SingleDeviceSharding(mesh.devices.flat[-1])
        for sharding, chosen in (
            (everywhere, lambda key, leaf, everywhere=everywhere: everywhere),
            (
                {name: (everywhere if name == "arrays" else first) for name in want},
                lambda key, leaf, everywhere=everywhere, first=first: (
                    everywhere if "arrays" in key else first
                ),
            ),
            (
                lambda key, struct, mesh=mesh: fitting(mesh, struct.shape),
                lambda key, leaf, mesh=mesh: fitting(mesh, leaf.shape),
            ),
        ):
            restored = jaxckpt.restore(path, sharding=sharding)
            assert_same_tree(restored["arrays"], want["arrays"])
            assert_same_tree([restored["keys"], restored["host"]], [want["keys"], want["host"]])
            for place, leaf in jax.tree_util.tree_leaves_with_path(restored):
                if isinstance(leaf, jax.Array):
                    asked = chosen(jax.tree_util.keystr(place), leaf)
                    # JAX writes specs of PRNG keys out: P() becomes P(None), which is not equal to it.
                    is_keys = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
                    assert leaf.sharding == asked or (
                        is_keys and leaf.sharding.is_equivalent_to(asked, leaf.ndim)
                    )


def check_set_mesh(path: str, want: Any) -> None:
    for mesh in meshes():
        for kind in (AxisType.Auto, AxisType.Explicit):
            typed = Mesh(mesh.devices, mesh.axis_names, axis_types=(kind,) * len(mesh.axis_names))
            with jax.set_mesh(typed):
                whole = jaxckpt.restore(path)
                on_mesh = jaxckpt.restore(path, mesh=typed)
            compare(whole, want)
            assert_same_tree(on_mesh["arrays"], want["arrays"])
            assert {array.sharding.mesh for array in on_mesh["arrays"].values()} == {typed}


def check_donation(path: str, want: Any) -> None:
    """Replicas share their bytes on the host; a step that gets them donated must not see that."""
    restored = jaxckpt.restore(path, select="arrays/*")["arrays"]
    names = ("replicated", "partly replicated", "large", "scalar")
    step = jax.jit(lambda leaves: [leaf + 1 for leaf in leaves], donate_argnums=0)
    after = step(step([restored[name] for name in names]))
    for name, leaf in zip(names, after, strict=True):
        for shard in leaf.addressable_shards:
            one = jnp.ones((), leaf.dtype)
            twice = jnp.asarray(want["arrays"][name][shard.index]) + one + one
            assert np.array_equal(np.asarray(shard.data), np.asarray(twice), equal_nan=True), name


def meshes() -> Iterator[Mesh]:
    """Meshes over all devices and over some, with the names that were saved, some of them, and others."""
    count = len(jax.devices())
    yield make_mesh({"a": count})
    if count % 2 == 0:
        yield make_mesh({"b": 2, "a": count // 2})
        yield make_mesh({"z": count // 2, "q": 2})
    if count > 2:
        yield make_mesh({"a": 1, "b": count - 1})


def fitting(mesh: Mesh, shape: tuple[int, ...]) -> NamedSharding:
    """A spec with the mesh's axes on the last dimensions that they divide: the other way round than saved."""
    spec: list[str | None] = [None] * len(shape)
    for name, size in mesh.shape.items():
        for axis in reversed(range(len(shape))):
            if spec[axis] is None and shape[axis] % size == 0:
                spec[axis] = name
                break
    return NamedSharding(mesh, P(*spec))


# --- tests ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[int, pathlib.Path]:
    """Checkpoints of eight devices and of one, the first with chunks of many sizes, by number of devices."""
    folder = tmp_path_factory.mktemp("devices")
    paths = {SAVED_COUNT: folder / "eight", 1: folder / "one"}
    options = jaxckpt.SaveOptions(pack_bytes_max=100_000, chunk_bytes_max=300_000)
    jaxckpt.save(paths[SAVED_COUNT], make_tree(SAVED_COUNT), options=options)
    jaxckpt.save(paths[1], make_tree(1))
    return paths


@pytest.mark.parametrize("count", COUNTS)
def test_on_any_number_of_devices_every_way_to_restore_is_bit_equal(
    saved: dict[int, pathlib.Path], count: int
):
    program = """
        import sys
        import jax
        from tests.test_devices import check_restores
        assert len(jax.devices()) == int(sys.argv[1])
        check_restores(sys.argv[2])
        check_restores(sys.argv[3])
        """
    run_fork(program, str(count), saved[SAVED_COUNT], saved[1], devices=count)


@pytest.mark.parametrize("count", [1, 8])
def test_a_save_of_another_process_comes_back_here(path: pathlib.Path, count: int):
    program = """
        import sys
        import jax, jaxckpt
        from tests.test_devices import make_tree
        tree = make_tree(len(jax.devices()))
        with jax.set_mesh(jax.make_mesh((len(jax.devices()),), ("a",))):
            jaxckpt.save_async(sys.argv[1], tree).wait()
        """
    run_fork(program, path, devices=count)
    check_restores(str(path))


def test_the_saved_mesh_comes_back_on_the_same_devices(saved: dict[int, pathlib.Path]):
    tree = make_tree(SAVED_COUNT)
    restored = jaxckpt.restore(saved[SAVED_COUNT])
    for (place, got), want in zip(
        jax.tree_util.tree_leaves_with_path(restored), jax.tree.leaves(tree), strict=True
    ):
        if isinstance(want, jax.Array):
            assert got.sharding == want.sharding, jax.tree_util.keystr(place)


def test_fewer_devices_shrink_the_first_axis_first(saved: dict[int, pathlib.Path]):
    program = """
        import sys
        import jax, jaxckpt
        restored = jaxckpt.restore(sys.argv[1])["arrays"]
        shapes = {name: dict(array.sharding.mesh.shape) for name, array in restored.items()}
        assert shapes["rows"] == {"a": 4}, shapes
        assert shapes["grid"] == shapes["replicated"] == {"a": 2, "b": 2}, shapes
        assert shapes["cube"] == {"p": 1, "q": 2, "r": 2}, shapes
        assert restored["grid"].sharding.spec == jax.P("a", "b")
        assert restored["explicit"].sharding.mesh.axis_types[0].name == "Explicit"
        """
    run_fork(program, saved[SAVED_COUNT], devices=6)


def test_what_no_longer_divides_is_said_in_the_log(
    saved: dict[int, pathlib.Path], caplog: pytest.LogCaptureFixture
):
    with caplog.at_level(logging.INFO, logger="jaxckpt"):
        restored = jaxckpt.restore(saved[SAVED_COUNT], mesh=make_mesh({"a": 3, "b": 2}))["arrays"]
    said = {
        record.getMessage().split(":")[0]
        for record in caplog.records
        if "does not divide" in record.getMessage()
    }
    not_dividing = {"tight rows", "columns", "transposed", "one dimension over two axes", "explicit"}
    assert {f"arrays/{name}" for name in not_dividing} <= said
    assert "arrays/rows" not in said
    assert "arrays/grid" not in said
    assert restored["rows"].sharding.spec == P("a")
    assert restored["tight rows"].sharding.spec == P(None, None)
    assert restored["transposed"].sharding.spec == P("b", None)


def test_a_like_that_was_donated_still_says_where_the_leaves_go(saved: dict[int, pathlib.Path]):
    want = plain_tree()["arrays"]
    like = {
        "arrays": {
            "grid": jax.device_put(want["grid"], NamedSharding(make_mesh({"k": 5, "m": 2}), P(None, "k")))
        }
    }
    sharding = like["arrays"]["grid"].sharding
    like["arrays"]["grid"].delete()
    restored = jaxckpt.restore(saved[SAVED_COUNT], like, unexpected="ignore")
    assert restored["arrays"]["grid"].sharding == sharding
    assert_same_tree(restored, {"arrays": {"grid": want["grid"]}})


def test_a_copied_checkpoint_restores_too(saved: dict[int, pathlib.Path], tmp_path: pathlib.Path):
    shutil.copytree(saved[SAVED_COUNT], tmp_path / "copy")
    compare(jaxckpt.restore(tmp_path / "copy"), plain_tree())
