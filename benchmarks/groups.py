"""How do groups of processes save and restore, and how soon do all know that one has failed?

    python -m benchmarks.groups [--dir D] [--repeat N] [--processes N]

`jaxckpt` and Orbax (`PyTreeCheckpointer` over OCDBT without compression, waiting included) get the same tree and the
same processes of one ``jax.distributed`` job on this machine, with one CPU device each. Every trial is a new group, and
the contenders take turns:

    speed     256 MiB in 16 arrays, each cut into rows over all processes: seconds until the save is durable everywhere,
              and of a restore onto the same mesh (process 0 has read all files before)
    columns   the same checkpoint restored with the arrays cut into columns: seconds, and bytes that were read
    failure   process 1 of 2 may write files of 100 kB at most (RLIMIT_FSIZE): seconds until each process has an error,
              whether it names process 1, and whether it says that a file was too large; Orbax with a timeout of 40 s

Seconds are the longest of all processes. Bytes read are from /proc/self/io (``rchar``).
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

LIBRARIES = ("jaxckpt", "orbax")
TRIAL_TIMEOUT_S = 300
ORBAX_TIMEOUT_S = 40
ARRAYS, SHAPE = 16, (2048, 2048)


def make_tree(axis: int | None, *, arrays: int = ARRAYS) -> dict[str, Any]:
    import jax
    import numpy as np
    from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

    mesh = Mesh(np.array(jax.devices(), dtype=object), ("x",), axis_types=(AxisType.Auto,))
    spec = PartitionSpec("x") if axis == 0 else PartitionSpec(None, "x")
    values = np.random.default_rng(1).standard_normal(SHAPE, np.float32)
    sharding = NamedSharding(mesh, spec)
    return {
        f"array {number}": jax.make_array_from_callback(SHAPE, sharding, lambda index: values[index])
        for number in range(arrays)
    }


def save(library: str, path: Path, tree: Any) -> None:
    if library == "jaxckpt":
        import jaxckpt

        jaxckpt.save(path, tree)
        return
    import orbax.checkpoint as ocp

    handler = ocp.PyTreeCheckpointHandler(use_compression=False)
    options = ocp.AsyncOptions(timeout_secs=ORBAX_TIMEOUT_S)
    with ocp.AsyncCheckpointer(handler, async_options=options) as checkpointer:
        checkpointer.save(path, args=ocp.args.PyTreeSave(tree))
        checkpointer.wait_until_finished()


def restore(library: str, path: Path, like: Any) -> Any:
    if library == "jaxckpt":
        import jaxckpt

        return jaxckpt.restore(path, like)
    import orbax.checkpoint as ocp

    arguments = ocp.checkpoint_utils.construct_restore_args(like)
    with ocp.PyTreeCheckpointer() as checkpointer:
        return checkpointer.restore(path, args=ocp.args.PyTreeRestore(like, restore_args=arguments))


def read_all(path: Path) -> None:
    """Brings the files into the page cache; who writes past it would be read from the disk otherwise."""
    for file in path.rglob("*"):
        if file.is_file():
            file.read_bytes()


def bytes_read() -> int:
    fields = Path("/proc/self/io").read_text(encoding="ascii").split()
    return int(fields[fields.index("rchar:") + 1])


def speed(library: str, path: Path) -> dict[str, Any]:
    import jax
    from jax.experimental import multihost_utils

    rows = jax.block_until_ready(make_tree(0))
    columns = jax.block_until_ready(make_tree(1))
    figures: dict[str, Any] = {}
    multihost_utils.sync_global_devices("begin")
    began_s = time.perf_counter()
    save(library, path, rows)
    figures["save_s"] = time.perf_counter() - began_s
    for name, like in (("rows", rows), ("columns", columns)):
        if jax.process_index() == 0:
            read_all(path)
        multihost_utils.sync_global_devices(name)
        before = bytes_read()
        began_s = time.perf_counter()
        restored = jax.block_until_ready(restore(library, path, like))
        figures[f"{name}_s"] = time.perf_counter() - began_s
        figures[f"{name}_bytes"] = bytes_read() - before
        same = jax.tree.map(lambda a, b: (a == b).all(), restored, like)
        if not all(bool(jax.block_until_ready(each)) for each in jax.tree.leaves(same)):
            raise AssertionError(f"{library} restored other values")
    return figures


def failure(library: str, path: Path) -> dict[str, Any]:
    import jax
    from jax.experimental import multihost_utils

    tree = jax.block_until_ready(make_tree(0, arrays=2))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    if jax.process_index() == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
    multihost_utils.sync_global_devices("begin")
    began_s = time.perf_counter()
    text = ""
    try:
        save(library, path, tree)
    except Exception as error:  # noqa: BLE001  whatever it raises is the result
        text = str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return {
        "error_s": time.perf_counter() - began_s,
        "raised": bool(text),
        "names_process": "process 1" in text or "task:1" in text.replace(" ", ""),
        "names_cause": "too large" in text.lower() or "EFBIG" in text,
    }


TRIALS = {"speed": speed, "failure": failure}


def worker(trial: str, library: str, path: str, port: str, index: int, count: int) -> None:
    import jax

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 1)
    jax.distributed.initialize(
        f"localhost:{port}", num_processes=count, process_id=index, cluster_detection_method="deactivate"
    )
    figures = TRIALS[trial](library, Path(path))
    print(json.dumps(figures), flush=True)
    from jax.experimental import multihost_utils

    multihost_utils.sync_global_devices("end")


def run_trial(trial: str, library: str, directory: Path, count: int) -> list[dict[str, Any]]:
    """One group; what each process measured."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    place = Path(tempfile.mkdtemp(dir=directory))
    command = [
        sys.executable,
        "-m",
        "benchmarks.groups",
        "--worker",
        trial,
        library,
        str(place / "checkpoint"),
        port,
    ]
    processes = [
        subprocess.Popen(
            [*command, str(index), str(count)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for index in range(count)
    ]
    try:
        results = []
        for process in processes:
            out, err = process.communicate(timeout=TRIAL_TIMEOUT_S)
            if process.returncode:
                raise RuntimeError(f"{trial} of {library} ended with {process.returncode}:\n{err[-2000:]}")
            results.append(json.loads(out.splitlines()[-1]))
        return results
    finally:
        for process in processes:
            process.kill()
        shutil.rmtree(place, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dir", default=tempfile.gettempdir())
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--worker", nargs=6, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        trial, library, path, port, index, count = arguments.worker
        worker(trial, library, path, port, int(index), int(count))
        return
    directory = Path(arguments.dir)
    figures: dict[str, dict[str, list[Any]]] = {library: {} for library in LIBRARIES}
    for _ in range(arguments.repeat):
        for trial, count in (("speed", arguments.processes), ("failure", 2)):
            for library in LIBRARIES:
                results = run_trial(trial, library, directory, count)
                for name in results[0]:
                    values = [result[name] for result in results]
                    total = (
                        sum(values)
                        if name.endswith("_bytes")
                        else max(values)
                        if name.endswith("_s")
                        else values
                    )
                    figures[library].setdefault(name, []).append(total)
    leaf_bytes = ARRAYS * SHAPE[0] * SHAPE[1] * 4
    print(f"{arguments.processes} processes, {os.cpu_count()} cores; medians [min-max] of {arguments.repeat}")
    for name in figures["jaxckpt"]:
        for library in LIBRARIES:
            values = figures[library][name]
            if name.endswith("_bytes"):
                text = f"{statistics.median(values) / leaf_bytes:.3f} x the bytes of the arrays"
            elif name.endswith("_s"):
                text = f"{statistics.median(values):.2f} s [{min(values):.2f}-{max(values):.2f}]"
            else:
                text = ", ".join(str(value) for value in values[0])
            print(f"{name:15} {library:8} {text}")


if __name__ == "__main__":
    main()
