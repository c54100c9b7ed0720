"""How do shards leave an accelerator while the training loop goes on?

One batched ``device_put`` of all shards to ``pinned_host`` memory is enqueued behind the computation in flight and
before the next one; the runtime orders the donating step after the copy on the device. The caller waits for nothing
but room in host memory. What is read on the host later are these disposable copies.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import threading
from collections.abc import Generator, Iterator, Sequence
from typing import Any, ClassVar, final

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding

from ._layout import Run, Segment, WritePlan, contiguous_runs, flat_boxes, whole_run
from ._leaves import Leaf
from ._shardings import Device
from ._staging import PINNED_MEMORY, Snapshot, SnapshotGivenUpError, Submit
from ._store import Buffer
from ._viewing import byte_range, cut, host_view, to_host


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
                source = host_view(self._leaves[shard[0]].data, shard[1])
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
            copies = _copies_on_host([cut(array, run) for _, array, run in group])
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
