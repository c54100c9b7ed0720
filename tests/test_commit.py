"""A checkpoint is whole or not there (requirement 15), and an overwrite keeps the old one until then (requirement 18).

The order in which files, directories and the manifest reach the disk is read from the kernel (strace), from Python's
audit events where there is no strace, and from a store that notes what it is asked. Failures are real ones: limits,
permissions, a full disk, SIGKILL; only what no test can make a file system do comes from a store that fails.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import pathlib
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import textwrap
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxckpt
from jaxckpt import _saving
from jaxckpt._staging import HOST_MEMORY, PINNED_MEMORY
from jaxckpt._storage import Buffer, Hold, ObjectWriter, Store
from jaxckpt._store import LocalStore

from .helpers import ROOT, assert_same_tree, run_fork

MIB = 1 << 20
MANIFEST = "manifest.msgpack"


def tree_of(number: float) -> dict[str, Any]:
    """A tree that differs from number to number, with packs, objects of their own and values."""
    return {
        "big": jnp.full((3 * MIB,), number, jnp.float32),
        "host": np.full((2 * MIB,), number, np.float32),
        "small": [jnp.full((10,), number + position) for position in range(5)],
        "step": number,
    }


def data_directories(path: pathlib.Path) -> set[str]:
    return {entry.name for entry in path.glob("data-*")}


def jaxckpt_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("jaxckpt")]


# --- the order of system calls --------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Event:
    """A call that storage can tell: what, on which path, and when it began and ended."""

    name: str
    path: str
    began: int
    ended: int
    target: str = ""


def check_order(events: list[Event], root: pathlib.Path, *, sees_files: bool) -> None:
    """One save below ``root`` did everything in the order that survives a power loss.

    Args:
      events: What happened, from the call of the save to its return.
      root: Directory of the checkpoint.
      sees_files: Whether the events say when files are written and synced.
    """
    manifest = str(root / MANIFEST)
    (commit,) = [event for event in events if event.name == "rename" and event.target == manifest]
    before = [event for event in events if event.began < commit.began]
    after = [event for event in events if event.began > commit.began]
    files = [event for event in before if event.name == "create"]
    made = [event for event in before if event.name in ("create", "mkdir")]
    syncs = [event for event in before if event.name == "fsync" and event.ended < commit.began]
    assert any("/packs/" in event.path for event in files)

    for event in files if sees_files else []:
        writes = [other for other in before if other.name == "write" and other.path == event.path]
        assert writes, f"{event.path} is empty"
        assert any(
            sync.path == event.path and sync.began > max(write.ended for write in writes) for sync in syncs
        ), f"{event.path} is not synced after its last byte"

    # Every new name is durable: its directory is synced after the name was made, and after all that lies below.
    temporary = commit.path
    assert temporary.startswith(manifest + ".tmp-")
    for event in made:
        if event.path == temporary:
            continue
        path = event.path.partition(".tmp-")[0]  # published under its own name right after
        parent = os.path.dirname(path)
        below = [sync.ended for sync in syncs if sync.path == path and event.name == "mkdir"]
        assert any(sync.path == parent and sync.began > max([event.ended, *below]) for sync in syncs), (
            f"the entry of {path} is not durable before the commit"
        )

    # The manifest comes last: written when all else is durable, and its own name is made durable at once.
    (written,) = [event for event in files if event.path == temporary]
    others = [event for event in before if event.path != temporary and event.name != "rename"]
    assert max(event.ended for event in others if event.path != str(root)) < written.began
    assert any(event.name == "fsync" and event.path == str(root) for event in after)
    assert not [event for event in after if event.name in ("create", "mkdir", "write")]

    # Nothing old goes before the commit is durable, and nothing but old data after it.
    assert not [event for event in before if event.name in ("unlink", "rmdir")]
    durable = min(event.ended for event in after if event.name == "fsync" and event.path == str(root))
    gone = [event for event in after if event.name in ("unlink", "rmdir")]
    assert all(event.began > durable for event in gone)
    new = {event.path.split("/data-")[1].split("/")[0] for event in made if "/data-" in event.path}
    assert len(new) == 1
    assert not any(f"/data-{next(iter(new))}" in event.path for event in gone)


# Six saves, each between two directories with telling names: first, overwrite, and into new nested directories.
SIX_SAVES = """
import os, sys
import jax.numpy as jnp, numpy as np
import jaxckpt

root = sys.argv[1]
tree = {"big": np.ones((700_000,), np.float32), "a/b": [jnp.arange(5), 7], "c": np.ones((30_000,))}
options = jaxckpt.SaveOptions(pack_bytes_max=100_000)
number = 0

def step(save, name, **more):
    global number
    os.mkdir(f"{root}/begin-{number}")
    save(f"{root}/{name}", tree, options=options, **more)
    os.mkdir(f"{root}/end-{number}")
    number += 1

def save_async(*arguments, **more):
    jaxckpt.save_async(*arguments, **more).wait()

for kind, save in (("sync", jaxckpt.save), ("async", save_async)):
    os.mkdir(f"{root}/{kind}")
    step(save, f"{kind}/plain")
    step(save, f"{kind}/plain", overwrite=True)
    step(save, f"{kind}/x/y/z/nested")
"""
SIX_ROOTS = [f"{kind}/{name}" for kind in ("sync", "async") for name in ("plain", "plain", "x/y/z/nested")]


def check_six_saves(events: list[Event], root: pathlib.Path, *, sees_files: bool) -> None:
    for number, name in enumerate(SIX_ROOTS):
        (begin,) = [event.ended for event in events if event.path == str(root / f"begin-{number}")]
        (end,) = [event.began for event in events if event.path == str(root / f"end-{number}")]
        during = [event for event in events if begin < event.began < end]
        check_order(during, root / name, sees_files=sees_files)
        made = {event.path for event in during if event.name == "mkdir"}
        if name.endswith("nested"):
            assert {str(root / name), str(root / name).removesuffix("/nested")} < made
        if number % 3 == 1:
            assert [event for event in during if event.name in ("unlink", "rmdir")]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")
def test_order_of_system_calls(tmp_path: pathlib.Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    log = tmp_path / "log"
    calls = "openat,mkdir,mkdirat,write,pwrite64,pwritev,ftruncate,fsync,fdatasync,rename,renameat,renameat2,"
    calls += "unlink,unlinkat,rmdir"
    command = ["strace", "-f", "-y", "-qq", "-s", "300", "-e", f"trace={calls}", "-o", str(log)]
    if subprocess.run([*command, "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip("strace may not trace here")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    subprocess.run(
        [*command, sys.executable, "-c", SIX_SAVES, str(root)], env=environment, check=True, timeout=120
    )
    check_six_saves(parse_strace(log.read_text(), root), root, sees_files=True)


def parse_strace(log: str, root: pathlib.Path) -> list[Event]:
    """The events below a directory; calls that others interrupted in the log are put together again."""
    events = []
    unfinished: dict[str, tuple[int, str]] = {}
    for number, line in enumerate(log.splitlines()):
        thread, _, call = line.partition(" ")
        began = number
        call = call.strip()
        if call.endswith("<unfinished ...>"):
            unfinished[thread] = number, call.removesuffix("<unfinished ...>")
            continue
        if call.startswith("<... "):
            began, start = unfinished.pop(thread)
            call = start + call.partition("resumed>")[2]
        event = parse_call(call, began, number)
        if event is not None and event.path.startswith(str(root)):
            events.append(event)
    return events


def parse_call(call: str, began: int, ended: int) -> Event | None:
    match = re.fullmatch(r"(\w+)\((.*)\)\s+= (-?\d+).*", call)
    if match is None or int(match[3]) < 0:
        return None
    name, arguments = match[1], match[2]
    quoted = re.findall(r'"((?:[^"\\]|\\.)*)"', arguments)
    of_descriptor = re.match(r"\d+<([^>]*)>", arguments)
    if name == "openat":
        return (
            Event("create", full_path(arguments, quoted[0]), began, ended) if "O_CREAT" in arguments else None
        )
    if name in ("mkdir", "mkdirat"):
        return Event("mkdir", full_path(arguments, quoted[0]), began, ended)
    if name in ("unlink", "unlinkat", "rmdir"):
        return Event("unlink", full_path(arguments, quoted[0]), began, ended)
    if name.startswith("rename"):
        return Event("rename", quoted[0], began, ended, quoted[1])
    assert of_descriptor is not None, call
    kind = "fsync" if name in ("fsync", "fdatasync") else "write"
    return Event(kind, of_descriptor[1], began, ended)


def full_path(arguments: str, path: str) -> str:
    """A path that may be relative to the descriptor in front of it."""
    directory = re.match(r"(?:\d+|AT_FDCWD)<([^>]*)>", arguments)
    return path if path.startswith("/") or directory is None else f"{directory[1]}/{path}"


def test_order_of_audit_events(tmp_path: pathlib.Path) -> None:
    """Without strace: Python tells of each file that is made and each directory that is opened, which is to sync it."""
    hook = """
    import json, os, sys
    events = []

    def note(event, arguments):
        if event == "open" and isinstance(arguments[0], str) and isinstance(arguments[2], int):
            path, _, flags = arguments
            if flags & os.O_CREAT:
                events.append(["create", path, ""])
            elif flags & os.O_DIRECTORY and not flags & os.O_NOFOLLOW:
                events.append(["fsync", path, ""])
        elif event == "os.mkdir":
            events.append(["mkdir", arguments[0], ""])
        elif event == "os.rename":
            events.append(["rename", arguments[0], arguments[1]])
        elif event in ("os.remove", "os.rmdir"):
            events.append(["unlink", str(arguments[0]), ""])

    sys.addaudithook(note)
    """
    report = "\nprint(json.dumps(events))\n"
    program = textwrap.dedent(hook) + SIX_SAVES + report
    lines = json.loads(run_fork(program, tmp_path).stdout.splitlines()[-1])
    events = [Event(name, path, number, number, target) for number, (name, path, target) in enumerate(lines)]
    events = [event for event in events if event.path.startswith(str(tmp_path))]
    check_six_saves(events, tmp_path, sees_files=False)


# --- a store that notes, waits or fails -----------------------------------------------------------------------


class WatchedStore(Store):
    """A local store that tells a test of each call before it is made and after it returned."""

    def __init__(self, path: Any, tell: Callable[[str, str], None]) -> None:
        self._inner = LocalStore(os.path.abspath(path))
        self._tell = tell
        self.path = self._inner.path

    def create(self, name: str, length: int) -> ObjectWriter:
        self._tell("create", name)
        return WatchedWriter(self._inner.create(name, length), name, self._tell)

    def put(self, name: str, data: bytes) -> None:
        self._tell("create", name)
        self._inner.put(name, data)
        self._tell("durable", name)

    def sync(self) -> None:
        self._tell("sync", "")
        self._inner.sync()
        self._tell("synced", "")

    def publish(self, name: str, data: bytes) -> None:
        self._tell("publish", name)
        self._inner.publish(name, data)
        self._tell("published", name)

    def delete_tree(self, name: str) -> None:
        self._tell("delete", name)
        self._inner.delete_tree(name)

    def has_length(self, name: str, length: int) -> bool:
        return self._inner.has_length(name, length)

    def read(self, name: str, bytes_max: int) -> bytes:
        return self._inner.read(name, bytes_max)

    def read_into(self, name: str, offset: int, buffer: Buffer) -> int:
        return self._inner.read_into(name, offset, buffer)

    def exists(self, name: str) -> bool:
        return self._inner.exists(name)

    def names(self) -> list[str]:
        return self._inner.names()

    def delete(self, name: str) -> None:
        self._tell("delete", name)
        self._inner.delete(name)

    def confirm(self) -> None:
        self._inner.confirm()

    def child(self, name: str) -> Store:
        return WatchedStore(os.path.join(self.path, name), self._tell)

    def fingerprint(self, name: str) -> Any:
        return self._inner.fingerprint(name)

    def remove_if_empty(self) -> None:
        self._inner.remove_if_empty()

    def make_directory(self, name: str) -> None:
        self._inner.make_directory(name)

    def read_and_hold(self, name: str, bytes_max: int) -> tuple[bytes, Hold | None]:
        return self._inner.read_and_hold(name, bytes_max)

    def hold_alone(self, name: str) -> Hold | None:
        return self._inner.hold_alone(name)


class WatchedWriter(ObjectWriter):
    """An object of a `WatchedStore`."""

    def __init__(self, inner: ObjectWriter, name: str, tell: Callable[[str, str], None]) -> None:
        self._inner = inner
        self._name = name
        self._tell = tell

    def write(self, offset: int, data: Buffer) -> None:
        self._tell("write", self._name)
        self._inner.write(offset, data)

    def finish(self) -> None:
        self._inner.finish()
        self._tell("durable", self._name)

    def abandon(self) -> None:
        self._inner.abandon()


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[str, str], None]], None]:
    """Makes all saves of a test go through a `WatchedStore`."""

    def begin(tell: Callable[[str, str], None]) -> None:
        monkeypatch.setattr(_saving, "open_store", lambda path: WatchedStore(path, tell))

    return begin


@pytest.mark.parametrize("staging", ["sync", "pool", "pinned"])
def test_the_manifest_is_published_when_all_else_is_durable(
    path: pathlib.Path, watch: Callable[..., None], staging: str
) -> None:
    calls: list[tuple[str, str]] = []
    jaxckpt.save(path, tree_of(1))
    (old,) = data_directories(path)
    watch(lambda call, name: calls.append((call, name)))
    save_in_way(path, tree_of(2), staging, overwrite=True)
    created = {name for call, name in calls if call == "create"}
    at_sync = calls.index(("sync", ""))
    assert {name for call, name in calls[:at_sync] if call == "durable"} == created
    assert calls[at_sync:] == [
        ("sync", ""),
        ("synced", ""),
        ("publish", MANIFEST),
        ("published", MANIFEST),
        ("delete", old),
    ]


def save_in_way(path: pathlib.Path, tree: Any, way: str, **more: Any) -> jaxckpt.CheckpointInfo:
    """A save that blocks, or one in the background through one of its ways to stage."""
    if way == "sync":
        return jaxckpt.save(path, tree, **more)
    options = more.pop("options", jaxckpt.SaveOptions())
    return jaxckpt.save_async(path, tree, options=dataclasses.replace(options, staging=way), **more).wait()


# --- failures -------------------------------------------------------------------------------------------------

WAYS = ["sync", "pool", "pinned"]


@contextlib.contextmanager
def file_size_limit(nbytes: int) -> Iterator[None]:
    """Files of this process may have no more bytes (EFBIG); nothing else in it writes large files meanwhile."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def check_nothing_is_left(path: pathlib.Path, old: Any) -> None:
    """No part of a failed save: not on storage, no thread, no memory; the old checkpoint is whole."""
    assert jaxckpt_threads() == []
    assert (HOST_MEMORY.bytes_in_use, PINNED_MEMORY.bytes_in_use) == (0, 0)
    if old is None:
        with pytest.raises(jaxckpt.NotFoundError):
            jaxckpt.open(path)
        assert not path.is_dir() or data_directories(path) == set()
    else:
        assert_same_tree(jaxckpt.restore(path), old)
        assert jaxckpt.verify(path).ok
        assert data_directories(path) == {jaxckpt.open(path).manifest.data}
    if path.is_dir():
        assert [name for name in os.listdir(path) if ".tmp-" in name] == []


@pytest.mark.slow
@pytest.mark.parametrize("has_old", [False, True])
@pytest.mark.parametrize("host_bytes_max", [None, 2 * MIB])
@pytest.mark.parametrize("way", WAYS)
def test_a_save_that_hits_a_limit_fails_clean(
    path: pathlib.Path, way: str, host_bytes_max: int | None, has_old: bool
) -> None:
    """With little memory the failure comes while the caller still waits for room to stage the rest."""
    old = tree_of(1) if has_old else None
    options = jaxckpt.SaveOptions(host_bytes_max=host_bytes_max, pack_bytes_max=MIB)
    if has_old:
        jaxckpt.save(path, old, options=options)
    with file_size_limit(3 * MIB // 2), pytest.raises(jaxckpt.WriteError) as caught:
        save_in_way(path, tree_of(2), way, options=options, overwrite=True)
    assert caught.value.errno == errno.EFBIG
    assert isinstance(caught.value.__cause__, OSError)
    assert "EFBIG" in str(caught.value)
    assert "nothing was committed" in str(caught.value)
    check_nothing_is_left(path, old)
    save_in_way(path, tree_of(3), way, options=options, overwrite=True)
    check_nothing_is_left(path, tree_of(3))


def test_a_failure_in_the_background_is_raised_by_each_wait_and_logged(
    path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    one_piece = {"w": np.ones(2 * MIB, np.uint8)}  # so that the call has returned before anything is written
    with file_size_limit(MIB):
        pending = jaxckpt.save_async(path, one_piece)
        with pytest.raises(jaxckpt.WriteError):
            pending.wait()
    with pytest.raises(jaxckpt.WriteError):
        pending.wait()
    assert pending.done()
    assert [record.levelname for record in caplog.records if record.name == "jaxckpt"] == ["ERROR"]
    check_nothing_is_left(path, None)


@pytest.mark.parametrize("way", WAYS)
def test_a_path_that_is_a_file(path: pathlib.Path, way: str) -> None:
    path.write_text("mine")
    with pytest.raises(jaxckpt.WriteError, match="ENOTDIR"):
        save_in_way(path, tree_of(1), way)
    with pytest.raises(jaxckpt.WriteError, match="ENOTDIR"):
        save_in_way(path / "below", tree_of(1), way)
    assert path.read_text() == "mine"
    check_nothing_is_left(path, None)


@pytest.mark.parametrize("way", WAYS)
def test_a_manifest_that_cannot_be_replaced(path: pathlib.Path, way: str) -> None:
    """The last step of all fails: the rename."""
    (path / MANIFEST / "something").mkdir(parents=True)
    with pytest.raises(jaxckpt.WriteError, match="nothing was committed"):
        save_in_way(path, tree_of(1), way)
    assert jaxckpt_threads() == []
    assert data_directories(path) == set()
    assert not list(path.glob("*.tmp-*"))
    (path / MANIFEST / "something").rmdir()
    (path / MANIFEST).rmdir()
    save_in_way(path, tree_of(1), way)
    check_nothing_is_left(path, tree_of(1))


@pytest.mark.parametrize("way", WAYS)
def test_a_full_disk(path: pathlib.Path, way: str) -> None:
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(path)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("may not mount a small file system here")
    try:
        small = {"w": jnp.ones((MIB // 4,))}
        jaxckpt.save(path / "a", small)
        with pytest.raises(jaxckpt.WriteError, match="ENOSPC"):
            save_in_way(path / "a", tree_of(1), way, overwrite=True)
        check_nothing_is_left(path / "a", small)
        save_in_way(path / "a", {"w": jnp.zeros((MIB // 4,))}, way, overwrite=True)
        check_nothing_is_left(path / "a", {"w": jnp.zeros((MIB // 4,))})
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


def test_a_directory_that_may_not_be_written() -> None:
    """In a process of its own, which gives up being root."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        checkpoint = pathlib.Path(folder) / "checkpoint"
        jaxckpt.save(checkpoint, {"w": np.ones(3)})
        for directory, _, _ in os.walk(folder):
            os.chmod(directory, 0o555)
        result = run_fork(
            """
            import os, sys, threading
            import numpy as np
            import jaxckpt

            if os.geteuid() == 0:
                os.seteuid(65534)
            for path, overwrite in ((sys.argv[1], True), (sys.argv[1] + "-new", False)):
                for save in (jaxckpt.save, lambda *a, **k: jaxckpt.save_async(*a, **k).wait()):
                    try:
                        save(path, {"w": np.zeros(3)}, overwrite=overwrite)
                    except jaxckpt.WriteError as error:
                        assert "EACCES" in str(error), error
                        print("refused", threading.active_count())
            assert jaxckpt.restore(sys.argv[1])["w"].tolist() == [1, 1, 1]
            """,
            checkpoint,
        )
        assert result.stdout.split("\n") == ["refused 1"] * 4 + [""]
        for directory, _, _ in os.walk(folder):
            os.chmod(directory, 0o755)
        assert os.listdir(folder) == ["checkpoint"]
        assert data_directories(checkpoint) == {jaxckpt.open(checkpoint).manifest.data}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("has_old", [False, True])
def test_a_sync_that_fails_after_the_rename_deletes_nothing(
    path: pathlib.Path, watch: Callable[..., None], way: str, has_old: bool
) -> None:
    """The new manifest is in place: to delete its data now would leave nothing at all."""

    def fail(call: str, name: str) -> None:
        if (call, name) == ("published", MANIFEST):
            raise OSError(errno.EIO, "Input/output error")

    if has_old:
        jaxckpt.save(path, tree_of(1))
    watch(fail)
    with pytest.raises(jaxckpt.WriteError, match="in place and whole") as caught:
        save_in_way(path, tree_of(2), way, overwrite=True)
    assert "nothing was committed" not in str(caught.value)
    assert_same_tree(jaxckpt.restore(path), tree_of(2))
    assert jaxckpt.verify(path).ok


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, OSError])
def test_an_interrupted_sweep_leaves_the_new_checkpoint(
    path: pathlib.Path, watch: Callable[..., None], interruption: type[BaseException]
) -> None:
    jaxckpt.save(path, tree_of(1))
    (old,) = data_directories(path)

    def interrupt(call: str, name: str) -> None:
        if (call, name) == ("delete", old):
            raise interruption

    watch(interrupt)
    if interruption is OSError:
        jaxckpt.save(path, tree_of(2), overwrite=True)
    else:
        with pytest.raises(KeyboardInterrupt):
            jaxckpt.save(path, tree_of(2), overwrite=True)
    assert_same_tree(jaxckpt.restore(path), tree_of(2))
    assert jaxckpt.verify(path).ok


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("moment", ["create", "write", "durable", "sync", "synced", "publish"])
def test_a_failure_at_any_step_before_the_commit(path: pathlib.Path, way: str, moment: str) -> None:
    jaxckpt.save(path, tree_of(1))

    def fail(call: str, name: str) -> None:
        if call == moment and name in ("", MANIFEST, f"{name.partition('/')[0]}/packs/0-0"):
            raise OSError(errno.EDQUOT, "Disk quota exceeded")

    with pytest.MonkeyPatch.context() as context:
        context.setattr(_saving, "open_store", lambda path: WatchedStore(path, fail))
        with pytest.raises(jaxckpt.WriteError, match="EDQUOT"):
            save_in_way(path, tree_of(2), way, overwrite=True)
    check_nothing_is_left(path, tree_of(1))


def test_a_snapshot_that_fails_gives_its_memory_back(path: pathlib.Path, watch: Callable[..., None]) -> None:
    """The caller deletes an array while the save still waits for room; that is refused, and the next save works."""
    tree = {"a": jnp.ones((2 * MIB,)), "b": jnp.ones((2 * MIB,))}

    def delete(call: str, _name: str) -> None:
        if call == "write" and not tree["b"].is_deleted():
            tree["b"].delete()

    watch(delete)
    options = jaxckpt.SaveOptions(host_bytes_max=2 * MIB, staging="pinned")
    with pytest.raises(RuntimeError, match="deleted"):
        jaxckpt.save_async(path, tree, options=options).wait()
    check_nothing_is_left(path, None)
    jaxckpt.save_async(path, tree_of(1), options=options).wait()
    check_nothing_is_left(path, tree_of(1))


# --- SIGKILL, and programs that just end ----------------------------------------------------------------------

KILLED_SAVES = """
import os, signal, sys, warnings
import numpy as np
import jaxckpt

warnings.simplefilter("ignore")  # forking is safe here: no device was touched yet
root = sys.argv[1]
tree = lambda number: {"a": np.full(300_000, number), "b": [np.full(9, number)] * 3, "step": number}
options = jaxckpt.SaveOptions(pack_bytes_max=1000)

def save(path, number):
    jaxckpt.save_async(path, tree(number), options=options, overwrite=True).wait()

def moments(event, arguments):
    # What a save is about to do, told apart by Python's own events.
    text = str(arguments[0]) if arguments else ""
    if event == "os.mkdir":
        yield "mkdir " + ("data" if "/data-" in text else "root")
    if event == "open" and isinstance(arguments[2], int) and arguments[2] & os.O_CREAT:
        yield "create " + ("manifest" if "manifest" in text else "chunk" if "/c." in text else
                           "pack" if "/packs/" in text else "metadata")
    if event == "open" and isinstance(arguments[2], int) and arguments[2] & os.O_DIRECTORY:
        yield "sync directory"
    if event == "os.rename":
        yield "rename " + ("manifest" if "manifest" in text else "metadata")
    if event == "os.remove" and "/data-" in text:
        yield "sweep"

def kill_at(moment):
    def hook(event, arguments):
        if moment in moments(event, arguments):
            os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)

def check(path, allowed):
    try:
        restored = jaxckpt.restore(path)
    except jaxckpt.NotFoundError:
        assert None in allowed, path
        return "none"
    number = restored["step"]
    assert number in allowed, (path, number)
    assert all(np.array_equal(got, want) for got, want in
               zip([restored["a"], *restored["b"]], [tree(number)["a"], *tree(number)["b"]]))
    assert jaxckpt.verify(path).ok
    return str(number)

names = ["mkdir root", "mkdir data", "create metadata", "create chunk", "create pack", "sync directory",
         "rename metadata", "create manifest", "rename manifest", "sweep"]
for name in names:
    for kind in ("first", "overwrite"):
        path = os.path.join(root, name.replace(" ", "-") + "-" + kind)
        if kind == "overwrite":
            save(path, 1)
        child = os.fork()
        if child == 0:
            kill_at(name)
            save(path, 2)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        state = check(path, {None, 2} if kind == "first" else {1, 2})
        save(path, 3)
        assert check(path, {3}) == "3"
        print(name, kind, "killed" if os.WIFSIGNALED(status) else "ended", state, sep=",")
"""


@pytest.mark.slow
def test_a_killed_save_leaves_the_old_checkpoint_or_none(tmp_path: pathlib.Path) -> None:
    """SIGKILL right before steps of `save_async`, on a disk; the directory can be saved to again."""
    result = run_fork(KILLED_SAVES, tmp_path)
    rows = {tuple(line.split(",")[:2]): tuple(line.split(",")[2:]) for line in result.stdout.splitlines()}
    assert len(rows) == 20
    for (moment, kind), (end, state) in rows.items():
        nothing_to_do = (moment, kind) in {
            ("mkdir root", "overwrite"),
            ("rename metadata", "overwrite"),
            ("sweep", "first"),
        }
        assert end == ("ended" if nothing_to_do else "killed"), (moment, kind)
        if nothing_to_do or moment == "sweep":
            assert state == "2", (moment, kind)
        else:
            assert state == ("none" if kind == "first" else "1"), (moment, kind)


@pytest.mark.slow
@pytest.mark.parametrize("staging", ["pool", "pinned"])
def test_a_program_that_ends_without_waiting_finishes_its_save(path: pathlib.Path, staging: str) -> None:
    run_fork(
        """
        import sys
        import jax.numpy as jnp
        import jaxckpt

        tree = {"w": jnp.arange(3_000_000), "small": [jnp.ones(9)] * 20}
        jaxckpt.save_async(sys.argv[1], tree, options=jaxckpt.SaveOptions(staging=sys.argv[2], host_bytes_max=4 << 20))
        """,
        path,
        staging,
    )
    assert_same_tree(jaxckpt.restore(path)["w"], jnp.arange(3_000_000))
    assert jaxckpt.verify(path).ok


# --- overwriting ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
def test_without_overwrite_an_existing_checkpoint_is_refused(path: pathlib.Path, way: str) -> None:
    jaxckpt.save(path, tree_of(1))
    files = {file: file.stat().st_mtime_ns for file in path.rglob("*")}
    with pytest.raises(jaxckpt.ExistsError, match="overwrite=True"):
        save_in_way(path, tree_of(2), way)
    assert {file: file.stat().st_mtime_ns for file in path.rglob("*")} == files
    check_nothing_is_left(path, tree_of(1))


def test_a_directory_without_a_manifest_is_no_checkpoint(path: pathlib.Path) -> None:
    jaxckpt.save(path, tree_of(1))
    (path / MANIFEST).unlink()
    jaxckpt.save(path, tree_of(2))
    assert_same_tree(jaxckpt.restore(path), tree_of(2))


def test_a_damaged_checkpoint_is_replaced_only_when_asked(path: pathlib.Path) -> None:
    jaxckpt.save(path, tree_of(1))
    (path / MANIFEST).write_bytes(b"damaged")
    with pytest.raises(jaxckpt.ExistsError):
        jaxckpt.save(path, tree_of(2))
    jaxckpt.save(path, tree_of(2), overwrite=True)
    assert_same_tree(jaxckpt.restore(path), tree_of(2))


@pytest.mark.parametrize("staging", ["pool", "pinned"])
def test_the_old_checkpoint_is_readable_until_the_commit(
    path: pathlib.Path, watch: Callable[..., None], staging: str
) -> None:
    """The save stops at each of its last steps until a reader has read the whole old checkpoint."""
    moments = [("sync", ""), ("synced", ""), ("publish", MANIFEST)]
    reached = {moment: threading.Event() for moment in moments}
    may_go_on = {moment: threading.Event() for moment in moments}

    def stop(call: str, name: str) -> None:
        if (call, name) in reached:
            reached[call, name].set()
            assert may_go_on[call, name].wait(60)

    jaxckpt.save(path, tree_of(1))
    reader = jaxckpt.open(path)
    reader.release()
    watch(stop)
    pending = jaxckpt.save_async(
        path, tree_of(2), overwrite=True, options=jaxckpt.SaveOptions(staging=staging)
    )
    try:
        for moment in moments:
            assert reached[moment].wait(60)
            assert_same_tree(jaxckpt.restore(path), tree_of(1))
            assert_same_tree(jaxckpt.restore(reader), tree_of(1))
            assert jaxckpt.verify(path).ok
            may_go_on[moment].set()
    finally:
        for event in may_go_on.values():
            event.set()
    pending.wait()
    assert_same_tree(jaxckpt.restore(path), tree_of(2))
    # Who does not hold the old one is told that it is gone, and never gets values of the new one.
    with pytest.raises(jaxckpt.CorruptError, match="it is missing") as caught:
        jaxckpt.restore(reader)
    assert {problem.key for problem in caught.value.problems} >= {"big", "host", "small/0"}
    with pytest.raises(jaxckpt.CorruptError, match="it is missing"):
        reader["big"][:10]
    assert reader["step"][...] == 1


def test_of_two_savers_that_may_not_overwrite_one_is_refused(
    path: pathlib.Path, watch: Callable[..., None]
) -> None:
    """Both begin when nothing is there; the second one to come to its end finds the other's checkpoint."""
    reached, may_go_on = threading.Event(), threading.Event()

    def stop(call: str, _name: str) -> None:
        if call == "synced" and not reached.is_set():
            reached.set()
            assert may_go_on.wait(60)

    watch(stop)
    slow = jaxckpt.save_async(path, tree_of(1))
    try:
        assert reached.wait(60)
        jaxckpt.save(path, tree_of(2))
    finally:
        may_go_on.set()
    with pytest.raises(jaxckpt.ExistsError):
        slow.wait()
    check_nothing_is_left(path, tree_of(2))


def test_overwrites_that_overlap_leave_no_data_behind(path: pathlib.Path) -> None:
    """A loop that overwrites one path faster than it is written must not fill the disk."""
    jaxckpt.save(path, tree_of(1))
    slow, fast = (
        _saving.SaveJob(
            path, tree_of(number), True, _saving.SaveContext(), jaxckpt.SaveOptions(), is_blocking=True
        )
        for number in (2, 3)
    )
    fast.run()
    slow.run()
    assert len(data_directories(path)) == 1
    assert_same_tree(jaxckpt.restore(path), tree_of(2))


def test_a_tree_is_inspected_before_anything_is_written(path: pathlib.Path) -> None:
    with pytest.raises(jaxckpt.UnsupportedLeafError):
        jaxckpt.save(path, {"ok": jax.numpy.ones(3), "bad": print})
    assert not path.exists()


def test_an_overwrite_leaves_its_data_to_who_reads_the_old_checkpoint(path: pathlib.Path) -> None:
    jaxckpt.save(path, tree_of(1))
    reader = jaxckpt.open(path)
    jaxckpt.save(path, tree_of(2), overwrite=True)
    assert_same_tree(jaxckpt.restore(reader), tree_of(1))
    assert_same_tree(jaxckpt.restore(path), tree_of(2))
    del reader
    jaxckpt.save(path, tree_of(3), overwrite=True)
    assert_same_tree(jaxckpt.restore(path), tree_of(3))


def test_a_manager_sweeps_what_an_overwrite_left_when_nobody_reads_it_any_more(path: pathlib.Path) -> None:
    manager = jaxckpt.CheckpointManager(path)
    manager.save(1, tree_of(1))
    manager.wait()
    reader = manager.open(1)
    manager.save(1, tree_of(2), force=True, overwrite=True)
    manager.wait()
    assert_same_tree(jaxckpt.restore(reader), tree_of(1))
    assert len(list(path.glob("step_00000001/data-*"))) == 2
    del reader
    manager.save(1, tree_of(3), force=True, overwrite=True)
    manager.wait()
    assert len(list(path.glob("step_00000001/data-*"))) == 1
    assert_same_tree(manager.restore(), tree_of(3))
