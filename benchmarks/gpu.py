"""Everything that there is to know about saving and restoring on this machine's accelerators, in one command.

    python -m benchmarks.gpu [--state-gib G] [--saves N] [--dir D] [--minutes M] [--json FILE] [--only NAME ...]

It takes all local devices, one H100 as well as eight, and ends with a table of figures, their targets, and whether they
are met. Each part runs in a process of its own (`gpu_parts`), which no other part's memory or failure disturbs:

    transfers   bytes per second between devices and host memory, pinned and pageable, and within the devices
    isolation   steps that donate the state do not disturb a save, in any staging mode; they do disturb naive copies
    growth      memory of the process over many saves, whose pinned pool never shrinks
    jaxckpt     a training loop that donates its state and saves it now and then, in turns with each staging mode
    orbax       the same loop with Orbax, tuned and as it comes
    restore     the last checkpoints of both, cold and warm, to the devices; the first step then donates all of it

Where a loop saves, it counts for each save: how long the call blocked; the step right after it, which waits on the
device until the snapshot no longer needs what it donates; and all steps until the save is durable. What these took
beyond so many quiet steps was stolen from training. The first save of each mode warms up and is not counted.

The same command runs on CPU devices (`JAX_PLATFORMS=cpu`) with a small state, which tests it and measures nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import measure

REPOSITORY = Path(__file__).resolve().parent.parent
MIB = 1 << 20
GIB = 1 << 30

STAGINGS = ("auto", "device", "pinned", "pool")
ORBAX = ("orbax-v0 async tuned", "orbax-v0 async")
RESTORED = ("jaxckpt auto", ORBAX[0])

# The share of the time that each part may take; "restore" runs once for each of `RESTORED`.
SHARES = {
    "transfers": 0.08,
    "isolation": 0.08,
    "growth": 0.12,
    "jaxckpt": 0.32,
    "orbax": 0.24,
    "restore": 0.08,
}

# Seconds that a part may take beyond its share before it is ended.
GRACE_S = 60

# The default state: large enough for full speed, small enough for a disk of 64 GiB and eight minutes.
STATE_BYTES_MAX = 12 * GIB

# Lines of a failed part's error output that are kept.
ERROR_LINES_MAX = 20


@dataclasses.dataclass(frozen=True)
class Settings:
    """What every part is told.

    Attributes:
        state_bytes: size of the state on all devices together.
        saves: most saves of a loop in each mode, with the one that warms up.
        growth_saves: saves of the part "growth".
        directory: where to save.
        seconds: what the part should not exceed; loops then save less often.
    """

    state_bytes: int
    saves: int
    growth_saves: int
    directory: str
    seconds: float


# --- the parts -----------------------------------------------------------------------------------------------


class PartError(Exception):
    """A part failed or took too long."""


def run_part(part: str, settings: Settings, *arguments: Any) -> dict[str, Any]:
    """Runs a part in a fresh process.

    Raises:
        PartError: see there.
    """
    with tempfile.TemporaryDirectory(prefix="jaxckpt-gpu-answer-") as folder:
        answer = Path(folder, "answer.json")
        call = json.dumps([dataclasses.asdict(settings), arguments])
        try:
            done = subprocess.run(
                [sys.executable, "-m", "benchmarks.gpu_parts", part, call, str(answer)],
                cwd=REPOSITORY,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=settings.seconds + GRACE_S,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise PartError(f"not done after {settings.seconds + GRACE_S:.0f} s") from error
        if done.returncode != 0 or not answer.exists():
            lines = done.stderr.strip().splitlines()[-ERROR_LINES_MAX:]
            raise PartError("\n".join([f"exit code {done.returncode}", *lines]))
        return json.loads(answer.read_text())


def default_state_bytes(machine: dict[str, Any], directory: Path) -> int:
    """What the devices have room for with a copy, the disk four times, and host memory four times."""
    disk = os.statvfs(directory)
    limits = [STATE_BYTES_MAX, disk.f_bavail * disk.f_frsize // 4, measure.available_memory_bytes() // 4]
    if machine["device_bytes"]:
        limits.append(machine["device_bytes"] * machine["devices"] * 3 // 10)
    else:
        limits.append(GIB // 2)  # CPU devices: this is no measurement
    return min(limits)


def run_parts(names: Sequence[str], settings: Settings, seconds: float) -> tuple[dict[str, Any], list[str]]:
    """What each part found, and notes on those that failed."""
    parts: dict[str, Any] = {}
    notes: list[str] = []

    def attempt(name: str, *arguments: Any) -> dict[str, Any] | None:
        began_s = time.perf_counter()
        title = " ".join([name, *map(str, arguments)])
        try:
            found = run_part(name, dataclasses.replace(settings, seconds=SHARES[name] * seconds), *arguments)
            notes.extend(found.pop("notes", []))
        except PartError as error:
            found = None
            notes.append(f"{title}: {error}")
        print(f"{title}: {time.perf_counter() - began_s:.0f} s", flush=True)
        return found

    for name in names:
        if name != "restore":
            found = attempt(name)
            if found is not None:
                parts[name] = found
            continue
        last = {**parts.get("jaxckpt", {}).get("last", {}), **parts.get("orbax", {}).get("last", {})}
        restores = {saver: attempt(name, saver, last[saver]) for saver in RESTORED if saver in last}
        parts[name] = {saver: found for saver, found in restores.items() if found is not None}
    return parts, notes


# --- figures -------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Figure:
    """A line of the last table.

    Attributes:
        name: what it is.
        target: what is wanted, in words; "" if nothing is.
        measured: in words.
        is_met: None where nothing can be said.
    """

    name: str
    target: str
    measured: str
    is_met: bool | None


def judge(parts: dict[str, Any], *, is_accelerator: bool) -> list[Figure]:
    """All figures that the parts have brought. What takes how long on CPU devices says nothing."""
    speeds = [*_judge_loops(parts), *_judge_restores(parts)]
    if not is_accelerator:
        speeds = [dataclasses.replace(figure, is_met=None) for figure in speeds]
    return [*speeds, *_judge_values(parts, is_accelerator=is_accelerator), *_judge_growth(parts)]


def _judge_loops(parts: dict[str, Any]) -> Iterator[Figure]:
    if "jaxckpt" not in parts:
        return
    state_bytes = parts["jaxckpt"]["state_bytes"]
    rows = {way: parts["jaxckpt"]["rows"][f"jaxckpt {way}"] for way in STAGINGS}
    theirs = parts.get("orbax", {}).get("rows", {}).values()
    for way in ("auto", "device"):
        blocked_s = rows[way]["blocked_s"]
        is_met = blocked_s <= 0.020 * max(state_bytes / (10 * GIB), 1)
        yield Figure(f"{way}: save_async blocks", "<= 20 ms for 10 GiB", _milliseconds(blocked_s), is_met)
    for way in ("auto", "device", "pinned"):
        row = rows[way]
        if theirs:
            share = row["blocked_s"] / min(other["blocked_s"] for other in theirs)
            yield Figure(f"{way}: blocked, of Orbax's least", "<= 5 %", f"{share:.1%}", share <= 0.05)
        inflation = row["inflation"]
        yield Figure(
            f"{way}: steps while it is written", "<= 3 % longer", f"{inflation:+.1%}", inflation <= 0.03
        )
    if "transfers" in parts:
        rate = state_bytes / rows["pinned"]["snapshot_s"]
        ceiling = best_rate(parts, "device to pinned")
        yield Figure(
            "D2H of a snapshot", ">= 0.8 of the pinned ceiling", _share(rate, ceiling), rate >= 0.8 * ceiling
        )
    best = min(STAGINGS, key=lambda way: rows[way]["stolen_s"])
    stolen_s = rows["auto"]["stolen_s"]
    words = f"{_milliseconds(stolen_s)}; {best} {_milliseconds(rows[best]['stolen_s'])}"
    is_met = stolen_s <= 1.1 * rows[best]["stolen_s"] + 1e-3
    yield Figure("auto: stolen from training", "the least of all modes", words, is_met)
    if theirs:
        words = f"{_milliseconds(stolen_s)}; {_milliseconds(min(other['stolen_s'] for other in theirs))}"
        yield Figure("auto: stolen; Orbax's least", "", words, None)


def _judge_restores(parts: dict[str, Any]) -> Iterator[Figure]:
    ours = parts.get("restore", {}).get(RESTORED[0])
    theirs = parts.get("restore", {}).get(RESTORED[1])
    if ours is None:
        return
    state_bytes = parts["jaxckpt"]["state_bytes"]
    if "transfers" in parts:
        bus = best_rate(parts, "pinned to device")
        rate, limit = state_bytes / ours["cold_s"], min(bus, ours["disk_bytes_per_s"])
        yield Figure("restore, cold", ">= 0.8 of min(disk, H2D)", _share(rate, limit), rate >= 0.8 * limit)
        yield Figure("restore, warm, of H2D", "", _share(state_bytes / ours["warm_s"], bus), None)
    if theirs is not None:
        for kind in ("cold", "warm"):
            ratio = theirs[f"{kind}_s"] / ours[f"{kind}_s"]
            yield Figure(f"restore, {kind}, against Orbax", ">= 2 x", f"{ratio:.2f} x", ratio >= 2)


def _judge_values(parts: dict[str, Any], *, is_accelerator: bool) -> Iterator[Figure]:
    for name, found in parts.get("restore", {}).items():
        wrong = found["different_leaves"]
        yield Figure(f"{name}: restored bit for bit", "all leaves", f"{wrong} differ", wrong == 0)
        if name == RESTORED[0]:
            words = f"{found['donated']:.0%} donated, {found['in_place']:.0%} in place"
            # What a restore makes on CPU devices is memory that came from outside, which XLA does not write to.
            is_met = found["donated"] == 1 if is_accelerator else None
            yield Figure("first step after a restore", "donates 100 %", words, is_met)
    if "isolation" not in parts:
        return
    found = parts["isolation"]
    wrong = sum(found["changed"].values())
    words = f"{wrong} of {found['checked']} leaves changed"
    yield Figure("donating steps change a checkpoint", "never", words, wrong == 0)
    for name, is_lost in found["controls"].items():
        is_wanted = "may_alias" not in name  # it is a copy on some backends
        words = "lost" if is_lost else "kept"
        yield Figure(
            f"control: {name}", "loses the value" if is_wanted else "", words, is_lost if is_wanted else None
        )


def _judge_growth(parts: dict[str, Any]) -> Iterator[Figure]:
    for way, found in parts.get("growth", {}).items():
        name = f"{way}: memory over {found['saves']} saves"
        grown = max(found["last"][kind] - found["first"][kind] for kind in ("resident", "pinned"))
        words = f"{grown / MIB:+.0f} MiB"
        yield Figure(f"{name}, host", "<= 64 MiB more than after a tenth", words, grown <= 64 * MIB)
        grown = found["last"]["device"] - found["first"]["device"]
        yield Figure(f"{name}, device", "no more", f"{grown / MIB:+.0f} MiB", grown <= MIB)


def best_rate(parts: dict[str, Any], name: str) -> float:
    """The rate of the transfers of the best size."""
    return max(parts["transfers"][name].values())


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms"


def _share(rate: float, ceiling: float) -> str:
    return f"{rate / GIB:.2f} of {ceiling / GIB:.2f} GiB/s, {rate / ceiling:.2f}"


# --- tables --------------------------------------------------------------------------------------------------

Table = list[list[str]]

LOOP_COLUMNS = {
    "step ms": "quiet_step_s",
    "blocked ms": "blocked_s",
    "first step + ms": "first_step_extra_s",
    "stolen ms": "stolen_s",
    "durable ms": "durable_s",
}


def tables_of(parts: dict[str, Any], figures: Sequence[Figure]) -> dict[str, Table]:
    """All tables by their titles."""
    tables: dict[str, Table] = {}
    if "transfers" in parts:
        sizes = list(next(iter(parts["transfers"].values())))
        tables["GiB/s of all devices together, so much of each at a time"] = [
            ["", *sizes],
            *(
                [name, *(f"{rates[size] / GIB:.2f}" for size in sizes)]
                for name, rates in parts["transfers"].items()
            ),
        ]
    loops = {**parts.get("jaxckpt", {}).get("rows", {}), **parts.get("orbax", {}).get("rows", {})}
    if loops:
        tables["A training loop that saves, medians"] = [
            ["", "saves", *LOOP_COLUMNS, "steps"],
            *(
                [name, f"{row['saves']}"]
                + [f"{row[column] * 1e3:.1f}" for column in LOOP_COLUMNS.values()]
                + [f"{row['inflation']:+.1%}"]
                for name, row in loops.items()
            ),
        ]
    if parts.get("restore"):
        tables["Restores in a fresh process"] = [
            ["", "cold s", "warm s", "disk GiB/s"],
            *(
                [name, f"{row['cold_s']:.3f}", f"{row['warm_s']:.3f}", f"{row['disk_bytes_per_s'] / GIB:.2f}"]
                for name, row in parts["restore"].items()
            ),
        ]
    words = {True: "yes", False: "NO", None: "-"}
    tables["Figures"] = [
        ["figure", "target", "measured", "met"],
        *([each.name, each.target, each.measured, words[each.is_met]] for each in figures),
    ]
    return tables


def print_table(title: str, rows: Table) -> None:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    print(f"\n{title}\n")
    for row in rows:
        print("  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


# --- the command ---------------------------------------------------------------------------------------------


def run(arguments: argparse.Namespace, directory: Path) -> dict[str, Any]:
    """Runs the parts that are asked for, and prints what they found."""
    began_s = time.perf_counter()
    seconds = arguments.minutes * 60.0
    settings = Settings(0, arguments.saves, arguments.growth_saves, str(directory), seconds)
    machine = run_part("machine", settings)
    state_bytes = default_state_bytes(machine, directory)
    if arguments.state_gib is not None:
        state_bytes = int(arguments.state_gib * GIB)
    settings = dataclasses.replace(settings, state_bytes=state_bytes)
    is_accelerator = machine["backend"] != "cpu"
    storage = f"{directory.parent} ({measure.file_system(directory)})"
    print(f"{machine['devices']} x {machine['device']}; {machine['versions']}")
    print(f"a state of {state_bytes / GIB:.2f} GiB, saved to {storage}", flush=True)
    if not is_accelerator:
        print("these are CPU devices: the command is tested, nothing is measured")
    parts, notes = run_parts(arguments.only or list(SHARES), settings, seconds)
    figures = judge(parts, is_accelerator=is_accelerator)
    for title, table in tables_of(parts, figures).items():
        print_table(title, table)
    for note in notes:
        print(f"\nnote: {note}")
    took_s = time.perf_counter() - began_s
    print(f"\n{machine['devices']} x {machine['device']}, {took_s:.0f} s")
    return {
        "meta": machine | {"state_bytes": state_bytes, "storage": storage, "seconds": took_s},
        "notes": notes,
        "parts": parts,
        "figures": [dataclasses.asdict(figure) for figure in figures],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--state-gib", type=float, help="size of the state (default: what fits, at most 12)")
    parser.add_argument(
        "--saves", type=int, default=5, help="most saves in each mode; the first is not counted"
    )
    parser.add_argument("--growth-saves", type=int, default=50, help="saves of the part growth")
    parser.add_argument("--dir", type=Path, help="where to save (default: a temporary directory)")
    parser.add_argument("--minutes", type=float, default=7.0, help="about how long it may take")
    parser.add_argument("--json", type=Path, help="also write everything to this file")
    parser.add_argument("--only", choices=SHARES, nargs="+", help="only these parts; restore needs jaxckpt")
    arguments = parser.parse_args()
    directory = Path(tempfile.mkdtemp(prefix="jaxckpt-gpu-", dir=arguments.dir))
    try:
        results = run(arguments, directory)
    finally:
        shutil.rmtree(directory)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
