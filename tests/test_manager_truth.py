"""A manager tells the truth of saves that fail, of saves in flight and of damaged steps; items belong to their step.

The faults here are single ones, which show what is said and how it goes on; ``test_faults.py`` goes through them all.
"""

from __future__ import annotations

import errno
import gc
import logging
import os
import pathlib
import shutil
import threading
import weakref
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxckpt
from jaxckpt import CheckpointManager
from jaxckpt._staging import HOST_MEMORY
from jaxckpt._steps import StepDirectory
from jaxckpt._storage import Buffer, Hold, Store
from jaxckpt._store import LocalStore

from .attacks.generate import FOLDER as ATTACKS
from .helpers import assert_same_tree
from .storage_faults import GateKernel, Operation, RefusingKernel, listing
from .test_commit import WatchedStore
from .test_manager import MANIFEST, Events, Storage, assert_holds_exactly, name_of, save_steps, tree_of

MIB = 1 << 20


def records_of(caplog: pytest.LogCaptureFixture, level: int) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == level]


def manager_on(path: pathlib.Path, kernel: Any, **arguments: Any) -> CheckpointManager:
    return CheckpointManager(LocalStore(str(path), kernel=kernel), **arguments)


# --- saves that fail ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_save_that_failed_is_told_everywhere_and_counts_nowhere(
    path: pathlib.Path, caplog: pytest.LogCaptureFixture, at: int
) -> None:
    kernel = RefusingKernel(errno.ENOSPC, ("pwrite",), 0)
    events = Events()
    manager = manager_on(path, kernel, save_interval_steps=2, on_event=events)
    manager.save(2, tree_of(2))
    manager.wait()
    before = listing(path)
    kernel.at, kernel.count = at, 0
    pending = manager.save(4, tree_of(4))
    assert pending is not None
    assert pending.wait_done(60)
    (complaint,) = records_of(caplog, logging.ERROR)
    assert events.steps("failed") == [4]
    assert manager.steps() == [2]
    assert manager.latest_step() == 2
    with pytest.raises(jaxckpt.WriteError, match="No space left") as raised:
        pending.wait()
    assert raised.value.errno == errno.ENOSPC
    assert str(raised.value) == complaint
    assert name_of(4) in complaint
    assert "nothing was committed; the newest committed step is 2" in complaint
    assert pending.exception() is raised.value
    assert events[-1].error is raised.value
    with pytest.raises(jaxckpt.WriteError) as raised_again:
        manager.wait()
    assert raised_again.value is raised.value
    manager.wait()
    assert listing(path) == before

    kernel.mend()
    assert manager.save(6, tree_of(6)) is not None
    manager.close()
    assert_holds_exactly(path, [2, 6])


def test_the_first_save_that_fails_says_that_there_is_nothing(path: pathlib.Path) -> None:
    manager = manager_on(path, RefusingKernel(errno.ENOSPC, ("pwrite",)))
    pending = manager.save(1, tree_of(1))
    assert pending is not None
    with pytest.raises(jaxckpt.WriteError, match="no step is committed"):
        pending.wait()
    assert manager.resume() is None
    manager.close()
    assert listing(path) == []


@pytest.mark.parametrize("is_waited_for", [False, True])
def test_nothing_is_left_of_every_third_save(path: pathlib.Path, *, is_waited_for: bool) -> None:
    def hook(operation: Operation) -> None:
        if operation.call == "pwrite" and any(name_of(step) in operation.path for step in (3, 6, 9)):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), operation.path)

    events = Events()
    manager = manager_on(path, Storage(hook), max_to_keep=2, on_event=events)
    for step in range(1, 11):
        pending = manager.save(step, tree_of(step))
        assert pending is not None
        if is_waited_for:
            assert pending.wait_done(60)
            assert isinstance(pending.exception(), jaxckpt.WriteError) == (step % 3 == 0)
            pending.wait_until_idle()
            good = [number for number in range(1, step + 1) if number % 3]
            assert manager.steps() == good[-2:]
    manager.close()
    assert events.steps("failed") == [3, 6, 9]
    assert events.steps("saved") == [1, 2, 4, 5, 7, 8, 10]
    assert_holds_exactly(path, [8, 10])
    assert HOST_MEMORY.bytes_in_use == 0


def test_a_step_that_failed_can_be_tried_again(path: pathlib.Path) -> None:
    kernel = RefusingKernel(errno.EIO, ("fsync",))
    manager = manager_on(path, kernel, save_interval_steps=100)
    first = manager.save(100, tree_of(100))
    assert first is not None
    with pytest.raises(jaxckpt.WriteError, match="Input/output error"):
        first.wait()
    again = manager.save(100, tree_of(100))
    assert again is not None
    assert again.wait().step == 100
    assert manager.save(100, tree_of(100)) is None
    assert manager.save(101, tree_of(101)) is None
    manager.close()
    assert_holds_exactly(path, [100, 101])


def test_what_is_tidied_after_a_save_is_not_the_next_save_of_that_step(path: pathlib.Path) -> None:
    directory = StepDirectory(LocalStore(str(path)), "step_", 8)
    store, _ = directory.begin(100)
    names = ["data-0123456789abcdef", "data-fedcba9876543210"]  # of a crash, and of the save: not held yet
    for name in names:
        store.make_directory(name)
    directory.sweep()
    directory.sweep_step(100)
    directory.sweep_all()
    assert store.names() == names
    directory.end()
    directory.sweep()
    assert not (path / name_of(100)).exists()


def test_the_data_that_an_overwrite_left_to_a_reader_go_after_a_later_save(path: pathlib.Path) -> None:
    with CheckpointManager(path) as manager:
        manager.save(1, tree_of(1))
        manager.wait()
        reader = manager.open(1)
        manager.save(1, tree_of(10), force=True, overwrite=True)
        manager.wait()
        assert_same_tree(jaxckpt.restore(reader), tree_of(1))
        manager.save(2, tree_of(2))
        manager.wait()
        assert len(list((path / name_of(1)).glob("data-*"))) == 2
        reader.release()
        manager.save(3, tree_of(3))
        manager.wait()
        assert len(list((path / name_of(1)).glob("data-*"))) == 1
        assert_same_tree(manager.restore(1), tree_of(10))


def test_close_raises_what_nobody_has_seen(path: pathlib.Path) -> None:
    manager = manager_on(path, RefusingKernel(errno.ENOSPC, ("pwrite",)))
    manager.save(1, tree_of(1))
    with pytest.raises(jaxckpt.WriteError, match="No space left"):
        manager.close()
    manager.close()

    manager = manager_on(path, RefusingKernel(errno.ENOSPC, ("pwrite",)))
    pending = manager.save(1, tree_of(1))
    assert pending is not None
    with pytest.raises(jaxckpt.WriteError):
        pending.wait()
    manager.close()

    kernel = RefusingKernel(errno.ENOSPC, ("pwrite",))
    with manager_on(path, kernel) as manager:
        manager.save(1, tree_of(1))
        manager.save(2, tree_of(2))  # makes up for it
    assert_holds_exactly(path, [2])


@pytest.mark.parametrize("number", [errno.EACCES, errno.ENOSPC, errno.EROFS])
@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_save_that_cannot_begin_does_not_stop_the_loop(path: pathlib.Path, number: int, at: int) -> None:
    """Directories are made in the caller's thread: the root, the step's, that of the attempt."""
    kernel = RefusingKernel(number, ("mkdir",), at)
    events = Events()
    manager = manager_on(path, kernel, on_event=events)
    pending = manager.save(1, tree_of(1))
    assert pending is not None
    assert pending.done()
    with pytest.raises(jaxckpt.WriteError, match=errno.errorcode[number]):
        pending.wait()
    with pytest.raises(jaxckpt.WriteError):
        manager.wait()
    assert [event.kind for event in events] == ["saving", "failed"]
    assert manager.save(1, tree_of(1)) is not None
    manager.close()
    assert_holds_exactly(path, [1])


class Unlisted(WatchedStore):
    """A directory that cannot be looked into while a switch is on."""

    def __init__(self, path: Any, switch: list[int]) -> None:
        super().__init__(path, lambda what, name: None)
        self._switch = switch

    def _check(self) -> None:
        if self._switch:
            raise OSError(self._switch[0], os.strerror(self._switch[0]), self.path)

    def names(self) -> list[str]:
        self._check()
        return super().names()

    def fingerprint(self, name: str) -> Any:
        self._check()
        return super().fingerprint(name)

    def exists(self, name: str) -> bool:
        self._check()
        return super().exists(name)

    def child(self, name: str) -> Store:
        return Unlisted(os.path.join(self.path, name), self._switch)


def test_a_directory_that_cannot_be_looked_into_does_not_stop_the_loop(path: pathlib.Path) -> None:
    switch: list[int] = []
    manager = CheckpointManager(Unlisted(path, switch))  # type: ignore[arg-type]
    manager.save(1, tree_of(1))
    manager.wait()
    switch.append(errno.ESTALE)
    pending = manager.save(2, tree_of(2))
    assert pending is not None
    assert pending.wait_done(60)
    assert isinstance(pending.exception(), jaxckpt.WriteError)
    switch.clear()
    manager.save(3, tree_of(3))
    manager.close()
    assert_holds_exactly(path, [1, 3])


def test_a_step_of_an_earlier_run_is_not_replaced_after_storage_did_not_tell_of_it(
    path: pathlib.Path,
) -> None:
    with CheckpointManager(path) as earlier:
        earlier.save(5, tree_of(5))
    switch = [errno.EIO]
    manager = CheckpointManager(Unlisted(path, switch))  # type: ignore[arg-type]
    pending = manager.save(5, tree_of(50))
    assert pending is not None
    assert isinstance(pending.exception(), jaxckpt.WriteError)
    switch.clear()
    assert manager.save(5, tree_of(51)) is None
    assert_holds_exactly(path, [5])


def test_a_preempted_loop_leaves_a_directory_that_cannot_be_looked_into(path: pathlib.Path) -> None:
    switch: list[int] = []
    preemption = jaxckpt.Preemption(())
    manager = CheckpointManager(Unlisted(path, switch), preemption=preemption)  # type: ignore[arg-type]
    manager.save(1, tree_of(1))
    manager.wait()
    switch.append(errno.ESTALE)
    preemption.request()
    assert not manager.should_stop
    pending = manager.save(2, tree_of(2))
    assert pending is not None
    assert isinstance(pending.exception(), jaxckpt.WriteError)
    assert manager.should_stop


@pytest.mark.slow
@pytest.mark.parametrize("call", ["mkdir", "create", "pwrite", "fsync"])
@pytest.mark.parametrize("is_waited_for", [False, True])
def test_failures_that_are_kept_keep_no_tree(path: pathlib.Path, call: str, *, is_waited_for: bool) -> None:
    manager = manager_on(path, RefusingKernel(errno.ENOSPC, (call,), is_lasting=True))
    arrays = []

    def fail(step: int) -> None:
        # Large enough that the staging meets the failure, too.
        tree = {"w": jnp.full((4 * MIB,), step, jnp.float32)}
        arrays.append(weakref.ref(tree["w"]))
        pending = manager.save(step, tree)
        assert pending is not None
        if is_waited_for:
            with pytest.raises(jaxckpt.WriteError):
                pending.wait()

    for step in range(4):
        fail(step)
    with pytest.raises(jaxckpt.WriteError):
        manager.wait()
    gc.collect()
    assert [array() is not None for array in arrays[:-1]] == [False] * 3


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"tree": {"f": print}}, jaxckpt.UnsupportedLeafError),
        ({"items": {"f": print}}, jaxckpt.UnsupportedLeafError),
        ({"metadata": {1, 2}}, TypeError),
        ({"metrics": {"loss": "low"}}, TypeError),
    ],
    ids=["tree", "items", "metadata", "metrics"],
)
def test_what_cannot_be_stored_is_refused_at_once_and_leaves_nothing(
    path: pathlib.Path, arguments: dict[str, Any], error: type[Exception]
) -> None:
    manager = CheckpointManager(path)
    with pytest.raises(error):
        manager.save(1, **{"tree": tree_of(1), **arguments})
    assert listing(path) == [] or not path.exists()
    manager.wait()
    assert manager.save(1, tree_of(1), force=True) is not None
    with pytest.raises(error):
        manager.save(2, **{"tree": tree_of(2), **arguments})
    assert manager.save(3, tree_of(3)) is not None
    manager.close()
    assert_holds_exactly(path, [1, 3])


@pytest.mark.parametrize("interval_steps", [1, 10])
def test_after_a_refusal_what_was_due_is_due_again(path: pathlib.Path, interval_steps: int) -> None:
    manager = CheckpointManager(path, save_interval_steps=interval_steps, save_last=False)
    with pytest.raises(jaxckpt.UnsupportedLeafError):
        manager.save(10, {"w": object()})
    assert manager.save(10, tree_of(10)) is not None
    with pytest.raises(jaxckpt.UnsupportedLeafError):
        manager.save(20, {"w": object()})
    assert manager.save(21, tree_of(21)) is not None
    manager.close()
    assert_holds_exactly(path, [10, 21])


@pytest.mark.parametrize("value", [jnp.complex64(1), jax.random.key(0), np.complex64(1)], ids=str)
def test_a_metric_that_is_no_real_number_is_refused_at_once(path: pathlib.Path, value: Any) -> None:
    manager = CheckpointManager(path)
    with pytest.raises(TypeError, match="loss"):
        manager.save(1, tree_of(1), metrics={"loss": value})
    for step, number in enumerate((jnp.bfloat16(0.5), jnp.int8(1), jnp.bool_(True), np.float16(2)), start=2):
        manager.save(step, tree_of(step), metrics={"loss": number})
    manager.wait()
    assert [manager.metrics(step)["loss"] for step in manager.steps()] == [0.5, 1, 1, 2]


# --- saves in flight ------------------------------------------------------------------------------------------


def gate_of(step: int) -> GateKernel:
    """Storage that stops the writing of a step."""
    return GateKernel(lambda operation: operation.call == "pwrite" and name_of(step) in operation.path)


def test_a_due_step_waits_for_the_save_in_flight(path: pathlib.Path) -> None:
    gate = gate_of(1)
    events = Events()
    manager = manager_on(path, gate, on_event=events)
    manager.save(1, tree_of(1))
    assert gate.reached.wait(60)
    assert manager.steps() == []
    assert manager.latest_step() is None
    with pytest.raises(TimeoutError, match="step 1 is not finished"):
        manager.wait(timeout_s=0)
    loop = threading.Thread(target=lambda: manager.save(2, tree_of(2)))
    loop.start()
    loop.join(0.2)  # it could begin now, and does not
    assert events.steps("saving") == [1]
    gate.may_go_on.set()
    loop.join(60)
    manager.close()
    first_two = [(event.kind, event.step) for event in events][:5]
    assert first_two == [("saving", 1), ("saved", 1), ("waited", 2), ("saving", 2), ("saved", 2)]
    (waited,) = [event.message for event in events if event.kind == "waited"]
    assert waited.endswith("s for step 1")
    first, second = [event.info for event in events if event.info is not None]
    assert first.waited_s == 0
    assert 0.1 < second.waited_s <= second.blocked_s <= second.seconds
    assert_holds_exactly(path, [1, 2])


def test_a_due_step_is_skipped_if_asked_for_and_the_next_one_is_due(path: pathlib.Path) -> None:
    gate = gate_of(2)
    events = Events()
    manager = manager_on(path, gate, on_event=events, if_busy="skip", save_interval_steps=2)
    first = manager.save(2, tree_of(2))
    assert first is not None
    assert gate.reached.wait(60)
    assert manager.save(3, tree_of(3)) is None
    assert manager.save(4, tree_of(4)) is None
    assert manager.save(5, tree_of(5)) is None
    assert events.steps("skipped") == [4, 5]
    assert all("step 2 is still on its way" in event.message for event in events if event.kind == "skipped")
    gate.may_go_on.set()
    first.wait()
    assert manager.save(6, tree_of(6), force=True) is not None
    assert manager.save(7, tree_of(7), force=True) is not None  # forced ones wait
    manager.close()
    assert_holds_exactly(path, [2, 6, 7])


@pytest.mark.parametrize(
    "rule", [{"save_steps": [1, 2]}, {"save_when": lambda step, metrics: step < 3}], ids=["steps", "when"]
)
def test_a_skipped_step_leaves_the_next_one_due_whatever_the_rule(path: pathlib.Path, rule: Any) -> None:
    gate = gate_of(1)
    manager = manager_on(path, gate, if_busy="skip", save_last=False, **rule)
    first = manager.save(1, tree_of(1))
    assert first is not None
    assert gate.reached.wait(60)
    assert manager.save(2, tree_of(2)) is None
    gate.may_go_on.set()
    first.wait()
    assert manager.save(3, tree_of(3)) is not None
    assert manager.save(4, tree_of(4)) is None
    manager.close()
    assert_holds_exactly(path, [1, 3])


def test_a_last_step_that_was_skipped_is_saved_at_the_end(path: pathlib.Path) -> None:
    gate = gate_of(1)
    manager = manager_on(path, gate, if_busy="skip")
    manager.save(1, tree_of(1))
    assert gate.reached.wait(60)
    assert manager.save(2, tree_of(2)) is None
    gate.may_go_on.set()
    manager.close()
    assert_holds_exactly(path, [1, 2])


@pytest.mark.parametrize("if_busy", ["wait", "skip"])
def test_steps_are_never_mixed(path: pathlib.Path, if_busy: Any) -> None:
    """Host arrays are changed in place as soon as `save` has returned."""
    arrays = {f"leaf_{number}": np.zeros(5000) for number in range(20)}
    with CheckpointManager(path, if_busy=if_busy, max_to_keep=None, save_last=False) as manager:
        for step in range(1, 41):
            for array in arrays.values():
                array[:] = step
            manager.save(step, arrays, metrics={"step": step}, items={"step": step})
    steps = manager.steps()
    assert steps
    assert if_busy == "skip" or steps == list(range(1, 41))
    for step in steps:
        assert manager.open(step).metrics == manager.open(step).items == {"step": step}
        assert_same_tree(manager.restore(step), {name: np.full(5000, float(step)) for name in arrays})


def test_overlapping_saves_stay_within_the_bound_on_host_memory(path: pathlib.Path) -> None:
    used: list[int] = []
    kernel = Storage(lambda operation: used.append(HOST_MEMORY.bytes_in_use))
    options = jaxckpt.SaveOptions(host_bytes_max=2 * MIB, staging="pool")
    with manager_on(path, kernel, options=options, max_to_keep=2) as manager:
        for step in range(6):
            manager.save(step, {"w": jnp.full((6, MIB // 4), step, jnp.float32), "v": jnp.ones(10)})
    assert 0 < max(used) <= 2 * MIB
    assert HOST_MEMORY.bytes_in_use == 0
    assert_same_tree(manager.restore(), {"w": jnp.full((6, MIB // 4), 5, jnp.float32), "v": jnp.ones(10)})


# --- steps that are damaged -----------------------------------------------------------------------------------


def data_of(path: pathlib.Path, step: int) -> pathlib.Path:
    (found,) = (path / name_of(step)).glob("data-*/packs/0-0")
    return found


def flip_a_bit(file: pathlib.Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


DAMAGES: dict[str, Callable[[pathlib.Path, int], None]] = {
    "a bit of the data": lambda path, step: flip_a_bit(data_of(path, step)),
    "a bit of the manifest": lambda path, step: flip_a_bit(path / name_of(step) / MANIFEST),
    "short manifest": lambda path, step: os.truncate(path / name_of(step) / MANIFEST, 100),
    "empty manifest": lambda path, step: os.truncate(path / name_of(step) / MANIFEST, 0),
    "short data": lambda path, step: os.truncate(data_of(path, step), 3),
    "missing object": lambda path, step: data_of(path, step).unlink(),
    "missing data": lambda path, step: shutil.rmtree(data_of(path, step).parent.parent),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_of_damaged_steps_the_newest_whole_one_is_taken(
    path: pathlib.Path, damage: Callable[[pathlib.Path, int], None], caplog: pytest.LogCaptureFixture
) -> None:
    save_steps(path, 1, 2, 3)
    damage(path, 3)
    for attempt in (lambda manager: manager.restore(fallback=False), lambda manager: manager.restore(3)):
        manager = CheckpointManager(path)
        with pytest.raises((jaxckpt.CorruptError, jaxckpt.FormatError)):
            attempt(manager)
        assert manager.steps() == [1, 2, 3]

    caplog.clear()
    events = Events()
    manager = CheckpointManager(path, max_to_keep=2, on_event=events)
    resumed = manager.resume()
    assert resumed is not None
    assert_same_tree(resumed, (2, tree_of(2)))
    assert [(event.kind, event.step) for event in events] == [("damaged", 3), ("restored", 2)]
    assert isinstance(events[0].error, (jaxckpt.CorruptError, jaxckpt.FormatError))
    (complaint,) = records_of(caplog, logging.ERROR)
    assert complaint.startswith("step 3 is damaged, the one before it is tried")
    assert manager.steps() == [1, 2]
    assert manager.latest_step() == 2
    assert str(manager.explain()[-1]) == "step 3 stays: it cannot be read, and is left alone"
    with pytest.raises((jaxckpt.CorruptError, jaxckpt.FormatError)):
        manager.restore(3)  # what is asked for is never replaced by another

    # Training goes on from step 2 and comes to step 3 again; the damaged one is not among the newest two.
    assert manager.save(2, tree_of(2)) is None
    assert manager.save(3, tree_of(3)) is not None
    manager.wait()
    assert manager.steps() == [2, 3]
    assert_same_tree(manager.restore(), tree_of(3))
    manager.save(4, tree_of(4))
    manager.close()
    CheckpointManager(path, max_to_keep=None).prune()
    with CheckpointManager(path, max_to_keep=2) as manager:
        manager.save(5, tree_of(5))
    assert_holds_exactly(path, [4, 5])


def test_a_damaged_step_takes_no_place_among_those_that_are_kept(path: pathlib.Path) -> None:
    save_steps(path, 1, 2, 9)
    flip_a_bit(data_of(path, 9))
    events = Events()
    manager = CheckpointManager(path, max_to_keep=2, on_event=events)
    assert manager.resume() is not None
    for step in (3, 4):
        manager.save(step, tree_of(step))
        manager.wait()
    assert manager.steps() == [3, 4]
    assert (path / name_of(9) / MANIFEST).exists()
    events.clear()  # no traceback keeps the step from being deleted, nor would an event
    manager.delete(9)
    manager.close()
    assert_holds_exactly(path, [3, 4])


def test_a_damaged_step_can_be_deleted_while_its_error_is_known(path: pathlib.Path) -> None:
    save_steps(path, 1, 2)
    flip_a_bit(data_of(path, 2))
    events = Events()
    manager = CheckpointManager(path, on_event=events)
    gc.disable()
    try:
        with pytest.raises(jaxckpt.CorruptError) as raised:
            manager.restore(2)
        assert manager.resume() is not None
        manager.delete(2)
    finally:
        gc.enable()
    assert "checksum" in str(raised.value)
    assert events[0].kind == "damaged"
    assert manager.resume() is not None


class BadSectors(WatchedStore):
    """A disk that cannot read what has a text in its path."""

    def __init__(self, path: Any, where: str) -> None:
        super().__init__(path, lambda what, name: None)
        self._where = where

    def _check(self, name: str) -> None:
        if self._where in f"{self.path}/{name}":
            raise OSError(errno.EIO, os.strerror(errno.EIO), f"{self.path}/{name}")

    def read(self, name: str, bytes_max: int) -> bytes:
        self._check(name)
        return super().read(name, bytes_max)

    def read_into(self, name: str, offset: int, buffer: Buffer) -> int:
        self._check(name)
        return super().read_into(name, offset, buffer)

    def read_and_hold(self, name: str, bytes_max: int) -> tuple[bytes, Hold | None]:
        self._check(name)
        return super().read_and_hold(name, bytes_max)

    def child(self, name: str) -> Store:
        return BadSectors(os.path.join(self.path, name), self._where)


@pytest.mark.parametrize("where", [f"{name_of(3)}/{MANIFEST}", f"{name_of(3)}/data-"])
def test_a_step_that_the_disk_cannot_read_is_damaged(path: pathlib.Path, where: str) -> None:
    save_steps(path, 1, 2, 3)
    events = Events()
    manager = CheckpointManager(BadSectors(path, where), on_event=events)  # type: ignore[arg-type]
    resumed = manager.resume()
    assert resumed is not None
    assert_same_tree(resumed, (2, tree_of(2)))
    assert events.steps("damaged") == [3]
    assert manager.latest_step() == 2
    with pytest.raises(jaxckpt.CheckpointError, match="Input/output error"):
        manager.restore(3)


def test_while_steps_are_deleted_the_newest_is_taken_and_not_the_next_of_an_old_list(
    path: pathlib.Path,
) -> None:
    save_steps(path, 1, 2, 3)
    trainer = CheckpointManager(path, max_to_keep=None)
    flip_a_bit(data_of(path, 3))

    def observe(event: jaxckpt.CheckpointEvent) -> None:
        if event.kind == "damaged":  # just then a younger step comes, and the next of the list goes
            trainer.save(4, tree_of(4))
            trainer.wait()
            trainer.delete(2)

    assert_same_tree(CheckpointManager(path, on_event=observe).restore(), tree_of(4))


def test_if_all_steps_are_damaged_nothing_is_restored(path: pathlib.Path) -> None:
    save_steps(path, 1, 2)
    flip_a_bit(data_of(path, 1))
    os.truncate(path / name_of(2) / MANIFEST, 50)
    manager = CheckpointManager(path)
    for _ in range(2):
        with pytest.raises(jaxckpt.CorruptError, match=r"every step in .* is damaged"):
            manager.restore()
        with pytest.raises(jaxckpt.CorruptError, match=r"every step in .* is damaged"):
            manager.resume()
    assert manager.steps() == []
    with pytest.raises(jaxckpt.CorruptError) as raised:
        CheckpointManager(path).resume()
    assert {problem.kind for problem in raised.value.problems} == {"manifest", "checksum"}
    manager.delete(1)
    shutil.rmtree(path / name_of(2))
    assert manager.resume() is None
    with pytest.raises(jaxckpt.NotFoundError, match="no step is committed"):
        manager.restore()


def test_where_nothing_is_nothing_is_restored(path: pathlib.Path) -> None:
    for _ in range(2):
        manager = CheckpointManager(path)
        assert manager.resume() is None
        for ask in (manager.restore, manager.open, lambda manager=manager: manager.restore(3)):
            with pytest.raises(jaxckpt.NotFoundError):
                ask()
        for ask in (manager.path_of, manager.open, manager.metrics, manager.delete):
            with pytest.raises(
                jaxckpt.NotFoundError, match=r"there is no step 3 in .*: nothing is committed there"
            ):
                ask(3)
        (path / name_of(3) / "data-0123456789abcdef").mkdir(parents=True, exist_ok=True)
    assert listing(path) == [f"{name_of(3)}/", f"{name_of(3)}/data-*/"]


def test_a_file_in_place_of_the_directory_is_told_and_left_alone(path: pathlib.Path) -> None:
    path.write_bytes(b"mine")
    manager = CheckpointManager(path)
    assert manager.steps() == []
    assert manager.resume() is None
    pending = manager.save(1, tree_of(1))
    assert pending is not None
    with pytest.raises(jaxckpt.WriteError, match="Not a directory"):
        pending.wait()
    manager.close()
    assert path.read_bytes() == b"mine"


def test_a_tree_that_does_not_fit_is_no_damage(path: pathlib.Path) -> None:
    save_steps(path, 1, 2)
    events = Events()
    manager = CheckpointManager(path, on_event=events)
    for ask in (manager.resume, lambda like: manager.restore(like=like)):
        with pytest.raises(jaxckpt.MismatchError):
            ask({"other": jnp.ones(4)})
    with pytest.raises(jaxckpt.MismatchError):
        manager.resume(items={"not there": _State(0)})
    assert events == []
    assert manager.steps() == [1, 2]


@pytest.mark.parametrize("attack", ["newer_reader_needed", "unknown_feature"])
def test_a_format_that_is_too_new_is_no_damage(path: pathlib.Path, attack: str) -> None:
    save_steps(path, 1, 2)
    shutil.copy(ATTACKS / f"{attack}.msgpack", path / name_of(2) / MANIFEST)
    manager = CheckpointManager(path, max_to_keep=1)
    for ask in (manager.resume, manager.restore):
        with pytest.raises(jaxckpt.FormatError, match=r"newer one|does not know"):
            ask()
    assert manager.steps() == [1, 2]
    assert manager.save(2, tree_of(2), force=True) is None
    manager.prune()
    manager.close()
    assert (path / name_of(2) / MANIFEST).exists()


def test_restore_waits_for_the_save_in_flight(path: pathlib.Path) -> None:
    gate = gate_of(2)
    manager = manager_on(path, gate)
    manager.save(1, tree_of(1))
    manager.save(2, tree_of(2))
    assert gate.reached.wait(60)
    assert manager.steps() == [1]
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(manager.restore()))
    thread.start()
    gate.may_go_on.set()
    thread.join(60)
    manager.close()
    assert_same_tree(results, [tree_of(2)])


# --- items ----------------------------------------------------------------------------------------------------


class _State:
    def __init__(self, value: Any) -> None:
        self.value = value

    def get_state(self) -> Any:
        return self.value

    def set_state(self, state: Any) -> None:
        self.value = state


def test_items_come_back_by_name_however_they_were_saved(path: pathlib.Path) -> None:
    items = {"config": {"lr": 0.1, "layers": [1, 2]}, "blob": b"\0\1", "state": _State({"at": 7})}
    want = {"config": {"lr": 0.1, "layers": [1, 2]}, "blob": b"\0\1", "state": {"at": 7}}
    with CheckpointManager(path) as manager:
        manager.save(1, tree_of(1), items=items)
    jaxckpt.save(path / "plain", tree_of(1), items=items)
    jaxckpt.save_async(path / "async", tree_of(1), items=items).wait()
    for place in (path / name_of(1), path / "plain", path / "async"):
        assert jaxckpt.open(place).items == want
        assert jaxckpt.verify(place).ok
        target = _State(None)
        assert_same_tree(jaxckpt.restore(place, items={"state": target}), tree_of(1))
        assert target.value == {"at": 7}
    assert manager.open().items == want
    target = _State(None)
    manager.restore(1, items={"state": target})
    assert target.value == {"at": 7}


def test_damaged_items_are_found_and_named(path: pathlib.Path) -> None:
    for step in (1, 2):
        with CheckpointManager(path) as manager:
            manager.save(step, tree_of(step), items={"state": step})
    (found,) = (path / name_of(2)).glob("data-*/items/0")
    flip_a_bit(found)
    name = str(found.relative_to(path / name_of(2)))
    with pytest.raises(jaxckpt.CorruptError, match=name):
        _ = manager.open(2).items
    report = jaxckpt.verify(path / name_of(2))
    assert not report.ok
    assert name in str(report)
    target = _State(None)
    with pytest.raises(jaxckpt.CorruptError, match=name):
        manager.restore(2, items={"state": target})
    assert target.value is None
    resumed = CheckpointManager(path).resume(items={"state": target})
    assert resumed is not None
    assert (resumed[0], target.value) == (1, 1)


def test_an_iterator_of_grain_goes_on_where_it_was(path: pathlib.Path) -> None:
    grain = pytest.importorskip("grain.python")
    dataset = grain.MapDataset.source(list(range(40))).shuffle(seed=1).batch(2).to_iter_dataset()
    whole = [batch.tolist() for batch in dataset]
    source = iter(dataset)
    with CheckpointManager(path, save_interval_steps=5) as manager:
        for step in range(1, 13):
            batch = next(source)
            manager.save(step, {"w": jnp.asarray(batch)}, items={"data": source})
    source = iter(dataset)
    resumed = CheckpointManager(path).resume(items={"data": source})
    assert resumed is not None
    assert resumed[0] == 12
    assert [batch.tolist() for batch in source] == whole[12:]
    source = iter(dataset)
    CheckpointManager(path).restore(5, items={"data": source})
    assert [batch.tolist() for batch in source] == whole[5:]
