"""Which steps of a manager's directory stay, and why?

The answer is a pure function of what the directory holds (steps, commit times, metrics), the policy and the time of
day. There is no memory beside the directory: whoever asks later, or in another process, gets the same answer.

    1. sort        by step
    2. ask         every rule of the policy about every step; a rule answers "stays" or "goes", with words, or nothing
    3. unite       a step stays if any rule says so; the words of all the rules on the winning side are its reasons

The rules:

    newest         the highest step, and the one committed last. These differ after somebody went back to an older
                   step and trained on from there: the checkpoint just committed must not be deleted at once
    recent         the newest `max_to_keep` steps, but for those older than `time_to_live_s`
    period         every step that `keep_period` divides
    interval       `keep_interval_s` apart in time, see `_judge_by_interval`
    best           the best few by a metric
    pinned         those that the user named

Invariants:

* The newest step stays under every policy.
* A rule that is added never deletes more, `time_to_live_s` apart, which limits the rule "recent" and no other.
* Deleting what may go never changes what stays: a directory that was cleaned after every save holds what it would
  hold if it had been cleaned once, at the end. That holds while steps are saved in ascending order, metrics stay as
  they are, and the clock by which steps expire does not go back.
* A commit time that is NaN or infinite counts as unknown, and an unknown time as infinitely old.

Deliberately not here: deleting (the manager), and which steps to save.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import math
import numbers
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

from ._errors import printable


@dataclasses.dataclass(frozen=True, slots=True)
class Best:
    """Keeps the best steps by a metric that was saved with them.

    Steps without the metric, and those where it is NaN or no number, never count as best. Infinities are ordinary
    values. Of two steps with the same value the newer one is better.

    Attributes:
      metric: Name of the metric, as in ``manager.save(step, tree, metrics={"val/loss": 0.3})``.
      mode: ``"min"`` when lower is better, ``"max"`` when higher is.
      keep: How many of the best steps stay, at least 1.

    Example:
      >>> jaxckpt.Best("val/accuracy", mode="max", keep=3)
      Best(metric='val/accuracy', mode='max', keep=3)
    """

    metric: str
    mode: Literal["min", "max"] = "min"
    keep: int = 1

    def __post_init__(self) -> None:
        _require_name("metric", self.metric)
        if self.mode not in ("min", "max"):
            raise ValueError(f"mode must be 'min' or 'max', not {self.mode!r}")
        _require_whole_number("keep", self.keep, 1)

    def __str__(self) -> str:
        return f"{printable(self.metric)} ({self.mode})"


@dataclasses.dataclass(frozen=True, slots=True)
class Retention:
    """Which steps stay: those that at least one of these rules keeps.

    Attributes:
      max_to_keep: The newest so many by number; steps that other rules keep count too. None keeps all.
      keep_period: Every step that this divides, 0 included.
      keep_interval_s: One step for each so many seconds between commits, for good.
      best: The best steps by each of these metrics.
      time_to_live_s: A step that is older expires: `max_to_keep` keeps it no more, the other rules still do.
      pinned: These steps, as far as they exist.
    """

    max_to_keep: int | None = 5
    keep_period: int | None = None
    keep_interval_s: float | None = None
    best: tuple[Best, ...] = ()
    time_to_live_s: float | None = None
    pinned: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        if self.max_to_keep is not None:
            _require_whole_number("max_to_keep", self.max_to_keep, 1)
        if self.keep_period is not None:
            _require_whole_number("keep_period", self.keep_period, 1)
        if self.keep_interval_s is not None:
            _require_seconds("keep_interval_s", self.keep_interval_s)
        if self.time_to_live_s is not None:
            _require_seconds("time_to_live_s", self.time_to_live_s)
        for rule in self.best:
            _require_best("best", rule)
        for step in self.pinned:
            _require_whole_number("a pinned step", step, 0)


@dataclasses.dataclass(frozen=True, slots=True)
class Verdict:
    """Whether one step stays, and why.

    Attributes:
      step: The step.
      is_kept: False when the step is deleted at the next cleaning.
      reasons: Every rule that keeps the step, in words; for a step that goes, why no rule keeps it. Never empty.
    """

    step: int
    is_kept: bool
    reasons: tuple[str, ...]

    def __str__(self) -> str:
        return f"step {self.step} {'stays' if self.is_kept else 'goes'}: {'; '.join(self.reasons)}"


def judge_steps(
    steps: Sequence[int],
    times_s: Sequence[float],
    metrics: Sequence[Mapping[str, object]],
    policy: Retention,
    now_s: float,
) -> list[Verdict]:
    """Decides about every step.

    Args:
      steps: The committed steps, distinct, in any order.
      times_s: When each was committed, in seconds since 1970. NaN and infinities count as infinitely old.
      metrics: The metrics saved with each; may be empty.
      policy: What to keep.
      now_s: The time of day, in seconds since 1970. Only `time_to_live_s` looks at it.

    Returns:
      One verdict for each step, ascending by step.

    Raises:
      ValueError: The three sequences differ in length.
    """
    checkpoints = _sort_checkpoints(steps, times_s, metrics)
    reasons_to_stay: collections.defaultdict[int, list[str]] = collections.defaultdict(list)
    reasons_to_go: collections.defaultdict[int, list[str]] = collections.defaultdict(list)
    opinions = itertools.chain(
        _judge_newest(checkpoints),
        _judge_recent(checkpoints, policy, now_s),
        _judge_by_period(checkpoints, policy),
        _judge_by_interval(checkpoints, policy),
        _judge_best(checkpoints, policy),
        _judge_pinned(checkpoints, policy),
    )
    for opinion in opinions:
        reasons = reasons_to_stay if opinion.stays else reasons_to_go
        reasons[opinion.step].append(opinion.reason)
    verdicts: list[Verdict] = []
    for checkpoint in checkpoints:
        step = checkpoint.step
        is_kept = step in reasons_to_stay
        reasons = reasons_to_stay if is_kept else reasons_to_go
        verdicts.append(Verdict(step, is_kept, tuple(reasons[step])))
    return verdicts


def steps_to_delete(
    steps: Sequence[int],
    times_s: Sequence[float],
    metrics: Sequence[Mapping[str, object]],
    policy: Retention,
    now_s: float,
) -> list[int]:
    """The steps that no rule keeps, ascending; arguments and errors are those of `judge_steps`."""
    verdicts = judge_steps(steps, times_s, metrics, policy, now_s)
    return [verdict.step for verdict in verdicts if not verdict.is_kept]


def best_step(steps: Sequence[int], metrics: Sequence[Mapping[str, object]], best: Best) -> int | None:
    """The best step by a metric, or None where no step has it.

    Args:
      steps: The committed steps, distinct, in any order.
      metrics: The metrics saved with each.
      best: The metric and its mode; `best.keep` plays no part.

    Returns:
      The first step in the order by which `best` keeps steps.

    Raises:
      ValueError: The two sequences differ in length.
    """
    ranking = _rank(list(zip(steps, metrics, strict=True)), best)
    return ranking[0][0] if ranking else None


class _Checkpoint(NamedTuple):
    """What the rules know about one step."""

    step: int
    time_s: float  # minus infinity where it is unknown
    metrics: Mapping[str, object]

    @property
    def has_time(self) -> bool:
        return self.time_s > -math.inf


class _Opinion(NamedTuple):
    """What one rule says about one step."""

    step: int
    stays: bool
    reason: str


def _sort_checkpoints(
    steps: Sequence[int], times_s: Sequence[float], metrics: Sequence[Mapping[str, object]]
) -> list[_Checkpoint]:
    known_times_s = [time_s if math.isfinite(time_s) else -math.inf for time_s in times_s]
    checkpoints = map(_Checkpoint._make, zip(steps, known_times_s, metrics, strict=True))
    return sorted(checkpoints, key=lambda checkpoint: checkpoint.step)


# --- the rules ------------------------------------------------------------------------------------------------


def _judge_newest(checkpoints: list[_Checkpoint]) -> Iterator[_Opinion]:
    if not checkpoints:
        return
    newest = checkpoints[-1]
    yield _Opinion(newest.step, True, "the newest step")
    # Of several that were committed at the same time the highest step counts as the last.
    last = max(checkpoints, key=lambda checkpoint: (checkpoint.time_s, checkpoint.step))
    if last.step != newest.step:
        yield _Opinion(last.step, True, "committed last")


def _judge_recent(checkpoints: list[_Checkpoint], policy: Retention, now_s: float) -> Iterator[_Opinion]:
    count = len(checkpoints) if policy.max_to_keep is None else policy.max_to_keep
    first_recent = max(0, len(checkpoints) - count)
    for place, checkpoint in enumerate(checkpoints):
        is_recent = place >= first_recent
        reason_to_expire = _reason_to_expire(checkpoint, policy, now_s)
        if reason_to_expire is not None:
            yield _Opinion(checkpoint.step, False, reason_to_expire)
        if not is_recent:
            yield _Opinion(checkpoint.step, False, f"not one of the newest {policy.max_to_keep}")
        if is_recent and reason_to_expire is None:
            yield _Opinion(checkpoint.step, True, _reason_to_be_recent(policy))


def _reason_to_be_recent(policy: Retention) -> str:
    if policy.max_to_keep is not None:
        return f"one of the newest {policy.max_to_keep}"
    if policy.time_to_live_s is not None:
        return f"not older than {_format_number(policy.time_to_live_s)} s"
    return "every step stays (max_to_keep is None)"


def _reason_to_expire(checkpoint: _Checkpoint, policy: Retention, now_s: float) -> str | None:
    """Why the step is too old, or None when it is not."""
    if policy.time_to_live_s is None:
        return None
    if not checkpoint.has_time:
        return f"older than {_format_number(policy.time_to_live_s)} s (its time is unknown)"
    age_s = max(0.0, now_s - checkpoint.time_s)
    if age_s > policy.time_to_live_s:
        return f"older than {_format_number(policy.time_to_live_s)} s"
    return None


def _judge_by_period(checkpoints: list[_Checkpoint], policy: Retention) -> Iterator[_Opinion]:
    if policy.keep_period is None:
        return
    for checkpoint in checkpoints:
        if checkpoint.step % policy.keep_period == 0:
            yield _Opinion(checkpoint.step, True, f"every {policy.keep_period} steps")
        else:
            yield _Opinion(checkpoint.step, False, f"not a multiple of {policy.keep_period}")


def _judge_by_interval(checkpoints: list[_Checkpoint], policy: Retention) -> Iterator[_Opinion]:
    """Preserves a step when the interval has passed since the step preserved before it.

    The walk goes up the steps. The anchor is the commit time of the last preserved step:

    * The oldest step is preserved and is the first anchor. TensorFlow, whose rule this is, begins with the time at
      which its manager was made; a directory cannot tell that.
    * A step is preserved when ``time - interval >= anchor``. The anchor is then its time, and not the anchor before
      it plus the interval, which would lag behind after a pause and so keep every step for a long time.
    * A step whose time is before the anchor shows that the clock went back. It is preserved, and counting goes on
      from it: one more checkpoint stays for each jump back past the anchor, and nothing preserved is given up.
    * A step whose time is unknown is passed over.

    What is not preserved leaves no trace in the walk, so that deleting it changes nothing. If the user deletes a
    preserved step by hand, counting goes on from the one preserved before it, or begins at the oldest that is left.

    Source: ``tf.train.CheckpointManager(keep_checkpoint_every_n_hours=...)``, method ``_sweep``.
    """
    if policy.keep_interval_s is None:
        return
    anchor: _Checkpoint | None = None
    for checkpoint in checkpoints:
        step = checkpoint.step
        if not checkpoint.has_time:
            yield _Opinion(step, False, "not preserved: its time is unknown")
        elif anchor is None:
            yield _Opinion(step, True, "preserved: the oldest step")
            anchor = checkpoint
        elif checkpoint.time_s < anchor.time_s:
            gap = _format_duration(anchor.time_s - checkpoint.time_s)
            yield _Opinion(step, True, f"preserved: the clock went back by {gap} after step {anchor.step}")
            anchor = checkpoint
        elif checkpoint.time_s - policy.keep_interval_s >= anchor.time_s:
            gap = _format_duration(checkpoint.time_s - anchor.time_s)
            yield _Opinion(step, True, f"preserved: {gap} after step {anchor.step}")
            anchor = checkpoint
        else:
            interval = _format_number(policy.keep_interval_s)
            yield _Opinion(step, False, f"not preserved: less than {interval} s after step {anchor.step}")


def _judge_best(checkpoints: list[_Checkpoint], policy: Retention) -> Iterator[_Opinion]:
    for best in policy.best:
        rule = str(best)
        ranking = _rank([(checkpoint.step, checkpoint.metrics) for checkpoint in checkpoints], best)
        for rank, (step, value) in enumerate(ranking, start=1):
            if rank <= best.keep:
                yield _Opinion(step, True, f"best {rank} of {best.keep} by {rule}: {value:g}")
            else:
                yield _Opinion(step, False, f"not one of the best {best.keep} by {rule}: {value:g}")
        ranked = {step for step, _ in ranking}
        for checkpoint in checkpoints:
            if checkpoint.step not in ranked:
                reason = f"not one of the best {best.keep} by {rule}: no such number"
                yield _Opinion(checkpoint.step, False, reason)


def _rank(metrics_of_steps: list[tuple[int, Mapping[str, object]]], best: Best) -> list[tuple[int, float]]:
    """Steps that have the metric, with its value, best first; of equal ones the newer step first."""
    ranking: list[tuple[int, float]] = []
    for step, metrics in metrics_of_steps:
        value = _read_number(metrics.get(best.metric))
        if value is not None and not math.isnan(value):
            ranking.append((step, value))
    sign = 1 if best.mode == "min" else -1
    ranking.sort(key=lambda ranked: (sign * ranked[1], -ranked[0]))
    return ranking


def _judge_pinned(checkpoints: list[_Checkpoint], policy: Retention) -> Iterator[_Opinion]:
    for checkpoint in checkpoints:
        if checkpoint.step in policy.pinned:
            yield _Opinion(checkpoint.step, True, "pinned")


# --- words and checks -----------------------------------------------------------------------------------------


def _format_number(value: float) -> str:
    """A number of the policy with all its digits, so that the user finds it again."""
    return str(value).removesuffix(".0")


def _format_duration(duration_s: float) -> str:
    """A measured time in the unit that suits it, to four digits."""
    for unit_s, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if duration_s >= unit_s:
            return f"{duration_s / unit_s:.4g} {unit}"
    return f"{duration_s:.4g} s"


def _read_number(value: object) -> float | None:
    """The value as a float, or None where it is no number; a bool measures nothing."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return None
    try:
        return float(value)
    except OverflowError:  # a whole number beyond the range of floats
        return None


def _require_whole_number(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be a whole number, not {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, not {value}")


def _require_seconds(name: str, value: object) -> None:
    seconds = _read_number(value)
    if seconds is None:
        raise TypeError(f"{name} must be a number of seconds, not {value!r}")
    if not 0 < seconds < math.inf:
        raise ValueError(f"{name} must be positive and finite, not {value}")


def _require_name(name: str, value: object) -> None:
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a string, not {value!r}")
    if not value:
        raise ValueError(f"{name} must not be empty")


def _require_best(name: str, value: object) -> None:
    if not isinstance(value, Best):
        raise TypeError(f"{name} must hold Best values, not {value!r}")
