"""Which NumPy dtype holds what TensorFlow calls a data type?

Quantised types come as the integers that they are stored as. Types of less than eight bits have one byte an element, in
the files and in NumPy. Strings come as Python bytes, in arrays of objects. Resources and variants are no arrays.

Source: https://github.com/tensorflow/tensorflow/blob/master/tensorflow/core/framework/types.proto
"""

from __future__ import annotations

import dataclasses
from typing import Any

import ml_dtypes
import numpy as np


@dataclasses.dataclass(frozen=True, slots=True)
class DataType:
    """A data type of TensorFlow's.

    Attributes:
      number: Its number in files.
      name: Its name, such as ``"DT_FLOAT"``.
      dtype: What holds it; None for strings, and for what is no array.
    """

    number: int
    name: str
    dtype: np.dtype[Any] | None

    @property
    def is_string(self) -> bool:
        """Whether elements are strings of bytes."""
        return self.number == STRING

    @property
    def is_supported(self) -> bool:
        """Whether elements can be read."""
        return self.dtype is not None or self.is_string


FLOAT = 1
DOUBLE = 2
INT32 = 3
UINT8 = 4
INT16 = 5
INT8 = 6
STRING = 7
COMPLEX64 = 8
INT64 = 9
BOOL = 10
QINT8 = 11
QUINT8 = 12
QINT32 = 13
QINT16 = 15
QUINT16 = 16
UINT16 = 17
COMPLEX128 = 18
HALF = 19
UINT32 = 22
UINT64 = 23

_TYPES: tuple[tuple[int, str, Any], ...] = (
    (FLOAT, "DT_FLOAT", np.float32),
    (DOUBLE, "DT_DOUBLE", np.float64),
    (INT32, "DT_INT32", np.int32),
    (UINT8, "DT_UINT8", np.uint8),
    (INT16, "DT_INT16", np.int16),
    (INT8, "DT_INT8", np.int8),
    (STRING, "DT_STRING", None),
    (COMPLEX64, "DT_COMPLEX64", np.complex64),
    (INT64, "DT_INT64", np.int64),
    (BOOL, "DT_BOOL", np.bool_),
    (QINT8, "DT_QINT8", np.int8),
    (QUINT8, "DT_QUINT8", np.uint8),
    (QINT32, "DT_QINT32", np.int32),
    (14, "DT_BFLOAT16", ml_dtypes.bfloat16),
    (QINT16, "DT_QINT16", np.int16),
    (QUINT16, "DT_QUINT16", np.uint16),
    (UINT16, "DT_UINT16", np.uint16),
    (COMPLEX128, "DT_COMPLEX128", np.complex128),
    (HALF, "DT_HALF", np.float16),
    (20, "DT_RESOURCE", None),
    (21, "DT_VARIANT", None),
    (UINT32, "DT_UINT32", np.uint32),
    (UINT64, "DT_UINT64", np.uint64),
    (24, "DT_FLOAT8_E5M2", ml_dtypes.float8_e5m2),
    (25, "DT_FLOAT8_E4M3FN", ml_dtypes.float8_e4m3fn),
    (26, "DT_FLOAT8_E4M3FNUZ", ml_dtypes.float8_e4m3fnuz),
    (27, "DT_FLOAT8_E4M3B11FNUZ", ml_dtypes.float8_e4m3b11fnuz),
    (28, "DT_FLOAT8_E5M2FNUZ", ml_dtypes.float8_e5m2fnuz),
    (29, "DT_INT4", ml_dtypes.int4),
    (30, "DT_UINT4", ml_dtypes.uint4),
    (31, "DT_INT2", ml_dtypes.int2),
    (32, "DT_UINT2", ml_dtypes.uint2),
    (33, "DT_FLOAT4_E2M1FN", ml_dtypes.float4_e2m1fn),
)

DATA_TYPES = {
    number: DataType(number, name, None if scalar is None else np.dtype(scalar))
    for number, name, scalar in _TYPES
}

# How each dtype is written: of the types that share one, the plain one.
NUMBER_OF_DTYPE = {
    each.dtype: each.number
    for each in DATA_TYPES.values()
    if each.dtype is not None and not each.name.startswith(("DT_QINT", "DT_QUINT"))
}


def data_type(number: int) -> DataType:
    """The data type with a number; one that can't be read when there is none."""
    return DATA_TYPES.get(number) or DataType(number, f"DT_{number}", None)
