"""How does a restore decide what each leaf becomes, and carry it out?

1. `match_tree` pairs saved leaves with the places of the wanted tree (`_matching`).
2. `choose_targets` gives every array its sharding, the first that applies of: ``sharding=``, ``mesh=``, ``like``'s,
   the saved one.
3. `restore_targets` checks that all objects are there and whole in length, then reads, verifies and places the
   leaves: all at once on CPU, where the bytes on the host are the arrays, else in waves that fit the host memory.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, Sharding

from ._collective import Outline, outline_sharding
from ._config import PIECE_BYTES
from ._errors import MismatchError, Problem, list_problems
from ._keys import PRUNED, flatten, nested_dicts, rebuild
from ._manifest import LeafSpec, Manifest, StoredObject, decode_value
from ._matching import (
    Match,
    Rename,
    Select,
    is_key_selected,
    key_dtype,
    match_leaves,
    rename_keys,
    select_keys,
)
from ._placement import Target, boxes_of, is_fortran, place
from ._reading import Checkpoint
from ._resharding import Destination, ReadExecutor, ReadPlan, plan_reads
from ._shardings import Box, fit_to_mesh, give_devices, is_own_sharding, rebuild_sharding
from ._store import allocate_aligned
from ._zarr import METADATA_NAME


@dataclasses.dataclass(frozen=True, slots=True)
class RestoreReport:
    """What a restore did.

    Attributes:
      path: Where the checkpoint is.
      restored: Keys (as they are called in the result) of the leaves that came from storage.
      kept: Keys that kept the leaf of ``like``.
      ignored: Saved keys that were left out.
      cast: Keys whose dtype was converted.
      nbytes: Bytes of the restored arrays, as saved.
      bytes_read: Bytes that were asked of storage, manifest and metadata included.
      seconds: Seconds that it took.
      group_bytes_read: The same as `bytes_read`, of all processes of the group together.
    """

    path: str
    restored: tuple[str, ...]
    kept: tuple[str, ...]
    ignored: tuple[str, ...]
    cast: tuple[str, ...]
    nbytes: int
    bytes_read: int
    seconds: float
    group_bytes_read: int


def is_cast(checkpoint: Checkpoint, target: Target) -> bool:
    spec = checkpoint.manifest.spec(target.leaf)
    if spec.kind == "value":
        value = decode_value(checkpoint.manifest.values[target.leaf])
        return target.kind != "value" or target.python_type not in (None, type(value))
    return target.kind == "value" or (target.dtype is not None and target.dtype != spec.np_dtype)


@dataclasses.dataclass(frozen=True, eq=False)
class WantedTree:
    """The tree to make: a match for each of its leaves, and how leaves become the tree."""

    keys: tuple[str, ...]
    matches: list[Match]
    unflatten: Callable[[Sequence[Any]], Any]
    ignored: tuple[str, ...]


def match_tree(
    checkpoint: Checkpoint,
    like: Any,
    select: Select,
    rename: Rename,
    *,
    missing: str,
    unexpected: str,
    cast: bool,
    reshape: bool,
) -> WantedTree:
    manifest = checkpoint.manifest
    is_selected = select_keys(manifest.keys, select)
    renamed = rename_keys(manifest.keys, is_selected, rename)
    selected = {key: leaf for leaf, key in enumerate(renamed) if is_selected[leaf]}
    if like is None:
        return _whole_tree(manifest, selected, is_nested=rename is not None)
    flat = flatten(like)
    unselected = [key for leaf, key in enumerate(renamed) if not is_selected[leaf]]
    unselected += [key for key in flat.keys if not is_key_selected(key, select)]
    matches = match_leaves(
        manifest,
        selected,
        unselected,
        flat.keys,
        flat.leaves,
        missing=missing,
        unexpected=unexpected,
        cast=cast,
        reshape=reshape,
        path=checkpoint.path,
    )
    taken = {match.leaf for match in matches}
    ignored = tuple(key for leaf, key in enumerate(manifest.keys) if leaf not in taken)
    return WantedTree(flat.keys, matches, flat.unflatten, ignored)


def _whole_tree(manifest: Manifest, selected: dict[str, int], *, is_nested: bool) -> WantedTree:
    """All selected leaves, in the saved structure, or in nested dicts when keys were renamed."""
    taken = set(selected.values())
    ignored = tuple(key for leaf, key in enumerate(manifest.keys) if leaf not in taken)
    if is_nested:
        nested_dicts(list(selected), list(selected))  # raises now rather than after everything was read

    def unflatten(leaves: Sequence[Any]) -> Any:
        if is_nested:
            return nested_dicts(list(selected), leaves)
        places: list[Any] = [PRUNED] * len(manifest.keys)
        for leaf, value in zip(selected.values(), leaves, strict=True):
            places[leaf] = value
        return rebuild(manifest.nodes, places)

    return WantedTree(tuple(selected), [Match(leaf) for leaf in selected.values()], unflatten, ignored)


def choose_targets(
    checkpoint: Checkpoint, wanted: WantedTree, mesh: Mesh | None, sharding: Any
) -> dict[int, Target]:
    """For each leaf of the wanted tree that comes from storage, by its number, what it shall be."""
    rule = _sharding_rule(wanted, sharding)
    targets: dict[int, Target] = {}
    problems: list[Problem] = []
    misfits: list[Problem] = []
    for number, match in enumerate(wanted.matches):
        if match.leaf is None:
            continue
        key = wanted.keys[number]
        target = _choose_target(checkpoint.manifest, key, number, match, mesh, rule)
        targets[number] = target
        if target.sharding is not None:
            misfits.extend(_sharding_problems(key, _logical_shape(target), target.sharding))
        if target.kind == "array" and target.dtype is not None and not _jax_has(target.dtype):
            message = f"dtype {target.dtype} on disk, which JAX has only with jax_enable_x64"
            problems.append(Problem(key, "dtype", message))
    if misfits:
        headline = (
            f"cannot restore {checkpoint.path!r}: the shardings asked for do not fit {len(misfits)} leaves"
        )
        advice = ["mesh= takes the saved partition specs, and drops the axes that do not divide"]
        raise MismatchError(list_problems(headline, misfits, advice), misfits)
    if problems:
        headline = f"cannot restore {checkpoint.path!r}: {len(problems)} leaves need 64-bit types"
        advice = ['jax.config.update("jax_enable_x64", True), or give `like` with other dtypes and cast=True']
        raise MismatchError(list_problems(headline, problems, advice), problems)
    return targets


def _jax_has(dtype: np.dtype[Any]) -> bool:
    return bool(jax.dtypes.canonicalize_dtype(dtype) == dtype)


def _choose_target(
    manifest: Manifest,
    key: str,
    number: int,
    match: Match,
    mesh: Mesh | None,
    rule: Callable[[int, str, jax.ShapeDtypeStruct], Sharding | None] | None,
) -> Target:
    assert match.leaf is not None
    spec = manifest.spec(match.leaf)
    like = None if hasattr(match.like, "restore_as_saved") else match.like
    kind, shape, dtype, python_type = _wanted_form(spec, like)
    if kind not in ("array", "key"):
        return Target(match.leaf, kind, shape=shape, dtype=dtype, python_type=python_type)
    if kind == "key":
        key_dtype(key, spec)  # raises when there are no such keys
    logical = shape[:-1] if kind == "key" else shape
    chosen: Sharding | None
    descriptor = manifest.sharding_of(spec)
    asked = rule(number, key, jax.ShapeDtypeStruct(logical, dtype)) if rule is not None else None
    if asked is not None:
        chosen = asked
    elif mesh is not None:
        chosen = fit_to_mesh(descriptor, mesh, logical, key)
    elif isinstance(like, jax.Array):
        chosen = like.sharding if like.committed else None
    elif isinstance(like, jax.ShapeDtypeStruct) and like.sharding is not None:
        chosen = like.sharding
    elif descriptor is not None and spec.committed:
        chosen = rebuild_sharding(descriptor, logical)
    else:
        chosen = None
    if isinstance(chosen, Sharding):
        chosen = give_devices(chosen, descriptor, logical)
    # A dtype that was asked for is as weak as it was there.
    is_same = spec.kind != "value" and dtype == spec.np_dtype
    weak_type = spec.weak_type if is_same else getattr(like, "weak_type", False)
    return Target(match.leaf, kind, chosen, shape, dtype, weak_type=bool(weak_type))


def _logical_shape(target: Target) -> tuple[int, ...]:
    """Shape as users see it: key data has axes more than the keys."""
    return target.shape[:-1] if target.kind == "key" else target.shape


def _wanted_form(spec: LeafSpec, like: Any) -> tuple[str, tuple[int, ...], np.dtype[Any] | None, type | None]:
    """Kind, shape of the data, dtype of the data, and Python type that a leaf shall have."""
    if like is None:
        return spec.kind, spec.shape, None if spec.kind == "value" else spec.np_dtype, None
    if isinstance(like, np.ndarray):
        return "numpy", like.shape, like.dtype, None
    if isinstance(like, (jax.Array, jax.ShapeDtypeStruct)):
        if not isinstance(like.dtype, np.dtype):
            return "key", spec.shape, spec.np_dtype, None
        return "array", tuple(like.shape), like.dtype, None
    if spec.kind in ("bytes", "str"):
        return spec.kind, spec.shape, spec.np_dtype, None
    return "value", (), None, type(like)


def _sharding_problems(key: str, shape: tuple[int, ...], sharding: Any) -> list[Problem]:
    """What is wrong with a sharding that the caller gave."""
    if not isinstance(sharding, Sharding):
        message = f"{sharding!r} is a {type(sharding).__name__}, not a jax.sharding.Sharding"
        return [Problem(key, "sharding", message)]
    # A spec that is longer than the shape makes `shard_shape` fail in ways of its own, or not at all.
    is_too_long = isinstance(sharding, NamedSharding) and len(sharding.spec.partitions) > len(shape)
    try:
        if not is_too_long:
            sharding.shard_shape(shape)
            return []
    except ValueError:
        pass
    return [Problem(key, "sharding", f"shape {shape} cannot be sharded as {sharding}")]


def _sharding_rule(
    wanted: WantedTree, sharding: Any
) -> Callable[[int, str, jax.ShapeDtypeStruct], Sharding | None] | None:
    """What ``sharding=`` says, as a function of the leaf's number, key and shape."""
    if sharding is None:
        return None
    if isinstance(sharding, Sharding):
        return lambda _number, _key, _struct: sharding
    # A tree can be callable too: a model with shardings in the place of its arrays.
    if callable(sharding) and jax.tree_util.all_leaves([sharding]):
        function: Callable[[str, jax.ShapeDtypeStruct], Any] = sharding
        return lambda _number, key, struct: function(key, struct)
    skeleton = wanted.unflatten([_StandIn(number) for number in range(len(wanted.keys))])
    by_number: dict[int, Sharding] = {}

    def note(given: Any, below: Any) -> None:
        for stand_in in jax.tree_util.tree_leaves(below):
            if isinstance(stand_in, _StandIn):
                by_number[stand_in.number] = given

    try:
        jax.tree_util.tree_map(note, sharding, skeleton, is_leaf=_is_prefix_leaf)
    except ValueError as error:
        raise MismatchError(f"sharding= is not a prefix of the restored tree: {error}") from error
    return lambda number, _key, _struct: by_number.get(number)


def _is_prefix_leaf(node: Any) -> bool:
    """None in a prefix tree expresses no wish for what is below."""
    return node is None or isinstance(node, Sharding)


@dataclasses.dataclass(frozen=True, slots=True)
class _StandIn:
    """Stands for a leaf while a prefix tree is laid over the wanted tree."""

    number: int


def is_without_others(like: Any, mesh: Mesh | None, sharding: Any) -> bool:
    """Whether arguments of a restore say that no array spans processes; not from what is stored.

    All processes that pass the same arguments find the same, also where the devices are another process's.
    """
    if sharding is not None:
        return isinstance(sharding, Sharding) and _is_in_one_process(sharding)
    if mesh is not None:
        return len({device.process_index for device in mesh.devices.flat}) == 1
    if like is None:
        return False
    shardings = [getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(like)]
    return all(
        not hasattr(leaf, "restore_as_saved")
        and (not isinstance(leaf, jax.ShapeDtypeStruct) or leaf.sharding is not None)
        and (not isinstance(each, Sharding) or _is_in_one_process(each))
        for leaf, each in zip(jax.tree.leaves(like), shardings, strict=True)
    )


def _is_in_one_process(sharding: Sharding) -> bool:
    if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, AbstractMesh):
        return False  # it gets its devices later
    return len({device.process_index for device in sharding.device_set}) == 1


def outline_restore(checkpoint: Checkpoint, wanted: WantedTree, targets: dict[int, Target]) -> Outline:
    """What must be equal in all processes that restore together."""
    manifest = checkpoint.manifest
    process, count = manifest.local or (None, None)
    call = {"checkpoint": [manifest.data, manifest.created_s if process is None else count]}
    leaves = tuple(_outline_target(target) for target in targets.values())
    return Outline(call, [], tuple(wanted.keys[number] for number in targets), leaves)


def _outline_target(target: Target) -> str:
    text = f"leaf {target.leaf}, {target.kind} {target.dtype} {target.shape}"
    if target.sharding is None or is_own_sharding(target.sharding):
        return text
    return f"{text} {outline_sharding(target.sharding)}"


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class RestorePlan:
    """Which targets are read together, and how.

    Attributes:
      targets: What is wanted, by the number of the leaf.
      boxes: The boxes that this process needs of each.
      waves: Numbers of the leaves that are in host memory at the same time.
      plans: The reads of each wave.
    """

    targets: dict[int, Target]
    boxes: dict[int, list[Box]]
    waves: list[list[int]]
    plans: list[ReadPlan]

    @property
    def nbytes(self) -> int:
        """Bytes that will be read."""
        return sum(plan.nbytes for plan in self.plans)


def plan_restore(
    checkpoint: Checkpoint, targets: dict[int, Target], host_bytes_max: int, io_threads: int
) -> RestorePlan:
    """Plans the reading of the targets, in waves that fit the host memory."""
    manifest = checkpoint.manifest
    unit_bytes = min(PIECE_BYTES, max(host_bytes_max // (2 * io_threads), 1))
    boxes = {number: boxes_of(target, manifest.spec(target.leaf)) for number, target in targets.items()}
    waves = _waves(manifest, targets, host_bytes_max)
    fortran = {target.leaf for target in targets.values() if is_fortran(target, manifest.spec(target.leaf))}
    plans = [
        plan_reads(
            checkpoint.index, ((targets[number].leaf, boxes[number]) for number in wave), unit_bytes, fortran
        )
        for wave in waves
    ]
    return RestorePlan(targets, boxes, waves, plans)


def restore_targets(
    checkpoint: Checkpoint, plan: RestorePlan, io_threads: int, process: int = 0
) -> dict[int, Any]:
    """Reads, verifies and places the targets of a plan.

    Args:
      checkpoint: Where from.
      plan: What is read, and what becomes of it.
      io_threads: Threads that read and verify.
      process: Index of this process, which may have had leaves of its own.
    """
    own_leaves = checkpoint.own_leaves_of(process)
    manifest = checkpoint.manifest
    executor = ReadExecutor(checkpoint.store, manifest, threads=io_threads)
    doing = f"restore {checkpoint.path!r}"
    executor.check_metadata(metadata_of(manifest, [target.leaf for target in plan.targets.values()]))
    for reads in plan.plans:
        executor.check_objects(reads)
    executor.raise_problems(doing)
    results: dict[int, Any] = {}
    for wave, reads in zip(plan.waves, plan.plans, strict=True):
        executor.read(reads)
        executor.raise_problems(doing)
        filled = iter(reads.destinations)
        for number in wave:
            target = plan.targets[number]
            mine = [next(filled) for _ in plan.boxes[number]]
            value = manifest.values.get(target.leaf)
            if target.leaf in own_leaves and _is_for_this_process(target):
                value = own_leaves[target.leaf]
                mine = destinations_of_bytes(
                    target.leaf, plan.boxes[number], manifest.spec(target.leaf), value
                )
            try:
                results[number] = place(target, manifest.spec(target.leaf), value, mine)
            except (OverflowError, ValueError) as error:
                if target.kind != "value":
                    raise
                _raise_unfit(doing, manifest.keys[target.leaf], target, error)
            for destination in mine:
                destination.buffer = None  # what placing did not take over may go
        _wait_for_transfers([results[number] for number in wave])
    checkpoint.count_read(executor.bytes_read)
    return results


def _is_for_this_process(target: Target) -> bool:
    return target.sharding is None or is_own_sharding(target.sharding)


def destinations_of_bytes(leaf: int, boxes: Sequence[Box], spec: LeafSpec, value: Any) -> list[Destination]:
    """Boxes of a leaf as if they had been read, from the bytes of the whole leaf; none for scalars."""
    if not boxes:
        return []
    element = np.dtype((np.void, spec.stored_itemsize))
    whole = np.frombuffer(value, element).reshape(spec.stored_shape)
    destinations = []
    for lo, hi in boxes:
        part = whole[tuple(slice(start, stop) for start, stop in zip(lo, hi, strict=True))]
        buffer = allocate_aligned(part.nbytes)
        buffer[:] = np.frombuffer(part.tobytes(), np.uint8)
        destinations.append(Destination(leaf, (lo, hi), part.nbytes, 0, buffer))
    return destinations


def _raise_unfit(doing: str, key: str, target: Target, error: Exception) -> NoReturn:
    """An array's number that a Python type cannot hold is found only when it was read."""
    problem = Problem(key, "kind", f"does not fit {target.python_type} in `like`: {error}")
    raise MismatchError(list_problems(f"cannot {doing}", [problem]), [problem]) from error


def _waves(manifest: Manifest, targets: dict[int, Target], host_bytes_max: int) -> list[list[int]]:
    """Splits the targets where their bytes on the host would be too many; on CPU those are the arrays themselves."""
    if all(_is_on_cpu(target) for target in targets.values()):
        return [list(targets)]
    waves: list[list[int]] = [[]]
    wave_bytes = 0
    for number, target in targets.items():
        nbytes = manifest.spec(target.leaf).nbytes
        if waves[-1] and wave_bytes + nbytes > host_bytes_max:
            waves.append([])
            wave_bytes = 0
        waves[-1].append(number)
        wave_bytes += nbytes
    return waves


def _is_on_cpu(target: Target) -> bool:
    if target.kind not in ("array", "key"):
        return True
    if target.sharding is None:
        return jax.default_backend() == "cpu"
    return next(iter(target.sharding.device_set)).platform == "cpu"


def _wait_for_transfers(leaves: Sequence[Any]) -> None:
    """Host buffers of a wave may be freed only when the devices have their bytes."""
    arrays = [leaf for leaf in leaves if isinstance(leaf, jax.Array)]
    jax.block_until_ready(arrays)


def metadata_of(manifest: Manifest, leaves: Sequence[int]) -> list[StoredObject]:
    """Metadata objects that belong to these leaves or to no leaf."""
    own = {
        f"{manifest.data}/{directory}/{METADATA_NAME}": leaf
        for leaf, directory in manifest.directories.items()
    }
    asked = set(leaves)
    return [entry for entry in manifest.objects if entry.name not in own or own[entry.name] in asked]
