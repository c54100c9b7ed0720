"""Which saved leaf goes to which place of the wanted tree, and where do the two differ?

All functions are pure and report every difference at once.

1. `select_keys`: which saved leaves are asked for.
2. `rename_keys`: what they are called from now on; a rule that renames nothing is an error, as are collisions.
3. `match_leaves`: saved leaves against the leaves of ``like``: missing, unexpected, other shape, dtype or kind.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from ._errors import MismatchError, Problem, list_problems
from ._manifest import LeafSpec, Manifest

Select = str | Sequence[str] | Callable[[str], bool] | None
Rename = Mapping[str, str] | Sequence[tuple[str, str]] | None

_PYTHON_KINDS = (bool, int, float, complex, str, bytes)


def select_keys(keys: Sequence[str], select: Select) -> list[bool]:
    """Which keys are selected.

    Args:
      keys: Saved keys.
      select: A glob pattern over whole keys in which ``*`` also matches ``/``, several of them, or a predicate.
        None selects all.

    Raises:
      MismatchError: A pattern matches no key.
    """
    if select is None:
        return [True] * len(keys)
    if callable(select):
        return [bool(select(key)) for key in keys]
    patterns = [select] if isinstance(select, str) else list(select)
    compiled = [re.compile(fnmatch.translate(pattern)) for pattern in patterns]
    matches = [[bool(pattern.match(key)) for key in keys] for pattern in compiled]
    problems = [
        Problem(pattern, "select", "matches no saved key")
        for pattern, row in zip(patterns, matches, strict=True)
        if not any(row)
    ]
    if problems:
        advice = [f"saved keys: {_some(keys)}"]
        raise MismatchError(
            list_problems("select= names leaves that are not there", problems, advice), problems
        )
    return [any(column) for column in zip(*matches, strict=True)] if matches else [False] * len(keys)


def rename_keys(keys: Sequence[str], rename: Rename) -> list[str]:
    """New names of saved keys.

    Args:
      keys: Saved keys.
      rename: A mapping of saved keys, or of leading parts of them (whole components), to new ones; or pairs of
        a regular expression that must match a whole saved key and its replacement. The first rule that fits wins.

    Raises:
      MismatchError: A rule fits no key, or two leaves get the same key.
    """
    if rename is None:
        return list(keys)
    if isinstance(rename, Mapping):
        # The longest prefix first: the exact key before its parents.
        rules = sorted(rename.items(), key=lambda rule: -len(rule[0]))
        apply = _rename_prefix
    else:
        rules = list(rename)
        apply = _rename_regex
    used = [False] * len(rules)
    renamed = []
    for key in keys:
        new_key = key
        for number, (old, new) in enumerate(rules):
            replaced = apply(key, old, new)
            if replaced is not None:
                used[number] = True
                new_key = replaced
                break
        renamed.append(new_key)
    problems = [
        Problem(old, "rename", "this rule renames no saved key")
        for (old, _), is_used in zip(rules, used, strict=True)
        if not is_used
    ]
    first_owner: dict[str, str] = {}
    for key, new_key in zip(keys, renamed, strict=True):
        if new_key in first_owner:
            problems.append(Problem(new_key, "rename", f"would be both {first_owner[new_key]!r} and {key!r}"))
        first_owner[new_key] = key
    if problems:
        raise MismatchError(
            list_problems("rename= cannot be applied", problems, [f"saved keys: {_some(keys)}"]), problems
        )
    return renamed


def _rename_prefix(key: str, old: str, new: str) -> str | None:
    if key == old:
        return new
    if old and key.startswith(old + "/"):
        return f"{new}/{key[len(old) + 1 :]}" if new else key[len(old) + 1 :]
    if not old:
        return f"{new}/{key}"
    return None


def _rename_regex(key: str, pattern: str, replacement: str) -> str | None:
    match = re.fullmatch(pattern, key)
    return match.expand(replacement) if match else None


@dataclasses.dataclass(frozen=True, slots=True)
class Match:
    """What becomes of one leaf of the wanted tree.

    Attributes:
      leaf: Number of the saved leaf, or None to keep the one of ``like``.
      like: The leaf of ``like``; None when there is no ``like``.
    """

    leaf: int | None
    like: Any = None


def match_leaves(
    manifest: Manifest,
    saved: Mapping[str, int],
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
      saved: New key of each selected leaf, to its number.
      unselected: New keys of the leaves that were not selected; places with these keys keep the leaf of ``like``.
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
    matches: list[Match] = []
    problems: list[Problem] = []
    advice: dict[str, None] = {}
    for key, like in zip(like_keys, like_leaves, strict=True):
        if key in saved:
            matches.append(Match(saved[key], like))
            for problem, hint in _differences(key, manifest, saved[key], like, cast=cast, reshape=reshape):
                problems.append(problem)
                advice[hint] = None
            continue
        matches.append(Match(None, like))
        if key in kept:
            continue
        if missing != "keep":
            problems.append(Problem(key, "missing", "not on disk"))
            advice['pass missing="keep" to keep the leaves of `like` that are not on disk'] = None
        elif isinstance(like, jax.ShapeDtypeStruct):
            problems.append(Problem(key, "missing", "not on disk, and `like` has no value to keep there"))
    if unexpected != "ignore":
        wanted = set(like_keys)
        for key in saved:
            if key not in wanted:
                problems.append(Problem(key, "unexpected", "on disk, not in `like`"))
                advice['pass unexpected="ignore" to leave out what `like` does not have'] = None
    if problems:
        total = len({*like_keys, *saved})
        headline = f"cannot restore {path!r} like the given tree: {len(problems)} of {total} leaves differ"
        raise MismatchError(list_problems(headline, problems, [hint for hint in advice if hint]), problems)
    return matches


def _differences(
    key: str, manifest: Manifest, leaf: int, like: Any, *, cast: bool, reshape: bool
) -> Iterable[tuple[Problem, str]]:
    spec = manifest.spec(leaf)
    if hasattr(like, "restore_as_saved"):
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
    if like_kind == "key" and like.dtype != _key_dtype(spec.impl or ""):
        yield (
            Problem(key, "dtype", f"dtype {_key_dtype(spec.impl or '')} on disk, {like.dtype} in `like`"),
            "",
        )
    shape = logical_shape(spec)
    if tuple(like.shape) != shape:
        can_reshape = (
            reshape
            and like_kind != "key"
            and np.prod(like.shape, dtype=object) == np.prod(shape, dtype=object)
        )
        if not can_reshape:
            hint = (
                "" if reshape else "pass reshape=True to give arrays with equally many elements another shape"
            )
            yield Problem(key, "shape", f"shape {shape} on disk, {tuple(like.shape)} in `like`"), hint
    if like_kind != "key" and np.dtype(like.dtype) != spec.np_dtype and not cast:
        message = f"dtype {spec.np_dtype} on disk, {np.dtype(like.dtype)} in `like`"
        yield Problem(key, "dtype", message), "pass cast=True to convert dtypes"


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
    saved_type = _saved_type(manifest, leaf, spec)
    if like_kind == saved_kind == "value":
        if saved_type == type(like).__name__ or (
            cast and _is_number(saved_type) and _is_number(type(like).__name__)
        ):
            return
        message = f"{saved_type} on disk, {type(like).__name__} in `like`"
    else:
        # A number and an array without axes hold the same thing, but one is not the other.
        saved_shape = () if saved_kind == "value" else logical_shape(spec)
        like_shape = () if like_kind == "value" else tuple(like.shape)
        is_number = _is_number(saved_type) and _is_number(
            type(like).__name__ if like_kind == "value" else "array"
        )
        if cast and saved_shape == like_shape == () and is_number and "key" not in (like_kind, saved_kind):
            return
        names = {"value": "{0}", "array": "a jax.Array", "numpy": "a NumPy array", "key": "PRNG keys"}
        on_disk = names[saved_kind].format(saved_type)
        message = f"{on_disk} on disk, {names[like_kind].format(type(like).__name__)} in `like`"
    yield Problem(key, "kind", message), "pass cast=True to convert between numbers"


def _saved_type(manifest: Manifest, leaf: int, spec: LeafSpec) -> str:
    """Type name of a saved value, or "array"."""
    if spec.kind in ("bytes", "str"):
        return spec.kind
    if spec.kind != "value":
        return "array"
    record = manifest.values[leaf]
    return str(record[1]) if record[0] == "numpy" else str(record[0])


def _is_number(type_name: str) -> bool:
    return type_name not in ("str", "bytes") and not type_name.startswith(
        ("str", "bytes", "datetime", "timedelta", "<")
    )


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


@functools.cache
def _key_dtype(impl: str) -> Any:
    """The dtype of typed PRNG keys of an implementation."""
    return jax.eval_shape(lambda: jax.random.key(0, impl=impl)).dtype


def _some(keys: Sequence[str]) -> str:
    shown = ", ".join(repr(key) for key in keys[:5])
    return shown + (f", ... ({len(keys)} in all)" if len(keys) > 5 else "")
