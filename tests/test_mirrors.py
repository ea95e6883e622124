"""Whom to ask next: who is well, who is fast, who has not been asked yet."""

from __future__ import annotations

import pytest

from fastload.mirrors import Mirrors


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def mirrors(clock: Clock) -> Mirrors:
    return Mirrors(["origin", "a", "b", "a"], clock)


def test_of_equals_the_origin_is_asked_first(mirrors: Mirrors):
    assert mirrors.urls == ("origin", "a", "b")
    assert mirrors.pick() == "origin"


def test_each_is_tried_early(mirrors: Mirrors):
    asked = []
    for _ in range(3):
        asked.append(mirrors.pick())
        mirrors.started(asked[-1])
    assert asked == ["origin", "a", "b"]


def test_the_share_follows_the_rate(mirrors: Mirrors):
    for url, rate in {"origin": 1000, "a": 3000, "b": 2000}.items():
        mirrors.delivered(url, rate, 1.0)
    asked = []
    for _ in range(12):
        asked.append(mirrors.pick())
        mirrors.started(asked[-1])
    assert [asked.count(url) for url in ("origin", "a", "b")] == [2, 6, 4]


def test_a_failed_one_rests_longer_each_time_and_comes_back(mirrors: Mirrors, clock: Clock):
    rests = []
    for _ in range(9):
        mirrors.failed("origin")
        start_s = clock.now_s
        while not mirrors.rested(avoid=["a", "b"]):
            clock.now_s += 0.25
        rests.append(clock.now_s - start_s)
    assert rests == [0.5, 1, 2, 4, 8, 16, 30, 30, 30]
    mirrors.delivered("origin", 1, 1.0)
    mirrors.failed("origin")
    clock.now_s += 0.5
    assert mirrors.rested(avoid=["a", "b"])  # what was is forgotten


def test_where_a_range_failed_it_is_asked_for_last(mirrors: Mirrors, clock: Clock):
    mirrors.failed("a")
    assert mirrors.pick(avoid={"origin", "b"}) == "a"  # resting, but not yet asked for this one
    assert mirrors.pick(avoid={"origin"}) == "b"
    assert mirrors.pick(avoid={"origin", "a", "b"}) in ("origin", "b")
    assert mirrors.pick(only="a") == "a"


def test_a_pause_that_was_asked_for_outlives_a_success(mirrors: Mirrors, clock: Clock):
    mirrors.failed("origin", 60.0)
    mirrors.failed("origin", 5.0)  # of a request that was under way: the longer one holds
    mirrors.delivered("origin", 1, 1.0)
    assert mirrors.asked_s("origin") == 60
    clock.now_s += 61
    assert mirrors.asked_s("origin") < 0
    assert mirrors.asked_s("a") < 0
