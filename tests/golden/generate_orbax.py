"""Writes checkpoints with an old version of Orbax, and their values beside them.

Run it in an environment of its own that has that version, with the destination as its argument, for example:

    python3.10 -m venv old && old/bin/pip install orbax-checkpoint==0.5.23 jax==0.4.30 jaxlib==0.4.30 'numpy<2'
    old/bin/python tests/golden/generate_orbax.py tests/golden/orbax

The directories are named by the version and the mode. Git keeps no empty directories, and Orbax needs none of them.
"""

import inspect
import os
import pathlib
import shutil
import sys
from importlib.metadata import version

if __name__ == "__main__":  # before JAX looks for it
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

VERSION = version("orbax-checkpoint")


def make_tree():
    mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("x", "y"))
    sharding = NamedSharding(mesh, PartitionSpec("x", "y"))
    return {
        "sharded": jax.device_put(jnp.arange(32, dtype=jnp.float32).reshape(4, 8), sharding),
        "zeros": jnp.zeros((3, 2), jnp.float32),
        "layers": [{"w": jnp.arange(3, dtype=jnp.int32)}, {"w": jnp.arange(3, dtype=jnp.int32) + 5}],
        "half": jnp.linspace(-1, 1, 5).astype(jnp.bfloat16),
        "host": np.arange(4, dtype=np.float64),
        "count": 7,
        "rate": 0.125,
    }


def keys_and_leaves(tree, prefix=""):
    if isinstance(tree, dict):
        children = tree.items()
    elif isinstance(tree, (list, tuple)):
        children = enumerate(tree)
    else:
        yield prefix[1:], tree
        return
    for key, child in children:
        yield from keys_and_leaves(child, f"{prefix}/{key}")


def write_values(destination, tree):
    """The values of all modes and versions; bfloat16 as the bits of it."""
    arrays = {}
    for key, leaf in keys_and_leaves(tree):
        array = np.asarray(leaf)
        arrays[key.replace("/", "|")] = array.view(np.uint16) if str(array.dtype) == "bfloat16" else array
    np.savez_compressed(destination / "values.npz", **arrays)


def handler(**choices):
    known = inspect.signature(ocp.PyTreeCheckpointHandler.__init__).parameters
    missing = [name for name in choices if name not in known]
    if missing:
        raise TypeError(f"no {missing}")
    return ocp.PyTreeCheckpointHandler(**choices)


def save_pytree(path, tree):
    ocp.Checkpointer(handler()).save(path, tree)


def save_directories(path, tree):
    ocp.Checkpointer(handler(use_ocdbt=False)).save(path, tree)


def save_ocdbt(path, tree):
    ocp.Checkpointer(handler(use_ocdbt=True)).save(path, tree)


def save_zarr3(path, tree):
    ocp.Checkpointer(handler(use_zarr3=True)).save(path, tree)


def save_aggregate(path, tree):
    save_args = jax.tree_util.tree_map(lambda leaf: ocp.SaveArgs(aggregate=np.size(leaf) < 16), tree)
    try:
        ocp.Checkpointer(handler()).save(path, tree, save_args=save_args)
    except TypeError:
        ocp.Checkpointer(handler()).save(path, args=ocp.args.PyTreeSave(tree, save_args=save_args))


def save_manager(path, tree):
    options = ocp.CheckpointManagerOptions(best_fn=lambda metrics: metrics["loss"], max_to_keep=None)
    checkpointers = {
        "state": ocp.Checkpointer(handler()),
        "config": ocp.Checkpointer(ocp.JsonCheckpointHandler()),
    }
    manager = ocp.CheckpointManager(path, checkpointers, options)
    for step in (1, 12):
        items = {"state": {**tree, "count": step}, "config": {"width": step, "names": ["a", None]}}
        manager.save(step, items, metrics={"loss": 1.0 / step})
    if hasattr(manager, "wait_until_finished"):
        manager.wait_until_finished()


def main(destination):
    modes = {
        "pytree": save_pytree,
        "directories": save_directories,
        "ocdbt": save_ocdbt,
        "zarr3": save_zarr3,
        "aggregate": save_aggregate,
        "manager": save_manager,
    }
    tree = make_tree()
    for mode, save in modes.items():
        path = destination / f"{VERSION}-{mode}"
        shutil.rmtree(path, ignore_errors=True)
        try:
            save(path, tree)
        except (TypeError, ValueError, AttributeError, NotImplementedError) as error:
            print(f"{VERSION} has no mode {mode}: {str(error)[:200]}")
            for litter in destination.glob(f"{path.name}*"):
                shutil.rmtree(litter)
            continue
        print(path)
    write_values(destination, tree)


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]).resolve())
