"""How does a data pipeline of Grain go on, after a restore, with exactly the elements that were still to come?

    python examples/adapters/grain_iterators.py DIRECTORY

* An iterator of Grain has `get_state` and `set_state`, and so is an item: ``items={"data": iterator}`` commits with the
  tree where it is at this moment, and the same argument of `jaxckpt.restore` puts another iterator there; so do the
  methods of a `CheckpointManager`. What was fetched ahead, in threads or in processes (`mp_prefetch`), but not given
  out yet comes again.
* Shuffling and random transformations depend on the seed and the position, so that the position is the whole state.
  The pipeline has to be the same code with the same seed.
* A `DataLoader` compares the ``repr`` of its source with that of the saved one: give the source one without an address.
* In a group of processes each has an iterator over its own shard, and gets its own state back.
"""

from __future__ import annotations

import pathlib
import sys
from collections.abc import Iterator

import grain.python as grain
import jax.numpy as jnp
import numpy as np

import jaxckpt

EPOCHS = 3
BATCH = 8


class Examples:
    """The source: 100 numbers."""

    def __len__(self) -> int:
        return 100

    def __getitem__(self, index: int) -> int:
        return index

    def __repr__(self) -> str:
        return "Examples()"


class AddNoise(grain.RandomMapTransform):
    """Adds random noise to an example."""

    def random_map(self, element: int, rng: np.random.Generator) -> float:
        """The element and the noise."""
        return element + rng.normal()


def make_dataset() -> Iterator[np.ndarray]:
    """The examples, shuffled anew for each epoch, in batches that four threads fetch ahead."""
    examples = grain.MapDataset.source(Examples()).seed(7).shuffle().repeat(EPOCHS)
    batches = examples.random_map(AddNoise()).batch(BATCH, drop_remainder=True)
    return iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=4, prefetch_buffer_size=16)))


def make_loader() -> Iterator[np.ndarray]:
    """The same by a `DataLoader`."""
    shard = grain.ShardOptions(shard_index=0, shard_count=1)
    sampler = grain.IndexSampler(100, shard, shuffle=True, num_epochs=EPOCHS, seed=7)
    operations = [AddNoise(), grain.Batch(BATCH, drop_remainder=True)]
    return iter(grain.DataLoader(data_source=Examples(), sampler=sampler, operations=operations))


def main(directory: pathlib.Path) -> None:
    """Takes some batches, saves, and compares those of the same iterators with those of new ones."""
    iterators = {"dataset": make_dataset(), "loader": make_loader()}
    total = jnp.zeros(())
    for _ in range(15):  # into the second epoch
        total += sum(next(iterator).sum() for iterator in iterators.values())
    jaxckpt.save(directory / "step_15", {"total": total}, items=iterators, overwrite=True)

    again = {"dataset": make_dataset(), "loader": make_loader()}
    total = jaxckpt.restore(directory / "step_15", items=again)["total"]

    for name, iterator in iterators.items():
        rest = list(iterator)
        rest_again = list(again[name])
        same = np.array_equal(rest, rest_again)
        print(f"{name}: {len(rest)} batches to come, after the restore {len(rest_again)}, equal: {same}")
        if not same:
            raise SystemExit(1)
    print("state of the dataset:", jaxckpt.open(directory / "step_15").items["dataset"])


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
