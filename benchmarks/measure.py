"""What did one operation cost, according to the kernel, and is a file in the page cache?

Linux only. Seconds come from the monotonic clock; memory and bytes come from /proc/self, so that nothing
that a library does on its own threads or in native code goes uncounted.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import gc
import mmap
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import numpy as np

T = TypeVar("T")

# Written to /proc/self/clear_refs it sets the peak (VmHWM) back to the present resident size: proc(5).
RESET_PEAK = "5"

READ_BYTES = 8 * 1024 * 1024

# File systems that live in the page cache, and so have no cold files.
MEMORY_FILE_SYSTEMS = ("tmpfs", "ramfs")


@dataclasses.dataclass(frozen=True)
class Usage:
    """The cost of one operation.

    Attributes:
        seconds: from its start to its end.
        cpu_seconds: of all threads of the process, in user and in kernel mode.
        peak_extra_bytes: highest resident memory during it, less the resident memory before it. Pages of
            mapped files count while they are mapped.
        call_read_bytes: asked for by read calls (rchar); reads through a memory map are not in it.
        call_write_bytes: handed to write calls (wchar).
        storage_read_bytes: fetched from the storage device; 0 when the page cache had it all.
        storage_write_bytes: sent, or marked to be sent, to the storage device.
        read_calls: number of read calls.
        write_calls: number of write calls.
    """

    seconds: float
    cpu_seconds: float
    peak_extra_bytes: int
    call_read_bytes: int
    call_write_bytes: int
    storage_read_bytes: int
    storage_write_bytes: int
    read_calls: int
    write_calls: int


def measure(operation: Callable[[], T]) -> tuple[T, Usage]:
    """Runs `operation` once and returns its result and its cost."""
    _release_free_memory()
    io_before = _process_io()
    resident_before = _status_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text(RESET_PEAK)
    cpu_start = time.process_time()
    start = time.perf_counter()
    result = operation()
    seconds = time.perf_counter() - start
    cpu_seconds = time.process_time() - cpu_start
    peak = _status_bytes("VmHWM")
    io_after = _process_io()
    used = {name: io_after[name] - io_before[name] for name in io_after}
    usage = Usage(
        seconds=seconds,
        cpu_seconds=cpu_seconds,
        peak_extra_bytes=peak - resident_before,
        call_read_bytes=used["rchar"],
        call_write_bytes=used["wchar"],
        storage_read_bytes=used["read_bytes"],
        storage_write_bytes=used["write_bytes"],
        read_calls=used["syscr"],
        write_calls=used["syscw"],
    )
    return result, usage


def back_free_memory(nbytes: int) -> None:
    """Takes as much memory as an operation may need, writes to it, and gives it back to the kernel.

    The host of a virtual machine takes away what its kernel has had free for seconds, and then takes ten times as long
    to give it again as the kernel takes to hand it out. Whoever needs memory next would pay, or not, as chance has it.
    Processes still get fresh pages, filled with zeros.
    """
    length = min(nbytes, available_memory_bytes() // 2)
    if length == 0:
        return
    region = mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError, AttributeError):  # no huge pages here
        region.madvise(mmap.MADV_HUGEPAGE)
    np.frombuffer(region, np.uint8)[:: mmap.PAGESIZE] = 1


def _release_free_memory() -> None:
    """Gives freed memory back, so that an operation that takes it again is seen to do so."""
    gc.collect()
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):  # glibc has it, musl does not
        libc.malloc_trim(0)


def _status_bytes(field: str) -> int:
    with open("/proc/self/status") as lines:
        for line in lines:
            name, _, value = line.partition(":")
            if name == field:
                return int(value.split()[0]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def _process_io() -> dict[str, int]:
    counters = {}
    with open("/proc/self/io") as lines:
        for line in lines:
            name, _, value = line.partition(":")
            counters[name] = int(value)
    return counters


def files_below(directory: Path) -> Iterator[Path]:
    for folder, _, names in os.walk(directory):
        for name in names:
            yield Path(folder, name)


def evict(directory: Path) -> None:
    """Makes all files below `directory` cold. Dirty pages can't be evicted, hence the fsync."""
    for path in files_below(directory):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def warm(directory: Path) -> None:
    """Brings all files below `directory` into the page cache."""
    scratch = bytearray(READ_BYTES)
    for path in files_below(directory):
        with open(path, "rb", buffering=0) as file:
            while file.readinto(scratch):
                pass


def file_system(directory: Path) -> str:
    """The type of the file system that holds `directory`, such as ext4 or tmpfs."""
    device = os.stat(directory).st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    with open("/proc/self/mountinfo") as lines:
        for line in lines:
            mount, _, source = line.partition(" - ")
            if mount.split()[2] == wanted:
                return source.split()[0]
    return "unknown"


def is_in_memory(directory: Path) -> bool:
    return file_system(directory) in MEMORY_FILE_SYSTEMS


def available_memory_bytes() -> int:
    with open("/proc/meminfo") as lines:
        for line in lines:
            name, _, value = line.partition(":")
            if name == "MemAvailable":
                return int(value.split()[0]) * 1024
    raise RuntimeError("/proc/meminfo has no MemAvailable")


def room_problem(directory: Path, wanted_bytes: int) -> str | None:
    """Says why `directory` can't take `wanted_bytes` of files, or None if it can."""
    system = os.statvfs(directory)
    free_bytes = system.f_bavail * system.f_frsize
    where = f"{directory}"
    if is_in_memory(directory):
        free_bytes = min(free_bytes, available_memory_bytes())
        where = f"{directory} (memory)"
    if free_bytes >= wanted_bytes:
        return None
    return f"{where} has {free_bytes / 2**30:.1f} GiB free, {wanted_bytes / 2**30:.1f} GiB are wanted"
