"""Checkpoints of other libraries, read and written without those libraries.

A module for each: `flax`, `npz`, `orbax` (which is only read), `safetensors`, `tensorflow`. It is imported when it is
asked for, and has the same verbs:

    can_read(path)          whether there is such a checkpoint
    open(path)              what it holds; ``checkpoint[name][10:20]`` reads a part of an array
    read(path, like, ...)   restores it, with the arguments of `jaxckpt.restore`
    write(path, tree, ...)  writes a tree

``jaxckpt convert`` turns checkpoints of all formats, and this library's own, into each other.
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
