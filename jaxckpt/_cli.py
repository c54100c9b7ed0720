"""What does the command ``jaxckpt`` do?

Each command is a function that takes the parsed arguments and an `_Output`, says what it found, and returns the exit
code. With ``--json`` it says the same as one JSON document. Results go to stdout, errors and the progress bar to
stderr. No device is touched: a checkpoint of any size can be looked into on a machine whose accelerators are busy.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TextIO, final

import numpy as np

from ._errors import CheckpointError, CorruptError, NotFoundError, Problem, printable, printable_key
from ._inspect import (
    LeafDescription,
    describe,
    diff,
    format_date,
    format_value,
    verify,
)
from ._manifest import MANIFEST_NAME
from ._progress import format_bytes
from ._reading import Checkpoint, StoredLeaf, open_checkpoint
from ._store import local_path
from ._terminal import ProgressBar

OK = 0
DIFFERS = 1
USAGE = 2
UNREADABLE = 3
INTERRUPTED = 130  # what a shell reports of a program that SIGINT ended
BROKEN_PIPE = 141  # and of one that SIGPIPE ended

_EPILOG = """\
exit codes:
  0    done; verify: whole; diff: the same
  1    damaged or different: verify, cat or diff found damage, ls a manifest that cannot be read, diff a difference
  2    wrong usage
  3    no committed checkpoint, no such leaf, or a checkpoint that cannot be read
  130  interrupted
  141  the reader of the output went away

Paths are directories or URLs (s3://, gs://); ls takes directories only. Results go to stdout, errors and the
progress bar to stderr. With --json the result is one JSON document, in which NaN and the infinities are strings,
complex numbers [real, imaginary], and bytes and raw elements hexadecimal strings.
"""

_CAT_HELP = """\
Prints the values of a leaf, or of the part of it that a slice in brackets selects: integers, slices and ... as in
NumPy, for example 'params/w[10:20, ::2]'. Only that part is read, and all that is read is verified. The whole argument
is taken as a key first, then the longest key that leaves a slice, so that keys with brackets can be reached. A key
may also be given as the commands print it, with escape sequences.

Every digit that tells a number from its neighbours is printed. On a terminal more than 1000 elements are abbreviated;
--all, or a pipe, gets all of them.
"""

_NUMBER_AT_END = re.compile(r"([0-9]+)$")
_ELEMENTS_SHOWN_MAX = 1000
_INT_BITS_MAX = 4096  # Python writes and parses no decimals of more than 4300 digits


class _UsageError(Exception):
    """The arguments make no sense together."""


class _MissingError(Exception):
    """What the arguments name is not there."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
      argv: The arguments; by default those of the process.

    Returns:
      The exit code, which ``jaxckpt --help`` explains.
    """
    try:
        arguments = _make_parser().parse_args(argv)
    except SystemExit as ended:  # argparse has said why
        return int(ended.code or OK)
    output = _Output(sys.stdout, is_json=arguments.json)
    bar = ProgressBar(sys.stderr)
    try:
        code: int = arguments.run(arguments, output, bar)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # Python flushes stdout once more at exit; that must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except KeyboardInterrupt:
        bar.close()
        return INTERRUPTED
    except CorruptError as error:
        return _complain(bar, error, DIFFERS)
    except _UsageError as error:
        return _complain(bar, error, USAGE)
    except (CheckpointError, _MissingError, OSError) as error:
        return _complain(bar, error, UNREADABLE)


def _complain(bar: ProgressBar, error: BaseException, code: int) -> int:
    bar.close()
    lines = str(error).splitlines()
    print("jaxckpt: " + "\n".join(printable(line) for line in lines), file=sys.stderr)
    return code


def _make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="jaxckpt",
        description="Looks into checkpoints of JAX pytrees.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def add(
        name: str, run: _Command, summary: str, description: str | None = None
    ) -> argparse.ArgumentParser:
        command = commands.add_parser(
            name,
            help=summary,
            description=description or f"{summary[0].upper()}{summary[1:]}.",
            epilog="exit codes: see jaxckpt --help",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        command.add_argument("--json", action="store_true", help="print the result as one JSON document")
        command.set_defaults(run=run)
        return command

    command = add("ls", _ls, "list the checkpoints directly in a directory, committed or not")
    command.add_argument("directory", metavar="DIR")
    command = add("info", _info, "say when, by what and with which metadata a checkpoint was saved")
    command.add_argument("checkpoint", metavar="CKPT")
    command = add("tree", _tree, "list the leaves: keys, dtypes, shapes, bytes and shardings")
    command.add_argument("checkpoint", metavar="CKPT")
    command = add("cat", _cat, "print the values of a leaf or of a part of it", _CAT_HELP)
    command.add_argument("--all", action="store_true", help="abbreviate nothing")
    command.add_argument("checkpoint", metavar="CKPT")
    command.add_argument("key", metavar="KEY[slice]")
    command = add("verify", _verify, "reread every stored byte and compare checksums")
    command.add_argument("checkpoint", metavar="CKPT")
    command = add("diff", _diff, "compare two checkpoints leaf by leaf")
    command.add_argument("a", metavar="A")
    command.add_argument("b", metavar="B")
    return parser


@final
class _Output:
    """Says results, as text or as JSON."""

    def __init__(self, stream: TextIO, *, is_json: bool) -> None:
        self._stream = stream
        self._is_json = is_json
        # Keys may hold what the terminal's encoding lacks; a result with escape sequences beats none.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")

    def say(self, text: str, document: Any) -> None:
        """Prints the text, or the JSON document in its stead."""
        if self._is_json:
            text = json.dumps(to_json(document), indent=1, allow_nan=False)
        print(text, file=self._stream)

    @property
    def is_abbreviated(self) -> bool:
        """Whether long arrays are shortened."""
        return self._stream.isatty() and not self._is_json


# --- commands -------------------------------------------------------------------------------------------------


def _ls(arguments: argparse.Namespace, output: _Output, bar: ProgressBar) -> int:
    del bar
    directory = local_path(arguments.directory)
    if "://" in directory:
        raise _UsageError(
            f"ls takes directories, not {directory!r}; info, tree, cat, verify and diff take URLs"
        )
    found = sorted(
        _checkpoints_in(directory), key=lambda entry: (_step_of(entry["name"]) or 0, entry["name"])
    )
    rows = [("NAME", "STEP", "BYTES", "DATE", "STATE")]
    for entry in found:
        size = "-" if entry["bytes"] is None else format_bytes(entry["bytes"])
        step = "-" if entry["step"] is None else str(entry["step"])
        rows.append((printable(entry["name"]), step, size, entry["date"] or "-", entry["state"]))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = [
        f"{row[0]:<{widths[0]}}  {row[1]:>{widths[1]}}  {row[2]:>{widths[2]}}  {row[3]:<{widths[3]}}  {row[4]}"
        for row in rows
    ]
    output.say("\n".join(lines) if found else f"no checkpoints in {printable(directory)}", found)
    unreadable = [entry for entry in found if entry["state"] == "unreadable"]
    for entry in unreadable:
        print(f"jaxckpt: {printable(entry['name'])}: {printable(entry['problem'])}", file=sys.stderr)
    return DIFFERS if unreadable else OK


def _checkpoints_in(directory: str) -> Iterator[dict[str, Any]]:
    """What `ls` says of each checkpoint, finished or not, directly in a directory; or of the directory itself."""
    if os.path.lexists(os.path.join(directory, MANIFEST_NAME)):
        yield _entry(os.path.basename(os.path.abspath(directory)), directory)
        return
    with os.scandir(directory) as entries:
        children = [entry for entry in entries if entry.is_dir()]
    for child in children:
        state = _state_of(child.path)
        if state is not None:
            yield _entry(child.name, child.path)


def _state_of(path: str) -> str | None:
    """``"committed"``, ``"uncommitted"`` or None when the directory is no checkpoint at all."""
    try:
        names = os.listdir(path)
    except OSError:
        return None
    if MANIFEST_NAME in names:
        return "committed"
    is_attempt = any(name.startswith("data-") and os.path.isdir(os.path.join(path, name)) for name in names)
    return "uncommitted" if is_attempt else None


def _entry(name: str, path: str) -> dict[str, Any]:
    entry = {"name": name, "step": _step_of(name), "bytes": None, "date": None, "state": "uncommitted"}
    try:
        checkpoint = open_checkpoint(path)
    except NotFoundError:
        return entry
    except CheckpointError as error:
        problem = str(error.problems[0]) if error.problems else str(error)
        return entry | {"state": "unreadable", "problem": problem}
    date = format_date(checkpoint.created_s)
    return entry | {"bytes": checkpoint.nbytes, "date": date, "state": "committed"}


def _step_of(name: str) -> int | None:
    """The number at the end of a checkpoint's name."""
    match = _NUMBER_AT_END.search(name)
    return int(match[1]) if match and len(match[1]) <= 19 else None


def _info(arguments: argparse.Namespace, output: _Output, bar: ProgressBar) -> int:
    del bar
    found = describe(arguments.checkpoint)
    document = {
        "path": found.path,
        "created": found.created,
        "writer": found.writer,
        "metadata": found.metadata,
        "bytes": found.nbytes,
        "stored_bytes": found.stored_bytes,
        "objects": found.objects,
        "leaves": len(found.leaves),
    }
    text = "\n".join(printable(line) for line in str(found).partition("\n\n")[0].splitlines())
    output.say(text, document)
    return OK


def _tree(arguments: argparse.Namespace, output: _Output, bar: ProgressBar) -> int:
    del bar
    found = describe(arguments.checkpoint)
    output.say(found.table(), [_leaf_document(leaf) for leaf in found.leaves])
    return OK


def _leaf_document(leaf: LeafDescription) -> dict[str, Any]:
    document: dict[str, Any] = {
        "key": leaf.key,
        "kind": leaf.kind,
        "dtype": leaf.dtype,
        "shape": leaf.shape,
        "bytes": leaf.nbytes,
        "sharding": leaf.sharding or None,
        "chunk_shape": leaf.chunk_shape,
        "chunks": leaf.chunks,
        "weak_type": leaf.weak_type,
    }
    if leaf.kind == "value":
        document["value"] = leaf.value
    return document


def _cat(arguments: argparse.Namespace, output: _Output, bar: ProgressBar) -> int:
    del bar
    leaf, index = _find_leaf(open_checkpoint(arguments.checkpoint), arguments.key)
    try:
        value = leaf[index]
    except (IndexError, TypeError) as error:
        raise _UsageError(f"{arguments.key}: {error}") from error
    is_short = output.is_abbreviated and not arguments.all
    document = {
        "key": leaf.key,
        "kind": leaf.kind,
        "dtype": str(getattr(value, "dtype", leaf.dtype)),
        "shape": np.shape(value),
        "value": value,
    }
    output.say(_text_of(value, is_short=is_short), document)
    return OK


def _text_of(value: Any, *, is_short: bool) -> str:
    if not isinstance(value, np.ndarray):
        return format_value(value)
    threshold = _ELEMENTS_SHOWN_MAX if is_short else sys.maxsize
    with np.printoptions(threshold=threshold, floatmode="unique", linewidth=100):
        return repr(value)


def _find_leaf(checkpoint: Checkpoint, text: str) -> tuple[StoredLeaf, Any]:
    """The leaf and the index that ``KEY[slice]`` names."""
    keys = checkpoint.keys()
    by_text = {printable_key(key): key for key in reversed(keys)}
    by_text |= {key: key for key in keys}
    if text in by_text:
        return checkpoint[by_text[text]], ...
    if text.endswith("]"):
        brackets = [at for at, sign in enumerate(text) if sign == "["]
        for at in reversed(brackets):
            if text[:at] in by_text:
                return checkpoint[by_text[text[:at]]], _parse_index(text[at + 1 : -1])
    raise _MissingError(
        f"{text!r} names no leaf of {checkpoint.path!r}, which has {len(checkpoint)}\n"
        "jaxckpt tree lists the keys"
    )


def _parse_index(text: str) -> tuple[Any, ...]:
    """An index as NumPy has it: integers, slices and ``...``, with commas between them."""
    parts = [part.strip() for part in text.split(",")]
    if parts[-1] == "" and len(parts) > 1:
        parts.pop()
    index: list[Any] = []
    for part in parts:
        numbers = part.split(":")
        try:
            if part == "...":
                index.append(...)
            elif len(numbers) == 1:
                index.append(int(part))
            else:
                index.append(slice(*(int(number) if number.strip() else None for number in numbers)))
                if index[-1].step == 0:
                    raise ValueError("a step of zero")
        except (ValueError, TypeError) as error:
            raise _UsageError(
                f"[{text}] is no index: use integers, slices and ..., as in [10:20, ::2]"
            ) from error
    return tuple(index) if len(index) > 1 else index[0]


def _verify(arguments: argparse.Namespace, output: _Output, bar: ProgressBar) -> int:
    report = verify(arguments.checkpoint, on_progress=bar.show)
    bar.close()
    document = {
        "path": report.path,
        "ok": report.ok,
        "problems": [_problem_document(problem) for problem in report.problems],
        "bytes_read": report.bytes_read,
        "seconds": report.seconds,
    }
    output.say(_printable_lines(str(report)), document)
    return OK if report.ok else DIFFERS


def _diff(arguments: argparse.Namespace, output: _Output, bar: ProgressBar) -> int:
    report = diff(arguments.a, arguments.b, on_progress=bar.show)
    bar.close()
    document = {
        "a": report.a,
        "b": report.b,
        "same": report.same,
        "only_in_a": report.only_in_a,
        "only_in_b": report.only_in_b,
        "changed": [_problem_document(problem) for problem in report.changed],
        "equal": report.equal,
    }
    output.say(_printable_lines(str(report)), document)
    return OK if report.same else DIFFERS


def _printable_lines(text: str) -> str:
    return "\n".join(printable(line) for line in text.split("\n"))


def _problem_document(problem: Problem) -> dict[str, Any]:
    return {"key": problem.key, "kind": problem.kind, "message": problem.message}


# --- values as JSON -------------------------------------------------------------------------------------------


def to_json(value: Any) -> Any:
    """Any value that a checkpoint holds as what JSON has, numbers without loss."""
    if isinstance(value, int) and abs(value).bit_length() > _INT_BITS_MAX:
        return hex(value)
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float) and not isinstance(value, np.generic):
        return value if math.isfinite(value) else _name_of_float(value)
    if isinstance(value, complex) and not isinstance(value, np.generic):
        return [to_json(value.real), to_json(value.imag)]
    if isinstance(value, bytes) and not isinstance(value, np.generic):
        return value.hex()
    if isinstance(value, dict):
        return {str(name): to_json(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(part) for part in value]
    if isinstance(value, (np.ndarray, np.generic)):
        return _array_to_json(np.asarray(value))
    return str(value)


def _array_to_json(array: np.ndarray[Any, Any]) -> Any:
    kind = array.dtype.kind
    if array.dtype.type is np.longdouble or kind in "cMmSV":
        pass  # element by element, below
    elif kind != "f" or np.isfinite(array).all():
        return array.tolist()
    if array.ndim == 0:
        return _element_to_json(array)
    # With the ellipsis a part stays an array: a scalar would lose the padding of its bytes.
    return [_array_to_json(array[place, ...]) for place in range(len(array))]


def _element_to_json(element: np.ndarray[Any, Any]) -> Any:
    """An array of rank 0 as JSON."""
    dtype, kind = element.dtype, element.dtype.kind
    if dtype.names is not None:
        return {name: _array_to_json(np.asarray(element[name])) for name in dtype.names}
    if kind in "Mm" or dtype.type in (np.longdouble, np.clongdouble):
        return str(element[()])  # JSON's readers take numbers for 64-bit floats
    if kind == "S" or dtype.type is np.void:
        return element.tobytes().hex()
    if kind == "c":
        return to_json(complex(element[()]))
    # NumPy knows not more of the extension types (bfloat16, int4, ...) than that their kind is "V" or "f".
    return int(element[()]) if "int" in dtype.name else to_json(float(element[()]))


def _name_of_float(value: float) -> str:
    if math.isnan(value):
        return "NaN"
    return "Infinity" if value > 0 else "-Infinity"


_Command = Callable[[argparse.Namespace, _Output, ProgressBar], int]
