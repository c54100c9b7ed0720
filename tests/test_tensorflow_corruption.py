"""Damaged and hostile TensorFlow checkpoints: found, named, and never a crash or more memory than the files justify."""

from __future__ import annotations

import json
import pathlib
import random
import shutil
import tracemalloc

import numpy as np
import pytest

import jaxckpt
from jaxckpt.interop import tensorflow
from jaxckpt.interop._crc import crc32c, mask
from jaxckpt.interop._partitions import slice_key, whole_extents
from jaxckpt.interop._protobuf import encode_bytes, encode_fixed32, encode_number, encode_varint
from jaxckpt.interop._sstable import encode_table

FIXTURES = pathlib.Path(__file__).resolve().parent / "tensorflow"

# Small ones of each format and kind; every byte of every file is read.
FOLDERS = (
    "v1_saver",
    "v1_sharded",
    "v2_dtypes",
    "v2_partitioned",
    "tf2_object_slots",
    "tf2_maxshard",
    "synthetic_v2_bigendian",
)
TRIALS = 60


def copy_fixture(folder, directory):
    """A copy of the files of a checkpoint; its path, and the files."""
    prefix = json.loads((FIXTURES / folder / "expected.json").read_text())["prefix"]
    files = []
    for path in sorted((FIXTURES / folder).iterdir()):
        if path.name.startswith(prefix.partition("-?????")[0]):
            shutil.copy(path, directory)
            files.append(directory / path.name)
    assert files
    return directory / prefix, files


def read_everything(path):
    """All tensors, whole, and some as streams; nothing is kept."""
    with tensorflow.open(path) as checkpoint:
        for name, leaf in checkpoint.leaves().items():
            checkpoint[name][...]
            if leaf.dtype is not None:
                checkpoint.stream(name, 0, leaf.nbytes)


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_flipped_bit_is_found(folder, tmp_path):
    prefix, files = copy_fixture(folder, tmp_path)
    read_everything(prefix)
    chance = random.Random(f"flips of {folder}")
    sizes = [path.stat().st_size for path in files]
    for _ in range(TRIALS):
        path = chance.choices(files, sizes)[0]
        content = path.read_bytes()
        place = chance.randrange(len(content))
        damaged = bytearray(content)
        damaged[place] ^= 1 << chance.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(jaxckpt.CorruptError) as caught:
            read_everything(prefix)  # with byte `place` of `path` changed
        assert caught.value.problems
        assert str(tmp_path) in str(caught.value)
        path.write_bytes(content)
    read_everything(prefix)


@pytest.mark.parametrize("folder", ["v1_sharded", "v2_partitioned"])
def test_every_bit_of_a_footer_counts(folder, tmp_path):
    prefix, files = copy_fixture(folder, tmp_path)
    table = next(path for path in files if path.suffix == ".index" or folder.startswith("v1"))
    content = table.read_bytes()
    for place in range(len(content) - 60, len(content)):
        for bit in range(8):
            damaged = bytearray(content)
            damaged[place] ^= 1 << bit
            table.write_bytes(damaged)
            with pytest.raises(jaxckpt.CorruptError):
                tensorflow.open(prefix)


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_truncation_is_found(folder, tmp_path):
    prefix, files = copy_fixture(folder, tmp_path)
    chance = random.Random(f"truncations of {folder}")
    for path in files:
        content = path.read_bytes()
        lengths = {0, 1, 47, 48, len(content) - 1, *(chance.randrange(len(content)) for _ in range(10))}
        for length in lengths:
            if not 0 <= length < len(content):
                continue
            path.write_bytes(content[:length])
            with pytest.raises(jaxckpt.CorruptError):
                read_everything(prefix)
        path.write_bytes(content)


def test_a_table_whose_index_names_a_block_twice_is_refused(tmp_path):
    prefix, files = copy_fixture("v2_partitioned", tmp_path)
    index = next(path for path in files if path.suffix == ".index")
    content = index.read_bytes()
    read_everything(prefix)
    block = content[: content.index(b"\0\0\0\0\1\0\0\0")]
    index.write_bytes(table_of_block(block, b"zz", times=2))
    with pytest.raises(jaxckpt.CorruptError, match="has a block at byte 0 instead of"):
        tensorflow.open(prefix)
    index.write_bytes(table_of_block(block, b"zz"))
    read_everything(prefix)


def test_bytes_behind_a_table_are_found(tmp_path):
    prefix, files = copy_fixture("v2_partitioned", tmp_path)
    index = next(path for path in files if path.suffix == ".index")
    content = index.read_bytes()
    index.write_bytes(content + b"\0")
    with pytest.raises(jaxckpt.CorruptError, match="does not end as a table does"):
        tensorflow.open(prefix)
    index.write_bytes(content[:-48] + b"\0" + content[-48:])
    with pytest.raises(jaxckpt.CorruptError, match="has blocks up to byte"):
        tensorflow.open(prefix)


# --- hostile records, with right checksums ----------------------------------------------------------------------


def encode_record(type_number, shape, *, offset=0, size=0, data=b"", shard=0, slices=()):
    dimensions = b"".join(encode_bytes(2, encode_number(1, length)) for length in shape)
    message = encode_number(1, type_number) + encode_bytes(2, dimensions) + encode_number(3, shard)
    message += encode_number(4, offset) + encode_number(5, size) + encode_fixed32(6, mask(crc32c(data)))
    for extents in slices:
        parts = [encode_number(1, start) + encode_number(2, length) for start, length in extents]
        message += encode_bytes(7, b"".join(encode_bytes(1, part) for part in parts))
    return message


def write_bundle(directory, records, data=b""):
    header = encode_number(1, 1)
    (directory / "x.index").write_bytes(encode_table([(b"", header), *sorted(records.items())]))
    (directory / "x.data-00000-of-00001").write_bytes(data)
    return directory / "x"


def peak_bytes(function):
    """Memory that a failing read took at most."""
    tracemalloc.start()
    try:
        with pytest.raises(jaxckpt.CorruptError):
            function()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


HUGE = 1 << 40


@pytest.mark.parametrize(
    "records",
    [
        {b"w": encode_record(1, (HUGE,), size=4 * HUGE)},
        {b"w": encode_record(1, (1 << 62, 8), size=32)},
        {b"w": encode_record(1, (0, 1 << 62), size=0)},
        {b"w": encode_record(1, (-1,), size=4)},
        {b"w": encode_record(1, (1,) * 200, size=4)},
        {b"w": encode_record(1, (2,), size=4)},
        {b"w": encode_record(1, (1,), size=4, offset=-4)},
        {b"w": encode_record(1, (1,), size=4, shard=1)},
        {b"w": encode_record(1, (1,), size=4, shard=-1)},
        {b"w": encode_record(1, (1,), size=4, offset=HUGE)},
        {b"w": encode_record(7, (HUGE,), size=16)},
        {b"w": encode_record(7, (HUGE,), size=HUGE + 4)},
        {
            b"v": encode_record(4, (8,), size=8, data=bytes(8)),
            b"w": encode_record(4, (8,), size=8, offset=7, data=bytes(8)),
        },
        {b"w": b"\xff" * 12},
        {b"w": encode_bytes(1, b"x")},
        {b"w": encode_number(2, 4)},
        {b"w": encode_record(1, (HUGE,), slices=[((0, HUGE // 2),), ((HUGE // 2, HUGE // 2),)])},
        {b"w": encode_record(1, (HUGE,), slices=[((0, HUGE),)])},
        {b"w": encode_record(1, (4,), slices=[((2, 4),)])},
        {b"w": encode_record(1, (4,), slices=[((0, 2), (0, 1))])},
        {b"w": encode_record(1, (4,), slices=[((-1, 2),)])},
    ],
    ids=lambda records: "",
)
def test_impossible_records_take_no_memory(records, tmp_path):
    prefix = write_bundle(tmp_path, records, bytes(16))
    assert peak_bytes(lambda: read_everything(prefix)) < 1 << 20


def slices_of(name, shape, extents, data):
    """Records of a partitioned tensor of bytes."""
    records = {name: encode_record(4, shape, slices=extents)}
    offset = 0
    for part in extents:
        size = int(np.prod([length for _, length in part]))
        piece = data[offset : offset + size]
        sizes = [length for _, length in part]
        records[slice_key(name, part)] = encode_record(4, sizes, offset=offset, size=size, data=piece)
        offset += size
    return records


def test_slices_must_have_each_element_once(tmp_path):
    data = bytes(range(16))
    whole = slices_of(b"w", (4, 4), [((0, 2), (0, 4)), ((2, 2), (0, 4))], data)
    prefix = write_bundle(tmp_path, whole, data)
    assert tensorflow.open(prefix)["w"][...].tobytes() == data
    twice = slices_of(b"w", (4, 4), [((0, 2), (0, 4)), ((1, 2), (0, 4))], data)
    prefix = write_bundle(tmp_path, twice, data)
    for index in (..., slice(0, 1)):
        with pytest.raises(jaxckpt.CorruptError, match="elements of w are stored twice"):
            tensorflow.open(prefix)["w"][index]
    hole = slices_of(b"w", (4, 4), [((0, 2), (0, 4)), ((2, 2), (0, 3))], data)
    prefix = write_bundle(tmp_path, hole, data)
    assert tensorflow.open(prefix)["w"][:2].tobytes() == data[:8]
    with pytest.raises(jaxckpt.CorruptError, match="elements of w are in none of its slices"):
        tensorflow.open(prefix)["w"][...]
    with tensorflow.open(prefix) as checkpoint, pytest.raises(jaxckpt.CorruptError, match="in none of"):
        checkpoint.stream("w", 0, 16)


def test_slices_must_be_what_their_tensor_says(tmp_path):
    data = bytes(range(16))
    records = slices_of(b"w", (4, 4), [((0, 2), (0, 4)), ((2, 2), (0, 4))], data)
    missing = dict(sorted(records.items())[1:])
    with pytest.raises(jaxckpt.CorruptError, match="has no record for slice 0 of w"):
        tensorflow.open(write_bundle(tmp_path, missing, data))["w"][...]
    records[slice_key(b"w", ((2, 2), (0, 4)))] = encode_record(4, (4, 2), offset=8, size=8, data=data[8:])
    with pytest.raises(jaxckpt.CorruptError, match="has another shape or type for slice 1 of w"):
        tensorflow.open(write_bundle(tmp_path, records, data))["w"][...]


@pytest.mark.parametrize(
    "data",
    [
        encode_varint(HUGE) + bytes(12),
        b"\xff" * 16,
        b"\x05" + (mask(crc32c(b"\x05\0\0\0"))).to_bytes(4, "little") + b"abcdefghijk",
        b"\x80" * 16,
    ],
)
def test_impossible_strings_take_no_memory(data, tmp_path):
    prefix = write_bundle(tmp_path, {b"s": encode_record(7, (), size=len(data), data=data)}, data)
    assert peak_bytes(lambda: read_everything(prefix)) < 1 << 20


def old_table(shape, values, *, type_number=1, field=5, extents=None):
    """The bytes of a V1 checkpoint with one tensor, of which it has a slice or all."""
    extents = extents or whole_extents(len(shape))
    dimensions = b"".join(encode_bytes(2, encode_number(1, length)) for length in shape)
    parts = [b"" if size < 0 else encode_number(1, start) + encode_number(2, size) for start, size in extents]
    extent_messages = b"".join(encode_bytes(1, part) for part in parts)
    tensor = encode_bytes(1, b"w") + encode_bytes(2, dimensions) + encode_number(3, type_number)
    tensor += encode_bytes(4, extent_messages)
    values = encode_bytes(3, encode_bytes(field, values))
    records = [
        (b"", encode_bytes(1, encode_bytes(1, tensor))),
        (slice_key(b"w", extents), encode_bytes(2, encode_bytes(1, b"w") + values)),
    ]
    return encode_table(records)


def test_an_old_checkpoint_that_is_made_by_hand_is_read(tmp_path):
    (tmp_path / "v").write_bytes(old_table((2,), np.array([1, 2], np.float32).tobytes()))
    assert tensorflow.open(tmp_path / "v")["w"][...].tolist() == [1, 2]
    numbers = b"".join(map(encode_varint, (5, -1, -(1 << 31))))
    (tmp_path / "v").write_bytes(old_table((3,), numbers, type_number=3, field=7))
    assert tensorflow.open(tmp_path / "v")["w"][...].tolist() == [5, -1, -(1 << 31)]


@pytest.mark.parametrize(
    ("shape", "values", "type_number", "field"),
    [
        ((HUGE,), b"", 1, 5),
        ((3,), bytes(8), 1, 5),
        ((100,), bytes(8), 1, 5),
        ((3,), bytes(16), 1, 5),
        ((2,), b"", 1, 5),
        ((2,), b"\x01", 3, 7),
        ((2,), b"\x01\x02\x03", 3, 7),
        ((2,), b"\x01\x80", 3, 7),
        ((1,), b"\x80", 3, 7),
        ((1,), b"\x80" * 10 + b"\x01", 9, 10),
        ((1,), bytes(4), 7, 5),
        ((HUGE,), b"abc", 7, 8),
    ],
)
def test_impossible_values_of_old_checkpoints_take_no_memory(shape, values, type_number, field, tmp_path):
    (tmp_path / "v").write_bytes(old_table(shape, values, type_number=type_number, field=field))
    assert peak_bytes(lambda: read_everything(tmp_path / "v")) < 1 << 20


def test_an_old_checkpoint_of_which_slices_are_missing_takes_no_memory(tmp_path):
    (tmp_path / "v").write_bytes(old_table((HUGE,), bytes(8), extents=((0, 2),)))
    assert tensorflow.open(tmp_path / "v")["w"][:2].tolist() == [0, 0]
    assert peak_bytes(lambda: tensorflow.open(tmp_path / "v")["w"][:4]) < 1 << 20
    (tmp_path / "v").write_bytes(old_table((HUGE, 2), bytes(8), extents=((0, HUGE), (0, 1))))
    assert peak_bytes(lambda: tensorflow.open(tmp_path / "v")["w"][:, :1]) < 1 << 20


def test_numbers_that_lie_across_the_pieces_in_which_they_are_decoded(tmp_path):
    values = np.random.default_rng(3).integers(-(1 << 31), 1 << 31, 1 << 18)
    values[::3] %= 100
    packed = b"".join(map(encode_varint, values.tolist()))
    assert len(packed) > 1 << 20
    (tmp_path / "v").write_bytes(old_table(values.shape, packed, type_number=9, field=10))
    assert np.array_equal(tensorflow.open(tmp_path / "v")["w"][...], values)


def test_keys_that_grow_without_bound_are_refused(tmp_path):
    # Each entry adds one byte to a key of the one before: the keys take the square of the file's bytes.
    key = b"k" * 20000
    entries = [(b"", encode_number(1, 1))]
    entries += [(key + b"x" * place, b"") for place in range(1, 3000)]
    block = bytearray()
    last = b""
    for entry_key, value in entries:
        shared = len(last) if entry_key.startswith(last) else 0
        rest = entry_key[shared:]
        block += encode_varint(shared) + encode_varint(len(rest)) + encode_varint(len(value)) + rest + value
        last = entry_key
    (tmp_path / "x.index").write_bytes(table_of_block(bytes(block), last))
    assert peak_bytes(lambda: tensorflow.open(tmp_path / "x")) < 16 << 20


def table_of_block(entries, last_key, *, times=1):
    """A table of one block, which its index names once or several times."""
    file = bytearray()

    def append(contents):
        handle = encode_varint(len(file)) + encode_varint(len(contents))
        checked = contents + b"\0"
        file.extend(checked + mask(crc32c(checked)).to_bytes(4, "little"))
        return handle

    ending = bytes(4) + (1).to_bytes(4, "little")
    handle = append(entries + ending)
    metaindex = append(ending)
    keys = [last_key + b"z" * number for number in range(times)]
    named = [b"\0" + encode_varint(len(key)) + encode_varint(len(handle)) + key + handle for key in keys]
    index = append(b"".join(named) + ending)
    footer = (metaindex + index).ljust(40, b"\0") + bytes.fromhex("57fb808b247547db")
    return bytes(file) + footer


def test_random_tables_with_right_checksums_are_refused(tmp_path):
    chance = random.Random(11)
    for _ in range(300):
        length = chance.randrange(60)
        block = bytes(chance.choice((0, 0, 1, 2, 5, 127, 128, 255)) for _ in range(length))
        (tmp_path / "x.index").write_bytes(table_of_block(block, b"zz"))
        (tmp_path / "v").write_bytes(table_of_block(block, b"zz"))
        for name in ("x", "v"):
            try:
                read_everything(tmp_path / name)
            except jaxckpt.CheckpointError as error:
                assert str(tmp_path) in str(error)  # noqa: PT017
