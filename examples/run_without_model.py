"""Stores functions beside the values, and runs them in a process that has no code of the model.

    python examples/run_without_model.py              # both of what follows, in a temporary directory
    python examples/run_without_model.py save DIR     # trains a small network, saves it with two programs
    python examples/run_without_model.py load DIR     # a process without optax and without the model goes on

This is what TensorFlow's `import_meta_graph` was for: `load` knows a path and the names ``predict``, ``train_step`` and
``hidden``, and nothing else. The losses of both processes are those of one run that nothing interrupted.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

import jaxckpt

STEPS = 5

Tree = Any


def batch(step: int) -> tuple[np.ndarray, np.ndarray]:
    """Points of the plane, and whether they are inside of a circle."""
    points = np.random.default_rng(step).normal(size=(64, 2)).astype(np.float32)
    return points, (np.linalg.norm(points, axis=1) < 1).astype(np.float32)


def save(directory: str) -> None:
    """Trains, and saves the state with the functions that make predictions and go on training."""
    import optax

    optimizer = optax.adam(1e-2)

    def predict(state: Tree, x: jax.Array) -> jax.Array:
        hidden = checkpoint_name(jnp.tanh(x @ state["params"]["w1"] + state["params"]["b1"]), "hidden")
        return hidden @ state["params"]["w2"]

    def loss_of(params: Tree, x: jax.Array, y: jax.Array) -> jax.Array:
        return optax.sigmoid_binary_cross_entropy(predict({"params": params}, x), y).mean()

    def train_step(state: Tree, x: jax.Array, y: jax.Array) -> tuple[Tree, jax.Array]:
        loss, gradients = jax.value_and_grad(loss_of)(state["params"], x, y)
        updates, optimizer_state = optimizer.update(gradients, state["optimizer"])
        params = optax.apply_updates(state["params"], updates)
        return {"params": params, "optimizer": optimizer_state}, loss

    first, second = jax.random.split(jax.random.key(0))
    params = {
        "w1": jax.random.normal(first, (2, 32)),
        "b1": jnp.zeros(32),
        "w2": jax.random.normal(second, (32,)) / 32,
    }
    state = {"params": params, "optimizer": optimizer.init(params)}

    (size,) = jax.export.symbolic_shape("batch")
    points = jax.ShapeDtypeStruct((size, 2), jnp.float32)
    labels = jax.ShapeDtypeStruct((size,), jnp.float32)
    programs = {
        "predict": jaxckpt.Program(predict, (points,)),
        "train_step": jaxckpt.Program(train_step, (points, labels)),
    }
    step_on_device = jax.jit(train_step)
    for step in range(2 * STEPS):
        if step == STEPS:  # what follows is what the other process must find
            jaxckpt.save(directory, state, programs=programs, metadata={"step": step}, overwrite=True)
        state, loss = step_on_device(state, *batch(step))
        print(f"save: step {step} loss {float(loss).hex()}")


def load(directory: str) -> None:
    """Goes on where `save` saved."""
    checkpoint = jaxckpt.open(directory)
    predict = checkpoint.program("predict", trust=True)
    print(f"load: {predict}")
    scores, hidden = predict.fetch(["output", "hidden"], batch(0)[0][:3])
    print(f"load: three scores {np.asarray(scores)}, {hidden.shape[1]} hidden values each")

    train_step = checkpoint.program("train_step", trust=True, bind=False)
    state = jaxckpt.restore(checkpoint)
    first = checkpoint.metadata["step"]
    for step in range(first, first + STEPS):
        state, loss = train_step(state, *batch(step))
        print(f"load: step {step} loss {float(loss).hex()}")
    assert "optax" not in sys.modules


def main() -> None:
    """Does what the command line says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", nargs="?", choices=("save", "load"))
    parser.add_argument("directory", nargs="?")
    arguments = parser.parse_args()
    if arguments.what is not None:
        if arguments.directory is None:
            parser.error("DIR is missing")
        {"save": save, "load": load}[arguments.what](arguments.directory)
        return
    with tempfile.TemporaryDirectory() as directory:
        for what in ("save", "load"):
            subprocess.run([sys.executable, __file__, what, f"{directory}/circle"], check=True)


if __name__ == "__main__":
    main()
