"""Checkpoints that earlier versions wrote are read as they always were: ``golden/`` holds some of format 1.

What must come out of them is computed by `golden.generate`. Their files are listed with checksums, since a golden file
that changes shows nothing any more.
"""

from __future__ import annotations

import collections
import json
import pathlib
from typing import Any

import jax
import numpy as np
import pytest

import jaxckpt

from .golden import generate
from .helpers import assert_same_leaf, assert_same_tree, make_mesh, run_fork
from .test_format import read_checkpoint

NAMES = sorted(generate.TREES)


def expected(name: str) -> Any:
    return generate.TREES[name].make()


def test_no_file_was_changed_added_or_lost() -> None:
    listed = json.loads(generate.CHECKSUMS.read_text())
    found = generate.checksums()
    assert set(found) == set(listed)
    assert found == listed


def test_every_directory_is_expected() -> None:
    directories = {entry.name for entry in generate.ROOT.iterdir() if (entry / "manifest.msgpack").exists()}
    assert directories == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_restores_like_the_tree_that_was_saved(name: str) -> None:
    tree = expected(name)
    restored = jaxckpt.restore(generate.ROOT / name, like=tree)
    assert_same_tree(restored, tree)


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"containers", "with-programs"}))
def test_restores_without_like(name: str) -> None:
    tree = expected(name)
    restored = jaxckpt.restore(generate.ROOT / name)
    assert_same_tree(restored, tree)
    for got, want in zip(jax.tree.leaves(restored), jax.tree.leaves(tree), strict=True):
        if isinstance(want, jax.Array):
            assert got.sharding == want.sharding
            assert got.committed == want.committed
            assert getattr(got, "weak_type", None) == getattr(want, "weak_type", None)
        elif isinstance(want, np.ndarray):
            assert (got.flags.f_contiguous, got.flags.c_contiguous) == (
                want.flags.f_contiguous,
                want.flags.c_contiguous,
            )


def test_containers_come_back_without_their_classes() -> None:
    restored = jaxckpt.restore(generate.ROOT / "containers")
    assert list(restored) == sorted(expected("containers"))
    assert restored["list"][:1] + restored["list"][2:] == [1, []]
    assert restored["tuple"][:2] == (1, ())
    assert type(restored["ordered"]) is collections.OrderedDict
    assert list(restored["ordered"]) == ["z", "a"]
    assert type(restored["namedtuple"]).__name__ == "Point"
    assert restored["namedtuple"]._fields == ("x", "y")
    assert_same_leaf(restored["namedtuple"].x, np.arange(5))
    assert_same_leaf(restored["node"].pop("weights"), np.ones((2, 2)))
    assert restored["node"] == {"bias": {"deep": 0.5}}
    assert restored["none"] is None
    assert restored["empty"] == {}


@pytest.mark.parametrize("name", NAMES)
def test_verifies(name: str) -> None:
    report = jaxckpt.verify(generate.ROOT / name)
    assert report.problems == ()


@pytest.mark.parametrize("name", NAMES)
def test_the_independent_reader_reads_the_same(name: str) -> None:
    checkpoint = jaxckpt.open(generate.ROOT / name)
    leaves = read_checkpoint(generate.ROOT / name)
    assert tuple(leaves) == checkpoint.keys()
    for key, leaf in leaves.items():
        assert_same_leaf(leaf, checkpoint[key][...], key)


def test_metadata_comes_back() -> None:
    checkpoint = jaxckpt.open(generate.ROOT / "leaves-in-packs")
    assert checkpoint.metadata == generate.TREES["leaves-in-packs"].metadata
    assert jaxckpt.open(generate.ROOT / "empty").metadata is None


@pytest.mark.parametrize("name", ["sharded-in-packs", "sharded-in-objects", "sharded-in-both"])
def test_sharded_arrays_restore_on_another_mesh(name: str) -> None:
    tree = expected(name)
    restored = jaxckpt.restore(generate.ROOT / name, mesh=make_mesh({"model": 2, "other": 3}))
    assert_same_tree(restored, tree)


def test_sharded_arrays_restore_on_one_device() -> None:
    run_fork(
        """
        import sys
        import jax, numpy as np, jaxckpt
        restored = jaxckpt.restore(sys.argv[1])
        assert len(jax.devices()) == 1
        np.testing.assert_array_equal(restored["rows"], np.arange(96, dtype=np.float32).reshape(16, 6))
        np.testing.assert_array_equal(restored["columns"], np.arange(64).reshape(4, 16))
        """,
        generate.ROOT / "sharded-in-both",
    )


def test_each_of_many_processes_has_its_part_its_items_and_its_own_values() -> None:
    checkpoint = jaxckpt.open(generate.ROOT / "four-processes")
    leaf = checkpoint.keys().index("process")
    for process in range(4):
        assert (generate.ROOT / "four-processes" / checkpoint.manifest.parts[process].name).exists()
        assert checkpoint.items_of(process) == {"process": process}
        own = checkpoint.own_leaves_of(process)
        assert own == ({leaf: ["int", hex(process)]} if process else {})
    owned = [int(checkpoint.manifest.counts_of(process).sum()) for process in range(4)]
    assert min(owned) > 0
    assert sum(owned) == checkpoint.manifest.chunk_starts[-1]


def test_programs_run_or_are_refused_as_too_old_for_this_jax() -> None:
    checkpoint = jaxckpt.open(generate.ROOT / "with-programs")
    assert checkpoint.programs == ("predict", "train_step")
    assert dict(checkpoint.manifest.programs["train_step"].outputs) == {"0": "tree", "1": "float32[]"}
    x = np.ones((2, 3), np.float32)
    try:
        predict = checkpoint.program("predict", trust=True)
        train_step = checkpoint.program("train_step", trust=True, bind=False)
    except (
        jaxckpt.FormatError
    ) as error:  # JAX reads its programs for six months; the values have no such limit
        assert checkpoint.manifest.programs["predict"].jax in str(error)  # noqa: PT017  or it opens
        return
    np.testing.assert_array_equal(predict(x), np.array([[7, 10], [7, 10]], np.float32))
    np.testing.assert_array_equal(predict.fetch("product", x), np.array([[6, 9], [6, 9]], np.float32))
    tree, loss = train_step(expected("with-programs"), x)
    assert type(tree["moments"]) is generate.Point
    assert (int(tree["moments"].y), float(loss), tree["name"]) == (1, 34.0, "linear")


def test_the_goldens_hold_all_three_ways_to_store_a_chunk() -> None:
    packs, own = set(), set()
    for name in NAMES:
        chunks = jaxckpt.open(generate.ROOT / name).manifest.chunks
        packs |= {name} if (chunks.pack >= 0).any() else set()
        own |= {name} if (chunks.pack < 0).any() else set()
    assert {"leaves-in-packs", "sharded-in-packs", "sharded-in-both"} <= packs
    assert {"leaves-in-objects", "sharded-in-objects", "sharded-in-both"} <= own
    assert "sharded-in-both" in packs & own


def test_writing_them_again_gives_the_same_manifests_but_for_names_and_times(tmp_path: pathlib.Path) -> None:
    """The format did not change unnoticed: what this version writes differs in nothing that is not random."""
    for name in NAMES:
        generate.write(name, tmp_path)
        new, old = (jaxckpt.open(root / name).manifest for root in (tmp_path, generate.ROOT))
        assert (new.keys, new.nodes, new.metadata) == (old.keys, old.nodes, old.metadata)
        assert new.specs == old.specs
        assert new.spec_index.tolist() == old.spec_index.tolist()
        assert (new.values, new.shardings, new.directories) == (old.values, old.shardings, old.directories)
        assert new.packs == old.packs
        assert new.chunks.pack.tolist() == old.chunks.pack.tolist()
        assert new.chunks.offset.tolist() == old.chunks.offset.tolist()
        assert new.chunks.length.tolist() == old.chunks.length.tolist()
        assert new.chunks.checksums == old.chunks.checksums
        # What jax.export writes differs from version to version.
        of_programs = [{entry.name for entry in each.programs.values()} for each in (new, old)]
        checksums = [
            [entry.checksum for entry in each.objects if entry.name not in names]
            for each, names in zip((new, old), of_programs, strict=True)
        ]
        assert checksums[0] == checksums[1]
        assert list(new.programs) == list(old.programs)
        assert [entry.checksum for entry in new.parts] == [entry.checksum for entry in old.parts]
        assert list(map(bytes, new.owners)) == list(map(bytes, old.owners))
        assert new.owner_index.tolist() == old.owner_index.tolist()
