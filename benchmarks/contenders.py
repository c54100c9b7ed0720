"""Everything that saves and restores a workload: jaxckpt, Orbax as it comes and tuned, plain system calls.

A contender is told which work to do, never how it is measured. Foreign packages are imported at use, so that
a contender whose package is absent can be left out and named.

The raw contenders are the limit, not competitors: they write page-aligned memory that is ready and knows no
tree, no checksum and no manifest, and they read into memory instead of arrays. The best of them in a run is
"raw".
"""

from __future__ import annotations

import abc
import concurrent.futures
import errno
import importlib
import importlib.util
import mmap
import os
from pathlib import Path
from typing import Any, final

import jax
import numpy as np

from benchmarks import workloads
from benchmarks.workloads import Workload

MIB = 1024 * 1024

# One huge page: the alignment that suits both transparent huge pages and O_DIRECT.
HUGE_PAGE_BYTES = 2 * MIB

# O_DIRECT wants offsets and lengths in multiples of the device's block; 4 KiB suits every common one.
DIRECT_BLOCK_BYTES = 4096

RAW_FILE_COUNT = 16
RAW_THREADS = 8
RAW_REQUEST_BYTES = 8 * MIB

# By default an OCDBT data file takes 2 GiB, and one thread writes all; smaller files are the faster setting.
OCDBT_FILE_BYTES = 128 * MIB

# As strace shows it.
ORBAX_DURABILITY = "array data and OCDBT nodes fsynced; JSON metadata and the final rename not"


class UnsupportedHereError(Exception):
    """The machine can't do what this contender is about; its message says what is missing."""


class Contender(abc.ABC):
    """One way to save and restore.

    Attributes:
        name: shown in tables; part of it can be given to `--contender`.
        family: "jaxckpt", "orbax" or "raw".
        modules: imported before the clock starts.
        durability: what is on storage for good when `save` returns.
        is_slow_with_many_leaves: run less often on workloads that say so.
    """

    name: str
    family: str
    modules: tuple[str, ...] = ()
    durability: str
    is_slow_with_many_leaves: bool = False

    @abc.abstractmethod
    def source(self, workload: Workload, seed: int) -> Any:
        """Makes what `save` takes; not timed."""

    @abc.abstractmethod
    def save(self, path: Path, source: Any) -> None:
        """Saves to `path`, which does not exist; returns when the save is durable."""

    @abc.abstractmethod
    def target(self, workload: Workload) -> Any:
        """Makes the description that `restore` takes; not timed."""

    @abc.abstractmethod
    def restore(self, path: Path, target: Any) -> Any:
        """Restores; returns when every byte is where it belongs."""

    @abc.abstractmethod
    def problems(self, workload: Workload, seed: int, restored: Any) -> list[str]:
        """Compares what `restore` returned with the source; not timed."""


class TreeContender(Contender):
    """A contender that takes and returns trees of `jax.Array`."""

    @final
    def source(self, workload: Workload, seed: int) -> Any:
        return workloads.make_tree(workload, seed)

    @final
    def target(self, workload: Workload) -> Any:
        return workloads.make_like(workload)

    @final
    def problems(self, workload: Workload, seed: int, restored: Any) -> list[str]:
        return workloads.tree_problems(workload, seed, restored)


@final
class Jaxckpt(TreeContender):
    """`jaxckpt.save` and `jaxckpt.restore` with their defaults: checksums made and checked."""

    name = "jaxckpt"
    family = "jaxckpt"
    modules = ("jaxckpt",)
    durability = "objects, directories and manifest fsynced"

    def save(self, path: Path, source: Any) -> None:
        import jaxckpt

        jaxckpt.save(path, source)

    def restore(self, path: Path, target: Any) -> Any:
        import jaxckpt

        return jax.block_until_ready(jaxckpt.restore(path, like=target))


@final
class OrbaxV0Default(TreeContender):
    """`StandardCheckpointer` as the documentation shows it: OCDBT, Zarr 2, zstd."""

    name = "orbax-v0-default"
    family = "orbax"
    modules = ("orbax.checkpoint",)
    durability = ORBAX_DURABILITY
    is_slow_with_many_leaves = True

    def save(self, path: Path, source: Any) -> None:
        import orbax.checkpoint as ocp

        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(path, source)
            checkpointer.wait_until_finished()

    def restore(self, path: Path, target: Any) -> Any:
        import orbax.checkpoint as ocp

        with ocp.StandardCheckpointer() as checkpointer:
            return jax.block_until_ready(checkpointer.restore(path, target))


@final
class OrbaxV0Tuned(TreeContender):
    """`PyTreeCheckpointer` with Zarr 3 and no compression."""

    family = "orbax"
    modules = ("orbax.checkpoint",)
    durability = ORBAX_DURABILITY
    is_slow_with_many_leaves = True

    def __init__(self, *, use_ocdbt: bool):
        self.name = "orbax-v0-tuned-ocdbt" if use_ocdbt else "orbax-v0-tuned-files"
        self.use_ocdbt = use_ocdbt

    def _checkpointer(self) -> Any:
        import orbax.checkpoint as ocp

        return ocp.PyTreeCheckpointer(use_ocdbt=self.use_ocdbt, use_zarr3=True, use_compression=False)

    def save(self, path: Path, source: Any) -> None:
        import orbax.checkpoint as ocp

        file_bytes = OCDBT_FILE_BYTES if self.use_ocdbt else None
        with self._checkpointer() as checkpointer:
            checkpointer.save(path, args=ocp.args.PyTreeSave(source, ocdbt_target_data_file_size=file_bytes))

    def restore(self, path: Path, target: Any) -> Any:
        import orbax.checkpoint as ocp

        restore_args = ocp.checkpoint_utils.construct_restore_args(target)
        arguments = ocp.args.PyTreeRestore(target, restore_args=restore_args)
        with self._checkpointer() as checkpointer:
            return jax.block_until_ready(checkpointer.restore(path, args=arguments))


@final
class OrbaxV1(TreeContender):
    """`orbax.checkpoint.v1`: `save` and `load`; tuned means without compression, with and without OCDBT."""

    family = "orbax"
    modules = ("orbax.checkpoint", "orbax.checkpoint.experimental.v1")
    durability = ORBAX_DURABILITY
    is_slow_with_many_leaves = True

    def __init__(self, *, is_tuned: bool, use_ocdbt: bool = True):
        self.is_tuned = is_tuned
        self.use_ocdbt = use_ocdbt
        if is_tuned:
            self.name = "orbax-v1-tuned-ocdbt" if use_ocdbt else "orbax-v1-tuned-files"
        else:
            self.name = "orbax-v1-default"

    def _context(self) -> Any:
        from orbax.checkpoint.experimental import v1 as ocp

        context = ocp.Context()
        if self.is_tuned:
            context.array.saving.use_compression = False
            context.array.saving.use_ocdbt = self.use_ocdbt
            if self.use_ocdbt:
                context.array.saving.ocdbt_target_data_file_size = OCDBT_FILE_BYTES
        return context

    def save(self, path: Path, source: Any) -> None:
        from orbax.checkpoint.experimental import v1 as ocp

        with self._context():
            ocp.save(path, source)

    def restore(self, path: Path, target: Any) -> Any:
        from orbax.checkpoint.experimental import v1 as ocp

        with self._context():
            return jax.block_until_ready(ocp.load(path, target))


class RawContender(Contender):
    """A contender that moves the same bytes between memory and files."""

    family = "raw"
    durability = "files and their directory fsynced"

    @final
    def source(self, workload: Workload, seed: int) -> Any:
        payload = huge_page_array(workload.stored_bytes)
        workloads.make_payload(workload, seed, payload)
        return payload

    @final
    def target(self, workload: Workload) -> Any:
        return workload.stored_bytes

    @final
    def problems(self, workload: Workload, seed: int, restored: Any) -> list[str]:
        return workloads.payload_problems(workload, seed, restored)


@final
class RawOneFile(RawContender):
    """One file, one thread, through the page cache: `write` and `fsync`; `readinto` ordinary memory."""

    name = "raw-one-file"

    def save(self, path: Path, source: Any) -> None:
        path.mkdir()
        descriptor = os.open(path / "data", os.O_CREAT | os.O_WRONLY, 0o644)
        try:
            _write_all(descriptor, source, offset=0)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        _sync_directory(path)

    def restore(self, path: Path, target: Any) -> Any:
        payload = np.empty(target, np.uint8)
        with open(path / "data", "rb", buffering=0) as file:
            done = 0
            while done < payload.size:
                count = file.readinto(payload[done : done + RAW_REQUEST_BYTES])
                if not count:
                    raise EOFError("the file ends early")
                done += count
        return payload


@final
class RawThreads(RawContender):
    """Several files, several threads: `pwrite` and `fsync`; `preadv` into huge pages.

    Args:
        is_direct: O_DIRECT, past the page cache.
    """

    def __init__(self, *, is_direct: bool):
        self.name = "raw-threads-direct" if is_direct else "raw-threads"
        self.extra_flags = os.O_DIRECT if is_direct else 0

    def save(self, path: Path, source: Any) -> None:
        path.mkdir()
        blocks = -(-source.size // DIRECT_BLOCK_BYTES)
        part_bytes = -(-blocks // RAW_FILE_COUNT) * DIRECT_BLOCK_BYTES
        starts = range(0, source.size, part_bytes)
        with concurrent.futures.ThreadPoolExecutor(RAW_THREADS) as pool:
            jobs = [
                pool.submit(self._write_file, path / f"{number:02d}", source[start : start + part_bytes])
                for number, start in enumerate(starts)
            ]
            for job in jobs:
                job.result()
        _sync_directory(path)

    def _write_file(self, path: Path, part: np.ndarray) -> None:
        descriptor = self._open(path, os.O_CREAT | os.O_WRONLY)
        try:
            _write_all(descriptor, part, offset=0)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def restore(self, path: Path, target: Any) -> Any:
        files = sorted(path.iterdir())
        sizes = [file.stat().st_size for file in files]
        payload = huge_page_array(target)
        descriptors = [self._open(file, os.O_RDONLY) for file in files]
        try:
            with concurrent.futures.ThreadPoolExecutor(RAW_THREADS) as pool:
                jobs = []
                file_start = 0
                for descriptor, size in zip(descriptors, sizes, strict=True):
                    part = payload[file_start : file_start + size]
                    file_start += size
                    for offset in range(0, size, RAW_REQUEST_BYTES):
                        piece = part[offset : offset + RAW_REQUEST_BYTES]
                        jobs.append(pool.submit(_read_all, descriptor, piece, offset))
                for job in jobs:
                    job.result()
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
        return payload

    def _open(self, path: Path, flags: int) -> int:
        try:
            return os.open(path, flags | self.extra_flags, 0o644)
        except OSError as error:
            if self.extra_flags and error.errno == errno.EINVAL:
                raise UnsupportedHereError("the file system refuses O_DIRECT") from error
            raise


def huge_page_array(nbytes: int) -> np.ndarray:
    """Fresh memory in aligned huge pages, where the kernel has them: the cheapest kind to touch first."""
    memory = mmap.mmap(-1, nbytes + HUGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    array = np.frombuffer(memory, np.uint8)
    start = -array.ctypes.data % HUGE_PAGE_BYTES
    return array[start : start + nbytes]


def _write_all(descriptor: int, data: np.ndarray, offset: int) -> None:
    done = 0
    while done < data.size:
        done += os.pwrite(descriptor, data[done : done + RAW_REQUEST_BYTES], offset + done)


def _read_all(descriptor: int, data: np.ndarray, offset: int) -> None:
    done = 0
    while done < data.size:
        count = os.preadv(descriptor, [data[done:]], offset + done)
        if count == 0:
            raise EOFError("a file ends early")
        done += count


def _sync_directory(path: Path) -> None:
    for folder in (path, path.parent):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


# The order of the rows of a table.
ALL_CONTENDERS: tuple[Contender, ...] = (
    Jaxckpt(),
    OrbaxV0Default(),
    OrbaxV0Tuned(use_ocdbt=True),
    OrbaxV0Tuned(use_ocdbt=False),
    OrbaxV1(is_tuned=False),
    OrbaxV1(is_tuned=True, use_ocdbt=True),
    OrbaxV1(is_tuned=True, use_ocdbt=False),
    RawOneFile(),
    RawThreads(is_direct=False),
    RawThreads(is_direct=True),
)


def find_contender(name: str) -> Contender:
    """Returns the contender called `name`.

    Raises:
        KeyError: no contender has that name.
    """
    for contender in ALL_CONTENDERS:
        if contender.name == name:
            return contender
    raise KeyError(name)


def absence(contender: Contender) -> str | None:
    """Says which package of a contender is not installed, or None if all are."""
    for module in contender.modules:
        try:
            spec = importlib.util.find_spec(module)
        except ModuleNotFoundError:
            spec = None
        if spec is None or spec.origin is None:  # a folder without __init__.py has a spec but no origin
            return f"{module} is not installed"
    return None


def load_modules(contender: Contender) -> None:
    for module in contender.modules:
        importlib.import_module(module)
