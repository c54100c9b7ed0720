"""How is a sharding kept as plain data, and which sharding does a leaf get on other devices?

1. `describe_sharding` turns a sharding into a dict of names and numbers. Device ids in it are hints.
2. `rebuild_sharding` makes it again: on the same devices if their ids are there, else on the first devices of the
   machine, else on a smaller mesh: axes shrink, the first axis first, to divisors of their size, so that whatever
   was divisible stays divisible. With one device it is that device. It never fails for want of devices.
3. `fit_to_mesh` puts a saved partition spec on a mesh of the caller's: axes that the mesh lacks are dropped, and a
   dimension that no longer divides falls back to fewer axes.
4. `shard_boxes` lists the distinct boxes of an array under a sharding, with the devices that hold each.
5. `map_shards` says for every device of every process which shard it holds. A large job has many thousands of
   devices and leaves, so it counts with arrays, and leaves with equal specs share theirs.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
from collections.abc import Sequence
from typing import Any, TypeGuard

import jax
import numpy as np
from jax.sharding import (
    AbstractMesh,
    AxisType,
    Mesh,
    NamedSharding,
    PartitionSpec,
    Sharding,
    SingleDeviceSharding,
)

_log = logging.getLogger("jaxckpt")

# jax.Device is no class to type checkers.
Device = Any

# A half-open box [lo, hi) of an array.
Box = tuple[tuple[int, ...], tuple[int, ...]]


@functools.lru_cache(maxsize=4096)
def describe_sharding(sharding: Sharding) -> dict[str, Any]:
    """Plain data that says what the sharding is. Callers must not change it."""
    if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh):
        mesh = sharding.mesh
        if all(isinstance(name, str) for name in mesh.axis_names):
            return _describe_named(
                sharding, _special_memory_kind(sharding), [int(device.id) for device in mesh.devices.flat]
            )
    if isinstance(sharding, SingleDeviceSharding):
        (device,) = sharding.device_set
        return {"type": "single", "device_id": int(device.id), "memory_kind": _special_memory_kind(sharding)}
    return {"type": "opaque", "text": repr(sharding)[:500], "memory_kind": _special_memory_kind(sharding)}


def _describe_named(
    sharding: NamedSharding, memory_kind: str | None, device_ids: list[int] | None
) -> dict[str, Any]:
    mesh, spec = sharding.mesh, sharding.spec
    descriptor: dict[str, Any] = {
        "type": "named",
        "axes": [[name, int(size)] for name, size in mesh.shape.items()],
        "axis_types": [axis_type.name for axis_type in mesh.axis_types],
        "spec": [_describe_dimension(entry) for entry in spec.partitions],
        "memory_kind": memory_kind,
        "device_ids": device_ids,
    }
    if spec.reduced:
        descriptor["reduced"] = sorted(spec.reduced)
    return descriptor


def format_sharding(descriptor: dict[str, Any] | None) -> str:
    """One short line for people: ``P('data', None) on data=4,model=2``."""
    if descriptor is None:
        return ""
    suffix = f" in {descriptor['memory_kind']}" if descriptor["memory_kind"] else ""
    if descriptor["type"] == "named":
        dimensions = []
        for entry in descriptor["spec"]:
            names = [repr(name) for name in entry] if isinstance(entry, list) else [str(entry)]
            dimensions.append(names[0] if len(names) == 1 else f"({', '.join(names)})")
        if descriptor.get("reduced"):
            dimensions.append(f"reduced={{{', '.join(map(repr, descriptor['reduced']))}}}")
        axes = ",".join(f"{name}={size}" for name, size in descriptor["axes"])
        return f"P({', '.join(dimensions)}) on {axes}{suffix}"
    if descriptor["type"] == "single":
        return f"device {descriptor['device_id']}{suffix}"
    return str(descriptor.get("text", "opaque"))


def rebuild_sharding(descriptor: dict[str, Any], shape: tuple[int, ...]) -> Sharding:
    """The saved sharding on the devices of this process, or the nearest one that they allow.

    Args:
      descriptor: From `describe_sharding`.
      shape: Shape of the array, which decides what still divides.
    """
    devices = jax.devices()
    if descriptor["type"] != "named":
        # In a group of processes each has such an array for itself.
        local = jax.local_devices()
        same = [device for device in local if device.id == descriptor.get("device_id")]
        return _with_memory_kind(
            SingleDeviceSharding((same or [default_device()])[0]), descriptor["memory_kind"]
        )
    if len(devices) == 1 and math.prod(size for _, size in descriptor["axes"]) > 1:
        return _with_memory_kind(SingleDeviceSharding(devices[0]), descriptor["memory_kind"])
    mesh = _rebuild_mesh(
        tuple((name, size) for name, size in descriptor["axes"]),
        tuple(descriptor["axis_types"]),
        tuple(descriptor["device_ids"] or ()),
        tuple(devices),
    )
    return _with_memory_kind(_fit(descriptor, mesh, shape), descriptor["memory_kind"])


def give_devices(sharding: Sharding, saved: dict[str, Any] | None, shape: tuple[int, ...]) -> Sharding:
    """The sharding itself, or for one on an abstract mesh, which has no devices, the same on real ones.

    `jax.eval_shape` gives such shardings where axes are explicit. The devices are those of the mesh that is set
    (`jax.set_mesh`) if it is this one, else those that held the saved array on equal axes, else the first ones.

    Args:
      sharding: Any sharding.
      saved: Descriptor of the saved sharding, or None.
      shape: Shape of the array.
    """
    if not (isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, AbstractMesh)):
        return sharding
    mesh = jax.sharding.get_mesh()
    if mesh.abstract_mesh == sharding.mesh:
        return NamedSharding(mesh, sharding.spec, memory_kind=sharding.memory_kind)
    descriptor = _describe_named(sharding, sharding.memory_kind, None)
    if saved is not None and saved.get("axes") == descriptor["axes"]:
        descriptor["device_ids"] = saved["device_ids"]
    return rebuild_sharding(descriptor, shape)


def fit_to_mesh(
    descriptor: dict[str, Any] | None, mesh: Mesh, shape: tuple[int, ...]
) -> tuple[Sharding, str | None]:
    """The saved partition spec on another mesh; replicated when there was none. And what to log if it does not divide.

    Args:
      descriptor: From `describe_sharding`, or None.
      mesh: The caller's mesh.
      shape: Shape of the array.
    """
    if descriptor is None:
        return NamedSharding(mesh, PartitionSpec()), None
    if descriptor["type"] != "named":
        return _with_memory_kind(NamedSharding(mesh, PartitionSpec()), descriptor["memory_kind"]), None
    sharding = _fit(descriptor, mesh, shape)
    wanted = [_known_axes(entry, mesh) for entry in descriptor["spec"]]
    got = [_axes_of(entry) for entry in sharding.spec.partitions]
    got += [[]] * (len(wanted) - len(got))
    retreat = None
    if wanted != got:
        retreat = f"shape {shape} does not divide over {wanted}; sharded as {sharding.spec}"
    return _with_memory_kind(sharding, descriptor["memory_kind"]), retreat


def default_device() -> Device:
    """The device that new arrays go to."""
    chosen: Any = jax.config.values.get("jax_default_device")
    if chosen is None:
        return jax.local_devices()[0]
    return jax.local_devices(backend=chosen)[0] if isinstance(chosen, str) else chosen


@functools.lru_cache(maxsize=4096)
def shard_boxes(sharding: Sharding, shape: tuple[int, ...]) -> dict[Box, list[Device]]:
    """Distinct boxes of the array that this process's devices hold, each with those devices."""
    boxes: dict[Box, list[Device]] = {}
    for device, box in local_boxes(sharding, shape):
        boxes.setdefault(box, []).append(device)
    return boxes


def local_boxes(sharding: Sharding, shape: tuple[int, ...]) -> list[tuple[Device, Box]]:
    """This process's devices in the order of an array's own shards, each with the box that it holds."""
    if sharding.is_fully_addressable or not _is_on_mesh(sharding):
        indices = sharding.addressable_devices_indices_map(shape)
        return [(device, box_of(index, shape)) for device, index in indices.items()]
    # jax would make the slices of all devices of all processes, and keep them.
    shards = map_shards(sharding, shape)
    boxes: list[tuple[Device, Box]] = []
    for number, device in _local_devices(sharding.mesh):
        place = np.unravel_index(int(shards.shards[number]), shards.grid) if shards.grid else ()
        lo = tuple(int(at) * size for at, size in zip(place, shards.shard_shape, strict=True))
        hi = tuple(start + size for start, size in zip(lo, shards.shard_shape, strict=True))
        boxes.append((device, (lo, hi)))
    return boxes


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class ShardMap:
    """Which devices and processes hold which shard of an array.

    Attributes:
      shard_shape: Shape of every shard.
      grid: Number of distinct shards along each axis; 1 where the array has size 0.
      shards: int64[devices]: for each device, in the order of the sharding, the number of its shard in C order of
        the grid. Read-only, and shared by maps that number alike.
      processes: int32[devices]: process index of each device. Read-only, and shared by maps of one mesh.
    """

    shard_shape: tuple[int, ...]
    grid: tuple[int, ...]
    shards: np.ndarray[Any, Any]
    processes: np.ndarray[Any, Any]


def is_own_sharding(sharding: Sharding) -> bool:
    """Whether an array with this sharding is one that each process of a group has for itself.

    It is if it lies on a single device of this process. On a mesh it is one array for all, even if all devices of the
    mesh belong to this process: the others have none of it, and call it by the same sharding.
    """
    if not sharding.is_fully_addressable:
        return False
    return isinstance(sharding, SingleDeviceSharding) or jax.process_count() == 1


@functools.lru_cache(maxsize=4096)
def map_shards(sharding: Sharding, shape: tuple[int, ...]) -> ShardMap:
    """The shard of every device of the sharding, those of other processes included.

    Args:
      sharding: Any sharding that has devices and divides the shape.
      shape: Shape of the array.
    """
    if _is_on_mesh(sharding):
        mesh = sharding.mesh
        numbered = named_shards(tuple(mesh.shape.items()), sharding.spec.partitions, shape)
        return ShardMap(*numbered, _processes_of(mesh))
    shard_shape = sharding.shard_shape(shape)
    grid = tuple(size // part if part else 1 for size, part in zip(shape, shard_shape, strict=True))
    indices = sharding.devices_indices_map(shape)
    corners = np.array([box_of(index, shape)[0] for index in indices.values()], np.int64)
    places = corners.reshape(len(indices), len(shape)) // np.maximum(np.array(shard_shape, np.int64), 1)
    shards = places @ np.array(_strides_of(grid), np.int64)
    processes = np.array([device.process_index for device in indices], np.int32)
    return ShardMap(shard_shape, grid, _read_only(shards), _read_only(processes))


def _is_on_mesh(sharding: Sharding) -> TypeGuard[NamedSharding]:
    """Whether the mesh and the partition spec say where everything is."""
    return (
        isinstance(sharding, NamedSharding)
        and isinstance(sharding.mesh, Mesh)
        and not sharding.spec.unreduced
    )


def named_shards(
    axes: tuple[tuple[str, int], ...], spec: Sequence[Any], shape: tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[int, ...], np.ndarray[Any, Any]]:
    """Shard shape, grid and shard numbers of an array that a partition spec lays over a mesh.

    Args:
      axes: Name and size of each axis of the mesh.
      spec: Entries of the partition spec; axes that they do not name replicate.
      shape: Shape of the array, which the spec divides.
    """
    sizes = dict(axes)
    entries = [_axes_of(entry) if size else [] for entry, size in zip(spec, shape, strict=False)]
    entries += [[]] * (len(shape) - len(entries))
    grid = tuple(math.prod(sizes[name] for name in names) for names in entries)
    # How far the shard's number moves with one step along each axis of the mesh. Of the axes that cut one dimension
    # the last one moves fastest.
    steps = dict.fromkeys(sizes, 0)
    for names, stride in zip(entries, _strides_of(grid), strict=True):
        step = stride
        for name in reversed(names):
            steps[name] = step
            step *= sizes[name]
    shard_shape = tuple(size // count for size, count in zip(shape, grid, strict=True))
    return shard_shape, grid, _number_devices(tuple(sizes.values()), tuple(steps.values()))


@functools.lru_cache(maxsize=256)
def _number_devices(sizes: tuple[int, ...], steps: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """For each device of a mesh, in C order, the sum of its places along the axes times their steps."""
    numbers = np.zeros(sizes, np.int64)
    for axis, (size, step) in enumerate(zip(sizes, steps, strict=True)):
        numbers += (np.arange(size) * step).reshape(-1, *(1,) * (len(sizes) - 1 - axis))
    return _read_only(numbers.reshape(-1))


@functools.lru_cache(maxsize=64)
def _processes_of(mesh: Mesh) -> np.ndarray[Any, Any]:
    return _read_only(np.array([device.process_index for device in mesh.devices.flat], np.int32))


@functools.lru_cache(maxsize=64)
def _local_devices(mesh: Mesh) -> list[tuple[int, Device]]:
    """The devices of a mesh that are this process's, each with its number in C order."""
    return [
        (number, device)
        for number, device in enumerate(mesh.devices.flat)
        if device.process_index == device.client.process_index()
    ]


def _strides_of(grid: tuple[int, ...]) -> list[int]:
    return [math.prod(grid[axis + 1 :]) for axis in range(len(grid))]


def _read_only(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    array.flags.writeable = False
    return array


def box_of(index: tuple[slice, ...] | None, shape: tuple[int, ...]) -> Box:
    """The box that a tuple of slices selects."""
    if index is None:
        return (0,) * len(shape), shape
    lo = tuple(0 if part.start is None else int(part.start) for part in index)
    hi = tuple(size if part.stop is None else int(part.stop) for part, size in zip(index, shape, strict=True))
    return lo, hi


def _describe_dimension(entry: Any) -> Any:
    if entry is None:
        return None
    if entry is PartitionSpec.UNCONSTRAINED:
        return "unconstrained"
    return list(entry) if isinstance(entry, tuple) else [entry]


def _special_memory_kind(sharding: Sharding) -> str | None:
    """The memory kind where it is not the device's default, which differs between backends and versions."""
    device = next(iter(sharding.device_set))
    return None if sharding.memory_kind in (None, device.default_memory().kind) else sharding.memory_kind


def _with_memory_kind(sharding: Sharding, memory_kind: str | None) -> Sharding:
    if memory_kind is None:
        return sharding
    device = next(iter(sharding.device_set))
    if memory_kind not in {memory.kind for memory in device.addressable_memories()}:
        _log.info("memory kind %s does not exist on %s; the default is used", memory_kind, device.platform)
        return sharding
    return sharding.with_memory_kind(memory_kind)


@functools.lru_cache(maxsize=64)
def _rebuild_mesh(
    axes: tuple[tuple[str, int], ...],
    axis_types: tuple[str, ...],
    device_ids: tuple[int, ...],
    devices: tuple[Device, ...],
) -> Mesh:
    names = tuple(name for name, _ in axes)
    sizes = shrink_axes([size for _, size in axes], len(devices))
    by_id = {device.id: device for device in devices}
    if math.prod(sizes) == len(device_ids) and all(number in by_id for number in device_ids):
        chosen = [by_id[number] for number in device_ids]
    else:
        chosen = list(devices[: math.prod(sizes)])
    if sizes != [size for _, size in axes]:
        _log.info("the saved mesh %s does not fit %d devices; using %s", dict(axes), len(devices), sizes)
    grid = np.array(chosen, dtype=object).reshape(sizes)
    # Axes are manual inside of `jax.shard_map` only, where arrays have no sharding that could be given to others.
    kinds = ["Auto" if kind == "Manual" else kind for kind in axis_types]
    return Mesh(grid, names, axis_types=tuple(AxisType[kind] for kind in kinds))


def shrink_axes(sizes: list[int], device_count: int) -> list[int]:
    """Mesh axes that fit the devices: the first axis shrinks first, always to a divisor of itself."""
    shrunk = list(sizes)
    for axis, size in enumerate(sizes):
        rest = math.prod(shrunk[:axis] + shrunk[axis + 1 :])
        room = max(1, device_count // rest)
        if size > room:
            shrunk[axis] = max(divisor for divisor in range(1, room + 1) if size % divisor == 0)
    return shrunk


def _fit(descriptor: dict[str, Any], mesh: Mesh, shape: tuple[int, ...]) -> NamedSharding:
    """The spec on the mesh, each dimension with as many of its axes, from the left, as divide it."""
    entries: list[Any] = []
    for entry, size in zip(descriptor["spec"], shape, strict=False):
        axes = _known_axes(entry, mesh)
        while axes and size % math.prod(mesh.shape[name] for name in axes):
            axes.pop()
        if not axes:
            entries.append(None)
        else:
            entries.append(axes[0] if len(axes) == 1 else tuple(axes))
    axis_types = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    reduced = [name for name in descriptor.get("reduced", ()) if axis_types.get(name) is AxisType.Explicit]
    return NamedSharding(mesh, PartitionSpec(*entries, reduced=frozenset(reduced)))


def _known_axes(entry: Any, mesh: Mesh) -> list[str]:
    return [name for name in entry if name in mesh.shape] if isinstance(entry, list) else []


def _axes_of(entry: Any) -> list[str]:
    if entry is None or entry is PartitionSpec.UNCONSTRAINED:
        return []
    return list(entry) if isinstance(entry, tuple) else [entry]
