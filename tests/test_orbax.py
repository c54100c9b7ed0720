"""Checkpoints of Orbax, read without it: all forms that it writes, its older versions, steps, damage, conversions.

`tests/orbax_writer.py` has Orbax write the checkpoints; those of older versions lie in ``tests/golden/orbax``.
"""

from __future__ import annotations

import collections
import concurrent.futures
import fcntl
import json
import math
import pathlib
import random
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore as ts
from jax.sharding import NamedSharding, PartitionSpec

import jaxckpt
from jaxckpt import (
    CheckpointError,
    CheckpointManager,
    CorruptError,
    ExistsError,
    FormatError,
    MismatchError,
    NotFoundError,
)
from jaxckpt._buckets import memory_context
from jaxckpt._cli import main
from jaxckpt._converting import convert
from jaxckpt._keys import check_nodes, flatten
from jaxckpt.interop import npz, orbax
from jaxckpt.interop._orbaxtrees import parse_shardings
from jaxckpt.interop._zarrays import _plain_errors, split_along_chunks
from jaxckpt.interop._zarrforms import FormError, parse_form

from .helpers import assert_same_leaf, assert_same_tree, make_mesh, run_fork, run_program
from .orbax_writer import HANDLERS, STEPS, as_orbax_tells, make_tree
from .processes import Worker, run_processes

GOLDEN = pathlib.Path(__file__).resolve().parent / "golden" / "orbax"
W = "params/mlp~1~0~1linear/w"
WHOLE = [*HANDLERS, "pytree", "chunks", "chunks-zarr3", "v1"]


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """What Orbax wrote, once for all workers of the session."""
    shared = tmp_path_factory.getbasetemp().parent / "jaxckpt-orbax"
    shared.mkdir(exist_ok=True)
    done = shared / "done"
    with (shared / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            program = """
                import pathlib, sys, warnings
                warnings.simplefilter("ignore")
                from tests.orbax_writer import write_all
                write_all(pathlib.Path(sys.argv[1]))
                """
            run_fork(program, shared / "written", devices=8)
            done.touch()
    return shared / "written"


@pytest.fixture
def copy(written: pathlib.Path, tmp_path: pathlib.Path) -> Any:
    """Copies a checkpoint, so that a test may damage it."""

    def copy_of(name: str) -> pathlib.Path:
        return pathlib.Path(shutil.copytree(written / name, tmp_path / "copy" / name))

    return copy_of


# --- every form -----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", WHOLE)
def test_every_form_comes_back_bit_for_bit_with_its_shardings(name: str, written: pathlib.Path):
    tree = make_tree()
    with orbax.open(written / name) as checkpoint:
        restored = orbax.read(checkpoint)
        assert_same_tree(restored, as_orbax_tells(tree))
        assert not checkpoint.is_cheaper_whole
        assert check_nodes(checkpoint.structure(), checkpoint.keys()) is None
        assert checkpoint.keys() == tuple(
            jax.tree.leaves(jax.tree.map(lambda leaf: leaf.key, checkpoint.tree()))
        )
    assert_same_placement(restored, as_orbax_tells(tree))


def assert_same_placement(got: Any, want: Any) -> None:
    for got_leaf, want_leaf in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        if isinstance(want_leaf, jax.Array):
            assert got_leaf.committed == want_leaf.committed
            assert got_leaf.sharding == want_leaf.sharding


def test_the_standard_checkpointer(written: pathlib.Path):
    tree = make_tree(has_text=False)
    assert_same_tree(orbax.read(written / "standard"), as_orbax_tells(tree))
    assert_same_tree(orbax.read(written / "standard", like=tree), tree)


def test_the_handlers_of_one_array_and_of_random_keys(written: pathlib.Path):
    """Without a manager, where the directory is the item itself."""
    want = make_tree()["params"]["mlp/~/linear"]["w"]
    restored = orbax.read(written / "array")
    assert_same_leaf(restored, want)
    assert restored.sharding == want.sharding
    assert_same_leaf(orbax.read(written / "key"), jax.random.key(5))
    state = orbax.read(written / "numpy-key")
    np.testing.assert_array_equal(state[1], np.random.RandomState(5).get_state()[1])
    assert isinstance(state, tuple)


@pytest.mark.parametrize("name", ["pytree", "v1", "files-zarr3-raw"])
def test_like_the_saved_tree_its_own_nodes_come_back(name: str, written: pathlib.Path):
    """Tuples, namedtuples and dicts of integers, which Orbax itself needs a target for."""
    tree = make_tree()
    assert_same_tree(orbax.read(written / name, like=tree), tree)


def test_where_orbax_kept_the_kinds_of_nodes_they_come_back_without_like(written: pathlib.Path):
    restored = orbax.read(written / "rich")
    assert type(restored["opt"]).__name__ == "Moments"
    assert restored["opt"]._fields == ("count", "mu")
    assert isinstance(restored["params"]["layers"][1], tuple)
    assert_same_tree(orbax.read(written / "rich", like=make_tree()), make_tree())


def test_keys_of_dicts_that_look_like_integers_have_both_keys(written: pathlib.Path):
    with orbax.open(written / "pytree") as checkpoint:
        assert "params/numbers/10" in checkpoint.keys()  # noqa: SIM118
        assert checkpoint["params/numbers/~s10"].key == "params/numbers/10"
    arrays = {number: jnp.arange(count) for number, count in ((0, 2), (2, 3), (10, 4))}
    for like in (arrays, {str(number): array for number, array in arrays.items()}):
        restored = orbax.read(written / "pytree", {"params": {"numbers": like}}, unexpected="ignore")
        assert_same_tree(restored["params"]["numbers"], like)


def test_without_saved_shardings_arrays_are_not_committed(copy: Any):
    path = copy("ocdbt-zarr3-zstd")
    (path / "_sharding").unlink()
    restored = orbax.read(path)
    assert_same_tree(restored, as_orbax_tells(make_tree()))
    assert not any(leaf.committed for leaf in jax.tree.leaves(restored) if isinstance(leaf, jax.Array))


# --- the arguments of restore ---------------------------------------------------------------------------------


def test_onto_other_meshes_and_shardings(written: pathlib.Path):
    want = np.arange(48, dtype=np.float32).reshape(8, 6)
    mesh = make_mesh({"x": 2, "z": 3}, first_device=5)
    restored = orbax.read(written / "pytree", mesh=mesh)
    w = restored["params"]["mlp/~/linear"]["w"]
    assert w.sharding == NamedSharding(mesh, PartitionSpec("x", None))
    np.testing.assert_array_equal(w, want)

    def by_key(key: str, shape: jax.ShapeDtypeStruct) -> NamedSharding:
        spec = PartitionSpec("z") if key == W.replace("/w", "/b") else PartitionSpec()
        return NamedSharding(mesh, spec)

    restored = orbax.read(written / "files-zarr2-zstd", select="params/mlp*", sharding=by_key)
    b = restored["params"]["mlp/~/linear"]["b"]
    assert len(b.sharding.device_set) == 6
    assert b.addressable_shards[0].data.shape == (2,)
    assert list(restored["params"]) == ["mlp/~/linear"]


def test_like_shapes_with_shardings_and_other_dtypes(written: pathlib.Path):
    mesh = make_mesh({"a": 3})
    sharding = NamedSharding(mesh, PartitionSpec(None, "a"))
    like = {"params": {"mlp/~/linear": {"w": jax.ShapeDtypeStruct((8, 6), jnp.float16, sharding=sharding)}}}
    with pytest.raises(MismatchError, match="dtype float32 on disk, float16 in `like`"):
        orbax.read(written / "v1", like, unexpected="ignore")
    tree, report = orbax.read(written / "v1", like, unexpected="ignore", cast=True, report=True)
    w = tree["params"]["mlp/~/linear"]["w"]
    assert (w.dtype, w.sharding) == (jnp.float16, sharding)
    np.testing.assert_array_equal(w, np.arange(48).reshape(8, 6))
    assert "key" in report.ignored


def test_renamed_reshaped_and_missing(written: pathlib.Path):
    rename = {"params/mlp~1~0~1linear": "dense"}
    nested = orbax.read(written / "pytree", select="params/mlp*", rename=rename)
    assert sorted(nested["dense"]) == ["b", "both", "everywhere", "w"]
    like = {"dense": {"w": jnp.zeros(48), "new": jnp.ones(2)}}
    restored = orbax.read(
        written / "pytree", like, rename=rename, missing="keep", unexpected="ignore", reshape=True
    )
    np.testing.assert_array_equal(restored["dense"]["w"], np.arange(48))
    assert_same_leaf(restored["dense"]["new"], jnp.ones(2))
    with pytest.raises(MismatchError) as caught:
        orbax.read(written / "pytree", {"count": jnp.float32(0), "key": jnp.zeros(2)})
    assert {problem.key: problem.kind for problem in caught.value.problems}.items() >= {
        ("count", "kind"),
        ("key", "kind"),
        (W, "unexpected"),
    }


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 3])
def test_onto_fewer_devices(devices: int, written: pathlib.Path):
    program = """
        import sys, jax
        from jaxckpt.interop import orbax
        tree = orbax.read(sys.argv[1])
        layer = tree["params"]["mlp/~/linear"]
        assert layer["w"].tolist() == [list(range(6 * row, 6 * row + 6)) for row in range(8)]
        sharding = layer["w"].sharding
        print(len(sharding.device_set), dict(sharding.mesh.shape) if hasattr(sharding, "mesh") else "")
        """
    shown = run_fork(program, written / "pytree", devices=devices).stdout.strip()
    assert shown == {1: "1", 3: "2 {'x': 1, 'y': 2}"}[devices]


# --- lazily ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["files-zarr2-zstd", "chunks-zarr3", "ocdbt-zarr3-raw"])
def test_indexing_as_numpy_does(name: str, written: pathlib.Path):
    whole = np.arange(48, dtype=np.float32).reshape(8, 6)
    with orbax.open(written / name) as checkpoint:
        leaf = checkpoint[W]
        assert (leaf.shape, leaf.dtype, checkpoint["text"].dtype) == ((8, 6), np.float32, None)
        for index in (..., 3, (slice(2, 7), 5), (slice(None), slice(1, 6, 2)), (slice(6, 1, -2),), (-1, -1)):
            np.testing.assert_array_equal(leaf[index], whole[index])
        assert checkpoint["text"][...] == "höhe/x"
        assert checkpoint["count"][...] == 7
        assert checkpoint.values() == {"count": 7, "rate": 0.1, "flag": True, "text": "höhe/x"}
        assert checkpoint.stream(W, 8, 24).tobytes() == whole.tobytes()[8:24]


def test_only_the_chunks_of_a_box_are_read(copy: Any):
    path = copy("files-zarr2-zstd")
    directory = path / "params.mlp" / "~" / "linear.w"
    chunks = [file for file in directory.iterdir() if file.name != ".zarray"]
    assert len(chunks) == 8  # of (2, 3)
    for chunk in chunks:
        if chunk.name not in ("1.0", "1.1"):
            chunk.unlink()
    with orbax.open(path) as checkpoint:
        np.testing.assert_array_equal(checkpoint[W][2:4], np.arange(12, 24, dtype=np.float32).reshape(2, 6))
        assert checkpoint.bytes_read == 2 * 6 * 4
        (left, right) = checkpoint.read_boxes(W, [((2, 0), (3, 4)), ((3, 2), (4, 6))])
        assert (left[0, 0], right[0, -1]) == (12, 23)
        assert checkpoint.bytes_read == 2 * 2 * 6 * 4  # chunks that both need count once
        with pytest.raises(CorruptError) as caught:
            checkpoint[W][0]
        assert [(problem.key, problem.kind) for problem in caught.value.problems] == [(W, "missing")]
        with pytest.raises(CorruptError, match="1 places"):
            orbax.read(checkpoint)
        kept = orbax.read(checkpoint, select="types/*")
        assert_same_tree(kept["types"], make_tree()["types"])
        assert "params" not in kept


def test_parts_along_chunks_cover_a_box_once_and_are_small():
    generator = random.Random(5)
    for _ in range(200):
        rank = generator.randint(0, 3)
        chunk = tuple(generator.randint(1, 5000) for _ in range(rank))
        hi = tuple(generator.randint(1, 5) * size + generator.randint(0, 9) for size in chunk)
        lo = tuple(generator.randint(0, size - 1) for size in hi)
        parts = list(split_along_chunks((lo, hi), chunk, 8))
        volumes = [math.prod(b - a for a, b in zip(*part, strict=True)) for part in parts]
        assert sum(volumes) == math.prod(b - a for a, b in zip(lo, hi, strict=True))
        for part_lo, part_hi in parts:
            counts = [-(-b // c) - a // c for a, b, c in zip(part_lo, part_hi, chunk, strict=True)]
            assert math.prod(counts) == 1 or math.prod(counts) * math.prod(chunk) * 8 <= 64 << 20


def test_with_little_memory_one_chunk_is_read_after_the_other(written: pathlib.Path):
    with orbax.open(written / "chunks-zarr3") as checkpoint:
        checkpoint.bound_memory(1)
        with concurrent.futures.ThreadPoolExecutor(8) as executor:
            reads = [executor.submit(checkpoint[W].__getitem__, slice(row, None)) for row in range(8)]
            for row, read in enumerate(reads):
                np.testing.assert_array_equal(read.result(60), np.arange(48).reshape(8, 6)[row:])


@pytest.mark.slow
def test_bytes_in_c_order_need_little_memory_and_no_chunk_twice(tmp_path: pathlib.Path):
    """An array that is cut along its last axis: each of its rows needs all of its chunks."""
    program = """
        import ctypes, json, pathlib, sys
        import numpy as np, tensorstore as ts
        from jaxckpt.interop import orbax

        def status(field):
            text = pathlib.Path("/proc/self/status").read_text()
            return int(text.partition(f"{field}:")[2].split()[0]) << 10

        # Otherwise the allocator keeps what is freed, another amount in each run: what is large is mapped alone.
        M_MMAP_THRESHOLD = -3
        assert ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 16) == 1
        path = pathlib.Path(sys.argv[1])
        array = np.arange(24 << 20, dtype=np.float32).reshape(4096, -1)
        spec = {"driver": "zarr", "kvstore": {"driver": "file", "path": f"{path}/w/"}}
        metadata = {"shape": array.shape, "chunks": [4096, 512], "dtype": "<f4", "compressor": None}
        ts.open({**spec, "metadata": metadata}, create=True).result().write(array).result()
        entry = {"key_metadata": [{"key": "w", "key_type": 2}],
                 "value_metadata": {"value_type": "jax.Array", "skip_deserialize": False}}
        (path / "_METADATA").write_text(json.dumps({"tree_metadata": {"('w',)": entry}}))
        with orbax.open(path) as checkpoint:
            checkpoint.bound_memory(32 << 20)
            pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
            before = status("RssAnon")
            expected = array.reshape(-1).view(np.uint8)
            step = 1 << 20
            for lo in range(0, array.nbytes, step):
                assert np.array_equal(checkpoint.stream("w", lo, lo + step), expected[lo : lo + step])
                assert status("RssAnon") - before < 48 << 20
            assert status("VmHWM") - status("VmRSS") < 48 << 20  # the files stay mapped to the end
            assert checkpoint.bytes_read == array.nbytes
        """
    run_fork(program, tmp_path / "cut")


# --- steps and items ------------------------------------------------------------------------------------------


def test_the_newest_committed_step_of_a_manager(copy: Any):
    path = copy("run")
    assert orbax.steps(path) == STEPS
    shutil.copytree(path / "100", path / "200.orbax-checkpoint-tmp-17")
    shutil.copytree(path / "100", path / "400.partial_save")
    (path / "300").mkdir()
    (path / "notes_4").write_text("no step")
    assert orbax.steps(path) == STEPS
    assert orbax.can_read(path)
    with orbax.open(path) as newest:
        assert (newest.step, newest.values()["count"]) == (100, 100)
        assert newest.items == {"config": {"width": 100, "names": ["a", None]}}
        assert newest.metrics == {"loss": 80.5, "more/acc": 0.25}
        assert newest.metadata == {"step": 100}
        assert newest.created_s is not None
    assert orbax.read(path, step=3)["count"] == 3
    assert orbax.read(path / "20")["count"] == 20
    assert orbax.read(path / "20" / "state")["count"] == 20
    with pytest.raises(NotFoundError, match="no committed step 4; the newest ones are 3, 20, 100"):
        orbax.open(path, step=4)
    with pytest.raises(NotFoundError, match="is one checkpoint, and has no step 3"):
        orbax.open(path / "20", step=3)
    with pytest.raises(NotFoundError, match="is not committed"):
        orbax.open(path / "200.orbax-checkpoint-tmp-17")
    with pytest.raises(NotFoundError, match="is not committed"):
        orbax.open(path / "200.orbax-checkpoint-tmp-17" / "state")
    assert not orbax.can_read(path / "400.partial_save")
    assert not orbax.can_read(path / "300")


def test_names_of_steps_with_prefixes_and_zeros(copy: Any):
    path = copy("run-of-many")
    assert sorted(entry.name for entry in path.iterdir() if entry.is_dir()) == ["ckpt_00003", "ckpt_00020"]
    assert orbax.steps(path) == (3, 20)
    shutil.copytree(path / "ckpt_00003", path / "other_3")
    with pytest.raises(CheckpointError, match="has step 3 twice, as 'ckpt_00003' and 'other_3'"):
        orbax.open(path)


def test_directories_of_trees_as_flax_names_them(tmp_path: pathlib.Path):
    for step in (9, 10):
        shutil.copytree(GOLDEN / "0.4.8-pytree", tmp_path / "run" / f"checkpoint_{step}")
    assert orbax.steps(tmp_path / "run") == (9, 10)
    assert orbax.open(tmp_path / "run").path.endswith("checkpoint_10")
    assert convert(tmp_path / "run", tmp_path / "own").steps == (9, 10)


def test_a_step_with_several_trees_lists_them(written: pathlib.Path):
    path = written / "run-of-many"
    with pytest.raises(CheckpointError, match=r"has 4 trees; pass one .*: 'array', 'key', 'numpy', 'state'"):
        orbax.open(path)
    with pytest.raises(NotFoundError, match="has no tree 'config'; its trees: 'array'"):
        orbax.open(path, item="config")
    assert_same_tree(orbax.read(path, item="state", step=3), {"w": jnp.full(3, 3)})
    assert_same_leaf(orbax.read(path, item="array"), jnp.arange(4))
    assert_same_leaf(orbax.read(path, item="key"), jax.random.key(20))
    expected = np.random.RandomState(20).get_state()
    state = orbax.read(path, item="numpy")
    assert isinstance(state, tuple)
    assert (state[0], *state[2:]) == (expected[0], *expected[2:])
    np.testing.assert_array_equal(state[1], expected[1])
    whole = orbax.read(path, item="*")
    assert sorted(whole) == ["array", "key", "numpy", "state"]


def test_a_tree_that_a_step_lost_is_damage_and_never_left_out(copy: Any, tmp_path: pathlib.Path):
    path = copy("run-of-many")
    step = path / "ckpt_00020"
    (step / "state" / "_METADATA").unlink()
    (step / "state" / "manifest.ocdbt").unlink()
    for _ in range(2):
        for item in ("*", "state"):
            with pytest.raises(CorruptError, match="says that it is a tree"):
                orbax.open(path, item=item)
        with pytest.raises(CorruptError, match="says that it is a tree"):
            convert(path, tmp_path / "own", overwrite=True)
        assert_same_leaf(orbax.read(path, item="key"), jax.random.key(20))
        shutil.rmtree(step / "state", ignore_errors=True)


def test_a_step_without_trees_and_items_with_directories(copy: Any):
    path = copy("run") / "100"
    document = json.loads((path / "_CHECKPOINT_METADATA").read_text())
    del document["item_handlers"]["state"]
    (path / "_CHECKPOINT_METADATA").write_text(json.dumps(document))
    shutil.rmtree(path / "state")
    (path / "data" / "worker").mkdir(parents=True)
    (path / "data" / "worker" / "state.bin").write_bytes(b"\xff")
    with pytest.raises(NotFoundError, match="has no trees"):
        orbax.open(path)
    with orbax.open(path, item="*") as checkpoint:
        assert checkpoint.keys() == ()
        assert checkpoint.items == {
            "config": {"width": 100, "names": ["a", None]},
            "data": {"worker/state.bin": b"\xff"},
        }


def test_checkpoints_of_v1(written: pathlib.Path):
    assert_same_tree(orbax.read(written / "v1-several", item="extra"), {"x": jnp.arange(3)})
    assert_same_tree(orbax.read(written / "v1-several", item="state"), as_orbax_tells(make_tree()))
    assert orbax.steps(written / "v1-run") == STEPS
    with orbax.open(written / "v1-run") as newest:
        assert (newest.step, newest.metrics) == (100, {"loss": 0.01})
        assert_same_tree(orbax.read(newest), {"w": jnp.full(3, 100)})


# --- older versions -------------------------------------------------------------------------------------------

VALUES = {key.replace("|", "/"): value for key, value in np.load(GOLDEN / "values.npz").items()}
OLD = sorted(entry.name for entry in GOLDEN.iterdir() if entry.name[0].isdigit())


def assert_old_values(tree: Any, *, count: int = 7) -> None:
    flat = flatten(tree)
    assert sorted(flat.keys) == sorted(VALUES)
    for key, leaf in zip(flat.keys, flat.leaves, strict=True):
        array = np.asarray(leaf)
        if key == "count":
            assert array == count
            continue
        bits = array.view(np.uint16) if str(array.dtype) == "bfloat16" else array
        assert (bits.dtype, bits.shape, bits.tobytes()) == (
            VALUES[key].dtype,
            VALUES[key].shape,
            VALUES[key].tobytes(),
        )


@pytest.mark.parametrize("name", OLD)
def test_checkpoints_of_older_versions(name: str):
    path = GOLDEN / name
    if name.endswith("manager"):
        assert orbax.steps(path) == (1, 12)
        with orbax.open(path) as checkpoint:
            assert checkpoint.items == {"config": {"width": 12, "names": ["a", None]}}
            assert checkpoint.metrics == {"loss": 1 / 12}
        assert_old_values(orbax.read(path), count=12)
        assert_old_values(orbax.read(path, step=1), count=1)
        return
    tree = orbax.read(path)
    assert_old_values(tree)
    assert isinstance(tree["layers"], list)
    assert (type(tree["count"]), type(tree["rate"])) == (int, float)
    has_shardings = (path / "_sharding").exists()
    assert len(tree["sharded"].sharding.device_set) == (4 if has_shardings else 1)


def test_zeros_that_an_old_version_left_out_are_read_and_a_lost_chunk_of_a_new_one_is_not(copy: Any):
    """Orbax wrote chunks of zeros with Zarr v3 from 0.7 on, and says so in its metadata."""
    np.testing.assert_array_equal(orbax.read(GOLDEN / "0.6.4-zarr3")["zeros"], np.zeros((3, 2)))
    path = copy("files-zarr3-zstd")
    (path / "opt.mu.w" / "c" / "0" / "0").unlink()
    with pytest.raises(CorruptError, match="opt/mu/w"):
        orbax.read(path)


# --- other places ---------------------------------------------------------------------------------------------


def put_in_memory(path: pathlib.Path, url: str) -> Any:
    store = ts.KvStore.open(f"{url}/", context=memory_context()).result()
    for file in path.rglob("*"):
        if file.is_file():
            store.write(str(file.relative_to(path)), file.read_bytes()).result()
    return store


def test_object_stores_by_their_urls(written: pathlib.Path):
    """What is without the object that commits it is not there."""
    put_in_memory(written / "pytree", "memory://orbax/pytree")
    assert_same_tree(orbax.read("memory://orbax/pytree"), as_orbax_tells(make_tree()))
    put_in_memory(written / "chunks-zarr3", "memory://orbax/chunks")
    assert orbax.open("memory://orbax/chunks")[W][3].tolist() == [18, 19, 20, 21, 22, 23]
    store = put_in_memory(written / "run", "memory://orbax/run")
    assert orbax.steps("memory://orbax/run") == STEPS
    store.write("100/commit_success.txt", None).result()
    assert orbax.read("memory://orbax/run")["count"] == 20
    with pytest.raises(NotFoundError, match=r"without commit_success.txt is not committed"):
        orbax.open("memory://orbax/run/100")
    assert orbax.can_read("memory://orbax/run")
    assert not orbax.can_read("memory://orbax/run/100")
    assert not orbax.can_read("memory://orbax/nowhere")
    with pytest.raises(NotFoundError, match=r"nowhere'$"):
        orbax.open("memory://orbax/nowhere")


@pytest.mark.slow
def test_no_orbax_is_needed(written: pathlib.Path, tmp_path: pathlib.Path):
    program = """
        import sys

        class Blocker:
            def find_spec(self, name, path=None, target=None):
                if name.partition(".")[0] in ("orbax", "flax", "zarr", "etils"):
                    raise ImportError(f"{name} is blocked")

        sys.meta_path.insert(0, Blocker())
        import jaxckpt
        from jaxckpt.interop import orbax
        from jaxckpt._cli import main
        for name in ("pytree", "files-zarr3-raw", "v1", "run"):
            orbax.read(f"{sys.argv[1]}/{name}")
        assert main(["convert", f"{sys.argv[1]}/run", sys.argv[2]]) == 0
        assert not {"orbax", "flax"} & {name.partition(".")[0] for name in sys.modules}
        """
    run_program(program, written, tmp_path / "converted", devices=8)


def _save_and_read(worker: Worker, path: str) -> tuple[int, list[list[float]]]:
    """Saves with Orbax, all processes together, and reads what this process needs."""
    import warnings

    warnings.simplefilter("ignore")
    import orbax.checkpoint as ocp

    mesh = make_mesh({"x": 4})
    whole = np.arange(48, dtype=np.float32).reshape(8, 6)
    sharding = NamedSharding(mesh, PartitionSpec("x"))
    tree = {
        "w": jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index]),
        "r": jax.make_array_from_callback(
            (6,), NamedSharding(mesh, PartitionSpec()), lambda index: whole[0][index]
        ),
        "n": 3,
    }
    for name, zarr3 in (("zarr2", False), ("zarr3", True)):
        handler = ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_zarr3=zarr3)
        ocp.Checkpointer(handler).save(f"{path}/{name}", tree)
    worker.meet()
    with orbax.open(f"{path}/zarr2") as checkpoint:
        restored = orbax.read(checkpoint)
        assert restored["w"].sharding == sharding
        assert_same_leaf(restored["n"], 3)
        return checkpoint.bytes_read, [shard.data.tolist() for shard in restored["w"].addressable_shards]


@pytest.mark.slow
def test_what_several_processes_wrote_is_read_by_several_and_by_one(tmp_path: pathlib.Path):
    outcomes = run_processes(_save_and_read, 2, 2, arguments=(str(tmp_path),), timeout_s=120)
    assert [outcome.status for outcome in outcomes] == ["returned"] * 2, outcomes
    whole = np.arange(48, dtype=np.float32).reshape(8, 6)
    for index, outcome in enumerate(outcomes):
        bytes_read, shards = outcome.value
        np.testing.assert_array_equal(np.concatenate(shards), whole[4 * index : 4 * index + 4])
        assert bytes_read == 4 * 6 * 4 + 6 * 4 + 8  # each reads its own half of what is cut
    for name in ("zarr2", "zarr3"):
        assert len(list((tmp_path / name).glob("ocdbt.process_*"))) == 2
        restored = orbax.read(tmp_path / name)
        np.testing.assert_array_equal(restored["w"], whole)
        assert len(restored["w"].sharding.device_set) == 4


# --- conversions ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pytree", "files-zarr3-zstd", "v1"])
def test_a_tree_is_converted_with_its_shardings(name: str, written: pathlib.Path, path: pathlib.Path):
    done = convert(written / name, path)
    assert (done.ok, done.source_format, done.steps) == (True, "orbax", ())
    converted = jaxckpt.restore(path)
    assert_same_tree(converted, as_orbax_tells(make_tree()))
    assert_same_placement(converted, as_orbax_tells(make_tree()))
    assert_same_tree(jaxckpt.restore(path, like=make_tree()), make_tree())


def test_shardings_stay_with_arrays_that_are_selected_renamed_and_cast(
    written: pathlib.Path, path: pathlib.Path
):
    select, rename = [W, "keys", "host"], {"params/mlp~1~0~1linear": "dense"}
    convert(written / "pytree", path, select=select, rename=rename, dtype="bfloat16")
    converted, tree = jaxckpt.restore(path), make_tree()
    assert_same_leaf(converted["dense"]["w"], tree["params"]["mlp/~/linear"]["w"].astype(jnp.bfloat16))
    assert converted["dense"]["w"].sharding == tree["params"]["mlp/~/linear"]["w"].sharding
    assert_same_leaf(converted["host"], tree["host"].astype(jnp.bfloat16))
    assert_same_leaf(converted["keys"], tree["keys"])
    assert len(jaxckpt.open(path).manifest.shardings) == 1


def test_a_converted_tree_is_restored_like_one_with_texts_for_integers(
    written: pathlib.Path, path: pathlib.Path
):
    """Orbax does not tell 10 from "10"."""
    convert(written / "pytree", path, select="params/numbers/*")
    arrays = {"0": jnp.arange(2), 2: jnp.arange(3), "10": jnp.arange(4)}
    like = {"params": {"numbers": collections.OrderedDict(arrays)}}
    assert_same_tree(jaxckpt.restore(path, like), like)
    assert_same_tree(orbax.read(written / "pytree", like, unexpected="ignore"), like)
    both = {"params": {"numbers": collections.OrderedDict({**arrays, 10: jnp.zeros(4)})}}
    with pytest.raises(MismatchError, match="params/numbers/~s10: not on disk"):
        jaxckpt.restore(path, both)


def test_a_manager_with_its_steps_metrics_and_items(
    written: pathlib.Path, tmp_path: pathlib.Path, capsys: Any
):
    assert main(["convert", str(written / "run"), str(tmp_path / "own")]) == 0
    assert "3 steps" in capsys.readouterr().out
    manager = CheckpointManager(tmp_path / "own", best=jaxckpt.Best("loss", "min"), max_to_keep=None)
    assert manager.steps() == list(STEPS)
    assert manager.best_step() == 20
    for step in STEPS:
        converted = manager.open(step)
        with orbax.open(written / "run", step=step) as source:
            assert converted.items == source.items == {"config": {"width": step, "names": ["a", None]}}
            assert converted.metrics == source.metrics
            assert converted.metadata == {"step": step}
            assert converted.created_s == pytest.approx(source.created_s)
        assert_same_tree(manager.restore(step), orbax.read(written / "run", step=step))
    manager.close()
    with pytest.raises(ExistsError, match="has the steps 3, 20, 100 already"):
        convert(written / "run", tmp_path / "own")
    again = convert(written / "run", tmp_path / "own", overwrite=True)
    assert again.steps == STEPS
    assert again.left_out == ("metadata of the directory", "metrics that are no numbers: more/note")
    assert orbax.root_metadata(written / "run") == {"project": "ours"}


def test_what_is_said_of_a_tree_and_of_its_step_is_not_lost_in_silence(copy: Any, tmp_path: pathlib.Path):
    step = copy("run") / "20"
    document = json.loads((step / "state" / "_METADATA").read_text())
    (step / "state" / "_METADATA").write_text(json.dumps({**document, "custom_metadata": {"tree": 1}}))
    with orbax.open(step) as checkpoint:
        assert checkpoint.metadata == {"step": 20}
    assert "metadata of trees beside that of their step" in convert(step, tmp_path / "own").left_out


def test_several_trees_of_a_step_become_a_dict(written: pathlib.Path, tmp_path: pathlib.Path):
    done = convert(written / "run-of-many", tmp_path / "own", rename={"state": "model"})
    assert done.steps == (3, 20)
    with CheckpointManager(tmp_path / "own") as manager:
        tree = manager.restore(20)
        assert manager.open(20).items == {"config": {"width": 20}}
    assert sorted(tree) == ["array", "key", "model", "numpy"]
    assert_same_leaf(tree["key"], jax.random.key(20))
    assert_same_leaf(tree["model"]["w"], jnp.full(3, 20))
    convert(written / "run-of-many" / "ckpt_00003", tmp_path / "one")
    assert jaxckpt.restore(tmp_path / "one")["numpy"][0] == "MT19937"


def test_to_other_formats(written: pathlib.Path, tmp_path: pathlib.Path):
    convert(written / "pytree", tmp_path / "x.npz", to="npz", select="params/*", dtype="float32")
    with npz.open(tmp_path / "x.npz") as converted:
        assert "params/layers/0/w" in converted.keys()  # noqa: SIM118
    with pytest.raises(ValueError, match="holds 3 steps, which npz has no directories of"):
        convert(written / "run", tmp_path / "y.npz", to="npz")


@pytest.mark.parametrize("name", [name for name in OLD if name.endswith(("manager", "aggregate"))])
def test_older_versions_are_converted(name: str, path: pathlib.Path):
    done = convert(GOLDEN / name, path)
    assert done.ok
    if done.steps:
        with CheckpointManager(path, max_to_keep=None) as manager:
            assert manager.steps() == [1, 12]
            assert manager.metrics(12) == {"loss": 1 / 12}
            assert_old_values(manager.restore(12), count=12)
    else:
        assert_old_values(jaxckpt.restore(path))


# --- damage ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"dtype": "r16"},
        {"dtype": [["a", "<f4"]]},
        {"dtype": "|O"},
        {"shape": [1 << 70]},
        {"shape": [4], "chunks": [1 << 50]},
        {"chunks": [0]},
        {"chunks": [2, 2]},
        {"shape": [1] * 40, "chunks": [1] * 40},
        {"shape": "no"},
        {"shape": [-1]},
        {"dimension_separator": 5},
    ],
)
def test_impossible_arrays_never_reach_tensorstore(changes: dict[str, Any]):
    document = {"shape": [4], "chunks": [2], "dtype": "<f4", "compressor": None, "fill_value": None}
    document |= {"filters": None, "order": "C", "zarr_format": 2}
    assert parse_form(".zarray", json.dumps(document).encode()).last_chunk == "1"
    with pytest.raises(FormError):
        parse_form(".zarray", json.dumps(document | changes).encode())


@pytest.mark.parametrize("text", ["{", "[]", "[" * 100_000, '{"shape": 1e999}', "\xff"])
def test_what_is_no_metadata_of_an_array(text: str):
    for name in (".zarray", "zarr.json"):
        with pytest.raises(FormError):
            parse_form(name, text.encode("latin-1"))


def test_impossible_arrays_of_zarr3(written: pathlib.Path):
    document = json.loads((written / "files-zarr3-zstd" / "host" / "zarr.json").read_text())
    inner = document["codecs"][0]["configuration"]
    for changes in (
        {"data_type": "r8"},
        {"data_type": "complex_bfloat16"},
        {"data_type": None},
        {"codecs": None},
        {"chunk_grid": {"name": "regular"}},
        {"chunk_key_encoding": {"name": "other"}},
        {"codecs": [{"name": "sharding_indexed", "configuration": {**inner, "chunk_shape": [2]}}]},
    ):
        with pytest.raises(FormError):
            parse_form("zarr.json", json.dumps(document | changes).encode())


def test_a_shape_that_was_never_written_takes_no_memory(copy: Any):
    path = copy("files-zarr2-raw")
    file = path / "host" / ".zarray"
    file.write_text(file.read_text().replace('"shape":[5]', f'"shape":[{1 << 45}]'))
    with orbax.open(path) as checkpoint, pytest.raises(CorruptError, match="has no chunk"):
        checkpoint["host"][...]


def test_names_do_not_lead_out_of_the_directory(copy: Any):
    path = copy("files-zarr2-raw")
    file = path / "_METADATA"
    file.write_text(file.read_text().replace('"key": "host"', '"key": "../host"'))
    shutil.copytree(path / "host", path.parent / "host")
    with pytest.raises(FormatError, match="is no name of a directory"):
        orbax.open(path)


@pytest.mark.parametrize(
    ("name", "file", "error"),
    [
        ("pytree", "_METADATA", "is not there"),
        ("pytree", "manifest.ocdbt", "is not there"),
        ("files-zarr2-raw", "host/.zarray", "host: the array is not there"),
        ("pytree", "_strings.json", "does not hold the text"),
    ],
)
def test_missing_files_are_damage(name: str, file: str, error: str, copy: Any):
    path = copy(name)
    (path / file).unlink()
    with pytest.raises(CorruptError, match=error):
        orbax.read(path)


def test_databases_of_processes_that_were_not_merged_are_told_from_lost_arrays(copy: Any):
    path = copy("ocdbt-zarr2-raw")
    assert list(path.glob("ocdbt.process_0"))
    (path / "manifest.ocdbt").unlink()
    with pytest.raises(
        CorruptError, match=r"manifest.ocdbt: is not there: .*ocdbt.process_0\) was not merged"
    ):
        orbax.read(path)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ocdbt-zarr3-raw", "files-zarr2-raw"])
def test_files_that_were_cut_off_are_damage(name: str, copy: Any):
    path = copy(name)
    for file in sorted(path.rglob("*")):
        if not file.is_file() or file.name in ("_sharding", "commit_success.txt", "_CHECKPOINT_METADATA"):
            continue
        if file.name.startswith("process_"):
            continue
        data = file.read_bytes()
        if "ocdbt.process" in str(file) and file.name == "manifest.ocdbt":
            continue  # only the merged one is read
        file.write_bytes(data[: len(data) // 2])
        try:
            orbax.read(path)
            is_told = False
        except (CorruptError, FormatError):
            is_told = True
        assert is_told or "ocdbt.process" in str(file), file
        file.write_bytes(data)
    assert_same_tree(orbax.read(path), as_orbax_tells(make_tree()))


def test_a_damaged_sharding_is_no_reason_not_to_restore(copy: Any):
    path = copy("pytree")
    file = path / "_sharding"
    document = json.loads(file.read_text())
    texts = ["{", "3", '{"sharding_type": "NamedSharding"}', '{"sharding_type": "GSPMDSharding"}']
    for number, name in enumerate(document):
        document[name] = texts[number % len(texts)]
    file.write_text(json.dumps(document))
    restored = orbax.read(path)
    assert_same_tree(restored, as_orbax_tells(make_tree()))
    assert parse_shardings(b"[]") == parse_shardings(b"\xff") == parse_shardings(b'{"!": 1}') == {}
    named = {"sharding_type": "NamedSharding", "shape": [2, 2], "axis_names": ["x", "y"]}
    for wrong in (
        {"partition_spec": ["x", "x"]},
        {"partition_spec": ["z"]},
        {"partition_spec": None},
        {"partition_spec": [None] * 100},
        {"partition_spec": [], "axis_names": [str(axis) for axis in range(100)], "shape": [1] * 100},
        {"partition_spec": [], "axis_names": ["\ud800", "y"]},
        {"partition_spec": ["x"], "device_mesh": {"mesh": [[{"id": 0}, {"id": 1}], [{"id": 0}, {"id": 3}]]}},
        {
            "partition_spec": ["x"],
            "device_mesh": {"mesh": [[{"id": 0}, {"id": 1}], [{"id": 1 << 70}, {"id": 3}]]},
        },
        {"shape": [1 << 40, 2], "partition_spec": []},
        {"axis_names": ["x", "x"], "partition_spec": []},
        {"axis_types": ["AxisType.Odd", "AxisType.Auto"], "partition_spec": []},
    ):
        assert parse_shardings(json.dumps({"dw==": json.dumps(named | wrong)}).encode()) == {}


MUTATIONS = """
    import json, pathlib, random, shutil, sys
    from jaxckpt import CheckpointError
    from jaxckpt.interop import orbax

    generator = random.Random(int(sys.argv[2]))
    path = pathlib.Path(sys.argv[1])
    files = [file for file in sorted(path.rglob("*")) if file.is_file() and file.stat().st_size]
    outcomes = {}
    for _ in range(int(sys.argv[3])):
        file = generator.choice(files)
        data = file.read_bytes()
        changed = bytearray(data)
        for _ in range(generator.choice([1, 1, 1, 3, 10])):
            place = generator.randrange(len(changed))
            kind = generator.randrange(4)
            if kind == 0:
                changed[place] = generator.randrange(256)
            elif kind == 1:
                changed[place : place + generator.randrange(20)] = b""
            elif kind == 2:
                changed[place:place] = generator.choice([b"9", b"0", b"-", b'"', b"99999999999", b"null", b"]", b"}"])
            else:
                changed[place] ^= 1 << generator.randrange(8)
            changed = changed or bytearray(b" ")
        file.write_bytes(changed)
        try:
            with orbax.open(path) as checkpoint:
                orbax.read(checkpoint)
            outcome = "read"
        except CheckpointError as error:
            outcome = type(error).__name__
        file.write_bytes(data)
        outcomes[outcome] = outcomes.get(outcome, 0) + 1
    orbax.read(path)
    print(json.dumps(outcomes))
    """


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ocdbt-zarr2-zstd", "chunks-zarr3"])
def test_whatever_is_changed_ends_in_an_error_of_ours_or_a_tree(name: str, copy: Any):
    program = run_fork(MUTATIONS, copy(name), 11, 60, devices=2, timeout_s=120)
    outcomes = json.loads(program.stdout)
    assert sum(outcomes.values()) == 60
    assert outcomes.get("read", 0) < 60


@pytest.mark.parametrize(
    "error",
    [ValueError("ABORTED: all attempts failed"), NotImplementedError("UNIMPLEMENTED: answered with 501")],
)
def test_what_storage_does_not_give_is_not_called_damaged(error: Exception):
    with (
        pytest.raises(CheckpointError, match="c/0: storage did not give it") as caught,
        _plain_errors("c/0", "w"),
    ):
        raise error
    assert not isinstance(caught.value, CorruptError)
