"""``restore(..., mmap=True)``: arrays that show the stored files. What is mapped is right, private, and said so.

And reading in steps, which maps of a file and blocks that are verified while they are read have in common: ranges of
objects that lie anywhere, in memory that lies anywhere.
"""

from __future__ import annotations

import errno
import logging
import mmap
import os
import pathlib
import shutil
import sys
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec as P

import jaxckpt
from jaxckpt._config import MIB
from jaxckpt._reading import open_checkpoint
from jaxckpt._storage import Buffer, Store, allocate_aligned
from jaxckpt._store import LocalStore, _map_at

from .helpers import assert_same_leaf, assert_same_tree, make_mesh, run_fork
from .test_manager_truth import WatchedStore

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux can map files into place")


def noise(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2**31, shape, np.int32)


def make_tree() -> dict[str, Any]:
    rows = NamedSharding(make_mesh({"x": 8}), P("x"))
    return {
        "sharded": jax.device_put(noise((4096, 1024), 1), rows),  # a pack has its shards
        "chunks": jnp.asarray(noise((6, 1024, 1024), 2)),  # three objects make up one shard
        "host": noise((1024, 1024), 3),
        "key": jax.random.split(jax.random.key(0), 100_000),
        "small": jnp.arange(10),
        "step": 7,
    }


OPTIONS = jaxckpt.SaveOptions(chunk_bytes_max=8 * MIB)


def mapped_files() -> set[str]:
    """Files that this process has mapped and that a store may have written."""
    fields = [line.split(maxsplit=5) for line in pathlib.Path("/proc/self/maps").read_text().splitlines()]
    return {line[5] for line in fields if len(line) == 6 and "data-" in line[5]}


def stored_bytes(path: pathlib.Path) -> dict[pathlib.Path, bytes]:
    return {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}


@pytest.fixture
def saved(path: pathlib.Path) -> dict[str, Any]:
    tree = make_tree()
    jaxckpt.save(path, tree, options=OPTIONS)
    return tree


def test_mapped_leaves_are_those_that_were_saved_and_hardly_anything_is_read(
    path: pathlib.Path, saved: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "jaxckpt")
    restored, report = jaxckpt.restore(path, mmap=True, report=True)
    assert_same_tree(restored, saved)
    assert set(report.mapped) == {"sharded", "chunks", "host", "key"}
    assert "mapped, not verified: 4" in str(report)
    assert "6 leaves, 4 of them mapped" in caplog.text
    assert report.nbytes > 40 * MIB
    assert report.bytes_read < 64 << 10
    assert len(mapped_files()) >= 4


def test_one_leaf_in_many_objects_is_one_array_on_its_device(path: pathlib.Path) -> None:
    values = noise((40, 512, 1024))
    jaxckpt.save(path, {"w": values}, options=jaxckpt.SaveOptions(chunk_bytes_max=2 * MIB, pack_bytes_max=0))
    restored, report = jaxckpt.restore(
        path, like={"w": jnp.zeros(values.shape, np.int32)}, mmap=True, report=True
    )
    assert len(list(path.glob("data-*/arrays/w/c*"))) == 40
    assert report.mapped == ("w",)
    assert_same_leaf(restored["w"], jnp.asarray(values))


@pytest.mark.parametrize("pack_bytes_max", [0, 64 * MIB])
@pytest.mark.parametrize("rows", [1, 5, 7])
def test_chunks_of_any_length_lie_side_by_side(path: pathlib.Path, rows: int, pack_bytes_max: int) -> None:
    """Where a chunk ends within a page, that page is read; what cannot lie as in the object is read as usual."""
    mesh = make_mesh({"x": 5})
    tree = {
        "odd": noise((35, 99_991), 1),
        "even": noise((35, 131_072), 2),
        "bytes": np.random.default_rng(3).bytes(3_000_001),
        "spread": jax.device_put(noise((35, 99_991), 4), NamedSharding(mesh, P("x"))),
    }
    options = jaxckpt.SaveOptions(chunk_bytes_max=rows * 600_000, pack_bytes_max=pack_bytes_max)
    jaxckpt.save(path, tree, options=options)
    restored, report = jaxckpt.restore(path, mmap=True, report=True)
    assert_same_tree(restored, tree)
    assert "even" in report.mapped
    assert "bytes" not in report.mapped


def test_what_is_made_otherwise_than_by_showing_the_file_is_read_and_verified(path: pathlib.Path) -> None:
    values = noise((2048, 1024))
    jaxckpt.save(path, {"w": jnp.asarray(values)})
    columns = NamedSharding(make_mesh({"x": 8}), P(None, "x"))
    asked: dict[str, dict[str, Any]] = {
        "columns": {"sharding": columns},
        "dtype": {"like": {"w": jnp.zeros(values.shape, jnp.float32)}, "cast": True},
        "shape": {"like": {"w": jnp.zeros(values.size, jnp.int32)}, "reshape": True},
    }
    for name, keywords in asked.items():
        _, report = jaxckpt.restore(path, mmap=True, report=True, **keywords)
        assert report.mapped == (), name
        assert report.bytes_read >= values.nbytes, name


def test_an_object_store_is_read() -> None:
    jaxckpt.save("memory://test_mapping/a", {"w": noise((1024, 1024))})
    restored, report = jaxckpt.restore("memory://test_mapping/a", mmap=True, report=True)
    assert_same_leaf(restored["w"], noise((1024, 1024)))
    assert report.mapped == ()


def test_damage_shows_in_mapped_arrays_and_verify_finds_it(path: pathlib.Path, saved: dict[str, Any]) -> None:
    (chunk,) = path.glob("data-*/arrays/chunks/c.2.0.0")
    with chunk.open("r+b") as file:
        file.seek(4 * 100_000)
        file.write(b"\xff\xff\xff\x7f")
    checkpoint = jaxckpt.open(path)
    restored = jaxckpt.restore(checkpoint, mmap=True)
    assert np.asarray(restored["chunks"])[4].ravel()[100_000] == 0x7FFFFFFF
    assert {problem.key for problem in jaxckpt.verify(checkpoint).problems} == {"chunks"}
    with pytest.raises(jaxckpt.CorruptError):
        jaxckpt.restore(checkpoint)


@pytest.mark.parametrize("harm", ["missing", "short"])
def test_objects_that_are_not_whole_are_errors_before_anything_is_mapped(
    path: pathlib.Path, saved: dict[str, Any], harm: str
) -> None:
    (chunk,) = path.glob("data-*/arrays/chunks/c.2.0.0")
    if harm == "missing":
        chunk.unlink()
    else:
        os.truncate(chunk, 8 * MIB - 1)
    with pytest.raises(jaxckpt.CorruptError) as caught:
        jaxckpt.restore(path, mmap=True)
    assert {problem.key for problem in caught.value.problems} == {"chunks"}


def test_writing_into_what_is_mapped_never_reaches_the_files(
    path: pathlib.Path, saved: dict[str, Any]
) -> None:
    before = stored_bytes(path)
    restored = jaxckpt.restore(path, mmap=True)
    restored["host"][:] = -1
    step = jax.jit(lambda array: array * 0 - 1, donate_argnums=0)
    for key in ("sharded", "chunks"):
        assert np.all(np.asarray(step(restored.pop(key))) == -1)
    assert np.all(restored["host"] == -1)
    assert stored_bytes(path) == before
    assert_same_tree(jaxckpt.restore(path), saved)


def test_memory_that_is_mapped_can_be_written_and_stays_private(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "object"
    file.write_bytes(bytes(range(256)) * 64)
    buffer = allocate_aligned(16384)
    assert LocalStore(str(tmp_path)).map_into("object", 0, buffer)
    buffer[5000] = 99  # what XLA would do with memory that it was given
    assert file.read_bytes() == bytes(range(256)) * 64
    assert buffer[4999] == 4999 % 256


def test_deleting_a_mapped_checkpoint_is_harmless(tmp_path: pathlib.Path) -> None:
    program = """
        import pathlib, sys
        import jax.numpy as jnp, numpy as np
        import jaxckpt

        def values(step):
            return np.arange(1 << 20, dtype=np.int32) + step

        with jaxckpt.CheckpointManager(sys.argv[1], max_to_keep=1) as manager:
            manager.save(1, {"w": jnp.asarray(values(1))})
            manager.wait()
            mapped, report = manager.restore(1, mmap=True, report=True)
            assert report.mapped == ("w",)
            manager.save(2, {"w": jnp.asarray(values(2))})
            manager.wait()
            assert manager.steps() == [2]
            jaxckpt.save(pathlib.Path(sys.argv[1], "a"), {"w": values(3)})
            other = jaxckpt.restore(pathlib.Path(sys.argv[1], "a"), mmap=True)
            jaxckpt.save(pathlib.Path(sys.argv[1], "a"), {"w": values(4)}, overwrite=True)
        assert np.array_equal(mapped["w"], values(1))
        assert np.array_equal(other["w"], values(3))
        """
    run_fork(program, tmp_path / "run")


def test_mapped_memory_goes_with_its_arrays(path: pathlib.Path, saved: dict[str, Any]) -> None:
    restored = jaxckpt.restore(path, select="host", mmap=True)
    assert any(name.startswith(str(path)) for name in mapped_files())
    del restored
    assert not any(name.startswith(str(path)) for name in mapped_files())


def test_a_copy_of_a_mapped_checkpoint_can_be_saved(path: pathlib.Path, saved: dict[str, Any]) -> None:
    restored = jaxckpt.restore(path, mmap=True)
    jaxckpt.save(path.with_name("copy"), restored)
    shutil.rmtree(path)
    assert_same_tree(jaxckpt.restore(path.with_name("copy")), saved)


# --- the store ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", [0, 64, 4096, 5000])
@pytest.mark.parametrize("offset", [0, 64, 4096, 12_352])
@pytest.mark.parametrize("length", [100, 4096, 50_000])
def test_a_range_is_mapped_or_left_alone(
    tmp_path: pathlib.Path, place: int, offset: int, length: int
) -> None:
    data = np.random.default_rng(0).integers(0, 256, 100_000, np.uint8)
    (tmp_path / "object").write_bytes(data)
    memory = allocate_aligned(80_000)
    buffer = memory[place : place + length]
    is_mapped = LocalStore(str(tmp_path)).map_into("object", offset, buffer)
    assert is_mapped == (
        (place - offset) % mmap.PAGESIZE == 0 and -place % mmap.PAGESIZE + mmap.PAGESIZE <= length
    )
    if is_mapped:
        assert np.array_equal(buffer, data[offset : offset + length])
    assert not memory[:place].any()
    assert not memory[place + length :].any()


def test_a_range_beyond_the_end_of_a_file_is_not_mapped(tmp_path: pathlib.Path) -> None:
    (tmp_path / "object").write_bytes(bytes(8000))
    assert not LocalStore(str(tmp_path)).map_into("object", 0, allocate_aligned(8192))


def test_memory_is_usable_after_the_kernel_refused_a_mapping(tmp_path: pathlib.Path) -> None:
    buffer = allocate_aligned(8192)
    buffer[:] = 1
    descriptor = os.open(tmp_path, os.O_RDONLY)  # a directory
    try:
        assert not _map_at(buffer.ctypes.data, 8192, descriptor, 0)
    finally:
        os.close(descriptor)
    buffer[:] = 2


def test_a_file_is_read_in_steps_of_a_block(tmp_path: pathlib.Path) -> None:
    data = np.random.default_rng(0).integers(0, 256, 3 * MIB + 5, np.uint8)
    (tmp_path / "object").write_bytes(data)
    buffer = allocate_aligned(4 * MIB)
    store = LocalStore(str(tmp_path))
    for filled in store.read_steps("object", 0, buffer):
        assert np.array_equal(buffer[:filled], data[:filled])
        assert filled % MIB == 0 or filled == len(data)
    assert filled == len(data) == store.read_into("object", 0, buffer)
    assert list(store.read_steps("object", len(data), buffer)) == []


class BrokenInTheMiddle(WatchedStore):
    """A disk that reads a MiB of each object of an array, and no more."""

    def __init__(self, path: Any) -> None:
        super().__init__(path, lambda what, name: None)

    def read_steps(self, name: str, offset: int, buffer: Buffer) -> Iterator[int]:
        yield self.read_into(name, offset, buffer[:MIB])
        if len(buffer) > MIB:
            raise OSError(errno.EIO, os.strerror(errno.EIO), name)

    def child(self, name: str) -> Store:
        return BrokenInTheMiddle(os.path.join(self.path, name))


def test_what_came_before_storage_failed_counts_as_whole(path: pathlib.Path) -> None:
    leaves = {
        key: noise((128, 1024), number) for number, key in enumerate("abcd")
    }  # half a MiB each, in one pack
    jaxckpt.save(path, leaves)
    with pytest.raises(jaxckpt.CorruptError) as caught:
        jaxckpt.restore(open_checkpoint(BrokenInTheMiddle(path)))
    assert [problem.key for problem in caught.value.problems] == ["c", "d"]
