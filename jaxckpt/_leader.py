"""How do the managers of all processes of a group come to the same decision at the same call?

Every process of a job makes a manager with the same arguments, and calls it at the same points. What follows from the
numbers of steps and from the order of the calls alone, each process works out for itself, without a word. Everything
else may differ between them: clocks, metrics, signals, what storage shows, how far the save in flight is. That is
decided by process 0, which tells the others (`Leader.tell`):

    every process         the same call, known from numbers alone to need a word
    process 0             looks at clock, metrics, storage; decides; posts the decision; goes on
    all others            wait for the decision, and carry it out

A word costs the others the way to process 0 and back, about a millisecond, and it makes them wait until process 0 has
come to that call. So a rule that looks at the clock does not cost a word at each step: process 0 says for how many
calls there is nothing to ask (`Leader.count_quiet_calls`), and all count those calls. The number comes from the time
that the calls took so far and the time for which the rule is sure to say no, of which process 0 takes half; it at most
doubles from one word to the next, and is at most 256. An interval of n calls costs about 2 log2(n) words, or n / 256 if
that is more. Its save is late by at most a hundredth of the interval and one call, unless calls come to take more than
twice as long: then by at most 256 of them.

Process 0 waits for nobody when it tells. So that it does not run ahead of the others for ever, while keys that they
have not read are kept, it waits for all at every eighth word.

What all of them do, as restoring, is a session in which each failure is told (`Leader.session`). A process that leaves
its loop by an exception posts that as the failure of the next session (`Leader.leave`), for the others must not wait
for it until a deadline.

Deliberately not here: what is decided (`_deciding`).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Generator
from typing import Any, final

import msgpack

from ._errors import CheckpointError, CoordinationError, NotFoundError
from ._processes import LEAVE, Group, Session

_QUIET_CALLS_MAX = 256
# A margin of the sessions whose keys are kept, which all managers of a process share.
_WORDS_UNHEARD_MAX = 8


@final
class Leader:
    """The way from process 0 of a group to the managers of the others. Used by the thread that calls the manager.

    Attributes:
      index: Index of this process.
    """

    def __init__(self, group: Group, path: str, timeout_s: float, monotonic_s: Callable[[], float]) -> None:
        """Begins without a word.

        Args:
          group: The processes.
          path: The manager's directory, for messages.
          timeout_s: How long the processes wait for each other at one point.
          monotonic_s: Clock by which process 0 finds out how long a call takes.
        """
        self.group = group
        self.index = group.index
        self._path = path
        self._timeout_s = timeout_s
        self._monotonic_s = monotonic_s
        self._words = 0
        self._quiet_calls = 0  # that are left
        self._quiet_calls_before = 0
        self._calls = 0  # since the clock was read
        self._read_s = monotonic_s()

    def tell(self, doing: str, decide: Callable[[], Any]) -> Any:
        """What process 0 decides, in all processes.

        Collective: all processes, but process 0 mostly waits for nobody.

        Args:
          doing: What is decided, for messages; begins with a verb that is the same in all processes.
          decide: Called in process 0 only; returns plain data. What it raises fails in all processes.

        Raises:
          CoordinationError: Process 0 failed or is silent; `NotFoundError` and plain `CheckpointError` as they are.
        """
        self._words += 1
        with self.session(doing, (CheckpointError, NotFoundError)) as session:
            payload: bytes | None = None
            if self.index == 0:
                payload = _pack(decide())
                session.check()  # it waits for nobody, and would not hear of a process that has left
            result = _unpack(session.tell("decision", payload))
            if self._words % _WORDS_UNHEARD_MAX == 0:
                session.agree("heard", b"", lambda _: b"")
        return result

    def agree(self, doing: str, answer: Any, decide: Callable[[list[Any]], Any]) -> Any:
        """What process 0 decides upon the answers of all; everything is plain data. Else as `tell`."""

        def decide_packed(answers: list[bytes]) -> bytes:
            return _pack(decide([_unpack(each) for each in answers]))

        with self.session(doing, (CheckpointError, NotFoundError)) as session:
            return _unpack(session.agree("answers", _pack(answer), decide_packed))

    def do_together(self, doing: str, act: Callable[[], None], *, of_all: bool) -> None:
        """Returns when process 0, or all processes, have done something, however long that takes.

        Collective: all processes, but unless ``of_all`` process 0 waits for nobody.

        Raises:
          CoordinationError: A process failed, or has left before. One that dies without a word ends the others by JAX's
            heartbeats.
        """
        with self.session(doing, (), timeout_s=math.inf) as session:
            act()
            if self.group.was_left:  # those who have not heard of it hear of this
                raise CoordinationError("a process has left before, and would be waited for in vain")
            if of_all:
                session.agree("done", b"", lambda _: b"")
            else:
                session.tell("done", b"")

    @contextlib.contextmanager
    def session(
        self, doing: str, shared_errors: tuple[type[CheckpointError], ...], *, timeout_s: float | None = None
    ) -> Generator[Session]:
        """Something that all processes do in the body; what one of them raises there is told to all.

        An error that is no `CheckpointError`, which is the caller's own, is raised as it is where it happened.

        Args:
          doing: As for `tell`; the directory is added.
          shared_errors: As for `Group.open_session`.
          timeout_s: Another one than the leader's.
        """
        timeout_s = self._timeout_s if timeout_s is None else timeout_s
        session = self.group.open_session(f"{doing} {self._path!r}", timeout_s, shared_errors)
        try:
            yield session
        except BaseException as error:
            failure = session.fail(error)
            if failure is error or not isinstance(error, CheckpointError):
                raise
            raise failure from error
        finally:
            session.close()

    def leave(self, error: BaseException) -> None:
        """Tells the others at their next call that this process will not come."""
        is_passed = True
        while is_passed:  # process 0 may be some words ahead
            session = self.group.open_session(f"{LEAVE} {self._path!r}", self._timeout_s)
            session.fail(error)
            is_passed = False
            with contextlib.suppress(CoordinationError):
                is_passed = self.index != 0 and session.is_told()
            session.close()

    def is_quiet(self) -> bool:
        """Counts a call; whether process 0 has said that this one needs no word."""
        self._calls += 1
        if self._quiet_calls == 0:
            return False
        self._quiet_calls -= 1
        return True

    def note_quiet_calls(self, calls: int) -> None:
        """Process 0 has said how many calls need no word from here on."""
        self._quiet_calls = self._quiet_calls_before = calls

    def count_quiet_calls(self, quiet_s: float) -> int:
        """How many calls fit into so many seconds, as far as process 0 dares to say."""
        now_s = self._monotonic_s()
        passed_s = max(0.0, now_s - self._read_s)
        calls = _QUIET_CALLS_MAX
        if passed_s > 0:
            calls = int(min(quiet_s * self._calls / passed_s, _QUIET_CALLS_MAX))
        elif quiet_s <= 0:
            calls = 0
        self._calls = 0
        self._read_s = now_s
        return min(calls, 2 * self._quiet_calls_before + 1)


def _pack(value: Any) -> bytes:
    return bytes(msgpack.packb(value, unicode_errors="surrogatepass") or b"")


def _unpack(data: bytes) -> Any:
    return msgpack.unpackb(data, unicode_errors="surrogatepass")
