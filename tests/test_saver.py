"""What `tf.train.Saver` and its family did, where no other test shows that it is done here; and the page SAVER.md.

The page lists every behaviour with the tests that show what stands in its place. Here is also the test that the page
holds: no row is missing, every test that it names exists, and its examples run.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import json
import os
import pathlib
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import NamedSharding, PartitionSpec

import jaxckpt
from jaxckpt import Best, CheckpointManager
from jaxckpt._store import LocalStore

from .helpers import ROOT, assert_same_tree, make_mesh, run_program
from .test_manager import Clock, Storage, name_of, save_steps, tree_of

# --- the constructor ------------------------------------------------------------------------------------------


def test_trees_that_are_saved_side_by_side_share_no_names(tmp_path: pathlib.Path) -> None:
    """There is no graph in which the operations of several savers would need scopes of their own."""
    trees = {name: {"w": jnp.full(3, number), "step": number} for number, name in enumerate(("a", "b"))}
    for name, tree in trees.items():
        jaxckpt.save(tmp_path / name, tree)
    for name, tree in trees.items():
        assert jaxckpt.open(tmp_path / name).keys() == ("step", "w")
        assert_same_tree(jaxckpt.restore(tmp_path / name), tree)


def test_the_rules_of_a_manager_and_its_options_are_plain_data(path: pathlib.Path) -> None:
    """What a SaverDef was for: a program writes down how it saves, and another one saves alike."""
    rules: dict[str, Any] = {"max_to_keep": 2, "keep_period": 3, "keep_interval_s": 3600.0, "pinned": [1]}
    best = dataclasses.asdict(Best("loss", keep=1))
    options = dataclasses.asdict(jaxckpt.SaveOptions(io_threads=2))
    text = json.dumps({"rules": rules, "best": best, "options": options})

    wall_s = Clock(1e9)
    manager = CheckpointManager(path, best=Best(**best), wall_s=wall_s, **rules)
    for step in range(8):
        manager.save(step, tree_of(step), metrics={"loss": 8.0 - step})
    manager.close()

    read = json.loads(text)
    again = CheckpointManager(
        path,
        best=Best(**read["best"]),
        options=jaxckpt.SaveOptions(**read["options"]),
        wall_s=wall_s,
        **read["rules"],
    )
    assert manager.steps() == [0, 1, 3, 6, 7]
    assert again.explain() == manager.explain()


# --- save and restore -----------------------------------------------------------------------------------------


def test_a_save_makes_all_directories_above_it_and_says_where_it_is(
    path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = path / "a" / "b" / "c"
    info = jaxckpt.save(deep, tree_of(1))
    assert info.path == str(deep)
    assert_same_tree(jaxckpt.restore(info.path), tree_of(1))
    monkeypatch.chdir(path)
    pending = jaxckpt.save_async("relative/d", tree_of(2))
    assert pending.path == pending.wait().path == str(path / "relative" / "d")


@pytest.mark.parametrize("read", [jaxckpt.open, jaxckpt.restore, jaxckpt.verify, jaxckpt.describe])
def test_a_path_that_is_none_or_holds_nothing_is_refused(path: pathlib.Path, read: Any) -> None:
    with pytest.raises(TypeError, match="not NoneType"):
        read(None)
    with pytest.raises(jaxckpt.NotFoundError, match="no committed checkpoint at"):
        read(path)


def test_a_restore_says_how_much_it_read_and_how_long_it_took(path: pathlib.Path) -> None:
    jaxckpt.save(path, {"w": jnp.ones(1000), "b": np.ones(10)})
    _, report = jaxckpt.restore(path, report=True)
    assert report.nbytes == 1000 * 4 + 10 * 8
    assert report.bytes_read > report.nbytes
    assert report.seconds > 0


def test_what_save_writes_is_left_alone_by_managers_unless_it_has_the_name_of_a_step(
    path: pathlib.Path,
) -> None:
    """TensorFlow forgets what was saved with ``write_state=False``: it is never listed and never deleted."""
    save_steps(path, 1, 2)
    jaxckpt.save(path / "final", tree_of(100))
    jaxckpt.save(path / name_of(3), tree_of(3))
    manager = CheckpointManager(path, max_to_keep=1)
    assert manager.steps() == [1, 2, 3]
    assert manager.prune() == [1, 2]
    manager.save(4, tree_of(4))
    manager.close()
    assert manager.steps() == [4]
    assert_same_tree(jaxckpt.restore(path / "final"), tree_of(100))


# --- the graph ------------------------------------------------------------------------------------------------


def predict(tree: Any, x: jax.Array) -> jax.Array:
    hidden = checkpoint_name(jnp.tanh(x @ tree["w"]), "hidden")
    return hidden @ tree["v"]


def train_step(tree: Any, x: jax.Array) -> tuple[Any, jax.Array]:
    loss, gradient = jax.value_and_grad(lambda tree: jnp.mean((predict(tree, x) - 1) ** 2))(tree)
    return jax.tree.map(lambda leaf, slope: leaf - 0.1 * slope, tree, gradient), loss


def model(seed: int = 0, width: int = 4) -> dict[str, jax.Array]:
    keys = jax.random.split(jax.random.key(seed))
    return {"v": jax.random.normal(keys[0], (width,)), "w": jax.random.normal(keys[1], (3, width))}


@functools.cache
def programs_of(*functions: Callable[..., Any]) -> dict[str, Any]:
    """Programs for any size of batch; exported once, since all tests save trees of one form."""
    (batch,) = jax.export.symbolic_shape("batch")
    inputs = [jax.ShapeDtypeStruct((batch, 3), jnp.float32)]
    return {function.__name__: jaxckpt.Program(function, inputs) for function in functions}


X = np.linspace(-1, 1, 15, dtype=np.float32).reshape(5, 3)


def objects_of_programs(path: pathlib.Path) -> list[pathlib.Path]:
    checkpoint = jaxckpt.open(path)
    return [path / checkpoint.manifest.programs[name].name for name in checkpoint.programs]


def test_programs_are_saved_without_values_and_run_on_those_of_any_checkpoint(tmp_path: pathlib.Path) -> None:
    """``export_meta_graph``, and ``clear_devices``: the values may be on any devices."""
    shapes = jax.eval_shape(model)
    jaxckpt.save(tmp_path / "graph", shapes, programs=programs_of(predict))
    jaxckpt.save(tmp_path / "values", model(7))
    graph = jaxckpt.open(tmp_path / "graph")
    assert (graph.keys(), graph.programs) == ((), ("predict",))
    stored = graph.program("predict", trust=True, bind=False)
    assert {"cpu", "cuda", "tpu"} == set(stored.platforms)
    want = jax.jit(predict)(model(7), X).tolist()
    assert stored(jaxckpt.restore(tmp_path / "values"), X).tolist() == want
    sharding = NamedSharding(make_mesh({"x": 4}), PartitionSpec())
    spread = jaxckpt.restore(tmp_path / "values", sharding=sharding)
    assert stored.bind(spread)(X).tolist() == want


def test_values_of_a_program_are_fetched_by_name_and_unknown_names_are_errors(path: pathlib.Path) -> None:
    jaxckpt.save(path, model(), programs=programs_of(predict))
    checkpoint = jaxckpt.open(path)
    stored = checkpoint.program("predict", trust=True)
    hidden, output = stored.fetch(["hidden", "output"], X)
    assert np.allclose(hidden, jnp.tanh(X @ model()["w"]), atol=1e-6)
    assert output.tolist() == jax.jit(predict)(model(), X).tolist()
    assert checkpoint["w"][...].tolist() == model()["w"].tolist()
    with pytest.raises(KeyError, match="no value of the program"):
        stored.fetch("hiden", X)
    with pytest.raises(jaxckpt.UntrustedProgramError):
        checkpoint.program("predict")


def test_a_program_holds_no_values(path: pathlib.Path) -> None:
    """A frozen graph holds them all."""
    jaxckpt.save(path, model(width=100_000), programs=programs_of(predict))
    assert sum(file.stat().st_size for file in objects_of_programs(path)) < 100_000


def test_the_steps_of_a_run_share_their_programs(path: pathlib.Path) -> None:
    with CheckpointManager(path, max_to_keep=2, programs=programs_of(predict)) as manager:
        for step in range(4):
            manager.save(step, model(step))
            manager.wait()
    inodes = [{file.stat().st_ino for file in objects_of_programs(path / name_of(step))} for step in (2, 3)]
    assert len(inodes[0]) == 1
    assert inodes[0] == inodes[1]
    for step in (2, 3):
        stored = manager.open(step).program("predict", trust=True)
        assert stored(X).tolist() == jax.jit(predict)(model(step), X).tolist()


def test_a_checkpoint_is_not_there_before_its_programs_are(path: pathlib.Path) -> None:
    storage = Storage()
    jaxckpt.save(LocalStore(str(path), kernel=storage), model(), programs=programs_of(predict))  # type: ignore[arg-type]
    commit = storage.place("rename", path / "manifest.msgpack")
    for file in objects_of_programs(path):
        assert max(storage.places("fsync", file)) < commit


@pytest.mark.slow
def test_a_process_without_the_code_of_the_model_predicts_and_trains_on(path: pathlib.Path) -> None:
    """In a process of its own: importing a graph into the program that made it proves nothing."""
    jaxckpt.save(path, model(), programs=programs_of(predict, train_step))
    program = """
        import json, sys
        import numpy as np
        import jaxckpt

        checkpoint = jaxckpt.open(sys.argv[1])
        x = np.linspace(-1, 1, 15, dtype=np.float32).reshape(5, 3)
        predict = checkpoint.program("predict", trust=True)
        train_step = checkpoint.program("train_step", trust=True, bind=False)
        tree = jaxckpt.restore(checkpoint)
        losses = []
        for step in range(5):
            tree, loss = train_step(tree, x)
            losses.append(float(loss))
        assert not [name for name in sys.modules if name.split(".")[0] in ("tests", "optax", "flax")]
        print(json.dumps([predict(x).tolist(), losses]))
    """
    tree, losses = model(), []
    step = jax.jit(train_step)
    for _ in range(5):
        tree, loss = step(tree, X)
        losses.append(float(loss))
    printed = json.loads(run_program(program, path).stdout)
    assert printed == [jax.jit(predict)(model(), X).tolist(), losses]


# --- what stays -----------------------------------------------------------------------------------------------


def test_two_managers_with_prefixes_of_their_own_share_a_directory(path: pathlib.Path) -> None:
    """Savers did so with a ``latest_filename`` each."""
    managers = {
        prefix: CheckpointManager(path, prefix=prefix, max_to_keep=keep)
        for prefix, keep in (("model_", 2), ("averaged_", 1))
    }
    for step in range(4):
        for number, manager in enumerate(managers.values()):
            manager.save(step, tree_of(10 * number + step))
            manager.wait()
    for manager in managers.values():
        manager.close()
    steps = {prefix: CheckpointManager(path, prefix=prefix).steps() for prefix in managers}
    assert steps == {"model_": [2, 3], "averaged_": [3]}
    assert_same_tree(CheckpointManager(path, prefix="model_").restore(), tree_of(3))
    assert_same_tree(CheckpointManager(path, prefix="averaged_").restore(), tree_of(13))


def test_times_of_commits_come_from_the_manifests_and_not_from_the_files(path: pathlib.Path) -> None:
    """A copy that does not keep the times of files changes nothing in what stays; whole seconds keep 0, 1 and 3."""
    wall_s = Clock(1_700_000_000.75)
    with CheckpointManager(path, max_to_keep=None, wall_s=wall_s) as manager:
        for step in range(5):
            manager.save(step, tree_of(step))
            manager.wait()
            wall_s.now_s += 0.5
    rules: dict[str, Any] = {"max_to_keep": 1, "keep_interval_s": 1.0, "wall_s": wall_s}
    assert [manager.open(step).created_s - 1_700_000_000 for step in range(3)] == [0.75, 1.25, 1.75]
    before = CheckpointManager(path, **rules).explain()
    assert [verdict.step for verdict in before if verdict.is_kept] == [0, 2, 4]
    (path / "checkpoint.json").unlink()
    for file in path.rglob("*"):
        os.utime(file, (0, 0))
    assert CheckpointManager(path, **rules).explain() == before


# --- the files ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pack_bytes_max", [0, 4 << 20])
def test_values_lie_at_multiples_of_64_bytes(path: pathlib.Path, pack_bytes_max: int) -> None:
    """TensorFlow puts one tensor right behind the other, so that a mapped file is not aligned."""
    tree = [np.full(size, size % 251, np.uint8) for size in (1, 63, 64, 65, 1000)]
    jaxckpt.save(path, tree, options=jaxckpt.SaveOptions(pack_bytes_max=pack_bytes_max))
    checkpoint = jaxckpt.open(path)
    for leaf, array in enumerate(tree):
        (chunk,) = range(*checkpoint.manifest.chunk_starts[leaf : leaf + 2])
        place = checkpoint.index.place(leaf, chunk)
        offset = int(place.table.offset[place.row])
        assert offset % 64 == 0
        assert (path / place.object).read_bytes()[offset:].startswith(array.tobytes())


# --- readers --------------------------------------------------------------------------------------------------


def test_an_open_checkpoint_tells_what_the_reader_of_tensorflow_told(path: pathlib.Path) -> None:
    jaxckpt.save(path, {"a": {"w": jnp.arange(6.0).reshape(3, 2)}, "n": np.arange(4)})
    checkpoint = jaxckpt.open(path)
    assert checkpoint.shapes() == {"a/w": (3, 2), "n": (4,)}
    assert checkpoint.dtypes() == {"a/w": np.float32, "n": np.int64}
    assert "a/w" in checkpoint
    assert list(checkpoint) == ["a/w", "n"]
    assert "a/w:0" not in checkpoint
    assert checkpoint["a/w"][...].tolist() == [[0, 1], [2, 3], [4, 5]]
    assert checkpoint["a/w"][1:].tolist() == [[2, 3], [4, 5]]
    assert str(checkpoint).splitlines()[1:] == ["  a/w (float32) [3, 2]", "  n (int64) [4]"]
    with pytest.raises(KeyError, match=r"'a/v' is not in .*a/w"):
        checkpoint["a/v"]


def test_a_directory_of_steps_is_opened_by_its_manager(path: pathlib.Path) -> None:
    """``load_checkpoint`` takes a directory, too, and reads the latest one there."""
    save_steps(path, 1, 2)
    assert CheckpointManager(path).open().path == str(path / name_of(2))
    with pytest.raises(jaxckpt.NotFoundError, match=r"CheckpointManager\(path\)\.open\(\) opens the newest"):
        jaxckpt.open(path)


def test_an_evaluator_may_pass_over_all_but_the_newest_step(path: pathlib.Path) -> None:
    save_steps(path, 1, 2)
    evaluator = CheckpointManager(path)
    evaluated = []
    for step in evaluator.watch(after=0, timeout_s=60, poll_s=0.01):
        if step != evaluator.latest_step():
            continue
        evaluated.append(step)
        if step == 5:
            break
        save_steps(path, 3, 4, 5)
    assert evaluated == [2, 5]


def test_whoever_watches_decides_after_a_timeout_whether_to_go_on(path: pathlib.Path) -> None:
    """What ``timeout_fn`` answered."""
    save_steps(path, 1)
    evaluator = CheckpointManager(path)
    evaluated = [0]
    for timeout in range(3):
        evaluated.extend(evaluator.watch(after=evaluated[-1], timeout_s=0))
        save_steps(path, timeout + 2)
    assert evaluated == [0, 1, 2, 3]


def test_the_number_of_elements_is_told_and_can_be_counted_without_some(path: pathlib.Path) -> None:
    """The last line that ``inspect_checkpoint`` prints, and its ``--count_exclude_pattern``."""
    tree = {"params": {"w": jnp.ones((20, 30)), "b": np.ones(5)}, "adam": jnp.ones((20, 30)), "step": 3}
    jaxckpt.save(path, tree)
    description = jaxckpt.describe(path)
    assert description.elements == 20 * 30 + 5 + 20 * 30
    assert "4 leaves, 1205 elements, " in str(description)
    parameters = [leaf for leaf in description.leaves if not re.match("adam|step", leaf.key)]
    assert sum(leaf.elements for leaf in parameters) == 20 * 30 + 5


# --- automatic saving -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rules", "last", "want"),
    [
        # CheckpointSaverHook(save_steps=3) over 8 steps: at the start, every third, and at the end.
        ({"save_interval_steps": 3}, 8, [0, 3, 6, 8]),
        # tf.train.CheckpointManager(checkpoint_interval=5) over steps 0 to 11, which saves nothing at the end.
        ({"save_interval_steps": 5, "save_last": False}, 11, [0, 5, 10]),
        # The hook refuses steps and seconds together; here the clock moves by a second at each step.
        ({"save_interval_steps": 4, "save_interval_s": 3, "save_last": False}, 11, [0, 3, 4, 7, 8, 11]),
    ],
)
def test_a_loop_saves_the_steps_that_tensorflow_saved(
    path: pathlib.Path, rules: dict[str, Any], last: int, want: list[int]
) -> None:
    clock = Clock()
    with CheckpointManager(path, max_to_keep=None, monotonic_s=clock, **rules) as manager:
        for step in range(last + 1):
            clock.now_s = step
            manager.save(step, tree_of(step))
    assert manager.steps() == want


def test_a_forced_save_passes_over_the_interval_and_still_saves_no_step_twice(path: pathlib.Path) -> None:
    """``check_interval=False``."""
    with CheckpointManager(path, save_interval_steps=5) as manager:
        assert manager.save(5, tree_of(5)) is not None
        assert manager.save(6, tree_of(6)) is None
        assert manager.save(7, tree_of(7), force=True) is not None
        assert manager.save(7, tree_of(7), force=True) is None
    assert manager.steps() == [5, 7]


def test_a_run_goes_on_or_begins_with_what_a_function_makes(path: pathlib.Path) -> None:
    """``restore_or_initialize``: the function is called when there is nothing to go on from, and only then."""
    made = []

    def initialise() -> tuple[int, Any]:
        made.append("anew")
        return 0, {"w": jnp.zeros(3)}

    def train() -> list[float]:
        with CheckpointManager(path) as manager:
            like = {"w": jax.ShapeDtypeStruct((3,), jnp.float32)}
            step, tree = manager.resume(like) or initialise()
            manager.save(step + 1, {"w": tree["w"] + 1})
        return tree["w"].tolist()

    assert [train(), train(), train()] == [[0.0] * 3, [1.0] * 3, [2.0] * 3]
    assert made == ["anew"]


# --- what the objects of tf.train.Checkpoint said ----------------------------------------------------------------


def test_a_counter_that_fits_does_not_make_a_restore_of_nothing_a_success(path: pathlib.Path) -> None:
    """TensorFlow's ``assert_nontrivial_match`` is content when ``save_counter`` was found."""
    jaxckpt.save(path, {"model": {"kernel": jnp.ones((2, 3))}, "step": 7})
    like = {"net": {"kernel": jnp.zeros((2, 3))}, "step": 0}
    with pytest.raises(jaxckpt.MismatchError) as caught:
        jaxckpt.restore(path, like)
    assert {problem.key for problem in caught.value.problems} == {"model/kernel", "net/kernel"}
    _, report = jaxckpt.restore(path, like, missing="keep", unexpected="ignore", report=True)
    assert (report.restored, report.kept, report.ignored) == (("step",), ("net/kernel",), ("model/kernel",))


# --- the page -------------------------------------------------------------------------------------------------

PAGE = ROOT / "jaxckpt" / "SAVER.md"
SECTIONS = {"A": 5, "B": 16, "C": 9, "D": 8, "E": 11, "F": 11, "G": 4, "H": 12}
ROWS = [f"{section}{number}" for section, count in SECTIONS.items() for number in range(1, count + 1)]
FAULTS = [str(number) for number in range(1, 17)]
NAME_OF_TEST = re.compile(r"`(tests/\w+\.py)::([\w:]+)`")


def rows_of_page() -> list[list[str]]:
    """The cells of every row of every table whose first cell is a number."""
    rows = []
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split(" | ")]
        if line.startswith("| ") and re.fullmatch(r"[A-H]?[0-9]+", cells[0]):
            rows.append(cells)
    return rows


@functools.cache
def names_of_tests(file: pathlib.Path) -> set[str]:
    """The names of the tests of a module, those of a class with its name before them."""
    names = set()
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        members = node.body if isinstance(node, ast.ClassDef) else [node]
        prefix = f"{node.name}::" if isinstance(node, ast.ClassDef) else ""
        names |= {
            prefix + member.name
            for member in members
            if isinstance(member, ast.FunctionDef) and member.name.startswith("test_")
        }
    return names


def test_the_page_has_every_row_and_every_fault_once_each_with_a_test() -> None:
    rows = rows_of_page()
    assert [cells[0] for cells in rows] == ROWS + FAULTS
    for number, said, here, shown in rows:
        assert said, number
        assert here, number
        assert NAME_OF_TEST.sub("", shown).replace(",", "").strip() == "", f"{number}: {shown}"
        assert NAME_OF_TEST.search(shown), f"{number} names no test"


def test_every_test_that_the_page_names_is_there() -> None:
    named = set(NAME_OF_TEST.findall(PAGE.read_text(encoding="utf-8")))
    assert len(named) > 50
    missing = [f"{file}::{name}" for file, name in sorted(named) if name not in names_of_tests(ROOT / file)]
    assert missing == []


def test_the_examples_of_the_page_run(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those for TensorFlow are compiled; those for jaxckpt run one after the other, as one program."""
    monkeypatch.chdir(tmp_path)
    examples = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    names: dict[str, Any] = {}
    is_run = []
    for example in examples:
        code = compile(example, str(PAGE), "exec")
        is_run.append("tf." not in example)
        if is_run[-1]:
            exec(code, names)
    assert is_run == [False, True]
    assert names["newest"].path == str(tmp_path / "run" / name_of(300))
    assert names["y"].tolist() == [[300.0, 300.0]]
    assert_same_tree(names["params"], {"w": jnp.full((4, 2), 75.0)})
    assert CheckpointManager("run").steps() == [100, 200, 300]
