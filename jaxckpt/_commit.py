"""When does a checkpoint exist, and why can no crash leave half of one?

A save is an *attempt*. It writes all its objects below a data directory whose name nobody has used before and, when
every one of them is durable, publishes the manifest, which names that directory. There is exactly one instant at
which anything changes for a reader: the rename of the manifest.

    1. begin     look whether a checkpoint is there already; make and hold a new directory ``data-<attempt>``
    2. write     objects below it, each synced before it counts as written            (`_persist`)
    3. metadata  the ``zarr.json`` objects, synced too
    4. sync      every directory that got a new entry, from the leaves to the root
    5. publish   manifest to a temporary name, sync, rename, sync the directory       <- the commit
    6. sweep     an overwrite deletes the data directory that the old manifest named

`retract` deletes a checkpoint in the opposite order: the manifest first, durably, then the rest.

A crash before 5 leaves the old manifest, or none, and a data directory that nothing names. A crash in 5 leaves the old
manifest or the new one, since a rename is atomic, and a temporary file that nothing names. A crash in 6 leaves both
data directories; the old one is not named any more. The order of 2 to 5 holds for power loss too, as far as the
storage keeps its promise on fsync: when the new name of the manifest is durable, so is everything that it says.

Nothing old is deleted before 5 is durable, so that an overwrite never has a moment without a whole checkpoint. Nothing
but the manifest is ever renamed, so that the same order of steps works on object stores, and nothing in a checkpoint
is an absolute path, so that ``cp -r`` of it is valid. Data directories of other attempts are left alone by a save, for
their writer may be alive; the manager, which owns its directory, sweeps them: a living writer holds its data directory
(`Hold`), and one whose directory was swept all the same fails in 4, where that directory must be there. Only if there
are no locks and the sweep was cut off may such a writer commit what is not whole; restoring it finds what is missing.

On object stores 5 is one request, the manifest's PUT. One that was not answered may still be carried out, so that an
attempt whose commit failed leaves its data to the next sweep: what that manifest names is there if it comes.

Deliberately not here: which objects there are (`_layout`), and what the manifest says (`_manifest`).
"""

from __future__ import annotations

import contextlib
import errno
import re
import secrets
import threading
from typing import final

import xxhash

from ._encoding import MANIFEST_BYTES_MAX, encode_manifest, parse_manifest
from ._errors import CheckpointError, ExistsError
from ._manifest import MANIFEST_NAME, Manifest, StoredObject
from ._storage import Hold, Store, cut_off_name
from ._zarr import METADATA_NAME, group_metadata

# In the directory of a step: the retention of its manager keeps it.
PIN_NAME = "pinned"
_DATA_NAME = re.compile(r"data-[0-9a-f]{16}")

# Commits of one process take turns, so that of several overwrites of one path each removes the one that it replaced.
_commit_lock = threading.Lock()


@final
class Attempt:
    """One attempt to commit a checkpoint."""

    def __init__(self, store: Store, data: str, may_overwrite: bool, *, is_guest: bool = False) -> None:
        """An attempt whose data directory is there.

        Args:
          store: Where the checkpoint will be.
          data: Name of the data directory.
          may_overwrite: Whether a checkpoint may be replaced.
          is_guest: Whether another process made the directory, and commits or abandons the attempt.
        """
        self.store = store
        self.data = data
        self._may_overwrite = may_overwrite
        self._is_guest = is_guest
        self._objects: list[StoredObject] = []
        self._is_publishing = False
        self._replaced: tuple[str | None, bytes | None] = (None, None)
        self._hold: Hold | None = None if is_guest else store.hold_alone(data)

    def put_metadata(self, name: str, data: bytes) -> None:
        """Writes a metadata object below the data directory and remembers its checksum."""
        self._put(f"{self.data}/{name}", data)

    def share_metadata(self, name: str, data: bytes, source: Store, source_name: str) -> None:
        """As `put_metadata`, without storing the bytes again if an object of another checkpoint has them."""
        path = f"{self.data}/{name}"
        if not self.store.link(path, data, source, source_name):
            self.store.put(path, data)
        self._remember(path, data)

    def put_root_group(self) -> None:
        """Writes the root's group metadata, which is the same for every attempt, unless it is there."""
        data = group_metadata()
        self._remember(METADATA_NAME, data)
        if not self.store.exists(METADATA_NAME) or self.store.read(METADATA_NAME, len(data)) != data:
            self.store.publish(METADATA_NAME, data)

    @property
    def metadata_objects(self) -> tuple[StoredObject, ...]:
        """The metadata objects written so far, by name."""
        return tuple(sorted(self._objects, key=lambda entry: entry.name))

    def commit(self, manifest: Manifest, *, keeps_replaced: bool = False) -> int:
        """Makes the checkpoint exist; returns the bytes of the manifest.

        Args:
          manifest: Of the checkpoint.
          keeps_replaced: Whether the data of the one that was there stays until `forget_replaced` or `take_back`.

        Raises:
          ExistsError: Somebody else committed here meanwhile and overwriting is not allowed.
        """
        data = encode_manifest(manifest)
        self.store.sync()
        self._require_data()
        with _commit_lock:
            self._replaced = self._look_for_replaced()
            self._is_publishing = True
            try:
                self.store.publish_next(MANIFEST_NAME, data, may_replace=self._may_overwrite)
            except FileExistsError as error:
                self._is_publishing = False  # no request was sent
                raise ExistsError(_exists_message(self.store)) from error
        self._end_hold()
        if not keeps_replaced:
            self.forget_replaced()
        return len(data)

    def _require_data(self) -> None:
        """Finds out that somebody swept what this attempt wrote; on file systems `Store.sync` does."""
        first = f"{self.data}/{METADATA_NAME}"
        if self.store.is_remote and not self.store.exists(first):
            what = "somebody deleted what this save wrote; is another manager at work there?"
            raise FileNotFoundError(errno.ENOENT, what, f"{self.store.path}/{first}")

    def forget_replaced(self) -> None:
        """Deletes the data of the checkpoint that was there before, as far as nobody reads it."""
        old_data, self._replaced = self._replaced[0], (None, None)
        if old_data is None:
            return
        # The new checkpoint exists, whatever becomes of the old one's objects. Who reads them may go on.
        with contextlib.suppress(OSError):
            hold = self.store.hold_alone(old_data)
            try:
                self.store.delete_tree(old_data)
            finally:  # whoever keeps the exception keeps this frame
                if hold is not None:
                    hold.release()

    def take_back(self) -> None:
        """Undoes a commit with ``keeps_replaced``: what was there before is there again, or nothing."""
        manifest_bytes, self._replaced = self._replaced[1], (None, None)
        if manifest_bytes is None:
            retract(self.store)
        else:
            self.store.publish_next(MANIFEST_NAME, manifest_bytes)

    def _end_hold(self) -> None:
        if self._hold is not None:
            self._hold.release()

    def _look_for_replaced(self) -> tuple[str | None, bytes | None]:
        """Data directory and manifest of the checkpoint that is there now, which may be younger than this attempt."""
        if not self.store.exists(MANIFEST_NAME):
            return None, None
        if not self._may_overwrite:
            raise ExistsError(_exists_message(self.store))
        manifest_bytes = self.store.read(MANIFEST_NAME, MANIFEST_BYTES_MAX)
        # A damaged manifest names no directory that could be deleted safely; it is replaced all the same.
        with contextlib.suppress(CheckpointError):
            return parse_manifest(manifest_bytes, self.store.path).data, manifest_bytes
        return None, manifest_bytes

    def expect_commit(self) -> None:
        """From here on another process may commit this attempt."""
        self._is_publishing = True

    def is_committed(self) -> bool:
        """Whether the manifest names this attempt; also when that cannot be found out."""
        if not self._is_publishing:
            return False
        try:
            if not self.store.exists(MANIFEST_NAME):
                return False
            return (
                parse_manifest(self.store.read(MANIFEST_NAME, MANIFEST_BYTES_MAX), self.store.path).data
                == self.data
            )
        except CheckpointError:  # a damaged one that was to be replaced
            return False
        except OSError:
            return True

    def abandon(self) -> None:
        """Deletes what the attempt wrote, as far as storage lets it, unless it is committed after all.

        It is when only the sync after the rename failed, and when somebody interrupts the sweep.
        """
        if self._is_guest:
            return
        # A request without an answer may be carried out later: what that manifest names must be there then.
        may_come = self._is_publishing and self.store.is_remote
        if not may_come and not self.is_committed():
            with contextlib.suppress(OSError):
                self.store.delete_tree(self.data)
                if not self.store.exists(MANIFEST_NAME):
                    self.store.remove_if_empty()
        self._end_hold()

    def _put(self, name: str, data: bytes) -> None:
        self.store.put(name, data)
        self._remember(name, data)

    def _remember(self, name: str, data: bytes) -> None:
        self._objects.append(StoredObject(name, len(data), xxhash.xxh3_128_digest(data)))


def begin(store: Store, *, may_overwrite: bool, data: str | None = None) -> Attempt:
    """Starts an attempt.

    Args:
      store: Where the checkpoint will be.
      may_overwrite: Whether a checkpoint may be replaced.
      data: Name of the data directory; None takes a new one.

    Raises:
      ExistsError: A committed checkpoint is there and overwriting is not allowed.
    """
    if not may_overwrite and store.exists(MANIFEST_NAME):
        raise ExistsError(_exists_message(store))
    data = data or new_data_name()
    store.make_directory(data)
    return Attempt(store, data, may_overwrite)


def new_data_name() -> str:
    """A name that no attempt has had."""
    return f"data-{secrets.token_hex(8)}"


def join(store: Store, data: str) -> Attempt:
    """Takes part in an attempt that another process began, and whose first object is there.

    Raises:
      CheckpointError: This process does not see that object: the processes do not share a file system.
    """
    if not store.exists(f"{data}/{METADATA_NAME}"):
        raise CheckpointError(
            f"{store.path!r} is not the same directory for all processes: process 0 wrote {data}/{METADATA_NAME} there,"
            " and this process does not see it\n"
            "save to a file system that all processes share, or pass local=True: each process then keeps what it has"
        )
    store.make_directory(data)  # from here on it is missed, and not made anew, if somebody deletes it
    return Attempt(store, data, False, is_guest=True)


def _exists_message(store: Store) -> str:
    return f"a checkpoint is already at {store.path!r}\npass overwrite=True to replace it, or choose another path"


def retract(store: Store) -> bool:
    """Deletes a checkpoint; False when somebody is reading it, and then nothing is deleted.

    The manifest goes first, durably: a crash in the middle leaves a directory without one, which is no checkpoint.
    """
    try:
        hold = store.hold_alone(MANIFEST_NAME)
    except FileNotFoundError:
        hold = None
    except BlockingIOError:
        return False
    try:
        store.delete(MANIFEST_NAME)
    finally:  # whoever keeps the exception keeps this frame
        if hold is not None:
            hold.release()
    sweep(store)
    return True


def sweep(store: Store) -> list[str]:
    """Deletes what attempts left that the manifest does not name, or all when there is no manifest.

    What a living writer holds stays, and so does whatever jaxckpt does not write. A directory that is empty then goes.

    Returns:
      The names of what was deleted.
    """
    doomed: list[str] = []
    names = store.names()
    for name in names:
        if _DATA_NAME.fullmatch(name) is None:
            continue
        try:
            hold = store.hold_alone(name)
        except BlockingIOError:
            return doomed  # somebody is saving here
        except (FileNotFoundError, NotADirectoryError):
            continue
        try:
            # Only now: its writer may have committed it just before it let go.
            if not _is_named(store, name):
                store.delete_tree(name)
                doomed.append(name)
        finally:
            if hold is not None:
                hold.release()
    is_checkpoint = store.exists(MANIFEST_NAME)
    for name in names:
        is_cut_off = cut_off_name(name) in (MANIFEST_NAME, METADATA_NAME, PIN_NAME)
        if is_cut_off or (not is_checkpoint and _is_ours(store, name)):
            store.delete(name)
            doomed.append(name)
    if not is_checkpoint:
        store.remove_if_empty()
    return doomed


def _is_ours(store: Store, name: str) -> bool:
    """Whether an object beside the manifest is one that a save or a manager puts there."""
    expected = {METADATA_NAME: group_metadata(), PIN_NAME: b""}.get(name)
    return expected is not None and store.exists(name) and store.read(name, len(expected)) == expected


def _is_named(store: Store, data: str) -> bool:
    """Whether the manifest names a data directory; also when the manifest is damaged, for it may."""
    try:
        return parse_manifest(store.read(MANIFEST_NAME, MANIFEST_BYTES_MAX), store.path).data == data
    except FileNotFoundError:
        return False
    except CheckpointError:
        return True
