"""Settings for all tests: sixteen forced CPU devices, set before anything imports jax."""

from __future__ import annotations

import os
import pathlib

_FLAG = "--xla_force_host_platform_device_count=16"
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FLAG}".strip()

import pytest  # noqa: E402  jax must not be imported before the flag is set


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        names = vars(getattr(item, "module", None) or object)
        if "run_processes" in names or "start_processes" in names:
            item.add_marker(pytest.mark.processes)


@pytest.fixture
def path(tmp_path: pathlib.Path) -> pathlib.Path:
    """Where a test saves its checkpoint; nothing is there yet."""
    return tmp_path / "checkpoint"
