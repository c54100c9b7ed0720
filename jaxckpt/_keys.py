"""How does a pytree become ``{key: leaf}``, and how is its structure kept without pickle?

Keys. A leaf's key joins one component for each node on its path with ``/``:

* a ``str`` dict key or attribute name stands for itself, with ``~`` written ``~0`` and ``/`` written ``~1``;
  the empty string is ``~e``, and a string that looks like an integer gets ``~s`` in front;
* an ``int`` dict key, a position in a sequence and a child number are plain digits;
* any other dict key (tuple, float, bool, bytes, None) is ``~j`` and its JSON form, escaped in the same way.

Two leaves of one tree never share a key. The key of a tree that is a single leaf is the empty string.

Structure. The nodes of the tree are listed in preorder, so that a record cannot hold a cycle and needs no
recursion to read. ``0`` is a leaf, ``None`` is None, every other node is a list:

    ["dict", [key, ...]]  ["odict", [key, ...]]  ["list", n]  ["tuple", n]
    ["namedtuple", class, [field, ...]]  ["node", class, [key, ...]]

Class names are for readers; nothing is imported by them. Without the user's classes a namedtuple comes back as a
generated one with the same fields, and any other node as a dict of its children: as an OrderedDict where the keys
cannot be sorted, since JAX takes no other dict with such keys (an `nnx.List` has positions and attributes).
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import json
import keyword
import operator
import re
import unicodedata
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.tree_util import DictKey, FlattenedIndexKey, GetAttrKey, SequenceKey

from ._errors import CheckpointError, MismatchError, Problem, UnsupportedLeafError, list_problems
from ._garbage import collection_paused

# Far below Python's recursion limit, far above any model.
DEPTH_MAX = 400

_INTEGER = re.compile(r"-?[0-9]+")
# One among names with NUL between them.
_ANY_INTEGER = re.compile(r"(?:\A|\0)-?[0-9]+(?=\0|\Z)")

_PLAIN_LEAF_TYPES = frozenset([int, float, complex, bool, str, bytes, np.ndarray])

# What a leaf and a None look like in the preorder list.
LEAF_NODE = 0
NONE_NODE = None


@dataclasses.dataclass(frozen=True, slots=True)
class FlatTree:
    """A pytree as keys and leaves in JAX's order, and the record of its nodes."""

    keys: tuple[str, ...]
    leaves: list[Any]
    nodes: list[Any]
    treedef: Any

    def unflatten(self, leaves: Sequence[Any]) -> Any:
        """The same node types with other leaves."""
        return jax.tree_util.tree_unflatten(self.treedef, leaves)


def flatten(tree: Any) -> FlatTree:
    """Splits a pytree into keys, leaves and structure.

    Raises:
      UnsupportedLeafError: A dict key cannot be stored, or two leaves would share a key.
      CheckpointError: JAX cannot flatten the tree (dict keys that don't sort, say), or it is too deep.
    """
    try:
        leaves, treedef = jax.tree_util.tree_flatten(tree)
    except (ValueError, TypeError, RecursionError, SystemError) as error:
        # A tree that is too deep for JAX ends in a RecursionError inside a SystemError.
        reason = "it is nested too deep" if isinstance(error, SystemError) else error
        raise CheckpointError(f"JAX cannot flatten the tree: {reason}") from error
    keys, nodes = _structure_of(tree, treedef)
    if len(keys) != len(leaves):
        raise CheckpointError(
            f"the tree flattens to {len(leaves)} leaves but {len(keys)} were found by walking it; "
            "a registered node type flattens differently from call to call"
        )
    return FlatTree(keys, leaves, nodes, treedef)


def _structure_of(tree: Any, treedef: Any) -> tuple[tuple[str, ...], list[Any]]:
    """Keys and nodes, remembered for the last few tree structures: a training loop saves the same one again."""
    try:
        holder = _TreeOfStructure(treedef, tree)
        hash(holder)
    except (TypeError, ValueError):  # static data that has no hash, or cannot be shown
        return _walk(tree)
    return _remembered_structure(holder)


class _TreeOfStructure:
    """A cache key that equals by tree structure; the tree itself is there only while the entry is computed."""

    __slots__ = ("text", "tree", "treedef")

    def __init__(self, treedef: Any, tree: Any) -> None:
        self.treedef = treedef
        self.text = repr(treedef)  # tells apart what compares equal: the dict keys 1, 1.0 and True
        self.tree = tree

    def __hash__(self) -> int:
        return hash(self.treedef)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, _TreeOfStructure)
            and self.text == other.text
            and bool(self.treedef == other.treedef)
        )


@functools.lru_cache(maxsize=8)
def _remembered_structure(holder: _TreeOfStructure) -> tuple[tuple[str, ...], list[Any]]:
    tree = holder.tree
    holder.tree = None
    return _walk(tree)


@collection_paused()
def _walk(tree: Any) -> tuple[tuple[str, ...], list[Any]]:
    keys: list[str] = []
    nodes: list[Any] = []
    _walk_node(tree, "", 0, keys, nodes)
    seen: set[str] = set()
    for key in keys:
        if key in seen:
            problem = Problem(key, "leaf", "two leaves of the tree have this key")
            raise UnsupportedLeafError(f"cannot name the leaves of the tree:\n  {problem}", [problem])
        seen.add(key)
    # What cannot be read back must not be written.
    wrong = check_nodes(nodes, keys)
    if wrong is not None:
        raise CheckpointError(f"the structure of the tree cannot be recorded: {wrong}")
    return tuple(keys), nodes


def _walk_node(node: Any, prefix: str, depth: int, keys: list[str], nodes: list[Any]) -> None:
    if depth > DEPTH_MAX:
        raise CheckpointError(f"the tree is nested more than {DEPTH_MAX} deep")
    if node is None:
        nodes.append(NONE_NODE)
        return
    children = _children_of(node)
    if children is None:
        nodes.append(LEAF_NODE)
        keys.append(prefix)
        return
    nodes.append(_describe_node(node, children, prefix))
    for token, child in children:
        part = key_component(token, prefix)
        _walk_node(child, f"{prefix}/{part}" if depth else part, depth + 1, keys, nodes)


def _children_of(node: Any) -> list[tuple[Any, Any]] | None:
    """The (token, child) pairs of a node, or None when JAX takes it as a leaf."""
    node_type = type(node)
    # The common cases without a call into JAX, which costs ten times as much.
    if node_type in _PLAIN_LEAF_TYPES or isinstance(node, jax.Array):
        return None
    if node_type is dict:
        return [(DictKey(key), node[key]) for key in sorted(node)]
    if node_type is list or node_type is tuple:
        return [(SequenceKey(position), child) for position, child in enumerate(node)]
    flat, _ = jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda inner: inner is not node)
    if len(flat) == 1 and flat[0][0] == ():
        return None
    return [(path[0], child) for path, child in flat]


def _describe_node(node: Any, children: list[tuple[Any, Any]], prefix: str) -> list[Any]:
    node_type = type(node)
    if node_type is list:
        return ["list", len(children)]
    if node_type is tuple:
        return ["tuple", len(children)]
    keys = [_encode_key(token, prefix) for token, _ in children]
    if node_type is collections.OrderedDict:
        return ["odict", keys]
    if isinstance(node, dict) and all(isinstance(token, DictKey) for token, _ in children):
        return ["dict", keys]
    class_name = f"{node_type.__module__}:{node_type.__qualname__}"
    fields: Any = getattr(node, "_fields", None)
    # A namedtuple that is registered with flatten functions of its own can have other children than its fields.
    if isinstance(node, tuple) and fields is not None and list(fields) == keys:
        return ["namedtuple", class_name, list(fields)]
    return ["node", class_name, keys]


# --- components of keys ---------------------------------------------------------------------------------------


def key_component(token: Any, prefix: str) -> str:
    """The part of a key that one step of a path stands for."""
    key = _encode_key(token, prefix)
    if isinstance(key, str):
        return escape_component(key)
    if isinstance(key, int):
        return str(key)
    return "~j" + _escape(key[0])


def escape_component(text: str) -> str:
    """A string as a component of a key."""
    if text.isidentifier():  # the common case, without the searches below
        return text
    if not text:
        return "~e"
    if _INTEGER.fullmatch(text):
        return "~s" + text
    return _escape(text)


def unescape_component(component: str) -> Any:
    """The dict key that a component stands for."""
    if component == "~e":
        return ""
    if component.startswith("~s"):
        return component[2:]
    if component.startswith("~j"):
        return _decode_key([_unescape(component[2:])])
    if _INTEGER.fullmatch(component):
        return int(component)
    return _unescape(component)


def _escape(text: str) -> str:
    return text.replace("~", "~0").replace("/", "~1")


def _unescape(text: str) -> str:
    return text.replace("~1", "/").replace("~0", "~")


def _encode_key(token: Any, prefix: str) -> str | int | list[str]:
    """A step of a path as str, int, or a list with one JSON text for other dict keys."""
    if isinstance(token, DictKey):
        key: Any = token.key
    elif isinstance(token, GetAttrKey):
        key = token.name
    elif isinstance(token, SequenceKey):
        key = token.idx
    elif isinstance(token, FlattenedIndexKey):
        key = token.key
    else:
        key = str(token)
    if isinstance(key, str):
        return str.__str__(key)
    if not isinstance(key, bool) and hasattr(key, "__index__") and -(2**63) <= operator.index(key) < 2**64:
        return operator.index(key)
    try:
        return [json.dumps(_typed_json(key), separators=(",", ":"), ensure_ascii=False)]
    except (TypeError, ValueError) as error:  # ValueError: an int of more digits than Python prints
        problem = Problem(
            prefix,
            "leaf",
            f"holds a dict key of type {type(key).__name__}; use str, int, tuple, float, bool or bytes",
        )
        raise UnsupportedLeafError(f"cannot store the tree:\n  {problem}", [problem]) from error


def _decode_key(encoded: Any) -> Any:
    if isinstance(encoded, list):
        return _from_typed_json(json.loads(encoded[0]))
    return encoded


def _typed_json(key: Any) -> Any:
    """JSON from which the exact Python value can be told: scalars as themselves, the rest as [tag, value]."""
    if key is None or isinstance(key, (bool, str)):
        return key
    if isinstance(key, np.bool_):
        return bool(key)
    if isinstance(key, int):
        return int(key)
    if isinstance(key, float):
        return ["float", key.hex()]
    if isinstance(key, bytes):
        return ["bytes", key.hex()]
    if isinstance(key, tuple):
        return ["tuple", *(_typed_json(part) for part in key)]
    raise TypeError(type(key).__name__)


def _from_typed_json(value: Any) -> Any:
    if not isinstance(value, list):
        return value
    tag, *parts = value
    if tag == "float":
        return float.fromhex(parts[0])
    if tag == "bytes":
        return bytes.fromhex(parts[0])
    if tag == "tuple":
        return tuple(_from_typed_json(part) for part in parts)
    raise ValueError(f"unknown tag {tag!r}")


# --- structure records ----------------------------------------------------------------------------------------


def check_nodes(nodes: Any, keys: Sequence[str]) -> str | None:
    """Says what is wrong with a structure record, or None when it is one whole tree with leaves of just these keys.

    No two of the keys are equal then: no node has a key twice, and different ones have different components.

    No key is made before the one in front of it was found to be right: a record of a megabyte can have a hundred
    thousand leaves below one name of a megabyte.
    """
    if not isinstance(nodes, list):
        return "the structure is not a list"
    record: list[Any] = nodes
    if not {*map(type, record)} <= {int, list, type(None)}:
        return "the structure holds something that is no node"
    # For each open node the components of the children that are still to come, and those on the way to the next node.
    open_nodes: list[Iterator[str]] = []
    parts: list[str] = []
    position = leaf = 0
    while position < len(record):
        if position and not open_nodes:
            return "the structure goes on after its end"
        node = record[position]
        position += 1
        if node is not NONE_NODE and node != LEAF_NODE:
            if len(open_nodes) > DEPTH_MAX:
                return f"the structure is nested more than {DEPTH_MAX} deep"
            try:
                components = _components_of(node, len(record))
            except (TypeError, ValueError, IndexError, RecursionError) as error:
                return f"the structure holds {str(node)[:80]!r}, which is no node ({error})"
            count = len(components)
            if count and record[position : position + count] == [LEAF_NODE] * count:
                # The most common node, in a third of the time.
                prefix = "/".join([*parts, ""])
                found = keys[leaf : leaf + count]
                if len(found) < count or not all(map(operator.eq, found, map(prefix.__add__, components))):
                    return _OTHER_KEYS
                position += count
                leaf += count
            else:
                open_nodes.append(iter(components))
                parts.append("")
        elif node is not NONE_NODE:
            if leaf == len(keys) or keys[leaf] != "/".join(parts):
                return _OTHER_KEYS
            leaf += 1
        while open_nodes:
            component = next(open_nodes[-1], None)
            if component is not None:
                parts[-1] = component
                break
            open_nodes.pop()
            parts.pop()
    if open_nodes or not record:
        return "the structure ends too early"
    return None if leaf == len(keys) else _OTHER_KEYS


_OTHER_KEYS = "its keys are not those of its structure"


def _components_of(node: Any, count_max: int) -> list[str]:
    """Components of the children that a record's node claims; raises when it is no node."""
    kind, *rest = node
    if kind in ("list", "tuple"):
        (count,) = rest
        if type(count) is not int or not 0 <= count <= count_max:
            raise ValueError("bad count")
        return [str(position) for position in range(count)]
    if kind in ("dict", "odict"):
        (keys,) = rest
    elif kind in ("namedtuple", "node"):
        class_name, keys = rest
        if not isinstance(class_name, str):
            raise TypeError("bad class name")
    else:
        raise ValueError("unknown kind")
    if not isinstance(keys, list):
        raise TypeError("keys are not a list")
    names: list[Any] = keys
    types = {*map(type, names)}
    if kind == "namedtuple" and not types <= {str}:
        raise TypeError("fields are not strings")
    distinct = set(names) if types <= {str, int} else {_decode_checked_key(key) for key in names}
    if len(distinct) != len(names):
        raise ValueError("a key twice")
    if types == {str}:
        components = _escape_together(names)
        if components is not None:
            return components
    return [_component_of(key) for key in names]


def _escape_together(names: list[str]) -> list[str] | None:
    """What `escape_component` gives for each, in a tenth of the time; None where some need a look of their own."""
    if all(map(str.isidentifier, names)):
        return names
    joined = "\0".join(names)
    if joined.count("\0") != len(names) - 1 or "" in names or _ANY_INTEGER.search(joined):
        return None
    return _escape(joined).split("\0")


def _decode_checked_key(key: Any) -> Any:
    if type(key) not in (str, int) and not (isinstance(key, list) and len(key) == 1):
        raise TypeError("bad key")
    return _decode_key(key)


def _component_of(key: Any) -> str:
    if isinstance(key, list):
        return "~j" + _escape(key[0])
    return str(key) if isinstance(key, int) else escape_component(key)


class _Pruned:
    """Marks a place of the tree of which nothing was selected."""


PRUNED = _Pruned()


def rebuild(nodes: list[Any], leaves: Sequence[Any]) -> Any:
    """The tree of a valid structure record with these leaves, without any user class.

    Leaves that are `PRUNED` disappear from dicts, together with dicts that they leave empty; in sequences and
    namedtuples, where places have a meaning, None stands for them.
    """
    tree = _rebuild_node(iter(nodes), iter(leaves))
    return None if tree is PRUNED else tree


def _rebuild_node(stream: Iterator[Any], leaves: Iterator[Any]) -> Any:
    node = next(stream)
    if node is NONE_NODE:
        return None
    if not isinstance(node, list):
        return next(leaves)
    kind = node[0]
    count = node[1] if kind in ("list", "tuple") else len(node[-1])
    children = []
    # No comprehension: in Python 3.11 it would take a second stack frame for each level.
    for _ in range(count):
        children.append(_rebuild_node(stream, leaves))  # noqa: PERF401
    if children and all(child is PRUNED for child in children):
        return PRUNED
    if kind in ("dict", "odict", "node"):
        pairs = [
            (_decode_key(key), child)
            for key, child in zip(node[-1], children, strict=True)
            if child is not PRUNED
        ]
        return collections.OrderedDict(pairs) if kind == "odict" else _sortable_dict(pairs)
    children = [None if child is PRUNED else child for child in children]
    if kind == "list":
        return children
    if kind == "tuple":
        return tuple(children)
    return _namedtuple_class(node[1].rpartition(":")[2].rpartition(".")[2], tuple(node[2]))(*children)


@functools.lru_cache(maxsize=64)
def _namedtuple_class(name: str, fields: tuple[str, ...]) -> Any:
    """A namedtuple with these fields; names that Python does not allow become ``_0``, ``_1``, ..."""
    if not name.isidentifier() or keyword.iskeyword(name):
        name = "Restored"
    # Python takes identifiers for equal that are so after this normalization.
    normal = [unicodedata.normalize("NFKC", field) for field in fields]
    return collections.namedtuple(name, normal, rename=True)  # noqa: PYI024  # pyright: ignore[reportUntypedNamedTuple]


def nested_dicts(keys: Sequence[str], leaves: Sequence[Any]) -> Any:
    """A tree of dicts from keys; what a renamed tree becomes when nobody gives a structure.

    Raises:
      MismatchError: Keys that are none, that name the same place, or of which one lies below another.
    """
    if list(keys) == [""]:
        return leaves[0]
    root: dict[Any, Any] = {}
    problems: list[Problem] = []
    for key, leaf in zip(keys, leaves, strict=True):
        wrong = _put_nested(root, key, leaf)
        if wrong is not None:
            problems.append(Problem(key, "rename", wrong))
    if problems:
        raise MismatchError(list_problems("the keys do not make up a tree", problems), problems)
    return with_sortable_keys(root)


def _put_nested(root: dict[Any, Any], key: str, leaf: Any) -> str | None:
    """Puts a leaf into nested dicts, or says why it cannot be there."""
    if not key:
        return "the root cannot be a leaf where there are other leaves"
    try:
        *parents, last = [unescape_component(part) for part in key.split("/")]
        inner = root
        for parent in parents:
            inner = inner.setdefault(parent, {})
            if not isinstance(inner, dict):
                return "lies below another leaf"
        if last in inner:
            return "names the same place as another leaf, or lies above it"
    except (ValueError, TypeError, AttributeError, IndexError):
        return "is no key: after ~ only 0, 1, e, s and j have a meaning"
    inner[last] = leaf
    return None


def with_sortable_keys(node: Any) -> Any:
    """The tree with an ordered dict for each dict whose keys cannot be sorted, which JAX does with those of others."""
    if not isinstance(node, dict):
        return node
    children: dict[Any, Any] = node  # pyright: ignore[reportUnknownVariableType]
    return _sortable_dict([(key, with_sortable_keys(child)) for key, child in children.items()])


def _sortable_dict(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    """A dict; an ordered one where the keys cannot be sorted, which JAX does with those of others."""
    try:
        sorted(key for key, _ in pairs)
    except TypeError:
        return collections.OrderedDict(pairs)
    return dict(pairs)
