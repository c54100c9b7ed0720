"""Ratios, verdicts and tables of the benchmarks, from records written by hand."""

from __future__ import annotations

import json
import pathlib
import sys
from typing import Any

import pytest

from jaxckpt import MissingDependencyError

figures: Any = pytest.importorskip("benchmarks.figures")
plot: Any = pytest.importorskip("benchmarks.plot")
ratios: Any = pytest.importorskip("benchmarks.ratios")
report: Any = pytest.importorskip("benchmarks.report")

DISK = "/disk (ext4)"
MEMORY = "/dev/shm (tmpfs)"
ORDER = [
    "jaxckpt",
    "orbax-v0-default",
    "orbax-v0-tuned-files",
    "orbax-v1-tuned-files",
    "safetensors",
    "raw-one",
    "raw-two",
]


def family_of(contender: str) -> str:
    first = contender.partition("-")[0]
    return first if first in {"jaxckpt", "orbax", "raw"} else "peer"


def make_trials(
    contender: str,
    seconds: list[float],
    *,
    workload: str = "large",
    operation: str = "save",
    storage: str = DISK,
    peak_bytes: int = 0,
) -> list[dict[str, Any]]:
    """One trial for each of the seconds; the number of the repetition is their index."""
    return [
        {
            "workload": workload,
            "storage": storage,
            "contender": contender,
            "contender_order": ORDER.index(contender) if contender in ORDER else len(ORDER),
            "family": family_of(contender),
            "operation": operation,
            "repetition": repetition,
            "stored_bytes": 1000,
            "device_bytes": 1000,
            "seconds": each,
            "peak_extra_bytes": peak_bytes,
            "call_read_bytes": 1000,
            "call_write_bytes": 1000,
            "storage_read_bytes": 1000,
            "file_count": 1,
        }
        for repetition, each in enumerate(seconds)
    ]


def make_run(*trials: list[dict[str, Any]], studies: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    every = [trial for each in trials for trial in each]
    return {
        "meta": {
            "machine": "a machine",
            "device": "cpu",
            "versions": {"jax": "1"},
            "commit": "abc",
            "command": "python -m benchmarks.run",
            "date": "2026-01-01",
            "workloads": {trial["workload"]: "some leaves" for trial in every},
            "durability": {trial["contender"]: "fsynced" for trial in every},
        },
        "notes": [
            {
                "workload": None,
                "storage": None,
                "contender": "torch",
                "text": "left out: torch is not installed",
            }
        ],
        "trials": every,
        "studies": studies or [],
    }


def make_study(name: str, **numbers: float) -> dict[str, Any]:
    return {
        "name": name,
        "title": "what was done",
        "storage": "",
        "columns": ["size", "seconds"],
        "rows": [{"size": 1000, "seconds": 0.5, "seconds min": 0.4, "seconds max": 0.7}, {"size": 10_000}],
        "figures": numbers,
        "notes": ["a note"],
    }


def checks_of(figure_id: str, *runs: dict[str, Any]) -> dict[str, Any]:
    """The checks of one figure, by place."""
    return {check.place: check for check in figures.check(ratios.merge(runs)) if check.figure.id == figure_id}


def test_a_ratio_is_taken_within_each_repetition() -> None:
    # The machine is ten times as slow in the second repetition: medians of seconds would say 1.0.
    run = make_run(make_trials("jaxckpt", [1.0, 10.0, 2.0]), make_trials("raw-one", [2.0, 20.0, 1.0]))
    (group,) = ratios.groups(run)
    assert ratios.speed_ratio(group, "raw", "save").values == [2.0, 2.0, 0.5]
    assert checks_of("save-raw", run)[f"large on {DISK}"].measured == 2.0


def test_the_best_of_a_kind_is_the_one_with_the_best_median() -> None:
    run = make_run(
        make_trials("jaxckpt", [1.0, 1.0, 1.0]),
        make_trials("raw-one", [0.1, 3.0, 3.0]),
        make_trials("raw-two", [2.0, 2.0, 2.0]),
    )
    (group,) = ratios.groups(run)
    assert ratios.speed_ratio(group, "raw", "save").other == "raw-two"


def test_a_contender_that_ran_less_often_is_compared_where_it_ran() -> None:
    run = make_run(
        make_trials("jaxckpt", [1.0, 5.0, 5.0], workload="small"),
        make_trials("orbax-v0-default", [60.0], workload="small"),
    )
    check = checks_of("small-save-orbax", run)[f"small on {DISK}"]
    assert check.measurement.values == [60.0]
    assert check.is_met


def test_default_and_tuned_orbax_and_others_are_told_apart() -> None:
    run = make_run(
        make_trials("jaxckpt", [1.0]),
        make_trials("orbax-v0-default", [3.0]),
        make_trials("orbax-v0-tuned-files", [1.4]),
        make_trials("orbax-v1-tuned-files", [1.3]),
        make_trials("safetensors", [1.1]),
        make_trials("raw-one", [0.8]),
    )
    found = {kind: ratio.other for kind, ratio in report.comparison(ratios.groups(run)[0])["save"].items()}
    assert found == {
        "raw": "raw-one",
        "tuned Orbax": "orbax-v1-tuned-files",
        "default Orbax": "orbax-v0-default",
        "other": "safetensors",
    }
    assert checks_of("save-default", run)[f"large on {DISK}"].is_met


def test_what_has_no_opponent_or_no_trial_is_not_measured() -> None:
    found = checks_of("save-raw", make_run(make_trials("jaxckpt", [1.0])))
    assert {place: check.measured for place, check in found.items()} == {
        f"large on {DISK}": None,
        "single": None,
        "gpt-float32": None,
        "gpt-bfloat16": None,
    }
    assert not any(check.is_met for check in found.values())


def test_saves_to_memory_do_not_count_for_the_disk() -> None:
    run = make_run(
        make_trials("jaxckpt", [1.0], storage=MEMORY),
        make_trials("raw-one", [1.0], storage=MEMORY),
        make_trials("jaxckpt", [1.0], storage=MEMORY, operation="restore warm"),
        make_trials("raw-one", [1.0], storage=MEMORY, operation="restore warm"),
    )
    assert checks_of("save-raw", run)["large"].measured is None
    assert checks_of("restore-cold-raw", run)["large"].measured is None
    assert checks_of("restore-warm-raw", run)[f"large on {MEMORY}"].is_met


@pytest.mark.parametrize(("raw_s", "target", "is_met"), [(0.9, 1.0, True), (0.8, 1.15, False)])
def test_more_speed_than_tuned_orbax_is_wanted_only_where_raw_has_it(
    raw_s: float, target: float, is_met: bool
) -> None:
    run = make_run(
        make_trials("jaxckpt", [0.95]),
        make_trials("orbax-v1-tuned-files", [1.0]),
        make_trials("raw-one", [raw_s]),
    )
    check = checks_of("save-tuned", run)[f"large on {DISK}"]
    assert (check.target, check.is_met) == (target, is_met)


def test_bounds_on_memory_hold_for_the_worst_trial() -> None:
    run = make_run(
        make_trials("jaxckpt", [1.0, 1.0, 1.0], operation="restore warm", peak_bytes=1000),
        make_trials("jaxckpt", [1.0], operation="restore cold", peak_bytes=1200),
    )
    check = checks_of("restore-memory", run)[f"large on {DISK}"]
    assert check.measured == 1.2
    assert not check.is_met


def test_a_multiple_of_another_time_is_met_below_its_target() -> None:
    run = make_run(
        make_trials("jaxckpt", [2.0, 2.0], workload="tiny"),
        make_trials("raw-packed", [1.0, 0.5], workload="tiny"),
    )
    check = checks_of("small-save-raw", run)[f"tiny on {DISK}"]
    assert check.measurement.values == [2.0, 4.0]
    assert check.measured == 3.0
    assert check.is_met


def test_the_later_run_counts_and_runs_are_never_mixed() -> None:
    first = make_run(
        make_trials("jaxckpt", [1.0]), make_trials("raw-one", [1.0]), studies=[make_study("growth")]
    )
    second = make_run(
        make_trials("jaxckpt", [2.0]), studies=[make_study("growth", **{"leaves, save: exponent": 0.9})]
    )
    results = ratios.merge([first, second])
    assert checks_of("save-raw", first)[f"large on {DISK}"].measured == 1.0
    assert checks_of("save-raw", first, second)[f"large on {DISK}"].measured is None
    assert [study["figures"] for study in results.studies] == [{"leaves, save: exponent": 0.9}]


def test_a_study_s_numbers_are_held_against_their_targets() -> None:
    study = make_study(
        "growth", **{"leaves, save: exponent": 1.02, "leaves, open: exponent": 1.4, "seconds": 7.0}
    )
    found = checks_of("growth", make_run(studies=[study]))
    assert {place: check.is_met for place, check in found.items()} == {
        "leaves, save": True,
        "leaves, open": False,
    }


def test_results_say_which_figures_are_met_missed_and_absent() -> None:
    run = make_run(
        make_trials("jaxckpt", [2.0, 2.0, 2.0]),
        make_trials("raw-one", [1.0, 1.5, 1.2]),
        make_trials("orbax-v0-default", [6.0, 6.0, 6.0]),
        make_trials("jaxckpt", [2.0], workload="single"),
        make_trials("raw-one", [1.0], workload="single"),
        studies=[make_study("opening", other=1.0)],
    )
    remarks = {"save-raw": "The disk is slow.", "save-raw/single": "One leaf has one thread."}
    run["notes"].append(
        {"workload": "tiny", "storage": MEMORY, "contender": "all", "text": "left out: no room"}
    )
    run["notes"].append(
        {"workload": "large", "storage": None, "contender": "flax", "text": "failed: why\nand where"}
    )
    lines = report.markdown(ratios.merge([run]), remarks).splitlines()
    head = "| Saving | times as fast as "
    assert (
        head
        + "raw I/O, on disk | ≥ 0.9 x | /disk (ext4) | large **0.60 [0.50-0.75]**<br>single **0.50** | 0 of 2 |"
        in lines
    )
    assert head + "the best default Orbax, on disk | ≥ 2 x | /disk (ext4) | large 3.00 | yes |" in lines
    missed = "* Saving: times as fast as raw I/O, on disk "
    assert missed + "(large on /disk (ext4) 0.6, not ≥ 0.9): The disk is slow." in lines
    assert missed + "(single on /disk (ext4) 0.5, not ≥ 0.9): One leaf has one thread." in lines
    assert "* Small leaves: save: times as fast as the best Orbax (small, tiny)" in lines
    assert "* commit: abc, 2026-01-01" in lines
    assert "| save | 0.60 [0.50-0.75] raw-one | 3.00 orbax-v0-default |" in lines
    assert "| 1,000 | 0.50 [0.40-0.70] |" in lines
    assert "| 10,000 | - |" in lines
    assert lines.count("* torch: left out: torch is not installed") == 1
    assert "* tiny: left out: no room" in lines
    assert "* flax: failed: why" in lines
    assert "| raw-one | - | fsynced |" in lines


def test_a_missed_target_without_a_remark_is_said_so() -> None:
    run = make_run(make_trials("jaxckpt", [2.0]), make_trials("raw-one", [1.0]))
    assert "0.5, not ≥ 0.9): No reason is known yet." in report.markdown(ratios.merge([run]), {})


def test_the_readme_gets_its_tables_between_its_markers(tmp_path: pathlib.Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{report.README_START}\nold\n{report.README_END}\nafter\n")
    run = make_run(make_trials("jaxckpt", [2.0]), make_trials("raw-one", [1.0]))
    report.write_readme(ratios.merge([run]), readme)
    text = readme.read_text()
    assert text.startswith(f"before\n{report.README_START}\n")
    assert text.endswith(f"\n{report.README_END}\nafter\n")
    assert "| 2.00 s | 0.50 x | - | - | - |" in text
    assert "old" not in text
    report.write_readme(ratios.merge([run]), readme)
    assert readme.read_text() == text

    readme.write_text("no markers")
    with pytest.raises(ValueError, match="has no lines"):
        report.write_readme(ratios.merge([run]), readme)


def test_a_results_file_comes_back_as_it_was_written(tmp_path: pathlib.Path) -> None:
    run = make_run(make_trials("jaxckpt", [2.0, 3.0]), studies=[make_study("growth")])
    path = tmp_path / "results.json"
    report.write_json(run, path)
    assert json.loads(path.read_text()) == run
    assert len([line for line in path.read_text().splitlines() if '"repetition"' in line]) == 2
    assert list(tmp_path.iterdir()) == [path]


def test_tables_for_a_terminal_are_aligned() -> None:
    run = make_run(make_trials("jaxckpt", [2.0]), make_trials("raw-one", [1.0]))
    (group,) = ratios.groups(run)
    lines = report.plain_text(run, group).splitlines()
    assert lines[0] == f"large on {DISK}: some leaves"
    assert len({len(line) for line in lines[2:5]}) == 1
    assert "0.50" in report.study_text(make_study("growth", slope=1.0))


def test_names_of_figures_are_unique_and_remarks_are_about_them() -> None:
    names = [figure.id for figure in figures.FIGURES]
    assert len(set(names)) == len(names)
    assert {key.partition("/")[0] for key in report.read_remarks()} <= set(names)


def test_the_results_page_is_what_the_results_say() -> None:
    results = ratios.load(ratios.default_paths())
    page = ratios.DEFAULT_RESULTS.with_name("RESULTS.md").read_text()
    assert page == report.markdown(results, report.read_remarks()), "run python -m benchmarks.report"


def test_every_panel_of_the_picture_is_drawn_where_its_trials_are(tmp_path: pathlib.Path) -> None:
    pytest.importorskip("matplotlib")
    run = make_run(
        *(
            make_trials(name, [1.0 + number], operation=each)
            for number, name in enumerate(ORDER)
            for each in plot.OPERATIONS
        ),
        *(make_trials(name, [1.0 + number], workload="tiny") for number, name in enumerate(ORDER)),
        studies=[make_study("loop")],
    )
    loop = make_study("loop") | {
        "columns": ["contender", "blocked ms", "slowdown ms"],
        "rows": [
            {"contender": "jaxckpt manager", "blocked ms": 3.0, "slowdown ms": -1.0},
            {"contender": "orbax-v0 manager", "blocked ms": 30.0, "slowdown ms": 20.0},
        ],
    }
    heights = []
    for name, results in (
        ("small.png", ratios.merge([run])),
        ("large.png", ratios.merge([run, make_run(studies=[loop])])),
    ):
        plot.draw(results, tmp_path / name)
        picture = (tmp_path / name).read_bytes()
        assert picture.startswith(b"\x89PNG")
        heights.append(int.from_bytes(picture[20:24]))
    assert heights[1] > heights[0] > 100
    with pytest.raises(ValueError, match="nothing to draw"):
        plot.draw(ratios.merge([]), tmp_path / "none.png")


def test_bars_are_medians_against_raw_and_name_the_best_other_library() -> None:
    run = make_run(
        make_trials("jaxckpt", [2.0, 2.0]),
        make_trials("safetensors", [4.0, 4.0]),
        make_trials("raw-one", [1.0, 2.0]),
    )
    bars = plot.speed_bars(ratios.groups(run)[0], "save")
    assert [(bar.label, bar.value, bar.text) for bar in bars] == [
        ("jaxckpt", 0.75, "0.75"),
        ("best other", 0.375, "safetensors 0.38"),
    ]


def test_without_matplotlib_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'jaxckpt\[bench\]'"):
        plot.import_matplotlib()
