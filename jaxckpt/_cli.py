"""What does the command ``jaxckpt`` do?

Each command is a function that takes the parsed arguments and an `_Output`, says what it found, and returns the exit
code. With ``--json`` it says the same as one JSON document. Results go to stdout, errors and the progress bar to
stderr. No device is touched but by ``run``: a checkpoint of any size can be looked into on a machine whose accelerators
are busy. Nothing is changed but by ``prune``; ``convert`` and ``run`` write what they were told to.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import math
import os
import re
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, Literal, TextIO, final

import numpy as np

from ._commit import PIN_NAME
from ._converting import FORMATS, OWN_FORMAT, convert
from ._errors import (
    CheckpointError,
    CorruptError,
    FormatError,
    NotFoundError,
    Problem,
    printable,
    printable_key,
)
from ._events import CheckpointEvent
from ._execution import InputError, read_inputs, run_program, write_results
from ._inspect import (
    LeafDescription,
    describe,
    diff,
    format_count,
    format_date,
    format_metrics,
    format_value,
    verify,
)
from ._manager import CheckpointManager
from ._manifest import MANIFEST_NAME
from ._progress import Progress, format_bytes
from ._reading import Checkpoint, StoredLeaf, open_checkpoint
from ._retention import Best, Verdict
from ._saving import library_versions
from ._storage import Store, local_path
from ._store import open_store
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
  1    damaged or different: verify, cat, diff, info, run or convert found damage, ls a manifest that cannot be read,
       diff a difference; prune could not delete a step that goes
  2    wrong usage
  3    no committed checkpoint, no such leaf, directory or metric, or a checkpoint that cannot be read; convert: one
       is at DST, or cannot be written
  130  interrupted
  141  the reader of the output went away

Paths are directories or URLs (s3://, gs://), behind which ?endpoint=...&aws_region=... says how they are reached.
Results go to stdout, errors and the progress bar to stderr. With --json the result is one JSON document, in which NaN
and the infinities are strings, complex numbers [real, imaginary], and bytes and raw elements hexadecimal strings.
"""

_CAT_HELP = """\
Prints the values of a leaf, or of the part of it that a slice in brackets selects: integers, slices and ... as in
NumPy, for example 'params/w[10:20, ::2]'. Only that part is read, and all that is read is verified. The whole argument
is taken as a key first, then the longest key that leaves a slice, so that keys with brackets can be reached. A key
may also be given as the commands print it, with escape sequences.

Every digit that tells a number from its neighbours is printed. On a terminal more than 1000 elements are abbreviated;
--all, or a pipe, gets all of them.
"""

_RUN_HELP = """\
Runs a program that was saved with a checkpoint, with the values of the checkpoint as its tree. A program is code, and
can do whatever you can: run programs of people whom you trust.

Inputs are given in the order of the function's arguments, or by name; jaxckpt info shows the names. Results are written
to --output, or printed. For example:

  jaxckpt run run/step_100 predict --input x.npy --output y.npy
  jaxckpt run run/step_100 predict --input x=x.npy --fetch hidden --fetch logits --output values.npz
"""

_CONVERT_HELP = """\
Writes a checkpoint in another format. That of SRC is found out; that of DST is --to, or what DST ends in: .safetensors,
.npz, .msgpack (Flax), else jaxckpt. A checkpoint of TensorFlow is named by its prefix, one of its files or its
directory, and written as a prefix. A SRC with numbered checkpoints means the newest, or --step; that of a
CheckpointManager of Orbax's becomes one of jaxckpt's, with all steps. The new checkpoint is read again, and compared,
before the command ends; what else SRC has and the format of DST has no place for is listed. Memory stays at some dozens
of MiB, whatever the size of the checkpoint; arrays of npz in Fortran order, files that are written to object stores,
and chunks of Orbax's are in memory whole.

The leaves of a converted checkpoint have the names of the arrays as their keys, so that restore(like=...) finds them;
the dots of safetensors are slashes. Where a name lies below another, as w/Adam below w, the rest of it is one part with
an escaped slash: w~1Adam.

  jaxckpt convert model.ckpt-1000 run/imported --select 'model/*' --rename model=params --dtype bfloat16
  jaxckpt convert run/step_100 exported/model.ckpt --to tensorflow --select 'params/*'
  jaxckpt convert run/ model.safetensors --step 100 --select 'params/*' --rename params=model --dtype bfloat16
  jaxckpt convert run/ exported --to safetensors --shard-bytes 5000000000
  jaxckpt convert orbax_run run
"""

_PRUNE_HELP = """\
Deletes steps from the directory of a CheckpointManager, and says for each step why it stays or goes. A step stays if
one of the rules that are given keeps it; the newest always stays, and so do steps that the manager has pinned. At
least one rule must be given, and rules that are not given keep nothing. With --dry-run nothing is deleted.

Steps that somebody is reading are not deleted. A training run may go on meanwhile. For example, the newest three and
each thousandth:

  jaxckpt prune run/ --max-to-keep 3 --keep-period 1000 --dry-run
"""

_BEST_RULE = re.compile(r"(.+?)(?::(min|max)(?::([0-9]{1,18}))?)?", re.DOTALL)
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
    parser.add_argument("--version", action="version", version=f"jaxckpt {library_versions()['jaxckpt']}")
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
    _add_run_arguments(add("run", _run, "run a program of a checkpoint on its values", _RUN_HELP))
    command = add("verify", _verify, "reread every stored byte and compare checksums")
    command.add_argument("checkpoint", metavar="CKPT")
    command = add("diff", _diff, "compare two checkpoints leaf by leaf")
    command.add_argument("a", metavar="A")
    command.add_argument("b", metavar="B")
    _add_convert_arguments(add("convert", _convert, "write a checkpoint in another format", _CONVERT_HELP))
    summary = "delete the steps of a manager's directory that no rule keeps"
    _add_prune_arguments(add("prune", _prune, summary, _PRUNE_HELP))
    return parser


def _add_run_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--input",
        action="append",
        default=[],
        metavar="[NAME=]FILE",
        help="a .npy file with an input, or a .npz file with several by name; may be repeated",
    )
    command.add_argument(
        "--fetch",
        action="append",
        default=[],
        metavar="NAME",
        help="an output or a value inside; may be repeated",
    )
    command.add_argument(
        "--output", metavar="FILE", help="where to write: .npy for one value, .npz for several by name"
    )
    command.add_argument("checkpoint", metavar="CKPT")
    command.add_argument("program", metavar="PROGRAM")


def _add_convert_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--to", choices=FORMATS, help=f"format of DST (what its name ends in, else {OWN_FORMAT})"
    )
    command.add_argument(
        "--step", type=int, metavar="N", help="which one, where SRC has numbered ones (the newest)"
    )
    command.add_argument(
        "--select",
        action="append",
        metavar="GLOB",
        help="arrays whose names in SRC match; * also matches /; may be repeated",
    )
    command.add_argument(
        "--rename",
        type=_rename_rule,
        action="append",
        default=[],
        metavar="OLD=NEW",
        help="another name, or leading part of names; may be repeated",
    )
    command.add_argument("--dtype", metavar="NAME", help="floating type that floating arrays are cast to")
    command.add_argument(
        "--shard-bytes",
        type=_positive,
        metavar="N",
        help="for --to safetensors: several files with an index in the directory DST, of at most N bytes of tensors "
        "each, or of one tensor that is larger",
    )
    command.add_argument("--overwrite", action="store_true", help="replace what is at DST")
    command.add_argument("source", metavar="SRC")
    command.add_argument("destination", metavar="DST")


def _add_prune_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("directory", metavar="DIR")
    command.add_argument(
        "--dry-run", action="store_true", help="say what would be deleted, and delete nothing"
    )
    rules = command.add_argument_group("rules")
    rules.add_argument(
        "--max-to-keep", type=_count_or_all, metavar="N|all", help="the newest N stay, or all of them"
    )
    rules.add_argument("--keep-period", type=int, metavar="N", help="each step that is a multiple of N stays")
    rules.add_argument(
        "--keep-interval-s", type=float, metavar="S", help="one step for each S seconds between commits stays"
    )
    rules.add_argument(
        "--best",
        type=_best_rule,
        action="append",
        default=[],
        metavar="METRIC[:min|max[:K]]",
        help="the K (1) steps with the least (min) or greatest value of a metric stay; may be repeated",
    )
    rules.add_argument(
        "--time-to-live-s",
        type=float,
        metavar="S",
        help="steps not older than S seconds stay; with --max-to-keep N, of the newest N those",
    )
    rules.add_argument(
        "--pin",
        type=int,
        action="append",
        default=[],
        metavar="STEP",
        help="this step stays, too; no rule by itself; may be repeated",
    )
    command.add_argument(
        "--prefix", default="step_", metavar="P", help="what the names of the steps begin with (step_)"
    )


def _count_or_all(text: str) -> int | Literal["all"]:
    if text == "all":
        return "all"
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor 'all'") from None


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0")
    return int(text)


def _rename_rule(text: str) -> tuple[str, str]:
    old, equals, new = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not OLD=NEW")
    return old, new


def _best_rule(text: str) -> Best:
    """``METRIC[:min|max[:K]]``; the name of the metric may have colons of its own."""
    match = _BEST_RULE.fullmatch(text)
    if match is None:
        raise argparse.ArgumentTypeError("the name of the metric is missing")
    metric, mode, keep = match.groups()
    try:
        return Best(metric, "max" if mode == "max" else "min", int(keep or 1))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


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
    store = open_store(arguments.directory)
    if not store.is_remote:
        os.stat(store.path)  # what is not there holds no checkpoints either, and is a mistake
    found = sorted(_checkpoints_in(store), key=lambda entry: (_step_of(entry["name"]) or 0, entry["name"]))
    text = _table_of(found) if found else f"no checkpoints in {printable(arguments.directory)}"
    output.say(text, found)
    unreadable = [entry for entry in found if entry["state"] == "unreadable"]
    for entry in unreadable:
        print(f"jaxckpt: {printable(entry['name'])}: {printable(entry['problem'])}", file=sys.stderr)
    return DIFFERS if unreadable else OK


def _table_of(entries: list[dict[str, Any]]) -> str:
    """The entries of `ls`, one a line; what none of them has gets no column."""
    rows = [["NAME", "STEP", "BYTES", "DATE", "STATE", "PINNED", "METRICS"]]
    for entry in entries:
        step = "-" if entry["step"] is None else str(entry["step"])
        size = "-" if entry["bytes"] is None else format_bytes(entry["bytes"])
        pinned = "pinned" if entry["pinned"] else ""
        metrics = format_metrics(entry["metrics"])
        row = [printable(entry["name"]), step, size, entry["date"] or "-", entry["state"], pinned, metrics]
        rows.append(row)
    columns = [column for column in zip(*rows, strict=True) if any(column[1:])]
    lines: list[str] = []
    for row in zip(*columns, strict=True):
        cells: list[str] = []
        for column, cell in zip(columns, row, strict=True):
            width = max(map(len, column))
            is_number = column[0] in ("STEP", "BYTES")
            cells.append(cell.rjust(width) if is_number else cell.ljust(width))
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _checkpoints_in(store: Store) -> Iterator[dict[str, Any]]:
    """What `ls` says of each checkpoint, finished or not, directly in a directory; or of the directory itself."""
    below = store.names_below()
    if MANIFEST_NAME in below:
        yield _entry(store, list(below))
        return
    for child, names in below.items():
        # A save that was not finished has begun with its data.
        if MANIFEST_NAME in names or any(name.startswith("data-") for name in names):
            yield _entry(store.child(child), names)


def _entry(store: Store, names: Collection[str]) -> dict[str, Any]:
    entry: dict[str, Any] = {"name": store.name, "step": _step_of(store.name), "bytes": None, "date": None}
    entry |= {"state": "uncommitted", "pinned": PIN_NAME in names, "metrics": {}}
    try:
        checkpoint = open_checkpoint(store)
    except NotFoundError:
        return entry
    except CheckpointError as error:
        problem = str(error.problems[0]) if error.problems else str(error)
        return entry | {"state": "unreadable", "problem": problem}
    date = format_date(checkpoint.created_s)
    metrics = checkpoint.metrics
    return entry | {"bytes": checkpoint.nbytes, "date": date, "state": "committed", "metrics": metrics}


def _step_of(name: str) -> int | None:
    """The number at the end of a checkpoint's name."""
    match = _NUMBER_AT_END.search(name)
    return int(match[1]) if match and len(match[1]) <= 19 else None


def _info(arguments: argparse.Namespace, output: _Output, bar: ProgressBar) -> int:
    checkpoint = open_checkpoint(arguments.checkpoint)
    found = describe(checkpoint)
    damage: CheckpointError | None = None
    names: list[str] | None = None
    try:
        names = list(checkpoint.items)
    except (CorruptError, FormatError) as error:
        damage = error
    document = {
        "path": found.path,
        "created": found.created,
        "writer": found.writer,
        "metadata": found.metadata,
        "metrics": found.metrics,
        "items": names,
        "items_bytes": found.items_bytes,
        "programs": [dataclasses.asdict(program) for program in found.programs],
        "elements": found.elements,
        "bytes": found.nbytes,
        "stored_bytes": found.stored_bytes,
        "objects": found.objects,
        "leaves": len(found.leaves),
    }
    lines = [printable(line) for line in str(found).partition("\n\n")[0].split("\n")]
    if found.items_bytes:
        lines[-1] += ": damaged" if names is None else ": " + printable(", ".join(names))
    output.say("\n".join(lines), document)
    if damage is None:
        return OK
    return _complain(bar, damage, DIFFERS)


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


def _run(arguments: argparse.Namespace, output: _Output, bar: ProgressBar) -> int:
    del bar
    checkpoint = open_checkpoint(arguments.checkpoint)
    try:
        # Whoever types this command says that the program may run.
        program = checkpoint.program(arguments.program, trust=True)
    except KeyError as error:
        raise _MissingError(error.args[0]) from error
    try:
        inputs = read_inputs(program, arguments.input)
        results = run_program(program, inputs, arguments.fetch)
        if arguments.output is not None:
            write_results(arguments.output, results)
    except InputError as error:
        raise _UsageError(str(error)) from error
    document: dict[str, dict[str, Any]] = {
        name: {"dtype": str(array.dtype), "shape": list(array.shape)} for name, array in results.items()
    }
    if arguments.output is not None:
        lines = [f"{name}: {array.dtype}{list(array.shape)}" for name, array in results.items()]
        output.say("\n".join(map(printable, lines)), document)
        return OK
    for name, array in results.items():
        document[name]["values"] = array
    texts = [f"{name} = {np.array2string(array)}" for name, array in results.items()]
    output.say("\n".join(map(_printable_lines, texts)), document)
    return OK


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


def _convert(arguments: argparse.Namespace, output: _Output, bar: ProgressBar) -> int:
    def show(progress: Progress) -> None:
        bar.show(progress)
        if progress.phase == "done":
            bar.close()  # the verification draws its own

    try:
        done = convert(
            arguments.source,
            arguments.destination,
            to=arguments.to,
            step=arguments.step,
            select=arguments.select,
            rename=dict(arguments.rename) or None,
            dtype=arguments.dtype,
            shard_bytes_max=arguments.shard_bytes,
            overwrite=arguments.overwrite,
            on_progress=show,
        )
    except ValueError as error:
        if isinstance(error, CheckpointError):
            raise
        raise _UsageError(str(error)) from error
    bar.close()
    document = {
        "source": done.source,
        "source_format": done.source_format,
        "destination": done.destination,
        "destination_format": done.destination_format,
        **({"steps": list(done.steps)} if done.steps else {}),
        "leaves": done.leaves,
        "bytes": done.nbytes,
        "ok": done.ok,
        "left_out": list(done.left_out),
        "problems": [_problem_document(problem) for problem in done.problems],
        "seconds": done.seconds,
    }
    output.say(_printable_lines(str(done)), document)
    return OK if done.ok else DIFFERS


def _prune(arguments: argparse.Namespace, output: _Output, bar: ProgressBar) -> int:
    del bar
    directory = local_path(arguments.directory)
    if "://" not in directory and not os.path.isdir(directory):
        raise _MissingError(f"there is no directory {directory!r}")
    in_use: set[int] = set()

    def note(event: CheckpointEvent) -> None:
        if event.kind == "in use":
            in_use.add(event.step)

    manager = _manager_for(arguments, note)
    verdicts = manager.explain()
    for best in arguments.best:
        # A name with a typo would delete what it should keep.
        if verdicts and manager.best_step(best) is None:
            raise _MissingError(
                f"no step has a number as its metric {best.metric!r}; nothing was deleted\n"
                f"jaxckpt ls {printable(directory)} shows the metrics"
            )
    if not arguments.dry_run:
        manager.prune()
    left = set(manager.steps())
    lines: list[str] = []
    steps: list[dict[str, Any]] = []
    for verdict in verdicts:
        is_deleted = verdict.step not in left
        document = {
            "step": verdict.step,
            "kept": verdict.is_kept,
            "deleted": is_deleted,
            "in_use": verdict.step in in_use,
            "reasons": verdict.reasons,
        }
        steps.append(document)
        past = _past_tense_of(verdict, is_deleted=is_deleted, is_in_use=verdict.step in in_use)
        lines.append(str(verdict) if arguments.dry_run else past)
    chosen = sum(not step["kept"] if arguments.dry_run else step["deleted"] for step in steps)
    tense = "would be deleted" if arguments.dry_run else "deleted"
    lines.append(f"{chosen} of {format_count(len(steps), 'step', 'steps')} {tense}")
    text = (
        "\n".join(lines)
        if steps
        else f"no steps {printable(arguments.prefix)}<number> in {printable(directory)}"
    )
    output.say(text, {"directory": manager.directory, "dry_run": arguments.dry_run, "steps": steps})
    is_done = arguments.dry_run or all(step["kept"] or step["deleted"] for step in steps)
    return OK if is_done else DIFFERS


def _manager_for(
    arguments: argparse.Namespace, on_event: Callable[[CheckpointEvent], None]
) -> CheckpointManager:
    """A manager that keeps what the rules on the command line keep, and nothing by default."""
    ages = (arguments.time_to_live_s, arguments.keep_interval_s, arguments.keep_period, arguments.max_to_keep)
    if not arguments.best and all(rule is None for rule in ages):
        raise _UsageError("give at least one rule for what stays, for example --max-to-keep 5")
    max_to_keep = arguments.max_to_keep
    if max_to_keep is None:
        # The newest stays anyway. A time to live says which of the recent steps expire: of all of them.
        max_to_keep = "all" if arguments.time_to_live_s is not None else 1
    try:
        return CheckpointManager(
            arguments.directory,
            max_to_keep=None if max_to_keep == "all" else max_to_keep,
            keep_period=arguments.keep_period,
            keep_interval_s=arguments.keep_interval_s,
            best=arguments.best,
            time_to_live_s=arguments.time_to_live_s,
            pinned=arguments.pin,
            prefix=arguments.prefix,
            on_event=on_event,
        )
    except ValueError as error:
        raise _UsageError(str(error)) from error


def _past_tense_of(verdict: Verdict, *, is_deleted: bool, is_in_use: bool) -> str:
    if is_deleted:
        fate = "was deleted"
    elif verdict.is_kept:
        fate = "was kept"
    else:
        fate = "is being read and was not deleted" if is_in_use else "could not be deleted"
    return f"step {verdict.step} {fate}: {'; '.join(verdict.reasons)}"


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
