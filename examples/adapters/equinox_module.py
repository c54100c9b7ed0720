"""How does an Equinox model, which holds functions beside its arrays, become a tree and come back?

    python examples/adapters/equinox_module.py DIRECTORY

* `equinox.partition` splits a model into a tree of its arrays, with None where something else was, and one of the rest.
  The arrays are saved; `equinox.combine` joins the restored ones with the rest. Static fields belong to the structure.
* `equinox.filter_eval_shape` makes the model without memory for it. What it gives in the place of arrays is `like`, and
  the rest (functions, Python numbers) is real.
* The state of `BatchNorm` and other stateful layers is a tree of its own, `equinox.nn.State`. Its leaves have numbers
  in the order of the layers, not their names. Where another such layer came in front of them since, ``rename=``
  says which number is which (``{"state/0": "state/2", "state/1": "state/3"}``): shapes that fit would hide a mistake.
"""

from __future__ import annotations

import pathlib
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import optax

import jaxckpt

INPUTS = jax.random.normal(jax.random.key(1), (32, 8))
TARGETS = INPUTS.sum(axis=1, keepdims=True)
OPTIMIZER = optax.adam(1e-2)


class Regressor(eqx.Module):
    """A network with a function, a number and a static field among its parts."""

    hidden: eqx.nn.Linear
    norm: eqx.nn.BatchNorm
    head: eqx.nn.Linear
    activation: Callable[[jax.Array], jax.Array]
    scale: float
    axis: str = eqx.field(static=True)

    def __init__(self, key: jax.Array) -> None:
        hidden_key, head_key = jax.random.split(key)
        self.axis = "batch"
        self.hidden = eqx.nn.Linear(8, 32, key=hidden_key)
        self.norm = eqx.nn.BatchNorm(32, self.axis, mode="batch")
        self.head = eqx.nn.Linear(32, 1, key=head_key)
        self.activation = jax.jit(jax.nn.relu)
        self.scale = 0.5

    def __call__(self, inputs: jax.Array, state: eqx.nn.State) -> tuple[jax.Array, eqx.nn.State]:
        """The prediction for one example, and the new statistics."""
        hidden, state = self.norm(self.hidden(inputs), state)
        return self.head(self.activation(hidden)) * self.scale, state


class Training(NamedTuple):
    """Everything that a step changes."""

    model: Regressor
    state: eqx.nn.State
    optimizer: Any


def make(key: jax.Array) -> Training:
    """The training at step 0."""
    model, state = eqx.nn.make_with_state(Regressor)(key)
    return Training(model, state, OPTIMIZER.init(eqx.filter(model, eqx.is_array)))


@eqx.filter_jit
def train_step(training: Training) -> tuple[Training, jax.Array]:
    """The next training, and the loss before the update."""

    def loss_of(model: Regressor) -> tuple[jax.Array, eqx.nn.State]:
        batched = jax.vmap(model, axis_name="batch", in_axes=(0, None), out_axes=(0, None))
        outputs, state = batched(INPUTS, training.state)
        return ((outputs - TARGETS) ** 2).mean(), state

    (loss, state), gradients = eqx.filter_value_and_grad(loss_of, has_aux=True)(training.model)
    updates, optimizer = OPTIMIZER.update(gradients, training.optimizer)
    return Training(eqx.apply_updates(training.model, updates), state, optimizer), loss


def is_array(leaf: Any) -> bool:
    """Whether a leaf is an array, or what `eval_shape` gives in the place of one."""
    return isinstance(leaf, jax.Array | jax.ShapeDtypeStruct)


def main(directory: pathlib.Path) -> None:
    """Trains, saves, restores into a model that was never made, and goes on with both."""
    training = make(jax.random.key(7))
    for _ in range(3):
        training, _ = train_step(training)
    jaxckpt.save(directory / "step_3", eqx.filter(training, eqx.is_array), overwrite=True)

    like, rest = eqx.partition(eqx.filter_eval_shape(make, jax.random.key(0)), is_array)
    again = eqx.combine(jaxckpt.restore(directory / "step_3", like), rest)

    for step in range(4, 7):
        training, loss = train_step(training)
        again, loss_again = train_step(again)
        print(f"step {step}: loss {loss.item().hex()}, after the restore {loss_again.item().hex()}")
    jaxckpt.save(directory / "unbroken", eqx.filter(training, eqx.is_array), overwrite=True)
    jaxckpt.save(directory / "restored", eqx.filter(again, eqx.is_array), overwrite=True)

    keys = jaxckpt.open(directory / "step_3").keys()
    print("statistics:", [key for key in keys if key.startswith("state/")])
    report = jaxckpt.diff(directory / "unbroken", directory / "restored")
    print(report)
    if not report.same:
        raise SystemExit(1)


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
