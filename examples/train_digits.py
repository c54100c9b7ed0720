"""Training that is killed in the middle of a save, and goes on as if nothing had happened.

    python examples/train_digits.py            # the whole story: about a minute on two cores
    python examples/train_digits.py --dir out  # the same, and `out` is kept to look at

A small transformer learns scikit-learn's handwritten digits on a mesh of 8 devices (forced CPU devices, or the GPUs
that are there). Its state is sharded, donated at every step, and saved by a `jaxckpt.CheckpointManager`. The story:

1. An unbroken run, without any saving, gives the losses and the values that everything else is compared with.
2. The same run saves while it trains, and is killed (SIGKILL) when a save is half written.
3. It resumes from the newest committed checkpoint. Each loss must be the unbroken run's, bit for bit. What the broken
   save left is swept away.
4. The same checkpoint is restored on 2 devices and on 1, and training continues there.

The training itself is the first half of this file, and could be anyone's: what jaxckpt adds to it is in `train` and
`train_elsewhere`. The second half starts the workers (this script, with a subcommand), watches, kills and compares.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P, Sharding
from sklearn.datasets import load_digits

import jaxckpt

SEED = 7
STEPS = 40
SAVE_EVERY = 5
STEPS_ELSEWHERE = 5
DEVICES = 8

BATCH = 32
LAYERS = 6
WIDTH = 256
HEADS = 4
HIDDEN = 4 * WIDTH
DROPOUT = 0.1
TEST_IMAGES = 256

# Another number of devices adds the same numbers in another order; five steps later the losses still agree to this.
LOSS_TOLERANCE = 1e-3
# A step counts as half written once that much of it (of 47 MB) is on disk.
BROKEN_BYTES_MIN = 1_000_000
# A worker takes about ten seconds; one that takes this long hangs.
WORKER_TIMEOUT_S = 240.0

Tree = Any


# ---------------------------------------------------------------------------------------------------------------
# The model: a transformer that reads a digit row by row
# ---------------------------------------------------------------------------------------------------------------


def init_params(key: jax.Array) -> Tree:
    """Random parameters, 4.7 million numbers. A block's parameters are stacked along the layers."""
    keys = iter(jax.random.split(key, 7))

    def normal(fan_in: int, *shape: int) -> jax.Array:
        return jax.random.normal(next(keys), shape) / fan_in**0.5

    return {
        "embed": {"pixels": normal(8, 8, WIDTH), "position": normal(4, 8, WIDTH)},
        "blocks": {
            "attention_norm": jnp.ones((LAYERS, WIDTH)),
            "qkv": normal(WIDTH, LAYERS, WIDTH, 3, HEADS, WIDTH // HEADS),
            "out": normal(LAYERS * WIDTH, LAYERS, HEADS, WIDTH // HEADS, WIDTH),
            "mlp_norm": jnp.ones((LAYERS, WIDTH)),
            "up": normal(WIDTH, LAYERS, WIDTH, HIDDEN),
            "down": normal(LAYERS * HIDDEN, LAYERS, HIDDEN, WIDTH),
        },
        "head": {"norm": jnp.ones(WIDTH), "kernel": normal(WIDTH, WIDTH, 10), "bias": jnp.zeros(10)},
    }


def logits_of(params: Tree, images: jax.Array, dropout_key: jax.Array | None = None) -> jax.Array:
    """Scores of the ten digits for `images` of shape (batch, 8, 8); with a key, with dropout."""

    def norm(x: jax.Array, scale: jax.Array) -> jax.Array:
        return scale * x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)

    def drop(x: jax.Array, layer: jax.Array) -> jax.Array:
        if dropout_key is None:
            return x
        is_kept = jax.random.bernoulli(jax.random.fold_in(dropout_key, layer), 1 - DROPOUT, x.shape)
        return jnp.where(is_kept, x / (1 - DROPOUT), 0)

    def apply_block(x: jax.Array, layer_and_block: tuple[jax.Array, Tree]) -> tuple[jax.Array, None]:
        layer, block = layer_and_block
        y = norm(x, block["attention_norm"])
        query, key, value = jnp.moveaxis(jnp.einsum("btd,dchw->bcthw", y, block["qkv"]), 1, 0)
        y = jax.nn.dot_product_attention(query, key, value)
        x = x + jnp.einsum("bthw,hwd->btd", y, block["out"])
        y = norm(x, block["mlp_norm"])
        x = x + drop(jax.nn.gelu(y @ block["up"]) @ block["down"], layer)
        return x, None

    x = images @ params["embed"]["pixels"] + params["embed"]["position"]
    x, _ = jax.lax.scan(apply_block, x, (jnp.arange(LAYERS), params["blocks"]))
    y = norm(x.mean(axis=1), params["head"]["norm"])
    return y @ params["head"]["kernel"] + params["head"]["bias"]


# ---------------------------------------------------------------------------------------------------------------
# The state, and how it is laid out over a mesh with the axes "data" and "model"
# ---------------------------------------------------------------------------------------------------------------

# The first moments are bfloat16, the second ones float32.
OPTIMIZER = optax.chain(
    optax.clip_by_global_norm(1.0),
    optax.adamw(optax.warmup_constant_schedule(0.0, 5e-4, 10), mu_dtype=jnp.bfloat16),
)


class Layout(NamedTuple):
    """Where a parameter lies, and where its two Adam moments do.

    The moments are cut over "data" too, since only the update needs them (ZeRO).
    """

    parameter: P
    moments: P


LAYOUTS = {
    "qkv": Layout(P(None, None, None, "model", None), P(None, "data", None, "model", None)),
    "out": Layout(P(None, "model", None, None), P(None, "model", None, "data")),
    "up": Layout(P(None, None, "model"), P(None, "data", "model")),
    "down": Layout(P(None, "model", None), P(None, "model", "data")),
    "kernel": Layout(P("data", None), P("data", None)),
}


def init_state(seed: jax.typing.ArrayLike) -> Tree:
    """The whole state of a training run, at step 0."""
    params_key, dropout_key = jax.random.split(jax.random.key(seed))
    params = init_params(params_key)
    return {
        "step": 0,
        "params": params,
        "optimizer": OPTIMIZER.init(params),
        "dropout_key": dropout_key,
    }


def abstract_state() -> Tree:
    """The state's structure, shapes and dtypes, without values or shardings; the step is a plain int."""
    state = jax.eval_shape(init_state, SEED)
    state["step"] = 0
    return state


def sharding_of(mesh: Mesh, path: tuple[Any, ...]) -> NamedSharding:
    """The sharding of the leaf at `path`; a leaf that LAYOUTS does not name is replicated."""
    name = getattr(path[-1], "key", "")
    layout = LAYOUTS.get(name, Layout(P(), P()))
    is_moment = any(getattr(entry, "name", None) in {"mu", "nu"} for entry in path)
    return NamedSharding(mesh, layout.moments if is_moment else layout.parameter)


def abstract_state_on(mesh: Mesh) -> Tree:
    """`abstract_state` with a sharding on every array: what `jaxckpt.restore(like=...)` asks for."""

    def shard(path: tuple[Any, ...], leaf: Any) -> Any:
        if not isinstance(leaf, jax.ShapeDtypeStruct):
            return leaf
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding_of(mesh, path))

    return jax.tree.map_with_path(shard, abstract_state())


def fresh_state_on(mesh: Mesh) -> Tree:
    """`init_state`, made where it belongs: no device ever holds more than its part."""
    shardings = jax.tree.map(lambda leaf: getattr(leaf, "sharding", None), abstract_state_on(mesh))
    state = jax.jit(init_state, out_shardings=shardings)(SEED)
    state["step"] = 0
    return state


def training_mesh() -> Mesh:
    """Data 4 x model 2 on 8 devices; on fewer (GPUs), the largest power of two that is there."""
    available = min(len(jax.devices()), DEVICES)
    count = 2 ** (available.bit_length() - 1)
    model = 2 if count > 1 else 1
    return mesh_of(jax.devices()[:count], count // model, model)


def mesh_of(devices: list[jax.Device], data: int, model: int) -> Mesh:
    """A mesh with the axes "data" and "model"."""
    return Mesh(np.array(devices).reshape(data, model), ("data", "model"), axis_types=(AxisType.Auto,) * 2)


# ---------------------------------------------------------------------------------------------------------------
# Data and steps
# ---------------------------------------------------------------------------------------------------------------


class Digits:
    """Scikit-learn's 1,797 handwritten digits, 8 x 8 pixels each; the last ones are kept for the test."""

    def __init__(self) -> None:
        images, labels = load_digits(return_X_y=True)
        self._images = (images / 16).astype(np.float32).reshape(-1, 8, 8)
        self._labels = labels.astype(np.int32)

    def batch(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """The batch of a step. It depends on nothing but the step, so a resumed run sees the same data."""
        rows = np.random.default_rng([SEED, step]).integers(len(self._images) - TEST_IMAGES, size=BATCH)
        return self._images[rows], self._labels[rows]

    def test_set(self) -> tuple[np.ndarray, np.ndarray]:
        """Images that no batch holds, and their labels."""
        return self._images[-TEST_IMAGES:], self._labels[-TEST_IMAGES:]


class Trainer:
    """Advances one state, on the devices that the state lies on."""

    def __init__(self, state: Tree) -> None:
        self.state = state
        self._digits = Digits()
        arrays = (state["params"], state["optimizer"], state["dropout_key"])
        shardings = jax.tree.map(lambda leaf: leaf.sharding, arrays)
        some_array = state["params"]["head"]["bias"]
        self._batch_sharding = batch_sharding(some_array.sharding)
        # The old state is donated: its memory becomes the new state's. A save that is under way has its own copy.
        self._step = jax.jit(
            train_step,
            donate_argnums=(0, 1, 2),
            out_shardings=(*shardings, None),
            compiler_options=repeatable_on(next(iter(some_array.devices()))),
        )

    def advance(self) -> float:
        """One step; gives its loss."""
        state = self.state
        batch = jax.device_put(self._digits.batch(state["step"]), self._batch_sharding)
        params, optimizer, dropout_key, loss = self._step(
            state["params"], state["optimizer"], state["dropout_key"], *batch
        )
        self.state = {
            "step": state["step"] + 1,
            "params": params,
            "optimizer": optimizer,
            "dropout_key": dropout_key,
        }
        # Forced CPU devices share a few threads: two steps in flight could wait for each other for ever.
        jax.block_until_ready(self.state)
        return float(loss)

    def accuracy(self) -> float:
        """The part of the test set that is recognized."""
        images, labels = jax.device_put(self._digits.test_set(), self._batch_sharding)
        guesses = jax.jit(logits_of)(self.state["params"], images).argmax(axis=-1)
        return float((guesses == labels).mean())


def train_step(
    params: Tree, optimizer: Tree, dropout_key: jax.Array, images: jax.Array, labels: jax.Array
) -> tuple[Tree, Tree, jax.Array, jax.Array]:
    """New parameters, optimizer state and key, and the loss before the update."""
    next_key, key = jax.random.split(dropout_key)

    def loss_of(params: Tree) -> jax.Array:
        logits = logits_of(params, images, key)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    loss, gradients = jax.value_and_grad(loss_of)(params)
    updates, optimizer = OPTIMIZER.update(gradients, optimizer, params)
    return optax.apply_updates(params, updates), optimizer, next_key, loss


def batch_sharding(sharding: Sharding) -> Sharding:
    """Where a batch goes, for a state that lies as `sharding` does."""
    if not isinstance(sharding, NamedSharding):
        return sharding
    has_data_axis = "data" in sharding.mesh.axis_names
    return NamedSharding(sharding.mesh, P("data") if has_data_axis else P())


def repeatable_on(device: jax.Device) -> dict[str, Any] | None:
    """Compiler options without which two runs of a program on a GPU can differ in the last bits."""
    if device.platform != "gpu":
        return None
    return {"xla_gpu_deterministic_ops": True, "xla_gpu_autotune_level": 0}


# ---------------------------------------------------------------------------------------------------------------
# The workers: what jaxckpt adds to a training run
# ---------------------------------------------------------------------------------------------------------------


def train(directory: Path, *, is_saving: bool) -> None:
    """Trains to the last step, from the newest checkpoint of `directory` if there is one."""
    mesh = training_mesh()
    tell_start(mesh)
    manager = jaxckpt.CheckpointManager(
        directory, save_interval_steps=SAVE_EVERY, max_to_keep=None, on_event=tell_saved
    )
    resumed = manager.resume(like=abstract_state_on(mesh), report=True)
    if resumed is None:
        state = fresh_state_on(mesh)
    else:
        step, (state, report) = resumed
        tell_restored(manager.path_of(step), state, report)

    trainer = Trainer(state)
    with manager:
        while trainer.state["step"] < STEPS:
            loss = advance_and_tell(trainer)
            step = trainer.state["step"]
            if is_saving:
                # Most calls return at once: one in SAVE_EVERY is due.
                manager.save(step, trainer.state, metrics={"loss": loss})
            elif step % SAVE_EVERY == 0:
                tell("digests", step=step, digests=digests_of(trainer.state))
    tell("end", accuracy=trainer.accuracy())


def train_elsewhere(checkpoint: Path, device_count: int) -> None:
    """Restores a checkpoint on `device_count` devices, compares it, and continues there for a few steps."""
    devices = jax.devices()
    if len(devices) < device_count:
        # A single GPU, and two devices wanted: the host's CPU devices do as well.
        devices = jax.devices("cpu")

    # `like` says nothing about devices here: it only brings the structure, so that optax gets its own state classes.
    like = abstract_state()
    if device_count == 1:
        state, report = jaxckpt.restore(checkpoint, like=like, report=True)
    else:
        mesh = mesh_of(devices[:device_count], data=device_count, model=1)
        state, report = jaxckpt.restore(checkpoint, like=like, mesh=mesh, report=True)
    tell_restored(str(checkpoint), state, report)

    trainer = Trainer(state)
    for _ in range(STEPS_ELSEWHERE):
        advance_and_tell(trainer)
    tell("end", accuracy=trainer.accuracy())


def advance_and_tell(trainer: Trainer) -> float:
    """One step, reported with the loss's exact bits; gives the loss."""
    started = time.perf_counter()
    loss = trainer.advance()
    tell("step", step=trainer.state["step"], loss=loss.hex(), seconds=time.perf_counter() - started)
    return loss


def digests_of(state: Tree) -> dict[str, str]:
    """A SHA-256 of each leaf: of its type, its shape and its bytes."""
    digests = {}
    for path, leaf in jax.tree.leaves_with_path(state):
        digest = hashlib.sha256()
        if isinstance(leaf, jax.Array):
            digest.update(f"{leaf.dtype} {leaf.shape}".encode())
            is_key = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
            values = np.asarray(jax.random.key_data(leaf) if is_key else leaf)
            digest.update(values.tobytes())
        else:
            digest.update(repr(leaf).encode())
        digests[jax.tree_util.keystr(path, simple=True, separator="/")] = digest.hexdigest()
    return digests


def tell(event: str, **facts: Any) -> None:
    """Reports to the orchestrator: one line of JSON, in one piece, for saves are reported by a thread of their own."""
    sys.stdout.write(json.dumps({"event": event, **facts}) + "\n")
    sys.stdout.flush()


def tell_start(mesh: Mesh) -> None:
    """Reports the devices."""
    tell("start", devices=mesh.size, platform=mesh.devices.flat[0].platform, mesh=dict(mesh.shape))


def tell_saved(event: jaxckpt.CheckpointEvent) -> None:
    """Reports a save that was committed; the manager calls this for whatever happens."""
    info = event.info
    if info is not None:
        tell("saved", path=info.path, nbytes=info.nbytes, blocked_s=info.blocked_s, seconds=info.seconds)


def tell_restored(checkpoint: str, state: Tree, report: Any) -> None:
    """Reports what was restored, from where and onto what."""
    arrays = [leaf for leaf in jax.tree.leaves(state) if isinstance(leaf, jax.Array)]
    devices = {device for array in arrays for device in array.devices()}
    tell(
        "restored",
        path=checkpoint,
        step=state["step"],
        keys=len(jaxckpt.open(checkpoint).keys()),
        nbytes=report.nbytes,
        bytes_read=report.bytes_read,
        seconds=report.seconds,
        devices=len(devices),
        platform=next(iter(devices)).platform,
        sharded=sum(not array.is_fully_replicated for array in arrays),
        digests=digests_of(state),
    )


# ---------------------------------------------------------------------------------------------------------------
# The orchestrator: starts the workers, watches, kills, compares
# ---------------------------------------------------------------------------------------------------------------


class DemoError(Exception):
    """Something that this demo promises did not hold."""


class Worker:
    """This script as a process of its own, with a subcommand and a deadline. Its output goes to files."""

    def __init__(self, name: str, logs: Path, device_count: int, *arguments: str | Path) -> None:
        self.name = name
        self.events: list[dict[str, Any]] = []
        self._deadline = time.monotonic() + WORKER_TIMEOUT_S
        self._stderr_path = logs / f"{name}.stderr"
        stdout_path = logs / f"{name}.jsonl"
        with stdout_path.open("wb") as stdout, self._stderr_path.open("wb") as stderr:
            self._process = subprocess.Popen(
                [sys.executable, __file__, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                env=worker_environment(device_count),
            )
        self._stdout = stdout_path.open("r", encoding="utf-8")
        self._unfinished_line = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.kill()
        self._stdout.close()

    def told(self, kind: str) -> list[dict[str, Any]]:
        """The events of one kind, in order."""
        return [event for event in self.events if event["event"] == kind]

    def losses(self) -> dict[int, str]:
        """The exact loss of each step, as a hexadecimal float."""
        return {event["step"]: event["loss"] for event in self.told("step")}

    def is_running(self) -> bool:
        """Reads what was told since the last call; raises if the worker failed or its time is up."""
        # Asked before reading, so that nothing is missed of what a worker told before it ended.
        status = self._process.poll()
        self._read_events()
        if status is None and time.monotonic() > self._deadline:
            raise DemoError(f"{self.name}: still running after {WORKER_TIMEOUT_S:.0f} s")
        if status:
            stderr = self._stderr_path.read_text(errors="replace")
            raise DemoError(f"{self.name}: exit status {status}\n{stderr}")
        return status is None

    def finish(self) -> None:
        """Waits for the end."""
        while self.is_running():
            time.sleep(0.02)

    def freeze(self) -> None:
        """Stops every thread of the worker, wherever it is, and returns once it stands still."""
        self._process.send_signal(signal.SIGSTOP)
        _, status = os.waitpid(self._process.pid, os.WUNTRACED)
        if not os.WIFSTOPPED(status):
            raise DemoError(f"{self.name}: ended instead of being stopped")

    def thaw(self) -> None:
        """Lets a frozen worker go on."""
        self._process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """SIGKILL: no handler, no cleanup, no last word."""
        self._process.kill()
        self._process.wait()
        self._read_events()

    def _read_events(self) -> None:
        text = self._unfinished_line + self._stdout.read()
        *lines, self._unfinished_line = text.split("\n")
        for line in lines:
            event = json.loads(line)
            self.events.append(event)
            show(event)


def worker_environment(device_count: int) -> dict[str, str]:
    """The environment of a worker that is to see `device_count` devices."""
    environment = dict(os.environ)
    flags = environment.get("XLA_FLAGS", "")
    environment["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={device_count}".strip()
    # Of several GPUs, the first ones; without any, this changes nothing.
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    gpus = [str(index) for index in range(device_count)] if visible is None else visible.split(",")
    environment["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[:device_count])
    # GPUs multiply in float32 then, as CPUs do.
    environment["JAX_DEFAULT_MATMUL_PRECISION"] = "highest"
    return environment


def is_committed(checkpoint: Path) -> bool:
    """The manifest is the commit."""
    return (checkpoint / "manifest.msgpack").exists()


def bytes_in(directory: Path) -> int:
    """The sizes of all files under `directory`, which may be changing."""
    total = 0
    for folder, _, names in os.walk(directory):
        for name in names:
            # A temporary name may be gone again.
            with contextlib.suppress(FileNotFoundError):
                total += os.stat(Path(folder, name)).st_size
    return total


def kill_in_the_middle_of_a_save(worker: Worker, directory: Path) -> Path:
    """Kills the worker when a step is on disk in part, after at least one whole one; gives the broken step's path.

    The worker is frozen before the last look, so that what is seen is what is killed. A save that was
    committed just before that has won the race: the worker goes on, and the next save is tried.
    """
    while worker.is_running():
        steps = sorted(directory.glob("step_*"))
        if len(steps) >= 2 and is_committed(steps[0]):
            newest = steps[-1]
            if not is_committed(newest) and bytes_in(newest) >= BROKEN_BYTES_MIN:
                worker.freeze()
                if not is_committed(newest):
                    worker.kill()
                    return newest
                worker.thaw()
        time.sleep(0.001)
    raise DemoError("the run ended before it could be killed: every save was too fast to be caught")


def check_same_losses(worker: Worker, unbroken: Worker) -> None:
    """Bit for bit: the losses are compared as hexadecimal floats."""
    expected = unbroken.losses()
    different = [step for step, loss in worker.losses().items() if loss != expected[step]]
    if different:
        raise DemoError(f"{worker.name}: losses differ from the unbroken run's at steps {different}")


def check_close_losses(worker: Worker, unbroken: Worker) -> float:
    """Gives the largest relative difference."""
    expected = unbroken.losses()
    largest = 0.0
    for step, loss in worker.losses().items():
        exact = float.fromhex(expected[step])
        largest = max(largest, abs(float.fromhex(loss) - exact) / abs(exact))
    # Said this way round, a NaN fails too.
    if not largest <= LOSS_TOLERANCE:
        raise DemoError(f"{worker.name}: losses differ by {largest:.2g} from the unbroken run's")
    return largest


def check_same_values(worker: Worker, unbroken: Worker) -> None:
    """Each restored leaf has the bytes that the unbroken run, which never saved, had in memory at that step."""
    (restored,) = worker.told("restored")
    (expected,) = [event for event in unbroken.told("digests") if event["step"] == restored["step"]]
    keys = expected["digests"].keys() | restored["digests"].keys()
    different = [key for key in keys if expected["digests"].get(key) != restored["digests"].get(key)]
    if different:
        raise DemoError(
            f"{worker.name}: {len(different)} restored leaves differ, the first is {min(different)}"
        )


def tell_the_story(directory: Path) -> None:
    """Runs all the workers, and raises DemoError where something does not hold."""
    started = time.monotonic()
    logs = directory / "logs"
    run = directory / "run"
    no_run = directory / "unbroken"
    for folder in (logs, run, no_run):
        folder.mkdir()

    say("1. An unbroken run that never saves")
    with Worker("unbroken", logs, DEVICES, "train", no_run) as unbroken:
        unbroken.finish()

    say(f"2. The same run, saving every {SAVE_EVERY} steps while it trains, until it is killed")
    with Worker("killed", logs, DEVICES, "train", run, "--save") as killed:
        broken = kill_in_the_middle_of_a_save(killed, run)
    if is_committed(broken) or not broken.is_dir():
        raise DemoError(f"{broken.name} is not a save that was cut off")
    check_same_losses(killed, unbroken)
    whole = killed.told("saved")[0]["nbytes"]
    say("   SIGKILL in the middle of a save:")
    say(f"   {broken.name} holds {megabytes(bytes_in(broken))} of {megabytes(whole)}, and no manifest")

    say("3. Resumed from the newest committed checkpoint")
    with Worker("resumed", logs, DEVICES, "train", run, "--save") as resumed:
        resumed.finish()
    (restored,) = resumed.told("restored")
    checkpoint = Path(restored["path"])
    if checkpoint >= broken:
        raise DemoError(f"resumed from {checkpoint.name}, which was never committed")
    check_same_values(resumed, unbroken)
    check_same_losses(resumed, unbroken)
    # The resumed run saves the broken step anew, and goes on to the last one.
    for step in (broken, run / f"step_{STEPS:08d}"):
        if not is_committed(step):
            raise DemoError(f"the resumed run did not save {step.name}")
        if len(list(step.glob("data-*"))) != 1:
            raise DemoError(f"{step.name} still holds what the broken save left")
    say(f"   all {len(resumed.losses())} losses are the unbroken run's, bit for bit")

    restore_elsewhere(checkpoint, 2, logs, unbroken)
    restore_elsewhere(checkpoint, 1, logs, unbroken)

    say_what_saving_cost(unbroken, killed, resumed)
    say(f"Everything held, in {time.monotonic() - started:.0f} s.")


def restore_elsewhere(checkpoint: Path, device_count: int, logs: Path, unbroken: Worker) -> None:
    """Part 4 of the story, for one number of devices."""
    say(f"4. {checkpoint.name} on {device_count} instead of {DEVICES}")
    name = f"devices_{device_count}"
    with Worker(name, logs, device_count, "elsewhere", checkpoint, str(device_count)) as worker:
        worker.finish()
    (restored,) = worker.told("restored")
    if restored["devices"] != device_count:
        raise DemoError(f"{name}: restored onto {restored['devices']} devices")
    check_same_values(worker, unbroken)
    difference = check_close_losses(worker, unbroken)
    say("   every leaf is what was saved, bit for bit")
    say(f"   {len(worker.losses())} more losses, within {difference:.0e} of the unbroken run's")


# ---------------------------------------------------------------------------------------------------------------
# What is printed
# ---------------------------------------------------------------------------------------------------------------


def say(text: str) -> None:
    """One line for the reader, now."""
    print(text, flush=True)


def show(event: dict[str, Any]) -> None:
    """One line for an event that a reader wants to see."""
    kind = event["event"]
    if kind == "start":
        axes = " x ".join(f"{name} {size}" for name, size in event["mesh"].items())
        say(f"   {devices_in(event)}, mesh {axes}")
    elif kind == "restored":
        say(
            f"   restored {Path(event['path']).name}: {event['keys']} keys, {megabytes(event['nbytes'])}, "
            f"in {event['seconds']:.2f} s, reading {megabytes(event['bytes_read'])}"
        )
        say(f"   onto {devices_in(event)}; {event['sharded']} arrays are sharded")
    elif kind == "step" and event["step"] % 10 == 0:
        say(f"   step {event['step']:3d}  loss {float.fromhex(event['loss']):.6f}")
    elif kind == "end":
        say(f"   {event['accuracy']:.1%} of the test digits recognized")


def say_what_saving_cost(unbroken: Worker, killed: Worker, resumed: Worker) -> None:
    """Medians over the steps and over the saves."""
    # The first step of a run is mostly its compilation.
    quiet_steps = [event["seconds"] for event in unbroken.told("step")[1:]]
    saving_steps = [event["seconds"] for run in (killed, resumed) for event in run.told("step")[1:]]
    saves = [event for run in (killed, resumed) for event in run.told("saved")]
    waits = [event["blocked_s"] for event in saves]
    save_seconds = [event["seconds"] for event in saves]
    say("What saving cost, in medians:")
    say(f"   {milliseconds(quiet_steps)}  a step of the run that never saved")
    say(f"   {milliseconds(saving_steps)}  a step of the runs that saved")
    say(f"   {milliseconds(waits)}  training waited for a save")
    say(f"   {milliseconds(save_seconds)}  a save of {megabytes(saves[0]['nbytes'])}, until it was committed")


def devices_in(event: dict[str, Any]) -> str:
    """As in "8 CPU devices"."""
    plural = "" if event["devices"] == 1 else "s"
    return f"{event['devices']} {event['platform'].upper()} device{plural}"


def megabytes(count: int) -> str:
    """Bytes for a reader."""
    return f"{count / 1e6:.1f} MB"


def milliseconds(seconds: list[float]) -> str:
    """The median, for a reader."""
    return f"{1e3 * statistics.median(seconds):7.1f} ms"


# ---------------------------------------------------------------------------------------------------------------


def parse_arguments() -> argparse.Namespace:
    """Without a subcommand, the demo; the subcommands are its workers."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--dir", type=Path, help="new or empty folder for the run, kept at the end (default: a temporary one)"
    )
    workers = parser.add_subparsers(dest="worker", metavar="WORKER", help="for the demo's own use")
    worker = workers.add_parser("train")
    worker.add_argument("directory", type=Path)
    worker.add_argument("--save", action="store_true")
    worker = workers.add_parser("elsewhere")
    worker.add_argument("checkpoint", type=Path)
    worker.add_argument("device_count", type=int)
    return parser.parse_args()


def run_demo(directory: Path | None) -> int:
    """The exit status: 0 if everything held."""
    is_temporary = directory is None
    if directory is None:
        directory = Path(tempfile.mkdtemp(prefix="jaxckpt-demo-"))
    else:
        directory = directory.absolute()
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
    if not is_temporary:
        say(f"Kept: see `jaxckpt ls {directory / 'run'}`.")
    return 0


def main() -> int:
    """Runs the demo, or the worker that the command line names."""
    arguments = parse_arguments()
    if arguments.worker == "train":
        train(arguments.directory, is_saving=arguments.save)
        return 0
    if arguments.worker == "elsewhere":
        train_elsewhere(arguments.checkpoint, arguments.device_count)
        return 0
    return run_demo(arguments.dir)


if __name__ == "__main__":
    sys.exit(main())
