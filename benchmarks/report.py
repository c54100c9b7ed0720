"""From single trials to what a reader wants to know: medians, ratios, tables.

A results file (JSON) holds every trial; all that is printed follows from it:

    python -m benchmarks.report [RESULTS.json]      writes RESULTS.md beside it

Machines, and even hours on one machine, differ more than contenders do. So only ratios inside one run are a
result. A ratio is taken within each repetition, whose trials lie close together in time, and the median of
these is reported with their range.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

DEFAULT_RESULTS = Path(__file__).resolve().parent / "results.json"

Trial = dict[str, Any]

GIGA = 1e9


class Metric(NamedTuple):
    """One figure of a contender.

    Attributes:
        label: in ratios.
        heading: in tables.
        operation: "save", "restore cold" or "restore warm".
        value: from a trial; smaller is better. None where the trial has no such figure.
        unit: "s" for seconds, "x" for a multiple of the workload's bytes, "" for a count.
        is_compared: has a line among the ratios.
    """

    label: str
    heading: str
    operation: str
    value: Callable[[Trial], float]
    unit: str
    is_compared: bool


def _seconds(trial: Trial) -> float:
    return trial["seconds"]


def _peak_over_stored(trial: Trial) -> float:
    return trial["peak_extra_bytes"] / trial["stored_bytes"]


def _peak_over_arrays(trial: Trial) -> float:
    # The raw contenders fill one copy of the bytes, whatever the number of devices.
    arrays_bytes = trial["stored_bytes"] if trial["family"] == "raw" else trial["device_bytes"]
    return trial["peak_extra_bytes"] / arrays_bytes


def _written(trial: Trial) -> float:
    return trial["call_write_bytes"] / trial["stored_bytes"]


def _read_by_calls(trial: Trial) -> float:
    return trial["call_read_bytes"] / trial["stored_bytes"]


def _read_from_storage(trial: Trial) -> float:
    return trial["storage_read_bytes"] / trial["stored_bytes"]


def _file_count(trial: Trial) -> float:
    return trial["file_count"]


METRICS = (
    Metric("save", "save s", "save", _seconds, "s", is_compared=True),
    Metric("peak memory of save", "memory", "save", _peak_over_stored, "x", is_compared=True),
    Metric("bytes written", "written", "save", _written, "x", is_compared=False),
    Metric("files", "files", "save", _file_count, "", is_compared=False),
    Metric("cold restore", "cold restore s", "restore cold", _seconds, "s", is_compared=True),
    Metric("bytes from storage", "from storage", "restore cold", _read_from_storage, "x", is_compared=False),
    Metric("warm restore", "warm restore s", "restore warm", _seconds, "s", is_compared=True),
    Metric("peak memory of restore", "memory", "restore warm", _peak_over_arrays, "x", is_compared=True),
    Metric("bytes of read calls", "read calls", "restore warm", _read_by_calls, "x", is_compared=False),
)

LEGEND = (
    "Seconds: median [min-max]; GB/s: distinct bytes per median second. memory: the most resident memory "
    "during the operation, less that before it, as a multiple of the distinct bytes (save) or of the bytes "
    "that all devices hold afterwards (restore; raw: distinct bytes). written, from storage, read calls: "
    "bytes given to write calls, fetched from the device, asked for by read calls, as a multiple of the "
    "distinct bytes; reads through a memory map are no calls."
)

RATIO_LEGEND = (
    "Ratios: how many times as fast as the other, or how many times the other's memory; median [min-max] of "
    "the ratios within each repetition, then the two medians. Raw is the raw contender with the best median "
    "for that figure, and the best Orbax likewise."
)


class Group(NamedTuple):
    """The trials of one workload on one storage directory, and how they are called."""

    workload: str
    description: str
    storage: str
    trials: list[Trial]


def groups(results: dict[str, Any]) -> list[Group]:
    """Splits the trials of a run by workload and storage, in the order of the run."""
    found: dict[tuple[str, str], list[Trial]] = {}
    for trial in results["trials"]:
        found.setdefault((trial["workload"], trial["storage"]), []).append(trial)
    descriptions = results["meta"]["workloads"]
    return [
        Group(workload, descriptions[workload], storage, trials)
        for (workload, storage), trials in found.items()
    ]


def _contender_names(trials: Iterable[Trial]) -> list[str]:
    order = {trial["contender"]: trial["contender_order"] for trial in trials}
    return sorted(order, key=order.__getitem__)


def _values(trials: Iterable[Trial], contender: str, metric: Metric) -> dict[int, float]:
    """The values of a metric by repetition."""
    return {
        trial["repetition"]: metric.value(trial)
        for trial in trials
        if trial["contender"] == contender and trial["operation"] == metric.operation
    }


def _headings(metric: Metric) -> list[str]:
    return [metric.heading, "GB/s"] if metric.unit == "s" else [metric.heading]


def _cells(values: Sequence[float], metric: Metric, stored_bytes: int) -> list[str]:
    """One cell for each of the metric's headings."""
    if not values:
        return ["-"] * len(_headings(metric))
    middle = statistics.median(values)
    if metric.unit == "s":
        rate = stored_bytes / middle / GIGA
        return [f"{middle:.3f} [{min(values):.3f}-{max(values):.3f}]", f"{rate:.2f}"]
    if metric.unit == "x":
        return [f"{middle:.2f}x"]
    return [f"{middle:,.0f}"]


def table(group: Group) -> list[list[str]]:
    """The rows of a group's table, the header first."""
    metrics = [metric for metric in METRICS if _has_values(group.trials, metric)]
    stored_bytes = group.trials[0]["stored_bytes"]
    rows = [["contender", *(heading for metric in metrics for heading in _headings(metric)), "runs"]]
    for name in _contender_names(group.trials):
        cells = []
        for metric in metrics:
            values = list(_values(group.trials, name, metric).values())
            cells += _cells(values, metric, stored_bytes)
        repetitions = {trial["repetition"] for trial in group.trials if trial["contender"] == name}
        rows.append([name, *cells, str(len(repetitions))])
    return rows


def _has_values(trials: Iterable[Trial], metric: Metric) -> bool:
    return any(trial["operation"] == metric.operation for trial in trials)


def _best(group: Group, family: str, metric: Metric) -> str | None:
    """The contender of a family with the smallest median."""
    medians = {}
    for name in _contender_names(trial for trial in group.trials if trial["family"] == family):
        values = _values(group.trials, name, metric)
        if values:
            medians[name] = statistics.median(values.values())
    if not medians:
        return None
    return min(medians, key=medians.__getitem__)


class Ratio(NamedTuple):
    """jaxckpt against one other contender.

    Attributes:
        metric: what is compared.
        own: median of jaxckpt.
        others: median of the other.
        family: of the other.
        other: its name.
        median, low, high: other / jaxckpt for seconds, jaxckpt / other for memory.
    """

    metric: Metric
    own: float
    others: float
    family: str
    other: str
    median: float
    low: float
    high: float


def ratios(group: Group) -> list[Ratio]:
    """Compares jaxckpt with the best raw and the best Orbax contender, for each metric that is compared."""
    found = []
    for metric in METRICS:
        own = _values(group.trials, "jaxckpt", metric)
        if not metric.is_compared or not own:
            continue
        for family in ("raw", "orbax"):
            if family == "raw" and metric.unit != "s":  # the raw contenders have no devices to fill
                continue
            name = _best(group, family, metric)
            if name is None:
                continue
            other = _values(group.trials, name, metric)
            quotients = _quotients(own, other, metric)
            if quotients:
                found.append(
                    Ratio(
                        metric,
                        own=statistics.median(own.values()),
                        others=statistics.median(other.values()),
                        family=family,
                        other=name,
                        median=statistics.median(quotients),
                        low=min(quotients),
                        high=max(quotients),
                    )
                )
    return found


def _quotients(own: dict[int, float], other: dict[int, float], metric: Metric) -> list[float]:
    """The ratio in each repetition that both have."""
    quotients = []
    for repetition in sorted(own.keys() & other.keys()):
        if metric.unit == "s":
            upper, lower = other[repetition], own[repetition]
        else:
            upper, lower = own[repetition], other[repetition]
        if lower > 0:
            quotients.append(upper / lower)
    return quotients


def _ratio_text(ratio: Ratio) -> str:
    other = f"raw ({ratio.other})" if ratio.family == "raw" else f"the best Orbax ({ratio.other})"
    spread = f"{ratio.median:.2f} [{ratio.low:.2f}-{ratio.high:.2f}]"
    if ratio.metric.unit == "s":
        return f"{ratio.metric.label}: {spread} x as fast as {other}: {ratio.own:.3f} s, {ratio.others:.3f} s"
    return f"{ratio.metric.label}: {spread} x that of {other}: {ratio.own:.2f}x, {ratio.others:.2f}x"


def _notes(results: dict[str, Any], group: Group) -> list[str]:
    """What is missing from a group, and why."""
    return [
        f"{note['contender']}: {note['text']}"
        for note in results["notes"]
        if note["workload"] in (None, group.workload) and note["storage"] in (None, group.storage)
    ]


def plain_text(results: dict[str, Any], group: Group) -> str:
    """A group's table, ratios and notes for a terminal."""
    rows = table(group)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [f"{group.workload} on {group.storage}: {group.description}", ""]
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(cells))
    lines.append("")
    lines += [f"  jaxckpt {_ratio_text(ratio)}" for ratio in ratios(group)]
    lines += [f"  note: {note}" for note in _notes(results, group)]
    return "\n".join(lines)


def markdown(results: dict[str, Any]) -> str:
    """Renders RESULTS.md: the run's surroundings, then a table, the ratios and the notes of each group."""
    meta = results["meta"]
    versions = ", ".join(f"{name} {version}" for name, version in meta["versions"].items())
    lines = [
        "# Results",
        "",
        "Written by `python -m benchmarks.report` from a run of `python -m benchmarks.run`.",
        "",
        f"* machine: {meta['machine']}",
        f"* device: {meta['device']}",
        f"* versions: {versions}",
        f"* commit: {meta['commit']}",
        f"* command: `{meta['command']}`",
        f"* date: {meta['date']}",
        "",
        LEGEND,
        "",
        RATIO_LEGEND,
        "",
        "Durable when `save` returns:",
        "",
        *(f"* {name}: {text}" for name, text in meta["durability"].items()),
    ]
    for group in groups(results):
        header, *rows = table(group)
        lines += ["", f"## {group.workload} on {group.storage}", "", f"{group.description}.", ""]
        lines.append(_markdown_row(header))
        lines.append(_markdown_row(["---"] + ["--:"] * (len(header) - 1)))
        lines += [_markdown_row(row) for row in rows]
        found = ratios(group)
        if found:
            lines += ["", *(f"* jaxckpt {_ratio_text(ratio)}" for ratio in found)]
        notes = _notes(results, group)
        if notes:
            lines += ["", *(f"* note: {note.splitlines()[0]}" for note in notes)]
    return "\n".join(lines) + "\n"


def _markdown_row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def write_json(results: dict[str, Any], path: Path) -> None:
    """Replaces the file as a whole, so that a run that is stopped leaves its last complete repetition."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(results, indent=1) + "\n")
    temporary.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(description="Renders RESULTS.md from a results file.")
    parser.add_argument("results", nargs="?", type=Path, default=DEFAULT_RESULTS)
    arguments = parser.parse_args()
    results = json.loads(arguments.results.read_text())
    target = arguments.results.with_name("RESULTS.md")
    target.write_text(markdown(results))
    print(f"wrote {target}")


if __name__ == "__main__":
    main()
