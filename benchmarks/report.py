"""What a run found, for a reader: the figures and their targets, then every table.

    python -m benchmarks.report [FILE...]

writes RESULTS.md beside the first file. Without FILE it takes results.json and after it each results-NAME.json of this
folder, and also writes the tables between the two markers of README.md. Each file is a run; where two measured the same
workload on the same storage, or the same study, the later one counts.

remarks.json says why a figure misses its target and what was tried. A key is the figure's id, or the id and the
beginning of a place ("save-raw/single", "save-raw/single on /tmp"); the longest that fits counts. It is written by
hand, so that writing the report again keeps it.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import figures, ratios
from benchmarks.figures import Check, Figure
from benchmarks.ratios import Group, Ratio, Results, Run, Study, Trial

DEFAULT_RESULTS = ratios.DEFAULT_RESULTS
REMARKS = DEFAULT_RESULTS.with_name("remarks.json")
README = DEFAULT_RESULTS.parent.parent / "README.md"

README_START = "<!-- written by benchmarks.report -->"
README_END = "<!-- end -->"

GIGA = 1e9

# In a command: not the full size.
SMALL_SIZE = re.compile(r"--(quick|size)\b")

OPERATIONS = ("save", "restore cold", "restore warm")

# The kinds of opponents in the tables of ratios.
COMPARED = ("raw", "tuned Orbax", "default Orbax", "other")

# The rows of README's tables.
README_ROWS = {
    ("large", "save"): "16 leaves over 8 devices: save",
    ("large", "restore cold"): "16 leaves over 8 devices: restore, cold",
    ("large", "restore warm"): "16 leaves over 8 devices: restore, warm",
    ("single", "save"): "one leaf: save",
    ("single", "restore cold"): "one leaf: restore, cold",
    ("single", "restore warm"): "one leaf: restore, warm",
    ("gpt-float32", "save"): "GPT with Adam, 900 leaves: save",
    ("gpt-float32", "restore cold"): "GPT with Adam, 900 leaves: restore, cold",
    ("gpt-float32", "restore warm"): "GPT with Adam, 900 leaves: restore, warm",
    ("reshard-8x1-1x8", "restore cold"): "saved in rows, restored in columns, cold",
    ("reshard-8-1", "restore cold"): "saved on 8 devices, restored on one, cold",
    ("small", "save"): "10,000 leaves of 4 KiB, replicated on 8 devices: save",
    ("small", "restore cold"): "10,000 leaves of 4 KiB, replicated on 8 devices: restore, cold",
}
README_FIGURES = (
    "restore-mmap",
    "loop-blocked",
    "loop-1000",
    "memory-budget",
    "memory-save",
    "open",
    "open-orbax",
    "list",
    "list-orbax",
    "checksums",
)


class Metric(NamedTuple):
    """One column of a table of trials.

    Attributes:
        heading: of the column.
        operation: whose trials it is about.
        value: from a trial; smaller is better.
        unit: "s" for seconds, "x" for a multiple of the workload's bytes, "" for a count.
    """

    heading: str
    operation: str
    value: Callable[[Trial], float]
    unit: str


def _over_stored(field: str) -> Callable[[Trial], float]:
    return lambda trial: trial[field] / trial["stored_bytes"]


METRICS = (
    Metric("save s", "save", ratios.seconds, "s"),
    Metric("memory", "save", _over_stored("peak_extra_bytes"), "x"),
    Metric("written", "save", _over_stored("call_write_bytes"), "x"),
    Metric("files", "save", lambda trial: trial["file_count"], ""),
    Metric("cold restore s", "restore cold", ratios.seconds, "s"),
    Metric("from storage", "restore cold", _over_stored("storage_read_bytes"), "x"),
    Metric("warm restore s", "restore warm", ratios.seconds, "s"),
    Metric("memory", "restore warm", figures.peak_over_arrays, "x"),
    Metric("read calls", "restore warm", _over_stored("call_read_bytes"), "x"),
)

LEGEND = (
    "Seconds: median [min-max]; GB/s: distinct bytes per median second. memory: the most resident memory "
    "during the operation, less that before it, as a multiple of the distinct bytes (save) or of the bytes "
    "that all devices hold afterwards (restore; raw: distinct bytes). written, from storage, read calls: "
    "bytes given to write calls, fetched from the device, asked for by read calls, as a multiple of the "
    "distinct bytes; reads through a memory map are no calls."
)

RATIO_LEGEND = (
    "Ratios: how many times as fast as the other; median [min-max] of the ratios within each repetition. The "
    "other is the one of its kind with the best median for that operation: of the raw contenders, of Orbax "
    "tuned (no compression), of Orbax with its defaults, of all other libraries."
)

VERDICT_LEGEND = (
    "Measured: median [min-max] of the repetitions, or the number of a study. Bounds on memory hold for the "
    "worst trial, all others for the median. What misses its target is **bold**."
)


def groups(run: Run) -> list[Group]:
    """The groups of one run, for `plain_text`."""
    return ratios.groups(run)


# --- numbers ------------------------------------------------------------------------------------------------


def _number(value: float) -> str:
    if abs(value) >= 100:
        return f"{value:,.0f}"
    if abs(value) >= 10:
        return f"{value:.1f}"
    return f"{value:.2f}" if abs(value) >= 0.1 else f"{value:.3f}"


def _spread(values: Sequence[float]) -> str:
    """The median, and the range where it can be seen."""
    middle, low, high = map(_number, (statistics.median(values), min(values), max(values)))
    return middle if low == high else f"{middle} [{low}-{high}]"


# --- tables of trials ---------------------------------------------------------------------------------------


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
    present = {trial["operation"] for trial in group.trials}
    metrics = [metric for metric in METRICS if metric.operation in present]
    rows = [["contender", *(heading for metric in metrics for heading in _headings(metric)), "runs"]]
    for name in ratios.contender_names(group.trials):
        trials = [trial for trial in group.trials if trial["contender"] == name]
        cells = []
        for metric in metrics:
            found = ratios.values(trials, name, metric.operation, metric.value)
            cells += _cells(list(found.values()), metric, trials[0]["stored_bytes"])
        rows.append([name, *cells, str(len({trial["repetition"] for trial in trials}))])
    return rows


def comparison(group: Group) -> dict[str, dict[str, Ratio]]:
    """By operation, how many times as fast jaxckpt is as the best opponent of each kind."""
    found: dict[str, dict[str, Ratio]] = {}
    for operation in OPERATIONS:
        for opponent in COMPARED:
            ratio = ratios.speed_ratio(group, opponent, operation)
            if ratio is not None:
                found.setdefault(operation, {})[opponent] = ratio
    return found


def _comparison_table(group: Group) -> list[list[str]]:
    found = comparison(group)
    if not found:
        return []
    opponents = [name for name in COMPARED if any(name in by_kind for by_kind in found.values())]
    rows = [["times as fast as", *opponents]]
    for operation, by_kind in found.items():
        cells = ["-"] * len(opponents)
        for column, opponent in enumerate(opponents):
            if opponent in by_kind:
                ratio = by_kind[opponent]
                cells[column] = f"{_spread(ratio.values)} {ratio.other}"
        rows.append([operation, *cells])
    return rows


def _notes(run: Run, workload: str | None, storage: str | None) -> list[str]:
    """What is missing from a workload, and why; without one what is missing from the whole run."""
    return [
        f"{note['contender']}: {note['text'].splitlines()[0]}"
        for note in run["notes"]
        if note["workload"] == workload and (note["storage"] is None or note["storage"] == storage)
    ]


# --- tables of studies --------------------------------------------------------------------------------------


def study_table(study: Mapping[str, Any]) -> list[list[str]]:
    """The rows of a study's table, the header first."""
    columns = list(study["columns"])
    return [columns, *([_study_cell(row, column) for column in columns] for row in study["rows"])]


def _study_cell(row: Mapping[str, Any], column: str) -> str:
    value = row.get(column)
    if value is None:
        return "-"
    if isinstance(value, str | bool):
        return str(value)
    text = f"{value:,}" if isinstance(value, int) else _number(value)
    low, high = row.get(f"{column} min"), row.get(f"{column} max")
    return text if low is None or high is None or low == high else f"{text} [{_number(low)}-{_number(high)}]"


# --- for a terminal -----------------------------------------------------------------------------------------


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for first, *rest in rows:
        cells = [first.ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    return lines


def plain_text(results: Run, group: Group) -> str:
    """A group's table, ratios and notes for a terminal."""
    lines = [f"{group.workload} on {group.storage}: {group.description}", "", *_aligned(table(group))]
    rows = _comparison_table(group)
    if rows:
        lines += ["", *_aligned(rows)]
    for note in _notes(results, None, None) + _notes(results, group.workload, group.storage):
        lines.append(f"  note: {note}")
    return "\n".join(lines)


def study_text(study: Mapping[str, Any]) -> str:
    """A study's table, figures and notes for a terminal; takes the fields of a `StudyResult`."""
    place = f" on {study['storage']}" if study["storage"] else ""
    lines = [f"{study['name']}{place}: {study['title']}", "", *_aligned(study_table(study))]
    lines += ["", *(f"  {name}: {_number(value)}" for name, value in study["figures"].items())]
    lines += [f"  note: {note}" for note in study["notes"]]
    return "\n".join(lines)


# --- RESULTS.md ---------------------------------------------------------------------------------------------


def markdown(results: Results, remarks: Mapping[str, str]) -> str:
    """RESULTS.md: the figures, what was run and where, then a table for each group and each study."""
    lines = [
        "# Results",
        "",
        "Written by `python -m benchmarks.report` from runs of `python -m benchmarks.run`.",
    ]
    if any(SMALL_SIZE.search(run["meta"]["command"]) for run in results.runs):
        lines += ["", "**With small sizes (`--quick`), for which the targets are not meant.**"]
    lines += _figures_section(figures.check(results), remarks)
    lines += _runs_section(results)
    for group in results.groups:
        lines += ["", f"## {group.workload} on {group.storage}", "", f"{group.description}.", ""]
        lines += _markdown_table(table(group))
        rows = _comparison_table(group)
        if rows:
            lines += ["", *_markdown_table(rows)]
        notes = _notes(group.run, group.workload, group.storage)
        if notes:
            lines += ["", *(f"* {note}" for note in notes)]
    for study in results.studies:
        lines += _study_section(study)
    return "\n".join(lines) + "\n"


def _figures_section(checks: Sequence[Check], remarks: Mapping[str, str]) -> list[str]:
    measured = [check for check in checks if check.measured is not None]
    missed = [check for check in measured if not check.is_met]
    met_count = len(measured) - len(missed)
    rows = [["", "figure", "target", "on", "measured", "met"]]
    for figure in figures.FIGURES:
        rows += _figure_rows([check for check in measured if check.figure is figure])
    lines = [
        "",
        "## Figures",
        "",
        f"{met_count} of {len(measured)} measurements meet their target. {VERDICT_LEGEND}",
    ]
    lines += ["", *_markdown_table(rows, right=())]
    if missed:
        lines += ["", "Missed:", "", *_reasons(missed, remarks)]
    absent: dict[str, list[str]] = {}
    for check in checks:
        if check.measured is None:
            absent.setdefault(f"{check.figure.topic}: {check.figure.sentence}", []).append(check.place)
    if absent:
        lines += [
            "",
            "Not measured:",
            "",
            *(f"* {name} ({', '.join(places)})" for name, places in absent.items()),
        ]
    return lines


def _figure_rows(checks: Sequence[Check]) -> list[list[str]]:
    """A row for each storage that one figure was measured on."""
    by_storage: dict[str, list[Check]] = {}
    for check in checks:
        by_storage.setdefault(check.measurement.storage, []).append(check)
    rows = []
    for storage, found in by_storage.items():
        figure = found[0].figure
        met_count = sum(check.is_met for check in found)
        verdict = "yes" if met_count == len(found) else f"{met_count} of {len(found)}"
        cells = "<br>".join(_check_cell(check) for check in found)
        rows.append([figure.topic, figure.sentence, _target_text(figure), storage, cells, verdict])
    return rows


def _target_text(figure: Figure) -> str:
    text = f"{figure.relation} {figure.target:g}"
    return " ".join(part for part in (text, figure.unit, figure.condition) if part)


def _check_cell(check: Check) -> str:
    text = _spread(check.measurement.values)
    if check.figure.unit not in ("", "x"):
        text += f" {check.figure.unit}"
    if not check.is_met:
        text = f"**{text}**"
    return f"{check.measurement.subject} {text}".strip()


def _reasons(missed: Iterable[Check], remarks: Mapping[str, str]) -> list[str]:
    """What is said about each miss; misses of one figure with the same remark stand together."""
    places: dict[tuple[str, str], list[str]] = {}
    for check in missed:
        figure = check.figure
        assert check.measured is not None
        text = f"{check.place} {check.measured:.3g}, not {figure.relation} {check.target:g}"
        places.setdefault((f"{figure.topic}: {figure.sentence}", _remark(check, remarks)), []).append(text)
    return [f"* {name} ({'; '.join(found)}): {remark}" for (name, remark), found in places.items()]


def _remark(check: Check, remarks: Mapping[str, str]) -> str:
    named = f"{check.figure.id}/{check.place}"
    fitting = [
        key for key in remarks if key in (check.figure.id, named) or named.startswith((f"{key} ", f"{key},"))
    ]
    return remarks[max(fitting, key=len)] if fitting else "No reason is known yet."


def _runs_section(results: Results) -> list[str]:
    lines = ["", "## Runs"]
    durability: dict[str, str] = {}
    holds: dict[str, str] = {}
    for run in results.runs:
        meta = run["meta"]
        durability |= meta["durability"]
        holds |= meta.get("holds", {})
        versions = ", ".join(f"{name} {version}" for name, version in meta["versions"].items())
        lines += [
            "",
            f"* commit: {meta['commit']}, {meta['date']}",
            f"* command: `{meta['command']}`",
            f"* machine: {meta['machine']}",
            f"* device: {meta['device']}",
            f"* versions: {versions}",
            *(f"* {note}" for note in _notes(run, None, None) + _notes_without_table(run)),
        ]
    rows = [["contender", "its arrays are on", "durable when `save` returns"]]
    rows += [[name, holds.get(name, "-"), text] for name, text in durability.items()]
    return [*lines, "", LEGEND, "", RATIO_LEGEND, "", *_markdown_table(rows, right=())]


def _notes_without_table(run: Run) -> list[str]:
    """About workloads and studies of which nothing was measured at all, or not on that storage."""
    places = {(trial["workload"], storage) for trial in run["trials"] for storage in (None, trial["storage"])}
    return [
        f"{note['workload']}: {note['text'].splitlines()[0]}"
        for note in run["notes"]
        if note["workload"] is not None and (note["workload"], note["storage"]) not in places
    ]


def _study_section(study: Study) -> list[str]:
    place = f" on {study['storage']}" if study["storage"] else ""
    lines = [
        "",
        f"## {study['name']}{place}",
        "",
        f"{study['title']}.",
        "",
        *_markdown_table(study_table(study)),
    ]
    if study["figures"]:
        lines += ["", *(f"* {name}: {_number(value)}" for name, value in study["figures"].items())]
    if study["notes"]:
        lines += ["", *(f"* {note}" for note in study["notes"])]
    return lines


def _markdown_table(rows: Sequence[Sequence[str]], right: Iterable[int] | None = None) -> list[str]:
    """Right: the columns of numbers; all but the first if not given."""
    header, *body = rows
    chosen = range(1, len(header)) if right is None else set(right)
    rule = ["--:" if column in chosen else "---" for column in range(len(header))]
    return ["| " + " | ".join(cells) + " |" for cells in (header, rule, *body)]


# --- README.md ----------------------------------------------------------------------------------------------


def readme_lines(results: Results) -> list[str]:
    """The main ratios on disk, and the main figures of the studies."""
    opponents = {
        "raw": "raw I/O",
        "tuned Orbax": "tuned Orbax",
        "default Orbax": "Orbax by default",
        "other": "other libraries",
    }
    rows = [["on disk", "jaxckpt", *(f"vs {heading}" for heading in opponents.values())]]
    for (workload, operation), label in README_ROWS.items():
        for group in results.groups:
            own = ratios.values(group.trials, ratios.OWN, operation)
            if group.workload != workload or group.is_in_memory or not own:
                continue
            found = [ratios.speed_ratio(group, opponent, operation) for opponent in opponents]
            cells = [f"{_number(ratio.median)} x" if ratio else "-" for ratio in found]
            rows.append([label, f"{_number(statistics.median(own.values()))} s", *cells])
    lines = _markdown_table(rows) if len(rows) > 1 else []
    rows = [["on disk", "measured", "target"]]
    checks = [
        check
        for check in figures.check(results)
        if check.measured is not None and not check.measurement.storage.endswith(ratios.MEMORY_STORAGE)
    ]
    for figure_id in README_FIGURES:
        for _, sentence, target, _, cells, _ in _figure_rows(
            [each for each in checks if each.figure.id == figure_id]
        ):
            rows.append([sentence, cells, target])
    if len(rows) > 1:
        lines += ["", *_markdown_table(rows, right=())]
    return lines


def write_readme(results: Results, path: Path) -> None:
    """Replaces what stands between the two markers.

    Raises:
        ValueError: the markers are not there.
    """
    before, start, rest = path.read_text().partition(README_START)
    _, end, after = rest.partition(README_END)
    if not end:
        raise ValueError(f"{path} has no lines {README_START} and {README_END}")
    path.write_text("\n".join([before + start, "", *readme_lines(results), "", end + after]))


# --- files --------------------------------------------------------------------------------------------------


def write_json(results: Run, path: Path) -> None:
    """Replaces the file as a whole, so that a run that is stopped leaves its last complete repetition.

    Each trial, note and study has one line.
    """
    parts = [f'"meta": {json.dumps(results["meta"], indent=1)}']
    for name, value in results.items():
        if name != "meta":
            parts.append(f'"{name}": [\n' + ",\n".join(json.dumps(record) for record in value) + "\n]")
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text("{\n" + ",\n".join(parts) + "\n}\n")
    temporary.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description="Writes RESULTS.md.")
    parser.add_argument(
        "results", nargs="*", type=Path, metavar="FILE", help="results; default: of this folder"
    )
    arguments = parser.parse_args()
    paths = arguments.results or ratios.default_paths()
    results = ratios.load(paths)
    target = paths[0].with_name("RESULTS.md")
    target.write_text(markdown(results, read_remarks()))
    print(f"wrote {target}")
    if not arguments.results:
        write_readme(results, README)
        print(f"wrote {README}")


def read_remarks() -> dict[str, str]:
    return json.loads(REMARKS.read_text())


if __name__ == "__main__":
    main()
