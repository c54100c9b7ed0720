"""One save or one restore in a process of its own.

Fresh memory is most of the cost of a restore, and allocators, caches and thread pools keep things from one
operation to the next. So each measured operation gets a new process:

1. import the contender, start the JAX backend, make the source or the description of the wanted tree;
2. take as much memory as the operation may need, and give it back: then it is there, also in a virtual machine;
3. measure the operation, and nothing else;
4. after a restore, compare every byte with the source; after a save, count the files.

A request is one JSON object in the command line; the answer is one JSON object in the file that it names.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import jax

from benchmarks import contenders, measure, workloads
from benchmarks.contenders import UnsupportedHereError
from benchmarks.workloads import Size

REPOSITORY = Path(__file__).resolve().parent.parent

# Lines of a failed process's error output that are kept.
ERROR_LINES_MAX = 20

PROBLEMS_MAX = 10

# A restore fills arrays, Orbax up to 0.75 times as much besides; a save may take a copy and pages of files.
MEMORY_OF_OPERATION = 2


@dataclasses.dataclass(frozen=True)
class Request:
    """What a trial has to do.

    Attributes:
        operation: save to `path`, or restore from it.
        contender: its address.
        workload: its name.
        size: of the workload.
        seed: of the values.
        path: of the checkpoint.
        answer: file for the answer.
    """

    operation: Literal["save", "restore"]
    contender: str
    workload: str
    size: Size
    seed: int
    path: str
    answer: str


class TrialError(Exception):
    """The process failed, took too long, or restored other bytes than were saved."""


def run_in_process(request: Request, timeout_s: float) -> dict[str, Any]:
    """Runs one trial in a new process.

    Returns:
        The fields of `measure.Usage`; after a save `file_count` and `file_bytes` too.

    Raises:
        UnsupportedHereError: the machine can't do it.
        TrialError: see there.
    """
    workload = workloads.find_workload(request.workload, request.size)
    axes = workload.save_axes if request.operation == "save" else workload.restore_axes
    command = [sys.executable, "-m", "benchmarks.trial", json.dumps(dataclasses.asdict(request))]
    answer = _run_child(command, workloads.device_count(axes), Path(request.answer), timeout_s)
    if "unsupported" in answer:
        raise UnsupportedHereError(answer["unsupported"])
    if answer.get("problems"):
        raise TrialError("restored other bytes than were saved:\n" + "\n".join(answer["problems"]))
    return answer


def probe_environment(answer_path: Path, timeout_s: float) -> dict[str, Any]:
    """Asks a new process which devices JAX has."""
    request = json.dumps({"probe": True, "answer": str(answer_path)})
    return _run_child([sys.executable, "-m", "benchmarks.trial", request], 1, answer_path, timeout_s)


def _run_child(command: list[str], device_count: int, answer_path: Path, timeout_s: float) -> dict[str, Any]:
    environment = dict(os.environ)
    environment["JAX_PLATFORMS"] = "cpu"
    environment["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={device_count}"
    answer_path.unlink(missing_ok=True)
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
        raise TrialError(f"not done after {timeout_s:.0f} s") from error
    if done.returncode != 0 or not answer_path.exists():
        lines = done.stderr.strip().splitlines()[-ERROR_LINES_MAX:]
        raise TrialError("\n".join([f"exit code {done.returncode}", *lines]))
    answer = json.loads(answer_path.read_text())
    answer_path.unlink()
    return answer


def _save(request: Request) -> dict[str, Any]:
    contender = contenders.find_contender(request.contender)
    workload = workloads.find_workload(request.workload, request.size)
    path = Path(request.path)
    contenders.load_modules(contender)
    source = contender.source(workload, request.seed)
    measure.back_free_memory(MEMORY_OF_OPERATION * workload.device_bytes)
    _, usage = measure.measure(lambda: contender.save(path, source))
    sizes = [file.stat().st_size for file in measure.files_below(path)]
    return dataclasses.asdict(usage) | {"file_count": len(sizes), "file_bytes": sum(sizes)}


def _restore(request: Request) -> dict[str, Any]:
    contender = contenders.find_contender(request.contender)
    workload = workloads.find_workload(request.workload, request.size)
    path = Path(request.path)
    contenders.load_modules(contender)
    target = contender.target(workload, request.seed)
    measure.back_free_memory(MEMORY_OF_OPERATION * workload.device_bytes)
    restored, usage = measure.measure(lambda: contender.restore(path, target))
    problems = contender.problems(workload, request.seed, restored)
    return dataclasses.asdict(usage) | {"problems": problems[:PROBLEMS_MAX]}


def _probe() -> dict[str, Any]:
    device = jax.devices()[0]
    return {"device": device.device_kind, "platform": device.platform, "python": platform.python_version()}


def main() -> None:
    fields = json.loads(sys.argv[1])
    if fields.get("probe"):
        answer = _probe()
        answer_path = Path(fields["answer"])
    else:
        request = Request(**fields)
        answer_path = Path(request.answer)
        operation = _save if request.operation == "save" else _restore
        try:
            answer = operation(request)
        except UnsupportedHereError as error:
            answer = {"unsupported": str(error)}
    answer_path.write_text(json.dumps(answer))


if __name__ == "__main__":
    main()
