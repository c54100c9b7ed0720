"""Does an evaluator get each new step, whole, while another process trains and deletes?

The trainer is either a manager in this process or a program of its own, which runs ahead of its reader or waits for it,
as the test tells it through a pipe. Nothing here waits for a time to pass: whatever is waited for is looked for again
and again, with a deadline.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import pathlib
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest

import jaxckpt
from jaxckpt._storage import Hold, Store

from .helpers import ROOT, assert_same_tree
from .test_commit import WatchedStore

SIZE = 50_000
POLL_S = 0.01
# A look at the directory takes milliseconds; what does not come within this does not come.
DEADLINE_S = 60


def tree_of(step: int) -> dict[str, np.ndarray]:
    return {"w": np.full(SIZE, step), "v": np.arange(SIZE) + step}


def assert_is_step(manager: jaxckpt.CheckpointManager, step: int) -> None:
    tree = manager.restore(step)
    assert (np.asarray(tree["w"]) == step).all()
    assert (np.asarray(tree["v"]) == np.arange(SIZE) + step).all()


def save(manager: jaxckpt.CheckpointManager, step: int, *, overwrite: bool = False) -> None:
    """Saves a step and waits until all that follows from it is done."""
    pending = manager.save(step, tree_of(step), force=True, overwrite=overwrite)
    assert pending is not None
    manager.wait()


def look_until(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(POLL_S)


def open_descriptors() -> set[str]:
    return {
        os.readlink(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd") if _is_open(number)
    }


def _is_open(number: str) -> bool:
    return os.path.islink(f"/proc/self/fd/{number}")


class Clock:
    """Seconds that pass only when the test says so, or by a fixed amount at each look."""

    def __init__(self, per_look_s: float = 0.0) -> None:
        self.now_s = 1000.0
        self.looks = 0
        self._per_look_s = per_look_s

    def __call__(self) -> float:
        self.looks += 1
        self.now_s += self._per_look_s
        return self.now_s


@pytest.fixture
def trainer(tmp_path: pathlib.Path) -> jaxckpt.CheckpointManager:
    return jaxckpt.CheckpointManager(tmp_path / "run", max_to_keep=1)


@pytest.fixture
def evaluator(tmp_path: pathlib.Path) -> jaxckpt.CheckpointManager:
    return jaxckpt.CheckpointManager(tmp_path / "run")


# --- which steps ----------------------------------------------------------------------------------------------


def test_the_newest_step_comes_first_and_then_each_new_one(tmp_path: pathlib.Path) -> None:
    trainer = jaxckpt.CheckpointManager(tmp_path, max_to_keep=None)
    for step in (1, 2, 3):
        save(trainer, step)
    seen = []
    for step in jaxckpt.CheckpointManager(tmp_path).watch(timeout_s=DEADLINE_S, poll_s=POLL_S):
        seen.append(step)
        assert_is_step(trainer, step)
        if step == 3:
            save(trainer, 4)
            save(trainer, 5)
        if step == 5:
            break
    assert seen == [3, 4, 5]


def test_one_manager_can_save_and_watch(trainer: jaxckpt.CheckpointManager) -> None:
    save(trainer, 1)
    watched = trainer.watch(timeout_s=DEADLINE_S, poll_s=POLL_S)
    assert next(watched) == 1
    save(trainer, 2)
    assert trainer.steps() == [1, 2]  # 1 is held
    assert next(watched) == 2
    save(trainer, 3)
    assert trainer.steps() == [2, 3]
    watched.close()  # type: ignore[attr-defined]
    assert trainer.prune() == [2]


def test_after_begins_above_a_step_and_never_yields_one_below(tmp_path: pathlib.Path) -> None:
    trainer = jaxckpt.CheckpointManager(tmp_path, max_to_keep=None)
    for step in (1, 2, 3, 4):
        save(trainer, step)
    watched = trainer.watch(after=2, timeout_s=0, poll_s=POLL_S)
    assert list(watched) == [3, 4]
    watched = trainer.watch(after=4, timeout_s=DEADLINE_S, poll_s=POLL_S)
    trainer.delete(2)
    thread = threading.Thread(target=lambda: [save(trainer, step) for step in (2, 5)])
    thread.start()
    assert next(watched) == 5
    thread.join(DEADLINE_S)
    assert list(trainer.watch(after=99, timeout_s=0)) == []


def test_a_step_that_is_not_committed_does_not_come(tmp_path: pathlib.Path) -> None:
    save(jaxckpt.CheckpointManager(tmp_path), 1)
    (tmp_path / "step_00000002" / "data-0123456789abcdef").mkdir(parents=True)
    (tmp_path / "step_00000003").write_text("not a directory")
    (tmp_path / "other_00000004").mkdir()
    assert list(jaxckpt.CheckpointManager(tmp_path).watch(timeout_s=0)) == [1]


def test_steps_that_vanish_before_their_turn_are_passed_over(tmp_path: pathlib.Path) -> None:
    trainer = jaxckpt.CheckpointManager(tmp_path, max_to_keep=None)
    save(trainer, 1)
    seen = []
    for step in jaxckpt.CheckpointManager(tmp_path).watch(timeout_s=DEADLINE_S, poll_s=POLL_S):
        seen.append(step)
        assert_is_step(trainer, step)
        if step == 1:
            for later in (2, 3, 4, 5):
                save(trainer, later)
        if step == 2:  # 3 to 5 have been listed by now
            trainer.delete(3)
            trainer.delete(5)
            save(trainer, 6)
        if step == 6:
            break
    assert seen == [1, 2, 4, 6]


def test_a_step_that_is_deleted_and_saved_anew_comes_again(tmp_path: pathlib.Path) -> None:
    trainer = jaxckpt.CheckpointManager(tmp_path)
    save(trainer, 1)
    watched = jaxckpt.CheckpointManager(tmp_path).watch(timeout_s=DEADLINE_S, poll_s=POLL_S)
    assert next(watched) == 1

    def replace() -> None:
        # The evaluator holds the step until it asks for the next one.
        look_until(lambda: _can_delete(trainer, 1))
        save(trainer, 1)

    thread = threading.Thread(target=replace)
    thread.start()
    assert next(watched) == 1
    thread.join(DEADLINE_S)
    assert_is_step(trainer, 1)


def _can_delete(manager: jaxckpt.CheckpointManager, step: int) -> bool:
    try:
        manager.delete(step)
    except jaxckpt.CheckpointError:  # it is being read
        return False
    return True


def test_a_step_that_is_overwritten_comes_again(tmp_path: pathlib.Path) -> None:
    trainer = jaxckpt.CheckpointManager(tmp_path)
    save(trainer, 1)
    watched = jaxckpt.CheckpointManager(tmp_path).watch(timeout_s=DEADLINE_S, poll_s=POLL_S)
    assert next(watched) == 1
    save(trainer, 1, overwrite=True)
    assert next(watched) == 1
    assert_is_step(trainer, 1)


def test_the_directory_may_come_later(tmp_path: pathlib.Path) -> None:
    directory = tmp_path / "not" / "yet"
    assert list(jaxckpt.CheckpointManager(directory).watch(timeout_s=0)) == []
    assert not directory.exists()
    watched = jaxckpt.CheckpointManager(directory).watch(timeout_s=DEADLINE_S, poll_s=POLL_S)
    trainer = jaxckpt.CheckpointManager(directory)
    thread = threading.Thread(target=lambda: save(trainer, 1))
    thread.start()
    assert next(watched) == 1
    thread.join(DEADLINE_S)


def test_the_directory_may_go_and_come_back(tmp_path: pathlib.Path) -> None:
    trainer = jaxckpt.CheckpointManager(tmp_path / "run")
    save(trainer, 1)
    watched = jaxckpt.CheckpointManager(tmp_path / "run").watch(timeout_s=DEADLINE_S, poll_s=POLL_S)
    assert next(watched) == 1
    (tmp_path / "run").rename(tmp_path / "elsewhere")
    again = jaxckpt.CheckpointManager(tmp_path / "run")
    thread = threading.Thread(target=lambda: save(again, 2))
    thread.start()
    assert next(watched) == 2
    thread.join(DEADLINE_S)


# --- time -----------------------------------------------------------------------------------------------------


def test_without_new_steps_it_ends_after_the_timeout(tmp_path: pathlib.Path) -> None:
    clock = Clock(per_look_s=1.0)
    manager = jaxckpt.CheckpointManager(tmp_path, monotonic_s=clock)
    began_s = clock.now_s
    # A pause is cut to what is left, so that the clock alone decides.
    assert list(manager.watch(timeout_s=10, poll_s=POLL_S)) == []
    assert 10 <= clock.now_s - began_s <= 12


def test_a_timeout_of_zero_looks_once_and_does_not_pause(tmp_path: pathlib.Path) -> None:
    trainer = jaxckpt.CheckpointManager(tmp_path)
    save(trainer, 1)
    began_s = time.monotonic()
    assert list(jaxckpt.CheckpointManager(tmp_path).watch(timeout_s=0, poll_s=600)) == [1]
    assert time.monotonic() - began_s < 60


def test_the_time_that_the_loops_body_takes_does_not_count(tmp_path: pathlib.Path) -> None:
    trainer = jaxckpt.CheckpointManager(tmp_path, max_to_keep=None)
    clock = Clock()
    evaluator = jaxckpt.CheckpointManager(tmp_path, monotonic_s=clock)
    save(trainer, 1)
    seen = []
    watched = evaluator.watch(timeout_s=5, poll_s=POLL_S)
    clock.now_s += 1000  # nobody has asked for anything yet
    for step in watched:
        seen.append(step)
        clock.now_s += 1000
        if step < 3:
            save(trainer, step + 1)
        else:
            break
    assert seen == [1, 2, 3]


def test_each_new_step_begins_the_timeout_anew(tmp_path: pathlib.Path) -> None:
    trainer = jaxckpt.CheckpointManager(tmp_path, max_to_keep=None)
    steps = itertools.count(2)

    class SavingClock(Clock):
        """Seconds pass with each look; after some of them there is a new step."""

        def __call__(self) -> float:
            now_s = super().__call__()
            if self.looks % 4 == 0 and self.looks <= 20:
                save(trainer, next(steps))
            return now_s

    save(trainer, 1)
    clock = SavingClock(per_look_s=2.0)
    evaluator = jaxckpt.CheckpointManager(tmp_path, monotonic_s=clock)
    began_s = clock.now_s
    assert list(evaluator.watch(timeout_s=15, poll_s=0)) == [1, 2, 3, 4, 5, 6]
    assert clock.now_s - began_s > 2 * 15


def test_without_a_timeout_it_waits(tmp_path: pathlib.Path) -> None:
    trainer = jaxckpt.CheckpointManager(tmp_path)
    clock = Clock(per_look_s=1e6)
    watched = jaxckpt.CheckpointManager(tmp_path, monotonic_s=clock).watch(poll_s=POLL_S)
    got: list[int] = []
    thread = threading.Thread(target=lambda: got.append(next(watched)))
    thread.start()
    save(trainer, 1)
    thread.join(DEADLINE_S)
    assert got == [1]


# --- holding --------------------------------------------------------------------------------------------------


def test_what_is_yielded_is_not_deleted_until_the_next_is_asked_for(
    trainer: jaxckpt.CheckpointManager, evaluator: jaxckpt.CheckpointManager
) -> None:
    save(trainer, 1)
    watched = evaluator.watch(timeout_s=DEADLINE_S, poll_s=POLL_S)
    assert next(watched) == 1
    for step in (2, 3, 4):
        save(trainer, step)
    assert trainer.steps() == [1, 4]
    assert_is_step(evaluator, 1)
    assert next(watched) == 4
    save(trainer, 5)  # 1 is let go of, 4 is held
    assert trainer.steps() == [4, 5]
    assert_is_step(evaluator, 4)


@pytest.mark.parametrize("way", ["close", "forget", "break", "raise"])
def test_a_watch_that_ends_early_holds_nothing(
    trainer: jaxckpt.CheckpointManager, evaluator: jaxckpt.CheckpointManager, way: str
) -> None:
    save(trainer, 1)
    before = open_descriptors()
    watched = evaluator.watch(timeout_s=DEADLINE_S, poll_s=POLL_S)
    if way in ("close", "forget"):
        assert next(watched) == 1
        assert any("step_00000001" in name for name in open_descriptors() - before)
        if way == "close":
            watched.close()  # type: ignore[attr-defined]
    elif way == "break":
        for _ in watched:
            break
    else:
        with contextlib.suppress(LookupError):
            for _ in watched:
                raise LookupError
    del watched
    assert open_descriptors() <= before
    save(trainer, 2)
    assert trainer.steps() == [2]


def test_many_steps_leave_no_file_open(tmp_path: pathlib.Path) -> None:
    trainer = jaxckpt.CheckpointManager(tmp_path, max_to_keep=None)
    before = open_descriptors()
    for step in range(20):
        save(trainer, step)
    assert len(list(jaxckpt.CheckpointManager(tmp_path).watch(after=-1, timeout_s=0))) == 20
    assert open_descriptors() <= before


def test_two_evaluators_may_hold_one_step(tmp_path: pathlib.Path) -> None:
    trainer = jaxckpt.CheckpointManager(tmp_path, max_to_keep=1)
    save(trainer, 1)
    watches = [jaxckpt.CheckpointManager(tmp_path).watch(timeout_s=0) for _ in range(2)]
    assert [next(watched) for watched in watches] == [1, 1]
    save(trainer, 2)
    watches.pop().close()  # type: ignore[attr-defined]
    assert trainer.prune() == []
    watches.pop().close()  # type: ignore[attr-defined]
    assert trainer.prune() == [1]


# --- readers beside a quick trainer ---------------------------------------------------------------------------


class HookedStore(WatchedStore):
    """A directory of which a test hears after each listing and before each opening of a manifest."""

    def names(self) -> list[str]:
        found = super().names()
        self._tell("listed", "")
        return found

    def read_and_hold(self, name: str, bytes_max: int) -> tuple[bytes, Hold | None]:
        self._tell("open", name)
        return super().read_and_hold(name, bytes_max)

    def child(self, name: str) -> Store:
        return HookedStore(os.path.join(self.path, name), self._tell)


def reader_that_is_late(
    path: pathlib.Path, when: str
) -> tuple[jaxckpt.CheckpointManager, jaxckpt.CheckpointManager]:
    """A trainer that keeps one step, and a reader for which it saves two more at two such moments."""
    trainer = jaxckpt.CheckpointManager(path, max_to_keep=1)
    save(trainer, 1)
    left = [3, 2]

    def tell(what: str, _name: str) -> None:
        if what == when and left:
            save(trainer, left.pop())

    return trainer, jaxckpt.CheckpointManager(HookedStore(path, tell))  # type: ignore[arg-type]


@pytest.mark.parametrize("when", ["listed", "open"])
def test_a_reader_finds_the_newest_step_while_all_that_it_listed_are_deleted(
    tmp_path: pathlib.Path, when: str
) -> None:
    trainer, reader = reader_that_is_late(tmp_path / "restore", when)
    tree = reader.restore()
    assert trainer.steps() == [3]
    assert_same_tree(tree, trainer.restore(3))

    trainer, reader = reader_that_is_late(tmp_path / "open", when)
    assert reader.open().path == trainer.path_of(3)

    _, reader = reader_that_is_late(tmp_path / "latest", "listed")
    assert reader.latest_step() == 3


# --- another process ------------------------------------------------------------------------------------------

TRAINER = """
    import sys
    import numpy as np
    import jaxckpt

    directory, steps, size = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    with jaxckpt.CheckpointManager(directory, max_to_keep=1) as manager:
        for step in range(1, steps + 1):
            if step == steps:
                manager.wait()
                print("almost done", flush=True)
                sys.stdin.readline()
            manager.save(step, {"w": np.full(size, step), "v": np.arange(size) + step})
"""


@contextlib.contextmanager
def training(directory: pathlib.Path, steps: int) -> Iterator[subprocess.Popen[str]]:
    environment = dict(os.environ, JAX_PLATFORMS="cpu", PYTHONPATH=str(ROOT))
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(TRAINER), str(directory), str(steps), str(SIZE)],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    timer = threading.Timer(120, process.kill)
    timer.start()
    try:
        with process:
            try:
                yield process
            finally:
                process.kill()
    finally:
        timer.cancel()


@pytest.mark.slow
def test_a_slow_evaluator_reads_whole_steps_from_a_quick_trainer(tmp_path: pathlib.Path) -> None:
    """The trainer deletes each step at once, but for the one that is being read, however long that takes."""
    steps = 60
    seen = []
    evaluator = jaxckpt.CheckpointManager(tmp_path)
    with training(tmp_path, steps) as process:
        for step in evaluator.watch(timeout_s=DEADLINE_S, poll_s=0.001):
            seen.append(step)
            # Slow: the trainer is well ahead before the reading begins.
            ahead = min(step + 3, steps - 1)
            look_until(lambda ahead=ahead: (evaluator.latest_step() or 0) >= ahead)  # type: ignore[misc]
            assert evaluator.path_of(step)
            assert_is_step(evaluator, step)
            if step >= steps - 1:
                break
        assert seen == sorted(set(seen))
        assert len(seen) >= 5
        output, errors = process.communicate("go on\n", timeout=DEADLINE_S)
    assert (process.returncode, output, errors) == (0, "almost done\n", "")
    # What was held is deleted when it is held no more.
    assert evaluator.steps() == [steps]
    assert sorted(os.listdir(tmp_path)) == ["checkpoint.json", f"step_{steps:08d}"]


def test_an_evaluator_that_is_killed_holds_nothing(tmp_path: pathlib.Path) -> None:
    trainer = jaxckpt.CheckpointManager(tmp_path, max_to_keep=1)
    save(trainer, 1)
    program = """
        import sys, jaxckpt
        for step in jaxckpt.CheckpointManager(sys.argv[1]).watch():
            print(step, flush=True)
            sys.stdin.readline()
    """
    environment = dict(os.environ, JAX_PLATFORMS="cpu", PYTHONPATH=str(ROOT))
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program), str(tmp_path)],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        timer = threading.Timer(DEADLINE_S, process.kill)
        timer.start()
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "1\n"
            save(trainer, 2)
            assert trainer.steps() == [1, 2]
        finally:
            timer.cancel()
            process.kill()
            process.wait(DEADLINE_S)
    save(trainer, 3)
    assert trainer.steps() == [3]
