"""How does a program end that never waits for what it saved?

What was being written is finished, whatever ends the program short of a signal that kills. The exit status is not 0 if
a save failed and nobody knows. Each program runs in a process of its own; what it left is judged from outside. Signals
are sent by the storage itself, at the moment that a test is about.
"""

from __future__ import annotations

import os
import pathlib
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest

import jaxckpt

from .helpers import ROOT, run_fork

pytestmark = pytest.mark.slow

# Python ends with this status when something fails after the program's last line.
FAILED_AT_THE_END = 120

PRELUDE = textwrap.dedent("""
    import atexit, errno, multiprocessing, os, signal, sys, threading, time
    import numpy as np
    import jaxckpt
    from jaxckpt._store import Kernel, LocalStore

    directory = sys.argv[1]

    def tree_of(step):
        return {"w": np.full(1000, step)}

    def at(seconds, condition):
        deadline_s = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline_s
            time.sleep(0.005)

    class FullDisk(Kernel):
        '''Refuses every write while it is full.'''
        def __init__(self, steps=None):
            self.steps = steps
        def is_full(self, path):
            return self.steps is None or any(f"step_{step:08d}" in str(path) for step in self.steps)
        def open(self, path, flags, mode=0o777):
            if flags & os.O_CREAT and self.is_full(path):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
            return os.open(path, flags, mode)

    class SlowCommit(Kernel):
        '''Calls a function in the background right before a manifest is published.'''
        def __init__(self, before):
            self.before = before
        def rename(self, source, target):
            if target.endswith("manifest.msgpack"):
                self.before(target)
            os.rename(source, target)

    def is_ending():
        '''Python joins the background threads: the program's last line is over.'''
        return not threading.main_thread().is_alive()

    def wait_until_the_end(target):
        at(60, is_ending)

    def interrupt(*_):
        os.kill(os.getpid(), signal.SIGINT)

    def managed(kernel=None, **options):
        return jaxckpt.CheckpointManager(LocalStore(directory, kernel), **options)
""")


def run(
    program: str, directory: pathlib.Path, *arguments: str, timeout_s: float = 120
) -> subprocess.CompletedProcess[str]:
    return run_fork(
        PRELUDE + textwrap.dedent(program), directory, *arguments, timeout_s=timeout_s, check=False
    )


def assert_saved(directory: pathlib.Path, *steps: int) -> None:
    """Exactly these steps are there, and whole."""
    manager = jaxckpt.CheckpointManager(directory)
    assert manager.steps() == list(steps)
    for step in steps:
        assert (np.asarray(manager.restore(step)["w"]) == step).all()


# --- without an end -------------------------------------------------------------------------------------------


def test_a_program_that_waits_for_nothing_finishes_its_last_save(tmp_path: pathlib.Path) -> None:
    program = """
        manager = managed(SlowCommit(wait_until_the_end))
        manager.save(1, tree_of(1))
    """
    result = run(program, tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    assert_saved(tmp_path, 1)


def test_the_steps_that_retention_drops_are_gone_when_the_program_has_ended(tmp_path: pathlib.Path) -> None:
    program = """
        manager = managed(max_to_keep=1)
        for step in range(4):
            manager.save(step, tree_of(step))
    """
    result = run(program, tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    assert_saved(tmp_path, 3)
    assert sorted(os.listdir(tmp_path)) == ["checkpoint.json", "step_00000003"]


def test_a_plain_asynchronous_save_is_finished_too(tmp_path: pathlib.Path) -> None:
    program = """
        jaxckpt.save_async(LocalStore(directory, SlowCommit(wait_until_the_end)), tree_of(7))
    """
    result = run(program, tmp_path / "checkpoint")
    assert (result.returncode, result.stderr) == (0, "")
    assert (np.asarray(jaxckpt.restore(tmp_path / "checkpoint")["w"]) == 7).all()


def test_a_script_does_as_well_as_a_command(tmp_path: pathlib.Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(
        PRELUDE
        + textwrap.dedent("""
            kernel = FullDisk() if sys.argv[2] == "full" else SlowCommit(wait_until_the_end)
            managed(kernel).save(1, tree_of(1))
        """)
    )
    environment = dict(os.environ, JAX_PLATFORMS="cpu", PYTHONPATH=str(ROOT))
    codes = {}
    for case in ("full", "free"):
        command = [sys.executable, script, tmp_path / case, case]
        result = subprocess.run(command, env=environment, capture_output=True, timeout=120, check=False)
        codes[case] = result.returncode
    assert codes == {"full": FAILED_AT_THE_END, "free": 0}
    assert_saved(tmp_path / "free", 1)


def test_nothing_warns_under_dash_w_error(tmp_path: pathlib.Path) -> None:
    source = PRELUDE + textwrap.dedent("""
        manager = managed(SlowCommit(wait_until_the_end), max_to_keep=1)
        manager.save(1, tree_of(1))
    """)
    environment = dict(os.environ, JAX_PLATFORMS="cpu", PYTHONPATH=str(ROOT))
    command = [sys.executable, "-X", "dev", "-W", "error", "-c", source, tmp_path]
    result = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert_saved(tmp_path, 1)


# --- failures -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["manager", "save_async"])
def test_a_failure_that_nobody_saw_spoils_the_exit_status(tmp_path: pathlib.Path, way: str) -> None:
    program = """
        print("trained", flush=True)
        if sys.argv[2] == "manager":
            managed(FullDisk()).save(1, tree_of(1))
        else:
            is_returned = threading.Event()
            class LateFullDisk(FullDisk):
                def is_full(self, path):
                    return is_returned.wait(60)
            jaxckpt.save_async(LocalStore(directory, LateFullDisk()), tree_of(1))
            is_returned.set()
        print("end")
    """
    result = run(program, tmp_path / "run", way)
    assert result.returncode == FAILED_AT_THE_END, result.stderr
    assert result.stdout == "trained\nend\n"
    assert "No space left on device" in result.stderr
    assert "nobody waited for it" in result.stderr


@pytest.mark.parametrize("way", ["manager", "save_async"])
def test_a_failure_at_the_commit_that_nobody_saw_spoils_the_exit_status(
    tmp_path: pathlib.Path, way: str
) -> None:
    """It happens when the program's last line is over."""
    program = """
        def refuse(target):
            wait_until_the_end(target)
            raise OSError(errno.EIO, os.strerror(errno.EIO), target)

        if sys.argv[2] == "manager":
            managed(SlowCommit(refuse)).save(1, tree_of(1))
        else:
            jaxckpt.save_async(LocalStore(directory, SlowCommit(refuse)), tree_of(1))
    """
    result = run(program, tmp_path / "run", way)
    assert result.returncode == FAILED_AT_THE_END, result.stderr
    assert "Input/output error EIO" in result.stderr
    assert "nobody waited for it" in result.stderr


def test_a_limit_on_the_size_of_files_spoils_the_exit_status(tmp_path: pathlib.Path) -> None:
    program = """
        import resource
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        manager = managed()
        manager.save(1, tree_of(1))
        manager.save(2, {"w": np.zeros(1_000_000)})
    """
    result = run(program, tmp_path)
    assert result.returncode == FAILED_AT_THE_END, result.stderr
    assert "EFBIG" in result.stderr
    assert "the newest committed step is 1" in result.stderr
    assert_saved(tmp_path, 1)


@pytest.mark.parametrize(
    "seen",
    [
        "try:\n    pending.wait()\nexcept jaxckpt.WriteError:\n    pass",
        "pending.wait_snapshot(); at(60, pending.done)\nassert pending.exception() is not None",
        "try:\n    manager.wait()\nexcept jaxckpt.WriteError:\n    pass",
        "try:\n    manager.close()\nexcept jaxckpt.WriteError:\n    pass",
    ],
    ids=["PendingSave.wait", "PendingSave.exception", "manager.wait", "manager.close"],
)
def test_a_failure_that_the_program_saw_is_the_programs_affair(tmp_path: pathlib.Path, seen: str) -> None:
    program = 'manager = managed(FullDisk())\npending = manager.save(1, {"w": np.zeros(10)})\n' + seen
    result = run(program, tmp_path)
    assert result.returncode == 0, result.stderr
    assert "nobody waited" not in result.stderr


def test_a_failure_that_a_later_save_made_up_for_does_not_count(tmp_path: pathlib.Path) -> None:
    program = """
        manager = managed(FullDisk(steps=[1, 2]))
        for step in range(4):
            manager.save(step, tree_of(step))
    """
    result = run(program, tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("No space left on device") == 2  # each was logged at once
    assert_saved(tmp_path, 0, 3)


def test_a_success_before_a_failure_does_not_make_up_for_it(tmp_path: pathlib.Path) -> None:
    program = """
        manager = managed(FullDisk(steps=[2]))
        for step in range(3):
            manager.save(step, tree_of(step))
    """
    result = run(program, tmp_path)
    assert result.returncode == FAILED_AT_THE_END, result.stderr
    assert "the newest committed step is 1" in result.stderr
    assert_saved(tmp_path, 0, 1)


def test_a_success_of_another_manager_does_not_make_up_for_a_failure(tmp_path: pathlib.Path) -> None:
    program = """
        managed(FullDisk()).save(1, tree_of(1))
        other = jaxckpt.CheckpointManager(directory + "/other")
        other.save(1, tree_of(1))
        other.wait()
    """
    result = run(program, tmp_path)
    assert result.returncode == FAILED_AT_THE_END, result.stderr


# --- ways to end ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("end", "code"),
    [
        ("sys.exit(0)", 0),
        ("sys.exit(3)", 3),
        ("sys.exit('no more data')", 1),
        ("1 / 0", 1),
        ("raise KeyboardInterrupt", -signal.SIGINT),
    ],
)
@pytest.mark.parametrize("is_managed", [True, False], ids=["with manager", "no with"])
def test_the_save_in_flight_is_finished_whatever_ends_the_loop(
    tmp_path: pathlib.Path, end: str, code: int, is_managed: bool
) -> None:
    # In `with`, the manager waits before the program's end.
    is_over = "lambda: sys.exc_info()[0] or is_left.is_set() or is_ending()"
    program = f"""
        is_left = threading.Event()
        manager = managed(SlowCommit(lambda target: at(60, {is_over})), save_interval_steps=2)
        def loop():
            for step in range(1, 100):
                manager.save(step, tree_of(step))
                if step == 3:
                    is_left.set()
                    {end}
        if {is_managed}:
            with manager:
                loop()
        else:
            loop()
    """
    result = run(program, tmp_path)
    assert result.returncode == code, result.stderr
    # Step 3 was not due, and its tree might be half a step.
    assert_saved(tmp_path, 2)


def test_leaving_with_by_sys_exit_hides_no_failure(tmp_path: pathlib.Path) -> None:
    program = """
        with managed(FullDisk()) as manager:
            manager.save(1, tree_of(1))
            sys.exit(0)
    """
    result = run(program, tmp_path)
    assert result.returncode == FAILED_AT_THE_END, result.stderr


def test_leaving_with_normally_raises_the_failure(tmp_path: pathlib.Path) -> None:
    program = """
        with managed(FullDisk()) as manager:
            manager.save(1, tree_of(1))
    """
    result = run(program, tmp_path)
    assert result.returncode == 1
    assert "WriteError" in result.stderr
    assert "nobody waited" not in result.stderr


def test_the_loops_own_exception_is_the_one_that_is_seen(tmp_path: pathlib.Path) -> None:
    program = """
        try:
            with managed(FullDisk()) as manager:
                manager.save(1, tree_of(1))
                raise LookupError("no more data")
        except LookupError:
            print("seen")
    """
    result = run(program, tmp_path)
    assert result.stdout == "seen\n"
    # The loop's exception was dealt with, the failed save was not.
    assert result.returncode == FAILED_AT_THE_END


# --- Ctrl-C ---------------------------------------------------------------------------------------------------


def test_ctrl_c_while_a_save_is_in_flight_lets_it_finish(tmp_path: pathlib.Path) -> None:
    program = """
        def before(target):
            interrupt()
            wait_until_the_end(target)

        manager = managed(SlowCommit(before))
        manager.save(1, tree_of(1))
        while True:
            time.sleep(0.01)
    """
    result = run(program, tmp_path)
    assert result.returncode == -signal.SIGINT
    assert "KeyboardInterrupt" in result.stderr
    assert_saved(tmp_path, 1)


def test_ctrl_c_while_a_save_waits_for_the_one_before_lets_that_finish(tmp_path: pathlib.Path) -> None:
    program = """
        def before(target):
            at(60, lambda: is_waiting)
            interrupt()
            wait_until_the_end(target)

        is_waiting = []
        manager = managed(SlowCommit(before))
        manager.save(1, tree_of(1))
        is_waiting.append(True)
        manager.save(2, tree_of(2))
        print("not reached")
    """
    result = run(program, tmp_path)
    assert (result.returncode, result.stdout) == (-signal.SIGINT, "")
    assert_saved(tmp_path, 1)


def test_ctrl_c_while_a_snapshot_waits_for_room_gives_that_save_up(tmp_path: pathlib.Path) -> None:
    """The tree is not copied whole, so that nothing of it may be committed. The interrupt is raised once."""
    program = """
        import jax.numpy as jnp
        is_caught = threading.Event()

        class NoRoom(Kernel):
            def pwrite(self, descriptor, data, offset):
                if len(data) > 100_000 and not is_caught.is_set():
                    interrupt()
                    is_caught.wait(60)
                return os.pwrite(descriptor, data, offset)

        def on_interrupt(number, frame):
            is_caught.set()
            raise KeyboardInterrupt

        signal.signal(signal.SIGINT, on_interrupt)
        manager = managed(NoRoom(), options=jaxckpt.SaveOptions(staging="pool", host_bytes_max=2 << 20))
        manager.save(1, tree_of(1)).wait()
        big = {str(number): jnp.full(200_000, number) for number in range(30)}
        try:
            manager.save(2, big)
        except KeyboardInterrupt:
            print("interrupted", flush=True)
        manager.wait()
        manager.save(3, tree_of(3)).wait()
        manager.wait()
        manager.close()
    """
    result = run(program, tmp_path)
    assert (result.returncode, result.stdout) == (0, "interrupted\n"), result.stderr
    assert_saved(tmp_path, 1, 3)
    assert sorted(os.listdir(tmp_path)) == ["checkpoint.json", "step_00000001", "step_00000003"]


def test_an_interrupt_before_anything_is_written_leaves_the_step_due(tmp_path: pathlib.Path) -> None:
    program = """
        class Interrupting:
            '''The signal comes while the item is asked for its state.'''
            def get_state(self):
                raise KeyboardInterrupt
            def set_state(self, state):
                pass

        manager = managed()
        try:
            manager.save(1, tree_of(1), items={"data": Interrupting()})
        except KeyboardInterrupt:
            print("interrupted")
        manager.wait()
        manager.save(1, tree_of(1))
        manager.close()
    """
    result = run(program, tmp_path)
    assert (result.returncode, result.stdout) == (0, "interrupted\n"), result.stderr
    assert_saved(tmp_path, 1)


@pytest.mark.parametrize("interrupts", [1, 2])
def test_ctrl_c_at_the_end_cuts_the_save_off_and_says_so(tmp_path: pathlib.Path, interrupts: int) -> None:
    """One that comes before the last line is over is the loop's; one after that ends a program that would wait."""
    program = """
        def before(target):
            if sys.argv[2] == "2":
                interrupt()
            wait_until_the_end(target)
            interrupt()
            time.sleep(600)

        manager = managed(SlowCommit(before))
        manager.save(1, tree_of(1))
        if sys.argv[2] == "2":
            while True:
                time.sleep(0.01)
    """
    result = run(program, tmp_path, str(interrupts), timeout_s=60)
    assert result.returncode == (FAILED_AT_THE_END if interrupts == 1 else -signal.SIGINT), result.stderr
    assert "was cut off" in result.stderr
    assert_saved(tmp_path)
    # The next run tidies up.
    with jaxckpt.CheckpointManager(tmp_path) as manager:
        manager.save(2, {"w": np.full(1000, 2)})
    assert_saved(tmp_path, 2)
    assert sorted(os.listdir(tmp_path)) == ["checkpoint.json", "step_00000002"]


# --- what others do at the end --------------------------------------------------------------------------------


def test_exit_handlers_of_others_run_before_and_after(tmp_path: pathlib.Path) -> None:
    """Those registered before jaxckpt's run after it, when the status is spoilt already."""
    program = """
        def say(what):
            print(what, flush=True)
            print(what, "is done", flush=True)

        atexit.register(say, "registered before")
        manager = managed(FullDisk())
        manager.save(1, tree_of(1))
        atexit.register(say, "registered after")
    """
    result = run(program, tmp_path)
    assert result.returncode == FAILED_AT_THE_END, result.stderr
    assert result.stdout.splitlines() == [
        "registered after",
        "registered after is done",
        "registered before",
        "registered before is done",
    ], result.stderr
    assert result.stderr.count("Traceback") <= 1


@pytest.mark.parametrize("case", ["full", "free"])
def test_all_that_was_printed_arrives(tmp_path: pathlib.Path, case: str) -> None:
    program = """
        manager = managed(FullDisk() if sys.argv[2] == "full" else None)
        manager.save(1, tree_of(1))
        for number in range(20_000):
            print(number)
    """
    result = run(program, tmp_path, case)
    assert result.returncode == (FAILED_AT_THE_END if case == "full" else 0)
    assert result.stdout.split() == [str(number) for number in range(20_000)]


def test_the_reason_is_told_although_the_program_has_closed_its_output(tmp_path: pathlib.Path) -> None:
    program = """
        manager = managed(FullDisk())
        manager.save(1, tree_of(1))
        sys.stdout.close()
    """
    result = run(program, tmp_path)
    assert result.returncode == FAILED_AT_THE_END
    assert "a save failed and nobody waited for it" in result.stderr


@pytest.mark.parametrize(("output", "case"), [("head", "full"), ("head", "free"), ("closed", "full")])
def test_output_that_nobody_reads_does_no_harm(tmp_path: pathlib.Path, output: str, case: str) -> None:
    program = PRELUDE + textwrap.dedent("""
        kernel = FullDisk() if sys.argv[2] == "full" else SlowCommit(wait_until_the_end)
        manager = managed(kernel)
        print("begin", flush=True)
        manager.save(1, tree_of(1))
        print("end")
    """)
    environment = dict(os.environ, JAX_PLATFORMS="cpu", PYTHONPATH=str(ROOT))
    environment.pop("PYTHONUNBUFFERED", None)
    tail = "| head -1" if output == "head" else ">&-"
    shell = f'set -o pipefail; "$0" -c "$@" {tail}'
    if output == "closed":
        program = program.replace('print("begin", flush=True)', "assert sys.stdout is None")
    result = subprocess.run(
        ["bash", "-c", shell, sys.executable, program, str(tmp_path), case],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.stdout == ("begin\n" if output == "head" else "")
    if case == "full":
        assert result.returncode == FAILED_AT_THE_END, result.stderr
        assert "No space left on device" in result.stderr
    else:
        # `head` may be gone when the last line is printed: Python's own status for that is the same.
        assert result.returncode in (0, FAILED_AT_THE_END if output == "head" else 0), result.stderr
        assert "nobody waited" not in result.stderr
        assert_saved(tmp_path, 1)


# --- other processes of the program ---------------------------------------------------------------------------


def test_a_forked_worker_neither_writes_nor_spoils_nor_holds_anything(tmp_path: pathlib.Path) -> None:
    """Data loaders fork while a save is in flight, and live for as long as the training does."""
    program = """
        import warnings
        warnings.simplefilter("ignore")  # Python and jax warn of forks in programs with threads
        is_forked = threading.Event()
        events = []
        manager = managed(SlowCommit(lambda target: is_forked.wait(60)), max_to_keep=1, on_event=events.append)
        manager.save(1, tree_of(1))
        read_end, write_end = os.pipe()

        def work():
            os.close(write_end)
            os.read(read_end, 1)  # until the parent lets go

        worker = multiprocessing.get_context("fork").Process(target=work)
        worker.start()
        is_forked.set()
        manager.wait()
        # A worker that is born while a step is open inherits the file, too.
        opened = manager.open(1)
        second = multiprocessing.get_context("fork").Process(target=work)
        second.start()
        del opened
        manager.save(2, tree_of(2))
        manager.wait()
        manager.save(3, tree_of(3))
        manager.wait()
        print(manager.steps(), [event.step for event in events if event.kind == "in use"])
        print(sorted(os.listdir(directory)))
        os.close(write_end)
        worker.join(60)
        second.join(60)
        print(worker.exitcode, second.exitcode)
    """
    result = run(program, tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [
        "[3] []",
        "['checkpoint.json', 'step_00000003']",
        "0 0",
    ]
    assert_saved(tmp_path, 3)


def test_the_end_of_a_forked_worker_does_not_free_what_the_program_holds(tmp_path: pathlib.Path) -> None:
    program = """
        import gc, warnings
        warnings.simplefilter("ignore")
        manager = managed(max_to_keep=1)
        manager.save(1, tree_of(1))
        manager.wait()
        opened = manager.open(1)

        def work():
            global opened
            del opened
            gc.collect()

        worker = multiprocessing.get_context("fork").Process(target=work)
        worker.start()
        worker.join(60)
        manager.save(2, tree_of(2))
        manager.wait()
        print(worker.exitcode, manager.steps())
        del opened
        print(manager.prune(), manager.steps())
    """
    result = run(program, tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == ["0 [1, 2]", "[1] [2]"]


def test_a_forked_worker_does_not_report_the_programs_failures(tmp_path: pathlib.Path) -> None:
    program = """
        import warnings
        warnings.simplefilter("ignore")
        manager = managed(FullDisk())
        pending = manager.save(1, tree_of(1))
        at(60, pending.done)
        pid = os.fork()
        if pid == 0:
            sys.exit(0)  # a worker that ends as programs do, exit handlers included
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        pending.exception()
    """
    result = run(program, tmp_path)
    assert (result.returncode, result.stdout) == (0, "0\n"), result.stderr


def test_a_spawned_process_ends_as_a_program_does(tmp_path: pathlib.Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(
        PRELUDE
        + textwrap.dedent("""
            def train(case):
                kernel = FullDisk() if case == "full" else SlowCommit(wait_until_the_end)
                manager = jaxckpt.CheckpointManager(LocalStore(f"{directory}/{case}", kernel))
                manager.save(1, tree_of(1))

            if __name__ == "__main__":
                spawn = multiprocessing.get_context("spawn")
                workers = [spawn.Process(target=train, args=(case,)) for case in ("full", "free")]
                for worker in workers:
                    worker.start()
                for worker in workers:
                    worker.join(100)
                print(*(worker.exitcode for worker in workers))
        """)
    )
    environment = dict(os.environ, JAX_PLATFORMS="cpu", PYTHONPATH=str(ROOT))
    result = subprocess.run(
        [sys.executable, script, tmp_path],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"{FAILED_AT_THE_END} 0\n", result.stderr
    assert_saved(tmp_path / "free", 1)
