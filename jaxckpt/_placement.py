"""How do verified bytes on the host become leaves again?

A `Target` says for one leaf what is wanted: which kind, on which sharding, in which shape and dtype. From it follow
the boxes to read (`boxes_of`), and `place` makes the leaf from them.

On CPU a 64-byte aligned buffer becomes a `jax.Array` without a copy, so buffers are never written again after they
were placed. Arrays are built with `jax.make_array_from_callback`, which puts the shards of one array on their devices
with one call, and takes half the time of a `jax.device_put` of all arrays at once; the boxes were deduplicated before,
so that replicas share their host bytes.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import Sharding

from ._deriving import Derivation
from ._manifest import LeafSpec, Manifest
from ._resharding import Destination
from ._shardings import Box, shard_boxes
from ._values import decode_text, decode_value


@dataclasses.dataclass(frozen=True, slots=True)
class Target:
    """What one restored leaf shall be.

    Attributes:
      leaf: Number of the saved leaf, or of the first of several.
      kind: ``"array"``, ``"key"``, ``"numpy"``, ``"value"``, ``"bytes"``, ``"str"``.
      sharding: For arrays and keys; None makes them uncommitted on the default device.
      shape: Wanted shape of the array or key data.
      dtype: Wanted dtype; for keys that of the key data.
      weak_type: Whether the array is weakly typed.
      python_type: Type of a Python number that is made from an array (``cast=True``).
      derivation: Of which rows it is made where it is not one saved leaf; then `_gathering` makes it.
    """

    leaf: int
    kind: str
    sharding: Sharding | None = None
    shape: tuple[int, ...] = ()
    dtype: np.dtype[Any] | None = None
    weak_type: bool = False
    python_type: type | None = None
    derivation: Derivation | None = None

    @property
    def leaves(self) -> tuple[int, ...]:
        """Numbers of all saved leaves that it needs."""
        return (self.leaf,) if self.derivation is None else self.derivation.leaves

    def saved_spec(self, manifest: Manifest) -> LeafSpec:
        """What was saved; of a derived leaf what would have been."""
        return manifest.spec(self.leaf) if self.derivation is None else self.derivation.spec


def is_fortran(target: Target, spec: LeafSpec) -> bool:
    """Whether the leaf is a NumPy array in Fortran order; turning it later would take its memory twice."""
    return (
        target.kind == "numpy" and spec.kind == "numpy" and spec.order == "F" and target.shape == spec.shape
    )


def is_as_stored(target: Target, spec: LeafSpec) -> bool:
    """Whether the leaf's arrays are the bytes of its boxes as they lie on disk, so that on CPU they can alias them."""
    return (
        target.kind in ("array", "key", "numpy")
        and spec.kind != "value"
        and target.shape == spec.shape
        and target.dtype in (None, spec.np_dtype)
    )


def boxes_of(target: Target, spec: LeafSpec) -> tuple[Box, ...]:
    """The distinct boxes of the stored form that a target needs from this process."""
    if spec.kind == "value":
        return ()
    stored = spec.stored_shape
    if target.kind in ("array", "key") and target.sharding is not None and target.shape == spec.shape:
        return _boxes_of_shards(target.sharding, spec.shape, stored[len(spec.shape) :])
    return (((0,) * len(stored), stored),)


@functools.lru_cache(maxsize=4096)
def _boxes_of_shards(sharding: Sharding, shape: tuple[int, ...], tail: tuple[int, ...]) -> tuple[Box, ...]:
    """Boxes of shards on disk, where opaque dtypes have an axis of bytes more: the ``tail``."""
    zeros = (0,) * len(tail)
    return tuple((lo + zeros, hi + tail) for lo, hi in shard_boxes(sharding, shape))


def place(target: Target, spec: LeafSpec, value: Any, destinations: Sequence[Destination]) -> Any:
    """The leaf that a target wants.

    Args:
      target: What is wanted.
      spec: What was saved.
      value: The saved value's record, for leaves that lie in the manifest.
      destinations: One for each box of `boxes_of`, filled.
    """
    if spec.kind == "value":
        return _from_value(target, decode_value(value))
    if target.kind == "bytes":
        return _whole(destinations, spec).tobytes()
    if target.kind == "str":
        return decode_text(_whole(destinations, spec).tobytes())
    if target.kind == "value":
        assert target.python_type is not None
        return target.python_type(_whole(destinations, spec).reshape(())[()])
    if target.kind == "numpy":
        return _numpy_leaf(target, spec, destinations)
    return finish(target, spec, _jax_array(target, spec, destinations))


def finish(target: Target, spec: LeafSpec, array: jax.Array) -> jax.Array:
    """The leaf that a target wants, from its elements on its devices."""
    if target.kind == "key":
        return jax.random.wrap_key_data(array, impl=spec.impl)
    return with_weak_type(array) if target.weak_type else array


def _from_value(target: Target, value: Any) -> Any:
    with np.errstate(all="ignore"):
        if target.kind == "value":
            return value if target.python_type in (None, type(value)) else target.python_type(value)
        array = np.asarray(value, target.dtype)
    if target.kind == "numpy":
        return array
    if target.sharding is None:
        placed = jax.device_put(array)
    else:  # `device_put` onto devices of other processes would compare the values between them first
        placed = jax.make_array_from_callback(
            array.shape, target.sharding, lambda index: array[index], dtype=array.dtype
        )
    return with_weak_type(placed) if target.weak_type else placed


def typed(destination: Destination, spec: LeafSpec) -> np.ndarray[Any, Any]:
    """A destination as an array of the saved dtype in the shape of its box."""
    lo, hi = destination.box
    sizes = tuple(map(operator.sub, hi, lo))[: len(spec.shape)]
    # `ndarray`, since `empty` would give strings of no characters one, and `view` and `reshape` take twice as long.
    if destination.buffer is None or destination.nbytes == 0:
        return np.ndarray(sizes, spec.np_dtype)
    if destination.fortran_axes:
        return np.ndarray(sizes[::-1], spec.np_dtype, destination.buffer).T
    return np.ndarray(sizes, spec.np_dtype, destination.buffer)


def _whole(destinations: Sequence[Destination], spec: LeafSpec) -> np.ndarray[Any, Any]:
    (destination,) = destinations
    return typed(destination, spec)


def _numpy_leaf(target: Target, spec: LeafSpec, destinations: Sequence[Destination]) -> np.ndarray[Any, Any]:
    array = _whole(destinations, spec).reshape(target.shape)
    if target.dtype is not None and array.dtype != target.dtype:
        array = cast(array, target.dtype)
    return np.asfortranarray(array) if spec.order == "F" else array


def _jax_array(target: Target, spec: LeafSpec, destinations: Sequence[Destination]) -> jax.Array:
    dtype = target.dtype or spec.np_dtype
    if target.sharding is None or target.shape != spec.shape:
        whole = cast(_whole(destinations, spec).reshape(target.shape), dtype)
        if target.sharding is None:
            return jax.device_put(whole)
        return jax.make_array_from_callback(
            target.shape,
            target.sharding,
            lambda index: np.asarray(whole[index], dtype, order="C"),
            dtype=dtype,
        )
    rank = len(spec.shape)
    arrays = {
        destination.box[0][:rank]: cast(typed(destination, spec), dtype) for destination in destinations
    }
    return assemble(target, dtype, arrays)


def assemble(
    target: Target, dtype: np.dtype[Any], arrays: Mapping[tuple[int, ...], np.ndarray[Any, Any]]
) -> jax.Array:
    """An array of its distinct shards, as many as the devices of this process need, by their first elements."""
    if target.sharding is None:
        (whole,) = arrays.values()
        return jax.device_put(whole)
    if not arrays:
        # `make_array_from_callback` asks for the values of a replicated array where no device wants them, too.
        return jax.make_array_from_single_device_arrays(target.shape, target.sharding, [], dtype=dtype)
    if len(arrays) == 1:
        (only,) = arrays.values()
        return jax.make_array_from_callback(target.shape, target.sharding, lambda _: only)
    return jax.make_array_from_callback(
        target.shape, target.sharding, lambda index: arrays[tuple([part.start or 0 for part in index or ()])]
    )


def cast(array: np.ndarray[Any, Any], dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
    """The array in another dtype; overflows were asked for."""
    if array.dtype == dtype:
        return array
    with np.errstate(all="ignore"):
        try:
            return array.astype(dtype, copy=False)
        except TypeError:
            # NumPy knows no way between some types of at most a byte; int8 and float32 hold them exactly.
            are_integers = all(jnp.issubdtype(each, np.integer) for each in (array.dtype, dtype))
            return array.astype(np.int8 if are_integers else np.float32).astype(dtype)


def with_weak_type(array: jax.Array) -> jax.Array:
    """The same array, weakly typed. There is no public way; a checkpoint would cost a retrace without it."""
    if not isinstance(array, Tracer):
        try:
            # What jax.Array's own unpickling did up to 0.11; nothing is copied.
            array.aval = array.aval.update(weak_type=True)  # type: ignore[misc, attr-defined]
            return array
        except AttributeError:  # from 0.12 on it is read-only
            pass
    from jax._src.lax import lax

    convert: Any = lax._convert_element_type  # noqa: SLF001
    return convert(array, array.dtype, weak_type=True)
