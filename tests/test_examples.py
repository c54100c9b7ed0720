"""The examples of training loops, each run as a program of its own: killed, told to stop, and resumed.

A run that nothing interrupts gives the losses that all others must have, bit for bit. The socket through which a run
prints takes a few lines, and is read a line at a time: a run that is ahead of its reader waits in `print`, so that it
is always still training when it is killed or told to stop.

Most of the time of a run would go into imports. So one program imports an example, which touches no device, and forks
all the runs of it.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import json
import os
import pathlib
import re
import signal
import statistics
import subprocess
import sys
import textwrap
from typing import Any

import pytest

from .helpers import ROOT, run_fork
from .processes import xla_flags

pytestmark = pytest.mark.slow

EXAMPLES = {"jax": "jax", "nnx": "flax", "equinox": "equinox", "keras": "keras"}
SAVE_EVERY = 5
# More than those that are read before the signals and those that are in a socket then, twice.
STEPS = 50
# A program takes some seconds; one that takes this long hangs.
PROGRAM_TIMEOUT_S = 280

# Runs an example as often as it is told to. A run has a directory, and ends by itself or is sent a signal when it has
# printed so many lines. The losses that each printed, and its exit code, are printed at the end.
RUNS = """
    import itertools, json, os, runpy, signal, socket, sys
    import jax
    from jax._src import xla_bridge

    script, compiled, steps, save_every, runs = sys.argv[1:]
    # All runs of an example compile the same: most of the time they would take.
    jax.config.update("jax_compilation_cache_dir", compiled)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    example = runpy.run_path(script, run_name="example")
    assert not xla_bridge.backends_are_initialized()

    found = []
    for directory, lines_before_signal, number in json.loads(runs):
        reader, writer = socket.socketpair()
        writer.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)  # the least that there is
        run = os.fork()
        if run == 0:
            os.dup2(writer.fileno(), 1)
            reader.close()
            writer.close()
            sys.argv = [script, directory, "--steps", steps, "--save-every", save_every]
            example["main"]()
            sys.exit()  # as a program that has come to its end
        writer.close()
        with reader, reader.makefile("rb", buffering=0) as printed:
            lines = [json.loads(line) for line in itertools.islice(printed, lines_before_signal)]
            if number is not None:
                os.kill(run, number)
                # What is in the socket of a run that was killed may end in the middle of a line.
                lines += [json.loads(line) for line in printed if number != signal.SIGKILL]
        _, status = os.waitpid(run, 0)
        found.append({"lines": lines, "exit_code": os.waitstatus_to_exitcode(status)})
    print(json.dumps(found))
"""

Losses = dict[int, str]


@dataclasses.dataclass(frozen=True)
class Runs:
    """The losses that the runs of an example printed, by their step, and their exit codes.

    Attributes:
      unbroken: From the start to the end.
      again: Started when that had ended.
      killed: Killed after some steps.
      stopped: Resumed, and told to stop after some steps.
      resumed: From there to the end.
      exit_codes: Of these, in this order.
    """

    unbroken: Losses
    again: Losses
    killed: Losses
    stopped: Losses
    resumed: Losses
    exit_codes: list[int]


@pytest.fixture(scope="module", params=EXAMPLES)
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    package = EXAMPLES[request.param]
    # Not imported: Keras would choose a backend for this process.
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    folder = tmp_path_factory.mktemp(request.param)
    unbroken, broken = str(folder / "unbroken"), str(folder / "broken")
    orders = [
        (unbroken, None, None),
        (unbroken, None, None),
        (broken, 17, signal.SIGKILL),
        (broken, 7, signal.SIGTERM),
        (broken, None, None),
    ]
    script = ROOT / "examples" / f"loop_{request.param}.py"
    program = f"import os\nos.environ['KERAS_HOME'] = {str(folder)!r}\n" + textwrap.dedent(RUNS)
    result = run_fork(
        program,
        script,
        folder / "compiled",
        STEPS,
        SAVE_EVERY,
        json.dumps(orders),
        timeout_s=PROGRAM_TIMEOUT_S,
    )
    found = json.loads(result.stdout)
    return Runs(*(losses_of(each["lines"]) for each in found), [each["exit_code"] for each in found])


def losses_of(lines: list[dict[str, Any]]) -> Losses:
    steps = [line["step"] for line in lines]
    assert all(after == before + 1 for before, after in itertools.pairwise(steps))
    return {line["step"]: line["loss"] for line in lines}


def assert_part_of(part: Losses, whole: Losses) -> None:
    differing = [step for step, loss in part.items() if loss != whole[step]]
    assert part
    assert differing == []


# --- an unbroken run ------------------------------------------------------------------------------------------


def test_the_model_learns(runs: Runs) -> None:
    assert list(runs.unbroken) == list(range(1, STEPS + 1))
    values = [float.fromhex(loss) for loss in runs.unbroken.values()]
    assert statistics.mean(values[-10:]) < 0.6 * statistics.mean(values[:10])


def test_a_finished_run_has_nothing_left_to_do(runs: Runs) -> None:
    assert runs.again == {}


# --- a run that is killed, resumed and told to stop, and resumed again ------------------------------------------


def test_a_run_that_is_killed_and_one_that_is_told_to_stop_resume_with_the_same_losses(runs: Runs) -> None:
    assert runs.exit_codes == [0, 0, -signal.SIGKILL, 0, 0]
    assert list(runs.killed) == list(range(1, 18))
    assert_part_of(runs.killed, runs.unbroken)
    assert_part_of(runs.stopped, runs.unbroken)
    # The save of step 10 was finished before that of step 15 could begin.
    resumed_from = min(runs.stopped) - 1
    assert resumed_from >= 10
    assert resumed_from % SAVE_EVERY == 0
    assert resumed_from + 7 <= max(runs.stopped) < STEPS
    assert_part_of(runs.resumed, runs.unbroken)
    assert list(runs.resumed) == list(range(max(runs.stopped) + 1, STEPS + 1))


# --- several processes ----------------------------------------------------------------------------------------


# Seven processes import scikit-learn for its digits, which takes each of them a second. Nothing is learnt from these.
DIGITS = """
import numpy as np

def load_digits(return_X_y):
    random = np.random.default_rng(0)
    return random.integers(17, size=(1797, 64)).astype(float), random.integers(10, size=1797)
"""


def test_a_job_of_four_processes_that_lost_one_goes_on_with_two(tmp_path: pathlib.Path) -> None:
    """The example compares every shard itself, and ends whatever it started."""
    (tmp_path / "sklearn").mkdir()
    (tmp_path / "sklearn" / "__init__.py").touch()
    (tmp_path / "sklearn" / "datasets.py").write_text(DIGITS)
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    environment = os.environ | {"PYTHONPATH": path, "XLA_FLAGS": xla_flags()}
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
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "XLA_FLAGS": xla_flags()}
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
