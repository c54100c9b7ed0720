"""Files of safetensors, read and written without the package: single ones, and sharded ones with their index.

`open` shows what they hold; `read` restores it as a tree of JAX arrays, straight onto devices, and reads no more than
the bytes that these need; `write` writes them. NumPy is all that is needed.

Names are paths with dots between their parts: ``model.layers.0.weight`` is the leaf ``model/layers/0/weight`` of a
tree, and the other way round. The format has no checksums: headers are checked before anything is read, down to the
last byte of each file, but a changed bit in the values of a tensor cannot be told.

Opening takes the time that headers take, however large the files are. ``read(mmap=True)`` maps them; there it says for
which arrays that holds.

Example:
  >>> from jaxckpt.interop import safetensors
  >>> safetensors.write(tmp / "model.safetensors", {"dense": {"kernel": jnp.arange(6.0).reshape(2, 3)}})
  >>> checkpoint = safetensors.open(tmp / "model.safetensors")
  >>> print(checkpoint)
  dense.kernel (F32) [2,3]
  >>> checkpoint["dense.kernel"][1]
  array([3., 4., 5.], dtype=float32)

Source: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, Unpack, final

import numpy as np

from jaxckpt._adopting import RestoreKeywords, check_keywords, restore_foreign
from jaxckpt._errors import CheckpointError, NotFoundError, Problem, UnsupportedLeafError, printable_key
from jaxckpt._foreign import ForeignCheckpoint, ForeignLeaf
from jaxckpt._storage import Buffer

from ._files import (
    SourceFile,
    absolute_path,
    corrupt,
    is_url,
    join_path,
    list_directory,
    read_box,
    split_path,
)
from ._headers import INDEX_NAME, SINGLE_NAME, StoredTensor, read_header, read_index
from ._tensorfiles import write

__all__ = ["SafetensorsCheckpoint", "can_read", "open", "read", "write"]

# The end of the name of a file that is one of several.
_PART = re.compile(r"-[0-9]{5}-of-([0-9]{5})\.safetensors$")


@final
class SafetensorsCheckpoint(ForeignCheckpoint):
    """Files of safetensors, open for reading from any thread; `open` makes these.

    Tensors have the names of the file. Those of types with less than a byte an element are listed, and an error when
    they are read.
    """

    is_nested = True

    def __init__(
        self,
        path: str,
        files: Sequence[str],
        weight_map: Mapping[str, str] | None,
        separator: str | None,
    ) -> None:
        ForeignCheckpoint.__init__(self, path, "safetensors" if weight_map is None else "sharded safetensors")
        self.separator = separator
        self._sources: list[SourceFile] = []
        self._maps: dict[int, Buffer | None] = {}
        self._tensors: dict[str, StoredTensor] = {}
        self._metadata: dict[str, str] = {}
        try:
            for number, name in enumerate(files):
                self._add_file(number, name, weight_map)
        except BaseException:
            self.close()
            raise
        if weight_map is not None:
            missing = [name for name in weight_map if name not in self._tensors]
            if missing:
                what = f"names {missing[0]!r} in {weight_map[missing[0]]!r}, which does not have it"
                raise corrupt(path, "manifest", what, missing[0])
            self._tensors = {name: self._tensors[name] for name in weight_map}
        self._leaves = {name: tensor.leaf for name, tensor in self._tensors.items()}

    def _add_file(self, number: int, name: str, weight_map: Mapping[str, str] | None) -> None:
        try:
            source = SourceFile(name, self._count_read)
        except NotFoundError as error:
            if weight_map is None:
                raise
            raise corrupt(name, "object", f"is missing, and {self.path} names it") from error
        self._sources.append(source)
        tensors, metadata = read_header(source, number)
        for key, tensor in tensors.items():
            if weight_map is None or weight_map.get(key) == split_path(name)[1]:
                self._tensors[key] = tensor
        for key, text in metadata.items():
            self._metadata.setdefault(key, text)

    @property
    def metadata(self) -> dict[str, str]:
        """What the header says beside the tensors; of several files the first that says it."""
        return dict(self._metadata)

    def leaves(self) -> Mapping[str, ForeignLeaf]:
        """The tensors by name, in the order of the header, or of the index.

        Returns:
          For each its dtype, its shape, and the format's name of its type, such as ``"BF16"``.
        """
        return self._leaves

    def read_box(self, key: str, lo: tuple[int, ...], hi: tuple[int, ...]) -> np.ndarray[Any, Any]:
        """A box of a tensor; see `ForeignCheckpoint.read_box`.

        The box alone is read, with gaps of up to some 32 KiB between its rows.

        Raises:
          CorruptError: The file was cut off, or cannot be read.
          UnsupportedLeafError: NumPy has no type for its elements.
        """
        tensor, dtype = self._readable(key)
        fits = all(0 <= a <= b <= size for a, b, size in zip(lo, hi, tensor.leaf.shape, strict=True))
        if not fits:
            raise ValueError(f"the box from {lo} to {hi} is not in {key!r}, of shape {tensor.leaf.shape}")
        return read_box(self._sources[tensor.file], tensor.offset, tensor.leaf.shape, dtype, lo, hi)

    def stream(self, key: str, lo: int, hi: int) -> memoryview:
        """Bytes of a tensor; see `ForeignCheckpoint.stream`.

        Raises:
          CorruptError: The file was cut off, or cannot be read.
          UnsupportedLeafError: NumPy has no type for its elements.
        """
        tensor, _ = self._readable(key)
        if not 0 <= lo <= hi <= tensor.leaf.nbytes:
            raise ValueError(f"bytes [{lo}, {hi}) of {tensor.leaf.nbytes}")
        return self._sources[tensor.file].read(tensor.offset + lo, hi - lo)

    def view(self, key: str) -> np.ndarray[Any, Any] | None:
        """A tensor as a NumPy array that shows the file itself: nothing is read before it is looked at.

        What is written into it is never written to the file. It outlives `close`. Whoever changes the file changes the
        array, and who looks at what was cut off since ends the process with SIGBUS.

        Returns:
          The array; None where the file is on an object store.

        Raises:
          UnsupportedLeafError: NumPy has no type for its elements.
        """
        tensor, dtype = self._readable(key)
        with self._lock:
            if tensor.file not in self._maps:
                self._maps[tensor.file] = self._sources[tensor.file].map()
            shown = self._maps[tensor.file]
        if shown is None:
            return None
        return np.ndarray(tensor.leaf.shape, dtype, shown, offset=tensor.offset)

    def close(self) -> None:
        """Closes the files; nothing more can be read."""
        self._maps.clear()
        for source in self._sources:
            source.close()

    def _readable(self, key: str) -> tuple[StoredTensor, np.dtype[Any]]:
        if key not in self._tensors:
            raise KeyError(f"{key!r} is not in {self.path!r}")
        tensor = self._tensors[key]
        if tensor.leaf.dtype is None:
            what = f"has the type {tensor.leaf.stored_as}, whose elements share bytes"
            raise UnsupportedLeafError(
                f"{self.path}: {printable_key(key)} {what}", [Problem(key, "dtype", what)]
            )
        return tensor, tensor.leaf.dtype


def can_read(path: str | os.PathLike[str]) -> bool:
    """Whether a path means files of safetensors, as `open` takes it.

    Args:
      path: Any path or URL.

    Returns:
      Whether there are some, with headers that are not damaged.

    Example:
      >>> from jaxckpt.interop import safetensors
      >>> safetensors.can_read("/nowhere")
      False
    """
    try:
        open(path).close()
    except CheckpointError:
        return False
    return True


def open(path: str | os.PathLike[str], *, separator: str | None = ".") -> SafetensorsCheckpoint:
    """Opens files of safetensors; reads their headers, and no tensor.

    Args:
      path: A file; the index of several, ``model.safetensors.index.json``; a directory that has ``model.safetensors``,
        or one index, or one file. A path, or the URL of an object store.
      separator: What stands between the parts of a name; None takes each name as one part.

    Returns:
      The open checkpoint: ``checkpoint.keys()``, ``checkpoint["w"].shape``, ``checkpoint["w"][10:20]``,
      ``checkpoint.metadata``, ``print(checkpoint)``. Closing it, or ``with``, gives back its files.

    Raises:
      NotFoundError: There are none.
      CorruptError: A header or the index is damaged, or a file is missing, cut off, or too long.

    Example:
      >>> from jaxckpt.interop import safetensors
      >>> safetensors.write(tmp / "w.safetensors", {"w": np.arange(4)}, metadata={"format": "np"})
      >>> with safetensors.open(tmp / "w.safetensors") as checkpoint:
      ...     checkpoint.keys(), checkpoint["w"][1:3], checkpoint.metadata
      (('w',), array([1, 2]), {'format': 'np'})
    """
    found = absolute_path(path)
    directory, name = split_path(found)
    names = None if is_url(found) and name.endswith((".safetensors", ".json")) else list_directory(found)
    if names is not None:
        directory, name = found, _choose_file(found, names)
        found = join_path(directory, name)
    if not (name.endswith(".json") and ".safetensors." in name):
        return SafetensorsCheckpoint(found, [found], None, separator)
    weight_map = read_index(found)
    files = [join_path(directory, each) for each in dict.fromkeys(weight_map.values())]
    return SafetensorsCheckpoint(found, files, weight_map, separator)


def read(
    path: str | os.PathLike[str] | ForeignCheckpoint,
    like: Any = None,
    *,
    mmap: bool = False,
    separator: str | None = ".",
    **keywords: Unpack[RestoreKeywords],
) -> Any:
    """Restores files of safetensors as a tree of JAX arrays, straight onto devices.

    Each dot of a name begins another level of the tree: ``model.layers.0.weight`` is the leaf
    ``model/layers/0/weight``. Without ``like`` the result is nested dicts, with integers as keys where names have them,
    and 64-bit types come as NumPy arrays unless ``jax_enable_x64`` is set. The keys of ``like`` may also be names as
    they are, ``{"model.layers.0.weight": ...}``.

    Each process reads the parts that its own devices need.

    Args:
      path: As for `open`, or an open checkpoint.
      like: As for `jaxckpt.restore`.
      mmap: Whether arrays on CPU may show the files instead of holding a copy. That holds for tensors of local files
        that begin at a multiple of 64 bytes, as JAX wants it: of files that `write` made all whose sizes are multiples
        of 64 (and one after them), of files of the package one in eight files'. The others are read. What
        `jaxckpt.restore` says of ``mmap=`` holds here, too.
      separator: As for `open`.
      keywords: ``mesh``, ``sharding``, ``select``, ``rename``, ``missing``, ``unexpected``, ``cast``, ``reshape``,
        ``report`` and ``options``, as for `jaxckpt.restore`. The format has no shardings, so that
        with ``mesh`` all arrays are replicated. ``select`` and ``rename`` take names or keys:
        ``{"model.layers": "blocks"}`` is ``{"model/layers": "blocks"}``.

    Returns:
      The tree, or the tree and a `RestoreReport`.

    Raises:
      NotFoundError: There are no such files.
      CorruptError: A file is damaged or missing.
      MismatchError: The tensors and ``like`` differ; `.problems` lists every difference.
      UnsupportedLeafError: A tensor that is wanted has a type that NumPy lacks.

    Collective: no; each process of a group reads for its own devices.
    Host memory: at most ``host_bytes_max``, or the largest array; on CPU the arrays themselves, too.

    Example:
      >>> from jaxckpt.interop import safetensors
      >>> safetensors.write(tmp / "w.safetensors", {"dense": {"kernel": jnp.ones(2)}})
      >>> safetensors.read(tmp / "w.safetensors")
      {'dense': {'kernel': Array([1., 1.], dtype=float32)}}
      >>> safetensors.read(tmp / "w.safetensors", separator=None)
      {'dense.kernel': Array([1., 1.], dtype=float32)}
      >>> safetensors.read(tmp / "w.safetensors", rename={"dense": "layer"})
      {'layer': {'kernel': Array([1., 1.], dtype=float32)}}
    """
    check_keywords(keywords)
    if isinstance(path, ForeignCheckpoint):
        return restore_foreign(path, like, mmap=mmap, **keywords)
    with open(path, separator=separator) as checkpoint:
        return restore_foreign(checkpoint, like, mmap=mmap, **keywords)


def _is_part(name: str) -> bool:
    """Whether a file says by its name that it is one of several, as they are while nothing is committed."""
    found = _PART.search(name)
    return found is not None and int(found[1]) > 1


def _choose_file(directory: str, names: Sequence[str]) -> str:
    """What a directory with these names means: ``model.safetensors``, an index, or a file."""
    single = [name for name in names if name.endswith(".safetensors")]
    indexes = [name for name in names if name.endswith(".safetensors.index.json")]
    for found, usual in ((single, SINGLE_NAME), (indexes, INDEX_NAME)):
        if usual in found:
            return usual
    parts = [name for name in single if _is_part(name)]
    for found in (indexes, single):
        if len(found) == 1 and found != parts:
            return found[0]
    if parts and (len(parts) == 1 or parts == single):  # none of which is to be taken for a checkpoint
        raise NotFoundError(
            f"{parts[0]!r} in {directory!r} is one of several files, and there is no {INDEX_NAME}"
        )
    if not single:
        raise NotFoundError(f"no file of {directory!r} ends in .safetensors")
    raise NotFoundError(
        f"{directory!r} has {len(single)} files of safetensors and no {INDEX_NAME}; name one of them: "
        + ", ".join(single[:5])
    )
