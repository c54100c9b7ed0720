"""How is a pytree written as files of safetensors?

1. Each leaf gets a name and a type of the format; whatever cannot be written is refused here, all of it at once.
2. The tensors are spread over files, in the order in which the package writes them.
3. Each file is written under another name, synced and renamed. Of a single file that is the commit.
4. Of several, the index replaces the old one: that is the commit. Their names are new where old ones are taken, so that
   an overwrite leaves what the old index names as it was.
5. What the new files take the place of is deleted. A reader takes ``model.safetensors`` before an index, so that it
   finds the old tensors or the new ones, whichever of the two there were.

Several files of which the writer is killed before the index stay, and no reader takes them for a checkpoint. No later
write deletes them: they may be those of another writer.

Deliberately not here: groups of processes; one process writes all, and refuses arrays of which it has only a part.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxckpt._errors import (
    CheckpointError,
    ExistsError,
    Problem,
    UnsupportedLeafError,
    WriteError,
    list_problems,
    printable_key,
)
from jaxckpt._keys import flatten
from jaxckpt._nesting import name_of_key
from jaxckpt._progress import Progress, ProgressMeter
from jaxckpt._storage import Store
from jaxckpt._store import open_store

from ._arrays import ArrayContents, RefusedError, StringContents, WriteBuffer, contents_of
from ._files import absolute_path, split_path
from ._headers import (
    INDEX_BYTES_MAX,
    INDEX_NAME,
    METADATA_KEY,
    PLACE_OF_DTYPE,
    SINGLE_NAME,
    encode_header,
    encode_index,
)

PlannedTensor = tuple[str, ArrayContents]


def write(
    path: str | os.PathLike[str],
    tree: Any,
    *,
    metadata: Mapping[str, str] | None = None,
    shard_bytes_max: int | None = None,
    separator: str = ".",
    overwrite: bool = False,
    on_progress: Callable[[Progress], None] | None = None,
) -> None:
    """Writes a pytree as safetensors: one file, or several with an index.

    A tensor's name is the path of its leaf, with dots between the parts and nothing escaped:
    ``{"dense": {"kernel": x}}`` and ``{"dense.kernel": x}`` are both written as ``dense.kernel``. Lists number their
    parts from 0. The tensors lie in a file in the order in which the package writes them, from a multiple of 64 on, so
    that `read` can map them.

    Arrays keep their dtype, big-endian ones are written as little-endian. Python's int becomes int64, float float64.
    Typed PRNG keys are written as their key data. Leaves of open checkpoints are read while they are written. None is
    no leaf.

    Everything is there whole and durable when the function returns. An overwrite keeps the old files until the new ones
    are whole, and then needs room for both.

    Args:
      path: A path or URL that ends in ``.safetensors``: that file. Any other: a directory, in which the file is
        ``model.safetensors``, and of several ``model.safetensors.index.json`` says what is where.
      tree: Pytree with at least one level: a single leaf has no name.
      metadata: Texts by name, for the header of each file.
      shard_bytes_max: Most bytes of the tensors in one file, if it has more than one tensor; None writes one file.
      separator: What stands between the parts of a name.
      overwrite: Whether files that are there already may be replaced.
      on_progress: Called with a `Progress` after each piece of a few megabytes.

    Raises:
      UnsupportedLeafError: Leaves that the format has no type for, or that would have one name; all are listed.
      ExistsError: Such files are there, and ``overwrite`` is False.
      CorruptError: A leaf of an open checkpoint is damaged.
      WriteError: Storage refused a write.
      ValueError: ``shard_bytes_max`` is not above 0, or is given where ``path`` is that of a file.

    Host memory: Some 16 MiB. On an object store, a file; ``shard_bytes_max`` bounds that.

    Example:
      >>> from jaxckpt.interop import safetensors
      >>> tree = {"dense": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}}
      >>> safetensors.write(tmp / "model", tree, shard_bytes_max=24)
      >>> sorted(each.name for each in (tmp / "model").iterdir())[:2]
      ['model-00001-of-00002.safetensors', 'model-00002-of-00002.safetensors']
    """
    text = absolute_path(path)
    is_file = split_path(text)[1].endswith(".safetensors")
    if shard_bytes_max is not None and shard_bytes_max <= 0:
        raise ValueError(f"shard_bytes_max= is a number of bytes above 0, not {shard_bytes_max}")
    if is_file and shard_bytes_max is not None:
        raise ValueError(f"shard_bytes_max= writes several files: path must be a directory, not {text!r}")
    directory, single_name = split_path(text) if is_file else (text, SINGLE_NAME)
    texts = _check_metadata(metadata or {})
    tensors = plan_tensors(tree, text, separator)
    meter = ProgressMeter(sum(contents.nbytes for _, contents in tensors), "write", on_progress)
    store = open_store(directory)
    try:
        write_files(
            store,
            single_name,
            split_tensors(tensors, shard_bytes_max),
            texts,
            meter,
            overwrite=overwrite,
            has_index=not is_file,
        )
    except OSError as error:
        if isinstance(error, CheckpointError):
            raise
        reason = error.strerror or error
        raise WriteError(
            f"cannot write {text!r}: storage refused a write: {reason} ({error.filename or directory})\n"
            "files that were there before are as they were, unless the new ones were whole already",
            error.errno,
        ) from error
    meter.enter("done")


def _check_metadata(metadata: Mapping[Any, Any]) -> dict[str, str]:
    for key, value in metadata.items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise TypeError(f"metadata= has texts by name, not {value!r} by {key!r}")
    return dict(metadata)


def plan_tensors(tree: Any, path: str, separator: str = ".") -> list[PlannedTensor]:
    """The tensors in the order of their file.

    Raises:
      UnsupportedLeafError: Some leaves cannot be written.
    """
    flat = flatten(tree)
    tensors: list[PlannedTensor] = []
    problems: list[Problem] = []
    key_of_name: dict[str, str] = {}
    for key, leaf in zip(flat.keys, flat.leaves, strict=True):
        try:
            name = _name_of(key, separator)
            tensors.append((name, _contents_of(leaf)))
        except RefusedError as refusal:
            problems.append(Problem(key, "leaf", str(refusal)))
            continue
        first = key_of_name.setdefault(name, key)
        if first != key:
            problems.append(
                Problem(key, "leaf", f"has the name {name!r}, and so has the leaf {printable_key(first)}")
            )
    if problems:
        headline = f"cannot write {path!r}: safetensors can't have {len(problems)} of {len(flat.keys)} leaves"
        raise UnsupportedLeafError(list_problems(headline, problems, ["nothing was written"]), problems)
    return sorted(tensors, key=lambda tensor: (-PLACE_OF_DTYPE[tensor[1].dtype], tensor[0]))


def _name_of(key: str, separator: str) -> str:
    name = name_of_key(key, separator)
    if not key:
        raise RefusedError("has no name: put the leaf into a dict")
    if name == METADATA_KEY:
        raise RefusedError(f"has the name {name!r}, which means something else")
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise RefusedError(f"has a name that is no text: {error}") from error
    return name


def _contents_of(leaf: Any) -> ArrayContents:
    contents = contents_of(leaf)
    if isinstance(contents, StringContents):
        raise RefusedError("is a string, which safetensors lacks; select= the others")
    if contents.dtype not in PLACE_OF_DTYPE:
        raise RefusedError(
            f"has the dtype {contents.dtype}, which safetensors lacks; convert it to another one"
        )
    return contents


def split_tensors(tensors: Sequence[PlannedTensor], bytes_max: int | None) -> list[list[PlannedTensor]]:
    """The tensors of each file."""
    files: list[list[PlannedTensor]] = [[]]
    filled = 0
    for name, contents in tensors:
        if bytes_max is not None and files[-1] and filled + contents.nbytes > bytes_max:
            files.append([])
            filled = 0
        files[-1].append((name, contents))
        filled += contents.nbytes
    return files


def write_files(
    store: Store,
    single_name: str,
    files: Sequence[Sequence[PlannedTensor]],
    metadata: Mapping[str, str],
    meter: ProgressMeter,
    *,
    overwrite: bool,
    has_index: bool,
) -> None:
    """Steps 3 to 5.

    Raises:
      ExistsError: As `write`.
      OSError: Storage refused a write.
    """
    there = set(store.names())
    old_names = _names_of_old(store, there) if has_index else []
    taken = [name for name in (single_name, *([INDEX_NAME] if has_index else [])) if name in there]
    if taken and not overwrite:
        raise ExistsError(
            f"'{store.path}/{taken[0]}' is there already\npass overwrite=True to replace it, or choose another path"
        )
    if len(files) == 1:
        _write_file(store, single_name, files[0], metadata, meter)
        meter.enter("commit")
        stale = [INDEX_NAME, *old_names] if has_index else []
        stale = [name for name in stale if name != single_name]  # which an index of one file names
    else:
        names = [f"model-{number:05d}-of-{len(files):05d}.safetensors" for number in range(1, len(files) + 1)]
        if there & set(names):
            token = secrets.token_hex(4)  # what is there stays as it is until the index names the others
            names = [f"model-{token}-{name.removeprefix('model-')}" for name in names]
        try:
            for name, tensors in zip(names, files, strict=True):
                _write_file(store, name, tensors, metadata, meter)
        except BaseException:
            for name in names:
                with contextlib.suppress(OSError):  # the failure that matters is the one that led here
                    store.delete(name)
            raise
        meter.enter("commit")
        # Where this fails, either index has all of its files.
        store.publish(INDEX_NAME, _index_of(names, files))
        stale = [single_name, *old_names]
    for name in dict.fromkeys(stale):
        if name in there:
            store.delete(name)


def _names_of_old(store: Store, there: set[str]) -> list[str]:
    """The files of tensors that an index names, as far as it can be read."""
    if INDEX_NAME not in there:
        return []
    try:
        weight_map = json.loads(store.read(INDEX_NAME, INDEX_BYTES_MAX)).get("weight_map", {})
        # Whatever else it names is not ours to delete.
        return [name for name in {*weight_map.values()} & there if name.endswith(".safetensors")]
    except (ValueError, AttributeError, TypeError, RecursionError):
        return []  # it is no index; then nothing is known to belong to it


def _write_file(
    store: Store,
    name: str,
    tensors: Sequence[PlannedTensor],
    metadata: Mapping[str, str],
    meter: ProgressMeter,
) -> None:
    """Writes a file, which then takes the place of another of the name."""
    header = encode_header([(each, contents.dtype, contents.shape) for each, contents in tensors], metadata)
    writer = store.create_replacement(name, len(header) + sum(contents.nbytes for _, contents in tensors))
    try:
        buffer = WriteBuffer(writer)
        buffer.append(np.frombuffer(header, np.uint8))
        for _, contents in tensors:
            for piece in contents.pieces():
                buffer.append(piece)
                meter.add(len(piece))
        buffer.flush()
        writer.finish()
    except BaseException:
        writer.abandon()
        raise


def _index_of(names: Sequence[str], files: Sequence[Sequence[PlannedTensor]]) -> bytes:
    file_of_tensor = {
        tensor: name for name, tensors in zip(names, files, strict=True) for tensor, _ in tensors
    }
    return encode_index(file_of_tensor, sum(contents.nbytes for tensors in files for _, contents in tensors))
