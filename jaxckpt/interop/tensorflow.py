"""Checkpoints of TensorFlow and Keras, read without TensorFlow, and written so that TensorFlow reads them.

`open` reads what ``tf.train.Saver`` (formats V1 and V2), ``tf.train.Checkpoint``, Keras' ``save_weights`` of the format
"tf" and SavedModels left behind; `read` restores it as a tree of JAX arrays, `write` writes a V2 checkpoint. NumPy is
all that is needed.

What is read whole is verified by the checksums of the format, and so are all indexes. V2 has one checksum for a whole
tensor, or a whole slice of a partitioned one: a part of it is read alone, and is verified with ``verify_slices=True``,
which reads the rest too.

Example:
  >>> from jaxckpt.interop import tensorflow
  >>> tensorflow.write(tmp / "model.ckpt", {"dense": {"kernel": jnp.arange(6.0).reshape(2, 3)}})
  >>> checkpoint = tensorflow.open(tmp / "model.ckpt")
  >>> print(checkpoint)
  dense/kernel (DT_FLOAT) [2,3]
  >>> checkpoint["dense/kernel"][1]
  array([3., 4., 5.], dtype=float32)
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Unpack, final

import numpy as np

from jaxckpt._adopting import RestoreKeywords, check_keywords, restore_foreign
from jaxckpt._errors import CheckpointError
from jaxckpt._foreign import ForeignCheckpoint, ForeignLeaf

from ._bundle import Bundle
from ._files import corrupt
from ._locations import Location, locate
from ._objects import GRAPH_KEY, parse_names
from ._partitions import TensorSource
from ._protobuf import WireError
from ._savedslices import SavedSlices
from ._writing import write

__all__ = ["TensorFlowCheckpoint", "can_read", "open", "read", "write"]


@final
class TensorFlowCheckpoint(ForeignCheckpoint):
    """A checkpoint of TensorFlow's, open for reading from any thread; `open` makes these.

    Tensors have the names of the file. In an object-based checkpoint a variable has the best of the paths that lead to
    it, without ``/.ATTRIBUTES/VARIABLE_VALUE``: one that goes around optimizers if there is one. `aliases` has the
    other paths; each of them, and the key in the file, stands for the variable everywhere.

    Tensors of strings have no dtype, and come as arrays of bytes. Resources and variants are listed, and an error when
    they are read.
    """

    def __init__(self, location: Location, *, verify_slices: bool) -> None:
        ForeignCheckpoint.__init__(self, location.prefix, f"TensorFlow {'V1' if location.files else 'V2'}")
        self._source: TensorSource
        if location.files:
            self._source = SavedSlices(location.prefix, location.files, self._count_read)
        else:
            self._source = Bundle(location.prefix, self._count_read, verify_slices=verify_slices)
        self._leaves: dict[str, ForeignLeaf] = {}
        self._aliases: dict[str, tuple[str, ...]] = {}
        self._key_of: dict[str, bytes] = {}
        for key, names in _name_tensors(self._source).items():
            tensor = self._source.tensors[key]
            name = names[0]
            self._leaves[name] = ForeignLeaf(
                name, tensor.data_type.dtype, tensor.shape, tensor.data_type.name
            )
            self._key_of.update(dict.fromkeys(names, key))
            if names[1:]:
                self._aliases[name] = tuple(names[1:])
        self._name_of = {other: name for name, others in self._aliases.items() for other in others}

    def leaves(self) -> Mapping[str, ForeignLeaf]:
        """The tensors by name, in the order of the file; records of slices and of the graph of objects are not shown.

        Returns:
          For each its dtype (None for strings), its shape, and TensorFlow's name of its type.
        """
        return self._leaves

    def aliases(self) -> Mapping[str, tuple[str, ...]]:
        """Other names of the variables of an object-based checkpoint, by the name that `leaves` has.

        Returns:
          Other paths to the variable, its full name if it is unique, and its key in the file.
        """
        return self._aliases

    def read_box(self, key: str, lo: tuple[int, ...], hi: tuple[int, ...]) -> np.ndarray[Any, Any]:
        """A box of a tensor; see `ForeignCheckpoint.read_box`.

        All of a tensor is verified, and so is each slice of a partitioned one that the box takes whole. Of the others
        the box alone is read, with gaps of up to some 32 KiB where that takes less time than a read for each run of
        bytes; it is verified only if the checkpoint was opened with ``verify_slices=True``. V1 checkpoints are always
        verified, and read whole slices.

        Raises:
          CorruptError: What was read is damaged.
          UnsupportedLeafError: The tensor is no array.
        """
        return self._source.read_box(self._file_key(key), lo, hi)

    def stream(self, key: str, lo: int, hi: int) -> memoryview:
        """Bytes of a tensor; see `ForeignCheckpoint.stream`.

        What is asked for in turn, from the beginning to the end, is verified with the last bytes. A call that does not
        go on where the last one ended reads and verifies the whole tensor first, in bounded memory.

        Raises:
          CorruptError: The tensor is damaged.
          UnsupportedLeafError: It is no array.
          TypeError: It has strings.
        """
        return memoryview(self._source.stream(self._file_key(key), lo, hi).view(np.uint8))

    def close(self) -> None:
        """Closes the files; nothing more can be read."""
        self._source.close()

    def debug_string(self) -> str:
        """What ``tf.train.load_checkpoint(...).debug_string()`` shows: a line ``name (DT_FLOAT) [2,3]`` a tensor."""
        return self.describe()

    def _leaf_of(self, name: object) -> ForeignLeaf | None:
        return self._leaves.get(self._name_of.get(name, name)) if isinstance(name, str) else None

    def _file_key(self, name: str) -> bytes:
        if name not in self._key_of:
            raise KeyError(f"{name!r} is not in {self.path!r}")
        return self._key_of[name]


def can_read(path: str | os.PathLike[str]) -> bool:
    """Whether a path means a checkpoint of TensorFlow's, as `open` takes it.

    Args:
      path: Any local path.

    Returns:
      Whether there is one, with an index that is not damaged.

    Example:
      >>> from jaxckpt.interop import tensorflow
      >>> tensorflow.can_read("/nowhere")
      False
    """
    try:
        open(path).close()
    except CheckpointError:
        return False
    return True


def open(path: str | os.PathLike[str], *, verify_slices: bool = False) -> TensorFlowCheckpoint:
    """Opens a checkpoint of TensorFlow's; reads its index, and the names of its objects, and no tensor.

    Args:
      path: Its prefix; one of its files; a directory whose state file ``checkpoint`` names the latest one, or that has
        one alone; the directory of a SavedModel; of V1 the pattern ``prefix-?????-of-00002``. Local.
      verify_slices: Whether a whole tensor is read and verified, once, before a part of it is returned. The format has
        a checksum for whole tensors only, so that a part that is read alone is not verified.

    Returns:
      The open checkpoint: ``checkpoint.keys()``, ``checkpoint["w"].shape``, ``checkpoint["w"][10:20]``,
      ``print(checkpoint)``. Closing it, or ``with``, gives back its files.

    Raises:
      NotFoundError: There is no checkpoint.
      CorruptError: Its index is damaged, or a file is missing.
      FormatError: It needs a newer reader.

    Example:
      >>> from jaxckpt.interop import tensorflow
      >>> tensorflow.write(tmp / "model.ckpt", {"w": np.arange(4)})
      >>> with tensorflow.open(tmp / "model.ckpt") as checkpoint:
      ...     checkpoint.keys(), checkpoint["w"][1:3]
      (('w',), array([1, 2]))
    """
    return TensorFlowCheckpoint(locate(path), verify_slices=verify_slices)


def read(
    path: str | os.PathLike[str] | ForeignCheckpoint,
    like: Any = None,
    **keywords: Unpack[RestoreKeywords],
) -> Any:
    """Restores a checkpoint of TensorFlow's as a tree of JAX arrays, straight onto devices.

    Without ``like`` the result is ``{name: array}``; with ``like``, or ``rename``, a tree whose keys match the names or
    their aliases: a Keras checkpoint can be restored like ``{"model": ...}`` although its file has the variables under
    the optimizer. Strings come as bytes, or as NumPy arrays of bytes; without ``like``, 64-bit types come as NumPy
    arrays unless ``jax_enable_x64`` is set.

    Everything is verified, for which each process reads a tensor whole of which it needs a part. To read no more than
    the parts, pass what `open` returned.

    Args:
      path: As for `open`, or an open checkpoint.
      like: As for `jaxckpt.restore`.
      keywords: ``mesh``, ``sharding``, ``select``, ``rename``, ``missing``, ``unexpected``, ``cast``, ``reshape``,
        ``report`` and ``options``, as for `jaxckpt.restore`. TensorFlow saves no shardings, so that
        with ``mesh`` all arrays are replicated. A pattern of ``select``, or a rule of ``rename``, that fits none of the
        names is held against the aliases.

    Returns:
      The tree, or the tree and a `RestoreReport`.

    Raises:
      NotFoundError: There is no checkpoint.
      CorruptError: A file is damaged or missing.
      FormatError: It needs a newer reader.
      MismatchError: The tensors and ``like`` differ; `.problems` lists every difference.
      UnsupportedLeafError: A tensor that is wanted is no array.

    Collective: no; each process of a group reads for its own devices.
    Host memory: at most ``host_bytes_max``, or the largest array; on CPU the arrays themselves, too.

    Example:
      >>> from jaxckpt.interop import tensorflow
      >>> tensorflow.write(tmp / "model.ckpt", {"dense": {"kernel": jnp.ones(2)}})
      >>> tensorflow.read(tmp / "model.ckpt", rename={"dense": "layer"})
      {'layer': {'kernel': Array([1., 1.], dtype=float32)}}
    """
    check_keywords(keywords)
    if isinstance(path, ForeignCheckpoint):
        return restore_foreign(path, like, **keywords)
    with open(path, verify_slices=True) as checkpoint:
        return restore_foreign(checkpoint, like, **keywords)


def _name_tensors(source: TensorSource) -> dict[bytes, list[str]]:
    """All names of each tensor, the one that lists show first; no two tensors share one."""
    keys = [key for key in source.tensors if key != GRAPH_KEY]
    found = _names_of_objects(source) if GRAPH_KEY in source.tensors else {}
    plain = {key: key.decode("utf-8", "surrogateescape") for key in keys}
    owner = {name: key for key, name in plain.items()}
    names: dict[bytes, list[str]] = {key: [] for key in keys}
    # The best names of all tensors go before other names of any.
    for rank in range(max(map(len, found.values()), default=0)):
        for key in keys:
            for name in found.get(key, [])[rank : rank + 1]:
                if owner.setdefault(name, key) == key:
                    names[key].append(name)
    return {key: list(dict.fromkeys([*names[key], plain[key]])) for key in keys}


def _names_of_objects(source: TensorSource) -> dict[bytes, list[str]]:
    """The names that the graph of objects gives to tensors.

    Raises:
      CorruptError: The graph is damaged.
    """
    tensor = source.tensors[GRAPH_KEY]
    if tensor.shape or not tensor.data_type.is_string:
        return {}
    try:
        return parse_names(memoryview(source.read_box(GRAPH_KEY, (), ())[()]))
    except WireError as error:
        raise corrupt(source.path, "manifest", f"has a damaged graph of objects: {error}") from error
