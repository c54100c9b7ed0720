"""Msgpack files of Flax, read and written without Flax.

`open` reads what ``flax.serialization.to_bytes`` packs, and what ``flax.training.checkpoints.save_checkpoint`` leaves
in a directory where it does not use Orbax; `read` restores it as a tree of JAX arrays, `write` writes a file that
``flax.serialization.from_bytes`` takes. The format has no checksums.

Example:
  >>> from jaxckpt.interop import flax
  >>> flax.write(tmp / "state.msgpack", {"params": {"kernel": jnp.arange(6.0).reshape(2, 3)}, "step": 7})
  >>> print(flax.open(tmp / "state.msgpack"))
  params/kernel (float32) [2,3]
  step (int64) []

Source: https://github.com/google/flax/blob/main/flax/serialization.py
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, Unpack, final

import numpy as np

from jaxckpt._adopting import RestoreKeywords, check_keywords, restore_foreign
from jaxckpt._errors import CheckpointError, NotFoundError
from jaxckpt._foreign import ForeignCheckpoint, ForeignLeaf
from jaxckpt._nesting import keys_of_names, name_of_key
from jaxckpt._storage import Buffer, allocate_aligned

from ._files import SourceFile, absolute_path, is_url, join_path, list_directory, read_box
from ._packed import PackedArray, index_file
from ._packing import write

__all__ = ["FlaxCheckpoint", "can_read", "open", "read", "write"]

# As ``flax.training.checkpoints`` takes numbers: an integer, or a float.
_STEP = re.compile(r"-?[0-9]{1,18}(\.[0-9]{1,18})?(e[+-]?[0-9]{1,2})?")


@final
class FlaxCheckpoint(ForeignCheckpoint):
    """A msgpack file of Flax, open for reading from any thread; `open` makes these.

    Arrays have the path that they have in the file, with ``/`` between its parts, which are escaped as in keys where
    they have ``/`` or ``~`` themselves. Python's numbers are arrays without axes, texts and bytes are strings; all of
    them are restored as what they are. None and empty dicts have no leaf.
    """

    is_nested = True

    def __init__(self, path: str) -> None:
        ForeignCheckpoint.__init__(self, path, "Flax msgpack")
        self._source = SourceFile(path, self._count_read)
        try:
            nodes = index_file(self._source)
        except BaseException:
            self._source.close()
            raise
        self._arrays: dict[str, PackedArray | np.ndarray[Any, Any]] = {}
        self._leaves: dict[str, ForeignLeaf] = {}
        self._tree_keys: list[str] = []
        for parts, node in nodes.items():
            if node is None:
                continue
            name = _name_of(parts)
            self._tree_keys.append(_key_of(parts))
            value = None if isinstance(node, PackedArray) else node
            array = node if isinstance(node, PackedArray) else _array_of_value(node)
            self._arrays[name] = array
            dtype = None if array.dtype == object else array.dtype
            stored_as = "strings" if dtype is None else str(dtype)
            self._leaves[name] = ForeignLeaf(name, dtype, array.shape, stored_as, value)

    def leaves(self) -> Mapping[str, ForeignLeaf]:
        """The arrays by name, in the order of the file.

        Returns:
          For each its dtype (None for strings) and its shape.
        """
        return self._leaves

    def tree_keys(self) -> Sequence[str]:
        """As `ForeignCheckpoint.tree_keys`; the file tells ``/`` within a part from that between two."""
        return self._tree_keys

    def name_of(self, key: str) -> str:
        """As `ForeignCheckpoint.name_of`."""
        return _name_of([name_of_key(component) for component in key.split("/")])

    def read_box(self, key: str, lo: tuple[int, ...], hi: tuple[int, ...]) -> np.ndarray[Any, Any]:
        """A box of an array; see `ForeignCheckpoint.read_box`.

        Raises:
          CorruptError: The file was cut off, or cannot be read.
        """
        array = self._array(key)
        index = tuple(map(slice, lo, hi))
        if isinstance(array, np.ndarray):
            return array[(*index, ...)].copy()
        if len(array.ranges) == 1:
            return read_box(self._source, array.ranges[0][0], array.shape, array.dtype, lo, hi)
        # Rows of an array that lies in several places.
        row_bytes = math.prod(array.shape[1:]) * array.dtype.itemsize
        rows = self._bytes_of(array, lo[0] * row_bytes, hi[0] * row_bytes)
        shape = (hi[0] - lo[0], *array.shape[1:])
        return np.ascontiguousarray(np.ndarray(shape, array.dtype, rows)[(slice(None), *index[1:])])

    def stream(self, key: str, lo: int, hi: int) -> Buffer:
        """Bytes of an array; see `ForeignCheckpoint.stream`.

        Raises:
          CorruptError: The file was cut off, or cannot be read.
          TypeError: They are strings.
        """
        array = self._array(key)
        if array.dtype == object:
            raise TypeError("strings have no fixed size, and are not streamed")
        if isinstance(array, np.ndarray):
            return np.frombuffer(array.tobytes(), np.uint8)[lo:hi]
        return self._bytes_of(array, lo, hi)

    def close(self) -> None:
        """Closes the file; nothing more can be read."""
        self._source.close()

    def _array(self, key: str) -> PackedArray | np.ndarray[Any, Any]:
        if key not in self._arrays:
            raise KeyError(f"{key!r} is not in {self.path!r}")
        return self._arrays[key]

    def _bytes_of(self, array: PackedArray, lo: int, hi: int) -> Buffer:
        """Bytes ``[lo, hi)`` of an array, from the ranges that have them."""
        found = allocate_aligned(hi - lo)
        start = 0
        for offset, length in array.ranges:
            first, last = max(lo, start), min(hi, start + length)
            if first < last:
                self._source.read_into(offset + first - start, found[first - lo : last - lo])
            start += length
        return found


def _key_of(parts: Sequence[str]) -> str:
    return "/".join(keys_of_names(parts, None))


def _name_of(parts: Sequence[str]) -> str:
    """A path as one text, escaped where it would not be told from that of other parts."""
    return _key_of(parts) if set("/~") & set("".join(parts)) else "/".join(parts)


def _array_of_value(value: Any) -> np.ndarray[Any, Any]:
    """A number as an array without axes; a text as one of bytes."""
    if isinstance(value, (str, bytes)):
        array = np.empty((), object)
        array[()] = value.encode("utf-8", "surrogatepass") if isinstance(value, str) else value
        return array
    if isinstance(value, int) and not isinstance(value, bool) and value >= 1 << 63:
        return np.asarray(value, np.uint64)
    return np.asarray(value)


def can_read(path: str | os.PathLike[str]) -> bool:
    """Whether a path means a msgpack file of Flax, as `open` takes it.

    Args:
      path: Any path or URL.

    Returns:
      Whether there is one that is not damaged.

    Example:
      >>> from jaxckpt.interop import flax
      >>> flax.can_read("/nowhere")
      False
    """
    try:
        open(path).close()
    except CheckpointError:
        return False
    return True


def open(
    path: str | os.PathLike[str], *, step: float | None = None, prefix: str = "checkpoint_"
) -> FlaxCheckpoint:
    """Opens a msgpack file of Flax; finds its arrays, and reads none.

    Args:
      path: The file, or a directory of ``flax.training.checkpoints``. A path, or the URL of an object store.
      step: Which one of a directory; None: the newest, which has the highest step.
      prefix: What the names of the files in a directory begin with; the step follows.

    Returns:
      The open checkpoint: ``checkpoint.keys()``, ``checkpoint["params/w"].shape``, ``checkpoint["params/w"][10:20]``.
      Closing it, or ``with``, gives back its file.

    Raises:
      NotFoundError: There is none.
      CorruptError: The file is damaged.

    Example:
      >>> from jaxckpt.interop import flax
      >>> flax.write(tmp / "run" / "checkpoint_9", {"w": np.arange(4)})
      >>> flax.write(tmp / "run" / "checkpoint_10", {"w": np.arange(4) + 1})
      >>> flax.open(tmp / "run")["w"][...]
      array([1, 2, 3, 4])
    """
    text = absolute_path(path)
    names = list_directory(text)
    if names is None:
        if step is not None:
            raise ValueError(f"step= is for a directory of checkpoints, and {text!r} is none")
        return FlaxCheckpoint(text)
    return FlaxCheckpoint(join_path(text, _choose_step(text, names, step, prefix)))


def _choose_step(directory: str, names: Sequence[str], step: float | None, prefix: str) -> str:
    """The file of a step, or of the highest one, among these names in a directory of ``flax.training.checkpoints``."""
    name_of_step: dict[float, str] = {}
    for name in names:
        is_directory = not is_url(directory) and os.path.isdir(join_path(directory, name))
        number = name.removeprefix(prefix)
        if name.startswith(prefix) and _STEP.fullmatch(number) and not is_directory:
            name_of_step[float(number)] = name
    if not name_of_step:
        raise NotFoundError(
            f"no file in {directory!r} is named {prefix!r} and a step; directories with such names are Orbax's"
        )
    wanted = max(name_of_step) if step is None else step
    if wanted not in name_of_step:
        steps = ", ".join(f"{each:g}" for each in sorted(name_of_step)[-10:])
        raise NotFoundError(f"{directory!r} has no step {step}; it has {steps}")
    return name_of_step[wanted]


def read(
    path: str | os.PathLike[str] | ForeignCheckpoint,
    like: Any = None,
    *,
    step: float | None = None,
    prefix: str = "checkpoint_",
    **keywords: Unpack[RestoreKeywords],
) -> Any:
    """Restores a msgpack file of Flax as a tree of JAX arrays, straight onto devices.

    Without ``like`` the result is the nested dicts of the file, with integers as keys where it has lists and tuples,
    which match those of ``like``, and arrays of 64-bit types come as NumPy arrays unless ``jax_enable_x64`` is set.
    Python's numbers and texts come as what they are.

    Args:
      path: As for `open`, or an open checkpoint.
      like: As for `jaxckpt.restore`.
      step: As for `open`.
      prefix: As for `open`.
      keywords: ``mesh``, ``sharding``, ``select``, ``rename``, ``missing``, ``unexpected``, ``cast``, ``reshape``,
        ``report`` and ``options``, as for `jaxckpt.restore`. Flax packs no shardings, so that with
        ``mesh`` all arrays are replicated.

    Returns:
      The tree, or the tree and a `RestoreReport`.

    Raises:
      NotFoundError: There is no file.
      CorruptError: It is damaged.
      MismatchError: Its arrays and ``like`` differ; `.problems` lists every difference.

    Collective: no; each process of a group reads for its own devices.
    Host memory: at most ``host_bytes_max``, or the largest array; on CPU the arrays themselves, too.

    Example:
      >>> from jaxckpt.interop import flax
      >>> flax.write(tmp / "state", {"layers": [jnp.ones(2)]})
      >>> flax.read(tmp / "state", like={"layers": [jnp.zeros(2)]})
      {'layers': [Array([1., 1.], dtype=float32)]}
    """
    check_keywords(keywords)
    if isinstance(path, ForeignCheckpoint):
        return restore_foreign(path, like, **keywords)
    with open(path, step=step, prefix=prefix) as checkpoint:
        return restore_foreign(checkpoint, like, **keywords)
