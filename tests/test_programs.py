"""Functions that are stored beside the arrays: exported once, opened without the code of the model, and run.

The models are trained in this process, by their own code. One process that can import jax, numpy and jaxckpt alone
opens what was saved, runs all of it, and tells what came out; several tests look at that.
"""

from __future__ import annotations

import collections
import dataclasses
import errno
import functools
import hashlib
import json
import logging
import os
import pathlib
import random
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.export
import jax.numpy as jnp
import msgpack
import numpy as np
import pytest
import xxhash
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import NamedSharding, PartitionSpec as P

import jaxckpt
from jaxckpt import (
    CheckpointManager,
    CorruptError,
    FormatError,
    MismatchError,
    Program,
    UntrustedProgramError,
)
from jaxckpt._calling import check_entry, open_program
from jaxckpt._cli import main
from jaxckpt._encoding import encode_manifest
from jaxckpt._manifest import ProgramEntry, StoredObject
from jaxckpt._programs import decode_program, encode_program
from jaxckpt._store import LocalStore

from .helpers import assert_same_leaf, assert_same_tree, host_bytes, make_mesh, run_program
from .processes import Worker, run_processes
from .storage_faults import RefusingKernel

# Most of these export and compile several functions.
pytestmark = pytest.mark.slow

X = np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32)
Y = np.random.default_rng(1).normal(size=(16, 3)).astype(np.float32)
STEPS = 4


def struct(*shape: Any, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def symbolic_batch() -> jax.ShapeDtypeStruct:
    return struct(*jax.export.symbolic_shape("b, 8"))


def program(fn: Callable[..., Any], *inputs: Any, **arguments: Any) -> Program:
    """For the CPU alone, which is quicker to export."""
    arguments.setdefault("platforms", ["cpu"])
    return Program(fn, inputs, **arguments)


def stored(path: pathlib.Path, tree: Any, fn: Callable[..., Any], *inputs: Any, **arguments: Any) -> Any:
    """A program that was saved and opened; called as ``stored(...)(tree, *inputs)``."""
    jaxckpt.save(path, tree, programs={"f": program(fn, *inputs, **arguments)}, overwrite=True)
    return jaxckpt.open(path).program("f", trust=True, bind=False)


# --- models ---------------------------------------------------------------------------------------------------


class Truth(NamedTuple):
    """What a model's own code made: losses and weights of some steps, and predictions of the weights before them."""

    losses: list[float]
    weights: str
    logits: np.ndarray[Any, Any]


def train(step: Callable[..., Any], state: Any, weights_of: Callable[[Any], Any]) -> tuple[list[float], str]:
    losses = []
    for _ in range(STEPS):
        state, loss = step(state, X, Y)
        losses.append(float(loss))
    return losses, fingerprint(weights_of(state))


def fingerprint(tree: Any) -> str:
    """Of all bytes; a dict has its leaves in another order than a class of the model."""
    return hashlib.sha256(b"".join(sorted(map(host_bytes, jax.tree.leaves(tree))))).hexdigest()


def mlp(params: Any, x: Any) -> dict[str, Any]:
    hidden = checkpoint_name(jax.nn.gelu(x @ params[0]["w"] + params[0]["b"]), "hidden")
    # Nothing else needs the third layer.
    checkpoint_name(hidden @ params[2]["w"], "probe")
    return {"logits": hidden @ params[1]["w"] + params[1]["b"]}


def save_with_optax(path: pathlib.Path) -> Truth:
    import optax

    keys = jax.random.split(jax.random.key(0), 3)
    params = [
        {"w": jax.random.normal(key, shape) / 3, "b": jnp.zeros(shape[1])}
        for key, shape in zip(keys, ((8, 32), (32, 3), (32, 2)), strict=True)
    ]
    optimizer = optax.adam(1e-2)
    state = {
        "params": params,
        "optimizer": optimizer.init(params),
        "step": jnp.int32(0),
        "rng": jax.random.key(7),
        "decay": 0.5,
    }

    def predict(state: Any, x: Any) -> Any:
        return mlp(state["params"], x)

    def train_step(state: Any, x: Any, y: Any) -> Any:
        def loss_of(params: Any) -> Any:
            key = jax.random.fold_in(state["rng"], state["step"])
            dropped = x * jax.random.bernoulli(key, 0.9, x.shape)
            return jnp.mean((mlp(params, dropped)["logits"] - y) ** 2) * state["decay"]

        loss, gradients = jax.value_and_grad(loss_of)(state["params"])
        updates, optimizer_state = optimizer.update(gradients, state["optimizer"], state["params"])
        trained = {"params": optax.apply_updates(state["params"], updates), "optimizer": optimizer_state}
        return {**state, **trained, "step": state["step"] + 1}, loss

    programs = {
        "predict": Program(predict, (symbolic_batch(),), vjp_order=1),
        "train_step": program(train_step, struct(16, 8), struct(16, 3)),
    }
    jaxckpt.save(path, {**state, "name": "mlp"}, programs=programs)
    logits = jax.jit(predict)(state, X)["logits"]
    return Truth(*train(jax.jit(train_step), state, lambda state: state["params"]), np.asarray(logits))


def save_with_flax(path: pathlib.Path) -> Truth:
    from flax import nnx

    class Model(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.first = nnx.Linear(8, 16, rngs=rngs)
            self.norm = nnx.BatchNorm(16, rngs=rngs)
            self.dropout = nnx.Dropout(0.2, rngs=rngs)
            self.second = nnx.Linear(16, 3, rngs=rngs)

        def __call__(self, x: Any) -> Any:
            return self.second(self.dropout(nnx.relu(self.norm(self.first(x)))))

    definition, state = nnx.split(Model(nnx.Rngs(0)))

    def train_step(state: Any, x: Any, y: Any) -> Any:
        model = nnx.merge(definition, state)
        loss, gradients = nnx.value_and_grad(lambda model: jnp.mean((model(x) - y) ** 2))(model)
        kept = nnx.state(model)
        trained = jax.tree.map(
            lambda weight, gradient: weight - 0.1 * gradient, nnx.state(model, nnx.Param), gradients
        )
        nnx.update(model, kept, trained)
        return nnx.split(model)[1], loss

    def predict(state: Any, x: Any) -> Any:
        model = nnx.merge(definition, state)
        model.eval()
        return model(x)

    programs = {
        "predict": program(predict, symbolic_batch()),
        "train_step": program(train_step, struct(16, 8), struct(16, 3)),
    }
    jaxckpt.save(path, state, programs=programs)
    return Truth(
        *train(jax.jit(train_step), state, lambda state: state), np.asarray(jax.jit(predict)(state, X))
    )


def save_with_equinox(path: pathlib.Path) -> Truth:
    import equinox

    model = equinox.nn.MLP(8, 3, 16, depth=1, key=jax.random.key(3))
    arrays, static = equinox.partition(model, equinox.is_array)

    def predict(arrays: Any, x: Any) -> Any:
        return jax.vmap(equinox.combine(arrays, static))(x)

    def train_step(arrays: Any, x: Any, y: Any) -> Any:
        loss, gradients = jax.value_and_grad(lambda arrays: jnp.mean((predict(arrays, x) - y) ** 2))(arrays)
        return jax.tree.map(lambda weight, gradient: weight - 0.1 * gradient, arrays, gradients), loss

    programs = {
        "predict": program(predict, symbolic_batch()),
        "train_step": program(train_step, struct(16, 8), struct(16, 3)),
    }
    jaxckpt.save(path, arrays, programs=programs)
    return Truth(
        *train(jax.jit(train_step), arrays, lambda arrays: arrays), np.asarray(jax.jit(predict)(arrays, X))
    )


MODELS = {"optax": save_with_optax, "flax": save_with_flax, "equinox": save_with_equinox}


@dataclasses.dataclass(frozen=True)
class Elsewhere:
    """The models, and what a process without their code made of them."""

    path: pathlib.Path
    truth: dict[str, Truth]
    said: dict[str, Any]

    def array(self, name: str) -> np.ndarray[Any, Any]:
        return np.load(self.path / f"{name}.npy")


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Elsewhere:
    path = tmp_path_factory.mktemp("models")
    truth = {name: save(path / name) for name, save in MODELS.items()}
    np.savez(path / "inputs.npz", x=X, y=Y)
    result = run_program(_ELSEWHERE, path, STEPS, devices=8)
    return Elsewhere(path, truth, json.loads(result.stdout.splitlines()[-1]))


_ELSEWHERE = """
import hashlib, json, pathlib, sys

ALLOWED = {"jax", "jaxlib", "numpy", "jaxckpt", "ml_dtypes", "opt_einsum", "scipy", "msgpack", "xxhash", "tensorstore"}

class Finder:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        is_there = top in ALLOWED | sys.stdlib_module_names or top.startswith("_")
        return self.finder.find_spec(name, path, target) if is_there else None

sys.meta_path[:] = [Finder(finder) for finder in sys.meta_path]
root, steps = pathlib.Path(sys.argv[1]), int(sys.argv[2])
import jax, jax.numpy as jnp, numpy as np
import jaxckpt

said = {}
inputs = np.load(root / "inputs.npz")
x, y = inputs["x"], inputs["y"]

checkpoint = jaxckpt.open(root / "optax")
try:
    checkpoint.program("predict", trust=True)
except ImportError as error:
    said["no flatbuffers"] = [type(error).__name__, str(error)]
said["step"] = int(jaxckpt.restore(checkpoint, select="step")["step"])
ALLOWED.add("flatbuffers")

def digest(tree):
    leaves = [jax.random.key_data(leaf) if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
              for leaf in jax.tree.leaves(tree)]
    return hashlib.sha256(b"".join(sorted(np.asarray(leaf).tobytes() for leaf in leaves))).hexdigest()

for model in ("optax", "flax", "equinox"):
    checkpoint = jaxckpt.open(root / model)
    predict = checkpoint.program("predict", trust=True)
    logits = predict(x)
    np.save(root / f"{model} logits.npy", logits["logits"] if model == "optax" else logits)
    train_step = checkpoint.program("train_step", trust=True, bind=False)
    state, losses = jaxckpt.restore(checkpoint), []
    before = jax.tree.structure(state)
    for _ in range(steps):
        state, loss = train_step(state, x, y)
        losses.append(float(loss))
    said[model] = {
        "losses": losses,
        "weights": digest(state["params"] if model == "optax" else state),
        "is the same tree": jax.tree.structure(state) == before,
    }

predict = jaxckpt.open(root / "optax").program("predict", trust=True)
said["inside"] = predict.intermediates
said["uses"] = sorted(predict.arguments)
hidden, probe, logits = predict.fetch(["hidden", "probe", "logits"], x)
np.save(root / "hidden.npy", hidden)
np.save(root / "probe.npy", probe)
np.save(root / "fetched.npy", logits)
said["batches"] = [list(predict(x[:size])["logits"].shape) for size in (1, 5)]
np.save(root / "gradient of x.npy", jax.grad(lambda x: predict(x)["logits"].sum())(x))
free = jaxckpt.open(root / "optax").program("predict", trust=True, bind=False)
tree = jaxckpt.restore(root / "optax", select="params/*")
gradient = jax.grad(lambda params: free({"params": params}, x)["logits"].sum())(tree["params"])
np.save(root / "gradient of w.npy", gradient[0]["w"])
said["imported"] = sorted({name.partition(".")[0] for name in sys.modules} - sys.stdlib_module_names)
print(json.dumps(said))
"""


@pytest.mark.parametrize("model", MODELS)
def test_training_goes_on_bit_for_bit_without_the_code_of_the_model(elsewhere: Elsewhere, model: str) -> None:
    truth, said = elsewhere.truth[model], elsewhere.said[model]
    assert said["losses"] == truth.losses
    assert len(set(truth.losses)) == STEPS
    assert said["weights"] == truth.weights
    assert said["is the same tree"]
    np.testing.assert_array_equal(elsewhere.array(f"{model} logits"), truth.logits)


def test_nothing_of_the_models_was_imported(elsewhere: Elsewhere) -> None:
    imported = set(elsewhere.said["imported"])
    assert {"jax", "jaxckpt", "flatbuffers"} <= imported
    assert not imported & {"optax", "flax", "equinox", "tests", "pytest", "chex", "orbax", "keras"}


def test_values_inside_are_fetched_by_name(elsewhere: Elsewhere) -> None:
    assert elsewhere.said["inside"] == {"hidden": "float32[b,32]", "probe": "float32[b,2]"}
    params = jaxckpt.restore(elsewhere.path / "optax")["params"]
    hidden = jax.jit(lambda x: jax.nn.gelu(x @ params[0]["w"] + params[0]["b"]))(X)
    np.testing.assert_allclose(elsewhere.array("hidden"), hidden, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(elsewhere.array("probe"), hidden @ params[2]["w"], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(
        elsewhere.array("fetched"), elsewhere.truth["optax"].logits, rtol=1e-6, atol=1e-6
    )


def test_losses_are_bit_for_bit_those_of_the_function_whatever_its_platforms(path: pathlib.Path) -> None:
    """One function for several platforms, as `jax.export` makes it, has other last bits for this model."""

    def step(tree: Any, x: Any, labels: Any) -> Any:
        params, mean, square, count = tree

        def loss(params: Any) -> Any:
            hidden = x @ params["first"]
            hidden = (hidden - hidden.mean(-1, keepdims=True)) * jax.lax.rsqrt(
                hidden.var(-1, keepdims=True) + 1e-6
            )
            scores = jax.nn.log_softmax(jnp.tanh(jax.nn.gelu(hidden) @ params["second"]) @ params["third"])
            return -jnp.take_along_axis(scores, labels[:, None], 1).mean()

        value, gradient = jax.value_and_grad(loss)(params)
        count = count + 1
        mean = jax.tree.map(lambda old, slope: 0.9 * old + 0.1 * slope, mean, gradient)
        square = jax.tree.map(lambda old, slope: 0.99 * old + 0.01 * slope * slope, square, gradient)
        params = jax.tree.map(
            lambda leaf, m, v: (
                leaf - 0.01 * (m / (1 - 0.9**count)) / (jnp.sqrt(v / (1 - 0.99**count)) + 1e-8)
            ),
            params,
            mean,
            square,
        )
        return (params, mean, square, count), value

    stored = jaxckpt.Program(step, (struct(8, 64), jax.ShapeDtypeStruct((8,), jnp.int32)))
    rng = np.random.default_rng(0)
    original = jax.jit(step)
    shapes = {"first": (64, 55), "second": (55, 42), "third": (42, 3)}
    params = {name: jnp.asarray(rng.normal(size=shape) * 0.1, jnp.float32) for name, shape in shapes.items()}
    zeros = jax.tree.map(jnp.zeros_like, params)
    own = other = (params, zeros, zeros, jnp.float32(0))
    jaxckpt.save(path, own, programs={"step": stored})
    run = jaxckpt.open(path).program("step", trust=True, bind=False)
    for _ in range(6):
        x, labels = rng.normal(size=(8, 64)).astype(np.float32), rng.integers(0, 3, 8).astype(np.int32)
        own, expected = original(own, x, labels)
        other, loss = run(other, x, labels)
        assert float(loss) == float(expected)
    assert jax.tree.all(jax.tree.map(np.array_equal, own, other))


def test_a_program_is_for_three_platforms(elsewhere: Elsewhere) -> None:
    checkpoint = jaxckpt.open(elsewhere.path / "optax")
    assert checkpoint.program("predict", trust=True, bind=False).platforms == ("cpu", "cuda", "tpu")


def test_a_program_takes_the_leaves_that_it_uses_and_any_batch(elsewhere: Elsewhere) -> None:
    layers = [f"params/{layer}/{name}" for layer in (0, 1) for name in ("b", "w")]
    assert elsewhere.said["uses"] == [*layers, "params/2/w"]
    assert elsewhere.said["batches"] == [[1, 3], [5, 3]]


def test_gradients_go_through_a_program(elsewhere: Elsewhere) -> None:
    params = jaxckpt.restore(elsewhere.path / "optax")["params"]
    gradient_of = jax.jit(jax.grad(lambda params, x: mlp(params, x)["logits"].sum(), argnums=(0, 1)))
    gradients = gradient_of(params, X)
    np.testing.assert_allclose(elsewhere.array("gradient of w"), gradients[0][0]["w"], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(elsewhere.array("gradient of x"), gradients[1], rtol=1e-4, atol=1e-5)


def test_values_are_restored_where_programs_cannot_be_opened(elsewhere: Elsewhere) -> None:
    name, message = elsewhere.said["no flatbuffers"]
    assert name == "MissingDependencyError"
    assert "pip install 'jaxckpt[programs]'" in message
    assert elsewhere.said["step"] == 0


# --- what goes in, what comes out -----------------------------------------------------------------------------


class Pair(NamedTuple):
    first: Any
    second: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Layer:
    w: Any
    b: Any


def test_a_program_returns_what_the_function_returned(path: pathlib.Path) -> None:
    tree = {"layer": Layer(jnp.arange(3.0), np.arange(3.0)), "key": jax.random.key(5, impl="rbg"), "scale": 2}

    def f(tree: Any) -> Any:
        w = tree["layer"].w * tree["scale"]
        return {
            "tree": tree,
            "pair": Pair(w, [None, (tree["layer"].b, "text", b"bytes")]),
            "keys": jax.random.split(tree["key"]),
            "layer": Layer(w.astype(jnp.bfloat16), w > 1),
            "ordered": collections.OrderedDict(z=w.astype(jnp.int4), a=w.astype(jnp.complex64)),
        }

    jaxckpt.save(path, tree, programs={"f": program(f), "bare": program(lambda tree: tree["scale"] + 1)})
    checkpoint = jaxckpt.open(path)
    want = jax.jit(lambda tree: {name: part for name, part in f(tree).items() if name != "pair"})(tree)
    called = checkpoint.program("f", trust=True, bind=False)(tree)
    pair = called.pop("pair")
    assert isinstance(called["tree"]["layer"], Layer)
    # Classes of the tree that is given come back; others are known to nobody here.
    assert called["layer"].keys() == {"w", "b"}
    called["layer"] = Layer(**called["layer"])
    assert_same_tree(called, want)
    assert type(pair).__name__ == "Pair"
    assert pair.second[0] is None
    assert pair.second[1][1:] == ("text", b"bytes")
    assert pair.second[1][0].dtype == jnp.float32
    bound = checkpoint.program("f", trust=True)()
    assert_same_leaf(bound["keys"], want["keys"])
    assert_same_leaf(bound["tree"]["layer"]["b"], want["tree"]["layer"].b)
    bare = checkpoint.program("bare", trust=True)
    assert (int(bare()), bare.results, int(bare.fetch("output"))) == (3, ("output",), 3)
    assert "f()" in repr(checkpoint.program("f", trust=True)).replace("'f': (", "f(")


def test_weak_types_stay(path: pathlib.Path) -> None:
    tree = {
        "weak": jnp.asarray(1.5),
        "strong": jnp.float32(2),
        "number": 3,
        "half": jnp.ones(2, jnp.bfloat16),
    }

    def f(tree: Any, x: Any) -> Any:
        return tree, tree["half"] * tree["number"] * tree["weak"] * x

    weak = jax.ShapeDtypeStruct((), jnp.float32, weak_type=True)
    f_stored = stored(path, tree, f, weak)
    got = f_stored(tree, 2.0)
    assert_same_tree(got, jax.jit(f)(tree, 2.0))
    assert [leaf.weak_type for leaf in jax.tree.leaves(got)] == [False, True, False, True, False]
    (inside, _) = jax.jit(f_stored)(tree, 2.0)
    assert inside["weak"].weak_type
    assert f_stored.fetch("0/weak", tree, 2.0).weak_type


def test_inputs_can_be_trees_and_keys(path: pathlib.Path) -> None:
    def f(tree: Any, batch: Any, key: Any) -> Any:
        return tree["w"] * batch["x"] + batch["more"][0] + jax.random.normal(key, (3,))

    batch = {"x": X[0, :3], "more": [np.int32(4), None]}
    key = jax.random.key(1)
    f_stored = stored(
        path, {"w": np.arange(3.0)}, f, {"x": struct(3), "more": [struct(dtype=jnp.int32), None]}, key
    )
    assert f_stored.inputs == {
        "batch/more/0": "int32[]",
        "batch/x": "float32[3]",
        "key": "key<threefry2x32>[]",
    }
    want = jax.jit(f)({"w": np.arange(3.0)}, batch, key)
    np.testing.assert_array_equal(f_stored({"w": np.arange(3.0)}, batch, key), want)
    with pytest.raises(MismatchError) as caught:
        f_stored({"w": np.arange(3.0)}, {"x": X[0], "less": [np.int32(4)]}, jax.random.key(1, impl="rbg"))
    assert {problem.key: problem.kind for problem in caught.value.problems} == {
        "batch/less/0": "unexpected",
        "batch/x": "shape",
        "batch/more/0": "missing",
        "key": "dtype",
    }
    with pytest.raises(MismatchError, match=r"w: float32\[3\] in the program, int32\[3\] was given"):
        f_stored({"w": np.arange(3)}, batch, key)
    with pytest.raises(TypeError, match=r"takes \(tree, batch, key\), and 2 were given"):
        f_stored({"w": np.arange(3.0)}, batch)


def test_numbers_of_python_become_arrays_as_in_jax(path: pathlib.Path) -> None:
    f_stored = stored(
        path, {"w": 1.0}, lambda tree, x, n: tree["w"] * x + n, struct(), struct(dtype=jnp.int32)
    )
    assert float(f_stored({"w": 2}, 3, 4)) == 10.0
    with pytest.raises(MismatchError, match=r"n: int32\[\] in the program, float32\[\] was given"):
        f_stored({"w": 2.0}, 3.0, 4.5)


def test_64_bit_types_need_jax_to_have_them(path: pathlib.Path) -> None:
    with jax.enable_x64(True):
        wide = struct(2, dtype=jnp.float64)
        double = stored(path, {"w": np.ones(2)}, lambda tree, x: tree["w"] * x / 3, wide)
        result = double({"w": np.ones(2)}, np.ones(2))
        assert result.dtype == np.float64
        assert float(result[0]) == 1 / 3
    with pytest.raises(MismatchError, match="jax_enable_x64"):
        double({"w": np.ones(2)}, np.ones(2))


def test_symbolic_dimensions_are_checked_at_the_call(path: pathlib.Path) -> None:
    (size,) = jax.export.symbolic_shape("b", constraints=["b >= 3"])
    add = stored(
        path, {"w": jnp.ones(8)}, lambda tree, x, y: tree["w"] * x + y, struct(size, 8), struct(size, 8)
    )
    assert add.inputs == {"x": "float32[b,8]", "y": "float32[b,8]"}
    tree = {"w": jnp.ones(8)}
    assert add(tree, X[:4], X[:4]).shape == (4, 8)
    with pytest.raises(ValueError, match="inconsistency between dimension size"):
        add(tree, X[:4], X[:5])
    with pytest.raises(ValueError, match="shapes") as caught:
        add(tree, X[:2], X[:2])
    assert any("contradict a constraint" in note for note in caught.value.__notes__)
    with pytest.raises(MismatchError, match=r"x: float32\[b,8\] in the program, float32\[4,7\] was given"):
        add(tree, X[:4, :7], X[:4])


def test_inputs_have_names_of_their_own(path: pathlib.Path) -> None:
    f_stored = stored(path, 1.0, lambda tree, input1, *more: tree + input1 - more[0], struct(), struct())
    assert f_stored.inputs == {"input0": "float32[]", "input1": "float32[]"}
    assert float(f_stored(1.0, 5.0, 2.0)) == 4.0


def test_strings_are_a_part_of_the_program(path: pathlib.Path) -> None:
    double_or_not = program(lambda tree: tree["x"] * (2 if tree["mode"] == "double" else 1))
    for mode, want in (("double", 6.0), ("as is", 3.0)):
        jaxckpt.save(path, {"x": 3.0, "mode": mode}, programs={"f": double_or_not}, overwrite=True)
        assert float(jaxckpt.open(path).program("f", trust=True)()) == want


def test_gradients_are_refused_where_they_were_not_exported(path: pathlib.Path) -> None:
    square = stored(path, {"w": jnp.ones(2)}, lambda tree: (tree["w"] ** 2).sum())
    with pytest.raises(ValueError, match=r"'f' cannot be differentiated: export it with .*vjp_order=1"):
        jax.grad(square)({"w": jnp.ones(2)})


def test_a_donating_program_takes_the_memory_of_the_tree(path: pathlib.Path) -> None:
    step = stored(path, {"w": jnp.ones(2)}, lambda tree: {"w": tree["w"] + 1})
    tree = {"w": jnp.ones(2)}
    assert step(tree)["w"].tolist() == [2, 2]
    assert not tree["w"].is_deleted()
    assert step.donating()(tree)["w"].tolist() == [2, 2]
    assert tree["w"].is_deleted()
    with pytest.raises(ValueError, match="used again"):
        step.bind({"w": jnp.ones(2)}).donating()


def test_what_is_no_value_of_a_program_cannot_be_fetched(path: pathlib.Path) -> None:
    f_stored = stored(path, 1.0, lambda tree: {"logits": tree, "name": "text"})
    with pytest.raises(KeyError, match="did you mean 'logits'"):
        f_stored.fetch("logit", 1.0)
    assert f_stored.outputs == {"logits": "float32[]", "name": "constant"}
    assert f_stored.results == ("logits",)


# --- shardings ------------------------------------------------------------------------------------------------


def gated(tree: Any, x: Any) -> Any:
    return jax.nn.gelu(x @ tree["w"] + tree["b"]) @ tree["w"].T


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> tuple[pathlib.Path, Any, Any]:
    """A checkpoint that was saved on an explicit mesh, its tree on the host, and what the program returns."""
    path = tmp_path_factory.mktemp("sharded") / "a"
    tree = {"w": X[:8] / 8, "b": Y[:8, 0]}
    mesh = jax.make_mesh((4, 2), ("x", "y"))
    placed = {
        "w": jax.device_put(tree["w"], NamedSharding(mesh, P("x", "y"))),
        "b": jax.device_put(tree["b"], NamedSharding(mesh, P("y"))),
    }
    # As in the loop of a training program, which has its mesh at hand.
    with jax.set_mesh(mesh):
        jaxckpt.save(path, placed, programs={"f": program(gated, symbolic_batch(), vjp_order=1)})
    return path, tree, np.asarray(jax.jit(gated)(tree, X))


def test_a_program_runs_on_any_sharding(sharded: Any) -> None:
    path, tree, want = sharded
    checkpoint = jaxckpt.open(path)
    assert checkpoint.manifest.programs["f"].devices == 1
    rows = NamedSharding(make_mesh({"x": 8}), P("x"))
    ways: list[dict[str, Any]] = [
        {},
        {"mesh": make_mesh({"y": 8})},
        {"mesh": jax.make_mesh((2, 2), ("x", "y"))},
        {"sharding": rows},
        {"sharding": jax.sharding.SingleDeviceSharding(jax.devices()[3])},
    ]
    for way in ways:
        predict = checkpoint.program("f", trust=True, **way)
        np.testing.assert_allclose(predict(X), want, rtol=1e-5, atol=1e-5, err_msg=str(way))
    predict = checkpoint.program("f", trust=True, bind=False)
    like = {"w": jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=rows), "b": np.zeros(8, np.float32)}
    restored = jaxckpt.restore(path, like)
    np.testing.assert_allclose(predict(restored, jax.device_put(X, rows)), want, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(predict(tree, X), want, rtol=1e-5, atol=1e-5)


def test_gradients_on_meshes(sharded: Any) -> None:
    path, tree, _ = sharded
    predict = jaxckpt.open(path).program("f", trust=True, bind=False)
    want = jax.jit(jax.grad(lambda tree: gated(tree, X).sum()))(tree)
    gradient = jax.grad(lambda tree: predict(tree, X).sum())
    for mesh, take in (
        (make_mesh({"x": 4, "y": 2}), gradient),
        (
            jax.make_mesh((4, 2), ("x", "y")),
            jax.jit(gradient),
        ),  # only within `jit` has JAX them on explicit meshes
    ):
        got = take(jaxckpt.restore(path, mesh=mesh))
        np.testing.assert_allclose(got["w"], want["w"], rtol=1e-4, atol=1e-4)


def test_a_function_that_names_a_mesh_needs_its_devices(path: pathlib.Path) -> None:
    mesh = make_mesh({"x": 4})

    def f(tree: Any) -> Any:
        return jax.lax.with_sharding_constraint(tree * 2, P("x"))

    with jax.set_mesh(mesh):
        jaxckpt.save(path, jnp.arange(8.0), programs={"f": program(f)})
    entry = jaxckpt.open(path).manifest.programs["f"]
    assert entry.devices == 4
    bound = jaxckpt.open(path).program("f", trust=True, sharding=NamedSharding(mesh, P()))
    assert bound().sharding.spec == P("x")
    with pytest.raises(MismatchError, match="for 4 devices, and here are 2"):
        check_entry("f", entry, jax_version="0.10.2", platforms={"cpu"}, device_count=2)


# --- jax.export.Exported --------------------------------------------------------------------------------------


def test_exported_functions_are_taken_as_they_are(path: pathlib.Path) -> None:
    traces = []

    def f(tree: Any, x: Any) -> Any:
        traces.append(1)
        return x @ tree.first + tree.second

    tree = Pair(jnp.ones((8, 3)), jnp.arange(3.0))
    exported = jax.export.export(jax.jit(f), platforms=["cpu", "cuda"])(
        Pair(struct(8, 3), struct(3)), symbolic_batch()
    )
    with CheckpointManager(path, programs={"f": exported}) as manager:
        manager.save(1, tree)
        manager.save(2, tree, programs={"f": exported})
    first, second = (only_program(path / f"step_{step:08}") for step in (1, 2))
    assert first.samefile(second)
    assert len(traces) == 1
    checkpoint = jaxckpt.open(path / "step_00000002")
    opened = checkpoint.program("f", trust=True)
    assert (opened.platforms, opened.vjp_order) == (("cpu", "cuda"), 1)
    np.testing.assert_array_equal(opened(X), np.asarray(jax.jit(f)(tree, X)))
    for wrong, message in (
        ((tree.first, tree.second), "must have the same pytree structure"),
        (Pair(tree.first[:4], tree.second), "Shape mismatch"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            jaxckpt.save(path / "wrong", wrong, programs={"f": exported})
        assert any("program 'f'" in note for note in caught.value.__notes__)
    assert not (path / "wrong").exists()


def test_a_function_exported_for_several_devices_is_taken(path: pathlib.Path) -> None:
    mesh = make_mesh({"x": 4})
    rows = NamedSharding(mesh, P("x"))
    function = jax.jit(
        lambda tree, x: x @ tree, in_shardings=(NamedSharding(mesh, P()), rows), out_shardings=rows
    )
    exported = jax.export.export(function)(struct(3, 2), struct(8, 3))
    jaxckpt.save(path, jnp.ones((3, 2)), programs={"f": exported})
    result = jaxckpt.open(path).program("f", trust=True, sharding=NamedSharding(mesh, P()))(
        np.ones((8, 3), np.float32)
    )
    np.testing.assert_array_equal(result, np.full((8, 2), 3))
    assert result.sharding.spec == P("x")


def test_what_is_no_program_is_refused_before_anything_is_written(path: pathlib.Path) -> None:
    no_arguments = jax.export.export(jax.jit(lambda: 1.0))()
    refused: list[tuple[Any, str]] = [
        ({"f": lambda tree: tree}, "give a jaxckpt.Program or a jax.export.Exported"),
        ({"f": no_arguments}, "takes the tree first"),
        ({"": program(lambda tree: tree)}, "not empty"),
        ({1: program(lambda tree: tree)}, "not 1"),
        ({"f": program(lambda tree, name: tree, "text")}, "are no arrays"),
        ({"f": program(lambda tree: object())}, "returns a object, which is no array"),
    ]
    for programs, message in refused:
        with pytest.raises(TypeError, match=message):
            jaxckpt.save(path, 1.0, programs=programs)
    wrong: list[dict[str, Any]] = [{"platforms": ()}, {"platforms": "cpu"}, {"vjp_order": -1}]
    for arguments in wrong:
        with pytest.raises(ValueError, match=next(iter(arguments))):
            Program(lambda tree: tree, **arguments)
    with pytest.raises(TypeError, match="not int"):
        Program(3)  # type: ignore[arg-type]
    assert not path.exists()


def test_a_function_that_fails_names_its_program(path: pathlib.Path) -> None:
    for save in (jaxckpt.save, jaxckpt.save_async):
        with pytest.raises(KeyError, match="absent") as caught:
            save(
                path,
                {"w": 1.0},
                programs={"good": program(lambda tree: tree), "bad": program(lambda tree: tree["absent"])},
            )
        assert any(
            "the program 'bad' was exported; nothing was written" in note for note in caught.value.__notes__
        )
    assert not path.exists()


# --- nothing embedded -----------------------------------------------------------------------------------------


def only_program(path: pathlib.Path) -> pathlib.Path:
    (found,) = path.glob("data-*/programs/*")
    return found


def test_a_program_is_as_small_whatever_the_size_of_the_weights(path: pathlib.Path) -> None:
    sizes = []
    for size in (4, 1000):
        jaxckpt.save(
            path, jnp.ones((size, size)), programs={"f": program(lambda tree: tree @ tree)}, overwrite=True
        )
        sizes.append(only_program(path).stat().st_size)
    assert abs(sizes[0] - sizes[1]) < 200
    assert max(sizes) < 10_000


@pytest.mark.parametrize("kind", ["jax", "numpy", "key"])
@pytest.mark.parametrize("place", ["plain", "jit", "scan", "remat"])
def test_leaves_that_a_function_brings_along_are_refused(path: pathlib.Path, kind: str, place: str) -> None:
    leaf: Any = {
        "jax": jnp.ones(3),
        "numpy": np.ones(3, np.float32),
        "key": jax.random.split(jax.random.key(0), 3),
    }[kind]

    def bring(x: Any) -> Any:
        return x + (jax.random.normal(leaf[0]) if kind == "key" else jnp.asarray(leaf))

    def f(tree: Any, x: Any) -> Any:
        if place == "scan":
            return jax.lax.scan(lambda carry, _: (bring(carry), None), x, None, length=2)[0]
        return {"plain": bring, "jit": jax.jit(bring), "remat": jax.checkpoint(bring)}[place](x)

    with pytest.raises(ValueError, match=r"as constants: params/0\n.*from the tree"):
        jaxckpt.save(path, {"params": [leaf]}, programs={"f": program(f, struct(3))})
    assert not path.exists()


def test_large_constants_are_logged(path: pathlib.Path, caplog: pytest.LogCaptureFixture) -> None:
    table = np.ones(1 << 18, np.float32)
    with caplog.at_level(logging.WARNING, "jaxckpt"):
        jaxckpt.save(path, 1.0, programs={"f": program(lambda tree: tree * jnp.asarray(table[:1000]).sum())})
        assert not caplog.records
        jaxckpt.save(
            path, 1.0, programs={"f": program(lambda tree: tree * jnp.asarray(table).sum())}, overwrite=True
        )
    assert "the program 'f' holds 1048576 bytes of constants" in caplog.text


# --- programs alone -------------------------------------------------------------------------------------------


def test_programs_alone_run_on_the_values_of_another_checkpoint(tmp_path: pathlib.Path) -> None:
    shapes = {"w": struct(8, 3), "key": jax.eval_shape(lambda: jax.random.key(0))}
    f = program(lambda tree, x: x @ tree["w"] + jax.random.normal(tree["key"]), symbolic_batch())
    jaxckpt.save(tmp_path / "alone", shapes, programs={"f": f, "one": program(lambda tree: jnp.ones(2))})
    jaxckpt.save(tmp_path / "values", {"w": jnp.ones((8, 3)), "key": jax.random.key(2)}, programs={"f": f})
    alone = jaxckpt.open(tmp_path / "alone")
    assert (len(alone), alone.programs) == (0, ("f", "one"))
    with pytest.raises(MismatchError, match="holds programs and no values"):
        alone.program("f", trust=True)
    free = alone.program("f", trust=True, bind=False)
    assert jax.tree.structure(free.tree) == jax.tree.structure(shapes)
    assert free.tree["w"].shape == (8, 3)
    values = jaxckpt.restore(tmp_path / "values", free.tree)
    want = jaxckpt.open(tmp_path / "values").program("f", trust=True)(X)
    np.testing.assert_array_equal(free.bind(values)(X), want)
    assert alone.program("one", trust=True)().tolist() == [1, 1]
    assert jaxckpt.verify(tmp_path / "alone").ok
    with pytest.raises(MismatchError, match="holds programs and no values"):
        jaxckpt.restore(tmp_path / "alone")
    with pytest.raises(MismatchError, match="w"):
        jaxckpt.restore(tmp_path / "alone", free.tree)


def test_a_tree_of_shapes_and_values_is_refused(path: pathlib.Path) -> None:
    with pytest.raises(jaxckpt.UnsupportedLeafError, match="b: is a ShapeDtypeStruct"):
        jaxckpt.save(path, {"a": 1.0, "b": struct(2)}, programs={"f": program(lambda tree: tree["a"])})
    with pytest.raises(jaxckpt.UnsupportedLeafError, match="b: is a ShapeDtypeStruct"):
        jaxckpt.save(path, {"b": struct(2)})


# --- what may go wrong ----------------------------------------------------------------------------------------


@pytest.fixture
def simple(path: pathlib.Path) -> pathlib.Path:
    jaxckpt.save(path, {"w": jnp.arange(3.0)}, programs={"f": program(lambda tree: tree["w"] * 2)})
    return path


def test_a_program_is_refused_without_trust(simple: pathlib.Path) -> None:
    checkpoint = jaxckpt.open(simple)
    refused: list[dict[str, Any]] = [
        {},
        {"trust": False},
        {"trust": 1},
        {"trust": "yes"},
        {"trust": np.True_},
    ]
    for trust in refused:
        with pytest.raises(UntrustedProgramError, match=r"is code.*\n.*trust=True"):
            checkpoint.program("f", **trust)
    with pytest.raises(KeyError, match=r"no program .* it has 'f'"):
        checkpoint.program("g", trust=True)


def test_restore_never_reads_a_program(simple: pathlib.Path) -> None:
    damaged = only_program(simple)
    damaged.write_bytes(b"garbage")
    assert jaxckpt.restore(simple)["w"].tolist() == [0, 1, 2]
    assert jaxckpt.open(simple)["w"][...].tolist() == [0, 1, 2]
    assert jaxckpt.describe(simple).programs[0].name == "f"
    damaged.unlink()
    assert jaxckpt.restore(simple)["w"].tolist() == [0, 1, 2]


def test_damaged_programs_are_found_before_they_are_opened(simple: pathlib.Path) -> None:
    damaged = only_program(simple)
    good = damaged.read_bytes()
    choose = random.Random(0)
    flips = [choose.randrange(8 * len(good)) for _ in range(12)]
    contents = [bytes_with_flipped_bit(good, bit) for bit in flips]
    contents += [good[:length] for length in (0, 1, len(good) // 2, len(good) - 1)] + [good + b"\0"]
    for content in [*contents, None]:
        damaged.unlink(missing_ok=True)
        if content is not None:
            damaged.write_bytes(content)
        with pytest.raises(CorruptError, match=damaged.name):
            jaxckpt.open(simple).program("f", trust=True)
        report = jaxckpt.verify(simple)
        assert not report.ok
        assert damaged.name in str(report)
    damaged.write_bytes(good)
    assert jaxckpt.open(simple).program("f", trust=True)().tolist() == [0, 2, 4]


def test_a_program_must_have_the_sha256_of_the_manifest(simple: pathlib.Path) -> None:
    fields = read_payload(simple)
    fields["programs"]["f"]["sha256"] = bytes(32)
    write_payload(simple, fields)
    with pytest.raises(CorruptError, match="sha256 is not that of the manifest"):
        jaxckpt.open(simple).program("f", trust=True)


def bytes_with_flipped_bit(data: bytes, bit: int) -> bytes:
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def replace_program(path: pathlib.Path, data: Any, **changes: Any) -> None:
    """Puts other bytes in the place of the program, with checksums and a manifest that fit them."""
    found = only_program(path)
    found.write_bytes(data)
    manifest = jaxckpt.open(path).manifest
    entry = dataclasses.replace(
        manifest.programs["f"], length=len(data), sha256=hashlib.sha256(data).digest(), **changes
    )
    objects = tuple(
        StoredObject(each.name, len(data), xxhash.xxh3_128_digest(data)) if each.name == entry.name else each
        for each in manifest.objects
    )
    changed = dataclasses.replace(manifest, programs={"f": entry}, objects=objects)
    (path / "manifest.msgpack").write_bytes(encode_manifest(changed))


def test_garbage_with_the_right_checksums_is_refused(simple: pathlib.Path) -> None:
    good = only_program(simple).read_bytes()
    signature, functions = decode_program(good, "here")
    blob = functions["cpu"]
    exported = jax.export.deserialize(bytearray(blob)).mlir_module_serialized
    leaf = signature.tree.leaves[0]

    def with_leaf(**changes: Any) -> bytes:
        leaves = (dataclasses.replace(leaf, **changes),)
        return encode_program(
            dataclasses.replace(signature, tree=dataclasses.replace(signature.tree, leaves=leaves)), functions
        )

    contents = [
        b"",
        b"\xc0",
        b"garbage",
        msgpack.packb({"not": "a list"}),
        msgpack.packb(["jaxckpt-program", {}, {}]),
        msgpack.packb([*msgpack.unpackb(good)[:2], {"cpu": "text"}]),
        msgpack.packb(["another-program", *msgpack.unpackb(good)[1:]]),
        msgpack.packb([*msgpack.unpackb(good)[:2], "text"]),
        good[:-1],
        good + b"\0",
        encode_program(signature, {}),
        encode_program(signature, {"tpu": blob}),
        encode_program(signature, {"cpu": b""}),
        encode_program(signature, {"cpu": b"\xff" * 64}),
        encode_program(signature, {"cpu": blob[: len(blob) // 2]}),
        encode_program(signature, {"cpu": blob.replace(exported, bytes(len(exported)))}),
        with_leaf(dtype="float64"),
        with_leaf(dtype="no dtype"),
        with_leaf(shape=(4,)),
        with_leaf(shape=(3, 1)),
        with_leaf(shape=(-1,)),
        with_leaf(impl="no implementation"),
        with_leaf(impl="rbg"),
        with_leaf(is_used=False),
        with_leaf(constant=["unknown", 1]),
        encode_program(dataclasses.replace(signature, input_names=("x",)), functions),
        encode_program(dataclasses.replace(signature, intermediates={"h": leaf}), functions),
        encode_program(dataclasses.replace(signature, outputs=signature.tree), functions),
    ]
    for content in contents:
        replace_program(simple, content)
        with pytest.raises(FormatError, match="can be restored without it"):
            jaxckpt.open(simple).program("f", trust=True)
    assert jaxckpt.verify(simple).ok
    assert jaxckpt.restore(simple)["w"].tolist() == [0, 1, 2]
    replace_program(simple, good)
    assert jaxckpt.open(simple).program("f", trust=True)().tolist() == [0, 2, 4]


def test_changed_signatures_and_functions_never_end_the_process(simple: pathlib.Path) -> None:
    """JAX's own reader of StableHLO is left out: it is native code, and made for bytes that somebody vouches for."""
    good = only_program(simple).read_bytes()
    _, functions = decode_program(good, "here")
    module = jax.export.deserialize(bytearray(functions["cpu"])).mlir_module_serialized
    begin = good.index(module)
    outside = [*range(begin), *range(begin + len(module), len(good))]
    entry = jaxckpt.open(simple).manifest.programs["f"]
    choose = random.Random(1)
    outcomes = collections.Counter[str]()
    for _ in range(200):
        bits = [8 * choose.choice(outside) + choose.randrange(8) for _ in range(choose.choice([1, 1, 3]))]
        data = functools.reduce(bytes_with_flipped_bit, bits, good)
        try:
            opened = open_program("f", entry, data, "here")
            str(opened)
            opened.bind({"w": jnp.arange(3.0)})
            outcomes["opened"] += 1
        except (FormatError, MismatchError):
            outcomes["refused"] += 1
    assert min(outcomes["opened"], outcomes["refused"]) > 20, outcomes


@pytest.mark.parametrize(
    "change",
    [
        {"jax": 3},
        {"sha256": b"short"},
        {"sha256": "text"},
        {"length": -1},
        {"length": 2**40},
        {"length": 5},
        {"name": "../escape"},
        {"name": "nowhere"},
        {"platforms": []},
        {"platforms": [1]},
        {"platforms": "cpu"},
        {"devices": -1},
        {"devices": "1"},
        {"convention": 1.5},
        {"vjp_order": None},
        {"created_s": float("nan")},
        {"inputs": [1]},
        {"inputs": [["a", "b", "c"]]},
        {"outputs": {}},
        None,
    ],
)
def test_hostile_manifests_are_refused(simple: pathlib.Path, change: dict[str, Any] | None) -> None:
    fields = read_payload(simple)
    fields["programs"]["f"] = None if change is None else fields["programs"]["f"] | change
    write_payload(simple, fields)
    with pytest.raises(FormatError):
        jaxckpt.open(simple)


def test_a_manifest_may_know_more_of_a_program(simple: pathlib.Path) -> None:
    fields = read_payload(simple)
    fields["programs"]["f"]["later"] = 1
    write_payload(simple, fields)
    assert jaxckpt.open(simple).program("f", trust=True)().tolist() == [0, 2, 4]
    wrong: list[Any] = [[], {"": fields["programs"]["f"]}, {1: fields["programs"]["f"]}]
    for programs in wrong:
        write_payload(simple, fields | {"programs": programs})
        with pytest.raises(FormatError):
            jaxckpt.open(simple)


def read_payload(path: pathlib.Path) -> dict[str, Any]:
    return msgpack.unpackb(msgpack.unpackb((path / "manifest.msgpack").read_bytes())[2], strict_map_key=False)


def write_payload(path: pathlib.Path, fields: dict[str, Any]) -> None:
    payload = bytes(msgpack.packb(fields) or b"")
    framed = bytes(msgpack.packb(["jaxckpt", xxhash.xxh3_128_digest(payload), payload]) or b"")
    (path / "manifest.msgpack").write_bytes(framed)


HERE: dict[str, Any] = {"jax_version": "0.10.2", "platforms": {"cpu"}, "device_count": 8}


def test_no_path_of_the_machine_is_in_a_program(tmp_path: pathlib.Path) -> None:
    """So that the same function has the same bytes wherever its source lies, and is stored once over restarts."""
    source = "def predict(tree, x):\n    return checkpoint_name(jnp.tanh(x @ tree['w']), 'hidden') * 2\n"
    limit = jax.config.jax_traceback_in_locations_limit  # type: ignore[attr-defined]
    programs = {}
    for name, text in (("first", source), ("second", f"\n\n{source}")):
        file = tmp_path / f"{name}.py"
        file.write_text(text)
        namespace: dict[str, Any] = {"checkpoint_name": checkpoint_name, "jnp": jnp}
        exec(compile(text, str(file), "exec"), namespace)
        programs[name] = program(namespace["predict"], struct(2, 3), vjp_order=1)
    jaxckpt.save(tmp_path / "a", {"w": jnp.ones((3, 4))}, programs=programs)
    checkpoint = jaxckpt.open(tmp_path / "a")
    data = checkpoint.read_program("first")
    assert b".py" not in data
    assert str(tmp_path).encode() not in data
    assert checkpoint.read_program("second") == data
    assert len({entry.name for entry in checkpoint.manifest.programs.values()}) == 1
    assert jax.config.jax_traceback_in_locations_limit == limit  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("changes", "here", "error", "message"),
    [
        ({}, {}, None, ""),
        ({"devices": 8}, {}, None, ""),
        ({"platforms": ("tpu", "cpu")}, {}, None, ""),
        ({"jax": "0.12.0"}, {}, None, ""),
        ({}, {"jax_version": "1.2"}, None, ""),
        ({}, {"jax_version": "0.9.1"}, FormatError, "this is jax 0.9.1: opening programs needs jax 0.10"),
        ({"convention": 99}, {}, FormatError, "which is too old to call it: install jax 0.10.2"),
        ({"convention": 1}, {}, FormatError, "does not call programs that old any more: export it again"),
        ({"platforms": ("tpu",)}, {}, MismatchError, "for tpu, and here is cpu: export it with platforms="),
        ({"devices": 9}, {}, MismatchError, "for 9 devices, and here are 8"),
    ],
)
def test_what_cannot_run_here_is_refused_by_its_entry(
    changes: dict[str, Any], here: dict[str, Any], error: Any, message: str
) -> None:
    entry = ProgramEntry(
        name="programs/f",
        length=1,
        sha256=bytes(32),
        jax="0.10.2",
        jaxlib="0.10.2",
        created_s=0.0,
        platforms=("cpu",),
        devices=1,
        convention=jax.export.maximum_supported_calling_convention_version,
        vjp_order=0,
        inputs=(),
        outputs=(),
        intermediates=(),
    )
    entry = dataclasses.replace(entry, **changes)
    if error is None:
        check_entry("f", entry, **(HERE | here))
        return
    with pytest.raises(error, match=message):
        check_entry("f", entry, **(HERE | here))


def test_a_foreign_program_is_refused_before_its_bytes_are_read(simple: pathlib.Path) -> None:
    replace_program(simple, b"garbage", platforms=("tpu",))
    with pytest.raises(MismatchError, match="exported for tpu"):
        jaxckpt.open(simple).program("f", trust=True)


def test_the_format_is_enough_to_run_a_program(path: pathlib.Path) -> None:
    """Written from section 21 of FORMAT.md; of jaxckpt it knows nothing."""
    tree: Any = {"w": jnp.arange(3.0), "key": jax.random.key(4), "unused": jnp.ones(9), "name": "text"}

    def f(tree: Any, x: Any) -> Any:
        return [
            checkpoint_name(x * tree["w"], "hidden") + jax.random.normal(tree["key"], (3,)),
            tree["name"],
            7,
        ]

    jaxckpt.save(path, tree, programs={"f": program(f, struct(3))})
    manifest = read_payload(path)
    entry = manifest["programs"]["f"]
    data = (path / entry["name"]).read_bytes()
    assert (len(data), hashlib.sha256(data).digest()) == (entry["length"], entry["sha256"])
    assert (entry["devices"], entry["platforms"], entry["vjp_order"]) == (1, ["cpu"], 0)
    magic, signature, functions = msgpack.unpackb(data)
    assert (magic, list(functions)) == ("jaxckpt-program", ["cpu"])
    nodes, keys, forms = signature["tree"]
    assert (nodes, keys) == (manifest["tree"], manifest["keys"])
    described = dict(zip(keys, forms, strict=True))
    assert described == {
        "key": ["uint32", [2], False, "threefry2x32", True, None],
        "name": ["", [], False, None, False, None],
        "unused": ["float32", [9], False, None, False, None],
        "w": ["float32", [3], False, None, True, None],
    }
    assert signature["input_names"] == ["x"]
    assert signature["inputs"] == [[["tuple", 1], 0], ["0"], [["float32", [3], False, None, True, None]]]
    nodes, keys, forms = signature["outputs"]
    assert (nodes, keys) == ([["list", 3], 0, 0, 0], ["0", "1", "2"])
    assert [form[5] for form in forms] == [None, ["str", "text"], None]
    assert signature["intermediates"] == [["hidden", ["float32", [3], False, None, True, None]]]
    arrays = {"w": np.arange(3, dtype=np.float32), "key": np.asarray(jax.random.key_data(tree["key"]))}
    outputs, named = jax.export.deserialize(bytearray(functions["cpu"])).call(
        arrays, {"0": np.ones(3, np.float32)}
    )
    want = jax.jit(lambda tree: f({**tree, "name": ""}, np.ones(3, np.float32))[0])(tree_without_text(tree))
    np.testing.assert_array_equal(outputs["0"], want)
    assert int(outputs["2"]) == 7
    assert named["hidden"].tolist() == [0, 1, 2]


def tree_without_text(tree: dict[str, Any]) -> dict[str, Any]:
    return {key: leaf for key, leaf in tree.items() if key != "name"}


# --- stored once ----------------------------------------------------------------------------------------------


def programs_of(directory: pathlib.Path) -> list[os.stat_result]:
    return [only_program(step).stat() for step in sorted(directory.glob("step_*"))]


def test_the_steps_of_a_run_share_one_program(path: pathlib.Path) -> None:
    traces = []

    def f(tree: Any) -> Any:
        traces.append(1)
        return tree["w"] * 2

    table = np.random.default_rng(0).normal(size=50_000).astype(np.float32)
    programs = {"f": program(f), "large": program(lambda tree: tree["w"] + jnp.asarray(table))}
    programs["same"] = programs["f"]
    with CheckpointManager(path, max_to_keep=2, programs=programs) as manager:
        for step in range(4):
            manager.save(step, {"w": jnp.float32(step)})
    assert len(traces) == 1
    (large,) = {
        file.stat().st_ino
        for file in path.glob("step_*/data-*/programs/*")
        if file.stat().st_size > table.nbytes
    }
    # Another run, after all steps that it began with are gone.
    with CheckpointManager(path, max_to_keep=1, programs=programs) as manager:
        manager.save(4, {"w": jnp.float32(4)})
        manager.save(5, {"w": jnp.float32(5)})
        manager.save(5, {"w": jnp.float32(5)}, overwrite=True)
        manager.wait()
    (step,) = path.glob("step_*")
    assert {file.stat().st_ino for file in step.glob("data-*/programs/*")} >= {large}
    assert len(list(step.glob("data-*/programs/*"))) == 2
    checkpoint = manager.open()
    for name, want in (("f", 10.0), ("same", 10.0), ("large", 5 + table[7])):
        result = np.ravel(checkpoint.program(name, trust=True)())
        assert result[7 % len(result)] == np.float32(want)
    assert len(traces) == 1
    assert jaxckpt.verify(checkpoint).ok


def test_the_bytes_of_a_program_are_there_once(path: pathlib.Path) -> None:
    table = np.random.default_rng(0).normal(size=250_000).astype(np.float32)
    with CheckpointManager(path, programs={"f": program(lambda tree: tree + jnp.asarray(table))}) as manager:
        for step in range(5):
            manager.save(step, jnp.float32(step))
    blocks = {file.stat().st_ino: file.stat().st_blocks for file in path.rglob("*") if file.is_file()}
    assert sum(blocks.values()) * 512 < 1.5 * table.nbytes
    assert {status.st_nlink for status in programs_of(path)} == {5}


def test_a_program_is_stored_again_where_it_cannot_be_linked(path: pathlib.Path) -> None:
    kernel = RefusingKernel(errno.EPERM, ("link",), is_lasting=True)
    store = LocalStore(str(path), kernel=kernel)
    with CheckpointManager(store, programs={"f": program(lambda tree: tree * 2)}) as manager:
        for step in range(3):
            manager.save(step, jnp.float32(step))
    assert len(kernel.refused) == 2
    assert len({status.st_ino for status in programs_of(path)}) == 3
    assert float(jaxckpt.open(path / "step_00000002").program("f", trust=True)()) == 4.0


@pytest.mark.parametrize("damage", ["flipped", "short", "gone"])
def test_a_damaged_program_is_not_shared(path: pathlib.Path, damage: str) -> None:
    with CheckpointManager(path, programs={"f": program(lambda tree: tree * 2)}) as manager:
        manager.save(1, jnp.float32(1))
        manager.wait()
        first = only_program(path / "step_00000001")
        data = first.read_bytes()
        if damage == "gone":
            first.unlink()
        else:
            first.write_bytes(data[:-1] if damage == "short" else bytes_with_flipped_bit(data, 8))
        manager.save(2, jnp.float32(2))
    assert only_program(path / "step_00000002").read_bytes() == data
    assert float(jaxckpt.open(path / "step_00000002").program("f", trust=True)()) == 4.0


def test_another_tree_gets_another_program(path: pathlib.Path) -> None:
    with CheckpointManager(path, programs={"f": program(lambda tree: tree["w"] * 2)}) as manager:
        manager.save(1, {"w": jnp.ones(2)})
        manager.save(2, {"w": jnp.ones(3)})
        manager.save(3, {"w": jnp.ones(3)}, programs={})
    assert jaxckpt.open(path / "step_00000002").program("f", trust=True)().tolist() == [2, 2, 2]
    assert (
        len({status.st_ino for status in (only_program(path / f"step_0000000{n}").stat() for n in (1, 2))})
        == 2
    )
    assert jaxckpt.open(path / "step_00000003").programs == ()


def test_an_async_save_does_not_export_again(path: pathlib.Path) -> None:
    traces = []

    def f(tree: Any) -> Any:
        traces.append(1)
        return tree

    programs = {"f": program(f)}
    for _ in range(3):
        jaxckpt.save_async(path, {"w": 1.0}, programs=programs, overwrite=True).wait()
    assert len(traces) == 1
    assert float(jaxckpt.open(path).program("f", trust=True)()["w"]) == 1.0


# --- groups of processes --------------------------------------------------------------------------------------


def save_and_run(worker: Worker, path: str, local: bool) -> tuple[int, list[float], list[str]]:
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = NamedSharding(mesh, P("x"))
    w = jax.make_array_from_callback((4,), rows, lambda index: np.arange(4, dtype=np.float32)[index])
    traces = []

    def f(tree: Any, x: Any) -> Any:
        traces.append(1)
        return (tree["w"] * x).sum()

    options = jaxckpt.SaveOptions(timeout_s=20)
    programs = {"f": program(f, struct())}
    with CheckpointManager(path, programs=programs, local=local, options=options) as manager:
        for step in (1, 2):
            manager.save(step, {"w": w})
        manager.wait()
        bound = manager.open(2).program("f", trust=True)
        results = [float(bound(np.float32(number))) for number in (1, 2)]
    errors = []
    alone = {"f": program(lambda tree: tree["w"])}
    jaxckpt.save(f"{path}-alone", {"w": struct(4)}, programs=alone, local=local, options=options)
    bad = {"f": program(lambda tree: tree["absent"])}
    try:
        jaxckpt.save(f"{path}-bad", {"w": w}, programs=bad, local=local, options=options)
    except (KeyError, jaxckpt.CheckpointError) as error:
        errors.append(f"{type(error).__name__}: {error}")
    return len(traces), results, errors


@pytest.mark.parametrize("local", [False, True])
def test_process_0_exports_and_all_can_open(path: pathlib.Path, local: bool) -> None:
    outcomes = run_processes(save_and_run, 2, arguments=(str(path), local))
    assert [outcome.error_text for outcome in outcomes] == ["", ""]
    for index, outcome in enumerate(outcomes):
        traces, results, errors = outcome.value
        assert traces == (1 if local or index == 0 else 0)
        assert results == [6.0, 12.0]
        (error,) = errors
        assert "absent" in error
    inodes = {file.stat().st_ino for file in path.rglob("programs/*")}
    assert len(inodes) == (2 if local else 1)
    assert not list(path.parent.glob("*-bad/**/manifest.msgpack"))
    alone = jaxckpt.open(path.with_name(f"{path.name}-alone") / ("process-0" if local else "."))
    assert alone.program("f", trust=True, bind=False)({"w": jnp.ones(4)}).tolist() == [1, 1, 1, 1]


# --- the command ----------------------------------------------------------------------------------------------


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture
def shell(tmp_path: pathlib.Path) -> pathlib.Path:
    """A directory with a checkpoint ``a`` of two programs, and inputs for them."""

    def both(tree: Any, x: Any, batch: Any) -> Any:
        hidden = checkpoint_name(x * tree["w"], "hidden")
        return {
            "file": hidden.sum() + batch["bias"].sum(),
            "half": (hidden / 2).astype(jnp.bfloat16),
            "key": tree["key"],
        }

    programs = {
        "predict": program(lambda tree, x: x @ tree["m"], symbolic_batch()),
        "both": program(both, struct(3), {"bias": struct(2, dtype=jnp.bfloat16)}),
    }
    tree = {"m": jnp.ones((8, 3)), "w": jnp.arange(3.0), "key": jax.random.key(3), "name": "text"}
    jaxckpt.save(tmp_path / "a", tree, programs=programs)
    np.save(tmp_path / "x.npy", X)
    np.save(tmp_path / "v.npy", np.array([1, 2, 3], np.float32))
    np.save(tmp_path / "bias.npy", np.array([0.5, 1.5], jnp.bfloat16))
    everything: Any = {"x": np.array([1, 2, 3], np.float32), "batch/bias": np.ones(2, jnp.bfloat16)}
    np.savez(tmp_path / "all.npz", **everything)
    (tmp_path / "text.npy").write_text("no array")
    return tmp_path


def test_info_shows_programs(capsys: Any, shell: pathlib.Path) -> None:
    code, out, _ = run(capsys, "info", shell / "a")
    assert code == 0
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert "program predict(tree, x: float32[b,8])" in lines
    assert "returns output: float32[b,3]" in lines
    assert "program both(tree, x: float32[3], batch/bias: bfloat16[2])" in lines
    assert "returns file: float32[], half: bfloat16[3], key: key<threefry2x32>[]" in lines
    assert "inside hidden: float32[3]" in lines
    assert sum(line.startswith("size") and line.endswith("KiB, for cpu") for line in lines) == 2
    code, out, _ = run(capsys, "info", "--json", shell / "a")
    both, predict = sorted(json.loads(out)["programs"], key=lambda each: each["name"])
    assert predict["inputs"] == {"x": "float32[b,8]"}
    assert predict["outputs"] == {"output": "float32[b,3]"}
    assert both["intermediates"] == {"hidden": "float32[3]"}
    sizes = {file.stat().st_size for file in shell.glob("a/data-*/programs/*")}
    assert {predict["nbytes"], both["nbytes"]} == sizes
    assert predict["versions"]["jax"] == jax.__version__


def test_run_writes_what_the_program_returns(capsys: Any, shell: pathlib.Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(shell)
    code, out, err = run(capsys, "run", "a", "predict", "--input", "x.npy", "--output", "y.npy")
    assert (code, out, err) == (0, "output: float32[16, 3]\n", "")
    np.testing.assert_allclose(np.load("y.npy"), X @ np.ones((8, 3), np.float32), rtol=1e-5)
    code, out, _ = run(
        capsys, "run", "a", "both", "--input", "v.npy", "--input", "batch/bias=bias.npy", "--output", "r.npz"
    )
    assert code == 0
    results = np.load("r.npz")
    assert sorted(results) == ["file", "half", "key"]
    assert float(results["file"]) == 2 + 6 + 2
    assert results["half"].view(jnp.bfloat16).tolist() == [0, 1, 3]
    np.testing.assert_array_equal(results["key"], jax.random.key_data(jax.random.key(3)))
    code, out, _ = run(
        capsys, "run", "a", "both", "--input", "all.npz", "--fetch", "hidden", "--fetch", "file"
    )
    assert (code, out) == (0, "hidden = [0. 2. 6.]\nfile = 10.\n")
    code, out, _ = run(capsys, "run", "--json", "a", "both", "--input", "all.npz", "--fetch", "half")
    assert json.loads(out) == {"half": {"dtype": "bfloat16", "shape": [3], "values": [0, 1, 3]}}


def test_run_takes_keys_as_their_data(path: pathlib.Path, tmp_path: pathlib.Path) -> None:
    draw = program(lambda tree, key: jax.random.normal(key, (2,)) + tree, jax.random.key(0))
    jaxckpt.save(path, jnp.float32(1), programs={"draw": draw})
    np.save(tmp_path / "key.npy", np.asarray(jax.random.key_data(jax.random.key(3))))
    arguments = [
        "run",
        str(path),
        "draw",
        "--input",
        str(tmp_path / "key.npy"),
        "--output",
        str(tmp_path / "out.npy"),
    ]
    assert main(arguments) == 0
    np.testing.assert_array_equal(
        np.load(tmp_path / "out.npy"), jax.random.normal(jax.random.key(3), (2,)) + 1
    )
    np.save(tmp_path / "key.npy", np.zeros(5, np.uint32))
    assert main(arguments) == 2


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["both"], 2, "no value for x, batch/bias"),
        (["predict", "--input", "x.npy", "--input", "v.npy"], 2, "takes x: float32"),
        (["predict", "--input", "y=x.npy"], 2, "y is not an input"),
        (["predict", "--input", "x=x.npy", "--input", "x=x.npy"], 2, "x was given twice"),
        (["predict", "--input", "absent.npy"], 2, "cannot read absent.npy"),
        (["predict", "--input", "text.npy"], 2, "cannot read text.npy"),
        (["predict", "--input", "x=all.npz"], 2, "has names of its own"),
        (["predict", "--input", "v.npy"], 2, "x: float32[b,8] in the program, float32[3] was given"),
        (["predict", "--input", "x.npy", "--fetch", "nothing"], 2, "no value nothing"),
        (["predict", "--input", "x.npy", "--output", "y.txt"], 2, "written to .npy and .npz"),
        (["predict", "--input", "x.npy", "--output", "absent/y.npy"], 3, "absent/y.npy"),
        (["both", "--input", "all.npz", "--output", "y.npy"], 2, "takes one array, and there are 3"),
        (["absent"], 3, "no program of"),
    ],
)
def test_run_says_what_is_wrong(
    capsys: Any, shell: pathlib.Path, monkeypatch: Any, arguments: list[str], code: int, message: str
) -> None:
    monkeypatch.chdir(shell)
    found, out, err = run(capsys, "run", "a", *arguments)
    assert (found, out) == (code, "")
    assert message in err
    assert "Traceback" not in err


def test_run_of_a_damaged_program(capsys: Any, simple: pathlib.Path) -> None:
    only_program(simple).write_bytes(b"garbage")
    code, _, err = run(capsys, "run", simple, "f")
    assert code == 1
    assert only_program(simple).name in err
