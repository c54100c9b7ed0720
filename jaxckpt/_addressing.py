"""Which arrays of a foreign checkpoint do ``like``, ``select`` and ``rename`` speak of?

An array has several names (`LeafNames`): that of the file, the key that it has in a tree, aliases that its format
knows. One that could mean two arrays means none.

1. `choose_keys` gives each array the name by which it is spoken of: the one that a rule of ``rename`` fits, or that
   ``like`` has, or its key. What follows is then the same as for a checkpoint of ours.
2. A rule or a pattern that fits the own name of any array is not held against aliases.
3. Rules and patterns may have the file's own separator where keys have a slash: ``model.layers`` is ``model/layers``.

`select_names` and `nest_selected` are the same for a conversion, which has no ``like``. Deliberately not here: applying
the rules, which `_naming` and `_matching` do, and reading.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ._deriving import Pieces
from ._foreign import ForeignCheckpoint
from ._keys import PRUNED, flatten, rebuild
from ._naming import Rename, Select, check_rename, is_key_selected, rename_keys, select_keys
from ._nesting import key_of_parts, nest, nest_keys


@dataclasses.dataclass(frozen=True, slots=True)
class LeafNames:
    """What an array can be called.

    Attributes:
      own: Forms of its name in the file; the first is its key.
      aliases: The others.
      tree_key: The one that `keys_of_names` gives.
    """

    own: tuple[str, ...]
    aliases: tuple[str, ...]
    tree_key: str


def names_by_leaf(checkpoint: ForeignCheckpoint) -> list[LeafNames]:
    """All keys that each leaf can be matched by."""
    names = checkpoint.keys()
    aliases = checkpoint.aliases()
    separator = checkpoint.separator
    found: list[LeafNames] = []
    if checkpoint.structure() is not None:
        return _without_ambiguity([LeafNames((name,), tuple(aliases.get(name, ())), name) for name in names])
    for name, tree_key in zip(names, checkpoint.tree_keys(), strict=True):
        also = tuple(key for alias in aliases.get(name, ()) for key in (_file_key(alias, separator), alias))
        found.append(LeafNames((_file_key(name, separator), tree_key, name), also, tree_key))
    return _without_ambiguity(found)


def _file_key(name: str, separator: str | None = "/") -> str:
    """A name as a key that is nothing but escaped; unlike those of `keys_of_names` it may lie below another."""
    parts = [name] if separator is None else name.split(separator)
    return (separator or "").join(part.replace("~", "~0").replace("/", "~1") or "~e" for part in parts)


def _without_ambiguity(leaves: Sequence[LeafNames]) -> list[LeafNames]:
    """The leaves without names that could mean two of them; each keeps its key."""
    owners = collections.Counter(name for leaf in leaves for name in {*leaf.own, *leaf.aliases})
    taken = {leaf.own[0] for leaf in leaves}

    def distinct(names: Sequence[str]) -> list[str]:
        return [name for name in dict.fromkeys(names) if owners[name] == 1 and name not in taken]

    found: list[LeafNames] = []
    for leaf in leaves:
        own = (leaf.own[0], *distinct(leaf.own[1:]))
        aliases = tuple(name for name in distinct(leaf.aliases) if name not in own)
        found.append(LeafNames(own, aliases, leaf.tree_key))
    return found


def choose_keys(
    leaves: Sequence[LeafNames], like: Any, rename: Rename, *, in_tree: bool = False
) -> list[str]:
    """What each leaf is called in a restore: the name that ``rename`` speaks of, or ``like`` has, or its key.

    Args:
      leaves: Their names.
      like: The wanted tree, or None.
      rename: The rules.
      in_tree: Whether a leaf of which neither speaks has the key in a tree of dicts.
    """
    wanted = {} if like is None else _wanted_keys(flatten(like).keys)
    fits = _seeing_aliases_last(leaves, _tests_of_rules(rename))
    keys: list[str] = []
    for leaf in leaves:
        names = (*leaf.own, *leaf.aliases)
        renamed = next((name for name in names if fits(leaf, name)), None)
        known = next((wanted[name] for name in names if name in wanted), None)
        keys.append(renamed or known or (leaf.tree_key if in_tree else leaf.own[0]))
    return keys


def _wanted_keys(keys: Sequence[str]) -> dict[str, str]:
    """The keys of ``like`` by the names that mean them: a file has texts alone, so that its ``0`` may be a text."""
    wanted = {key: key for key in keys}
    for key in keys:
        wanted.setdefault("/".join(part.removeprefix("~s") for part in key.split("/")), key)
    return wanted


def rules_of_names(checkpoint: ForeignCheckpoint, rename: Rename) -> Rename:
    """``rename`` for keys: in rules for leading parts of names, such as ``model.layers``, dots become slashes."""
    separator = checkpoint.separator
    if separator is None or separator == "/" or not isinstance(rename, Mapping):
        return rename
    names = checkpoint.keys()

    def is_leading_part(old: Any) -> bool:
        is_dotted = isinstance(old, str) and separator in old and old not in names
        return is_dotted and any(name.startswith(f"{old}{separator}") for name in names)

    def to_key(name: Any) -> Any:
        is_name = isinstance(name, str) and name
        return key_of_parts(name.split(separator)) if is_name else name

    return {
        to_key(old) if is_leading_part(old) else old: to_key(new) if is_leading_part(old) else new
        for old, new in rename.items()
    }


_Test = Callable[[str], bool]


def _seeing_aliases_last(
    leaves: Sequence[LeafNames], tests: Sequence[_Test]
) -> Callable[[LeafNames, str], bool]:
    """Whether one of the tests means a leaf by a name of it: each sees aliases only if it fits no leaf's own name."""
    are_for_own = [any(test(name) for leaf in leaves for name in leaf.own) for test in tests]

    def fits(leaf: LeafNames, name: str) -> bool:
        is_own = name in leaf.own
        return any(
            test(name)
            for test, is_for_own in zip(tests, are_for_own, strict=True)
            if is_own or not is_for_own
        )

    return fits


def _tests_of_rules(rename: Rename) -> list[_Test]:
    """Whether each rule of ``rename`` speaks of a name, not only of all."""
    check_rename(rename)
    if rename is None:
        return []
    olds: list[Any] = list(rename) if isinstance(rename, Mapping) else [old for old, _ in rename]
    is_regex = not isinstance(rename, Mapping)
    tests: list[_Test] = []
    for old in olds:
        # Pieces are names, of which some may be aliases.
        parts = old.names if isinstance(old, Pieces) else [old]
        is_exact = isinstance(old, Pieces)
        tests.extend(
            functools.partial(_speaks_of, part, is_exact=is_exact, is_regex=is_regex) for part in parts
        )
    return tests


def _speaks_of(old: str, name: str, *, is_exact: bool, is_regex: bool) -> bool:
    if is_exact:
        return name == old
    if not is_regex:
        start = old.rstrip("/")
        return bool(start) and (name == start or name.startswith(f"{start}/"))
    try:
        return re.fullmatch(old, name) is not None
    except re.error:  # who applies the rule says so
        return False


def select_leaves(leaves: Sequence[LeafNames], select: Select) -> Select:
    """``select`` for keys: patterns take a leaf by any of its names, aliases last; predicates see the leaf's own.

    Raises:
      MismatchError: A pattern matches no name.
    """
    if select is None:
        return None
    leaf_of_name = {name: leaf for leaf in leaves for name in (*leaf.own, *leaf.aliases)}
    if callable(select):
        predicate = select
        return lambda key: predicate(leaf_of_name[key].own[0] if key in leaf_of_name else key)
    select_keys(list(leaf_of_name), select)
    patterns = [select] if isinstance(select, str) else select
    tests: list[_Test] = [functools.partial(is_key_selected, select=pattern) for pattern in patterns]
    fits = _seeing_aliases_last(leaves, tests)

    def is_selected(key: str) -> bool:
        leaf = leaf_of_name.get(key, LeafNames((key,), (), key))
        return any(fits(leaf, name) for name in (*leaf.own, *leaf.aliases))

    return is_selected


# --- conversions ----------------------------------------------------------------------------------------------


def select_names(checkpoint: ForeignCheckpoint, select: Select, rename: Rename) -> dict[str, str]:
    """For a conversion: the new name of each array that is selected, to the file's own; `nest_selected` takes them.

    Raises:
      MismatchError: ``select`` or ``rename`` does not fit the names and aliases.
    """
    names = checkpoint.keys()
    aliases = checkpoint.aliases()
    rename = rules_of_names(checkpoint, rename)
    if checkpoint.is_nested:
        leaves = names_by_leaf(checkpoint)
    else:
        leaves = _without_ambiguity(
            [LeafNames((name,), tuple(aliases.get(name, ())), name) for name in names]
        )
    keys = choose_keys(leaves, None, rename, in_tree=checkpoint.is_nested)
    renamed = rename_keys(keys, select_keys(keys, select_leaves(leaves, select)), rename)
    return {new: names[leaf] for new, leaf in renamed.sources.items() if isinstance(leaf, int)}


def nest_selected(checkpoint: ForeignCheckpoint, names: Mapping[str, str], leaves: Sequence[Any]) -> Any:
    """A tree from the names that `select_names` gave: the saved one if nothing is renamed, else one of dicts."""
    nodes = checkpoint.structure()
    if nodes is None:
        return nest_keys(list(names), leaves) if checkpoint.is_nested else nest(list(names), leaves)
    if any(new != old for new, old in names.items()):
        return nest_keys(list(names), leaves)
    leaf_of_name = dict(zip(names, leaves, strict=True))
    return rebuild(nodes, [leaf_of_name.get(name, PRUNED) for name in checkpoint])
