"""How long does it take to open a checkpoint of very many leaves, and to list the steps of a long run?

Opening: `jaxckpt.open`, and Orbax's reading of the metadata, in a fresh process with warm files: the first call, and
the median of five more in the same process. Orbax needs about a millisecond to save a leaf, so that its checkpoint has
10,000 leaves where jaxckpt's have 10,000 and 100,000.

Listing: a fresh manager on a directory of 1,000 steps: seconds to make it, and for the first question after its steps
and the newest one. All steps are copies of one, which is how a file system sees a long run.
"""

from __future__ import annotations

import dataclasses
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import contenders, measure
from benchmarks.study import (
    StudyResult,
    StudySettings,
    describe_storage,
    least_of_orbax,
    make_row,
    scratch_in,
    take_turns,
)

OPENERS = ("jaxckpt", "orbax-v0-default", "orbax-v1-default")
LISTERS = ("jaxckpt", "orbax-v0", "orbax-v0-lightweight", "orbax-v1")

LEAF_VALUES = 4
AGAIN = 5


@dataclasses.dataclass(frozen=True)
class Size:
    """Leaves of the checkpoint that all have, leaves of jaxckpt's large one, and steps of a directory."""

    leaves: int
    leaves_large: int
    steps: int


FULL = Size(leaves=10_000, leaves_large=100_000, steps=1000)
QUICK = Size(leaves=500, leaves_large=20_000, steps=200)
TINY = Size(leaves=10, leaves_large=50, steps=5)


# --- in a fresh process -------------------------------------------------------------------------------------


def make_tree(leaf_count: int) -> Any:
    import jax
    import numpy as np

    values = {
        f"layer_{n // 10:05d}/leaf_{n % 10}": np.full(LEAF_VALUES, n, np.float32) for n in range(leaf_count)
    }
    return jax.block_until_ready(jax.device_put(values))


def save_leaves(contender: str, path: str, leaf_count: int) -> None:
    found = contenders.find_contender(contender)
    contenders.load_modules(found)
    found.save(Path(path), make_tree(leaf_count))


def open_leaves(contender: str, path: str, leaf_count: int) -> dict[str, float]:
    import jax

    contenders.load_modules(contenders.find_contender(contender))
    jax.devices()
    count_leaves = _opener_of(contender, Path(path))
    seconds = []
    for _ in range(1 + AGAIN):
        began_s = time.perf_counter()
        found = count_leaves()
        seconds.append(time.perf_counter() - began_s)
        if found != leaf_count:
            raise AssertionError(f"{contender} found {found} leaves of {leaf_count}")
    return {"first ms": seconds[0] * 1e3, "again ms": statistics.median(seconds[1:]) * 1e3}


def _opener_of(contender: str, path: Path) -> Callable[[], int]:
    """What opens the checkpoint and says how many leaves it has."""
    import jax

    if contender == "jaxckpt":
        import jaxckpt

        return lambda: len(jaxckpt.open(path).keys())
    if contender.startswith("orbax-v0"):
        import orbax.checkpoint as ocp

        checkpointer = ocp.StandardCheckpointer()
        return lambda: len(jax.tree.leaves(checkpointer.metadata(path).item_metadata.tree))
    from orbax.checkpoint.experimental import v1

    return lambda: len(jax.tree.leaves(v1.metadata(path).metadata))


def save_step(lister: str, directory: str) -> None:
    """Saves step 0 of a run."""
    place, tree = Path(directory), make_tree(3)
    if lister == "jaxckpt":
        import jaxckpt

        with jaxckpt.CheckpointManager(place, save_interval_steps=1, max_to_keep=None) as manager:
            manager.save(0, tree)
    elif lister.startswith("orbax-v0"):
        import orbax.checkpoint as ocp

        with ocp.CheckpointManager(place) as theirs:
            theirs.save(0, args=ocp.args.StandardSave(tree))
    else:
        from orbax.checkpoint.experimental import v1

        with v1.training.Checkpointer(place) as checkpointer:
            checkpointer.save(0, tree)


def list_steps(lister: str, directory: str, steps: int) -> dict[str, float]:
    import jax

    make, ask = _lister_of(lister, Path(directory))
    jax.devices()
    began_s = time.perf_counter()
    manager = make()
    made_s = time.perf_counter()
    newest, found = ask(manager)
    asked_s = time.perf_counter()
    ask(manager)
    again_s = time.perf_counter()
    if (newest, found) != (steps - 1, list(range(steps))):
        raise AssertionError(f"{lister} found {len(found)} steps of {steps}, and {newest} as the newest")
    return {
        "make ms": (made_s - began_s) * 1e3,
        "list ms": (asked_s - made_s) * 1e3,
        "make + list ms": (asked_s - began_s) * 1e3,
        "list again ms": (again_s - asked_s) * 1e3,
    }


def _lister_of(
    lister: str, directory: Path
) -> tuple[Callable[[], Any], Callable[[Any], tuple[int | None, list[int]]]]:
    """What makes the manager, and what asks it for the newest step and for all."""
    if lister == "jaxckpt":
        import jaxckpt

        return (
            lambda: jaxckpt.CheckpointManager(directory, max_to_keep=None),
            lambda manager: (manager.latest_step(), list(manager.steps())),
        )
    if lister.startswith("orbax-v0"):
        import orbax.checkpoint as ocp

        # Its way for a thousand steps, which reads no metadata of them.
        options = ocp.CheckpointManagerOptions(lightweight_initialize=lister.endswith("lightweight"))
        return (
            lambda: ocp.CheckpointManager(directory, options=options),
            lambda manager: (manager.latest_step(), sorted(manager.all_steps())),
        )
    from orbax.checkpoint.experimental import v1

    return (
        lambda: v1.training.Checkpointer(directory),
        lambda manager: (manager.latest.step, sorted(each.step for each in manager.checkpoints)),
    )


# --- the study ----------------------------------------------------------------------------------------------


def run(
    settings: StudySettings, size: Size | None = None, names: tuple[str, ...] = OPENERS + LISTERS
) -> list[StudyResult]:
    size = size or (QUICK if settings.quick else FULL)
    results = []
    for directory in settings.directories:
        openers = [name for name in OPENERS if name in names]
        results.append(_opening(settings, directory, size, openers))
        results.append(_listing(settings, directory, size, [name for name in LISTERS if name in names]))
    return results


def _opening(settings: StudySettings, directory: Path, size: Size, names: list[str]) -> StudyResult:
    large = f"jaxckpt, {size.leaves_large:,} leaves"
    subjects = {f"{name}, {size.leaves:,} leaves": (name, size.leaves) for name in names}
    subjects[large] = ("jaxckpt", size.leaves_large)
    with scratch_in(directory) as scratch:
        places = {subject: str(scratch / subject.replace(", ", "-")) for subject in subjects}

        def save(subject: str, _: int) -> dict[str, Any]:
            name, leaf_count = subjects[subject]
            settings.call(save_leaves, contender=name, path=places[subject], leaf_count=leaf_count)
            return {}

        def measure_one(subject: str, _: int) -> dict[str, Any]:
            name, leaf_count = subjects[subject]
            measure.warm(Path(places[subject]))
            return settings.call(open_leaves, contender=name, path=places[subject], leaf_count=leaf_count)

        saved, absent = take_turns(list(subjects), 1, save)
        answers, notes = take_turns(list(saved), settings.repeat, measure_one)
    rows = {subject: make_row("checkpoint", subject, each) for subject, each in answers.items()}
    figures: dict[str, float] = {
        "leaves of the large one": size.leaves_large,
        "open the large one, first: ms": rows[large]["first ms"],
        "open the large one, again: ms": rows[large]["again ms"],
    }
    best_ms = least_of_orbax({subject: row["first ms"] for subject, row in rows.items()})
    if best_ms is not None:
        ours_ms = rows[f"jaxckpt, {size.leaves:,} leaves"]["first ms"]
        figures["open: best Orbax / jaxckpt, equal leaves"] = best_ms / ours_ms
        scaled_ms = best_ms * size.leaves_large / size.leaves
        figures["open: best Orbax scaled to the large one / jaxckpt"] = scaled_ms / rows[large]["first ms"]
    return StudyResult(
        name="opening",
        title=f"opening a checkpoint: which leaves it has, of {4 * LEAF_VALUES} bytes each",
        storage=describe_storage(directory),
        columns=("checkpoint", "first ms", "again ms"),
        rows=tuple(rows.values()),
        figures=figures,
        notes=(*absent, *notes),
    )


def _listing(settings: StudySettings, directory: Path, size: Size, names: list[str]) -> StudyResult:
    with scratch_in(directory) as scratch:

        def save(name: str, _: int) -> dict[str, Any]:
            place = scratch / name
            settings.call(save_step, lister=name, directory=str(place))
            (first,) = (entry for entry in place.iterdir() if entry.is_dir())
            for step in range(1, size.steps):
                shutil.copytree(first, place / _name_of_step(first.name, step))
            return {}

        def measure_one(name: str, _: int) -> dict[str, Any]:
            return settings.call(list_steps, lister=name, directory=str(scratch / name), steps=size.steps)

        saved, absent = take_turns(names, 1, save)
        answers, notes = take_turns(list(saved), settings.repeat, measure_one)
    rows = {name: make_row("manager", name, each) for name, each in answers.items()}
    figures = {"steps": float(size.steps), "make + list: ms": rows["jaxckpt"]["make + list ms"]}
    best_ms = least_of_orbax({name: row["make + list ms"] for name, row in rows.items()})
    if best_ms is not None:
        figures["make + list: best Orbax / jaxckpt"] = best_ms / figures["make + list: ms"]
    return StudyResult(
        name="opening",
        title=f"a fresh manager on a directory of {size.steps:,} steps: all steps and the newest",
        storage=describe_storage(directory),
        columns=("manager", "make ms", "list ms", "make + list ms", "list again ms"),
        rows=tuple(rows.values()),
        figures=figures,
        notes=(*absent, *notes),
    )


def _name_of_step(first_name: str, step: int) -> str:
    """The name of a step beside that of step 0, such as step_00000007 beside step_00000000."""
    prefix = first_name.rstrip("0")
    return f"{prefix}{step:0{len(first_name) - len(prefix)}d}"
