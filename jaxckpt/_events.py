"""What does an observer of a manager hear?

A `CheckpointEvent` for whatever the manager does, at the moment and on the thread where it does it. An observer cannot
make anything fail: what it raises is logged.

Deliberately not here: when something is told, and in which order.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from typing import final

from ._saving import CheckpointInfo

_log = logging.getLogger("jaxckpt")


@dataclasses.dataclass(frozen=True, slots=True)
class CheckpointEvent:
    """Something that a manager did.

    Attributes:
      kind: ``"saving"`` (a save began), ``"saved"``, ``"failed"``, ``"skipped"`` (a due step was not saved),
        ``"waited"`` (for the save in flight), ``"deleted"``, ``"in use"`` (not deleted, for somebody reads it),
        ``"damaged"``, ``"restored"`` or ``"preempted"``. With a second tier also ``"uploading"``, ``"uploaded"``,
        ``"upload failed"`` (and is tried again after the next save), ``"upload skipped"`` (deleted before that), and
        ``"upload deleted"`` and ``"upload in use"`` for steps of that tier.
      step: The step that it is about.
      message: The same for people.
      info: What was saved, for ``"saved"``.
      error: Why not, for ``"failed"``, ``"upload failed"`` and ``"damaged"``.
    """

    kind: str
    step: int
    message: str
    info: CheckpointInfo | None = None
    error: BaseException | None = None


@final
class Events:
    """Tells an observer what a manager does. Several threads may use it.

    Args:
      on_event: The observer, if there is one.
    """

    def __init__(self, on_event: Callable[[CheckpointEvent], None] | None) -> None:
        self._on_event = on_event

    def tell(
        self,
        kind: str,
        step: int,
        message: str,
        *,
        info: CheckpointInfo | None = None,
        error: BaseException | None = None,
    ) -> None:
        """Makes an event of this and passes it on; the arguments are those of `CheckpointEvent`."""
        _log.debug("%s", message)
        if self._on_event is None:
            return
        try:
            self._on_event(CheckpointEvent(kind, step, message, info, error))
        except Exception:
            _log.exception("on_event failed for %r of step %d", kind, step)

    def tell_of_upload(
        self, path: str, kind: str, step: int, message: str, *, error: BaseException | None = None
    ) -> None:
        """What is done to a step of the second tier, whose path this is."""
        self.tell(f"upload {kind}", step, f"{message} (in {path})", error=error)
