"""Garbage collections are rare while a program starts, and as the program had them afterwards, whatever happens."""

from __future__ import annotations

import gc
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import fastload
from fastload.garbage import Rarely, rarely
from fastload.testing import Hub

THRESHOLDS = (701, 11, 12)


@pytest.fixture(autouse=True)
def thresholds() -> Iterator[None]:
    """Start each test with thresholds that can be recognised."""
    before = gc.get_threshold()
    gc.set_threshold(*THRESHOLDS)
    yield
    rarely.end()
    gc.set_threshold(*before)


def test_thresholds_are_the_programs_again_at_the_end():
    own = Rarely()
    own.begin()
    own.begin()
    assert gc.get_threshold()[0] > 100_000
    own.end()
    assert gc.get_threshold() == THRESHOLDS
    own.end()
    assert gc.get_threshold() == THRESHOLDS


class Ring:
    """What only the collector can free."""

    def __init__(self) -> None:
        self.myself = self


def young() -> int:
    return sum(isinstance(found, Ring) for generation in (0, 1) for found in gc.get_objects(generation))


@pytest.mark.parametrize("failed", [False, True])
def test_what_was_made_meanwhile_is_old_at_the_end_unless_the_load_failed(failed: bool):
    """Nobody waits for a collection of all that imports have made; what a failed load leaves is freed soon."""
    own = Rarely()
    gc.collect()
    with own.during():
        rings = [Ring() for _ in range(1_000)]
        wanted = weakref.ref(rings[0])
        assert young() == 1_000
        gc.disable()  # or the first collection afterwards comes before the look
        try:
            own.end(failed=failed)
            assert young() == (1_000 if failed else 0)
        finally:
            gc.enable()
    del rings
    gc.collect()
    assert wanted() is None
    assert gc.get_freeze_count() == 0


def test_what_the_program_froze_stays_frozen():
    own = Rarely()
    with own.during():
        gc.freeze()
        frozen = gc.get_freeze_count()
    try:
        assert gc.get_freeze_count() > frozen // 2  # some of it is not needed any more, and is gone
    finally:
        gc.unfreeze()


def test_what_the_program_sets_meanwhile_stays():
    own = Rarely()
    with own.during():
        gc.set_threshold(5, 5, 5)
    assert gc.get_threshold() == (5, 5, 5)


@pytest.mark.parametrize("chosen", [(0, 0, 0), (0, 10, 10), (1_000_000, 10, 10)])
def test_a_program_that_collects_as_rarely_is_left_alone(chosen: tuple[int, int, int]):
    gc.set_threshold(*chosen)
    own = Rarely()
    with own.during():
        assert gc.get_threshold() == chosen
    assert gc.get_threshold() == chosen


def test_a_program_that_never_loads_is_given_its_collector_back():
    now = 0.0
    own = Rarely(lambda: now)
    own.begin()
    gc.collect()
    assert gc.get_threshold() != THRESHOLDS
    now = 10_000.0
    gc.collect()
    assert gc.get_threshold() == THRESHOLDS


def test_a_load_that_ends_within_a_collection_does_not_wait_for_itself():
    own: Rarely = Rarely(lambda: (own.end(), 0.0)[1])  # as a finalizer of a forgotten load does, wherever it runs
    thread = threading.Thread(target=own.begin, daemon=True)
    thread.start()
    thread.join(10)
    assert not thread.is_alive()
    own.end()
    assert gc.get_threshold() == THRESHOLDS


def test_a_program_that_empties_the_list_of_callbacks_still_ends_its_loads(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gc, "callbacks", [])
    own = Rarely()
    with own.during():
        gc.callbacks.clear()
    assert gc.get_threshold() == THRESHOLDS


def test_a_forked_child_collects_as_usual():
    rarely.begin()
    child = os.fork()
    if not child:
        os._exit(0 if gc.get_threshold() == THRESHOLDS else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert gc.get_threshold() != THRESHOLDS


@pytest.mark.parametrize("pause_gc", [True, False])
def test_a_load_collects_rarely_and_then_as_before(
    pause_gc: bool, make_hub: Callable[..., Hub], tiny_model: Path, tmp_path: Path
):
    hub = make_hub({"org/m": tiny_model})
    seen: list[bool] = []
    settings = {"cache_dir": tmp_path, "endpoint": hub.endpoint, "pause_gc": pause_gc}
    running = fastload.start("org/m", settings=settings)
    seen.append(gc.get_threshold() == THRESHOLDS)

    def look(event: fastload.Event) -> None:
        if event.name == "load.started":
            seen.append(gc.get_threshold() == THRESHOLDS)

    fastload.load_tensors("org/m", settings=settings, observers=[look])
    assert running.done
    assert seen == [not pause_gc] * 2
    assert gc.get_threshold() == THRESHOLDS


def test_a_load_that_fails_leaves_the_collector_as_it_was(
    make_hub: Callable[..., Hub], tiny_model: Path, tmp_path: Path
):
    hub = make_hub({"org/m": tiny_model})
    with pytest.raises(fastload.FastloadError):
        fastload.load("nobody/has-this", settings={"cache_dir": tmp_path, "endpoint": hub.endpoint})
    assert gc.get_threshold() == THRESHOLDS
