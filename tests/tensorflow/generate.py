"""Makes the TensorFlow checkpoints that lie in the folders beside this file.

Run it with an interpreter that has TensorFlow 2.21 and tf-keras (it needs neither JAX nor jaxckpt):

    python generate.py FOLDER [--seed=NUMBER] [--all] [NAME ...]

Each checkpoint goes to ``FOLDER/NAME/`` together with two files that say what it holds:

* ``expected.json``: ``prefix`` (relative to the folder), ``format``, ``made_by``, and ``tensors``: for each name its
  dtype, shape, and the entry of ``expected.npz`` with its value; for strings ``strings_b64``, the flat list in base64.
  ``stored_as`` names an unsigned integer type of the same width where NumPy has no such dtype. Object-based
  checkpoints also have ``aliases``: attribute paths of the program's objects, each with the tensor that it names.
* ``expected.npz``: the values.

The values come from the program, not from reading the checkpoint; TensorFlow then reads the checkpoint back and must
find the same ones. The folders whose names start with ``synthetic_`` hold what TensorFlow reads but does not write, or
writes only at sizes that would be a burden here. Their table files come from the few lines at the end of this
file, which share nothing with jaxckpt.

The folders v1_saver, v2_saver, v2_dtypes, v2_partitioned, v2_sharded, tf2_object_slots and example_program were made
by programs like these.
"""

from __future__ import annotations

import base64
import json
import os
import pathlib
import shutil
import struct
import sys
from collections.abc import Callable

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import ml_dtypes
import numpy as np
import tensorflow as tf
from tensorflow.core.framework import tensor_pb2, tensor_shape_pb2, tensor_slice_pb2, types_pb2, versions_pb2
from tensorflow.core.protobuf import saver_pb2, tensor_bundle_pb2, trackable_object_graph_pb2
from tensorflow.core.util import saved_tensor_slice_pb2

tf1 = tf.compat.v1

SEED = next((int(text.partition("=")[2]) for text in sys.argv if text.startswith("--seed=")), 7)

OBJECT_GRAPH = "_CHECKPOINTABLE_OBJECT_GRAPH"


class Fixture:
    """A checkpoint in the making: its folder, and what it must hold."""

    def __init__(self, folder: pathlib.Path, form: str, made_by: str) -> None:
        self.folder = folder
        self.form = form
        self.made_by = made_by
        self.prefix = ""
        self.tensors: dict[str, np.ndarray] = {}
        self.aliases: dict[str, str] = {}

    def path(self, prefix: str) -> str:
        """The prefix to save to."""
        self.prefix = prefix
        return str(self.folder / prefix)

    def write_expectation(self) -> None:
        """Writes expected.json and expected.npz, after TensorFlow found the same values in the checkpoint."""
        described: dict[str, dict] = {}
        arrays: dict[str, np.ndarray] = {}
        for number, name in enumerate(sorted(self.tensors)):
            value = self.tensors[name]
            record: dict = {"dtype": dtype_name(value), "shape": list(value.shape)}
            if value.dtype == object:
                record["strings_b64"] = [base64.b64encode(text).decode() for text in value.reshape(-1)]
            else:
                stored = value
                if value.dtype.kind == "V" or value.dtype.isbuiltin != 1:
                    record["stored_as"] = f"uint{8 * value.dtype.itemsize}"
                    stored = value.view(record["stored_as"])
                record["npz"] = f"t{number}"
                arrays[record["npz"]] = stored
            described[name] = record
        document = {"prefix": self.prefix, "format": self.form, "made_by": self.made_by, "tensors": described}
        if self.aliases:
            document["aliases"] = self.aliases
            for path, name in self.aliases.items():
                assert follow(self.tensors[OBJECT_GRAPH][()], path) == name, path
        check_with_tensorflow(str(self.folder / self.prefix), self.tensors)
        text = json.dumps(document, indent=1, sort_keys=True)
        (self.folder / "expected.json").write_text(text + "\n", encoding="utf-8")
        np.savez_compressed(self.folder / "expected.npz", **arrays)


def follow(graph: bytes, path: str) -> str:
    """Name of the tensor of the variable to which a path of attributes leads."""
    nodes = trackable_object_graph_pb2.TrackableObjectGraph.FromString(graph).nodes
    node = nodes[0]
    for step in path.split("/"):
        children = {child.local_name: child.node_id for child in node.children}
        assert step in children, (path, step, sorted(children))
        node = nodes[children[step]]
    (attribute,) = node.attributes
    return attribute.checkpoint_key


def dtype_name(value: np.ndarray) -> str:
    return "string" if value.dtype == object else value.dtype.name


def check_with_tensorflow(prefix: str, tensors: dict[str, np.ndarray]) -> None:
    """Reads everything back with the op that restores, which reads more dtypes than the checkpoint readers do."""
    for name, want in tensors.items():
        dtype = tf.string if want.dtype == object else tf.as_dtype(want.dtype)
        got = tf.raw_ops.RestoreV2(prefix=prefix, tensor_names=[name], shape_and_slices=[""], dtypes=[dtype])
        got = got[0].numpy()
        if want.dtype == object:
            flat = [got] if want.shape == () else list(got.reshape(-1))
            assert flat == list(want.reshape(-1)), name
            continue
        assert got.shape == want.shape, name
        if want.dtype.name.startswith(("int2", "int4")):
            # TensorFlow's graphs keep the sign in all eight bits, NumPy in two or four.
            assert np.array_equal(got, want), name
            continue
        assert np.ascontiguousarray(got).tobytes() == np.ascontiguousarray(want).tobytes(), name


def strings(values: list[bytes], shape: tuple[int, ...] | None = None) -> np.ndarray:
    array = np.empty(len(values), object)
    array[:] = values
    return array if shape is None else array.reshape(shape)


def floats(*shape: int, salt: int = 0) -> np.ndarray:
    """Values that a second run makes again; different ones for each salt."""
    return np.random.default_rng(SEED + 1000 * salt).standard_normal(shape).astype(np.float32)


def forget_meta_graphs(folder: pathlib.Path) -> None:
    """The graphs are not read here, and are larger than the values."""
    for path in folder.rglob("*.meta"):
        path.unlink()


def state_of_a_moved_run(folder: pathlib.Path, name: str) -> None:
    """Makes the absolute paths in a state file those of a machine that is gone."""
    for path in folder.rglob("checkpoint"):
        text = path.read_text(encoding="utf-8")
        path.write_text(text.replace(str(folder), f"/data/runs/{name}"), encoding="utf-8")


# Checkpoints of tf.train.Saver


def v1_more_dtypes(folder: pathlib.Path) -> Fixture:
    """V1, with the dtypes that TensorFlow's own V1 reader does not read."""
    fixture = Fixture(folder, "V1", "Saver, write_version=V1")
    values = {
        "half": np.array([[0.5, -2, np.inf], [np.nan, 6e-8, -0.0]], np.float16),
        "uint16": np.array([0, 1, 65535], np.uint16),
        "bool": np.array([[True], [False]]),
        "bool_scalar": np.array(True),
        "complex64": np.array([1 - 2j, complex(np.inf, -0.0)], np.complex64),
        "complex128": np.array([[1e300 + 1e-300j]], np.complex128),
        "int8": np.array([-128, -1, 0, 127], np.int8),
        "int16": np.array([-32768, 32767], np.int16),
        "int64": np.array([-(2**63), -1, 0, 2**63 - 1], np.int64),
        "uint8": np.array([0, 127, 128, 255], np.uint8),
        "text": strings([b"", b"a\x00b\xff", "größer".encode(), b"x" * 200], (2, 2)),
        "empty": np.zeros((0, 3), np.float32),
    }
    save_with_saver(fixture, "model.ckpt", values, saver_pb2.SaverDef.V1)
    return fixture


def save_with_saver(fixture: Fixture, prefix: str, values: dict[str, np.ndarray], version: int) -> None:
    with tf1.Graph().as_default(), tf1.Session() as session:
        names = list(values)
        file = tf1.placeholder(tf.string, [])
        tensors = [tf.constant(values[name]) for name in names]
        if version == saver_pb2.SaverDef.V1:
            save = tf1.raw_ops.Save(filename=file, tensor_names=names, data=tensors)
        else:
            save = tf1.raw_ops.SaveV2(
                prefix=file, tensor_names=names, shape_and_slices=[""] * len(names), tensors=tensors
            )
        session.run(save, {file: fixture.path(prefix)})
    fixture.tensors = values


def partitioned_variables(fixture: Fixture, *, version: int, sharded: bool) -> None:
    """Variables cut into 3x1, 1x2 and 1x4 parts, saved as one tensor each."""
    config = tf1.ConfigProto(device_count={"CPU": 2})
    with tf1.Graph().as_default(), tf1.Session(config=config) as session:
        rows = floats(10, 4)
        columns = floats(3, 7, salt=1)
        whole_numbers = np.arange(24, dtype=np.int64).reshape(2, 12) - 5
        for name, value, parts, device in (
            ("emb/rows", rows, [3, 1], "/cpu:0"),
            ("emb/cols", columns, [1, 2], "/cpu:1"),
            ("emb/ints", whole_numbers, [1, 4], "/cpu:1"),
        ):
            with tf1.device(device):
                tf1.create_partitioned_variables(value.shape, parts, tf.constant(value), name=name)
        with tf1.device("/cpu:0"):
            tf1.Variable(floats(6, salt=2), name="plain")
            tf1.Variable(np.int64(3), name="global_step")
        session.run(tf1.global_variables_initializer())
        saver = tf1.train.Saver(tf1.global_variables(), write_version=version, sharded=sharded)
        saver.save(session, fixture.path("model.ckpt"), global_step=3)
        fixture.prefix = "model.ckpt-3"
    fixture.tensors = {
        "emb/rows": rows,
        "emb/cols": columns,
        "emb/ints": whole_numbers,
        "plain": floats(6, salt=2),
        "global_step": np.array(3, np.int64),
    }


def v1_partitioned(folder: pathlib.Path) -> Fixture:
    """V1, a file whose tensors consist of slices."""
    fixture = Fixture(folder, "V1", "Saver, write_version=V1, partitioned variables")
    partitioned_variables(fixture, version=saver_pb2.SaverDef.V1, sharded=False)
    return fixture


def v1_sharded(folder: pathlib.Path) -> Fixture:
    """V1, a file for each device; the state file has their glob."""
    fixture = Fixture(
        folder, "V1", "Saver, write_version=V1, sharded=True, partitioned variables, two devices"
    )
    partitioned_variables(fixture, version=saver_pb2.SaverDef.V1, sharded=True)
    fixture.prefix = "model.ckpt-3-?????-of-00002"
    return fixture


def v2_partitioned(folder: pathlib.Path) -> Fixture:
    """V2, tensors that consist of slices."""
    fixture = Fixture(folder, "V2", "Saver, partitioned variables 3x1, 1x2, 1x4")
    partitioned_variables(fixture, version=saver_pb2.SaverDef.V2, sharded=False)
    return fixture


def v2_sharded(folder: pathlib.Path) -> Fixture:
    """V2, a data file for each device."""
    fixture = Fixture(folder, "V2", "Saver, sharded=True, partitioned variables, two devices")
    partitioned_variables(fixture, version=saver_pb2.SaverDef.V2, sharded=True)
    return fixture


def v1_multiblock(folder: pathlib.Path) -> Fixture:
    """V1, a file of several blocks, one of them for a single large tensor."""
    fixture = Fixture(folder, "V1", "raw Save op: several blocks")
    values = {f"layer_{number:03d}": floats(40, 30, salt=number) for number in range(100)}
    values["large"] = floats(300, 500)
    save_with_saver(fixture, "model.ckpt", values, saver_pb2.SaverDef.V1)
    return fixture


def v2_multiblock(folder: pathlib.Path) -> Fixture:
    """V2, an index of several blocks."""
    fixture = Fixture(folder, "V2", "raw SaveV2 op: index of several blocks")
    values = {
        f"layer_{number:05d}/" + "name" * (number % 60): np.full(number % 3, number, np.int16)
        for number in range(6000)
    }
    save_with_saver(fixture, "ckpt", values, saver_pb2.SaverDef.V2)
    return fixture


def v2_narrow(folder: pathlib.Path) -> Fixture:
    """V2, dtypes below a byte, all kinds of float8, and the quantised ones (stored as plain integers)."""
    fixture = Fixture(folder, "V2", "raw SaveV2 op: narrow dtypes")
    names = """int2 uint2 int4 uint4 float4_e2m1fn float8_e4m3fn float8_e5m2 float8_e4m3fnuz float8_e4m3b11fnuz
        float8_e5m2fnuz bfloat16"""
    values = {}
    for name in names.split():
        dtype = np.dtype(getattr(ml_dtypes, name))
        low = 0 if name.startswith("u") else -2
        values[f"narrow/{name}"] = np.arange(low, low + 4).astype(np.float32).astype(dtype).reshape(2, 2)
    save_with_saver(fixture, "ckpt", values, saver_pb2.SaverDef.V2)
    return fixture


def v2_retention(folder: pathlib.Path) -> Fixture:
    """V2, seven saves of which three are kept; padded numbers, relative paths in the state file."""
    fixture = Fixture(folder, "V2", "Saver, seven saves, max_to_keep=3, pad_step_number, save_relative_paths")
    with tf1.Graph().as_default(), tf1.Session() as session:
        variable = tf1.Variable(np.zeros(4, np.float32), name="v")
        step = tf1.Variable(np.int64(0), name="global_step")
        saver = tf1.train.Saver(max_to_keep=3, pad_step_number=True, save_relative_paths=True)
        for number in range(7):
            variable.load(np.full(4, number, np.float32), session)
            step.load(number, session)
            saver.save(session, fixture.path("model.ckpt"), global_step=number)
    fixture.prefix = "model.ckpt-00000006"
    fixture.tensors = {"v": np.full(4, 6, np.float32), "global_step": np.array(6, np.int64)}
    return fixture


# Object-based checkpoints


def read_graph(prefix: str) -> np.ndarray:
    reader = tf.train.load_checkpoint(prefix)
    return np.array(reader.get_tensor(OBJECT_GRAPH), object)


def expect_objects(fixture: Fixture, objects: dict[str, tf.Variable]) -> None:
    """Expects all tensors of a checkpoint that TensorFlow made, and that attribute paths name the variables.

    Which tensor a path names is found by its value, so all variables must differ.
    """
    prefix = str(fixture.folder / fixture.prefix)
    reader = tf.train.load_checkpoint(prefix)
    for name in reader.get_variable_to_shape_map():
        value = reader.get_tensor(name)
        fixture.tensors[name] = np.array(value, object) if isinstance(value, bytes) else np.asarray(value)
    assert fixture.tensors[OBJECT_GRAPH].shape == ()
    for path, variable in objects.items():
        want = np.asarray(variable)
        found = [
            name
            for name, value in fixture.tensors.items()
            if value.dtype == want.dtype and value.shape == want.shape and np.array_equal(value, want)
        ]
        assert len(found) == 1, (path, found)
        fixture.aliases[path] = found[0]


def train(model: object, keras: object) -> None:
    model.compile(optimizer=keras.optimizers.Adam(0.01), loss="mse")
    model.fit(floats(8, 3), floats(8, 2, salt=1), epochs=2, verbose=0)


def tf2_object_keras3(folder: pathlib.Path) -> Fixture:
    """A Keras 3 model and its Adam: the kernels are stored under the optimizer's names."""
    import keras

    keras.utils.set_random_seed(SEED)
    fixture = Fixture(
        folder, "V2 object-based", "tf.train.Checkpoint(model, optimizer) of Keras 3 after 2 steps"
    )
    model = keras.Sequential([keras.layers.Dense(4, activation="relu"), keras.layers.Dense(2)])
    train(model, keras)
    checkpoint = tf.train.Checkpoint(model=model, optimizer=model.optimizer)
    checkpoint.save(fixture.path("ckpt"))
    fixture.prefix = "ckpt-1"
    first, second = model.layers
    momentums = model.optimizer._momentums
    objects = {
        "model/_functional/_operations/1/_kernel": first.kernel.value,
        "model/_functional/_operations/1/bias": first.bias.value,
        "model/_functional/_operations/2/_kernel": second.kernel.value,
        "model/_functional/_operations/2/bias": second.bias.value,
        "model/optimizer/_momentums/0": momentums[0].value,
        "optimizer/_momentums/0": momentums[0].value,
        "optimizer/_learning_rate": model.optimizer._learning_rate.value,
    }
    expect_objects(fixture, objects)
    return fixture


def tf2_object_tfkeras(folder: pathlib.Path) -> Fixture:
    """A Keras 2 model with its optimizer, as save_weights writes it."""
    import tf_keras

    tf_keras.utils.set_random_seed(SEED)
    fixture = Fixture(folder, "V2 object-based", "save_weights of a tf-keras model after 2 steps")
    model = tf_keras.Sequential([tf_keras.layers.Dense(4, activation="relu"), tf_keras.layers.Dense(2)])
    train(model, tf_keras)
    model.save_weights(fixture.path("weights"), save_format="tf")
    first, second = model.layers
    objects = {
        "layer_with_weights-0/kernel": first.kernel,
        "layer-0/kernel": first.kernel,
        "layer_with_weights-0/bias": first.bias,
        "layer_with_weights-1/kernel": second.kernel,
        "layer-1/bias": second.bias,
    }
    expect_objects(fixture, objects)
    return fixture


def tf2_maxshard(folder: pathlib.Path) -> Fixture:
    """Files of at most 600 bytes, with tensors cut over them."""
    fixture = Fixture(folder, "V2 object-based", "tf.train.Checkpoint.write with MaxShardSizePolicy(600)")
    policy = tf.train.experimental.MaxShardSizePolicy(max_shard_size=600)
    options = tf.train.CheckpointOptions(experimental_sharding_callback=policy)
    variables = {
        "tall": tf.Variable(floats(50, 5)),
        "wide": tf.Variable(floats(5, 60, salt=1)),
        "small": tf.Variable(floats(3, salt=2)),
        "count": tf.Variable(np.int64(12)),
        "text": tf.Variable([b"a", b"", b"bc"]),
    }
    tf.train.Checkpoint(**variables).write(fixture.path("ckpt"), options=options)
    graph = read_graph(str(folder / "ckpt"))
    fixture.tensors[OBJECT_GRAPH] = graph
    for name, variable in variables.items():
        key = f"{name}/.ATTRIBUTES/VARIABLE_VALUE"
        value = variable.numpy()
        fixture.tensors[key] = strings(list(value)) if name == "text" else np.asarray(value)
        fixture.aliases[name] = key
    return fixture


def saved_model(folder: pathlib.Path) -> Fixture:
    """The variables of a SavedModel; the folder is a SavedModel directory."""
    fixture = Fixture(folder, "V2 object-based", "tf.saved_model.save of a tf.Module")

    class Model(tf.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kernel = tf.Variable(floats(3, 2), name="dense/kernel")
            self.table = {"a.b/c": tf.Variable(np.arange(3), name="table")}

        @tf.function(input_signature=[tf.TensorSpec([None, 3], tf.float32)])
        def __call__(self, x: tf.Tensor) -> tf.Tensor:
            return x @ self.kernel

    model = Model()
    tf.saved_model.save(model, str(folder))
    fixture.prefix = "variables/variables"
    expect_objects(fixture, {"kernel": model.kernel})
    return fixture


# Synthetic files


def many_tensors() -> dict[str, np.ndarray]:
    """Tensors whose names have long runs and common prefixes, as compression likes them."""
    values: dict[str, np.ndarray] = {}
    for layer in range(60):
        letters = "a" * (3 * layer % 70)
        values[f"model/layer_{layer:03d}/{letters}/kernel"] = np.arange(layer % 7, dtype=np.float32)
        values[f"model/layer_{layer:03d}/{letters}/kernel/Adam"] = np.full((layer % 3, 2), layer, np.int16)
    return values


def synthetic_v2_blocks(folder: pathlib.Path) -> Fixture:
    """An index of many small blocks."""
    fixture = Fixture(folder, "V2", "written by generate.py: index of many blocks")
    fixture.tensors = many_tensors()
    write_bundle(fixture.path("ckpt"), fixture.tensors, block_bytes=512)
    return fixture


def synthetic_v2_snappy(folder: pathlib.Path) -> Fixture:
    """An index of blocks that are compressed by Snappy, with copies that overlap themselves."""
    fixture = Fixture(folder, "V2", "written by generate.py: index of compressed blocks")
    fixture.tensors = many_tensors()
    write_bundle(fixture.path("ckpt"), fixture.tensors, block_bytes=2048, compress=snappy_compress)
    return fixture


def synthetic_v2_bigendian(folder: pathlib.Path) -> Fixture:
    """A bundle of a big-endian machine."""
    fixture = Fixture(folder, "V2", "written by generate.py: big-endian bundle")
    fixture.tensors = {
        "bool": np.array([True, False]),
        "int8": np.array([-1, 2], np.int8),
        "int16": np.array([[1, -2], [300, -400]], np.int16),
        "int64": np.array(-(2**60) + 1),
        "uint32": np.array([1, 2**31], np.uint32),
        "half": np.array([0.5, -1.25], np.float16),
        "bfloat16": np.array([1.5, -3, 1e30], np.float32).astype(ml_dtypes.bfloat16),
        "float": floats(3, 4),
        "double": np.array([np.pi, -0.0]),
        "complex64": np.array([1 + 2j, 3 - 4j], np.complex64),
        "complex128": np.array([1 + 2j, 3 - 4j], np.complex128),
        "text": strings([b"", b"ab", b"\x00\xff" * 100]),
        "nothing": np.zeros((2, 0), np.float64),
    }
    write_bundle(fixture.path("ckpt"), fixture.tensors, big_endian=True)
    return fixture


def synthetic_v1_blocks(folder: pathlib.Path) -> Fixture:
    """A V1 file of many small blocks, half of them compressed, one tensor larger than a block."""
    fixture = Fixture(folder, "V1", "written by generate.py: file of many blocks")
    fixture.tensors = {
        f"layer_{number:02d}/kernel": np.arange(number, dtype=np.int32) - 9 for number in range(40)
    }
    fixture.tensors["large"] = floats(50, 40)
    fixture.tensors["text"] = strings([b"a" * 100, b"", b"b" * 300])
    write_v1(fixture.path("model.ckpt"), fixture.tensors, block_bytes=1024)
    return fixture


def write_bundle(
    prefix: str,
    tensors: dict[str, np.ndarray],
    *,
    block_bytes: int = 1 << 18,
    compress: Callable[[bytes], bytes] | None = None,
    big_endian: bool = False,
) -> None:
    header = tensor_bundle_pb2.BundleHeaderProto(
        num_shards=1,
        endianness=tensor_bundle_pb2.BundleHeaderProto.BIG
        if big_endian
        else tensor_bundle_pb2.BundleHeaderProto.LITTLE,
        version=versions_pb2.VersionDef(producer=1),
    )
    records = {b"": header.SerializeToString()}
    with open(f"{prefix}.data-00000-of-00001", "wb") as file:
        for name, value in sorted(tensors.items()):
            data, checksum = encode_tensor(value, ">" if big_endian else "<")
            dtype = tf.string if value.dtype == object else tf.as_dtype(value.dtype)
            entry = tensor_bundle_pb2.BundleEntryProto(
                dtype=dtype.as_datatype_enum,
                shape=shape_proto(value.shape),
                offset=file.tell(),
                size=len(data),
                crc32c=mask(checksum),
            )
            records[name.encode()] = entry.SerializeToString()
            file.write(data)
    pathlib.Path(f"{prefix}.index").write_bytes(write_table(records, block_bytes, [compress]))


def encode_tensor(value: np.ndarray, order: str) -> tuple[bytes, int]:
    """The bytes of a tensor in the data file, and their checksum."""
    if value.dtype != object:
        flat = np.ascontiguousarray(value).reshape(-1)
        part_bytes = value.dtype.itemsize // 2 if value.dtype.kind == "c" else value.dtype.itemsize
        parts = flat.view(f"u{part_bytes}")
        data = parts.astype(f"{order}u{part_bytes}").tobytes()
        return data, crc32c(data)
    texts = list(value.reshape(-1))
    lengths = b"".join(varint(len(text)) for text in texts)
    plain = b"".join(struct.pack(f"{order}I", len(text)) for text in texts)
    length_sum = struct.pack(f"{order}I", mask(crc32c(plain)))
    content = b"".join(texts)
    return lengths + length_sum + content, crc32c(plain + length_sum + content)


def write_v1(path: str, tensors: dict[str, np.ndarray], *, block_bytes: int) -> None:
    slices = saved_tensor_slice_pb2.SavedTensorSlices()
    slices.meta.versions.producer = 1
    records: dict[bytes, bytes] = {}
    for name, value in sorted(tensors.items()):
        dtype = types_pb2.DT_STRING if value.dtype == object else tf.as_dtype(value.dtype).as_datatype_enum
        whole = tensor_slice_pb2.TensorSliceProto()
        for _ in value.shape:
            whole.extent.add()
        slices.meta.tensor.add(name=name, shape=shape_proto(value.shape), type=dtype).slice.append(whole)
        tensor = tensor_pb2.TensorProto()
        if dtype == types_pb2.DT_STRING:
            tensor.string_val.extend(value.reshape(-1))
        elif dtype == types_pb2.DT_FLOAT:
            tensor.float_val.extend(value.reshape(-1))
        else:
            tensor.int_val.extend(value.reshape(-1))
        record = saved_tensor_slice_pb2.SavedTensorSlices()
        record.data.name = name
        record.data.slice.CopyFrom(whole)
        record.data.data.CopyFrom(tensor)
        records[whole_slice_key(name, value.ndim)] = record.SerializeToString()
    records[b""] = slices.SerializeToString()
    pathlib.Path(path).write_bytes(write_table(records, block_bytes, [None, snappy_compress]))


def whole_slice_key(name: str, rank: int) -> bytes:
    """The ordered code of (0, name, rank, (0, -1) for each axis); all names here are ASCII and not empty."""
    number_of_axes = b"\x00" if rank == 0 else bytes([1, rank])
    return b"\x00" + name.encode() + b"\x00\x01" + number_of_axes + b"\x80\x7f" * rank


def shape_proto(shape: tuple[int, ...]) -> tensor_shape_pb2.TensorShapeProto:
    proto = tensor_shape_pb2.TensorShapeProto()
    for size in shape:
        proto.dim.add(size=size)
    return proto


def write_table(
    records: dict[bytes, bytes], block_bytes: int, compressors: list[Callable[[bytes], bytes] | None]
) -> bytes:
    """A table file; its blocks are compressed by each of the compressors in turn."""
    out = bytearray()
    handles: list[tuple[bytes, bytes]] = []

    def emit(content: bytes, compress: Callable[[bytes], bytes] | None) -> bytes:
        stored = content if compress is None else compress(content)
        handle = varint(len(out)) + varint(len(stored))
        trailed = stored + (b"\x00" if compress is None else b"\x01")
        out.extend(trailed + struct.pack("<I", mask(crc32c(trailed))))
        return handle

    block: list[tuple[bytes, bytes]] = []
    names = sorted(records)
    for place, name in enumerate(names):
        block.append((name, records[name]))
        is_last = place + 1 == len(names)
        if is_last or len(encode_block(block, 16)) >= block_bytes:
            compress = compressors[len(handles) % len(compressors)]
            handle = emit(encode_block(block, 16), compress)
            handles.append((name if is_last else separator(name, names[place + 1]), handle))
            block = []
    metaindex = emit(encode_block([], 16), None)
    index = emit(encode_block(handles, 1), compressors[0])
    return bytes(out) + (metaindex + index).ljust(40, b"\x00") + bytes.fromhex("57fb808b247547db")


def separator(lower: bytes, upper: bytes) -> bytes:
    """A short key that is not below `lower` and is below `upper`."""
    shared = shared_length(lower, upper)
    if shared < min(len(lower), len(upper)) and lower[shared] + 1 < min(upper[shared], 255):
        return lower[:shared] + bytes([lower[shared] + 1])
    return lower


def shared_length(a: bytes, b: bytes) -> int:
    pairs = enumerate(zip(a, b, strict=False))
    return next((place for place, (x, y) in pairs if x != y), min(len(a), len(b)))


def encode_block(entries: list[tuple[bytes, bytes]], interval: int) -> bytes:
    content = bytearray()
    restarts = []
    previous = b""
    for place, (key, value) in enumerate(entries):
        shared = shared_length(key, previous) if place % interval else 0
        if place % interval == 0:
            restarts.append(len(content))
        content += varint(shared) + varint(len(key) - shared) + varint(len(value)) + key[shared:] + value
        previous = key
    restarts = restarts or [0]
    return bytes(content) + struct.pack(f"<{len(restarts) + 1}I", *restarts, len(restarts))


def varint(value: int) -> bytes:
    out = bytearray()
    while value >= 128:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


def snappy_compress(data: bytes) -> bytes:
    """Greedy matching of four bytes; copies of all three kinds, and some that reach into themselves."""
    out = bytearray(varint(len(data)))
    seen: dict[bytes, int] = {}
    literal_from = 0
    place = 0
    copies = 0
    while place + 4 <= len(data):
        word = data[place : place + 4]
        match = seen.get(word)
        seen[word] = place
        if match is None:
            place += 1
            continue
        length = 4
        while length < 64 and place + length < len(data) and data[match + length] == data[place + length]:
            length += 1
        out += snappy_literal(data[literal_from:place])
        offset = place - match
        copies += 1
        if copies % 5 == 0:
            out += bytes([(length - 1) << 2 | 3]) + struct.pack("<I", offset)
        elif length < 12 and offset < 2048:
            out += bytes([offset >> 8 << 5 | (length - 4) << 2 | 1, offset & 255])
        else:
            out += bytes([(length - 1) << 2 | 2]) + struct.pack("<H", offset)
        place += length
        literal_from = place
    return bytes(out + snappy_literal(data[literal_from:]))


def snappy_literal(data: bytes) -> bytes:
    if not data:
        return b""
    if len(data) <= 60:
        return bytes([(len(data) - 1) << 2]) + data
    return bytes([61 << 2]) + struct.pack("<H", len(data) - 1) + data


def crc32c(data: bytes) -> int:
    checksum = 0xFFFFFFFF
    for byte in data:
        checksum = CRC_TABLE[(checksum ^ byte) & 255] ^ (checksum >> 8)
    return checksum ^ 0xFFFFFFFF


def crc_of_byte(value: int) -> int:
    for _ in range(8):
        value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
    return value


CRC_TABLE = [crc_of_byte(value) for value in range(256)]


def mask(checksum: int) -> int:
    return ((checksum >> 15 | checksum << 17) + 0xA282EAD8) & 0xFFFFFFFF


MAKERS = (
    v1_more_dtypes,
    v1_partitioned,
    v1_sharded,
    v2_narrow,
    v2_retention,
    tf2_object_keras3,
    tf2_object_tfkeras,
    tf2_maxshard,
    saved_model,
    synthetic_v2_blocks,
    synthetic_v2_snappy,
    synthetic_v2_bigendian,
    synthetic_v1_blocks,
)
# Made only when they are named, or all are asked for: too large to lie here, or there already, from another program.
EXTRA_MAKERS = (v1_multiblock, v2_multiblock, v2_partitioned, v2_sharded)


def main() -> None:
    target = pathlib.Path(sys.argv[1]).resolve()
    wanted = [name for name in sys.argv[2:] if not name.startswith("--")]
    makers = MAKERS + EXTRA_MAKERS if wanted or "--all" in sys.argv else MAKERS
    for make in makers:
        if wanted and make.__name__ not in wanted:
            continue
        folder = target / make.__name__
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        fixture = make(folder)
        fixture.write_expectation()
        forget_meta_graphs(folder)
        state_of_a_moved_run(folder, make.__name__)
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        print(f"{make.__name__}: {len(fixture.tensors)} tensors, {size} bytes")


if __name__ == "__main__":
    main()
