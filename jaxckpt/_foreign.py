"""How are the checkpoints of other libraries read and restored as ours are?

A module of `jaxckpt.interop` knows a format. It gives a `ForeignCheckpoint`: what the file holds (`ForeignLeaf`), and
boxes of it. What is the same for all formats is here:

1. Indexing, names and aliases, the listing for people.
2. `restore_foreign`. The leaves are described by the same records as ours, so that they are matched, renamed, cast and
   given shardings by the same functions, with the same messages. Then the boxes that the devices of this process need
   are read in a few threads, each once, and placed.
3. Names. Those of a file need not form a tree: TensorFlow has ``w`` beside ``w/Adam``. `keys_of_names` gives each the
   key that a tree has for it, and `nest` makes that tree.

A foreign checkpoint is not locked while it is read, and what its format does not checksum is not verified; the module
of the format says what that is. Deliberately not here: writing, and any knowledge of a format.
"""

from __future__ import annotations

import abc
import collections
import concurrent.futures
import contextlib
import dataclasses
import difflib
import functools
import math
import re
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Self, final

import jax
import numpy as np
from jax.sharding import Mesh

from ._config import BLOCK_BYTES, RestoreOptions, resolve_host_bytes_max
from ._deriving import Pieces
from ._dtypes import describe_dtype, is_jax_dtype
from ._errors import CorruptError, MismatchError, Problem, list_problems, printable_key
from ._gathering import gather
from ._indexing import read_indexed
from ._keys import (
    PRUNED,
    escape_component,
    flatten,
    nested_dicts,
    rebuild,
    unescape_component,
    with_sortable_keys,
)
from ._manifest import NO_CHUNKS, LeafSpec, Manifest
from ._naming import Rename, Select, check_rename, is_key_selected, rename_keys, select_keys
from ._placement import Target, boxes_of
from ._resharding import Destination
from ._restoring import (
    choose_targets,
    mappable_leaves,
    match_tree,
    place_leaf,
    plan_waves,
    report_restore,
    wait_for_transfers,
)
from ._shardings import Box
from ._storage import Buffer, allocate_aligned
from ._values import encode_value

# Names with more parts than this keep the rest in one: a file must not decide how deep a tree gets.
_PARTS_MAX = 64

# Memory that begins at a multiple of this becomes an array of JAX on CPU without a copy.
_ALIGNMENT = 64

_INTEGER_KEY = re.compile(r"0|-?[1-9][0-9]{0,17}")


@dataclasses.dataclass(frozen=True, slots=True)
class ForeignLeaf:
    """What a foreign file says of one of its arrays.

    Attributes:
      key: The file's own name of it.
      dtype: Type of the elements; None for strings of bytes, and for what NumPy has no type for.
      shape: Shape.
      stored_as: The format's own name of the dtype, such as ``"DT_FLOAT"``.
      value: A Python or NumPy scalar, where the file has one and no array; it is restored as such.
      kind: ``"array"``; where the format tells them apart, ``"numpy"``, ``"key"`` (typed PRNG keys; dtype and shape are
        those of their data) and ``"value"`` (Python's numbers and texts, which `ForeignCheckpoint.values` has).
      impl: Name of the PRNG implementation, for keys.
      sharding: How it was sharded, in the words of `describe_sharding`; None where that is not known.
    """

    key: str
    dtype: np.dtype[Any] | None
    shape: tuple[int, ...]
    stored_as: str = ""
    value: Any = None
    kind: str = "array"
    impl: str | None = None
    sharding: dict[str, Any] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the array; 0 for strings, whose lengths are not known."""
        return 0 if self.dtype is None else math.prod(self.shape) * self.dtype.itemsize


class ForeignCheckpoint(abc.ABC):
    """A checkpoint of another library, open for reading; its arrays are read as they are asked for.

    Args:
      path: Where it is.
      format_name: Name of the format, such as ``"TensorFlow V2"``; the attribute ``format``.

    Attributes:
      separator: What stands between the parts of a name; None where names have none.
      is_nested: Whether the names make up a tree, so that a restore without ``like`` gives nested dicts.
      is_cheaper_whole: Whether boxes that make up an array are better read as one and cut, as where that verifies it.
    """

    separator: str | None = "/"
    is_nested = False
    is_cheaper_whole = True

    def __init__(self, path: str, format_name: str) -> None:
        self.path = path
        self.format = format_name
        self._bytes_read = 0
        self._lock = threading.Lock()

    @abc.abstractmethod
    def leaves(self) -> Mapping[str, ForeignLeaf]:
        """The arrays by name, in the order of the file; nothing is read but the index."""

    @abc.abstractmethod
    def read_box(self, key: str, lo: tuple[int, ...], hi: tuple[int, ...]) -> np.ndarray[Any, Any]:
        """A box of an array: C-contiguous, in native byte order; of strings an object array of bytes.

        The memory is the caller's alone. May be called from several threads.

        Raises:
          CorruptError: What had to be read is damaged.
        """

    @abc.abstractmethod
    def stream(self, key: str, lo: int, hi: int) -> bytes | memoryview | Buffer:
        """Bytes ``[lo, hi)`` of the whole array in C order, little endian, in bounded memory.

        Calls go forward through the array, from its first byte on. What it returns is valid until the next call.

        Raises:
          CorruptError: The array is damaged; at the latest with its last bytes.
        """

    @abc.abstractmethod
    def close(self) -> None:
        """Closes the files."""

    def structure(self) -> list[Any] | None:
        """The nodes of the saved tree, with `leaves` in their order and by their keys; None where the names are all.

        See `jaxckpt._keys` for nodes and keys.
        """
        return None

    def values(self) -> Mapping[str, Any]:
        """The leaves that are Python's or NumPy's scalars, or texts, by name."""
        return {key: leaf.value for key, leaf in self.leaves().items() if leaf.value is not None}

    def read_boxes(self, key: str, boxes: Sequence[Box]) -> list[np.ndarray[Any, Any]]:
        """As `read_box`, of several boxes."""
        return [self.read_box(key, *box) for box in boxes]

    def bound_memory(self, nbytes_max: int) -> None:
        """Says how much memory may be taken beside what is read, as far as the format allows."""
        del nbytes_max  # most formats take none

    def view(self, key: str) -> np.ndarray[Any, Any] | None:
        """An array that shows the file itself, or None where that cannot be; nothing is read."""
        del key
        return None

    def aliases(self) -> Mapping[str, Sequence[str]]:
        """Other names of arrays, by the name that `leaves` has."""
        return {}

    @property
    def metadata(self) -> Any:
        """What the file says beside its arrays; None where the format has no such thing."""
        return None

    @property
    def items(self) -> dict[str, Any]:
        """Small values that lie beside the arrays, by name."""
        return {}

    @property
    def metrics(self) -> dict[str, float]:
        """What was measured of what was saved, by name."""
        return {}

    @property
    def created_s(self) -> float | None:
        """When it was saved, in seconds since 1970, if it says so."""
        return None

    def keys(self) -> tuple[str, ...]:
        """Names of the arrays, in the order of the file."""
        return tuple(self.leaves())

    def tree_keys(self) -> Sequence[str]:
        """The key that each array has in a tree of dicts, in the order of `keys`."""
        return keys_of_names(self.keys(), self.separator)

    def name_of(self, key: str) -> str:
        """The name that the leaf of a tree with this key has when the tree is written in this format."""
        return name_of_key(key, self.separator)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes by name."""
        return {key: leaf.shape for key, leaf in self.leaves().items()}

    def dtypes(self) -> dict[str, np.dtype[Any] | None]:
        """Types of the elements by name; None for strings."""
        return {key: leaf.dtype for key, leaf in self.leaves().items()}

    def describe(self) -> str:
        """One line for each array: its name, the format's name of its dtype, its shape."""
        return "\n".join(
            f"{printable_key(leaf.key)} ({leaf.stored_as or leaf.dtype or 'strings'}) "
            f"[{','.join(map(str, leaf.shape))}]"
            for leaf in self.leaves().values()
        )

    @property
    def bytes_read(self) -> int:
        """Bytes asked of storage so far."""
        return self._bytes_read

    def _count_read(self, nbytes: int) -> None:
        """Adds to `bytes_read`; for those who read, from any thread."""
        with self._lock:
            self._bytes_read += nbytes

    def _leaf_of(self, name: object) -> ForeignLeaf | None:
        """The leaf with a name or an alias."""
        leaves = self.leaves()
        if name in leaves:
            return leaves[str(name)]
        return next((leaves[key] for key, aliases in self.aliases().items() if name in aliases), None)

    def __str__(self) -> str:
        return self.describe()

    def __contains__(self, key: object) -> bool:
        return self._leaf_of(key) is not None

    def __len__(self) -> int:
        return len(self.leaves())

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __getitem__(self, key: str) -> ForeignArray:
        leaf = self._leaf_of(key)
        if leaf is not None:
            return ForeignArray(self, leaf)
        near = difflib.get_close_matches(key, self.keys(), 3)
        hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
        raise KeyError(f"{key!r} is not in {self.path!r}, which has {len(self)} arrays{hint}")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@final
class ForeignArray:
    """An array of an open foreign checkpoint: what it is, and its values as NumPy arrays when indexed.

    ``array[...]`` reads all of it, ``array[10:20]`` and other basic indexing (integers, slices, ``...``) what is asked
    for. Strings come as an object array of bytes; a single one as bytes.
    """

    # Tells `restore_foreign` that this leaf of `like` asks for the leaf as it was saved.
    restore_as_saved = True

    def __init__(self, checkpoint: ForeignCheckpoint, leaf: ForeignLeaf) -> None:
        self._checkpoint = checkpoint
        self._leaf = leaf

    @property
    def checkpoint(self) -> ForeignCheckpoint:
        """The checkpoint that it is read from, for tools."""
        return self._checkpoint

    @property
    def key(self) -> str:
        """Name of the array."""
        return self._leaf.key

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape."""
        return self._leaf.shape

    @property
    def dtype(self) -> np.dtype[Any] | None:
        """Type of the elements; None for strings."""
        return self._leaf.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the array; 0 for strings."""
        return self._leaf.nbytes

    @property
    def kind(self) -> str:
        """What it is, see `ForeignLeaf`."""
        return self._leaf.kind

    @property
    def impl(self) -> str | None:
        """Name of the PRNG implementation, for keys."""
        return self._leaf.impl

    @property
    def sharding(self) -> dict[str, Any] | None:
        """How it was sharded, in the words of `describe_sharding`, if the file says so."""
        return self._leaf.sharding

    @property
    def value(self) -> Any:
        """A Python or NumPy scalar, or a text, where the file has one and no array; else None."""
        if self._leaf.kind != "value":
            return self._leaf.value
        return self._checkpoint.values()[self.key]

    def __repr__(self) -> str:
        return f"ForeignArray({self.key!r}, {self.dtype or 'strings'}, {self.shape})"

    def __getitem__(self, index: Any) -> Any:
        row_bytes = self.nbytes // max(math.prod(self.shape[:1]), 1)
        dtype = np.dtype(object) if self.dtype is None else self.dtype
        found = read_indexed(
            index,
            self.shape,
            dtype,
            lambda axis, step: axis == 0 and step > 1 and step * row_bytes > BLOCK_BYTES,
            lambda boxes: [self.read_box(box) for box in boxes],
        )
        is_one_string = self.dtype is None and isinstance(found, np.ndarray) and not self.shape
        return found[()] if is_one_string else found

    def read_box(self, box: Box) -> np.ndarray[Any, Any]:
        """A box of the array."""
        return self._checkpoint.read_box(self.key, *box)

    def stream(self, lo: int, hi: int) -> Buffer:
        """Bytes ``[lo, hi)`` of the array; see `ForeignCheckpoint.stream`."""
        return np.frombuffer(self._checkpoint.stream(self.key, lo, hi), np.uint8)


# --- names ----------------------------------------------------------------------------------------------------


def keys_of_names(names: Sequence[str], separator: str | None = "/") -> list[str]:
    """The key that each name of a foreign file has in a tree; see `nest`."""
    return ["/".join(map(_component, parts)) for parts in _split_names(names, separator)]


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


def _nest_keys(keys: Sequence[str], leaves: Sequence[Any]) -> Any:
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


def _file_key(name: str, separator: str | None = "/") -> str:
    """A name as a key that is nothing but escaped; unlike those of `keys_of_names` it may lie below another."""
    parts = [name] if separator is None else name.split(separator)
    return (separator or "").join(part.replace("~", "~0").replace("/", "~1") or "~e" for part in parts)


@dataclasses.dataclass(frozen=True, slots=True)
class _Names:
    """What a leaf can be called.

    Attributes:
      own: Forms of its name in the file; the first is its key.
      aliases: The others.
      tree_key: The one that `keys_of_names` gives.
    """

    own: tuple[str, ...]
    aliases: tuple[str, ...]
    tree_key: str


def _names_by_leaf(checkpoint: ForeignCheckpoint) -> list[_Names]:
    """All keys that each leaf can be matched by."""
    names = checkpoint.keys()
    aliases = checkpoint.aliases()
    separator = checkpoint.separator
    found: list[_Names] = []
    if checkpoint.structure() is not None:
        return _without_ambiguity([_Names((name,), tuple(aliases.get(name, ())), name) for name in names])
    for name, tree_key in zip(names, checkpoint.tree_keys(), strict=True):
        also = tuple(key for alias in aliases.get(name, ()) for key in (_file_key(alias, separator), alias))
        found.append(_Names((_file_key(name, separator), tree_key, name), also, tree_key))
    return _without_ambiguity(found)


def _without_ambiguity(leaves: Sequence[_Names]) -> list[_Names]:
    """The leaves without names that could mean two of them; each keeps its key."""
    owners = collections.Counter(name for leaf in leaves for name in {*leaf.own, *leaf.aliases})
    taken = {leaf.own[0] for leaf in leaves}

    def distinct(names: Sequence[str]) -> list[str]:
        return [name for name in dict.fromkeys(names) if owners[name] == 1 and name not in taken]

    found: list[_Names] = []
    for leaf in leaves:
        own = (leaf.own[0], *distinct(leaf.own[1:]))
        aliases = tuple(name for name in distinct(leaf.aliases) if name not in own)
        found.append(_Names(own, aliases, leaf.tree_key))
    return found


def select_names(checkpoint: ForeignCheckpoint, select: Select, rename: Rename) -> dict[str, str]:
    """For a conversion: the new name of each array that is selected, to the file's own; `nest_selected` takes them.

    Raises:
      MismatchError: ``select`` or ``rename`` does not fit the names and aliases.
    """
    names = checkpoint.keys()
    aliases = checkpoint.aliases()
    rename = _rules_of_names(checkpoint, rename)
    if checkpoint.is_nested:
        leaves = _names_by_leaf(checkpoint)
    else:
        leaves = _without_ambiguity([_Names((name,), tuple(aliases.get(name, ())), name) for name in names])
    keys = _choose_keys(leaves, None, rename, in_tree=checkpoint.is_nested)
    renamed = rename_keys(keys, select_keys(keys, _select_leaves(leaves, select)), rename)
    return {new: names[leaf] for new, leaf in renamed.sources.items() if isinstance(leaf, int)}


def nest_selected(checkpoint: ForeignCheckpoint, names: Mapping[str, str], leaves: Sequence[Any]) -> Any:
    """A tree from the names that `select_names` gave: the saved one if nothing is renamed, else one of dicts."""
    nodes = checkpoint.structure()
    if nodes is None:
        return _nest_keys(list(names), leaves) if checkpoint.is_nested else nest(list(names), leaves)
    if any(new != old for new, old in names.items()):
        return _nest_keys(list(names), leaves)
    leaf_of_name = dict(zip(names, leaves, strict=True))
    return rebuild(nodes, [leaf_of_name.get(name, PRUNED) for name in checkpoint])


def _choose_keys(leaves: Sequence[_Names], like: Any, rename: Rename, *, in_tree: bool = False) -> list[str]:
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


def _rules_of_names(checkpoint: ForeignCheckpoint, rename: Rename) -> Rename:
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
        return "/".join(map(_component, name.split(separator))) if is_name else name

    return {
        to_key(old) if is_leading_part(old) else old: to_key(new) if is_leading_part(old) else new
        for old, new in rename.items()
    }


_Test = Callable[[str], bool]


def _seeing_aliases_last(leaves: Sequence[_Names], tests: Sequence[_Test]) -> Callable[[_Names, str], bool]:
    """Whether one of the tests means a leaf by a name of it: each sees aliases only if it fits no leaf's own name."""
    are_for_own = [any(test(name) for leaf in leaves for name in leaf.own) for test in tests]

    def fits(leaf: _Names, name: str) -> bool:
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


def _select_leaves(leaves: Sequence[_Names], select: Select) -> Select:
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
        leaf = leaf_of_name.get(key, _Names((key,), (), key))
        return any(fits(leaf, name) for name in (*leaf.own, *leaf.aliases))

    return is_selected


# --- restoring ------------------------------------------------------------------------------------------------


def restore_foreign(
    checkpoint: ForeignCheckpoint,
    like: Any = None,
    *,
    mesh: Mesh | None = None,
    sharding: Any = None,
    select: Select = None,
    rename: Rename = None,
    missing: str = "error",
    unexpected: str = "error",
    cast: bool = False,
    reshape: bool = False,
    mmap: bool = False,
    report: bool = False,
    options: RestoreOptions | None = None,
) -> Any:
    """Restores a foreign checkpoint; what a ``read`` of `jaxckpt.interop` does.

    Without ``like`` the result is the saved tree where the file has one, nested dicts if the names make up a tree, or
    with ``rename``; else ``{name: array}`` by the file's own names.
    With ``like``, its keys are matched with the names of the arrays, or with their aliases.

    Arrays come back as `jax.Array`, uncommitted unless ``mesh``, ``sharding``, ``like`` or the file say where they are.
    Without ``like``, those of 64-bit types, which JAX has only with ``jax_enable_x64``, come as NumPy arrays otherwise.
    Strings come back as bytes, or as NumPy object arrays of bytes; in ``like``, bytes, str and such arrays stand for
    them.

    Args:
      checkpoint: An open foreign checkpoint.
      like: As for `jaxckpt.restore`.
      mesh: As for `jaxckpt.restore`; where nothing was saved of shardings, all arrays are replicated.
      sharding: As for `jaxckpt.restore`.
      select: As for `jaxckpt.restore`; a pattern that fits no name of `keys` is held against the aliases.
      rename: As for `jaxckpt.restore`; a rule that fits no name of `keys` is held against the aliases.
      missing: As for `jaxckpt.restore`.
      unexpected: As for `jaxckpt.restore`.
      cast: As for `jaxckpt.restore`.
      reshape: As for `jaxckpt.restore`.
      mmap: Whether arrays on CPU may show the file itself, where the format and their places in the file allow that.
      report: Whether to return ``(tree, RestoreReport)``.
      options: See `RestoreOptions`.

    Returns:
      The tree, or the tree and a `RestoreReport`.

    Raises:
      CorruptError: Stored bytes are damaged.
      MismatchError: The arrays and ``like`` differ; `.problems` lists every difference.

    Collective: no; each process of a group reads what its own devices need.
    Host memory: at most ``host_bytes_max``, or the largest array; on CPU the arrays themselves, too.
    """
    began_s = time.perf_counter()
    options = options or RestoreOptions()
    bytes_before = checkpoint.bytes_read
    if rename is None and like is None and checkpoint.is_nested:
        rename = []  # renames nothing, and gives nested dicts
    rename = _rules_of_names(checkpoint, rename)
    source = _describe(checkpoint, like, select, rename)
    wanted = match_tree(
        source,
        like,
        source.select,
        rename,
        missing=missing,
        unexpected=unexpected,
        cast=cast,
        reshape=reshape,
        nest=_nest_keys,
    )
    targets = choose_targets(source, wanted, mesh, sharding)
    mapped: set[int] | None = set() if mmap else None
    tree = wanted.fill(_read_targets(source, targets, options, mapped))
    if not report:
        return tree
    bytes_read = checkpoint.bytes_read - bytes_before
    seconds = time.perf_counter() - began_s
    return tree, report_restore(
        source,
        wanted,
        targets,
        bytes_read=bytes_read,
        group_bytes_read=bytes_read,
        seconds=seconds,
        mapped=mapped or (),
    )


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class _Source:
    """A foreign checkpoint in the words of `match_tree` and `choose_targets`.

    Attributes:
      checkpoint: Where the leaves are read from.
      leaves: They, by number.
      manifest: What is said of them; it has no chunks.
      select: What the caller asked for, by the keys of the manifest.
    """

    checkpoint: ForeignCheckpoint
    leaves: list[ForeignLeaf]
    manifest: Manifest
    select: Select

    @property
    def path(self) -> str:
        return self.checkpoint.path

    def read_box(self, leaf: int, box: Box) -> np.ndarray[Any, Any]:
        """A box of the leaf with a number."""
        return self.checkpoint.read_box(self.leaves[leaf].key, *box)

    def read_boxes(self, leaf: int, boxes: Sequence[Box]) -> list[np.ndarray[Any, Any]]:
        """Boxes of the leaf with a number."""
        return self.checkpoint.read_boxes(self.leaves[leaf].key, boxes)


def _describe(checkpoint: ForeignCheckpoint, like: Any, select: Select, rename: Rename) -> _Source:
    names = _names_by_leaf(checkpoint)
    leaves = list(checkpoint.leaves().values())
    shardings = {repr(leaf.sharding): leaf.sharding for leaf in leaves if leaf.sharding is not None}
    number_of_sharding = {text: number for number, text in enumerate(shardings)}
    values = checkpoint.values()
    manifest = Manifest(
        data="",
        created_s=0.0,
        writer={},
        metadata=None,
        nodes=checkpoint.structure() or [["dict", list(checkpoint.keys())], *[0] * len(leaves)],
        keys=tuple(_choose_keys(names, like, rename, in_tree=checkpoint.is_nested)),
        specs=tuple(
            _spec_of(leaf, number_of_sharding.get(repr(leaf.sharding)), has_like=like is not None)
            for leaf in leaves
        ),
        spec_index=np.arange(len(leaves)),
        values={
            number: encode_value(values[leaf.key]) for number, leaf in enumerate(leaves) if leaf.key in values
        },
        shardings=tuple(shardings.values()),
        directories={},
        packs=(),
        chunks=NO_CHUNKS,
        objects=(),
    )
    return _Source(checkpoint, leaves, manifest, _select_leaves(names, select))


def _spec_of(leaf: ForeignLeaf, sharding: int | None, *, has_like: bool) -> LeafSpec:
    if leaf.kind == "value" or leaf.value is not None:
        return LeafSpec("value")
    if leaf.dtype is None:
        return LeafSpec("strings", shape=leaf.shape)
    dtype = describe_dtype(leaf.dtype)
    if leaf.kind == "numpy":
        return LeafSpec("numpy", dtype, leaf.shape)
    is_placed = sharding is not None
    if leaf.kind == "key":
        return LeafSpec("key", dtype, leaf.shape, committed=is_placed, impl=leaf.impl, sharding=sharding)
    # Most files have a step of 64 bits; that JAX cannot have it must not keep anybody from reading the rest.
    is_too_wide = not has_like and jax.dtypes.canonicalize_dtype(leaf.dtype) != leaf.dtype
    kind = "array" if is_jax_dtype(leaf.dtype) and not is_too_wide else "numpy"
    return LeafSpec(kind, dtype, leaf.shape, committed=is_placed, sharding=sharding)


def _read_targets(
    source: _Source, targets: dict[int, Target], options: RestoreOptions, mapped: set[int] | None
) -> dict[int, Any]:
    """Reads and places what is wanted, by number. All damage is raised at once.

    Args:
      source: Where from.
      targets: What is wanted.
      options: How.
      mapped: Given where arrays may show the file; gets the leaves of which they do.
    """
    restored: dict[int, Any] = {}
    problems: list[Problem] = []
    derived = {number: target for number, target in targets.items() if target.derivation is not None}
    whole = {number: target for number, target in targets.items() if target.derivation is None}
    host_bytes_max = resolve_host_bytes_max(options.host_bytes_max)
    source.checkpoint.bound_memory(host_bytes_max // 4)
    views = {} if mapped is None else _views_of(source, whole)
    if mapped is not None:
        mapped.update(views)
    waves = plan_waves(source.manifest, whole, host_bytes_max)
    with concurrent.futures.ThreadPoolExecutor(options.io_threads, "jaxckpt-read") as executor:
        for wave in waves:
            try:
                wanted = {number: whole[number] for number in wave}
                restored |= _read_wave(source, wanted, views, executor, problems)
            except BaseException:
                executor.shutdown(cancel_futures=True)
                raise
    for number, target in derived.items():
        with _noting_damage(source, target, problems):
            restored[number] = gather(source.manifest, target, source.read_box)
            wait_for_transfers([restored[number]])
    if problems:
        headline = f"cannot restore {source.path!r}: stored data is damaged in {len(problems)} places"
        advice = ["nothing was returned; use another checkpoint, or select= the leaves that are whole"]
        raise CorruptError(list_problems(headline, problems, advice), problems)
    return restored


def _views_of(source: _Source, targets: dict[int, Target]) -> dict[int, np.ndarray[Any, Any]]:
    """The leaves that are not read, since arrays can show the file: on CPU, where JAX takes memory as it is."""
    views: dict[int, np.ndarray[Any, Any]] = {}
    for leaf in mappable_leaves(source.manifest, targets):
        view = source.checkpoint.view(source.leaves[leaf].key)
        if view is not None and view.size and view.ctypes.data % _ALIGNMENT == 0:
            views[leaf] = view
    return views


def _read_wave(
    source: _Source,
    targets: dict[int, Target],
    views: dict[int, np.ndarray[Any, Any]],
    executor: concurrent.futures.Executor,
    problems: list[Problem],
) -> dict[int, Any]:
    """Reads and places what is in host memory at the same time."""
    restored: dict[int, Any] = {}
    numbers_of_leaf: dict[int, list[int]] = {}
    for number, target in targets.items():
        numbers_of_leaf.setdefault(target.leaf, []).append(number)
    reads = [
        (
            numbers,
            executor.submit(_read_leaf, source, [targets[number] for number in numbers], views.get(leaf)),
        )
        for leaf, numbers in numbers_of_leaf.items()
    ]
    reads.reverse()
    while reads:
        numbers, read = reads.pop()  # whose memory goes when it was placed
        with _noting_damage(source, targets[numbers[0]], problems):
            placed = _place(source, [targets[number] for number in numbers], read.result())
            restored.update(zip(numbers, placed, strict=True))
    wait_for_transfers(list(restored.values()))
    return restored


@contextlib.contextmanager
def _noting_damage(source: _Source, target: Target, problems: list[Problem]) -> Generator[None]:
    try:
        yield
    except CorruptError as error:
        key = source.leaves[target.leaf].key
        problems.extend(error.problems or [Problem(key, "checksum", str(error))])


def _read_leaf(
    source: _Source, targets: Sequence[Target], view: np.ndarray[Any, Any] | None
) -> dict[Box, np.ndarray[Any, Any]]:
    """The distinct boxes that targets need of a leaf, read or cut from a view of it."""
    number = targets[0].leaf
    spec = source.manifest.spec(number)
    rank = len(spec.shape)
    whole: Box = ((0,) * rank, spec.shape)
    if spec.kind == "value":
        return {}
    if spec.kind == "strings":
        return {whole: source.read_box(number, whole)}
    boxes = {(lo[:rank], hi[:rank]) for target in targets for lo, hi in boxes_of(target, spec)}
    if view is not None:
        return {box: view[tuple(map(slice, *box))] for box in boxes}
    elements = sum(math.prod(stop - start for start, stop in zip(*box, strict=True)) for box in boxes)
    if elements < math.prod(spec.shape) or not source.checkpoint.is_cheaper_whole:
        return dict(zip(boxes, source.read_boxes(number, list(boxes)), strict=True))
    # Many formats have one checksum for an array, so that reading it whole is the only way to verify it.
    array = source.read_box(number, whole)
    return {box: _cut(array, box) for box in boxes}


def _cut(array: np.ndarray[Any, Any], box: Box) -> np.ndarray[Any, Any]:
    """A box of an array: a view if it is contiguous, else a copy from which arrays on CPU are made without another."""
    part = array[tuple(map(slice, *box))]
    if part.flags.c_contiguous:
        return part
    copy = allocate_aligned(part.nbytes).view(part.dtype).reshape(part.shape)
    copy[...] = part
    return copy


def _place(source: _Source, targets: Sequence[Target], parts: dict[Box, np.ndarray[Any, Any]]) -> list[Any]:
    """What targets of one leaf become; of several, each gets memory of its own."""
    placed: list[Any] = []
    for target in targets:
        spec = source.manifest.spec(target.leaf)
        if target.kind == "strings":
            (array,) = parts.values()
            placed.append(_place_strings(source, target, array.copy() if placed else array))
            continue
        destinations: list[Destination] = []
        for lo, hi in boxes_of(target, spec):
            part = parts[lo[: len(spec.shape)], hi[: len(spec.shape)]]
            elements = part.copy() if placed else np.ascontiguousarray(part)
            buffer = elements.reshape(-1).view(np.uint8) if part.size else None
            destinations.append(Destination(target.leaf, (lo, hi), part.nbytes, 0, buffer))
        value = source.manifest.values.get(target.leaf)
        placed.append(place_leaf(source, target, value, destinations))
    return placed


def _place_strings(source: _Source, target: Target, array: np.ndarray[Any, Any]) -> Any:
    if array.shape:
        return array
    one: Any = array[()]
    if target.python_type is not str:
        return one
    try:
        return one.decode()
    except UnicodeDecodeError as error:
        problem = Problem(
            source.manifest.keys[target.leaf], "kind", f"is no UTF-8, `like` wants str: {error}"
        )
        raise MismatchError(list_problems(f"cannot restore {source.path!r}", [problem]), [problem]) from error
