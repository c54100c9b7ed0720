"""What lies in the directory of one tree that Orbax saved?

    _METADATA            its leaves, and how they are stored (`_orbaxtrees`); from 0.4 on
    manifest.ocdbt       their arrays are in a database; ...
    <name>/.zarray       ... or each in a directory of its own (zarr.json for Zarr v3)
    _strings.json        texts
    _sharding            how the arrays were sharded
    array_metadatas/     of which implementation typed PRNG keys are; a file for each process
    checkpoint           msgpack, as Flax writes it: the tree before there was _METADATA, and values aggregated in it

`read_item` reads all of that but the arrays, and of these what they say of themselves. A directory of a JAX or NumPy
random key, which Orbax has handlers for, holds such a directory beside a JSON file.

Source: https://github.com/google/orbax/tree/main/checkpoint/orbax/checkpoint/_src/handlers
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import os
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, final

import jax
import numpy as np

from jaxckpt._errors import CheckpointError, CorruptError, FormatError, NotFoundError, Problem, list_problems
from jaxckpt._foreign import ForeignCheckpoint, ForeignLeaf
from jaxckpt._shardings import Box
from jaxckpt._storage import Store

from ._files import corrupt
from ._orbaxtrees import (
    Entry,
    Node,
    Tree,
    TreeError,
    leaves_of,
    nest_entries,
    parse_shardings,
    parse_tree,
)
from ._zarrays import ChunkedArray, KeyValues
from ._zarrforms import FormError, ZarrForm, parse_form, parse_json
from .flax import FlaxCheckpoint

METADATA_NAME = "_METADATA"
DATABASE_NAME = "manifest.ocdbt"
# In front of the numbers of processes: their databases, which the one of the whole tree refers to.
_PART_PREFIX = "ocdbt.process_"
_AGGREGATE_NAME = "checkpoint"
_TEXTS_NAME = "_strings.json"
_SHARDING_NAME = "_sharding"
_ARRAYS_NAME = "array_metadatas"
_PLACEHOLDER = b"PLACEHOLDER://"
# The kind of a leaf of which no more is said than where it is.
_UNKNOWN = ""
_INTEGER = re.compile(r"0|[1-9][0-9]{0,8}")

# As many bytes as a hundred thousand leaves with long names take, several times.
_TEXT_BYTES_MAX = 1 << 28
_DOCUMENT_BYTES_MAX = 1 << 20
# Reads of small files: object stores take as long for one as for many at once.
_READERS = 16

# What Orbax makes of Python's numbers; those of NumPy have other types.
_PYTHON_DTYPES = (np.dtype(np.int64), np.dtype(np.float64), np.dtype(np.bool_), np.dtype(np.complex128))

# What has as many numbers as a key of an implementation, for keys of which Orbax does not say it.
_IMPL_OF_SIZE = {2: "threefry2x32", 4: "rbg"}


@dataclasses.dataclass(frozen=True, slots=True)
class ItemLeaf:
    """A leaf, and where its values are.

    Attributes:
      leaf: What it is; its key is the name of its array.
      array: In chunks, ...
      aggregate: ... or in a msgpack file, by this name, ...
      text: ... or here.
    """

    leaf: ForeignLeaf
    array: ChunkedArray | None = None
    aggregate: tuple[FlaxCheckpoint, str] | None = None
    text: str = ""

    def read_boxes(self, boxes: Sequence[Box]) -> list[np.ndarray[Any, Any]]:
        """Boxes of it; a text is an array of one object without axes."""
        if self.array is not None:
            return self.array.read_boxes(boxes)
        if self.aggregate is not None:
            file, name = self.aggregate
            return [file.read_box(name, *box) for box in boxes]
        found: list[np.ndarray[Any, Any]] = []
        for _ in boxes:
            text = np.empty((), object)
            text[()] = self.text
            found.append(text)
        return found

    def read_value(self) -> Any:
        """The number or text that it is."""
        if self.leaf.dtype is None and self.aggregate is None:
            return self.text
        (value,) = self.read_boxes([((), ())])
        if value.dtype == object:
            return _bytes_in(value).decode("utf-8", "surrogatepass")
        return value.item() if value.dtype in _PYTHON_DTYPES else value[()]


@dataclasses.dataclass(frozen=True, slots=True)
class Item:
    """A tree that Orbax saved.

    Attributes:
      tree: It.
      leaves: What its leaves are.
      metadata: What its writer said of it.
      files: To be closed.
    """

    tree: Tree
    leaves: Mapping[Entry, ItemLeaf]
    metadata: Any = None
    files: tuple[ForeignCheckpoint, ...] = ()


# --- files ----------------------------------------------------------------------------------------------------


def read_file(store: Store, name: str, bytes_max: int = _TEXT_BYTES_MAX) -> bytes | None:
    """A small file; None where there is none, or a directory.

    Raises:
      CheckpointError: Storage did not give it.
      CorruptError: It is far too large.
    """
    try:
        data = store.read(name, bytes_max)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {store.path}/{name}: {error}") from error
    if len(data) > bytes_max:
        raise corrupt(f"{store.path}/{name}", "length", f"has more than {bytes_max} bytes")
    return data


def names_in(store: Store) -> list[str]:
    """The names in a directory; none where there is none.

    Raises:
      CheckpointError: Storage did not give them.
    """
    try:
        return store.names()
    except OSError as error:
        raise CheckpointError(f"cannot list {store.path!r}: {error.strerror or error}") from error


def read_json(store: Store, name: str) -> Any:
    """What a JSON file says; None where there is none.

    Raises:
      CorruptError: It is none.
    """
    data = read_file(store, name)
    if data is None:
        return None
    try:
        return parse_json(data)
    except ValueError as error:
        raise corrupt(f"{store.path}/{name}", "manifest", f"is no JSON: {error}") from error


def is_tree(store: Store, names: Collection[str]) -> bool:
    """Whether a directory with these names is that of a tree.

    A file ``checkpoint`` is TensorFlow's, too; it counts only as msgpack, and a directory of that name as an array.
    """
    if METADATA_NAME in names or DATABASE_NAME in names:
        return True
    if _AGGREGATE_NAME not in names:
        return False
    if store.exists(f"{_AGGREGATE_NAME}/.zarray") or store.exists(f"{_AGGREGATE_NAME}/zarr.json"):
        return True
    try:
        first = (read_file(store, _AGGREGATE_NAME) or b"")[:1]
    except CheckpointError:
        return False
    return bool(first) and (0x80 <= first[0] <= 0x8F or first[0] in (0xDE, 0xDF))


# --- trees ----------------------------------------------------------------------------------------------------


def read_item(store: Store, count: Callable[[int], None], handler: Any = None) -> Item:
    """The tree in a directory: one for which `is_tree` holds, or one of a random key.

    Args:
      store: The directory.
      count: Is told how many bytes of arrays were read.
      handler: Name of the class that wrote it, as far as that is known.

    Raises:
      NotFoundError: There is none, and nothing says that there is.
      FormatError: It describes no tree.
      CorruptError: It is damaged.
      CheckpointError: Storage did not give it.
    """
    names = set(names_in(store))
    if is_tree(store, names):
        item = _ItemReader(store, names, count).read()
        is_array = str(handler).endswith(".ArrayCheckpointHandler") or METADATA_NAME not in names
        return _as_array(item) if is_array else item
    key = random_key_name(names)
    if key is None and handler is not None:
        raise corrupt(store.path, "missing", f"has no {METADATA_NAME}, and the step says that it is a tree")
    if key is None:
        raise NotFoundError(f"no tree of Orbax's at {store.path!r}")
    return _read_random_key(store, key, count)


@final
class _ItemReader:
    """Reads the directory of a tree, once."""

    def __init__(self, store: Store, names: Collection[str], count: Callable[[int], None]) -> None:
        self._store = store
        self._names = names
        self._count = count
        self._aggregate: FlaxCheckpoint | None = None
        metadata = read_json(store, METADATA_NAME)
        if metadata is not None and not isinstance(metadata, dict):
            raise corrupt(f"{store.path}/{METADATA_NAME}", "manifest", "is no JSON object")
        self._metadata: dict[str, Any] | None = metadata

    def read(self) -> Item:
        """The tree, and what its leaves are."""
        try:
            self._aggregate = self._open_aggregate()
            tree = self._tree()
            leaves: dict[Entry, ItemLeaf] = {}
            arrays: list[Entry] = []
            texts = None
            for entry in leaves_of(tree):
                if entry.is_aside:
                    leaves[entry] = self._aggregated(entry)
                elif entry.value_type == "string":
                    texts = read_json(self._store, _TEXTS_NAME) if texts is None else texts
                    leaves[entry] = self._text(entry, texts)
                else:
                    arrays.append(entry)
            leaves.update(self._arrays(arrays))
        except BaseException as error:
            if self._aggregate is not None:
                self._aggregate.close()
            if isinstance(error, TreeError):
                raise FormatError(f"{self._store.path}/{METADATA_NAME} {error}") from error
            raise
        metadata = None if self._metadata is None else self._metadata.get("custom_metadata")
        return Item(tree, leaves, metadata, () if self._aggregate is None else (self._aggregate,))

    def _open_aggregate(self) -> FlaxCheckpoint | None:
        """The msgpack file, if there is one; only Orbax before 0.5 wrote one, and to local directories."""
        path = f"{self._store.path}/{_AGGREGATE_NAME}"
        if _AGGREGATE_NAME not in self._names or not os.path.isfile(path):
            return None
        return FlaxCheckpoint(path)

    def _tree(self) -> Tree:
        if self._metadata is not None:
            return parse_tree(self._metadata)
        if self._aggregate is not None:
            return self._tree_of_aggregate(self._aggregate)
        if _AGGREGATE_NAME in self._names:  # what the handler of single arrays wrote
            return nest_entries([([False], Entry((_AGGREGATE_NAME,), "jax.Array"))])
        message = "is not there, and nothing else says which arrays there are"
        raise corrupt(f"{self._store.path}/{METADATA_NAME}", "missing", message)

    @staticmethod
    def _tree_of_aggregate(file: FlaxCheckpoint) -> Tree:
        """The tree of a msgpack file, in which texts stand for the arrays that lie elsewhere."""
        entries: list[tuple[list[bool], Entry]] = []
        for name, leaf in file.leaves().items():
            path = tuple(name.split("/")) if name else ()
            is_text = leaf.dtype is None
            is_elsewhere = is_text and _bytes_in(file.read_box(name, (), ())).startswith(_PLACEHOLDER)
            is_number = leaf.shape == () and leaf.dtype in _PYTHON_DTYPES
            value_type = "string" if is_text else "scalar" if is_number else _UNKNOWN
            # The members of lists have the names of those of dicts with such keys.
            positions = [_INTEGER.fullmatch(part) is not None for part in path]
            entry = Entry(path, _UNKNOWN if is_elsewhere else value_type, not is_elsewhere)
            entries.append((positions, entry))
        return nest_entries(entries)

    def _aggregated(self, entry: Entry) -> ItemLeaf:
        name = "/".join(entry.path)
        found = None if self._aggregate is None else self._aggregate.leaves().get(name)
        if found is None or self._aggregate is None:
            path = f"{self._store.path}/{_AGGREGATE_NAME}"
            raise corrupt(path, "missing", f"does not hold {entry.name!r}", entry.name)
        is_value = found.dtype is None or (entry.value_type == "scalar" and not found.shape)
        kind = "value" if is_value else _array_kind(entry, found.dtype)
        leaf = ForeignLeaf(entry.name, found.dtype, found.shape, entry.value_type, kind=kind)
        return ItemLeaf(leaf, aggregate=(self._aggregate, name))

    def _text(self, entry: Entry, texts: Any) -> ItemLeaf:
        """A text: Orbax puts each where its name, taken for a JSON pointer, points to."""
        for part in entry.name.split("/"):
            name = part.replace("~1", "/").replace("~0", "~")
            texts = texts.get(name) if isinstance(texts, dict) else None
        if not isinstance(texts, str):
            path = f"{self._store.path}/{_TEXTS_NAME}"
            raise corrupt(path, "missing", f"does not hold the text {entry.name!r}", entry.name)
        return ItemLeaf(ForeignLeaf(entry.name, None, (), "string", kind="value"), text=texts)

    # --- arrays -----------------------------------------------------------------------------------------------

    def _arrays(self, entries: Sequence[Entry]) -> dict[Entry, ItemLeaf]:
        if not entries:
            return {}
        is_ocdbt = DATABASE_NAME in self._names
        parts = sorted(name for name in self._names if name.startswith(_PART_PREFIX))
        if parts and not is_ocdbt:
            message = (
                f"is not there: what the processes wrote ({', '.join(parts[:5])}) was not merged, "
                "which is the last that Orbax does when it saves"
            )
            raise corrupt(f"{self._store.path}/{DATABASE_NAME}", "missing", message)
        place = KeyValues(self._store.path, is_ocdbt=is_ocdbt)
        metadata = self._metadata or {}
        document_names = [".zarray", "zarr.json"]
        if metadata.get("use_zarr3") is True:
            document_names.reverse()
        prefixes = [f"{entry.name}/" if entry.name else "" for entry in entries]
        if not is_ocdbt:
            self._check_prefixes(prefixes)
        documents: dict[Entry, tuple[str, bytes]] = {}
        for name in document_names:
            missing = [pair for pair in zip(entries, prefixes, strict=True) if pair[0] not in documents]
            keys = [f"{prefix}{name}" for _, prefix in missing]
            found = place.read_each(keys) if is_ocdbt else self._read_documents(keys)
            documents.update(
                (entry, (name, data)) for (entry, _), data in zip(missing, found, strict=True) if data
            )
        impls = self._key_impls()
        shardings = parse_shardings(read_file(self._store, _SHARDING_NAME) or b"{}")
        holds_zeros = metadata.get("store_array_data_equal_to_fill_value") is True
        leaves: dict[Entry, ItemLeaf] = {}
        problems: list[Problem] = []
        for entry, prefix in zip(entries, prefixes, strict=True):
            where = f"{self._store.path}/{entry.name}"
            if entry not in documents:
                problems.append(Problem(entry.name, "missing", f"{where}: the array is not there"))
                continue
            try:
                form = parse_form(*documents[entry])
            except FormError as error:
                message = f"{where}: what it says of its array cannot be: it {error}"
                problems.append(Problem(entry.name, "manifest", message))
                continue
            # TensorStore leaves out chunks of the fill value if there is one, and Orbax did not forbid it.
            may_lack_chunks = not holds_zeros and form.document.get("fill_value") is not None
            array = ChunkedArray(
                place, prefix, form, entry.name, self._count, may_lack_chunks=may_lack_chunks
            )
            leaf = _array_leaf(entry, form, impls.get(entry.name), shardings.get(entry.name))
            leaves[entry] = ItemLeaf(leaf, array)
        if problems:
            headline = (
                f"{self._store.path!r} is damaged: {len(problems)} of {len(entries)} arrays cannot be read"
            )
            raise CorruptError(list_problems(headline, problems), problems)
        return leaves

    def _check_prefixes(self, prefixes: Sequence[str]) -> None:
        """No name may lead out of the directory."""
        for prefix in prefixes:
            if {".", ".."} & set(prefix.split("/")) or prefix.startswith("/"):
                raise TreeError(f"has the leaf {prefix[:80]!r}, which is no name of a directory")

    def _read_documents(self, keys: Sequence[str]) -> list[bytes | None]:
        """What arrays in directories say of themselves."""
        with concurrent.futures.ThreadPoolExecutor(_READERS, "jaxckpt-read") as executor:
            return list(executor.map(lambda key: read_file(self._store, key, _DOCUMENT_BYTES_MAX), keys))

    def _key_impls(self) -> dict[str, str]:
        """The implementation of typed PRNG keys, by the names of their arrays."""
        if _ARRAYS_NAME not in self._names:
            return {}
        store = self._store.child(_ARRAYS_NAME)
        impls: dict[str, str] = {}
        for name in names_in(store)[:1]:  # all processes say the same
            document = read_json(store, name)
            listed = document.get("array_metadatas") if isinstance(document, dict) else None
            for each in listed if isinstance(listed, list) else []:
                metadata = each.get("array_metadata") if isinstance(each, dict) else None
                if isinstance(metadata, dict) and isinstance(metadata.get("ext_metadata"), dict):
                    impl = metadata["ext_metadata"].get("random_key_impl")
                    if isinstance(impl, str):
                        impls[str(metadata.get("param_name"))] = impl
        return impls


def _bytes_in(strings: np.ndarray[Any, Any]) -> bytes:
    """The only one of an array of strings without axes."""
    only: Any = strings[()]
    return only


def _array_leaf(
    entry: Entry, form: ZarrForm, impl: str | None, sharding: dict[str, Any] | None
) -> ForeignLeaf:
    is_number = entry.value_type == "scalar" or (
        entry.value_type == _UNKNOWN and form.dtype in _PYTHON_DTYPES
    )
    if impl is not None and form.shape:
        kind = "key"
    else:
        kind = "value" if is_number and not form.shape else _array_kind(entry, form.dtype)
    return ForeignLeaf(
        entry.name, form.dtype, form.shape, str(form.dtype), kind=kind, impl=impl, sharding=sharding
    )


def _array_kind(entry: Entry, dtype: np.dtype[Any] | None) -> str:
    """Whether an array was NumPy's; of unknown kind those were whose type JAX does not have unless it is asked to."""
    is_wide = dtype is not None and jax.dtypes.canonicalize_dtype(dtype) != dtype
    is_numpy = entry.value_type in ("np.ndarray", "scalar") or (entry.value_type == _UNKNOWN and is_wide)
    return "numpy" if is_numpy else "array"


# --- random keys ----------------------------------------------------------------------------------------------


def random_key_name(names: Collection[str]) -> str | None:
    """In the directory of a random key the name of what holds its numbers."""
    return next((name for name in sorted(names) if f"{name}_metadata" in names), None)


def _read_random_key(store: Store, name: str, count: Callable[[int], None]) -> Item:
    """A random key of JAX's as one leaf; a state of NumPy's as the tuple or dict that it was."""
    item = _as_array(read_item(store.child(name), count))
    says = read_json(store.child(f"{name}_metadata"), "metadata")
    flags: dict[str, Any] = says if isinstance(says, dict) else {}
    tree = item.tree
    if isinstance(tree, Node):
        if tree.kind == "list" and flags.get("legacy") is True:
            tree.kind = "tuple"
        return item
    source = item.leaves[tree]
    impl = _IMPL_OF_SIZE.get(source.leaf.shape[-1]) if source.leaf.shape else None
    if flags.get("typed") is not True or impl is None:
        return item
    leaf = dataclasses.replace(source.leaf, kind="key", impl=impl)
    return dataclasses.replace(item, leaves={tree: dataclasses.replace(source, leaf=leaf)})


def _as_array(item: Item) -> Item:
    """A single array instead of the dict that its handler wraps it into; other trees stay what they are."""
    if not isinstance(item.tree, Node) or list(item.tree.children) != [_AGGREGATE_NAME]:
        return item
    only = item.tree.children[_AGGREGATE_NAME]
    if not isinstance(only, Entry) or only not in item.leaves:
        return item
    entry = Entry((), only.value_type)
    return dataclasses.replace(item, tree=entry, leaves={entry: item.leaves[only]})
