"""What does a Zarr array say of itself, and can it be true?

The metadata of an array (v2 or v3) become a `ZarrForm`. They are checked here before TensorStore sees them, which ends
the process for some impossible dtypes, and for chunks that no memory holds: dtypes must be JAX's, the sizes of shapes
and chunks possible together, and a chunk smaller than the memory of this machine. Codecs are TensorStore's to judge.

Deliberately not here: reading anything (`_zarrays`).

Source: https://zarr-specs.readthedocs.io
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxckpt._dtypes import dtype_from, zarr_name

# TensorStore's limit.
_RANK_MAX = 32
_SIZE_MAX = 1 << 62

_ZARR2_SIMPLE = re.compile(r"[<>|=][biufc][0-9]{1,2}")
_ZARR2_MEMBERS = (
    "chunks compressor dimension_separator dtype fill_value filters order shape zarr_format".split()
)
_ZARR3_MEMBERS = (
    "chunk_grid chunk_key_encoding codecs data_type fill_value node_type shape zarr_format".split()
)


@dataclasses.dataclass(frozen=True, slots=True)
class ZarrForm:
    """What a Zarr array says of itself.

    Attributes:
      driver: TensorStore's name of the format.
      document: Its metadata, with the members that TensorStore wants.
      dtype: Type of the elements, in native byte order.
      shape: Shape.
      chunk_shape: Shape of what is decoded at once.
      last_chunk: Key of the chunk with the last element.
    """

    driver: str
    document: Mapping[str, Any]
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    chunk_shape: tuple[int, ...]
    last_chunk: str


class FormError(Exception):
    """Says what is wrong with the metadata of an array."""


def parse_json(data: bytes | str) -> Any:
    """What a JSON text says.

    Raises:
      ValueError: It is none, or one that no writer makes.
    """
    try:
        return json.loads(data)
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error


def parse_form(name: str, data: bytes) -> ZarrForm:
    """What the metadata of an array says.

    Args:
      name: ``.zarray`` or ``zarr.json``.
      data: Its bytes.

    Raises:
      FormError: It contradicts itself, or is nothing that this library and TensorStore read.
    """
    try:
        document = parse_json(data)
    except ValueError as error:
        raise FormError(f"is no JSON: {error}") from error
    if not isinstance(document, dict):
        raise FormError("is no JSON object")
    return _parse_zarr2(document) if name == ".zarray" else _parse_zarr3(document)


def _parse_zarr2(document: dict[str, Any]) -> ZarrForm:
    shape = _sizes(document.get("shape"), "shape", 0)
    chunk_shape = _sizes(document.get("chunks"), "chunks", 1)
    dtype = _zarr2_dtype(document.get("dtype"))
    separator = document.get("dimension_separator", ".")
    if separator not in (".", "/"):
        raise FormError(f"has the dimension_separator {separator!r:.40}")
    _check_chunks(shape, chunk_shape, dtype)
    last = separator.join(map(str, _last_of(shape, chunk_shape))) or "0"
    known = {name: document[name] for name in _ZARR2_MEMBERS if name in document}
    return ZarrForm("zarr", known, dtype, shape, chunk_shape, last)


def _zarr2_dtype(name: Any) -> np.dtype[Any]:
    # The names of ml_dtypes are an addition of TensorStore's to the format.
    if isinstance(name, str) and (_ZARR2_SIMPLE.fullmatch(name) or name[:1].isalpha()):
        try:
            dtype = dtype_from(name).newbyteorder("=")
        except (ValueError, TypeError):
            dtype = np.dtype(object)
        if zarr_name(dtype) is not None:
            return dtype
    raise FormError(f"has the dtype {name!r:.80}, which JAX does not have")


def _parse_zarr3(document: dict[str, Any]) -> ZarrForm:
    shape = _sizes(document.get("shape"), "shape", 0)
    name = document.get("data_type")
    try:
        dtype = dtype_from(name)
    except ValueError:
        dtype = np.dtype(object)
    if not isinstance(name, str) or zarr_name(dtype) != name:
        raise FormError(f"has the data_type {name!r:.80}, which JAX does not have")
    grid_shape = _sizes(_configuration(document, "chunk_grid").get("chunk_shape"), "chunk_shape", 1)
    _check_chunks(shape, grid_shape, dtype)
    codecs = document.get("codecs")
    if not isinstance(codecs, list):
        raise FormError("has no list of codecs")
    chunk_shape = _inner_chunk_shape(codecs, grid_shape)
    encoding = document.get("chunk_key_encoding")
    if not isinstance(encoding, dict) or encoding.get("name") not in ("default", "v2"):
        raise FormError("has an unknown chunk_key_encoding")
    is_default = encoding["name"] == "default"
    configuration = encoding.get("configuration")
    separator = configuration.get("separator") if isinstance(configuration, dict) else None
    separator = separator or ("/" if is_default else ".")
    if separator not in (".", "/"):
        raise FormError(f"has the separator {separator!r:.40}")
    places = [str(place) for place in _last_of(shape, grid_shape)]
    last = separator.join(["c", *places] if is_default else places or ["0"])
    known = {name: document[name] for name in _ZARR3_MEMBERS if name in document}
    return ZarrForm("zarr3", known, dtype, shape, chunk_shape, last)


def _inner_chunk_shape(codecs: Sequence[Any], chunk_shape: tuple[int, ...]) -> tuple[int, ...]:
    """What is decoded at once: of a chunk that is a shard, a part of it."""
    for codec in codecs:
        if isinstance(codec, dict) and codec.get("name") == "sharding_indexed":
            inner = _sizes(
                _configuration({"codec": codec}, "codec").get("chunk_shape"), "chunk_shape of a shard", 1
            )
            if len(inner) != len(chunk_shape) or any(
                size % part for size, part in zip(chunk_shape, inner, strict=True)
            ):
                raise FormError(f"has shards of {chunk_shape} that chunks of {inner} do not fill")
            return inner
    return chunk_shape


def _configuration(document: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    member = document.get(name)
    configuration = member.get("configuration") if isinstance(member, dict) else None
    if not isinstance(configuration, dict):
        raise FormError(f"has no configuration of its {name}")
    return configuration


def _sizes(sizes: Any, what: str, size_min: int) -> tuple[int, ...]:
    if not isinstance(sizes, list) or len(sizes) > _RANK_MAX:
        raise FormError(f"has no {what} of at most {_RANK_MAX} axes")
    if not all(type(size) is int and size_min <= size < _SIZE_MAX for size in sizes):
        raise FormError(f"has the impossible {what} {str(sizes)[:80]}")
    if math.prod(sizes) >= _SIZE_MAX:
        raise FormError(f"has the {what} {str(sizes)[:80]}, which no array has")
    return tuple(sizes)


def _check_chunks(shape: tuple[int, ...], chunk_shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
    if len(shape) != len(chunk_shape):
        raise FormError(f"has the shape {shape} and chunks of {chunk_shape}")
    chunk_bytes = math.prod(chunk_shape) * dtype.itemsize
    if max(chunk_bytes, 0) > _memory_bytes():
        raise FormError(
            f"has chunks of {chunk_bytes} bytes, each of which has to be in memory whole; "
            f"this machine has {_memory_bytes()}"
        )


@functools.cache
def _memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _last_of(shape: tuple[int, ...], chunk_shape: tuple[int, ...]) -> list[int]:
    """Place of the chunk with the last element."""
    return [max(size - 1, 0) // chunk for size, chunk in zip(shape, chunk_shape, strict=True)]
