"""How does a checkpoint of one library become a checkpoint of another?

The format of the source is found out, that of the destination is said. A format of another library is a module of
`jaxckpt.interop` with the verbs ``open`` and ``write``; its arrays are read as `_foreign` describes.

1. The arrays are listed, selected and renamed by name. Nothing is read yet.
2. They are streamed: a few MiB of an array are read, cast if that was asked for, and written, then the next. Neither
   a checkpoint nor an array is ever in memory whole; strings are, one array of them at a time.
3. What was written is read once more and verified.

Values, names and shapes stay what they are, and metadata where a format has it. A checkpoint of ours gets a tree of
dicts (`nest`), and its arrays no shardings, since other formats have none. What has no counterpart in the destination
is an error before anything is written. Deliberately not here: devices, and from ours to ours, which is what `restore`
and `save` are for.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from ._config import MIB, PIECE_BYTES, RestoreOptions, SaveOptions
from ._dtypes import dtype_from
from ._errors import (
    CheckpointError,
    CorruptError,
    FormatError,
    NotFoundError,
    Problem,
    UnsupportedLeafError,
    list_problems,
)
from ._foreign import ForeignArray, ForeignCheckpoint, nest_selected, select_names
from ._inspect import format_count, verify
from ._layout import flat_boxes
from ._leaves import StreamedArray
from ._naming import Select
from ._placement import cast
from ._progress import Progress, ProgressMeter, format_bytes
from ._reading import Checkpoint, StoredLeaf, open_checkpoint
from ._restoring import match_tree
from ._saving import SaveContext, SaveJob
from ._storage import Buffer

Path = str | os.PathLike[str]
OnProgress = Callable[[Progress], None]

OWN_FORMAT = "jaxckpt"
FOREIGN_FORMATS = ("tensorflow", "safetensors", "npz", "flax")
FORMATS = (OWN_FORMAT, *FOREIGN_FORMATS)

# Two pieces, one of which is written while the next is read. JAX itself takes 150 MiB when it is imported, and all
# together shall stay below 200.
_HOST_BYTES_MAX = 8 * MIB

# Each has a piece in memory, and one is nearly as fast as several with a file that was just written.
_VERIFYING_THREADS = 1

# Strings of a fixed length must not take much more memory than the strings themselves.
_PADDED_BYTES_MAX = 64 * MIB


@dataclasses.dataclass(frozen=True, slots=True)
class Conversion:
    """What a conversion did.

    Attributes:
      source: Where the source is.
      source_format: Its format, one of `FORMATS`.
      destination: Where the destination is.
      destination_format: Its format.
      leaves: Number of arrays and values that were written.
      nbytes: Bytes of the arrays, as they were written.
      problems: What is wrong with the destination, reread; empty when it is whole.
      seconds: Seconds that it took.
    """

    source: str
    source_format: str
    destination: str
    destination_format: str
    leaves: int
    nbytes: int
    problems: tuple[Problem, ...]
    seconds: float

    @property
    def ok(self) -> bool:
        """Whether the destination is whole."""
        return not self.problems

    def __str__(self) -> str:
        lines = [
            f"{self.source} ({self.source_format}) -> {self.destination} ({self.destination_format})",
            f"{format_count(self.leaves, 'leaf', 'leaves')}, {format_bytes(self.nbytes)} in {self.seconds:.2f} s",
            "verified" if self.ok else "damaged on its way to storage:",
            *(f"  {problem}" for problem in self.problems),
        ]
        return "\n".join(lines)


def convert(
    source: Path,
    destination: Path,
    *,
    to: str = OWN_FORMAT,
    select: Select = None,
    rename: Mapping[str, str] | None = None,
    dtype: Any = None,
    overwrite: bool = False,
    on_progress: OnProgress | None = None,
) -> Conversion:
    """Writes a checkpoint in another format, and verifies what was written.

    Args:
      source: A checkpoint of any format that is known; how each is named says its module in `jaxckpt.interop`.
      destination: Where to write; for TensorFlow the prefix of the files.
      to: Format of the destination, one of `FORMATS`.
      select: As for `jaxckpt.restore`: which arrays are taken, by their names in the source.
      rename: As for `jaxckpt.restore`: mapping of names, or of leading parts of them, to new ones.
      dtype: Floating type that all arrays of another floating type are cast to.
      overwrite: Whether a checkpoint at ``destination`` may be replaced.
      on_progress: Called with a `Progress` while the source is read and written, then while the result is verified.

    Returns:
      A `Conversion`; a destination that was damaged on its way to storage is reported, not raised.

    Raises:
      NotFoundError: There is no checkpoint, or none of a known format.
      CorruptError: The source is damaged. Nothing was committed.
      ExistsError: A checkpoint is at ``destination``, and ``overwrite`` is False.
      MismatchError: ``select`` or ``rename`` does not fit the names.
      UnsupportedLeafError: The destination's format has nothing for an array; `.problems` lists all of them.
      ValueError: Both formats are the same, or ``dtype`` is not floating.
      WriteError: Storage refused a write.

    Host memory: some 40 MiB, whatever the size of the checkpoint and of its arrays.
    """
    began_s = time.perf_counter()
    wanted_dtype = None if dtype is None else _floating_dtype(dtype)
    if to not in FORMATS:
        raise ValueError(f"to must be one of {', '.join(map(repr, FORMATS))}, not {to!r}")
    with contextlib.ExitStack() as closing:
        source_format, opened = _open(os.fspath(source))
        if isinstance(opened, ForeignCheckpoint):
            closing.enter_context(opened)
        else:
            closing.callback(opened.release)
        if source_format == to:
            raise ValueError(
                f"{opened.path!r} is a {to} checkpoint already; to= (--to) names another format: "
                + ", ".join(name for name in FORMATS if name != to)
            )
        if isinstance(opened, ForeignCheckpoint):
            names = select_names(opened, select, rename)
            leaves: list[Any] = [opened[name] for name in names.values()]
            forms = _forms(list(names), leaves, to, wanted_dtype)
            tree = nest_selected(opened, list(names), forms)
        else:
            wanted = match_tree(
                opened, None, select, rename, missing="error", unexpected="error", cast=False, reshape=False
            )
            leaves = [opened[opened.keys()[match.leaf]] for match in wanted.matches if match.leaf is not None]
            tree = wanted.unflatten(_forms(wanted.keys, leaves, to, wanted_dtype))
        if to == OWN_FORMAT:
            context = SaveContext(metadata=opened.metadata, on_progress=on_progress)
            options = SaveOptions(host_bytes_max=_HOST_BYTES_MAX)
            SaveJob(destination, tree, overwrite, context, options, is_blocking=True).run()
        else:
            extras = _metadata_for(to, opened.metadata)
            _verbs_of(to).write(destination, tree, overwrite=overwrite, on_progress=on_progress, **extras)
    problems = _verify(destination, to, on_progress)
    return Conversion(
        source=opened.path,
        source_format=source_format,
        destination=os.fspath(destination),
        destination_format=to,
        leaves=len(leaves),
        nbytes=sum(_nbytes_as(leaf, wanted_dtype) for leaf in leaves),
        problems=problems,
        seconds=time.perf_counter() - began_s,
    )


def _verbs_of(name: str) -> Any:
    """The module that knows a foreign format."""
    return importlib.import_module(f"jaxckpt.interop.{name}")


def _open(path: str) -> tuple[str, Checkpoint | ForeignCheckpoint]:
    """The checkpoint at a path, and the name of its format."""
    try:
        return OWN_FORMAT, open_checkpoint(path)
    except NotFoundError as error:
        not_found = error
    damage: CheckpointError | None = None
    reasons: list[str] = []
    for name in FOREIGN_FORMATS:
        try:
            checkpoint: ForeignCheckpoint = _verbs_of(name).open(path)
            return name, checkpoint
        except NotFoundError as error:
            reasons.append(str(error))
        except CheckpointError as error:  # unless another format takes it for its own
            damage = damage or error
    if damage is not None:
        raise damage
    raise NotFoundError(
        "\n".join([f"no checkpoint of a known format ({', '.join(FORMATS)}) at {path!r}", *reasons])
    ) from not_found


def _metadata_for(to: str, metadata: Any) -> dict[str, Any]:
    """The argument that keeps a source's metadata, if the destination's format has something for it."""
    if to != "safetensors" or not isinstance(metadata, dict):
        return {}
    are_texts = all(isinstance(text, str) for pair in metadata.items() for text in pair)
    return {"metadata": metadata} if are_texts and metadata else {}


def _floating_dtype(dtype: Any) -> np.dtype[Any]:
    wanted = dtype_from(dtype) if isinstance(dtype, str) else np.dtype(dtype)
    if not jnp.issubdtype(wanted, jnp.floating):
        raise ValueError(f"dtype= casts floating arrays, and {wanted} is no floating type")
    return wanted


# --- what is written ------------------------------------------------------------------------------------------


def _forms(keys: Sequence[str], leaves: Sequence[Any], to: str, dtype: np.dtype[Any] | None) -> list[Any]:
    """What stands in the tree that is written for each leaf of the source.

    Raises:
      UnsupportedLeafError: Some cannot be converted.
    """
    forms: list[Any] = []
    problems: list[Problem] = []
    for key, leaf in zip(keys, leaves, strict=True):
        try:
            forms.append(_form_of(leaf, to, dtype))
        except UnsupportedLeafError as error:
            problems.append(Problem(key, "leaf", str(error)))
    if problems:
        headline = f"cannot convert: {len(problems)} of {len(keys)} leaves cannot be stored"
        advice = ["nothing was written; select= (--select) takes the others"]
        raise UnsupportedLeafError(list_problems(headline, problems, advice), problems)
    return forms


def _form_of(leaf: Any, to: str, dtype: np.dtype[Any] | None) -> Any:
    if leaf.dtype is None:
        return leaf[...] if to != OWN_FORMAT else _own_strings(leaf[...])
    if isinstance(leaf, StoredLeaf) and getattr(leaf.dtype, "kind", "") == "S":
        return leaf[...].astype(object)
    if dtype is None or not _is_cast(leaf, dtype):
        return StreamedArray(leaf.shape, leaf.dtype, leaf.stream) if isinstance(leaf, ForeignArray) else leaf
    # Ranges are whole elements: pieces end at whole MiB or with the array, and floating types have 2^n bytes.
    read = _stream_of_boxes(leaf) if isinstance(leaf, StoredLeaf) else leaf.stream
    return StreamedArray(leaf.shape, dtype, _cast_stream(read, leaf.dtype, dtype))


def _stream_of_boxes(leaf: StoredLeaf) -> Callable[[int, int], Buffer]:
    """Ranges of the bytes of an array, read as boxes."""
    itemsize = leaf.spec.np_dtype.itemsize

    def read(lo: int, hi: int) -> Buffer:
        boxes = flat_boxes(lo // itemsize, hi // itemsize, leaf.shape)
        return np.concatenate([leaf.read_box(box).reshape(-1).view(np.uint8) for box in boxes])

    return read


def _cast_stream(
    read: Callable[[int, int], Buffer], old: np.dtype[Any], new: np.dtype[Any]
) -> Callable[[int, int], Buffer]:
    """Ranges of the bytes that an array has in another dtype."""

    def read_cast(lo: int, hi: int) -> Buffer:
        raw = read(lo // new.itemsize * old.itemsize, hi // new.itemsize * old.itemsize)
        return cast(raw.view(old), new).view(np.uint8)

    return read_cast


def _is_cast(leaf: Any, dtype: np.dtype[Any] | None) -> bool:
    is_array = isinstance(leaf.dtype, np.dtype) and getattr(leaf, "kind", "array") in ("array", "numpy")
    return dtype is not None and is_array and bool(jnp.issubdtype(leaf.dtype, jnp.floating))


def _nbytes_as(leaf: Any, dtype: np.dtype[Any] | None) -> int:
    if dtype is None or not _is_cast(leaf, dtype):
        return int(leaf.nbytes)
    return math.prod(leaf.shape) * dtype.itemsize


def _own_strings(strings: Any) -> Any:
    """Strings of bytes in a form that has a fixed size: bytes, or a NumPy array of them.

    Raises:
      UnsupportedLeafError: There is none.
    """
    if isinstance(strings, bytes):
        return strings
    flat: list[bytes] = strings.reshape(-1).tolist()
    length = max(map(len, flat), default=0)
    if any(string.endswith(b"\0") for string in flat):
        raise UnsupportedLeafError("holds strings that end in NUL bytes, which NumPy's arrays of bytes lose")
    if length * len(flat) > max(_PADDED_BYTES_MAX, 4 * sum(map(len, flat))):
        raise UnsupportedLeafError(
            f"holds {len(flat)} strings of up to {length} bytes, too different in length for an array of bytes"
        )
    return strings.astype(f"S{max(length, 1)}")


# --- looking at it once more ----------------------------------------------------------------------------------


def _verify(path: Path, to: str, on_progress: OnProgress | None) -> tuple[Problem, ...]:
    if to == OWN_FORMAT:
        options = RestoreOptions(io_threads=_VERIFYING_THREADS)
        return verify(path, options=options, on_progress=on_progress).problems
    problems: list[Problem] = []
    try:
        with _verbs_of(to).open(path) as written:
            arrays = [written[key] for key in written.leaves()]
            meter = ProgressMeter(sum(array.nbytes for array in arrays), "read", on_progress)
            for array in arrays:
                try:
                    _read_all(array, meter)
                except CorruptError as error:
                    problems.extend(error.problems or [Problem(array.key, "checksum", str(error))])
    except (CorruptError, FormatError, NotFoundError) as error:
        problems.extend(error.problems or [Problem(None, "object", str(error))])
    return tuple(problems)


def _read_all(array: ForeignArray, meter: ProgressMeter) -> None:
    """Reads an array piece by piece, whereby it is verified."""
    if array.dtype is None:
        array[...]
        return
    for lo in range(0, array.nbytes, PIECE_BYTES):
        meter.add(len(array.stream(lo, min(lo + PIECE_BYTES, array.nbytes))))
