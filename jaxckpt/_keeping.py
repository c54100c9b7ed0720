"""Which of a manager's steps count, and how are those deleted that no rule keeps?

A `Keeper` knows what one manager has learned of its directory beyond what lies there: which step it saved last, which
steps proved damaged, which one a failed save may have left behind. Only what is durable is judged by `_retention`, and
what no rule keeps is deleted in the background after a save (`Keeper.tidy`), in this order:

    1. sweep            what saves left that were never committed, and what an overwrite replaced
    2. delete old       marker first, so that a crash leaves no half of a step; what somebody reads stays for now
    3. checkpoint.json  written anew

Nothing depends on any of it: what storage refuses is logged, and tried again after the next save.

Invariants:

* The step that was saved or restored last is never deleted by a rule, whatever clocks say.
* A step whose save is in flight, or failed late, makes no other step an old one.
* What is damaged is neither deleted nor counted. It is known by the fingerprint of its manifest, so that a new save
  of that step counts again.

In a group of processes that share a directory one of them keeps it; the keepers of the others only look.

Deliberately not here: which steps stay (`_retention`), and what is on storage (`_steps`).
"""

from __future__ import annotations

import dataclasses
import logging
import operator
import threading
from collections.abc import Callable, Collection
from typing import Any, Protocol, final

from ._errors import CheckpointError, NotFoundError
from ._retention import Retention, Verdict, judge_steps
from ._steps import StepDirectory, StepRecord
from ._storage import Store

_log = logging.getLogger("jaxckpt")


class Tell(Protocol):
    """Hears of what happens to a step."""

    def __call__(self, kind: str, step: int, message: str, *, error: BaseException | None = None) -> None: ...


@final
class Keeper:
    """Keeps the steps of a directory. Several threads may use it.

    Attributes:
      last_step: In flight or committed by this manager, or restored by it.
      failed_step: Whose save failed last, unless one went well since.
      saved_steps: Those that this manager saved.
      tidy_lock: Held while steps are judged and deleted. An observer of a deletion may pin and delete.
      directory: What it keeps.
      is_ended: Whether nobody waits any more, so that `tidy` asks for nothing more; the next run does.
      hold_back: Is told which steps no rule keeps, and says which of them stay for now all the same.
    """

    def __init__(
        self, directory: StepDirectory, retention: Retention, wall_s: Callable[[], float], tell: Tell
    ) -> None:
        self.last_step: int | None = None
        self.failed_step: int | None = None
        self.saved_steps: set[int] = set()
        self.tidy_lock = threading.RLock()
        self.directory = directory
        self.hold_back: Callable[[list[int]], Collection[int]] = lambda _: ()
        self.is_ended: Callable[[], bool] = lambda: False
        self._retention = retention
        self._wall_s = wall_s
        self._tell = tell
        self._is_swept = False
        self._lock = threading.Lock()
        # Fingerprints of what counts as no step: what proved damaged, and what a failed save has put there, which may
        # be gone when the machine fails.
        self._damaged: dict[int, Any] = {}
        self._doubtful: dict[int, Any] = {}

    # --- what is there ----------------------------------------------------------------------------------------

    def steps(self) -> list[int]:
        """The committed steps that count, ascending."""
        return [step for step in self.directory.committed() if not self.is_left_out(step)]

    def latest_step(self) -> int | None:
        """The newest step that counts, or None."""
        return max(self.steps(), default=None)

    def has_only_doubtful(self) -> bool:
        """Whether nothing is committed but what failed saves have put there."""
        return all(self._is_doubtful(step) for step in self.directory.committed())

    def records(self) -> list[StepRecord]:
        """What the steps that count say of themselves."""
        return [record for record in self.directory.records() if not self.is_left_out(record.step)]

    def durable_records(self) -> list[StepRecord]:
        """What the steps say of themselves that are there for sure, damaged ones too.

        What the save in flight, or one that failed late, has put there may be gone when the machine fails.
        """
        records = self.directory.records()
        # Asked for after the records, so that a step that is in them and not unsure is durable.
        unsure = self.directory.busy
        with self._lock:
            failed = self.failed_step
        return [record for record in records if record.name != unsure and record.step != failed]

    def has(self, step: int) -> bool:
        """Whether a step is committed, and whole as far as is known."""
        return self.directory.fingerprint_of(step) is not None and not self.is_damaged(step)

    def require(self, step: int) -> Store:
        """Where a step is, which must be committed."""
        step = checked_step(step)
        if self.directory.fingerprint_of(step) is None:
            steps = self.steps()
            there = f"it has {', '.join(map(str, steps[-10:]))}" if steps else "nothing is committed there"
            raise NotFoundError(f"there is no step {step} in {self.directory.path!r}: {there}")
        return self.directory.store_of(step)

    def is_damaged(self, step: int) -> bool:
        """Whether what is there proved damaged."""
        fingerprint = self._damaged.get(step)
        return fingerprint is not None and fingerprint == self.directory.fingerprint_of(step)

    def _is_doubtful(self, step: int) -> bool:
        fingerprint = self._doubtful.get(step)
        return fingerprint is not None and fingerprint == self.directory.fingerprint_of(step)

    def is_left_out(self, step: int) -> bool:
        """Whether a committed step counts as none."""
        return self._is_doubtful(step) or self.is_damaged(step)

    # --- what happened ----------------------------------------------------------------------------------------

    def note_last(self, step: int | None) -> None:
        """This step is being saved, or training goes on from it; None: a save was given up."""
        with self._lock:
            self.last_step = step

    def note_saved(self, step: int) -> None:
        """The save of a step went well."""
        with self._lock:
            self.failed_step = None
            self.saved_steps.add(step)
            self._damaged.pop(step, None)
            self._doubtful.pop(step, None)

    def note_failed(self, step: int, late: Any = None) -> None:
        """The save of a step failed, and may have put in place what has this fingerprint."""
        with self._lock:
            if late is not None:
                self._doubtful[step] = late
            self.failed_step = step
            self._is_swept = False  # storage that refuses to write may refuse to delete, too
            if self.last_step == step:
                self.last_step = None

    def note_damaged(self, step: int, fingerprint: Any) -> None:
        """What has this fingerprint proved damaged."""
        with self._lock:
            self._damaged[step] = fingerprint

    def note_deleted(self, step: int) -> None:
        """A step was deleted because somebody asked for that."""
        with self._lock:
            self._damaged.pop(step, None)
            self._doubtful.pop(step, None)
            if self.last_step == step:
                self.last_step = None

    # --- deleting ---------------------------------------------------------------------------------------------

    def sweep_once(self) -> None:
        """Makes room before the first save, for a crash may have filled the disk."""
        if self._is_swept:
            return
        self._is_swept = True
        try:
            self.directory.sweep_all()
        except OSError as error:
            self._is_swept = False
            _log.warning("cannot sweep %r: %s", self.directory.path, error)

    def tidy(self, step: int) -> None:
        """Called in the background after a save of this step, while nobody waits."""
        with self.tidy_lock:
            try:
                self.directory.sweep()
                # What was replaced may have been too damaged to be removed, or in use.
                self.directory.sweep_step(step)
            except OSError as error:
                self._is_swept = False
                _log.warning("cannot sweep %r: %s", self.directory.path, error)
            if self.is_ended():
                return
            try:
                self._delete_old(self.is_ended)
            except OSError as error:
                _log.warning("cannot look for old steps in %r: %s", self.directory.path, error)
            if not self.is_ended():
                self._write_cache()

    def prune(self) -> list[int]:
        """Deletes what no rule keeps; returns those steps."""
        with self.tidy_lock:
            newest = self.latest_step()
            if newest is not None:
                # Another process may have renamed its manifest without having synced the directory yet.
                self.directory.store_of(newest).confirm()
            deleted = self._delete_old()
            if deleted:
                self._write_cache()
        return deleted

    def delete(self, step: int) -> None:
        """Deletes a step, whatever the rules say."""
        with self.tidy_lock:
            self.require(step)
            if not self.directory.delete(step):
                raise CheckpointError(
                    f"step {step} of {self.directory.path!r} is being read\ntry again later"
                )
            self._write_cache()

    def pin(self, step: int) -> None:
        """Marks a step as one that stays."""
        with self.tidy_lock:  # not between the judgement of a step and its deletion
            self.require(step)
            self.directory.pin(step)

    def unpin(self, step: int) -> None:
        """Takes the mark away."""
        with self.tidy_lock:
            self.require(step)
            self.directory.unpin(step)

    def explain(self) -> list[Verdict]:
        """What the rules say of each committed step."""
        records = self.directory.records()
        verdicts = {verdict.step: verdict for verdict in self._judge(records)}
        for step in self.directory.committed():
            if step not in verdicts:
                verdicts[step] = Verdict(step, True, ("it cannot be read, and is left alone",))
        return [verdicts[step] for step in sorted(verdicts)]

    def _judge(self, records: list[StepRecord]) -> list[Verdict]:
        whole = [record for record in records if not self.is_damaged(record.step)]
        policy = dataclasses.replace(
            self._retention, pinned=self._retention.pinned | self.directory.pinned(whole)
        )
        return judge_steps(
            [record.step for record in whole],
            [record.created_s for record in whole],
            [record.metrics for record in whole],
            policy,
            self._wall_s(),
        )

    def _delete_old(self, is_over: Callable[[], bool] = lambda: False) -> list[int]:
        """Deletes what no rule keeps; what cannot be deleted is tried again after the next save."""
        deleted: list[int] = []
        # Clocks of several machines may disagree about what was committed last; this process knows what it was.
        doomed = {
            verdict.step: verdict
            for verdict in self._judge(self.durable_records())
            if not verdict.is_kept and verdict.step != self.last_step
        }
        held_back = self.hold_back(list(doomed)) if doomed else ()
        for step, verdict in doomed.items():
            if step in held_back or is_over():
                continue
            try:
                is_deleted = self.directory.delete(step)
            except OSError as error:
                _log.warning("cannot delete step %d of %r: %s", step, self.directory.path, error)
                continue
            if is_deleted:
                deleted.append(step)
                self._tell("deleted", step, f"deleted step {step}: {'; '.join(verdict.reasons)}")
            else:
                self._tell("in use", step, f"step {step} is being read, and deleted later")
        return deleted

    def _write_cache(self) -> None:
        """Nothing depends on it, so that nothing fails with it."""
        try:
            self.directory.write_cache()
        except OSError as error:
            self._is_swept = False
            _log.warning("cannot write checkpoint.json in %r: %s", self.directory.path, error)


def checked_step(step: Any) -> int:
    """A number of a step as a Python int."""
    if isinstance(step, bool):
        raise TypeError(f"step must be an int, not {step!r}")
    try:
        number = operator.index(step)
    except TypeError:
        raise TypeError(f"step must be an int, not {step!r:.100}") from None
    if not 0 <= number < 10**18:
        raise ValueError(f"step must be at least 0 and below 10**18, not {number}")
    return number
