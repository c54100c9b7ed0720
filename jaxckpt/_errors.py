"""Which errors does jaxckpt raise, and what does each mean?

    CheckpointError(Exception)
    ├── NotFoundError        (also FileNotFoundError)  nothing committed there
    ├── ExistsError          (also FileExistsError)    would overwrite
    ├── FormatError          (also ValueError)         not ours, damaged manifest, or too new
    ├── CorruptError                                   checksum, missing or short chunk (.problems)
    ├── MismatchError        (also ValueError)         tree, shape, dtype, sharding differ (.problems)
    ├── UnsupportedLeafError (also TypeError)          a leaf or dict key that cannot be stored (.problems)
    ├── CoordinationError                              a process of the group failed, or did not answer (.failures)
    │   └── ProcessMismatchError (also MismatchError)  processes passed different trees or steps
    ├── MissingDependencyError (also ImportError)      an extra is not installed; with the pip line
    ├── UntrustedProgramError (also PermissionError)   a stored program is code, and nobody said that it may run
    └── WriteError           (also OSError)            storage refused

A message says what failed and where, up to ten problems (one a line, with the key and both values), how
many more there are, and what to type next. The text of a library below is the cause (``raise ... from``),
never the message.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

_PROBLEMS_SHOWN_MAX = 10

# Kind of a problem with the process, the machine or the way to storage, which says nothing of what is stored.
UNREADABLE = "unreadable"


def printable(text: str) -> str:
    """Text in one line, with whatever could disturb a terminal written as an escape sequence of Python's."""
    if text.isprintable():
        return text
    return "".join(sign if sign.isprintable() else ascii(sign)[1:-1] for sign in text)


def printable_key(key: str) -> str:
    """A key for people; that of a tree that is one leaf is empty."""
    return printable(key) or "(root)"


@dataclasses.dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong with one leaf or one stored object.

    Attributes:
      key: Key of the leaf, or None when the problem belongs to no leaf.
      kind: Stable word for programs: ``"missing"``, ``"unreadable"``, ``"unexpected"``, ``"shape"``, ``"dtype"``,
        ``"kind"``, ``"checksum"``, ``"length"``, ``"object"``, ``"manifest"``, ``"version"``, ``"leaf"``.
      message: What is wrong, for people, with both values.
    """

    key: str | None
    kind: str
    message: str

    def __str__(self) -> str:
        return self.message if self.key is None else f"{printable_key(self.key)}: {self.message}"


class CheckpointError(Exception):
    """Anything that jaxckpt refuses or fails to do.

    Attributes:
      problems: Every single finding, in a stable order; empty where there is just the message.
    """

    def __init__(self, message: str, problems: Sequence[Problem] = ()) -> None:
        Exception.__init__(self, message)
        self.problems = tuple(problems)


class NotFoundError(CheckpointError, FileNotFoundError):
    """No committed checkpoint is there. Look at the path, or at the other steps."""


class ExistsError(CheckpointError, FileExistsError):
    """A committed checkpoint is already there. Pass ``overwrite=True`` or choose another path."""


class FormatError(CheckpointError, ValueError):
    """The manifest is not ours, is damaged, contradicts itself, or needs a newer version."""


class CorruptError(CheckpointError):
    """Stored bytes differ from what was written. Use another step; nothing wrong was returned."""


class MismatchError(CheckpointError, ValueError):
    """The checkpoint and the wanted tree differ in keys, shapes, dtypes or kinds of leaves."""


@dataclasses.dataclass(frozen=True, slots=True)
class ProcessFailure:
    """What went wrong in one process of a group.

    Attributes:
      process: Its index.
      kind: Name of the class of its error, or ``"silent"`` when it did not answer.
      message: What went wrong there, for people.
      problems: The single findings, where its error had some.
    """

    process: int
    kind: str
    message: str
    problems: tuple[Problem, ...] = ()


class CoordinationError(CheckpointError):
    """A process of the group failed or did not answer, and the others stopped with it.

    Attributes:
      failures: What went wrong, by process.
    """

    def __init__(
        self, message: str, failures: Sequence[ProcessFailure] = (), problems: Sequence[Problem] = ()
    ) -> None:
        CheckpointError.__init__(self, message, problems)
        self.failures = tuple(failures)


class ProcessMismatchError(CoordinationError, MismatchError):
    """Processes of a group passed different trees, steps or arguments. Nothing was written."""


class UnsupportedLeafError(CheckpointError, TypeError):
    """The tree holds something that cannot be stored. Nothing was written."""


class UntrustedProgramError(CheckpointError, PermissionError):
    """A stored program is code, and was opened without ``trust=True``."""


class MissingDependencyError(CheckpointError, ImportError):
    """A package that only some users need is not installed."""

    def __init__(self, message: str, problems: Sequence[Problem] = ()) -> None:
        CheckpointError.__init__(self, message, problems)  # ImportError's own takes no second argument


class WriteError(CheckpointError, OSError):
    """Storage refused a write. Nothing was committed; an earlier checkpoint is untouched."""

    def __init__(self, message: str, errno: int | None = None) -> None:
        CheckpointError.__init__(self, message)
        self.errno = errno

    def __str__(self) -> str:
        return str(self.args[0])

    def __reduce__(self) -> tuple[type[WriteError], tuple[str, int | None]]:
        return WriteError, (str(self), self.errno)  # OSError's own way loses the number


def list_problems(headline: str, problems: Sequence[Problem], advice: Sequence[str] = ()) -> str:
    """Message with the first ten problems, one a line, and what to do next."""
    lines = [headline]
    lines += [f"  {problem}" for problem in problems[:_PROBLEMS_SHOWN_MAX]]
    if len(problems) > _PROBLEMS_SHOWN_MAX:
        lines.append(f"  ... and {len(problems) - _PROBLEMS_SHOWN_MAX} more")
    if advice:
        lines.append("; ".join(advice))
    return "\n".join(lines)
