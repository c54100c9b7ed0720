"""How does a save go on in the background, and who learns that it failed?

`PendingSave` runs the second half of a `SaveJob` on a thread of its own. That thread is not a daemon: a program that
ends lets it finish. Its failure is logged at once, and raised by `wait`. If nobody has asked for it when the program
ends, the exit status is 120, the one that Python gives for errors after the program's last line (its flush of stdout):
a script that never looks at what it saved must not end as if all were well.
"""

from __future__ import annotations

import atexit
import functools
import inspect
import logging
import os
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Any, final

from ._progress import Progress, ProgressMeter
from ._saving import CheckpointInfo, SaveJob

_log = logging.getLogger("jaxckpt")


@final
class PendingSave:
    """A save that goes on in the background. `jaxckpt.save_async` and `CheckpointManager.save` make these."""

    def __init__(
        self,
        path: str,
        on_end: Callable[[PendingSave], None] | None = None,
        afterwards: Callable[[], None] | None = None,
    ) -> None:
        """A save that has not begun.

        Args:
          path: Where the checkpoint will be.
          on_end: Called in the background when the save has ended, well or not, before `wait` returns.
          afterwards: Called in the background after that, while nobody waits.
        """
        _watch_exit()
        self._path = path
        self._meter = ProgressMeter(0, "snapshot")
        self._snapshot_done = threading.Event()
        self._done = threading.Event()
        self._info: CheckpointInfo | None = None
        self._failure: BaseException | None = None
        self._on_end = on_end
        self._afterwards = afterwards
        self._thread: threading.Thread | None = None
        self._ending_thread: int | None = None  # calls the hooks

    def start(self, job: SaveJob) -> None:
        """Stages the snapshot on the caller's thread while another one does the rest; raises if staging fails."""
        self._meter = job.meter
        # Not a daemon: a program that ends now still finishes the save.
        thread = threading.Thread(target=self._run, args=(job,), name="jaxckpt-save", daemon=False)
        self._thread = thread
        _unfinished.add(self)
        try:
            thread.start()
            job.stage()
        except BaseException as error:  # an interrupt, too
            # The background thread notices, cleans up and says in its own words what failed.
            job.give_up(error)
            if isinstance(error, RuntimeError) and thread.ident is None:
                self._thread = None
                self._run(job)  # there is no background thread: the system has none left
            self._done.wait()
            failure = self._failure or error
            raise failure from failure.__cause__

    def fail(self, error: BaseException) -> None:
        """Ends a save that could not even begin."""
        self._end_badly(error)
        self._announce_end()
        self._ending_thread = None

    def _run(self, job: SaveJob) -> None:
        try:
            job.drain()
            self._snapshot_done.set()
            self._info = job.finish()
        except BaseException as error:
            self._end_badly(error)
        finally:
            del job  # the failure keeps this frame, too
            self._announce_end()
            self._call(self._afterwards)
            self._ending_thread = None

    def _end_badly(self, error: BaseException) -> None:
        # The failure may be kept for long, and with it whatever its frames refer to: the snapshot, for one.
        for link in chain_of(error):
            traceback.clear_frames(link.__traceback__)
        self._failure = error
        _unseen_failures.add(self)
        _log.error("%s", str(error))  # whoever keeps the record keeps no frames

    def _announce_end(self) -> None:
        self._snapshot_done.set()
        self._ending_thread = threading.get_ident()
        if self._on_end is not None:
            self._call(functools.partial(self._on_end, self))
        _unfinished.discard(self)
        self._done.set()

    def _call(self, hook: Callable[[], None] | None) -> None:
        """What a manager adds to a save cannot make it fail."""
        if hook is None:
            return
        try:
            hook()
        except BaseException:
            _log.exception("after the save of %r", self._path)

    def wait(self, timeout_s: float | None = None) -> CheckpointInfo:
        """Waits until the checkpoint is durable.

        Args:
          timeout_s: Most seconds to wait; None waits for ever. The save goes on after a timeout.

        Raises:
          TimeoutError: It is not durable yet.
          CheckpointError: The save failed; nothing was committed.
        """
        if not self.wait_done(timeout_s):
            raise TimeoutError(f"the save of {self._path!r} is not finished after {timeout_s} s")
        if self._afterwards is None:
            self.wait_until_idle()
        if self._failure is not None:
            self.mark_seen()
            raise self._failure
        assert self._info is not None
        return self._info

    def wait_snapshot(self, timeout_s: float | None = None) -> bool:
        """Waits until nothing more is read from the devices; says whether that is so.

        Donating needs no wait. This is for who wants the transfer out of the way of something else.
        """
        return self._snapshot_done.wait(timeout_s)

    def done(self) -> bool:
        """Whether the save has ended, well or not."""
        return self._done.is_set()

    def exception(self) -> BaseException | None:
        """Why the save failed, or None: it went well, or has not ended. Does not wait."""
        self.mark_seen()
        return self._failure

    def progress(self) -> Progress:
        """How far the save is."""
        return self._meter.read()

    @property
    def failure(self) -> BaseException | None:
        """As `exception`, for a manager, whose knowing does not count as somebody's."""
        return self._failure

    @property
    def info(self) -> CheckpointInfo | None:
        """What was saved, once it is durable."""
        return self._info

    def wait_done(self, timeout_s: float | None = None) -> bool:
        """As `wait`, but says how the save ended to nobody; whether it has ended."""
        # A hook would wait for itself.
        return self.calls_here() or self._done.wait(timeout_s)

    def calls_here(self) -> bool:
        """Whether the caller is called by a hook of this save."""
        return self._ending_thread == threading.get_ident()

    @property
    def path(self) -> str:
        """Where the checkpoint will be."""
        return self._path

    def is_unseen(self) -> bool:
        """Whether the save failed and nobody knows."""
        return self in _unseen_failures

    def is_busy(self) -> bool:
        """Whether the thread is there still."""
        return self._thread is not None and self._thread.is_alive()

    def mark_seen(self) -> None:
        """Says that somebody knows of the failure, or that a later save has made up for it."""
        _unseen_failures.discard(self)

    def wait_until_idle(self) -> None:
        """Waits until the thread is gone, and with it whatever a manager does after the save."""
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()


def chain_of(error: BaseException) -> list[BaseException]:
    """An error and those that led to it."""
    chain: list[BaseException] = []
    left: list[BaseException | None] = [error]
    while left:
        link = left.pop()
        if link is not None and not any(link is known for known in chain):
            chain.append(link)
            left += [link.__cause__, link.__context__]
    return chain


# --- the exit status ------------------------------------------------------------------------------------------

# Adding and discarding are atomic; the sets are looked at when all threads have ended.
_unseen_failures: set[PendingSave] = set()
_unfinished: set[PendingSave] = set()


@functools.cache
def _watch_exit() -> None:
    atexit.register(_spoil_exit_status)
    os.register_at_fork(after_in_child=_forget_saves)


def _forget_saves() -> None:
    """A forked process answers for its own saves."""
    _unseen_failures.clear()
    _unfinished.clear()


def _spoil_exit_status() -> None:
    """Runs after Python has joined the background threads, unless an interrupt made it give up on that.

    An exit handler cannot set the status, and os._exit() would cut off the handlers after it. But Python ends with
    status 120 when stdout cannot be flushed after the last handler, and says the reason on stderr.
    """
    failures = [str(pending.failure) for pending in _unseen_failures]
    failures += [f"the save of {pending.path!r} was cut off" for pending in _unfinished]
    if failures:
        sys.stdout = _StreamThatFails(sys.stdout, failures[-1])


@final
class _StreamThatFails:
    """Stdout, but that flushing it raises."""

    closed = False

    def __init__(self, stream: Any, reason: str) -> None:
        self._stream = stream
        self._reason = reason

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def flush(self) -> None:
        if not getattr(self._stream, "closed", True):
            self._stream.flush()
        frame = inspect.currentframe()
        # Exit handlers may flush as they like: only Python's own flush at the end has no caller.
        if frame is None or frame.f_back is None:
            raise RuntimeError(f"a save failed and nobody waited for it: {self._reason}")
