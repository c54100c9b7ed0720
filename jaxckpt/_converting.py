"""How does a checkpoint of one library become a checkpoint of another?

The format of the source is found out, that of the destination is said. A format of another library is a module of
`jaxckpt.interop` with the verbs ``open`` and ``write``; what it opens is a `ForeignCheckpoint`.

1. The arrays are listed, selected and renamed by name. Nothing is read yet.
2. They are streamed: a few MiB of an array are read, cast if that was asked for, and written, then the next. Neither
   a checkpoint nor an array is ever in memory whole; strings are, one array of them at a time.
3. What was written is read once more. A checkpoint of ours has checksums for that; of every array in other formats the
   checksum is made while it is written, and compared with what is read.

Values, names and shapes stay what they are, and metadata where a format has it. A checkpoint of ours gets a tree of
dicts (`nest`), unless the source says what the tree was, and what it says of shardings; arrays of 64-bit types, which
JAX has only with ``jax_enable_x64``, are NumPy arrays without that. A leaf that has no counterpart in the destination
is an error before anything is written; what else the source has and the destination has no place for is said
(`Conversion.left_out`). Deliberately not here: devices, and from ours to ours, which is what `restore` and `save` are
for.

A directory of Orbax's ``CheckpointManager`` becomes one of ours, with the trees, metrics, small items and times of its
steps. Each step is a checkpoint that is written and verified before the next one is opened.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import math
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
import xxhash

from ._addressing import nest_selected, select_names
from ._config import MIB, PIECE_BYTES, RestoreOptions, SaveOptions
from ._dtypes import dtype_from
from ._errors import (
    CheckpointError,
    CorruptError,
    ExistsError,
    FormatError,
    NotFoundError,
    Problem,
    UnsupportedLeafError,
    list_problems,
    printable_key,
)
from ._foreign import ForeignArray, ForeignCheckpoint
from ._inspect import format_count, verify
from ._keys import flatten
from ._layout import flat_boxes
from ._leaves import StreamedArray
from ._manifest import MANIFEST_NAME
from ._naming import Select
from ._placement import cast
from ._progress import Progress, ProgressMeter, format_bytes
from ._reading import Checkpoint, StoredLeaf, open_checkpoint
from ._restoring import match_tree
from ._saving import SaveContext, SaveJob
from ._steps import StepDirectory
from ._storage import Buffer, Store, local_path
from ._store import open_store

Path = str | os.PathLike[str]
OnProgress = Callable[[Progress], None]

OWN_FORMAT = "jaxckpt"
FOREIGN_FORMATS = ("tensorflow", "safetensors", "npz", "flax")
FORMATS = (OWN_FORMAT, *FOREIGN_FORMATS)
# Read, and not written.
SOURCE_FORMATS = (*FORMATS, "orbax")

_FORMAT_OF_SUFFIX = {".safetensors": "safetensors", ".npz": "npz", ".msgpack": "flax"}
# Directories of managers and of other libraries have names such as step_00000100 and checkpoint_100.
_NUMBERED = re.compile(r"(.*?)([0-9]{1,18})", re.DOTALL)

# Two pieces, one of which is written while the next is read. JAX itself takes 150 MiB when it is imported, and all
# together shall stay below 200.
_HOST_BYTES_MAX = 8 * MIB

# Of chunks of the source that are read and decoded at once.
_SOURCE_BYTES_MAX = 32 * MIB

# Each has a piece in memory, and one is nearly as fast as several with a file that was just written.
_VERIFYING_THREADS = 1

# Strings of a fixed length must not take much more memory than the strings themselves.
_PADDED_BYTES_MAX = 64 * MIB


@dataclasses.dataclass(frozen=True, slots=True)
class Conversion:
    """What a conversion did.

    Attributes:
      source: Where the source is.
      source_format: Its format, one of `SOURCE_FORMATS`.
      destination: Where the destination is.
      destination_format: Its format.
      leaves: Number of arrays and values that were written.
      nbytes: Bytes of the arrays, as they were written.
      problems: What is wrong with the destination, reread; empty when it is whole.
      seconds: Seconds that it took.
      steps: Numbers of the checkpoints, where the source was a directory of them; ascending.
      left_out: What the source has beside its arrays, and the destination's format has no place for: a text each. What
        stood around its leaves, such as tuples and None, is not among it.
    """

    source: str
    source_format: str
    destination: str
    destination_format: str
    leaves: int
    nbytes: int
    problems: tuple[Problem, ...]
    seconds: float
    steps: tuple[int, ...] = ()
    left_out: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether the destination is whole."""
        return not self.problems

    def __str__(self) -> str:
        steps = f"{format_count(len(self.steps), 'step', 'steps')}, " if self.steps else ""
        amount = f"{format_count(self.leaves, 'leaf', 'leaves')}, {format_bytes(self.nbytes)}"
        lines = [
            f"{self.source} ({self.source_format}) -> {self.destination} ({self.destination_format})",
            f"{steps}{amount} in {self.seconds:.2f} s",
            *(f"left out: {text}" for text in self.left_out),
            "verified" if self.ok else "damaged on its way to storage:",
            *(f"  {problem}" for problem in self.problems),
        ]
        return "\n".join(lines)


def convert(
    source: Path,
    destination: Path,
    *,
    to: str | None = None,
    step: int | None = None,
    select: Select = None,
    rename: Mapping[str, str] | None = None,
    dtype: Any = None,
    shard_bytes_max: int | None = None,
    overwrite: bool = False,
    on_progress: OnProgress | None = None,
) -> Conversion:
    """Writes a checkpoint in another format, and verifies what was written.

    Args:
      source: A checkpoint of any format that is known, or the directory of a `CheckpointManager`; how each is named
        says its module in `jaxckpt.interop`. Without ``step``, a directory of Orbax's steps becomes one of ours.
      destination: Where to write; for TensorFlow the prefix of the files.
      to: Format of the destination, one of `FORMATS`; None: what the name says that ends in ``.safetensors``, ``.npz``
        or ``.msgpack`` (Flax), else jaxckpt's own.
      step: Which one, where the source is a directory of numbered checkpoints; None: the newest.
      select: As for `jaxckpt.restore`: which arrays are taken, by their names in the source.
      rename: As for `jaxckpt.restore`: mapping of names, or of leading parts of them, to new ones.
      dtype: Floating type that all arrays of another floating type are cast to.
      shard_bytes_max: For safetensors: several files with an index in the directory ``destination``, and at most so
        many bytes of tensors in each that has more than one; None: one file.
      overwrite: Whether a checkpoint at ``destination`` may be replaced.
      on_progress: Called with a `Progress` while the source is read and written, then while the result is verified.

    Returns:
      A `Conversion`; a destination that was damaged on its way to storage is reported, not raised. What the source has
      beside its arrays and the destination has no place for, such as items, is in `Conversion.left_out`.

    Raises:
      NotFoundError: There is no checkpoint, or none of a known format.
      CorruptError: The source is damaged. Nothing was committed.
      ExistsError: A checkpoint is at ``destination``, and ``overwrite`` is False.
      MismatchError: ``select`` or ``rename`` does not fit the names.
      UnsupportedLeafError: The destination's format has nothing for an array; `.problems` lists all of them.
      ValueError: Nothing would change, since both formats are the same, and neither ``select`` nor ``rename`` nor
        ``dtype`` nor ``shard_bytes_max`` is given; or both are this library's; or ``dtype`` is not floating; or
        ``shard_bytes_max`` is not above 0, or is given where the destination is no directory of safetensors; or a
        checkpoint of TensorFlow or npz would be written to an object store; or a path is empty.
      WriteError: Storage refused a write.

    Host memory: some 40 MiB, whatever the size of the checkpoint and of its arrays, and 4 to 9 KiB for each array. Of
      npz, arrays in Fortran order or in the other byte order are in memory whole, one at a time; of files on object
      stores, each that is written; of Orbax's, 64 MiB more, and 32 MiB of chunks, or a single one that is larger, as it
      is stored and decoded: what one device held is one chunk unless it was told otherwise.
    """
    began_s = time.perf_counter()
    if not os.fspath(source) or not os.fspath(destination):
        # Which would be the working directory; whoever calls this from a shell has a variable that is not set.
        raise ValueError("source and destination are paths, and one of them is empty")
    choices = _Choices(
        select,
        rename,
        None if dtype is None else _floating_dtype(dtype),
        shard_bytes_max,
        overwrite,
        on_progress,
    )
    to = to or _format_named(destination)
    _check_destination(destination, to, shard_bytes_max)
    steps = _verbs_of("orbax").steps(source) if step is None else ()
    if steps:
        return _convert_steps(source, destination, to, steps, choices, began_s)
    with contextlib.ExitStack() as closing:
        source_format, opened = _open(_step_in(os.fspath(source), step))
        if isinstance(opened, ForeignCheckpoint):
            closing.enter_context(opened)
        else:
            closing.callback(opened.release)
        if source_format == to and (to == OWN_FORMAT or not choices.change_something()):
            raise ValueError(
                f"{opened.path!r} is a {to} checkpoint already; to= (--to) names another format: "
                + ", ".join(name for name in FORMATS if name != to)
            )
        written = _write(opened, destination, to, choices)
    problems = _verify(destination, to, written.digests, on_progress)
    return Conversion(
        source=opened.path,
        source_format=source_format,
        destination=os.fspath(destination),
        destination_format=to,
        leaves=written.leaves,
        nbytes=written.nbytes,
        problems=problems,
        seconds=time.perf_counter() - began_s,
        left_out=written.left_out,
    )


@dataclasses.dataclass(frozen=True, slots=True)
class _Choices:
    """What the caller of `convert` asked for."""

    select: Select
    rename: Mapping[str, str] | None
    dtype: np.dtype[Any] | None
    shard_bytes_max: int | None
    overwrite: bool
    on_progress: OnProgress | None

    def change_something(self) -> bool:
        """Whether the destination holds something else than the source, or in other files."""
        changes = (self.select, self.rename, self.dtype, self.shard_bytes_max)
        return any(change is not None for change in changes)


def _check_destination(destination: Path, to: str, shard_bytes_max: int | None) -> None:
    """Raises ValueError where a format cannot be written as the caller of `convert` asked."""
    if to not in FORMATS:
        raise ValueError(f"to must be one of {', '.join(map(repr, FORMATS))}, not {to!r}")
    if to == "tensorflow" and "://" in local_path(os.fspath(destination)):
        raise ValueError(
            "checkpoints of TensorFlow are verified in local files alone, and "
            f"{os.fspath(destination)!r} is none: write it there, and copy it"
        )
    if shard_bytes_max is not None and (to != "safetensors" or _format_named(destination) == to):
        raise ValueError(
            "shard_bytes_max= (--shard-bytes) is for a directory of safetensors: "
            "to='safetensors' (--to safetensors), and a destination that does not end in .safetensors"
        )


@dataclasses.dataclass(frozen=True, slots=True)
class _Written:
    """What was written.

    Attributes:
      leaves: As in `Conversion`.
      nbytes: As in `Conversion`.
      digests: Where the format has no checksums of its own, those of the leaves, by key.
      left_out: As in `Conversion`.
    """

    leaves: int
    nbytes: int
    digests: dict[str, Callable[[], str]]
    left_out: tuple[str, ...]


def _write(
    opened: Checkpoint | ForeignCheckpoint, destination: Path | Store, to: str, choices: _Choices
) -> _Written:
    """Writes an open checkpoint in another format."""
    digests: dict[str, Callable[[], str]] = {}
    left_out: list[str] = []
    if isinstance(opened, ForeignCheckpoint):
        left_out += opened.not_shown
        opened.bound_memory(_SOURCE_BYTES_MAX)
        names = select_names(opened, choices.select, choices.rename)
        leaves: list[Any] = [opened[name] for name in names.values()]
        tree = nest_selected(opened, names, _forms(list(names), leaves, to, choices.dtype))
    else:
        wanted = match_tree(
            opened,
            None,
            choices.select,
            choices.rename,
            missing="error",
            unexpected="error",
            cast=False,
            reshape=False,
        )
        leaves = [opened[opened.keys()[match.leaf]] for match in wanted.matches if match.leaf is not None]
        tree = wanted.unflatten(_forms(wanted.keys, leaves, to, choices.dtype))
    if to == OWN_FORMAT:
        assert isinstance(opened, ForeignCheckpoint)
        options = SaveOptions(host_bytes_max=_HOST_BYTES_MAX)
        context = _context_of(opened, choices.on_progress)
        SaveJob(destination, tree, choices.overwrite, context, options, is_blocking=True).run()
    else:
        tree, digests = _with_digests(tree)
        extras = _metadata_for(to, opened.metadata)
        left_out += _left_out(opened, leaves, loses_metadata=not extras)
        if choices.shard_bytes_max is not None:
            extras["shard_bytes_max"] = choices.shard_bytes_max
        _verbs_of(to).write(
            destination, tree, overwrite=choices.overwrite, on_progress=choices.on_progress, **extras
        )
    nbytes = sum(_nbytes_as(leaf, choices.dtype) for leaf in leaves)
    return _Written(len(leaves), nbytes, digests, tuple(left_out))


def _context_of(opened: ForeignCheckpoint, on_progress: OnProgress | None) -> SaveContext:
    """What is saved beside the tree: all that the source says, as far as it says it."""
    created_s = opened.created_s
    return SaveContext(
        metadata=opened.metadata or None,
        items=opened.items or None,
        metrics=opened.metrics,
        wall_s=time.time if created_s is None else lambda: created_s,
        on_progress=on_progress,
    )


def _convert_steps(
    source: Path, destination: Path, to: str, steps: Sequence[int], choices: _Choices, began_s: float
) -> Conversion:
    """Turns a directory of Orbax's steps into one of ours."""
    where = open_store(source).path
    if to != OWN_FORMAT:
        raise ValueError(
            f"{where!r} holds {format_count(len(steps), 'step', 'steps')}, which {to} has no directories of; "
            "name the directory of one step"
        )
    # As `CheckpointManager` names them.
    directory = StepDirectory(open_store(destination), "step_", 8)
    there = sorted(set(directory.committed()) & set(steps))
    if there and not choices.overwrite:
        raise ExistsError(
            f"{directory.path!r} has the steps {', '.join(map(str, there[:10]))} already\n"
            "pass overwrite=True (--overwrite) to replace them"
        )
    leaves = nbytes = 0
    problems: list[Problem] = []
    left_out = ["metadata of the directory"] if _verbs_of("orbax").root_metadata(source) else []
    for opened in _verbs_of("orbax").open_steps(source):
        store = directory.usual_store_of(opened.step)
        written = _write(opened, store, to, choices)
        leaves += written.leaves
        nbytes += written.nbytes
        left_out += written.left_out
        problems += [
            dataclasses.replace(problem, message=f"step {opened.step}: {problem.message}")
            for problem in _verify(store.path, to, written.digests, choices.on_progress)
        ]
    directory.write_cache()
    return Conversion(
        source=where,
        source_format="orbax",
        destination=directory.path,
        destination_format=to,
        leaves=leaves,
        nbytes=nbytes,
        problems=tuple(problems),
        seconds=time.perf_counter() - began_s,
        steps=tuple(steps),
        left_out=tuple(dict.fromkeys(left_out)),
    )


def _verbs_of(name: str) -> Any:
    """The module that knows a foreign format."""
    return importlib.import_module(f"jaxckpt.interop.{name}")


def _format_named(path: Path) -> str:
    """The format that the end of a name stands for."""
    name = os.fspath(path).partition("?")[0] if "://" in os.fspath(path) else os.fspath(path)
    return next((form for suffix, form in _FORMAT_OF_SUFFIX.items() if name.endswith(suffix)), OWN_FORMAT)


def _open(path: str) -> tuple[str, Checkpoint | ForeignCheckpoint]:
    """The checkpoint at a path, and the name of its format."""
    try:
        return OWN_FORMAT, open_checkpoint(path)
    except NotFoundError as error:
        not_found = error
    damage: CheckpointError | None = None
    reasons: list[str] = []
    # What is damaged is told of by the format that its name says.
    for name in sorted((*FOREIGN_FORMATS, "orbax"), key=lambda name: name != _format_named(path)):
        verbs = _verbs_of(name)
        try:
            checkpoint: ForeignCheckpoint = getattr(verbs, "open_whole", verbs.open)(path)
            return name, checkpoint
        except NotFoundError as error:
            reasons.append(str(error))
        except CheckpointError as error:  # unless another format takes it for its own
            damage = damage or error
    if damage is not None:
        raise damage
    raise NotFoundError(
        "\n".join(
            [
                f"no checkpoint of a known format ({', '.join(SOURCE_FORMATS)}) at {path!r}",
                *dict.fromkeys(reasons),
            ]
        )
    ) from not_found


def _step_in(path: str, step: int | None) -> str:
    """The path of a step in a directory of numbered checkpoints; without a step that of the newest one of ours.

    Any other path is returned as it is.

    Raises:
      NotFoundError: The step is not there, or several are meant.
    """
    store = open_store(path)
    matches = [_NUMBERED.fullmatch(name) for name in store.names()]
    number_of_name = {match[0]: int(match[2]) for match in matches if match}
    if step is None:
        if store.exists(MANIFEST_NAME):
            return path
        own = {
            name: number for name, number in number_of_name.items() if store.exists(f"{name}/{MANIFEST_NAME}")
        }
        step = max(own.values(), default=None)
        if step is None:
            return path
        number_of_name = own
    found = [name for name, number in number_of_name.items() if number == step]
    if len(found) == 1:
        place, mark, options = path.partition("?") if "://" in path else (path, "", "")
        return f"{place.rstrip('/')}/{found[0]}{mark}{options}"
    there = ", ".join(map(str, sorted(set(number_of_name.values()))[-10:])) or "none"
    raise NotFoundError(
        f"{path!r} has several checkpoints of step {step}; give the path of one: {', '.join(found)}"
        if found
        else f"{path!r} has no checkpoint of step {step}; its steps are {there}"
    )


def _metadata_for(to: str, metadata: Any) -> dict[str, Any]:
    """The argument that keeps a source's metadata, if the destination's format has something for it."""
    if to != "safetensors" or not isinstance(metadata, dict):
        return {}
    are_texts = all(isinstance(text, str) for pair in metadata.items() for text in pair)
    return {"metadata": metadata} if are_texts and metadata else {}


def _left_out(
    opened: Checkpoint | ForeignCheckpoint, leaves: Sequence[Any], *, loses_metadata: bool
) -> Iterator[str]:
    """What a source has and the file of another library has no place for."""
    keys = [leaf for leaf in leaves if leaf.kind == "key"]
    if keys:
        impls = {leaf.spec.impl if isinstance(leaf, StoredLeaf) else leaf.impl for leaf in keys}
        yield (
            f"the implementation of {format_count(len(keys), 'PRNG key', 'PRNG keys')} "
            f"({', '.join(sorted(map(str, impls)))}), which {'is' if len(keys) == 1 else 'are'} written as key data"
        )
    sharded = [leaf for leaf in leaves if leaf.sharding is not None and leaf.sharding["type"] != "single"]
    if sharded:
        yield f"how {format_count(len(sharded), 'array was', 'arrays were')} sharded"
    own = _own_leaves_of(opened) & {leaf.key for leaf in leaves} if isinstance(opened, Checkpoint) else ()
    if own:
        yield f"values of other processes than the first: {', '.join(map(printable_key, sorted(own)))}"
    if loses_metadata and opened.metadata:
        yield "metadata"
    names_of_part = {
        "items": opened.items,
        "metrics": opened.metrics,
        "programs": opened.programs if isinstance(opened, Checkpoint) else (),
    }
    for part, names in names_of_part.items():
        if names:
            yield f"{part}: {', '.join(map(printable_key, names))}"


def _own_leaves_of(opened: Checkpoint) -> set[str]:
    """The keys of leaves of which a process had another value than process 0."""
    manifest = opened.manifest
    return {
        manifest.keys[leaf]
        for process in range(len(manifest.parts))
        for leaf in opened.own_leaves_of(process)
    }


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
    """A `StreamedArray`, a NumPy array of strings, or a Python value."""
    if isinstance(leaf, ForeignArray) and leaf.value is not None:
        return leaf.value
    if leaf.dtype is None:
        return leaf[...] if to != OWN_FORMAT else _own_strings(leaf[...])
    if isinstance(leaf, StoredLeaf):
        if leaf.kind not in ("array", "numpy", "key"):
            return leaf[...]
        if leaf.spec.np_dtype.kind == "S":
            return leaf[...] if to == "npz" else leaf[...].astype(object)
        read, shape, old = _stream_of_boxes(leaf), leaf.spec.shape, leaf.spec.np_dtype
    else:
        read, shape, old = leaf.stream, leaf.shape, leaf.dtype
    new = old
    if dtype is not None and _is_cast(leaf, dtype):
        # Ranges are whole elements: pieces end at whole MiB or with the array, and floating types have 2^n bytes.
        read, new = _cast_stream(read, old, dtype), dtype
    if not isinstance(leaf, ForeignArray):
        return StreamedArray(shape, new, read)
    kind = leaf.kind if leaf.kind in ("numpy", "key") else ""
    return StreamedArray(shape, new, read, kind, leaf.impl, leaf.sharding)


def _stream_of_boxes(leaf: StoredLeaf) -> Callable[[int, int], Buffer]:
    """Ranges of the bytes of an array, read as boxes."""
    itemsize = leaf.spec.np_dtype.itemsize

    def read(lo: int, hi: int) -> Buffer:
        boxes = flat_boxes(lo // itemsize, hi // itemsize, leaf.spec.shape)
        parts = [leaf.read_box(box).reshape(-1).view(np.uint8) for box in boxes]
        return parts[0] if len(parts) == 1 else np.concatenate([np.empty(0, np.uint8), *parts])

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
    is_array = leaf.value is None if isinstance(leaf, ForeignArray) else leaf.kind in ("array", "numpy")
    return (
        dtype is not None
        and is_array
        and isinstance(leaf.dtype, np.dtype)
        and bool(jnp.issubdtype(leaf.dtype, jnp.floating))
    )


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


def _with_digests(tree: Any) -> tuple[Any, dict[str, Callable[[], str]]]:
    """The tree with arrays of which a checksum is made while they are read; and by key how to get that, afterwards."""
    flat = flatten(tree)
    digests: dict[str, Callable[[], str]] = {}
    leaves: list[Any] = []
    for key, leaf in zip(flat.keys, flat.leaves, strict=True):
        digest = xxhash.xxh3_128()
        if isinstance(leaf, StreamedArray):
            leaves.append(StreamedArray(leaf.shape, leaf.dtype, _digested(leaf.read, digest)))
        else:
            leaves.append(leaf)
            _digest_value(leaf, digest)
        digests[key] = digest.hexdigest
    return flat.unflatten(leaves), digests


def _digested(read: Callable[[int, int], Buffer], digest: xxhash.xxh3_128) -> Callable[[int, int], Buffer]:
    def read_and_note(lo: int, hi: int) -> Buffer:
        data = read(lo, hi)
        digest.update(data)
        return data

    return read_and_note


def _digest_value(value: Any, digest: xxhash.xxh3_128) -> None:
    """Takes up a value, or an array of strings: what is equal when it was written and read gives the same."""
    if isinstance(value, str):
        value = value.encode("utf-8", "surrogatepass")
    if isinstance(value, bytes):
        digest.update(value)
        return
    array = np.asarray(value)
    if isinstance(value, int) and array.dtype == object:
        return  # more than 64 bits: `write` says that the format has no such thing
    if array.dtype != object:
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
        return
    for string in array.reshape(-1).tolist():
        data = string.encode("utf-8", "surrogatepass") if isinstance(string, str) else string
        digest.update(len(data).to_bytes(8, "little") + data)


def _verify(
    path: Path, to: str, digests: Mapping[str, Callable[[], str]], on_progress: OnProgress | None
) -> tuple[Problem, ...]:
    if to == OWN_FORMAT:
        options = RestoreOptions(io_threads=_VERIFYING_THREADS)
        return verify(path, options=options, on_progress=on_progress).problems
    problems: list[Problem] = []
    try:
        # The prefix may be the name of a directory, too.
        with _verbs_of(to).open(f"{os.fspath(path)}.index" if to == "tensorflow" else path) as opened:
            written: ForeignCheckpoint = opened
            key_of_name = {written.name_of(key): key for key in digests}
            arrays = [written[name] for name in written.leaves()]
            meter = ProgressMeter(sum(array.nbytes for array in arrays), "read", on_progress)
            for array in arrays:
                try:
                    found = _digest_of(array, meter)
                except CorruptError as error:
                    problems.extend(error.problems or [Problem(array.key, "checksum", str(error))])
                    key_of_name.pop(array.key, None)
                    continue
                key = key_of_name.pop(array.key, None)
                if key is None or found != digests[key]():
                    problems.append(Problem(array.key, "checksum", "is not what was written"))
            problems.extend(Problem(name, "missing", "was written, and is not there") for name in key_of_name)
    except (CorruptError, FormatError, NotFoundError) as error:
        problems.extend(error.problems or [Problem(None, "object", str(error))])
    return tuple(problems)


def _digest_of(array: ForeignArray, meter: ProgressMeter) -> str:
    """The checksum of an array, which is read piece by piece, whereby it is verified as far as its format can."""
    digest = xxhash.xxh3_128()
    if array.dtype is None:
        _digest_value(array[...], digest)
    else:
        for lo in range(0, array.nbytes, PIECE_BYTES):
            data = array.stream(lo, min(lo + PIECE_BYTES, array.nbytes))
            digest.update(data)
            meter.add(len(data))
    return digest.hexdigest()
