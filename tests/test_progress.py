"""Progress of the command line: bars on a terminal, plain lines elsewhere, nothing with quiet; the clock is the test's."""

from __future__ import annotations

import io
import threading
from collections.abc import Iterator

import pytest

from fastload.builtin.progress import LINE_S, Bars, Lines, Tally, shown
from fastload.events import Event

MB = 10**6


def planned(file: str, count: int, state: str = "missing") -> Event:
    return Event("file.planned", 0.0, 0.0, file, {"bytes": count, "state": state})


def landed(file: str, start: int, stop: int) -> Event:
    return Event("range.landed", 0.0, 0.0, file, {"start": start, "stop": stop})


def verified(file: str) -> Event:
    return Event("file.verified", 0.0, 0.0, file, {"bytes": 0})


REFETCHED = Event("file.refetched", 0.0, 0.0, "w", {"mirror": "m", "expected": "a", "actual": "b"})
RETRIED = Event("range.retried", 0.0, 0.0, "w", {"start": 0, "stop": 1, "mirror": "m", "reason": "cut", "wait_s": 0.1})


@pytest.mark.parametrize(
    ("events", "numbers", "in_flight"),
    [
        ([], (0, 0, 0), []),
        ([planned("w", 100)], (100, 0, 0), []),
        ([planned("w", 100), landed("w", 0, 40)], (100, 40, 40), ["w"]),
        ([planned("w", 100), landed("w", 0, 100), verified("w")], (100, 100, 100), []),
        ([planned("c", 10, "cached"), planned("w", 100)], (110, 10, 0), []),
        ([planned("w", 100), planned("w", 60, "partial"), landed("w", 60, 80)], (100, 80, 20), ["w"]),  # resumed
        ([planned("w", 100), verified("w")], (100, 100, 0), []),  # another process fetched it
        ([planned("w", 100), landed("w", 0, 100), REFETCHED, landed("w", 0, 30)], (100, 30, 130), ["w"]),
        (
            [planned("w", 100), landed("w", 0, 80), landed("w", 0, 80)],
            (100, 100, 160),
            ["w"],
        ),  # hedged: never above 100 %
        (
            [planned("a", 5), planned("b", 5), landed("a", 0, 5), verified("a"), verified("b")],
            (10, 10, 5),
            [],
        ),  # one blob
    ],
)
def test_tally(events: list[Event], numbers: tuple[int, int, int], in_flight: list[str]):
    tally = Tally()
    for event in events:
        tally.observe(event)
    assert (tally.total_bytes, tally.landed_bytes, tally.travelled_bytes) == numbers
    assert tally.in_flight == in_flight


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_a_plain_line_tells_bytes_rate_and_what_is_left():
    clock = Clock()
    lines = Lines("org/model", io.StringIO(), clock=clock)
    assert lines.line() == "org/model: asking for the list of files"
    for event in (planned("w", 1000 * MB), landed("w", 0, 200 * MB), RETRIED):
        lines(event)
    clock.now_s = 10.0
    assert lines.line() == "org/model: 200.0 of 1000.0 MB (20 %) · 0.020 GB/s · 40 s left · 1 retries · w"
    clock.now_s = 20.0
    assert lines.line() == "org/model: 200.0 of 1000.0 MB (20 %) · 0.000 GB/s · 1 retries · w"  # nothing came since


def test_a_line_is_written_every_ten_seconds_also_while_nothing_arrives():
    clock, out = Clock(), io.StringIO()
    answers: Iterator[bool] = iter([False, False, False, True])
    waited: list[float] = []

    def wait(seconds: float) -> bool:
        waited.append(seconds)
        clock.now_s += seconds
        return next(answers)

    lines = Lines("org/model", out, clock=clock, wait=wait)
    lines(planned("w", MB))
    lines.run()
    assert waited == [LINE_S] * 4
    assert len(out.getvalue().splitlines()) == 3


def test_a_reader_that_went_away_ends_the_lines_and_not_the_load():
    out = io.StringIO()
    out.close()
    lines = Lines("org/model", out, wait=lambda seconds: False)
    lines.run()


def test_quiet_and_pipes_and_terminals():
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for stream, quiet, kind in ((io.StringIO(), False, Lines), (Terminal(), False, Bars)):
        with shown("org/model", quiet=quiet, stream=stream) as observer:
            assert isinstance(observer, kind)
    silent = Terminal()
    with shown("org/model", quiet=True, stream=silent) as observer:
        observer(planned("w", 10))
    assert silent.getvalue() == ""


def test_a_short_load_writes_no_line_to_a_pipe():
    out = io.StringIO()
    with shown("org/model", stream=out) as observer:
        observer(planned("w", 10))
        observer(verified("w"))
    assert out.getvalue() == ""
    assert not [t for t in threading.enumerate() if t.name == "fastload-progress"]


def test_bars_show_the_total_and_one_row_a_file_in_flight():
    bars = Bars("org/[bold]model", io.StringIO())

    def rows() -> list[tuple[str, float | None, float]]:
        return [(task.description, task.total, task.completed) for task in bars._progress.tasks]

    for event in (planned("c", 10, "cached"), planned("a", 100), planned("b", 200)):
        bars(event)
    assert rows() == [("org/[bold]model", 310, 10)]
    bars(landed("a", 0, 50))
    bars(landed("b", 0, 20))
    assert rows() == [("org/[bold]model", 310, 80), ("a", 100, 50), ("b", 200, 20)]
    bars(landed("a", 50, 100))
    bars(verified("a"))
    assert rows() == [("org/[bold]model", 310, 130), ("b", 200, 20)]
    with bars:
        pass
    assert rows() == [("org/[bold]model", 310, 130)]


def test_names_are_not_markup():
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    out = Terminal()
    with shown("org/[model]", stream=out) as observer:
        observer(planned("w", 10))
    assert "org/[model]" in out.getvalue()
