"""Does a long run with many saves need more and more of anything?

A process of its own trains a small model on and on, and saves at every step while it trains on. At quiet moments, when
nothing is in flight, it measures what a leak would make grow: memory, objects, file descriptors, threads, the
containers of the package's modules, and the directory of the checkpoints. Run with ``-s`` to see the figures.
"""

from __future__ import annotations

import itertools
import json
import os
import pathlib
import shutil
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import pytest

from .helpers import run_fork

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self"),
]

MIB = 1 << 20

PROGRAM = """
    import errno, functools, gc, json, logging, os, pathlib, sys, threading, weakref
    import jax, jax.numpy as jnp, numpy as np
    import jaxckpt
    from jaxckpt._staging import HOST_MEMORY
    from jaxckpt._store import Kernel, LocalStore

    logging.getLogger("jaxckpt").setLevel(logging.CRITICAL)  # failures are expected
    root, saves, measure_every, fail_every, reopen_every = sys.argv[1], *map(int, sys.argv[2:])

    class FullDisk(Kernel):
        is_full = False

        def pwrite(self, *arguments):
            if self.is_full:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return os.pwrite(*arguments)

    @functools.partial(jax.jit, donate_argnums=0)
    def train(state):
        gradient = {"w": state["w"] @ state["w"].T @ state["w"] - state["w"], "b": state["b"] - 1}
        new = {name: state[name] - 0.01 * gradient[name] for name in gradient}
        return new | {"steps": state["steps"] + 1, "key": jax.random.split(state["key"])[0]}, jnp.sum(new["w"] ** 2)

    def open_manager():
        return jaxckpt.CheckpointManager(
            LocalStore(root, disk), max_to_keep=3, best=jaxckpt.Best("loss"), on_event=note
        )

    def note(event):
        counts[event.kind] = counts.get(event.kind, 0) + 1

    def status(name):
        for line in pathlib.Path("/proc/self/status").read_text().splitlines():
            if line.startswith(name + ":"):
                return int(line.split()[1]) * 1024

    def contents(value):
        if isinstance(value, (list, dict, set, weakref.WeakSet)):
            return len(value)
        return value.cache_info().currsize if hasattr(value, "cache_info") else 0

    def measure():
        gc.collect()
        modules = [module for name, module in sorted(sys.modules.items()) if name.startswith("jaxckpt")]
        files = [path for path in pathlib.Path(root).rglob("*") if path.is_file()]
        return {
            "saves": step,
            "rss": status("VmRSS"),
            "address_space": status("VmSize"),
            "descriptors": len(os.listdir("/proc/self/fd")),
            "threads": status("Threads") // 1024,
            "python_threads": threading.active_count(),
            "objects": len(gc.get_objects()),
            "arrays": len(jax.live_arrays()),
            "containers": sum(contents(value) for module in modules for value in vars(module).values()),
            "idle_buffers": len(HOST_MEMORY._idle),
            "bytes_in_use": HOST_MEMORY.bytes_in_use,
            "files": len(files),
            "bytes": sum(path.stat().st_size for path in files),
        }

    disk = FullDisk()
    counts = {}
    manager = open_manager()
    key = jax.random.key(0)
    state = {"w": jnp.eye(24), "b": jnp.zeros(100, jnp.bfloat16), "steps": jnp.int32(0), "key": key}
    figures = []
    for step in range(1, saves + 1):
        state, loss = train(state)
        fails = bool(fail_every) and step % fail_every == 0
        if fails:
            manager.wait()
            disk.is_full = True
        pending = manager.save(step, state, metrics={"loss": loss}, items={"position": step, "host": np.arange(9)})
        assert pending is not None
        if fails:
            try:
                manager.wait()
                raise AssertionError("a full disk was not noticed")
            except jaxckpt.WriteError:
                disk.is_full = False
        del pending
        if reopen_every and step % reopen_every == 0:
            manager.close()
            manager = open_manager()
            assert manager.latest_step() == step
        if step % measure_every == 0:
            manager.wait()
            figures.append(measure())
    restored = manager.restore(like=state)
    assert int(restored["steps"]) == manager.latest_step() == (saves - 1 if fails else saves)
    manager.close()
    print(json.dumps({"figures": figures, "events": counts, "steps": manager.steps()}))
"""


@pytest.fixture
def directory(tmp_path: pathlib.Path) -> Iterator[pathlib.Path]:
    """In memory, where thousands of syncs cost nothing, if there is such a place."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path / "run"
        return
    home = pathlib.Path(tempfile.mkdtemp(dir="/dev/shm"))
    yield home / "run"
    shutil.rmtree(home)


def soak(
    directory: pathlib.Path, saves: int, *, measure_every: int, fail_every: int = 0, reopen_every: int = 0
) -> dict[str, Any]:
    """Runs it; the last line that it prints are its findings."""
    result = run_fork(
        PROGRAM,
        directory,
        *map(str, (saves, measure_every, fail_every, reopen_every)),
        timeout_s=240,
    )
    findings = json.loads(result.stdout.splitlines()[-1])
    for row in findings["figures"]:
        print("  ".join(f"{name} {value}" for name, value in row.items()))
    print(findings["events"], findings["steps"])
    return findings


def assert_flat(figures: list[dict[str, int]], *, rss_growth_max: int) -> None:
    """The first figures are those after the warm-up."""
    first, last = figures[0], figures[-1]
    assert last["rss"] - first["rss"] < rss_growth_max
    # Each thread that ever ran at the same time as others may get an arena of 64 MiB, of which next to nothing is used.
    assert last["address_space"] - first["address_space"] < 256 * MIB
    # A leak of an object in ten saves shows in every window; what is made once, such as a cache, in one of them.
    growth = [after["objects"] - before["objects"] for before, after in itertools.pairwise(figures)]
    assert min(growth) < (figures[1]["saves"] - first["saves"]) // 10
    assert last["containers"] - first["containers"] <= 0
    # A thread that Python has joined may still be on its way out of the kernel.
    assert min(row["threads"] for row in figures[-3:]) <= min(row["threads"] for row in figures[:3])
    for name in ("descriptors", "python_threads", "arrays", "idle_buffers", "files"):
        assert {row[name] for row in figures} == {first[name]}, name
    assert all(row["bytes_in_use"] == 0 for row in figures)
    assert max(row["bytes"] for row in figures) - min(row["bytes"] for row in figures) < 1024


def test_800_saves_while_training_goes_on_leave_memory_handles_and_the_directory_as_they_were(directory):
    findings = soak(directory, 800, measure_every=100)
    assert findings["events"]["saved"] == 800
    assert_flat(findings["figures"], rss_growth_max=8 * MIB)


def test_saves_that_fail_leave_nothing_either(directory):
    findings = soak(directory, 200, measure_every=40, fail_every=10)
    assert findings["events"]["failed"] == 20
    assert_flat(findings["figures"], rss_growth_max=8 * MIB)


def test_managers_that_are_opened_again_and_again_leave_nothing_either(directory):
    findings = soak(directory, 200, measure_every=40, reopen_every=10)
    assert findings["events"]["saved"] == 200
    assert_flat(findings["figures"], rss_growth_max=8 * MIB)
