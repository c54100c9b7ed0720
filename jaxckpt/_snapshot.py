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
* ``device`` (GPU, TPU): the shards are first copied on their devices, by a compiled function that runs behind the
  computation in flight. A thread transfers the copies to ``pinned_host`` memory as far as there is room, and gives up
  each on the way. The caller waits for no room, and the donating step for a copy within the device's memory, some tens
  of times faster than one to the host.
* ``pool`` (CPU, where the values are in host memory already): wait for the values and copy them, piece by piece, into
  buffers that are reused from save to save, since memory touched for the first time costs five times its copy.
* ``direct`` (a blocking `save` on CPU): arrays of JAX are not copied, since the caller waits until everything is
  written. Views are held meanwhile, so that a thread that donates the arrays anyway cannot disturb the save.

On accelerators ``auto`` takes ``device`` where memory has room for the copy beside all that training took at its peak
(`DeviceMemory`), and ``pinned`` elsewhere: a save must never take the memory of a step. This choice follows from how
the runtimes order copies; it is not measured yet. ``python -m benchmarks.gpu`` compares the ways. What cannot be seen
when the choice is made: a later step that takes more than all before. Staging says how bytes reach the writer, never
what is written, so that the processes of a group may choose differently.

Memory. `HostMemory` counts every byte of staging of the process against ``host_bytes_max``. When there is no room,
the caller of `save_async` waits until the writer has released some. A shard that is larger than the room is cut, on
its device if the host cannot view it.

Invariant: when `stage` returns, every array, NumPy leaf and Python value of the tree may be donated, deleted or
overwritten, and no reference to a leaf is kept. Deliberately not here: any knowledge of files or of the manifest.
"""

from __future__ import annotations

import collections
import functools
import threading
from collections.abc import Iterator
from typing import Literal, final

from ._config import MIB
from ._garbage import collection_paused
from ._layout import WritePlan
from ._leaves import NO_LEAVES, Leaves, StreamedArray
from ._pinned import PinnedSnapshot, pinned_sharding
from ._staging import Snapshot, Submit
from ._storage import processor_count
from ._viewing import HostReader

# From here on a second thread that copies pays for its start.
_SHARED_BYTES_MIN = 32 * MIB
# Smaller parts are work of Python's, of which only one thread can do any.
_SHARED_SEGMENT_BYTES_MIN = MIB


def choose_staging(leaves: Leaves, staging: str, *, is_blocking: bool) -> str:
    """``"pool"``, ``"pinned"``, ``"device"`` or, if that is for `PinnedSnapshot` to say, ``"device if room"``.

    Args:
      leaves: The leaves of the tree; ``"auto"`` goes by the devices that hold the arrays.
      staging: As in the options.
      is_blocking: Who waits for the save anyway gains nothing by a copy on the device.
    """
    if staging == "auto":
        staging = "device if room" if _are_on_accelerator(leaves) else "pool"
    return "pinned" if is_blocking and staging != "pool" else staging


def _are_on_accelerator(leaves: Leaves) -> bool:
    for sharding in leaves.kinds.shardings:
        for device in sharding.addressable_devices:
            if device.platform != "cpu" and pinned_sharding(device) is not None:
                return True
            break  # they are all of one kind; none is here when other processes have the whole array
    return False


@final
class PoolSnapshot(Snapshot):
    """Copies everything into reused host buffers before `stage` returns.

    One core copies half as fast as the memory is: where there is much to copy, two threads do it.
    """

    def stage(self, submit: Submit) -> None:
        leaves, self._leaves = self._leaves, NO_LEAVES
        # Each piece is copied by whoever asks first.
        numbers = iter(self._plan.interleaved)
        if not self._is_worth_two_threads(leaves):
            self._copy_pieces(leaves, numbers, submit)
            return
        failures: list[BaseException] = []

        def help_to_copy() -> None:
            try:
                self._copy_pieces(leaves, numbers, submit)
            except BaseException as error:  # the caller raises it
                failures.append(error)
                collections.deque(numbers, maxlen=0)  # nothing more is wanted

        helper = threading.Thread(target=help_to_copy, name="jaxckpt-copy")
        try:
            helper.start()
        except RuntimeError:  # the system has no thread left; one can do it alone
            self._copy_pieces(leaves, numbers, submit)
            return
        try:
            self._copy_pieces(leaves, numbers, submit)
        except BaseException:
            collections.deque(numbers, maxlen=0)
            self.give_up()  # the helper must not wait for room
            raise
        finally:
            helper.join()
        if failures:
            raise failures[0]

    def _is_worth_two_threads(self, leaves: Leaves) -> bool:
        """Whether most of the work is copying bytes, which needs no lock of Python's."""
        nbytes = sum(piece.length for piece in self._plan.pieces)
        segments = sum(len(piece.segments) for piece in self._plan.pieces)
        if nbytes < max(_SHARED_BYTES_MIN, segments * _SHARED_SEGMENT_BYTES_MIN) or processor_count() == 1:
            return False
        return not any(isinstance(array, StreamedArray) for array in leaves.arrays)

    def _copy_pieces(self, leaves: Leaves, numbers: Iterator[int], submit: Submit) -> None:
        reader = HostReader(leaves, self._plan)
        for number in numbers:
            self._fill_piece(self._plan.pieces[number], functools.partial(reader.copy_piece, number), submit)

    def drain(self, submit: Submit) -> None:
        """Nothing is left to do."""


@final
class DirectSnapshot(Snapshot):
    """Hands over views of the arrays themselves, for a caller who waits.

    What goes into packs is assembled in buffers. NumPy arrays are copied, since other threads of the program may write
    into them between the checksum and the write.
    """

    def stage(self, submit: Submit) -> None:
        reader = HostReader(self._leaves, self._plan)
        has_streams = any(isinstance(array, StreamedArray) for array in self._leaves.arrays)
        self._leaves = NO_LEAVES
        for number in range(len(self._plan.pieces)) if has_streams else self._plan.interleaved:
            piece = self._plan.pieces[number]
            segment = piece.segments[0]
            if (
                len(piece.segments) == 1
                and segment.stored == segment.hi - segment.lo
                and reader.is_constant_view(segment)
            ):
                submit(piece, reader.read(segment), _nothing)
            else:
                self._fill_piece(piece, functools.partial(reader.copy_piece, number), submit)

    def drain(self, submit: Submit) -> None:
        """Nothing is left to do."""


def _nothing() -> None:
    """Memory that belongs to the caller is not given back."""


@collection_paused()
def take_snapshot(
    kind: str, leaves: Leaves, plan: WritePlan, bytes_max: int, piece_bytes: int
) -> PoolSnapshot | PinnedSnapshot | DirectSnapshot:
    """The snapshot of a kind that `choose_staging` gives, or of ``"direct"``."""
    if kind == "pool":
        return PoolSnapshot(leaves, plan, bytes_max, piece_bytes)
    if kind == "direct":
        return DirectSnapshot(leaves, plan, bytes_max, piece_bytes)
    copies: dict[str, Literal["none", "if room", "all"]] = {
        "pinned": "none",
        "device if room": "if room",
        "device": "all",
    }
    return PinnedSnapshot(leaves, plan, bytes_max, piece_bytes, copies[kind])
