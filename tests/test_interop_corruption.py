"""Damaged files of safetensors, npz and Flax: refused and named, or read as what they say; nothing else happens."""

from __future__ import annotations

import os
import pathlib
import random
import tracemalloc
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from jaxckpt import CheckpointError, CorruptError, NotFoundError, UnsupportedLeafError
from jaxckpt.interop import flax, npz, safetensors

TREE = {
    "model": {
        "layers": [
            {"w": np.arange(24, dtype=np.float32).reshape(4, 6)},
            {"w": np.ones(3, ml_dtypes.bfloat16)},
        ]
    },
    "flags": np.array([True, False]),
    "empty": np.zeros((0, 3), np.float16),
    "one": np.asarray(2.5),
}
TRIALS = 120


def write_single(folder: pathlib.Path) -> pathlib.Path:
    safetensors.write(folder / "m.safetensors", TREE, metadata={"format": "np"})
    return folder / "m.safetensors"


def write_sharded(folder: pathlib.Path) -> pathlib.Path:
    safetensors.write(folder, TREE, shard_bytes_max=50)
    return folder


def write_npz(folder: pathlib.Path) -> pathlib.Path:
    npz.write(folder / "m.npz", TREE)
    return folder / "m.npz"


def write_compressed(folder: pathlib.Path) -> pathlib.Path:
    flat = {"model/w": TREE["model"]["layers"][0]["w"], "fortran": np.asfortranarray(np.ones((3, 4)))}
    np.savez_compressed(folder / "m.npz", **flat)
    return folder / "m.npz"


def write_flax(folder: pathlib.Path) -> pathlib.Path:
    flax.write(folder / "m.msgpack", {**TREE, "step": 7, "name": "text", "complex": 1j, "none": None})
    return folder / "m.msgpack"


WRITERS = {
    write_single: safetensors,
    write_sharded: safetensors,
    write_npz: npz,
    write_compressed: npz,
    write_flax: flax,
}


def mutate(chance: random.Random, content: bytes) -> bytes:
    """The content with a few bytes changed, added, taken out, or cut off."""
    data = bytearray(content)
    for _ in range(chance.choice([1, 1, 2, 5])):
        place = chance.randrange(len(data) + 1)
        match chance.randrange(5):
            case 0:
                data[place : place + 1] = bytes(
                    [chance.choice([0, 1, 0x7F, 0x80, 0xFF, chance.randrange(256)])]
                )
            case 1:
                data[place : place + 1] = bytes([data[place % len(data)] ^ (1 << chance.randrange(8))])
            case 2:
                data[place:place] = chance.randbytes(chance.randrange(1, 9))
            case 3:
                del data[place : place + chance.randrange(1, 9)]
            case _:
                # What was a small number may be a large one.
                data[place : place + 4] = b"\xff\xff\xff\xff"
    return bytes(data[: chance.randrange(len(data) + 1)] if chance.random() < 0.1 else data)


def read_everything(verbs: Any, path: pathlib.Path) -> None:
    """All arrays: whole, in part, and as streams."""
    with verbs.open(path) as checkpoint:
        checkpoint.describe()
        for name, leaf in checkpoint.leaves().items():
            try:
                checkpoint[name][...]
                if leaf.dtype is not None:
                    checkpoint[name][..., :0]
                    checkpoint.stream(name, 0, leaf.nbytes)
            except (UnsupportedLeafError, IndexError):  # of no type that NumPy has; without axes
                pass
    verbs.read(path)


@pytest.mark.parametrize("write", WRITERS)
def test_no_damage_does_more_than_raise(write: Any, tmp_path: pathlib.Path):
    verbs = WRITERS[write]
    path = write(tmp_path)
    files = {each: each.read_bytes() for each in sorted(tmp_path.iterdir())}
    chance = random.Random(f"damage of {write.__name__}")
    read_everything(verbs, path)
    messages: list[str] = []
    tracemalloc.start()
    try:
        for _ in range(TRIALS):
            damaged = chance.choice(list(files))
            damaged.write_bytes(mutate(chance, files[damaged]))
            tracemalloc.reset_peak()
            try:
                read_everything(verbs, path)
            except (CorruptError, NotFoundError, UnsupportedLeafError) as error:
                messages.append(str(error))
            assert tracemalloc.get_traced_memory()[1] < 4 << 20
            damaged.write_bytes(files[damaged])
    finally:
        tracemalloc.stop()
    assert len(messages) > TRIALS // 4
    assert all(str(tmp_path) in message for message in messages)
    read_everything(verbs, path)


@pytest.mark.parametrize("write", WRITERS)
def test_every_truncation_is_refused(write: Any, tmp_path: pathlib.Path):
    path = write(tmp_path)
    for each in sorted(tmp_path.iterdir()):
        content = each.read_bytes()
        for length in {0, 1, 7, 8, 9, len(content) // 2, len(content) - 2}:
            each.write_bytes(content[:length])
            with pytest.raises((CorruptError, NotFoundError)):
                read_everything(WRITERS[write], path)
        each.write_bytes(content)


@pytest.mark.parametrize("verbs", [safetensors, npz, flax])
def test_what_is_no_file_is_not_waited_for(verbs: Any, tmp_path: pathlib.Path):
    name = {safetensors: "m.safetensors", npz: "m.npz", flax: "m.msgpack"}[verbs]
    os.mkfifo(tmp_path / name)
    with pytest.raises(CheckpointError, match="is no regular file"):
        verbs.open(tmp_path / name)
    assert not verbs.can_read(tmp_path / name)
