"""Where do the arrays of a msgpack file of Flax's lie?

``flax.serialization.to_bytes`` packs nested dicts with msgpack. Arrays are extensions:

    1  an array: a packed (shape, name of the dtype, bytes in C order)
    2  a complex number: a packed (real, imaginary)
    3  a NumPy scalar: as an array

An array of more than 1 GiB is a dict {"__msgpack_chunked_array__": True, "shape": {"0": ...}, "chunks": {"0": ...}}.

`index_file` walks through a file and reads headers and small values only. Whatever does not fit together is damage.

Source: https://github.com/google/flax/blob/main/flax/serialization.py, https://github.com/msgpack/msgpack/blob/master/spec.md
"""

from __future__ import annotations

import dataclasses
import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn, final

import numpy as np

from jaxckpt._dtypes import dtype_from
from jaxckpt._errors import NotFoundError
from jaxckpt._manifest import RANK_MAX

from ._files import SourceFile, corrupt

ARRAY = 1
COMPLEX = 2
SCALAR = 3
CHUNKED_KEY = "__msgpack_chunked_array__"

# Far more than any state has; what reads one goes down by recursion.
DEPTH_MAX = 100
# Of values and arrays; each takes some 600 bytes of memory, and a number in a file may take one.
_VALUES_MAX = 1 << 20
_WINDOW_BYTES = 64 << 10
# A name, a dtype or a text that is no value of a state.
_TEXT_BYTES_MAX = 64 << 20

_NIL, _FALSE, _TRUE = 0xC0, 0xC2, 0xC3
# Of each first byte: how long the length is that follows.
_BIN = {0xC4: 1, 0xC5: 2, 0xC6: 4}
_EXT = {0xC7: 1, 0xC8: 2, 0xC9: 4}
_FIXEXT = {0xD4: 1, 0xD5: 2, 0xD6: 4, 0xD7: 8, 0xD8: 16}
_STR = {0xD9: 1, 0xDA: 2, 0xDB: 4}
_LIST = {0xDC: 2, 0xDD: 4}
_MAP = {0xDE: 2, 0xDF: 4}
_NUMBER = {
    0xCA: ">f",
    0xCB: ">d",
    0xCC: ">B",
    0xCD: ">H",
    0xCE: ">I",
    0xCF: ">Q",
    0xD0: ">b",
    0xD1: ">h",
    0xD2: ">i",
    0xD3: ">q",
}


@dataclasses.dataclass(frozen=True, slots=True)
class PackedArray:
    """An array in a file: its elements lie in C order in one range of bytes, or in several.

    Attributes:
      dtype: Type of the elements.
      shape: Shape.
      ranges: Offset and length of each range.
    """

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    ranges: tuple[tuple[int, int], ...]


# A dict or a list, an array, or a small value.
Node = Any


def index_file(source: SourceFile) -> dict[tuple[str, ...], Node]:
    """The arrays and values of a file by their paths, in its order.

    Raises:
      NotFoundError: It is no such file.
      CorruptError: It is damaged.
    """
    if not _begins_with_name(source.read(0, min(source.size, 6)).tobytes()):
        raise NotFoundError(
            f"{source.path!r} is no msgpack file of Flax's: it does not begin with a dict of names"
        )
    reader = _Reader(source)
    root = reader.value(0)
    if reader.at != source.size:
        reader.fail(f"ends at byte {reader.at} of {source.size}")
    return dict(_leaves_of(root, ()))


def _begins_with_name(data: bytes) -> bool:
    """Whether these are the first bytes of a dict whose first key is a text; so do few other files begin."""
    if data in (b"", b"\x80"):
        return bool(data)
    length_bytes = 0 if 0x81 <= data[0] <= 0x8F else _MAP.get(data[0])
    if length_bytes is None:
        return False
    key = data[1 + length_bytes : 2 + length_bytes]
    return any(0xA0 <= byte <= 0xBF or byte in _STR for byte in key)


def _leaves_of(node: Node, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Node]]:
    if not isinstance(node, (dict, list)):
        yield path, node
        return
    children: dict[str, Node] = node if isinstance(node, dict) else _numbered(node)
    for key, inner in children.items():
        yield from _leaves_of(inner, (*path, key))


def _numbered(values: Sequence[Node]) -> dict[str, Node]:
    return {str(number): value for number, value in enumerate(values)}


@final
class _Reader:
    """Reads a file forward, and skips the bytes of arrays."""

    def __init__(self, source: SourceFile) -> None:
        self._source = source
        self._window = memoryview(b"")
        self._window_at = 0
        self._value_count = 0
        self.at = 0

    def fail(self, what: str, kind: str = "manifest") -> NoReturn:
        raise corrupt(self._source.path, kind, what)

    def _take(self, length: int) -> bytes:
        if length > self._source.size - self.at:
            self.fail(
                f"ends at byte {self._source.size}, and {length} bytes from {self.at} on are missing",
                "length",
            )
        start = self.at - self._window_at
        if not 0 <= start <= len(self._window) - length:
            size = min(max(length, _WINDOW_BYTES), self._source.size - self.at)
            self._window = self._source.read(self.at, size)
            self._window_at, start = self.at, 0
        self.at += length
        return bytes(self._window[start : start + length])

    def _skip(self, length: int) -> int:
        """Goes on behind bytes that need not be read; where they begin."""
        if length > self._source.size - self.at:
            self.fail(f"ends at byte {self._source.size}, within {length} bytes of an array", "length")
        at = self.at
        self.at += length
        return at

    def _number(self, length: int) -> int:
        return int.from_bytes(self._take(length), "big")

    def _text(self, length: int) -> bytes:
        if length > _TEXT_BYTES_MAX:
            self.fail(f"has a text of {length} bytes")
        return self._take(length)

    def value(self, depth: int) -> Node:
        """The next value."""
        if depth > DEPTH_MAX:
            self.fail("is nested too deep")
        at = self.at
        first = self._take(1)[0]
        if first <= 0x7F:
            return first
        if first >= 0xE0:
            return first - 0x100
        if first <= 0x8F:
            return self._map(first & 0x0F, depth)
        if first <= 0x9F:
            return self._list(first & 0x0F, depth)
        if first <= 0xBF:
            return self._string(first & 0x1F)
        if first in (_NIL, _FALSE, _TRUE):
            return {_NIL: None, _FALSE: False, _TRUE: True}[first]
        if first in _NUMBER:
            form = _NUMBER[first]
            return struct.unpack(form, self._take(struct.calcsize(form)))[0]
        if first in _STR:
            return self._string(self._number(_STR[first]))
        if first in _BIN:
            return self._text(self._number(_BIN[first]))
        if first in _LIST:
            return self._list(self._number(_LIST[first]), depth)
        if first in _MAP:
            return self._map(self._number(_MAP[first]), depth)
        if first in _EXT:
            return self._extension(self._number(_EXT[first]))
        if first in _FIXEXT:
            return self._extension(_FIXEXT[first])
        return self.fail(f"is no msgpack: byte {at} is {first:#x}")

    def _string(self, length: int) -> str:
        try:
            return self._text(length).decode()
        except UnicodeDecodeError as error:
            self.fail(f"has a text that is none: {error}")

    def _list(self, count: int, depth: int) -> list[Node]:
        if count > self._source.size - self.at:  # each takes a byte at least
            self.fail(f"has a list of {count} values, and fewer bytes", "length")
        self._count_values(count, depth)
        return [self.value(depth + 1) for _ in range(count)]

    def _count_values(self, count: int, depth: int) -> None:
        """Refuses what would take far more memory than its file takes bytes; shapes of arrays do not count."""
        if depth < DEPTH_MAX - 1:
            self._value_count += count
        if self._value_count > _VALUES_MAX:
            self.fail(f"has more than {_VALUES_MAX} values, which is no state of Flax's")

    def _map(self, count: int, depth: int) -> Node:
        if count > self._source.size - self.at:
            self.fail(f"has a dict of {count} values, and fewer bytes", "length")
        self._count_values(count, depth)
        found: dict[str, Node] = {}
        for _ in range(count):
            key = self.value(depth + 1)
            if not isinstance(key, (str, int)) or isinstance(key, bool):
                self.fail(f"has a dict with the key {key!r}")
            if str(key) in found:
                self.fail(f"has a dict with the key {key!r} twice")
            found[str(key)] = self.value(depth + 1)
        return self._chunked(found) if CHUNKED_KEY in found else found

    def _extension(self, length: int) -> Node:
        code = self._take(1)[0]
        end = self.at + length
        if code not in (ARRAY, COMPLEX, SCALAR):
            self.fail(f"has an extension {code} of msgpack, which Flax does not have")
        fields = self._fields(2 if code == COMPLEX else 3, end)
        if code == COMPLEX:
            return complex(*self._two_numbers(fields))
        shape, name, data = fields
        array = self._array(shape, name, data)
        if self.at != end:
            self.fail(f"has an array that ends at byte {self.at} instead of {end}")
        if code == ARRAY:
            return array
        if array.shape:
            self.fail(f"has a scalar of the shape {array.shape}")
        return np.frombuffer(self._source.read(*array.ranges[0]), array.dtype)[0]

    def _fields(self, count: int, end: int) -> list[Any]:
        """The values that an extension packs; the bytes of an array are not read but as the place where they are."""
        if self._take(1)[0] != 0x90 + count:
            self.fail("has an extension without the values that belong to it")
        fields: list[Any] = []
        while len(fields) < count and self.at < end:
            if count == 3 and len(fields) == 2:
                first = self._take(1)[0]
                if first not in _BIN:
                    self.fail("has an array without bytes")
                length = self._number(_BIN[first])
                fields.append((self._skip(length), length))
            else:
                fields.append(self.value(DEPTH_MAX - 1))
        if len(fields) < count:
            self.fail("has an extension without the values that belong to it")
        return fields

    def _two_numbers(self, fields: Sequence[Any]) -> tuple[float, float]:
        real, imaginary = fields
        if not isinstance(real, (int, float)) or not isinstance(imaginary, (int, float)):
            self.fail("has a complex number of other things than numbers")
        return real, imaginary

    def _array(self, shape: Any, name: Any, data: tuple[int, int]) -> PackedArray:
        if (
            not isinstance(shape, list)
            or len(shape) > RANK_MAX
            or not all(type(n) is int and n >= 0 for n in shape)
        ):
            self.fail(f"has an array of the impossible shape {shape!r}")
        text = name.decode("ascii", "replace") if isinstance(name, bytes) else name
        try:
            dtype = dtype_from("bfloat16" if text == "V2" else text)
        except (TypeError, ValueError, AttributeError) as error:
            self.fail(f"has an array of the unknown dtype {text!r}: {error}")
        if dtype.hasobject or math.prod(shape) * dtype.itemsize != data[1]:
            self.fail(f"has an array of {dtype} and the shape {tuple(shape)} in {data[1]} bytes")
        return PackedArray(dtype, tuple(shape), (data,))

    def _chunked(self, found: Mapping[str, Node]) -> PackedArray:
        """The array that a dict of chunks means."""
        sizes, chunks = found.get("shape"), found.get("chunks")
        if not isinstance(sizes, dict) or not isinstance(chunks, dict) or not chunks:
            self.fail("has an array in chunks without its shape or its chunks")
        shape = tuple(sizes.get(str(axis), -1) for axis in range(len(sizes)))
        parts = [chunks.get(str(number)) for number in range(len(chunks))]
        if not all(isinstance(part, PackedArray) for part in parts) or not all(
            type(size) is int and size >= 0 for size in shape
        ):
            self.fail("has an array in chunks that do not belong together")
        dtypes = {part.dtype for part in parts if part is not None}
        count = sum(math.prod(part.shape) for part in parts if part is not None)
        if len(dtypes) != 1 or count != math.prod(shape) or len(shape) > RANK_MAX:
            self.fail("has an array in chunks that do not belong together")
        (dtype,) = dtypes
        return PackedArray(dtype, shape, tuple(part.ranges[0] for part in parts if part is not None))
