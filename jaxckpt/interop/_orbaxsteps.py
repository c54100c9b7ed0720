"""Which steps are in a directory of Orbax's, and which items in a step?

    <directory>/<step>/                      ``12``, ``000012`` or ``name_12``
    <directory>/<step>/_CHECKPOINT_METADATA  times, and what the caller said of the step; from 0.5 on
    <directory>/<step>/<item>/               a tree, a random key, or files of another kind, mostly JSON
    <directory>/<step>/metrics/metrics       JSON
    <directory>/metadata/_ROOT_METADATA      what the caller said of all steps; once ``metadata/metadata``

A directory may be a tree itself, a step, or hold steps; `kind_of` tells which. Orbax writes to a name with
``.orbax-checkpoint-tmp`` in it and renames the directory in the end. Object stores cannot rename: there
``commit_success.txt`` is written last, and a step without it is not committed.

Source: https://github.com/google/orbax/blob/main/checkpoint/orbax/checkpoint/_src/path/step.py
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any, Literal

from jaxckpt._errors import CheckpointError, NotFoundError
from jaxckpt._storage import Store

from ._orbaxitems import is_tree, names_in, random_key_name, read_file, read_json
from ._zarrforms import parse_json

STEP_METADATA_NAME = "_CHECKPOINT_METADATA"
_METRICS_NAME = "metrics"
_ROOT_METADATA_NAMES = ("_ROOT_METADATA", "metadata")
_COMMIT_NAME = "commit_success.txt"
_DELETION_NAME = "_CHECKPOINT_DELETION"
_V1_NAME = "orbax.checkpoint"
# What names of things have that are still being written; `v1.partial` has a name of its own.
_TEMPORARY = re.compile(r".*\.(?:orbax-checkpoint-tmp.*|partial_save)")

# Classes that write trees and random keys.
_TREE_HANDLER = re.compile(
    r"orbax\..*\.(?:PyTree|Standard|Array|JaxRandomKey|NumpyRandomKey)(?:Checkpoint)?Handler"
)

_STEP = re.compile(r"(?:.*_)?([0-9]{1,18})")
_FILES_BYTES_MAX = 1 << 26
_DEPTH_MAX = 16

Kind = Literal["tree", "step", "steps"]


def kind_of(store: Store) -> Kind | None:
    """What a directory is; None where it is nothing of Orbax's, or not committed."""
    names = names_in(store)
    if is_tree(store, names) or _is_random_key(store, names):
        return "tree"
    if STEP_METADATA_NAME in names or _V1_NAME in names:
        return "step"
    if steps_in(store):
        return "steps"
    if random_key_name(names) is not None:
        return "tree"
    return "step" if any(_is_item(store.child(name)) for name in _items(names)) else None


def _is_random_key(store: Store, names: Collection[str]) -> bool:
    """Whether a directory says that it is that of one random key; the files of one may also be two items of a step."""
    if STEP_METADATA_NAME not in names or random_key_name(names) is None:
        return False
    return str(metadata_of(store).get("item_handlers")).endswith("RandomKeyCheckpointHandler")


def is_committed(store: Store) -> bool:
    """Whether what is in a directory is whole, as far as the names say: its own, and that of the step of an item."""
    if any(_TEMPORARY.fullmatch(name) for name in store.path.split("/")[-2:]):
        return False
    return "://" not in store.path or store.exists(_COMMIT_NAME)


def steps_in(store: Store) -> dict[int, str]:
    """The committed steps of a directory, ascending, each with its name.

    Raises:
      CheckpointError: Two directories have the same step.
    """
    found: dict[int, str] = {}
    for name in names_in(store):
        match = _STEP.fullmatch(name)
        if match is None:
            continue
        child = store.child(name)
        if not is_committed(child) or not _is_step(child):
            continue
        step = int(match[1])
        if step in found:
            raise CheckpointError(
                f"{store.path!r} has step {step} twice, as {found[step]!r} and {name!r}; "
                "name one of the two directories"
            )
        found[step] = name
    return {step: found[step] for step in sorted(found)}


def _is_step(store: Store) -> bool:
    """Whether a directory with the name of a step is one: it has items, or is a tree."""
    names = names_in(store)
    is_marked = STEP_METADATA_NAME in names or _V1_NAME in names or is_tree(store, names)
    return is_marked or any(_is_item(store.child(name)) for name in _items(names))


def _is_item(store: Store) -> bool:
    names = names_in(store)
    return is_tree(store, names) or random_key_name(names) is not None or "metadata" in names


def _items(names: Collection[str]) -> list[str]:
    """Names that may be those of items."""
    ours = {STEP_METADATA_NAME, _COMMIT_NAME, _DELETION_NAME, _V1_NAME}
    return [name for name in names if name not in ours and not _TEMPORARY.fullmatch(name)]


def trees_in(store: Store) -> list[str]:
    """The items of a step that are trees or random keys, by name; those that it says it has, and lacks, too."""
    record = read_json(store, _DELETION_NAME)
    deleted = record.get("checkpointable_name") if isinstance(record, dict) else None
    said = _said_trees(store)
    found: list[str] = []
    for name in sorted({*_items(names_in(store)), *said}):
        child = store.child(name)
        names = names_in(child)
        is_there = is_tree(child, names) or random_key_name(names) is not None
        if name != deleted and (is_there or name in said):
            found.append(name)
    return found


def _said_trees(store: Store) -> set[str]:
    """The items that a step says to be trees; Orbax does so from 0.11 on."""
    handlers = metadata_of(store).get("item_handlers")
    pairs = handlers.items() if isinstance(handlers, dict) else ()
    return {
        name
        for name, handler in pairs
        if isinstance(handler, str)
        and _TREE_HANDLER.fullmatch(handler)
        and name not in ("", ".", "..")
        and "/" not in name
    }


def values_in(store: Store) -> dict[str, Any]:
    """The items of a step that are neither trees nor metrics.

    Returns:
      What a JSON file says; of other files their bytes, by their names, and by their paths if they lie deeper.

    Raises:
      CorruptError: They are damaged, or far too large.
    """
    trees = trees_in(store)
    found: dict[str, Any] = {}
    for name in _items(names_in(store)):
        if name in trees or name == _METRICS_NAME:
            continue
        files = dict(_files_in(store.child(name), ""))
        if len(files) == 1:
            (data,) = files.values()
            try:
                found[name] = parse_json(data)
                continue
            except ValueError:
                pass
        if files:
            found[name] = files
    return found


def _files_in(store: Store, prefix: str) -> Iterator[tuple[str, bytes]]:
    """The files of an item, each with its path."""
    if prefix.count("/") > _DEPTH_MAX:
        raise CheckpointError(f"{store.path!r} is a directory too deep to be read")
    for name in names_in(store):
        data = read_file(store, name, _FILES_BYTES_MAX) if name != _COMMIT_NAME else None
        if data is not None:
            yield f"{prefix}{name}", data
        elif name != _COMMIT_NAME:
            yield from _files_in(store.child(name), f"{prefix}{name}/")


def metrics_in(store: Store) -> dict[str, float]:
    """The numbers among the metrics of a step; those in dicts have keys with ``/`` between the parts.

    Raises:
      CorruptError: The file is damaged.
    """
    said = _said_metrics(store)
    return {key: _float_of(value) for key, value in said.items() if isinstance(value, (bool, int, float))}


def other_metrics_in(store: Store) -> list[str]:
    """The keys of the metrics of a step that are no numbers.

    Raises:
      CorruptError: The file is damaged.
    """
    return [key for key, value in _said_metrics(store).items() if not isinstance(value, (bool, int, float))]


def _said_metrics(store: Store) -> dict[str, Any]:
    """What is said of the metrics of a step that are no dicts, by key."""
    document = read_json(store.child(_METRICS_NAME), _METRICS_NAME)
    if document is None:
        said = metadata_of(store).get("metrics")
        document = said if isinstance(said, dict) else {}
    found: dict[str, Any] = {}
    waiting: list[tuple[str, Any]] = [("", document)]
    while waiting:
        key, value = waiting.pop()
        if isinstance(value, dict):
            children: list[tuple[Any, Any]] = list(value.items())
            waiting += [(f"{key}/{name}" if key else str(name), child) for name, child in reversed(children)]
        elif key:
            found[key] = value
    return found


def _float_of(number: float) -> float:
    try:
        return float(number)
    except OverflowError:
        return math.inf if number > 0 else -math.inf


def root_metadata_in(store: Store) -> dict[str, Any]:
    """What the caller said of all steps of a directory.

    Raises:
      CorruptError: The file is damaged.
    """
    place = store.child("metadata")
    said = next(filter(None, (read_json(place, name) for name in _ROOT_METADATA_NAMES)), None)
    if not isinstance(said, dict):
        return {}
    custom = said.pop("custom_metadata", None)
    said.pop("internal_metadata", None)
    return {**said, **custom} if isinstance(custom, dict) else said


def metadata_of(store: Store) -> Mapping[str, Any]:
    """What ``_CHECKPOINT_METADATA`` says of a step; empty where there is none.

    Raises:
      CorruptError: It is damaged.
    """
    document = read_json(store, STEP_METADATA_NAME)
    return document if isinstance(document, dict) else {}


def commit_time_s(said: Mapping[str, Any]) -> float | None:
    """When it was committed, in seconds since 1970, if what it says of itself has that."""
    time_ns = said.get("commit_timestamp_nsecs")
    return time_ns / 1e9 if type(time_ns) is int and 0 < time_ns < 1 << 63 else None


def no_checkpoint(store: Store) -> NotFoundError:
    """The error for a place where there is nothing to open."""
    advice = ""
    is_url = "://" in store.path
    if is_url and names_in(store) and not store.exists(_COMMIT_NAME):
        advice = (
            f"\nin an object store, a checkpoint without {_COMMIT_NAME} is not committed; if this one was copied "
            "whole from a local directory, put an empty object of that name there"
        )
    elif not is_url and not is_committed(store):
        advice = "\na directory with such a name is not committed"
    return NotFoundError(f"no checkpoint of Orbax's at {store.path!r}{advice}")
