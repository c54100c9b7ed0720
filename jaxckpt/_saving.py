"""How does one save run, from the tree to the commit, and on which threads?

    caller's thread        __init__ (flatten, inspect, plan, begin)    stage (snapshot)   -> goes on
    background thread                                                  drain, finish (metadata, sync, manifest)
    writer threads                                                     pieces

A blocking save does all of it on the caller's thread but for the writing. After a failure anywhere, the other parties
stop at their next step, whoever is last cleans up, and nothing is committed: the manifest is published only when
the snapshot was staged whole *and* every piece of the plan is durable.

In a group of processes (`_collective`) the background thread first agrees with the others, and commits with them. A
failure is told to all where it happens, in whatever thread that is; a watcher hears of those of the others and lets the
threads here stop in the same way. Nobody waits longer than `SETTLE_S` for a thread that storage keeps waiting.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import importlib.metadata
import logging
import math
import os
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, NoReturn, final

import jax
import jax.numpy as jnp
import msgpack
import numpy as np
import xxhash

from ._collective import SETTLE_S, CollectiveSave, Outline, outline_leaf
from ._commit import Attempt, begin
from ._config import (
    BLOCK_BYTES,
    HOST_BYTES_MIN,
    SaveOptions,
    least_piece_bytes,
    piece_bytes_for,
    resolve_host_bytes_max,
)
from ._encoding import MANIFEST_BYTES_MAX, parse_manifest
from ._errors import CheckpointError, CoordinationError, WriteError
from ._individual import OwnLeaves
from ._items import encode_items
from ._keys import FlatTree, flatten
from ._layout import GROWING_OBJECTS, PACK_BYTES
from ._leaves import NO_LEAVES, inspect_leaves
from ._manifest import (
    ITEMS_BYTES_MAX,
    ITEMS_DIRECTORY,
    MANIFEST_NAME,
    NO_CHUNKS,
    OWN_DIRECTORY,
    PARTS_DIRECTORY,
    PROGRAMS_DIRECTORY,
    TIME_S_MAX,
    Manifest,
    PartEntry,
    StoredObject,
)
from ._parts import encode_part
from ._persist import PieceWriter
from ._pinned import PinnedSnapshot
from ._planning import plan_save
from ._processes import Group, current_group
from ._programs import ExportedProgram, as_program
from ._progress import Progress, ProgressMeter
from ._snapshot import choose_staging, take_snapshot
from ._staging import SnapshotGivenUpError
from ._storage import Store
from ._store import open_store
from ._tables import PIECE_ALIGNMENT, ChunkTable
from ._zarr import METADATA_NAME, group_metadata

_log = logging.getLogger("jaxckpt")

# What a blocking save from host memory assembles packs in: enough to keep the writers busy, no more.
_BLOCKING_BYTES_MAX = 64 << 20


@dataclasses.dataclass(frozen=True, slots=True)
class CheckpointInfo:
    """What a finished save says of itself.

    Attributes:
      path: Where the checkpoint is.
      nbytes: Bytes of the arrays.
      bytes_written: Bytes of all objects, manifest included.
      leaves: Number of leaves.
      objects: Number of objects that hold chunks.
      blocked_s: Seconds for which the caller of the save had to wait, for an earlier save too.
      seconds: Seconds from the call to the commit.
      step: Number of the checkpoint in its manager's directory, or None.
      waited_s: The part of `blocked_s` that an earlier save of the same manager took.
      snapshot_s: Seconds from the call until nothing more was read from the devices.
      persist_s: Seconds from the first write to the commit; the snapshot may go on meanwhile.
    """

    path: str
    nbytes: int
    bytes_written: int
    leaves: int
    objects: int
    blocked_s: float
    seconds: float
    step: int | None = None
    waited_s: float = 0.0
    snapshot_s: float = 0.0
    persist_s: float = 0.0

    @property
    def bytes_per_s(self) -> float:
        """Throughput of the writing, in bytes a second."""
        return self.bytes_written / self.persist_s if self.persist_s else 0.0


@dataclasses.dataclass(frozen=True, slots=True)
class SaveContext:
    """What comes with the tree: what is saved beside it, and what a manager knows of the save.

    Attributes:
      metadata: Plain data.
      items: Values and objects with a state, by name.
      programs: Functions of the tree, by name.
      metrics: Numbers by name; the values of `jax.Array` are read in the background.
      step: Number of the checkpoint in its manager's directory.
      began_s: What `time.perf_counter` said when the manager began, after `waited_s`; None: no manager did.
      waited_s: Seconds for which an earlier save made the caller wait.
      wall_s: Says what time it is, in seconds since 1970.
      earlier: Says where an earlier checkpoint of the same run is, whose programs are probably the same.
      newest_good: Says which checkpoint is there when this save fails.
      on_progress: Told of each piece that is written.
    """

    metadata: Any = None
    items: Mapping[str, Any] | None = None
    programs: Mapping[str, Any] | None = None
    metrics: Mapping[str, Any] | None = None
    step: int | None = None
    began_s: float | None = None
    waited_s: float = 0.0
    wall_s: Callable[[], float] = time.time
    earlier: Callable[[], Store | None] | None = None
    newest_good: Callable[[], str] | None = None
    on_progress: Callable[[Progress], None] | None = None


@final
class SaveJob:
    """One save from flattening to commit; each step is called once, in the order of the methods."""

    def __init__(
        self,
        path: str | os.PathLike[str] | Store,
        tree: Any,
        overwrite: bool,
        context: SaveContext,
        options: SaveOptions,
        *,
        is_blocking: bool,
        is_local: bool = False,
    ) -> None:
        self._began_s = time.perf_counter() if context.began_s is None else context.began_s
        self._staged_s = 0.0
        self._drained_s = 0.0
        self._persist_began_s = 0.0
        self._is_blocking = False
        self._context = context
        self._options = options
        self._may_overwrite = overwrite
        self._attempt: Attempt | None = None
        self._has_sent_part = False
        self._staged = threading.Event()
        self._stage_failure: BaseException | None = None
        self._watch = contextlib.ExitStack()
        group = current_group()
        self._together: CollectiveSave | None = None
        if group is not None:
            where = str(getattr(path, "path", path))
            # First of all: the others wait for this process, and shall hear why it does not come.
            self._together = CollectiveSave(group, f"save {where!r}", options.timeout_s, is_local=is_local)
        try:
            self.store = open_store(path)
            self._processes_here = 1
            if group is not None and self._together is not None:
                # Asks the others the first time.
                self._processes_here = group.machine_mates(options.timeout_s, self._together.session.check)
            self._prepare(tree, is_blocking=is_blocking, group=group)
            if self._together is None:
                self._begin()
        except BaseException as error:
            if self._together is None:
                raise
            failure = self._together.session.fail(error)
            self._together.session.close()
            if failure is error or not isinstance(error, Exception):  # interrupts stay what they are
                raise
            raise _with_outcome(failure, self._outcome(is_committed=False)) from error

    def _prepare(self, tree: Any, *, is_blocking: bool, group: Group | None) -> None:
        """What needs no storage and no other process: everything is looked at and planned."""
        context, options = self._context, self._options
        self._metadata = _copy_metadata(context.metadata)
        self._metrics = _check_metrics(context.metrics or {})
        self._items = encode_items(context.items) if context.items else None
        if self._items is not None and len(self._items) > ITEMS_BYTES_MAX:
            raise ValueError(
                f"items= has {len(self._items)} bytes: what is larger than 1 GiB belongs into the tree"
            )
        flat = flatten(tree)
        is_without_values = bool(context.programs) and _has_no_values(flat)
        self._flat = flatten(None) if is_without_values else flat
        leaves = inspect_leaves(self._flat.keys, self._flat.leaves)
        self._programs = self._export_programs(flat)
        self._flat.leaves.clear()
        self._own_leaves = OwnLeaves(self._flat.keys, leaves if self._together is not None else NO_LEAVES)
        self._values = leaves.values
        host_bytes_max = resolve_host_bytes_max(options.host_bytes_max, self._processes_here)
        staging = choose_staging(leaves, options.staging, is_blocking=is_blocking)
        if is_blocking and staging == "pool":
            host_bytes_max = min(host_bytes_max, _BLOCKING_BYTES_MAX)
            staging = "direct"
        self._chunk_bytes_max = options.chunk_bytes_max
        object_bytes_max = PACK_BYTES
        if self.store.is_remote:
            host_bytes_max = max(host_bytes_max // 2, HOST_BYTES_MIN)
            object_bytes_max = _remote_object_bytes(options, 1 if group is None else group.count)
            self._chunk_bytes_max = min(options.chunk_bytes_max, object_bytes_max)
        piece_bytes = min(piece_bytes_for(host_bytes_max), object_bytes_max)
        self._pack_bytes_max = options.pack_bytes_max
        if group is not None:
            # Which chunks are packed must not depend on how many processes share this machine.
            least = min(least_piece_bytes(options.host_bytes_max, group.count), object_bytes_max)
            piece_bytes = max(piece_bytes, least)
            self._pack_bytes_max = min(options.pack_bytes_max, least - PIECE_ALIGNMENT)
        is_shared = self._together is not None and not self._together.is_local
        self._plan = plan_save(
            self._flat.keys,
            leaves.kinds,
            chunk_bytes_max=self._chunk_bytes_max,
            pack_bytes_max=self._pack_bytes_max,
            pack_object_bytes=object_bytes_max,
            piece_bytes=piece_bytes,
            group=(group.index, group.count) if is_shared and group is not None else None,
        )
        total = sum(piece.length for piece in self._plan.writes.pieces)
        self.meter = ProgressMeter(total, "snapshot", context.on_progress)
        self._snapshot = take_snapshot(staging, leaves, self._plan.writes, host_bytes_max, piece_bytes)
        # Last, since its threads must be ended by whoever fails from here on.
        self._writer = PieceWriter(
            self.store,
            self._plan.writes,
            call_count=len(self._plan.directories) + 3,
            threads=options.io_threads,
            meter=self.meter,
            on_failure=None if self._together is None else self.give_up,
        )

    def _export_programs(self, flat: FlatTree) -> dict[str, ExportedProgram]:
        """The programs as bytes; in a group they are those of process 0."""
        programs = {name: as_program(name, given) for name, given in (self._context.programs or {}).items()}
        together = self._together
        if together is not None and together.index != 0 and not together.is_local:
            return {}
        exported = {name: program.export(name, flat) for name, program in programs.items()}
        for name, program in exported.items():
            if len(program.data) > ITEMS_BYTES_MAX:
                raise ValueError(
                    f"the program {name!r} has {len(program.data)} bytes: arrays belong into the tree"
                )
        return exported

    def _begin(self) -> None:
        """Begins the attempt, and lets the writer begin."""
        has_items = self._items is not None
        own_leaves: bytes | None = None
        try:
            if self._together is None:
                self._attempt = begin(self.store, may_overwrite=self._may_overwrite)
            else:
                beginning = self._together.begin(
                    self.store,
                    self._outline(),
                    self._items,
                    self._own_leaves,
                    may_overwrite=self._may_overwrite,
                )
                self._attempt = beginning.attempt
                has_items, own_leaves = beginning.has_items, beginning.own_leaves
                self._watch.enter_context(self._together.session.watching(self._stop))
            self._persist_began_s = time.perf_counter() - self._began_s
            calls = self._metadata_calls(self._attempt, self._items if has_items else None, own_leaves)
            self._writer.open(self._object_names(self._attempt), calls)
        except BaseException as error:
            if self._together is not None:
                raise
            self._release_snapshot()
            self._writer.abandon(error)
            if self._attempt is not None:
                self._attempt.abandon()
            self._raise(error)

    def _outline(self) -> Outline:
        call = {
            "step": self._context.step,
            "overwrite": self._may_overwrite,
            "local": self._together is not None and self._together.is_local,
            "programs": sorted(self._context.programs or {}),
            "options": [self._chunk_bytes_max, self._pack_bytes_max],
        }
        leaves = tuple(map(outline_leaf, self._plan.kinds.templates))
        return Outline(call, self._flat.nodes, self._flat.keys, leaves)

    def _stop(self, error: BaseException) -> None:
        """Called when the group has failed: ends the threads of this process, too."""
        self.give_up(error)
        self._writer.stop(error)

    def run(self) -> CheckpointInfo:
        """All steps of a blocking save."""
        self._is_blocking = True
        self._begin_together()
        # A transfer within a memory bound needs another thread that hands over what has arrived.
        drainer = threading.Thread(target=self._drain_quietly, name="jaxckpt-drain")
        try:
            if isinstance(self._snapshot, PinnedSnapshot):
                drainer.start()
            self.stage()
            if drainer.ident is not None:
                drainer.join()
        except BaseException as error:  # an interrupt, too: `finish` raises it when everything is cleaned up
            self.give_up(error)
            if drainer.ident is not None:
                drainer.join()
        return self.finish()

    def stage(self) -> None:
        """Takes the snapshot on the caller's thread; afterwards the tree may be donated."""
        try:
            self._snapshot.stage(self._writer.submit)
        except BaseException as error:
            self._stage_failure = self._stage_failure or error
            raise
        finally:
            self._staged_s = time.perf_counter() - self._began_s
            self._staged.set()

    def give_up(self, error: BaseException) -> None:
        """Makes the save fail at its next step, wherever it is; `finish` raises the error."""
        self._stage_failure = self._stage_failure or error
        if self._together is not None and self._stage_failure is error:
            self._together.session.fail(error)  # the others may wait for something that comes much later
        self._release_snapshot()
        self._staged.set()

    def abandon(self, error: BaseException) -> None:
        """Ends a save of which no other method was called."""
        self.give_up(error)
        with contextlib.suppress(CheckpointError):
            self._fail(error)

    def drain(self) -> None:
        """Hands the writer what the snapshot still holds, and waits until it was staged whole."""
        self._begin_together()
        self._drain_quietly()
        self._staged.wait()

    def _begin_together(self) -> None:
        """Agrees with the other processes. A failure is kept for `finish`."""
        if self._together is None or self._stage_failure is not None:
            return
        try:
            self._begin()
        except BaseException as error:
            self._stop(error)

    def finish(self) -> CheckpointInfo:
        """Waits for the writer, then commits."""
        try:
            if self._stage_failure is not None:
                raise self._stage_failure
            self.meter.enter("write")
            self._writer.finish()
            self._watch.close()
            self.meter.enter("commit")
            manifest_bytes = self._commit()
        except BaseException as error:
            self._fail(self._writer.failure or error)
        if self._together is not None:
            self._together.session.close()
        self.meter.enter("done")
        seconds = time.perf_counter() - self._began_s
        waited_s = self._context.waited_s
        info = CheckpointInfo(
            path=self.store.path,
            nbytes=self._plan.kinds.nbytes,
            bytes_written=self._bytes_written + manifest_bytes,
            leaves=len(self._flat.keys),
            objects=len(self._plan.writes.objects),
            blocked_s=waited_s + (seconds if self._is_blocking else self._staged_s),
            seconds=waited_s + seconds,
            step=self._context.step,
            waited_s=waited_s,
            snapshot_s=max(self._staged_s, self._drained_s),
            persist_s=seconds - self._persist_began_s,
        )
        _log.info(
            "saved %s: %d leaves, %d bytes in %.3f s",
            info.path,
            info.leaves,
            info.bytes_written,
            info.seconds,
        )
        return info

    def _drain_quietly(self) -> None:
        """A failure here is found again by `finish`: pieces are missing then."""
        try:
            self._snapshot.drain(self._writer.submit)
            self._drained_s = time.perf_counter() - self._began_s
        except SnapshotGivenUpError:
            pass  # its cause is on its way to `finish`
        except BaseException as error:
            self._stage_failure = self._stage_failure or error
            self._release_snapshot()

    def _release_snapshot(self) -> None:
        self._snapshot.give_up()

    def _commit(self) -> int:
        """Commits, alone or with the other processes; returns the bytes of the manifest that this process wrote."""
        attempt = self._attempt
        assert attempt is not None
        writes = self._plan.writes
        chunks = ChunkTable(writes.pack, writes.offset, writes.length, bytes(self._writer.checksums))
        own = attempt.metadata_objects
        self._bytes_written = int(chunks.length.sum()) + sum(entry.length for entry in own)
        if self._together is None:
            return attempt.commit(self._manifest(chunks, own))
        together = self._together
        part: PartEntry | None = None
        if not together.is_local:
            data = encode_part(together.index, chunks, writes.packs)
            name = f"{attempt.data}/{PARTS_DIRECTORY}/{together.index}"
            self.store.put(name, data)
            stored_bytes = int(chunks.length.sum())
            part = PartEntry(name, len(data), xxhash.xxh3_128_digest(data), len(writes.objects), stored_bytes)
            self._bytes_written += len(data)
        self.store.sync()
        if together.index != 0 and not together.is_local:
            self._has_sent_part = True
            attempt.expect_commit()

        def commit(parts: tuple[PartEntry, ...], objects: tuple[StoredObject, ...]) -> int:
            # Not before, so that nothing is left where the processes find that they share no storage.
            attempt.put_root_group()
            everything = sorted({*objects, *attempt.metadata_objects}, key=lambda entry: entry.name)
            manifest = self._manifest(chunks, tuple(everything), parts)
            # Alone, this process can neither know that all have committed nor delete what they may go back to.
            return attempt.commit(manifest, keeps_replaced=together.is_local)

        manifest_bytes = together.publish(part, own, commit, attempt.take_back)
        attempt.forget_replaced()
        return manifest_bytes

    def _fail(self, error: BaseException) -> NoReturn:
        """Ends a failed save, and raises why it failed."""
        if self._together is not None:
            self._fail_together(self._together, error)
        self._release_snapshot()
        self._writer.abandon(error)
        if self._attempt is not None:
            self._attempt.abandon()
        self._raise(error, is_committed=self._attempt is not None and self._attempt.is_committed())

    def _fail_together(self, together: CollectiveSave, error: BaseException) -> NoReturn:
        """As `_fail`, in a group; takes a few seconds, even if storage keeps a thread of some process for longer."""
        failure = together.session.fail(error)
        self._watch.close()
        self._release_snapshot()
        deadline_s = time.monotonic() + SETTLE_S
        has_stopped = self._writer.abandon(error, SETTLE_S)
        together.settle(max(0.0, deadline_s - time.monotonic()), has_stopped=has_stopped)
        if together.attempt is not None:
            together.attempt.abandon()
        outcome = self._outcome_together(together, deadline_s)
        together.session.close()
        if not isinstance(error, Exception):  # an interrupt stays what it is
            raise error
        raise _with_outcome(failure, outcome) from (error if failure is not error else error.__cause__)

    def _outcome_together(self, together: CollectiveSave, deadline_s: float) -> str:
        """What a failed save of a group has left, as far as this process can know."""
        is_known = True
        if self._has_sent_part:
            # Process 0 may be about to commit, without knowing of the failure.
            is_known = together.session.has_settled(0, max(0.0, deadline_s - time.monotonic()))
        is_committed = together.attempt is not None and together.attempt.is_committed()
        if is_known or is_committed:
            return self._outcome(is_committed=is_committed)
        return "whether process 0 commits it all the same is not known here; look before you save again"

    def _outcome(self, *, is_committed: bool) -> str:
        newest_good = None if self._context.newest_good is None else self._context.newest_good()
        return _describe_outcome(newest_good, is_committed=is_committed)

    def _raise(self, error: BaseException, *, is_committed: bool = False) -> NoReturn:
        """Raises a failure in the words of this library."""
        if isinstance(error, OSError) and not isinstance(error, CheckpointError):
            newest_good = None if self._context.newest_good is None else self._context.newest_good()
            raise write_error(self.store, error, newest_good, is_committed=is_committed) from error
        raise error

    def _object_names(self, attempt: Attempt) -> list[str]:
        process = 0 if self._together is None or self._together.is_local else self._together.index
        names = []
        for entry in self._plan.writes.objects:
            if entry.leaf is None:
                names.append(f"{attempt.data}/packs/{process}-{entry.index[0]}")
            else:
                chunk = ".".join(["c", *map(str, entry.index)])
                names.append(f"{attempt.data}/{self._plan.directories[entry.leaf]}/{chunk}")
        return names

    def _metadata_calls(
        self, attempt: Attempt, items: bytes | None, own_leaves: bytes | None
    ) -> list[Callable[[], None]]:
        """Writes of the ``zarr.json`` objects, which make the data directory a Zarr group, and of what is beside it."""
        contents: dict[str, bytes] = {}
        together = self._together
        process = 0 if together is None or together.is_local else together.index
        if items is not None:
            contents[f"{ITEMS_DIRECTORY}/{process}"] = items
        if own_leaves is not None:
            contents[f"{OWN_DIRECTORY}/{process}"] = own_leaves
        if together is not None and together.index != 0 and not together.is_local:
            return [functools.partial(attempt.put_metadata, name, data) for name, data in contents.items()]
        if together is None:  # in a group it is there already
            contents[METADATA_NAME] = group_metadata()
        contents |= self._plan.zarr_objects
        calls = [functools.partial(attempt.put_metadata, name, data) for name, data in contents.items()]
        if self._programs:
            calls.append(functools.partial(self._put_programs, attempt))
        return [*calls, attempt.put_root_group] if together is None else calls

    def _put_programs(self, attempt: Attempt) -> None:
        """Stores each program once; what the run has stored already gets another name."""
        store = None if self._context.earlier is None else self._context.earlier()
        stored = {} if store is None else _stored_programs(store)
        by_name = {_program_name(program): program for program in self._programs.values()}
        for name, program in by_name.items():
            earlier = stored.get(program.entry.sha256)
            if store is None or earlier is None:
                attempt.put_metadata(name, program.data)
            else:
                attempt.share_metadata(name, program.data, store, earlier)

    def _manifest(
        self, chunks: ChunkTable, objects: tuple[StoredObject, ...], parts: tuple[PartEntry, ...] = ()
    ) -> Manifest:
        assert self._attempt is not None
        owners: tuple[np.ndarray[Any, Any], ...] = ()
        owner_index = np.zeros(0, np.int32)
        if self._together is not None:
            owners, owner_index = self._plan.owners
        specs = self._plan.specs
        return Manifest(
            data=self._attempt.data,
            created_s=_possible_time(self._context.wall_s()),
            writer=library_versions(),
            metadata=self._metadata,
            nodes=self._flat.nodes,
            keys=self._flat.keys,
            specs=specs.specs,
            spec_index=specs.index,
            values=self._values,
            shardings=specs.shardings,
            directories=self._plan.directories,
            packs=() if parts else self._plan.writes.packs,
            chunks=NO_CHUNKS if parts else chunks,
            objects=objects,
            metrics=_read_metrics(self._metrics),
            programs={
                name: dataclasses.replace(
                    program.entry, name=f"{self._attempt.data}/{_program_name(program)}"
                )
                for name, program in self._programs.items()
            },
            parts=parts,
            owners=owners,
            owner_index=owner_index,
            local=(
                (self._together.index, self._together.count)
                if self._together is not None and self._together.is_local
                else None
            ),
        )


def _has_no_values(flat: FlatTree) -> bool:
    """Whether a tree says shapes only."""
    return bool(flat.leaves) and all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in flat.leaves)


def _program_name(program: ExportedProgram) -> str:
    """Path of a program's object below the data directory."""
    return f"{PROGRAMS_DIRECTORY}/{program.entry.sha256.hex()}"


def _stored_programs(store: Store) -> dict[bytes, str]:
    """Paths of the programs of another checkpoint, by their sha256; none if it cannot be read."""
    try:
        manifest = parse_manifest(store.read(MANIFEST_NAME, MANIFEST_BYTES_MAX), store.path)
    except (OSError, CheckpointError):
        return {}
    return {entry.sha256: entry.name for entry in manifest.programs.values()}


def _copy_metadata(metadata: Any) -> Any:
    """A copy, so that the caller may change the original while the save goes on."""
    try:
        copy = msgpack.unpackb(msgpack.packb(metadata))
        if _is_same_data(copy, metadata):
            return copy
        reason = "it would come back different (tuples become lists; dict keys must be str)"
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        reason = str(error)
    raise TypeError(
        f"metadata= must be plain data: None, bool, int, float, str, bytes, lists and dicts; {reason}"
    )


def _possible_time(time_s: float) -> float:
    """What a manifest can say of the time: clocks that were never set may be before 1970, or anywhere."""
    return min(max(0.0, time_s), TIME_S_MAX - 1.0) if math.isfinite(time_s) else 0.0


def _check_metrics(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers by name; those on devices are left there, and their way to the host begins."""
    checked: dict[str, Any] = {}
    names: list[Any] = list(metrics)
    for name in names:
        value = metrics[name]
        is_number = isinstance(value, (bool, int, float)) or getattr(value, "shape", None) == ()
        # An array of JAX that holds no number would fail only in the background.
        if isinstance(value, (jax.Array, np.ndarray, np.generic)):
            is_number &= _is_real(value.dtype)
        if not isinstance(name, str) or not is_number:
            raise TypeError(f"metrics= must be numbers by name; {name!r} is {value!r:.100}")
        if isinstance(value, jax.Array):
            value.copy_to_host_async()
            checked[name] = value
        else:
            checked[name] = float(value)
    return checked


def _is_real(dtype: Any) -> bool:
    """Whether a dtype holds numbers that a float can stand for."""
    return any(jnp.issubdtype(dtype, kind) for kind in (jnp.bool_, jnp.integer, jnp.floating))


def _read_metrics(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The numbers, waiting for devices where it must. One whose array is gone is NaN, which is never the best."""
    numbers: dict[str, float] = {}
    for name, value in metrics.items():
        try:
            numbers[name] = float(value)
        except RuntimeError:
            _log.warning("the metric %r was deleted or donated before it could be read", name)
            numbers[name] = math.nan
    return numbers


def _remote_object_bytes(options: SaveOptions, process_count: int) -> int:
    """Most bytes of a chunk or pack on an object store, where half of the memory is for objects that grow or are sent.

    Each of them takes up to twice its size. All processes of a group must come to the same.
    """
    if options.host_bytes_max is None and process_count > 1:
        return PACK_BYTES
    room = resolve_host_bytes_max(options.host_bytes_max, process_count) // 2
    in_memory = 2 * (options.io_threads + GROWING_OBJECTS)
    return min(PACK_BYTES, max(room // in_memory // BLOCK_BYTES, 1) * BLOCK_BYTES)


def _is_same_data(a: Any, b: Any) -> bool:
    """Whether two pieces of plain data are equal; NaN equals NaN."""
    if isinstance(a, list):
        return isinstance(b, list) and len(a) == len(b) and all(map(_is_same_data, a, b))
    if isinstance(a, dict):
        return (
            isinstance(b, dict)
            and a.keys() == b.keys()
            and all(map(_is_same_data, a.values(), map(b.get, a)))
        )
    if isinstance(a, float) and isinstance(b, float) and math.isnan(a):
        return math.isnan(b)
    return bool(a == b)


@functools.cache
def library_versions() -> dict[str, str]:
    """Versions of what wrote a checkpoint."""
    try:
        own = importlib.metadata.version("jaxckpt")
    except importlib.metadata.PackageNotFoundError:
        own = "unknown"
    return {
        "jaxckpt": own,
        "jax": jax.__version__,
        "jaxlib": importlib.metadata.version("jaxlib"),
        "numpy": np.__version__,
    }


def _describe_outcome(newest_good: str | None, *, is_committed: bool) -> str:
    if is_committed:
        return "the new checkpoint is in place and whole, but may be lost if the machine fails now"
    return f"nothing was committed; {newest_good or 'a checkpoint that was there before is still whole'}"


def _with_outcome(failure: CheckpointError, outcome: str) -> CheckpointError:
    """A failure of the group that also says what it left; that of a caller's mistake says so itself."""
    if type(failure) is not CoordinationError:
        return failure
    return CoordinationError(f"{failure}\n{outcome}", failure.failures, failure.problems)


def write_error(store: Store, error: OSError, newest_good: str | None, *, is_committed: bool) -> WriteError:
    """What storage answered, in the words of this library."""
    reason = error.strerror or str(error)
    place = f" ({error.filename})" if error.filename else ""
    name = errno.errorcode.get(error.errno or 0, "")
    state = _describe_outcome(newest_good, is_committed=is_committed)
    advice = "see that the bucket can be reached" if store.is_remote else "make room or mend the storage"
    message = (
        f"cannot save {store.path!r}: storage refused a write: {reason} {name}{place}\n"
        f"{state}\n{advice}, then save again"
    )
    return WriteError(message, error.errno)
