"""What do the plans and the manifest of a large job cost, and how do they grow with the number of processes?

    python -m benchmarks.scale [--processes 64,256,1024,4096] [--devices 4] [--leaves 1000]

Every process of a job plans the writing of the whole tree, process 0 encodes the manifest, and everybody decodes it
when the job restores: work that more processes do not make less. The devices are plain objects: device d belongs to
process d // DEVICES. Nothing is written, and no thread waits: seconds are those of the processor. Each process is
played in a new interpreter, so that no cache is filled. By workload and number of processes the first table shows what
a process plans (the larger figure of the first and the last process), and the part that it writes:

    plan_s       seconds for what it looks up of each leaf, the outline, the shares of all, and its own write plan
    plan_mib     resident memory that this takes at its highest, beyond that of the imports and the devices
    chunks       chunks of all leaves
    balance      bytes that the busiest process writes, over the average
    part_kib     size of the part
    part_s       seconds to encode and to decode it

and the second one the manifest:

    mib          its size
    encode_s     seconds to encode it
    encode_mib   resident memory that this takes at its highest
    decode_s     seconds to decode and validate it
    decode_mib   resident memory that this takes at its highest
    columns      distinct columns of owners
    rows_s       seconds to find out which chunks each of the processes owns, which whoever reads all parts does

The slope is that of the logarithms, from the fewest to the most processes: 1 is linear.

    sharded      every leaf has one shard for each device
    hsdp         the mesh has 16 replicas, and every leaf is sharded over the devices of one
    small        replicated leaves below 256 KiB; there are fewer of them than processes in the largest jobs
    large        replicated leaves of 64 to 256 MiB
    mixed        a mesh with three axes, 2 replicas; a quarter of the leaves is sharded over all devices, half over
                 those of one replica, in all orders of the axes, a quarter is replicated
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from benchmarks import measure
from benchmarks.trial import REPOSITORY
from jaxckpt._collective import Outline, outline_leaf
from jaxckpt._config import BLOCK_BYTES, PIECE_BYTES, SPLIT_BYTES_MIN, SaveOptions
from jaxckpt._encoding import encode_manifest, parse_manifest
from jaxckpt._keys import flatten
from jaxckpt._layout import Share, WritePlan, plan_writes
from jaxckpt._leaves import Template, _array_template
from jaxckpt._manifest import NO_CHUNKS, Manifest, PartEntry
from jaxckpt._ownership import share_writes
from jaxckpt._parts import encode_part, parse_part
from jaxckpt._shardings import describe_sharding
from jaxckpt._tables import CHECKSUM_BYTES, ChunkTable
from jaxckpt._zarr import leaf_directory

T = TypeVar("T")

WORKLOADS = ("sharded", "hsdp", "small", "large", "mixed")

DEFAULT_PROCESSES = (64, 256, 1024, 4096)

TIMEOUT_S = 600

REPLICAS = 16
MIB = 1 << 20

PLAN_COLUMNS = ("plan_s", "plan_mib", "chunks", "balance", "part_kib", "part_s")
MANIFEST_COLUMNS = ("mib", "encode_s", "encode_mib", "decode_s", "decode_mib", "columns", "rows_s")
SLOPES = ("plan_s", "plan_mib", "chunks", "part_kib", "mib", "encode_s", "decode_s", "rows_s")


class FakeMemory:
    kind = "device"


class FakeClient:
    """Says in which process the device is looked at."""

    def __init__(self, process: int) -> None:
        self._process = process

    def process_index(self) -> int:
        return self._process


class FakeDevice:
    """All that a mesh and a plan ask of a device."""

    platform = "cpu"
    device_kind = "cpu"

    def __init__(self, number: int, process_index: int, client: FakeClient) -> None:
        self.id = number
        self.process_index = process_index
        self.client = client

    def default_memory(self) -> FakeMemory:
        return FakeMemory()


def make_devices(process_count: int, device_count: int, process: int) -> np.ndarray:
    client = FakeClient(process)
    numbers = range(process_count * device_count)
    return np.array([FakeDevice(number, number // device_count, client) for number in numbers], object)


def make_mesh(devices: np.ndarray, workload: str) -> Mesh:
    axes = (
        {"replica": 2, "fsdp": -1, "tensor": 4} if workload == "mixed" else {"replica": REPLICAS, "shard": -1}
    )
    return Mesh(devices.reshape(tuple(axes.values())), tuple(axes), axis_types=(AxisType.Auto,) * len(axes))


def leaves_of(workload: str, mesh: Mesh, leaf_count: int) -> list[tuple[NamedSharding, tuple[int, ...]]]:
    """Sharding and shape of each leaf; all are float32. Few leaves have equal shapes."""
    leaves = [_leaf_of(workload, mesh, number) for number in range(leaf_count)]
    return [(NamedSharding(mesh, spec), shape) for spec, shape in leaves]


def _leaf_of(workload: str, mesh: Mesh, number: int) -> tuple[PartitionSpec, tuple[int, ...]]:
    is_replicated = workload == "small" or (workload == "mixed" and number % 4 == 0)
    if is_replicated:
        return PartitionSpec(), (1 + number * 257 % 65536,)
    if workload == "large":
        return PartitionSpec(), (8192, 2048 + 16 * (number % 384))
    names = {
        "sharded": mesh.axis_names,
        "hsdp": ("shard",),
        "mixed": [("fsdp", "tensor"), ("tensor", "fsdp"), ("tensor", "replica", "fsdp")][number % 4 - 1],
    }[workload]
    cut = math.prod(mesh.shape[name] for name in names)
    if number % 8 < 4:
        return PartitionSpec(None, names), (64 + number, cut * (1 + number % 5))
    return PartitionSpec(names), (cut * (1 + number % 5), 64 + number)


# --- one process ----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a process knows after planning, and what it took."""

    keys: tuple[str, ...]
    nodes: list[Any]
    templates: list[Template]
    shares: list[Share]
    writes: WritePlan
    usage: measure.Usage


def plan(workload: str, process_count: int, device_count: int, leaf_count: int, process: int) -> Plan:
    """Plans as one process of the job does."""
    leaves = leaves_of(
        workload, make_mesh(make_devices(process_count, device_count, process), workload), leaf_count
    )
    flat = flatten(
        {
            f"block_{block:03d}": {f"kernel_{n}": 0 for n in range(block, leaf_count, 100)}
            for block in range(min(100, leaf_count))
        }
    )
    options = SaveOptions()

    def plan_all() -> tuple[list[Template], list[Share | None], WritePlan]:
        templates = [
            _array_template(shape, np.dtype(np.float32), False, True, sharding) for sharding, shape in leaves
        ]
        extents = [template.extent for template in templates]
        Outline({}, flat.nodes, flat.keys, tuple(map(outline_leaf, templates))).encode()
        shares = share_writes(
            extents, process_count, chunk_bytes_max=options.chunk_bytes_max, split_bytes_min=SPLIT_BYTES_MIN
        )
        writes = plan_writes(
            extents,
            chunk_bytes_max=options.chunk_bytes_max,
            pack_bytes_max=options.pack_bytes_max,
            piece_bytes=PIECE_BYTES,
            shares=shares,
            process=process,
        )
        return templates, shares, writes

    (templates, shares, writes), usage = measure.measure(plan_all)
    return Plan(
        flat.keys, flat.nodes, templates, [share for share in shares if share is not None], writes, usage
    )


def make_part(plan: Plan, process: int) -> bytes:
    """The part of a process, with made-up checksums."""
    writes = plan.writes
    block_count = int(np.sum(-(-writes.length.astype(np.int64) // BLOCK_BYTES)))
    checksums = os.urandom(block_count * CHECKSUM_BYTES)
    return encode_part(
        process, ChunkTable(writes.pack, writes.offset, writes.length, checksums), writes.packs
    )


def make_manifest(plan: Plan, part: bytes, process_count: int) -> Manifest:
    """The manifest of the job; all parts are as long as this one."""
    descriptors = [describe_sharding(template.sharding) for template in plan.templates]
    shardings, sharding_index = distinct(descriptors)
    specs, spec_index = distinct(plan.templates)
    columns, owner_index = distinct([share.owners for share in plan.shares])
    first_leaves = np.unique(spec_index, return_index=True)[1].tolist()
    entry = functools.partial(
        PartEntry,
        length=len(part),
        objects=len(plan.writes.objects),
        stored_bytes=int(plan.writes.length.sum()),
    )
    return Manifest(
        data="data-00ff",
        created_s=1.5,
        writer={"jaxckpt": "0.1"},
        metadata=None,
        nodes=plan.nodes,
        keys=plan.keys,
        specs=tuple(
            dataclasses.replace(
                template.spec, chunk_shape=plan.shares[leaf].chunk_shape, sharding=int(sharding_index[leaf])
            )
            for template, leaf in zip(specs, first_leaves, strict=True)
        ),
        spec_index=spec_index,
        values={},
        shardings=tuple(shardings),
        directories={leaf: leaf_directory(plan.keys[leaf]) for leaf in plan.writes.unpacked},
        packs=(),
        chunks=NO_CHUNKS,
        objects=(),
        parts=tuple(
            entry(name=f"data-00ff/parts/{process}", checksum=os.urandom(CHECKSUM_BYTES))
            for process in range(process_count)
        ),
        owners=tuple(columns),
        owner_index=owner_index,
    )


def distinct(objects: Sequence[T]) -> tuple[list[T], np.ndarray]:
    """Each object once, and for each place the number of its object."""
    numbers: dict[int, int] = {}
    index = [numbers.setdefault(id(each), len(numbers)) for each in objects]
    by_id = {id(each): each for each in objects}
    return list(by_id.values()), np.array(index, np.int32)


def row(
    workload: str, process_count: int, device_count: int, leaf_count: int, process: int
) -> dict[str, float]:
    """The figures of one process; process 0 has those of the manifest, too."""
    planned = plan(workload, process_count, device_count, leaf_count, process)
    loads = np.zeros(process_count, np.int64)
    for share in planned.shares:
        loads += np.bincount(share.owners, minlength=process_count) * (4 * math.prod(share.chunk_shape))
    part, encoding = measure.measure(lambda: make_part(planned, process))
    manifest = make_manifest(planned, part, process_count)
    _, decoding = measure.measure(lambda: parse_part(part, manifest, process))
    figures = {
        "plan_s": planned.usage.cpu_seconds,
        "plan_mib": planned.usage.peak_extra_bytes / MIB,
        "chunks": sum(len(share.owners) for share in planned.shares),
        "balance": float(loads.max() / loads.mean()),
        "part_kib": len(part) / 1024,
        "part_s": encoding.cpu_seconds + decoding.cpu_seconds,
    }
    return figures | rows_of_manifest(manifest) if process == 0 else figures


def rows_of_manifest(manifest: Manifest) -> dict[str, float]:
    data, encoding = measure.measure(lambda: encode_manifest(manifest))
    parsed, decoding = measure.measure(lambda: parse_manifest(data, "benchmark"))
    processes = range(len(parsed.parts))
    owned, looking = measure.measure(lambda: sum(int(parsed.counts_of(each).sum()) for each in processes))
    assert owned == int(parsed.chunk_starts[-1])
    return {
        "mib": len(data) / MIB,
        "encode_s": encoding.cpu_seconds,
        "encode_mib": encoding.peak_extra_bytes / MIB,
        "decode_s": decoding.cpu_seconds,
        "decode_mib": decoding.peak_extra_bytes / MIB,
        "columns": len(parsed.owners),
        "rows_s": looking.cpu_seconds,
    }


# --- all of them ----------------------------------------------------------------------------------------------


def figures_of(workload: str, process_count: int, device_count: int, leaf_count: int) -> dict[str, float]:
    """The larger figures of the first and the last process."""
    first = _row_in_process(workload, process_count, device_count, leaf_count, 0)
    last = _row_in_process(workload, process_count, device_count, leaf_count, process_count - 1)
    return {name: max(value, last.get(name, 0)) for name, value in first.items()}


def _row_in_process(workload: str, *numbers: int) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.scale", "--row", workload, *map(str, numbers)],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        text=True,
        timeout=TIMEOUT_S,
        check=True,
    )
    return json.loads(done.stdout)


def slope(process_counts: Sequence[int], values: Sequence[float]) -> float | None:
    """How fast a figure grows; None where it is too small to tell."""
    if len(values) < 2 or min(values) <= 0:
        return None
    return math.log(values[-1] / values[0]) / math.log(process_counts[-1] / process_counts[0])


def show_table(
    names: Sequence[str], process_counts: Sequence[int], found: dict[str, list[dict[str, float]]]
) -> None:
    print(f"{'workload':10}{'processes':>10}" + "".join(f"{name:>12}" for name in names))
    for workload, rows in found.items():
        for count, figures in zip(process_counts, rows, strict=True):
            cells = [
                f"{figures[name]:12.3f}" if figures[name] % 1 else f"{figures[name]:12.0f}" for name in names
            ]
            print(f"{workload:10}{count:>10}{''.join(cells)}")
        slopes = [slope(process_counts, [figures[name] for figures in rows]) for name in names]
        cells = [
            f"{value:12.2f}" if value is not None and name in SLOPES else " " * 12
            for name, value in zip(names, slopes, strict=True)
        ]
        print(f"{workload:10}{'slope':>10}{''.join(cells)}")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scale", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--processes", default=",".join(map(str, DEFAULT_PROCESSES)), metavar="N,N,...")
    parser.add_argument("--devices", type=int, default=4, metavar="N", help="devices of each process")
    parser.add_argument("--leaves", type=int, default=1000, metavar="N")
    parser.add_argument("--row", nargs=5, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.row:
        print(json.dumps(row(arguments.row[0], *map(int, arguments.row[1:]))))
        return
    process_counts = sorted(map(int, arguments.processes.split(",")))
    if any(count * arguments.devices % REPLICAS for count in process_counts):
        parser.error(f"processes times devices must be a multiple of {REPLICAS}, the replicas of hsdp")
    found = {
        workload: [
            figures_of(workload, count, arguments.devices, arguments.leaves) for count in process_counts
        ]
        for workload in WORKLOADS
    }
    show_table(PLAN_COLUMNS, process_counts, found)
    print()
    show_table(MANIFEST_COLUMNS, process_counts, found)


if __name__ == "__main__":
    main()
