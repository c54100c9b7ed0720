"""What a save cost, and who is told of it: `CheckpointInfo`, observers, the log, and a bar on a terminal."""

from __future__ import annotations

import errno
import io
import logging
import pathlib
import sys
import threading
import time

import jax.numpy as jnp
import pytest

import jaxckpt
from jaxckpt import CheckpointManager

from .storage_faults import GateKernel, Operation, RefusingKernel
from .test_manager import MANIFEST, Events, name_of, tree_of
from .test_manager_truth import MIB, data_of, flip_a_bit, gate_of, manager_on, records_of


def test_a_save_says_what_it_cost(path: pathlib.Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "jaxckpt")
    events = Events()
    infos = []
    with CheckpointManager(path, max_to_keep=1, on_event=events) as manager:
        for step in range(1, 4):
            pending = manager.save(step, {"w": jnp.ones((64, 1024)), "b": jnp.ones(3)})
            assert pending is not None
            infos.append(pending.wait())
    for step, info in enumerate(infos, start=1):
        assert info.step == step
        assert info.path == str(path / name_of(step))
        assert (info.nbytes, info.leaves) == (64 * 1024 * 4 + 12, 2)
        size = sum(file.stat().st_size for file in [data_of(path, 3)]) if step == 3 else info.nbytes
        assert info.bytes_written >= size
        assert 0 <= info.waited_s <= info.blocked_s <= info.seconds
        assert 0 < info.snapshot_s <= info.seconds
        assert 0 < info.persist_s <= info.seconds
        assert info.bytes_per_s == info.bytes_written / info.persist_s
    assert [event.info for event in events if event.kind == "saved"] == infos
    assert [(event.kind, event.step) for event in events if event.kind == "deleted"] == [
        ("deleted", 1),
        ("deleted", 2),
    ]
    assert {event.kind for event in events} == {"saving", "saved", "deleted"}
    assert all(str(event.step) in event.message for event in events)
    lines = records_of(caplog, logging.INFO)
    assert len(lines) == 3
    assert all(line.startswith(f"saved {path}") for line in lines)
    assert records_of(caplog, logging.WARNING) == records_of(caplog, logging.ERROR) == []


def test_an_observer_that_raises_does_no_harm(path: pathlib.Path, caplog: pytest.LogCaptureFixture) -> None:
    def observe(event: jaxckpt.CheckpointEvent) -> None:
        raise RuntimeError(f"an observer of {event.kind}")

    kernel = RefusingKernel(errno.ENOSPC, ("pwrite",), 0)
    manager = manager_on(path, kernel, max_to_keep=1, on_event=observe)
    manager.save(1, tree_of(1))
    manager.wait()
    kernel.at, kernel.count = 1, 0
    manager.save(2, tree_of(2))
    with pytest.raises(jaxckpt.WriteError):
        manager.wait()
    manager.save(3, tree_of(3))
    manager.close()
    flip_a_bit(path / name_of(3) / MANIFEST)
    with pytest.raises(jaxckpt.CorruptError):
        manager.resume()
    assert sorted(entry.name for entry in path.iterdir()) == ["checkpoint.json", name_of(3)]
    for kind in ("saving", "saved", "failed", "deleted", "damaged"):
        assert f"an observer of {kind}" in caplog.text


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.slow
def test_a_long_save_shows_a_bar_on_a_terminal_and_wipes_it_away(
    path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    gates = [gate_of(1), gate_of(2)]

    class Gates(GateKernel):
        def before(self, operation: Operation) -> None:
            for gate in gates:
                gate.before(operation)

    with manager_on(path, Gates(lambda operation: False), progress=True) as manager:
        for step, gate in enumerate(gates, start=1):
            pending = manager.save(step, {"w": jnp.ones((4, MIB))})
            assert pending is not None
            assert gate.reached.wait(60)
            # Bars are for saves of more than a second, so this one must be.
            assert not threading.Event().wait(1.05 - pending.progress().elapsed_s)
            gate.may_go_on.set()
            pending.wait()
            shown = terminal.getvalue()
            assert "[####" in shown
            assert "100%" in shown
            assert shown.endswith("\r\x1b[K")
            terminal.truncate(0)
            terminal.seek(0)


def test_short_saves_and_other_streams_show_no_bar(
    path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for stream in (Terminal(), io.StringIO()):
        monkeypatch.setattr(sys, "stderr", stream)
        with CheckpointManager(path, progress=True) as manager:
            manager.save(1, tree_of(1), overwrite=True)
        assert stream.getvalue() == ""


def test_who_is_told_of_a_save_may_restore_it_and_wait(path: pathlib.Path) -> None:
    restored = []

    def tell(event: jaxckpt.CheckpointEvent) -> None:
        if event.kind == "saved":
            manager.wait()
            restored.append(manager.restore()["n"])

    with CheckpointManager(path, on_event=tell) as manager:
        for step in (1, 2):
            pending = manager.save(step, tree_of(step))
            assert pending is not None
            assert pending.wait_done(60)
    assert restored == [1, 2]


def test_who_is_told_of_a_deletion_may_wait_delete_and_prune(path: pathlib.Path) -> None:
    may_go_on = threading.Event()
    answered = []

    def observe(event: jaxckpt.CheckpointEvent) -> None:
        if event.kind == "deleted" and event.step == 1:
            assert may_go_on.wait(60)
            manager.wait()
            manager.prune()
            answered.append(event.step)

    manager = CheckpointManager(path, max_to_keep=1, on_event=observe)
    for step in (1, 2, 3):  # the third is done, and its deletions wait for those of the second
        pending = manager.save(step, tree_of(step))
        assert pending is not None
        pending.wait()
    may_go_on.set()
    manager.close()
    assert answered == [1]
    assert manager.steps() == [3]


class TerminalThatHangsUp(Terminal):
    def write(self, text: str) -> int:
        raise OSError(errno.EIO, "the terminal is gone")


@pytest.mark.slow
@pytest.mark.parametrize("stream", [TerminalThatHangsUp(), None], ids=["hung up", "none"])
def test_without_a_terminal_a_long_save_goes_on(
    path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, stream: io.StringIO | None
) -> None:
    monkeypatch.setattr(sys, "stderr", stream)
    gate = gate_of(1)
    manager = manager_on(path, gate, progress=True)
    pending = manager.save(1, {"w": jnp.ones((4, MIB))})
    assert pending is not None
    assert gate.reached.wait(60)
    assert not threading.Event().wait(1.05 - pending.progress().elapsed_s)
    gate.may_go_on.set()
    manager.close()
    assert manager.steps() == [1]


def test_what_comes_before_a_save_counts_as_blocked(path: pathlib.Path) -> None:
    entered_s: list[float] = []
    with CheckpointManager(path) as manager:
        # Litter and listeners cost time in the loop before anything is copied.
        manager.add_listener(lambda step, tree: entered_s.append(time.perf_counter()))
        manager.add_listener(lambda step, tree: jnp.ones((4, MIB)).block_until_ready())
        manager.add_listener(lambda step, tree: entered_s.append(time.perf_counter()))
        pending = manager.save(1, tree_of(1))
        assert pending is not None
        info = pending.wait()
    listened_s = entered_s[1] - entered_s[0]
    assert listened_s < info.blocked_s <= info.seconds
