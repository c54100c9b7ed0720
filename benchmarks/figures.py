"""Is the suite's every target met? Each wanted figure, measured at each place, with a verdict.

`FIGURES` lists what is wanted. A figure is measured at one or more places: a workload on a storage, or what a study
names. At each it is met, missed or not measured. Bounds on memory are held against the worst trial, all else against
the median over the repetitions (`ratios`).
"""

from __future__ import annotations

import dataclasses
import functools
import re
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal, NamedTuple

from benchmarks.ratios import OWN, Group, Results, Trial, best, speed_ratio, values


class Measurement(NamedTuple):
    """A figure at one place.

    Attributes:
        subject: a workload, or a part of a study; "" where the figure has one number.
        storage: a directory and its file system; "" where that does not matter.
        values: one for each repetition, or the one number of a study; none: not measured.
        target: instead of the figure's; None for the figure's own.
    """

    subject: str
    storage: str
    values: Sequence[float]
    target: float | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Figure:
    """One thing that is wanted.

    Attributes:
        id: names it in remarks.json.
        topic: heading.
        sentence: what is measured.
        relation: "≥" or "≤" the target.
        target: the limit.
        unit: "x", "ms", "MiB" or "".
        measure: finds it in the results.
        is_for_worst: the limit holds for each trial, not for their median.
        condition: words after the target.
    """

    id: str
    topic: str
    sentence: str
    relation: Literal["≥", "≤"]
    target: float
    unit: str
    measure: Callable[[Results], Iterator[Measurement]]
    is_for_worst: bool = False
    condition: str = ""


class Check(NamedTuple):
    """A figure, one place, and whether it is reached there."""

    figure: Figure
    measurement: Measurement

    @property
    def target(self) -> float:
        special = self.measurement.target
        return self.figure.target if special is None else special

    @property
    def measured(self) -> float | None:
        found = self.measurement.values
        if not found:
            return None
        if not self.figure.is_for_worst:
            return statistics.median(found)
        return min(found) if self.figure.relation == "≥" else max(found)

    @property
    def is_met(self) -> bool:
        if self.measured is None:
            return False
        return self.measured >= self.target if self.figure.relation == "≥" else self.measured <= self.target

    @property
    def place(self) -> str:
        """Names the place in remarks.json, after the figure's id."""
        subject, storage = self.measurement.subject, self.measurement.storage
        return f"{subject} on {storage}".strip() if storage else subject


def _places(
    results: Results, workloads: Iterable[str], *, is_disk_only: bool
) -> Iterator[tuple[str, Group | None]]:
    """Each workload with each of its groups; with None where it has none."""
    for workload in workloads:
        found = [
            group
            for group in results.groups
            if group.workload == workload and not (is_disk_only and group.is_in_memory)
        ]
        if not found:
            yield workload, None
        for group in found:
            yield workload, group


def speeds(
    results: Results,
    *,
    workloads: Sequence[str],
    operation: str,
    opponent: str,
    is_disk_only: bool = False,
    is_inverse: bool = False,
) -> Iterator[Measurement]:
    """How many times as fast as an opponent jaxckpt is; inverse: how many times the opponent's time it takes."""
    is_disk_only = is_disk_only or operation == "restore cold"  # memory has no cold files
    for workload, group in _places(results, workloads, is_disk_only=is_disk_only):
        ratio = speed_ratio(group, opponent, operation) if group else None
        if group is None or ratio is None:
            yield Measurement(workload, group.storage if group else "", ())
        else:
            found = [1 / value for value in ratio.values] if is_inverse else ratio.values
            yield Measurement(workload, group.storage, found)


def speeds_where_raw_leaves_room(
    results: Results, *, workloads: Sequence[str], wanted: float
) -> Iterator[Measurement]:
    """Saves on disk against tuned Orbax: where raw itself is less than `wanted` times as fast, equal speed will do."""
    found = speeds(results, workloads=workloads, operation="save", opponent="tuned Orbax", is_disk_only=True)
    for measurement in found:
        target = None
        for group in results.groups:
            if (group.workload, group.storage) == (measurement.subject, measurement.storage):
                raw = best(group, "raw", "save")
                room = speed_ratio(group, "tuned Orbax", "save", contender=raw) if raw else None
                if room is not None and room.median < wanted:
                    target = 1.0
        yield measurement._replace(target=target)


def peak_over_arrays(trial: Trial) -> float:
    arrays_bytes = trial.get("restored_bytes")
    if arrays_bytes is None:  # of an older file, whose raw contenders fill one copy of the bytes
        arrays_bytes = trial["stored_bytes"] if trial["family"] == "raw" else trial["device_bytes"]
    return trial["peak_extra_bytes"] / arrays_bytes


def restore_peaks(results: Results, *, workloads: Sequence[str]) -> Iterator[Measurement]:
    """The most memory that a restore took, as a multiple of the restored arrays."""
    for workload, group in _places(results, workloads, is_disk_only=False):
        found: list[float] = []
        for operation in ("restore cold", "restore warm"):
            if group is not None:
                found += values(group.trials, OWN, operation, peak_over_arrays).values()
        yield Measurement(workload, group.storage if group else "", found)


def milliseconds(
    results: Results, *, workloads: Sequence[str], operation: str, contender: str
) -> Iterator[Measurement]:
    for workload, group in _places(results, workloads, is_disk_only=operation == "restore cold"):
        found = values(group.trials, contender, operation) if group else {}
        yield Measurement(workload, group.storage if group else "", [1e3 * value for value in found.values()])


def from_study(results: Results, *, study: str, pattern: str) -> Iterator[Measurement]:
    """The numbers of a study whose names match; what the groups of the pattern caught is the subject."""
    is_found = False
    for found in results.studies:
        if found["name"] != study:
            continue
        for name, value in found["figures"].items():
            match = re.search(pattern, name)
            if match:
                is_found = True
                subject = ", ".join(part.strip(" ,") for part in match.groups() if part)
                yield Measurement(subject, found["storage"], (value,))
    if not is_found:
        yield Measurement(study, "", ())


# Few leaves of many bytes, or a real model's: the disk and the memory are the limit.
BIG = ("large", "single", "gpt-float32", "gpt-bfloat16")

# Many leaves of few bytes: the work for each leaf is the limit.
SMALL = ("small", "tiny")

RESHARDS = ("reshard-8x1-1x8", "reshard-4x2-2x4", "reshard-8-1", "reshard-1-8")


def _versus(
    opponent: str,
    operation: str,
    workloads: Sequence[str],
    *,
    is_disk_only: bool = False,
    is_inverse: bool = False,
) -> Callable[[Results], Iterator[Measurement]]:
    return functools.partial(
        speeds,
        workloads=workloads,
        operation=operation,
        opponent=opponent,
        is_disk_only=is_disk_only,
        is_inverse=is_inverse,
    )


def _study(study: str, pattern: str) -> Callable[[Results], Iterator[Measurement]]:
    return functools.partial(from_study, study=study, pattern=pattern)


FIGURES = (
    Figure(
        "save-raw",
        "Saving",
        "times as fast as raw I/O, on disk",
        "≥",
        0.9,
        "x",
        _versus("raw", "save", BIG, is_disk_only=True),
    ),
    Figure(
        "save-tuned",
        "Saving",
        "times as fast as the best tuned Orbax, on disk",
        "≥",
        1.15,
        "x",
        functools.partial(speeds_where_raw_leaves_room, workloads=BIG, wanted=1.15),
        condition="where raw I/O is that much faster, else ≥ 1.00",
    ),
    Figure(
        "save-default",
        "Saving",
        "times as fast as the best default Orbax, on disk",
        "≥",
        2.0,
        "x",
        _versus("default Orbax", "save", BIG, is_disk_only=True),
    ),
    Figure(
        "restore-cold-raw",
        "Restoring",
        "times as fast as raw I/O, page cache cold",
        "≥",
        0.9,
        "x",
        _versus("raw", "restore cold", BIG),
    ),
    Figure(
        "restore-warm-raw",
        "Restoring",
        "times as fast as raw I/O, page cache warm",
        "≥",
        0.9,
        "x",
        _versus("raw", "restore warm", BIG),
    ),
    Figure(
        "restore-cold-orbax",
        "Restoring",
        "times as fast as the best Orbax, page cache cold",
        "≥",
        1.5,
        "x",
        _versus("Orbax", "restore cold", BIG + RESHARDS),
    ),
    Figure(
        "restore-warm-orbax",
        "Restoring",
        "times as fast as the best Orbax, page cache warm",
        "≥",
        1.5,
        "x",
        _versus("Orbax", "restore warm", BIG + RESHARDS),
    ),
    Figure(
        "restore-memory",
        "Restoring",
        "peak memory / restored arrays",
        "≤",
        1.1,
        "x",
        functools.partial(restore_peaks, workloads=BIG + RESHARDS),
        is_for_worst=True,
    ),
    Figure(
        "restore-mmap",
        "Restoring",
        "with `mmap=True`, page cache warm",
        "≤",
        10.0,
        "ms",
        functools.partial(
            milliseconds, workloads=BIG[:2], operation="restore warm", contender="jaxckpt-mmap"
        ),
    ),
    Figure(
        "small-save-orbax",
        "Small leaves",
        "save: times as fast as the best Orbax",
        "≥",
        50.0,
        "x",
        _versus("Orbax", "save", SMALL),
    ),
    Figure(
        "small-save-raw",
        "Small leaves",
        "save: time / (`jax.device_get` and one packed raw write)",
        "≤",
        3.0,
        "x",
        _versus("packed raw", "save", SMALL, is_inverse=True),
    ),
    Figure(
        "small-restore-cold-orbax",
        "Small leaves",
        "restore, page cache cold: times as fast as the best Orbax",
        "≥",
        15.0,
        "x",
        _versus("Orbax", "restore cold", SMALL),
    ),
    Figure(
        "small-restore-warm-orbax",
        "Small leaves",
        "restore, page cache warm: times as fast as the best Orbax",
        "≥",
        15.0,
        "x",
        _versus("Orbax", "restore warm", SMALL),
    ),
    Figure(
        "small-restore-warm-raw",
        "Small leaves",
        "restore, page cache warm: time / `jax.device_put`",
        "≤",
        1.5,
        "x",
        _versus("packed raw", "restore warm", SMALL, is_inverse=True),
    ),
    Figure(
        "loop-blocked",
        "Training loop",
        "blocked time and slowdown of the next five steps / the best Orbax's",
        "≤",
        0.5,
        "x",
        _study("loop", r"^blocked \+ slowdown, (.*): (.*) / best Orbax$"),
    ),
    Figure(
        "loop-1000",
        "Training loop",
        "`save_async` of 1,000 leaves, plan cached",
        "≤",
        5.0,
        "ms",
        _study("loop", r"save_async, 1,000 leaves (.*): ms$"),
    ),
    Figure(
        "loop-10000",
        "Training loop",
        "`save_async` of 10,000 leaves, plan cached",
        "≤",
        30.0,
        "ms",
        _study("loop", r"save_async, 10,000 leaves (.*): ms$"),
    ),
    Figure(
        "memory-budget",
        "Memory",
        "peak host memory less `host_bytes_max`, the most of all cases",
        "≤",
        64.0,
        "MiB",
        _study("memory", r"over budget MiB$"),
        is_for_worst=True,
    ),
    Figure(
        "memory-save",
        "Memory",
        "peak host memory of a save of one leaf / the leaf, default budget",
        "≤",
        0.1,
        "x",
        _study("memory", r"^single, save, default budget: extra / state"),
        is_for_worst=True,
    ),
    Figure(
        "open",
        "Opening and listing",
        "first `open` of 100,000 leaves",
        "≤",
        100.0,
        "ms",
        _study("opening", r"^open the large one, first: ms$"),
    ),
    Figure(
        "open-orbax",
        "Opening and listing",
        "first `open`: times as fast as the best Orbax",
        "≥",
        10.0,
        "x",
        _study("opening", r"^open: best Orbax(.*) / jaxckpt(.*)$"),
    ),
    Figure(
        "list",
        "Opening and listing",
        "a new manager lists 1,000 steps",
        "≤",
        50.0,
        "ms",
        _study("opening", r"^make \+ list: ms$"),
    ),
    Figure(
        "list-orbax",
        "Opening and listing",
        "a new manager lists its steps: times as fast as the best Orbax",
        "≥",
        10.0,
        "x",
        _study("opening", r"^make \+ list: best Orbax / jaxckpt"),
    ),
    Figure(
        "growth",
        "Growth",
        "exponent of the time, from the larger sizes",
        "≤",
        1.1,
        "",
        _study("growth", r"^(.*): exponent$"),
    ),
    Figure(
        "endurance-time",
        "Endurance",
        "200 saves: seconds of the last 50 / those of saves 20 to 70",
        "≤",
        1.1,
        "x",
        _study("endurance", r"^seconds, late / early$"),
    ),
    Figure(
        "endurance-memory",
        "Endurance",
        "200 saves: memory that the last 50 have more than saves 20 to 70 / the state",
        "≤",
        0.1,
        "x",
        _study("endurance", r"^memory growth / state$"),
        is_for_worst=True,
    ),
    Figure(
        "endurance-files",
        "Endurance",
        "200 saves: open files and threads more than after the twentieth",
        "≤",
        0.0,
        "",
        _study("endurance", r"^(files|threads)$"),
        is_for_worst=True,
    ),
    Figure(
        "checksums",
        "Checksums",
        "time with them / without, less 1",
        "≤",
        0.05,
        "",
        _study("checksums", r"^(.*), seconds: cost$"),
    ),
)


def check(results: Results) -> list[Check]:
    """Every figure at every place, in the order of `FIGURES`."""
    return [Check(figure, measurement) for figure in FIGURES for measurement in figure.measure(results)]
