"""What does an open checkpoint show, and how are its leaves read as NumPy arrays?

`Checkpoint` is a manifest and the store that it came from. `StoredLeaf` describes one leaf, and reads it, or the part
of it that an index asks for, when it is indexed. Nothing here touches a device, so that a checkpoint of any size can be
looked into on a laptop.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, final

import numpy as np

from ._config import PIECE_BYTES, RestoreOptions
from ._dtypes import zarr_name
from ._errors import CheckpointError, NotFoundError
from ._keys import rebuild
from ._manifest import MANIFEST_NAME, LeafSpec, Manifest, decode_value, parse_manifest
from ._matching import logical_shape
from ._resharding import Destination, ReadExecutor, plan_reads
from ._shardings import Box
from ._store import Store, open_store


def open_checkpoint(path: Any) -> Checkpoint:
    """Reads the manifest at a path or URL; see `jaxckpt.open`."""
    store = open_store(path)
    try:
        data = store.read(MANIFEST_NAME)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise NotFoundError(
            f"no committed checkpoint at {store.path!r}: there is no {MANIFEST_NAME}\n"
            "check the path; a save that was interrupted leaves none"
        ) from error
    except OSError as error:
        raise CheckpointError(
            f"cannot read the checkpoint {store.path!r}: {error.strerror or error}"
        ) from error
    return Checkpoint(store, parse_manifest(data, store.path), len(data))


@final
class Checkpoint:
    """A committed checkpoint, open for reading. `jaxckpt.open` makes these."""

    def __init__(self, store: Store, manifest: Manifest, manifest_bytes: int) -> None:
        self._store = store
        self._manifest = manifest
        self._leaf_of_key = {key: number for number, key in enumerate(manifest.keys)}
        self._bytes_read = manifest_bytes

    @property
    def path(self) -> str:
        """Where it is."""
        return self._store.path

    @property
    def metadata(self) -> Any:
        """What was given as ``metadata=``."""
        return self._manifest.metadata

    @property
    def created_s(self) -> float:
        """When it was committed, in seconds since 1970."""
        return self._manifest.created_s

    @property
    def writer(self) -> dict[str, str]:
        """Versions of the libraries that wrote it."""
        return dict(self._manifest.writer)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return self._manifest.nbytes

    @property
    def bytes_read(self) -> int:
        """Bytes asked of storage through this object so far, the manifest included."""
        return self._bytes_read

    @property
    def manifest(self) -> Manifest:
        """The parsed manifest, for tools."""
        return self._manifest

    @property
    def store(self) -> Store:
        """The storage, for tools."""
        return self._store

    def keys(self) -> tuple[str, ...]:
        """Keys of the leaves, in the order of the tree."""
        return self._manifest.keys

    def __contains__(self, key: object) -> bool:
        return key in self._leaf_of_key

    def __len__(self) -> int:
        return len(self._leaf_of_key)

    def __getitem__(self, key: str) -> StoredLeaf:
        if key not in self._leaf_of_key:
            raise KeyError(f"{key!r} is not in {self.path!r}, which has {len(self)} leaves")
        return StoredLeaf(self, self._leaf_of_key[key])

    def tree(self) -> Any:
        """The tree of the checkpoint with a `StoredLeaf` for each leaf; nothing is read.

        It shows shapes and dtypes, and can be edited and given as ``like=`` to `restore`, where a `StoredLeaf`
        stands for the leaf as it was saved.
        """
        return rebuild(self._manifest.nodes, [StoredLeaf(self, leaf) for leaf in range(len(self))])

    def count_read(self, nbytes: int) -> None:
        """Adds to `bytes_read`."""
        self._bytes_read += nbytes

    def read_boxes(self, leaf: int, boxes: Sequence[Box]) -> list[Destination]:
        """Reads and verifies boxes of the stored form of a leaf."""
        plan = plan_reads(self._manifest, [(leaf, boxes)], PIECE_BYTES)
        executor = ReadExecutor(self._store, self._manifest, threads=RestoreOptions().io_threads)
        executor.check_objects(plan)
        key = self._manifest.keys[leaf]
        executor.raise_problems(f"read {key!r} of {self.path!r}")
        executor.read(plan)
        self._bytes_read += executor.bytes_read
        executor.raise_problems(f"read {key!r} of {self.path!r}")
        return list(plan.destinations)


@final
class StoredLeaf:
    """A leaf of an open checkpoint: what it is, and its values as NumPy arrays when indexed.

    ``leaf[...]`` reads all of it, ``leaf[10:20]`` and other basic indexing (integers, slices, ``...``) no more than
    the checksum blocks that hold what is asked for. Everything read is verified. Strings are indexed as in Python.
    """

    # Tells `restore` that this leaf of `like` asks for the leaf as it was saved.
    restore_as_saved = True

    def __init__(self, checkpoint: Checkpoint, leaf: int) -> None:
        self._checkpoint = checkpoint
        self._leaf = leaf
        self._spec = checkpoint.manifest.spec(leaf)

    @property
    def key(self) -> str:
        """Key of the leaf."""
        return self._checkpoint.manifest.keys[self._leaf]

    @property
    def kind(self) -> str:
        """``"array"``, ``"key"`` (PRNG keys), ``"numpy"``, ``"value"`` (scalars), ``"bytes"`` or ``"str"``."""
        return self._spec.kind

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape; that of the keys for PRNG keys, ``()`` for values."""
        return () if self._spec.kind in ("value", "bytes", "str") else logical_shape(self._spec)

    @property
    def dtype(self) -> Any:
        """Type of the elements; for PRNG keys that of the key data, for other values their Python type's name."""
        if self._spec.kind == "value":
            value = self[...]
            return value.dtype if isinstance(value, np.generic) else type(value).__name__
        return self._spec.kind if self._spec.kind in ("bytes", "str") else self._spec.np_dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the array."""
        return self._spec.nbytes

    @property
    def weak_type(self) -> bool:
        """Whether it was weakly typed."""
        return self._spec.weak_type

    @property
    def sharding(self) -> dict[str, Any] | None:
        """The saved sharding as plain data, or None."""
        return self._checkpoint.manifest.sharding_of(self._spec)

    @property
    def stored_dtype(self) -> str:
        """Name of the dtype on disk: the Zarr name, or ``"bytes"`` where Zarr has none."""
        return "" if self._spec.kind == "value" else zarr_name(self._spec.np_dtype) or "bytes"

    def __repr__(self) -> str:
        return f"StoredLeaf({self.key!r}, {self.kind}, {self.dtype}, {self.shape})"

    def __getitem__(self, index: Any) -> Any:
        if self._spec.kind in ("array", "key", "numpy"):
            box, local = _box_of_index(index, self._spec.shape)
            return self.read_box(box)[local]
        value = self._read_value()
        if index is Ellipsis or (isinstance(index, tuple) and not index):
            return value
        if not isinstance(value, (str, bytes)):
            raise IndexError(f"{self.key!r} is a scalar; only [...] and [()] index it")
        return value[index]

    def _read_value(self) -> Any:
        """The Python or NumPy scalar, or the long string."""
        if self._spec.kind == "value":
            return decode_value(self.value_record)
        data = self.read_box(((0,), self._spec.shape)).tobytes()
        return data if self._spec.kind == "bytes" else data.decode("utf-8", "surrogatepass")

    def read_box(self, box: Box) -> np.ndarray[Any, Any]:
        """A box of the array (of the key data, for PRNG keys), verified."""
        spec = self._spec
        tail = spec.stored_shape[len(spec.shape) :]
        stored_box = (box[0] + (0,) * len(tail), box[1] + tail)
        (destination,) = self._checkpoint.read_boxes(self._leaf, [stored_box])
        sizes = tuple(hi - lo for lo, hi in zip(*box, strict=True))
        if destination.buffer is None or destination.nbytes == 0:
            return np.empty(sizes, spec.np_dtype)
        return destination.buffer.view(spec.np_dtype).reshape(sizes)

    @property
    def spec(self) -> LeafSpec:
        """What the manifest says of the leaf, for tools."""
        return self._spec

    @property
    def value_record(self) -> Any:
        """The manifest's record of a value, for tools; None for arrays."""
        return self._checkpoint.manifest.values.get(self._leaf)

    def fingerprint(self) -> bytes | None:
        """Checksums of all chunks; comparable between leaves that are cut alike, None for values."""
        if self._spec.kind == "value":
            return None
        manifest = self._checkpoint.manifest
        first, last = manifest.chunk_starts[self._leaf : self._leaf + 2]
        cut = repr((self._spec.chunk_shape, manifest.chunks.length[first:last].tolist())).encode()
        return cut + b"".join(manifest.chunks.fingerprint(chunk) for chunk in range(int(first), int(last)))


def _box_of_index(index: Any, shape: tuple[int, ...]) -> tuple[Box, tuple[Any, ...]]:
    """The box to read for basic indexing, and the index into what was read."""
    parts: tuple[Any, ...] = index if isinstance(index, tuple) else (index,)
    if sum(part is Ellipsis for part in parts) > 1:
        raise IndexError("only one ellipsis is allowed")
    if Ellipsis not in parts:
        parts = (*parts, Ellipsis)
    at = parts.index(Ellipsis)
    fill = len(shape) - (len(parts) - 1)
    if fill < 0:
        raise IndexError(f"{len(parts) - 1} indices for an array of rank {len(shape)}")
    full = (*parts[:at], *(slice(None),) * fill, *parts[at + 1 :])
    lo: list[int] = []
    hi: list[int] = []
    local: list[Any] = []
    for part, size in zip(full, shape, strict=True):
        if isinstance(part, slice):
            places: range = range(size)[part]
            first, last = (min(places[0], places[-1]), max(places[0], places[-1]) + 1) if places else (0, 0)
            lo.append(first)
            hi.append(last)
            local.append(
                slice(None) if abs(places.step) == 1 and places.step > 0 else slice(None, None, places.step)
            )
        elif hasattr(part, "__index__") and not isinstance(part, (bool, np.bool_)):
            place = range(size)[part]
            lo.append(place)
            hi.append(place + 1)
            local.append(0)
        else:
            raise IndexError(f"only integers, slices and ... index a stored leaf, not {type(part).__name__}")
    return (tuple(lo), tuple(hi)), tuple(local)
