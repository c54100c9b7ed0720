"""A process that is told of its end learns of it at the next step, and nothing else changes for it.

Signals are real. SIGTERM goes to processes of their own; within pytest it is SIGUSR1 and SIGUSR2, below which a handler
of the test lies, so that a failing test does not end pytest. jax's preemption service is the real one too.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import socket
import subprocess
import textwrap
import threading
import time
import timeit
from collections.abc import Iterator, Sequence

import pytest

from jaxckpt._preemption import Preemption

from .helpers import ROOT, run_fork, run_program
from .processes import Worker, start_processes, start_program

pytestmark = pytest.mark.slow

USR = (signal.SIGUSR1,)


@pytest.fixture(autouse=True)
def seen() -> Iterator[list[int]]:
    """Signals that reached the handlers below; afterwards every handler is as it was."""
    numbers: list[int] = []

    def note(number: int, _frame: object) -> None:
        numbers.append(number)

    outer = {number: signal.signal(number, note) for number in (signal.SIGUSR1, signal.SIGUSR2)}
    try:
        yield numbers
        assert {signal.getsignal(number) for number in outer} == {note}
    finally:
        for number, handler in outer.items():
            signal.signal(number, handler)


class Clock:
    """A clock that the test sets."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


# --- one process ----------------------------------------------------------------------------------------------


def test_sigterm_does_not_kill_and_is_seen_at_the_next_step() -> None:
    program = """
        import os, signal
        from jaxckpt._preemption import Preemption

        with Preemption() as preemption:
            for step in range(1, 10):
                if step == 4:
                    os.kill(os.getpid(), signal.SIGTERM)
                if preemption.is_requested(step):
                    break
        print(step, preemption.requested, preemption.is_requested(step + 1))
    """
    assert run_fork(program).stdout.split() == ["4", "True", "True"]


def sleep_until_told(worker: Worker) -> str:
    preemption = Preemption()
    preemption.install()
    worker.send("ready")
    step = 0
    while not preemption.is_requested(step):
        time.sleep(0.01)
        step += 1
    return "saved"


def test_sigterm_during_a_sleep_of_another_process_is_seen() -> None:
    with start_processes(sleep_until_told, 1) as group:
        assert group.receive(0) == "ready"
        group.send_signal(0, signal.SIGTERM)
        (outcome,) = group.wait(60)
    assert outcome.value == "saved", outcome
    assert "SIGTERM announced that this process ends soon; seen at step" in outcome.output


def test_after_uninstall_sigterm_kills_again() -> None:
    program = """
        import os, signal
        from jaxckpt._preemption import Preemption

        preemption = Preemption()
        with preemption:
            os.kill(os.getpid(), signal.SIGTERM)
        assert preemption.is_requested(1)
        print("alive", flush=True)
        os.kill(os.getpid(), signal.SIGTERM)
        print("not reached", flush=True)
    """
    result = run_fork(program, check=False)
    assert (result.returncode, result.stdout) == (-signal.SIGTERM, "alive\n"), result.stderr


def test_a_forked_worker_still_ends_by_sigterm_and_the_parent_notices_nothing() -> None:
    program = """
        import os, signal
        from jaxckpt._preemption import Preemption

        with Preemption((signal.SIGTERM, signal.SIGUSR1)) as preemption:
            for number in (signal.SIGTERM, signal.SIGUSR1):
                worker = os.fork()
                if worker == 0:
                    signal.raise_signal(number)
                    os._exit(0)
                print(os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1]))
            print(preemption.requested)
    """
    assert run_fork(program).stdout.split() == ["-15", "-10", "False"]


def test_the_interrupt_key_becomes_a_soft_stop_if_asked_for() -> None:
    program = """
        import os, signal
        from jaxckpt._preemption import Preemption

        with Preemption((signal.SIGINT,)) as preemption:
            os.kill(os.getpid(), signal.SIGINT)
            print(preemption.is_requested(1))
        try:
            os.kill(os.getpid(), signal.SIGINT)
        except KeyboardInterrupt:
            print("interrupted")
    """
    assert run_fork(program).stdout.split() == ["True", "interrupted"]


def test_an_ignored_signal_is_ignored_again_after_uninstall() -> None:
    program = """
        import signal
        from jaxckpt._preemption import Preemption

        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        with Preemption() as preemption:
            signal.raise_signal(signal.SIGTERM)
            print(preemption.is_requested(1))
        signal.raise_signal(signal.SIGTERM)
        print(signal.getsignal(signal.SIGTERM) is signal.SIG_IGN)
    """
    assert run_fork(program).stdout.split() == ["True", "True"]


def test_the_module_needs_no_jax() -> None:
    program = """
        import importlib.util, signal, sys

        spec = importlib.util.spec_from_file_location("preemption", sys.argv[1])
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        with module.Preemption() as preemption:
            assert not preemption.is_requested(1)
            signal.raise_signal(signal.SIGTERM)
            assert preemption.is_requested(2)
        print("jax" in sys.modules)
    """
    assert run_program(program, ROOT / "jaxckpt" / "_preemption.py").stdout == "False\n"


# --- signals --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGUSR1, int(signal.SIGUSR2)])
def test_every_signal_that_is_named_announces_the_end(number: int) -> None:
    with Preemption((signal.SIGUSR1, int(signal.SIGUSR2))) as preemption:
        assert not preemption.is_requested(1)
        assert not preemption.requested
        signal.raise_signal(number)
        assert preemption.requested
        assert preemption.is_requested(2)


def test_a_signal_that_is_not_named_announces_nothing(seen: list[int]) -> None:
    with Preemption(USR) as preemption:
        signal.raise_signal(signal.SIGUSR2)
        assert not preemption.is_requested(1)
    assert seen == [signal.SIGUSR2]


def test_the_handler_that_was_there_is_called_after_the_signal_is_noted(seen: list[int]) -> None:
    inner: list[bool] = []

    def ends_the_loop(number: int, _frame: object) -> None:
        inner.append(preemption.requested)
        raise SystemExit(3)

    preemption = Preemption(USR)
    outer = signal.signal(signal.SIGUSR1, ends_the_loop)
    try:
        with preemption, pytest.raises(SystemExit):
            signal.raise_signal(signal.SIGUSR1)
        assert signal.getsignal(signal.SIGUSR1) is ends_the_loop
    finally:
        signal.signal(signal.SIGUSR1, outer)
    assert inner == [True]
    assert seen == []


def test_one_signal_reaches_every_preemption_and_what_lies_below(seen: list[int]) -> None:
    with Preemption(USR) as outer, Preemption(USR) as inner:
        signal.raise_signal(signal.SIGUSR1)
        assert outer.is_requested(1)
        assert inner.is_requested(1)
    assert seen == [signal.SIGUSR1]


def test_signals_that_come_again_change_nothing(seen: list[int], caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    with Preemption(USR, grace_s=30, clock=clock) as preemption:
        for _ in range(3):
            signal.raise_signal(signal.SIGUSR1)
            clock.now_s += 1
            assert preemption.is_requested(1)
        assert preemption.remaining_s() == 27
    assert seen == [signal.SIGUSR1] * 3
    assert len(caplog.records) == 1


def test_install_and_uninstall_twice_are_as_good_as_once(seen: list[int]) -> None:
    preemption = Preemption(USR)
    preemption.uninstall()
    for _ in range(2):
        preemption.install()
        preemption.install()
        preemption.uninstall()
        preemption.uninstall()
    signal.raise_signal(signal.SIGUSR1)
    assert not preemption.requested
    assert seen == [signal.SIGUSR1]


def test_uninstall_leaves_a_handler_that_somebody_installed_meanwhile() -> None:
    other: list[int] = []

    def note(number: int, _frame: object) -> None:
        other.append(number)

    preemption = Preemption(USR)
    preemption.install()
    ours = signal.signal(signal.SIGUSR1, note)
    preemption.uninstall()
    assert signal.getsignal(signal.SIGUSR1) is note
    # Somebody else puts back what it found: this object's handler, which is not the handler below itself.
    signal.signal(signal.SIGUSR1, ours)
    preemption.install()
    signal.raise_signal(signal.SIGUSR1)
    preemption.uninstall()
    assert preemption.requested
    assert other == []


def test_an_exception_uninstalls_too() -> None:
    before = signal.getsignal(signal.SIGUSR1)

    def fails_while_installed() -> None:
        with Preemption(USR):
            assert signal.getsignal(signal.SIGUSR1) is not before
            raise KeyError

    with pytest.raises(KeyError):
        fails_while_installed()
    assert signal.getsignal(signal.SIGUSR1) is before


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (signal.SIGKILL, "SIGKILL cannot be caught"),
        (int(signal.SIGSTOP), "SIGSTOP cannot be caught"),
        (0, "there is no signal 0"),
        (4711, "there is no signal 4711"),
        ("SIGTERM", "there is no signal 'SIGTERM'"),
    ],
)
def test_a_signal_that_cannot_be_caught_is_refused(number: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Preemption((signal.SIGTERM, number))


def test_a_real_time_signal_works_and_is_named_by_its_number(caplog: pytest.LogCaptureFixture) -> None:
    number = signal.SIGRTMIN + 3
    with Preemption((number,)) as preemption:
        signal.raise_signal(number)
        assert preemption.is_requested(7)
    assert caplog.messages == [f"signal {number} announced that this process ends soon; seen at step 7"]


# --- threads, locks, cost -------------------------------------------------------------------------------------


def in_a_thread(verb: object) -> RuntimeError | None:
    """What the verb raises in a thread that is not the main one."""
    errors: list[RuntimeError | None] = []

    def run() -> None:
        try:
            verb()  # type: ignore[operator]
            errors.append(None)
        except RuntimeError as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(60)
    return errors[0]


def test_install_and_uninstall_say_that_they_need_the_main_thread() -> None:
    preemption = Preemption(USR)
    error = in_a_thread(preemption.install)
    assert isinstance(error, RuntimeError)
    assert "install() must be called in the main thread" in str(error)
    assert "request()" in str(error)
    with preemption:
        error = in_a_thread(preemption.uninstall)
        assert isinstance(error, RuntimeError)
        assert in_a_thread(preemption.install) is None  # it is installed already


def test_request_announces_the_end_from_any_thread_and_without_install(
    caplog: pytest.LogCaptureFixture,
) -> None:
    preemption = Preemption(())
    assert in_a_thread(preemption.request) is None
    assert preemption.requested
    assert preemption.is_requested(5)
    assert caplog.messages == ["a request announced that this process ends soon; seen at step 5"]


class LockedHandler(logging.Handler):
    """A log handler in the middle of a record; its lock is not re-entrant, as those of foreign handlers are not."""

    def __init__(self) -> None:
        super().__init__()
        self.own_lock = threading.Lock()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        assert self.own_lock.acquire(timeout=0), "something is logged while the lock is held"
        self.messages.append(record.getMessage())
        self.own_lock.release()


def test_the_signal_handler_logs_nothing_and_the_next_question_logs_once() -> None:
    handler = LockedHandler()
    logger = logging.getLogger("jaxckpt")
    logger.addHandler(handler)
    try:
        with Preemption(USR, grace_s=30, clock=Clock()) as preemption:
            with handler.own_lock:
                signal.raise_signal(signal.SIGUSR1)
            assert handler.messages == []
            assert preemption.is_requested(12)
            assert preemption.is_requested(13)
    finally:
        logger.removeHandler(handler)
    assert handler.messages == ["SIGUSR1 announced that this process ends in 30.0 s; seen at step 12"]


def test_a_question_costs_little() -> None:
    preemption = Preemption(USR)
    rounds = 2000
    best_s = min(timeit.repeat(lambda: preemption.is_requested(1), number=rounds, repeat=20)) / rounds
    # Ten times what it takes on a quiet machine.
    assert best_s < 10e-6


# --- grace ----------------------------------------------------------------------------------------------------


def test_the_grace_counts_down_from_the_signal_and_stops_at_zero() -> None:
    clock = Clock()
    with Preemption(USR, grace_s=20, clock=clock) as preemption:
        assert preemption.remaining_s() is None
        clock.now_s += 100
        signal.raise_signal(signal.SIGUSR1)
        assert preemption.remaining_s() == 20
        clock.now_s += 12.5
        assert preemption.is_requested(1)
        assert preemption.remaining_s() == 7.5
        clock.now_s += 1000
        assert preemption.remaining_s() == 0


def test_an_unknown_grace_gives_no_number() -> None:
    preemption = Preemption(())
    preemption.request()
    assert preemption.remaining_s() is None


@pytest.mark.parametrize("grace_s", [-1, float("nan"), float("inf")])
def test_a_grace_that_is_no_number_of_seconds_is_refused(grace_s: float) -> None:
    with pytest.raises(ValueError, match="grace_s must be"):
        Preemption(grace_s=grace_s)


# --- with jax.distributed -------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("localhost", 0))
        return server.getsockname()[1]


def run_all(source: str, *arguments: Sequence[object]) -> list[subprocess.CompletedProcess[str]]:
    """Runs one program with each of these arguments, all at once: most of their time is that of the service's looks."""
    with contextlib.ExitStack() as stack:
        programs = [stack.enter_context(start_program(source, *each, devices=1)) for each in arguments]
        return [program.wait(90) for program in programs]


# A program's own loop; `steps()` gives up after a time in which the service answers many times over.
LOOP = textwrap.dedent("""
    import os, signal, sys, time
    import jax
    from jaxckpt._preemption import Preemption

    def initialize(rank=0, processes=1):
        jax.distributed.initialize(f"localhost:{sys.argv[1]}", num_processes=processes, process_id=rank)

    def steps(first, by=1):
        deadline_s = time.monotonic() + 60
        step = first
        while time.monotonic() < deadline_s:
            yield step
            time.sleep(0.01)
            step += by
        raise SystemExit("the loop was never told to stop")
""")


def test_jaxs_service_keeps_sigterm_and_tells_the_loop() -> None:
    program = """
        order = sys.argv[2]
        preemption = Preemption(grace_s=30)
        if order in ("install first", "install only before"):
            preemption.install()
        if order == "install only before":
            preemption.uninstall()
        initialize()
        if order == "initialize first":
            before = signal.getsignal(signal.SIGTERM)
            preemption.install()
            assert signal.getsignal(signal.SIGTERM) == before
        for step in steps(1):
            if step == 5:
                os.kill(os.getpid(), signal.SIGTERM)
                assert not preemption.requested
            if preemption.is_requested(step):
                break
        print(step > 5, preemption.requested, 29 < preemption.remaining_s() <= 30)
        # The service has SIGTERM still, or the process would end here.
        preemption.uninstall()
        os.kill(os.getpid(), signal.SIGTERM)
        print("alive", flush=True)
        jax.distributed.shutdown()
    """
    orders = ["install first", "initialize first", "install only before", "never installed"]
    results = run_all(LOOP + textwrap.dedent(program), *((free_port(), order) for order in orders))
    for order, result in zip(orders, results, strict=True):
        assert result.returncode == 0, (order, result.stderr)
        assert result.stdout.split() == ["True", "True", "True", "alive"], (order, result.stderr)
        assert "jax's preemption service announced" in result.stderr, order


def test_the_service_answers_whatever_the_steps_are() -> None:
    program = """
        initialize()
        # No step has been asked for when the signal comes, and every later object shares the counter.
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(2.5)
        preemption = Preemption()
        for step in steps(int(sys.argv[2]), int(sys.argv[3])):
            if preemption.is_requested(step):
                break
        print(abs(step - int(sys.argv[2])) <= 100 * abs(int(sys.argv[3])), Preemption().is_requested(0))
    """
    steps = [(1000, 10), (2**31 - 5, 1), (500, -1)]
    results = run_all(LOOP + textwrap.dedent(program), *((free_port(), first, by) for first, by in steps))
    for (first, by), result in zip(steps, results, strict=True):
        assert result.returncode == 0, (first, by, result.stderr)
        assert result.stdout.split() == ["True", "True"], (first, by, result.stderr)


def test_two_objects_that_count_differently_both_get_the_answer() -> None:
    program = """
        initialize()
        one, other = Preemption(), Preemption()
        answers = set()
        for step in steps(1):
            if step == 5:
                os.kill(os.getpid(), signal.SIGTERM)
            if one.is_requested(step):
                answers.add("one")
            if other.is_requested(100 + step):
                answers.add("other")
            if len(answers) == 2:
                break
        print(sorted(answers))
    """
    assert run_fork(LOOP + textwrap.dedent(program), free_port()).stdout == "['one', 'other']\n"


def test_one_process_that_knows_by_itself_does_not_wait_for_the_service() -> None:
    program = """
        initialize()
        with Preemption((signal.SIGTERM, signal.SIGUSR1)) as preemption:
            signal.raise_signal(signal.SIGUSR1)
            print(preemption.is_requested(1))
        asked = Preemption()
        asked.request()
        print(asked.is_requested(1))
    """
    result = run_fork(LOOP + textwrap.dedent(program), free_port())
    assert result.stdout.split() == ["True", "True"], result.stderr


def test_without_the_service_the_signal_is_ours() -> None:
    program = """
        jax.config.update("jax_enable_preemption_service", False)
        initialize()
        with Preemption() as preemption:
            assert not preemption.is_requested(1)
            os.kill(os.getpid(), signal.SIGTERM)
            print(preemption.is_requested(2), flush=True)
        os.kill(os.getpid(), signal.SIGTERM)
        print("not reached", flush=True)
    """
    result = run_fork(LOOP + textwrap.dedent(program), free_port(), check=False)
    assert (result.returncode, result.stdout) == (-signal.SIGTERM, "True\n"), result.stderr


@pytest.mark.parametrize("enabled", [True, False])
def test_a_jax_that_hides_the_service_is_asked_by_what_it_makes_public(enabled: bool) -> None:
    program = """
        enabled = sys.argv[2] == "True"
        jax.config.update("jax_enable_preemption_service", enabled)
        initialize()
        del sys.modules["jax._src.distributed"]
        with Preemption() as preemption:
            for step in steps(1):
                if step == 5:
                    os.kill(os.getpid(), signal.SIGTERM)
                if preemption.is_requested(step):
                    break
        print((step > 5) is enabled)
    """
    result = run_fork(LOOP + textwrap.dedent(program), free_port(), enabled)
    assert result.stdout == "True\n", result.stderr


TWO = LOOP + textwrap.dedent("""
    rank, way = int(sys.argv[2]), sys.argv[3]
    if way == "service off":
        jax.config.update("jax_enable_preemption_service", False)
    initialize(rank, processes=2)
    with Preemption((signal.SIGTERM, signal.SIGUSR1), grace_s=60) as preemption:
        if way == "taken":
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        for step in steps(1000, by=10):
            if rank == 1 and step == 1100:
                if way == "request":
                    preemption.request()
                else:
                    os.kill(os.getpid(), signal.SIGUSR1 if way in ("SIGUSR1", "taken") else signal.SIGTERM)
            if preemption.is_requested(step):
                break
            if rank == 0 and way in ("service off", "taken") and step == 1200:
                break
            time.sleep(0.02 * rank)
    print(step, preemption.requested, flush=True)
    jax.distributed.shutdown()
""")


def run_two(*ways: str) -> dict[str, list[subprocess.CompletedProcess[str]]]:
    """Both processes of a job for each way."""
    ports = [free_port() for _ in ways]
    results = run_all(
        TWO, *((port, rank, way) for port, way in zip(ports, ways, strict=True) for rank in (0, 1))
    )
    for result in results:
        assert result.returncode == 0, result.stderr
    return {way: results[2 * place : 2 * place + 2] for place, way in enumerate(ways)}


def test_two_processes_stop_after_one_step_when_one_of_them_is_told() -> None:
    for way, (first, second) in run_two("SIGTERM", "SIGUSR1", "request").items():
        assert first.stdout == second.stdout, way
        step, is_requested = first.stdout.split()
        assert int(step) > 1100, way
        assert is_requested == "True", way
        assert "may stop after different steps" not in first.stderr + second.stderr, way


def test_two_processes_that_cannot_agree_are_warned() -> None:
    for way, (first, second) in run_two("service off", "taken").items():
        assert (first.stdout, second.stdout) == ("1200 False\n", "1100 True\n"), way
        assert "may stop after different steps" in second.stderr, way
        assert "may stop after different steps" not in first.stderr, way
