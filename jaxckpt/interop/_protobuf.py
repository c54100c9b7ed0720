"""How are the messages in TensorFlow's files taken apart and put together, without their schemas?

A message of protocol buffers is a sequence of fields: a number and a wire type, then a varint, four or eight bytes, or
a length and that many bytes. What a field means is known to whoever asks for its number. Fields that hold zero are left
out by writers.

Source: https://protobuf.dev/programming-guides/encoding/
"""

from __future__ import annotations

from collections.abc import Iterator

VARINT = 0
FIXED64 = 1
LENGTH_DELIMITED = 2
FIXED32 = 5

_FIXED_SIZES = {FIXED64: 8, FIXED32: 4}
_VARINT_BITS_MAX = 64


class WireError(ValueError):
    """Bytes that are no message. The text says why; the caller knows where they stand."""


def read_varint(data: memoryview, at: int) -> tuple[int, int]:
    """The varint at a place, and the place after it.

    Raises:
      WireError: It is cut off, or has more than 64 bits.
    """
    value = 0
    for shift in range(0, _VARINT_BITS_MAX, 7):
        if at >= len(data):
            raise WireError("a number is cut off")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            if value >> _VARINT_BITS_MAX:
                break
            return value, at
    raise WireError("a number has more than 64 bits")


def fields(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Number and value of each field, in their order; four or eight bytes that stand for a number come as bytes.

    Raises:
      WireError: The bytes are no message.
    """
    at = 0
    while at < len(message):
        tag, at = read_varint(message, at)
        wire_type = tag & 7
        if wire_type == VARINT:
            value, at = read_varint(message, at)
            yield tag >> 3, value
            continue
        if wire_type == LENGTH_DELIMITED:
            length, at = read_varint(message, at)
        elif wire_type in _FIXED_SIZES:
            length = _FIXED_SIZES[wire_type]
        else:
            raise WireError(f"a field has the wire type {wire_type}, which does not exist")
        if length > len(message) - at:
            raise WireError("a field is cut off")
        yield tag >> 3, message[at : at + length]
        at += length


def number(value: int | memoryview) -> int:
    """The value of a field that holds a number: int32, int64, bool or an enumeration.

    Raises:
      WireError: It holds bytes.
    """
    if isinstance(value, memoryview):
        raise WireError("a field holds bytes instead of a number")
    # Negative numbers have the 64 bits of two's complement, int32 too.
    return value - (1 << 64) if value >> 63 else value


def content(value: int | memoryview) -> memoryview:
    """The value of a field that holds bytes, text, a message, or four or eight bytes.

    Raises:
      WireError: It holds a number.
    """
    if isinstance(value, int):
        raise WireError("a field holds a number instead of bytes")
    return value


def encode_varint(value: int) -> bytes:
    """A number as a varint; a negative one by its two's complement of 64 bits."""
    rest = value & ((1 << 64) - 1)
    encoded = bytearray()
    while rest >= 0x80:
        encoded.append(rest & 0x7F | 0x80)
        rest >>= 7
    encoded.append(rest)
    return bytes(encoded)


def encode_number(field: int, value: int) -> bytes:
    """A field that holds a number; nothing for zero, as proto3 has it."""
    return encode_varint(field << 3 | VARINT) + encode_varint(value) if value else b""


def encode_bytes(field: int, value: bytes) -> bytes:
    """A field that holds bytes, text or a message."""
    return encode_varint(field << 3 | LENGTH_DELIMITED) + encode_varint(len(value)) + value


def encode_fixed32(field: int, value: int) -> bytes:
    """A field that holds a number in four bytes."""
    return encode_varint(field << 3 | FIXED32) + value.to_bytes(4, "little")
