"""The command ``jaxckpt``: what each command prints, as text and as JSON, and the exit codes that scripts rely on.

Most tests call `main`, as the installed command does. Pipes and terminals are real.
"""

from __future__ import annotations

import io
import json
import math
import os
import pathlib
import re
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import jaxckpt
from jaxckpt import Progress, _cli
from jaxckpt._cli import ProgressBar, main
from jaxckpt._store import open_store

from .helpers import ROOT, make_mesh, run_fork


def run(capsys: pytest.CaptureFixture[str], *argv: str | pathlib.Path) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command."""
    code = main([str(argument) for argument in argv])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def run_json(capsys: pytest.CaptureFixture[str], *argv: str | pathlib.Path) -> Any:
    """The document of a command with --json, which must be JSON in the strict sense."""
    _, out, _ = run(capsys, argv[0], "--json", *argv[1:])

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(out, parse_constant=refuse)


def spawn(argv: Sequence[str | pathlib.Path], **options: Any) -> subprocess.Popen[bytes]:
    """The command in a process of its own, on a machine without any usable device."""
    environment = dict(os.environ, JAX_PLATFORMS="no_such_platform", PYTHONPATH=str(ROOT))
    return subprocess.Popen([sys.executable, "-m", "jaxckpt", *map(str, argv)], env=environment, **options)


@pytest.fixture
def checkpoint(path: pathlib.Path) -> pathlib.Path:
    mesh = make_mesh({"data": 4, "model": 2})
    rows = np.arange(200_000, dtype=np.float32).reshape(200, 1000)
    tree = {
        "params": {"w": jax.device_put(rows, NamedSharding(mesh, PartitionSpec("data")))},
        "a[0]": np.arange(3),
        "a": np.arange(10, 14),
        "line\n\x1b[31m": 1,
        "surrogate\ud800": 2,
        "step": 1200,
        "key": jax.random.key(1),
    }
    jaxckpt.save(path, tree, metadata={"lr": 0.1, "raw": b"\x01", "best": math.inf})
    return path


# --- ls -------------------------------------------------------------------------------------------------------


@pytest.fixture
def directory(tmp_path: pathlib.Path) -> pathlib.Path:
    root = tmp_path / "run"
    jaxckpt.save(root / "step_10", {"a": np.zeros(1000)})
    jaxckpt.save(root / "step_9", {"a": np.zeros(500)})
    jaxckpt.save(root / "final", 1)
    (root / "step_11" / "data-0123").mkdir(parents=True)
    (root / "logs").mkdir()
    (root / "notes.txt").write_text("no checkpoint")
    return root


def test_ls_lists_by_step_and_marks_what_is_not_committed(capsys: Any, directory: pathlib.Path) -> None:
    code, out, err = run(capsys, "ls", directory)
    assert (code, err) == (0, "")
    lines = [line.split() for line in out.splitlines()]
    assert [line[0] for line in lines] == ["NAME", "final", "step_9", "step_10", "step_11"]
    assert [line[-1] for line in lines[1:]] == ["committed", "committed", "committed", "uncommitted"]
    assert lines[2][1:4] == ["9", "3.91", "KiB"]
    assert lines[3][4].startswith("20")


def test_ls_as_json(capsys: Any, directory: pathlib.Path) -> None:
    entries = run_json(capsys, "ls", directory)
    assert [(entry["name"], entry["step"], entry["bytes"], entry["state"]) for entry in entries] == [
        ("final", None, 0, "committed"),
        ("step_9", 9, 4000, "committed"),
        ("step_10", 10, 8000, "committed"),
        ("step_11", 11, None, "uncommitted"),
    ]


def test_ls_of_a_checkpoint_lists_it(capsys: Any, directory: pathlib.Path) -> None:
    entries = run_json(capsys, "ls", directory / "step_9")
    assert [entry["name"] for entry in entries] == ["step_9"]


def test_ls_shows_a_damaged_manifest_and_says_so(capsys: Any, directory: pathlib.Path) -> None:
    manifest = directory / "step_9" / "manifest.msgpack"
    manifest.write_bytes(manifest.read_bytes()[:-1])
    code, out, err = run(capsys, "ls", directory)
    assert code == 1
    assert "unreadable" in out
    assert err.startswith("jaxckpt: step_9: manifest.msgpack")
    assert len([line for line in out.splitlines() if line.endswith(" committed")]) == 2


def test_ls_shows_metrics_and_pins_where_there_are_any(capsys: Any, managed: pathlib.Path) -> None:
    _, out, _ = run(capsys, "ls", managed)
    lines = [line.split() for line in out.splitlines()]
    assert lines[0] == ["NAME", "STEP", "BYTES", "DATE", "STATE", "PINNED", "METRICS"]
    assert lines[2][-3:] == ["committed", "pinned", "loss=0.75"]
    assert lines[3][-2:] == ["committed", "loss=0.5"]
    entries = run_json(capsys, "ls", managed)
    assert [entry["metrics"] for entry in entries] == [{"loss": 1 - step / 4} for step in range(5)]
    assert [entry["pinned"] for entry in entries] == [False, True, False, False, False]


def test_ls_has_no_columns_for_what_no_checkpoint_has(capsys: Any, directory: pathlib.Path) -> None:
    _, out, _ = run(capsys, "ls", directory)
    assert out.splitlines()[0].split() == ["NAME", "STEP", "BYTES", "DATE", "STATE"]
    assert [entry["metrics"] for entry in run_json(capsys, "ls", directory)] == [{}, {}, {}, {}]


def test_ls_of_an_empty_directory(capsys: Any, tmp_path: pathlib.Path) -> None:
    assert run(capsys, "ls", tmp_path) == (0, f"no checkpoints in {tmp_path}\n", "")
    assert run_json(capsys, "ls", tmp_path) == []


# --- info and tree --------------------------------------------------------------------------------------------


def test_info(capsys: Any, checkpoint: pathlib.Path) -> None:
    code, out, err = run(capsys, "info", checkpoint)
    assert (code, err) == (0, "")
    assert f"checkpoint  {checkpoint}" in out
    assert "7 leaves" in out
    assert "'lr': 0.1" in out
    document = run_json(capsys, "info", checkpoint)
    assert document["leaves"] == 7
    assert document["bytes"] == 800_000 + 24 + 32 + 8
    assert document["metadata"] == {"lr": 0.1, "raw": "01", "best": "Infinity"}
    assert document["writer"]["jax"] == jax.__version__


def test_tree(capsys: Any, checkpoint: pathlib.Path) -> None:
    code, out, err = run(capsys, "tree", checkpoint)
    assert (code, err) == (0, "")
    (row,) = (line for line in out.splitlines() if line.startswith("params/w"))
    assert row.split("  ")[-1] == "P('data') on data=4,model=2"
    assert "(200, 1000)" in row
    assert "781.25 KiB" in row
    (row,) = (line for line in out.splitlines() if line.startswith("step"))
    assert row.split() == ["step", "int", "1200"]


def test_tree_as_json(capsys: Any, checkpoint: pathlib.Path) -> None:
    leaves = {leaf["key"]: leaf for leaf in run_json(capsys, "tree", checkpoint)}
    assert len(leaves) == 7
    assert leaves["step"] == {
        "key": "step",
        "kind": "value",
        "dtype": "int",
        "shape": [],
        "bytes": 0,
        "sharding": None,
        "chunk_shape": [],
        "chunks": 0,
        "weak_type": False,
        "value": 1200,
    }
    assert leaves["params/w"]["chunk_shape"] == [50, 1000]
    assert leaves["key"]["dtype"].startswith("key<threefry")


def test_keys_cannot_disturb_the_terminal(capsys: Any, checkpoint: pathlib.Path) -> None:
    _, out, _ = run(capsys, "tree", checkpoint)
    assert "line\\n\\x1b[31m" in out
    assert "surrogate\\ud800" in out
    assert "\x1b" not in out


def test_info_names_the_metrics_and_the_items(capsys: Any, path: pathlib.Path) -> None:
    manager = jaxckpt.CheckpointManager(path)
    items = {"data": {"at": 3}, "a\n": b"\x01"}
    manager.save(3, {"a": np.zeros(3)}, metrics={"val/loss": 0.25, "\x1b[31m": math.nan}, items=items)
    manager.close()
    code, out, err = run(capsys, "info", manager.path_of(3))
    assert (code, err) == (0, "")
    lines = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert lines["metrics"] == "val/loss=0.25 \\x1b[31m=nan"
    assert lines["items"].endswith("B: data, a\\n")
    assert lines["holds"] == "1 leaf, 3 elements, 24 B"
    document = run_json(capsys, "info", manager.path_of(3))
    assert document["metrics"] == {"val/loss": 0.25, "\x1b[31m": "NaN"}
    assert document["items"] == ["data", "a\n"]
    assert document["items_bytes"] > 0


def test_info_of_a_checkpoint_without_items_has_no_line_for_them(
    capsys: Any, checkpoint: pathlib.Path
) -> None:
    _, out, _ = run(capsys, "info", checkpoint)
    assert [line.split()[0] for line in out.splitlines()] == [
        "checkpoint",
        "committed",
        "holds",
        "stored",
        "metadata",
    ]
    document = run_json(capsys, "info", checkpoint)
    assert (document["metrics"], document["items"], document["items_bytes"]) == ({}, [], 0)


def test_info_shows_the_rest_when_the_items_are_damaged(capsys: Any, path: pathlib.Path) -> None:
    jaxckpt.save(path, {"a": np.zeros(3)}, items={"data": 1})
    (items,) = path.glob("data-*/items/0")
    items.write_bytes(items.read_bytes()[:-1] + b"\x02")
    code, out, err = run(capsys, "info", path)
    assert code == 1
    assert out.splitlines()[-1].endswith(": damaged")
    assert "1 leaf" in out
    assert "checksum" in err
    assert run_json(capsys, "info", path)["items"] is None
    assert run(capsys, "tree", path)[0] == 0


# --- cat ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("params/w[3, :4]", "array([3000., 3001., 3002., 3003.], dtype=float32)"),
        (
            "params/w[10:13, ::500]",
            "array([[10000., 10500.],\n       [11000., 11500.],\n       [12000., 12500.]], dtype=float32)",
        ),
        ("params/w[-1,-1]", "np.float32(199999.0)"),
        ("params/w[::-150, 0]", "array([199000.,  49000.], dtype=float32)"),
        ("a[0]", "array([0, 1, 2])"),
        ("a[0][1:]", "array([1, 2])"),
        ("a[1]", "np.int64(11)"),
        ("a[0,]", "np.int64(10)"),
        ("a[...]", "array([10, 11, 12, 13])"),
        ("step", "1200"),
        ("line\n\x1b[31m", "1"),
        ("line\\n\\x1b[31m", "1"),
        ("surrogate\\ud800", "2"),
        ("key", "array([0, 1], dtype=uint32)"),
    ],
)
def test_cat(capsys: Any, checkpoint: pathlib.Path, argument: str, expected: str) -> None:
    assert run(capsys, "cat", checkpoint, argument) == (0, expected + "\n", "")


def test_cat_prints_every_digit_and_every_element_in_a_pipe(capsys: Any, path: pathlib.Path) -> None:
    generator = np.random.default_rng(0)
    tree = {
        "float64": generator.random(1500),
        "float32": generator.random(1500).astype(np.float32),
        "bfloat16": generator.random(1500).astype(ml_dtypes.bfloat16),
        "int4": generator.integers(-8, 8, 1500).astype(ml_dtypes.int4),
    }
    jaxckpt.save(path, tree)
    for key, array in tree.items():
        _, out, _ = run(capsys, "cat", path, key)
        names = {
            "array": lambda values, dtype=None: np.array(values, dtype),
            **vars(ml_dtypes),
            "float32": "f4",
        }
        printed = eval(out, names)
        assert printed.astype(array.dtype).tobytes() == array.tobytes()


@pytest.mark.parametrize(
    ("leaf", "expected"),
    [
        (np.array([math.nan, math.inf, -math.inf, 1.5]), ["NaN", "Infinity", "-Infinity", 1.5]),
        (np.array([0.1, 1 / 3], np.float32), [float(np.float32(0.1)), float(np.float32(1 / 3))]),
        (np.array([1 + 2j, complex(0, math.inf)]), [[1.0, 2.0], [0.0, "Infinity"]]),
        (np.array([1.5, math.nan], ml_dtypes.bfloat16), [1.5, "NaN"]),
        (np.array([[-8, 7]], ml_dtypes.int4), [[-8, 7]]),
        (np.array([2**64 - 1], np.uint64), [2**64 - 1]),
        (np.array(["aé", ""]), ["aé", ""]),
        (np.array(["aé"], ">U2"), ["aé"]),
        (np.array([b"a", b"bc"]), ["6100", "6263"]),
        (np.array(["2020-01-01", "NaT"], "M8[D]"), ["2020-01-01", "NaT"]),
        (
            np.array([(1, [0.5, math.inf])], [("a", "<i4"), ("b", "<f8", (2,))]),
            [{"a": 1, "b": [0.5, "Infinity"]}],
        ),
        (np.array([1.5], np.longdouble), ["1.5"]),
        (np.zeros((2, 0)), [[], []]),
        (np.array(7), 7),
        (b"\x00\xff", "00ff"),
        ("text\ud800", "text\ud800"),
        (-(10**30), -(10**30)),
        (math.nan, "NaN"),
        (complex(1, -0.0), [1.0, -0.0]),
        (True, True),
        (np.float32(0.5), 0.5),
        (np.datetime64("2020-01-01"), "2020-01-01"),
    ],
)
def test_cat_as_json(capsys: Any, path: pathlib.Path, leaf: Any, expected: Any) -> None:
    jaxckpt.save(path, {"x": leaf})
    document = run_json(capsys, "cat", path, "x")
    assert repr(document["value"]) == repr(expected)
    assert (document["key"], document["shape"]) == ("x", list(np.shape(leaf)))


def test_integers_too_long_for_decimals_are_hexadecimal(capsys: Any, path: pathlib.Path) -> None:
    jaxckpt.save(path, {"x": -(1 << 20_000)})
    assert run_json(capsys, "cat", path, "x")["value"] == hex(-(1 << 20_000))
    assert run(capsys, "cat", path, "x")[1] == hex(-(1 << 20_000)) + "\n"
    assert "-0x1000" in run(capsys, "tree", path)[1]
    assert run_json(capsys, "tree", path)[0]["value"] == hex(-(1 << 20_000))


def test_cat_of_a_checkpoint_that_is_one_leaf(capsys: Any, path: pathlib.Path) -> None:
    jaxckpt.save(path, np.arange(3))
    assert run(capsys, "cat", path, "")[1] == "array([0, 1, 2])\n"
    assert run(capsys, "cat", path, "(root)")[1] == "array([0, 1, 2])\n"
    assert run(capsys, "cat", path, "[1:]")[1] == "array([1, 2])\n"


def test_cat_of_strings(capsys: Any, path: pathlib.Path) -> None:
    jaxckpt.save(path, {"long": "äb" * 5000, "short": "äb", "bytes": b"xyz" * 8000})
    assert run(capsys, "cat", path, "long[1:4]")[1] == "'bäb'\n"
    assert run(capsys, "cat", path, "long[::5000]")[1] == "'ää'\n"
    assert run(capsys, "cat", path, "short[1]")[1] == "'b'\n"
    assert run(capsys, "cat", path, "bytes[-2:]")[1] == "b'yz'\n"


@pytest.mark.parametrize(
    "index",
    ["[x]", "[]", "[1.5]", "[0:1:2:3]", "[::0]", "[..., 0][::2]", "[1,2,3]", "[200,0]", "[...,...]", "[,]"],
)
def test_a_bad_slice_is_wrong_usage(capsys: Any, checkpoint: pathlib.Path, index: str) -> None:
    code, out, err = run(capsys, "cat", checkpoint, f"params/w{index}")
    assert (code, out) == (2, "")
    assert err.startswith("jaxckpt: ")
    assert "Traceback" not in err


def test_a_scalar_cannot_be_sliced(capsys: Any, checkpoint: pathlib.Path) -> None:
    code, _, err = run(capsys, "cat", checkpoint, "step[0]")
    assert code == 2
    assert "'step' is a scalar" in err


# --- verify and diff ------------------------------------------------------------------------------------------


def flip_a_byte(path: pathlib.Path) -> None:
    (pack,) = path.glob("data-*/packs/0-0")
    data = bytearray(pack.read_bytes())
    data[5] ^= 1
    pack.write_bytes(data)


def test_verify_of_a_whole_checkpoint(capsys: Any, checkpoint: pathlib.Path) -> None:
    code, out, err = run(capsys, "verify", checkpoint)
    assert (code, err) == (0, "")
    assert "whole" in out
    document = run_json(capsys, "verify", checkpoint)
    assert (document["ok"], document["problems"]) == (True, [])


def test_verify_names_what_is_damaged(capsys: Any, checkpoint: pathlib.Path) -> None:
    flip_a_byte(checkpoint)
    code, out, err = run(capsys, "verify", checkpoint)
    assert (code, err) == (1, "")
    assert "1 problem\n" in out
    document = run_json(capsys, "verify", checkpoint)
    assert document["ok"] is False
    assert [problem["kind"] for problem in document["problems"]] == ["checksum"]


def test_verify_of_a_damaged_manifest(capsys: Any, checkpoint: pathlib.Path) -> None:
    manifest = checkpoint / "manifest.msgpack"
    manifest.write_bytes(b"\xff" + manifest.read_bytes())
    code, out, _ = run(capsys, "verify", checkpoint)
    assert code == 1
    assert "manifest.msgpack" in out


def test_cat_of_a_damaged_leaf_prints_nothing(capsys: Any, checkpoint: pathlib.Path) -> None:
    flip_a_byte(checkpoint)
    key = jaxckpt.verify(checkpoint).problems[0].key
    code, out, err = run(capsys, "cat", checkpoint, str(key))
    assert (code, out) == (1, "")
    assert "checksum" in err


def test_diff(capsys: Any, checkpoint: pathlib.Path, tmp_path: pathlib.Path) -> None:
    tree = jaxckpt.restore(checkpoint)
    tree["params"]["w"] = tree["params"]["w"].at[3, 4].set(0)
    tree["key"] = jax.random.key(1, impl="rbg")
    tree["new\n"] = tree.pop("step")
    other = tmp_path / "other"
    jaxckpt.save(other, tree)
    code, out, err = run(capsys, "diff", checkpoint, other)
    assert (code, err) == (1, "")
    assert out.splitlines() == [
        f"only in {checkpoint}: step",
        f"only in {other}: new\\n",
        "key: key<threefry2x32> in the first, key<rbg> in the second",
        "params/w: 1 of 200000 elements differ",
        "4 leaves are equal",
    ]
    document = run_json(capsys, "diff", checkpoint, other)
    assert (document["only_in_a"], document["only_in_b"], document["equal"]) == (["step"], ["new\n"], 4)
    assert [(problem["key"], problem["kind"]) for problem in document["changed"]] == [
        ("key", "dtype"),
        ("params/w", "value"),
    ]


def test_diff_of_the_same_values_on_another_mesh(
    capsys: Any, checkpoint: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    tree = jaxckpt.restore(checkpoint, mesh=make_mesh({"data": 2, "model": 5}))
    jaxckpt.save(tmp_path / "other", tree)
    assert run(capsys, "diff", checkpoint, tmp_path / "other") == (0, "7 leaves are equal\n", "")
    assert run_json(capsys, "diff", checkpoint, tmp_path / "other")["same"] is True


# --- prune ----------------------------------------------------------------------------------------------------


@pytest.fixture
def managed(tmp_path: pathlib.Path) -> pathlib.Path:
    """Steps 0 to 4 of a manager, a quarter less of loss at each; step 1 is pinned."""
    root = tmp_path / "managed"
    with jaxckpt.CheckpointManager(root, max_to_keep=None) as manager:
        for step in range(5):
            manager.save(step, {"a": np.zeros(3)}, metrics={"loss": 1 - step / 4})
        manager.wait()
        manager.pin(1)
    return root


def steps_in(directory: pathlib.Path) -> list[int]:
    return jaxckpt.CheckpointManager(directory).steps()


def files_in(directory: pathlib.Path) -> dict[pathlib.Path, bytes]:
    return {file: file.read_bytes() for file in directory.rglob("*") if file.is_file()}


def test_prune_with_dry_run_says_why_each_step_stays_or_goes_and_changes_nothing(
    capsys: Any, managed: pathlib.Path
) -> None:
    before = files_in(managed)
    code, out, err = run(capsys, "prune", managed, "--max-to-keep", "1", "--keep-period", "2", "--dry-run")
    assert (code, err) == (0, "")
    assert out.splitlines() == [
        "step 0 stays: every 2 steps",
        "step 1 stays: pinned",
        "step 2 stays: every 2 steps",
        "step 3 goes: not one of the newest 1; not a multiple of 2",
        "step 4 stays: the newest step; one of the newest 1; every 2 steps",
        "1 of 5 steps would be deleted",
    ]
    assert files_in(managed) == before


def test_prune_deletes_and_says_so_in_the_past_tense(capsys: Any, managed: pathlib.Path) -> None:
    code, out, err = run(capsys, "prune", managed, "--max-to-keep", "1", "--keep-period", "2")
    assert (code, err) == (0, "")
    assert out.splitlines() == [
        "step 0 was kept: every 2 steps",
        "step 1 was kept: pinned",
        "step 2 was kept: every 2 steps",
        "step 3 was deleted: not one of the newest 1; not a multiple of 2",
        "step 4 was kept: the newest step; one of the newest 1; every 2 steps",
        "1 of 5 steps deleted",
    ]
    assert steps_in(managed) == [0, 1, 2, 4]
    assert not (managed / "step_00000003").exists()
    listed = json.loads((managed / "checkpoint.json").read_text())["checkpoints"]
    assert [entry["step"] for entry in listed] == [0, 1, 2, 4]
    assert jaxckpt.verify(managed / "step_00000002").ok


@pytest.mark.parametrize(
    ("rules", "left"),
    [
        (["--max-to-keep", "2"], [1, 3, 4]),
        (["--max-to-keep", "all"], [0, 1, 2, 3, 4]),
        (["--max-to-keep", "1"], [1, 4]),
        (["--keep-period", "3"], [0, 1, 3, 4]),
        (["--keep-interval-s", "1e6"], [0, 1, 4]),
        (["--time-to-live-s", "1e6"], [0, 1, 2, 3, 4]),
        (["--time-to-live-s", "1e-6"], [1, 4]),
        (["--time-to-live-s", "1e6", "--max-to-keep", "2"], [1, 3, 4]),
        (["--best", "loss"], [1, 4]),
        (["--best", "loss:max"], [0, 1, 4]),
        (["--best", "loss:max:3"], [0, 1, 2, 4]),
        (["--best", "loss:min:2", "--best", "loss:max"], [0, 1, 3, 4]),
        (["--max-to-keep", "1", "--pin", "2", "--pin", "3", "--pin", "77"], [1, 2, 3, 4]),
    ],
)
def test_each_rule_of_prune(capsys: Any, managed: pathlib.Path, rules: list[str], left: list[int]) -> None:
    document = run_json(capsys, "prune", managed, "--dry-run", *rules)
    assert [step["step"] for step in document["steps"] if step["kept"]] == left
    assert run(capsys, "prune", managed, *rules)[0] == 0
    assert steps_in(managed) == left


def test_prune_as_json(capsys: Any, managed: pathlib.Path) -> None:
    document = run_json(capsys, "prune", managed, "--max-to-keep", "1")
    assert (document["directory"], document["dry_run"]) == (str(managed), False)
    assert document["steps"][:2] == [
        {
            "step": 0,
            "kept": False,
            "deleted": True,
            "in_use": False,
            "reasons": ["not one of the newest 1"],
        },
        {"step": 1, "kept": True, "deleted": False, "in_use": False, "reasons": ["pinned"]},
    ]


def test_prune_names_the_steps_that_somebody_reads(capsys: Any, managed: pathlib.Path) -> None:
    reader = jaxckpt.open(managed / "step_00000002")
    code, out, _ = run(capsys, "prune", managed, "--max-to-keep", "1")
    assert code == 1
    assert "step 2 is being read and was not deleted: not one of the newest 1" in out.splitlines()
    assert "step 3 was deleted: not one of the newest 1" in out.splitlines()
    assert out.splitlines()[-1] == "2 of 5 steps deleted"
    assert steps_in(managed) == [1, 2, 4]
    document = run_json(capsys, "prune", managed, "--max-to-keep", "1")
    assert [step["step"] for step in document["steps"] if step["in_use"]] == [2]
    assert reader["a"][...].tolist() == [0, 0, 0]
    del reader
    assert run(capsys, "prune", managed, "--max-to-keep", "1")[0] == 0
    assert steps_in(managed) == [1, 4]


def test_prune_leaves_a_step_with_a_damaged_manifest_alone(capsys: Any, managed: pathlib.Path) -> None:
    manifest = managed / "step_00000002" / "manifest.msgpack"
    manifest.write_bytes(b"damaged")
    code, out, _ = run(capsys, "prune", managed, "--max-to-keep", "1")
    assert code == 0
    assert "step 2 was kept: it cannot be read, and is left alone" in out.splitlines()
    assert manifest.exists()


def test_prune_with_another_prefix(capsys: Any, tmp_path: pathlib.Path) -> None:
    with jaxckpt.CheckpointManager(tmp_path / "run", prefix="epoch-", width=3) as manager:
        for step in range(3):
            manager.save(step, 1)
    code, out, _ = run(capsys, "prune", tmp_path / "run", "--max-to-keep", "1")
    assert (code, out) == (0, f"no steps step_<number> in {tmp_path / 'run'}\n")
    assert run(capsys, "prune", tmp_path / "run", "--max-to-keep", "1", "--prefix", "epoch-")[0] == 0
    assert manager.steps() == [2]


def test_a_metric_that_no_step_has_deletes_nothing(capsys: Any, managed: pathlib.Path) -> None:
    code, out, err = run(capsys, "prune", managed, "--best", "los:min:3", "--best", "loss")
    assert (code, out) == (3, "")
    assert "'los'" in err
    assert steps_in(managed) == [0, 1, 2, 3, 4]


def test_names_of_metrics_may_hold_colons(capsys: Any, tmp_path: pathlib.Path) -> None:
    with jaxckpt.CheckpointManager(tmp_path / "run") as manager:
        for step in range(3):
            manager.save(step, 1, metrics={"a:b": step, "a:max:b": -step})
    for rule, left in (("a:b", [0, 2]), ("a:b:min:2", [0, 1, 2]), ("a:max:b", [2]), ("a:max:b:max", [0, 2])):
        document = run_json(capsys, "prune", tmp_path / "run", "--dry-run", "--best", rule)
        assert [step["step"] for step in document["steps"] if step["kept"]] == left


@pytest.mark.parametrize(
    "rules",
    [
        [],
        ["--dry-run"],
        ["--pin", "2"],
        ["--max-to-keep", "0"],
        ["--max-to-keep", "-1"],
        ["--max-to-keep", "none"],
        ["--keep-period", "0"],
        ["--keep-interval-s", "nan"],
        ["--time-to-live-s", "0"],
        ["--best", ""],
        ["--best", "loss:min:0"],
        ["--max-to-keep", "1", "--pin", "-1"],
        ["--max-to-keep", "1", "--prefix", "a/b"],
        ["--max-to", "1"],
    ],
)
def test_prune_with_bad_rules_or_none_is_wrong_usage_and_deletes_nothing(
    capsys: Any, managed: pathlib.Path, rules: list[str]
) -> None:
    code, out, err = run(capsys, "prune", managed, *rules)
    assert (code, out) == (2, "")
    assert err.startswith(("jaxckpt: ", "usage: jaxckpt"))
    assert "Traceback" not in err
    assert steps_in(managed) == [0, 1, 2, 3, 4]


def test_prune_of_a_directory_that_is_not_there(capsys: Any, managed: pathlib.Path) -> None:
    for missing in (managed / "missing", managed / "checkpoint.json"):
        code, out, err = run(capsys, "prune", missing, "--max-to-keep", "1")
        assert (code, out) == (3, "")
        assert err.startswith("jaxckpt: there is no directory ")
    assert not (managed / "missing").exists()


# --- errors ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [["info"], ["tree"], ["verify"], ["cat", "key"], ["diff"]])
def test_no_checkpoint_there(capsys: Any, tmp_path: pathlib.Path, command: list[str]) -> None:
    missing = str(tmp_path / "missing")
    arguments = {"cat": [missing, "key"], "diff": [missing, missing]}.get(command[0], [missing])
    code, out, err = run(capsys, command[0], *arguments)
    assert (code, out) == (3, "")
    assert err.startswith("jaxckpt: no committed checkpoint at ")


def test_other_things_that_are_not_there(
    capsys: Any, checkpoint: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    assert run(capsys, "ls", tmp_path / "missing")[0] == 3
    assert run(capsys, "cat", checkpoint, "missing")[0] == 3
    assert run(capsys, "info", "nonsense://bucket/a")[0] == 3
    assert run(capsys, "info", checkpoint / "manifest.msgpack")[0] == 3


def test_a_damaged_manifest_cannot_be_read(capsys: Any, checkpoint: pathlib.Path) -> None:
    (checkpoint / "manifest.msgpack").write_bytes(b"")
    for command in (
        ["info", checkpoint],
        ["tree", checkpoint],
        ["cat", checkpoint, "a"],
        ["diff", checkpoint, checkpoint],
    ):
        code, out, err = run(capsys, *command)
        assert (code, out) == (3, "")
        assert "Traceback" not in err


@pytest.mark.parametrize(
    "argv", [[], ["nonsense"], ["info"], ["cat", "a"], ["diff", "a"], ["ls", "--nonsense", "a"]]
)
def test_wrong_usage(capsys: Any, argv: list[str]) -> None:
    code, out, err = run(capsys, *argv)
    assert (code, out) == (2, "")
    assert err.startswith("usage: jaxckpt")


def test_ls_takes_urls(capsys: Any) -> None:
    url = "memory://test_cli/ls"
    jaxckpt.save(f"{url}/step_3", {"w": np.arange(3)})
    jaxckpt.save(f"{url}/other", {"w": np.arange(3)})
    open_store(url).put("step_4/data-0123456789abcdef/zarr.json", b"{}")
    code, out, _ = run(capsys, "ls", "--json", url)
    assert code == 0
    assert [(entry["name"], entry["state"]) for entry in json.loads(out)] == [
        ("other", "committed"),
        ("step_3", "committed"),
        ("step_4", "uncommitted"),
    ]
    assert [entry["name"] for entry in json.loads(run(capsys, "ls", "--json", f"{url}/other")[1])] == [
        "other"
    ]
    assert run(capsys, "ls", "ftp://host/run")[0] == 3


def test_the_help_explains_the_exit_codes(capsys: Any) -> None:
    code, out, _ = run(capsys, "--help")
    assert code == 0
    listed = out.partition("exit codes:")[2]
    for number in (_cli.OK, _cli.DIFFERS, _cli.USAGE, _cli.UNREADABLE, _cli.INTERRUPTED, _cli.BROKEN_PIPE):
        assert f"\n  {number} " in listed
    for command in ("ls", "info", "tree", "cat", "verify", "diff", "convert", "prune"):
        assert f"    {command} " in out
        assert run(capsys, command, "--help")[0] == 0


def test_the_version(capsys: Any) -> None:
    assert run(capsys, "--version") == (0, f"jaxckpt {jaxckpt.__version__}\n", "")


# --- pipes, signals and machines ------------------------------------------------------------------------------


@pytest.mark.slow
def test_no_command_needs_a_device(checkpoint: pathlib.Path) -> None:
    path = str(checkpoint.rename(checkpoint.with_name("checkpoint7")))
    root = str(checkpoint.parent)
    commands = [
        ["ls", root],
        ["info", path],
        ["tree", path],
        ["verify", path],
        ["cat", path, "params/w[3, 4]"],
        ["diff", path, path],
        ["prune", root, "--max-to-keep", "1", "--prefix", "checkpoint"],
    ]
    program = """
        import json, sys
        import jax
        from jaxckpt._cli import main

        jax.config.update("jax_platforms", "a_platform_that_is_not_there")
        for argv in json.loads(sys.argv[1]):
            assert main(argv) == 0, argv
            print("--- the end of", argv[0])
    """
    result = run_fork(program, json.dumps(commands))
    assert result.stderr == ""
    *printed, rest = re.split("--- the end of .*\n", result.stdout)
    assert (len(printed), rest) == (len(commands), "")
    assert all(printed)


def test_a_reader_that_goes_away_is_no_error(checkpoint: pathlib.Path) -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    with spawn(["tree", checkpoint], stdout=write_end, stderr=subprocess.PIPE) as process:
        os.close(write_end)
        _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (141, b"")


class _InterruptedStream(io.StringIO):
    """Somebody presses Ctrl-C while the command prints."""

    def write(self, text: str) -> int:
        raise KeyboardInterrupt


def test_an_interrupt_ends_it_quietly(
    checkpoint: pathlib.Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdout", _InterruptedStream())
    assert main(["info", str(checkpoint)]) == 130
    assert capsys.readouterr().err == ""


# --- the progress bar -----------------------------------------------------------------------------------------


def on_terminal(values: Sequence[Progress]) -> str:
    """What a bar writes to a real pseudo-terminal."""
    controller, terminal = os.openpty()
    with os.fdopen(terminal, "w") as stream:
        bar = ProgressBar(stream)
        for value in values:
            bar.show(value)
        bar.close()
        stream.write("end")
        stream.flush()
        written = b""
        while not written.endswith(b"end"):
            written += os.read(controller, 4096)
    os.close(controller)
    return written.removesuffix(b"end").decode()


def at(elapsed_s: float, done: int = 512, total: int = 1024) -> Progress:
    return Progress("read", done << 20, total << 20, elapsed_s)


def test_nothing_is_drawn_in_the_first_second() -> None:
    assert on_terminal([at(0.0), at(0.5), at(0.99)]) == ""


def test_the_bar_is_drawn_after_a_second_and_wiped_at_the_end() -> None:
    text = on_terminal([at(0.5), at(2.0)])
    assert text == "\r[###############               ]  50%  512.00 MiB  256.00 MiB/s  2 s left\x1b[K\r\x1b[K"


def test_the_bar_is_drawn_ten_times_a_second_at_most() -> None:
    text = on_terminal([at(1 + step / 1000) for step in range(1000)])
    assert 5 < text.count("%") <= 10


def test_the_bar_survives_odd_values() -> None:
    text = on_terminal([at(1.5, 0), at(2.5, 10, 0), at(3.5, 2000, 1024)])
    assert text.count("%") == 3
    assert "  0%" in text
    assert "100%" in text


def test_a_pipe_gets_no_bar() -> None:
    stream = io.StringIO()
    bar = ProgressBar(stream)
    bar.show(at(5.0))
    bar.close()
    assert stream.getvalue() == ""


@pytest.mark.parametrize("command", ["verify", "diff"])
def test_long_commands_tell_the_bar(
    capsys: Any, checkpoint: pathlib.Path, tmp_path: pathlib.Path, command: str
) -> None:
    class Bar:
        def __init__(self) -> None:
            self.shown: list[Progress] = []
            self.is_closed = False

        def show(self, progress: Progress) -> None:
            self.shown.append(progress)

        def close(self) -> None:
            self.is_closed = True

    other = tmp_path / "other"
    jaxckpt.save(other, {"params": {"w": jnp.zeros((200, 1000))}})
    paths = [str(checkpoint), str(other)] if command == "diff" else [str(checkpoint)]
    arguments = _cli._make_parser().parse_args([command, *paths])
    bar: Any = Bar()
    arguments.run(arguments, _cli._Output(io.StringIO(), is_json=False), bar)
    assert bar.is_closed
    assert bar.shown[-1].bytes_done == bar.shown[-1].bytes_total > 800_000 - 1


@pytest.mark.slow
def test_on_a_terminal_long_arrays_are_abbreviated(checkpoint: pathlib.Path) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    def cat(*flags: str) -> str:
        arguments = _cli._make_parser().parse_args(["cat", *flags, str(checkpoint), "params/w"])
        stream = Terminal()
        arguments.run(arguments, _cli._Output(stream, is_json=False), ProgressBar(io.StringIO()))
        return stream.getvalue()

    assert len(cat()) < 1000
    assert "..." in cat()
    assert len(cat("--all")) > 200_000
