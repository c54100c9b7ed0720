"""What of a save follows from the kinds of its leaves, and need not be found out again for the next one?

A training loop saves the same kinds of leaves under the same keys again and again. Which chunks go where, the
directories and ``zarr.json`` objects, the specs of the manifest and the columns of owners are the same each time. A
`SavePlan` holds them; `plan_save` remembers the last few. They hold no arrays and no values.

Invariant: a plan is found again by the `Kinds` object itself, which `_leaves` gives only to trees whose leaves are all
of the same kinds, in the same order. Deliberately not here: anything that belongs to one save.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, final

import numpy as np

from ._config import SPLIT_BYTES_MIN
from ._errors import Problem, UnsupportedLeafError, list_problems
from ._garbage import collection_paused
from ._layout import PACK_BYTES, LeafExtent, Share, WritePlan, is_divisible, plan_writes, present_chunks
from ._leaves import Kinds
from ._manifest import LeafSpec
from ._ownership import share_writes
from ._shardings import describe_sharding
from ._zarr import METADATA_NAME, array_metadata, group_metadata, leaf_directory


@dataclasses.dataclass(frozen=True, slots=True)
class Specs:
    """The columns of the manifest that say what the leaves are.

    Attributes:
      specs: Each once.
      index: ``uint32[leaves]``, number of the spec of each leaf.
      shardings: Descriptors, each once.
    """

    specs: tuple[LeafSpec, ...]
    index: np.ndarray[Any, Any]
    shardings: tuple[dict[str, Any], ...]


@final
@dataclasses.dataclass(frozen=True, eq=False)
class SavePlan:
    """All that equal trees share when they are saved with the same options.

    Attributes:
      keys: Of the leaves.
      kinds: Of the leaves.
      writes: What this process writes.
      shares: Who writes which chunk of each leaf, where the processes of a group share the writing.
      directories: Directory of each leaf that is a Zarr array: of those with objects of their own, or of all when
        nothing is packed.
    """

    keys: tuple[str, ...]
    kinds: Kinds
    writes: WritePlan
    shares: Sequence[Share | None] | None
    directories: dict[int, str]

    @functools.cached_property
    def zarr_objects(self) -> dict[str, bytes]:
        """The ``zarr.json`` objects of the directories and of all above them, by their path in the data directory."""
        objects: dict[str, bytes] = {}
        for leaf, directory in self.directories.items():
            objects[f"{directory}/{METADATA_NAME}"] = array_metadata(self.keys[leaf], self._spec(leaf, None))
            parts = directory.split("/")
            for depth in range(1, len(parts)):
                objects["/".join([*parts[:depth], METADATA_NAME])] = group_metadata()
        return objects

    @functools.cached_property
    def specs(self) -> Specs:
        """The specs of the leaves; equal leaves share one."""
        shardings: dict[int, int] = {}
        descriptors: list[dict[str, Any]] = []
        numbers: dict[Any, int] = {}
        specs: list[LeafSpec] = []
        index = np.zeros(len(self.kinds.templates), np.uint32)
        for leaf, template in enumerate(self.kinds.templates):
            sharding = None
            descriptor = template.descriptor
            if template.sharding is not None:
                descriptor = describe_sharding(template.sharding)
            if descriptor is not None:
                sharding = shardings.setdefault(id(descriptor), len(descriptors))
                if sharding == len(descriptors):
                    descriptors.append(descriptor)
            # Shardings and device templates are remembered objects; host arrays are compared by what they are.
            identity = (
                id(template) if template.sharding is not None else repr(template.spec),
                sharding,
                self.writes.chunk_shapes[leaf],
            )
            if identity not in numbers:
                numbers[identity] = len(specs)
                specs.append(self._spec(leaf, sharding))
            index[leaf] = numbers[identity]
        return Specs(tuple(specs), index, tuple(descriptors))

    @functools.cached_property
    def owners(self) -> tuple[tuple[np.ndarray[Any, Any], ...], np.ndarray[Any, Any]]:
        """Columns of owners for a checkpoint of a group, each once, and the number of each leaf's."""
        columns: dict[Any, int] = {}
        found: list[np.ndarray[Any, Any]] = []
        index = np.full(len(self.keys), -1, np.int32)
        for leaf, extent in enumerate(self.kinds.extents):
            chunk_shape = self.writes.chunk_shapes[leaf]
            share = None if self.shares is None else self.shares[leaf]
            if extent is None or 0 in extent.shape:
                continue
            identity = (extent, chunk_shape) if share is None else id(share.owners)
            number = columns.get(identity)
            if number is None:
                number = columns[identity] = len(found)
                found.append(present_chunks(extent, chunk_shape) if share is None else share.owners)
            index[leaf] = number
        return tuple(found), index

    def _spec(self, leaf: int, sharding: int | None) -> LeafSpec:
        chunk_shape = self.writes.chunk_shapes[leaf]
        return dataclasses.replace(
            self.kinds.templates[leaf].spec, chunk_shape=chunk_shape, sharding=sharding
        )


@functools.lru_cache(maxsize=8)
@collection_paused()
def plan_save(
    keys: tuple[str, ...],
    kinds: Kinds,
    *,
    chunk_bytes_max: int,
    pack_bytes_max: int,
    pack_object_bytes: int = PACK_BYTES,
    piece_bytes: int,
    group: tuple[int, int] | None,
) -> SavePlan:
    """The plan of a save.

    Args:
      keys: Of the leaves.
      kinds: Of the leaves.
      chunk_bytes_max: As in the options.
      pack_bytes_max: As in the options.
      pack_object_bytes: A pack is closed when it has so many.
      piece_bytes: Most bytes of a piece.
      group: Index of this process and their number, where they share the writing.

    Raises:
      UnsupportedLeafError: A leaf cannot be cut into objects of a size that storage takes.
    """
    _require_divisible(keys, kinds.extents, chunk_bytes_max)
    shares = None
    if group is not None:
        shares = share_writes(
            kinds.extents, group[1], chunk_bytes_max=chunk_bytes_max, split_bytes_min=SPLIT_BYTES_MIN
        )
    writes = plan_writes(
        kinds.extents,
        chunk_bytes_max=chunk_bytes_max,
        pack_bytes_max=pack_bytes_max,
        piece_bytes=piece_bytes,
        pack_object_bytes=pack_object_bytes,
        shares=shares,
        process=0 if group is None else group[0],
    )
    directories = set(writes.unpacked)
    if pack_bytes_max == 0:
        directories |= {leaf for leaf, extent in enumerate(kinds.extents) if extent is not None}
    return SavePlan(
        keys, kinds, writes, shares, {leaf: leaf_directory(keys[leaf]) for leaf in sorted(directories)}
    )


def _require_divisible(
    keys: Sequence[str], extents: Sequence[LeafExtent | None], chunk_bytes_max: int
) -> None:
    problems = [
        Problem(
            keys[leaf], "shape", f"its shards of shape {extent.shard_shape} divide into single elements only"
        )
        for leaf, extent in enumerate(extents)
        if extent is not None and not is_divisible(extent, chunk_bytes_max)
    ]
    if problems:
        headline = (
            f"cannot save {len(problems)} leaves, whose shards are larger than an object may be (4 GiB)"
        )
        advice = ["nothing was written; give them another shape, or pad them"]
        raise UnsupportedLeafError(list_problems(headline, problems, advice), problems)
