"""How does a person at a terminal see that something goes on?

`ProgressBar` draws one line, anew and anew, from the `Progress` values of a save, a verification or a comparison.
"""

from __future__ import annotations

import math
import threading
from typing import TextIO, final

from ._progress import Progress, format_bytes


@final
class ProgressBar:
    """One line on a terminal for what takes longer than a second; nothing elsewhere, nor when the terminal is gone.

    Time is that of the `Progress` values. They may come from several threads.
    """

    _SHOWN_AFTER_S = 1.0
    _REDRAWN_AFTER_S = 0.1
    _CELLS = 30

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream
        self._is_terminal = stream is not None and stream.isatty()
        self._lock = threading.Lock()
        self._drawn_s = -math.inf
        self._is_drawn = False

    def show(self, progress: Progress) -> None:
        """Draws the bar anew when it is time to."""
        if not self._is_terminal or progress.elapsed_s < self._SHOWN_AFTER_S:
            return
        with self._lock:
            if progress.elapsed_s - self._drawn_s < self._REDRAWN_AFTER_S:
                return
            self._drawn_s = progress.elapsed_s
            self._is_drawn = True
            self._write("\r" + self._line(progress) + "\x1b[K")

    def close(self) -> None:
        """Wipes the bar away."""
        with self._lock:
            if self._is_drawn:
                self._write("\r\x1b[K")
            self._is_drawn = False
            self._drawn_s = -math.inf

    def _line(self, progress: Progress) -> str:
        share = min(progress.fraction, 1.0)
        cells = "#" * round(share * self._CELLS)
        rate = format_bytes(round(progress.bytes_done / progress.elapsed_s))
        left_s = progress.elapsed_s / share - progress.elapsed_s if share else math.inf
        left = f"{left_s:.0f} s left" if math.isfinite(left_s) else ""
        return f"[{cells:<{self._CELLS}}] {share:4.0%}  {format_bytes(progress.bytes_done)}  {rate}/s  {left}"

    def _write(self, text: str) -> None:
        assert self._stream is not None
        try:
            self._stream.write(text)
            self._stream.flush()
        except (OSError, ValueError):  # it was closed or hung up, which must not fail what it shows
            self._is_terminal = False
