"""Managers of several real processes take the same decisions, and keep one directory of steps.

The processes run without collectives between steps, so that nothing but the managers holds them together.
"""

from __future__ import annotations

import contextlib
import errno
import os
import pathlib
import shutil
import signal
import time
import timeit
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from jax._src import distributed
from jax.sharding import PartitionSpec as P

import jaxckpt
from jaxckpt import CheckpointEvent, CheckpointManager, Preemption, SaveOptions
from jaxckpt._leader import Leader
from jaxckpt._processes import Channel, Group
from jaxckpt._schedule import Schedule
from jaxckpt._store import LocalStore

from .processes import Outcome, Worker, run_processes
from .storage_faults import GateKernel, RefusingKernel
from .test_many_processes import global_mesh, place, values

pytestmark = pytest.mark.slow

OPTIONS = SaveOptions(timeout_s=20)
SHAPE = (24, 4)


class Clock:
    """A clock that stands still until it is moved."""

    def __init__(self, now_s: float = 0.0) -> None:
        self.now_s = now_s

    def __call__(self) -> float:
        return self.now_s


def tree_of(step: int) -> dict[str, Any]:
    return {"w": place(values(SHAPE, step), global_mesh(), P("x")), "n": step}


def assert_is_step(tree: dict[str, Any], step: int) -> None:
    assert tree["n"] == step
    for shard in tree["w"].addressable_shards:
        np.testing.assert_array_equal(shard.data, values(SHAPE, step)[shard.index])


def steps_of(events: list[CheckpointEvent], kind: str) -> list[int]:
    return [event.step for event in events if event.kind == kind]


def returned(outcomes: list[Outcome]) -> list[Any]:
    assert [outcome.error_text for outcome in outcomes] == [""] * len(outcomes)
    assert {outcome.status for outcome in outcomes} == {"returned"}, outcomes
    return [outcome.value for outcome in outcomes]


def returned_alike(outcomes: list[Outcome]) -> Any:
    """What all of them returned, which must be the same."""
    answers = returned(outcomes)
    assert answers[1:] == answers[:-1]
    return answers[0]


def directories(path: pathlib.Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir() if entry.is_dir())


# --- when to save ---------------------------------------------------------------------------------------------


def save_by_steps(worker: Worker, path: str) -> tuple[list[int], list[int]]:
    events: list[CheckpointEvent] = []
    rules: dict[str, Any] = {"save_interval_steps": 3, "save_steps": {5}, "max_to_keep": 2}
    with CheckpointManager(path, **rules, on_event=events.append, options=OPTIONS) as manager:
        for step in range(1, 9):
            manager.save(step, tree_of(step))
        assert manager._leader is not None
        words = manager._leader._words
        manager.save(9, tree_of(9))
        tree = tree_of(10)
        numbers = iter([10] * 2000)
        best_s = min(timeit.repeat(lambda: manager.save(next(numbers), tree), number=200, repeat=10))
        assert best_s / 200 < 20e-6, best_s
        assert words == 3, "only a step that is due costs a word"
    worker.meet()
    assert steps_of(events, "deleted") == ([3, 5, 6] if worker.index == 0 else [])
    return steps_of(events, "saving"), manager.steps()


def resume_newest(worker: Worker, path: str) -> int:
    with CheckpointManager(path, options=OPTIONS) as manager:
        step, tree = manager.resume(mesh=global_mesh()) or (0, {})
        assert_is_step(tree, step)
        again = manager.restore(step, mesh=global_mesh())
        assert_is_step(again, step)
        assert manager.save(step, tree_of(step)) is None
        assert manager.save(step, tree_of(step), overwrite=True) is not None
        manager.save(step + 1, tree_of(step + 1))
    return step


def test_four_processes_save_by_steps_and_two_go_on(path: pathlib.Path) -> None:
    saved, kept = returned_alike(run_processes(save_by_steps, 4, arguments=(str(path),)))
    assert saved == [3, 5, 6, 9, 10]
    assert kept == [9, 10]
    assert directories(path) == ["step_00000009", "step_00000010"]
    assert '"latest": "step_00000010"' in (path / "checkpoint.json").read_text()
    assert returned_alike(run_processes(resume_newest, 2, arguments=(str(path),))) == 10
    assert CheckpointManager(path).steps() == [9, 10, 11]


def save_with_clocks_that_differ(worker: Worker, path: str) -> tuple[list[int], int]:
    events: list[CheckpointEvent] = []
    clock = Clock()
    rules: dict[str, Any] = {"save_interval_s": 50.0, "save_last": False, "max_to_keep": None}
    with CheckpointManager(
        path, **rules, on_event=events.append, monotonic_s=clock, options=OPTIONS
    ) as manager:
        for step in range(1, 131):
            clock.now_s += [1.0, 100.0, 0.0, -3.0][worker.index]
            manager.save(step, tree_of(step))
        assert manager._leader is not None
        return steps_of(events, "saving"), manager._leader._words


def test_the_clock_of_process_0_counts(path: pathlib.Path) -> None:
    saved, words = returned_alike(run_processes(save_with_clocks_that_differ, 4, arguments=(str(path),)))
    assert saved == [50, 100]
    assert words <= 40


def save_within_overhead(worker: Worker, path: str) -> list[int]:
    events: list[CheckpointEvent] = []
    clock = Clock()

    def on_event(event: CheckpointEvent) -> None:
        events.append(event)
        if event.kind == "saving":
            clock.now_s += [1.0, 50.0, 0.0, 7.0][worker.index]  # what a save costs in each process

    with CheckpointManager(
        path,
        save_interval_steps=2,
        max_overhead=0.1,
        save_last=False,
        on_event=on_event,
        monotonic_s=clock,
        options=OPTIONS,
    ) as manager:
        for step in range(1, 60):
            clock.now_s += 1.0
            manager.save(step, tree_of(step))
    return steps_of(events, "saving")


def test_the_time_that_process_0_is_blocked_counts(path: pathlib.Path) -> None:
    saved = returned_alike(run_processes(save_within_overhead, 4, arguments=(str(path),)))
    # At 10 s a save, the first one on credit.
    assert saved[0] == 2
    assert np.all((np.diff(saved)[1:] >= 10) & (np.diff(saved)[1:] <= 12))
    assert len(saved) >= 4


def save_by_metrics(worker: Worker, path: str) -> list[int]:
    events: list[CheckpointEvent] = []

    def is_wanted(step: int, metrics: Any) -> bool:
        return metrics["loss"] < 3

    with CheckpointManager(
        path, save_when=is_wanted, save_last=False, on_event=events.append, options=OPTIONS
    ) as manager:
        for step in range(1, 12):
            loss = (step * (worker.index + 1)) % 7
            manager.save(step, tree_of(step), metrics={"loss": loss})
    return steps_of(events, "saving")


def test_the_metrics_of_process_0_count(path: pathlib.Path) -> None:
    saved = returned_alike(run_processes(save_by_metrics, 4, arguments=(str(path),)))
    assert saved == [1, 2, 7, 8, 9]


def skip_while_busy(worker: Worker, path: str) -> tuple[list[int], list[int]]:
    events: list[CheckpointEvent] = []
    gate = GateKernel(lambda operation: worker.index == 1 and operation.call == "pwrite")
    with CheckpointManager(
        LocalStore(path, kernel=gate), if_busy="skip", on_event=events.append, options=OPTIONS
    ) as manager:
        first = manager.save(1, tree_of(1))
        assert first is not None
        if worker.index == 1:
            assert gate.reached.wait(20)
        worker.meet()
        manager.save(2, tree_of(2))
        manager.save(3, tree_of(3))
        worker.meet()
        gate.may_go_on.set()
        first.wait(20)
        worker.meet()  # process 0 knows, too
        manager.save(4, tree_of(4))
    return steps_of(events, "saved"), steps_of(events, "skipped")


def test_all_skip_what_process_0_skips(path: pathlib.Path) -> None:
    outcomes = run_processes(skip_while_busy, 3, arguments=(str(path),))
    assert returned_alike(outcomes) == ([1, 4], [2, 3])


# --- failures -------------------------------------------------------------------------------------------------


def save_at_once(manager: CheckpointManager, step: int, tree: Any) -> None:
    """Saves and waits; a failure must be known within five seconds."""
    began_s = time.monotonic()
    try:
        pending = manager.save(step, tree)
        assert pending is not None
        pending.wait(20)
    finally:
        assert time.monotonic() - began_s < 5


def fail_in_one(worker: Worker, path: str) -> list[str]:
    kernel = RefusingKernel(errno.EFBIG, ("pwrite",), at=1 if worker.index == 2 else 0)
    with CheckpointManager(LocalStore(path, kernel=kernel), options=OPTIONS) as manager:
        with pytest.raises(jaxckpt.CoordinationError, match="process 2 of 4 failed") as caught:
            save_at_once(manager, 1, tree_of(1))
        assert [failure.process for failure in caught.value.failures] == [2]
        assert manager.steps() == []
        save_at_once(manager, 1, tree_of(1))
        worker.meet()
        manager.save(2, tree_of(2))
    worker.meet()
    return [str(step) for step in manager.steps()]


def test_a_process_that_cannot_write_fails_the_step_in_all_and_training_goes_on(path: pathlib.Path) -> None:
    assert returned_alike(run_processes(fail_in_one, 4, arguments=(str(path),))) == ["1", "2"]


def pass_another_step(worker: Worker, path: str, way: str) -> list[int]:
    rules: dict[str, Any] = {"save_interval_s": 1e-9} if way == "clock" else {}
    with CheckpointManager(path, **rules, options=OPTIONS) as manager:
        manager.save(1, tree_of(1))
        with pytest.raises(jaxckpt.ProcessMismatchError, match=r"step is 7 here, 2 in process 0"):
            save_at_once(manager, 7 if worker.index == 2 else 2, tree_of(2))
        with contextlib.suppress(jaxckpt.ProcessMismatchError):
            manager.wait()
        save_at_once(manager, 3, tree_of(3))
    worker.meet()
    return manager.steps()


@pytest.mark.parametrize("way", ["steps", "clock"])
def test_another_step_in_one_process_is_found_by_all(path: pathlib.Path, way: str) -> None:
    assert returned_alike(run_processes(pass_another_step, 3, arguments=(str(path), way))) == [1, 3]


def leave_in_one(worker: Worker, path: str) -> str:
    try:
        with CheckpointManager(path, options=OPTIONS) as manager:
            manager.save(1, tree_of(1))
            if worker.index == 1:
                raise ValueError("the loop of this process failed")
            with pytest.raises(jaxckpt.CoordinationError, match="the loop of this process failed") as caught:
                save_at_once(manager, 2, tree_of(2))
            assert [failure.process for failure in caught.value.failures] == [1]
            return "told"
    except ValueError:
        return "left"


def test_who_leaves_its_loop_by_an_exception_keeps_nobody_waiting(path: pathlib.Path) -> None:
    assert returned(run_processes(leave_in_one, 3, arguments=(str(path),))) == ["told", "left", "told"]
    assert CheckpointManager(path).steps() == [1]


def save_what_cannot_be_saved(worker: Worker, path: str) -> list[int]:
    with CheckpointManager(path, save_interval_steps=2, options=OPTIONS) as manager:
        manager.save(2, tree_of(2))
        bad = tree_of(4) | ({"bad": object()} if worker.index == 1 else {})
        with pytest.raises(jaxckpt.CoordinationError) as caught:
            save_at_once(manager, 4, bad)
        if worker.index == 1:
            assert isinstance(caught.value.__cause__, jaxckpt.UnsupportedLeafError)
        manager.save(5, tree_of(5))
        save_at_once(manager, 6, tree_of(6))
        with contextlib.suppress(jaxckpt.CoordinationError):
            manager.wait()
    worker.meet()
    return manager.steps()


def test_a_tree_that_one_process_cannot_save_leaves_all_at_the_same_step(path: pathlib.Path) -> None:
    outcomes = run_processes(save_what_cannot_be_saved, 2, arguments=(str(path),))
    assert returned_alike(outcomes) == [2, 6]


# --- restoring and keeping ------------------------------------------------------------------------------------


def save_some(worker: Worker, path: str, steps: list[int], local: bool = False) -> None:
    with CheckpointManager(path, local=local, options=OPTIONS) as manager:
        for step in steps:
            manager.save(step, tree_of(step))


def fall_back(worker: Worker, path: str, is_on_host: bool) -> tuple[int, list[int], list[int]]:
    events: list[CheckpointEvent] = []
    manager = CheckpointManager(path, on_event=events.append, options=OPTIONS)
    like = None
    if is_on_host:
        # Each process reads alone, and only one looks at what is damaged.
        like = {"w": np.zeros(SHAPE, np.float32), "n": 0} if worker.index == 1 else {"n": 0}
    step, tree = manager.resume(like, unexpected="ignore") or (-1, {"n": -1})
    assert tree["n"] == step
    if not is_on_host:
        assert_is_step(tree, step)
    manager.save(3, tree_of(3))
    manager.close()
    worker.meet()
    return step, steps_of(events, "damaged"), manager.steps()


@pytest.mark.parametrize("is_on_host", [False, True])
def test_a_damaged_step_is_passed_over_by_all(path: pathlib.Path, is_on_host: bool) -> None:
    returned(run_processes(save_some, 2, arguments=(str(path), [1, 2, 3])))
    pack = next((path / "step_00000003").glob("data-*/packs/1-*"))
    content = bytearray(pack.read_bytes())
    content[0] ^= 1
    pack.write_bytes(content)
    step, damaged, steps = returned_alike(run_processes(fall_back, 2, arguments=(str(path), is_on_host)))
    assert (step, damaged) == (2, [3])
    assert steps == [1, 2, 3], "the damaged step was saved anew"
    assert jaxckpt.verify(path / "step_00000003").ok


def keep_together(worker: Worker, path: str) -> list[int]:
    manager = CheckpointManager(path, max_to_keep=None, options=OPTIONS)
    for step in range(1, 7):
        manager.save(step, tree_of(step))
    manager.delete(2)
    assert manager.steps() == [1, 3, 4, 5, 6]
    with pytest.raises(jaxckpt.NotFoundError, match="no step 2"):
        manager.delete(2)
    with pytest.raises(jaxckpt.NotFoundError, match="no step 2"):
        manager.restore(2)
    with pytest.raises(jaxckpt.ProcessMismatchError, match="restores step 4, process 0 step 3"):
        manager.restore(4 if worker.index == 1 else 3)
    manager.pin(1)
    manager.close()
    few = CheckpointManager(path, max_to_keep=2, options=OPTIONS)
    pruned = few.prune()
    assert pruned == [3, 4], pruned
    few.unpin(1)
    assert few.prune() == [1]
    with pytest.raises(ValueError, match="no rule"):
        few.best_step()
    assert few.restore()["n"] == 6
    few.close()
    return few.steps()


def test_process_0_deletes_and_pins_for_all(path: pathlib.Path) -> None:
    assert returned_alike(run_processes(keep_together, 2, arguments=(str(path),))) == [5, 6]


# --- the end --------------------------------------------------------------------------------------------------


def stop_when_told(worker: Worker, path: str, way: str) -> tuple[int, list[int]]:
    if way == "process 0":  # as with jax_enable_preemption_service off
        distributed.global_state.preemption_sync_manager = None
    preemption = Preemption((signal.SIGUSR1, signal.SIGTERM) if way == "jax" else (signal.SIGUSR1,))
    manager = CheckpointManager(
        path, save_interval_steps=10**6, save_last=False, preemption=preemption, options=OPTIONS
    )
    manager.save(1, tree_of(1), force=True)
    tree = tree_of(2)
    step = 1
    worker.meet()
    deadline_s = time.monotonic() + 20
    while not manager.should_stop and time.monotonic() < deadline_s:
        step += 1
        if step == 200 and way == "jax" and worker.index == 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        if step == 200 and way == "process 0":
            os.kill(os.getpid(), signal.SIGUSR1)  # the clusters' way: everybody is told
        manager.save(step, tree)
        manager.save(step, tree)  # again: one step gets one answer
        time.sleep(0.002)  # a step
    manager.close()
    worker.meet()
    return step, manager.steps()


@pytest.mark.parametrize("way", ["jax", "process 0"])
def test_all_stop_after_one_step_when_the_end_is_announced(path: pathlib.Path, way: str) -> None:
    step, steps = returned_alike(run_processes(stop_when_told, 3, arguments=(str(path), way)))
    assert 200 <= step < 2000
    assert steps == [1, step]


def train(worker: Worker, path: str, until: int, stop_at: int) -> tuple[int, int, list[int]]:
    heard: list[int] = []

    def on_saved(step: int, info: jaxckpt.CheckpointInfo) -> bool:
        heard.append(step)
        return step >= stop_at and worker.index == 0

    manager = CheckpointManager(path, save_interval_steps=2, options=OPTIONS)
    with jaxckpt.CheckpointCallback(manager, after_save=[on_saved]) as callback:
        start, tree = callback.on_start(mesh=global_mesh()) or (0, tree_of(0))
        assert_is_step(tree, start)
        step = start
        while step < until and not callback.should_stop:
            step += 1
            callback.on_step(step, tree_of(step))
    worker.meet()
    return start, step, heard


def test_a_callback_stops_all_loops_at_one_step_and_resumes_them(path: pathlib.Path) -> None:
    # Step 4 is told when the save of step 6 begins.
    first = returned_alike(run_processes(train, 3, arguments=(str(path), 100, 4)))
    assert first == (0, 6, [2, 4, 6])
    assert returned_alike(run_processes(train, 2, arguments=(str(path), 9, 100))) == (6, 9, [8, 9])
    assert CheckpointManager(path).steps() == [2, 4, 6, 8, 9]


# --- each its own ---------------------------------------------------------------------------------------------


def go_on_locally(worker: Worker, path: str) -> tuple[int, list[int]]:
    manager = CheckpointManager(path, local=True, max_to_keep=3, options=OPTIONS)
    step, tree = manager.resume(mesh=global_mesh()) or (0, {})
    assert_is_step(tree, step)
    for later in (3, 4):
        manager.save(later, tree_of(later))
    manager.wait()
    manager.pin(3)
    manager.close()
    return step, manager.steps()


def start_anew_locally(worker: Worker, path: str) -> bool:
    manager = CheckpointManager(path, local=True, options=OPTIONS)
    with pytest.raises(jaxckpt.NotFoundError, match="whole in all processes"):
        manager.restore()
    return manager.resume() is None


def test_processes_without_common_storage_take_the_newest_step_that_all_have(path: pathlib.Path) -> None:
    returned(run_processes(save_some, 3, arguments=(str(path), [1, 2, 3], True)))
    assert directories(path) == ["process-0", "process-1", "process-2"]
    shutil.rmtree(path / "process-1" / "step_00000003")
    step, steps = returned_alike(run_processes(go_on_locally, 3, arguments=(str(path),)))
    assert step == 2
    assert steps == [2, 3, 4]
    for process in range(3):
        own = path / f"process-{process}"
        assert directories(own) == ["step_00000002", "step_00000003", "step_00000004"]
        assert (own / "step_00000003" / "pinned").exists()
        assert (own / "checkpoint.json").exists()
    shutil.rmtree(path / "process-2")
    assert returned_alike(run_processes(start_anew_locally, 3, arguments=(str(path),)))


# --- how often process 0 is asked -----------------------------------------------------------------------------


class NoChannel(Channel):
    """To nobody."""

    index = 0
    count = 2

    def put(self, key: str, value: bytes) -> bool:
        raise NotImplementedError

    def wait_for(self, key: str, timeout_s: float) -> bytes | None:
        raise NotImplementedError

    def look(self, key: str) -> bytes | None:
        raise NotImplementedError

    def listing(self, prefix: str) -> dict[str, bytes]:
        raise NotImplementedError

    def delete(self, prefix: str) -> None:
        raise NotImplementedError


def ask_now_and_then(schedule: Schedule, clock: Clock, times_s: Iterator[float]) -> tuple[list[float], int]:
    """Times of saves, and the number of words, of a loop whose calls take these times."""
    leader = Leader(Group(NoChannel()), "/run", 1.0, clock)
    saves_s: list[float] = []
    words = 0
    for step, time_s in enumerate(times_s, 1):
        clock.now_s += time_s
        schedule.is_due_by_number(step)
        is_quiet = leader.is_quiet()
        if is_quiet or not schedule.has_open_question(step):
            continue
        words += 1
        quiet_s = schedule.quiet_s()
        if schedule.reason_to_save(step, None) is None:
            leader.note_quiet_calls(leader.count_quiet_calls(quiet_s))
        else:
            leader.note_quiet_calls(0)
            saves_s.append(clock.now_s)
            schedule.note_saved(step)
            schedule.note_blocked(0.5)
    return saves_s, words


@pytest.mark.parametrize(("call_s", "words_max"), [(1.0, 60), (0.1, 120), (0.001, 7000)])
def test_a_save_by_the_clock_is_late_by_a_hundredth_and_costs_few_words(
    call_s: float, words_max: int
) -> None:
    clock = Clock()
    schedule = Schedule(interval_steps=None, interval_s=60.0, clock=clock)
    calls = int(300 / call_s)
    saves_s, words = ask_now_and_then(schedule, clock, iter([call_s] * calls))
    lateness_s = np.diff([0.0, *saves_s]) - 60.0
    assert len(saves_s) >= 4
    assert np.all(lateness_s >= -1e-6)
    assert np.all(lateness_s <= 0.6 + call_s + 1e-6)
    assert words <= words_max


@pytest.mark.parametrize("share", [0.01, 0.2])
def test_a_budget_is_asked_about_now_and_then(share: float) -> None:
    clock = Clock()
    schedule = Schedule(interval_steps=1, interval_s=None, max_overhead=share, clock=clock)
    pause_s = 0.5 / share
    saves_s, words = ask_now_and_then(schedule, clock, iter([0.05] * int(10 * pause_s / 0.05)))
    gaps_s = np.diff(saves_s)[1:]
    assert len(gaps_s) >= 5
    assert np.all(gaps_s >= pause_s - 1e-6)
    assert np.all(gaps_s <= pause_s * 1.01 + 0.05 + 1e-6)
    assert words <= 25 * len(saves_s)


def test_rules_by_number_alone_ask_nobody() -> None:
    schedule = Schedule(interval_steps=10, interval_s=None, steps={17}, save_first=True)
    due: Callable[[int], bool] = schedule.is_due_by_number
    assert [step for step in range(1, 20) if due(step)] == [1, *range(10, 20)]  # nothing is noted as saved
    assert not any(schedule.has_open_question(step) for step in range(1, 20))
