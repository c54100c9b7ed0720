"""Which memory may a snapshot take on the host, and what is a snapshot?

`HostMemory` counts every byte of staging of the process against ``host_bytes_max``, whatever the number of saves. When
there is no room, the caller of `save_async` waits until the writer has released some. Buffers are kept from save to
save, since memory touched for the first time costs five times its copy.
"""

from __future__ import annotations

import abc
import functools
import threading
from collections.abc import Callable, Sequence
from typing import final

from ._config import PIECE_BYTES
from ._layout import Piece, Segment, WritePlan
from ._leaves import Leaf
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
