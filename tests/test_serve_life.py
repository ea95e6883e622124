"""The life of a supervised app, what is remembered of it, and what its start looks like: decided without a clock."""

from __future__ import annotations

import pytest

from fastload.errors import FastloadError
from fastload.events import Event
from fastload.serving.child import obituary
from fastload.serving.life import Life
from fastload.serving.progress import Model, Progress, Rates


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def life(clock: Clock) -> Life:
    return Life(idle_s=30.0, clock=clock, unix_clock=clock)


def start(life: Life, clock: Clock, seconds: float = 4.0) -> None:
    life.wake()
    life.starting()
    clock.now_s += seconds
    life.ready()


# -- waking -----------------------------------------------------------------------------------------------------------


def test_any_number_of_wakes_is_one_start(life: Life):
    assert [life.wake(), life.wake()] == [True, False]
    life.starting()
    assert (life.wake(), life.wanted) == (False, False)
    life.ready()
    assert (life.wake(), life.wanted, life.attempt) == (False, False, 1)


def test_a_wake_while_it_is_stopped_starts_it_afterwards(life: Life, clock: Clock):
    start(life, clock)
    life.stopping()
    assert life.wake()
    life.asleep()
    assert life.wanted


def test_what_is_about_to_end_is_not_woken(life: Life):
    life.wake()
    life.drain()
    assert (life.wake(), life.wanted) == (False, False)
    assert life.to_record()["state"] == "draining"


# -- idling -----------------------------------------------------------------------------------------------------------


def test_it_is_idle_so_long_after_the_last_request_ended_and_never_during_one(life: Life, clock: Clock):
    start(life, clock)
    clock.now_s += 10
    assert life.idle_in_s == 20
    with life.request():
        clock.now_s += 500
        assert life.idle_in_s is None
    assert life.idle_in_s == 30
    clock.now_s += 31
    assert life.idle_in_s == 0


def test_a_wake_keeps_it_awake(life: Life, clock: Clock):
    start(life, clock)
    clock.now_s += 29
    life.wake()
    assert life.idle_in_s == 30


def test_without_a_limit_it_is_never_idle(clock: Clock):
    life = Life(clock=clock)
    start(life, clock)
    clock.now_s += 1e6
    assert life.idle_in_s is None


# -- failing ----------------------------------------------------------------------------------------------------------


def test_pauses_double_up_to_a_minute_and_run_while_nobody_asks(life: Life, clock: Clock):
    pauses = []
    for _ in range(9):
        life.wake()
        life.starting()
        life.failed(FastloadError("no"))
        pauses.append(life.pause_s)
    assert pauses == [1, 2, 4, 8, 16, 32, 60, 60, 60]
    clock.now_s += 61
    assert life.pause_s == 0


def test_a_good_start_forgets_the_error_but_a_crash_soon_after_it_counts_on(life: Life, clock: Clock):
    life.starting()
    life.failed(FastloadError("no"))
    start(life, clock)
    assert (life.error, life.failures) == (None, 1)
    clock.now_s += 5
    life.failed(FastloadError("gone"))
    assert (life.failures, life.pause_s) == (2, 2)
    start(life, clock)
    clock.now_s += 60
    life.failed(FastloadError("gone"))
    assert (life.failures, life.pause_s) == (1, 1)


def test_a_crash_of_what_was_ready_is_no_failed_start(life: Life, clock: Clock):
    start(life, clock)
    life.failed(FastloadError("gone"))
    assert [(s.seconds, s.error) for s in life.starts] == [(4, None)]
    assert (life.totals["ok"].count, life.totals["failed"].count, life.crashes) == (1, 0, 1)


@pytest.mark.parametrize(
    ("status", "words"),
    [(3, "ended with status 3"), (0, "ended with status 0"), (-9, "SIGKILL"), (-11, "SIGSEGV"), (-40, "signal 40"),
     (127, "cannot be found"), (126, "cannot be run")],
)  # fmt: skip
def test_an_end_is_told_in_words(status: int, words: str):
    error = obituary("app:setup", status)
    assert error.message.startswith("app:setup")
    assert words in error.message
    assert ("memory" in (error.hint or "")) == (status == -9)


# -- estimates --------------------------------------------------------------------------------------------------------


def test_the_estimate_is_the_median_of_good_starts(life: Life, clock: Clock):
    assert (life.eta_s, life.retry_after_s) == (None, 5)
    for seconds in (4.0, 10.0, 6.5):
        start(life, clock, seconds)
        life.asleep()
    assert (life.usual_s, life.eta_s, life.retry_after_s) == (6.5, None, 7)
    life.wake()
    assert life.eta_s == 6.5
    life.starting()
    clock.now_s += 2
    assert (life.eta_s, life.retry_after_s) == (4.5, 5)
    clock.now_s += 100
    assert (life.eta_s, life.retry_after_s) == (0, 1)


def test_the_pause_after_a_failure_is_part_of_what_a_client_waits(life: Life, clock: Clock):
    start(life, clock, 4.0)
    life.failed(FastloadError("gone"))
    assert life.retry_after_s == 5


def test_every_change_is_told(life: Life, clock: Clock):
    told = []
    life.changed = lambda: told.append(life.state)
    start(life, clock)
    with life.request():
        pass
    life.failed(FastloadError("gone"))
    life.drain()
    assert told == ["asleep", "starting", "ready", "ready", "ready", "failed", "failed"]


# -- rates ------------------------------------------------------------------------------------------------------------


def test_a_range_counts_evenly_while_it_travelled():
    rates = Rates(100.0)
    rates.add(100.5, 101.5, 4000)
    assert rates.per_s(102.0) == [0, 0, 4000, 4000, 4000, 4000, 0, 0, 0]
    assert rates.told_s == 100.5


def test_the_rate_now_leaves_out_what_is_still_on_its_way():
    rates = Rates(0.0)
    for second in range(5):
        rates.add(second, second + 1, 1000)
    assert rates.now_per_s() == pytest.approx(1000)  # the last range told until 5.0, others may be under way since 4.0


def test_one_small_file_says_nothing_about_the_rate():
    rates = Rates(0.0)
    rates.add(3.0, 3.01, 400)
    assert rates.now_per_s() == 0


def test_steps_grow_with_the_time_and_lose_no_byte():
    rates = Rates(0.0)
    for second in range(1000):
        rates.add(second, second + 1, 10)
    assert rates.bin_s == 16
    shown = rates.per_s(1000.0)
    assert len(shown) <= 120
    assert sum(shown) * rates.bin_s == pytest.approx(10_000)


# -- files and phases -------------------------------------------------------------------------------------------------


def event(name: str, at_s: float = 0.0, seconds: float = 0.0, file: str | None = None, **data: object) -> Event:
    return Event(name, at_s, seconds, file, data)


def test_two_tellers_of_one_file_do_not_count_it_twice():
    model = Model("org/model")
    model.observe(event("file.planned", file="w", bytes=100, state="missing"))
    model.observe(event("file.planned", file="w", bytes=100, state="elsewhere"))
    model.observe(event("range.landed", file="w", start=0, stop=60))
    record = model.to_record()
    assert (record["total_bytes"], record["landed_bytes"], record["files"][0]["state"]) == (100, 60, "arriving")
    for _ in range(2):
        model.observe(event("file.verified", file="w", bytes=100))
    model.observe(event("file.planned", file="w", bytes=100, state="cached"))  # by a load that comes later
    record = model.to_record()
    assert (record["landed_bytes"], record["cached_bytes"], record["files"][0]["state"]) == (100, 0, "verified")


def test_states_of_files_tell_where_their_bytes_come_from():
    model = Model("org/model")
    for file, state in (("a", "cached"), ("b", "missing"), ("c", "elsewhere")):
        model.observe(event("file.planned", file=file, bytes=10, state=state))
    assert [f["state"] for f in model.to_record()["files"]] == ["cached", "waiting", "elsewhere"]
    assert model.cached_bytes == 10


def test_only_the_largest_files_are_listed_one_by_one():
    model = Model("org/model")
    for n in range(230):
        model.observe(event("file.planned", file=f"{n}", bytes=n, state="missing"))
    record = model.to_record()
    assert (len(record["files"]), record["more_files"]) == (200, 30)
    assert record["files"][0]["path"] == "30"


def test_phases_of_the_transfer_and_of_the_app_are_laid_on_one_axis():
    progress = Progress(100.0, ["org/model"])
    progress.phase("process", 100.1, 100.3)
    progress.phase("hook", 100.3, None)
    progress.observe("org/model", event("range.landed", 101.0, 0.5, "w", start=0, stop=10))
    progress.observe("org/model", event("build.started", 101.5))
    progress.observe("org/model", event("build.waited", 101.9, 0.3))
    progress.observe("org/model", event("build.finished", 102.0, 0.5))
    rows = {row["name"]: row["spans"] for row in progress.to_record(103.0)["waterfall"]}
    assert rows == {
        "process": [[0.1, 0.3]],
        "hook": [[0.3, 3]],
        "download": [[0.5, 1]],
        "build": [[1.5, 1.6], [1.9, 2]],
    }
    assert progress.doing == "loading"
    progress.end(102.5)
    progress.end(109.0)  # what is told later does not count
    record = progress.to_record(120.0)
    assert (record["seconds"], record["over"], record["doing"]) == (2.5, True, "")
    assert {row["name"]: row["spans"] for row in record["waterfall"]}["hook"] == [[0.3, 2.5]]


def test_what_is_under_way_is_named():
    progress = Progress(0.0)
    assert progress.doing == "starting"
    progress.phase("imports", 0.1, None)
    assert progress.doing == "importing"
    progress.observe("org/model", event("file.planned", file="w", bytes=10, state="missing"))
    assert progress.doing == "downloading"
    progress.phase("warm-up", 0.2, None)
    assert progress.doing == "warming up"
