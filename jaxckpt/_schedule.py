"""At which calls of ``manager.save(step, ...)`` is something saved, and why there?

A loop calls at every step, or at some of them, and a `Schedule` says for each call whether it is due. The rules unite,
and the first one that says yes gives the reason:

    1. never twice     the step that was saved last, or resumed from, is not due, whatever the other rules say; who
                       replaces it asks `Schedule.is_last` first
    2. first step      the first step of a run that did not resume from anything
    3. given step      the step is in the container of steps
    4. every N steps   a multiple of N was crossed since the baseline
    5. T seconds       so much time passed since the last save, the resume or the start, whichever was last
    6. predicate       the user's function, asked only when nothing above made the step due
    7. skipped         a step that 2, 3 or 6 made due was skipped, and nothing was saved since

4 and 5 are the *periodic* rules. Only they are held back by ``max_overhead``: somebody who names a step wants that
step.

**Steps.** A multiple of N was crossed when ``step // N > baseline // N``. The baseline is the step of the last save or
of the resume, so that a loop that calls at 7, 14, 21, ... with N = 10 saves at 14, 21, 35, 42: at the first call at or
after each multiple. A run without a baseline, and a step below the baseline, which is a rollback that nobody told,
take ``step - 1`` for it: such a step is due only when it is itself a multiple. Only a save moves the baseline up. A
step that 4 or 5 made due but that was not saved, because storage was busy or the budget was empty, leaves the next one
due; for the other rules `note_skipped` remembers it.

**Overhead.** ``max_overhead`` is the largest share of the run's time that the loop may spend blocked by saves. It is
kept by a token bucket, whose tokens are seconds of blocked time:

    1. earn      credit grows by max_overhead for each second that passes, blocked seconds included
    2. cap       credit is at most the predicted cost of one save, so that a pause does not buy a burst
    3. predict   the cost of a save is the largest of the last three measured ones, and 0 before the first
    4. gate      a periodic save is let through when the credit covers the prediction
    5. charge    a save that begins pays the prediction, so that two saves cannot spend the same credit
    6. settle    when its cost is measured, the prediction is given back and the measured cost is paid

The credit is never more than max_overhead times the run's time less all that was paid, for the cap only takes away.
Hence the invariant, whatever the times of steps and the costs of saves are: a periodic save begins only when the
blocked time so far, with its own prediction, is within the share. At any later moment the share is exceeded by no more
than what the last save cost beyond its prediction (for the first save: all that it cost). That is debt, which the next
save waits for, so that such excesses do not add up. (Only those of saves that are in flight together do.)

With a constant cost b the credit covers a save b / max_overhead seconds after the last one began. Saves begin at that
interval, rounded up to a step; the first interval is twice as long, for the first save was let through with no credit.
Saves by the other rules and forced ones are never held back, but they are paid from the same bucket: when they alone
take more than the share, nothing is left for periodic ones.

Source: CheckFreq (Mohan, Phanishayee, Chidambaram: "CheckFreq: Frequent, Fine-Grained DNN Checkpointing", FAST 2021)
bounds the overhead and lets measurements choose the frequency: it profiles some iterations, picks an interval in
iterations, and picks again when the measured overhead leaves its bound. The bucket keeps the same bound with neither a
profile nor an interval, so that steps may be of any length.

Deliberately not here: any input or output; which steps to keep; saves that are forced or that a preemption asks for
(the manager); and agreement between processes, whose clocks, blocked times and metrics differ, so that one of them has
to ask its schedule and tell the others. For them the rules are of two kinds: those that look at numbers of steps alone
(`is_due_by_number`), which say the same everywhere, and the others (`has_open_question`). All calls come from the
thread of the loop; there is no lock.
"""

from __future__ import annotations

import math
import operator
import time
from collections import deque
from collections.abc import Callable, Container, Mapping, Sized
from typing import final

# How many measured costs the prediction looks at. The largest of three rides out one save that was cheap by luck, and
# forgets one that was dear by accident after two more.
_COSTS_REMEMBERED = 3

# Until this share of an interval or of a pause of the budget is left, `quiet_s` is half of what is left.
_PRECISION = 0.01

# No step has this number.
_NO_STEP = -1


@final
class Schedule:
    """Says which steps are due, and why.

    The caller asks with `reason_to_save`, and tells what became of it with `note_saved` and `note_blocked`, or with
    `note_skipped`.

    Args:
      interval_steps: Save when a multiple of this many steps was crossed since the last save. None: no such rule if
        another one is given (`interval_s`, `steps` or `when`), else every step.
      interval_s: Save when so many seconds passed since the last save began. None: no such rule.
      steps: Steps to save at in any case: a set, a range, anything that has ``in`` for steps. Lists and tuples
        are copied.
      when: ``when(step, metrics)`` is asked at every call that no other rule made due; a true answer makes it due.
        Metrics that the caller did not give are an empty mapping. Exceptions go through to the caller.
      save_first: Save at the first step of a run that did not resume.
      max_overhead: Largest share of the run's time, between 0 and 1, that the loop may spend blocked by saves. Holds
        back the saves by `interval_steps` and `interval_s` only. None: no limit.
      clock: Seconds from any zero. One that goes back adds no time, and takes none away.

    Raises:
      ValueError: A number is out of its range, or `max_overhead` is given and there is no interval that it could
        hold back. The messages name the keywords of `CheckpointManager`.
      TypeError: `interval_steps` is no whole number, or `steps` has no ``in``.
    """

    def __init__(
        self,
        *,
        interval_steps: int | None,
        interval_s: float | None,
        steps: Container[int] = (),
        when: Callable[[int, Mapping[str, float]], bool] | None = None,
        save_first: bool = False,
        max_overhead: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        given_steps = _checked_steps(steps)
        if interval_steps is None:
            if interval_s is None and given_steps is None and when is None:
                interval_steps = 1
        else:
            interval_steps = _checked_interval_steps(interval_steps)
        if interval_s is not None and not interval_s > 0:
            raise ValueError(f"save_interval_s must be more than 0 seconds, not {interval_s}")
        has_interval = interval_steps is not None or interval_s is not None
        if max_overhead is not None:
            if not 0 < max_overhead < 1:
                raise ValueError(
                    f"max_overhead is a share of the run's time and must be between 0 and 1, not {max_overhead}"
                )
            if not has_interval:
                raise ValueError(
                    "max_overhead holds back saves by interval, and there is no interval\n"
                    "pass save_interval_steps=1 too, to save as often as max_overhead lets"
                )

        self._interval_steps = interval_steps
        self._interval_s = interval_s
        self._has_interval = has_interval
        self._steps = given_steps
        self._when = when
        self._save_first = save_first
        # Made once, so that a call that is not due makes no string, and one that is due makes none either.
        self._steps_reason = "every step" if interval_steps == 1 else f"every {interval_steps} steps"
        self._seconds_reason = "" if interval_s is None else f"{interval_s:g} s after the last save"

        self._clock = clock
        self._saved_at_s = clock()  # the start, until something is saved
        self._baseline: int | None = None
        self._last_step = _NO_STEP  # saved last or resumed from
        self._first_step: int | None = None  # None: nothing seen yet; _NO_STEP: the run has got beyond it
        self._has_skipped = False
        self._before_save = self._state()
        self._budget = None if max_overhead is None else _Budget(max_overhead, self._saved_at_s)

    def reason_to_save(self, step: int, metrics: Mapping[str, float] | None) -> str | None:
        """Whether this step is due.

        Asking again for the same step gives the same answer, as long as nothing is noted and no time passes. Takes
        about a microsecond, and what the container of steps and the predicate take.

        Args:
          step: Number of the step, at least 0.
          metrics: What the predicate gets to see.

        Returns:
          Why the step is due, in words, or None when it is not.
        """
        baseline = self._note_call(step)
        if step == self._last_step:
            return None
        if self._save_first and step == self._first_step:
            return "first step"
        if self._steps is not None and step in self._steps:
            return "given step"
        if self._has_interval:
            reason = self._periodic_reason(step, baseline)
            if reason is not None:
                return reason
        if self._when is not None and self._when(step, {} if metrics is None else metrics):
            return "save_when"
        return "a due step was skipped" if self._has_skipped else None

    def is_due_by_number(self, step: int) -> bool:
        """Whether rules that look at nothing but numbers of steps make this step due.

        A schedule that is not asked by `reason_to_save` at a step is asked this, and so stays the same as one that is.
        """
        baseline = self._note_call(step)
        if step == self._last_step:
            return False
        if self._has_skipped or (self._save_first and step == self._first_step):
            return True
        if self._steps is not None and step in self._steps:
            return True
        return self._budget is None and self._is_crossed(step, baseline)

    def is_last(self, step: int) -> bool:
        """Whether this step was saved last, resumed from, or found in storage."""
        return step == self._last_step

    def has_open_question(self, step: int) -> bool:
        """Whether a clock, the budget or the predicate may make this step due; to be asked after `is_due_by_number`."""
        if step == self._last_step:
            return False
        if self._when is not None or self._interval_s is not None:
            return True
        return (
            self._budget is not None and self._baseline is not None and self._is_crossed(step, self._baseline)
        )

    def quiet_s(self) -> float:
        """Seconds for which it is enough to ask `is_due_by_number`; no longer than half of those that are sure.

        It is at least a hundredth of the interval, or of the pause that the budget makes between two saves. So a
        schedule that is asked again after each such time is asked a few times in an interval, and is late by a
        hundredth. 0 with a predicate, infinite where only numbers of steps count.
        """
        if self._when is not None:
            return 0.0
        if self._interval_s is None and self._budget is None:
            return math.inf
        quiet_s = 0.0
        # With a budget, `interval_steps` too waits for nothing but the budget.
        is_timed = self._interval_steps is None or self._budget is None
        if self._interval_s is not None and is_timed:
            left_s = self._interval_s - self._elapsed_s()
            quiet_s = max(left_s / 2, self._interval_s * _PRECISION)
        if self._budget is not None:
            quiet_s = max(quiet_s, self._budget.quiet_s(self._clock()))
        return quiet_s

    def note_saved(self, step: int) -> None:
        """A save of this step began, for whatever reason. Each is followed by one `note_blocked`, in the same order."""
        self._before_save = self._state()
        now_s = self._begin_interval(step)
        if self._budget is not None:
            self._budget.charge(now_s)

    def note_given_up(self) -> None:
        """The save noted last was given up before anything was saved: what was due before it is due again."""
        (
            self._saved_at_s,
            self._baseline,
            self._last_step,
            self._first_step,
            self._has_skipped,
        ) = self._before_save

    def note_skipped(self, reason: str) -> None:
        """A step was due for this reason and is not saved, since storage is busy: the next one is due."""
        if reason not in (self._steps_reason, self._seconds_reason):  # these are due until something is saved
            self._has_skipped = True

    def note_blocked(self, blocked_s: float) -> None:
        """The loop was blocked for so many seconds by the oldest save whose cost is not noted yet.

        A save that failed has a cost too, the seconds until it failed. Until the cost of the very first save is
        noted, nothing is known about costs, and ``max_overhead`` lets no second one through.
        """
        if self._budget is not None:
            self._budget.settle(max(0.0, blocked_s), self._clock())

    def note_resumed(self, step: int) -> None:
        """Training goes on from this step, which is in storage; the loop may have been anywhere before."""
        self._begin_interval(step)

    def _note_call(self, step: int) -> int:
        """What every call changes, due or not; returns the baseline."""
        baseline = self._baseline
        if baseline is None or step < baseline:
            baseline = self._baseline = step - 1
        if self._first_step is None:
            self._first_step = step
        return baseline

    def _is_crossed(self, step: int, baseline: int) -> bool:
        """Whether a multiple of the interval in steps was crossed."""
        every = self._interval_steps
        return every is not None and step // every > baseline // every

    def _begin_interval(self, step: int) -> float:
        """Both intervals begin at this step and at this moment, which is returned."""
        now_s = self._clock()
        self._saved_at_s = now_s
        self._baseline = step
        self._last_step = step
        self._first_step = _NO_STEP
        self._has_skipped = False
        return now_s

    def _state(self) -> tuple[float, int | None, int, int | None, bool]:
        """What a save changes, apart from the budget."""
        return self._saved_at_s, self._baseline, self._last_step, self._first_step, self._has_skipped

    def _periodic_reason(self, step: int, baseline: int) -> str | None:
        """What an interval says, if the budget lets it."""
        if self._is_crossed(step, baseline):
            reason = self._steps_reason
        elif self._interval_s is not None and self._elapsed_s() >= self._interval_s:
            reason = self._seconds_reason
        else:
            return None
        if self._budget is not None and not self._budget.has_room(self._clock()):
            return None
        return reason

    def _elapsed_s(self) -> float:
        """Seconds since the interval began; a clock that went back behind that begins it again."""
        now_s = self._clock()
        self._saved_at_s = min(self._saved_at_s, now_s)
        return now_s - self._saved_at_s


@final
class _Budget:
    """The token bucket of the module's docstring. Its credit is in seconds of blocked time."""

    def __init__(self, share: float, now_s: float) -> None:
        self._share = share
        self._earned_until_s = now_s
        self._credit_s = 0.0
        self._predicted_s = 0.0
        self._costs_s: deque[float] = deque(maxlen=_COSTS_REMEMBERED)
        self._charges_s: deque[float] = deque()  # of the saves that are not settled, oldest first

    def has_room(self, now_s: float) -> bool:
        """Whether the credit covers one more save."""
        if self._charges_s and not self._costs_s:
            return False  # the first save is under way, and will tell what one costs
        self._earn(now_s)
        return self._credit_s >= self._predicted_s

    def quiet_s(self, now_s: float) -> float:
        """As `Schedule.quiet_s`, for the time until the credit covers a save."""
        self._earn(now_s)
        lacking_s = max(0.0, self._predicted_s - self._credit_s)
        return max(lacking_s / 2, self._predicted_s * _PRECISION) / self._share

    def charge(self, now_s: float) -> None:
        """A save begins, and pays the predicted cost."""
        self._earn(now_s)
        self._credit_s -= self._predicted_s
        self._charges_s.append(self._predicted_s)

    def settle(self, blocked_s: float, now_s: float) -> None:
        """The oldest save that is not settled pays the measured cost instead."""
        if self._charges_s:
            self._credit_s += self._charges_s.popleft()
        self._credit_s -= blocked_s
        self._costs_s.append(blocked_s)
        self._predicted_s = max(self._costs_s)
        # After the payment: a long save earns too, and the cap must not cut that off before the debt is booked.
        self._earn(now_s)

    def _earn(self, now_s: float) -> None:
        """Credit for the time that passed, up to the cap."""
        elapsed_s = max(0.0, now_s - self._earned_until_s)
        self._earned_until_s = now_s
        self._credit_s = min(self._credit_s + self._share * elapsed_s, self._predicted_s)


def _checked_interval_steps(interval_steps: int) -> int:
    """The interval as a Python int."""
    try:
        number = operator.index(interval_steps)
    except TypeError:
        raise TypeError(f"save_interval_steps must be a whole number, not {interval_steps!r}") from None
    if isinstance(interval_steps, bool):
        raise TypeError(f"save_interval_steps must be a whole number, not {interval_steps!r}")
    if number < 1:
        raise ValueError(f"save_interval_steps must be at least 1, not {number}")
    return number


def _checked_steps(steps: Container[int]) -> Container[int] | None:
    """The container, or None for one that is plainly empty."""
    if not hasattr(steps, "__contains__"):
        # `in` would work on an iterator too, and use it up.
        raise TypeError(f"save_steps must be a set, a range or another container, not {steps!r}")
    if isinstance(steps, Sized) and len(steps) == 0:
        return None
    if isinstance(steps, (list, tuple)):
        return frozenset(steps)  # a look through a long list would take long, and there is one at every step
    return steps
