"""The profile is a pure fold: literal events in, numbers out."""

from __future__ import annotations

import threading

import pytest

import fastload
from fastload import report
from fastload.events import Event, Events
from fastload.phases import Intervals
from fastload.profile import Profile, begin


def profile_of(*events: Event) -> Profile:
    made = Profile("org/model")
    for event in events:
        made.observe(event)
    return made


def landed(at_s: float, seconds: float, start: int, stop: int) -> Event:
    return Event("range.landed", at_s, seconds, "w", {"start": start, "stop": stop, "mirror": "m", "attempts": 1})


#: Seconds 100 to 110; the axis begins at 100 because CLOCK_MONOTONIC begins anywhere.
LOAD = (
    Event("load.started", 100.0, data={"source": "org/model"}),
    Event("resolve.finished", 101.0, 0.5, None, {"commit": "c0ffee", "files": 2, "bytes": 4000, "requests": 1}),
    Event("file.planned", 101.0, 0.0, "config.json", {"bytes": 1000, "state": "cached"}),
    Event("file.planned", 101.0, 0.0, "w", {"bytes": 3000, "state": "missing"}),
    landed(103.0, 2.0, 0, 1500),
    Event(
        "range.retried", 104.0, 1.0, "w", {"start": 1500, "stop": 3000, "mirror": "m", "reason": "cut", "wait_s": 0.1}
    ),
    landed(106.0, 2.0, 1500, 3000),
    Event("build.started", 102.0, data={"framework": "transformers"}),
    Event("build.waited", 106.0, 3.0, "w", {"start": 1500, "stop": 3000}),
    Event("verify.advanced", 107.0, 1.5, "w", {"bytes": 3000}),
    Event("transfer.finished", 107.0, 0.0, None, {"bytes": 3000, "requests": 4}),
    Event("build.finished", 109.0),
    Event("load.finished", 110.0, 10.0),
)


def test_each_phase_says_when_it_was_busy_and_what_that_cost():
    profile = profile_of(*LOAD)
    rows = {p.name: (p.start_s, p.stop_s, p.busy_s, p.hidden_s, p.uncovered_s) for p in profile.phases}
    assert rows == {
        "resolve": (0.5, 1.0, 0.5, 0.0, 0.5),
        # From 1 to 6 without a gap; hidden behind the build (2 to 3) and the hash (5.5 to 6).
        "download": (1.0, 6.0, 5.0, 1.5, 3.5),
        "verify": (5.5, 7.0, 1.5, 1.5, 0.0),
        # From 2 to 9, but it waited from 3 to 6; hidden behind the download (2 to 3) and the hash (6 to 7).
        "build": (2.0, 9.0, 4.0, 2.0, 2.0),
    }
    assert profile.idle_s == pytest.approx(1.5)  # 0 to 0.5, and 9 to 10


def test_counts_of_a_whole_load():
    profile = profile_of(*LOAD)
    assert (profile.ok, profile.total_s, profile.first_byte_s, profile.waited_s) == (True, 10.0, 3.0, 3.0)
    assert (profile.files, profile.planned_bytes, profile.cached_bytes) == (2, 4000, 1000)
    assert (profile.travelled_bytes, profile.requests, profile.retries) == (3000, 4, 1)
    assert (profile.commit, profile.framework) == ("c0ffee", "transformers")
    download = profile.phase("download")
    assert download is not None
    assert download.gb_per_s == 3000 / 5.0 / 1e9


def test_the_order_in_which_events_arrive_does_not_matter():
    """Ranges land in threads and in another process: a profile must not depend on who is heard first."""
    rows = profile_of(*LOAD).to_record()
    shuffled = profile_of(LOAD[0], *LOAD[9:3:-1], *LOAD[1:4], *LOAD[10:])
    assert rows["phases"]
    assert shuffled.to_record() == rows


def test_a_failed_load_has_a_profile_up_to_its_failure():
    failure = Event(
        "load.failed", 104.0, 0.0, None, {"error": "AllMirrorsFailedError", "message": "w: 3 mirrors failed"}
    )
    profile = profile_of(*LOAD[:5], LOAD[7], failure)
    assert (profile.ok, profile.finished, profile.total_s) == (False, True, 4.0)
    assert profile.error == ("AllMirrorsFailedError", "w: 3 mirrors failed")
    build = profile.phase("build")
    assert build is not None
    assert build.stop_s == 4.0  # the build that never came to an end stops with the load
    assert profile.travelled_bytes == 1500
    assert "failed after 4.00 s" in str(profile)
    assert "w: 3 mirrors failed" in str(profile)


def test_what_happened_before_the_load_was_asked_for_is_hidden():
    """fastload.start() ran the download while the program imported torch."""
    profile = profile_of(
        landed(99.0, 9.0, 0, 900), LOAD[0], landed(101.0, 1.0, 900, 1000), Event("load.finished", 101.0, 1.0)
    )
    download = profile.phase("download")
    assert download is not None
    assert (download.start_s, download.hidden_s, download.uncovered_s) == (-10.0, 9.0, 1.0)


def test_a_running_load_can_be_looked_at():
    profile = profile_of(*LOAD[:8])
    assert (profile.finished, profile.ok, profile.total_s) == (False, False, 6.0)
    assert "running for 6.00 s" in str(profile)


def test_a_profile_without_events_is_empty():
    profile = profile_of()
    assert (profile.total_s, profile.first_byte_s, profile.phases, profile.idle_s) == (0.0, None, (), 0.0)
    assert report.render(profile).startswith("org/model: running for 0.00 s")


def test_bytes_of_an_earlier_process_count_as_resumed():
    told_again = Event("file.planned", 101.0, 0.0, "w", {"bytes": 1500, "state": "partial"})
    profile = profile_of(*LOAD[:4], told_again)
    assert (profile.files, profile.planned_bytes, profile.resumed_bytes) == (2, 4000, 1500)


def test_a_second_build_is_counted_with_the_first():
    """A build whose files were refetched is built again."""
    events = [Event("load.started", 0.0)]
    for start_s in (1.0, 5.0):
        events += [Event("build.started", start_s, data={"framework": "f"}), Event("build.finished", start_s + 2.0)]
    build = profile_of(*events).phase("build")
    assert build is not None
    assert build.intervals == ((1.0, 3.0), (5.0, 7.0))


def test_a_load_that_joins_a_transfer_counts_its_download_and_not_the_builds_of_others():
    later = [Event("load.started", 120.0, data={"source": "org/model"}), Event("load.finished", 121.0, 1.0)]
    profile = profile_of(*LOAD, *later)
    assert (profile.ok, profile.total_s, profile.waited_s) == (True, 1.0, 0.0)
    assert [p.name for p in profile.phases] == ["resolve", "download", "verify"]
    assert all(p.uncovered_s == 0.0 for p in profile.phases)
    assert profile_of(*LOAD, later[0]).finished is False


def test_record_survives_json():
    import json

    record = profile_of(*LOAD).to_record()
    assert json.loads(json.dumps(record)) == record


def test_observers_may_call_from_many_threads():
    profile = Profile("org/model")
    events = Events([profile.observe], clock=lambda: 1.0)

    def emit() -> None:
        for n in range(200):
            events.emit("range.landed", file="w", seconds=0.001, start=n, stop=n + 1)

    threads = [threading.Thread(target=emit) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert profile.travelled_bytes == 800


# -- collecting -------------------------------------------------------------------------------------------------------


def test_block_collects_the_loads_that_begin_inside_it():
    begin("before")
    with fastload.profile() as outer:
        first = begin("one")
        with fastload.profile() as inner:
            second = begin("two")
        third = begin("three")
    begin("after")
    assert outer.loads == [first, second, third]
    assert inner.loads == [second]


def test_block_collects_loads_of_other_threads():
    with fastload.profile() as p:
        thread = threading.Thread(target=begin, args=("elsewhere",))
        thread.start()
        thread.join()
    assert [load.source for load in p.loads] == ["elsewhere"]


def test_block_ends_when_it_raises():
    with pytest.raises(KeyError), fastload.profile() as p:
        raise KeyError
    begin("later")
    assert p.loads == []
    assert str(p) == "no load"


def test_blocks_may_end_in_another_order_than_they_began():
    first, second = fastload.profile(), fastload.profile()
    a, b = first.__enter__(), second.__enter__()
    first.__exit__(None, None, None)
    made = begin("only the second is open")
    second.__exit__(None, None, None)
    assert (a.loads, b.loads) == ([], [made])


# -- intervals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pairs", "merged"),
    [
        ([(0, 1), (2, 3)], [(0, 1), (2, 3)]),
        ([(2, 3), (0, 1)], [(0, 1), (2, 3)]),  # later ones may be heard first
        ([(0, 1), (1, 2)], [(0, 2)]),  # touching
        ([(0, 5), (1, 2)], [(0, 5)]),  # inside
        ([(1, 2), (0, 5)], [(0, 5)]),  # around
        ([(0, 1), (2, 3), (4, 5), (0.5, 4.5)], [(0, 5)]),  # bridging several
        ([(1, 1)], [(1, 1)]),  # a moment
        ([(2, 1)], []),  # backwards: a clock that is not ours
    ],
)
def test_intervals_are_merged(pairs, merged):
    assert list(Intervals(pairs)) == merged


@pytest.mark.parametrize(
    ("minus", "rest"),
    [
        ([], [(0, 10)]),
        ([(0, 10)], []),
        ([(-5, 20)], []),
        ([(2, 3), (5, 6)], [(0, 2), (3, 5), (6, 10)]),
        ([(-1, 1), (9, 11)], [(1, 9)]),
        ([(20, 30)], [(0, 10)]),
    ],
)
def test_intervals_are_subtracted(minus, rest):
    assert list(Intervals([(0, 10)]).without(Intervals(minus))) == rest


# -- text -------------------------------------------------------------------------------------------------------------


def test_report_draws_each_phase_to_scale():
    drawn = report.waterfall([("import", 0, 5), ("build", 5, 10)], width=37, ascii=True)
    assert drawn == [
        "import " + "#" * 10 + " " * 10 + "    5.00 s",
        "build  " + " " * 10 + "#" * 10 + "    5.00 s",
        "       +------------------+",
        "       0.00         10.00 s",
    ]


def test_a_moment_stays_visible():
    row = report.waterfall([("resolve", 1.0, 1.0), ("build", 0, 1000)], width=60, ascii=True)[0]
    assert row.startswith("resolve . ")


def test_rendered_profile_names_every_phase_and_stays_within_its_width():
    text = report.render(profile_of(*LOAD), width=80)
    for phase in ("resolve", "download", "verify", "build"):
        assert text.count(phase) == 2  # once in the table, once in the waterfall
    assert "█" in text
    assert max(map(len, text.splitlines()[1:])) <= 80


def test_ascii_report_is_ascii():
    assert report.render(profile_of(*LOAD), ascii=True).isascii()


@pytest.mark.parametrize("width", [40, 80, 120])
def test_side_by_side_shows_both_on_one_axis(width):
    plain = [("import", 0.0, 4.0), ("download", 4.0, 8.0), ("build", 8.0, 10.0)]
    text = report.side_by_side(plain, profile_of(*LOAD), width)
    lines = text.splitlines()
    assert max(map(len, lines)) <= width
    assert "from_pretrained: 10.00 s" in text
    assert "fastload: 9.00 s" in text  # to the end of its last phase
    assert text.count("0.00") >= 2
    axes = [line for line in lines if "└" in line]
    assert len(axes) == (1 if width > 60 else 2)  # beside, or above each other


def test_table_lines_up():
    assert report.table([("a", "long"), ("bbb", "x")], heading=("h", "i")) == "h    i\na    long\nbbb  x"
