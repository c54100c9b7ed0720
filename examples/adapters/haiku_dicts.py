"""How are the parameters of Haiku, dicts whose names hold slashes and tildes, saved and found again?

    python examples/adapters/haiku_dicts.py DIRECTORY

Haiku itself is not needed: ``hk.transform(...).init`` gives ``{module: {parameter: array}}`` and no more, and the state
of ``hk.transform_with_state`` is the same. The module's name is its whole path, such as ``mlp/~/linear_0``.

* With and without `like` the dicts come back with just these names.
* In the key of a leaf, ``/`` separates the dicts. Inside of a name it is ``~1`` and a ``~`` is ``~0``, so that no two
  leaves share a key: ``params/mlp~1~0~1linear_0/w``. A key that nobody wants to type is found by a pattern.
* The key of a module is a rule for ``rename=``, too, whatever the next code calls that module.
"""

from __future__ import annotations

import pathlib
import sys
from typing import Any

import jax
import jax.numpy as jnp

import jaxckpt

INPUTS = jax.random.normal(jax.random.key(1), (32, 8))
TARGETS = INPUTS.sum(axis=1, keepdims=True)

Dicts = dict[str, dict[str, Any]]


def init_state(key: jax.Array) -> dict[str, Dicts]:
    """What ``hk.nets.MLP([16, 1])`` has, and a counter such as Haiku's moving averages have."""
    first, second = jax.random.split(key)
    params = {
        "mlp/~/linear_0": {"w": jax.random.normal(first, (8, 16)) / 3, "b": jnp.zeros(16)},
        "mlp/~/linear_1": {"w": jax.random.normal(second, (16, 1)) / 4, "b": jnp.zeros(1)},
    }
    return {"params": params, "state": {"mlp/~/average": {"counter": jnp.zeros((), jnp.int32)}}}


def apply(params: Dicts, inputs: jax.Array) -> jax.Array:
    """The predictions for a batch."""
    first, second = params["mlp/~/linear_0"], params["mlp/~/linear_1"]
    return jax.nn.relu(inputs @ first["w"] + first["b"]) @ second["w"] + second["b"]


@jax.jit
def train_step(tree: dict[str, Dicts]) -> tuple[dict[str, Dicts], jax.Array]:
    """The next tree, and the loss before the update."""
    loss, gradients = jax.value_and_grad(lambda params: ((apply(params, INPUTS) - TARGETS) ** 2).mean())(
        tree["params"]
    )
    params = jax.tree.map(lambda param, gradient: param - 0.01 * gradient, tree["params"], gradients)
    return {"params": params, "state": jax.tree.map(lambda count: count + 1, tree["state"])}, loss


def main(directory: pathlib.Path) -> None:
    """Trains, saves, restores without `like`, and goes on with both."""
    path = directory / "step_3"
    tree = init_state(jax.random.key(7))
    for _ in range(3):
        tree, _ = train_step(tree)
    jaxckpt.save(path, tree, overwrite=True)

    again = jaxckpt.restore(path)
    print("modules:", list(again["params"]))
    for step in range(4, 7):
        tree, loss = train_step(tree)
        again, loss_again = train_step(again)
        print(f"step {step}: loss {loss.item().hex()}, after the restore {loss_again.item().hex()}")
    jaxckpt.save(directory / "unbroken", tree, overwrite=True)
    jaxckpt.save(directory / "restored", again, overwrite=True)

    checkpoint = jaxckpt.open(path)
    print("keys:", *checkpoint.keys(), sep="\n  ")
    print("one leaf as a NumPy array:", checkpoint["params/mlp~1~0~1linear_1/w"][:2].tolist())
    last = jaxckpt.restore(path, select="params/*linear_1/*")
    print("selected by a pattern:", jax.tree.map(jnp.shape, last))
    head = jaxckpt.restore(
        path, select="params/*linear_1/*", rename={"params/mlp~1~0~1linear_1": "params/head"}
    )
    print("renamed:", jax.tree.map(jnp.shape, head))

    report = jaxckpt.diff(directory / "unbroken", directory / "restored")
    print(report)
    if not report.same:
        raise SystemExit(1)


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
