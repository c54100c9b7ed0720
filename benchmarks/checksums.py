"""What do the checksums cost a save and a restore?

Neither has a switch for them, so this benchmark makes one, in its own processes only: where "off", the hash function
that jaxckpt's modules call (``xxhash``) gives the same 16 bytes for everything of 64 KiB and more, without looking at
it. What is saved in this way is restored in this way: the comparison with what is stored stays, the reading of the
bytes for the sake of the checksum goes. Small objects such as the manifest are hashed as ever. Each process reports
the bytes that were not hashed, and fails if that is not nearly all of them.

1 GiB in 16 leaves over 8 devices. On and off take turns, each in a fresh process; CPU seconds are those of all threads
of the process during the operation. The cost is the median of the ratios within a turn, less 1; where a busy machine
makes that vary by more than the cost itself, the ratio of the least values and the CPU seconds of the hashing say more.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
import sys
import time
import types
from pathlib import Path
from typing import Any

from benchmarks import measure
from benchmarks.study import (
    MIB,
    StudyResult,
    StudySettings,
    describe_storage,
    make_row,
    normal_values,
    scratch_in,
    take_turns,
)

SWITCHES = ("on", "off")
OPERATIONS = ("save", "restore")
DEVICES = 8

# From here on nothing is hashed while checksums are off.
HASHED_BYTES_MIN = 64 << 10


@dataclasses.dataclass(frozen=True)
class Size:
    """Number and shape of the float32 leaves, and turns in each repetition.

    Five percent of a second are hard to see on a busy machine: hence several turns.
    """

    leaf_count: int
    leaf_shape: tuple[int, int]
    turns: int

    @property
    def nbytes(self) -> int:
        return 4 * self.leaf_count * self.leaf_shape[0] * self.leaf_shape[1]


FULL = Size(16, (4096, 4096), turns=3)
QUICK = Size(16, (1024, 1024), turns=3)
TINY = Size(2, (512, 512), turns=1)


# --- in a fresh process -------------------------------------------------------------------------------------


class WatchedHash(types.ModuleType):
    """Stands for the module ``xxhash``: hashes, or does not, and knows how much and how long."""

    def __init__(self, real: Any, *, is_on: bool) -> None:
        super().__init__("xxhash")
        self._real = real
        self._is_on = is_on
        # Lists, since several threads add to them.
        self._skipped_bytes: list[int] = []
        self._cpu_s: list[float] = []

    def xxh3_128_digest(self, data: Any, seed: int = 0) -> bytes:
        nbytes = memoryview(data).nbytes
        if not self._is_on and nbytes >= HASHED_BYTES_MIN:
            self._skipped_bytes.append(nbytes)
            return bytes(16)
        began_s = time.thread_time()
        digest = self._real.xxh3_128_digest(data, seed)
        self._cpu_s.append(time.thread_time() - began_s)
        return digest

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    @property
    def skipped_bytes(self) -> int:
        """Bytes that were asked for and not hashed."""
        return sum(self._skipped_bytes)

    @property
    def cpu_s(self) -> float:
        """CPU seconds of hashing, over all threads."""
        return sum(self._cpu_s)


def watch_checksums(*, is_on: bool) -> WatchedHash:
    """Puts a `WatchedHash` into all modules of jaxckpt that hash."""
    import xxhash

    watched = WatchedHash(xxhash, is_on=is_on)
    for name, module in list(sys.modules.items()):
        if name.startswith("jaxckpt.") and getattr(module, "xxhash", None) is xxhash:
            vars(module)["xxhash"] = watched
    return watched


def measure_operation(operation: str, path: str, switch: str, size: dict[str, Any]) -> dict[str, float]:
    import jax
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    import jaxckpt

    shape = Size(**size)
    watched = watch_checksums(is_on=switch == "on")
    sharding = NamedSharding(Mesh(np.array(jax.devices()), ("x",)), PartitionSpec("x"))
    values = normal_values(shape.leaf_shape, 0)

    def make_leaf(number: int) -> Any:
        return jax.block_until_ready(jax.device_put(values + number, sharding, may_alias=False))

    if operation == "save":
        tree = {f"leaf_{number:02d}": make_leaf(number) for number in range(shape.leaf_count)}
        measure.back_free_memory(shape.nbytes)
        cpu_before_s = time.process_time()
        _, usage = measure.measure(lambda: jaxckpt.save(path, tree))
        cpu_s = time.process_time() - cpu_before_s
    else:
        leaf = jax.ShapeDtypeStruct(tuple(shape.leaf_shape), "float32", sharding=sharding)
        like = {f"leaf_{number:02d}": leaf for number in range(shape.leaf_count)}
        measure.back_free_memory(2 * shape.nbytes)
        cpu_before_s = time.process_time()
        restored, usage = measure.measure(lambda: jax.block_until_ready(jaxckpt.restore(path, like)))
        cpu_s = time.process_time() - cpu_before_s
        for number, leaf in enumerate(restored.values()):
            if not np.array_equal(np.asarray(leaf), values + number):
                raise AssertionError(f"leaf {number} came back with other values")
    if switch == "off" and watched.skipped_bytes < 0.95 * shape.nbytes:
        raise AssertionError(f"only {watched.skipped_bytes} of {shape.nbytes} bytes were not hashed")
    return {"seconds": usage.seconds, "CPU s": cpu_s, "hashing CPU s": watched.cpu_s}


# --- the study ----------------------------------------------------------------------------------------------


def run(settings: StudySettings, size: Size | None = None) -> list[StudyResult]:
    size = size or (QUICK if settings.quick else FULL)
    return [_study(settings, directory, size) for directory in settings.directories]


def _study(settings: StudySettings, directory: Path, size: Size) -> StudyResult:
    call = functools.partial(
        settings.call,
        measure_operation,
        devices=DEVICES,
        size=dataclasses.asdict(size),
    )
    with scratch_in(directory) as scratch:

        def measure_one(name: str, _: int) -> dict[str, Any]:
            """Saves and restores with checksums on or off; warm files."""
            switch = name.rpartition(" ")[2]
            answer = {}
            with scratch_in(scratch) as place:
                path = place / "checkpoint"
                for operation in OPERATIONS:
                    if operation == "restore":
                        measure.warm(path)
                    found = call(operation=operation, path=str(path), switch=switch)
                    answer |= {f"{operation}, {column}": value for column, value in found.items()}
            return answer

        subjects = [f"jaxckpt, checksums {switch}" for switch in SWITCHES]
        answers, notes = take_turns(subjects, size.turns * settings.repeat, measure_one)
    columns = list(answers[subjects[0]][0])
    on, off = (
        make_row("checksums", switch, answers[subject])
        for switch, subject in zip(SWITCHES, subjects, strict=True)
    )
    turns = list(zip(*(answers[subject] for subject in subjects), strict=True))
    costs: dict[str, float] = {}
    least_costs: dict[str, float] = {}
    for column in columns:
        if "hashing" in column:
            continue
        costs[column] = statistics.median(with_[column] / without[column] for with_, without in turns) - 1
        least_with, least_without = (
            min(answer[column] for answer in each) for each in zip(*turns, strict=True)
        )
        least_costs[column] = least_with / least_without - 1
    return StudyResult(
        name="checksums",
        title=f"save and restore of {size.nbytes / MIB:,.0f} MiB with checksums and without",
        storage=describe_storage(directory),
        columns=("checksums", *columns),
        rows=(
            on,
            off,
            {"checksums": "cost", **costs},
            {"checksums": "cost by the least values", **least_costs},
        ),
        figures={f"{column}: cost": value for column, value in costs.items()}
        | {f"{column}: cost by the least values": value for column, value in least_costs.items()},
        notes=(
            "off: xxhash.xxh3_128_digest is replaced by a constant for 64 KiB and more, in the benchmark's process",
            *notes,
        ),
    )
