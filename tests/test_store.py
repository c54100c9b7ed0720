"""Where a checkpoint may be: relative paths, links, file URLs, other names, and object stores (``memory://``)."""

from __future__ import annotations

import math
import os
import pathlib
import shutil
import tempfile
import threading
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore as ts

import jaxckpt
from jaxckpt._storage import allocate_aligned
from jaxckpt._store import Kernel, LocalStore, open_store

from .helpers import assert_same_tree, run_fork
from .storage_faults import NotedKernel, Operation

MIB = 1 << 20

ODD_NAMES = ["with a space", "50%", "100%25", "#1?", "日本", "a\nb"]

TREE = {"large": jnp.arange(1_500_000.0).reshape(1500, 1000), "small": [np.arange(5), 7, "text"]}


@pytest.fixture
def path(tmp_path: pathlib.Path) -> pathlib.Path:
    return tmp_path / "checkpoint"


# --- local files ----------------------------------------------------------------------------------------------


@pytest.fixture
def memory_path() -> Iterator[pathlib.Path]:
    """A directory whose files are in memory, where there is such a place."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as folder:
        yield pathlib.Path(folder)


class AlignmentKernel(Kernel):
    """Notes what is written past the page cache, and how the memory of each write is aligned."""

    def __init__(self) -> None:
        self.direct: set[int] = set()
        self.writes: list[tuple[int, int]] = []

    def open(self, path: str, flags: int, mode: int = 0o777) -> int:  # type: ignore[override]
        descriptor = os.open(path, flags, mode)
        self.direct.discard(descriptor)
        if flags & os.O_DIRECT:
            self.direct.add(descriptor)
        return descriptor

    def pwrite(self, descriptor: int, data: Any, offset: int) -> int:  # type: ignore[override]
        if descriptor in self.direct:
            self.writes.append((np.frombuffer(data, np.uint8).ctypes.data, len(data)))
        return os.pwrite(descriptor, data, offset)


@pytest.mark.parametrize("place", ["disk", "memory"])
@pytest.mark.parametrize("lead", [0, 64, 4095])
@pytest.mark.parametrize("nbytes", [0, 1, 4095, 4096, MIB, 2 * MIB, 2 * MIB + 1, 5 * MIB + 4097])
def test_an_object_is_written_in_steps_of_whole_blocks(
    tmp_path: pathlib.Path, memory_path: pathlib.Path, place: str, lead: int, nbytes: int
) -> None:
    kernel = AlignmentKernel()
    folder = tmp_path if place == "disk" else memory_path
    data = allocate_aligned(lead + nbytes)[lead:]
    data[:] = np.random.default_rng(0).integers(0, 256, nbytes, np.uint8)
    writer = LocalStore(str(folder), kernel).create("object", nbytes)
    parts = [bytes(part) for part in writer.write_steps(0, data)]
    writer.finish()
    assert b"".join(parts) == bytes(data) == (folder / "object").read_bytes()
    assert all(len(part) % MIB == 0 for part in parts[:-1])
    assert all(address % 512 == 0 and length % 512 == 0 for address, length in kernel.writes)


def test_what_is_written_is_what_was_seen_even_if_the_memory_changes(tmp_path: pathlib.Path) -> None:
    """Past the page cache, from memory that is not aligned."""
    store = LocalStore(str(tmp_path))
    data = allocate_aligned(4 * MIB + 64)[64:]
    writer = store.create("object", len(data))
    seen = b""
    for part in writer.write_steps(0, data):
        seen += bytes(part)
        data[:] = 1
    writer.finish()
    is_copied = not store.read("object", len(data)).startswith(b"\1")
    assert not is_copied or store.read("object", len(data)) == seen


class MetadataGate(NotedKernel):
    """Lets no ``zarr.json`` be made before all of so many bytes of arrays are written."""

    def __init__(self, nbytes: int) -> None:
        super().__init__()
        self._bytes_left = nbytes
        self._are_written = threading.Event()

    def before(self, operation: Operation) -> None:
        if (
            operation.call == "create"
            and "/arrays/" in operation.path
            and operation.path.endswith("zarr.json")
        ):
            assert self._are_written.wait(60)

    def pwrite(self, descriptor: int, data: Any, offset: int) -> int:  # type: ignore[override]
        count = super().pwrite(descriptor, data, offset)
        with self.lock:
            self._bytes_left -= count
            if self._bytes_left <= 0:
                self._are_written.set()
        return count


def test_arrays_do_not_wait_for_metadata(tmp_path: pathlib.Path) -> None:
    tree = {str(number): jnp.full((MIB,), number, jnp.float32) for number in range(4)}
    options = jaxckpt.SaveOptions(io_threads=2, pack_bytes_max=0)
    jaxckpt.save(LocalStore(str(tmp_path / "checkpoint"), MetadataGate(16 * MIB)), tree, options=options)  # type: ignore[arg-type]
    assert_same_tree(jaxckpt.restore(tmp_path / "checkpoint"), tree)


def test_a_relative_path_is_resolved_when_the_save_is_called(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run").mkdir()
    monkeypatch.chdir(tmp_path / "run")
    pending = jaxckpt.save_async("step 1/é", TREE)
    monkeypatch.chdir("/")
    assert pending.wait().path == str(tmp_path / "run" / "step 1" / "é")
    assert_same_tree(jaxckpt.restore(tmp_path / "run" / "step 1" / "é"), TREE)


@pytest.mark.parametrize("name", ODD_NAMES)
def test_file_urls_name_what_pathlib_says(tmp_path: pathlib.Path, name: str) -> None:
    path = tmp_path / name
    jaxckpt.save(path.as_uri(), TREE)
    assert (path / "manifest.msgpack").exists()
    assert_same_tree(jaxckpt.restore(path.as_uri()), TREE)
    local = path.as_uri().replace("file://", "file://localhost")
    jaxckpt.save_async(local, TREE, overwrite=True).wait()
    assert jaxckpt.open(local).path == jaxckpt.open(path).path == str(path)


def test_a_file_url_of_another_host_is_refused(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for use in (jaxckpt.open, lambda path: jaxckpt.save(path, TREE)):
        with pytest.raises(jaxckpt.CheckpointError, match=r"host 'run'.*file:///"):
            use("file://run/step_1")
    assert not os.listdir(tmp_path)


def test_a_link_to_a_checkpoint_is_one(tmp_path: pathlib.Path, path: pathlib.Path) -> None:
    jaxckpt.save(path, TREE)
    (tmp_path / "latest").symlink_to(path)
    assert_same_tree(jaxckpt.restore(tmp_path / "latest"), TREE)
    jaxckpt.save(tmp_path / "latest", {"new": 1}, overwrite=True)
    assert jaxckpt.restore(path) == {"new": 1}
    assert len(list(path.glob("data-*"))) == 1


def test_a_copy_under_another_name_is_the_same_checkpoint(tmp_path: pathlib.Path, path: pathlib.Path) -> None:
    jaxckpt.save(path, TREE)
    shutil.copytree(path, tmp_path / "a copy")
    shutil.rmtree(path)
    assert jaxckpt.verify(tmp_path / "a copy").ok
    assert_same_tree(jaxckpt.restore(tmp_path / "a copy"), TREE)


# --- object stores --------------------------------------------------------------------------------------------


@pytest.fixture
def url(request: pytest.FixtureRequest) -> str:
    return f"memory://tests/{request.node.name}/a é"


def kv_store(url: str) -> ts.KvStore:
    store = open_store(url)
    return store._root / store._prefix  # type: ignore[attr-defined]


def names_in(url: str) -> list[str]:
    return [name.decode() for name in kv_store(url).list().result()]


def test_a_checkpoint_in_an_object_store(url: str) -> None:
    with pytest.raises(jaxckpt.NotFoundError):
        jaxckpt.open(url)
    jaxckpt.save(url, TREE)
    assert_same_tree(jaxckpt.restore(url), TREE)
    assert_same_tree(jaxckpt.restore(url + "/", TREE), TREE)
    assert jaxckpt.verify(url).ok
    leaf = jaxckpt.open(url)["large"]
    assert np.array_equal(leaf[10:20, ::7], np.asarray(TREE["large"])[10:20, ::7])
    with pytest.raises(jaxckpt.ExistsError):
        jaxckpt.save(url, {"new": 1})
    jaxckpt.save_async(url, {"new": 1}, overwrite=True).wait()
    assert jaxckpt.restore(url) == {"new": 1}
    assert len({name.partition("/")[0] for name in names_in(url) if name.startswith("data-")}) == 1


@pytest.mark.parametrize("harm", ["missing", "short", "long", "empty", "flipped"])
def test_damage_in_an_object_store_is_found(url: str, harm: str) -> None:
    jaxckpt.save(url, TREE)
    for name in names_in(url):
        whole = bytes(kv_store(url).read(name).result().value)
        middle = len(whole) // 2
        harmed = {
            "missing": None,
            "short": whole[:-1],
            "long": whole + b"x",
            "empty": b"",
            "flipped": whole[:middle] + bytes([whole[middle] ^ 4]) + whole[middle + 1 :],
        }[harm]
        kv_store(url).write(name, harmed).result()
        with pytest.raises((jaxckpt.CorruptError, jaxckpt.FormatError, jaxckpt.NotFoundError)):
            jaxckpt.restore(url)
        if name != "manifest.msgpack":
            assert name in str(jaxckpt.verify(url))
        kv_store(url).write(name, whole).result()
    assert_same_tree(jaxckpt.restore(url), TREE)


def test_a_url_that_nothing_serves(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(jaxckpt.CheckpointError, match="'nowhere://x' is no place"):
        jaxckpt.save("nowhere://x", TREE)
    assert not os.listdir(tmp_path)


# --- metadata -------------------------------------------------------------------------------------------------


def test_metadata_may_hold_nan(path: pathlib.Path) -> None:
    """A loss often is."""
    jaxckpt.save(path, {}, metadata={"loss": [math.nan, np.float64("nan")], "step": 1})
    loss = jaxckpt.open(path).metadata["loss"]
    assert [type(value) for value in loss] == [float, float]
    assert all(map(math.isnan, loss))


@pytest.mark.parametrize("metadata", [(1, 2), {"a": [(1,)]}, {1: 2}, np.float32(1), 2**64, {"a": object()}])
def test_metadata_that_would_come_back_different_is_refused(path: pathlib.Path, metadata: object) -> None:
    with pytest.raises(TypeError, match="metadata= must be plain data"):
        jaxckpt.save(path, {}, metadata=metadata)
    assert not path.exists()


# --- holds ----------------------------------------------------------------------------------------------------


def held_file(tmp_path: pathlib.Path) -> LocalStore:
    (tmp_path / "file").write_bytes(b"contents")
    return LocalStore(str(tmp_path))


def test_what_is_read_cannot_be_held_alone_until_the_reader_lets_go(tmp_path: pathlib.Path) -> None:
    store = held_file(tmp_path)
    data, hold = store.read_and_hold("file", 100)
    assert data == b"contents"
    assert hold is not None
    with pytest.raises(BlockingIOError):
        store.hold_alone("file")
    hold.release()
    hold.release()
    assert store.hold_alone("file") is not None


def test_several_readers_hold_one_object(tmp_path: pathlib.Path) -> None:
    store = held_file(tmp_path)
    _, first = store.read_and_hold("file", 100)
    _, second = store.read_and_hold("file", 100)
    assert first is not None
    first.release()
    with pytest.raises(BlockingIOError):
        store.hold_alone("file")
    del second
    assert store.hold_alone("file") is not None


def test_what_somebody_is_about_to_delete_is_not_there_for_a_reader(tmp_path: pathlib.Path) -> None:
    store = held_file(tmp_path)
    hold = store.hold_alone("file")
    assert hold is not None
    with pytest.raises(FileNotFoundError):
        store.read_and_hold("file", 100)
    hold.release()
    assert store.read_and_hold("file", 3)[0] == b"cont"


def test_a_forked_process_does_not_keep_the_holds_of_its_parent(tmp_path: pathlib.Path) -> None:
    """A data loader's worker outlives a save or a restore by far."""
    run_fork(
        """
        import os, sys
        from jaxckpt._store import LocalStore

        store = LocalStore(sys.argv[1])
        _, hold = store.read_and_hold("file", 100)
        at_worker, to_worker = os.pipe()
        at_parent, to_parent = os.pipe()
        worker = os.fork()
        if worker == 0:
            os.write(to_parent, b"x")  # it runs
            os.read(at_worker, 1)  # and lives until the parent says so
            os._exit(0)
        try:
            os.read(at_parent, 1)
            try:
                store.hold_alone("file")
            except BlockingIOError:
                pass
            else:
                raise AssertionError("the fork ended the hold of its parent")
            hold.release()
            assert store.hold_alone("file") is not None
        finally:
            os.write(to_worker, b"x")
            os.waitpid(worker, 0)
        """,
        held_file(tmp_path).path,
    )


def test_a_process_with_many_descriptors_reads_without_holding(tmp_path: pathlib.Path) -> None:
    store = held_file(tmp_path)
    holds = [store.read_and_hold("file", 100)[1] for _ in range(600)]
    assert holds[0] is not None
    assert holds[-1] is None
