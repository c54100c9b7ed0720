"""TensorFlow's checkpoints are read, whole and in part, whatever wrote them and however they are named.

The checkpoints below ``tests/tensorflow`` were written by TensorFlow itself, or read by it (``synthetic_*``);
``expected.json`` and ``expected.npz`` say what is in them.
"""

from __future__ import annotations

import base64
import json
import logging
import math
import os
import pathlib
import shutil
import struct

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import jaxckpt
from jaxckpt.interop import tensorflow
from jaxckpt.interop._crc import crc32c, extend, mask, unmask
from jaxckpt.interop._datatypes import DATA_TYPES
from jaxckpt.interop._objects import parse_names
from jaxckpt.interop._partitions import boxes_of_range, slice_key
from jaxckpt.interop._protobuf import WireError, encode_bytes, encode_fixed32, encode_number, encode_varint
from jaxckpt.interop._sstable import decompress_snappy, encode_table

from .helpers import make_mesh, run_program

FIXTURES = pathlib.Path(__file__).resolve().parent / "tensorflow"
FOLDERS = sorted(path.parent.name for path in FIXTURES.glob("*/expected.json"))
GRAPH = "_CHECKPOINTABLE_OBJECT_GRAPH"


def expectations(folder):
    return json.loads((FIXTURES / folder / "expected.json").read_text())


def open_fixture(folder, **options):
    return tensorflow.open(FIXTURES / folder / expectations(folder)["prefix"], **options)


def expected_values(folder):
    """The true values by name; those of types that NumPy lacks as unsigned integers."""
    with np.load(FIXTURES / folder / "expected.npz") as arrays:
        for name, tensor in expectations(folder)["tensors"].items():
            if name == GRAPH:
                continue
            if "strings_b64" in tensor:
                strings = np.empty(len(tensor["strings_b64"]), object)
                strings[:] = [base64.b64decode(text) for text in tensor["strings_b64"]]
                yield name, tensor, strings.reshape(tensor["shape"])
            else:
                yield name, tensor, arrays[tensor["npz"]]


def plain(array):
    """An array as `expected_values` has it."""
    if isinstance(array, bytes):
        array = np.array(array, object)
    if array.dtype == object or (array.dtype.kind in "?biufc" and array.dtype.isbuiltin == 1):
        return array
    bits = array.view(f"u{array.dtype.itemsize}")
    return bits & {"int2": 3, "int4": 15}[array.dtype.name] if array.dtype.name in ("int2", "int4") else bits


def assert_equal(got, want, where):
    got = plain(got)
    assert got.shape == want.shape, where
    if want.dtype == object:
        assert got.tolist() == want.tolist(), where
    else:
        assert got.dtype == want.dtype, where
        assert got.tobytes() == want.tobytes(), where


# --- what TensorFlow wrote --------------------------------------------------------------------------------------


def test_there_are_checkpoints_of_both_formats_and_of_all_kinds():
    formats = {expectations(folder)["format"] for folder in FOLDERS}
    assert formats >= {"V1", "V2", "V2 object-based"}
    dtypes = {tensor["dtype"] for folder in FOLDERS for tensor in expectations(folder)["tensors"].values()}
    readable = {each.dtype.name for each in DATA_TYPES.values() if each.dtype is not None}
    assert dtypes >= readable | {"string"}


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_tensor_is_read_bit_for_bit(folder):
    with open_fixture(folder) as checkpoint:
        for name, tensor, want in expected_values(folder):
            leaf = checkpoint[name]
            assert leaf.shape == tuple(tensor["shape"])
            assert (leaf.dtype.name if leaf.dtype is not None else "string") == tensor["dtype"]
            assert_equal(leaf[...], want, name)
        hidden = {GRAPH} & set(expectations(folder)["tensors"])
        assert len(checkpoint) == len(expectations(folder)["tensors"]) - len(hidden)
        assert GRAPH not in checkpoint


@pytest.mark.parametrize("verify_slices", [False, True])
@pytest.mark.parametrize("folder", FOLDERS)
def test_slices_are_what_numpy_cuts_out(folder, verify_slices):
    chance = np.random.default_rng(5)
    with open_fixture(folder, verify_slices=verify_slices) as checkpoint:
        for name, _, want in expected_values(folder):
            for _ in range(3):
                index = tuple(
                    slice(*sorted(int(place) for place in chance.integers(0, size + 1, 2)))
                    for size in want.shape
                )
                assert_equal(checkpoint[name][(*index, ...)], want[(*index, ...)], (name, index))
            if want.size:
                place = tuple(int(chance.integers(0, size)) for size in want.shape)
                got = checkpoint[name][(*place, ...)]
                assert_equal(got, want[(*place, ...)], (name, place))


@pytest.mark.parametrize("folder", FOLDERS)
@pytest.mark.parametrize("piece_elements", [1, 7, 1 << 20])
def test_streams_are_the_bytes_of_the_arrays(folder, piece_elements):
    with open_fixture(folder) as checkpoint:
        for name, leaf in checkpoint.leaves().items():
            if leaf.dtype is None or (piece_elements == 1 and leaf.nbytes > 2000):
                continue
            step = piece_elements * leaf.dtype.itemsize
            ends = [min(start + step, leaf.nbytes) for start in range(0, leaf.nbytes, step)]
            pieces = [bytes(checkpoint.stream(name, end - ((end - 1) % step + 1), end)) for end in ends]
            assert b"".join(pieces) == checkpoint[name][...].tobytes(), name


@pytest.mark.parametrize("folder", FOLDERS)
def test_expected_aliases_lead_to_the_variables(folder):
    with open_fixture(folder) as checkpoint:
        for alias, key in expectations(folder).get("aliases", {}).items():
            assert checkpoint[alias].key == checkpoint[key].key


def test_the_listing_is_that_of_tensorflow():
    with open_fixture("v2_partitioned") as checkpoint:
        assert checkpoint.debug_string().splitlines() == [
            "emb/cols (DT_FLOAT) [3,7]",
            "emb/ints (DT_INT64) [2,12]",
            "emb/rows (DT_FLOAT) [10,4]",
            "global_step (DT_INT64) []",
            "plain (DT_FLOAT) [6]",
        ]


def test_a_partitioned_tensor_is_read_from_the_files_that_have_what_is_asked_for(tmp_path):
    shutil.copytree(FIXTURES / "tf2_maxshard", tmp_path, dirs_exist_ok=True)
    (tmp_path / "ckpt.data-00001-of-00004").unlink()
    values = {name: want for name, _, want in expected_values("tf2_maxshard")}
    with tensorflow.open(tmp_path) as checkpoint:
        tall = checkpoint["tall"]
        key = tall.key
        rows = len(values["tall/.ATTRIBUTES/VARIABLE_VALUE"])
        readable = [row for row in range(rows) if is_readable(checkpoint, key, row)]
        assert 0 < len(readable) < rows
        for row in readable:
            assert_equal(tall[row], values["tall/.ATTRIBUTES/VARIABLE_VALUE"][row], row)
        with pytest.raises(jaxckpt.CorruptError, match=r"data-00001-of-00004: is missing"):
            tall[...]


def is_readable(checkpoint, key, row):
    try:
        checkpoint[key][row]
    except jaxckpt.CorruptError:
        return False
    return True


# --- reading little ---------------------------------------------------------------------------------------------


def test_opening_reads_the_index_and_a_slice_reads_its_own_bytes(tmp_path):
    array = np.arange(1 << 20, dtype=np.float32).reshape(1024, 1024)
    tensorflow.write(tmp_path / "x", {"w": array, "wide": array.reshape(8, 32768, 4)})
    checkpoint = tensorflow.open(tmp_path / "x")
    opened = checkpoint.bytes_read
    assert opened == (tmp_path / "x.index").stat().st_size
    assert np.array_equal(checkpoint["w"][10:20], array[10:20])
    assert checkpoint.bytes_read == opened + 10 * 4096
    # Columns: whole rows would be 4 MiB, single elements a thousand reads.
    before = checkpoint.bytes_read
    assert np.array_equal(checkpoint["w"][:, 5:7], array[:, 5:7])
    assert checkpoint.bytes_read - before <= array.nbytes
    before = checkpoint.bytes_read
    assert np.array_equal(checkpoint["w"][100:102, 5:7], array[100:102, 5:7])
    assert checkpoint.bytes_read - before == 4096 + 8
    # Rows of 512 KiB: their beginnings are read one by one.
    before = checkpoint.bytes_read
    assert np.array_equal(checkpoint["wide"][:, 5:10, 1], array.reshape(8, 32768, 4)[:, 5:10, 1])
    assert checkpoint.bytes_read - before == 8 * (4 * 16 + 4)


def test_an_old_table_is_read_block_by_block():
    path = FIXTURES / "synthetic_v1_blocks" / "model.ckpt"
    with tensorflow.open(path) as checkpoint:
        assert checkpoint.bytes_read < path.stat().st_size / 2
        name = checkpoint.keys()[-1]
        before = checkpoint.bytes_read
        checkpoint[name][...]
        checkpoint[name][...]
        assert checkpoint.bytes_read - before < path.stat().st_size / 2


def test_a_slice_is_verified_when_that_is_asked_for(tmp_path):
    tensorflow.write(tmp_path / "x", {"w": np.arange(100, dtype=np.float32)})
    data = tmp_path / "x.data-00000-of-00001"
    content = bytearray(data.read_bytes())
    content[399] ^= 1
    data.write_bytes(content)
    assert tensorflow.open(tmp_path / "x")["w"][:3].tolist() == [0, 1, 2]
    with pytest.raises(jaxckpt.CorruptError, match="checksum"):
        tensorflow.open(tmp_path / "x", verify_slices=True)["w"][:3]
    with pytest.raises(jaxckpt.CorruptError, match="checksum"):
        tensorflow.read(tmp_path / "x")


def test_a_stream_that_leaves_something_out_is_verified_all_the_same(tmp_path):
    tensorflow.write(tmp_path / "x", {"w": np.arange(100, dtype=np.float32)})
    with tensorflow.open(tmp_path / "x") as checkpoint:
        assert bytes(checkpoint.stream("w", 200, 400)) == np.arange(50, 100, dtype=np.float32).tobytes()
    data = tmp_path / "x.data-00000-of-00001"
    data.write_bytes(b"\1" + data.read_bytes()[1:])
    with tensorflow.open(tmp_path / "x") as checkpoint, pytest.raises(jaxckpt.CorruptError, match="checksum"):
        checkpoint.stream("w", 200, 400)
    with tensorflow.open(tmp_path / "x") as checkpoint:
        checkpoint.stream("w", 0, 200)
        with pytest.raises(jaxckpt.CorruptError, match="checksum"):
            checkpoint.stream("w", 200, 400)


def test_ranges_are_cut_into_boxes_that_are_runs():
    for shape in [(), (5,), (3, 4), (2, 3, 4), (1, 1, 6), (4, 1, 2)]:
        places = np.arange(math.prod(shape)).reshape(shape)
        for first in range(places.size + 1):
            for last in range(first, places.size + 1):
                found = [
                    places[tuple(map(slice, lo, hi))].reshape(-1)
                    for lo, hi in boxes_of_range(shape, first, last)
                ]
                assert np.concatenate([np.empty(0, int), *found]).tolist() == list(range(first, last))


# --- naming a checkpoint ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    [
        "v2_saver/model.ckpt-1000",
        "v2_saver/model.ckpt-1000.index",
        "v2_saver/model.ckpt-1000.data-00000-of-00001",
        "v2_saver/model.ckpt-1000.meta",
        "v2_saver",
        "v2_saver/checkpoint",
        "v1_saver/model.ckpt-1000",
        "v1_saver",
        "v1_sharded/model.ckpt-3",
        "v1_sharded/model.ckpt-3-?????-of-00002",
        "v1_sharded/model.ckpt-3-00001-of-00002",
        "v1_sharded",
        "saved_model",
        "saved_model/variables",
        "saved_model/variables/variables",
        "saved_model/saved_model.pb",
        "v2_dtypes",
        "v1_saver/model.ckpt-1000.meta",
        "v1_sharded/model.ckpt-3.meta",
    ],
)
def test_every_way_to_name_a_checkpoint(path):
    assert tensorflow.can_read(FIXTURES / path)
    folder = path.partition("/")[0]
    with tensorflow.open(str(FIXTURES / path)) as checkpoint:
        for name, _, want in expected_values(folder):
            assert_equal(checkpoint[name][...], want, name)


def test_an_old_checkpoint_without_a_state_file_is_found_in_its_directory(tmp_path):
    for file in (FIXTURES / "v1_sharded").glob("model.ckpt-3-*"):
        shutil.copy(file, tmp_path)
    (tmp_path / "notes.txt").write_text("no table")
    with tensorflow.open(tmp_path) as checkpoint:
        assert checkpoint.path == str(tmp_path / "model.ckpt-3-?????-of-00002")
    shutil.copy(tmp_path / "model.ckpt-3-00000-of-00002", tmp_path / "other")
    with pytest.raises(jaxckpt.NotFoundError, match=r"give the path of one: model\.ckpt-3, other"):
        tensorflow.open(tmp_path)


def test_what_is_no_checkpoint_is_not_found(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").write_text("no checkpoint\n" * 10)
    for name in ("missing", "empty", "missing/deeper", "text"):
        assert not tensorflow.can_read(tmp_path / name)
        with pytest.raises(jaxckpt.NotFoundError, match="no TensorFlow checkpoint"):
            tensorflow.open(tmp_path / name)


def test_missing_files_are_named(tmp_path):
    shutil.copytree(FIXTURES / "v1_sharded", tmp_path, dirs_exist_ok=True)
    (tmp_path / "model.ckpt-3-00000-of-00002").unlink()
    with pytest.raises(jaxckpt.CorruptError, match="ckpt-3-00000-of-00002: is missing"):
        tensorflow.open(tmp_path / "model.ckpt-3")
    tensorflow.write(tmp_path / "x", {"w": np.zeros(3)}, write_state=False)
    (tmp_path / "x.index").rename(tmp_path / "kept")
    for name in ("x", "x.data-00000-of-00001"):
        with pytest.raises(jaxckpt.CorruptError, match=r"x\.index: is missing"):
            tensorflow.open(tmp_path / name)


def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(tmp_path):
    tensorflow.write(tmp_path / "x", {"w": np.zeros(3)})
    data = tmp_path / "x.data-00000-of-00001"
    data.unlink()
    os.mkfifo(data)
    with tensorflow.open(tmp_path / "x") as checkpoint, pytest.raises(jaxckpt.CorruptError, match="regular"):
        checkpoint["w"][...]


def test_several_checkpoints_without_a_state_file_are_listed(tmp_path):
    for name in ("a", "b"):
        tensorflow.write(tmp_path / name, {"w": np.zeros(3)}, write_state=False)
    with pytest.raises(jaxckpt.NotFoundError, match=r"give the path of one: a\.index, b\.index"):
        tensorflow.open(tmp_path)


@pytest.mark.parametrize(
    "line",
    [
        'model_checkpoint_path: "x \\303\\244\\"\\\\"',
        'model_checkpoint_path:"/gone/run/x \\303\\244\\"\\\\"',
        "model_checkpoint_path: 'deeper/x \\xc3\\xa4\"\\\\'  ",
    ],
)
def test_state_files_name_the_latest_checkpoint(tmp_path, line):
    (tmp_path / "deeper").mkdir()
    directory = tmp_path / "deeper" if "deeper" in line else tmp_path
    tensorflow.write(directory / 'x ä"\\', {"w": np.arange(3)}, write_state=False)
    tensorflow.write(tmp_path / "y", {"v": np.arange(3)}, write_state=False)
    (tmp_path / "checkpoint").write_text(f'{line}\nall_model_checkpoint_paths: "y"\n')
    assert tensorflow.open(tmp_path).keys() == ("w",)


def test_a_latest_checkpoint_that_is_gone_is_replaced_by_the_newest_of_the_others(tmp_path, caplog):
    for name in ("a", "b"):
        tensorflow.write(tmp_path / name, {name: np.zeros(3)}, write_state=False)
    lines = [f'all_model_checkpoint_paths: "{name}"' for name in ("a", "b", "c")]
    (tmp_path / "checkpoint").write_text("\n".join(['model_checkpoint_path: "c"', *lines]))
    with caplog.at_level(logging.WARNING, "jaxckpt"):
        assert tensorflow.open(tmp_path).keys() == ("b",)
    assert "names c as the latest checkpoint, which is not there" in caplog.text
    for index in tmp_path.glob("*.index"):
        index.unlink()
    for data in tmp_path.glob("*.data-*"):
        data.unlink()
    with pytest.raises(jaxckpt.NotFoundError, match=r"none of the checkpoints .* is there: c, b, a"):
        tensorflow.open(tmp_path)
    (tmp_path / "checkpoint").write_text("rubbish")
    with pytest.raises(jaxckpt.CorruptError, match="names no latest checkpoint"):
        tensorflow.open(tmp_path)


# --- names of objects -------------------------------------------------------------------------------------------


def test_a_variable_that_keras_stores_under_its_optimizer_is_named_after_its_layer():
    with open_fixture("tf2_object_keras3") as checkpoint:
        key = "model/_functional/_operations/1/_kernel"
        keys = checkpoint.keys()
        assert key in keys
        stored = "optimizer/_trainable_variables/0/.ATTRIBUTES/VARIABLE_VALUE"
        assert stored in checkpoint.aliases()[key]
        assert checkpoint[stored].key == checkpoint["optimizer/_trainable_variables/0"].key == key
        assert "optimizer/_momentums/0" in keys
        assert not any("VARIABLE_VALUE" in name for name in keys)


def test_slots_and_escaped_names():
    with open_fixture("tf2_object_slots") as checkpoint:
        keys = checkpoint.keys()
        assert {"net/w", "net/w/.OPTIMIZER_SLOT/opt/m", "net/layers/0", "net/d/k/with.slash", "step"} <= set(
            keys
        )
        assert checkpoint["w/Adam"].key == "net/w/.OPTIMIZER_SLOT/opt/m"
        assert checkpoint["net/d/k.Swith..slash/.ATTRIBUTES/VARIABLE_VALUE"].key == "net/d/k/with.slash"
        assert "Variable" not in checkpoint


def encode_node(children=(), attributes=(), slots=()):
    node = b"".join(
        encode_bytes(1, encode_number(1, child) + encode_bytes(2, name)) for name, child in children
    )
    node += b"".join(
        encode_bytes(2, encode_bytes(1, name) + encode_bytes(2, full_name) + encode_bytes(3, key))
        for name, full_name, key in attributes
    )
    node += b"".join(
        encode_bytes(3, encode_number(1, original) + encode_bytes(2, name) + encode_number(3, variable))
        for original, name, variable in slots
    )
    return encode_bytes(1, node)


def test_paths_through_flat_lists_are_the_last_choice_and_slots_follow_the_stored_path():
    variable = b"z/.ATTRIBUTES/VARIABLE_VALUE"
    nodes = [
        encode_node([(b"variables", 1), (b"a", 2), (b"z", 2), (b"opt", 3), (b"_all_variables", 5)]),
        encode_node([(b"0", 2)]),
        encode_node(attributes=[(b"VARIABLE_VALUE", b"dense/kernel", variable)]),
        encode_node(slots=[(2, b"m", 4)]),
        encode_node(attributes=[(b"VARIABLE_VALUE", b"", b"m")]),
        encode_node([(b"0", 6)]),
        encode_node(attributes=[(b"VARIABLE_VALUE", b"dense/kernel", b"copy")]),
    ]
    names = parse_names(memoryview(b"".join(nodes)))
    assert names[variable] == ["z", "a", "variables/0", "dense/kernel"]
    assert names[b"m"] == ["z/.OPTIMIZER_SLOT/opt/m"]
    assert names[b"copy"] == ["_all_variables/0"]


def test_graphs_with_circles_and_much_that_is_shared_stay_small():
    layers = 200
    nodes = [
        encode_node([(b"a", layer + 1), (b"b", layer + 1), (b"back", 0), (b"self", layer)])
        for layer in range(layers)
    ]
    nodes.append(encode_node(attributes=[(b"VARIABLE_VALUE", b"v", b"deep")]))
    nodes[0] = encode_node([(b"a", 1), (b"b", 1), (b"near", layers + 1), (b"back", 0)])
    nodes.append(encode_node([(b"x", 0)], attributes=[(b"VARIABLE_VALUE", b"n", b"k")]))
    names = parse_names(memoryview(b"".join(nodes)))
    assert names[b"k"] == ["near", "n"]
    assert names[b"deep"] == ["v"]  # too deep for a path
    wide = [encode_node([(b"%d" % place, place + 1), (b"other", place + 1)]) for place in range(20)]
    wide.append(encode_node(attributes=[(b"VARIABLE_VALUE", b"", b"k")]))
    found = parse_names(memoryview(b"".join(wide)))[b"k"]
    assert len(found) == len(set(found)) == 16


def test_names_of_objects_need_not_be_utf_8():
    key = b"\xff/.ATTRIBUTES/VARIABLE_VALUE"
    nodes = [encode_node([(b"a", 1), (b"\xff", 1)]), encode_node(attributes=[(b"VARIABLE_VALUE", b"", key)])]
    assert parse_names(memoryview(b"".join(nodes)))[key] == ["\udcff", "a"]


def test_slots_of_variables_that_nothing_leads_to_have_no_path():
    nodes = [
        encode_node([(b"opt", 1)]),
        encode_node(slots=[(2, b"m", 3)]),
        encode_node(attributes=[(b"VARIABLE_VALUE", b"", b"w")]),
        encode_node(attributes=[(b"VARIABLE_VALUE", b"w/m", b"m")]),
    ]
    assert parse_names(memoryview(b"".join(nodes))) == {b"w": [], b"m": ["w/m"]}


def test_a_graph_that_refers_to_nothing_is_damaged():
    for damaged in (
        encode_node([(b"a", 5)]),
        encode_node(slots=[(0, b"m", -1)]),
        encode_node([(b"a", 0)])[:-1],
        encode_bytes(1, encode_number(1, 3)),
    ):
        with pytest.raises(WireError):
            parse_names(memoryview(damaged))


# --- restoring --------------------------------------------------------------------------------------------------


def test_a_checkpoint_is_restored_onto_devices_under_other_names():
    mesh = make_mesh({"x": 2})
    values = {name: want for name, _, want in expected_values("v2_partitioned")}
    rows = NamedSharding(mesh, PartitionSpec("x"))
    like = {
        "table": jax.ShapeDtypeStruct((10, 4), np.float32, sharding=rows),
        "plain": jax.ShapeDtypeStruct((6,), np.float32, sharding=rows),
    }
    tree = tensorflow.read(
        FIXTURES / "v2_partitioned",
        like,
        rename={"emb/rows": "table"},
        unexpected="ignore",
    )
    assert tree["table"].sharding == rows
    assert_equal(np.asarray(tree["table"]), values["emb/rows"], "table")
    assert_equal(np.asarray(tree["plain"]), values["plain"], "plain")


def test_a_keras_model_is_restored_by_the_paths_of_its_layers():
    key = "model/_functional/_operations/1/_kernel"
    with open_fixture("tf2_object_keras3") as checkpoint:
        want = checkpoint[key][...]
        like = {"model": {"_functional": {"_operations": [None, {"_kernel": want}]}}}
        tree = tensorflow.read(checkpoint, like, unexpected="ignore")
    assert np.array_equal(tree["model"]["_functional"]["_operations"][1]["_kernel"], want)


def test_without_like_a_checkpoint_comes_back_by_its_names():
    tree = tensorflow.read(FIXTURES / "tf2_object_slots", select="net/*")
    with open_fixture("tf2_object_slots") as checkpoint:
        assert set(tree) == {name for name in checkpoint.leaves() if name.startswith("net/")}
        assert np.array_equal(tree["net/w"], checkpoint["net/w"][...])


@pytest.mark.parametrize("folder", ["v1_saver", "v2_saver"])
def test_what_is_closed_is_not_read(folder):
    checkpoint = open_fixture(folder)
    checkpoint["f/float32"][...]
    checkpoint.close()
    checkpoint.close()
    unread = open_fixture(folder)
    unread.close()
    for closed in (checkpoint, unread):
        with pytest.raises(ValueError, match="is closed"):
            closed["f/float32"][...]


# --- what is no array -------------------------------------------------------------------------------------------


def record(type_number, shape, offset=0, size=0, data=b"", slices=b""):
    dimensions = b"".join(encode_bytes(2, encode_number(1, length)) for length in shape)
    return (
        encode_number(1, type_number)
        + encode_bytes(2, dimensions)
        + encode_number(4, offset)
        + encode_number(5, size)
        + encode_fixed32(6, mask(crc32c(data)))
        + slices
    )


ONE_FILE = encode_number(1, 1)


def write_bundle(prefix, records, data=b"", header=ONE_FILE):
    entries = [(b"", header), *sorted(records.items())]
    pathlib.Path(f"{prefix}.index").write_bytes(encode_table(entries))
    pathlib.Path(f"{prefix}.data-00000-of-00001").write_bytes(data)


def test_what_is_no_array_is_listed_and_refused_when_it_is_read(tmp_path):
    records = {b"r": record(20, ()), b"s": record(21, (2,), 0, 8), b"t": record(77, ())}
    write_bundle(tmp_path / "x", records, b"12345678")
    with tensorflow.open(tmp_path / "x") as checkpoint:
        assert checkpoint.describe() == "r (DT_RESOURCE) []\ns (DT_VARIANT) [2]\nt (DT_77) []"
        for name in checkpoint.leaves():
            with pytest.raises(jaxckpt.UnsupportedLeafError, match="which is no array") as caught:
                checkpoint[name][...]
            assert caught.value.problems[0].key == name


def test_a_checkpoint_that_needs_a_newer_reader_is_refused(tmp_path):
    versions = encode_number(1, 3) + encode_number(2, 2)
    write_bundle(tmp_path / "x", {}, header=ONE_FILE + encode_bytes(3, versions))
    with pytest.raises(jaxckpt.FormatError, match="needs a reader of version 2"):
        tensorflow.open(tmp_path / "x")


def test_names_that_are_no_utf_8(tmp_path):
    write_bundle(tmp_path / "x", {b"\xff\n": record(4, (1,), 0, 1, b"a")}, b"a")
    with tensorflow.open(tmp_path / "x") as checkpoint:
        assert checkpoint.keys() == ("\udcff\n",)
        assert checkpoint["\udcff\n"][...].tolist() == [97]
        assert str(checkpoint).isprintable()


# --- parts ------------------------------------------------------------------------------------------------------


def slow_crc32c(data, crc=0):
    crc ^= 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def test_the_checksum_is_crc_32c():
    # RFC 3720, appendix B.4.
    assert crc32c(b"") == 0
    assert crc32c(bytes(32)) == 0x8A9136AA
    assert crc32c(b"\xff" * 32) == 0x62A8AB43
    assert crc32c(bytes(range(32))) == 0x46DD794E
    message = np.random.default_rng(1).integers(0, 256, 60000, np.uint8).tobytes()
    for length in (1, 2, 3, 4, 5, 8, 63, 2391, 2392, 2393, 2400, 45479, 45481, 60000):
        assert crc32c(message[:length]) == slow_crc32c(message[:length]), length


def test_checksums_of_parts_add_up():
    message = np.random.default_rng(2).integers(0, 256, 1_000_003, np.uint8)
    whole = crc32c(message)
    for cuts in ([1], [3, 4], [2392], [262144, 700000], [500001, 500004, 999999], [0, 1_000_003]):
        crc = 0
        for part in np.split(message, cuts):
            crc = extend(crc, part)
        assert crc == whole, cuts
    assert crc32c(message[::-1].copy()) != whole
    assert unmask(mask(whole)) == whole
    assert mask(0) == 0xA282EAD8


@pytest.mark.parametrize("exponents", [(5685, 1362, 426), (299, 142, 134, 62, 21)])
def test_the_polynomial_divides_those_that_fold(exponents):
    remainders = [1]
    for _ in range(exponents[0]):
        doubled = remainders[-1] << 1
        remainders.append(doubled ^ 0x11EDC6F41 if doubled >> 32 else doubled)
    total = 1
    for exponent in exponents:
        total ^= remainders[exponent]
    assert total == 0


def test_snappy():
    def literal(data):
        return (
            bytes([len(data) - 1 << 2]) + data if len(data) <= 60 else b"\xf0" + bytes([len(data) - 1]) + data
        )

    def copy(offset, length):
        return bytes([length - 1 << 2 | 2]) + struct.pack("<H", offset)

    def packed(size, *parts):
        return memoryview(encode_varint(size) + b"".join(parts))

    assert decompress_snappy(packed(0)) == b""
    assert decompress_snappy(packed(3, literal(b"abc"))) == b"abc"
    assert decompress_snappy(packed(100, literal(bytes(range(100))))) == bytes(range(100))
    assert decompress_snappy(packed(9, literal(b"abc"), copy(3, 6))) == b"abcabcabc"
    assert decompress_snappy(packed(8, literal(b"abc"), copy(2, 5))) == b"abcbcbcb"
    assert decompress_snappy(packed(7, literal(b"abc"), b"\x01\x03")) == b"abcabca"
    assert decompress_snappy(packed(4, literal(b"abc"), b"\x03\x02\0\0\0")) == b"abcb"
    for damaged in (
        packed(4, literal(b"abc")),
        packed(2, literal(b"abc")),
        packed(6, literal(b"abc"), copy(4, 3)),
        packed(6, literal(b"abc"), copy(0, 3)),
        packed(6, literal(b"abc"), copy(3, 3)[:2]),
        packed(1 << 40, literal(b"abc")),
        packed(3, literal(b"abc")[:-1]),
        packed(70, b"\xf4\x40"),
        memoryview(b""),
    ):
        with pytest.raises(WireError):
            decompress_snappy(damaged)


def test_keys_of_slices():
    assert slice_key(b"emb/cols", ((0, 3), (4, 4))) == b"\0emb/cols\0\1\1\2\x80\x83\x84\x84"
    assert slice_key(b"s", ()) == b"\0s\0\1\0"
    assert slice_key(b"\0\xff", ((0, -1),)) == b"\0\0\xff\xff\0\0\1\1\1\x80\x7f"
    # Byte order is the order of the values.
    starts = [0, 1, 63, 64, 65, 8191, 8192, 1 << 20, 1 << 40, 1 << 62]
    keys = [slice_key(b"s", ((start, 1),)) for start in starts]
    assert sorted(keys) == keys
    assert len(set(keys)) == len(keys)


@pytest.mark.slow
def test_reading_needs_numpy_alone():
    run_program(
        """
        import sys
        from jaxckpt.interop import tensorflow
        with tensorflow.open(sys.argv[1]) as checkpoint:
            assert all(checkpoint[name][...] is not None for name in checkpoint.keys())
        packages = {name.partition(".")[0] for name in sys.modules}
        assert packages & {"tensorflow", "google", "tensorstore", "snappy", "crc32c", "google_crc32c"} == set()
        """,
        FIXTURES / "v2_dtypes",
    )
