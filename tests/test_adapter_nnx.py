"""Flax NNX: models and their optimizers come back with all kinds of variables, from abstract ones, on other meshes."""

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

nnx: Any = pytest.importorskip("flax.nnx")


class Scale(nnx.Variable):
    """A kind of variable that Flax does not know."""


class Block(nnx.Module):
    """A layer of a stack."""

    def __init__(self, rngs: Any) -> None:
        self.dense = nnx.Linear(8, 8, param_dtype=jnp.bfloat16, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return x + self.dropout(self.dense(x))


class Language(nnx.Module):
    """A tied embedding, a stack that is one module with a leading axis, low-rank adapters and statistics."""

    def __init__(self, rngs: Any) -> None:
        self.embed = nnx.Embed(16, 8, rngs=rngs)
        self.blocks = nnx.split_rngs(splits=3)(nnx.vmap(Block))(rngs)
        self.adapted = nnx.LoRA(8, 2, 8, base_module=nnx.Linear(8, 8, rngs=rngs), rngs=rngs)
        self.norms = nnx.List([nnx.BatchNorm(8, rngs=rngs), nnx.BatchNorm(8, use_bias=False, rngs=rngs)])
        self.output = self.embed
        self.scale = Scale(jnp.asarray(0.5), note="kept in the graph")
        self.table = nnx.Variable(jnp.arange(3))

    def __call__(self, tokens: Any) -> Any:
        x = self.embed(tokens)
        x = nnx.scan(lambda x, block: block(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.blocks)
        for norm in self.norms:
            x = norm(self.adapted(x))
        return self.output.attend(x) * self.scale


def make() -> dict[str, Any]:
    model = Language(nnx.Rngs(0, dropout=1))
    optimizer = nnx.Optimizer(model, optax.MultiSteps(optax.adamw(1e-2), 2), wrt=nnx.LoRAParam)
    return {"model": model, "optimizer": optimizer}


@nnx.jit
def train_step(training: dict[str, Any]) -> Any:
    model = training["model"]
    tokens = jnp.arange(12).reshape(3, 4)

    def loss_of(model: Any) -> Any:
        return model(tokens).var()

    loss, gradients = nnx.value_and_grad(loss_of, argnums=nnx.DiffState(0, nnx.LoRAParam))(model)
    training["optimizer"].update(model, gradients)
    return loss


@pytest.mark.slow
def test_the_example(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_adapter("flax_nnx", tmp_path)
    printed = capsys.readouterr().out
    assert_goes_on_equally(printed, 3)
    assert "hidden/kernel has P(None, 'model')" in printed


@pytest.mark.slow
def test_variables_of_all_kinds_come_back_into_a_model_that_was_never_made(path: pathlib.Path) -> None:
    training = make()
    for _ in range(3):
        train_step(training)
    state = nnx.state(training)
    jaxckpt.save(path, state)

    graph, like = nnx.split(nnx.eval_shape(make))
    restored = jaxckpt.restore(path, like)
    assert type(restored) is nnx.State
    assert_same_tree(jax.tree.leaves(restored), jax.tree.leaves(state))
    assert_same_weak_types(restored, state)
    again = nnx.merge(graph, restored)
    assert again["model"].output is again["model"].embed
    assert [train_step(again) for _ in range(3)] == [train_step(training) for _ in range(3)]
    assert_same_tree(jax.tree.leaves(nnx.state(again)), jax.tree.leaves(nnx.state(training)))


def test_what_the_keys_are(path: pathlib.Path) -> None:
    """A tied layer is saved once, a stack of layers as one, and only what the optimizer trains has moments."""
    jaxckpt.save(path, nnx.state(make()))
    checkpoint = jaxckpt.open(path)
    keys = checkpoint.keys()
    assert [key for key in keys if key.startswith("model/") and "embedding" in key] == [
        "model/embed/embedding/value"
    ]
    assert checkpoint["model/blocks/dense/kernel/value"].shape == (3, 8, 8)
    assert str(checkpoint["model/blocks/dense/kernel/value"].dtype) == "bfloat16"
    assert [key for key in keys if "/mu/" in key] == [
        f"optimizer/opt_state/inner_opt_state/0/mu/adapted/{name}/value" for name in ("lora_a", "lora_b")
    ]
    assert "model/norms/0/bias/value" in keys
    assert "model/norms/1/bias/value" not in keys


@pytest.mark.parametrize("way", ["eval_shape", "get_abstract_model"])
def test_arrays_go_to_the_shardings_that_the_abstract_model_has_on_another_mesh(
    path: pathlib.Path, way: str
) -> None:
    def make() -> Any:
        columns = nnx.with_partitioning(nnx.initializers.normal(1.0), (None, "model"))
        model = nnx.Linear(4, 8, kernel_init=columns, rngs=nnx.Rngs(0))
        return {"model": model, "optimizer": nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)}

    with jax.set_mesh(make_mesh({"data": 2, "model": 4})):
        state = nnx.state(make())
    jaxckpt.save(path, state)

    mesh = make_mesh({"model": 2}, first_device=8)
    with jax.set_mesh(mesh):
        like = (
            nnx.state(nnx.eval_shape(make)) if way == "eval_shape" else nnx.get_abstract_model(make, mesh)[1]
        )
        restored = jaxckpt.restore(path, like)
    assert_same_tree(jax.tree.leaves(restored), jax.tree.leaves(state))
    for variables in (restored["model"], restored["optimizer"]["opt_state"][0]["mu"]):
        kernel = variables["kernel"].get_value()
        assert kernel.sharding.spec == P(None, "model")
        assert kernel.sharding.mesh.devices.tolist() == mesh.devices.tolist()


def test_a_state_fits_one_of_plain_dicts_and_the_other_way_round(tmp_path: pathlib.Path) -> None:
    graph, state = nnx.split(
        nnx.List([nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.BatchNorm(3, rngs=nnx.Rngs(0))])
    )
    pure = nnx.to_pure_dict(state)
    jaxckpt.save(tmp_path / "state", state)
    jaxckpt.save(tmp_path / "pure", pure)
    assert_same_tree(jaxckpt.restore(tmp_path / "pure"), pure)
    assert_same_tree(jaxckpt.restore(tmp_path / "state", rename=[(r"(.*)/value", r"\1")]), pure)
    assert_same_tree(jaxckpt.restore(tmp_path / "pure", state, rename=[(r"(.*)", r"\1/value")]), state)
    nnx.replace_by_pure_dict(state, jaxckpt.restore(tmp_path / "pure"))
    assert nnx.merge(graph, state)[0].kernel[...].tolist() == pure[0]["kernel"].tolist()


def test_some_kinds_of_variables_alone(path: pathlib.Path) -> None:
    training = make()
    jaxckpt.save(path, nnx.state(training))
    fresh = make()
    adapters = nnx.state(fresh, nnx.LoRAParam)
    zeros = jax.tree.map(jnp.zeros_like, adapters)
    restored = jaxckpt.restore(path, zeros, unexpected="ignore")
    assert len(jax.tree.leaves(restored)) == 2
    assert_same_tree(restored, nnx.state(training, nnx.LoRAParam))


def test_a_model_that_is_saved_as_a_tree_comes_back_without_like_as_dicts_that_jax_takes(
    tmp_path: pathlib.Path,
) -> None:
    """The positions of an `nnx.List` stand beside the names of its attributes, and JAX sorts the keys of a dict."""
    model = nnx.Sequential(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.List([nnx.Linear(3, 3, rngs=nnx.Rngs(1))]))
    jaxckpt.save(tmp_path / "model", model)
    restored = jaxckpt.restore(tmp_path / "model")
    assert restored["layers"][1][0]["kernel"]["value"].tolist() == model.layers[1][0].kernel[...].tolist()
    assert_same_tree(jax.tree.leaves(restored), jax.tree.leaves(model))
    jaxckpt.save(tmp_path / "again", restored)
    assert jaxckpt.diff(tmp_path / "model", tmp_path / "again").same
    assert_same_tree(jaxckpt.restore(tmp_path / "again"), restored)


def test_a_variable_that_holds_a_reference_is_refused_by_its_key(path: pathlib.Path) -> None:
    with nnx.var_defaults(ref=True):
        model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    with pytest.raises(jaxckpt.UnsupportedLeafError, match=r"kernel/value: is a jax\.Ref.*ref\[\.\.\.\]"):
        jaxckpt.save(path, nnx.state(model))
    jaxckpt.save(path, jax.tree.map(lambda ref: ref[...], nnx.state(model)))
    assert jaxckpt.open(path)["kernel/value"].shape == (2, 3)
