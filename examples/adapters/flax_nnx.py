r"""How does a Flax NNX model become a tree, and come back on a mesh without being made twice?

    python examples/adapters/flax_nnx.py DIRECTORY
    XLA_FLAGS=--xla_force_host_platform_device_count=8 python examples/adapters/flax_nnx.py DIRECTORY

* `nnx.split` takes a model apart: the graph has no arrays and is made by code, the `nnx.State` is the tree to save. It
  holds the parameters, the statistics, the streams of random numbers (typed keys and their counts) and, split together
  with the model, the optimizer. A variable that has two places in the model is in the state once. The model itself is
  a tree, too, but one in which a shared variable comes back as two.
* The key of a variable ends in ``/value``. ``rename=[(r"(.*)/value", r"\1")]`` drops that.
* `nnx.eval_shape` makes the model without memory for it, and knows the shardings: `like` for `jaxckpt.restore`, so that
  each array goes straight to its devices. Another mesh may be set than the one that was saved on.
"""

from __future__ import annotations

import pathlib
import sys

import jax
import optax
from flax import nnx
from jax.sharding import AxisType

import jaxckpt

INPUTS = jax.random.normal(jax.random.key(1), (32, 8))
TARGETS = INPUTS.sum(axis=1, keepdims=True)


class Regressor(nnx.Module):
    """A network whose hidden layer is cut over the axis ``model`` of the mesh."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        columns = nnx.with_partitioning(nnx.initializers.lecun_normal(), (None, "model"))
        self.hidden = nnx.Linear(8, 32, kernel_init=columns, rngs=rngs)
        self.norm = nnx.BatchNorm(32, rngs=rngs)
        self.dropout = nnx.Dropout(0.2, rngs=rngs)
        self.head = nnx.Linear(32, 1, rngs=rngs)

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """The predictions for a batch."""
        return self.head(self.dropout(nnx.relu(self.norm(self.hidden(inputs)))))


def make() -> dict[str, nnx.Module]:
    """The model and its optimizer at step 0; the names lead the keys of their leaves."""
    model = Regressor(nnx.Rngs(7))
    return {"model": model, "optimizer": nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)}


@nnx.jit
def train_step(training: dict[str, nnx.Module]) -> jax.Array:
    """Updates the model and the optimizer in place, and gives the loss before the update."""

    def loss_of(model: Regressor) -> jax.Array:
        return ((model(INPUTS) - TARGETS) ** 2).mean()

    loss, gradients = nnx.value_and_grad(loss_of)(training["model"])
    training["optimizer"].update(training["model"], gradients)
    return loss


def main(directory: pathlib.Path) -> None:
    """Trains, saves, restores into a model that was never made, and goes on with both."""
    devices = jax.device_count()
    mesh = jax.make_mesh((devices,), ("model",), axis_types=(AxisType.Auto,))
    with jax.set_mesh(mesh):
        training = nnx.jit(make)()
        for _ in range(3):
            train_step(training)
        jaxckpt.save(directory / "step_3", nnx.state(training), overwrite=True)

        graph, like = nnx.split(nnx.eval_shape(make))  # like: shapes, dtypes, shardings
        again = nnx.merge(graph, jaxckpt.restore(directory / "step_3", like))

        for step in range(4, 7):
            losses = [train_step(each).item().hex() for each in (training, again)]
            print(f"step {step}: loss {losses[0]}, after the restore {losses[1]}")
        jaxckpt.save(directory / "unbroken", nnx.state(training), overwrite=True)
        jaxckpt.save(directory / "restored", nnx.state(again), overwrite=True)
    kernel = again["model"].hidden.kernel
    print(f"on {devices} devices, hidden/kernel has {kernel.sharding.spec}")

    # The parameters alone, by their plain names, wherever this runs: what a server or a laptop reads.
    params = jaxckpt.restore(
        directory / "step_3", select="model/*/kernel/*", rename=[(r"model/(.*)/value", r"\1")]
    )
    print("kernels alone:", {name: layer["kernel"].shape for name, layer in params.items()})

    report = jaxckpt.diff(directory / "unbroken", directory / "restored")
    print(report)
    if not report.same:
        raise SystemExit(1)


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
