"""Keras 3 on JAX: `fit` saves while it trains, stops cleanly on SIGTERM, and resumes in the middle of an epoch.

    python examples/loop_keras.py DIRECTORY              # 40 steps, a checkpoint every 5
    python examples/loop_keras.py DIRECTORY --steps 80   # goes on from the newest checkpoint

Kill it when you like and start it again: the losses are those of a run that nothing interrupted, bit for bit.
`JaxckptCallback` fits any model. What it saves is `model.get_state_tree()`: the trainable variables, the others (the
state of each dropout's seed generator is one of them), the optimizer, and the metrics, so that even the running mean of
the loss, which is what Keras reports, goes on as it was.

`fit` can begin at any epoch, but not inside one. This whole run is therefore one epoch, and the data know their batches
by the step of the run.
"""

from __future__ import annotations

import argparse
import json
import os
from typing import Any

os.environ["KERAS_BACKEND"] = "jax"

# Keras reads the name of its backend, set above, when it is imported.
import keras
import numpy as np
from sklearn.datasets import load_digits

import jaxckpt

SEED = 7
BATCH = 64
WIDTH = 128


class JaxckptCallback(keras.callbacks.Callback):
    """Brings a `jaxckpt.CheckpointCallback` to `fit`. A run is one epoch, from `first_step` to ``last_step``."""

    def __init__(self, manager: jaxckpt.CheckpointManager, last_step: int) -> None:
        super().__init__()
        self.first_step = 0
        self._last_step = last_step
        self._checkpoints = jaxckpt.CheckpointCallback(manager)
        self._metrics: dict[str, Any] = {}

    def on_train_begin(self, _logs: dict[str, Any] | None = None) -> None:
        """Continues from the newest checkpoint. `fit` has built all variables before it calls this."""
        resumed = self._checkpoints.on_start(like=self.model.get_state_tree())
        if resumed is not None:
            self.first_step, state = resumed
            self.model.set_state_tree(state)
            self._metrics = state["metrics_variables"]

    def on_epoch_begin(self, _epoch: int, _logs: dict[str, Any] | None = None) -> None:
        """Gives the metrics, which `fit` has just reset, their saved values back."""
        self.model.set_state_tree({"metrics_variables": self._metrics})
        self._metrics = {}

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Saves when a save is due."""
        step = self.first_step + batch + 1
        print(json.dumps({"step": step, "loss": logs["loss"].hex()}), flush=True)
        # Inside an epoch the values are in the hands of `fit`; reading `self.model` puts them back into the variables
        # (it calls `jax_state_sync`). The next step donates them: the save has its own copy by then.
        self._checkpoints.on_step(step, self.model.get_state_tree())
        if step >= self._last_step or self._checkpoints.should_stop:
            self.model.stop_training = True

    def on_train_end(self, _logs: dict[str, Any] | None = None) -> None:
        """Saves the last step, and waits for the save."""
        self._checkpoints.on_end()


class Digits(keras.utils.PyDataset):
    """Scikit-learn's handwritten digits as an endless row of batches; each depends on the step of the run alone."""

    def __init__(self, callback: JaxckptCallback) -> None:
        super().__init__()
        images, labels = load_digits(return_X_y=True)
        self._images = (images / 16).astype(np.float32)
        self._labels = labels.astype(np.int32)
        self._callback = callback

    @property
    def num_batches(self) -> None:
        """How Keras asks for the length: there is none."""
        return

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        step = self._callback.first_step + index
        rows = np.random.default_rng([SEED, step]).integers(len(self._labels), size=BATCH)
        return self._images[rows], self._labels[rows]


def make_model() -> keras.Model:
    """A network with one hidden layer, batch normalization and dropout."""
    keras.utils.set_random_seed(SEED)
    layers = [
        keras.Input((64,)),
        keras.layers.Dense(WIDTH, activation="relu", name="hidden"),
        keras.layers.BatchNormalization(name="norm"),
        keras.layers.Dropout(0.2, name="dropout"),
        keras.layers.Dense(10, name="head"),
    ]
    model = keras.Sequential(layers, name="classifier")
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer=keras.optimizers.Adam(3e-3), loss=loss, metrics=["accuracy"])
    return model


def main() -> None:
    """Trains from the newest checkpoint, or from the start, to the last step or to SIGTERM."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--save-every", type=int, default=5)
    arguments = parser.parse_args()

    model = make_model()
    with jaxckpt.CheckpointManager(arguments.directory, save_interval_steps=arguments.save_every) as manager:
        if (manager.latest_step() or 0) < arguments.steps:
            callback = JaxckptCallback(manager, arguments.steps)
            batches = Digits(callback)
            # More steps than are left: where the run begins is known when `fit` has begun, and the callback ends it.
            model.fit(
                batches, steps_per_epoch=arguments.steps, shuffle=False, callbacks=[callback], verbose=0
            )


if __name__ == "__main__":
    main()
