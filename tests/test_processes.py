"""Processes agree, hear each other's failures within seconds, and never wait for ever."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from jaxckpt._errors import (
    CheckpointError,
    CoordinationError,
    CorruptError,
    ExistsError,
    MismatchError,
    Problem,
    ProcessFailure,
    ProcessMismatchError,
)
from jaxckpt._processes import Channel, Group, JaxChannel, Session, current_group

from .processes import (
    MemoryChannel,
    MemoryService,
    Outcome,
    Worker,
    memory_groups,
    run_processes,
    run_threads,
    start_processes,
)

COUNT = 4
# Far longer than any test: a failure must be heard, not waited for.
LONG_S = 600
# How soon, on a machine that does other things as well.
SOON_S = 5


def joined(payloads: list[bytes]) -> bytes:
    return b"+".join(payloads)


def agree_once(group: Group, what: str = "save '/x'", timeout_s: float = LONG_S) -> bytes:
    session = group.open_session(what, timeout_s)
    try:
        return session.agree("begin", b"%d" % group.index, joined)
    finally:
        session.close()


def errors_of(outcomes: list[Outcome]) -> list[Any]:
    for outcome in outcomes:
        assert outcome.status == "raised", outcome
        assert isinstance(outcome.error, CheckpointError), outcome.error_text
    return [outcome.error for outcome in outcomes]


def values_of(outcomes: list[Outcome]) -> list[Any]:
    for outcome in outcomes:
        assert outcome.status == "returned", outcome
    return [outcome.value for outcome in outcomes]


@pytest.fixture
def began() -> float:
    return time.monotonic()


# --- what a channel promises --------------------------------------------------------------------------------------


def use_a_channel(channel: Channel) -> None:
    binary = bytes(range(256))
    assert channel.put("c/a/1", binary)
    assert not channel.put("c/a/1", b"other")
    assert channel.look("c/a/1") == binary
    assert channel.look("c/nothing") is None
    assert channel.wait_for("c/a/1", 10) == binary
    began = time.monotonic()
    assert channel.wait_for("c/nothing", 0.2) is None
    assert channel.wait_for("c/nothing", 0) is None
    assert 0.15 < time.monotonic() - began < SOON_S
    channel.put("c/ab/2", b"")
    channel.put("c/a/b/3", b"3")
    assert channel.listing("c/a/") == {"c/a/1": binary, "c/a/b/3": b"3"}
    assert channel.listing("c/nothing/") == {}
    channel.delete("c/a/")
    channel.delete("c/nothing/")
    assert channel.listing("c/") == {"c/ab/2": b""}
    assert channel.put("c/a/1", b"again")


def test_the_channel_of_the_tests_keeps_the_promises() -> None:
    use_a_channel(MemoryChannel(MemoryService(), 0, 1))


def use_the_channel_of_jax(worker: Worker) -> float:
    from jax._src import distributed

    channel = JaxChannel(distributed.global_state.client, worker.index, worker.count)
    if worker.index == 0:
        use_a_channel(channel)
        worker.meet()
        channel.put("value", b"%f" % time.monotonic())
        return 0.0
    worker.meet()
    assert channel.wait_for("value", 30) is not None
    return time.monotonic()


@pytest.mark.slow
def test_the_channel_of_jax_keeps_the_promises_and_logs_nothing() -> None:
    outcomes = run_processes(use_the_channel_of_jax, 2)
    values_of(outcomes)
    assert [outcome.output for outcome in outcomes] == ["", ""]


def call_a_service_that_is_gone(worker: Worker) -> list[str]:
    import jax
    from jax._src import distributed

    client = distributed.global_state.client
    jax.distributed.shutdown()
    worker.meet()
    channel = JaxChannel(client, worker.index, worker.count)
    calls: list[Callable[[], Any]] = [
        lambda: channel.put("k", b""),
        lambda: channel.wait_for("k", 1),
        lambda: channel.look("k"),
        lambda: channel.listing("k/"),
        lambda: channel.delete("k/"),
    ]
    messages: list[str] = []
    for call in calls:
        with pytest.raises(CoordinationError) as caught:
            call()
        assert caught.value.__cause__ is not None
        messages.append(str(caught.value))
    return messages


@pytest.mark.slow
def test_a_service_that_is_gone_is_an_error_of_ours() -> None:
    for index, messages in enumerate(values_of(run_processes(call_a_service_that_is_gone, 2))):
        assert all(text.startswith(f"process {index} of 2 cannot reach the") for text in messages)


# --- agreeing and telling -----------------------------------------------------------------------------------------


def agree_and_tell(group: Group) -> list[bytes]:
    heard: list[bytes] = []
    for number in range(3):
        session = group.open_session(f"save '/mount-{group.index}/step_{number}'", LONG_S)
        heard.append(session.agree("begin", b"%d" % group.index, joined))
        heard.append(session.tell("go", b"went %d" % number if group.index == 0 else None))
        heard.append(session.agree("end", bytes([number]), lambda payloads: bytes([len(payloads)])))
        session.close()
    return heard


EXPECTED = [value for number in range(3) for value in (b"0+1+2+3", b"went %d" % number, bytes([COUNT]))]


def test_all_hear_what_process_0_decided_on_the_payloads_of_all() -> None:
    assert values_of(run_threads(memory_groups(COUNT), agree_and_tell)) == [EXPECTED] * COUNT


def agree_and_tell_in_a_process(worker: Worker) -> tuple[list[bytes], int, bool]:
    group = current_group()
    assert group is not None
    assert (group.index, group.count) == (worker.index, worker.count)
    return agree_and_tell(group), group.machine_mates(LONG_S), group is current_group()


@pytest.mark.slow
def test_real_processes_agree_and_log_nothing() -> None:
    outcomes = run_processes(agree_and_tell_in_a_process, COUNT)
    assert values_of(outcomes) == [(EXPECTED, COUNT, True)] * COUNT
    assert [outcome.output for outcome in outcomes] == [""] * COUNT


def ask_for_the_group(worker: Worker) -> tuple[bool, bool]:
    from jax._src import xla_bridge

    return current_group() is None, xla_bridge.backends_are_initialized()


@pytest.mark.slow
def test_one_process_is_no_group_and_asking_touches_no_device() -> None:
    assert values_of(run_processes(ask_for_the_group, 1)) == [(True, False)]
    assert [is_alone for is_alone, _ in values_of(run_processes(ask_for_the_group, 2))] == [False, False]


def use_two_sessions_in_any_order(group: Group) -> list[bytes]:
    first = group.open_session("save '/a'", LONG_S)
    second = group.open_session("save '/b'", LONG_S)
    order = [first, second] if group.index % 2 else [second, first]
    heard = {}

    def use(session: Session) -> None:
        heard[session.what] = session.agree("begin", session.what.encode(), joined)

    threads = [threading.Thread(target=use, args=(session,), daemon=True) for session in order]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return [heard["save '/a'"], heard["save '/b'"]]


def test_sessions_that_are_open_at_once_do_not_meet() -> None:
    expected = [b"save '/a'+save '/a'+save '/a'", b"save '/b'+save '/b'+save '/b'"]
    assert values_of(run_threads(memory_groups(3), use_two_sessions_in_any_order)) == [expected] * 3


def test_a_name_that_is_no_utf8_does_not_matter() -> None:
    name = os.fsdecode(b"save '/\xff'")
    assert values_of(run_threads(memory_groups(2), lambda group: agree_once(group, name))) == [b"0+1"] * 2


def test_only_process_0_does_work_that_grows_with_the_processes() -> None:
    count = 48
    service = MemoryService()
    values_of(run_threads(memory_groups(count, service), agree_once))
    calls = [sum(1 for index, _, _ in service.calls if index == process) for process in range(count)]
    assert calls[0] <= 3 * count
    assert max(calls[1:]) <= 30  # two, and two more for each half second that the threads take to start
    assert len([key for key in service.values if "/result" in key]) == 1


# --- failing ------------------------------------------------------------------------------------------------------


def fail_in_one_process(group: Group, culprit: int) -> None:
    session = group.open_session("save '/x'", LONG_S)
    session.agree("begin", b"", joined)
    try:
        if group.index == culprit:
            raise OSError(27, "File too large")
        session.agree("write", b"", joined)
    except Exception as error:
        raise session.fail(error) from error
    finally:
        session.close()


@pytest.mark.parametrize("culprit", range(COUNT))
def test_a_failure_of_one_is_heard_by_all(culprit: int, began: float) -> None:
    outcomes = run_threads(memory_groups(COUNT), lambda group: fail_in_one_process(group, culprit))
    message = f"cannot save '/x': process {culprit} of 4 failed: OSError: [Errno 27] File too large"
    failure = ProcessFailure(culprit, "OSError", "[Errno 27] File too large")
    for error in errors_of(outcomes):
        assert type(error) is CoordinationError
        assert (str(error), error.failures) == (message, (failure,))
    assert isinstance(errors_of(outcomes)[culprit].__cause__, OSError)
    assert time.monotonic() - began < SOON_S


def fail_in_a_real_process(worker: Worker) -> list[str]:
    group = current_group()
    assert group is not None
    messages: list[str] = []
    for culprit in range(worker.count):
        with pytest.raises(CoordinationError) as caught:
            fail_in_one_process(group, culprit)
        messages.append(str(caught.value))
    assert agree_once(group) == b"0+1+2+3"
    return messages


@pytest.mark.slow
def test_failures_of_real_processes_are_heard_by_all_and_the_next_call_works(began: float) -> None:
    outcomes = run_processes(fail_in_a_real_process, COUNT)
    for messages in values_of(outcomes):
        for culprit, message in enumerate(messages):
            assert f"process {culprit} of 4 failed: OSError: [Errno 27] File too large" in message
    assert time.monotonic() - began < COUNT * SOON_S
    assert [outcome.output for outcome in outcomes] == [""] * COUNT


def test_several_failures_are_all_named() -> None:
    barrier = threading.Barrier(3)

    def fail(group: Group) -> None:
        session = group.open_session("save '/x'", LONG_S)
        if group.index == 0:
            session.agree("begin", b"", joined)
        failure = session.fail(ValueError(f"number {group.index}\nsecond line"))
        barrier.wait(30)
        assert len(session.fail(OSError("cleaning up failed")).problems) == 0
        with pytest.raises(CoordinationError) as caught:
            session.check()
        raise caught.value from failure

    groups = memory_groups(COUNT)
    waiting: list[Outcome] = []
    waiter = threading.Thread(target=lambda: waiting.extend(run_threads(groups[:1], agree_once)), daemon=True)
    waiter.start()
    for error in errors_of(run_threads(groups[1:], fail)):
        assert [failure.process for failure in error.failures] == [1, 2, 3]
        assert str(error).splitlines() == [
            "cannot save '/x': 3 of 4 processes failed",
            "  process 1 failed: ValueError: number 1",
            "  process 2 failed: ValueError: number 2",
            "  process 3 failed: ValueError: number 3",
        ]
    waiter.join(30)
    assert isinstance(waiting[0].error, CoordinationError)


def test_when_all_fail_only_ten_reports_are_kept_and_each_knows_its_own() -> None:
    count = 30
    service = MemoryService()
    barrier = threading.Barrier(count)

    def fail(group: Group) -> None:
        session = group.open_session("save '/x'", LONG_S)
        barrier.wait(30)
        raise session.fail(OSError(28, f"No space left on device {group.index}"))

    outcomes = run_threads(memory_groups(count, service), fail)
    for index, error in enumerate(errors_of(outcomes)):
        assert index in {failure.process for failure in error.failures}
        assert len(error.failures) <= 11
        assert len(str(error).splitlines()) <= 12
    assert len([key for key in service.values if "/failed/" in key]) == 10


class RacingChannel(MemoryChannel):
    """Its first report is written when another process is about to write its own."""

    def __init__(self, service: MemoryService, index: int, count: int, barrier: threading.Barrier) -> None:
        super().__init__(service, index, count)
        self._barrier = barrier
        self._has_met = False

    def put(self, key: str, value: bytes) -> bool:
        if not self._has_met:
            self._has_met = True
            self._barrier.wait(30)
        return super().put(key, value)


def test_of_two_that_fail_at_the_same_instant_both_are_known() -> None:
    service = MemoryService()
    barrier = threading.Barrier(2)
    groups = [Group(RacingChannel(service, index, 2, barrier)) for index in range(2)]
    sessions = [group.open_session("save '/x'", LONG_S) for group in groups]
    values_of(run_threads(groups, lambda group: sessions[group.index].fail(OSError(f"disk {group.index}"))))
    with pytest.raises(CoordinationError) as caught:
        sessions[0].check()
    assert [failure.message for failure in caught.value.failures] == ["disk 0", "disk 1"]


def test_nothing_is_decided_when_a_failure_is_known() -> None:
    service = MemoryService()
    groups = memory_groups(2, service)
    session = groups[1].open_session("save '/x'", LONG_S)
    posting = threading.Thread(
        target=lambda: run_threads(groups[1:], lambda _: session.agree("end", b"", joined))
    )
    posting.start()
    service.await_call(1, "wait_for")
    session.fail(OSError("no disk"))
    (outcome,) = run_threads(
        groups[:1], lambda group: group.open_session("save '/x'", LONG_S).agree("end", b"", joined)
    )
    assert isinstance(outcome.error, CoordinationError)
    assert [key for key in service.values if "/result" in key] == []
    posting.join(30)


def test_a_failure_that_was_heard_is_not_told_again() -> None:
    service = MemoryService()
    groups = memory_groups(2, service)
    session = groups[1].open_session("save '/x'", LONG_S)
    failure = session.fail(OSError("here"))
    assert session.fail(failure) is failure
    other = groups[0].open_session("save '/x'", LONG_S)
    with pytest.raises(CoordinationError) as caught:
        other.check()
    assert other.fail(caught.value) is caught.value
    assert len([key for key in service.values if "/failed/" in key]) == 1


def test_an_error_of_coordination_from_elsewhere_is_told_with_its_failures() -> None:
    groups = memory_groups(2)
    silent = ProcessFailure(1, "silent", "did not answer within 3 s (phase 'machines')")
    sessions = [group.open_session("save '/x'", LONG_S) for group in groups]
    sessions[0].fail(CoordinationError("cannot count the machines", (silent,)))
    with pytest.raises(CoordinationError, match=r"process 1 of 2 did not answer within 3 s") as caught:
        sessions[1].check()
    assert caught.value.failures == (silent,)


def decide_badly(group: Group, error: CheckpointError | OSError) -> bytes:
    def decide(payloads: list[bytes]) -> bytes:
        raise error

    session = group.open_session("save '/x'", LONG_S, shared_errors=(ExistsError, CorruptError))
    return session.agree("begin", b"", decide)


PROBLEMS = (Problem("params/w", "shape", "(3,) is not (4,)"), Problem(None, "tree", "other"))


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (ProcessMismatchError("they differ", (), PROBLEMS), ProcessMismatchError, "they differ"),
        (ExistsError("it is there", PROBLEMS), ExistsError, "it is there"),
        (
            MismatchError("not shared", PROBLEMS),
            CoordinationError,
            "cannot save '/x': process 0 of 3 failed: MismatchError: not shared",
        ),
        (
            OSError("no disk"),
            CoordinationError,
            "cannot save '/x': process 0 of 3 failed: OSError: no disk",
        ),
    ],
)
def test_what_process_0_raises_when_it_decides_is_raised_by_all(
    error: CheckpointError | OSError, kind: type, message: str
) -> None:
    for raised in errors_of(run_threads(memory_groups(3), lambda group: decide_badly(group, error))):
        assert type(raised) is kind
        assert str(raised) == message
        assert raised.problems == getattr(error, "problems", ())


def test_a_mismatch_keeps_the_failures_that_it_names() -> None:
    failures = (ProcessFailure(2, "MismatchError", "params/w: other shape", PROBLEMS[:1]),)
    error = ProcessMismatchError("they differ", failures, PROBLEMS)
    for raised in errors_of(run_threads(memory_groups(3), lambda group: decide_badly(group, error))):
        assert isinstance(raised, ProcessMismatchError)
        assert raised.failures == failures


def mismatch_in_a_process(worker: Worker) -> None:
    group = current_group()
    assert group is not None
    decide_badly(group, ProcessMismatchError("they differ", (), PROBLEMS))


@pytest.mark.slow
def test_a_mismatch_keeps_its_class_between_real_processes() -> None:
    for error in errors_of(run_processes(mismatch_in_a_process, 2)):
        assert type(error) is ProcessMismatchError
        assert error.problems == PROBLEMS


def fail_twice(first: Exception, second: Exception) -> CheckpointError:
    groups = memory_groups(3)
    sessions = [group.open_session("restore '/x'", LONG_S, shared_errors=(CorruptError,)) for group in groups]
    sessions[1].fail(first)
    sessions[2].fail(second)
    with pytest.raises(CheckpointError) as caught:
        sessions[0].check()
    return caught.value


def test_an_error_is_shared_only_if_nothing_else_went_wrong() -> None:
    one = CorruptError("chunk 1 is damaged", PROBLEMS[:1])
    two = CorruptError("chunk 2 is damaged", PROBLEMS[1:])
    error = fail_twice(one, two)
    assert type(error) is CorruptError
    assert error.problems == PROBLEMS
    assert str(error).splitlines()[1:] == [
        "  process 1 failed: CorruptError: chunk 1 is damaged",
        "  process 2 failed: CorruptError: chunk 2 is damaged",
    ]
    error = fail_twice(one, OSError("no disk"))
    assert type(error) is CoordinationError
    assert "CorruptError: chunk 1" in str(error)
    assert "OSError: no disk" in str(error)


def test_a_failure_without_the_service_is_known_here_only() -> None:
    service = MemoryService()
    session = memory_groups(2, service)[1].open_session("save '/x'", LONG_S)
    service.cut_off(1)
    with pytest.raises(CoordinationError, match="cut off") as caught:
        session.agree("begin", b"", joined)
    error = session.fail(caught.value)
    assert isinstance(error, CoordinationError)
    assert "process 1 of 2 failed: CoordinationError: process 1 is cut off" in str(error)
    assert not session.settle(1)
    session.close()


# --- silence ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("silent", [{0}, {2}, {1, 3}])
def test_silent_processes_are_named(silent: set[int], began: float) -> None:
    groups = [group for group in memory_groups(COUNT) if group.index not in silent]
    outcomes = run_threads(groups, lambda group: agree_once(group, timeout_s=0.3))
    expected = tuple(
        ProcessFailure(index, "silent", "did not answer within 0.3 s (phase 'begin')")
        for index in sorted(silent)
    )
    for error in errors_of(outcomes):
        assert error.failures == expected
        for index in silent:
            assert f"process {index} " in str(error)
    assert time.monotonic() - began < SOON_S


def test_one_silent_process_reads_as_one_line() -> None:
    outcomes = run_threads(memory_groups(COUNT)[:3], lambda group: agree_once(group, timeout_s=0.2))
    expected = "cannot save '/x': process 3 of 4 did not answer within 0.2 s (phase 'begin')"
    assert {str(error) for error in errors_of(outcomes)} == {expected}


def test_a_process_0_that_came_late_is_not_silent_while_it_waits_for_another() -> None:
    service = MemoryService()

    def agree(group: Group) -> bytes:
        if group.index == 2:
            service.await_call(1, "look")  # process 1 has waited in vain and asks whether process 0 is there
        return agree_once(group, timeout_s=LONG_S if group.index == 0 else 0.1)

    assert values_of(run_threads(memory_groups(3, service), agree)) == [b"0+1+2"] * 3


def agree_with_a_dead_process(worker: Worker) -> str:
    group = current_group()
    assert group is not None
    agree_once(group)
    worker.meet()
    if worker.index == worker.count - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    with pytest.raises(CoordinationError) as caught:
        agree_once(group, timeout_s=1)
    return str(caught.value)


@pytest.mark.slow
def test_the_survivors_of_a_killed_process_learn_it_by_the_deadline(began: float) -> None:
    outcomes = run_processes(agree_with_a_dead_process, 3, recoverable=True)
    assert (outcomes[2].status, outcomes[2].exit_code) == ("died", -signal.SIGKILL)
    assert set(values_of(outcomes[:2])) == {
        "cannot save '/x': process 2 of 3 did not answer within 1 s (phase 'begin')"
    }
    assert time.monotonic() - began < 1 + 2 * SOON_S


def agree_when_told(worker: Worker) -> str:
    group = current_group()
    assert group is not None
    agree_once(group)
    worker.send("ready")
    worker.receive()
    with pytest.raises(CoordinationError) as caught:
        agree_once(group, timeout_s=1)
    return str(caught.value)


@pytest.mark.slow
def test_the_others_of_a_stopped_process_learn_it_by_the_deadline(began: float) -> None:
    with start_processes(agree_when_told, 3) as group:
        for index in range(3):
            group.receive(index)
        group.send_signal(1, signal.SIGSTOP)
        for index in (0, 2):
            group.send(index, "go")
        outcomes = group.wait(30, indices=(0, 2))
    assert outcomes[1].status == "stuck"
    assert set(values_of([outcomes[0], outcomes[2]])) == {
        "cannot save '/x': process 1 of 3 did not answer within 1 s (phase 'begin')"
    }
    assert time.monotonic() - began < 1 + 2 * SOON_S


def wait_for_process_0(worker: Worker) -> None:
    group = current_group()
    assert group is not None
    session = group.open_session("save '/x'", LONG_S)
    worker.send("ready")
    if worker.index == 0:
        worker.receive(LONG_S)
    with session.watching(lambda error: None):
        session.agree("begin", b"", joined)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.slow
def test_no_call_hangs_when_process_0_is_gone_for_jax_aborts_the_others(
    number: signal.Signals, began: float
) -> None:
    heartbeat_s = 3
    with start_processes(wait_for_process_0, 2, heartbeat_s=heartbeat_s) as group:
        for index in range(2):
            group.receive(index)
        group.send_signal(0, number)
        outcomes = group.wait(heartbeat_s + 30, indices=[1])
    if outcomes[1].status == "raised":  # its own call may fail before the abort
        assert isinstance(outcomes[1].error, CoordinationError), outcomes[1]
    else:
        assert (outcomes[1].status, outcomes[1].exit_code) == ("died", -signal.SIGABRT)
    assert time.monotonic() - began < heartbeat_s + 2 * SOON_S


# --- watching -----------------------------------------------------------------------------------------------------


def fail_while_another_is_busy(group: Group) -> float:
    session = group.open_session("save '/x'", LONG_S)
    session.agree("begin", b"", joined)
    began = time.monotonic()
    if group.index == 1:
        session.fail(OSError("no disk"))
        return 0.0
    is_cancelled = threading.Event()
    heard: list[CheckpointError] = []

    def cancel(error: CheckpointError) -> None:
        heard.append(error)
        is_cancelled.set()

    with session.watching(cancel):
        assert is_cancelled.wait(60)
    assert [str(error) for error in heard] == ["cannot save '/x': process 1 of 3 failed: OSError: no disk"]
    assert not any(thread.name == "jaxckpt-watcher" for thread in threading.enumerate())
    return time.monotonic() - began


def fail_while_another_process_is_busy(worker: Worker) -> float:
    group = current_group()
    assert group is not None
    return fail_while_another_is_busy(group)


@pytest.mark.slow
def test_a_process_that_is_busy_hears_of_a_failure() -> None:
    assert max(values_of(run_processes(fail_while_another_process_is_busy, 3))) < SOON_S


def test_nobody_is_told_when_nothing_failed_or_the_body_has_ended() -> None:
    service = MemoryService()
    groups = memory_groups(2, service)
    session = groups[0].open_session("save '/x'", LONG_S)
    heard: list[CheckpointError] = []
    with session.watching(heard.append):
        service.await_call(0, "listing")  # it has looked
    groups[1].open_session("save '/x'", LONG_S).fail(OSError("too late"))
    assert not any(thread.name == "jaxckpt-watcher" for thread in threading.enumerate())
    assert heard == []


class HangingChannel(MemoryChannel):
    """Each listing hangs, as one does while process 0 is stopped, until it is let go."""

    def __init__(self, service: MemoryService, index: int, count: int) -> None:
        super().__init__(service, index, count)
        self.is_free = threading.Event()

    def listing(self, prefix: str) -> dict[str, bytes]:
        found = super().listing(prefix)
        assert self.is_free.wait(30)
        return {**found, **super().listing(prefix)}


@pytest.mark.slow
def test_a_look_that_hangs_does_not_keep_the_body_from_ending_and_tells_nobody_later() -> None:
    service = MemoryService()
    channel = HangingChannel(service, 1, 2)
    session = Group(channel).open_session("save '/x'", LONG_S)
    heard: list[CheckpointError] = []
    with session.watching(heard.append):
        service.await_call(1, "listing")
    memory_groups(2, service)[0].open_session("save '/x'", LONG_S).fail(OSError("too late"))
    (watcher,) = [thread for thread in threading.enumerate() if thread.name == "jaxckpt-watcher"]
    channel.is_free.set()
    watcher.join(30)
    assert not watcher.is_alive()
    assert heard == []
    with pytest.raises(CoordinationError, match="too late"):
        session.check()


def test_whoever_loses_the_service_while_it_is_busy_hears_that() -> None:
    service = MemoryService()
    session = memory_groups(2, service)[1].open_session("save '/x'", LONG_S)
    is_cancelled = threading.Event()
    with session.watching(lambda error: is_cancelled.set()):
        service.cut_off(1)
        assert is_cancelled.wait(30)


# --- out of step --------------------------------------------------------------------------------------------------


def test_another_call_than_that_of_process_0_is_a_mismatch_for_all(began: float) -> None:
    groups = memory_groups(3)

    def call(group: Group) -> bytes:
        return agree_once(group, "restore '/y'" if group.index == 1 else "save '/x'")

    for error in errors_of(run_threads(groups, call)):
        assert isinstance(error, ProcessMismatchError)
        assert [failure.process for failure in error.failures] == [1]
        assert "process 1 calls \"restore '/y'\"" in str(error)
    assert values_of(run_threads(groups, agree_once)) == [b"0+1+2"] * 3
    assert time.monotonic() - began < SOON_S


def test_another_phase_than_that_of_process_0_is_a_mismatch_for_all() -> None:
    def call(group: Group) -> bytes:
        session = group.open_session("save '/x'", LONG_S)
        if group.index == 0:
            session.tell("go", b"")
            return session.agree("end", b"", joined)
        return session.agree("begin", b"", joined)

    for error in errors_of(run_threads(memory_groups(2), call)):
        assert isinstance(error, ProcessMismatchError)
        assert "'go'" in str(error)


def call_step(group: Group, step: int, timeout_s: float = 0.2) -> bytes:
    return agree_once(group, f"save '/run/step_{step}'", timeout_s)


def test_a_process_that_missed_calls_goes_on_with_the_others() -> None:
    groups = memory_groups(3)
    values_of(run_threads(groups, lambda group: call_step(group, 1, LONG_S)))
    for step in (2, 3):
        errors_of(run_threads([groups[0], groups[2]], lambda group, step=step: call_step(group, step)))
    assert values_of(run_threads(groups, lambda group: call_step(group, 4, LONG_S))) == [b"0+1+2"] * 3
    assert values_of(run_threads(groups, lambda group: call_step(group, 5, LONG_S))) == [b"0+1+2"] * 3


def test_a_failure_before_the_first_phase_of_the_next_call_reaches_the_others() -> None:
    groups = memory_groups(2)
    errors_of(run_threads(groups[:1], lambda group: call_step(group, 2)))
    late = groups[1].open_session("save '/run/step_3'", LONG_S)
    late.fail(OSError("no disk"))
    for error in errors_of(run_threads(groups[:1], lambda group: call_step(group, 3, LONG_S))):
        assert "process 1 of 2 failed: OSError: no disk" in str(error)


def test_a_process_that_is_late_hears_that_its_call_failed_and_stays_in_step() -> None:
    groups = memory_groups(2)
    errors_of(run_threads(groups[:1], lambda group: call_step(group, 2)))
    (error,) = errors_of(run_threads(groups[1:], lambda group: call_step(group, 2)))
    assert error.failures == (ProcessFailure(1, "silent", "did not answer within 0.2 s (phase 'begin')"),)
    assert values_of(run_threads(groups, lambda group: call_step(group, 3, LONG_S))) == [b"0+1"] * 2


def test_a_process_that_has_made_another_call_since_passes_over_none() -> None:
    groups = memory_groups(2)
    errors_of(run_threads(groups[:1], lambda group: call_step(group, 2)))
    late = groups[1].open_session("save '/run/step_3'", LONG_S)
    groups[1].open_session("save '/run/step_4'", LONG_S)
    with pytest.raises(CoordinationError, match="process 1 of 2 did not answer"):
        late.agree("begin", b"", joined)


# --- the rest -----------------------------------------------------------------------------------------------------


def test_the_keys_of_old_sessions_are_deleted() -> None:
    service = MemoryService()
    groups = memory_groups(2, service)
    counts: list[int] = []
    for _ in range(3):
        values_of(run_threads(groups, lambda group: [agree_once(group) for _ in range(70)]))
        counts.append(len(service.values))
    assert counts[1] == counts[2] <= 3 * 65


def delete_old_keys(worker: Worker) -> int:
    from jax._src import distributed

    group = current_group()
    assert group is not None
    for _ in range(80):
        agree_once(group)
    worker.meet()
    return len(distributed.global_state.client.key_value_dir_get_bytes("jaxckpt/"))


@pytest.mark.slow
def test_the_keys_of_old_sessions_are_deleted_in_jax_too() -> None:
    assert max(values_of(run_processes(delete_old_keys, 2))) <= 3 * 65


def test_processes_are_counted_by_machine_and_asked_once() -> None:
    service = MemoryService()
    machines = ["a", "b", "a", "a"]
    groups = [Group(MemoryChannel(service, i, COUNT), machine=machine) for i, machine in enumerate(machines)]
    assert values_of(run_threads(groups, lambda group: group.machine_mates(LONG_S))) == [3, 1, 3, 3]
    calls = len(service.calls)
    assert groups[1].machine_mates(LONG_S) == 1
    assert len(service.calls) == calls


@pytest.mark.parametrize("silent", [0, 2])
def test_machines_cannot_be_counted_without_all_but_later(silent: int) -> None:
    groups = memory_groups(3)
    there = [group for group in groups if group.index != silent]
    for group, error in zip(
        there, errors_of(run_threads(there, lambda group: group.machine_mates(0.1))), strict=True
    ):
        named = silent if group.index == 0 else 0  # process 0 does not answer before it knows
        assert f"cannot count the machines: process {named} of 3 did not answer" in str(error)
    assert values_of(run_threads(groups, lambda group: group.machine_mates(LONG_S))) == [3] * 3


def test_a_failure_ends_the_counting_of_machines(began: float) -> None:
    groups = memory_groups(2)
    sessions = [group.open_session("save '/x'", LONG_S) for group in groups]
    sessions[1].fail(OSError("no disk"))
    with pytest.raises(CoordinationError, match="no disk"):
        groups[0].machine_mates(LONG_S, sessions[0].check)
    assert time.monotonic() - began < SOON_S


def test_after_a_failure_process_0_waits_until_the_others_have_settled() -> None:
    service = MemoryService()

    def fail_and_settle(group: Group) -> bool:
        session = group.open_session("save '/x'", LONG_S)
        session.fail(OSError("no disk"))
        if group.index == 1:
            service.await_call(0, "wait_for")
        return session.settle(30)

    assert values_of(run_threads(memory_groups(2, service), fail_and_settle)) == [True, True]
    session = memory_groups(2)[0].open_session("save '/x'", LONG_S)
    assert not session.settle(0.1)


# --- the harness itself -------------------------------------------------------------------------------------------


def end_in_a_way_of_its_own(worker: Worker, word: str) -> str:
    import jax

    print("written by", worker.index)
    devices = len(jax.devices())  # all processes tell each other theirs
    assert len(set(worker.pids)) == worker.count
    assert worker.pids[worker.index] == os.getpid()
    (worker.path / str(worker.index)).write_text(word)
    worker.meet()
    assert sorted(path.name for path in worker.path.iterdir() if path.name.isdigit()) == ["0", "1", "2", "3"]
    if worker.index == 1:
        raise KeyError(word)
    if worker.index == 2:
        os._exit(7)
    if worker.index == 3:
        threading.Event().wait()
    return f"{word} {devices}"


@pytest.mark.slow
def test_the_harness_tells_how_each_worker_ended() -> None:
    with start_processes(end_in_a_way_of_its_own, 4, 2, arguments=("word",)) as group:
        outcomes = group.wait(30, indices=(0, 1, 2))
        pids = group.pids
    assert [outcome.status for outcome in outcomes] == ["returned", "raised", "died", "stuck"]
    assert [outcome.exit_code for outcome in outcomes] == [0, 0, 7, -signal.SIGKILL]
    assert outcomes[0].value == "word 8"
    assert isinstance(outcomes[1].error, KeyError)
    assert "KeyError: 'word'" in outcomes[1].error_text
    assert "written by 0" in outcomes[0].output
    assert [pid for pid in pids if os.path.exists(f"/proc/{pid}")] == []


def wait_for_ever(worker: Worker) -> None:
    worker.send(worker.index)
    threading.Event().wait()


@pytest.mark.slow
def test_the_harness_leaves_no_process_behind() -> None:
    with start_processes(wait_for_ever, 2) as group:
        assert [group.receive(index) for index in range(2)] == [0, 1]
        pids = group.pids
        with pytest.raises(TimeoutError):
            group.receive(0, timeout_s=0.1)
    assert [pid for pid in pids if os.path.exists(f"/proc/{pid}")] == []
    assert run_processes(wait_for_ever, 1, timeout_s=0.5)[0].status == "stuck"


class InterruptedChannel(MemoryChannel):
    """Calls something right before process 0 writes a result."""

    def __init__(self, service: MemoryService, count: int, interrupt: Callable[[], None]) -> None:
        MemoryChannel.__init__(self, service, 0, count)
        self._interrupt = interrupt

    def put(self, key: str, value: bytes) -> bool:
        if key.endswith("/result"):
            self._interrupt()
        return MemoryChannel.put(self, key, value)


def test_who_fails_right_before_process_0_tells_is_heard_by_all_in_that_session() -> None:
    service = MemoryService()
    leaving, hearing = (Group(MemoryChannel(service, index, 3)) for index in (1, 2))
    left = leaving.open_session("leave 'run'", 5)

    def leave() -> None:
        left.fail(ValueError("it left its loop"))
        assert not left.is_told()  # so it posts nothing for the next session

    telling = Group(InterruptedChannel(service, 3, leave))
    with pytest.raises(CoordinationError, match="it left its loop"):
        telling.open_session("decide 'run'", 5).tell("word", b"save")
    with pytest.raises(CoordinationError, match="it left its loop"):
        hearing.open_session("decide 'run'", 5).tell("word")
