"""How is Python's search for garbage kept out of work that makes many objects and drops none?

The collector looks for cycles after every so many new objects, and now and then at all objects of the process, which
takes a tenth of a second in a program that has imported JAX. Reading a manifest, planning and placing make objects by
the hundred thousand, and they all stay. Deliberately not paused: reads, writes and transfers, which take long.
"""

from __future__ import annotations

import contextlib
import gc
import os
import threading
from collections.abc import Generator

_lock = threading.Lock()
_pauses: set[object] = set()
_was_enabled = True


@contextlib.contextmanager
def collection_paused() -> Generator[None]:
    """Nothing looks for garbage meanwhile, in all threads; afterwards all is as it was. Also a decorator."""
    global _was_enabled  # noqa: PLW0603 the collector is the process's, too
    pause = object()
    try:
        with _lock:
            if not _pauses:
                _was_enabled = gc.isenabled()
            _pauses.add(pause)
            gc.disable()
        yield
    finally:
        with _lock:
            _pauses.discard(pause)
            if not _pauses and _was_enabled:
                gc.enable()


def _end_pauses_of_others() -> None:
    """A forked child has none of the threads that would end their pauses."""
    global _lock  # noqa: PLW0603
    _lock = threading.Lock()
    if _pauses:
        _pauses.clear()
        if _was_enabled:
            gc.enable()


os.register_at_fork(after_in_child=_end_pauses_of_others)
