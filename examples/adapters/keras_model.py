"""How does a Keras 3 model in a training loop of JAX become a tree, and how is it opened elsewhere?

    python examples/adapters/keras_model.py DIRECTORY

* `Model.get_state_tree` gives the values of all variables as nested dicts of their paths: trainable ones, others (the
  state of each seed generator is one of them), the optimizer's and the metrics'. The optimizer must be built, since its
  variables are only made then. `Model.set_state_tree` assigns the restored ones.
* A loop of one's own calls `stateless_call` and `stateless_apply` with lists of values. They are assigned back before
  the tree is asked for, which copies nothing.
* Keras numbers whatever has no name (layers, optimizers, seed generators) through the whole process. The same code in a
  new process makes the same names; for a second model in one process `keras.utils.clear_session` starts anew.
* `Model.to_json` is the architecture as a string, and fits in as an item. With it, values and model are opened by
  whoever has Keras, and the values alone by whoever has NumPy.
"""

from __future__ import annotations

import os
import pathlib
import sys
from typing import Any

os.environ["KERAS_BACKEND"] = "jax"

# Keras reads the name of its backend, set above, when it is imported.
import jax
import keras
import numpy as np

import jaxckpt

RANDOM = np.random.default_rng(1)
INPUTS = RANDOM.normal(size=(32, 8)).astype(np.float32)
LABELS = RANDOM.integers(4, size=32)

Values = list[jax.Array]


def make_model() -> keras.Model:
    """A network with normalization and dropout, and its optimizer, with their variables made."""
    layers = [
        keras.Input((8,)),
        keras.layers.Dense(16, activation="relu", name="hidden"),
        keras.layers.BatchNormalization(name="norm"),
        keras.layers.Dropout(0.2, seed=7, name="dropout"),
        keras.layers.Dense(4, name="head"),
    ]
    model = keras.Sequential(layers, name="classifier")
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer=keras.optimizers.Adam(1e-2), loss=loss)
    model.optimizer.build(model.trainable_variables)
    return model


class Trainer:
    """Trains a model with a compiled function of its values."""

    def __init__(self, model: keras.Model) -> None:
        self.model = model
        self._step = jax.jit(self._next, donate_argnums=0)

    def _variables(self) -> tuple[list[Any], ...]:
        model = self.model
        return model.trainable_variables, model.non_trainable_variables, model.optimizer.variables

    def _next(self, values: tuple[Values, ...]) -> tuple[tuple[Values, ...], jax.Array]:
        trainable, others, optimizer = values

        def loss_of(trainable: Values) -> tuple[jax.Array, Values]:
            outputs, updated = self.model.stateless_call(trainable, others, INPUTS, training=True)
            return self.model.loss(LABELS, outputs), updated

        (loss, others), gradients = jax.value_and_grad(loss_of, has_aux=True)(trainable)
        trainable, optimizer = self.model.optimizer.stateless_apply(optimizer, gradients, trainable)
        return (trainable, others, optimizer), loss

    def train(self, steps: int) -> list[str]:
        """The losses of so many steps; the variables have the values after them."""
        values = tuple([variable.value for variable in variables] for variables in self._variables())
        losses = []
        for _ in range(steps):
            values, loss = self._step(values)
            losses.append(loss.item().hex())
        for variables, new in zip(self._variables(), values, strict=True):
            for variable, value in zip(variables, new, strict=True):
                variable.assign(value)
        return losses


def main(directory: pathlib.Path) -> None:
    """Trains, saves, restores into another model, and goes on with both."""
    path = directory / "step_3"
    keras.utils.set_random_seed(1)
    model = make_model()
    trainer = Trainer(model)
    trainer.train(3)
    jaxckpt.save(path, model.get_state_tree(), items={"model": model.to_json()}, overwrite=True)

    keras.utils.clear_session()  # names as in a new process
    keras.utils.set_random_seed(2)
    again = make_model()
    again.set_state_tree(jaxckpt.restore(path, again.get_state_tree()))

    losses = zip(trainer.train(3), Trainer(again).train(3), strict=True)
    for step, (loss, loss_again) in enumerate(losses, 4):
        print(f"step {step}: loss {loss}, after the restore {loss_again}")
    jaxckpt.save(directory / "unbroken", model.get_state_tree(), overwrite=True)
    jaxckpt.save(directory / "restored", again.get_state_tree(), overwrite=True)

    # Elsewhere, without this file: the model from its item, the values that inference needs, and one as a NumPy array.
    checkpoint = jaxckpt.open(path)
    opened = keras.models.model_from_json(checkpoint.items["model"])
    opened.set_state_tree(jaxckpt.restore(checkpoint, select=["trainable_variables/*", "non_trainable_*"]))
    print("predictions:", opened(INPUTS[:2]).shape)
    print("hidden/kernel:", checkpoint["trainable_variables/classifier/hidden/kernel"][:, 0].dtype)

    report = jaxckpt.diff(directory / "unbroken", directory / "restored")
    print(report)
    if not report.same:
        raise SystemExit(1)


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
