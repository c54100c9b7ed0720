"""What of a manager's work goes on in the background, who waits for it, and who hears of what failed there?

One save is in flight at a time: begun, and not done. When it is done its thread goes on for a while, sweeping and
deleting, beside the next save; it is idle when the thread is gone. `Background` knows these saves, and the failures of
saves and uploads that nobody was told of:

    begin ──> in flight ──> note_end ──> done, deleting ──> idle
                               └─ failed: kept until `take_failures`

Invariants:

* A failure is kept until it is taken; the next one takes the place of those that somebody has seen. A later save that
  went well makes up for them: the last one is told still, and no exit status is spoilt.
* A hook that waits for its own save does not wait: it would for ever.

Deliberately not here: saving (`_deciding`), uploading (`_uploading`), and the exit status (`_pending`).
"""

from __future__ import annotations

import threading
from typing import final

from ._errors import CheckpointError
from ._keeping import Tell
from ._pending import PendingSave
from ._saving import CheckpointInfo


@final
class Background:
    """The saves of a manager that are not idle, and what failed and nobody knows. Several threads may use it.

    Attributes:
      pending: The save that began last, in flight or done; None: there was none, or it was forgotten.
      step: The step of the save that began last.
      last_info: Of the save that went well last.
    """

    def __init__(self, tell: Tell) -> None:
        self.pending: PendingSave | None = None
        self.step = -1
        self.last_info: CheckpointInfo | None = None
        self._tell = tell
        self._idle: list[PendingSave] = []  # done, but their threads may still delete
        self._lock = threading.Lock()
        self._failures: list[PendingSave] = []
        self._failed_upload: tuple[int, PendingSave] | None = None

    def in_flight(self) -> PendingSave | None:
        """The save that is not done yet."""
        return None if self.pending is None or self.pending.done() else self.pending

    # --- what happened ----------------------------------------------------------------------------------------

    def begin(self, pending: PendingSave, step: int) -> None:
        """A save is about to start; none is in flight."""
        self.pending, self.step = pending, step
        self._idle = [old for old in self._idle if old.is_busy()]
        self._idle.append(pending)

    def forget(self, pending: PendingSave) -> None:
        """The caller's mistake, or an interrupt, ended a save, and is raised there: nobody else hears of it."""
        pending.mark_seen()
        if self.pending is pending:
            self.pending = None
        with self._lock:
            self._failures = [failed for failed in self._failures if failed is not pending]

    def note_end(self, pending: PendingSave) -> None:
        """Called in the background when a save has ended."""
        with self._lock:
            if pending.failure is not None:
                # Who has seen one may have left frames in it.
                self._failures = [older for older in self._failures if older.is_unseen()] + [pending]
            else:
                self.last_info = pending.info
                for older in self._failures:
                    older.mark_seen()  # made up for: the program's exit status stays
                del self._failures[:-1]  # of many failures the last one is told

    def note_upload_end(self, path: str, step: int, failure: CheckpointError | None) -> None:
        """Called in the background when a step was uploaded to this path, or given up for now."""
        if failure is None:
            with self._lock:
                if self._failed_upload is not None and self._failed_upload[0] <= step:
                    self._failed_upload[1].mark_seen()  # made up for: the program's exit status stays
                if self._failed_upload is not None and self._failed_upload[0] == step:
                    self._failed_upload = None
            return
        pending = PendingSave(path)
        pending.fail(failure)
        with self._lock:
            if self._failed_upload is not None:
                self._failed_upload[1].mark_seen()  # of many failures the last one is told
            self._failed_upload = step, pending
        self._tell("upload failed", step, str(failure), error=failure)

    # --- waiting ----------------------------------------------------------------------------------------------

    def wait_until_done(self) -> None:
        """Waits for the save in flight, however it ends."""
        if self.pending is not None:
            self.pending.wait_done()

    def wait_until_idle(self, timeout_s: float | None = None) -> None:
        """Waits for the save in flight and for what comes after it.

        Args:
          timeout_s: Most seconds to wait for the save in flight; None waits for ever.

        Raises:
          TimeoutError: It is not done by then.
        """
        if self.pending is not None and not self.pending.wait_done(timeout_s):
            raise TimeoutError(f"the save of step {self.step} is not finished after {timeout_s} s")
        if any(pending.calls_here() for pending in self._idle):
            return  # an observer, for which what comes after a younger save may wait
        for pending in self._idle:
            pending.wait_until_idle()

    def take_failures(self) -> list[PendingSave]:
        """What failed and was not raised yet; the last one is to be raised."""
        with self._lock:
            uploads = [] if self._failed_upload is None else [self._failed_upload[1]]
            failures = [*uploads, *self._failures]
            self._failures = []
            self._failed_upload = None
        return failures


def raise_last(failures: list[PendingSave]) -> None:
    """Raises the last of these failures, if there is one; it stands for all."""
    for pending in failures:
        pending.mark_seen()
    if failures:
        failure = failures[-1].failure
        assert failure is not None
        raise failure
