"""How do rows of saved leaves become a leaf?

What a `Derivation` says is read here and placed on the devices:

1. Every distinct box that the devices of this process need gets memory, in the dtype that is wanted; rows of ``like``
   are put there first.
2. The saved leaves are read in *slabs*, from the first row to the last, trimmed to the rows that are wanted. All boxes
   are filled from one reading, so that a table whose rows changed places is read once, however many devices have a part
   of it. Where the rows do not lie along the first axis, a slab has all of them and is cut along that one: otherwise
   each would touch every part of the leaf.
3. The boxes become the leaf as those of any other leaf do (`_placement`).

Reading is left to a function, so that the checkpoints of other libraries can be read in the same way. It verifies.

Deliberately not here: groups of processes. Each reads for its own devices; nothing is exchanged.
"""

from __future__ import annotations

import bisect
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np

from ._config import PIECE_BYTES
from ._deriving import Derivation
from ._layout import intersect
from ._manifest import Manifest
from ._placement import Target, assemble, cast, finish
from ._shardings import Box, box_of, shard_boxes
from ._storage import allocate_aligned

# As much as four threads read at a time.
_SLAB_BYTES = 4 * PIECE_BYTES

# Reads a box of the saved leaf with a number.
ReadBox = Callable[[int, Box], np.ndarray[Any, Any]]


def gather(manifest: Manifest, target: Target, read_box: ReadBox, slab_bytes: int = _SLAB_BYTES) -> Any:
    """Makes a leaf of rows of saved leaves.

    Args:
      manifest: What is saved.
      target: What is wanted; it has a derivation.
      read_box: Reads and verifies boxes of saved leaves.
      slab_bytes: Most bytes of one reading, but for a row.

    Raises:
      CorruptError: Stored bytes are damaged.

    Host memory: the boxes of this process, and two slabs.
    """
    derivation = target.derivation
    assert derivation is not None
    dtype = target.dtype or derivation.spec.np_dtype
    is_placed = target.kind == "array" and target.sharding is not None
    boxes = [((0,) * len(target.shape), target.shape)]
    if is_placed:
        assert target.sharding is not None
        boxes = list(shard_boxes(target.sharding, target.shape))
    arrays = {box: _empty(box, dtype) for box in boxes}
    if derivation.base is not None:
        _keep_rows(derivation, arrays)
    _read_rows(manifest, derivation, arrays, read_box, slab_bytes)
    if target.kind == "numpy":
        return arrays[boxes[0]]
    shards = {lo: array for (lo, _), array in arrays.items()}
    return finish(target, derivation.spec, assemble(target, dtype, shards))


def _empty(box: Box, dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
    sizes = _sizes(box)
    nbytes = math.prod(sizes) * dtype.itemsize
    return allocate_aligned(nbytes).view(dtype).reshape(sizes) if nbytes else np.ndarray(sizes, dtype)


def _sizes(box: Box) -> tuple[int, ...]:
    return tuple(hi - lo for lo, hi in zip(*box, strict=True))


# --- rows of `like` -------------------------------------------------------------------------------------------


def _keep_rows(derivation: Derivation, arrays: dict[Box, np.ndarray[Any, Any]]) -> None:
    """Puts rows of ``like`` into the boxes."""
    base, axis = derivation.base, derivation.axis
    held: dict[Box, Any] = {((0,) * base.ndim, base.shape): base}
    if isinstance(base, jax.Array):
        held = {box_of(shard.index, base.shape): shard.data for shard in base.addressable_shards}
    for box, array in arrays.items():
        kept = box[0][axis] + np.flatnonzero(np.asarray(_rows_of_box(derivation, box)) < 0)
        for held_box, source in held.items():
            shared = intersect(box, held_box)
            if shared is None:
                continue
            rows = kept[(kept >= shared[0][axis]) & (kept < shared[1][axis])]
            if not len(rows):
                continue
            # An array keeps a copy of the values that it is asked for, so a small one is made, which is dropped.
            with jax.transfer_guard_device_to_host("allow"):
                values = np.asarray(source.take(rows - held_box[0][axis], axis=axis))
            values = np.moveaxis(values, axis, 0)[_places(shared, held_box, axis)]
            np.moveaxis(array, axis, 0)[(rows - box[0][axis], *_places(shared, box, axis)[1:])] = values


def _places(box: Box, origin: Box, axis: int) -> tuple[slice, ...]:
    """Where a box lies in one around it: all rows, then slices along the other axes."""
    places = [slice(lo - start, hi - start) for lo, hi, start in zip(*box, origin[0], strict=True)]
    del places[axis]
    return (slice(None), *places)


def has_shards_of(base: jax.Array, sharding: Any) -> bool:
    """Whether an array lies on its devices as a sharding says."""
    return sharding is not None and base.sharding.is_equivalent_to(sharding, base.ndim)


# --- rows of saved leaves -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class _Part:
    """What one box wants of saved rows.

    Attributes:
      box: The box.
      array: Its memory, with the rows along the first axis.
      rows: The saved rows that it wants, ascending.
      places: Which of its rows each of these becomes; None where that is their order.
    """

    box: Box
    array: np.ndarray[Any, Any]
    rows: range | np.ndarray[Any, Any]
    places: np.ndarray[Any, Any] | None

    def between(self, lo: int, hi: int) -> range:
        """Which of the wanted rows lie in a range of saved rows."""
        return range(bisect.bisect_left(self.rows, lo), bisect.bisect_left(self.rows, hi))

    def fill(self, which: range, slab: np.ndarray[Any, Any], across: Box, axis: int, first: int) -> None:
        """Copies wanted rows from a slab.

        Args:
          which: Which of the wanted rows.
          slab: Saved rows, along its first axis.
          across: What the slab has of the other axes.
          axis: The axis of the rows in both boxes.
          first: The first saved row of the slab.
        """
        shared = intersect(_with_rows(self.box, axis, 0, 1), _with_rows(across, axis, 0, 1))
        if shared is None:
            return
        start, stop = which.start, which.stop
        found = slab[_places(shared, across, axis)]
        if isinstance(self.rows, range):
            found = found[self.rows[start] - first : self.rows[stop - 1] + 1 - first]
        else:
            found = found[self.rows[start:stop] - first]
        places = slice(start, stop) if self.places is None else self.places[start:stop]
        self.array[_places(shared, self.box, axis)][places] = cast(found, self.array.dtype)


def _read_rows(
    manifest: Manifest,
    derivation: Derivation,
    arrays: dict[Box, np.ndarray[Any, Any]],
    read_box: ReadBox,
    slab_bytes: int,
) -> None:
    """Fills boxes with saved rows."""
    axis = derivation.axis
    itemsize = derivation.spec.np_dtype.itemsize
    counts = [manifest.spec(leaf).shape[axis] for leaf in derivation.leaves]
    parts = [_part_of(derivation, box, array) for box, array in arrays.items() if array.size]
    for across in _cut_across(arrays, axis, slab_bytes // itemsize, max(counts)):
        row_bytes = math.prod(_sizes(_with_rows(across, axis, 0, 1))) * itemsize
        slab_rows = max(1, slab_bytes // max(row_bytes, 1))
        end = 0
        for leaf, count in zip(derivation.leaves, counts, strict=True):
            begin, end = end, end + count
            for start in range(begin, end, slab_rows):
                stop = min(start + slab_rows, end)
                wanted = [(part, which) for part in parts if (which := part.between(start, stop))]
                if not wanted:
                    continue
                first = min(int(part.rows[which[0]]) for part, which in wanted)
                last = max(int(part.rows[which[-1]]) for part, which in wanted)
                box = _with_rows(across, axis, first - begin, last + 1 - begin)
                slab = np.moveaxis(read_box(leaf, box), axis, 0)
                for part, which in wanted:
                    part.fill(which, slab, across, axis, first)


def _part_of(derivation: Derivation, box: Box, array: np.ndarray[Any, Any]) -> _Part:
    rows, places = _rows_of_box(derivation, box), None
    if not isinstance(rows, range):
        places = np.argsort(rows, kind="stable")[np.count_nonzero(rows < 0) :]
        rows = rows[places]
    return _Part(box, np.moveaxis(array, derivation.axis, 0), rows, places)


def _cut_across(boxes: Iterable[Box], axis: int, slab_elements: int, line_elements: int) -> Iterator[Box]:
    """What is read of the axes that are not of the rows, one after the other.

    Args:
      boxes: Everything that is wanted.
      axis: The axis of the rows.
      slab_elements: Elements of a slab.
      line_elements: Most elements of a saved leaf at one place of the other axes.
    """
    filled = [box for box in boxes if all(_sizes(box))]
    if not filled:
        return
    lo = tuple(map(min, zip(*(box[0] for box in filled), strict=True)))
    hi = tuple(map(max, zip(*(box[1] for box in filled), strict=True)))
    if axis == 0:
        yield lo, hi
        return
    elements = math.prod(_sizes(_with_rows((lo, hi), axis, 0, line_elements))[1:])
    thickness = max(1, slab_elements // max(elements, 1))
    for start in range(lo[0], hi[0], thickness):
        yield (start, *lo[1:]), (min(start + thickness, hi[0]), *hi[1:])


def _rows_of_box(derivation: Derivation, box: Box) -> range | np.ndarray[Any, Any]:
    return derivation.rows[box[0][derivation.axis] : box[1][derivation.axis]]


def _with_rows(box: Box, axis: int, lo: int, hi: int) -> Box:
    """The box with another range of rows."""
    return (*box[0][:axis], lo, *box[0][axis + 1 :]), (*box[1][:axis], hi, *box[1][axis + 1 :])
