"""How are bytes of a shard read on the host without leaving anything behind on the array?

What JAX converts to NumPy it caches on the array, for as long as that lives. So what is converted here are second
handles to a shard, or parts that were cut off; a shard that NumPy can view is read from the view.
"""

from __future__ import annotations

import bisect
import functools
from collections.abc import Sequence
from typing import Any, final

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from ._config import BLOCK_BYTES
from ._dtypes import is_sub_byte
from ._layout import Run, Segment, contiguous_runs, flat_boxes
from ._leaves import Leaf, StreamedArray
from ._shardings import Box, Device
from ._store import Buffer


@final
class HostReader:
    """Byte ranges of shards in host memory, without leaving anything cached on the arrays.

    A shard that NumPy can view is read from the view. Where the host form differs (elements of less than a byte,
    devices with memory of their own) it is converted window by window, so that a large one never is in memory twice.
    A streamed array is read range by range.
    """

    def __init__(self, leaves: Sequence[Leaf]) -> None:
        self._leaves = leaves
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

    def copy_to(self, segment: Segment, out: Buffer) -> None:
        """Copies the bytes of a segment."""
        out[:] = self.read(segment)

    def is_view(self, segment: Segment) -> bool:
        """Whether `read` gives a view."""
        data = self._open(segment)
        return isinstance(data, np.ndarray) and bool(data.flags.c_contiguous)

    def _open(self, segment: Segment) -> Any:
        """The shard: a NumPy array, a streamed array, or a `jax.Array` that must be converted."""
        shard = (segment.leaf, segment.shard)
        if self._shard != shard:  # consecutive segments mostly belong to one shard
            self._data = host_view(self._leaves[segment.leaf].data, segment.shard)
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
    # The caller's settings are not ours: code under a mesh (`jax.set_mesh`) refuses arrays of single devices, a guard
    # refuses the place to cut at, and a check for NaN or infinity would wait for the values and refuse them.
    with (
        jax.set_mesh(_mesh_of(device)),
        jax.transfer_guard("allow"),
        jax.debug_nans(False),
        jax.debug_infs(False),
    ):
        if max(array.shape) > np.iinfo(np.int32).max:  # positions on the device are int32
            return _slice(array, lo, hi)
        return _dynamic_slice(array, lo, sizes)


@functools.cache
def _mesh_of(device: Device) -> Mesh:
    return Mesh(np.array([device], dtype=object), ("_",), axis_types=(AxisType.Auto,))


@functools.partial(jax.jit, static_argnums=2)
def _dynamic_slice(array: Any, lo: tuple[int, ...], sizes: tuple[int, ...]) -> Any:
    return jax.lax.dynamic_slice(array, lo, sizes)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _slice(array: Any, lo: tuple[int, ...], hi: tuple[int, ...]) -> Any:
    return jax.lax.slice(array, lo, hi)
