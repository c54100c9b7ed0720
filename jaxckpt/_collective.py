"""What must the processes of a group tell each other so that all of them save one checkpoint, or none does?

    every process                       process 0
    ------------------------------      -----------------------------------------------------------
    digest of its outline          ->   all equal? begins the attempt
    takes part in the attempt      <-   name of the data directory
    writes what it owns
    its part is durable            ->   all parts are durable: publishes the manifest       <- the commit
    done                           <-   done

An *outline* is what must be equal everywhere: the step, the tree's structure, the shape, dtype and sharding of each
leaf, and how they are cut. Only its digest travels. When one differs, process 0 sends its whole outline, and whoever
differs says where; nothing was written by then.

The plan of the writing needs no words: every process computes the same one (`_ownership`). Nor does the snapshot wait
for any of this, which happens in the background, over the coordination service alone (`_processes`).

With ``local=True`` each process keeps what it has in a directory of its own. All of them use one name for their data
directories, so that a restart finds out which belong together, and commit when the data of all of them is durable.

Deliberately not here: who owns what, and what a manifest says.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, final

import msgpack
import xxhash

from ._commit import Attempt, begin, join, new_data_name
from ._errors import (
    CorruptError,
    ExistsError,
    FormatError,
    MismatchError,
    NotFoundError,
    Problem,
    ProcessFailure,
    ProcessMismatchError,
    list_problems,
    printable_key,
)
from ._individual import OwnLeaves
from ._leaves import Template
from ._manifest import PartEntry, StoredObject
from ._processes import Group, Session
from ._shardings import describe_sharding, format_sharding
from ._storage import Store
from ._zarr import METADATA_NAME, group_metadata

# How long a process waits, after a failure, for its own threads to stop writing, and process 0 for those of the others:
# with the second until the failure is heard of, all have raised it within five.
SETTLE_S = 2.5
_PROBLEMS_TOLD_MAX = 20
# For messages, by the first word of what the processes do.
_DONE_BY = {"save": "written", "restore": "restored"}


@dataclasses.dataclass(frozen=True, slots=True)
class Outline:
    """What must be equal in all processes.

    Attributes:
      call: What was asked for: the step, for one.
      nodes: The structure of the tree.
      keys: Key of each leaf.
      leaves: What each leaf is, in words.
    """

    call: dict[str, Any]
    nodes: list[Any]
    keys: tuple[str, ...]
    leaves: tuple[str, ...]

    def encode(self) -> bytes:
        """All of it; the same bytes wherever it is the same."""
        fields = [self.call, self.nodes, self.keys, self.leaves]
        return bytes(msgpack.packb(fields, unicode_errors="surrogatepass") or b"")


def outline_leaf(template: Template) -> str:
    """What a leaf is, as far as it must be equal in all processes."""
    spec = template.spec
    if spec.kind == "value":
        return "a value"
    text = f"{spec.kind} {spec.dtype} {spec.shape}"
    if spec.kind in ("array", "key"):
        text += f" {spec.impl}" if spec.impl else ""
        text += " weak" if spec.weak_type else ""
    if template.extent is not None and template.extent.shards is not None and template.sharding is not None:
        return f"{text} {outline_sharding(template.sharding)}"
    # Whatever a process has for itself lies on its own devices.
    return text


@functools.lru_cache(maxsize=4096)
def outline_sharding(sharding: Any) -> str:
    """A sharding in words, equal where it is the same."""
    descriptor = describe_sharding(sharding)
    digest = xxhash.xxh3_64_hexdigest(repr(descriptor).encode())
    return f"{format_sharding(descriptor)} ({digest})"


def find_differences(mine: Outline, theirs: bytes) -> list[Problem]:
    """Where the outline of this process is another one than that of process 0."""
    call, _, keys, leaves = msgpack.unpackb(theirs, unicode_errors="surrogatepass", strict_map_key=False)
    problems = [
        Problem(None, name, f"{name} is {mine.call.get(name)!r} here, {call.get(name)!r} in process 0")
        for name in {**call, **mine.call}
        if mine.call.get(name) != call.get(name)
    ]
    there = dict(zip(keys, leaves, strict=True))
    here = dict(zip(mine.keys, mine.leaves, strict=True))
    for key in {**there, **here}:
        if key not in here:
            problems.append(Problem(key, "missing", "not here, but in process 0"))
        elif key not in there:
            problems.append(Problem(key, "unexpected", "here, but not in process 0"))
        elif here[key] != there[key]:
            problems.append(Problem(key, "leaf", f"{here[key]} here, {there[key]} in process 0"))
    if not problems:
        problems.append(Problem(None, "tree", "the nodes of the tree are of other types than in process 0"))
    return problems


def refuse_differences(session: Session, doing: str, outline: Outline, different: Sequence[int]) -> None:
    """Finds out where the outlines of these processes differ from that of process 0, and raises in all.

    Raises:
      ProcessMismatchError: Always.
    """
    theirs = session.tell("outline", outline.encode() if session.index == 0 else None)
    problems = find_differences(outline, theirs) if session.index in different else []
    told = [[problem.key, problem.kind, problem.message] for problem in problems[:_PROBLEMS_TOLD_MAX]]

    def decide(answers: list[bytes]) -> bytes:
        failures: list[ProcessFailure] = []
        all_problems: list[Problem] = []
        for process in different:
            found = [
                Problem(key, kind, f"process {process}: {message}")
                for key, kind, message in msgpack.unpackb(answers[process], unicode_errors="surrogatepass")
            ]
            first = found[0]
            where = "" if first.key is None else f"{printable_key(first.key)}: "
            message = f"{where}{first.message.partition(': ')[2]}"
            failures.append(ProcessFailure(process, "MismatchError", message, tuple(found)))
            all_problems += found
        headline = f"cannot {doing}: {len(different)} of {session.count} processes passed something else than process 0"
        text = list_problems(
            headline,
            all_problems,
            [f"nothing was {_DONE_BY[doing.split(maxsplit=1)[0]]}; call it with the same everywhere"],
        )
        raise ProcessMismatchError(text, failures, all_problems)

    answer = bytes(msgpack.packb(told, unicode_errors="surrogatepass") or b"")
    session.agree("differences", answer, decide)
    raise AssertionError("the processes differ, but nobody said so")


@dataclasses.dataclass(frozen=True, slots=True)
class Beginning:
    """What a process knows when an attempt has begun.

    Attributes:
      attempt: The attempt.
      has_items: Whether this process has items to write that are not those of process 0.
      own_leaves: The values of leaves that differ from those of process 0, to be written; or None.
    """

    attempt: Attempt
    has_items: bool
    own_leaves: bytes | None


@final
class CollectiveSave:
    """One save of a group, as one of its processes sees it.

    Attributes:
      session: What the processes say to each other.
      attempt: What they write, as soon as this process has a part in it.
    """

    def __init__(self, group: Group, doing: str, timeout_s: float, *, is_local: bool) -> None:
        """Takes the save's number; waits for nobody.

        Args:
          group: The processes.
          doing: Such as ``"save 'run/step_3'"``.
          timeout_s: Most seconds to wait for the others at one point.
          is_local: Whether each process keeps what it has in a directory of its own.
        """
        self.session = group.open_session(doing, timeout_s, shared_errors=(ExistsError,))
        self.index = group.index
        self.count = group.count
        self.is_local = is_local
        self.attempt: Attempt | None = None
        self._doing = doing

    def begin(
        self,
        store: Store,
        outline: Outline,
        items: bytes | None,
        own_leaves: OwnLeaves,
        *,
        may_overwrite: bool,
    ) -> Beginning:
        """Begins the attempt in all processes. Who fails must say so, and then `settle`.

        Raises:
          ProcessMismatchError: The outlines differ.
          CoordinationError: A process failed.
          ExistsError: A checkpoint is there.
        """
        digest = xxhash.xxh3_128_digest(outline.encode())
        items_digest = xxhash.xxh3_128_digest(items or b"")
        own_digests = b"" if self.is_local else own_leaves.digests()
        own_digest = xxhash.xxh3_128_digest(own_digests)

        def decide(answers: list[bytes]) -> bytes:
            different = [process for process, answer in enumerate(answers) if answer[:16] != digest]
            if different:
                return bytes(msgpack.packb({"different": different}) or b"")
            told: dict[str, Any] = {"data": new_data_name(), "items": items_digest}
            if not all(answer[16:] == own_digest for answer in answers):
                told["own"] = own_digests
            if not self.is_local:
                self.attempt = begin(store, may_overwrite=may_overwrite, data=told["data"])
                # The others look for it: it shows whether they see the same storage.
                self.attempt.put_metadata(METADATA_NAME, group_metadata())
            return bytes(msgpack.packb(told) or b"")

        told = msgpack.unpackb(self.session.agree("begin", digest + own_digest, decide))
        if "different" in told:
            refuse_differences(self.session, self._doing, outline, told["different"])
        if self.is_local:
            self.attempt = begin(store, may_overwrite=may_overwrite, data=told["data"])
            self.attempt.put_metadata(METADATA_NAME, group_metadata())
        elif self.index != 0:
            self.attempt = join(store, told["data"])
        assert self.attempt is not None
        own = own_leaves.encode_different(told["own"]) if "own" in told else None
        is_own = items is not None and (self.is_local or self.index == 0 or told["items"] != items_digest)
        return Beginning(self.attempt, is_own, own)

    def publish(
        self,
        entry: PartEntry | None,
        objects: Sequence[StoredObject],
        commit: Callable[[tuple[PartEntry, ...], tuple[StoredObject, ...]], int],
        retract: Callable[[], object],
    ) -> int:
        """Commits when all that all processes wrote is durable.

        Args:
          entry: The part that this process wrote; None with ``is_local``.
          objects: Its other objects.
          commit: Called with all parts and all objects by who commits; returns the bytes of the manifest.
          retract: Takes back what ``commit`` did.

        Returns:
          Bytes of the manifest; 0 where another process wrote it.
        """
        if self.is_local:
            return self._publish_each(objects, commit, retract)
        assert entry is not None
        manifest_bytes = 0

        def decide(answers: list[bytes]) -> bytes:
            nonlocal manifest_bytes
            entries: list[PartEntry] = []
            all_objects: list[StoredObject] = []
            for answer in answers:
                part, others = msgpack.unpackb(answer)
                entries.append(PartEntry(*part))
                all_objects += [StoredObject(*other) for other in others]
            manifest_bytes = commit(tuple(entries), tuple(sorted(all_objects, key=lambda other: other.name)))
            return b""

        answer = [
            [entry.name, entry.length, entry.checksum, entry.objects, entry.stored_bytes],
            [[other.name, other.length, other.checksum] for other in objects],
        ]
        self.session.agree("parts", bytes(msgpack.packb(answer) or b""), decide)
        return manifest_bytes

    def _publish_each(
        self,
        objects: Sequence[StoredObject],
        commit: Callable[[tuple[PartEntry, ...], tuple[StoredObject, ...]], int],
        retract: Callable[[], object],
    ) -> int:
        self.session.agree("written", b"", lambda _: b"")
        is_published = False
        try:
            manifest_bytes = commit((), tuple(objects))
            is_published = True
            self.session.agree("published", b"", lambda _: b"")
        except BaseException as error:
            failure = self.session.fail(error)
            if is_published:
                retract()
            raise failure from error
        return manifest_bytes

    def settle(self, timeout_s: float, *, has_stopped: bool) -> None:
        """After a failure: process 0 waits for the others, so that nobody writes where it then deletes.

        Args:
          timeout_s: Most seconds to wait.
          has_stopped: Whether nothing of this process is still being written.
        """
        # Without an attempt there is nothing to delete, and other processes may come much later.
        has_to = has_stopped if self.index != 0 else self.attempt is not None
        if has_to and not self.is_local:
            self.session.settle(timeout_s)


@final
class CollectiveRestore:
    """One restore of a group, as one of its processes sees it."""

    def __init__(self, group: Group, doing: str, timeout_s: float) -> None:
        """Takes the restore's number; waits for nobody."""
        # What is wrong with a checkpoint is wrong for all.
        self.session = group.open_session(
            doing, timeout_s, shared_errors=(NotFoundError, FormatError, CorruptError, MismatchError)
        )
        self.index = group.index
        self.count = group.count
        self._group = group
        self._timeout_s = timeout_s
        self._doing = doing

    def count_machine_mates(self) -> int:
        """How many processes share the memory of this machine; asks the others the first time."""
        return self._group.machine_mates(self._timeout_s, self.session.check)

    def begin(self, outline: Outline, nbytes: int) -> int:
        """Makes sure that all processes restore the same, in the same way.

        Args:
          outline: What this process restores.
          nbytes: Bytes that it would read.

        Returns:
          Bytes that all processes would read.

        Raises:
          ProcessMismatchError: The outlines differ.
          CoordinationError: A process failed.
        """
        digest = xxhash.xxh3_128_digest(outline.encode())

        def decide(answers: list[bytes]) -> bytes:
            different = [process for process, answer in enumerate(answers) if answer[:16] != digest]
            total = sum(int.from_bytes(answer[16:], "little") for answer in answers)
            return bytes(msgpack.packb({"different": different, "nbytes": total}) or b"")

        answer = digest + nbytes.to_bytes(8, "little")
        told = msgpack.unpackb(self.session.agree("begin", answer, decide))
        if told["different"]:
            refuse_differences(self.session, self._doing, outline, told["different"])
        return int(told["nbytes"])

    def agree_that_all_is_well(self, phase: str) -> None:
        """Returns when every process has come this far; raises when one has failed."""
        self.session.agree(phase, b"", lambda _: b"")

    def end(self, bytes_read: int) -> int:
        """Makes sure that all processes have restored everything; returns the bytes that all of them read."""

        def decide(answers: list[bytes]) -> bytes:
            return sum(int.from_bytes(answer, "little") for answer in answers).to_bytes(8, "little")

        return int.from_bytes(self.session.agree("end", bytes_read.to_bytes(8, "little"), decide), "little")
