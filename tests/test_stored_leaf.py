"""Indexing a leaf of an open checkpoint gives what NumPy gives for the same index; so do strings and scalars.

Also leaves at the edge of what can be stored: a save takes what a restore can read, and refuses the rest.
"""

from __future__ import annotations

import pathlib
import random
from typing import Any

import jax
import jax.numpy as jnp
import msgpack
import numpy as np
import pytest
import xxhash

import jaxckpt

from .helpers import assert_same_tree

ARRAYS = {
    "rank_0": np.array(2.5),
    "rank_1": np.arange(7),
    "rank_2": np.arange(30).reshape(5, 6),
    "rank_3": np.arange(60.0).reshape(3, 4, 5),
    "zero_size": np.zeros((0, 3)),
}


def random_index(choose: random.Random, rank: int) -> Any:
    parts: list[Any] = []
    for _ in range(choose.randrange(rank + 2)):
        bounds = [choose.choice([None, *range(-8, 9)]) for _ in range(2)]
        step = choose.choice([None, 1, 2, 3, -1, -2, -7])
        parts.append(
            choose.choice([..., choose.randrange(-7, 7), slice(*bounds, step), slice(*bounds, step)])
        )
    return parts[0] if len(parts) == 1 else tuple(parts)


def outcome(array: Any, index: Any) -> Any:
    try:
        return array[index]
    except IndexError:
        return IndexError


@pytest.mark.parametrize(
    "options", [jaxckpt.SaveOptions(), jaxckpt.SaveOptions(pack_bytes_max=0, chunk_bytes_max=48)]
)
def test_basic_indexing_is_that_of_numpy(path: pathlib.Path, options: jaxckpt.SaveOptions) -> None:
    jaxckpt.save(path, ARRAYS, options=options)
    checkpoint = jaxckpt.open(path)
    choose = random.Random(0)
    for _ in range(1500):
        key = choose.choice(list(ARRAYS))
        index = random_index(choose, ARRAYS[key].ndim)
        want = outcome(ARRAYS[key], index)
        got = outcome(checkpoint[key], index)
        if want is IndexError:
            assert got is IndexError, (key, index)
        else:
            assert type(got) is type(want), (key, index)
            assert (got.dtype, got.shape, got.tobytes()) == (want.dtype, want.shape, want.tobytes()), (
                key,
                index,
            )


@pytest.mark.parametrize("index", [np.array([1, 2]), True, None, [0, 1], "a", 1.5])
def test_other_indexing_is_refused(path: pathlib.Path, index: Any) -> None:
    jaxckpt.save(path, {"x": np.arange(7)})
    with pytest.raises(IndexError, match="only integers, slices"):
        jaxckpt.open(path)["x"][index]


@pytest.mark.parametrize("text", ["aéb" * 2000, "aéb", b"xyz" * 8000, b"xyz"])
def test_strings_are_indexed_as_in_python(path: pathlib.Path, text: Any) -> None:
    jaxckpt.save(path, {"text": text})
    leaf = jaxckpt.open(path)["text"]
    for index in (slice(1, 3), slice(None, None, 2), slice(None, None, -1), -1, 0):
        assert leaf[index] == text[index]
    assert leaf[...] == leaf[()] == text


def test_a_scalar_has_no_elements(path: pathlib.Path) -> None:
    jaxckpt.save(path, {"step": 7})
    leaf = jaxckpt.open(path)["step"]
    assert leaf[...] == leaf[()] == 7
    with pytest.raises(IndexError, match="is a scalar"):
        leaf[0]


def test_every_rank_that_is_saved_is_restored(path: pathlib.Path) -> None:
    tree = {
        "jax": jnp.zeros((1,) * 40),
        "numpy": np.zeros((1,) * 64),
        "opaque": np.zeros((1,) * 63, "U3"),
    }
    jaxckpt.save(path, tree)
    assert_same_tree(jaxckpt.restore(path), tree)


def test_a_rank_that_cannot_be_stored_is_refused(path: pathlib.Path) -> None:
    with pytest.raises(jaxckpt.UnsupportedLeafError, match="a: has rank 64"):
        jaxckpt.save(path, {"a": np.zeros((1,) * 64, "U3")})
    assert not path.exists()


def test_a_dtype_with_fields_that_overlap_is_refused(path: pathlib.Path) -> None:
    dtype = np.dtype({"names": ["x", "y"], "formats": ["i4", "i2"], "offsets": [0, 0], "itemsize": 4})
    with pytest.raises(jaxckpt.UnsupportedLeafError, match=r"a: dtype .* overlap"):
        jaxckpt.save(path, {"a": np.zeros(2, dtype)})


def test_integers_that_python_does_not_print_are_described(path: pathlib.Path) -> None:
    jaxckpt.save(path, {"x": 1 << 20_000})
    assert "0x10000" in str(jaxckpt.describe(path))


@pytest.mark.parametrize("created_s", [float("nan"), float("inf"), -1.0, 1e300, "now", None])
def test_a_manifest_of_no_possible_time_is_refused(path: pathlib.Path, created_s: Any) -> None:
    jaxckpt.save(path, {"x": 1})
    manifest = path / "manifest.msgpack"
    magic, _, payload = msgpack.unpackb(manifest.read_bytes())
    changed = msgpack.packb(msgpack.unpackb(payload) | {"created_s": created_s})
    manifest.write_bytes(msgpack.packb([magic, xxhash.xxh3_128_digest(changed), changed]))
    with pytest.raises(jaxckpt.FormatError, match="time"):
        jaxckpt.describe(path)


# --- what a checkpoint says of itself ---------------------------------------------------------------------------


def test_a_checkpoint_says_the_shapes_and_dtypes_of_its_leaves(path: pathlib.Path) -> None:
    tree = {
        "dense": {"kernel": jnp.zeros((2, 3), jnp.bfloat16), "bias": np.zeros(3)},
        "key": jax.random.split(jax.random.key(0), 4),
        "step": 7,
        "text": "a" * 5000,
    }
    jaxckpt.save(path, tree)
    checkpoint = jaxckpt.open(path)
    assert checkpoint.shapes() == {
        "dense/bias": (3,),
        "dense/kernel": (2, 3),
        "key": (4,),
        "step": (),
        "text": (),
    }
    assert checkpoint.dtypes() == {
        "dense/bias": np.dtype("float64"),
        "dense/kernel": np.dtype(jnp.bfloat16),
        "key": np.dtype("uint32"),
        "step": "int",
        "text": "str",
    }
    assert "dense/bias" in checkpoint
    assert "dense" not in checkpoint
    assert str(checkpoint).splitlines() == [
        f"{path}: 5 leaves, {checkpoint.nbytes} bytes",
        "  dense/bias (float64) [3]",
        "  dense/kernel (bfloat16) [2, 3]",
        "  key (key<threefry2x32>) [4]",
        "  step (int) []",
        "  text (str) []",
    ]


def test_a_key_that_is_not_there_gets_a_hint(path: pathlib.Path) -> None:
    jaxckpt.save(path, {"dense": {"kernel": 1, "bias": 2}})
    checkpoint = jaxckpt.open(path)
    with pytest.raises(KeyError, match=r"which has 2 leaves; did you mean 'dense/kernel' or 'dense/bias'\?"):
        checkpoint["dense/kernal"]
    for key in ("something else", 7):
        with pytest.raises(KeyError, match=r"which has 2 leaves[\"']$"):
            checkpoint[key]
