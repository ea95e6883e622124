"""When to try again, and how long servers ask to be left alone."""

from __future__ import annotations

from datetime import UTC, datetime
from email.utils import format_datetime
from typing import Any

import pytest
from multidict import CIMultiDict

from fastload.errors import Attempt, MirrorError, MirrorStatusError
from fastload.retry import Retrying, retry_after_s, retryable_status
from fastload.settings import Settings

NOW = datetime(2026, 1, 1, 12, 0, 0, tzinfo=UTC)


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"Retry-After": "120"}, 120),
        ({"retry-after": " 7 "}, 7),
        ({"Retry-After": "0"}, 0),
        ({"Retry-After": format_datetime(NOW.replace(minute=1), usegmt=True)}, 60),
        ({"Retry-After": "Thu, 01 Jan 2026 11:59:00 GMT"}, 0),
        ({"Retry-After": "Thursday, 01-Jan-26 12:00:30 GMT"}, 30),
        ({"Retry-After": "soon"}, None),
        ({"Retry-After": "-5"}, None),
        ({"Retry-After": "1.5"}, None),
        ({"Retry-After": ""}, None),
        ({"Retry-After": "²"}, None),
        ({"Retry-After": "9" * 400}, float("inf")),
        ({"RateLimit": '"api";r=0;t=55'}, 55),
        ({"RateLimit": '"api";r=3;t=55'}, None),
        ({"RateLimit": '"pages";r=10;t=9, "api";r=0;t=55'}, 55),
        ({"RateLimit": '"api"; r=0; t=55'}, 55),
        ({"RateLimit": '"api";r=0'}, None),
        ({"RateLimit": "limit=100, remaining=0, reset=9"}, None),
        ({"RateLimit": '"api";r=0;t=55', "Retry-After": "3"}, 55),
        ({"RateLimit": '"api";r=1;t=55', "Retry-After": "3"}, 3),
    ],
)
def test_what_servers_ask_for(headers: dict[str, str], seconds: float | None):
    assert retry_after_s(CIMultiDict(headers), NOW.timestamp()) == seconds


@pytest.mark.parametrize("status", [408, 425, 429, 500, 502, 503, 504, 520, 524])
def test_an_answer_that_may_change(status: int):
    assert retryable_status(status)


@pytest.mark.parametrize("status", [200, 302, 400, 401, 403, 404, 410, 416, 451, 501, 505])
def test_an_answer_that_will_not_change(status: int):
    assert not retryable_status(status)


class Script:
    """An operation that ends as scripted: an error, with progress or without, or a result."""

    def __init__(self, retrying: Retrying, *ends: Any) -> None:
        self._retrying = retrying
        self._ends = list(ends)
        self.calls = 0

    async def __call__(self) -> str:
        self.calls += 1
        end = self._ends.pop(0) if len(self._ends) > 1 else self._ends[0]
        if isinstance(end, str):
            return end
        error, progress = end
        self._retrying.tries.note(Attempt("m", 0.0, error.message), progress=progress)
        raise error


@pytest.fixture
def waits() -> list[float]:
    return []


def retrying(waits: list[float], elsewhere: bool = False, **settings: Any) -> Retrying:
    async def sleep(seconds: float) -> None:
        waits.append(seconds)

    resolved = Settings.resolve(settings, environ={})
    return Retrying(resolved, sleep=sleep, elsewhere=lambda: elsewhere, random_unit=lambda: 0.5)


DOWN = (MirrorError("down"), False)
CUT = (MirrorError("cut"), True)
BUSY = (MirrorStatusError("busy", status=429, retry_after_s=30.0), False)


async def test_tries_without_progress_are_counted_and_waits_double(waits: list[float]):
    tries = retrying(waits, attempts=9)
    with pytest.raises(MirrorError, match="down"):
        await tries.run(script := Script(tries, DOWN))
    assert script.calls == 9
    assert waits == pytest.approx([0.15, 0.3, 0.6, 1.2, 2.4, 4.8, 7.5, 7.5])


async def test_progress_starts_the_count_anew(waits: list[float]):
    tries = retrying(waits, attempts=2)
    assert await tries.run(script := Script(tries, *[CUT] * 50, DOWN, CUT, DOWN, "there")) == "there"
    assert script.calls == 54
    assert max(waits) < 0.2


async def test_what_is_hopeless_is_tried_once(waits: list[float]):
    tries = retrying(waits)
    with pytest.raises(MirrorError):
        await tries.run(script := Script(tries, (MirrorError("no", retryable=False), False)))
    assert (script.calls, waits) == (1, [])


async def test_errors_of_others_are_not_retried(waits: list[float]):
    tries = retrying(waits)

    async def broken() -> None:
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError):
        await tries.run(broken)
    assert waits == []


@pytest.mark.parametrize(("longest_s", "wait_s"), [(300, 30.5), (10, 10.5), (0, 0.5)])
async def test_a_pause_that_was_asked_for_is_kept_up_to_the_setting(
    longest_s: float, wait_s: float, waits: list[float]
):
    tries = retrying(waits, retry_after_max_s=longest_s)
    assert await tries.run(Script(tries, BUSY, "there")) == "there"
    assert waits == [wait_s]


async def test_there_is_no_wait_where_another_can_be_asked(waits: list[float]):
    tries = retrying(waits, elsewhere=True)
    assert await tries.run(Script(tries, DOWN, BUSY, "there")) == "there"
    assert waits == [0.0, 0.0]


async def test_each_retry_is_told_with_its_wait(waits: list[float]):
    tries, told = retrying(waits), []
    await tries.run(Script(tries, DOWN, BUSY, "there"), retried=lambda e, s: told.append((e.message, s)))
    assert told == [("down", pytest.approx(0.15)), ("busy", 30.5)]
