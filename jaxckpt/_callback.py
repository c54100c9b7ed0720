"""What does a training loop call?

    callback = jaxckpt.CheckpointCallback(manager)
    resumed = callback.on_start(like=state)          once: where to go on from, or None
    callback.on_step(step, state, {"loss": loss})    after every step
    callback.should_stop                             asked after every step
    callback.on_end()                                once: the last step is saved, and everything durable

It joins a `CheckpointManager`, a `Preemption` and functions to call before and after each save, so that loops of any
framework need these four lines and nothing else.

In a group of processes all of them make these calls at the same points, and must leave the loop after the same step.
A save ends at another moment in each process. So there the listeners are told of it when the next save begins, which
waits for it in all of them, and what the listeners of process 0 say about stopping is told to the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from types import TracebackType
from typing import Any, Literal, Self, final

from ._items import has_state
from ._manager import CheckpointManager
from ._pending import PendingSave
from ._preemption import Preemption
from ._saving import CheckpointInfo


@final
class CheckpointCallback:
    """Saves a training loop's state, resumes it, and tells it when to stop.

    Also a context manager: leaving it calls `on_end`; leaving it by an exception only waits for the save in flight.

    Args:
      manager: Says which steps are saved and kept. It is closed by `on_end`.
      items: Objects with a state (data iterators) or plain values, saved with every step. Objects get their state back
        in `on_start`.
      before_save: Each is called with ``(step, tree)`` right before a step is saved.
      after_save: Each is called with ``(step, CheckpointInfo)`` in the loop's thread, at the first call after the step
        was committed, in the order of the steps. If one returns True, the loop is asked to stop. In a group of
        processes: when the next save begins, in all of them; the answers of process 0 count.
      preemption: Announces the end of the process. ``"auto"``: the manager's own, or else SIGTERM. None: nothing does.

    Example:
      >>> def train(steps):
      ...     manager = jaxckpt.CheckpointManager(tmp / "run", save_interval_steps=10)
      ...     with jaxckpt.CheckpointCallback(manager) as callback:
      ...         step, state = callback.on_start() or (0, {"w": jnp.zeros(3)})
      ...         while step < steps and not callback.should_stop:
      ...             state = {"w": state["w"] + 1}
      ...             step += 1
      ...             callback.on_step(step, state)
      ...     return state["w"]
      >>> train(25)
      Array([25., 25., 25.], dtype=float32)
      >>> train(40)
      Array([40., 40., 40.], dtype=float32)
    """

    def __init__(
        self,
        manager: CheckpointManager,
        *,
        items: Mapping[str, Any] | None = None,
        before_save: Iterable[Callable[[int, Any], Any]] = (),
        after_save: Iterable[Callable[[int, CheckpointInfo], Any]] = (),
        preemption: Preemption | Literal["auto"] | None = "auto",
    ) -> None:
        self._manager = manager
        self._items = dict(items or {})
        self._before_save = tuple(before_save)
        self._after_save = tuple(after_save)
        self._preemption = preemption
        self._unannounced: list[PendingSave] = []  # saves of which the listeners know nothing yet
        self._is_asked_to_stop = False
        manager.add_listener(self._before)

    def on_start(self, like: Any = None, **keywords: Any) -> tuple[int, Any] | None:
        """Begins to listen for the end of the process, and restores the newest step that is whole.

        Args:
          like: As for `jaxckpt.restore`: the state before training, for example.
          **keywords: As for `CheckpointManager.resume`.

        Returns:
          The step and the tree to go on from, or None when there is no checkpoint.

        Raises:
          RuntimeError: This is not the main thread, where signals are handled. Pass ``preemption=None``.
        """
        if isinstance(self._preemption, Preemption):
            self._manager.use_preemption(self._preemption)
        elif self._preemption == "auto" and self._manager.preemption is None:
            self._manager.use_preemption(Preemption())
        targets = {name: item for name, item in self._items.items() if has_state(item)}
        return self._manager.resume(like, items=targets, **keywords)

    def on_step(
        self, step: int, tree: Any, metrics: Mapping[str, Any] | None = None, *, force: bool = False
    ) -> PendingSave | None:
        """Saves if the step is due; to be called after every step, from the same thread.

        Args:
          step: Number of finished steps.
          tree: The state after that step.
          metrics: Numbers by name, as for `CheckpointManager.save`.
          force: Whether to save although the step is not due.

        Returns:
          What `CheckpointManager.save` returns.
        """
        pending = self._manager.save(step, tree, metrics=metrics, items=self._items or None, force=force)
        if self._manager.is_in_group:
            self._announce_together(pending)
            self._note(pending)
        else:
            self._note(pending)
            self._announce()
        return pending

    @property
    def should_stop(self) -> bool:
        """Whether the loop should leave: the process will be ended, or a listener asked for it."""
        return self._is_asked_to_stop or self._manager.should_stop

    def on_end(self) -> None:
        """Saves the last step if it is not saved yet, waits until all is durable, and closes the manager.

        Raises:
          CheckpointError: A save failed, and nobody was told yet.
        """
        try:
            self._note(self._manager.save_last())
        finally:
            try:
                self._manager.close()
            finally:
                self._announce()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.on_end()
        else:
            self._manager.__exit__(kind, error, trace)

    def _before(self, step: int, tree: Any) -> None:
        for listener in self._before_save:
            listener(step, tree)

    def _note(self, pending: PendingSave | None) -> None:
        # With too little time for another save, the manager gives the one in flight, which is known already.
        if pending is not None and pending not in self._unannounced:
            self._unannounced.append(pending)

    def _announce_together(self, begun: PendingSave | None) -> None:
        """Tells the listeners of all processes of the saves that ended before this one began."""
        if begun is None or begun in self._unannounced or not self._unannounced:
            return
        self._announce()
        if self._after_save:
            self._is_asked_to_stop = self._manager.hear_first(self._is_asked_to_stop)

    def _announce(self) -> None:
        """Tells the listeners of what was committed since the last call."""
        while self._unannounced and self._unannounced[0].done():
            info = self._unannounced.pop(0).info
            if info is None or info.step is None:
                continue
            for listener in self._after_save:
                if listener(info.step, info) is True:
                    self._is_asked_to_stop = True
