"""How does a test run a function in several real processes of one jax.distributed job?

    def add_up(worker: Worker, start: int) -> int: ...        # at the top level of a test module

    outcomes = run_processes(add_up, 4, arguments=(7,))       # [Outcome("returned", value=...), ...]

    with start_processes(add_up, 4) as group:                 # to send signals meanwhile
        group.receive(2)                                      # what worker 2 told with `worker.send`
        group.send_signal(2, signal.SIGSTOP)
        outcomes = group.wait(30)

Importing jax takes seconds, and a process whose jax has touched its devices must not fork. So a *zygote* is started
once for a test session: a fresh process that imports jax and the modules of the tests, starts no backend, and forks a
worker whenever it is asked to. Four workers of one device each are up, connected and gone within a second.

Functions travel by module and name, arguments and results as pickles. A worker's standard output and error go to a
file, so that what jax logs ends up in its `Outcome` and not between the dots of pytest. A worker ends by `os._exit`, so
nothing runs at its exit; process 0, whose end would make jax abort the others, leaves last.

Nothing outlives a test: leaving the ``with`` kills what still runs, and if the test session itself is killed, the
zygote sees its socket closed and kills its workers. Everything is signalled through a descriptor of the process that
was started, so no other process can be hit.

A whole program can be run by a fork of the zygote, too (`start_program`, `tests.helpers.run_fork`). It is what
``python -c`` would have run: it is ``__main__``, and ends as Python programs end, with their exit handlers and status.

Where no jax is needed, `run_threads` has threads play the processes, with a `MemoryService` between them.

With two and more devices in a process, several collective programs in flight hang (the CPU client has no thread for
each device): such a function calls `block_until_ready` after each.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import gc
import importlib
import io
import multiprocessing
import multiprocessing.connection
import os
import pathlib
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import traceback
import types
import warnings
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Barrier
from types import TracebackType
from typing import Any, Literal, NoReturn, Self

from jaxckpt._errors import CoordinationError
from jaxckpt._processes import Channel, Group

ROOT = pathlib.Path(__file__).resolve().parent.parent


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How one worker ended.

    Attributes:
      status: ``"returned"`` or ``"raised"``; ``"died"`` if it ended without a word, ``"stuck"`` if it was killed at the
        end of the waiting.
      value: What the function returned.
      error: What it raised, where that can be pickled.
      error_text: The traceback.
      exit_code: 0, or the number of the signal that ended it, negated.
      output: What it wrote to its standard output and error.
    """

    status: Literal["returned", "raised", "died", "stuck"]
    value: Any = None
    error: BaseException | None = None
    error_text: str = ""
    exit_code: int | None = None
    output: str = ""


@dataclasses.dataclass(frozen=True)
class _Job:
    module: str
    function: str
    count: int
    devices: int
    heartbeat_s: int
    recoverable: bool
    path: str
    arguments: bytes


@dataclasses.dataclass(frozen=True)
class _Script:
    source: str
    arguments: tuple[str, ...]
    devices: int | None
    folder: str
    path: str


class Worker:
    """What the function in a worker is given first.

    Attributes:
      index: Its process index.
      count: How many workers there are.
      pids: The process ids of all, by index.
      path: A directory that all workers share; it is gone when the group is.
    """

    def __init__(
        self, index: int, pids: tuple[int, ...], path: pathlib.Path, connection: Connection, barrier: Barrier
    ) -> None:
        self.index = index
        self.count = len(pids)
        self.pids = pids
        self.path = path
        self._connection = connection
        self._barrier = barrier

    def send(self, value: Any) -> None:
        """Tells the test something, which gets it by `Processes.receive`."""
        self._connection.send(("said", value))

    def receive(self, timeout_s: float = 60) -> Any:
        """Waits for what the test says by `Processes.send`."""
        if not self._connection.poll(timeout_s):
            raise TimeoutError(f"the test said nothing within {timeout_s} s")
        return self._connection.recv()

    def meet(self, timeout_s: float = 60) -> None:
        """Waits until all workers are here, without the help of jax."""
        self._barrier.wait(timeout_s)


def run_processes(
    function: Callable[..., Any],
    count: int,
    devices: int = 1,
    *,
    timeout_s: float = 60,
    heartbeat_s: int = 10,
    recoverable: bool = False,
    arguments: Sequence[Any] = (),
) -> list[Outcome]:
    """Calls ``function(worker, *arguments)`` in so many processes of one job and waits until all have ended.

    Args:
      function: At the top level of a module that can be imported without touching devices.
      count: Number of processes.
      devices: CPU devices in each.
      timeout_s: Whatever still runs then is killed.
      heartbeat_s: Time after which jax takes a process for dead.
      recoverable: Whether the survivors of a dead process go on, which otherwise jax aborts.
      arguments: The same for all.
    """
    with start_processes(
        function, count, devices, heartbeat_s=heartbeat_s, recoverable=recoverable, arguments=arguments
    ) as group:
        return group.wait(timeout_s)


def start_processes(
    function: Callable[..., Any],
    count: int,
    devices: int = 1,
    *,
    heartbeat_s: int = 10,
    recoverable: bool = False,
    arguments: Sequence[Any] = (),
) -> Processes:
    """Like `run_processes`, without waiting."""
    return Processes(function, count, devices, heartbeat_s, recoverable, arguments)


class Processes:
    """The processes of one group; use it in a ``with`` statement, which kills what is left at its end."""

    def __init__(
        self,
        function: Callable[..., Any],
        count: int,
        devices: int,
        heartbeat_s: int,
        recoverable: bool,
        arguments: Sequence[Any],
    ) -> None:
        self._zygote = _the_zygote()
        self._directory = tempfile.TemporaryDirectory(prefix="jaxckpt-processes-")
        job = _Job(
            module=function.__module__,
            function=function.__qualname__,
            count=count,
            devices=devices,
            heartbeat_s=heartbeat_s,
            recoverable=recoverable,
            path=self._directory.name,
            arguments=pickle.dumps(tuple(arguments)),
        )
        pairs = [multiprocessing.Pipe() for _ in range(count)]
        self._connections = [near for near, _ in pairs]
        self.pids: list[int] = self._zygote.fork(job, [far for _, far in pairs])
        for _, far in pairs:
            far.close()
        # A worker stays a zombie until the zygote is told to reap it, so a pid cannot be anybody else's yet.
        self._handles = [os.pidfd_open(pid) for pid in self.pids]
        self._said: list[list[Any]] = [[] for _ in self.pids]
        self._results: list[Outcome | None] = [None] * count
        self._silent: set[int] = set()  # workers whose end of the connection is closed
        self._is_closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def send_signal(self, index: int, number: signal.Signals) -> None:
        """Sends a signal to one worker; nothing happens if it has ended."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._handles[index], number)

    def send(self, index: int, value: Any) -> None:
        """Says something to a worker, which gets it by `Worker.receive`."""
        self._connections[index].send(value)

    def receive(self, index: int, timeout_s: float = 60) -> Any:
        """Waits for what a worker says by `Worker.send`."""
        deadline = time.monotonic() + timeout_s
        while not self._said[index]:
            if index in self._silent or self._results[index] is not None:
                raise AssertionError(f"worker {index} ended: {self._results[index]}\n{self._output(index)}")
            if time.monotonic() > deadline:
                raise TimeoutError(f"worker {index} said nothing within {timeout_s} s\n{self._output(index)}")
            self._listen([index], deadline)
        return self._said[index].pop(0)

    def wait(self, timeout_s: float = 60, indices: Sequence[int] | None = None) -> list[Outcome]:
        """Waits until the workers have returned, raised or died; kills what still runs then, or after the time.

        Args:
          timeout_s: How long to wait.
          indices: Which workers to wait for, all if None; one that is stopped never ends.
        """
        awaited = range(len(self.pids)) if indices is None else indices
        deadline = time.monotonic() + timeout_s
        while waiting := [i for i in awaited if self._results[i] is None and i not in self._silent]:
            if time.monotonic() > deadline:
                break
            self._listen(waiting, deadline)
        # A worker that has told its result waits to be dismissed: process 0 last, for it keeps the others connected.
        for index in reversed(range(len(self.pids))):
            self._dismiss(index)
        outcomes = [self._outcome(index) for index in range(len(self.pids))]
        self.close()
        return outcomes

    def close(self) -> None:
        """Kills whatever still runs, and clears up."""
        if self._is_closed:
            return
        self._is_closed = True
        for index in range(len(self.pids)):
            self.send_signal(index, signal.SIGKILL)
        for index, pid in enumerate(self.pids):
            self._zygote.reap(pid)
            os.close(self._handles[index])
            self._connections[index].close()
        self._directory.cleanup()

    def _listen(self, indices: list[int], deadline: float) -> None:
        by_connection = {self._connections[index]: index for index in indices}
        left_s = max(0.0, deadline - time.monotonic())
        for ready in multiprocessing.connection.wait(list(by_connection), left_s):
            assert isinstance(ready, Connection)
            index = by_connection[ready]
            try:
                word, value = ready.recv()
            except (EOFError, OSError):
                self._silent.add(index)
                continue
            if word == "said":
                self._said[index].append(value)
            else:
                self._results[index] = value

    def _dismiss(self, index: int) -> None:
        if self._results[index] is not None:
            with contextlib.suppress(OSError):
                self._connections[index].send("dismissed")
            multiprocessing.connection.wait([self._handles[index]], 5)
        elif index in self._silent:
            multiprocessing.connection.wait([self._handles[index]], 5)
        self.send_signal(index, signal.SIGKILL)

    def _outcome(self, index: int) -> Outcome:
        exit_code = self._zygote.reap(self.pids[index])
        result = self._results[index]
        if result is None:
            result = Outcome("died" if index in self._silent else "stuck")
        return dataclasses.replace(result, exit_code=exit_code, output=self._output(index))

    def _output(self, index: int) -> str:
        try:
            return _output_path(self._directory.name, index).read_text(errors="replace")
        except FileNotFoundError:
            return ""


def _output_path(path: str, index: int) -> pathlib.Path:
    return pathlib.Path(path) / f"output-{index}"


# --- a program ----------------------------------------------------------------------------------------------------


def start_program(source: str, *arguments: object, devices: int | None = None) -> Program:
    """Runs Python source as ``python -c`` does, with these arguments and with so many CPU devices.

    jax, jaxckpt and maybe modules of the tests are imported already, so this is not for a program that looks at what is
    imported.
    """
    return Program(source, tuple(map(str, arguments)), devices)


def xla_flags(devices: int | None = None) -> str:
    """The flags of the tests' own process, with so many CPU devices instead of its own."""
    flags = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if "device_count" not in flag]
    if devices is not None:
        flags.append(f"--xla_force_host_platform_device_count={devices}")
    return " ".join(flags)


class Program:
    """A program that runs; use it in a ``with`` statement, which kills it if it still runs at the end.

    Attributes:
      pid: Its process id, which is nobody else's until the ``with`` statement ends.
    """

    def __init__(self, source: str, arguments: tuple[str, ...], devices: int | None) -> None:
        self._zygote = _the_zygote()
        self._directory = tempfile.TemporaryDirectory(prefix="jaxckpt-program-")
        script = _Script(textwrap.dedent(source), arguments, devices, os.getcwd(), self._directory.name)
        self.pid = self._zygote.run(script)
        self._handle = os.pidfd_open(self.pid)
        self._is_closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def wait(self, timeout_s: float) -> subprocess.CompletedProcess[str]:
        """Waits until it has ended; after the time it is killed, and `subprocess.TimeoutExpired` is raised."""
        has_ended = bool(multiprocessing.connection.wait([self._handle], timeout_s))
        output = [_output_path(self._directory.name, number).read_text() for number in (1, 2)]
        self.close()
        if not has_ended:
            raise subprocess.TimeoutExpired("a program", timeout_s, *output)
        return subprocess.CompletedProcess("a program", self._zygote.reap(self.pid), *output)

    def close(self) -> None:
        """Kills it if it still runs, and clears up."""
        if self._is_closed:
            return
        self._is_closed = True
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._handle, signal.SIGKILL)
        self._zygote.reap(self.pid)
        os.close(self._handle)
        self._directory.cleanup()


# --- the zygote, as the test session sees it ----------------------------------------------------------------------


class _Zygote:
    def __init__(self) -> None:
        near, far = socket.socketpair()
        environment = dict(os.environ)
        environment["XLA_FLAGS"] = xla_flags()
        environment["JAX_PLATFORMS"] = "cpu"
        environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
        source = f"from tests.processes import serve; exec(serve({far.fileno()}))"
        self._process = subprocess.Popen(
            [sys.executable, "-c", source], env=environment, pass_fds=[far.fileno()], stdin=subprocess.DEVNULL
        )
        far.close()
        self._socket = near
        self._exit_codes: dict[int, int] = {}

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def fork(self, job: _Job, connections: list[Connection]) -> list[int]:
        _send(self._socket, ("fork", job))
        socket.send_fds(self._socket, [b"."], [connection.fileno() for connection in connections])
        return self._answer()

    def run(self, script: _Script) -> int:
        _send(self._socket, ("run", script))
        pid: int = self._answer()
        # Ids come again in a long session.
        self._exit_codes.pop(pid, None)
        return pid

    def reap(self, pid: int) -> int:
        if pid not in self._exit_codes:
            _send(self._socket, ("reap", pid))
            self._exit_codes[pid] = self._answer()
        return self._exit_codes[pid]

    def _answer(self) -> Any:
        word, value = _receive(self._socket)
        if word == "failed":
            raise RuntimeError(f"the zygote failed:\n{value}")
        return value

    def stop(self) -> None:
        self._socket.close()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


_zygote: _Zygote | None = None


def _the_zygote() -> _Zygote:
    global _zygote  # noqa: PLW0603  one for the test session
    if _zygote is None or not _zygote.is_alive:
        _zygote = _Zygote()
        atexit.register(_zygote.stop)
    return _zygote


def _send(connection: socket.socket, value: Any) -> None:
    data = pickle.dumps(value)
    connection.sendall(len(data).to_bytes(8, "big") + data)


def _receive(connection: socket.socket) -> Any:
    size = int.from_bytes(_receive_exactly(connection, 8), "big")
    return pickle.loads(_receive_exactly(connection, size))


def _receive_exactly(connection: socket.socket, size: int) -> bytes:
    data = io.BytesIO()
    while data.tell() < size:
        part = connection.recv(size - data.tell())
        if not part:
            raise EOFError
        data.write(part)
    return data.getvalue()


# --- the zygote itself --------------------------------------------------------------------------------------------


def serve(descriptor: int) -> types.CodeType:
    """Forks workers until the test session ends.

    It returns in the fork of a program, too, with the program: the caller executes it as its own last line.
    """
    import jax
    from jax._src import xla_bridge

    importlib.import_module("jaxckpt")  # so that the workers need not

    jax.config.update("jax_platforms", "cpu")
    connection = socket.socket(fileno=descriptor)
    # With the barrier of its group: the next one would get its memory if it were dropped while the group runs.
    children: dict[int, Barrier | None] = {}
    gc.freeze()  # the children need not touch, and so copy, what is there already
    try:
        while True:
            word, value = _receive(connection)
            if word == "reap":
                _, status = os.waitpid(value, 0)
                children.pop(value, None)
                _send(connection, ("done", os.waitstatus_to_exitcode(status)))
                continue
            if word == "run":
                pid = _fork_quietly()
                if pid == 0:
                    connection.close()
                    return _prepare(value)
                children[pid] = None
                _send(connection, ("done", pid))
                continue
            _, descriptors, _, _ = socket.recv_fds(connection, 1, value.count)
            try:
                importlib.import_module(value.module)
                assert not xla_bridge.backends_are_initialized(), (
                    f"{value.module} touches devices when imported"
                )
                barrier = multiprocessing.get_context("fork").Barrier(value.count)
                pids = _fork_all(value, descriptors, connection, barrier)
            except Exception:  # noqa: BLE001  the test shall see it
                _send(connection, ("failed", traceback.format_exc()))
            else:
                children.update(dict.fromkeys(pids, barrier))
                _send(connection, ("done", pids))
            finally:
                for each in descriptors:
                    os.close(each)
    except EOFError:  # the test session has ended
        for pid in children:
            os.kill(pid, signal.SIGKILL)
    return compile("", "<string>", "exec")


def _fork_quietly() -> int:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # forking is safe here: no device was touched yet
        return os.fork()


def _prepare(script: _Script) -> types.CodeType:
    """Makes this process one that Python has just started for a program."""
    for number in (1, 2):
        output = os.open(_output_path(script.path, number), os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(output, number)
        os.close(output)
    os.environ["XLA_FLAGS"] = xla_flags(script.devices)
    os.chdir(script.folder)
    sys.argv = ["-c", *script.arguments]
    return compile(script.source, "<string>", "exec")


def _fork_all(
    job: _Job, descriptors: list[int], zygote_connection: socket.socket, barrier: Barrier
) -> list[int]:
    # Held until all are forked and inherited by them: no other program is given this port meanwhile. The service
    # binds with the same option.
    port_holder = socket.socket(socket.AF_INET6)
    port_holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    port_holder.bind(("::", 0))
    port = port_holder.getsockname()[1]
    gates = [os.pipe() for _ in range(job.count)]
    pids: list[int] = []
    for index in range(job.count):
        pid = os.fork()
        if pid == 0:
            try:
                zygote_connection.close()
                for other, descriptor in enumerate(descriptors):
                    if other != index:
                        os.close(descriptor)
                for other, (reader, writer) in enumerate(gates):
                    os.close(writer)
                    if other != index:
                        os.close(reader)
                with os.fdopen(gates[index][0], "rb") as gate:
                    all_pids = pickle.load(gate)
                _work(job, index, all_pids, Connection(descriptors[index]), barrier, port)
            finally:
                os._exit(1)
        pids.append(pid)
    for reader, writer in gates:
        os.close(reader)
        with os.fdopen(writer, "wb") as gate:
            pickle.dump(tuple(pids), gate)
    port_holder.close()
    return pids


def _work(
    job: _Job, index: int, pids: tuple[int, ...], connection: Connection, barrier: Barrier, port: int
) -> NoReturn:
    import jax

    path = pathlib.Path(job.path)
    output = os.open(_output_path(job.path, index), os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    try:
        jax.config.update("jax_num_cpu_devices", job.devices)
        if job.recoverable:
            jax.config.update("jax_enable_recoverability", True)
        if job.count > 1:
            if index > 0:
                _await_service(port)
            jax.distributed.initialize(
                f"localhost:{port}",
                num_processes=job.count,
                process_id=index,
                initialization_timeout=30,
                heartbeat_timeout_seconds=job.heartbeat_s,
                cluster_detection_method="deactivate",
            )
        function: Any = importlib.import_module(job.module)
        for name in job.function.split("."):
            function = getattr(function, name)
        value = function(Worker(index, pids, path, connection, barrier), *pickle.loads(job.arguments))
        result = Outcome("returned", value=value)
    except BaseException as error:  # noqa: BLE001  the test shall see whatever it is
        result = Outcome("raised", error=_if_picklable(error), error_text=traceback.format_exc())
    sys.stdout.flush()
    sys.stderr.flush()
    with contextlib.suppress(OSError, EOFError):
        connection.send(("result", result))
        while connection.recv() != "dismissed":
            pass
    os._exit(0)


def _await_service(port: int) -> None:
    # A client that finds nobody there tries again after a whole second.
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        with contextlib.suppress(ConnectionRefusedError):
            socket.create_connection(("localhost", port), 1).close()
            return
        time.sleep(0.005)


def _if_picklable(error: BaseException) -> BaseException | None:
    try:
        return pickle.loads(pickle.dumps(error))
    except Exception:  # noqa: BLE001  whatever its class does when it is copied
        return None


# --- processes played by threads ----------------------------------------------------------------------------------


class MemoryService:
    """A coordination service between threads: what jax.distributed offers, without jax.

    Attributes:
      values: All keys and values.
      calls: Each call so far: index of the process, name of the method, key or prefix.
    """

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}
        self.calls: list[tuple[int, str, str]] = []
        self.changed = threading.Condition()
        self._cut_off: set[int] = set()

    def cut_off(self, index: int) -> None:
        """Lets every further call of this process fail."""
        with self.changed:
            self._cut_off.add(index)
            self.changed.notify_all()

    def note(self, index: int, method: str, key: str) -> None:
        """Counts a call of a process, and refuses it if the process is cut off. The caller holds the condition."""
        self.calls.append((index, method, key))
        self.changed.notify_all()
        if index in self._cut_off:
            raise CoordinationError(f"process {index} is cut off")

    def await_call(self, index: int, method: str, timeout_s: float = 30) -> None:
        """Waits until a process has called a method."""
        with self.changed:
            assert self.changed.wait_for(
                lambda: any(call[:2] == (index, method) for call in self.calls), timeout_s
            )


class MemoryChannel(Channel):
    """One thread's way to the service."""

    def __init__(self, service: MemoryService, index: int, count: int) -> None:
        self.index = index
        self.count = count
        self._service = service

    def put(self, key: str, value: bytes) -> bool:
        with self._service.changed:
            self._service.note(self.index, "put", key)
            is_new = key not in self._service.values
            self._service.values.setdefault(key, value)
            return is_new

    def wait_for(self, key: str, timeout_s: float) -> bytes | None:
        with self._service.changed:
            self._service.note(self.index, "wait_for", key)
            self._service.changed.wait_for(lambda: key in self._service.values, timeout_s)
            return self._service.values.get(key)

    def look(self, key: str) -> bytes | None:
        with self._service.changed:
            self._service.note(self.index, "look", key)
            return self._service.values.get(key)

    def listing(self, prefix: str) -> dict[str, bytes]:
        with self._service.changed:
            self._service.note(self.index, "listing", prefix)
            return {key: value for key, value in self._service.values.items() if key.startswith(prefix)}

    def delete(self, prefix: str) -> None:
        with self._service.changed:
            self._service.note(self.index, "delete", prefix)
            for key in [key for key in self._service.values if key.startswith(prefix)]:
                del self._service.values[key]


def memory_groups(count: int, service: MemoryService | None = None) -> list[Group]:
    """The group as each of its processes sees it."""
    service = service or MemoryService()
    return [Group(MemoryChannel(service, index, count)) for index in range(count)]


def run_threads(
    groups: Sequence[Group], function: Callable[[Group], Any], timeout_s: float = 60
) -> list[Outcome]:
    """Calls ``function(group)`` for each group in a thread of its own and waits until all have ended."""
    outcomes: list[Outcome] = [Outcome("stuck")] * len(groups)

    def run(place: int) -> None:
        try:
            outcomes[place] = Outcome("returned", value=function(groups[place]))
        except BaseException as error:  # noqa: BLE001  the test shall see whatever it is
            outcomes[place] = Outcome("raised", error=error, error_text=traceback.format_exc())

    threads = [threading.Thread(target=run, args=(place,), daemon=True) for place in range(len(groups))]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + timeout_s
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    return list(outcomes)
