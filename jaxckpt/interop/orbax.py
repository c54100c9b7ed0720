"""Checkpoints of Orbax, read without Orbax.

`open` reads what ``PyTreeCheckpointer``, ``StandardCheckpointer``, ``CheckpointManager`` and the functions of
``orbax.checkpoint.v1`` wrote, from Orbax 0.2 on; `read` restores it as a tree of JAX arrays. Arrays may lie in an
OCDBT database or in directories, in Zarr v2 or v3, compressed or not, and may have been written by many processes.
TensorStore reads them, which is installed with jaxckpt.

The format has no checksums of values: what was damaged without changing a length, or a compressed block, is restored as
it is. After ``jaxckpt convert`` it is verified at each restore.

Example:
  >>> import orbax.checkpoint as ocp
  >>> ocp.PyTreeCheckpointer().save(tmp / "state", {"w": jnp.arange(6.0).reshape(2, 3), "step": 7})
  >>> from jaxckpt.interop import orbax
  >>> print(orbax.open(tmp / "state"))
  step (int64) []
  w (float32) [2,3]
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import functools
import os
from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import Any, Unpack, final

import numpy as np

from jaxckpt._adopting import RestoreKeywords, check_keywords, restore_foreign
from jaxckpt._errors import CheckpointError, CorruptError, NotFoundError, printable_key
from jaxckpt._foreign import ForeignCheckpoint, ForeignLeaf
from jaxckpt._keys import rebuild
from jaxckpt._shardings import Box
from jaxckpt._storage import Buffer, Store
from jaxckpt._store import open_store

from . import _orbaxsteps as layout
from ._orbaxitems import Item, ItemLeaf, read_item
from ._orbaxtrees import Node, record_tree
from ._zarrays import RowStream

__all__ = [
    "OrbaxCheckpoint",
    "can_read",
    "open",
    "open_steps",
    "open_whole",
    "read",
    "root_metadata",
    "steps",
]

# As `item`: all trees of a step.
_ALL = "*"
_READERS = 8


@final
class OrbaxCheckpoint(ForeignCheckpoint):
    """A tree that Orbax saved, open for reading from any thread; `open` makes these.

    Leaves have the keys that `jaxckpt.save` gives to those of the same tree, as far as Orbax says what it was: tuples
    come as lists, namedtuples and other nodes as dicts of their fields, and keys of dicts that look like integers as
    integers. `aliases` has the keys with such keys as text.

    Attributes:
      step: Number of the step, if it was opened as one of several.
    """

    # Boxes that are read together share chunks, and lie in memory that CPU devices take as it is.
    is_cheaper_whole = False

    def __init__(
        self, store: Store, trees: Mapping[str, Store], step_store: Store | None, step: int | None
    ) -> None:
        ForeignCheckpoint.__init__(self, store.path, "Orbax")
        self.step = step
        self._step_store = step_store
        # Of what is no step, Orbax says the same in its own directory.
        self._said = layout.metadata_of(step_store or store)
        self._items: dict[str, Item] = {}
        # Of a step, a dict by the names of its items.
        handlers = self._said.get("item_handlers")
        try:
            for name, tree_store in trees.items():
                handler = handlers.get(tree_store.name) if isinstance(handlers, dict) else handlers
                self._items[name] = read_item(tree_store, self._count_read, handler)
        except BaseException:
            self.close()
            raise
        if list(self._items) == [""]:
            tree = self._items[""].tree
        else:
            tree = Node("dict", {name: item.tree for name, item in self._items.items()})
        self._record = record_tree(tree)
        item_leaves = {entry: leaf for item in self._items.values() for entry, leaf in item.leaves.items()}
        self._sources: dict[str, ItemLeaf] = {
            key: item_leaves[entry]
            for key, entry in zip(self._record.keys, self._record.entries, strict=True)
        }
        self._leaves = {
            key: dataclasses.replace(source.leaf, key=key) for key, source in self._sources.items()
        }
        self._key_of = {alias: key for key, alias in self._record.aliases.items()}
        self._stream: tuple[str, RowStream] | None = None

    def leaves(self) -> Mapping[str, ForeignLeaf]:
        """The leaves by key, in the order of the tree.

        Returns:
          For each its dtype (None for texts) and its shape; of typed PRNG keys those of their data.
        """
        return self._leaves

    def aliases(self) -> Mapping[str, tuple[str, ...]]:
        """Of leaves in dicts whose keys look like integers, the key that they have where those are text."""
        return {key: (alias,) for key, alias in self._record.aliases.items()}

    def structure(self) -> list[Any]:
        """The nodes of the tree; see `jaxckpt._keys`."""
        return self._record.nodes

    def tree(self) -> Any:
        """The tree as `read` restores it, with a `ForeignArray` for each leaf; nothing is read."""
        return rebuild(self._record.nodes, [self[key] for key in self._leaves])

    @functools.cached_property
    def _values(self) -> dict[str, Any]:
        keys = [key for key, leaf in self._leaves.items() if leaf.kind == "value"]
        with concurrent.futures.ThreadPoolExecutor(_READERS, "jaxckpt-read") as executor:
            return dict(zip(keys, executor.map(self._read_value, keys), strict=True))

    def values(self) -> Mapping[str, Any]:
        """Python's numbers and texts, by key; read at the first call.

        Raises:
          CorruptError: They are damaged.
        """
        return self._values

    def _read_value(self, key: str) -> Any:
        with _with_key(key):
            return self._sources[key].read_value()

    @property
    def items(self) -> dict[str, Any]:
        """Beside the trees of the step: what its JSON files say, and the bytes of other files; read at each call.

        Raises:
          CorruptError: They are damaged.
        """
        return {} if self._step_store is None else layout.values_in(self._step_store)

    @property
    def metrics(self) -> dict[str, float]:
        """The metrics of the step that are numbers; read at each call.

        Raises:
          CorruptError: They are damaged.
        """
        return {} if self._step_store is None else layout.metrics_in(self._step_store)

    @property
    def metadata(self) -> Any:
        """The ``custom_metadata`` of the step, or of the tree."""
        of_trees = self._metadata_of_trees()
        return self._said.get("custom_metadata") or of_trees.get("", of_trees or None)

    def _metadata_of_trees(self) -> dict[str, Any]:
        return {name: item.metadata for name, item in self._items.items() if item.metadata is not None}

    @property
    def not_shown(self) -> Sequence[str]:
        """The ``custom_metadata`` of trees, where the step has some, and metrics that are no numbers."""
        found: list[str] = []
        if self._said.get("custom_metadata") and any(self._metadata_of_trees().values()):
            found.append("metadata of trees beside that of their step")
        others = [] if self._step_store is None else layout.other_metrics_in(self._step_store)
        if others:
            found.append(f"metrics that are no numbers: {', '.join(map(printable_key, others))}")
        return found

    @property
    def created_s(self) -> float | None:
        """When the step was committed, in seconds since 1970, if it says so."""
        return layout.commit_time_s(self._said)

    def bound_memory(self, nbytes_max: int) -> None:
        """Bounds the memory of chunks that are read and decoded at once; a single one may need more.

        Args:
          nbytes_max: Bytes; at most 512 MiB are taken anyway.
        """
        for source in self._sources.values():
            if source.array is not None:
                source.array.place.bound_memory(nbytes_max)

    def read_box(self, key: str, lo: tuple[int, ...], hi: tuple[int, ...]) -> np.ndarray[Any, Any]:
        """A box of an array; see `ForeignCheckpoint.read_box`. Of a text it is an array of one.

        Whole chunks are read and decoded, a few at a time.

        Raises:
          CorruptError: A chunk is missing, or cannot be decoded.
          CheckpointError: Storage did not give it.
        """
        (box,) = self.read_boxes(key, [(lo, hi)])
        return box

    def read_boxes(self, key: str, boxes: Sequence[Box]) -> list[np.ndarray[Any, Any]]:
        """As `read_box`, of several boxes; chunks that they share are read once."""
        key = self._key(key)
        with _with_key(key):
            return self._sources[key].read_boxes(boxes)

    def stream(self, key: str, lo: int, hi: int) -> Buffer:
        """Bytes of an array; see `ForeignCheckpoint.stream`.

        Rows that whole chunks hold are read at once. More than 64 MiB of them wait in a temporary file.

        Raises:
          CorruptError: A chunk is missing, or cannot be decoded.
          WriteError: There is no room for the temporary file.
          TypeError: It is a text.
        """
        key = self._key(key)
        source = self._sources[key]
        if source.leaf.dtype is None:
            raise TypeError("texts have no fixed size, and are not streamed")
        if source.array is None:
            assert source.aggregate is not None
            file, name = source.aggregate
            return file.stream(name, lo, hi)
        if self._stream is None or self._stream[0] != key:
            self._stream = key, RowStream(source.array)
        with _with_key(key):
            return self._stream[1].read(lo, hi)

    def close(self) -> None:
        """Closes the files; nothing more can be read."""
        for item in self._items.values():
            for file in item.files:
                file.close()

    def _key(self, name: str) -> str:
        key = self._key_of.get(name, name)
        if key not in self._sources:
            raise KeyError(f"{name!r} is not in {self.path!r}")
        return key

    def _leaf_of(self, name: object) -> ForeignLeaf | None:
        return self._leaves.get(self._key_of.get(name, name)) if isinstance(name, str) else None


@contextlib.contextmanager
def _with_key(key: str) -> Generator[None]:
    """Names the leaf in what is wrong with its array."""
    try:
        yield
    except CorruptError as error:
        problems = [dataclasses.replace(problem, key=key) for problem in error.problems]
        raise CorruptError(str(error), problems) from error


def can_read(path: str | os.PathLike[str]) -> bool:
    """Whether a path means checkpoints of Orbax's, as `open` takes it.

    Args:
      path: Any local path, or URL.

    Returns:
      Whether there is a tree, a step, or a directory with steps, and it is committed.

    Example:
      >>> from jaxckpt.interop import orbax
      >>> orbax.can_read("/nowhere")
      False
    """
    try:
        store = open_store(path)
        kind = layout.kind_of(store)
        return kind == "steps" or (kind is not None and _is_committed(store))
    except (CheckpointError, OSError):
        return False


def steps(path: str | os.PathLike[str]) -> tuple[int, ...]:
    """The committed steps in a directory of ``CheckpointManager``, ascending; none if it is no such directory.

    Args:
      path: The directory, or its URL.

    Raises:
      CheckpointError: Two directories have the same step.

    Example:
      >>> from jaxckpt.interop import orbax
      >>> orbax.steps("/nowhere")
      ()
    """
    store = open_store(path)
    return tuple(layout.steps_in(store)) if layout.kind_of(store) == "steps" else ()


def root_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What the caller of ``CheckpointManager(metadata=...)`` said of all steps of its directory.

    Args:
      path: The directory, or its URL.

    Returns:
      What was said, by name; empty where nothing was.

    Raises:
      CorruptError: It is damaged.

    Example:
      >>> from jaxckpt.interop import orbax
      >>> orbax.root_metadata("/nowhere")
      {}
    """
    return layout.root_metadata_in(open_store(path))


def open(
    path: str | os.PathLike[str], *, step: int | None = None, item: str | None = None
) -> OrbaxCheckpoint:
    """Opens a checkpoint of Orbax's; reads what it says of its arrays, and none of them.

    Args:
      path: The directory of a tree, of a step, or of ``CheckpointManager``; local, or the URL of an object store.
      step: Which step of a manager's directory; by default the newest one that is committed.
      item: Which of the step's trees (v1: checkpointables), if there are several; ``"*"`` opens all of them as a dict,
        and what is one tree without a name as it is.

    Returns:
      The open checkpoint: ``checkpoint.keys()``, ``checkpoint["params/w"].shape``, ``checkpoint["params/w"][10:20]``,
      ``checkpoint.tree()``; ``.items`` and ``.metrics`` of its step. Closing it, or ``with``, gives back its files.

    Raises:
      NotFoundError: There is none, no such step, or no such tree.
      CheckpointError: The step has several trees, and ``item`` says none; or storage did not give it.
      CorruptError: It is damaged.
      FormatError: It describes no tree.

    Example:
      >>> from jaxckpt.interop import orbax
      >>> import orbax.checkpoint as ocp
      >>> ocp.PyTreeCheckpointer().save(tmp / "state", {"w": jnp.arange(4)})
      >>> with orbax.open(tmp / "state") as checkpoint:
      ...     checkpoint.keys(), checkpoint["w"][1:3]
      (('w',), array([1, 2], dtype=int32))
    """
    store = open_store(path)
    kind = layout.kind_of(store)
    if kind is None or not (kind == "steps" or _is_committed(store)):
        raise layout.no_checkpoint(store)
    if kind == "steps":
        known = layout.steps_in(store)
        if step is None:
            step = max(known)
        if step not in known:
            listed = ", ".join(map(str, list(known)[-10:]))
            raise NotFoundError(f"{store.path!r} has no committed step {step}; the newest ones are {listed}")
        store = store.child(known[step])
        kind = layout.kind_of(store)
    elif step is not None:
        raise NotFoundError(f"{store.path!r} is one checkpoint, and has no step {step}; leave out step=")
    if kind == "tree":
        if item not in (None, _ALL):
            raise NotFoundError(f"{store.path!r} is one tree, and has no item {item!r}; leave out item=")
        return OrbaxCheckpoint(store, {"": store}, None, step)
    trees = layout.trees_in(store)
    listed = ", ".join(map(repr, trees))
    if item == _ALL:
        return OrbaxCheckpoint(store, {name: store.child(name) for name in trees}, store, step)
    if item is None and len(trees) > 1:
        raise CheckpointError(
            f"{store.path!r} has {len(trees)} trees; pass one of them as item=, or {_ALL!r} for all: {listed}"
        )
    if not trees:
        raise NotFoundError(f"{store.path!r} has no trees; item={_ALL!r} opens it for what else it has")
    chosen = trees[0] if item is None else item
    if chosen not in trees:
        raise NotFoundError(f"{store.path!r} has no tree {item!r}; its trees: {listed}")
    return OrbaxCheckpoint(store.child(chosen), {"": store.child(chosen)}, store, step)


def open_whole(path: str | os.PathLike[str]) -> OrbaxCheckpoint:
    """As `open`, of the only tree of a step, or of all of them as a dict.

    Args:
      path: As for `open`.

    Example:
      >>> from jaxckpt.interop import orbax
      >>> import orbax.checkpoint as ocp
      >>> ocp.PyTreeCheckpointer().save(tmp / "whole", {"w": jnp.arange(4)})
      >>> orbax.open_whole(tmp / "whole").keys()
      ('w',)
    """
    store = open_store(path)
    known = layout.steps_in(store) if layout.kind_of(store) == "steps" else {}
    step = max(known) if known else None
    return open(path, step=step, item=_item_for([store if step is None else store.child(known[step])]))


def open_steps(path: str | os.PathLike[str]) -> Iterator[OrbaxCheckpoint]:
    """Opens the steps of a directory of ``CheckpointManager`` in turn, the oldest first.

    Each is closed when the next one is asked for. If all steps have one tree, of the same name, that is what is opened
    of each; else all trees are, as a dict.

    Args:
      path: The directory, or its URL.

    Yields:
      The open checkpoints, with their numbers as ``.step``.

    Raises:
      CorruptError: One of them is damaged.

    Example:
      >>> from jaxckpt.interop import orbax
      >>> list(orbax.open_steps("/nowhere"))
      []
    """
    store = open_store(path)
    known = layout.steps_in(store) if layout.kind_of(store) == "steps" else {}
    item = _item_for([store.child(name) for name in known.values()])
    for step in known:
        with open(path, step=step, item=item) as checkpoint:
            yield checkpoint


def _item_for(stores: Sequence[Store]) -> str | None:
    """The item that opens these steps whole, all in the same form; trees that are no items have none."""
    trees = {tuple(layout.trees_in(store)) if layout.kind_of(store) == "step" else ("",) for store in stores}
    return None if all(len(names) == 1 for names in trees) and len(trees) < 2 else _ALL


def _is_committed(store: Store) -> bool:
    """Whether a tree or a step is whole; that of a tree in a step may be said of the step alone."""
    if layout.is_committed(store):
        return True
    parent = store.path.rpartition("/")[0]
    return "://" in parent and layout.is_committed(open_store(parent))


def read(
    path: str | os.PathLike[str] | ForeignCheckpoint,
    like: Any = None,
    *,
    step: int | None = None,
    item: str | None = None,
    **keywords: Unpack[RestoreKeywords],
) -> Any:
    """Restores a checkpoint of Orbax's as a tree of JAX arrays, straight onto devices.

    Without ``like`` the result is the tree as Orbax itself restores it, but with integers for the keys of dicts that
    look like them, and with arrays where they were: the saved mesh is
    built again if the devices allow it, else a smaller one. Typed PRNG keys, Python's numbers and texts come as they
    were, and arrays of NumPy as such. Without ``like``, 64-bit types come as NumPy arrays unless ``jax_enable_x64`` is
    set.

    Args:
      path: As for `open`, or an open checkpoint.
      like: As for `jaxckpt.restore`.
      step: As for `open`.
      item: As for `open`.
      keywords: ``mesh``, ``sharding``, ``select``, ``rename``, ``missing``, ``unexpected``, ``cast``, ``reshape``,
        ``report`` and ``options``, as for `jaxckpt.restore`.

    Returns:
      The tree, or the tree and a `RestoreReport`.

    Raises:
      NotFoundError: There is no checkpoint, no such step, or no such tree.
      CheckpointError: The step has several trees, and ``item`` says none; or storage did not give it.
      CorruptError: It is damaged.
      FormatError: It describes no tree.
      MismatchError: Its leaves and ``like`` differ; `.problems` lists every difference.

    Collective: no; each process of a group reads for its own devices.
    Host memory: at most ``host_bytes_max``, or the largest array, and some chunks; on CPU the arrays themselves, too.

    Example:
      >>> from jaxckpt.interop import orbax
      >>> import orbax.checkpoint as ocp
      >>> ocp.PyTreeCheckpointer().save(tmp / "state", {"dense": {"kernel": jnp.ones(2)}})
      >>> orbax.read(tmp / "state", rename={"dense": "layer"})
      {'layer': {'kernel': Array([1., 1.], dtype=float32)}}
    """
    check_keywords(keywords)
    if isinstance(path, ForeignCheckpoint):
        return restore_foreign(path, like, **keywords)
    with open(path, step=step, item=item) as checkpoint:
        return restore_foreign(checkpoint, like, **keywords)
