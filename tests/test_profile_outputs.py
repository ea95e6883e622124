"""Traces, waterfalls, metrics and histories: literal events in, text out."""

from __future__ import annotations

import itertools
import json
import logging
import os
import re
import subprocess
import sys
from collections import defaultdict
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from traceformat import breaches

import fastload
from fastload import history, metrics, timeline, trace, waterfall
from fastload.builtin.log import line
from fastload.errors import CacheError, FormatError
from fastload.events import Event
from fastload.importing import Import
from fastload.measured import Profile
from fastload.profile import Profiles, begin
from fastload.testing import Hub


def landed(at_s: float, seconds: float, start: int, stop: int, file: str = "w") -> Event:
    return Event("range.landed", at_s, seconds, file, {"start": start, "stop": stop})


SVG = "{http://www.w3.org/2000/svg}"
#: Three ranges, two at a time; process 4711 fetches.
LOAD = (
    Event("transfer.started", 99.0, data={"pid": 4711}),
    Event("load.started", 100.0, data={"source": "org/model"}),
    Event("resolve.finished", 101.0, 0.5, None, {"commit": "c0ffee", "requests": 1}),
    Event("file.planned", 101.0, 0.0, "w", {"bytes": 3_000_000, "state": "missing"}),
    landed(103.0, 2.0, 0, 1_000_000),
    landed(104.0, 2.0, 1_000_000, 2_000_000),
    Event("range.retried", 103.5, 0.0, "w", {"start": 2_000_000, "mirror": "m", "reason": "cut", "wait_s": 0.1}),
    landed(106.0, 3.0, 2_000_000, 3_000_000),
    Event("build.started", 102.0, data={"framework": "transformers"}),
    Event("build.waited", 106.0, 3.0, "w", {"start": 0, "stop": 10}),
    Event("verify.advanced", 107.0, 1.5, "w", {"bytes": 3_000_000}),
    Event("file.verified", 107.0, 0.0, "w", {"bytes": 3_000_000}),
    Event("transfer.finished", 107.0, 0.0, None, {"bytes": 3_000_000, "requests": 4}),
    Event("build.finished", 109.0),
    Event("load.finished", 110.0, 10.0),
)
FAILED = (LOAD[1], Event("load.failed", 104.0, 4.0, None, {"error": "NotFoundError", "message": "<b>no</b>\nhint"}))


def load_of(*events: Event, keep: bool = True, source: str = "org/model") -> Profile:
    made = Profile(source, keep=keep)
    for event in events:
        made.observe(event)
    return made


def block_of(*loads: Profile) -> Profiles:
    made = Profiles(events=True)
    made.loads.extend(loads)
    return made


# -- events -----------------------------------------------------------------------------------------------------------


def test_events_are_kept_only_for_blocks_that_ask():
    with fastload.profile() as plain:
        assert begin("one").events is None
        with fastload.profile(events=True) as keeping:
            both = begin("two")
        assert begin("three").events is None
    assert both.events == []
    assert ([p.source for p in plain.loads], keeping.loads) == (["one", "two", "three"], [both])


# -- traces -----------------------------------------------------------------------------------------------------------


def rows(events: list[dict[str, Any]]) -> dict[str, list[tuple[str, int, int]]]:
    """Lane → what is on it, as (name, start, duration)."""
    names = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
    found: dict[str, list[tuple[str, int, int]]] = defaultdict(list)
    for event in events:
        if event["ph"] == "X":
            found[names[event["pid"], event["tid"]]].append((event["name"], event["ts"], event["dur"]))
    return dict(found)


def test_a_trace_has_one_row_a_process_and_one_lane_a_connection():
    load = load_of(*LOAD)
    events = trace.chrome_trace(load)["traceEvents"]
    assert {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"} == {
        os.getpid(): "program",
        4711: "transfer",
    }
    assert rows(events) == {  # 0 is the first thing that happened: the transfer began at 99 s
        "load": [("org/model", 1_000_000, 10_000_000)],
        "build": [("build", 3_000_000, 1_000_000), ("build", 7_000_000, 3_000_000)],
        "waits for bytes": [("w", 4_000_000, 3_000_000)],
        "resolve": [("resolve", 1_500_000, 500_000)],
        "network 1": [("w", 2_000_000, 2_000_000), ("w", 4_000_000, 3_000_000)],
        "network 2": [("w", 3_000_000, 2_000_000)],
        "hash": [("w", 6_500_000, 1_500_000)],
    }
    assert [(e["name"], e["args"]["file"]) for e in events if e["ph"] == "i"] == [
        ("range.retried", "w"),
        ("file.verified", "w"),
    ]
    assert [e["args"]["MB"] for e in events if e["ph"] == "C"] == [1.0, 2.0, 3.0]


#: Two slots: one read for 0.2 s and copied for 0.4; one that also waited for the first.
COPIES = (
    Event("copy.finished", 104.0, 0.6, "w", {"bytes": 1_000_000, "device": "cuda:0", "slot": 7, "read_s": 0.2}),
    Event("copy.finished", 104.5, 1.0, "w",
          {"bytes": 2_000_000, "device": "cuda:0", "slot": 6, "read_s": 0.1, "queued_s": 0.4}),
)  # fmt: skip


def test_a_trace_has_a_lane_for_each_slot_and_one_for_the_device():
    events = trace.chrome_trace(load_of(*LOAD, *COPIES))["traceEvents"]
    drawn = rows(events)
    assert drawn["slot 8"] == [("read", 4_400_000, 200_000), ("copy", 4_600_000, 400_000)]
    assert drawn["slot 7"] == [
        ("read", 4_500_000, 100_000), ("queued", 4_600_000, 400_000), ("copy", 5_000_000, 500_000),
    ]  # fmt: skip
    assert drawn["cuda:0"] == [("w", 4_600_000, 400_000), ("w", 5_000_000, 500_000)]
    program = {e["tid"] for e in events if e["ph"] == "X" and e["cat"] == "cuda:0"}
    assert {e["pid"] for e in events if e.get("tid") in program and e["ph"] == "X"} == {os.getpid()}


def test_copies_to_a_device_are_a_phase():
    load = load_of(*LOAD, *COPIES)
    phase = load.phase("device")
    assert phase is not None
    assert (phase.bytes, round(phase.start_s, 6), round(phase.stop_s, 6)) == (3_000_000, 3.4, 4.5)
    assert "device" in str(load)
    assert any("device" in line for line in Page(waterfall.html(load)).words)


def test_every_event_of_a_trace_has_what_the_format_demands():
    subject = block_of(load_of(*LOAD, *COPIES), load_of(*FAILED))
    assert breaches(json.loads(json.dumps(trace.chrome_trace(subject)))) == []


def test_an_import_stands_behind_the_one_that_it_is_in():
    """Modules are noted when they are done, the inner one first; viewers take what stands first for the outer one."""
    with fastload.profile(imports=True) as p:
        begin("org/model").observe(LOAD[1])
    assert p.imports is not None
    p.imports.modules += [Import("inner", 1, 2, 2, 7), Import("middle", 1, 3, 1, 7), Import("outer", 1, 4, 0, 7)]
    document = json.loads(json.dumps(trace.chrome_trace(p)))
    names = [event["name"] for event in document["traceEvents"] if event.get("cat") == "imports"]
    assert names == ["outer", "middle", "inner"]


def test_slices_of_one_lane_never_cross():
    """Viewers take what crosses for nesting, and draw nonsense."""
    busy = [landed(100 + n * 0.37, 1.0 + n % 5 * 0.3, n, n + 1) for n in range(200)]
    for lane in trace.lanes(trace.transfer_slices(load_of(LOAD[1], *busy))):
        assert all(a.stop_us <= b.start_us for a, b in itertools.pairwise(lane))


def test_a_transfer_that_two_loads_joined_is_drawn_once():
    drawn = rows(trace.chrome_trace(block_of(load_of(*LOAD), load_of(*LOAD)))["traceEvents"])
    assert len(drawn["network 1"]) == 2
    assert "network 3" not in drawn


def test_without_events_a_trace_has_the_phases():
    drawn = rows(trace.chrome_trace(load_of(*LOAD, keep=False))["traceEvents"])
    assert drawn.keys() == {"load", "resolve", "download", "verify", "build"}


def test_imports_stand_on_one_lane_a_thread():
    with fastload.profile(imports=True) as p:
        load = begin("org/model")
    load.observe(LOAD[1])
    assert p.imports is not None
    p.imports.modules += [Import("b", 2, 3, 1, 7), Import("a", 1, 4, 0, 7), Import("c", 1, 4, 0, 8)]
    drawn = rows(trace.chrome_trace(p)["traceEvents"])
    assert {name: len(lane) for name, lane in drawn.items() if "import" in name} == {
        "imports": 2,
        "imports, thread 2": 1,
    }


# -- waterfalls -------------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """What a page consists of, and whether its tags are closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag != "meta":
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_a_waterfall_is_one_file_that_asks_nobody_for_anything():
    text = waterfall.html(block_of(load_of(*LOAD)))
    page = Page(text)
    assert not {"script", "link", "img", "iframe"} & set(page.tags)
    assert not {"src", "href"} & {name for name, _ in page.attributes}
    assert not re.search(r"url\(|@import|https?:", text)
    assert "prefers-color-scheme: dark" in text
    assert "width=device-width" in text


def test_a_waterfall_shows_phases_connections_and_files():
    words = Page(waterfall.html(load_of(*LOAD))).words
    for word in ("org/model", "download", "verify", "build", "connection 1", "connection 2", "w", "3.0 MB", "10.00 s"):
        assert word in words
    assert "connection 3" not in words


def test_bars_stand_where_and_as_long_as_things_took():
    text = waterfall.html(load_of(*LOAD))
    assert 'class="verify" style="left:55.000%;width:15.000%" title="5.500 to 7.000 s"' in text


# -- timelines --------------------------------------------------------------------------------------------------------


def test_a_timeline_has_a_row_for_every_connection_hash_slot_and_device():
    drawing = ElementTree.fromstring(timeline.svg(block_of(load_of(*LOAD, *COPIES))))
    rects = [(r.get("class"), r.get("x"), r.get("y"), r.get("width")) for r in drawing.iter(f"{SVG}rect")]
    heights = {
        css: {y for kind, _, y, _ in rects if kind == css} for css in ("network", "hash", "read", "queued", "copy")
    }
    legend = 1
    assert {css: len(ys) - legend for css, ys in heights.items()} == {
        "network": 2, "hash": 1, "read": 2, "queued": 1, "copy": 3,
    }  # fmt: skip
    words = [text.text for text in drawing.iter(f"{SVG}text")]
    assert {"org/model: 3.0 MB, ready after 10.00 s", "network", "hash", "slots", "cuda:0", "last byte", "10 s"} <= {
        *words
    }
    # 10 seconds are 824 units wide, from 120 on: the hash took from 5.5 to 7.
    assert ("hash", "573.2", "78", "123.6") in rects


def test_a_timeline_without_events_is_empty_and_names_are_text():
    assert not list(ElementTree.fromstring(timeline.svg(load_of(*LOAD, keep=False))).iter(f"{SVG}text"))
    started = Event("load.started", 100.0, data={"source": "<script>"})
    drawing = ElementTree.fromstring(timeline.svg(load_of(started, *LOAD[2:])))
    assert any("<script>" in (text.text or "") for text in drawing.iter(f"{SVG}text"))


def test_names_and_messages_are_text_and_not_markup():
    started = Event("load.started", 100.0, data={"source": "<script>alert(1)</script>"})
    page = Page(waterfall.html(load_of(started, FAILED[1], landed(101.0, 1.0, 0, 1, '"><script>'))))
    assert "script" not in page.tags
    words = "".join(page.words)
    assert "<script>alert(1)</script>" in words
    assert "NotFoundError: <b>no</b>\nhint" in words
    assert '"><script>' in words


@pytest.mark.parametrize("subject", [Profiles(), Profile("org/model"), Profile("org/model", keep=True)])
def test_a_waterfall_of_nothing_is_a_page(subject: Profiles | Profile):
    Page(waterfall.html(subject))


def test_many_files_are_counted_not_drawn():
    many = [landed(101.0, 0.5, 0, n + 1, f"file-{n}") for n in range(50)]
    plans = [Event("file.planned", 100.5, 0.0, f"file-{n}", {"bytes": n + 1, "state": "missing"}) for n in range(50)]
    text = waterfall.html(load_of(LOAD[1], *plans, *many))
    assert "and 10 smaller files" in text
    assert "file-49" in text
    assert "file-9<" not in text


# -- Prometheus -------------------------------------------------------------------------------------------------------


def samples(text: str) -> dict[str, float]:
    for row in text.splitlines():
        assert re.fullmatch(r"# (HELP|TYPE) \w+ .+|\w+(\{\w+=\"([^\"\\]|\\.)*\"(,\w+=\"([^\"\\]|\\.)*\")*\})? \S+", row)
    return {row.rpartition(" ")[0]: float(row.rpartition(" ")[2]) for row in text.splitlines() if row[0] != "#"}


def test_metrics_are_in_base_units_and_loads_of_one_source_are_added_up():
    failed = load_of(*FAILED)
    found = samples(metrics.prometheus(block_of(load_of(*LOAD), load_of(*LOAD), failed, load_of(LOAD[1]))))
    source = 'source="org/model"'
    assert found[f'fastload_load_seconds_sum{{{source},outcome="ok"}}'] == 20.0
    assert found[f'fastload_load_seconds_count{{{source},outcome="ok"}}'] == 2
    assert found[f'fastload_load_seconds_count{{{source},outcome="failed"}}'] == 1
    assert found[f'fastload_phase_seconds_total{{{source},phase="download"}}'] == 10.0
    assert found[f'fastload_bytes_total{{{source},tier="network"}}'] == 6_000_000
    assert found[f"fastload_retries_total{{{source}}}"] == 2
    assert 'fastload_cold_start_seconds{phase="unaccounted"}' in found


def test_each_metric_is_described_once_and_before_its_samples():
    text = metrics.prometheus(block_of(load_of(*LOAD), load_of(*LOAD, source="org/other")))
    described = re.findall(r"^# TYPE (\w+)", text, re.M)
    assert len(described) == len(set(described))
    assert re.findall(r"^# HELP (\w+)", text, re.M) == described
    parser = pytest.importorskip("prometheus_client.parser")
    assert list(parser.text_string_to_metric_families(text))


def test_labels_are_escaped():
    load = load_of(Event("load.started", 0.0, data={"source": 'a"b\\c\nd'}), Event("load.finished", 1.0, 1.0))
    assert 'fastload_requests_total{source="a\\"b\\\\c\\nd"} 0.0' in metrics.prometheus(load).splitlines()


def test_metrics_of_nothing_are_empty():
    assert metrics.prometheus(Profiles()) == ""


# -- history ----------------------------------------------------------------------------------------------------------


def finished(total_s: float, download_s: float) -> Profile:
    return load_of(
        Event("load.started", 0.0, data={"source": "org/model"}),
        landed(download_s, download_s, 0, 10),
        Event("load.finished", total_s, total_s),
        keep=False,
    )


def test_a_history_grows_by_one_line_a_load(tmp_path: Path):
    path = tmp_path / "h.jsonl"
    history.append(path, [load_of(*LOAD)], clock=lambda: 1_800_000_000)
    history.append(path, [load_of(*FAILED), load_of(*LOAD)])
    records = history.read(path)
    assert [r["ok"] for r in records] == [True, False, True]
    assert (records[0]["at"], records[0]["source"], records[0]["total_s"]) == (
        "2027-01-15T08:00:00Z",
        "org/model",
        10.0,
    )
    assert records[0]["shares"]["phases"]["download"]["seconds"] > 0
    assert records[1]["error"]["type"] == "NotFoundError"


def test_a_line_that_a_killed_process_left_is_left_out(tmp_path: Path):
    path = tmp_path / "h.jsonl"
    history.append(path, [load_of(*LOAD)])
    with path.open("a") as f:
        f.write('{"at": "20')
    assert len(history.read(path)) == 1


def test_a_file_that_is_no_history_is_an_error(tmp_path: Path):
    path = tmp_path / "h.jsonl"
    path.write_text("{}\n{}\n")
    with pytest.raises(FormatError, match="line 1"):
        history.read(path)
    with pytest.raises(CacheError, match="cannot be read"):
        history.read(tmp_path / "none")
    with pytest.raises(CacheError, match="cannot be written"):
        history.append(tmp_path / "none" / "h", [load_of(*LOAD)])


def test_comparing_says_what_moved(tmp_path: Path):
    before, after = tmp_path / "a", tmp_path / "b"
    history.append(before, [finished(10.0 + n / 10, 6.0) for n in range(11)])
    history.append(after, [finished(7.0 + n / 10, 3.0) for n in range(11)] + [load_of(*FAILED)])
    changes = {c.name: c for c in history.compare(history.read(before), history.read(after))}
    assert next(iter(changes)) == "total"
    assert changes["total"].before == pytest.approx((10.5, 10.9))
    assert changes["total"].after == pytest.approx((7.5, 7.9))
    assert (changes["download"].delta_s, changes["download"].moved) == (-3.0, True)
    assert changes["unaccounted"].moved is False
    assert "build" not in changes


def test_comparing_with_a_history_of_failures_is_an_error(tmp_path: Path):
    path = tmp_path / "h"
    history.append(path, [load_of(*FAILED)])
    with pytest.raises(FormatError, match="nothing to compare"):
        history.compare(history.read(path), history.read(path))


def test_the_setting_makes_every_load_add_a_line(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FASTLOAD_PROFILE_HISTORY", str(tmp_path / "h.jsonl"))
    fastload.prefetch("org/tiny")
    with pytest.raises(fastload.errors.NotFoundError):
        fastload.prefetch("org/nothing")
    assert [(r["source"], r["ok"]) for r in history.read(tmp_path / "h.jsonl")] == [
        ("org/tiny", True),
        ("org/nothing", False),
    ]


# -- the log line -----------------------------------------------------------------------------------------------------


def test_the_log_line_shares_the_time_out():
    assert line(load_of(*LOAD)) == (
        "org/model: ready in 10.00 s (resolve 0.50, download 4.00, build 4.00, unaccounted 1.50; 2.50 s"
        " hidden), 3.0 MB travelled"
    )
    assert line(load_of(*FAILED)).startswith("org/model: failed (NotFoundError) after 4.00 s (unaccounted 4.00)")


def test_one_line_is_logged_for_a_load(hub: Hub, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.INFO, "fastload"):
        fastload.prefetch("org/tiny")
    [text] = [r.getMessage() for r in caplog.records if r.name == "fastload"]
    assert text.startswith("org/tiny: ready in ")
    assert "unaccounted" in text or "download" in text


def test_writing_outputs_imports_no_heavy_library():
    code = "import sys, fastload.trace, fastload.waterfall, fastload.metrics, fastload.history; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {name.partition(".")[0] for name in loaded} & {"torch", "numpy", "aiohttp", "asyncio", "statistics"}
