"""Which trees are saved, and do they come back with every byte right?

The values of a leaf follow from a seed, the leaf's number and nothing else, so that each process makes them
again and compares them without a copy on storage.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

ITEM_BYTES = np.dtype(np.float32).itemsize

# Values of one block. Blocks keep the cost of making 1 GiB of values far below that of writing it.
BLOCK_VALUES = 4 * 1024 * 1024

MANTISSA_BITS = 23

# Odd, hence a permutation of the numbers below 2**23: no two parts of a tree get the same mask.
MASK_STRIDE = 0x9E3779B1


@dataclasses.dataclass(frozen=True)
class Workload:
    """A tree of equal float32 leaves.

    Attributes:
        name: what `--only` takes.
        leaf_count: number of leaves.
        leaf_shape: shape of each.
        device_count: CPU devices that JAX is told to make.
        is_replicated: each leaf whole on every device, instead of split along its first axis.
        slow_repeat_max: repetitions for contenders that need minutes for it; None for no such limit.
    """

    name: str
    leaf_count: int
    leaf_shape: tuple[int, ...]
    device_count: int
    is_replicated: bool = False
    slow_repeat_max: int | None = None

    @property
    def leaf_bytes(self) -> int:
        return math.prod(self.leaf_shape) * ITEM_BYTES

    @property
    def stored_bytes(self) -> int:
        """Bytes of the distinct values: what a save has to write."""
        return self.leaf_count * self.leaf_bytes

    @property
    def device_bytes(self) -> int:
        """Bytes that all devices hold together: what a restore has to fill."""
        copies = self.device_count if self.is_replicated else 1
        return self.stored_bytes * copies

    def describe(self) -> str:
        layout = "replicated on" if self.is_replicated else "sharded over"
        devices = "one device" if self.device_count == 1 else f"{self.device_count} devices"
        if self.device_count == 1:
            layout = "on"
        leaves = "1 leaf" if self.leaf_count == 1 else f"{self.leaf_count:,} leaves"
        size = f"{self.stored_bytes / 2**20:,.0f} MiB float32"
        return f"{size}, {leaves} of shape {self.leaf_shape}, {layout} {devices}"


FULL_SIZE = (
    Workload("large", leaf_count=16, leaf_shape=(4096, 4096), device_count=8),
    Workload(
        "small", leaf_count=10_000, leaf_shape=(1024,), device_count=8, is_replicated=True, slow_repeat_max=2
    ),
    Workload("single", leaf_count=1, leaf_shape=(16384, 16384), device_count=1),
)

# A sixteenth of the bytes of each.
QUICK_SIZE = (
    dataclasses.replace(FULL_SIZE[0], leaf_shape=(1024, 1024)),
    dataclasses.replace(FULL_SIZE[1], leaf_count=625),
    dataclasses.replace(FULL_SIZE[2], leaf_shape=(4096, 4096)),
)


def all_workloads(*, quick: bool) -> tuple[Workload, ...]:
    return QUICK_SIZE if quick else FULL_SIZE


def find_workload(name: str, *, quick: bool) -> Workload:
    """Returns the workload called `name`.

    Raises:
        KeyError: no workload has that name.
    """
    for workload in all_workloads(quick=quick):
        if workload.name == name:
            return workload
    raise KeyError(name)


def leaf_key(index: int) -> str:
    return f"leaf_{index:05d}"


def leaf_values(workload: Workload, seed: int, index: int) -> np.ndarray:
    """Makes the values of one leaf: normal numbers, as weights are, different in every part of the tree.

    A leaf is filled with one block of random normal numbers, again and again, each time with another mask
    over the mantissas. Parts that change places, are lost or are shifted therefore never compare equal, and
    the values compress like the normal numbers that they are.
    """
    count = math.prod(workload.leaf_shape)
    block = _random_block(seed, min(count, BLOCK_VALUES))
    parts = math.ceil(count / BLOCK_VALUES)
    bits = np.empty(count, np.uint32)
    for part in range(parts):
        mask = ((index * parts + part + 1) * MASK_STRIDE) % 2**MANTISSA_BITS
        target = bits[part * BLOCK_VALUES : (part + 1) * BLOCK_VALUES]
        np.bitwise_xor(block[: target.size], np.uint32(mask), out=target)
    return bits.view(np.float32).reshape(workload.leaf_shape)


@functools.lru_cache(maxsize=1)
def _random_block(seed: int, count: int) -> np.ndarray:
    generator = np.random.Generator(np.random.SFC64(seed))
    return generator.standard_normal(count, dtype=np.float32).view(np.uint32)


def _sharding(workload: Workload) -> Sharding:
    devices = jax.devices()
    if len(devices) != workload.device_count:
        raise RuntimeError(f"{workload.name} wants {workload.device_count} devices, JAX made {len(devices)}")
    if workload.device_count == 1:
        return SingleDeviceSharding(devices[0])
    mesh = Mesh(np.array(devices), ("x",))
    spec = PartitionSpec() if workload.is_replicated else PartitionSpec("x")
    return NamedSharding(mesh, spec)


def make_tree(workload: Workload, seed: int) -> dict[str, jax.Array]:
    """Puts the tree on its devices and waits for it.

    The arrays own their memory (no view of a NumPy array), like the results of a computation.
    """
    sharding = _sharding(workload)
    tree = {}
    for index in range(workload.leaf_count):
        values = leaf_values(workload, seed, index)
        tree[leaf_key(index)] = jax.block_until_ready(jax.device_put(values, sharding, may_alias=False))
    return tree


def make_like(workload: Workload) -> dict[str, jax.ShapeDtypeStruct]:
    """The abstract tree with the shardings that the tree was saved with."""
    sharding = _sharding(workload)
    leaf = jax.ShapeDtypeStruct(workload.leaf_shape, np.float32, sharding=sharding)
    return {leaf_key(index): leaf for index in range(workload.leaf_count)}


def make_payload(workload: Workload, seed: int, out: np.ndarray) -> None:
    """Fills `out` (uint8) with the bytes of all leaves, one after the other."""
    for index in range(workload.leaf_count):
        target = out[index * workload.leaf_bytes : (index + 1) * workload.leaf_bytes]
        target[:] = leaf_values(workload, seed, index).reshape(-1).view(np.uint8)


def tree_problems(workload: Workload, seed: int, tree: Any) -> list[str]:
    """Compares every shard on every device with the source; says what differs."""
    sharding = _sharding(workload)
    keys = [leaf_key(index) for index in range(workload.leaf_count)]
    if not isinstance(tree, dict) or sorted(tree) != keys:
        return ["the tree has other keys"]
    problems = []
    for index, key in enumerate(keys):
        leaf = tree[key]
        if not isinstance(leaf, jax.Array):
            problems.append(f"{key}: {type(leaf).__name__}, not a jax.Array")
            continue
        if leaf.shape != workload.leaf_shape or leaf.dtype != np.float32:
            problems.append(f"{key}: shape {leaf.shape}, dtype {leaf.dtype}")
            continue
        if not leaf.sharding.is_equivalent_to(sharding, leaf.ndim):
            problems.append(f"{key}: sharding {leaf.sharding}")
            continue
        wanted = leaf_values(workload, seed, index).view(np.uint32)
        for shard in leaf.addressable_shards:
            got = np.asarray(shard.data).view(np.uint32)
            if not np.array_equal(got, wanted[shard.index]):
                problems.append(f"{key}: other bytes on {shard.device}")
    return problems


def payload_problems(workload: Workload, seed: int, payload: np.ndarray) -> list[str]:
    """Compares bytes as `make_payload` made them with the source; says what differs."""
    if payload.size != workload.stored_bytes:
        return [f"{payload.size} bytes, not {workload.stored_bytes}"]
    problems = []
    for index in range(workload.leaf_count):
        got = payload[index * workload.leaf_bytes : (index + 1) * workload.leaf_bytes]
        wanted = leaf_values(workload, seed, index).reshape(-1).view(np.uint8)
        if not np.array_equal(got, wanted):
            problems.append(f"{leaf_key(index)}: other bytes")
    return problems
