"""A manager believes its directory alone: whatever the steps are called, whoever put or took them there, wherever the
directory went, and whatever ``checkpoint.json`` says of it.
"""

from __future__ import annotations

import datetime as dt
import json
import math
import os
import pathlib
import shutil
import subprocess
from collections.abc import Callable
from typing import Any

import pytest

import jaxckpt
from jaxckpt import Best, CheckpointManager
from jaxckpt._steps import _checksum_of

from .helpers import assert_same_tree
from .test_manager import MANIFEST, Clock, Events, assert_holds_exactly, name_of, save_steps, tree_of

# --- names and places -----------------------------------------------------------------------------------------


def test_names_sort_as_text_and_prefix_and_width_are_options(path: pathlib.Path) -> None:
    save_steps(path / "usual", 5, 50, 12345)
    names = ["step_00000005", "step_00000050", "step_00012345"]
    assert sorted(entry.name for entry in (path / "usual").glob("step_*")) == names
    assert CheckpointManager(path / "usual").path_of(50) == str(path / "usual" / "step_00000050")

    options: dict[str, Any] = {"prefix": "ckpt-v1.2=", "width": 3}
    save_steps(path / "own", 5, 50, 12345, **options)
    names = ["ckpt-v1.2=005", "ckpt-v1.2=050", "ckpt-v1.2=12345"]
    assert sorted(entry.name for entry in (path / "own").glob("ckpt*")) == sorted(names)
    assert CheckpointManager(path / "own", **options).steps() == [5, 50, 12345]
    assert CheckpointManager(path / "own").steps() == []

    save_steps(path / "bare", 7, prefix="", width=1)
    assert (path / "bare" / "7" / MANIFEST).exists()
    for prefix in ("a/b", ".hidden", "a b", "step\n"):
        with pytest.raises(ValueError, match="prefix= must be"):
            CheckpointManager(path, prefix=prefix)
    for prefix in ("run1", "7"):
        with pytest.raises(ValueError, match="must not end with a digit"):
            CheckpointManager(path, prefix=prefix)
    for width in (0, 19):
        with pytest.raises(ValueError, match="width= must be"):
            CheckpointManager(path, width=width)


def test_any_width_is_read_and_counted(path: pathlib.Path) -> None:
    save_steps(path, 1, width=1)
    save_steps(path, 2, width=4)
    save_steps(path, 3, width=18)
    save_steps(path, 4)
    manager = CheckpointManager(path, max_to_keep=2)
    assert manager.steps() == [1, 2, 3, 4]
    for step in (1, 2, 3, 4):
        assert_same_tree(manager.restore(step), tree_of(step))
    assert manager.prune() == [1, 2]
    assert {entry.name for entry in path.glob("step_*")} == {"step_000000000000000003", "step_00000004"}
    # An overwrite keeps the name, so that no step is there twice.
    manager.save(3, tree_of(3), overwrite=True)
    manager.close()
    assert {entry.name for entry in path.glob("step_*")} == {"step_000000000000000003", "step_00000004"}


def test_of_two_names_of_a_step_the_usual_one_counts_and_both_are_deleted(path: pathlib.Path) -> None:
    save_steps(path, 7)
    os.rename(path / "step_00000007", path / "step_7")
    (path / "step_00000007" / "data-0123456789abcdef").mkdir(parents=True)  # never committed
    manager = CheckpointManager(path)
    assert manager.steps() == [7]
    assert_same_tree(manager.restore(7), tree_of(7))

    jaxckpt.save(path / "step_00000007", tree_of(70))
    assert manager.steps() == [7]
    assert_same_tree(manager.restore(), tree_of(70))
    manager.pin(7)
    assert (path / "step_00000007" / "pinned").exists()
    manager.delete(7)
    assert manager.steps() == []
    assert not list(path.glob("step_*"))


FOREIGN = {
    "step_00000005": b"a file with the name of a step",
    "step_5.txt": b"text",
    "step_6/zarr.json": b'{"zarr_format": 3, "node_type": "group", "attributes": {}}',
    "step_6/weights.bin": b"weights",
    "step_7/data-mine/x": b"data",
    "step_8/pinned": b"a note",
    "step_best/data-0123456789abcdef/x": b"no number",
    "step_-1/x": b"no number",
    "data-0123456789abcdef/x": b"not in a step",
    "manifest.msgpack": b"not in a step",
    "step_0000000000000000009/data-0123456789abcdef/x": b"19 digits",
    "xstep_00000001/data-0123456789abcdef/x": b"another prefix",
    "logs/a b": b"",
    "\N{SNOWMAN}": b"",
}


def test_what_others_put_into_the_directory_is_left_alone(path: pathlib.Path) -> None:
    for name, content in FOREIGN.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    (path / "step_link").symlink_to("logs")
    for _ in range(2):
        with CheckpointManager(path, max_to_keep=2) as manager:
            for step in range(20, 25):
                manager.save(step, tree_of(step))
                manager.wait()
            manager.prune()
            assert manager.steps() == [23, 24]
            manager.delete(23)
            assert [str(verdict.step) for verdict in manager.explain()] == ["24"]
    for name, content in FOREIGN.items():
        assert (path / name).read_bytes() == content
    others = {name.partition("/")[0] for name in FOREIGN} | {"step_link"}
    assert {entry.name for entry in path.iterdir()} == others | {name_of(24), "checkpoint.json"}


@pytest.mark.parametrize("name", ["with spaces", "\N{SNOWMAN}%20", "-n", "a'b\"c"])
def test_any_name_of_a_directory_will_do(
    tmp_path: pathlib.Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save_steps(name, 1, 2)  # relative
    assert_holds_exactly(tmp_path / name, [1, 2])
    (tmp_path / "link").symlink_to(name)
    with CheckpointManager("link/../link/", max_to_keep=2) as manager:
        assert manager.resume() is not None
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir("elsewhere")  # the directory stays where it was
        manager.save(3, tree_of(3))
    assert_holds_exactly(tmp_path / name, [2, 3])


def test_a_directory_may_be_copied_and_moved(path: pathlib.Path, tmp_path: pathlib.Path) -> None:
    save_steps(path, 1, 2, 3)
    subprocess.run(["cp", "-r", path, tmp_path / "copy"], check=True, timeout=60)
    subprocess.run(["mv", path, tmp_path / "moved"], check=True, timeout=60)
    for root in (tmp_path / "copy", tmp_path / "moved"):
        assert_holds_exactly(root, [1, 2, 3])
        with CheckpointManager(root, max_to_keep=2) as manager:
            assert manager.resume() is not None
            manager.save(4, tree_of(4))
        assert_holds_exactly(root, [3, 4])
        assert str(tmp_path) not in (root / "checkpoint.json").read_text()


def test_a_directory_that_is_moved_while_it_is_used_is_made_anew(
    path: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    manager = CheckpointManager(path)
    manager.save(1, tree_of(1))
    manager.wait()
    os.rename(path, tmp_path / "moved")
    assert manager.steps() == []
    manager.save(2, tree_of(2))
    manager.close()
    assert_holds_exactly(path, [2])
    assert_holds_exactly(tmp_path / "moved", [1])


def test_steps_that_people_copy_and_delete_are_believed(path: pathlib.Path, tmp_path: pathlib.Path) -> None:
    save_steps(tmp_path / "other", 5, 90)
    manager = CheckpointManager(path, max_to_keep=3)
    for step in (1, 2, 3):
        manager.save(step, tree_of(step))
    manager.wait()
    shutil.rmtree(path / name_of(2))
    shutil.copytree(tmp_path / "other" / name_of(5), path / name_of(5))
    shutil.copytree(tmp_path / "other" / name_of(90), path / "step_090")
    assert manager.steps() == CheckpointManager(path).steps() == [1, 3, 5, 90]
    assert manager.latest_step() == 90
    assert_same_tree(manager.restore(90), tree_of(90))
    assert manager.save(5, tree_of(0)) is None
    manager.save(6, tree_of(6))
    manager.wait()
    # Three are the newest; the fourth was committed last, which is what training goes on from.
    assert manager.steps() == [5, 6, 90]
    shutil.rmtree(path / "step_090")
    manager.save(7, tree_of(7))
    manager.close()
    assert_holds_exactly(path, [5, 6, 7])


# --- checkpoint.json ------------------------------------------------------------------------------------------


def read_json(root: pathlib.Path) -> Any:
    return json.loads((root / "checkpoint.json").read_text(encoding="ascii"))


def test_the_file_for_people_says_what_is_there(path: pathlib.Path) -> None:
    wall_s = Clock(1_700_000_000.25)
    with CheckpointManager(path, wall_s=wall_s, max_to_keep=2) as manager:
        for step in (1, 2, 3):
            manager.save(
                step, tree_of(step), metrics={"a": math.nan, "b": math.inf, "c": -math.inf, "d": step}
            )
            manager.wait()
            wall_s.now_s += 60
    document = read_json(path)
    assert document["latest"] == name_of(3)
    second, third = document["checkpoints"]
    assert [second["step"], third["step"]] == [2, 3]
    assert [second["name"], third["name"]] == [name_of(2), name_of(3)]
    assert third["time_s"] == 1_700_000_120.25
    assert dt.datetime.fromisoformat(third["time"]).timestamp() == 1_700_000_120.25
    assert third["metrics"] == {"a": "nan", "b": "inf", "c": "-inf", "d": 3.0}
    manager.delete(3)
    assert read_json(path)["latest"] == name_of(2)
    manager.delete(2)
    assert read_json(path)["latest"] is None
    assert read_json(path)["checkpoints"] == []


def lose(root: pathlib.Path) -> None:
    (root / "checkpoint.json").unlink()


def cut_off(root: pathlib.Path) -> None:
    os.truncate(root / "checkpoint.json", 100)


def write_garbage(root: pathlib.Path) -> None:
    (root / "checkpoint.json").write_bytes(bytes(range(256)))


def write_other_json(root: pathlib.Path) -> None:
    (root / "checkpoint.json").write_text('[{"checksum": null}]')


def nest_deeply(root: pathlib.Path) -> None:
    (root / "checkpoint.json").write_text("[" * 100_000)


def change_metrics(root: pathlib.Path) -> None:
    text = (root / "checkpoint.json").read_text()
    assert '"loss": 1.0' in text
    (root / "checkpoint.json").write_text(text.replace('"loss": 1.0', '"loss": -1.0'))


def change_times(root: pathlib.Path) -> None:
    document = read_json(root)
    for entry in document["checkpoints"]:
        entry["time_s"] += 1000
    (root / "checkpoint.json").write_text(json.dumps(document))


def invent_a_step(root: pathlib.Path) -> None:
    document = read_json(root)
    document["checkpoints"].append({**document["checkpoints"][0], "step": 1000, "name": name_of(1000)})
    document["latest"] = name_of(1000)
    (root / "checkpoint.json").write_text(json.dumps(document))


def make_it_stale(root: pathlib.Path) -> None:
    """As it was before the best step was saved anew with another loss."""
    old = (root / "checkpoint.json").read_bytes()
    with CheckpointManager(root, max_to_keep=None) as manager:
        manager.save(1, tree_of(1), metrics={"loss": 1.0}, overwrite=True)
    (root / "checkpoint.json").write_bytes(old)


def put_a_directory_there(root: pathlib.Path) -> None:
    lose(root)
    (root / "checkpoint.json").mkdir()


@pytest.mark.parametrize(
    "spoil",
    [
        lose,
        cut_off,
        write_garbage,
        write_other_json,
        nest_deeply,
        change_metrics,
        change_times,
        invent_a_step,
        make_it_stale,
        put_a_directory_there,
    ],
)
def test_the_file_for_people_is_never_believed_and_written_anew(
    path: pathlib.Path, spoil: Callable[[pathlib.Path], None]
) -> None:
    wall_s = Clock(1_700_000_000.0)
    losses = {0: 4.0, 1: 1.0, 2: 2.0, 3: 3.0}
    with CheckpointManager(path, max_to_keep=None, wall_s=wall_s) as manager:
        for step, loss in losses.items():
            wall_s.now_s += 10
            is_spoilt_later = spoil is make_it_stale and step == 1
            manager.save(step, tree_of(step), metrics={"loss": -5.0 if is_spoilt_later else loss})
    spoil(path)
    manager = CheckpointManager(path, max_to_keep=1, best=Best("loss", keep=2), wall_s=wall_s)
    assert manager.steps() == [0, 1, 2, 3]
    assert manager.latest_step() == 3
    assert manager.best_step() == 1
    assert [verdict.step for verdict in manager.explain() if verdict.is_kept and verdict.step < 3] == [1, 2]
    wall_s.now_s = 1_700_001_000.0
    manager.save(4, tree_of(4), metrics={"loss": 5.0})
    manager.close()
    assert manager.steps() == [1, 2, 4]
    if (path / "checkpoint.json").is_dir():
        return
    assert_holds_exactly(path, [1, 2, 4])
    document = read_json(path)
    assert document["latest"] == name_of(4)
    assert [entry["step"] for entry in document["checkpoints"]] == [1, 2, 4]
    assert [entry["metrics"]["loss"] for entry in document["checkpoints"]] == [1.0, 2.0, 5.0]


def test_the_file_for_people_spares_parsing_manifests(path: pathlib.Path) -> None:
    """Seen by what no manifest says, in a file that is as it would be written."""
    save_steps(path, *range(5))
    document = json.loads((path / "checkpoint.json").read_text())
    for entry in document["checkpoints"]:
        entry["metrics"] = {"from": 7.0}
    document["checksum"] = _checksum_of(document["checkpoints"])
    (path / "checkpoint.json").write_text(json.dumps(document))
    records = CheckpointManager(path)._directory.records()
    assert [(record.step, record.metrics) for record in records] == [(n, {"from": 7.0}) for n in range(5)]
    lose(path)
    assert [record.metrics for record in CheckpointManager(path)._directory.records()] == [{}] * 5


# --- object stores --------------------------------------------------------------------------------------------


def test_object_stores_hold_steps_too() -> None:
    url = "memory://test_manager/object_stores"
    events = Events()
    with CheckpointManager(url, max_to_keep=2, keep_period=4, on_event=events) as manager:
        for step in range(1, 8):
            manager.save(step, tree_of(step), metrics={"loss": step}, items={"at": step})
    assert manager.steps() == [4, 6, 7]
    assert events.steps("deleted") == [1, 2, 3, 5]
    reader = CheckpointManager(url, best=Best("loss"))
    resumed = reader.resume()
    assert resumed is not None
    assert_same_tree(resumed, (7, tree_of(7)))
    assert_same_tree(reader.restore(4), tree_of(4))
    assert reader.open(6).items == {"at": 6}
    assert reader.best_step() == 4
    assert reader.save(7, tree_of(7)) is None
    reader.pin(4)
    reader.delete(7)
    with CheckpointManager(url, max_to_keep=1) as manager:
        assert manager.resume() is not None
        manager.save(7, tree_of(7))
        manager.wait()
        assert manager.steps() == [4, 7]
        manager.unpin(4)
        assert manager.prune() == [4]
    assert manager.steps() == [7]
    assert list(manager.watch(timeout_s=0)) == [7]


def test_a_step_that_is_a_link_is_read_and_only_the_link_is_deleted(path: pathlib.Path) -> None:
    """A step of another run, linked into this one to begin from, is not this run's to delete."""
    save_steps(path / "pretrained", 900)
    (path / "run").mkdir()
    (path / "run" / "step_00000001").symlink_to(path / "pretrained" / "step_00000900")
    (path / "run" / "step_00000002").symlink_to(path / "nowhere")
    before = sorted(path.glob("pretrained/**/*"))
    manager = CheckpointManager(path / "run", max_to_keep=1)
    assert manager.resume() is not None
    manager.save(3, tree_of(3))
    manager.close()
    assert sorted(entry.name for entry in (path / "run").glob("step_*")) == ["step_00000002", "step_00000003"]
    assert sorted(path.glob("pretrained/**/*")) == before
    assert_same_tree(CheckpointManager(path / "pretrained").restore(900), tree_of(900))


def test_the_cache_does_not_vouch_for_a_manifest_that_is_damaged_behind_its_head(path: pathlib.Path) -> None:
    save_steps(path, 1, 2, 3)
    manifest = path / "step_00000003" / MANIFEST
    data = bytearray(manifest.read_bytes())
    data[-1] ^= 1
    manifest.write_bytes(data)
    verdicts = CheckpointManager(path, max_to_keep=1).explain()
    assert [verdict.is_kept for verdict in verdicts] == [False, True, True]
    (path / "checkpoint.json").unlink()
    assert CheckpointManager(path, max_to_keep=1).explain() == verdicts
