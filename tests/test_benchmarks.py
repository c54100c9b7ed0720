"""The benchmark suite: its workloads, and its command from end to end with trees of a few KiB."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import jax
import numpy as np
import pytest

from .helpers import ROOT, run_program

contenders: Any = pytest.importorskip("benchmarks.contenders")
workloads: Any = pytest.importorskip("benchmarks.workloads")

NAMES = [workload.name for workload in workloads.all_workloads("tiny")]

# A library that loses one bit of one leaf.
FORGETFUL = """
import numpy as np
from benchmarks import workloads
from benchmarks.contenders import WholeArrays

class Forgetful(WholeArrays):
    name = family = "forgetful"
    holds = "host"

    def source(self, workload, seed):
        return workloads.make_host_arrays(workload, seed)

    def save(self, path, source):
        path.mkdir()
        np.savez(path / "state.npz", **source)

    def target(self, workload, seed):
        return None

    def restore(self, path, target):
        with np.load(path / "state.npz") as file:
            arrays = dict(file)
        arrays["leaf_00003"].view(np.uint8)[-1, -1] ^= 1
        return arrays

    def as_numpy(self, restored):
        return restored
"""


def run_benchmarks(directory: pathlib.Path, *arguments: str) -> tuple[subprocess.CompletedProcess[str], Any]:
    (directory / "forgetful.py").write_text(FORGETFUL)
    results = directory / "results.json"
    command = [sys.executable, "-m", "benchmarks.run", "--size", "tiny", "--repeat", "1", "--timeout", "60"]
    command += ["--dir", str(directory), "--json", str(results), *arguments]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(directory)])}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280, check=False
    )
    return done, json.loads(results.read_text())


@pytest.mark.slow
def test_one_command_prints_tables_writes_json_and_removes_its_files(tmp_path: pathlib.Path) -> None:
    chosen = ["--only", "gpt-bfloat16", "--contender", "jaxckpt", "--contender", "raw-one-file-direct"]
    done, results = run_benchmarks(tmp_path, *chosen)
    assert done.returncode == 0, done.stderr
    assert "gpt-bfloat16 on" in done.stdout

    stored_bytes = workloads.find_workload("gpt-bfloat16", "tiny").stored_bytes
    per_operation = {"save", "restore cold", "restore warm"}
    if "(tmpfs)" in results["trials"][0]["storage"]:
        per_operation = {"save", "restore warm"}
    ran: dict[str, set[str]] = {}
    for trial in results["trials"]:
        ran.setdefault(trial["contender"], set()).add(trial["operation"])
        assert trial["seconds"] > 0
        assert trial["stored_bytes"] == stored_bytes
        assert trial.get("problems", []) == []
    assert ran == dict.fromkeys(("jaxckpt", "raw-one-file-direct"), per_operation)
    saves = [trial for trial in results["trials"] if trial["operation"] == "save"]
    assert all(trial["file_bytes"] >= trial["stored_bytes"] for trial in saves)
    assert results["meta"]["durability"].keys() == ran.keys()
    assert not list(tmp_path.glob("jaxckpt-benchmark-*"))


@pytest.mark.slow
def test_the_command_fails_when_a_contender_restores_one_wrong_bit(tmp_path: pathlib.Path) -> None:
    done, results = run_benchmarks(tmp_path, "--only", "large", "--contender", "forgetful:Forgetful")
    assert done.returncode == 1
    assert [trial["operation"] for trial in results["trials"]] == ["save"]
    (note,) = results["notes"]
    assert note["contender"] == "forgetful"
    assert "leaf_00003: other bytes" in note["text"]


@pytest.mark.slow
def test_an_unknown_workload_is_refused_before_anything_runs(tmp_path: pathlib.Path) -> None:
    command = [sys.executable, "-m", "benchmarks.run", "--only", "huge", "--json", str(tmp_path / "r.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "no workload or study huge" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_trial_loads_no_package_of_another_contender() -> None:
    run_program(
        """
        import sys
        from benchmarks import contenders, trial
        packages = {package for contender in contenders.ALL_CONTENDERS for package in contender.modules}
        packages -= {"jax.experimental.array_serialization.pytree_serialization"}
        assert not packages & set(sys.modules), packages & set(sys.modules)
        contenders.load_modules(contenders.find_contender("jaxckpt"))
        assert packages & set(sys.modules) == {"jaxckpt"}, packages & set(sys.modules)
        """
    )


@pytest.mark.parametrize("name", NAMES)
def test_every_leaf_of_a_workload_has_values_of_its_own_that_a_seed_brings_back(name: str) -> None:
    workload = workloads.find_workload(name, "tiny")
    arrays = workloads.make_host_arrays(workload, 1)
    assert workloads.host_problems(workload, 1, arrays) == []
    contents = {array.tobytes() for array in arrays.values()}
    assert len(contents) == len(workload.leaves)
    others = workloads.make_host_arrays(workload, 2)
    assert len(workloads.host_problems(workload, 1, others)) == len(workload.leaves)
    assert sum(array.nbytes for array in arrays.values()) == workload.stored_bytes


def test_a_leaf_of_several_blocks_never_repeats_one() -> None:
    leaf = workloads.Leaf("leaf", (5, workloads.BLOCK_VALUES // 2))
    rows = workloads.leaf_values(leaf, 7, seed=0)
    assert not any(np.array_equal(rows[row], rows[other]) for row in range(5) for other in range(row))


def test_one_changed_bit_of_one_shard_is_found() -> None:
    workload = workloads.Workload("w", (workloads.Leaf("a/b", (4, 4), "bfloat16"), workloads.Leaf("a/c", ())))
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    values = [workloads.leaf_values(leaf, number, 0) for number, leaf in enumerate(workload.leaves)]
    payload = np.concatenate([value.reshape(-1).view(np.uint8) for value in values])
    assert workloads.payload_problems(workload, 0, payload) == []
    assert workloads.flatten(workloads.nest(workload.leaves, values)).keys() == {"a/b", "a/c"}

    payload[5] ^= 4
    assert workloads.payload_problems(workload, 0, payload) == ["a/b: other bytes"]
    values[0].view(np.uint16)[3, 3] ^= 1
    assert workloads.host_problems(workload, 0, dict(zip(("a/b", "a/c"), values, strict=True))) == [
        "a/b: other bytes"
    ]
    if jax.device_count() > 1:  # the mesh of a workload is all devices of a process
        with pytest.raises(RuntimeError, match="wants 1 devices"):
            workloads.tree_problems(
                workload, 0, workloads.nest(workload.leaves, jax.device_put(values, device))
            )


@pytest.mark.slow
def test_one_changed_bit_on_one_of_eight_devices_is_found_and_another_sharding_too() -> None:
    run_program(
        """
        import jax
        import numpy as np
        from benchmarks import workloads

        workload = workloads.find_workload("small", "tiny")
        tree = workloads.make_tree(workload, 3)
        assert workloads.tree_problems(workload, 3, tree) == []
        leaf = tree["leaf_00004"]
        copies = [np.array(shard.data) for shard in leaf.addressable_shards]
        copies[6].view(np.uint8)[17] ^= 1
        parts = [jax.device_put(copy, device) for copy, device in zip(copies, jax.devices())]
        tree["leaf_00004"] = jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, parts)
        (problem,) = workloads.tree_problems(workload, 3, tree)
        assert problem.startswith("leaf_00004: other bytes on") and str(jax.devices()[6]) in problem
        tree["leaf_00004"] = jax.device_put(np.asarray(leaf), jax.devices()[0])
        (problem,) = workloads.tree_problems(workload, 3, tree)
        assert problem.startswith("leaf_00004: sharding")
        """,
        devices=8,
    )


@pytest.mark.parametrize("name", ["raw-one-file", "raw-threads", "raw-threads-direct", "raw-one-file-direct"])
def test_raw_contenders_bring_back_bytes_that_fill_no_block(name: str, tmp_path: pathlib.Path) -> None:
    workload = workloads.find_workload("gpt-bfloat16", "tiny")
    assert workload.stored_bytes % contenders.DIRECT_BLOCK_BYTES
    contender = contenders.find_contender(name)
    contender.save(tmp_path / "c", contender.source(workload, 0))
    files = list((tmp_path / "c").iterdir())
    assert sum(file.stat().st_size for file in files) == workload.stored_bytes
    restored = contender.restore(tmp_path / "c", contender.target(workload, 0))
    assert contender.problems(workload, 0, restored) == []
    restored[100] ^= 1
    assert len(contender.problems(workload, 0, restored)) == 1
