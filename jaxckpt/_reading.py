"""What does an open checkpoint show, and how are its leaves read as NumPy arrays?

`Checkpoint` is a manifest and the store that it came from. `StoredLeaf` describes one leaf, and reads it, or the part
of it that an index asks for, when it is indexed. Nothing here touches a device, so that a checkpoint of any size can be
looked into on a laptop.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import hashlib
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, final

import jax
import numpy as np

from ._calling import StoredProgram, check_entry, open_program, platforms_here
from ._config import BLOCK_BYTES, PIECE_BYTES, RestoreOptions
from ._dtypes import zarr_name
from ._encoding import MANIFEST_BYTES_MAX, parse_manifest
from ._errors import (
    CheckpointError,
    CorruptError,
    MismatchError,
    NotFoundError,
    Problem,
    UntrustedProgramError,
    list_problems,
    printable,
    printable_key,
)
from ._fetching import ReadExecutor
from ._indexing import read_indexed
from ._individual import decode_own_leaves
from ._items import decode_items
from ._keys import NONE_NODE, rebuild
from ._manifest import MANIFEST_NAME, LeafSpec, Manifest, StoredObject, local_directory
from ._matching import logical_shape
from ._parts import ChunkIndex
from ._processes import current_group
from ._resharding import Destination, plan_reads
from ._shardings import Box
from ._steps import CACHE_NAME
from ._storage import Hold, Store
from ._store import open_store
from ._values import decode_text, decode_value

# Comparing a key with so many others takes a tenth of a second.
_KEYS_COMPARED_MAX = 1000


if TYPE_CHECKING:
    from jaxckpt import Description, VerifyReport


def open_checkpoint(path: Any) -> Checkpoint:
    """Reads the manifest at a path or URL; see `jaxckpt.open`."""
    store = open_store(path)
    try:
        store, data, hold = _read_manifest(store)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise NotFoundError(
            f"no committed checkpoint at {store.path!r}: there is no {MANIFEST_NAME}\n{_advice_for(store)}"
        ) from error
    except OSError as error:
        raise CheckpointError(
            f"cannot read the checkpoint {store.path!r}: {MANIFEST_NAME}: {error.strerror or error}"
        ) from error
    try:
        manifest = parse_manifest(data, store.path)
        # The manifest's hold reaches other machines on NFS; that of the data survives an overwrite.
        holds = [each for each in (hold, store.hold_shared(manifest.data)) if each is not None]
        return Checkpoint(store, manifest, len(data), holds)
    except BaseException:
        if hold is not None:  # whoever keeps the exception keeps this frame
            hold.release()
        raise


def _advice_for(store: Store) -> str:
    """What to do where no manifest is."""
    with contextlib.suppress(OSError):
        if store.exists(CACHE_NAME):
            return "a manager keeps its steps there: CheckpointManager(path).open() opens the newest"
    return "check the path; a save that was interrupted leaves none"


@final
class Checkpoint:
    """A committed checkpoint, open for reading. `jaxckpt.open` makes these.

    What it holds: ``key in checkpoint``, `keys`, `shapes`, `dtypes`, ``print(checkpoint)``. ``checkpoint[key][...]`` is
    a leaf as NumPy array, ``checkpoint[key][10:20]`` a part of it. `jaxckpt.describe`, `jaxckpt.verify` and
    `jaxckpt.restore` take an open checkpoint as they take its path.

    As long as the object is there, no manager deletes the checkpoint, and no overwrite its data, on this machine and
    wherever the file system's locks reach.
    """

    def __init__(
        self, store: Store, manifest: Manifest, manifest_bytes: int, holds: Sequence[Hold] = ()
    ) -> None:
        self._store = store
        self._holds = holds
        self._manifest = manifest
        # Not a method: a cycle would keep the holds until the garbage is collected.
        self._index = ChunkIndex(manifest, functools.partial(_read_part, store, manifest))
        self._bytes_read = manifest_bytes

    @functools.cached_property
    def _leaf_of_key(self) -> dict[str, int]:
        return {key: number for number, key in enumerate(self._manifest.keys)}

    def release(self) -> None:
        """Lets managers delete the checkpoint although the object is there still."""
        for hold in self._holds:
            hold.release()

    @property
    def path(self) -> str:
        """Where it is."""
        return self._store.path

    @property
    def metadata(self) -> Any:
        """What was given as ``metadata=``."""
        return self._manifest.metadata

    @property
    def metrics(self) -> dict[str, float]:
        """What was given as ``metrics=`` to a manager."""
        return dict(self._manifest.metrics)

    @functools.cached_property
    def items(self) -> dict[str, Any]:
        """What was given as ``items=`` by this process, read and verified; of objects, their state.

        Raises:
          CorruptError: The items are damaged.
        """
        return self.items_of(_process_index())

    def items_of(self, process: int) -> dict[str, Any]:
        """What a process gave as ``items=``; the same as process 0 unless it gave something else.

        Raises:
          CorruptError: The items are damaged.
        """
        entry = self._manifest.items_of(process) or self._manifest.items_of(0)
        return {} if entry is None else decode_items(self.read_object(entry), self.path)

    @property
    def programs(self) -> tuple[str, ...]:
        """Names of what was given as ``programs=``."""
        return tuple(self._manifest.programs)

    def program(self, name: str, *, trust: bool = False, bind: bool = True, **keywords: Any) -> StoredProgram:
        """Opens a stored program, which needs nothing of the code that it was made from.

        Args:
          name: One of `programs`.
          trust: Whether its code may run. A program can do whatever the process can; say True to programs of people
            whom you would let run code on this machine.
          bind: Whether the leaves that it uses are restored and bound to it: it is called as ``program(*inputs)`` then,
            else as ``program(tree, *inputs)``.
          **keywords: ``mesh=``, ``sharding=`` and ``options=`` of `jaxckpt.restore`, for the leaves to bind.

        Raises:
          KeyError: There is no such program.
          UntrustedProgramError: ``trust`` is not True.
          MissingDependencyError: The package ``flatbuffers`` is not installed.
          FormatError: It was exported by a JAX that is too new or too old for this one, or is no program.
          CorruptError: Its bytes are damaged.
          MismatchError: It is for other platforms, or for more devices; or there are no values to bind.

        Collective: with ``bind``, as `jaxckpt.restore`.

        Example:
          >>> double = jaxckpt.Program(lambda tree: tree["w"] * 2)
          >>> _ = jaxckpt.save(tmp / "a", {"w": jnp.arange(3)}, programs={"double": double})
          >>> jaxckpt.open(tmp / "a").program("double", trust=True)()
          Array([0, 2, 4], dtype=int32)
        """
        entry = self._manifest.programs.get(name)
        if entry is None:
            known = ", ".join(map(repr, self.programs)) or "none"
            raise KeyError(f"{name!r} is no program of {self.path!r}; it has {known}")
        if trust is not True:
            raise UntrustedProgramError(
                f"the program {name!r} of {self.path!r} is code, and can do whatever this process can\n"
                "pass trust=True if you would let those who wrote it run code here; restoring values never runs it"
            )
        check_entry(
            name,
            entry,
            jax_version=jax.__version__,
            platforms=platforms_here(),
            device_count=jax.device_count(),
        )
        program = open_program(name, entry, self.read_program(name), self.path)
        if not bind:
            return program
        if not program.arguments:
            return program.bind({})
        self.check_values()
        # A verb that stands above this module, by its public name; so below.
        import jaxckpt

        return program.bind(jaxckpt.restore(self, select=set(program.arguments).__contains__, **keywords))

    def check_values(self) -> None:
        """For tools: refuses a checkpoint of programs alone.

        Raises:
          MismatchError: It is one.
        """
        if self._manifest.programs and self._manifest.nodes == [NONE_NODE]:
            raise MismatchError(
                f"{self.path!r} holds programs and no values\n"
                "open(path).program(name, trust=True, bind=False).bind(tree) runs one on values from elsewhere"
            )

    def read_program(self, name: str) -> bytes:
        """The bytes of a program, verified; they are not opened.

        Raises:
          CorruptError: They are damaged.
        """
        entry = self._manifest.programs[name]
        stored = next(each for each in self._manifest.objects if each.name == entry.name)
        problems: Sequence[Problem]
        try:
            data = self.read_object(stored)
        except CorruptError as error:
            problems = error.problems
        else:
            if hashlib.sha256(data).digest() == entry.sha256:
                return data
            problems = [Problem(None, "checksum", f"{entry.name}: its sha256 is not that of the manifest")]
        advice = ["the values can be restored without it; save it again, or take it from another checkpoint"]
        headline = f"the program {name!r} of {self.path!r} is damaged"
        raise CorruptError(list_problems(headline, problems, advice), problems)

    def describe(self) -> Description:
        """What is in it: `jaxckpt.describe` of it."""
        import jaxckpt

        return jaxckpt.describe(self)

    def verify(self) -> VerifyReport:
        """Rereads every object and compares checksums: `jaxckpt.verify` of it."""
        import jaxckpt

        return jaxckpt.verify(self)

    def own_leaves_of(self, process: int) -> dict[int, Any]:
        """For tools: the leaves in which a process had another value than process 0, by number; see `_individual`.

        Raises:
          CorruptError: They are damaged.
        """
        entry = self._manifest.own_leaves_of(process)
        return {} if entry is None else decode_own_leaves(self.read_object(entry), self._manifest, entry.name)

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
        return self._bytes_read + self._index.bytes_read

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
        return len(self._manifest.keys)

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __getitem__(self, key: str) -> StoredLeaf:
        if key not in self._leaf_of_key:
            raise KeyError(f"{key!r} is not in {self.path!r}, which has {len(self)} leaves{self._hint(key)}")
        return StoredLeaf(self, self._leaf_of_key[key])

    def _hint(self, key: object) -> str:
        """Keys that are much like one that is not there."""
        if not isinstance(key, str):
            return ""
        close = difflib.get_close_matches(key, self.keys()[:_KEYS_COMPARED_MAX])
        return f"; did you mean {' or '.join(map(repr, close))}?" if close else ""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each leaf by key; see `StoredLeaf.shape`."""
        return {key: self[key].shape for key in self.keys()}

    def dtypes(self) -> dict[str, Any]:
        """Type of each leaf's elements by key; see `StoredLeaf.dtype`."""
        return {key: self[key].dtype for key in self.keys()}

    def __str__(self) -> str:
        """The leaves, one a line: key, dtype and shape. `jaxckpt.describe` says more."""
        lines = [f"{self.path}: {len(self)} leaves, {self.nbytes} bytes"]
        for key in self.keys():
            leaf = self[key]
            dtype = f"key<{leaf.spec.impl}>" if leaf.kind == "key" else leaf.dtype
            lines.append(f"  {printable_key(key)} ({printable(str(dtype))}) {list(leaf.shape)}")
        return "\n".join(lines)

    def tree(self) -> Any:
        """The tree of the checkpoint with a `StoredLeaf` for each leaf; nothing is read.

        It shows shapes and dtypes, and can be edited and given as ``like=`` to `restore`, where a `StoredLeaf`
        stands for the leaf as it was saved.
        """
        return rebuild(self._manifest.nodes, [StoredLeaf(self, leaf) for leaf in range(len(self))])

    @property
    def index(self) -> ChunkIndex:
        """Where the chunks lie, for tools."""
        return self._index

    def read_object(self, entry: StoredObject) -> bytes:
        """A metadata object, verified.

        Raises:
          CorruptError: It is damaged.
        """
        data = _read_object(self._store, self._manifest, entry)
        self._bytes_read += len(data)
        return data

    def count_read(self, nbytes: int) -> None:
        """Adds to `bytes_read`."""
        self._bytes_read += nbytes

    def read_boxes(self, leaf: int, boxes: Sequence[Box]) -> list[Destination]:
        """Reads and verifies boxes of the stored form of a leaf."""
        plan = plan_reads(self._index, [(leaf, boxes)], PIECE_BYTES)
        executor = ReadExecutor(self._store, self._manifest, threads=RestoreOptions().io_threads)
        executor.check_objects(plan)
        key = self._manifest.keys[leaf]
        executor.raise_problems(f"read {key!r} of {self.path!r}")
        executor.read(plan)
        self._bytes_read += executor.bytes_read
        executor.raise_problems(f"read {key!r} of {self.path!r}")
        return list(plan.destinations)


def _read_manifest(store: Store) -> tuple[Store, bytes, Hold | None]:
    """The bytes of the manifest here, or of the one that this process keeps for itself; and where it is."""
    try:
        return store, *store.read_and_hold(MANIFEST_NAME, MANIFEST_BYTES_MAX)
    except (FileNotFoundError, NotADirectoryError):
        own = store.child(local_directory(_process_index()))
        try:
            return own, *own.read_and_hold(MANIFEST_NAME, MANIFEST_BYTES_MAX)
        except (FileNotFoundError, NotADirectoryError):
            pass
        raise


def _process_index() -> int:
    group = current_group()
    return 0 if group is None else group.index


def _read_part(store: Store, manifest: Manifest, process: int) -> bytes:
    part = manifest.parts[process]
    return _read_object(store, manifest, StoredObject(part.name, part.length, part.checksum))


def _read_object(store: Store, manifest: Manifest, entry: StoredObject) -> bytes:
    executor = ReadExecutor(store, manifest, threads=1)
    data = executor.read_metadata(entry)
    executor.raise_problems(f"read {store.path!r}")
    assert data is not None
    return data


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
            return self._read_index(index)
        value = self._read_value()
        is_whole: bool = index is Ellipsis or (isinstance(index, tuple) and not index)
        if is_whole:
            return value
        if type(value) not in (str, bytes):
            raise IndexError(f"{self.key!r} is a scalar; only [...] and [()] index it")
        return value[index]

    def _read_value(self) -> Any:
        """The Python or NumPy scalar, or the long string."""
        if self._spec.kind == "value":
            return decode_value(self.value_record)
        data = self.read_box(((0,), self._spec.shape)).tobytes()
        return data if self._spec.kind == "bytes" else decode_text(data)

    def read_box(self, box: Box) -> np.ndarray[Any, Any]:
        """A box of the array (of the key data, for PRNG keys), verified."""
        return self._read_boxes([box])[0]

    def _read_boxes(self, boxes: Sequence[Box]) -> list[np.ndarray[Any, Any]]:
        spec = self._spec
        tail = spec.stored_shape[len(spec.shape) :]
        zeros = (0,) * len(tail)
        destinations = self._checkpoint.read_boxes(self._leaf, [(lo + zeros, hi + tail) for lo, hi in boxes])
        arrays = []
        for destination, (lo, hi) in zip(destinations, boxes, strict=True):
            sizes = tuple(stop - start for start, stop in zip(lo, hi, strict=True))
            if destination.buffer is None or destination.nbytes == 0:
                arrays.append(np.ndarray(sizes, spec.np_dtype))
            else:
                arrays.append(destination.buffer.view(spec.np_dtype).reshape(sizes))
        return arrays

    def _read_index(self, index: Any) -> Any:
        """What basic indexing of the array gives; steps that pass over whole blocks do not read them."""
        spec = self._spec

        def is_split(axis: int, step: int) -> bool:
            row_bytes = math.prod(spec.chunk_shape[axis + 1 :]) * spec.stored_itemsize
            return step > max(1, min(spec.chunk_shape[axis], BLOCK_BYTES // row_bytes))

        return read_indexed(index, spec.shape, spec.np_dtype, is_split, self._read_boxes)

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
        places = [self._checkpoint.index.place(self._leaf, chunk) for chunk in range(int(first), int(last))]
        cut = repr((self._spec.chunk_shape, [place.length for place in places])).encode()
        return cut + b"".join(place.table.fingerprint(place.row) for place in places)
