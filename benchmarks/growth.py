"""Does the cost of a save, an open and a restore grow linearly with leaves, chunks and devices?

One of the three grows and the others stay, so that the exponent of each shows: the slope of the logarithms over the
three largest sizes, 1 for linear. Each size is measured in a fresh process:

    first call      `save_async`, the first in the process: the caller is blocked for planning, too
    cached call     the same with the plan cached, median of three
    save            a blocking `save`, durable, median of three
    open            `jaxckpt.open`, median of three
    restore         `jaxckpt.restore` with ``like``, to arrays that are ready, median of three

    leaves      1,000 to 100,000 arrays of 16 bytes on one device: one chunk each
    chunks      one array, cut into 1,000 to 100,000 chunks of 64 bytes (``chunk_bytes_max``)
    devices     1,000 arrays, each cut into rows over 1 to 64 devices: as many chunks of an array as devices

All figures are milliseconds. The exponents are those of the least values, which a busy machine disturbs least.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.study import (
    StudyResult,
    StudySettings,
    describe_storage,
    growth_exponent,
    make_row,
    scratch_in,
    take_turns,
)

COLUMNS = ("first call", "cached call", "save", "open", "restore")
AGAIN = 3

CHUNK_BYTES = 64
ROWS = 64  # of an array that is cut over devices


@dataclasses.dataclass(frozen=True)
class Size:
    """The sizes of each axis, and the leaves while devices grow."""

    leaves: tuple[int, ...]
    chunks: tuple[int, ...]
    devices: tuple[int, ...]
    leaves_on_devices: int


FULL = Size(
    leaves=(1000, 3000, 10_000, 30_000, 100_000),
    chunks=(1000, 3000, 10_000, 30_000, 100_000),
    devices=(1, 2, 4, 8, 16, 32, 64),
    leaves_on_devices=1000,
)
QUICK = Size(leaves=(300, 1000, 3000), chunks=(300, 1000, 3000), devices=(1, 4, 16), leaves_on_devices=100)
TINY = Size(leaves=(), chunks=(), devices=(1, 2), leaves_on_devices=2)


# --- in a fresh process -------------------------------------------------------------------------------------


def measure_tree(directory: str, leaf_count: int, row_count: int, device_count: int) -> dict[str, float]:
    """Measures a tree of so many leaves with so many rows of 64 bytes, over so many devices."""
    import jax
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

    import jaxckpt

    sharding = SingleDeviceSharding(jax.devices()[0])
    if device_count > 1:
        sharding = NamedSharding(Mesh(np.array(jax.devices()), ("x",)), PartitionSpec("x"))
    width = 4 if row_count == 1 else CHUNK_BYTES // 4
    values = {f"leaf_{n:06d}": np.full((row_count, width), n, np.float32) for n in range(leaf_count)}
    tree = jax.block_until_ready(jax.device_put(values, sharding))
    like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)
    is_cut = leaf_count == 1
    options = jaxckpt.SaveOptions(chunk_bytes_max=CHUNK_BYTES) if is_cut else jaxckpt.SaveOptions()
    place = Path(directory)
    numbers = iter(range(100))

    def call_of_save_async() -> float:
        began_s = time.perf_counter()
        pending = jaxckpt.save_async(place / str(next(numbers)), tree, options=options)
        seconds = time.perf_counter() - began_s
        pending.wait()
        return seconds

    def seconds_of(operation: Callable[[], Any]) -> float:
        found = []
        for _ in range(AGAIN):
            began_s = time.perf_counter()
            operation()
            found.append(time.perf_counter() - began_s)
        return statistics.median(found)

    seconds = {
        "first call": call_of_save_async(),
        "cached call": statistics.median(call_of_save_async() for _ in range(AGAIN)),
        "save": seconds_of(lambda: jaxckpt.save(place / str(next(numbers)), tree, options=options)),
        "open": seconds_of(lambda: jaxckpt.open(place / "0")),
        "restore": seconds_of(lambda: jax.block_until_ready(jaxckpt.restore(place / "0", like))),
    }
    return {name: each * 1e3 for name, each in seconds.items()}


# --- the study ----------------------------------------------------------------------------------------------


def run(settings: StudySettings, size: Size | None = None) -> list[StudyResult]:
    size = size or (QUICK if settings.quick else FULL)
    axes: dict[str, dict[int, dict[str, int]]] = {
        "leaves": {n: {"leaf_count": n, "row_count": 1, "device_count": 1} for n in size.leaves},
        "chunks": {n: {"leaf_count": 1, "row_count": n, "device_count": 1} for n in size.chunks},
        "devices": {
            n: {"leaf_count": size.leaves_on_devices, "row_count": ROWS, "device_count": n}
            for n in size.devices
        },
    }
    return [
        _study(settings, directory, axis, sizes)
        for directory in settings.directories
        for axis, sizes in axes.items()
        if sizes
    ]


def _study(
    settings: StudySettings, directory: Path, axis: str, sizes: dict[int, dict[str, int]]
) -> StudyResult:
    subjects = {f"jaxckpt, {axis}: {n:,}": n for n in sizes}

    def measure_one(subject: str, _: int) -> dict[str, float]:
        arguments = sizes[subjects[subject]]
        with scratch_in(directory) as scratch:
            return settings.call(
                measure_tree,
                devices=arguments["device_count"],
                directory=str(scratch),
                **arguments,
            )

    answers, notes = take_turns(list(subjects), settings.repeat, measure_one)
    rows = [make_row(axis, subject, each) | {axis: subjects[subject]} for subject, each in answers.items()]
    exponents = {
        column: growth_exponent(
            list(sizes), [min(answer[column] for answer in answers[subject]) for subject in subjects]
        )
        for column in COLUMNS
    }
    return StudyResult(
        name="growth",
        title=f"milliseconds against {axis}",
        storage=describe_storage(directory),
        columns=(axis, *COLUMNS),
        rows=(*rows, {axis: "exponent", **exponents}),
        figures={f"{axis}, {column}: exponent": value for column, value in exponents.items()},
        notes=tuple(notes),
    )
