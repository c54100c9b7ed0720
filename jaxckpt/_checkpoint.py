"""The story: how a tree becomes a checkpoint, and a checkpoint a tree. Read this module first, top to bottom.

Save.     flatten -> inspect leaves -> plan -> begin an attempt -> snapshot (then the caller goes on)
          -> threads checksum and write the pieces -> metadata -> sync -> manifest: the commit.
Restore.  manifest -> match keys with ``like`` -> choose shardings -> plan reads -> read and verify -> place.

A blocking `save` differs from `save_async` and waiting in one thing: it hands the writer views of arrays that are in
host memory instead of copies. The rest is below: `_saving` runs a save, `_restoring` a restore, `_reading` shows what
is stored; `_keys` and `_leaves` know what a tree is, `_layout` what is written where, `_snapshot` the way from the
devices to the host, `_persist` and `_commit` the way to storage, `_naming`, `_matching`, `_resharding` and `_placement`
the way back.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import time
from collections.abc import Callable, Generator, Mapping
from typing import Any

import jax
from jax.sharding import Mesh, Sharding

from ._collective import CollectiveRestore
from ._config import RestoreOptions, SaveOptions, resolve_host_bytes_max
from ._exchange import is_exchange_wanted, plan_exchange
from ._items import check_items, load_items
from ._manifest import local_directory
from ._naming import Rename, Select
from ._pending import PendingSave
from ._placement import Target
from ._processes import current_group
from ._reading import Checkpoint, open_checkpoint
from ._restoring import (
    WantedTree,
    choose_targets,
    is_without_others,
    match_tree,
    outline_restore,
    plan_restore,
    report_restore,
    restore_targets,
)
from ._saving import CheckpointInfo, SaveContext, SaveJob
from ._storage import Store
from ._store import open_store

_log = logging.getLogger("jaxckpt")

Path = str | os.PathLike[str]
ShardingRule = Callable[[str, jax.ShapeDtypeStruct], Sharding]


def save(
    path: Path,
    tree: Any,
    *,
    overwrite: bool = False,
    items: Mapping[str, Any] | None = None,
    programs: Mapping[str, Any] | None = None,
    metadata: Any = None,
    local: bool = False,
    options: SaveOptions | None = None,
) -> CheckpointInfo:
    """Writes a pytree to a new checkpoint and returns when it is durable.

    Readers see the checkpoint from the commit on, whole; a crash before that leaves whatever was at ``path``
    untouched. Every byte gets a checksum.

    Args:
      path: Directory (or ``s3://``, ``gs://``, ``memory://`` URL) that holds no checkpoint yet.
      tree: Any pytree. Leaves are `jax.Array` of any shape, dtype and sharding, typed PRNG keys, `numpy.ndarray`,
        NumPy scalars, and Python int, float, complex, bool, str and bytes.
      overwrite: Whether a checkpoint at ``path`` may be replaced. The old one stays whole until the new one is.
      items: By name, what shall be kept beside the tree and committed with it: plain values, NumPy arrays, and
        objects with ``get_state`` and ``set_state`` (iterators of Grain) or ``state_dict`` and ``load_state_dict``,
        whose state of this moment is stored.
      programs: By name, functions of the tree to store beside it: `Program` or `jax.export.Exported`, which take the
        tree first. `Checkpoint.program` runs them without the code of the model. With a tree of
        `jax.ShapeDtypeStruct` s only the programs are saved.
      metadata: Plain data (what msgpack takes: None, bool, int, float, str, bytes, lists, dicts with str keys)
        to keep beside the tree; that of process 0 of a group.
      local: In a group of processes that share no storage: whether each keeps what its devices have, in
        ``process-<index>`` below ``path``. Only as many processes on the same mesh can restore that.
      options: See `SaveOptions`.

    Returns:
      What was written, and how long it took.

    Raises:
      UnsupportedLeafError: A leaf cannot be stored; raised before any I/O, with the keys of all such leaves.
      MissingDependencyError: Programs need ``flatbuffers``. What a program's function raises when it is traced is
        raised, too.
      ExistsError: A checkpoint is there and ``overwrite`` is False.
      WriteError: Storage refused a write. Nothing was committed.
      CoordinationError: In a group, any of these or other failures of any process; raised in all of them.
      ProcessMismatchError: In a group: the trees or arguments of the processes differ.

    Collective: all processes of a group call it with the same tree and arguments. Each writes a part, and items and
      values that it has for itself where they differ from those of process 0.
    Host memory: the packs under way, 64 MiB at most; large leaves in host memory are written without a copy.
    Blocks for: the whole write.

    Example:
      >>> info = jaxckpt.save(tmp / "a", {"w": jnp.ones((2, 3)), "step": 7})
      >>> jaxckpt.restore(tmp / "a")["step"]
      7
    """
    context = SaveContext(metadata=metadata, items=items, programs=programs)
    options = options or SaveOptions()
    place = _place_of_save(path, local=local)
    return SaveJob(place, tree, overwrite, context, options, is_blocking=True, is_local=local).run()


def save_async(
    path: Path,
    tree: Any,
    *,
    overwrite: bool = False,
    items: Mapping[str, Any] | None = None,
    programs: Mapping[str, Any] | None = None,
    metadata: Any = None,
    local: bool = False,
    options: SaveOptions | None = None,
) -> PendingSave:
    """Takes a snapshot of a pytree, then writes it in the background.

    When this returns, every leaf may be donated, deleted or overwritten: the checkpoint will hold the values of the
    moment of the call. A program that ends without waiting still finishes the write.

    Args:
      path: As for `save`.
      tree: As for `save`.
      overwrite: As for `save`.
      items: As for `save`.
      programs: As for `save`; they are exported before this returns, each once for equal trees.
      metadata: As for `save`.
      local: As for `save`.
      options: See `SaveOptions`; ``host_bytes_max`` bounds the snapshot.

    Returns:
      A `PendingSave`; its ``wait`` raises what went wrong in the background.

    Raises:
      UnsupportedLeafError, ExistsError: As for `save`.
      WriteError: Writing failed while the snapshot waited for room.
      CoordinationError, ProcessMismatchError: As for `save`; mostly raised by ``wait``, for the processes agree in the
        background.

    Collective: as for `save`.
    Host memory: the bytes of the tree, at most ``host_bytes_max`` at once.
    Blocks for: on accelerators the dispatch of one batched transfer; on CPU until the values are computed, and one
      copy of them. Longer when the snapshot has to wait for room.

    Example:
      >>> pending = jaxckpt.save_async(tmp / "a", {"w": jnp.ones((2, 3))})
      >>> pending.wait().leaves
      1

    Source: the split into snapshot and persist follows CheckFreq (Mohan et al., FAST 2021).
    """
    context = SaveContext(metadata=metadata, items=items, programs=programs)
    options = options or SaveOptions()
    place = _place_of_save(path, local=local)
    job = SaveJob(place, tree, overwrite, context, options, is_blocking=False, is_local=local)
    pending = PendingSave(job.store.path)
    try:
        pending.start(job)
    except BaseException:
        pending.mark_seen()
        raise
    return pending


def _place_of_save(path: Path, *, local: bool) -> Path | Store:
    """Where this process saves; with ``local``, each process of a group has a directory of its own."""
    group = current_group()
    if group is None or not local:
        return path
    return open_store(path).child(local_directory(group.index))


def open(path: Path) -> Checkpoint:
    """Opens a committed checkpoint by reading its manifest, and nothing else.

    Args:
      path: Directory or URL of the checkpoint.

    Returns:
      A `Checkpoint`: its keys, and its leaves as NumPy arrays, read as they are asked for.

    Raises:
      NotFoundError: No committed checkpoint is there.
      FormatError: The manifest is damaged, or needs a newer version.

    Example:
      >>> _ = jaxckpt.save(tmp / "a", {"w": jnp.arange(6.0).reshape(3, 2)})
      >>> ckpt = jaxckpt.open(tmp / "a")
      >>> ckpt.keys()
      ('w',)
      >>> ckpt["w"][1:].tolist()
      [[2.0, 3.0], [4.0, 5.0]]
    """
    return open_checkpoint(path)


def restore(
    path: Path | Checkpoint,
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
    items: Mapping[str, Any] | None = None,
    exchange: bool | None = None,
    mmap: bool = False,
    report: bool = False,
    options: RestoreOptions | None = None,
) -> Any:
    """Reads a checkpoint back as a pytree, bit for bit, onto whatever devices are there.

    Every byte is verified before it is used, except with ``mmap=True``. Each chunk is read once, however many devices
    need it.

    Without ``like`` the tree is rebuilt from the manifest: dicts, lists, tuples, None and OrderedDict exactly,
    namedtuples by their fields, other nodes as dicts of theirs. With ``like``, its node types come back.

    Shardings, first that applies: ``sharding``; ``mesh`` with the saved partition specs; the shardings of ``like``;
    the saved ones, on the saved devices or on a smaller mesh where there are fewer.

    Args:
      path: Directory or URL, or an open `Checkpoint`.
      like: Tree with the wanted structure. Leaves: `jax.Array` and `jax.ShapeDtypeStruct` (with or without a
        sharding) come back as `jax.Array`, `numpy.ndarray` as such, Python scalars as such, a `StoredLeaf` as saved.
      mesh: Mesh to put the saved partition specs on. Axes that it lacks are dropped, and a dimension that no longer
        divides falls back to fewer axes, which the log says.
      sharding: One `Sharding` for all arrays, a tree of them that is a prefix of the result, or a function
        ``f(key, jax.ShapeDtypeStruct) -> Sharding``.
      select: Glob pattern(s) over keys (``*`` also matches ``/``) or a predicate. Leaves that are not selected keep
        the leaf of ``like``; without ``like`` they are left out (None stands for them in sequences).
      rename: Mapping of saved keys or leading parts of them to new ones (``"/"`` behind both: only what is below;
        ``"/"`` alone is the root), or pairs (regular expression that matches a whole saved key, replacement). Several
        new names in a list, or in pairs of the same expression, all get the leaf. `Pieces` cuts a leaf or joins
        several, `Vocabulary` puts rows where their words are. A rule that fits nothing, or gives ``like`` nothing, is
        an error. Without ``like`` the result is a nest of dicts.
      missing: For leaves of ``like`` that are not on disk: ``"error"``, or ``"keep"`` the leaf of ``like``.
      unexpected: For leaves on disk that ``like`` does not have: ``"error"`` or ``"ignore"``.
      cast: Whether dtypes are converted to those of ``like``.
      reshape: Whether arrays take the shape of ``like`` when it has equally many elements.
      items: By name, objects that get back the state that they had when they were saved, as the last thing that
        happens. Saved values are read from `Checkpoint.items`.
      exchange: In a group of processes, whether leaves that several of them need are read once and moved between the
        devices by XLA. None: when the processes would otherwise read more than 1.5 times the bytes of the leaves, and
        each more than 128 KiB too much. What is wanted as NumPy arrays or Python values is read by each process in any
        case.
      mmap: Whether arrays on CPU may show the stored files instead of holding a copy, which takes milliseconds however
        large they are: a page is fetched when it is first used. That holds for boxes that are made of whole chunks of
        local files (on Linux); all else, and everything for other devices, is read and verified as usual.
        `RestoreReport.mapped` and the log say of which leaves it held. What is mapped is *not verified*, and it is only
        as stable as the files. Damage on disk becomes wrong values; `verify` of the same open `Checkpoint` finds it.
        Whoever overwrites a file in place changes the arrays, whoever truncates one ends the process when it touches
        them (SIGBUS), as does a disk that cannot read. Deleting the checkpoint is harmless, and so is replacing it with
        ``overwrite=True``. The files never change: what is written into the arrays' memory (by a computation that they
        are donated to, or into NumPy arrays) goes to private copies of its pages.
      report: Whether to return ``(tree, RestoreReport)``.
      options: See `RestoreOptions`.

    Returns:
      The tree, or the tree and a `RestoreReport`.

    Raises:
      NotFoundError: No committed checkpoint is there.
      FormatError: The manifest is damaged, or needs a newer version.
      CorruptError: Stored bytes are damaged; `.problems` names each by key, chunk and object.
      MismatchError: The tree and ``like`` differ, or an item is not there; `.problems` lists every difference.
      CoordinationError: Another process of the group failed or did not answer. What is wrong with the checkpoint is
        raised in all processes as the error that it is.

    Collective: in a group of processes all of them call it with the same arguments, unless ``like``, ``mesh`` or
      ``sharding`` say that no array spans processes: then each reads alone what is for its devices.
    Host memory: on CPU the arrays themselves and a few MiB for each reading thread; on accelerators, and for what is
      exchanged, at most ``host_bytes_max``, or one box of the largest array; of leaves that are made of `Pieces` or
      for a `Vocabulary` one at a time, and 64 MiB.
    Device memory: the arrays themselves, and ``device_bytes_max`` for what is exchanged.

    Example:
      >>> _ = jaxckpt.save(tmp / "a", {"w": jnp.ones((2, 3)), "b": jnp.zeros(3)})
      >>> jaxckpt.restore(tmp / "a", select="b")
      {'b': Array([0., 0., 0.], dtype=float32)}
    """
    began_s = time.perf_counter()
    options = options or RestoreOptions()
    together = _begin_together(path, like, mesh, sharding, options)
    with _telling_others(together):
        checkpoint = path if isinstance(path, Checkpoint) else open_checkpoint(path)
        bytes_before = 0 if checkpoint is not path else checkpoint.bytes_read
        if like is None:
            checkpoint.check_values()
        wanted = match_tree(
            checkpoint,
            like,
            select,
            rename,
            missing=missing,
            unexpected=unexpected,
            cast=cast,
            reshape=reshape,
        )
        check_items(items or {}, checkpoint.items if items else {}, checkpoint.path)
        targets = choose_targets(checkpoint, wanted, mesh, sharding)
        mapped: set[int] | None = set() if mmap else None
        tree = wanted.fill(_restore_targets(checkpoint, wanted, targets, options, together, exchange, mapped))
        bytes_read = checkpoint.bytes_read - bytes_before
        group_bytes_read = bytes_read if together is None else together.end(bytes_read)
    if items:
        load_items(items, checkpoint.items, checkpoint.path)
    if not (report or _log.isEnabledFor(logging.INFO)):
        return tree
    done = report_restore(
        checkpoint,
        wanted,
        targets,
        bytes_read=bytes_read,
        group_bytes_read=group_bytes_read,
        seconds=time.perf_counter() - began_s,
        mapped=mapped or (),
    )
    unread = f", {len(done.mapped)} of them mapped" if mmap else ""
    _log.info(
        "restored %s: %d leaves%s, %d bytes in %.3f s",
        done.path,
        len(targets),
        unread,
        done.nbytes,
        done.seconds,
    )
    return (tree, done) if report else tree


@contextlib.contextmanager
def _telling_others(together: CollectiveRestore | None) -> Generator[None]:
    """In a group: tells the other processes when this one fails, and raises what they raise."""
    if together is None:
        yield
        return
    try:
        yield
    except BaseException as error:
        failure = together.session.fail(error)
        if failure is error:
            raise
        raise failure from error
    finally:
        together.session.close()


def _begin_together(
    path: Path | Checkpoint, like: Any, mesh: Mesh | None, sharding: Any, options: RestoreOptions
) -> CollectiveRestore | None:
    """How the processes of the group restore together; None when there is one, or what is asked for is all its own."""
    group = current_group()
    if group is None or is_without_others(like, mesh, sharding):
        return None
    where = path.path if isinstance(path, Checkpoint) else os.fspath(path)
    return CollectiveRestore(group, f"restore {where!r}", options.timeout_s)


def _restore_targets(
    checkpoint: Checkpoint,
    wanted: WantedTree,
    targets: dict[int, Target],
    options: RestoreOptions,
    together: CollectiveRestore | None,
    exchange: bool | None,
    mapped: set[int] | None,
) -> dict[int, Any]:
    processes = 1 if together is None else together.count_machine_mates()
    group = current_group()
    process = 0 if group is None else group.index
    host_bytes_max = resolve_host_bytes_max(options.host_bytes_max, processes)
    plan = plan_restore(checkpoint, targets, host_bytes_max, options.io_threads)
    if together is None:
        return restore_targets(checkpoint, plan, options.io_threads, process, mapped)
    if mapped is not None and exchange is None:
        exchange = False  # what is mapped is not read at all
    outline = outline_restore(checkpoint, wanted, targets)
    outline = dataclasses.replace(
        outline, call=outline.call | {"exchange": exchange, "mmap": mapped is not None}
    )
    group_bytes = together.begin(outline, plan.nbytes)
    if not is_exchange_wanted(checkpoint, plan, group_bytes, exchange):
        return restore_targets(checkpoint, plan, options.io_threads, process, mapped)
    moved = plan_exchange(checkpoint, plan, together, exchange, host_bytes_max, options.device_bytes_max)
    if moved.numbers:
        rest = {number: target for number, target in targets.items() if number not in moved.numbers}
        plan = plan_restore(checkpoint, rest, host_bytes_max, options.io_threads)
    restored = restore_targets(checkpoint, plan, options.io_threads, process, mapped)
    return restored | moved.run(options.io_threads)
