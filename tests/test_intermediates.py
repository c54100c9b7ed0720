"""Values that `checkpoint_name` marks become outputs, and nothing else about a function changes."""

from __future__ import annotations

import logging

import jax
import jax.export
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name

from jaxckpt._intermediates import evaluate, used_inputs, with_intermediates

WEIGHTS = np.random.default_rng(1).standard_normal((3, 8, 8)).astype(np.float32)
X = np.random.default_rng(2).standard_normal((5, 8)).astype(np.float32)
PRIMITIVES = jax.extend.core.primitives


def expose(function, *arguments, inline_custom=True, taken=()):
    return with_intermediates(jax.make_jaxpr(function)(*arguments), inline_custom=inline_custom, taken=taken)


def call(named, *arguments):
    outputs, values = jax.jit(lambda *values: evaluate(named, values))(*jax.tree.leaves(arguments))
    assert set(values) == set(named.names)
    return outputs, {name: values[name] for name in named.names}  # a compiled function sorts names


def assert_same_bits(one, other):
    for left, right in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert left.dtype == right.dtype
        assert np.asarray(left).tobytes() == np.asarray(right).tobytes()


def assert_close(one, other):
    """XLA fuses otherwise what is fetched, too, and may round otherwise."""
    for left, right in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert left.dtype == right.dtype
        np.testing.assert_allclose(left, right, rtol=1e-5, atol=1e-6)


def assert_same_function(named, function, *arguments):
    """Names do not change one bit of the outputs, nor what they are when the names are fetched."""
    values = jax.tree.leaves(arguments)
    expected = jax.jit(function)(*arguments)
    assert_same_bits(jax.jit(lambda *values: evaluate(named, values)[0])(*values), expected)
    assert_close(call(named, *arguments)[0], expected)


def equations_of(named, primitive):
    return [each for each in named.closed_jaxpr.eqns if each.primitive is primitive]


@jax.jit
def layer(w, x):
    return checkpoint_name(jnp.tanh(x @ w), "hidden")


def mlp(weights, x):
    x = layer(weights[0], x)
    x = jax.checkpoint(layer)(weights[1], x)
    x = jax.jit(lambda w, x: checkpoint_name(layer(w, x) * 2, "doubled"))(weights[2], x)
    return {"mean": x.mean(), "x": x}


def hidden_of_mlp(weights, x):
    first = layer(weights[0], x)
    second = layer(weights[1], first)
    return [first, second, layer(weights[2], second)]


def loss(weights, x):
    """Of each layer's output its square is used, so that the derivatives need that output again."""
    hidden = jax.checkpoint(lambda w, x: layer(w, x) ** 2)(weights[0], x)
    hidden = jax.jit(jax.checkpoint(lambda w, x: layer(w, x) ** 2))(weights[1], hidden)
    return hidden.sum()


def test_marked_values_in_nested_calls_are_outputs():
    named = expose(mlp, WEIGHTS, X)
    assert named.names == ("hidden", "hidden_1", "hidden_2", "doubled")
    assert named.unreachable == ()
    outputs, values = call(named, WEIGHTS, X)
    hidden = hidden_of_mlp(WEIGHTS, X)
    assert_same_bits([values[name] for name in named.names[:3]], hidden)
    assert_same_bits(values["doubled"], outputs[1])
    assert_same_function(named, mlp, WEIGHTS, X)


def test_a_function_without_marks_is_the_given_one():
    closed_jaxpr = jax.make_jaxpr(jax.jit(lambda x: jax.checkpoint(jnp.sin)(x).sum()))(X)
    named = with_intermediates(closed_jaxpr, inline_custom=True)
    assert named.closed_jaxpr is closed_jaxpr
    assert (named.names, named.unreachable) == ((), ())


def test_equations_without_marks_are_the_given_ones():
    def function(x):
        x = jax.jit(jnp.cos)(x)
        x = jax.nn.relu(x)
        return checkpoint_name(x, "h") + 1

    closed_jaxpr = jax.make_jaxpr(function)(X)
    named = with_intermediates(closed_jaxpr, inline_custom=True)
    assert all(one is other for one, other in zip(named.closed_jaxpr.eqns, closed_jaxpr.eqns, strict=True))
    assert equations_of(named, PRIMITIVES.custom_jvp_call_p)


def test_names_avoid_outputs_and_each_other():
    def function(x):
        for name in ("y", "y", "h", "h_1", "h", "h"):
            x = checkpoint_name(x + 1, name)
        return x

    named = expose(function, 0.0, taken=["y", "y_1"])
    assert named.names == ("y_2", "y_3", "h", "h_1", "h_2", "h_3")
    _, values = call(named, 0.0)
    assert [float(value) for value in values.values()] == [1, 2, 3, 4, 5, 6]


def test_a_marked_tree_has_its_name_leaf_by_leaf():
    def function(x):
        return checkpoint_name({"a": x, "b": (x + 1, 3.0)}, "state")

    named = expose(function, X)
    assert named.names == ("state", "state_1", "state_2")
    _, values = call(named, X)
    assert_same_bits(values, {"state": X, "state_1": X + 1, "state_2": np.float32(3)})
    assert_same_function(named, function, X)


def test_inputs_constants_and_unused_values_can_be_marked():
    @jax.jit
    def inner(x):
        checkpoint_name(x * 3, "unused")
        checkpoint_name(2.0, "number")
        return checkpoint_name(x, "input") + WEIGHTS[0]

    def function(x):
        return checkpoint_name(WEIGHTS[1], "constant") + jax.checkpoint(inner)(x)

    x = WEIGHTS[2]
    named = expose(function, x)
    assert named.names == ("constant", "unused", "number", "input")
    _, values = call(named, x)
    assert_same_bits(values, {"constant": WEIGHTS[1], "unused": x * 3, "number": np.float32(2), "input": x})
    assert_same_function(named, function, x)


def test_constants_that_stand_in_equations_are_kept():
    before = jax.config.jax_use_simplified_jaxpr_constants
    jax.config.update("jax_use_simplified_jaxpr_constants", True)
    try:
        inner = jax.jit(lambda x: checkpoint_name(x @ WEIGHTS[0], "h") + jnp.asarray(WEIGHTS[1])[0])

        def function(x):
            return jax.checkpoint(inner)(x) * inner(x)

        named = expose(function, X)
        assert named.names == ("h", "h_1")
        _, values = call(named, X)
        assert_same_bits(values["h"], jax.jit(lambda x: x @ WEIGHTS[0])(X))
        assert_same_function(named, function, X)
    finally:
        jax.config.update("jax_use_simplified_jaxpr_constants", before)


def test_a_name_belongs_to_the_forward_pass():
    step = jax.value_and_grad(loss)
    named = expose(step, WEIGHTS, X)
    assert named.names == ("hidden", "hidden_1")
    assert named.unreachable == ()
    _, values = call(named, WEIGHTS, X)
    hidden = layer(WEIGHTS[0], X)
    assert_same_bits(values["hidden"], hidden)
    np.testing.assert_allclose(values["hidden_1"], layer(WEIGHTS[1], hidden**2), rtol=1e-6)
    assert_same_function(named, step, WEIGHTS, X)


def test_the_backward_pass_is_left_alone_with_the_marks_in_it():
    closed_jaxpr = jax.make_jaxpr(jax.grad(loss))(WEIGHTS, X)
    named = with_intermediates(closed_jaxpr, inline_custom=True)
    [backward] = [
        each
        for each in closed_jaxpr.eqns
        if each.primitive is PRIMITIVES.remat_p and each.params["differentiated"]
    ]
    assert "name=hidden" in str(backward)
    assert any(each is backward for each in named.closed_jaxpr.eqns)


def test_checkpoint_still_saves_memory_in_derivatives():
    named = expose(loss, WEIGHTS, X, inline_custom=False)
    assert named.names == ("hidden", "hidden_1")

    def loss_with_names(weights, x):
        outputs, values = evaluate(named, [weights, x])
        return outputs[0], values

    derivative = jax.value_and_grad(loss_with_names, has_aux=True)
    expected = jax.jit(jax.value_and_grad(loss))(WEIGHTS, X)
    (value, _), gradient = jax.jit(derivative)(WEIGHTS, X)
    assert_close((value, gradient), expected)
    recomputing = str(jax.make_jaxpr(derivative)(WEIGHTS, X)).count("differentiated=True")
    assert recomputing == str(jax.make_jaxpr(jax.value_and_grad(loss))(WEIGHTS, X)).count(
        "differentiated=True"
    )
    assert recomputing == 2


def test_marks_in_loops_and_conditionals_are_unreachable():
    def function(x):
        x = checkpoint_name(x, "before")
        x, _ = jax.lax.scan(
            lambda c, _: (jax.jit(lambda v: checkpoint_name(v + 1, "s"))(c), None), x, length=2
        )
        x = jax.lax.while_loop(lambda c: c.sum() < 0, lambda c: checkpoint_name(c + 1, "w"), x)
        x = jax.jit(lambda v: jax.lax.cond(v[0, 0] > 0, lambda u: checkpoint_name(u, "c"), jnp.sin, v))(x)
        x, _ = jax.lax.scan(lambda c, _: (checkpoint_name(c + 1, "s"), None), x, length=2)
        return checkpoint_name(x, "after")

    named = expose(function, X)
    assert named.names == ("before", "after")
    assert named.unreachable == ("s", "w", "c")
    assert_same_function(named, function, X)


def test_marks_in_shard_map_are_unreachable_and_shardings_of_calls_stay():
    mesh = jax.make_mesh((1,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("d")
    sharding = jax.sharding.NamedSharding(mesh, spec)

    def function(x):
        x = jax.jit(lambda v: checkpoint_name(v * 2, "h"), in_shardings=sharding, out_shardings=sharding)(x)
        body = jax.shard_map(lambda v: checkpoint_name(v, "part"), mesh=mesh, in_specs=spec, out_specs=spec)
        return body(x)

    named = expose(function, X)
    assert (named.names, named.unreachable) == (("h",), ("part",))
    [equation] = equations_of(named, PRIMITIVES.jit_p)
    assert equation.params["out_shardings"][0] == sharding
    assert len(equation.params["out_shardings"]) == len(equation.outvars) == 2
    assert_same_function(named, function, X)
    assert_same_bits(call(named, X)[1]["h"], X * 2)


@jax.custom_vjp
def clipped(x):
    return checkpoint_name(x * 2, "inside") + 1


clipped.defvjp(lambda x: (clipped(x), None), lambda _, cotangent: (cotangent * 100,))


@jax.custom_jvp
def scaled(x):
    return jax.jit(lambda v: checkpoint_name(v * 3, "inside"))(x)


scaled.defjvp(lambda primals, tangents: (scaled(*primals), tangents[0] * 1000))


def with_custom_derivatives(x):
    return jax.jit(lambda x: scaled(clipped(checkpoint_name(x + 1, "h"))).sum())(x)


def test_custom_derivatives_may_be_given_up_for_names():
    named = expose(with_custom_derivatives, X, inline_custom=True)
    assert named.names == ("h", "inside", "inside_1")
    assert named.unreachable == ()
    assert_same_function(named, with_custom_derivatives, X)
    _, values = call(named, X)
    h = X + 1
    assert_same_bits(values, {"h": h, "inside": h * 2, "inside_1": (h * 2 + 1) * 3})


def test_custom_derivatives_are_kept_where_they_are_needed():
    named = expose(with_custom_derivatives, X, inline_custom=False)
    assert named.names == ("h",)
    assert named.unreachable == ("inside",)
    assert_same_function(named, with_custom_derivatives, X)
    gradient = jax.grad(lambda x: evaluate(named, [x])[0][0])(X)
    assert_same_bits(gradient, np.full_like(X, 100_000))


def test_marked_keys_come_as_their_data():
    def function(key):
        key, other = jax.random.split(checkpoint_name(key, "key"))
        return jax.random.uniform(checkpoint_name(other, "other"), (3,))

    key = jax.random.key(7)
    named = expose(function, key)
    assert named.names == ("key", "other")
    assert_same_function(named, function, key)
    _, values = call(named, key)
    assert_same_bits(values["key"], jax.random.key_data(key))
    assert_same_bits(values["other"], jax.random.key_data(jax.random.split(key)[1]))


def test_effects_happen_once_and_in_order(capfd):
    def function(x):
        jax.debug.print("first {}", x, ordered=True)
        return jax.jit(
            lambda v: (jax.debug.print("second {}", v, ordered=True), checkpoint_name(v + 1, "h"))[1]
        )(x)

    named = expose(function, 1.0)
    assert named.names == ("h",)
    call(named, 1.0)
    jax.effects_barrier()
    assert capfd.readouterr().out.split() == ["first", "1.0", "second", "1.0"]


def test_a_function_called_often_is_compiled_once():
    @jax.jit
    def tall(w, x):
        return checkpoint_name(jnp.tanh(jnp.sin(x @ w)), "h")

    def function(w, x):
        for _ in range(6):
            x = tall(w, x)
        return x

    named = expose(function, WEIGHTS[0], X)
    assert len(named.names) == 6
    bodies = {id(each.params["jaxpr"]) for each in equations_of(named, PRIMITIVES.jit_p)}
    assert len(bodies) == 1
    text = jax.jit(lambda *values: evaluate(named, values)).lower(WEIGHTS[0], X).as_text()
    assert text.count("stablehlo.tanh") == 1
    assert text.count("call @") == 6


@pytest.mark.parametrize("vjp_order", [0, 1])
def test_names_survive_export(vjp_order):
    pytest.importorskip("flatbuffers")
    (batch,) = jax.export.symbolic_shape("b")
    inputs = (
        jax.ShapeDtypeStruct(WEIGHTS.shape, np.float32),
        jax.ShapeDtypeStruct((batch, 8), np.float32),
    )
    named = expose(mlp, *inputs, inline_custom=vjp_order == 0)
    exported = jax.export.export(
        jax.jit(lambda *values: evaluate(named, values)), platforms=("cpu", "cuda", "tpu")
    )(*inputs)
    loaded = jax.export.deserialize(exported.serialize(vjp_order=vjp_order))
    outputs, values = loaded.call(WEIGHTS, X)
    assert_same_bits(outputs, jax.tree.leaves(jax.jit(mlp)(WEIGHTS, X)))
    assert_same_bits(values["hidden_1"], hidden_of_mlp(WEIGHTS, X)[1])
    assert list(values) == sorted(named.names)
    if vjp_order:
        gradient = jax.grad(lambda w: loaded.call(w, X)[0][0])(WEIGHTS)
        expected = jax.grad(lambda w: mlp(w, X)["mean"])(WEIGHTS)
        np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-7)


class StrangeJaxpr:
    """What a later JAX may return: it can be called, and has another form inside."""

    def __init__(self, closed_jaxpr):
        self.in_avals = closed_jaxpr.in_avals
        self.out_avals = closed_jaxpr.out_avals


def test_a_jaxpr_of_another_form_has_outputs_only_and_is_logged(caplog):
    strange = StrangeJaxpr(jax.make_jaxpr(mlp)(WEIGHTS, X))
    with caplog.at_level(logging.WARNING, "jaxckpt"):
        named = with_intermediates(strange, inline_custom=True)
        is_used = used_inputs(strange)
    assert named.closed_jaxpr is strange
    assert (named.names, named.unreachable) == ((), ())
    assert is_used == [True, True]
    assert [record.message.count(jax.__version__) for record in caplog.records] == [1, 1]


def test_a_jaxpr_that_cannot_be_evaluated_has_outputs_only_and_is_logged(caplog):
    closed_jaxpr = jax.make_jaxpr(lambda x: checkpoint_name(x + 1, "h") * 2)(X)
    add, name, multiply = closed_jaxpr.eqns
    without_rules = jax.extend.core.Primitive("without_rules")
    broken_body = closed_jaxpr.jaxpr.replace(eqns=[add, name, multiply.replace(primitive=without_rules)])
    broken = closed_jaxpr.replace(jaxpr=broken_body)
    with caplog.at_level(logging.WARNING, "jaxckpt"):
        named = with_intermediates(broken, inline_custom=True)
    assert named.closed_jaxpr is broken
    assert named.names == ()
    assert "checkpoint_name" in caplog.text


def test_used_inputs_are_found_through_calls():
    state = {"params": X, "opt": {"mu": X, "nu": X}, "step": 0}

    @jax.jit
    def predict(state, x):
        unused = state["opt"]["mu"] * 2
        return jax.jit(lambda s, u: jax.checkpoint(lambda s: s["params"] + s["step"])(s))(state, unused) * x

    names = ["mu", "nu", "params", "step", "x"]
    closed_jaxpr = jax.make_jaxpr(predict)(state, X)
    assert dict(zip(names, used_inputs(closed_jaxpr), strict=True)) == {
        "mu": False,
        "nu": False,
        "params": True,
        "step": True,
        "x": True,
    }


def test_an_input_is_used_that_reaches_an_effect_or_a_loop():
    def function(printed, looped, passed, ignored):
        jax.jit(lambda v, w: jax.debug.print("{}", v))(printed, ignored)
        total, _ = jax.lax.scan(lambda c, _: (c + looped, None), 0.0, length=2)
        dropped = jax.jit(lambda v, w: (v, w))(passed, ignored)[0]
        return total + dropped

    closed_jaxpr = jax.make_jaxpr(function)(1.0, 2.0, 3.0, 4.0)
    assert used_inputs(closed_jaxpr) == [True, True, True, False]


def test_an_input_is_used_that_only_derivatives_need():
    @jax.custom_vjp
    def function(x, scale):
        return x * 2

    function.defvjp(lambda x, scale: (x * 2, scale), lambda scale, cotangent: (cotangent * scale, None))
    closed_jaxpr = jax.make_jaxpr(function)(1.0, 2.0)
    assert used_inputs(closed_jaxpr) == [True, True]


def test_an_input_is_used_that_reaches_a_named_value_only():
    def function(weights, x):
        jax.jit(lambda w, v: checkpoint_name(v @ w, "aside"))(weights, x)
        return x * 2

    closed_jaxpr = jax.make_jaxpr(function)(WEIGHTS[0], X)
    assert used_inputs(closed_jaxpr) == [False, True]
    named = with_intermediates(closed_jaxpr, inline_custom=True)
    assert used_inputs(named.closed_jaxpr) == [True, True]


def test_functions_that_call_each_other_twice_at_each_level_are_done_quickly():
    """2**40 calls in all, and 40 different bodies."""

    def called_twice(function):
        return jax.jit(lambda x: function(x) + function(x))

    function = jax.jit(jnp.sin)
    for _ in range(40):
        function = called_twice(function)
    closed_jaxpr = jax.make_jaxpr(function)(1.0)
    assert used_inputs(closed_jaxpr) == [True]
    assert with_intermediates(closed_jaxpr, inline_custom=True).names == ()
    in_loop = jax.make_jaxpr(lambda x: jax.lax.scan(lambda c, _: (function(c), None), x, length=2)[0])(1.0)
    assert with_intermediates(in_loop, inline_custom=True).unreachable == ()
