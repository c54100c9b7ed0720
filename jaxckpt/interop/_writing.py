"""How is a pytree written as a checkpoint of TensorFlow's format V2, which TensorFlow reads?

    PREFIX.data-00000-of-00001   the bytes of the tensors, one behind the other, in the order of their names
    PREFIX.index                 a table (`_sstable`): a header, and for each tensor its type, shape, place and checksum

The files are byte for byte what TensorFlow itself writes for the same tensors. The steps:

1. Each leaf gets a name and becomes a `Tensor`, which knows its bytes piece by piece. Whatever cannot be written is
   refused here, all of it at once.
2. The data file is written through one buffer, each piece with its checksum, and synced.
3. The index replaces the old one by a rename. This is the commit: without an index there is no checkpoint.
4. The state file ``checkpoint`` is replaced, and the old data files are deleted.

The name of a data file is fixed by its number and their count, which are in the index. So an overwrite does not touch
the data that the old index names: it writes the file number 0 of as many as no file there claims to be of, which is 2
where the old one is of 1. TensorFlow opens a data file when a tensor of it is asked for, and does not miss the file
number 1. A crash before step 3 leaves the old checkpoint as it was, one after it the new one, and both perhaps data
files that no index names: they are in nobody's way, and the next overwrite deletes them. Who has the old checkpoint
open meanwhile, and has not opened its data file yet, finds it gone after step 4.

Deliberately not here: partitioned tensors, the graph of objects that `tf.train.Checkpoint` restores by, and groups of
processes: one process writes all, and refuses arrays of which it has only a part.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from jaxckpt._config import PIECE_BYTES
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
from jaxckpt._storage import Buffer, Store, local_path
from jaxckpt._store import open_store

from ._arrays import RefusedError, StringContents, WriteBuffer, contents_of
from ._crc import crc32c, extend, mask
from ._datatypes import NUMBER_OF_DTYPE, STRING
from ._files import split_path
from ._protobuf import encode_bytes, encode_fixed32, encode_number, encode_varint
from ._sstable import encode_table

Array = np.ndarray[Any, Any]

_STATE_NAME = "checkpoint"
_VERSION = 1

# Bytes of a leaf that are read and checked at once. With a cast, a few times as many are in memory.
_RUN_BYTES = PIECE_BYTES // 4


@dataclasses.dataclass(frozen=True, slots=True)
class Tensor:
    """A leaf on its way into the files.

    Attributes:
      name: Its name there.
      type_number: TensorFlow's number of its data type.
      shape: Shape.
      nbytes: Bytes in the data file.
      pieces: Its bytes in their order, each piece with the bytes that its checksum is made of.
    """

    name: bytes
    type_number: int
    shape: tuple[int, ...]
    nbytes: int
    pieces: Callable[[], Iterator[tuple[Buffer, Buffer]]]


def write(
    prefix: str | os.PathLike[str],
    tree: Any,
    *,
    overwrite: bool = False,
    write_state: bool = True,
    on_progress: Callable[[Progress], None] | None = None,
) -> None:
    """Writes a pytree as a TensorFlow checkpoint, format V2.

    `tf.train.load_checkpoint`, `tf.train.list_variables`, `tf.compat.v1.train.Saver.restore` and whatever else reads
    tensors by name can read it; so can `open` and `read` here. A tensor's name is the path of its leaf, with ``/``
    between the parts and nothing escaped: ``{"dense": {"kernel": x}}`` and ``{"dense/kernel": x}`` are both written as
    ``dense/kernel``. Lists number their parts from 0.

    What becomes of a leaf: arrays keep their dtype, big-endian ones are written as little-endian. Python's int
    becomes int64, float float64, complex complex128; bytes and str (in UTF-8) become strings, and so do NumPy arrays of
    them. Typed PRNG keys are written as their key data. Leaves of open checkpoints (`jaxckpt.open(path).tree()`, or
    arrays of `open` here) are read while they are written. None is no leaf.

    The checkpoint is there whole and durable when the function returns, and not at all when it fails. An overwrite
    keeps the old one until the new one is whole, and then needs room for both.

    Args:
      prefix: Path or URL of the checkpoint without ``.index``; missing directories are made.
      tree: Pytree with at least one level: a single leaf has no name.
      overwrite: Whether a checkpoint with this prefix may be replaced.
      write_state: Whether to write the file ``checkpoint`` beside it, so that `tf.train.latest_checkpoint` finds this
        one. It replaces such a file, and lists this checkpoint only.
      on_progress: Called with a `Progress` after each piece of a few megabytes.

    Raises:
      UnsupportedLeafError: Leaves that TensorFlow has no data type for, or that would have one name; all are listed.
      ExistsError: A checkpoint with this prefix is there, and ``overwrite`` is False.
      CorruptError: A leaf of an open checkpoint is damaged.
      WriteError: Storage refused a write.

    Host memory: Some 16 MiB, besides strings. On an object store, the data file.

    Example:
      >>> from jaxckpt.interop import tensorflow
      >>> tensorflow.write(tmp / "model.ckpt", {"dense": {"kernel": jnp.ones((2, 3))}, "step": 7})
      >>> print(tensorflow.open(tmp / "model.ckpt").describe())
      dense/kernel (DT_FLOAT) [2,3]
      step (DT_INT64) []

    Source: https://github.com/tensorflow/tensorflow/blob/master/tensorflow/core/protobuf/tensor_bundle.proto
    """
    text = local_path(os.fspath(prefix))
    directory, base = split_path(text)
    if not base:
        raise ValueError(f"prefix must end in a name, as 'run/model.ckpt' does, not {text!r}")
    tensors = plan_tensors(tree, text)
    store = open_store(directory or os.curdir)
    meter = ProgressMeter(sum(tensor.nbytes for tensor in tensors), "write", on_progress)
    try:
        write_files(store, base, tensors, meter, overwrite=overwrite, write_state=write_state)
    except OSError as error:
        if isinstance(error, CheckpointError):
            raise
        reason = error.strerror or error
        raise WriteError(
            f"cannot write {text!r}: storage refused a write: {reason} ({error.filename or directory})\n"
            "a checkpoint that was there before is as it was, unless the new one was whole already",
            error.errno,
        ) from error
    meter.enter("done")


# --- files ----------------------------------------------------------------------------------------------------


def write_files(
    store: Store,
    base: str,
    tensors: Sequence[Tensor],
    meter: ProgressMeter,
    *,
    overwrite: bool,
    write_state: bool,
) -> None:
    """Steps 2 to 4.

    Raises:
      ExistsError: As `write`.
      OSError: Storage refused a write.
    """
    index_name = f"{base}.index"
    is_data_name = re.compile(re.escape(base) + r"\.data-\d+-of-\d+").fullmatch
    old_names = [name for name in store.names() if is_data_name(name)]
    if store.exists(index_name) and not overwrite:
        raise ExistsError(
            f"a TensorFlow checkpoint is already at '{store.path}/{base}'\n"
            "pass overwrite=True to replace it, or choose another prefix"
        )
    taken_counts = {int(name.rpartition("-")[2]) for name in old_names}
    shard_count = next(count for count in itertools.count(1) if count not in taken_counts)
    entries = _write_data(store, f"{base}.data-00000-of-{shard_count:05d}", tensors, meter)
    store.sync()
    meter.enter("commit")
    header = encode_number(1, shard_count) + encode_bytes(3, encode_number(1, _VERSION))
    store.publish(index_name, encode_table([(b"", header), *entries]))
    if write_state:
        store.publish(_STATE_NAME, _encode_state(base))
    if overwrite:
        for name in old_names:
            store.delete(name)


def _write_data(
    store: Store, name: str, tensors: Sequence[Tensor], meter: ProgressMeter
) -> list[tuple[bytes, bytes]]:
    """Writes the data file, or leaves none; names and entries for the index."""
    writer = store.create(name, sum(tensor.nbytes for tensor in tensors))
    entries: list[tuple[bytes, bytes]] = []
    offset = 0
    try:
        buffer = WriteBuffer(writer)
        for tensor in tensors:
            checksum = 0
            for stored, checked in tensor.pieces():
                checksum = extend(checksum, checked)
                buffer.append(stored)
                meter.add(len(stored))
            entries.append((tensor.name, _encode_entry(tensor, offset, checksum)))
            offset += tensor.nbytes
            assert buffer.offset == offset
        buffer.flush()
        writer.finish()
    except BaseException:
        writer.abandon()
        with contextlib.suppress(OSError):  # the failure that matters is the one that led here
            store.delete(name)
        raise
    return entries


def _encode_entry(tensor: Tensor, offset: int, checksum: int) -> bytes:
    """A ``BundleEntryProto``."""
    axes = [encode_bytes(2, encode_number(1, size)) for size in tensor.shape]
    return (
        encode_number(1, tensor.type_number)
        + encode_bytes(2, b"".join(axes))
        + encode_number(4, offset)
        + encode_number(5, tensor.nbytes)
        + encode_fixed32(6, mask(checksum))
    )


def _encode_state(base: str) -> bytes:
    """A ``CheckpointState`` as text; the path is relative, so that the directory can be moved."""
    escaped = "".join(
        chr(byte) if 0x20 <= byte < 0x7F and byte not in b'"\\' else f"\\{byte:03o}"
        for byte in os.fsencode(base)
    )
    return f'model_checkpoint_path: "{escaped}"\nall_model_checkpoint_paths: "{escaped}"\n'.encode()


# --- tensors --------------------------------------------------------------------------------------------------


def plan_tensors(tree: Any, prefix: str) -> list[Tensor]:
    """The tensors in the order of their names.

    Raises:
      UnsupportedLeafError: Some leaves can't be written.
    """
    flat = flatten(tree)
    keys_of_name: dict[bytes, list[str]] = {}
    tensors: list[Tensor] = []
    problems: list[Problem] = []
    for key, leaf in zip(flat.keys, flat.leaves, strict=True):
        try:
            tensor = _plan_tensor(_encode_name(key), leaf)
        except RefusedError as refusal:
            problems.append(Problem(key, "leaf", str(refusal)))
            continue
        tensors.append(tensor)
        keys_of_name.setdefault(tensor.name, []).append(key)
    for name, keys in keys_of_name.items():
        for key in keys[1:]:
            text = (
                f"has the name {name.decode()!r} in TensorFlow, and so has the leaf {printable_key(keys[0])}"
            )
            problems.append(Problem(key, "leaf", text))
    if problems:
        headline = (
            f"cannot write {prefix!r}: TensorFlow can't have {len(problems)} of {len(flat.keys)} leaves"
        )
        raise UnsupportedLeafError(list_problems(headline, problems, ["nothing was written"]), problems)
    return sorted(tensors, key=lambda tensor: tensor.name)


def _encode_name(key: str) -> bytes:
    name = name_of_key(key)
    if not name:
        raise RefusedError("has no name: TensorFlow reads tensors by name; put the leaf into a dict")
    try:
        return name.encode("utf-8", "surrogateescape")  # as names of files that are no text are read
    except UnicodeEncodeError as error:
        raise RefusedError(f"has a name that is no text: {error}") from error


def _plan_tensor(name: bytes, leaf: Any) -> Tensor:
    found = contents_of(leaf)
    if isinstance(found, StringContents):
        return _plan_strings(name, found.shape, found.strings)
    if found.dtype not in NUMBER_OF_DTYPE:
        raise RefusedError(f"has the dtype {found.dtype}, which TensorFlow lacks; convert it to another one")

    def pieces() -> Iterator[tuple[Buffer, Buffer]]:
        for data in found.pieces():
            yield data, data

    return Tensor(name, NUMBER_OF_DTYPE[found.dtype], found.shape, found.nbytes, pieces)


def _plan_strings(name: bytes, shape: tuple[int, ...], strings: Sequence[Any]) -> Tensor:
    texts = [_encode_string(string) for string in strings]
    lengths = b"".join(encode_varint(len(text)) for text in texts)
    # The checksum is made of the lengths as they are in memory, not as they are stored.
    checked = b"".join(len(text).to_bytes(4 if len(text) < 1 << 32 else 8, "little") for text in texts)
    lengths_checksum = mask(crc32c(checked)).to_bytes(4, "little")
    content = b"".join(texts)
    pieces = [(lengths, checked), (lengths_checksum, lengths_checksum), (content, content)]
    arrays = [(np.frombuffer(stored, np.uint8), np.frombuffer(summed, np.uint8)) for stored, summed in pieces]
    return Tensor(name, STRING, shape, sum(len(stored) for stored, _ in pieces), lambda: iter(arrays))


def _encode_string(string: Any) -> bytes:
    if isinstance(string, bytes):
        return string
    if not isinstance(string, str):
        raise RefusedError(
            f"holds a {type(string).__qualname__}; of objects, TensorFlow has strings of bytes or text only"
        )
    try:
        return string.encode()
    except UnicodeEncodeError as error:
        raise RefusedError(f"holds text that is none: {error}") from error
