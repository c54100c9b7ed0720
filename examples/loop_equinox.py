"""A training loop in Equinox that saves while it trains, stops cleanly on SIGTERM, and resumes by itself.

    python examples/loop_equinox.py DIRECTORY              # 40 steps, a checkpoint every 5
    python examples/loop_equinox.py DIRECTORY --steps 80   # goes on from the newest checkpoint

Kill it when you like and start it again: the losses are those of a run that nothing interrupted, bit for bit.
What jaxckpt adds to an ordinary loop is all in `main`. An Equinox model is a pytree that holds functions beside its
arrays: `eqx.partition` takes them apart, the arrays are saved, and `eqx.combine` joins the restored ones with the rest.
"""

from __future__ import annotations

import argparse
import json
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import jaxckpt

SEED = 7
BATCH = 64
WIDTH = 128
OPTIMIZER = optax.adam(3e-3)


class State(NamedTuple):
    """Everything that a step changes."""

    model: eqx.nn.Sequential
    optimizer: Any
    key: jax.Array


def init_state() -> State:
    """The whole state of the training at step 0: a network with one hidden layer and dropout."""
    state_key, key_1, key_2 = jax.random.split(jax.random.key(SEED), 3)
    layers = [
        eqx.nn.Linear(64, WIDTH, key=key_1),
        eqx.nn.Lambda(jax.nn.relu),
        eqx.nn.Dropout(0.2),
        eqx.nn.Linear(WIDTH, 10, key=key_2),
    ]
    model = eqx.nn.Sequential(layers)
    return State(model, OPTIMIZER.init(eqx.filter(model, eqx.is_array)), state_key)


@eqx.filter_jit(donate="all-except-first")
def train_step(batch: tuple[np.ndarray, np.ndarray], state: State) -> tuple[State, jax.Array]:
    """The next state, in the memory of the old one, and the loss before the update."""
    images, labels = batch
    next_key, key = jax.random.split(state.key)

    def loss_of(model: eqx.nn.Sequential) -> jax.Array:
        logits = jax.vmap(model)(jnp.asarray(images), key=jax.random.split(key, BATCH))
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    loss, gradients = eqx.filter_value_and_grad(loss_of)(state.model)
    updates, optimizer = OPTIMIZER.update(gradients, state.optimizer)
    return State(eqx.apply_updates(state.model, updates), optimizer, next_key), loss


class Digits:
    """Scikit-learn's handwritten digits."""

    def __init__(self) -> None:
        images, labels = load_digits(return_X_y=True)
        self._images = (images / 16).astype(np.float32)
        self._labels = labels.astype(np.int32)

    def batch(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """The batch of a step. It depends on the step alone, so that the data have no state to save."""
        rows = np.random.default_rng([SEED, step]).integers(len(self._labels), size=BATCH)
        return self._images[rows], self._labels[rows]


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
    digits = Digits()

    manager = jaxckpt.CheckpointManager(arguments.directory, save_interval_steps=arguments.save_every)
    # Leaving it saves the last step, and waits until that is durable.
    with jaxckpt.CheckpointCallback(manager) as callback:
        arrays, rest = eqx.partition(state, eqx.is_array)
        resumed = callback.on_start(like=arrays)
        if resumed is not None:
            step, arrays = resumed
            state = eqx.combine(arrays, rest)

        while step < arguments.steps and not callback.should_stop:
            state, loss = train_step(digits.batch(step), state)
            step += 1
            print(json.dumps({"step": step, "loss": float(loss).hex()}), flush=True)
            callback.on_step(step, eqx.filter(state, eqx.is_array))


if __name__ == "__main__":
    main()
