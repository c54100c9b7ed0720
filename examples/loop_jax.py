"""A training loop in plain JAX that saves while it trains, stops cleanly on SIGTERM, and resumes by itself.

    python examples/loop_jax.py DIRECTORY              # 40 steps, a checkpoint every 5
    python examples/loop_jax.py DIRECTORY --steps 80   # goes on from the newest checkpoint

Kill it when you like and start it again: the losses are those of a run that nothing interrupted, bit for bit.
What jaxckpt adds to an ordinary loop is all in `main`. The tree that it saves is the whole state of the training:
parameters, optimizer and PRNG key. The position in the data is no part of a tree; it is saved beside it, as an item.
"""

from __future__ import annotations

import argparse
import functools
import json
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import jaxckpt

SEED = 7
BATCH = 64
WIDTH = 128
DROPOUT = 0.2
OPTIMIZER = optax.adam(3e-3)

Tree = Any


class Batches:
    """An endless iterator over the digits, which are shuffled anew for each epoch."""

    def __init__(self) -> None:
        images, labels = load_digits(return_X_y=True)
        self._images = (images / 16).astype(np.float32)
        self._labels = labels.astype(np.int32)
        self._random = np.random.default_rng(SEED)
        self._rows = np.array([], dtype=np.int64)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> tuple[np.ndarray, np.ndarray]:
        if len(self._rows) < BATCH:
            self._rows = self._random.permutation(len(self._labels))
        rows, self._rows = self._rows[:BATCH], self._rows[BATCH:]
        return self._images[rows], self._labels[rows]

    def get_state(self) -> dict[str, Any]:
        """What is left of this epoch, and the generator that will shuffle the next one."""
        return {"rows": self._rows, "random": self._random.bit_generator.state}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues where the iterator was that gave this state."""
        self._rows = state["rows"]
        self._random.bit_generator.state = state["random"]


def init_state() -> Tree:
    """The whole state of the training at step 0."""
    state_key, key_1, key_2 = jax.random.split(jax.random.key(SEED), 3)
    params = {
        "hidden": {"kernel": jax.random.normal(key_1, (64, WIDTH)) / 8, "bias": jnp.zeros(WIDTH)},
        "head": {"kernel": jax.random.normal(key_2, (WIDTH, 10)) / WIDTH**0.5, "bias": jnp.zeros(10)},
    }
    return {"params": params, "optimizer": OPTIMIZER.init(params), "key": state_key}


def loss_of(params: Tree, key: jax.Array, images: jax.Array, labels: jax.Array) -> jax.Array:
    """The mean cross-entropy of a network with one hidden layer and dropout."""
    hidden = jax.nn.relu(images @ params["hidden"]["kernel"] + params["hidden"]["bias"])
    is_kept = jax.random.bernoulli(key, 1 - DROPOUT, hidden.shape)
    hidden = jnp.where(is_kept, hidden / (1 - DROPOUT), 0)
    logits = hidden @ params["head"]["kernel"] + params["head"]["bias"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


@functools.partial(jax.jit, donate_argnames="state")
def train_step(state: Tree, images: jax.Array, labels: jax.Array) -> tuple[Tree, jax.Array]:
    """The next state, in the memory of the old one, and the loss before the update."""
    next_key, key = jax.random.split(state["key"])
    loss, gradients = jax.value_and_grad(loss_of)(state["params"], key, images, labels)
    updates, optimizer = OPTIMIZER.update(gradients, state["optimizer"])
    params = optax.apply_updates(state["params"], updates)
    return {"params": params, "optimizer": optimizer, "key": next_key}, loss


def main() -> None:
    """Trains from the newest checkpoint, or from the start, to the last step or to SIGTERM."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--save-every", type=int, default=5)
    arguments = parser.parse_args()

    step = 0
    state = init_state()
    batches = Batches()

    manager = jaxckpt.CheckpointManager(arguments.directory, save_interval_steps=arguments.save_every)
    # Leaving it saves the last step, and waits until that is durable.
    with jaxckpt.CheckpointCallback(manager, items={"data": batches}) as callback:
        # Puts `batches` where it was, too.
        resumed = callback.on_start(like=state)
        if resumed is not None:
            step, state = resumed

        while step < arguments.steps and not callback.should_stop:
            state, loss = train_step(state, *next(batches))
            step += 1
            print(json.dumps({"step": step, "loss": float(loss).hex()}), flush=True)
            callback.on_step(step, state, metrics={"loss": float(loss)})


if __name__ == "__main__":
    main()
