"""Copies on the devices: what ``staging="device"`` does that ``"pinned"`` does not, and when there is room for it.

That such a snapshot cannot be disturbed is shown in test_snapshot.py, with the other ways.
"""

from __future__ import annotations

import dataclasses
import pathlib
import threading
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

import jaxckpt
from jaxckpt._layout import plan_writes
from jaxckpt._leaves import inspect_leaves
from jaxckpt._snapshot import choose_staging, take_snapshot
from jaxckpt._staging import DEVICE_MEMORY, PINNED_MEMORY, DeviceMemory, SnapshotGivenUpError
from jaxckpt._viewing import copies_on_device

from .helpers import assert_same_tree, make_mesh, run_fork
from .test_commit import WatchedStore
from .test_pending import Gate, assert_nothing_is_left, save_through

MIB = 1 << 20
LITTLE = 2 * MIB  # half of it is for pinned memory: of the trees here, a part


def make_tree(leaves: int = 8) -> dict[str, jax.Array]:
    """Leaves of 1 MiB each."""
    return {str(number): jnp.full((256, 1024), number, jnp.float32) for number in range(leaves)}


def live_buffers() -> dict[int, jax.Array]:
    """What is in device memory and looks like a leaf of `make_tree`, by its address: an array has several handles."""
    kind = jax.devices()[0].default_memory().kind
    return {
        array.unsafe_buffer_pointer(): array
        for array in jax.live_arrays()
        if array.shape == (256, 1024) and array.sharding.memory_kind == kind and not array.is_deleted()
    }


# --- the caller -----------------------------------------------------------------------------------------------


def test_save_async_waits_for_no_room_on_the_host(path: pathlib.Path) -> None:
    """Storage takes nothing, and the host has room for an eighth of the tree."""
    gate = Gate()
    tree = make_tree()
    want = jax.tree.map(np.array, tree)
    pending = save_through(gate, path, tree, staging="device", host_bytes_max=LITTLE)
    for leaf in tree.values():
        leaf.delete()
    assert not pending.done()
    gate.open.set()
    pending.wait(60)
    for key, leaf in jaxckpt.restore(path).items():
        np.testing.assert_array_equal(leaf, want[key])
    assert DEVICE_MEMORY.bytes_in_use == 0


def test_copies_are_given_up_as_they_go(path: pathlib.Path) -> None:
    counts: list[int] = []

    def count(what: str, _name: str) -> None:
        if what == "write":
            counts.append(len(live_buffers()))

    tree = make_tree(16)
    before = len(live_buffers()) - len(tree)
    pending = save_through(
        count, path, tree, staging="device", host_bytes_max=LITTLE, io_threads=1, pack_bytes_max=0
    )
    for leaf in tree.values():
        leaf.delete()
    pending.wait(60)
    assert len(counts) == 16
    assert max(counts) - before >= 12
    assert min(counts) - before <= 2
    assert len(live_buffers()) == before


def test_leaves_in_host_memory_are_staged_in_the_call(path: pathlib.Path) -> None:
    """They are between leaves on devices, and with little memory each waits for those before it."""
    offloaded = SingleDeviceSharding(jax.devices()[0], memory_kind="pinned_host")
    tree: dict[str, Any] = {}
    for number in range(4):
        tree[f"{number}-device"] = jnp.full((256, 1024), number, jnp.float32)
        tree[f"{number}-numpy"] = np.full((256, 1024), number + 0.25, np.float32)
        tree[f"{number}-offloaded"] = jax.device_put(jnp.full((256, 1024), number + 0.5), offloaded)
    want = {key: np.array(leaf) for key, leaf in tree.items()}
    options = jaxckpt.SaveOptions(staging="device", host_bytes_max=LITTLE)
    pending = jaxckpt.save_async(path, tree, options=options)
    for leaf in tree.values():
        if isinstance(leaf, np.ndarray):
            leaf[...] = -1
        else:
            leaf.delete()
    pending.wait(60)
    for key, leaf in jaxckpt.restore(path).items():
        np.testing.assert_array_equal(leaf, want[key])


def test_shards_are_copied_in_memory_of_their_own() -> None:
    mesh = make_mesh({"x": 4})
    leaf = jax.device_put(jnp.arange(64.0).reshape(8, 8), NamedSharding(mesh, PartitionSpec("x")))
    shards = [leaf.addressable_data(2), leaf.addressable_data(2).astype(jnp.bfloat16)]
    with jax.set_mesh(mesh), jax.transfer_guard("disallow"):
        copies = copies_on_device(shards * 700, mesh.devices[2])
    assert len(copies) == 1400
    addresses = {array.unsafe_buffer_pointer() for array in [*shards, *copies]}
    assert len(addresses) == 1402
    for shard, copy in zip(shards * 700, copies, strict=True):
        assert copy.devices() == shard.devices()
        np.testing.assert_array_equal(copy, shard, strict=True)


# --- room -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(eq=False)
class FakeDevice:
    """A device that reports its memory as told."""

    limit: int = 160
    in_use: int = 0
    peak: int = 0

    def memory_stats(self) -> dict[str, int] | None:
        return {"bytes_limit": self.limit, "bytes_in_use": self.in_use, "peak_bytes_in_use": self.peak}


class SilentDevice:
    def memory_stats(self) -> None:
        return None


def test_there_is_room_beside_the_peak_and_a_margin() -> None:
    device = FakeDevice(limit=160, in_use=20, peak=50)
    memory = DeviceMemory()
    assert memory.has_room({device: 100})  # the margin is 10
    assert not memory.has_room({device: 101})
    assert not memory.has_room({device: 1, FakeDevice(peak=160): 1})
    assert memory.has_room({})


def test_a_device_that_does_not_say_has_no_room() -> None:
    assert not DeviceMemory().has_room({SilentDevice(): 0})


def test_copies_do_not_count_as_what_training_takes() -> None:
    device = FakeDevice(peak=50, in_use=20)
    memory = DeviceMemory()
    for _ in range(5):
        assert memory.has_room({device: 70})
        memory.add({device: 70})
        device.peak = 120  # a step beside the copy
        assert not memory.has_room({device: 70})  # while the first copy is there
        assert memory.has_room({device: 30})
        memory.remove({device: 70})
        assert memory.bytes_in_use == 0


def test_what_training_took_before_the_first_copy_is_remembered() -> None:
    device = FakeDevice(peak=100, in_use=20)
    memory = DeviceMemory()
    assert memory.has_room({device: 50})
    memory.add({device: 50})  # no step was beside it: the peak is as before
    memory.remove({device: 50})
    assert not memory.has_room({device: 51})


def test_what_training_takes_more_is_seen() -> None:
    device = FakeDevice(peak=20, in_use=20)
    memory = DeviceMemory()
    assert memory.has_room({device: 100})
    memory.add({device: 100})
    memory.remove({device: 100})
    device.peak = 150  # which leaves 50 beside the copy, as good as before
    assert memory.has_room({device: 100})
    device.peak = 151
    assert not memory.has_room({device: 100})


def test_what_is_in_use_between_steps_is_seen() -> None:
    device = FakeDevice(peak=20, in_use=20)
    memory = DeviceMemory()
    memory.add({device: 100})
    memory.remove({device: 100})
    device.in_use = device.peak = 80  # training has grown, but by less than a copy took
    assert not memory.has_room({device: 100})


@pytest.mark.slow
def test_refused_device_memory_leaves_the_save_whole(path: pathlib.Path) -> None:
    """The address space of a program is bounded: it can take the state once more, but not for the copy."""
    program = """
    import logging, resource, sys
    import jax, jax.numpy as jnp, jaxckpt
    from jaxckpt._staging import DEVICE_MEMORY
    said = []
    class Listener(logging.Handler):
        def emit(self, record):
            said.append(record.getMessage())
    logging.getLogger("jaxckpt").addHandler(Listener())
    options = jaxckpt.SaveOptions(staging="device", host_bytes_max=2 << 20)
    small = {str(number): jnp.full((1 << 20,), 0.0) for number in range(2)}
    jaxckpt.save_async(sys.argv[1] + "-small", small, options=options).wait(60)
    assert not [line for line in said if "no room" in line]
    tree = {str(number): jax.block_until_ready(jnp.full((1 << 24,), float(number))) for number in range(2)}
    taken = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (taken + (60 << 20), hard))
    pending = jaxckpt.save_async(sys.argv[1], tree, options=options)
    for leaf in tree.values():
        leaf.delete()
    pending.wait(60)
    assert [line for line in said if "no room" in line], said
    assert DEVICE_MEMORY.bytes_in_use == 0
    resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
    restored = jaxckpt.restore(sys.argv[1])
    assert all(bool((restored[key] == float(key)).all()) for key in ("0", "1"))
    """
    run_fork(program, path, timeout_s=60)


def test_the_choice_of_a_way() -> None:
    leaves = inspect_leaves(["a"], [jnp.ones(3)])
    assert choose_staging(leaves, "auto", is_blocking=False) == "pool"
    assert choose_staging(leaves, "pool", is_blocking=True) == "pool"
    assert choose_staging(leaves, "pinned", is_blocking=True) == "pinned"
    assert choose_staging(leaves, "device", is_blocking=False) == "device"
    assert choose_staging(leaves, "device", is_blocking=True) == "pinned"


def test_where_devices_do_not_report_their_memory_nothing_is_copied_unasked(path: pathlib.Path) -> None:
    """As on accelerators whose allocator keeps no count; CPU devices are such ones, too."""
    tree = make_tree(2)
    leaves = inspect_leaves(tuple(tree), tuple(tree.values()))
    plan = plan_writes(leaves.kinds.extents, chunk_bytes_max=MIB, pack_bytes_max=0, piece_bytes=MIB)
    snapshot = take_snapshot("device if room", leaves, plan, 64 * MIB, MIB)
    before = len(live_buffers())
    snapshot.stage(lambda *_: None)
    assert len(live_buffers()) == before
    snapshot.give_up()
    with pytest.raises(SnapshotGivenUpError):
        snapshot.drain(lambda *_: None)
    assert PINNED_MEMORY.bytes_in_use == 0


def test_a_blocking_save_copies_nothing_on_the_devices(path: pathlib.Path) -> None:
    counts: list[int] = []

    def count(what: str, _name: str) -> None:
        if what == "write":
            counts.append(len(live_buffers()))

    tree = make_tree(4)
    before = len(live_buffers())
    options = jaxckpt.SaveOptions(staging="device", pack_bytes_max=0)
    jaxckpt.save(WatchedStore(path, count), tree, options=options)  # type: ignore[arg-type]
    assert counts == [before] * 4
    assert_same_tree(jaxckpt.restore(path), tree)


# --- failures -------------------------------------------------------------------------------------------------


def test_a_transfer_that_fails_in_the_background_fails_the_save(path: pathlib.Path) -> None:
    """The copies wait for room on the host, and are gone when there is some."""
    tree = make_tree()
    held = MIB
    PINNED_MEMORY.reserve(held, MIB)
    try:
        before = live_buffers()
        options = jaxckpt.SaveOptions(staging="device", host_bytes_max=LITTLE)
        pending = jaxckpt.save_async(path, tree, options=options)
        copies = {address: array for address, array in live_buffers().items() if address not in before}
        assert len(copies) == len(tree)
        for copy in copies.values():
            copy.delete()
    finally:
        PINNED_MEMORY.release(held)
    with pytest.raises(RuntimeError, match="deleted"):
        pending.wait(60)
    assert_nothing_is_left(path)
    assert DEVICE_MEMORY.bytes_in_use == 0


def test_storage_that_fails_ends_the_transfers(path: pathlib.Path) -> None:
    may_fail = threading.Event()

    def tell(what: str, _name: str) -> None:
        if what == "write":
            assert may_fail.wait(60)
            raise OSError(28, "No space left on device")

    pending = save_through(tell, path, make_tree(), staging="device", host_bytes_max=LITTLE)
    assert DEVICE_MEMORY.bytes_in_use == 8 * MIB
    may_fail.set()
    with pytest.raises(jaxckpt.WriteError):
        pending.wait(60)
    assert_nothing_is_left(path)
    assert DEVICE_MEMORY.bytes_in_use == 0
