"""Several real processes save one tree and restore it, on as many processes as there happen to be."""

from __future__ import annotations

import pathlib
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxckpt

from .processes import Worker, run_processes

pytestmark = pytest.mark.slow

OPTIONS = jaxckpt.SaveOptions(pack_bytes_max=1 << 16, timeout_s=30)


def global_mesh(columns: int = 1) -> Mesh:
    devices = np.array(jax.devices(), dtype=object)
    return Mesh(devices.reshape(-1, columns), ("x", "y"), axis_types=(AxisType.Auto, AxisType.Auto))


def values(shape: tuple[int, ...], start: int = 0) -> np.ndarray[Any, Any]:
    return np.arange(start, start + int(np.prod(shape)), dtype=np.float32).reshape(shape)


def place(array: np.ndarray[Any, Any], mesh: Mesh, spec: P) -> jax.Array:
    return jax.make_array_from_callback(array.shape, NamedSharding(mesh, spec), lambda index: array[index])


def make_tree(mesh: Mesh) -> dict[str, Any]:
    return {
        "rows": place(values((64, 96)), mesh, P("x")),
        "columns": place(values((48, 64), 7), mesh, P(None, "x")),
        "replicated": place(values((33, 5), 9), mesh, P()),
        "large": place(values((512, 4096), 1), mesh, P()),
        "bfloat16": place(values((128, 2)).astype(jax.numpy.bfloat16), mesh, P("x")),
        "host": values((5,)),
        "step": 7,
    }


def addressable_bytes(array: jax.Array) -> dict[Any, bytes]:
    return {str(shard.index): np.asarray(shard.data).tobytes() for shard in array.addressable_shards}


def assert_tree_is_right(tree: dict[str, Any], mesh: Mesh) -> None:
    want = make_tree(mesh)
    for key, leaf in want.items():
        if isinstance(leaf, jax.Array):
            whole = np.asarray(values(leaf.shape))  # only for its shape
            assert tree[key].shape == whole.shape
            for shard in tree[key].addressable_shards:
                expected = EXPECTED[key][shard.index]
                assert np.asarray(shard.data).tobytes() == np.ascontiguousarray(expected).tobytes(), key
        else:
            np.testing.assert_array_equal(tree[key], leaf)


EXPECTED = {
    "rows": values((64, 96)),
    "columns": values((48, 64), 7),
    "replicated": values((33, 5), 9),
    "large": values((512, 4096), 1),
    "bfloat16": values((128, 2)).astype(jax.numpy.bfloat16),
}


def save_tree(worker: Worker, path: str) -> int:
    info = jaxckpt.save(path, make_tree(global_mesh()), options=OPTIONS)
    return info.bytes_written


def restore_tree(worker: Worker, path: str) -> tuple[int, int]:
    mesh = global_mesh()
    tree, report = jaxckpt.restore(path, mesh=mesh, report=True)
    assert_tree_is_right(tree, mesh)
    return report.bytes_read, report.group_bytes_read


@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize("count", [2, 4])
def test_a_tree_is_saved_by_many_and_restored_by_others(path: pathlib.Path, count: int, devices: int) -> None:
    outcomes = run_processes(save_tree, count, devices=devices, arguments=(str(path),))
    assert [outcome.error_text for outcome in outcomes] == [""] * count
    assert jaxckpt.verify(path).ok
    tree = jaxckpt.restore(path)
    for key, expected in EXPECTED.items():
        assert np.asarray(tree[key]).tobytes() == expected.tobytes()
    for other in (1, 2, 4):
        outcomes = run_processes(restore_tree, other, devices=devices, arguments=(str(path),))
        assert [outcome.error_text for outcome in outcomes] == [""] * other
