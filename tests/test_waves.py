"""A restore in waves, as accelerators need it: on CPU all leaves are one wave, so that these are split by hand."""

from __future__ import annotations

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import jaxckpt
from jaxckpt._resharding import plan_reads
from jaxckpt._restoring import RestorePlan, choose_targets, match_tree, plan_restore, restore_targets

from .helpers import assert_same_tree, make_mesh

MIB = 1 << 20


def split_waves(checkpoint: jaxckpt.Checkpoint, plan: RestorePlan) -> RestorePlan:
    """Every leaf is a wave."""
    (wave,) = plan.waves
    plans = [
        plan_reads(
            checkpoint.index, [(plan.targets[number].leaf, list(plan.boxes[number]))], MIB, frozenset()
        )
        for number in wave
    ]
    return dataclasses.replace(plan, waves=[[number] for number in wave], plans=plans)


@pytest.mark.parametrize("pack_bytes_max", [0, 4 * MIB])
def test_leaves_of_several_waves_come_back(path: pathlib.Path, pack_bytes_max: int) -> None:
    mesh = make_mesh({"x": 4, "y": 2})
    tree = {
        f"{number}": jax.device_put(
            jnp.arange(number, number + 3 * 64.0 * 128).reshape(192, 128), NamedSharding(mesh, spec)
        )
        for number, spec in enumerate([PartitionSpec("x"), PartitionSpec(None, "y"), PartitionSpec()])
    }
    tree |= {"key": jax.random.key(3), "numpy": np.arange(5), "value": 7}
    jaxckpt.save(path, tree, options=jaxckpt.SaveOptions(pack_bytes_max=pack_bytes_max))
    checkpoint = jaxckpt.open(path)
    wanted = match_tree(
        checkpoint, None, None, None, missing="error", unexpected="error", cast=False, reshape=False
    )
    targets = choose_targets(checkpoint, wanted, None, None)
    whole = plan_restore(checkpoint, targets, 64 * MIB, 4)
    plan = split_waves(checkpoint, whole)
    assert len(plan.waves) == len(tree)
    restored = wanted.fill(restore_targets(checkpoint, plan, 4))
    assert_same_tree(restored, tree)
    assert sum(reads.nbytes for reads in plan.plans) >= whole.nbytes
