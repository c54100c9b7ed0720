"""How does a restore decide what each leaf becomes, and carry it out?

1. `match_tree` pairs saved leaves with the places of the wanted tree (`_naming`, `_matching`).
2. `choose_targets` gives every array its sharding, the first that applies of: ``sharding=``, ``mesh=``, ``like``'s,
   the saved one.
3. `restore_targets` checks that all objects are there and whole in length, then reads, verifies and places the
   leaves: all at once on CPU, where the bytes on the host are the arrays, else in waves that fit the host memory; one
   is read while the one before it is on its way to the devices.
   Those that are made of parts of saved leaves follow, one after the other (`_gathering`).
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, Sharding

from ._collective import Outline, outline_sharding
from ._config import PIECE_BYTES
from ._deriving import Source
from ._errors import MismatchError, Problem, list_problems
from ._fetching import ReadExecutor
from ._garbage import collection_paused
from ._gathering import gather, has_shards_of
from ._keys import PRUNED, flatten, nested_dicts, rebuild
from ._manifest import LeafSpec, Manifest, StoredObject
from ._matching import Match, key_dtype, match_leaves, match_source
from ._naming import Rename, Select, is_key_selected, rename_keys, select_keys
from ._placement import Target, boxes_of, is_as_stored, is_fortran, place, typed
from ._reading import Checkpoint
from ._reporting import RestoreReport
from ._resharding import Destination, ReadPlan, plan_reads
from ._shardings import Box, fit_to_mesh, give_devices, is_own_sharding, rebuild_sharding
from ._storage import allocate_aligned
from ._values import decode_value
from ._zarr import METADATA_NAME

_log = logging.getLogger("jaxckpt")

# A wave is read before anything of it moves to the devices, and the last one moves when nothing is left to read: at
# gigabytes a second either takes a tenth of a second at most. Larger leaves are waves of their own.
_WAVE_BYTES_MAX = 256 << 20


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


@collection_paused()
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


@collection_paused()
def choose_targets(
    checkpoint: Described, wanted: WantedTree, mesh: Mesh | None, sharding: Any
) -> dict[int, Target]:
    """For each leaf of the wanted tree that comes from storage, by its number, what it shall be."""
    manifest = checkpoint.manifest
    rule = _sharding_rule(wanted, sharding)
    targets: dict[int, Target] = {}
    problems: list[Problem] = []
    misfits: list[Problem] = []
    # Most leaves of a large tree are saved and wanted like another one.
    jax_has = functools.cache(_jax_has)
    form_of = functools.cache(lambda number, wish: _wanted_form(manifest.specs[number], wish))
    choose = functools.cache(
        lambda number, wish, asked: _choose(manifest, manifest.specs[number], wish, asked, mesh)
    )
    for number, match in enumerate(wanted.matches):
        if match.leaf is None:
            continue
        key = wanted.keys[number]
        wish = _wish_of(match.like)
        derivation = match.derivation
        spec_number = manifest.spec_numbers[match.leaf]
        form = form_of(spec_number, wish) if derivation is None else _wanted_form(derivation.spec, wish)
        asked = None
        if form.kind in ("array", "key") and rule is not None:
            asked = rule(number, key, form)
            if asked is not None and not isinstance(asked, Sharding):
                message = f"{asked!r} is a {type(asked).__name__}, not a jax.sharding.Sharding"
                misfits.append(Problem(key, "sharding", message))
                continue
        if derivation is None:
            choice = choose(spec_number, wish, asked)
        else:
            choice = _choose(manifest, derivation.spec, wish, asked, mesh)
        target = targets[number] = choice.target_of(match)
        if target.kind == "key":
            key_dtype(key, target.saved_spec(manifest))  # raises when there are no such keys
        if choice.retreat is not None:
            _log.info("%s: %s", key, choice.retreat)
        misfit = choice.misfit or _misfit_of_kept_rows(target)
        if misfit is not None:
            misfits.append(Problem(key, "sharding", misfit))
        if target.kind == "array" and target.dtype is not None and not jax_has(target.dtype):
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


class _Wish(NamedTuple):
    """What a leaf of ``like`` asks for; equal for leaves that ask for the same.

    Attributes:
      kind: ``"array"``, ``"key"``, ``"numpy"`` or ``"value"``; None for the leaf as it was saved.
      shape, dtype: Of arrays.
      sharding: Of arrays that have one; of a `jax.Array` only if it is committed.
      is_array: Whether the sharding is that of a `jax.Array`, where None says that it is not committed.
      weak_type: Of arrays.
      python_type: Of values.
    """

    kind: str | None
    shape: tuple[int, ...] = ()
    dtype: Any = None
    sharding: Sharding | None = None
    is_array: bool = False
    weak_type: bool = False
    python_type: type | None = None


_AS_SAVED = _Wish(None)


def _wish_of(like: Any) -> _Wish:
    if like is None or hasattr(like, "restore_as_saved"):
        return _AS_SAVED
    if isinstance(like, np.ndarray):
        return _Wish("numpy", like.shape, like.dtype)
    is_array = isinstance(like, jax.Array)
    if not is_array and not isinstance(like, jax.ShapeDtypeStruct):
        return _Wish("value", python_type=type(like))
    kind = "array" if isinstance(like.dtype, np.dtype) else "key"
    sharding = like.sharding if not is_array or like.committed else None
    weak_type = bool(getattr(like, "weak_type", False))
    return _Wish(kind, tuple(like.shape), like.dtype, sharding, is_array, weak_type)


@dataclasses.dataclass(frozen=True, slots=True)
class _Form:
    """Kind, shape of the data, dtype of the data, and Python type that a leaf shall have."""

    kind: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any] | None
    python_type: type | None = None

    @property
    def logical_shape(self) -> tuple[int, ...]:
        """Shape as users see it: key data has axes more than the keys."""
        return self.shape[:-1] if self.kind == "key" else self.shape


def _wanted_form(spec: LeafSpec, wish: _Wish) -> _Form:
    if spec.kind == "strings":
        is_one = wish.python_type in (bytes, str)
        return _Form(spec.kind, spec.shape, None, wish.python_type if is_one else None)
    if wish.kind is None:
        return _Form(spec.kind, spec.shape, None if spec.kind == "value" else spec.np_dtype)
    if wish.kind in ("numpy", "array"):
        return _Form(wish.kind, wish.shape, wish.dtype)
    if wish.kind == "key" or spec.kind in ("bytes", "str"):
        return _Form("key" if wish.kind == "key" else spec.kind, spec.shape, spec.np_dtype)
    return _Form("value", (), None, wish.python_type)


@dataclasses.dataclass(frozen=True, slots=True)
class _Choice:
    """What leaves become that are saved alike and wanted alike.

    Attributes:
      form: What they shall be.
      sharding: Where they shall be.
      weak_type: Whether they are weakly typed.
      misfit: Why the sharding does not fit, if it does not.
      retreat: What the log says if the saved partition spec was not possible.
    """

    form: _Form
    sharding: Sharding | None = None
    weak_type: bool = False
    misfit: str | None = None
    retreat: str | None = None

    def target_of(self, match: Match) -> Target:
        """What becomes of one of them."""
        assert match.leaf is not None
        form = self.form
        return Target(
            match.leaf,
            form.kind,
            self.sharding,
            form.shape,
            form.dtype,
            self.weak_type,
            form.python_type,
            match.derivation,
        )


def _choose(
    manifest: Manifest, spec: LeafSpec, wish: _Wish, asked: Sharding | None, mesh: Mesh | None
) -> _Choice:
    form = _wanted_form(spec, wish)
    if form.kind not in ("array", "key"):
        return _Choice(form)
    shape = form.logical_shape
    descriptor = manifest.sharding_of(spec)
    retreat: str | None = None
    chosen: Sharding | None = None
    if asked is not None:
        chosen = asked
    elif mesh is not None:
        chosen, retreat = fit_to_mesh(descriptor, mesh, shape)
    elif wish.is_array or wish.sharding is not None:
        chosen = wish.sharding
    elif descriptor is not None and spec.committed:
        chosen = rebuild_sharding(descriptor, shape)
    misfit: str | None = None
    if chosen is not None:
        chosen = give_devices(chosen, descriptor, shape)
        misfit = _misfit_of(chosen, shape)
    # A dtype that was asked for is as weak as it was there.
    is_same = spec.kind != "value" and form.dtype == spec.np_dtype
    return _Choice(form, chosen, spec.weak_type if is_same else wish.weak_type, misfit, retreat)


def _misfit_of(sharding: Sharding, shape: tuple[int, ...]) -> str | None:
    """Why an array cannot have a sharding, if it cannot."""
    # A spec that is longer than the shape makes `shard_shape` fail in ways of its own, or not at all.
    is_too_long = isinstance(sharding, NamedSharding) and len(sharding.spec.partitions) > len(shape)
    try:
        if not is_too_long:
            sharding.shard_shape(shape)
            return None
    except ValueError:
        pass
    return f"shape {shape} cannot be sharded as {sharding}"


def _misfit_of_kept_rows(target: Target) -> str | None:
    """Rows of ``like`` must be where they are wanted, or can be fetched from there."""
    base = None if target.derivation is None else target.derivation.base
    if not isinstance(base, jax.Array) or base.is_fully_addressable or has_shards_of(base, target.sharding):
        return None
    return "keeps rows of `like`, which is spread over processes in another way than is asked for"


def _sharding_rule(wanted: WantedTree, sharding: Any) -> Callable[[int, str, _Form], Any] | None:
    """What ``sharding=`` says, as a function of the leaf's number, key and form."""
    if sharding is None:
        return None
    if isinstance(sharding, Sharding):
        return lambda _number, _key, _form: sharding
    # A tree can be callable too: a model with shardings in the place of its arrays.
    if callable(sharding) and jax.tree_util.all_leaves([sharding]):
        function: Callable[[str, jax.ShapeDtypeStruct], Any] = sharding
        struct_of = functools.cache(lambda form: jax.ShapeDtypeStruct(form.logical_shape, form.dtype))
        return lambda _number, key, form: function(key, struct_of(form))
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
    return lambda number, _key, _form: by_number.get(number)


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
    boxes: dict[int, tuple[Box, ...]]
    waves: list[list[int]]
    plans: list[ReadPlan]

    @property
    def nbytes(self) -> int:
        """Bytes that will be read, but for what is derived."""
        return sum(plan.nbytes for plan in self.plans)


@collection_paused()
def plan_restore(
    checkpoint: Checkpoint, targets: dict[int, Target], host_bytes_max: int, io_threads: int
) -> RestorePlan:
    """Plans the reading of the targets, in waves that fit the host memory."""
    manifest = checkpoint.manifest
    unit_bytes = min(PIECE_BYTES, max(host_bytes_max // (2 * io_threads), 1))
    derived = {number: target for number, target in targets.items() if target.derivation is not None}
    whole = {number: target for number, target in targets.items() if target.derivation is None}
    boxes = {number: boxes_of(target, manifest.spec(target.leaf)) for number, target in whole.items()}
    # Two waves are in memory at the same time.
    waves = plan_waves(manifest, whole, min(host_bytes_max // 2, _WAVE_BYTES_MAX))
    fortran = {target.leaf for target in whole.values() if is_fortran(target, manifest.spec(target.leaf))}
    gap_bytes_max = checkpoint.store.gap_bytes_max
    plans = [
        plan_reads(checkpoint.index, _wanted_boxes(wave, whole, boxes), unit_bytes, fortran, gap_bytes_max)
        for wave in waves
    ]
    return RestorePlan(whole, derived, boxes, waves, plans)


def _wanted_boxes(
    wave: Sequence[int], targets: dict[int, Target], boxes: dict[int, tuple[Box, ...]]
) -> list[tuple[int, list[Box]]]:
    """The leaves of a wave, each once, with the boxes of all its places; these follow one another in a wave."""
    return [
        (leaf, [box for number in numbers for box in boxes[number]])
        for leaf, numbers in itertools.groupby(wave, lambda number: targets[number].leaf)
    ]


def mappable_leaves(manifest: Manifest, targets: Mapping[int, Target]) -> set[int]:
    """Leaves whose arrays can show what is stored, in all places where they are wanted."""
    wanted = {target.leaf for target in targets.values()}
    return wanted - {
        target.leaf
        for target in targets.values()
        if not (is_as_stored(target, manifest.spec(target.leaf)) and _is_on_cpu(target.sharding))
    }


def restore_targets(
    checkpoint: Checkpoint,
    plan: RestorePlan,
    io_threads: int,
    process: int = 0,
    mapped: set[int] | None = None,
) -> dict[int, Any]:
    """Reads, verifies and places the targets of a plan.

    Args:
      checkpoint: Where from.
      plan: What is read, and what becomes of it.
      io_threads: Threads that read and verify.
      process: Index of this process, which may have had leaves of its own.
      mapped: Given where arrays may show what is stored, neither read nor verified; gets the leaves of which they do.
    """
    own_leaves = checkpoint.own_leaves_of(process)
    manifest = checkpoint.manifest
    executor = ReadExecutor(checkpoint.store, manifest, threads=io_threads)
    mappable = set() if mapped is None else mappable_leaves(manifest, plan.targets) - own_leaves.keys()
    doing = f"restore {checkpoint.path!r}"
    all_targets = [*plan.targets.values(), *plan.derived.values()]
    executor.check_metadata(metadata_of(manifest, [leaf for target in all_targets for leaf in target.leaves]))
    for reads in plan.plans:
        executor.check_objects(reads)
    executor.raise_problems(doing)
    results: dict[int, Any] = {}
    moving: list[Any] = []
    for wave, reads in zip(plan.waves, plan.plans, strict=True):
        executor.read(reads, mappable)
        executor.raise_problems(doing)
        wait_for_transfers(moving)
        results |= _place_wave(checkpoint, plan, wave, reads, own_leaves)
        moving = [results[number] for number in wave]
    wait_for_transfers(moving)
    if mapped is not None:
        mapped |= executor.mapped_leaves
    checkpoint.count_read(executor.bytes_read)
    for number, target in plan.derived.items():
        results[number] = _restore_derived(checkpoint, target, own_leaves)
        wait_for_transfers([results[number]])
    return results


@collection_paused()
def _place_wave(
    checkpoint: Checkpoint,
    plan: RestorePlan,
    wave: Sequence[int],
    reads: ReadPlan,
    own_leaves: Mapping[int, Any],
) -> dict[int, Any]:
    """The leaves of a wave that has been read, on their way to their devices."""
    manifest = checkpoint.manifest
    results: dict[int, Any] = {}
    filled = iter(reads.destinations)
    for number in wave:
        target = plan.targets[number]
        mine = [next(filled) for _ in plan.boxes[number]]
        value = manifest.values.get(target.leaf)
        if target.leaf in own_leaves and _is_for_this_process(target):
            value = own_leaves[target.leaf]
            mine = destinations_of_bytes(target.leaf, plan.boxes[number], manifest.spec(target.leaf), value)
        results[number] = place_leaf(checkpoint, target, value, mine)
        for destination in mine:
            destination.buffer = None  # what placing did not take over may go
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
    if all(
        map(_is_on_cpu, {target.sharding for target in targets.values() if target.kind in ("array", "key")})
    ):
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


def _is_on_cpu(sharding: Sharding | None) -> bool:
    if sharding is None:
        return jax.default_backend() == "cpu"
    return next(iter(sharding.device_set)).platform == "cpu"


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
    mapped: Collection[int] = (),
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
        mapped=tuple(keys[number] for number, target in targets.items() if target.leaf in mapped),
    )


def _is_cast(manifest: Manifest, target: Target) -> bool:
    spec = target.saved_spec(manifest)
    if spec.kind == "value":
        value = decode_value(manifest.values[target.leaf])
        return target.kind != "value" or target.python_type not in (None, type(value))
    return target.kind == "value" or (target.dtype is not None and target.dtype != spec.np_dtype)


def _is_reshaped(manifest: Manifest, target: Target) -> bool:
    return target.kind in ("array", "numpy") and target.shape != target.saved_spec(manifest).shape
