"""How is a dtype named on disk, and how do its bytes lie there?

A dtype is described by plain data, never by pickling: by its *name* where NumPy or ml_dtypes has one (the
``dtype.str`` of bfloat16 is ``'<V2'`` and would lose it), by NumPy's ``dtype.str`` for strings, dates, raw bytes
and other byte orders, and by the field list of the ``.npy`` format for structured dtypes.

Zarr and TensorStore know some of these. The others are *opaque*: they are stored as ``uint8``, with one axis more
when an element has more than one byte.
"""

from __future__ import annotations

import functools
from typing import Any

import ml_dtypes
import numpy as np

# Strings for named dtypes, lists for structured ones.
DtypeDescriptor = str | list[Any]

# The dtypes that TensorStore 0.1.86 has; all read back bit for bit. uint2, uint4 and float8_e4m3 are not among them.
_ZARR_NAMES = frozenset(
    """bool int2 int4 int8 int16 int32 int64 uint8 uint16 uint32 uint64 float16 bfloat16 float32 float64
    complex64 complex128 float4_e2m1fn float8_e3m4 float8_e4m3fn float8_e4m3fnuz float8_e4m3b11fnuz
    float8_e5m2 float8_e5m2fnuz float8_e8m0fnu""".split()
)

# JAX has these too, all of them from ml_dtypes.
_JAX_ONLY_NAMES = frozenset("int1 uint1 uint2 uint4 float8_e4m3 float6_e2m3fn float6_e3m2fn".split())

_ITEM_BYTES_MAX = 1 << 30


def describe_dtype(dtype: np.dtype[Any]) -> DtypeDescriptor:
    """Plain data from which `dtype_from` makes the same dtype again.

    Raises:
      TypeError: The dtype holds Python objects or can't be described without loss.
    """
    if dtype.hasobject:
        raise TypeError(f"dtype {dtype} holds Python objects")
    candidates: list[DtypeDescriptor] = []
    if dtype.fields is not None or dtype.subdtype is not None:
        try:
            candidates.append(_to_lists(np.lib.format.dtype_to_descr(np.lib.format.drop_metadata(dtype))))
        except ValueError as error:
            raise TypeError(f"dtype {dtype} has fields that overlap or are out of order") from error
    else:
        candidates += [dtype.name, dtype.str]
    for descriptor in candidates:
        try:
            if dtype_from(descriptor) == dtype:
                return descriptor
        except (TypeError, ValueError):
            continue
    raise TypeError(f"dtype {dtype} cannot be described without loss")


def dtype_from(descriptor: Any) -> np.dtype[Any]:
    """The dtype that a descriptor names.

    Raises:
      ValueError: It names none, or one that holds objects.
    """
    try:
        if isinstance(descriptor, str):
            dtype = _named_dtype(descriptor)
        elif isinstance(descriptor, list):
            dtype = np.lib.format.descr_to_dtype(_to_tuples(descriptor))
        else:
            raise ValueError(f"{type(descriptor).__name__} is no dtype descriptor")
    except (TypeError, ValueError, SyntaxError, KeyError, IndexError, RecursionError, OverflowError) as error:
        raise ValueError(f"unknown dtype {str(descriptor)[:80]!r}") from error
    if dtype.hasobject:
        raise ValueError(f"dtype {str(descriptor)[:80]!r} holds Python objects")
    if dtype.subdtype is not None:
        raise ValueError(f"dtype {str(descriptor)[:80]!r} is an array, not an element")
    if dtype.itemsize > _ITEM_BYTES_MAX:
        raise ValueError(f"dtype {str(descriptor)[:80]!r} has elements of {dtype.itemsize} bytes")
    return dtype


def zarr_name(dtype: np.dtype[Any]) -> str | None:
    """Name of the dtype in Zarr v3 as TensorStore has it, or None when it is opaque."""
    if dtype.fields is None and dtype.subdtype is None and dtype.isnative and dtype.name in _ZARR_NAMES:
        return dtype.name
    return None


@functools.cache
def is_jax_dtype(dtype: np.dtype[Any]) -> bool:
    """Whether a `jax.Array` can have this dtype."""
    return zarr_name(dtype) is not None or (dtype.isnative and dtype.name in _JAX_ONLY_NAMES)


@functools.cache
def is_sub_byte(dtype: np.dtype[Any]) -> bool:
    """Whether elements have fewer than eight bits; such arrays have one byte an element on the host."""
    return dtype.name in ("int1", "uint1", "int2", "uint2", "int4", "uint4", "float4_e2m1fn")


def stored_form(dtype: np.dtype[Any], shape: tuple[int, ...]) -> tuple[tuple[int, ...], int]:
    """Shape and element bytes as they lie on disk: opaque dtypes have one axis of bytes more."""
    if zarr_name(dtype) is not None or dtype.itemsize == 1:
        return shape, dtype.itemsize
    return (*shape, dtype.itemsize), 1


def _named_dtype(name: str) -> np.dtype[Any]:
    if "," in name or "(" in name:
        raise ValueError("structured dtypes are described by lists")
    extension = getattr(ml_dtypes, name, None)
    if isinstance(extension, type):
        return np.dtype(extension)
    return np.dtype(name)


def _to_lists(descr: Any) -> Any:
    if isinstance(descr, (list, tuple)):
        return [_to_lists(part) for part in descr]
    return descr


def _to_tuples(descr: list[Any]) -> Any:
    """The field list with the tuples that NumPy wants: ``[(name, format[, shape]), ...]``."""
    if len(descr) == 2 and isinstance(descr[1], list) and all(isinstance(size, int) for size in descr[1]):
        return (_format_of(descr[0]), tuple(descr[1]))
    fields: list[tuple[Any, ...]] = []
    for field in descr:
        name, form, *shape = field
        if isinstance(name, list):
            name = tuple(name)
        fields.append((name, _format_of(form), *(tuple(part) for part in shape)))
    return fields


def _format_of(form: Any) -> Any:
    return _to_tuples(form) if isinstance(form, list) else form
