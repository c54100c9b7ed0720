"""How are bytes of a shard read on the host without leaving anything behind on the array?

What JAX converts to NumPy it caches on the array, for as long as that lives. So what is converted here are second
handles to a shard, or parts that were cut off; a shard that NumPy can view is read from the view.

What JAX's own code takes for each small array is most of what a save of many of them blocks its caller for. So whole
shards that lie side by side in a piece are copied with one call: it takes them as buffers, without an array of NumPy
for each, in about a third of the time. Arrays that do not show their memory in this way are copied one by one.
"""

from __future__ import annotations

import bisect
import contextlib
import dataclasses
import functools
import itertools
import math
from collections.abc import Generator, Sequence
from typing import Any, NamedTuple, final

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh

from ._config import BLOCK_BYTES
from ._dtypes import is_sub_byte
from ._layout import Run, Segment, WritePlan, contiguous_runs, flat_boxes
from ._leaves import Kinds, Leaves, StreamedArray, Template
from ._shardings import Box, Device
from ._storage import Buffer

# What one compiled function copies: its compilation takes 0.4 ms for each.
_ARRAYS_OF_A_COPY_MAX = 1024

# Shards that are copied with one call. With 64 what belongs to them is still in the processor's cache when they are
# given up; 1,024 take a quarter longer.
_SHARDS_OF_A_BATCH_MAX = 64


# Copying together copies twice, which for this many bytes takes longer than to look at a shard by itself.
_COPIED_TOGETHER_BYTES_MAX = 128 << 10


@final
class HostReader:
    """Byte ranges of shards in host memory, without leaving anything cached on the arrays.

    A shard that NumPy can view is read from the view. Where the host form differs (elements of less than a byte,
    devices with memory of their own) it is converted window by window, so that a large one never is in memory twice.
    A streamed array is read range by range.
    """

    def __init__(self, leaves: Leaves, plan: WritePlan) -> None:
        self._arrays = leaves.arrays
        self._batches = _batches_of(leaves.kinds, plan)
        self._shard: tuple[int, int] | None = None
        self._data: Any = None
        self._windows: list[Run] = []
        # What is converted now: bytes `[lo, hi)` of the shard.
        self._window: Run | None = None
        self._array: np.ndarray[Any, Any] = np.empty(0, np.uint8)

    def read(self, segment: Segment) -> Buffer:
        """The bytes of a segment: a view where the shard is contiguous, else a copy."""
        data = self._open(segment)
        if isinstance(data, StreamedArray):
            return data.read(segment.lo, segment.hi)
        if isinstance(data, np.ndarray):
            return byte_range(data, segment.lo, segment.hi)
        parts: list[Buffer] = []
        at = segment.lo
        while at < segment.hi:
            window = self._convert(at)
            end = min(segment.hi, window.hi)
            parts.append(byte_range(self._array, at - window.lo, end - window.lo))
            at = end
        return np.concatenate(parts)

    def copy_piece(self, number: int, out: Buffer) -> None:
        """Copies the segments of a piece, with zeros behind each up to the next.

        Args:
          number: The place of the piece in the plan.
          out: What takes its bytes.
        """
        for batch in self._batches[number]:
            if not batch.shards or not self._copy_together(batch, out):
                for segment in batch.segments:
                    end = segment.at + segment.hi - segment.lo
                    out[segment.at : end] = self.read(segment)
                    out[end : segment.at + segment.stored] = 0

    def _copy_together(self, batch: _Batch, out: Buffer) -> bool:
        """Copies whole shards with one call; says whether all of them showed their memory."""
        parts: list[Any] = []
        for leaf, number, shown_as, padding in batch.shards:
            part: Any = self._arrays[leaf]
            if number is not None:
                part = part.addressable_data(number)
            parts.append(part if shown_as is None else np.asarray(part).view(shown_as))
            if padding:
                parts.append(padding)
        try:
            # Waits for the values. While it copies, it holds what keeps a step that donates the arrays from writing.
            data = b"".join(parts)
        except (TypeError, BufferError):  # deleted, or laid out in an order of its own
            return False
        start = batch.segments[0].at
        out[start : start + len(data)] = np.frombuffer(data, np.uint8)
        return True

    def is_constant_view(self, segment: Segment) -> bool:
        """Whether `read` gives a view of what nobody changes: arrays of JAX, but not NumPy's."""
        if isinstance(self._arrays[segment.leaf], np.ndarray):
            return False
        data = self._open(segment)
        return isinstance(data, np.ndarray) and bool(data.flags.c_contiguous)

    def _open(self, segment: Segment) -> Any:
        """The shard: a NumPy array, a streamed array, or a `jax.Array` that must be converted."""
        shard = (segment.leaf, segment.shard)
        if self._shard != shard:  # consecutive segments mostly belong to one shard
            self._data = host_view(self._arrays[segment.leaf], segment.shard)
            self._shard = shard
            self._window = None
            if not isinstance(self._data, (np.ndarray, StreamedArray)):
                itemsize = np.dtype(self._data.dtype).itemsize
                self._windows = list(contiguous_runs(self._data.shape, itemsize, BLOCK_BYTES))
        return self._data

    def _convert(self, at: int) -> Run:
        """Converts the window that holds a byte of the shard."""
        if self._window is None or not self._window.lo <= at < self._window.hi:
            number = bisect.bisect_right(self._windows, at, key=lambda run: run.lo) - 1
            self._window = self._windows[number]
            self._array = to_host(cut(self._data, self._window))
        return self._window


class _WholeShard(NamedTuple):
    """A shard of an array that shows its memory to Python; a tuple, for they are unpacked in each save.

    Attributes:
      leaf: Number of the leaf.
      number: Of the shard; None for an array on one device.
      shown_as: Integers of the same size, for elements that Python does not know.
      padding: Zeros up to what lies behind it.
    """

    leaf: int
    number: int | None
    shown_as: np.dtype[Any] | None
    padding: bytes


@dataclasses.dataclass(frozen=True, slots=True)
class _Batch:
    """Segments that lie side by side in a piece; ``shards`` says the same if all are whole shards that can be seen."""

    segments: tuple[Segment, ...]
    shards: tuple[_WholeShard, ...]


@functools.lru_cache(maxsize=8)
def _batches_of(kinds: Kinds, plan: WritePlan) -> tuple[tuple[_Batch, ...], ...]:
    """What is copied together, for each piece of a plan."""
    is_visible = [_is_visible(template) for template in kinds.templates]

    def is_small_and_visible(segment: Segment) -> bool:
        return is_visible[segment.leaf] and segment.hi - segment.lo < _COPIED_TOGETHER_BYTES_MAX

    pieces: list[tuple[_Batch, ...]] = []
    for piece in plan.pieces:
        batches: list[_Batch] = []
        for visible, group in itertools.groupby(piece.segments, is_small_and_visible):
            segments = tuple(group)
            for first in range(0, len(segments), _SHARDS_OF_A_BATCH_MAX):
                some = segments[first : first + _SHARDS_OF_A_BATCH_MAX]
                shards = [_whole_shard(segment, kinds.templates[segment.leaf]) for segment in some if visible]
                is_whole = None not in shards
                batches.append(_Batch(some, tuple(filter(None, shards)) if is_whole else ()))
        pieces.append(tuple(batches))
    return tuple(pieces)


def _is_visible(template: Template) -> bool:
    """Whether the shards of an array are in the host's memory as they are stored."""
    sharding = template.sharding
    if sharding is None or is_sub_byte(template.spec.np_dtype):
        return False
    return all(device.platform == "cpu" for device in sharding.addressable_devices)


def _whole_shard(segment: Segment, template: Template) -> _WholeShard | None:
    """A segment as a whole shard, if it is one."""
    extent, sharding, dtype = template.extent, template.sharding, template.spec.np_dtype
    assert extent is not None
    assert sharding is not None
    nbytes = segment.hi - segment.lo
    if nbytes != math.prod(extent.shard_shape) * extent.itemsize:
        return None
    return _WholeShard(
        leaf=segment.leaf,
        number=None if sharding.num_devices == 1 else segment.shard,
        shown_as=None if dtype.isbuiltin == 1 else np.dtype(f"u{dtype.itemsize}"),
        padding=bytes(segment.stored - nbytes),
    )


def host_view(data: Any, shard: int) -> Any:
    """One shard as a NumPy array that views its memory; waits until it is computed.

    Where there is no such view, a second handle to the shard: converting the array itself would cache the result on it.
    """
    if isinstance(data, (np.ndarray, StreamedArray)):
        return data
    array = data.addressable_data(shard)
    (device,) = array.devices()
    if device.platform != "cpu" or is_sub_byte(array.dtype):
        return jax.make_array_from_single_device_arrays(array.shape, array.sharding, [array])
    return np.asarray(array)


def read_shard(data: jax.Array, shard: int, box: Box) -> np.ndarray[Any, Any]:
    """A box of one of this process's shards, in host memory; nothing is cached on the array."""
    return to_host(cut(host_view(data, shard), Run(0, 0, box)))


def to_host(array: Any) -> np.ndarray[Any, Any]:
    """The values of a disposable array; saving was asked for, so that a guard against transfers does not mean it."""
    with jax.transfer_guard_device_to_host("allow"):
        return np.asarray(array)


def byte_range(array: np.ndarray[Any, Any], lo: int, hi: int) -> Buffer:
    if array.flags.c_contiguous:
        return array.reshape(-1).view(np.uint8)[lo:hi]
    # Fortran order, strides: gather just the range, so that a large leaf is never copied whole.
    itemsize = array.dtype.itemsize
    first, last = lo // itemsize, -(-hi // itemsize)
    boxes = [
        array[tuple(slice(a, b) for a, b in zip(box_lo, box_hi, strict=True))]
        for box_lo, box_hi in flat_boxes(first, last, array.shape)
    ]
    # Joined as bytes: joining elements would bring them to the byte order of this machine.
    gathered = np.concatenate([np.ascontiguousarray(box).reshape(-1).view(np.uint8) for box in boxes])
    return gathered[lo - first * itemsize : hi - first * itemsize]


def cut(array: Any, run: Run) -> Any:
    """A part of a shard: of a NumPy array a view, else a copy on its device, unless it is the whole."""
    lo, hi = run.box
    sizes = tuple(stop - start for start, stop in zip(lo, hi, strict=True))
    if sizes == array.shape:
        return array
    if isinstance(array, np.ndarray):
        return array[tuple(map(slice, lo, hi))]
    (device,) = array.devices()
    with _own_settings(device):
        if max(array.shape) > np.iinfo(np.int32).max:  # positions on the device are int32
            return _slice(array, lo, hi)
        return _dynamic_slice(array, lo, sizes)


def copies_on_device(arrays: Sequence[Any], device: Device) -> list[Any]:
    """Copies of shards of one device, in memory of their own: nothing that becomes of the shards changes them.

    Compiled, since what a function returns is its own, while runtimes may share memory within a device though
    ``device_put`` asks for a copy. It also takes a fifteenth of the time: 1.5 ms for 1,000 arrays.
    """
    copies: list[Any] = []
    with _own_settings(device):
        for first in range(0, len(arrays), _ARRAYS_OF_A_COPY_MAX):
            copies += _copy(list(arrays[first : first + _ARRAYS_OF_A_COPY_MAX]))
    return copies


@contextlib.contextmanager
def _own_settings(device: Device) -> Generator[None]:
    """Without the caller's settings, which are not ours.

    Code under a mesh (`jax.set_mesh`) refuses arrays of single devices, a guard refuses the place to cut at, and a
    check for NaN or infinity would wait for the values and refuse them.
    """
    with (
        jax.set_mesh(_mesh_of(device)),
        jax.transfer_guard("allow"),
        jax.debug_nans(False),
        jax.debug_infs(False),
    ):
        yield


@functools.cache
def _mesh_of(device: Device) -> Mesh:
    return Mesh(np.array([device], dtype=object), ("_",), axis_types=(AxisType.Auto,))


@jax.jit
def _copy(arrays: list[Any]) -> list[Any]:
    return [jnp.copy(array) for array in arrays]


@functools.partial(jax.jit, static_argnums=2)
def _dynamic_slice(array: Any, lo: tuple[int, ...], sizes: tuple[int, ...]) -> Any:
    return jax.lax.dynamic_slice(array, lo, sizes)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _slice(array: Any, lo: tuple[int, ...], hi: tuple[int, ...]) -> Any:
    return jax.lax.slice(array, lo, hi)
