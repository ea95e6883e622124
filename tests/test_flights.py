"""A range on a crawling connection goes to another one; nothing else is ever given up."""

from __future__ import annotations

import pytest

from fastload.flights import Flight, Flights

MB = 1_000_000


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


class Line:
    """A connection that brings *rate* bytes a second."""

    def __init__(self, flights: Flights, clock: Clock, size: int, rate: float) -> None:
        self._clock, self._began_s, self._size, self._rate = clock, clock.now_s, size, rate
        self.abandoned = 0
        self.flight: Flight = flights.begin(size, self.position, self.abandon)

    def position(self) -> int:
        return min(self._size, int((self._clock.now_s - self._began_s) * self._rate))

    def abandon(self) -> None:
        self.abandoned += 1


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def flights(clock: Clock) -> Flights:
    """Eight ranges of 8 MB have landed, each in 0.2 s."""
    flights = Flights(clock)
    lines = [Line(flights, clock, 8 * MB, 40 * MB) for _ in range(8)]
    clock.now_s += 0.2
    for line in lines:
        flights.end(line.flight)
    return flights


def test_a_crawling_range_is_given_up(flights: Flights, clock: Clock):
    crawling, healthy = Line(flights, clock, 8 * MB, 1 * MB), Line(flights, clock, 80 * MB, 40 * MB)
    clock.now_s += 0.6
    flights.give_up_the_slow()
    assert (crawling.abandoned, healthy.abandoned) == (1, 0)


def test_a_range_that_brings_nothing_is_given_up(flights: Flights, clock: Clock):
    silent = Line(flights, clock, 8 * MB, 0)
    clock.now_s += 2.0
    flights.give_up_the_slow()
    assert not silent.abandoned  # a fresh one takes 0.7 s
    for _ in range(3):
        clock.now_s += 0.2
        flights.give_up_the_slow()
    assert silent.abandoned == 1


def test_a_range_that_is_nearly_there_is_not_given_up(flights: Flights, clock: Clock):
    late = Line(flights, clock, 8 * MB, 4 * MB)
    clock.now_s += 1.8  # 0.8 MB are left, 0.2 s
    flights.give_up_the_slow()
    assert not late.abandoned


def test_a_young_request_is_not_given_up(flights: Flights, clock: Clock):
    young = Line(flights, clock, 80 * MB, 1 * MB)
    clock.now_s += 0.4
    flights.give_up_the_slow()
    assert not young.abandoned


def test_where_all_are_slow_none_is_given_up(clock: Clock):
    flights = Flights(clock)
    for _ in range(8):
        line = Line(flights, clock, 1 * MB, 0.1 * MB)
        clock.now_s += 10
        flights.end(line.flight)
    other = Line(flights, clock, 1 * MB, 0.05 * MB)
    clock.now_s += 5
    flights.give_up_the_slow()
    assert not other.abandoned


def test_before_anything_has_landed_none_is_given_up(clock: Clock):
    flights = Flights(clock)
    first = Line(flights, clock, 1 * MB, 0)
    clock.now_s += 60
    flights.give_up_the_slow()
    assert not first.abandoned


def test_no_more_are_given_up_than_one_for_four_that_landed(flights: Flights, clock: Clock):
    lines = [Line(flights, clock, 8 * MB, 0) for _ in range(20)]
    clock.now_s += 5
    for _ in range(3):
        flights.give_up_the_slow()
    assert sum(line.abandoned for line in lines) == 1 + 8 // 4


def test_bytes_under_way_count_as_received(flights: Flights, clock: Clock):
    Line(flights, clock, 8 * MB, 1 * MB)
    clock.now_s += 1
    assert flights.received_bytes == 8 * 8 * MB + 1 * MB
