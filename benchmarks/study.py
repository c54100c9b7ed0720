"""What is a study, and how does one measure?

A study answers a question that the tree workloads of `run` do not ask: what a training loop notices of its saves, what
a partial read fetches, whether the two-hundredth save costs what the twentieth did. It is a function of `StudySettings`
that returns tables of numbers; `studies` lists all of them.

Whatever is measured runs in a process of its own (`StudySettings.call`), and the contenders take turns in a new
random order in each repetition (`take_turns`), so that neither what one of them leaves behind nor the hour of the day
favours another. A peer that is not installed, or fails, is left out with a note that says why; a failure of jaxckpt
ends the study.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import math
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import measure

REPOSITORY = Path(__file__).resolve().parent.parent

# Lines of a failed process's error output that are kept.
ERROR_LINES_MAX = 20

# Sizes that a growth exponent is fitted to: the largest ones, where fixed costs no longer flatter it.
FITTED_SIZES = 3

MIB = 1 << 20


@dataclasses.dataclass(frozen=True)
class StudySettings:
    """What the command says of all studies.

    Attributes:
        quick: sizes that end in seconds.
        directories: where to save; a study of storage measures in each.
        repeat: times that each contender has its turn.
        timeout_s: most seconds of one process.
    """

    quick: bool
    directories: tuple[Path, ...]
    repeat: int
    timeout_s: float

    def call(self, function: Callable[..., Any], *, devices: int = 1, **arguments: Any) -> Any:
        """Measures with a function in a process of its own: `call_in_fresh_process`."""
        return call_in_fresh_process(function, timeout_s=self.timeout_s, devices=devices, **arguments)


@dataclasses.dataclass(frozen=True)
class StudyResult:
    """One table.

    Attributes:
        name: of the study.
        title: what was done, in one line.
        storage: such as "/tmp (ext4)", or "" where nothing is saved.
        columns: of the table; the first is the row's name.
        rows: numbers are medians; "<column> min" and "<column> max" stand beside those that were repeated.
        figures: numbers that a target is set for.
        notes: what a reader must know, and who was left out.
    """

    name: str
    title: str
    storage: str
    columns: tuple[str, ...]
    rows: tuple[dict[str, Any], ...]
    figures: dict[str, float]
    notes: tuple[str, ...]


class StudyError(Exception):
    """A process failed, took too long, or found other bytes than were saved."""


def call_in_fresh_process(
    function: Callable[..., Any], *, timeout_s: float, devices: int = 1, **arguments: Any
) -> Any:
    """Calls a function of a module in a new process that has so many CPU devices.

    Args:
        function: takes and returns what JSON can carry.
        timeout_s: most seconds that it may take.
        devices: number of devices.
        **arguments: of the function.

    Returns:
        What the function returned.

    Raises:
        StudyError: see there.
    """
    environment = dict(os.environ)
    environment["JAX_PLATFORMS"] = "cpu"
    environment["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
    name = f"{function.__module__}:{function.__name__}"
    with tempfile.TemporaryDirectory(prefix="jaxckpt-study-") as folder:
        answer = Path(folder, "answer.json")
        command = [sys.executable, "-m", "benchmarks.study", name, json.dumps(arguments), str(answer)]
        try:
            done = subprocess.run(
                command,
                cwd=REPOSITORY,
                env=environment,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=timeout_s,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise StudyError(f"{name}: not done after {timeout_s:.0f} s") from error
        if done.returncode != 0 or not answer.exists():
            lines = done.stderr.strip().splitlines()[-ERROR_LINES_MAX:]
            raise StudyError("\n".join([f"{name}: exit code {done.returncode}", *lines]))
        return json.loads(answer.read_text())


def take_turns(
    names: Sequence[str], repeat: int, run: Callable[[str, int], dict[str, Any]]
) -> tuple[dict[str, list[dict[str, Any]]], list[str]]:
    """Gives each contender its turn in each repetition.

    Args:
        names: of the contenders.
        repeat: number of repetitions.
        run: measures one contender once; given its name and the number of the repetition.

    Returns:
        The answers by name, and a note for each contender that was left out.

    Raises:
        StudyError: jaxckpt failed.
    """
    answers: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    notes = []
    for repetition in range(repeat):
        order = list(answers)
        random.Random(repetition).shuffle(order)
        for name in order:
            try:
                answers[name].append(run(name, repetition))
            except StudyError as error:
                if name.startswith("jaxckpt"):
                    raise
                del answers[name]
                notes.append(f"{name} is left out: {str(error).splitlines()[-1]}")
    return answers, notes


def make_row(name_column: str, name: str, answers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A row of the medians of all numbers, with their least and largest values where there are several."""
    row: dict[str, Any] = {name_column: name}
    for column, value in answers[0].items():
        if isinstance(value, str):
            row[column] = value
            continue
        values = [answer[column] for answer in answers]
        row[column] = statistics.median(values)
        if len(values) > 1:
            row[f"{column} min"] = min(values)
            row[f"{column} max"] = max(values)
    return row


def least_of_orbax(medians: Mapping[str, float]) -> float | None:
    """The least value of Orbax's contenders, the best where less is better; None where none could run."""
    return min((value for name, value in medians.items() if name.startswith("orbax")), default=None)


def growth_exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """Slope of the logarithms over the largest sizes, by least squares: 1 is linear."""
    pairs = sorted(zip(sizes, values, strict=True))[-FITTED_SIZES:]
    slope, _ = statistics.linear_regression(
        [math.log(size) for size, _ in pairs], [math.log(value) for _, value in pairs]
    )
    return slope


@contextlib.contextmanager
def scratch_in(directory: Path) -> Generator[Path]:
    """A new directory that is removed with all that is in it."""
    path = Path(tempfile.mkdtemp(prefix="jaxckpt-study-", dir=directory))
    try:
        yield path
    finally:
        shutil.rmtree(path)


def describe_storage(directory: Path) -> str:
    return f"{directory} ({measure.file_system(directory)})"


def resident_bytes_here() -> int:
    """Resident memory of this process."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no VmRSS")


def normal_values(shape: Sequence[int], seed: int) -> Any:
    """Reproducible normal numbers in float32, as weights are: they compress like those."""
    import numpy as np

    return np.random.Generator(np.random.SFC64(seed)).standard_normal(tuple(shape), np.float32)


def run_child(function_name: str, arguments: str, answer: str) -> None:
    """The other side of `call_in_fresh_process`."""
    module, _, name = function_name.partition(":")
    function = getattr(importlib.import_module(module), name)
    Path(answer).write_text(json.dumps(function(**json.loads(arguments))))


if __name__ == "__main__":
    run_child(*sys.argv[1:])
