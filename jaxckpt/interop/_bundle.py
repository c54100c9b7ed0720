"""How is a checkpoint of TensorFlow's format V2, a *bundle*, read?

A bundle is ``PREFIX.index``, a table (`_sstable`) of records by the names of the tensors, and one file or more with
their bytes, ``PREFIX.data-00000-of-00001``. The record under the empty key is the bundle's header.

    header  1 number of data files; 2 byte order (0 little, 1 big); 3 versions {1 producer, 2 oldest reader}
    record  1 data type; 2 shape {2 dimension {1 size}}; 3 data file; 4 offset; 5 size in bytes;
            6 masked CRC-32C of the bytes; 7 slices {1 extent {1 start, 2 length}}

A record that lists slices has no bytes: each slice has a record under its own key, which no list shows.

The bytes of a tensor are its elements in C order, nothing else, and no element is aligned. A tensor of strings is the
lengths as varints, a masked CRC-32C of the lengths (each as four bytes, or eight above 2^32 - 1), and the bytes of all
strings.

1. Opening reads the whole index, which is verified block by block, and checks that no two records share bytes.
2. A tensor that is read whole is verified by its checksum. The format has one for a whole record, so that a part of a
   record can be verified only by reading all of it; that is done if `verify_slices` says so, and a part is read alone
   otherwise. Strings are always read whole.
3. A record that is streamed from its beginning to its end is verified with its last bytes.

Deliberately not here: names of objects (`_objects`), and where the files of a checkpoint are (`_locations`).

Source: https://github.com/tensorflow/tensorflow/blob/master/tensorflow/core/protobuf/tensor_bundle.proto,
https://github.com/tensorflow/tensorflow/blob/master/tensorflow/core/util/tensor_bundle/tensor_bundle.cc
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import threading
from collections.abc import Callable
from typing import Any, final

import numpy as np

from jaxckpt._errors import CorruptError, FormatError, NotFoundError

from ._crc import crc32c, extend, mask
from ._datatypes import DataType, data_type
from ._files import SourceFile, corrupt, read_box
from ._partitions import (
    Array,
    Extents,
    Tensor,
    TensorSource,
    check_extents,
    parse_extents,
    parse_shape,
    slice_key,
    whole_extents,
)
from ._protobuf import WireError, content, fields, number, read_varint
from ._sstable import Table

# The version of the format that this module reads.
_READER_VERSION = 1
_SHARDS_MAX = 99999

# Bytes that are read at once when a checksum is made of them: enough for `extend`, and they stay in the cache.
_PIECE_BYTES = 4 << 20


@final
@dataclasses.dataclass(frozen=True, slots=True)
class _Record:
    """Where bytes are, and their masked checksum."""

    data_type: DataType
    shape: tuple[int, ...]
    shard: int
    offset: int
    size: int
    checksum: int
    slices: tuple[Extents, ...]

    @property
    def end(self) -> int:
        return self.offset + self.size


@final
class Bundle(TensorSource):
    """A bundle, open for reading from any thread.

    Args:
      prefix: What the names of its files begin with.
      count: Is told how many bytes were asked of storage.
      verify_slices: Whether all of a record is read and verified before a part of it is returned.

    Raises:
      CorruptError: The index is damaged.
      FormatError: The bundle needs a newer reader.
    """

    def __init__(self, prefix: str, count: Callable[[int], None], *, verify_slices: bool = False) -> None:
        self.path = prefix
        self._count = count
        self._verify_slices = verify_slices
        self._index = f"{prefix}.index"
        self._records: dict[bytes, _Record] = {}
        self._shards: dict[int, SourceFile] = {}
        self._lock = threading.Lock()
        self._is_closed = False
        # What was verified whole; and how far a record was streamed, with the checksum up to there.
        self._verified: set[bytes] = set()
        self._streamed: dict[bytes, tuple[int, int]] = {}
        table = Table(SourceFile(self._index, count))
        try:
            self._read_index(table)
        except WireError as error:
            raise corrupt(self._index, "manifest", str(error)) from error
        finally:
            table.close()
        self._check_ranges()
        hidden = {slice_key(key, part) for key, record in self._records.items() for part in record.slices}
        self.tensors = {
            key: Tensor(
                key, record.data_type, record.shape, record.slices or (whole_extents(len(record.shape)),)
            )
            for key, record in self._records.items()
            if key not in hidden
        }

    def check_part(self, tensor: Tensor, part: int) -> None:
        key = self._part_key(tensor, part)
        record = self._records.get(key)
        text = tensor.name.decode("utf-8", "backslashreplace")
        if record is None:
            raise corrupt(self._index, "manifest", f"has no record for slice {part} of {text}", text)
        if record.shape != tensor.part_shape(part) or record.data_type != tensor.data_type:
            raise corrupt(
                self._index, "manifest", f"has another shape or type for slice {part} of {text}", text
            )
        source = self._shard(record.shard)
        if record.end > source.size:
            message = f"has {source.size} bytes, but {text} needs bytes [{record.offset}, {record.end})"
            raise corrupt(source.path, "length", message, text)

    def read_part(self, tensor: Tensor, part: int, lo: tuple[int, ...], hi: tuple[int, ...]) -> Array:
        key = self._part_key(tensor, part)
        record = self._records[key]
        index = tuple(slice(start, stop) for start, stop in zip(lo, hi, strict=True))
        if record.data_type.is_string:
            strings = self._read_strings(key, record)
            return strings[(*index, ...)].copy()
        if not any(lo) and hi == record.shape:
            return self._read_whole(key, record)
        if self._verify_slices and key not in self._verified:
            self._verify(key, record)
        return self._to_native(
            read_box(self._shard(record.shard), record.offset, record.shape, _dtype_of(record), lo, hi)
        )

    def stream_part(self, tensor: Tensor, part: int, first: int, last: int) -> Array:
        key = self._part_key(tensor, part)
        record = self._records[key]
        dtype = _dtype_of(record)
        start, stop = first * dtype.itemsize, last * dtype.itemsize
        at, crc = self._streamed.pop(key, (0, 0))
        if start == 0:
            at, crc = 0, 0
        if start != at and key not in self._verified:
            self._verify(key, record)
        data = np.empty(last - first, dtype)
        self._shard(record.shard).read_into(record.offset + start, data)
        if start == at:
            crc = extend(crc, data)
            self._streamed[key] = (stop, crc)
            if stop == record.size:
                del self._streamed[key]
                self._check_checksum(key, record, crc)
        return self._to_native(data)

    def close(self) -> None:
        with self._lock:
            self._is_closed = True
            for source in self._shards.values():
                source.close()

    def _read_index(self, table: Table) -> None:
        entries = iter(table)
        key, header = next(entries, (None, memoryview(b"")))
        if key != b"":
            raise WireError("has no header")
        self._shard_count, self._is_big_endian = _parse_header(header, self._index)
        for key, value in entries:
            try:
                record = _parse_record(value, self._shard_count)
            except WireError as error:
                text = key.decode("utf-8", "backslashreplace")
                raise corrupt(
                    self._index, "manifest", f"has a damaged record for {text}: {error}", text
                ) from error
            self._records[key] = record

    def _check_ranges(self) -> None:
        """No two records may share bytes, so that all tensors together are no larger than the files."""
        stored = [record for record in self._records.values() if record.size and not record.slices]
        stored.sort(key=lambda record: (record.shard, record.offset))
        for before, after in itertools.pairwise(stored):
            if before.shard == after.shard and before.end > after.offset:
                message = f"has two records for byte {after.offset} of data file {after.shard}"
                raise corrupt(self._index, "manifest", message)

    def _part_key(self, tensor: Tensor, part: int) -> bytes:
        return (
            slice_key(tensor.name, tensor.slices[part]) if self._records[tensor.name].slices else tensor.name
        )

    def _shard(self, shard: int) -> SourceFile:
        with self._lock:
            if self._is_closed:
                raise ValueError(f"{self.path!r} is closed")
            if shard not in self._shards:
                path = f"{self.path}.data-{shard:05d}-of-{self._shard_count:05d}"
                try:
                    self._shards[shard] = SourceFile(path, self._count)
                except NotFoundError as error:
                    raise corrupt(path, "object", "is missing") from error
            return self._shards[shard]

    def _read_whole(self, key: bytes, record: _Record) -> Array:
        data = np.empty(record.shape, _dtype_of(record))
        self._read_checked(key, record, data.reshape(-1).view(np.uint8))
        return self._to_native(data)

    def _read_checked(self, key: bytes, record: _Record, buffer: Array) -> None:
        """Reads a record into bytes, and verifies them."""
        source = self._shard(record.shard)
        crc = 0
        for start in range(0, record.size, _PIECE_BYTES):
            piece = buffer[start : start + _PIECE_BYTES]
            source.read_into(record.offset + start, piece)
            crc = extend(crc, piece)
        self._check_checksum(key, record, crc)

    def _verify(self, key: bytes, record: _Record) -> None:
        """Reads a record for its checksum alone."""
        source = self._shard(record.shard)
        buffer = np.empty(min(record.size, _PIECE_BYTES), np.uint8)
        crc = 0
        for start in range(0, record.size, _PIECE_BYTES):
            piece = buffer[: record.size - start]
            source.read_into(record.offset + start, piece)
            crc = extend(crc, piece)
        self._check_checksum(key, record, crc)

    def _check_checksum(self, key: bytes, record: _Record, crc: int) -> None:
        if mask(crc) != record.checksum:
            raise self._checksum_error(key, record)
        self._verified.add(key)

    def _checksum_error(self, key: bytes, record: _Record) -> CorruptError:
        text = key.decode("utf-8", "backslashreplace")
        path = self._shard(record.shard).path
        message = (
            f"bytes [{record.offset}, {record.end}), of {text}, have another checksum than the index says"
        )
        return corrupt(path, "checksum", message, text)

    def _to_native(self, data: Array) -> Array:
        """Turns the bytes of elements around, in place, where the bundle has the other order."""
        width = data.dtype.itemsize // (2 if data.dtype.kind == "c" else 1)
        if self._is_big_endian and width > 1 and data.size:
            data.reshape(-1).view(f"u{width}").byteswap(inplace=True)
        return data

    def _read_strings(self, key: bytes, record: _Record) -> Array:
        data = self._shard(record.shard).read(record.offset, record.size)
        count = math.prod(record.shape)
        strings = np.empty(count, np.object_)
        if not count and not record.size:
            return strings.reshape(record.shape)
        try:
            lengths, at = _parse_lengths(data, count)
        except WireError as error:
            raise self._checksum_error(key, record) from error
        byte_order = "big" if self._is_big_endian else "little"
        sizes = b"".join(length.to_bytes(4 if length < 1 << 32 else 8, byte_order) for length in lengths)
        crc = crc32c(sizes)
        stored = data[at : at + 4]
        if int.from_bytes(stored, byte_order) != mask(crc) or len(stored) < 4:
            raise self._checksum_error(key, record)
        self._check_checksum(key, record, extend(crc, data[at:]))
        at += 4
        if at + sum(lengths) != record.size:
            raise self._checksum_error(key, record)
        for place, length in enumerate(lengths):
            strings[place] = bytes(data[at : at + length])
            at += length
        return strings.reshape(record.shape)


def _parse_header(message: memoryview, path: str) -> tuple[int, bool]:
    """Number of data files, and whether numbers begin with their highest byte."""
    shard_count = 0
    is_big_endian = False
    oldest_reader = 0
    for field, value in fields(message):
        if field == 1:
            shard_count = number(value)
        elif field == 2:
            is_big_endian = number(value) == 1
        elif field == 3:
            versions = {part: number(version) for part, version in fields(content(value)) if part in (1, 2)}
            oldest_reader = versions.get(2, 0)
    if oldest_reader > _READER_VERSION:
        raise FormatError(
            f"{path} needs a reader of version {oldest_reader} of its format; this one has {_READER_VERSION}"
        )
    if not 0 <= shard_count <= _SHARDS_MAX:
        raise WireError(f"claims {shard_count} data files")
    return shard_count, is_big_endian


def _parse_record(message: memoryview, shard_count: int) -> _Record:
    numbers = {1: 0, 3: 0, 4: 0, 5: 0}
    checksum = 0
    shape: tuple[int, ...] = ()
    slices: list[Extents] = []
    for field, value in fields(message):
        if field == 2:
            shape = parse_shape(content(value))
        elif field == 6:
            checksum = int.from_bytes(content(value), "little")
        elif field == 7:
            slices.append(parse_extents(content(value)))
        elif field in numbers:
            numbers[field] = number(value)
    record = _Record(
        data_type(numbers[1]), shape, numbers[3], numbers[4], numbers[5], checksum, tuple(slices)
    )
    for extents in slices:
        check_extents(extents, shape)
    if record.offset < 0 or record.size < 0 or not 0 <= record.shard < max(shard_count, 1):
        raise WireError(f"bytes [{record.offset}, {record.end}) of data file {record.shard} do not exist")
    count = math.prod(shape)
    if record.slices or not record.data_type.is_supported:
        return record
    dtype = record.data_type.dtype
    if dtype is not None and record.size != count * dtype.itemsize:
        raise WireError(f"has {record.size} bytes for {count} elements of {dtype.itemsize}")
    if dtype is None and record.size < (count + 4 if count else 0):
        raise WireError(f"has {record.size} bytes for {count} strings")
    return record


def _parse_lengths(data: memoryview, count: int) -> tuple[list[int], int]:
    lengths: list[int] = []
    at = 0
    for _ in range(count):
        length, at = read_varint(data, at)
        lengths.append(length)
    return lengths, at


def _dtype_of(record: _Record) -> np.dtype[Any]:
    assert record.data_type.dtype is not None
    return record.data_type.dtype
