"""The benchmark command: all contenders do the same work, in turns, in one run.

    python -m benchmarks.run [--quick] [--only NAME] [--contender NAME] [--dir DIR] [--repeat N] [--json FILE]

For each workload and storage directory, for each repetition, for each contender in a new random order: save;
restore with files that are not in the page cache; restore with files that are; remove the files. Each save
and each restore is a process of its own (`trial`), and nothing runs beside it.

Exit code 1 says that a trial failed or restored other bytes than were saved.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime as dt
import importlib.metadata
import os
import platform
import random
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks import contenders, measure, report, trial, workloads
from benchmarks.contenders import Contender, UnsupportedHereError
from benchmarks.trial import Request, TrialError
from benchmarks.workloads import Workload

MEMORY_DIRECTORY = Path("/dev/shm")

DEFAULT_REPEAT = 5
DEFAULT_REPEAT_QUICK = 3

# The slowest trial known takes 40 s on two cores: ten times that is a hang.
DEFAULT_TIMEOUT_S = 400

# A checkpoint may hold some more than the arrays.
STORAGE_MARGIN = 1.2

# A save holds the tree; a restore makes it, Orbax up to 0.75 times as much besides; comparing makes a leaf.
MEMORY_MARGIN = 3.0

PACKAGES = ("jaxckpt", "jax", "jaxlib", "numpy", "tensorstore", "orbax-checkpoint")


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the command line says about every trial."""

    quick: bool
    repeat: int
    timeout_s: int
    json_path: Path


@dataclasses.dataclass(frozen=True)
class Turn:
    """One contender's turn: a save and its restores."""

    workload: Workload
    storage: str
    contender: Contender
    repetition: int


def main() -> None:
    arguments = _parse_arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # an exception, so that scratch files are removed
    chosen_workloads = _choose_workloads(arguments)
    chosen_contenders = _choose_contenders(arguments)
    directories = arguments.dir or _default_directories()
    repeat = arguments.repeat or (DEFAULT_REPEAT_QUICK if arguments.quick else DEFAULT_REPEAT)
    settings = Settings(arguments.quick, repeat, arguments.timeout, arguments.json)

    results: dict[str, Any] = {"meta": {}, "notes": [], "trials": []}
    results["meta"] = _describe_run(chosen_workloads, chosen_contenders, directories[0], settings.timeout_s)
    present = []
    for contender in chosen_contenders:
        reason = contenders.absence(contender)
        if reason is None:
            present.append(contender)
        else:
            _note(results, None, None, contender.name, f"left out: {reason}")

    print(textwrap.fill(report.LEGEND, 110))
    print(textwrap.fill(report.RATIO_LEGEND, 110))
    failures = 0
    for workload in chosen_workloads:
        for directory in directories:
            failures += _run_group(results, workload, directory, present, settings)
    print(f"\nwrote {settings.json_path}")
    if failures:
        print(f"{failures} trials failed; see the notes")
        sys.exit(1)


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a sixteenth of the bytes")
    parser.add_argument("--only", action="append", metavar="NAME", help="this workload; may be repeated")
    parser.add_argument(
        "--contender",
        action="append",
        metavar="NAME",
        help="contenders whose name starts with NAME; may be repeated",
    )
    parser.add_argument(
        "--dir",
        action="append",
        type=Path,
        metavar="DIR",
        help="storage directory; may be repeated; default: /dev/shm and the directory for temporary files",
    )
    parser.add_argument(
        "--repeat", type=_positive, metavar="N", help="repetitions; default: 5, with --quick 3"
    )
    parser.add_argument("--json", type=Path, default=report.DEFAULT_RESULTS, metavar="FILE", help="results")
    parser.add_argument(
        "--timeout", type=_positive, default=DEFAULT_TIMEOUT_S, metavar="SECONDS", help="limit for one trial"
    )
    return parser.parse_args()


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


def _choose_workloads(arguments: argparse.Namespace) -> list[Workload]:
    known = workloads.all_workloads(quick=arguments.quick)
    if not arguments.only:
        return list(known)
    unknown = set(arguments.only) - {workload.name for workload in known}
    if unknown:
        names = ", ".join(workload.name for workload in known)
        sys.exit(f"no workload {', '.join(sorted(unknown))}; there are {names}")
    return [workload for workload in known if workload.name in arguments.only]


def _choose_contenders(arguments: argparse.Namespace) -> list[Contender]:
    if not arguments.contender:
        return list(contenders.ALL_CONTENDERS)
    prefixes = tuple(arguments.contender)
    chosen = [contender for contender in contenders.ALL_CONTENDERS if contender.name.startswith(prefixes)]
    if not chosen:
        names = ", ".join(contender.name for contender in contenders.ALL_CONTENDERS)
        sys.exit(f"no contender starts with {', '.join(prefixes)}; there are {names}")
    return chosen


def _default_directories() -> list[Path]:
    """/dev/shm, and the directory for temporary files unless that is the same file system."""
    temporary = Path(tempfile.gettempdir())
    if not MEMORY_DIRECTORY.is_dir():
        return [temporary]
    if MEMORY_DIRECTORY.stat().st_dev == temporary.stat().st_dev:
        return [MEMORY_DIRECTORY]
    return [MEMORY_DIRECTORY, temporary]


def _describe_run(
    chosen_workloads: Iterable[Workload],
    chosen_contenders: Iterable[Contender],
    directory: Path,
    timeout_s: float,
) -> dict[str, Any]:
    with _scratch_directory(directory) as scratch:
        probe = trial.probe_environment(scratch / "answer.json", timeout_s)
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "machine": f"{_cpu_name()}, {os.cpu_count()} cores, {memory_gib:.0f} GiB, Linux {platform.release()}",
        "device": f"{probe['device']} ({probe['platform']} backend)",
        "versions": {"python": probe["python"]} | _versions(),
        "commit": _commit(),
        "command": shlex.join(["python", "-m", "benchmarks.run", *sys.argv[1:]]),
        "date": dt.datetime.now(dt.UTC).strftime("%Y-%m-%d"),
        "workloads": {workload.name: workload.describe() for workload in chosen_workloads},
        "durability": {contender.name: contender.durability for contender in chosen_contenders},
    }


def _cpu_name() -> str:
    with open("/proc/cpuinfo") as lines:
        for line in lines:
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return platform.machine()


def _versions() -> dict[str, str]:
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _commit() -> str:
    """The commit that is measured; `+` says that files differ from it."""
    commit = _git("rev-parse", "--short", "HEAD")
    if not commit:
        return "unknown"
    return commit + ("+" if _git("status", "--porcelain", "--untracked-files=no") else "")


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=trial.REPOSITORY, capture_output=True, text=True, timeout=30, check=False
        )
    except OSError:  # no git
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


@contextmanager
def _scratch_directory(directory: Path) -> Iterator[Path]:
    """A new directory below `directory`, removed at the end, whatever happens."""
    scratch = Path(tempfile.mkdtemp(prefix="jaxckpt-benchmark-", dir=directory))
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _note(
    results: dict[str, Any], workload: str | None, storage: str | None, contender: str, text: str
) -> None:
    """Keeps, once, why figures are missing. None: for all workloads, or for all storage directories."""
    note = {"workload": workload, "storage": storage, "contender": contender, "text": text}
    if note not in results["notes"]:
        results["notes"].append(note)


def _run_group(
    results: dict[str, Any], workload: Workload, directory: Path, present: list[Contender], settings: Settings
) -> int:
    """Runs all repetitions of a workload on a directory and prints their table.

    Returns:
        The number of trials that failed.
    """
    storage = f"{directory} ({measure.file_system(directory)})"
    reason = _room_problem(workload, directory)
    if reason is not None:
        print(f"\n{workload.name} on {storage} left out: {reason}")
        _note(results, workload.name, storage, "all", f"left out: {reason}")
        return 0
    failures = 0
    given_up: set[str] = set()
    for repetition in range(settings.repeat):
        order = list(present)
        random.Random(repetition).shuffle(order)  # neighbours in time differ from one repetition to the next
        start = time.monotonic()
        for contender in order:
            if contender.name in given_up or repetition >= _repeat_max(contender, workload, settings.repeat):
                continue
            turn = Turn(workload, storage, contender, repetition)
            try:
                with _scratch_directory(directory) as scratch:
                    for record in _run_turn(turn, scratch, settings):
                        results["trials"].append(record)
            except UnsupportedHereError as error:
                given_up.add(contender.name)
                _note(results, workload.name, storage, contender.name, f"left out: {error}")
            except TrialError as error:
                given_up.add(contender.name)
                failures += 1
                print(f"{workload.name} on {storage}: {contender.name} failed: {error}", file=sys.stderr)
                _note(results, workload.name, storage, contender.name, f"failed: {error}")
        report.write_json(results, settings.json_path)
        seconds = time.monotonic() - start
        progress = f"{repetition + 1}/{settings.repeat}"
        print(f"{workload.name} on {storage}: repetition {progress}, {seconds:.0f} s", file=sys.stderr)
    for group in report.groups(results):
        if group.workload == workload.name and group.storage == storage:
            print("\n" + report.plain_text(results, group), flush=True)
    return failures


def _room_problem(workload: Workload, directory: Path) -> str | None:
    wanted_bytes = workload.stored_bytes * STORAGE_MARGIN
    memory_bytes = workload.device_bytes * MEMORY_MARGIN
    if measure.is_in_memory(directory):
        wanted_bytes += memory_bytes
    elif measure.available_memory_bytes() < memory_bytes:
        return f"{memory_bytes / 2**30:.1f} GiB of free memory are wanted"
    return measure.room_problem(directory, int(wanted_bytes))


def _repeat_max(contender: Contender, workload: Workload, repeat: int) -> int:
    if contender.is_slow_with_many_leaves and workload.slow_repeat_max is not None:
        return min(repeat, workload.slow_repeat_max)
    return repeat


def _run_turn(turn: Turn, scratch: Path, settings: Settings) -> Iterator[dict[str, Any]]:
    """Saves, restores cold, restores warm; yields what each trial answers with what it was about."""
    path = scratch / "checkpoint"
    yield _run_trial(turn, "save", path, settings)
    if not measure.is_in_memory(scratch):
        measure.evict(path)
        yield _run_trial(turn, "restore cold", path, settings)
    measure.warm(path)
    yield _run_trial(turn, "restore warm", path, settings)


def _run_trial(turn: Turn, operation: str, path: Path, settings: Settings) -> dict[str, Any]:
    request = Request(
        operation="save" if operation == "save" else "restore",
        contender=turn.contender.name,
        workload=turn.workload.name,
        quick=settings.quick,
        seed=turn.repetition,  # other values each time: an old file can't pass for a new one
        path=str(path),
        answer=str(path.with_name("answer.json")),
    )
    os.sync()  # what earlier trials left to be written is not this one's cost
    answer = trial.run_in_process(request, settings.timeout_s)
    surroundings = {
        "workload": turn.workload.name,
        "storage": turn.storage,
        "contender": turn.contender.name,
        "contender_order": contenders.ALL_CONTENDERS.index(turn.contender),
        "family": turn.contender.family,
        "operation": operation,
        "repetition": turn.repetition,
        "stored_bytes": turn.workload.stored_bytes,
        "device_bytes": turn.workload.device_bytes,
    }
    return surroundings | answer


if __name__ == "__main__":
    main()
