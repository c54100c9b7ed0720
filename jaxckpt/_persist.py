"""How do the pieces of a plan become objects with checksums?

A few threads take pieces from a queue. Each computes the checksums of the piece's blocks, writes the piece, gives its
memory back, and, when it was the last piece of its object, makes the object durable. Objects are written in parallel
and in any order; nothing refers to them yet. The threads begin when it is known where to write: in a group of processes
the first of them says so, while the others already take their snapshots.

The threads are not daemons and are all started before `save_async` returns: a program that ends meanwhile still
finishes its save (new threads and executors are refused by then). After the first failure the rest of the queue is
drained without writing, so that nobody waits for memory for ever. A call that the storage keeps waiting cannot be
interrupted: who must not wait for it leaves the thread to itself, which ends, and closes what is open, after that call.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import final

import numpy as np
import xxhash

from ._config import BLOCK_BYTES
from ._layout import Piece, Segment, WritePlan
from ._progress import ProgressMeter
from ._storage import Buffer, ObjectWriter, Store
from ._tables import CHECKSUM_BYTES


@final
class PieceWriter:
    """Writes pieces in background threads.

    Args:
      store: Where to.
      plan: What the pieces belong to.
      call_count: How many calls `open` will be given at most.
      threads: Number of threads.
      meter: Is told of written bytes.
      on_failure: Called with the first failure of a thread, in that thread.
    """

    def __init__(
        self,
        store: Store,
        plan: WritePlan,
        *,
        call_count: int,
        threads: int,
        meter: ProgressMeter,
        on_failure: Callable[[BaseException], None] | None = None,
    ) -> None:
        self._store = store
        self._plan = plan
        self._names: list[str] = []
        self._is_open = threading.Event()
        self._meter = meter
        self._on_failure = on_failure
        blocks = -(-plan.length.astype("int64") // BLOCK_BYTES)
        self._first_block: list[int] = (blocks.cumsum() - blocks).tolist()
        self.checksums = bytearray(CHECKSUM_BYTES * int(blocks.sum()))
        self._queue: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._failure: BaseException | None = None
        self._pieces_left = [0] * len(plan.objects)
        for piece in plan.pieces:
            self._pieces_left[piece.object] += 1
        self._writers: dict[int, ObjectWriter] = {}
        self._object_locks = [threading.Lock() for _ in plan.objects]
        self._calls: collections.deque[Callable[[], None]] = collections.deque()
        # Starting a thread is what a small save blocks its caller for: two do for a piece and a few metadata objects.
        count = min(threads, max(2, len(plan.pieces)), len(plan.pieces) + call_count)
        self._running = 0
        # Set when a thread has failed, when the writing was stopped, and when all threads have ended.
        self._is_over = threading.Event()
        self._ended = [threading.Event() for _ in range(count)]
        self._threads = [
            threading.Thread(target=self._work, name=f"jaxckpt-write-{number}", args=(number,))
            for number in range(count)
        ]
        try:
            for thread in self._threads:
                thread.start()
                self._running += 1  # none ends before it is told to
        except BaseException as error:
            self.abandon(error)
            raise

    def open(self, names: list[str], calls: Sequence[Callable[[], None]]) -> None:
        """Lets the threads begin; until then pieces only queue up.

        Args:
          names: Name of each object of the plan.
          calls: What else must be done before the save is durable.
        """
        self._names = names
        self._calls.extend(calls)
        self._is_open.set()

    @property
    def failure(self) -> BaseException | None:
        """The first failure, if any."""
        return self._failure

    def submit(self, piece: Piece, data: Buffer, give_back: Callable[[], None]) -> None:
        """Queues a piece; raises at once when writing has already failed.

        Args:
          piece: A piece of the plan.
          data: Its bytes, which must not change until ``give_back`` is called.
          give_back: Called when they are written, or never will be.
        """
        with self._lock:  # nothing is queued behind what ends the threads
            failure = self._failure
            if failure is None:
                self._queue.put(functools.partial(self._write_and_give_back, piece, data, give_back))
                return
        give_back()
        raise failure

    def finish(self) -> None:
        """Waits until every piece of the plan is durable; raises the first failure."""
        self._end_threads()
        self._is_over.wait()
        if self._failure is not None:
            raise self._failure
        self._join(None)
        if any(self._pieces_left):
            raise RuntimeError("pieces of the plan were never submitted")

    def stop(self, failure: BaseException) -> None:
        """Writes nothing more; waits for nothing."""
        self._note(failure)
        self._is_open.set()

    def abandon(self, failure: BaseException, timeout_s: float | None = None) -> bool:
        """Stops writing and waits for the threads; what is open gets closed.

        Args:
          failure: Why.
          timeout_s: Most seconds to wait; None waits until all have ended.

        Returns:
          Whether all threads have ended.
        """
        self.stop(failure)
        self._end_threads()
        return self._join(timeout_s)

    def _note(self, failure: BaseException) -> bool:
        """Keeps the first failure; returns whether it is this one."""
        with self._lock:
            is_first = self._failure is None
            self._failure = self._failure or failure
        self._is_over.set()
        return is_first

    def _end_threads(self) -> None:
        for _ in self._threads:
            self._queue.put(None)

    def _join(self, timeout_s: float | None) -> bool:
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        for thread, ended in zip(self._threads, self._ended, strict=True):
            if thread.ident is not None:
                # An interrupt of `join` makes Python 3.11 believe that the thread has ended.
                if not ended.wait(None if deadline is None else max(0.0, deadline - time.monotonic())):
                    return False
                thread.join()
        return True

    def _work(self, number: int) -> None:
        try:
            self._is_open.wait()
            # The calls sync small objects, one after the other: the disk would be idle if all threads began with them.
            if number % 2 == 0:
                self._make_calls()
            while (work := self._queue.get()) is not None:
                work()
                del work  # the bytes may belong to the caller: hold them no longer than needed
            self._make_calls()
        finally:
            with self._lock:
                self._running -= 1
                is_last = self._running == 0
            if is_last:
                self._close()
            self._ended[number].set()

    def _make_calls(self) -> None:
        while self._calls:
            with contextlib.suppress(IndexError):  # another thread took the last one
                self._call(self._calls.popleft())

    def _close(self) -> None:
        """Closes what a failure left open; called by the last thread."""
        for writer in self._writers.values():
            with contextlib.suppress(OSError):
                writer.abandon()
        self._writers.clear()
        self._is_over.set()

    def _call(self, call: Callable[[], None]) -> None:
        if self._failure is not None:
            return
        try:
            call()
        except BaseException as error:
            if self._note(error) and self._on_failure is not None:
                self._on_failure(error)

    def _write_and_give_back(self, piece: Piece, data: Buffer, give_back: Callable[[], None]) -> None:
        try:
            self._call(functools.partial(self._write, piece, data))
        finally:
            give_back()

    def _write(self, piece: Piece, data: Buffer) -> None:
        writer = self._open(piece.object)
        segment, *others = piece.segments
        if others:
            self._compute_checksums(piece.segments, data)
            writer.write(piece.offset, data)
        else:
            block = segment.block
            for part in writer.write_steps(piece.offset, data):
                self._compute_checksums((dataclasses.replace(segment, stored=len(part), block=block),), part)
                block += len(part) // BLOCK_BYTES
        with self._lock:
            self._pieces_left[piece.object] -= 1
            is_complete = self._pieces_left[piece.object] == 0
            if is_complete:
                del self._writers[piece.object]
        if is_complete:
            writer.finish()
        self._meter.add(piece.length)

    def _compute_checksums(self, segments: Sequence[Segment], data: Buffer) -> None:
        view = memoryview(data)
        rows: list[int] = []
        digests: list[bytes] = []
        for segment in segments:
            row = self._first_block[segment.chunk] + segment.block
            end = segment.at + segment.stored
            if segment.stored <= BLOCK_BYTES:  # a small leaf, of which a piece has thousands
                rows.append(row)
                digests.append(xxhash.xxh3_128_digest(view[segment.at : end]))
                continue
            for start in range(segment.at, end, BLOCK_BYTES):
                rows.append(row)
                digests.append(xxhash.xxh3_128_digest(view[start : min(start + BLOCK_BYTES, end)]))
                row += 1
        # One assignment for all of them takes a third of the time of one for each.
        table = np.frombuffer(self.checksums, np.uint8).reshape(-1, CHECKSUM_BYTES)
        table[rows] = np.frombuffer(b"".join(digests), np.uint8).reshape(-1, CHECKSUM_BYTES)

    def _open(self, number: int) -> ObjectWriter:
        """The writer of an object; the first of its pieces creates it."""
        with self._object_locks[number]:
            writer = self._writers.get(number)
            if writer is None:
                writer = self._store.create(self._names[number], self._plan.objects[number].length)
                with self._lock:
                    self._writers[number] = writer
        return writer
