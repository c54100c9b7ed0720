"""How much of a library's code does a small save and restore run through?

Saves and restores {'w': (4, 4), 'b': (4,)} in a new process, under `sys.setprofile` and `threading.setprofile`, and
counts what is entered inside the library's own folder; `code_cost` shows it beside the cost of the imports:

* functions: distinct functions, methods and lambdas (no comprehensions, no module or class bodies);
* files: distinct source files of these;
* frames: the library's frames between the call and the deepest write to storage, on the logical stack: those
  that started the thread, submitted the job or made the asyncio task are among them;
* threads: threads started.

The first call in a process is counted, with all that it sets up. Native code is not seen.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import io
import os
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import jax
import jax.numpy as jnp

# Functions of asyncio that make a task of a coroutine.
TASK_MAKERS = ("create_task", "ensure_future", "_ensure_future")

OS_WRITES = ("write", "pwrite", "writev", "pwritev")


@dataclasses.dataclass(frozen=True)
class PathLength:
    """The counts that the module's description defines."""

    functions: int
    files: int
    frames: int
    threads: int


class Tracer:
    """A profile function that counts calls into one folder, on all threads.

    Args:
        folder: the library's own.
    """

    def __init__(self, folder: Path):
        self._prefix = str(folder) + os.sep
        self._codes: set[CodeType] = set()
        self._frames_max = 0
        self._threads = 0
        # Frames above a hand-over, by the id of what was handed over, which is kept so that ids stay unique.
        self._frames_before: dict[int, int] = {}
        self._kept: list[Any] = []

    def run(self, operation: Callable[[], Any]) -> PathLength:
        threading.setprofile(self._on_event)
        sys.setprofile(self._on_event)
        try:
            operation()
        finally:
            sys.setprofile(None)
            threading.setprofile(None)
        files = {code.co_filename for code in self._codes}
        return PathLength(len(self._codes), len(files), self._frames_max, self._threads)

    def _on_event(self, frame: FrameType, event: str, argument: Any) -> None:
        if event == "call":
            if self._is_counted(frame.f_code):
                self._codes.add(frame.f_code)
            else:
                self._note_hand_over(frame)
        elif event == "c_call" and _is_storage_write(argument):
            self._frames_max = max(self._frames_max, self._logical_frames(frame))

    def _is_counted(self, code: CodeType) -> bool:
        is_function = code.co_flags & inspect.CO_OPTIMIZED  # module and class bodies are not
        is_named = code.co_name == "<lambda>" or not code.co_name.startswith("<")
        return bool(is_function and is_named and code.co_filename.startswith(self._prefix))

    def _note_hand_over(self, frame: FrameType) -> None:
        """Remembers how deep the stack was when work was handed to another stack."""
        file = frame.f_code.co_filename
        name = frame.f_code.co_name
        handed = None
        if name == "start" and file == threading.__file__:
            handed = frame.f_locals["self"]
            self._threads += 1
        elif name == "__init__" and file.endswith(os.path.join("concurrent", "futures", "thread.py")):
            handed = frame.f_locals["self"]  # an executor's work item
        elif name in TASK_MAKERS and os.sep + "asyncio" + os.sep in file:
            handed = frame.f_locals.get("coro") or frame.f_locals.get("coro_or_future")
        elif name == "run_coroutine_threadsafe":
            handed = frame.f_locals["coro"]
        if handed is None:
            return
        self._kept.append(handed)
        key = getattr(handed, "cr_frame", None) or handed  # a coroutine's frame is what the stack shows later
        self._kept.append(key)
        self._frames_before.setdefault(id(key), self._logical_frames(frame))

    def _logical_frames(self, frame: FrameType | None) -> int:
        """Counts the library's frames on this stack, and on those that handed the work over."""
        count = 0
        while frame is not None:
            if self._is_counted(frame.f_code):
                count += 1
            before = self._frames_before.get(id(frame))
            if before is None and frame.f_code.co_name == "run":  # of a thread, or of a work item
                before = self._frames_before.get(id(frame.f_locals.get("self")))
            if before is not None:
                return count + before
            frame = frame.f_back
        return count


def _is_storage_write(function: Any) -> bool:
    """True for a write by TensorStore, by the os module or by a file; not for one to the terminal."""
    name = getattr(function, "__name__", "")
    module = getattr(function, "__module__", None) or ""
    owner = getattr(function, "__self__", None)
    if module == os.name and name in OS_WRITES:
        return True
    if name != "write":
        return False
    if module.startswith("tensorstore") or type(owner).__module__.startswith("tensorstore"):
        return True
    return isinstance(owner, io.IOBase) and owner not in (sys.stdout, sys.stderr)


def _tree() -> dict[str, Any]:
    return {"w": jnp.ones((4, 4)), "b": jnp.zeros((4,))}


def _describe_leaf(leaf: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)


def _like(tree: Any) -> Any:
    return jax.tree.map(_describe_leaf, tree)


def _jaxckpt_sync(path: Path) -> Callable[[], Any]:
    import jaxckpt

    tree = _tree()
    like = _like(tree)

    def save_and_restore() -> None:
        jaxckpt.save(path, tree)
        jaxckpt.restore(path, like=like)

    return save_and_restore


def _jaxckpt_async(path: Path) -> Callable[[], Any]:
    import jaxckpt

    tree = _tree()
    like = _like(tree)

    def save_and_restore() -> None:
        jaxckpt.save_async(path, tree).wait()
        jaxckpt.restore(path, like=like)

    return save_and_restore


def _orbax_v0(path: Path) -> Callable[[], Any]:
    import orbax.checkpoint as ocp

    tree = _tree()
    like = _like(tree)

    def save_and_restore() -> None:
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(path, tree)
            checkpointer.wait_until_finished()
            checkpointer.restore(path, like)

    return save_and_restore


def _orbax_v1(path: Path) -> Callable[[], Any]:
    from orbax.checkpoint.experimental import v1 as ocp

    tree = _tree()
    like = _like(tree)

    def save_and_restore() -> None:
        ocp.save(path, tree)
        ocp.load(path, like)

    return save_and_restore


# name: (module whose folder is the library's own, preparation that returns the traced operation)
SUBJECTS: dict[str, tuple[str, Callable[[Path], Callable[[], Any]]]] = {
    "jaxckpt save + restore": ("jaxckpt", _jaxckpt_sync),
    "jaxckpt save_async + restore": ("jaxckpt", _jaxckpt_async),
    "orbax-v0 StandardCheckpointer": ("orbax.checkpoint", _orbax_v0),
    "orbax-v1 save + load": ("orbax.checkpoint", _orbax_v1),
}


def trace(name: str) -> dict[str, int]:
    """Traces one subject in this process, which should have done nothing else."""
    module, prepare = SUBJECTS[name]
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"{module} is not installed")
    with tempfile.TemporaryDirectory(prefix="jaxckpt-benchmark-") as scratch:
        operation = prepare(Path(scratch, "checkpoint"))
        return dataclasses.asdict(Tracer(Path(spec.origin).parent).run(operation))
