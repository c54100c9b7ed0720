"""How does the state of an Optax optimizer come back, and what if the optimizer has changed since?

    python examples/adapters/optax_states.py DIRECTORY

* A state is a tree of named tuples. With `like`, which ``jax.eval_shape(optimizer.init, params)`` gives without memory
  for it, they are Optax's. Without it they are plain ones with the same fields: good to read, and for many optimizers
  to go on with, but not where Optax asks for its own class (the `MaskedNode` s of `masked` and `multi_transform`).
* `inject_hyperparams` has the learning rate in the state, so that it comes back from the checkpoint whatever the code
  says. A leaf that is not selected keeps the value of `like`: that is how the code's wins.
* `chain` numbers its parts. One more in front shifts the others, and `rename` says where they are. Without it
  ``missing="keep"`` and ``unexpected="ignore"`` would start Adam anew without an error; the report shows that.
"""

from __future__ import annotations

import pathlib
import sys
from typing import Any

import jax
import jax.numpy as jnp
import optax

import jaxckpt

INPUTS = jax.random.normal(jax.random.key(1), (32, 8))
TARGETS = INPUTS.sum(axis=1, keepdims=True)
# Weight decay for the kernel alone: the bias has a MaskedNode in the state.
DECAYED = {"kernel": True, "bias": False}

Tree = Any


def make_optimizer(learning_rate: float) -> optax.GradientTransformation:
    """Adam with a learning rate that is in its state."""
    adam = optax.inject_hyperparams(optax.adam)(learning_rate=learning_rate)
    return optax.chain(adam, optax.masked(optax.trace(0.9), DECAYED))


def init_params() -> Tree:
    """A linear model at step 0."""
    return {"kernel": jnp.zeros((8, 1)), "bias": jnp.zeros(1)}


def train(optimizer: optax.GradientTransformation, state: Tree, steps: int) -> tuple[Tree, str]:
    """The state after so many steps, and the last loss."""

    @jax.jit
    def step(state: Tree) -> tuple[Tree, jax.Array]:
        def loss_of(params: Tree) -> jax.Array:
            return ((INPUTS @ params["kernel"] + params["bias"] - TARGETS) ** 2).mean()

        loss, gradients = jax.value_and_grad(loss_of)(state["params"])
        updates, opt_state = optimizer.update(gradients, state["opt_state"], state["params"])
        return {"params": optax.apply_updates(state["params"], updates), "opt_state": opt_state}, loss

    for _ in range(steps):
        state, loss = step(state)
    return state, loss.item().hex()


def main(directory: pathlib.Path) -> None:
    """Trains, saves, and restores into the same optimizer, one of another learning rate, and a longer chain."""
    path = directory / "step_3"
    optimizer = make_optimizer(0.1)
    params = init_params()
    state, _ = train(optimizer, {"params": params, "opt_state": optimizer.init(params)}, 3)
    jaxckpt.save(path, state, overwrite=True)

    # The same optimizer. Nothing is allocated for `like`.
    like = {"params": params, "opt_state": jax.eval_shape(optimizer.init, params)}
    unbroken, loss = train(optimizer, state, 3)
    restored, loss_again = train(optimizer, jaxckpt.restore(path, like), 3)
    print(f"step 6: loss {loss}, after the restore {loss_again}")

    # Without `like`: the fields are there.
    adam = jaxckpt.restore(path)["opt_state"][0]
    print("fields:", adam._fields, "learning rate:", adam.hyperparams["learning_rate"])

    # Another learning rate: that of the code, and all else of the checkpoint.
    slower = make_optimizer(0.01)
    like = {"params": params, "opt_state": slower.init(params)}
    kept = "opt_state/0/hyperparams/learning_rate"
    changed = jaxckpt.restore(path, like, select=lambda key: key != kept)
    print("learning rate of the code:", changed["opt_state"][0].hyperparams["learning_rate"])

    # A longer chain: what was at 0 and 1 is at 1/0 and 1/1, and the new part starts as it was made.
    longer = optax.chain(optax.ema(0.5), optimizer)
    like = {"params": params, "opt_state": longer.init(params)}
    _, report = jaxckpt.restore(
        path, like, rename={"opt_state/": "opt_state/1/"}, missing="keep", report=True
    )
    print("of the longer chain, not from the checkpoint:", report.kept)

    jaxckpt.save(directory / "unbroken", unbroken, overwrite=True)
    jaxckpt.save(directory / "restored", restored, overwrite=True)
    report = jaxckpt.diff(directory / "unbroken", directory / "restored")
    print(report)
    if not report.same:
        raise SystemExit(1)


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
