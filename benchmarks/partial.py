"""What does reading a part of a checkpoint cost: one leaf of a thousand, rows of a large leaf, a block of columns?

One checkpoint has a leaf of 256 MiB and 999 small ones, 1 GiB together, all cut into rows over 8 devices. A fresh
process with one device reads one part as a user of that library would do it best:

* jaxckpt: `jaxckpt.open(path)[key][index]`.
* Orbax: a partial restore of the one leaf. It has no reading of slices; the nearest is its truncation
  (``strict=False`` of v0, ``enable_padding_and_truncation`` of v1), which reads from the first row and column to the
  last wanted one. The rest is cut off afterwards.

The clock runs from the opening to the values in memory, and the values are compared with the saved ones. "read" is
what the process asked of storage by read calls, metadata included, over the bytes of the part.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

from benchmarks import contenders, measure
from benchmarks.study import (
    MIB,
    StudyResult,
    StudySettings,
    describe_storage,
    least_of_orbax,
    make_row,
    normal_values,
    scratch_in,
    take_turns,
)

CONTENDERS = (
    "jaxckpt",
    "orbax-v0-default",
    "orbax-v0-tuned-ocdbt",
    "orbax-v1-default",
    "orbax-v1-tuned-ocdbt",
)

DEVICES = 8
BIG = "big"


@dataclasses.dataclass(frozen=True)
class Size:
    """Shapes of the float32 leaves; the first axis of each is a multiple of the devices."""

    big: tuple[int, int]
    small: tuple[int, int]
    small_count: int


FULL = Size(big=(8192, 8192), small=(192, 1024), small_count=999)
QUICK = Size(big=(2048, 2048), small=(8, 1024), small_count=199)
TINY = Size(big=(512, 512), small=(8, 16), small_count=5)


def small_key(number: int) -> str:
    return f"small_{number:04d}"


def parts_of(size: Size) -> dict[str, tuple[str, tuple[slice, slice]]]:
    """By name, the key and the index of what is read."""
    middle = size.big[1] // 2
    return {
        "one leaf": (small_key(size.small_count // 2), (slice(0, size.small[0]), slice(0, size.small[1]))),
        "rows 10:20": (BIG, (slice(10, 20), slice(0, size.big[1]))),
        "column block": (BIG, (slice(0, size.big[0]), slice(middle, middle + size.big[1] // 32))),
    }


def leaf_values(size: Size, key: str) -> Any:
    if key == BIG:
        return normal_values(size.big, 0)
    return normal_values(size.small, 1 + int(key.rpartition("_")[2]))


# --- in a fresh process -------------------------------------------------------------------------------------


def save_all(contender: str, path: str, size: dict[str, Any]) -> None:
    import jax
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    shapes = Size(**size)
    found = contenders.find_contender(contender)
    contenders.load_modules(found)
    mesh = Mesh(np.array(jax.devices()), ("x",))
    keys = [BIG, *map(small_key, range(shapes.small_count))]
    values = {key: leaf_values(shapes, key) for key in keys}
    tree = jax.block_until_ready(jax.device_put(values, NamedSharding(mesh, PartitionSpec("x"))))
    found.save(Path(path), tree)


def read_part(contender: str, path: str, size: dict[str, Any], part: str) -> dict[str, float]:
    import jax
    import numpy as np

    shapes = Size(**size)
    contenders.load_modules(contenders.find_contender(contender))
    key, index = parts_of(shapes)[part]
    jax.devices()  # starts the backend
    read = _reader_of(contender, Path(path), key, index, shapes)
    got, usage = measure.measure(read)
    wanted = leaf_values(shapes, key)[index]
    if not np.array_equal(np.asarray(got).view(np.uint32), wanted.view(np.uint32)):
        raise AssertionError(f"{contender} read other values for {part}")
    return {
        "seconds": usage.seconds,
        "read / wanted": usage.call_read_bytes / wanted.nbytes,
        "read MiB": usage.call_read_bytes / MIB,
        "peak MiB": usage.peak_extra_bytes / MIB,
    }


def _reader_of(contender: str, path: Path, key: str, index: tuple[slice, slice], size: Size) -> Any:
    """What reads the part with this library."""
    import jax

    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    read_shape = tuple(each.stop for each in index)  # Orbax reads from the first element on
    whole_shape = size.big if key == BIG else size.small

    def read_with_jaxckpt() -> Any:
        import jaxckpt

        return jaxckpt.open(path)[key][index]

    def read_with_orbax_v0() -> Any:
        import orbax.checkpoint as ocp

        is_whole = read_shape == whole_shape
        wanted = {key: jax.ShapeDtypeStruct(read_shape, "float32", sharding=sharding)}
        restore_args = {
            key: ocp.ArrayRestoreArgs(sharding=sharding, global_shape=read_shape, strict=is_whole)
        }
        arguments = ocp.args.PyTreeRestore(wanted, restore_args=restore_args, partial_restore=True)
        with ocp.PyTreeCheckpointer() as checkpointer:
            return jax.block_until_ready(checkpointer.restore(path, args=arguments)[key])[index]

    def read_with_orbax_v1() -> Any:
        from orbax.checkpoint.experimental import v1 as ocp

        context = ocp.Context()
        context.pytree.loading.partial_load = True
        context.array.loading.enable_padding_and_truncation = read_shape != whole_shape
        wanted = {key: jax.ShapeDtypeStruct(read_shape, "float32", sharding=sharding)}
        with context:
            return jax.block_until_ready(ocp.load(path, wanted)[key])[index]

    if contender == "jaxckpt":
        return read_with_jaxckpt
    return read_with_orbax_v0 if contender.startswith("orbax-v0") else read_with_orbax_v1


# --- the study ----------------------------------------------------------------------------------------------


def run(
    settings: StudySettings, size: Size | None = None, names: tuple[str, ...] = CONTENDERS
) -> list[StudyResult]:
    size = size or (QUICK if settings.quick else FULL)
    return [_study(settings, directory, size, names) for directory in settings.directories]


def _study(settings: StudySettings, directory: Path, size: Size, names: tuple[str, ...]) -> StudyResult:
    call = functools.partial(settings.call, size=dataclasses.asdict(size))
    rows: list[dict[str, Any]] = []
    figures: dict[str, float] = {}
    caches = ["warm"] if measure.is_in_memory(directory) else ["cold", "warm"]
    with scratch_in(directory) as scratch:

        def save(name: str, _: int) -> dict[str, Any]:
            call(save_all, devices=DEVICES, contender=name, path=str(scratch / name))
            return {}

        def read(part: str, cache: str, name: str) -> dict[str, Any]:
            (measure.evict if cache == "cold" else measure.warm)(scratch / name)
            return call(read_part, contender=name, path=str(scratch / name), part=part)

        saved, notes = take_turns(names, 1, save)
        for part in parts_of(size):
            for cache in caches:
                answers, absent = take_turns(
                    list(saved),
                    settings.repeat,
                    lambda name, _, part=part, cache=cache: read(part, cache, name),
                )
                notes += [f"{part}, {cache}: {note}" for note in absent]
                found = {name: make_row("contender", name, each) for name, each in answers.items()}
                rows += [row | {"part": part, "cache": cache} for row in found.values()]
                figures[f"{part}, {cache}: read / wanted"] = found["jaxckpt"]["read / wanted"]
                best_s = least_of_orbax({name: row["seconds"] for name, row in found.items()})
                if best_s is not None:
                    ratio = best_s / found["jaxckpt"]["seconds"]
                    figures[f"{part}, {cache}: best Orbax / jaxckpt"] = ratio
    whole_bytes = 4 * (size.big[0] * size.big[1] + size.small_count * size.small[0] * size.small[1])
    return StudyResult(
        name="partial",
        title=f"one leaf of {size.small_count + 1:,}, rows and a column block of a leaf of shape {size.big}, "
        f"from a checkpoint of {whole_bytes / MIB:,.0f} MiB saved on {DEVICES} devices",
        storage=describe_storage(directory),
        columns=("contender", "part", "cache", "seconds", "read / wanted", "read MiB", "peak MiB"),
        rows=tuple(rows),
        figures=figures,
        notes=("Orbax reads slices by its truncation: from the first element to the last wanted one", *notes),
    )
