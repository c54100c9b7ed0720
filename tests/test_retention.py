"""Which steps stay: every rule against an oracle of its own, and what holds for all policies.

The rules are pure, so that a history of days is a list of numbers here.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import itertools
import math
import random
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, strategies as st

from jaxckpt._retention import Best, Retention, Verdict, best_step, judge_steps, steps_to_delete

MINUTE = 60.0
HOUR = 3600.0
DAY = 86400.0
YEAR = 365 * DAY
LOSS = "val/loss"
NAN = math.nan
INF = math.inf

# Keeps the newest step only; a test adds the rule that it is about.
STRICT = Retention(max_to_keep=1)


class Saved(NamedTuple):
    step: int
    time_s: float = 0.0
    metrics: Mapping[str, object] = {}


History = Sequence[Saved]


def judge(history: History, policy: Retention, now_s: float = 0.0) -> list[Verdict]:
    return judge_steps(
        [saved.step for saved in history],
        [saved.time_s for saved in history],
        [saved.metrics for saved in history],
        policy,
        now_s,
    )


def clean(history: History, policy: Retention, now_s: float = 0.0) -> list[Saved]:
    """What is left of a directory."""
    gone = steps_to_delete(
        [saved.step for saved in history],
        [saved.time_s for saved in history],
        [saved.metrics for saved in history],
        policy,
        now_s,
    )
    return [saved for saved in history if saved.step not in gone]


def survivors(history: History, policy: Retention, now_s: float = 0.0) -> list[int]:
    return sorted(saved.step for saved in clean(history, policy, now_s))


def saves_at(*times_s: float) -> list[Saved]:
    return [Saved(step, time_s) for step, time_s in enumerate(times_s)]


def with_losses(*losses: object) -> list[Saved]:
    return [Saved(step, 0.0, {LOSS: loss}) for step, loss in enumerate(losses)]


def verdict_of(step: int, history: History, policy: Retention, now_s: float = 0.0) -> Verdict:
    return next(verdict for verdict in judge(history, policy, now_s) if verdict.step == step)


# --- histories and policies for properties --------------------------------------------------------------------

# Small whole numbers make equal values, equal times and gaps of exactly one interval likely.
TIMES = st.integers(0, 40).map(float) | st.sampled_from([NAN, INF, -INF, -5.0, 1e9, 1e308, -1e308])
LOSSES = st.sampled_from([0.1, 0.2, 0.3, 1, INF, -INF, NAN, "0.1", None, True, 10**400])
METRICS = st.fixed_dictionaries({}, optional={LOSS: LOSSES, "accuracy": LOSSES})
BESTS = st.builds(
    Best, st.sampled_from([LOSS, "accuracy"]), st.sampled_from(["min", "max"]), st.integers(1, 4)
)
NOW = st.integers(-10, 60).map(float) | st.sampled_from([NAN, INF, -INF])


def optional(strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.none() | strategy


POLICIES = st.builds(
    Retention,
    max_to_keep=optional(st.integers(1, 6)),
    keep_period=optional(st.integers(1, 7)),
    keep_interval_s=optional(st.sampled_from([0.5, 1, 2, 5, 10.0])),
    best=st.lists(BESTS, max_size=2).map(tuple),
    time_to_live_s=optional(st.sampled_from([0.5, 3, 10.0])),
    pinned=st.frozensets(st.integers(0, 40), max_size=3),
)
ETERNAL_POLICIES = POLICIES.map(lambda policy: dataclasses.replace(policy, time_to_live_s=None))


@st.composite
def histories(draw: st.DrawFn, order: str = "any", max_size: int = 30) -> list[Saved]:
    steps = draw(st.lists(st.integers(0, 40), unique=True, max_size=max_size))
    if order == "ascending":
        steps.sort()
    return [Saved(step, draw(TIMES), draw(METRICS)) for step in steps]


# --- the newest step ------------------------------------------------------------------------------------------


def test_of_no_steps_nothing_is_judged() -> None:
    assert judge([], Retention()) == []
    assert best_step([], [], Best(LOSS)) is None


def test_the_newest_and_the_last_committed_step_stay_after_going_back_to_an_older_one() -> None:
    history = [Saved(800, 1.0), Saved(900, 2.0), Saved(1000, 3.0), Saved(510, 4.0)]
    assert survivors(history, STRICT) == [510, 1000]
    assert verdict_of(510, history, STRICT).reasons == ("committed last",)
    assert verdict_of(1000, history, STRICT).reasons == ("the newest step", "one of the newest 1")


@given(histories().filter(len), POLICIES, NOW)
def test_the_newest_step_and_the_last_committed_stay_under_every_policy(history, policy, now_s) -> None:
    left = survivors(history, policy, now_s)
    assert max(saved.step for saved in history) in left
    known = [saved for saved in history if math.isfinite(saved.time_s)]
    if known:
        latest_s = max(saved.time_s for saved in known)
        assert max(saved.step for saved in known if saved.time_s == latest_s) in left


# --- max_to_keep ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("max_to_keep", "left"),
    [(1, [4]), (2, [3, 4]), (5, [0, 1, 2, 3, 4]), (9, [0, 1, 2, 3, 4]), (None, [0, 1, 2, 3, 4])],
)
def test_the_newest_so_many_stay(max_to_keep: int | None, left: list[int]) -> None:
    history = saves_at(0, 1, 2, 3, 4)
    assert survivors(history, Retention(max_to_keep=max_to_keep)) == left


def test_steps_that_another_rule_keeps_count_among_the_newest() -> None:
    policy = Retention(max_to_keep=2, pinned=frozenset({4}))
    assert survivors(saves_at(0, 1, 2, 3, 4), policy) == [3, 4]


@given(histories(), st.integers(1, 6))
def test_newest_is_by_step_and_not_by_time(history, max_to_keep) -> None:
    newest = sorted((saved.step for saved in history), reverse=True)[:max_to_keep]
    judged = judge(history, Retention(max_to_keep=max_to_keep))
    said = {verdict.step for verdict in judged if f"one of the newest {max_to_keep}" in verdict.reasons}
    assert said == set(newest)
    others = [verdict for verdict in judged if verdict.is_kept and verdict.step not in said]
    assert len(others) <= 1
    assert all(verdict.reasons == ("committed last",) for verdict in others)


# --- time_to_live_s -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_to_keep", [None, 3, 10])
def test_an_old_step_expires_and_one_exactly_as_old_stays(max_to_keep: int | None) -> None:
    history = saves_at(0, 1, 2, 3)
    policy = Retention(max_to_keep=max_to_keep, time_to_live_s=10)
    assert survivors(history, policy, now_s=11) == [1, 2, 3]
    assert survivors(history, policy, now_s=11.5) == [2, 3]
    assert survivors(history, policy, now_s=1e6) == [3]


def test_a_step_within_its_time_but_not_among_the_newest_goes() -> None:
    assert survivors(saves_at(0, 1, 2), Retention(max_to_keep=2, time_to_live_s=10), now_s=2) == [1, 2]


def test_no_step_expires_while_the_clock_stands_before_its_commit() -> None:
    policy = Retention(max_to_keep=None, time_to_live_s=1)
    assert survivors(saves_at(YEAR, 2 * YEAR), policy, now_s=0) == [0, 1]


@pytest.mark.parametrize("unknown", [NAN, INF, -INF])
def test_a_step_of_unknown_time_is_infinitely_old(unknown: float) -> None:
    history = saves_at(unknown, 5)
    policy = Retention(max_to_keep=None, time_to_live_s=1e300)
    assert survivors(history, policy, now_s=5) == [1]
    assert verdict_of(0, history, policy).reasons == ("older than 1e+300 s (its time is unknown)",)


def test_rules_for_good_keep_a_step_that_has_expired() -> None:
    history = [Saved(step, 100.0 * step, {LOSS: abs(step - 7)}) for step in range(12)]
    policy = Retention(
        keep_period=5, keep_interval_s=900, best=(Best(LOSS),), time_to_live_s=1, pinned=frozenset({3})
    )
    assert survivors(history, policy, now_s=1e9) == [0, 3, 5, 7, 9, 10, 11]


@given(histories(), NOW, st.sampled_from([0.5, 3.0, 10.0]))
def test_without_another_rule_the_unexpired_are_left(history, now_s, time_to_live_s) -> None:
    policy = Retention(max_to_keep=None, time_to_live_s=time_to_live_s)
    young = {
        saved.step
        for saved in history
        if math.isfinite(saved.time_s) and not now_s - saved.time_s > time_to_live_s
    }
    kept_as_newest = {
        verdict.step
        for verdict in judge(history, policy, now_s)
        if {"the newest step", "committed last"} & set(verdict.reasons)
    }
    assert set(survivors(history, policy, now_s)) == young | kept_as_newest


# --- keep_period ----------------------------------------------------------------------------------------------


def test_every_step_that_the_period_divides_stays_zero_too() -> None:
    history = [Saved(step) for step in range(0, 2600, 250)]
    policy = Retention(max_to_keep=2, keep_period=1000)
    assert survivors(history, policy) == [0, 1000, 2000, 2250, 2500]


@given(histories(), st.integers(1, 7))
def test_the_period_keeps_its_multiples_and_no_others(history, period) -> None:
    judged = judge(history, dataclasses.replace(STRICT, keep_period=period))
    said = {verdict.step for verdict in judged if f"every {period} steps" in verdict.reasons}
    assert said == {saved.step for saved in history} & set(range(0, 1000, period))


# --- keep_interval_s ------------------------------------------------------------------------------------------


def preserved(history: History, interval_s: float) -> list[int]:
    judged = judge(history, dataclasses.replace(STRICT, keep_interval_s=interval_s))
    return [
        verdict.step
        for verdict in judged
        if verdict.is_kept and any(reason.startswith("preserved: ") for reason in verdict.reasons)
    ]


def test_saves_each_half_hour_leave_one_for_each_two_hours_and_the_newest() -> None:
    """TensorFlow's case, whose survivors are 3, 7, 11, 15, 18, 19, since its anchor is an hour of no checkpoint."""
    history = saves_at(*(HOUR * (save + 1) / 2 for save in range(20)))
    policy = Retention(max_to_keep=2, keep_interval_s=2 * HOUR)
    assert survivors(history, policy) == [0, 4, 8, 12, 16, 18, 19]


def test_after_a_pause_of_ten_hours_not_every_step_stays() -> None:
    """TensorFlow's Saver keeps them all, because its next time to keep one lags behind by ten intervals."""
    resumed = [10 * HOUR + minute * MINUTE for minute in range(5)]
    history = saves_at(0, MINUTE, *resumed)
    assert survivors(history, Retention(max_to_keep=1, keep_interval_s=HOUR)) == [0, 2, 6]


def test_a_gap_of_exactly_the_interval_is_enough_and_less_is_not() -> None:
    assert preserved(saves_at(0, 10, 19.999, 20, 30.001), 10) == [0, 1, 3, 4]


def test_a_clock_that_goes_back_by_minutes_costs_one_more_checkpoint() -> None:
    before = [minute * MINUTE for minute in range(0, 121, 5)]
    after = [minute * MINUTE for minute in range(110, 241, 5)]
    history = saves_at(*before, *after)
    first_after = len(before)
    assert preserved(history[:first_after], HOUR) == [0, 12, 24]
    assert preserved(history, HOUR) == [0, 12, 24, first_after, first_after + 12, first_after + 24]


def test_a_clock_that_goes_back_but_not_past_the_anchor_changes_nothing() -> None:
    times_s = [0, 10, 20, 30, 40, 50, 25, 35, 45, 55, 65]
    assert preserved(saves_at(*(minute * MINUTE for minute in times_s)), HOUR) == [0, 10]


def test_a_clock_that_goes_back_by_years_neither_stops_the_rule_nor_keeps_everything() -> None:
    ahead = [30 * YEAR + half_hour * HOUR / 2 for half_hour in range(9)]
    right = [20 * YEAR + half_hour * HOUR / 2 for half_hour in range(9)]
    history = saves_at(*ahead, *right)
    assert preserved(history, 2 * HOUR) == [0, 4, 8, 9, 13, 17]
    assert verdict_of(9, history, dataclasses.replace(STRICT, keep_interval_s=2 * HOUR)).reasons == (
        "preserved: the clock went back by 3650 d after step 8",
    )


def test_each_jump_back_costs_one_more_checkpoint_and_each_jump_ahead_too() -> None:
    laps = 6
    within_lap = [DAY - lap * HOUR + minute * MINUTE for lap in range(laps) for minute in range(30)]
    assert preserved(saves_at(*within_lap), 10 * HOUR) == [30 * lap for lap in range(laps)]
    two_clocks = [(0.0 if save % 20 < 10 else DAY) + save * MINUTE for save in range(60)]
    assert preserved(saves_at(*two_clocks), HOUR) == [0, 10, 20, 30, 40, 50]


def test_two_clocks_that_differ_a_little_and_take_turns_cost_one_checkpoint_an_interval() -> None:
    times_s = [save * MINUTE - (4 * MINUTE if save % 2 else 0) for save in range(200)]
    assert preserved(saves_at(*times_s), HOUR) == [0, 1, 58, 59, 116, 117, 174, 175]


@pytest.mark.parametrize("unknown", [NAN, INF, -INF])
def test_a_step_of_unknown_time_is_passed_over(unknown: float) -> None:
    history = saves_at(unknown, 0, 5, unknown, 9, 10, unknown, 11)
    assert preserved(history, 10) == [1, 5]
    policy = dataclasses.replace(STRICT, keep_interval_s=10)
    assert "not preserved: its time is unknown" in verdict_of(0, history, policy).reasons


def test_where_no_time_is_known_nothing_is_preserved() -> None:
    assert preserved(saves_at(NAN, INF, NAN), 10) == []
    assert survivors(saves_at(NAN, INF, NAN), dataclasses.replace(STRICT, keep_interval_s=10)) == [2]


@given(histories(), st.sampled_from([0.5, 1.0, 2.0, 5.0, 10.0]))
def test_the_preserved_steps_are_those_that_the_rule_describes(history, interval_s) -> None:
    """Looks from each step at the preserved ones below it: no walk, no anchor."""
    said = set(preserved(history, interval_s))
    times_s = {saved.step: saved.time_s for saved in history if math.isfinite(saved.time_s)}
    assert said <= set(times_s)
    for step, time_s in times_s.items():
        below = [other for other in said if other < step]
        if not below:
            assert step in said  # a known step with none preserved below is itself the first
            continue
        since_s = time_s - interval_s
        anchor_s = times_s[max(below)]
        assert (step in said) == (since_s >= anchor_s or anchor_s > time_s)


@given(st.lists(st.integers(0, 3000), min_size=1), st.integers(1, 50))
def test_while_the_clock_goes_on_preserved_steps_are_neither_close_nor_far_apart(gaps, interval_s) -> None:
    times_s = [float(sum(gaps[: index + 1])) for index in range(len(gaps))]
    kept = preserved(saves_at(*times_s), interval_s)
    assert kept[0] == 0
    for earlier, later in itertools.pairwise(kept):
        assert times_s[later] - times_s[earlier] >= interval_s
        assert times_s[later - 1] - times_s[earlier] < interval_s
    assert times_s[-1] - times_s[kept[-1]] < interval_s


# --- best -----------------------------------------------------------------------------------------------------


def best_of(history: History, best: Best) -> int | None:
    return best_step([saved.step for saved in history], [saved.metrics for saved in history], best)


def test_the_best_few_stay_by_the_mode() -> None:
    history = with_losses(0.5, 0.1, 0.4, 0.2, 0.3, 0.9)
    assert survivors(history, dataclasses.replace(STRICT, best=(Best(LOSS, keep=2),))) == [1, 3, 5]
    assert survivors(history, dataclasses.replace(STRICT, best=(Best(LOSS, "max", 3),))) == [0, 2, 5]
    assert best_of(history, Best(LOSS)) == 1
    assert best_of(history, Best(LOSS, "max")) == 5


@pytest.mark.parametrize("mode", ["min", "max"])
def test_of_equal_values_the_newer_step_wins(mode: Any) -> None:
    history = with_losses(0.1, 0.1, 0.1, NAN)
    assert best_of(history, Best(LOSS, mode)) == 2
    assert best_of(list(reversed(history)), Best(LOSS, mode)) == 2
    assert survivors(history, dataclasses.replace(STRICT, best=(Best(LOSS, mode, 2),))) == [1, 2, 3]


@pytest.mark.parametrize("value", [NAN, None, "0.1", True, False, [0.1], 1j, 10**400, np.float32(NAN)])
@pytest.mark.parametrize("mode", ["min", "max"])
def test_what_has_no_place_in_an_order_is_never_best(value: object, mode: Any) -> None:
    history = with_losses(value, 0.5, value)
    best = Best(LOSS, mode, keep=3)
    assert survivors(history, dataclasses.replace(STRICT, best=(best,))) == [1, 2]
    assert best_of(history, best) == 1
    assert best_of(with_losses(value), best) is None


def test_a_step_without_the_metric_is_never_best() -> None:
    history = [Saved(0, 0.0, {"accuracy": 0.1}), Saved(1, 0.0, {LOSS: 5}), Saved(2)]
    assert survivors(history, dataclasses.replace(STRICT, best=(Best(LOSS, keep=3),))) == [1, 2]
    assert best_of(history, Best(LOSS)) == 1
    assert best_of(history, Best("los")) is None


@pytest.mark.parametrize("value", [3, np.float32(3), np.float64(3), np.int64(3), 3.0])
def test_numbers_of_python_and_numpy_are_metrics(value: object) -> None:
    assert best_of(with_losses(4.0, value, 3.5), Best(LOSS)) == 1


def test_infinities_are_ordinary_values() -> None:
    history = with_losses(INF, 1.0, -INF, NAN)
    assert best_of(history, Best(LOSS, "min")) == 2
    assert best_of(history, Best(LOSS, "max")) == 0
    assert best_of(with_losses(INF, NAN), Best(LOSS, "min")) == 0


def test_several_metrics_each_keep_their_best() -> None:
    history = [Saved(step, 0.0, {LOSS: 1 / (step + 1), "accuracy": -step}) for step in range(5)]
    policy = dataclasses.replace(STRICT, best=(Best(LOSS, keep=2), Best("accuracy", "max", 2)))
    assert survivors(history, policy) == [0, 1, 3, 4]


@given(histories(), BESTS)
def test_the_best_are_those_that_few_others_beat(history, best) -> None:
    """Counts for each step the steps that beat it: no sorting."""
    values = {
        saved.step: float(saved.metrics[best.metric])  # type: ignore[arg-type]
        for saved in history
        if type(saved.metrics.get(best.metric)) in (int, float)
        and saved.metrics[best.metric] != 10**400
        and not math.isnan(saved.metrics[best.metric])  # type: ignore[arg-type]
    }

    def beats(one: int, other: int) -> bool:
        if values[one] == values[other]:
            return one > other
        return (values[one] < values[other]) == (best.mode == "min")

    judged = judge(history, dataclasses.replace(STRICT, best=(best,)))
    said = {
        verdict.step for verdict in judged if any(reason.startswith("best ") for reason in verdict.reasons)
    }
    assert said == {step for step in values if sum(beats(other, step) for other in values) < best.keep}
    unbeaten = [step for step in values if not any(beats(other, step) for other in values)]
    assert best_of(history, best) == (unbeaten[0] if unbeaten else None)


# --- pinned ---------------------------------------------------------------------------------------------------


def test_pinned_steps_stay_and_those_that_do_not_exist_do_no_harm() -> None:
    policy = dataclasses.replace(STRICT, pinned=frozenset({1, 3, 77}))
    assert survivors(saves_at(0, 1, 2, 3, 4, 5), policy) == [1, 3, 5]


# --- what holds for all policies ------------------------------------------------------------------------------


@given(histories(), POLICIES, NOW)
def test_every_step_gets_one_verdict_with_reasons_in_ascending_order(history, policy, now_s) -> None:
    judged = judge(history, policy, now_s)
    assert [verdict.step for verdict in judged] == sorted(saved.step for saved in history)
    for verdict in judged:
        assert verdict.reasons
        assert all(reason and reason.isprintable() for reason in verdict.reasons)


@given(histories(), POLICIES, NOW)
def test_what_is_deleted_is_what_no_verdict_keeps(history, policy, now_s) -> None:
    kept = [verdict.step for verdict in judge(history, policy, now_s) if verdict.is_kept]
    assert survivors(history, policy, now_s) == kept


@given(histories(), POLICIES, NOW, st.randoms(use_true_random=False))
def test_the_order_of_the_input_does_not_matter_and_the_input_is_left_alone(
    history, policy, now_s, rng
) -> None:
    shuffled = list(history)
    rng.shuffle(shuffled)
    before = repr(shuffled)
    assert judge(shuffled, policy, now_s) == judge(history, policy, now_s)
    assert repr(shuffled) == before


@given(histories(), POLICIES, NOW)
def test_a_second_cleaning_deletes_nothing(history, policy, now_s) -> None:
    left = clean(history, policy, now_s)
    assert clean(left, policy, now_s) == left


@given(histories(order="ascending"), ETERNAL_POLICIES, st.data())
def test_cleaning_at_any_time_leaves_what_one_cleaning_at_the_end_leaves(history, policy, data) -> None:
    """For all rules together, clocks that jump included: there is nothing to remember beside the directory."""
    always = data.draw(st.booleans())
    directory: list[Saved] = []
    for saved in history:
        directory.append(saved)
        if always or data.draw(st.booleans()):
            directory = clean(directory, policy)
    assert survivors(directory, policy) == survivors(history, policy)


@pytest.mark.slow
@pytest.mark.parametrize(
    "policy",
    [
        Retention(max_to_keep=3),
        Retention(max_to_keep=1, keep_period=3),
        Retention(max_to_keep=1, keep_interval_s=5),
        Retention(max_to_keep=1, best=(Best(LOSS, keep=2),)),
        Retention(max_to_keep=1, best=(Best(LOSS, "max", 2),)),
    ],
    ids=["newest", "period", "interval", "best-min", "best-max"],
)
@given(history=histories(order="ascending"))
def test_cleaning_after_every_save_leaves_what_one_cleaning_leaves_rule_by_rule(history, policy) -> None:
    directory: list[Saved] = []
    for saved in history:
        directory = clean([*directory, saved], policy)
    assert survivors(directory, policy) == survivors(history, policy)


@given(histories(), ETERNAL_POLICIES)
def test_without_the_interval_steps_may_be_saved_in_any_order(history, policy) -> None:
    policy = dataclasses.replace(policy, keep_interval_s=None)
    directory: list[Saved] = []
    for saved in history:
        directory = clean([*directory, saved], policy)
    assert survivors(directory, policy) == survivors(history, policy)


@given(histories(order="ascending"), POLICIES)
def test_steps_that_expire_one_by_one_leave_what_one_cleaning_leaves(history, policy) -> None:
    """While the clock goes on."""
    known_s = sorted(saved.time_s for saved in history if math.isfinite(saved.time_s))
    history = [saved for saved in history if math.isfinite(saved.time_s)]
    history = [saved._replace(time_s=time_s) for saved, time_s in zip(history, known_s, strict=True)]
    directory: list[Saved] = []
    for saved in history:
        directory = clean([*directory, saved], policy, now_s=saved.time_s)
    now_s = known_s[-1] if known_s else 0.0
    assert survivors(directory, policy, now_s) == survivors(history, policy, now_s)


@given(histories(), POLICIES, POLICIES, NOW)
def test_a_rule_that_is_added_never_deletes_more(history, policy, other, now_s) -> None:
    before = set(survivors(history, policy, now_s))
    additions: list[dict[str, Any]] = [
        {"best": policy.best + other.best},
        {"pinned": policy.pinned | other.pinned},
    ]
    if policy.keep_period is None:
        additions.append({"keep_period": other.keep_period})
    if policy.keep_interval_s is None:
        additions.append({"keep_interval_s": other.keep_interval_s})
    if policy.max_to_keep is not None:
        additions.append({"max_to_keep": policy.max_to_keep + 2})
        additions.append({"max_to_keep": None})
    for addition in additions:
        assert before <= set(survivors(history, dataclasses.replace(policy, **addition), now_s)), addition


@given(histories(), POLICIES, NOW)
def test_an_expiry_never_keeps_more(history, policy, now_s) -> None:
    eternal = dataclasses.replace(policy, time_to_live_s=None)
    assert set(survivors(history, policy, now_s)) <= set(survivors(history, eternal, now_s))


@given(histories(), POLICIES, NOW)
def test_the_policy_keeps_what_its_rules_keep_one_by_one(history, policy, now_s) -> None:
    rules = [
        dataclasses.replace(STRICT, keep_period=policy.keep_period),
        dataclasses.replace(STRICT, keep_interval_s=policy.keep_interval_s),
        *(dataclasses.replace(STRICT, best=(best,)) for best in policy.best),
        dataclasses.replace(STRICT, pinned=policy.pinned),
        Retention(max_to_keep=policy.max_to_keep, time_to_live_s=policy.time_to_live_s),
    ]
    united = set().union(*(survivors(history, rule, now_s) for rule in rules))
    assert set(survivors(history, policy, now_s)) == united


@pytest.mark.timeout(20)
def test_ten_thousand_steps_are_judged_by_all_rules() -> None:
    """In tenths of a second; comparing each step with each would take minutes."""
    rng = random.Random(0)
    history = [Saved(step, step * 30.0, {LOSS: rng.random()}) for step in range(0, 1_000_000, 100)]
    rng.shuffle(history)
    policy = Retention(5, 10_000, HOUR, (Best(LOSS, keep=3),), DAY, frozenset(range(0, 1_000_000, 12_300)))
    left = survivors(history, policy, now_s=3e7)
    assert 100 <= len(left) < len(history)


# --- words ----------------------------------------------------------------------------------------------------


def test_a_verdict_lists_every_rule_that_keeps_the_step() -> None:
    history = [Saved(step, step * 20.0, {LOSS: step / 1000}) for step in range(0, 2001, 40)]
    policy = Retention(
        max_to_keep=51,
        keep_period=120,
        keep_interval_s=2 * HOUR,
        best=(Best(LOSS, keep=30), Best(LOSS, "max", keep=1)),
        time_to_live_s=12 * HOUR,
        pinned=frozenset({360, 2000}),
    )
    assert str(verdict_of(0, history, policy, now_s=40_000)) == (
        "step 0 stays: one of the newest 51; every 120 steps; preserved: the oldest step;"
        " best 1 of 30 by val/loss (min): 0"
    )
    assert str(verdict_of(360, history, policy, now_s=40_000)) == (
        "step 360 stays: one of the newest 51; every 120 steps; preserved: 2 h after step 0;"
        " best 10 of 30 by val/loss (min): 0.36; pinned"
    )
    assert str(verdict_of(2000, history, policy, now_s=40_000)) == (
        "step 2000 stays: the newest step; one of the newest 51; best 1 of 1 by val/loss (max): 2; pinned"
    )


def test_a_verdict_says_of_every_rule_why_it_does_not_keep_the_step() -> None:
    history = [Saved(step, step * 20.0, {LOSS: step / 1000}) for step in range(0, 2001, 40)]
    policy = Retention(
        max_to_keep=5,
        keep_period=1000,
        keep_interval_s=2 * HOUR,
        best=(Best(LOSS, keep=3), Best("accuracy", "max")),
        time_to_live_s=0.5 * HOUR,
    )
    assert verdict_of(400, history, policy, now_s=40_000) == Verdict(
        400,
        False,
        (
            "older than 1800 s",
            "not one of the newest 5",
            "not a multiple of 1000",
            "not preserved: less than 7200 s after step 360",
            "not one of the best 3 by val/loss (min): 0.4",
            "not one of the best 1 by accuracy (max): no such number",
        ),
    )


@pytest.mark.parametrize(
    ("policy", "reason"),
    [
        (Retention(max_to_keep=None), "every step stays (max_to_keep is None)"),
        (Retention(max_to_keep=None, time_to_live_s=3600), "not older than 3600 s"),
        (Retention(max_to_keep=5, time_to_live_s=0.25), "one of the newest 5"),
    ],
)
def test_the_words_for_a_recent_step(policy: Retention, reason: str) -> None:
    assert verdict_of(0, saves_at(0, 0), policy).reasons == (reason,)


def test_a_step_that_goes_says_so_in_one_line() -> None:
    assert str(judge(saves_at(0, 1), STRICT)[0]) == "step 0 goes: not one of the newest 1"


@pytest.mark.parametrize(
    ("gap_s", "words"),
    [
        (1.5, "1.5 s"),
        (90, "1.5 min"),
        (2 * HOUR, "2 h"),
        (7201.3, "2 h"),
        (3 * DAY, "3 d"),
        (3 * YEAR, "1095 d"),
    ],
)
def test_a_gap_is_told_in_the_unit_that_suits_it(gap_s: float, words: str) -> None:
    policy = dataclasses.replace(STRICT, keep_interval_s=1)
    assert f"preserved: {words} after step 0" in verdict_of(1, saves_at(0, gap_s), policy).reasons


def test_a_strange_name_of_a_metric_stays_in_its_line() -> None:
    policy = dataclasses.replace(STRICT, best=(Best("a\nb\x1b[31m"),))
    reasons = verdict_of(0, [Saved(0, 0.0, {"a\nb\x1b[31m": 2.0})], policy).reasons
    assert reasons[-1] == "best 1 of 1 by a\\nb\\x1b[31m (min): 2"


# --- what is refused ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"max_to_keep": 0}, ValueError, "max_to_keep must be at least 1, not 0"),
        ({"max_to_keep": -3}, ValueError, "max_to_keep must be at least 1, not -3"),
        ({"max_to_keep": 2.5}, TypeError, "max_to_keep must be a whole number, not 2.5"),
        ({"max_to_keep": True}, TypeError, "max_to_keep must be a whole number, not True"),
        ({"keep_period": 0}, ValueError, "keep_period must be at least 1, not 0"),
        ({"keep_period": "9"}, TypeError, "keep_period must be a whole number, not '9'"),
        ({"keep_interval_s": 0}, ValueError, "keep_interval_s must be positive and finite, not 0"),
        ({"keep_interval_s": -1.0}, ValueError, "keep_interval_s must be positive and finite, not -1.0"),
        ({"keep_interval_s": NAN}, ValueError, "keep_interval_s must be positive and finite, not nan"),
        ({"keep_interval_s": True}, TypeError, "keep_interval_s must be a number of seconds, not True"),
        (
            {"keep_interval_s": dt.timedelta(hours=2)},
            TypeError,
            "keep_interval_s must be a number of seconds, not datetime.timedelta(seconds=7200)",
        ),
        ({"time_to_live_s": INF}, ValueError, "time_to_live_s must be positive and finite, not inf"),
        ({"time_to_live_s": 0}, ValueError, "time_to_live_s must be positive and finite, not 0"),
        ({"best": ("val/loss",)}, TypeError, "best must hold Best values, not 'val/loss'"),
        ({"pinned": frozenset({"5"})}, TypeError, "a pinned step must be a whole number, not '5'"),
        ({"pinned": frozenset({-5})}, ValueError, "a pinned step must be at least 0, not -5"),
    ],
)
def test_a_policy_that_makes_no_sense_is_refused(arguments: Any, error: Any, message: str) -> None:
    with pytest.raises(error) as caught:
        Retention(**arguments)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("",), ValueError, "metric must not be empty"),
        ((7,), TypeError, "metric must be a string, not 7"),
        ((LOSS, "lowest"), ValueError, "mode must be 'min' or 'max', not 'lowest'"),
        ((LOSS, "min", 0), ValueError, "keep must be at least 1, not 0"),
        ((LOSS, "min", 1.0), TypeError, "keep must be a whole number, not 1.0"),
    ],
)
def test_a_best_that_makes_no_sense_is_refused(arguments: Any, error: Any, message: str) -> None:
    with pytest.raises(error) as caught:
        Best(*arguments)
    assert str(caught.value) == message


def test_numbers_of_numpy_are_welcome_in_a_policy() -> None:
    policy = Retention(np.int64(2), np.int32(3), np.float32(4), time_to_live_s=np.float64(9))  # type: ignore[arg-type]
    assert survivors(saves_at(0, 1, 2, 3, 4, 5, 6, 7), policy) == [0, 3, 4, 6, 7]


def test_sequences_of_different_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="shorter"):
        judge_steps([1, 2], [0.0], [{}, {}], Retention(), 0.0)
    with pytest.raises(ValueError, match="shorter"):
        best_step([1, 2], [{}], Best(LOSS))
