"""How do shards leave an accelerator while the training loop goes on?

One batched ``device_put`` of all shards to ``pinned_host`` memory is enqueued behind the computation in flight and
before the next one; the runtime orders the donating step after the copy on the device. The caller waits for nothing
but room in host memory. What is read on the host later are these disposable copies.

Where the devices have room, the shards are copied there first, and a thread of the snapshot transfers these copies as
far as host memory takes them, giving up each as it goes. The donating step then waits for a copy at the speed of the
device's own memory, and the caller for nothing at all, but for leaves in host memory: these, and what the plan writes
before them, are transferred in the call. If the devices refuse the memory, the shards are transferred as they are.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import logging
import math
import threading
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal, final

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding

from ._layout import Run, Segment, WritePlan, contiguous_runs, flat_boxes, whole_run
from ._leaves import NO_LEAVES, Leaves
from ._shardings import Box, Device
from ._staging import DEVICE_MEMORY, PINNED_MEMORY, Snapshot, SnapshotGivenUpError, Submit
from ._storage import Buffer
from ._viewing import byte_range, copies_on_device, cut, host_view, to_host

_log = logging.getLogger("jaxckpt")

# Copies on devices are transferred, and given up, in groups of this size: at the speed of PCIe 5 one takes 5 ms, and
# so is under way much longer than it takes to launch.
_GROUP_BYTES_MAX = 256 << 20


@dataclasses.dataclass(slots=True, eq=False)
class _Source:
    """Bytes ``[run.lo, run.hi)`` of a shard: the box ``run.box`` of an array of one device or of NumPy."""

    shard: tuple[int, int]
    run: Run
    array: Any


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

    One thread appends parts of shards in the order of the plan, the background thread consumes them in the same order
    and gives back each part's memory as soon as its last byte is written or copied on. Neither ever waits for memory
    while it holds something that the other one needs. So that this holds for several saves too, they stand in line:
    they transfer one after the other, and are drained in the same order.

    Args:
      leaves, plan, bytes_max, piece_bytes: As for every snapshot.
      copies: Which shards are copied on their devices first: ``"none"``; ``"if room"``, all if the devices have room
        for them; ``"all"``, unless a device refuses the memory.
    """

    _line_changed = threading.Condition()
    _line: ClassVar[list[PinnedSnapshot]] = []

    def __init__(
        self,
        leaves: Leaves,
        plan: WritePlan,
        bytes_max: int,
        piece_bytes: int,
        copies: Literal["none", "if room", "all"] = "none",
    ) -> None:
        # Half of the memory is for pinned copies, the other half for buffers in which packs are assembled.
        Snapshot.__init__(self, leaves, plan, max(bytes_max // 2, piece_bytes), piece_bytes)
        self._pinned_bytes_max = max(bytes_max // 2, 1)
        self._copies = copies
        self.is_transferred = False
        self._nbytes_of_copies: dict[Device, int] = {}
        self._mover: threading.Thread | None = None
        self._mover_failure: BaseException | None = None
        self._changed = threading.Condition()
        self._parts: dict[tuple[int, int], list[_PinnedPart]] = {}

    def stage(self, submit: Submit) -> None:
        try:
            with self._line_changed:
                self._check_wanted()  # who has given up may have left the line already
                self._line.append(self)
                self._line_changed.notify_all()
            if self._copies == "none" or not self._stage_on_devices():
                self._transfer_all(self._sources(), self._pinned_bytes_max)
                self._end_transfers()
        except BaseException:
            self.give_up()
            self._end_transfers()
            raise
        finally:
            self._leaves = NO_LEAVES

    def drain(self, submit: Submit) -> None:
        try:
            self._wait_in_line()
            self._drain(submit)
        except BaseException:
            self.give_up()
            raise
        finally:
            with self._line_changed:
                if self in self._line:
                    self._line.remove(self)
                self._line_changed.notify_all()
            if self._mover is not None and self._mover.ident is not None:
                self._mover.join()

    def _drain(self, submit: Submit) -> None:
        for piece in self._plan.pieces:
            segment = piece.segments[0]
            shard = (segment.leaf, segment.shard)
            part = self._wait_for(shard, segment.lo)
            is_whole = len(piece.segments) == 1 and segment.stored == segment.hi - segment.lo
            if is_whole and segment.hi <= part.hi:
                view = byte_range(to_host(part.array), segment.lo - part.lo, segment.hi - part.lo)
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

    def _wait_for_turn(self) -> None:
        """Waits until all saves before this one have transferred everything."""
        with self._line_changed:
            while True:
                self._check_wanted()
                # A save of no arrays may be drained already.
                place = self._line.index(self) if self in self._line else 0
                if all(save.is_transferred for save in self._line[:place]):
                    return
                self._line_changed.wait()

    def _end_transfers(self) -> None:
        with self._line_changed:
            self.is_transferred = True
            self._line_changed.notify_all()

    def _wait_in_line(self) -> None:
        """Waits until this save transfers, or has done so, and all before it are drained."""
        with self._line_changed:
            while not self._has_failed and self._line[:1] != [self]:
                self._line_changed.wait()

    def _sources(self) -> Iterator[_Source]:
        """Everything that is to be transferred, in the order of the plan."""
        for shard, ranges in self._plan.ranges_of_shard.items():
            array = self._shard_array(shard)
            for run in _runs_of_ranges(ranges, array.shape, np.dtype(array.dtype).itemsize):
                yield _Source(shard, run, array)

    def _shard_array(self, shard: tuple[int, int]) -> Any:
        leaf, number = shard
        data = self._leaves.arrays[leaf]
        return data if isinstance(data, np.ndarray) else data.addressable_data(number)  # type: ignore[union-attr]

    def _stage_on_devices(self) -> bool:
        """Copies shards on their devices and lets a thread go on; says whether the devices have the memory."""
        sources = list(self._sources())
        devices = [_device_of(source.array) for source in sources]
        bound = max((number for number, device in enumerate(devices, 1) if device is None), default=0)
        by_device: dict[Device, list[_Source]] = collections.defaultdict(list)
        for source, device in zip(sources[bound:], devices[bound:], strict=True):
            assert device is not None
            by_device[device].append(source)
        nbytes_of = {
            device: sum(source.run.hi - source.run.lo for source in those)
            for device, those in by_device.items()
        }
        if self._copies == "if room" and not DEVICE_MEMORY.has_room(nbytes_of):
            return False
        if not _copy_on_devices(by_device):
            return False
        DEVICE_MEMORY.add(nbytes_of)
        self._nbytes_of_copies = nbytes_of
        try:
            self._transfer_all(sources[:bound], self._pinned_bytes_max)
            # Not a daemon: a program that ends now still finishes the save.
            self._mover = threading.Thread(
                target=self._move,
                args=(collections.deque(sources[bound:]),),
                name="jaxckpt-move",
                daemon=False,
            )
            self._mover.start()
        except BaseException:
            self._forget_copies()
            raise
        if self._has_failed:
            self._mover.join()  # `drain` may have been over before there was a thread
        return True

    def _move(self, copies: collections.deque[_Source]) -> None:
        """Transfers copies on devices; on a thread of its own, which ends when they are all on their way."""
        try:
            # Nothing else refers to what was transferred.
            each = (copies.popleft() for _ in range(len(copies)))
            self._transfer_all(each, min(self._pinned_bytes_max // 2, _GROUP_BYTES_MAX))
        except BaseException as error:
            self._mover_failure = error
            self.give_up()
        finally:
            copies.clear()
            self._forget_copies()
            self._end_transfers()

    def _forget_copies(self) -> None:
        with self._changed:
            nbytes_of, self._nbytes_of_copies = self._nbytes_of_copies, {}
        DEVICE_MEMORY.remove(nbytes_of)

    def _transfer_all(self, sources: Iterable[_Source], group_bytes_max: int) -> None:
        """Transfers shards in groups of so many bytes, or of one shard that is larger."""
        self._wait_for_turn()
        group: list[_Source] = []
        group_bytes = 0
        for source in sources:
            nbytes = source.run.hi - source.run.lo
            if group_bytes + nbytes > group_bytes_max:
                self._transfer(group)
                group, group_bytes = [], 0
            if nbytes <= self._pinned_bytes_max:
                group.append(source)
                group_bytes += nbytes
                continue
            # Two parts of a shard fit, so that one is written while the other is on its way. Waiting for room waits
            # for the values anyway, so that where the host can view them nothing is copied on the device.
            view = host_view(source.array, 0)
            itemsize = np.dtype(source.array.dtype).itemsize
            for part in contiguous_runs(source.run.sizes, itemsize, self._pinned_bytes_max // 2):
                self._transfer([_Source(source.shard, part.within(source.run), view)])
        self._transfer(group)

    def _transfer(self, group: list[_Source]) -> None:
        """Copies parts of shards with one batched transfer."""
        if not group:
            return
        with self._room_for(sum(source.run.hi - source.run.lo for source in group)):
            copies = _copies_on_host([cut(source.array, source.run) for source in group])
            with self._changed:
                self._check_wanted()
                for source, copy in zip(group, copies, strict=True):
                    run = source.run
                    part = _PinnedPart(run.lo, run.hi, copy, run.hi - run.lo)
                    self._parts.setdefault(source.shard, []).append(part)
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
                    raise self._mover_failure or SnapshotGivenUpError
                self._changed.wait()

    def _copy_to(self, segment: Segment, out: Buffer) -> None:
        """Copies the bytes of a segment, giving back the memory of each part before waiting for the next."""
        shard = (segment.leaf, segment.shard)
        at = segment.lo
        while at < segment.hi:
            part = self._wait_for(shard, at)
            end = min(segment.hi, part.hi)
            view = byte_range(to_host(part.array), at - part.lo, end - part.lo)
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


def _device_of(array: Any) -> Device | None:
    """The device in whose memory a shard is; None: the host's, to which devices offload."""
    if isinstance(array, np.ndarray):
        return None
    sharding = array.sharding
    (device,) = sharding.device_set
    return device if sharding.memory_kind == device.default_memory().kind else None


def _copy_on_devices(sources: Mapping[Device, list[_Source]]) -> bool:
    """Puts copies into the place of shards; says whether the devices have the memory, else the shards are as good."""
    try:
        for device, those in sources.items():
            whole: list[_Source] = []
            for source in those:
                if source.run.sizes == source.array.shape:
                    whole.append(source)
                else:
                    source.array = cut(source.array, source.run)
                    source.run = dataclasses.replace(source.run, box=_whole_box(source.array.shape))
            copies = copies_on_device([source.array for source in whole], device)
            for source, copy in zip(whole, copies, strict=True):
                source.array = copy
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        _log.warning(
            "devices have no room for a copy, so that steps wait for transfers to the host: %s", error
        )
        return False
    return True


def _whole_box(shape: tuple[int, ...]) -> Box:
    return (0,) * len(shape), shape


def _copies_on_host(arrays: list[Any]) -> list[Any]:
    """Disposable copies of shards in pinned host memory (one batched transfer), and of NumPy arrays."""
    shards = [array for array in arrays if not isinstance(array, np.ndarray)]
    targets = [pinned_sharding(next(iter(shard.devices()))) or shard.sharding for shard in shards]
    pinned = iter(jax.device_put(shards, targets, may_alias=False) if shards else [])
    return [np.array(array, order="C") if isinstance(array, np.ndarray) else next(pinned) for array in arrays]


@functools.cache
def pinned_sharding(device: Device) -> SingleDeviceSharding | None:
    if not any(memory.kind == "pinned_host" for memory in device.addressable_memories()):
        return None
    return SingleDeviceSharding(device, memory_kind="pinned_host")
