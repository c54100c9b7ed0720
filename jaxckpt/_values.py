"""How do Python and NumPy scalars lie in msgpack, and how is msgpack decoded without being led astray?

A *value* is a leaf that lies in the manifest itself: a list of a tag and plain data, from which the same value of the
same type comes back. Deliberately not here: values of items (`_items`), which may be nested.
"""

from __future__ import annotations

import struct
from typing import Any

import msgpack
import numpy as np

from ._dtypes import describe_dtype, dtype_from
from ._errors import FormatError


def unpack(data: bytes | memoryview) -> Any:
    """Decodes msgpack in memory that is bounded by the length of the data.

    A header of five bytes may claim four billion elements, and msgpack takes memory for them before it looks. So the
    elements are counted first, without making any.
    """
    counter = msgpack.Unpacker(max_buffer_size=len(data))
    counter.feed(data)
    counter.skip()
    return msgpack.unpackb(data, unicode_errors="surrogatepass")


def encode_value(value: Any) -> list[Any]:
    """A Python or NumPy scalar as plain data, without loss.

    Raises:
      TypeError: It is of no type that has a representation.
    """
    if isinstance(value, np.generic):
        # An empty string has a character's bytes in memory all the same.
        return ["numpy", describe_dtype(value.dtype), value.tobytes()[: value.dtype.itemsize]]
    kind = type(value)
    if kind is bool:
        return ["bool", value]
    if kind is int:
        return ["int", hex(value)]  # hexadecimal, since Python refuses to parse long decimals
    if kind is float:
        return ["float", struct.pack("<d", value)]
    if kind is complex:
        return ["complex", struct.pack("<dd", value.real, value.imag)]
    if kind is str:
        return ["str", value]
    if kind is bytes:
        return ["bytes", value]
    raise TypeError(f"{kind.__module__}.{kind.__qualname__}")


def _scalar(dtype: np.dtype[Any], data: bytes) -> Any:
    """The NumPy scalar with these bytes."""
    # Through an array, strings would lose the zeros at their end.
    if dtype.kind == "U":
        return np.str_(
            data.decode("utf-32-le" if dtype == dtype.newbyteorder("<") else "utf-32-be", "surrogatepass")
        )
    if dtype.kind == "S":
        return np.bytes_(data)
    if dtype.itemsize == 0:
        return np.zeros((), dtype)[()]
    return np.frombuffer(bytearray(data), dtype)[0]  # a bytearray, so that the fields of a record can be set


def decode_text(data: bytes) -> str:
    """A long string from the bytes of its array."""
    try:
        return data.decode("utf-8", "surrogatepass")
    except UnicodeDecodeError as error:
        raise FormatError(f"a string is stored as bytes that are no text: {error.reason}") from error


def decode_value(record: Any) -> Any:
    """The value of a record of `encode_value`; raises ValueError or TypeError for anything else."""
    if not isinstance(record, list):
        raise TypeError(f"a value that is not a list but {type(record).__name__}")
    tag, *parts = record
    if tag == "numpy":
        descriptor, data = parts
        dtype = dtype_from(descriptor)
        if not isinstance(data, bytes) or len(data) != dtype.itemsize:
            raise ValueError("a scalar of the wrong length")
        return _scalar(dtype, data)
    (part,) = parts
    if tag == "bool" and isinstance(part, bool):
        return part
    if tag == "int" and isinstance(part, str):
        number = int(part, 16)
        if hex(number) != part:
            raise ValueError(f"an integer written in another way than Python's: {part[:40]!r}")
        return number
    if tag == "float" and isinstance(part, bytes) and len(part) == 8:
        return struct.unpack("<d", part)[0]
    if tag == "complex" and isinstance(part, bytes) and len(part) == 16:
        return complex(*struct.unpack("<dd", part))
    if (tag == "str" and isinstance(part, str)) or (tag == "bytes" and isinstance(part, bytes)):
        return part
    raise ValueError(f"a value of unknown type {str(tag)[:40]!r}")
