"""When does a checkpoint exist, and why can no crash leave half of one?

A save is an *attempt*. It writes all its objects below a data directory whose name nobody has used before and, when
every one of them is durable, publishes the manifest, which names that directory. There is exactly one instant at
which anything changes for a reader: the rename of the manifest.

    1. begin     choose a new name ``data-<attempt>``; look whether a checkpoint is there already
    2. write     objects below it, each synced before it counts as written            (`_persist`)
    3. metadata  the ``zarr.json`` objects, synced too
    4. sync      every directory that got a new entry, from the leaves to the root
    5. publish   manifest to a temporary name, sync, rename, sync the directory       <- the commit
    6. sweep     an overwrite deletes the data directory that the old manifest named

A crash before 5 leaves the old manifest, or none, and a data directory that nothing names. A crash in 5 leaves the old
manifest or the new one, since a rename is atomic, and a temporary file that nothing names. A crash in 6 leaves both
data directories; the old one is not named any more. The order of 2 to 5 holds for power loss too, as far as the
storage keeps its promise on fsync: when the new name of the manifest is durable, so is everything that it says.

Nothing old is deleted before 5 is durable, so that an overwrite never has a moment without a whole checkpoint. Nothing
but the manifest is ever renamed, so that the same order of steps works on object stores, and nothing in a checkpoint
is an absolute path, so that ``cp -r`` of it is valid. Data directories of other attempts are left alone, for their
writer may be alive; the manager, which owns its directory, sweeps them.

Deliberately not here: which objects there are (`_layout`), and what the manifest says (`_manifest`).
"""

from __future__ import annotations

import contextlib
import secrets
import threading
from typing import final

import xxhash

from ._errors import CheckpointError, ExistsError
from ._manifest import (
    MANIFEST_BYTES_MAX,
    MANIFEST_NAME,
    Manifest,
    StoredObject,
    encode_manifest,
    parse_manifest,
)
from ._store import LocalStore, Store
from ._zarr import METADATA_NAME, group_metadata

# Commits of one process take turns, so that of several overwrites of one path each removes the one that it replaced.
_commit_lock = threading.Lock()


@final
class Attempt:
    """One attempt to commit a checkpoint."""

    def __init__(self, store: Store, may_overwrite: bool) -> None:
        self.store = store
        self.data = f"data-{secrets.token_hex(8)}"
        self._may_overwrite = may_overwrite
        self._objects: list[StoredObject] = []
        self._is_publishing = False

    def put_metadata(self, name: str, data: bytes) -> None:
        """Writes a metadata object below the data directory and remembers its checksum."""
        self._put(f"{self.data}/{name}", data)

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

    def commit(self, manifest: Manifest) -> int:
        """Makes the checkpoint exist; returns the bytes of the manifest.

        Raises:
          ExistsError: Somebody else committed here meanwhile and overwriting is not allowed.
        """
        data = encode_manifest(manifest)
        self.store.sync()
        with _commit_lock:
            old_data = self._data_to_replace()
            self._is_publishing = True
            self.store.publish(MANIFEST_NAME, data)
        if old_data is not None:
            # The new checkpoint exists, whatever becomes of the old one's objects.
            with contextlib.suppress(OSError):
                self.store.delete_tree(old_data)
        return len(data)

    def _data_to_replace(self) -> str | None:
        """Data directory of the checkpoint that is there now, which may be younger than this attempt."""
        if not self.store.exists(MANIFEST_NAME):
            return None
        if not self._may_overwrite:
            raise ExistsError(_exists_message(self.store))
        # A damaged manifest names no directory that could be deleted safely; it is replaced all the same.
        with contextlib.suppress(CheckpointError):
            return parse_manifest(self.store.read(MANIFEST_NAME, MANIFEST_BYTES_MAX), self.store.path).data
        return None

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
        if self.is_committed():
            return
        with contextlib.suppress(OSError):
            self.store.delete_tree(self.data)
        if isinstance(self.store, LocalStore) and not self.store.exists(MANIFEST_NAME):
            self.store.remove_if_empty()

    def _put(self, name: str, data: bytes) -> None:
        self.store.put(name, data)
        self._remember(name, data)

    def _remember(self, name: str, data: bytes) -> None:
        self._objects.append(StoredObject(name, len(data), xxhash.xxh3_128_digest(data)))


def begin(store: Store, *, may_overwrite: bool) -> Attempt:
    """Starts an attempt.

    Raises:
      ExistsError: A committed checkpoint is there and overwriting is not allowed.
    """
    if not may_overwrite and store.exists(MANIFEST_NAME):
        raise ExistsError(_exists_message(store))
    return Attempt(store, may_overwrite)


def _exists_message(store: Store) -> str:
    return f"a checkpoint is already at {store.path!r}\npass overwrite=True to replace it, or choose another path"
