"""What bytes has a leaf of any kind in the file of another library?

`contents_of` takes arrays of JAX and NumPy, Python's scalars and strings, typed keys, and leaves of open checkpoints,
ours and foreign ones, which are read and verified while they are written. An array comes piece by piece, so that none
is in memory twice. Which names and dtypes a format has is for its module.

Deliberately not here: groups of processes. An array of which this process has only a part is refused.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, final

import jax
import numpy as np

from jaxckpt._config import PIECE_BYTES
from jaxckpt._errors import UnsupportedLeafError
from jaxckpt._foreign import ForeignArray
from jaxckpt._layout import Run, contiguous_runs, intersect
from jaxckpt._leaves import StreamedArray, inspect_leaves
from jaxckpt._reading import StoredLeaf
from jaxckpt._shardings import Box, local_boxes
from jaxckpt._storage import Buffer, ObjectWriter, allocate_aligned
from jaxckpt._viewing import read_shard

Array = np.ndarray[Any, Any]

# Bytes of a leaf that are read at once. With a cast, a few times as many are in memory.
_RUN_BYTES = PIECE_BYTES // 4


class RefusedError(Exception):
    """Says why a leaf cannot be written and what to do."""


@final
@dataclasses.dataclass(frozen=True, slots=True)
class ArrayContents:
    """An array on its way into a file.

    Attributes:
      shape: Shape.
      dtype: Type of the elements, in native byte order.
      read_run: Reads a part of it.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    read_run: Callable[[Run], Array]

    @property
    def nbytes(self) -> int:
        """Bytes of all elements."""
        return math.prod(self.shape) * self.dtype.itemsize

    def pieces(self) -> Iterator[Buffer]:
        """Its bytes in C order, some MiB at a time."""
        for run in contiguous_runs(self.shape, self.dtype.itemsize, _RUN_BYTES):
            yield np.ascontiguousarray(self.read_run(run), self.dtype).reshape(-1).view(np.uint8)


@final
@dataclasses.dataclass(frozen=True, slots=True)
class StringContents:
    """Strings of bytes or text on their way into a file: their shape, and they in C order."""

    shape: tuple[int, ...]
    strings: Sequence[Any]


def contents_of(leaf: Any) -> ArrayContents | StringContents:
    """What is to be written for a leaf. Python's int becomes int64, float float64, complex complex128.

    Raises:
      RefusedError: It has no bytes that this process could write.
    """
    if isinstance(leaf, (StoredLeaf, ForeignArray)):
        return _contents_of_stored(leaf)
    if isinstance(leaf, StreamedArray):
        read, dtype = leaf.read, leaf.dtype
        return _array(leaf.shape, dtype, lambda run: read(run.lo, run.hi).view(dtype))
    if isinstance(leaf, jax.Array):
        data = _inspected(leaf)
        return _array(data.shape, np.dtype(data.dtype), _shard_reader(data))
    if isinstance(leaf, (str, bytes)):  # NumPy's own strings are these too
        return StringContents((), [leaf])
    if isinstance(leaf, np.ndarray) and leaf.dtype.kind in "OSUT":
        return StringContents(leaf.shape, leaf.reshape(-1).tolist())
    is_scalar = isinstance(leaf, (int, float, complex, np.generic))
    array = _scalar_array(leaf) if is_scalar else _inspected(leaf)
    return _array(array.shape, array.dtype, lambda run: array[tuple(map(slice, *run.box))])


def _array(shape: tuple[int, ...], dtype: np.dtype[Any], read_run: Callable[[Run], Array]) -> ArrayContents:
    return ArrayContents(shape, dtype.newbyteorder("="), read_run)


def _contents_of_stored(leaf: StoredLeaf | ForeignArray) -> ArrayContents | StringContents:
    """A leaf of an open checkpoint: read in order, and verified."""
    if isinstance(leaf, StoredLeaf):
        if leaf.kind not in ("array", "numpy", "key"):
            return contents_of(leaf[...])
        return _array(leaf.spec.shape, leaf.spec.np_dtype, lambda run: leaf.read_box(run.box))
    dtype = leaf.dtype
    if dtype is not None:
        checkpoint = leaf.checkpoint
        return _array(
            leaf.shape, dtype, lambda run: np.frombuffer(checkpoint.stream(leaf.key, run.lo, run.hi), dtype)
        )
    try:
        return contents_of(leaf[...])
    except UnsupportedLeafError as error:
        raise RefusedError(str(error)) from error


def _inspected(leaf: Any) -> Any:
    """The array that holds the bytes of a leaf, as `jaxckpt.save` stores it."""
    try:
        (array,) = inspect_leaves([""], [leaf]).arrays
    except UnsupportedLeafError as error:
        raise RefusedError(error.problems[0].message) from error
    return array


def _scalar_array(leaf: complex | np.generic) -> Array:
    if not isinstance(leaf, int) or isinstance(leaf, bool):
        return np.asarray(leaf)
    try:
        return np.asarray(leaf, np.int64)
    except OverflowError as error:
        raise RefusedError("is an integer that does not fit into 64 bits") from error


def _shard_reader(data: jax.Array) -> Callable[[Run], Array]:
    """Reads parts of an array from the shards that hold them.

    Raises:
      RefusedError: Other processes hold some of it.
    """
    number_of_box: dict[Box, int] = {}
    for number, (_, box) in enumerate(local_boxes(data.sharding, data.shape)):
        number_of_box.setdefault(box, number)
    sizes = [math.prod(stop - start for start, stop in zip(*box, strict=True)) for box in number_of_box]
    if sum(sizes) != data.size:
        raise RefusedError(
            "is spread over several processes, and one process writes the files; gather it first "
            "(jax.experimental.multihost_utils.process_allgather)"
        )

    def read_run(run: Run) -> Array:
        found = np.empty(run.sizes, data.dtype)
        for box, number in number_of_box.items():
            shared = intersect(run.box, box)
            if shared is not None:
                place = tuple(map(slice, *_relative(shared, run.box[0])))
                found[place] = read_shard(data, number, _relative(shared, box[0]))
        return found

    return read_run


def _relative(box: Box, origin: tuple[int, ...]) -> Box:
    """A box as it is seen from an origin."""
    lo, hi = (tuple(place - start for place, start in zip(corner, origin, strict=True)) for corner in box)
    return lo, hi


@final
class WriteBuffer:
    """Gathers pieces of any length into those that an `ObjectWriter` takes."""

    def __init__(self, writer: ObjectWriter) -> None:
        self._writer = writer
        self._buffer = allocate_aligned(PIECE_BYTES)
        self._filled = 0
        self.offset = 0

    def append(self, data: Buffer) -> None:
        """Adds bytes behind the others."""
        while len(data):
            part = data[: len(self._buffer) - self._filled]
            self._buffer[self._filled : self._filled + len(part)] = part
            self._filled += len(part)
            self.offset += len(part)
            if self._filled == len(self._buffer):
                self.flush()
            data = data[len(part) :]

    def flush(self) -> None:
        """Writes what is gathered; only the last time it may be less than a buffer."""
        self._writer.write(self.offset - self._filled, self._buffer[: self._filled])
        self._filled = 0
