"""How does a training loop keep a directory of numbered checkpoints?

`CheckpointManager.save` is called at every step. Most calls return at once: a `Schedule` says which are due. A due one
is a `PendingSave` into a directory of its own, ``step_00001200``. When that is committed, and never before, the rules
of `Retention` decide which older steps go, and a background thread deletes them.

    caller's thread      is it due? -> wait for the save in flight, or skip -> snapshot -> goes on
    background thread    write -> commit -> [the save is done] -> sweep, delete, checkpoint.json

Invariants:

* The manager believes the directory alone: `steps` are the directories with a manifest, whoever wrote them.
* One save is in flight at a time. Its failure is logged, kept for `wait`, and changes nothing for the next save.
* Nothing is changed before the first `save`, so that any number of other processes may read with managers of their own.
* What is being read is not deleted: a reader holds the manifest (`Hold`), and the deletion is tried again after the
  next save.

Deliberately not here: when to save (`_schedule`), what to keep (`_retention`), what is in the directory (`_steps`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import logging
import operator
import os
import sys
import threading
import time
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Literal, Self, final

from ._checkpoint import restore
from ._config import SaveOptions
from ._errors import (
    CheckpointError,
    CorruptError,
    FormatError,
    NotFoundError,
    Problem,
    UnsupportedLeafError,
    list_problems,
)
from ._manifest import MANIFEST_NAME
from ._pending import PendingSave, chain_of
from ._preemption import Preemption
from ._reading import Checkpoint, open_checkpoint
from ._retention import Best, Retention, Verdict, best_step, judge_steps
from ._saving import CheckpointInfo, SaveContext, SaveJob, write_error
from ._schedule import Schedule
from ._steps import StepDirectory, StepRecord
from ._store import Store, open_store
from ._terminal import ProgressBar

_log = logging.getLogger("jaxckpt")

_FORCED = "force=True"
_PREEMPTED = "preemption"
_LAST = "the last step"
_RETRIED = "its save failed before"
_UNKNOWN = "unknown"  # in the place of a fingerprint
# Reasons for which a save waits for the one in flight even where others are skipped.
_URGENT = (_FORCED, _PREEMPTED, _LAST)


@dataclasses.dataclass(frozen=True, slots=True)
class CheckpointEvent:
    """Something that a manager did.

    Attributes:
      kind: ``"saving"`` (a save began), ``"saved"``, ``"failed"``, ``"skipped"`` (a due step was not saved),
        ``"waited"`` (for the save in flight), ``"deleted"``, ``"in use"`` (not deleted, for somebody reads it),
        ``"damaged"``, ``"restored"`` or ``"preempted"``.
      step: The step that it is about.
      message: The same for people.
      info: What was saved, for ``"saved"``.
      error: Why not, for ``"failed"`` and ``"damaged"``.
    """

    kind: str
    step: int
    message: str
    info: CheckpointInfo | None = None
    error: BaseException | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class _Call:
    """The arguments of a call of `CheckpointManager.save`."""

    step: int
    tree: Any
    metrics: Mapping[str, Any] | None
    items: Mapping[str, Any] | None
    metadata: Any


@final
class CheckpointManager:
    """A directory of numbered checkpoints, with rules for which steps to save and which to keep.

    Making one changes nothing on storage and reads nothing; the first `save` makes the directory and sweeps what
    crashed saves left there. One process may save into a directory; any number may read it.

    Rules for saving. A step is due when any of these says so; with none, every step is.

    Rules for keeping. A step stays if any of these keeps it; the newest always stays. See `explain`.

    Args:
      directory: Directory (or ``s3://``, ``gs://``, ``memory://`` URL).
      save_interval_steps: Save when a multiple of so many steps is reached or passed.
      save_interval_s: Save when so many seconds have passed since the last save.
      save_steps: Save at these steps: any container of ints.
      save_when: Save when ``save_when(step, metrics)`` is true; asked when nothing else made the step due.
      save_first: Whether to save the first step of a run that did not resume.
      save_last: Whether `close` saves the last step that `save` was called with, if it was not due. Its tree is held
        until the next call, and is saved as it is at the end, with its items and metrics: a NumPy array that was
        changed since, or an iterator that has moved on, is saved in its later state.
      max_overhead: Largest share of the run's time, between 0 and 1, that the loop may spend blocked by saves. Saves
        by intervals (by default: every step) are put off until the share allows one more. On CPU a save waits for
        the computations that are queued, which counts too.
      if_busy: What a due save does while another one is in flight: ``"wait"`` for it, or ``"skip"``, and the next
        step is due. Forced saves and preemptions always wait.
      preemption: Announces the end of the process; then the next step is due, and `should_stop` becomes true. The
        manager installs it, and uninstalls it when it is closed.
      max_to_keep: The newest so many steps stay. None: all.
      keep_period: Every step that is a multiple of this stays.
      keep_interval_s: A step stays for each so many seconds of time between commits.
      best: The best steps by a metric stay; one `Best` or several.
      time_to_live_s: `max_to_keep` keeps no step that is older than this.
      pinned: These steps stay; see also `pin`.
      prefix: What the names of the steps' directories begin with.
      width: Least number of digits in those names. Any width is read.
      options: How a save is written.
      on_event: Called with a `CheckpointEvent` for whatever happens, from several threads. What it raises is logged.
      progress: Whether to show a progress bar on stderr, if that is a terminal.
      monotonic_s: Clock for intervals and overhead, in seconds.
      wall_s: Clock for the times of checkpoints, in seconds since 1970.

    Example:
      >>> with jaxckpt.CheckpointManager(tmp / "run", save_interval_steps=2, max_to_keep=2) as manager:
      ...     for step in range(8):
      ...         _ = manager.save(step, {"w": jnp.full(3, step)}, metrics={"loss": 1 / (step + 1)})
      >>> manager.steps()
      [6, 7]
      >>> manager.restore()
      {'w': Array([7, 7, 7], dtype=int32, weak_type=True)}
    """

    def __init__(
        self,
        directory: str | os.PathLike[str] | Store,
        *,
        save_interval_steps: int | None = None,
        save_interval_s: float | None = None,
        save_steps: Container[int] = (),
        save_when: Callable[[int, Mapping[str, Any]], bool] | None = None,
        save_first: bool = False,
        save_last: bool = True,
        max_overhead: float | None = None,
        if_busy: Literal["wait", "skip"] = "wait",
        preemption: Preemption | None = None,
        max_to_keep: int | None = 5,
        keep_period: int | None = None,
        keep_interval_s: float | None = None,
        best: Best | Sequence[Best] | None = None,
        time_to_live_s: float | None = None,
        pinned: Iterable[int] = (),
        prefix: str = "step_",
        width: int = 8,
        options: SaveOptions | None = None,
        on_event: Callable[[CheckpointEvent], None] | None = None,
        progress: bool = False,
        monotonic_s: Callable[[], float] = time.monotonic,
        wall_s: Callable[[], float] = time.time,
    ) -> None:
        if if_busy not in ("wait", "skip"):
            raise ValueError(f"if_busy must be 'wait' or 'skip', not {if_busy!r}")
        self._directory = StepDirectory(open_store(directory), prefix, width)
        self._schedule = Schedule(
            interval_steps=save_interval_steps,
            interval_s=save_interval_s,
            steps=save_steps,
            when=save_when,
            save_first=save_first,
            max_overhead=max_overhead,
            clock=monotonic_s,
        )
        self._retention = Retention(
            max_to_keep=max_to_keep,
            keep_period=keep_period,
            keep_interval_s=keep_interval_s,
            best=(best,) if isinstance(best, Best) else tuple(best or ()),
            time_to_live_s=time_to_live_s,
            pinned=frozenset(pinned),
        )
        self._saves_last = save_last
        self._skips_if_busy = if_busy == "skip"
        self._options = options or SaveOptions()
        self._on_event = on_event
        self._bar = ProgressBar(sys.stderr) if progress else None
        self._monotonic_s = monotonic_s
        self._wall_s = wall_s

        self._is_closed = False
        self._is_swept = False
        self._has_warned_of_metrics = False
        self._listeners: list[Callable[[int, Any], None]] = []
        # Of the thread that saves.
        self._has_seen_steps = False
        self._unsaved: _Call | None = None
        self._pending: PendingSave | None = None
        self._pending_step = -1
        self._is_preempted = False
        self._has_answered_preemption = False
        self._has_no_time_left = False  # for another save than the one in flight
        # Shared with background threads.
        self._lock = threading.Lock()
        self._tidy_lock = threading.RLock()  # an observer of a deletion may pin and delete
        self._idle: list[PendingSave] = []  # done, but their threads may still delete
        self._failures: list[PendingSave] = []
        self._last_step: int | None = None  # in flight or committed by this manager, or restored by it
        self._failed_step: int | None = None
        self._fingerprint_before: Any = None  # of the step in flight, before its save
        self._last_info: CheckpointInfo | None = None
        # Fingerprints of what counts as no step: what proved damaged, and what a failed save has put there, which may
        # be gone when the machine fails.
        self._damaged: dict[int, Any] = {}
        self._doubtful: dict[int, Any] = {}

        self._preemption: Preemption | None = None
        if preemption is not None:
            self.use_preemption(preemption)

    # --- saving -----------------------------------------------------------------------------------------------

    def save(
        self,
        step: int,
        tree: Any,
        *,
        metrics: Mapping[str, Any] | None = None,
        items: Mapping[str, Any] | None = None,
        metadata: Any = None,
        force: bool = False,
        overwrite: bool = False,
    ) -> PendingSave | None:
        """Saves a step if it is due; to be called at every step, always from the same thread.

        A step is saved once: another call for it returns None. When storage refuses, training is not stopped: the
        result is a `PendingSave` that has failed, the failure is logged, and the next save is tried as if nothing had
        happened.

        Args:
          step: Number of the step, from 0.
          tree: As for `jaxckpt.save`. When this returns, it may be donated.
          metrics: Numbers by name, on devices too, to choose the best steps by.
          items: As for `jaxckpt.save`.
          metadata: As for `jaxckpt.save`.
          force: Whether to save although the step is not due.
          overwrite: Whether to replace the step if it is there from an earlier run.

        Returns:
          The save, or None: the step was not due, is there already, or was skipped because another save is in flight.
          On preemption with too little time for another save, the one in flight.

        Raises:
          UnsupportedLeafError: As for `jaxckpt.save`.
          ValueError: The manager is closed.

        Host memory: as for `save_async`; the snapshots of all saves together stay within ``host_bytes_max``.
        Blocks for: less than 20 microseconds when not due; else as `save_async`, after the save in flight.

        Example:
          >>> manager = jaxckpt.CheckpointManager(tmp / "run", save_interval_steps=100)
          >>> manager.save(99, {"w": jnp.ones(3)}) is None
          True
          >>> manager.save(100, {"w": jnp.ones(3)}).wait().step
          100
        """
        step = _checked_step(step)
        if self._is_closed:
            raise ValueError(f"the manager of {self._directory.path!r} is closed")
        self._has_seen_steps = True
        reason = self._reason_to_save(step, metrics, force=force)
        if reason is None:
            self._unsaved = _Call(step, tree, metrics, items, metadata) if self._saves_last else None
            return None
        return self._save_due(_Call(step, tree, metrics, items, metadata), reason, overwrite=overwrite)

    def _reason_to_save(self, step: int, metrics: Mapping[str, Any] | None, *, force: bool) -> str | None:
        if self._preemption is not None and not self._is_preempted and self._preemption.is_requested(step):
            self._is_preempted = True
            self._tell("preempted", step, f"the end of the process is announced; step {step} is saved")
        if force:
            return _FORCED
        if self._is_preempted and not self._has_answered_preemption:
            return _PREEMPTED
        if step == self._failed_step:
            return _RETRIED
        return self._schedule.reason_to_save(step, metrics)

    def _save_due(self, call: _Call, reason: str, *, overwrite: bool) -> PendingSave | None:
        entered_s = self._monotonic_s()
        step = call.step
        if step == self._last_step and not overwrite:
            self._has_answered_preemption |= self._is_preempted
            self._unsaved = None
            return None
        in_flight = self._in_flight()
        if in_flight is not None and reason == _PREEMPTED and not self._has_time_for_another(in_flight):
            self._has_answered_preemption = True
            self._has_no_time_left = True
            self._unsaved = call if self._saves_last else None
            self._tell(
                "skipped",
                step,
                f"step {step} is not saved: too little time is left, and step {self._pending_step} is on its way",
            )
            return in_flight
        if in_flight is not None and self._skips_if_busy and reason not in _URGENT:
            self._schedule.note_skipped(reason)
            self._unsaved = call if self._saves_last else None
            self._tell(
                "skipped", step, f"step {step} is not saved: step {self._pending_step} is still on its way"
            )
            return None
        waited_s = 0.0
        if in_flight is not None:
            in_flight.wait_done()
            waited_s = self._monotonic_s() - entered_s
            self._tell("waited", step, f"step {step} waited {waited_s:.3f} s for step {self._pending_step}")
        try:
            is_there = not overwrite and self._is_there_already(step)
        except OSError as error:
            return self._fail_to_look(step, error)
        if is_there:
            self._has_answered_preemption |= self._is_preempted
            self._unsaved = None
            return None
        return self._start(call, reason, waited_s, entered_s)

    def _start(self, call: _Call, reason: str, waited_s: float, entered_s: float) -> PendingSave:
        step = call.step
        began_s = time.perf_counter()
        self._warn_of_missing_metrics(call)
        for listener in self._listeners:
            listener(step, call.tree)
        if not self._is_swept:
            self._sweep_once()
        context = SaveContext(
            metadata=call.metadata,
            items=call.items,
            metrics=call.metrics,
            step=step,
            began_s=began_s,
            waited_s=waited_s,
            wall_s=self._wall_s,
            newest_good=self._newest_good,
            on_progress=None if self._bar is None else self._bar.show,
        )
        store = self._directory.begin(step)
        self._fingerprint_before = _UNKNOWN
        with contextlib.suppress(OSError):  # the save will meet it, too
            self._fingerprint_before = store.fingerprint(MANIFEST_NAME)
        pending = PendingSave(
            store.path, functools.partial(self._on_end, step), functools.partial(self._tidy, step)
        )
        self._tell("saving", step, f"saving step {step}: {reason}")
        with self._lock:
            self._last_step = step
        self._schedule.note_saved(step)
        job: SaveJob | None = None
        try:
            job = SaveJob(store, call.tree, True, context, self._options, is_blocking=False)
            self._pending, self._pending_step = pending, step
            self._idle = [old for old in self._idle if old.is_busy()]
            self._idle.append(pending)
            pending.start(job)
        except BaseException as error:  # an interrupt, too
            if not pending.done() and job is not None:
                job.abandon(error)
            is_of_the_caller = not isinstance(error, CheckpointError) or isinstance(
                error, UnsupportedLeafError
            )
            if is_of_the_caller:
                self._forget(pending)
                raise
            if not pending.done():
                pending.fail(error)
            # The failure is kept, and would keep this frame and those of all callers, with the trees in them.
            for link in chain_of(error):
                link.__traceback__ = None
        finally:
            self._schedule.note_blocked(self._monotonic_s() - entered_s)
        self._unsaved = None
        self._has_answered_preemption |= self._is_preempted
        return pending

    def _fail_to_look(self, step: int, error: OSError) -> PendingSave:
        """Storage does not say what is there: nothing is overwritten blindly, and the loop goes on."""
        store = self._directory.usual_store_of(step)
        failure = write_error(store, error, self._newest_good(), is_committed=False)
        failure.__cause__ = error
        self._schedule.note_resumed(step)
        self._unsaved = None
        self._has_answered_preemption |= self._is_preempted
        pending = PendingSave(store.path, functools.partial(self._on_end, step))
        pending.fail(failure)
        return pending

    def _warn_of_missing_metrics(self, call: _Call) -> None:
        """A typo in ``best=`` would have the best steps deleted in silence; said once."""
        missing = [best.metric for best in self._retention.best if best.metric not in (call.metrics or {})]
        if missing and not self._has_warned_of_metrics:
            self._has_warned_of_metrics = True
            _log.warning(
                "step %d has no metric %s, by which best= shall keep steps",
                call.step,
                ", ".join(map(repr, missing)),
            )

    def _forget(self, pending: PendingSave) -> None:
        """The caller's mistake, or an interrupt, ended a save: it is raised there, and nowhere else."""
        self._directory.end()
        self._schedule.note_given_up()
        pending.mark_seen()
        if self._pending is pending:
            self._pending = None
        with self._lock:
            self._last_step = None
            self._failures = [failed for failed in self._failures if failed is not pending]

    def _in_flight(self) -> PendingSave | None:
        """The save that is not done yet."""
        return None if self._pending is None or self._pending.done() else self._pending

    def _has_time_for_another(self, in_flight: PendingSave) -> bool:
        """Whether the grace that is left is enough for the rest of a save and for another one, as the last one went."""
        assert self._preemption is not None
        remaining_s = self._preemption.remaining_s()
        if remaining_s is None or self._last_info is None:
            return True
        one_save_s = self._last_info.seconds - self._last_info.waited_s
        rest_s = max(0.0, one_save_s - in_flight.progress().elapsed_s)
        return rest_s + one_save_s <= remaining_s

    def _is_there_already(self, step: int) -> bool:
        """Whether a step is committed; says so, for it is another run's."""
        fingerprint = self._directory.fingerprint_of(step)
        if fingerprint is None or self._damaged.get(step) == fingerprint:
            return False
        if step == self._failed_step == self._pending_step:
            return False  # this manager wrote it, and it may not be durable
        self._schedule.note_resumed(step)
        message = (
            f"step {step} is not saved: it is in {self._directory.path!r} already, from an earlier run\n"
            "resume from the newest step, delete that one, or pass overwrite=True"
        )
        _log.warning("%s", message)
        self._tell("skipped", step, message)
        return True

    def _sweep_once(self) -> None:
        """Makes room before the first save, for a crash may have filled the disk."""
        self._is_swept = True
        try:
            self._directory.sweep_all()
        except OSError as error:
            self._is_swept = False
            _log.warning("cannot sweep %r: %s", self._directory.path, error)

    def _newest_good(self) -> str:
        try:
            newest = self.latest_step()
        except OSError:
            return "what is in the directory cannot be found out"
        return "no step is committed" if newest is None else f"the newest committed step is {newest}"

    def _on_end(self, step: int, pending: PendingSave) -> None:
        """Called in the background when a save has ended."""
        self._directory.end()
        if self._bar is not None:
            self._bar.close()
        failure = pending.failure
        late = None if failure is None else self._late_fingerprint(step)
        with self._lock:
            if failure is not None:
                if late is not None:
                    self._doubtful[step] = late
                # Who has seen one may have left frames in it.
                self._failures = [older for older in self._failures if older.is_unseen()] + [pending]
                self._failed_step = step
                self._is_swept = False  # storage that refuses to write may refuse to delete, too
                if self._last_step == step:
                    self._last_step = None
            else:
                self._last_info = pending.info
                self._failed_step = None
                self._damaged.pop(step, None)
                self._doubtful.pop(step, None)
                for older in self._failures:
                    older.mark_seen()  # made up for: the program's exit status stays
                del self._failures[:-1]  # of many failures the last one is told
        if failure is not None:
            self._tell("failed", step, f"step {step} is not saved: {failure}", error=failure)
        elif pending.info is not None:
            self._tell("saved", step, f"saved step {step} in {pending.info.seconds:.3f} s", info=pending.info)

    def _late_fingerprint(self, step: int) -> Any:
        """Fingerprint of what a failed save has put in place all the same, or None."""
        try:
            fingerprint = self._directory.fingerprint_of(step)
        except OSError:
            return None
        is_changed = self._fingerprint_before not in (_UNKNOWN, fingerprint)
        return fingerprint if is_changed else None

    def _tidy(self, step: int) -> None:
        """Called in the background after a save of this step, while nobody waits."""
        with self._tidy_lock:
            try:
                self._directory.sweep()
                # What was replaced may have been too damaged to be removed, or in use.
                self._directory.sweep_step(step)
            except OSError as error:
                self._is_swept = False
                _log.warning("cannot sweep %r: %s", self._directory.path, error)
            try:
                self._delete_old()
            except OSError as error:
                _log.warning("cannot look for old steps in %r: %s", self._directory.path, error)
            self._write_cache()

    def _write_cache(self) -> None:
        """Nothing depends on it, so that nothing fails with it."""
        try:
            self._directory.write_cache()
        except OSError as error:
            self._is_swept = False
            _log.warning("cannot write checkpoint.json in %r: %s", self._directory.path, error)

    # --- keeping ----------------------------------------------------------------------------------------------

    def explain(self) -> list[Verdict]:
        """Says of every step whether the rules keep it, as the directory is, and why; changes nothing.

        A step that goes is deleted after the next save, unless somebody reads it. That save is one step more, so that
        others may go, too.

        Returns:
          One verdict for each committed step, ascending.

        Example:
          >>> manager = jaxckpt.CheckpointManager(tmp / "run", max_to_keep=1, keep_period=2)
          >>> for step in range(4):
          ...     _ = manager.save(step, {"w": jnp.ones(3)})
          >>> manager.wait()
          >>> for verdict in manager.explain():
          ...     print(verdict)
          step 0 stays: every 2 steps
          step 2 stays: every 2 steps
          step 3 stays: the newest step; one of the newest 1
        """
        records = self._directory.records()
        verdicts = {verdict.step: verdict for verdict in self._judge(records)}
        for step in self._directory.committed():
            if step not in verdicts:
                verdicts[step] = Verdict(step, True, ("it cannot be read, and is left alone",))
        return [verdicts[step] for step in sorted(verdicts)]

    def prune(self) -> list[int]:
        """Deletes the steps that no rule keeps, without saving.

        Returns:
          The steps that were deleted. Those that somebody reads, and the one that training goes on from, stay.

        Example:
          >>> with jaxckpt.CheckpointManager(tmp / "run", max_to_keep=None) as manager:
          ...     for step in range(4):
          ...         _ = manager.save(step, {"w": jnp.ones(3)})
          >>> jaxckpt.CheckpointManager(tmp / "run", max_to_keep=1).prune()
          [0, 1, 2]
        """
        self._wait_until_done()
        with self._tidy_lock:
            newest = self.latest_step()
            if newest is not None:
                # Another process may have renamed its manifest without having synced the directory yet.
                self._directory.store_of(newest).confirm()
            deleted = self._delete_old()
            if deleted:
                self._write_cache()
        return deleted

    def delete(self, step: int) -> None:
        """Deletes a step, whatever the rules say.

        Raises:
          NotFoundError: There is no such step.
          CheckpointError: Somebody is reading it.
        """
        self._wait_until_done()
        with self._tidy_lock:
            self._require(step)
            if not self._directory.delete(step):
                raise CheckpointError(
                    f"step {step} of {self._directory.path!r} is being read\ntry again later"
                )
            self._write_cache()
        with self._lock:
            self._damaged.pop(step, None)
            self._doubtful.pop(step, None)
            if self._last_step == step:
                self._last_step = None
        self._tell("deleted", step, f"deleted step {step}: asked for")

    def pin(self, step: int) -> None:
        """Marks a step so that every manager keeps it, in later runs too.

        Raises:
          NotFoundError: There is no such step.
        """
        with self._tidy_lock:  # not between the judgement of a step and its deletion
            self._require(step)
            self._directory.pin(step)

    def unpin(self, step: int) -> None:
        """Takes the mark of `pin` away."""
        with self._tidy_lock:
            self._require(step)
            self._directory.unpin(step)

    def _judge(self, records: list[StepRecord]) -> list[Verdict]:
        whole = [record for record in records if not self._is_damaged(record.step)]
        policy = dataclasses.replace(
            self._retention, pinned=self._retention.pinned | self._directory.pinned(whole)
        )
        return judge_steps(
            [record.step for record in whole],
            [record.created_s for record in whole],
            [record.metrics for record in whole],
            policy,
            self._wall_s(),
        )

    def _delete_old(self) -> list[int]:
        """Deletes what no rule keeps; what cannot be deleted is tried again after the next save."""
        deleted: list[int] = []
        records = self._directory.records()
        # What the save in flight, or one that failed late, has put there may not be durable: it makes no step an old
        # one. It is asked for after the records, so that a step that is in them and not unsure is durable.
        unsure = self._directory.busy
        with self._lock:
            failed = self._failed_step
        durable = [record for record in records if record.name != unsure and record.step != failed]
        for verdict in self._judge(durable):
            step = verdict.step
            # Clocks of several machines may disagree about what was committed last; this process knows what it was.
            if verdict.is_kept or step == self._last_step:
                continue
            try:
                is_deleted = self._directory.delete(step)
            except OSError as error:
                _log.warning("cannot delete step %d of %r: %s", step, self._directory.path, error)
                continue
            if is_deleted:
                deleted.append(step)
                self._tell("deleted", step, f"deleted step {step}: {'; '.join(verdict.reasons)}")
            else:
                self._tell("in use", step, f"step {step} is being read, and deleted later")
        return deleted

    # --- what is there ----------------------------------------------------------------------------------------

    def steps(self) -> list[int]:
        """The committed steps, ascending.

        Those that `restore` found damaged are left out, and one whose save failed at the very last sync: it is there,
        but may be gone when the machine fails.
        """
        return [step for step in self._directory.committed() if not self._is_left_out(step)]

    def latest_step(self) -> int | None:
        """The newest committed step, or None."""
        return max(self.steps(), default=None)

    def best_step(self, best: Best | None = None) -> int | None:
        """The best committed step by a metric; by default that of the first rule ``best=``.

        Raises:
          ValueError: Neither the manager nor the caller has a rule.
        """
        if best is None:
            if not self._retention.best:
                raise ValueError("the manager has no rule for the best step: pass best=jaxckpt.Best(...)")
            best = self._retention.best[0]
        records = [record for record in self._directory.records() if not self._is_left_out(record.step)]
        return best_step([record.step for record in records], [record.metrics for record in records], best)

    def metrics(self, step: int) -> dict[str, float]:
        """The metrics that were saved with a step.

        Raises:
          NotFoundError: There is no such step.
        """
        return self.open(step).metrics

    def path_of(self, step: int) -> str:
        """Where a committed step is.

        Raises:
          NotFoundError: There is no such step.
        """
        return self._require(step).path

    def open(self, step: int | None = None) -> Checkpoint:
        """Opens a step as `jaxckpt.open` does, by default the newest.

        Raises:
          NotFoundError: There is no such step.
          FormatError: Its manifest is damaged, or needs a newer version.
        """
        if step is not None:
            return open_checkpoint(self._require(step))
        newest = self.latest_step()
        while newest is not None:
            try:
                return open_checkpoint(self._directory.store_of(newest))
            except NotFoundError:
                before, newest = newest, self.latest_step()
                if newest == before:
                    raise
        raise NotFoundError(f"no step is committed in {self._directory.path!r}")

    @property
    def directory(self) -> str:
        """Where the steps are."""
        return self._directory.path

    def _require(self, step: int) -> Store:
        """Where a step is, which must be committed."""
        step = _checked_step(step)
        if self._directory.fingerprint_of(step) is None:
            steps = self.steps()
            there = f"it has {', '.join(map(str, steps[-10:]))}" if steps else "nothing is committed there"
            raise NotFoundError(f"there is no step {step} in {self._directory.path!r}: {there}")
        return self._directory.store_of(step)

    def _is_damaged(self, step: int) -> bool:
        fingerprint = self._damaged.get(step)
        return fingerprint is not None and fingerprint == self._directory.fingerprint_of(step)

    def _is_doubtful(self, step: int) -> bool:
        fingerprint = self._doubtful.get(step)
        return fingerprint is not None and fingerprint == self._directory.fingerprint_of(step)

    def _is_left_out(self, step: int) -> bool:
        return self._is_doubtful(step) or self._is_damaged(step)

    # --- restoring --------------------------------------------------------------------------------------------

    def restore(
        self, step: int | None = None, like: Any = None, *, fallback: bool = True, **keywords: Any
    ) -> Any:
        """Restores a step, by default the newest one that is whole.

        A save in flight is waited for. When the newest step proves damaged, that is logged, and the one before it is
        taken; the damaged one is left alone, counts no more, and may be saved anew. A step that was asked for is never
        replaced by another.

        Args:
          step: The step; None for the newest one that is whole.
          like: As for `jaxckpt.restore`.
          fallback: Whether a damaged newest step is passed over, rather than raised.
          **keywords: As for `jaxckpt.restore`: ``items``, ``mesh``, ``sharding``, ``select``, ...

        Returns:
          What `jaxckpt.restore` returns.

        Raises:
          NotFoundError: There is no such step, or none at all.
          CorruptError: The step is damaged, or all are.
          FormatError: Its manifest is damaged or needs a newer version.
          MismatchError: The tree and ``like`` differ.

        Example:
          >>> manager = jaxckpt.CheckpointManager(tmp / "run")
          >>> for step in (1, 2):
          ...     _ = manager.save(step, {"w": jnp.full(2, step)})
          >>> manager.restore()["w"].tolist(), manager.restore(1)["w"].tolist()
          ([2, 2], [1, 1])
        """
        return self._restore(step, like, fallback, keywords)[1]

    def resume(self, like: Any = None, *, fallback: bool = True, **keywords: Any) -> tuple[int, Any] | None:
        """Restores the newest step that is whole, for the start of a loop.

        Args:
          like: As for `jaxckpt.restore`.
          fallback: As for `restore`.
          **keywords: As for `jaxckpt.restore`.

        Returns:
          The step and the tree, or None when no step is committed.

        Raises:
          CorruptError: There are steps, and all of them are damaged.
          MismatchError: The tree and ``like`` differ.

        Example:
          >>> manager = jaxckpt.CheckpointManager(tmp / "run")
          >>> step, state = manager.resume() or (0, {"w": jnp.zeros(2)})
          >>> step
          0
        """
        self._wait_until_done()
        if all(self._is_doubtful(step) for step in self._directory.committed()):
            return None
        step, tree = self._restore(None, like, fallback, keywords)
        self._begin_from(step)
        return step, tree

    def _restore(
        self, step: int | None, like: Any, fallback: bool, keywords: dict[str, Any]
    ) -> tuple[int, Any]:
        self._wait_until_done()
        if step is not None:
            return step, self._restore_step(step, like, keywords)
        damage: list[Problem] = []
        cause: CheckpointError | None = None
        tried: set[int] = set()
        # Listed anew each time: a quick trainer deletes a step before it is read, and then younger ones are there.
        while candidates := [candidate for candidate in self.steps() if candidate not in tried]:
            candidate = candidates[-1]
            tried.add(candidate)
            fingerprint = self._directory.fingerprint_of(candidate)
            try:
                return candidate, self._restore_step(candidate, like, keywords)
            except NotFoundError:  # deleted since it was listed
                continue
            except CheckpointError as error:
                if not _is_damage(error) or not fallback:
                    raise
                cause = cause or error
                damage.extend(error.problems)
                with self._lock:
                    self._damaged[candidate] = fingerprint
                _log.error("step %d is damaged, the one before it is tried: %s", candidate, error)
                self._tell("damaged", candidate, f"step {candidate} is damaged: {error}", error=error)
        if cause is None and all(self._is_doubtful(step) for step in self._directory.committed()):
            raise NotFoundError(f"no step is committed in {self._directory.path!r}")
        if cause is None and self.steps():
            raise NotFoundError(f"the steps in {self._directory.path!r} are being deleted")
        headline = f"every step in {self._directory.path!r} is damaged"
        raise CorruptError(list_problems(headline, damage), damage) from cause

    def _restore_step(self, step: int, like: Any, keywords: dict[str, Any]) -> Any:
        step = _checked_step(step)
        checkpoint = open_checkpoint(self._require(step))
        try:
            tree = restore(checkpoint, like, **keywords)
        finally:
            checkpoint.release()  # not when the last traceback of an error is gone
        if not self._has_seen_steps:
            self._begin_from(step)
        self._tell("restored", step, f"restored step {step}")
        return tree

    def _begin_from(self, step: int) -> None:
        """Training goes on from a step that is on storage."""
        self._unsaved = None
        self._schedule.note_resumed(step)
        with self._lock:
            self._last_step = step

    def watch(
        self, *, timeout_s: float | None = None, poll_s: float = 1.0, after: int | None = None
    ) -> Iterator[int]:
        """Yields the newest step and then each new one, for an evaluator in another process.

        While the loop's body runs, the step is held: the process that saves does not delete it. (It is where the file
        system has locks, which local ones and NFS do.) Steps that were deleted before their turn are passed over.

        Args:
          timeout_s: Ends when no new step came for so many seconds; None waits for ever. The time that the loop's
            body takes does not count.
          poll_s: Seconds between two looks at the directory.
          after: Yields the steps above this one; None begins with the newest that is there.

        Example:
          >>> manager = jaxckpt.CheckpointManager(tmp / "run")
          >>> manager.save(3, {"w": jnp.ones(3)}).wait().step
          3
          >>> [manager.restore(step)["w"].sum() for step in manager.watch(timeout_s=0)]
          [Array(3., dtype=float32)]
        """
        present = self._directory.committed()
        newest = max(present, default=None)
        seen = {
            step: self._directory.fingerprint(name)
            for step, name in present.items()
            if after is None and step != newest
        }
        waiting_since_s = self._monotonic_s()
        pause = threading.Event()
        while True:
            for step, name in self._directory.committed().items():
                fingerprint = self._directory.fingerprint(name)
                if fingerprint is None or seen.get(step) == fingerprint:
                    continue
                if after is not None and step <= after:
                    continue
                seen[step] = fingerprint
                try:
                    _, hold = self._directory.store_of(step).read_and_hold(MANIFEST_NAME, 0)
                except FileNotFoundError:
                    continue
                try:
                    yield step
                finally:
                    if hold is not None:
                        hold.release()
                waiting_since_s = self._monotonic_s()
            left_s = poll_s
            if timeout_s is not None:
                left_s = waiting_since_s + timeout_s - self._monotonic_s()
                if left_s <= 0:
                    return
            pause.wait(min(poll_s, left_s))

    # --- the end ----------------------------------------------------------------------------------------------

    def wait(self, timeout_s: float | None = None) -> None:
        """Waits until nothing is in flight and old steps are deleted.

        Args:
          timeout_s: Most seconds to wait for the save in flight; None waits for ever.

        Raises:
          TimeoutError: The save is not finished.
          CheckpointError: A save failed since the last `wait`. The next one may have gone well.
        """
        self._wait_until_idle(timeout_s)
        with self._lock:
            failures, self._failures = self._failures, []
        self._raise_last(failures)

    def close(self) -> None:
        """Saves the last step if it is not saved yet, waits, and ends the manager; again: nothing.

        To be called before the program ends: in an exit handler Python 3.12 starts no thread for another save.

        Raises:
          CheckpointError: A save failed, and neither `wait` nor `PendingSave.wait` has raised that yet.
        """
        if self._is_closed:
            return
        try:
            self.save_last()
        finally:
            self._end()
        with self._lock:
            failures, self._failures = self._failures, []
        self._raise_last([pending for pending in failures if pending.is_unseen()])

    def save_last(self) -> PendingSave | None:
        """Saves the step that `save` was called with last, if it is not saved; `close` does so too.

        Returns:
          The save, or None: that step is saved or was donated, or the manager was made with ``save_last=False``.
        """
        call, self._unsaved = self._unsaved, None
        if call is None or not self._saves_last or call.step == self._last_step:
            return None
        in_flight = self._in_flight()
        if self._has_no_time_left and in_flight is not None:
            in_flight.wait_done()
        if self._has_no_time_left and self._failed_step is None:
            return None  # there was no time for this step, and the one on its way arrived
        if _is_gone(call.tree):
            _log.warning("step %d, the last one, is not saved: its arrays were donated since", call.step)
            return None
        return self._save_due(call, _LAST, overwrite=False)

    def _end(self) -> None:
        try:
            self._wait_until_idle()
        finally:  # an interrupt, too
            self._is_closed = True
            if self._preemption is not None:
                self._preemption.uninstall()

    def _raise_last(self, failures: list[PendingSave]) -> None:
        for pending in failures:
            pending.mark_seen()
        if failures:
            failure = failures[-1].failure
            assert failure is not None
            raise failure

    def _wait_until_done(self) -> None:
        """Waits for the save in flight, however it ends."""
        if self._pending is not None:
            self._pending.wait_done()

    def _wait_until_idle(self, timeout_s: float | None = None) -> None:
        """Waits for the save in flight and for what comes after it."""
        if self._pending is not None and not self._pending.wait_done(timeout_s):
            raise TimeoutError(f"the save of step {self._pending_step} is not finished after {timeout_s} s")
        if any(pending.calls_here() for pending in self._idle):
            return  # an observer, for which what comes after a younger save may wait
        for pending in self._idle:
            pending.wait_until_idle()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
            return
        # Whatever ended the loop is what the caller must see. The tree may be half a step: it is not saved.
        self._unsaved = None
        self._end()

    # --- preemption and events --------------------------------------------------------------------------------

    def use_preemption(self, preemption: Preemption) -> None:
        """Saves at the step at which this announces the end; installs it.

        Raises:
          RuntimeError: This is not the main thread.
        """
        preemption.install()
        if self._preemption is not None and self._preemption is not preemption:
            self._preemption.uninstall()
        self._preemption = preemption

    def add_listener(self, listener: Callable[[int, Any], None]) -> None:
        """Calls ``listener(step, tree)`` right before each save, in the thread that saves."""
        self._listeners.append(listener)

    @property
    def preemption(self) -> Preemption | None:
        """What announces the end of the process."""
        return self._preemption

    @property
    def should_stop(self) -> bool:
        """Whether the end of the process is announced and its step was saved: the loop should leave."""
        return self._has_answered_preemption

    def _tell(
        self,
        kind: str,
        step: int,
        message: str,
        *,
        info: CheckpointInfo | None = None,
        error: BaseException | None = None,
    ) -> None:
        _log.debug("%s", message)
        if self._on_event is None:
            return
        try:
            self._on_event(CheckpointEvent(kind, step, message, info, error))
        except Exception:
            _log.exception("on_event failed for %r of step %d", kind, step)


def _checked_step(step: Any) -> int:
    if isinstance(step, bool):
        raise TypeError(f"step must be an int, not {step!r}")
    try:
        number = operator.index(step)
    except TypeError:
        raise TypeError(f"step must be an int, not {step!r:.100}") from None
    if not 0 <= number < 10**18:
        raise ValueError(f"step must be at least 0 and below 10**18, not {number}")
    return number


def _is_damage(error: CheckpointError) -> bool:
    """Whether an error means that what is stored is not what was written."""
    if isinstance(error, FormatError):
        return not any(problem.kind == "version" for problem in error.problems)
    if isinstance(error, CorruptError):
        return any(problem.kind != "unreadable" for problem in error.problems)
    return isinstance(error.__cause__, OSError) and error.__cause__.errno == errno.EIO


def _is_gone(tree: Any) -> bool:
    """Whether an array of the tree was donated or deleted."""
    import jax

    return any(isinstance(leaf, jax.Array) and leaf.is_deleted() for leaf in jax.tree.leaves(tree))
