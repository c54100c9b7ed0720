"""The parts of `benchmarks.gpu`, each run in a process of its own: what is measured, and how.

    python -m benchmarks.gpu_parts PART SETTINGS ANSWER    as `gpu` calls it

The state holds whole numbers in float32, to which each step adds one behind a computation of a tenth of a second, so
that what a checkpoint must hold follows from the number of its step, and is compared bit for bit on the devices.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import importlib.metadata
import json
import math
import os
import platform
import shutil
import statistics
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

import jaxckpt
from benchmarks import measure
from benchmarks.gpu import GIB, GRACE_S, MIB, ORBAX, RESTORED, STAGINGS, Settings
from benchmarks.loop import Saver, make_saver
from jaxckpt._viewing import copies_on_device

# Pieces of the state: three trees of at most so many layers, as parameters and the two moments of Adam.
LAYERS_MAX = 16
MATRICES = 4
WIDTH = 1024

# How long the computation of a step takes, on accelerators and on CPU devices, which measure nothing.
STEP_S = 0.1
CPU_STEP_S = 0.005
QUIET_STEPS = 20
STEPS_AFTER_MIN = 5

READ_THREADS = 16
READ_BYTES = 8 * MIB


# --- the training loop ---------------------------------------------------------------------------------------


@dataclasses.dataclass
class Training:
    """A state on all devices, and the step that donates it.

    Attributes:
        shapes: of the leaves.
        shardings: of the leaves.
        state: of the moment.
        number: steps that were done.
        rounds: matrix products of a step.
    """

    shapes: dict[str, tuple[int, ...]]
    shardings: dict[str, Any]
    state: Any = None
    number: int = 0
    rounds: int = 1

    @property
    def nbytes(self) -> int:
        return 4 * sum(map(math.prod, self.shapes.values()))

    def like(self) -> Any:
        """The state as shapes and shardings."""
        return {
            key: jax.ShapeDtypeStruct(shape, "float32", sharding=self.shardings[key])
            for key, shape in self.shapes.items()
        }

    def begin(self) -> None:
        """Makes the state of step 0, and finds out how much computation takes `STEP_S`."""
        make = jax.jit(lambda: _values(self.shapes, 0), out_shardings=self.shardings)
        self.state = jax.block_until_ready(make())
        self.number = 0
        for _ in range(2):
            self.step()
        began_s = time.perf_counter()
        self.step()
        empty_s = time.perf_counter() - began_s
        self.rounds = 10
        began_s = time.perf_counter()
        self.step()
        round_s = max((time.perf_counter() - began_s - empty_s) / 10, 1e-6)
        step_s = CPU_STEP_S if jax.default_backend() == "cpu" else STEP_S
        self.rounds = max(1, int(max(step_s - empty_s, 0) / round_s))
        self.step()

    def launch(self) -> Any:
        """Launches a step, and returns its loss."""
        self.state, loss = _step()(self.state, _matrices(self._mesh), self.rounds)
        self.number += 1
        return loss

    def step(self) -> float:
        """Does a step, and returns its seconds: a loop reads the loss of each."""
        began_s = time.perf_counter()
        self.launch().block_until_ready()
        return time.perf_counter() - began_s

    def different_leaves(self, restored: Any, number: int) -> int:
        """How many leaves of a restored state are not bit for bit those of a step."""
        if restored.keys() != self.shapes.keys():
            return len(self.shapes)
        return sum(not bool(equal) for equal in jax.tree.leaves(self._compare(restored, float(number))))

    @functools.cached_property
    def _compare(self) -> Callable[[Any, float], Any]:
        def is_same(leaf: Any, wanted: Any) -> Any:
            bits, wanted_bits = (jax.lax.bitcast_convert_type(array, jnp.uint32) for array in (leaf, wanted))
            return jnp.all(bits == wanted_bits)

        return jax.jit(lambda state, number: jax.tree.map(is_same, state, _values(self.shapes, number)))

    @functools.cached_property
    def _mesh(self) -> Any:
        return next(iter(self.shardings.values())).mesh


def make_training(state_bytes: int) -> Training:
    """A state of about so many bytes: matrices cut over all devices, small leaves on each of them."""
    devices = jax.local_devices()
    mesh = Mesh(np.array(devices, dtype=object), ("x",))
    count = len(devices)
    # A tenth of the bytes is one embedding for each of the three trees, the rest are matrices of the layers.
    embedding_rows = _round_up(state_bytes // 30 // 4 // WIDTH, count)
    layers = min(max(state_bytes // (256 * MIB), 2), LAYERS_MAX)
    rows = _round_up(state_bytes * 9 // 10 // (3 * layers * MATRICES) // 4 // WIDTH, count)
    shapes: dict[str, tuple[int, ...]] = {}
    for tree in ("params", "mu", "nu"):
        shapes[f"{tree}/embedding"] = (embedding_rows, WIDTH)
        for layer in range(layers):
            shapes |= {f"{tree}/{layer:02d}/matrix-{number}": (rows, WIDTH) for number in range(MATRICES)}
            shapes |= {f"{tree}/{layer:02d}/{name}": (WIDTH,) for name in ("scale", "bias")}
    shapes["count"] = ()
    specs = {key: PartitionSpec("x") if len(shape) == 2 else PartitionSpec() for key, shape in shapes.items()}
    return Training(shapes, {key: NamedSharding(mesh, spec) for key, spec in specs.items()})


def _round_up(number: int, step: int) -> int:
    return max(-(-number // step), 1) * step


def _values(shapes: dict[str, tuple[int, ...]], number: Any) -> Any:
    """The state after so many steps: small whole numbers, exact in float32."""

    def leaf(place: int, shape: tuple[int, ...]) -> Any:
        if not shape:
            return jnp.float32(place) + number
        row = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
        column = jax.lax.broadcasted_iota(jnp.int32, shape, len(shape) - 1)
        return ((row * 31 + column + place) % 4093).astype(jnp.float32) + number

    return {key: leaf(place, shape) for place, (key, shape) in enumerate(shapes.items())}


@functools.cache
def _matrices(mesh: Any) -> Any:
    size = 128 if mesh.devices.flat[0].platform == "cpu" else 4096
    sharding = NamedSharding(mesh, PartitionSpec("x"))
    make = jax.jit(
        lambda: jnp.full((mesh.devices.size, size, size), 1 / size, jnp.bfloat16), out_shardings=sharding
    )
    return make()


@functools.cache
def _step() -> Callable[[Any, Any, int], Any]:
    def step(state: Any, matrices: Any, rounds: Any) -> Any:
        product = jax.lax.fori_loop(
            0, rounds, lambda _, each: jnp.tanh(jnp.einsum("nij,njk->nik", each, each)), matrices
        )
        nothing = 0 * jnp.sum(product[:, 0, 0].astype(jnp.float32))  # orders the update behind the products
        return {key: leaf + (1 + nothing) for key, leaf in state.items()}, nothing

    return jax.jit(step, donate_argnums=0)


# --- transfers -----------------------------------------------------------------------------------------------


def measure_transfers(settings: Settings) -> dict[str, dict[str, float]]:
    """Bytes per second of all devices together, by what is moved and by the size of one transfer of a device."""
    devices = jax.local_devices()
    pinned = [SingleDeviceSharding(device, memory_kind="pinned_host") for device in devices]
    plain = [SingleDeviceSharding(device) for device in devices]
    least = max(settings.state_bytes // len(devices), MIB)
    sizes = sorted({min(size, least) for size in (MIB, 16 * MIB, 256 * MIB, GIB)})
    rates: dict[str, dict[str, float]] = {}

    def rate(nbytes: int, prepare: Callable[[], Any], move: Callable[[Any], Any]) -> float:
        seconds = []
        for _ in range(3 if nbytes >= GIB else 7):  # the first one takes memory that the others find
            source = prepare()
            began_s = time.perf_counter()
            jax.block_until_ready(move(source))
            seconds.append(time.perf_counter() - began_s)
        return nbytes * len(devices) / statistics.median(seconds[1:])

    for nbytes in sizes:
        count = nbytes // 4
        arrays = [jax.device_put(jnp.zeros(count, jnp.float32), each) for each in plain]
        on_host = jax.block_until_ready(jax.device_put(arrays, pinned))
        in_numpy = [np.ones(count, np.float32) for _ in devices]

        def fresh(arrays: Any = arrays) -> Any:
            """A host copy stays cached on the array that it was made from, so that each is used once."""
            return jax.block_until_ready([array + 0 for array in arrays])

        ways: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
            "device to pinned": (
                lambda arrays=arrays: arrays,
                lambda source: jax.device_put(source, pinned, may_alias=False),
            ),
            "device to pageable": (fresh, lambda source: [np.asarray(array) for array in source]),
            "pinned to device": (
                lambda on_host=on_host: on_host,
                lambda source: jax.device_put(source, plain),
            ),
            "pageable to device": (
                lambda in_numpy=in_numpy: in_numpy,
                lambda source: jax.device_put(source, plain),
            ),
            "device to itself": (
                lambda arrays=arrays: arrays,
                lambda source: [copies_on_device([array], array.device) for array in source],
            ),
        }
        for name, (prepare, move) in ways.items():
            rates.setdefault(name, {})[f"{nbytes / MIB:.0f} MiB"] = rate(nbytes, prepare, move)
    return rates


# --- isolation -----------------------------------------------------------------------------------------------


def measure_isolation(settings: Settings) -> dict[str, Any]:
    """Counts leaves that a donating step changed in a checkpoint, for each staging mode, and what naive copies lose."""
    training = make_training(min(settings.state_bytes, GIB))
    training.begin()
    changed: dict[str, int] = {}
    checked = 0
    for staging in STAGINGS:
        pending = []
        options = jaxckpt.SaveOptions(staging=staging)  # type: ignore[arg-type]
        for number in range(3):
            training.launch()
            path = Path(settings.directory, f"isolation-{staging}-{number}")
            pending.append((path, training.number, jaxckpt.save_async(path, training.state, options=options)))
            training.launch()
            training.launch()
        changed[staging] = 0
        for path, number, save in pending:
            save.wait(settings.seconds)
            restored = jaxckpt.restore(path, like=training.like())
            changed[staging] += training.different_leaves(restored, number)
            checked += len(training.shapes)
            shutil.rmtree(path)
    controls = _negative_controls(jax.local_devices()[0])
    return {"changed": changed, "checked": checked, "controls": controls}


def _negative_controls(device: Any) -> dict[str, bool]:
    """Whether a donating step breaks naive copies; were they safe, the leaves above would show nothing."""
    add_one = jax.jit(lambda array: array + 1, donate_argnums=0)

    def loses(copy: Callable[[Any], Any]) -> bool:
        array = jax.device_put(jnp.zeros(4 * MIB), device)
        kept = copy(array)
        jax.block_until_ready(add_one(array))
        try:
            return bool(np.asarray(kept).any())
        except RuntimeError:  # it was deleted
            return True

    def begin_copy(array: Any) -> Any:
        array.copy_to_host_async()
        return array

    copies: dict[str, Callable[[Any], Any]] = {
        "copy_to_host_async": begin_copy,
        "device_put to the same sharding": lambda array: jax.device_put(array, array.sharding),
        "device_put, may_alias=False": lambda array: jax.device_put(array, array.sharding, may_alias=False),
    }
    return {name: loses(copy) for name, copy in copies.items()}


# --- growth --------------------------------------------------------------------------------------------------


def measure_growth(settings: Settings) -> dict[str, Any]:
    """Memory after the first tenth of many saves, and after all of them."""
    training = make_training(min(settings.state_bytes, GIB // 2))
    training.begin()
    device = jax.local_devices()[0]
    found: dict[str, Any] = {}
    for staging in ("pinned", "device"):
        until_s = time.perf_counter() + settings.seconds / 2
        options = jaxckpt.SaveOptions(staging=staging)
        done = 0
        first: dict[str, int] = {}
        while done < settings.growth_saves and (not first or time.perf_counter() < until_s):
            path = Path(settings.directory, f"growth-{staging}-{done}")
            pending = jaxckpt.save_async(path, training.state, options=options)
            training.launch()
            pending.wait(settings.seconds)
            shutil.rmtree(path)
            done += 1
            if done == max(settings.growth_saves // 10, 2):
                first = _memory_of_process(device)
        found[staging] = {"saves": done, "first": first, "last": _memory_of_process(device)}
    return found


def _memory_of_process(device: Any) -> dict[str, int]:
    status = Path("/proc/self/status").read_text().splitlines()
    kilobytes = {
        name: int(rest.split()[0])
        for name, _, rest in (line.partition(":") for line in status)
        if "kB" in rest
    }
    return {
        "resident": kilobytes["VmRSS"] * 1024,
        "pinned": (kilobytes.get("VmPin", 0) + kilobytes.get("VmLck", 0)) * 1024,
        "device": (device.memory_stats() or {}).get("bytes_in_use", 0),
    }


# --- loops ---------------------------------------------------------------------------------------------------


def measure_jaxckpt(settings: Settings) -> dict[str, Any]:
    """The loop with each staging mode."""
    return _measure_loops(settings, [f"jaxckpt {staging}" for staging in STAGINGS])


def measure_orbax(settings: Settings) -> dict[str, Any]:
    """The loop with Orbax."""
    return _measure_loops(settings, ORBAX)


def _saver_of(settings: Settings, name: str) -> Saver:
    """The saver of that name. It keeps its newest checkpoint if that will be restored, else none."""
    directory = _directory_of(settings, name)
    keep = 1 if name in RESTORED else 0
    if not name.startswith("jaxckpt"):
        return make_saver(name, directory, keep=keep)
    options = jaxckpt.SaveOptions(staging=name.partition(" ")[2])  # type: ignore[arg-type]
    pending: list[Any] = []

    def save(step: int, tree: Any) -> None:
        pending.append(jaxckpt.save_async(directory / str(step), tree, options=options))

    def wait() -> Any:
        info = pending.pop().wait()
        for each in directory.iterdir():
            if not keep or each != Path(info.path):
                shutil.rmtree(each)
        return info

    return Saver(save, wait, lambda step, like: jaxckpt.restore(directory / str(step), like=like))


def _directory_of(settings: Settings, name: str) -> Path:
    return Path(settings.directory, name.replace(" ", "-"))


def _measure_loops(settings: Settings, names: Sequence[str]) -> dict[str, Any]:
    """Runs the loop with each saver in turns."""
    until_s = time.perf_counter() + settings.seconds
    training = make_training(settings.state_bytes)
    training.begin()
    savers = {name: _saver_of(settings, name) for name in names}
    saves: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    notes: list[str] = []
    longest_s = 0.0
    for turn in range(settings.saves):
        for name in list(savers):
            # The first turn warms up, and the second one is worth some of the grace.
            limit_s = until_s + (GRACE_S / 2 if turn == 1 else 0)
            if turn and time.perf_counter() + longest_s > limit_s:
                continue
            began_s = time.perf_counter()
            try:
                saves[name].append(_measure_save(training, savers[name]))
            except Exception as error:
                if name.startswith("jaxckpt"):
                    raise
                notes.append(f"{name} is left out: {error!r:.300}")
                del savers[name]
            longest_s = max(longest_s, time.perf_counter() - began_s)
    last = {name: int(saves[name][-1]["step"]) for name in savers}
    rows: dict[str, Any] = {}
    for name, measured in saves.items():
        counted = measured[1:] or measured
        if counted:
            rows[name] = {key: statistics.median(save[key] for save in counted) for key in counted[0]}
            rows[name]["saves"] = len(counted)
    return {"state_bytes": training.nbytes, "rows": rows, "last": last, "notes": notes}


def _measure_save(training: Training, saver: Saver) -> dict[str, float]:
    """One save, and the steps until it is durable and the one before it is deleted; before it, some quiet steps."""
    quiet_s = [training.step() for _ in range(QUIET_STEPS)]
    number = training.number
    is_durable = threading.Event()
    answers: list[Any] = []
    failures: list[BaseException] = []

    def wait() -> None:
        try:
            answers.append(saver.wait())
        except BaseException as error:  # noqa: BLE001  raised below, on the thread that measures
            failures.append(error)
        is_durable.set()

    began_s = time.perf_counter()
    saver.save(number, training.state)
    blocked_s = time.perf_counter() - began_s
    waiting = threading.Thread(target=wait)
    waiting.start()
    steps_s: list[float] = []
    durable_s = math.nan
    while not is_durable.is_set() or len(steps_s) < STEPS_AFTER_MIN:
        steps_s.append(training.step())
        if is_durable.is_set() and math.isnan(durable_s):
            durable_s = time.perf_counter() - began_s
    waiting.join()
    if failures:
        raise failures[0]
    quiet_step_s = statistics.median(quiet_s)
    measured = {
        "step": number,
        "quiet_step_s": quiet_step_s,
        "blocked_s": blocked_s,
        "first_step_extra_s": steps_s[0] - quiet_step_s,
        "inflation": statistics.median(steps_s[1:]) / quiet_step_s - 1,
        "stolen_s": blocked_s + sum(steps_s) - len(steps_s) * quiet_step_s,
        "durable_s": durable_s,
    }
    snapshot_s = getattr(answers[0], "snapshot_s", None)
    return measured if snapshot_s is None else measured | {"snapshot_s": snapshot_s}


# --- restore -------------------------------------------------------------------------------------------------


def measure_restore(settings: Settings, name: str, step: int) -> dict[str, Any]:
    """Restores the last checkpoint of a loop, cold and warm, and lets the first step donate it."""
    directory = _directory_of(settings, name)
    saver = _saver_of(settings, name)
    training = make_training(settings.state_bytes)
    training.begin()  # the devices are awake, and the step is compiled
    training.state = None

    def restore() -> tuple[Any, float]:
        began_s = time.perf_counter()
        restored = jax.block_until_ready(saver.restore(step, training.like()))
        return restored, time.perf_counter() - began_s

    measure.evict(directory)
    restored, cold_s = restore()
    wrong = training.different_leaves(restored, step)
    del restored
    restored, warm_s = restore()
    wrong += training.different_leaves(restored, step)
    found: dict[str, Any] = {"cold_s": cold_s, "warm_s": warm_s, "different_leaves": wrong}
    found |= _donate(training, restored)
    del restored
    training.state = None
    measure.evict(directory)
    began_s = time.perf_counter()
    nbytes = read_files(directory)
    found["disk_bytes_per_s"] = nbytes / (time.perf_counter() - began_s)
    return found


def _donate(training: Training, restored: dict[str, Any]) -> dict[str, Any]:
    """How much of a restored state its first step donates, and updates in place."""
    before = {
        shard.data.unsafe_buffer_pointer() for leaf in restored.values() for shard in leaf.addressable_shards
    }
    stats = jax.local_devices()[0].memory_stats() or {}
    training.state = restored
    training.step()
    donated = in_place = 0
    for key, leaf in training.state.items():
        shards = [shard.data for shard in leaf.addressable_shards]
        nbytes = sum(shard.nbytes for shard in shards)
        donated += nbytes if restored[key].is_deleted() else 0
        in_place += sum(shard.nbytes for shard in shards if shard.unsafe_buffer_pointer() in before)
    total = sum(shard.data.nbytes for leaf in training.state.values() for shard in leaf.addressable_shards)
    after = jax.local_devices()[0].memory_stats() or {}
    return {
        "donated": donated / total,
        "in_place": in_place / total,
        "device_bytes_more": after.get("bytes_in_use", 0) - stats.get("bytes_in_use", 0),
    }


def read_files(directory: Path) -> int:
    """Reads all files below a directory with several threads; returns how many bytes they have."""
    jobs = [
        (path, offset)
        for path in measure.files_below(directory)
        for offset in range(0, path.stat().st_size, READ_BYTES)
    ]
    local = threading.local()

    def read(job: tuple[Path, int]) -> int:
        if not hasattr(local, "buffer"):
            local.buffer = bytearray(READ_BYTES)
        with open(job[0], "rb", buffering=0) as file:
            return os.preadv(file.fileno(), [local.buffer], job[1])

    with concurrent.futures.ThreadPoolExecutor(READ_THREADS) as pool:
        return sum(pool.map(read, jobs))


# --- the machine ---------------------------------------------------------------------------------------------


def look_at_machine(settings: Settings) -> dict[str, Any]:
    """What the devices are, and how much memory each has."""
    del settings
    devices = jax.local_devices()
    stats = [device.memory_stats() or {} for device in devices]
    versions = {}
    for package in ("jaxckpt", "jax", "jaxlib", "orbax-checkpoint", "tensorstore"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "backend": jax.default_backend(),
        "device": devices[0].device_kind,
        "devices": len(devices),
        "device_bytes": min(each.get("bytes_limit", 0) for each in stats),
        "python": platform.python_version(),
        "versions": versions,
    }


# --- the process ---------------------------------------------------------------------------------------------

PARTS: dict[str, Callable[..., dict[str, Any]]] = {
    "machine": look_at_machine,
    "transfers": measure_transfers,
    "isolation": measure_isolation,
    "growth": measure_growth,
    "jaxckpt": measure_jaxckpt,
    "orbax": measure_orbax,
    "restore": measure_restore,
}


def answer(part: str, call: str, path: str) -> None:
    """Runs a part, and writes what it found to a file."""
    settings, arguments = json.loads(call)
    found = PARTS[part](Settings(**settings), *arguments)
    Path(path).write_text(json.dumps(found))


if __name__ == "__main__":
    answer(*sys.argv[1:])
