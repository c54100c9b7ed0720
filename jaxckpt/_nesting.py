"""Which key does a name in a foreign file have in a tree, and which tree do the names make?

Names need not form a tree: TensorFlow has ``w`` beside ``w/Adam``. `keys_of_names` gives each the key that a tree has
for it, `nest` makes that tree, and `name_of_key` tells the name from the key. No two names share a key.

Pure: names are texts, and nothing is known of what they name.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from ._keys import escape_component, nested_dicts, unescape_component, with_sortable_keys

# Names with more parts than this keep the rest in one: a file must not decide how deep a tree gets.
_PARTS_MAX = 64

_INTEGER_KEY = re.compile(r"0|-?[1-9][0-9]{0,17}")


def keys_of_names(names: Sequence[str], separator: str | None = "/") -> list[str]:
    """The key that each name of a foreign file has in a tree; see `nest`."""
    return [key_of_parts(parts) for parts in _split_names(names, separator)]


def key_of_parts(parts: Sequence[str]) -> str:
    """The key of a leaf whose path in the tree has these parts."""
    return "/".join(map(_component, parts))


def nest(names: Sequence[str], leaves: Sequence[Any]) -> Any:
    """A tree of dicts from the names of a foreign file.

    A name is a path, with ``/`` between its parts: ``dense/kernel`` becomes ``{"dense": {"kernel": ...}}``, and the
    key of the leaf in the tree is the name. Three kinds of names have other keys, from which the name can still be told
    (`name_of_key`), so that no two names share one:

    * Where a name lies below another, as ``w/Adam`` below ``w``, the rest of it is one part beside the other:
      ``{"w": ..., "w/Adam": ...}``, with the key ``w~1Adam``.
    * Parts that are empty or contain ``~`` are escaped as in every key, and so are those that look like integers but
      are not written like them (``007``).
    * What follows the 64th part is one part with it.

    Parts that are integers become dict keys of that type, whose keys are equal to those of lists. An ordered dict takes
    them where others stand beside them, for JAX sorts the keys of all other dicts.
    """
    root: dict[Any, Any] = {}
    for parts, leaf in zip(_split_names(names), leaves, strict=True):
        inner = root
        for part in parts[:-1]:
            inner = inner.setdefault(_dict_key(part), {})
        inner[_dict_key(parts[-1])] = leaf
    return with_sortable_keys(root)


def nest_keys(keys: Sequence[str], leaves: Sequence[Any]) -> Any:
    """Nested dicts by keys; one that lies below another stands beside it, as `nest` has it."""
    places = ["/".join(part.replace("/", "~1") for part in parts) for parts in _split_names(keys)]
    return nested_dicts(places, leaves)


def name_of_key(key: str, separator: str | None = "/") -> str:
    """The name that has this key; `keys_of_names` reversed. Without a separator there is none between the parts."""
    return (separator or "").join(str(unescape_component(component)) for component in key.split("/"))


def _split_names(names: Sequence[str], separator: str | None = "/") -> list[list[str]]:
    """The parts of each name; where a name lies below another one, its last part begins beside that."""
    if separator is None:
        return [[name] for name in names]
    taken = set(names)
    split: list[list[str]] = []
    for name in names:
        parts = name.split(separator, _PARTS_MAX - 1)
        for end in range(1, len(parts)):
            if separator.join(parts[:end]) in taken:
                parts = [*parts[: end - 1], separator.join(parts[end - 1 :])]
                break
        split.append(parts)
    return split


def _component(part: str) -> str:
    return part if _INTEGER_KEY.fullmatch(part) else escape_component(part)


def _dict_key(part: str) -> str | int:
    return int(part) if _INTEGER_KEY.fullmatch(part) else part
