"""The benchmark command: all contenders do the same work, in turns, in one run.

    python -m benchmarks.run [--quick] [--only NAME] [--contender NAME] [--dir DIR] [--repeat N] [--minutes N]
                             [--json FILE]

For each workload and storage directory, for each repetition, for each contender in a new random order: save;
restore with files that are not in the page cache; restore with files that are; remove the files. Each save
and each restore is a process of its own (`trial`), and nothing runs beside it. The studies follow.

Contenders that are neither jaxckpt nor Orbax nor raw I/O have fewer repetitions, and those that need minutes
for a workload have one, in the first directory. A contender of your own is named by its class, as MODULE:CLASS
(`contenders.Contender`).

Exit code 1 says that a trial or a study failed, or restored other bytes than were saved.
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
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks import contenders, measure, report, trial, workloads
from benchmarks.contenders import Contender, UnsupportedHereError
from benchmarks.trial import Request, TrialError
from benchmarks.workloads import Size, Workload

MEMORY_DIRECTORY = Path("/dev/shm")

DEFAULT_REPEAT = 3
DEFAULT_REPEAT_QUICK = 1

# For all tree workloads, where the command says neither how often nor how long.
DEFAULT_MINUTES = 75

# The contenders that figures are set against have all repetitions, other libraries at most so many.
MAIN_FAMILIES = ("jaxckpt", "orbax", "raw")
PEER_REPEAT_MAX = 2

# Whoever's leaves take longer than this in one turn has one in all.
SLOW_TURN_S = 30

# For estimates: making, saving, restoring twice and comparing, on two cores.
TURN_BYTES_PER_S = 250e6

# Orbax takes minutes to save 50,000 leaves, more on a busy machine; whoever takes longer than this hangs.
DEFAULT_TIMEOUT_S = 900

# A checkpoint may hold some more than the arrays.
STORAGE_MARGIN = 1.2

# A save holds the tree; a restore makes it, Orbax up to 0.75 times as much besides; comparing makes a leaf.
MEMORY_MARGIN = 3.0

PACKAGES = (
    "jaxckpt",
    "jax",
    "jaxlib",
    "numpy",
    "tensorstore",
    "orbax-checkpoint",
    "equinox",
    "flax",
    "safetensors",
    "torch",
    "tensorflow",
    "tensorflow-cpu",
)


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the command line says about every trial."""

    size: Size
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


@dataclasses.dataclass(frozen=True)
class Group:
    """A workload on a storage directory, with the contenders that take part."""

    workload: Workload
    directory: Path
    contenders: list[Contender]

    @property
    def storage(self) -> str:
        return f"{self.directory} ({measure.file_system(self.directory)})"


def main() -> None:
    arguments = _parse_arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # an exception, so that scratch files are removed
    chosen_workloads, chosen_studies = _choose_work(arguments)
    chosen_contenders = _choose_contenders(arguments)
    directories = arguments.dir or _default_directories(arguments.size)
    repeat = arguments.repeat or (DEFAULT_REPEAT if arguments.size == "full" else DEFAULT_REPEAT_QUICK)
    minutes = arguments.minutes or (None if arguments.repeat else DEFAULT_MINUTES)
    settings = Settings(arguments.size, repeat, arguments.timeout, arguments.json)

    results: dict[str, Any] = {"meta": {}, "notes": [], "trials": [], "studies": []}
    results["meta"] = _describe_run(chosen_workloads, chosen_contenders, directories[0], settings.timeout_s)
    present = _present(results, chosen_contenders)
    groups = [
        Group(workload, directory, _fitting(results, present, workload, directories.index(directory) == 0))
        for workload in chosen_workloads
        for directory in directories
    ]
    estimates = [_estimate_s(group, settings) for group in groups]
    limit = "" if minutes is None else f", less repetitions that do not fit into {minutes} minutes"
    print(f"tree workloads: about {_duration(sum(estimates))} on two cores{limit}")
    print(f"studies: {', '.join(chosen_studies) or 'none'}")
    print(textwrap.fill(report.LEGEND, 110))
    print(textwrap.fill(report.RATIO_LEGEND, 110))
    failures = 0
    for group, estimate_s in zip(groups, estimates, strict=True):
        share_s = None
        if minutes is not None:
            share_s = minutes * 60 * estimate_s / max(sum(estimates), 1.0)
        failures += _run_group(results, group, settings, share_s)
    for name, study in chosen_studies.items():
        failures += _run_study(results, name, study, directories, settings)
    report.write_json(results, settings.json_path)
    print(f"\nwrote {settings.json_path}")
    if failures:
        print(f"{failures} trials or studies failed; see the notes")
        sys.exit(1)


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--quick", action="store_const", dest="size", const="quick", help="a sixteenth of the bytes"
    )
    parser.add_argument("--size", choices=workloads.SIZES, help=argparse.SUPPRESS)
    parser.add_argument(
        "--only", action="append", metavar="NAME", help="this workload or study; may be repeated"
    )
    parser.add_argument(
        "--contender",
        action="append",
        metavar="NAME",
        help="the contender NAME, or those whose names start so, or MODULE:CLASS; may be repeated",
    )
    parser.add_argument(
        "--dir",
        action="append",
        type=Path,
        metavar="DIR",
        help="storage directory; may be repeated; default: the one for temporary files, without --quick /dev/shm too",
    )
    parser.add_argument(
        "--repeat", type=_positive, metavar="N", help="repetitions; default: 3, with --quick 1"
    )
    parser.add_argument(
        "--minutes",
        type=_positive,
        metavar="N",
        help="about the most time for all tree workloads: repetitions are left out, but never the first; "
        f"default: {DEFAULT_MINUTES}, with --repeat none",
    )
    parser.add_argument("--json", type=Path, default=report.DEFAULT_RESULTS, metavar="FILE", help="results")
    parser.add_argument(
        "--timeout", type=_positive, default=DEFAULT_TIMEOUT_S, metavar="SECONDS", help="limit for one trial"
    )
    parser.set_defaults(size="full")
    return parser.parse_args()


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


def _choose_work(arguments: argparse.Namespace) -> tuple[list[Workload], dict[str, Callable[..., Any]]]:
    """The workloads and the studies that are asked for; without --only all of them."""
    from benchmarks.studies import STUDIES

    known = workloads.all_workloads(arguments.size)
    if not arguments.only:
        return list(known), dict(STUDIES)
    unknown = set(arguments.only) - {workload.name for workload in known} - set(STUDIES)
    if unknown:
        names = ", ".join([*(workload.name for workload in known), *STUDIES])
        sys.exit(f"no workload or study {', '.join(sorted(unknown))}; there are {names}")
    chosen_workloads = [workload for workload in known if workload.name in arguments.only]
    return chosen_workloads, {name: study for name, study in STUDIES.items() if name in arguments.only}


def _choose_contenders(arguments: argparse.Namespace) -> list[Contender]:
    if not arguments.contender:
        return list(contenders.ALL_CONTENDERS)
    names = [contender.name for contender in contenders.ALL_CONTENDERS]
    chosen: set[str] = set()
    own = []
    for wanted in arguments.contender:
        if ":" in wanted:
            own.append(contenders.find_contender(wanted))
            continue
        found = [wanted] if wanted in names else [name for name in names if name.startswith(wanted)]
        if not found:
            sys.exit(f"no contender starts with {wanted}; there are {', '.join(names)}")
        chosen.update(found)
    return [contender for contender in contenders.ALL_CONTENDERS if contender.name in chosen] + own


def _present(results: dict[str, Any], chosen: Iterable[Contender]) -> list[Contender]:
    """Those whose packages are installed; the others are named in a note."""
    present = []
    for contender in chosen:
        reason = contenders.absence(contender)
        if reason is None:
            present.append(contender)
        else:
            _note(results, None, None, contender.name, f"left out: {reason}")
    return present


def _fitting(
    results: dict[str, Any], present: Iterable[Contender], workload: Workload, is_first: bool
) -> list[Contender]:
    """Those that are a comparison for a workload; the others are named in a note for each reason."""
    fitting = []
    refused: dict[str, list[str]] = {}
    for contender in present:
        reason = contender.refusal(workload)
        if reason is None and _is_slow(contender, workload) and not is_first:
            reason = "takes minutes, so it has its turn in the first directory alone"
        if reason is None:
            fitting.append(contender)
        else:
            refused.setdefault(reason, []).append(contender.name)
    for reason, names in refused.items():
        _note(results, workload.name, None, ", ".join(names), f"left out: {reason}")
    return fitting


def _is_slow(contender: Contender, workload: Workload) -> bool:
    return len(workload.leaves) * contender.leaf_s > SLOW_TURN_S


def _repetitions(contender: Contender, workload: Workload, repeat: int) -> int:
    if _is_slow(contender, workload):
        return 1
    if contender.family in MAIN_FAMILIES:
        return repeat
    return min(repeat, PEER_REPEAT_MAX)


def _estimate_s(group: Group, settings: Settings) -> float:
    """About how long all turns of a group take, within a factor of two."""
    workload = group.workload
    trials = 2 if measure.is_in_memory(group.directory) else 3
    seconds = 0.0
    for contender in group.contenders:
        turn_s = trials * contender.start_s
        turn_s += len(workload.leaves) * contender.leaf_s + workload.device_bytes / TURN_BYTES_PER_S
        seconds += turn_s * _repetitions(contender, workload, settings.repeat)
    return seconds


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.0f} minutes" if seconds >= 60 else f"{seconds:.0f} s"


def _default_directories(size: Size) -> list[Path]:
    """The directory for temporary files, and unless this is to be quick or is the same file system, /dev/shm."""
    temporary = Path(tempfile.gettempdir())
    if size != "full" or not MEMORY_DIRECTORY.is_dir():
        return [temporary]
    if MEMORY_DIRECTORY.stat().st_dev == temporary.stat().st_dev:
        return [temporary]
    return [temporary, MEMORY_DIRECTORY]


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
        "holds": {contender.name: contender.holds for contender in chosen_contenders},
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


def _run_group(results: dict[str, Any], group: Group, settings: Settings, share_s: float | None) -> int:
    """Runs all repetitions of a workload on a directory and prints their table.

    Args:
        results: gets the records and the notes.
        group: what is run.
        settings: of the run.
        share_s: no repetition but the first begins that would probably end later than this; None for no limit.

    Returns:
        The number of trials that failed.
    """
    workload, storage = group.workload, group.storage
    reason = _room_problem(workload, group.directory)
    if reason is not None:
        print(f"\n{workload.name} on {storage} left out: {reason}")
        _note(results, workload.name, storage, "all", f"left out: {reason}")
        return 0
    failures = 0
    given_up: set[str] = set()
    group_start = time.monotonic()
    for repetition in range(settings.repeat):
        order = list(group.contenders)
        random.Random(repetition).shuffle(order)  # neighbours in time differ from one repetition to the next
        start = time.monotonic()
        for contender in order:
            if contender.name in given_up:
                continue
            if repetition >= _repetitions(contender, workload, settings.repeat):
                continue
            turn = Turn(workload, storage, contender, repetition)
            turn_start = time.monotonic()
            try:
                with _scratch_directory(group.directory) as scratch:
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
            turn_s = time.monotonic() - turn_start
            print(f"{workload.name} on {storage}: {contender.name}, {turn_s:.0f} s", file=sys.stderr)
        end = time.monotonic()
        progress = f"{repetition + 1}/{settings.repeat}"
        print(f"{workload.name} on {storage}: repetition {progress}, {end - start:.0f} s", file=sys.stderr)
        if share_s is not None and 2 * end - start - group_start > share_s:
            break
    for found in report.groups(results):
        if found.workload == workload.name and found.storage == storage:
            print("\n" + report.plain_text(results, found), flush=True)
    return failures


def _run_study(
    results: dict[str, Any],
    name: str,
    study: Callable[..., Any],
    directories: Sequence[Path],
    settings: Settings,
) -> int:
    """Runs a study and prints its tables.

    Returns:
        1 if it failed, else 0.
    """
    from benchmarks.study import StudyError, StudySettings

    is_quick = settings.size != "full"
    study_settings = StudySettings(is_quick, tuple(directories), settings.repeat, settings.timeout_s)
    start = time.monotonic()
    try:
        found = [dataclasses.asdict(result) for result in study(study_settings)]
    except StudyError as error:
        print(f"study {name} failed: {error}", file=sys.stderr)
        _note(results, name, None, "all", f"failed: {error}")
        return 1
    for result in found:
        print("\n" + report.study_text(result), flush=True)
    results["studies"] += found
    report.write_json(results, settings.json_path)
    print(f"study {name}: {time.monotonic() - start:.0f} s", file=sys.stderr)
    return 0


def _room_problem(workload: Workload, directory: Path) -> str | None:
    wanted_bytes = workload.stored_bytes * STORAGE_MARGIN
    memory_bytes = workload.device_bytes * MEMORY_MARGIN
    if measure.is_in_memory(directory):
        wanted_bytes += memory_bytes
    elif measure.available_memory_bytes() < memory_bytes:
        return f"{memory_bytes / 2**30:.1f} GiB of free memory are wanted"
    return measure.room_problem(directory, int(wanted_bytes))


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
        contender=contenders.address(turn.contender),
        workload=turn.workload.name,
        size=settings.size,
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
        "contender_order": contenders.place_in_tables(turn.contender),
        "family": turn.contender.family,
        "operation": operation,
        "repetition": turn.repetition,
        "stored_bytes": turn.workload.stored_bytes,
        "device_bytes": turn.workload.device_bytes,
        "restored_bytes": turn.contender.restored_bytes(turn.workload),
    }
    return surroundings | answer


if __name__ == "__main__":
    main()
