"""What only an accelerator can show: the asynchronous copies on the device and to pinned host memory, and the way back.

Skipped where there is none. Sizes are such that a copy takes longer than launching the next step.
"""

from __future__ import annotations

import functools
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxckpt
from jaxckpt._staging import DEVICE_MEMORY, HOST_MEMORY, PINNED_MEMORY

from .helpers import assert_same_tree, run_program
from .test_pending import Gate, save_through

pytestmark = pytest.mark.skipif(jax.default_backend() == "cpu", reason="needs an accelerator")

MIB = 1 << 20
WAYS = ("auto", "pinned", "device")


def make_state(value: float, mebibytes: int = 256) -> dict[str, jax.Array]:
    rows = mebibytes * MIB // 4096 // 4
    return {
        "float32": jnp.full((rows, 1024), value, jnp.float32),
        "bfloat16": jnp.full((rows, 2048), value, jnp.bfloat16),
        "int32": jnp.full((rows, 1024), value, jnp.int32),
        "small": jnp.full((7,), value, jnp.float16),
    }


@functools.partial(jax.jit, donate_argnums=0)
def add_one(state: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return jax.tree.map(lambda leaf: leaf + jnp.asarray(1, leaf.dtype), state)


@functools.partial(jax.jit, donate_argnums=0, static_argnums=1)
def long_step(state: dict[str, jax.Array], rounds: int) -> dict[str, jax.Array]:
    matrix = jnp.ones((8192, 8192), jnp.bfloat16) * 1e-4
    for _ in range(rounds):
        matrix = jnp.tanh(matrix @ matrix)
    return jax.tree.map(
        lambda leaf: leaf + jnp.asarray(1, leaf.dtype) + 0 * matrix[0, 0].astype(leaf.dtype), state
    )


def test_round_trip_of_every_dtype(path: pathlib.Path) -> None:
    tree = {
        name: jnp.asarray(np.arange(-4, 4) % 2, name)
        for name in (
            "bool",
            "int8",
            "uint32",
            "float16",
            "bfloat16",
            "float32",
            "complex64",
            "float8_e4m3fn",
            "int4",
        )
    }
    tree["key"] = jax.random.key(3)
    jaxckpt.save(path, tree)
    assert_same_tree(jaxckpt.restore(path), tree)


@pytest.mark.parametrize("host_bytes_max", [None, 64 * MIB])
@pytest.mark.parametrize("staging", WAYS)
def test_donating_steps_do_not_disturb_the_snapshot(
    tmp_path: pathlib.Path, staging: Any, host_bytes_max: int | None
) -> None:
    options = jaxckpt.SaveOptions(staging=staging, host_bytes_max=host_bytes_max)
    state = add_one(make_state(0.0))
    pending = []
    for step in range(4):
        pending.append(jaxckpt.save_async(tmp_path / str(step), state, options=options))
        state = add_one(add_one(state))
    for step, save in enumerate(pending):
        save.wait(120)
        restored = jaxckpt.restore(tmp_path / str(step))
        for key, leaf in restored.items():
            assert bool(jnp.all(leaf == 1 + 2 * step)), f"step {step}, {key}"
    assert HOST_MEMORY.bytes_in_use == 0
    assert PINNED_MEMORY.bytes_in_use == 0
    assert DEVICE_MEMORY.bytes_in_use == 0


@pytest.mark.parametrize("staging", WAYS)
def test_save_async_does_not_wait_for_the_step_in_flight(tmp_path: pathlib.Path, staging: Any) -> None:
    options = jaxckpt.SaveOptions(staging=staging)
    rounds = 600  # about half a second on a large GPU
    state = long_step(make_state(0.0, 64), rounds)
    jaxckpt.save_async(tmp_path / "warm-up", state, options=options).wait(120)
    state = long_step(state, rounds)
    pending = jaxckpt.save_async(tmp_path / "measured", state, options=options)
    was_ready = state["float32"].is_ready()
    state = add_one(state)
    pending.wait(120)
    assert not was_ready, "the step was over before save_async returned"
    restored = jaxckpt.restore(tmp_path / "measured")
    assert bool(jnp.all(restored["float32"] == 2))


def test_the_default_copies_on_the_device_where_there_is_room(path: pathlib.Path) -> None:
    """Neither room on the host nor storage is waited for."""
    gate = Gate()
    state = make_state(1.0)
    pending = save_through(gate, path, state, host_bytes_max=64 * MIB)
    assert DEVICE_MEMORY.bytes_in_use > 512 * MIB
    state = add_one(state)
    gate.open.set()
    pending.wait(120)
    assert bool(jnp.all(jaxckpt.restore(path)["float32"] == 1))
    assert DEVICE_MEMORY.bytes_in_use == 0


@pytest.mark.parametrize("staging", ["auto", "device"])
def test_without_room_on_the_device_the_save_is_whole_too(path: pathlib.Path, staging: Any) -> None:
    """All but half of what a copy takes is filled, as far as the device says how much it has."""
    state = jax.block_until_ready(make_state(1.0))
    stats = jax.devices()[0].memory_stats() or {}
    if "bytes_limit" not in stats:
        pytest.skip("the device does not report its memory")
    free = stats["bytes_limit"] - stats["bytes_in_use"]
    nbytes = sum(leaf.nbytes for leaf in state.values())
    filling = [jnp.zeros(64 * MIB, jnp.uint8) for _ in range((free - nbytes // 2) // (64 * MIB))]
    jaxckpt.save_async(path, state, options=jaxckpt.SaveOptions(staging=staging)).wait(120)
    assert DEVICE_MEMORY.bytes_in_use == 0
    del filling
    assert_same_tree(jaxckpt.restore(path), state)


def test_restored_arrays_can_be_donated(path: pathlib.Path) -> None:
    jaxckpt.save(path, make_state(1.0))
    restored = jaxckpt.restore(path)
    after = add_one(restored)
    assert bool(jnp.all(after["float32"] == 2))
    assert restored["float32"].is_deleted()


def test_leaves_larger_than_the_host_memory_bound_come_back(path: pathlib.Path) -> None:
    tree = {"large": jnp.arange(64 * MIB, dtype=jnp.int32), "small": jnp.ones(3)}
    jaxckpt.save(path, tree, options=jaxckpt.SaveOptions(host_bytes_max=32 * MIB))
    restored = jaxckpt.restore(path, options=jaxckpt.RestoreOptions(host_bytes_max=32 * MIB))
    assert_same_tree(restored, tree)


def test_leaves_of_many_waves_come_back(path: pathlib.Path) -> None:
    tree = {str(number): jnp.arange(number, number + 4 * MIB, dtype=jnp.int32) for number in range(12)}
    jaxckpt.save(path, tree)
    for host_bytes_max in (20 * MIB, 64 * MIB, None):
        options = jaxckpt.RestoreOptions(host_bytes_max=host_bytes_max)
        assert_same_tree(jaxckpt.restore(path, options=options), tree)


def test_a_save_of_the_accelerator_restores_on_cpu(path: pathlib.Path) -> None:
    jaxckpt.save(path, make_state(3.0, 4))
    run_program(
        """
        import sys
        import jax, jaxckpt
        restored = jaxckpt.restore(sys.argv[1])
        assert all(leaf.devices() == {jax.devices("cpu")[0]} for leaf in restored.values())
        assert all(bool((leaf == 3).all()) for leaf in restored.values())
        """,
        path,
    )


def test_pinned_host_arrays_come_back_to_pinned_host(path: pathlib.Path) -> None:
    pinned = jax.sharding.SingleDeviceSharding(jax.devices()[0], memory_kind="pinned_host")
    tree = {"offloaded": jax.device_put(jnp.arange(1024.0), pinned)}
    jaxckpt.save(path, tree)
    restored = jaxckpt.restore(path)
    assert restored["offloaded"].sharding.memory_kind == "pinned_host"
    assert_same_tree(restored, tree)


def test_blocked_time_is_a_small_part_of_the_save(tmp_path: pathlib.Path) -> None:
    state = add_one(make_state(0.0, 512))
    jaxckpt.save_async(tmp_path / "warm-up", state).wait(120)
    state = jax.block_until_ready(add_one(state))
    began_s = time.perf_counter()
    pending = jaxckpt.save_async(tmp_path / "measured", state)
    blocked_s = time.perf_counter() - began_s
    info = pending.wait(120)
    print(
        f"blocked {blocked_s * 1e3:.1f} ms, durable after {info.seconds * 1e3:.0f} ms, {info.nbytes / MIB:.0f} MiB"
    )
    assert blocked_s < info.seconds / 2
