"""How does a training loop keep a directory of numbered checkpoints?

`CheckpointManager.save` is called at every step. Most calls return at once: a `Schedule` says which are due. A due one
is a `PendingSave` into a directory of its own, ``step_00001200``. When that is committed, and never before, the rules
of `Retention` decide which older steps go, and a background thread deletes them.

    caller's thread      is it due? -> wait for the save in flight, or skip -> snapshot -> goes on
    background thread    write -> commit -> [the save is done] -> sweep, delete, checkpoint.json

A call is decided (`_Decision`) and then carried out. In a group of processes, process 0 decides and tells the others
(`_leader`), all carry it out, and process 0 alone deletes. A call that is not due, by the numbers of steps alone, needs
no word. Nothing that happens in the background, at another time in each process, goes into what the others decide.

Invariants:

* The manager believes the directory alone: `steps` are the directories with a manifest, whoever wrote them.
* One save is in flight at a time. Its failure is logged, kept for `wait`, and changes nothing for the next save.
* Nothing is changed before the first `save`, so that any number of other processes may read with managers of their own.
* What is being read is not deleted: a reader holds the manifest (`Hold`), and the deletion is tried again after the
  next save.
* With a second tier (``upload_to=``) everything that is saved goes to the directory first; `_uploading` brings it on.
  What is read may come from either tier, and training waits for the first one only.
* All processes of a group open the same sessions in the same order: each is opened where numbers of steps, earlier
  decisions or the call itself say so, and nothing else.

Deliberately not here: when to save (`_schedule`), what to keep (`_retention`), what is in the directory (`_steps`), the
deleting (`_keeping`), which step to go on from (`_resuming`), and what goes to a second tier (`_uploading`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import os
import sys
import time
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Literal, Self, final

from ._background import Background, raise_last
from ._config import SaveOptions
from ._errors import (
    CheckpointError,
    CoordinationError,
    NotFoundError,
    ProcessMismatchError,
    UnsupportedLeafError,
    WriteError,
)
from ._events import CheckpointEvent, Events
from ._keeping import Keeper, checked_step
from ._leader import Leader
from ._manifest import local_directory
from ._pending import PendingSave, chain_of
from ._preemption import Preemption
from ._processes import current_group
from ._reading import Checkpoint
from ._resuming import StepReader
from ._retention import Best, Retention, Verdict, best_step
from ._saving import SaveContext, SaveJob, write_error
from ._schedule import Schedule
from ._steps import StepDirectory
from ._storage import Store
from ._store import open_store
from ._terminal import ProgressBar
from ._uploading import Uploader, UploadOptions

_log = logging.getLogger("jaxckpt")

_FORCED = "force=True"
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
class _Call:
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
class CheckpointManager:
    """A directory of numbered checkpoints, with rules for which steps to save and which to keep.

    Making one changes nothing on storage and reads nothing; the first `save` makes the directory and sweeps what
    crashed saves left there. One process may save into a directory; any number may read it.

    In a group of processes every process makes a manager with the same arguments and calls `save`, `restore`, `resume`,
    `prune`, `delete`, `pin`, `unpin`, `save_last` and `close` at the same points; it is made after
    ``jax.distributed.initialize``. Process 0 decides what depends on clocks, metrics, signals or storage, and deletes.
    When a process fails, its step fails in all with `CoordinationError`, and the next one is tried. What looks at the
    directory only (`steps`, `open`, `watch`, ...) and `wait` is each process's own.

    Rules for saving. A step is due when any of these says so; with none, every step is.

    Rules for keeping. A step stays if any of these keeps it; the newest always stays. See `explain`.

    Two tiers. With ``upload_to=`` steps are committed to ``directory``, which may be fast and mortal (a local disk,
    ``/dev/shm``), and committed steps are uploaded in the background; an upload is a whole checkpoint under the same
    name. What is read (`restore`, `resume`, `steps`, `open`, ...) is what either tier has; a step that both have is
    read from the directory, and from the second tier if it is damaged there. The first call of `save` begins to upload
    what an earlier run left. `wait`, `close` and the end of the program wait for uploads; after a preemption `close`
    does so only as long as the grace lasts. A process that is killed meanwhile harms nothing.

    Args:
      directory: Directory (or ``s3://``, ``gs://``, ``memory://`` URL). In a group of processes it is one for all, or
        ``local=True``.
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
      local: In a group of processes that share no storage: each keeps what its devices have, in
        ``process-<index>`` below ``directory``, which holds steps of its own. `restore` and `resume` take the newest
        step that all of them have. The rules for keeping must not depend on what differs by process, as metrics may.
      upload_to: Second tier: a directory or URL, for the steps of this directory alone. In a group of processes,
        process 0 uploads; with ``local=True`` each uploads what it has.
      upload: What is uploaded, and the rules by which it is kept there. By default everything is, for good.
      options: How a save is written, and how long the processes of a group wait for each other.
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
        local: bool = False,
        programs: Mapping[str, Any] | None = None,
        upload_to: str | os.PathLike[str] | Store | None = None,
        upload: UploadOptions | None = None,
        options: SaveOptions | None = None,
        on_event: Callable[[CheckpointEvent], None] | None = None,
        progress: bool = False,
        monotonic_s: Callable[[], float] = time.monotonic,
        wall_s: Callable[[], float] = time.time,
    ) -> None:
        if if_busy not in ("wait", "skip"):
            raise ValueError(f"if_busy must be 'wait' or 'skip', not {if_busy!r}")
        self._options = options or SaveOptions()
        store = open_store(directory)
        remote_store = _open_second_tier(store, upload_to, upload)
        group = current_group()
        self._is_local = local and group is not None
        if self._is_local and group is not None:
            store = store.child(local_directory(group.index))
            remote_store = remote_store and remote_store.child(local_directory(group.index))
        self._directory = StepDirectory(store, prefix, width)
        self._leader = (
            None if group is None else Leader(group, store.path, self._options.timeout_s, monotonic_s)
        )
        self._is_first = group is None or group.index == 0
        # Whether this process deletes.
        self._is_keeping = self._is_first or self._is_local
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
        events = Events(on_event)
        self._tell = events.tell
        self._keeper = Keeper(self._directory, self._retention, wall_s, self._tell)
        self._background = Background(self._tell)
        # Where steps are, the nearest place first.
        self._tiers = [self._keeper]
        self._uploader: Uploader | None = None
        if remote_store is not None:
            self._add_tier(
                StepDirectory(remote_store, prefix, width), upload or UploadOptions(), events, wall_s
            )
        self._reader = StepReader(self._tiers, self._leader, self._tell, is_local=self._is_local)
        self._bar = ProgressBar(sys.stderr) if progress and self._is_first else None
        self._monotonic_s = monotonic_s
        self._wall_s = wall_s

        self._programs = programs
        self._is_closed = False
        self._has_warned_of_metrics = False
        self._listeners: list[Callable[[int, Any], None]] = []
        # Of the thread that saves.
        self._has_seen_steps = False
        self._unsaved: _Call | None = None
        self._attempted_step: int | None = None  # of the last save that was decided on
        self._is_preempted = False
        self._has_answered_preemption = False
        self._has_no_time_left = False  # for another save than the one in flight
        # Read by the thread of that save, too.
        self._fingerprint_before: Any = None  # of the step in flight, before its save

        self._preemption: Preemption | None = None
        if preemption is not None:
            self.use_preemption(preemption)

    def _add_tier(
        self, directory: StepDirectory, upload: UploadOptions, events: Events, wall_s: Callable[[], float]
    ) -> None:
        tell = functools.partial(events.tell_of_upload, directory.path)
        remote = Keeper(directory, upload.retention(), wall_s, tell)
        self._tiers.append(remote)
        if self._is_keeping:
            on_end = functools.partial(self._background.note_upload_end, directory.path)
            self._uploader = Uploader(self._keeper, remote, upload, self._tell, on_end, wall_s)

    # --- saving -----------------------------------------------------------------------------------------------

    def save(
        self,
        step: int,
        tree: Any,
        *,
        metrics: Mapping[str, Any] | None = None,
        items: Mapping[str, Any] | None = None,
        metadata: Any = None,
        programs: Mapping[str, Any] | None = None,
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
          programs: As for `jaxckpt.save`; None: those of the manager.
          force: Whether to save although the step is not due.
          overwrite: Whether to replace the step if it is there from an earlier run.

        Returns:
          The save, or None: the step was not due, is there already, or was skipped because another save is in flight.
          On preemption with too little time for another save, the one in flight.

        Raises:
          UnsupportedLeafError: As for `jaxckpt.save`; in a group, `CoordinationError` with this as its cause.
          ProcessMismatchError: In a group: the processes called this with different steps or trees, or called something
            else. When that is found after this returned, ``wait`` of the result raises it.
          ValueError: The manager is closed.

        Collective: all processes of a group, with the same step and equal trees. ``save_when`` and metrics count in
          process 0 only.
        Host memory: as for `save_async`; the snapshots of all saves together stay within ``host_bytes_max``.
        Blocks for: less than 20 microseconds when not due; else as `save_async`, after the save in flight. In a group,
          a due step waits for process 0 to come to it and to say so, a millisecond or more. So does a step that is not
          due, always with ``save_when``, and now and then with a rule that looks at the clock (``save_interval_s``,
          ``max_overhead``, a preemption without jax's service): at most once in 256 calls while there is time, and 2
          log2(n) times in an interval of n calls; saves are late by a hundredth of the interval.

        Example:
          >>> manager = jaxckpt.CheckpointManager(tmp / "run", save_interval_steps=100)
          >>> manager.save(99, {"w": jnp.ones(3)}) is None
          True
          >>> manager.save(100, {"w": jnp.ones(3)}).wait().step
          100
        """
        step = checked_step(step)
        if self._is_closed:
            raise ValueError(f"the manager of {self._directory.path!r} is closed")
        self._has_seen_steps = True
        if self._uploader is not None:
            self._uploader.wake_first()
        call = _Call(step, tree, metrics, items, metadata, self._programs if programs is None else programs)
        decide: Callable[[], _Decision] | None = None
        if self._leader is not None:
            if self._is_word_needed(step, force=force):
                decide = functools.partial(self._decide, step, metrics, force=force, overwrite=overwrite)
        else:
            self._look_for_preemption(step)
            reason = self._reason_to_save(step, metrics, force=force)
            if reason is not None:
                decide = functools.partial(self._decide_due, step, reason, overwrite=overwrite)
        if decide is None:
            self._unsaved = call if self._saves_last else None
            return None
        return self._decide_and_act(call, decide)

    def _is_word_needed(self, step: int, *, force: bool) -> bool:
        """Whether process 0 has to decide on this call; each process of a group finds the same."""
        assert self._leader is not None
        is_due = self._schedule.is_due_by_number(step)
        is_quiet = self._leader.is_quiet()
        has_question = self._schedule.has_open_question(step)
        if self._preemption is not None and not self._is_preempted:
            if self._preemption.is_agreed_by_jax:
                self._look_for_preemption(step)
            else:
                has_question = True
        # Whether the last save failed may be known in one process and not yet in another.
        is_sure = is_due or force or step == self._attempted_step
        is_sure |= self._is_preempted and not self._has_answered_preemption
        return is_sure or (has_question and not is_quiet)

    def _look_for_preemption(self, step: int) -> None:
        if self._preemption is None or self._is_preempted:
            return
        if self._preemption.is_requested(step, is_for_all=self._leader is not None):
            self._note_preempted(step)

    def _note_preempted(self, step: int) -> None:
        self._is_preempted = True
        self._tell("preempted", step, f"the end of the process is announced; step {step} is saved")

    def _reason_to_save(self, step: int, metrics: Mapping[str, Any] | None, *, force: bool) -> str | None:
        if force:
            return _FORCED
        if self._is_preempted and not self._has_answered_preemption:
            return _PREEMPTED
        if step == self._keeper.failed_step:
            return _RETRIED
        return self._schedule.reason_to_save(step, metrics)

    def _decide(
        self, step: int, metrics: Mapping[str, Any] | None, *, force: bool, overwrite: bool
    ) -> _Decision:
        """Whether the step is due, and what becomes of it; in process 0 of a group."""
        assert self._leader is not None
        quiet_s = self._schedule.quiet_s()
        if self._preemption is not None and not self._preemption.is_agreed_by_jax:
            self._look_for_preemption(step)
            quiet_s = min(quiet_s, _PREEMPTION_QUIET_S)
        reason = self._reason_to_save(step, metrics, force=force)
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

    def _decide_and_act(self, call: _Call, decide: Callable[[], _Decision]) -> PendingSave | None:
        entered_s = self._monotonic_s()
        try:
            decision = self._hear(decide)
        except ProcessMismatchError:
            raise
        except (WriteError, CoordinationError) as error:
            return self._fail_undecided(call.step, error)
        return self._carry_out(call, decision, entered_s)

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
            if self._preemption is not None:
                self._preemption.request()
            self._note_preempted(decision.step)
        return decision

    def _carry_out(self, call: _Call, decision: _Decision, entered_s: float) -> PendingSave | None:
        step = call.step
        if decision.action == _NOT_DUE:
            self._unsaved = call if self._saves_last else None
            return None
        if decision.action == _LATE:
            self._has_answered_preemption = True
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
            self._has_answered_preemption |= self._is_preempted
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

    def _start(self, call: _Call, decision: _Decision, waited_s: float, entered_s: float) -> PendingSave:
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
        for listener in self._listeners:
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
        self._has_answered_preemption |= self._is_preempted
        return pending

    def _tidy(self, step: int) -> None:
        """Called in the background after a save, while nobody waits."""
        self._keeper.tidy(step)
        if self._uploader is not None:
            self._uploader.wake()

    def _fail_undecided(self, step: int, failure: CheckpointError) -> PendingSave:
        """It was not found out what shall become of the step: it is given up, and the loop goes on."""
        self._attempted_step = step
        self._schedule.note_resumed(step)
        self._unsaved = None
        self._has_answered_preemption |= self._is_preempted
        pending = PendingSave(
            self._directory.usual_store_of(step).path, functools.partial(self._on_end, step)
        )
        pending.fail(failure)
        for link in chain_of(failure):
            link.__traceback__ = None
        return pending

    def _warn_of_missing_metrics(self, call: _Call) -> None:
        """A typo in ``best=`` would have the best steps deleted in silence; said once."""
        missing = [best.metric for best in self._retention.best if best.metric not in (call.metrics or {})]
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

    def _has_time_for_another(self, in_flight: PendingSave) -> bool:
        """Whether the grace that is left is enough for the rest of a save and for another one, as the last one went."""
        assert self._preemption is not None
        remaining_s = self._preemption.remaining_s()
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
        return self._keeper.explain()

    def prune(self) -> list[int]:
        """Deletes the steps that no rule keeps, without saving.

        Returns:
          The steps that were deleted. Those that somebody reads, the one that training goes on from, and those that
          still have to be uploaded stay. A second tier is pruned by its own rules; what is deleted there is not told.

        Collective: all processes of a group. Process 0 deletes.

        Example:
          >>> with jaxckpt.CheckpointManager(tmp / "run", max_to_keep=None) as manager:
          ...     for step in range(4):
          ...         _ = manager.save(step, {"w": jnp.ones(3)})
          >>> jaxckpt.CheckpointManager(tmp / "run", max_to_keep=1).prune()
          [0, 1, 2]
        """
        self._background.wait_until_done()
        return list(self._in_first("prune", self._prune))

    def _prune(self) -> list[int]:
        for keeper in self._tiers[1:]:
            keeper.prune()
        return self._keeper.prune()

    def delete(self, step: int) -> None:
        """Deletes a step, whatever the rules say, in both tiers if there are two.

        Raises:
          NotFoundError: There is no such step.
          CheckpointError: Somebody is reading it.

        Collective: all processes of a group. Process 0 deletes.
        """
        self._background.wait_until_done()
        self._in_first("delete from", functools.partial(self._delete, step))
        for keeper in self._tiers:
            keeper.note_deleted(step)
        self._tell("deleted", step, f"deleted step {step}: asked for")

    def _delete(self, step: int) -> None:
        with contextlib.nullcontext() if self._uploader is None else self._uploader.without(step):
            for keeper in self._that_have(step):
                keeper.delete(step)

    def _that_have(self, step: int) -> list[Keeper]:
        """The tiers that have a step."""
        step = checked_step(step)
        having = [keeper for keeper in self._tiers if keeper.directory.fingerprint_of(step) is not None]
        if not having:
            self._keeper.require(step)
        return having

    def pin(self, step: int) -> None:
        """Marks a step so that every manager keeps it, in later runs too.

        Raises:
          NotFoundError: There is no such step.

        Collective: all processes of a group.
        """
        self._in_first("pin in", functools.partial(self._pin, step))

    def unpin(self, step: int) -> None:
        """Takes the mark of `pin` away.

        Collective: all processes of a group.
        """
        self._in_first("unpin in", functools.partial(self._unpin, step))

    def _pin(self, step: int) -> None:
        for keeper in self._that_have(step):
            keeper.pin(step)

    def _unpin(self, step: int) -> None:
        for keeper in self._that_have(step):
            keeper.unpin(step)

    def _in_first(self, doing: str, act: Callable[[], Any]) -> Any:
        """Calls something in the process that keeps the directory, while the others wait for its result."""
        if self._leader is None:
            return act()
        if not self._is_local:
            # All have come this far: what one of them reads in this thread is not deleted under it.
            return self._leader.agree(doing, None, lambda _: act())
        with self._leader.session(doing, (CheckpointError, NotFoundError)) as session:
            result = act()
            session.agree("done", b"", lambda _: b"")
        return result

    # --- what is there ----------------------------------------------------------------------------------------

    def steps(self) -> list[int]:
        """The committed steps, ascending.

        Those that `restore` found damaged are left out, and one whose save failed at the very last sync: it is there,
        but may be gone when the machine fails.
        """
        return sorted({step for keeper in self._tiers for step in keeper.steps()})

    def latest_step(self) -> int | None:
        """The newest committed step, or None."""
        return max((step for keeper in self._tiers for step in keeper.steps()), default=None)

    def best_step(self, best: Best | None = None) -> int | None:
        """The best committed step by a metric; by default that of the first rule ``best=``.

        Raises:
          ValueError: Neither the manager nor the caller has a rule.
        """
        if best is None:
            if not self._retention.best:
                raise ValueError("the manager has no rule for the best step: pass best=jaxckpt.Best(...)")
            best = self._retention.best[0]
        # Of a step that both tiers have, what the nearer one says counts.
        metrics = {
            record.step: record.metrics for keeper in reversed(self._tiers) for record in keeper.records()
        }
        return best_step([*metrics], [*metrics.values()], best)

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
        return self._reader.path_of(step)

    def open(self, step: int | None = None) -> Checkpoint:
        """Opens a step as `jaxckpt.open` does, by default the newest.

        Raises:
          NotFoundError: There is no such step.
          FormatError: Its manifest is damaged, or needs a newer version.
        """
        if step is not None:
            return self._reader.open(step)
        newest = self.latest_step()
        while newest is not None:
            try:
                return self._reader.open(newest)
            except NotFoundError:
                before, newest = newest, self.latest_step()
                if newest == before:
                    raise
        raise NotFoundError(f"no step is committed in {self._directory.path!r}")

    @property
    def directory(self) -> str:
        """Where the steps are."""
        return self._directory.path

    # --- restoring --------------------------------------------------------------------------------------------

    def restore(
        self, step: int | None = None, like: Any = None, *, fallback: bool = True, **keywords: Any
    ) -> Any:
        """Restores a step, by default the newest one that is whole.

        A save in flight is waited for. When the newest step proves damaged, that is logged, and the one before it is
        taken; the damaged one is left alone, counts no more, and may be saved anew. A step that was asked for is never
        replaced by another. With two tiers, a step that is damaged in the nearer one is read from the other, and what
        comes from there is not copied back.

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
          CoordinationError: In a group: as for `jaxckpt.restore`.

        Collective: all processes of a group, even where `jaxckpt.restore` would not be. They restore one step, which
          process 0 chooses; what one of them finds damaged is passed over by all.

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

        Collective: as for `restore`.

        Example:
          >>> manager = jaxckpt.CheckpointManager(tmp / "run")
          >>> step, state = manager.resume() or (0, {"w": jnp.zeros(2)})
          >>> step
          0
        """
        self._background.wait_until_done()
        if self._reader.has_nothing():
            return None
        step, tree = self._restore(None, like, fallback, keywords)
        self._begin_from(step)
        return step, tree

    def _restore(
        self, step: int | None, like: Any, fallback: bool, keywords: dict[str, Any]
    ) -> tuple[int, Any]:
        self._background.wait_until_done()
        if step is None:
            step, tree = self._reader.read_newest(like, keywords, fallback=fallback)
        else:
            step = checked_step(step)
            tree = self._reader.read(step, like, keywords)
        if not self._has_seen_steps:
            self._begin_from(step)
        self._tell("restored", step, f"restored step {step}")
        return step, tree

    def _begin_from(self, step: int) -> None:
        """Training goes on from a step that is on storage."""
        self._unsaved = None
        self._schedule.note_resumed(step)
        for keeper in self._tiers:
            keeper.note_last(step)

    def watch(
        self, *, timeout_s: float | None = None, poll_s: float = 1.0, after: int | None = None
    ) -> Iterator[int]:
        """Yields the newest step of the directory and then each new one, for an evaluator in another process.

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
        return self._directory.watch(timeout_s, poll_s, after, self._monotonic_s)

    # --- the end ----------------------------------------------------------------------------------------------

    def wait(self, timeout_s: float | None = None) -> None:
        """Waits until nothing is in flight and old steps are deleted; in a group, those that this process deletes.

        Uploads are waited for, too, in the process that uploads.

        Args:
          timeout_s: Most seconds to wait for the save in flight, and for uploads; None waits for ever.

        Raises:
          TimeoutError: The save is not finished, or an upload.
          CheckpointError: A save failed since the last `wait`. The next one may have gone well. Or the upload of a step
            failed, which is not uploaded yet.
        """
        began_s = time.monotonic()
        self._background.wait_until_idle(timeout_s)
        if self._uploader is not None:
            left_s = None if timeout_s is None else max(0.0, timeout_s - (time.monotonic() - began_s))
            if not self._uploader.wait(left_s):
                raise TimeoutError(
                    f"uploads to {self._tiers[-1].directory.path!r} are not finished after {timeout_s} s"
                )
        raise_last(self._background.take_failures())

    def close(self) -> None:
        """Saves the last step if it is not saved yet, waits, and ends the manager; again: nothing.

        To be called before the program ends: in an exit handler Python 3.12 starts no thread for another save.

        Raises:
          CheckpointError: A save failed, or an upload, and neither `wait` nor `PendingSave.wait` has raised that yet.

        Collective: all processes of a group.
        """
        if self._is_closed:
            return
        try:
            self.save_last()
        finally:
            self._end()
        raise_last([pending for pending in self._background.take_failures() if pending.is_unseen()])

    def save_last(self) -> PendingSave | None:
        """Saves the step that `save` was called with last, if it is not saved; `close` does so too.

        Returns:
          The save, or None: that step is saved or was donated, or the manager was made with ``save_last=False``.

        Collective: all processes of a group.
        """
        call, self._unsaved = self._unsaved, None
        if call is None or not self._saves_last:
            return None
        pending = self._decide_and_act(call, functools.partial(self._decide_last, call))
        self._unsaved = None
        return pending

    def _decide_last(self, call: _Call) -> _Decision:
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

    def _end(self) -> None:
        try:
            self._background.wait_until_idle()
            if self._uploader is not None:
                self._uploader.finish(
                    self._preemption.remaining_s() if self._preemption is not None else None
                )
        finally:  # an interrupt, too
            self._is_closed = True
            if self._preemption is not None:
                self._preemption.uninstall()

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
        if self._leader is not None and not self._is_closed:
            self._leader.leave(error)  # the others may wait for this process
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
    def is_in_group(self) -> bool:
        """Whether there are other processes, whose managers do the same."""
        return self._leader is not None

    def hear_first(self, answer: bool) -> bool:
        """What process 0 answers; alone, what this process does.

        Collective: all processes of a group.
        """
        return answer if self._leader is None else bool(self._leader.tell("answer for", lambda: answer))

    @property
    def preemption(self) -> Preemption | None:
        """What announces the end of the process."""
        return self._preemption

    @property
    def should_stop(self) -> bool:
        """Whether the end of the process is announced and its step was saved: the loop should leave."""
        return self._has_answered_preemption


def _open_second_tier(
    directory: Store, upload_to: str | os.PathLike[str] | Store | None, upload: UploadOptions | None
) -> Store | None:
    if upload_to is None:
        if upload is not None:
            raise ValueError("upload= says how to upload, but there is no upload_to=")
        return None
    store = open_store(upload_to)
    if store.path == directory.path:
        raise ValueError(f"upload_to= must be another place than the directory, {directory.path!r}")
    return store


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
