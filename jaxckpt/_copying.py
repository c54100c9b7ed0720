"""How does a committed checkpoint get to another store, and why is what arrives whole?

The copy has the same objects under the same names, the same manifest byte for byte, and so the same data directory: a
copy is the attempt that was saved, at another place. It comes to exist as every checkpoint does (`_commit`):

    1. hold       the source's manifest and data, so that nobody deletes them meanwhile
    2. objects    each is read in pieces, compared with the checksums of its blocks, and written
    3. sync       where there is something to sync
    4. publish    the manifest                                                         <- the commit

An object that differs from its checksums ends the copy before 4, so that damage never travels. A copy that is cut off
leaves a data directory that no manifest names. The next copy of the same checkpoint goes on from there: the name of a
data directory belongs to one attempt, so that an object below it can only be ours, and on an object store an object is
seen whole and durable or not at all. Files are neither for sure, after a crash; there what is left is swept, and all is
written anew.

Memory: the objects in flight together are below a bound, or there is one; each thread has a piece besides.

Deliberately not here: which checkpoints are copied and when (`_uploading`), and what a replaced checkpoint leaves.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import errno
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import final

import xxhash

from ._commit import sweep
from ._config import BLOCK_BYTES, piece_bytes_for
from ._encoding import MANIFEST_BYTES_MAX, parse_manifest
from ._errors import CorruptError, NotFoundError, Problem, WriteError, list_problems
from ._manifest import MANIFEST_NAME
from ._parts import ChunkPlace
from ._progress import Progress, ProgressMeter
from ._reading import Checkpoint, open_checkpoint
from ._storage import Buffer, Store, allocate_aligned
from ._zarr import METADATA_NAME

# What means that bytes are lost, and not that the process or the machine lacks something.
_LOST = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EIO)


@dataclasses.dataclass(frozen=True, slots=True)
class CopyReport:
    """What a copy did.

    Attributes:
      objects_sent: Objects that were written, without the manifest.
      bytes_sent: Their bytes.
      objects_there: Objects that an earlier copy, which was cut off, had written.
    """

    objects_sent: int
    bytes_sent: int
    objects_there: int


@dataclasses.dataclass(frozen=True, slots=True)
class _Object:
    """An object of a checkpoint: with a checksum of its own, or with chunks, by their places in it."""

    name: str
    length: int
    checksum: bytes = b""
    chunks: Sequence[ChunkPlace] = ()

    def blocks(self) -> Iterator[tuple[int, bytes]]:
        """Where each block ends, and its checksum; one follows the other."""
        if not self.chunks:
            yield self.length, self.checksum
        for chunk in self.chunks:
            for number, start in enumerate(range(0, chunk.length, BLOCK_BYTES)):
                end = chunk.offset + min(start + BLOCK_BYTES, chunk.length)
                yield end, chunk.table.checksum(chunk.row, number)


def copy_checkpoint(
    source: Store,
    target: Store,
    *,
    io_threads: int,
    host_bytes_max: int,
    is_cancelled: Callable[[], bool] = lambda: False,
    on_progress: Callable[[Progress], None] | None = None,
) -> CopyReport | None:
    """Copies a committed checkpoint, verified; where one is there, it is replaced.

    Args:
      source: Where it is.
      target: Where it will be.
      io_threads: Objects in flight at a time, at most.
      host_bytes_max: Most bytes of the objects in flight; a larger object goes alone.
      is_cancelled: Asked before each object and before the commit.
      on_progress: Called from the copying threads.

    Returns:
      What was done, or None: it was cancelled, and what was written stays for the next copy.

    Raises:
      NotFoundError: There is no checkpoint, or it was replaced meanwhile.
      FormatError: Its manifest is damaged.
      CorruptError: An object is damaged or missing; nothing was committed.
      WriteError: The target refused something; nothing was committed.
    """
    checkpoint = open_checkpoint(source)
    try:
        return _copy(checkpoint, target, io_threads, host_bytes_max, is_cancelled, on_progress)
    finally:
        checkpoint.release()


def _copy(
    checkpoint: Checkpoint,
    target: Store,
    io_threads: int,
    host_bytes_max: int,
    is_cancelled: Callable[[], bool],
    on_progress: Callable[[Progress], None] | None,
) -> CopyReport | None:
    manifest_bytes = _read_manifest(checkpoint)
    objects = _list_objects(checkpoint)
    meter = ProgressMeter(sum(entry.length for entry in objects), "upload", on_progress)
    data = checkpoint.manifest.data
    with _target_errors(target):
        if not target.is_remote:
            sweep(target)
        is_resumed = data in target.names()
        target.make_directory(data)
        hold = target.hold_alone(data)
    try:
        crew = _Crew(checkpoint.store, target, data, objects, host_bytes_max, is_cancelled, meter)
        report = crew.run(io_threads, is_resumed=is_resumed)
        if is_cancelled():
            return None
        with _target_errors(target):
            target.sync()
            if not target.exists(f"{data}/{METADATA_NAME}"):
                what = "somebody deleted what was copied; is another manager at work there?"
                raise FileNotFoundError(errno.ENOENT, what, f"{target.path}/{data}")
            target.publish(MANIFEST_NAME, manifest_bytes)
        return report
    finally:
        if hold is not None:
            hold.release()


def _read_manifest(checkpoint: Checkpoint) -> bytes:
    """The bytes of the manifest that was opened."""
    try:
        manifest_bytes = checkpoint.store.read(MANIFEST_NAME, MANIFEST_BYTES_MAX)
        if parse_manifest(manifest_bytes, checkpoint.path).data == checkpoint.manifest.data:
            return manifest_bytes
    except FileNotFoundError:
        pass
    raise NotFoundError(
        f"the checkpoint {checkpoint.path!r} was replaced or deleted while it was to be copied"
    )


def _list_objects(checkpoint: Checkpoint) -> list[_Object]:
    """All objects that the manifest names, but for itself."""
    manifest = checkpoint.manifest
    objects = [
        _Object(entry.name, entry.length, entry.checksum) for entry in (*manifest.objects, *manifest.parts)
    ]
    places: dict[str, list[ChunkPlace]] = {}
    for place in checkpoint.index.places():
        places.setdefault(place.object, []).append(place)
    for name, inside in places.items():
        inside.sort(key=lambda place: place.offset)
        objects.append(_Object(name, inside[0].object_length, chunks=inside))
    return objects


@final
class _Crew:
    """The threads that send the objects of one checkpoint."""

    def __init__(
        self,
        source: Store,
        target: Store,
        data: str,
        objects: Sequence[_Object],
        host_bytes_max: int,
        is_cancelled: Callable[[], bool],
        meter: ProgressMeter,
    ) -> None:
        self._source = source
        self._target = target
        self._data = data
        self._host_bytes_max = host_bytes_max
        self._piece_bytes = piece_bytes_for(host_bytes_max)
        self._is_cancelled = is_cancelled
        self._meter = meter
        self._is_resumed = False
        self._condition = threading.Condition()
        self._waiting = collections.deque(objects)
        self._in_flight_bytes = 0
        self._failure: BaseException | None = None
        self._objects_sent = 0
        self._bytes_sent = 0
        self._objects_there = 0

    def run(self, io_threads: int, *, is_resumed: bool) -> CopyReport:
        """Sends all; the calling thread is one of them. Raises the first failure when all have ended."""
        self._is_resumed = is_resumed
        helpers = [
            threading.Thread(target=self._work, name=f"jaxckpt-copy-{number}")
            for number in range(1, min(io_threads, len(self._waiting)))
        ]
        started: list[threading.Thread] = []
        for helper in helpers:
            try:
                helper.start()
            except (
                RuntimeError
            ):  # a program that ends starts no more threads, and a system may have none left
                break
            started.append(helper)
        self._work()
        for helper in started:
            helper.join()
        if self._failure is not None:
            raise self._failure
        return CopyReport(self._objects_sent, self._bytes_sent, self._objects_there)

    def _work(self) -> None:
        piece: Buffer | None = None
        while (entry := self._take()) is not None:
            try:
                if piece is None:
                    piece = allocate_aligned(self._piece_bytes)
                is_sent = self._send(entry, piece)
            except BaseException as error:  # told by the calling thread
                with self._condition:
                    self._failure = self._failure or error
            else:
                with self._condition:
                    self._objects_sent += is_sent
                    self._bytes_sent += entry.length * is_sent
                    self._objects_there += not is_sent
            finally:
                with self._condition:
                    self._in_flight_bytes -= self._memory_of(entry)
                    self._condition.notify_all()

    def _take(self) -> _Object | None:
        """The next object, when there is room for it."""
        with self._condition:
            self._condition.wait_for(self._has_room)
            if self._failure is not None or not self._waiting or self._is_cancelled():
                return None
            entry = self._waiting.popleft()
            self._in_flight_bytes += self._memory_of(entry)
            return entry

    def _has_room(self) -> bool:
        if self._failure is not None or not self._waiting or not self._in_flight_bytes:
            return True
        return self._in_flight_bytes + self._memory_of(self._waiting[0]) <= self._host_bytes_max

    def _memory_of(self, entry: _Object) -> int:
        """Bytes that count while an object is in flight; who sends it whole has it twice for a moment."""
        return 2 * entry.length if self._target.is_remote else entry.length

    def _send(self, entry: _Object, piece: Buffer) -> bool:
        """Writes an object unless it is there; whether it was written."""
        if not entry.name.startswith(f"{self._data}/"):
            return self._publish(entry)
        if self._is_resumed and self._is_there(entry):
            self._meter.add(entry.length)
            return False
        self._require_length(entry)
        with _target_errors(self._target):
            writer = self._target.create(entry.name, entry.length)
        try:
            verifier = _Verifier(self._source, entry)
            for offset in range(0, entry.length, len(piece)):
                part = piece[: min(len(piece), entry.length - offset)]
                with _source_errors(self._source, entry):
                    count = self._source.read_into(entry.name, offset, part)
                if count != len(part):
                    raise _damage(self._source, entry, "length", f"ends at byte {offset + count}")
                verifier.add(offset, part)
                with _target_errors(self._target):
                    writer.write(offset, part)
                self._meter.add(len(part))
            with _target_errors(self._target):
                writer.finish()
        except BaseException:
            writer.abandon()
            raise
        return True

    def _publish(self, entry: _Object) -> bool:
        """Writes an object that attempts share, the group metadata beside the manifest."""
        self._require_length(entry)
        with _source_errors(self._source, entry):
            data = self._source.read(entry.name, entry.length)
        if len(data) != entry.length or xxhash.xxh3_128_digest(data) != entry.checksum:
            raise _damage(self._source, entry, "checksum", "its checksum differs")
        with _target_errors(self._target):
            is_there = self._target.exists(entry.name) and self._target.read(entry.name, len(data)) == data
            if not is_there:
                self._target.publish(entry.name, data)
        self._meter.add(entry.length)
        return not is_there

    def _is_there(self, entry: _Object) -> bool:
        with _target_errors(self._target):
            try:
                return self._target.has_length(entry.name, entry.length)
            except FileNotFoundError:
                return False

    def _require_length(self, entry: _Object) -> None:
        with _source_errors(self._source, entry):
            is_right = self._source.has_length(entry.name, entry.length)
        if not is_right:
            message = f"does not have the {entry.length} bytes that it was written with"
            raise _damage(self._source, entry, "length", message)


@final
class _Verifier:
    """Compares an object, piece by piece, with the checksums of its blocks."""

    def __init__(self, source: Store, entry: _Object) -> None:
        self._source = source
        self._entry = entry
        self._blocks = entry.blocks()
        self._end, self._checksum = next(self._blocks)  # of the block that the next byte belongs to
        self._hasher = xxhash.xxh3_128()

    def add(self, offset: int, piece: Buffer) -> None:
        """Takes the next bytes; raises `CorruptError` when a block is not what was written."""
        start = 0
        while start < len(piece):
            stop = min(self._end - offset, len(piece))
            self._hasher.update(piece[start:stop])
            start = stop
            if offset + stop == self._end:
                if self._hasher.digest() != self._checksum:
                    what = f"the checksum of the block that ends at byte {self._end} differs"
                    raise _damage(self._source, self._entry, "checksum", what)
                self._hasher.reset()
                self._end, self._checksum = next(self._blocks, (self._entry.length, b""))


def _damage(source: Store, entry: _Object, kind: str, what: str) -> CorruptError:
    problem = Problem(None, kind, f"object {entry.name}: {what}")
    headline = f"cannot copy {source.path!r}: stored data is damaged"
    return CorruptError(list_problems(headline, [problem]), [problem])


@contextlib.contextmanager
def _source_errors(source: Store, entry: _Object) -> Generator[None]:
    """What is lost is damage; anything else may be there at the next try."""
    try:
        yield
    except OSError as error:
        if error.errno not in _LOST:
            raise
        what = f"it cannot be read ({error.strerror or error})"
        raise _damage(source, entry, "missing", what) from error


@contextlib.contextmanager
def _target_errors(target: Store) -> Generator[None]:
    try:
        yield
    except OSError as error:
        message = f"cannot copy a checkpoint to {target.path!r}: {error.strerror or error}"
        if error.filename is not None:
            message += f" ({error.filename})"
        raise WriteError(message, error.errno) from error
