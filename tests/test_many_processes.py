"""Several real processes save one tree and restore it, on as many processes as there happen to be."""

from __future__ import annotations

import errno
import pathlib
import threading
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P

import jaxckpt
from jaxckpt._staging import HOST_MEMORY
from jaxckpt._store import Kernel, LocalStore

from .processes import Worker, run_processes
from .storage_faults import GateKernel, RefusingKernel

pytestmark = pytest.mark.slow

OPTIONS = jaxckpt.SaveOptions(pack_bytes_max=1 << 16, timeout_s=30)


def global_mesh(columns: int = 1) -> Mesh:
    devices = np.array(jax.devices(), dtype=object)
    return Mesh(devices.reshape(-1, columns), ("x", "y"), axis_types=(AxisType.Auto, AxisType.Auto))


def values(shape: tuple[int, ...], start: int = 0) -> np.ndarray[Any, Any]:
    return np.arange(start, start + int(np.prod(shape)), dtype=np.float32).reshape(shape)


def place(array: np.ndarray[Any, Any], mesh: Mesh, spec: P) -> jax.Array:
    return jax.make_array_from_callback(
        array.shape, NamedSharding(mesh, spec), lambda index: array[index], dtype=array.dtype
    )


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


@pytest.mark.parametrize(("count", "devices"), [(2, 2), (4, 1)])
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


# --- what each process has for itself -------------------------------------------------------------------------


class Position:
    """A data iterator, as far as a checkpoint knows it."""

    def __init__(self, at: int) -> None:
        self.at = at

    def get_state(self) -> int:
        return self.at

    def set_state(self, state: int) -> None:
        self.at = state


def own_tree(index: int, mesh: Mesh) -> dict[str, Any]:
    return {
        "key": jax.random.key(index),
        "seed": 100 + index,
        "table": values((4, 3), index),
        "same": values((6,)),
        "local": jax.device_put(values((3, 2), 10 * index), jax.local_devices()[-1]),
        "rows": place(values((64, 96)), mesh, P("x")),
    }


def save_own(worker: Worker, path: str) -> None:
    index = worker.index
    tree = own_tree(index, global_mesh())
    items = {"data": Position(index * 11), "name": f"process {index}"}
    pending = jaxckpt.save_async(path, tree, items=items, options=OPTIONS)
    tree["table"][:] = -1
    pending.wait()


def restore_own(worker: Worker, path: str, saved_by: int) -> None:
    mesh = global_mesh()
    index = worker.index if worker.index < saved_by else 0
    want = own_tree(index, mesh)
    position = Position(-1)
    tree = jaxckpt.restore(path, own_tree(99, mesh), items={"data": position})
    assert tree["seed"] == 100 + index
    np.testing.assert_array_equal(tree["table"], want["table"])
    np.testing.assert_array_equal(tree["same"], want["same"])
    np.testing.assert_array_equal(np.asarray(tree["local"]), np.asarray(want["local"]))
    np.testing.assert_array_equal(jax.random.key_data(tree["key"]), jax.random.key_data(want["key"]))
    assert position.at == index * 11
    assert jaxckpt.open(path).items["name"] == f"process {index}"


def test_each_process_gets_back_what_it_had_for_itself(path: pathlib.Path) -> None:
    check(run_processes(save_own, 4, arguments=(str(path),)))
    for count in (4, 2, 8):
        check(run_processes(restore_own, count, arguments=(str(path), 4)))
    assert jaxckpt.verify(path).ok
    assert jaxckpt.restore(path)["seed"] == 100


def check(outcomes: list[Any]) -> list[Any]:
    """All returned; what they returned."""
    assert [outcome.error_text for outcome in outcomes] == [""] * len(outcomes)
    assert [outcome.status for outcome in outcomes] == ["returned"] * len(outcomes)
    return [outcome.value for outcome in outcomes]


def restore_on_hosts(worker: Worker, path: str) -> None:
    """What wants no array that spans processes, so that the processes need not do it together."""
    index = worker.index
    want = own_tree(index, global_mesh())
    like = {key: leaf for key, leaf in own_tree(99, global_mesh()).items() if key != "rows"}
    tree = jaxckpt.restore(path, like, unexpected="ignore")
    assert tree["seed"] == 100 + index
    np.testing.assert_array_equal(tree["table"], want["table"])
    np.testing.assert_array_equal(np.asarray(tree["local"]), np.asarray(want["local"]))
    np.testing.assert_array_equal(jax.random.key_data(tree["key"]), jax.random.key_data(want["key"]))


def test_what_a_process_had_for_itself_comes_back_without_the_others_too(path: pathlib.Path) -> None:
    check(run_processes(save_own, 4, arguments=(str(path),)))
    check(run_processes(restore_on_hosts, 4, arguments=(str(path),)))


def large_own_tree(index: int, *, is_different: bool, is_on_device: bool) -> dict[str, Any]:
    large = np.full((3 << 10, 1 << 12), 7, np.float32)
    large[-1, -1] = index if is_different else 7
    return {
        "a large one": jax.device_put(large, jax.local_devices()[0]) if is_on_device else large,
        "next": values((4, 3), index),
    }


def save_large_own(worker: Worker, path: str, is_on_device: bool) -> None:
    same = large_own_tree(worker.index, is_different=False, is_on_device=is_on_device)
    jaxckpt.save(path, same, options=OPTIONS)
    tree = jaxckpt.restore(path, large_own_tree(9, is_different=False, is_on_device=is_on_device))
    np.testing.assert_array_equal(tree["next"], values((4, 3), worker.index))
    different = large_own_tree(worker.index, is_different=True, is_on_device=is_on_device)
    with pytest.raises(jaxckpt.CoordinationError, match="a large one: has another value here"):
        jaxckpt.save(f"{path}-2", different, options=OPTIONS)


@pytest.mark.parametrize("is_on_device", [False, True])
def test_a_large_leaf_may_not_differ_and_takes_no_room_from_those_that_do(
    path: pathlib.Path, is_on_device: bool
) -> None:
    check(run_processes(save_large_own, 2, arguments=(str(path), is_on_device)))
    assert not pathlib.Path(f"{path}-2", "manifest.msgpack").exists()


# --- on devices of some processes -----------------------------------------------------------------------------


def stages() -> dict[str, jax.Array]:
    """A leaf for each process, on its devices alone, as in a pipeline."""
    devices = np.array(jax.devices(), dtype=object).reshape(jax.process_count(), -1)
    return {
        f"stage{number}": place(values((8, 4), number), Mesh(row, ("x",)), P("x" if number % 2 else None))
        for number, row in enumerate(devices)
    }


def assert_stages_are_equal(got: dict[str, jax.Array], want: dict[str, jax.Array]) -> None:
    assert got.keys() == want.keys()
    for key, leaf in want.items():
        assert got[key].sharding == leaf.sharding
        assert addressable_bytes(got[key]) == addressable_bytes(leaf)


def save_stages(worker: Worker, path: str) -> None:
    want = stages()
    jaxckpt.save(path, want, options=OPTIONS)
    options = jaxckpt.RestoreOptions(timeout_s=10)
    assert_stages_are_equal(jaxckpt.restore(path, options=options), want)
    assert_stages_are_equal(jaxckpt.restore(path, want, options=options), want)
    # Nothing that spans processes: nobody waits for anybody, whoever has the devices.
    one = {"stage1": want["stage1"]}
    assert_stages_are_equal(jaxckpt.restore(path, one, unexpected="ignore", options=options), one)
    sharding: Any = one["stage1"].sharding
    tree = jaxckpt.restore(path, select="stage1", mesh=sharding.mesh, options=options)
    assert_stages_are_equal(tree, one)
    assert_stages_are_equal(jaxckpt.restore(path, want, options=options), want)


@pytest.mark.parametrize("devices", [1, 2])
def test_leaves_may_be_on_devices_of_one_process_each(path: pathlib.Path, devices: int) -> None:
    check(run_processes(save_stages, 3, devices=devices, arguments=(str(path),)))


def restore_as_saved(worker: Worker, path: str) -> None:
    tree = jaxckpt.restore(path)
    for key, expected in EXPECTED.items():
        for shard in tree[key].addressable_shards:
            assert np.asarray(shard.data).tobytes() == np.ascontiguousarray(expected[shard.index]).tobytes()


def test_more_processes_than_those_that_saved_restore_as_it_was(path: pathlib.Path) -> None:
    check(run_processes(save_tree, 2, arguments=(str(path),)))
    check(run_processes(restore_as_saved, 4, arguments=(str(path),)))


def restore_like_eval_shape(worker: Worker, path: str) -> None:
    mesh = jax.make_mesh((len(jax.devices()),), ("x",), axis_types=(AxisType.Explicit,))
    tree = {"rows": place(values((16, 3)), mesh, P("x", None))}
    jaxckpt.save(path, tree, options=OPTIONS)
    with jax.set_mesh(mesh):
        like = jax.eval_shape(lambda: {"rows": jax.sharding.reshard(jax.numpy.zeros((16, 3)), P("x", None))})
    got = jaxckpt.restore(path, like)["rows"]
    assert got.sharding == tree["rows"].sharding
    assert addressable_bytes(got) == addressable_bytes(tree["rows"])


def test_a_like_on_an_abstract_mesh_gets_the_devices_of_all_processes(path: pathlib.Path) -> None:
    check(run_processes(restore_like_eval_shape, 2, arguments=(str(path),)))


# --- without shared storage -----------------------------------------------------------------------------------


def save_local(worker: Worker, path: str) -> None:
    jaxckpt.save(path, make_tree(global_mesh()), local=True, options=OPTIONS)


def restore_local(worker: Worker, path: str) -> None:
    mesh = global_mesh()
    assert_tree_is_right(jaxckpt.restore(path), mesh)
    assert_tree_is_right(jaxckpt.restore(path, mesh=mesh), mesh)


@pytest.mark.parametrize("devices", [1, 2])
def test_each_process_keeps_its_own_shards_where_there_is_no_shared_storage(
    path: pathlib.Path, devices: int
) -> None:
    check(run_processes(save_local, 4, devices=devices, arguments=(str(path),)))
    assert sorted(entry.name for entry in path.iterdir()) == [f"process-{index}" for index in range(4)]
    check(run_processes(restore_local, 4, devices=devices, arguments=(str(path),)))
    for index in range(4):
        assert jaxckpt.verify(path / f"process-{index}").ok
    outcomes = run_processes(restore_local, 2, devices=devices, arguments=(str(path),))
    for outcome in outcomes:
        assert isinstance(outcome.error, jaxckpt.MismatchError)
        assert "restore with 4 processes on the same mesh" in str(outcome.error)


# --- who writes and reads how much ----------------------------------------------------------------------------


def mixed_tree(columns: int) -> dict[str, Any]:
    mesh = global_mesh(columns)
    first = Mesh(np.array(jax.devices()[: len(jax.devices()) // 2], dtype=object), ("x",))
    return {
        "both axes": place(values((64, 640), 1), mesh, P("x", "y")),
        "partly replicated": place(values((64, 4096), 2), mesh, P("y")),
        "replicated": place(values((1024, 1024), 3), mesh, P()),
        "a tuple of axes": place(values((256, 1030), 4), mesh, P(("y", "x"))),
        "half of the processes": place(values((16, 1000), 5), first, P("x")),
        "small": [place(values((7, number + 1), number), mesh, P()) for number in range(40)],
        "key": jax.random.wrap_key_data(
            place(values((8, 2)).astype(np.uint32), mesh, P("x" if columns == 1 else None))
        ),
        "empty": place(values((8, 0)), mesh, P("x")),
        "scalar": place(np.float32(3.5), mesh, P()),
    }


MIXED = {
    "both axes": values((64, 640), 1),
    "partly replicated": values((64, 4096), 2),
    "replicated": values((1024, 1024), 3),
    "a tuple of axes": values((256, 1030), 4),
    "half of the processes": values((16, 1000), 5),
}


def key_data(leaf: jax.Array) -> jax.Array:
    is_key = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return jax.random.key_data(leaf) if is_key else leaf


def save_mixed(worker: Worker, path: str, columns: int) -> tuple[int, int]:
    pending = jaxckpt.save_async(path, mixed_tree(columns), options=OPTIONS)
    info = pending.wait(30)
    return info.bytes_written, info.nbytes


def restore_mixed(worker: Worker, path: str, columns: int) -> tuple[int, int]:
    like = mixed_tree(columns)
    tree, report = jaxckpt.restore(path, like, exchange=False, report=True)
    for got, want in zip(
        map(key_data, jax.tree.leaves(tree)), map(key_data, jax.tree.leaves(like)), strict=True
    ):
        assert got.sharding == want.sharding
        assert addressable_bytes(got) == addressable_bytes(want)
    return report.nbytes, report.group_bytes_read


@pytest.mark.parametrize(("count", "devices", "columns"), [(2, 2, 2), (4, 1, 1), (8, 1, 2)])
def test_all_kinds_of_shardings_are_written_once_by_all_alike(
    path: pathlib.Path, count: int, devices: int, columns: int
) -> None:
    written = check(run_processes(save_mixed, count, devices=devices, arguments=(str(path), columns)))
    total = sum(entry.stat().st_size for entry in path.rglob("*") if entry.is_file())
    nbytes = written[0][1]
    assert nbytes <= total <= 1.02 * nbytes
    by_process = [bytes_written for bytes_written, _ in written]
    assert max(by_process) <= 1.2 * sum(by_process) / count
    assert jaxckpt.verify(path).ok
    tree = jaxckpt.restore(path)
    for key, expected in MIXED.items():
        assert np.asarray(tree[key]).tobytes() == expected.tobytes()
    check(run_processes(restore_mixed, count, devices=devices, arguments=(str(path), columns)))
    check(run_processes(restore_mixed, 2, devices=4, arguments=(str(path), columns)))


def save_rows(worker: Worker, path: str) -> None:
    mesh = global_mesh()
    tree = {str(number): place(values((1024, 1024), number), mesh, P("x")) for number in range(4)}
    jaxckpt.save(path, tree, options=OPTIONS)


def restore_rows(worker: Worker, path: str) -> tuple[int, int, int]:
    _, report = jaxckpt.restore(path, mesh=global_mesh(), report=True)
    return report.nbytes, report.bytes_read, report.group_bytes_read


def test_a_process_reads_what_its_devices_need(path: pathlib.Path) -> None:
    check(run_processes(save_rows, 4, arguments=(str(path),)))
    for count in (1, 2, 8):
        reports = check(run_processes(restore_rows, count, arguments=(str(path),)))
        nbytes = reports[0][0]
        assert sum(read for _, read, _ in reports) <= 1.1 * nbytes
        assert {group for _, _, group in reports} == {sum(read for _, read, _ in reports)}


def save_staged(worker: Worker, path: str, staging: Any) -> None:
    options = jaxckpt.SaveOptions(staging=staging, host_bytes_max=1 << 23, pack_bytes_max=1 << 16)
    jaxckpt.save_async(path, mixed_tree(1), options=options).wait()


@pytest.mark.parametrize("staging", ["pinned", "device"])
def test_only_the_owned_part_of_a_replicated_shard_passes_through_staging(
    path: pathlib.Path, staging: str
) -> None:
    check(run_processes(save_staged, 4, arguments=(str(path), staging)))
    assert jaxckpt.verify(path).ok
    tree = jaxckpt.restore(path)
    for key, expected in MIXED.items():
        assert np.asarray(tree[key]).tobytes() == expected.tobytes()


def overwrite_local(worker: Worker, path: str, refused_by: int | None) -> str:
    kernel = Kernel()
    if worker.index == refused_by:
        kernel = RefusingKernel(errno.EIO, ("rename",), where="manifest.msgpack")
    tree = {"rows": place(values((64, 96), 1), global_mesh(), P("x"))}
    try:
        jaxckpt.save(LocalStore(path, kernel), tree, overwrite=True, local=True, options=OPTIONS)
    except jaxckpt.CoordinationError as error:
        return str(error)
    return ""


def restored_start(worker: Worker, path: str) -> float:
    rows = jaxckpt.restore(path)["rows"]
    return (
        min(float(np.asarray(shard.data).min()) for shard in rows.addressable_shards) - 16 * 96 * worker.index
    )


def test_processes_with_their_own_directories_all_have_the_new_checkpoint_or_all_the_old_one(
    path: pathlib.Path,
) -> None:
    check(run_processes(save_local, 4, arguments=(str(path),)))
    for refused_by in (0, 2):
        messages = check(run_processes(overwrite_local, 4, arguments=(str(path), refused_by)))
        assert all(f"process {refused_by} of 4 failed" in message for message in messages)
        assert check(run_processes(restored_start, 4, arguments=(str(path),))) == [0] * 4
    assert check(run_processes(overwrite_local, 4, arguments=(str(path), None))) == [""] * 4
    assert check(run_processes(restored_start, 4, arguments=(str(path),))) == [1] * 4
    for index in range(4):
        assert len(list((path / f"process-{index}").glob("data-*"))) == 1


# --- the machine's memory -------------------------------------------------------------------------------------


def stage_behind_a_gate(worker: Worker, path: str, host_bytes_max: int) -> tuple[bool, int]:
    """While nothing is written: whether the snapshot waits for room, and how much is staged in this process."""
    kernel = GateKernel(lambda operation: operation.call == "pwrite" and "/packs/" in operation.path)
    options = jaxckpt.SaveOptions(host_bytes_max=host_bytes_max, io_threads=1, timeout_s=30)
    tree = {str(number): place(values((64, 1 << 14), number), global_mesh(), P("x")) for number in range(16)}
    pending: list[jaxckpt.PendingSave] = []

    def save() -> None:
        pending.append(jaxckpt.save_async(LocalStore(path, kernel), tree, options=options))

    thread = threading.Thread(target=save)
    thread.start()
    assert kernel.reached.wait(30)
    thread.join(1)
    found = thread.is_alive(), HOST_MEMORY.bytes_in_use
    kernel.may_go_on.set()
    thread.join()
    pending[0].wait()
    return found


def test_processes_on_one_machine_share_its_staging_memory(path: pathlib.Path) -> None:
    """Each has 16 MiB to save: all of it fits into the memory of one, and not into a quarter of that."""
    found = check(run_processes(stage_behind_a_gate, 4, arguments=(str(path), 32 << 20)))
    assert [is_waiting for is_waiting, _ in found] == [True] * 4
    assert all(staged <= 8 << 20 for _, staged in found)
    assert sum(staged for _, staged in found) > 16 << 20
    assert jaxckpt.verify(path).ok


# --- no collectives on the way of a save ----------------------------------------------------------------------


def save_while_a_collective_waits(worker: Worker, path: str, blocking: bool) -> None:
    """The other processes are in a collective that process 0 joins only when the save is durable."""
    rows = place(values((64, 96)), global_mesh(), P("x"))
    total = jax.jit(lambda array: array.sum())
    total(rows).block_until_ready()
    tree = {"rows": rows, "own": np.full(4, worker.index), "step": worker.index}
    waiting = total(rows) if worker.index else None
    if blocking:
        jaxckpt.save(path, tree, options=OPTIONS)
    else:
        jaxckpt.save_async(path, tree, options=OPTIONS).wait()
    waiting = total(rows) if waiting is None else waiting
    assert np.isclose(float(waiting), values((64, 96)).sum())


@pytest.mark.parametrize("blocking", [True, False])
def test_a_save_needs_no_device_collective(path: pathlib.Path, blocking: bool) -> None:
    check(run_processes(save_while_a_collective_waits, 4, arguments=(str(path), blocking)))
    assert jaxckpt.verify(path).ok
