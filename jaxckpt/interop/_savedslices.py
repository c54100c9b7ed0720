"""How is a checkpoint of TensorFlow's format V1 read?

Each of its files, one or several, is a table (`_sstable`). The value under the empty key says which tensors the file
has; every other key (`slice_key`) has a part of a tensor, or all of it.

    table's values   SavedTensorSlices {1 meta, 2 data}
    meta             {1 tensor {1 name, 2 shape, 3 data type, 4 slices}, 2 versions {1 producer, 2 oldest reader}}
    data             SavedSlice {1 name, 2 slice, 3 TensorProto}

A TensorProto has neither type nor shape here, and its values in the field of their type, one after another: floats of
four and eight bytes as they are in memory, integers and truth values as varints, half floats as varints of their bits,
strings as a field each.

1. Opening reads footer, index and first block of each file.
2. A part is read whole, with the block that holds it, which the block's checksum verifies; boxes are cut from it.

Integers are decoded many at a time: the bytes that end a varint are those below 128, and the bytes of all varints of a
piece are added up place by place.

Source: https://github.com/tensorflow/tensorflow/blob/master/tensorflow/core/util/saved_tensor_slice.proto
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, final

import numpy as np

from jaxckpt._errors import FormatError

from . import _datatypes as types
from ._datatypes import DataType, data_type
from ._files import SourceFile, corrupt
from ._partitions import (
    Array,
    Extents,
    Tensor,
    TensorSource,
    check_extents,
    parse_extents,
    parse_shape,
    slice_key,
)
from ._protobuf import WireError, content, encode_varint, fields, number
from ._sstable import Table

# The version of the format that this module reads.
_READER_VERSION = 1

# Field of a TensorProto that has the values of a data type: as they are in memory, or as varints.
_PLAIN_FIELDS = {types.FLOAT: 5, types.DOUBLE: 6, types.COMPLEX64: 9, types.COMPLEX128: 12}
_INTEGERS = (types.INT32, types.INT16, types.INT8, types.UINT16, types.UINT8)
_QUANTISED = (types.QINT32, types.QINT16, types.QINT8, types.QUINT16, types.QUINT8)
_VARINT_FIELDS = dict.fromkeys((*_INTEGERS, *_QUANTISED), 7) | {
    types.INT64: 10,
    types.BOOL: 11,
    types.HALF: 13,
    types.UINT32: 16,
    types.UINT64: 17,
}
_STRING_FIELD = 8

# Varints that are decoded at once; the work takes some forty times as much memory.
_PIECE_BYTES = 1 << 20
_VARINT_BYTES_MAX = 10


def first_record(table: Table) -> memoryview | None:
    """What a file says of its tensors, or None when the table is no checkpoint of this format."""
    key, value = table.first() or (None, memoryview(b""))
    top = dict(fields(value)) if key == b"" else {}
    meta = top.get(1)
    return meta if isinstance(meta, memoryview) else None


@final
class SavedSlices(TensorSource):
    """A checkpoint of format V1, open for reading from any thread.

    Args:
      path: Name of the checkpoint, for messages.
      files: Its files.
      count: Is told how many bytes were asked of storage.

    Raises:
      CorruptError: A file is damaged.
      FormatError: The checkpoint needs a newer reader.
    """

    def __init__(self, path: str, files: Sequence[str], count: Callable[[int], None]) -> None:
        self.path = path
        self.tensors = {}
        self._tables: list[Table] = []
        self._size = 0
        # Which file has a part; and the part that was decoded last, for `stream_part`.
        self._table_of_key: dict[bytes, Table] = {}
        self._recent: tuple[bytes, Array] | None = None
        for file in files:
            source = SourceFile(file, count)
            self._size += source.size
            table = Table(source)
            self._tables.append(table)
            try:
                meta = first_record(table)
                if meta is None:
                    raise WireError("does not begin with a list of its tensors")
                self._add_tensors(table, meta)
            except WireError as error:
                raise corrupt(file, "manifest", str(error)) from error

    def check_part(self, tensor: Tensor, part: int) -> None:
        # Each element takes a byte at least. The rest is checked when the part is decoded, before it is copied.
        if math.prod(tensor.part_shape(part)) > self._size:
            text = tensor.name.decode("utf-8", "backslashreplace")
            message = f"has {self._size} bytes, which cannot hold {text} of shape {tensor.shape}"
            raise corrupt(self.path, "length", message, text)

    def read_part(self, tensor: Tensor, part: int, lo: tuple[int, ...], hi: tuple[int, ...]) -> Array:
        values = self._decode_part(tensor, part)
        index = tuple(slice(start, stop) for start, stop in zip(lo, hi, strict=True))
        # A copy: what was decoded may be a view of the file's block, which is no one else's to change.
        return values[(*index, ...)].copy()

    def stream_part(self, tensor: Tensor, part: int, first: int, last: int) -> Array:
        key = slice_key(tensor.name, tensor.slices[part])
        recent = self._recent
        if recent is None or recent[0] != key:
            self._recent = recent = None
            recent = self._recent = (key, self._decode_part(tensor, part).reshape(-1))
        values = recent[1]
        if last == values.size:
            self._recent = None
        return values[first:last]

    def close(self) -> None:
        for table in self._tables:
            table.close()

    def _add_tensors(self, table: Table, meta: memoryview) -> None:
        for field, value in fields(meta):
            if field == 1:
                self._add_tensor(table, _parse_tensor(content(value)))
            elif field == 2:
                versions = {part: number(version) for part, version in fields(content(value)) if part == 2}
                if versions.get(2, 0) > _READER_VERSION:
                    raise FormatError(
                        f"{table.path} needs a reader of version {versions[2]} of its format; "
                        f"this one has {_READER_VERSION}"
                    )

    def _add_tensor(self, table: Table, tensor: Tensor) -> None:
        for extents in tensor.slices:
            self._table_of_key[slice_key(tensor.name, extents)] = table
        other = self.tensors.get(tensor.name)
        if other is not None:
            if (other.data_type, other.shape) != (tensor.data_type, tensor.shape):
                text = tensor.name.decode("utf-8", "backslashreplace")
                raise WireError(f"has another shape or type for {text} than the files before it")
            tensor = Tensor(tensor.name, tensor.data_type, tensor.shape, other.slices + tensor.slices)
        self.tensors[tensor.name] = tensor

    def _decode_part(self, tensor: Tensor, part: int) -> Array:
        key = slice_key(tensor.name, tensor.slices[part])
        table = self._table_of_key[key]
        text = tensor.name.decode("utf-8", "backslashreplace")
        value = table.get(key)
        if value is None:
            raise corrupt(table.path, "manifest", f"has no values for slice {part} of {text}", text)
        try:
            data = _last_content(_last_content(value, 2), 3)
            return _decode_values(data, tensor.data_type, tensor.part_shape(part))
        except WireError as error:
            raise corrupt(table.path, "manifest", f"has damaged values for {text}: {error}", text) from error


def _parse_tensor(message: memoryview) -> Tensor:
    name = b""
    shape: tuple[int, ...] = ()
    type_number = 0
    slices: list[Extents] = []
    for field, value in fields(message):
        if field == 1:
            name = content(value).tobytes()
        elif field == 2:
            shape = parse_shape(content(value))
        elif field == 3:
            type_number = number(value)
        elif field == 4:
            slices.append(parse_extents(content(value)))
    for extents in slices:
        check_extents(extents, shape)
    known = data_type(type_number)
    if not known.is_string and type_number not in _PLAIN_FIELDS and type_number not in _VARINT_FIELDS:
        known = DataType(type_number, known.name, None)
    return Tensor(name, known, shape, tuple(slices))


def _last_content(message: memoryview, wanted: int) -> memoryview:
    """The content of a field, empty when it is not there; of several, the last one counts."""
    found = memoryview(b"")
    for field, value in fields(message):
        if field == wanted:
            found = content(value)
    return found


def _decode_values(data: memoryview, kind: DataType, shape: tuple[int, ...]) -> Array:
    """The values in a TensorProto."""
    count = math.prod(shape)
    if kind.is_string:
        strings = [content(value).tobytes() for field, value in fields(data) if field == _STRING_FIELD]
        values = np.empty(len(strings), np.object_)
        values[:] = strings
    elif kind.number in _PLAIN_FIELDS:
        pieces = [content(value) for field, value in fields(data) if field == _PLAIN_FIELDS[kind.number]]
        joined = pieces[0] if len(pieces) == 1 else memoryview(b"".join(pieces))
        if len(joined) != count * _dtype_of(kind).itemsize:
            raise WireError(f"{len(joined)} bytes for {count} elements")
        values = np.frombuffer(joined, _dtype_of(kind))
    else:
        values = _decode_varints(_packed(data, _VARINT_FIELDS[kind.number]), kind, count)
    if values.size != count:
        raise WireError(f"{values.size} values for {count} elements")
    return values.reshape(shape)


def _packed(data: memoryview, wanted: int) -> memoryview:
    """The varints of a field, one after another; a writer may give each a field of its own."""
    pieces = [
        encode_varint(value) if isinstance(value, int) else value
        for field, value in fields(data)
        if field == wanted
    ]
    return (
        pieces[0] if len(pieces) == 1 and isinstance(pieces[0], memoryview) else memoryview(b"".join(pieces))
    )


def _decode_varints(packed: memoryview, kind: DataType, count: int) -> Array:
    if count > len(packed):
        raise WireError(f"{len(packed)} bytes for {count} elements")
    data = np.frombuffer(packed, np.uint8)
    values = np.empty(count, _dtype_of(kind))
    done = 0
    at = 0
    while at < data.size:
        piece = data[at : at + _PIECE_BYTES]
        ends = np.flatnonzero(piece < 0x80)
        if ends.size == 0:
            raise WireError("a number is cut off")
        decoded = _sum_varints(piece, ends)
        if decoded.size > count - done:
            raise WireError(f"more than {count} values")
        target = values[done : done + decoded.size]
        if kind.number == types.HALF:
            target.view(np.uint16)[...] = decoded.astype(np.uint16)
        else:  # a negative number has 64 bits of two's complement, of which the lowest count
            target[...] = decoded != 0 if kind.number == types.BOOL else decoded.astype(target.dtype)
        done += decoded.size
        at += int(ends[-1]) + 1
    return values[:done]


def _sum_varints(piece: Array, ends: Array) -> Array:
    """The varints that end at some places, one behind another."""
    starts = np.concatenate(([0], ends[:-1] + 1))
    lengths = ends - starts + 1
    longest = int(lengths.max())
    if longest > _VARINT_BYTES_MAX:
        raise WireError("a number has more than 64 bits")
    decoded = np.zeros(ends.size, np.uint64)
    for place in range(longest):
        is_there = lengths > place
        byte = piece[starts[is_there] + place].astype(np.uint64)
        decoded[is_there] |= (byte & np.uint64(0x7F)) << np.uint64(7 * place)
    return decoded


def _dtype_of(kind: DataType) -> np.dtype[Any]:
    assert kind.dtype is not None
    return kind.dtype
