"""How do committed steps get from fast local storage to a second tier that outlives the machine?

A manager with ``upload_to=`` commits to its directory, and training goes on. An `Uploader` brings committed steps to
the second tier, in the background, one after the other (`_copying`). What is still to be uploaded is written down
nowhere: it follows from the two directories, so that a manager that comes after a crash goes on where the last one was.

    1. look       which steps both tiers have; the second one once, unless something fails
    2. choose     of those that the second tier lacks, is to get, and would keep, the newest: it protects most
    3. copy       verified; the second tier's manifest is the commit there
    4. tidy       the second tier by its own rules, as any directory of a manager (`_keeping`)

and 2 to 4 again, until there is nothing to choose; then the thread ends, and the next commit starts another one.

Invariants:

* Training waits for no upload. The one listing that the first save may wait for, some seconds at most, tells whether
  its step is there.
* A local step that is still to be uploaded is not deleted, but for too many: when the rules of the local directory keep
  more than `UploadOptions.waiting_max` such steps no longer, some are let go, with a warning: first those that the
  second tier would keep for a while only, and of them the oldest.
* Damage does not travel: a step that proves damaged while it is copied counts no more.
* Where both tiers have a step and not the same one, the one that was committed later stays: that of this manager, or
  else, for no clock is sure, that with the later time.
* A failed upload is told as a failed save is. It is tried again with growing pauses, then after the next save. What
  uploads left that nobody will go on with is deleted before others, and so is all of it when there is no room.

Deliberately not here: which tier a step is restored from (`_resuming`).
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import errno
import logging
import threading
import time
from collections.abc import Callable, Generator, Sequence
from typing import final

from ._commit import PIN_NAME
from ._config import MIB
from ._copying import CopyReport, copy_checkpoint
from ._errors import CheckpointError, CorruptError, FormatError, WriteError
from ._keeping import Keeper, Tell
from ._manifest import MANIFEST_NAME
from ._progress import Progress, format_bytes
from ._retention import Best, Retention, judge_steps
from ._steps import StepRecord

_log = logging.getLogger("jaxckpt")

_PAUSE_S = 1.0  # after the first failure; it doubles
_PAUSE_MAX_S = 60.0
# The first save waits no longer to learn which steps the second tier has. A thousand steps are listed in a few seconds;
# a place that cannot be reached is given up after minutes.
_LOOK_S = 10.0
_FULL = (errno.ENOSPC, errno.EDQUOT)
_ASK_S = 0.5  # between two questions whether the end of the process is announced


@dataclasses.dataclass(frozen=True, slots=True)
class UploadOptions:
    """What a manager with ``upload_to=`` brings to its second tier, and what it keeps there.

    By default everything is uploaded and stays. A step stays if any of the rules keeps it, as in the manager's
    directory, whose rules these are not; pinned steps stay in both.

    Attributes:
      interval_steps: Upload a step when a multiple of so many steps is reached or passed since the last one there, one
        that replaces the step of that number there, and the newest one when the manager is closed. None: every
        committed step.
      max_to_keep: The newest so many uploaded steps stay. None: all.
      keep_period: Every step that is a multiple of this stays.
      keep_interval_s: A step stays for each so many seconds of time between commits.
      best: The best steps by a metric stay; one `Best` or several.
      time_to_live_s: `max_to_keep` keeps no step that is older than this.
      waiting_max: So many steps at most stay in the manager's directory only because they are still to be uploaded,
        beside the one that is being uploaded. When more wait, those stay first that other rules than `max_to_keep`
        keep, and then the newest. Default 2: beside the five of the default `max_to_keep` that is 40 % more storage.
      attempts: How many times in a row a step is tried, with pauses of 1, 2, 4, ... 60 seconds between. Default 5; then
        it is tried again after the next save. Object stores have retries of single requests besides.
      io_threads: Objects in flight at a time. Default 8: object stores answer late and take many at once.
      host_bytes_max: Most bytes of the objects in flight, in host memory if the second tier is an object store; a
        larger object goes alone. Beside that each thread has a piece of at most 8 MiB. Default 256 MiB, four objects
        of the usual largest size.
      on_progress: Called with a `Progress` of the step that is being uploaded, from the copying threads.
    """

    interval_steps: int | None = None
    max_to_keep: int | None = None
    keep_period: int | None = None
    keep_interval_s: float | None = None
    best: Best | Sequence[Best] | None = None
    time_to_live_s: float | None = None
    waiting_max: int = 2
    attempts: int = 5
    io_threads: int = 8
    host_bytes_max: int = 256 * MIB
    on_progress: Callable[[Progress], None] | None = None

    def __post_init__(self) -> None:
        leasts = {"waiting_max": 0, "attempts": 1, "io_threads": 1, "host_bytes_max": 1}
        if self.interval_steps is not None:
            leasts["interval_steps"] = 1
        for name, least in leasts.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, not {getattr(self, name)}")
        self.retention()

    def retention(self) -> Retention:
        """The rules of the second tier."""
        return Retention(
            max_to_keep=self.max_to_keep,
            keep_period=self.keep_period,
            keep_interval_s=self.keep_interval_s,
            best=(self.best,) if isinstance(self.best, Best) else tuple(self.best or ()),
            time_to_live_s=self.time_to_live_s,
        )


@dataclasses.dataclass(slots=True)
class _Round:
    """What happened since the thread was woken.

    Attributes:
      has_looked: Whether what the second tier holds is known. A listing of a large bucket is many requests.
      closed: Steps that were uploaded, or given up for now.
      failures: How often each failed.
      is_patient: Whether a step is tried again. When one was given up, each of the others has a single attempt.
    """

    has_looked: bool = False
    closed: set[int] = dataclasses.field(default_factory=set[int])
    failures: collections.Counter[int] = dataclasses.field(default_factory=collections.Counter[int])
    is_patient: bool = True


@final
class Uploader:
    """Uploads the committed steps of a manager. Several threads may use it."""

    def __init__(
        self,
        local: Keeper,
        remote: Keeper,
        options: UploadOptions,
        tell: Tell,
        on_end: Callable[[int, CheckpointError | None], None],
        wall_s: Callable[[], float],
        pause: Callable[[float], object] | None = None,
        look_s: float = _LOOK_S,
    ) -> None:
        """Touches nothing, and starts no thread until `wake`.

        Args:
          local: Of the manager's directory; it deletes no step that is still to be uploaded.
          remote: Of the second tier.
          options: What is uploaded, and how.
          tell: Hears of what happens.
          on_end: Called in the background when a step was uploaded, or with why it was given up for now.
          wall_s: Clock for the times of checkpoints, in seconds since 1970.
          pause: Waits for so many seconds before another attempt; None: that, or until `finish` gives up.
          look_s: Most seconds that `is_there` waits for the first look at the second tier.
        """
        self._local = local
        self._remote = remote
        self._options = options
        self._tell = tell
        self._on_end = on_end
        self._wall_s = wall_s
        self._stop = threading.Event()
        self._pause = pause or self._stop.wait
        self._look_s = look_s
        self._has_looked = threading.Event()  # or nobody waits for it any more
        self._is_full = False
        self._is_started = False
        self._is_ending = False
        self._has_held_back = False
        # What the second tier was last seen to hold; None: nobody has looked.
        self._there: dict[int, StepRecord] | None = None
        self._condition = threading.Condition()
        self._is_called = False
        self._thread: threading.Thread | None = None
        self._current: int | None = None  # the step that is being copied
        self._barred: set[int] = set()  # steps that are being deleted
        local.hold_back = self.hold_back
        remote.is_ended = self._stop.is_set

    # --- for the manager --------------------------------------------------------------------------------------

    def wake_first(self) -> None:
        """As `wake`, but only once: what an earlier run left is uploaded."""
        if not self._is_started:
            self.wake()

    def wake(self) -> None:
        """There may be something to upload."""
        with self._condition:
            self._is_started = True
            self._is_called = True
            if self._thread is not None:
                return
            # Not a daemon: a program that ends now still finishes the uploads.
            self._thread = threading.Thread(target=self._run, name="jaxckpt-upload", daemon=False)
            thread = self._thread
        try:
            thread.start()
        except RuntimeError:  # a program that ends starts no more threads, and a system may have none left
            with self._condition:
                self._thread = threading.current_thread()
            self._run()

    def is_there(self, step: int) -> bool:
        """Whether the second tier has a step, as far as is known; waits a little for the first look there."""
        self._look_once()
        if step not in (self._there or {}):
            return False
        try:
            return self._remote.has(step)  # it may have been deleted since
        except OSError:
            return True

    def hold_back(self, doomed: Sequence[int]) -> set[int]:
        """Of steps that the local rules do not keep, those that stay until they are uploaded."""
        self._look_once()
        rules = self._options.retention()
        wanted = [record.step for record in self._wanted(rules) if record.step in doomed]
        current = self._current
        held_back = {step for step in doomed if step == current}
        waiting = [step for step in wanted if step != current]
        if len(waiting) > self._options.waiting_max:
            lasting = {record.step for record in self._wanted(dataclasses.replace(rules, max_to_keep=1))}
            waiting.sort(key=lambda step: step not in lasting)  # stable: of either kind the newest first
        held_back.update(waiting[: self._options.waiting_max])
        for step in waiting[self._options.waiting_max :]:
            message = (
                f"step {step} is deleted before it was uploaded: {self._options.waiting_max} others wait, too"
            )
            _log.warning("%s", message)
            self._tell("upload skipped", step, message)
        self._has_held_back = bool(held_back)
        return held_back

    @contextlib.contextmanager
    def without(self, step: int) -> Generator[None]:
        """Uploads nothing of a step in the body, where it is deleted; it is cut off if it is being uploaded."""
        with self._condition:
            self._barred.add(step)
            if threading.current_thread() is not self._thread:
                self._condition.wait_for(lambda: self._current != step)
        try:
            yield
            with self._condition:  # against the thread that adds to it
                there = self._there
                if there is not None:
                    self._there = {other: record for other, record in there.items() if other != step}
        finally:
            with self._condition:
                self._barred.discard(step)

    def wait(self, timeout_s: float | None = None) -> bool:
        """Waits until everything is uploaded or given up for now; whether that is so."""
        with self._condition:
            if threading.current_thread() is self._thread:  # an observer
                return True
            return self._condition.wait_for(lambda: self._thread is None, timeout_s)

    def finish(self, remaining_s: Callable[[], float | None]) -> None:
        """Ends the uploads: waits for them as long as there is time.

        After that, and after an interrupt, nothing more is sent; the end of the program waits for the objects in
        flight alone, each of which ends or is given up by its store.

        Args:
          remaining_s: Asked now and then how many seconds are left; None: there is no end to them, so far.
        """
        if not self._is_started:
            return
        self._is_ending = True
        try:
            self.wake()
            while True:
                left_s = remaining_s()
                if self.wait(_ASK_S if left_s is None else min(left_s, _ASK_S)):
                    return
                if left_s == 0.0:
                    break
        except BaseException:
            self._stop.set()
            raise
        self._stop.set()
        left = ", ".join(str(record.step) for record in self._wanted(self._options.retention()))
        _log.warning(
            "no time is left to upload to %r; the next run goes on with step %s",
            self._remote.directory.path,
            left,
        )

    # --- in the background ------------------------------------------------------------------------------------

    def _run(self) -> None:
        while self._is_needed():
            try:
                self._upload_all()
                self._drop_held_back()
            except Exception:
                _log.exception("uploading to %r", self._remote.directory.path)

    def _is_needed(self) -> bool:
        """Whether somebody called since the last time; if not, the thread ends."""
        with self._condition:
            is_called, self._is_called = self._is_called, False
            if not is_called:
                self._thread = None
                self._condition.notify_all()
            return is_called

    def _upload_all(self) -> None:
        """One round: tries every step that is wanted, the newest first."""
        so_far = _Round()
        while not self._stop.is_set():
            step: int | None = None
            try:
                if not so_far.has_looked:
                    self._look()
                    so_far.has_looked = True
                    self._make_room()
                record = self._next(so_far)
                if record is None:
                    return
                step = record.step
                self._upload(record)
                so_far.closed.add(step)  # who replaces it meanwhile wakes this thread again
            except Exception as error:  # storage's refusal, or no memory, or an observer's mistake
                so_far.has_looked = False  # who knows what was done
                if not self._note_failure(step, error, so_far):
                    return

    def _next(self, so_far: _Round) -> StepRecord | None:
        """The newest step that is wanted and still open in this round."""
        wanted = self._wanted(self._options.retention())
        return next((record for record in wanted if record.step not in so_far.closed), None)

    def _note_failure(self, step: int | None, error: Exception, so_far: _Round) -> bool:
        """Says that an upload failed, and waits before the next attempt; False when the round is over."""
        place = self._remote.directory.path
        is_listing = step is None
        if step is None:
            record = self._next(so_far)
            if record is None:
                _log.warning("cannot look for steps in %r: %s", place, error)
                return False
            step = record.step
        self._remote.note_failed(step)  # what is left there is swept
        self._is_full = isinstance(error, OSError) and error.errno in _FULL
        so_far.failures[step] += 1
        count = so_far.failures[step]
        is_damaged = isinstance(error, (CorruptError, FormatError))
        if so_far.is_patient and not is_damaged and count < self._options.attempts:
            pause_s = min(_PAUSE_S * 2 ** (count - 1), _PAUSE_MAX_S)
            _log.warning("step %d is not uploaded yet, and tried again in %g s: %s", step, pause_s, error)
            self._pause(pause_s)
            return True
        so_far.is_patient &= is_damaged
        so_far.closed.add(step)
        self._on_end(step, _failure_of(step, place, error))
        return not is_listing

    def _look_once(self) -> None:
        """Waits until somebody has looked; what cannot be found out in time counts as not there."""
        if self._is_started:
            if not self._has_looked.wait(self._look_s):
                self._has_looked.set()  # once is enough
                place = self._remote.directory.path
                _log.warning("cannot look for steps in %r: no answer after %g s", place, self._look_s)
        elif not self._has_looked.is_set():
            try:
                self._look()
            except (CheckpointError, OSError) as error:
                _log.warning("cannot look for steps in %r: %s", self._remote.directory.path, error)

    def _look(self) -> None:
        """Finds out what the second tier holds."""
        try:
            self._there = {record.step: record for record in self._remote.directory.records()}
        finally:
            self._has_looked.set()

    def _make_room(self) -> None:
        """Deletes what uploads left, but for what will be gone on with if there is room."""
        self._remote.directory.spare(() if self._is_full else self._local.steps())
        self._remote.sweep_once()

    def _wanted(self, rules: Retention) -> list[StepRecord]:
        """The steps that are still to be uploaded and that these rules of the second tier keep, the newest first."""
        local = {
            record.step: record
            for record in self._local.durable_records()
            if record.step not in self._barred and not self._local.is_left_out(record.step)
        }
        there = self._there or {}
        lacking = {
            step: record
            for step, record in local.items()
            if step not in there or self._replaces(record, there[step])
        }
        due = _choose_due(lacking, there, self._options.interval_steps)
        if self._is_ending and max(local, default=None) in lacking:
            due.add(max(local))
        records = [*{**there, **{step: lacking[step] for step in due}}.values()]
        pinned = frozenset(self._local.directory.pinned([*local.values()]))
        verdicts = judge_steps(
            [record.step for record in records],
            [record.created_s for record in records],
            [record.metrics for record in records],
            dataclasses.replace(rules, pinned=pinned),
            self._wall_s(),
        )
        return [
            lacking[verdict.step] for verdict in reversed(verdicts) if verdict.is_kept and verdict.step in due
        ]

    def _replaces(self, local: StepRecord, remote: StepRecord) -> bool:
        """Whether a local step is another one than that of the second tier, and younger."""
        is_younger = local.step in self._local.saved_steps or local.created_s > remote.created_s
        return local.checksum != remote.checksum and is_younger

    def _upload(self, record: StepRecord) -> None:
        step = record.step
        source = self._local.directory.store_of(step)
        target = self._remote.directory.store_of(step)
        fingerprint = source.fingerprint(MANIFEST_NAME)
        with self._condition:
            if step in self._barred:
                return
            self._current = step
        began_s = time.perf_counter()
        try:
            self._tell("uploading", step, f"uploading step {step} to {target.path}")
            report = copy_checkpoint(
                source,
                target,
                io_threads=self._options.io_threads,
                host_bytes_max=self._options.host_bytes_max,
                is_cancelled=lambda: self._stop.is_set() or step in self._barred,
                on_progress=None if self._options.on_progress is None else self._show,
            )
            if report is not None:
                with self._condition:
                    self._there = {**(self._there or {}), step: record}
                self._end_upload(step, report, time.perf_counter() - began_s)
        except CheckpointError as error:
            if source.fingerprint(MANIFEST_NAME) != fingerprint:
                return  # it was deleted or replaced meanwhile
            if isinstance(error, CorruptError):
                self._local.note_damaged(step, fingerprint)
            raise
        finally:
            with self._condition:
                self._current = None
                self._condition.notify_all()

    def _show(self, progress: Progress) -> None:
        """An observer that fails does not make the upload fail."""
        assert self._options.on_progress is not None
        try:
            self._options.on_progress(progress)
        except Exception:
            _log.exception("on_progress failed")

    def _end_upload(self, step: int, report: CopyReport, seconds: float) -> None:
        """What follows the commit in the second tier."""
        self._remote.note_saved(step)
        self._remote.note_last(step)
        try:
            if self._local.directory.store_of(step).exists(PIN_NAME):
                self._remote.pin(step)
        except (CheckpointError, OSError) as error:
            _log.warning("step %d is not pinned in %r: %s", step, self._remote.directory.path, error)
        size = format_bytes(report.bytes_sent)
        again = f", {report.objects_there} were there" if report.objects_there else ""
        message = f"uploaded step {step} in {seconds:.3f} s: {size} in {report.objects_sent} objects{again}"
        _log.info("%s", message)
        self._tell("uploaded", step, message)
        self._on_end(step, None)
        self._remote.directory.spare(self._local.steps())
        self._remote.tidy(step)

    def _drop_held_back(self) -> None:
        """Deletes local steps that no rule keeps and that waited for their upload."""
        if self._has_held_back:
            try:
                self._local.prune()
            except OSError as error:
                _log.warning("cannot look for old steps in %r: %s", self._local.directory.path, error)


def _choose_due(
    lacking: dict[int, StepRecord], there: dict[int, StepRecord], interval_steps: int | None
) -> set[int]:
    """Steps with which a multiple of the interval is reached or passed since the last one that is there or due."""
    due: set[int] = set()
    last: int | None = None
    for step in sorted({*lacking, *there}):
        if step in lacking:
            is_next = (
                interval_steps is None or last is None or step // interval_steps != last // interval_steps
            )
            if not is_next and step not in there:  # what replaces another one is due
                continue
            due.add(step)
        last = step
    return due


def _failure_of(step: int, place: str, error: Exception) -> CheckpointError:
    """The error that is raised by `CheckpointManager.wait`."""
    if isinstance(error, (CorruptError, FormatError)):
        failure: CheckpointError = CorruptError(
            f"step {step} is not uploaded to {place!r}: {error}", error.problems
        )
    else:
        reason: object = error
        if isinstance(error, OSError) and not isinstance(error, WriteError):
            reason = error.strerror or error
        elif not isinstance(error, CheckpointError):
            reason = f"{type(error).__name__}: {error}"
        failure = WriteError(
            f"step {step} is not uploaded to {place!r}: {reason}\nit is tried again after the next save",
            error.errno if isinstance(error, OSError) else None,
        )
    failure.__cause__ = error
    return failure
