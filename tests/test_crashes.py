"""A process that saves is killed at every single storage operation; what is there before and after the next save?

Each test is a program of its own that imports jaxckpt, touches no device, and for every operation forks a process that
saves and is killed (`KillingKernel`). It then looks at what each of them left, without changing it, and goes on in two
ways: with the step that was cut off, and with the next one. What is then on disk is compared with directories in which
nothing was ever killed.

All operations have their turn: the program goes on until a save ends by itself. Where the processes that were killed at
several operations left the same (a sync changes nothing that a later process can see), it is looked at once.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import jaxckpt
from jaxckpt._store import LocalStore

from .helpers import ROOT, assert_same_tree, run_fork
from .storage_faults import (
    CALLS,
    FOREIGN_IN_ROOT,
    FOREIGN_IN_STEP,
    MANIFEST,
    Journal,
    KillingKernel,
    NotedKernel,
    assert_files,
    copy_tree,
    digest_of,
    fingerprints,
    listing,
    put_files,
    read_tree,
)
from .test_commit import full_path

pytestmark = pytest.mark.slow

MIB = 1 << 20
# A process that saves may take so many seconds.
_CHILD_S = 60


@dataclasses.dataclass(frozen=True)
class Scenario:
    """What is saved before, and by the process that is killed.

    A save has a number: its step and a last digit that tells saves of one step apart.

    Attributes:
      before: Numbers of the saves that are there.
      saved: Numbers of the saves of the process that is killed.
      max_to_keep: Of the managers in all processes.
      way: ``"manager"``, ``"overlapping"`` (a manager too, but no save is waited for), or ``"plain"`` (`jaxckpt.save`).
      threads: That write. With one, the order of operations is the same in every run, so that each has its turn; with
        several it differs, and the kills come at whatever is under way.
      has_jax: Whether the tree has a `jax.Array`.
      is_large: Whether the tree has arrays that are written past the page cache.
      is_packed: Whether all arrays share an object, which takes fewer operations.
      is_torn: Whether it is killed in the middle of writes, and nowhere else.
      litter: Saves before were killed too, at these operations of a save of the step.
      on_disk: Whether it needs a disk, not a file system in memory.
    """

    before: tuple[int, ...]
    saved: tuple[int, ...]
    max_to_keep: int | None = 5
    way: str = "manager"
    threads: int = 1
    has_jax: bool = False
    is_large: bool = False
    is_packed: bool = False
    is_torn: bool = False
    litter: tuple[int, ...] = ()
    on_disk: bool = False

    def tree(self, number: int) -> dict[str, Any]:
        """Packed arrays, an array in an object of its own, and values."""
        tree = {
            "layers": [{"w": np.arange(50.0) + number, "b": np.full(3, number, np.int8)} for _ in range(2)],
            "own": np.full(2000, number, np.float64),
            "name": f"save {number}",
            "number": number,
        }
        if self.has_jax:
            import jax.numpy as jnp

            tree["device"] = jnp.full((20,), number, jnp.float32)
        if self.is_large:
            tree["odd"] = np.full(MIB + 12, number % 251, np.uint8)
            tree["even"] = np.full(MIB // 4, number, np.float32)
        return tree

    @property
    def options(self) -> jaxckpt.SaveOptions:
        return jaxckpt.SaveOptions(pack_bytes_max=MIB if self.is_packed else 4096, io_threads=self.threads)

    @staticmethod
    def items(number: int) -> dict[str, Any]:
        return {"data": {"position": number, "seed": b"\0\xff"}, "note": [number, None]}

    def state(self, commits: int) -> dict[int, int]:
        """Number of each step that is there after so many commits of the process."""
        steps: dict[int, int] = {}
        for number in self.before:
            steps[number // 10] = number
        for number in self.saved[:commits]:
            steps = self.after(steps, number)
        return steps

    def after(self, steps: dict[int, int], number: int) -> dict[int, int]:
        """What is there after a save, and what the manager deletes after it."""
        steps = steps | {number // 10: number}
        if self.way == "plain":
            return steps
        return {step: steps[step] for step in sorted(steps)[-(self.max_to_keep or len(steps)) :]}

    def manager(
        self, directory: pathlib.Path, kernel: NotedKernel | None = None
    ) -> jaxckpt.CheckpointManager:
        return jaxckpt.CheckpointManager(
            LocalStore(str(directory), kernel),
            max_to_keep=self.max_to_keep,
            options=self.options,
        )

    def save(
        self, directory: pathlib.Path, numbers: tuple[int, ...], kernel: NotedKernel | None = None
    ) -> None:
        """Saves as the process does that is killed."""
        if self.way == "plain":
            for number in numbers:
                store: Any = LocalStore(str(directory / f"step_{number // 10:08}"), kernel)
                jaxckpt.save(
                    store, self.tree(number), items=self.items(number), overwrite=True, options=self.options
                )
            return
        with self.manager(directory, kernel) as manager:
            for number in numbers:
                pending = manager.save(
                    number // 10,
                    self.tree(number),
                    items=self.items(number),
                    metrics={"number": number},
                    overwrite=True,
                )
                assert pending is not None
                if self.way == "manager":
                    pending.wait()
                    manager.wait()

    def go_on(self, directory: pathlib.Path, number: int) -> None:
        """Saves as the next process does, which may not overwrite; with a manager, for that one sweeps."""
        if number in self.saved and self.way == "plain":
            self.save(directory, (number,))
            return
        with self.manager(directory) as manager:
            overwrite = number // 10 in manager.steps()
            pending = manager.save(
                number // 10, self.tree(number), items=self.items(number), overwrite=overwrite
            )
            assert pending is not None
            pending.wait()


@dataclasses.dataclass(frozen=True)
class Cut:
    """How a process ended that was to be killed.

    Attributes:
      at: The operation at which.
      is_ended: Whether it ended by itself, for it had no such operation.
      last: Its last operation.
      commits: How many saves it had committed.
    """

    at: int
    is_ended: bool
    last: str
    commits: int


SCENARIOS = {
    "first": Scenario((), (10,), is_large=True, on_disk=True),
    "overwrite": Scenario((10, 20), (21,)),
    "plain overwrite": Scenario((10, 20), (21,), way="plain"),
    "retention": Scenario((10, 20), (30,), max_to_keep=1, threads=4, is_packed=True),
    "overlapping": Scenario((10, 20), (30, 40), max_to_keep=2, way="overlapping", threads=2, is_packed=True),
    "torn": Scenario((10,), (11,), has_jax=True, is_torn=True),
    "litter": Scenario((10, 20), (30,), max_to_keep=2, litter=(15, 24), is_packed=True),
}


# --- the program ----------------------------------------------------------------------------------------------


def run_scenario(name: str, root: pathlib.Path) -> dict[str, Any]:
    """Kills at all operations; returns what to report, or ends the process where something is wrong."""
    scenario = SCENARIOS[name]
    template = root / "template" / "run"
    template.parent.mkdir()
    must_succeed("the template", lambda: make_template(scenario, template))
    must_succeed("the references", lambda: make_references(scenario, template, root))
    references = json.loads((root / "references.json").read_text())
    cuts: list[Cut] = []
    different: dict[Any, tuple[Cut, pathlib.Path]] = {}
    while not cuts or not cuts[-1].is_ended:
        at = len(cuts) + 1
        parent = root / str(at)
        cut = cut_off(scenario, template, parent, at)
        cuts.append(cut)
        left = (cut.commits, contents(parent))
        if left in different:
            shutil.rmtree(parent)
        else:
            different[left] = cut, parent
    # No process is forked after this, so threads may run.
    for cut, parent in different.values():
        witness(scenario, parent, cut, references)
    killed = [cut for cut in cuts if not cut.is_ended]
    return {
        "points": len(killed),
        "different": len(different),
        "calls": Counter(cut.last.split()[0] for cut in killed),
        "commits": sorted({cut.commits for cut in cuts}),
    }


def warm_up(root: pathlib.Path) -> None:
    """Does once what every child would do at its first save and restore, without a device and without a thread left."""
    scenario = Scenario((), (10,))
    scenario.save(root / "run", scenario.saved)
    check_steps(scenario, root / "run", {1: 10})
    shutil.rmtree(root)
    assert threading.active_count() == 1


def in_child(work: Callable[[], None]) -> int:
    """Forks a process for some work; it fails by an exception, or by the alarm when it hangs."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        signal.alarm(_CHILD_S)
        work()
        status = 0
    except BaseException:  # noqa: BLE001  nothing of the child may go on as its parent
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def must_succeed(what: str, work: Callable[[], None]) -> None:
    _, status = os.waitpid(in_child(work), 0)
    if status != 0:
        raise SystemExit(f"{what} failed with wait status {status}")


def make_template(scenario: Scenario, directory: pathlib.Path) -> None:
    """What is there before: nothing at all, or checkpoints among files of others, and maybe what crashes left."""
    put_files(directory.parent / "beside", FOREIGN_IN_ROOT)
    if not scenario.before:
        return
    keeps_all = dataclasses.replace(scenario, max_to_keep=None, way="manager")
    for number in scenario.before:
        keeps_all.save(directory, (number,))
    put_files(directory, FOREIGN_IN_ROOT)
    for number in scenario.before:
        put_files(directory / f"step_{number // 10:08}", FOREIGN_IN_STEP)
    for at in scenario.litter:
        for number in (scenario.before[-1] + 1, scenario.saved[-1]):
            leave_litter(scenario, directory / f"step_{number // 10:08}", number, at)
    if scenario.litter:
        assert len(list(directory.glob("step_00000002/data-????????????????"))) > 2
        assert len(list(directory.glob("step_00000003/data-????????????????"))) > 1
        assert list(directory.glob("*/manifest.msgpack.tmp-????????????????"))


def leave_litter(scenario: Scenario, step: pathlib.Path, number: int, at: int) -> None:
    """A save that was killed, beside what is there already, which stays as it is."""
    kept = {path: path.read_bytes() for path in step.rglob("*") if path.is_file()}
    plain = dataclasses.replace(scenario, way="plain")
    kernel = KillingKernel(Journal(), at)
    os.waitpid(in_child(lambda: plain.save(step.parent, (number,), kernel)), 0)
    manifest = step / "manifest.msgpack"
    if manifest not in kept:
        manifest.unlink(missing_ok=True)
    for path, content in kept.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def next_numbers(scenario: Scenario, commits: int) -> dict[str, int]:
    """With which saves the next process may go on."""
    ways = {"next": (scenario.saved[-1] // 10 + 1) * 10}
    if commits < len(scenario.saved):
        ways["again"] = scenario.saved[commits]
    return ways


def make_references(scenario: Scenario, template: pathlib.Path, root: pathlib.Path) -> None:
    """What is on disk after each number of commits and each way to go on, when nothing is killed."""
    references = {}
    for commits in range(len(scenario.saved) + 1):
        for way, number in next_numbers(scenario, commits).items():
            parent = root / f"reference-{commits}-{way}"
            copy_tree(template.parent, parent)
            directory = parent / "run"
            if commits:
                scenario.save(directory, scenario.saved[:commits])
            scenario.go_on(directory, number)
            references[f"{commits} {way}"] = listing(parent)
            shutil.rmtree(parent)
    (root / "references.json").write_text(json.dumps(references))


def cut_off(scenario: Scenario, template: pathlib.Path, parent: pathlib.Path, at: int) -> Cut:
    """Lets a process be killed at one operation."""
    copy_tree(template.parent, parent)
    journal = Journal()
    kernel = KillingKernel(journal, at, is_torn=scenario.is_torn)
    child = in_child(lambda: scenario.save(parent / "run", scenario.saved, kernel))
    _, status = os.waitpid(child, 0)
    is_ended = os.WIFEXITED(status)
    assert status == 0 if is_ended else os.WTERMSIG(status) == signal.SIGKILL, f"it ended with {status}"
    lines = journal.read()
    last = next((line for line in reversed(lines) if line != "committed"), "")
    return Cut(at, is_ended, last, lines.count("committed"))


def contents(parent: pathlib.Path) -> tuple[tuple[str, str], ...]:
    """All names, and the bytes of all files, below a directory; without what is random, the ids of attempts.

    Of files that hold such an id, or the time, the sizes count.
    """
    found = []
    for name, content in read_tree(parent).items():
        has_id = name.rpartition("/")[2].startswith((MANIFEST, "checkpoint.json"))
        what = str(len(content)) if has_id else hashlib.sha256(content).hexdigest()
        found.append((re.sub("[0-9a-f]{16}", "*", name), what))
    return tuple(sorted(found))


def witness(scenario: Scenario, parent: pathlib.Path, cut: Cut, references: dict[str, list[str]]) -> None:
    """Checks all that must hold after a process was killed."""
    commits = cut.commits
    try:
        look(scenario, parent, commits)
        for way, number in next_numbers(scenario, commits).items():
            again = parent.with_name(f"{cut.at}-{way}")
            copy_tree(parent, again)
            scenario.go_on(again / "run", number)
            if scenario.way == "plain" and way == "again":
                # A plain save does not know whether other writers live; the manager does.
                check_steps(scenario, again / "run", scenario.state(commits + 1))
                scenario.go_on(again / "run", next_numbers(scenario, len(scenario.saved))["next"])
                want = references[f"{len(scenario.saved)} next"]
            else:
                keeps = dataclasses.replace(scenario, way="manager")
                check_steps(scenario, again / "run", keeps.after(scenario.state(commits), number))
                want = references[f"{commits} {way}"]
            assert listing(again) == want, f"{way}: {set(listing(again)) ^ set(want)}"
            check_foreign_files(scenario, again)
            shutil.rmtree(again)
    except BaseException:
        print(f"--- killed at operation {cut.at}, {cut.last}, after {commits} commits", file=sys.stderr)
        raise
    shutil.rmtree(parent)


def look(scenario: Scenario, parent: pathlib.Path, commits: int) -> None:
    """The last committed step is whole, and to find that out changes nothing."""
    directory = parent / "run"
    before = fingerprints(parent)
    manager = scenario.manager(directory)
    steps = manager.steps()
    # A step that is to be deleted may still be there, if it is whole.
    numbers = scenario.state(max(commits - 1, 0)) | scenario.state(commits)
    if scenario.way == "overlapping":
        for count in range(commits):
            numbers = scenario.state(count) | numbers
    assert set(scenario.state(commits)) <= set(steps) <= set(numbers), f"{steps} after {commits} commits"
    for step in steps:
        check_step(scenario, manager, step, numbers[step])
    newest = max(steps, default=None)
    assert manager.latest_step() == newest
    assert [verdict.step for verdict in manager.explain()] == steps
    resumed = manager.resume(items=None)
    if newest is None:
        assert resumed is None
        with pytest.raises(jaxckpt.NotFoundError):
            manager.restore()
    else:
        assert resumed is not None
        assert resumed[0] == newest
        assert_same_tree(resumed[1], scenario.tree(numbers[newest]))
    manager.close()
    assert fingerprints(parent) == before
    check_foreign_files(scenario, parent)


# Digests of the steps that were found whole, and the numbers of their saves: the same bytes need one look.
_FOUND_WHOLE: set[tuple[str, int]] = set()


def check_step(scenario: Scenario, manager: jaxckpt.CheckpointManager, step: int, number: int) -> None:
    found = digest_of(pathlib.Path(manager.path_of(step))), number
    if found in _FOUND_WHOLE:
        return
    assert_same_tree(manager.restore(step), scenario.tree(number))
    assert manager.open(step).items == scenario.items(number)
    report = jaxckpt.verify(manager.path_of(step))
    assert report.ok, report
    _FOUND_WHOLE.add(found)


def check_steps(scenario: Scenario, directory: pathlib.Path, numbers: dict[int, int]) -> None:
    """These saves are there, and no others."""
    manager = scenario.manager(directory)
    assert manager.steps() == sorted(numbers)
    for step, number in numbers.items():
        check_step(scenario, manager, step, number)


def check_foreign_files(scenario: Scenario, parent: pathlib.Path) -> None:
    assert_files(parent / "beside", FOREIGN_IN_ROOT)
    if scenario.before:
        assert_files(parent / "run", FOREIGN_IN_ROOT)
        for number in scenario.before:
            assert_files(parent / "run" / f"step_{number // 10:08}", FOREIGN_IN_STEP)


# --- the tests ------------------------------------------------------------------------------------------------


@pytest.fixture
def fast_path(tmp_path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A directory in memory where there is one: hundreds of saves need not wait for a disk."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="jaxckpt-") as path:
        yield pathlib.Path(path)


@pytest.mark.parametrize("name", SCENARIOS)
def test_sigkill_at_every_storage_operation(
    name: str, tmp_path: pathlib.Path, fast_path: pathlib.Path
) -> None:
    scenario = SCENARIOS[name]
    root = tmp_path if scenario.on_disk else fast_path
    program = """
        import gc, json, pathlib, sys, warnings

        warnings.simplefilter("ignore")  # forking is safe here: no device was touched yet
        from tests.test_crashes import run_scenario, warm_up

        warm_up(pathlib.Path(sys.argv[2]) / "warm-up")
        gc.freeze()  # the children need not touch, and so copy, what is there already
        print(json.dumps(run_scenario(sys.argv[1], pathlib.Path(sys.argv[2]))))
    """
    report = json.loads(run_fork(program, name, root, timeout_s=100).stdout.splitlines()[-1])
    assert report["commits"] == list(range(len(scenario.saved) + 1))
    calls = report["calls"]
    assert report["points"] == sum(calls.values())
    print(name, report)
    if scenario.is_torn:
        assert list(calls) == ["half"]
        assert calls["half"] >= 5
        return
    assert {"create", "open", "pwrite", "fsync", "rename", "mkdir"} <= set(calls)
    if scenario.before:
        assert calls["unlink"] >= 5
        assert calls["rmdir"] >= 2
    if scenario.is_large:
        assert calls["ftruncate"] >= 1


COUNTED_SAVES = """
import json, os, pathlib, sys

from tests.storage_faults import NotedKernel
from tests.test_crashes import Scenario

events = []

def note(event, arguments):
    if event == "open" and isinstance(arguments[0], str) and isinstance(arguments[2], int):
        path, _, flags = arguments
        if flags & (os.O_CREAT | os.O_TRUNC):
            events.append(["create", path])
        elif flags & os.O_DIRECTORY:
            events.append(["open", path])
    elif event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir"):
        call = {"os.mkdir": "mkdir", "os.rename": "rename", "os.remove": "unlink", "os.rmdir": "rmdir"}[event]
        events.append([call, str(arguments[0])])
    elif event in ("os.truncate", "os.link", "os.symlink", "os.chmod", "os.chown", "os.utime", "os.setxattr"):
        events.append([event, str(arguments[0])])

root = pathlib.Path(sys.argv[1])
kernel = NotedKernel()
scenario = Scenario((), (10, 11, 20, 30), max_to_keep=1, is_large=True, threads=4)
sys.addaudithook(note)
for number in scenario.saved:
    scenario.save(root, (number,), kernel)
done = [[operation.call, operation.path] for operation in kernel.done]
print(json.dumps({"noted": done, "events": events}))
"""


def test_python_tells_of_no_operation_that_is_not_counted(tmp_path: pathlib.Path) -> None:
    """What changes storage without going through the kernel of the store would never be stopped above."""
    root = tmp_path / "run"
    report = json.loads(run_fork(COUNTED_SAVES, root).stdout)
    told = ("create", "open", "mkdir", "rename", "unlink", "rmdir")
    noted = Counter((call, path) for call, path in report["noted"] if call in told)
    # The directory below which all is made is itself made and synced.
    events = Counter((call, path) for call, path in report["events"] if path.startswith(str(tmp_path)))
    assert events == noted
    assert noted["create", next(path for call, path in noted if call == "create")] == 1


CHANGING_CALLS = """
    creat open openat openat2 mkdir mkdirat mknod mknodat link linkat symlink symlinkat rename renameat renameat2 unlink
    unlinkat rmdir truncate ftruncate fallocate write writev pwrite64 pwritev pwritev2 sendfile splice copy_file_range
    fsync fdatasync sync_file_range syncfs sync chmod fchmod fchmodat chown fchown lchown fchownat utimensat setxattr
    fsetxattr lsetxattr removexattr fremovexattr io_uring_enter
"""


@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")
def test_the_system_tells_of_no_operation_that_is_not_counted(tmp_path: pathlib.Path) -> None:
    root = tmp_path / "run"
    log = tmp_path / "log"
    calls = ",".join(f"?{call}" for call in CHANGING_CALLS.split())
    command = [
        "strace",
        "-f",
        "-y",
        "-qq",
        "-s",
        "300",
        "-e",
        f"trace={calls}",
        "-e",
        "signal=none",
        "-o",
        str(log),
    ]
    if subprocess.run([*command, "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip("strace may not trace here")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    result = subprocess.run(
        [*command, sys.executable, "-c", COUNTED_SAVES, str(root)],
        env=environment,
        check=True,
        timeout=120,
        capture_output=True,
        text=True,
    )
    noted = Counter((call, path) for call, path in json.loads(result.stdout)["noted"])
    traced = Counter(traced_operations(log.read_text(), str(tmp_path)))
    assert traced == noted
    assert {call for call, _ in noted} == set(CALLS)


def traced_operations(text: str, root: str) -> Iterator[tuple[str, str]]:
    """The calls in a log of strace that changed something below a directory, in the words of `Operation`."""
    unfinished: dict[str, str] = {}
    for line in text.splitlines():
        thread, _, call = line.partition(" ")
        call = call.strip()
        if call.endswith("<unfinished ...>"):
            unfinished[thread] = call.removesuffix("<unfinished ...>")
            continue
        if call.startswith("<... "):
            call = unfinished.pop(thread) + call.partition("resumed>")[2]
        name, _, arguments = call.partition("(")
        if root not in arguments or " = -1 " in arguments:
            continue
        quoted = arguments.split('"')[1::2]
        if name in ("write", "pwrite64", "fsync", "ftruncate", "fdatasync"):
            path = arguments.partition("<")[2].partition(">")[0]
        else:
            path = full_path(arguments, quoted[0])
        if not path.startswith(root):
            continue
        if name in ("open", "openat"):
            if any(flag in arguments for flag in ("O_CREAT", "O_TRUNC")):
                yield "create", path
            elif (
                "O_DIRECTORY" in arguments and "O_NONBLOCK" not in arguments
            ):  # else it is listed, not synced
                yield "open", path
            continue
        same = {"pwrite64": "pwrite", "mkdirat": "mkdir", "renameat": "rename", "renameat2": "rename"}
        if name == "unlinkat":
            yield ("rmdir" if "AT_REMOVEDIR" in arguments else "unlink"), path
        else:
            yield same.get(name, name), path
