"""What is an observer of a save, a restore or a verification told?"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable


@dataclasses.dataclass(frozen=True, slots=True)
class Progress:
    """How far an operation is.

    Attributes:
      phase: ``"snapshot"``, ``"write"``, ``"commit"``, ``"read"``, ``"upload"`` or ``"done"``.
      bytes_done: Bytes finished so far.
      bytes_total: Bytes to do in all.
      elapsed_s: Seconds since the operation began.
    """

    phase: str
    bytes_done: int
    bytes_total: int
    elapsed_s: float

    @property
    def fraction(self) -> float:
        """Share that is done, 0 to 1."""
        return self.bytes_done / self.bytes_total if self.bytes_total else 1.0


class ProgressMeter:
    """Counts bytes from several threads and hands out `Progress` values."""

    def __init__(
        self, bytes_total: int, phase: str, on_progress: Callable[[Progress], None] | None = None
    ) -> None:
        self._lock = threading.Lock()
        self._bytes_done = 0
        self._bytes_total = bytes_total
        self._phase = phase
        self._began_s = time.monotonic()
        self._on_progress = on_progress

    def add(self, nbytes: int) -> None:
        """Adds finished bytes and tells the observer."""
        with self._lock:
            self._bytes_done += nbytes
        if self._on_progress is not None:
            self._on_progress(self.read())

    def enter(self, phase: str) -> None:
        """Names what is going on from now on."""
        with self._lock:
            self._phase = phase
        if self._on_progress is not None:
            self._on_progress(self.read())

    def read(self) -> Progress:
        """The state of this moment."""
        with self._lock:
            return Progress(
                self._phase, self._bytes_done, self._bytes_total, time.monotonic() - self._began_s
            )


def format_bytes(nbytes: int) -> str:
    """A number of bytes for people: ``1.50 GiB``."""
    size = float(nbytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{int(size)} B" if unit == "B" else f"{size:.2f} {unit}"
        size /= 1024
    return f"{size:.2f} TiB"
