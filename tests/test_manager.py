"""Which steps a manager saves and which it keeps, and what it deletes and when.

What a manager says when storage fails or what is stored is damaged stands in ``test_manager_truth.py``, what it makes
of names, of foreign files and of ``checkpoint.json`` in ``test_manager_names.py``.
"""

from __future__ import annotations

import math
import os
import pathlib
import shutil
import subprocess
import sys
import threading
import time
import timeit
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxckpt
from jaxckpt import Best, CheckpointEvent, CheckpointManager
from jaxckpt._retention import Retention, steps_to_delete
from jaxckpt._store import LocalStore

from .helpers import ROOT, assert_same_tree
from .storage_faults import NotedKernel, Operation

MANIFEST = "manifest.msgpack"


def tree_of(step: int) -> dict[str, Any]:
    """A tree that differs from step to step."""
    return {"w": jnp.full((4,), step, jnp.float32), "n": step}


def name_of(step: int) -> str:
    return f"step_{step:08d}"


class Clock:
    """A clock that stands still until it is moved."""

    def __init__(self, now_s: float = 0.0) -> None:
        self.now_s = now_s

    def __call__(self) -> float:
        return self.now_s


class Events(list[CheckpointEvent]):
    """An observer that remembers."""

    def __call__(self, event: CheckpointEvent) -> None:
        self.append(event)

    def steps(self, kind: str) -> list[int]:
        return [event.step for event in self if event.kind == kind]


class Storage(NotedKernel):
    """Calls a hook before each call that changes something, and notes what was done and what was told, in order."""

    def __init__(self, hook: Callable[[Operation], None] | None = None) -> None:
        super().__init__()
        self.hook = hook

    def before(self, operation: Operation) -> None:
        if self.hook is not None:
            self.hook(operation)

    def place(self, call: str, path: str | os.PathLike[str]) -> int:
        """When a call was made, as a position in the order of all calls."""
        (place,) = self.places(call, path)
        return place

    def places(self, call: str, path: str | os.PathLike[str]) -> list[int]:
        text = os.fspath(path)
        return [
            place
            for place, done in enumerate(self.done)
            if done.call == call and text == (done.target or done.path)
        ]


def save_steps(root: Any, *steps: int, **arguments: Any) -> None:
    """Saves these steps, one after the other, with a manager of its own that keeps them all."""
    with CheckpointManager(root, max_to_keep=None, **arguments) as manager:
        for step in steps:
            manager.save(step, tree_of(step), force=True)
            manager.wait()


def assert_holds_exactly(root: pathlib.Path, steps: list[int], *others: str) -> None:
    """The directory holds these steps, whole and restorable, and nothing else that nobody put there."""
    names = {name_of(step) for step in steps}
    assert {entry.name for entry in root.iterdir()} == names | {"checkpoint.json", *others}
    for step in steps:
        inside = sorted(entry.name for entry in (root / name_of(step)).iterdir())
        assert inside[1:] == [MANIFEST, "zarr.json"]
        assert inside[0].startswith("data-")
        assert jaxckpt.verify(root / name_of(step)).ok
        assert_same_tree(jaxckpt.restore(root / name_of(step)), tree_of(step))
    assert CheckpointManager(root).steps() == steps


# --- which steps are saved ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rules", "want"),
    [
        ({}, list(range(15))),
        ({"save_interval_steps": 4}, [0, 4, 8, 12]),
        ({"save_interval_s": 5}, [5, 10]),
        ({"save_interval_steps": 7, "save_interval_s": 5}, [0, 5, 7, 12, 14]),
        ({"save_interval_s": 100, "save_first": True}, [0]),
        ({"save_steps": {3, 9}}, [3, 9]),
        ({"save_steps": [3, 9], "save_interval_steps": 7}, [0, 3, 7, 9, 14]),
        ({"save_when": lambda step, metrics: metrics["loss"] < 0.2}, [6, 7, 8, 9, 10, 11, 12, 13, 14]),
        ({"save_when": lambda step, metrics: step == 5, "save_first": True}, [0, 5]),
    ],
    ids=[
        "every",
        "steps",
        "seconds",
        "both",
        "first",
        "given",
        "given and steps",
        "predicate",
        "first and predicate",
    ],
)
def test_what_is_due_is_saved_and_nothing_else(
    path: pathlib.Path, rules: dict[str, Any], want: list[int]
) -> None:
    clock = Clock()
    manager = CheckpointManager(path, monotonic_s=clock, max_to_keep=None, save_last=False, **rules)
    for step in range(15):
        clock.now_s = step
        pending = manager.save(step, tree_of(step), metrics={"loss": 1 / (step + 1) + 0.05})
        assert (pending is not None) == (step in want)
    manager.close()
    assert manager.steps() == want
    for step in want:
        assert_same_tree(manager.restore(step), tree_of(step))


def test_the_last_step_is_saved_at_the_end_and_only_then(path: pathlib.Path) -> None:
    events = Events()
    manager = CheckpointManager(path, save_interval_steps=4, on_event=events)
    for step in range(1, 7):
        manager.save(step, tree_of(step), metrics={"loss": step}, items={"at": step}, metadata=[step])
    manager.wait()
    assert manager.steps() == [4]
    manager.close()
    manager.close()
    assert manager.steps() == events.steps("saved") == [4, 6]
    last = manager.open(6)
    assert (last.metrics, last.items, last.metadata) == ({"loss": 6.0}, {"at": 6}, [6])
    assert_same_tree(manager.restore(), tree_of(6))


def test_without_save_last_the_end_saves_nothing(path: pathlib.Path) -> None:
    with CheckpointManager(path, save_interval_steps=4, save_last=False) as manager:
        for step in range(1, 7):
            manager.save(step, tree_of(step))
        assert manager.save_last() is None
    assert manager.steps() == [4]


def test_a_last_step_that_was_due_is_not_saved_again(path: pathlib.Path) -> None:
    events = Events()
    with CheckpointManager(path, save_interval_steps=4, on_event=events) as manager:
        for step in range(1, 9):
            manager.save(step, tree_of(step))
    assert events.steps("saving") == [4, 8]


def test_a_loop_that_ends_by_an_exception_saves_nothing_more_but_completes_what_it_began(
    path: pathlib.Path,
) -> None:
    manager = CheckpointManager(path, save_interval_steps=4)

    def train() -> None:
        with manager:
            for step in range(1, 7):
                manager.save(step, tree_of(step))
            raise KeyError("the loop")

    with pytest.raises(KeyError, match="the loop"):
        train()
    assert manager.steps() == [4]
    with pytest.raises(ValueError, match="is closed"):
        manager.save(8, tree_of(8))


def test_a_last_step_whose_arrays_were_donated_is_not_saved(
    path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    tree = {"w": jnp.ones(8)}
    with CheckpointManager(path, save_interval_steps=4) as manager:
        manager.save(4, tree)
        manager.save(5, tree)
        tree["w"].delete()
    assert manager.steps() == [4]
    assert "step 5, the last one, is not saved: its arrays were donated" in caplog.text


def test_a_tree_may_be_donated_when_save_returns(path: pathlib.Path) -> None:
    advance = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf + 1, tree), donate_argnums=0)
    tree = {"w": jnp.zeros(1000)}
    with CheckpointManager(path, max_to_keep=None) as manager:
        for step in range(1, 6):
            tree = advance(tree)
            manager.save(step, tree)
    for step in range(1, 6):
        assert_same_tree(manager.restore(step), {"w": jnp.full(1000, step, jnp.float32)})


@pytest.mark.parametrize("force", [False, True])
def test_a_step_is_saved_once(path: pathlib.Path, *, force: bool) -> None:
    events = Events()
    manager = CheckpointManager(path, on_event=events)
    assert manager.save(3, tree_of(3), force=force) is not None
    assert manager.save(3, tree_of(4), force=force) is None  # in flight
    manager.wait()
    assert manager.save(3, tree_of(4), force=force) is None
    manager.close()

    resumed = CheckpointManager(path, on_event=events)
    assert resumed.resume() is not None
    assert resumed.save(3, tree_of(4), force=force) is None
    resumed.close()

    for newcomer in (
        CheckpointManager(path, on_event=events),
        CheckpointManager(path, on_event=events, width=3),
    ):
        assert newcomer.save(3, tree_of(4), force=True) is None  # it did not resume
        newcomer.close()
    assert events.steps("saved") == [3]
    assert events.steps("skipped") == [3, 3]
    assert_holds_exactly(path, [3])


def test_a_forced_save_and_an_overwrite_are_what_they_say(path: pathlib.Path) -> None:
    with CheckpointManager(path, save_interval_steps=100) as manager:
        assert manager.save(7, tree_of(0), force=True) is not None
        assert manager.save(7, tree_of(1), force=True, overwrite=True) is not None
    assert_same_tree(manager.restore(7), tree_of(1))
    with CheckpointManager(path, save_interval_steps=100) as manager:
        assert manager.save(7, tree_of(7), force=True, overwrite=True) is not None
    assert_holds_exactly(path, [7])


def test_a_step_that_was_saved_or_resumed_from_last_is_replaced_by_an_overwrite(path: pathlib.Path) -> None:
    with CheckpointManager(path, save_interval_steps=10) as manager:
        assert manager.save(10, tree_of(0), overwrite=True) is not None
        assert manager.save(10, tree_of(1)) is None
        assert manager.save(10, tree_of(2), overwrite=True) is not None
        assert manager.save(11, tree_of(11), overwrite=True) is None
    with CheckpointManager(path, save_interval_steps=10, save_last=False) as manager:
        assert_same_tree(manager.resume(), (11, tree_of(11)))
        assert manager.save(11, tree_of(3)) is None
        assert manager.save(11, tree_of(4), overwrite=True) is not None
        assert manager.save(12, tree_of(12), overwrite=True) is None
        manager.wait()
        assert_same_tree(manager.restore(11), tree_of(4))
    with CheckpointManager(path, save_interval_steps=10) as manager:
        assert manager.save(10, tree_of(5)) is None  # it is there, says a warning, and to pass overwrite=True
        assert manager.save(10, tree_of(10), overwrite=True) is not None
        assert manager.save(11, tree_of(11), force=True, overwrite=True) is not None
    assert_holds_exactly(path, [10, 11])


def test_nothing_is_made_before_the_first_save(path: pathlib.Path) -> None:
    with CheckpointManager(path, save_interval_steps=10, save_last=False) as manager:
        assert manager.save(1, tree_of(1)) is None
        assert manager.steps() == []
        assert manager.latest_step() is manager.resume() is None
        assert manager.explain() == manager.prune() == []
    assert not path.exists()


@pytest.mark.parametrize("step", [-1, 10**18, True, 1.0, "3", None])
def test_what_is_no_number_of_a_step_is_refused(path: pathlib.Path, step: Any) -> None:
    with CheckpointManager(path) as manager, pytest.raises((TypeError, ValueError), match="step must be"):
        manager.save(step, tree_of(0))
    assert not path.exists()


@pytest.mark.parametrize("step", [-1, 10**18, True, 1.0, "3"])
@pytest.mark.parametrize("call", ["restore", "open", "path_of", "metrics", "delete", "pin", "unpin"])
def test_what_is_no_number_of_a_step_is_none_anywhere(path: pathlib.Path, call: str, step: Any) -> None:
    with CheckpointManager(path) as manager:
        manager.save(1, tree_of(1))
    with pytest.raises((TypeError, ValueError), match="step must be"):
        getattr(manager, call)(step)
    assert_holds_exactly(path, [1])


def test_numbers_of_numpy_and_jax_are_steps(path: pathlib.Path) -> None:
    with CheckpointManager(path) as manager:
        manager.save(np.int64(3), tree_of(3))  # type: ignore[arg-type]
        manager.save(jnp.int32(4), tree_of(4))  # type: ignore[arg-type]
    assert_holds_exactly(path, [3, 4])


@pytest.mark.parametrize("with_preemption", [False, True])
def test_a_call_that_is_not_due_is_cheap(path: pathlib.Path, *, with_preemption: bool) -> None:
    tree = {f"layer_{number}": jnp.zeros(1) for number in range(1000)}
    preemption = jaxckpt.Preemption() if with_preemption else None
    rules: dict[str, Any] = {"save_interval_steps": 10**9, "save_interval_s": 1e9, "max_overhead": 0.01}
    with CheckpointManager(path, save_last=False, preemption=preemption, **rules) as manager:
        manager.save(1, tree)
        step = iter(range(2, 10**6))
        times_s = timeit.repeat(
            lambda: manager.save(next(step), tree, metrics={"loss": 1.0}), number=1000, repeat=20
        )
    assert min(times_s) / 1000 < 20e-6


# --- which steps stay -----------------------------------------------------------------------------------------

POLICIES: dict[str, dict[str, Any]] = {
    "one": {"max_to_keep": 1},
    "three": {"max_to_keep": 3},
    "all": {"max_to_keep": None},
    "period": {"max_to_keep": 2, "keep_period": 5},
    "interval": {"max_to_keep": 1, "keep_interval_s": 250.0},
    "best": {"max_to_keep": 1, "best": [Best("loss"), Best("accuracy", mode="max", keep=2)]},
    "expiry": {"max_to_keep": 4, "time_to_live_s": 150.0},
    "pinned": {"max_to_keep": 1, "pinned": (0, 3, 1000)},
    "several": {
        "max_to_keep": 2,
        "keep_period": 6,
        "keep_interval_s": 350.0,
        "best": Best("loss"),
        "pinned": [1],
    },
}


def policy_of(rules: dict[str, Any]) -> Retention:
    best = rules.get("best", ())
    return Retention(
        **{
            **rules,
            "best": (best,) if isinstance(best, Best) else tuple(best),
            "pinned": frozenset(rules.get("pinned", ())),
        }
    )


def put_crash_leftovers(root: pathlib.Path, step: int) -> None:
    """What a save leaves that was killed before its commit, and one that was killed right after an overwrite."""
    (root / name_of(step) / "data-0123456789abcdef" / "packs").mkdir(parents=True)
    (root / name_of(step) / "data-0123456789abcdef" / "packs" / "0-0").write_bytes(b"half")
    (root / name_of(step) / "manifest.msgpack.tmp-0123456789abcdef").write_bytes(b"half")
    newest = max(root.glob(f"step_*/{MANIFEST}")).parent
    (newest / "data-fedcba9876543210").mkdir()
    (newest / "data-fedcba9876543210" / "old").write_bytes(b"old")
    (root / "checkpoint.json.tmp-0123456789abcdef").write_bytes(b"{")


@pytest.mark.slow
@pytest.mark.parametrize("rules", POLICIES.values(), ids=POLICIES)
@pytest.mark.parametrize("restart_every", [1, 4, 100])
def test_the_survivors_are_those_of_the_pure_function_over_restarts_and_crashes(
    path: pathlib.Path, rules: dict[str, Any], restart_every: int
) -> None:
    policy = policy_of(rules)
    wall_s = Clock(1e9)
    losses = [5.0, 3.0, math.nan, 4.0, 1.0, 9.0, 1.0, math.inf, 6.0, 2.0, -math.inf, 8.0]
    alive: dict[int, tuple[float, dict[str, float]]] = {}
    manager = CheckpointManager(path, wall_s=wall_s, **rules)
    for step, loss in enumerate(losses):
        if step and step % restart_every == 0:
            manager.close()
            put_crash_leftovers(path, step + 1)
            manager = CheckpointManager(path, wall_s=wall_s, **rules)
            assert [verdict.step for verdict in manager.explain() if verdict.is_kept] == sorted(alive)
            resumed = manager.resume()
            assert resumed is not None
            assert resumed[0] == step - 1
        wall_s.now_s += 100 + 10 * (step % 3)
        metrics = {"loss": loss, "accuracy": float(step % 4)} if step != 8 else {}
        manager.save(step, tree_of(step), metrics=metrics)
        manager.wait()
        alive[step] = wall_s.now_s, metrics
        times_s, all_metrics = zip(*alive.values(), strict=True)
        for gone in steps_to_delete(list(alive), times_s, all_metrics, policy, wall_s.now_s):
            del alive[gone]
        assert manager.steps() == sorted(alive)
    manager.close()
    assert_holds_exactly(path, sorted(alive))


def test_pins_survive_restarts_copies_and_overwrites(path: pathlib.Path, tmp_path: pathlib.Path) -> None:
    save_steps(path, 1, 2, 3)
    CheckpointManager(path).pin(2)
    shutil.copytree(path, tmp_path / "copy")
    for root in (path, tmp_path / "copy"):
        with CheckpointManager(root, max_to_keep=1) as manager:
            manager.save(4, tree_of(4))
        assert manager.steps() == [2, 4]
        with CheckpointManager(root, max_to_keep=1) as manager:
            manager.save(2, tree_of(2), overwrite=True)
            manager.save(5, tree_of(5))
        assert manager.steps() == [2, 5]
        assert manager.explain()[0].reasons == ("pinned",)
        with CheckpointManager(root, max_to_keep=1) as manager:
            manager.unpin(2)
            manager.unpin(2)
            assert manager.steps() == [2, 5]
            assert manager.prune() == [2]
        assert_holds_exactly(root, [5])
    with pytest.raises(jaxckpt.NotFoundError, match="there is no step 9"):
        manager.pin(9)


def test_what_is_explained_is_what_is_pruned(path: pathlib.Path) -> None:
    save_steps(path, *range(8))
    manager = CheckpointManager(path, max_to_keep=2, keep_period=3, pinned=[1])
    before = sorted(path.rglob("*"))
    verdicts = manager.explain()
    assert sorted(path.rglob("*")) == before
    assert [verdict.step for verdict in verdicts] == list(range(8))
    assert all(verdict.reasons for verdict in verdicts)
    doomed = [verdict.step for verdict in verdicts if not verdict.is_kept]
    assert doomed == [2, 4, 5]
    assert manager.prune() == doomed
    assert manager.prune() == []
    assert_holds_exactly(path, [0, 1, 3, 6, 7])


def test_metrics_are_kept_and_the_best_step_is_found(path: pathlib.Path) -> None:
    values = [jnp.float32(3), np.float64(1), 2, float("nan"), True]
    with CheckpointManager(path, best=Best("loss", keep=5)) as manager:
        for step, value in enumerate(values):
            manager.save(step, tree_of(step), metrics={"loss": value, "step": step})
        manager.save(5, tree_of(5))
    assert [manager.metrics(step) for step in (0, 1, 2, 4, 5)] == [
        {"loss": 3.0, "step": 0.0},
        {"loss": 1.0, "step": 1.0},
        {"loss": 2.0, "step": 2.0},
        {"loss": 1.0, "step": 4.0},
        {},
    ]
    assert math.isnan(manager.metrics(3)["loss"])
    reader = CheckpointManager(path)
    assert manager.best_step() == reader.best_step(Best("loss")) == 4  # of equal ones the newer
    assert reader.best_step(Best("loss", mode="max")) == 0
    assert reader.best_step(Best("nothing")) is None
    with pytest.raises(ValueError, match="no rule for the best step"):
        reader.best_step()
    with pytest.raises(TypeError, match="metrics= must be numbers by name"):
        CheckpointManager(path).save(9, tree_of(9), metrics={"loss": "low"})


def test_going_back_to_an_older_step_deletes_nothing_that_was_just_saved(path: pathlib.Path) -> None:
    save_steps(path, 10, 20, 30)
    for wall_s in (time.time, Clock(1e9)):  # the other one's clock may have been ahead
        with CheckpointManager(path, max_to_keep=2, wall_s=wall_s) as manager:
            assert_same_tree(manager.restore(10), tree_of(10))
            assert manager.save(10, tree_of(10)) is None
            manager.pin(10)
            manager.save(11, tree_of(11))
        assert manager.steps() == [10, 11, 20, 30]
        manager.delete(11)


# --- deletion -------------------------------------------------------------------------------------------------


def test_an_older_step_goes_after_the_newer_one_is_durable_and_its_marker_goes_first(
    path: pathlib.Path,
) -> None:
    storage = Storage()
    with CheckpointManager(LocalStore(str(path), kernel=storage), max_to_keep=1) as manager:
        for step in range(4):
            manager.save(step, tree_of(step))
    assert_holds_exactly(path, [3])
    for step in range(3):
        old, new = path / name_of(step), path / name_of(step + 1)
        commit = storage.place("rename", new / MANIFEST)
        durable = min(place for place in storage.places("fsync", new) if place > commit)
        marker = storage.place("unlink", old / MANIFEST)
        assert durable < marker
        marker_is_gone = min(place for place in storage.places("fsync", old) if place > marker)
        rest = [
            place
            for place, done in enumerate(storage.done)
            if done.call in ("unlink", "rmdir") and done.path.startswith(str(old)) and place != marker
        ]
        assert len(rest) >= 3
        assert min(rest) > marker_is_gone


def test_a_late_deletion_waits_until_the_next_save_is_durable(path: pathlib.Path) -> None:
    """What follows step 1 comes so late that step 2 has its name already, but not durably."""
    is_renamed, may_sync = threading.Event(), threading.Event()

    def hook(operation: Operation) -> None:
        if operation.path == str(path / name_of(2)) and storage.commits == 3:
            is_renamed.set()
            assert may_sync.wait(60)

    storage = Storage(hook)
    manager = CheckpointManager(LocalStore(str(path), kernel=storage), max_to_keep=1)
    manager.save(0, tree_of(0))
    manager.wait()
    with manager._keeper.tidy_lock:
        first = manager.save(1, tree_of(1))
        assert first is not None
        first.wait(60)
        manager.save(2, tree_of(2))
        assert is_renamed.wait(60)
    try:
        first.wait_until_idle()
        assert manager.steps() == [1, 2]
        assert storage.places("unlink", path / name_of(0) / MANIFEST)
        assert not storage.places("unlink", path / name_of(1) / MANIFEST)
    finally:
        may_sync.set()
    manager.close()
    assert_holds_exactly(path, [2])


def test_what_this_process_reads_is_deleted_when_it_is_read_no_more(path: pathlib.Path) -> None:
    events = Events()
    manager = CheckpointManager(path, max_to_keep=1, on_event=events)
    manager.save(1, tree_of(1))
    manager.wait()
    opened = manager.open()
    elsewhere = jaxckpt.open(path / name_of(1))
    for step in (2, 3):
        manager.save(step, tree_of(step))
        manager.wait()
        assert manager.steps() == [1, step]
        assert elsewhere["w"][...].tolist() == [1.0] * 4
    assert events.steps("in use") == [1, 1]
    with pytest.raises(jaxckpt.CheckpointError, match=r"step 1 of .* is being read"):
        manager.delete(1)
    del opened
    manager.save(4, tree_of(4))
    manager.wait()
    assert manager.steps() == [1, 4]
    del elsewhere
    manager.save(5, tree_of(5))
    manager.close()
    assert_holds_exactly(path, [5])


class _WaitingState:
    """An item that takes its state when the test lets it: the restore is under way until then."""

    def __init__(self) -> None:
        self.is_restoring = threading.Event()
        self.may_go_on = threading.Event()

    def set_state(self, state: Any) -> None:
        self.is_restoring.set()
        assert self.may_go_on.wait(60)

    def get_state(self) -> int:
        return 1


def test_a_restore_under_way_keeps_its_step(path: pathlib.Path) -> None:
    manager = CheckpointManager(path, max_to_keep=1)
    item = _WaitingState()
    manager.save(1, tree_of(1), items={"item": item})
    manager.wait()
    results: list[Any] = []
    reader = CheckpointManager(path)
    thread = threading.Thread(target=lambda: results.append(reader.restore(items={"item": item})))
    thread.start()
    assert item.is_restoring.wait(60)
    manager.save(2, tree_of(2))
    manager.wait()
    assert manager.steps() == [1, 2]
    item.may_go_on.set()
    thread.join(60)
    assert_same_tree(results, [tree_of(1)])
    assert manager.prune() == [1]
    manager.close()


READER = """
import sys
import jaxckpt
checkpoint = jaxckpt.CheckpointManager(sys.argv[1]).open(1)
print("open", flush=True)
sys.stdin.read()
assert checkpoint["w"][...].tolist() == [1.0] * 4
"""


@pytest.mark.slow
def test_what_another_process_reads_is_deleted_after_its_end(path: pathlib.Path) -> None:
    manager = CheckpointManager(path, max_to_keep=1)
    manager.save(1, tree_of(1))
    manager.wait()
    command = [sys.executable, "-c", READER, str(path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    reader = subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    watchdog = threading.Timer(60, reader.kill)
    watchdog.start()
    try:
        assert reader.stdout is not None
        assert reader.stdout.readline() == "open\n"
        manager.save(2, tree_of(2))
        manager.wait()
        assert manager.steps() == [1, 2]
        with pytest.raises(jaxckpt.CheckpointError, match="is being read"):
            manager.delete(1)
        _, complaint = reader.communicate(timeout=60)
    finally:
        watchdog.cancel()
        reader.kill()
        reader.wait()
    assert reader.returncode == 0, complaint
    manager.save(3, tree_of(3))
    manager.close()
    assert_holds_exactly(path, [3])


def test_a_step_that_is_pinned_while_others_are_deleted_stays_or_is_not_there(path: pathlib.Path) -> None:
    save_steps(path, 1, 2)
    threads = []
    outcomes = []

    def pin() -> None:
        try:
            manager.pin(2)
            outcomes.append("pinned")
        except jaxckpt.NotFoundError:
            outcomes.append("not there")

    def observe(event: CheckpointEvent) -> None:
        if event.kind == "deleted" and event.step == 1:  # step 2 is judged, and the next to go
            threads.append(threading.Thread(target=pin))
            threads[0].start()
            threads[0].join(0.5)  # it has to wait; without that it is over long before

    manager = CheckpointManager(path, max_to_keep=1, on_event=observe)
    manager.save(3, tree_of(3))
    manager.close()
    threads[0].join(60)
    assert (outcomes, manager.steps()) in [(["pinned"], [2, 3]), (["not there"], [3])]
    assert sorted(entry.name for entry in path.iterdir())[1:] == [name_of(step) for step in manager.steps()]


def test_delete_deletes_whatever_the_rules_say(path: pathlib.Path) -> None:
    events = Events()
    manager = CheckpointManager(path, max_to_keep=None, pinned=[1], on_event=events)
    for step in range(3):
        manager.save(step, tree_of(step))
    manager.wait()
    manager.delete(1)
    assert_holds_exactly(path, [0, 2])
    manager.delete(2)
    assert manager.latest_step() == 0
    assert events.steps("deleted") == [1, 2]
    with pytest.raises(jaxckpt.NotFoundError, match=r"there is no step 2 in .*: it has 0"):
        manager.delete(2)
    assert manager.save(2, tree_of(2), force=True) is not None
    manager.close()
    assert_holds_exactly(path, [0, 2])
