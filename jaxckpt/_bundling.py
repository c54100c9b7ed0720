"""How do many small leaves get to every process without each of them reading all of them?

Thousands of biases and scales that are replicated would cost a program and a collective each (`_exchange`). As a
*bundle* they cost one: each process reads and verifies some of the leaves whole, its *row* of bytes; one all-gather
over one device of each process gives all rows to all; and each process places its leaves from them, as if it had read
them.

Leaves are dealt to the rows in order, by bytes. A bundle is bounded, and there are as many as it takes. Bytes are
gathered, not values, so that nothing can change them.

Deliberately not here: which leaves are bundled (`_exchange`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from ._collective import CollectiveRestore
from ._config import PIECE_BYTES
from ._fetching import ReadExecutor
from ._placement import place
from ._reading import Checkpoint
from ._resharding import plan_reads
from ._restoring import RestorePlan, destinations_of_bytes

_ALIGNMENT = 64
# Bytes of all rows of a bundle: enough that the collectives cost less than the reading.
_BUNDLE_BYTES_MAX = 64 << 20


@dataclasses.dataclass(frozen=True, slots=True)
class _Entry:
    """Where a leaf lies in a bundle: number of the wanted leaf, its row, first byte there, and bytes."""

    number: int
    row: int
    at: int
    nbytes: int


def restore_bundled(
    checkpoint: Checkpoint,
    plan: RestorePlan,
    numbers: Sequence[int],
    together: CollectiveRestore,
    *,
    bytes_max: int,
    io_threads: int,
) -> dict[int, Any]:
    """Reads leaves once in the whole group; returns them by their numbers.

    Args:
      checkpoint: What is restored.
      plan: The targets, and the boxes that this process needs of each.
      numbers: The leaves; the same in all processes.
      together: The restore of the group.
      bytes_max: Most bytes of a bundle, but for a leaf that is larger; the same in all processes.
      io_threads: Threads that read and verify.

    Raises:
      CorruptError: Stored bytes are damaged, whichever process found it.
      CoordinationError: Another process failed.

    Collective: all processes of the group.
    """
    manifest = checkpoint.manifest
    executor = ReadExecutor(checkpoint.store, manifest, threads=io_threads)
    results: dict[int, Any] = {}
    sizes = {number: manifest.spec(plan.targets[number].leaf).nbytes for number in numbers}
    bundles = _deal(sizes, together.count, min(bytes_max, _BUNDLE_BYTES_MAX))
    for bundle_number, entries in enumerate(bundles):
        length = max(entry.at + entry.nbytes for entry in entries)
        mine = [entry for entry in entries if entry.row == together.index]
        row = _read_row(checkpoint, executor, plan, mine, length)
        executor.raise_problems(f"restore {checkpoint.path!r}")
        gather = _compile(together.count, length)
        together.agree_that_all_is_well(f"bundle {bundle_number}")
        rows = _gather(gather, row, together.index, together.count)
        for entry in entries:
            target = plan.targets[entry.number]
            data = rows[entry.row, entry.at : entry.at + entry.nbytes]
            spec = manifest.spec(target.leaf)
            filled = destinations_of_bytes(target.leaf, plan.boxes[entry.number], spec, data)
            results[entry.number] = place(target, spec, None, filled)
    checkpoint.count_read(executor.bytes_read)
    return results


def _deal(sizes: dict[int, int], rows: int, bytes_max: int) -> list[list[_Entry]]:
    """Cuts the leaves into bundles, and each bundle into rows of about equal bytes."""
    bundles: list[list[_Entry]] = []
    waiting: dict[int, int] = {}
    total = 0
    for number, nbytes in sizes.items():
        stored = -(-nbytes // _ALIGNMENT) * _ALIGNMENT
        if waiting and total + stored > bytes_max:
            bundles.append(_make_rows(waiting, total, rows))
            waiting, total = {}, 0
        waiting[number] = nbytes
        total += stored
    if waiting:
        bundles.append(_make_rows(waiting, total, rows))
    return bundles


def _make_rows(sizes: dict[int, int], total: int, rows: int) -> list[_Entry]:
    entries: list[_Entry] = []
    fill = [0] * rows
    before = 0
    for number, nbytes in sizes.items():
        row = before * rows // total
        entries.append(_Entry(number, row, fill[row], nbytes))
        stored = -(-nbytes // _ALIGNMENT) * _ALIGNMENT
        fill[row] += stored
        before += stored
    return entries


def _read_row(
    checkpoint: Checkpoint, executor: ReadExecutor, plan: RestorePlan, entries: Sequence[_Entry], length: int
) -> np.ndarray[Any, Any]:
    """The leaves that this process reads, verified, each at its place."""
    manifest = checkpoint.manifest
    row = np.zeros(length, np.uint8)
    wanted = []
    for entry in entries:
        leaf = plan.targets[entry.number].leaf
        shape = manifest.spec(leaf).stored_shape
        wanted.append((leaf, [((0,) * len(shape), shape)]))
    reads = plan_reads(checkpoint.index, wanted, PIECE_BYTES, gap_bytes_max=checkpoint.store.gap_bytes_max)
    executor.check_objects(reads)
    executor.read(reads)
    if not executor.problems:
        for entry, destination in zip(entries, reads.destinations, strict=True):
            assert destination.buffer is not None
            row[entry.at : entry.at + entry.nbytes] = destination.buffer
    return row


def _compile(rows: int, length: int) -> Any:
    """The program that gives every process all rows."""
    mesh = _mesh(rows)
    argument = jax.ShapeDtypeStruct(
        (rows, length), np.uint8, sharding=NamedSharding(mesh, PartitionSpec("process"))
    )
    with jax.set_mesh(mesh):
        everywhere = NamedSharding(mesh, PartitionSpec())
        return jax.jit(lambda array: array, out_shardings=everywhere).lower(argument).compile()


def _gather(program: Any, row: np.ndarray[Any, Any], index: int, rows: int) -> np.ndarray[Any, Any]:
    mesh = _mesh(rows)
    shard = jax.device_put(row[None], mesh.devices[index])
    sharding = NamedSharding(mesh, PartitionSpec("process"))
    array = jax.make_array_from_single_device_arrays((rows, len(row)), sharding, [shard])
    gathered = jax.block_until_ready(program(array))
    with jax.transfer_guard_device_to_host("allow"):
        return np.asarray(gathered.addressable_data(0))


def _mesh(rows: int) -> Mesh:
    """One device of each process."""
    first: dict[int, Any] = {}
    for device in jax.devices():
        first.setdefault(device.process_index, device)
    devices = np.array([first[process] for process in range(rows)], dtype=object)
    assert math.prod(devices.shape) == rows
    return Mesh(devices, ("process",), axis_types=(AxisType.Auto,))
