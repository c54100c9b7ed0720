"""Does the two-hundredth save of a run cost what the twentieth did?

A manager that keeps the newest two steps saves a state of 48 MiB again and again, fresh arrays each time, and each save
is waited for. The last quarter of the saves is compared with an early stretch, from a tenth to about a third of them
(of 200: the last 50 with saves 20 to 70), when caches, thread pools and allocators have what they want:

    early s, late s      median seconds of a save, waiting included
    growth               late over early
    CPU growth           the same of the CPU seconds of all threads, which a disk that others use does not change
    memory growth MiB    resident memory after a save, median of the late ones less that of the early ones
    files, threads       open file descriptors and threads of the process after the last save, less those after the
                         first early one
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import loop
from benchmarks.study import (
    MIB,
    StudyResult,
    StudySettings,
    describe_storage,
    make_row,
    resident_bytes_here,
    scratch_in,
    take_turns,
)

NAMES = ("jaxckpt manager", "orbax-v0 manager")


@dataclasses.dataclass(frozen=True)
class Size:
    """Number of saves, and number and bytes of the large and of the small leaves."""

    saves: int
    large: tuple[int, int]
    small: tuple[int, int]

    @property
    def nbytes(self) -> int:
        return self.large[0] * self.large[1] + self.small[0] * self.small[1]


FULL = Size(saves=200, large=(8, 4 << 20), small=(64, 256 << 10))
QUICK = Size(saves=40, large=(4, 1 << 20), small=(16, 64 << 10))
TINY = Size(saves=20, large=(1, 8192), small=(2, 1024))


def measure_saves(
    name: str, directory: str, saves: int, large: tuple[int, int], small: tuple[int, int]
) -> dict[str, float]:
    import jax

    saver = loop.make_saver(name, Path(directory))
    state = {"large": loop.make_state(*large), "small": loop.make_state(*small)}
    step = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf + 1, tree), donate_argnums=0)
    seconds: list[float] = []
    cpu_s: list[float] = []
    resident_bytes: list[int] = []
    early = range(saves // 10, saves * 35 // 100)
    late = range(saves - saves // 4, saves)
    files_early = threads_early = 0
    for number in range(saves):
        state = jax.block_until_ready(step(state))
        began_s, cpu_began_s = time.perf_counter(), time.process_time()
        saver.save(number, state)
        saver.wait()
        seconds.append(time.perf_counter() - began_s)
        cpu_s.append(time.process_time() - cpu_began_s)
        resident_bytes.append(resident_bytes_here())
        if number == early[0]:
            files_early, threads_early = _count("fd"), _count("task")

    def early_and_late(values: Sequence[float]) -> tuple[float, float]:
        """Medians of the early and of the late ones."""
        return statistics.median(values[n] for n in early), statistics.median(values[n] for n in late)

    early_s, late_s = early_and_late(seconds)
    early_cpu_s, late_cpu_s = early_and_late(cpu_s)
    early_bytes, late_bytes = early_and_late(resident_bytes)
    return {
        "early s": early_s,
        "late s": late_s,
        "growth": late_s / early_s,
        "CPU growth": late_cpu_s / early_cpu_s,
        "memory early MiB": early_bytes / MIB,
        "memory growth MiB": (late_bytes - early_bytes) / MIB,
        "files": _count("fd") - files_early,
        "threads": _count("task") - threads_early,
    }


def _count(kind: str) -> int:
    return sum(1 for _ in Path("/proc/self", kind).iterdir())


def run(
    settings: StudySettings, size: Size | None = None, names: tuple[str, ...] = NAMES
) -> list[StudyResult]:
    size = size or (QUICK if settings.quick else FULL)
    return [_study(settings, directory, size, names) for directory in settings.directories]


def _study(settings: StudySettings, directory: Path, size: Size, names: tuple[str, ...]) -> StudyResult:
    def measure_one(name: str, _: int) -> dict[str, Any]:
        with scratch_in(directory) as scratch:
            return settings.call(
                measure_saves,
                name=name,
                directory=str(scratch),
                **dataclasses.asdict(size),
            )

    answers, notes = take_turns(names, settings.repeat, measure_one)
    rows = {name: make_row("contender", name, each) for name, each in answers.items()}
    ours = rows["jaxckpt manager"]
    return StudyResult(
        name="endurance",
        title=f"{size.saves} saves of {size.nbytes / MIB:,.0f} MiB by a manager, each waited for",
        storage=describe_storage(directory),
        columns=(
            "contender",
            "early s",
            "late s",
            "growth",
            "CPU growth",
            "memory early MiB",
            "memory growth MiB",
            "files",
            "threads",
        ),
        rows=tuple(rows.values()),
        figures={
            "seconds, late / early": ours["growth"],
            "CPU seconds, late / early": ours["CPU growth"],
            "memory growth MiB": ours["memory growth MiB"],
            "memory growth / state": ours["memory growth MiB"] * MIB / size.nbytes,
            "files": ours["files"],
            "threads": ours["threads"],
        },
        notes=tuple(notes),
    )
