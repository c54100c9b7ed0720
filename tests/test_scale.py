"""A job of thousands of processes, planned and described on this machine with plain objects for its devices.

The figures are those of `benchmarks.scale`, which prints more of them, and how they grow.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxckpt._shardings import box_of, local_boxes, map_shards

from .helpers import run_fork

scale: Any = pytest.importorskip("benchmarks.scale")

PROCESSES, DEVICES, LEAVES = 4096, 4, 1000
MIB_MAX = {"plan_mib": 500, "encode_mib": 500, "decode_mib": 500, "mib": 64}
SECONDS_MAX = {"plan_s": 5, "encode_s": 2, "decode_s": 2, "part_s": 2, "rows_s": 5}


@pytest.mark.slow
@pytest.mark.parametrize("workload", ["sharded", "hsdp", "large", "mixed"])
def test_the_plan_and_the_manifest_of_4096_processes_stay_within_their_bounds(workload: str) -> None:
    arguments = [workload, PROCESSES, DEVICES, LEAVES, 0]
    result = run_fork("from benchmarks.scale import main; main()", "--row", *arguments)
    figures = json.loads(result.stdout)
    bounds = MIB_MAX | SECONDS_MAX
    assert {name: figures[name] for name, most in bounds.items() if figures[name] > most} == {}
    if workload == "sharded":
        assert figures["chunks"] == PROCESSES * DEVICES * LEAVES
    assert figures["balance"] < 1.2


@settings(max_examples=60, derandomize=True, deadline=None)
@given(st.data())
def test_the_boxes_of_this_process_are_those_that_jax_says_in_the_same_order(data: st.DataObject) -> None:
    process = data.draw(st.integers(0, 3))
    devices = scale.make_devices(4, 3, process)[data.draw(st.permutations(range(12)))]
    shape = data.draw(st.sampled_from([(12,), (3, 4), (2, 6), (2, 3, 2)]))
    names = tuple("abc"[: len(shape)])
    mesh = Mesh(devices.reshape(shape), names)
    first = data.draw(st.lists(st.sampled_from(names), unique=True))
    rest = [name for name in names if name not in first]
    second = data.draw(st.lists(st.sampled_from(rest), unique=True)) if rest else []
    sharding = NamedSharding(mesh, PartitionSpec(tuple(first) or None, None, tuple(second) or None))
    array_shape = (data.draw(st.sampled_from([0, 12, 24])), 5, data.draw(st.sampled_from([0, 12])))
    indices = sharding.addressable_devices_indices_map(array_shape)
    assert len(indices) == 3
    wanted = [(device.id, box_of(index, array_shape)) for device, index in indices.items()]
    assert [(device.id, box) for device, box in local_boxes(sharding, array_shape)] == wanted
    assert np.all(map_shards(sharding, array_shape).processes == [device.process_index for device in devices])
