"""What is a place for the objects of a checkpoint?

A *store* is a directory or bucket prefix that holds the objects of one checkpoint under relative names. This module
says what every store does; `_store` has the one for file systems, `_buckets` the one for object stores, and
`_store.open_store` picks. Beside it are the memory that objects are read into, and the locks.

Invariants: an object is created under a name that nobody used before, and a published one replaces the old one
atomically. A read never fills in for missing bytes.

A `Hold` keeps an object from being deleted while somebody reads it, and a directory while somebody writes into it:
an flock(2), which ends with its process, however that ends. File systems without locks give no such protection, and
nothing else depends on it.
"""

from __future__ import annotations

import abc
import contextlib
import functools
import mmap
import os
import re
import secrets
import urllib.parse
import weakref
from collections.abc import Callable, Iterator
from typing import Any, final

import numpy as np

from ._config import MIB
from ._errors import CheckpointError

Buffer = np.ndarray[Any, np.dtype[np.uint8]]

# Memory address, file offset and length that O_DIRECT needs; 4096 suits every disk in use.
DIRECT_ALIGNMENT = 4096
# Of x86-64, and of ARM with pages of 4 KiB.
_HUGE_PAGE_BYTES = 2 * MIB
# As `temporary_name` makes them.
_TEMPORARY = re.compile(r"(.+)\.tmp-[0-9a-f]{16}", re.DOTALL)


@final
class Hold:
    """A lock on an object or a directory; it ends with `release`, with the last reference, or with the process."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        _forget_holds_in_forks()
        _holds.add(self)

    def release(self) -> None:
        """Ends the hold; again and again without harm."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            self._close(descriptor)

    def __del__(self) -> None:
        self.release()

    # At the end of the program the module may be gone before the last hold.
    _close = staticmethod(os.close)


_holds: weakref.WeakSet[Hold] = weakref.WeakSet()


@functools.cache
def _forget_holds_in_forks() -> None:
    """A forked worker shares the locks, and would keep them as long as it lives; what it closes, its parent keeps."""
    os.register_at_fork(after_in_child=_release_all)


def _release_all() -> None:
    for hold in list(_holds):
        hold.release()


class ObjectWriter(abc.ABC):
    """An object being written; `write` may be called by several threads at once."""

    @abc.abstractmethod
    def write(self, offset: int, data: Buffer) -> None:
        """Writes a range. The last range may end anywhere, all others at multiples of 4096."""

    def write_steps(self, offset: int, data: Buffer) -> Iterator[Buffer]:
        """As `write`, but yields part after part, each right before it is written; all but the last are whole blocks.

        Whoever looks at the bytes then brings them into the processor's cache, from which they are written.
        """
        yield data
        self.write(offset, data)

    @abc.abstractmethod
    def finish(self) -> None:
        """Makes the object's bytes durable."""

    @abc.abstractmethod
    def abandon(self) -> None:
        """Gives up; the object may be left incomplete."""


class Store(abc.ABC):
    """The objects of one checkpoint. Names are relative, with ``/`` between their parts."""

    path: str
    # Whether each call takes as long as a network does, so that several shall go on at a time, and an object is in
    # memory until it is finished.
    is_remote = False
    # Bytes between two wanted ranges of an object that are read in vain rather than asking twice.
    gap_bytes_max = 0

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self.path.rpartition("/")[2]

    @abc.abstractmethod
    def create(self, name: str, length: int) -> ObjectWriter:
        """Begins a new object."""

    def create_replacement(self, name: str, length: int) -> ObjectWriter:
        """Begins an object that takes the place of another when it is finished; until then that one stays.

        What earlier ones that were cut off have left is deleted.
        """
        return self.create(name, length)  # which is not seen before it is finished

    @abc.abstractmethod
    def put(self, name: str, data: bytes) -> None:
        """Writes a small object whole and makes it durable."""

    def link(self, name: str, data: bytes, source: Store, source_name: str) -> bool:
        """Makes an object of the bytes that another one has, without storing them again; False where that cannot be."""
        return False

    @abc.abstractmethod
    def sync(self) -> None:
        """Makes the names of all objects written through this store durable."""

    @abc.abstractmethod
    def publish(self, name: str, data: bytes) -> None:
        """Replaces an object atomically and durably."""

    def publish_next(self, name: str, data: bytes, *, may_replace: bool = True) -> None:
        """As `publish`, and where that may be carried out late, it does not replace what is published after this.

        Without ``may_replace`` nothing may be there, as the caller has seen; what came since then is found, too, where
        storage can tell (FileExistsError).
        """
        del may_replace
        self.publish(name, data)

    @abc.abstractmethod
    def has_length(self, name: str, length: int) -> bool:
        """Whether an object has exactly so many bytes; FileNotFoundError when it is missing."""

    def length(self, name: str) -> int:
        """Bytes of an object; FileNotFoundError when it is missing."""
        # Where nobody says it, bytes are looked for at places, two for each bit of the length.
        byte = np.empty(1, np.uint8)
        high = 1
        while self.read_into(name, high - 1, byte):
            high *= 2
        low = high // 2
        while low < high - 1:
            middle = (low + high) // 2
            if self.read_into(name, middle - 1, byte):
                low = middle
            else:
                high = middle
        return low

    @abc.abstractmethod
    def read(self, name: str, bytes_max: int) -> bytes:
        """A whole small object; FileNotFoundError when it is missing.

        Of an object that is longer than ``bytes_max`` only the first ``bytes_max + 1`` bytes may come.
        """

    @abc.abstractmethod
    def read_into(self, name: str, offset: int, buffer: Buffer) -> int:
        """Fills the buffer from an object and returns how many bytes there were."""

    def read_steps(self, name: str, offset: int, buffer: Buffer) -> Iterator[int]:
        """As `read_into`, but yields how many bytes there are so far, again and again.

        Whoever looks at the bytes in between finds them in the processor's cache.
        """
        yield self.read_into(name, offset, buffer)

    def is_in_memory(self, name: str, offset: int, length: int) -> bool:
        """Whether most of a range of an object is known to be in memory, where only processors limit reading."""
        del name, offset, length
        return False

    def map_into(self, name: str, offset: int, buffer: Buffer) -> bool:
        """Lets a buffer of `allocate_aligned` show a range of an object instead of a copy; False where it cannot.

        What is written into the buffer later is never written to the object.
        """
        del name, offset, buffer
        return False

    @abc.abstractmethod
    def delete_tree(self, name: str) -> None:
        """Deletes all objects below a name, as far as they are there."""

    @abc.abstractmethod
    def exists(self, name: str) -> bool:
        """Whether an object is there."""

    @abc.abstractmethod
    def names(self) -> list[str]:
        """First parts of the names of all objects and directories, in order; none when nothing is there."""

    def names_below(self) -> dict[str, list[str]]:
        """Of each of `names`, what the store of that name has as its own `names`; none where there cannot be any."""
        below: dict[str, list[str]] = {}
        for name in self.names():
            try:
                below[name] = self.child(name).names()
            except OSError:  # of a directory of somebody else
                below[name] = []
        return below

    def fingerprints(self, name: str, is_wanted: Callable[[str], bool]) -> Iterator[tuple[str, Any]]:
        """Each child with the `fingerprint` of the object of a name in it.

        Args:
          name: Of the object.
          is_wanted: Which of `names` are looked at.
        """
        for child in self.names():
            if is_wanted(child):
                yield child, self.fingerprint(f"{child}/{name}")

    @abc.abstractmethod
    def delete(self, name: str) -> None:
        """Deletes an object durably, if it is there."""

    def is_link(self, name: str) -> bool:
        """Whether a name is a symbolic link; object stores have none."""
        del name
        return False

    def delete_link(self, name: str) -> bool:
        """Deletes a symbolic link, and nothing of where it leads; whether it was one."""
        if not self.is_link(name):
            return False
        self.delete(name)
        return True

    @abc.abstractmethod
    def confirm(self) -> None:
        """Makes durable what others have published here."""

    @abc.abstractmethod
    def child(self, name: str) -> Store:
        """The store of what lies below a name."""

    def fingerprint(self, name: str) -> Any:
        """Something that changes when an object is replaced, or None when it is not there."""
        return True if self.exists(name) else None

    @abc.abstractmethod
    def remove_if_empty(self) -> None:
        """Removes the directory itself when nothing is in it; object stores have none."""

    def read_and_hold(self, name: str, bytes_max: int) -> tuple[bytes, Hold | None]:
        """As `read`; the object is not deleted as long as the hold is there, where storage can promise that."""
        return self.read(name, bytes_max), None

    def hold_shared(self, name: str) -> Hold | None:
        """Holds a directory beside others who do; None where that cannot be."""
        del name
        return None

    def hold_alone(self, name: str) -> Hold | None:
        """Holds an object or directory that nobody else holds; None where storage has no locks.

        Raises:
          BlockingIOError: Somebody holds it.
          FileNotFoundError: It is not there.
        """
        del name
        return None

    @abc.abstractmethod
    def make_directory(self, name: str) -> None:
        """Makes a directory; object stores need none."""


def temporary_name(name: str) -> str:
    """Where something is until it takes the place of what has the name; `cut_off_name` reversed."""
    return f"{name}.tmp-{secrets.token_hex(8)}"


def cut_off_name(name: str) -> str | None:
    """Of the temporary name of a publication, which a crash leaves behind, what was to be published; else None."""
    match = _TEMPORARY.fullmatch(name)
    return match and match[1]


def local_path(text: str) -> str:
    """The path that a ``file://`` URL names; anything else as it is."""
    if not text.startswith("file://"):
        return text
    host, slash, path = text.removeprefix("file://").partition("/")
    if host not in ("", "localhost"):
        raise CheckpointError(f"{text!r} names the host {host!r}: a file URL has three slashes, file:///...")
    return urllib.parse.unquote(slash + path, errors="surrogateescape")


def allocate_aligned(nbytes: int, offset: int = 0) -> Buffer:
    """Fresh memory, in huge pages where it is large: a page fault costs more than the copy of its page.

    Args:
      nbytes: How much.
      offset: The memory starts as far behind a page as this does, so that O_DIRECT can read from there in a file.
    """
    if nbytes == 0:
        return np.empty(0, np.uint8)
    lead = offset % DIRECT_ALIGNMENT
    length = lead + nbytes
    has_huge_pages = nbytes >= _HUGE_PAGE_BYTES and hasattr(mmap, "MADV_HUGEPAGE")
    if has_huge_pages:
        # Linux starts mappings of whole huge pages at one.
        length = -(-length // _HUGE_PAGE_BYTES) * _HUGE_PAGE_BYTES
    # Private: Python's default is shared memory, which gets no huge pages.
    region = mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if has_huge_pages:
        # The last one is taken whole if at least half of it is used.
        advised = (lead + nbytes + _HUGE_PAGE_BYTES // 2) // _HUGE_PAGE_BYTES * _HUGE_PAGE_BYTES
        with contextlib.suppress(OSError):
            region.madvise(mmap.MADV_HUGEPAGE, 0, advised)
    return np.frombuffer(region, np.uint8)[lead : lead + nbytes]


def processor_count() -> int:
    """How many processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
