"""A training loop in Flax NNX that saves while it trains, stops cleanly on SIGTERM, and resumes by itself.

    python examples/loop_nnx.py DIRECTORY              # 40 steps, a checkpoint every 5
    python examples/loop_nnx.py DIRECTORY --steps 80   # goes on from the newest checkpoint

Kill it when you like and start it again: the losses are those of a run that nothing interrupted, bit for bit.
What jaxckpt adds to an ordinary loop is all in `main`. `nnx.state((model, optimizer))` is the tree that it saves: the
parameters, the statistics of the normalization, the streams of random numbers for dropout, and the optimizer.
`nnx.update` puts a restored one back.
"""

from __future__ import annotations

import argparse
import functools
import json

import jax
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits

import jaxckpt

SEED = 7
BATCH = 64
WIDTH = 128


class Classifier(nnx.Module):
    """A network with one hidden layer, batch normalization and dropout."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.hidden = nnx.Linear(64, WIDTH, rngs=rngs)
        self.norm = nnx.BatchNorm(WIDTH, rngs=rngs)
        self.dropout = nnx.Dropout(0.2, rngs=rngs)
        self.head = nnx.Linear(WIDTH, 10, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """The scores of the ten digits."""
        return self.head(self.dropout(nnx.relu(self.norm(self.hidden(images)))))


@functools.partial(nnx.jit, donate_argnames=("model", "optimizer"))
def train_step(
    model: Classifier, optimizer: nnx.Optimizer, images: jax.Array, labels: jax.Array
) -> jax.Array:
    """Updates the model and the optimizer in place, and gives the loss before the update."""

    def loss_of(model: Classifier) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(model(images), labels).mean()

    loss, gradients = nnx.value_and_grad(loss_of)(model)
    optimizer.update(model, gradients)
    return loss


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
    model = Classifier(nnx.Rngs(SEED))
    optimizer = nnx.Optimizer(model, optax.adam(3e-3), wrt=nnx.Param)
    digits = Digits()

    manager = jaxckpt.CheckpointManager(arguments.directory, save_interval_steps=arguments.save_every)
    # Leaving it saves the last step, and waits until that is durable.
    with jaxckpt.CheckpointCallback(manager) as callback:
        resumed = callback.on_start(like=nnx.state((model, optimizer)))
        if resumed is not None:
            step, state = resumed
            nnx.update((model, optimizer), state)

        while step < arguments.steps and not callback.should_stop:
            loss = train_step(model, optimizer, *digits.batch(step))
            step += 1
            print(json.dumps({"step": step, "loss": float(loss).hex()}), flush=True)
            callback.on_step(step, nnx.state((model, optimizer)))


if __name__ == "__main__":
    main()
