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
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, Sharding

from ._config import PIECE_BYTES, RestoreOptions, resolve_host_bytes_max
from ._errors import MismatchError, Problem, list_problems
from ._keys import PRUNED, flatten, nested_dicts, rebuild
from ._manifest import LeafSpec, Manifest, StoredObject
from ._matching import Match, Rename, Select, match_leaves, rename_keys, select_keys
from ._placement import Target, boxes_of, place
from ._reading import Checkpoint
from ._resharding import ReadExecutor, plan_reads
from ._shardings import fit_to_mesh, rebuild_sharding
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
    """

    path: str
    restored: tuple[str, ...]
    kept: tuple[str, ...]
    ignored: tuple[str, ...]
    cast: tuple[str, ...]
    nbytes: int
    bytes_read: int
    seconds: float


def is_cast(checkpoint: Checkpoint, target: Target) -> bool:
    spec = checkpoint.manifest.spec(target.leaf)
    if spec.kind == "value":
        return target.kind != "value"
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
    renamed = rename_keys(manifest.keys, rename)
    selected = {key: leaf for leaf, key in enumerate(renamed) if is_selected[leaf]}
    if like is None:
        return _whole_tree(manifest, renamed, selected, is_nested=rename is not None)
    flat = flatten(like)
    matches = match_leaves(
        manifest,
        selected,
        [key for leaf, key in enumerate(renamed) if not is_selected[leaf]],
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


def _whole_tree(
    manifest: Manifest, renamed: list[str], selected: dict[str, int], *, is_nested: bool
) -> WantedTree:
    """All selected leaves, in the saved structure, or in nested dicts when keys were renamed."""
    ignored = tuple(key for leaf, key in enumerate(manifest.keys) if renamed[leaf] not in selected)

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
    for number, match in enumerate(wanted.matches):
        if match.leaf is None:
            continue
        key = wanted.keys[number]
        target = _choose_target(checkpoint.manifest, key, number, match, mesh, rule)
        targets[number] = target
        if target.kind == "array" and target.dtype is not None and not _jax_has(target.dtype):
            message = f"dtype {target.dtype} on disk, which JAX has only with jax_enable_x64"
            problems.append(Problem(key, "dtype", message))
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
    _check_divides(key, logical, chosen)
    return Target(match.leaf, kind, chosen, shape, dtype, weak_type=spec.weak_type)


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


def _check_divides(key: str, shape: tuple[int, ...], sharding: Sharding | None) -> None:
    """Raises when a sharding that the caller gave does not fit the shape."""
    if sharding is None:
        return
    try:
        sharding.shard_shape(shape)
    except ValueError as error:
        problem = Problem(key, "sharding", f"shape {shape} cannot be sharded as {sharding}")
        raise MismatchError(list_problems("the given sharding does not fit", [problem]), [problem]) from error


def _sharding_rule(
    wanted: WantedTree, sharding: Any
) -> Callable[[int, str, jax.ShapeDtypeStruct], Sharding | None] | None:
    """What ``sharding=`` says, as a function of the leaf's number, key and shape."""
    if sharding is None:
        return None
    if isinstance(sharding, Sharding):
        return lambda _number, _key, _struct: sharding
    if callable(sharding):
        function: Callable[[str, jax.ShapeDtypeStruct], Any] = sharding
        return lambda _number, key, struct: function(key, struct)
    skeleton = wanted.unflatten([_StandIn(number) for number in range(len(wanted.keys))])
    by_number: dict[int, Sharding] = {}

    def note(given: Any, below: Any) -> None:
        for stand_in in jax.tree_util.tree_leaves(below):
            if isinstance(stand_in, _StandIn):
                by_number[stand_in.number] = given

    try:
        jax.tree_util.tree_map(note, sharding, skeleton, is_leaf=lambda node: isinstance(node, Sharding))
    except ValueError as error:
        raise MismatchError(f"sharding= is not a prefix of the restored tree: {error}") from error
    return lambda number, _key, _struct: by_number.get(number)


@dataclasses.dataclass(frozen=True, slots=True)
class _StandIn:
    """Stands for a leaf while a prefix tree is laid over the wanted tree."""

    number: int


def restore_targets(
    checkpoint: Checkpoint, targets: dict[int, Target], options: RestoreOptions
) -> dict[int, Any]:
    """Reads, verifies and places the targets, in waves that fit the host memory."""
    manifest = checkpoint.manifest
    host_bytes_max = resolve_host_bytes_max(options.host_bytes_max)
    unit_bytes = min(PIECE_BYTES, max(host_bytes_max // (2 * options.io_threads), 1))
    executor = ReadExecutor(checkpoint.store, manifest, threads=options.io_threads)
    doing = f"restore {checkpoint.path!r}"
    executor.check_metadata(_metadata_of(manifest, [target.leaf for target in targets.values()]))
    boxes = {number: boxes_of(target, manifest.spec(target.leaf)) for number, target in targets.items()}
    waves = _waves(manifest, targets, host_bytes_max)
    plans = [
        plan_reads(manifest, ((targets[number].leaf, boxes[number]) for number in wave), unit_bytes)
        for wave in waves
    ]
    for plan in plans:
        executor.check_objects(plan)
    executor.raise_problems(doing)
    results: dict[int, Any] = {}
    for wave, plan in zip(waves, plans, strict=True):
        executor.read(plan)
        executor.raise_problems(doing)
        filled = iter(plan.destinations)
        for number in wave:
            target = targets[number]
            mine = [next(filled) for _ in boxes[number]]
            value = manifest.values.get(target.leaf)
            results[number] = place(target, manifest.spec(target.leaf), value, mine)
            for destination in mine:
                destination.buffer = None  # what placing did not take over may go
        _wait_for_transfers([results[number] for number in wave])
    checkpoint.count_read(executor.bytes_read)
    return results


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


def _metadata_of(manifest: Manifest, leaves: Sequence[int]) -> list[StoredObject]:
    """Metadata objects that belong to these leaves or to no leaf."""
    own = {
        f"{manifest.data}/{directory}/{METADATA_NAME}": leaf
        for leaf, directory in manifest.directories.items()
    }
    asked = set(leaves)
    return [entry for entry in manifest.objects if entry.name not in own or own[entry.name] in asked]
