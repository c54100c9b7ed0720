"""What did a restore do, and was that all?

A `RestoreReport` is the record that `restore` returns with ``report=True``.
"""

from __future__ import annotations

import dataclasses

from ._errors import MismatchError, Problem, list_problems, printable_key
from ._progress import format_bytes

_SHOWN_MAX = 10


@dataclasses.dataclass(frozen=True, slots=True)
class RestoreReport:
    """What a restore did; ``str()`` of it is a page for people.

    What must not happen is better asked for before anything is read: with ``missing="error"`` and
    ``unexpected="error"``, the defaults, `restore` raises where `assert_consumed` would. ``unexpected="ignore"`` is
    TensorFlow's ``expect_partial``: it says that leaves on disk may be left unread.

    Attributes:
      path: Where the checkpoint is.
      restored: Keys (as they are called in the result) of the leaves that came from storage.
      kept: Keys that kept the leaf of ``like``.
      ignored: Saved keys that were left unread.
      renamed: Pairs of the key of a saved leaf and another one that got it, or a part of it.
      cast: Keys whose dtype was converted.
      reshaped: Keys whose shape was changed.
      derived: Keys of leaves that were made of pieces of saved leaves, or of rows for another vocabulary.
      nbytes: Bytes of the restored arrays, as saved.
      bytes_read: Bytes that were asked of storage, manifest and metadata included.
      seconds: Seconds that it took.
      group_bytes_read: The same as `bytes_read`, of all processes of the group together.
      mapped: Keys of leaves whose arrays show the stored files (``mmap=True``), and so were not verified.
    """

    path: str
    restored: tuple[str, ...]
    kept: tuple[str, ...]
    ignored: tuple[str, ...]
    renamed: tuple[tuple[str, str], ...]
    cast: tuple[str, ...]
    reshaped: tuple[str, ...]
    derived: tuple[str, ...]
    nbytes: int
    bytes_read: int
    seconds: float
    group_bytes_read: int
    mapped: tuple[str, ...] = ()

    def assert_all_restored(self) -> None:
        """Raises unless every leaf of the result came from storage.

        Without ``select=`` that is so whenever ``missing`` is ``"error"``.

        Raises:
          MismatchError: Leaves kept what ``like`` had; `.problems` lists them.
        """
        self._refuse("not everything came from storage", self._problems_of_kept())

    def assert_consumed(self) -> None:
        """Raises unless every saved leaf was used, and every leaf of the result came from storage.

        Without ``select=`` that is so whenever ``missing`` and ``unexpected`` are ``"error"``.

        Raises:
          MismatchError: Leaves were left unread, or kept what ``like`` had; `.problems` lists them.
        """
        unread = [Problem(key, "unexpected", "on disk, left unread") for key in self.ignored]
        self._refuse("not everything was used", [*self._problems_of_kept(), *unread])

    def _problems_of_kept(self) -> list[Problem]:
        return [Problem(key, "missing", "kept the leaf of `like`") for key in self.kept]

    def _refuse(self, what: str, problems: list[Problem]) -> None:
        if problems:
            raise MismatchError(list_problems(f"restore of {self.path!r}: {what}", problems), problems)

    def __str__(self) -> str:
        read = f"{format_bytes(self.nbytes)} of arrays, {format_bytes(self.bytes_read)} read"
        lines = [f"{self.path}: {len(self.restored)} leaves restored in {self.seconds:.2f} s, {read}"]
        arrows = [f"{printable_key(old)} -> {printable_key(new)}" for old, new in self.renamed]
        lines += _section("renamed", arrows)
        for title, keys in (
            ("converted to another dtype", self.cast),
            ("in another shape", self.reshaped),
            ("made of parts of saved leaves", self.derived),
            ("mapped, not verified", self.mapped),
            ("kept as in `like`", self.kept),
            ("on disk, left unread", self.ignored),
        ):
            lines += _section(title, [printable_key(key) for key in keys])
        return "\n".join(lines)


def _section(title: str, entries: list[str]) -> list[str]:
    """The first entries below a title, and how many more there are; nothing when there are none."""
    if not entries:
        return []
    lines = [f"{title}: {len(entries)}", *(f"  {entry}" for entry in entries[:_SHOWN_MAX])]
    if len(entries) > _SHOWN_MAX:
        lines.append(f"  ... and {len(entries) - _SHOWN_MAX} more")
    return lines
