"""How does a restore decide what each leaf becomes, and carry it out?

1. `match_tree` pairs saved leaves with the places of the wanted tree (`_naming`, `_matching`).
2. `choose_targets` gives every array its sharding, the first that applies of: ``sharding=``, ``mesh=``, ``like``'s,
   the saved one.
3. `restore_targets` checks that all objects are there and whole in length, then reads, verifies and places the
   leaves: all at once on CPU, where the bytes on the host are the arrays, else in waves that fit the host memory.
   Those that are made of parts of saved leaves follow, one after the other (`_gathering`).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, Sharding

from ._collective import Outline, outline_sharding
from ._config import PIECE_BYTES
from ._deriving import Source
from ._errors import MismatchError, Problem, list_problems
from ._fetching import ReadExecutor
from ._gathering import gather, has_shards_of
from ._keys import PRUNED, flatten, nested_dicts, rebuild
from ._manifest import LeafSpec, Manifest, StoredObject, decode_value
from ._matching import Match, key_dtype, match_leaves, match_source
from ._naming import Rename, Select, is_key_selected, rename_keys, select_keys
from ._placement import Target, boxes_of, is_fortran, place, typed
from ._reading import Checkpoint
from ._reporting import RestoreReport
from ._resharding import Destination, ReadPlan, plan_reads
from ._shardings import Box, fit_to_mesh, give_devices, is_own_sharding, rebuild_sharding
from ._store import allocate_aligned
from ._zarr import METADATA_NAME


class Described(Protocol):
    """What must be known of a checkpoint to match it with a tree, of this library's format or another's."""

    @property
    def path(self) -> str: ...

    @property
    def manifest(self) -> Manifest: ...


@dataclasses.dataclass(frozen=True, eq=False)
class WantedTree:
    """The tree to make: a match for each of its leaves, and how leaves become the tree."""

    keys: tuple[str, ...]
    matches: list[Match]
    unflatten: Callable[[Sequence[Any]], Any]
    ignored: tuple[str, ...]

    def fill(self, restored: Mapping[int, Any]) -> Any:
        """The tree, from what came from storage by the number of its leaf, and else from ``like``."""
        return self.unflatten([restored.get(number, match.like) for number, match in enumerate(self.matches)])


def match_tree(
    checkpoint: Described,
    like: Any,
    select: Select,
    rename: Rename,
    *,
    missing: str,
    unexpected: str,
    cast: bool,
    reshape: bool,
    nest: Callable[[Sequence[str], Sequence[Any]], Any] = nested_dicts,
) -> WantedTree:
    """How the tree that is wanted gets its leaves; ``nest`` makes it where renamed keys are all that is given."""
    _check_choice("missing", missing, ("error", "keep"))
    _check_choice("unexpected", unexpected, ("error", "ignore"))
    manifest = checkpoint.manifest
    renamed = rename_keys(manifest.keys, select_keys(manifest.keys, select), rename)
    if like is None:
        return _whole_tree(checkpoint, renamed.sources, None if rename is None else nest)
    flat = flatten(like)
    if unexpected == "ignore":  # else what `like` does not have is an error anyway
        renamed.check_wanted(flat.keys)
    unselected = [key for key in flat.keys if not is_key_selected(key, select)]
    matches = match_leaves(
        manifest,
        renamed.sources,
        [*renamed.unselected, *unselected],
        flat.keys,
        flat.leaves,
        missing=missing,
        unexpected=unexpected,
        cast=cast,
        reshape=reshape,
        path=checkpoint.path,
    )
    return WantedTree(flat.keys, matches, flat.unflatten, _ignored(manifest, matches))


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, not {value!r}")


def _whole_tree(
    checkpoint: Described,
    sources: dict[str, int | Source],
    nest: Callable[[Sequence[str], Sequence[Any]], Any] | None,
) -> WantedTree:
    """All selected leaves, in the saved structure, or nested by their keys."""
    manifest = checkpoint.manifest
    keys = tuple(sources)
    problems: list[Problem] = []
    matches = [match_source(manifest, key, source, None, problems) for key, source in sources.items()]
    if problems:
        headline = f"cannot restore {checkpoint.path!r}: {len(problems)} leaves cannot be made"
        raise MismatchError(list_problems(headline, problems), problems)
    if nest is not None:
        nest(keys, keys)  # raises now rather than after everything was read

    def unflatten(leaves: Sequence[Any]) -> Any:
        if nest is not None:
            return nest(keys, leaves)
        places: list[Any] = [PRUNED] * len(manifest.keys)
        for match, value in zip(matches, leaves, strict=True):
            assert match.leaf is not None
            places[match.leaf] = value
        return rebuild(manifest.nodes, places)

    return WantedTree(keys, matches, unflatten, _ignored(manifest, matches))


def _ignored(manifest: Manifest, matches: Sequence[Match]) -> tuple[str, ...]:
    """Saved keys that nothing is made of."""
    taken = {leaf for match in matches for leaf in match.leaves}
    return tuple(key for leaf, key in enumerate(manifest.keys) if leaf not in taken)


def choose_targets(
    checkpoint: Described, wanted: WantedTree, mesh: Mesh | None, sharding: Any
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
            misfits.extend(_sharding_problems(key, target))
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
    spec = manifest.spec(match.leaf) if match.derivation is None else match.derivation.spec
    like = None if hasattr(match.like, "restore_as_saved") else match.like
    kind, shape, dtype, python_type = _wanted_form(spec, like)
    if kind not in ("array", "key"):
        return Target(
            match.leaf,
            kind,
            shape=shape,
            dtype=dtype,
            python_type=python_type,
            derivation=match.derivation,
        )
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
    return Target(
        match.leaf,
        kind,
        chosen,
        shape,
        dtype,
        weak_type=bool(weak_type),
        derivation=match.derivation,
    )


def _logical_shape(target: Target) -> tuple[int, ...]:
    """Shape as users see it: key data has axes more than the keys."""
    return target.shape[:-1] if target.kind == "key" else target.shape


def _wanted_form(spec: LeafSpec, like: Any) -> tuple[str, tuple[int, ...], np.dtype[Any] | None, type | None]:
    """Kind, shape of the data, dtype of the data, and Python type that a leaf shall have."""
    if spec.kind == "strings":
        return spec.kind, spec.shape, None, type(like) if isinstance(like, (bytes, str)) else None
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


def _sharding_problems(key: str, target: Target) -> list[Problem]:
    """What is wrong with a sharding that the caller gave."""
    shape = _logical_shape(target)
    sharding: Any = target.sharding
    if not isinstance(sharding, Sharding):
        message = f"{sharding!r} is a {type(sharding).__name__}, not a jax.sharding.Sharding"
        return [Problem(key, "sharding", message)]
    # A spec that is longer than the shape makes `shard_shape` fail in ways of its own, or not at all.
    is_too_long = isinstance(sharding, NamedSharding) and len(sharding.spec.partitions) > len(shape)
    try:
        if not is_too_long:
            sharding.shard_shape(shape)
            return _problems_of_kept_rows(key, target)
    except ValueError:
        pass
    return [Problem(key, "sharding", f"shape {shape} cannot be sharded as {sharding}")]


def _problems_of_kept_rows(key: str, target: Target) -> list[Problem]:
    """Rows of ``like`` must be where they are wanted, or can be fetched from there."""
    base = None if target.derivation is None else target.derivation.base
    if not isinstance(base, jax.Array) or base.is_fully_addressable or has_shards_of(base, target.sharding):
        return []
    message = "keeps rows of `like`, which is spread over processes in another way than is asked for"
    return [Problem(key, "sharding", message)]


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
    if target.derivation is not None:
        text += f" of {target.derivation.describe()}"
    if target.sharding is None or is_own_sharding(target.sharding):
        return text
    return f"{text} {outline_sharding(target.sharding)}"


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class RestorePlan:
    """Which targets are read together, and how.

    Attributes:
      targets: What is wanted, by the number of the leaf.
      derived: What is made of rows of saved leaves, and read one after the other behind all else.
      boxes: The boxes that this process needs of each.
      waves: Numbers of the leaves that are in host memory at the same time.
      plans: The reads of each wave.
    """

    targets: dict[int, Target]
    derived: dict[int, Target]
    boxes: dict[int, list[Box]]
    waves: list[list[int]]
    plans: list[ReadPlan]

    @property
    def nbytes(self) -> int:
        """Bytes that will be read, but for what is derived."""
        return sum(plan.nbytes for plan in self.plans)


def plan_restore(
    checkpoint: Checkpoint, targets: dict[int, Target], host_bytes_max: int, io_threads: int
) -> RestorePlan:
    """Plans the reading of the targets, in waves that fit the host memory."""
    manifest = checkpoint.manifest
    unit_bytes = min(PIECE_BYTES, max(host_bytes_max // (2 * io_threads), 1))
    derived = {number: target for number, target in targets.items() if target.derivation is not None}
    whole = {number: target for number, target in targets.items() if target.derivation is None}
    boxes = {number: boxes_of(target, manifest.spec(target.leaf)) for number, target in whole.items()}
    waves = plan_waves(manifest, whole, host_bytes_max)
    fortran = {target.leaf for target in whole.values() if is_fortran(target, manifest.spec(target.leaf))}
    plans = [
        plan_reads(checkpoint.index, _wanted_boxes(wave, whole, boxes), unit_bytes, fortran) for wave in waves
    ]
    return RestorePlan(whole, derived, boxes, waves, plans)


def _wanted_boxes(
    wave: Sequence[int], targets: dict[int, Target], boxes: dict[int, list[Box]]
) -> list[tuple[int, list[Box]]]:
    """The leaves of a wave, each once, with the boxes of all its places; these follow one another in a wave."""
    return [
        (leaf, [box for number in numbers for box in boxes[number]])
        for leaf, numbers in itertools.groupby(wave, lambda number: targets[number].leaf)
    ]


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
    all_targets = [*plan.targets.values(), *plan.derived.values()]
    executor.check_metadata(metadata_of(manifest, [leaf for target in all_targets for leaf in target.leaves]))
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
            results[number] = place_leaf(checkpoint, target, value, mine)
            for destination in mine:
                destination.buffer = None  # what placing did not take over may go
        wait_for_transfers([results[number] for number in wave])
    checkpoint.count_read(executor.bytes_read)
    for number, target in plan.derived.items():
        results[number] = _restore_derived(checkpoint, target, own_leaves)
        wait_for_transfers([results[number]])
    return results


def _restore_derived(checkpoint: Checkpoint, target: Target, own_leaves: Mapping[int, Any]) -> Any:
    """Reads, verifies and places what is made of rows of saved leaves."""
    manifest = checkpoint.manifest

    def read_box(leaf: int, box: Box) -> np.ndarray[Any, Any]:
        if leaf not in own_leaves or not _is_for_this_process(target):
            return checkpoint[manifest.keys[leaf]].read_box(box)
        spec = manifest.spec(leaf)
        tail = spec.stored_shape[len(spec.shape) :]
        stored_box = (box[0] + (0,) * len(tail), box[1] + tail)
        (destination,) = destinations_of_bytes(leaf, [stored_box], spec, own_leaves[leaf])
        return typed(destination, spec)

    return gather(manifest, target, read_box)


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


def place_leaf(checkpoint: Described, target: Target, value: Any, mine: Sequence[Destination]) -> Any:
    """The leaf that a target wants, from what was read.

    Raises:
      MismatchError: A Python type cannot hold an array's number, which is found only when it was read.
    """
    try:
        return place(target, checkpoint.manifest.spec(target.leaf), value, mine)
    except (OverflowError, ValueError) as error:
        if target.kind != "value":
            raise
        key = checkpoint.manifest.keys[target.leaf]
        problem = Problem(key, "kind", f"does not fit {target.python_type} in `like`: {error}")
        headline = f"cannot restore {checkpoint.path!r}"
        raise MismatchError(list_problems(headline, [problem]), [problem]) from error


def plan_waves(manifest: Manifest, targets: dict[int, Target], host_bytes_max: int) -> list[list[int]]:
    """Splits the targets where their bytes on the host would be too many; on CPU those are the arrays themselves."""
    # All places of a leaf follow one another, so that it is read once.
    order = sorted(targets, key=lambda number: targets[number].leaf)
    if all(_is_on_cpu(target) for target in targets.values()):
        return [order]
    waves: list[list[int]] = [[]]
    wave_bytes = 0
    for number in order:
        target = targets[number]
        nbytes = manifest.spec(target.leaf).nbytes
        is_same_leaf = bool(waves[-1]) and targets[waves[-1][-1]].leaf == target.leaf
        if waves[-1] and not is_same_leaf and wave_bytes + nbytes > host_bytes_max:
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


def wait_for_transfers(leaves: Sequence[Any]) -> None:
    """Host buffers of a wave may be freed only when the devices have their bytes."""
    arrays = [leaf for leaf in leaves if isinstance(leaf, jax.Array)]
    jax.block_until_ready(arrays)


def metadata_of(manifest: Manifest, leaves: Sequence[int]) -> list[StoredObject]:
    """Metadata objects that belong to these leaves or to no leaf; values do not depend on programs."""
    own = {
        f"{manifest.data}/{directory}/{METADATA_NAME}": leaf
        for leaf, directory in manifest.directories.items()
    }
    asked = set(leaves)
    programs = {entry.name for entry in manifest.programs.values()}
    return [
        entry
        for entry in manifest.objects
        if entry.name not in programs and (entry.name not in own or own[entry.name] in asked)
    ]


# --- what was done --------------------------------------------------------------------------------------------


def report_restore(
    checkpoint: Described,
    wanted: WantedTree,
    targets: dict[int, Target],
    *,
    bytes_read: int,
    group_bytes_read: int,
    seconds: float,
) -> RestoreReport:
    """What a restore did."""
    manifest = checkpoint.manifest
    keys = wanted.keys
    saved_keys = [
        (manifest.keys[leaf], key)
        for key, match in zip(keys, wanted.matches, strict=True)
        for leaf in match.leaves
    ]
    return RestoreReport(
        path=checkpoint.path,
        restored=tuple(keys[number] for number in targets),
        kept=tuple(key for key, match in zip(keys, wanted.matches, strict=True) if match.leaf is None),
        ignored=wanted.ignored,
        renamed=tuple((saved, key) for saved, key in saved_keys if saved != key),
        cast=tuple(keys[number] for number, target in targets.items() if _is_cast(manifest, target)),
        reshaped=tuple(keys[number] for number, target in targets.items() if _is_reshaped(manifest, target)),
        derived=tuple(keys[number] for number, target in targets.items() if target.derivation is not None),
        nbytes=sum(target.saved_spec(manifest).nbytes for target in targets.values()),
        bytes_read=bytes_read,
        seconds=seconds,
        group_bytes_read=group_bytes_read,
    )


def _is_cast(manifest: Manifest, target: Target) -> bool:
    spec = target.saved_spec(manifest)
    if spec.kind == "value":
        value = decode_value(manifest.values[target.leaf])
        return target.kind != "value" or target.python_type not in (None, type(value))
    return target.kind == "value" or (target.dtype is not None and target.dtype != spec.np_dtype)


def _is_reshaped(manifest: Manifest, target: Target) -> bool:
    return target.kind in ("array", "numpy") and target.shape != target.saved_spec(manifest).shape
