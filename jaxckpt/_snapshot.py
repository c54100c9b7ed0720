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

from collections.abc import Sequence
from typing import final

import jax

from ._layout import WritePlan
from ._leaves import Leaf
from ._pinned import PinnedSnapshot, pinned_sharding
from ._staging import Snapshot, Submit
from ._viewing import HostReader


def choose_staging(leaves: Sequence[Leaf], staging: str) -> str:
    """``"pinned"`` or ``"pool"``, by the devices that hold the arrays."""
    if staging != "auto":
        return staging
    for leaf in leaves:
        if isinstance(leaf.data, jax.Array):
            for device in leaf.data.sharding.addressable_devices:
                if device.platform != "cpu" and pinned_sharding(device) is not None:
                    return "pinned"
                break  # they are all of one kind; none is here when other processes have the whole array
    return "pool"


@final
class PoolSnapshot(Snapshot):
    """Copies everything into reused host buffers before `stage` returns."""

    def stage(self, submit: Submit) -> None:
        reader = HostReader(self._leaves)
        self._leaves = ()
        for piece in self._plan.pieces:
            self._copy_piece(piece, reader.copy_to, submit)

    def drain(self, submit: Submit) -> None:
        """Nothing is left to do."""


@final
class DirectSnapshot(Snapshot):
    """Hands over views of the arrays themselves, for a caller who waits; only packs are assembled in buffers."""

    def stage(self, submit: Submit) -> None:
        reader = HostReader(self._leaves)
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


def take_snapshot(
    kind: str, leaves: Sequence[Leaf], plan: WritePlan, bytes_max: int, piece_bytes: int
) -> PoolSnapshot | PinnedSnapshot | DirectSnapshot:
    """The snapshot of a kind: ``"pool"``, ``"pinned"`` or ``"direct"``."""
    classes = {"pool": PoolSnapshot, "pinned": PinnedSnapshot, "direct": DirectSnapshot}
    return classes[kind](leaves, plan, bytes_max, piece_bytes)
