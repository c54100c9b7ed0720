"""How do the processes of one job come to one decision, and how does each learn that another has failed?

The processes of a job that called ``jax.distributed.initialize`` share a *coordination service*: a small key-value
store that lives in process 0. Everything here is made of writing a key once and waiting for a key. A `Group` is the
processes of the job; a `Session` is one thing that they do together, a save or a restore, in phases. Each phase is a
star:

    agree(phase, payload, decide)    everybody posts its payload; process 0 waits for all of them and decides;
                                     everybody hears the decision
    tell(phase, payload)             process 0 posts a value; everybody hears it

Process 0 does work that is linear in the number of processes; every other one writes one key and waits for another.

What we do not use, and why. No device collectives (``sync_global_devices``, ``process_allgather``): they have no
deadline, hang for ever when one process is missing, and must not run on a background thread while a training step runs
others. No barriers of the service either: a barrier that has failed once answers every later caller with an error, it
can carry no reason, and it waits for its whole timeout although the one that is missing has failed long ago.

**Failure.** Whoever fails calls `Session.fail`, which posts a *report*: its process, the class of the error, the
message and the findings. Waits are cut into slices of half a second, and between two of them the waiting process looks
for reports; a process that is busy with something else does so in a thread (`Session.watching`). So a failure of a
living process is known to all in about a second, and everybody raises the same root cause. At most ten reports are
kept, so that a full disk shared by thousands of processes costs no more than any other failure. Beyond 1,024 processes
the slices get longer in proportion, since all of them ask process 0.

**Deadlines.** Process 0 waits in each phase for the session's timeout, then names every process from which it has not
heard, in a report of its own. The others wait a little longer than process 0, so that they hear whom it names. If they
hear nothing, they look whether process 0 has come to the phase meanwhile: if so they wait once more, if not it is
process 0 that is silent. Looking for a key, listing keys and writing one have no deadline in jax: while process 0 is
stopped (SIGSTOP) or cut off, such a call hangs, until process 0 goes on or jax aborts the process, as follows.

**Death.** Jax's own agents watch over the processes by heartbeats. When process 0 dies, jax aborts all others at once;
when it is stopped or cut off, at the heartbeat timeout (``heartbeat_timeout_seconds``, 100 s by default). When another
process dies, jax aborts the survivors at the heartbeat timeout. An abort comes from C++ and runs no ``finally``:
nothing may depend on one. With ``jax_enable_recoverability`` the survivors of a process other than 0 live on, and learn
of its death by the deadline.

**Numbers.** Nobody hands out names of sessions: each process counts its calls, and calls with the same number belong
together, since all processes run one program. A process that calls something else than process 0, as ``restore`` where
process 0 calls ``save``, is told so, and so is everybody else. A process that has missed a call altogether, since
something in its training loop failed, is one number behind: it finds a session that failed for want of it. Unless that
was the very call that it makes (then it was only late), or it has made another call since, it goes on to the next one.

Keys are ``jaxckpt/<number>/<turn>/from/<process>`` for payloads, ``jaxckpt/<number>/<turn>/result`` for decisions and
``jaxckpt/<number>/failed/<slot>`` for reports. When process 0 ends a session, it deletes the keys of the one that came
64 before it.

Deliberately not here: what is agreed upon (`_saving`, `_restoring`), and the data of arrays, all of which would go
through process 0. A process that is started again alone cannot join the group: the whole job is to be restarted.
"""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import hashlib
import itertools
import pathlib
import socket
import threading
import time
import weakref
from collections.abc import Callable, Generator, Sequence
from typing import Any, final

import msgpack

from ._errors import (
    CheckpointError,
    CoordinationError,
    Problem,
    ProcessFailure,
    ProcessMismatchError,
    list_problems,
)

SILENT = "silent"
# The verb of a session by whose failure a process says that it will not come any more.
LEAVE = "leave"

_ROOT = "jaxckpt"
# How long a wait goes on without a look at the reports, in groups of up to so many processes.
_SLICE_S = 0.5
_WATCH_INTERVAL_S = 1.0
_QUICK_PROCESS_COUNT = 1024
# Bounds of what a failure costs: each of these is read by every process.
_REPORTS_MAX = 10
_REPORT_PROBLEMS_MAX = 100
_REPORT_CHARACTERS_MAX = 4000
# Sessions whose keys are kept: many more than a process can have open at once.
_SESSIONS_KEPT = 64


class Channel(abc.ABC):
    """What a coordination service offers: small values by key, seen by all processes.

    Every method raises `CoordinationError` if the service does not answer.

    Attributes:
      index: Index of this process.
      count: Number of processes.
    """

    index: int
    count: int

    @abc.abstractmethod
    def put(self, key: str, value: bytes) -> bool:
        """Writes a key unless it is there; returns whether this call wrote it."""

    @abc.abstractmethod
    def wait_for(self, key: str, timeout_s: float) -> bytes | None:
        """The value of a key as soon as it is there; None if that takes longer."""

    @abc.abstractmethod
    def look(self, key: str) -> bytes | None:
        """The value of a key, or None if it is not there."""

    @abc.abstractmethod
    def listing(self, prefix: str) -> dict[str, bytes]:
        """Keys and values below a prefix that ends with a slash."""

    @abc.abstractmethod
    def delete(self, prefix: str) -> None:
        """Deletes all keys below a prefix that ends with a slash."""


@final
class JaxChannel(Channel):
    """The coordination service of jax.distributed. Its calls release the GIL while they wait."""

    def __init__(self, client: Any, index: int, count: int) -> None:
        self.index = index
        self.count = count
        self._client = client

    def put(self, key: str, value: bytes) -> bool:
        try:
            self._client.key_value_set_bytes(key, value)
        except RuntimeError as error:
            if _has_status(error, "ALREADY_EXISTS"):
                return False
            raise self._unreachable() from error
        return True

    def wait_for(self, key: str, timeout_s: float) -> bytes | None:
        try:
            value: bytes = self._client.blocking_key_value_get_bytes(key, max(1, round(timeout_s * 1000)))
            return value
        except RuntimeError as error:
            if _has_status(error, "DEADLINE_EXCEEDED"):
                return None
            raise self._unreachable() from error

    def look(self, key: str) -> bytes | None:
        try:
            value: bytes = self._client.key_value_try_get_bytes(key)
            return value
        except RuntimeError as error:
            if _has_status(error, "NOT_FOUND"):
                return None
            raise self._unreachable() from error

    def listing(self, prefix: str) -> dict[str, bytes]:
        try:
            return dict(self._client.key_value_dir_get_bytes(prefix))
        except RuntimeError as error:
            raise self._unreachable() from error

    def delete(self, prefix: str) -> None:
        try:
            self._client.key_value_delete(prefix)
        except RuntimeError as error:
            raise self._unreachable() from error

    def _unreachable(self) -> CoordinationError:
        return CoordinationError(
            f"process {self.index} of {self.count} cannot reach the coordination service of jax.distributed, which"
            " runs in process 0"
        )


def _has_status(error: RuntimeError, status: str) -> bool:
    return str(error).startswith(status)


def _ignore() -> None:
    pass


# The group of the newest client; `jax.distributed` may be shut down and initialised again.
_current: tuple[Any, Group] | None = None
_current_lock = threading.Lock()


def current_group() -> Group | None:
    """The processes of this job, or None where there is only this one.

    The same object as long as jax.distributed is not initialised anew. No backend is initialised.
    """
    from jax._src import distributed

    state = distributed.global_state
    if state.client is None or state.num_processes < 2:
        return None
    global _current  # noqa: PLW0603  as jax's own state is
    with _current_lock:
        if _current is None or _current[0] is not state.client:
            channel = JaxChannel(state.client, state.process_id, state.num_processes)
            _current = (state.client, Group(channel))
        return _current[1]


@final
class Group:
    """The processes of one job.

    Attributes:
      index: Index of this process.
      count: Number of processes.
      was_left: Whether a process has said that it will not come any more, as far as this one has heard.
    """

    def __init__(self, channel: Channel, machine: str | None = None) -> None:
        self.index = channel.index
        self.count = channel.count
        self.was_left = False
        self._channel = channel
        self._lock = threading.Lock()
        self._next_number = 0
        self._machine = machine or _machine_name()
        self._mates: int | None = None
        self._mates_lock = threading.Lock()

    def open_session(
        self, what: str, timeout_s: float, shared_errors: tuple[type[CheckpointError], ...] = ()
    ) -> Session:
        """Begins something that all processes do together. Asks nobody, so it costs nothing.

        All processes must call this in the same order, so it is called on the thread of the caller of the library.

        Args:
          what: What is done, for messages: a verb, which must be the same in all processes, and details, which may
            differ, as in ``save '/x'``.
          timeout_s: How long the processes wait for each other in a phase.
          shared_errors: Classes of errors that are not about processes. If nothing else went wrong, every process
            raises that class itself.
        """
        with self._lock:
            session = Session(self, self._channel, what, timeout_s, shared_errors, self._next_number)
            self._next_number += 1
        return session

    def machine_mates(self, timeout_s: float, check: Callable[[], None] = _ignore) -> int:
        """How many processes of the group run on this machine, this one included.

        Collective: the first time, all processes wait for each other. The answer is kept.

        Args:
          timeout_s: How long to wait for the others.
          check: Called all the while; what it raises ends the wait. Pass `Session.check`.

        Raises:
          CoordinationError: A process did not ask within that time.
        """
        with self._mates_lock:
            if self._mates is None:
                self._mates = self._count_mates(timeout_s, check)
            return self._mates

    def _count_mates(self, timeout_s: float, check: Callable[[], None]) -> int:
        prefix = f"{_ROOT}/machines/from/"
        self._channel.put(f"{prefix}{self.index}", self._machine.encode())
        if self.index == 0:
            found = _collect(self._channel, prefix, timeout_s, check)
            silent = _silence(self.count, found, timeout_s, "machines")
            if silent:
                raise CoordinationError(_describe("count the machines", self.count, silent), silent)
            machines = [name.decode() for name in found.values()]
            for name in set(machines):
                self._channel.put(f"{_ROOT}/machines/mates/{name}", str(machines.count(name)).encode())
        # Process 0 may be late by the timeout itself, and then waits as long for others.
        answer_s = 2 * timeout_s + _grace_s(timeout_s)
        answer = _await(self._channel, f"{_ROOT}/machines/mates/{self._machine}", answer_s, check)
        if answer is None:
            silent = _silence(1, {}, timeout_s, "machines")
            raise CoordinationError(_describe("count the machines", self.count, silent), silent)
        return int(answer)

    def take_next_number(self, number: int) -> int | None:
        """Another number for the session that has this one; None if there is a newer session."""
        with self._lock:
            if self._next_number != number + 1:
                return None
            self._next_number += 1
            return number + 1


@final
class Session:
    """One thing that all processes do together.

    `agree` and `tell` are called by one thread at a time, in the same order in all processes. The rest may be called
    by any thread.

    Attributes:
      index: Index of this process.
      count: Number of processes.
      what: What is done.
    """

    def __init__(
        self,
        group: Group,
        channel: Channel,
        what: str,
        timeout_s: float,
        shared_errors: tuple[type[CheckpointError], ...],
        number: int,
    ) -> None:
        self.index = channel.index
        self.count = channel.count
        self.what = what
        self._group = group
        self._channel = channel
        self._timeout_s = timeout_s
        self._shared_errors = {error.__name__: error for error in shared_errors}
        self._number = number
        self._turn = 0
        # Whether the number is settled: see the essay on numbers.
        self._has_joined = self.index == 0
        self._lock = threading.Lock()
        self._has_reported = False
        # What this session made of reports, as long as somebody has it.
        self._raised: weakref.WeakSet[CheckpointError] = weakref.WeakSet()

    def agree(self, phase: str, payload: bytes, decide: Callable[[list[bytes]], bytes]) -> bytes:
        """Posts a payload and returns what process 0 decided on the payloads of all.

        Collective: all processes.

        Args:
          phase: Name of the phase, for messages.
          payload: Small.
          decide: Called in process 0 only, with the payloads by process. What it raises is raised by all processes: a
            `ProcessMismatchError` and the shared errors of the session as they are, all else as `CoordinationError`.

        Raises:
          CoordinationError: A process failed or is silent.
        """
        turn = self._begin_turn()
        if self.index != 0:
            self._channel.put(self._payload_key(turn, self.index), self._wrap(phase, payload))
            return self._hear(turn, phase)
        payloads = self._gather(turn, phase, payload)
        try:
            result = decide(payloads)
        except BaseException as error:
            raise self._report(error) from error
        self._channel.put(self._result_key(turn), self._wrap(phase, result))
        return result

    def tell(self, phase: str, payload: bytes | None = None) -> bytes:
        """Returns what process 0 passed.

        Collective: all processes, but process 0 waits for nobody.

        Raises:
          CoordinationError: A process failed or is silent.
        """
        turn = self._begin_turn()
        if self.index != 0:
            payload = self._hear(turn, phase)
        else:
            assert payload is not None
            self._channel.put(self._result_key(turn), self._wrap(phase, payload))
        # Process 0 waits for nobody. Who fails and then finds no result has failed before anybody gets to this line;
        # who finds one knows that the others went on, see `is_told`.
        self.check()
        return payload

    def is_told(self) -> bool:
        """Whether process 0 has said what the first turn of this session came to."""
        return self._channel.look(self._result_key(0)) is not None

    def fail(self, error: BaseException) -> CheckpointError:
        """Tells all others that this process has failed, and returns what it should raise from that error.

        What is returned names all failures that are known; if it came from this session it is returned as it is. A
        failure of the service is not raised: then only this process knows.
        """
        if isinstance(error, CheckpointError) and error in self._raised:
            return error
        return self._report(error)

    def check(self) -> None:
        """Raises if a process has failed.

        Raises:
          CoordinationError: The failure.
        """
        self._join()
        reports = self._reports()
        if reports:
            raise self._error(reports)

    @contextlib.contextmanager
    def watching(self, on_failure: Callable[[CheckpointError], None]) -> Generator[None]:
        """Looks for failures each second, in a thread, while the body runs.

        Args:
          on_failure: Called in that thread, once, with what `check` raised; never when the body has ended.
        """
        is_over = threading.Event()
        lock = threading.Lock()
        interval_s = _stretch(_WATCH_INTERVAL_S, self.count)

        def watch() -> None:
            while not is_over.wait(interval_s):
                try:
                    self.check()
                except CheckpointError as error:
                    with lock:
                        if not is_over.is_set():
                            on_failure(error)
                    return

        watcher = threading.Thread(target=watch, name="jaxckpt-watcher", daemon=True)
        watcher.start()
        try:
            yield
        finally:
            with lock:
                is_over.set()
            # It may hang in a call to a process 0 that is stopped: nobody waits for it then.
            watcher.join(_WATCH_INTERVAL_S)

    def settle(self, timeout_s: float) -> bool:
        """Says, after a failure, that this process touches nothing any more; process 0 waits for all to say so.

        Args:
          timeout_s: How long process 0 waits, at most.

        Returns:
          Whether all have said so, as far as process 0 knows; elsewhere, whether that could be said.
        """
        prefix = f"{_ROOT}/{self._number}/settled/"
        with contextlib.suppress(CoordinationError):
            self._channel.put(f"{prefix}{self.index}", b"")
            return self.index != 0 or len(_collect(self._channel, prefix, timeout_s, _ignore)) == self.count
        return False

    def has_settled(self, process: int, timeout_s: float) -> bool:
        """Whether a process has said so, or says so within that time."""
        with contextlib.suppress(CoordinationError):
            key = f"{_ROOT}/{self._number}/settled/{process}"
            return _await(self._channel, key, timeout_s, _ignore) is not None
        return False

    def close(self) -> None:
        """This process is done with the session."""
        if self.index == 0 and self._number >= _SESSIONS_KEPT:
            with contextlib.suppress(CoordinationError):
                self._channel.delete(f"{_ROOT}/{self._number - _SESSIONS_KEPT}/")

    # --- phases ---------------------------------------------------------------------------------------------------

    def _begin_turn(self) -> int:
        if not self._has_joined:
            self.check()
        turn = self._turn
        self._turn += 1
        return turn

    def _gather(self, turn: int, phase: str, payload: bytes) -> list[bytes]:
        self._channel.put(self._payload_key(turn, 0), self._wrap(phase, payload))
        prefix = self._payload_key(turn, "")
        found = _collect(self._channel, prefix, self._timeout_s, self.check)
        silent = _silence(self.count, found, self._timeout_s, phase)
        if silent:
            raise self._publish(_Report(self.what, 0, SILENT, "", (), silent))
        self.check()
        posted = [self._unwrap(phase, found[process], process) for process in range(self.count)]
        differences = [difference for _, difference in posted if difference is not None]
        if differences:
            raise self._report(self._out_of_step(differences))
        return [payload for payload, _ in posted]

    def _hear(self, turn: int, phase: str) -> bytes:
        timeout_s = self._timeout_s + _grace_s(self._timeout_s)
        key = self._result_key(turn)
        result = _await(self._channel, key, timeout_s, self.check)
        if result is None and self._channel.look(self._payload_key(turn, 0)) is not None:
            # Process 0 came later than this one, and waits for another: it will name that one.
            result = _await(self._channel, key, timeout_s, self.check)
        if result is None:
            silent = _silence(1, {}, self._timeout_s, phase)
            raise self._publish(_Report(self.what, self.index, SILENT, "", (), silent))
        payload, difference = self._unwrap(phase, result, 0)
        if difference is not None:
            raise self._report(self._out_of_step([difference]))
        return payload

    def _wrap(self, phase: str, payload: bytes) -> bytes:
        return _pack([self.what, phase, payload])

    def _unwrap(self, phase: str, data: bytes, process: int) -> tuple[bytes, ProcessFailure | None]:
        what, its_phase, payload = _unpack(data)
        if _verb(what) == _verb(self.what) and its_phase == phase:
            return payload, None
        message = (
            f"calls {what!r} (phase {its_phase!r}) where process {self.index} calls {self.what!r} ({phase!r})"
        )
        return payload, ProcessFailure(process, "call", message)

    def _out_of_step(self, differences: Sequence[ProcessFailure]) -> ProcessMismatchError:
        problems = [
            Problem(None, each.kind, f"process {each.process} {each.message}") for each in differences
        ]
        message = list_problems(
            f"cannot {self.what}: the processes are out of step",
            problems,
            ["let every process make the same calls in the same order"],
        )
        return ProcessMismatchError(message, differences, problems)

    def _payload_key(self, turn: int, process: int | str) -> str:
        return f"{_ROOT}/{self._number}/{turn}/from/{process}"

    def _result_key(self, turn: int) -> str:
        return f"{_ROOT}/{self._number}/{turn}/result"

    # --- failures -------------------------------------------------------------------------------------------------

    def _join(self) -> None:
        """Settles the number of the session, by passing over calls that this process missed."""
        with self._lock:
            while not self._has_joined:
                if not any(self._was_missed(report) for report in self._reports()):
                    break
                number = self._group.take_next_number(self._number)
                if number is None:
                    break
                self._number = number
            self._has_joined = True

    def _was_missed(self, report: _Report) -> bool:
        is_silent = any(f.kind == SILENT and f.process == self.index for f in report.failures)
        return report.process == 0 and is_silent and report.what != self.what

    def _report(self, error: BaseException) -> CheckpointError:
        message = _cut(str(error) or repr(error))
        problems: tuple[Problem, ...] = ()
        failures: tuple[ProcessFailure, ...] = ()
        if isinstance(error, CheckpointError):
            problems = error.problems[:_REPORT_PROBLEMS_MAX]
        if isinstance(error, CoordinationError):
            failures = error.failures
        kind = type(error).__name__
        own = ProcessFailure(self.index, kind, message, problems)
        return self._publish(_Report(self.what, self.index, kind, message, problems, failures or (own,)))

    def _publish(self, report: _Report) -> CheckpointError:
        reports: list[_Report] = []
        with contextlib.suppress(CoordinationError):  # then the others learn it by their deadline
            self._join()
            reports = self._reports()
            with self._lock:
                is_first = not self._has_reported
                self._has_reported = True
            if is_first:
                for slot in range(len(reports), _REPORTS_MAX):
                    if self._channel.put(f"{_ROOT}/{self._number}/failed/{slot}", _encode_report(report)):
                        break
                reports = self._reports()
        if report not in reports:
            reports.append(report)
        return self._error(reports)

    def _reports(self) -> list[_Report]:
        listing = self._channel.listing(f"{_ROOT}/{self._number}/failed/")
        return [_decode_report(listing[key]) for key in sorted(listing)]

    def _error(self, reports: Sequence[_Report]) -> CheckpointError:
        error = self._make_error(reports)
        with self._lock:
            self._raised.add(error)
        if any(_verb(report.what) == LEAVE for report in reports):
            self._group.was_left = True
        return error

    def _make_error(self, reports: Sequence[_Report]) -> CheckpointError:
        known = dict.fromkeys(failure for report in reports for failure in report.failures)
        failures = sorted(known, key=lambda failure: failure.process)
        problems = tuple(dict.fromkeys(problem for report in reports for problem in report.problems))
        kinds = {report.kind for report in reports}
        messages = list(dict.fromkeys(report.message for report in reports))
        text = messages[0] if len(messages) == 1 else _describe(self.what, self.count, failures)
        if kinds == {ProcessMismatchError.__name__}:
            return ProcessMismatchError(text, failures, problems)
        if len(kinds) == 1 and (shared := self._shared_errors.get(next(iter(kinds)))):
            return shared(text, problems)
        return CoordinationError(_describe(self.what, self.count, failures), failures, problems)


@dataclasses.dataclass(frozen=True, slots=True)
class _Report:
    """What a process that noticed a failure tells all others.

    Attributes:
      what: What it was doing.
      process: Its index.
      kind: Name of the class of the error, or ``"silent"``.
      message: Of the error.
      problems: Of the error.
      failures: Its own failure, or those of others that it noticed.
    """

    what: str
    process: int
    kind: str
    message: str
    problems: tuple[Problem, ...]
    failures: tuple[ProcessFailure, ...]


def _encode_report(report: _Report) -> bytes:
    # Thousands of silent processes have one text.
    groups = itertools.groupby(report.failures, key=lambda f: (f.kind, f.message, f.problems))
    failures = [
        [[failure.process for failure in group], kind, message, _encode_problems(problems)]
        for (kind, message, problems), group in groups
    ]
    fields = [
        report.what,
        report.process,
        report.kind,
        report.message,
        _encode_problems(report.problems),
        failures,
    ]
    return _pack(fields)


def _decode_report(data: bytes) -> _Report:
    what, process, kind, message, problems, groups = _unpack(data)
    failures = tuple(
        ProcessFailure(index, its_kind, its_message, _decode_problems(its_problems))
        for indices, its_kind, its_message, its_problems in groups
        for index in indices
    )
    return _Report(what, process, kind, message, _decode_problems(problems), failures)


def _encode_problems(problems: Sequence[Problem]) -> list[list[str | None]]:
    return [[problem.key, problem.kind, problem.message] for problem in problems]


def _decode_problems(fields: Sequence[Sequence[str]]) -> tuple[Problem, ...]:
    return tuple(Problem(key, kind, message) for key, kind, message in fields)


def _pack(fields: list[Any]) -> bytes:
    # A path that is no UTF-8 has lone surrogates.
    return bytes(msgpack.packb(fields, unicode_errors="surrogatepass") or b"")


def _unpack(data: bytes) -> list[Any]:
    return msgpack.unpackb(data, unicode_errors="surrogatepass")


def _describe(what: str, count: int, failures: Sequence[ProcessFailure]) -> str:
    if len(failures) == 1:
        (failure,) = failures
        return f"cannot {what}: process {failure.process} of {count} {_predicate(failure)}"
    lines = [
        Problem(None, failure.kind, f"process {failure.process} {_predicate(failure).splitlines()[0]}")
        for failure in failures
    ]
    return list_problems(f"cannot {what}: {len(failures)} of {count} processes failed", lines)


def _predicate(failure: ProcessFailure) -> str:
    return failure.message if failure.kind == SILENT else f"failed: {failure.kind}: {failure.message}"


def _silence(count: int, found: dict[int, bytes], timeout_s: float, phase: str) -> tuple[ProcessFailure, ...]:
    message = f"did not answer within {timeout_s:g} s (phase {phase!r})"
    return tuple(ProcessFailure(i, SILENT, message) for i in range(count) if i not in found)


def _cut(text: str) -> str:
    return text if len(text) <= _REPORT_CHARACTERS_MAX else text[:_REPORT_CHARACTERS_MAX] + "..."


def _verb(what: str) -> str:
    return what.split(maxsplit=1)[0]


def _collect(channel: Channel, prefix: str, timeout_s: float, check: Callable[[], None]) -> dict[int, bytes]:
    """Values that the processes have written below a prefix by their index, all of them or those in time."""

    def list_all() -> dict[int, bytes]:
        return {int(key.rsplit("/", 1)[1]): value for key, value in channel.listing(prefix).items()}

    deadline = time.monotonic() + timeout_s
    found = list_all()
    for process in range(channel.count):
        if process in found:
            continue
        left_s = deadline - time.monotonic()
        value = _await(channel, f"{prefix}{process}", left_s, check)
        if value is None:
            return list_all()
        found[process] = value
    return found


def _await(channel: Channel, key: str, timeout_s: float, check: Callable[[], None]) -> bytes | None:
    """The value of a key as soon as it is there, or None; `check` is called between the slices of the wait."""
    deadline = time.monotonic() + timeout_s
    slice_s = _stretch(_SLICE_S, channel.count)
    while True:
        left_s = deadline - time.monotonic()
        value = channel.wait_for(key, min(slice_s, max(0.0, left_s)))
        if value is not None:
            return value
        check()
        if left_s <= 0:
            return None


def _stretch(interval_s: float, count: int) -> float:
    return interval_s * max(1.0, count / _QUICK_PROCESS_COUNT)


def _grace_s(timeout_s: float) -> float:
    # What the others wait longer than process 0, so that they hear whom it names.
    return 1.0 + min(9.0, timeout_s / 10)


def _machine_name() -> str:
    """The same for processes that share memory: those of one container, or of one machine without containers."""
    boot = pathlib.Path("/proc/sys/kernel/random/boot_id")
    boot_id = boot.read_text() if boot.exists() else ""
    return hashlib.sha256(f"{boot_id}/{socket.gethostname()}".encode()).hexdigest()[:16]
