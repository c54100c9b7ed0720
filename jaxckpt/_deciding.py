"""Which calls of a manager's `save` save something, and how does such a save begin and end?

    1. save         whether the step is due, as far as this process can say. Most calls end here
    2. decide       what becomes of it. In a group process 0 decides and tells the others (`_leader`)
    3. carry out    nothing; or wait for the save in flight, and
    4. start        sweep once, call the listeners, take the snapshot. The rest goes on in the background
    5. end          in the background: what became of it is noted and told, and old steps are deleted

A call that is not due, by the numbers of steps alone, needs no word of process 0. A `_Decision` holds whatever the
processes of a group would answer differently; nothing that happens in the background, at another time in each process,
goes into what the others decide.

Invariants:

* What storage or another process does to a save does not stop the loop: `save` returns a `PendingSave` that has failed.
  The caller's mistakes and interrupts are raised.
* The thread that saves asks storage about steps that are due, and about no others.

Deliberately not here: the rules of what is due (`_schedule`), what goes on meanwhile (`_background`), and what is
deleted (`_keeping`).
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, final

from ._background import Background
from ._config import SaveOptions
from ._errors import (
    CheckpointError,
    CoordinationError,
    ProcessMismatchError,
    UnsupportedLeafError,
    WriteError,
)
from ._events import Events
from ._keeping import Keeper
from ._leader import Leader
from ._pending import PendingSave, chain_of
from ._preemption import Preemption
from ._processes import current_group
from ._saving import SaveContext, SaveJob, write_error
from ._schedule import Schedule
from ._storage import Store
from ._terminal import ProgressBar
from ._uploading import Uploader

_log = logging.getLogger("jaxckpt")

_FORCED = "force=True"
_REPLACED = "overwrite=True"
_PREEMPTED = "preemption"
_LAST = "the last step"
_RETRIED = "its save failed before"
_UNKNOWN = "unknown"  # in the place of a fingerprint
# Reasons for which a save waits for the one in flight even where others are skipped.
_URGENT = (_FORCED, _PREEMPTED, _LAST)

# What becomes of a call.
_NOT_DUE = "not due"
_SAVED = "saved"  # by this manager
_THERE = "there"  # from an earlier run
_LATE = "late"  # no time is left for another save
_BUSY = "busy"
_SAVE = "save"

# How long a signal may wait to be seen where process 0 tells of it.
_PREEMPTION_QUIET_S = 0.5


@dataclasses.dataclass(frozen=True, slots=True)
class SaveCall:
    """The arguments of a call of `CheckpointManager.save`."""

    step: int
    tree: Any
    metrics: Mapping[str, Any] | None
    items: Mapping[str, Any] | None
    metadata: Any
    programs: Mapping[str, Any] | None


@dataclasses.dataclass(frozen=True, slots=True)
class _Decision:
    """What becomes of a call of `CheckpointManager.save`. In a group it is process 0 that decides.

    Attributes:
      action: One of the constants above.
      step: The step that was decided on: in a group, what process 0 was called with.
      reason: Why it is due.
      name: Name of the directory that it is saved into; empty: to be looked for.
      time_s: What time it is, in seconds since 1970, where processes keep manifests of their own.
      is_preempted: Whether the end of the process is announced.
      quiet_calls: For how many calls only numbers of steps count.
    """

    action: str
    step: int
    reason: str = ""
    name: str = ""
    time_s: float | None = None
    is_preempted: bool = False
    quiet_calls: int = 0


@final
class StepSaver:
    """Saves the steps of a manager that are due. Used by the thread that saves.

    Attributes:
      preemption: Announces the end of the process.
      has_answered_preemption: Whether that was announced, and the step was saved or there is no time for it.
      has_seen_steps: Whether `save` was called.
      listeners: Each is called with the step and the tree right before a save.
    """

    def __init__(
        self,
        tiers: Sequence[Keeper],
        uploader: Uploader | None,
        schedule: Schedule,
        background: Background,
        leader: Leader | None,
        events: Events,
        *,
        is_local: bool,
        saves_last: bool,
        skips_if_busy: bool,
        best_metrics: Sequence[str],
        options: SaveOptions,
        bar: ProgressBar | None,
        monotonic_s: Callable[[], float],
        wall_s: Callable[[], float],
    ) -> None:
        """Touches nothing.

        Args:
          tiers: The places of steps, the nearest first, which is saved into.
          uploader: Is woken when there may be something to upload.
          schedule: Says what is due.
          background: Is told of the saves that begin and end.
          leader: The way to the other processes; None: there are none.
          events: Hear of what happens.
          is_local: Whether each process has a directory of its own.
          saves_last: Whether the last step is remembered for `save_last`.
          skips_if_busy: Whether a due step is skipped while a save is in flight.
          best_metrics: Metrics without which the best steps could not be kept.
          options: How a save is written.
          bar: Shows the progress of saves.
          monotonic_s: Clock for what the loop was blocked, in seconds.
          wall_s: Clock for the times of checkpoints, in seconds since 1970.
        """
        self.preemption: Preemption | None = None
        self.has_answered_preemption = False
        self.has_seen_steps = False
        self.listeners: list[Callable[[int, Any], None]] = []
        self._tiers = tiers
        self._keeper = tiers[0]
        self._directory = tiers[0].directory
        self._uploader = uploader
        self._schedule = schedule
        self._background = background
        self._leader = leader
        self._tell = events.tell
        self._is_local = is_local
        self._is_first = leader is None or leader.index == 0
        # Whether this process deletes.
        self._is_keeping = self._is_first or is_local
        self._saves_last = saves_last
        self._skips_if_busy = skips_if_busy
        self._best_metrics = best_metrics
        self._options = options
        self._bar = bar
        self._monotonic_s = monotonic_s
        self._wall_s = wall_s

        self._has_warned_of_metrics = False
        self._unsaved: SaveCall | None = None  # the last one, if it was not due
        self._attempted_step: int | None = None  # of the last save that was decided on
        self._is_preempted = False
        self._has_no_time_left = False  # for another save than the one in flight
        # Of the step in flight, before its save; read in the background, too.
        self._fingerprint_before: Any = None

    def save(self, call: SaveCall, *, force: bool, overwrite: bool) -> PendingSave | None:
        """As `CheckpointManager.save`."""
        step = call.step
        self.has_seen_steps = True
        if self._uploader is not None:
            self._uploader.wake_first()
        decide: Callable[[], _Decision] | None = None
        if self._leader is not None:
            if self._is_word_needed(step, force=force, overwrite=overwrite):
                decide = functools.partial(self._decide, step, call.metrics, force=force, overwrite=overwrite)
        else:
            self._look_for_preemption(step)
            reason = self._reason_to_save(step, call.metrics, force=force, overwrite=overwrite)
            if reason is not None:
                decide = functools.partial(self._decide_due, step, reason, overwrite=overwrite)
        if decide is None:
            self._unsaved = call if self._saves_last else None
            return None
        return self._decide_and_act(call, decide)

    def save_last(self) -> PendingSave | None:
        """As `CheckpointManager.save_last`."""
        call, self._unsaved = self._unsaved, None
        if call is None or not self._saves_last:
            return None
        pending = self._decide_and_act(call, functools.partial(self._decide_last, call))
        self._unsaved = None
        return pending

    def forget_last(self) -> None:
        """There is nothing for `save_last` to save."""
        self._unsaved = None

    def begin_from(self, step: int) -> None:
        """Training goes on from a step that is on storage."""
        self._unsaved = None
        self._schedule.note_resumed(step)
        for keeper in self._tiers:
            keeper.note_last(step)

    # --- deciding ---------------------------------------------------------------------------------------------

    def _is_word_needed(self, step: int, *, force: bool, overwrite: bool) -> bool:
        """Whether process 0 has to decide on this call; each process of a group finds the same."""
        assert self._leader is not None
        is_due = self._schedule.is_due_by_number(step)
        is_quiet = self._leader.is_quiet()
        has_question = self._schedule.has_open_question(step)
        if self.preemption is not None and not self._is_preempted:
            if self.preemption.is_agreed_by_jax:
                self._look_for_preemption(step)
            else:
                has_question = True
        # Whether the last save failed may be known in one process and not yet in another.
        is_sure = is_due or force or step == self._attempted_step
        is_sure |= overwrite and self._schedule.is_last(step)
        is_sure |= self._is_preempted and not self.has_answered_preemption
        return is_sure or (has_question and not is_quiet)

    def _look_for_preemption(self, step: int) -> None:
        if self.preemption is None or self._is_preempted:
            return
        if self.preemption.is_requested(step, is_for_all=self._leader is not None):
            self._note_preempted(step)

    def _note_preempted(self, step: int) -> None:
        self._is_preempted = True
        self._tell("preempted", step, f"the end of the process is announced; step {step} is saved")

    def _reason_to_save(
        self, step: int, metrics: Mapping[str, Any] | None, *, force: bool, overwrite: bool
    ) -> str | None:
        if force:
            return _FORCED
        if self._is_preempted and not self.has_answered_preemption:
            return _PREEMPTED
        if step == self._keeper.failed_step:
            return _RETRIED
        if overwrite and self._schedule.is_last(step):
            return _REPLACED
        return self._schedule.reason_to_save(step, metrics)

    def _decide(
        self, step: int, metrics: Mapping[str, Any] | None, *, force: bool, overwrite: bool
    ) -> _Decision:
        """Whether the step is due, and what becomes of it; in process 0 of a group."""
        assert self._leader is not None
        quiet_s = self._schedule.quiet_s()
        if self.preemption is not None and not self.preemption.is_agreed_by_jax:
            self._look_for_preemption(step)
            quiet_s = min(quiet_s, _PREEMPTION_QUIET_S)
        reason = self._reason_to_save(step, metrics, force=force, overwrite=overwrite)
        if reason is None:
            return _Decision(_NOT_DUE, step, quiet_calls=self._leader.count_quiet_calls(quiet_s))
        return self._decide_due(step, reason, overwrite=overwrite)

    def _decide_due(self, step: int, reason: str, *, overwrite: bool) -> _Decision:
        """What becomes of a step that is due.

        Raises:
          WriteError: Storage does not say what is there, and nothing is overwritten blindly.
        """
        if step == self._keeper.last_step and not overwrite:
            return _Decision(_SAVED, step)
        in_flight = self._background.in_flight()
        if in_flight is not None and reason == _PREEMPTED and not self._has_time_for_another(in_flight):
            return _Decision(_LATE, step)
        if in_flight is not None and self._skips_if_busy and reason not in _URGENT:
            return _Decision(_BUSY, step, reason)
        name = ""
        try:
            if not overwrite and self._is_there_already(step):
                return _Decision(_THERE, step)
            if self._leader is not None and not self._is_local:
                name = self._directory.store_of(step).name
        except OSError as error:
            store = self._directory.usual_store_of(step)
            raise write_error(store, error, self._newest_good(), is_committed=False) from error
        return _Decision(_SAVE, step, reason, name, self._wall_s() if self._is_local else None)

    def _decide_last(self, call: SaveCall) -> _Decision:
        if call.step == self._keeper.last_step:
            return _Decision(_NOT_DUE, call.step)
        in_flight = self._background.in_flight()
        if self._has_no_time_left and in_flight is not None:
            in_flight.wait_done()
        if self._has_no_time_left and self._keeper.failed_step is None:
            # There was no time for this step, and the one on its way arrived.
            return _Decision(_NOT_DUE, call.step)
        if _is_gone(call.tree):
            _log.warning("step %d, the last one, is not saved: its arrays were donated since", call.step)
            return _Decision(_NOT_DUE, call.step)
        return self._decide_due(call.step, _LAST, overwrite=False)

    def _has_time_for_another(self, in_flight: PendingSave) -> bool:
        """Whether the grace that is left is enough for the rest of a save and for another one, as the last one went."""
        assert self.preemption is not None
        remaining_s = self.preemption.remaining_s()
        if remaining_s is None or self._background.last_info is None:
            return True
        one_save_s = self._background.last_info.seconds - self._background.last_info.waited_s
        rest_s = max(0.0, one_save_s - in_flight.progress().elapsed_s)
        return rest_s + one_save_s <= remaining_s

    def _is_there_already(self, step: int) -> bool:
        """Whether a step is committed that this manager did not save."""
        if not self._keeper.has(step):
            return self._uploader is not None and self._uploader.is_there(step)
        # If so, this manager wrote it, and it may not be durable.
        return not step == self._keeper.failed_step == self._background.step

    def _hear(self, decide: Callable[[], _Decision]) -> _Decision:
        """What is decided, in a group by process 0."""
        if self._leader is None:
            return decide()

        def decide_for_all() -> tuple[Any, ...]:
            decision = decide()
            return dataclasses.astuple(dataclasses.replace(decision, is_preempted=self._is_preempted))

        decision = _Decision(*self._leader.tell("decide on saving into", decide_for_all))
        self._leader.note_quiet_calls(decision.quiet_calls)
        if decision.is_preempted and not self._is_preempted:
            if self.preemption is not None:
                self.preemption.request()
            self._note_preempted(decision.step)
        return decision

    # --- carrying out -----------------------------------------------------------------------------------------

    def _decide_and_act(self, call: SaveCall, decide: Callable[[], _Decision]) -> PendingSave | None:
        entered_s = self._monotonic_s()
        try:
            decision = self._hear(decide)
        except ProcessMismatchError:
            raise
        except (WriteError, CoordinationError) as error:
            return self._fail_undecided(call.step, error)
        return self._carry_out(call, decision, entered_s)

    def _carry_out(self, call: SaveCall, decision: _Decision, entered_s: float) -> PendingSave | None:
        step = call.step
        if decision.action == _NOT_DUE:
            self._unsaved = call if self._saves_last else None
            return None
        if decision.action == _LATE:
            self.has_answered_preemption = True
            self._has_no_time_left = True
            self._unsaved = call if self._saves_last else None
            message = f"too little time is left, and step {self._background.step} is on its way"
            self._tell("skipped", step, f"step {step} is not saved: {message}")
            return self._background.pending
        if decision.action == _BUSY:
            self._schedule.note_skipped(decision.reason)
            self._unsaved = call if self._saves_last else None
            message = f"step {self._background.step} is still on its way"
            self._tell("skipped", step, f"step {step} is not saved: {message}")
            return None
        if decision.action in (_SAVED, _THERE):
            if decision.action == _THERE:
                self._note_there(decision.step)
            self.has_answered_preemption |= self._is_preempted
            self._unsaved = None
            return None
        waited_s = 0.0
        in_flight = self._background.in_flight()
        if in_flight is not None:
            in_flight.wait_done()
            waited_s = self._monotonic_s() - entered_s
            self._tell(
                "waited", step, f"step {step} waited {waited_s:.3f} s for step {self._background.step}"
            )
        return self._start(call, decision, waited_s, entered_s)

    def _start(self, call: SaveCall, decision: _Decision, waited_s: float, entered_s: float) -> PendingSave:
        if (self._leader and self._leader.group) is not current_group():
            raise RuntimeError(
                "jax.distributed was initialised or shut down since the manager was made\n"
                "make the manager after jax.distributed.initialize, and close it before the shutdown"
            )
        step = call.step
        # A process that was called with another step saves that one, and the save itself finds out that they differ.
        is_same = step == decision.step
        time_s = decision.time_s
        began_s = time.perf_counter()
        self._warn_of_missing_metrics(call)
        for listener in self.listeners:
            listener(step, call.tree)
        if self._is_keeping:
            self._keeper.sweep_once()
        context = SaveContext(
            metadata=call.metadata,
            items=call.items,
            programs=call.programs,
            metrics=call.metrics,
            step=step,
            began_s=began_s,
            waited_s=waited_s,
            wall_s=self._wall_s if time_s is None else lambda: time_s,
            earlier=self._newest_store,
            newest_good=self._newest_good,
            on_progress=None if self._bar is None else self._bar.show,
        )
        name = decision.name if is_same else ""
        store, self._fingerprint_before = self._directory.begin(step, name, _UNKNOWN)
        pending = PendingSave(
            store.path,
            functools.partial(self._on_end, step),
            functools.partial(self._tidy, step) if self._is_keeping else None,
        )
        self._tell("saving", step, f"saving step {step}: {decision.reason}")
        self._keeper.note_last(step)
        self._attempted_step = decision.step
        self._schedule.note_saved(decision.step)
        job: SaveJob | None = None
        try:
            job = SaveJob(
                store,
                call.tree,
                True,
                context,
                self._options,
                is_blocking=False,
                is_local=self._is_local,
            )
            self._background.begin(pending, step)
            pending.start(job)
        except BaseException as error:  # an interrupt, too
            if not pending.done() and job is not None:
                job.abandon(error)
            if _is_of_the_caller(error):
                self._forget(pending, step)
                raise
            if not pending.done():
                pending.fail(error)
            # The failure is kept, and would keep this frame and those of all callers, with the trees in them.
            for link in chain_of(error):
                link.__traceback__ = None
        finally:
            self._schedule.note_blocked(self._monotonic_s() - entered_s)
        self._unsaved = None
        self.has_answered_preemption |= self._is_preempted
        return pending

    def _fail_undecided(self, step: int, failure: CheckpointError) -> PendingSave:
        """It was not found out what shall become of the step: it is given up, and the loop goes on."""
        self._attempted_step = step
        self._schedule.note_resumed(step)
        self._unsaved = None
        self.has_answered_preemption |= self._is_preempted
        pending = PendingSave(
            self._directory.usual_store_of(step).path, functools.partial(self._on_end, step)
        )
        pending.fail(failure)
        for link in chain_of(failure):
            link.__traceback__ = None
        return pending

    def _warn_of_missing_metrics(self, call: SaveCall) -> None:
        """A typo in ``best=`` would have the best steps deleted in silence; said once."""
        missing = [metric for metric in self._best_metrics if metric not in (call.metrics or {})]
        if missing and self._is_first and not self._has_warned_of_metrics:
            self._has_warned_of_metrics = True
            _log.warning(
                "step %d has no metric %s, by which best= shall keep steps",
                call.step,
                ", ".join(map(repr, missing)),
            )

    def _forget(self, pending: PendingSave, step: int) -> None:
        """The caller's mistake, or an interrupt, ended a save: it is raised there, and nowhere else."""
        self._directory.end()
        if self._leader is None:
            self._schedule.note_given_up()
        else:  # the others' schedules know of no mistake
            self._keeper.note_failed(step)
        self._background.forget(pending)
        self._keeper.note_last(None)

    def _note_there(self, step: int) -> None:
        self._schedule.note_resumed(step)
        message = (
            f"step {step} is not saved: it is in {self._path_of_any(step)!r} already, from an earlier run\n"
            "resume from the newest step, delete that one, or pass overwrite=True"
        )
        if self._is_first:
            _log.warning("%s", message)
        self._tell("skipped", step, message)

    def _path_of_any(self, step: int) -> str:
        """The directory, or the second tier if the step is there only."""
        is_remote = self._uploader is not None and not self._keeper.has(step)
        return self._tiers[-1 if is_remote else 0].directory.path

    def _newest_store(self) -> Store | None:
        """Where the newest step of the directory is."""
        try:
            newest = self._keeper.latest_step()
        except OSError:
            return None
        return None if newest is None else self._directory.store_of(newest)

    def _newest_good(self) -> str:
        try:
            newest = self._keeper.latest_step()
        except OSError:
            return "what is in the directory cannot be found out"
        return "no step is committed" if newest is None else f"the newest committed step is {newest}"

    # --- in the background ------------------------------------------------------------------------------------

    def _on_end(self, step: int, pending: PendingSave) -> None:
        """Called in the background when a save has ended."""
        self._directory.end()
        if self._bar is not None:
            self._bar.close()
        failure = pending.failure
        late = None if failure is None else self._late_fingerprint(step)
        self._background.note_end(pending)
        if failure is not None:
            self._keeper.note_failed(step, late)
        else:
            self._keeper.note_saved(step)
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
        """Called in the background after a save, while nobody waits."""
        self._keeper.tidy(step)
        if self._uploader is not None:
            self._uploader.wake()


def _is_of_the_caller(error: BaseException) -> bool:
    """Whether a save failed by a mistake in the call, or was interrupted; not because storage or a process failed."""
    if isinstance(error, (UnsupportedLeafError, ProcessMismatchError)):
        return True
    cause = error.__cause__
    if isinstance(error, CoordinationError) and error.failures and cause is not None:
        # What this process made of its own error when it told the others.
        return not isinstance(cause, (OSError, CoordinationError)) and _is_of_the_caller(cause)
    return not isinstance(error, CheckpointError)


def _is_gone(tree: Any) -> bool:
    """Whether an array of the tree was donated or deleted."""
    import jax

    return any(isinstance(leaf, jax.Array) and leaf.is_deleted() for leaf in jax.tree.leaves(tree))
