"""How are planned reads carried out and verified?

`ReadExecutor` reads the units of a plan in a few threads. Three ways, the cheapest that fits: a run of blocks that is
also a contiguous range of one destination is read in place; a packed chunk that is a whole destination keeps the memory
that it was read into; everything else goes through a small buffer and is copied box by box. For leaves that are to be
mapped, the memory of the first two ways shows the object instead of being read into.

Every block is verified as soon as it is read, before anything else looks at it. All damage is collected, then raised as
one `CorruptError`: no wrong byte is ever returned, except of what is mapped, which is not verified. Deliberately not
here: devices (`_placement`).
"""

from __future__ import annotations

import concurrent.futures
import errno
import math
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any, TypeVar, final

import numpy as np
import xxhash

from ._config import BLOCK_BYTES
from ._errors import UNREADABLE, CheckpointError, CorruptError, Problem, list_problems
from ._layout import flat_boxes, intersect
from ._manifest import Manifest, StoredObject
from ._parts import box_of_chunk
from ._progress import ProgressMeter
from ._resharding import SHARED_ALLOCATION_BYTES, Destination, Part, ReadPlan, Unit, minus
from ._shardings import Box
from ._storage import Buffer, Store, allocate_aligned, processor_count
from ._tables import PIECE_ALIGNMENT

# The unsigned type of each element size, to move elements without looking at them.
_MOVABLE = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64, 16: np.complex128}

_ALIGNMENT = 64

T = TypeVar("T")

# Of so many units it is asked whether they are in memory, as a sample of all.
_UNITS_ASKED_ABOUT = 4
# Less than this is read in the time that mapping it takes.
_MAPPED_BYTES_MIN = 256 << 10
# A process may have 65,530 mappings on Linux, and has other uses for them.
_MAPPED_UNITS_MAX = 16_384


@final
class ReadExecutor:
    """Reads and verifies; counts the bytes it asked storage for.

    Args:
      store: Where from.
      manifest: What is stored there.
      threads: How many read at a time.
      meter: Is told of bytes read.
    """

    def __init__(
        self, store: Store, manifest: Manifest, *, threads: int, meter: ProgressMeter | None = None
    ) -> None:
        self._store = store
        self._manifest = manifest
        self._threads = threads
        self._meter = meter
        self._lock = threading.Lock()
        self._problems: list[Problem] = []
        self._scratch = threading.local()
        self._mapped_units = 0
        self.bytes_read = 0
        self.mapped_leaves: set[int] = set()

    @property
    def problems(self) -> list[Problem]:
        """What was found to be wrong so far, by key and place."""
        return sorted(self._problems, key=lambda problem: (problem.key or "", problem.message))

    def check_objects(self, plan: ReadPlan) -> None:
        """Finds missing objects and objects of a wrong length, before any memory is taken for the arrays."""

        def check(item: tuple[str, int]) -> None:
            name, length = item
            try:
                if not self._store.has_length(name, length):
                    self._report_object(
                        plan, name, "length", f"does not have the {length} bytes that it was written with"
                    )
            except OSError as error:
                self._report_object(plan, name, _kind_of(error), _describe_os_error(error))

        self._run(list(plan.object_lengths.items()), check, self._small_threads)

    def check_metadata(self, entries: Iterable[StoredObject]) -> None:
        """Verifies metadata objects."""
        self._run(list(entries), self.read_metadata, self._small_threads)

    def read_metadata(self, entry: StoredObject) -> bytes | None:
        """A metadata object, verified; None when something is wrong with it."""
        try:
            data = self._store.read(entry.name, entry.length)
        except OSError as error:
            self._report(None, _kind_of(error), f"object {entry.name}: {_describe_os_error(error)}")
            return None
        self._count(len(data))
        if len(data) != entry.length:
            message = f"object {entry.name}: does not have the {entry.length} bytes that it was written with"
            self._report(None, "length", message)
            return None
        if xxhash.xxh3_128_digest(data) != entry.checksum:
            self._report(None, "checksum", f"object {entry.name}: its checksum differs")
            return None
        return data

    def read(self, plan: ReadPlan, mapped: Collection[int] = ()) -> None:
        """Fills the destinations of a plan. Damage is collected; see `raise_problems`.

        Args:
          plan: What to read.
          mapped: Leaves whose memory may show the objects themselves, unread and unverified; `mapped_leaves` says of
            which it does.
        """
        self._allocate(plan)
        units = plan.units
        if mapped:
            units = [unit for unit in units if not self._map_unit(unit, mapped)]
        self._run(units, self._read_unit, self._useful_threads(units))

    def verify(self, plan: ReadPlan) -> None:
        """Reads and verifies without filling destinations."""
        self._run(plan.units, self._verify_unit, self._useful_threads(plan.units))

    def raise_problems(self, doing: str) -> None:
        """Raises if anything was found.

        Args:
          doing: What failed, such as ``"restore 'run/step_3'"``.

        Raises:
          CorruptError: Something is damaged.
          CheckpointError: Storage did not give something, which may be whole.
        """
        if self._problems:
            problems = self.problems
            if all(problem.kind == UNREADABLE for problem in problems):
                headline = f"cannot {doing}: storage did not give {len(problems)} of its parts"
                advice = [
                    "nothing was returned; the checkpoint may be whole: mend the storage, then try again"
                ]
                raise CheckpointError(list_problems(headline, problems, advice), problems)
            headline = f"cannot {doing}: stored data is damaged in {len(problems)} places"
            advice = ["nothing was returned; use another checkpoint, or select= the leaves that are whole"]
            raise CorruptError(list_problems(headline, problems, advice), problems)

    def _run(self, each: Sequence[T], work: Callable[[T], object], threads: int) -> None:
        if len(each) <= 1 or threads == 1:
            for one in each:
                work(one)
            return
        with concurrent.futures.ThreadPoolExecutor(threads, "jaxckpt-read") as executor:
            for _ in executor.map(work, each):
                pass

    @property
    def _small_threads(self) -> int:
        """For what takes a file system microseconds, and an object store a request."""
        return self._threads if self._store.is_remote else 1

    def _useful_threads(self, units: Sequence[Unit]) -> int:
        """As many as are allowed; of what is in memory, as many as there are processors: more are a third slower."""
        processors = processor_count()
        if self._threads <= processors:
            return self._threads
        samples = units[:: max(len(units) // _UNITS_ASKED_ABOUT, 1)]
        try:
            is_in_memory = all(
                self._store.is_in_memory(each.object, each.offset, each.length) for each in samples
            )
        except OSError:
            return self._threads  # reading finds out the same, and reports it
        return processors if is_in_memory else self._threads

    def _allocate(self, plan: ReadPlan) -> None:
        """Takes memory for the destinations that are not packed chunks read in one go."""
        # As far behind a page as the object is, for O_DIRECT and memory maps, where JAX can alias that.
        offsets: dict[int, int] = {}
        for unit in plan.units:
            if unit.in_place is not None and (unit.offset - unit.in_place[1]) % _ALIGNMENT == 0:
                offsets[id(unit.in_place[0])] = unit.offset - unit.in_place[1]
        shared = np.empty(0, np.uint8)
        for destination in plan.destinations:
            if destination.is_chunk or destination.buffer is not None:
                continue
            if destination.nbytes >= SHARED_ALLOCATION_BYTES:
                destination.buffer = allocate_aligned(destination.nbytes, offsets.get(id(destination), 0))
                continue
            if len(shared) < destination.nbytes:
                shared = allocate_aligned(SHARED_ALLOCATION_BYTES)
            destination.buffer = shared[: destination.nbytes]
            shared = shared[-(-destination.nbytes // _ALIGNMENT) * _ALIGNMENT :]

    def _read_unit(self, unit: Unit) -> None:
        is_kept = unit.in_place is not None or any(part.first.is_chunk for part in unit.parts)
        buffer = _kept_buffer(unit) if is_kept else self._scratch_buffer(unit)
        for part in self._whole_parts(unit, buffer):
            if part.first.is_chunk:
                _keep(part, buffer)
            elif unit.in_place is None:
                self._scatter(part, buffer)

    def _map_unit(self, unit: Unit, leaves: Collection[int]) -> bool:
        """Lets the destinations show the object; False where only a copy will do."""
        is_kept = unit.in_place is not None or all(part.first.is_chunk for part in unit.parts)
        if (
            not is_kept
            or unit.length < _MAPPED_BYTES_MIN
            or self._mapped_units == _MAPPED_UNITS_MAX
            or any(part.leaf not in leaves for part in unit.parts)
        ):
            return False
        buffer = _kept_buffer(unit)
        try:
            if not self._store.map_into(unit.object, unit.offset, buffer):
                return False
        except OSError:
            return False  # reading finds out the same, and reports it
        self._mapped_units += 1
        for part in unit.parts:
            self.mapped_leaves.add(part.leaf)
            if part.first.is_chunk:
                _keep(part, buffer)
        return True

    def _verify_unit(self, unit: Unit) -> None:
        for _ in self._whole_parts(unit, self._scratch_buffer(unit)):
            pass

    def _scratch_buffer(self, unit: Unit) -> Buffer:
        """Memory of the calling thread, reused from unit to unit; as far behind a page as the unit in its object."""
        lead = unit.offset % PIECE_ALIGNMENT
        held: Buffer | None = getattr(self._scratch, "buffer", None)
        if held is None or len(held) < lead + unit.length:
            held = allocate_aligned(max(lead + unit.length, BLOCK_BYTES))
            self._scratch.buffer = held
        return held[lead : lead + unit.length]

    def _whole_parts(self, unit: Unit, buffer: Buffer) -> Iterator[Part]:
        """Reads a unit, and yields each part when it is read and verified; reports those that are damaged.

        Each block is verified when it has come, and is still in the processor's cache: that costs less than half of
        reading it from memory again.
        """
        view = memoryview(buffer)
        steps = self._store.read_steps(unit.object, unit.offset, buffer)
        filled = number = 0
        try:
            for part in unit.parts:
                for block in range(part.run.block_count):
                    start = part.at + block * BLOCK_BYTES
                    end = min(start + BLOCK_BYTES, part.at + part.length)
                    while filled < end:
                        filled = next(steps)
                    checksum = part.place.table.checksum(part.place.row, part.run.first_block + block)
                    if xxhash.xxh3_128_digest(view[start:end]) != checksum:
                        what = f"the checksum of the block at byte {unit.offset + start} differs"
                        self._report_parts(unit, [part], "checksum", what)
                        break
                else:
                    yield part
                number += 1
        except StopIteration:
            what = f"the object ends at byte {unit.offset + filled}"
            self._report_parts(unit, unit.parts[number:], "length", what)
        except OSError as error:
            self._report_parts(unit, unit.parts[number:], _kind_of(error), _describe_os_error(error))
        finally:
            self._count(filled)

    def _scatter(self, part: Part, buffer: Buffer) -> None:
        """Copies what the destinations want from verified blocks."""
        spec = self._manifest.spec(part.leaf)
        itemsize = spec.stored_itemsize
        chunk_lo = box_of_chunk(spec, self._manifest.chunk_index(part.leaf, part.chunk))[0]
        first = part.run.start // itemsize
        last = min(first + part.length // itemsize, spec.chunk_nbytes // itemsize)
        elements = buffer[part.at : part.at + (last - first) * itemsize].view(_MOVABLE[itemsize])
        at = 0
        for lo, hi in flat_boxes(first, last, spec.chunk_shape):
            sizes = minus(hi, lo)
            count = math.prod(sizes)
            source = elements[at : at + count].reshape(sizes)
            at += count
            source_box = (_plus(lo, chunk_lo), _plus(hi, chunk_lo))
            for destination, region in part.targets:
                shared = intersect(region, source_box)
                if shared is not None:
                    target = destination_array(destination, itemsize)
                    target[_slices(shared, destination.box[0])] = source[_slices(shared, source_box[0])]

    def _count(self, nbytes: int) -> None:
        with self._lock:
            self.bytes_read += nbytes
        if self._meter is not None:
            self._meter.add(nbytes)

    def _report(self, key: str | None, kind: str, message: str) -> None:
        with self._lock:
            self._problems.append(Problem(key, kind, message))

    def _report_parts(self, unit: Unit, parts: Iterable[Part], kind: str, what: str) -> None:
        for part in parts:
            chunk = self._manifest.chunk_index(part.leaf, part.chunk)
            self._report(
                self._manifest.keys[part.leaf], kind, f"chunk {chunk} in object {unit.object}: {what}"
            )

    def _report_object(self, plan: ReadPlan, name: str, kind: str, what: str) -> None:
        for leaf, chunk in plan.chunks_of(name):
            index = self._manifest.chunk_index(leaf, chunk)
            self._report(self._manifest.keys[leaf], kind, f"chunk {index} in object {name}: {what}")


def _kept_buffer(unit: Unit) -> Buffer:
    """The memory of the destinations of a unit that is read to where it stays."""
    if unit.in_place is None:
        return allocate_aligned(unit.length, unit.offset)
    destination, start = unit.in_place
    assert destination.buffer is not None
    return destination.buffer[start : start + unit.length]


def _keep(part: Part, buffer: Buffer) -> None:
    part.first.buffer = buffer[part.at : part.at + part.first.nbytes]


def destination_array(destination: Destination, itemsize: int) -> np.ndarray[Any, Any]:
    """The bytes of a destination as an array of opaque elements in the shape of its box."""
    assert destination.buffer is not None
    sizes = minus(destination.box[1], destination.box[0])
    elements = destination.buffer.view(_MOVABLE[itemsize])
    if not destination.fortran_axes:
        return elements.reshape(sizes)
    turned = range(destination.fortran_axes - 1, -1, -1)
    rest = range(destination.fortran_axes, len(sizes))
    axes = (*turned, *rest)  # its own inverse
    return elements.reshape([sizes[axis] for axis in axes]).transpose(axes)


def _kind_of(error: OSError) -> str:
    """``"missing"`` when bytes are lost; ``"unreadable"`` when the process or the machine lacks something."""
    is_lost = error.errno in (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EIO)
    return "missing" if is_lost else UNREADABLE


def _describe_os_error(error: OSError) -> str:
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        return "it is missing"
    return f"it cannot be read ({error.strerror or error})"


def _plus(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(x + y for x, y in zip(a, b, strict=True))


def _slices(box: Box, origin: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(slice(lo - start, hi - start) for lo, hi, start in zip(*box, origin, strict=True))
