"""Which way to storage is the fastest for local files? The measurement behind `jaxckpt._store`.

    python -m benchmarks.storage [--dir DIR] [--repeat N] [--mebibytes M]

Writes and reads the same bytes as objects of 8 MiB, in turns, with the library's own `LocalStore` (4 and 8 threads,
from memory that starts at a page and from memory that doesn't) and with TensorStore's zarr3 driver (zero-copy writes
with 32 I/O threads, reads through a memory map into memory that is there). Everything written is synced. Every read
is a fresh process into fresh memory, once with the page cache evicted and once with it warm, and is compared.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from jaxckpt._storage import allocate_aligned
from jaxckpt._store import LocalStore

from .measure import evict, warm

MIB = 1 << 20
OBJECT_BYTES = 8 * MIB
TRIAL_TIMEOUT_S = 300


def content(nbytes: int) -> np.ndarray:
    memory = allocate_aligned(nbytes + 64)
    memory[:] = np.frombuffer(np.random.default_rng(0).bytes(len(memory)), np.uint8)
    return memory


def write_with_store(directory: str, data: np.ndarray, threads: int) -> None:
    store = LocalStore(directory)

    def write(start: int) -> None:
        writer = store.create(f"{start // OBJECT_BYTES}", OBJECT_BYTES)
        writer.write(0, data[start : start + OBJECT_BYTES])
        writer.finish()

    with concurrent.futures.ThreadPoolExecutor(threads) as executor:
        list(executor.map(write, range(0, len(data), OBJECT_BYTES)))
    store.sync()


def read_with_store(directory: str, target: np.ndarray, threads: int) -> None:
    store = LocalStore(directory)

    def read(start: int) -> None:
        store.read_into(f"{start // OBJECT_BYTES}", 0, target[start : start + OBJECT_BYTES])

    with concurrent.futures.ThreadPoolExecutor(threads) as executor:
        list(executor.map(read, range(0, len(target), OBJECT_BYTES)))


def zarr3_spec(directory: str, nbytes: int) -> dict:
    return {
        "driver": "zarr3",
        "kvstore": {"driver": "file", "path": f"{directory}/"},
        "store_data_equal_to_fill_value": True,
        "fill_missing_data_reads": False,
        "metadata": {
            "shape": [nbytes // OBJECT_BYTES, OBJECT_BYTES],
            "data_type": "uint8",
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [1, OBJECT_BYTES]}},
            "codecs": [{"name": "bytes"}],
        },
    }


def write_with_tensorstore(directory: str, data: np.ndarray) -> None:
    import tensorstore as ts

    context = ts.Context({"file_io_concurrency": {"limit": 32}, "cache_pool": {"total_bytes_limit": 0}})
    array = ts.open(zarr3_spec(directory, len(data)), create=True, context=context).result()
    rows = data.reshape(-1, OBJECT_BYTES)
    array.write(rows, can_reference_source_data_indefinitely=True).commit.result()


def read_with_tensorstore(directory: str, target: np.ndarray) -> None:
    import tensorstore as ts

    context = ts.Context({"file_io_mode": {"mode": "memmap"}, "cache_pool": {"total_bytes_limit": 0}})
    array = ts.open(zarr3_spec(directory, len(target)), open=True, context=context).result()
    ts.array(target.reshape(-1, OBJECT_BYTES), context=context).write(array).result()


def timed_write(write: Callable[[str], None], directory: str) -> float:
    shutil.rmtree(directory, ignore_errors=True)
    os.sync()
    os.makedirs(directory)
    began_s = time.perf_counter()
    write(directory)
    return time.perf_counter() - began_s


def timed_read(way: str, directory: str, nbytes: int) -> float:
    command = [sys.executable, "-m", "benchmarks.storage", "--read", way, "--dir", directory]
    command += ["--mebibytes", str(nbytes // MIB)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TRIAL_TIMEOUT_S, check=True)
    return float(json.loads(done.stdout)["seconds"])


def read_once(way: str, directory: str, nbytes: int) -> None:
    """The measured process: prints how long one read took."""
    if way == "tensorstore":
        import tensorstore  # noqa: F401  loading it is not part of the read
    began_s = time.perf_counter()
    target = allocate_aligned(nbytes)
    if way == "tensorstore":
        read_with_tensorstore(directory, target)
    else:
        read_with_store(directory, target, int(way))
    seconds = time.perf_counter() - began_s
    if not np.array_equal(target, content(nbytes)[:nbytes]):
        raise SystemExit("the bytes differ")
    print(json.dumps({"seconds": seconds}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dir", default=tempfile.gettempdir(), help="storage directory")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--mebibytes", type=int, default=1024)
    parser.add_argument("--read", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    nbytes = arguments.mebibytes * MIB
    if arguments.read:
        read_once(arguments.read, arguments.dir, nbytes)
        return
    scratch = tempfile.mkdtemp(prefix="jaxckpt-storage-", dir=arguments.dir)
    try:
        compare(scratch, nbytes, arguments.repeat)
    finally:
        shutil.rmtree(scratch)


def compare(scratch: str, nbytes: int, repeat: int) -> None:
    memory = content(nbytes)
    aligned, odd = memory[:nbytes], memory[64 : nbytes + 64]
    own, foreign = f"{scratch}/own", f"{scratch}/tensorstore"
    writes: dict[str, tuple[Callable[[str], None], str]] = {
        "write, LocalStore, 4 threads": (lambda place: write_with_store(place, aligned, 4), own),
        "write, LocalStore, 8 threads": (lambda place: write_with_store(place, aligned, 8), own),
        "write, LocalStore, 8 threads, unaligned": (
            lambda place: write_with_store(place, odd, 8),
            f"{scratch}/odd",
        ),
        "write, TensorStore zarr3": (lambda place: write_with_tensorstore(place, aligned), foreign),
    }
    reads = {
        "LocalStore, 4 threads": ("4", own),
        "LocalStore, 8 threads": ("8", own),
        "TensorStore zarr3": ("tensorstore", foreign),
    }
    seconds: dict[str, list[float]] = {}
    for _ in range(repeat):
        for name, (write, place) in writes.items():
            seconds.setdefault(name, []).append(timed_write(write, place))
        shutil.rmtree(f"{scratch}/odd")
        for name, (way, place) in reads.items():
            evict(Path(place))
            seconds.setdefault(f"cold read, {name}", []).append(timed_read(way, place, nbytes))
            warm(Path(place))
            seconds.setdefault(f"warm read, {name}", []).append(timed_read(way, place, nbytes))
    for name in sorted(seconds):
        times = seconds[name]
        median = statistics.median(times)
        rate = nbytes / median / 1e9
        print(f"{name:42s} {median:6.3f} [{min(times):.3f}-{max(times):.3f}] s  {rate:5.2f} GB/s")


if __name__ == "__main__":
    main()
