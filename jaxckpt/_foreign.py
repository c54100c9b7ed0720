"""What is an open checkpoint of another library?

A module of `jaxckpt.interop` knows a format. It gives a `ForeignCheckpoint`: what the file holds (`ForeignLeaf`), and
boxes of it. What is the same for all formats is here: indexing (`ForeignArray`), other names of the same array, and the
listing for people.

A foreign checkpoint is not locked while it is read, and what its format does not checksum is not verified; the module
of the format says what that is. Deliberately not here: any knowledge of a format, writing, which arrays are asked for
(`_addressing`), and devices (`_adopting`).
"""

from __future__ import annotations

import abc
import dataclasses
import difflib
import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Self, final

import numpy as np

from ._config import BLOCK_BYTES
from ._errors import printable_key
from ._indexing import read_indexed
from ._nesting import keys_of_names, name_of_key
from ._shardings import Box
from ._storage import Buffer


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

        May be called from several threads.

        Args:
          key: Name or alias.
          lo: First place along each axis.
          hi: The places after the last ones.

        Returns:
          The box; the memory is the caller's alone.

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
    def not_shown(self) -> Sequence[str]:
        """What it has that no other attribute shows, a text each."""
        return ()

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
