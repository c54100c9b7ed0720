"""Keras 3 on JAX, in processes of their own: Keras reads the name of its backend when it is imported."""

from __future__ import annotations

import importlib.util
import pathlib

import pytest

from .helpers import ROOT, assert_goes_on_equally, run_fork

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("keras") is None, reason="keras is not installed"),
]

PRELUDE = """
import os, sys
os.environ.update(KERAS_BACKEND="jax", KERAS_HOME=sys.argv[1] + "/keras")
"""


def test_the_example(tmp_path: pathlib.Path) -> None:
    script = ROOT / "examples" / "adapters" / "keras_model.py"
    source = PRELUDE + f"import runpy; runpy.run_path({str(script)!r}, run_name='__main__')"
    printed = run_fork(source, tmp_path).stdout
    assert_goes_on_equally(printed, 3)
    assert "predictions: (2, 4)" in printed
    assert "hidden/kernel: float32" in printed
    assert printed.endswith("25 leaves are equal\n")


MODEL = """
import keras, jax, numpy as np, jaxckpt

INPUTS = np.random.default_rng(0).normal(size=(8, 3, 4)).astype("float32")
LABELS = np.arange(8) % 2

def make(seed):
    keras.utils.clear_session()
    keras.utils.set_random_seed(seed)
    policy = keras.dtype_policies.DTypePolicy("mixed_float16")
    dense = keras.layers.Dense(4, dtype=policy, name="shared")
    inner = keras.Sequential([dense, keras.layers.Dropout(0.3)], name="inner")
    inputs = keras.Input(batch_shape=(8, 3, 4))
    x = inner(inner(inputs))
    x = keras.layers.SimpleRNN(3, stateful=True, recurrent_dropout=0.1, unroll=True, name="rnn")(x)
    x = keras.layers.GaussianNoise(0.1)(x)
    outputs = keras.layers.Dense(2, name="head")(keras.layers.BatchNormalization()(x))
    model = keras.Model(inputs, outputs, name="model")
    adam = keras.optimizers.AdamW(
        keras.optimizers.schedules.CosineDecay(1e-2, 100), gradient_accumulation_steps=2, name="adam"
    )
    optimizer = keras.optimizers.LossScaleOptimizer(adam, name="scaled")
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer=optimizer, loss=loss, metrics=["accuracy", keras.metrics.MeanIoU(2, sparse_y_pred=False)])
    optimizer.build(model.trainable_variables)
    return model

def fit(model, steps):
    history = model.fit(INPUTS, LABELS, batch_size=8, epochs=steps, shuffle=False, verbose=0)
    return history.history["loss"]
"""


def test_a_model_with_all_sorts_of_variables_goes_on_equally(tmp_path: pathlib.Path) -> None:
    source = (
        PRELUDE
        + MODEL
        + """
path = sys.argv[1] + "/checkpoint"
model = make(1)
fit(model, 3)
tree = model.get_state_tree()
jaxckpt.save(path, tree)
print(*jaxckpt.open(path).keys(), sep="\\n")

again = make(2)
fit(again, 1)  # variables that are made late are there
again.set_state_tree(jaxckpt.restore(path, again.get_state_tree()))
losses = fit(model, 3), fit(again, 3)
assert losses[0] == losses[1], losses
assert len(set(losses[0])) == 3
jaxckpt.save(sys.argv[1] + "/a", model.get_state_tree())
jaxckpt.save(sys.argv[1] + "/b", again.get_state_tree())
report = jaxckpt.diff(sys.argv[1] + "/a", sys.argv[1] + "/b")
assert report.same, report

numpy_tree = model.get_state_tree(value_format="numpy_array")
jaxckpt.save(sys.argv[1] + "/c", numpy_tree)
restored = jaxckpt.restore(sys.argv[1] + "/c")
assert all(type(leaf) is np.ndarray for leaf in jax.tree.leaves(restored))

try:
    jaxckpt.save(sys.argv[1] + "/d", {"kernel": model.trainable_variables[0]})
except jaxckpt.UnsupportedLeafError as error:
    assert "kernel: is of type" in str(error) and "store its .value" in str(error), error
else:
    raise AssertionError("a variable is no array")
"""
    )
    keys = run_fork(source, tmp_path).stdout.split()
    assert "trainable_variables/inner/shared/kernel" in keys
    assert "metrics_variables/mean_io_u/total_confusion_matrix" in keys
    assert any("accumulator" in key for key in keys)
    assert any(key.endswith("dynamic_scale") for key in keys)
    assert sum(key.endswith("seed_generator_state") for key in keys) == 3
