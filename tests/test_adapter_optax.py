"""Optax: states of composed optimizers come back from abstract ones, and into optimizers that changed since."""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import jaxckpt

from .helpers import assert_goes_on_equally, assert_same_tree, assert_same_weak_types, run_adapter

optax: Any = pytest.importorskip("optax")


def make_params() -> dict[str, Any]:
    return {"dense": {"kernel": jnp.full((3, 4), 0.5), "bias": jnp.zeros(4)}, "scale": jnp.ones(())}


LABELS = {"dense": {"kernel": "adam", "bias": "sgd"}, "scale": "none"}
OPTIMIZERS: dict[str, Callable[[], Any]] = {
    "parts_of_which_one_is_empty": lambda: optax.transforms.partition(
        {
            "adam": optax.adam(1e-2),
            "sgd": optax.sgd(0.1),
            "none": optax.set_to_zero(),
            "empty": optax.lion(1.0),
        },
        LABELS,
    ),
    "masks_in_masks": lambda: optax.chain(
        optax.masked(optax.masked(optax.adam(1e-2), {"dense": True, "scale": False}), lambda _: True),
        optax.add_decayed_weights(0.1, mask=lambda params: jax.tree.map(lambda leaf: leaf.ndim > 1, params)),
    ),
    "hyperparameters_with_schedules": lambda: optax.inject_hyperparams(
        optax.adamw, static_args="weight_decay", hyperparam_dtype=jnp.bfloat16
    )(learning_rate=optax.linear_schedule(1.0, 0.0, 10), b1=0.8, weight_decay=0.1),
    "accumulated_hyperparameters": lambda: optax.MultiSteps(
        optax.inject_hyperparams(optax.adam)(learning_rate=0.1), 3, use_grad_mean=True
    ).gradient_transformation(),
    "names": lambda: optax.named_chain(
        ("clip/~", optax.clip(1.0)), ("0", optax.adam(1e-2)), ("", optax.ema(0.9))
    ),
    "narrow_moments": lambda: optax.adam(1e-2, mu_dtype=jnp.bfloat16),
    "free_of_schedules": lambda: optax.contrib.schedule_free_adamw(1e-2),
    "muon": lambda: optax.contrib.muon(1e-2),
    "noise": lambda: optax.noisy_sgd(1e-2, key=jax.random.key(3)),
    "factored_moments": lambda: optax.adafactor(1e-3),
    "finite_steps": lambda: optax.apply_if_finite(optax.adam(1e-3), 3),
    "history": lambda: optax.lbfgs(linesearch=None),
    "schedule": lambda: optax.scale_by_schedule(lambda step: 0.5**step),
    "plateau": lambda: optax.chain(optax.adam(1e-2), optax.contrib.reduce_on_plateau()),
}


def train(optimizer: Any, params: Any, state: Any, steps: int) -> tuple[Any, Any]:
    for _ in range(steps):
        params, state = next_of(optimizer, params, state)
    return params, state


@functools.partial(jax.jit, static_argnums=0)
def next_of(optimizer: Any, params: Any, state: Any) -> tuple[Any, Any]:
    gradients = jax.tree.map(lambda leaf: leaf * 0.5 + 1, params)
    update = optax.with_extra_args_support(optimizer).update
    updates, state = update(gradients, state, params, value=jnp.float32(1.0))
    return optax.apply_updates(params, updates), state


@pytest.mark.slow
def test_the_example(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_adapter("optax_states", tmp_path)
    printed = capsys.readouterr().out
    assert_goes_on_equally(printed, 1)
    assert "learning rate: 0.1\n" in printed
    assert "learning rate of the code: 0.01\n" in printed
    assert "('opt_state/0/count', 'opt_state/0/ema/bias', 'opt_state/0/ema/kernel')" in printed


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_state_comes_back_from_an_abstract_one_and_goes_on(path: pathlib.Path, name: str) -> None:
    optimizer = OPTIMIZERS[name]()
    params = make_params()
    params, state = train(optimizer, params, jax.jit(optimizer.init)(params), 2)
    jaxckpt.save(path, state)
    restored = jaxckpt.restore(path, jax.eval_shape(optimizer.init, params))
    assert_same_tree(restored, state)
    assert_same_weak_types(restored, state)
    assert_same_tree(train(optimizer, params, restored, 1), train(optimizer, params, state, 1))
    # Without `like` all leaves are there, in the same order.
    assert_same_tree(jax.tree.leaves(jaxckpt.restore(path)), jax.tree.leaves(state))


def test_places_without_a_leaf_come_back_as_named_tuples_without_fields(path: pathlib.Path) -> None:
    optimizer = OPTIMIZERS["parts_of_which_one_is_empty"]()
    jaxckpt.save(path, optimizer.init(make_params()))
    parts = jaxckpt.restore(path).inner_states
    assert list(parts) == ["adam", "empty", "none", "sgd"]
    adam, empty = parts["adam"].inner_state
    assert type(adam.mu["dense"]["bias"]).__name__ == "MaskedNode"
    assert (adam.mu["dense"]["bias"], empty) == ((), ())
    assert adam.mu["dense"]["kernel"].shape == (3, 4)


def test_a_longer_chain_is_refused_unless_it_is_said_where_the_old_one_is(path: pathlib.Path) -> None:
    params = make_params()
    old = optax.adam(1e-2)
    params, state = train(old, params, old.init(params), 2)
    jaxckpt.save(path, {"params": params, "opt_state": state})
    new = optax.chain(optax.clip_by_global_norm(1.0), old)
    like = {"params": params, "opt_state": new.init(params)}
    with pytest.raises(jaxckpt.MismatchError, match=r"opt_state/1/0/mu/dense/bias: not on disk") as caught:
        jaxckpt.restore(path, like)
    assert {problem.kind for problem in caught.value.problems} == {"missing", "unexpected"}

    moved = jaxckpt.restore(path, like, rename={"opt_state/": "opt_state/1/"})
    assert_same_tree(moved["opt_state"], (optax.EmptyState(), state))

    fresh, report = jaxckpt.restore(path, like, missing="keep", unexpected="ignore", report=True)
    assert_same_tree(fresh["opt_state"], like["opt_state"])
    assert len(report.kept) == len(report.ignored) == len(jax.tree.leaves(state))


def test_another_optimizer_keeps_what_it_shares_with_the_old_one(path: pathlib.Path) -> None:
    """RMSProp has the second moments that Adam had."""
    params = make_params()
    adam = optax.scale_by_adam()
    _, state = train(adam, params, adam.init(params), 2)
    jaxckpt.save(path, state)
    like = optax.scale_by_rms().init(params)
    restored, report = jaxckpt.restore(path, like, select="nu/*", report=True)
    assert_same_tree(restored.nu, state.nu)
    assert len(report.restored) == 3
