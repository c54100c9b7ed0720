"""What are the tensors of an object-based checkpoint called?

``tf.train.Checkpoint`` and Keras store variables under the first path that led to them from the object that was saved,
and beside them a graph of all objects. That first path may say little: with Keras 3 and an optimizer, the kernel of a
layer lies under ``optimizer/_trainable_variables/0``. The graph knows all paths.

    graph    1 nodes, of which the first is the root
    node     1 children {1 node, 2 name}; 2 attributes {1 name, 2 full name, 3 key in the checkpoint};
             3 slot variables {1 node of the variable, 2 name of the slot, 3 node of the slot's variable}

1. Paths are followed breadth first from the root, through each node for at most 16 of the paths that lead to it and
   never in a circle, so that graphs in which much is shared, or which are hostile, stay small.
2. Each variable gets a path as its name: one that goes around optimizers if there is one, and around flat lists of
   all variables; then the path that it is stored under; then the shortest. The other paths are its aliases, and so is
   its full name, if no other variable has it: the name that it has in a graph of TensorFlow 1. An export of Keras has
   copies of all variables, which do not count.
3. Slots, which are an optimizer's values for a variable, are named after the variable, as in the file:
   ``net/w/.OPTIMIZER_SLOT/opt/m``.

Names are written as they are. The key in the file has ``.S`` for a slash in a name and ``..`` for a dot, and ends in
``/.ATTRIBUTES/VARIABLE_VALUE``; names of other attributes keep their ending.

Source: https://github.com/tensorflow/tensorflow/blob/master/tensorflow/core/protobuf/trackable_object_graph.proto
"""

from __future__ import annotations

import collections
import dataclasses

from ._protobuf import WireError, content, fields, number

GRAPH_KEY = b"_CHECKPOINTABLE_OBJECT_GRAPH"
_VARIABLE = "VARIABLE_VALUE"
_ATTRIBUTES = ".ATTRIBUTES"
_SLOT = ".OPTIMIZER_SLOT"

_PATHS_MAX = 16
_DEPTH_MAX = 64
# All names together may take so many times the bytes of the graph.
_TEXT_RATIO_MAX = 64

# Lists in which an optimizer, a SavedModel or an export of Keras has all variables once more.
_FLAT_LISTS = frozenset(
    (
        "_variables",
        "_trainable_variables",
        "variables",
        "trainable_variables",
        "non_trainable_variables",
        "_all_variables",
    )
)
# The list of an export that has not the variables themselves, but copies.
_COPIES = "_all_variables"
# Children that only optimizers have; those of TensorFlow and Keras 2 have slots, too.
_OPTIMIZER_CHILDREN = frozenset(
    ("_iterations", "_learning_rate", "iter", "learning_rate", "beta1_power", "beta2_power", "_momentums")
)

Path = tuple[str, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class _Attribute:
    name: str
    full_name: str
    key: bytes


@dataclasses.dataclass(frozen=True, slots=True)
class _Slot:
    original: int
    name: str
    variable: int


@dataclasses.dataclass(frozen=True, slots=True)
class _Node:
    children: tuple[tuple[str, int], ...]
    attributes: tuple[_Attribute, ...]
    slots: tuple[_Slot, ...]

    @property
    def is_optimizer(self) -> bool:
        return bool(self.slots) or any(name in _OPTIMIZER_CHILDREN for name, _ in self.children)


@dataclasses.dataclass(frozen=True, slots=True)
class _Reached:
    """A path to a node.

    Attributes:
      parts: Its names.
      nodes: The nodes on it, the last one included.
      is_optimizers: Whether it goes through an optimizer.
    """

    parts: Path
    nodes: frozenset[int]
    is_optimizers: bool


def parse_names(graph: memoryview) -> dict[bytes, list[str]]:
    """The names of what has a key in the checkpoint: by key, the best one first.

    Raises:
      WireError: The graph is damaged.
    """
    nodes = [_parse_node(content(value)) for field, value in fields(graph) if field == 1]
    for node in nodes:
        targets = [child for _, child in node.children]
        targets += [place for slot in node.slots for place in (slot.original, slot.variable)]
        if not all(0 <= target < len(nodes) for target in targets):
            raise WireError("its graph of objects refers to objects that do not exist")
    budget = _TEXT_RATIO_MAX * len(graph)
    paths = _paths_of(nodes, budget) if nodes else []
    _add_slots(nodes, paths)
    full_names = collections.Counter(
        attribute.full_name
        for node, reached in zip(nodes, paths, strict=True)
        for attribute in node.attributes
        if attribute.name == _VARIABLE and not _is_copy(reached)
    )
    names: dict[bytes, list[str]] = {}
    for node, reached in zip(nodes, paths, strict=True):
        for attribute in node.attributes:
            ranked = sorted(reached, key=lambda path, key=attribute.key: _rank(path, key))
            found = ["/".join(path.parts) for path in ranked]
            if attribute.name != _VARIABLE:
                found = [f"{name}/{_ATTRIBUTES}/{attribute.name}" for name in found]
            elif attribute.full_name and full_names[attribute.full_name] == 1 and not _is_copy(reached):
                found.append(attribute.full_name)
            names.setdefault(attribute.key, []).extend(found)
    return names


def _is_copy(paths: list[_Reached]) -> bool:
    return bool(paths) and all(_COPIES in path.parts for path in paths)


def _rank(path: _Reached, key: bytes) -> tuple[bool, bool, bool, int, str]:
    """What makes a path a good name; the smallest is the best."""
    escaped = "/".join(part.replace(".", "..").replace("/", ".S") for part in path.parts)
    has_flat_list = not _FLAT_LISTS.isdisjoint(path.parts)
    is_other = not key.startswith(f"{escaped}/{_ATTRIBUTES}/".encode("utf-8", "surrogateescape"))
    return path.is_optimizers, has_flat_list, is_other, len(path.parts), escaped


def _paths_of(nodes: list[_Node], budget: int) -> list[list[_Reached]]:
    """The paths to each node, the shortest first."""
    paths: list[list[_Reached]] = [[] for _ in nodes]
    root = _Reached((), frozenset((0,)), is_optimizers=False)
    queue = collections.deque([(0, root)])
    while queue:
        place, reached = queue.popleft()
        if len(paths[place]) == _PATHS_MAX:
            continue
        paths[place].append(reached)
        node = nodes[place]
        if len(reached.parts) == _DEPTH_MAX:
            continue
        is_optimizers = reached.is_optimizers or node.is_optimizer
        for name, child in node.children:
            if child not in reached.nodes and budget > 0:
                parts = (*reached.parts, name)
                budget -= sum(map(len, parts))
                queue.append((child, _Reached(parts, reached.nodes | {child}, is_optimizers)))
    return paths


def _add_slots(nodes: list[_Node], paths: list[list[_Reached]]) -> None:
    """A path for each slot: after the best path of its variable, and that of its optimizer."""
    for optimizer, node in enumerate(nodes):
        for slot in node.slots:
            if paths[optimizer] and paths[slot.original]:
                key = next((attribute.key for attribute in nodes[slot.original].attributes), b"")
                original = min(paths[slot.original], key=lambda path, key=key: _rank(path, key))
                parts = (*original.parts, _SLOT, *paths[optimizer][0].parts, slot.name)
                paths[slot.variable].append(_Reached(parts, frozenset(), is_optimizers=True))


def _parse_node(message: memoryview) -> _Node:
    children: list[tuple[str, int]] = []
    attributes: list[_Attribute] = []
    slots: list[_Slot] = []
    for field, value in fields(message):
        if field == 1:
            parts = dict(fields(content(value)))
            children.append((_text(parts, 2), number(parts.get(1, 0))))
        elif field == 2:
            parts = dict(fields(content(value)))
            key = content(parts.get(3, memoryview(b""))).tobytes()
            attributes.append(_Attribute(_text(parts, 1), _text(parts, 2), key))
        elif field == 3:
            parts = dict(fields(content(value)))
            slots.append(_Slot(number(parts.get(1, 0)), _text(parts, 2), number(parts.get(3, 0))))
    return _Node(tuple(children), tuple(attributes), tuple(slots))


def _text(parts: dict[int, int | memoryview], field: int) -> str:
    return content(parts.get(field, memoryview(b""))).tobytes().decode("utf-8", "surrogateescape")
