"""The examples of training loops, each run as a program of its own: killed, told to stop, and resumed.

A run that nothing interrupts gives the losses that all others must have, bit for bit. The pipe through which a program
prints is short, and is read a line at a time: a program that is far ahead of its reader waits in `print`, so that it is
always still training when it is killed or told to stop.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import importlib.util
import itertools
import json
import os
import pathlib
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator

import pytest

from .helpers import ROOT

pytestmark = pytest.mark.slow

EXAMPLES = {"jax": "jax", "nnx": "flax", "equinox": "equinox", "keras": "keras"}
SAVE_EVERY = 5
# A line has 48 bytes, so that a pipe of 4 KiB holds about 85: more steps than those and the ones that are read.
STEPS = 120
PIPE_BYTES = 4096
# A program takes some seconds; one that takes this long hangs.
PROGRAM_TIMEOUT_S = 120

Losses = dict[int, str]


class Program:
    """An example that runs."""

    def __init__(self, process: subprocess.Popen[bytes], errors: pathlib.Path) -> None:
        self._process = process
        self._errors = errors

    def read(self, count: int | None = None) -> Losses:
        """The losses that it prints next, by their step: so many, or all to the end."""
        assert self._process.stdout is not None
        lines = [json.loads(line) for line in itertools.islice(self._process.stdout, count)]
        assert count is None or len(lines) == count, f"it ended early:\n{self._errors.read_text()}"
        steps = [line["step"] for line in lines]
        assert all(after == before + 1 for before, after in itertools.pairwise(steps))
        return {line["step"]: line["loss"] for line in lines}

    def send(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def assert_ends_with(self, code: int) -> None:
        assert self._process.wait() == code, self._errors.read_text()


@contextlib.contextmanager
def running(example: str, directory: pathlib.Path) -> Iterator[Program]:
    environment = dict(os.environ)
    environment.pop("XLA_FLAGS", None)
    environment["JAX_PLATFORMS"] = "cpu"
    environment["PYTHONPATH"] = str(ROOT)
    environment["KERAS_HOME"] = str(directory.parent / "keras")
    # Five runs of each example compile the same: most of the time they take.
    environment["JAX_COMPILATION_CACHE_DIR"] = str(_compiled())
    environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    script = ROOT / "examples" / f"loop_{example}.py"
    command = [sys.executable, script, directory, "--steps", str(STEPS), "--save-every", str(SAVE_EVERY)]
    errors = directory.parent / "errors.txt"
    with errors.open("wb") as stderr:
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=stderr, bufsize=0, pipesize=PIPE_BYTES
        )
    timer = threading.Timer(PROGRAM_TIMEOUT_S, process.kill)
    timer.start()
    try:
        with process:
            try:
                yield Program(process, errors)
            finally:
                process.kill()
    finally:
        timer.cancel()
        timer.join()


@functools.cache
def _compiled() -> pathlib.Path:
    folder = pathlib.Path(tempfile.mkdtemp(prefix="jaxckpt-compiled-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def run_to_the_end(example: str, directory: pathlib.Path) -> Losses:
    with running(example, directory) as program:
        losses = program.read()
        program.assert_ends_with(0)
    return losses


def assert_part_of(part: Losses, whole: Losses) -> None:
    differing = [step for step, loss in part.items() if loss != whole[step]]
    assert part
    assert differing == []


@pytest.fixture(scope="module", params=EXAMPLES)
def example(request: pytest.FixtureRequest) -> str:
    package = EXAMPLES[request.param]
    # Not imported: Keras would choose a backend for this process.
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    return request.param


@pytest.fixture(scope="module")
def unbroken(example: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[pathlib.Path, Losses]:
    """A directory in which a run came to its end, and the losses that it printed."""
    directory = tmp_path_factory.mktemp(f"unbroken_{example}") / "run"
    return directory, run_to_the_end(example, directory)


# --- an unbroken run ------------------------------------------------------------------------------------------


def test_the_model_learns(unbroken: tuple[pathlib.Path, Losses]) -> None:
    _, losses = unbroken
    assert list(losses) == list(range(1, STEPS + 1))
    values = [float.fromhex(loss) for loss in losses.values()]
    assert statistics.mean(values[-10:]) < 0.6 * statistics.mean(values[:10])


def test_a_finished_run_has_nothing_left_to_do(example: str, unbroken: tuple[pathlib.Path, Losses]) -> None:
    directory, _ = unbroken
    assert run_to_the_end(example, directory) == {}


# --- a run that is killed, resumed and told to stop, and resumed again ------------------------------------------


def test_a_run_that_is_killed_and_one_that_is_told_to_stop_resume_with_the_same_losses(
    example: str, unbroken: tuple[pathlib.Path, Losses], tmp_path: pathlib.Path
) -> None:
    _, losses = unbroken
    directory = tmp_path / "run"

    with running(example, directory) as program:
        killed = program.read(17)
        program.send(signal.SIGKILL)
        program.assert_ends_with(-signal.SIGKILL)
    assert_part_of(killed, losses)

    with running(example, directory) as program:
        stopped = program.read(7)
        program.send(signal.SIGTERM)
        stopped |= program.read()
        program.assert_ends_with(0)
    assert_part_of(stopped, losses)
    # The save of step 10 was finished before that of step 15 could begin.
    resumed_from = min(stopped) - 1
    assert resumed_from >= 10
    assert resumed_from % SAVE_EVERY == 0
    assert max(stopped) < STEPS

    resumed = run_to_the_end(example, directory)
    assert_part_of(resumed, losses)
    assert list(resumed) == list(range(max(stopped) + 1, STEPS + 1))


# --- several processes ----------------------------------------------------------------------------------------


def test_a_job_of_four_processes_that_lost_one_goes_on_with_two() -> None:
    """The example compares every shard itself, and ends whatever it started."""
    environment = dict(os.environ)
    environment["PYTHONPATH"] = str(ROOT)
    script = ROOT / "examples" / "multiprocess.py"
    result = subprocess.run(
        [sys.executable, script],
        env=environment,
        capture_output=True,
        text=True,
        timeout=PROGRAM_TIMEOUT_S,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    newest = re.search(r"the newest committed checkpoint is that of step (\d+)", result.stdout)
    assert newest is not None
    assert int(newest[1]) >= 15  # the save of step 20 may still have been running
    assert f"resumed from step {newest[1]}: every shard is what the four had in memory" in result.stdout
    assert "steps 30, 35, 40 are there, and step 40 is whole" in result.stdout


def test_a_process_without_the_code_of_the_model_goes_on_with_the_same_losses() -> None:
    script = ROOT / "examples" / "run_without_model.py"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    environment.pop("XLA_FLAGS", None)
    result = subprocess.run(
        [sys.executable, script],
        env=environment,
        capture_output=True,
        text=True,
        timeout=PROGRAM_TIMEOUT_S,
        check=True,
    )
    saved = re.findall(r"save: step (\d+) loss (\S+)", result.stdout)
    loaded = re.findall(r"load: step (\d+) loss (\S+)", result.stdout)
    assert len(saved) == 10
    assert loaded == saved[5:]


def test_every_variable_that_the_page_about_many_processes_names_is_one_that_jax_reads() -> None:
    page = (ROOT / "MULTIPROCESS.md").read_text()
    named = set(re.findall(r"`((?:SLURM|JAX|KUBERNETES|OMPI|JOB)_[A-Z_a-z]+|HOSTNAME)`", page))
    (folder,) = importlib.util.find_spec("jax").submodule_search_locations
    sources = [
        *pathlib.Path(folder, "_src", "clusters").glob("*.py"),
        pathlib.Path(folder, "_src", "distributed.py"),
    ]
    read = set(re.findall(r"['\"](\w+)['\"]", "\n".join(file.read_text() for file in sources)))
    assert len(named) >= 12
    assert named - read == set()
