"""Which bytes are a manifest?

This is the only module that knows them (FORMAT.md, "Manifest"):

1. The file is one msgpack array ``["jaxckpt", checksum, payload]``; the checksum is XXH3-128 of the payload.
2. The payload is a msgpack map. Leaves and chunks are columns, not lists of maps, so that 100,000 of them decode in
   milliseconds.
3. `parse_manifest` checks every statement against every other before anything is allocated for the arrays: sizes
   against lengths, chunks against the packs that hold them (no holes, no overlaps), keys against the structure.

Invariant: a `Manifest` that `parse_manifest` returned can be used without further checks, but for the contents of
the objects that it names.
"""

from __future__ import annotations

import dataclasses
import math
import struct
from typing import Any, NoReturn

import msgpack
import numpy as np
import xxhash

from ._config import BLOCK_BYTES
from ._dtypes import is_jax_dtype
from ._errors import FormatError, Problem
from ._garbage import collection_paused
from ._keys import check_nodes
from ._manifest import (
    ABSENT,
    ITEMS_BYTES_MAX,
    ITEMS_DIRECTORY,
    LOCAL_FEATURE,
    MANIFEST_NAME,
    NO_CHUNKS,
    NO_OWNERS,
    PARTS_DIRECTORY,
    PARTS_FEATURE,
    PROCESSES_MAX,
    PROGRAMS_DIRECTORY,
    RANK_MAX,
    TIME_S_MAX,
    LeafSpec,
    Manifest,
    PartEntry,
    ProgramEntry,
    StoredObject,
    check_directories,
)
from ._tables import (
    CHECKSUM_BYTES,
    ChunkTable,
    TableError,
    check_size,
    encode_table,
    parse_column,
    parse_table,
)
from ._values import decode_value, unpack

FORMAT_VERSION = 1
_PAYLOAD_BYTES_MAX = 1 << 32  # msgpack has none that is longer
MANIFEST_BYTES_MAX = _PAYLOAD_BYTES_MAX + 64  # the rest of the frame is shorter
_FRAME_START = b"\x93" + bytes(msgpack.packb("jaxckpt") or b"") + bytes([0xC4, CHECKSUM_BYTES])
_METADATA_BYTES_MAX = 1 << 26  # they are a few hundred bytes, and read whole
_KINDS = ("array", "key", "numpy", "bytes", "str", "value")


# --- encoding -------------------------------------------------------------------------------------------------


def encode_manifest(manifest: Manifest) -> bytes:
    """The bytes of the manifest object."""
    payload = {
        "format": FORMAT_VERSION,
        "min_reader": FORMAT_VERSION,
        "min_writer": FORMAT_VERSION,
        "features": _features_of(manifest),
        "writer": manifest.writer,
        "created_s": manifest.created_s,
        "data": manifest.data,
        "metadata": manifest.metadata,
        "metrics": manifest.metrics,
        "block_bytes": BLOCK_BYTES,
        "checksum": "xxh3-128",
        "tree": manifest.nodes,
        "keys": list(manifest.keys),
        "specs": [_encode_spec(spec) for spec in manifest.specs],
        "spec_index": manifest.spec_index.astype("<u4").tobytes(),
        "values": [[leaf, value] for leaf, value in sorted(manifest.values.items())],
        "shardings": list(manifest.shardings),
        "directories": [[leaf, path] for leaf, path in sorted(manifest.directories.items())],
        **encode_table(manifest.chunks, manifest.packs),
        "objects": [[entry.name, entry.length, entry.checksum] for entry in manifest.objects],
    }
    if manifest.parts or manifest.local is not None:
        payload["owners"] = [column.astype("<u2").tobytes() for column in manifest.owners]
        payload["owner_index"] = manifest.owner_index.astype("<i4").tobytes()
    if manifest.parts:
        payload["parts"] = [
            [part.length, part.checksum, part.objects, part.stored_bytes] for part in manifest.parts
        ]
    if manifest.local is not None:
        payload["local"] = list(manifest.local)
    if manifest.programs:
        payload["programs"] = {name: dataclasses.asdict(entry) for name, entry in manifest.programs.items()}
    return _frame(bytes(msgpack.packb(payload, unicode_errors="surrogatepass") or b""))


def _features_of(manifest: Manifest) -> list[str]:
    features = [PARTS_FEATURE] if manifest.parts else []
    return [*features, LOCAL_FEATURE] if manifest.local is not None else features


def _frame(payload: bytes) -> bytes:
    if len(payload) >= _PAYLOAD_BYTES_MAX:
        raise ValueError(f"a manifest of {len(payload)} bytes, and msgpack has no lengths beyond 4 GiB")
    return _frame_header(xxhash.xxh3_128_digest(payload), len(payload)) + payload


def _frame_header(checksum: bytes, length: int) -> bytes:
    """What stands before a payload: of a list of three the first two, and that so many bytes follow."""
    if length < 1 << 8:
        return _FRAME_START + checksum + struct.pack(">BB", 0xC4, length)
    if length < 1 << 16:
        return _FRAME_START + checksum + struct.pack(">BH", 0xC5, length)
    return _FRAME_START + checksum + struct.pack(">BI", 0xC6, length)


def _encode_spec(spec: LeafSpec) -> dict[str, Any]:
    if spec.kind == "value":
        return {"kind": spec.kind}
    record: dict[str, Any] = {
        "kind": spec.kind,
        "dtype": spec.dtype,
        "shape": list(spec.shape),
        "chunk_shape": list(spec.chunk_shape),
    }
    if spec.kind in ("array", "key"):
        record |= {"weak_type": spec.weak_type, "committed": spec.committed, "sharding": spec.sharding}
    if spec.kind == "key":
        record["impl"] = spec.impl
    if spec.kind == "numpy":
        record["order"] = spec.order
    return record


# --- parsing --------------------------------------------------------------------------------------------------


def checksum_of_manifest(data: bytes) -> bytes | None:
    """The checksum of a whole manifest, much quicker than parsing it; None when it does not match."""
    checksum, payload = _open_frame(data)
    return checksum if xxhash.xxh3_128_digest(payload) == checksum else None


@collection_paused()
def parse_manifest(data: bytes, source: str) -> Manifest:
    """Decodes and validates a manifest.

    Args:
      data: The object's bytes.
      source: Where they came from, for messages.

    Raises:
      FormatError: They are not a manifest, are damaged, contradict themselves, or need a newer reader.
    """
    payload = _unframe(data, source)
    try:
        return _Parser(payload, source).parse()
    except FormatError:
        raise
    except TableError as error:
        _fail(source, str(error), error)
    except (
        Exception
    ) as error:  # a hostile payload can make Python raise almost anything; all of it means this
        _fail(source, f"the manifest is malformed: {type(error).__name__}: {str(error)[:200]}", error)


def _fail(source: str, message: str, cause: BaseException | None = None, kind: str = "manifest") -> NoReturn:
    problem = Problem(None, kind, f"{MANIFEST_NAME}: {message}")
    raise FormatError(
        f"cannot read the checkpoint {source!r}\n  {problem}\nit cannot be restored; use another checkpoint",
        [problem],
    ) from cause


def _unframe(data: bytes, source: str) -> dict[str, Any]:
    checksum, payload = _open_frame(data)
    if checksum is None:
        _fail(source, "it is not a manifest of jaxckpt, or it is damaged or cut off")
    if xxhash.xxh3_128_digest(payload) != checksum:
        _fail(source, "its checksum does not match: it is damaged")
    try:
        fields = unpack(payload)
    except (ValueError, TypeError, msgpack.exceptions.UnpackException) as error:
        _fail(source, "its payload is not valid msgpack", error)
    if not isinstance(fields, dict):
        _fail(source, "its payload is not a map")
    return fields


def _open_frame(data: bytes) -> tuple[bytes | None, memoryview]:
    """Checksum and payload of what `_frame` makes, without a copy; no checksum where it is something else."""
    start = len(_FRAME_START) + CHECKSUM_BYTES
    checksum = data[len(_FRAME_START) : start]
    for header_bytes in (2, 3, 5):  # of the payload
        end = start + header_bytes
        length = len(data) - end
        if 0 <= length < _PAYLOAD_BYTES_MAX and data[:end] == _frame_header(checksum, length):
            return checksum, memoryview(data)[end:]
    return None, memoryview(b"")


def _is_unicode(text: str) -> bool:
    """Whether a text has no lone surrogates, which no file name can hold."""
    return text.isascii() or not any("\ud800" <= sign <= "\udfff" for sign in text)


class _Parser:
    """Turns the payload of one manifest into records, checking each statement on the way."""

    def __init__(self, fields: dict[str, Any], source: str) -> None:
        self._fields = fields
        self._source = source

    def parse(self) -> Manifest:
        self._check_versions()
        keys = self._keys()
        specs = tuple(self._spec(record) for record in self._list("specs"))
        spec_index = parse_column(self._fields, "spec_index", "<u4", len(keys))
        if len(keys) and int(spec_index.max()) >= len(specs):
            self._fail("a leaf names a spec that is not there")
        manifest = Manifest(
            data=self._data_directory(),
            created_s=self._time(self._fields["created_s"]),
            writer=self._writer(),
            metadata=self._fields["metadata"],
            nodes=self._fields["tree"],
            keys=keys,
            specs=specs,
            spec_index=spec_index,
            values=self._values(),
            shardings=tuple(self._sharding(descriptor) for descriptor in self._list("shardings")),
            directories={leaf: self._path(path) for leaf, path in self._by_leaf("directories").items()},
            packs=(),
            chunks=NO_CHUNKS,
            objects=self._objects(),
            metrics=self._metrics(),
            programs=self._programs(),
            **self._owners(len(keys)),
        )
        self._check_leaves(manifest)
        self._check_owners(manifest)
        self._check_programs(manifest)
        chunks, packs = self._table(manifest)
        return dataclasses.replace(manifest, chunks=chunks, packs=packs)

    def _table(self, manifest: Manifest) -> tuple[ChunkTable, tuple[int, ...]]:
        """The manifest's own table; with parts it is empty."""
        if self._has(PARTS_FEATURE):
            return parse_table(self._fields, np.zeros(0, np.int64))
        counts = manifest.counts_of(0)
        # Python integers, and before memory is taken: a hostile shape must not wrap around.
        rows = sum(counts.tolist())
        parse_column(self._fields, "chunk_pack", "<i4", rows)
        chunks, packs = parse_table(self._fields, np.repeat(manifest.chunk_nbytes, counts))
        check_directories(manifest, chunks, counts)
        return chunks, packs

    def _has(self, feature: str) -> bool:
        return feature in self._list("features")

    def _owners(self, leaves: int) -> dict[str, Any]:
        """The fields that tell whose chunks are where; none of them with one process."""
        found: dict[str, Any] = {}
        if self._has(PARTS_FEATURE):
            parts = self._list("parts")
            if not 0 < len(parts) <= PROCESSES_MAX:
                self._fail("a bad number of parts")
            found["parts"] = tuple(self._part(number, entry) for number, entry in enumerate(parts))
        if self._has(LOCAL_FEATURE):
            process, count = (self._size(number) for number in self._list("local"))
            if not process < count <= PROCESSES_MAX or "parts" in found:
                self._fail("a local checkpoint of a bad process")
            found["local"] = process, count
        if found:
            columns = self._list("owners")
            if not all(isinstance(column, bytes) and len(column) % 2 == 0 for column in columns):
                self._fail("a bad column of owners")
            found["owners"] = tuple(np.frombuffer(column, "<u2") for column in columns)
            found["owner_index"] = parse_column(self._fields, "owner_index", "<i4", leaves)
        return found

    def _part(self, process: int, entry: Any) -> PartEntry:
        length, checksum, objects, stored_bytes = self._as_list(entry, "a part")
        if not isinstance(checksum, bytes) or len(checksum) != CHECKSUM_BYTES:
            self._fail("a part with a bad checksum")
        if self._size(length) >= MANIFEST_BYTES_MAX:
            self._fail("a part beyond all reason")
        name = f"{self._data_directory()}/{PARTS_DIRECTORY}/{process}"
        return PartEntry(name, length, checksum, self._size(objects), self._size(stored_bytes))

    def _check_owners(self, manifest: Manifest) -> None:
        """Every chunk has one owner, which is there."""
        for spec in manifest.specs:
            if spec.kind != "value":
                check_size(spec.chunk_nbytes)
        if manifest.owner_index is NO_OWNERS:
            return
        index = manifest.owner_index
        if len(index) and not -1 <= int(index.min()) <= int(index.max()) < len(manifest.owners):
            self._fail("a leaf names owners that are not there")
        end = len(manifest.parts) or 1
        for column in manifest.owners:
            known = column if manifest.local is None else column[column != ABSENT]
            if len(known) and int(known.max()) >= end:
                self._fail("a chunk of a process that is not there")
        lengths = np.array([*map(len, manifest.owners), 0], np.int64)
        if len(index) and np.any(lengths[index] != np.diff(manifest.chunk_starts)):
            self._fail("owners of another number of chunks than their leaf has")

    def _check_programs(self, manifest: Manifest) -> None:
        """Every program is one of the objects."""
        length_of = {entry.name: entry.length for entry in manifest.objects}
        for name, entry in manifest.programs.items():
            if length_of.get(entry.name) != entry.length:
                self._fail(f"a program that is not there: {name[:80]!r}")

    def _fail(self, message: str, kind: str = "manifest") -> NoReturn:
        _fail(self._source, message, kind=kind)

    def _check_versions(self) -> None:
        version = self._fields["format"]
        min_reader = self._fields["min_reader"]
        if type(version) is not int or type(min_reader) is not int:
            self._fail("its format version is not a number")
        if min_reader > FORMAT_VERSION:
            written_by = str(self._fields.get("writer", {}).get("jaxckpt", "unknown"))[:40]
            self._fail(
                f"it needs a reader of format {min_reader}; this version reads up to {FORMAT_VERSION}. "
                f"It was written by jaxckpt {written_by}: install that version or a newer one",
                kind="version",
            )
        unknown = [
            feature for feature in self._list("features") if feature not in (PARTS_FEATURE, LOCAL_FEATURE)
        ]
        if unknown:
            self._fail(
                f"it uses features that this version does not know: {str(unknown)[:200]}", kind="version"
            )
        if self._fields["block_bytes"] != BLOCK_BYTES or self._fields["checksum"] != "xxh3-128":
            self._fail("it uses another block size or checksum than format 1 has")

    def _list(self, name: str) -> list[Any]:
        return self._as_list(self._fields[name], f"its {name}")

    def _as_list(self, value: Any, what: str) -> list[Any]:
        if not isinstance(value, list):
            self._fail(f"{what}: not a list but {type(value).__name__}")
        return value

    def _by_leaf(self, name: str) -> dict[int, Any]:
        """A list of ``[leaf, anything]``, each leaf once, in order."""
        entries = self._list(name)
        leaves = [self._size(leaf) for leaf, _ in entries]
        if sorted(set(leaves)) != leaves:
            self._fail(f"its {name} are out of order, or name a leaf twice")
        return {leaf: value for leaf, value in entries}  # noqa: C416  entries are lists, not pairs

    def _writer(self) -> dict[str, str]:
        writer = self._fields["writer"]
        if not isinstance(writer, dict) or not all(
            isinstance(text, str) for text in (*writer, *writer.values())
        ):
            self._fail("the versions of its writer are not texts")
        return writer

    def _metrics(self) -> dict[str, float]:
        metrics = self._fields.get("metrics", {})  # checkpoints of the first days have none
        if not isinstance(metrics, dict) or not all(
            isinstance(name, str) and type(value) is float for name, value in metrics.items()
        ):
            self._fail("its metrics are not numbers by name")
        return metrics

    def _programs(self) -> dict[str, ProgramEntry]:
        programs = self._fields.get("programs", {})
        if not isinstance(programs, dict):
            self._fail("its programs are not a map")
        return {name: self._program(name, record) for name, record in programs.items()}

    def _program(self, name: Any, record: Any) -> ProgramEntry:
        if not isinstance(name, str) or not name or not isinstance(record, dict):
            self._fail("a program without a name, or without a record")
        lines = {
            field: tuple((str(label), str(text)) for label, text in self._as_list(record[field], field))
            for field in ("inputs", "outputs", "intermediates")
        }
        texts = (record["jax"], record["jaxlib"], *self._as_list(record["platforms"], "platforms"))
        if not all(isinstance(text, str) for text in texts) or not record["platforms"]:
            self._fail(f"a program with versions or platforms that are no texts: {name[:80]!r}")
        if not isinstance(record["sha256"], bytes) or len(record["sha256"]) != 32:
            self._fail(f"a program with a bad sha256: {name[:80]!r}")
        if self._size(record["length"]) > ITEMS_BYTES_MAX:
            self._fail(f"a program beyond all reason: {name[:80]!r}")
        return ProgramEntry(
            name=self._path(record["name"]),
            length=record["length"],
            sha256=record["sha256"],
            jax=record["jax"],
            jaxlib=record["jaxlib"],
            created_s=self._time(record["created_s"]),
            platforms=tuple(record["platforms"]),
            devices=self._size(record["devices"]),
            convention=self._size(record["convention"]),
            vjp_order=self._size(record["vjp_order"]),
            **lines,
        )

    def _data_directory(self) -> str:
        name = self._fields["data"]
        if (
            not isinstance(name, str)
            or not name.startswith("data-")
            or not (name.isascii() and name[5:].isalnum())
            or len(name) > 100
        ):
            self._fail("it names a bad data directory")
        return name

    def _time(self, time_s: Any) -> float:
        if type(time_s) not in (int, float) or not 0 <= time_s < TIME_S_MAX:
            self._fail("it was written at no possible time")
        return float(time_s)

    def _keys(self) -> tuple[str, ...]:
        keys = self._fields["keys"]
        if not isinstance(keys, list) or not {*map(type, keys)} <= {str}:
            self._fail("its keys are not a list of strings")
        wrong = check_nodes(self._fields["tree"], keys)
        if wrong is not None:
            self._fail(wrong)
        return tuple(keys)

    def _spec(self, record: Any) -> LeafSpec:
        if not isinstance(record, dict):
            self._fail("a spec that is not a map")
        kind = record["kind"]
        if kind not in _KINDS:
            self._fail(f"unknown kind of leaf {str(kind)[:40]!r}")
        if kind == "value":
            return LeafSpec("value")
        sharding = record.get("sharding")
        sharding_count = len(self._list("shardings"))
        if sharding is not None and not (type(sharding) is int and 0 <= sharding < sharding_count):
            self._fail("a leaf names a sharding that is not there")
        flags = record.get("weak_type", False), record.get("committed", True)
        if not all(isinstance(flag, bool) for flag in flags):
            self._fail("a spec with a flag that is neither true nor false")
        spec = LeafSpec(
            kind=kind,
            dtype=record["dtype"],
            shape=tuple(self._size(size) for size in self._as_list(record["shape"], "a shape")),
            chunk_shape=tuple(
                self._size(size) for size in self._as_list(record["chunk_shape"], "a chunk shape")
            ),
            weak_type=flags[0],
            committed=flags[1],
            order=record.get("order", "C"),
            impl=record.get("impl"),
            sharding=sharding,
        )
        self._check_spec(spec)
        return spec

    def _check_spec(self, spec: LeafSpec) -> None:
        if spec.order not in ("C", "F"):
            self._fail(f"unknown memory order {str(spec.order)[:40]!r}")
        if spec.kind == "key" and not (isinstance(spec.impl, str) and spec.shape and spec.dtype == "uint32"):
            self._fail("a leaf of PRNG keys without key data")
        if spec.kind in ("bytes", "str") and not (spec.dtype == "uint8" and len(spec.shape) == 1):
            self._fail("a long string that is not a row of bytes")
        if spec.kind == "array" and not is_jax_dtype(spec.np_dtype):
            self._fail(f"an array of dtype {str(spec.dtype)[:80]}, which JAX does not have")
        stored = spec.stored_shape
        if len(stored) > RANK_MAX:
            self._fail(f"an array of rank {len(stored)}; the most is {RANK_MAX}")
        if len(spec.chunk_shape) != len(stored):
            self._fail("a chunk shape of another rank than its array")
        for size, chunk in zip(stored, spec.chunk_shape, strict=True):
            if chunk < 1 or size % chunk:
                self._fail(f"a chunk shape {spec.chunk_shape} that does not divide its array {stored}")
        # Without the zeros too, for NumPy makes no array of shape (2**62, 2**62, 0).
        if math.prod(size or 1 for size in stored) * spec.stored_itemsize >= 2**63:
            self._fail(f"an array beyond all memory, of shape {stored}")

    def _values(self) -> dict[int, Any]:
        values = self._by_leaf("values")
        for value in values.values():
            decode_value(value)
        return values

    def _sharding(self, descriptor: Any) -> dict[str, Any]:
        if not isinstance(descriptor, dict) or descriptor.get("type") not in ("named", "single", "opaque"):
            self._fail("a sharding of unknown type")
        if not isinstance(descriptor["memory_kind"], (str, type(None))):
            self._fail("a sharding with a bad memory kind")
        if descriptor["type"] == "single" and type(descriptor["device_id"]) is not int:
            self._fail("a sharding with a bad device")
        if descriptor["type"] == "named":
            self._check_named_sharding(descriptor)
        return descriptor

    def _check_named_sharding(self, descriptor: dict[str, Any]) -> None:
        axes, axis_types, spec = (
            self._as_list(descriptor[name], f"a mesh's {name}") for name in ("axes", "axis_types", "spec")
        )
        if max(len(axes), len(spec)) > RANK_MAX:
            self._fail(f"a sharding with more than {RANK_MAX} axes")
        names = [name for name, _ in axes]
        sizes = [self._size(size) for _, size in axes]
        if len(set(names)) != len(names) or not all(isinstance(name, str) for name in names) or 0 in sizes:
            self._fail("a mesh with bad axes")
        if len(axis_types) != len(names) or not all(
            kind in ("Auto", "Explicit", "Manual") for kind in axis_types
        ):
            self._fail("a mesh with bad axis types")
        used = [name for dimension in spec if isinstance(dimension, list) for name in dimension]
        if len(set(used)) != len(used) or not set(used) <= set(names):
            self._fail("a partition spec with axes that its mesh lacks, or one axis twice")
        for dimension in spec:
            if not (dimension is None or dimension == "unconstrained" or isinstance(dimension, list)):
                self._fail("a bad partition spec")
        reduced = descriptor.get("reduced", [])
        if not (isinstance(reduced, list) and set(reduced) <= set(names) - set(used)):
            self._fail("a partition spec with bad reduced axes")
        device_ids = descriptor["device_ids"]
        if device_ids is not None and (
            len(self._as_list(device_ids, "a mesh's devices")) != math.prod(sizes)
            or not all(type(number) is int for number in device_ids)
            or len(set(device_ids)) != len(device_ids)
        ):
            self._fail("a mesh with another number of devices than its axes say, or one of them twice")

    def _path(self, path: Any) -> str:
        if (
            not isinstance(path, str)
            or len(path) > 4096
            or "\\" in path
            or "\0" in path
            or not _is_unicode(path)
        ):
            self._fail("a bad path")
        if any(part in ("", ".", "..") for part in path.split("/")):
            self._fail(f"a path that leaves the checkpoint: {path[:80]!r}")
        return path

    def _size(self, size: Any) -> int:
        if type(size) is not int or not 0 <= size < 2**63:
            self._fail(f"a bad size {str(size)[:40]!r}")
        return size

    def _objects(self) -> tuple[StoredObject, ...]:
        entries = []
        for name, length, checksum in self._list("objects"):
            if not isinstance(checksum, bytes) or len(checksum) != CHECKSUM_BYTES:
                self._fail("an object with a bad checksum")
            data = self._fields["data"]
            may_be_large = str(name).startswith(
                (f"{data}/{ITEMS_DIRECTORY}/", f"{data}/{PROGRAMS_DIRECTORY}/")
            )
            if self._size(length) > (ITEMS_BYTES_MAX if may_be_large else _METADATA_BYTES_MAX):
                self._fail("a metadata object beyond all reason")
            entries.append(StoredObject(self._path(name), length, checksum))
        return tuple(entries)

    def _check_leaves(self, manifest: Manifest) -> None:
        is_value = np.array([spec.kind == "value" for spec in manifest.specs], bool)
        of_values = (
            np.flatnonzero(is_value[manifest.spec_index]) if len(manifest.keys) else np.zeros(0, np.int64)
        )
        if sorted(manifest.values) != of_values.tolist():
            self._fail("its values are not those of its leaves")
        if manifest.directories and max(manifest.directories) >= len(manifest.keys):
            self._fail("its directories are not those of its chunks")
        if len(set(manifest.directories.values())) != len(manifest.directories):
            self._fail("two leaves share a directory")
