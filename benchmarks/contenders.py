"""Everything that saves and restores a workload: jaxckpt, its peers, plain system calls.

A contender is told which work to do, never how it is measured. Foreign packages are imported at use, so that a trial
loads the packages of its own contender alone, and one whose package is absent can be left out and named.

Three kinds of work, which `Contender.holds` tells apart:

* "devices": a tree of `jax.Array` with shardings is saved, and restored with the wanted shardings.
* "one device", "host": the library knows no shardings, so it gets the same bytes as arrays of one device, or as arrays
  on the host, and gives such back.
* "memory": plain bytes. The raw contenders are the limit, not competitors: they write page-aligned memory that is ready
  and know no tree, no checksum and no manifest, and they read the same number of bytes into fresh memory. The best of
  them in a run is "raw".

What a library leaves in the page cache when its `save` returns is synced by its contender, inside of the measured time.
Those that sync all of their data, but not every small file, are left as they are; `durability` says so.
"""

from __future__ import annotations

import abc
import concurrent.futures
import errno
import functools
import importlib
import importlib.util
import inspect
import mmap
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, final

import jax
import numpy as np

from benchmarks import workloads
from benchmarks.workloads import Workload

MIB = 1024 * 1024

# One huge page: the alignment that suits both transparent huge pages and O_DIRECT.
HUGE_PAGE_BYTES = 2 * MIB

# O_DIRECT wants offsets and lengths in multiples of the device's block; 4 KiB suits every common one.
DIRECT_BLOCK_BYTES = 4096

# With 1, 2, 4, 8 and 16 threads, 1 or 16 files and requests of 2, 8 and 32 MiB, these ways were the fastest: to save
# past the page cache into one file of known length (8 or 16 threads) or into several (4 to 16), to restore a cold one
# with 4 to 16 threads past the page cache, to restore a warm one with 2 to 8 threads through it.
RAW_FILE_COUNT = 16
RAW_THREADS = 4
RAW_THREADS_OF_ONE_FILE = 8
RAW_REQUEST_BYTES = 8 * MIB

# By default an OCDBT data file takes 2 GiB, and one thread writes all; smaller files are the faster setting.
OCDBT_FILE_BYTES = 128 * MIB

# A thread of torch's writer writes one file.
TORCH_THREADS = 4

# As strace shows it.
ORBAX_DURABILITY = "array data and OCDBT nodes fsynced; JSON metadata and the final rename not"
SYNCED_HERE = "the library syncs nothing; the benchmark syncs files and directories"

Holds = Literal["devices", "one device", "host", "memory"]


class UnsupportedHereError(Exception):
    """The machine can't do what this contender is about; its message says what is missing."""


class Contender(abc.ABC):
    """One way to save and restore.

    Attributes:
        name: shown in tables; part of it can be given to `--contender`.
        family: "jaxckpt", "orbax", "raw", or the library's name.
        packages: top-level modules that have to be installed.
        modules: imported before the clock starts.
        durability: what is on storage for good when `save` returns.
        holds: what is saved and restored.
        start_s: about how long a process takes until it measures; for estimates.
        leaf_s: about how long a save and two restores take for each leaf; for estimates.
    """

    name: str
    family: str
    packages: ClassVar[tuple[str, ...]] = ()
    modules: ClassVar[tuple[str, ...]] = ()
    durability: str
    holds: Holds
    start_s: float = 1.2
    leaf_s: float = 0.0001

    def refusal(self, workload: Workload) -> str | None:  # noqa: ARG002
        """Says why this contender is no comparison for a workload, or None if it is one."""
        return None

    def restored_bytes(self, workload: Workload) -> int:
        """Bytes of the arrays that `restore` returns."""
        return workload.device_bytes if self.holds == "devices" else workload.stored_bytes

    @abc.abstractmethod
    def source(self, workload: Workload, seed: int) -> Any:
        """Makes what `save` takes; not timed."""

    @abc.abstractmethod
    def save(self, path: Path, source: Any) -> None:
        """Saves to `path`, which does not exist; returns when the save is durable."""

    @abc.abstractmethod
    def target(self, workload: Workload, seed: int) -> Any:
        """Makes the description that `restore` takes; not timed."""

    @abc.abstractmethod
    def restore(self, path: Path, target: Any) -> Any:
        """Restores; returns when every byte is where it belongs."""

    @abc.abstractmethod
    def problems(self, workload: Workload, seed: int, restored: Any) -> list[str]:
        """Compares what `restore` returned with the source; not timed."""


class TreeContender(Contender):
    """A contender that takes and returns trees of `jax.Array` with shardings."""

    holds = "devices"

    @final
    def source(self, workload: Workload, seed: int) -> Any:
        return workloads.make_tree(workload, seed)

    @final
    def target(self, workload: Workload, seed: int) -> Any:  # noqa: ARG002
        return workloads.make_like(workload)

    @final
    def problems(self, workload: Workload, seed: int, restored: Any) -> list[str]:
        return workloads.tree_problems(workload, seed, restored)


@final
class Jaxckpt(TreeContender):
    """`jaxckpt.save` and `jaxckpt.restore` with their defaults: checksums made and checked.

    Args:
        uses_mmap: restores arrays that alias the files; what is not read is not verified.
    """

    family = "jaxckpt"
    packages = ("jaxckpt",)
    modules = ("jaxckpt",)
    durability = "objects, directories and manifest fsynced"

    def __init__(self, *, uses_mmap: bool = False):
        self.name = "jaxckpt-mmap" if uses_mmap else "jaxckpt"
        self.restore_options = {"mmap": True} if uses_mmap else {}

    def refusal(self, workload: Workload) -> str | None:
        if not self.restore_options:
            return None
        if workload.has_small_leaves or workload.is_resharded:
            return "maps files of large leaves that keep their sharding"
        import jaxckpt

        if "mmap" not in inspect.signature(jaxckpt.restore).parameters:
            return "jaxckpt.restore has no mmap="
        return None

    def save(self, path: Path, source: Any) -> None:
        import jaxckpt

        jaxckpt.save(path, source)

    def restore(self, path: Path, target: Any) -> Any:
        import jaxckpt

        return jax.block_until_ready(jaxckpt.restore(path, like=target, **self.restore_options))


class OrbaxContender(TreeContender):
    """A contender of Orbax, with its defaults or tuned.

    Tuned means without compression, without files about each array that a restore does not need, with small data
    files where OCDBT is used, and with arrays that several devices have written from one of them: splitting small
    ones makes their saves two to eight times as slow.
    """

    family = "orbax"
    packages = ("orbax.checkpoint",)
    modules = ("orbax.checkpoint",)
    durability = ORBAX_DURABILITY
    start_s = 1.8
    leaf_s = 0.004


@final
class OrbaxV0Default(OrbaxContender):
    """`StandardCheckpointer` as the documentation shows it: OCDBT, Zarr 2, zstd."""

    name = "orbax-v0-default"
    leaf_s = 0.008

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
class OrbaxV0Tuned(OrbaxContender):
    """`PyTreeCheckpointer` with Zarr 3, tuned."""

    def __init__(self, *, use_ocdbt: bool):
        self.name = "orbax-v0-tuned-ocdbt" if use_ocdbt else "orbax-v0-tuned-files"
        self.use_ocdbt = use_ocdbt

    def _checkpointer(self) -> Any:
        import orbax.checkpoint as ocp

        handler = ocp.type_handlers.ArrayHandler(use_replica_parallel=False)
        ocp.type_handlers.register_type_handler(jax.Array, handler, override=True)
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
class OrbaxV1(OrbaxContender):
    """`orbax.checkpoint.v1`: `save` and `load`, with defaults or tuned."""

    modules = ("orbax.checkpoint", "orbax.checkpoint.experimental.v1")

    def __init__(self, *, is_tuned: bool, use_ocdbt: bool = True):
        self.is_tuned = is_tuned
        self.use_ocdbt = use_ocdbt
        if is_tuned:
            self.name = "orbax-v1-tuned-ocdbt" if use_ocdbt else "orbax-v1-tuned-files"
        else:
            self.name = "orbax-v1-default"
            self.leaf_s = OrbaxV0Default.leaf_s

    def _context(self) -> Any:
        from orbax.checkpoint.experimental import v1 as ocp

        context = ocp.Context()
        if self.is_tuned:
            context.array.saving.use_compression = False
            context.array.saving.use_replica_parallel = False
            context.array.saving.array_metadata_store = None
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


@final
class JaxSerialization(TreeContender):
    """The pytree functions of `jax.experimental.array_serialization`."""

    name = "jax-serialization"
    family = "jax"
    packages = ("flatbuffers",)
    modules = ("jax.experimental.array_serialization.pytree_serialization",)
    durability = "array data and OCDBT nodes fsynced; pytreedef.json not"
    leaf_s = 0.004

    def save(self, path: Path, source: Any) -> None:
        from jax.experimental.array_serialization import pytree_serialization

        pytree_serialization.save(source, path)

    def restore(self, path: Path, target: Any) -> Any:
        from jax.experimental.array_serialization import pytree_serialization

        return jax.block_until_ready(pytree_serialization.load(path, target))


class WholeArrays(Contender):
    """A contender that knows no shardings: it takes and returns whole arrays."""

    durability = SYNCED_HERE

    def refusal(self, workload: Workload) -> str | None:
        return "knows no shardings" if workload.is_resharded else None

    @abc.abstractmethod
    def as_numpy(self, restored: Any) -> Mapping[str, np.ndarray]:
        """What `restore` returned as NumPy arrays, by key."""

    @final
    def problems(self, workload: Workload, seed: int, restored: Any) -> list[str]:
        return workloads.host_problems(workload, seed, self.as_numpy(restored))


@final
class Equinox(WholeArrays):
    """`tree_serialise_leaves` and `tree_deserialise_leaves` of Equinox, on arrays of one device."""

    name = "equinox"
    family = "equinox"
    packages = ("equinox",)
    modules = ("equinox",)
    holds = "one device"

    def source(self, workload: Workload, seed: int) -> Any:
        arrays = workloads.make_host_arrays(workload, seed).values()
        device = jax.devices()[0]
        # Arrays that own their memory, as results of a computation do.
        values = [jax.device_put(array, device, may_alias=False) for array in arrays]
        return jax.block_until_ready(workloads.nest(workload.leaves, values))

    def save(self, path: Path, source: Any) -> None:
        import equinox

        path.mkdir()
        equinox.tree_serialise_leaves(path / "leaves.eqx", source)
        _sync_all(path)

    def target(self, workload: Workload, seed: int) -> Any:  # noqa: ARG002
        like = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in workload.leaves]
        return workloads.nest(workload.leaves, like)

    def restore(self, path: Path, target: Any) -> Any:
        import equinox

        return jax.block_until_ready(equinox.tree_deserialise_leaves(path / "leaves.eqx", target))

    def as_numpy(self, restored: Any) -> Mapping[str, np.ndarray]:
        return {key: np.asarray(array) for key, array in workloads.flatten(restored).items()}


@final
class FlaxMsgpack(WholeArrays):
    """`flax.serialization.to_bytes` into one file, and `from_bytes` from what is read of it."""

    name = "flax-msgpack"
    family = "flax"
    packages = ("flax",)
    modules = ("flax.serialization",)
    holds = "host"

    def source(self, workload: Workload, seed: int) -> Any:
        arrays = workloads.make_host_arrays(workload, seed)
        return workloads.nest(workload.leaves, list(arrays.values()))

    def save(self, path: Path, source: Any) -> None:
        from flax import serialization

        path.mkdir()
        (path / "state.msgpack").write_bytes(serialization.to_bytes(source))
        _sync_all(path)

    def target(self, workload: Workload, seed: int) -> Any:  # noqa: ARG002
        return workloads.nest(workload.leaves, [0] * len(workload.leaves))

    def restore(self, path: Path, target: Any) -> Any:
        from flax import serialization

        return serialization.from_bytes(target, (path / "state.msgpack").read_bytes())

    def as_numpy(self, restored: Any) -> Mapping[str, np.ndarray]:
        return workloads.flatten(restored)


@final
class Safetensors(WholeArrays):
    """`safetensors.numpy`: `save_file` and `load_file`, which copies into memory."""

    name = "safetensors"
    family = "safetensors"
    packages = ("safetensors",)
    modules = ("safetensors.numpy",)
    holds = "host"

    def source(self, workload: Workload, seed: int) -> Any:
        return workloads.make_host_arrays(workload, seed)

    def save(self, path: Path, source: Any) -> None:
        from safetensors.numpy import save_file

        path.mkdir()
        save_file(source, path / "state.safetensors")
        _sync_all(path)

    def target(self, workload: Workload, seed: int) -> Any:  # noqa: ARG002
        return None

    def restore(self, path: Path, target: Any) -> Any:  # noqa: ARG002
        from safetensors.numpy import load_file

        return load_file(path / "state.safetensors")

    def as_numpy(self, restored: Any) -> Mapping[str, np.ndarray]:
        return restored


class TorchContender(WholeArrays):
    """A contender of PyTorch: tensors on the CPU, by key."""

    family = "torch"
    packages = ("torch",)
    holds = "host"
    start_s = 3.0

    @final
    def source(self, workload: Workload, seed: int) -> Any:
        arrays = workloads.make_host_arrays(workload, seed)
        return {key: _tensor(array) for key, array in arrays.items()}

    @final
    def as_numpy(self, restored: Any) -> Mapping[str, np.ndarray]:
        import torch

        arrays = {}
        for key, tensor in restored.items():
            if tensor.dtype == torch.bfloat16:
                arrays[key] = tensor.view(torch.int16).numpy().view("bfloat16")
            else:
                arrays[key] = tensor.numpy()
        return arrays


def _tensor(array: np.ndarray) -> Any:
    """The tensor that has an array's memory. PyTorch takes no NumPy arrays of bfloat16, but their bits."""
    import torch

    if array.dtype == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


@final
class TorchSave(TorchContender):
    """`torch.save` and `torch.load`."""

    name = "torch-save"
    modules = ("torch",)

    def save(self, path: Path, source: Any) -> None:
        import torch

        path.mkdir()
        torch.save(source, path / "state.pt")
        _sync_all(path)

    def target(self, workload: Workload, seed: int) -> Any:  # noqa: ARG002
        return None

    def restore(self, path: Path, target: Any) -> Any:  # noqa: ARG002
        import torch

        return torch.load(path / "state.pt", weights_only=True)


@final
class TorchDcp(TorchContender):
    """`torch.distributed.checkpoint` in one process: `save` with several writing threads, `load` into tensors."""

    name = "torch-dcp"
    modules = ("torch", "torch.distributed.checkpoint")
    durability = "files fsynced; the benchmark syncs their directory"
    leaf_s = 0.001

    def save(self, path: Path, source: Any) -> None:
        import torch.distributed.checkpoint as dcp

        writer = dcp.FileSystemWriter(path, thread_count=TORCH_THREADS)
        dcp.save(source, storage_writer=writer, no_dist=True)
        _sync_all(path)

    def target(self, workload: Workload, seed: int) -> Any:  # noqa: ARG002
        # Fresh memory that nobody has touched.
        return {leaf.key: _tensor(np.empty(leaf.shape, leaf.dtype)) for leaf in workload.leaves}

    def restore(self, path: Path, target: Any) -> Any:
        import torch.distributed.checkpoint as dcp

        dcp.load(target, storage_reader=dcp.FileSystemReader(path), no_dist=True)
        return target


@final
class TensorflowCheckpoint(WholeArrays):
    """`tf.train.Checkpoint` of one `tf.Variable` for each leaf: `write`, and `read` into variables that are there."""

    name = "tf-checkpoint"
    family = "tensorflow"
    packages = ("tensorflow",)
    modules = ("tensorflow",)
    holds = "host"
    start_s = 6.0
    leaf_s = 0.001

    def source(self, workload: Workload, seed: int) -> Any:
        import tensorflow as tf

        arrays = workloads.make_host_arrays(workload, seed)
        return {key: tf.Variable(array) for key, array in arrays.items()}

    def save(self, path: Path, source: Any) -> None:
        import tensorflow as tf

        path.mkdir()
        tf.train.Checkpoint(**source).write(os.fspath(path / "state"))
        _sync_all(path)

    def target(self, workload: Workload, seed: int) -> Any:  # noqa: ARG002
        import tensorflow as tf

        return {leaf.key: tf.Variable(tf.zeros(leaf.shape, leaf.dtype)) for leaf in workload.leaves}

    def restore(self, path: Path, target: Any) -> Any:
        import tensorflow as tf

        tf.train.Checkpoint(**target).read(os.fspath(path / "state")).assert_consumed()
        return target

    def as_numpy(self, restored: Any) -> Mapping[str, np.ndarray]:
        return {key: variable.numpy() for key, variable in restored.items()}


class Payload(NamedTuple):
    """Bytes in memory that suits O_DIRECT.

    Attributes:
        memory: starts at a huge page, and is as long as `nbytes` rounded up to a block.
        nbytes: how many of them count.
    """

    memory: np.ndarray
    nbytes: int


class RawContender(Contender):
    """A contender that moves the same bytes between memory and files."""

    family = "raw"
    durability = "files and their directory fsynced"
    holds = "memory"

    def refusal(self, workload: Workload) -> str | None:
        # A file of these takes no time at all; what limits them is JAX's own work for each leaf.
        return "raw-packed is the limit for small leaves" if workload.has_small_leaves else None

    @final
    def source(self, workload: Workload, seed: int) -> Any:
        return make_payload(workload, seed)

    @final
    def target(self, workload: Workload, seed: int) -> Any:  # noqa: ARG002
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
        _write_file(path / "data", source.memory[: source.nbytes])
        _sync_directories(path)

    def restore(self, path: Path, target: Any) -> Any:
        memory = np.empty(target, np.uint8)
        with open(path / "data", "rb", buffering=0) as file:
            done = 0
            while done < memory.size:
                count = file.readinto(memory[done : done + RAW_REQUEST_BYTES])
                if not count:
                    raise EOFError("the file ends early")
                done += count
        return memory


@final
class RawThreads(RawContender):
    """Several threads: `pwrite` and `fsync`; `preadv` into fresh huge pages.

    Args:
        name: of the contender.
        file_count: files that share the bytes evenly; the length of a single one is set before it is written.
        threads: number of them.
        is_direct: O_DIRECT, past the page cache.
    """

    def __init__(self, name: str, *, file_count: int, threads: int, is_direct: bool):
        self.name = name
        self.file_count = file_count
        self.threads = threads
        self.extra_flags = os.O_DIRECT if is_direct else 0

    def save(self, path: Path, source: Any) -> None:
        path.mkdir()
        with concurrent.futures.ThreadPoolExecutor(self.threads) as pool:
            parts = self._parts(source.nbytes)
            if self.file_count > 1:
                jobs = [
                    pool.submit(self._save_file, path / name, source, start, end)
                    for name, (start, end) in parts.items()
                ]
                for job in jobs:
                    job.result()
            else:
                self._save_preallocated(path / "00", source, pool)
        _sync_directories(path)

    def _save_file(self, path: Path, source: Payload, start: int, end: int) -> None:
        descriptor = self._open(path, os.O_CREAT | os.O_WRONLY)
        try:
            _write_all(descriptor, source.memory[start : _round_up(end)], offset=0)
            os.ftruncate(descriptor, end - start)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def _save_preallocated(
        self, path: Path, source: Payload, pool: concurrent.futures.ThreadPoolExecutor
    ) -> None:
        descriptor = self._open(path, os.O_CREAT | os.O_WRONLY)
        try:
            os.posix_fallocate(descriptor, 0, len(source.memory))
            jobs = [
                pool.submit(_write_all, descriptor, source.memory[start : start + RAW_REQUEST_BYTES], start)
                for start in range(0, len(source.memory), RAW_REQUEST_BYTES)
            ]
            for job in jobs:
                job.result()
            os.ftruncate(descriptor, source.nbytes)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def restore(self, path: Path, target: Any) -> Any:
        memory = huge_page_array(target)
        descriptors = []
        try:
            with concurrent.futures.ThreadPoolExecutor(self.threads) as pool:
                jobs = []
                for name, (start, end) in self._parts(target).items():
                    descriptor = self._open(path / name, os.O_RDONLY)
                    descriptors.append(descriptor)
                    for place in range(start, end, RAW_REQUEST_BYTES):
                        piece_end = min(place + RAW_REQUEST_BYTES, end)
                        piece = memory[place : _round_up(piece_end)]
                        jobs.append(
                            pool.submit(_read_all, descriptor, piece, place - start, piece_end - place)
                        )
                for job in jobs:
                    job.result()
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
        return memory[:target]

    def _parts(self, nbytes: int) -> dict[str, tuple[int, int]]:
        """Where the bytes of each file begin and end."""
        part_bytes = _round_up(-(-nbytes // self.file_count))
        starts = range(0, nbytes, part_bytes)
        return {
            f"{number:02d}": (start, min(start + part_bytes, nbytes)) for number, start in enumerate(starts)
        }

    def _open(self, path: Path, flags: int) -> int:
        try:
            return os.open(path, flags | self.extra_flags, 0o644)
        except OSError as error:
            if self.extra_flags and error.errno == errno.EINVAL:
                raise UnsupportedHereError("the file system refuses O_DIRECT") from error
            raise


@final
class RawPacked(Contender):
    """The least that trees of many small leaves can cost: JAX's own copies, and one file.

    A save is `jax.device_get` of the tree, and one write of its bytes, packed before, with `fsync`. A restore is
    `jax.device_put` of the same arrays, without reading anything.
    """

    name = "raw-packed"
    family = "raw"
    durability = "the file and its directory fsynced"
    holds = "devices"

    def refusal(self, workload: Workload) -> str | None:
        return None if workload.has_small_leaves else "is the limit for small leaves"

    def source(self, workload: Workload, seed: int) -> Any:
        return workloads.make_tree(workload, seed), make_payload(workload, seed)

    def save(self, path: Path, source: Any) -> None:
        tree, payload = source
        jax.device_get(tree)
        path.mkdir()
        _write_file(path / "data", payload.memory[: payload.nbytes])
        _sync_directories(path)

    def target(self, workload: Workload, seed: int) -> Any:
        arrays = workloads.make_host_arrays(workload, seed)
        shardings = workloads.shardings(workload, workload.restore_axes)
        return (
            workloads.nest(workload.leaves, list(arrays.values())),
            workloads.nest(workload.leaves, shardings),
        )

    def restore(self, path: Path, target: Any) -> Any:  # noqa: ARG002
        arrays, shardings = target
        return jax.block_until_ready(jax.device_put(arrays, shardings))

    def problems(self, workload: Workload, seed: int, restored: Any) -> list[str]:
        return workloads.tree_problems(workload, seed, restored)


def make_payload(workload: Workload, seed: int) -> Payload:
    memory = huge_page_array(workload.stored_bytes)
    workloads.make_payload(workload, seed, memory[: workload.stored_bytes])
    return Payload(memory, workload.stored_bytes)


def huge_page_array(nbytes: int) -> np.ndarray:
    """Fresh memory in aligned huge pages, where the kernel has them: the cheapest kind to touch first.

    It is as long as `nbytes` rounded up to a block of O_DIRECT.
    """
    rounded_bytes = _round_up(nbytes)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    memory = mmap.mmap(-1, rounded_bytes + HUGE_PAGE_BYTES, flags=flags)
    memory.madvise(mmap.MADV_HUGEPAGE)
    array = np.frombuffer(memory, np.uint8)
    start = -array.ctypes.data % HUGE_PAGE_BYTES
    return array[start : start + rounded_bytes]


def _round_up(nbytes: int) -> int:
    return -(-nbytes // DIRECT_BLOCK_BYTES) * DIRECT_BLOCK_BYTES


def _write_all(descriptor: int, data: np.ndarray, offset: int) -> None:
    done = 0
    while done < data.size:
        done += os.pwrite(descriptor, data[done : done + RAW_REQUEST_BYTES], offset + done)


def _write_file(path: Path, data: np.ndarray) -> None:
    descriptor = os.open(path, os.O_CREAT | os.O_WRONLY, 0o644)
    try:
        _write_all(descriptor, data, offset=0)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read_all(descriptor: int, memory: np.ndarray, offset: int, nbytes: int) -> None:
    """Reads `nbytes` into `memory`, which may be longer: O_DIRECT asks for whole blocks at the end of a file."""
    done = 0
    while done < nbytes:
        count = os.preadv(descriptor, [memory[done:]], offset + done)
        if count == 0:
            raise EOFError("a file ends early")
        done += count


def _sync_directories(path: Path) -> None:
    for folder in (path, path.parent):
        _sync(folder)


def _sync_all(path: Path) -> None:
    """Makes everything below `path` durable, and `path` itself."""
    for folder, _, names in os.walk(path):
        for name in names:
            _sync(Path(folder, name))
        _sync(Path(folder))
    _sync(path.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# The order of the rows of a table.
ALL_CONTENDERS: tuple[Contender, ...] = (
    Jaxckpt(),
    Jaxckpt(uses_mmap=True),
    OrbaxV0Default(),
    OrbaxV0Tuned(use_ocdbt=True),
    OrbaxV0Tuned(use_ocdbt=False),
    OrbaxV1(is_tuned=False),
    OrbaxV1(is_tuned=True, use_ocdbt=True),
    OrbaxV1(is_tuned=True, use_ocdbt=False),
    JaxSerialization(),
    Equinox(),
    FlaxMsgpack(),
    Safetensors(),
    TorchSave(),
    TorchDcp(),
    TensorflowCheckpoint(),
    RawOneFile(),
    RawThreads("raw-threads", file_count=RAW_FILE_COUNT, threads=RAW_THREADS, is_direct=False),
    RawThreads("raw-threads-direct", file_count=RAW_FILE_COUNT, threads=RAW_THREADS, is_direct=True),
    RawThreads("raw-one-file-direct", file_count=1, threads=RAW_THREADS_OF_ONE_FILE, is_direct=True),
    RawPacked(),
)


@functools.cache
def find_contender(name: str) -> Contender:
    """Returns the contender called `name`, or an instance of the class that "MODULE:CLASS" names.

    Raises:
        KeyError: no contender has that name.
    """
    module, colon, class_name = name.partition(":")
    if colon:
        return getattr(importlib.import_module(module), class_name)()
    for contender in ALL_CONTENDERS:
        if contender.name == name:
            return contender
    raise KeyError(name)


def address(contender: Contender) -> str:
    """What `find_contender` finds it by, in other processes too."""
    if contender in ALL_CONTENDERS:
        return contender.name
    return f"{type(contender).__module__}:{type(contender).__qualname__}"


def place_in_tables(contender: Contender) -> int:
    """The number of a contender's row; those that are not of this module come last."""
    if contender in ALL_CONTENDERS:
        return ALL_CONTENDERS.index(contender)
    return len(ALL_CONTENDERS)


def absence(contender: Contender) -> str | None:
    """Says which package of a contender is not installed, or None if all are."""
    for package in contender.packages:
        try:
            spec = importlib.util.find_spec(package)
        except ModuleNotFoundError:
            spec = None
        if spec is None or spec.origin is None:  # a folder without __init__.py has a spec but no origin
            return f"{package} is not installed"
    return None


def load_modules(contender: Contender) -> None:
    for module in contender.modules:
        importlib.import_module(module)
