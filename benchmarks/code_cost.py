"""How much code is it, for a machine that imports it and for whoever follows a call?

The first table has what an import adds to ``import jax``: seconds, in a new interpreter each, and modules. The second
has what one small save and restore enters, as `path_length` counts it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from benchmarks import path_length
from benchmarks.study import (
    REPOSITORY,
    StudyError,
    StudyResult,
    StudySettings,
    least_of_orbax,
    make_row,
    take_turns,
)

# What is imported, by contender.
PACKAGES = {
    "jaxckpt": "jaxckpt",
    "orbax-v0": "orbax.checkpoint",
    "orbax-v1": "orbax.checkpoint.experimental.v1",
}

# An import takes a fraction of a second and varies by much of it.
IMPORTS_PER_REPETITION = 3

# Nothing of this repository may be imported beside the package: hence no call of `study`.
CHILD = """
import importlib, json, sys, time
import jax
before = set(sys.modules)
start = time.perf_counter()
importlib.import_module(sys.argv[1])
seconds = time.perf_counter() - start
print(json.dumps({"seconds over jax": seconds, "modules over jax": len(set(sys.modules) - before)}))
"""


def import_package(module: str, timeout_s: float) -> dict[str, float]:
    """Imports a package after jax in a new interpreter."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", CHILD, module],
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=True,
        )
    except subprocess.CalledProcessError as error:
        raise StudyError(error.stderr) from error
    return json.loads(done.stdout)


def run(
    settings: StudySettings, names: tuple[str, ...] = (*PACKAGES, *path_length.SUBJECTS)
) -> list[StudyResult]:
    packages = [name for name in PACKAGES if name in names]
    subjects = [name for name in path_length.SUBJECTS if name in names]
    return [*([_imports(settings, packages)] if packages else []), _paths(settings, subjects)]


def _imports(settings: StudySettings, names: list[str]) -> StudyResult:
    def import_one(name: str, repetition: int) -> dict[str, Any]:
        if repetition == 0:
            import_package(
                PACKAGES[name], settings.timeout_s
            )  # fills the page cache, and writes the .pyc files
        return import_package(PACKAGES[name], settings.timeout_s)

    answers, notes = take_turns(names, IMPORTS_PER_REPETITION * settings.repeat, import_one)
    rows = {name: make_row("import", name, each) for name, each in answers.items()}
    figures = {"import jaxckpt: seconds over jax": rows["jaxckpt"]["seconds over jax"]}
    best_s = least_of_orbax({name: row["seconds over jax"] for name, row in rows.items()})
    if best_s is not None:
        figures["import: best Orbax / jaxckpt"] = best_s / figures["import jaxckpt: seconds over jax"]
    return StudyResult(
        name="code",
        title="what an import adds to `import jax`",
        storage="",
        columns=("import", "seconds over jax", "modules over jax"),
        rows=tuple(rows.values()),
        figures=figures,
        notes=tuple(notes),
    )


def _paths(settings: StudySettings, names: list[str]) -> StudyResult:
    def trace_one(name: str, _: int) -> dict[str, Any]:
        return settings.call(path_length.trace, name=name)

    answers, notes = take_turns(names, 1, trace_one)
    rows = {name: make_row("one small save and restore", name, each) for name, each in answers.items()}
    best = least_of_orbax({name: row["functions"] for name, row in rows.items()})
    figures = {"functions entered": rows["jaxckpt save + restore"]["functions"]}
    if best is not None:
        figures["functions entered: least Orbax / jaxckpt"] = best / figures["functions entered"]
    return StudyResult(
        name="code",
        title="code that one small save and restore enters, the first in a process",
        storage="",
        columns=("one small save and restore", "functions", "files", "frames", "threads"),
        rows=tuple(rows.values()),
        figures=figures,
        notes=tuple(notes),
    )
