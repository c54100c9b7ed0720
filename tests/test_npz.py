"""Archives of arrays: against NumPy both ways, lazily, and against damage."""

from __future__ import annotations

import errno
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec as P

import jaxckpt
from jaxckpt import CorruptError, ExistsError, NotFoundError, UnsupportedLeafError
from jaxckpt._converting import convert
from jaxckpt._progress import ProgressMeter
from jaxckpt.interop import npz

from .helpers import assert_same_tree, make_mesh
from .storage_faults import RefusingKernel

ARRAYS: dict[str, np.ndarray[Any, Any]] = {
    "w": np.arange(24, dtype=np.float32).reshape(4, 6),
    "fortran": np.asfortranarray(np.arange(60).reshape(3, 4, 5)),
    "big": np.arange(12, dtype=">i4").reshape(3, 4),
    "half": np.ones((2, 3), np.float16),
    "flags": np.array([True, False]),
    "complex": np.full((2, 2), 1 + 2j),
    "one": np.asarray(3.5),
    "empty": np.zeros((0, 4)),
    "layers/0/w": np.arange(3, dtype=np.uint8),
}


@pytest.fixture
def path(tmp_path: pathlib.Path) -> pathlib.Path:
    return tmp_path / "a.npz"


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_what_numpy_saves_is_read_whole_and_in_parts(path: pathlib.Path, save: Any):
    save(path, **ARRAYS)
    with npz.open(path) as checkpoint:
        assert set(checkpoint.keys()) == set(ARRAYS)
        for name, array in ARRAYS.items():
            found = checkpoint[name][...]
            assert found.dtype == array.dtype.newbyteorder("=")
            assert np.array_equal(found, array)
            if array.ndim:
                assert np.array_equal(checkpoint[name][1:], array[1:])
            if array.ndim > 1:
                assert np.array_equal(checkpoint[name][:, 1:3], array[:, 1:3])
            native = array.astype(array.dtype.newbyteorder("=")).tobytes()
            half = len(native) // 2
            streamed = [bytes(checkpoint.stream(name, lo, hi)) for lo, hi in ((0, half), (half, len(native)))]
            assert b"".join(streamed) == native


def test_numpy_reads_what_is_written(path: pathlib.Path):
    tree = {name: array for name, array in ARRAYS.items() if "/" not in name}
    tree["layers"] = [{"w": ARRAYS["layers/0/w"]}]
    tree["step"] = 7
    npz.write(path, tree)
    with np.load(path) as theirs:
        assert set(theirs.files) == {*ARRAYS, "step"}
        for name, array in ARRAYS.items():
            assert np.array_equal(theirs[name], array)
        assert theirs["step"] == 7
    first = path.read_bytes()
    npz.write(path, tree, overwrite=True)
    assert path.read_bytes() == first


def test_a_part_is_read_alone(path: pathlib.Path):
    values = np.random.default_rng(0).random((4096, 256)).astype(np.float32)
    np.savez(path, w=values, other=values)
    with npz.open(path) as checkpoint:
        before = checkpoint.bytes_read
        assert np.array_equal(checkpoint["w"][10:20], values[10:20])
        assert checkpoint.bytes_read - before == 10 * 1024


def test_arrays_come_onto_devices(path: pathlib.Path):
    mesh = make_mesh({"x": 4})
    rows = NamedSharding(mesh, P("x"))
    np.savez(path, **{"layers/0/w": np.arange(32, dtype=np.float32).reshape(8, 4)})
    like = {"layers": [{"w": jax.ShapeDtypeStruct((8, 4), jnp.float32, sharding=rows)}]}
    restored = npz.read(path, like=like)
    assert restored["layers"][0]["w"].sharding == rows
    assert np.array_equal(restored["layers"][0]["w"], np.arange(32).reshape(8, 4))


def test_types_that_numpy_has_no_name_for_are_refused_and_raw_when_they_are_read(path: pathlib.Path):
    with pytest.raises(UnsupportedLeafError, match="no name"):
        npz.write(path, {"a": jnp.ones(3, jnp.bfloat16)})
    np.savez(path, a=np.asarray(jnp.ones(3, jnp.bfloat16)))
    assert npz.open(path)["a"][...].view(jnp.bfloat16).tolist() == [1, 1, 1]


def test_objects_are_listed_and_refused(path: pathlib.Path):
    np.savez(path, a=np.array([{}, 1], dtype=object), b=np.ones(2))
    with npz.open(path) as checkpoint:
        assert checkpoint.keys() == ("a", "b")
        with pytest.raises(UnsupportedLeafError, match="run code"):
            checkpoint["a"][...]
        assert np.array_equal(checkpoint["b"][...], np.ones(2))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_every_changed_byte_of_the_values_is_found_when_all_are_read(path: pathlib.Path, save: Any):
    values = np.random.default_rng(0).integers(0, 256, 64, np.uint8)
    save(path, a=values)
    data = path.read_bytes()
    for at in range(len(data)):
        path.write_bytes(data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :])
        try:
            with npz.open(path) as checkpoint:
                found = {name: checkpoint[name][...] for name in checkpoint}
        except (CorruptError, NotFoundError, UnsupportedLeafError):
            continue
        # Of what has no checksum only names and times are left.
        assert [array.tobytes() for array in found.values()] == [values.tobytes()]


def test_a_file_that_is_cut_off_anywhere_is_refused(path: pathlib.Path):
    np.savez(path, a=np.arange(10))
    data = path.read_bytes()
    for length in range(len(data)):
        path.write_bytes(data[:length])
        with pytest.raises((CorruptError, NotFoundError)):
            npz.open(path)


def test_a_write_that_storage_refuses_leaves_what_was_there(path: pathlib.Path):
    npz.write(path, {"a": np.ones(2)})
    arrays = npz._plan({"b": np.ones(2)}, str(path))
    failures = 0
    while True:
        kernel = RefusingKernel(errno.ENOSPC, at=failures + 1)
        try:
            npz.write_archive(str(path), arrays, ProgressMeter(0, "write", None), kernel)
        except OSError:
            failures += 1
        else:
            break
        keys = npz.open(path).keys()
        assert [each.name for each in path.parent.iterdir()] == [path.name]
        if keys == ("b",):  # what was refused came after the commit
            break
        assert keys == ("a",)
    assert failures >= 2
    assert npz.open(path).keys() == ("b",)
    with pytest.raises(ExistsError):
        npz.write(path, {"c": np.ones(2)})


def test_other_files_are_not_found_to_be_archives(tmp_path: pathlib.Path):
    (tmp_path / "text").write_text("text")
    for place in (tmp_path / "text", tmp_path, tmp_path / "nowhere"):
        with pytest.raises(NotFoundError):
            npz.open(place)


def test_a_checkpoint_goes_there_and_back(tmp_path: pathlib.Path):
    tree = {"layers": [{"w": np.ones((3, 4), np.float32)}], "b": jnp.ones(3, jnp.bfloat16)}
    jaxckpt.save(tmp_path / "ours", tree)
    with pytest.raises(UnsupportedLeafError):
        convert(tmp_path / "ours", tmp_path / "a.npz", to="npz")
    assert convert(tmp_path / "ours", tmp_path / "a.npz", to="npz", dtype="float32").ok
    with np.load(tmp_path / "a.npz") as theirs:
        assert {name: theirs[name].dtype for name in theirs.files} == {"layers/0/w": "f4", "b": "f4"}
    assert convert(tmp_path / "a.npz", tmp_path / "again").ok
    restored = jaxckpt.restore(
        tmp_path / "again", like={"layers": [{"w": np.zeros((3, 4), np.float32)}]}, unexpected="ignore"
    )
    assert_same_tree(restored, {"layers": tree["layers"]})
