"""Which numbered checkpoints are in a directory, and what does it say of each?

A step is a directory whose name is the prefix and a number (``step_00001200``), with a manifest in it. Nothing but the
directory is believed: a step is there exactly while its manifest is, its time and its metrics are those of that
manifest. Names are relative, so that the directory may be moved or copied.

``checkpoint.json`` says the same for people and for other tools, and saves parsing a thousand manifests: what it says
of a step is used only if the file is as it was written (it carries a checksum), and if that step's manifest is whole
and the one that it was written for. It is written anew after each change, and may be lost or wrong without harm.

Deliberately not here: when steps are saved (`_schedule`), which ones stay (`_retention`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime as dt
import functools
import json
import logging
import math
import re
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, final

import xxhash

from ._commit import PIN_NAME, retract, sweep
from ._encoding import MANIFEST_BYTES_MAX, checksum_of_manifest, parse_manifest
from ._errors import CheckpointError
from ._manifest import MANIFEST_NAME
from ._storage import Store, cut_off_name

_log = logging.getLogger("jaxckpt")

CACHE_NAME = "checkpoint.json"
_CACHE_BYTES_MAX = 1 << 28
_STEP_DIGITS_MAX = 18


@dataclasses.dataclass(frozen=True, slots=True)
class StepRecord:
    """What a manager must know of a step.

    Attributes:
      step: Its number.
      name: Its directory.
      created_s: When it was committed, in seconds since 1970.
      metrics: Numbers by name.
      checksum: Checksum of its manifest, hexadecimal.
      listed: On an object store, what the listing of the bucket says of this checkpoint and of no other.
    """

    step: int
    name: str
    created_s: float
    metrics: dict[str, float]
    checksum: str
    listed: str = ""


@final
class StepDirectory:
    """The numbered checkpoints of one directory. Several threads may use it."""

    def __init__(self, store: Store, prefix: str, width: int) -> None:
        if not re.fullmatch(r"[A-Za-z0-9_.=-]*", prefix) or prefix.startswith("."):
            raise ValueError(f"prefix= must be letters, digits, '_', '-', '=' and '.', not {prefix!r}")
        if not 1 <= width <= _STEP_DIGITS_MAX:
            raise ValueError(f"width= must be 1 to {_STEP_DIGITS_MAX} digits, not {width}")
        self._store = store
        if prefix[-1:].isdigit():
            raise ValueError(
                f"prefix= must not end with a digit, which {prefix!r} does: the step's number follows it"
            )
        self._prefix = prefix
        self._width = width
        self._pattern = re.compile(re.escape(prefix) + rf"([0-9]{{1,{_STEP_DIGITS_MAX}}})")
        self._lock = threading.Lock()
        # Records by name, each with the fingerprint of the manifest that it was read from.
        self._records: dict[str, tuple[Any, StepRecord]] = {}
        self._cached: dict[str, StepRecord] | None = None
        self._sweep_lock = threading.Lock()
        # Whether a step may have another name than the one that this manager gives it. On an object store, where a
        # listing takes long, that is as the last one said.
        self._has_other_names = True
        self._busy: str | None = None  # directory of the save that this process is writing
        self._littered: set[int] = set()
        self._spared: frozenset[int] = frozenset()

    @property
    def path(self) -> str:
        """Where the directory is."""
        return self._store.path

    def _candidates(self) -> dict[str, int]:
        """The step of every name that may be a step's directory."""
        # Not a thousand pairs: they would set off a collection of all garbage, ten times as long as the listing.
        candidates: dict[str, int] = {}
        for name in self._store.names():
            match = self._pattern.fullmatch(name)
            if match is not None:
                candidates[name] = int(match[1])
        return candidates

    def committed(self) -> dict[int, str]:
        """Directory of each committed step, ascending."""
        return self._look_for_committed(None)

    def fingerprints(self) -> dict[int, Any]:
        """Of each committed step, ascending, something that changes when its checkpoint is replaced."""
        fingerprints: dict[str, Any] = {}
        return {step: fingerprints[name] for step, name in self._look_for_committed(fingerprints).items()}

    def _look_for_committed(self, fingerprints: dict[str, Any] | None) -> dict[int, str]:
        """Directory of each committed step, ascending.

        Args:
          fingerprints: Gets the fingerprint of each directory with a manifest. None: a thousand of them would set off
            a search for garbage, ten times as long as the listing.
        """
        looked_at: set[str] | None = None
        while True:
            seen: set[str] = set()
            found: dict[int, str] = {}
            has_other_names = False
            for name, fingerprint in self._store.fingerprints(MANIFEST_NAME, self._is_candidate):
                seen.add(name)
                step = self._step_of(name)
                is_usual = name == self._name_of(step)
                has_other_names |= not is_usual
                # Of two widths for one step the manager's own counts, else the one that sorts first.
                if fingerprint is not None and (step not in found or is_usual):
                    found[step] = name
                if fingerprint is not None and fingerprints is not None:
                    fingerprints[name] = fingerprint
            if self._store.is_remote:
                self._has_other_names = has_other_names
            # Steps that are gone before they are looked at may have been deleted for younger ones, not yet listed.
            if found or seen in (set(), looked_at):
                return {step: found[step] for step in sorted(found)}
            looked_at = seen

    def _is_candidate(self, name: str) -> bool:
        """Whether a name may be a step's directory."""
        return self._pattern.fullmatch(name) is not None

    def _step_of(self, name: str) -> int:
        return int(name.removeprefix(self._prefix))

    def store_of(self, step: int) -> Store:
        """Where a step is, or would be saved."""
        return self._locate(step)[0]

    def _locate(self, step: int) -> tuple[Store, Any]:
        """Where a step is, or would be saved, and the fingerprint of its manifest if it is there."""
        # The usual name needs no listing.
        usual = self._name_of(step)
        fingerprint = self.fingerprint(usual)
        if fingerprint is None and self._has_other_names:
            for name, other in self._candidates().items():
                if other == step and (found := self.fingerprint(name)) is not None:
                    return self._store.child(name), found
        return self._store.child(usual), fingerprint

    def usual_store_of(self, step: int) -> Store:
        """Where a step is saved that is not there under another name; looks at nothing."""
        return self._store.child(self._name_of(step))

    def fingerprint_of(self, step: int) -> Any:
        """As `fingerprint`, of a step."""
        return self._locate(step)[1]

    def fingerprint(self, name: str) -> Any:
        """Something that changes when the checkpoint of a directory is replaced, or None when there is none."""
        return self._store.fingerprint(f"{name}/{MANIFEST_NAME}")

    def _name_of(self, step: int) -> str:
        return f"{self._prefix}{step:0{self._width}d}"

    # --- records ----------------------------------------------------------------------------------------------

    def records(self) -> list[StepRecord]:
        """What the committed steps say of themselves, ascending; those with damaged manifests are left out."""
        found: list[StepRecord] = []
        with self._lock:
            fingerprints: dict[str, Any] = {}
            for step, name in self._look_for_committed(fingerprints).items():
                record = self._record(step, name, fingerprints[name])
                if record is not None:
                    found.append(record)
            present = {record.name for record in found}
            self._records = {name: entry for name, entry in self._records.items() if name in present}
        return found

    def _record(self, step: int, name: str, fingerprint: Any) -> StepRecord | None:
        known = self._records.get(name)
        if known is not None and known[0] == fingerprint:
            return known[1]
        try:
            record = self._cached_record(step, name, fingerprint) or self._read_record(step, name)
        except FileNotFoundError:  # deleted since it was listed
            return None
        except (CheckpointError, OSError) as error:
            _log.warning("step %d of %r cannot be read and is left alone: %s", step, self.path, error)
            return None
        self._records[name] = fingerprint, record
        return record

    def _cached_record(self, step: int, name: str, fingerprint: Any) -> StepRecord | None:
        """What the cache says, if it was written for this very manifest."""
        if self._cached is None:
            self._cached = self._read_cache()
        record = self._cached.get(name)
        if record is None or record.step != step:
            return None
        if isinstance(fingerprint, str) and fingerprint == record.listed:
            return record  # the name of its data, which no other checkpoint has, is there
        checksum = checksum_of_manifest(self._store.read(f"{name}/{MANIFEST_NAME}", MANIFEST_BYTES_MAX))
        return record if checksum is not None and checksum.hex() == record.checksum else None

    def _read_record(self, step: int, name: str) -> StepRecord:
        path = f"{name}/{MANIFEST_NAME}"
        data = self._store.read(path, MANIFEST_BYTES_MAX)
        manifest = parse_manifest(data, f"{self.path}/{name}")
        checksum = checksum_of_manifest(data) or b""
        listed = manifest.data if self._store.is_remote else ""
        return StepRecord(step, name, manifest.created_s, manifest.metrics, checksum.hex(), listed)

    # --- watching ---------------------------------------------------------------------------------------------

    def watch(
        self, timeout_s: float | None, poll_s: float, after: int | None, monotonic_s: Callable[[], float]
    ) -> Iterator[int]:
        """Yields the newest step and then each new one, held while the caller has it.

        The arguments are those of `CheckpointManager.watch`, and the clock that the timeout goes by.
        """
        present = self.fingerprints()
        newest = max(present, default=None)
        seen = {
            step: fingerprint for step, fingerprint in present.items() if after is None and step != newest
        }
        waiting_since_s = monotonic_s()
        pause = threading.Event()
        while True:
            for step, fingerprint in self.fingerprints().items():
                if seen.get(step) == fingerprint:
                    continue
                if after is not None and step <= after:
                    continue
                seen[step] = fingerprint
                try:
                    _, hold = self.store_of(step).read_and_hold(MANIFEST_NAME, 0)
                except FileNotFoundError:
                    continue
                try:
                    yield step
                finally:
                    if hold is not None:
                        hold.release()
                waiting_since_s = monotonic_s()
            left_s = poll_s
            if timeout_s is not None:
                left_s = waiting_since_s + timeout_s - monotonic_s()
                if left_s <= 0:
                    return
            pause.wait(min(poll_s, left_s))

    # --- changes ----------------------------------------------------------------------------------------------

    def begin(self, step: int, name: str = "", unknown: Any = None) -> tuple[Store, Any]:
        """Where a step will be saved, and the fingerprint of what is there before; not swept until `end`.

        Args:
          step: The step.
          name: Its directory, if that is known.
          unknown: What stands for a fingerprint that storage does not tell.
        """
        store, fingerprint = self._store.child(name) if name else self.usual_store_of(step), unknown
        with contextlib.suppress(OSError):  # the save will meet it too, and say so
            if name:
                fingerprint = store.fingerprint(MANIFEST_NAME)
            else:
                store, fingerprint = self._locate(step)
        with self._sweep_lock:
            self._busy = store.name
        return store, fingerprint

    @property
    def busy(self) -> str | None:
        """Directory of the save that began and has not ended: what is there may not be durable yet."""
        with self._sweep_lock:
            return self._busy

    def end(self) -> None:
        """The save that began has ended."""
        with self._sweep_lock:
            self._busy = None

    def delete(self, step: int) -> bool:
        """Deletes a step under each of its names, marker first; False when somebody is reading it."""
        names = [self._name_of(step)]
        if self._has_other_names:
            names = [name for name, other in self._candidates().items() if other == step]
        committed = [name for name in names if self.fingerprint(name) is not None]
        return all(self._store.delete_link(name) or retract(self._store.child(name)) for name in committed)

    def spare(self, steps: Collection[int]) -> None:
        """From here on `sweep` leaves these steps alone, because they will be gone on with."""
        self._spared = frozenset(steps)

    def sweep(self) -> None:
        """Deletes what saves left that were never committed; what cannot be deleted does not keep the rest."""
        listed = self._store.fingerprints(MANIFEST_NAME, self._is_candidate)
        uncommitted = [name for name, fingerprint in listed if fingerprint is None]
        _call_all([functools.partial(self._sweep_uncommitted, name) for name in uncommitted])

    def _sweep_uncommitted(self, name: str) -> None:
        if int(name.removeprefix(self._prefix)) in self._spared:
            return
        if self.fingerprint(name) is not None or self._store.is_link(name):
            return
        with self._sweep_lock:
            litter = [] if name == self._busy else sweep(self._store.child(name))
        for part in litter:
            _log.info("swept %s/%s/%s, which was never committed", self.path, name, part)

    def sweep_all(self) -> None:
        """As `sweep`, and what an overwrite left in steps that are committed."""
        cut_off = [name for name in self._store.names() if cut_off_name(name) == CACHE_NAME]
        _call_all(
            [
                self.sweep,
                *[functools.partial(self._store.delete, name) for name in cut_off],
                *[functools.partial(self.sweep_step, step) for step in self._maybe_littered()],
            ]
        )

    def _maybe_littered(self) -> list[int]:
        """The committed steps that may hold more than their checkpoint."""
        # One name is that of the one directory of data in the step: a listing of the bucket has shown that already.
        return [step for step, fingerprint in self.fingerprints().items() if not isinstance(fingerprint, str)]

    def sweep_step(self, step: int) -> None:
        """Deletes what an overwrite left in a step, and in those before it whose old data somebody read then."""
        with self._sweep_lock:
            self._littered.add(step)
            for littered in sorted(self._littered):
                store = self.store_of(littered)
                if store.name == self._busy:  # it is being saved anew
                    continue
                if not _is_clean(store):
                    sweep(store)
                if _is_clean(store) or not store.exists(MANIFEST_NAME):
                    self._littered.discard(littered)

    def pin(self, step: int) -> None:
        """Marks a committed step as one that retention keeps."""
        self.store_of(step).publish(PIN_NAME, b"")

    def unpin(self, step: int) -> None:
        """Takes the mark away."""
        self.store_of(step).delete(PIN_NAME)

    def pinned(self, records: list[StepRecord]) -> set[int]:
        """The steps that are marked."""
        steps = {record.name: record.step for record in records}
        marks = self._store.fingerprints(PIN_NAME, steps.__contains__)
        return {steps[name] for name, mark in marks if mark is not None}

    # --- the cache --------------------------------------------------------------------------------------------

    def write_cache(self) -> None:
        """Writes what is there to ``checkpoint.json``."""
        records = self.records()
        entries = [_document_of(record) for record in records]
        document = {
            "latest": records[-1].name if records else None,
            "checkpoints": entries,
            "checksum": _checksum_of(entries),
        }
        data = (json.dumps(document, indent=1, allow_nan=False) + "\n").encode()
        with self._lock:
            try:
                if self._store.read(CACHE_NAME, len(data)) == data:
                    return
            except FileNotFoundError:
                if not records:
                    return
            self._store.publish(CACHE_NAME, data)

    def _read_cache(self) -> dict[str, StepRecord]:
        """Whatever can be made of the cache; nothing else depends on it."""
        try:
            document = json.loads(self._store.read(CACHE_NAME, _CACHE_BYTES_MAX))
            if document["checksum"] != _checksum_of(document["checkpoints"]):
                return {}
            records = [_record_of(entry) for entry in document["checkpoints"]]
        except (OSError, ValueError, TypeError, KeyError, RecursionError):
            return {}
        return {record.name: record for record in records}


def _is_clean(store: Store) -> bool:
    """Whether a step has one data directory, and nothing that was to be published."""
    names = store.names()
    is_single = sum(name.startswith("data-") for name in names) == 1
    return is_single and not any(".tmp-" in name for name in names)


def _call_all(calls: Sequence[Callable[[], None]]) -> None:
    """Makes every call, whichever of them storage refuses, and raises the first refusal in the end."""
    failures: list[OSError] = []
    for call in calls:
        try:
            call()
        except OSError as error:
            failures.append(error)
    if failures:
        raise failures[0]


def _checksum_of(entries: list[Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(entries, sort_keys=True).encode())


def _document_of(record: StepRecord) -> dict[str, Any]:
    date = dt.datetime.fromtimestamp(record.created_s, dt.UTC)
    return {
        "step": record.step,
        "name": record.name,
        "time": date.isoformat(timespec="milliseconds"),
        "time_s": record.created_s,
        # JSON has no NaN and no infinities.
        "metrics": {
            name: value if math.isfinite(value) else str(value) for name, value in record.metrics.items()
        },
        "manifest": record.checksum,
        **({"data": record.listed} if record.listed else {}),
    }


def _record_of(entry: dict[str, Any]) -> StepRecord:
    return StepRecord(
        int(entry["step"]),
        str(entry["name"]),
        float(entry["time_s"]),
        {str(name): float(value) for name, value in entry["metrics"].items()},
        str(entry["manifest"]),
        str(entry.get("data", "")),
    )
