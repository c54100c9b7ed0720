"""The servers and the proxy that the tests of object stores stand on, tried with TensorStore alone."""

from __future__ import annotations

import multiprocessing.connection
import os
import pathlib
import secrets
import subprocess
import sys
import threading
from typing import Any

import psutil
import pytest

from .helpers import ROOT
from .object_servers import BUCKET, Remote, running_servers
from .proxy import FAULTS, Proxy

pytestmark = [pytest.mark.slow, pytest.mark.object_stores]

NAME = "sub/big %?#+~é"
DATA = bytes(range(256)) * 5000


@pytest.fixture
def prefix() -> str:
    return f"plain-{secrets.token_hex(6)}/"


def open_bucket(remote: Remote, prefix: str, retries: int = 4) -> Any:
    import tensorstore as ts

    retry = {"max_retries": retries, "initial_delay": "5ms", "max_delay": "5ms"}
    context = ts.Context(
        {
            "aws_credentials": {"type": "environment"},
            "s3_request_retries": retry,
            "gcs_request_retries": retry,
        }
    )
    spec: dict[str, Any] = {"driver": "gcs", "bucket": BUCKET, "path": prefix}
    if remote.scheme == "s3":
        endpoint = f"http://127.0.0.1:{remote.proxy.port}"
        spec |= {"driver": "s3", "endpoint": endpoint, "aws_region": "us-east-1"}
    return ts.KvStore.open(spec, context=context).result()


def kinds(remote: Remote) -> list[tuple[str, str, int]]:
    return [(request.kind, request.name, request.status) for request in remote.proxy.requests]


def test_requests_are_noted_by_kind_and_name(remote: Remote, prefix: str) -> None:
    bucket = open_bucket(remote, prefix)
    bucket.write(NAME, DATA).result()
    assert bucket.read(NAME, byte_range=slice(1000, 3000)).result().value == DATA[1000:3000]
    assert bucket.read("nothing").result().state == "missing"
    assert [key.decode() for key in bucket.list().result()] == [NAME]
    assert bucket.read(NAME, byte_range=slice(0, 0)).result().value == b""
    assert remote.objects(prefix) == {NAME: len(DATA)}
    assert remote.read(f"{prefix}{NAME}") == DATA
    bucket.write(NAME, None).result()
    assert kinds(remote) == [
        ("put", f"{prefix}{NAME}", 200),
        ("get", f"{prefix}{NAME}", 206),
        ("get", f"{prefix}nothing", 404),
        ("list", prefix, 200),
        ("head", f"{prefix}{NAME}", 200),
        ("delete", f"{prefix}{NAME}", 204 if remote.scheme == "s3" else 200),
    ]
    put, get = remote.proxy.requests[:2]
    assert (put.body_bytes, get.answer_bytes) == (len(DATA), 2000)
    assert remote.objects(prefix) == {}
    remote.write(f"{prefix}a", b"1")
    assert bucket.read("a").result().value == b"1"
    remote.delete(f"{prefix}a")
    assert bucket.read("a").result().state == "missing"


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_meets_one_request_and_a_retry_goes_well(remote: Remote, prefix: str, fault: str) -> None:
    bucket = open_bucket(remote, prefix)
    for kind, ask in (
        ("put", lambda: bucket.write("a", DATA).result()),
        ("get", lambda: bucket.read("a").result().value),
        ("list", lambda: bucket.list().result()),
    ):
        rule = remote.proxy.inject(fault, kind)
        answer = ask()
        assert rule.hits == 1
        assert kind == "put" or answer in (DATA, [b"a"])
        # Of an answer to a PUT in S3 there is no body to be cut.
        assert remote.proxy.count(kind) == (
            1 if (remote.scheme, kind, fault) == ("s3", "put", "cut answer") else 2
        )
        remote.proxy.reset()
    remote.delete(f"{prefix}a")


def test_a_fault_without_retries_is_an_error_and_the_server_has_what_the_fault_says(
    remote: Remote, prefix: str
) -> None:
    bucket = open_bucket(remote, prefix, retries=0)
    bucket.write(
        "warm", b""
    ).result()  # a connection that was used before is tried again by the client itself
    for number, fault in enumerate(FAULTS):
        name = f"fault-{number}"
        remote.proxy.inject(fault, "put", name, times=None)
        has_error = False
        try:
            bucket.write(name, DATA).result()
        except ValueError:
            has_error = True
        assert has_error == ((remote.scheme, fault) != ("s3", "cut answer"))
        is_done = fault in ("drop after", "cut answer")
        assert remote.objects(f"{prefix}{name}") == ({"": len(DATA)} if is_done else {})


def test_a_request_is_held_until_the_test_lets_it_go(remote: Remote, prefix: str) -> None:
    bucket = open_bucket(remote, prefix)
    for when, is_done in (("hold before", False), ("hold after", True)):
        rule = remote.proxy.inject(when, "put")
        future = bucket.write(when, b"1")
        assert rule.reached.wait(20)
        assert remote.objects(f"{prefix}{when}") == ({"": 1} if is_done else {})
        assert not future.done()
        rule.release()
        future.result()
        assert remote.objects(f"{prefix}{when}") == {"": 1}


def test_silence_ends_with_the_test(remote: Remote, prefix: str) -> None:
    bucket = open_bucket(remote, prefix, retries=0)
    rule = remote.proxy.inject("silence", "put", times=None)
    future = bucket.write("a", b"1")
    assert rule.reached.wait(20)
    remote.proxy.reset()
    with pytest.raises(ValueError, match=r"."):
        future.result()


def test_no_thread_of_a_proxy_is_left(s3: Remote) -> None:
    before = threading.active_count()
    with Proxy(s3._server.port) as proxy:
        bucket = open_bucket(Remote("s3", s3._server, proxy), "plain/")
        bucket.read("a").result()
        assert threading.active_count() > before
    assert threading.active_count() <= before


def test_the_servers_end_with_the_last_process_that_uses_them(tmp_path: pathlib.Path) -> None:
    source = f"""
import pathlib, sys
from tests.object_servers import running_servers
with running_servers(pathlib.Path({str(tmp_path)!r})) as servers:
    print(servers["gs"].port, flush=True)
    sys.stdin.read()
"""
    command = [sys.executable, "-c", source]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=ROOT, **pipes) as first:
        assert first.stdout is not None
        port = int(first.stdout.readline())
        if port == 0:
            pytest.skip("fake-gcs-server does not run")
        with running_servers(tmp_path) as servers:
            assert servers["gs"].port == port
            first.kill()
            first.wait(20)
            with running_servers(tmp_path) as again:
                assert again["gs"].port == port
            remote = Remote("gs", servers["gs"], None)  # type: ignore[arg-type]
            assert remote.objects("") == {}
            handles = [pidfd for pid in _listening_on(port) if (pidfd := _pidfd(pid)) is not None]
    assert handles
    for handle in handles:
        assert multiprocessing.connection.wait([handle], 20)
        os.close(handle)


def _pidfd(pid: int) -> int | None:
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError:
        return None


def _listening_on(port: int) -> list[int]:
    return [
        connection.pid
        for connection in psutil.net_connections("tcp")
        if connection.pid is not None and connection.status == "LISTEN" and connection.laddr[1] == port
    ]
