"""Conversions between formats: names, values, choices, damage, the command, and how much memory they take.

Checkpoints of TensorFlow come from `tests/tensorflow`, written by TensorFlow itself, or from our own writer.
"""

from __future__ import annotations

import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxckpt
from jaxckpt import (
    CorruptError,
    ExistsError,
    MismatchError,
    NotFoundError,
    Progress,
    UnsupportedLeafError,
)
from jaxckpt._cli import main
from jaxckpt._converting import convert
from jaxckpt._leaves import StreamedArray
from jaxckpt._nesting import keys_of_names
from jaxckpt.interop import tensorflow

from .helpers import assert_same_leaf, assert_same_tree, run_fork

FIXTURES = pathlib.Path(__file__).resolve().parent / "tensorflow"
PREFIXES = {
    expected.parent.name: expected.parent / json.loads(expected.read_text())["prefix"]
    for expected in sorted(FIXTURES.glob("*/expected.json"))
}

W = np.arange(24, dtype=np.float32).reshape(4, 6)
B = np.arange(6, dtype=np.float32)


@pytest.fixture
def bundle(tmp_path: pathlib.Path) -> pathlib.Path:
    """A checkpoint as a TensorFlow program with Adam leaves it."""
    prefix = tmp_path / "tf" / "model.ckpt"
    tree = {
        "model": {"dense": {"kernel": W, "kernel/Adam": W + 1, "bias": B}},
        "layers": [{"w": B}, {"w": B + 1}],
        "step": np.int64(7),
    }
    tensorflow.write(prefix, tree)
    return prefix


def contents_of(checkpoint: Any) -> dict[str, tuple[Any, ...]]:
    """Shapes, dtypes and bytes by name; strings as lists."""
    found: dict[str, tuple[Any, ...]] = {}
    names: tuple[str, ...] = checkpoint.keys()
    for key in names:
        leaf = checkpoint[key]
        value = leaf[...]
        if leaf.dtype is None:
            found[key] = (leaf.shape, None, value if isinstance(value, bytes) else value.tolist())
        else:
            found[key] = (leaf.shape, leaf.dtype, value.tobytes())
    return found


# --- there and back -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PREFIXES)
def test_what_tensorflow_wrote_comes_through_both_ways(name: str, tmp_path: pathlib.Path):
    there = convert(PREFIXES[name], tmp_path / "own")
    assert (there.source_format, there.destination_format, there.ok) == ("tensorflow", "jaxckpt", True)
    with tensorflow.open(PREFIXES[name]) as source:
        expected = contents_of(source)
        assert sorted(jaxckpt.open(tmp_path / "own").keys()) == sorted(keys_of_names(source.keys()))
    back = convert(tmp_path / "own", tmp_path / "tf" / "ckpt", to="tensorflow")
    assert back.ok
    assert there.leaves == back.leaves == len(expected)
    with tensorflow.open(tmp_path / "tf" / "ckpt") as written:
        assert contents_of(written) == expected


def test_a_converted_checkpoint_is_restored_like_any_tree_with_its_names(bundle, path):
    convert(bundle, path)
    like = {
        "model": {"dense": {"kernel": jnp.zeros((4, 6)), "bias": jnp.zeros(6)}},
        "layers": [{"w": jnp.zeros(6)}, {"w": jnp.zeros(6)}],
    }
    tree = jaxckpt.restore(path, like, unexpected="ignore")
    assert_same_tree(tree["model"], {"dense": {"kernel": jnp.asarray(W), "bias": jnp.asarray(B)}})
    assert_same_leaf(tree["layers"][1]["w"], jnp.asarray(B + 1))
    assert jaxckpt.open(path).keys() == (
        "layers/0/w",
        "layers/1/w",
        "model/dense/bias",
        "model/dense/kernel",
        "model/dense/kernel~1Adam",
        "step",
    )


def test_arrays_come_uncommitted_and_without_sharding(bundle, path):
    convert(bundle, path, select="model/*")
    leaf = jaxckpt.open(path)["model/dense/kernel"]
    assert (leaf.kind, leaf.sharding, leaf.weak_type, leaf.spec.committed) == ("array", None, False, False)
    assert not jaxckpt.restore(path)["model"]["dense"]["kernel"].committed


def test_our_own_trees_become_tensors(path, tmp_path):
    key = jax.random.key(3)
    words = np.array([b"one", b"three"])
    tree = {"w": jnp.asarray(W), "l": [1, 2.5], "k": key, "t": "text", "b": b"\xff", "words": words}
    jaxckpt.save(path, tree)
    convert(path, tmp_path / "tf" / "x", to="tensorflow")
    with tensorflow.open(tmp_path / "tf" / "x") as written:
        assert written.shapes() == {
            "b": (),
            "k": (2,),
            "l/0": (),
            "l/1": (),
            "t": (),
            "w": (4, 6),
            "words": (2,),
        }
        assert written["l/0"][()] == 1
        assert written["t"][...] == b"text"
        assert written["words"][...].tolist() == [b"one", b"three"]
        np.testing.assert_array_equal(written["k"][...], jax.random.key_data(key))


# --- choices --------------------------------------------------------------------------------------------------


def test_a_part_is_selected_and_renamed(bundle, path, tmp_path):
    convert(bundle, path, select=["model/*", "step"], rename={"model/dense": "params", "step": "count"})
    assert jaxckpt.open(path).keys() == ("count", "params/bias", "params/kernel", "params/kernel~1Adam")
    convert(path, tmp_path / "tf2" / "x", to="tensorflow", select="params/k*", rename={"params": "p"})
    with tensorflow.open(tmp_path / "tf2" / "x") as written:
        assert written.keys() == ("p/kernel", "p/kernel/Adam")


def test_aliases_select_and_rename(path):
    prefix = PREFIXES["tf2_object_keras3"]
    with tensorflow.open(prefix) as source:
        name, aliases = next(iter(source.aliases().items()))
        shape = source[name].shape
    done = convert(prefix, path, select=aliases[0], rename={aliases[0]: "kernel"})
    assert done.leaves == 1
    assert jaxckpt.open(path)["kernel"].shape == shape


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", np.float64, jnp.float8_e4m3fn], ids=str)
def test_floating_arrays_are_cast_both_ways(dtype: Any, bundle, path, tmp_path):
    wanted = W.astype(np.dtype(dtype))
    done = convert(bundle, path, dtype=dtype)
    checkpoint = jaxckpt.open(path)
    assert_same_leaf(checkpoint["model/dense/kernel"][...], wanted)
    assert checkpoint["step"].dtype == np.int64
    assert done.nbytes == checkpoint.nbytes
    jaxckpt.save(path, {"w": jnp.asarray(W), "n": jnp.arange(3), "x": 1.5}, overwrite=True)
    convert(path, tmp_path / "tf2" / "x", to="tensorflow", dtype=dtype)
    with tensorflow.open(tmp_path / "tf2" / "x") as written:
        assert_same_leaf(written["w"][...], wanted)
        assert (written["n"].dtype, written["x"].dtype) == (np.int32, np.float64)


def test_large_arrays_are_cast_piece_by_piece(tmp_path, path):
    array = np.random.default_rng(0).standard_normal((1537, 1 << 12)).astype(np.float32)
    tensorflow.write(tmp_path / "tf" / "x", {"a": array})
    convert(tmp_path / "tf" / "x", path, dtype="float16")
    assert_same_leaf(jaxckpt.open(path)["a"][...], array.astype(np.float16))
    convert(path, tmp_path / "tf2" / "x", to="tensorflow", dtype="float32")
    with tensorflow.open(tmp_path / "tf2" / "x") as written:
        assert_same_leaf(written["a"][...], array.astype(np.float16).astype(np.float32))


# --- what is refused ------------------------------------------------------------------------------------------


def test_a_destination_is_replaced_only_when_that_was_asked_for(bundle, path, tmp_path):
    jaxckpt.save(path, {"old": jnp.zeros(2)})
    with pytest.raises(ExistsError):
        convert(bundle, path)
    assert jaxckpt.open(path).keys() == ("old",)
    convert(bundle, path, select="step", overwrite=True)
    assert jaxckpt.open(path).keys() == ("step",)
    with pytest.raises(ExistsError):
        convert(path, bundle, to="tensorflow")
    convert(path, bundle, to="tensorflow", overwrite=True)
    with tensorflow.open(bundle) as written:
        assert written.keys() == ("step",)


def test_one_format_is_not_converted_into_itself(bundle, path, tmp_path):
    jaxckpt.save(path, {"w": W})
    with pytest.raises(ValueError, match=r"is a jaxckpt checkpoint already; .* another format: tensorflow"):
        convert(path, tmp_path / "b")
    with pytest.raises(ValueError, match="is a tensorflow checkpoint already"):
        convert(bundle, tmp_path / "b", to="tensorflow")
    with pytest.raises(ValueError, match=r"to must be one of 'jaxckpt', .*'tensorflow'.*, not 'pickle'"):
        convert(path, tmp_path / "b", to="pickle")
    assert not (tmp_path / "b").exists()


def test_what_is_no_checkpoint_is_not_found(tmp_path, path):
    (tmp_path / "empty").mkdir()
    for nothing in (tmp_path / "empty", tmp_path / "absent"):
        with pytest.raises(NotFoundError, match=r"no checkpoint of a known format \(jaxckpt, .*tensorflow"):
            convert(nothing, path)
    assert not path.exists()


def test_names_that_are_not_there_are_refused(bundle, path):
    with pytest.raises(MismatchError, match="matches no saved key"):
        convert(bundle, path, select="nothing*")
    with pytest.raises(MismatchError, match="this rule renames no saved key"):
        convert(bundle, path, rename={"nothing": "x"})
    with pytest.raises(MismatchError, match="would be both"):
        convert(bundle, path, rename={"layers/0": "layers/1"})
    with pytest.raises(ValueError, match="int8 is no floating type"):
        convert(bundle, path, dtype="int8")
    assert not path.exists()


def test_strings_that_no_array_of_bytes_can_hold_are_refused(tmp_path, path):
    prefix = tmp_path / "tf" / "x"
    ended = np.array([b"a\0", b"b"], object)
    uneven = np.array([b"x" * (1 << 20)] + [b""] * 100, object)
    tensorflow.write(prefix, {"ended": ended, "uneven": uneven, "fine": np.array([b"\0a", b""], object)})
    with pytest.raises(UnsupportedLeafError) as caught:
        convert(prefix, path)
    assert [(problem.key, problem.message[:35]) for problem in caught.value.problems] == [
        ("ended", "holds strings that end in NUL bytes"),
        ("uneven", "holds 101 strings of up to 1048576 "),
    ]
    assert not path.exists()
    convert(prefix, path, select="fine")
    assert jaxckpt.restore(path)["fine"].tolist() == [b"\0a", b""]


# --- damage ---------------------------------------------------------------------------------------------------


def flip(file: pathlib.Path, at: int) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("suffix", [".data-00000-of-00001", ".index"])
def test_a_damaged_source_leaves_nothing_behind(suffix: str, bundle, path):
    flip(bundle.with_name(bundle.name + suffix), 30)
    with pytest.raises(CorruptError):
        convert(bundle, path)
    with pytest.raises(NotFoundError):
        jaxckpt.open(path)


def test_damage_on_the_way_to_storage_is_reported(bundle, path, tmp_path):
    def damage_own(progress: Progress) -> None:
        if progress.phase == "done":
            (pack,) = path.glob("data-*/packs/*")
            flip(pack, 0)

    done = convert(bundle, path, on_progress=damage_own)
    assert not done.ok
    assert [problem.kind for problem in done.problems] == ["checksum"]
    assert "damaged on its way to storage" in str(done)
    jaxckpt.save(path, {"w": W, "v": W}, overwrite=True)

    def damage_theirs(progress: Progress) -> None:
        if progress.phase == "done":
            flip(tmp_path / "tf2" / "x.data-00000-of-00001", W.nbytes)

    done = convert(path, tmp_path / "tf2" / "x", to="tensorflow", on_progress=damage_theirs)
    assert [problem.key for problem in done.problems] == ["w"]


# --- streamed arrays ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"chunk_bytes_max": 4 << 20, "host_bytes_max": 2 << 20}])
def test_a_streamed_array_is_read_once_and_forwards(path, options):
    arrays = {
        "rows": np.random.default_rng(0).integers(0, 256, (40, 1 << 19), np.uint8),
        "small": W,
        "scalar": np.float64(0.5),
        "empty": np.zeros((0, 3), np.int16),
    }
    ranges: dict[str, list[tuple[int, int]]] = {name: [] for name in arrays}
    scratch = np.empty(1 << 24, np.uint8)

    def stream(name: str) -> StreamedArray:
        array = np.asarray(arrays[name])
        raw = array.reshape(-1).view(np.uint8)

        def read(lo: int, hi: int) -> Any:
            ranges[name].append((lo, hi))
            scratch[: hi - lo] = raw[lo:hi]  # is valid until the next call only
            return scratch[: hi - lo]

        return StreamedArray(array.shape, array.dtype, read)

    jaxckpt.save(path, {name: stream(name) for name in arrays}, options=jaxckpt.SaveOptions(**options))
    checkpoint = jaxckpt.open(path)
    for name, array in arrays.items():
        assert_same_leaf(checkpoint[name][...], np.asarray(array), name)
        assert [lo for lo, _ in ranges[name]] == [0, *(hi for _, hi in ranges[name][:-1])][
            : len(ranges[name])
        ]
        assert sum(hi - lo for lo, hi in ranges[name]) == np.asarray(array).nbytes
    assert len(ranges["rows"]) > 2


def test_a_stream_that_fails_ends_the_save(path):
    def fail(_lo: int, _hi: int) -> Any:
        raise CorruptError("damaged")

    jaxckpt.save(path, {"old": W})
    with pytest.raises(CorruptError, match="damaged"):
        jaxckpt.save(path, {"w": StreamedArray((3,), np.dtype("float32"), fail), "b": B}, overwrite=True)
    assert jaxckpt.open(path).keys() == ("old",)
    assert jaxckpt.verify(path).ok


# --- the command ----------------------------------------------------------------------------------------------


def run(capsys: pytest.CaptureFixture[str], *argv: Any) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of ``jaxckpt convert``."""
    code = main(["convert", *map(str, argv)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_command_converts_and_says_so(capsys, bundle, path):
    code, out, err = run(
        capsys, bundle, path, "--select", "model/*", "--rename", "model/dense=p", "--dtype=float16"
    )
    assert (code, err) == (0, "")
    first, second, last = out.splitlines()
    assert first == f"{bundle} (tensorflow) -> {path} (jaxckpt)"
    assert second.startswith("3 leaves, 108 B in ")
    assert last == "verified"
    assert jaxckpt.open(path).keys() == ("p/bias", "p/kernel", "p/kernel~1Adam")
    code, out, _ = run(capsys, "--json", "--to", "tensorflow", "--overwrite", path, bundle)
    document = json.loads(out)
    assert code == 0
    assert document.pop("seconds") > 0
    assert document == {
        "source": str(path),
        "source_format": "jaxckpt",
        "destination": str(bundle),
        "destination_format": "tensorflow",
        "leaves": 3,
        "bytes": 108,
        "ok": True,
        "left_out": [],
        "problems": [],
    }


def test_the_exit_codes_of_the_command(capsys, bundle, path, tmp_path):
    assert run(capsys, bundle, path)[0] == 0
    for code, argv in (
        (2, [bundle, path, "--rename", "model"]),
        (2, [bundle, path, "--to", "pickle"]),
        (2, [bundle, path, "--dtype", "int8", "--overwrite"]),
        (2, [bundle, path, "--dtype", "nonsense", "--overwrite"]),
        (2, [path, tmp_path / "other"]),
        (3, [bundle, path]),
        (3, [tmp_path / "absent", path]),
        (3, [bundle, tmp_path / "other", "--select", "nothing"]),
    ):
        found, out, err = run(capsys, *argv)
        assert (found, out) == (code, ""), argv
        assert "Traceback" not in err
    flip(bundle.with_name(bundle.name + ".data-00000-of-00001"), 0)
    code, _, err = run(capsys, bundle, tmp_path / "other")
    assert (code, "checksum" in err) == (1, True)
    assert not (tmp_path / "other" / "manifest.msgpack").exists()


# --- memory ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_large_checkpoint_is_converted_in_little_memory_and_without_a_device(tmp_path):
    """160 MiB, 128 of them in one array, grow the process by less than 56 MiB, both ways."""
    zeros = np.zeros(8 << 20, np.uint8)

    def stream(mib: int) -> StreamedArray:
        return StreamedArray((mib, 1 << 18), np.dtype("float32"), lambda lo, hi: zeros[: hi - lo])

    tensorflow.write(tmp_path / "x", {"large": stream(128), "other": stream(32)})
    run_fork(
        """
        import pathlib, sys
        from jax._src import xla_bridge
        from jaxckpt._converting import convert
        from jaxckpt.interop import tensorflow

        def read_mib(field):
            (line,) = [line for line in open("/proc/self/status") if line.startswith(field)]
            return int(line.split()[1]) / 1024

        source, own, back = sys.argv[1:]
        for source, destination, to in [(source, own, "jaxckpt"), (own, back, "tensorflow")]:
            pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
            before = read_mib("VmRSS:")
            assert convert(source, destination, to=to).nbytes == 160 << 20
            growth = read_mib("VmHWM:") - before
            assert growth < 56, f"{growth} MiB to {to}"
        assert not xla_bridge.backends_are_initialized()
        """,
        tmp_path / "x",
        tmp_path / "own",
        tmp_path / "back",
    )
