"""One picture of a run: what is how fast on disk, against raw I/O?

    python -m benchmarks.plot [FILE...] [--out PICTURE]

From the same files as `report`. Each panel is drawn if its trials are there:

1. Large workloads: throughput of saves and restores over that of raw I/O in the same run. Raw is the line at 1.
2. Many small leaves: seconds, on a logarithmic scale.
3. A training loop: what one save costs it, the call and the slower steps after it.

Needs matplotlib (``pip install 'jaxckpt[bench]'``).
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import ratios
from benchmarks.ratios import Group, Results, Study

DEFAULT_PICTURE = ratios.DEFAULT_RESULTS.with_suffix(".png")

WIDTH_INCHES = 8.0
DPI = 200  # 1600 pixels: sharp where it is shown at 800
BAR_INCHES = 0.145
GAP_INCHES = 0.16
HEADING_INCHES = 0.52
LEFT = 0.245
BAR_HEIGHT = 0.74  # of the room for one

OWN_COLOR = "#1a56b0"
OWN_LIGHT_COLOR = "#8fb3e6"
TEXT_COLOR = "#333333"
RAW_COLOR = "#333333"

# Opponents that get a bar, and its color.
BARS = {"tuned Orbax": "#e08a2e", "default Orbax": "#f0c48f", "other": "#b5b5b5"}
LABELS = {"tuned Orbax": "Orbax, tuned", "default Orbax": "Orbax, default", "other": "best other"}

OPERATIONS = {
    "save": "save, durable",
    "restore cold": "restore, cache cold",
    "restore warm": "restore, cache warm",
}

BIG = {
    "large": "16 leaves\nover 8 devices",
    "single": "one leaf",
    "gpt-float32": "GPT with Adam\n900 leaves",
    "reshard-8x1-1x8": "rows restored\nas columns",
}
SMALL = {"small": "leaves of 4 KiB", "tiny": "leaves of 256 B"}


class Bar(NamedTuple):
    """One bar and the words beside it."""

    label: str
    value: float
    text: str
    color: str
    light_value: float = 0.0


def import_matplotlib() -> Any:
    """Imports the package at use, with its figures that need no screen.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    try:
        import matplotlib.figure
    except ImportError as error:
        from jaxckpt import MissingDependencyError

        raise MissingDependencyError("pictures need matplotlib\npip install 'jaxckpt[bench]'") from error
    return matplotlib


# --- what is drawn ------------------------------------------------------------------------------------------


def group_on_disk(results: Results, workload: str) -> Group | None:
    for group in results.groups:
        if group.workload == workload and not group.is_in_memory:
            return group
    return None


def speed_bars(group: Group, operation: str) -> list[Bar]:
    """Throughput over that of raw I/O: jaxckpt, and the best of each kind."""
    bars = []
    for label, name, color in _contenders(group, operation):
        ratio = ratios.speed_ratio(group, "raw", operation, contender=name)
        if ratio is not None:
            text = f"{ratio.median:.2f}"
            if label == LABELS["other"]:
                text = f"{name} {text}"
            bars.append(Bar(label, ratio.median, text, color))
    return bars


def small_bars(group: Group, operation: str) -> list[Bar]:
    """Seconds: jaxckpt, the best Orbax, and what JAX's own copy and one file take."""
    bars = []
    opponents = {"Orbax": BARS["tuned Orbax"], "packed raw": RAW_COLOR}
    labels = {"Orbax": "best Orbax", "packed raw": "bare JAX, one file"}
    chosen = [("jaxckpt", ratios.OWN, OWN_COLOR)]
    for opponent, color in opponents.items():
        name = ratios.best(group, opponent, operation)
        if name is not None:
            chosen.append((labels[opponent], name, color))
    for label, name, color in chosen:
        found = ratios.values(group.trials, name, operation)
        if found:
            middle = statistics.median(found.values())
            bars.append(Bar(label, middle, _seconds(middle), color))
    return bars


def _contenders(group: Group, operation: str) -> list[tuple[str, str, str]]:
    chosen = [("jaxckpt", ratios.OWN, OWN_COLOR)]
    for opponent, color in BARS.items():
        name = ratios.best(group, opponent, operation)
        if name is not None:
            chosen.append((LABELS[opponent], name, color))
    return chosen


def _seconds(value: float) -> str:
    return f"{value * 1e3:.0f} ms" if value < 1 else f"{value:.1f} s"


def loop_study(results: Results) -> Study | None:
    """The first table of a training loop with what is blocked and slowed, on disk if there is one."""
    found = [
        study
        for study in results.studies
        if study["name"] == "loop" and {"blocked ms", "slowdown ms"} <= set(study["columns"])
    ]
    on_disk = [study for study in found if not study["storage"].endswith(ratios.MEMORY_STORAGE)]
    return (on_disk or found or [None])[0]


def loop_bars(study: Study) -> list[Bar]:
    bars = []
    for row in study["rows"]:
        name = row[study["columns"][0]]
        is_own = name.startswith(ratios.OWN)
        slowdown = max(0.0, row["slowdown ms"])  # below zero it is noise
        total = row["blocked ms"] + slowdown
        color = OWN_COLOR if is_own else BARS["tuned Orbax"]
        bars.append(
            Bar(
                name,
                row["blocked ms"],
                f"{total:.0f} ms" if total >= 10 else f"{total:.1f} ms",
                color,
                slowdown,
            )
        )
    return bars


# --- how it is drawn ----------------------------------------------------------------------------------------


def draw(results: Results, path: Path) -> None:
    """Writes the picture.

    Raises:
        MissingDependencyError: matplotlib is not installed.
        ValueError: there is nothing to draw.
    """
    matplotlib = import_matplotlib()
    big = {name: group for name in BIG if (group := group_on_disk(results, name))}
    small = {name: group for name in SMALL if (group := group_on_disk(results, name))}
    loop = loop_study(results)
    parts: list[tuple[float, Callable[[Any, float], None]]] = []  # inches; draws into as many
    if big:
        rows = [_columns(group, speed_bars) for group in big.values()]
        parts.append((_inches(rows), lambda part, inches: _draw_big(part, list(big), rows, inches)))
    if small:
        small_rows = [_columns(group, small_bars) for group in small.values()]
        parts.append(
            (_inches(small_rows), lambda part, inches: _draw_small(part, list(small), small_rows, inches))
        )
    if loop is not None:
        bars = loop_bars(loop)
        parts.append((_inches([[bars]]), lambda part, inches: _draw_loop(part, loop, bars, inches)))
    if not parts:
        raise ValueError("there is nothing to draw: no workload on disk and no training loop")
    heights = [inches for inches, _ in parts]
    with matplotlib.rc_context({"font.size": 7.5, "font.family": "DejaVu Sans", "text.color": TEXT_COLOR}):
        picture = matplotlib.figure.Figure(figsize=(WIDTH_INCHES, sum(heights)), dpi=DPI, facecolor="white")
        subfigures = picture.subfigures(len(parts), 1, height_ratios=heights, squeeze=False)[:, 0]
        for subfigure, (inches, draw_part) in zip(subfigures, parts, strict=True):
            draw_part(subfigure, inches)
        picture.savefig(path)


def _columns(group: Group, bars_of: Callable[[Group, str], list[Bar]]) -> list[list[Bar]]:
    return [bars_of(group, operation) for operation in OPERATIONS]


def _labels(row: Sequence[Sequence[Bar]]) -> list[str]:
    """The names of a row of panels: of all bars in any of them, from the top down."""
    return list(dict.fromkeys(bar.label for bars in row for bar in bars))


def _inches(rows: Sequence[Sequence[Sequence[Bar]]]) -> float:
    return HEADING_INCHES + sum(len(_labels(row)) * BAR_INCHES + GAP_INCHES for row in rows)


def _panels(
    part: Any, heading: str, words: str, rows: Sequence[Sequence[Sequence[Bar]]], inches: float
) -> Any:
    """Rows of panels under a heading, as wide and as high as their bars want."""
    top = 1 - HEADING_INCHES / inches
    part.text(0.01, 1 - 0.1 / inches, heading, ha="left", va="top", fontweight="bold", fontsize=9)
    part.text(0.99, 1 - 0.1 / inches, words, ha="right", va="top", fontsize=7.5)
    heights = [len(_labels(row)) for row in rows]
    axes = part.subplots(len(rows), len(rows[0]), squeeze=False, gridspec_kw={"height_ratios": heights})
    gap = GAP_INCHES / BAR_INCHES * len(rows) / sum(heights)
    part.subplots_adjust(left=LEFT, right=0.99, top=top, bottom=0.06 / inches, wspace=0.08, hspace=gap)
    return axes


def _draw_big(
    part: Any, names: Sequence[str], rows: Sequence[Sequence[Sequence[Bar]]], inches: float
) -> None:
    axes = _panels(
        part, "Throughput / raw I/O, on disk", "dashed: raw I/O, the best of several ways", rows, inches
    )
    for row_axes, name, row in zip(axes, names, rows, strict=True):
        labels = _labels(row)
        for axis, bars in zip(row_axes, row, strict=True):
            axis.axvline(1.0, color=RAW_COLOR, linewidth=0.8, linestyle=(0, (3, 2)), zorder=0)
            _draw_bars(axis, bars, labels, limit=1.25, room=26)
        _label_row(row_axes[0], BIG[name], labels)
    _title_columns(axes[0])


def _draw_small(
    part: Any, names: Sequence[str], rows: Sequence[Sequence[Sequence[Bar]]], inches: float
) -> None:
    axes = _panels(part, "Many small leaves, replicated on 8 devices", "seconds, logarithmic", rows, inches)
    every = [bar.value for row in rows for bars in row for bar in bars]
    for row_axes, name, row in zip(axes, names, rows, strict=True):
        labels = _labels(row)
        for axis, bars in zip(row_axes, row, strict=True):
            axis.set_xscale("log")
            _draw_bars(axis, bars, labels, limit=max(every) * 12, start=min(every) / 3)
        _label_row(row_axes[0], SMALL[name], labels)
    _title_columns(axes[0])


def _draw_loop(part: Any, study: Study, bars: Sequence[Bar], inches: float) -> None:
    words = "dark: the call; light: the slower steps after it"
    ((axis,),) = _panels(part, "What one save costs a training loop", words, [[bars]], inches)
    labels = _labels([bars])
    _draw_bars(axis, bars, labels, limit=1.15 * max(bar.value + bar.light_value for bar in bars))
    _label_row(axis, "", labels)
    axis.set_title(study["title"], fontsize=8, loc="left", pad=4)


def _title_columns(axes: Any) -> None:
    for axis, title in zip(axes, OPERATIONS.values(), strict=True):
        axis.set_title(title, fontsize=8, loc="left", pad=4)


def _draw_bars(
    axis: Any,
    bars: Sequence[Bar],
    labels: Sequence[str],
    limit: float,
    *,
    start: float = 0.0,
    room: float = 0.0,
) -> None:
    """Bars from the top down, each with its words.

    Args:
        axis: of the panel.
        bars: to be drawn.
        labels: the names of the panel's rows.
        limit: right end; a bar that would leave the panel is cut off there, and its number says how long it is.
        start: left end.
        room: characters that stand inside a bar of length 1; where a bar's words fit, they do.
    """
    for bar in bars:
        row = labels.index(bar.label)
        length = min(bar.value, limit)
        axis.barh(row, length - start, left=start, height=BAR_HEIGHT, color=bar.color)
        if bar.light_value:
            axis.barh(row, bar.light_value, left=bar.value, height=BAR_HEIGHT, color=bar.color, alpha=0.45)
        is_inside = len(bar.text) < length * room
        is_own = bar.color == OWN_COLOR
        axis.annotate(
            bar.text,
            (length + bar.light_value, row),
            xytext=(-3 if is_inside else 3, 0),
            textcoords="offset points",
            ha="right" if is_inside else "left",
            va="center_baseline",
            fontsize=7,
            color="white" if is_own and is_inside else TEXT_COLOR,
            fontweight="bold" if is_own else "normal",
        )
    axis.set_xlim(start, limit)
    axis.set_ylim(len(labels) - 0.4, -0.6)
    axis.set_xticks([])
    axis.set_yticks([])
    axis.minorticks_off()
    for side in axis.spines.values():
        side.set_visible(False)


def _label_row(axis: Any, title: str, labels: Sequence[str]) -> None:
    axis.set_yticks(range(len(labels)), labels, fontsize=7)
    axis.tick_params(axis="y", length=0, pad=2)
    axis.annotate(
        title,
        (0, 0.5),
        xycoords=("figure fraction", "axes fraction"),
        xytext=(5, 0),
        textcoords="offset points",
        va="center",
        fontweight="bold",
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plot", description="Draws the results.")
    parser.add_argument(
        "results", nargs="*", type=Path, metavar="FILE", help="results; default: of this folder"
    )
    parser.add_argument("--json", type=Path, action="append", default=[], metavar="FILE", help="the same")
    parser.add_argument("--out", type=Path, default=DEFAULT_PICTURE, metavar="PICTURE", help="PNG or SVG")
    arguments = parser.parse_args()
    paths = [*arguments.results, *arguments.json] or ratios.default_paths()
    draw(ratios.load(paths), arguments.out)
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
