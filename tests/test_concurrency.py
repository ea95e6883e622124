"""As many connections as pay: more where each is held back, no more where the link is, fewer when a server asks for it."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from fastload.concurrency import Concurrency

MB = 1_000_000


class Run:
    """A transfer over *rate*, which tells for a number of connections the bytes a second they bring."""

    def __init__(self, most: int, rate: Callable[[int], float]) -> None:
        self.now_s, self.received = 0.0, 0.0
        self.concurrency = Concurrency(most, lambda: self.now_s)
        self._rate = rate
        self.limits = [self.concurrency.limit]

    def go(self, seconds: float, *, busy: bool = True, throttled: int = 0) -> int:
        for _ in range(int(seconds / 0.25)):
            self.now_s += 0.25
            self.received += 0.25 * self._rate(self.concurrency.limit)
            self.concurrency.look(int(self.received), busy=busy, throttled=throttled)
            self.limits.append(self.concurrency.limit)
        return self.concurrency.limit


def test_more_connections_where_each_is_held_back():
    run = Run(64, lambda connections: 40 * MB * connections)
    assert run.limits[0] == 8
    assert run.go(10) == 64
    assert run.limits == sorted(run.limits)


def test_where_the_link_is_full_the_step_is_taken_back_for_good():
    run = Run(64, lambda connections: min(300 * MB, 40 * MB * connections))
    assert run.go(20) == 8
    assert max(run.limits) == 16


def test_a_step_that_brings_too_little_is_taken_back():
    assert Run(16, lambda connections: 100 * MB * (1.3 if connections == 16 else 1)).go(10) == 8
    assert Run(16, lambda connections: 100 * MB * (1.6 if connections == 16 else 1)).go(10) == 16


@pytest.mark.parametrize("most", [1, 2, 8, 12])
def test_never_more_than_allowed(most: int):
    run = Run(most, lambda connections: MB * connections)
    run.go(10)
    assert max(run.limits) == most
    assert run.limits[0] == min(8, most)


def test_nothing_is_learned_while_there_is_too_little_to_do():
    run = Run(16, lambda connections: MB)
    assert run.go(10, busy=False) == 8
    assert set(run.limits) == {8}


def test_a_server_that_says_429_gets_half_as_many():
    run = Run(16, lambda connections: MB * connections)
    assert run.go(0.25, throttled=1) == 4
    assert run.go(10, throttled=1) == 4
    assert run.go(0.25, throttled=5) == 2
    assert run.go(0.5, throttled=9) == 1
    assert run.go(0.5, throttled=12) == 1
