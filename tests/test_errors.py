"""The exception tree is what its module prints, and messages say what failed, where, and what to do next."""

from __future__ import annotations

import pathlib
import pickle
import re

import jax.numpy as jnp
import numpy as np
import pytest

import jaxckpt
from jaxckpt import _errors
from jaxckpt._errors import Problem, list_problems

BUILT_IN = (FileNotFoundError, FileExistsError, ValueError, TypeError, OSError, ImportError, PermissionError)


def printed_tree() -> dict[str, tuple[str, str | None]]:
    """Name of each exception in the docstring, with its parent and the built-in class that it also is."""
    tree: dict[str, tuple[str, str | None]] = {}
    root = parent = None
    for line in (_errors.__doc__ or "").splitlines():
        match = re.match(r" {4}(│   )?(├── |└── )?(\w+Error)(?:\(Exception\))?\s*(?:\(also (\w+)\))?", line)
        if match:
            deeper, branch, name, also = match.groups()
            root = root if branch else name
            tree[name] = (parent if deeper else root if branch else "Exception", also)
            parent = parent if deeper else name
    return tree


def test_the_printed_tree_is_the_real_one() -> None:
    tree = printed_tree()
    classes = {
        name: value
        for name, value in vars(_errors).items()
        if isinstance(value, type) and issubclass(value, Exception)
    }
    assert set(tree) == set(classes)
    for name, (parent, also) in tree.items():
        bases = {base.__name__ for base in classes[name].__bases__}
        assert bases == ({parent} if also is None else {parent, also}), name
        real = {built_in.__name__ for built_in in BUILT_IN if built_in in classes[name].__bases__}
        assert real == ({also} & {each.__name__ for each in BUILT_IN} if also else set()), name


def test_every_error_is_public() -> None:
    for name in printed_tree():
        assert getattr(jaxckpt, name) is getattr(_errors, name)


def test_errors_survive_pickling() -> None:
    """Process pools send them to their parent."""
    problem = Problem("a/b", "shape", "wrong")
    for name in printed_tree():
        kind = getattr(_errors, name)
        error = kind("it failed", 28) if kind is jaxckpt.WriteError else kind("it failed", [problem])
        copy = pickle.loads(pickle.dumps(error))
        assert type(copy) is kind
        assert str(copy) == "it failed"
        assert copy.problems == error.problems
        assert getattr(copy, "errno", None) == getattr(error, "errno", None)


def test_at_most_ten_problems_are_shown() -> None:
    problems = [Problem(f"leaf{number}", "shape", "differs") for number in range(13)]
    message = list_problems("cannot restore", problems, ["do this", "or that"])
    assert message.splitlines() == [
        "cannot restore",
        *(f"  leaf{number}: differs" for number in range(10)),
        "  ... and 3 more",
        "do this; or that",
    ]
    assert str(Problem("", "shape", "differs")) == "(root): differs"
    assert str(Problem(None, "object", "object x: it is missing")) == "object x: it is missing"


def test_nothing_there(path: pathlib.Path) -> None:
    with pytest.raises(jaxckpt.NotFoundError) as caught:
        jaxckpt.restore(path)
    assert isinstance(caught.value, FileNotFoundError)
    assert str(caught.value) == (
        f"no committed checkpoint at {str(path)!r}: there is no manifest.msgpack\n"
        "check the path; a save that was interrupted leaves none"
    )


def test_something_is_there_already(path: pathlib.Path) -> None:
    jaxckpt.save(path, {"w": np.ones(3)})
    with pytest.raises(jaxckpt.ExistsError) as caught:
        jaxckpt.save(path, {"w": np.ones(3)})
    assert isinstance(caught.value, FileExistsError)
    assert str(caught.value) == (
        f"a checkpoint is already at {str(path)!r}\npass overwrite=True to replace it, or choose another path"
    )


def test_a_damaged_chunk(path: pathlib.Path) -> None:
    jaxckpt.save(path, {"w": jnp.ones(3)})
    (pack,) = path.glob("data-*/packs/*")
    pack.write_bytes(b"\xff" + pack.read_bytes()[1:])
    with pytest.raises(jaxckpt.CorruptError) as caught:
        jaxckpt.restore(path)
    name = pack.relative_to(path).as_posix()
    assert str(caught.value) == (
        f"cannot restore {str(path)!r}: stored data is damaged in 1 places\n"
        f"  w: chunk (0,) in object {name}: the checksum of the block at byte 0 differs\n"
        "nothing was returned; use another checkpoint, or select= the leaves that are whole"
    )
    (problem,) = caught.value.problems
    assert (problem.key, problem.kind) == ("w", "checksum")


def test_a_damaged_manifest(path: pathlib.Path) -> None:
    jaxckpt.save(path, {"w": jnp.ones(3)})
    manifest = path / "manifest.msgpack"
    manifest.write_bytes(manifest.read_bytes()[:-1])
    with pytest.raises(jaxckpt.FormatError) as caught:
        jaxckpt.restore(path)
    assert isinstance(caught.value, ValueError)
    assert str(caught.value) == (
        f"cannot read the checkpoint {str(path)!r}\n"
        "  manifest.msgpack: it is not a manifest of jaxckpt, or it is damaged or cut off\n"
        "it cannot be restored; use another checkpoint"
    )


def test_a_refused_write(path: pathlib.Path) -> None:
    path.write_text("a file")
    with pytest.raises(jaxckpt.WriteError) as caught:
        jaxckpt.save(path, {"w": jnp.ones(3)})
    assert isinstance(caught.value, OSError)
    assert isinstance(caught.value.__cause__, NotADirectoryError)
    assert caught.value.errno == caught.value.__cause__.errno
    first, *rest = str(caught.value).splitlines()
    assert first.startswith(f"cannot save {str(path)!r}: storage refused a write: Not a directory ENOTDIR (")
    assert rest == [
        "nothing was committed; a checkpoint that was there before is still whole",
        "make room or mend the storage, then save again",
    ]


def test_leaves_that_cannot_be_stored(path: pathlib.Path) -> None:
    with pytest.raises(jaxckpt.UnsupportedLeafError) as caught:
        jaxckpt.save(path, {"f": print, "o": np.array([None]), "w": jnp.ones(3)})
    assert isinstance(caught.value, TypeError)
    assert str(caught.value).startswith(
        "cannot save the tree: 2 of 3 leaves cannot be stored\n  f: is a builtin"
    )
    assert str(caught.value).endswith("nothing was written")
    assert [problem.key for problem in caught.value.problems] == ["f", "o"]


def test_trees_that_differ(path: pathlib.Path) -> None:
    jaxckpt.save(path, {"a": jnp.ones((2, 3)), "b": jnp.ones(3), "c": 1})
    like = {"a": jnp.ones((2, 4)), "b": jnp.ones(3, jnp.bfloat16), "d": jnp.ones(1)}
    with pytest.raises(jaxckpt.MismatchError) as caught:
        jaxckpt.restore(path, like)
    assert isinstance(caught.value, ValueError)
    assert {problem.key for problem in caught.value.problems} == {"a", "b", "c", "d"}
    for part in ("(2, 3) on disk, (2, 4) in `like`", "float32 on disk, bfloat16 in `like`", "not on disk"):
        assert part in str(caught.value)
