"""The public names are frozen: one more or less is a decision, made here. All are documented, verbs with an example."""

from __future__ import annotations

import inspect
import re
import types
from typing import Any

import pytest

import jaxckpt

PUBLIC = [
    "Best",
    "Checkpoint",
    "CheckpointCallback",
    "CheckpointError",
    "CheckpointEvent",
    "CheckpointInfo",
    "CheckpointManager",
    "CoordinationError",
    "CorruptError",
    "Description",
    "DiffReport",
    "ExistsError",
    "FormatError",
    "LeafDescription",
    "MismatchError",
    "MissingDependencyError",
    "NotFoundError",
    "PendingSave",
    "Pieces",
    "Preemption",
    "Problem",
    "ProcessFailure",
    "ProcessMismatchError",
    "Program",
    "ProgramDescription",
    "Progress",
    "RestoreOptions",
    "RestoreReport",
    "SaveOptions",
    "StoredLeaf",
    "StoredProgram",
    "UnsupportedLeafError",
    "UntrustedProgramError",
    "UploadOptions",
    "Verdict",
    "VerifyReport",
    "Vocabulary",
    "WriteError",
    "describe",
    "diff",
    "open",
    "restore",
    "save",
    "save_async",
    "verify",
]
VERBS = [name for name in PUBLIC if name.islower()]


def members() -> list[tuple[str, Any]]:
    """Public methods and properties that the public classes define."""
    found = []
    for name in PUBLIC:
        public = getattr(jaxckpt, name)
        if inspect.isclass(public):
            for member, value in vars(public).items():
                if not member.startswith("_") and isinstance(
                    value, (types.FunctionType, property, classmethod)
                ):
                    found.append((f"{name}.{member}", value))
    return found


def test_the_public_names_are_these() -> None:
    # The foreign formats are a name of the package as soon as somebody has imported them.
    others = ("annotations", "interop")
    names = [name for name in vars(jaxckpt) if not name.startswith("_") and name not in others]
    assert sorted(names) == PUBLIC


def test_a_star_import_gives_the_public_names() -> None:
    namespace: dict[str, Any] = {}
    exec("from jaxckpt import *", namespace)
    assert set(PUBLIC) <= set(namespace)


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_object_has_a_docstring_of_its_own(name: str) -> None:
    text = vars(getattr(jaxckpt, name)).get("__doc__") or getattr(jaxckpt, name).__doc__
    assert text
    # A dataclass without a docstring gets its signature as one.
    assert not text.startswith(f"{name}(")
    assert text.partition("\n")[0].endswith((".", "]"))


@pytest.mark.parametrize(("name", "member"), members())
def test_every_public_method_has_a_docstring(name: str, member: Any) -> None:
    assert inspect.getdoc(member)


@pytest.mark.parametrize("name", VERBS)
def test_every_verb_has_an_example_and_names_its_arguments(name: str) -> None:
    verb = getattr(jaxckpt, name)
    text = inspect.getdoc(verb) or ""
    assert ">>> " in text
    documented = text.partition("Args:")[2].partition("Returns:")[0]
    for parameter in inspect.signature(verb).parameters:
        assert re.search(rf"^\s*[\w, ]*\b{parameter}\b[\w, ]*: ", documented, re.MULTILINE), parameter


@pytest.mark.parametrize("name", VERBS)
def test_every_verb_is_fully_annotated(name: str) -> None:
    verb = getattr(jaxckpt, name)
    annotations = inspect.get_annotations(verb)
    assert set(annotations) == {*inspect.signature(verb).parameters, "return"}


def test_options_are_keywords_only() -> None:
    for name in ("save", "save_async", "restore", "verify", "diff"):
        kinds = [
            parameter.kind for parameter in inspect.signature(getattr(jaxckpt, name)).parameters.values()
        ]
        assert kinds[2:] == [inspect.Parameter.KEYWORD_ONLY] * len(kinds[2:])


def test_errors_are_checkpoint_errors_and_what_python_calls_them() -> None:
    bases = {
        "NotFoundError": FileNotFoundError,
        "ExistsError": FileExistsError,
        "FormatError": ValueError,
        "MismatchError": ValueError,
        "UnsupportedLeafError": TypeError,
        "WriteError": OSError,
        "CorruptError": Exception,
    }
    for name, base in bases.items():
        assert issubclass(getattr(jaxckpt, name), jaxckpt.CheckpointError)
        assert issubclass(getattr(jaxckpt, name), base)


def test_the_version_is_that_of_the_installed_package_or_unknown() -> None:
    assert re.fullmatch(r"\d+\.\d+.*|unknown", jaxckpt.__version__)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'load'"):
        jaxckpt.load  # noqa: B018  looking it up is what is tested
