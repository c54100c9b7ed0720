"""What do jaxckpt and Orbax do with the same awkward inputs? The comparison in the README comes from here.

    python -m benchmarks.behaviour [--trials N]

Both are called with default arguments (Orbax: `StandardCheckpointer`, and `CheckpointManager` for what concerns
managers). Each row runs in fresh processes, and prints what happened; nothing is judged by this script but whether
restored bytes are the saved ones.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

LIBRARIES = ("jaxckpt", "orbax")
TRIAL_TIMEOUT_S = 300

Point = collections.namedtuple("Point", "x y")  # noqa: PYI024  a plain namedtuple, as optax states are


def save(library: str, path: Path, tree: Any) -> None:
    if library == "jaxckpt":
        import jaxckpt

        jaxckpt.save(path, tree)
        return
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, tree)


def restore(library: str, path: Path, like: Any = None) -> Any:
    if library == "jaxckpt":
        import jaxckpt

        return jaxckpt.restore(path, like=like)
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(path, like)


def outcome(library: str, name: str, scratch: Path) -> str:
    """Runs one row in this process."""
    try:
        return ROWS[name](library, scratch)
    except Exception as error:  # noqa: BLE001  whatever it is, it is the result
        return f"raises {type(error).__name__}: {str(error).splitlines()[0][:70]}"


def example_array() -> Any:
    import jax
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    values = np.arange(1 << 18, dtype=np.float32).reshape(512, 512)
    sharding = NamedSharding(Mesh(np.array(jax.devices()), ("x",)), PartitionSpec("x"))
    return jax.device_put(values, sharding)


def save_on_all_devices(library: str, scratch: Path) -> str:
    save(library, scratch / "c", {"w": example_array()})
    return "saved"


def restore_on_these_devices(library: str, scratch: Path) -> str:
    import numpy as np

    restored = restore(library, scratch / "c")["w"]
    same = np.array_equal(restored, np.arange(1 << 18, dtype=np.float32).reshape(512, 512))
    return "restores" if same else "restores wrong values"


def flip_a_bit(library: str, scratch: Path) -> str:
    import jax
    import numpy as np

    # Raw bytes of the array, wherever the library keeps them: its largest file.
    tree = {"w": jax.numpy.asarray(np.random.default_rng(0).standard_normal((256, 1024), np.float32))}
    save(library, scratch / "c", tree)
    largest = max(
        (path for path in (scratch / "c").rglob("*") if path.is_file()), key=lambda path: path.stat().st_size
    )
    data = bytearray(largest.read_bytes())
    place = random.Random(os.environ["JAXCKPT_TRIAL"]).randrange(len(data) // 8, len(data) * 7 // 8)
    data[place] ^= 1 << (place % 8)
    largest.write_bytes(data)
    restored = restore(library, scratch / "c", tree)["w"]
    return "no error, right values" if np.array_equal(restored, tree["w"]) else "no error, WRONG VALUES"


def restore_like_another_dtype(library: str, scratch: Path) -> str:
    import jax
    import jax.numpy as jnp

    save(library, scratch / "c", {"w": jnp.asarray([300.7, -1.5])})
    restored = restore(library, scratch / "c", {"w": jax.ShapeDtypeStruct((2,), jnp.int8)})["w"]
    return f"float32 [300.7, -1.5] comes back as int8 {restored.tolist()}"


def save_odd_leaves(library: str, scratch: Path) -> str:
    import jax.numpy as jnp

    odd = {
        "zero-size array": {"a": jnp.zeros((0, 3))},
        "empty tree": {},
        "bytes": {"a": b"x"},
        "complex": {"a": 1 + 2j},
        "uint4": {"a": jnp.ones(4, jnp.uint4)},
    }
    refused = []
    for number, (name, tree) in enumerate(odd.items()):
        try:
            save(library, scratch / str(number), tree)
            restore(library, scratch / str(number))
        except Exception:  # noqa: BLE001  which one does not matter here
            refused.append(name)
    return f"refused: {', '.join(refused) or 'none'}"


def restore_containers(library: str, scratch: Path) -> str:
    import jax.numpy as jnp

    save(library, scratch / "c", {1: (jnp.ones(1), Point(jnp.ones(1), jnp.ones(1)))})
    restored = restore(library, scratch / "c")
    ((key, pair),) = restored.items()
    return f"int key -> {type(key).__name__}, tuple -> {type(pair).__name__}, namedtuple -> {type(pair[1]).__name__}"


# --- managers -----------------------------------------------------------------------------------------------


class Manager:
    """The few verbs that the managers of both have; two steps are kept, the best ones of a metric or the newest."""

    def __init__(self, library: str, directory: Path, *, best: str | None = None) -> None:
        self._library = library
        if library == "jaxckpt":
            import jaxckpt

            self._manager: Any = jaxckpt.CheckpointManager(
                directory,
                save_interval_steps=1,
                max_to_keep=None if best else 2,
                best=jaxckpt.Best(best, keep=2) if best else None,
                time_to_live_s=1e-9 if best else None,  # so that nothing but `best` and the newest stays
            )
            return
        import orbax.checkpoint as ocp

        options = ocp.CheckpointManagerOptions(
            max_to_keep=2, best_fn=(lambda metrics: metrics[best]) if best else None, best_mode="min"
        )
        self._manager = ocp.CheckpointManager(directory, options=options)

    def save(self, step: int, tree: Any, metrics: dict[str, float] | None = None) -> None:
        if self._library == "jaxckpt":
            self._manager.save(step, tree, metrics=metrics)
            return
        import orbax.checkpoint as ocp

        self._manager.save(step, args=ocp.args.StandardSave(tree), metrics=metrics)

    def wait(self) -> None:
        if self._library == "jaxckpt":
            self._manager.wait()
        else:
            self._manager.wait_until_finished()

    def steps(self) -> list[int]:
        return list(self._manager.steps() if self._library == "jaxckpt" else self._manager.all_steps())

    def latest(self) -> int | None:
        return self._manager.latest_step()


def small_tree(value: float) -> Any:
    """4 MiB in four arrays."""
    import jax
    import jax.numpy as jnp

    return jax.block_until_ready({f"leaf{number}": jnp.full(1 << 18, value) for number in range(4)})


def limit_file_size(nbytes: int) -> None:
    """From here on a write behind so many bytes fails."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, resource.RLIM_INFINITY))


def fail_in_the_background(library: str, scratch: Path) -> str:
    """The save of step 3 fails, the others do not, and nobody waits in between."""
    manager = Manager(library, scratch)
    story: dict[str, Any] = {}
    for step in range(1, 6):
        if step == 3:
            manager.wait()
            limit_file_size(1 << 18)
        try:
            manager.save(step, small_tree(step))
        except Exception as error:  # noqa: BLE001  whatever it is, it is the result
            story[f"save({step})"] = f"raises {type(error).__name__}"
        if step == 3:
            time.sleep(3)  # the save has failed by then
            limit_file_size(resource.RLIM_INFINITY)
            story["latest_step() after the failure"] = manager.latest()
    try:
        manager.wait()
    except Exception as error:  # noqa: BLE001
        story["wait() at the end"] = f"raises {type(error).__name__}"
    story["steps at the end, of which 2 shall stay"] = manager.steps()
    story["on disk"] = sorted(entry.name for entry in scratch.iterdir())
    return json.dumps(story)


def fail_unnoticed(library: str, scratch: Path) -> str:
    """The program ends without waiting for its last save, which fails; its exit status is the result."""
    manager = Manager(library, scratch)
    manager.save(1, small_tree(1))
    manager.wait()
    limit_file_size(1 << 18)
    manager.save(2, small_tree(2))
    return "ended"


def keep_the_best(library: str, scratch: Path) -> str:
    """Two of five steps are kept, and the first ones are the best."""
    manager = Manager(library, scratch, best="loss")
    for step in range(5):
        manager.save(step, small_tree(step), {"loss": float(step)})
        manager.wait()
    return f"of steps 0 to 4, whose first ones are the best, {manager.steps()} stay"


ROWS = {
    "save on 8": save_on_all_devices,
    "open on 1": restore_on_these_devices,
    "flipped bit": flip_a_bit,
    "other dtype": restore_like_another_dtype,
    "odd leaves": save_odd_leaves,
    "containers": restore_containers,
    "failure": fail_in_the_background,
    "unnoticed": fail_unnoticed,
    "best 2": keep_the_best,
}


def in_fresh_process(library: str, row: str, scratch: Path, devices: int, trial: int = 0) -> str:
    environment = dict(os.environ)
    environment["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
    environment["JAX_PLATFORMS"] = "cpu"
    environment["JAXCKPT_TRIAL"] = str(trial)
    command = [
        sys.executable,
        "-m",
        "benchmarks.behaviour",
        "--row",
        row,
        "--library",
        library,
        "--dir",
        str(scratch),
    ]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=TRIAL_TIMEOUT_S, check=False
    )
    if row == "unnoticed":
        return f"exit status {done.returncode}"
    if done.returncode:
        return f"the process ended with {done.returncode}: {done.stderr.strip().splitlines()[-1][:80]}"
    return done.stdout.strip().splitlines()[-1]


def compare(library: str, trials: int) -> None:
    rows = ("other dtype", "odd leaves", "containers", "failure", "unnoticed", "best 2")
    scratch = Path(tempfile.mkdtemp(prefix="jaxckpt-behaviour-"))
    try:
        in_fresh_process(library, "save on 8", scratch, 8)
        print(f"{library:8s} saved on 8, opened on 1: {in_fresh_process(library, 'open on 1', scratch, 1)}")
        outcomes: collections.Counter[str] = collections.Counter()
        for trial in range(trials):
            place = scratch / f"flip-{trial}"
            place.mkdir()
            outcomes[in_fresh_process(library, "flipped bit", place, 1, trial).partition(":")[0]] += 1
        for text, count in outcomes.items():
            print(f"{library:8s} one flipped bit of array data: {count} of {trials}: {text}")
        for row in rows:
            place = scratch / row.replace(" ", "-")
            place.mkdir()
            print(f"{library:8s} {row}: {in_fresh_process(library, row, place, 1)}")
    finally:
        shutil.rmtree(scratch)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=20, help="flipped bits for each library")
    parser.add_argument("--row", choices=ROWS, help=argparse.SUPPRESS)
    parser.add_argument("--library", choices=LIBRARIES, help="only this one")
    parser.add_argument("--dir", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.row:
        print(outcome(arguments.library, arguments.row, Path(arguments.dir)))
        return
    for library in [arguments.library] if arguments.library else LIBRARIES:
        compare(library, arguments.trials)


if __name__ == "__main__":
    main()
