"""What do the plans of a large job cost each process, and how do they grow with the number of processes?

    python -m benchmarks.scale [--processes 64,256,1024,4096] [--devices 4] [--leaves 1000]

Every process of a job plans the writing of the whole tree, so this is work that more processes do not make less. The
devices are plain objects: device d belongs to process d // DEVICES. Each row is planned in a new interpreter. By
workload and number of processes the table shows:

    plan_s      seconds for the shard maps and the shares of all leaves, with empty caches
    memory_mib  resident memory that this takes at its highest, beyond that of the imports and the devices
    chunks      chunks of all leaves
    balance     bytes that the busiest process writes, over the average

and, on logarithmic scales, the slope of the seconds from the fewest to the most processes: 1 is linear.

    sharded     every leaf has one shard for each device
    hsdp        the mesh has 16 replicas, and every leaf is sharded over the devices of one
    small       replicated leaves below 256 KiB; there are fewer of them than processes in the largest jobs
    large       replicated leaves of 64 to 256 MiB
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from benchmarks import measure
from benchmarks.trial import REPOSITORY
from jaxckpt._layout import Share
from jaxckpt._ownership import share_writes

WORKLOADS = ("sharded", "hsdp", "small", "large")

DEFAULT_PROCESSES = (64, 256, 1024, 4096)

TIMEOUT_S = 600

REPLICAS = 16
MIB = 1 << 20

COLUMNS = ("plan_s", "memory_mib", "chunks", "balance")


class FakeDevice:
    """All that a mesh and a plan ask of a device."""

    def __init__(self, number: int, process_index: int) -> None:
        self.id = number
        self.process_index = process_index


def make_mesh(process_count: int, device_count: int) -> Mesh:
    devices = [FakeDevice(number, number // device_count) for number in range(process_count * device_count)]
    return Mesh(np.array(devices, object).reshape(REPLICAS, -1), ("replica", "shard"))


def leaves_of(workload: str, mesh: Mesh, leaf_count: int) -> list[tuple[NamedSharding, tuple[int, ...]]]:
    """Sharding and shape of each leaf; all are float32. Few leaves have equal shapes."""
    leaves: list[tuple[PartitionSpec, tuple[int, ...]]] = []
    names = mesh.axis_names if workload == "sharded" else ("shard",)
    cut = math.prod(mesh.shape[name] for name in names)
    for number in range(leaf_count):
        if workload == "small":
            leaves.append((PartitionSpec(), (1 + number * 257 % 65536,)))
        elif workload == "large":
            leaves.append((PartitionSpec(), (8192, 2048 + 16 * (number % 384))))
        elif number % 2:
            leaves.append((PartitionSpec(names), (cut * (1 + number % 5), 64 + number)))
        else:
            leaves.append((PartitionSpec(None, names), (64 + number, cut * (1 + number % 5))))
    return [(NamedSharding(mesh, spec), shape) for spec, shape in leaves]


def _extent_of(sharding: NamedSharding, shape: tuple[int, ...]) -> LeafExtent:
    shards = map_shards(sharding, shape)
    return LeafExtent(shape, 4, shards.shard_shape, (), shards)


def plan(workload: str, process_count: int, device_count: int, leaf_count: int) -> dict[str, Any]:
    """Plans as one process of the job does; returns the row."""
    leaves = leaves_of(workload, make_mesh(process_count, device_count), leaf_count)

    def plan_all() -> list[Share | None]:
        shared = [_extent_of(sharding, shape) for sharding, shape in leaves]
        return share_writes(shared, process_count, chunk_bytes_max=64 * MIB, split_bytes_min=4 * MIB)

    shares, usage = measure.measure(plan_all)
    found = [share for share in shares if share is not None]
    loads = np.zeros(process_count, np.int64)
    for share in found:
        loads += np.bincount(share.owners, minlength=process_count) * (4 * math.prod(share.chunk_shape))
    return {
        "plan_s": round(usage.seconds, 3),
        "memory_mib": round(usage.peak_extra_bytes / MIB, 1),
        "chunks": sum(len(share.owners) for share in found),
        "balance": round(float(loads.max() / loads.mean()), 3),
    }


# The rows of manifests (encoding, decoding, bytes, parts of the processes) go here: another function like `plan`, that
# `row` calls too, and its columns.


def row(workload: str, process_count: int, device_count: int, leaf_count: int) -> dict[str, Any]:
    return plan(workload, process_count, device_count, leaf_count)


def row_in_process(workload: str, *numbers: int) -> dict[str, Any]:
    """The row, from a new interpreter, in which no cache is filled."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.scale", "--row", workload, *map(str, numbers)],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        text=True,
        timeout=TIMEOUT_S,
        check=True,
    )
    return json.loads(done.stdout)


def slope(process_counts: Sequence[int], seconds: Sequence[float]) -> float:
    return math.log(seconds[-1] / seconds[0]) / math.log(process_counts[-1] / process_counts[0])


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scale", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--processes", default=",".join(map(str, DEFAULT_PROCESSES)), metavar="N,N,...")
    parser.add_argument("--devices", type=int, default=4, metavar="N", help="devices of each process")
    parser.add_argument("--leaves", type=int, default=1000, metavar="N")
    parser.add_argument("--row", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.row:
        print(json.dumps(row(arguments.row[0], *map(int, arguments.row[1:]))))
        return
    process_counts = sorted(map(int, arguments.processes.split(",")))
    if any(count * arguments.devices % REPLICAS for count in process_counts):
        parser.error(f"processes times devices must be a multiple of {REPLICAS}, the replicas of hsdp")
    print(f"{'workload':10}{'processes':>10}" + "".join(f"{name:>12}" for name in COLUMNS))
    for workload in WORKLOADS:
        rows = [
            row_in_process(workload, count, arguments.devices, arguments.leaves) for count in process_counts
        ]
        for count, figures in zip(process_counts, rows, strict=True):
            print(f"{workload:10}{count:>10}" + "".join(f"{figures[name]:>12}" for name in COLUMNS))
        if len(rows) > 1:
            seconds = [figures["plan_s"] for figures in rows]
            print(f"{workload:10}{'slope':>10}{slope(process_counts, seconds):>12.2f}")


if __name__ == "__main__":
    main()
