"""Which step does a run go on from, and how do all processes come to the same one?

The newest step that is whole. A `StepReader` takes the newest one that counts and restores it. If that proves damaged,
this is remembered, said, and the one before it is taken:

    1. choose    the newest step that was not tried. In a group process 0 says which
    2. open      its manifest. In a group all wait until all have it open
    3. restore   as `jaxckpt.restore` does
    4. agree     in a group: that all of them have all of it

Whatever fails in one process of a group fails in all, with the same class of error, so that all fall back to the same
step. 4 is needed although a restore onto arrays that span processes agrees for itself: with ``like`` on the host each
process reads alone, and one may find what the others do not.

Where each process keeps what it has (``local=True``), 1 is an agreement: every process tells the steps that it has,
each with the name that all processes gave to the data of that save. The newest that all have is taken. Younger ones, of
which a machine has lost its part, count no more and may be saved anew.

Deliberately not here: what a manager does about the step that it goes on from.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable
from typing import Any, final

from ._checkpoint import restore
from ._errors import (
    CheckpointError,
    CorruptError,
    FormatError,
    MismatchError,
    NotFoundError,
    Problem,
    ProcessFailure,
    ProcessMismatchError,
    list_problems,
)
from ._keeping import Keeper, Tell
from ._leader import Leader
from ._reading import open_checkpoint
from ._steps import StepDirectory

_log = logging.getLogger("jaxckpt")

# Where each process keeps what it has, it tells so many of its newest steps.
_STEPS_TOLD_MAX = 20


@final
class StepReader:
    """Restores steps of a manager's directory. Used by the thread that calls the manager."""

    def __init__(
        self, directory: StepDirectory, keeper: Keeper, leader: Leader | None, tell: Tell, *, is_local: bool
    ) -> None:
        """Touches nothing.

        Args:
          directory: Where the steps are.
          keeper: Knows which of them count.
          leader: The way to the other processes; None: there are none.
          tell: Hears of damaged steps.
          is_local: Whether each process has a directory of its own.
        """
        self._directory = directory
        self._keeper = keeper
        self._leader = leader
        self._tell = tell
        self._is_local = is_local

    def has_nothing(self) -> bool:
        """Whether there is no step to go on from."""
        if self._is_local:
            return self._choose(set()) is None
        if self._leader is None:
            return self._keeper.has_only_doubtful()
        return bool(self._leader.tell("look for steps in", self._keeper.has_only_doubtful))

    def read_newest(self, like: Any, keywords: dict[str, Any], *, fallback: bool) -> tuple[int, Any]:
        """Restores the newest step that is whole.

        Args:
          like: As for `jaxckpt.restore`.
          keywords: Of `jaxckpt.restore`.
          fallback: Whether a damaged one is passed over.
        """
        damage: list[Problem] = []
        cause: CheckpointError | None = None
        tried: set[int] = set()
        # Listed anew each time: a quick trainer deletes a step before it is read, and then younger ones are there.
        while (candidate := self._choose(tried)) is not None:
            tried.add(candidate)
            fingerprint = self._directory.fingerprint_of(candidate)
            try:
                return candidate, self.read(candidate, like, keywords)
            except NotFoundError:  # deleted since it was listed
                continue
            except CheckpointError as error:
                if not _is_damage(error) or not fallback:
                    raise
                cause = cause or error
                damage.extend(error.problems)
                self._keeper.note_damaged(candidate, fingerprint)
                _log.error("step %d is damaged, the one before it is tried: %s", candidate, error)
                self._tell("damaged", candidate, f"step {candidate} is damaged: {error}", error=error)
        if cause is None and self._is_local:
            raise NotFoundError(f"no step of {self._directory.path!r} is whole in all processes")
        if cause is None and self._keeper.has_only_doubtful():
            raise NotFoundError(f"no step is committed in {self._directory.path!r}")
        if cause is None and self._keeper.steps():
            raise NotFoundError(f"the steps in {self._directory.path!r} are being deleted")
        headline = f"every step in {self._directory.path!r} is damaged"
        raise CorruptError(list_problems(headline, damage), damage) from cause

    def read(self, step: int, like: Any, keywords: dict[str, Any]) -> Any:
        """Restores a step; the arguments are those of `read_newest`."""
        if self._leader is None:
            return self._read_alone(step, like, keywords, lambda: None)
        errors = (NotFoundError, FormatError, CorruptError, MismatchError)
        with self._leader.session(f"restore step {step} of", errors) as session:

            def on_open() -> None:
                session.agree("open", str(step).encode(), _require_equal_steps)

            tree = self._read_alone(step, like, keywords, on_open)
            session.agree("restored", b"", lambda _: b"")
        return tree

    def _read_alone(self, step: int, like: Any, keywords: dict[str, Any], on_open: Callable[[], None]) -> Any:
        checkpoint = open_checkpoint(self._keeper.require(step))
        try:
            on_open()
            return restore(checkpoint, like, **keywords)
        finally:
            checkpoint.release()  # not when the last traceback of an error is gone

    def _choose(self, tried: set[int]) -> int | None:
        """The newest step that was not tried; the same in all processes."""
        if self._is_local:
            return self._choose_common(tried)

        def newest() -> int | None:
            return max((step for step in self._keeper.steps() if step not in tried), default=None)

        return newest() if self._leader is None else self._leader.tell("choose a step of", newest)

    def _choose_common(self, tried: set[int]) -> int | None:
        """The newest step of which every process has what it saved; younger ones count no more."""
        assert self._leader is not None
        own: dict[int, str] = {}
        for step in reversed([step for step in self._keeper.steps() if step not in tried]):
            try:
                checkpoint = open_checkpoint(self._directory.store_of(step))
            except CheckpointError as error:
                _log.warning("step %d of %r cannot be opened: %s", step, self._directory.path, error)
                continue
            own[step] = checkpoint.manifest.data
            checkpoint.release()
            if len(own) == _STEPS_TOLD_MAX:
                break
        chosen: int | None = self._leader.agree("choose a step of", list(own.items()), _newest_common)
        for step in own:
            if chosen is None or step > chosen:
                _log.warning(
                    "step %d of %r is passed over: another process lacks what it saved of it",
                    step,
                    self._directory.path,
                )
                self._keeper.note_damaged(step, self._directory.fingerprint_of(step))
        return chosen


def _newest_common(answers: list[Any]) -> int | None:
    """The newest step that all have, by the same save."""
    common = {tuple(pair) for pair in answers[0]}
    for answer in answers[1:]:
        common &= {tuple(pair) for pair in answer}
    return max((step for step, _ in common), default=None)


def _require_equal_steps(steps: list[bytes]) -> bytes:
    """Refuses a restore that was asked for different steps."""
    failures = [
        ProcessFailure(process, "step", f"restores step {step.decode()}, process 0 step {steps[0].decode()}")
        for process, step in enumerate(steps)
        if step != steps[0]
    ]
    if failures:
        problems = [
            Problem(None, failure.kind, f"process {failure.process} {failure.message}")
            for failure in failures
        ]
        raise ProcessMismatchError(list_problems("cannot restore", problems), failures, problems)
    return b""


def _is_damage(error: CheckpointError) -> bool:
    """Whether an error means that what is stored is not what was written."""
    if isinstance(error, FormatError):
        return not any(problem.kind == "version" for problem in error.problems)
    if isinstance(error, CorruptError):
        return any(problem.kind != "unreadable" for problem in error.problems)
    return isinstance(error.__cause__, OSError) and error.__cause__.errno == errno.EIO
