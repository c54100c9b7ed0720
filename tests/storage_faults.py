"""Kernels for `LocalStore` that note, refuse, hold up or cut off single calls, and what tests compare afterwards.

All of them derive from `NotedKernel`, which tells of each call that changes a file system before it is made and after
it went well. To open a directory counts too: it is done to sync it.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import mmap
import os
import pathlib
import re
import shutil
import signal
import threading
from collections.abc import Callable
from typing import Any

from jaxckpt._store import Kernel

MANIFEST = "manifest.msgpack"
COMMIT = f"/{MANIFEST}"
CALLS = ("create", "open", "pwrite", "ftruncate", "fsync", "rename", "unlink", "mkdir", "rmdir")


@dataclasses.dataclass(frozen=True, slots=True)
class Operation:
    """A call: which, on which path, and for a rename to which."""

    call: str
    path: str
    target: str = ""

    @property
    def is_commit(self) -> bool:
        return self.call == "rename" and self.target.endswith(COMMIT)

    def __str__(self) -> str:
        return f"{self.call} {self.path}" + (f" -> {self.target}" if self.target else "")


class NotedKernel(Kernel):
    """Notes every call that went well."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.done: list[Operation] = []
        self._paths: dict[int, str] = {}

    def before(self, operation: Operation) -> None:
        """May raise, wait, or not return."""

    def after(self, operation: Operation) -> None:
        with self.lock:
            self.done.append(operation)

    @property
    def commits(self) -> int:
        """How often a manifest was put in place."""
        with self.lock:
            return sum(operation.is_commit for operation in self.done)

    def _tell(self, operation: Operation, call: Callable[[], Any]) -> Any:
        self.before(operation)
        result = call()
        self.after(operation)
        return result

    def open(self, path: str, flags: int, mode: int = 0o777) -> int:  # type: ignore[override]
        operation = Operation("create" if flags & os.O_CREAT else "open", path)
        descriptor = self._tell(operation, lambda: os.open(path, flags, mode))
        self._paths[descriptor] = path
        return descriptor

    def pwrite(self, descriptor: int, data: Any, offset: int) -> int:  # type: ignore[override]
        operation = Operation("pwrite", self._paths[descriptor])
        return self._tell(operation, lambda: os.pwrite(descriptor, data, offset))

    def ftruncate(self, descriptor: int, length: int) -> None:  # type: ignore[override]
        self._tell(Operation("ftruncate", self._paths[descriptor]), lambda: os.ftruncate(descriptor, length))

    def fsync(self, descriptor: int) -> None:  # type: ignore[override]
        self._tell(Operation("fsync", self._paths[descriptor]), lambda: os.fsync(descriptor))

    def rename(self, source: str, target: str) -> None:  # type: ignore[override]
        self._tell(Operation("rename", source, target), lambda: os.rename(source, target))

    def unlink(self, path: str) -> None:  # type: ignore[override]
        self._tell(Operation("unlink", path), lambda: os.unlink(path))

    def link(self, source: str, target: str) -> None:  # type: ignore[override]
        self._tell(Operation("link", source, target), lambda: os.link(source, target))

    def mkdir(self, path: str, mode: int = 0o777) -> None:  # type: ignore[override]
        self._tell(Operation("mkdir", path), lambda: os.mkdir(path, mode))

    def rmdir(self, path: str) -> None:  # type: ignore[override]
        self._tell(Operation("rmdir", path), lambda: os.rmdir(path))


# --- cutting off ----------------------------------------------------------------------------------------------


class Journal:
    """What a process did, for the process that forked it: in memory that both see."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, 1 << 20)
        self._end = 8

    def write(self, line: str) -> None:
        data = f"{line}\n".encode()
        self._memory[self._end : self._end + len(data)] = data
        self._end += len(data)
        self._memory[:8] = self._end.to_bytes(8, "little")

    def read(self) -> list[str]:
        end = int.from_bytes(self._memory[:8], "little")
        return self._memory[8:end].decode().splitlines()


class KillingKernel(NotedKernel):
    """Kills its own process right before a call.

    Args:
      journal: Gets a line for each call that begins, and another one for each commit that was made.
      at: Number of the call, from 1.
      is_torn: Whether to kill in the middle of a write; then only writes are counted.
    """

    def __init__(self, journal: Journal, at: int, *, is_torn: bool = False) -> None:
        super().__init__()
        self._journal = journal
        self._at = at
        self._is_torn = is_torn
        self._count = 0

    def before(self, operation: Operation) -> None:
        with self.lock:
            self._count += not self._is_torn
            self._journal.write(str(operation))
            if self._count == self._at:
                os.kill(os.getpid(), signal.SIGKILL)

    def rename(self, source: str, target: str) -> None:  # type: ignore[override]
        operation = Operation("rename", source, target)
        self.before(operation)
        with self.lock:  # no other thread ends the process between a commit and its line
            os.rename(source, target)
            if operation.is_commit:
                self._journal.write("committed")

    def after(self, operation: Operation) -> None:
        """The journal is enough."""

    def pwrite(self, descriptor: int, data: Any, offset: int) -> int:  # type: ignore[override]
        if not self._is_torn:
            return super().pwrite(descriptor, data, offset)
        with self.lock:
            self._count += 1
            if self._count == self._at:
                self._journal.write(f"half a pwrite {self._paths[descriptor]}")
                half = len(data) // 2
                os.pwrite(descriptor, data[: half // 4096 * 4096 or half], offset)
                os.kill(os.getpid(), signal.SIGKILL)
        return os.pwrite(descriptor, data, offset)


# --- refusing and holding up ----------------------------------------------------------------------------------


class RefusingKernel(NotedKernel):
    """Refuses calls with an error as the operating system's, once or from then on.

    Args:
      number: Of the errno.
      calls: The kinds of calls that can be refused.
      at: The call of these kinds that is refused, from 1; 0 refuses none.
      is_lasting: Whether all later ones are refused too.
      where: Only calls on paths with this in it count.
    """

    def __init__(
        self,
        number: int,
        calls: tuple[str, ...] = CALLS,
        at: int = 1,
        *,
        is_lasting: bool = False,
        where: str = "",
    ) -> None:
        super().__init__()
        self.number = number
        self.calls = calls
        self.at = at
        self.is_lasting = is_lasting
        self.where = where
        self.count = 0
        self.refused: list[Operation] = []
        self.commits_before = 0

    def before(self, operation: Operation) -> None:
        if operation.call not in self.calls or self.where not in f"{operation.path}\n{operation.target}":
            return
        with self.lock:
            self.count += 1
            if self.at == 0 or self.count < self.at or (self.count > self.at and not self.is_lasting):
                return
            if not self.refused:
                self.commits_before = sum(other.is_commit for other in self.done)
            self.refused.append(operation)
        raise OSError(self.number, os.strerror(self.number), operation.path)

    def mend(self) -> None:
        """From now on all is well."""
        self.at = 0


class GateKernel(NotedKernel):
    """Stops at the first call that a test is interested in until the test lets it go on."""

    def __init__(self, is_awaited: Callable[[Operation], bool]) -> None:
        super().__init__()
        self._is_awaited = is_awaited
        self.reached = threading.Event()
        self.may_go_on = threading.Event()

    def before(self, operation: Operation) -> None:
        if not self.reached.is_set() and self._is_awaited(operation):
            self.reached.set()
            if not self.may_go_on.wait(60):
                raise OSError(errno.ETIMEDOUT, "the gate was never opened", operation.path)


# --- what is on disk ------------------------------------------------------------------------------------------


def listing(root: pathlib.Path) -> list[str]:
    """All names below a directory, in order, with the ids of attempts left out."""
    names = []
    for directory, directories, files in os.walk(root):
        inside = [f"{name}/" for name in directories] + files
        names += [
            os.path.relpath(os.path.join(directory, name), root) + "/" * name.endswith("/") for name in inside
        ]
    return sorted(re.sub(r"(?<=data-)[0-9a-f]{16}(?=/)", "*", name) for name in names)


def read_tree(root: pathlib.Path) -> dict[str, bytes]:
    """The bytes of all files below a directory by name; the name of a directory ends with a slash, and has none."""
    found: dict[str, bytes] = {}
    for directory, directories, files in os.walk(root):
        prefix = f"{directory}/"[len(f"{root}/") :]
        found.update((f"{prefix}{name}/", b"") for name in directories)
        for name in files:
            with open(f"{directory}/{name}", "rb", buffering=0) as file:
                found[prefix + name] = file.readall()
    return found


def digest_of(root: pathlib.Path) -> str:
    """Of all names and bytes below a directory: whoever reads the same ones finds the same."""
    digest = hashlib.sha256()
    for name, content in sorted(read_tree(root).items()):
        digest.update(f"{name}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()


def copy_tree(source: pathlib.Path, target: pathlib.Path) -> None:
    """Copies a directory by hard links: files of a checkpoint are replaced and deleted, but never changed."""
    shutil.copytree(source, target, copy_function=os.link)


def fingerprints(root: pathlib.Path) -> dict[str, tuple[Any, ...]]:
    """Everything that a program could have changed below a directory."""
    found: dict[str, tuple[Any, ...]] = {}
    for name, content in [("", b""), *read_tree(root).items()]:
        status = os.lstat(f"{root}/{name}")
        found[name] = status.st_mode, status.st_ino, status.st_mtime_ns, status.st_size, content
    return found


# What a user may have put into a directory of checkpoints (first) and into a checkpoint itself, with names that look
# as much like those of jaxckpt as they can without being one of them.
FOREIGN_IN_ROOT = {
    "notes.txt": b"mine",
    "plots/loss.csv": b"1,2",
    "step_00000077": b"a file",
    "step_00000078/zarr.json": b'{"zarr_format": 3, "node_type": "group", "attributes": {"mine": 1}}',
    "step_00000079/weights.bin": b"\0" * 100,
    "step_best/readme": b"not a number",
    "checkpoint.json.tmp-mine": b"{}",
    "data-0123456789abcdef/x": b"not in a step",
}
FOREIGN_IN_STEP = {
    "notes.txt": b"this one is good",
    "plots/loss.csv": b"3,4",
    "data-raw/readme": b"raw",
    "manifest.msgpack.tmp-mine": b"copy",
    "pinned-by.tmp-me": b"",
}


def put_files(root: pathlib.Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def assert_files(root: pathlib.Path, files: dict[str, bytes]) -> None:
    """These files are there, byte for byte."""
    for name, content in files.items():
        path = root / name
        assert path.is_file(), f"{path} is gone"
        assert path.read_bytes() == content, f"{path} was changed"
