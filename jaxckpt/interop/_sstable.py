"""How does TensorFlow lay out a sorted table of keys and values in a file?

A table is a file of LevelDB's format: the ``.index`` of a V2 checkpoint, and each file of a V1 checkpoint.

    file      data block ... data block, metaindex block (empty), index block, footer
    block     contents, one byte for the compression (0 none, 1 snappy), masked CRC-32C of both (4 bytes)
    contents  entries, offsets of the restarts (4 bytes each), their number (4 bytes)
    entry     varints: bytes shared with the key before, other bytes of the key, bytes of the value; then both
    index     an entry for each data block: a key not below its keys and below those of the next; its handle
    handle    varints: offset and size of the contents
    footer    handles of metaindex and index, zeros up to 40 bytes, 8 bytes that mark the format

`Table` reads the footer, the metaindex and the index when it is opened, and a data block when one of its keys is asked
for. Blocks must fill the file from its beginning to the footer without holes, as every writer of TensorFlow's leaves
them, and keys must ascend; so no byte can change without being found by whoever reads its block.

What a file claims is held against its size before memory is taken for it: handles against the file, lengths against
their block, and the size of decompressed contents against what snappy can do at best.

Source: https://github.com/google/leveldb/blob/main/doc/table_format.md,
https://github.com/google/snappy/blob/main/format_description.txt
"""

from __future__ import annotations

import bisect
import dataclasses
import struct
import threading
from collections.abc import Iterable, Iterator
from typing import final

from ._crc import crc32c, mask, unmask
from ._files import SourceFile, corrupt
from ._protobuf import WireError, encode_varint, read_varint

FOOTER_BYTES = 48
MAGIC = 0xDB4775248B80FB57
# Compression and checksum behind the contents of a block.
TRAILER_BYTES = 5
NOT_COMPRESSED = 0
SNAPPY = 1

_HANDLES_BYTES = 40
# A block that is larger has one value, and is not kept. TensorFlow's blocks of several have 256 KiB.
_KEPT_BYTES_MAX = 1 << 20
# The best that snappy can do: a copy of 64 bytes takes three.
_SNAPPY_RATIO_MAX = 22
# TensorFlow writes a key in full every 16 entries, so that keys take at most 16 times the bytes of their block.
_KEYS_RATIO_MAX = 64


@dataclasses.dataclass(frozen=True, slots=True)
class _Handle:
    """Where a block lies: offset and size of its contents."""

    offset: int
    size: int

    @property
    def end(self) -> int:
        return self.offset + self.size + TRAILER_BYTES


@final
class Table:
    """A table, open for reading from any thread.

    Args:
      source: Its file; the table closes it.

    Raises:
      CorruptError: The file is no table, or its footer, metaindex or index is damaged.
    """

    def __init__(self, source: SourceFile) -> None:
        self._source = source
        self.path = source.path
        metaindex, index = self._read_footer()
        if self._entries(metaindex):
            raise corrupt(self.path, "manifest", "has entries in its metaindex block, which must be empty")
        entries = self._entries(index)
        self._last_keys = [key for key, _ in entries]
        self._blocks = [self._handle(value) for _, value in entries]
        at = 0
        for block in (*self._blocks, metaindex, index):
            if block.offset != at:
                raise corrupt(self.path, "manifest", f"has a block at byte {block.offset} instead of {at}")
            at = block.end
        if at != source.size - FOOTER_BYTES:
            raise corrupt(self.path, "manifest", f"has blocks up to byte {at}, and more bytes behind them")
        # The entries of the block that was read last: small values that are asked for in turn share a block.
        self._recent: tuple[int, dict[bytes, memoryview]] = (-1, {})
        self._lock = threading.Lock()

    def __iter__(self) -> Iterator[tuple[bytes, memoryview]]:
        """Keys and values in ascending order of the keys; one block at a time is in memory."""
        for number in range(len(self._blocks)):
            yield from self._block_entries(number)

    def first(self) -> tuple[bytes, memoryview] | None:
        """The first key and its value, or None when the table is empty."""
        return next(iter(self), None)

    def get(self, key: bytes) -> memoryview | None:
        """The value of a key, or None when the table has no such key; reads the one block that may hold it.

        Raises:
          CorruptError: The block is damaged.
        """
        number = bisect.bisect_left(self._last_keys, key)
        if number == len(self._blocks):
            return None
        with self._lock:
            if self._recent[0] == number:
                return self._recent[1].get(key)
            self._recent = (-1, {})  # two blocks need not be in memory together
            entries = dict(self._block_entries(number))
            if self._blocks[number].size <= _KEPT_BYTES_MAX:
                self._recent = (number, entries)
            return entries.get(key)

    def close(self) -> None:
        """Closes the file."""
        with self._lock:
            self._recent = (-1, {})
        self._source.close()

    def _read_footer(self) -> tuple[_Handle, _Handle]:
        size = self._source.size
        if size < FOOTER_BYTES:
            raise corrupt(self.path, "length", f"has {size} bytes; a table has {FOOTER_BYTES} at least")
        footer = self._source.read(size - FOOTER_BYTES, FOOTER_BYTES)
        if struct.unpack("<Q", footer[_HANDLES_BYTES:])[0] != MAGIC:
            raise corrupt(self.path, "manifest", "does not end as a table does: it is cut off, or is none")
        try:
            values: list[int] = []
            at = 0
            for _ in range(4):
                value, at = read_varint(footer[:_HANDLES_BYTES], at)
                values.append(value)
        except WireError as error:
            raise corrupt(self.path, "manifest", f"has a damaged footer: {error}") from error
        # A number may be written in several ways, of which writers take the shortest.
        handles = b"".join(map(encode_varint, values)).ljust(_HANDLES_BYTES, b"\0")
        if footer[:_HANDLES_BYTES].tobytes() != handles:
            raise corrupt(self.path, "manifest", "has a damaged footer: it is not as a writer leaves it")
        return _Handle(values[0], values[1]), _Handle(values[2], values[3])

    def _handle(self, value: memoryview) -> _Handle:
        try:
            offset, at = read_varint(value, 0)
            size, at = read_varint(value, at)
            if at != len(value):
                raise WireError("bytes are left over")
        except WireError as error:
            raise corrupt(
                self.path, "manifest", f"has a damaged entry in its index block: {error}"
            ) from error
        return _Handle(offset, size)

    def _block_entries(self, number: int) -> list[tuple[bytes, memoryview]]:
        """The entries of a data block, whose keys must be those that the index announces."""
        entries = self._entries(self._blocks[number])
        is_above = number == 0 or (bool(entries) and entries[0][0] > self._last_keys[number - 1])
        if not entries or entries[-1][0] > self._last_keys[number] or not is_above:
            offset = self._blocks[number].offset
            raise corrupt(
                self.path, "manifest", f"has other keys in the block at byte {offset} than its index says"
            )
        return entries

    def _entries(self, handle: _Handle) -> list[tuple[bytes, memoryview]]:
        contents = self._contents(handle)
        try:
            return _parse_entries(contents)
        except WireError as error:
            message = f"has a damaged block at byte {handle.offset}: {error}"
            raise corrupt(self.path, "manifest", message) from error

    def _contents(self, handle: _Handle) -> memoryview:
        """The contents of a block, verified and decompressed."""
        stored = self._source.read(handle.offset, handle.size + TRAILER_BYTES)
        checked = stored[: handle.size + 1]
        if crc32c(checked) != unmask(struct.unpack("<I", stored[handle.size + 1 :])[0]):
            message = f"has another checksum than its block at byte {handle.offset}"
            raise corrupt(self.path, "checksum", message)
        compression = checked[handle.size]
        if compression == NOT_COMPRESSED:
            return stored[: handle.size]
        try:
            if compression != SNAPPY:
                raise WireError(f"the compression {compression} is not known")
            return memoryview(decompress_snappy(stored[: handle.size]))
        except WireError as error:
            message = f"has a damaged block at byte {handle.offset}: {error}"
            raise corrupt(self.path, "manifest", message) from error


def _parse_entries(contents: memoryview) -> list[tuple[bytes, memoryview]]:
    """Keys and values of a block; the values are views of it."""
    if len(contents) < 4:
        raise WireError("it is too short")
    (restart_count,) = struct.unpack("<I", contents[-4:])
    end = len(contents) - 4 * (restart_count + 1)
    if end < 0:
        raise WireError("it is too short for its restarts")
    entries: list[tuple[bytes, memoryview]] = []
    key = b""
    key_bytes = 0
    at = 0
    while at < end:
        shared, at = read_varint(contents, at)
        other, at = read_varint(contents, at)
        length, at = read_varint(contents, at)
        if shared > len(key) or other + length > end - at:
            raise WireError("an entry is cut off")
        next_key = key[:shared] + contents[at : at + other].tobytes()
        if entries and next_key <= key:
            raise WireError("its keys do not ascend")
        key_bytes += len(next_key)
        if key_bytes > _KEYS_RATIO_MAX * len(contents):
            raise WireError("its keys are too long")
        key = next_key
        at += other
        entries.append((key, contents[at : at + length]))
        at += length
    return entries


def decompress_snappy(data: memoryview) -> bytes:
    """What was compressed by snappy.

    Raises:
      WireError: It was not.
    """
    size, at = read_varint(data, 0)
    if size > _SNAPPY_RATIO_MAX * len(data):
        raise WireError("it claims to have been compressed better than is possible")
    output = bytearray()
    while at < len(data) and len(output) <= size:
        tag = data[at]
        at += 1
        kind = tag & 3
        if kind == 0:  # bytes as they are
            length, at = _literal_length(data, tag, at)
            if length > len(data) - at:
                raise WireError("its compressed contents are cut off")
            output += data[at : at + length]
            at += length
            continue
        # A copy of what was put out before: length, and how far back it begins.
        offset_bytes = (1, 2, 4)[kind - 1]
        if offset_bytes > len(data) - at:
            raise WireError("its compressed contents are cut off")
        offset = int.from_bytes(data[at : at + offset_bytes], "little")
        at += offset_bytes
        length = (tag >> 2) + 1
        if kind == 1:
            length = (tag >> 2 & 7) + 4
            offset |= tag >> 5 << 8
        if not 0 < offset <= len(output):
            raise WireError("its compressed contents are damaged")
        start = len(output) - offset
        pattern = bytes(output[start : start + length])
        # A copy may reach into what it puts out itself: the pattern repeats.
        output += (pattern * -(-length // len(pattern)))[:length]
    if len(output) != size or at != len(data):
        raise WireError("its compressed contents have another length than they claim")
    return bytes(output)


def _literal_length(data: memoryview, tag: int, at: int) -> tuple[int, int]:
    """Length of a run of bytes, from the tag or from up to four bytes behind it."""
    length = tag >> 2
    if length >= 60:
        extra = length - 59
        length = int.from_bytes(data[at : at + extra], "little")
        at += extra
    return length + 1, at


# --- writing --------------------------------------------------------------------------------------------------

# What TensorFlow uses: a block ends with the entry that makes it as large as this.
_BLOCK_BYTES = 1 << 18
_RESTART_INTERVAL = 16


def encode_table(records: Iterable[tuple[bytes, bytes]]) -> bytes:
    """The file of a table, byte for byte as TensorFlow writes it without compression.

    Args:
      records: Keys and values, in strictly ascending order of the keys.
    """
    file = bytearray()
    block = _BlockBuilder(_RESTART_INTERVAL)
    index = _BlockBuilder(1)
    handle = b""
    for key, value in records:
        if handle:
            index.add(_separator(block.last_key, key), handle)
            block = _BlockBuilder(_RESTART_INTERVAL)
            handle = b""
        block.add(key, value)
        if block.size >= _BLOCK_BYTES:
            handle = _append_block(file, block)
    if block.size > _BlockBuilder(1).size:
        index.add(_successor(block.last_key), handle or _append_block(file, block))
    handles = _append_block(file, _BlockBuilder(1)) + _append_block(file, index)
    file += handles.ljust(_HANDLES_BYTES, b"\0") + struct.pack("<Q", MAGIC)
    return bytes(file)


@final
class _BlockBuilder:
    """The entries of a block; every ``restart_interval``-th has its key in full."""

    def __init__(self, restart_interval: int) -> None:
        self._restart_interval = restart_interval
        self._entries = bytearray()
        self._restarts = [0]
        self._since_restart = 0
        self.last_key = b""

    @property
    def size(self) -> int:
        """Bytes of the contents."""
        return len(self._entries) + 4 * (len(self._restarts) + 1)

    def add(self, key: bytes, value: bytes) -> None:
        """Adds an entry behind the others."""
        if self._since_restart < self._restart_interval:
            shared = _shared_length(self.last_key, key)
        else:
            shared = 0
            self._restarts.append(len(self._entries))
            self._since_restart = 0
        self._entries += encode_varint(shared) + encode_varint(len(key) - shared) + encode_varint(len(value))
        self._entries += key[shared:] + value
        self._since_restart += 1
        self.last_key = key

    def contents(self) -> bytes:
        """The block as it is stored, without its trailer."""
        return bytes(self._entries) + struct.pack(
            f"<{len(self._restarts) + 1}I", *self._restarts, len(self._restarts)
        )


def _append_block(file: bytearray, block: _BlockBuilder) -> bytes:
    """Puts a block at the end of a file; its handle."""
    contents = block.contents()
    handle = encode_varint(len(file)) + encode_varint(len(contents))
    checked = contents + bytes([NOT_COMPRESSED])
    file += checked + struct.pack("<I", mask(crc32c(checked)))
    return handle


def _separator(last: bytes, following: bytes) -> bytes:
    """A short key that is not below the last one of a block, and below the first one of the next."""
    shared = _shared_length(last, following)
    if shared < len(last) and last[shared] + 1 < following[shared]:
        return last[:shared] + bytes([last[shared] + 1])
    return last


def _successor(last: bytes) -> bytes:
    """A short key that is not below the last one of the table."""
    for place, byte in enumerate(last):
        if byte < 0xFF:
            return last[:place] + bytes([byte + 1])
    return last


def _shared_length(a: bytes, b: bytes) -> int:
    """How many bytes two keys begin with alike."""
    shared = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        shared += 1
    return shared
