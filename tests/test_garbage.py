"""Python's garbage collector is paused while objects are made, in all threads, and as it was afterwards."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Callable, Generator
from typing import Any

import jax.numpy as jnp
import pytest

import jaxckpt
from jaxckpt._garbage import collection_paused


@pytest.fixture(autouse=True)
def enabled() -> Generator[None]:
    assert gc.isenabled()
    yield
    is_enabled = gc.isenabled()
    gc.enable()
    assert is_enabled


def test_inner_pause_does_not_end_the_outer_one() -> None:
    with collection_paused():
        with collection_paused():
            assert not gc.isenabled()
        assert not gc.isenabled()
    assert gc.isenabled()


def test_pause_ends_with_an_exception() -> None:
    @collection_paused()
    def fail() -> None:
        assert not gc.isenabled()
        raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert gc.isenabled()


def test_pauses_of_two_threads_end_with_the_longer_one() -> None:
    may_end = threading.Event()
    has_begun = threading.Event()

    def pause() -> None:
        with collection_paused():
            has_begun.set()
            may_end.wait(30)

    other = threading.Thread(target=pause)
    other.start()
    try:
        assert has_begun.wait(30)
        with collection_paused():
            pass
        assert not gc.isenabled()
    finally:
        may_end.set()
        other.join(30)
    assert gc.isenabled()


def test_who_has_disabled_the_collector_keeps_it_so() -> None:
    gc.disable()
    try:
        with collection_paused():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning", "ignore:.*fork.*:RuntimeWarning")
def test_forked_child_collects_though_a_thread_of_its_parent_pauses() -> None:
    with collection_paused():
        child = os.fork()
        if child == 0:
            os._exit(0 if gc.isenabled() else 1)
        _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0


@pytest.mark.parametrize(("operation", "collections_max"), [("save", 15), ("open", 4), ("restore", 30)])
def test_many_leaves_are_hardly_searched_for_garbage(
    tmp_path: Any, operation: str, collections_max: int, count_collections: Callable[[], int]
) -> None:
    """Without pauses it is 30, 8 and 80 times: once for every 700 objects, of which a leaf takes a few."""
    tree = {f"layer_{number}": {"w": jnp.ones(3)} for number in range(3000)}
    path = tmp_path / "a"
    if operation != "save":
        jaxckpt.save(path, tree)
    gc.collect()
    before = count_collections()
    if operation == "save":
        jaxckpt.save(path, tree)
    elif operation == "open":
        jaxckpt.open(path)
    else:
        jaxckpt.restore(path, tree)
    assert count_collections() - before <= collections_max


@pytest.fixture(name="count_collections")
def fixture_count_collections() -> Generator[Callable[[], int]]:
    """How many collections this process has had since then."""
    phases: list[str] = []

    def note(phase: str, info: dict[str, int]) -> None:
        del info
        phases.append(phase)

    gc.callbacks.append(note)
    yield lambda: phases.count("start")
    gc.callbacks.remove(note)
