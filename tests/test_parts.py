"""The parts of a checkpoint of many processes: what they say is found again, and no lie of theirs is believed.

The checkpoint that is damaged here is one of the golden ones, so no process has to be started.
"""

from __future__ import annotations

import copy
import json
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

import jaxckpt
from jaxckpt._encoding import encode_manifest, parse_manifest
from jaxckpt._layout import LeafExtent, Share, plan_writes
from jaxckpt._manifest import NO_CHUNKS, LeafSpec, Manifest, PartEntry
from jaxckpt._ownership import share_writes
from jaxckpt._parts import ChunkIndex, encode_part
from jaxckpt._shardings import ShardMap
from jaxckpt._tables import ChunkTable
from jaxckpt._zarr import leaf_directory

from .attacks.generate import base_fields, digest, of_process_0_alone, of_two_processes, pack
from .golden import generate
from .helpers import run_fork
from .test_attacks import DELETED, SAMPLES

GOLDEN = generate.ROOT / "four-processes"
PROCESSES = 4

Fields = dict[str, Any]


# --- what processes write is found again ------------------------------------------------------------------------


@st.composite
def jobs(draw: Any) -> tuple[int, list[tuple[int, ShardMap | None]]]:
    """A number of processes, and leaves of so many elements: cut over devices, held by replicas, or by each process."""
    count = draw(st.integers(1, 6))
    leaves: list[tuple[int, ShardMap | None]] = []
    for _ in range(draw(st.integers(1, 6))):
        if draw(st.booleans()):
            leaves.append((draw(st.integers(0, 40)), None))
            continue
        device_count = draw(st.integers(1, 8))
        processes = np.array(
            draw(st.lists(st.integers(0, count - 1), min_size=device_count, max_size=device_count))
        )
        grid = draw(st.sampled_from([n for n in range(1, device_count + 1) if device_count % n == 0]))
        shard_size = draw(st.integers(1, 30))
        shards = np.arange(device_count) % grid
        leaves.append(
            (grid * shard_size, ShardMap((shard_size,), (grid,), shards, processes.astype(np.int32)))
        )
    return count, leaves


def extent_in(process: int, size: int, shards: ShardMap | None) -> LeafExtent:
    """What a process knows of a leaf of single bytes."""
    if shards is None:
        return LeafExtent((size,), 1, (max(size, 1),), (((0,), 0),))
    owners: dict[tuple[int, ...], int] = {}
    for number, shard in enumerate(shards.shards[shards.processes == process].tolist()):
        owners.setdefault((shard * shards.shard_shape[0],), number)
    return LeafExtent((size,), 1, shards.shard_shape, tuple(owners.items()), shards)


def checkpoint_of(
    count: int, leaves: list[tuple[int, ShardMap | None]], pack_bytes_max: int
) -> tuple[Manifest, dict[int, bytes]]:
    """The manifest and the parts that such a job writes."""
    parts: dict[int, bytes] = {}
    entries: list[PartEntry] = []
    shares: list[Share | None] = []
    unpacked: tuple[int, ...] = ()
    for process in range(count):
        extents = [extent_in(process, size, shards) for size, shards in leaves]
        shares = share_writes(extents, count, chunk_bytes_max=16, split_bytes_min=4)
        plan = plan_writes(
            extents,
            chunk_bytes_max=16,
            pack_bytes_max=pack_bytes_max,
            piece_bytes=1 << 20,
            shares=shares,
            process=process,
        )
        unpacked = plan.unpacked
        table = ChunkTable(plan.pack, plan.offset, plan.length, bytes([process]) * 16 * len(plan.pack))
        data = parts[process] = encode_part(process, table, plan.packs)
        stored_bytes = int(plan.length.sum())
        entries.append(
            PartEntry(f"data-1/parts/{process}", len(data), digest(data), len(plan.objects), stored_bytes)
        )
    keys = tuple(f"k{leaf:02d}" for leaf in range(len(leaves)))
    with_chunks = [leaf for leaf, (size, _) in enumerate(leaves) if size]
    manifest = Manifest(
        data="data-1",
        created_s=1.0,
        writer={},
        metadata=None,
        nodes=[["dict", list(keys)], *[0] * len(keys)],
        keys=keys,
        specs=tuple(
            LeafSpec("numpy", "uint8", (size,), share.chunk_shape)
            for (size, _), share in zip(leaves, shares, strict=True)
            if share is not None
        ),
        spec_index=np.arange(len(keys), dtype=np.uint32),
        values={},
        shardings=(),
        directories={leaf: leaf_directory(keys[leaf]) for leaf in unpacked},
        packs=(),
        chunks=NO_CHUNKS,
        objects=(),
        parts=tuple(entries),
        owners=tuple(share.owners for share in shares if share is not None and len(share.owners)),
        owner_index=np.array(
            [with_chunks.index(leaf) if leaf in with_chunks else -1 for leaf in range(len(keys))]
        ),
    )
    return manifest, parts


@settings(max_examples=150, derandomize=True, deadline=None)
@given(jobs(), st.sampled_from([0, 8, 1 << 20]))
def test_every_chunk_is_found_where_its_owner_wrote_it(
    job: tuple[int, list[tuple[int, ShardMap | None]]], pack_bytes_max: int
) -> None:
    manifest, parts = checkpoint_of(*job, pack_bytes_max)
    manifest = parse_manifest(encode_manifest(manifest), "somewhere")
    index = ChunkIndex(manifest, parts.__getitem__)
    ranges: dict[str, list[tuple[int, int]]] = {}
    lengths: dict[str, int] = {}
    rows = []
    for leaf in range(len(manifest.keys)):
        first, end = manifest.chunk_starts[leaf : leaf + 2].tolist()
        for chunk in range(first, end):
            place = index.place(leaf, chunk)
            owner = int(manifest.owners[manifest.owner_index[leaf]][chunk - first])
            assert place.table.checksum(place.row, 0) == bytes([owner]) * 16
            ranges.setdefault(place.object, []).append((place.offset, place.offset + place.length))
            lengths[place.object] = place.object_length
            rows.append((owner, place.row))
    # Each row of each table belongs to one chunk, and each byte of each object, too.
    assert len(set(rows)) == len(rows)
    for name, taken in ranges.items():
        taken.sort()
        assert [start for start, _ in taken] == [0, *(end for _, end in taken[:-1])]
        assert taken[-1][1] == lengths[name]
    assert sum(part.objects for part in manifest.parts) == len(ranges)
    assert sum(part.stored_bytes for part in manifest.parts) == sum(lengths.values())


@settings(max_examples=100, derandomize=True, deadline=None)
@given(st.data())
def test_what_a_process_owns_is_what_the_columns_say(data: st.DataObject) -> None:
    owner = st.integers(0, 4) | st.just(65_535)
    columns = data.draw(st.lists(st.lists(owner, max_size=8), min_size=1, max_size=5))
    index = data.draw(st.lists(st.integers(-1, len(columns) - 1), min_size=1, max_size=8))
    base, _ = checkpoint_of(1, [(1, None)], 0)
    fields = vars(base) | {
        "owners": tuple(np.array(column, np.uint16) for column in columns),
        "owner_index": np.array(index, np.int32),
    }
    manifest = Manifest(**{name: fields[name] for name in Manifest.__dataclass_fields__})
    for process in (0, 1, 4, 5, 65_535):
        wanted = [columns[number].count(process) if number >= 0 else 0 for number in index]
        assert manifest.counts_of(process).tolist() == wanted
        for number, column in enumerate(columns):
            wanted = [place for place, owner in enumerate(column) if owner == process]
            assert manifest.owned_in(number, process).tolist() == wanted


# --- damage -----------------------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(path: pathlib.Path) -> pathlib.Path:
    """A copy of the checkpoint that four processes wrote."""
    shutil.copytree(GOLDEN, path)
    return path


def part_file(checkpoint: pathlib.Path, process: int) -> pathlib.Path:
    (file,) = checkpoint.glob(f"data-*/parts/{process}")
    return file


def assert_damage_is_found(checkpoint: pathlib.Path, process: int) -> None:
    """By every reader, and the part is named."""
    name = part_file(GOLDEN, process).relative_to(GOLDEN)
    with pytest.raises(jaxckpt.CorruptError, match=str(name)) as caught:
        jaxckpt.restore(checkpoint)
    assert any(str(name) in problem.message for problem in caught.value.problems)
    assert_verify_names(checkpoint, process)


def assert_verify_names(checkpoint: pathlib.Path, process: int) -> None:
    """The part of this process, and nothing else."""
    name = part_file(GOLDEN, process).relative_to(GOLDEN)
    report = jaxckpt.verify(checkpoint)
    assert [str(name) in problem.message for problem in report.problems] == [True]


@pytest.mark.slow
def test_every_changed_byte_of_a_part_is_found_and_the_part_named(checkpoint: pathlib.Path) -> None:
    for process in range(PROCESSES):
        file = part_file(checkpoint, process)
        honest = file.read_bytes()
        for at in range(process, len(honest), PROCESSES):
            damaged = bytearray(honest)
            damaged[at] ^= 1 << at % 8
            file.write_bytes(damaged)
            assert_verify_names(checkpoint, process)
        assert_damage_is_found(checkpoint, process)
        file.write_bytes(honest)
    assert jaxckpt.verify(checkpoint).ok


def test_a_part_that_was_cut_off_anywhere_or_made_longer_is_found_and_named(checkpoint: pathlib.Path) -> None:
    file = part_file(checkpoint, 2)
    honest = file.read_bytes()
    for damaged in [*(honest[:length] for length in range(0, len(honest), 7)), honest + b"\0"]:
        file.write_bytes(damaged)
        assert_damage_is_found(checkpoint, 2)


def test_a_part_that_is_missing_or_another_process_s_is_found_and_named(checkpoint: pathlib.Path) -> None:
    shutil.copy(part_file(checkpoint, 1), part_file(checkpoint, 3))
    assert_damage_is_found(checkpoint, 3)
    part_file(checkpoint, 3).unlink()
    assert_damage_is_found(checkpoint, 3)


def test_leaves_of_whole_parts_can_still_be_read(checkpoint: pathlib.Path) -> None:
    """Damage costs what it touches: process 3 wrote nothing of these."""
    part_file(checkpoint, 3).unlink()
    opened = jaxckpt.open(checkpoint)
    np.testing.assert_array_equal(opened["host"][...], np.arange(5))
    np.testing.assert_array_equal(opened["rows"][:4], np.arange(24, dtype=np.float32).reshape(4, 6))
    with pytest.raises(jaxckpt.CorruptError, match="parts/3"):
        opened["rows"][...]


# --- lies: the checksum of the part is right ----------------------------------------------------------------------


def fields_of(checkpoint: pathlib.Path) -> Fields:
    _, _, payload = msgpack.unpackb((checkpoint / "manifest.msgpack").read_bytes())
    return msgpack.unpackb(payload, unicode_errors="surrogatepass")


def replace_part(checkpoint: pathlib.Path, process: int, data: bytes) -> None:
    """With a manifest that says that this is the part."""
    part_file(checkpoint, process).write_bytes(data)
    fields = fields_of(checkpoint)
    fields["parts"][process][:2] = [len(data), digest(data)]
    (checkpoint / "manifest.msgpack").write_bytes(pack(fields))


def read_each_leaf(path: pathlib.Path) -> None:
    checkpoint = jaxckpt.open(path)
    for key in tuple(checkpoint.keys()):
        checkpoint[key][...]


def use_everything(checkpoint: pathlib.Path) -> list[BaseException]:
    """Whatever a user would do; returns the errors, which must be those of the library."""
    calls: list[Callable[[], Any]] = [
        lambda: jaxckpt.restore(checkpoint),
        lambda: jaxckpt.verify(checkpoint),
        lambda: str(jaxckpt.describe(checkpoint)),
        lambda: read_each_leaf(checkpoint),
    ]
    errors: list[BaseException] = []
    for call in calls:
        try:
            call()
        except jaxckpt.CheckpointError as error:
            errors.append(error)
    return errors


def assert_lie_is_refused(checkpoint: pathlib.Path, process: int) -> None:
    with pytest.raises(jaxckpt.CorruptError, match=f"parts/{process}: the part is malformed") as caught:
        jaxckpt.restore(checkpoint)
    assert caught.value.problems
    assert len(str(caught.value)) < 2000
    problems = jaxckpt.verify(checkpoint).problems
    assert [f"parts/{process}" in problem.message for problem in problems] == [True]


def set_column(name: str, dtype: str, row: int, value: int) -> Callable[[Fields], None]:
    def change(fields: Fields) -> None:
        column = np.frombuffer(fields[name], dtype).copy()
        column[row] = value
        fields[name] = column.tobytes()

    return change


def set_field(name: str, value: Any) -> Callable[[Fields], None]:
    return lambda fields: fields.update({name: value})


def drop_row(fields: Fields) -> None:
    fields["chunk_pack"] = fields["chunk_pack"][:-4]
    fields["chunk_offset"] = fields["chunk_offset"][:-8]
    fields["chunk_length"] = fields["chunk_length"][:-8]
    fields["checksums"] = fields["checksums"][:-16]


def repeat_row(fields: Fields) -> None:
    fields["chunk_pack"] += fields["chunk_pack"][-4:]
    fields["chunk_offset"] += fields["chunk_offset"][-8:]
    fields["chunk_length"] += fields["chunk_length"][-8:]
    fields["checksums"] += fields["checksums"][-16:]


LIES: dict[str, Callable[[Fields], None]] = {
    "the part of another process": set_field("process", 2),
    "the part of no process": set_field("process", -1),
    "a chunk without a row": drop_row,
    "a row without a chunk": repeat_row,
    "a column of half a row": lambda fields: fields.update(chunk_offset=fields["chunk_offset"][:-4]),
    "a column that is empty": set_field("chunk_length", b""),
    "a pack that is not there": set_column("chunk_pack", "<i4", 0, 5),
    "a negative pack": set_column("chunk_pack", "<i4", 0, -2),
    "an offset that wraps": set_column("chunk_offset", "<u8", 0, 2**64 - 64),
    "a hole in a pack": set_column("chunk_offset", "<u8", 1, 128),
    "a chunk of an exabyte": set_column("chunk_length", "<u8", 0, 2**60),
    "a chunk of 2 to the 64 bytes": set_column("chunk_length", "<u8", 0, 2**64 - 1),
    "a chunk of no bytes": set_column("chunk_length", "<u8", 0, 0),
    "a pack that is longer than its chunks": set_field("packs", [2**50]),
    "a pack of negative length": set_field("packs", [-4096]),
    "a pack without chunks": lambda fields: fields["packs"].append(0),
    "no packs": set_field("packs", []),
    "an object in the place of a packed chunk": set_column("chunk_pack", "<i4", 0, -1),
    "a checksum too few": lambda fields: fields.update(checksums=fields["checksums"][:-16]),
    "a checksum too many": lambda fields: fields.update(checksums=fields["checksums"] + bytes(16)),
    "no process": lambda fields: fields.pop("process"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_part_that_lies_is_refused(checkpoint: pathlib.Path, lie: str) -> None:
    fields = msgpack.unpackb(part_file(checkpoint, 1).read_bytes())
    LIES[lie](fields)
    replace_part(checkpoint, 1, msgpack.packb(fields))
    assert_lie_is_refused(checkpoint, 1)


@pytest.mark.parametrize("is_packed", [False, True])
def test_chunks_are_in_packs_or_in_objects_as_the_manifest_says(
    checkpoint: pathlib.Path, is_packed: bool
) -> None:
    """A table that is right in itself, with all chunks in objects of their own, or all in one pack."""
    manifest = jaxckpt.open(checkpoint).manifest
    sizes = np.repeat(manifest.chunk_nbytes, manifest.counts_of(1)).astype(np.uint64)
    lengths = (sizes + 63) // 64 * 64 if is_packed else sizes
    ends = np.cumsum(lengths) if is_packed else np.zeros_like(lengths)
    table = ChunkTable(
        pack=np.full(len(sizes), 0 if is_packed else -1, np.int32),
        offset=ends - lengths if is_packed else ends,
        length=lengths,
        checksums=bytes(16 * len(sizes)),
    )
    replace_part(checkpoint, 1, encode_part(1, table, (int(ends[-1]),) if is_packed else ()))
    assert_lie_is_refused(checkpoint, 1)


NOT_PARTS = {
    "nothing": b"",
    "a number": b"\x01",
    "a list": msgpack.packb([1, 2]),
    "four billion elements": b"\xdd\xff\xff\xff\xff",
    "four billion fields": b"\xdf\xff\xff\xff\xff",
    "four gigabytes of text": b"\xdb\xff\xff\xff\xff",
    "a deep nest": b"\x91" * 100_000 + b"\x01",
    "a part and more": part_file(GOLDEN, 1).read_bytes() + b"\0",
}


@pytest.mark.parametrize("what", NOT_PARTS)
def test_what_is_no_part_is_refused(checkpoint: pathlib.Path, what: str) -> None:
    replace_part(checkpoint, 1, NOT_PARTS[what])
    assert_lie_is_refused(checkpoint, 1)


@pytest.mark.parametrize(
    "field", ["process", "packs", "chunk_pack", "chunk_offset", "chunk_length", "checksums"]
)
def test_a_field_of_a_part_of_another_type_is_refused(checkpoint: pathlib.Path, field: str) -> None:
    honest = msgpack.unpackb(part_file(checkpoint, 1).read_bytes())
    for sample in [*SAMPLES, DELETED]:
        fields = dict(honest)
        if sample is DELETED:
            del fields[field]
        elif sample == honest[field]:
            continue
        else:
            fields[field] = sample
        replace_part(checkpoint, 1, msgpack.packb(fields, unicode_errors="surrogatepass"))
        assert_lie_is_refused(checkpoint, 1)


def test_an_honest_part_that_was_replaced_by_itself_is_taken(checkpoint: pathlib.Path) -> None:
    """Or the tests above would prove nothing."""
    replace_part(checkpoint, 1, part_file(checkpoint, 1).read_bytes())
    assert jaxckpt.verify(checkpoint).ok
    assert use_everything(checkpoint) == []


# --- manifests that lie about parts -------------------------------------------------------------------------------


def test_the_honest_fields_of_the_attacks_are_taken() -> None:
    """The attacks themselves are among those of `test_attacks`."""
    for change in (of_two_processes, of_process_0_alone):
        fields = base_fields()
        change(fields)
        manifest = parse_manifest(pack(fields), "somewhere")
        assert len(manifest.owners) == 2


def places_in(value: Any, prefix: tuple[Any, ...]) -> list[tuple[Any, ...]]:
    found = [prefix]
    for number, inner in enumerate(value if isinstance(value, list) else []):
        found += places_in(inner, (*prefix, number))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("field", ["features", "parts", "owners", "owner_index", "data"])
def test_a_field_of_another_type_is_refused_or_harmless(checkpoint: pathlib.Path, field: str) -> None:
    """What is taken may find other objects than there are, or less, but never anything else than our errors."""
    honest = fields_of(checkpoint)
    refused = 0
    places = places_in(honest[field], (field,))
    for place in places:
        for sample in [*SAMPLES, DELETED]:
            fields = copy.deepcopy(honest)
            parent: Any = fields
            for step in place[:-1]:
                parent = parent[step]
            if sample is DELETED:
                del parent[place[-1]]
            else:
                parent[place[-1]] = sample
            data = pack(fields)
            (checkpoint / "manifest.msgpack").write_bytes(data)
            try:
                parse_manifest(data, "somewhere")
            except jaxckpt.FormatError:
                refused += 1
            else:
                use_everything(checkpoint)
    assert refused > len(places) * len(SAMPLES) // 2


@pytest.mark.slow
@settings(max_examples=50, derandomize=True, deadline=None)
@given(st.data())
def test_random_owners_are_refused_or_find_damage(tmp_path_factory: Any, data: st.DataObject) -> None:
    """No row belongs to a chunk that its process does not own, so almost all of these are found by the parts."""
    checkpoint = tmp_path_factory.mktemp("random") / "checkpoint"
    shutil.copytree(GOLDEN, checkpoint)
    fields = fields_of(checkpoint)
    number = data.draw(st.integers(0, len(fields["owners"]) - 1))
    column = np.frombuffer(fields["owners"][number], "<u2").copy()
    column[data.draw(st.integers(0, len(column) - 1))] = data.draw(st.integers(0, 5) | st.just(65_535))
    is_same = column.tobytes() == fields["owners"][number]
    fields["owners"][number] = column.tobytes()
    (checkpoint / "manifest.msgpack").write_bytes(pack(fields))
    errors = use_everything(checkpoint)
    assert all(isinstance(error, (jaxckpt.FormatError, jaxckpt.CorruptError)) for error in errors)
    assert bool(errors) == (not is_same)
    shutil.rmtree(checkpoint)


@pytest.mark.slow
def test_lies_about_parts_take_neither_memory_nor_time(tmp_path: pathlib.Path) -> None:
    """In a process of its own, whose largest resident size since the lie began the kernel tells."""
    lies = {
        # Leaves that share a long column of owners: many more chunks than the manifest is long.
        "many chunks": {"keys": 1000, "column": 50_000, "local": None},
        "many chunks of another process": {"keys": 1000, "column": 50_000, "local": [0, 2]},
        "large chunks of another process": {"keys": 1, "column": 4, "local": [0, 2], "chunk": 2**45},
    }
    for number, lie in enumerate(lies.values()):
        write_lie(tmp_path / str(number), **lie)
    result = run_fork(
        """
        import json, pathlib, sys, time
        import jaxckpt

        def kib(name):
            lines = pathlib.Path("/proc/self/status").read_text().splitlines()
            return next(int(line.split()[1]) for line in lines if line.startswith(name + ":"))

        jaxckpt.restore(sys.argv[1])
        costs = []
        for path in sys.argv[2:]:
            pathlib.Path("/proc/self/clear_refs").write_text("5")
            before, began_s = kib("VmRSS"), time.process_time()
            errors = []
            for call in (jaxckpt.restore, lambda path: jaxckpt.open(path)["k0000"][0]):
                try:
                    call(path)
                except jaxckpt.CheckpointError as error:
                    errors.append(type(error).__name__)
            jaxckpt.describe(path)
            costs.append([errors, (kib("VmHWM") - before) // 1024, time.process_time() - began_s])
        print(json.dumps(costs))
        """,
        GOLDEN,
        *(tmp_path / str(number) for number in range(len(lies))),
    )
    for name, (errors, mib, seconds) in zip(lies, json.loads(result.stdout), strict=True):
        wanted = "MismatchError" if "another" in name else "CorruptError"
        assert (name, errors) == (name, [wanted] * 2)
        assert (name, mib) < (name, 128)
        assert (name, seconds) < (name, 3)


def write_lie(folder: pathlib.Path, keys: int, column: int, local: list[int] | None, chunk: int = 1) -> None:
    """A manifest of leaves that share a column of owners, and a short part."""
    (folder / "data-00ff" / "parts").mkdir(parents=True)
    part = msgpack.packb(
        {
            "process": 0,
            "packs": [],
            "chunk_pack": b"",
            "chunk_offset": b"",
            "chunk_length": b"",
            "checksums": b"",
        }
    )
    (folder / "data-00ff" / "parts" / "0").write_bytes(part)
    names = [f"k{number:04d}" for number in range(keys)]
    fields = base_fields() | {
        "tree": [["dict", names], *[0] * keys],
        "keys": names,
        "specs": [
            {
                "kind": "numpy",
                "dtype": "uint8",
                "shape": [column * chunk],
                "chunk_shape": [chunk],
                "order": "C",
            }
        ],
        "spec_index": bytes(4 * keys),
        "values": [],
        "shardings": [],
        "directories": [],
        "packs": [],
        "chunk_pack": b"",
        "chunk_offset": b"",
        "chunk_length": b"",
        "checksums": b"",
        "objects": [],
        "features": ["parts"] if local is None else ["local"],
        "owners": [(bytes(2) if local is None else b"\xff\xff") * column],
        "owner_index": bytes(4 * keys),
    }
    fields |= {"parts": [[len(part), digest(part), 0, 0]]} if local is None else {"local": local}
    (folder / "manifest.msgpack").write_bytes(pack(fields))
