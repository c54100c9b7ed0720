"""Every number that a user can turn, with where its default comes from."""

from __future__ import annotations

import dataclasses
import os
from typing import Literal

MIB = 1 << 20

Staging = Literal["auto", "pool", "pinned", "device"]

# A block is what one checksum covers and so the least that a partial read fetches. One MiB costs 16 bytes of
# manifest for each MiB stored, and xxh3 runs at 20 to 30 GB/s on blocks of this size. Part of format 1.
BLOCK_BYTES = MIB

# Replicas share the writing of a shard if it can be cut into parts of this size. Smaller ones would cost more in the
# tables of the chunks and in seeks than they win.
SPLIT_BYTES_MIN = 128 << 10

# What one write call carries. Several are in flight at a time, so that 8 MiB is far above the size at which
# disks reach full speed and far below any memory budget. A multiple of BLOCK_BYTES.
PIECE_BYTES = 8 * MIB

# The least staging that makes progress: one piece of one block for each of two threads.
HOST_BYTES_MIN = 2 * BLOCK_BYTES


@dataclasses.dataclass(frozen=True, slots=True)
class SaveOptions:
    """How a save cuts, stages and writes a tree.

    Attributes:
      chunk_bytes_max: A shard is cut along its leading axis into chunks of at most this many bytes. When no
        divisor of the axis gives a chunk between a sixteenth of this and this, the chunk is larger, up to 4 GiB.
        Default 64 MiB: what object stores take in one request, and what a reader can hold at once. On an object
        store it is no more than a 64th of ``host_bytes_max``, since an object is in memory until it is sent.
      pack_bytes_max: Chunks of fewer bytes go into shared pack objects. 0 packs nothing: every array is then a
        Zarr array of its own. Default 4 MiB: creating and syncing a file costs about 1 ms, the time that a disk
        takes for 2 MiB (jaxckpt/DESIGN.md, "Packs").
      host_bytes_max: Hard cap in bytes on staging memory, over all saves of the machine: processes of a group that
        run on one machine share it equally. A small cap only makes saving slower; `save_async` then waits for room
        before it returns. The floor is 2 MiB for each process. None: half of the machine's memory.
      staging: How the bytes leave the devices. ``"pool"`` waits for the values and copies them into reused host
        buffers (CPU). ``"pinned"`` copies shards to pinned host memory with one batched transfer that runs after the
        computation in flight (GPU, TPU); a step that donates them waits for it on the device. ``"device"`` copies
        them on the device, and the copies to pinned host memory in the background: the step waits for the first
        copy only and `save_async` for no room on the host, but device memory must hold the copies for as long as the
        transfer takes; where it is refused, this is ``"pinned"``. ``"auto"``: ``"pool"`` on CPU; on accelerators
        ``"device"`` if memory has room beside all that was in use at its peak, else ``"pinned"``. That is by
        reasoning: ``python -m benchmarks.gpu`` measures it. In a blocking `save` ``"device"`` is ``"pinned"``.
      io_threads: Threads that checksum and write. Default 8, also on two cores: they mostly wait, and past the page
        cache they are a tenth faster than 4 (jaxckpt/DESIGN.md, "Input and output").
      timeout_s: Most seconds that a process of a group waits for the others at one point of a save. A failure is
        known everywhere in about a second; this is for processes that hang. Default 600, as long as a large save
        takes on slow storage.
    """

    chunk_bytes_max: int = 64 * MIB
    pack_bytes_max: int = 4 * MIB
    host_bytes_max: int | None = None
    staging: Staging = "auto"
    io_threads: int = 8
    timeout_s: float = 600.0

    def __post_init__(self) -> None:
        _require_at_least("chunk_bytes_max", self.chunk_bytes_max, 1)
        _require_at_least("pack_bytes_max", self.pack_bytes_max, 0)
        _require_at_least("io_threads", self.io_threads, 1)
        _require_at_least("timeout_s", self.timeout_s, 0)
        if self.host_bytes_max is not None:
            _require_at_least("host_bytes_max", self.host_bytes_max, 1)
        if self.staging not in ("auto", "pool", "pinned", "device"):
            raise ValueError(f"staging must be 'auto', 'pool', 'pinned' or 'device', not {self.staging!r}")


@dataclasses.dataclass(frozen=True, slots=True)
class RestoreOptions:
    """How a restore reads and places a tree.

    Attributes:
      host_bytes_max: Cap in bytes on host memory beyond the arrays that are returned. On accelerators a restore
        goes through the tree in waves, of which two fit. The floor is 2 MiB. None: half of the machine's memory.
      device_bytes_max: Most bytes that moving a leaf between processes (``exchange=``) may take on a device beyond
        the leaf itself; a leaf that needs more is read by each process. None: a quarter of what is free on the
        fullest device, and on CPU a device's share of ``host_bytes_max``. The least of all processes holds.
      io_threads: Threads that read and verify. Default 8, which reads a cold disk faster than 4; what the kernel has in
        memory is read by no more than there are processors.
      timeout_s: As for `SaveOptions`.
    """

    host_bytes_max: int | None = None
    device_bytes_max: int | None = None
    io_threads: int = 8
    timeout_s: float = 600.0

    def __post_init__(self) -> None:
        _require_at_least("io_threads", self.io_threads, 1)
        _require_at_least("timeout_s", self.timeout_s, 0)
        if self.host_bytes_max is not None:
            _require_at_least("host_bytes_max", self.host_bytes_max, 1)
        if self.device_bytes_max is not None:
            _require_at_least("device_bytes_max", self.device_bytes_max, 0)


def resolve_host_bytes_max(host_bytes_max: int | None, processes: int = 1) -> int:
    """The cap in bytes of one process: the given one but for its floor, or half of the machine's memory.

    Args:
      host_bytes_max: As in the options.
      processes: How many share the machine.
    """
    if host_bytes_max is None:
        host_bytes_max = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    return max(host_bytes_max // processes, HOST_BYTES_MIN)


def piece_bytes_for(host_bytes_max: int) -> int:
    """Bytes of one piece: whole blocks, and small enough that two fit the cap."""
    return max(BLOCK_BYTES, min(PIECE_BYTES, host_bytes_max // 2 // BLOCK_BYTES * BLOCK_BYTES))


def least_piece_bytes(host_bytes_max: int | None, process_count: int) -> int:
    """Bytes of a piece in the process of a group that has the least memory, however the group is spread out."""
    if host_bytes_max is None:
        return PIECE_BYTES
    return piece_bytes_for(resolve_host_bytes_max(host_bytes_max, process_count))


def _require_at_least(name: str, value: float, least: int) -> None:
    if value < least:
        raise ValueError(f"{name} must be at least {least}, not {value}")
