"""`benchmarks.gpu` runs from its first part to its last table, here on CPU devices, and judges what it finds."""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import pytest

from .helpers import ROOT

gpu: Any = pytest.importorskip("benchmarks.gpu")

FLAGS = (
    "--xla_force_host_platform_device_count=2",
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("orbax") is None, reason="compares with Orbax")
def test_the_command_runs_end_to_end_on_cpu_devices(
    tmp_path: pathlib.Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    # Its parts run one after the other, and compile the same.
    compiled = {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("compiled")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    small = ["--state-gib", "0.01", "--saves", "1", "--growth-saves", "3"]
    result = subprocess.run(
        [
            sys.executable,
            "-m",
            "benchmarks.gpu",
            *small,
            "--dir",
            tmp_path,
            "--json",
            tmp_path / "results.json",
        ],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": " ".join(FLAGS)} | compiled,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["notes"] == []
    assert list(results["parts"]) == list(gpu.SHARES)
    assert set(results["parts"]["restore"]) == set(gpu.RESTORED)
    assert {name.partition(" ")[2] for name in results["parts"]["jaxckpt"]["rows"]} == set(gpu.STAGINGS)
    assert "2 x cpu" in result.stdout.splitlines()[-1]
    judged = {figure["name"]: figure["is_met"] for figure in results["figures"]}
    missed = [name for name, is_met in judged.items() if is_met is False and "memory" not in name]
    assert missed == [], result.stdout
    for name in ("donating steps change a checkpoint", "jaxckpt auto: restored bit for bit"):
        assert judged[name] is True, name
        assert name in result.stdout
    assert [entry.name for entry in tmp_path.iterdir()] == ["results.json"]


LOOP = {"blocked_s": 0.01, "inflation": 0.01, "stolen_s": 0.02, "snapshot_s": 1.0}
RESTORE = {"cold_s": 1.0, "warm_s": 0.5, "disk_bytes_per_s": 1.1 * gpu.GIB, "different_leaves": 0}
MEMORY = {"resident": gpu.GIB, "pinned": 0, "device": 0}
GOOD: dict[str, Any] = {
    "transfers": {name: {"1 MiB": 1.2 * gpu.GIB} for name in ("device to pinned", "pinned to device")},
    "isolation": {"changed": {"pinned": 0}, "checked": 9, "controls": {"naive": True, "may_alias": False}},
    "growth": {"pinned": {"saves": 50, "first": MEMORY, "last": MEMORY}},
    "jaxckpt": {"state_bytes": gpu.GIB, "rows": {f"jaxckpt {way}": LOOP for way in gpu.STAGINGS}},
    "orbax": {"rows": {"orbax": LOOP | {"blocked_s": 1.0}}},
    "restore": {
        gpu.RESTORED[0]: RESTORE | {"donated": 1.0, "in_place": 1.0},
        gpu.RESTORED[1]: RESTORE | {"cold_s": 2.0, "warm_s": 2.0},
    },
}
BAD = {
    "isolation/changed/pinned": (1, {"donating steps change a checkpoint"}),
    "isolation/controls/naive": (False, {"control: naive"}),
    "growth/pinned/last": (
        MEMORY | {"resident": 2 * gpu.GIB, "device": gpu.GIB},
        {"pinned: memory over 50 saves, host", "pinned: memory over 50 saves, device"},
    ),
    "jaxckpt/rows/jaxckpt device": (
        LOOP | {"blocked_s": 0.051, "inflation": 0.04},
        {
            "device: save_async blocks",
            "device: blocked, of Orbax's least",
            "device: steps while it is written",
        },
    ),
    "jaxckpt/rows/jaxckpt pinned": (
        LOOP | {"stolen_s": 0.01, "snapshot_s": 1.1},
        {"auto: stolen from training", "D2H of a snapshot"},
    ),
    "restore/jaxckpt auto/cold_s": (1.2, {"restore, cold", "restore, cold, against Orbax"}),
    "restore/jaxckpt auto/donated": (0.99, {"first step after a restore"}),
    "restore/jaxckpt auto/different_leaves": (1, {"jaxckpt auto: restored bit for bit"}),
}


def missed(parts: dict[str, Any], *, is_accelerator: bool = True) -> set[str]:
    return {
        figure.name for figure in gpu.judge(parts, is_accelerator=is_accelerator) if figure.is_met is False
    }


def test_good_figures_are_met() -> None:
    assert missed(GOOD) == set()


@pytest.mark.parametrize("place", BAD)
def test_a_bad_figure_misses_its_target(place: str) -> None:
    value, names = BAD[place]
    parts: Any = copy.deepcopy(GOOD)
    *inner, last = place.split("/")
    node = parts
    for key in inner:
        node = node[key]
    node[last] = value
    assert missed(parts) == names


def test_on_cpu_devices_no_speed_is_judged_but_every_value_is() -> None:
    parts: Any = copy.deepcopy(GOOD)
    parts["jaxckpt"]["rows"]["jaxckpt device"] = LOOP | {"blocked_s": 10.0}
    assert missed(parts, is_accelerator=False) == set()
    parts["isolation"]["changed"]["pinned"] = 1
    assert missed(parts, is_accelerator=False) == {"donating steps change a checkpoint"}


@pytest.mark.parametrize("part", list(GOOD))
def test_each_part_is_judged_and_shown_without_the_others(part: str) -> None:
    parts = {part: GOOD[part]} | ({"jaxckpt": GOOD["jaxckpt"]} if part == "restore" else {})
    assert missed(parts) <= {"auto: stolen from training"}
