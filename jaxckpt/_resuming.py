"""Which step does a run go on from, and how do all processes come to the same one?

The newest step that is whole. A `StepReader` takes the newest one that counts and restores it. If that proves damaged,
this is remembered, said, and the one before it is taken:

    1. choose    the newest step that was not tried. In a group process 0 says which
    2. open      its manifest. In a group all wait until all have it open
    3. restore   as `jaxckpt.restore` does
    4. agree     in a group: that all of them have all of it

With a second tier (`_uploading`) a step may be in two places. Both are tried, the nearer one first, before an older
step is.

Whatever fails in one process of a group fails in all, with the same class of error, so that all fall back to the same
step of the same tier. 4 is needed although a restore onto arrays that span processes agrees for itself: with ``like``
on the host each process reads alone, and one may find what the others do not.

Where each process keeps what it has (``local=True``), 1 is an agreement: every process tells the steps that it has,
each with the name that all processes gave to the data of that save. The newest that all have is taken. Younger ones, of
which a machine has lost its part, count no more and may be saved anew.

Deliberately not here: what a manager does about the step that it goes on from.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, final

from ._checkpoint import restore
from ._errors import (
    UNREADABLE,
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
from ._reading import Checkpoint, open_checkpoint

_log = logging.getLogger("jaxckpt")

_Result = TypeVar("_Result")

# Where each process keeps what it has, it tells so many of its newest steps.
_STEPS_TOLD_MAX = 20


@final
class StepReader:
    """Restores steps of a manager. Used by the thread that calls the manager."""

    def __init__(self, tiers: Sequence[Keeper], leader: Leader | None, tell: Tell, *, is_local: bool) -> None:
        """Touches nothing.

        Args:
          tiers: The places of steps, the nearest first; each knows which of them count.
          leader: The way to the other processes; None: there are none.
          tell: Hears of damaged steps.
          is_local: Whether each process has a directory of its own.
        """
        self._tiers = tiers
        self._leader = leader
        self._tell = tell
        self._is_local = is_local
        self._places = " and ".join(repr(keeper.directory.path) for keeper in tiers)

    def has_nothing(self) -> bool:
        """Whether there is no step to go on from."""
        if self._is_local:
            return self._choose(set()) is None
        if self._leader is None:
            return self._has_only_doubtful()
        return bool(self._leader.tell("look for steps in", self._has_only_doubtful))

    def _has_only_doubtful(self) -> bool:
        return all(keeper.has_only_doubtful() for keeper in self._tiers)

    def read_newest(self, like: Any, keywords: dict[str, Any], *, fallback: bool) -> tuple[int, Any]:
        """Restores the newest step that is whole.

        Args:
          like: As for `jaxckpt.restore`.
          keywords: Of `jaxckpt.restore`.
          fallback: Whether a damaged one is passed over, if no other tier has it whole.
        """
        damage: list[Problem] = []
        cause: CheckpointError | None = None
        tried: set[tuple[int, int]] = set()
        # Listed anew each time: a quick trainer deletes a step before it is read, and then younger ones are there.
        while (candidate := self._choose(tried)) is not None:
            step, tier = candidate
            if cause is not None and not fallback and all(step != other for other, _ in tried):
                raise cause
            tried.add(candidate)
            keeper = self._tiers[tier]
            fingerprint = keeper.directory.fingerprint_of(step)
            try:
                return step, self._read_from(keeper, step, like, keywords)
            except NotFoundError:  # deleted since it was listed
                continue
            except CheckpointError as error:
                is_last_tier = tier == len(self._tiers) - 1
                if not _is_damage(error) or (not fallback and is_last_tier):
                    raise
                cause = cause or error
                damage.extend(error.problems)
                keeper.note_damaged(step, fingerprint)
                what = self._name_of(step, keeper)
                following = "the one before it" if is_last_tier else "the next tier"
                _log.error("%s is damaged, %s is tried: %s", what, following, error)
                self._tell("damaged", step, f"{what} is damaged: {error}", error=error)
        if cause is not None and not fallback:
            raise cause
        if cause is None and self._is_local:
            raise NotFoundError(f"no step of {self._places} is whole in all processes")
        if cause is None and self._has_only_doubtful():
            raise NotFoundError(f"no step is committed in {self._places}")
        if cause is None and any(keeper.steps() for keeper in self._tiers):
            raise NotFoundError(f"the steps in {self._places} are being deleted")
        headline = f"every step in {self._places} is damaged"
        raise CorruptError(list_problems(headline, damage), damage) from cause

    def _name_of(self, step: int, keeper: Keeper) -> str:
        return f"step {step}" if len(self._tiers) == 1 else f"step {step} in {keeper.directory.path!r}"

    def read(self, step: int, like: Any, keywords: dict[str, Any]) -> Any:
        """Restores a step from the nearest place that has it whole; the arguments are those of `read_newest`."""
        return self._from_nearest(step, lambda keeper: self._read_from(keeper, step, like, keywords))

    def open(self, step: int) -> Checkpoint:
        """Opens a step at the nearest place where its manifest is whole."""
        return self._from_nearest(step, lambda keeper: open_checkpoint(keeper.require(step)))

    def path_of(self, step: int) -> str:
        """The nearest place that has a step."""
        return self._from_nearest(step, lambda keeper: keeper.require(step).path)

    def _from_nearest(self, step: int, read: Callable[[Keeper], _Result]) -> _Result:
        """What the first place gives that has the step whole; else the damage, or that it is not there."""
        failures: list[CheckpointError] = []
        for keeper in self._tiers:
            try:
                return read(keeper)
            except CheckpointError as error:
                is_missing = isinstance(error, NotFoundError)
                if not is_missing and not _is_damage(error):
                    raise
                failures.append(error)
                if not is_missing and len(failures) < len(self._tiers):
                    _log.error(
                        "%s is damaged, the next tier is tried: %s", self._name_of(step, keeper), error
                    )
        damage = next((each for each in failures if not isinstance(each, NotFoundError)), None)
        raise damage or NotFoundError("\n".join(map(str, failures))) from failures[0].__cause__

    def _read_from(self, keeper: Keeper, step: int, like: Any, keywords: dict[str, Any]) -> Any:
        if self._leader is None:
            return self._read_alone(keeper, step, like, keywords, lambda: None)
        errors = (NotFoundError, FormatError, CorruptError, MismatchError)
        with self._leader.session(f"restore step {step} of", errors) as session:

            def on_open() -> None:
                session.agree("open", str(step).encode(), _require_equal_steps)

            tree = self._read_alone(keeper, step, like, keywords, on_open)
            session.agree("restored", b"", lambda _: b"")
        return tree

    def _read_alone(
        self, keeper: Keeper, step: int, like: Any, keywords: dict[str, Any], on_open: Callable[[], None]
    ) -> Any:
        checkpoint = open_checkpoint(keeper.require(step))
        try:
            on_open()
            return restore(checkpoint, like, **keywords)
        finally:
            checkpoint.release()  # not when the last traceback of an error is gone

    def _choose(self, tried: set[tuple[int, int]]) -> tuple[int, int] | None:
        """The newest step that was not tried, and the nearest tier that has it.

        The same in all processes; but where each has a directory of its own, the tier is each one's own, too.
        """
        if self._is_local:
            return self._choose_common(tried)

        def newest() -> tuple[int, int] | None:
            return next(iter(self._untried(tried)), None)

        if self._leader is None:
            return newest()
        told = self._leader.tell("choose a step of", newest)
        return None if told is None else (told[0], told[1])

    def _untried(self, tried: set[tuple[int, int]]) -> list[tuple[int, int]]:
        """Steps with their tiers: the newest first, and each in the nearest tier first."""
        places = [(step, tier) for tier, keeper in enumerate(self._tiers) for step in keeper.steps()]
        return sorted(
            (place for place in places if place not in tried), key=lambda place: (-place[0], place[1])
        )

    def _choose_common(self, tried: set[tuple[int, int]]) -> tuple[int, int] | None:
        """The newest step of which every process has what it saved; younger ones count no more."""
        assert self._leader is not None
        own: dict[int, str] = {}
        tiers: dict[int, int] = {}
        for step, tier in self._untried(tried):
            if step in own:
                continue
            if len(own) == _STEPS_TOLD_MAX:
                break
            directory = self._tiers[tier].directory
            try:
                checkpoint = open_checkpoint(directory.store_of(step))
            except CheckpointError as error:
                _log.warning("step %d of %r cannot be opened: %s", step, directory.path, error)
                continue
            own[step] = checkpoint.manifest.data
            tiers[step] = tier
            checkpoint.release()
        chosen: int | None = self._leader.agree("choose a step of", list(own.items()), _newest_common)
        for step in own:
            if chosen is None or step > chosen:
                _log.warning(
                    "step %d of %s is passed over: another process lacks what it saved of it",
                    step,
                    self._places,
                )
                for keeper in self._tiers:
                    keeper.note_damaged(step, keeper.directory.fingerprint_of(step))
        return None if chosen is None else (chosen, tiers[chosen])


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
        return any(problem.kind != UNREADABLE for problem in error.problems)
    return isinstance(error.__cause__, OSError) and error.__cause__.errno == errno.EIO
