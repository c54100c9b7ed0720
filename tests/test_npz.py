"""Archives of arrays: against NumPy both ways, lazily, and against damage."""

from __future__ import annotations

import errno
import pathlib
import tracemalloc
import zipfile
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec as P

import jaxckpt
from jaxckpt import CorruptError, ExistsError, NotFoundError, UnsupportedLeafError
from jaxckpt._converting import convert
from jaxckpt._progress import ProgressMeter
from jaxckpt._store import open_store
from jaxckpt.interop import npz
from jaxckpt.interop._archiving import plan_arrays, write_archive

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
    nested = npz.read(path, mesh=mesh)
    assert list(nested["layers"]) == [0]
    assert nested["layers"][0]["w"].sharding.mesh == mesh
    assert list(npz.read(path, rename={"layers/0": "first"})) == ["first"]
    assert list(npz.read(path, select="layers/*", cast=True)) == ["layers"]


EXTENSIONS = (
    "bfloat16",
    "float8_e5m2",
    "float8_e4m3fn",
    "float8_e8m0fnu",
    "float8_e4m3fnuz",
    "float8_e5m2fnuz",
    "float8_e4m3b11fnuz",
    "int4",
    "uint2",
    "float4_e2m1fn",
)


@pytest.mark.parametrize("dtype", EXTENSIONS)
def test_types_of_ml_dtypes_come_back_and_are_raw_to_numpy(path: pathlib.Path, dtype: str):
    wanted = np.dtype(getattr(ml_dtypes, dtype))
    array = np.arange(6).reshape(2, 3).astype(np.float32).astype(wanted)
    npz.write(path, {"a": array, "b": {"c": jnp.asarray(array)}})
    with np.load(path) as theirs:
        assert theirs["a"].dtype == np.dtype(f"V{wanted.itemsize}")
        assert theirs["b/c"].view(wanted).tobytes() == array.tobytes()
    with npz.open(path) as checkpoint:
        assert checkpoint["a"].dtype == wanted
        assert checkpoint["a"][:, 1].tobytes() == array[:, 1].tobytes()
        assert bytes(checkpoint.stream("a", 0, array.nbytes)) == array.tobytes()
    found = npz.read(path)
    assert (found["b"]["c"].dtype, np.asarray(found["b"]["c"]).tobytes()) == (wanted, array.tobytes())


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_what_numpy_saves_of_bfloat16_is_that(path: pathlib.Path, save: Any):
    array = np.asarray(jnp.arange(6.0, dtype=jnp.bfloat16).reshape(2, 3))
    save(path, a=array, b=array.astype(ml_dtypes.float8_e4m3fn))
    found = npz.read(path, like={"a": jnp.zeros((2, 3), jnp.bfloat16)}, unexpected="ignore")
    assert np.asarray(found["a"]).tobytes() == array.tobytes()
    raw = npz.open(path)["b"][...]  # which of the types with a byte it was is not there
    assert raw.dtype == np.dtype("V1")
    assert np.array_equal(raw.view(ml_dtypes.float8_e4m3fn), array.astype(ml_dtypes.float8_e4m3fn))


def test_strings_dates_and_records_are_arrays_of_numpy(path: pathlib.Path, tmp_path: pathlib.Path):
    record = np.array([(1, 2.5), (3, 4.5)], dtype=[("x", ">i4"), ("y", "<f8")])
    arrays = {
        "bytes": np.array([b"one", b"three"]),
        "text": np.array([["ä", "bc"]]),
        "swapped": np.array(["ab", "c"], ">U2"),
        "date": np.array(["2024-01-01"], "M8[D]"),
        "record": record,
    }
    np.savez(path, **arrays)
    with npz.open(path) as checkpoint:
        for name, array in arrays.items():
            assert np.array_equal(checkpoint[name][...], array), name
            assert np.array_equal(checkpoint[name][:1], array[:1]), name
    assert convert(path, tmp_path / "ours").ok
    ours = jaxckpt.restore(tmp_path / "ours")
    assert convert(tmp_path / "ours", tmp_path / "b.npz").ok
    with np.load(tmp_path / "b.npz") as theirs:
        for name, array in arrays.items():
            assert np.array_equal(ours[name], array), name
            assert np.array_equal(theirs[name], array), name


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
    arrays = plan_arrays({"b": np.ones(2)}, str(path))
    failures = 0
    while True:
        kernel = RefusingKernel(errno.ENOSPC, at=failures + 1)
        try:
            write_archive(str(path), arrays, ProgressMeter(0, "write", None), kernel)
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
    with zipfile.ZipFile(tmp_path / "torch.pt", "w") as archive:
        archive.writestr("data.pkl", b"")
    for place in (tmp_path / "text", tmp_path, tmp_path / "nowhere", tmp_path / "torch.pt"):
        with pytest.raises(NotFoundError):
            npz.open(place)
    np.savez(tmp_path / "none.npz")
    assert npz.open(tmp_path / "none.npz").keys() == ()


def test_what_an_archive_cannot_have_is_listed(path: pathlib.Path):
    tree = {
        "text": "text",
        "objects": np.array([{}]),
        "big": 1 << 70,
        "a": {"b": np.ones(1)},
        "a/b": np.ones(1),
    }
    with pytest.raises(UnsupportedLeafError) as caught:
        npz.write(path, tree)
    assert {problem.key for problem in caught.value.problems} == {"text", "objects", "big", "a~1b"}
    assert not path.exists()
    with pytest.raises(ValueError, match="written to local files"):
        npz.write("memory://npz/a.npz", {"a": np.ones(1)})


def test_an_archive_on_an_object_store_is_read(path: pathlib.Path):
    np.savez_compressed(path, **ARRAYS)
    open_store("memory://npz/run").put("a.npz", path.read_bytes())
    with npz.open("memory://npz/run/a.npz") as checkpoint:
        for name, array in ARRAYS.items():
            assert np.array_equal(checkpoint[name][...], array)
    with pytest.raises(NotFoundError):
        npz.open("memory://npz/run/b.npz")


def put_entry(path: pathlib.Path, header: bytes, body: bytes, compression: int = zipfile.ZIP_STORED) -> None:
    """An archive with one entry of any contents."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("a.npy", header + body)


def npy_header(text: str, version: bytes = b"\1\0") -> bytes:
    data = text.encode("latin1") + b"\n"
    return b"\x93NUMPY" + version + len(data).to_bytes(2, "little") + data


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"\x93NUMPY",
        npy_header(""),
        npy_header("{}"),
        npy_header("__import__('os').abort()"),
        npy_header("{'descr': '<f4', 'fortran_order': False, 'shape': (3,)}"),
        npy_header("{'descr': '<f4', 'fortran_order': False, 'shape': (-1, -2)}"),
        npy_header("{'descr': '<f4', 'fortran_order': False, 'shape': (2.0,)}"),
        npy_header("{'descr': [('a', '<f4')] * 3, 'fortran_order': False, 'shape': (2,)}"),
        npy_header("{'descr': " + "-" * 5000 + "1, 'fortran_order': False, 'shape': (2,)}"),
        npy_header("{'descr': '<f4', 'fortran_order': False, 'shape': (1099511627776,)}"),
        npy_header("{'descr': '<f4', 'fortran_order': False, 'shape': 2}"),
        npy_header("{'descr': '<f4', 'fortran_order': False, 'shape': (" + "1, " * 100 + "2)}"),
        npy_header("{'descr': 'no', 'fortran_order': False, 'shape': (2,)}"),
        npy_header("{'descr': ('<f4', (1000000, 1000000)), 'fortran_order': False, 'shape': (2,)}"),
        npy_header("{'descr': '<f4', 'fortran_order': 2, 'shape': (2,)}"),
        npy_header("(" * 5000),
        npy_header("{'descr': '<f4', 'fortran_order': False, 'shape': (2,)}", b"\t\0"),
        npy_header("{'descr': '<f4', 'fortran_order': False, 'shape': (2,)}", b"\2\0"),
    ],
)
@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_hostile_header_is_refused(path: pathlib.Path, header: bytes, compression: int):
    put_entry(path, header, bytes(8), compression)
    with pytest.raises(CorruptError) as caught:
        npz.open(path)
    assert str(path) in str(caught.value)


def test_sizes_that_no_compression_reaches_are_refused_before_memory_is_taken(path: pathlib.Path):
    header = npy_header("{'descr': '|u1', 'fortran_order': False, 'shape': (1099511627776,)}")
    put_entry(path, header, bytes(100), zipfile.ZIP_DEFLATED)
    data = path.read_bytes()
    at = data.index(b"PK\1\2") + 24  # the length in the directory
    size = min(len(header) + (1 << 40), 0xFFFFFFFE)
    path.write_bytes(data[:at] + size.to_bytes(4, "little") + data[at + 4 :])
    with pytest.raises(CorruptError, match="which cannot become 4294967294 bytes"):
        npz.open(path)


def test_entries_are_not_packed_in_ways_that_numpy_does_not_use(path: pathlib.Path):
    header = npy_header("{'descr': '<f4', 'fortran_order': False, 'shape': (2,)}")
    put_entry(path, header, bytes(8), zipfile.ZIP_LZMA)
    with pytest.raises(CorruptError, match="NumPy does not use"):
        npz.open(path)


def test_a_large_array_is_streamed_in_little_memory(path: pathlib.Path):
    values = np.zeros((40, 1 << 20), np.uint8)
    np.savez_compressed(path, w=values, other=values)
    with npz.open(path) as checkpoint:
        step = 8 << 20
        tracemalloc.start()
        try:
            for lo in range(0, values.nbytes, step):
                assert len(checkpoint.stream("w", lo, lo + step)) == step
            assert tracemalloc.get_traced_memory()[1] < 24 << 20
        finally:
            tracemalloc.stop()


def test_a_checkpoint_goes_there_and_back(tmp_path: pathlib.Path):
    tree = {"layers": [{"w": np.ones((3, 4), np.float32)}], "b": jnp.ones(3, jnp.bfloat16)}
    jaxckpt.save(tmp_path / "ours", tree)
    assert convert(tmp_path / "ours", tmp_path / "a.npz", dtype="float32").ok
    with np.load(tmp_path / "a.npz") as theirs:
        assert {name: theirs[name].dtype for name in theirs.files} == {"layers/0/w": "f4", "b": "f4"}
    assert convert(tmp_path / "a.npz", tmp_path / "again").ok
    restored = jaxckpt.restore(
        tmp_path / "again", like={"layers": [{"w": np.zeros((3, 4), np.float32)}]}, unexpected="ignore"
    )
    assert_same_tree(restored, {"layers": tree["layers"]})
