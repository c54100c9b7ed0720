"""Which saved leaves are asked for, and what are they called from now on?

1. `select_keys`: what ``select=`` asks for.
2. `rename_keys`: what ``rename=`` makes of the keys. A leaf may get several new keys, and several leaves may get one
   (`_deriving`). A rule that fits nothing is an error, as are collisions: both are mistakes that would go unseen.

All functions are pure and report every problem at once.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from ._deriving import Pieces, Source, Vocabulary
from ._errors import MismatchError, Problem, list_problems

Select = str | Sequence[str] | Callable[[str], bool] | None
# Where a saved leaf goes to, by the rules of ``rename=``.
Place = str | Pieces | Vocabulary
Rename = Mapping[Any, Place | Sequence[Place]] | Sequence[tuple[Any, Place | Sequence[Place]]] | None

_PAIRS = (
    "the first of the pairs that fits a key takes it, as a regular expression for all of the key; "
    "a mapping renames all that lies below a name"
)


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


def is_key_selected(key: str, select: Select) -> bool:
    """Whether a single key, of ``like`` say, is asked for."""
    if select is None:
        return True
    if callable(select):
        return bool(select(key))
    patterns = [select] if isinstance(select, str) else select
    return any(fnmatch.fnmatchcase(key, pattern) for pattern in patterns)


@dataclasses.dataclass(frozen=True, slots=True)
class Renamed:
    """What saved leaves are called from now on.

    Attributes:
      sources: For each new key what it gets: the saved leaf with this number as it is, or what a `Source` says.
      unselected: New keys of the leaves that are not asked for.
      rules: For each key of `sources` that a rule gives, what the rule is called, and which of its new names it is.
    """

    sources: dict[str, int | Source]
    unselected: list[str]
    rules: dict[str, tuple[str, int]]

    def check_wanted(self, wanted: Collection[str]) -> None:
        """Refuses rules that rename to nothing that is wanted: they would go unseen where leaves may be left out.

        Raises:
          MismatchError: There are such rules.
        """
        idle = dict.fromkeys(self.rules.values())
        for key in wanted:
            idle.pop(self.rules.get(key, ("", 0)), None)
        example = {rule: key for key, rule in reversed(self.rules.items()) if rule in idle}
        problems = [Problem(rule[0], "rename", f"`like` has no {example[rule]!r}") for rule in idle]
        if problems:
            headline = "rename= gives leaves to places that `like` does not have"
            raise MismatchError(list_problems(headline, problems), problems)


def check_rename(rename: Any) -> None:
    """Refuses what has not the form of ``rename=``; what the names say is left to `rename_keys`.

    Raises:
      TypeError: It has not.
    """
    if rename is None:
        return
    if isinstance(rename, Mapping):
        mapping: Mapping[Any, Any] = rename
        olds, kinds = list(mapping), (str, Pieces)
    elif isinstance(rename, (list, tuple)):
        pairs: Sequence[Any] = rename
        for pair in pairs:
            if not isinstance(pair, (list, tuple)) or len(pair) != 2:  # pyright: ignore[reportUnknownArgumentType]
                raise TypeError(f"rename= takes pairs (regular expression, new name), not {pair!r}")
        olds, kinds = [pair[0] for pair in pairs], (str, re.Pattern, Pieces)
    else:
        raise TypeError(f"rename= takes a mapping or a list of pairs, not {rename!r}")
    for old in olds:
        if not isinstance(old, kinds):
            raise TypeError(f"rename= takes str and Pieces as old names, not {old!r}")


def rename_keys(keys: Sequence[str], is_selected: Sequence[bool], rename: Rename) -> Renamed:
    """New names of saved leaves.

    Args:
      keys: Saved keys.
      is_selected: Which of them are asked for; only those must not collide.
      rename: What `restore` takes: a mapping of saved keys, of leading parts of them (whole components) or of `Pieces`
        to new ones; or pairs of a regular expression that must match a whole saved key and its replacement. The first
        rule that fits wins, in a mapping the one that says most.

    Raises:
      MismatchError: A rule fits no key or is none, two leaves get the same key, or pieces are not all there.
    """
    check_rename(rename)
    if rename is None:
        sources: dict[str, int | Source] = {key: leaf for leaf, key in enumerate(keys) if is_selected[leaf]}
        return Renamed(sources, [key for leaf, key in enumerate(keys) if not is_selected[leaf]], {})
    problems: list[Problem] = []
    rules, joins = _parse_rules(rename, problems)
    joined = _join_leaves(joins, keys, is_selected, problems)
    used = [False] * len(rules)
    candidates = _index_rules(rules)
    renamed = Renamed({}, [], {})
    first_owner: dict[str, str] = {}
    for leaf, key in enumerate(keys):
        if leaf in joined:
            leaves, pieces, places = joined[leaf]
            if leaf != leaves[0]:
                continue
            text = _text_of(pieces)
        else:
            leaves, pieces = (leaf,), None
            text, places = _apply_rules(rules, candidates(key), key, used, problems)
        for number, place in enumerate(places):
            for new_key, source in _sources_of(leaves, pieces, place):
                if not is_selected[leaf]:
                    renamed.unselected.append(new_key)
                    continue
                if new_key in first_owner:
                    both = f"would be both {first_owner[new_key]!r} and {key!r}"
                    problems.append(Problem(new_key, "rename", both))
                first_owner[new_key] = key
                renamed.sources[new_key] = source
                if text is not None:
                    renamed.rules[new_key] = (text, number)
    problems[:0] = [
        Problem(rule.text, "rename", "this rule renames no saved key")
        for rule, is_used in zip(rules, used, strict=True)
        if not is_used
    ]
    if problems:
        problems = list(dict.fromkeys(problems))
        advice = [f"saved keys: {_some(keys)}"]
        if not isinstance(rename, Mapping) and not all(used):
            advice.insert(0, _PAIRS)
        raise MismatchError(list_problems("rename= cannot be applied", problems, advice), problems)
    return renamed


def _apply_rules(
    rules: Sequence[_Rule], candidates: Iterable[int], key: str, used: list[bool], problems: list[Problem]
) -> tuple[str | None, tuple[Place, ...]]:
    """What the first rule that fits a key is called, and where it puts it."""
    for number in candidates:
        places = rules[number].apply(key, problems)
        if places is not None:
            used[number] = True
            return rules[number].text, places
    return None, (key,)


def _index_rules(rules: Sequence[_Rule]) -> Callable[[str], Iterable[int]]:
    """Which rules may fit a key, in the order in which they are tried: thousands of names do not take a minute."""
    by_start: dict[str, list[int]] = {}
    for number, rule in enumerate(rules):
        if rule.start is None:
            return lambda _: range(len(rules))
        by_start.setdefault(rule.start, []).append(number)

    def candidates(key: str) -> Iterable[int]:
        end = len(key)
        while end > 0:
            yield from by_start.get(key[:end], ())
            end = key.rfind("/", 0, end)
        yield from by_start.get("", ())

    return candidates


def _sources_of(
    leaves: tuple[int, ...], joined: Pieces | None, place: Place
) -> Iterable[tuple[str, int | Source]]:
    """The new keys that a place names, each with what it gets."""
    if isinstance(place, Pieces):
        for name in place.names:
            yield name, Source(leaves, joined, place)
    elif isinstance(place, Vocabulary):
        yield place.name, Source(leaves, joined, place)
    else:
        yield place, leaves[0] if joined is None else Source(leaves, joined)


# --- rules ----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class _Rule:
    """One rule of ``rename=``.

    Attributes:
      text: What it is called in messages.
      places: Where what it fits goes to.
      expander: What turns names of `places` into new keys, for a key that the rule fits; None for other keys.
      start: What all keys that the rule fits are or lie below; None where that is not known.
    """

    text: str
    places: tuple[Place, ...]
    expander: Callable[[str], Callable[[str], str] | None]
    start: str | None

    def apply(self, key: str, problems: list[Problem]) -> tuple[Place, ...] | None:
        """The places of a key; None if the rule does not fit it."""
        expand = self.expander(key)
        if expand is None:
            return None
        try:
            return tuple(_expand_place(place, expand) for place in self.places)
        except (re.error, IndexError) as error:
            problems.append(Problem(self.text, "rename", f"its replacement cannot be applied: {error}"))
            return ()


def _expand_place(place: Place, expand: Callable[[str], str]) -> Place:
    if isinstance(place, Pieces):
        return Pieces([expand(name) for name in place.names], place.axis)
    if isinstance(place, Vocabulary):
        name = expand(place.name)
        return place if name == place.name else dataclasses.replace(place, name=name)
    return expand(place)


_Joins = list[tuple[Pieces, tuple[Place, ...]]]


def _parse_rules(
    rename: Mapping[Any, Any] | Sequence[Any], problems: list[Problem]
) -> tuple[list[_Rule], _Joins]:
    """The rules in the order in which they are tried, and those that join leaves."""
    if isinstance(rename, Mapping):
        parse, pairs = _parse_prefix_rule, list(rename.items())
        # The one that says most first: the exact key before its parents, and "a/" before "a".
        pairs.sort(key=lambda pair: _prefix_order(pair[0]))
    else:
        parse, pairs = _parse_regex_rule, _merge_pairs(rename)
    rules: list[_Rule] = []
    joins: _Joins = []
    for old, new in pairs:
        if isinstance(old, Pieces):
            joins.append((old, _places_of(new)))
            continue
        rule = parse(old, _places_of(new))
        if isinstance(rule, Problem):
            problems.append(rule)
        else:
            rules.append(rule)
    return rules, joins


def _merge_pairs(rename: Sequence[Any]) -> list[tuple[Any, Sequence[Any]]]:
    """The pairs, where those that rename the same are one with several new names."""
    merged: dict[Any, list[Place]] = {}
    for old, new in rename:
        merged.setdefault(old, []).extend(_places_of(new))
    return list(merged.items())


def _places_of(new: Any) -> tuple[Place, ...]:
    if isinstance(new, (str, Pieces, Vocabulary)):
        return (new,)
    if isinstance(new, (list, tuple)):
        places: Sequence[Any] = new
        if all(isinstance(place, (str, Pieces, Vocabulary)) for place in places):
            return tuple(places)
    raise TypeError(f"rename= takes str, Pieces, Vocabulary or several of them as new names, not {new!r}")


def _prefix_order(old: str | Pieces) -> tuple[int, bool]:
    if isinstance(old, Pieces):
        return 0, False
    return -len(old.rstrip("/")), not old.endswith("/")


def _parse_prefix_rule(old: str, places: tuple[Place, ...]) -> _Rule | Problem:
    """A rule for a saved key, or for all keys that begin with it; only for these when there is a slash behind it."""
    is_scope = old.endswith("/")
    are_scopes = [isinstance(place, str) and place.endswith("/") for place in places]
    if any(each != is_scope for each in are_scopes):
        return Problem(old, "rename", "a scope and a name: write the slash behind both or behind none")
    start = old.removesuffix("/")
    bare_places = tuple(place.removesuffix("/") if isinstance(place, str) else place for place in places)
    is_for_whole_keys = not all(isinstance(place, str) for place in places)

    def expander(key: str) -> Callable[[str], str] | None:
        if key == start and not is_scope:
            return lambda name: name
        is_below = key.startswith(start + "/") if start else bool(key)
        if not is_below or is_for_whole_keys:
            return None
        rest = key[len(start) + 1 :] if start else key
        return lambda name: f"{name}/{rest}" if name else rest

    return _Rule(old, bare_places, expander, start)


def _parse_regex_rule(pattern: str | re.Pattern[str], places: tuple[Place, ...]) -> _Rule | Problem:
    """A rule for all keys that a regular expression matches from end to end."""
    text = pattern if isinstance(pattern, str) else pattern.pattern
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        return Problem(text, "rename", f"is no regular expression: {error}")

    def expander(key: str) -> Callable[[str], str] | None:
        match = compiled.fullmatch(key)
        return None if match is None else match.expand

    return _Rule(text, places, expander, None)


def _text_of(pieces: Pieces) -> str:
    return ", ".join(pieces.names)


def _join_leaves(
    joins: _Joins, keys: Sequence[str], is_selected: Sequence[bool], problems: list[Problem]
) -> dict[int, tuple[tuple[int, ...], Pieces, tuple[Place, ...]]]:
    """For each saved leaf that is joined with others: all of them, how they lie, and where they go."""
    leaf_of_key = {key: leaf for leaf, key in enumerate(keys)} if joins else {}
    joined: dict[int, tuple[tuple[int, ...], Pieces, tuple[Place, ...]]] = {}
    for pieces, places in joins:
        text = _text_of(pieces)
        absent = [name for name in pieces.names if name not in leaf_of_key]
        if absent:
            problems.append(Problem(text, "rename", f"{', '.join(map(repr, absent))}: no saved key"))
            continue
        leaves = tuple(leaf_of_key[name] for name in pieces.names)
        if any(leaf in joined for leaf in leaves):
            problems.append(Problem(text, "rename", "another rule joins some of these"))
        if len({is_selected[leaf] for leaf in leaves}) > 1:
            problems.append(Problem(text, "rename", "select= leaves out some of these"))
        joined.update((leaf, (leaves, pieces, places)) for leaf in leaves)
    return joined


def _some(keys: Sequence[str]) -> str:
    shown = ", ".join(repr(key) for key in keys[:5])
    return shown + (f", ... ({len(keys)} in all)" if len(keys) > 5 else "")
