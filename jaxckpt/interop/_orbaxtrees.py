"""What does Orbax say of the tree that it saved?

``_METADATA`` lists the leaves of a tree by their paths: whether each part of a path is a position in a sequence or the
key of a dict, and what kind of leaf it is. Empty dicts, lists and tuples, and None, are listed too. From that comes the
tree as Orbax itself restores it without a target: sequences are lists, and namedtuples and other nodes are dicts of
their fields. Where the option ``support_rich_types`` was on, tuples and namedtuples are known.

Orbax writes all keys of dicts as text. Those that look like integers become integers here, whose keys are the same as
those of lists, so that `restore` finds them for dicts of integers and lists; `alias_of` gives the key that a dict of
text has.

``_sharding`` holds how arrays were sharded. It is a hint: what is damaged in it is left out.

Source: https://github.com/google/orbax/blob/main/checkpoint/orbax/checkpoint/_src/metadata/tree.py
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import logging
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jaxckpt._keys import DEPTH_MAX, LEAF_NODE, NONE_NODE, escape_component
from jaxckpt._manifest import RANK_MAX

from ._zarrforms import parse_json

_log = logging.getLogger("jaxckpt")

_SEQUENCE = 1
_INTEGER = re.compile(r"0|-?[1-9][0-9]{0,17}")

# What stands for a node without children: there is nothing to read.
EMPTY_NODES: Mapping[str, Any] = {
    "None": NONE_NODE,
    "NamedTuple": NONE_NODE,
    "Dict": ["dict", []],
    "List": ["list", 0],
    "Tuple": ["tuple", 0],
}

# Far more devices than any machine has; a hint must not make a mesh that takes memory.
_DEVICES_MAX = 1 << 22
_DEVICE_IDS = range(1 << 31)
_AXIS_TYPES = ("Auto", "Explicit", "Manual")


class TreeError(Exception):
    """Says what is wrong with the description of a tree."""


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Entry:
    """A leaf of the tree, or an empty node; no two are equal.

    Attributes:
      path: Its path, every part as text.
      value_type: Orbax's name of its kind, such as ``"jax.Array"``.
      is_aside: Whether it does not lie among the arrays.
    """

    path: tuple[str, ...]
    value_type: str
    is_aside: bool = False

    @property
    def name(self) -> str:
        """What its array, its text and its sharding are named by."""
        return ".".join(self.path)


@dataclasses.dataclass(slots=True)
class Node:
    """A node with children, in their order.

    Attributes:
      kind: ``"dict"``, ``"list"``, ``"tuple"`` or ``"namedtuple"``.
      children: By the last part of their paths.
      type_name: Of a namedtuple, ``module:name``.
    """

    kind: str
    children: dict[str, Any] = dataclasses.field(default_factory=dict[str, Any])
    type_name: str = ""


Tree = Node | Entry


def parse_tree(document: Any) -> Tree:
    """The tree that ``_METADATA`` describes.

    Raises:
      TreeError: It describes none.
    """
    if not isinstance(document, dict):
        raise TreeError("is no JSON object")
    listed = document.get("tree_metadata")
    if not isinstance(listed, dict):
        raise TreeError("lists no tree_metadata")
    rich = document.get("value_metadata_tree")
    if isinstance(rich, str):
        try:
            return _parse_rich(parse_json(rich), ())
        except ValueError as error:
            raise TreeError(f"has a value_metadata_tree that is no JSON: {error}") from error
    return nest_entries([_parse_entry(name, entry) for name, entry in listed.items()])


def _parse_entry(name: str, entry: Any) -> tuple[tuple[bool, ...], Entry]:
    """Whether each part of a path is a position in a sequence, and the leaf."""
    parts = entry.get("key_metadata") if isinstance(entry, dict) else None
    value = entry.get("value_metadata") if isinstance(entry, dict) else None
    if not isinstance(parts, list) or not isinstance(value, dict) or len(parts) > DEPTH_MAX:
        raise TreeError(f"has no path and kind of the leaf {name[:80]!r}")
    path: list[str] = []
    are_positions: list[bool] = []
    for part in parts:
        key = part.get("key") if isinstance(part, dict) else None
        if not isinstance(key, str) or not _is_text(key):
            raise TreeError(f"has no path of the leaf {name[:80]!r}")
        path.append(key)
        are_positions.append(part.get("key_type") == _SEQUENCE)
    return tuple(are_positions), _entry_of(tuple(path), value)


def _entry_of(path: tuple[str, ...], value: Mapping[str, Any]) -> Entry:
    value_type = value.get("value_type")
    if not isinstance(value_type, str):
        raise TreeError(f"does not say of which kind the leaf {'.'.join(path)[:80]!r} is")
    return Entry(path, value_type, value.get("skip_deserialize") is True)


def _is_text(key: str) -> bool:
    """Whether a key can be a name: JSON has halves of characters, which no other format has."""
    try:
        key.encode()
    except UnicodeEncodeError:
        return False
    return "\0" not in key


def nest_entries(entries: Sequence[tuple[Sequence[bool], Entry]]) -> Tree:
    """The tree of leaves, each with what the parts of its path are.

    Raises:
      TreeError: Two leaves have one place, or one lies below another.
    """
    if not entries:
        return Node("dict")
    root = Node("dict")
    positions: dict[tuple[str, ...], list[bool]] = {}
    for are_positions, entry in entries:
        if not entry.path:
            if len(entries) > 1:
                raise TreeError("has a leaf that is the whole tree, and others")
            return entry
        node = root
        for depth, part in enumerate(entry.path):
            positions.setdefault(entry.path[:depth], []).append(are_positions[depth])
            if depth == len(entry.path) - 1:
                break
            inner = node.children.get(part)
            # What was empty when a part of the tree was saved may have been filled by the next part.
            if inner is None or (isinstance(inner, Entry) and inner.value_type in EMPTY_NODES):
                inner = node.children[part] = Node("dict")
            if isinstance(inner, Entry):
                raise TreeError(f"has the leaf {entry.name[:80]!r} below another one")
            node = inner
        known = node.children.get(entry.path[-1])
        if isinstance(known, Node) and entry.value_type in EMPTY_NODES:
            continue
        if known is not None:
            raise TreeError(f"has two leaves at {entry.name[:80]!r}")
        node.children[entry.path[-1]] = entry
    _find_sequences(root, (), positions)
    return root


def _find_sequences(
    node: Node, path: tuple[str, ...], positions: Mapping[tuple[str, ...], Sequence[bool]]
) -> None:
    """Says of nodes that they are lists: all children of such a one are positions, and none is left out."""
    places = [str(place) for place in range(len(node.children))]
    if all(positions.get(path, [False])) and sorted(node.children) == sorted(places):
        node.kind = "list"
        node.children = {place: node.children[place] for place in places}
    for part, child in node.children.items():
        if isinstance(child, Node):
            _find_sequences(child, (*path, part), positions)


def _parse_rich(document: Any, path: tuple[str, ...]) -> Tree:
    """The tree of ``value_metadata_tree``, which tells kinds of nodes apart."""
    if len(path) > DEPTH_MAX:
        raise TreeError(f"is nested more than {DEPTH_MAX} deep")
    children: list[tuple[Any, Any]] = []
    node = Node("dict")
    if isinstance(document, list):
        node.kind = "list"
        children = [(str(place), child) for place, child in enumerate(document)]
    elif not isinstance(document, dict):
        raise TreeError("has a node that is none in its value_metadata_tree")
    elif document.get("category") == "custom" and document.get("clazz") == "ValueMetadataEntry":
        data = document.get("data")
        if not isinstance(data, dict):
            raise TreeError("has a leaf without a kind in its value_metadata_tree")
        return _entry_of(path, data)
    elif document.get("category") in ("custom", "namedtuple"):
        entries = document.get("entries")
        if not isinstance(entries, list):
            raise TreeError("has a node without children in its value_metadata_tree")
        if document["category"] == "custom":
            node.kind = "tuple"
            children = [(str(place), child) for place, child in enumerate(entries)]
        else:
            node.kind = "namedtuple"
            node.type_name = f"{document.get('module')}:{document.get('clazz')}"
            children = [
                (entry.get("key"), entry.get("value")) if isinstance(entry, dict) else (None, None)
                for entry in entries
            ]
    else:
        children = list(document.items())
    for part, child in children:
        if not isinstance(part, str) or not _is_text(part) or part in node.children:
            raise TreeError("has a node with an impossible child in its value_metadata_tree")
        node.children[part] = _parse_rich(child, (*path, part))
    return node


# --- records --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(slots=True)
class TreeRecord:
    """A tree in the words of `jaxckpt._keys`.

    Attributes:
      nodes: Its nodes in preorder.
      keys: Key of each leaf, in the same order.
      entries: The leaves.
      aliases: The key that a leaf has in dicts of text, where it is another one.
    """

    nodes: list[Any] = dataclasses.field(default_factory=list[Any])
    keys: list[str] = dataclasses.field(default_factory=list[str])
    entries: list[Entry] = dataclasses.field(default_factory=list[Entry])
    aliases: dict[str, str] = dataclasses.field(default_factory=dict[str, str])


def leaves_of(tree: Tree) -> Iterator[Entry]:
    """The leaves of a tree, without its empty nodes."""
    if isinstance(tree, Node):
        for child in tree.children.values():
            yield from leaves_of(child)
    elif tree.value_type not in EMPTY_NODES:
        yield tree


def record_tree(tree: Tree) -> TreeRecord:
    """The record of a tree."""
    record = TreeRecord()
    _record(tree, [], [], record)
    return record


def _record(tree: Tree, parts: list[str], texts: list[str], record: TreeRecord) -> None:
    if isinstance(tree, Entry):
        if tree.value_type in EMPTY_NODES:
            record.nodes.append(EMPTY_NODES[tree.value_type])
            return
        record.nodes.append(LEAF_NODE)
        key, alias = "/".join(parts), "/".join(texts)
        record.keys.append(key)
        record.entries.append(tree)
        if alias != key:
            record.aliases[key] = alias
        return
    names = list(tree.children)
    if tree.kind in ("list", "tuple"):
        record.nodes.append([tree.kind, len(names)])
    elif tree.kind == "namedtuple":
        record.nodes.append(["namedtuple", tree.type_name, names])
    else:
        keys = [_dict_key(name) for name in names]
        # JAX sorts the keys of a dict, which it cannot where integers stand beside text.
        are_alike = len({type(key) for key in keys}) < 2
        record.nodes.append(["dict" if are_alike else "odict", keys])
    is_dict = tree.kind == "dict"
    for name, child in tree.children.items():
        is_integer = _INTEGER.fullmatch(name) is not None
        part = name if is_integer else escape_component(name)
        text = escape_component(name) if is_dict else part
        _record(child, [*parts, part], [*texts, text], record)


def _dict_key(name: str) -> str | int:
    return int(name) if _INTEGER.fullmatch(name) else name


# --- shardings ------------------------------------------------------------------------------------------------


def parse_shardings(data: bytes) -> dict[str, dict[str, Any]]:
    """Of each array, by its name, the sharding that it had, in the words of `jaxckpt._shardings`.

    Arrays on the default device have none: they are placed as new arrays are. Equal ones are one object.
    """
    try:
        document = parse_json(data)
    except ValueError as error:
        _log.info("the shardings that Orbax saved cannot be read, and are left out: %s", error)
        return {}
    found: dict[str, dict[str, Any]] = {}
    known: dict[Any, dict[str, Any] | None] = {}
    pairs: list[tuple[str, Any]] = list(document.items()) if isinstance(document, dict) else []
    for name, text in pairs:
        try:
            if text not in known:
                known[text] = _parse_sharding(parse_json(text))
            sharding = known[text]
            if sharding is not None:
                found[base64.urlsafe_b64decode(name).decode()] = sharding
        except (ValueError, TypeError, KeyError, AttributeError, binascii.Error) as error:
            _log.info("a sharding that Orbax saved cannot be read, and is left out: %r", error)
    return found


def _parse_sharding(document: Any) -> dict[str, Any] | None:
    """The descriptor of a sharding; raises ValueError, TypeError or KeyError where it is none."""
    kind = document["sharding_type"]
    if kind == "SingleDeviceSharding":
        match = re.search(r"([0-9]{1,9})\Z", document["device_str"])
        if match is None or int(match[1]) == 0:
            return None
        return {"type": "single", "device_id": int(match[1]), "memory_kind": None}
    if kind != "NamedSharding":
        return None
    names, sizes = document["axis_names"], document["shape"]
    if not _are_axes(names, sizes):
        raise ValueError(f"impossible axes {str(names)[:80]} of {str(sizes)[:80]}")
    kinds = [str(each).rpartition(".")[2] for each in document.get("axis_types") or ["Auto"] * len(names)]
    if len(kinds) != len(names) or not set(kinds) <= set(_AXIS_TYPES):
        raise ValueError(f"impossible types of axes {str(kinds)[:80]}")
    spec = [_parse_dimension(entry) for entry in document["partition_spec"]]
    used = [name for entry in spec for name in entry or ()]
    if len(set(used)) < len(used) or not set(used) <= set(names) or len(spec) > RANK_MAX:
        raise ValueError(f"impossible partition spec {str(spec)[:80]}")
    mesh = document.get("device_mesh")
    ids = _flat_ids(mesh["mesh"], len(sizes)) if mesh else []
    return {
        "type": "named",
        "axes": [[name, size] for name, size in zip(names, sizes, strict=True)],
        "axis_types": kinds,
        "spec": spec,
        "memory_kind": None,
        "device_ids": ids if len(ids) == math.prod(sizes) else None,
    }


def _are_axes(names: Any, sizes: Any) -> bool:
    if not isinstance(names, list) or not isinstance(sizes, list) or len(names) != len(sizes):
        return False
    are_names = all(isinstance(name, str) and name and _is_text(name) for name in names)
    return (
        are_names
        and len(set(names)) == len(names) <= RANK_MAX
        and all(type(size) is int and size > 0 for size in sizes)
        and math.prod(sizes) <= _DEVICES_MAX
    )


def _parse_dimension(entry: Any) -> list[str] | None:
    if entry is None:
        return None
    names: list[Any] = entry if isinstance(entry, list) else [entry]
    if not all(isinstance(name, str) for name in names):
        raise ValueError(f"impossible dimension {str(entry)[:80]}")
    return names or None


def _flat_ids(mesh: Any, rank: int) -> list[int]:
    """The ids of the devices of a mesh: lists in lists, as many as it has axes."""
    level: list[Any] = [mesh]
    for _ in range(rank):
        level = [inner for each in level for inner in each]
    ids = [device["id"] for device in level]
    if not all(type(number) is int and number in _DEVICE_IDS for number in ids) or len(set(ids)) < len(ids):
        raise ValueError("devices without an id, or with the same")
    return ids
