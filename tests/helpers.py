"""What several test modules need: bitwise comparison, meshes, and programs in processes of their own."""

from __future__ import annotations

import importlib.util
import os
import pathlib
import re
import subprocess
import sys
import textwrap
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from .processes import start_program, xla_flags

ROOT = pathlib.Path(__file__).resolve().parent.parent


def make_mesh(axes: dict[str, int], *, first_device: int = 0) -> Mesh:
    """A mesh with these axes over consecutive devices."""
    count = int(np.prod(list(axes.values())))
    devices = np.array(jax.devices()[first_device : first_device + count], dtype=object)
    return Mesh(devices.reshape(tuple(axes.values())), tuple(axes), axis_types=(AxisType.Auto,) * len(axes))


def host_bytes(leaf: Any) -> bytes:
    """The bytes of an array or of typed PRNG keys, in C order."""
    if isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    return np.ascontiguousarray(np.asarray(leaf)).tobytes()


def assert_same_leaf(got: Any, want: Any, where: str = "") -> None:
    """Both leaves are of one type, dtype and shape, and equal bit for bit (NaN payloads and -0.0 included)."""
    if isinstance(want, jax.Array):
        assert isinstance(got, jax.Array), f"{where}: {type(got)}"
    else:
        assert type(got) is type(want), f"{where}: {type(got)} is not {type(want)}"
    if hasattr(want, "dtype"):
        assert got.dtype == want.dtype, f"{where}: {got.dtype} is not {want.dtype}"
        assert got.shape == want.shape, f"{where}: {got.shape} is not {want.shape}"
        assert host_bytes(got) == host_bytes(want), f"{where}: bytes differ"
    elif isinstance(want, (float, complex)):
        assert np.asarray(got).tobytes() == np.asarray(want).tobytes(), f"{where}: {got!r} is not {want!r}"
    else:
        assert got == want, f"{where}: {got!r} is not {want!r}"


def assert_same_tree(got: Any, want: Any) -> None:
    """Both trees have one structure and the same leaves, bit for bit."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    got_leaves = jax.tree_util.tree_leaves_with_path(got)
    for (place, got_leaf), want_leaf in zip(got_leaves, jax.tree.leaves(want), strict=True):
        assert_same_leaf(got_leaf, want_leaf, jax.tree_util.keystr(place))


def run_adapter(name: str, directory: pathlib.Path) -> None:
    """Runs an example of ``examples/adapters`` in this process; it ends with SystemExit if it found a difference."""
    file = ROOT / "examples" / "adapters" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"adapter_{name}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    module.main(directory)


def assert_goes_on_equally(printed: str, steps: int) -> None:
    """So many lines of an example show a loss and the same one after the restore, which is another in each line."""
    losses = re.findall(r"step \d+: loss (\S+), after the restore (\S+)", printed)
    assert len({loss for loss, _ in losses}) == steps, printed
    assert all(loss == again for loss, again in losses), printed


def assert_same_weak_types(got: Any, want: Any) -> None:
    """The leaves of both trees are weakly typed at the same places."""
    for place, (got_leaf, want_leaf) in enumerate(
        zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
    ):
        weak = [getattr(leaf, "weak_type", False) for leaf in (got_leaf, want_leaf)]
        assert weak[0] == weak[1], f"leaf {place}"


def run_program(
    source: str, *arguments: object, devices: int = 1, timeout_s: float = 120, check: bool = True
) -> subprocess.CompletedProcess[str]:
    """Runs Python source in a fresh process with so many CPU devices, the package and `tests.helpers` at hand."""
    environment = dict(os.environ)
    environment["XLA_FLAGS"] = xla_flags(devices)
    environment["JAX_PLATFORMS"] = "cpu"
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", textwrap.dedent(source), *map(str, arguments)]
    result = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=timeout_s, check=False
    )
    return _checked(result) if check else result


def run_fork(
    source: str, *arguments: object, devices: int = 1, timeout_s: float = 120, check: bool = True
) -> subprocess.CompletedProcess[str]:
    """Like `run_program`, but jax and jaxckpt are imported already, which saves a second and more.

    It does not fit programs that look at what is imported.
    """
    with start_program(source, *arguments, devices=devices) as program:
        result = program.wait(timeout_s)
    return _checked(result) if check else result


def _checked(result: subprocess.CompletedProcess[str]) -> subprocess.CompletedProcess[str]:
    if result.returncode != 0:
        raise AssertionError(f"the program ended with {result.returncode}:\n{result.stdout}\n{result.stderr}")
    return result
