"""How is a checkpoint of another library restored as ours are?

1. Its leaves are described by the same records as ours, under the keys that `_addressing` chooses, so that they are
   matched, renamed, cast and given shardings by the same functions, with the same messages.
2. The boxes that the devices of this process need are read in a few threads, each once, in waves that fit into the
   bound on host memory, and placed. Arrays on CPU may show the file itself instead.
3. Damage does not end the reading: all that is found is raised at once, and nothing is returned.

Deliberately not here: formats, which are modules of `jaxckpt.interop`; groups of processes, of which each reads for its
own devices.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import difflib
import math
import time
from collections.abc import Generator, Mapping, Sequence
from typing import Any, TypedDict

import jax
import numpy as np
from jax.sharding import Mesh

from ._addressing import choose_keys, names_by_leaf, rules_of_names, select_leaves
from ._config import RestoreOptions, resolve_host_bytes_max
from ._dtypes import describe_dtype, is_jax_dtype
from ._errors import CorruptError, MismatchError, Problem, list_problems
from ._foreign import ForeignCheckpoint, ForeignLeaf
from ._gathering import gather
from ._manifest import NO_CHUNKS, LeafSpec, Manifest
from ._naming import Rename, Select
from ._nesting import nest_keys
from ._placement import Target, boxes_of
from ._resharding import Destination
from ._restoring import (
    choose_targets,
    mappable_leaves,
    match_tree,
    place_leaf,
    plan_waves,
    report_restore,
    wait_for_transfers,
)
from ._shardings import Box
from ._storage import allocate_aligned
from ._values import encode_value

# Memory that begins at a multiple of this becomes an array of JAX on CPU without a copy.
_ALIGNMENT = 64


class RestoreKeywords(TypedDict, total=False):
    """What a ``read`` of every format takes as `restore_foreign` does, and as `jaxckpt.restore` describes it."""

    mesh: Mesh | None
    sharding: Any
    select: Select
    rename: Rename
    missing: str
    unexpected: str
    cast: bool
    reshape: bool
    report: bool
    options: RestoreOptions | None


def check_keywords(keywords: Mapping[str, Any]) -> None:
    """Refuses what no ``read`` takes as `RestoreKeywords`, before it opens anything.

    Raises:
      TypeError: There is such a keyword.
    """
    for name in keywords.keys() - RestoreKeywords.__annotations__.keys():
        near = difflib.get_close_matches(name, RestoreKeywords.__annotations__, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise TypeError(f"read() got an unexpected keyword argument {name!r}{hint}")


def restore_foreign(
    checkpoint: ForeignCheckpoint,
    like: Any = None,
    *,
    mesh: Mesh | None = None,
    sharding: Any = None,
    select: Select = None,
    rename: Rename = None,
    missing: str = "error",
    unexpected: str = "error",
    cast: bool = False,
    reshape: bool = False,
    mmap: bool = False,
    report: bool = False,
    options: RestoreOptions | None = None,
) -> Any:
    """Restores a foreign checkpoint; what a ``read`` of `jaxckpt.interop` does.

    Without ``like`` the result is the saved tree where the file has one, nested dicts if the names make up a tree, or
    with ``rename``; else ``{name: array}`` by the file's own names.
    With ``like``, its keys are matched with the names of the arrays, or with their aliases.

    Arrays come back as `jax.Array`, uncommitted unless ``mesh``, ``sharding``, ``like`` or the file say where they are.
    Without ``like``, those of 64-bit types, which JAX has only with ``jax_enable_x64``, come as NumPy arrays otherwise.
    Strings come back as bytes, or as NumPy object arrays of bytes; in ``like``, bytes, str and such arrays stand for
    them.

    Args:
      checkpoint: An open foreign checkpoint.
      like: As for `jaxckpt.restore`.
      mesh: As for `jaxckpt.restore`; where nothing was saved of shardings, all arrays are replicated.
      sharding: As for `jaxckpt.restore`.
      select: As for `jaxckpt.restore`; a pattern that fits no name of `keys` is held against the aliases.
      rename: As for `jaxckpt.restore`; a rule that fits no name of `keys` is held against the aliases.
      missing: As for `jaxckpt.restore`.
      unexpected: As for `jaxckpt.restore`.
      cast: As for `jaxckpt.restore`.
      reshape: As for `jaxckpt.restore`.
      mmap: Whether arrays on CPU may show the file itself, where the format and their places in the file allow that.
      report: Whether to return ``(tree, RestoreReport)``.
      options: See `RestoreOptions`.

    Returns:
      The tree, or the tree and a `RestoreReport`.

    Raises:
      CorruptError: Stored bytes are damaged.
      MismatchError: The arrays and ``like`` differ; `.problems` lists every difference.

    Collective: no; each process of a group reads what its own devices need.
    Host memory: at most ``host_bytes_max``, or the largest array; on CPU the arrays themselves, too.
    """
    began_s = time.perf_counter()
    options = options or RestoreOptions()
    bytes_before = checkpoint.bytes_read
    if rename is None and like is None and checkpoint.is_nested:
        rename = []  # renames nothing, and gives nested dicts
    rename = rules_of_names(checkpoint, rename)
    source = _describe(checkpoint, like, select, rename)
    wanted = match_tree(
        source,
        like,
        source.select,
        rename,
        missing=missing,
        unexpected=unexpected,
        cast=cast,
        reshape=reshape,
        nest=nest_keys,
    )
    targets = choose_targets(source, wanted, mesh, sharding)
    mapped: set[int] | None = set() if mmap else None
    tree = wanted.fill(_read_targets(source, targets, options, mapped))
    if not report:
        return tree
    bytes_read = checkpoint.bytes_read - bytes_before
    seconds = time.perf_counter() - began_s
    return tree, report_restore(
        source,
        wanted,
        targets,
        bytes_read=bytes_read,
        group_bytes_read=bytes_read,
        seconds=seconds,
        mapped=mapped or (),
    )


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class _Source:
    """A foreign checkpoint in the words of `match_tree` and `choose_targets`.

    Attributes:
      checkpoint: Where the leaves are read from.
      leaves: They, by number.
      manifest: What is said of them; it has no chunks.
      select: What the caller asked for, by the keys of the manifest.
    """

    checkpoint: ForeignCheckpoint
    leaves: list[ForeignLeaf]
    manifest: Manifest
    select: Select

    @property
    def path(self) -> str:
        return self.checkpoint.path

    def read_box(self, leaf: int, box: Box) -> np.ndarray[Any, Any]:
        """A box of the leaf with a number."""
        return self.checkpoint.read_box(self.leaves[leaf].key, *box)

    def read_boxes(self, leaf: int, boxes: Sequence[Box]) -> list[np.ndarray[Any, Any]]:
        """Boxes of the leaf with a number."""
        return self.checkpoint.read_boxes(self.leaves[leaf].key, boxes)


def _describe(checkpoint: ForeignCheckpoint, like: Any, select: Select, rename: Rename) -> _Source:
    names = names_by_leaf(checkpoint)
    leaves = list(checkpoint.leaves().values())
    shardings = {repr(leaf.sharding): leaf.sharding for leaf in leaves if leaf.sharding is not None}
    number_of_sharding = {text: number for number, text in enumerate(shardings)}
    values = checkpoint.values()
    manifest = Manifest(
        data="",
        created_s=0.0,
        writer={},
        metadata=None,
        nodes=checkpoint.structure() or [["dict", list(checkpoint.keys())], *[0] * len(leaves)],
        keys=tuple(choose_keys(names, like, rename, in_tree=checkpoint.is_nested)),
        specs=tuple(
            _spec_of(leaf, number_of_sharding.get(repr(leaf.sharding)), has_like=like is not None)
            for leaf in leaves
        ),
        spec_index=np.arange(len(leaves)),
        values={
            number: encode_value(values[leaf.key]) for number, leaf in enumerate(leaves) if leaf.key in values
        },
        shardings=tuple(shardings.values()),
        directories={},
        packs=(),
        chunks=NO_CHUNKS,
        objects=(),
    )
    return _Source(checkpoint, leaves, manifest, select_leaves(names, select))


def _spec_of(leaf: ForeignLeaf, sharding: int | None, *, has_like: bool) -> LeafSpec:
    if leaf.kind == "value" or leaf.value is not None:
        return LeafSpec("value")
    if leaf.dtype is None:
        return LeafSpec("strings", shape=leaf.shape)
    dtype = describe_dtype(leaf.dtype)
    if leaf.kind == "numpy":
        return LeafSpec("numpy", dtype, leaf.shape)
    is_placed = sharding is not None
    if leaf.kind == "key":
        return LeafSpec("key", dtype, leaf.shape, committed=is_placed, impl=leaf.impl, sharding=sharding)
    # Most files have a step of 64 bits; that JAX cannot have it must not keep anybody from reading the rest.
    is_too_wide = not has_like and jax.dtypes.canonicalize_dtype(leaf.dtype) != leaf.dtype
    kind = "array" if is_jax_dtype(leaf.dtype) and not is_too_wide else "numpy"
    return LeafSpec(kind, dtype, leaf.shape, committed=is_placed, sharding=sharding)


def _read_targets(
    source: _Source, targets: dict[int, Target], options: RestoreOptions, mapped: set[int] | None
) -> dict[int, Any]:
    """Reads and places what is wanted, by number. All damage is raised at once.

    Args:
      source: Where from.
      targets: What is wanted.
      options: How.
      mapped: Given where arrays may show the file; gets the leaves of which they do.
    """
    restored: dict[int, Any] = {}
    problems: list[Problem] = []
    derived = {number: target for number, target in targets.items() if target.derivation is not None}
    whole = {number: target for number, target in targets.items() if target.derivation is None}
    host_bytes_max = resolve_host_bytes_max(options.host_bytes_max)
    source.checkpoint.bound_memory(host_bytes_max // 4)
    views = {} if mapped is None else _views_of(source, whole)
    if mapped is not None:
        mapped.update(views)
    waves = plan_waves(source.manifest, whole, host_bytes_max)
    with concurrent.futures.ThreadPoolExecutor(options.io_threads, "jaxckpt-read") as executor:
        for wave in waves:
            try:
                wanted = {number: whole[number] for number in wave}
                restored |= _read_wave(source, wanted, views, executor, problems)
            except BaseException:
                executor.shutdown(cancel_futures=True)
                raise
    for number, target in derived.items():
        with _noting_damage(source, target, problems):
            restored[number] = gather(source.manifest, target, source.read_box)
            wait_for_transfers([restored[number]])
    if problems:
        headline = f"cannot restore {source.path!r}: stored data is damaged in {len(problems)} places"
        advice = ["nothing was returned; use another checkpoint, or select= the leaves that are whole"]
        raise CorruptError(list_problems(headline, problems, advice), problems)
    return restored


def _views_of(source: _Source, targets: dict[int, Target]) -> dict[int, np.ndarray[Any, Any]]:
    """The leaves that are not read, since arrays can show the file: on CPU, where JAX takes memory as it is."""
    views: dict[int, np.ndarray[Any, Any]] = {}
    for leaf in mappable_leaves(source.manifest, targets):
        view = source.checkpoint.view(source.leaves[leaf].key)
        if view is not None and view.size and view.ctypes.data % _ALIGNMENT == 0:
            views[leaf] = view
    return views


def _read_wave(
    source: _Source,
    targets: dict[int, Target],
    views: dict[int, np.ndarray[Any, Any]],
    executor: concurrent.futures.Executor,
    problems: list[Problem],
) -> dict[int, Any]:
    """Reads and places what is in host memory at the same time."""
    restored: dict[int, Any] = {}
    numbers_of_leaf: dict[int, list[int]] = {}
    for number, target in targets.items():
        numbers_of_leaf.setdefault(target.leaf, []).append(number)
    reads = [
        (
            numbers,
            executor.submit(_read_leaf, source, [targets[number] for number in numbers], views.get(leaf)),
        )
        for leaf, numbers in numbers_of_leaf.items()
    ]
    reads.reverse()
    while reads:
        numbers, read = reads.pop()  # whose memory goes when it was placed
        with _noting_damage(source, targets[numbers[0]], problems):
            placed = _place(source, [targets[number] for number in numbers], read.result())
            restored.update(zip(numbers, placed, strict=True))
    wait_for_transfers(list(restored.values()))
    return restored


@contextlib.contextmanager
def _noting_damage(source: _Source, target: Target, problems: list[Problem]) -> Generator[None]:
    try:
        yield
    except CorruptError as error:
        key = source.leaves[target.leaf].key
        problems.extend(error.problems or [Problem(key, "checksum", str(error))])


def _read_leaf(
    source: _Source, targets: Sequence[Target], view: np.ndarray[Any, Any] | None
) -> dict[Box, np.ndarray[Any, Any]]:
    """The distinct boxes that targets need of a leaf, read or cut from a view of it."""
    number = targets[0].leaf
    spec = source.manifest.spec(number)
    rank = len(spec.shape)
    whole: Box = ((0,) * rank, spec.shape)
    if spec.kind == "value":
        return {}
    if spec.kind == "strings":
        return {whole: source.read_box(number, whole)}
    boxes = {(lo[:rank], hi[:rank]) for target in targets for lo, hi in boxes_of(target, spec)}
    if view is not None:
        return {box: view[tuple(map(slice, *box))] for box in boxes}
    elements = sum(math.prod(stop - start for start, stop in zip(*box, strict=True)) for box in boxes)
    if elements < math.prod(spec.shape) or not source.checkpoint.is_cheaper_whole:
        return dict(zip(boxes, source.read_boxes(number, list(boxes)), strict=True))
    # Many formats have one checksum for an array, so that reading it whole is the only way to verify it.
    array = source.read_box(number, whole)
    return {box: _cut(array, box) for box in boxes}


def _cut(array: np.ndarray[Any, Any], box: Box) -> np.ndarray[Any, Any]:
    """A box of an array: a view if it is contiguous, else a copy from which arrays on CPU are made without another."""
    part = array[tuple(map(slice, *box))]
    if part.flags.c_contiguous:
        return part
    copy = allocate_aligned(part.nbytes).view(part.dtype).reshape(part.shape)
    copy[...] = part
    return copy


def _place(source: _Source, targets: Sequence[Target], parts: dict[Box, np.ndarray[Any, Any]]) -> list[Any]:
    """What targets of one leaf become; of several, each gets memory of its own."""
    placed: list[Any] = []
    for target in targets:
        spec = source.manifest.spec(target.leaf)
        if target.kind == "strings":
            (array,) = parts.values()
            placed.append(_place_strings(source, target, array.copy() if placed else array))
            continue
        destinations: list[Destination] = []
        for lo, hi in boxes_of(target, spec):
            part = parts[lo[: len(spec.shape)], hi[: len(spec.shape)]]
            elements = part.copy() if placed else np.ascontiguousarray(part)
            buffer = elements.reshape(-1).view(np.uint8) if part.size else None
            destinations.append(Destination(target.leaf, (lo, hi), part.nbytes, 0, buffer))
        value = source.manifest.values.get(target.leaf)
        placed.append(place_leaf(source, target, value, destinations))
    return placed


def _place_strings(source: _Source, target: Target, array: np.ndarray[Any, Any]) -> Any:
    if array.shape:
        return array
    one: Any = array[()]
    if target.python_type is not str:
        return one
    try:
        return one.decode()
    except UnicodeDecodeError as error:
        problem = Problem(
            source.manifest.keys[target.leaf], "kind", f"is no UTF-8, `like` wants str: {error}"
        )
        raise MismatchError(list_problems(f"cannot restore {source.path!r}", [problem]), [problem]) from error
