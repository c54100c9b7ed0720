"""Will this process be ended soon, and after which step do all processes stop for it?

A cluster announces the end of a process by a signal, mostly SIGTERM, and kills it some seconds later. The handler that
`Preemption` installs notes the time and the signal, calls the handler that was there before, and returns. The training
loop asks once a step, by `Preemption.is_requested`, and saves when the answer is yes. The handler takes no lock and
logs nothing: it runs between any two bytecodes of the main thread, which may hold the lock of a logger at that moment.
The log line is written by the next `is_requested`.

Processes of one ``jax.distributed`` job must stop after the same step, or some of them wait for ever in a collective.
JAX has a service for that. ``jax.distributed.initialize`` replaces the handler of SIGTERM by one in C++, unless
``jax_enable_preemption_service`` is off, and what it catches goes to all processes. Each process hands the service a
growing counter, by ``multihost_utils.reached_preemption_sync_point``. After an announcement the service takes the
largest counter of all processes, adds one, and answers yes to that counter alone. Three things follow from it:

  * While the service is on, it keeps SIGTERM: `Preemption` neither installs over it nor restores anything there.
  * The counter is a count of distinct steps from 0, not the step. A loop that asks every 10 steps, or whose first step
    is 1000, would never ask for the agreed number (an announcement before the first call makes it 0), and a step above
    ``2**31 - 1`` does not fit. All processes ask at the same steps, so that their counts are the same too.
  * What one process learns by another way (a second signal, `request`) must reach the others. With several processes,
    `Preemption` then sends its own process a SIGTERM, which the service catches.

Without the service, somebody else has to bring the processes to one step. A manager of a group does: it asks the
`Preemption` of process 0 alone, and tells the others (`is_requested(step, is_for_all=True)`).

Deliberately not here: what is done about it. The process is not ended, and nothing is saved.
"""

from __future__ import annotations

import logging
import math
import os
import pathlib
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable
from types import FrameType, TracebackType
from typing import Any, Self, final

_logger = logging.getLogger("jaxckpt")

_UNCATCHABLE = frozenset({signal.SIGKILL, signal.SIGSTOP})

# Stands for jax's service where jax keeps the object in a place that this module does not know.
_SOME_SERVICE = object()


@final
class Preemption:
    """Learns that this process will be ended soon.

    A signal does not end the process while this is installed; the loop is expected to ask, to save and to leave. Once
    announced, the end stays announced: further signals change nothing.

    JAX's preemption service, on by default after ``jax.distributed.initialize``, keeps SIGTERM and tells all processes
    of it after the same step, about a second after the signal. The counter that it wants is then this package's:
    nobody else may call ``multihost_utils.reached_preemption_sync_point``. Without the service each process learns of
    its own signal alone.

    Python runs signal handlers in the main thread, between two bytecodes. A step that runs long in C, such as a
    compilation or waiting for a device, delays the handler until it returns.

    Args:
      signals: Which signals announce the end. For Slurm with ``--signal=USR1@60``:
        ``(signal.SIGTERM, signal.SIGUSR1)``. May be empty, for `request` alone.
      grace_s: Seconds from the announcement to the end, None where the cluster does not promise any.
      clock: Counts seconds.

    Raises:
      ValueError: A signal that does not exist or cannot be caught, or a grace that is no number of seconds.

    Example:
      >>> preemption = Preemption(grace_s=30)
      >>> with preemption:
      ...     for step in range(1, 100):
      ...         if step == 3:
      ...             signal.raise_signal(signal.SIGTERM)
      ...         if preemption.is_requested(step):
      ...             break
      >>> step
      3
    """

    def __init__(
        self,
        signals: Iterable[int] = (signal.SIGTERM,),
        *,
        grace_s: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._signals = tuple(dict.fromkeys(_checked_signal(number) for number in signals))
        if grace_s is not None and not (math.isfinite(grace_s) and grace_s >= 0):
            raise ValueError(
                f"grace_s must be a number of seconds that is not negative, or None, not {grace_s!r}"
            )
        self._grace_s = grace_s
        self._clock = clock
        self._previous: dict[int, Any] = {}
        self._is_installed = False
        self._pid = os.getpid()
        self._announced_s: float | None = None
        self._announced_by = ""
        self._is_answered = False
        self._is_forwarded = False

    def install(self) -> None:
        """Catches the signals from here on; again: nothing.

        A Python handler that was there before is called after the signal is noted, except the one that raises
        KeyboardInterrupt. Processes that are forked later treat the signals as if this were not installed.

        Raises:
          RuntimeError: This is not the main thread.
        """
        if self._is_installed:
            return
        _require_main_thread("install")
        self._pid = os.getpid()
        for number in self._signals:
            if _is_kept_by_jax(number):
                continue
            previous = signal.signal(number, self._on_signal)
            if previous != self._on_signal:
                self._previous[number] = previous
        self._is_installed = True

    def uninstall(self) -> None:
        """Puts back what `install` found, unless somebody else has installed a handler meanwhile; again: nothing.

        Raises:
          RuntimeError: This is not the main thread.
        """
        if not self._is_installed:
            return
        _require_main_thread("uninstall")
        for number, previous in self._previous.items():
            if signal.getsignal(number) == self._on_signal and not _is_kept_by_jax(number):
                # None: a handler that is not Python's was there, and Python cannot put it back.
                signal.signal(number, signal.SIG_DFL if previous is None else previous)
        self._is_installed = False

    def is_requested(self, step: int, *, is_for_all: bool = False) -> bool:
        """Whether to stop after this step; once True, always True.

        With jax's preemption service every process must call this at the same steps, in the same order, best after
        every step. The service agrees on a step that all of them have still ahead, so that the answer comes one call
        or more after the signal, and not at all if the loop ends before.

        Args:
          step: The step that is finished. A second call for the same step gets the same answer.
          is_for_all: Whether this process never answers for itself alone: with jax's service it is what that says, and
            without it the caller asks in one process and tells the others.

        Returns:
          True if the end of the process is announced and, with several processes, agreed upon for this step.
        """
        if self._is_answered:
            return True
        service = _jax_service()
        is_agreed = service is not None and _sync_points.is_reached(service, step)
        if not is_agreed and not self._is_to_stop_alone(service, is_for_all=is_for_all):
            return False
        self._answer(step, is_agreed=is_agreed or is_for_all)
        return True

    @property
    def is_agreed_by_jax(self) -> bool:
        """Whether jax's preemption service is on, which makes all processes stop after one step."""
        return _jax_service() is not None

    @property
    def requested(self) -> bool:
        """Whether the end is announced, as far as this process knows without asking jax's service."""
        return self._announced_s is not None

    def request(self) -> None:
        """Announces the end, where a cluster does so by other means than a signal; from any thread.

        One process is enough where jax's preemption service tells the others.
        """
        self._note("a request")

    def remaining_s(self) -> float | None:
        """Seconds left until the process is ended, at least 0.

        What jax's service caught counts from the call of `is_requested` that returned True, since the service does not
        tell when it caught it. That call comes a second or more later than the signal.

        Returns:
          None if the end is not announced, or `grace_s` is None.
        """
        if self._announced_s is None or self._grace_s is None:
            return None
        return max(0.0, self._grace_s - (self._clock() - self._announced_s))

    def __enter__(self) -> Self:
        self.install()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.uninstall()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        """The handler: takes no lock and logs nothing."""
        previous = self._previous.get(number)
        if os.getpid() != self._pid:
            # A forked worker inherits this handler, and whoever terminates the worker waits for its end.
            _act_as_before(previous, number, frame)
            return
        self._note(_name_of(number))
        if callable(previous) and previous is not signal.default_int_handler:
            previous(number, frame)

    def _note(self, announced_by: str) -> None:
        if self._announced_s is None:
            self._announced_by = announced_by
            self._announced_s = self._clock()

    def _is_to_stop_alone(self, service: object | None, *, is_for_all: bool) -> bool:
        """Whether what this process knows is enough to stop; if not, but it knows something, tells the others."""
        if self._announced_s is None:
            return False
        if service is None or not _has_other_processes():
            return True
        if self._is_forwarded:
            return False
        if not _is_caught(signal.SIGTERM):  # somebody took it from the service, and it would end the process
            if is_for_all:
                self._is_forwarded = True
                _logger.warning(
                    "%s announced that this process ends, and the others cannot be told: jax's preemption service does"
                    " not get SIGTERM\nset no handler of SIGTERM after jax.distributed.initialize",
                    self._announced_by,
                )
            return not is_for_all
        self._is_forwarded = True
        signal.raise_signal(signal.SIGTERM)
        return False

    def _answer(self, step: int, *, is_agreed: bool) -> None:
        """Keeps the answer, and writes about it what the handler must not write."""
        self._note("jax's preemption service")
        self._is_answered = True
        remaining_s = self.remaining_s()
        when = "soon" if remaining_s is None else f"in {remaining_s:.1f} s"
        _logger.warning(
            "%s announced that this process ends %s; seen at step %d", self._announced_by, when, step
        )
        if not is_agreed and _has_other_processes():
            _logger.warning(
                "this process stops without asking the others, which may stop after different steps: jax's preemption"
                " service is off or does not get SIGTERM\n"
                "set jax_enable_preemption_service before jax.distributed.initialize, and no handler of SIGTERM later"
            )


@final
class _SyncPoints:
    """The counter that this process hands to jax's service, shared by all `Preemption` objects."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._service: object | None = None
        self._start_over()

    def is_reached(self, service: object, step: int) -> bool:
        """Whether the service's sync point is this step or an earlier one."""
        with self._lock:
            if service is not self._service:
                self._start_over()
                self._service = service
            # The service says yes to one count only, and several objects may be asked after different steps.
            if self._is_reached:
                return True
            if step != self._step:
                self._step = step
                self._count += 1
            self._is_reached = _ask_jax(self._count)
            return self._is_reached

    def _start_over(self) -> None:
        self._step: int | None = None
        self._count = -1
        self._is_reached = False


_sync_points = _SyncPoints()


def _ask_jax(count: int) -> bool:
    from jax.experimental import multihost_utils

    return bool(multihost_utils.reached_preemption_sync_point(count))


def _jax_service() -> object | None:
    """The preemption service of jax, if it is on; a new object after each `jax.distributed.initialize`."""
    if "jax" not in sys.modules:
        return None
    # Not public, but the only place that says whether the service runs, and quick to look at.
    service: object | None = getattr(_jax_state(), "preemption_sync_manager", _SOME_SERVICE)
    if service is _SOME_SERVICE and not _is_service_expected():
        return None
    return service


def _jax_state() -> object | None:
    """What jax knows of its processes, or None where it is not in the place known here."""
    return getattr(sys.modules.get("jax._src.distributed"), "global_state", None)


def _is_service_expected() -> bool:
    """Whether the service ought to be on, by what jax makes public."""
    import jax

    return jax.distributed.is_initialized() and bool(
        getattr(jax.config, "jax_enable_preemption_service", False)
    )


def _is_kept_by_jax(number: int) -> bool:
    return number == signal.SIGTERM and _jax_service() is not None


def _has_other_processes() -> bool:
    if "jax" not in sys.modules:
        return False
    import jax

    if not jax.distributed.is_initialized():
        return False
    # `jax.process_count` would start the backend if nothing has yet, which waits for all processes to do the same.
    count = getattr(_jax_state(), "num_processes", None)
    return (jax.process_count() if count is None else count) > 1


def _act_as_before(previous: Any, number: int, frame: FrameType | None) -> None:
    """Does in a forked process what the signal would do without `Preemption`."""
    if callable(previous):
        previous(number, frame)
    elif previous != signal.SIG_IGN:
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)


def _is_caught(number: int) -> bool:
    """Whether the process survives the signal, whoever handles it; Python does not know of handlers in C++."""
    try:
        status = pathlib.Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return False
    for line in status.splitlines():
        name, _, value = line.partition(":")
        if name == "SigCgt":
            return bool(int(value, base=16) >> (number - 1) & 1)
    return False


def _require_main_thread(verb: str) -> None:
    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError(
            f"Preemption.{verb}() must be called in the main thread: Python handles signals nowhere else\n"
            f"call {verb}() there, or leave signals alone and call request() from any thread"
        )


def _checked_signal(number: int) -> int:
    if number not in signal.valid_signals():
        raise ValueError(f"signals: there is no signal {number!r}")
    if number in _UNCATCHABLE:
        raise ValueError(
            f"signals: {_name_of(number)} cannot be caught by any process\nuse SIGTERM or SIGUSR1"
        )
    return int(number)


def _name_of(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal
        return f"signal {number}"
