"""How is an array that lies in chunks read in boxes, by TensorStore?

A `KeyValues` is where the chunks of many arrays are: the files of a directory, the objects below a URL, or an OCDBT
database in either. A `ChunkedArray` is one Zarr array (v2 or v3) in it.

1. Boxes are read into memory that was there before, in parts along the borders of the chunks. A `_Budget` lets all
   readers together have no more than `_DECODED_BYTES_MAX` of chunks under way, or one. Boxes that are read together
   share chunks.
2. The bytes of an array in C order come from a slab of rows that whole chunks fill; a slab that is large waits in a
   file without a name, so that no chunk is decoded twice and memory stays bounded.

What an array says of itself was checked before (`_zarrforms`). Neither format has a checksum for its values: what zstd,
the CRC-32C of an index or a length does not tell stays unseen. A chunk that is not there is an error, unless whoever
wrote the array left out chunks of zeros.

Source: https://zarr-specs.readthedocs.io, https://google.github.io/tensorstore/kvstore/ocdbt
"""

from __future__ import annotations

import collections
import contextlib
import functools
import json
import math
import mmap
import os
import re
import tempfile
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, final

import numpy as np

from jaxckpt._buckets import describe_url, memory_context
from jaxckpt._config import MIB, PIECE_BYTES
from jaxckpt._errors import CheckpointError, WriteError
from jaxckpt._shardings import Box
from jaxckpt._storage import Buffer, allocate_aligned

from ._files import corrupt
from ._zarrforms import ZarrForm

# Of chunks that are read and decoded at once, beside the boxes themselves, unless somebody wants less.
_DECODED_BYTES_MAX = 512 * MIB
# Of chunks that are asked for together: enough for all processors, and little enough for several readers.
_PART_BYTES_MAX = 32 * MIB
# A slab up to this size stays in memory.
_SLAB_BYTES_MAX = 64 * MIB
# Before memory for so much is taken, the last chunk must be there.
_UNSEEN_BYTES_MAX = 256 * MIB

_NODE_CACHE_BYTES = 64 * MIB

# Of TensorStore's errors, those that do not say that something is damaged.
_STORAGE_CODES = frozenset(
    "PERMISSION_DENIED UNAUTHENTICATED UNAVAILABLE DEADLINE_EXCEEDED ABORTED RESOURCE_EXHAUSTED CANCELLED "
    "UNIMPLEMENTED".split()
)


@functools.lru_cache(maxsize=16)
def _context(resources: str, is_in_memory: bool) -> Any:
    """What all arrays of a place share: no cache but for the nodes of databases."""
    import tensorstore as ts

    context = {
        **json.loads(resources),
        "cache_pool": {"total_bytes_limit": 0},
        "cache_pool#nodes": {"total_bytes_limit": _NODE_CACHE_BYTES},
    }
    return ts.Context(context, parent=memory_context()) if is_in_memory else ts.Context(context)


@final
class _Budget:
    """Memory that readers take together; who waits for some has none.

    Attributes:
      nbytes_max: How much all of them may have, unless one alone needs more.
    """

    def __init__(self, nbytes_max: int) -> None:
        self.nbytes_max = nbytes_max
        self._nbytes = 0
        self._changed = threading.Condition()

    def take(self, nbytes: int, *, waiting: bool) -> bool:
        """Takes some, all that there is if it is not enough for anybody; says whether it did."""
        with self._changed:
            while self._nbytes and self._nbytes + nbytes > self.nbytes_max:
                if not waiting:
                    return False
                self._changed.wait()
            self._nbytes += nbytes
            return True

    def give_back(self, nbytes: int) -> None:
        with self._changed:
            self._nbytes -= nbytes
            self._changed.notify_all()


@final
class KeyValues:
    """Where the chunks of arrays are: below a directory or URL, or in the OCDBT database there.

    Args:
      path: Absolute path or URL.
      is_ocdbt: Whether it is a database.

    Raises:
      CorruptError: The database is damaged.
      CheckpointError: The place cannot be reached.
    """

    def __init__(self, path: str, *, is_ocdbt: bool) -> None:
        import tensorstore as ts

        self.path = path
        self.budget = _Budget(_DECODED_BYTES_MAX)
        self._base: dict[str, Any] = {"driver": "file", "path": f"{path}/"}
        resources: dict[str, Any] = {}
        if "://" in path:
            self._base, resources = describe_url(path)
        self.context = _context(json.dumps(resources), path.startswith("memory://"))
        with _plain_errors(path, None):
            if is_ocdbt:
                self._base = {"driver": "ocdbt", "base": self._base, "cache_pool": "cache_pool#nodes"}
            self._store = ts.KvStore.open(self._base, context=self.context).result()

    def bound_memory(self, nbytes_max: int) -> None:
        """Lets chunks that are read and decoded at once have so many bytes, or one alone more."""
        self.budget.nbytes_max = min(_DECODED_BYTES_MAX, nbytes_max)

    def read_each(self, keys: Sequence[str]) -> list[bytes | None]:
        """Small values, asked for together; None for those that are not there.

        Raises:
          CorruptError: The database is damaged.
          CheckpointError: Storage did not give them.
        """
        reads = [self._store.read(key) for key in keys]
        found: list[bytes | None] = []
        for key, read in zip(keys, reads, strict=True):
            with _plain_errors(f"{self.path}/{key}", None):
                result = read.result()
            found.append(bytes(result.value) if result.state == "value" else None)
        return found

    def has(self, key: str) -> bool:
        """Whether there is a value with a key; it is not read."""
        import tensorstore as ts

        with _plain_errors(f"{self.path}/{key}", None):
            return bool(self._store.list(ts.KvStore.KeyRange(key, f"{key}\0")).result())

    def spec_of(self, prefix: str) -> dict[str, Any]:
        """How TensorStore is told of what lies below a prefix."""
        return {**self._base, "path": f"{self._base.get('path', '')}{prefix}"}


@final
class ChunkedArray:
    """A Zarr array, open for reading from any thread.

    Args:
      place: Where it is.
      prefix: What its keys begin with.
      form: What it says of itself.
      key: Its name, for messages.
      may_lack_chunks: Whether a chunk that is not there stands for zeros.
      count: Is told how many bytes of chunks were decoded.
    """

    def __init__(
        self,
        place: KeyValues,
        prefix: str,
        form: ZarrForm,
        key: str,
        count: Callable[[int], None],
        *,
        may_lack_chunks: bool,
    ) -> None:
        self.form = form
        self.place = place
        self._prefix = prefix
        self._key = key
        self._count = count
        self._may_lack_chunks = may_lack_chunks
        self._where = f"{place.path}/{prefix}".rstrip("/")

    @functools.cached_property
    def _array(self) -> Any:
        """TensorStore's own; nothing is read for it."""
        import tensorstore as ts

        spec = {
            "driver": self.form.driver,
            "kvstore": self.place.spec_of(self._prefix),
            "metadata": dict(self.form.document),
            "fill_missing_data_reads": self._may_lack_chunks,
            "recheck_cached_data": False,
        }
        with _plain_errors(self._where, self._key):
            return ts.open(spec, open=True, assume_metadata=True, context=self.place.context).result()

    def read_boxes(self, boxes: Sequence[Box]) -> list[np.ndarray[Any, Any]]:
        """Boxes of the array, C-contiguous, each in memory of its own; a chunk that several need is read once.

        Raises:
          CorruptError: A chunk is damaged or missing.
          CheckpointError: Storage did not give it, or the memory is not there.
        """
        dtype = self.form.dtype
        sizes = [tuple(stop - start for start, stop in zip(*box, strict=True)) for box in boxes]
        nbytes = sum(map(math.prod, sizes)) * dtype.itemsize
        if nbytes > _UNSEEN_BYTES_MAX:
            self._check_whole()
        try:
            arrays = [
                allocate_aligned(math.prod(size) * dtype.itemsize).view(dtype).reshape(size) for size in sizes
            ]
        except (OSError, MemoryError, ValueError) as error:
            raise CheckpointError(
                f"{self._where}: there is no memory for {nbytes} bytes of an array of {dtype} "
                f"and the shape {self.form.shape}; read parts of it"
            ) from error
        self.read_into(boxes, arrays)
        return arrays

    def read_into(self, boxes: Sequence[Box], arrays: Sequence[np.ndarray[Any, Any]]) -> None:
        """As `read_boxes`, into arrays of the sizes of the boxes."""
        import tensorstore as ts

        wanted = [
            (box, array, ts.array(array)) for box, array in zip(boxes, arrays, strict=True) if array.size
        ]
        if not wanted:
            return
        axes = range(len(self.form.shape))
        around = (
            tuple(min(box[0][axis] for box, _, _ in wanted) for axis in axes),
            tuple(max(box[1][axis] for box, _, _ in wanted) for axis in axes),
        )
        budget = self.place.budget
        under_way: collections.deque[tuple[int, list[Any]]] = collections.deque()
        try:
            for part in split_along_chunks(around, self.form.chunk_shape, self.form.dtype.itemsize):
                shares = [(_intersection(box, part), box, target) for box, _, target in wanted]
                nbytes = _covered_elements(part, self.form.chunk_shape) * self.form.dtype.itemsize
                if not any(shared for shared, _, _ in shares):
                    continue
                while not budget.take(nbytes, waiting=not under_way):
                    self._finish(*under_way.popleft())
                reads: list[Any] = []
                under_way.append((nbytes, reads))
                for shared, box, target in shares:
                    if shared is not None:
                        reads.append(self._begin(shared, box, target))
                self._count(nbytes)
        finally:
            with contextlib.ExitStack() as closing:  # calls all of them, whichever raises
                for part_under_way in under_way:
                    closing.callback(self._finish, *part_under_way)

    def _begin(self, shared: Box, box: Box, target: Any) -> Any:
        """Begins to read what a part and a box share."""
        there = tuple(slice(lo - start, hi - start) for lo, hi, start in zip(*shared, box[0], strict=True))
        return target[there].write(self._array[tuple(map(slice, *shared))])

    def _finish(self, nbytes: int, reads: Sequence[Any]) -> None:
        """Waits for the reads of a part."""
        try:
            with _plain_errors(self._where, self._key):
                for read in reads:
                    read.result()
        finally:
            self.place.budget.give_back(nbytes)

    def _check_whole(self) -> None:
        """Raises CorruptError where the shape is not that of what was written; before memory for it is taken."""
        if not self._may_lack_chunks and not self.place.has(f"{self._prefix}{self.form.last_chunk}"):
            message = f"has no chunk {self.form.last_chunk!r}, and the shape {self.form.shape} says that there is one"
            raise corrupt(self._where, "missing", message, self._key)


def split_along_chunks(box: Box, chunk_shape: tuple[int, ...], itemsize: int) -> Iterator[Box]:
    """Parts of a box, in C order, of which each needs chunks of at most `_PART_BYTES_MAX` bytes, or a single chunk."""
    lo, hi = box
    counts = [
        -(-stop // chunk) - start // chunk for start, stop, chunk in zip(lo, hi, chunk_shape, strict=True)
    ]
    nbytes = math.prod(counts) * math.prod(chunk_shape) * itemsize
    axis = next((axis for axis, count in enumerate(counts) if count > 1), None)
    if nbytes <= _PART_BYTES_MAX or axis is None:
        yield box
        return
    # As many chunks along this axis as fit; if not even one does, its row of chunks is split along the next axis.
    rows = max(1, _PART_BYTES_MAX * counts[axis] // nbytes)
    start = lo[axis]
    while start < hi[axis]:
        stop = min((start // chunk_shape[axis] + rows) * chunk_shape[axis], hi[axis])
        part = (*lo[:axis], start, *lo[axis + 1 :]), (*hi[:axis], stop, *hi[axis + 1 :])
        yield from split_along_chunks(part, chunk_shape, itemsize)
        start = stop


def _covered_elements(box: Box, chunk_shape: tuple[int, ...]) -> int:
    """Elements of all chunks that a box touches."""
    return math.prod(
        (-(-stop // chunk) - start // chunk) * chunk
        for start, stop, chunk in zip(*box, chunk_shape, strict=True)
    )


def _intersection(one: Box, other: Box) -> Box | None:
    lo = tuple(map(max, one[0], other[0]))
    hi = tuple(map(min, one[1], other[1]))
    return (lo, hi) if all(start < stop for start, stop in zip(lo, hi, strict=True)) else None


# --- bytes in C order -----------------------------------------------------------------------------------------


@final
class RowStream:
    """The bytes of a chunked array in C order; for one thread, forward."""

    def __init__(self, array: ChunkedArray) -> None:
        self._array = array
        shape, chunk_shape = array.form.shape or (1,), array.form.chunk_shape or (1,)
        self._row_bytes = math.prod(shape[1:]) * array.form.dtype.itemsize
        # Rows of whole chunks, as many as make up a piece.
        chunk_rows_bytes = chunk_shape[0] * max(self._row_bytes, 1)
        self._rows = chunk_shape[0] * max(1, PIECE_BYTES // chunk_rows_bytes)
        self._first_row = 0
        self._slab: Buffer = np.empty(0, np.uint8)

    def read(self, lo: int, hi: int) -> Buffer:
        """Bytes ``[lo, hi)``.

        Raises:
          CorruptError: They are damaged.
        """
        found = np.empty(hi - lo, np.uint8)
        at = lo
        while at < hi:
            start = self._first_row * self._row_bytes
            if not start <= at < start + len(self._slab):
                self._load(at // self._row_bytes // self._rows * self._rows)
                continue
            end = min(hi, start + len(self._slab))
            found[at - lo : end - lo] = self._slab[at - start : end - start]
            at = end
        return found

    def _load(self, first_row: int) -> None:
        form = self._array.form
        shape = form.shape or (1,)
        rows = min(self._rows, shape[0] - first_row)
        self._slab = np.empty(0, np.uint8)  # goes before the next one comes
        slab = _allocate_slab(rows * self._row_bytes)
        elements = slab.view(form.dtype)
        if form.shape:
            tail = form.shape[1:]
            box = (first_row, *[0] * len(tail)), (first_row + rows, *tail)
            self._array.read_into([box], [elements.reshape(rows, *tail)])
        else:
            self._array.read_into([((), ())], [elements.reshape(())])
        self._first_row, self._slab = first_row, slab


def _allocate_slab(nbytes: int) -> Buffer:
    """Memory for a slab, behind which there is a file without a name if it is large.

    Raises:
      WriteError: There is no room for the file.
    """
    if nbytes <= _SLAB_BYTES_MAX:
        return np.empty(nbytes, np.uint8)
    try:
        with tempfile.TemporaryFile() as file:
            # A page that finds no room later would end the process.
            os.posix_fallocate(file.fileno(), 0, nbytes)
            return np.frombuffer(mmap.mmap(file.fileno(), nbytes), np.uint8)
    except OSError as error:
        raise WriteError(
            f"{tempfile.gettempdir()!r} has no room for {nbytes} bytes, the rows of an array that one row of its "
            f"chunks holds ({error.strerror or error}); TMPDIR names another directory"
        ) from error


# --- errors ---------------------------------------------------------------------------------------------------

_CODE = re.compile(r"([A-Z_]+): ")
# What TensorStore tells its developers.
_PAYLOAD = re.compile(r" \[(?:tensorstore_spec|source locations|os_error_code)=.*", re.DOTALL)


@contextlib.contextmanager
def _plain_errors(where: str, key: str | None) -> Generator[None]:
    """TensorStore's errors are ValueError, or NotImplementedError for a 501; their text begins with a code."""
    try:
        yield
    except (ValueError, NotImplementedError) as error:
        text = str(error)
        match = _CODE.match(text)
        code = match[1] if match else "INVALID_ARGUMENT"
        reason = _PAYLOAD.sub("", text)[:500]
        if code in _STORAGE_CODES:
            raise CheckpointError(f"{where}: storage did not give it: {reason}") from error
        kind = {"NOT_FOUND": "missing", "DATA_LOSS": "checksum"}.get(code, "unreadable")
        raise corrupt(where, kind, f"cannot be read: {reason}", key) from error
