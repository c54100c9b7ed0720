"""Checkpoints of other libraries, read and written without those libraries.

A module for each: `flax`, `npz`, `orbax`, `safetensors`, `tensorflow`. It is imported when it is asked for.
"""

from __future__ import annotations

import importlib
from typing import Any

_FORMATS = ("flax", "npz", "orbax", "safetensors", "tensorflow")


def __getattr__(name: str) -> Any:
    if name in _FORMATS:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_FORMATS})
