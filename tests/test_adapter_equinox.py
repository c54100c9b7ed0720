"""Equinox: modules of all sorts of fields, shared layers, ensembles and states come back from abstract ones."""

from __future__ import annotations

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec as P

import jaxckpt

from .helpers import assert_goes_on_equally, assert_same_tree, assert_same_weak_types, make_mesh, run_adapter

eqx: Any = pytest.importorskip("equinox")


ACTIVATION = jax.jit(jax.nn.gelu)


class Model(eqx.Module):
    """A module with whatever a field can hold."""

    tied: Any
    norms: list[Any]
    ensemble: Any
    recurrent: Any
    key: jax.Array
    activation: Any
    rate: float
    flag: bool
    nothing: None
    pair: tuple[Any, ...]
    name: str = eqx.field(static=True)

    def __init__(self, key: jax.Array, norms: int = 2) -> None:
        first, second, third = jax.random.split(key, 3)
        embed = eqx.nn.Embedding(5, 4, key=first)
        head = eqx.nn.Linear(4, 5, use_bias=False, key=second)
        self.tied = eqx.nn.Shared((embed, head), lambda pair: pair[1].weight, lambda pair: pair[0].weight)
        self.norms = [eqx.nn.BatchNorm(4, "batch", mode="ema") for _ in range(norms)]
        self.ensemble = eqx.filter_vmap(lambda key: eqx.nn.MLP(4, 4, 8, 1, key=key))(
            jax.random.split(third, 3)
        )
        self.recurrent = eqx.nn.GRUCell(4, 4, key=third)
        self.key = third
        self.activation = ACTIVATION
        self.rate = 0.25
        self.flag = True
        self.nothing = None
        self.pair = (jnp.bfloat16(1.5), None, "text", jnp.arange(2, dtype=jnp.int8))
        self.name = "static"

    def __call__(self, token: Any, state: Any) -> Any:
        embed, head = self.tied()
        x = embed(token)
        for norm in self.norms:
            x, state = norm(x, state)
        x = eqx.filter_vmap(lambda mlp: mlp(x))(self.ensemble).mean(0)
        return head(self.activation(self.recurrent(x, x) * self.rate)), state


def is_array(leaf: Any) -> bool:
    return eqx.is_array(leaf) or isinstance(leaf, jax.ShapeDtypeStruct)


def make(norms: int = 2, *, seed: int = 0) -> Any:
    return eqx.nn.make_with_state(Model)(jax.random.key(seed), norms)


@eqx.filter_jit
def call(model: Any, state: Any) -> Any:
    batched = jax.vmap(model, axis_name="batch", in_axes=(0, None), out_axes=(0, None))
    return batched(jnp.arange(4), state)


@pytest.mark.slow
def test_the_example(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_adapter("equinox_module", tmp_path)
    printed = capsys.readouterr().out
    assert_goes_on_equally(printed, 3)
    assert "statistics: ['state/0', 'state/1/0', 'state/1/1']" in printed


@pytest.mark.slow
def test_a_module_with_all_sorts_of_fields_comes_back_from_an_abstract_one(path: pathlib.Path) -> None:
    model, state = eqx.filter_jit(make)()
    _, state = call(model, state)
    arrays, _ = eqx.partition((model, state), is_array)
    jaxckpt.save(path, arrays)

    like, rest = eqx.partition(eqx.filter_eval_shape(make, seed=1), is_array)
    restored = jaxckpt.restore(path, like)
    assert jax.tree.structure(restored) == jax.tree.structure(arrays)
    assert_same_tree(jax.tree.leaves(restored[1]), jax.tree.leaves(state))
    assert_same_weak_types(restored, arrays)
    again, state_again = eqx.combine(restored, rest)
    assert (again.name, again.flag, again.pair[1:3]) == ("static", True, (None, "text"))
    assert jax.random.key_data(again.key).tolist() == jax.random.key_data(model.key).tolist()
    assert_same_tree(jax.tree.leaves(call(again, state_again)), jax.tree.leaves(call(model, state)))


def test_the_whole_abstract_module_as_like_keeps_what_is_no_array(path: pathlib.Path) -> None:
    model, _ = eqx.filter_jit(make)()
    jaxckpt.save(path, eqx.filter(model, eqx.is_array))
    like, _ = eqx.filter_eval_shape(make, seed=1)
    restored, report = jaxckpt.restore(path, like, missing="keep", report=True)
    assert restored.activation is like.activation
    assert restored.rate == 0.25
    assert "rate" in report.kept
    assert_same_tree(eqx.filter(restored, eqx.is_array), eqx.filter(model, eqx.is_array))


def test_a_layer_that_is_shared_is_saved_once(path: pathlib.Path) -> None:
    model, _ = eqx.filter_jit(make)()
    jaxckpt.save(path, eqx.filter(model, eqx.is_array))
    keys = jaxckpt.open(path).keys()
    assert [key for key in keys if key.startswith("tied/")] == ["tied/pytree/0/weight"]


def test_a_state_has_numbers_that_rename_brings_to_their_new_places(path: pathlib.Path) -> None:
    """One layer more in front of two: what belonged to the first two belongs to the last two."""
    model, state = eqx.filter_jit(make)()
    _, state = call(model, state)
    jaxckpt.save(path, state)
    keys = jaxckpt.open(path).keys()
    _, like = eqx.filter_jit(make)(3)
    numbers = sorted({int(key.split("/")[0]) for key in keys})
    shift = len(numbers) // 2
    rename = {str(number): str(number + shift) for number in numbers}
    restored, report = jaxckpt.restore(path, like, rename=rename, missing="keep", report=True)
    assert len(report.kept) == len(keys) // 2
    assert_same_tree(jax.tree.leaves(restored)[len(report.kept) :], jax.tree.leaves(state))
    with pytest.raises(jaxckpt.MismatchError, match="not on disk"):
        jaxckpt.restore(path, like)


def test_arrays_go_to_the_shardings_that_a_rule_gives(path: pathlib.Path) -> None:
    mlp = eqx.nn.MLP(4, 4, 8, 1, key=jax.random.key(0))
    jaxckpt.save(path, eqx.filter(mlp, eqx.is_array))
    mesh = make_mesh({"model": 4})

    def rule(key: str, shape: jax.ShapeDtypeStruct) -> NamedSharding:
        return NamedSharding(mesh, P("model") if key.endswith("/weight") else P())

    like, rest = eqx.partition(eqx.filter_eval_shape(eqx.nn.MLP, 4, 4, 8, 1, key=jax.random.key(1)), is_array)
    restored = eqx.combine(jaxckpt.restore(path, like, sharding=rule), rest)
    assert restored.layers[0].weight.sharding.spec == P("model")
    x = jnp.ones(4)
    np.testing.assert_allclose(restored(x), mlp(x), rtol=1e-6)
