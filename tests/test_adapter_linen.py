"""Flax linen: whole training states come back, with boxes, scanned layers, frozen dicts and functions in them."""

from __future__ import annotations

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import PartitionSpec as P

import jaxckpt

from .helpers import assert_goes_on_equally, assert_same_tree, assert_same_weak_types, make_mesh, run_adapter

linen: Any = pytest.importorskip("flax.linen")
flax: Any = pytest.importorskip("flax")
dynamic_scale: Any = pytest.importorskip("flax.training.dynamic_scale")
train_state: Any = pytest.importorskip("flax.training.train_state")


class Layer(linen.Module):
    """A layer whose parameters are in boxes of two kinds."""

    @linen.compact
    def __call__(self, x: Any, _: Any) -> Any:
        rows = linen.with_partitioning(linen.initializers.lecun_normal(), ("model", None))
        columns = linen.with_logical_partitioning(linen.initializers.lecun_normal(), ("width", "hidden"))
        x = linen.relu(linen.Dense(8, kernel_init=columns, name="up", param_dtype=jnp.bfloat16)(x))
        return linen.Dense(4, kernel_init=rows, use_bias=False, name="down")(x), None


class Stack(linen.Module):
    """Three layers that are one with a leading axis, rematerialized."""

    @linen.compact
    def __call__(self, x: Any) -> Any:
        layers = linen.scan(
            linen.remat(Layer),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=3,
            metadata_params={linen.PARTITION_NAME: "layers"},
        )
        return layers(name="layers")(x, None)[0]


class State(train_state.TrainState):
    """Everything that can be beside the parameters."""

    key: jax.Array
    scale: Any
    average: Any
    frozen: Any
    nothing: Any = None
    note: str = flax.struct.field(pytree_node=False, default="kept in the class")


STACK = Stack()
OPTIMIZER = optax.MultiSteps(optax.masked(optax.adam(1e-2), lambda params: jax.tree.map(jnp.ndim, params)), 2)
X = jnp.linspace(-1, 1, 8).reshape(2, 4)


def make(key: jax.Array) -> State:
    params = STACK.init(key, X)["params"]
    return State.create(
        apply_fn=STACK.apply,
        params=params,
        tx=OPTIMIZER.gradient_transformation(),
        key=jax.random.split(key, 3),
        scale=dynamic_scale.DynamicScale(),
        average=linen.unbox(params),
        frozen=flax.core.freeze({"a": {"b/c": jnp.ones(2)}}),
    )


@jax.jit
def train_step(state: State) -> State:
    gradients_of = state.scale.value_and_grad(lambda params: (STACK.apply({"params": params}, X) ** 2).mean())
    scale, _, _, gradients = gradients_of(state.params)
    return state.apply_gradients(grads=gradients, scale=scale)


@pytest.mark.slow
def test_the_example(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_adapter("flax_linen", tmp_path)
    printed = capsys.readouterr().out
    assert_goes_on_equally(printed, 3)
    assert "names ('inputs', 'hidden'), on the mesh P(None, 'model')" in printed


@pytest.mark.slow
def test_a_training_state_with_everything_comes_back_from_an_abstract_one(path: pathlib.Path) -> None:
    state = make(jax.random.key(0))
    for _ in range(3):
        state = train_step(state)
    jaxckpt.save(path, state)
    like = jax.eval_shape(make, jax.random.key(0))
    restored = jaxckpt.restore(path, like)
    assert jax.tree.structure(restored) == jax.tree.structure(like)
    assert_same_tree(jax.tree.leaves(restored), jax.tree.leaves(state))
    assert_same_weak_types(restored, state)
    assert (restored.note, restored.nothing) == ("kept in the class", None)
    assert type(restored.frozen) is flax.core.FrozenDict
    assert restored.params["layers"]["up"]["kernel"].names == ("layers", "width", "hidden")
    assert_same_tree(jax.tree.leaves(train_step(restored)), jax.tree.leaves(train_step(state)))


def test_the_shardings_that_linen_makes_have_a_place_for_each_box(path: pathlib.Path) -> None:
    like = jax.eval_shape(make, jax.random.key(0))
    rules = (("hidden", "model"), ("model", "model"))
    mesh = make_mesh({"data": 2, "model": 4})
    shardings = linen.logical_to_mesh_sharding(linen.get_partition_spec(like), mesh, rules)
    state = jax.jit(make, out_shardings=shardings)(jax.random.key(0))
    jaxckpt.save(path, state)

    smaller = make_mesh({"model": 2}, first_device=8)
    shardings = linen.logical_to_mesh_sharding(linen.get_partition_spec(like), smaller, rules)
    for restored in (
        jaxckpt.restore(path, like, sharding=shardings),
        jaxckpt.restore(path, like, mesh=smaller),
    ):
        assert_same_tree(jax.tree.leaves(restored), jax.tree.leaves(state))
        up = restored.opt_state.inner_opt_state.inner_state[0].mu["layers"]["up"]["kernel"].value
        assert up.sharding.is_equivalent_to(jax.sharding.NamedSharding(smaller, P(None, None, "model")), 3)
        down = restored.params["layers"]["down"]["kernel"].value
        assert down.sharding.is_equivalent_to(jax.sharding.NamedSharding(smaller, P(None, "model", None)), 3)


def test_boxes_are_taken_off_and_put_on_by_new_names(tmp_path: pathlib.Path) -> None:
    params = make(jax.random.key(0)).params
    jaxckpt.save(tmp_path / "boxed", params)
    jaxckpt.save(tmp_path / "plain", linen.unbox(params))
    off = [(r"(.*)/value", r"\1")]
    on = [(r"(.*/kernel)", r"\1/value")]
    assert_same_tree(jaxckpt.restore(tmp_path / "boxed", rename=off), linen.unbox(params))
    assert_same_tree(jaxckpt.restore(tmp_path / "plain", params, rename=on), params)


def test_frozen_and_plain_dicts_have_the_same_keys(tmp_path: pathlib.Path) -> None:
    plain = {"layer": {"b": jnp.ones(2), "a": jnp.zeros(1)}}
    frozen = flax.core.freeze(plain)
    jaxckpt.save(tmp_path / "plain", plain)
    jaxckpt.save(tmp_path / "frozen", frozen)
    assert_same_tree(jaxckpt.restore(tmp_path / "plain", frozen), frozen)
    assert_same_tree(jaxckpt.restore(tmp_path / "frozen", plain), plain)
    assert_same_tree(jaxckpt.restore(tmp_path / "frozen"), plain)


def test_the_parameters_alone_are_selected_and_nothing_else_is_read(path: pathlib.Path) -> None:
    state = make(jax.random.key(0))
    jaxckpt.save(path, state)
    like = jax.eval_shape(make, jax.random.key(0)).params
    params, report = jaxckpt.restore(path, like, select="params/*", rename={"params/": "/"}, report=True)
    assert_same_tree(params, state.params)
    assert report.nbytes == sum(leaf.nbytes for leaf in jax.tree.leaves(state.params))
