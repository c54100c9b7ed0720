"""How do small host-side values (data-iterator states, configs, random states) lie beside a tree?

An *item* is a named value that is committed with a tree but is no part of it. All items of a checkpoint together are
one msgpack map ``{name: value}`` (FORMAT.md, "Items"):

1. None, bool, int of 64 bits, float, str, bytes, list, and dict with str keys are what msgpack has.
2. Larger ints and complex numbers are extension types.
3. Tuples, dicts with other keys, NumPy arrays and NumPy scalars are msgpack arrays whose first member, an extension
   type without a payload, says which of these it is. So nothing is encoded twice, however deep it lies.

`encode_items` walks the values on the caller's thread and copies everything, so that whatever happens to a value
afterwards changes nothing. It asks an object with ``get_state`` and ``set_state``, or ``state_dict`` and
``load_state_dict``, for its state and stores that. `decode_items` gives back equal values of equal types, and states
for objects; `check_items` and `load_items` hand the states to objects.

Invariants: what `encode_items` accepts, `decode_items` gives back exactly, but for arrays, which are all
`numpy.ndarray` in C order then. What it cannot give back exactly, such as an instance of a subclass, it refuses. Its
bounds (nesting, number of values) hold for any input, cycles too. `decode_items` takes memory in proportion to its
input, whatever the input claims.

Deliberately not here: pickle, where the bytes lie, and their checksum.
"""

from __future__ import annotations

import enum
import math
import struct
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn, final

import jax
import jax.core
import jax.numpy as jnp
import msgpack
import numpy as np

from ._dtypes import describe_dtype, dtype_from
from ._errors import (
    FormatError,
    MismatchError,
    Problem,
    UnsupportedLeafError,
    list_problems,
    printable,
)

# Arrays and maps of msgpack, one in the other, below the map of all items. Any state is far flatter, and Python's
# recursion limit and msgpack's are far away.
DEPTH_MAX = 100

# Of one item, each number in a list counting as one. A list of which every member is the same shorter list, and so on,
# needs no memory but would never be written to its end; it is refused in seconds.
_VALUES_MAX = 1 << 22

# The longest string, bytes or array that msgpack can hold.
_BYTES_MAX = (1 << 32) - 1

# NumPy's limit, which keeps hostile shapes short.
_RANK_MAX = 64
_SIZE_END = 1 << 63

_INT_TYPE = 1
_COMPLEX_TYPE = 2


class _Form(enum.Enum):
    """What a msgpack array is that begins with the extension type of this number."""

    TUPLE = 3  # [TUPLE, member, ...]
    DICT = 4  # [DICT, key, value, ...]
    ARRAY = 5  # [ARRAY, dtype descriptor, bytes, size, ...]
    SCALAR = 6  # [SCALAR, dtype descriptor, bytes]


_MARK_OF = {form: msgpack.ExtType(form.value, b"") for form in _Form}

_PYTHON_SCALAR_TYPES = frozenset([type(None), bool, int, float, complex, str, bytes])
_CONTAINER_TYPES = frozenset([list, tuple, dict])
_ARRAY_TYPES = frozenset([np.ndarray, np.memmap])

# The first pair that an object has counts.
_STATE_METHODS = (("get_state", "set_state"), ("state_dict", "load_state_dict"))

_ADVICE = "store None, numbers, strings, bytes, lists, tuples, dicts and arrays"


class _RefusedError(Exception):
    """Says why a value cannot be stored and what to do."""


class _TooManyValuesError(Exception):
    """An item holds more values than may be stored."""


# --- encoding -------------------------------------------------------------------------------------------------


def encode_items(items: Mapping[str, Any]) -> bytes:
    """The bytes that hold all items.

    Nothing of the values is kept: they may change as soon as this returns.

    Args:
      items: Name to value. A value is None, a bool, int, float, complex, str or bytes, a `numpy.ndarray`, a NumPy
        scalar or a `jax.Array`; a list, tuple or dict of values; or an object with ``get_state`` and ``set_state``, or
        ``state_dict`` and ``load_state_dict``, whose state is asked for now and is such a value.

    Raises:
      TypeError: The items are no mapping, or a name is no str.
      ValueError: A name is empty.
      UnsupportedLeafError: Some values cannot be stored; `.problems` lists all of them, each with its place.

    Blocks for: the values of each `jax.Array`.
    """
    _check_names(items)
    record: dict[str, Any] = {}
    problems: list[Problem] = []
    for name, value in items.items():
        encoder = _Encoder(name)
        record[name] = encoder.encode(_ask_for_state(name, value))
        problems += encoder.problems
    if problems:
        are_values = "1 value" if len(problems) == 1 else f"{len(problems)} values"
        headline = f"cannot save the items: {are_values} in them cannot be stored"
        raise UnsupportedLeafError(list_problems(headline, problems, ["nothing was written"]), problems)
    return bytes(msgpack.packb(record, unicode_errors="surrogatepass") or b"")


def _check_names(items: Any) -> None:
    if not isinstance(items, Mapping):
        raise TypeError(f"items must be a mapping of names to values, not {_type_name(items)}")
    names: Sequence[Any] = list(items)
    for name in names:
        if type(name) is not str:
            raise TypeError(f"the name of an item must be a str, not {_type_name(name)}")
        if not name:
            raise ValueError("the name of an item must not be empty")


def _is_plain(value: Any) -> bool:
    """Whether a value is stored itself; its parts may still be refused."""
    kind = type(value)
    if kind in _PYTHON_SCALAR_TYPES or kind in _CONTAINER_TYPES or kind in _ARRAY_TYPES:
        return True
    return isinstance(value, (np.generic, jax.Array))


def _state_methods(value: Any) -> tuple[str, str] | None:
    """Names of the methods that give and take the state of an object, or None when it has no such pair."""
    if isinstance(value, type):
        return None
    for methods in _STATE_METHODS:
        if all(callable(getattr(value, method, None)) for method in methods):
            return methods
    return None


def has_state(value: Any) -> bool:
    """Whether a value is an object that gives and takes a state, rather than a value to store."""
    return not _is_plain(value) and _state_methods(value) is not None


def _ask_for_state(name: str, value: Any) -> Any:
    """The state of an object; any other value is returned itself."""
    if _is_plain(value):
        return value
    methods = _state_methods(value)
    if methods is None:
        return value
    try:
        return getattr(value, methods[0])()
    except Exception as error:
        error.add_note(f"when the item {name!r} was asked for its state by {methods[0]}()")
        raise


@final
class _Encoder:
    """Turns the value of one item into what msgpack can hold, and collects what cannot be stored."""

    def __init__(self, name: str, values_max: int = _VALUES_MAX) -> None:
        self.problems: list[Problem] = []
        self._name = name
        self._values_max = values_max
        self._values_left = values_max
        self._place: list[Any] = []  # the indices and keys that lead to the value that is looked at
        self._open: set[int] = set()  # ids of the containers on that way, whose number is the depth

    def encode(self, value: Any) -> Any:
        """The encoded value; it means nothing when there are problems."""
        try:
            return self._encode(value)
        except _RefusedError as refusal:
            self._note(str(refusal))
        except _TooManyValuesError:
            self._note(f"holds more than {self._values_max} values; store long lists of numbers as arrays")
        return None

    def _note(self, message: str) -> None:
        place = "".join(_step_text(step) for step in self._place)
        where = f"item {self._name!r}: {place}: " if place else f"item {self._name!r}: "
        self.problems.append(Problem(None, "leaf", printable(where + message)))

    def _encode(self, value: Any) -> Any:
        self._values_left -= 1
        if self._values_left < 0:
            raise _TooManyValuesError
        kind = type(value)
        if kind is int:
            return _encode_int(value)
        if kind in _PYTHON_SCALAR_TYPES:
            return _encode_scalar(value)
        if kind in _CONTAINER_TYPES:
            return self._encode_container(value)
        if isinstance(value, jax.Array):
            return self._encode_container(_fetch(value))
        if isinstance(value, np.generic) or kind in _ARRAY_TYPES:
            return self._encode_container(value)
        raise _RefusedError(_refusal_text(value))

    def _encode_container(self, value: Any) -> Any:
        if id(value) in self._open:
            raise _RefusedError("contains itself")
        if len(self._open) == DEPTH_MAX:
            raise _RefusedError(f"is nested more than {DEPTH_MAX} deep")
        self._open.add(id(value))
        try:
            if isinstance(value, dict):
                return self._encode_dict(value)
            if isinstance(value, list):
                return [self._encode_child(index, child) for index, child in enumerate(value)]
            if isinstance(value, tuple):
                members = [self._encode_child(index, child) for index, child in enumerate(value)]
                return [_MARK_OF[_Form.TUPLE], *members]
            return self._encode_numpy(value)
        finally:
            self._open.remove(id(value))

    def _encode_child(self, step: Any, child: Any) -> Any:
        """A child, whose refusal does not keep the others from being looked at."""
        self._place.append(step)
        try:
            return self._encode(child)
        except _RefusedError as refusal:
            self._note(str(refusal))
            return None
        finally:
            self._place.pop()

    def _encode_dict(self, value: dict[Any, Any]) -> Any:
        if all(type(key) is str for key in value):
            return {key: self._encode_child(key, child) for key, child in value.items()}
        record: list[Any] = [_MARK_OF[_Form.DICT]]
        for key, child in value.items():
            if _is_key(key):
                record.append(self._encode(key))
            else:
                self._note(
                    f"has a dict key of type {_type_name(key)}; use scalars, or tuples of scalars, as keys"
                )
            record.append(self._encode_child(key, child))
        return record

    def _encode_numpy(self, value: np.ndarray[Any, Any] | np.generic) -> list[Any]:
        dtype = value.dtype
        try:
            descriptor = describe_dtype(dtype)
        except TypeError as error:
            raise _RefusedError(f"{error}; store it in a plain dtype") from error
        if isinstance(value, np.record) or dtype.type is np.record:
            raise _RefusedError(
                "holds records with attributes (numpy.record); view it as a plain structured dtype"
            )
        _check_length(value.nbytes)
        record = [self._encode(descriptor), value.tobytes()]
        if isinstance(value, np.ndarray):
            return [_MARK_OF[_Form.ARRAY], *record, *value.shape]
        # An empty string has a character's bytes in memory all the same.
        return [_MARK_OF[_Form.SCALAR], record[0], record[1][: dtype.itemsize]]


def _encode_int(value: int) -> Any:
    if -(1 << 63) <= value < 1 << 64:
        return value
    # As many bits as the number has in two's complement, one more for the sign, rounded up to bytes.
    length = (value + (value < 0)).bit_length() // 8 + 1
    _check_length(length)
    return msgpack.ExtType(_INT_TYPE, value.to_bytes(length, "little", signed=True))


def _encode_scalar(value: Any) -> Any:
    """None, a bool, float, complex, str or bytes."""
    if isinstance(value, complex):
        return msgpack.ExtType(_COMPLEX_TYPE, struct.pack("<dd", value.real, value.imag))
    if isinstance(value, str):
        _check_length(len(value) if value.isascii() else len(value.encode("utf-8", "surrogatepass")))
    elif isinstance(value, bytes):
        _check_length(len(value))
    return value


def _check_length(nbytes: int) -> None:
    if nbytes > _BYTES_MAX:
        raise _RefusedError(f"has {nbytes} bytes, and an item is for small values; put it into the tree")


def _fetch(array: jax.Array) -> np.ndarray[Any, Any]:
    """The values of an array of JAX on the host."""
    if isinstance(array, jax.core.Tracer):
        raise _RefusedError("is a tracer: save outside of jit, grad and vmap")
    if array.is_deleted():
        raise _RefusedError("was deleted or donated before the save; save before the step that donates it")
    dtype: Any = array.dtype
    if jnp.issubdtype(dtype, jax.dtypes.prng_key):
        raise _RefusedError(
            "holds typed PRNG keys; put them into the tree, or store jax.random.key_data of them"
        )
    if not isinstance(dtype, np.dtype):
        raise _RefusedError(f"has the extended dtype {dtype}, which has no stored form")
    if getattr(getattr(array.sharding, "spec", None), "unreduced", None):
        raise _RefusedError("is unreduced: its shards hold partial sums; put it into the tree reduced")
    if not (array.is_fully_addressable or array.is_fully_replicated):
        raise _RefusedError("spans several processes; put it into the tree")
    return np.asarray(array)


def _is_key(key: Any) -> bool:
    """Whether it can be stored as the key of a dict."""
    if type(key) is tuple:
        return all(_is_scalar_key(part) for part in key)
    return _is_scalar_key(key)


def _is_scalar_key(key: Any) -> bool:
    # A void scalar is made with memory of its own that can be written to, and then has no hash.
    return type(key) in _PYTHON_SCALAR_TYPES or (isinstance(key, np.generic) and not isinstance(key, np.void))


def _step_text(step: Any) -> str:
    """An index or a key of a dict as it would be written in Python."""
    if type(step) is str and step.isidentifier():
        return f".{step}"
    # Python refuses to write very long ints, and a class of the user's may write anything.
    is_short_int = type(step) is int and step.bit_length() <= 64
    if is_short_int or (type(step) is not int and type(step) in _PYTHON_SCALAR_TYPES):
        text = repr(step)
        return f"[{text}]" if len(text) <= 60 else f"[{text[:60]}...]"
    return f"[<{type(step).__name__}>]"


def _type_name(value: Any) -> str:
    kind = type(value)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def _refusal_text(value: Any) -> str:
    """Why a value is not stored and what to do."""
    name = _type_name(value)
    if isinstance(value, type):
        return f"is the class {value.__qualname__}; pass an instance"
    if _state_methods(value) is not None:
        return f"is an object with a state of its own ({name}) inside a value; make it an item of its own"
    if isinstance(value, np.ndarray):
        return f"is of type {name}; convert it with numpy.asarray, which drops what it adds"
    for base in (int, float, complex, str, bytes, list, tuple, dict):
        if isinstance(value, base):
            return f"is of type {name} and would come back as a plain {base.__name__}; store the plain value"
    if hasattr(value, "bit_generator"):
        return f"is of type {name}; store its .bit_generator.state"
    if hasattr(value, "getstate"):
        return f"is of type {name}; store its .getstate()"
    return f"is of type {name}; {_ADVICE}"


# --- decoding -------------------------------------------------------------------------------------------------


def decode_items(data: bytes, source: str) -> dict[str, Any]:
    """The items that `encode_items` encoded; what was an object comes back as its state.

    Args:
      data: The bytes.
      source: Where they came from, for messages.

    Raises:
      FormatError: They are no valid encoding.
    """
    try:
        items = _unpack(data)
        if not isinstance(items, dict):
            raise ValueError("they are not a map")
        if "" in items:
            raise ValueError("an item has an empty name")
        return {name: _decode(value, DEPTH_MAX) for name, value in items.items()}
    except Exception as error:
        # Hostile bytes can make Python and NumPy raise almost anything; all of it means this.
        problem = Problem(None, "object", f"{type(error).__name__}: {printable(str(error))[:200]}")
        raise FormatError(
            f"cannot read the items of {source!r}: their bytes are no valid encoding\n  {problem}\n"
            "use another checkpoint, or restore its tree without the items",
            [problem],
        ) from error


def _unpack(data: bytes) -> Any:
    """Decodes msgpack in memory that is bounded by the length of the data.

    A header of five bytes may claim four billion members, and msgpack takes memory for them before it looks. So they
    are counted first, without making any.
    """
    counter = msgpack.Unpacker(max_buffer_size=len(data))
    counter.feed(data)
    counter.skip()
    return msgpack.unpackb(
        data, ext_hook=_decode_extension, object_pairs_hook=_decode_map, unicode_errors="surrogatepass"
    )


def _decode_extension(number: int, payload: bytes) -> Any:
    if number == _INT_TYPE:
        value = int.from_bytes(payload, "little", signed=True)
        if _encode_int(value) != msgpack.ExtType(_INT_TYPE, payload):
            raise ValueError("an int that has a shorter encoding")
        return value
    if number == _COMPLEX_TYPE:
        return complex(*struct.unpack("<dd", payload))
    if payload:
        raise ValueError(f"an extension type {number} with a payload")
    return _Form(number)


def _decode_map(pairs: Sequence[tuple[Any, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("a map that has a key twice")
    if not all(type(key) is str for key in fields):
        raise ValueError("a map with a key that is no str")
    return fields


def _decode(record: Any, depth_left: int) -> Any:
    """The value of a record that msgpack has decoded."""
    kind = type(record)
    if kind in _PYTHON_SCALAR_TYPES:
        return record
    if kind is not dict and kind is not list:
        raise ValueError(f"a {kind.__name__} where a value should be")
    if not depth_left:
        raise ValueError(f"values that are nested more than {DEPTH_MAX} deep")
    if kind is dict:
        return {key: _decode(child, depth_left - 1) for key, child in record.items()}
    if record and isinstance(record[0], _Form):
        members = [_decode(child, depth_left - 1) for child in record[1:]]
        return _decode_form(record[0], members)
    return [_decode(child, depth_left - 1) for child in record]


def _decode_form(form: _Form, members: list[Any]) -> Any:
    match form:
        case _Form.TUPLE:
            return tuple(members)
        case _Form.DICT:
            return _decode_dict(members)
        case _Form.ARRAY:
            descriptor, data, *shape = members
            return _decode_array(descriptor, data, tuple(shape))
        case _Form.SCALAR:
            descriptor, data = members
            return _decode_numpy_scalar(descriptor, data)


def _decode_dict(members: list[Any]) -> dict[Any, Any]:
    if len(members) % 2:
        raise ValueError("a dict whose last key has no value")
    keys = members[::2]
    values = members[1::2]
    if not all(_is_key(key) for key in keys):
        raise ValueError("a dict with a key that is neither a scalar nor a tuple of scalars")
    decoded = dict(zip(keys, values, strict=True))
    if len(decoded) != len(keys):
        raise ValueError("a dict that has a key twice")
    return decoded


def _decode_array(descriptor: Any, data: Any, shape: tuple[Any, ...]) -> np.ndarray[Any, Any]:
    dtype = dtype_from(descriptor)
    if len(shape) > _RANK_MAX or not all(type(size) is int and 0 <= size < _SIZE_END for size in shape):
        raise ValueError("an array whose shape is none")
    if type(data) is not bytes or len(data) != math.prod(shape) * dtype.itemsize:
        raise ValueError("an array whose length is not that of its shape")
    # A view of memory that nobody else has: NumPy's own copy may leave out the padding of structured dtypes.
    return np.ndarray(shape, dtype, bytearray(data))


def _decode_numpy_scalar(descriptor: Any, data: Any) -> Any:
    dtype = dtype_from(descriptor)
    if type(data) is not bytes or len(data) != dtype.itemsize:
        raise ValueError("a NumPy scalar whose length is not that of its dtype")
    # Through an array, strings would lose the zeros at their end.
    if dtype.kind == "U":
        encoding = "utf-32-le" if dtype == dtype.newbyteorder("<") else "utf-32-be"
        return np.str_(data.decode(encoding, "surrogatepass"))
    if dtype.kind == "S":
        return np.bytes_(data)
    return np.ndarray((), dtype, bytearray(data))[()]


# --- objects --------------------------------------------------------------------------------------------------


def check_items(targets: Mapping[str, Any], states: Mapping[str, Any], source: str) -> None:
    """Checks all that `load_items` needs, and changes nothing.

    Args:
      targets: As for `load_items`.
      states: As for `load_items`.
      source: As for `load_items`.

    Raises:
      TypeError: The targets are no mapping, a name is no str, or a target is no object with a state.
      ValueError: A name is empty.
      MismatchError: Some names are not among the states; `.problems` lists all of them.
    """
    _check_names(targets)
    for name, target in targets.items():
        _state_setter(name, target)
    missing = [name for name in targets if name not in states]
    if missing:
        _refuse_missing(missing, len(targets), states, source)


def load_items(targets: Mapping[str, Any], states: Mapping[str, Any], source: str) -> None:
    """Gives each object the state that was saved under its name.

    All names and objects are checked before any object is changed. When an object then refuses its state, those before
    it have theirs already.

    Args:
      targets: Name to object; an object takes its state by ``set_state`` or ``load_state_dict``.
      states: What `decode_items` returned; names that no target has are left out.
      source: Where the states came from, for messages.

    Raises:
      TypeError: As of `check_items`.
      ValueError: As of `check_items`.
      MismatchError: As of `check_items`.
    """
    check_items(targets, states, source)
    for name, target in targets.items():
        setter = _state_setter(name, target)
        try:
            getattr(target, setter)(states[name])
        except Exception as error:
            error.add_note(f"when the item {name!r} of {source!r} was given its state by {setter}()")
            raise


def _state_setter(name: str, target: Any) -> str:
    """Name of the method by which an object takes its state."""
    methods = None if _is_plain(target) else _state_methods(target)
    if methods is None:
        _refuse_target(name, target)
    return methods[1]


def _refuse_target(name: str, target: Any) -> NoReturn:
    what = f"the class {target.__qualname__}" if isinstance(target, type) else f"of type {_type_name(target)}"
    raise TypeError(
        f"items[{name!r}] is {what}, which takes no state: give an object with get_state and set_state, or "
        f"state_dict and load_state_dict, or read a plain value from `jaxckpt.open(path).items[{name!r}]`"
    )


def _refuse_missing(missing: list[str], count: int, states: Mapping[str, Any], source: str) -> NoReturn:
    problems = [
        Problem(None, "missing", printable(f"item {name!r}: not in the checkpoint")) for name in missing
    ]
    names = ", ".join(printable(repr(name)) for name in sorted(states))
    advice = f"the checkpoint has the items {names}" if names else "the checkpoint has no items"
    headline = f"cannot restore the items of {source!r}: {len(missing)} of {count} are not there"
    raise MismatchError(list_problems(headline, problems, [advice]), problems)
