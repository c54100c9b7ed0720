"""Training in several processes: one of them is killed, and the job goes on with fewer.

    python examples/multiprocess.py            # the whole story on this machine: less than a minute on two cores
    python examples/multiprocess.py --dir out  # the same, and `out` is kept to look at

The story: four processes with one device each train one model on scikit-learn's handwritten digits. Its state is
sharded over all of them, and all save it together. One process is killed (SIGKILL); the others notice. Then two
processes with two devices each resume from the newest committed checkpoint and train to the end. Every shard that
they restore is compared with what the first four had in memory at that step.

On a cluster, start this in every process:

    python examples/multiprocess.py train DIRECTORY

`jax.distributed.initialize()` then learns from the environment who is who (MULTIPROCESS.md says how), and
DIRECTORY is the same for all. If the job is started again, on as many processes or not, it goes on by itself.

What several processes need is in `train`: they connect, and make every call together. Saving and resuming look as they
do in one process.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
from sklearn.datasets import load_digits

import jaxckpt

SEED = 7
STEPS = 40
SAVE_EVERY = 5
BATCH = 64
WIDTH = 512
OPTIMIZER = optax.adam(1e-3)

# Process 2 is killed when it has told of this step.
KILLED_PROCESS = 2
KILLED_AFTER_STEP = 23
# After so long without a sign of life jax takes a process for dead. Its default is 100 s.
HEARTBEAT_TIMEOUT_S = 10
# The reduction over other processes adds the same numbers in another order.
LOSS_TOLERANCE = 1e-3
# A group takes about ten seconds; one that takes this long hangs.
GROUP_TIMEOUT_S = 120.0

Tree = Any


# ---------------------------------------------------------------------------------------------------------------
# A model whose state is sharded over all devices of all processes
# ---------------------------------------------------------------------------------------------------------------


def init_state() -> Tree:
    """The state of the training at step 0."""
    keys = jax.random.split(jax.random.key(SEED), 3)
    sizes = [64, WIDTH, WIDTH, 10]
    params = {
        f"layer_{number}": {
            "kernel": jax.random.normal(key, (sizes[number], sizes[number + 1])) / sizes[number] ** 0.5,
            "bias": jnp.zeros(sizes[number + 1]),
        }
        for number, key in enumerate(keys)
    }
    return {"params": params, "optimizer": OPTIMIZER.init(params)}


def loss_of(params: Tree, images: jax.Array, labels: jax.Array) -> jax.Array:
    """The mean cross-entropy."""
    x = images
    for layer in ("layer_0", "layer_1"):
        x = jax.nn.relu(x @ params[layer]["kernel"] + params[layer]["bias"])
    logits = x @ params["layer_2"]["kernel"] + params["layer_2"]["bias"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


@functools.partial(jax.jit, donate_argnames="state")
def train_step(state: Tree, images: jax.Array, labels: jax.Array) -> tuple[Tree, jax.Array]:
    """The next state, in the memory of the old one, and the loss before the update."""
    loss, gradients = jax.value_and_grad(loss_of)(state["params"], images, labels)
    updates, optimizer = OPTIMIZER.update(gradients, state["optimizer"], state["params"])
    return {"params": optax.apply_updates(state["params"], updates), "optimizer": optimizer}, loss


def shard(mesh: Mesh, leaf: Any) -> Any:
    """The leaf's shape and dtype, with a sharding: matrices are cut by rows, everything else is replicated."""
    spec = P("data") if leaf.ndim == 2 else P()
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))


class Digits:
    """Scikit-learn's 1,797 handwritten digits, 8 x 8 pixels each, spread over all devices."""

    def __init__(self, mesh: Mesh) -> None:
        images, labels = load_digits(return_X_y=True)
        self._images = (images / 16).astype(np.float32)
        self._labels = labels.astype(np.int32)
        self._sharding = NamedSharding(mesh, P("data"))

    def batch(self, step: int) -> tuple[jax.Array, jax.Array]:
        """The batch of a step, which depends on nothing else. Each process makes the part of its own devices."""
        rows = np.random.default_rng([SEED, step]).integers(len(self._images), size=BATCH)
        images, labels = (
            jax.make_array_from_callback(array.shape, self._sharding, array.__getitem__)
            for array in (self._images[rows], self._labels[rows])
        )
        return images, labels


# ---------------------------------------------------------------------------------------------------------------
# What every process does
# ---------------------------------------------------------------------------------------------------------------


def train(directory: Path) -> None:
    """Trains from the newest checkpoint, or from the start, to the last step."""
    mesh = Mesh(np.array(jax.devices()), ("data",), axis_types=(AxisType.Auto,))
    digits = Digits(mesh)
    like = jax.tree.map(functools.partial(shard, mesh), jax.eval_shape(init_state))

    # All processes make the manager with the same arguments, and call it at the same points.
    manager = jaxckpt.CheckpointManager(
        directory, save_interval_steps=SAVE_EVERY, max_to_keep=3, on_event=tell_event
    )
    resumed = manager.resume(like=like)
    if resumed is not None:
        step, state = resumed
        tell("resumed", step=step, digests=digests_of(state))
    else:
        step = 0
        shardings = jax.tree.map(lambda leaf: leaf.sharding, like)
        state = jax.jit(init_state, out_shardings=shardings)()
    with manager:
        while step < STEPS:
            state, loss = train_step(state, *digits.batch(step))
            step += 1
            # Forced CPU devices need it: with two in a process, two steps in flight could wait for each other for ever.
            jax.block_until_ready(state)
            if step % SAVE_EVERY == 0:
                tell("digests", step=step, digests=digests_of(state))
            tell("step", step=step, loss=float(loss))
            manager.save(step, state, metrics={"loss": float(loss)})
    tell("end", step=step)


def digests_of(state: Tree) -> dict[str, str]:
    """A SHA-256 of each shard that this process holds, by the key of the leaf and its place."""
    digests = {}
    for path, leaf in jax.tree.leaves_with_path(state):
        key = jax.tree_util.keystr(path, simple=True, separator="/")
        for part in leaf.addressable_shards:
            place = [index.indices(size)[:2] for index, size in zip(part.index, leaf.shape, strict=True)]
            digests[f"{key} {place}"] = hashlib.sha256(np.asarray(part.data).tobytes()).hexdigest()
    return digests


def tell_event(event: jaxckpt.CheckpointEvent) -> None:
    """Reports what the manager did."""
    if event.kind in ("saved", "failed", "deleted"):
        tell(event.kind, step=event.step, message=event.message)


def tell(event: str, **facts: Any) -> None:
    """One line of JSON, in one piece, for saves are reported by a thread of their own."""
    sys.stdout.write(json.dumps({"event": event, **facts}) + "\n")
    sys.stdout.flush()


# ---------------------------------------------------------------------------------------------------------------
# The orchestrator: starts the processes, kills one, starts again. On a cluster, its scheduler does this.
# ---------------------------------------------------------------------------------------------------------------


class DemoError(Exception):
    """Something that this demo promises did not hold."""


class Process:
    """One process of a job. What it tells is read by a thread of its own."""

    def __init__(self, index: int, command: list[str | Path], environment: dict[str, str], log: Path) -> None:
        self.index = index
        self.events: list[dict[str, Any]] = []
        self.log = log
        with log.open("wb") as stderr:
            self._popen = subprocess.Popen(
                command, env=environment, stdout=subprocess.PIPE, stderr=stderr, text=True
            )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._popen.stdout is not None
        for line in self._popen.stdout:
            if line.startswith("{"):  # Gloo, which connects CPU devices, has a line for each connection
                self.events.append(json.loads(line))

    def told(self, kind: str) -> list[dict[str, Any]]:
        """The events of one kind, in order."""
        return [event for event in list(self.events) if event["event"] == kind]

    @property
    def last_step(self) -> int:
        """The step that it told last, or 0."""
        steps = self.told("step")
        return steps[-1]["step"] if steps else 0

    @property
    def status(self) -> int | None:
        """The exit status, negative for a signal; None while it runs."""
        return self._popen.poll()

    def kill(self) -> None:
        """SIGKILL: no handler, no cleanup, no last word."""
        self._popen.kill()
        self._popen.wait()
        self._reader.join()


@contextlib.contextmanager
def job(directory: Path, logs: Path, process_count: int, device_count: int) -> Iterator[list[Process]]:
    """The processes of one job, which are ended when the block is left, whatever happens."""
    port = free_port()
    environment = dict(os.environ)
    environment.pop("JAX_NUM_CPU_DEVICES", None)
    # The flag that is given last counts.
    flags = f"{environment.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={device_count}"
    environment |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    processes: list[Process] = []
    try:
        for index in range(process_count):
            command: list[str | Path] = [sys.executable, Path(__file__).absolute(), "train", directory]
            command += [
                "--coordinator",
                f"localhost:{port}",
                "--processes",
                str(process_count),
                "--process",
                str(index),
            ]
            log = logs / f"{process_count}-processes-{index}.log"
            processes.append(Process(index, command, environment, log))
        yield processes
    finally:
        for process in processes:
            process.kill()


def free_port() -> int:
    """A port below those that the system gives away, so that nobody else is given it before process 0 binds it."""
    for port in random.sample(range(20_000, 32_000), 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("localhost", port))
            return port
    raise DemoError("no port is free")


def wait_until(is_so: Any, what: str, processes: list[Process], timeout_s: float = GROUP_TIMEOUT_S) -> None:
    """Waits for a condition; raises if it takes too long or a process ends with an error meanwhile."""
    deadline = time.monotonic() + timeout_s
    while not is_so():
        failed = [process for process in processes if process.status]
        if failed or time.monotonic() > deadline:
            process = (failed or processes)[0]
            raise DemoError(f"{what}: process {process.index}: {process.status}\n{process.log.read_text()}")
        time.sleep(0.02)


def tell_the_story(directory: Path) -> None:
    """Runs both jobs, and raises DemoError where something does not hold."""
    started = time.monotonic()
    run, logs = directory / "run", directory / "logs"
    logs.mkdir()

    say(f"1. Four processes with one device each train together, and save every {SAVE_EVERY} steps")
    with job(run, logs, 4, 1) as first:
        victim = first[KILLED_PROCESS]
        wait_until(lambda: victim.last_step >= KILLED_AFTER_STEP, "the first job", first)
        victim.kill()
        killed_s = time.monotonic()
        show_steps(first[0])
        say(f"   process {victim.index} is killed after step {victim.last_step}")
        others = [process for process in first if process is not victim]
        while any(process.status is None for process in others):
            if time.monotonic() > killed_s + 3 * HEARTBEAT_TIMEOUT_S:
                raise DemoError("the others did not notice")
            time.sleep(0.02)
        say(
            f"   the others ended {time.monotonic() - killed_s:.1f} s later: {', '.join(map(ending_of, others))}"
        )

    newest = jaxckpt.CheckpointManager(run).latest_step()
    if newest is None:
        raise DemoError("nothing was committed")
    say(f"   the newest committed checkpoint is that of step {newest}")

    say("2. Two processes with two devices each resume, and train to the end")
    with job(run, logs, 2, 2) as second:
        wait_until(lambda: all(process.status is not None for process in second), "the second job", second)
    check_same_values(first, second, newest)
    say(f"   resumed from step {newest}: every shard is what the four had in memory, bit for bit")
    show_steps(second[0])
    difference = check_close_losses(first[0], second[0])
    say(f"   where both trained, the losses differ by at most {difference:.0e}")
    manager = jaxckpt.CheckpointManager(run)
    if manager.latest_step() != STEPS or not jaxckpt.verify(manager.path_of(STEPS)).ok:
        raise DemoError("the last step was not saved")
    say(f"   steps {', '.join(map(str, manager.steps()))} are there, and step {STEPS} is whole")
    say(f"Everything held, in {time.monotonic() - started:.0f} s.")


def check_same_values(first: list[Process], second: list[Process], step: int) -> None:
    """Each restored shard has the bytes that some process of the first job had in memory at that step."""
    saved = {
        place: digest
        for process in first
        for event in process.told("digests")
        if event["step"] == step
        for place, digest in event["digests"].items()
    }
    for process in second:
        (resumed,) = process.told("resumed") or [{"step": None, "digests": {}}]
        if resumed["step"] != step:
            raise DemoError(f"process {process.index} resumed from step {resumed['step']}, not from {step}")
        different = [place for place, digest in resumed["digests"].items() if saved.get(place) != digest]
        if different:
            raise DemoError(
                f"process {process.index}: {len(different)} shards differ, the first is {different[0]}"
            )


def check_close_losses(before: Process, after: Process) -> float:
    """Gives the largest relative difference between losses of the same step."""
    expected = {event["step"]: event["loss"] for event in before.told("step")}
    losses = {event["step"]: event["loss"] for event in after.told("step")}
    common = expected.keys() & losses.keys()
    largest = max((abs(losses[step] - expected[step]) / expected[step] for step in common), default=0.0)
    # Said this way round, a NaN fails too.
    if not largest <= LOSS_TOLERANCE:
        raise DemoError(f"losses differ by {largest:.2g}")
    return largest


def ending_of(process: Process) -> str:
    """As in "process 1 by SIGABRT"."""
    status = process.status or 0
    how = f"by {signal.Signals(-status).name}" if status < 0 else f"with status {status}"
    return f"process {process.index} {how}"


def show_steps(process: Process) -> None:
    """The losses at which it saved."""
    for event in process.told("step"):
        if event["step"] % (2 * SAVE_EVERY) == 0:
            say(f"   step {event['step']:3d}  loss {event['loss']:.4f}")


def say(text: str) -> None:
    """One line for the reader, now."""
    print(text, flush=True)


# ---------------------------------------------------------------------------------------------------------------


def run_demo(directory: Path | None) -> int:
    """The exit status: 0 if everything held."""
    is_temporary = directory is None
    directory = Path(tempfile.mkdtemp(prefix="jaxckpt-demo-")) if directory is None else directory.absolute()
    directory.mkdir(parents=True, exist_ok=True)
    if any(directory.iterdir()):
        print(f"{directory} is not empty: choose a new folder", file=sys.stderr)
        return 2
    try:
        tell_the_story(directory)
    except DemoError as error:
        print(f"FAILED: {error}", file=sys.stderr)
        return 1
    finally:
        if is_temporary:
            shutil.rmtree(directory, ignore_errors=True)
    return 0


def main() -> int:
    """Runs the demo, or one process of a job."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--dir", type=Path, help="new or empty folder, kept at the end (default: a temporary one)"
    )
    worker = parser.add_subparsers(dest="worker").add_parser("train", help="one process of a job")
    worker.add_argument("directory", type=Path)
    worker.add_argument("--coordinator", help="host:port of process 0 (default: what the cluster says)")
    worker.add_argument("--processes", type=int)
    worker.add_argument("--process", type=int)
    arguments = parser.parse_args()
    if arguments.worker is None:
        return run_demo(arguments.dir)
    jax.distributed.initialize(
        arguments.coordinator,
        arguments.processes,
        arguments.process,
        heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT_S,
    )
    train(arguments.directory)
    return 0


if __name__ == "__main__":
    sys.exit(main())
