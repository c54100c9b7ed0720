"""What `PendingSave` promises, and what a save that fails or is interrupted leaves behind: an error that says why, and
no thread, no file handle, no reserved memory.

Storage is a `WatchedStore`, which waits or fails when the test says so.
"""

from __future__ import annotations

import errno
import gc
import itertools
import os
import pathlib
import signal
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import jaxckpt
from jaxckpt._layout import plan_writes
from jaxckpt._persist import PieceWriter
from jaxckpt._progress import ProgressMeter
from jaxckpt._staging import DEVICE_MEMORY, HOST_MEMORY, PINNED_MEMORY, HostMemory

from .helpers import assert_same_tree, run_fork
from .test_commit import WatchedStore

MIB = 1 << 20
WAYS = ("pool", "pinned", "device")
Tell = Callable[[str, str], None]


def threads_of_saves() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("jaxckpt")]


def assert_nothing_is_left(path: pathlib.Path) -> None:
    # Python 3.11 forgets a thread whose `join` was interrupted, while the thread returns from its last function.
    deadline_s = time.monotonic() + 10
    while threads_of_saves() and time.monotonic() < deadline_s:
        os.sched_yield()
    assert threads_of_saves() == []
    assert HOST_MEMORY.bytes_in_use == 0
    assert PINNED_MEMORY.bytes_in_use == 0
    assert DEVICE_MEMORY.bytes_in_use == 0
    assert not list(path.glob("data-*"))
    assert not (path / "manifest.msgpack").exists()


def save_through(tell: Tell, path: pathlib.Path, tree: Any, **options: Any) -> jaxckpt.PendingSave:
    return jaxckpt.save_async(WatchedStore(path, tell), tree, options=jaxckpt.SaveOptions(**options))  # type: ignore[arg-type]


class Gate:
    """Storage that lets nothing through until it is opened."""

    def __init__(self) -> None:
        self.open = threading.Event()

    def __call__(self, _what: str, _name: str) -> None:
        assert self.open.wait(60)


def full_disk(after: int) -> Tell:
    """Storage that refuses all writes after so many."""
    writes = itertools.count()

    def tell(what: str, name: str) -> None:
        if what == "write" and next(writes) >= after:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), name)

    return tell


# --- waiting --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("staging", WAYS)
def test_wait_gives_the_same_info_again_and_again(path: pathlib.Path, staging: str) -> None:
    pending = jaxckpt.save_async(path, {"w": jnp.ones(10)}, options=jaxckpt.SaveOptions(staging=staging))  # type: ignore[arg-type]
    info = pending.wait()
    assert pending.wait() is info
    assert pending.wait(0) is info
    assert pending.done()
    assert info.nbytes == 40
    assert 0 <= info.blocked_s <= info.seconds


@pytest.mark.parametrize("staging", WAYS)
def test_a_wait_that_times_out_leaves_the_save_alone(path: pathlib.Path, staging: str) -> None:
    gate = Gate()
    pending = save_through(gate, path, {"w": jnp.ones(10)}, staging=staging)
    for timeout_s in (0, 0.01, -1):
        with pytest.raises(TimeoutError, match="is not finished"):
            pending.wait(timeout_s)
    assert not pending.done()
    assert not (path / "manifest.msgpack").exists()
    gate.open.set()
    pending.wait(60)
    assert_same_tree(jaxckpt.restore(path), {"w": jnp.ones(10)})


def test_several_threads_can_wait(path: pathlib.Path) -> None:
    gate = Gate()
    pending = save_through(gate, path, {"w": jnp.ones(10)})
    infos: list[jaxckpt.CheckpointInfo] = []
    threads = [threading.Thread(target=lambda: infos.append(pending.wait(60))) for _ in range(8)]
    for thread in threads:
        thread.start()
    gate.open.set()
    for thread in threads:
        thread.join(60)
    assert infos == [pending.wait()] * 8


@pytest.mark.parametrize("staging", WAYS)
def test_the_snapshot_is_over_before_storage_has_anything(path: pathlib.Path, staging: str) -> None:
    gate = Gate()
    pending = save_through(gate, path, {"w": jnp.ones(10)}, staging=staging)
    assert pending.wait_snapshot(60)
    assert not pending.done()
    gate.open.set()
    pending.wait(60)
    assert pending.wait_snapshot(0)


@pytest.mark.slow
def test_the_snapshot_is_not_over_while_bytes_wait_for_room(path: pathlib.Path) -> None:
    """The pinned way hands on in the background; the only buffer is taken as long as storage waits."""
    gate = Gate()
    tree = {str(number): jnp.full((50_000,), number) for number in range(5)}
    pending = save_through(gate, path, tree, staging="pinned", host_bytes_max=2 * MIB, chunk_bytes_max=64)
    assert not pending.wait_snapshot(0)
    gate.open.set()
    pending.wait(60)
    assert pending.wait_snapshot(0)
    assert_same_tree(jaxckpt.restore(path), tree)


# --- progress -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("staging", WAYS)
def test_progress_only_grows_and_ends_at_all_bytes(path: pathlib.Path, staging: str) -> None:
    seen: list[Any] = []
    started = threading.Event()

    def note(_what: str, _name: str) -> None:
        assert started.wait(60)
        seen.append(pending.progress())

    tree = {"large": jnp.zeros(2 * MIB), "small": jnp.ones(10)}
    pending = save_through(
        note, path, tree, staging=staging, io_threads=1, pack_bytes_max=0, chunk_bytes_max=MIB
    )
    assert pending.progress().bytes_done == 0
    started.set()
    pending.wait(60)
    seen.append(pending.progress())
    phases = ["snapshot", "write", "commit", "done"]
    assert [phases.index(state.phase) for state in seen] == sorted(
        phases.index(state.phase) for state in seen
    )
    assert [state.bytes_done for state in seen] == sorted(state.bytes_done for state in seen)
    assert len({state.bytes_done for state in seen}) > 4
    assert {state.bytes_total for state in seen} == {seen[-1].bytes_done}
    assert seen[-1].phase == "done"
    assert seen[-1].fraction == 1.0


def test_an_empty_tree_has_progress_too(path: pathlib.Path) -> None:
    pending = jaxckpt.save_async(path, {})
    pending.wait(60)
    assert pending.progress().fraction == 1.0


# --- failing --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("after", [0, 1, 2])
@pytest.mark.parametrize("host_bytes_max", [None, 2 * MIB])
@pytest.mark.parametrize("staging", WAYS)
def test_a_full_disk_is_reported_and_nothing_is_left(
    path: pathlib.Path, staging: str, host_bytes_max: int | None, after: int, caplog: pytest.LogCaptureFixture
) -> None:
    """By the save itself when it is found out while the snapshot waits for room, else by `wait`, each time."""
    tree = {"large": jnp.arange(2 * MIB), "f": np.asfortranarray(np.ones((700, 900))), "small": jnp.ones(10)}
    with pytest.raises(jaxckpt.WriteError, match="No space left") as caught:  # noqa: PT012  either may raise
        pending = save_through(full_disk(after), path, tree, staging=staging, host_bytes_max=host_bytes_max)
        with pytest.raises(jaxckpt.WriteError):
            pending.wait(60)
        assert pending.done()
        assert pending.wait_snapshot(0)
        pending.wait(60)
    assert caught.value.errno == errno.ENOSPC
    assert isinstance(caught.value.__cause__, OSError)
    assert "No space left" in caplog.text
    assert_nothing_is_left(path)
    jaxckpt.save(path, tree)
    assert_same_tree(jaxckpt.restore(path), tree)


@pytest.mark.parametrize("staging", WAYS)
def test_a_leaf_that_is_deleted_while_its_snapshot_is_taken_fails_the_save(
    path: pathlib.Path, staging: str
) -> None:
    """The failure that a program can cause on the way from the devices: it is raised by the call itself."""
    tree = {str(number): jnp.full((300_000,), number) for number in range(20)}

    def delete_the_last(_what: str, _name: str) -> None:
        tree["9"].delete()

    with pytest.raises(RuntimeError, match="deleted"):
        save_through(delete_the_last, path, tree, staging=staging, host_bytes_max=2 * MIB).wait(60)
    assert_nothing_is_left(path)


@pytest.mark.parametrize("staging", WAYS)
def test_a_failed_save_does_not_keep_the_tree(path: pathlib.Path, staging: str) -> None:
    leaf = jnp.arange(1000.0)
    watched = weakref.ref(leaf)
    pending = save_through(full_disk(0), path, {"leaf": leaf}, staging=staging)
    del leaf
    with pytest.raises(jaxckpt.WriteError):
        pending.wait(60)
    gc.collect()
    assert watched() is None


# --- interrupted ----------------------------------------------------------------------------------------------


def test_an_interrupt_while_the_snapshot_waits_for_room(path: pathlib.Path) -> None:
    """A real SIGINT, sent when storage has the first piece and keeps it: the caller waits for room then."""
    interrupt_and_save(path, "pool", is_blocking=False)


def test_an_interrupt_while_the_pinned_snapshot_waits_for_room(path: pathlib.Path) -> None:
    interrupt_and_save(path, "pinned", is_blocking=False)


@pytest.mark.parametrize("staging", WAYS)
def test_an_interrupt_of_a_blocking_save(path: pathlib.Path, staging: str) -> None:
    interrupt_and_save(path, staging, is_blocking=True)


def interrupt_and_save(path: pathlib.Path, staging: str, *, is_blocking: bool) -> None:
    interrupted = threading.Event()

    def tell(what: str, _name: str) -> None:
        if what == "write":
            if not interrupted.is_set():
                os.kill(os.getpid(), signal.SIGINT)
            assert interrupted.wait(60)

    def note(_number: int, _frame: Any) -> None:
        interrupted.set()
        raise KeyboardInterrupt

    old = signal.signal(signal.SIGINT, note)
    try:
        tree = {"large": jnp.arange(4 * MIB, dtype=jnp.int32)}
        options = jaxckpt.SaveOptions(staging=staging, host_bytes_max=2 * MIB, io_threads=1)  # type: ignore[arg-type]
        save = jaxckpt.save if is_blocking else jaxckpt.save_async
        with pytest.raises(KeyboardInterrupt):
            save(WatchedStore(path, tell), tree, options=options)  # type: ignore[arg-type]
    finally:
        signal.signal(signal.SIGINT, old)
    assert_nothing_is_left(path)
    jaxckpt.save(path, tree)
    assert_same_tree(jaxckpt.restore(path), tree)


# --- ending ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("staging", WAYS)
def test_a_program_that_ends_without_waiting_finishes_the_save(path: pathlib.Path, staging: str) -> None:
    program = """
        import sys, jax.numpy as jnp, jaxckpt
        tree = {"large": jnp.arange(1 << 22), "small": [jnp.full((100,), k) for k in range(50)]}
        options = jaxckpt.SaveOptions(staging=sys.argv[2], host_bytes_max=1 << 24)
        jaxckpt.save_async(sys.argv[1], tree, options=options)
    """
    run_fork(program, path, staging, timeout_s=60)
    restored = jaxckpt.restore(path)
    np.testing.assert_array_equal(restored["large"], np.arange(1 << 22))
    assert [int(leaf[99]) for leaf in restored["small"]] == list(range(50))


def test_a_program_in_which_no_thread_can_be_started_ends_with_the_error(path: pathlib.Path) -> None:
    """With a limit on the address space of thread stacks the first thread cannot be made, or some later one."""
    program = """
        import sys, threading, jax.numpy as jnp, jaxckpt
        tree = {"w": jnp.ones(10)}
        jaxckpt.save(sys.argv[1] + "-warm", tree)
        jaxckpt.save_async(sys.argv[1] + "-warm-too", tree).wait()
        threading.stack_size(1 << 46)
        for save in (jaxckpt.save, jaxckpt.save_async):
            try:
                save(sys.argv[1], tree)
            except RuntimeError as error:
                print(error)
        threading.stack_size(0)
        jaxckpt.save(sys.argv[1], tree)
        assert [thread.name for thread in threading.enumerate()] == ["MainThread"]
    """
    result = run_fork(program, path, timeout_s=60)
    assert result.stdout.splitlines() == ["can't start new thread"] * 2
    assert_same_tree(jaxckpt.restore(path), {"w": jnp.ones(10)})


def test_a_writer_that_gets_only_some_of_its_threads_ends_them(path: pathlib.Path) -> None:
    """Each thread that starts takes one from the process's allowance; here by a hook that the first ones run."""
    started: list[str] = []

    def no_more_threads(_frame: Any, _event: str, _argument: Any) -> None:
        started.append(threading.current_thread().name)
        if len(started) == 1:
            threading.stack_size(1 << 46)

    plan = plan_writes([], chunk_bytes_max=MIB, pack_bytes_max=MIB, piece_bytes=MIB)
    threading.setprofile(no_more_threads)
    try:
        with pytest.raises(RuntimeError, match="can't start new thread"):
            PieceWriter(
                WatchedStore(path, lambda _what, _name: None),
                plan,
                call_count=4,
                threads=4,
                meter=ProgressMeter(0, "write"),
            )
    finally:
        threading.setprofile(None)  # type: ignore[arg-type]
        threading.stack_size(0)
    assert started
    assert threads_of_saves() == []


# --- memory ---------------------------------------------------------------------------------------------------


def test_idle_buffers_of_a_save_with_a_higher_cap_are_freed() -> None:
    memory = HostMemory()
    buffers = [memory.take_buffer(MIB, 64 * MIB) for _ in range(8)]
    for buffer in buffers:
        memory.return_buffer(buffer, MIB)
    assert len(memory._idle) == 8
    memory.return_buffer(memory.take_buffer(MIB, 16 * MIB), MIB)
    assert len(memory._idle) <= 2
    assert memory.bytes_in_use == 0


def test_a_request_above_the_cap_waits_until_nothing_else_is_in_use() -> None:
    memory = HostMemory()
    memory.reserve(1, 10)
    passed = threading.Event()

    def reserve_much() -> None:
        memory.reserve(20, 10)
        passed.set()

    thread = threading.Thread(target=reserve_much)
    thread.start()
    assert not passed.is_set()
    memory.release(1)
    thread.join(60)
    assert passed.is_set()
    assert memory.bytes_in_use == 20
