"""Which saved leaf goes to which place of the wanted tree, and where do the two differ?

`match_leaves` holds saved leaves, by the names that `_naming` gave them, against the leaves of ``like``: missing,
unexpected, of another shape, dtype or kind. What is made of parts of saved leaves (`_deriving`) is held against it as
if it had been saved.

All functions are pure and report every difference at once.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ._deriving import Derivation, Source, derive
from ._errors import FormatError, MismatchError, Problem, list_problems
from ._manifest import LeafSpec, Manifest
from ._values import decode_value

_PYTHON_KINDS = (bool, int, float, complex, str, bytes)
_DTYPE_OF_NUMBER = {kind: np.dtype(kind) for kind in (bool, int, float, complex)}
_FLEXIBLE_TYPES = (np.str_, np.bytes_, np.void)

_CAST = "pass cast=True to convert dtypes"
_CAST_NUMBERS = "pass cast=True to convert between numbers"
_RESHAPE = "pass reshape=True to give arrays with equally many elements another shape"
_KEEP_MISSING = 'pass missing="keep" to keep the leaves of `like` that are not on disk'
_IGNORE_UNEXPECTED = 'pass unexpected="ignore" to leave out what `like` does not have'
_ADVICE = (_CAST, _CAST_NUMBERS, _RESHAPE, _KEEP_MISSING, _IGNORE_UNEXPECTED)


@dataclasses.dataclass(frozen=True, slots=True)
class Match:
    """What becomes of one leaf of the wanted tree.

    Attributes:
      leaf: Number of the saved leaf, or None to keep the one of ``like``.
      like: The leaf of ``like``; None when there is no ``like``.
      derivation: Of which rows it is made where it is not one saved leaf; ``leaf`` is the first one then.
    """

    leaf: int | None
    like: Any = None
    derivation: Derivation | None = None

    @property
    def leaves(self) -> tuple[int, ...]:
        """Numbers of all saved leaves that it needs."""
        if self.derivation is not None:
            return self.derivation.leaves
        return () if self.leaf is None else (self.leaf,)


def match_leaves(
    manifest: Manifest,
    saved: Mapping[str, int | Source],
    unselected: Iterable[str],
    like_keys: Sequence[str],
    like_leaves: Sequence[Any],
    *,
    missing: str,
    unexpected: str,
    cast: bool,
    reshape: bool,
    path: str,
) -> list[Match]:
    """Pairs the leaves of ``like`` with saved leaves.

    Args:
      manifest: What is saved.
      saved: New key of each selected leaf, to its number or what it is made of.
      unselected: Keys that are not asked for; places with these keys keep the leaf of ``like``.
      like_keys: Keys of the wanted tree.
      like_leaves: Its leaves.
      missing: ``"error"`` or ``"keep"``.
      unexpected: ``"error"`` or ``"ignore"``.
      cast: Whether dtypes may differ.
      reshape: Whether shapes may differ.
      path: For messages.

    Raises:
      MismatchError: With every difference that is not allowed.
    """
    kept = set(unselected)
    saved = _with_texts_of_like(saved, like_keys)
    matches: list[Match] = []
    problems: list[Problem] = []
    advice: set[str] = set()
    like_of_key = dict(zip(like_keys, like_leaves, strict=True))
    fitting: set[Any] = set()  # forms of leaves without differences
    for key, like in zip(like_keys, like_leaves, strict=True):
        if key in saved:
            match = match_source(manifest, key, saved[key], like_of_key, problems)
            matches.append(match)
            form = _form_of(manifest, match)
            if form in fitting:
                continue
            may_reshape = reshape and match.derivation is None
            differences = list(_differences(key, manifest, match, cast=cast, reshape=may_reshape))
            if form is not None and not differences:
                fitting.add(form)
            for problem, hint in differences:
                problems.append(problem)
                advice.add(hint)
            continue
        matches.append(Match(None, like))
        if key in kept:
            continue
        if missing != "keep":
            problems.append(Problem(key, "missing", "not on disk"))
            advice.add(_KEEP_MISSING)
        elif isinstance(like, jax.ShapeDtypeStruct) or hasattr(like, "restore_as_saved"):
            problems.append(Problem(key, "missing", "not on disk, and `like` has no value to keep there"))
    if unexpected != "ignore":
        wanted = set(like_keys)
        for key in saved:
            if key not in wanted:
                problems.append(Problem(key, "unexpected", "on disk, not in `like`"))
                advice.add(_IGNORE_UNEXPECTED)
    if problems:
        total = len({*like_keys, *saved})
        differing = len({problem.key for problem in problems})
        headline = f"cannot restore {path!r} like the given tree: {differing} of {total} leaves differ"
        raise MismatchError(
            list_problems(headline, problems, [hint for hint in _ADVICE if hint in advice]), problems
        )
    return matches


def _with_texts_of_like(
    saved: Mapping[str, int | Source], like_keys: Sequence[str]
) -> Mapping[str, int | Source]:
    """What has the key of an integer gets that of the text which ``like`` has instead of it, as ``"7"`` of 7.

    Formats that write all keys of dicts as text do not say which of them it was.
    """
    texts = {key.replace("/~s", "/").removeprefix("~s"): key for key in like_keys if "~s" in key}
    wanted = set(like_keys) if texts else set[str]()
    texts = {
        old: new for old, new in texts.items() if old in saved and old not in wanted and new not in saved
    }
    return {texts.get(key, key): leaf for key, leaf in saved.items()} if texts else saved


def match_source(
    manifest: Manifest,
    key: str,
    source: int | Source,
    like_of_key: Mapping[str, Any] | None,
    problems: list[Problem],
) -> Match:
    """What becomes of a leaf that is on disk; adds to the problems when it cannot be made."""
    like = None if like_of_key is None else like_of_key[key]
    if not isinstance(source, Source):
        return Match(source, like)
    try:
        derivation = derive(manifest, key, source, like_of_key)
    except MismatchError as error:
        problems.extend(error.problems)
        return Match(None, like)
    return Match(source.leaves[0], like, derivation)


def _form_of(manifest: Manifest, match: Match) -> Any:
    """What the differences of a leaf follow from, where it is shared with others: large trees have few forms."""
    dtype = getattr(match.like, "dtype", None)
    if match.leaf is None or match.derivation is not None or dtype is None:
        return None
    number = manifest.spec_numbers[match.leaf]
    if manifest.specs[number].kind == "value":  # whether it can be converted depends on what it is
        return None
    return number, type(match.like), match.like.shape, dtype


def _differences(
    key: str, manifest: Manifest, match: Match, *, cast: bool, reshape: bool
) -> Iterable[tuple[Problem, str]]:
    leaf, like = match.leaf, match.like
    if leaf is None or hasattr(like, "restore_as_saved"):
        return
    spec = manifest.spec(leaf) if match.derivation is None else match.derivation.spec
    if spec.kind == "strings":
        yield from _string_differences(key, spec, like)
        return
    like_kind = _kind_of(like)
    saved_kind = {"bytes": "value", "str": "value"}.get(spec.kind, spec.kind)
    if like_kind is None:
        yield Problem(key, "kind", f"`like` has a {type(like).__name__}, which is no array or number"), ""
        return
    if like_kind == "value" or saved_kind == "value":
        yield from _value_differences(key, manifest, leaf, spec, like, like_kind, saved_kind, cast=cast)
        return
    if (like_kind == "key") != (saved_kind == "key"):
        names = {True: "PRNG keys", False: "an array"}
        message = f"{names[saved_kind == 'key']} on disk, {names[like_kind == 'key']} in `like`"
        yield Problem(key, "kind", message), ""
        return
    if like_kind == "key" and like.dtype != key_dtype(key, spec):
        yield (
            Problem(key, "dtype", f"dtype {key_dtype(key, spec)} on disk, {like.dtype} in `like`"),
            "",
        )
    shape = logical_shape(spec)
    if tuple(like.shape) != shape:
        can_reshape = like_kind != "key" and math.prod(like.shape) == math.prod(shape)
        if not (can_reshape and reshape):
            hint = _RESHAPE if can_reshape and match.derivation is None else ""
            yield Problem(key, "shape", f"shape {shape} on disk, {tuple(like.shape)} in `like`"), hint
    if like_kind != "key" and np.dtype(like.dtype) != spec.np_dtype:
        message = f"dtype {spec.np_dtype} on disk, {np.dtype(like.dtype)} in `like`"
        if not has_cast(spec.np_dtype, np.dtype(like.dtype)):
            yield Problem(key, "dtype", message), ""
        elif not cast:
            yield Problem(key, "dtype", message), _CAST


def _string_differences(key: str, spec: LeafSpec, like: Any) -> Iterable[tuple[Problem, str]]:
    """Strings of a foreign file: one is ``bytes`` or ``str``, an array of them a NumPy array of objects."""
    in_like = f"{type(like).__name__} {getattr(like, 'dtype', '')}".rstrip()
    is_array = isinstance(like, np.ndarray) and like.dtype == object
    if not is_array and type(like) not in (bytes, str):
        yield Problem(key, "kind", f"strings on disk, {in_like} in `like`"), ""
    elif np.shape(like) != spec.shape:
        yield Problem(key, "shape", f"shape {spec.shape} on disk, {np.shape(like)} in `like`"), ""


def _value_differences(
    key: str,
    manifest: Manifest,
    leaf: int,
    spec: LeafSpec,
    like: Any,
    like_kind: str,
    saved_kind: str,
    *,
    cast: bool,
) -> Iterable[tuple[Problem, str]]:
    value = decode_value(manifest.values[leaf]) if spec.kind == "value" else None
    names = {"array": "a jax.Array", "numpy": "a NumPy array", "key": "PRNG keys", "value": spec.kind}
    on_disk = names[saved_kind] if value is None else _type_name(value)
    in_like = _type_name(like) if like_kind == "value" else names[like_kind]
    if on_disk == in_like:
        return
    message = f"{on_disk} on disk, {in_like} in `like`"
    # A number and an array without axes hold the same thing, but one is not the other.
    saved_dtype = _number_dtype(value) if value is not None else _array_dtype(saved_kind, spec)
    like_dtype = _number_dtype(like) if like_kind == "value" else _array_dtype(like_kind, like)
    saved_shape = () if saved_kind == "value" else spec.shape
    like_shape = () if like_kind == "value" else tuple(like.shape)
    is_scalar = saved_shape == like_shape == ()
    if saved_dtype is None or like_dtype is None or not (is_scalar and has_cast(saved_dtype, like_dtype)):
        yield Problem(key, "kind", message), ""
    elif not cast:
        yield Problem(key, "kind", message), _CAST_NUMBERS
    elif value is not None and not _fits(value, like, like_dtype):
        yield Problem(key, "kind", f"{str(value)[:40]} on disk does not fit {like_dtype} in `like`"), ""


def has_cast(saved: Any, like: Any) -> bool:
    """Whether ``cast=True`` converts between two dtypes: numbers, but none that is complex to one that is not."""
    if _is_numeric(saved) and _is_numeric(like):
        return not jnp.issubdtype(saved, jnp.complexfloating) or jnp.issubdtype(like, jnp.complexfloating)
    return bool(saved.kind == like.kind and np.can_cast(saved, like, "safe"))


def _is_numeric(dtype: np.dtype[Any]) -> bool:
    return bool(jnp.issubdtype(dtype, np.number) or jnp.issubdtype(dtype, np.bool_)) and dtype.kind != "m"


def _type_name(value: Any) -> str:
    """What a scalar is; for strings and raw bytes without their length."""
    if not isinstance(value, np.generic):
        return type(value).__name__
    has_length = value.dtype.kind in "SUV" and value.dtype.fields is None and type(value) in _FLEXIBLE_TYPES
    return f"numpy.{type(value).__name__ if has_length else value.dtype}"


def _number_dtype(value: Any) -> np.dtype[Any] | None:
    """The dtype that stands for a number, whatever its size; None for other scalars."""
    if isinstance(value, np.generic):
        return value.dtype if _is_numeric(value.dtype) else None
    return _DTYPE_OF_NUMBER.get(type(value))


def _array_dtype(kind: str, array: Any) -> np.dtype[Any] | None:
    """The dtype of a saved or wanted array of numbers; None for anything else."""
    if kind not in ("array", "numpy"):
        return None
    dtype = array.np_dtype if isinstance(array, LeafSpec) else np.dtype(array.dtype)
    return dtype if _is_numeric(dtype) else None


def _fits(value: Any, like: Any, dtype: np.dtype[Any]) -> bool:
    """Whether a number can be converted; an integer beyond the range, or NaN as an integer, cannot."""
    try:
        with np.errstate(all="ignore"):
            if isinstance(like, (np.generic, *_PYTHON_KINDS)):
                type(like)(value)
            else:
                np.asarray(value, dtype)
    except (OverflowError, ValueError, TypeError):
        return False
    return True


def _kind_of(like: Any) -> str | None:
    """Kind of a leaf of ``like``, in the words of the manifest."""
    if isinstance(like, np.generic) or type(like) in _PYTHON_KINDS:
        return "value"
    if isinstance(like, np.ndarray):
        return "numpy"
    if isinstance(like, (jax.Array, jax.ShapeDtypeStruct)):
        return "array" if isinstance(like.dtype, np.dtype) else "key"
    return None


def logical_shape(spec: LeafSpec) -> tuple[int, ...]:
    """Shape as users see it: key data has axes more than the keys."""
    return spec.shape[:-1] if spec.kind == "key" else spec.shape


def key_dtype(key: str, spec: LeafSpec) -> Any:
    """The dtype of saved PRNG keys.

    Raises:
      FormatError: JAX has no such implementation here, or its keys have data of another shape.
    """
    try:
        dtype, data_shape = _key_form(spec.impl or "")
    except ValueError as error:
        wrong = (
            f"holds PRNG keys of the implementation {spec.impl!r}, which is not registered in this program"
        )
        problem, cause = Problem(key, "dtype", wrong), error
    else:
        if spec.shape[-len(data_shape) :] == data_shape:
            return dtype
        wrong = f"holds PRNG keys of {spec.impl} with data of shape {spec.shape}, which is not (..., {data_shape})"
        problem, cause = Problem(key, "dtype", wrong), None
    raise FormatError(
        list_problems("cannot make PRNG keys of what is stored", [problem]), [problem]
    ) from cause


@functools.cache
def _key_form(impl: str) -> tuple[Any, tuple[int, ...]]:
    """The dtype of typed PRNG keys of an implementation, and the shape of the data of one."""
    key, data = jax.eval_shape(lambda: (made := jax.random.key(0, impl=impl), jax.random.key_data(made)))
    return key.dtype, data.shape
