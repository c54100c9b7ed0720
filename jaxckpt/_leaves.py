"""What kinds of leaves are there, and what must be known of each to bring it back exactly?

A leaf is a `jax.Array`, an array of typed PRNG keys, a `numpy.ndarray`, or a Python or NumPy scalar; for conversions
also a `StreamedArray`, which is never in memory whole. `inspect_leaves` finds for each a `Template`, which says all
but its value, and either the value itself or the array whose bytes are to be written. Everything that cannot be stored
is refused here, all of it at once, before any I/O.

A training loop saves the same kinds of leaves again and again. So the templates of the last few trees are remembered as
one object each (`Kinds`), found again by what JAX says of every array: its aval (shape, dtype, weak type), its sharding
and whether it is committed. These are immutable, and mostly the same objects from step to step, so that comparing them
costs a fifth of looking at each leaf: 0.5 us. All other leaves are looked at each time. No array is remembered.
"""

from __future__ import annotations

import dataclasses
import functools
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any, final

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding

from ._dtypes import describe_dtype, is_jax_dtype, stored_form
from ._errors import Problem, UnsupportedLeafError, list_problems
from ._garbage import collection_paused
from ._layout import LeafExtent
from ._manifest import RANK_MAX, LeafSpec
from ._shardings import ShardMap, is_own_sharding, local_boxes, map_shards
from ._storage import Buffer
from ._values import encode_value

# Longer strings go to chunks, so that the manifest stays small.
_INLINE_BYTES_MAX = 1 << 14

_VALUE_TYPES = (bool, int, float, complex, str, bytes)


@dataclasses.dataclass(frozen=True, slots=True)
class Template:
    """All that leaves with equal shape, dtype and sharding share; built once for each and reused.

    Attributes:
      spec: For the manifest; its chunk shape and sharding index are filled in later.
      sharding: Sharding of the array, or None for host data.
      extent: For the layout; None for values.
      descriptor: How host data shall be sharded when it is restored, in the words of `describe_sharding`.
    """

    spec: LeafSpec
    sharding: Sharding | None
    extent: LeafExtent | None
    descriptor: dict[str, Any] | None = None


@final
@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class StreamedArray:
    """An array whose bytes are read while they are written, so that it never is in memory whole.

    Only blocking saves of one process take it, beside leaves in host memory.

    Attributes:
      shape: Shape.
      dtype: Type of the elements.
      read: Gives bytes ``[lo, hi)`` of the array in C order, little endian, valid until the next call. It is called on
        one thread, with ranges that go forward through the array and cover each byte once. What it raises ends the
        save.
      kind: ``"array"``, ``"numpy"``, or ``"key"`` for the data of typed PRNG keys; by default what the dtype allows.
      impl: Name of the PRNG implementation, for keys.
      sharding: How it is sharded when it is restored, in the words of `describe_sharding`; None leaves it uncommitted.
        Equal ones should be one object, as they are told apart by that.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    read: Callable[[int, int], Buffer]
    kind: str = ""
    impl: str | None = None
    sharding: dict[str, Any] | None = None


Data = jax.Array | np.ndarray[Any, Any] | StreamedArray


@dataclasses.dataclass(frozen=True, eq=False)
class Kinds:
    """The templates of the leaves of a tree: one object for equal trees, by which more is remembered."""

    templates: tuple[Template, ...]

    @functools.cached_property
    def extents(self) -> tuple[LeafExtent | None, ...]:
        """For the layout."""
        return tuple(template.extent for template in self.templates)

    @functools.cached_property
    def shardings(self) -> frozenset[Sharding]:
        """All shardings, each once."""
        return frozenset(template.sharding for template in self.templates if template.sharding is not None)

    @functools.cached_property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(template.spec.nbytes for template in self.templates)


@dataclasses.dataclass(frozen=True, slots=True)
class Leaves:
    """The leaves of a tree, all of which can be stored.

    Attributes:
      kinds: What they are.
      arrays: The array that holds the bytes of each; None for values.
      values: The values that lie in the manifest, by the number of the leaf.
    """

    kinds: Kinds
    arrays: Sequence[Data | None]
    values: dict[int, Any]


NO_LEAVES = Leaves(Kinds(()), (), {})


@dataclasses.dataclass(frozen=True, slots=True)
class _Leaf:
    """A leaf: its template, and its value or the array that holds its bytes."""

    template: Template
    value: Any = None
    data: Data | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class _Traits:
    """What the kinds of a tree's leaves are found again by.

    Attributes:
      avals: Of each array of JAX; of any other leaf its template.
      shardings, are_committed: Of each array of JAX, else None.
    """

    avals: list[Any]
    shardings: list[Sharding | None]
    are_committed: list[bool | None]


class _RefusedError(Exception):
    """Says why a leaf cannot be stored and what to do."""


# The kinds of the last few trees, the newest last.
_KINDS_MAX = 8
_known_kinds: dict[Kinds, _Traits] = {}
_kinds_lock = threading.Lock()


@collection_paused()
def inspect_leaves(keys: Sequence[str], leaves: Sequence[Any]) -> Leaves:
    """Classifies the leaves of a tree.

    Raises:
      UnsupportedLeafError: Some cannot be stored; `.problems` lists all of them.
    """
    array_classes = {kind for kind in set(map(type, leaves)) if _is_array_class(kind)}
    is_array = [type(leaf) in array_classes and not leaf.is_deleted() for leaf in leaves]
    problems: dict[int, Problem] = {}
    others = _inspect_each(keys, leaves, [n for n, known in enumerate(is_array) if not known], problems)
    traits = _Traits(
        [leaf.aval if known else None for leaf, known in zip(leaves, is_array, strict=True)],
        [leaf.sharding if known else None for leaf, known in zip(leaves, is_array, strict=True)],
        [leaf.committed if known else None for leaf, known in zip(leaves, is_array, strict=True)],
    )
    arrays = list(leaves)
    for number, other in others.items():
        traits.avals[number] = other.template
        arrays[number] = other.data
    kinds = None if problems else _find_kinds(traits)
    if kinds is None:
        numbers = [n for n, known in enumerate(is_array) if known]
        inspected = others | _inspect_each(keys, leaves, numbers, problems)
        if problems:
            headline = f"cannot save the tree: {len(problems)} of {len(keys)} leaves cannot be stored"
            listed = [problems[number] for number in sorted(problems)]
            raise UnsupportedLeafError(list_problems(headline, listed, ["nothing was written"]), listed)
        kinds = Kinds(tuple(inspected[number].template for number in range(len(leaves))))
    _remember_kinds(traits, kinds)
    values = {number: leaf.value for number, leaf in others.items() if leaf.template.extent is None}
    return Leaves(kinds, arrays, values)


@functools.lru_cache(maxsize=64)
def _is_array_class(kind: type) -> bool:
    """Whether a class is that of JAX's own arrays on devices: not tracers, keys, and what others derive from it."""
    return issubclass(kind, jax.Array) and kind.__module__.partition(".")[0] == "jaxlib"


def _inspect_each(
    keys: Sequence[str], leaves: Sequence[Any], numbers: Iterable[int], problems: dict[int, Problem]
) -> dict[int, _Leaf]:
    """Looks at the leaves with these numbers; adds to the problems what cannot be stored."""
    inspected: dict[int, _Leaf] = {}
    for number in numbers:
        try:
            inspected[number] = _inspect(leaves[number])
        except _RefusedError as refusal:
            problems[number] = Problem(keys[number], "leaf", str(refusal))
    return inspected


def _find_kinds(traits: _Traits) -> Kinds | None:
    with _kinds_lock:
        return next((kinds for kinds, known in _known_kinds.items() if known == traits), None)


def _remember_kinds(traits: _Traits, kinds: Kinds) -> None:
    """Remembers kinds as the newest, with the objects of this tree: the next one probably has the same."""
    with _kinds_lock:
        _known_kinds.pop(kinds, None)
        _known_kinds[kinds] = traits
        if len(_known_kinds) > _KINDS_MAX:
            del _known_kinds[next(iter(_known_kinds))]


def _inspect(leaf: Any) -> _Leaf:
    if isinstance(leaf, jax.Array):
        return _inspect_jax(leaf)
    if isinstance(leaf, np.ndarray):
        return _inspect_numpy(leaf)
    if isinstance(leaf, StreamedArray):
        return _inspect_streamed(leaf)
    if isinstance(leaf, np.generic):
        return _Leaf(_VALUE_TEMPLATE, value=_encode_scalar(leaf))
    if type(leaf) in _VALUE_TYPES:
        return _inspect_value(leaf)
    if isinstance(leaf, jax.ShapeDtypeStruct):
        raise _RefusedError("is a ShapeDtypeStruct, which has no values; save arrays")
    if isinstance(leaf, jax.Ref):
        raise _RefusedError("is a jax.Ref, which later code changes; save the array that it holds, ref[...]")
    if callable(leaf):
        raise _RefusedError(
            f"is a {type(leaf).__name__}, and code is not stored; take it out of the tree "
            "(equinox.partition(tree, equinox.is_array), or a static field)"
        )
    name = f"{type(leaf).__module__}.{type(leaf).__qualname__}"
    if hasattr(type(leaf), "value"):  # a variable of Keras, or a member of an enumeration
        raise _RefusedError(f"is of type {name}; store its .value, or register the type as a pytree node")
    raise _RefusedError(
        f"is of type {name}; store arrays, numbers, strings or bytes, or register the type as a pytree node"
    )


def _inspect_jax(leaf: jax.Array) -> _Leaf:
    if isinstance(leaf, jax.core.Tracer):
        raise _RefusedError("is a tracer: call save outside of jit, grad and vmap")
    if leaf.is_deleted():
        raise _RefusedError("was deleted or donated before the save; save before the step that donates it")
    sharding = leaf.sharding
    if getattr(getattr(sharding, "spec", None), "unreduced", None):
        raise _RefusedError(
            "is unreduced: its shards hold partial sums; jax.reshard it to a reduced sharding first"
        )
    dtype: Any = leaf.dtype
    if isinstance(dtype, np.dtype):
        return _Leaf(
            _array_template(leaf.shape, dtype, leaf.weak_type, leaf.committed, sharding),
            data=leaf,
        )
    if not jnp.issubdtype(dtype, jax.dtypes.prng_key):
        raise _RefusedError(
            f"has the extended dtype {leaf.dtype}, which has no stored form; save its base array"
        )
    data = jax.random.key_data(leaf)
    return _Leaf(
        _key_template(
            str(jax.random.key_impl(leaf)), data.shape, data.dtype, leaf.committed, sharding, data.sharding
        ),
        data=data,
    )


def _inspect_numpy(leaf: np.ndarray[Any, Any]) -> _Leaf:
    if type(leaf) not in (np.ndarray, np.memmap):
        raise _RefusedError(
            f"is a {type(leaf).__qualname__}; convert it with numpy.asarray, which drops what it adds"
        )
    if leaf.dtype.hasobject:
        raise _RefusedError(
            f"is an array of Python objects ({leaf.dtype}); convert it to a dtype with a fixed size"
        )
    try:
        descriptor = describe_dtype(leaf.dtype)
    except TypeError as error:
        raise _RefusedError(f"{error}; save its fields, or a copy in a plain dtype, instead") from error
    order = "F" if leaf.flags.f_contiguous and not leaf.flags.c_contiguous else "C"
    spec = LeafSpec(kind="numpy", dtype=descriptor, shape=leaf.shape, order=order)
    return _Leaf(Template(spec, None, _host_extent(leaf.shape, leaf.dtype)), data=leaf)


def _inspect_streamed(leaf: StreamedArray) -> _Leaf:
    # What JAX cannot have here would keep every restore without `like` from the rest.
    is_for_jax = is_jax_dtype(leaf.dtype) and jax.dtypes.canonicalize_dtype(leaf.dtype) == leaf.dtype
    kind = leaf.kind or ("array" if is_for_jax else "numpy")
    dtype = describe_dtype(leaf.dtype)
    descriptor = None if kind == "numpy" else leaf.sharding
    is_committed = kind == "numpy" or descriptor is not None
    spec = LeafSpec(kind=kind, dtype=dtype, shape=leaf.shape, committed=is_committed, impl=leaf.impl)
    return _Leaf(Template(spec, None, _host_extent(leaf.shape, leaf.dtype), descriptor), data=leaf)


def _inspect_value(leaf: Any) -> _Leaf:
    if isinstance(leaf, str) and len(leaf) > _INLINE_BYTES_MAX // 4:
        return _long_value("str", leaf.encode("utf-8", "surrogatepass"))
    if isinstance(leaf, bytes) and len(leaf) > _INLINE_BYTES_MAX:
        return _long_value("bytes", leaf)
    return _Leaf(_VALUE_TEMPLATE, value=encode_value(leaf))


def _long_value(kind: str, data: bytes) -> _Leaf:
    array = np.frombuffer(data, np.uint8)
    spec = LeafSpec(kind=kind, dtype="uint8", shape=array.shape)
    return _Leaf(Template(spec, None, _host_extent(array.shape, array.dtype)), data=array)


def _encode_scalar(leaf: np.generic) -> list[Any]:
    try:
        return encode_value(leaf)
    except TypeError as error:
        raise _RefusedError(f"{error}; save its fields, or a copy in a plain dtype, instead") from error


_VALUE_TEMPLATE = Template(LeafSpec("value"), None, None)


@functools.lru_cache(maxsize=4096)
def _array_template(
    shape: tuple[int, ...], dtype: np.dtype[Any], weak_type: bool, committed: bool, sharding: Sharding
) -> Template:
    spec = LeafSpec(
        kind="array", dtype=describe_dtype(dtype), shape=shape, weak_type=bool(weak_type), committed=committed
    )
    return Template(spec, sharding, _device_extent(shape, dtype, sharding))


@functools.lru_cache(maxsize=256)
def _key_template(
    impl: str,
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
    committed: bool,
    key_sharding: Sharding,
    data_sharding: Sharding,
) -> Template:
    spec = LeafSpec(kind="key", dtype=describe_dtype(dtype), shape=shape, committed=committed, impl=impl)
    return Template(spec, key_sharding, _device_extent(shape, dtype, data_sharding))


def _device_extent(shape: tuple[int, ...], dtype: np.dtype[Any], sharding: Sharding) -> LeafExtent:
    """Extent of a sharded array; of equal shards here the first in the order of the array's own shards is written."""
    owners: dict[tuple[int, ...], int] = {}
    for number, (_, box) in enumerate(local_boxes(sharding, shape)):
        owners.setdefault(box[0], number)
    shards = None if is_own_sharding(sharding) else map_shards(sharding, shape)
    return _extent(shape, dtype, sharding.shard_shape(shape), owners, shards)


def _host_extent(shape: tuple[int, ...], dtype: np.dtype[Any]) -> LeafExtent:
    return _extent(shape, dtype, shape, {(0,) * len(shape): 0})


def _extent(
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
    shard_shape: tuple[int, ...],
    owners: dict[tuple[int, ...], int],
    shards: ShardMap | None = None,
) -> LeafExtent:
    stored_shape, itemsize = stored_form(dtype, shape)
    if len(stored_shape) > RANK_MAX:
        raise _RefusedError(f"has rank {len(shape)}, and at most {RANK_MAX} axes are stored; reshape it")
    stored_shard, _ = stored_form(dtype, shard_shape)
    corner_tail = (0,) * (len(stored_shape) - len(shape))
    return LeafExtent(
        shape=stored_shape,
        itemsize=itemsize,
        shard_shape=tuple(max(size, 1) for size in stored_shard),
        owners=tuple((corner + corner_tail, number) for corner, number in owners.items()),
        shards=shards,
    )
