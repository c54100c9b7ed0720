"""Which process writes which chunk, so that each is written once and all processes write equally much?

Every process plans the writing of the whole tree, from what all of them know: shapes, shardings and the devices of
every process. The same input gives the same plan everywhere, so nobody has to be asked. That takes integers only, sorts
that keep the order of equals, and no look at who is planning.

1. The shards of a leaf become chunks of one shape (`cut_shard`), whoever holds them. Shards that only one process
   holds are cut as if it were alone. Shards that several processes hold are cut finer, so that these can share the
   writing of one: to an eighth of the bytes that a process writes on average, but not below ``split_bytes_min``. No
   plan is better than that average, so a process that gets one chunk too many writes about an eighth more than it
   must. A leaf that is small in its tree is not cut at all: there are enough others to balance it.
2. Leaves take their turns by the number of processes that hold a shard, the fewest first, and among equals by the
   bytes of a chunk, the largest first. What one process alone can write is thereby settled before anybody chooses:
   host values, which process 0 writes, and shards without replicas. Who can choose fills up the gaps that it leaves.
3. Each chunk goes to that process, of those that hold it, which has the fewest bytes so far. All chunks of a leaf
   have equal bytes, so this need not be done chunk by chunk: `_deal` computes how many each process gets. It does
   that for all shards at once whose sets of processes are disjoint, since they do not touch each other's loads;
   shards with the same set are one deal. Where sets overlap without being equal, they are dealt in several *waves*.
4. A process gets runs of neighbouring chunks.

Shards of less than 16 MiB are cut further, in halves, for those who read them: see `_halve`.

Limits. A shard whose leading axis has no useful divisor, such as a large prime, is not cut, and one process writes all
of it. Trees with fewer chunks than processes leave some without work. Bytes are balanced, not seconds: a process whose
storage is slower gets no less. That large replicated leaves come last costs balance where they cannot be cut.

Deliberately not here: where a process puts its chunks (`_layout`), and any communication (`_processes`).

Source: ByteCheckpoint (NSDI 2025, arXiv 2407.20143) and PyTorch's distributed checkpoints give each replicated part
of a tensor to the process with the fewest bytes so far.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any, final

import numpy as np

from ._config import BLOCK_BYTES
from ._layout import LeafExtent, Share, cut_shard
from ._shardings import ShardMap

# Replicated shards are cut so that a process's average part of the tree has at least so many chunks.
_CHUNKS_PER_PROCESS = 8

# More devices than those that saved need parts of shards, and read whole checksum blocks. A shard of 16 blocks has
# boundaries enough; a smaller one is cut in halves, which is where a sharding over twice the devices divides it. Parts
# below this size would cost more in the tables than the bytes that are read twice.
_HALVED_SHARD_BYTES_END = 16 * BLOCK_BYTES
_HALVED_BYTES_MIN = 128 << 10
_HALVED_INTO_MAX = 8

Array = np.ndarray[Any, Any]


def share_writes(
    leaves: Sequence[LeafExtent | None], process_count: int, *, chunk_bytes_max: int, split_bytes_min: int
) -> list[Share | None]:
    """Gives every chunk of a tree to one of the processes that hold it.

    Args:
      leaves: The leaves of the tree; None for those that lie in the manifest. What a process has for itself has no
        ``shards``: every process has it, and process 0 writes it.
      process_count: Number of processes of the job.
      chunk_bytes_max: Most bytes of a chunk, see `cut_shard`.
      split_bytes_min: Shards of fewer than twice these bytes are not cut only to share their writing; larger ones
        not into chunks that are much smaller than this.

    Returns:
      For each leaf its share; None where the leaf is None. A leaf without elements has no chunks.
    """
    holders = _HolderTable()
    total_bytes = sum(math.prod(leaf.shape) * leaf.itemsize for leaf in leaves if leaf is not None)
    useful_bytes = -(-total_bytes // (process_count * _CHUNKS_PER_PROCESS))
    split_bytes = min(chunk_bytes_max, max(split_bytes_min, useful_bytes))
    cuts: dict[int, _Cut] = {}
    for number, leaf in enumerate(leaves):
        if leaf is not None:
            cuts[number] = _cut(
                leaf, holders.find(leaf.shards), chunk_bytes_max, split_bytes_min, split_bytes
            )
    dealer = _Dealer(process_count)
    shares: list[Share | None] = [None] * len(leaves)
    for number in sorted(cuts, key=lambda number: (cuts[number].holders.most, -cuts[number].chunk_bytes)):
        shares[number] = Share(cuts[number].chunk_shape, dealer.deal(cuts[number]))
    return shares


# --- which processes hold a shard -----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class _Wave:
    """Sets of processes, each pair of them disjoint, and the shards that they hold.

    Attributes:
      processes: int64[sets, most members]: the members of each set; sets with fewer repeat their first one.
      is_member: bool, of the same shape: False where a member is repeated.
      sizes: Number of shards that each set holds.
      shards: Numbers of these shards, set by set.
    """

    processes: Array
    is_member: Array
    sizes: Array
    shards: Array


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class _Holders:
    """Which processes hold each shard of an array.

    Attributes:
      most: Most processes that hold one shard.
      only: For each shard the process that holds it, if there is one for each; else None.
      waves: Who can choose among whom; empty if nobody can.
    """

    most: int
    only: Array | None
    waves: tuple[_Wave, ...]


@final
class _HolderTable:
    """Finds holders once for all leaves of a tree whose maps have the same arrays."""

    def __init__(self) -> None:
        self._found: dict[tuple[int, int], _Holders] = {}

    def find(self, shards: ShardMap | None) -> _Holders:
        if shards is None:
            return _ON_PROCESS_0
        # The leaves keep the arrays alive, so no other array has these ids meanwhile.
        key = id(shards.shards), id(shards.processes)
        if key not in self._found:
            self._found[key] = _find_holders(shards)
        return self._found[key]


_ON_PROCESS_0 = _Holders(1, np.zeros(1, np.int64), ())


def _find_holders(shards: ShardMap) -> _Holders:
    factor = int(shards.processes.max()) + 1
    pairs = np.unique(shards.shards * factor + shards.processes)
    shard, process = np.divmod(pairs, factor)
    counts = np.bincount(shard)
    most = int(counts.max())
    if most == 1:
        return _Holders(1, process, ())
    column = np.arange(len(pairs)) - np.repeat(np.cumsum(counts) - counts, counts)
    table = np.full((len(counts), most), -1, np.int64)
    table[shard, column] = process
    sets, set_of_shard = np.unique(table, axis=0, return_inverse=True)
    set_of_shard = set_of_shard.reshape(-1)
    by_set = np.argsort(set_of_shard, kind="stable")
    sizes = np.bincount(set_of_shard)
    waves: list[_Wave] = []
    for members in _disjoint_rows(sets):
        processes = sets[members]
        is_member = processes >= 0
        shards_of_wave = by_set[np.isin(set_of_shard[by_set], members)]
        waves.append(
            _Wave(np.where(is_member, processes, processes[:, :1]), is_member, sizes[members], shards_of_wave)
        )
    return _Holders(most, None, tuple(waves))


def _disjoint_rows(sets: Array) -> list[Array]:
    """Numbers of rows, ascending, in few lists within which no two rows have a process in common."""
    members = sets[sets >= 0]
    if len(np.unique(members)) == len(members):
        return [np.arange(len(sets))]
    taken: list[set[int]] = []
    rows: list[list[int]] = []
    for row, processes in enumerate(sets.tolist()):
        own = {process for process in processes if process >= 0}
        for wave in itertools.count():
            if wave == len(taken):
                taken.append(set())
                rows.append([])
            if taken[wave].isdisjoint(own):
                taken[wave] |= own
                rows[wave].append(row)
                break
    return [np.array(numbers) for numbers in rows]


# --- into which chunks is a leaf cut --------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class _Cut:
    """A leaf as chunks.

    Attributes:
      holders: Who holds its shards.
      chunk_shape: Shape of every chunk.
      chunk_bytes: Bytes of a chunk; 0 if the leaf has no elements.
      shard_grid: Number of shards along each axis.
      chunk_grid: Number of chunks of one shard along each axis.
    """

    holders: _Holders
    chunk_shape: tuple[int, ...]
    chunk_bytes: int
    shard_grid: tuple[int, ...]
    chunk_grid: tuple[int, ...]


def _cut(
    leaf: LeafExtent, holders: _Holders, chunk_bytes_max: int, split_bytes_min: int, split_bytes: int
) -> _Cut:
    shard_shape: tuple[int, ...] = ()
    shard_grid: tuple[int, ...] = ()
    if leaf.shards is not None:
        shard_shape, shard_grid = leaf.shards.shard_shape, leaf.shards.grid
    shard_shape += leaf.shape[len(shard_shape) :]
    shard_grid += (1,) * (len(leaf.shape) - len(shard_grid))
    shard_bytes = math.prod(shard_shape) * leaf.itemsize
    is_split = holders.most > 1 and shard_bytes >= 2 * split_bytes_min
    chunk_shape = cut_shard(shard_shape, leaf.itemsize, split_bytes if is_split else chunk_bytes_max)
    if shard_grid and shard_grid[0] > 1 and shard_bytes < _HALVED_SHARD_BYTES_END:
        chunk_shape = _halve(shard_shape, chunk_shape, leaf.itemsize)
    chunk_bytes = math.prod(chunk_shape) * leaf.itemsize if shard_bytes else 0
    chunk_grid = tuple(size // chunk for size, chunk in zip(shard_shape, chunk_shape, strict=True))
    return _Cut(holders, chunk_shape, chunk_bytes, shard_grid, chunk_grid)


def _halve(shard_shape: tuple[int, ...], chunk_shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """Cuts along the first axis into up to eight parts, so that twice or eight times the devices read no byte twice."""
    chunk = list(chunk_shape)
    while (
        chunk
        and chunk[0] % 2 == 0
        and shard_shape[0] // chunk[0] < _HALVED_INTO_MAX
        and math.prod(chunk) * itemsize >= 2 * _HALVED_BYTES_MIN
    ):
        chunk[0] //= 2
    return tuple(chunk)


# --- who writes a chunk ---------------------------------------------------------------------------------------


@final
class _Dealer:
    """Counts the bytes of every process while it deals the chunks of leaf after leaf."""

    def __init__(self, process_count: int) -> None:
        self._loads = np.zeros(process_count, np.int64)
        self._owners_without_replicas: dict[tuple[int, tuple[int, ...], tuple[int, ...]], Array] = {}

    def deal(self, cut: _Cut) -> Array:
        """Owners of the chunks in C order of the chunk grid of the leaf."""
        if not cut.chunk_bytes:
            return _read_only(np.zeros(0, np.uint32))
        chunks_per_shard = math.prod(cut.chunk_grid)
        if cut.holders.only is not None:
            self._book(cut.holders.only, chunks_per_shard * cut.chunk_bytes)
            key = id(cut.holders), cut.shard_grid, cut.chunk_grid
            if key not in self._owners_without_replicas:
                owners = np.repeat(cut.holders.only.astype(np.uint32), chunks_per_shard)
                self._owners_without_replicas[key] = _to_chunk_grid(owners, cut)
            return self._owners_without_replicas[key]
        owners = np.empty((math.prod(cut.shard_grid), chunks_per_shard), np.uint32)
        for wave in cut.holders.waves:
            chosen = self._choose(wave, chunks_per_shard, cut.chunk_bytes)
            owners[wave.shards] = chosen.reshape(-1, chunks_per_shard)
        return _to_chunk_grid(owners, cut)

    def _choose(self, wave: _Wave, chunks_per_shard: int, chunk_bytes: int) -> Array:
        """The owner of each chunk of the wave's shards, in their order."""
        loads = np.where(wave.is_member, self._loads[wave.processes], np.iinfo(np.int64).max)
        counts = _deal(loads, wave.sizes * chunks_per_shard, chunk_bytes)
        chosen = np.repeat(wave.processes.reshape(-1), counts.reshape(-1))
        self._book(chosen, chunk_bytes)
        return chosen

    def _book(self, processes: Array, nbytes: int) -> None:
        self._loads += np.bincount(processes, minlength=len(self._loads)) * nbytes


def _deal(loads: Array, counts: Array, nbytes: int) -> Array:
    """How many of ``counts[row]`` equal items each member of a row gets, one after the other to the least loaded.

    Measured in items above the least loaded member, a member's load is a whole *depth* and a *rest* below one item.
    Dealing fills depth after depth: as soon as all depths below ``level`` are full, each member of smaller depth has
    got ``level - depth`` items. So ``level`` is the largest whose sum of these is at most the count. The sum is the
    maximum, over m, of ``m * level`` less the m smallest depths, which gives ``level`` without a search. What remains
    goes, one to each, to those members of depth ``level`` or less that have the smallest rests.

    Args:
      loads: int64[rows, members] in bytes.
      counts: Number of items of each row.
      nbytes: Bytes of an item.

    Example:
      >>> _deal(np.array([[0, 25, 7]]), np.array([4]), 10)
      array([[2, 0, 2]])
    """
    depths, rests = np.divmod(loads - loads.min(axis=1, keepdims=True), nbytes)
    counts = counts[:, None]
    # Who is deeper than all items are high gets none of them. Without this the sums below could overflow.
    depths = np.minimum(depths, counts)
    smallest = np.cumsum(np.sort(depths, axis=1), axis=1)
    level = ((counts + smallest) // np.arange(1, loads.shape[1] + 1)).min(axis=1, keepdims=True)
    dealt = np.maximum(level - depths, 0)
    remaining = counts - dealt.sum(axis=1, keepdims=True)
    rests[depths > level] = nbytes
    ranks = np.argsort(np.argsort(rests, axis=1, kind="stable"), axis=1, kind="stable")
    return dealt + (ranks < remaining)


def _to_chunk_grid(owners: Array, cut: _Cut) -> Array:
    """From the order of the shards, and of the chunks in each, to that of the chunk grid of the leaf."""
    rank = len(cut.shard_grid)
    by_axis = [place for axis in range(rank) for place in (axis, rank + axis)]
    in_order = owners.reshape((*cut.shard_grid, *cut.chunk_grid)).transpose(by_axis)
    return _read_only(in_order.reshape(-1))


def _read_only(array: Array) -> Array:
    array.flags.writeable = False
    return array
