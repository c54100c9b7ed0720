"""What does a training loop notice of its saves?

Two things, and both are counted: `save` blocks the loop, and the steps after it are slower while the rest is written
in the background. A jitted step donates its state, as training does, and does some matrix products besides. In turns
come three quiet steps, a save, the five steps that follow, and the wait for the save:

    blocked ms     how long the call of the save took
    slowdown ms    the five steps after it, less five times the median of the loop's quiet steps
    sum ms         both together: what one save costs the loop

What is still written after five steps is waited for unseen, which favours the slower writer. The last save is restored
and compared with a copy of the state that was saved.

The second table has only the call: `jaxckpt.save_async` and a manager's `save` of many small leaves whose plan is
cached, fresh arrays at each call, and a manager's `save` that is not due.
"""

from __future__ import annotations

import dataclasses
import functools
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.study import (
    StudyResult,
    StudySettings,
    describe_storage,
    least_of_orbax,
    make_row,
    scratch_in,
    take_turns,
)

NAMES = (
    "jaxckpt save_async",
    "jaxckpt manager",
    "orbax-v0 manager",
    "orbax-v0 async",
    "orbax-v0 async tuned",
    "orbax-v1 save_async",
    "orbax-v1 save_async tuned",
)

STEPS_AFTER = 5
QUIET_STEPS = 3
MATRIX_SIZE = 768
IDLE_CALLS = 2000


@dataclasses.dataclass(frozen=True)
class Size:
    """What is saved, and how often.

    Attributes:
        states: by name, number and bytes of the leaves.
        saves: saves of one loop; the first two only warm up.
        calls: by leaves, the bytes of one; each is a row of the second table.
        call_saves: saves of which a median is taken there, after three others.
    """

    states: dict[str, tuple[int, int]]
    saves: int
    calls: tuple[tuple[int, int], ...]
    call_saves: int


FULL = Size(
    states={"1,000 leaves of 64 KiB": (1000, 64 << 10), "16 leaves of 16 MiB": (16, 16 << 20)},
    saves=10,
    calls=((1000, 4096), (10_000, 4096), (1000, 256), (10_000, 256)),
    call_saves=20,
)
QUICK = Size(
    states={"200 leaves of 64 KiB": (200, 64 << 10), "4 leaves of 8 MiB": (4, 8 << 20)},
    saves=5,
    calls=((1000, 4096), (1000, 256)),
    call_saves=10,
)
TINY = Size(states={"4 leaves of 4 KiB": (4, 4096)}, saves=3, calls=((10, 256),), call_saves=3)


# --- the few verbs that all of them have --------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Saver:
    """One way to save in the background.

    Attributes:
        save: given a step (or a path, see `_keep_newest`) and a tree; after it the tree may be donated.
        wait: returns when the save is durable.
        restore: given the step (or the path) and a tree of the wanted kind.
    """

    save: Callable[[Any, Any], Any]
    wait: Callable[[], Any]
    restore: Callable[[Any, Any], Any]


def make_saver(name: str, directory: Path, *, keep: int = 2) -> Saver:
    """Makes the saver of that name, which keeps so many steps in the directory."""
    if name == "jaxckpt manager":
        import jaxckpt

        ours = jaxckpt.CheckpointManager(directory, save_interval_steps=1, max_to_keep=keep)
        return Saver(ours.save, ours.wait, lambda step, like: ours.restore(step, like=like))
    if name == "orbax-v0 manager":
        import orbax.checkpoint as ocp

        theirs = ocp.CheckpointManager(directory, options=ocp.CheckpointManagerOptions(max_to_keep=keep))
        return Saver(
            lambda step, tree: theirs.save(step, args=ocp.args.StandardSave(tree)),
            theirs.wait_until_finished,
            lambda step, like: theirs.restore(step, args=ocp.args.StandardRestore(like)),
        )
    return _keep_newest(_PATH_SAVERS[name](), directory, keep)


def _keep_newest(saver: Saver, directory: Path, keep: int) -> Saver:
    """Makes a saver that takes paths one that takes steps; deletes old ones while nobody measures."""
    saved: list[Path] = []

    def save(step: int, tree: Any) -> None:
        saved.append(directory / str(step))
        saver.save(saved[-1], tree)

    def wait() -> None:
        saver.wait()
        while len(saved) > keep:
            shutil.rmtree(saved.pop(0))

    return Saver(save, wait, lambda step, like: saver.restore(directory / str(step), like))


def _jaxckpt() -> Saver:
    import jaxckpt

    pending: list[Any] = []
    return Saver(
        lambda path, tree: pending.append(jaxckpt.save_async(path, tree)),
        lambda: pending.pop().wait(),
        lambda path, like: jaxckpt.restore(path, like=like),
    )


def _orbax_v0(*, is_tuned: bool) -> Saver:
    import orbax.checkpoint as ocp

    settings: dict[str, Any] = {"use_zarr3": True, "use_compression": False} if is_tuned else {}
    checkpointer = ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler(**settings))

    def restore(path: Any, like: Any) -> Any:
        restore_args = ocp.checkpoint_utils.construct_restore_args(like)
        return checkpointer.restore(path, args=ocp.args.PyTreeRestore(like, restore_args=restore_args))

    return Saver(
        lambda path, tree: checkpointer.save(path, args=ocp.args.PyTreeSave(tree)),
        checkpointer.wait_until_finished,
        restore,
    )


def _orbax_v1(*, is_tuned: bool) -> Saver:
    from orbax.checkpoint.experimental import v1 as ocp

    context = ocp.Context()
    if is_tuned:
        context.array.saving.use_compression = False
    pending: list[Any] = []

    def save(path: Any, tree: Any) -> None:
        with context:
            pending.append(ocp.save_async(path, tree))

    def restore(path: Any, like: Any) -> Any:
        with context:
            return ocp.load(path, like)

    return Saver(save, lambda: pending.pop().result(), restore)


_PATH_SAVERS: dict[str, Callable[[], Saver]] = {
    "jaxckpt save_async": _jaxckpt,
    "orbax-v0 async": functools.partial(_orbax_v0, is_tuned=False),
    "orbax-v0 async tuned": functools.partial(_orbax_v0, is_tuned=True),
    "orbax-v1 save_async": functools.partial(_orbax_v1, is_tuned=False),
    "orbax-v1 save_async tuned": functools.partial(_orbax_v1, is_tuned=True),
}


# --- in a fresh process -------------------------------------------------------------------------------------


def make_state(leaf_count: int, leaf_bytes: int) -> Any:
    import jax
    import jax.numpy as jnp

    state = {
        f"leaf_{number:05d}": jnp.full(leaf_bytes // 4, 1 + number / leaf_count)
        for number in range(leaf_count)
    }
    return jax.block_until_ready(state)


def measure_loop(name: str, directory: str, leaf_count: int, leaf_bytes: int, saves: int) -> dict[str, float]:
    import jax
    import jax.numpy as jnp

    matrix = jnp.full((MATRIX_SIZE, MATRIX_SIZE), 1 / MATRIX_SIZE)

    @functools.partial(jax.jit, donate_argnums=0)
    def train(state: Any) -> Any:
        factor = 1 + 1e-3 * (matrix @ matrix @ matrix @ matrix)[0, 0]
        return jax.tree.map(lambda leaf: leaf * factor, state)

    def timed_step(state: Any) -> tuple[Any, float]:
        began_s = time.perf_counter()
        state = jax.block_until_ready(train(state))
        return state, time.perf_counter() - began_s

    saver = make_saver(name, Path(directory))
    state = make_state(leaf_count, leaf_bytes)
    for _ in range(3):
        state, _ = timed_step(state)
    quiet_s: list[float] = []
    blocked_s: list[float] = []
    following_s: list[float] = []
    copy: dict[str, Any] = {}
    for number in range(saves):
        for _ in range(QUIET_STEPS):
            state, step_s = timed_step(state)
            quiet_s.append(step_s)
        if number == saves - 1:
            copy = {key: jax.device_get(leaf).copy() for key, leaf in state.items()}
        began_s = time.perf_counter()
        saver.save(number, state)
        blocked_s.append(time.perf_counter() - began_s)
        following_s.append(0.0)
        for _ in range(STEPS_AFTER):
            state, step_s = timed_step(state)
            following_s[-1] += step_s
        saver.wait()
    _compare(saver.restore(saves - 1, state), copy)
    step_s = statistics.median(quiet_s[2 * QUIET_STEPS :])
    slowdown_s = [each - STEPS_AFTER * step_s for each in following_s[2:]]
    return {
        "step ms": step_s * 1e3,
        "blocked ms": statistics.median(blocked_s[2:]) * 1e3,
        "slowdown ms": statistics.median(slowdown_s) * 1e3,
        "sum ms": statistics.median(map(sum, zip(blocked_s[2:], slowdown_s, strict=True))) * 1e3,
    }


def _compare(restored: Any, wanted: dict[str, Any]) -> None:
    import numpy as np

    different = [key for key, value in wanted.items() if not np.array_equal(restored[key], value)]
    if different or len(restored) != len(wanted):
        raise AssertionError(f"other values came back: {different[:5]}")


def measure_calls(
    name: str, directory: str, leaf_count: int, leaf_bytes: int, saves: int
) -> dict[str, float]:
    """The call alone; fresh arrays each time, since a training step makes such."""
    import jax

    saver = make_saver(name, Path(directory))
    state = make_state(leaf_count, leaf_bytes)
    blocked_s = []
    for number in range(3 + saves):
        state = jax.block_until_ready(jax.tree.map(lambda leaf: leaf + 1, state))
        began_s = time.perf_counter()
        saver.save(number, state)
        blocked_s.append(time.perf_counter() - began_s)
        saver.wait()
    return {"milliseconds": statistics.median(blocked_s[3:]) * 1e3}


def measure_idle_call(name: str, directory: str) -> dict[str, float]:
    """A call of a manager's `save` at a step at which no save is due."""
    state = make_state(20, 400)
    saver = make_saver_for_rare_saves(name, Path(directory))
    saver.save(0, state)
    saver.wait()
    seconds = []
    for _ in range(5):
        began_s = time.perf_counter()
        for _ in range(IDLE_CALLS):
            saver.save(999, state)
        seconds.append(time.perf_counter() - began_s)
    return {"milliseconds": min(seconds) / IDLE_CALLS * 1e3}


def make_saver_for_rare_saves(name: str, directory: Path) -> Saver:
    if name == "jaxckpt manager":
        import jaxckpt

        ours = jaxckpt.CheckpointManager(directory, save_interval_steps=10**6)
        return Saver(ours.save, ours.wait, ours.restore)
    import orbax.checkpoint as ocp

    theirs = ocp.CheckpointManager(directory, options=ocp.CheckpointManagerOptions(save_interval_steps=10**6))
    return Saver(
        lambda step, tree: theirs.save(step, args=ocp.args.StandardSave(tree)),
        theirs.wait_until_finished,
        theirs.restore,
    )


# --- the study ----------------------------------------------------------------------------------------------


def run(
    settings: StudySettings, size: Size | None = None, names: tuple[str, ...] = NAMES
) -> list[StudyResult]:
    size = size or (QUICK if settings.quick else FULL)
    results = []
    for directory in settings.directories:
        results += [_loop(settings, directory, state, size, names) for state in size.states]
        results.append(_calls(settings, directory, size, names))
    return results


def _loop(
    settings: StudySettings, directory: Path, state: str, size: Size, names: tuple[str, ...]
) -> StudyResult:
    leaf_count, leaf_bytes = size.states[state]

    def measure_one(name: str, _: int) -> dict[str, float]:
        with scratch_in(directory) as scratch:
            return settings.call(
                measure_loop,
                name=name,
                directory=str(scratch),
                leaf_count=leaf_count,
                leaf_bytes=leaf_bytes,
                saves=size.saves,
            )

    answers, notes = take_turns(names, settings.repeat, measure_one)
    found = {name: make_row("contender", name, each) for name, each in answers.items()}
    sums_ms = {name: row["sum ms"] for name, row in found.items()}
    figures = {}
    best_ms = least_of_orbax(sums_ms)
    if best_ms is not None:
        for name in names:
            if name.startswith("jaxckpt"):
                figures[f"blocked + slowdown, {state}: {name} / best Orbax"] = sums_ms[name] / best_ms
    return StudyResult(
        name="loop",
        title=f"training steps with donation on {state}; a save, then {STEPS_AFTER} steps",
        storage=describe_storage(directory),
        columns=("contender", "step ms", "blocked ms", "slowdown ms", "sum ms"),
        rows=tuple(found.values()),
        figures=figures,
        notes=tuple(notes),
    )


def _calls(settings: StudySettings, directory: Path, size: Size, names: tuple[str, ...]) -> StudyResult:
    subjects: dict[str, Callable[..., dict[str, float]]] = {}
    for leaf_count, leaf_bytes in size.calls:
        for name in ("jaxckpt save_async", "jaxckpt manager"):
            subjects[f"{name}, {leaf_count:,} leaves of {leaf_bytes} bytes"] = functools.partial(
                settings.call,
                measure_calls,
                name=name,
                leaf_count=leaf_count,
                leaf_bytes=leaf_bytes,
                saves=size.call_saves,
            )
    for name in ("jaxckpt manager", "orbax-v0 manager"):
        if name in names:
            subjects[f"{name}, not due"] = functools.partial(settings.call, measure_idle_call, name=name)

    def measure_one(name: str, _: int) -> dict[str, float]:
        with scratch_in(directory) as scratch:
            return subjects[name](directory=str(scratch))

    answers, notes = take_turns(list(subjects), settings.repeat, measure_one)
    rows = [make_row("call", name, each) for name, each in answers.items()]
    return StudyResult(
        name="loop",
        title=f"the call of a save alone, small leaves, the plan cached; medians of {size.call_saves} calls",
        storage=describe_storage(directory),
        columns=("call", "milliseconds"),
        rows=tuple(rows),
        figures={f"{row['call']}: ms": row["milliseconds"] for row in rows},
        notes=tuple(notes),
    )
