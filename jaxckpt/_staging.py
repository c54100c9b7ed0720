"""Which memory may a snapshot take, and what is a snapshot?

`HostMemory` counts every byte of staging of the process against ``host_bytes_max``, whatever the number of saves. When
there is no room, the caller of `save_async` waits until the writer has released some. Buffers are kept from save to
save, since memory touched for the first time costs five times its copy.

`DeviceMemory` counts the copies that snapshots keep on devices, and says whether there is room for more.
"""

from __future__ import annotations

import abc
import functools
import threading
from collections.abc import Callable, Mapping
from typing import Any, final

from ._config import PIECE_BYTES
from ._layout import Piece, Segment, WritePlan
from ._leaves import Leaves
from ._storage import Buffer, allocate_aligned

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


@final
class DeviceMemory:
    """Copies that snapshots keep on devices: how many bytes they take, and whether training leaves room for more.

    A copy must never take the memory that a later step needs, which is more than what is in use between two steps. So
    what everything else takes is estimated by its peak: the peak that the device reports, less our copies at theirs.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._bytes_in_use: dict[Any, int] = {}
        self._peak_bytes: dict[Any, int] = {}
        self._peak_bytes_of_others: dict[Any, int] = {}

    def has_room(self, wanted: Mapping[Any, int]) -> bool:
        """Whether copies of so many bytes of each device fit; no, where a device does not report its memory.

        A sixteenth of the memory stays free, for fragments and for steps that take more than those before.
        """
        with self._lock:
            return all(nbytes <= self._free_bytes(device) for device, nbytes in wanted.items())

    def _free_bytes(self, device: Any) -> int:
        stats: Mapping[str, int] = device.memory_stats() or {}
        if "bytes_limit" not in stats or "peak_bytes_in_use" not in stats:
            return -1
        copies = self._bytes_in_use.get(device, 0)
        others = max(
            self._peak_bytes_of_others.get(device, 0),
            stats["peak_bytes_in_use"] - self._peak_bytes.get(device, 0),
            stats.get("bytes_in_use", 0) - copies,
        )
        self._peak_bytes_of_others[device] = others
        return stats["bytes_limit"] * 15 // 16 - others - copies

    def add(self, nbytes_of: Mapping[Any, int]) -> None:
        """Counts copies that were made."""
        with self._lock:
            for device, nbytes in nbytes_of.items():
                in_use = self._bytes_in_use[device] = self._bytes_in_use.get(device, 0) + nbytes
                self._peak_bytes[device] = max(self._peak_bytes.get(device, 0), in_use)

    def remove(self, nbytes_of: Mapping[Any, int]) -> None:
        """Counts copies that are gone."""
        with self._lock:
            for device, nbytes in nbytes_of.items():
                self._bytes_in_use[device] -= nbytes

    @property
    def bytes_in_use(self) -> int:
        """Bytes of the copies on all devices."""
        with self._lock:
            return sum(self._bytes_in_use.values())


# For the whole process: the cap is on the machine's memory, however many saves run. Pinned copies are counted apart
# from the buffers into which they are assembled, since one waits for the other.
HOST_MEMORY = HostMemory()
PINNED_MEMORY = HostMemory()
DEVICE_MEMORY = DeviceMemory()


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

    def __init__(self, leaves: Leaves, plan: WritePlan, bytes_max: int, piece_bytes: int) -> None:
        self._leaves = leaves
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
        """Copies the segments of a piece, one by one, into a staging buffer and submits that."""

        def fill(buffer: Buffer) -> None:
            for segment in piece.segments:
                end = segment.at + segment.hi - segment.lo
                copy_to(segment, buffer[segment.at : end])
                buffer[end : segment.at + segment.stored] = 0

        self._fill_piece(piece, fill, submit)

    def _fill_piece(self, piece: Piece, fill: Callable[[Buffer], None], submit: Submit) -> None:
        """Has a staging buffer filled with the bytes of a piece and submits that."""
        nbytes = self._piece_bytes
        buffer = HOST_MEMORY.take_buffer(nbytes, self._bytes_max, self._check_wanted)
        give_back = functools.partial(HOST_MEMORY.return_buffer, buffer, nbytes)
        try:
            fill(buffer)
        except BaseException:
            give_back()
            raise
        submit(piece, buffer[: piece.length], give_back)
