"""Files of safetensors, read and written without the package: single ones, and sharded ones with their index.

`open` shows what they hold; `read` restores it as a tree of JAX arrays, straight onto devices, and reads no more than
the bytes that these need; `write` writes them. NumPy is all that is needed.

Names are paths with dots between their parts: ``model.layers.0.weight`` is the leaf ``model/layers/0/weight`` of a
tree, and the other way round. The format has no checksums: headers are checked before anything is read, down to the
last byte of each file, but a changed bit in the values of a tensor cannot be told.

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

import contextlib
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any, final

import numpy as np
from jax.sharding import Mesh

from jaxckpt._config import RestoreOptions
from jaxckpt._errors import CheckpointError, NotFoundError, Problem, UnsupportedLeafError, printable_key
from jaxckpt._foreign import ForeignCheckpoint, ForeignLeaf, restore_foreign
from jaxckpt._naming import Rename, Select
from jaxckpt._storage import local_path

from ._files import SourceFile, corrupt, read_box
from ._headers import INDEX_NAME, SINGLE_NAME, StoredTensor, read_header, read_index
from ._tensorfiles import write

__all__ = ["SafetensorsCheckpoint", "can_read", "open", "read", "write"]


@final
class SafetensorsCheckpoint(ForeignCheckpoint):
    """Files of safetensors, open for reading from any thread; `open` makes these.

    Tensors have the names of the file. Those of types with less than a byte an element are listed, and an error when
    they are read.
    """

    separator = "."

    def __init__(self, path: str, files: Sequence[str], weight_map: Mapping[str, str] | None) -> None:
        ForeignCheckpoint.__init__(self, path, "safetensors" if weight_map is None else "sharded safetensors")
        self._sources: list[SourceFile] = []
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
            if weight_map is None or weight_map.get(key) == os.path.basename(name):
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
        return {name: tensor.leaf for name, tensor in self._tensors.items()}

    def read_box(self, key: str, lo: tuple[int, ...], hi: tuple[int, ...]) -> np.ndarray[Any, Any]:
        """A box of a tensor, C-contiguous; reads the box alone, with gaps of up to some 32 KiB between its rows.

        Args:
          key: Name.
          lo: First place along each axis.
          hi: The places after the last ones.

        Returns:
          The box; the memory is the caller's alone.

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

    def view(self, key: str) -> np.ndarray[Any, Any]:
        """A tensor as a NumPy array that shows the file itself: nothing is read before it is looked at.

        It cannot be written to, and outlives `close`. Whoever changes the file changes the array, and who looks at what
        was cut off since ends the process with SIGBUS.

        Raises:
          UnsupportedLeafError: NumPy has no type for its elements.
        """
        tensor, dtype = self._readable(key)
        if math.prod(tensor.leaf.shape) == 0:
            return np.empty(tensor.leaf.shape, dtype)
        path = self._sources[tensor.file].path
        mapped = np.memmap(path, np.uint8, "r", offset=tensor.offset, shape=(tensor.leaf.nbytes,))
        return np.ndarray(tensor.leaf.shape, dtype, mapped)

    def close(self) -> None:
        """Closes the files; nothing more can be read."""
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
      path: Any local path.

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


def open(path: str | os.PathLike[str]) -> SafetensorsCheckpoint:
    """Opens files of safetensors; reads their headers, and no tensor.

    Args:
      path: A file; the index of several, ``model.safetensors.index.json``; a directory that has ``model.safetensors``,
        or one index, or one file. Local.

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
    text = os.path.abspath(local_path(os.fspath(path)))
    found = _file_in(text) if os.path.isdir(text) else text
    if not found.endswith(".json"):
        return SafetensorsCheckpoint(found, [found], None)
    weight_map = read_index(found)
    files = [os.path.join(os.path.dirname(found), name) for name in dict.fromkeys(weight_map.values())]
    return SafetensorsCheckpoint(found, files, weight_map)


def read(
    path: str | os.PathLike[str] | ForeignCheckpoint,
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
    report: bool = False,
    options: RestoreOptions | None = None,
) -> Any:
    """Restores files of safetensors as a tree of JAX arrays, straight onto devices.

    Without ``like`` the result is ``{name: array}``; with ``like``, or ``rename``, a tree: its keys are matched with
    the names, of which each dot begins another level (``model/layers/0/weight`` for ``model.layers.0.weight``), or
    with the names as they are. Without ``like``, 64-bit types come as NumPy arrays unless ``jax_enable_x64`` is set.

    Each process reads the parts that its own devices need.

    Args:
      path: As for `open`, or an open checkpoint.
      like: As for `jaxckpt.restore`.
      mesh: As for `jaxckpt.restore`; the format has no shardings, so that all arrays are replicated.
      sharding: As for `jaxckpt.restore`.
      select: As for `jaxckpt.restore`, by names or keys.
      rename: As for `jaxckpt.restore`, by names or keys.
      missing: As for `jaxckpt.restore`.
      unexpected: As for `jaxckpt.restore`.
      cast: As for `jaxckpt.restore`.
      reshape: As for `jaxckpt.restore`.
      report: As for `jaxckpt.restore`.
      options: As for `jaxckpt.restore`.

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
      {'dense.kernel': Array([1., 1.], dtype=float32)}
      >>> safetensors.read(tmp / "w.safetensors", rename={"dense": "layer"})
      {'layer': {'kernel': Array([1., 1.], dtype=float32)}}
    """
    with contextlib.ExitStack() as stack:
        checkpoint = path if isinstance(path, ForeignCheckpoint) else stack.enter_context(open(path))
        return restore_foreign(
            checkpoint,
            like,
            mesh=mesh,
            sharding=sharding,
            select=select,
            rename=rename,
            missing=missing,
            unexpected=unexpected,
            cast=cast,
            reshape=reshape,
            report=report,
            options=options,
        )


def _file_in(directory: str) -> str:
    """What a directory means: ``model.safetensors``, an index, or a file."""
    names = sorted(os.listdir(directory))
    single = [name for name in names if name.endswith(".safetensors")]
    indexes = [name for name in names if name.endswith(".safetensors.index.json")]
    if SINGLE_NAME in single:
        return os.path.join(directory, SINGLE_NAME)
    if INDEX_NAME in indexes:
        return os.path.join(directory, INDEX_NAME)
    for found in (indexes, single):
        if len(found) == 1:
            return os.path.join(directory, found[0])
    if not single:
        raise NotFoundError(f"no file of {directory!r} ends in .safetensors")
    raise NotFoundError(
        f"{directory!r} has {len(single)} files of safetensors and no {INDEX_NAME}; name one of them: "
        + ", ".join(single[:5])
    )
