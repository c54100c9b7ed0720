"""The studies of the benchmarks, each end to end with its smallest size: fields, figures, and what fails loudly.

Orbax is left out where it costs more than jaxckpt; its figures are not looked at here.
"""

from __future__ import annotations

import json
import os
import pathlib
import tempfile
from collections.abc import Callable
from typing import Any

import pytest

study: Any = pytest.importorskip("benchmarks.study")
studies: Any = pytest.importorskip("benchmarks.studies")

from benchmarks import (  # noqa: E402  not part of the package
    checksums,
    code_cost,
    endurance,
    growth,
    loop,
    memory,
    opening,
    partial,
)

from .helpers import run_fork  # noqa: E402  as above


class ForkedSettings(study.StudySettings):
    """Has forks do what fresh processes do, which saves most of the time that these take."""

    def call(self, function: Callable[..., Any], *, devices: int = 1, **arguments: Any) -> Any:
        program = "import sys; from benchmarks import study; study.run_child(*sys.argv[1:])"
        name = f"{function.__module__}:{function.__name__}"
        with tempfile.NamedTemporaryFile() as answer:
            run_fork(
                program, name, json.dumps(arguments), answer.name, devices=devices, timeout_s=self.timeout_s
            )
            return json.load(answer)


# By study, how it is run with its smallest size, and figures that it must have.
SMALLEST: dict[str, tuple[Callable[[Any], list[Any]], set[str]]] = {
    "partial": (
        lambda settings: partial.run(settings, partial.TINY, ("jaxckpt",)),
        {f"{part}, warm: read / wanted" for part in ("one leaf", "rows 10:20", "column block")},
    ),
    "loop": (
        lambda settings: loop.run(settings, loop.TINY, ("jaxckpt save_async",)),
        {"jaxckpt save_async, 10 leaves of 256 bytes: ms"},
    ),
    "endurance": (
        lambda settings: endurance.run(settings, endurance.TINY, ("jaxckpt manager",)),
        {"seconds, late / early", "memory growth MiB", "files", "threads"},
    ),
    "memory": (
        lambda settings: memory.run(settings, memory.TINY, (16,)),
        {"most over budget MiB"},
    ),
    "opening": (
        lambda settings: opening.run(settings, opening.TINY, ("jaxckpt",)),
        {"open the large one, first: ms", "make + list: ms"},
    ),
    "growth": (
        lambda settings: growth.run(settings, growth.TINY),
        {"devices, save: exponent", "devices, restore: exponent"},
    ),
    "checksums": (
        lambda settings: checksums.run(settings, checksums.TINY),
        {"save, seconds: cost", "restore, seconds: cost"},
    ),
    "code": (
        lambda settings: code_cost.run(settings, ("jaxckpt save + restore",)),
        {"functions entered"},
    ),
}


def test_there_is_a_smallest_size_of_each_study():
    assert set(SMALLEST) == set(studies.STUDIES)


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALLEST)
def test_a_study_ends_with_tables_and_its_figures(name: str, tmp_path: pathlib.Path):
    run, wanted = SMALLEST[name]
    settings = ForkedSettings(quick=True, directories=(tmp_path,), repeat=1, timeout_s=100)
    results = run(settings)
    assert {result.name for result in results} == {name}
    assert wanted <= {figure for result in results for figure in result.figures}
    for result in results:
        assert result.title
        assert result.rows
        for row in result.rows:
            assert isinstance(row[result.columns[0]], (str, int))
            assert set(row) <= {f"{column}{end}" for column in result.columns for end in ("", " min", " max")}
        assert all(isinstance(value, (int, float)) for value in result.figures.values())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_cost_of_an_import_is_that_over_jax():
    found = code_cost.import_package("jax.numpy", timeout_s=60)  # has been imported with jax
    assert found["modules over jax"] == 0
    with pytest.raises(study.StudyError, match="not_there"):
        code_cost.import_package("not_there", timeout_s=60)


def test_a_peer_that_fails_is_left_out_with_a_note_and_the_others_go_on():
    def run(name: str, repetition: int) -> dict[str, Any]:
        if name == "orbax" and repetition == 1:
            raise study.StudyError("exit code 1\nModuleNotFoundError: No module named 'orbax'")
        return {"seconds": float(repetition)}

    answers, notes = study.take_turns(["jaxckpt", "orbax"], 3, run)
    assert answers == {"jaxckpt": [{"seconds": 0.0}, {"seconds": 1.0}, {"seconds": 2.0}]}
    assert notes == ["orbax is left out: ModuleNotFoundError: No module named 'orbax'"]


def test_a_failure_of_jaxckpt_ends_the_study():
    def run(name: str, repetition: int) -> dict[str, Any]:
        raise study.StudyError("restored other values")

    with pytest.raises(study.StudyError, match="other values"):
        study.take_turns(["jaxckpt save_async"], 1, run)


def test_a_fresh_process_answers_and_what_it_raises_is_told():
    settings = study.StudySettings(quick=True, directories=(), repeat=1, timeout_s=60)
    assert settings.call(os.path.basename, p="a/b") == "b"
    with pytest.raises(study.StudyError, match="FileNotFoundError"):
        settings.call(os.stat, path="/not there")


def test_a_row_has_the_median_and_the_range_of_each_number():
    answers = [{"ms": 3.0, "part": "rows"}, {"ms": 1.0, "part": "rows"}, {"ms": 2.0, "part": "rows"}]
    row = study.make_row("name", "jaxckpt", answers)
    assert row == {"name": "jaxckpt", "ms": 2.0, "ms min": 1.0, "ms max": 3.0, "part": "rows"}


def test_the_exponent_is_that_of_the_three_largest_sizes():
    sizes = [1, 10, 100, 1000]
    values = [50.0, 10**1.5, 10**3, 10**4.5]
    assert study.growth_exponent(sizes, values) == pytest.approx(1.5)
