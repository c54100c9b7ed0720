"""What is in a checkpoint, is it whole, and how do two of them differ?

`describe` reads the manifest only. `verify` rereads every stored byte and compares checksums, without placing anything
on a device. `diff` compares two checkpoints leaf by leaf: where both are cut in the same way by their checksums alone,
else by their bytes, in parts of bounded size.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from ._config import PIECE_BYTES, RestoreOptions
from ._errors import CorruptError, FormatError, Problem, printable, printable_key
from ._fetching import ReadExecutor
from ._layout import flat_boxes
from ._manifest import ProgramEntry
from ._progress import Progress, ProgressMeter, format_bytes
from ._reading import Checkpoint, StoredLeaf, open_checkpoint
from ._resharding import plan_reads
from ._shardings import Box, format_sharding

Path = str | os.PathLike[str]
OnProgress = Callable[[Progress], None]


@dataclasses.dataclass(frozen=True, slots=True)
class VerifyReport:
    """What `verify` found.

    Attributes:
      path: Where the checkpoint is.
      problems: Everything that is wrong, by key; empty when the checkpoint is whole.
      bytes_read: Bytes that were reread.
      seconds: Seconds that it took.
    """

    path: str
    problems: tuple[Problem, ...]
    bytes_read: int
    seconds: float

    @property
    def ok(self) -> bool:
        """Whether every stored byte is what was written."""
        return not self.problems

    def __bool__(self) -> bool:
        return self.ok

    def __str__(self) -> str:
        if self.ok:
            return f"{self.path}: whole, {self.bytes_read} bytes verified in {self.seconds:.2f} s"
        lines = [
            f"{self.path}: {format_count(len(self.problems), 'problem', 'problems')}",
            *(f"  {problem}" for problem in self.problems),
        ]
        return "\n".join(lines)


def verify(
    path: Path | Checkpoint, *, options: RestoreOptions | None = None, on_progress: OnProgress | None = None
) -> VerifyReport:
    """Rereads every object of a checkpoint and compares it with what was written.

    Args:
      path: Directory or URL, or an open `Checkpoint`.
      options: See `RestoreOptions`.
      on_progress: Called with a `Progress` from the reading threads.

    Returns:
      A `VerifyReport`; damage is reported, not raised, a damaged manifest too.

    Raises:
      NotFoundError: No committed checkpoint is there.

    Host memory: a few MiB for each reading thread.

    Example:
      >>> _ = jaxckpt.save(tmp / "a", {"w": jnp.ones(3)})
      >>> jaxckpt.verify(tmp / "a").ok
      True
    """
    began_s = time.perf_counter()
    options = options or RestoreOptions()
    try:
        checkpoint = path if isinstance(path, Checkpoint) else open_checkpoint(path)
    except FormatError as error:
        problems = error.problems or (Problem(None, "manifest", str(error)),)
        return VerifyReport(os.fspath(path), problems, 0, time.perf_counter() - began_s)  # type: ignore[arg-type]
    manifest = checkpoint.manifest
    bytes_before = checkpoint.bytes_read
    problems_of_parts, lost = _check_parts(checkpoint)
    present = [
        (leaf, checkpoint.index.present_boxes(leaf))
        for leaf in range(len(manifest.keys))
        if manifest.spec(leaf).kind != "value" and leaf not in lost
    ]
    plan = plan_reads(checkpoint.index, present, PIECE_BYTES)
    total = plan.nbytes + sum(entry.length for entry in manifest.objects)
    meter = ProgressMeter(total, "read", on_progress)
    executor = ReadExecutor(checkpoint.store, manifest, threads=options.io_threads, meter=meter)
    executor.check_metadata(manifest.objects)
    executor.check_objects(plan)
    executor.verify(plan)
    found = [*problems_of_parts, *_first_of_each_chunk(executor.problems)]
    problems_found = {str(problem): problem for problem in found}
    checkpoint.count_read(executor.bytes_read)
    return VerifyReport(
        checkpoint.path,
        tuple(problems_found.values()),
        checkpoint.bytes_read - bytes_before,
        time.perf_counter() - began_s,
    )


def _check_parts(checkpoint: Checkpoint) -> tuple[list[Problem], set[int]]:
    """What is wrong with the parts of the processes, and the leaves that cannot be read without them."""
    manifest = checkpoint.manifest
    problems: list[Problem] = []
    lost: set[int] = set()
    for process in range(len(manifest.parts)):
        try:
            checkpoint.index.load(process)
        except CorruptError as error:
            problems.extend(error.problems)
            lost.update(np.flatnonzero(manifest.counts_of(process)).tolist())
    return problems, lost


def _first_of_each_chunk(problems: list[Problem]) -> Iterator[Problem]:
    """An object of a wrong length is found when it is looked at and again when it is read; once is enough."""
    seen: set[tuple[str | None, str]] = set()
    for problem in problems:
        place = (problem.key, problem.message.partition(": ")[0])
        if problem.kind == "checksum" or place not in seen:
            yield problem
        seen.add(place)


# --- description ----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class LeafDescription:
    """One leaf of a `Description`: what it is, and for scalars its value."""

    key: str
    kind: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    sharding: str
    chunk_shape: tuple[int, ...]
    chunks: int
    weak_type: bool
    value: Any = None

    @property
    def elements(self) -> int:
        """Number of elements of an array; 0 for scalars of Python and NumPy and for strings."""
        return math.prod(self.shape) if self.kind in ("array", "key", "numpy") else 0


@dataclasses.dataclass(frozen=True, slots=True)
class ProgramDescription:
    """One program of a `Description`: how it is called, what made it, and where it runs.

    Attributes:
      name: What it is called.
      inputs: What it takes beside the tree: names, and dtypes with shapes.
      outputs: What it returns; a part that is like the whole tree is ``"tree"``.
      intermediates: Values inside of it that can be fetched.
      nbytes: Bytes of its object.
      sha256: Of its object, in hexadecimal.
      platforms: What it runs on.
      devices: For how many devices it was exported; 1 runs on any number.
      vjp_order: How many times it can be differentiated.
      exported: When it was exported, ISO 8601, UTC.
      versions: Versions of jax and jaxlib that exported it.
    """

    name: str
    inputs: dict[str, str]
    outputs: dict[str, str]
    intermediates: dict[str, str]
    nbytes: int
    sha256: str
    platforms: tuple[str, ...]
    devices: int
    vjp_order: int
    exported: str
    versions: dict[str, str]

    def __str__(self) -> str:
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        lines = [
            f"program     {self.name}({', '.join(['tree', *_labelled(self.inputs)])})",
            f"  returns   {', '.join(_labelled(self.outputs)) or 'nothing'}",
            f"  size      {format_bytes(self.nbytes)}, for {', '.join(self.platforms)}",
            f"  exported  {self.exported} by {versions}",
        ]
        if self.intermediates:
            lines.insert(2, f"  inside    {', '.join(_labelled(self.intermediates))}")
        if self.devices != 1:
            lines.append(f"  devices   {self.devices}")
        if self.vjp_order:
            lines.append(f"  vjp       {self.vjp_order}")
        return "\n".join(map(printable, lines))


def _labelled(forms: dict[str, str]) -> list[str]:
    return [f"{name}: {form}" for name, form in forms.items()]


@dataclasses.dataclass(frozen=True, slots=True)
class Description:
    """What is in a checkpoint; ``str()`` of it is a page for people.

    Attributes:
      path: Where it is.
      created: When it was committed, ISO 8601, UTC.
      writer: Versions of the libraries that wrote it.
      metadata: What was given as ``metadata=``.
      metrics: What was given as ``metrics=`` to a manager.
      items_bytes: Bytes of the items; 0 when there are none. `Checkpoint.items` reads them.
      nbytes: Bytes of all arrays.
      stored_bytes: Bytes of all objects with chunks, metadata and items.
      objects: Number of those objects.
      leaves: One `LeafDescription` for each leaf, in the order of the tree.
      programs: One `ProgramDescription` for each program.
    """

    path: str
    created: str
    writer: dict[str, str]
    metadata: Any
    metrics: dict[str, float]
    items_bytes: int
    nbytes: int
    stored_bytes: int
    objects: int
    leaves: tuple[LeafDescription, ...]
    programs: tuple[ProgramDescription, ...]

    @property
    def elements(self) -> int:
        """Number of elements of all arrays together."""
        return sum(leaf.elements for leaf in self.leaves)

    def __str__(self) -> str:
        versions = ", ".join(f"{name} {version}" for name, version in self.writer.items())
        counts = [
            format_count(len(self.leaves), "leaf", "leaves"),
            format_count(self.elements, "element", "elements"),
        ]
        lines = [
            f"checkpoint  {self.path}",
            f"committed   {self.created} by {versions}",
            f"holds       {', '.join(counts)}, {format_bytes(self.nbytes)}",
            f"stored in   {format_count(self.objects, 'object', 'objects')}, {format_bytes(self.stored_bytes)}",
        ]
        if self.metadata is not None:
            lines.append(f"metadata    {self.metadata!r}")
        if self.metrics:
            lines.append(f"metrics     {format_metrics(self.metrics)}")
        lines += [str(program) for program in self.programs]
        if self.items_bytes:
            lines.append(f"items       {format_bytes(self.items_bytes)}")
        return "\n".join([*lines, "", self.table()])

    def table(self) -> str:
        """The leaves, one a line."""
        rows = [("key", "dtype", "shape", "bytes", "sharding")]
        for leaf in self.leaves:
            is_value = leaf.kind == "value"
            shape = format_value(leaf.value) if is_value else "(" + ", ".join(map(str, leaf.shape)) + ")"
            if len(shape) > 40:
                shape = shape[:37] + "..."
            size = "" if is_value else format_bytes(leaf.nbytes)
            key, dtype, sharding = printable_key(leaf.key), printable(leaf.dtype), printable(leaf.sharding)
            rows.append((key, dtype, printable(shape), size, sharding))
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        lines = []
        for row in rows:
            cells = [cell.ljust(width) for cell, width in zip(row[:3], widths[:3], strict=True)]
            lines.append("  ".join([*cells, row[3].rjust(widths[3]), row[4]]).rstrip())
        return "\n".join(lines)


def describe(path: Path | Checkpoint) -> Description:
    """Says what is in a checkpoint by reading its manifest only.

    Args:
      path: Directory or URL, or an open `Checkpoint`.

    Returns:
      A `Description`, which prints as a table of keys, dtypes, shapes, bytes and shardings.

    Raises:
      NotFoundError, FormatError: As for `jaxckpt.open`.

    Example:
      >>> _ = jaxckpt.save(tmp / "a", {"w": jnp.ones((2, 3))})
      >>> jaxckpt.describe(tmp / "a").leaves[0].shape
      (2, 3)
    """
    checkpoint = path if isinstance(path, Checkpoint) else open_checkpoint(path)
    manifest = checkpoint.manifest
    return Description(
        path=checkpoint.path,
        created=format_date(manifest.created_s),
        writer=checkpoint.writer,
        metadata=checkpoint.metadata,
        metrics=checkpoint.metrics,
        items_bytes=manifest.items_bytes,
        nbytes=checkpoint.nbytes,
        stored_bytes=manifest.stored_bytes,
        objects=manifest.object_count,
        leaves=tuple(_describe_leaf(checkpoint[key]) for key in manifest.keys),
        programs=tuple(_describe_program(name, entry) for name, entry in manifest.programs.items()),
    )


def _describe_leaf(leaf: StoredLeaf) -> LeafDescription:
    spec = leaf.spec
    return LeafDescription(
        key=leaf.key,
        kind=leaf.kind,
        dtype=_dtype_text(leaf),
        shape=leaf.shape,
        nbytes=leaf.nbytes,
        sharding=format_sharding(leaf.sharding),
        chunk_shape=spec.chunk_shape,
        chunks=spec.chunk_count,
        weak_type=leaf.weak_type,
        value=leaf[...] if leaf.kind == "value" else None,
    )


def _describe_program(name: str, entry: ProgramEntry) -> ProgramDescription:
    return ProgramDescription(
        name=name,
        inputs=dict(entry.inputs),
        outputs=dict(entry.outputs),
        intermediates=dict(entry.intermediates),
        nbytes=entry.length,
        sha256=entry.sha256.hex(),
        platforms=entry.platforms,
        devices=entry.devices,
        vjp_order=entry.vjp_order,
        exported=format_date(entry.created_s),
        versions={"jax": entry.jax, "jaxlib": entry.jaxlib},
    )


def _dtype_text(leaf: StoredLeaf) -> str:
    return f"key<{leaf.spec.impl}>" if leaf.kind == "key" else str(leaf.dtype)


def format_value(value: Any) -> str:
    """A scalar as Python would write it; integers of thousands of digits, which Python refuses, in hexadecimal."""
    try:
        return repr(value)
    except ValueError:
        return hex(value)


def format_metrics(metrics: Mapping[str, float]) -> str:
    """Numbers by name, to six digits, in one line."""
    return " ".join(f"{printable(name)}={value:g}" for name, value in metrics.items())


def format_count(count: int, one: str, many: str) -> str:
    """As in "1 leaf" and "2 leaves"."""
    return f"{count} {one if count == 1 else many}"


def format_date(seconds: float) -> str:
    """Seconds since 1970 as ISO 8601, UTC."""
    return dt.datetime.fromtimestamp(seconds, dt.UTC).isoformat(timespec="seconds")


# --- differences ----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class DiffReport:
    """How two checkpoints differ.

    Attributes:
      a, b: Where they are.
      only_in_a, only_in_b: Keys that the other one lacks.
      changed: For each key in both whose leaf differs, what differs; ``kind`` is ``"kind"``, ``"dtype"``,
        ``"shape"`` or ``"value"``.
      equal: Number of leaves that are the same, bit for bit.
    """

    a: str
    b: str
    only_in_a: tuple[str, ...]
    only_in_b: tuple[str, ...]
    changed: tuple[Problem, ...]
    equal: int

    @property
    def same(self) -> bool:
        """Whether both hold the same leaves with the same values."""
        return not (self.only_in_a or self.only_in_b or self.changed)

    def __str__(self) -> str:
        lines = [f"only in {self.a}: {printable_key(key)}" for key in self.only_in_a]
        lines += [f"only in {self.b}: {printable_key(key)}" for key in self.only_in_b]
        lines += [str(problem) for problem in self.changed]
        lines.append(format_count(self.equal, "leaf is equal", "leaves are equal"))
        return "\n".join(lines)


def diff(a: Path | Checkpoint, b: Path | Checkpoint, *, on_progress: OnProgress | None = None) -> DiffReport:
    """Compares two checkpoints leaf by leaf, whatever meshes they were saved on.

    Args:
      a: Directory or URL, or an open `Checkpoint`.
      b: The same, for the other one.
      on_progress: Called with a `Progress` after each leaf, and each part of a large one.

    Returns:
      A `DiffReport`. Values are equal when their bytes are: NaN equals the same NaN, 0.0 differs from -0.0.

    Raises:
      NotFoundError, FormatError: As for `jaxckpt.open`.
      CorruptError: A leaf that must be read is damaged.

    Example:
      >>> _ = jaxckpt.save(tmp / "a", {"w": jnp.ones(3)})
      >>> _ = jaxckpt.save(tmp / "b", {"w": jnp.zeros(3)})
      >>> print(jaxckpt.diff(tmp / "a", tmp / "b"))
      w: 3 of 3 elements differ
      0 leaves are equal
    """
    first = a if isinstance(a, Checkpoint) else open_checkpoint(a)
    second = b if isinstance(b, Checkpoint) else open_checkpoint(b)
    shared = [key for key in first.manifest.keys if key in second]
    meter = ProgressMeter(sum(first[key].nbytes for key in shared), "read", on_progress)
    changed = []
    for key in shared:
        difference = _leaf_difference(first[key], second[key], meter)
        if difference is not None:
            changed.append(difference)
    return DiffReport(
        a=first.path,
        b=second.path,
        only_in_a=tuple(key for key in first.manifest.keys if key not in second),
        only_in_b=tuple(key for key in second.manifest.keys if key not in first),
        changed=tuple(changed),
        equal=len(shared) - len(changed),
    )


def _leaf_difference(a: StoredLeaf, b: StoredLeaf, meter: ProgressMeter) -> Problem | None:
    if a.kind != b.kind:
        return Problem(a.key, "kind", f"{a.kind} in the first, {b.kind} in the second")
    if a.kind == "value":
        if a.value_record == b.value_record:
            return None
        return Problem(
            a.key, "value", f"{format_value(a[...])} in the first, {format_value(b[...])} in the second"
        )
    if a.spec.dtype != b.spec.dtype or a.spec.impl != b.spec.impl:
        return Problem(a.key, "dtype", f"{_dtype_text(a)} in the first, {_dtype_text(b)} in the second")
    if a.spec.shape != b.spec.shape:
        return Problem(a.key, "shape", f"{a.spec.shape} in the first, {b.spec.shape} in the second")
    if a.fingerprint() == b.fingerprint():
        meter.add(a.nbytes)
        return None
    differing = 0
    for box in _parts_of(a):
        differing += _count_differences(a, b, box)
        meter.add(math.prod(hi - lo for lo, hi in zip(*box, strict=True)) * a.spec.np_dtype.itemsize)
    if not differing:
        return None
    return Problem(a.key, "value", f"{differing} of {math.prod(a.spec.shape)} elements differ")


def _parts_of(leaf: StoredLeaf) -> Iterator[Box]:
    """Boxes of at most one piece that make up a leaf."""
    spec = leaf.spec
    count = math.prod(spec.shape)
    step = max(1, PIECE_BYTES // max(spec.np_dtype.itemsize, 1))
    for first in range(0, count, step):
        yield from flat_boxes(first, min(first + step, count), spec.shape)


def _count_differences(a: StoredLeaf, b: StoredLeaf, box: Box) -> int:
    bytes_of_a, bytes_of_b = (leaf.read_box(box).reshape(-1, 1).view(np.uint8) for leaf in (a, b))
    return int(np.any(bytes_of_a != bytes_of_b, axis=1).sum())
