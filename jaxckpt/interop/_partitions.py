"""How is a tensor that lies in several parts read as one?

TensorFlow may store a tensor in *slices*: boxes of it, each under a key of its own, which no list of names shows. Both
of its formats do so, and read a tensor alike: `TensorSource` knows shapes and parts, and puts boxes of tensors together
from the parts that they overlap; `_bundle` and `_savedslices` read from one part.

Invariants: before memory is taken for a box, the parts that it needs are known to be there, with as many bytes; and
parts that overlap, or leave some of the tensor to none of them, are an error and never zeros.

The key of a slice is written in an encoding whose byte order is the order of the values, `slice_key`. Nothing needs to
decode it, since the tensor's own record lists its slices.

Source: https://github.com/tensorflow/tensorflow/blob/master/tensorflow/core/util/saved_tensor_slice_util.cc,
https://github.com/tensorflow/tensorflow/blob/master/tensorflow/core/lib/strings/ordered_code.cc
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from jaxckpt._errors import CorruptError, Problem, UnsupportedLeafError

from ._datatypes import DataType
from ._protobuf import WireError, content, fields, number

Array = np.ndarray[Any, Any]
# Start and length along each axis, as the files have them; a length of -1 stands for the whole axis.
Extents = tuple[tuple[int, int], ...]
Box = tuple[tuple[int, ...], tuple[int, ...]]

# NumPy's limit.
_RANK_MAX = 64


@dataclasses.dataclass(frozen=True)
class Tensor:
    """What a file says of one tensor.

    Attributes:
      name: Its name, as bytes.
      data_type: Type of its elements.
      shape: Shape of the whole.
      slices: Its parts; one that has all of it when it is not partitioned.
    """

    name: bytes
    data_type: DataType
    shape: tuple[int, ...]
    slices: tuple[Extents, ...]

    @functools.cached_property
    def boxes(self) -> tuple[Box, ...]:
        """Where the parts are in the whole."""
        return tuple(_box_of(extents, self.shape) for extents in self.slices)

    @functools.cached_property
    def has_overlaps(self) -> bool:
        """Whether two parts have an element in common."""
        return _has_overlaps(self.boxes)

    @functools.cached_property
    def is_whole(self) -> bool:
        """Whether it is stored in one piece."""
        return len(self.slices) == 1 and self.part_shape(0) == self.shape

    def part_shape(self, part: int) -> tuple[int, ...]:
        """Shape of a part."""
        lo, hi = self.boxes[part]
        return tuple(stop - start for start, stop in zip(lo, hi, strict=True))


class TensorSource(abc.ABC):
    """The tensors of a checkpoint, by their names in its files.

    Attributes:
      path: The checkpoint.
      tensors: The tensors, in the order of the file.
    """

    path: str
    tensors: dict[bytes, Tensor]

    @abc.abstractmethod
    def check_part(self, tensor: Tensor, part: int) -> None:
        """Raises CorruptError unless the part is there, with as many bytes as it must have."""

    @abc.abstractmethod
    def read_part(self, tensor: Tensor, part: int, lo: tuple[int, ...], hi: tuple[int, ...]) -> Array:
        """A box of a part, whose first element is the part's origin; of strings an array of objects."""

    @abc.abstractmethod
    def stream_part(self, tensor: Tensor, part: int, first: int, last: int) -> Array:
        """Elements ``[first, last)`` of a part in C order; what was read in such calls in turn is verified."""

    @abc.abstractmethod
    def close(self) -> None:
        """Closes the files."""

    def read_box(self, name: bytes, lo: tuple[int, ...], hi: tuple[int, ...]) -> Array:
        """A box of a tensor, C-contiguous.

        Raises:
          CorruptError: What had to be read is damaged.
          UnsupportedLeafError: The tensor is no array.
        """
        tensor = self._readable(name)
        _check_box(lo, hi, tensor.shape)
        overlaps = list(self._overlapping_parts(tensor, lo, hi))
        for part, _, _ in overlaps:
            self.check_part(tensor, part)
        if tensor.is_whole:
            return self.read_part(tensor, 0, lo, hi)
        shape = tuple(stop - start for start, stop in zip(lo, hi, strict=True))
        whole = np.empty(shape, tensor.data_type.dtype or np.object_)
        for part, box_lo, box_hi in overlaps:
            origin = tensor.boxes[part][0]
            piece = self.read_part(tensor, part, _minus(box_lo, origin), _minus(box_hi, origin))
            whole[_index(_minus(box_lo, lo), _minus(box_hi, lo))] = piece
        return whole

    def stream(self, name: bytes, lo: int, hi: int) -> Array:
        """Bytes ``[lo, hi)`` of a tensor in C order, as an array of its elements; both are multiples of their size.

        Raises:
          CorruptError: What was read is damaged.
          UnsupportedLeafError: The tensor is no array.
        """
        tensor = self._readable(name)
        dtype = tensor.data_type.dtype
        if dtype is None:
            raise TypeError("strings have no fixed size, and are not streamed")
        if lo % dtype.itemsize or hi % dtype.itemsize:
            raise ValueError(f"bytes [{lo}, {hi}) cut an element of {dtype.itemsize} bytes")
        first, last = lo // dtype.itemsize, hi // dtype.itemsize
        if not 0 <= first <= last <= math.prod(tensor.shape):
            raise ValueError(f"elements [{first}, {last}) of {math.prod(tensor.shape)}")
        if tensor.is_whole:
            self.check_part(tensor, 0)
            return self.stream_part(tensor, 0, first, last)
        pieces = np.empty(last - first, dtype)
        at = 0
        for box_lo, box_hi in boxes_of_range(tensor.shape, first, last):
            sizes = tuple(stop - start for start, stop in zip(box_lo, box_hi, strict=True))
            target = pieces[at : at + math.prod(sizes)].reshape(sizes)
            at += math.prod(sizes)
            self._stream_box(tensor, box_lo, box_hi, target)
        return pieces

    def _stream_box(self, tensor: Tensor, lo: tuple[int, ...], hi: tuple[int, ...], target: Array) -> None:
        """Fills an array with a box that is a run of the tensor, and so of each part."""
        for part, box_lo, box_hi in self._overlapping_parts(tensor, lo, hi):
            self.check_part(tensor, part)
            sizes = _minus(box_hi, box_lo)
            first = _place(_minus(box_lo, tensor.boxes[part][0]), tensor.part_shape(part))
            run = self.stream_part(tensor, part, first, first + math.prod(sizes))
            target[_index(_minus(box_lo, lo), _minus(box_hi, lo))] = run.reshape(sizes)

    def _readable(self, name: bytes) -> Tensor:
        tensor = self.tensors[name]
        if not tensor.data_type.is_supported:
            text = name.decode("utf-8", "backslashreplace")
            raise UnsupportedLeafError(
                f"{self.path}: {text} has the type {tensor.data_type.name}, which is no array",
                [Problem(text, "dtype", f"has the type {tensor.data_type.name}, which is no array")],
            )
        return tensor

    def _overlapping_parts(
        self, tensor: Tensor, lo: tuple[int, ...], hi: tuple[int, ...]
    ) -> Iterator[tuple[int, tuple[int, ...], tuple[int, ...]]]:
        """The parts that a box needs, each with what it has of the box; together they have all of it, once."""
        if tensor.is_whole:
            yield 0, lo, hi
            return
        size = math.prod(_minus(hi, lo))
        if size and tensor.has_overlaps:
            raise self._uncovered(tensor, "are stored twice")
        for part, (part_lo, part_hi) in enumerate(tensor.boxes):
            box_lo = tuple(map(max, lo, part_lo))
            box_hi = tuple(map(min, hi, part_hi))
            if all(start < stop for start, stop in zip(box_lo, box_hi, strict=True)):
                yield part, box_lo, box_hi
                size -= math.prod(_minus(box_hi, box_lo))
        if size:
            raise self._uncovered(tensor, "are in none of its slices")

    def _uncovered(self, tensor: Tensor, what: str) -> CorruptError:
        text = tensor.name.decode("utf-8", "backslashreplace")
        message = f"{self.path}: elements of {text} {what}"
        return CorruptError(message, [Problem(text, "manifest", message)])


def boxes_of_range(shape: tuple[int, ...], first: int, last: int) -> Iterator[Box]:
    """Boxes that have the elements ``[first, last)`` of an array in C order; each is a run of the array."""
    if first >= last:
        return
    if not shape:
        yield (), ()
        return
    row = math.prod(shape[1:])
    first_row, first_rest = divmod(first, row)
    last_row, last_rest = divmod(last, row)
    if first_row == last_row:
        yield from _in_row(first_row, shape, first_rest, last_rest)
        return
    if first_rest:
        yield from _in_row(first_row, shape, first_rest, row)
        first_row += 1
    if first_row < last_row:
        yield (first_row, *(0 for _ in shape[1:])), (last_row, *shape[1:])
    if last_rest:
        yield from _in_row(last_row, shape, 0, last_rest)


def _in_row(row: int, shape: tuple[int, ...], first: int, last: int) -> Iterator[Box]:
    for lo, hi in boxes_of_range(shape[1:], first, last):
        yield (row, *lo), (row + 1, *hi)


def whole_extents(rank: int) -> Extents:
    """The slice that has all of a tensor."""
    return ((0, -1),) * rank


def parse_shape(message: memoryview) -> tuple[int, ...]:
    """The shape in a TensorShapeProto.

    Raises:
      WireError: It has none, or one that no array has.
    """
    shape: list[int] = []
    for field, value in fields(message):
        if field == 2:
            sizes = [number(size) for part, size in fields(content(value)) if part == 1]
            shape.append(sizes[-1] if sizes else 0)
        if field == 3 and number(value):
            raise WireError("a tensor has a shape of unknown rank")
    # Sixteen bytes are the widest element.
    if len(shape) > _RANK_MAX or min(shape, default=0) < 0 or math.prod(max(d, 1) for d in shape) >= 1 << 59:
        raise WireError(f"a tensor has the impossible shape {shape[:_RANK_MAX]}")
    return tuple(shape)


def parse_extents(message: memoryview) -> Extents:
    """The extents in a TensorSliceProto.

    Raises:
      WireError: It is none.
    """
    extents: list[tuple[int, int]] = []
    for field, value in fields(message):
        if field == 1:
            parts = {part: number(part_value) for part, part_value in fields(content(value))}
            extents.append((parts.get(1, 0), parts.get(2, -1)))
    return tuple(extents)


def check_extents(extents: Extents, shape: tuple[int, ...]) -> None:
    """Raises WireError unless a slice lies in the tensor."""
    is_inside = len(extents) == len(shape) and all(
        (start == 0 and length == -1) or (start >= 0 and length >= 0 and start + length <= size)
        for (start, length), size in zip(extents, shape, strict=True)
    )
    if not is_inside:
        raise WireError(f"a slice lies outside of its tensor of shape {shape}")


def slice_key(name: bytes, extents: Extents) -> bytes:
    """The key under which a slice of a tensor is stored."""
    escaped = b"".join({0x00: b"\x00\xff", 0xFF: b"\xff\x00"}.get(byte, bytes([byte])) for byte in name)
    key = _ordered_number(0) + escaped + b"\x00\x01" + _ordered_number(len(extents))
    for start, length in extents:
        key += _ordered_signed(start) + _ordered_signed(length)
    return key


def _ordered_number(value: int) -> bytes:
    digits = value.to_bytes((value.bit_length() + 7) // 8, "big")
    return bytes([len(digits)]) + digits


def _ordered_signed(value: int) -> bytes:
    """Two's complement of n bytes, with as many leading bits as there are bytes turned over, and the sign's."""
    magnitude = ~value if value < 0 else value
    size = magnitude.bit_length() // 7 + 1
    bits = value & ((1 << 8 * size) - 1)
    # n ones and a zero, for n bytes: 0x80, 0xc000, 0xe00000.
    header = ((1 << size) - 1) << (8 * size - size)
    return (bits ^ header).to_bytes(size, "big")


def _box_of(extents: Extents, shape: tuple[int, ...]) -> Box:
    lo = tuple(start for start, _ in extents)
    hi = tuple(
        size if length < 0 else start + length for (start, length), size in zip(extents, shape, strict=True)
    )
    return lo, hi


def _has_overlaps(boxes: Sequence[Box]) -> bool:
    """Whether two boxes have an element in common. Boxes are compared where they meet along one axis only."""
    boxes = [box for box in boxes if all(start < stop for start, stop in zip(*box, strict=True))]
    if len(boxes) < 2:
        return False
    lo = np.array([box[0] for box in boxes], np.int64)
    hi = np.array([box[1] for box in boxes], np.int64)
    if lo.shape[1] == 0:
        return True
    axis = max(range(lo.shape[1]), key=lambda each: np.unique(lo[:, each]).size)
    order = np.argsort(lo[:, axis], kind="stable")
    lo, hi = lo[order], hi[order]
    ends = np.searchsorted(lo[:, axis], hi[:, axis])
    for place, end in enumerate(ends):
        others = slice(place + 1, int(end))
        if np.any(np.all((lo[others] < hi[place]) & (lo[place] < hi[others]), axis=1)):
            return True
    return False


def _check_box(lo: tuple[int, ...], hi: tuple[int, ...], shape: tuple[int, ...]) -> None:
    is_inside = len(lo) == len(hi) == len(shape) and all(
        0 <= start <= stop <= size for start, stop, size in zip(lo, hi, shape, strict=True)
    )
    if not is_inside:
        raise IndexError(f"the box from {lo} to {hi} is not in the shape {shape}")


def _minus(place: tuple[int, ...], origin: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(each - start for each, start in zip(place, origin, strict=True))


def _index(lo: tuple[int, ...], hi: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(slice(start, stop) for start, stop in zip(lo, hi, strict=True))


def _place(index: tuple[int, ...], shape: tuple[int, ...]) -> int:
    """Place in C order of an element."""
    place = 0
    for each, size in zip(index, shape, strict=True):
        place = place * size + each
    return place
