"""Which ``zarr.json`` objects make a checkpoint open as a Zarr v3 group?

Leaves with objects of their own are Zarr arrays at the paths of their keys; all directories above them are groups.
Opaque dtypes (`_dtypes`) are ``uint8`` arrays whose ``jaxckpt`` attribute names the true dtype. This module is pure.
"""

from __future__ import annotations

import json
from typing import Any

import xxhash

from ._dtypes import zarr_name
from ._manifest import LeafSpec

METADATA_NAME = "zarr.json"

_COMPONENT_BYTES_MAX = 200
_PATH_BYTES_MAX = 900


def group_metadata() -> bytes:
    """Metadata of every group."""
    return _encode({"zarr_format": 3, "node_type": "group", "attributes": {"jaxckpt": {"format": 1}}})


def array_metadata(key: str, spec: LeafSpec) -> bytes:
    """Metadata of the Zarr array that a leaf is."""
    dtype = spec.np_dtype
    name = zarr_name(dtype)
    attributes: dict[str, Any] = {"key": key, "kind": spec.kind, "dtype": spec.dtype}
    if name is None:
        attributes["stored_as"] = "bytes"
    # The codec takes an endianness only where there is one.
    codec: dict[str, Any] = {"name": "bytes"}
    if spec.stored_itemsize > 1:
        codec["configuration"] = {"endian": "little"}
    return _encode(
        {
            "zarr_format": 3,
            "node_type": "array",
            "shape": list(spec.stored_shape),
            "data_type": name or "uint8",
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(spec.chunk_shape)}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
            "fill_value": _fill_value(name),
            "codecs": [codec],
            "attributes": {"jaxckpt": attributes},
        }
    )


def leaf_directory(key: str) -> str:
    """Where the Zarr array of a leaf lies below the data directory.

    Components that a file system or Zarr would misread (empty, dots, reserved names, odd characters) are escaped
    with ``%``; long ones are cut and end in a hash of the whole.
    """
    path = "/".join(["arrays", *(_file_component(part) for part in key.split("/"))])
    if len(path) > _PATH_BYTES_MAX:
        return f"arrays/%long/{_hash(key)}"
    return path


def _file_component(component: str) -> str:
    data = component.encode("utf-8", "surrogatepass")
    escaped = "".join(chr(byte) if _is_plain(byte) else f"%{byte:02X}" for byte in data)
    if not escaped:
        return "%empty"
    if set(escaped) == {"."} or escaped.startswith("__") or escaped == METADATA_NAME:
        escaped = f"%{data[0]:02X}{escaped[1:]}"
    if len(escaped) > _COMPONENT_BYTES_MAX:
        escaped = f"{escaped[: _COMPONENT_BYTES_MAX - 40]}%{_hash(component)}"
    return escaped


def _is_plain(byte: int) -> bool:
    return chr(byte).isascii() and (chr(byte).isalnum() or chr(byte) in "-_.~+=@[](),")


def _hash(text: str) -> str:
    return str(xxhash.xxh3_128_hexdigest(text.encode("utf-8", "surrogatepass")))


def _fill_value(name: str | None) -> Any:
    if name == "bool":
        return False
    if name is not None and name.startswith("complex"):
        return [0.0, 0.0]
    if name is not None and "float" in name:
        return 0.0
    return 0


def _encode(metadata: dict[str, Any]) -> bytes:
    # JSON has no lone surrogates, which Python's strings may hold: strict parsers refuse even their escapes.
    return json.dumps(metadata, indent=1, ensure_ascii=False).encode("utf-8", "replace")
