"""Which studies are there? `run` calls them by name, after the tree workloads or alone."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks import checksums, code_cost, endurance, growth, loop, memory, opening, partial
from benchmarks.study import StudyResult, StudySettings

STUDIES: dict[str, Callable[[StudySettings], list[StudyResult]]] = {
    "partial": partial.run,
    "loop": loop.run,
    "endurance": endurance.run,
    "memory": memory.run,
    "opening": opening.run,
    "growth": growth.run,
    "checksums": checksums.run,
    "code": code_cost.run,
}

__all__ = ["STUDIES", "StudyResult", "StudySettings"]
