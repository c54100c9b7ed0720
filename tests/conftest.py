"""Settings for all tests: sixteen forced CPU devices, and quick compilation, set before anything imports jax."""

from __future__ import annotations

import os
import pathlib

# Most of the time of many tests would go into machine code that is good, and runs once.
_FLAGS = (
    "--xla_force_host_platform_device_count=16",
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
)
_given = os.environ.get("XLA_FLAGS", "")
os.environ["XLA_FLAGS"] = " ".join([_given, *(flag for flag in _FLAGS if flag.split("=")[0] not in _given)])

import pytest  # noqa: E402  jax must not be imported before the flag is set

# A program of its own, which needs TensorFlow.
collect_ignore = ["tensorflow/generate.py"]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """One more than there are cores, for tests of deadlines and signals wait more than they compute."""
    return len(os.sched_getaffinity(0)) + 1


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if hasattr(config, "workerinput"):  # a worker that ends with quick tests does not let the others wait
        items.sort(key=lambda item: item.get_closest_marker("slow") is None)
    for item in items:
        names = vars(getattr(item, "module", None) or object)
        if "run_processes" in names or "start_processes" in names:
            item.add_marker(pytest.mark.processes)


@pytest.fixture
def path(tmp_path: pathlib.Path) -> pathlib.Path:
    """Where a test saves its checkpoint; nothing is there yet."""
    return tmp_path / "checkpoint"
