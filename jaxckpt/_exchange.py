"""Which leaves are read once in the whole group and moved between its processes, and how do they get there?

Where a saved array was sharded by rows and is wanted by columns, or on every device, each process would read nearly
all of it. So it is cut in another way, one *slab* for each device, such that no slab needs bytes of another:

    storage                  the leaf, padded, cut into slabs          the leaf as it is wanted
    -----------------        ------------------------------------      ---------------------------
    chunks            ->     each process reads, verifies, casts  ->   XLA moves it: a jitted function
                             the slabs of its own devices              that drops the padding

1. Who moves what (`plan_exchange`). Every process tells how many bytes of each leaf it would read for itself. The
   leaves that cost the group least stay with that: those that are read once anyway, and a few small ones. Many small
   ones go in bundles (`_bundling`), for a program and a collective would cost more than reading one of them. Which ones
   is computed from the sums, alike everywhere.
2. How a leaf is cut (`cut_leaf`, pure). Slabs are boxes of equal shape, along one or two axes. Their borders are
   borders of chunks or of checksum blocks, as far as they can be; the smallest slabs win that make the group read
   hardly anything twice. A small leaf that cannot be cut for more than half of the devices is read *whole* for one of
   them, and the others add zeros.
3. How it moves (`_Layout`, `compile_move`). A program works on one order of devices, so the slabs lie on the mesh of
   the target, whose axes are split into prime factors: every cut is a partition spec of that mesh. The program goes to
   the target in steps, each of which is one collective (`_Layout.steps`). Left to itself XLA falls back to a copy of
   the leaf on every device, or, in some versions, ends the program where axes of different sizes change places. All
   programs are compiled before anything is read; a leaf whose program wants more device memory than allowed is read by
   each process.
4. Elements travel as unsigned words, for some platforms move small floats through larger ones, which changes NaNs.
   They were cast on the host before, by the code that a local restore uses: all bits are the same.
5. Slabs are read in waves that fit the host memory. After each the processes agree that all is well: damage that one
   of them finds is known to all before anybody enters a collective. Then one leaf moves after the other, on the
   calling thread, each to its end: CPU clients with several devices hang when two programs are in flight.

What decides is computed from what all processes have agreed upon, so that all run the same programs in one order.

Deliberately not here: arrays on other memories than the device's own and on other shardings than `NamedSharding`,
and what each host needs as NumPy arrays or Python values; these are read by each process. If a process fails between
the agreement and its collective, as for want of device memory, the others wait in it until jax gives it up.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, final

import jax
import numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from ._bundling import restore_bundled
from ._collective import CollectiveRestore
from ._config import BLOCK_BYTES, MIB, PIECE_BYTES
from ._dtypes import is_sub_byte
from ._fetching import ReadExecutor
from ._manifest import LeafSpec
from ._placement import Target, cast, finish, typed
from ._reading import Checkpoint
from ._resharding import Destination, plan_reads
from ._restoring import RestorePlan, metadata_of
from ._shardings import Box, Device, box_of, describe_sharding

_log = logging.getLogger("jaxckpt")

# Leaves are exchanged when the processes would read this many times their bytes.
_WORTH_IT = 1.5
# What may be read more than once, of all bytes by small leaves, and of a leaf by its slabs.
_LOCAL_SHARE = 0.02
_REPEATED_SHARE = 0.05
# What each process may read more than its part when nobody asked for an exchange: as much as a manifest has, and not
# worth the compilation of one program.
_LOCAL_BYTES = 128 << 10
# Leaves of which each process would read less than this too much share a program (`_bundling`): one of its own takes
# some milliseconds, and a tree of ten thousand biases would take a minute.
_OWN_PROGRAM_BYTES = 64 << 10
# A leaf that few devices would have slabs of is read whole up to this size, so that many of them are read by all alike.
_WHOLE_BYTES = 16 * MIB


def is_exchange_wanted(
    checkpoint: Checkpoint, plan: RestorePlan, group_bytes: int, exchange: bool | None
) -> bool:
    """Whether leaves may be exchanged; the same in all processes.

    Args:
      checkpoint: What is restored.
      plan: How this process would read everything for itself.
      group_bytes: What all processes would read so.
      exchange: What the caller asked for.
    """
    if checkpoint.manifest.local is not None:  # nobody sees the directories of the others
        return False
    nbytes = sum(checkpoint.manifest.spec(target.leaf).nbytes for target in plan.targets.values())
    return group_bytes > _WORTH_IT * nbytes if exchange is None else exchange


# --- cutting a leaf -------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class Cut:
    """Equal boxes that cover an array, and may stand over at its end.

    Attributes:
      parts: How many there are along each axis.
      slab: Shape of each.
      repeated_bytes: At most so many bytes are read more than once when each box is read for itself.
    """

    parts: tuple[int, ...]
    slab: tuple[int, ...]
    repeated_bytes: int


@functools.lru_cache(maxsize=4096)
def cut_leaf(
    shape: tuple[int, ...],
    chunk_shape: tuple[int, ...],
    itemsize: int,
    device_count: int,
    target_grid: tuple[int, ...],
) -> Cut | None:
    """Cuts an array into one slab for each device; None where it is better to read it whole.

    Args:
      shape: Shape of the array, which has elements.
      chunk_shape: Shape of its chunks, which divides it.
      itemsize: Bytes of an element.
      device_count: Number of slabs.
      target_grid: Number of shards along each axis in the end. Of two cuts that are equally good, the one that is
        already there is taken.
    """
    repeated_max = math.prod(shape) * itemsize * _REPEATED_SHARE
    best: tuple[Any, Cut] | None = None
    for parts in _ways_to_divide(len(shape), device_count):
        sizes = [
            _slab_sizes(size, chunk, math.prod(chunk_shape[axis + 1 :]) * itemsize, count)
            for axis, (size, chunk, count) in enumerate(zip(shape, chunk_shape, parts, strict=True))
        ]
        for slab in itertools.product(*sizes):
            repeated = _repeated_bytes(shape, chunk_shape, itemsize, slab)
            if repeated > repeated_max:
                continue
            leading_first = [-count for count in parts]
            score = (math.prod(slab), parts != target_grid, repeated, leading_first, slab)
            if best is None or score < best[0]:
                best = score, Cut(parts, slab, repeated)
    assert best is not None  # all of it can be in one slab
    cut = best[1]
    filled = math.prod(-(-size // part) for size, part in zip(shape, cut.slab, strict=True))
    nbytes = math.prod(shape) * itemsize
    # What a device holds of the padded array when it has been moved.
    padded_bytes = math.prod(cut.slab) * itemsize * device_count // math.prod(target_grid)
    is_whole = filled * 2 <= device_count and (nbytes <= _WHOLE_BYTES or nbytes <= padded_bytes)
    return None if is_whole else cut


def _ways_to_divide(rank: int, count: int) -> Iterator[tuple[int, ...]]:
    """All ways to make so many parts by cuts along at most two axes."""
    divisors = [number for number in range(1, count + 1) if count % number == 0]
    seen: set[tuple[int, ...]] = set()
    for first, second in itertools.combinations_with_replacement(range(rank), 2):
        for divisor in divisors:
            parts = [1] * rank
            parts[first] *= divisor
            parts[second] *= count // divisor
            if tuple(parts) not in seen:
                seen.add(tuple(parts))
                yield tuple(parts)


def _slab_sizes(size: int, chunk: int, row_bytes: int, parts: int) -> list[int]:
    """Sizes to try along one axis: the least, and the next ones at borders of blocks and of chunks."""
    if parts == 1:
        return [size]
    least = -(-size // parts)
    steps = {1, BLOCK_BYTES // math.gcd(BLOCK_BYTES, row_bytes), chunk}
    return sorted({min(-(-least // step) * step, size) for step in steps})


def _repeated_bytes(
    shape: tuple[int, ...], chunk_shape: tuple[int, ...], itemsize: int, slab: tuple[int, ...]
) -> int:
    """Bound of the bytes that lie in blocks which several slabs need; for each, all readers but one."""
    inside = [
        axis
        for axis, (size, part, chunk) in enumerate(zip(shape, slab, chunk_shape, strict=True))
        if part < size and part % chunk
    ]
    if not inside:
        return 0
    if len(inside) > 1:
        return math.prod(shape) * itemsize
    axis = inside[0]
    size, part, chunk = shape[axis], slab[axis], chunk_shape[axis]
    row_bytes = math.prod(chunk_shape[axis + 1 :]) * itemsize
    # A chunk is so many runs of rows, one after the other, each of which is cut at the same places.
    runs = math.prod(chunk_shape[:axis])
    are_runs_whole_blocks = chunk * row_bytes % BLOCK_BYTES == 0 or (runs == 1 and chunk == size)
    if part * row_bytes % BLOCK_BYTES == 0 and are_runs_whole_blocks:
        return 0
    cuts = sum(1 for border in range(part, size, part) if border % chunk)
    chunks = math.prod(shape) // size // (math.prod(chunk_shape) // chunk)
    blocks = -(-math.prod(chunk_shape) * itemsize // BLOCK_BYTES)
    # Between two runs the last slab meets the first one again.
    shared = 1 if runs == 1 else min(2 * runs, blocks)
    return cuts * chunks * shared * BLOCK_BYTES


# --- the way from the slabs to the target ---------------------------------------------------------------------

# Names of mesh axes that cut each dimension of an array.
_Axes = tuple[tuple[str, ...], ...]


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class _Layout:
    """The devices of a target as a mesh whose axes have prime sizes.

    Attributes:
      mesh: The same devices in the same order.
      wanted: For each dimension that the target's spec names, the axes that cut it.
      processes: How many processes have devices in it.
      devices_per_process_max: Most devices of one process.
    """

    mesh: Mesh
    wanted: _Axes
    processes: int
    devices_per_process_max: int

    @property
    def device_count(self) -> int:
        return int(self.mesh.devices.size)

    def wanted_of(self, rank: int) -> _Axes:
        return (self.wanted + ((),) * rank)[:rank]

    def sharding(self, axes: _Axes) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec(*axes))

    def parts(self, axes: Sequence[str]) -> int:
        return math.prod(self.mesh.shape[name] for name in axes)

    def spread(self, parts: tuple[int, ...]) -> _Axes:
        """Axes that cut each dimension into so many parts, which use up all axes.

        Those that cut a dimension in the end come first in it, those along which the array is replicated come last.
        """
        wanted = self.wanted_of(len(parts))
        used = [name for names in wanted for name in names]
        left = [*used, *(name for name in self.mesh.axis_names if name not in used)]
        missing = list(parts)
        axes: list[list[str]] = [[] for _ in parts]
        everything = list(left)
        for choose_own in (True, False):
            for dimension, own in enumerate(wanted):
                for name in own if choose_own else everything:
                    size = self.mesh.shape[name]
                    if name in left and missing[dimension] % size == 0:
                        missing[dimension] //= size
                        left.remove(name)
                        axes[dimension].append(name)
        return tuple(map(tuple, axes))

    def steps(self, start: _Axes, wanted: _Axes, shape: tuple[int, ...]) -> list[_Axes]:
        """Shardings on the way from one to another, each one collective away from the one before.

        A step takes axes from the fine end of one dimension, and either joins what they cut (all-gather), or puts them
        to the fine end of another dimension (all-to-all). After the last one each dimension is cut by the first of its
        wanted axes; whatever of them is missing cuts what every device has.

        Args:
          start: As `spread` gives it.
          wanted: The axes of the target.
          shape: What the axes that are put to a dimension must divide.
        """
        used = {name for names in wanted for name in names}
        at: _Axes = tuple(tuple(name for name in names if name in used) for names in start)
        steps = [at] if at != start else []
        while (after := self._move_axes(at, wanted, shape) or _join_axis(at, wanted)) is not None:
            at = after
            steps.append(at)
        return steps

    def _move_axes(self, at: _Axes, wanted: _Axes, shape: tuple[int, ...]) -> _Axes | None:
        """The sharding after as many axes as possible went from one dimension to where they are wanted."""
        for source, names in enumerate(at):
            for first in range(_right_count(names, wanted[source]), len(names)):
                leaving = names[first:]
                for dimension, there in enumerate(at):
                    arrived = there + leaving
                    is_wanted = arrived == wanted[dimension][: len(arrived)]
                    if dimension != source and is_wanted and shape[dimension] % self.parts(arrived) == 0:
                        after = list(at)
                        after[source], after[dimension] = names[:first], arrived
                        return tuple(after)
        return None


def _join_axis(at: _Axes, wanted: _Axes) -> _Axes | None:
    """The sharding after one axis that is in a wrong place is given up, or None if there is none."""
    for dimension in reversed(range(len(at))):
        if _right_count(at[dimension], wanted[dimension]) < len(at[dimension]):
            return (*at[:dimension], at[dimension][:-1], *at[dimension + 1 :])
    return None


def _right_count(names: tuple[str, ...], wanted: tuple[str, ...]) -> int:
    """How many of the first axes are where they are wanted."""
    pairs = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(names, wanted, strict=False))
    return sum(1 for _ in pairs)


@functools.lru_cache(maxsize=256)
def _layout_of(sharding: NamedSharding) -> _Layout:
    mesh = sharding.mesh
    assert isinstance(mesh, Mesh)
    sizes: list[int] = []
    names_of: dict[str, tuple[str, ...]] = {}
    for axis, size in mesh.shape.items():
        factors = _prime_factors(size)
        names_of[axis] = tuple(f"axis{len(sizes) + number}" for number in range(len(factors)))
        sizes += factors
    names = tuple(f"axis{number}" for number in range(len(sizes)))
    refined = Mesh(mesh.devices.reshape(sizes), names, axis_types=(AxisType.Auto,) * len(sizes))
    wanted = tuple(
        tuple(name for axis in _axes_of(entry) for name in names_of[axis])
        for entry in sharding.spec.partitions
    )
    counts = collections.Counter(device.process_index for device in mesh.devices.flat)
    return _Layout(refined, wanted, len(counts), max(counts.values()))


def _axes_of(entry: Any) -> tuple[str, ...]:
    if entry is None or entry is PartitionSpec.UNCONSTRAINED:
        return ()
    return entry if isinstance(entry, tuple) else (entry,)


def _prime_factors(number: int) -> list[int]:
    factors: list[int] = []
    divisor = 2
    while number > 1:
        while number % divisor == 0:
            factors.append(divisor)
            number //= divisor
        divisor += 1
    return factors


# --- words ----------------------------------------------------------------------------------------------------


def _word_dtype(dtype: np.dtype[Any]) -> np.dtype[Any]:
    return np.dtype({1: np.uint8, 2: np.uint16}.get(dtype.itemsize, np.uint32))


def _word_axes(dtype: np.dtype[Any]) -> tuple[int, ...]:
    """An axis of words for elements that have several: 64-bit words do not exist everywhere."""
    return (dtype.itemsize // 4,) if dtype.itemsize > 4 else ()


def _to_words(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    words = np.ascontiguousarray(array).reshape(*array.shape, 1).view(_word_dtype(array.dtype))
    return words.reshape(array.shape + _word_axes(array.dtype))


def _from_words(words: jax.Array, dtype: np.dtype[Any]) -> jax.Array:
    if dtype == np.bool_:
        return lax.ne(words, np.uint8(0))
    if dtype.kind == "c":
        parts = np.dtype(f"f{dtype.itemsize // 2}")
        halves = words.reshape(*words.shape[:-1], 2, *_word_axes(parts))
        real, imaginary = (
            lax.index_in_dim(halves, number, halves.ndim - 1 - len(_word_axes(parts)), keepdims=False)
            for number in (0, 1)
        )
        return lax.complex(_from_words(real, parts), _from_words(imaginary, parts))
    if is_sub_byte(dtype):
        bits = jax.numpy.finfo(dtype) if dtype.name.startswith("float") else jax.numpy.iinfo(dtype)
        words = lax.convert_element_type(words, f"uint{bits.bits}")
    return words if words.dtype == dtype else lax.bitcast_convert_type(words, dtype)


# --- planning -------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class Recipe:
    """All that a program depends on; moves with equal recipes share it.

    Attributes:
      shape: Shape of the leaf as it was saved.
      dtype: What it becomes.
      target_shape: Shape that it gets.
      sharding: Sharding that it gets.
      cut: How the leaf is cut, or None where it is read whole.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    target_shape: tuple[int, ...]
    sharding: NamedSharding
    cut: Cut | None

    @property
    def layout(self) -> _Layout:
        return _layout_of(self.sharding)

    @property
    def slab(self) -> tuple[int, ...]:
        """Shape of the array that each device has before the move."""
        return (1, *self.shape) if self.cut is None else self.cut.slab

    def slabs(self) -> tuple[tuple[int, ...], NamedSharding]:
        """Shape and sharding of the array of all slabs, but for its words."""
        layout = self.layout
        if self.cut is None:
            axes = (tuple(layout.mesh.axis_names),)
            return (layout.device_count, *self.shape), layout.sharding(axes)
        padded = tuple(part * size for part, size in zip(self.cut.parts, self.cut.slab, strict=True))
        return padded, layout.sharding(layout.spread(self.cut.parts))


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class Move:
    """A leaf that is read once in the group.

    Attributes:
      number: Number of the wanted leaf.
      target: What it shall be.
      spec: What was saved.
      recipe: How it is cut and moved.
      owner: Number of the device that a whole leaf is read for.
    """

    number: int
    target: Target
    spec: LeafSpec
    recipe: Recipe
    owner: int

    @property
    def host_bytes(self) -> int:
        """Bytes of its slabs in the host memory of the process that has most of them."""
        itemsizes = {
            self.spec.np_dtype: self.spec.np_dtype.itemsize,
            self.recipe.dtype: self.recipe.dtype.itemsize,
        }
        elements = math.prod(self.recipe.slab) * self.recipe.layout.devices_per_process_max
        return elements * sum(itemsizes.values())

    def boxes(self) -> dict[Device, Box | None]:
        """What is read for each device of this process, in the leaf's coordinates."""
        padded, sharding = self.recipe.slabs()
        boxes: dict[Device, Box | None] = {}
        for device, index in sharding.addressable_devices_indices_map(padded).items():
            lo, hi = box_of(index, padded)
            if self.recipe.cut is None:
                is_owner = lo[0] == self.owner
                boxes[device] = ((0,) * len(self.recipe.shape), self.recipe.shape) if is_owner else None
                continue
            hi = tuple(map(min, hi, self.recipe.shape))
            is_filled = all(start < stop for start, stop in zip(lo, hi, strict=True))
            boxes[device] = (lo, hi) if is_filled else None
        return boxes


def plan_exchange(
    checkpoint: Checkpoint,
    plan: RestorePlan,
    together: CollectiveRestore,
    exchange: bool | None,
    host_bytes_max: int,
    device_bytes_max: int | None,
) -> Exchange:
    """Decides with the other processes what is moved; nothing is read by then.

    Args:
      checkpoint: What is restored.
      plan: How this process would read everything for itself.
      together: The restore of the group.
      exchange: What the caller asked for.
      host_bytes_max: Most bytes of slabs in host memory.
      device_bytes_max: Most bytes that a move may take on a device beyond its result, or None.
    """
    manifest = checkpoint.manifest
    movable = [
        number for number, target in plan.targets.items() if _is_movable(target, manifest.spec(target.leaf))
    ]
    would_read = _bytes_of_leaves(plan)
    mine = [would_read.get(plan.targets[number].leaf, 0) for number in movable]
    if device_bytes_max is None:
        device_bytes_max = _free_device_bytes() // 4 or host_bytes_max // jax.local_device_count()

    def decide(answers: list[bytes]) -> bytes:
        limits, sums = np.array([host_bytes_max, device_bytes_max]), np.zeros(len(movable), np.int64)
        for answer in answers:
            numbers = np.frombuffer(answer, np.int64)
            limits = np.minimum(limits, numbers[:2])
            sums += numbers[2:]
        return np.concatenate([limits, sums]).astype(np.int64).tobytes()

    answer = np.array([host_bytes_max, device_bytes_max, *mine], np.int64).tobytes()
    told = np.frombuffer(together.session.agree("exchange", answer, decide), np.int64)
    host_bytes_max, device_bytes_max = int(told[0]), int(told[1])
    nbytes = sum(manifest.spec(target.leaf).nbytes for target in plan.targets.values())
    room = int(nbytes * _LOCAL_SHARE)
    extra = {
        number: int(total) - manifest.spec(plan.targets[number].leaf).nbytes
        for number, total in zip(movable, told[2:], strict=True)
    }
    if exchange is None:
        room = max(room, _LOCAL_BYTES * together.count)
    least = _OWN_PROGRAM_BYTES * together.count
    bundled = [number for number, each in extra.items() if 0 < each < least]
    bundled_bytes = sum(extra[number] for number in bundled)
    if bundled_bytes <= room:
        room -= bundled_bytes
        bundled = []
    large = {number: each for number, each in extra.items() if each >= least}
    moves = _make_moves(checkpoint, plan, _most_expensive(large, room))
    programs = _compile_all(moves, device_bytes_max, together, manifest.keys) if moves else {}
    moves = [move for move in moves if move.recipe in programs]
    if moves or bundled:
        _log.info(
            "%d leaves are read once and exchanged, %d of them in bundles",
            len(moves) + len(bundled),
            len(bundled),
        )
    bundle_bytes_max = min(host_bytes_max, device_bytes_max)
    return Exchange(checkpoint, plan, moves, programs, bundled, together, host_bytes_max, bundle_bytes_max)


def _is_movable(target: Target, spec: LeafSpec) -> bool:
    sharding = target.sharding
    if not isinstance(sharding, NamedSharding) or spec.kind == "value" or not spec.shape or 0 in spec.shape:
        return False
    is_plain = not sharding.spec.unreduced and describe_sharding(sharding)["memory_kind"] is None
    are_bytes_together = spec.chunk_shape[len(spec.shape) :] == spec.stored_shape[len(spec.shape) :]
    return is_plain and are_bytes_together and _layout_of(sharding).processes > 1


def _bytes_of_leaves(plan: RestorePlan) -> Mapping[int, int]:
    nbytes: collections.Counter[int] = collections.Counter()
    for reads in plan.plans:
        for unit in reads.units:
            for part in unit.parts:
                nbytes[part.leaf] += part.length
    return nbytes


def _free_device_bytes() -> int:
    """Bytes that are free on the fullest device of this process; 0 where nobody knows."""
    free = []
    for device in jax.local_devices():
        stats = device.memory_stats() or {}
        free.append(max(stats.get("bytes_limit", 0) - stats.get("bytes_in_use", 0), 0))
    return min(free)


def _most_expensive(extra: Mapping[int, int], room: int) -> list[int]:
    """The leaves that are exchanged, large ones first; the others read at most so many bytes more than once."""
    order = sorted(extra, key=lambda number: (extra[number], number))
    for place, number in enumerate(order):
        room -= extra[number]
        if room < 0:
            return order[place:][::-1]
    return []


def _make_moves(checkpoint: Checkpoint, plan: RestorePlan, numbers: Sequence[int]) -> list[Move]:
    manifest = checkpoint.manifest
    moves: list[Move] = []
    loads: dict[Mesh, np.ndarray[Any, Any]] = {}
    for number in numbers:
        target = plan.targets[number]
        spec = manifest.spec(target.leaf)
        assert isinstance(target.sharding, NamedSharding)
        layout = _layout_of(target.sharding)
        rank = len(spec.shape)
        grid = tuple(layout.parts(names) for names in layout.wanted_of(rank))
        itemsize = spec.nbytes // math.prod(spec.shape)
        cut = cut_leaf(spec.shape, spec.chunk_shape[:rank], itemsize, layout.device_count, grid)
        recipe = Recipe(spec.shape, target.dtype or spec.np_dtype, target.shape, target.sharding, cut)
        owner = 0
        if cut is None:
            load = loads.setdefault(layout.mesh, np.zeros(layout.device_count, np.int64))
            owner = int(np.argmin(load))
            load[owner] += spec.nbytes
        moves.append(Move(number, target, spec, recipe, owner))
    return moves


# --- programs -------------------------------------------------------------------------------------------------


def _compile_all(
    moves: Sequence[Move], device_bytes_max: int, together: CollectiveRestore, keys: Sequence[str]
) -> dict[Recipe, Any]:
    """The programs, without those that some process cannot compile or that take too much device memory."""
    first_moves = {move.recipe: move for move in reversed(moves)}
    recipes = list(dict.fromkeys(move.recipe for move in moves))
    programs: dict[Recipe, Any] = {}
    for recipe in recipes:
        if not recipe.sharding.addressable_devices:
            programs[recipe] = None
            continue
        try:
            program = compile_move(recipe)
        except jax.errors.JaxRuntimeError as error:
            _log.warning("%s: cannot be exchanged: %s", keys[first_moves[recipe].target.leaf], error)
            continue
        needed = _device_bytes(program, recipe)
        if needed <= device_bytes_max:
            programs[recipe] = program
        else:
            _log.info(
                "%s: each process reads it: an exchange would take %d bytes of each device, more than the %d allowed",
                keys[first_moves[recipe].target.leaf],
                needed,
                device_bytes_max,
            )

    def decide(answers: list[bytes]) -> bytes:
        return bytes(map(min, zip(*answers, strict=True)))

    mine = bytes(recipe in programs for recipe in recipes)
    told = together.session.agree("programs", mine, decide)
    return {recipe: programs[recipe] for recipe, is_ready in zip(recipes, told, strict=True) if is_ready}


def _device_bytes(program: Any, recipe: Recipe) -> int:
    """Bytes that a move takes on each device beyond its result."""
    slab_bytes = math.prod(recipe.slab) * recipe.dtype.itemsize
    analysis = program.memory_analysis()
    if analysis is None:
        return slab_bytes + math.prod(recipe.shape) * recipe.dtype.itemsize
    return max(slab_bytes, analysis.argument_size_in_bytes) + int(analysis.temp_size_in_bytes)


def compile_move(recipe: Recipe) -> Any:
    """The program that makes a leaf of its slabs."""
    layout = recipe.layout
    slabs_shape, slabs_sharding = recipe.slabs()
    words = _word_axes(recipe.dtype)
    result = layout.sharding(layout.wanted_of(len(recipe.target_shape)))
    steps: list[_Axes] = []
    if recipe.cut is not None:
        rank = len(recipe.shape)
        # Where the shape changes, every device takes its part of the whole.
        on_the_way = layout.wanted_of(rank) if recipe.target_shape == recipe.shape else ((),) * rank
        steps = layout.steps(layout.spread(recipe.cut.parts), on_the_way, slabs_shape)

    def move(slabs: jax.Array) -> jax.Array:
        if recipe.cut is None:
            # One slab is the leaf and the others are zeros.
            whole = lax.reduce(slabs, np.zeros((), slabs.dtype), lax.add, (0,))
        else:
            for axes in steps:
                slabs = lax.with_sharding_constraint(slabs, layout.sharding(axes))
            whole = lax.slice(slabs, (0,) * slabs.ndim, recipe.shape + words)
        placed = lax.with_sharding_constraint(whole.reshape(recipe.target_shape + words), result)
        return _from_words(lax.optimization_barrier(placed), recipe.dtype)

    argument = jax.ShapeDtypeStruct(slabs_shape + words, _word_dtype(recipe.dtype), sharding=slabs_sharding)
    # A mesh with explicit axes that the caller has set would give other types to what is traced here.
    with jax.set_mesh(layout.mesh):
        return jax.jit(move, out_shardings=result).lower(argument).compile()


# --- carrying it out ------------------------------------------------------------------------------------------


@final
class Exchange:
    """What the processes of a group read once and move.

    Attributes:
      numbers: Numbers of the wanted leaves that it makes; the others are not its business.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        plan: RestorePlan,
        moves: Sequence[Move],
        programs: Mapping[Recipe, Any],
        bundled: Sequence[int],
        together: CollectiveRestore,
        host_bytes_max: int,
        bundle_bytes_max: int,
    ) -> None:
        """See `plan_exchange`."""
        self.numbers = frozenset([*(move.number for move in moves), *bundled])
        self._checkpoint = checkpoint
        self._plan = plan
        self._bundled = bundled
        self._bundle_bytes_max = bundle_bytes_max
        self._moves = moves
        self._programs = programs
        self._together = together
        self._host_bytes_max = host_bytes_max

    def run(self, io_threads: int) -> dict[int, Any]:
        """Reads, verifies and moves; returns the leaves by their numbers.

        Raises:
          CorruptError: Stored bytes are damaged, whichever process found it.
          CoordinationError: Another process failed.
        """
        checkpoint, together = self._checkpoint, self._together
        manifest = checkpoint.manifest
        executor = ReadExecutor(checkpoint.store, manifest, threads=io_threads)
        doing = f"restore {checkpoint.path!r}"
        shared = set(metadata_of(manifest, []))  # every process has verified these
        mine = [
            move.target.leaf
            for place, move in enumerate(self._moves)
            if place % together.count == together.index
        ]
        executor.check_metadata(entry for entry in metadata_of(manifest, mine) if entry not in shared)
        results: dict[int, Any] = {}
        for wave_number, wave in enumerate(self._waves()):
            boxes = [move.boxes() for move in wave]
            filled = self._read(executor, wave, boxes, io_threads)
            executor.raise_problems(doing)
            together.agree_that_all_is_well(f"slabs {wave_number}")
            for move, its_boxes in zip(wave, boxes, strict=True):
                results[move.number] = self._move(move, its_boxes, filled)
        checkpoint.count_read(executor.bytes_read)
        return results | restore_bundled(
            checkpoint,
            self._plan,
            self._bundled,
            together,
            bytes_max=self._bundle_bytes_max,
            io_threads=io_threads,
        )

    def _waves(self) -> list[list[Move]]:
        waves: list[list[Move]] = []
        room = 0
        for move in self._moves:
            if not waves or move.host_bytes > room:
                waves.append([])
                room = self._host_bytes_max
            waves[-1].append(move)
            room -= move.host_bytes
        return waves

    def _read(
        self,
        executor: ReadExecutor,
        wave: Sequence[Move],
        boxes: Sequence[Mapping[Device, Box | None]],
        io_threads: int,
    ) -> dict[tuple[int, Box], Destination]:
        """Fills a destination for each slab, by leaf and box."""
        unit_bytes = min(PIECE_BYTES, max(self._host_bytes_max // (2 * io_threads), 1))
        wanted: list[tuple[int, list[Box]]] = []
        places: list[tuple[int, Box]] = []
        for move, its_boxes in zip(wave, boxes, strict=True):
            tail = move.spec.stored_shape[len(move.spec.shape) :]
            zeros = (0,) * len(tail)
            needed = [box for box in its_boxes.values() if box is not None]
            wanted.append((move.target.leaf, [(lo + zeros, hi + tail) for lo, hi in needed]))
            places += [(move.number, box) for box in needed]
        gap_bytes_max = self._checkpoint.store.gap_bytes_max
        reads = plan_reads(self._checkpoint.index, wanted, unit_bytes, gap_bytes_max=gap_bytes_max)
        executor.check_objects(reads)
        executor.read(reads)
        return dict(zip(places, reads.destinations, strict=True))

    def _move(
        self,
        move: Move,
        boxes: Mapping[Device, Box | None],
        filled: dict[tuple[int, Box], Destination],
    ) -> Any:
        """Makes one leaf. All processes that have devices of its sharding call this for it, and for no other."""
        recipe = move.recipe
        shards: list[jax.Array] = []
        if boxes:
            slabs = [jax.device_put(self._slab(move, box, filled), device) for device, box in boxes.items()]
            shape, sharding = recipe.slabs()
            shape += _word_axes(recipe.dtype)
            argument = jax.make_array_from_single_device_arrays(shape, sharding, slabs)
            # What is in a checkpoint is nobody's wrong result.
            with jax.debug_nans(False), jax.debug_infs(False):
                moved = jax.block_until_ready(self._programs[recipe](argument))
            shards = [shard.data for shard in moved.addressable_shards]
        array = jax.make_array_from_single_device_arrays(
            recipe.target_shape, recipe.sharding, shards, dtype=recipe.dtype
        )
        return finish(move.target, move.spec, array)

    def _slab(
        self, move: Move, box: Box | None, filled: dict[tuple[int, Box], Destination]
    ) -> np.ndarray[Any, Any]:
        """The words of a slab, with zeros where it stands over."""
        recipe = move.recipe
        words = _word_axes(recipe.dtype)
        if box is None:
            return np.zeros(recipe.slab + words, _word_dtype(recipe.dtype))
        destination = filled.pop((move.number, box))
        read = _to_words(cast(typed(destination, move.spec), recipe.dtype))
        destination.buffer = None
        if recipe.cut is None or read.shape == recipe.slab + words:
            return read.reshape(recipe.slab + words)
        slab = np.zeros(recipe.slab + words, read.dtype)
        slab[tuple(map(slice, read.shape))] = read
        return slab
