"""Dicts in the manner of Haiku, whose names hold slashes and tildes; those of Haiku itself where it is installed."""

from __future__ import annotations

import ast
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import jaxckpt

from .helpers import ROOT, assert_goes_on_equally, assert_same_tree, run_adapter

# Each is another module's name with another place of the separators.
NAMES = [
    "net/~/mlp",
    "net/~/mlp/~/linear_0",
    "net/~mlp",
    "net~/mlp",
    "net/mlp",
    "~/net",
    "net~1mlp",
    "net",
    "~",
]


def test_the_example(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_adapter("haiku_dicts", tmp_path)
    printed = capsys.readouterr().out
    assert_goes_on_equally(printed, 3)
    assert "modules: ['mlp/~/linear_0', 'mlp/~/linear_1']" in printed
    assert "renamed: {'params': {'head': {'b': (1,), 'w': (16, 1)}}}" in printed


def test_each_adapter_may_run_again_in_its_directory() -> None:
    files = sorted((ROOT / "examples" / "adapters").glob("*.py"))
    calls = [
        (file.name, {keyword.arg for keyword in node.keywords})
        for file in files
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "jaxckpt.save"
    ]
    assert {name for name, _ in calls} == {file.name for file in files}
    assert [name for name, keywords in calls if "overwrite" not in keywords] == []


def test_names_that_differ_in_slashes_and_tildes_alone_stay_apart(path: pathlib.Path) -> None:
    tree = {name: {"w": jnp.full(2, number), "b/~": number} for number, name in enumerate(NAMES)}
    nested = {"net": {"~": {"mlp": {"w": jnp.zeros(3)}}}}
    jaxckpt.save(path, {"flat": tree, "nested": nested})
    restored = jaxckpt.restore(path)
    assert_same_tree(restored, {"flat": tree, "nested": nested})
    assert sorted(restored["flat"]) == sorted(NAMES)
    checkpoint = jaxckpt.open(path)
    assert checkpoint["flat/net~1~0~1mlp/w"][...].tolist() == [0, 0]
    assert checkpoint["nested/net/~0/mlp/w"].shape == (3,)
    with pytest.raises(KeyError, match=r"did you mean .*'flat/net~1mlp/w'"):
        checkpoint["flat/net/mlp/w"]


def test_modules_are_renamed_by_their_keys(path: pathlib.Path) -> None:
    jaxckpt.save(path, {name: {"w": jnp.full(2, number)} for number, name in enumerate(NAMES)})
    restored = jaxckpt.restore(path, rename={"net~1~0~1mlp": "first", "~0": "net~1~0~1last"})
    assert set(restored) == {*NAMES, "first", "net/~/last"} - {"net/~/mlp", "~"}
    assert restored["first"]["w"].tolist() == [0, 0]
    assert restored["net/~/last"]["w"].tolist() == [8, 8]
    nested = jaxckpt.restore(path, select="net~1~0~1*", rename=[(r"net~1~0~1(\w+)~1~0~1(.*)", r"\1/\2")])
    assert nested["mlp"]["linear_0"]["w"].tolist() == [1, 1]


@pytest.mark.slow
def test_what_haiku_itself_makes_comes_back(path: pathlib.Path) -> None:
    haiku: Any = pytest.importorskip("haiku", reason="dm-haiku is not installed")

    def network(x: Any) -> Any:
        x = haiku.Sequential([haiku.Linear(4, name="encoder"), jax.nn.relu])(x)
        x = haiku.BatchNorm(create_scale=True, create_offset=True, decay_rate=0.9)(x, is_training=True)
        core = haiku.LSTM(3)
        x, carry = core(x, core.initial_state(x.shape[0]))
        haiku.set_state("carry", carry)
        return haiku.nets.MLP([5, 2])(x)

    transformed = haiku.transform_with_state(network)
    x = jnp.linspace(-1, 1, 16).reshape(2, 8)
    params, state = jax.jit(transformed.init)(jax.random.PRNGKey(0), x)
    tree = {"params": params, "state": state, "key": jax.random.PRNGKey(1)}
    jaxckpt.save(path, tree)
    assert jaxckpt.open(path)["params/mlp~1~0~1linear_0/w"].shape == (3, 5)

    like = {
        **tree,
        **dict(zip(["params", "state"], jax.eval_shape(transformed.init, tree["key"], x), strict=True)),
    }
    assert_same_tree(jaxckpt.restore(path, like), tree)
    plain = jaxckpt.restore(path)
    assert plain["state"]["~"]["carry"]._fields == ("hidden", "cell")
    assert_same_tree(plain["params"], params)
    apply = jax.jit(transformed.apply)
    outputs, _ = apply(plain["params"], plain["state"], None, x)
    assert outputs.tolist() == apply(params, state, None, x)[0].tolist()
