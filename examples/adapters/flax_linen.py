"""How does the TrainState of Flax linen become a tree, boxes of partitioned parameters included?

    python examples/adapters/flax_linen.py DIRECTORY
    XLA_FLAGS=--xla_force_host_platform_device_count=8 python examples/adapters/flax_linen.py DIRECTORY

* A `TrainState` is a tree as it is. Its functions (``apply_fn``, ``tx``) are no leaves: those of `like` are in what
  comes back. Whatever else a step changes, statistics and the PRNG key, goes into fields of a subclass.
* `jax.eval_shape` of the function that makes the state gives `like` without memory for it.
* `linen.with_partitioning` and `linen.with_logical_partitioning` put parameters into boxes that hold names of axes,
  and optax copies them. A box is a node, so that its leaf has ``/value`` at the end of its key. The boxes come back
  from `like`. The tree of shardings that linen makes has one sharding in the place of each box, which is what
  ``sharding=`` takes; ``jax.tree.map`` over both would not match.
"""

from __future__ import annotations

import pathlib
import sys
from typing import Any

import jax
import optax
from flax import linen
from flax.training import train_state
from jax.sharding import AxisType

import jaxckpt

INPUTS = jax.random.normal(jax.random.key(1), (32, 8))
TARGETS = INPUTS.sum(axis=1, keepdims=True)
RULES = (("hidden", "model"), ("inputs", None))


class Regressor(linen.Module):
    """A network whose hidden layer has logical axes."""

    @linen.compact
    def __call__(self, inputs: jax.Array, *, is_training: bool) -> jax.Array:
        """The predictions for a batch."""
        columns = linen.with_logical_partitioning(linen.initializers.lecun_normal(), ("inputs", "hidden"))
        hidden = linen.Dense(32, kernel_init=columns, name="hidden")(inputs)
        hidden = linen.BatchNorm(use_running_average=not is_training, name="norm")(hidden)
        hidden = linen.Dropout(0.2, deterministic=not is_training)(linen.relu(hidden))
        return linen.Dense(1, name="head")(hidden)


class State(train_state.TrainState):
    """What a step changes besides the parameters and the optimizer."""

    batch_stats: Any
    key: jax.Array


NETWORK = Regressor()
OPTIMIZER = optax.adam(1e-2)


def make(key: jax.Array) -> State:
    """The state at step 0."""
    init_key, state_key = jax.random.split(key)
    variables = NETWORK.init(init_key, INPUTS, is_training=False)
    return State.create(
        apply_fn=NETWORK.apply,
        params=variables["params"],
        tx=OPTIMIZER,
        batch_stats=variables["batch_stats"],
        key=state_key,
    )


@jax.jit
def train_step(state: State) -> tuple[State, jax.Array]:
    """The next state, and the loss before the update."""
    next_key, key = jax.random.split(state.key)

    def loss_of(params: Any) -> tuple[jax.Array, Any]:
        variables = {"params": params, "batch_stats": state.batch_stats}
        outputs, updated = state.apply_fn(
            variables, INPUTS, is_training=True, mutable=["batch_stats"], rngs={"dropout": key}
        )
        return ((outputs - TARGETS) ** 2).mean(), updated["batch_stats"]

    (loss, batch_stats), gradients = jax.value_and_grad(loss_of, has_aux=True)(state.params)
    return state.apply_gradients(grads=gradients, batch_stats=batch_stats, key=next_key), loss


def main(directory: pathlib.Path) -> None:
    """Trains, saves, restores into a state that was never made, and goes on with both."""
    mesh = jax.make_mesh((jax.device_count(),), ("model",), axis_types=(AxisType.Auto,))
    key = jax.random.key(7)
    like = jax.eval_shape(make, key)
    shardings = linen.logical_to_mesh_sharding(linen.get_partition_spec(like), mesh, RULES)

    state = jax.jit(make, out_shardings=shardings)(key)
    for _ in range(3):
        state, _ = train_step(state)
    jaxckpt.save(directory / "step_3", state, overwrite=True)

    again = jaxckpt.restore(directory / "step_3", like, sharding=shardings)

    for step in range(4, 7):
        state, loss = train_step(state)
        again, loss_again = train_step(again)
        print(f"step {step}: loss {loss.item().hex()}, after the restore {loss_again.item().hex()}")
    jaxckpt.save(directory / "unbroken", state, overwrite=True)
    jaxckpt.save(directory / "restored", again, overwrite=True)
    kernel = again.params["hidden"]["kernel"]
    print(f"hidden/kernel: names {kernel.names}, on the mesh {kernel.value.sharding.spec}")

    # For inference on one device: two of the fields, without optimizer and boxes. No class is needed for that.
    variables = jaxckpt.restore(
        directory / "restored",
        select=["params/*", "batch_stats/*"],
        rename=[(r"(.*)/value", r"\1")],
        sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0]),
    )
    print("predictions:", NETWORK.apply(variables, INPUTS[:2], is_training=False).ravel())

    report = jaxckpt.diff(directory / "unbroken", directory / "restored")
    print(report)
    if not report.same:
        raise SystemExit(1)


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
