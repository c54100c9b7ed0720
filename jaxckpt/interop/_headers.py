"""What do the header of a safetensors file and the index of several say?

    file    length of the header (8 bytes, little endian), header (JSON), and the bytes of the tensors without gaps
    header  {"NAME": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, "__metadata__": {"key": "text"}}
    index   {"weight_map": {"NAME": "model-00001-of-00002.safetensors"}, "metadata": {"total_size": 24}}

Both are checked before anybody relies on them: every byte of a file belongs to one tensor, and an index names files
beside it.

Source: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

import ml_dtypes
import numpy as np

from jaxckpt._errors import NotFoundError
from jaxckpt._foreign import ForeignLeaf
from jaxckpt._manifest import RANK_MAX

from ._files import SourceFile, corrupt, split_path

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"

METADATA_KEY = "__metadata__"
# The limit of the package itself.
_HEADER_BYTES_MAX = 100_000_000
INDEX_BYTES_MAX = 100_000_000
# The package pads to 8. The elements then begin at a multiple of 64, where JAX takes mapped memory without a copy.
_HEADER_ALIGNMENT = 64

# In the order in which the package writes tensors, backwards. Those without a type of NumPy share bytes.
_TYPES: tuple[tuple[str, Any], ...] = (
    ("BOOL", np.bool_),
    ("F4", None),
    ("F6_E2M3", None),
    ("F6_E3M2", None),
    ("U8", np.uint8),
    ("I8", np.int8),
    ("F8_E5M2", ml_dtypes.float8_e5m2),
    ("F8_E4M3", ml_dtypes.float8_e4m3fn),
    ("F8_E8M0", ml_dtypes.float8_e8m0fnu),
    ("F8_E4M3FNUZ", ml_dtypes.float8_e4m3fnuz),
    ("F8_E5M2FNUZ", ml_dtypes.float8_e5m2fnuz),
    ("I16", np.int16),
    ("U16", np.uint16),
    ("F16", np.float16),
    ("BF16", ml_dtypes.bfloat16),
    ("I32", np.int32),
    ("U32", np.uint32),
    ("F32", np.float32),
    ("C64", np.complex64),
    ("F64", np.float64),
    ("I64", np.int64),
    ("U64", np.uint64),
)
_DTYPE_OF_NAME = {name: None if scalar is None else np.dtype(scalar) for name, scalar in _TYPES}
PLACE_OF_DTYPE = {np.dtype(scalar): rank for rank, (_, scalar) in enumerate(_TYPES) if scalar is not None}
_BITS = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}


@dataclasses.dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor lies: the number of its file, and where it begins there."""

    leaf: ForeignLeaf
    file: int
    offset: int


def read_index(path: str) -> dict[str, str]:
    """The file that each tensor is in."""
    source = SourceFile(path, lambda _: None)
    try:
        if source.size > INDEX_BYTES_MAX:
            raise corrupt(path, "manifest", f"has {source.size} bytes, which is too much for an index")
        index: Any = _parse_json(source.read(0, source.size), path)
    finally:
        source.close()
    files = _object_of((_object_of(index) or {}).get("weight_map"))
    if files is None:
        raise corrupt(path, "manifest", "has no weight_map: it is no index of safetensors")
    for name, file in files.items():
        if not isinstance(file, str) or not file or file in (".", "..") or set(file) & set("/\\\0?"):
            raise corrupt(path, "manifest", f"names {file!r}, which is no file beside it", name)
    return files


def read_header(source: SourceFile, number: int) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """The tensors of a file and its metadata.

    Raises:
      NotFoundError: It is no such file, by its name and its first bytes.
      CorruptError: The header is damaged, or is not that of a file of this length.
    """
    is_named = split_path(source.path)[1].endswith(".safetensors")
    if not is_named and source.read(0, min(source.size, 9)).tobytes()[8:] != b"{":
        raise NotFoundError(f"{source.path!r} is no file of safetensors: it has no header of theirs")
    length = int.from_bytes(source.read(0, 8), "little")
    if length > min(_HEADER_BYTES_MAX, source.size - 8):
        raise corrupt(
            source.path, "manifest", f"has a header of {length} bytes, and {source.size} bytes in all"
        )
    header = source.read(8, length)
    if bytes(header[:1]) != b"{":
        raise corrupt(source.path, "manifest", "has a header that does not begin with a brace")
    records: dict[str, Any] = _parse_json(header, source.path)
    metadata = {} if records.get(METADATA_KEY) is None else _object_of(records[METADATA_KEY])
    records.pop(METADATA_KEY, None)
    if metadata is None or not all(isinstance(text, str) for text in metadata.values()):
        raise corrupt(source.path, "manifest", f"has a {METADATA_KEY} that is not texts by name")
    tensors: dict[str, StoredTensor] = {}
    ranges: list[tuple[int, int, str]] = []
    for name, record in records.items():
        leaf, start, end = _parse_record(source.path, name, record)
        tensors[name] = StoredTensor(leaf, number, 8 + length + start)
        ranges.append((start, end, name))
    # Every byte belongs to one tensor: a file that says otherwise was not written by anybody's package.
    at = 0
    for start, end, name in sorted(ranges):
        if start != at:
            raise corrupt(source.path, "manifest", f"has {name!r} at byte {start} instead of {at}", name)
        at = end
    if 8 + length + at != source.size:
        message = f"has {source.size} bytes, and its tensors end at byte {8 + length + at}"
        raise corrupt(source.path, "length", message)
    return tensors, metadata


def _parse_json(data: memoryview, path: str) -> Any:
    def refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a name is in it twice")
        return found

    try:
        return json.loads(bytes(data).decode(), object_pairs_hook=refuse_duplicates)
    except (ValueError, RecursionError) as error:
        raise corrupt(path, "manifest", f"is damaged: it is no JSON: {error}") from error


def _object_of(value: Any) -> dict[str, Any] | None:
    """A value of JSON if it is an object."""
    return value if isinstance(value, dict) else None


def _parse_record(path: str, name: str, record: Any) -> tuple[ForeignLeaf, int, int]:
    """What a header says of a tensor, and where it begins and ends behind the header."""

    def fail(what: str) -> NoReturn:
        raise corrupt(path, "manifest", f"says of {name!r} {what}", name)

    fields = _object_of(record)
    if fields is None:
        fail("nothing that could be read")
    dtype_name: Any = fields.get("dtype")
    shape: Any = fields.get("shape")
    offsets: Any = fields.get("data_offsets")
    if not isinstance(dtype_name, str) or dtype_name not in _DTYPE_OF_NAME:
        fail(f"that it has the unknown dtype {dtype_name!r}")
    if not _are_sizes(shape) or len(shape) > RANK_MAX:
        fail(f"that it has the impossible shape {shape!r}")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        fail(f"that it has the impossible place {offsets!r}")
    dtype = _DTYPE_OF_NAME[dtype_name]
    bits = math.prod(shape) * (_BITS[dtype_name] if dtype is None else 8 * dtype.itemsize)
    if bits != 8 * (offsets[1] - offsets[0]):
        fail(f"that {dtype_name} of shape {shape} takes {offsets[1] - offsets[0]} bytes")
    return ForeignLeaf(name, dtype, tuple(shape), dtype_name), offsets[0], offsets[1]


def _are_sizes(value: Any) -> bool:
    sizes: list[Any] = value if isinstance(value, list) else [None]
    return all(type(each) is int and each >= 0 for each in sizes)


def encode_header(
    tensors: Iterable[tuple[str, np.dtype[Any], tuple[int, ...]]], metadata: Mapping[str, str]
) -> bytes:
    """The length and the header of tensors, by name, dtype and shape, that lie behind it in this order."""
    header: dict[str, Any] = {METADATA_KEY: dict(metadata)} if metadata else {}
    at = 0
    for name, dtype, shape in tensors:
        end = at + math.prod(shape) * dtype.itemsize
        dtype_name, _ = _TYPES[PLACE_OF_DTYPE[dtype]]
        header[name] = {"dtype": dtype_name, "shape": list(shape), "data_offsets": [at, end]}
        at = end
    data = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    data += b" " * (-(8 + len(data)) % _HEADER_ALIGNMENT)
    return len(data).to_bytes(8, "little") + data


def encode_index(file_of_tensor: Mapping[str, str], nbytes: int) -> bytes:
    """The index of tensors that lie in several files and have so many bytes together."""
    index = {"metadata": {"total_size": nbytes}, "weight_map": dict(sorted(file_of_tensor.items()))}
    return (json.dumps(index, indent=2, ensure_ascii=False) + "\n").encode()
