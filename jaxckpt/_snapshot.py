"""How do the bytes of a tree leave the devices without stopping the training loop?

The problem. A training step donates its state: the memory that a save wants to read is overwritten by the next
step, which the loop launches as soon as `save_async` returns. And the loop must not wait for the disk, nor, on an
accelerator, for the step in flight.

What does not work (the tests keep these as negative controls). ``copy_to_host_async`` and reading later loses the
value: the array is deleted by the donation. ``device_put`` to the array's own sharding is no copy: both are deleted.
Holding a NumPy view of a live buffer works on CPU, but then XLA cannot reuse the buffer and the next step copies; on
GPU the step fails. Reading host values off the training arrays caches them there for as long as the arrays live.

What we do.

* ``pinned`` (GPU, TPU): one batched ``device_put`` of all shards to ``pinned_host`` memory. It is enqueued behind the
  computation in flight and before the next one; the runtime orders the donating step after the copy on the device.
  The caller waits for nothing. What we later read on the host are these disposable copies.
* ``pool`` (CPU, where the values are in host memory already): wait for the values and copy them, piece by piece, into
  buffers that are reused from save to save, since memory touched for the first time costs five times its copy.
* ``direct`` (a blocking `save` on CPU to storage that takes any memory): nothing is copied, since the caller waits
  until everything is written. Views are held meanwhile, so that a thread that donates the arrays anyway cannot disturb
  the save. Where storage wants aligned memory (O_DIRECT), a blocking save goes through a small pool instead: a copy
  that stays in the processor's cache costs less than the copy into the page cache that it avoids.

Memory. `HostMemory` counts every byte of staging of the process against ``host_bytes_max``. When there is no room,
the caller of `save_async` waits until the writer has released some. A shard that is larger than the room is cut, on
its device if the host cannot view it.

Invariant: when `stage` returns, every array, NumPy leaf and Python value of the tree may be donated, deleted or
overwritten, and no reference to a leaf is kept. Deliberately not here: any knowledge of files or of the manifest.
"""

from __future__ import annotations

import abc
import bisect
import contextlib
import dataclasses
import functools
import math
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, ClassVar, final

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, SingleDeviceSharding

from ._config import BLOCK_BYTES, PIECE_BYTES
from ._dtypes import is_sub_byte
from ._layout import Piece, Run, Segment, WritePlan, contiguous_runs, flat_boxes, whole_run
from ._leaves import Leaf, StreamedArray
from ._shardings import Box, Device
from ._store import Buffer, allocate_aligned

# Called with a piece, its bytes, and a function that gives the bytes' memory back.
Submit = Callable[[Piece, Buffer, Callable[[], None]], None]


@final
class HostMemory:
    """Staging memory of the process: a count of what is in use, and buffers that are kept for the next save."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._bytes_in_use = 0
        self._idle: list[Buffer] = []

    def reserve(self, nbytes: int, bytes_max: int, check: Callable[[], None] = lambda: None) -> None:
        """Waits until so many bytes fit below the cap; a request above the cap passes when nothing else is in use.

        Args:
          nbytes: How many.
          bytes_max: The cap.
          check: Called before each wait; what it raises ends the waiting. See `wake`.
        """
        with self._changed:
            while self._bytes_in_use and self._bytes_in_use + nbytes > bytes_max:
                check()
                self._changed.wait()
            self._bytes_in_use += nbytes

    def release(self, nbytes: int) -> None:
        """Gives reserved bytes back."""
        with self._changed:
            self._bytes_in_use -= nbytes
            self._changed.notify_all()

    def wake(self) -> None:
        """Lets all who wait look whether they still want to."""
        with self._changed:
            self._changed.notify_all()

    def take_buffer(self, nbytes: int, bytes_max: int, check: Callable[[], None] = lambda: None) -> Buffer:
        """A buffer for one piece, which stays reserved until `return_buffer`; waits as `reserve` does."""
        self.reserve(nbytes, bytes_max, check)
        with self._changed:
            # An earlier save may have had a higher cap: what it left counts against this one's.
            del self._idle[max(bytes_max - self._bytes_in_use, 0) // PIECE_BYTES + 1 :]
            if self._idle:
                return self._idle.pop()
        try:
            return allocate_aligned(PIECE_BYTES)
        except BaseException:
            self.release(nbytes)
            raise

    def return_buffer(self, buffer: Buffer, nbytes: int) -> None:
        """Gives a buffer of `take_buffer` back."""
        with self._changed:
            self._idle.append(buffer)
        self.release(nbytes)

    @property
    def bytes_in_use(self) -> int:
        """Bytes that are reserved now."""
        with self._changed:
            return self._bytes_in_use


# For the whole process: the cap is on the machine's memory, however many saves run. Pinned copies are counted apart
# from the buffers into which they are assembled, since one waits for the other.
HOST_MEMORY = HostMemory()
PINNED_MEMORY = HostMemory()


def choose_staging(leaves: Sequence[Leaf], staging: str) -> str:
    """``"pinned"`` or ``"pool"``, by the devices that hold the arrays."""
    if staging != "auto":
        return staging
    for leaf in leaves:
        if isinstance(leaf.data, jax.Array):
            for device in leaf.data.sharding.addressable_devices:
                if device.platform != "cpu" and _pinned_sharding(device) is not None:
                    return "pinned"
                break  # they are all of one kind; none is here when other processes have the whole array
    return "pool"


class SnapshotGivenUpError(Exception):
    """Something else has failed, and whoever saw that keeps it."""


class Snapshot(abc.ABC):
    """The bytes of a tree on their way to the writer.

    Args:
      leaves: The leaves of the tree.
      plan: What is written of them.
      bytes_max: Cap on staging, see `HostMemory`.
      piece_bytes: Most bytes of a piece.
    """

    def __init__(self, leaves: Sequence[Leaf], plan: WritePlan, bytes_max: int, piece_bytes: int) -> None:
        self._leaves: Sequence[Leaf] = leaves
        self._plan = plan
        self._bytes_max = bytes_max
        self._piece_bytes = piece_bytes
        self._has_failed = False

    @abc.abstractmethod
    def stage(self, submit: Submit) -> None:
        """Called on the caller's thread; when it returns the caller may donate the tree."""

    @abc.abstractmethod
    def drain(self, submit: Submit) -> None:
        """Called on the background thread: hands over what `stage` did not."""

    def give_up(self) -> None:
        """Ends the waiting for memory, for something else has failed."""
        self._has_failed = True
        HOST_MEMORY.wake()
        PINNED_MEMORY.wake()

    def _check_wanted(self) -> None:
        if self._has_failed:
            raise SnapshotGivenUpError

    def _copy_piece(self, piece: Piece, copy_to: Callable[[Segment, Buffer], None], submit: Submit) -> None:
        """Copies the segments of a piece into a staging buffer and submits that."""
        nbytes = self._piece_bytes
        buffer = HOST_MEMORY.take_buffer(nbytes, self._bytes_max, self._check_wanted)
        give_back = functools.partial(HOST_MEMORY.return_buffer, buffer, nbytes)
        try:
            for segment in piece.segments:
                end = segment.at + segment.hi - segment.lo
                copy_to(segment, buffer[segment.at : end])
                buffer[end : segment.at + segment.stored] = 0
        except BaseException:
            give_back()
            raise
        submit(piece, buffer[: piece.length], give_back)


@final
class PoolSnapshot(Snapshot):
    """Copies everything into reused host buffers before `stage` returns."""

    def stage(self, submit: Submit) -> None:
        reader = _HostReader(self._leaves)
        self._leaves = ()
        for piece in self._plan.pieces:
            self._copy_piece(piece, reader.copy_to, submit)

    def drain(self, submit: Submit) -> None:
        """Nothing is left to do."""


@final
class DirectSnapshot(Snapshot):
    """Hands over views of the arrays themselves, for a caller who waits; only packs are assembled in buffers."""

    def stage(self, submit: Submit) -> None:
        reader = _HostReader(self._leaves)
        self._leaves = ()
        for piece in self._plan.pieces:
            segment = piece.segments[0]
            if (
                len(piece.segments) == 1
                and segment.stored == segment.hi - segment.lo
                and reader.is_view(segment)
            ):
                submit(piece, reader.read(segment), _nothing)
            else:
                self._copy_piece(piece, reader.copy_to, submit)

    def drain(self, submit: Submit) -> None:
        """Nothing is left to do."""


def _nothing() -> None:
    """Memory that belongs to the caller is not given back."""


@final
class _HostReader:
    """Byte ranges of shards in host memory, without leaving anything cached on the arrays.

    A shard that NumPy can view is read from the view. Where the host form differs (elements of less than a byte,
    devices with memory of their own) it is converted window by window, so that a large one never is in memory twice.
    A streamed array is read range by range.
    """

    def __init__(self, leaves: Sequence[Leaf]) -> None:
        self._leaves = leaves
        self._shard: tuple[int, int] | None = None
        self._data: Any = None
        self._windows: list[Run] = []
        # What is converted now: bytes `[lo, hi)` of the shard.
        self._window: Run | None = None
        self._array: np.ndarray[Any, Any] = np.empty(0, np.uint8)

    def read(self, segment: Segment) -> Buffer:
        """The bytes of a segment: a view where the shard is contiguous, else a copy."""
        data = self._open(segment)
        if isinstance(data, StreamedArray):
            return data.read(segment.lo, segment.hi)
        if isinstance(data, np.ndarray):
            return _byte_range(data, segment.lo, segment.hi)
        parts: list[Buffer] = []
        at = segment.lo
        while at < segment.hi:
            window = self._convert(at)
            end = min(segment.hi, window.hi)
            parts.append(_byte_range(self._array, at - window.lo, end - window.lo))
            at = end
        return np.concatenate(parts)

    def copy_to(self, segment: Segment, out: Buffer) -> None:
        """Copies the bytes of a segment."""
        out[:] = self.read(segment)

    def is_view(self, segment: Segment) -> bool:
        """Whether `read` gives a view."""
        data = self._open(segment)
        return isinstance(data, np.ndarray) and bool(data.flags.c_contiguous)

    def _open(self, segment: Segment) -> Any:
        """The shard: a NumPy array, a streamed array, or a `jax.Array` that must be converted."""
        shard = (segment.leaf, segment.shard)
        if self._shard != shard:  # consecutive segments mostly belong to one shard
            self._data = _host_view(self._leaves[segment.leaf].data, segment.shard)
            self._shard = shard
            self._window = None
            if not isinstance(self._data, (np.ndarray, StreamedArray)):
                itemsize = np.dtype(self._data.dtype).itemsize
                self._windows = list(contiguous_runs(self._data.shape, itemsize, BLOCK_BYTES))
        return self._data

    def _convert(self, at: int) -> Run:
        """Converts the window that holds a byte of the shard."""
        if self._window is None or not self._window.lo <= at < self._window.hi:
            number = bisect.bisect_right(self._windows, at, key=lambda run: run.lo) - 1
            self._window = self._windows[number]
            self._array = _to_host(_cut(self._data, self._window))
        return self._window


def _host_view(data: Any, shard: int) -> Any:
    """One shard as a NumPy array that views its memory; waits until it is computed.

    Where there is no such view, a second handle to the shard: converting the array itself would cache the result on it.
    """
    if isinstance(data, (np.ndarray, StreamedArray)):
        return data
    array = data.addressable_data(shard)
    (device,) = array.devices()
    if device.platform != "cpu" or is_sub_byte(array.dtype):
        return jax.make_array_from_single_device_arrays(array.shape, array.sharding, [array])
    return np.asarray(array)


def read_shard(data: jax.Array, shard: int, box: Box) -> np.ndarray[Any, Any]:
    """A box of one of this process's shards, in host memory; nothing is cached on the array."""
    return _to_host(_cut(_host_view(data, shard), Run(0, 0, box)))


def _to_host(array: Any) -> np.ndarray[Any, Any]:
    """The values of a disposable array; saving was asked for, so that a guard against transfers does not mean it."""
    with jax.transfer_guard_device_to_host("allow"):
        return np.asarray(array)


def _byte_range(array: np.ndarray[Any, Any], lo: int, hi: int) -> Buffer:
    if array.flags.c_contiguous:
        return array.reshape(-1).view(np.uint8)[lo:hi]
    # Fortran order, strides: gather just the range, so that a large leaf is never copied whole.
    itemsize = array.dtype.itemsize
    first, last = lo // itemsize, -(-hi // itemsize)
    boxes = [
        array[tuple(slice(a, b) for a, b in zip(box_lo, box_hi, strict=True))]
        for box_lo, box_hi in flat_boxes(first, last, array.shape)
    ]
    # Joined as bytes: joining elements would bring them to the byte order of this machine.
    gathered = np.concatenate([np.ascontiguousarray(box).reshape(-1).view(np.uint8) for box in boxes])
    return gathered[lo - first * itemsize : hi - first * itemsize]


# --- pinned host memory ---------------------------------------------------------------------------------------


@dataclasses.dataclass(slots=True, eq=False)
class _PinnedPart:
    """Bytes ``[lo, hi)`` of a shard as a disposable array in host memory; ``left`` of them are still to be written."""

    lo: int
    hi: int
    array: Any
    left: int


@final
class PinnedSnapshot(Snapshot):
    """Transfers shards to pinned host memory in the background; the writer reads them there.

    The caller's thread appends parts of shards in the order of the plan, the background thread consumes them in the
    same order and gives back each part's memory as soon as its last byte is written or copied on. Neither ever
    waits for memory while it holds something that the other one needs. So that this holds for several saves too,
    they stage one after the other, and are drained in the same order.
    """

    _staging = threading.Lock()
    _line_changed = threading.Condition()
    _line: ClassVar[list[PinnedSnapshot]] = []

    def __init__(self, leaves: Sequence[Leaf], plan: WritePlan, bytes_max: int, piece_bytes: int) -> None:
        # Half of the memory is for pinned copies, the other half for buffers in which packs are assembled.
        Snapshot.__init__(self, leaves, plan, max(bytes_max // 2, piece_bytes), piece_bytes)
        self._pinned_bytes_max = max(bytes_max // 2, 1)
        self._changed = threading.Condition()
        self._parts: dict[tuple[int, int], list[_PinnedPart]] = {}

    def stage(self, submit: Submit) -> None:
        try:
            with self._staging:
                with self._line_changed:
                    self._check_wanted()  # who has given up may have left the line already
                    self._line.append(self)
                    self._line_changed.notify_all()
                self._stage()
        except BaseException:
            self.give_up()
            raise
        finally:
            self._leaves = ()

    def drain(self, submit: Submit) -> None:
        try:
            self._wait_in_line()
            self._drain(submit)
        finally:
            with self._line_changed:
                if self in self._line:
                    self._line.remove(self)
                self._line_changed.notify_all()

    def _wait_in_line(self) -> None:
        """Waits until this save is staged, or being staged, and all before it are drained."""
        with self._line_changed:
            while not self._has_failed and self._line[:1] != [self]:
                self._line_changed.wait()

    def _drain(self, submit: Submit) -> None:
        for piece in self._plan.pieces:
            segment = piece.segments[0]
            shard = (segment.leaf, segment.shard)
            part = self._wait_for(shard, segment.lo)
            is_whole = len(piece.segments) == 1 and segment.stored == segment.hi - segment.lo
            if is_whole and segment.hi <= part.hi:
                view = _byte_range(_to_host(part.array), segment.lo - part.lo, segment.hi - part.lo)
                submit(piece, view, functools.partial(self._consumed, shard, part, len(view)))
            else:
                self._copy_piece(piece, self._copy_to, submit)

    def give_up(self) -> None:
        """As for every snapshot; also releases everything that nobody will write any more."""
        Snapshot.give_up(self)
        with self._changed:
            parts = [part for parts in self._parts.values() for part in parts]
            self._parts.clear()
            self._changed.notify_all()
        with self._line_changed:
            self._line_changed.notify_all()
        PINNED_MEMORY.release(sum(part.hi - part.lo for part in parts))

    def _stage(self) -> None:
        group: list[tuple[tuple[int, int], Any, Run]] = []
        group_bytes = 0
        for shard, ranges in self._plan.ranges_of_shard.items():
            array = self._shard_array(shard)
            itemsize = np.dtype(array.dtype).itemsize
            for run in _runs_of_ranges(ranges, array.shape, itemsize):
                nbytes = run.hi - run.lo
                if group_bytes + nbytes > self._pinned_bytes_max:
                    self._transfer(group)
                    group, group_bytes = [], 0
                if nbytes <= self._pinned_bytes_max:
                    group.append((shard, array, run))
                    group_bytes += nbytes
                    continue
                # Two parts of a shard fit, so that one is written while the other is on its way. Waiting for room waits
                # for the values anyway, so that where the host can view them nothing is copied on the device.
                source = _host_view(self._leaves[shard[0]].data, shard[1])
                for part in contiguous_runs(run.sizes, itemsize, self._pinned_bytes_max // 2):
                    self._transfer([(shard, source, part.within(run))])
        self._transfer(group)

    def _shard_array(self, shard: tuple[int, int]) -> Any:
        leaf, number = shard
        data = self._leaves[leaf].data
        return data if isinstance(data, np.ndarray) else data.addressable_data(number)  # type: ignore[union-attr]

    def _transfer(self, group: list[tuple[tuple[int, int], Any, Run]]) -> None:
        """Copies parts of shards with one batched transfer."""
        if not group:
            return
        with self._room_for(sum(run.hi - run.lo for _, _, run in group)):
            copies = _copies_on_host([_cut(array, run) for _, array, run in group])
            with self._changed:
                self._check_wanted()
                for (shard, _, run), copy in zip(group, copies, strict=True):
                    part = _PinnedPart(run.lo, run.hi, copy, run.hi - run.lo)
                    self._parts.setdefault(shard, []).append(part)
                self._changed.notify_all()

    @contextlib.contextmanager
    def _room_for(self, nbytes: int) -> Generator[None]:
        """Waits for memory for copies. They keep it until their last byte is written; a failure gives it back."""
        PINNED_MEMORY.reserve(nbytes, self._pinned_bytes_max, self._check_wanted)
        try:
            self._check_wanted()
            yield
        except BaseException:
            PINNED_MEMORY.release(nbytes)
            raise

    def _wait_for(self, shard: tuple[int, int], at: int) -> _PinnedPart:
        """The part that holds a byte of a shard, once it is there."""
        with self._changed:
            while True:
                for part in self._parts.get(shard, ()):
                    if part.lo <= at < part.hi:
                        return part
                if self._has_failed:
                    raise SnapshotGivenUpError
                self._changed.wait()

    def _copy_to(self, segment: Segment, out: Buffer) -> None:
        """Copies the bytes of a segment, giving back the memory of each part before waiting for the next."""
        shard = (segment.leaf, segment.shard)
        at = segment.lo
        while at < segment.hi:
            part = self._wait_for(shard, at)
            end = min(segment.hi, part.hi)
            view = _byte_range(_to_host(part.array), at - part.lo, end - part.lo)
            out[at - segment.lo : end - segment.lo] = view
            self._consumed(shard, part, end - at)
            at = end

    def _consumed(self, shard: tuple[int, int], part: _PinnedPart, nbytes: int) -> None:
        """Counts bytes that are written or copied on; the last ones of a part give its memory back."""
        with self._changed:
            part.left -= nbytes
            parts = self._parts.get(shard, [])
            if part.left or part not in parts:
                return
            parts.remove(part)
            if not parts:
                del self._parts[shard]
        PINNED_MEMORY.release(part.hi - part.lo)


def _runs_of_ranges(
    ranges: Sequence[tuple[int, int]], shape: tuple[int, ...], itemsize: int
) -> Iterator[Run]:
    """The boxes of a shard that ranges of its bytes make up; its whole, mostly."""
    nbytes = math.prod(shape) * itemsize
    for lo, hi in ranges:
        if (lo, hi) == (0, nbytes):
            yield whole_run(shape, itemsize)
            continue
        at = lo
        for box in flat_boxes(lo // itemsize, hi // itemsize, shape):
            end = at + math.prod(stop - start for start, stop in zip(*box, strict=True)) * itemsize
            yield Run(at, end, box)
            at = end


def _copies_on_host(arrays: list[Any]) -> list[Any]:
    """Disposable copies of shards in pinned host memory (one batched transfer), and of NumPy arrays."""
    shards = [array for array in arrays if not isinstance(array, np.ndarray)]
    targets = [_pinned_sharding(next(iter(shard.devices()))) or shard.sharding for shard in shards]
    pinned = iter(jax.device_put(shards, targets, may_alias=False) if shards else [])
    return [np.array(array, order="C") if isinstance(array, np.ndarray) else next(pinned) for array in arrays]


@functools.cache
def _pinned_sharding(device: Device) -> SingleDeviceSharding | None:
    if not any(memory.kind == "pinned_host" for memory in device.addressable_memories()):
        return None
    return SingleDeviceSharding(device, memory_kind="pinned_host")


def _cut(array: Any, run: Run) -> Any:
    """A part of a shard: of a NumPy array a view, else a copy on its device, unless it is the whole."""
    lo, hi = run.box
    sizes = tuple(stop - start for start, stop in zip(lo, hi, strict=True))
    if sizes == array.shape:
        return array
    if isinstance(array, np.ndarray):
        return array[tuple(map(slice, lo, hi))]
    (device,) = array.devices()
    # The caller's settings are not ours: code under a mesh (`jax.set_mesh`) refuses arrays of single devices, a guard
    # refuses the place to cut at, and a check for NaN or infinity would wait for the values and refuse them.
    with (
        jax.set_mesh(_mesh_of(device)),
        jax.transfer_guard("allow"),
        jax.debug_nans(False),
        jax.debug_infs(False),
    ):
        if max(array.shape) > np.iinfo(np.int32).max:  # positions on the device are int32
            return _slice(array, lo, hi)
        return _dynamic_slice(array, lo, sizes)


@functools.cache
def _mesh_of(device: Device) -> Mesh:
    return Mesh(np.array([device], dtype=object), ("_",), axis_types=(AxisType.Auto,))


@functools.partial(jax.jit, static_argnums=2)
def _dynamic_slice(array: Any, lo: tuple[int, ...], sizes: tuple[int, ...]) -> Any:
    return jax.lax.dynamic_slice(array, lo, sizes)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _slice(array: Any, lo: tuple[int, ...], hi: tuple[int, ...]) -> Any:
    return jax.lax.slice(array, lo, hi)


def take_snapshot(
    kind: str, leaves: Sequence[Leaf], plan: WritePlan, bytes_max: int, piece_bytes: int
) -> PoolSnapshot | PinnedSnapshot | DirectSnapshot:
    """The snapshot of a kind: ``"pool"``, ``"pinned"`` or ``"direct"``."""
    classes = {"pool": PoolSnapshot, "pinned": PinnedSnapshot, "direct": DirectSnapshot}
    return classes[kind](leaves, plan, bytes_max, piece_bytes)
