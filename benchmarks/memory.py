"""How much host memory do a save and a restore take at their highest, beyond what is there anyway?

Each operation runs once in a fresh process, and the kernel tells the peak (VmHWM, set back before it): less the
resident memory before, and for a restore less the arrays that it returns, whose memory has to come from somewhere:
what stays resident with them, but no more than their bytes on all devices and JAX's own objects. The budget is
``host_bytes_max`` of the options; "default" leaves it to the library, which is half of the machine.

    single    one leaf of 2 GiB on one device
    large     1 GiB in 16 leaves, each cut into rows over 8 devices
    small     10,000 leaves of 4 KiB, each whole on 8 devices
    tiny      50,000 leaves of 256 bytes, each whole on 8 devices

"over budget" is the extra peak less the budget, in MiB. Not counted is the page cache, which is the kernel's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import measure
from benchmarks.study import (
    MIB,
    StudyResult,
    StudySettings,
    describe_storage,
    make_row,
    resident_bytes_here,
    scratch_in,
)

BUDGETS_MIB = (16, 64, 256, None)
OPERATIONS = ("save", "save_async", "restore")

# What `jax.device_put` of small arrays takes for each of them on each device beside its bytes; measured: 1.9 KiB.
ARRAY_OBJECTS_BYTES = 2048

# A peak does not vary as a time does.
REPEAT_MAX = 3


@dataclasses.dataclass(frozen=True)
class State:
    """A tree of equal float32 leaves."""

    leaf_count: int
    leaf_shape: tuple[int, ...]
    devices: int
    is_replicated: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes that all devices hold together."""
        elements = self.leaf_count
        for length in self.leaf_shape:
            elements *= length
        return 4 * elements * (self.devices if self.is_replicated else 1)

    @property
    def resident_bytes_max(self) -> int:
        """The most memory that the arrays have a right to."""
        return self.nbytes + self.leaf_count * self.devices * ARRAY_OBJECTS_BYTES


FULL = {
    "single": State(1, (32768, 16384), devices=1),
    "large": State(16, (4096, 4096), devices=8),
    "small": State(10_000, (1024,), devices=8, is_replicated=True),
    "tiny": State(50_000, (64,), devices=8, is_replicated=True),
}
QUICK = {
    "single": State(1, (8192, 8192), devices=1),
    "large": State(16, (1024, 1024), devices=8),
    "small": State(1000, (1024,), devices=8, is_replicated=True),
    "tiny": State(5000, (64,), devices=8, is_replicated=True),
}
TINY = {"single": State(1, (512, 512), devices=1)}


# --- in a fresh process -------------------------------------------------------------------------------------


def measure_operation(
    operation: str, path: str, state: dict[str, Any], budget_mib: int | None
) -> dict[str, float]:
    import jax

    import jaxckpt

    shape = State(**state)
    budget = None if budget_mib is None else budget_mib * MIB
    sharding = _sharding_of(shape)
    if operation == "restore":
        leaf = jax.ShapeDtypeStruct(tuple(shape.leaf_shape), "float32", sharding=sharding)
        like = {f"leaf_{number:05d}": leaf for number in range(shape.leaf_count)}
        options = jaxckpt.RestoreOptions(host_bytes_max=budget)
        before_bytes = resident_bytes_here()
        restored, usage = measure.measure(
            lambda: jax.block_until_ready(jaxckpt.restore(path, like, options=options))
        )
        arrays_bytes = min(shape.resident_bytes_max, resident_bytes_here() - before_bytes)
        _check(restored)
        return {"extra MiB": (usage.peak_extra_bytes - arrays_bytes) / MIB, "seconds": usage.seconds}
    tree = _make_tree(shape, sharding)
    save_options = jaxckpt.SaveOptions(host_bytes_max=budget)
    if operation == "save":
        _, usage = measure.measure(lambda: jaxckpt.save(path, tree, options=save_options))
    else:
        _, usage = measure.measure(lambda: jaxckpt.save_async(path, tree, options=save_options).wait())
    return {"extra MiB": usage.peak_extra_bytes / MIB, "seconds": usage.seconds}


def _sharding_of(state: State) -> Any:
    import jax
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

    if state.devices == 1:
        return SingleDeviceSharding(jax.devices()[0])
    mesh = Mesh(np.array(jax.devices()), ("x",))
    return NamedSharding(mesh, PartitionSpec() if state.is_replicated else PartitionSpec("x"))


def _make_tree(state: State, sharding: Any) -> Any:
    """Leaves whose elements are their own numbers; the first element of the n-th is n."""
    import jax
    import jax.numpy as jnp

    elements = 1
    for length in state.leaf_shape:
        elements *= length
    make = jax.jit(
        lambda first: (first + jnp.arange(elements, dtype=jnp.float32)).reshape(state.leaf_shape),
        out_shardings=sharding,
    )
    tree = {f"leaf_{number:05d}": make(float(number)) for number in range(state.leaf_count)}
    return jax.block_until_ready(tree)


def _check(restored: Any) -> None:
    import numpy as np

    for number, leaf in enumerate(restored.values()):
        for shard in leaf.addressable_shards[:: max(1, len(leaf.addressable_shards) - 1)]:
            row = np.asarray(shard.data).reshape(-1)
            start = shard.index[0].start or 0
            first = number + start * (leaf.size // leaf.shape[0])
            wanted = np.float32(number) + np.arange(first - number, first - number + 8, dtype=np.float32)
            if not np.array_equal(row[:8], wanted):
                raise AssertionError(f"leaf {number} came back with other values")


# --- the study ----------------------------------------------------------------------------------------------


def run(
    settings: StudySettings,
    size: dict[str, State] | None = None,
    budgets_mib: Sequence[int | None] = BUDGETS_MIB,
) -> list[StudyResult]:
    states = size or (QUICK if settings.quick else FULL)
    return [_study(settings, directory, states, budgets_mib) for directory in settings.directories]


def _study(
    settings: StudySettings, directory: Path, states: dict[str, State], budgets_mib: Sequence[int | None]
) -> StudyResult:
    answers: dict[tuple[str, str, int | None], list[dict[str, float]]] = {}
    for _ in range(min(settings.repeat, REPEAT_MAX)):
        for name, state in states.items():
            for budget_mib in budgets_mib:
                for operation, answer in _measure_state(settings, directory, state, budget_mib).items():
                    answers.setdefault((name, operation, budget_mib), []).append(answer)
    rows = []
    over_mib = []
    figures: dict[str, float] = {}
    for (name, operation, budget_mib), found in answers.items():
        row = make_row("state", name, found)
        row |= {"operation": operation, "budget MiB": "default" if budget_mib is None else budget_mib}
        row["extra / state"] = row["extra MiB"] * MIB / states[name].nbytes
        if budget_mib is None:
            if name == "single":
                figures[f"single, {operation}, default budget: extra / state"] = row["extra / state"]
        else:
            row["over budget MiB"] = row["extra MiB"] - budget_mib
            over_mib.append(max(answer["extra MiB"] for answer in found) - budget_mib)
        rows.append(row)
    return StudyResult(
        name="memory",
        title="peak host memory of one operation, beyond what was resident and what a restore returns",
        storage=describe_storage(directory),
        columns=(
            "state",
            "operation",
            "budget MiB",
            "extra MiB",
            "over budget MiB",
            "extra / state",
            "seconds",
        ),
        rows=tuple(rows),
        figures={"most over budget MiB": max(over_mib), **figures},
        notes=tuple(
            f"{name}: {state.nbytes / MIB:,.0f} MiB on the devices" for name, state in states.items()
        ),
    )


def _measure_state(
    settings: StudySettings, directory: Path, state: State, budget_mib: int | None
) -> dict[str, dict[str, float]]:
    found = {}
    with scratch_in(directory) as scratch:
        for operation in OPERATIONS:
            path = scratch / ("save_async" if operation == "save_async" else "save")
            found[operation] = settings.call(
                measure_operation,
                devices=state.devices,
                operation=operation,
                path=str(path),
                state=dataclasses.asdict(state),
                budget_mib=budget_mib,
            )
    return found
