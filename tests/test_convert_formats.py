"""Conversions between all formats: each to each other, what is found out, how written bytes are checked, memory."""

from __future__ import annotations

import itertools
import json
import pathlib
import shutil
import signal
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import jaxckpt
from jaxckpt import CheckpointManager, CorruptError, NotFoundError, Progress, UnsupportedLeafError
from jaxckpt._cli import main
from jaxckpt._converting import FORMATS, convert
from jaxckpt._leaves import StreamedArray
from jaxckpt.interop import flax, npz, safetensors, tensorflow

from .helpers import assert_same_tree, make_mesh, run_fork

NAMES = {
    "jaxckpt": "step_7",
    "tensorflow": "model.ckpt",
    "safetensors": "model.safetensors",
    "npz": "model.npz",
    "flax": "model.msgpack",
}
# The others are what their names end in.
SAID = ("tensorflow",)

TREE = {
    "layers": [{"w": np.arange(24, dtype=np.float32).reshape(4, 6)}, {"w": np.ones(3, ml_dtypes.bfloat16)}],
    "empty": np.zeros((0, 3), np.float16),
    "one": np.asarray(2.5, np.float32),
    "ids": np.arange(5),
    "mask": np.array([True, False]),
}
VALUES = {
    "layers/0/w": TREE["layers"][0]["w"],
    "layers/1/w": TREE["layers"][1]["w"],
    **{name: TREE[name] for name in ("empty", "one", "ids", "mask")},
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, pathlib.Path]:
    """One tree in every format."""
    folder = tmp_path_factory.mktemp("sources")
    paths = {form: folder / name for form, name in NAMES.items()}
    jaxckpt.save(paths["jaxckpt"], TREE)
    tensorflow.write(paths["tensorflow"], TREE)
    safetensors.write(paths["safetensors"], TREE)
    npz.write(paths["npz"], TREE)
    flax.write(paths["flax"], TREE)
    return paths


def read_own(path: pathlib.Path) -> dict[str, np.ndarray[Any, Any]]:
    checkpoint = jaxckpt.open(path)
    return {key: checkpoint[key][...] for key in checkpoint}


def said(form: str) -> str | None:
    return form if form in SAID else None


# --- each to each ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("old", "new"), list(itertools.permutations(FORMATS, 2)))
def test_each_format_becomes_each_other(
    old: str, new: str, sources: dict[str, pathlib.Path], tmp_path: pathlib.Path
):
    heard: list[Progress] = []
    done = convert(sources[old], tmp_path / NAMES[new], to=said(new), on_progress=heard.append)
    assert (done.source_format, done.destination_format, done.ok, done.leaves) == (old, new, True, 6)
    assert done.nbytes == sum(array.nbytes for array in VALUES.values())
    phases = [progress.phase for progress in heard]
    assert phases.index("write") < phases.index("done") < len(phases) - 1  # what follows is the verification
    if new != "jaxckpt":
        convert(tmp_path / NAMES[new], tmp_path / "own")
    found = read_own(tmp_path / (NAMES[new] if new == "jaxckpt" else "own"))
    assert_same_tree(found, VALUES)


@pytest.mark.parametrize("form", ["tensorflow", "safetensors", "npz", "flax"])
def test_a_part_of_a_file_becomes_another_of_its_format(
    form: str, sources: dict[str, pathlib.Path], tmp_path: pathlib.Path
):
    with pytest.raises(ValueError, match=f"is a {form} checkpoint already"):
        convert(sources[form], tmp_path / NAMES[form], to=form)
    done = convert(
        sources[form],
        tmp_path / NAMES[form],
        to=form,
        select="layers/*",
        rename={"layers": "blocks"},
        dtype="bfloat16",
    )
    assert done.ok
    convert(tmp_path / NAMES[form], tmp_path / "own")
    expected = {
        f"blocks/{number}/w": layer["w"].astype(ml_dtypes.bfloat16)
        for number, layer in enumerate(TREE["layers"])
    }
    assert_same_tree(read_own(tmp_path / "own"), expected)


@pytest.mark.parametrize("form", FORMATS)
def test_a_converted_checkpoint_restores_without_a_word(
    form: str, sources: dict[str, pathlib.Path], tmp_path: pathlib.Path
):
    """Also the integers of 64 bits, which JAX does not have by default."""
    path = sources[form]
    if form != "jaxckpt":
        convert(path, path := tmp_path / "own")
    restored = jaxckpt.restore(path)
    assert isinstance(restored["layers"][1]["w"], np.ndarray if form == "jaxckpt" else jax.Array)
    assert restored["ids"].tolist() == [0, 1, 2, 3, 4]
    like = {**TREE, "layers": [{"w": jnp.zeros((4, 6))}, {"w": jnp.zeros(3, jnp.bfloat16)}]}
    assert_same_tree(jaxckpt.restore(path, like=like)["layers"], jax.tree.map(jnp.asarray, TREE["layers"]))


def test_values_of_python_and_keys_go_to_every_format_that_has_them(tmp_path: pathlib.Path):
    tree = {"step": 7, "rate": 0.5, "flag": True, "key": jax.random.key(3), "c": 1j}
    jaxckpt.save(tmp_path / "own", {**tree, "name": "über", "raw": b"\xff"})
    expected = {**tree, "key": np.asarray(jax.random.key_data(tree["key"]))}
    assert convert(tmp_path / "own", tmp_path / "a.msgpack").ok
    everything = {**expected, "name": "über", "raw": b"\xff"}
    assert_same_tree(flax.read(tmp_path / "a.msgpack", like=everything), everything)
    assert convert(tmp_path / "a.msgpack", tmp_path / "back").ok
    assert_same_tree(jaxckpt.restore(tmp_path / "back", like=everything), everything)
    for name, select in (
        ("a.npz", ["[!nr]*", "rate"]),
        ("a.safetensors", ["step", "rate", "flag", "key"]),
    ):
        assert convert(tmp_path / "own", tmp_path / name, select=select).ok
        convert(tmp_path / name, tmp_path / "arrays", overwrite=True)
        found = read_own(tmp_path / "arrays")
        assert {key: array.tolist() for key, array in found.items()} == {
            key: np.asarray(expected[key]).tolist() for key in found
        }


def test_what_a_format_has_no_place_for_is_listed(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]):
    keys = {"a": jax.random.key(3), "b": jax.random.split(jax.random.key(4, impl="rbg"), 2)}
    program = jaxckpt.Program(lambda _, x: x, (jax.ShapeDtypeStruct((2,), np.float32),))
    whole = {"keys": keys, "w": np.ones(2, np.float32)}
    extras: Any = {"metadata": {"loss": 0.5}, "items": {"config": {"width": 2}}}
    jaxckpt.save(tmp_path / "own", whole, programs={"same": program}, **extras)
    left_out = (
        "the implementation of 2 PRNG keys (rbg, threefry2x32), which are written as key data",
        "metadata",
        "items: config",
        "programs: same",
    )
    for name in ("a.safetensors", "a.npz", "a.msgpack"):
        assert convert(tmp_path / "own", tmp_path / name).left_out == left_out
    assert convert(tmp_path / "own", tmp_path / "w.npz", select="w").left_out == left_out[1:]
    assert convert(tmp_path / "w.npz", tmp_path / "back").left_out == ()
    assert main(["convert", str(tmp_path / "own"), str(tmp_path / "again.npz")]) == 0
    printed = capsys.readouterr().out
    assert [line for line in printed.splitlines() if line.startswith("left out: ")] == [
        f"left out: {text}" for text in left_out
    ]
    with CheckpointManager(tmp_path / "run") as manager:
        manager.save(1, whole, metrics={"loss": 0.5})
    assert "metrics: loss" in convert(tmp_path / "run", tmp_path / "run.npz").left_out


def test_shardings_and_values_of_other_processes_are_said_to_be_left_out(tmp_path: pathlib.Path):
    golden = pathlib.Path(__file__).parent / "golden"
    on_mesh = NamedSharding(make_mesh({"x": 2}), PartitionSpec("x"))
    tree = {"w": jax.device_put(jnp.ones(4), on_mesh), "one": jax.device_put(jnp.ones(4), jax.devices()[0])}
    jaxckpt.save(tmp_path / "own", tree)
    assert convert(tmp_path / "own", tmp_path / "a.npz").left_out == ("how 1 array was sharded",)
    assert convert(tmp_path / "own", tmp_path / "one.npz", select="one").left_out == ()
    said = convert(golden / "four-processes", tmp_path / "b.npz").left_out
    assert "values of other processes than the first: process" in said
    others = convert(golden / "four-processes", tmp_path / "c.npz", select="[!p]*").left_out
    assert not [text for text in others if text.startswith("values of other")]


@pytest.mark.parametrize("form", ["tensorflow", "safetensors", "npz", "flax"])
def test_many_arrays_are_listed_once_and_not_for_each_of_them(tmp_path: pathlib.Path, form: str):
    verbs: Any = {"tensorflow": tensorflow, "safetensors": safetensors, "npz": npz, "flax": flax}[form]
    verbs.write(tmp_path / NAMES[form], {"a": np.ones(2), "b": np.zeros(3)})
    with verbs.open(tmp_path / NAMES[form]) as checkpoint:
        assert checkpoint.leaves() is checkpoint.leaves()


@pytest.mark.parametrize("form", ["tensorflow", "safetensors", "npz", "flax"])
def test_an_integer_that_is_too_large_is_refused_by_name(tmp_path: pathlib.Path, form: str):
    jaxckpt.save(tmp_path / "own", {"large": 2**70, "w": np.ones(2)})
    with pytest.raises(UnsupportedLeafError, match=r"1 of 2 leaves\n  large: "):
        convert(tmp_path / "own", tmp_path / NAMES[form], to=form)


@pytest.mark.parametrize("form", ["tensorflow", "safetensors", "npz", "flax"])
def test_keys_with_any_characters_are_found_again_in_what_was_written(tmp_path: pathlib.Path, form: str):
    values = {"a/b": 1, "~c": 2, "d.e": 3, "7": 4, "": 5, "\N{GREEK SMALL LETTER PI}": 6}
    inner = {key: np.full(2, value) for key, value in values.items()}
    jaxckpt.save(tmp_path / "own", {"inner": inner, "f/": {"~": np.zeros(1)}})
    done = convert(tmp_path / "own", tmp_path / NAMES[form], to=form)
    assert (done.problems, done.leaves) == ((), 7)


def test_metadata_is_kept_where_formats_have_it(tmp_path: pathlib.Path):
    safetensors.write(tmp_path / "a.safetensors", {"w": np.ones(2)}, metadata={"format": "pt"})
    convert(tmp_path / "a.safetensors", tmp_path / "own")
    assert jaxckpt.open(tmp_path / "own").metadata == {"format": "pt"}
    convert(tmp_path / "own", tmp_path / "b.safetensors")
    assert safetensors.open(tmp_path / "b.safetensors").metadata == {"format": "pt"}
    convert(tmp_path / "b.safetensors", tmp_path / "c.safetensors", dtype="float16")
    assert safetensors.open(tmp_path / "c.safetensors").metadata == {"format": "pt"}
    jaxckpt.save(tmp_path / "other", {"w": np.ones(2)}, metadata={"loss": 0.5})
    assert convert(tmp_path / "other", tmp_path / "d.safetensors").ok
    assert safetensors.open(tmp_path / "d.safetensors").metadata == {}


# --- what is found out ----------------------------------------------------------------------------------------


def test_a_directory_of_steps_means_the_newest_or_the_one_that_is_named(tmp_path: pathlib.Path):
    with jaxckpt.CheckpointManager(tmp_path / "run") as manager:
        for step in (5, 10, 30):
            manager.save(step, {"w": np.full(3, step, np.float32)})
    (tmp_path / "run" / "step_00000040").mkdir()  # never committed
    convert(tmp_path / "run", tmp_path / "a.safetensors")
    assert safetensors.open(tmp_path / "a.safetensors")["w"][...].tolist() == [30] * 3
    convert(tmp_path / "run", tmp_path / "b.npz", step=10)
    assert npz.open(tmp_path / "b.npz")["w"][...].tolist() == [10] * 3
    with pytest.raises(NotFoundError, match=r"no checkpoint of step 7; its steps are 5, 10, 30, 40"):
        convert(tmp_path / "run", tmp_path / "c.npz", step=7)
    with pytest.raises(ValueError, match="is a jaxckpt checkpoint already"):
        convert(tmp_path / "run", tmp_path / "copy")
    # A converted checkpoint is a step like others.
    convert(tmp_path / "a.safetensors", tmp_path / "run" / "step_00000050")
    with jaxckpt.CheckpointManager(tmp_path / "run") as manager:
        assert manager.latest_step() == 50
        assert manager.restore()["w"].tolist() == [30] * 3


def test_files_are_cut_to_shards_where_that_was_asked_for(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
):
    tree = {f"w{number}": np.full(100, number, np.float32) for number in range(5)}
    jaxckpt.save(tmp_path / "own", tree)
    out = tmp_path / "out"
    command = ["convert", str(tmp_path / "own"), str(out), "--to", "safetensors", "--shard-bytes"]
    assert main([*command, "1000"]) == 0
    assert len(list(out.glob("model-0000?-of-00003.safetensors"))) == 3
    assert all(file.stat().st_size < 2000 for file in out.glob("*.safetensors"))
    assert main(["convert", str(out), str(tmp_path / "back")]) == 0
    restored = jaxckpt.restore(tmp_path / "back")
    assert {name: np.asarray(array).tolist() for name, array in restored.items()} == {
        name: array.tolist() for name, array in tree.items()
    }
    # What is sharded may be cut anew.
    again = convert(out, tmp_path / "again", to="safetensors", shard_bytes_max=400)
    assert (again.ok, len(list((tmp_path / "again").glob("*-of-00005.safetensors")))) == (True, 5)
    assert main([*command, "0"]) == 2
    capsys.readouterr()
    file_of_url = "memory://b/a.safetensors?endpoint=http://x"
    for name, form in (
        ("a.safetensors", None),
        ("a.npz", None),
        ("a", None),
        ("a", "flax"),
        (file_of_url, None),
    ):
        with pytest.raises(ValueError, match=r"--shard-bytes\) is for a directory of safetensors"):
            convert(
                tmp_path / "own", name if "://" in name else tmp_path / name, to=form, shard_bytes_max=100
            )


def test_sharded_files_are_found_by_their_directory_and_their_index(tmp_path: pathlib.Path):
    tree = {f"w{number}": np.full(10, number, np.float32) for number in range(5)}
    safetensors.write(tmp_path / "m", tree, shard_bytes_max=50)
    (tmp_path / "m" / "config.json").write_text("{}")
    for number, path in enumerate((tmp_path / "m", tmp_path / "m" / "model.safetensors.index.json")):
        convert(path, tmp_path / str(number))
        assert_same_tree(read_own(tmp_path / str(number)), tree)


@pytest.mark.parametrize(
    "content", [b"text", b"{}", b"\x80\x04K\x01.", b"PK\x03\x04", bytes(8) + b"{", b"\x89HDF"]
)
@pytest.mark.parametrize("name", ["file", "file.json", "file.bin"])
def test_other_files_are_no_checkpoints(tmp_path: pathlib.Path, name: str, content: bytes):
    (tmp_path / name).write_bytes(content)
    with pytest.raises((NotFoundError, CorruptError)) as caught:
        convert(tmp_path / name, tmp_path / "out")
    # Of zeros a TensorFlow file could have begun with, and of a header of no bytes, more cannot be said.
    if content[:1] != b"\0":
        assert isinstance(caught.value, NotFoundError), caught.value
    assert str(tmp_path / name) in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("suffix", ["safetensors", "npz"])
def test_a_file_of_nothing_is_damage_of_the_format_that_its_name_says(tmp_path: pathlib.Path, suffix: str):
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(bytes(100))
    with pytest.raises((CorruptError, NotFoundError)) as caught:
        convert(path, tmp_path / "out")
    assert "table" not in str(caught.value)


def test_the_prefix_of_tensorflow_may_be_the_name_of_a_directory_or_a_file_url(tmp_path: pathlib.Path):
    npz.write(tmp_path / "a.npz", {"w": np.arange(3)})
    (tmp_path / "model").mkdir()
    assert convert(tmp_path / "a.npz", tmp_path / "model", to="tensorflow").ok
    url = f"file://{tmp_path}/other"
    assert convert(tmp_path / "a.npz", url, to="tensorflow").ok
    assert convert(url, tmp_path / "b.npz").ok
    with pytest.raises(ValueError, match="local files"):
        convert(tmp_path / "a.npz", "memory://bucket/model", to="tensorflow")


def test_a_damaged_file_is_named_with_its_damage(sources: dict[str, pathlib.Path], tmp_path: pathlib.Path):
    for form in ("safetensors", "npz", "flax"):
        path = tmp_path / NAMES[form]
        path.write_bytes(sources[form].read_bytes()[:-20])
        with pytest.raises(CorruptError) as caught:
            convert(path, tmp_path / "out")
        assert str(path) in str(caught.value)
        assert not (tmp_path / "out" / "manifest.msgpack").exists()


# --- checking what was written --------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["tensorflow", "safetensors", "npz", "flax"])
@pytest.mark.parametrize("source", ["jaxckpt", "safetensors"])
def test_damage_on_the_way_to_storage_is_noticed(form: str, source: str, tmp_path: pathlib.Path):
    """Also in formats without checksums: any byte of an array."""
    values = np.random.default_rng(0).integers(0, 256, 5000, np.uint8)
    tree = {"a": np.arange(10), "w": values, "step": np.int64(3)}
    original = tmp_path / f"source-{NAMES[source]}"
    if source == "jaxckpt":
        jaxckpt.save(original, tree)
    else:
        safetensors.write(original, {**tree, "step": np.asarray(tree["step"])})
    destination = tmp_path / f"copy-{NAMES[form]}"

    def damage(progress: Progress) -> None:
        if progress.phase != "done":
            return
        (file,) = [
            each
            for each in tmp_path.glob(f"copy-{NAMES[form]}*")
            if each.is_file() and values.tobytes() in each.read_bytes()
        ]
        data = bytearray(file.read_bytes())
        data[data.index(values.tobytes()) + 1234] ^= 1
        file.write_bytes(data)

    choices = {"select": "*"} if source == form else {}
    done = convert(original, destination, to=form, on_progress=damage, **choices)
    assert not done.ok
    assert [(problem.key, problem.kind) for problem in done.problems] == [("w", "checksum")]
    assert "damaged on its way to storage" in str(done)
    assert convert(original, destination, to=form, overwrite=True, **choices).ok


@pytest.mark.parametrize("form", ["safetensors", "npz", "flax"])
def test_another_file_in_the_place_of_what_was_written_is_noticed(form: str, tmp_path: pathlib.Path):
    jaxckpt.save(tmp_path / "own", {"w": np.ones(3), "v": np.zeros(2)})
    other = {"w": np.ones(3), "x": np.zeros(2)}
    verbs = {"safetensors": safetensors, "npz": npz, "flax": flax}[form]
    verbs.write(tmp_path / "other" / NAMES[form], other)

    def replace(progress: Progress) -> None:
        if progress.phase == "done":
            shutil.copy(tmp_path / "other" / NAMES[form], tmp_path / NAMES[form])

    done = convert(tmp_path / "own", tmp_path / NAMES[form], on_progress=replace)
    assert {(problem.key, problem.kind) for problem in done.problems} == {("x", "checksum"), ("v", "missing")}


# --- the command ----------------------------------------------------------------------------------------------


def run(capsys: pytest.CaptureFixture[str], *argv: Any) -> tuple[int, str, str]:
    code = main(["convert", *map(str, argv)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_command_finds_out_both_formats(
    capsys: pytest.CaptureFixture[str], sources: dict[str, pathlib.Path], tmp_path: pathlib.Path
):
    code, out, err = run(capsys, sources["flax"], tmp_path / "a.safetensors", "--json")
    assert (code, err) == (0, "")
    document = json.loads(out)
    assert (document["source_format"], document["destination_format"]) == ("flax", "safetensors")
    assert document["ok"] is True
    assert run(capsys, tmp_path / "a.safetensors", tmp_path / "b.npz", "--to", "npz")[0] == 0
    assert run(capsys, tmp_path / "b.npz", tmp_path / "c", "--to", "safetensors")[0] == 0
    assert (tmp_path / "c" / "model.safetensors").is_file()
    code, out, _ = run(capsys, tmp_path / "c", tmp_path / "own", "--select", "layers/*", "--dtype", "float16")
    assert code == 0
    assert "(safetensors) -> " in out
    assert jaxckpt.open(tmp_path / "own").keys() == ("layers/0/w", "layers/1/w")


def test_the_exit_codes_of_the_command(
    capsys: pytest.CaptureFixture[str], sources: dict[str, pathlib.Path], tmp_path: pathlib.Path
):
    assert run(capsys, sources["npz"], tmp_path / "a.safetensors")[0] == 0
    (tmp_path / "cut.npz").write_bytes(sources["npz"].read_bytes()[:300])
    for code, argv in (
        (2, [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]),
        (2, [sources["npz"], ""]),
        (2, ["", tmp_path / "b"]),
        (3, [sources["npz"], tmp_path / "a.safetensors"]),
        (3, [tmp_path / "absent.npz", tmp_path / "b"]),
        (3, [sources["npz"], tmp_path / "b", "--select", "nothing"]),
        (3, [sources["npz"], tmp_path / "b", "--step", "3"]),
        (1, [tmp_path / "cut.npz", tmp_path / "b"]),
    ):
        found, out, err = run(capsys, *argv)
        assert (found, out) == (code, ""), argv
        assert err.startswith("jaxckpt: ")
        assert "Traceback" not in err


# --- cut off --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["safetensors", "npz", "flax"])
def test_what_a_killed_write_leaves_is_deleted_by_the_next_one(tmp_path: pathlib.Path, form: str):
    path = tmp_path / NAMES[form]
    killed = run_fork(
        """
        import importlib, os, signal, sys
        import numpy as np
        from jaxckpt._leaves import StreamedArray

        def read(lo, hi):
            os.kill(os.getpid(), signal.SIGKILL)

        tree = {"w": StreamedArray((8,), np.dtype("float32"), read)}
        importlib.import_module(f"jaxckpt.interop.{sys.argv[2]}").write(sys.argv[1], tree)
        """,
        path,
        form,
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    (tmp_path / f"other-{left.name}").touch()
    write = {"safetensors": safetensors, "npz": npz, "flax": flax}[form].write

    def read_while_another_writes(lo: int, hi: int) -> np.ndarray[Any, Any]:
        write(path, {"w": np.zeros(1)})
        return np.ones(hi - lo, np.uint8)

    inner = StreamedArray((8,), np.dtype("uint8"), read_while_another_writes)
    write(path, {"w": inner}, overwrite=True)  # and what a living writer has stays
    assert sorted(each.name for each in tmp_path.iterdir()) == [path.name, f"other-{left.name}"]
    with {"safetensors": safetensors, "npz": npz, "flax": flax}[form].open(path) as checkpoint:
        assert checkpoint["w"][...].tolist() == [1] * 8


# --- memory ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_large_tree_goes_through_all_formats_in_little_memory(tmp_path: pathlib.Path):
    """96 MiB, twelve times what is staged, 80 of them in one array: the process grows by less than half of that."""
    run_fork(
        """
        import pathlib, sys
        import numpy as np
        from jax._src import xla_bridge
        from jaxckpt._converting import convert
        from jaxckpt._leaves import StreamedArray
        from jaxckpt.interop import safetensors

        def read_mib(field):
            (line,) = [line for line in open("/proc/self/status") if line.startswith(field)]
            return int(line.split()[1]) / 1024

        folder = pathlib.Path(sys.argv[1])
        ones = np.ones(8 << 20, np.uint8)
        tree = {name: StreamedArray((mib, 1 << 18), np.dtype("float32"), lambda lo, hi: ones[: hi - lo])
                for name, mib in (("large", 80), ("other", 16))}
        safetensors.write(folder / "0.safetensors", tree)
        names = ["0.safetensors", "1.npz", "2.msgpack", "3.safetensors", "4", "5.npz", "6", "7.msgpack", "8"]
        for source, destination in zip(names, names[1:]):
            pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
            before = read_mib("VmRSS:")
            assert convert(folder / source, folder / destination).nbytes == 96 << 20
            growth = read_mib("VmHWM:") - before
            assert growth < 48, f"{growth} MiB from {source} to {destination}"
            (folder / source).unlink() if (folder / source).is_file() else None
        assert not xla_bridge.backends_are_initialized()
        """,
        tmp_path,
    )
