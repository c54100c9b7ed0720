"""How does one contender compare with another? Results files, and ratios of trials inside one run.

A results file (JSON) holds every trial of a run, and what its studies found. All that is printed follows from it:

1. A ratio is taken within each repetition, whose trials lie close together in time. Its median over the repetitions
   is reported with its range. Machines, and even hours on one machine, differ more than contenders do, so nothing is
   compared across runs.
2. The other side of a ratio is the best of a kind in that run: the contender with the best median among all raw ones,
   all tuned Orbax ones, and so on.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

DEFAULT_RESULTS = Path(__file__).resolve().parent / "results.json"

# One measured process, the tables of one study, one results file; the fields are those of JSON.
Trial = dict[str, Any]
Study = dict[str, Any]
Run = dict[str, Any]

OWN = "jaxckpt"

MEMORY_STORAGE = ("(tmpfs)", "(ramfs)")

# Which contenders each kind of opponent is the best of.
OPPONENTS: dict[str, Callable[[Trial], bool]] = {
    "raw": lambda trial: trial["family"] == "raw",
    "packed raw": lambda trial: trial["contender"].startswith("raw-packed"),
    "Orbax": lambda trial: trial["family"] == "orbax",
    "tuned Orbax": lambda trial: trial["family"] == "orbax" and "default" not in trial["contender"],
    "default Orbax": lambda trial: trial["family"] == "orbax" and "default" in trial["contender"],
    "other": lambda trial: trial["family"] not in (OWN, "orbax", "raw"),
}


class Group(NamedTuple):
    """The trials of one workload on one storage directory in one run."""

    workload: str
    description: str
    storage: str
    trials: list[Trial]
    run: Run

    @property
    def is_in_memory(self) -> bool:
        return self.storage.endswith(MEMORY_STORAGE)


class Results(NamedTuple):
    """What several runs measured. Where two did the same, the later one counts."""

    runs: list[Run]
    groups: list[Group]
    studies: list[Study]


def default_paths() -> list[Path]:
    """results.json, and after it all results-NAME.json beside it, which may hold a workload measured again."""
    extra = sorted(DEFAULT_RESULTS.parent.glob("results-*.json"))
    return [path for path in (DEFAULT_RESULTS, *extra) if path.exists()]


def load(paths: Iterable[Path]) -> Results:
    return merge([json.loads(path.read_text()) for path in paths])


def merge(runs: Sequence[Run]) -> Results:
    found_groups: dict[tuple[str, str], Group] = {}
    found_studies: dict[tuple[str, str, str], Study] = {}
    for run in runs:
        for group in groups(run):
            found_groups[group.workload, group.storage] = group
        for study in run.get("studies", []):
            found_studies[study["name"], study["title"], study["storage"]] = study | {
                "commit": run["meta"]["commit"]
            }
    return Results(list(runs), list(found_groups.values()), list(found_studies.values()))


def groups(run: Run) -> list[Group]:
    """Splits the trials of a run by workload and storage, in the order of the run."""
    found: dict[tuple[str, str], list[Trial]] = {}
    for trial in run["trials"]:
        found.setdefault((trial["workload"], trial["storage"]), []).append(trial)
    descriptions = run["meta"]["workloads"]
    return [
        Group(workload, descriptions[workload], storage, trials, run)
        for (workload, storage), trials in found.items()
    ]


def seconds(trial: Trial) -> float:
    return trial["seconds"]


def contender_names(trials: Iterable[Trial]) -> list[str]:
    order = {trial["contender"]: trial["contender_order"] for trial in trials}
    return sorted(order, key=order.__getitem__)


def values(
    trials: Iterable[Trial], contender: str, operation: str, value: Callable[[Trial], float] = seconds
) -> dict[int, float]:
    """What a contender's trials of an operation say, by repetition."""
    return {
        trial["repetition"]: value(trial)
        for trial in trials
        if trial["contender"] == contender and trial["operation"] == operation
    }


def best(
    group: Group, opponent: str, operation: str, value: Callable[[Trial], float] = seconds
) -> str | None:
    """The contender of a kind with the smallest median; None if none of that kind did the operation."""
    chosen = [trial for trial in group.trials if OPPONENTS[opponent](trial)]
    medians = {}
    for name in contender_names(chosen):
        found = values(chosen, name, operation, value)
        if found:
            medians[name] = statistics.median(found.values())
    return min(medians, key=medians.__getitem__) if medians else None


def quotients(upper: dict[int, float], lower: dict[int, float]) -> list[float]:
    """The ratio in each repetition that both have."""
    return [upper[key] / lower[key] for key in sorted(upper.keys() & lower.keys()) if lower[key] > 0]


class Ratio(NamedTuple):
    """How many times as fast as another contender one is.

    Attributes:
        other: the name of the other.
        values: other's seconds / own seconds in each repetition.
    """

    other: str
    values: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.values)


def speed_ratio(group: Group, opponent: str, operation: str, contender: str = OWN) -> Ratio | None:
    """A contender against the best opponent of a kind; None where one of them has no such trial."""
    own = values(group.trials, contender, operation)
    name = best(group, opponent, operation)
    if name is None:
        return None
    found = quotients(values(group.trials, name, operation), own)
    return Ratio(name, found) if found else None
