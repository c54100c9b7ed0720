"""Which trees are saved, and do they come back with every byte right?

A workload is a list of leaves, each with its own shape, dtype and partitioning, the mesh that they are saved
on and the mesh that they are restored on. The values of a leaf follow from a seed, the leaf's number and
nothing else, so that each process makes them again and compares them without a copy on storage.

Contenders that know no devices save and restore the same leaves as arrays on the host.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

Size = Literal["full", "quick", "tiny"]

# Values of one block. Blocks keep the cost of making 1 GiB of values far below that of writing it.
BLOCK_VALUES = 4 * 1024 * 1024

# Odd, hence no two of the first BLOCK_VALUES parts of a tree begin at the same value of the block.
PART_STRIDE = 0x9E3779B1

Partition = tuple[str | None, ...]

# Names and sizes of the axes of a mesh of devices.
Axes = tuple[tuple[str, int], ...]

ONE_DEVICE: Axes = (("x", 1),)
EIGHT_DEVICES: Axes = (("x", 8),)


@dataclasses.dataclass(frozen=True, slots=True)
class Leaf:
    """One array of a tree.

    Attributes:
        key: names of the nested dicts that lead to it, joined with "/".
        shape: of the whole array.
        dtype: "float32", "bfloat16" or "int32".
        partition: for each axis of the array the mesh axis that splits it, or None. Missing ones are None, so
            () means that every device has the whole array.
    """

    key: str
    shape: tuple[int, ...]
    dtype: str = "float32"
    partition: Partition = ()

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize

    def device_bytes(self, axes: Axes) -> int:
        """Bytes that all devices of a mesh hold together."""
        sizes = dict(axes)
        parts = math.prod(sizes[name] for name in self.partition if name is not None)
        return self.nbytes * device_count(axes) // parts


@dataclasses.dataclass(frozen=True, slots=True)
class Workload:
    """A tree that is saved and restored.

    Attributes:
        name: what `--only` takes.
        leaves: its arrays.
        save_axes: mesh that it is saved on; a process that saves has just these devices.
        restore_axes: mesh that it is restored on.
        has_small_leaves: the number of the leaves costs more than their bytes.
    """

    name: str
    leaves: tuple[Leaf, ...]
    save_axes: Axes = ONE_DEVICE
    restore_axes: Axes = ONE_DEVICE
    has_small_leaves: bool = False

    @property
    def stored_bytes(self) -> int:
        """Bytes of the distinct values: what a save has to write."""
        return sum(leaf.nbytes for leaf in self.leaves)

    @property
    def device_bytes(self) -> int:
        """Bytes that all devices hold together after a restore: what it has to fill."""
        return sum(leaf.device_bytes(self.restore_axes) for leaf in self.leaves)

    @property
    def is_resharded(self) -> bool:
        return self.save_axes != self.restore_axes

    def describe(self) -> str:
        mebibytes = self.stored_bytes / 2**20
        text = f"{mebibytes:,.0f} MiB, " if mebibytes >= 10 else f"{mebibytes:.2g} MiB, "
        text += "1 leaf" if len(self.leaves) == 1 else f"{len(self.leaves):,} leaves"
        counts = collections.Counter(leaf.dtype for leaf in self.leaves)
        if len(counts) == 1:
            text += f" of shape {self.leaves[0].shape}, {self.leaves[0].dtype}"
        else:
            text += f" ({', '.join(f'{count} {dtype}' for dtype, count in counts.most_common())})"
        text += f", {self._describe_layout()}"
        if self.is_resharded:
            text += f", restored on {describe_axes(self.restore_axes)}"
        return text

    def _describe_layout(self) -> str:
        devices = describe_axes(self.save_axes)
        if device_count(self.save_axes) == 1:
            return f"on {devices}"
        splits = {any(leaf.partition) for leaf in self.leaves}
        if splits == {False}:
            return f"replicated on {devices}"
        return f"sharded over {devices}" + (", some replicated" if False in splits else "")


def device_count(axes: Axes) -> int:
    return math.prod(size for _, size in axes)


def describe_axes(axes: Axes) -> str:
    if device_count(axes) == 1:
        return "one device"
    if len(axes) == 1:
        return f"{device_count(axes)} devices"
    return "x".join(str(size) for _, size in axes) + " devices"


def _equal_leaves(count: int, shape: tuple[int, ...], partition: Partition) -> tuple[Leaf, ...]:
    return tuple(Leaf(f"leaf_{number:05d}", shape, partition=partition) for number in range(count))


@dataclasses.dataclass(frozen=True, slots=True)
class GptSize:
    """A decoder-only transformer."""

    layers: int
    width: int
    vocabulary: int
    positions: int


def _gpt_parameters(size: GptSize) -> dict[str, tuple[tuple[int, ...], Partition]]:
    """Shapes of the parameters, and how a mesh with the axes "data" and "model" splits them.

    Kernels are split both ways (fully sharded data parallelism and tensor parallelism), as large models are;
    biases and scales are on every device. Layers are leaves of their own, not stacked.
    """
    width = size.width
    parameters: dict[str, tuple[tuple[int, ...], Partition]] = {
        "embedding/token": ((size.vocabulary, width), ("model", "data")),
        "embedding/position": ((size.positions, width), (None, "data")),
        "final_norm/scale": ((width,), ()),
        "final_norm/bias": ((width,), ()),
    }
    for layer in range(size.layers):
        block = {
            "norm_1/scale": ((width,), ()),
            "norm_1/bias": ((width,), ()),
            "attention/qkv/kernel": ((width, 3 * width), ("data", "model")),
            "attention/qkv/bias": ((3 * width,), ()),
            "attention/out/kernel": ((width, width), ("model", "data")),
            "attention/out/bias": ((width,), ()),
            "norm_2/scale": ((width,), ()),
            "norm_2/bias": ((width,), ()),
            "mlp/in/kernel": ((width, 4 * width), ("data", "model")),
            "mlp/in/bias": ((4 * width,), ()),
            "mlp/out/kernel": ((4 * width, width), ("model", "data")),
            "mlp/out/bias": ((width,), ()),
        }
        for name, parameter in block.items():
            parameters[f"layer_{layer:02d}/{name}"] = parameter
    return parameters


def _gpt_state(size: GptSize, dtype: str) -> tuple[Leaf, ...]:
    """Parameters of a dtype, Adam's two moments in float32, and its step counter."""
    leaves = [Leaf("optimizer/count", (), "int32")]
    trees = (("parameters", dtype), ("optimizer/mu", "float32"), ("optimizer/nu", "float32"))
    for prefix, leaf_dtype in trees:
        for name, (shape, partition) in _gpt_parameters(size).items():
            leaves.append(Leaf(f"{prefix}/{name}", shape, leaf_dtype, partition))
    return tuple(leaves)


@dataclasses.dataclass(frozen=True, slots=True)
class Sizes:
    """What differs between the sizes of the suite.

    Attributes:
        large: shape of one of the 16 leaves of "large".
        small_count: number of leaves of "small".
        tiny_count: number of leaves of "tiny".
        single: shape of the leaf of "single".
        gpt: the transformer.
        reshard: shape of one of the 16 leaves that are resharded.
    """

    large: tuple[int, int]
    small_count: int
    tiny_count: int
    single: tuple[int, int]
    gpt: GptSize
    reshard: tuple[int, int]


SIZES: Mapping[Size, Sizes] = {
    "full": Sizes(
        large=(4096, 4096),
        small_count=10_000,
        tiny_count=50_000,
        single=(16384, 32768),
        gpt=GptSize(layers=24, width=512, vocabulary=32_768, positions=1024),
        reshard=(4096, 2048),
    ),
    # About a sixteenth of the bytes.
    "quick": Sizes(
        large=(1024, 1024),
        small_count=625,
        tiny_count=3125,
        single=(4096, 8192),
        gpt=GptSize(layers=24, width=128, vocabulary=8192, positions=256),
        reshard=(1024, 512),
    ),
    # For tests of the suite itself.
    "tiny": Sizes(
        large=(16, 8),
        small_count=20,
        tiny_count=50,
        single=(64, 64),
        gpt=GptSize(layers=2, width=16, vocabulary=64, positions=16),
        reshard=(16, 16),
    ),
}


@functools.cache
def all_workloads(size: Size) -> tuple[Workload, ...]:
    """All workloads, in the order in which they are run."""
    sizes = SIZES[size]
    grid: Axes = (("data", 4), ("model", 2))
    return (
        Workload("large", _equal_leaves(16, sizes.large, ("x",)), EIGHT_DEVICES, EIGHT_DEVICES),
        Workload("single", _equal_leaves(1, sizes.single, ())),
        Workload("gpt-float32", _gpt_state(sizes.gpt, "float32"), grid, grid),
        Workload("gpt-bfloat16", _gpt_state(sizes.gpt, "bfloat16"), grid, grid),
        Workload(
            "small",
            _equal_leaves(sizes.small_count, (1024,), ()),
            EIGHT_DEVICES,
            EIGHT_DEVICES,
            has_small_leaves=True,
        ),
        Workload("tiny", _equal_leaves(sizes.tiny_count, (64,), ()), has_small_leaves=True),
        *(
            Workload(f"reshard-{name}", _equal_leaves(16, sizes.reshard, ("x", "y")), before, after)
            for name, before, after in (
                ("8x1-1x8", (("x", 8), ("y", 1)), (("x", 1), ("y", 8))),
                ("4x2-2x4", (("x", 4), ("y", 2)), (("x", 2), ("y", 4))),
                ("8-1", (("x", 8), ("y", 1)), (("x", 1), ("y", 1))),
                ("1-8", (("x", 1), ("y", 1)), (("x", 8), ("y", 1))),
            )
        ),
    )


def find_workload(name: str, size: Size) -> Workload:
    """Returns the workload called `name`.

    Raises:
        KeyError: no workload has that name.
    """
    for workload in all_workloads(size):
        if workload.name == name:
            return workload
    raise KeyError(name)


def leaf_values(leaf: Leaf, number: int, seed: int) -> np.ndarray:
    """Makes the values of one leaf: normal numbers, as weights are, different in every part of the tree.

    A leaf is filled with one block of random normal numbers, again and again, each time from another value of
    the block on. Parts that change places, are lost or are shifted therefore never compare equal, and the
    values compress like the normal numbers that they are. An integer takes the bits of a number.

    Args:
        leaf: which leaf.
        number: its place in the workload.
        seed: of the random numbers.
    """
    dtype = np.dtype(leaf.dtype)
    block = _random_block(seed, dtype.itemsize)
    count = math.prod(leaf.shape)
    parts = math.ceil(count / BLOCK_VALUES)
    values = np.empty(count, block.dtype)
    for part in range(parts):
        target = values[part * BLOCK_VALUES : (part + 1) * BLOCK_VALUES]
        start = (number * parts + part + 1) * PART_STRIDE % BLOCK_VALUES
        until_end = min(target.size, BLOCK_VALUES - start)
        target[:until_end] = block[start : start + until_end]
        target[until_end:] = block[: target.size - until_end]
    return values.view(dtype).reshape(leaf.shape)


@functools.lru_cache(maxsize=2)
def _random_block(seed: int, itemsize: int) -> np.ndarray:
    """The bits of BLOCK_VALUES normal numbers of 4 or 2 bytes."""
    generator = np.random.Generator(np.random.SFC64(seed))
    numbers = generator.standard_normal(BLOCK_VALUES, dtype=np.float32)
    if itemsize == 2:
        return numbers.astype("bfloat16").view(np.uint16)
    return numbers.view(np.uint32)


def nest(leaves: Sequence[Leaf], values: Sequence[Any]) -> dict[str, Any]:
    """Puts one value for each leaf into the nested dicts that the keys name."""
    tree: dict[str, Any] = {}
    for leaf, value in zip(leaves, values, strict=True):
        *folders, name = leaf.key.split("/")
        place = tree
        for folder in folders:
            place = place.setdefault(folder, {})
        place[name] = value
    return tree


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """The leaves of nested dicts by key: the opposite of `nest`."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            flat.update(flatten(value, f"{prefix}{name}/"))
        else:
            flat[prefix + name] = value
    return flat


def make_mesh(workload: Workload, axes: Axes) -> Mesh:
    """The mesh of all devices of this process.

    Raises:
        RuntimeError: the process has another number of devices than the mesh.
    """
    devices = jax.devices()
    if len(devices) != device_count(axes):
        raise RuntimeError(f"{workload.name} wants {device_count(axes)} devices, JAX made {len(devices)}")
    sizes = [size for _, size in axes]
    return Mesh(np.array(devices).reshape(sizes), [name for name, _ in axes])


def shardings(workload: Workload, axes: Axes) -> list[Sharding]:
    """The sharding of each leaf on a mesh."""
    mesh = make_mesh(workload, axes)
    known: dict[Partition, Sharding] = {}
    for leaf in workload.leaves:
        if leaf.partition not in known:
            known[leaf.partition] = NamedSharding(mesh, PartitionSpec(*leaf.partition))
    return [known[leaf.partition] for leaf in workload.leaves]


def make_tree(workload: Workload, seed: int) -> dict[str, Any]:
    """Puts the tree on the devices that it is saved from, and waits for it.

    The arrays own their memory (no view of a NumPy array), like the results of a computation.
    """
    arrays = []
    for number, sharding in enumerate(shardings(workload, workload.save_axes)):
        values = leaf_values(workload.leaves[number], number, seed)
        arrays.append(jax.block_until_ready(jax.device_put(values, sharding, may_alias=False)))
    return nest(workload.leaves, arrays)


def make_like(workload: Workload) -> dict[str, Any]:
    """The abstract tree with the shardings that it is restored with."""
    wanted = [
        jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
        for leaf, sharding in zip(workload.leaves, shardings(workload, workload.restore_axes), strict=True)
    ]
    return nest(workload.leaves, wanted)


def make_host_arrays(workload: Workload, seed: int) -> dict[str, np.ndarray]:
    """The leaves by key, as NumPy arrays that own their memory."""
    return {leaf.key: leaf_values(leaf, number, seed) for number, leaf in enumerate(workload.leaves)}


def make_payload(workload: Workload, seed: int, out: np.ndarray) -> None:
    """Fills `out` (uint8) with the bytes of all leaves, one after the other."""
    start = 0
    for number, leaf in enumerate(workload.leaves):
        out[start : start + leaf.nbytes] = _bytes_of(leaf_values(leaf, number, seed))
        start += leaf.nbytes


def tree_problems(workload: Workload, seed: int, tree: Any) -> list[str]:
    """Compares every shard on every device with the source; says what differs."""
    flat = flatten(tree) if isinstance(tree, dict) else {}
    if flat.keys() != {leaf.key for leaf in workload.leaves}:
        return ["the tree has other keys"]
    problems = []
    wanted_shardings = shardings(workload, workload.restore_axes)
    for number, leaf in enumerate(workload.leaves):
        array = flat[leaf.key]
        if not isinstance(array, jax.Array):
            problems.append(f"{leaf.key}: {type(array).__name__}, not a jax.Array")
            continue
        if array.shape != leaf.shape or array.dtype != leaf.dtype:
            problems.append(f"{leaf.key}: shape {array.shape}, dtype {array.dtype}")
            continue
        if not array.sharding.is_equivalent_to(wanted_shardings[number], array.ndim):
            problems.append(f"{leaf.key}: sharding {array.sharding}")
            continue
        wanted = leaf_values(leaf, number, seed)
        problems += [
            f"{leaf.key}: other bytes on {shard.device}"
            for shard in array.addressable_shards
            if not _is_same(np.asarray(shard.data), wanted[shard.index])
        ]
    return problems


def host_problems(workload: Workload, seed: int, arrays: Mapping[str, np.ndarray]) -> list[str]:
    """Compares NumPy arrays by key with the source; says what differs."""
    if arrays.keys() != {leaf.key for leaf in workload.leaves}:
        return ["other keys"]
    problems = []
    for number, leaf in enumerate(workload.leaves):
        array = arrays[leaf.key]
        if array.shape != leaf.shape or array.dtype != leaf.dtype:
            problems.append(f"{leaf.key}: shape {array.shape}, dtype {array.dtype}")
        elif not _is_same(array, leaf_values(leaf, number, seed)):
            problems.append(f"{leaf.key}: other bytes")
    return problems


def payload_problems(workload: Workload, seed: int, payload: np.ndarray) -> list[str]:
    """Compares bytes as `make_payload` made them with the source; says what differs."""
    if payload.size != workload.stored_bytes:
        return [f"{payload.size} bytes, not {workload.stored_bytes}"]
    problems = []
    start = 0
    for number, leaf in enumerate(workload.leaves):
        wanted = _bytes_of(leaf_values(leaf, number, seed))
        if not np.array_equal(payload[start : start + leaf.nbytes], wanted):
            problems.append(f"{leaf.key}: other bytes")
        start += leaf.nbytes
    return problems


def _bytes_of(array: np.ndarray) -> np.ndarray:
    return array.reshape(-1).view(np.uint8)


def _is_same(got: np.ndarray, wanted: np.ndarray) -> bool:
    """Bit for bit: as integers, so that no NaN and no negative zero is lost in the comparison."""
    bits = np.dtype(f"uint{got.dtype.itemsize * 8}")
    return got.shape == wanted.shape and np.array_equal(got.view(bits), wanted.view(bits))
