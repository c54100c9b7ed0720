"""Which files does a path mean, as a checkpoint of TensorFlow's?

A checkpoint has no file of its name: V2 has ``PREFIX.index`` and its data files, V1 has ``PREFIX`` or, of several,
``PREFIX-00000-of-00002``. All of these stand for a checkpoint here, and so do

* a directory with a state file, ``checkpoint``, which names the latest checkpoint; or the state file itself,
* the directory of a SavedModel, whose variables are ``variables/variables``, or its ``saved_model.pb``,
* a directory with one checkpoint and no more,
* ``PREFIX-?????-of-00002``, as state files name V1 checkpoints of several files.

State files often have absolute paths of a machine that is gone. A path that leads nowhere is looked for beside the
state file. If the latest checkpoint is not there, the newest of the others that the file names is taken, which the log
says.

Only local files are read.
"""

from __future__ import annotations

import dataclasses
import glob
import logging
import os
import re

from jaxckpt._errors import CheckpointError, NotFoundError, printable
from jaxckpt._storage import local_path

from ._files import SourceFile, corrupt
from ._protobuf import WireError
from ._savedslices import first_record
from ._sstable import MAGIC, Table

_STATE_NAME = "checkpoint"
_MODEL_NAME = "saved_model.pb"
_STATE_BYTES_MAX = 16 << 20
# A line of the state file: a name, and a string with escapes as in C.
_STATE_LINE = re.compile(
    rb"^\s*(\w+)\s*:\s*\"((?:[^\"\\]|\\.)*)\"\s*$|^\s*(\w+)\s*:\s*'((?:[^'\\]|\\.)*)'\s*$"
)
_ESCAPE = re.compile(rb"\\([0-7]{1,3}|x[0-9a-fA-F]{1,2}|.)")
_ESCAPED = {b"n": b"\n", b"t": b"\t", b"r": b"\r", b"a": b"\a", b"b": b"\b", b"f": b"\f", b"v": b"\v"}

# A record whose key is empty.
_TABLE_START = b"\0\0"

_DATA_FILE = re.compile(r"(.*)\.data-[0-9]{5}-of-[0-9]{5}", re.DOTALL)
_NUMBERED_FILE = re.compile(r"(.*)-([0-9]{5}|\?{5})-of-([0-9]{5})", re.DOTALL)

_logger = logging.getLogger("jaxckpt")


@dataclasses.dataclass(frozen=True, slots=True)
class Location:
    """Where a checkpoint is.

    Attributes:
      prefix: What the names of its files begin with.
      files: The files of a V1 checkpoint; none of V2, which has an index.
    """

    prefix: str
    files: tuple[str, ...] = ()


def locate(path: str | os.PathLike[str]) -> Location:
    """The checkpoint that a path means.

    Raises:
      NotFoundError: It means none.
      CorruptError: A part of it is missing.
    """
    text = local_path(os.fspath(path))
    found = _locate_directory(text) if os.path.isdir(text) else _locate_file(text)
    if found is None:
        advice = "give its prefix, one of its files, or a directory with a state file named 'checkpoint'"
        if "://" in text:
            advice = "only local files are read: copy it first"
        raise NotFoundError(f"there is no TensorFlow checkpoint at {text!r}\n{advice}")
    return found


def _locate_file(path: str) -> Location | None:
    data_file = _DATA_FILE.fullmatch(path)
    of_data_file = data_file[1] if data_file else path
    for prefix in (path, of_data_file, path.removesuffix(".index"), path.removesuffix(".meta")):
        if os.path.isfile(f"{prefix}.index"):
            return Location(prefix)
    if os.path.isfile(path) and os.path.basename(path) == _STATE_NAME and not _is_table(path):
        return _locate_latest(path)
    if os.path.isfile(path) and os.path.basename(path) == _MODEL_NAME:
        return _locate_directory(os.path.dirname(path))
    if data_file is not None:
        return _without_index(data_file[1])
    if path.endswith(".meta") and not _is_table(path):
        return _locate_file(path.removesuffix(".meta"))
    numbered = _NUMBERED_FILE.fullmatch(path)
    if numbered is not None:
        return _locate_numbered(numbered[1], int(numbered[3]))
    if os.path.isfile(path):
        return Location(path, (path,)) if _may_be_table(path) else None
    counts = {
        int(match[3])
        for name in glob.glob(f"{glob.escape(path)}-?????-of-?????")
        if (match := _NUMBERED_FILE.fullmatch(name)) and match[1] == path and match[2] != "?????"
    }
    if len(counts) == 1:
        return _locate_numbered(path, counts.pop())
    return _without_index(path)


def _without_index(prefix: str) -> None:
    """Raises CorruptError where there are the data files of a V2 checkpoint."""
    if glob.glob(f"{glob.escape(prefix)}.data-?????-of-?????"):
        raise corrupt(f"{prefix}.index", "object", "is missing, without which no data file can be read")


def _locate_numbered(prefix: str, count: int) -> Location | None:
    """A V1 checkpoint of several files, all of which must be there."""
    present = glob.glob(f"{glob.escape(prefix)}-?????-of-{count:05d}")
    if not present:
        return None
    names = tuple(f"{prefix}-{number:05d}-of-{count:05d}" for number in range(count))
    for name in names:
        if name not in present:
            raise corrupt(name, "object", "is missing")
    return Location(f"{prefix}-?????-of-{count:05d}", names)


def _locate_directory(path: str) -> Location | None:
    variables = os.path.join(path, "variables", "variables")
    if os.path.isfile(f"{variables}.index"):
        return Location(variables)
    state = os.path.join(path, _STATE_NAME)
    if os.path.isfile(state):
        return _locate_latest(state)
    indices = sorted(glob.glob(os.path.join(glob.escape(path), "*.index")))
    found = indices or _old_checkpoints(path)
    if len(found) > 1:
        names = ", ".join(printable(os.path.basename(name)) for name in found[:10])
        raise NotFoundError(
            f"{path!r} has several checkpoints and no state file\ngive the path of one: {names}"
        )
    return _locate_file(found[0]) if found else None


def _old_checkpoints(directory: str) -> list[str]:
    """The V1 checkpoints in a directory; a file of one is told by what is in it."""
    paths = sorted(glob.glob(os.path.join(glob.escape(directory), "*")))
    tables = [path for path in paths if os.path.isfile(path) and _is_table(path)]
    numbered = [_NUMBERED_FILE.fullmatch(path) for path in tables]
    return list(
        dict.fromkeys(match[1] if match else path for path, match in zip(tables, numbered, strict=True))
    )


def _locate_latest(state: str) -> Location:
    directory = os.path.dirname(state)
    named = _read_state(state)
    for number, name in enumerate(named):
        # A relative path is meant from the directory of the file, and so is the name alone of one that is gone.
        for path in (os.path.join(directory, name), os.path.join(directory, os.path.basename(name))):
            found = None if os.path.isdir(path) else _locate_file(path)
            if found is not None:
                if number:
                    _logger.warning(
                        "%s names %s as the latest checkpoint, which is not there; %s is read instead",
                        printable(state),
                        printable(named[0]),
                        printable(path),
                    )
                return found
    raise NotFoundError(
        f"none of the checkpoints that {state!r} names is there: {', '.join(map(printable, named[:10]))}"
    )


def _read_state(state: str) -> list[str]:
    """The checkpoints that a state file names: the latest, then the others from the newest to the oldest."""
    try:
        with open(state, "rb") as file:
            data = file.read(_STATE_BYTES_MAX)
    except OSError as error:
        raise CheckpointError(f"cannot read {state!r}: {error.strerror or error}") from error
    latest: list[str] = []
    others: list[str] = []
    for line in data.splitlines():
        match = _STATE_LINE.match(line)
        if match is None:
            continue
        name, text = (match[1], match[2]) if match[1] else (match[3], match[4])
        path = os.fsdecode(_ESCAPE.sub(_unescape, text))
        if name == b"model_checkpoint_path":
            latest.append(path)
        elif name == b"all_model_checkpoint_paths":
            others.insert(0, path)
    if not latest or "\0" in "".join(latest + others):
        raise corrupt(state, "manifest", "names no latest checkpoint")
    return list(dict.fromkeys([*latest[-1:], *others]))


def _unescape(match: re.Match[bytes]) -> bytes:
    escape = match[1]
    if escape[:1] in b"01234567":
        return bytes([int(escape, 8) & 0xFF])
    if escape[:1] == b"x" and len(escape) > 1:
        return bytes([int(escape[1:], 16)])
    return _ESCAPED.get(escape, escape)


def _may_be_table(path: str) -> bool:
    """Whether a file begins or ends as V1 checkpoints do, of which one may be cut off or damaged in a place."""
    try:
        with open(path, "rb") as file:
            first = file.read(len(_TABLE_START))
            file.seek(-min(8, os.fstat(file.fileno()).st_size), os.SEEK_END)
            return _TABLE_START.startswith(first) or file.read() == MAGIC.to_bytes(8, "little")
    except OSError as error:
        raise CheckpointError(f"cannot read {path!r}: {error.strerror or error}") from error


def _is_table(path: str) -> bool:
    """Whether a file is a V1 checkpoint, whatever its name."""
    try:
        table = Table(SourceFile(path, lambda _: None))
        try:
            return first_record(table) is not None
        finally:
            table.close()
    except (CheckpointError, WireError):
        return False
