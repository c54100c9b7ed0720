"""Storage refuses at every single operation of a save: training goes on, the error says what happened, nothing leaks.

`RefusingKernel` raises what the operating system would. What no kernel in this process can stand for is real: limits,
permissions, a small file system, directories that are deleted, moved or replaced meanwhile.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import itertools
import os
import pathlib
import re
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import jaxckpt
from jaxckpt._staging import HOST_MEMORY, PINNED_MEMORY
from jaxckpt._store import LocalStore

from .helpers import assert_same_tree, run_fork
from .storage_faults import (
    CALLS,
    FOREIGN_IN_ROOT,
    FOREIGN_IN_STEP,
    GateKernel,
    NotedKernel,
    Operation,
    RefusingKernel,
    assert_files,
    copy_tree,
    digest_of,
    listing,
    put_files,
)

pytestmark = pytest.mark.slow

MIB = 1 << 20
WRITES = ("create", "open", "pwrite", "ftruncate", "fsync", "rename", "mkdir")
NAMES = ("create", "open", "rename", "mkdir")


def tree_of(number: float) -> dict[str, Any]:
    return {
        "layers": [{"w": np.arange(50.0) + number, "b": np.full(3, number, np.int8)} for _ in range(2)],
        "own": np.full(2000, number, np.float64),
        "number": number,
    }


def items_of(number: float) -> dict[str, Any]:
    return {"data": {"position": number}}


def make_manager(
    directory: pathlib.Path, kernel: NotedKernel | None = None, **rules: Any
) -> jaxckpt.CheckpointManager:
    options = jaxckpt.SaveOptions(pack_bytes_max=4096, io_threads=2)
    rules = {"max_to_keep": 2, "options": options} | rules
    return jaxckpt.CheckpointManager(LocalStore(str(directory), kernel), **rules)


def save(manager: jaxckpt.CheckpointManager, number: int, **more: Any) -> jaxckpt.PendingSave:
    """Saves step ``number // 10``; the last digit tells saves of one step apart."""
    pending = manager.save(number // 10, tree_of(number), items=items_of(number), **more)
    assert pending is not None
    return pending


# Digests of the steps that were found whole, and the numbers of their saves: the same bytes need one look.
_FOUND_WHOLE: set[tuple[str, int]] = set()


def check_steps(directory: pathlib.Path, numbers: dict[int, int]) -> None:
    """These saves are there, whole, and no others; a manager that just looks at the directory sees the same."""
    manager = make_manager(directory)
    assert manager.steps() == sorted(numbers)
    newest = manager.latest_step()
    assert newest == max(numbers, default=None)
    for step, number in numbers.items():
        found = digest_of(directory / f"step_{step:08}"), number
        if found in _FOUND_WHOLE:
            continue
        assert_same_tree(manager.restore(None if step == newest else step), tree_of(number))
        assert manager.open(step).items == items_of(number)
        assert jaxckpt.verify(manager.path_of(step)).ok
        _FOUND_WHOLE.add(found)


def open_descriptors() -> set[tuple[int, str]]:
    """Number and target of everything that this process has open."""
    found = set()
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the one with which they are listed
            found.add((int(number), os.readlink(f"/proc/self/fd/{number}")))
    return found


@contextlib.contextmanager
def nothing_leaks() -> Iterator[None]:
    """No thread, no descriptor and no reserved memory is left.

    What was open before may be closed meanwhile: earlier tests leave garbage, which is collected at any time.
    """
    descriptors = open_descriptors()
    yield
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("jaxckpt")] == []
    assert open_descriptors() - descriptors == set()
    assert (HOST_MEMORY.bytes_in_use, PINNED_MEMORY.bytes_in_use) == (0, 0)


@pytest.fixture(scope="module")
def fast_path() -> Iterator[pathlib.Path]:
    """A directory in memory where there is one: hundreds of saves need not wait for a disk."""
    place = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=place, prefix="jaxckpt-") as path:
        yield pathlib.Path(path)


# --- every operation ------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Scenario:
    """Which saves are there, the one that meets the fault, and the one after it."""

    before: tuple[int, ...]
    number: int
    overwrite: bool = False

    @property
    def old(self) -> dict[int, int]:
        return {number // 10: number for number in self.before}

    @property
    def new(self) -> dict[int, int]:
        return self.old | {self.number // 10: self.number}


SCENARIOS = {
    "first": Scenario((), 10),
    "retention": Scenario((10, 20), 30),
    "overwrite": Scenario((10, 20), 21, overwrite=True),
}
# A single error at a deletion is among those of "EIO".
FAULTS = {
    "ENOSPC from then on": (errno.ENOSPC, WRITES, True),
    "EFBIG": (errno.EFBIG, ("pwrite", "ftruncate"), False),
    "EIO": (errno.EIO, CALLS, False),
    "EACCES": (errno.EACCES, NAMES, False),
    "EROFS from then on": (errno.EROFS, CALLS, True),
    "EIO of deletions from then on": (errno.EIO, ("unlink", "rmdir"), True),
}
# Every operation of every scenario is refused, once and from then on. What differs from that in its number alone, or
# lets deletions go on, meets one scenario.
CASES = [
    *((name, fault) for name in SCENARIOS for fault in ("EIO", "EROFS from then on")),
    *(("first", fault) for fault in ("EFBIG", "EACCES")),
    ("retention", "EIO of deletions from then on"),
    ("overwrite", "EIO of deletions from then on"),
    ("overwrite", "ENOSPC from then on"),
]


def make_template(scenario: Scenario, directory: pathlib.Path) -> None:
    if not scenario.before:
        return
    with make_manager(directory) as manager:
        for number in scenario.before:
            save(manager, number).wait()
    put_files(directory, FOREIGN_IN_ROOT)
    for number in scenario.before:
        put_files(directory / f"step_{number // 10:08}", FOREIGN_IN_STEP)


def make_references(
    scenario: Scenario, template: pathlib.Path, root: pathlib.Path
) -> dict[tuple[bool, bool], Any]:
    """What is on disk in the end if nothing fails: with or without the save in question, and after one more or not."""
    references = {}
    for is_saved, has_more in itertools.product((False, True), repeat=2):
        directory = root / "reference"
        if template.exists():
            copy_tree(template, directory)
        if is_saved:
            with make_manager(directory) as manager:
                save(manager, scenario.number, overwrite=scenario.overwrite)
        if has_more:
            with make_manager(directory) as manager:
                save(manager, 40)
        references[is_saved, has_more] = listing(directory)
        shutil.rmtree(directory, ignore_errors=True)
    return references


def newest_two(numbers: dict[int, int]) -> dict[int, int]:
    return {step: numbers[step] for step in sorted(numbers)[-2:]}


@pytest.mark.parametrize(("name", "fault"), CASES)
def test_a_fault_at_every_storage_operation(name: str, fault: str, fast_path: pathlib.Path) -> None:
    scenario = SCENARIOS[name]
    number, calls, is_lasting = FAULTS[fault]
    root = fast_path / f"{name}-{fault}"
    root.mkdir()
    template = root / "template"
    make_template(scenario, template)
    references = make_references(scenario, template, root)
    outcomes = []
    for at in itertools.count(1):
        kernel = RefusingKernel(number, calls, at, is_lasting=is_lasting)
        directory = root / str(at)
        if template.exists():
            copy_tree(template, directory)
        try:
            outcome = check_fault(scenario, directory, kernel, references, saves_again=at % 2 == 0)
        except BaseException:
            print(f"refused: {at}, {', '.join(map(str, kernel.refused[:3]))}")
            raise
        shutil.rmtree(directory)
        if outcome is None:
            break
        outcomes.append(outcome)
    assert len(outcomes) >= {("unlink", "rmdir"): 4}.get(calls, 8) or not scenario.before
    if "open" in calls:
        assert set(outcomes) == {"failed", "failed late", "saved"}


def check_fault(
    scenario: Scenario,
    directory: pathlib.Path,
    kernel: RefusingKernel,
    references: dict[tuple[bool, bool], list[str]],
    *,
    saves_again: bool,
) -> str | None:
    """One save that meets a fault, and what comes after it; None when the save had no such operation."""
    events: list[jaxckpt.CheckpointEvent] = []
    step = scenario.number // 10
    with nothing_leaks():
        manager = make_manager(directory, kernel, on_event=events.append)
        pending = save(manager, scenario.number, overwrite=scenario.overwrite)
        error = None
        try:
            pending.wait()
        except jaxckpt.WriteError as caught:
            error = caught
        is_committed = kernel.commits == 1
        if error is None:
            manager.wait()
            assert is_committed
        else:
            with pytest.raises(jaxckpt.WriteError):
                manager.wait()
            check_message(scenario, error, kernel, is_committed=is_committed)
        assert [event.kind for event in events if event.kind in ("saved", "failed")] == [
            "saved" if error is None else "failed"
        ]
        steps = manager.steps()
        if error is None:
            check_that_it_was_needless(kernel, directory)
            assert set(newest_two(scenario.new)) <= set(steps) <= set(scenario.new)
            check_steps(directory, {step: scenario.new[step] for step in steps})
        else:
            check_steps(directory, scenario.new if is_committed else scenario.old)
            assert steps == sorted(set(scenario.old) - ({step} if is_committed else set()))
        is_late = error is not None and is_committed
        if not kernel.refused:
            assert listing(directory) == references[True, False]
        has_refused = bool(kernel.refused)

        kernel.mend()
        if error is not None and not is_committed and saves_again:
            save(manager, scenario.number, overwrite=scenario.overwrite).wait()
            manager.wait()
            check_steps(directory, newest_two(scenario.new))
            assert listing(directory) == references[True, False]
            is_committed = True
        save(manager, 40).wait()
        manager.close()
        want = newest_two((scenario.new if is_committed else scenario.old) | {4: 40})
        check_steps(directory, want)
        assert listing(directory) == references[is_committed, True]
        assert_cache_is_right(directory, want)
    if scenario.before:
        assert_files(directory, FOREIGN_IN_ROOT)
        for number in scenario.before:
            assert_files(directory / f"step_{number // 10:08}", FOREIGN_IN_STEP)
    if not has_refused:
        return None
    if error is None:
        return "saved"
    return "failed late" if is_late else "failed"


def check_message(
    scenario: Scenario, error: jaxckpt.WriteError, kernel: RefusingKernel, *, is_committed: bool
) -> None:
    """The error says what, where and what is left."""
    text = str(error)
    assert error.errno == kernel.number
    assert os.strerror(kernel.number) in text
    assert errno.errorcode[kernel.number] in text
    assert any(operation.path in text for operation in kernel.refused)
    if is_committed:
        assert "in place and whole, but may be lost" in text
        assert "nothing was committed" not in text
    elif scenario.before:
        assert f"nothing was committed; the newest committed step is {max(scenario.old)}" in text
    else:
        assert "nothing was committed; no step is committed" in text


def check_that_it_was_needless(kernel: RefusingKernel, directory: pathlib.Path) -> None:
    """A save that went well met a fault only where it was sweeping, deleting, or writing for people."""
    for operation in kernel.refused:
        assert operation.call in ("unlink", "rmdir") or kernel.commits_before == 1, operation
        if kernel.commits_before == 1 and operation.call in ("open", "fsync"):
            # The directory of the new manifest is synced first; this is another one, or a later one of the sweep.
            commit = next(number for number, other in enumerate(kernel.done) if other.is_commit)
            assert Operation("fsync", os.path.dirname(kernel.done[commit].target)) in kernel.done[commit:]


def assert_cache_is_right(directory: pathlib.Path, numbers: dict[int, int]) -> None:
    text = (directory / "checkpoint.json").read_text()
    assert [int(step) for step in re.findall(r'"step": (\d+)', text)] == sorted(numbers)
    assert f'"latest": "step_{max(numbers):08}"' in text


def test_faults_of_files_that_are_written_past_the_page_cache(tmp_path: pathlib.Path) -> None:
    """On a disk: there O_DIRECT may be refused, which costs nothing, and the end of a file is cut to its length."""
    tree = {"odd": np.full(MIB + 12, 7, np.uint8), "small": np.arange(3.0)}
    options = jaxckpt.SaveOptions(pack_bytes_max=4096, io_threads=1)
    ends = set()
    for at in itertools.count(1):
        kernel = RefusingKernel(errno.ENOSPC, WRITES, at, where="step_00000001/data-")
        directory = tmp_path / str(at)
        with nothing_leaks():
            manager = make_manager(directory, kernel, options=options)
            pending = manager.save(1, tree)
            assert pending is not None
            failure = pending.exception() if pending.wait_done() else None
            manager.close()
            ends.update((operation.call, failure is None) for operation in kernel.refused)
            assert manager.steps() == ([1] if failure is None else [])
            if failure is None:
                assert_same_tree(manager.restore(), tree)
            else:
                assert listing(directory) in ([], ["step_00000001/"], ["checkpoint.json"])
        if not kernel.refused:
            break
    assert ("pwrite", False) in ends
    assert ("fsync", False) in ends
    if any(operation.call == "ftruncate" for operation in kernel.done):  # the file system has O_DIRECT
        assert ("ftruncate", False) in ends
        assert ("create", True) in ends


# --- faults that last -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EROFS, errno.EACCES])
def test_training_goes_on_while_storage_refuses_and_saves_when_it_does_not(
    path: pathlib.Path, number: int, caplog: pytest.LogCaptureFixture
) -> None:
    kernel = RefusingKernel(number, WRITES, 0)
    with nothing_leaks():
        manager = make_manager(path, kernel)
        for saved in (10, 20):
            save(manager, saved).wait()
        manager.wait()
        before = listing(path)
        kernel.at, kernel.is_lasting = 1, True
        kernel.count = 0
        for refused in (30, 40, 50, 60, 70):
            caplog.clear()
            pending = save(manager, refused)
            with pytest.raises(jaxckpt.WriteError, match="the newest committed step is 2"):
                pending.wait()
            errors = [record for record in caplog.records if record.levelname == "ERROR"]
            assert len(errors) == 1
            assert f"step_{refused // 10:08}" in errors[0].getMessage()
            with pytest.raises(jaxckpt.WriteError):
                manager.wait()
            assert manager.steps() == [1, 2]
            assert listing(path) == before
            assert_same_tree(manager.restore(), tree_of(20))
        kernel.mend()
        save(manager, 80).wait()
        manager.close()
        check_steps(path, {2: 20, 8: 80})
        assert listing(path) == [
            name.replace("step_00000002", "step_00000008")
            if "step_00000002" in name
            else name.replace("step_00000001", "step_00000002")
            for name in before
        ]


class AfterTheCommit(RefusingKernel):
    """Refuses only after the first commit."""

    def before(self, operation: Operation) -> None:
        if self.commits == 1:
            super().before(operation)


@pytest.mark.parametrize("call", ["open", "fsync"])
@pytest.mark.parametrize("saves_again", [False, True])
def test_a_save_that_may_not_be_durable_deletes_nothing_old(
    path: pathlib.Path, call: str, saves_again: bool
) -> None:
    """The sync after the rename fails: what is there is whole now, and no older step goes on its account.

    The error says to save again, and the same step can be saved again.
    """
    with nothing_leaks():
        with make_manager(path) as manager:
            save(manager, 10).wait()
        kernel = AfterTheCommit(errno.EIO, (call,), 1)
        manager = make_manager(path, kernel, max_to_keep=1)
        pending = save(manager, 20)
        with pytest.raises(
            jaxckpt.WriteError, match="in place and whole, but may be lost if the machine fails"
        ):
            pending.wait()
        with pytest.raises(jaxckpt.WriteError):
            manager.wait()
        assert not [operation for operation in kernel.done if operation.call == "unlink"]
        check_steps(path, {1: 10, 2: 20})
        assert manager.steps() == [1]
        assert_same_tree(manager.restore(), tree_of(10))
        assert [verdict.step for verdict in manager.explain()] == [1, 2]
        if saves_again:
            save(manager, 21).wait()
            manager.wait()
            check_steps(path, {2: 21})
        save(manager, 30).wait()
        manager.close()
        check_steps(path, {3: 30})


def test_one_step_that_cannot_be_deleted_does_not_keep_the_others(path: pathlib.Path) -> None:
    with nothing_leaks():
        manager = make_manager(path, max_to_keep=None)
        for number in (10, 20, 30):
            save(manager, number).wait()
        manager.close()
        kernel = RefusingKernel(errno.EACCES, ("unlink", "rmdir"), is_lasting=True, where="step_00000001")
        manager = make_manager(path, kernel, max_to_keep=1)
        for number in (40, 50):
            save(manager, number).wait()
            manager.wait()
            assert manager.steps() == [1, number // 10]
        kernel.mend()
        save(manager, 60).wait()
        manager.close()
        check_steps(path, {6: 60})
        assert sorted(os.listdir(path)) == ["checkpoint.json", "step_00000006"]


def test_litter_that_cannot_be_swept_stops_nothing_else(path: pathlib.Path) -> None:
    """What another user's crash left must not keep old steps, or other litter, for ever."""
    for step in (1, 3):
        (path / f"step_{step:08}" / "data-0123456789abcdef").mkdir(parents=True)
        (path / f"step_{step:08}" / "data-0123456789abcdef" / "zarr.json").write_text("{}")
    kernel = RefusingKernel(errno.EACCES, ("unlink", "rmdir"), is_lasting=True, where="step_00000001")
    with nothing_leaks():
        manager = make_manager(path, kernel, max_to_keep=1)
        for number in (50, 60, 70):
            save(manager, number).wait()
            manager.wait()
        assert manager.steps() == [7]
        assert sorted(os.listdir(path)) == ["checkpoint.json", "step_00000001", "step_00000007"]
        manager.close()


# --- real faults ----------------------------------------------------------------------------------------------


def test_a_limit_on_the_size_of_files(path: pathlib.Path) -> None:
    result = run_fork(
        """
        import os, pathlib, resource, sys
        import numpy as np
        import jaxckpt

        path = pathlib.Path(sys.argv[1])
        small = {"w": np.ones(1000)}
        large = {"w": np.ones(400_000)}
        with jaxckpt.CheckpointManager(path, max_to_keep=2) as manager:
            for step in (1, 2):
                manager.save(step, small).wait()
            _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
            for step in (3, 4):
                pending = manager.save(step, large)
                try:
                    pending.wait()
                except jaxckpt.WriteError as error:
                    print("EFBIG" in str(error), "newest committed step is 2" in str(error), manager.steps())
            manager.save(5, small).wait()
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
            manager.save(6, large).wait()
        print(manager.steps(), len(manager.restore()["w"]), sorted(os.listdir(path)))
        """,
        path,
    )
    assert result.stdout.splitlines() == [
        "True True [1, 2]",
        "True True [1, 2]",
        "[5, 6] 400000 ['checkpoint.json', 'step_00000005', 'step_00000006']",
    ]


def test_a_small_file_system(path: pathlib.Path) -> None:
    """Really full, then emptied by the user."""
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(path)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("may not mount a small file system here")
    try:
        run = path / "run"
        with nothing_leaks():
            manager = make_manager(run)
            save(manager, 10).wait()
            manager.wait()
            with contextlib.suppress(OSError), open(path / "filler", "wb", buffering=0) as filler:
                while True:
                    filler.write(b"\0" * 4096)
            before = listing(run)
            for number in (20, 30, 40, 50, 60):
                with pytest.raises(jaxckpt.WriteError, match="ENOSPC") as caught:
                    save(manager, number).wait()
                assert "the newest committed step is 1" in str(caught.value)
                with pytest.raises(jaxckpt.WriteError):
                    manager.wait()
                assert listing(run) == before
            check_steps(run, {1: 10})
            (path / "filler").unlink()
            save(manager, 70).wait()
            manager.close()
            check_steps(run, {1: 10, 7: 70})
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


def test_a_directory_that_may_not_be_written_or_even_listed() -> None:
    """In a process of its own, which gives up being root."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        run = pathlib.Path(folder) / "run"
        with make_manager(run) as manager:
            for number in (10, 20):
                save(manager, number).wait()
        program = """
            import concurrent.futures.thread, os, sys, threading
            import numpy as np
            import jaxckpt

            if os.geteuid() == 0:
                os.seteuid(65534)
            with jaxckpt.CheckpointManager(sys.argv[1], max_to_keep=1) as manager:
                for step in (3, 4):
                    pending = manager.save(step, {"w": np.ones(3)})
                    try:
                        pending.wait()
                    except jaxckpt.WriteError as error:
                        print("EACCES" in str(error), sys.argv[2] in str(error), threading.active_count())
                if sys.argv[3] == "reads":
                    print(manager.steps(), manager.restore()["number"])
        """
        try:
            for directory, _, _ in os.walk(run):
                os.chmod(directory, 0o555)
            before = listing(run)
            result = run_fork(program, run, "the newest committed step is 2", "reads")
            assert result.stdout.splitlines() == ["True True 1"] * 2 + ["[1, 2] 20"]
            os.chmod(run, 0o000)
            result = run_fork(program, run, "what is in the directory cannot be found out", "reads not")
            assert result.stdout.splitlines() == ["True True 1"] * 2
        finally:
            os.chmod(run, 0o755)
            for directory, _, _ in os.walk(run):
                os.chmod(directory, 0o755)
        assert listing(run) == before
        check_steps(run, {1: 10, 2: 20})


def test_a_file_in_the_place_of_the_directory(path: pathlib.Path) -> None:
    with nothing_leaks():
        manager = make_manager(path)
        save(manager, 10).wait()
        manager.wait()
        path.rename(path.with_name("moved"))
        path.write_text("mine")
        for number in (20, 30):
            with pytest.raises(jaxckpt.WriteError, match="ENOTDIR") as caught:
                save(manager, number).wait()
            assert "no step is committed" in str(caught.value)
            with pytest.raises(jaxckpt.WriteError):
                manager.wait()
        assert manager.steps() == []
        assert path.read_text() == "mine"
        path.unlink()
        save(manager, 40).wait()
        manager.close()
        check_steps(path, {4: 40})
        check_steps(path.with_name("moved"), {1: 10})


def test_a_file_in_the_place_of_a_step(path: pathlib.Path) -> None:
    with nothing_leaks():
        manager = make_manager(path, max_to_keep=1)
        save(manager, 10).wait()
        manager.wait()
        (path / "step_00000002").write_text("mine")
        with pytest.raises(jaxckpt.WriteError, match=r"ENOTDIR[^\0]*the newest committed step is 1"):
            save(manager, 20).wait()
        with pytest.raises(jaxckpt.WriteError):
            manager.wait()
        for number in (30, 40):
            save(manager, number).wait()
            manager.wait()
        manager.close()
        check_steps(path, {4: 40})
        assert (path / "step_00000002").read_text() == "mine"


# --- the directory goes away ----------------------------------------------------------------------------------


def delete_tree(directory: pathlib.Path) -> None:
    """Deletes a directory into which the threads of a save go on writing until they notice."""
    for _ in range(1000):
        try:
            shutil.rmtree(directory)
        except FileNotFoundError:
            pass
        except OSError as error:
            if error.errno != errno.ENOTEMPTY:
                raise
        if not directory.exists():
            return
    raise AssertionError(f"{directory} comes back again and again")


MOMENTS: dict[str, Callable[[Operation], bool]] = {
    "before begin": lambda operation: operation.call == "mkdir" and "/data-" in operation.path,
    "after begin": lambda operation: operation.call == "create",
    "before the packs": lambda operation: "/packs" in operation.path,
    "while writing": lambda operation: operation.call == "pwrite" and "/packs/" in operation.path,
    "before the first sync of a directory": lambda operation: operation.call == "open",
    "before publish": lambda operation: operation.call == "create" and "manifest.msgpack" in operation.path,
    "before the rename": lambda operation: operation.is_commit,
}


class ChangingKernel(GateKernel):
    """Does something at a moment, in the middle of a save."""

    def __init__(self, is_awaited: Callable[[Operation], bool], change: Callable[[], None]) -> None:
        super().__init__(is_awaited)
        self._change = change
        self._turn = threading.Lock()

    def before(self, operation: Operation) -> None:
        with self._turn:
            if not self.reached.is_set() and self._is_awaited(operation):
                self._change()
                self.reached.set()


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("what", ["deleted", "moved", "step deleted", "data deleted"])
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_directory_that_goes_away_during_a_save(
    path: pathlib.Path, moment: str, what: str, overwrite: bool
) -> None:
    """The save fails, or what it commits is whole: never a checkpoint without its data. The next save works."""
    moved = path.with_name("moved")
    step = path / "step_00000002"

    def change() -> None:
        if what == "deleted":
            delete_tree(path)
        elif what == "moved":
            path.rename(moved)
        elif what == "step deleted":
            delete_tree(step)
        else:
            old = set() if not overwrite else {jaxckpt.open(step).manifest.data}
            for data in set(step.glob("data-*")):
                if data.name not in old:
                    delete_tree(data)

    with nothing_leaks():
        with make_manager(path) as manager:
            for number in (10, 20) if overwrite else (10,):
                save(manager, number).wait()
        kernel = ChangingKernel(MOMENTS[moment], change)
        manager = make_manager(path, kernel)
        pending = save(manager, 21, overwrite=overwrite)
        error = pending.exception() if pending.wait_done() else None
        assert kernel.reached.is_set()
        if what == "data deleted" and moment in ("before publish", "before the rename") and error is None:
            # Nothing can tell between the last look and the rename; a reader does.
            assert not jaxckpt.verify(step).ok
            manager.wait()
            return
        if error is None:
            assert moment == "before begin"
            manager.wait()
            assert manager.latest_step() == 2
        else:
            assert isinstance(error, jaxckpt.WriteError)
            assert "ENOENT" in str(error)
            with pytest.raises(jaxckpt.WriteError):
                manager.wait()
            kept = {1: 10} | ({2: 20} if overwrite and what == "data deleted" else {})
            check_steps(path, kept if what in ("step deleted", "data deleted") else {})
        if what == "moved":
            check_steps(moved, {1: 10, 2: 20} if overwrite else {1: 10})
        for step_number in manager.steps():
            assert jaxckpt.verify(manager.path_of(step_number)).ok
        save(manager, 40).wait()
        save(manager, 50).wait()
        manager.close()
        check_steps(path, {4: 40, 5: 50})
        assert sorted(os.listdir(path)) == ["checkpoint.json", "step_00000004", "step_00000005"]
        for name in ("step_00000004", "step_00000005"):
            assert len(list((path / name).glob("data-*"))) == 1


class ChangingAfterKernel(NotedKernel):
    """Does something once, right after a call."""

    def __init__(self, is_awaited: Callable[[Operation], bool], change: Callable[[], None]) -> None:
        super().__init__()
        self._is_awaited = is_awaited
        self._change = change
        self.has_changed = False

    def after(self, operation: Operation) -> None:
        super().after(operation)
        if not self.has_changed and self._is_awaited(operation):
            self.has_changed = True
            self._change()


@pytest.mark.parametrize("moment", ["after the first object", "after the last sync"])
def test_a_directory_that_was_deleted_is_not_made_again_for_the_rest_of_a_save(
    path: pathlib.Path, moment: str
) -> None:
    """Else a manifest would be put beside a part of its data, or none."""
    step = path / "step_00000002"

    def is_awaited(operation: Operation) -> bool:
        if moment == "after the first object":
            return operation.call == "fsync" and "/data-" in operation.path
        return operation == Operation("fsync", str(step))

    def change() -> None:
        if moment == "after the first object":
            (new,) = {entry.name for entry in step.glob("data-*")} - {old}
            delete_tree(step / new)
        else:
            delete_tree(path)

    with nothing_leaks():
        with make_manager(path) as manager:
            save(manager, 10).wait()
            save(manager, 20).wait()
        old = jaxckpt.open(step).manifest.data
        kernel = ChangingAfterKernel(is_awaited, change)
        manager = make_manager(path, kernel, options=jaxckpt.SaveOptions(io_threads=1))
        # Few objects, so that no other directory than those that would be made again was written to.
        pending = manager.save(2, {"w": np.arange(5.0)}, overwrite=True)
        assert pending is not None
        with pytest.raises(jaxckpt.WriteError, match="ENOENT"):
            pending.wait()
        assert kernel.has_changed
        manager.close()
        check_steps(path, {1: 10, 2: 20} if moment == "after the first object" else {})
        assert not path.exists() or {entry.name for entry in step.glob("data-*")} == {old}


@pytest.mark.parametrize("what", ["deleted", "moved"])
def test_a_directory_that_goes_away_before_a_save(path: pathlib.Path, what: str) -> None:
    """Training that finds its directory gone makes it again."""
    with nothing_leaks():
        manager = make_manager(path)
        for number in (10, 20):
            save(manager, number).wait()
        manager.wait()
        if what == "deleted":
            delete_tree(path)
        else:
            path.rename(path.with_name("moved"))
        assert manager.steps() == []
        assert manager.latest_step() is None
        save(manager, 30).wait()
        manager.close()
        check_steps(path, {3: 30})
        if what == "moved":
            check_steps(path.with_name("moved"), {1: 10, 2: 20})


@pytest.mark.parametrize("what", ["deleted", "moved"])
@pytest.mark.parametrize("call", ["unlink", "open", "rmdir"])
def test_a_directory_that_goes_away_during_retention(path: pathlib.Path, what: str, call: str) -> None:
    moved = path.with_name("moved")

    def change() -> None:
        if what == "deleted":
            delete_tree(path)
        else:
            path.rename(moved)

    with nothing_leaks():
        manager = make_manager(path, max_to_keep=None)
        for number in (10, 20):
            save(manager, number).wait()
        manager.close()
        kernel = ChangingKernel(
            lambda operation: operation.call == call and "step_00000001" in operation.path, change
        )
        manager = make_manager(path, kernel, max_to_keep=2)
        save(manager, 30).wait()
        manager.wait()  # the save itself went well
        assert kernel.reached.is_set()
        assert manager.steps() == []
        if what == "moved":
            check_steps(moved, {2: 20, 3: 30} | ({1: 10} if call == "unlink" else {}))
        for number in (40, 50, 60):
            save(manager, number).wait()
        manager.close()
        check_steps(path, {5: 50, 6: 60})
        assert sorted(os.listdir(path)) == ["checkpoint.json", "step_00000005", "step_00000006"]


def test_a_step_that_is_deleted_by_hand_while_it_is_deleted(path: pathlib.Path) -> None:
    with nothing_leaks():
        manager = make_manager(path, max_to_keep=None)
        for number in (10, 20):
            save(manager, number).wait()
        manager.close()
        kernel = ChangingKernel(
            lambda operation: operation.call == "unlink" and "/data-" in operation.path,
            lambda: shutil.rmtree(path / "step_00000001"),
        )
        manager = make_manager(path, kernel, max_to_keep=2)
        save(manager, 30).wait()
        manager.close()
        assert kernel.reached.is_set()
        check_steps(path, {2: 20, 3: 30})
        assert sorted(os.listdir(path)) == ["checkpoint.json", "step_00000002", "step_00000003"]


def test_a_run_whose_only_step_may_not_be_durable_begins_anew(path: pathlib.Path) -> None:
    kernel = AfterTheCommit(errno.EIO, ("fsync",), 1)
    manager = make_manager(path, kernel)
    save(manager, 10)
    with pytest.raises(jaxckpt.WriteError):
        manager.wait()
    assert manager.resume() is None
    with pytest.raises(jaxckpt.NotFoundError):
        manager.restore()
    save(manager, 11).wait()
    resumed = manager.resume()
    assert resumed is not None
    assert_same_tree(resumed[1], tree_of(11))
    manager.close()
