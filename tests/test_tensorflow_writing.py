"""Checkpoints written for TensorFlow: which bytes, of which leaves, whole or not at all; and what TensorFlow reads.

The tests at the end need TensorFlow: in this environment, or in that of the interpreter that the environment variable
JAXCKPT_TENSORFLOW_PYTHON names. It runs in processes of its own.
"""

from __future__ import annotations

import base64
import enum
import errno
import functools
import hashlib
import importlib.util
import json
import os
import pathlib
import random
import shutil
import subprocess
import sys
import textwrap
import tracemalloc

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import jaxckpt
from jaxckpt._progress import Progress, ProgressMeter
from jaxckpt._store import LocalStore
from jaxckpt.interop import tensorflow
from jaxckpt.interop._files import SourceFile
from jaxckpt.interop._sstable import Table, encode_table
from jaxckpt.interop._writing import plan_tensors, write_files

from .helpers import make_mesh
from .storage_faults import NotedKernel, RefusingKernel

FIXTURES = pathlib.Path(__file__).parent / "tensorflow"

FLOAT_DTYPES = "float16 bfloat16 float32 float64 float8_e5m2 float8_e4m3fn float8_e4m3fnuz float8_e4m3b11fnuz"
INTEGER_DTYPES = "bool int8 int16 int32 int64 uint8 uint16 uint32 uint64 int2 int4 uint2 uint4"
OTHER_DTYPES = "complex64 complex128 float8_e5m2fnuz float4_e2m1fn"


def dtype_named(name: str) -> np.dtype:
    return np.dtype(getattr(ml_dtypes, name, None) or name)


def read_all(prefix: object) -> dict[str, object]:
    """Every tensor of a checkpoint."""
    with tensorflow.open(str(prefix)) as checkpoint:
        return {name: checkpoint[name][...] for name in checkpoint.leaves()}


def assert_same_value(got: object, want: object, name: str = "") -> None:
    if isinstance(want, np.ndarray) and want.dtype != object:
        assert isinstance(got, np.ndarray), name
        assert (got.dtype, got.shape) == (want.dtype, want.shape), name
        if want.dtype.name in (
            "int2",
            "int4",
        ):  # where it is one byte, its upper bits may hold the sign, or zero
            assert np.array_equal(got, want), name
        else:
            assert got.tobytes() == want.tobytes(), name
    elif isinstance(want, np.ndarray):
        assert got.shape == want.shape, name
        assert got.reshape(-1).tolist() == want.reshape(-1).tolist(), name
    else:
        assert got == want, name


def expected_values(folder: pathlib.Path) -> dict[str, np.ndarray]:
    """The values of the tensors of a fixture; those of strings as arrays of objects."""
    document = json.loads((folder / "expected.json").read_text(encoding="utf-8"))
    values: dict[str, np.ndarray] = {}
    with np.load(folder / "expected.npz") as arrays:
        for name, record in document["tensors"].items():
            if "strings_b64" in record:
                value = np.empty(len(record["strings_b64"]), object)
                value[:] = [base64.b64decode(text) for text in record["strings_b64"]]
                values[name] = value.reshape(record["shape"])
            else:
                values[name] = arrays[record["npz"]]
                if "stored_as" in record:
                    values[name] = values[name].view(dtype_named(record["dtype"]))
    return values


# --- which bytes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["v2_dtypes", "v2_saver", "v2_retention", "example_program"])
def test_the_files_are_byte_for_byte_those_of_tensorflow(name, tmp_path):
    folder = FIXTURES / name
    document = json.loads((folder / "expected.json").read_text(encoding="utf-8"))
    tensorflow.write(tmp_path / "ckpt", expected_values(folder))
    for suffix in (".index", ".data-00000-of-00001"):
        written = (tmp_path / f"ckpt{suffix}").read_bytes()
        assert written == (folder / f"{document['prefix']}{suffix}").read_bytes()


def test_a_small_checkpoint_has_these_bytes(tmp_path):
    tensorflow.write(tmp_path / "ckpt", {"a": np.int16([1, -2]), "b": {"c": b"xyz", "d": True}})
    # Printed by TensorFlow 2.21 after SaveV2 of the same tensors.
    assert (tmp_path / "ckpt.data-00000-of-00001").read_bytes() == bytes.fromhex(
        "0100feff 03633f7f 2878797a 01"
    )
    assert (tmp_path / "ckpt.index").read_bytes() == bytes.fromhex(
        "00000608 011a0208 0100010f 61080512 04120208 02280435 14fb37c0 00030d62 2f630807 12002004"
        "28083513 abf67b02 010d6408 0a120020 0c280135 052b2843 00000000 01000000 00b2a7e0 fe000000"
        "00010000 0000c0f2 a1b00001 02630048 00000000 01000000 00f62aaf 7b4d085a 0e000000 00000000"
        "00000000 00000000 00000000 00000000 00000000 00000000 00000000 0057fb80 8b247547 db"
    )


def test_the_state_file_names_the_checkpoint_relative_to_it(tmp_path):
    tensorflow.write(tmp_path / 'größe "1"\\', {"a": 1})
    text = (tmp_path / "checkpoint").read_text(encoding="ascii")
    name = r"gr\303\266\303\237e \0421\042\134"
    assert text == f'model_checkpoint_path: "{name}"\nall_model_checkpoint_paths: "{name}"\n'
    assert read_all(tmp_path)["a"] == 1
    tensorflow.write(tmp_path / "other", {"a": 2}, write_state=False)
    assert (tmp_path / "checkpoint").read_text(encoding="ascii") == text


def many_tensors() -> dict[str, np.ndarray]:
    """As many as need an index of several blocks, with names that differ early and late."""
    return {hashlib.sha256(str(number).encode()).hexdigest(): np.int32([number]) for number in range(7000)}


def test_an_index_of_several_blocks_is_that_of_tensorflow(tmp_path):
    tensorflow.write(tmp_path / "many", many_tensors())
    index = (tmp_path / "many.index").read_bytes()
    assert len(index) > 2 * 262_144
    # Of the file that TensorFlow 2.21 writes; where it is installed, a test below compares the bytes themselves.
    assert (
        hashlib.sha256(index).hexdigest()
        == "d13080b6a18b71cab8b5355c8a007f7bab2a0f06b70bcb16ef5317b919c9dd7c"
    )


@pytest.mark.parametrize("count", [0, 1, 15, 16, 17, 33, 20_000])
def test_tables_of_any_size_read_back(count, tmp_path):
    numbers = random.Random(5)
    names = {b"k" * numbers.randrange(40) + numbers.randbytes(numbers.randrange(6)) for _ in range(count)}
    records = [(name, name[:9] * 3) for name in sorted(names)]
    (tmp_path / "table").write_bytes(encode_table(records))
    table = Table(SourceFile(str(tmp_path / "table"), lambda nbytes: None))
    assert [(key, bytes(value)) for key, value in table] == records
    table.close()


# --- of which leaves ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*FLOAT_DTYPES.split(), *INTEGER_DTYPES.split(), *OTHER_DTYPES.split()])
def test_arrays_of_every_dtype_come_back_bit_for_bit(name, tmp_path):
    dtype = dtype_named(name)
    generator = np.random.default_rng(3)
    bits = 8 * dtype.itemsize if name not in ("int2", "uint2", "int4", "uint4", "float4_e2m1fn") else 2
    whole = generator.integers(0, min(2**bits, 256), 60 * dtype.itemsize, np.uint16).astype(np.uint8)
    values = (whole % 2 if name == "bool" else whole).view(dtype).reshape(3, 4, 5)
    tree = {
        "numpy": values,
        "fortran": np.asfortranarray(values),
        "strided": values[:, ::2, ::-1],
        "empty": values[:, :0],
        "scalar": values[0, 0, 0],
        "rank_0": np.array(values[0, 0, 1]),
    }
    if dtype.isbuiltin == 1:
        tree["swapped"] = values.astype(dtype.newbyteorder(">"))
    tensorflow.write(tmp_path / "ckpt", tree)
    found = read_all(tmp_path / "ckpt")
    for key, value in tree.items():
        assert_same_value(np.asarray(found[key]), np.asarray(value, dtype, order="C"), key)


def test_scalars_and_strings_come_back(tmp_path):
    class Level(enum.IntEnum):
        HIGH = 3

    tree = {
        "int": -7,
        "large": 2**63 - 1,
        "enum": Level.HIGH,
        "bool": True,
        "float": 0.1,
        "complex": 1 - 2j,
        "bytes": b"\x00\xff",
        "text": "größer 中文",
        "numpy_text": np.str_("é"),
        "fixed_bytes": np.array([b"a", b"bcd"]),
        "fixed_text": np.array([["ä", ""]]),
        "objects": np.array([b"a\0", "b", b"x" * 300], object),
        "no_strings": np.empty((0, 2), object),
        "none": None,
    }
    tensorflow.write(tmp_path / "ckpt", tree)
    found = read_all(tmp_path / "ckpt")
    assert "none" not in found
    assert_same_value(np.asarray(found["int"]), np.array(-7, np.int64))
    assert_same_value(np.asarray(found["large"]), np.array(2**63 - 1, np.int64))
    assert_same_value(np.asarray(found["enum"]), np.array(3, np.int64))
    assert_same_value(np.asarray(found["bool"]), np.array(True))
    assert_same_value(np.asarray(found["float"]), np.array(0.1, np.float64))
    assert_same_value(np.asarray(found["complex"]), np.array(1 - 2j, np.complex128))
    assert found["bytes"] == b"\x00\xff"
    assert found["text"] == "größer 中文".encode()
    assert found["numpy_text"] == "é".encode()
    assert found["fixed_bytes"].tolist() == [b"a", b"bcd"]
    assert found["fixed_text"].tolist() == [["ä".encode(), b""]]
    assert found["objects"].tolist() == [b"a\0", b"b", b"x" * 300]
    assert found["no_strings"].shape == (0, 2)


def test_sharded_arrays_and_keys_are_written_from_their_shards(tmp_path):
    mesh = make_mesh({"x": 4, "y": 2})
    values = np.arange(64 * 48, dtype=np.float32).reshape(64, 48)
    specs = {"rows": ("x",), "columns": (None, "y"), "both": ("y", "x"), "replicated": ()}
    tree = {
        name: jax.device_put(values, NamedSharding(mesh, PartitionSpec(*spec)))
        for name, spec in specs.items()
    }
    keys = jax.random.split(jax.random.key(3), 6)
    tree["keys"] = keys
    tensorflow.write(tmp_path / "ckpt", tree)
    found = read_all(tmp_path / "ckpt")
    for name in specs:
        assert_same_value(found[name], values, name)
        assert tree[name]._npy_value is None  # nothing was cached on the array
    assert_same_value(found["keys"], np.asarray(jax.random.key_data(keys)))


def test_large_sharded_arrays_pass_through_a_bounded_buffer(tmp_path):
    mesh = make_mesh({"x": 8})
    large = jax.device_put(
        jnp.arange(16 << 20, dtype=jnp.float32).reshape(4096, 4096),
        NamedSharding(mesh, PartitionSpec(None, "x")),
    )
    jax.block_until_ready(large)
    tracemalloc.start()
    try:
        tensorflow.write(tmp_path / "ckpt", {"large": large})
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 24 << 20
    found = tensorflow.open(tmp_path / "ckpt")["large"]
    assert_same_value(found[1000:1002], np.asarray(large[1000:1002]))


def test_leaves_of_open_checkpoints_are_read_while_they_are_written(tmp_path):
    tree = {
        "w": jnp.arange(10.0),
        "key": jax.random.key(1),
        "host": np.float64([1, 2]),
        "step": 5,
        "name": "x" * 100_000,
        "blob": b"ab",
    }
    jaxckpt.save(tmp_path / "saved", tree)
    tensorflow.write(tmp_path / "first", jaxckpt.open(tmp_path / "saved").tree())
    with tensorflow.open(tmp_path / "first") as first:
        tensorflow.write(tmp_path / "second", {name: first[name] for name in first.leaves()})
    for suffix in (".index", ".data-00000-of-00001"):
        assert (tmp_path / f"first{suffix}").read_bytes() == (tmp_path / f"second{suffix}").read_bytes()
    found = read_all(tmp_path / "second")
    assert_same_value(found["w"], np.arange(10, dtype=np.float32))
    assert_same_value(found["key"], np.asarray(jax.random.key_data(tree["key"])))
    assert_same_value(found["host"], tree["host"])
    assert found["step"] == 5
    assert found["name"] == b"x" * 100_000
    assert found["blob"] == b"ab"


def test_damage_in_a_source_leaves_no_checkpoint(tmp_path):
    tensorflow.write(tmp_path / "source", {"a": np.ones(10), "b": np.ones(10)})
    data = bytearray((tmp_path / "source.data-00000-of-00001").read_bytes())
    data[100] ^= 1
    (tmp_path / "source.data-00000-of-00001").write_bytes(data)
    with tensorflow.open(tmp_path / "source") as source, pytest.raises(jaxckpt.CorruptError, match="source"):
        tensorflow.write(tmp_path / "new" / "ckpt", {name: source[name] for name in source.leaves()})
    assert os.listdir(tmp_path / "new") == []


# --- names ----------------------------------------------------------------------------------------------------


def test_names_are_paths_with_nothing_escaped(tmp_path):
    tree = {
        "dense/kernel": 1,
        "list": [2, {"a~b": 3}],
        "": {"7": 4},
        "with space:0": (5,),
        "ü": 6,
        "not utf-8 \udcff": 8,
        ".ATTRIBUTES/VARIABLE_VALUE": 7,
    }
    tensorflow.write(tmp_path / "ckpt", tree)
    assert {name: int(value) for name, value in read_all(tmp_path / "ckpt").items()} == {
        "dense/kernel": 1,
        "list/0": 2,
        "list/1/a~b": 3,
        "/7": 4,
        "with space:0/0": 5,
        "ü": 6,
        "not utf-8 \udcff": 8,
        ".ATTRIBUTES/VARIABLE_VALUE": 7,
    }


def test_everything_that_tensorflow_cannot_have_is_refused_at_once(tmp_path):
    tree = {
        "a": {"b": 1},
        "a/b": 2,
        "long": np.longdouble(1),
        "date": np.datetime64("2020-01-01"),
        "fields": np.zeros(2, [("x", "f4")]),
        "object": object(),
        "mixed": np.array([b"x", 1], object),
        "huge": 1 << 63,
        "float8": jnp.zeros(3, jnp.float8_e8m0fnu),
        "spec": jax.ShapeDtypeStruct((2,), jnp.float32),
        "surrogate": "\ud800",
        "": {},
    }
    with pytest.raises(jaxckpt.UnsupportedLeafError, match="TensorFlow can't have 10 of 11 leaves") as caught:
        tensorflow.write(tmp_path / "new" / "ckpt", tree)
    messages = {problem.key: problem.message for problem in caught.value.problems}
    assert "has the name 'a/b' in TensorFlow, and so has the leaf a/b" in messages.pop("a~1b")
    assert "does not fit into 64 bits" in messages.pop("huge")
    assert "holds a int" in messages.pop("mixed")
    assert "is a ShapeDtypeStruct" in messages.pop("spec")
    assert "holds text that is none" in messages.pop("surrogate")
    assert "builtins.object" in messages.pop("object")
    assert set(messages) == {"long", "date", "fields", "float8"}
    assert all("which TensorFlow lacks" in message for message in messages.values())
    assert not (tmp_path / "new").exists()


def test_a_leaf_without_a_name_is_refused(tmp_path):
    with pytest.raises(jaxckpt.UnsupportedLeafError, match=r"\(root\): has no name"):
        tensorflow.write(tmp_path / "ckpt", np.ones(3))
    with pytest.raises(ValueError, match="prefix must end in a name"):
        tensorflow.write(f"{tmp_path}/", {"a": 1})


# --- whole or not at all --------------------------------------------------------------------------------------


def test_a_checkpoint_is_replaced_only_when_that_is_asked_for(tmp_path):
    prefix = tmp_path / "run" / "model.ckpt"
    tensorflow.write(prefix, {"a": 1, "b": 2})
    with pytest.raises(jaxckpt.ExistsError, match="pass overwrite=True"):
        tensorflow.write(prefix, {"a": 3})
    assert read_all(prefix) == {"a": 1, "b": 2}
    for value in (4, 5, 6):
        tensorflow.write(prefix, {"a": value}, overwrite=True)
        assert read_all(prefix) == {"a": value}
        assert len(os.listdir(prefix.parent)) == 3  # state, index, data


def test_an_overwrite_replaces_sharded_files_of_tensorflow(tmp_path):
    shutil.copytree(FIXTURES / "v2_sharded", tmp_path, dirs_exist_ok=True)
    tensorflow.write(tmp_path / "model.ckpt-3", {"a": 1}, overwrite=True)
    assert sorted(path.name for path in tmp_path.glob("model.ckpt-3.[di]*")) == [
        "model.ckpt-3.data-00000-of-00001",
        "model.ckpt-3.index",
    ]
    assert read_all(tmp_path / "model.ckpt-3") == {"a": 1}


def write_through(kernel: NotedKernel, directory: pathlib.Path, tree: object, *, overwrite: bool) -> None:
    tensors = plan_tensors(tree, "ckpt")
    meter = ProgressMeter(0, "write")
    store = LocalStore(str(directory), kernel)
    write_files(store, "ckpt", tensors, meter, overwrite=overwrite, write_state=True)


@pytest.mark.parametrize("is_lasting", [True, False])
def test_a_failure_of_any_call_leaves_the_old_checkpoint_or_the_new_one(is_lasting, tmp_path):
    old, new = {"a": np.arange(5), "b": b"old"}, {"a": np.arange(9), "c": b"new"}
    outcomes = set()
    for at in range(1, 100):
        directory = tmp_path / str(at)
        tensorflow.write(directory / "ckpt", old)
        kernel = RefusingKernel(errno.EIO, at=at, is_lasting=is_lasting)
        try:
            write_through(kernel, directory, new, overwrite=True)
        except OSError:
            pass
        else:
            break
        found = read_all(directory / "ckpt")
        is_new = "c" in found
        want = new if is_new else old
        assert found.keys() == want.keys()
        assert_same_value(found["a"], want["a"])
        outcomes.add(is_new)
        # Nothing is in the way of the next one.
        tensorflow.write(directory / "ckpt", new, overwrite=True)
        assert read_all(directory / "ckpt").keys() == new.keys()
        assert len([path for path in directory.iterdir() if ".tmp-" not in path.name]) == 3
    assert at > 15
    assert outcomes == {True, False}


def test_what_the_index_names_is_durable_before_the_index_is(tmp_path):
    tensorflow.write(tmp_path / "ckpt", {"a": 1})
    kernel = NotedKernel()
    write_through(kernel, tmp_path, {"a": 2}, overwrite=True)
    names = [
        f"{operation.call} {os.path.basename(operation.target or operation.path).partition('.tmp-')[0]}"
        for operation in kernel.done
    ]
    directory = tmp_path.name
    assert names == [
        "create ckpt.data-00000-of-00002",
        "pwrite ckpt.data-00000-of-00002",
        "fsync ckpt.data-00000-of-00002",
        f"open {directory}",
        f"fsync {directory}",
        "create ckpt.index",
        "pwrite ckpt.index",
        "fsync ckpt.index",
        "rename ckpt.index",
        f"open {directory}",
        f"fsync {directory}",
        "create checkpoint",
        "pwrite checkpoint",
        "fsync checkpoint",
        "rename checkpoint",
        f"open {directory}",
        f"fsync {directory}",
        "unlink ckpt.data-00000-of-00001",
        f"open {directory}",
        f"fsync {directory}",
    ]


def test_a_refused_write_says_so_and_leaves_no_data_file(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(jaxckpt.WriteError, match="storage refused a write") as caught:
        tensorflow.write(tmp_path / "file" / "ckpt", {"a": 1})
    assert caught.value.errno == errno.ENOTDIR
    kernel = RefusingKernel(errno.ENOSPC, calls=("pwrite",))
    with pytest.raises(OSError, match="No space"):
        write_through(kernel, tmp_path / "run", {"a": 1}, overwrite=False)
    assert os.listdir(tmp_path / "run") == []


def test_progress_is_told(tmp_path):
    told: list[Progress] = []
    tensorflow.write(
        tmp_path / "ckpt", {"a": np.zeros(3 << 20, np.float64), "b": b"x"}, on_progress=told.append
    )
    assert [each.bytes_done for each in told] == sorted(each.bytes_done for each in told)
    assert {each.phase for each in told} == {"write", "commit", "done"}
    assert len(told) > 4
    assert told[-1].bytes_done == told[-1].bytes_total == (3 << 23) + 6


def test_a_prefix_may_lie_in_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tensorflow.write("model.ckpt", {"a": 1})
    assert read_all("model.ckpt") == read_all(tmp_path / "model.ckpt") == {"a": 1}


def test_object_stores_take_a_checkpoint_too():
    tensorflow.write("memory://bucket/run/ckpt", {"a": 1})
    with pytest.raises(jaxckpt.ExistsError):
        tensorflow.write("memory://bucket/run/ckpt", {"a": 1})


# --- TensorFlow itself ----------------------------------------------------------------------------------------


@functools.cache
def tensorflow_python() -> str:
    """An interpreter that has TensorFlow; empty when there is none."""
    named = os.environ.get("JAXCKPT_TENSORFLOW_PYTHON", "")
    return named or (sys.executable if importlib.util.find_spec("tensorflow") else "")


needs_tensorflow = pytest.mark.skipif(
    not tensorflow_python(), reason="needs TensorFlow, here or where JAXCKPT_TENSORFLOW_PYTHON says"
)


def run_tensorflow(*arguments: object) -> str:
    """What a program under TensorFlow prints."""
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("XLA_FLAGS", None)
    command = [tensorflow_python(), *map(str, arguments)]
    result = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert result.returncode == 0, result.stderr[-5000:]
    return result.stdout


READS_OURS = """
    import pathlib
    import sys

    import numpy as np
    import tensorflow as tf

    tf1 = tf.compat.v1
    root = pathlib.Path(sys.argv[1])
    with np.load(root / "values.npz") as arrays:
        values = {name: arrays[name] for name in arrays.files}

    # By the readers.
    prefix = tf.train.latest_checkpoint(root)
    assert prefix == str(root / "ckpt"), prefix
    shapes = dict(tf.train.list_variables(prefix))
    reader = tf.train.load_checkpoint(root)
    for name, value in values.items():
        assert shapes[name] == list(value.shape), name
        assert reader.get_tensor(name).tobytes() == value.tobytes(), name
    assert reader.get_tensor("bfloat16").astype(np.float32).tolist() == [1.5, -2.0]
    assert reader.get_tensor("int4").astype(np.int8).tolist() == [-8, -1, 0, 7]
    assert reader.get_tensor("text") == b"a\\x00b"
    assert list(reader.get_tensor("texts")) == [b"", b"x" * 300]

    # By a Saver, into variables of either kind.
    for resource in (True, False):
        with tf1.Graph().as_default(), tf1.Session() as session:
            variables = {
                name: tf1.get_variable(name, value.shape, tf.as_dtype(value.dtype), use_resource=resource)
                for name, value in values.items()
                if name.startswith("model/")
            }
            tf1.train.Saver(variables).restore(session, prefix)
            for name, variable in variables.items():
                assert session.run(variable).tobytes() == values[name].tobytes(), name

    # A part of a tensor, as for a partitioned variable.
    (part,) = tf.raw_ops.RestoreV2(
        prefix=prefix, tensor_names=["model/kernel"], shape_and_slices=["40 30 10,20:0,30"], dtypes=[tf.float32]
    )
    assert np.array_equal(part, values["model/kernel"][10:30])

    # By a tf.train.Checkpoint, which goes by the names of the variables.
    state = tf.train.Checkpoint(anything=tf.Variable(tf.zeros((40, 30)), name="model/kernel"))
    state.read(prefix).assert_existing_objects_matched()
    assert np.array_equal(state.anything, values["model/kernel"])

    # Files whose header counts more of them than there are, and an index of several blocks.
    replaced = tf.train.load_checkpoint(str(root / "replaced"))
    assert replaced.get_tensor("a").tolist() == [1, 2]
    many = tf.train.load_checkpoint(str(root / "many"))
    names = sorted(many.get_variable_to_shape_map())
    assert len(names) == 7000

    # And as TensorFlow writes it.
    tf.raw_ops.SaveV2(
        prefix=str(root / "same"),
        tensor_names=names,
        shape_and_slices=[""] * len(names),
        tensors=[tf.constant(many.get_tensor(name)) for name in names],
    )
    print("all read")
"""


@needs_tensorflow
@pytest.mark.slow
def test_tensorflow_reads_what_is_written(tmp_path):
    generator = np.random.default_rng()
    values = {
        "model/kernel": generator.standard_normal((40, 30)).astype(np.float32),
        "model/bias": generator.standard_normal(30),
        "model/step": np.int64(generator.integers(1 << 60)),
        "half": generator.standard_normal((2, 3)).astype(np.float16),
        "empty": np.zeros((3, 0), np.int8),
        "flags": generator.integers(0, 2, (2, 2, 2)).astype(bool),
        "unsigned": generator.integers(0, 1 << 32, 7, np.uint32),
        "complex": generator.standard_normal((2, 2)) + 1j,
    }
    np.savez(tmp_path / "values.npz", **values)
    others = {
        "bfloat16": jnp.array([1.5, -2], jnp.bfloat16),
        "int4": np.array([-8, -1, 0, 7]).astype(ml_dtypes.int4),
        "text": b"a\x00b",
        "texts": np.array([b"", b"x" * 300], object),
    }
    mesh = make_mesh({"x": 2, "y": 2})
    sharding = NamedSharding(mesh, PartitionSpec("x", "y"))
    sharded = {"model/kernel": jax.device_put(values["model/kernel"], sharding)}
    tensorflow.write(tmp_path / "replaced", {"a": 1})
    tensorflow.write(tmp_path / "replaced", {"a": np.int32([1, 2])}, overwrite=True)
    assert (tmp_path / "replaced.data-00000-of-00002").exists()
    tensorflow.write(tmp_path / "many", many_tensors())
    tensorflow.write(tmp_path / "ckpt", values | sharded | others)
    assert "all read" in run_tensorflow("-c", textwrap.dedent(READS_OURS), tmp_path)
    for suffix in (".index", ".data-00000-of-00001"):
        assert (tmp_path / f"many{suffix}").read_bytes() == (tmp_path / f"same{suffix}").read_bytes()


@needs_tensorflow
@pytest.mark.slow
def test_fresh_checkpoints_of_tensorflow_are_read(tmp_path):
    seed = random.SystemRandom().randrange(10**6)
    run_tensorflow(FIXTURES / "generate.py", tmp_path, f"--seed={seed}", "--all")
    folders = sorted(tmp_path.iterdir())
    assert len(folders) > 15
    for folder in folders:
        name = f"{folder.name} (seed {seed})"
        document = json.loads((folder / "expected.json").read_text(encoding="utf-8"))
        values = expected_values(folder)
        with tensorflow.open(folder / document["prefix"]) as checkpoint:
            for key, want in values.items():
                if key != "_CHECKPOINTABLE_OBJECT_GRAPH":
                    got = checkpoint[key][...]
                    assert_same_value(
                        got if want.shape else np.asarray(got, want.dtype), want, f"{name} {key}"
                    )
            for alias, key in document.get("aliases", {}).items():
                assert checkpoint[alias].key == checkpoint[key].key, f"{name} {alias}"
