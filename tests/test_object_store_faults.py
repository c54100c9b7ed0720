"""Every request of a save, a restore and a deletion fails in every way, and processes are killed at each of them.

Whatever happens, a step is whole or not there, what was committed before stays, nothing wrong is read, and an error
names the object. Each test goes on with the next request until there is none; which requests those are is not assumed.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import secrets
import select
import signal
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import jaxckpt
from jaxckpt import CheckpointManager, SaveOptions

from .helpers import assert_same_tree
from .object_servers import Remote
from .processes import start_program
from .proxy import FAULTS as ALL_FAULTS, Rule

pytestmark = [pytest.mark.slow, pytest.mark.object_stores]

SMALL = SaveOptions(pack_bytes_max=4096)
NO_RETRIES = {"max_retries": 0}
SOME_RETRIES = {"max_retries": 4, "initial_delay": "1ms", "max_delay": "2ms"}
# Of the two errors that a store answers with, one is met at every request.
FAULTS = [fault for fault in ALL_FAULTS if fault != "500"]
# What a request is about, as the user knows it.
OBJECT = r"manifest\.msgpack|data-[0-9a-f]{16}|zarr\.json|checkpoint\.json|step_[0-9]+|run"


def tree_of(number: int) -> dict[str, Any]:
    """Packed arrays, an array in an object of its own, and a value; 40 KB."""
    return {
        "layers": [{"w": np.arange(50.0) + number, "b": np.full(3, number, np.int16)} for _ in range(2)],
        "own": np.full(5000, number, np.float64),
        "number": number,
    }


@pytest.fixture
def prefix() -> str:
    return f"test-{secrets.token_hex(6)}"


@contextlib.contextmanager
def each_request(remote: Remote, fault: str, first: int = 0, stride: int = 1) -> Iterator[Iterator[Rule]]:
    """Rules for one request after the other, until one met none."""

    def rules() -> Iterator[Rule]:
        for number in itertools.count(first, stride):
            remote.proxy.reset()
            rule = remote.proxy.inject(fault, skip=number)
            yield rule
            assert number < 200
            if rule.hits == 0:
                assert number > stride, "no request came at all"
                return

    yield rules()
    remote.proxy.reset()


def manager_of(url: str, **rules: Any) -> CheckpointManager:
    rules = {"max_to_keep": 2, "options": SMALL, "save_last": False} | rules
    return CheckpointManager(url, **rules)


def save(manager: CheckpointManager, number: int) -> jaxckpt.PendingSave:
    """Saves step ``number // 10``; the last digit tells saves of one step apart."""
    pending = manager.save(number // 10, tree_of(number), items={"at": number}, force=True, overwrite=True)
    assert pending is not None
    return pending


def assert_steps(url: str, numbers: dict[int, int]) -> None:
    """These saves are there, whole, and no others, for whoever looks anew."""
    manager = CheckpointManager(url)
    assert manager.steps() == sorted(numbers)
    for step, number in numbers.items():
        assert_same_tree(manager.restore(step), tree_of(number))
        assert manager.open(step).items == {"at": number}
        assert jaxckpt.verify(manager.path_of(step)).ok


def failure_of(work: Callable[[], object]) -> BaseException | None:
    """What a call raised, which names an object, or None."""
    try:
        work()
    except (jaxckpt.CheckpointError, OSError) as error:
        assert_names_an_object(error)
        return error
    return None


def assert_names_an_object(error: BaseException) -> None:
    assert re.search(OBJECT, str(error)), error


def whole_tree(url: str) -> Any:
    """The tree of a checkpoint that is whole, or None when there is none."""
    try:
        return jaxckpt.restore(url)
    except jaxckpt.NotFoundError:
        return None


def litter(remote: Remote, prefix: str, steps: list[int]) -> list[str]:
    """Objects that belong to none of these steps, each with one directory of data."""
    names = list(remote.objects(prefix))
    expected = {f"step_{step:08}" for step in steps} | {"checkpoint.json"}
    strangers = [name for name in names if name.partition("/")[0] not in expected]
    data = {name.rpartition("data-")[0] + name.split("data-")[1][:16] for name in names if "data-" in name}
    return strangers + sorted(data)[len(steps) :]


# --- one fault ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", FAULTS)
def test_a_save_that_meets_a_fault_is_whole_or_not_there(remote: Remote, prefix: str, fault: str) -> None:
    outcomes: set[str] = set()
    with each_request(remote, fault) as rules:
        for number, rule in enumerate(rules):
            url = remote.url(f"{prefix}/{number}", **NO_RETRIES)
            failure = failure_of(
                lambda url=url, number=number: jaxckpt.save(url, tree_of(number), options=SMALL)
            )
            assert failure is None or isinstance(failure, jaxckpt.WriteError)
            found = undisturbed(remote, lambda url=url: whole_tree(url))
            if found is None:
                assert failure is not None
                assert rule.hits == 1
            else:
                assert_same_tree(found, tree_of(number))
            outcomes.add("saved" if failure is None else "error")
    # Of the answer to a PUT in S3 there is no body that could be cut.
    assert (
        outcomes == {"saved"}
        if (remote.scheme, fault) == ("s3", "cut answer")
        else outcomes >= {"error", "saved"}
    )


@pytest.mark.parametrize("fault", ["503", "drop before", "cut request", "drop after"])
def test_an_overwrite_that_meets_a_fault_leaves_the_old_or_the_new(
    s3: Remote, prefix: str, fault: str
) -> None:
    url = s3.url(f"{prefix}/run", **NO_RETRIES)
    old = 0
    jaxckpt.save(url, tree_of(old), options=SMALL)
    with each_request(s3, fault) as rules:
        for number, _ in enumerate(rules, start=1):
            failure = failure_of(
                lambda number=number: jaxckpt.save(url, tree_of(number), overwrite=True, options=SMALL)
            )
            found = undisturbed(s3, lambda: jaxckpt.restore(url))
            assert found["number"] in ((number,) if failure is None else (old, number))
            old = found["number"]
            assert_same_tree(found, tree_of(old))


def undisturbed(remote: Remote, work: Callable[[], Any]) -> Any:
    """Does something past all rules, which stay."""
    with remote.proxy._lock:
        rules, remote.proxy._rules = remote.proxy._rules, []
    try:
        return work()
    finally:
        with remote.proxy._lock:
            remote.proxy._rules = rules


@pytest.mark.parametrize("fault", ["503", "cut request", "drop after", "cut answer"])
def test_a_retry_makes_up_for_a_fault(s3: Remote, prefix: str, fault: str) -> None:
    url = s3.url(f"{prefix}/run", **SOME_RETRIES)
    with each_request(s3, fault) as rules:
        for number, _ in enumerate(rules):
            jaxckpt.save(url, tree_of(number), overwrite=True, options=SMALL)
            assert_same_tree(undisturbed(s3, lambda: jaxckpt.restore(url)), tree_of(number))
    with each_request(s3, fault) as rules:
        for _ in rules:
            assert_same_tree(jaxckpt.restore(url), tree_of(number))
    # Whatever was written twice was written in one place.
    data = {name[:21] for name in s3.objects(f"{prefix}/run/") if name.startswith("data-")}
    assert len(data) == 1


@pytest.mark.parametrize("fault", [*FAULTS, "flip"])
def test_a_restore_that_meets_a_fault_is_right_or_an_error(remote: Remote, prefix: str, fault: str) -> None:
    url = remote.url(f"{prefix}/run", **NO_RETRIES)
    tree = tree_of(1)
    jaxckpt.save(url, tree, options=SMALL)
    outcomes: set[str] = set()
    readers: list[Callable[[], Any]] = [
        lambda: jaxckpt.restore(url),
        lambda: {**tree, "own": jaxckpt.open(url)["own"][...]},
        lambda: tree if jaxckpt.verify(url).ok else None,
    ]
    for read in readers:
        with each_request(remote, fault) as rules:
            for rule in rules:
                got: list[Any] = []
                error = failure_of(lambda read=read, got=got: got.append(read()))
                if error is None:
                    if got != [None]:
                        assert_same_tree(got[0], tree)
                    continue
                assert rule.hits == 1
                outcomes.add(type(error).__name__)
                if fault == "flip":
                    continue
                # What was not answered is neither gone nor damaged.
                assert not isinstance(error, (jaxckpt.NotFoundError, FileNotFoundError)), error
                kinds = {problem.kind for problem in getattr(error, "problems", ())}
                assert kinds <= {"unreadable"}, error
    assert outcomes


@pytest.mark.parametrize("fault", ["503", "cut answer"])
def test_a_fault_of_the_network_never_makes_a_manager_take_an_older_step(
    s3: Remote, prefix: str, fault: str
) -> None:
    url = s3.url(f"{prefix}/run", **NO_RETRIES)
    with manager_of(url) as manager:
        for number in (10, 20):
            save(manager, number).wait()
    with each_request(s3, fault) as rules:
        for _ in rules:
            for ask in (lambda manager: manager.restore(), lambda manager: (manager.resume() or (0, {}))[1]):
                with contextlib.suppress(jaxckpt.CheckpointError, OSError):
                    assert_same_tree(ask(CheckpointManager(url)), tree_of(20))


@pytest.mark.parametrize(("fault", "first"), [("503", 0), ("drop before", 1), ("drop after", 2)])
def test_a_manager_that_meets_a_fault_goes_on(s3: Remote, prefix: str, fault: str, first: int) -> None:
    url = s3.url(f"{prefix}/run", **NO_RETRIES)
    numbers: dict[int, int] = {}
    with manager_of(url) as manager:
        save(manager, 10).wait()
        manager.wait()
    numbers = {1: 10}
    # Some fifty requests, each of which meets one of the three faults.
    with each_request(s3, fault, first, stride=3) as rules:
        for count, _ in enumerate(rules):
            step = 2 + 2 * count
            manager = manager_of(url)
            with contextlib.suppress(jaxckpt.CheckpointError):
                save(manager, 10 * step).wait()
                numbers[step] = 10 * step
            with contextlib.suppress(jaxckpt.CheckpointError):
                manager.wait()
            there = undisturbed(s3, lambda: CheckpointManager(url).steps())
            assert set(numbers) - set(there) <= set(sorted(numbers)[:-2])
            assert set(there) <= {*numbers, step}
            # The next save of this manager makes up for all.
            undisturbed(s3, lambda manager=manager, step=step: save(manager, 10 * step + 10).wait())
            undisturbed(s3, manager.close)
            numbers[step + 1] = 10 * step + 10
            kept = undisturbed(s3, lambda: CheckpointManager(url).steps())
            assert kept[-1] == step + 1
            assert set(kept) <= {*numbers, step}
            numbers = {step: 10 * step for step in kept}
    assert len(kept) == 2
    assert_steps(url, {step: 10 * step for step in kept})
    with manager_of(url) as manager:
        save(manager, 10 * kept[-1] + 10).wait()
        manager.wait()
    assert litter(s3, f"{prefix}/run/", manager.steps()) == []


# --- failure for good -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["500", "503", "drop before", "cut request"])
def test_a_store_that_fails_for_good_is_an_error_after_bounded_retries(
    remote: Remote, prefix: str, fault: str
) -> None:
    url = remote.url(f"{prefix}/run", **SOME_RETRIES)
    with manager_of(url) as manager:
        save(manager, 10).wait()
        manager.wait()
        remote.proxy.reset()
        remote.proxy.inject(fault, "put", times=None)
        pending = save(manager, 20)
        with pytest.raises(jaxckpt.WriteError, match=OBJECT):
            pending.wait()
        by_name: dict[str, int] = {}
        for request in remote.proxy.requests:
            if request.kind == "put":
                by_name[request.name] = by_name.get(request.name, 0) + 1
        # One request and four more; the client sends one again by itself where a connection was used before.
        assert 5 <= max(by_name.values()) <= 10
        remote.proxy.reset()
        assert_steps(url, {1: 10})
        save(manager, 30).wait()
        with pytest.raises(jaxckpt.WriteError):
            manager.wait()
        assert_steps(url, {1: 10, 3: 30})
    remote.proxy.reset()
    remote.proxy.inject(fault, "get|list|head", times=None)
    for ask in (
        lambda: manager.restore(3),
        lambda: CheckpointManager(url).steps(),
        lambda: jaxckpt.restore(remote.url(f"{prefix}/run/step_00000003", **SOME_RETRIES)),
    ):
        with pytest.raises((jaxckpt.CheckpointError, OSError), match=OBJECT) as failed:
            ask()
        assert not isinstance(failed.value, (jaxckpt.NotFoundError, jaxckpt.CorruptError))
    # What is there cannot be found out: nobody may take that for an empty directory and begin anew.
    with pytest.raises((jaxckpt.CheckpointError, OSError)):
        CheckpointManager(url).resume()


def test_a_dead_endpoint_is_an_error_soon(s3: Remote) -> None:
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        port = nobody.getsockname()[1]
    url = s3.url("x/run", endpoint=f"http://127.0.0.1:{port}", **SOME_RETRIES)
    began_s = time.monotonic()
    with pytest.raises(jaxckpt.WriteError, match=r"(?i)x/run.*connect"):
        jaxckpt.save(url, tree_of(1))
    with pytest.raises(jaxckpt.CheckpointError, match=r"(?i)x/run.*connect"):
        jaxckpt.restore(url)
    with pytest.raises(OSError, match=r"(?i)connect.*x/run"):
        CheckpointManager(url).steps()
    with pytest.raises(jaxckpt.WriteError, match=r"(?i)x/run.*connect"):
        save(manager_of(url), 10).wait()
    assert time.monotonic() - began_s < 30


def test_a_server_that_says_nothing_is_an_error_in_time(remote: Remote, prefix: str) -> None:
    url = remote.url(f"{prefix}/run", max_retries=0, timeout_s=0.5)
    jaxckpt.save(url, tree_of(1), options=SMALL)
    verbs: dict[str, Callable[[], object]] = {
        "put": lambda: jaxckpt.save(url, tree_of(2), overwrite=True, options=SMALL),
        "get|head|list": lambda: jaxckpt.restore(url),
    }
    for kind, verb in verbs.items():
        remote.proxy.reset()
        remote.proxy.inject("silence", kind, times=None)
        began_s = time.monotonic()
        with pytest.raises((jaxckpt.CheckpointError, OSError), match=OBJECT) as failed:
            verb()
        assert not isinstance(failed.value, (jaxckpt.NotFoundError, jaxckpt.CorruptError))
        assert time.monotonic() - began_s < 30
    remote.proxy.reset()
    assert_same_tree(jaxckpt.restore(url), tree_of(1))


def test_a_manifest_that_arrives_after_its_save_was_given_up_names_what_is_there(
    remote: Remote, prefix: str
) -> None:
    """The request for the commit is held up, the save fails for want of an answer, and then the request goes on."""
    url = remote.url(f"{prefix}/run", max_retries=0, timeout_s=0.5)
    with manager_of(url) as manager:
        save(manager, 10).wait()
        manager.wait()
        for when in ("hold before", "hold after"):
            rule = remote.proxy.inject(when, "put", r"step_00000002/manifest\.msgpack")
            with pytest.raises(jaxckpt.WriteError, match="manifest"):
                save(manager, 20).wait()
            assert rule.hits == 1
            rule.release()
            deadline_s = time.monotonic() + 20
            while 2 not in CheckpointManager(url).steps():
                assert time.monotonic() < deadline_s
            assert_steps(url, {1: 10, 2: 20})
            with contextlib.suppress(jaxckpt.CheckpointError):
                manager.wait()
            manager.delete(2)
            remote.proxy.reset()
        save(manager, 30).wait()
        manager.wait()
        assert_steps(url, {1: 10, 3: 30})


# --- processes that are killed --------------------------------------------------------------------------------

PROGRAM = """
import json, os, sys
os.environ.update(json.loads(sys.argv[1]))
import numpy as np
import jaxckpt
number = int(sys.argv[3])
tree = {
    "layers": [{"w": np.arange(50.0) + number, "b": np.full(3, number, np.int16)} for _ in range(2)],
    "own": np.full(5000, number, np.float64),
    "number": number,
}
manager = jaxckpt.CheckpointManager(
    sys.argv[2], max_to_keep=2, options=jaxckpt.SaveOptions(pack_bytes_max=4096), save_last=False
)
if sys.argv[4] == "delete":
    manager.delete(number // 10)
else:
    manager.save(number // 10, tree, items={"at": number}, force=True, overwrite=True).wait()
    manager.close()
"""


def kill_at(remote: Remote, rule: Rule, url: str, number: int, what: str = "save") -> bool:
    """Runs the program until the rule holds one of its requests, and kills it there; False when none was held."""
    environment = json.dumps(remote.environment)
    with start_program(PROGRAM, environment, url, number, what, devices=1) as program:
        while not rule.reached.wait(0.01):
            if select.select([program._handle], [], [], 0)[0]:
                break
        else:
            signal.pidfd_send_signal(program._handle, signal.SIGKILL)
        done = program.wait(60)
    assert done.returncode == (-signal.SIGKILL if rule.hits else 0), done.stderr
    return rule.hits > 0


@pytest.mark.parametrize("is_overwrite", [False, True])
def test_a_process_that_is_killed_at_any_write_leaves_nothing_half_committed(
    s3: Remote, prefix: str, is_overwrite: bool
) -> None:
    """One process after the other, each killed one write later than the one before; between them one that is not."""
    url = s3.url(prefix, **SOME_RETRIES)
    with manager_of(url) as manager:
        for number in (10, 20):
            save(manager, number).wait()
    old = {1: 10, 2: 20}
    outcomes: set[str] = set()
    for skip in itertools.count():
        s3.proxy.reset()
        rule = s3.proxy.inject("hold before", "put", skip=skip)
        number = 10 * max(old) + (1 if is_overwrite else 10)
        was_killed = kill_at(s3, rule, url, number)
        s3.proxy.reset()  # what was held before it was forwarded never arrives
        new = old | {number // 10: number}
        found = numbers_of(url)
        # The oldest of three may be deleted already.
        assert found in (old, new, {step: new[step] for step in sorted(new)[-2:]})
        assert_steps(url, found)
        outcomes.add("old" if found == old else "new")
        newest = max(found)
        with manager_of(url) as manager:
            resumed = manager.resume()
            assert resumed is not None
            assert resumed[0] == newest
            assert_same_tree(resumed[1], tree_of(found[newest]))
            save(manager, 10 * newest + 10).wait()
        old = {newest: found[newest], newest + 1: 10 * newest + 10}
        assert numbers_of(url) == old
        assert litter(s3, f"{prefix}/", list(old)) == []
        if not was_killed:
            break
    assert_steps(url, old)
    assert skip >= 6
    assert outcomes == {"old", "new"}


def numbers_of(url: str) -> dict[int, int]:
    """Which saves are there, by step."""
    manager = CheckpointManager(url)
    return {step: manager.open(step).items["at"] for step in manager.steps()}


@pytest.mark.parametrize("number", [30, 21])
def test_a_process_that_is_killed_before_it_hears_of_its_commit_has_committed(
    remote: Remote, prefix: str, number: int
) -> None:
    url = remote.url(prefix, **SOME_RETRIES)
    with manager_of(url) as manager:
        for earlier in (10, 20):
            save(manager, earlier).wait()
    rule = remote.proxy.inject("hold after", "put", "manifest")
    assert kill_at(remote, rule, url, number)
    remote.proxy.reset()
    assert_steps(url, {1: 10, 2: 20} | {number // 10: number})
    with manager_of(url) as manager:
        save(manager, 40).wait()
    assert_steps(url, {number // 10: number, 4: 40})
    assert litter(remote, f"{prefix}/", [number // 10, 4]) == []


def test_a_process_that_is_killed_while_it_deletes_leaves_no_half_step(s3: Remote, prefix: str) -> None:
    url = s3.url(prefix, **SOME_RETRIES)
    with manager_of(url, max_to_keep=None) as manager:
        for number in (10, 20):
            save(manager, number).wait()
    steps = [1, 2]
    for skip in itertools.count():
        s3.proxy.reset()
        rule = s3.proxy.inject("hold before", "delete", skip=skip)
        was_killed = kill_at(s3, rule, url, 10 * steps[0], "delete")
        deleted = [request.name for request in s3.proxy.requests if request.kind == "delete"]
        assert deleted[0].endswith(f"step_{steps[0]:08}/manifest.msgpack")
        s3.proxy.reset()
        if skip > 0:
            del steps[0]
        assert_steps(url, {step: 10 * step for step in steps})
        with manager_of(url, max_to_keep=None) as manager:
            save(manager, 10 * steps[-1] + 10).wait()
            steps.append(steps[-1] + 1)
        assert manager.steps() == steps
        assert litter(s3, f"{prefix}/", steps) == []
        if not was_killed:
            break
    assert skip >= 6


def test_what_a_killed_process_had_sent_may_arrive_late(s3: Remote, prefix: str) -> None:
    """Its manifest comes when the next process has swept what it wrote: that step is damaged, and no other."""
    url = s3.url(f"{prefix}/run", **SOME_RETRIES)
    with manager_of(url, max_to_keep=None) as manager:
        save(manager, 10).wait()
    rule = s3.proxy.inject("hold before", "put", "manifest")
    assert kill_at(s3, rule, url, 20)
    with manager_of(url, max_to_keep=None) as manager:
        save(manager, 30).wait()
    assert_steps(url, {1: 10, 3: 30})
    rule.release()
    deadline_s = time.monotonic() + 20
    while "step_00000002/manifest.msgpack" not in s3.objects(f"{prefix}/run/"):
        assert time.monotonic() < deadline_s
    manager = CheckpointManager(url)
    assert_same_tree(manager.restore(), tree_of(30))
    with pytest.raises(jaxckpt.CorruptError):
        manager.restore(2)
    with manager_of(url, max_to_keep=None) as manager:
        save(manager, 21).wait()
    assert_steps(url, {1: 10, 2: 21, 3: 30})


@pytest.mark.parametrize("is_overwrite", [False, True])
def test_a_commit_that_arrives_late_does_not_replace_a_younger_one(
    s3: Remote, prefix: str, is_overwrite: bool
) -> None:
    """The process is killed, the next one saves the same step, and only then the manifest of the dead one arrives."""
    url = s3.url(f"{prefix}/run", **SOME_RETRIES)
    with manager_of(url) as manager:
        for number in (10, 20) if is_overwrite else (10,):
            save(manager, number).wait()
    rule = s3.proxy.inject("hold before", "put", "manifest")
    assert kill_at(s3, rule, url, 21)
    with manager_of(url) as manager:
        save(manager, 22).wait()
    assert_steps(url, {1: 10, 2: 22})
    held = next(request for request in s3.proxy.requests if request.fault)
    rule.release()
    assert held.answered.wait(20)
    assert held.status == 412
    assert_steps(url, {1: 10, 2: 22})


def test_a_commit_without_an_answer_does_not_replace_the_next_one(s3: Remote, prefix: str) -> None:
    url = s3.url(f"{prefix}/run", max_retries=0, timeout_s=0.5)
    with manager_of(url) as manager:
        save(manager, 10).wait()
        rule = s3.proxy.inject("hold before", "put", r"step_00000002/manifest\.msgpack")
        with pytest.raises(jaxckpt.WriteError, match="manifest"):
            save(manager, 20).wait()
        save(manager, 21).wait()
    held = next(request for request in s3.proxy.requests if request.fault)
    rule.release()
    assert held.answered.wait(20)
    assert_steps(url, {1: 10, 2: 21})


@pytest.mark.parametrize("is_overwrite", [False, True])
def test_of_two_processes_that_commit_at_once_one_learns_that_it_did_not(
    s3: Remote, prefix: str, is_overwrite: bool
) -> None:
    url = s3.url(f"{prefix}/run", **SOME_RETRIES)
    with manager_of(url) as manager:
        for number in (10, 20) if is_overwrite else (10,):
            save(manager, number).wait()
        s3.proxy.reset()
        rule = s3.proxy.inject("hold before", "put", "manifest")
        # Of the one that succeeds the first answer is lost; it is not to take itself for the other one.
        s3.proxy.inject("drop after", "put", "manifest")
        with start_program(PROGRAM, json.dumps(s3.environment), url, 21, "save", devices=1) as program:
            assert rule.reached.wait(60)
            save(manager, 22).wait()
            rule.release()
            done = program.wait(60)
        assert done.returncode == 1
        assert "meanwhile" in done.stderr
    assert_steps(url, {1: 10, 2: 22})
