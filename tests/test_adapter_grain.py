"""Grain: whatever the pipeline, a new iterator gives after a restore just what an unbroken one would have given."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import jaxckpt
from jaxckpt import CheckpointManager

from .helpers import run_adapter

grain: Any = pytest.importorskip("grain", reason="grain is not installed")

COUNT = 36


class Numbers:
    """A source; a loader keeps its `repr` to compare it."""

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, index: int) -> int:
        return index

    def __repr__(self) -> str:
        return "Numbers()"


class Anonymous(Numbers):
    """A source whose `repr` is another one for each object."""

    __repr__ = object.__repr__


class AddNoise(grain.transforms.RandomMap):
    """A transformation whose random numbers are part of what must come again."""

    def random_map(self, element: Any, rng: np.random.Generator) -> Any:
        return element + rng.normal()


def shuffled(epochs: int | None = 3) -> Any:
    return grain.MapDataset.source(Numbers()).seed(7).shuffle().repeat(epochs).random_map(AddNoise())


def load(workers: int = 0, source: Numbers | None = None, shard: tuple[int, int] = (0, 1)) -> Iterator[Any]:
    sampler = grain.samplers.IndexSampler(
        COUNT, grain.sharding.ShardOptions(*shard), shuffle=True, num_epochs=3, seed=7
    )
    operations = [AddNoise(), grain.transforms.Batch(4)]
    return iter(
        grain.DataLoader(
            data_source=source or Numbers(), sampler=sampler, operations=operations, worker_count=workers
        )
    )


def pack() -> Any:
    rows = grain.MapDataset.source([{"tokens": np.arange(length % 5 + 1)} for length in range(30)])
    return grain.experimental.FirstFitPackIterDataset(
        rows.seed(3).shuffle().repeat().to_iter_dataset(), length_struct={"tokens": 8}, num_packing_bins=3
    )


PIPELINES: dict[str, Callable[[], Iterator[Any]]] = {
    "loader": load,
    "map_dataset": lambda: iter(shuffled().batch(4)),
    "batched_after_conversion": lambda: iter(shuffled().to_iter_dataset().batch(4)),
    "threads": lambda: iter(
        shuffled().batch(4).to_iter_dataset(grain.ReadOptions(num_threads=3, prefetch_buffer_size=8))
    ),
    "prefetching_thread": lambda: iter(
        grain.experimental.ThreadPrefetchIterDataset(
            shuffled().batch(4).to_iter_dataset(), prefetch_buffer_size=4
        )
    ),
    "filtered": lambda: iter(shuffled().filter(lambda number: number > 9).to_iter_dataset().batch(2)),
    "shuffled_in_a_window": lambda: iter(
        grain.experimental.WindowShuffleIterDataset(
            shuffled().to_iter_dataset(), window_size=5, seed=1
        ).batch(2)
    ),
    "mixed": lambda: iter(
        grain.MapDataset.mix([shuffled(None), grain.MapDataset.range(100, 110).repeat()], [0.3, 0.7]).batch(3)
    ),
    "packed": lambda: iter(pack()),
    "sliced_and_endless": lambda: iter(
        grain.MapDataset.source(Numbers())[1::2].seed(1).shuffle().repeat().batch(5)
    ),
}


def take(source: Iterator[Any], count: int) -> list[Any]:
    return [next(source) for _ in range(count)]


def assert_same_elements(got: list[Any], want: list[Any]) -> None:
    assert len(got) == len(want)
    for got_element, want_element in zip(got, want, strict=True):
        np.testing.assert_equal(got_element, want_element)


def assert_goes_on(
    path: pathlib.Path, make: Callable[[], Iterator[Any]], before: int = 5, after: int = 6
) -> None:
    whole = take(make(), before + after)
    source = make()
    take(source, before)
    jaxckpt.save(path, {}, items={"data": source})
    take(source, 2)  # what happens after the save is not in it
    fresh = make()
    take(fresh, 1)  # nor does it matter where an iterator was
    jaxckpt.restore(path, items={"data": fresh})
    assert_same_elements(take(fresh, after), whole[before:])


def test_the_example(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_adapter("grain_iterators", tmp_path)
    assert capsys.readouterr().out.splitlines() == [
        "dataset: 22 batches to come, after the restore 22, equal: True",
        "loader: 22 batches to come, after the restore 22, equal: True",
        "state of the dataset: {'next_index': 15}",
    ]


@pytest.mark.parametrize("name", PIPELINES)
def test_a_pipeline_goes_on_where_it_was(path: pathlib.Path, name: str) -> None:
    assert_goes_on(path, PIPELINES[name])


def test_an_iterator_that_is_new_or_at_its_end_stays_so(tmp_path: pathlib.Path) -> None:
    new, ended = PIPELINES["map_dataset"](), PIPELINES["map_dataset"]()
    whole = list(ended)
    jaxckpt.save(tmp_path / "checkpoint", {}, items={"new": new, "ended": ended})
    fresh = {name: PIPELINES["map_dataset"]() for name in ("new", "ended")}
    jaxckpt.restore(tmp_path / "checkpoint", items=fresh)
    assert_same_elements(list(fresh["new"]), whole)
    assert list(fresh["ended"]) == []


def test_each_save_of_a_manager_has_the_state_of_its_step(path: pathlib.Path) -> None:
    make = PIPELINES["threads"]
    whole = take(make(), 12)
    source = make()
    with CheckpointManager(path, save_interval_steps=3) as manager:
        for step in range(1, 10):
            next(source)
            manager.save(step, {"step": step}, items={"data": source})
    for step in (3, 6, 9):
        fresh = make()
        CheckpointManager(path).restore(step, items={"data": fresh})
        assert_same_elements(take(fresh, 12 - step), whole[step:])


def test_a_source_without_a_name_of_its_own_is_refused_by_grain_and_the_error_names_the_item(
    path: pathlib.Path,
) -> None:
    source = load(source=Anonymous())
    next(source)
    jaxckpt.save(path, {}, items={"data": source})
    with pytest.raises(ValueError, match="data source") as caught:
        jaxckpt.restore(path, items={"data": load(source=Anonymous())})
    assert "the item 'data'" in caught.value.__notes__[-1]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["loader", "dataset"])
def test_pipelines_that_fetch_in_processes_go_on_where_they_were(path: pathlib.Path, kind: str) -> None:
    flags: Any = pytest.importorskip("absl.flags")
    flags.FLAGS.mark_as_parsed()  # what `absl.app.run` does; Grain's processes read flags

    # Of nothing but Grain's own parts, so that its processes need not import this module, and jax.
    def make(workers: int) -> Iterator[Any]:
        if kind == "loader":
            sampler = grain.samplers.IndexSampler(COUNT, shuffle=True, num_epochs=3, seed=7)
            operations = [grain.transforms.Batch(4)]
            numbers = grain.sources.RangeDataSource(0, COUNT, 1)
            return iter(
                grain.DataLoader(
                    data_source=numbers, sampler=sampler, operations=operations, worker_count=workers
                )
            )
        dataset = grain.MapDataset.range(COUNT).seed(7).shuffle().repeat(3).batch(4).to_iter_dataset()
        options = grain.multiprocessing.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2)
        return iter(dataset.mp_prefetch(options))

    # What such an iterator gives is what the same pipeline in one process gives.
    whole = take(make(0), 9)
    source = make(1)
    assert_same_elements(take(source, 5), whole[:5])
    jaxckpt.save(path, {}, items={"data": source})
    fresh = make(1)
    jaxckpt.restore(path, items={"data": fresh})
    assert_same_elements(take(fresh, 4), whole[5:])


# --- a group of processes -------------------------------------------------------------------------------------


def save_and_go_on(worker: Any, path: str) -> tuple[list[Any], list[Any]]:
    """What is to come of this process's shard, of the iterator that was saved and of the one that was restored."""
    shard = (worker.index, worker.count)

    def make() -> dict[str, Iterator[Any]]:
        dataset = grain.MapDataset.source(Numbers())[worker.index :: worker.count].seed(7).shuffle().batch(4)
        return {"loader": load(shard=shard), "dataset": iter(dataset.to_iter_dataset())}

    sources = make()
    take(sources["loader"], 1 + worker.index)
    take(sources["dataset"], 2 + worker.index)
    jaxckpt.save(path, {}, items=sources)
    fresh = make()
    jaxckpt.restore(path, items=fresh)
    return [list(source) for source in sources.values()], [list(source) for source in fresh.values()]


@pytest.mark.slow
@pytest.mark.processes
def test_each_process_of_a_group_goes_on_in_its_own_shard(path: pathlib.Path) -> None:
    from .processes import run_processes

    outcomes = run_processes(save_and_go_on, 2, arguments=[str(path)])
    assert [outcome.status for outcome in outcomes] == ["returned"] * 2, outcomes
    for outcome in outcomes:
        rest, rest_again = outcome.value
        for got, want in zip(rest_again, rest, strict=True):
            assert want
            assert_same_elements(got, want)
    (loader_0, dataset_0), (loader_1, dataset_1) = (outcome.value[0] for outcome in outcomes)
    assert len(loader_0) == len(loader_1) + 1
    assert len(dataset_0) == len(dataset_1) + 1
    assert not set(np.concatenate(dataset_0)) & set(np.concatenate(dataset_1))
