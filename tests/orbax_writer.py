"""Checkpoints that Orbax itself writes for the tests, in every form that it has.

The tests run `write_all` in a program of its own, since Orbax warns and logs; `make_tree` says what is in all of them.
"""

from __future__ import annotations

import collections
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

Moments = collections.namedtuple("Moments", ["count", "mu"])  # noqa: PYI024  Orbax must not know its types

# Modes of `PyTreeCheckpointHandler`: database, Zarr v3, compressed.
HANDLERS = {
    f"{'ocdbt' if ocdbt else 'files'}-{'zarr3' if zarr3 else 'zarr2'}-{'zstd' if zstd else 'raw'}": (
        ocdbt,
        zarr3,
        zstd,
    )
    for ocdbt in (True, False)
    for zarr3 in (True, False)
    for zstd in (True, False)
}
STEPS = (3, 20, 100)


def make_mesh(first_device: int = 0) -> Mesh:
    devices = np.array(jax.devices()[first_device : first_device + 8], dtype=object).reshape(4, 2)
    return Mesh(devices, ("x", "y"), axis_types=(AxisType.Auto,) * 2)


def make_tree(*, has_text: bool = True) -> dict[str, Any]:
    """The tree of all checkpoints."""
    mesh = make_mesh()

    def put(array: Any, *spec: Any) -> jax.Array:
        return jax.device_put(array, NamedSharding(mesh, PartitionSpec(*spec)))

    odd = np.array([0x7FC00001, 0xFF800000, 0x80000000, 0x00000001], np.uint32).view(np.float32)
    tree: dict[str, Any] = {
        "params": {
            "mlp/~/linear": {
                "w": put(jnp.arange(48, dtype=jnp.float32).reshape(8, 6), "x", "y"),
                "b": put(jnp.arange(6).astype(jnp.bfloat16), "y"),
                "both": put(jnp.arange(16, dtype=jnp.int32), ("x", "y")),
                "everywhere": put(jnp.arange(3, dtype=jnp.uint8)),
            },
            "layers": [{"w": jnp.ones(2)}, ({"w": jnp.full(2, 2.0)}, jnp.float32(3))],
            "numbers": {0: jnp.arange(2), 2: jnp.arange(3), 10: jnp.arange(4)},
        },
        "opt": Moments(jnp.int32(5), {"w": jnp.zeros((2, 3))}),
        "none": None,
        "empty": {"dict": {}, "list": [], "tuple": ()},
        "types": {
            "odd": jnp.asarray(odd),
            "f8": jnp.arange(4).astype(jnp.float8_e4m3fn),
            "i4": jnp.arange(-4, 4).astype(jnp.int4),
            "c64": jnp.array([1 + 2j, -3j], jnp.complex64),
            "bool": jnp.array([True, False]),
        },
        "host": np.arange(5, dtype=np.float64),
        "count": 7,
        "rate": 0.1,
        "flag": True,
        "key": jax.random.key(3),
        "keys": jax.random.split(jax.random.key(4, impl="rbg"), 3),
        "dotted.name": jnp.ones(1),
        "third": jax.device_put(jnp.arange(2.0), jax.devices()[3]),
    }
    if has_text:
        tree["text"] = "höhe/x"
    return tree


def as_orbax_tells(tree: Any) -> Any:
    """The tree as Orbax restores it without a target."""
    if isinstance(tree, Moments):
        return {name: as_orbax_tells(child) for name, child in tree._asdict().items()}
    if isinstance(tree, dict):
        return {key: as_orbax_tells(child) for key, child in tree.items()}
    if isinstance(tree, list) or (isinstance(tree, tuple) and tree):
        return [as_orbax_tells(child) for child in tree]
    return tree


def write_all(directory: pathlib.Path) -> None:
    """Writes a checkpoint in every form; takes about six seconds."""
    import orbax.checkpoint as ocp
    from orbax.checkpoint._src.metadata.pytree_metadata_options import PyTreeMetadataOptions
    from orbax.checkpoint.experimental import v1

    tree = make_tree()
    plain = make_tree(has_text=False)
    for name, (ocdbt, zarr3, zstd) in HANDLERS.items():
        handler = ocp.PyTreeCheckpointHandler(use_ocdbt=ocdbt, use_zarr3=zarr3, use_compression=zstd)
        ocp.Checkpointer(handler).save(directory / name, tree)
    ocp.PyTreeCheckpointer().save(directory / "pytree", tree)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(directory / "standard", plain)
    for name, handler, item in (
        ("array", ocp.ArrayCheckpointHandler(), plain["params"]["mlp/~/linear"]["w"]),
        ("key", ocp.JaxRandomKeyCheckpointHandler(), jax.random.key(5)),
        ("numpy-key", ocp.NumpyRandomKeyCheckpointHandler(), np.random.RandomState(5).get_state()),
    ):
        ocp.Checkpointer(handler).save(directory / name, item)
    small_chunks = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=16), tree)
    for name, zarr3 in (("chunks", False), ("chunks-zarr3", True)):
        handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_zarr3=zarr3)
        ocp.Checkpointer(handler).save(
            directory / name, args=ocp.args.PyTreeSave(tree, save_args=small_chunks)
        )
    options = PyTreeMetadataOptions(support_rich_types=True)
    rich = ocp.PyTreeCheckpointHandler(pytree_metadata_options=options)
    ocp.Checkpointer(rich).save(directory / "rich", tree)
    v1.save(directory / "v1", tree)
    v1.save_checkpointables(directory / "v1-several", {"state": tree, "extra": {"x": jnp.arange(3)}})
    with v1.training.Checkpointer(directory / "v1-run") as checkpointer:
        for step in STEPS:
            checkpointer.save(step, {"w": jnp.full(3, step)}, metrics={"loss": 1 / step})

    options = ocp.CheckpointManagerOptions(best_fn=lambda metrics: -metrics["loss"], max_to_keep=None)
    said = {"metadata": {"project": "ours"}}
    with ocp.CheckpointManager(directory / "run", options=options, **said) as manager:
        for step in STEPS:
            items = ocp.args.Composite(
                state=ocp.args.StandardSave({**plain, "count": step}),
                config=ocp.args.JsonSave({"width": step, "names": ["a", None]}),
            )
            metrics = {"loss": abs(step - 20) + 0.5, "more": {"acc": 0.25, "note": "x"}}
            manager.save(step, args=items, metrics=metrics, custom_metadata={"step": step})
            manager.wait_until_finished()
    options = ocp.CheckpointManagerOptions(step_prefix="ckpt", step_format_fixed_length=5)
    with ocp.CheckpointManager(directory / "run-of-many", options=options) as manager:
        for step in STEPS[:2]:
            items = ocp.args.Composite(
                state=ocp.args.PyTreeSave({"w": jnp.full(3, step)}),
                array=ocp.args.ArraySave(jnp.arange(4)),
                key=ocp.args.JaxRandomKeySave(jax.random.key(step)),
                numpy=ocp.args.NumpyRandomKeySave(np.random.RandomState(step).get_state()),
                config=ocp.args.JsonSave({"width": step}),
            )
            manager.save(step, args=items)
            manager.wait_until_finished()
