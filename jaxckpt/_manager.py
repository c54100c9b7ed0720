"""How does a training loop keep a directory of numbered checkpoints?

`CheckpointManager.save` is called at every step. Most calls return at once: a `Schedule` says which are due. A due one
is a `PendingSave` into a directory of its own, ``step_00001200``. When that is committed, and never before, the rules
of `Retention` decide which older steps go, and a background thread deletes them.

    caller's thread      is it due? -> wait for the save in flight, or skip -> snapshot -> goes on
    background thread    write -> commit -> [the save is done] -> sweep, delete, checkpoint.json

The manager puts together those who do the work, and passes each call on to one of them:

    StepSaver     `save`, `save_last`: decides what becomes of a step, and begins its save (`_deciding`)
    Background    `wait`, `close`: the saves that go on, and the failures of which nobody knows (`_background`)
    StepReader    `restore`, `resume`, `open`: finds the newest step that is whole (`_resuming`)
    Keeper        `steps`, `prune`, `pin`, `delete`, `explain`: one for each of the two tiers (`_keeping`)
    Uploader      brings committed steps to the second tier (`_uploading`)

In a group of processes, process 0 decides and tells the others (`_leader`), all carry it out, and process 0 alone
deletes.

Invariants:

* The manager believes the directory alone: `steps` are the directories with a manifest, whoever wrote them.
* One save is in flight at a time. Its failure is logged, kept for `wait`, and changes nothing for the next save.
* Nothing is changed before the first `save`, so that any number of other processes may read with managers of their own.
* What is being read is not deleted: a reader holds the manifest (`Hold`), and the deletion is tried again after the
  next save.
* With a second tier (``upload_to=``) everything that is saved goes to the directory first; `_uploading` brings it on.
  What is read may come from either tier, and training waits for the first one only.
* All processes of a group open the same sessions in the same order: each is opened where numbers of steps, earlier
  decisions or the call itself say so, and nothing else.

Deliberately not here: when to save (`_schedule`), what to keep (`_retention`), what is in the directory (`_steps`), and
what of the work goes on in which of those above.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import sys
import time
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Literal, Self, final

from ._background import Background, raise_last
from ._config import SaveOptions
from ._deciding import SaveCall, StepSaver
from ._errors import CheckpointError, CoordinationError, NotFoundError
from ._events import CheckpointEvent, Events
from ._keeping import Keeper, checked_step
from ._leader import Leader
from ._manifest import local_directory
from ._pending import PendingSave
from ._preemption import Preemption
from ._processes import current_group
from ._reading import Checkpoint
from ._resuming import StepReader
from ._retention import Best, Retention, Verdict, best_step
from ._schedule import Schedule
from ._steps import StepDirectory
from ._storage import Store
from ._store import open_store
from ._terminal import ProgressBar
from ._uploading import Uploader, UploadOptions

_log = logging.getLogger("jaxckpt")


@final
class CheckpointManager:
    """A directory of numbered checkpoints, with rules for which steps to save and which to keep.

    Making one changes nothing on storage and reads nothing; the first `save` makes the directory and sweeps what
    crashed saves left there. One process may save into a directory; any number may read it.

    In a group of processes every process makes a manager with the same arguments and calls `save`, `restore`, `resume`,
    `prune`, `delete`, `pin`, `unpin`, `save_last` and `close` at the same points; it is made after
    ``jax.distributed.initialize``. Process 0 decides what depends on clocks, metrics, signals or storage, and deletes.
    When a process fails, its step fails in all with `CoordinationError`, and the next one is tried. What looks at the
    directory only (`steps`, `open`, `watch`, ...) and `wait` is each process's own.

    Rules for saving. A step is due when any of these says so; with none, every step is.

    Rules for keeping. A step stays if any of these keeps it; the newest always stays. See `explain`.

    Two tiers. With ``upload_to=`` steps are committed to ``directory``, which may be fast and mortal (a local disk,
    ``/dev/shm``), and committed steps are uploaded in the background; an upload is a whole checkpoint under the same
    name. What is read (`restore`, `resume`, `steps`, `open`, ...) is what either tier has; a step that both have is
    read from the directory, and from the second tier if it is damaged there. The first call of `save` begins to upload
    what an earlier run left, and the first save waits, ten seconds at most, to hear which steps are there already.
    `wait`, `close` and the end of the program wait for uploads; after a preemption `close` does so only as long as the
    grace lasts, and an interrupt of `close` while it does so ends that. Then the end of the program waits for the
    requests in flight alone, which on an object store take as long as ``timeout_s`` in the URL allows. A process that
    is killed meanwhile harms nothing.

    Args:
      directory: Directory (or ``s3://``, ``gs://``, ``memory://`` URL). In a group of processes it is one for all, or
        ``local=True``.
      save_interval_steps: Save when a multiple of so many steps is reached or passed.
      save_interval_s: Save when so many seconds have passed since the last save.
      save_steps: Save at these steps: any container of ints.
      save_when: Save when ``save_when(step, metrics)`` is true; asked when nothing else made the step due.
      save_first: Whether to save the first step of a run that did not resume.
      save_last: Whether `close` saves the last step that `save` was called with, if it was not due. Its tree is held
        until the next call, and is saved as it is at the end, with its items and metrics: a NumPy array that was
        changed since, or an iterator that has moved on, is saved in its later state.
      max_overhead: Largest share of the run's time, between 0 and 1, that the loop may spend blocked by saves. Saves
        by intervals (by default: every step) are put off until the share allows one more. On CPU a save waits for
        the computations that are queued, which counts too.
      if_busy: What a due save does while another one is in flight: ``"wait"`` for it, or ``"skip"``, and the next
        step is due. Forced saves and preemptions always wait.
      preemption: Announces the end of the process; then the next step is due, and `should_stop` becomes true. The
        manager installs it, and uninstalls it when it is closed.
      max_to_keep: The newest so many steps stay. None: all.
      keep_period: Every step that is a multiple of this stays.
      keep_interval_s: A step stays for each so many seconds of time between commits.
      best: The best steps by a metric stay; one `Best` or several.
      time_to_live_s: `max_to_keep` keeps no step that is older than this.
      pinned: These steps stay; see also `pin`.
      prefix: What the names of the steps' directories begin with.
      width: Least number of digits in those names. Any width is read.
      local: In a group of processes that share no storage: each keeps what its devices have, in
        ``process-<index>`` below ``directory``, which holds steps of its own. `restore` and `resume` take the newest
        step that all of them have. The rules for keeping must not depend on what differs by process, as metrics may.
      upload_to: Second tier: a directory or URL, for the steps of this directory alone. In a group of processes,
        process 0 uploads; with ``local=True`` each uploads what it has.
      upload: What is uploaded, and the rules by which it is kept there. By default everything is, for good.
      options: How a save is written, and how long the processes of a group wait for each other.
      on_event: Called with a `CheckpointEvent` for whatever happens, from several threads. What it raises is logged.
      progress: Whether to show a progress bar on stderr, if that is a terminal.
      monotonic_s: Clock for intervals and overhead, in seconds.
      wall_s: Clock for the times of checkpoints, in seconds since 1970.

    Example:
      >>> with jaxckpt.CheckpointManager(tmp / "run", save_interval_steps=2, max_to_keep=2) as manager:
      ...     for step in range(8):
      ...         _ = manager.save(step, {"w": jnp.full(3, step)}, metrics={"loss": 1 / (step + 1)})
      >>> manager.steps()
      [6, 7]
      >>> manager.restore()
      {'w': Array([7, 7, 7], dtype=int32, weak_type=True)}
    """

    def __init__(
        self,
        directory: str | os.PathLike[str] | Store,
        *,
        save_interval_steps: int | None = None,
        save_interval_s: float | None = None,
        save_steps: Container[int] = (),
        save_when: Callable[[int, Mapping[str, Any]], bool] | None = None,
        save_first: bool = False,
        save_last: bool = True,
        max_overhead: float | None = None,
        if_busy: Literal["wait", "skip"] = "wait",
        preemption: Preemption | None = None,
        max_to_keep: int | None = 5,
        keep_period: int | None = None,
        keep_interval_s: float | None = None,
        best: Best | Sequence[Best] | None = None,
        time_to_live_s: float | None = None,
        pinned: Iterable[int] = (),
        prefix: str = "step_",
        width: int = 8,
        local: bool = False,
        programs: Mapping[str, Any] | None = None,
        upload_to: str | os.PathLike[str] | Store | None = None,
        upload: UploadOptions | None = None,
        options: SaveOptions | None = None,
        on_event: Callable[[CheckpointEvent], None] | None = None,
        progress: bool = False,
        monotonic_s: Callable[[], float] = time.monotonic,
        wall_s: Callable[[], float] = time.time,
    ) -> None:
        if if_busy not in ("wait", "skip"):
            raise ValueError(f"if_busy must be 'wait' or 'skip', not {if_busy!r}")
        options = options or SaveOptions()
        store = open_store(directory)
        remote_store = _open_second_tier(store, upload_to, upload)
        group = current_group()
        is_first = group is None or group.index == 0
        self._is_local = local and group is not None
        if self._is_local and group is not None:
            store = store.child(local_directory(group.index))
            remote_store = remote_store and remote_store.child(local_directory(group.index))
        self._directory = StepDirectory(store, prefix, width)
        self._leader = None if group is None else Leader(group, store.path, options.timeout_s, monotonic_s)
        schedule = Schedule(
            interval_steps=save_interval_steps,
            interval_s=save_interval_s,
            steps=save_steps,
            when=save_when,
            save_first=save_first,
            max_overhead=max_overhead,
            clock=monotonic_s,
        )
        self._retention = Retention(
            max_to_keep=max_to_keep,
            keep_period=keep_period,
            keep_interval_s=keep_interval_s,
            best=(best,) if isinstance(best, Best) else tuple(best or ()),
            time_to_live_s=time_to_live_s,
            pinned=frozenset(pinned),
        )
        events = Events(on_event)
        self._tell = events.tell
        self._background = Background(events.tell)
        self._keeper = Keeper(self._directory, self._retention, wall_s, events.tell)
        # Where steps are, the nearest place first.
        self._tiers = [self._keeper]
        self._uploader: Uploader | None = None
        if remote_store is not None:
            upload = upload or UploadOptions()
            remote_directory = StepDirectory(remote_store, prefix, width)
            tell_of_remote = functools.partial(events.tell_of_upload, remote_directory.path)
            remote = Keeper(remote_directory, upload.retention(), wall_s, tell_of_remote)
            self._tiers.append(remote)
            if is_first or self._is_local:
                on_end = functools.partial(self._background.note_upload_end, remote_directory.path)
                self._uploader = Uploader(self._keeper, remote, upload, events.tell, on_end, wall_s)
        self._reader = StepReader(self._tiers, self._leader, events.tell, is_local=self._is_local)
        self._saver = StepSaver(
            self._tiers,
            self._uploader,
            schedule,
            self._background,
            self._leader,
            events,
            is_local=self._is_local,
            saves_last=save_last,
            skips_if_busy=if_busy == "skip",
            best_metrics=[rule.metric for rule in self._retention.best],
            options=options,
            bar=ProgressBar(sys.stderr) if progress and is_first else None,
            monotonic_s=monotonic_s,
            wall_s=wall_s,
        )
        self._monotonic_s = monotonic_s
        self._programs = programs
        self._is_closed = False
        if preemption is not None:
            self.use_preemption(preemption)

    # --- saving -----------------------------------------------------------------------------------------------

    def save(
        self,
        step: int,
        tree: Any,
        *,
        metrics: Mapping[str, Any] | None = None,
        items: Mapping[str, Any] | None = None,
        metadata: Any = None,
        programs: Mapping[str, Any] | None = None,
        force: bool = False,
        overwrite: bool = False,
    ) -> PendingSave | None:
        """Saves a step if it is due; to be called at every step, always from the same thread.

        A step is saved once: another call for it returns None. When storage refuses, training is not stopped: the
        result is a `PendingSave` that has failed, the failure is logged, and the next save is tried as if nothing had
        happened.

        Args:
          step: Number of the step, from 0.
          tree: As for `jaxckpt.save`. When this returns, it may be donated.
          metrics: Numbers by name, on devices too, to choose the best steps by.
          items: As for `jaxckpt.save`.
          metadata: As for `jaxckpt.save`.
          programs: As for `jaxckpt.save`; None: those of the manager.
          force: Whether to save although the step is not due.
          overwrite: Whether to replace the step if it is there. That makes no step due, but for the one that was saved
            last, was resumed from, or was not saved at the last due call because it was there.

        Returns:
          The save, or None: the step was not due, is there already, or was skipped because another save is in flight.
          On preemption with too little time for another save, the one in flight.

        Raises:
          UnsupportedLeafError: As for `jaxckpt.save`; in a group, `CoordinationError` with this as its cause.
          ProcessMismatchError: In a group: the processes called this with different steps or trees, or called something
            else. When that is found after this returned, ``wait`` of the result raises it.
          ValueError: The manager is closed.

        Collective: all processes of a group, with the same step and equal trees. ``save_when`` and metrics count in
          process 0 only.
        Host memory: as for `save_async`; the snapshots of all saves together stay within ``host_bytes_max``.
        Blocks for: less than 20 microseconds when not due; else as `save_async`, after the save in flight. In a group,
          a due step waits for process 0 to come to it and to say so, a millisecond or more. So does a step that is not
          due, always with ``save_when``, and now and then with a rule that looks at the clock (``save_interval_s``,
          ``max_overhead``, a preemption without jax's service): at most once in 256 calls while there is time, and 2
          log2(n) times in an interval of n calls; saves are late by a hundredth of the interval.

        Example:
          >>> manager = jaxckpt.CheckpointManager(tmp / "run", save_interval_steps=100)
          >>> manager.save(99, {"w": jnp.ones(3)}) is None
          True
          >>> manager.save(100, {"w": jnp.ones(3)}).wait().step
          100
        """
        step = checked_step(step)
        if self._is_closed:
            raise ValueError(f"the manager of {self.directory!r} is closed")
        if programs is None:
            programs = self._programs
        call = SaveCall(step, tree, metrics, items, metadata, programs)
        return self._saver.save(call, force=force, overwrite=overwrite)

    # --- keeping ----------------------------------------------------------------------------------------------

    def explain(self) -> list[Verdict]:
        """Says of every step whether the rules keep it, as the directory is, and why; changes nothing.

        A step that goes is deleted after the next save, unless somebody reads it. That save is one step more, so that
        others may go, too.

        Returns:
          One verdict for each committed step, ascending.

        Example:
          >>> manager = jaxckpt.CheckpointManager(tmp / "run", max_to_keep=1, keep_period=2)
          >>> for step in range(4):
          ...     _ = manager.save(step, {"w": jnp.ones(3)})
          >>> manager.wait()
          >>> for verdict in manager.explain():
          ...     print(verdict)
          step 0 stays: every 2 steps
          step 2 stays: every 2 steps
          step 3 stays: the newest step; one of the newest 1
        """
        return self._keeper.explain()

    def prune(self) -> list[int]:
        """Deletes the steps that no rule keeps, without saving.

        Returns:
          The steps that were deleted. Those that somebody reads, the one that training goes on from, and those that
          still have to be uploaded stay. A second tier is pruned by its own rules; what is deleted there is not told.

        Collective: all processes of a group. Process 0 deletes.

        Example:
          >>> with jaxckpt.CheckpointManager(tmp / "run", max_to_keep=None) as manager:
          ...     for step in range(4):
          ...         _ = manager.save(step, {"w": jnp.ones(3)})
          >>> jaxckpt.CheckpointManager(tmp / "run", max_to_keep=1).prune()
          [0, 1, 2]
        """
        self._background.wait_until_done()
        return list(self._in_first("prune", self._prune))

    def _prune(self) -> list[int]:
        for keeper in self._tiers[1:]:
            keeper.prune()
        return self._keeper.prune()

    def delete(self, step: int) -> None:
        """Deletes a step, whatever the rules say, in both tiers if there are two.

        Raises:
          NotFoundError: There is no such step.
          CheckpointError: Somebody is reading it.

        Collective: all processes of a group. Process 0 deletes.
        """
        self._background.wait_until_done()
        self._in_first("delete from", functools.partial(self._delete, step))
        for keeper in self._tiers:
            keeper.note_deleted(step)
        self._tell("deleted", step, f"deleted step {step}: asked for")

    def _delete(self, step: int) -> None:
        with contextlib.nullcontext() if self._uploader is None else self._uploader.without(step):
            for keeper in self._that_have(step):
                with contextlib.suppress(NotFoundError):  # a rule deletes it at this moment
                    keeper.delete(step)

    def _that_have(self, step: int) -> list[Keeper]:
        """The tiers that have a step."""
        step = checked_step(step)
        having = [keeper for keeper in self._tiers if keeper.directory.fingerprint_of(step) is not None]
        if not having:
            self._keeper.require(step)
        return having

    def pin(self, step: int) -> None:
        """Marks a step so that every manager keeps it, in later runs too.

        Raises:
          NotFoundError: There is no such step.

        Collective: all processes of a group.
        """
        self._in_first("pin in", functools.partial(self._pin, step))

    def unpin(self, step: int) -> None:
        """Takes the mark of `pin` away.

        Collective: all processes of a group.
        """
        self._in_first("unpin in", functools.partial(self._unpin, step))

    def _pin(self, step: int) -> None:
        for keeper in self._that_have(step):
            keeper.pin(step)

    def _unpin(self, step: int) -> None:
        for keeper in self._that_have(step):
            keeper.unpin(step)

    def _in_first(self, doing: str, act: Callable[[], Any]) -> Any:
        """Calls something in the process that keeps the directory, while the others wait for its result."""
        if self._leader is None:
            return act()
        if not self._is_local:
            # All have come this far: what one of them reads in this thread is not deleted under it.
            return self._leader.agree(doing, None, lambda _: act())
        with self._leader.session(doing, (CheckpointError, NotFoundError)) as session:
            result = act()
            session.agree("done", b"", lambda _: b"")
        return result

    # --- what is there ----------------------------------------------------------------------------------------

    def steps(self) -> list[int]:
        """The committed steps, ascending.

        Those that `restore` found damaged are left out, and one whose save failed at the very last sync: it is there,
        but may be gone when the machine fails.
        """
        return sorted({step for keeper in self._tiers for step in keeper.steps()})

    def latest_step(self) -> int | None:
        """The newest committed step, or None."""
        return max((step for keeper in self._tiers for step in keeper.steps()), default=None)

    def best_step(self, best: Best | None = None) -> int | None:
        """The best committed step by a metric; by default that of the first rule ``best=``.

        Raises:
          ValueError: Neither the manager nor the caller has a rule.
        """
        if best is None:
            if not self._retention.best:
                raise ValueError("the manager has no rule for the best step: pass best=jaxckpt.Best(...)")
            best = self._retention.best[0]
        # Of a step that both tiers have, what the nearer one says counts.
        metrics = {
            record.step: record.metrics for keeper in reversed(self._tiers) for record in keeper.records()
        }
        return best_step([*metrics], [*metrics.values()], best)

    def metrics(self, step: int) -> dict[str, float]:
        """The metrics that were saved with a step.

        Raises:
          NotFoundError: There is no such step.
        """
        return self.open(step).metrics

    def path_of(self, step: int) -> str:
        """Where a committed step is.

        Raises:
          NotFoundError: There is no such step.
        """
        return self._reader.path_of(step)

    def open(self, step: int | None = None) -> Checkpoint:
        """Opens a step as `jaxckpt.open` does, by default the newest.

        Raises:
          NotFoundError: There is no such step.
          FormatError: Its manifest is damaged, or needs a newer version.
        """
        if step is not None:
            return self._reader.open(step)
        newest = self.latest_step()
        while newest is not None:
            try:
                return self._reader.open(newest)
            except NotFoundError:
                before, newest = newest, self.latest_step()
                if newest == before:
                    raise
        raise NotFoundError(f"no step is committed in {self._directory.path!r}")

    @property
    def directory(self) -> str:
        """Where the steps are."""
        return self._directory.path

    # --- restoring --------------------------------------------------------------------------------------------

    def restore(
        self, step: int | None = None, like: Any = None, *, fallback: bool = True, **keywords: Any
    ) -> Any:
        """Restores a step, by default the newest one that is whole.

        A save in flight is waited for. When the newest step proves damaged, that is logged, and the one before it is
        taken; the damaged one is left alone, counts no more, and may be saved anew. A step that was asked for is never
        replaced by another. With two tiers, a step that is damaged in the nearer one is read from the other, and what
        comes from there is not copied back.

        Args:
          step: The step; None for the newest one that is whole.
          like: As for `jaxckpt.restore`.
          fallback: Whether a damaged newest step is passed over, rather than raised.
          **keywords: As for `jaxckpt.restore`: ``items``, ``mesh``, ``sharding``, ``select``, ...

        Returns:
          What `jaxckpt.restore` returns.

        Raises:
          NotFoundError: There is no such step, or none at all.
          CorruptError: The step is damaged, or all are.
          FormatError: Its manifest is damaged or needs a newer version.
          MismatchError: The tree and ``like`` differ.
          CoordinationError: In a group: as for `jaxckpt.restore`.

        Collective: all processes of a group, even where `jaxckpt.restore` would not be. They restore one step, which
          process 0 chooses; what one of them finds damaged is passed over by all.

        Example:
          >>> manager = jaxckpt.CheckpointManager(tmp / "run")
          >>> for step in (1, 2):
          ...     _ = manager.save(step, {"w": jnp.full(2, step)})
          >>> manager.restore()["w"].tolist(), manager.restore(1)["w"].tolist()
          ([2, 2], [1, 1])
        """
        return self._restore(step, like, fallback, keywords)[1]

    def resume(self, like: Any = None, *, fallback: bool = True, **keywords: Any) -> tuple[int, Any] | None:
        """Restores the newest step that is whole, for the start of a loop.

        Args:
          like: As for `jaxckpt.restore`.
          fallback: As for `restore`.
          **keywords: As for `jaxckpt.restore`.

        Returns:
          The step and the tree, or None when no step is committed.

        Raises:
          CorruptError: There are steps, and all of them are damaged.
          MismatchError: The tree and ``like`` differ.

        Collective: as for `restore`.

        Example:
          >>> manager = jaxckpt.CheckpointManager(tmp / "run")
          >>> step, state = manager.resume() or (0, {"w": jnp.zeros(2)})
          >>> step
          0
        """
        self._background.wait_until_done()
        if self._reader.has_nothing():
            return None
        step, tree = self._restore(None, like, fallback, keywords)
        self._saver.begin_from(step)
        return step, tree

    def _restore(
        self, step: int | None, like: Any, fallback: bool, keywords: dict[str, Any]
    ) -> tuple[int, Any]:
        self._background.wait_until_done()
        if step is None:
            step, tree = self._reader.read_newest(like, keywords, fallback=fallback)
        else:
            step = checked_step(step)
            tree = self._reader.read(step, like, keywords)
        if not self._saver.has_seen_steps:
            self._saver.begin_from(step)
        self._tell("restored", step, f"restored step {step}")
        return step, tree

    def watch(
        self, *, timeout_s: float | None = None, poll_s: float = 1.0, after: int | None = None
    ) -> Iterator[int]:
        """Yields the newest step of the directory and then each new one, for an evaluator in another process.

        While the loop's body runs, the step is held: the process that saves does not delete it. (It is where the file
        system has locks, which local ones and NFS do.) Steps that were deleted before their turn are passed over.

        Args:
          timeout_s: Ends when no new step came for so many seconds; None waits for ever. The time that the loop's
            body takes does not count.
          poll_s: Seconds between two looks at the directory.
          after: Yields the steps above this one; None begins with the newest that is there.

        Example:
          >>> manager = jaxckpt.CheckpointManager(tmp / "run")
          >>> manager.save(3, {"w": jnp.ones(3)}).wait().step
          3
          >>> [manager.restore(step)["w"].sum() for step in manager.watch(timeout_s=0)]
          [Array(3., dtype=float32)]
        """
        return self._directory.watch(timeout_s, poll_s, after, self._monotonic_s)

    # --- the end ----------------------------------------------------------------------------------------------

    def wait(self, timeout_s: float | None = None) -> None:
        """Waits until nothing is in flight and old steps are deleted; in a group, those that this process deletes.

        Uploads are waited for, too, in the process that uploads.

        Args:
          timeout_s: Most seconds to wait for the save in flight, and for uploads; None waits for ever.

        Raises:
          TimeoutError: The save is not finished, or an upload.
          CheckpointError: A save failed since the last `wait`. The next one may have gone well. Or the upload of a step
            failed, which is not uploaded yet.
        """
        began_s = time.monotonic()
        self._background.wait_until_idle(timeout_s)
        if self._uploader is not None:
            left_s = None if timeout_s is None else max(0.0, timeout_s - (time.monotonic() - began_s))
            if not self._uploader.wait(left_s):
                raise TimeoutError(
                    f"uploads to {self._tiers[-1].directory.path!r} are not finished after {timeout_s} s"
                )
        raise_last(self._background.take_failures())

    def close(self) -> None:
        """Saves the last step if it is not saved yet, waits, and ends the manager; again: nothing.

        To be called before the program ends: in an exit handler Python 3.12 starts no thread for another save.

        In a group with a second tier all processes wait for the uploads of process 0; with ``local=True`` of all.

        Raises:
          CheckpointError: A save failed, or an upload, and neither `wait` nor `PendingSave.wait` has raised that yet.

        Collective: all processes of a group.
        """
        if self._is_closed:
            return
        try:
            self.save_last()
        finally:
            self._end(is_together=True)
        raise_last([pending for pending in self._background.take_failures() if pending.is_unseen()])

    def save_last(self) -> PendingSave | None:
        """Saves the step that `save` was called with last, if it is not saved; `close` does so too.

        Returns:
          The save, or None: that step is saved or was donated, or the manager was made with ``save_last=False``.

        Collective: all processes of a group.
        """
        return self._saver.save_last()

    def _end(self, *, is_together: bool) -> None:
        try:
            self._background.wait_until_idle()
            if is_together:
                self._finish_uploads_together()
            else:
                self._finish_uploads()
        finally:  # an interrupt, too
            self._is_closed = True
            if self.preemption is not None:
                self.preemption.uninstall()

    def _finish_uploads(self) -> None:
        if self._uploader is not None:
            self._uploader.finish(self._grace_left_s)

    def _finish_uploads_together(self) -> None:
        """Those of all processes: JAX ends them all if one comes to the end of its program minutes before another."""
        if self._leader is None or len(self._tiers) == 1:
            self._finish_uploads()
            return
        try:
            self._leader.do_together("finish uploads of", self._finish_uploads, of_all=self._is_local)
        except CoordinationError as error:
            _log.warning("the uploads of other processes are not waited for: %s", error)

    def _grace_left_s(self) -> float | None:
        """Seconds until the process is ended, as far as is known."""
        return None if self.preemption is None else self.preemption.remaining_s()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
            return
        # Whatever ended the loop is what the caller must see. The tree may be half a step: it is not saved.
        self._saver.forget_last()
        if self._leader is not None and not self._is_closed:
            self._leader.leave(error)  # the others may wait for this process
        self._end(is_together=False)

    # --- preemption and events --------------------------------------------------------------------------------

    def use_preemption(self, preemption: Preemption) -> None:
        """Saves at the step at which this announces the end; installs it.

        Raises:
          RuntimeError: This is not the main thread.
        """
        preemption.install()
        if self.preemption is not None and self.preemption is not preemption:
            self.preemption.uninstall()
        self._saver.preemption = preemption

    def add_listener(self, listener: Callable[[int, Any], None]) -> None:
        """Calls ``listener(step, tree)`` right before each save, in the thread that saves."""
        self._saver.listeners.append(listener)

    @property
    def is_in_group(self) -> bool:
        """Whether there are other processes, whose managers do the same."""
        return self._leader is not None

    def hear_first(self, answer: bool) -> bool:
        """What process 0 answers; alone, what this process does.

        Collective: all processes of a group.
        """
        return answer if self._leader is None else bool(self._leader.tell("answer for", lambda: answer))

    @property
    def preemption(self) -> Preemption | None:
        """What announces the end of the process."""
        return self._saver.preemption

    @property
    def should_stop(self) -> bool:
        """Whether the end of the process is announced and its step was saved: the loop should leave."""
        return self._saver.has_answered_preemption


def _open_second_tier(
    directory: Store, upload_to: str | os.PathLike[str] | Store | None, upload: UploadOptions | None
) -> Store | None:
    if upload_to is None:
        if upload is not None:
            raise ValueError("upload= says how to upload, but there is no upload_to=")
        return None
    store = open_store(upload_to)
    if store.path == directory.path:
        raise ValueError(f"upload_to= must be another place than the directory, {directory.path!r}")
    return store
