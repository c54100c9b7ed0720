"""Any damage anywhere in a checkpoint is found by `restore` and by `verify`, and named (requirement 16).

Each trial damages one stored file in one way, checks that both find it and nothing else happens, and mends it. Trials
are drawn from a seed, and every one of them must be found.
"""

from __future__ import annotations

import collections
import dataclasses
import pathlib
import random
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import jaxckpt
from jaxckpt._parts import ChunkIndex
from jaxckpt._tables import OWN_OBJECT

from .helpers import assert_same_leaf, make_mesh

MIB = 1 << 20
TRIALS = 63  # of each layout


def noise(shape: tuple[int, ...], seed: int = 0, dtype: Any = np.float32) -> np.ndarray[Any, Any]:
    """Values without a byte pattern that would hide a swap."""
    count = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.random.default_rng(seed).integers(1, 256, count, np.uint8).view(dtype).reshape(shape)


def packed() -> tuple[Any, jaxckpt.SaveOptions]:
    leaves = {f"leaf{number}": jnp.asarray(noise((number + 1, 50), number)) for number in range(8)}
    return {"params": leaves, "step": 3}, jaxckpt.SaveOptions()


def own_objects() -> tuple[Any, jaxckpt.SaveOptions]:
    leaves = {f"leaf{number}": jnp.asarray(noise((64, 100), number)) for number in range(4)}
    return {"params": leaves, "small": jnp.arange(3)}, jaxckpt.SaveOptions(pack_bytes_max=20_000)


def nothing_packed() -> tuple[Any, jaxckpt.SaveOptions]:
    tree = {
        "a": [jnp.asarray(noise((5,), 1)), jnp.asarray(noise((), 2)), jnp.zeros((0, 3))],
        "b": "text" * 5000,
    }
    return tree, jaxckpt.SaveOptions(pack_bytes_max=0)


def several_blocks() -> tuple[Any, jaxckpt.SaveOptions]:
    """Chunks of two and a half checksum blocks, in two pieces each."""
    tree = {"big": noise((4, 5 * MIB // 8)), "packed": noise((3 * MIB // 2 // 4,), 1)}
    return tree, jaxckpt.SaveOptions(chunk_bytes_max=5 * MIB // 2, pack_bytes_max=2 * MIB)


def sharded() -> tuple[Any, jaxckpt.SaveOptions]:
    mesh = make_mesh({"x": 4, "y": 2})
    grid = NamedSharding(mesh, PartitionSpec("x", "y"))
    rows = NamedSharding(mesh, PartitionSpec("x"))
    tree = {
        "grid": jax.device_put(noise((64, 64)), grid),
        "rows": jax.device_put(noise((16, 8), 1), rows),
        "copies": jax.device_put(noise((100,), 2), NamedSharding(mesh, PartitionSpec())),
    }
    return tree, jaxckpt.SaveOptions(pack_bytes_max=1500)


def strange_dtypes() -> tuple[Any, jaxckpt.SaveOptions]:
    record = np.dtype([("x", "<f4"), ("y", ">i2", (3,)), ("name", "S5")])
    tree = {
        "record": noise((40,), 1, record),
        "dates": noise((30,), 2, "M8[s]"),
        "nibbles": jnp.asarray(noise((64,), 3, np.int8)).astype("int4"),
        "opaque": noise((64,), 4, jnp.float8_e4m3),
        "key": jax.random.key(7),
        "fortran": np.asfortranarray(noise((9, 11), 5)),
    }
    return tree, jaxckpt.SaveOptions(pack_bytes_max=200)


def many_small_leaves() -> tuple[Any, jaxckpt.SaveOptions]:
    return [noise((number % 7 + 1,), number, np.int16) for number in range(300)], jaxckpt.SaveOptions()


def values_only() -> tuple[Any, jaxckpt.SaveOptions]:
    return {"step": 7, "rate": 0.5, "name": "run", "np": np.float32(3)}, jaxckpt.SaveOptions()


LAYOUTS = [
    packed,
    own_objects,
    nothing_packed,
    several_blocks,
    sharded,
    strange_dtypes,
    many_small_leaves,
    values_only,
]


@dataclasses.dataclass
class Saved:
    """A checkpoint that is damaged and mended again."""

    path: pathlib.Path
    leaves: dict[str, Any]
    contents: dict[str, bytes]
    # For each object the rows of chunks in it: first byte, end, key.
    chunks: dict[str, list[tuple[int, int, str]]]

    def mend(self) -> None:
        for name, data in self.contents.items():
            file = self.path / name
            if not file.exists() or file.read_bytes() != data:
                file.write_bytes(data)


@dataclasses.dataclass(frozen=True)
class Damage:
    """What was done: to which objects, and which bytes of the first of them changed, if no more than those."""

    names: tuple[str, ...]
    ranges: tuple[tuple[int, int], ...] = ()


def save_layout(layout: Callable[[], tuple[Any, jaxckpt.SaveOptions]], path: pathlib.Path) -> Saved:
    tree, options = layout()
    jaxckpt.save(path, tree, options=options, metadata={"note": "x"})
    manifest = jaxckpt.open(path).manifest
    chunks: dict[str, list[tuple[int, int, str]]] = collections.defaultdict(list)
    for leaf, key in enumerate(manifest.keys):
        for row in range(int(manifest.chunk_starts[leaf]), int(manifest.chunk_starts[leaf + 1])):
            start = int(manifest.chunks.offset[row])
            chunks[ChunkIndex(manifest).place(leaf, row).object].append(
                (start, start + int(manifest.chunks.length[row]), key)
            )
    files = [file for file in path.rglob("*") if file.is_file()]
    contents = {file.relative_to(path).as_posix(): file.read_bytes() for file in sorted(files)}
    restored = dict(zip(manifest.keys, jax.tree.leaves(jaxckpt.restore(path)), strict=True))
    return Saved(path, restored, contents, dict(chunks))


# --- ways to damage a file; None where a way does not apply ---------------------------------------------------


def flip_bit(saved: Saved, name: str, rng: random.Random) -> Damage:
    data = bytearray(saved.contents[name])
    at = rng.randrange(len(data))
    data[at] ^= 1 << rng.randrange(8)
    (saved.path / name).write_bytes(data)
    return Damage((name,), ((at, at + 1),))


def cut_off(saved: Saved, name: str, rng: random.Random) -> Damage:
    data = saved.contents[name]
    (saved.path / name).write_bytes(data[: rng.choice([0, len(data) - 1, rng.randrange(len(data))])])
    return Damage((name,))


def extend(saved: Saved, name: str, rng: random.Random) -> Damage:
    (saved.path / name).write_bytes(saved.contents[name] + bytes(rng.choice([1, 64, 4096])))
    return Damage((name,))


def remove(saved: Saved, name: str, _rng: random.Random) -> Damage:
    (saved.path / name).unlink()
    return Damage((name,))


def swap_objects(saved: Saved, name: str, rng: random.Random) -> Damage | None:
    others = [other for other, data in saved.contents.items() if data != saved.contents[name]]
    # Of the same length if there are any: those are the hardest to tell apart.
    alike = [other for other in others if len(saved.contents[other]) == len(saved.contents[name])]
    other = rng.choice(alike or others)
    (saved.path / name).write_bytes(saved.contents[other])
    (saved.path / other).write_bytes(saved.contents[name])
    return Damage((name, other))


def swap_chunks(saved: Saved, name: str, rng: random.Random) -> Damage | None:
    rows = saved.chunks.get(name, [])
    if len(rows) < 2:
        return None
    data = bytearray(saved.contents[name])
    (a, a_end, _), (b, b_end, _) = rng.sample(rows, 2)
    length = min(a_end - a, b_end - b)
    if data[a : a + length] == data[b : b + length]:
        return None
    data[a : a + length], data[b : b + length] = data[b : b + length], data[a : a + length]
    (saved.path / name).write_bytes(data)
    return Damage((name,), ((a, a + length), (b, b + length)))


def zero_page(saved: Saved, name: str, rng: random.Random) -> Damage | None:
    data = bytearray(saved.contents[name])
    start = rng.randrange(-(-len(data) // 4096)) * 4096
    end = min(start + 4096, len(data))
    if not any(data[start:end]):
        return None
    data[start:end] = bytes(end - start)
    (saved.path / name).write_bytes(data)
    return Damage((name,))


def zero_whole(saved: Saved, name: str, _rng: random.Random) -> Damage:
    """What a file system that lost its data after a crash shows: the right length, and nothing in it."""
    (saved.path / name).write_bytes(bytes(len(saved.contents[name])))
    return Damage((name,))


WAYS = [
    flip_bit,
    flip_bit,
    flip_bit,
    cut_off,
    extend,
    remove,
    swap_objects,
    swap_chunks,
    zero_page,
    zero_whole,
]


# --- the trials -----------------------------------------------------------------------------------------------


def damage_something(saved: Saved, rng: random.Random) -> Damage:
    while True:
        damage = rng.choice(WAYS)(saved, rng.choice(sorted(saved.contents)), rng)
        if damage is not None:
            return damage


def expected_errors(saved: Saved, damage: Damage) -> tuple[type[jaxckpt.CheckpointError], ...]:
    if "manifest.msgpack" not in damage.names:
        return (jaxckpt.CorruptError,)
    return (jaxckpt.FormatError,) if (saved.path / "manifest.msgpack").exists() else (jaxckpt.NotFoundError,)


def keys_hit(saved: Saved, name: str, damage: Damage) -> set[str]:
    """Keys of the leaves with a damaged chunk in an object; of all in it when more than some bytes changed."""
    rows = saved.chunks.get(name, [])
    if not damage.ranges:
        return {key for _, _, key in rows}
    return {key for lo, hi, key in rows for start, end in damage.ranges if lo < end and start < hi}


def check_found(saved: Saved, damage: Damage) -> None:
    (expected,) = expected_errors(saved, damage)
    with pytest.raises(jaxckpt.CheckpointError) as caught:
        jaxckpt.restore(saved.path)
    assert type(caught.value) is expected, f"{damage}: {caught.value!r}"
    if expected is jaxckpt.NotFoundError:
        with pytest.raises(jaxckpt.NotFoundError):
            jaxckpt.verify(saved.path)
        return
    report = jaxckpt.verify(saved.path)
    assert not report.ok, damage
    if expected is jaxckpt.FormatError:
        assert [problem.kind for problem in report.problems] == ["manifest"]
        assert "manifest.msgpack" in str(caught.value)
        return
    for problems in (caught.value.problems, report.problems):
        check_names(saved, damage, problems)
    check_whole_leaves(saved, damage)


def check_names(saved: Saved, damage: Damage, problems: tuple[jaxckpt.Problem, ...]) -> None:
    """Each damaged object is named, with the chunks in it, and no other one is."""
    assert {problem.kind for problem in problems} <= {"checksum", "length", "missing"}
    for name in damage.names:
        mine = [problem for problem in problems if name in problem.message]
        assert mine, f"{name} is not named: {problems}"
        hit = keys_hit(saved, name, damage)
        found = {problem.key for problem in mine}
        if damage.ranges:
            assert found == (hit or {None}), damage
        else:
            assert found <= (hit or {None}), damage
        if hit:
            assert all("chunk (" in problem.message for problem in mine)
    assert all(any(name in problem.message for name in damage.names) for problem in problems)


def check_whole_leaves(saved: Saved, damage: Damage) -> None:
    """A leaf with no part in the damage can still be restored alone, unless a directory above it is damaged."""
    if any(name.endswith("zarr.json") for name in damage.names):
        return
    hit = set().union(*(keys_hit(saved, name, damage) for name in damage.names))
    whole = next((key for key in saved.leaves if key not in hit), None)
    if whole is not None:
        (leaf,) = (
            leaf
            for leaf in jax.tree.leaves(jaxckpt.restore(saved.path, select=lambda key: key == whole))
            if leaf is not None
        )
        assert_same_leaf(leaf, saved.leaves[whole], whole)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_damage_is_found(layout: Callable[[], Any], path: pathlib.Path) -> None:
    saved = save_layout(layout, path)
    rng = random.Random(layout.__name__)
    for _ in range(TRIALS):
        damage = damage_something(saved, rng)
        check_found(saved, damage)
        saved.mend()
    assert jaxckpt.verify(path).ok


def test_there_are_enough_trials_and_every_layout_is_what_it_says(tmp_path: pathlib.Path) -> None:
    assert len(LAYOUTS) * TRIALS >= 500
    rows = {}
    for layout in LAYOUTS:
        saved = save_layout(layout, tmp_path / layout.__name__)
        chunks = jaxckpt.open(saved.path).manifest.chunks
        own = int(np.count_nonzero(chunks.pack == OWN_OBJECT))
        rows[layout.__name__] = own, len(chunks.pack) - own, len(chunks.checksums) // 16
    assert rows["packed"][0] == 0
    assert rows["own_objects"][:2] == (4, 1)
    assert rows["nothing_packed"][1] == 0
    assert rows["several_blocks"] == (4, 1, 14)
    assert rows["sharded"] == (8, 5, 13)
    assert min(rows["strange_dtypes"][:2]) > 0
    assert rows["many_small_leaves"] == (0, 300, 300)
    assert rows["values_only"] == (0, 0, 0)


def test_every_byte_of_a_small_checkpoint_counts(path: pathlib.Path) -> None:
    """One flipped bit in each byte of each file, packs' padding included in steps."""
    saved = save_layout(lambda: ({"a": jnp.arange(5), "b": 2}, jaxckpt.SaveOptions()), path)
    for name, data in saved.contents.items():
        for at in range(0, len(data), 13 if "packs" in name else 1):
            damaged = bytearray(data)
            damaged[at] ^= 1 << at % 8
            (saved.path / name).write_bytes(damaged)
            assert not jaxckpt.verify(path).ok, (name, at)
        saved.mend()
    assert jaxckpt.verify(path).ok


def test_parts_that_are_read_are_verified(path: pathlib.Path) -> None:
    """A slice of a leaf is refused when its blocks are damaged, and is right when only others are."""
    tree = {"w": noise((3 * MIB // 4 // 8, 8))}
    jaxckpt.save(path, tree, options=jaxckpt.SaveOptions(pack_bytes_max=0))
    (chunk,) = path.glob("data-*/arrays/w/c.*")
    data = bytearray(chunk.read_bytes())
    data[2 * MIB + 5] ^= 1
    chunk.write_bytes(data)
    leaf = jaxckpt.open(path)["w"]
    assert leaf[:1000].tobytes() == tree["w"][:1000].tobytes()
    with pytest.raises(jaxckpt.CorruptError, match=r"w: chunk \(0, 0\) in object data-\w+/arrays/w/c\.0\.0"):
        leaf[-1:]


def test_an_object_that_became_a_directory_is_missing(path: pathlib.Path) -> None:
    jaxckpt.save(path, {"w": noise((10,))})
    (pack,) = path.glob("data-*/packs/*")
    pack.unlink()
    pack.mkdir()
    with pytest.raises(jaxckpt.CorruptError, match="packs/0-0"):
        jaxckpt.restore(path)
    assert not jaxckpt.verify(path).ok
    manifest = path / "manifest.msgpack"
    manifest.unlink()
    manifest.mkdir()
    with pytest.raises(jaxckpt.CheckpointError):
        jaxckpt.restore(path)
