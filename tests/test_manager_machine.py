"""Whatever happens to a manager and its directory, in any order: does it keep what it must, and tell the truth of it?

Hypothesis chooses the order of saves, failures, crashes, restarts, deletions, damage, jumps of the clock and so on, and
after each of them compares the directory and the manager with a model in plain dicts. The model has its own simplest
version of the rules for saving and keeping; it shares no code with the package.

A crash is one of a `Disk`: from some call on, no call reaches the file system any more, and the manager is thrown away.
What such an accident leaves is known from the record of the disk (which manifests were renamed to their names, which
were deleted); the model says which of those were allowed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import gc
import json
import logging
import math
import os
import pathlib
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, settings, strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

import jaxckpt
from jaxckpt._staging import HOST_MEMORY
from jaxckpt._store import Kernel, LocalStore

from .helpers import assert_same_tree

MANIFEST = "manifest.msgpack"
CACHE = "checkpoint.json"
LOSS = jaxckpt.Best("loss")
ACCURACY = jaxckpt.Best("accuracy", mode="max", keep=2)
NOTES = "a file of somebody else"
DAMAGE = (jaxckpt.CorruptError, jaxckpt.FormatError)


# --- storage that fails or dies -------------------------------------------------------------------------------


class Crash(BaseException):
    """The process is dead; no code that cleans up may still reach the disk."""


@dataclasses.dataclass(frozen=True)
class Accident:
    """What happens at which call of the disk."""

    at: int
    kind: Literal["one call fails", "all calls fail", "dies before", "dies after", "dies within"]
    number: int = errno.EIO

    @property
    def kills(self) -> bool:
        return self.kind.startswith("dies")


class Disk(Kernel):
    """The file system, until the accident; remembers which checkpoints came and went."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.expect(None)

    def expect(self, accident: Accident | None) -> None:
        self.accident = accident
        self.calls = 0
        self.is_dead = False
        self.has_failed = False
        self.history: list[tuple[str, str]] = []

    def open(self, path: str, flags: int, mode: int = 0o777) -> int:  # type: ignore[override]
        return self._call(os.open, path, flags, mode)

    def pwrite(self, descriptor: int, data: Any, offset: int) -> int:  # type: ignore[override]
        return self._call(os.pwrite, descriptor, data, offset)

    def ftruncate(self, descriptor: int, length: int) -> None:  # type: ignore[override]
        self._call(os.ftruncate, descriptor, length)

    def fsync(self, descriptor: int) -> None:  # type: ignore[override]
        self._call(os.fsync, descriptor)

    def rename(self, old: str, new: str) -> None:  # type: ignore[override]
        self._call(os.rename, old, new)

    def unlink(self, path: str) -> None:  # type: ignore[override]
        self._call(os.unlink, path)

    def mkdir(self, path: str) -> None:  # type: ignore[override]
        self._call(os.mkdir, path)

    def rmdir(self, path: str) -> None:  # type: ignore[override]
        self._call(os.rmdir, path)

    # `close` stays as it is: the descriptors of a dead process are closed.

    def _call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        with self._lock:
            if self.is_dead:
                raise Crash
            self.calls += 1
            accident = self.accident
            if accident is None or self.calls < accident.at:
                return self._do(function, arguments)
            if accident.kills:
                self._die(accident, function, arguments)
            if accident.kind == "one call fails" and self.has_failed:
                return self._do(function, arguments)
            self.has_failed = True
            raise OSError(accident.number, os.strerror(accident.number))

    def _die(self, accident: Accident, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        self.is_dead = True
        if accident.kind == "dies within" and function is os.pwrite:
            descriptor, data, offset = arguments
            os.pwrite(descriptor, data[: len(data) // 2], offset)
        elif accident.kind == "dies after":
            with contextlib.suppress(OSError):
                self._do(function, arguments)
        raise Crash

    def _do(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        result = function(*arguments)
        if function is os.rename and os.path.basename(arguments[1]) == MANIFEST:
            self.history.append(("committed", os.path.basename(os.path.dirname(arguments[1]))))
        if function is os.unlink and os.path.basename(arguments[0]) == MANIFEST:
            self.history.append(("deleted", os.path.basename(os.path.dirname(arguments[0]))))
        return result


# --- the model ------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Call:
    """What `save` was called with."""

    step: int
    tree: dict[str, Any]
    metrics: dict[str, float]
    items: dict[str, Any]


@dataclasses.dataclass
class Saved:
    """A committed step."""

    call: Call
    name: str
    time_s: float
    is_pinned: bool = False
    damage: str = ""


@dataclasses.dataclass(frozen=True)
class Policy:
    """The rules of one manager."""

    save_interval_steps: int | None
    save_interval_s: float | None
    save_steps: tuple[int, ...]
    save_when: bool
    save_first: bool
    save_last: bool
    max_to_keep: int | None
    keep_period: int | None
    keep_interval_s: float | None
    best: tuple[jaxckpt.Best, ...]
    time_to_live_s: float | None
    pinned: tuple[int, ...]
    width: int

    def arguments(self) -> dict[str, Any]:
        arguments = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        arguments["save_when"] = asked_for if self.save_when else None
        return arguments


def asked_for(step: int, _metrics: Any) -> bool:
    return step % 11 == 0


@dataclasses.dataclass
class Mind:
    """What a manager remembers since it was made."""

    policy: Policy
    interval_began_s: float
    baseline: int | None = None
    last_noted: int | None = None
    is_fresh: bool = True
    first_seen: int | None = None
    has_seen_steps: bool = False
    last_step: int | None = None
    failed_step: int | None = None
    unsaved: Call | None = None
    damaged: set[int] = dataclasses.field(default_factory=set)
    doubtful: set[int] = dataclasses.field(
        default_factory=set
    )  # there, but the last sync of their saves failed

    @property
    def left_out(self) -> set[int]:
        return self.damaged | self.doubtful

    def is_due(self, step: int, now_s: float) -> bool:
        policy = self.policy
        if self.baseline is None or step < self.baseline:
            self.baseline = step - 1
        if self.first_seen is None:
            self.first_seen = step
        if step == self.last_noted:
            return False
        rules = [policy.save_interval_steps, policy.save_interval_s, policy.save_when or None]
        interval = policy.save_interval_steps
        if rules == [None, None, None] and not policy.save_steps:
            interval = 1
        is_crossed = interval is not None and any(
            number % interval == 0 for number in range(self.baseline + 1, step + 1)
        )
        is_late = (
            policy.save_interval_s is not None and now_s - self.interval_began_s >= policy.save_interval_s
        )
        is_first = policy.save_first and self.is_fresh and step == self.first_seen
        is_asked_for = policy.save_when and step % 11 == 0
        return is_first or is_crossed or is_late or step in policy.save_steps or is_asked_for

    def note(self, step: int, now_s: float) -> None:
        """An interval begins here."""
        self.interval_began_s = now_s
        self.baseline = step
        self.last_noted = step
        self.is_fresh = False

    def begin_from(self, step: int, now_s: float) -> None:
        """The loop resumed from here."""
        self.note(step, now_s)
        self.last_step = step
        self.unsaved = None


def steps_to_keep(saved: dict[int, Saved], policy: Policy, now_s: float) -> set[int]:
    """The rules of retention, each in its simplest form."""
    steps = sorted(saved)
    if not steps:
        return set()
    times_s = {step: saved[step].time_s for step in steps}
    keep = {steps[-1], max(steps, key=lambda step: (times_s[step], step))}
    recent = steps if policy.max_to_keep is None else steps[-policy.max_to_keep :]
    for step in recent:
        if policy.time_to_live_s is None or now_s - times_s[step] <= policy.time_to_live_s:
            keep.add(step)
    if policy.keep_period is not None:
        keep |= {step for step in steps if step % policy.keep_period == 0}
    if policy.keep_interval_s is not None:
        anchor_s = None
        for step in steps:
            gap_s = math.inf if anchor_s is None else times_s[step] - anchor_s
            if gap_s < 0 or gap_s >= policy.keep_interval_s:
                keep.add(step)
                anchor_s = times_s[step]
    for best in policy.best:
        keep |= set(ranking(saved, best)[: best.keep])
    return keep | {step for step in steps if step in policy.pinned or saved[step].is_pinned}


def ranking(saved: dict[int, Saved], best: jaxckpt.Best) -> list[int]:
    """Steps with the metric, best first, of equal ones the newest."""
    sign = 1 if best.mode == "min" else -1
    values = {step: entry.call.metrics.get(best.metric, math.nan) for step, entry in saved.items()}
    steps = [step for step, value in values.items() if not math.isnan(value)]
    return sorted(steps, key=lambda step: (sign * values[step], -step))


# --- what Hypothesis chooses from -----------------------------------------------------------------------------

POLICIES = st.builds(
    Policy,
    save_interval_steps=st.sampled_from([None, 1, 1, 2, 3, 5]),
    save_interval_s=st.sampled_from([None, None, 50.0]),
    save_steps=st.sampled_from([(), (), (7, 8, 20)]),
    save_when=st.sampled_from([False, False, True]),
    save_first=st.booleans(),
    save_last=st.sampled_from([True, True, False]),
    max_to_keep=st.sampled_from([1, 2, 2, 3, 4, None]),
    keep_period=st.sampled_from([None, None, 2, 5]),
    keep_interval_s=st.sampled_from([None, None, 100.0, 3600.0]),
    best=st.sampled_from([(), (LOSS,), (ACCURACY,), (LOSS, ACCURACY)]),
    time_to_live_s=st.sampled_from([None, None, 500.0]),
    pinned=st.sampled_from([(), (), (3, 4, 1000)]),
    width=st.sampled_from([8, 8, 1, 4]),
)
NUMBERS = st.sampled_from([math.nan, math.inf, -math.inf, 0.0, 1.0, 1.0, 2.5])
METRICS = st.dictionaries(st.sampled_from(["loss", "accuracy"]), NUMBERS)
FAILURES = st.builds(
    Accident,
    at=st.integers(1, 60),
    kind=st.sampled_from(["one call fails", "one call fails", "all calls fail"]),
    number=st.sampled_from([errno.ENOSPC, errno.EIO, errno.EROFS]),
)
CRASHES = st.builds(
    Accident, at=st.integers(1, 70), kind=st.sampled_from(["dies before", "dies after", "dies within"])
)
ACCIDENTS = st.one_of(*[st.none()] * 6, FAILURES, CRASHES)
CHOICE = st.integers(0, 1000)  # of a list whose length is known only then
MINUTE_S, YEAR_S = 60.0, 365 * 86400.0


@dataclasses.dataclass
class Reader:
    """Somebody who holds a step open."""

    step: int
    saved: Saved
    checkpoint: Any
    close: Callable[[], None]


class ManagerMachine(RuleBasedStateMachine):
    """A manager, its directory, and the model of both."""

    def __init__(self) -> None:
        super().__init__()
        memory = "/dev/shm"
        self.home = pathlib.Path(tempfile.mkdtemp(dir=memory if os.access(memory, os.W_OK) else None))
        self.root = self.home / "run 0"
        self.disk = Disk()
        self.manager: jaxckpt.CheckpointManager | None = None
        self.wall_s = 1.7e9
        self.passed_s = 0.0

        self.saved: dict[int, Saved] = {}
        self.mind: Mind | None = None
        self.readers: list[Reader] = []
        self.foreign: set[str] = set()
        self.old_caches: list[bytes] = []
        self.position = 0
        self.trees = 0
        self.unchecked: set[int] = set()
        self.is_buried = True
        self.is_clean = True  # nothing but checkpoints and foreign files is there
        self.is_cache_exact = False

    # --- rules: a manager comes and goes ----------------------------------------------------------------------

    @initialize(policy=POLICIES)
    def begin(self, policy: Policy) -> None:
        self.start(policy)

    @precondition(lambda self: self.manager is None)
    @rule(policy=POLICIES)
    def start_anew(self, policy: Policy) -> None:
        self.start(policy)

    def start(self, policy: Policy) -> None:
        if not self.is_buried:
            gc.collect()  # the locks of a dead manager go with its last references
            self.is_buried = True
        self.manager = jaxckpt.CheckpointManager(
            LocalStore(str(self.root), self.disk),  # type: ignore[arg-type]
            **policy.arguments(),
            options=jaxckpt.SaveOptions(
                io_threads=1
            ),  # the calls of the disk come in the same order each time
            monotonic_s=lambda: self.passed_s,
            wall_s=lambda: self.wall_s,
        )
        self.mind = Mind(policy, self.passed_s)
        self.unchecked |= set(self.saved)

    @precondition(lambda self: self.manager is not None)
    @rule(accident=ACCIDENTS)
    def close(self, accident: Accident | None) -> None:
        manager, mind = self.manager, self.mind
        call = mind.unsaved
        is_due = call is not None and call.step != mind.last_step and not self.is_there_already(call.step)
        self.run(manager.close, call if is_due else None, accident)
        self.forget()

    @precondition(lambda self: self.manager is not None)
    @rule()
    def leave_by_an_exception(self) -> None:
        self.manager.__exit__(ValueError, ValueError("the loop failed"), None)
        self.forget()

    def forget(self) -> None:
        self.manager = self.mind = None

    # --- rules: saving ----------------------------------------------------------------------------------------

    @precondition(lambda self: self.manager is not None)
    @rule(
        advance=st.integers(1, 6),
        metrics=METRICS,
        force=st.booleans(),
        accident=ACCIDENTS,
    )
    def save_next(
        self, advance: int, metrics: dict[str, float], force: bool, accident: Accident | None
    ) -> None:
        self.save(self.position + advance, metrics, force=force, overwrite=False, accident=accident)

    @precondition(lambda self: self.manager is not None)
    @rule(
        step=st.integers(0, 60),
        metrics=METRICS,
        force=st.booleans(),
        overwrite=st.booleans(),
        accident=ACCIDENTS,
    )
    def save_any(self, step: int, metrics: Any, force: bool, overwrite: bool, accident: Any) -> None:
        self.save(step, metrics, force=force, overwrite=overwrite, accident=accident)

    @precondition(lambda self: self.manager is not None and self.saved)
    @rule(
        choice=CHOICE,
        metrics=METRICS,
        force=st.booleans(),
        overwrite=st.booleans(),
        accident=ACCIDENTS,
    )
    def save_again(self, choice: int, metrics: Any, force: bool, overwrite: bool, accident: Any) -> None:
        damaged = [step for step, entry in self.saved.items() if entry.damage]
        step = self.choose(damaged if damaged and choice % 2 else self.saved, choice // 2)
        self.save(step, metrics, force=force, overwrite=overwrite, accident=accident)

    @precondition(lambda self: self.manager is not None)
    @rule(metrics=METRICS, force=st.booleans())
    def save_where_it_stands(self, metrics: Any, force: bool) -> None:
        self.save(self.position, metrics, force=force, overwrite=False, accident=None)

    def save(
        self, step: int, metrics: dict[str, float], *, force: bool, overwrite: bool, accident: Accident | None
    ) -> None:
        self.position = step
        call = self.new_call(step, metrics)
        manager, mind = self.manager, self.mind
        mind.has_seen_steps = True
        is_named = step == mind.failed_step or (overwrite and step == mind.last_noted)
        is_wanted = force or is_named or mind.is_due(step, self.passed_s)
        if not is_wanted:
            mind.unsaved = call if mind.policy.save_last else None
        is_saved = is_wanted and (overwrite or step != mind.last_step)
        if is_wanted and not is_saved:
            mind.unsaved = None
        if is_saved and not overwrite and self.is_there_already(step):
            mind.note(step, self.passed_s)
            mind.unsaved = None
            is_saved = False

        def operate() -> jaxckpt.PendingSave | None:
            pending = manager.save(
                step, call.tree, metrics=metrics, items=call.items, force=force, overwrite=overwrite
            )
            assert (pending is not None) == is_saved
            return pending

        self.run(operate, call if is_saved else None, accident)

    @precondition(lambda self: self.manager is not None)
    @rule(count=st.integers(2, 4), metrics=METRICS)
    def save_several_without_waiting(self, count: int, metrics: dict[str, float]) -> None:
        first = max([self.position, *self.saved]) + 1
        calls = [self.new_call(step, metrics) for step in range(first, first + count)]
        self.disk.expect(None)
        for call in calls:
            self.mind.has_seen_steps = True
            assert self.manager.save(call.step, call.tree, metrics=metrics, items=call.items, force=True)
            self.note_started(call)
        self.manager.wait()
        for call in calls:
            self.add(call)
        self.position = self.mind.last_step = calls[-1].step
        self.note_saved(calls[-1])
        self.expect_tidied()

    def is_there_already(self, step: int) -> bool:
        """Whether a save without overwrite= leaves the step alone."""
        is_doubtful = step in self.mind.damaged or step == self.mind.failed_step
        return step in self.saved and not is_doubtful

    def run(self, operate: Callable[[], Any], call: Call | None, accident: Accident | None) -> None:
        """Does something that saves, or saves nothing, and finds out what became of it."""
        manager = self.manager
        self.disk.expect(accident)
        if call is not None:
            self.note_started(call)
        failure: BaseException | None = None
        try:
            pending = operate()
            self.wait_for_threads()
            failure = None if pending is None else pending.exception()
        except Crash:
            assert self.disk.is_dead
        except jaxckpt.WriteError as error:
            assert operate == manager.close
            failure = error
        self.wait_for_threads()
        if self.disk.is_dead:
            if any(what == "committed" for what, _ in self.disk.history):
                self.mind.failed_step = None
            self.accept_history(call)
            self.bury()
            return
        if failure is not None and operate != manager.close:
            with pytest.raises(jaxckpt.WriteError):
                manager.wait()
        manager.wait()
        if call is None:
            assert self.disk.history == []
        elif self.disk.has_failed:
            self.accept_failure(call, failure)
        else:
            assert failure is None
            self.add(call)
            self.note_saved(call)
            self.expect_tidied()

    def note_started(self, call: Call) -> None:
        self.mind.note(call.step, self.passed_s)
        self.mind.last_step = call.step
        self.mind.unsaved = None

    def note_saved(self, call: Call) -> None:
        self.mind.failed_step = None
        self.mind.damaged.discard(call.step)
        self.mind.doubtful.discard(call.step)

    def accept_failure(self, call: Call, failure: BaseException | None) -> None:
        """A call of the disk failed, maybe one on which the save did not depend."""
        is_committed = any(what == "committed" for what, _ in self.disk.history)
        if failure is None:
            assert is_committed
            self.note_saved(call)
        else:
            assert isinstance(failure, jaxckpt.WriteError)
            assert ("in place" in str(failure)) == is_committed, failure
            self.mind.failed_step = call.step
            self.mind.last_step = None
        self.accept_history(call)
        if failure is not None and is_committed:
            self.mind.doubtful.add(call.step)

    def accept_history(self, call: Call | None, asked_for: int | None = None) -> None:
        """After an accident: the disk says what came and went, and the model whether it was allowed to."""
        for what, name in self.disk.history:
            step = int(name.removeprefix("step_"))
            if what == "committed":
                assert call is not None
                assert step == call.step
                self.add(call)
                # A manifest that is replaced is a new one, which nobody knows to be damaged.
                self.mind.damaged.discard(step)
            else:
                assert step == asked_for or step in self.doomed(), f"step {step} had to stay"
                del self.saved[step]
                if self.mind is not None:
                    self.mind.doubtful.discard(step)
        self.is_clean = False
        self.is_cache_exact = False

    def bury(self) -> None:
        """What a dead process leaves: no thread, no lock, no memory."""
        self.forget()
        self.disk = Disk()
        self.is_buried = False
        self.is_clean = False
        self.is_cache_exact = False
        self.unchecked |= set(self.saved)

    def add(self, call: Call) -> None:
        before = self.saved.get(call.step)
        is_pinned = before is not None and before.is_pinned
        self.saved[call.step] = Saved(call, self.name_on_disk(call.step), self.wall_s, is_pinned)
        self.unchecked.add(call.step)

    def doomed(self) -> set[int]:
        """What retention deletes now; a step whose save failed may be there, but not durable, and makes none old."""
        judged = {
            step: entry
            for step, entry in self.saved.items()
            if entry.damage != "manifest" and step not in self.mind.damaged and step != self.mind.failed_step
        }
        kept = steps_to_keep(judged, self.mind.policy, self.wall_s)
        return set(judged) - kept - {self.mind.last_step} - self.held()

    def held(self) -> set[int]:
        return {reader.step for reader in self.readers if self.saved.get(reader.step) is reader.saved}

    def expect_tidied(self) -> None:
        for step in self.doomed():
            del self.saved[step]
        self.is_clean = True
        self.is_cache_exact = True

    # --- rules: restoring -------------------------------------------------------------------------------------

    @precondition(lambda self: self.manager is not None)
    @rule(resumes=st.booleans())
    def restore_newest(self, resumes: bool) -> None:
        mind = self.mind
        candidates = sorted(set(self.saved) - mind.left_out, reverse=True)
        whole = [step for step in candidates if not self.saved[step].damage]
        if whole:
            mind.damaged |= {step for step in candidates if step > whole[0]}
            if resumes:
                step, tree = self.manager.resume()
                assert step == whole[0]
                self.position = step
            else:
                tree = self.manager.restore()
            assert_same_tree(tree, self.saved[whole[0]].call.tree)
            if resumes or not mind.has_seen_steps:
                mind.begin_from(whole[0], self.passed_s)
            return
        mind.damaged |= set(candidates)
        if set(self.saved) - mind.doubtful:
            with pytest.raises(jaxckpt.CorruptError):
                self.manager.resume() if resumes else self.manager.restore()
        elif resumes:
            assert self.manager.resume() is None
        else:
            with pytest.raises(jaxckpt.NotFoundError):
                self.manager.restore()

    @precondition(lambda self: self.manager is not None)
    @rule()
    def restore_newest_without_fallback(self) -> None:
        candidates = sorted(set(self.saved) - self.mind.left_out)
        if candidates and self.saved[candidates[-1]].damage:
            with pytest.raises(DAMAGE):
                self.manager.restore(fallback=False)

    @precondition(lambda self: self.manager is not None)
    @rule(choice=CHOICE)
    def restore_a_step(self, choice: int) -> None:
        step = self.choose([*self.saved, 61], choice)
        if step not in self.saved:
            with pytest.raises(jaxckpt.NotFoundError):
                self.manager.restore(step)
        elif self.saved[step].damage:
            with pytest.raises(DAMAGE):
                self.manager.restore(step)
        else:
            assert_same_tree(self.manager.restore(step), self.saved[step].call.tree)
            if not self.mind.has_seen_steps:
                self.mind.begin_from(step, self.passed_s)

    # --- rules: deleting and pinning --------------------------------------------------------------------------

    @precondition(lambda self: self.manager is not None)
    @rule(choice=CHOICE, accident=ACCIDENTS)
    def delete(self, choice: int, accident: Accident | None) -> None:
        step = self.choose([*self.saved, 61], choice)
        if step not in self.saved:
            with pytest.raises(jaxckpt.NotFoundError):
                self.manager.delete(step)
        elif step in self.held():
            with pytest.raises(jaxckpt.CheckpointError, match="being read"):
                self.manager.delete(step)
        elif self.happened(lambda: self.manager.delete(step), accident):
            self.accept_history(None, asked_for=step)
            if self.disk.is_dead:
                self.bury()
            elif self.mind.last_step == step and step not in self.saved:
                self.mind.last_step = self.manager._keeper.last_step  # depends on how far it came
        else:
            del self.saved[step]
            self.mind.damaged.discard(step)
            self.mind.doubtful.discard(step)
            if self.mind.last_step == step:
                self.mind.last_step = None
            self.is_cache_exact = True

    @precondition(lambda self: self.manager is not None)
    @rule(accident=ACCIDENTS)
    def prune(self, accident: Accident | None) -> None:
        doomed = self.doomed()
        deleted: list[int] = []
        if self.happened(lambda: deleted.extend(self.manager.prune()), accident):
            self.accept_history(None)
            if self.disk.is_dead:
                self.bury()
            return
        assert set(deleted) == doomed
        for step in doomed:
            del self.saved[step]
        self.is_cache_exact |= bool(doomed)

    @precondition(lambda self: self.manager is not None and self.saved)
    @rule(choice=CHOICE, accident=ACCIDENTS, pins=st.booleans())
    def pin_or_unpin(self, choice: int, accident: Accident | None, pins: bool) -> None:
        step = self.choose(self.saved, choice)
        act = self.manager.pin if pins else self.manager.unpin
        if self.happened(lambda: act(step), accident):
            self.saved[step].is_pinned = (self.root / self.saved[step].name / "pinned").exists()
            self.accept_history(None)
            if self.disk.is_dead:
                self.bury()
            return
        self.saved[step].is_pinned = pins

    def happened(self, operate: Callable[[], None], accident: Accident | None) -> bool:
        """Does it; whether a call of the disk failed or was the last."""
        self.disk.expect(accident)
        try:
            operate()
        except Crash:
            assert self.disk.is_dead
        except OSError:
            assert self.disk.has_failed
        return self.disk.is_dead or self.disk.has_failed

    # --- rules: what others do --------------------------------------------------------------------------------

    @precondition(lambda self: self.saved)
    @rule(choice=CHOICE, how=st.sampled_from(["open", "watch"]))
    def begin_to_read(self, choice: int, how: str) -> None:
        whole = [step for step, entry in self.saved.items() if entry.damage != "manifest"]
        if not whole or len(self.readers) == 3:
            return
        step = self.choose(whole, choice)
        entry = self.saved[step]
        if how == "open":
            checkpoint = jaxckpt.open(self.root / entry.name)
            reader = Reader(step, entry, checkpoint, lambda: None)
        else:
            step = max(self.saved)
            watcher = jaxckpt.CheckpointManager(self.root).watch(timeout_s=0)
            assert next(watcher) == step
            reader = Reader(step, self.saved[step], None, watcher.close)
        self.readers.append(reader)

    @precondition(lambda self: self.readers)
    @rule(choice=CHOICE)
    def end_to_read(self, choice: int) -> None:
        reader = self.readers.pop(choice % len(self.readers))
        is_there = self.saved.get(reader.step) is reader.saved
        self.is_clean &= is_there  # the data that an overwrite left to it
        if reader.checkpoint is not None and is_there and not reader.saved.damage:
            assert_same_tree(jaxckpt.restore(reader.checkpoint), reader.saved.call.tree)
        reader.close()

    @precondition(lambda self: self.saved)
    @rule(
        choice=CHOICE,
        damage=st.sampled_from(["flip data", "lose data", "flip manifest", "cut manifest"]),
    )
    def damage(self, choice: int, damage: str) -> None:
        step = self.choose(self.saved, choice)
        entry = self.saved[step]
        if entry.damage:
            return
        directory = self.root / entry.name
        if damage.endswith("manifest"):
            path = directory / MANIFEST
            content = bytearray(path.read_bytes())
            before = path.stat()
            content[20] ^= 4
            if damage == "cut manifest":
                del content[10:]
            path.write_bytes(content)
            # Time enough has passed since it was written.
            os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 10**9))
            entry.damage = "manifest"
            if self.mind is not None:
                self.mind.damaged.discard(step)
                self.mind.doubtful.discard(step)
        else:
            (pack,) = (directory / jaxckpt.open(directory).manifest.data).glob("packs/*")
            content = bytearray(pack.read_bytes())
            content[0] ^= 1
            pack.write_bytes(content) if damage == "flip data" else pack.unlink()
            entry.damage = "data"
        self.unchecked.add(step)
        self.is_cache_exact = False

    @rule(how=st.sampled_from(["delete", "cut", "garbage", "old"]), choice=CHOICE)
    def spoil_the_cache(self, how: str, choice: int) -> None:
        path = self.root / CACHE
        if not path.exists():
            return
        content = path.read_bytes()
        self.old_caches.append(content)
        if how == "delete":
            path.unlink()
        elif how == "cut":
            path.write_bytes(content[: len(content) // 2])
        elif how == "garbage":
            path.write_bytes(b'{"checkpoints": [7], "checksum": null}')
        else:
            path.write_bytes(self.choose(self.old_caches, choice))
        self.is_cache_exact = False

    @rule(jump_s=st.sampled_from([-YEAR_S, -10 * MINUTE_S, -MINUTE_S, MINUTE_S, 10 * MINUTE_S, YEAR_S]))
    def wall_clock_jumps(self, jump_s: float) -> None:
        self.wall_s = max(0.0, self.wall_s + jump_s)

    @rule(elapsed_s=st.sampled_from([1.0, 20.0, 100.0]))
    def time_passes(self, elapsed_s: float) -> None:
        self.wall_s += elapsed_s
        self.passed_s += elapsed_s

    @precondition(lambda self: self.saved)
    @rule()
    def copy_the_directory(self) -> None:
        self.forget()
        self.readers_leave()
        copy = self.home / f"run {int(self.root.name.split()[1]) + 1}"
        shutil.copytree(self.root, copy)
        shutil.rmtree(self.root)
        self.root = copy
        self.unchecked |= set(self.saved)

    @precondition(lambda self: self.saved)
    @rule(choice=CHOICE, width=st.integers(1, 10))
    def rename_a_step(self, choice: int, width: int) -> None:
        entry = self.saved[self.choose(self.saved, choice)]
        name = f"step_{entry.call.step:0{width}d}"
        if entry.call.step not in self.held() and not (self.root / name).exists():
            (self.root / entry.name).rename(self.root / name)
            self.foreign = {
                name + path.removeprefix(entry.name) if path.startswith(f"{entry.name}/") else path
                for path in self.foreign
            }
            entry.name = name
            self.is_cache_exact = False

    @rule(choice=CHOICE)
    def put_a_foreign_file(self, choice: int) -> None:
        places = ["", "other", "step_x", *(entry.name for entry in self.saved.values())]
        directory = self.root / self.choose(places, choice)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "notes.txt").write_text(NOTES)
        self.foreign.add(str((directory / "notes.txt").relative_to(self.root)))

    # --- what must be so after each of them -------------------------------------------------------------------

    @invariant()
    def all_is_well(self) -> None:
        self.no_thread_and_no_memory_is_left()
        self.the_manager_tells_what_is_there()
        self.what_was_saved_is_there_bit_for_bit()
        self.nothing_else_is_there()
        self.the_cache_says_the_same()

    def no_thread_and_no_memory_is_left(self) -> None:
        assert [thread.name for thread in threading.enumerate() if thread.name.startswith("jaxckpt")] == []
        assert HOST_MEMORY.bytes_in_use == 0

    def the_manager_tells_what_is_there(self) -> None:
        if self.manager is None:
            return
        mind = self.mind
        listed = {step: entry for step, entry in self.saved.items() if step not in mind.left_out}
        assert self.manager.steps() == sorted(listed)
        assert self.manager.latest_step() == max(listed, default=None)
        ranked = {step: entry for step, entry in listed.items() if entry.damage != "manifest"}
        for best in (LOSS, ACCURACY):
            assert self.manager.best_step(best) == next(iter(ranking(ranked, best)), None)
        readable = {
            step: entry
            for step, entry in self.saved.items()
            if entry.damage != "manifest" and step not in mind.damaged
        }
        kept = steps_to_keep(readable, mind.policy, self.wall_s)
        verdicts = {verdict.step: verdict.is_kept for verdict in self.manager.explain()}
        assert verdicts == {step: step not in readable or step in kept for step in self.saved}

    def what_was_saved_is_there_bit_for_bit(self) -> None:
        there = {path.parent.name for path in self.root.glob(f"*/{MANIFEST}")}
        assert there == {entry.name for entry in self.saved.values()}
        for step in self.unchecked & set(self.saved) | {max(self.saved, default=-1)} - {-1}:
            entry = self.saved[step]
            path = self.root / entry.name
            if entry.damage:
                with pytest.raises(DAMAGE):
                    jaxckpt.restore(path)
                continue
            checkpoint = jaxckpt.open(path)
            assert_same_tree(jaxckpt.restore(checkpoint), entry.call.tree)
            assert checkpoint.items == entry.call.items
            assert checkpoint.created_s == entry.time_s
            assert repr(sorted(checkpoint.metrics.items())) == repr(sorted(entry.call.metrics.items()))
        self.unchecked.clear()

    def nothing_else_is_there(self) -> None:
        for path in self.foreign:
            assert (self.root / path).read_text() == NOTES
        reads_what_is_replaced = any(
            self.saved.get(reader.step) is not reader.saved for reader in self.readers
        )
        if not self.is_clean or reads_what_is_replaced:
            return
        expected = {entry.name for entry in self.saved.values()} | {
            path.split("/")[0] for path in self.foreign
        }
        found = set(os.listdir(self.root)) if self.root.exists() else set()
        assert found - {CACHE} == expected, found
        for entry in self.saved.values():
            inside = set(os.listdir(self.root / entry.name))
            data = {name for name in inside if name.startswith("data-")}
            # A damaged manifest may name any of those that overwrites left.
            assert len(data) == 1 or entry.damage == "manifest", inside
            own = {MANIFEST, "zarr.json"} | ({"pinned"} if entry.is_pinned else set())
            foreign = {"notes.txt"} if f"{entry.name}/notes.txt" in self.foreign else set()
            assert inside - data == own | foreign

    def the_cache_says_the_same(self) -> None:
        if not self.is_cache_exact:
            return
        readable = {step: entry for step, entry in self.saved.items() if entry.damage != "manifest"}
        path = self.root / CACHE
        if not path.exists():
            assert not readable
            return
        document = json.loads(path.read_text())
        newest = max(readable, default=None)
        assert document["latest"] == (None if newest is None else readable[newest].name)
        entries = {entry["step"]: entry for entry in document["checkpoints"]}
        assert sorted(entries) == sorted(readable)
        for step, entry in readable.items():
            assert entries[step]["name"] == entry.name
            assert entries[step]["time_s"] == entry.time_s
            metrics = {name: repr(float(value)) for name, value in entries[step]["metrics"].items()}
            assert metrics == {name: repr(value) for name, value in entry.call.metrics.items()}

    def teardown(self) -> None:
        self.wait_for_threads()
        self.readers_leave()
        shutil.rmtree(self.home, ignore_errors=True)

    # --- helpers ----------------------------------------------------------------------------------------------

    def wait_for_threads(self) -> None:
        if self.manager is not None:
            for pending in self.manager._background._idle:
                pending.wait_until_idle()
                pending.mark_seen()

    def readers_leave(self) -> None:
        for reader in self.readers:
            self.is_clean &= self.saved.get(reader.step) is reader.saved
            reader.close()
        self.readers.clear()

    def choose(self, values: Any, choice: int) -> Any:
        values = list(values)
        return values[choice % len(values)]

    def new_call(self, step: int, metrics: dict[str, float]) -> Call:
        self.trees += 1
        tree = {
            "w": np.arange(5, dtype=np.float32) * self.trees,
            "device": jnp.full(3, self.trees, jnp.bfloat16),
            "count": self.trees,
        }
        return Call(step, tree, metrics, {"position": self.trees} if self.trees % 2 else {})

    def name_on_disk(self, step: int) -> str:
        names = [path.parent.name for path in self.root.glob(f"*/{MANIFEST}")]
        (name,) = [name for name in names if name.startswith("step_") and int(name[5:]) == step] or ["gone"]
        return name


@pytest.fixture
def quick_collection() -> Iterator[None]:
    """Crashes need a collection each; what the interpreter has loaded by now plays no part in it."""
    level = logging.getLogger("jaxckpt").level
    logging.getLogger("jaxckpt").setLevel(logging.CRITICAL + 1)
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
        logging.getLogger("jaxckpt").setLevel(level)


def run_machine(examples: int) -> None:
    run_state_machine_as_test(
        ManagerMachine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=30,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            print_blob=True,
        ),
    )


@pytest.mark.slow
def test_no_order_of_events_makes_the_manager_lose_a_step_or_leave_litter(quick_collection):
    run_machine(int(os.environ.get("JAXCKPT_TEST_EXAMPLES", "50")))
