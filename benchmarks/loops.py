"""What does a manager of numbered checkpoints cost a training loop, and what does it say when a save fails?

    python -m benchmarks.loops [--dir D] [--saves N]

`jaxckpt.CheckpointManager` and Orbax's `CheckpointManager` (asynchronous, as its defaults are) get the same loop, each
trial in a fresh process, in turns:

    idle      microseconds of a call of `save` that is not due
    small     20 arrays of 400 bytes, saved at every step: milliseconds for which `save` blocks the loop
    large     64 MiB in 16 arrays, saved at every fifth step of 50 ms with donation: the same, and the steps' slowdown
    failure   the save of step 3 fails in the background (RLIMIT_FSIZE), the others do not; nobody waits in between
    best      keep the best 2 of 5 steps whose first ones are the best: is the newest there at the end?
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import timeit
from collections.abc import Callable
from pathlib import Path
from typing import Any

LIBRARIES = ("jaxckpt", "orbax")
TRIAL_TIMEOUT_S = 600


class Manager:
    """The few verbs that both have."""

    def __init__(
        self, library: str, directory: Path, *, interval: int = 1, keep: int = 2, best: str | None = None
    ) -> None:
        self.library = library
        if library == "jaxckpt":
            import jaxckpt

            self._manager: Any = jaxckpt.CheckpointManager(
                directory,
                save_interval_steps=interval,
                max_to_keep=None if best else keep,
                best=jaxckpt.Best(best, keep=keep) if best else None,
                time_to_live_s=1e-9 if best else None,  # so that nothing but `best` and the newest stays
            )
            return
        import orbax.checkpoint as ocp

        self._manager = ocp.CheckpointManager(
            directory,
            options=ocp.CheckpointManagerOptions(
                save_interval_steps=interval,
                max_to_keep=keep,
                best_fn=(lambda metrics: metrics[best]) if best else None,
                best_mode="min",
            ),
        )

    def save(self, step: int, tree: Any, metrics: dict[str, float] | None = None) -> Any:
        if self.library == "jaxckpt":
            return self._manager.save(step, tree, metrics=metrics)
        import orbax.checkpoint as ocp

        return self._manager.save(step, args=ocp.args.StandardSave(tree), metrics=metrics)

    def wait(self) -> None:
        if self.library == "jaxckpt":
            self._manager.wait()
        else:
            self._manager.wait_until_finished()

    def steps(self) -> list[int]:
        return list(self._manager.steps() if self.library == "jaxckpt" else self._manager.all_steps())

    def latest(self) -> int | None:
        return self._manager.latest_step()


def tree_of(leaves: int, nbytes: int, value: float) -> Any:
    import jax
    import jax.numpy as jnp

    return jax.block_until_ready(
        {f"leaf{number}": jnp.full(nbytes // leaves // 4, value) for number in range(leaves)}
    )


def idle(library: str, directory: Path, saves: int) -> dict[str, Any]:
    del saves
    tree = tree_of(20, 8000, 1.0)
    manager = Manager(library, directory, interval=10**6)
    manager.save(0, tree)
    manager.wait()
    calls = 2000
    seconds = min(timeit.repeat(lambda: manager.save(999, tree), number=calls, repeat=5)) / calls
    return {"microseconds": round(seconds * 1e6, 1)}


def small(library: str, directory: Path, saves: int) -> dict[str, Any]:
    tree = tree_of(20, 8000, 1.0)
    manager = Manager(library, directory)
    blocked_s = []
    for step in range(saves + 10):
        began_s = time.perf_counter()
        manager.save(step, tree)
        blocked_s.append(time.perf_counter() - began_s)
        manager.wait()
    return {"milliseconds": round(statistics.median(blocked_s[10:]) * 1e3, 2)}


def large(library: str, directory: Path, saves: int) -> dict[str, Any]:
    import jax

    # The step donates, as training does, and takes as long as it takes.
    step_of = jax.jit(lambda tree: jax.tree.map(lambda x: x * 1.0001, tree), donate_argnums=0)

    def train(tree: Any) -> tuple[Any, float]:
        began_s = time.perf_counter()
        tree = jax.block_until_ready(step_of(tree))
        own_s = time.perf_counter() - began_s
        time.sleep(max(0.0, 0.05 - own_s))
        return tree, own_s

    tree = tree_of(16, 64 << 20, 1.0)
    manager = Manager(library, directory, interval=5)
    quiet_s, blocked_s, step_s = [], [], []
    for _ in range(10):
        tree, _ = train(tree)
    for step in range(5 * saves):
        began_s = time.perf_counter()
        manager.save(step, tree)
        if step % 5 == 0:
            blocked_s.append(time.perf_counter() - began_s)
        tree, own_s = train(tree)
        step_s.append(own_s)
    manager.wait()
    for _ in range(40):
        tree, own_s = train(tree)
        quiet_s.append(own_s)
    slowdown_s = statistics.mean(step_s) - statistics.mean(quiet_s)
    return {
        "blocked_ms": round(statistics.median(blocked_s[3:]) * 1e3, 1),
        "slowdown_of_each_step_ms": round(slowdown_s * 1e3, 2),
    }


def failure(library: str, directory: Path, saves: int) -> dict[str, Any]:
    del saves
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    manager = Manager(library, directory)
    story: dict[str, Any] = {}
    for step in range(1, 6):
        if step == 3:
            manager.wait()
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 18, hard))
        try:
            manager.save(step, tree_of(4, 4 << 20, step))
        except Exception as error:  # noqa: BLE001  whatever it is, it is the result
            story[f"save({step})"] = f"raises {type(error).__name__}"
        if step == 3:
            time.sleep(3)  # the save has failed by then
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            story["latest_step() after the failure"] = manager.latest()
    try:
        manager.wait()
    except Exception as error:  # noqa: BLE001
        story["wait() at the end"] = f"raises {type(error).__name__}"
    story["steps at the end, of which 2 shall stay"] = manager.steps()
    story["on disk"] = sorted(entry.name for entry in directory.iterdir())
    return story


def unnoticed(library: str, directory: Path, saves: int) -> dict[str, Any]:
    """A program that ends without waiting for its last save, which fails; see the exit status."""
    del saves
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    manager = Manager(library, directory)
    manager.save(1, tree_of(4, 4 << 20, 1))
    manager.wait()
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 18, resource.RLIM_INFINITY))
    manager.save(2, tree_of(4, 4 << 20, 2))
    return {}


def best(library: str, directory: Path, saves: int) -> dict[str, Any]:
    del saves
    manager = Manager(library, directory, best="loss")
    for step in range(5):
        manager.save(step, tree_of(2, 800, step), {"loss": float(step)})
        manager.wait()
    return {"steps": manager.steps()}


ROWS: dict[str, Callable[[str, Path, int], dict[str, Any]]] = {
    "idle": idle,
    "small": small,
    "large": large,
    "failure": failure,
    "unnoticed": unnoticed,
    "best": best,
}


def in_fresh_process(library: str, row: str, saves: int, scratch: Path) -> str:
    directory = scratch / f"{library}-{row}"
    directory.mkdir()
    command = [sys.executable, "-m", "benchmarks.loops", "--row", row, "--library", library]
    command += ["--dir", str(directory), "--saves", str(saves)]
    environment = {**os.environ, "JAX_PLATFORMS": os.environ.get("JAX_PLATFORMS", "cpu")}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=TRIAL_TIMEOUT_S, check=False
    )
    shutil.rmtree(directory)
    lines = done.stdout.strip().splitlines()
    result = lines[-1] if lines else ""
    return f"{result}  exit status {done.returncode}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dir", type=Path, help="where to save (default: a temporary directory)")
    parser.add_argument("--saves", type=int, default=40, help="saves of the rows small and large")
    parser.add_argument("--repeat", type=int, default=3, help="trials of the rows idle, small and large")
    parser.add_argument("--only", choices=ROWS, help="only this row")
    parser.add_argument("--row", choices=ROWS, help=argparse.SUPPRESS)
    parser.add_argument("--library", choices=LIBRARIES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.row:
        result = ROWS[arguments.row](arguments.library, arguments.dir, arguments.saves)
        print(json.dumps(result))
        return
    scratch = Path(tempfile.mkdtemp(prefix="jaxckpt-loops-", dir=arguments.dir))
    try:
        for row in [arguments.only] if arguments.only else ROWS:
            for _ in range(arguments.repeat if row in ("idle", "small", "large") else 1):
                for library in LIBRARIES:
                    print(
                        f"{row:10s} {library:8s} {in_fresh_process(library, row, arguments.saves, scratch)}"
                    )
    finally:
        shutil.rmtree(scratch)


if __name__ == "__main__":
    main()
