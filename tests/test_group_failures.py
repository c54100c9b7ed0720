"""One process of a group fails, is killed or stopped, or passes something else: what do the others learn, and when?

All processes are real. Times are those of a clock that the processes of one machine share, from the moment in which one
of them fails. Many saves to different paths are under way at once where that saves waiting.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import errno
import functools
import os
import pathlib
import resource
import signal
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import pytest

import jaxckpt
from jaxckpt._commit import begin, join
from jaxckpt._processes import Session, current_group
from jaxckpt._saving import SaveContext, SaveJob
from jaxckpt._staging import HOST_MEMORY, PINNED_MEMORY
from jaxckpt._store import LocalStore

from .processes import Outcome, Worker, memory_groups, run_processes, run_threads, start_processes
from .storage_faults import GateKernel, NotedKernel, Operation, RefusingKernel, listing
from .test_many_processes import global_mesh, place

pytestmark = pytest.mark.slow

MIB = 1 << 20
# Far from the deadlines of the saves, and from what a busy machine takes.
KNOWN_WITHIN_S = 20.0
OPTIONS = jaxckpt.SaveOptions(pack_bytes_max=4096, io_threads=1, timeout_s=60)


def values(number: float, *shape: int) -> np.ndarray[Any, Any]:
    return (np.arange(int(np.prod(shape)), dtype=np.float32) + np.float32(number)).reshape(shape)


def make_tree(number: float = 0, rows: int = 128) -> dict[str, Any]:
    """A tree of which each process writes an object of its own and a pack."""
    from jax.sharding import PartitionSpec as P

    mesh = global_mesh()
    count = mesh.devices.size
    return {
        "rows": place(values(number, count * rows, 96), mesh, P("x")),
        "small": place(values(number, count * 8), mesh, P("x")),
        "host": values(number, 16),
        "own": jax.device_put(values(number, 4), jax.local_devices()[0]),
        "number": number,
    }


def assert_is_saved(path: pathlib.Path | str, number: float, count: int, rows: int = 128) -> None:
    """The checkpoint is whole, and is the one that so many processes saved."""
    assert jaxckpt.verify(path).ok
    tree = jaxckpt.restore(path)
    assert tree["number"] == number
    assert np.asarray(tree["rows"]).tobytes() == values(number, count * rows, 96).tobytes()
    assert np.asarray(tree["small"]).tobytes() == values(number, count * 8).tobytes()
    assert np.asarray(tree["host"]).tobytes() == values(number, 16).tobytes()


@dataclasses.dataclass(frozen=True)
class Ending:
    """How a save ended in one process.

    Attributes:
      error: What it raised.
      raised_s: When.
      failed_s: When something failed in this process.
    """

    error: BaseException | None
    raised_s: float
    failed_s: float | None = None


def end(save: Callable[[], Any]) -> Ending:
    try:
        save()
    except Exception as error:  # noqa: BLE001  the test looks at it
        return Ending(error, time.monotonic())
    return Ending(None, time.monotonic())


def ends_of(waits: Sequence[Callable[[], Any]]) -> list[Ending]:
    with concurrent.futures.ThreadPoolExecutor(len(waits)) as pool:
        return list(pool.map(end, waits))


def begin_save(store: Any, tree: Any, **context: Any) -> Callable[[], Any]:
    """Begins a save, and returns what waits for it. A failure may be known before the snapshot is taken."""
    try:
        return jaxckpt.save_async(store, tree, **context).wait
    except jaxckpt.CoordinationError as error:
        failure = error

    def fail() -> None:
        raise failure

    return fail


def what_is_open() -> set[str]:
    """Where the descriptors of this process lead, as far as they lead to files."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:
            continue
        if "/checkpoint" in target:
            found.add(target)
    return found


def assert_nothing_is_left() -> None:
    """No thread, descriptor or staging memory of a save is left in this process, within seconds."""
    deadline_s = time.monotonic() + 10
    left: Any = None
    while time.monotonic() < deadline_s:
        threads = [thread.name for thread in threading.enumerate() if thread.name.startswith("jaxckpt")]
        left = threads, what_is_open(), HOST_MEMORY.bytes_in_use, PINNED_MEMORY.bytes_in_use
        if left == ([], set(), 0, 0):
            return
        os.sched_yield()
    raise AssertionError(left)


def returned(outcomes: Sequence[Outcome]) -> list[Any]:
    """What all workers returned."""
    texts = [outcome.error_text for outcome in outcomes if outcome.error_text]
    assert not texts, "\n".join(texts)
    assert [outcome.status for outcome in outcomes] == ["returned"] * len(outcomes)
    return [outcome.value for outcome in outcomes]


def assert_all_know(endings: Sequence[Ending], process: int, *texts: str) -> None:
    """All processes raised, in time, an error that names a process and has these texts."""
    failed_s = endings[process].failed_s
    assert failed_s is not None
    for ending in endings:
        error = ending.error
        assert isinstance(error, jaxckpt.CoordinationError), error
        assert process in [failure.process for failure in error.failures], error
        for text in (f"process {process} of {len(endings)} failed: ", *texts):
            assert text in str(error), error
        assert ending.raised_s - failed_s < KNOWN_WITHIN_S, error


# --- a living process fails ---------------------------------------------------------------------------------------


class Unsaveable:
    """An item that has no state at this moment."""

    def get_state(self) -> Any:
        raise LookupError("the iterator is exhausted")

    def set_state(self, state: Any) -> None:
        raise AssertionError(state)


def failing_array() -> jax.Array:
    """An array of whose computation only the result tells that it failed."""

    def refuse(_: Any) -> Any:
        raise ArithmeticError("overflow in a kernel")

    shape = jax.ShapeDtypeStruct((8,), np.float32)
    fail = jax.jit(lambda x: jax.pure_callback(refuse, shape, x)).lower(shape).compile()
    # A call whose arguments are there runs at once, and raises.
    busy = jax.jit(lambda x: (x @ x @ x @ x)[0, :8])(np.ones((1000, 1000), np.float32))
    whole = make_tree()["small"]
    return jax.make_array_from_single_device_arrays(whole.shape, whole.sharding, [fail(busy)])


# What is different in the process that fails, and what its error says.
MISTAKES: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "leaf": (lambda: {"tree": make_tree() | {"x\ud800": object()}}, "UnsupportedLeafError: "),
    "key": (lambda: {"tree": {object(): 1}}, "UnsupportedLeafError: "),
    "computation": (lambda: {"tree": make_tree() | {"small": failing_array()}}, "overflow in a kernel"),
    "items": (lambda: {"items": {"data": Unsaveable()}}, "LookupError: the iterator is exhausted"),
    "metadata": (lambda: {"metadata": {"when": object()}}, "TypeError: metadata= must be plain data"),
    "path": (lambda: {"path": "file://elsewhere/x"}, "CheckpointError: 'file://elsewhere/x' names the host"),
}


def make_mistakes(worker: Worker, path: str) -> list[Ending]:
    endings = []
    for place_, name in enumerate(MISTAKES):
        for process, save in (
            (place_ % worker.count, save_blocking),
            ((place_ + 1) % worker.count, save_in_background),
        ):
            where = f"{path}/{name}-{process}"
            arguments: dict[str, Any] = {"path": where, "tree": make_tree(7), "options": OPTIONS}
            if worker.index == process:
                arguments |= MISTAKES[name][0]()
            worker.meet()
            began_s = time.monotonic()
            ending = end(functools.partial(save, **arguments))
            endings.append(dataclasses.replace(ending, failed_s=began_s))
            jaxckpt.save(where, make_tree(8), options=OPTIONS)
    assert_nothing_is_left()
    return endings


def save_blocking(**arguments: Any) -> None:
    jaxckpt.save(**arguments)


def save_in_background(**arguments: Any) -> None:
    jaxckpt.save_async(**arguments).wait()


def test_a_mistake_in_one_process_is_told_to_all_and_the_next_save_works(path: pathlib.Path) -> None:
    by_process = returned(run_processes(make_mistakes, 3, timeout_s=120, arguments=(str(path),)))
    endings = zip(*by_process, strict=True)
    for place_, (name, (_, text)) in enumerate(MISTAKES.items()):
        for process in (place_ % 3, (place_ + 1) % 3):
            assert_all_know(next(endings), process, text, "nothing was committed")
            assert_is_saved(path / f"{name}-{process}", 8, 3)
    assert set(os.listdir(path)) == {
        f"{name}-{process % 3}" for at, name in enumerate(MISTAKES) for process in (at, at + 1)
    }


def exceed_the_limit(worker: Worker, path: str) -> Ending:
    failed_s = None
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    if worker.index == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (16 << 10, most))
        failed_s = time.monotonic()
    ending = end(lambda: jaxckpt.save(path, make_tree(1), options=OPTIONS))
    if worker.index == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    worker.meet()
    assert not pathlib.Path(path).exists()
    worker.meet()
    jaxckpt.save(path, make_tree(2), options=OPTIONS)
    assert_nothing_is_left()
    return dataclasses.replace(ending, failed_s=failed_s)


def test_a_file_that_may_not_grow_in_one_process_is_told_to_all(path: pathlib.Path) -> None:
    endings = returned(run_processes(exceed_the_limit, 4, timeout_s=120, arguments=(str(path),)))
    assert_all_know(endings, 1, "OSError: [Errno 27] File too large", "nothing was committed")
    assert_is_saved(path, 2, 4)


class FailingKernel(RefusingKernel):
    """Knows when it first refused a call."""

    failed_s: float | None = None

    def before(self, operation: Operation) -> None:
        try:
            super().before(operation)
        except OSError:
            self.failed_s = self.failed_s or time.monotonic()
            raise


class AfterTheCommit(FailingKernel):
    """Refuses only when the manifest is in place."""

    def before(self, operation: Operation) -> None:
        if self.commits:
            super().before(operation)


def refuse_each(worker: Worker, path: str, process: int) -> list[Ending]:
    """Saves as often as a process makes calls; each time another one of its calls is refused."""
    context: dict[str, Any] = {"items": {"own": worker.index}, "options": OPTIONS}
    counted = NotedKernel()
    store: Any = LocalStore(f"{path}/counted", counted)
    jaxckpt.save(store, make_tree(1), **context)
    if worker.index == process:
        (worker.path / "count").write_text(str(len(counted.done)))
    worker.meet()
    count = int((worker.path / "count").read_text())
    kernels = []
    waits = []
    for at in range(1, count + 1):
        kernel = FailingKernel(errno.EIO, at=at if worker.index == process else 0)
        kernels.append(kernel)
        store = LocalStore(f"{path}/{at}", kernel)
        waits.append(begin_save(store, make_tree(1), **context))
    endings = ends_of(waits)
    assert_nothing_is_left()
    worker.meet()
    for at in (1, count):
        jaxckpt.save(f"{path}/{at}", make_tree(2), overwrite=True, **context)
    return [
        dataclasses.replace(ending, failed_s=kernel.failed_s)
        for ending, kernel in zip(endings, kernels, strict=True)
    ]


@pytest.mark.parametrize("process", [0, 2])
def test_whichever_call_storage_refuses_all_know_and_nothing_is_committed(
    path: pathlib.Path, process: int
) -> None:
    path.mkdir()
    by_process = returned(run_processes(refuse_each, 3, timeout_s=120, arguments=(str(path), process)))
    count = len(by_process[0])
    assert count > (15 if process == 0 else 5)
    late = refused = 0
    for at, endings in enumerate(zip(*by_process, strict=True), 1):
        where = path / str(at)
        if endings[process].failed_s is None:
            # Which of the processes makes a directory that several need is left to chance.
            assert [ending.error for ending in endings] == [None] * 3
            assert jaxckpt.verify(where).ok
            continue
        refused += 1
        is_committed = (where / "manifest.msgpack").exists()
        if at in (1, count):
            assert_is_saved(where, 2, 3)
            is_committed = "in place and whole" in str(endings[0].error)
        elif is_committed:
            assert_is_saved(where, 1, 3)
        else:
            assert [name for name in listing(where) if name != "zarr.json"] == []
        state = "the new checkpoint is in place and whole" if is_committed else "nothing was committed"
        assert_all_know(endings, process, "OSError: [Errno 5] Input/output error", state)
        late += is_committed
    assert refused > count // 2  # the others were for directories that another process made first
    # Only who commits can fail when it is done. How many of its calls come after that is left to chance, too.
    assert late == 0 or process == 0


def refuse_the_last_sync(worker: Worker, path: str) -> Ending:
    kernel = AfterTheCommit(errno.EIO, ("fsync",), at=1 if worker.index == 0 else 0)
    ending = end(begin_save(LocalStore(path, kernel), make_tree(1), options=OPTIONS))
    assert_nothing_is_left()
    return dataclasses.replace(ending, failed_s=kernel.failed_s)


def test_a_commit_that_may_be_lost_is_told_to_all_as_such(path: pathlib.Path) -> None:
    endings = returned(run_processes(refuse_the_last_sync, 3, arguments=(str(path),)))
    assert_all_know(endings, 0, "Input/output error", "the new checkpoint is in place and whole")
    assert_is_saved(path, 1, 3)


# --- while others are busy ----------------------------------------------------------------------------------------


def is_large_write(operation: Operation) -> bool:
    return operation.call == "pwrite" and "/rows/" in operation.path


class LateRefusal(FailingKernel):
    """Refuses the write of a large object when it is told to."""

    def __init__(self, wait: Callable[[], Any]) -> None:
        super().__init__(errno.ENOSPC, ("pwrite",), where="/rows/")
        self._wait = wait

    def before(self, operation: Operation) -> None:
        if is_large_write(operation):
            self._wait()
        super().before(operation)


def fail_while_others_write(worker: Worker, path: str, staging: Any, in_background: bool) -> Ending:
    """The storage of processes 0 and 1 hangs in a write, and their memory is used up, when process 2 fails."""
    options = dataclasses.replace(OPTIONS, host_bytes_max=2 * MIB, staging=staging)

    def note_write(operation: Operation) -> bool:
        is_awaited = is_large_write(operation)
        if is_awaited:
            worker.send("writes")
        return is_awaited

    gate = GateKernel(note_write)
    refusal = LateRefusal(worker.receive)
    store: Any = LocalStore(path, refusal if worker.index == 2 else gate)
    tree = make_tree(3, rows=16 * 1024)  # 4 MiB in each process
    save = save_in_background if in_background else save_blocking
    ending = end(functools.partial(save, path=store, tree=tree, options=options))
    gate.may_go_on.set()
    assert_nothing_is_left()
    worker.meet()
    jaxckpt.save(path, tree, options=options)
    return dataclasses.replace(ending, failed_s=refusal.failed_s)


@pytest.mark.parametrize(("staging", "in_background"), [("pool", False), ("pool", True), ("pinned", True)])
def test_nobody_waits_for_storage_that_hangs_in_another_process(
    path: pathlib.Path, staging: str, in_background: bool
) -> None:
    arguments = (str(path), staging, in_background)
    with start_processes(fail_while_others_write, 3, arguments=arguments) as group:
        for process in (0, 1):
            assert group.receive(process) == "writes"
        group.send(2, "go on")
        endings = returned(group.wait(60))
    assert_all_know(endings, 2, "OSError: [Errno 28] No space left on device", "nothing was committed")
    assert len(list(path.glob("data-*"))) == 1
    assert_is_saved(path, 3, 3, rows=16 * 1024)


class TimedGate(GateKernel):
    """Knows when it first deleted something, and when it last did anything else."""

    deleted_s = worked_s = 0.0

    def after(self, operation: Operation) -> None:
        if operation.call in ("unlink", "rmdir"):
            self.deleted_s = self.deleted_s or time.monotonic()
        else:
            self.worked_s = time.monotonic()


def delete_when_all_have_stopped(worker: Worker, path: str) -> tuple[float, float]:
    """Process 1 is in a write when 2 fails, and leaves it when process 0 waits."""

    def note_write(operation: Operation) -> bool:
        is_awaited = worker.index == 1 and is_large_write(operation)
        if is_awaited:
            worker.send("writes")
        return is_awaited

    def open_gate() -> None:
        group = current_group()
        assert group is not None
        group._channel.wait_for("jaxckpt/0/settled/0", 30)  # process 0 has stopped, and waits for the others
        worker.send("0 waits")
        worker.receive()
        gate.may_go_on.set()

    gate = TimedGate(note_write)
    if worker.index == 1:
        threading.Thread(target=open_gate, daemon=True).start()
    store: Any = LocalStore(path, LateRefusal(worker.receive) if worker.index == 2 else gate)
    ending = end(lambda: jaxckpt.save(store, make_tree(1), options=OPTIONS))
    assert isinstance(ending.error, jaxckpt.CoordinationError)
    return gate.worked_s, gate.deleted_s


def test_process_0_deletes_what_was_written_when_all_have_stopped_writing(path: pathlib.Path) -> None:
    with start_processes(delete_when_all_have_stopped, 3, arguments=(str(path),)) as group:
        assert group.receive(1) == "writes"
        group.send(2, "go on")
        assert group.receive(1) == "0 waits"
        group.send(1, "go on")
        (_, deleted_s), (worked_s, _), _ = returned(group.wait(60))
    assert 0 < worked_s < deleted_s
    assert listing(path) == []


def test_what_process_0_has_deleted_is_not_made_anew(path: pathlib.Path) -> None:
    attempt = begin(LocalStore(str(path)), may_overwrite=False)
    attempt.put_metadata("zarr.json", b"{}")
    other = LocalStore(str(path))
    guest = join(other, attempt.data)
    attempt.abandon()
    with pytest.raises(FileNotFoundError):
        guest.put_metadata("items/1", b"late")
    guest.abandon()
    assert not path.exists()


def come_late(worker: Worker, path: str) -> list[Ending]:
    """Process 1 fails at different points, while process 2 is still busy with something else."""
    endings = []
    jaxckpt.save(f"{path}/first", make_tree(1), options=OPTIONS)
    for name in ("leaf", "computation", "items"):
        arguments: dict[str, Any] = {"path": f"{path}/{name}", "tree": make_tree(1), "options": OPTIONS}
        if worker.index == 1:
            arguments |= MISTAKES[name][0]()
        worker.meet()
        began_s = time.monotonic()
        if worker.index == 2:
            worker.receive()
            began_s = time.monotonic()
        ending = end(functools.partial(save_in_background, **arguments))
        worker.send("raised")
        endings.append(dataclasses.replace(ending, failed_s=began_s))
    jaxckpt.save(path, make_tree(2), options=OPTIONS)
    assert_nothing_is_left()
    return endings


def test_a_failure_is_told_without_waiting_for_a_process_that_comes_late(path: pathlib.Path) -> None:
    with start_processes(come_late, 3, arguments=(str(path),)) as group:
        for _ in range(3):
            assert [group.receive(process) for process in (0, 1)] == ["raised"] * 2
            group.send(2, "go on")
            assert group.receive(2) == "raised"
        by_process = returned(group.wait(60))
    for zeroth, first, second in zip(*by_process, strict=True):
        assert_all_know([zeroth, first, first], 1, "nothing was committed")
        assert second.failed_s is not None
        late = dataclasses.replace(second, failed_s=None)
        assert_all_know([late, dataclasses.replace(second), late], 1, "nothing was committed")
    assert_is_saved(path, 2, 3)


# --- processes that pass something else ---------------------------------------------------------------------------


def save_step(path: str, tree: Any, step: int) -> None:
    SaveJob(path, tree, False, SaveContext(step=step), OPTIONS, is_blocking=True).run()


def changed(**leaves: Any) -> dict[str, Any]:
    tree = make_tree(1) | leaves
    return {key: leaf for key, leaf in tree.items() if leaf is not None}


def resharded() -> jax.Array:
    return place(
        values(1, 128 * jax.process_count(), 96), global_mesh(), jax.sharding.PartitionSpec(None, "x")
    )


# What another process passes, the key or the argument that differs, and what it is elsewhere and there.
DIFFERENCES: dict[str, tuple[Callable[[], dict[str, Any]], str, str, str]] = {
    "more": (lambda: {"tree": changed(extra=1)}, "extra", "here, but not in process 0", ""),
    "less": (lambda: {"tree": changed(own=None)}, "own", "not here, but in process 0", ""),
    "structure": (lambda: {"tree": changed(host=[values(1, 16)])}, "host", "not here, but in process 0", ""),
    "shape": (lambda: {"tree": changed(host=values(1, 2, 8))}, "host", "(2, 8)", "(16,)"),
    "dtype": (lambda: {"tree": changed(host=values(1, 16).astype(np.int8))}, "host", "int8", "float32"),
    "kind": (lambda: {"tree": changed(own=values(1, 4))}, "own", "numpy", "array"),
    "sharding": (lambda: {"tree": changed(rows=resharded())}, "rows", "P(None, 'x')", "P('x')"),
    "step": (lambda: {"step": 8}, "step", "8", "7"),
    "overwrite": (lambda: {"overwrite": True}, "overwrite", "True", "False"),
    "options": (
        lambda: {"options": dataclasses.replace(OPTIONS, chunk_bytes_max=1 << 15)},
        "options",
        "[32768, 4096]",
        "[67108864, 4096]",
    ),
}


def differ(worker: Worker, path: str) -> list[Ending]:
    endings = []
    for place_, name in enumerate(DIFFERENCES):
        arguments: dict[str, Any] = {"path": f"{path}/nothing", "tree": make_tree(1), "options": OPTIONS}
        save: Callable[..., Any] = save_in_background if place_ % 2 else save_blocking
        if name == "step":
            save = save_step
            arguments = {"path": f"{path}/nothing", "tree": make_tree(1), "step": 7}
        if worker.index in different_processes(place_):
            arguments |= DIFFERENCES[name][0]()
        worker.meet()
        began_s = time.monotonic()
        endings.append(dataclasses.replace(end(functools.partial(save, **arguments)), failed_s=began_s))
    jaxckpt.save(f"{path}/whole", make_tree(2), options=OPTIONS)
    assert_nothing_is_left()
    return endings


def different_processes(place_: int) -> tuple[int, ...]:
    return ((1,), (1, 2), (0,))[place_ % 3]


def test_processes_that_pass_different_things_hear_who_differs_and_where(path: pathlib.Path) -> None:
    path.mkdir()
    by_process = returned(run_processes(differ, 3, timeout_s=120, arguments=(str(path),)))
    for place_, endings in enumerate(zip(*by_process, strict=True)):
        name = list(DIFFERENCES)[place_]
        _, key, there, elsewhere = DIFFERENCES[name]
        different = different_processes(place_)
        # Process 0 is what the others are compared with.
        named = (1, 2) if different == (0,) else different
        for ending in endings:
            error = ending.error
            assert isinstance(error, jaxckpt.ProcessMismatchError), (name, error)
            assert isinstance(error, jaxckpt.MismatchError)
            assert [failure.process for failure in error.failures] == list(named), (name, error)
            assert ending.raised_s - ending.failed_s < KNOWN_WITHIN_S
            for process in named:
                text = "\n".join(line for line in str(error).splitlines() if f"process {process}: " in line)
                assert key in text, (name, text)
                if different != (0,):
                    assert there in text, (name, text)
                assert there in text or name in ("more", "less", "structure"), (name, text)
                assert elsewhere in text, (name, text)
            assert "nothing was written" in str(error)
    assert os.listdir(path) == ["whole"]
    assert_is_saved(path / "whole", 2, 3)


def save_elsewhere(worker: Worker, path: str) -> Ending:
    began_s = time.monotonic()
    where = pathlib.Path(path) / f"disk-{worker.index}" / "checkpoint"
    ending = end(lambda: jaxckpt.save(where, make_tree(1), options=OPTIONS))
    assert_nothing_is_left()
    worker.meet()
    return dataclasses.replace(ending, failed_s=began_s)


def test_processes_that_do_not_share_a_file_system_are_told_so(path: pathlib.Path) -> None:
    endings = returned(run_processes(save_elsewhere, 3, timeout_s=120, arguments=(str(path),)))
    for ending in endings:
        error = ending.error
        assert isinstance(error, jaxckpt.CoordinationError)
        # Both find it out for themselves; who hears of the first does not wait for the second.
        failed = {failure.process for failure in error.failures}
        assert failed in ({1}, {2}, {1, 2}), error
        for process in failed:
            assert f"process {process}" in str(error)
            assert ending.raised_s - endings[process].failed_s < KNOWN_WITHIN_S
        assert "not the same directory for all processes" in str(error)
    assert [name for name in listing(path) if name != "disk-0/"] == []


# --- processes that are killed or stopped -------------------------------------------------------------------------

PHASES = ("snapshot", "write", "part", "manifest")
HEARTBEAT_S = 4


class SignallingKernel(NotedKernel):
    """Sends a signal before a call, once."""

    def __init__(self, is_awaited: Callable[[Operation], bool], send: Callable[[], None]) -> None:
        super().__init__()
        self._is_awaited = is_awaited
        self._send = send
        self._has_sent = False

    def before(self, operation: Operation) -> None:
        with self.lock:
            is_due = not self._has_sent and self._is_awaited(operation)
            self._has_sent |= is_due
        if is_due:
            self._send()


class SignallingItem:
    """An item that sends a signal when it is asked for its state."""

    def __init__(self, send: Callable[[], None]) -> None:
        self._send = send

    def get_state(self) -> Any:
        self._send()
        return None

    def set_state(self, state: Any) -> None:
        raise AssertionError(state)


def save_until_signal(
    worker: Worker, path: str, phase: str, victim: int, number: signal.Signals, timeout_s: float
) -> Ending:
    """Saves one checkpoint, then another one over it, during which a process gets a signal."""
    options = dataclasses.replace(OPTIONS, timeout_s=timeout_s)
    jaxckpt.save(path, make_tree(1), options=OPTIONS)
    worker.meet()

    def send() -> None:
        worker.send(time.monotonic())
        os.kill(worker.pids[victim], number)

    # Process 0 writes the manifest; in this phase it is the one that sends the signal, to whomever.
    sender = 0 if phase == "manifest" else victim
    awaited: dict[str, Callable[[Operation], bool]] = {
        "snapshot": lambda _: False,
        "write": is_large_write,
        "part": lambda operation: operation.call == "create" and "/parts/" in operation.path,
        "manifest": lambda operation: operation.is_commit,
    }
    store: Any = LocalStore(path, SignallingKernel(awaited[phase], send) if worker.index == sender else None)
    items = {"item": SignallingItem(send) if (phase, worker.index) == ("snapshot", victim) else None}
    ending = end(lambda: jaxckpt.save(store, make_tree(2), overwrite=True, items=items, options=options))
    worker.send(ending)
    return ending


@dataclasses.dataclass(frozen=True)
class Blow:
    """A signal to one process at one point of a save."""

    phase: str
    victim: int
    number: signal.Signals
    recoverable: bool = False

    def __str__(self) -> str:
        return f"{self.phase}-{self.victim}-{self.number.name}"

    @property
    def sender(self) -> int:
        return 0 if self.phase == "manifest" else self.victim


def strike(
    path: pathlib.Path, blows: Sequence[Blow], count: int, *, timeout_s: float, heartbeat_s: int
) -> dict[Blow, list[tuple[float, Ending | None]]]:
    """What becomes of the survivors: after how many seconds, and how their save ended unless they were aborted."""

    def await_end(blow: Blow, survivor: int) -> tuple[float, Ending | None]:
        try:
            ending = groups[blow].receive(survivor, 60)
        except AssertionError:  # it ended without a word
            return time.monotonic(), None
        return ending.raised_s, ending

    def watch(blow: Blow) -> list[tuple[float, Ending | None]]:
        failed_s = groups[blow].receive(blow.sender, 60)
        survivors = [index for index in range(count) if index != blow.victim]
        with concurrent.futures.ThreadPoolExecutor(count) as pool:
            ends = pool.map(functools.partial(await_end, blow), survivors)
        return [(end_s - failed_s, ending) for end_s, ending in ends]

    groups = {}
    try:
        for blow in blows:
            arguments = (str(path / str(blow)), blow.phase, blow.victim, blow.number, timeout_s)
            groups[blow] = start_processes(
                save_until_signal,
                count,
                heartbeat_s=heartbeat_s,
                recoverable=blow.recoverable,
                arguments=arguments,
            )
        with concurrent.futures.ThreadPoolExecutor(len(blows)) as pool:
            found = dict(zip(blows, pool.map(watch, blows), strict=True))
        # Whoever was stopped goes on, when all is over.
        for blow in blows:
            groups[blow].send_signal(blow.victim, signal.SIGCONT)
        for blow in blows:
            groups[blow].wait(20)
    finally:
        for group in groups.values():
            group.close()
    return found


def resume_all(worker: Worker, path: str, names: list[str], old_count: int) -> list[float]:
    """Restores every checkpoint, and saves over it."""
    mesh = global_mesh()
    found = []
    for name in names:
        tree = jaxckpt.restore(f"{path}/{name}", mesh=mesh)
        number = tree["number"]
        want = values(number, old_count * 128, 96)
        for shard in tree["rows"].addressable_shards:
            assert np.asarray(shard.data).tobytes() == want[shard.index].tobytes()
        jaxckpt.save(f"{path}/{name}", make_tree(3), overwrite=True, options=OPTIONS)
        found.append(number)
    return found


def assert_all_resume(path: pathlib.Path, blows: Sequence[Blow], count: int) -> list[float]:
    """A group of as many processes, then a single one, goes on from what is there; what there was."""
    names = [str(blow) for blow in blows]
    for name in names:
        assert jaxckpt.verify(path / name).ok
    found, *_ = returned(run_processes(resume_all, count, arguments=(str(path), names, count)))
    for name in names:
        assert_is_saved(path / name, 3, count)
        jaxckpt.save(path / name, {"alone": values(4, 9)}, overwrite=True)
        assert jaxckpt.verify(path / name).ok
    return found


@pytest.mark.parametrize("victim", [0, 1])
def test_the_death_of_a_process_ends_the_others_and_loses_nothing(path: pathlib.Path, victim: int) -> None:
    blows = [Blow(phase, victim, number) for number in (signal.SIGKILL, signal.SIGSTOP) for phase in PHASES]
    found = strike(path, blows, 2, timeout_s=60, heartbeat_s=HEARTBEAT_S)
    for blow, ((seconds, ending),) in found.items():
        assert seconds < HEARTBEAT_S + KNOWN_WITHIN_S, blow
        if victim == 1 and blow.phase == "manifest":  # it was not needed any more
            assert ending is not None
            assert ending.error is None
        else:
            assert ending is None or isinstance(ending.error, jaxckpt.CoordinationError)
    resumed = assert_all_resume(path, blows, 2)
    for blow, number in zip(blows, resumed, strict=True):
        # A process 0 that was stopped before the manifest commits when it goes on: all was there.
        assert number == 1 or (blow.phase == "manifest" and (victim == 1 or blow.number == signal.SIGSTOP))


def test_the_deadline_names_a_process_that_is_dead_or_stopped(path: pathlib.Path) -> None:
    blows = [Blow(phase, 1, signal.SIGKILL, recoverable=True) for phase in PHASES]
    blows += [Blow(phase, 1, signal.SIGSTOP) for phase in PHASES]
    timeout_s = 2.0
    found = strike(path, blows, 3, timeout_s=timeout_s, heartbeat_s=30)
    for blow in blows:
        # Process 0 has deleted what was written, and whoever went on later has not made it anew.
        assert len(list((path / str(blow)).glob("data-*"))) == 1, blow
    for blow, survivors in found.items():
        for seconds, ending in survivors:
            assert ending is not None, blow
            assert seconds < timeout_s + KNOWN_WITHIN_S, blow
            if blow.phase == "manifest":
                assert ending.error is None
                continue
            assert isinstance(ending.error, jaxckpt.CoordinationError)
            assert "process 1 of 3 did not answer within 2 s" in str(ending.error), ending.error
            assert "nothing was committed" in str(ending.error)
            assert [(each.process, each.kind) for each in ending.error.failures] == [(1, "silent")]
    resumed = assert_all_resume(path, blows, 3)
    assert resumed == [2 if blow.phase == "manifest" else 1 for blow in blows]


# --- what a failure says ------------------------------------------------------------------------------------------


def fail_second(group: Any) -> tuple[Any, Any]:
    session: Session = group.open_session("save 'x'", 10)
    if group.index == 1:
        session.fail(jaxckpt.UnsupportedLeafError("cannot save it"))
        group.posted.set()
        return None, None
    assert group.posted.wait(10)
    with pytest.raises(jaxckpt.CoordinationError) as caught:
        session.check()
    assert session.fail(caught.value) is caught.value
    own = jaxckpt.UnsupportedLeafError(
        "cannot save that", [jaxckpt.Problem("bad\ud800", "leaf", "is a socket\udc80")]
    )
    return own, session.fail(own)


def test_an_error_of_its_own_is_told_by_a_process_that_knows_of_another_one() -> None:
    groups: Any = memory_groups(2)
    groups[0].posted = groups[1].posted = threading.Event()
    (own, failure), _ = returned(run_threads(groups, fail_second))
    assert type(failure) is jaxckpt.CoordinationError
    assert failure is not own
    assert [each.process for each in failure.failures] == [0, 1]
    assert failure.problems == own.problems
