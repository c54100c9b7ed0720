"""Makes the hostile manifests of this folder: ``python -m tests.attacks.generate`` writes one file for each.

Each is a valid manifest with one lie in it, and, where a lie is about the payload, with the right checksum of that, so
that nothing but validation stands between it and the reader. `base_fields` is the honest one, and `write_honest`
makes the whole checkpoint that belongs to it: all its arrays are zeros.
"""

from __future__ import annotations

import pathlib
import struct
from collections.abc import Callable
from typing import Any

import msgpack
import xxhash

FOLDER = pathlib.Path(__file__).resolve().parent
DATA = "data-00ff"
GROUP = b'{"zarr_format": 3, "node_type": "group", "attributes": {}}'
# Stored lengths of the chunks: five in the pack, one on its own.
LENGTHS = [64, 64, 64, 64, 4096 - 4 * 64, 4096]

Fields = dict[str, Any]


def digest(data: bytes) -> bytes:
    """The checksum of the format."""
    return xxhash.xxh3_128_digest(data)


def frame(payload: bytes) -> bytes:
    """A manifest object with the right checksum of a payload."""
    return msgpack.packb(["jaxckpt", digest(payload), payload])


def pack(fields: Any) -> bytes:
    """A manifest object that says this."""
    return frame(msgpack.packb(fields, unicode_errors="surrogatepass"))


def base_fields() -> Fields:
    """What an honest manifest says."""
    named = {
        "type": "named",
        "axes": [["x", 2]],
        "axis_types": ["Auto"],
        "spec": [["x"], None],
        "memory_kind": None,
        "device_ids": [0, 1],
    }
    single = {"type": "single", "device_id": 0, "memory_kind": None}
    flags = {"weak_type": False, "committed": True}
    sharded = {
        "kind": "array",
        "dtype": "float32",
        "shape": [4, 4],
        "chunk_shape": [2, 4],
        **flags,
        "sharding": 0,
    }
    keys = {"kind": "key", "dtype": "uint32", "shape": [2], "chunk_shape": [2], **flags, "sharding": 1}
    whole = {
        "kind": "array",
        "dtype": "float32",
        "shape": [1024],
        "chunk_shape": [1024],
        **flags,
        "sharding": 1,
    }
    return {
        "format": 1,
        "min_reader": 1,
        "min_writer": 1,
        "features": [],
        "writer": {"jaxckpt": "0.1"},
        "created_s": 1.5,
        "data": DATA,
        "metadata": None,
        "block_bytes": 1 << 20,
        "checksum": "xxh3-128",
        "tree": [["dict", ["a", "k", "n", "s", "v", "w"]], 0, 0, 0, 0, 0, 0],
        "keys": ["a", "k", "n", "s", "v", "w"],
        "specs": [
            sharded,
            {**keys, "impl": "threefry2x32"},
            {"kind": "numpy", "dtype": "int16", "shape": [3], "chunk_shape": [3], "order": "C"},
            {"kind": "str", "dtype": "uint8", "shape": [5], "chunk_shape": [5]},
            {"kind": "value"},
            whole,
        ],
        "spec_index": struct.pack("<6I", 0, 1, 2, 3, 4, 5),
        "values": [[4, ["int", "0x7"]]],
        "shardings": [named, single],
        "directories": [[5, "arrays/w"]],
        "packs": [4096],
        "chunk_pack": struct.pack("<6i", 0, 0, 0, 0, 0, -1),
        "chunk_offset": struct.pack("<6Q", 0, 64, 128, 192, 256, 0),
        "chunk_length": struct.pack("<6Q", *LENGTHS),
        "checksums": b"".join(digest(bytes(length)) for length in LENGTHS),
        "objects": [["zarr.json", len(GROUP), digest(GROUP)]],
    }


def write_honest(folder: pathlib.Path) -> None:
    """The whole checkpoint of `base_fields`."""
    (folder / DATA / "packs").mkdir(parents=True)
    (folder / DATA / "arrays" / "w").mkdir(parents=True)
    (folder / DATA / "packs" / "0-0").write_bytes(bytes(4096))
    (folder / DATA / "arrays" / "w" / "c.0").write_bytes(bytes(4096))
    (folder / "zarr.json").write_bytes(GROUP)
    (folder / "manifest.msgpack").write_bytes(pack(base_fields()))


# --- the attacks ----------------------------------------------------------------------------------------------

ATTACKS: dict[str, Callable[[Fields], bytes]] = {}


def attack(make: Callable[[Fields], bytes | None]) -> Callable[[Fields], bytes | None]:
    """Registers a function that changes honest fields, or returns the bytes of another manifest."""

    def build(fields: Fields) -> bytes:
        return make(fields) or pack(fields)

    ATTACKS[make.__name__] = build
    return make


def of_two_processes(fields: Fields) -> None:
    """Makes of the manifest that of a checkpoint which two processes wrote, with a part of each."""
    fields.update(
        features=["parts"],
        parts=[[300, bytes(16), 1, 4096], [300, bytes(16), 2, 8192]],
        owners=[struct.pack("<2H", 0, 1), struct.pack("<H", 1)],
        owner_index=struct.pack("<6i", 0, 1, 1, 1, -1, 1),
        packs=[],
        chunk_pack=b"",
        chunk_offset=b"",
        chunk_length=b"",
        checksums=b"",
    )


def of_process_0_alone(fields: Fields) -> None:
    """Makes of the manifest that of what process 0 of two kept for itself; the whole of it, as it happens."""
    fields.update(
        features=["local"],
        local=[0, 2],
        owners=[bytes(4), bytes(2)],
        owner_index=struct.pack("<6i", 0, 1, 1, 1, -1, 1),
    )


def one_leaf(fields: Fields, spec: Fields, **more: Any) -> None:
    """Reduces the manifest to one leaf without chunks, of this spec."""
    fields.update(
        tree=[0],
        keys=[""],
        specs=[spec],
        spec_index=bytes(4),
        values=[],
        directories=[],
        packs=[],
        chunk_pack=b"",
        chunk_offset=b"",
        chunk_length=b"",
        checksums=b"",
    )
    fields.update(more)


@attack
def shape_of_2_to_the_62(fields: Fields) -> None:
    fields["specs"][0]["shape"] = [2**62, 4]


@attack
def shape_whose_product_wraps_to_0(fields: Fields) -> None:
    fields["specs"][0]["shape"] = [2**32, 2**32]
    fields["specs"][0]["chunk_shape"] = [2**32, 2**32]


@attack
def grid_whose_product_wraps_to_2(fields: Fields) -> None:
    fields["specs"][0]["shape"] = [2**62 + 1, 2**62 + 1, 2**62 + 2]
    fields["specs"][0]["chunk_shape"] = [1, 1, 1]


@attack
def chunk_of_a_petabyte(fields: Fields) -> None:
    fields["specs"][5]["shape"] = fields["specs"][5]["chunk_shape"] = [2**48]
    fields["chunk_length"] = struct.pack("<6Q", *LENGTHS[:5], 2**50)


@attack
def empty_array_too_large_for_numpy(fields: Fields) -> None:
    one_leaf(
        fields,
        {
            "kind": "numpy",
            "dtype": "uint8",
            "shape": [2**62, 2**62, 0],
            "chunk_shape": [1, 1, 1],
            "order": "C",
        },
    )


@attack
def unused_spec_with_many_chunks(fields: Fields) -> None:
    fields["specs"].append({**fields["specs"][0], "shape": [2**62, 2**62], "chunk_shape": [1, 1]})


@attack
def array_of_a_million_axes(fields: Fields) -> None:
    fields["specs"][0]["shape"] = fields["specs"][0]["chunk_shape"] = [2**62] * 100_000


@attack
def chunk_shape_of_zero(fields: Fields) -> None:
    fields["specs"][0]["chunk_shape"] = [0, 4]


@attack
def negative_size(fields: Fields) -> None:
    fields["specs"][0]["shape"] = [-4, 4]


@attack
def chunk_shape_that_does_not_divide(fields: Fields) -> None:
    fields["specs"][0]["chunk_shape"] = [3, 4]


@attack
def chunk_longer_than_its_shape(fields: Fields) -> None:
    fields["chunk_length"] = struct.pack("<6Q", *LENGTHS[:5], 8192)


@attack
def overlapping_chunks(fields: Fields) -> None:
    fields["chunk_offset"] = struct.pack("<6Q", 0, 0, 128, 192, 256, 0)


@attack
def hole_between_chunks(fields: Fields) -> None:
    fields["chunk_offset"] = struct.pack("<6Q", 0, 64, 128, 192, 320, 0)
    fields["packs"] = [4160]


@attack
def chunk_beyond_its_pack(fields: Fields) -> None:
    fields["packs"] = [2048]


@attack
def pack_with_room_after_its_chunks(fields: Fields) -> None:
    fields["packs"] = [2**40]


@attack
def chunk_offset_that_wraps(fields: Fields) -> None:
    fields["chunk_offset"] = struct.pack("<6Q", 0, 2**64 - 64, 128, 192, 256, 0)


@attack
def chunk_at_an_odd_offset(fields: Fields) -> None:
    fields["chunk_offset"] = struct.pack("<6Q", 0, 63, 128, 192, 256, 0)


@attack
def chunk_in_a_pack_that_is_not_there(fields: Fields) -> None:
    fields["chunk_pack"] = struct.pack("<6i", 0, 0, 0, 0, 7, -1)


@attack
def chunk_in_a_negative_pack(fields: Fields) -> None:
    fields["chunk_pack"] = struct.pack("<6i", 0, 0, 0, 0, -2, -1)


@attack
def own_object_at_an_offset(fields: Fields) -> None:
    fields["chunk_offset"] = struct.pack("<6Q", 0, 64, 128, 192, 256, 64)


@attack
def pack_without_chunks(fields: Fields) -> None:
    fields["packs"] = [4096, 2**40]


@attack
def too_few_checksums(fields: Fields) -> None:
    fields["checksums"] = fields["checksums"][:-16]


@attack
def too_many_checksums(fields: Fields) -> None:
    fields["checksums"] += bytes(16)


@attack
def leaf_of_a_spec_that_is_not_there(fields: Fields) -> None:
    fields["spec_index"] = struct.pack("<6I", 0, 1, 2, 3, 4, 6)


@attack
def data_directory_above(fields: Fields) -> None:
    fields["data"] = "data-../.."


@attack
def absolute_data_directory(fields: Fields) -> None:
    fields["data"] = "/etc"


@attack
def directory_above(fields: Fields) -> None:
    fields["directories"] = [[5, "../../etc"]]


@attack
def absolute_directory(fields: Fields) -> None:
    fields["directories"] = [[5, "/etc"]]


@attack
def directory_with_a_nul(fields: Fields) -> None:
    fields["directories"] = [[5, "arrays/\0w"]]


@attack
def directory_that_is_no_unicode(fields: Fields) -> None:
    fields["directories"] = [[5, "arrays/\ud800"]]


@attack
def directory_of_no_leaf(fields: Fields) -> None:
    fields["directories"] = [[5, "arrays/w"], [6, "arrays/x"]]


@attack
def directory_given_twice(fields: Fields) -> None:
    fields["directories"] = [[5, "arrays/w"], [5, "arrays/x"]]


@attack
def chunks_without_a_directory(fields: Fields) -> None:
    fields["directories"] = []


@attack
def object_above(fields: Fields) -> None:
    fields["objects"] = [["../../../etc/passwd", 3, bytes(16)]]


@attack
def absolute_object(fields: Fields) -> None:
    fields["objects"] = [["/etc/passwd", 3, bytes(16)]]


@attack
def object_of_an_exabyte(fields: Fields) -> None:
    fields["objects"] = [["zarr.json", 2**60, bytes(16)]]


@attack
def structure_with_a_leaf_too_many(fields: Fields) -> None:
    fields["tree"].append(0)


@attack
def structure_with_a_leaf_too_few(fields: Fields) -> None:
    fields["tree"].pop()


@attack
def structure_that_claims_many_children(fields: Fields) -> None:
    fields["tree"] = [["list", 2**62], 0, 0, 0, 0, 0, 0]


@attack
def structure_with_a_reference(fields: Fields) -> None:
    """The nearest thing to a cycle: the format has no references, so that there is no word for it."""
    fields["tree"][1] = ["reference", 0]


@attack
def structure_100000_deep(fields: Fields) -> None:
    fields["tree"] = [["list", 1]] * 100_000 + [0]


@attack
def structure_with_a_key_twice(fields: Fields) -> None:
    fields["tree"][0] = ["dict", ["a", "a", "n", "s", "v", "w"]]


@attack
def structure_with_a_nested_json_key(fields: Fields) -> None:
    fields["tree"][0] = ["dict", [["[" * 100_000], "k", "n", "s", "v", "w"]]


@attack
def keys_of_another_structure(fields: Fields) -> None:
    fields["keys"] = ["a", "k", "n", "s", "w", "v"]


@attack
def long_name_above_many_leaves(fields: Fields) -> None:
    """The keys of all leaves would take 5 GB, and the list of keys in the manifest takes 20 kB."""
    count = 20_000
    fields["tree"] = [["dict", ["x" * 250_000]], ["list", count], *[0] * count]
    fields["keys"] = [""] * count


@attack
def long_name_above_many_empty_nodes(fields: Fields) -> None:
    count = 20_000
    fields["tree"] = [["dict", ["x" * 250_000]], ["list", count], *[["list", 0]] * count]


@attack
def nested_msgpack(_fields: Fields) -> bytes:
    return frame(b"\x91" * 100_000 + b"\xc0")


@attack
def nested_msgpack_in_the_metadata(fields: Fields) -> bytes:
    payload = msgpack.packb({**fields, "metadata": "HERE"})
    return frame(payload.replace(b"\xa4HERE", b"\x81\xa1a" * 5000 + b"\xc0"))


@attack
def list_of_four_billion(fields: Fields) -> bytes:
    payload = msgpack.packb({**fields, "keys": "HERE"})
    return frame(payload.replace(b"\xa4HERE", b"\xdd\xff\xff\xff\xff"))


@attack
def map_of_four_billion(_fields: Fields) -> bytes:
    return frame(b"\xdf\xff\xff\xff\xff\xa1a\x01")


@attack
def text_of_four_gigabytes(_fields: Fields) -> bytes:
    return frame(b"\x81\xdb\xff\xff\xff\xffabc")


@attack
def lists_that_each_claim_the_whole_rest(_fields: Fields) -> bytes:
    """Each claims no more elements than the payload has bytes; together they would take a terabyte."""
    filler = 250_000
    return frame(b"\x81\xa1a" + (b"\xdd" + struct.pack(">I", filler)) * 500 + bytes(filler))


@attack
def frame_that_claims_four_billion(_fields: Fields) -> bytes:
    return b"\xdd\xff\xff\xff\xff\xa7jaxckpt"


@attack
def nested_frame(_fields: Fields) -> bytes:
    return b"\x91" * 100_000 + b"\xc0"


@attack
def frame_in_a_longer_encoding(fields: Fields) -> bytes:
    return b"\xdc\x00\x03" + pack(fields)[1:]


@attack
def wrong_checksum(fields: Fields) -> bytes:
    payload = msgpack.packb(fields)
    return msgpack.packb(["jaxckpt", bytes(16), payload])


@attack
def payload_that_is_a_list(_fields: Fields) -> bytes:
    return pack([1, 2, 3])


@attack
def payload_with_keys_that_are_lists(_fields: Fields) -> bytes:
    return frame(b"\x81\x90\x01")


@attack
def payload_with_keys_that_are_numbers(_fields: Fields) -> bytes:
    return pack({1: 2})


@attack
def payload_with_a_broken_timestamp(_fields: Fields) -> bytes:
    return frame(b"\x81\xa1a\xc7\x05\xffabcde")


@attack
def mesh_of_2_to_the_62(fields: Fields) -> None:
    fields["shardings"][0]["axes"] = [["x", 2**62]]


@attack
def mesh_of_many_axes(fields: Fields) -> None:
    fields["shardings"][0]["axes"] = [[f"a{number}", 2**62] for number in range(20_000)] + [["x", 2]]
    fields["shardings"][0]["axis_types"] = ["Auto"] * 20_001
    fields["shardings"][0]["device_ids"] = None


@attack
def mesh_with_more_axes_than_numpy_has(fields: Fields) -> None:
    fields["shardings"][0]["axes"] = [["x", 2], *([f"a{number}", 1] for number in range(80))]
    fields["shardings"][0]["axis_types"] = ["Auto"] * 81


@attack
def mesh_with_a_device_twice(fields: Fields) -> None:
    fields["shardings"][0]["device_ids"] = [0, 0]


@attack
def mesh_with_an_axis_twice(fields: Fields) -> None:
    fields["shardings"][0]["axes"] = [["x", 2], ["x", 1]]
    fields["shardings"][0]["axis_types"] = ["Auto", "Auto"]


@attack
def mesh_axis_of_zero(fields: Fields) -> None:
    fields["shardings"][0]["axes"] = [["x", 0]]
    fields["shardings"][0]["device_ids"] = []


@attack
def partition_over_an_axis_that_is_not_there(fields: Fields) -> None:
    fields["shardings"][0]["spec"] = [["y"], None]


@attack
def partition_over_an_axis_twice(fields: Fields) -> None:
    fields["shardings"][0]["spec"] = [["x"], ["x"]]


@attack
def sharding_without_memory_kind(fields: Fields) -> None:
    del fields["shardings"][0]["memory_kind"]


@attack
def sharding_of_unknown_type(fields: Fields) -> None:
    fields["shardings"][0]["type"] = "pickle"


@attack
def dtype_of_objects(fields: Fields) -> None:
    fields["specs"][2]["dtype"] = "O"


@attack
def dtype_of_a_terabyte(fields: Fields) -> None:
    fields["specs"][2]["dtype"] = "V999999999999"


@attack
def dtype_of_two_gigabytes(fields: Fields) -> None:
    fields["specs"][2]["dtype"] = "V2147483647"


@attack
def dtype_that_is_deeply_nested(fields: Fields) -> bytes:
    payload = msgpack.packb({**fields, "specs": [{**fields["specs"][2], "dtype": "HERE"}]})
    return frame(payload.replace(b"\xa4HERE", b"\x91\x92\xa1a" * 400 + b"\xa2i4"))


@attack
def dtype_with_objects_inside(fields: Fields) -> None:
    fields["specs"][2]["dtype"] = [["a", "<i4"], ["b", [["c", "|O"]]]]


@attack
def dtype_with_a_huge_array_inside(fields: Fields) -> None:
    fields["specs"][2]["dtype"] = [["a", "<i4", [2**31 - 1, 2**31 - 1]]]


@attack
def dtype_that_is_an_array(fields: Fields) -> None:
    fields["specs"][2] |= {"dtype": ["<i2", [3]], "shape": [1], "chunk_shape": [1, 6]}


@attack
def dtype_with_a_field_twice(fields: Fields) -> None:
    fields["specs"][2]["dtype"] = [["a", "<i4"], ["a", "<i4"]]


@attack
def array_of_a_dtype_that_jax_lacks(fields: Fields) -> None:
    fields["specs"][0] |= {"dtype": "<U4", "chunk_shape": [2, 4, 16], "shape": [4, 4]}


@attack
def keys_of_an_unknown_implementation(fields: Fields) -> None:
    """This one opens, since a program may register implementations of its own; a restore refuses it."""
    fields["specs"][1]["impl"] = "os.system"


@attack
def keys_with_too_much_data(fields: Fields) -> None:
    """This one opens too: how much data a key has is known to its implementation only."""
    fields["specs"][1] |= {"shape": [3], "chunk_shape": [3]}


@attack
def keys_without_implementation(fields: Fields) -> None:
    fields["specs"][1]["impl"] = None


@attack
def value_that_is_no_number(fields: Fields) -> None:
    fields["values"] = [[4, ["int", "import os"]]]


@attack
def value_written_otherwise(fields: Fields) -> None:
    fields["values"] = [[4, ["int", " 0X_7"]]]


@attack
def float_of_three_bytes(fields: Fields) -> None:
    fields["values"] = [[4, ["float", b"abc"]]]


@attack
def scalar_of_objects(fields: Fields) -> None:
    fields["values"] = [[4, ["numpy", "O", bytes(8)]]]


@attack
def scalar_of_a_gigabyte(fields: Fields) -> None:
    fields["values"] = [[4, ["numpy", "V1073741824", b"a"]]]


@attack
def value_of_unknown_type(fields: Fields) -> None:
    fields["values"] = [[4, ["pickle", b"cos\nsystem\n"]]]


@attack
def value_of_no_leaf(fields: Fields) -> None:
    fields["values"].append([5, ["int", "0x1"]])


@attack
def value_given_twice(fields: Fields) -> None:
    fields["values"].append([4, ["int", "0x8"]])


@attack
def time_that_is_no_number(fields: Fields) -> None:
    fields["created_s"] = float("nan")


@attack
def time_after_all_calendars(fields: Fields) -> None:
    fields["created_s"] = 1e300


@attack
def newer_reader_needed(fields: Fields) -> None:
    fields.update(format=9, min_reader=9, writer={"jaxckpt": "9.8.7"})


@attack
def newer_reader_and_no_writer(fields: Fields) -> None:
    fields.update(format=9, min_reader=2**64 - 1, writer=None)


@attack
def unknown_feature(fields: Fields) -> None:
    fields["features"] = ["zstd"]


@attack
def other_block_size(fields: Fields) -> None:
    fields["block_bytes"] = 0


@attack
def other_checksum(fields: Fields) -> None:
    fields["checksum"] = "crc32"


@attack
def no_parts(fields: Fields) -> None:
    of_two_processes(fields)
    fields["parts"] = []


@attack
def more_parts_than_processes_can_be(fields: Fields) -> None:
    of_two_processes(fields)
    fields["parts"] = [None] * 65_536


@attack
def part_of_an_exabyte(fields: Fields) -> None:
    of_two_processes(fields)
    fields["parts"][1][0] = 2**60


@attack
def part_with_a_short_checksum(fields: Fields) -> None:
    of_two_processes(fields)
    fields["parts"][1][1] = bytes(15)


@attack
def part_with_negative_bytes(fields: Fields) -> None:
    of_two_processes(fields)
    fields["parts"][1][3] = -4096


@attack
def part_with_a_path(fields: Fields) -> None:
    of_two_processes(fields)
    fields["parts"][1].insert(0, "../../etc/passwd")


@attack
def parts_beside_a_table(fields: Fields) -> None:
    table = {
        name: fields[name] for name in ("packs", "chunk_pack", "chunk_offset", "chunk_length", "checksums")
    }
    of_two_processes(fields)
    fields.update(table)


@attack
def parts_without_owners(fields: Fields) -> None:
    of_two_processes(fields)
    del fields["owners"]


@attack
def parts_kept_alone(fields: Fields) -> None:
    of_two_processes(fields)
    fields.update(features=["parts", "local"], local=[0, 2])


@attack
def owner_that_is_not_there(fields: Fields) -> None:
    of_two_processes(fields)
    fields["owners"][0] = struct.pack("<2H", 0, 2)


@attack
def chunk_that_nobody_owns(fields: Fields) -> None:
    of_two_processes(fields)
    fields["owners"][0] = struct.pack("<2H", 0, 65535)


@attack
def owners_of_half_a_number(fields: Fields) -> None:
    of_two_processes(fields)
    fields["owners"][0] = bytes(3)


@attack
def owners_of_a_chunk_too_many(fields: Fields) -> None:
    of_two_processes(fields)
    fields["owners"][0] = bytes(6)


@attack
def owners_for_another_leaf(fields: Fields) -> None:
    of_two_processes(fields)
    fields["owner_index"] = struct.pack("<6i", 0, 0, 1, 1, -1, 1)


@attack
def owners_for_a_value(fields: Fields) -> None:
    of_two_processes(fields)
    fields["owner_index"] = struct.pack("<6i", 0, 1, 1, 1, 1, 1)


@attack
def leaf_without_owners(fields: Fields) -> None:
    of_two_processes(fields)
    fields["owner_index"] = struct.pack("<6i", -1, 1, 1, 1, -1, 1)


@attack
def owners_beyond_the_last_column(fields: Fields) -> None:
    of_two_processes(fields)
    fields["owner_index"] = struct.pack("<6i", 0, 1, 1, 1, -1, 2)


@attack
def owners_before_the_first_column(fields: Fields) -> None:
    of_two_processes(fields)
    fields["owner_index"] = struct.pack("<6i", 0, 1, 1, 1, -1, -2)


@attack
def grid_of_2_to_the_62_owners(fields: Fields) -> None:
    of_two_processes(fields)
    fields["specs"][0] |= {"shape": [2**31, 2**30], "chunk_shape": [1, 1]}


@attack
def kept_by_a_process_beyond_the_last(fields: Fields) -> None:
    of_process_0_alone(fields)
    fields["local"] = [2, 2]


@attack
def kept_by_one_of_a_million(fields: Fields) -> None:
    of_process_0_alone(fields)
    fields["local"] = [0, 1_000_000]


@attack
def kept_chunk_of_another_owner(fields: Fields) -> None:
    of_process_0_alone(fields)
    fields["owners"][0] = struct.pack("<2H", 0, 1)


@attack
def kept_chunk_that_has_no_row(fields: Fields) -> None:
    of_process_0_alone(fields)
    fields["owners"][0] = struct.pack("<2H", 0, 65535)


def main() -> None:
    """Writes all files."""
    for name, build in ATTACKS.items():
        (FOLDER / f"{name}.msgpack").write_bytes(build(base_fields()))


if __name__ == "__main__":
    main()
