"""What does the manifest say?

The manifest is the one file that lists everything in a checkpoint; that it is there *is* the commit. Here are its
records: what many leaves share (dtype, shape, sharding, chunk shape) is said once, as a *spec*; leaves and chunks are
columns. `_encoding` knows their bytes, and which bytes are a valid manifest.

Deliberately not here: devices, storage, and pytrees of user classes.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import numpy as np

from ._dtypes import DtypeDescriptor, dtype_from, stored_form
from ._tables import OWN_OBJECT, ChunkTable, TableError

# What a reader must know beyond the version of the format: parts of many processes; a directory that one of them keeps
# for itself.
PARTS_FEATURE = "parts"
LOCAL_FEATURE = "local"
MANIFEST_NAME = "manifest.msgpack"
ITEMS_DIRECTORY = "items"  # below the data directory, with one object for each process
PARTS_DIRECTORY = "parts"
PROGRAMS_DIRECTORY = "programs"  # one object for each content, named by its sha256
OWN_DIRECTORY = "own"  # leaves in which a process has another value than process 0
PROCESSES_MAX = 65_535
ABSENT = 65_535  # in the place of an owner: another process keeps the chunk, in a directory of its own
TIME_S_MAX = 253402300800  # the year 10000, the end of dates in Python and ISO 8601
ITEMS_BYTES_MAX = 1 << 30  # they are read whole; what is larger belongs into the tree
# Of the stored form. NumPy's limit; Zarr readers stop at 32, and such an array is then no Zarr array to them.
RANK_MAX = 64


@dataclasses.dataclass(frozen=True)
class LeafSpec:
    """What is said of a leaf but for its key and its bytes; equal leaves share one.

    Attributes:
      kind: ``"array"`` (jax.Array), ``"key"`` (typed PRNG keys), ``"numpy"``, ``"bytes"`` and ``"str"`` (long ones)
        have chunks; ``"value"`` (Python and NumPy scalars) lies in the manifest itself.
      dtype: Descriptor of the stored elements; for keys those of the key data.
      shape: Shape of the stored array; for keys that of the key data.
      chunk_shape: Shape of every chunk of the stored form (`stored_form`); it divides that form's shape.
      weak_type, committed: Properties of the jax.Array.
      order: ``"F"`` for NumPy arrays in Fortran order; the bytes are stored in C order all the same.
      impl: Name of the PRNG implementation, for keys.
      sharding: Index of the sharding descriptor, or None.
    """

    kind: str
    dtype: DtypeDescriptor | None = None
    shape: tuple[int, ...] = ()
    chunk_shape: tuple[int, ...] = ()
    weak_type: bool = False
    committed: bool = True
    order: str = "C"
    impl: str | None = None
    sharding: int | None = None

    @functools.cached_property
    def np_dtype(self) -> np.dtype[Any]:
        """The dtype of the stored elements."""
        return dtype_from(self.dtype)

    @functools.cached_property
    def nbytes(self) -> int:
        """Bytes of the stored array; 0 for values."""
        return 0 if self.dtype is None else math.prod(self.shape) * self.np_dtype.itemsize

    @functools.cached_property
    def stored_shape(self) -> tuple[int, ...]:
        """Shape on disk; opaque dtypes of several bytes have one axis more."""
        return stored_form(self.np_dtype, self.shape)[0]

    @functools.cached_property
    def stored_itemsize(self) -> int:
        """Bytes of an element on disk."""
        return stored_form(self.np_dtype, self.shape)[1]

    @functools.cached_property
    def grid(self) -> tuple[int, ...]:
        """Number of chunks along each axis."""
        return tuple(size // chunk for size, chunk in zip(self.stored_shape, self.chunk_shape, strict=True))

    @functools.cached_property
    def chunk_count(self) -> int:
        """Number of chunks; an array without elements has none."""
        return 0 if self.kind == "value" else math.prod(self.grid)

    @functools.cached_property
    def chunk_nbytes(self) -> int:
        """Bytes of one chunk before padding."""
        return math.prod(self.chunk_shape) * self.stored_itemsize


@dataclasses.dataclass(frozen=True, slots=True)
class StoredObject:
    """A small object that holds no chunks (``zarr.json``, items): path in the checkpoint, length and checksum."""

    name: str
    length: int
    checksum: bytes


@dataclasses.dataclass(frozen=True, slots=True)
class PartEntry:
    """The object with the table of what one process wrote, and what that makes in all."""

    name: str
    length: int
    checksum: bytes
    objects: int
    stored_bytes: int


@dataclasses.dataclass(frozen=True, slots=True)
class ProgramEntry:
    """What the manifest says of a program; whoever opens it checks this first.

    Attributes:
      name: Path of its object in the checkpoint.
      length: Bytes of the object.
      sha256: Of the object.
      jax, jaxlib: Versions that exported it.
      created_s: When that was, in seconds since 1970.
      platforms: What it runs on, in the words of `jax.export`.
      devices: How many devices it wants; with 1 it runs on any number.
      convention: Version of the calling convention of `jax.export`.
      vjp_order: How many times it can be differentiated.
      inputs, outputs, intermediates: Names, and dtypes with shapes, for people; the object says all of it.
    """

    name: str
    length: int
    sha256: bytes
    jax: str
    jaxlib: str
    created_s: float
    platforms: tuple[str, ...]
    devices: int
    convention: int
    vjp_order: int
    inputs: tuple[tuple[str, str], ...]
    outputs: tuple[tuple[str, str], ...]
    intermediates: tuple[tuple[str, str], ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Manifest:
    """Everything that a checkpoint says of itself.

    With one process, ``packs`` and ``chunks`` are the table of all chunks, and there are no ``owners``. With many there
    are ``parts`` (`_parts`): ``owner_index`` gives for each leaf the number of its column of ``owners`` (-1 without
    chunks), which says for each of its chunks which process wrote it. A directory that one process keeps for itself has
    ``local``, that process's index and their number, and its own table; other processes' chunks are `ABSENT`, its 0.
    """

    data: str
    created_s: float
    writer: dict[str, str]
    metadata: Any
    nodes: list[Any]
    keys: tuple[str, ...]
    specs: tuple[LeafSpec, ...]
    spec_index: np.ndarray[Any, Any]
    values: dict[int, Any]
    shardings: tuple[dict[str, Any], ...]
    directories: dict[int, str]
    packs: tuple[int, ...]
    chunks: ChunkTable
    objects: tuple[StoredObject, ...]
    metrics: dict[str, float] = dataclasses.field(default_factory=dict[str, float])
    parts: tuple[PartEntry, ...] = ()
    owners: tuple[np.ndarray[Any, Any], ...] = ()
    owner_index: np.ndarray[Any, Any] = dataclasses.field(default_factory=lambda: NO_OWNERS)
    local: tuple[int, int] | None = None
    programs: dict[str, ProgramEntry] = dataclasses.field(default_factory=dict[str, ProgramEntry])

    def spec(self, leaf: int) -> LeafSpec:
        """The spec of a leaf."""
        return self.specs[self.spec_numbers[leaf]]

    @functools.cached_property
    def spec_numbers(self) -> list[int]:
        """Number of the spec of each leaf: `spec_index` in a form that one leaf after the other is quick to look up."""
        return self.spec_index.tolist()

    @functools.cached_property
    def chunk_starts(self) -> np.ndarray[Any, Any]:
        """``int64[leaves + 1]``: row of the first chunk of each leaf, and of all chunks."""
        counts = np.array([spec.chunk_count for spec in self.specs], np.int64)
        starts = np.zeros(len(self.keys) + 1, np.int64)
        if len(self.keys):
            np.cumsum(counts[self.spec_index], out=starts[1:])
        return starts

    @functools.cached_property
    def nbytes(self) -> int:
        """Bytes of all arrays, without padding."""
        if not len(self.keys):
            return 0
        sizes = [spec.nbytes for spec in self.specs]
        counts = np.bincount(self.spec_index, minlength=len(sizes)).tolist()
        return sum(size * count for size, count in zip(sizes, counts, strict=True))

    def sharding_of(self, spec: LeafSpec) -> dict[str, Any] | None:
        """The sharding descriptor of a spec."""
        return None if spec.sharding is None else self.shardings[spec.sharding]

    @functools.cached_property
    def chunk_nbytes(self) -> np.ndarray[Any, Any]:
        """``int64[leaves]``: bytes of a chunk of each leaf, 0 for values."""
        sizes = [0 if spec.kind == "value" else spec.chunk_nbytes for spec in self.specs]
        return np.array(sizes, np.int64)[self.spec_index] if len(self.keys) else np.zeros(0, np.int64)

    def counts_of(self, process: int) -> np.ndarray[Any, Any]:
        """``int64[leaves]``: how many chunks of each leaf a process owns."""
        if not self.owners:
            return np.diff(self.chunk_starts)
        bounds = np.searchsorted(self._owned(process), self._owner_starts)
        return np.append(np.diff(bounds), 0)[self.owner_index]  # -1 is the last one

    def owned_in(self, column: int, process: int) -> np.ndarray[Any, Any]:
        """Places in a column of owners that are a process's, ascending."""
        owned = self._owned(process)
        first, last = np.searchsorted(owned, self._owner_starts[column : column + 2])
        return owned[first:last] - self._owner_starts[column]

    def _owned(self, process: int) -> np.ndarray[Any, Any]:
        """Places of a process in all columns of owners, one after the other."""
        order, starts = self._places_by_owner
        return order[starts[process] : starts[process + 1]]

    @functools.cached_property
    def _owner_starts(self) -> np.ndarray[Any, Any]:
        """``int64[columns + 1]``: where each column of owners begins, and where the last one ends."""
        return np.cumsum([0, *map(len, self.owners)])

    @functools.cached_property
    def _places_by_owner(self) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """All places, process by process, and where each process's begin: all parts can be read in linear time."""
        everyone = np.concatenate(self.owners)
        starts = np.zeros(PROCESSES_MAX + 2, np.int64)
        np.cumsum(np.bincount(everyone, minlength=PROCESSES_MAX + 1), out=starts[1:])
        return np.argsort(everyone, kind="stable"), starts

    def items_of(self, process: int) -> StoredObject | None:
        """The object that holds the items of a process, if there are any."""
        return self._find_object(f"{ITEMS_DIRECTORY}/{process}")

    def own_leaves_of(self, process: int) -> StoredObject | None:
        """The object that holds the values of leaves in which a process differs from process 0, if it does."""
        return self._find_object(f"{OWN_DIRECTORY}/{process}")

    def _find_object(self, name: str) -> StoredObject | None:
        path = f"{self.data}/{name}"
        return next((entry for entry in self.objects if entry.name == path), None)

    @property
    def program_bytes(self) -> int:
        """Bytes of all programs."""
        return sum({entry.name: entry.length for entry in self.programs.values()}.values())

    @property
    def items_bytes(self) -> int:
        """Bytes of the items of all processes."""
        start = f"{self.data}/{ITEMS_DIRECTORY}/"
        return sum(entry.length for entry in self.objects if entry.name.startswith(start))

    @property
    def stored_bytes(self) -> int:
        """Bytes of all objects but the manifest."""
        parts = sum(part.length + part.stored_bytes for part in self.parts)
        return int(self.chunks.length.sum()) + parts + sum(entry.length for entry in self.objects)

    @property
    def object_count(self) -> int:
        """Number of all objects but the manifest."""
        own = int(np.count_nonzero(self.chunks.pack == OWN_OBJECT)) + len(self.packs)
        return own + sum(1 + part.objects for part in self.parts) + len(self.objects)

    def chunk_index(self, leaf: int, chunk: int) -> tuple[int, ...]:
        """Place of a chunk in the chunk grid of its leaf."""
        row = chunk - int(self.chunk_starts[leaf])
        return tuple(int(axis) for axis in np.unravel_index(row, self.spec(leaf).grid))


NO_OWNERS = np.zeros(0, np.int32)
NO_CHUNKS = ChunkTable(np.zeros(0, np.int32), np.zeros(0, np.uint64), np.zeros(0, np.uint64), b"")


def local_directory(process: int) -> str:
    """Where a process keeps what it has, below the place that all of them name."""
    return f"process-{process}"


def check_directories(manifest: Manifest, chunks: ChunkTable, counts: np.ndarray[Any, Any]) -> None:
    """Leaves have a directory if they have objects of their own, and only then, or when they have no chunks.

    Raises:
      TableError: Some do not.
    """
    is_packed = chunks.pack != OWN_OBJECT
    is_named = np.zeros(len(counts), bool)
    is_named[list(manifest.directories)] = True
    is_named_row = np.repeat(is_named, counts)
    if np.any(is_named_row == is_packed):
        raise TableError("its directories are not those of its chunks")
