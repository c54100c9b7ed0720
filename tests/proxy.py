"""What is asked of an object store, and what if the network or the store fails at one of the requests?

    proxy = Proxy(port)                                  # in front of the server at that port of 127.0.0.1
    rule = proxy.inject("503", kind="put", skip=2)       # the third PUT is answered so, and not forwarded
    ...                                                  # use 127.0.0.1:proxy.port
    assert rule.hits == 1 and proxy.count("put") == 4

A request is one of five kinds, whether it is said in the words of S3 or of Google's JSON interface: ``get``, ``put``,
``delete``, ``list``, ``head``; and it has the name of an object, or what a listing is limited to. All of them are
noted in the order in which they come. What is forwarded is not changed, headers included, so that signatures hold.

A request meets the first rule that fits it, and of each rule only so many as are asked for:

    "500", "503"     the answer is that error; the server never sees the request
    "drop before"    the connection is closed; the server never sees the request
    "cut request"    the server gets the head and half of the body, then both connections are closed
    "drop after"     the server has done it; the connection is closed without an answer
    "cut answer"     the connection is closed after the head and half of the body of the answer
    "flip"           one bit in the middle of the answer's body is another one
    "silence"        the server never sees the request; no answer, and the connection stays open
    "hold before"    the request waits until `Rule.release`, and goes on as if nothing had been; or ends here
    "hold after"     the server has done it; its answer waits, in the same way

Deliberately not here: chunked bodies of requests, which no client in use sends.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import re
import socket
import threading
import urllib.parse
from collections.abc import Callable
from typing import Self

FAULTS = ("500", "503", "drop before", "cut request", "drop after", "cut answer")

_PART_BYTES = 1 << 18
# A rule that holds a request lets go of it by itself after so long, so that a test that fails does not hang.
_HOLD_S = 60.0
_CODES = {"500": ("Internal Server Error", "InternalError"), "503": ("Service Unavailable", "SlowDown")}


@dataclasses.dataclass
class Request:
    """A request that came.

    Attributes:
      kind: ``"get"``, ``"put"``, ``"delete"``, ``"list"`` or ``"head"``; otherwise its method.
      name: Of the object, or the prefix of a listing.
      method: As it came.
      target: As it came.
      headers: By name in lower case.
      status: Of the answer that the client got; 0 if it got none.
      body_bytes: Of the request.
      answer_bytes: Of the answer's body, as far as it went to the client.
      fault: What a rule did to it.
      answered: Set when the client got an answer, or will get none.
    """

    kind: str
    name: str
    method: str
    target: str
    headers: dict[str, str]
    status: int = 0
    body_bytes: int = 0
    answer_bytes: int = 0
    fault: str = ""
    answered: threading.Event = dataclasses.field(default_factory=threading.Event)


class Rule:
    """Which requests are disturbed, and how.

    Attributes:
      hits: How many were.
      reached: Set when the first one was.
    """

    def __init__(self, fault: str, kind: str, name: str, skip: int, times: int | None) -> None:
        self.fault = fault
        self.hits = 0
        self.reached = threading.Event()
        self._kind = re.compile(kind)
        self._name = re.compile(name, re.DOTALL)
        self._skip = skip
        self._times = times
        self._released = threading.Event()
        self._drops = False

    def takes(self, request: Request) -> bool:
        """Whether it is this request's turn; asked once for each."""
        if not (self._kind.fullmatch(request.kind) and self._name.search(request.name)):
            return False
        if self._skip > 0:
            self._skip -= 1
            return False
        if self._times is not None and self.hits >= self._times:
            return False
        self.hits += 1
        return True

    def release(self, *, drops: bool = False) -> None:
        """Lets the requests go that are held, and those to come, or ends their connections here."""
        self._drops = drops
        self._released.set()

    def wait_for_release(self) -> bool:
        """Tells that a request is here, and keeps it; whether it goes on."""
        self.reached.set()
        return self._released.wait(_HOLD_S) and not self._drops


class Proxy:
    """Stands in front of one server."""

    def __init__(self, server_port: int) -> None:
        self._server_port = server_port
        self._lock = threading.Lock()
        self._requests: list[Request] = []
        self._rules: list[Rule] = []
        self._sockets: set[socket.socket] = set()
        self._threads: set[threading.Thread] = set()
        self._is_closed = False
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=256)
        self.port: int = self._listener.getsockname()[1]
        self._accepting = threading.Thread(target=self._accept, name="proxy", daemon=True)
        self._accepting.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def requests(self) -> list[Request]:
        """Those that came since the last `reset`, in order."""
        with self._lock:
            return list(self._requests)

    def count(self, kind: str, name: str = "") -> int:
        """How many requests there were of a kind whose name matches, both regular expressions."""
        return sum(
            bool(re.fullmatch(kind, request.kind) and re.search(name, request.name, re.DOTALL))
            for request in self.requests
        )

    def inject(
        self, fault: str, kind: str = ".*", name: str = "", *, skip: int = 0, times: int | None = 1
    ) -> Rule:
        """Disturbs requests.

        Args:
          fault: As at the top of this file.
          kind: Regular expression that fits the whole kind.
          name: Regular expression that fits somewhere in the name.
          skip: So many of those that fit pass undisturbed first.
          times: So many are disturbed; all if None.
        """
        rule = Rule(fault, kind, name, skip, times)
        with self._lock:
            self._rules.append(rule)
        return rule

    def reset(self) -> None:
        """Forgets all requests and rules, and ends the connections whose requests are held or unanswered."""
        with self._lock:
            self._requests.clear()
            for rule in self._rules:
                rule.release(drops=True)
            self._rules.clear()
            for one in self._sockets:
                with contextlib.suppress(OSError):
                    one.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Ends all connections and threads."""
        self._is_closed = True
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._accepting.join()
        self.reset()
        for thread in list(self._threads):
            thread.join()

    # --- one thread for each connection ---------------------------------------------------------------------------

    def _accept(self) -> None:
        while not self._is_closed:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            thread = threading.Thread(target=self._serve, args=(client,), name="proxy", daemon=True)
            with self._lock:
                self._sockets.add(client)
                self._threads.add(thread)
            thread.start()

    def _serve(self, client: socket.socket) -> None:
        try:
            with contextlib.ExitStack() as stack, contextlib.suppress(OSError, _EndError):
                connection = _Connection(client, self._server_port, stack)
                while (head := connection.read_head()) is not None:
                    request = _request_of(head)
                    fault, rule = self._note(request)
                    try:
                        connection.serve(head, request, fault, rule)
                    finally:
                        request.answered.set()
        finally:
            with self._lock:
                self._sockets.discard(client)
                self._threads.discard(threading.current_thread())
            client.close()

    def _note(self, request: Request) -> tuple[str, Rule | None]:
        with self._lock:
            self._requests.append(request)
            for rule in self._rules:
                if rule.takes(request):
                    request.fault = rule.fault
                    return rule.fault, rule
        return "", None


class _EndError(Exception):
    """The connection ends here."""


class _Connection:
    """A client's connection, and one to the server, which is made for the first request that needs it."""

    def __init__(self, client: socket.socket, server_port: int, stack: contextlib.ExitStack) -> None:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._client = client
        self._server_port = server_port
        self._stack = stack
        self._from_client = stack.enter_context(client.makefile("rb"))
        self._server: socket.socket | None = None
        self._from_server: io.BufferedReader | None = None

    def read_head(self) -> list[bytes] | None:
        """The lines up to the empty one; None when the client has nothing more to say."""
        return _read_head(self._from_client)

    def serve(self, head: list[bytes], request: Request, fault: str, rule: Rule | None) -> None:
        """Answers one request."""
        if rule is not None and not fault.startswith("hold"):
            rule.reached.set()
        if fault == "drop before":
            raise _EndError
        if fault == "hold before":
            assert rule is not None
            if not rule.wait_for_release():
                raise _EndError
        length = int(request.headers.get("content-length", 0))
        assert "transfer-encoding" not in request.headers, "a request with a chunked body"
        if "expect" in request.headers:
            self._client.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        if fault == "silence":
            _copy(self._from_client, length, _drop)
            self._from_client.read(1)  # until the client, or `Proxy.reset`, ends the connection
            raise _EndError
        if fault in _CODES:
            _copy(self._from_client, length, _drop)
            self._refuse(request, fault)
            return
        self._forward(head, request, length // 2 if fault == "cut request" else length)
        if fault == "cut request":
            raise _EndError
        self._answer(request, fault, rule)

    def _refuse(self, request: Request, fault: str) -> None:
        reason, code = _CODES[fault]
        body = b"" if request.kind == "head" else f"<Error><Code>{code}</Code></Error>".encode()
        request.status = int(fault)
        lines = [
            f"HTTP/1.1 {fault} {reason}",
            "Content-Type: application/xml",
            f"Content-Length: {len(body)}",
        ]
        self._client.sendall("\r\n".join([*lines, "", ""]).encode() + body)

    def _forward(self, head: list[bytes], request: Request, length: int) -> None:
        if self._server is None:
            self._server = self._stack.enter_context(
                socket.create_connection(("127.0.0.1", self._server_port))
            )
            self._server.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._from_server = self._stack.enter_context(self._server.makefile("rb"))
        # The client was told to go on.
        lines = [line for line in head if not line.lower().startswith(b"expect:")]
        self._server.sendall(b"".join([*lines, b"\r\n"]))
        request.body_bytes = _copy(self._from_client, length, self._server.sendall)

    def _answer(self, request: Request, fault: str, rule: Rule | None) -> None:
        assert self._from_server is not None
        head = _read_head(self._from_server)
        while head is not None and head[0].split()[1].startswith(b"1"):
            head = _read_head(self._from_server)
        if head is None:
            raise _EndError
        status = int(head[0].split()[1])
        headers = _headers_of(head)
        has_body = request.method != "HEAD" and status not in (204, 304)
        if fault in ("drop after", "hold after", "cut answer", "flip"):
            # Read whole, so that the server has surely done it.
            body = self._read_body(headers) if has_body else b""
            if fault == "hold after":
                assert rule is not None
                if not rule.wait_for_release():
                    raise _EndError
            if fault == "drop after":
                raise _EndError
            if fault == "flip" and body:
                middle = len(body) // 2
                body = body[:middle] + bytes([body[middle] ^ 1]) + body[middle + 1 :]
            lines = [line for line in head if not line.lower().startswith(b"transfer-encoding:")]
            if "content-length" not in headers and has_body:
                lines.append(f"Content-Length: {len(body)}\r\n".encode())
            sent = body[: len(body) // 2] if fault == "cut answer" else body
            request.status = status
            request.answer_bytes = len(sent)
            self._client.sendall(b"".join([*lines, b"\r\n", sent]))
            if fault == "cut answer":
                raise _EndError
        else:
            request.status = status
            self._client.sendall(b"".join([*head, b"\r\n"]))
            if has_body:
                self._copy_body(headers, request)
        if headers.get("connection", "").lower() == "close":
            raise _EndError

    def _copy_body(self, headers: dict[str, str], request: Request) -> None:
        assert self._from_server is not None
        if headers.get("transfer-encoding", "").lower() == "chunked":
            for line, data in _chunks(self._from_server):
                self._client.sendall(line + data)
                request.answer_bytes += max(len(data) - 2, 0)
            return
        length = int(headers["content-length"]) if "content-length" in headers else None
        request.answer_bytes += _copy(self._from_server, length, self._client.sendall)
        if length is None:
            raise _EndError

    def _read_body(self, headers: dict[str, str]) -> bytes:
        assert self._from_server is not None
        if headers.get("transfer-encoding", "").lower() == "chunked":
            return b"".join(data[:-2] for _, data in _chunks(self._from_server))
        body = io.BytesIO()
        _copy(self._from_server, int(headers.get("content-length", 0)), body.write)
        return body.getvalue()


def _read_head(source: io.BufferedReader) -> list[bytes] | None:
    lines: list[bytes] = []
    while (line := source.readline()) not in (b"\r\n", b""):
        lines.append(line)
    return lines or None


def _headers_of(head: list[bytes]) -> dict[str, str]:
    pairs = (line.decode("latin-1").partition(":") for line in head[1:])
    return {name.strip().lower(): value.strip() for name, _, value in pairs}


def _copy(source: io.BufferedReader, length: int | None, sink: Callable[[bytes], object]) -> int:
    """So many bytes, or all up to the end, as they come; how many there were."""
    done = 0
    while length is None or done < length:
        data = source.read1(_PART_BYTES if length is None else min(_PART_BYTES, length - done))
        if not data:
            if length is None:
                break
            raise _EndError
        sink(data)
        done += len(data)
    return done


def _chunks(source: io.BufferedReader) -> list[tuple[bytes, bytes]]:
    """The lines with lengths, and the bytes after them with the line end behind them."""
    chunks: list[tuple[bytes, bytes]] = []
    while True:
        line = source.readline()
        if not line:
            raise _EndError
        data = source.read(int(line.split(b";")[0], 16) + 2)
        chunks.append((line, data))
        if len(data) == 2:
            return chunks


def _drop(data: bytes) -> None:
    del data


def _request_of(head: list[bytes]) -> Request:
    method, target, _ = head[0].decode("latin-1").split(" ", 2)
    path, _, query = target.partition("?")
    options = urllib.parse.parse_qs(query, keep_blank_values=True)
    kind = {"GET": "get", "PUT": "put", "DELETE": "delete", "HEAD": "head"}.get(method, method)
    google = re.match(r"(/upload|/download)?/storage/v1/b/[^/]+/o(?:/|$)", path)
    if google is not None:
        name = urllib.parse.unquote(path[google.end() :])
        if google[1] == "/upload":
            kind, name = "put", options.get("name", [""])[0]
        elif kind == "get" and options.get("alt") != ["media"]:
            kind = "head" if name else "list"
    else:
        name = urllib.parse.unquote(path.lstrip("/").partition("/")[2])
        if kind == "get" and "list-type" in options:
            kind = "list"
    if kind == "list":
        name = (options.get("prefix") or options.get("startOffset") or [""])[0]
    return Request(kind, name, method, target, _headers_of(head))
