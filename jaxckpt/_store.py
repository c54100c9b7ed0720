"""How do objects get to storage and back?

`open_store` gives the place that a path or URL names: `LocalStore` for file systems, which goes to the kernel itself
and is below, and `_buckets.BucketStore` for everything that TensorStore reaches (``s3://``, ``gs://``, ``memory://``).

Local files take the shorter way because it measured faster with the same layout (jaxckpt/DESIGN.md, "Input and
output"): several threads write pieces of the same or of different files with ``pwrite``, past the page cache where
the file system allows it (O_DIRECT), each file is synced once, and every directory that got a new entry is synced
before the manifest is published.

Invariants: an object is created under a name that nobody used before (O_EXCL). What changes a local file system goes
through `Kernel`, so that tests can stop or fail each single call.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import functools
import mmap
import os
import re
import stat
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, final

import numpy as np

from ._buckets import open_bucket
from ._config import BLOCK_BYTES, MIB
from ._errors import CheckpointError
from ._storage import (
    DIRECT_ALIGNMENT,
    Buffer,
    Hold,
    ObjectWriter,
    Store,
    allocate_aligned,
    cut_off_name,
    local_path,
    temporary_name,
)

# What is written in one step, so that it stays in the processor's cache from the checksum to the write. For O_DIRECT a
# source that is not aligned is copied first, into a buffer of this size, one for each writing thread. Whole blocks.
_WRITE_STEP_BYTES = 2 * BLOCK_BYTES
# Number of the system call cachestat(2), the same on every architecture. It needs no lock on the address space, for
# which mincore(2) would wait while other threads fault in fresh memory.
_SYS_CACHESTAT = 451
# Flag of mmap(2) on Linux that Python does not name: map at this address.
_MAP_FIXED = 0x10
# Below this a file is written through the page cache; there is nothing to win.
_DIRECT_BYTES_MIN = MIB
# A block that is read in a step of its own is verified while it is in the processor's cache. Past the page cache it is
# not there anyway, and the disk wants more in one go.
_READ_STEP_BYTES = BLOCK_BYTES
_DIRECT_STEP_BYTES = 4 * MIB
# A process has about a thousand file descriptors: what reads so many checkpoints at once does without holding them.
_HELD_DESCRIPTOR_MAX = 512


class Kernel:
    """The calls with which a `LocalStore` changes a file system. Tests bring their own, to count, fail or kill."""

    open = staticmethod(os.open)
    close = staticmethod(os.close)
    pwrite = staticmethod(os.pwrite)
    ftruncate = staticmethod(os.ftruncate)
    fsync = staticmethod(os.fsync)
    rename = staticmethod(os.rename)
    link = staticmethod(os.link)
    unlink = staticmethod(os.unlink)
    mkdir = staticmethod(os.mkdir)
    rmdir = staticmethod(os.rmdir)


def open_store(path: str | os.PathLike[str] | Store) -> Store:
    """The store at a path or URL, or the one that is given; touches nothing."""
    if isinstance(path, Store):
        return path
    text = os.fspath(path)
    if not text:  # a variable that is not set is not to mean the working directory
        raise CheckpointError("the path of a checkpoint is empty")
    if "://" in text and not text.startswith("file://"):
        return open_bucket(text)
    schemes = "s3|gs|memory" if isinstance(path, str) else "[a-z0-9]+"
    if (match := re.match(f"({schemes}):/", text)) is not None:
        raise CheckpointError(
            f"{text!r} is a URL that became a path: pass '{match[1]}://...' as text, not as a Path"
        )
    return LocalStore(os.path.abspath(local_path(text)))


# --- local files ----------------------------------------------------------------------------------------------


@final
class LocalStore(Store):
    """A directory of a file system."""

    def __init__(self, path: str, kernel: Kernel | None = None) -> None:
        self.path = path
        self._kernel = kernel or Kernel()
        self._lock = threading.Lock()
        # Directories that have new entries, in the order in which they were made.
        self._changed: dict[str, None] = {}
        self._known: set[str] = set()

    def create(self, name: str, length: int) -> ObjectWriter:
        is_direct = self._is_direct and length >= _DIRECT_BYTES_MIN
        return _LocalWriter(self._kernel, self._claim(name), length, is_direct)

    def create_replacement(self, name: str, length: int) -> ObjectWriter:
        self.forget_cut_off(name)
        temporary = temporary_name(name)
        writer = self.create(temporary, length)
        return _LocalReplacement(
            writer,
            self.hold_temporary(temporary),
            functools.partial(self._replace, temporary, name),
            functools.partial(self._forget, temporary),
        )

    def forget_cut_off(self, name: str) -> None:
        """Deletes what replacements of an object that were cut off have left; what a living writer holds stays."""
        directory, base = os.path.split(os.path.join(self.path, name))
        with contextlib.suppress(OSError):
            for other in os.listdir(directory):
                if cut_off_name(other) == base:
                    path = os.path.join(directory, other)
                    hold = self.hold_temporary(path)
                    if hold is not None:
                        self._kernel.unlink(path)
                        hold.release()

    def hold_temporary(self, name: str) -> Hold | None:
        """A hold on a file under a temporary name; None if somebody has it, or where there are no locks."""
        try:
            return self.hold_alone(name)
        except OSError:
            return None

    def _replace(self, temporary: str, name: str) -> None:
        target = os.path.join(self.path, name)
        self._kernel.rename(os.path.join(self.path, temporary), target)
        self.sync()
        self._sync_directory(os.path.dirname(target))

    def _forget(self, temporary: str) -> None:
        with contextlib.suppress(OSError):  # the failure that matters is the one that led here
            self._kernel.unlink(os.path.join(self.path, temporary))

    def put(self, name: str, data: bytes) -> None:
        writer = _LocalWriter(self._kernel, self._claim(name), len(data), False)
        try:
            writer.write(0, np.frombuffer(data, np.uint8))
            writer.finish()
        except BaseException:
            writer.abandon()
            raise

    def link(self, name: str, data: bytes, source: Store, source_name: str) -> bool:
        if not isinstance(source, LocalStore):
            return False
        path = self._claim(name)
        try:
            self._kernel.link(os.path.join(source.path, source_name), path)
        except OSError:  # it is gone, has too many names, or the file system has no links
            return False
        if self.read(name, len(data)) == data:
            return True
        self._kernel.unlink(path)
        return False

    def sync(self) -> None:
        with self._lock:
            changed = list(self._changed)
            self._changed.clear()
        for directory in reversed(changed):  # entries before the directories that lead to them
            self._sync_directory(directory)

    def publish(self, name: str, data: bytes) -> None:
        target = os.path.join(self.path, name)
        self._make_directory(os.path.dirname(target))
        temporary = temporary_name(target)
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            descriptor = self._kernel.open(temporary, flags, 0o666)
            try:
                _write_all(self._kernel, descriptor, 0, np.frombuffer(data, np.uint8))
                self._kernel.fsync(descriptor)
            finally:
                self._kernel.close(descriptor)
            self._kernel.rename(temporary, target)
        except BaseException:
            with contextlib.suppress(OSError):  # the failure that matters is the one that led here
                self._kernel.unlink(temporary)
            raise
        self._sync_directory(os.path.dirname(target))

    def has_length(self, name: str, length: int) -> bool:
        return os.stat(os.path.join(self.path, name)).st_size == length

    def length(self, name: str) -> int:
        return os.stat(os.path.join(self.path, name)).st_size

    def read(self, name: str, bytes_max: int) -> bytes:
        with open(os.path.join(self.path, name), "rb") as file:
            return file.read(min(os.fstat(file.fileno()).st_size, bytes_max + 1))

    def exists(self, name: str) -> bool:
        return os.path.isfile(os.path.join(self.path, name))

    def read_into(self, name: str, offset: int, buffer: Buffer) -> int:
        return max(self.read_steps(name, offset, buffer), default=0)

    def read_steps(self, name: str, offset: int, buffer: Buffer) -> Iterator[int]:
        path = os.path.join(self.path, name)
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            done = 0
            if (
                len(buffer) >= _DIRECT_BYTES_MIN
                and self._is_direct
                # Where the kernel cannot say, the cache is assumed to be the better way.
                and _is_cached(descriptor, offset, len(buffer)) is False
            ):
                for done in _read_direct(path, descriptor, offset, buffer):
                    yield done
            for count in _read_steps(descriptor, offset + done, buffer[done:]):
                yield done + count
        finally:
            os.close(descriptor)

    def is_in_memory(self, name: str, offset: int, length: int) -> bool:
        descriptor = os.open(os.path.join(self.path, name), os.O_RDONLY | os.O_CLOEXEC)
        try:
            return bool(_is_cached(descriptor, offset, length))
        finally:
            os.close(descriptor)

    def map_into(self, name: str, offset: int, buffer: Buffer) -> bool:
        address = buffer.ctypes.data
        head = -address % mmap.PAGESIZE
        length = (len(buffer) - head) // mmap.PAGESIZE * mmap.PAGESIZE
        if length <= 0 or (offset + head) % mmap.PAGESIZE:
            return False
        descriptor = os.open(os.path.join(self.path, name), os.O_RDONLY | os.O_CLOEXEC)
        try:
            if os.fstat(descriptor).st_size < offset + len(buffer):
                return False
            # What shares its page with other memory is read.
            tail = head + length
            _read_all(descriptor, offset, buffer[:head])
            _read_all(descriptor, offset + tail, buffer[tail:])
            return _map_at(address + head, length, descriptor, offset + head)
        finally:
            os.close(descriptor)

    def delete_tree(self, name: str) -> None:
        failures: list[OSError] = []
        self._delete_directory(os.path.join(self.path, name), failures)
        if failures:
            raise failures[0]

    def _delete_directory(self, directory: str, failures: list[OSError]) -> None:
        """Deletes as much as it can, and notes what it cannot."""
        try:
            entries = list(os.scandir(directory))
        except FileNotFoundError:
            return
        except OSError as error:
            failures.append(error)
            return
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                self._delete_directory(entry.path, failures)
                continue
            try:
                self._kernel.unlink(entry.path)
            except FileNotFoundError:
                pass  # somebody else deleted it
            except OSError as error:
                failures.append(error)
        try:
            self._kernel.rmdir(directory)
        except FileNotFoundError:
            pass
        except OSError as error:
            failures.append(error)

    def names(self) -> list[str]:
        try:
            return sorted(os.listdir(self.path))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def delete(self, name: str) -> None:
        path = os.path.join(self.path, name)
        try:
            self._kernel.unlink(path)
        except FileNotFoundError:
            return
        self._sync_directory(os.path.dirname(path))

    def is_link(self, name: str) -> bool:
        return os.path.islink(os.path.join(self.path, name))

    def confirm(self) -> None:
        self._sync_directory(self.path)

    def child(self, name: str) -> LocalStore:
        return LocalStore(os.path.join(self.path, name), self._kernel)

    def fingerprint(self, name: str) -> Any:
        try:
            found = os.stat(os.path.join(self.path, name))
        except (FileNotFoundError, NotADirectoryError):
            return None
        is_file = stat.S_ISREG(found.st_mode)
        return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns) if is_file else None

    def remove_if_empty(self) -> None:
        with contextlib.suppress(OSError):
            self._kernel.rmdir(self.path)

    def read_and_hold(self, name: str, bytes_max: int) -> tuple[bytes, Hold | None]:
        path = os.path.join(self.path, name)
        while True:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            hold = Hold(descriptor)
            try:
                is_held = _lock(descriptor, fcntl.LOCK_SH)
            except BlockingIOError as error:  # whoever holds it alone is about to delete it
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path) from error
            found = os.fstat(descriptor)
            if found.st_nlink == 0:
                continue  # replaced or deleted since it was opened
            data = np.empty(min(found.st_size, bytes_max + 1), np.uint8)
            count = _read_all(descriptor, 0, data)
            is_kept = is_held and descriptor < _HELD_DESCRIPTOR_MAX
            return data[:count].tobytes(), hold if is_kept else None

    def hold_shared(self, name: str) -> Hold | None:
        try:
            descriptor = os.open(os.path.join(self.path, name), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError:
            return None
        hold = Hold(descriptor)
        try:
            is_held = descriptor < _HELD_DESCRIPTOR_MAX and _lock(descriptor, fcntl.LOCK_SH)
        except BlockingIOError:
            return None
        return hold if is_held else None

    def hold_alone(self, name: str) -> Hold | None:
        path = os.path.join(self.path, name)
        try:
            # NFS locks a file alone only for who may write it.
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except (IsADirectoryError, PermissionError):
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        hold = Hold(descriptor)
        return hold if _lock(descriptor, fcntl.LOCK_EX) else None

    def make_directory(self, name: str) -> None:
        self._make_directory(os.path.join(self.path, name))

    def _sync_directory(self, path: str) -> None:
        descriptor = self._kernel.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            self._kernel.fsync(descriptor)
        finally:
            self._kernel.close(descriptor)

    def _claim(self, name: str) -> str:
        """Path of a new object; its directory is there afterwards."""
        path = os.path.join(self.path, name)
        self._make_directory(os.path.dirname(path))
        return path

    def _make_directory(self, directory: str) -> None:
        with self._lock:
            if directory in self._known:
                return
            missing = []
            parent = directory
            while not os.path.isdir(parent):
                if parent in self._known:  # somebody took it away, and with it what was written
                    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), parent)
                missing.append(parent)
                parent = os.path.dirname(parent)
            self._changed[parent] = None
            for path in reversed(missing):
                with contextlib.suppress(FileExistsError):
                    self._kernel.mkdir(path)
                self._changed[path] = None
            self._changed[directory] = None
            self._known.update((parent, *missing, directory))

    @functools.cached_property
    def _is_direct(self) -> bool:
        return hasattr(os, "O_DIRECT") and not _is_in_memory(self.path)


@final
class _LocalWriter(ObjectWriter):
    """A file being written; with ``is_direct`` past the page cache, if the file system can do that."""

    def __init__(self, kernel: Kernel, path: str, length: int, is_direct: bool) -> None:
        self._kernel = kernel
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        self._length = length
        self._is_direct = is_direct
        if is_direct:
            try:
                self._descriptor = kernel.open(path, flags | os.O_DIRECT, 0o666)
                return
            except OSError as error:
                if isinstance(error, FileExistsError):
                    raise
                # Some file systems refuse O_DIRECT, a few of them after they have made the file.
                with contextlib.suppress(FileNotFoundError):
                    kernel.unlink(path)
                self._is_direct = False
        self._descriptor = kernel.open(path, flags, 0o666)

    def write(self, offset: int, data: Buffer) -> None:
        for _ in self.write_steps(offset, data):
            pass

    def write_steps(self, offset: int, data: Buffer) -> Iterator[Buffer]:
        is_aligned = data.ctypes.data % DIRECT_ALIGNMENT == 0
        step_bytes = len(data) if self._is_direct and is_aligned else _WRITE_STEP_BYTES
        for start in range(0, len(data), step_bytes or 1):
            part = data[start : start + step_bytes]
            if self._is_direct and not is_aligned:
                bounce = _thread_bounce_buffer()
                bounce[: len(part)] = part
                part = bounce[: len(part)]
            yield part
            self._write_part(offset + start, part)

    def _write_part(self, offset: int, part: Buffer) -> None:
        """Writes what starts at a page, if it must; a last part of a page is filled with zeros, up to `finish`."""
        rest = len(part) % DIRECT_ALIGNMENT if self._is_direct else 0
        whole = len(part) - rest
        _write_all(self._kernel, self._descriptor, offset, part[:whole])
        if rest:
            page = _thread_bounce_buffer()[:DIRECT_ALIGNMENT]
            page[:rest] = part[whole:]
            page[rest:] = 0
            _write_all(self._kernel, self._descriptor, offset + whole, page)

    def finish(self) -> None:
        descriptor, self._descriptor = self._descriptor, -1
        try:
            if self._is_direct and self._length % DIRECT_ALIGNMENT:
                self._kernel.ftruncate(descriptor, self._length)
            self._kernel.fsync(descriptor)
        finally:
            self._kernel.close(descriptor)

    def abandon(self) -> None:
        if self._descriptor >= 0:
            self._kernel.close(self._descriptor)
            self._descriptor = -1


@final
class _LocalReplacement(ObjectWriter):
    """A file that is written under another name first.

    Args:
      writer: Writes it.
      hold: Says that it is being written, until this object is gone.
      replace: Gives it its name.
      forget: Deletes it.
    """

    def __init__(
        self,
        writer: ObjectWriter,
        hold: Hold | None,
        replace: Callable[[], None],
        forget: Callable[[], None],
    ) -> None:
        self._writer = writer
        self._hold = hold
        self._replace = replace
        self._forget = forget

    def write(self, offset: int, data: Buffer) -> None:
        self._writer.write(offset, data)

    def finish(self) -> None:
        self._writer.finish()
        self._replace()
        self._release()

    def abandon(self) -> None:
        self._writer.abandon()
        self._forget()
        self._release()

    def _release(self) -> None:
        if self._hold is not None:
            self._hold.release()


_thread_buffers = threading.local()


def _thread_bounce_buffer() -> Buffer:
    """An aligned buffer of the calling thread, reused for its lifetime."""
    if not hasattr(_thread_buffers, "bounce"):
        _thread_buffers.bounce = allocate_aligned(_WRITE_STEP_BYTES)
    buffer: Buffer = _thread_buffers.bounce
    return buffer


def _lock(descriptor: int, kind: int) -> bool:
    """Locks a file or directory at once or not at all; False where the file system has no locks."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:
        return False
    return True


def _write_all(kernel: Kernel, descriptor: int, offset: int, data: Buffer) -> None:
    done = 0
    view = memoryview(data)
    while done < len(data):
        done += _write_some(kernel, descriptor, offset + done, view[done:])


def _write_some(kernel: Kernel, descriptor: int, offset: int, data: memoryview) -> int:
    try:
        return kernel.pwrite(descriptor, data, offset)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    # O_DIRECT cannot write up to a limit that is within a block, and does not say that this is why.
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    fcntl.fcntl(descriptor, fcntl.F_SETFL, flags & ~getattr(os, "O_DIRECT", 0))
    return kernel.pwrite(descriptor, data, offset)


def _read_all(descriptor: int, offset: int, buffer: Buffer) -> int:
    """Fills a buffer as far as the file goes; returns the bytes that there were."""
    return max(_read_steps(descriptor, offset, buffer), default=0)


def _read_steps(
    descriptor: int, offset: int, buffer: Buffer, step_bytes: int = _READ_STEP_BYTES
) -> Iterator[int]:
    """Fills a buffer as far as the file goes; yields after each call how far it is filled."""
    done = 0
    view = memoryview(buffer)
    while done < len(buffer):
        count = os.preadv(descriptor, [view[done : done + step_bytes]], offset + done)
        if count == 0:
            break
        done += count
        yield done


def _read_direct(path: str, descriptor: int, offset: int, buffer: Buffer) -> Iterator[int]:
    """Reads past the page cache as much of a range as O_DIRECT can; yields how far it has come.

    The first bytes up to a multiple of 4096 are read through the cache. What is left at the end is for the caller.
    """
    head = -offset % DIRECT_ALIGNMENT
    if (buffer.ctypes.data + head) % DIRECT_ALIGNMENT:
        return
    end = head + (len(buffer) - head) // DIRECT_ALIGNMENT * DIRECT_ALIGNMENT
    try:
        direct = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
    except OSError:
        return  # this file system has no O_DIRECT
    try:
        if _read_all(descriptor, offset, buffer[:head]) < head:
            return
        for count in _read_steps(direct, offset + head, buffer[head:end], _DIRECT_STEP_BYTES):
            yield head + count
            if count % DIRECT_ALIGNMENT:  # the file ends here
                return
    except OSError as error:
        if (
            error.errno != errno.EINVAL
        ):  # else stricter about alignment than we know; the cache serves as well
            raise
    finally:
        os.close(direct)


def _is_cached(descriptor: int, offset: int, length: int) -> bool | None:
    """Whether most of a range of a file is in the page cache, from which reading is several times faster.

    None where the kernel cannot say (Linux before 6.5).
    """
    asked = np.array([offset, length], np.uint64)
    answer = np.zeros(5, np.uint64)  # pages cached, dirty, under writeback, evicted, recently evicted
    status = _c_library().syscall(
        ctypes.c_long(_SYS_CACHESTAT),
        ctypes.c_int(descriptor),
        ctypes.c_void_p(asked.ctypes.data),
        ctypes.c_void_p(answer.ctypes.data),
        ctypes.c_uint(0),
    )
    return None if status != 0 else int(answer[0]) * mmap.PAGESIZE * 2 > length


@functools.cache
def _c_library() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _map_at(address: int, length: int, descriptor: int, offset: int) -> bool:
    """Puts pages of a file in the place of private memory; what is written to them stays private."""
    if sys.platform != "linux":
        return False
    call = _c_library().mmap
    call.restype = ctypes.c_void_p

    def map_pages(flags: int, descriptor: int, offset: int) -> bool:
        result = call(
            ctypes.c_void_p(address),
            ctypes.c_size_t(length),
            ctypes.c_int(mmap.PROT_READ | mmap.PROT_WRITE),
            ctypes.c_int(flags | mmap.MAP_PRIVATE | _MAP_FIXED),
            ctypes.c_int(descriptor),
            ctypes.c_long(offset),
        )
        return bool(result == address)

    if map_pages(0, descriptor, offset):
        return True
    # A mapping that fails may have taken away what was there before.
    if not map_pages(mmap.MAP_ANONYMOUS, -1, 0):
        raise MemoryError(f"the kernel has no mapping left for {length} bytes")
    return False


def _is_in_memory(path: str) -> bool:
    """Whether the file system keeps its files in the page cache, where there is nothing to go past."""
    try:
        with open("/proc/self/mountinfo", encoding="utf-8") as mounts:
            lines = mounts.read().splitlines()
    except OSError:
        return False
    while not os.path.exists(path):
        path = os.path.dirname(path)
    device = os.stat(path).st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    return any(
        line.split()[2] == number and line.split(" - ")[1].split()[0] in ("tmpfs", "ramfs") for line in lines
    )
