"""Whatever servers and lines do: the right bytes, or the right error, and never anything wrong under a final name."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from programs import held, until
from transfers import LARGE, MODEL, RANGE, SMALL, asked, fetch, in_cache, noise

from fastload.concurrency import Concurrency
from fastload.errors import (
    AccessError,
    AllMirrorsFailedError,
    DownloadError,
    FastloadError,
    IntegrityError,
    NotFoundError,
    OfflineError,
)
from fastload.testing import Fault, Hub

MakeHub = Callable[..., Hub]
FILES = pytest.mark.parametrize("file", [SMALL, LARGE])


# -- one fault -------------------------------------------------------------------------------------------------------

#: Faults that happen once, and how many tries they cost.
ONCE = {
    "503": (Fault("status", status=503, times=1), 1),
    "429": (Fault("status", status=429, times=1), 1),
    "hang": (Fault("hang", times=1), 1),
    "drop": (Fault("drop", times=1), None),  # aiohttp itself asks once more
    "redirect loop of one": (Fault("redirect_loop", times=1), 0),
    "captive portal": (Fault("captive", times=1), 1),
    "expired signature": (Fault("expire", times=1), None),
    "wrong etag": (Fault("wrong_etag", times=1), 0),
    "wrong commit": (Fault("wrong_commit", times=1), 0),
    "reset": (Fault("reset", times=1, after_bytes=1000), 1),
    "reset at once": (Fault("reset", times=1), 1),
    "truncated": (Fault("truncate", times=1, after_bytes=1000), 1),
    "stalled": (Fault("stall", times=1, after_bytes=1000), 1),
    "slow": (Fault("slow", times=1, after_bytes=100, bytes_per_s=200), 1),
    "no range": (Fault("no_range", times=1), None),
    "other range": (Fault("bad_range", times=1), None),
    "chunked": (Fault("chunked", times=1), 0),
    "gzip": (Fault("gzip", times=1), None),
    "flipped": (Fault("flip", times=1, after_bytes=10), 0),
}


@FILES
@pytest.mark.parametrize("name", ONCE)
async def test_a_fault_that_happens_once_costs_a_try_and_no_byte(
    name: str, file: str, make_hub: MakeHub, tmp_path: Path
):
    fault, tries = ONCE[name]
    hub = make_hub({"org/m": MODEL})
    hub.script(_only(fault, file))
    outcome = await fetch(tmp_path, hub.endpoint)
    assert outcome.error is None, outcome.error
    assert outcome.contents() == MODEL
    if tries is not None:
        assert outcome.count("range.retried", file) == tries
    if tries == 0 and name != "flipped":
        assert not outcome.waits


async def test_the_rest_of_a_range_on_a_crawling_connection_comes_over_another(make_hub: MakeHub, tmp_path: Path):
    hub = make_hub({"org/m": MODEL})
    hub.script(Fault("hold", path=LARGE, skip=8, times=1, after_bytes=1000))  # never let go
    outcome = await fetch(tmp_path, hub.endpoint, stall_s=60.0)  # nor does the watchdog end it
    assert outcome.error is None, outcome.error
    assert outcome.contents() == MODEL
    [given_up] = [e for e in outcome.events if e.name == "range.retried"]
    assert "slower than the others" in given_up.data["reason"]
    assert asked(hub, LARGE)["cdn 206"] == 17 + 1


async def test_a_mirror_whose_connection_crawls_counts_as_failing(
    make_hub: MakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from fastload.mirrors import Mirrors

    failed: list[str] = []
    real = Mirrors.failed
    monkeypatch.setattr(Mirrors, "failed", lambda self, url, rest_s=None: (failed.append(url), real(self, url, rest_s)))
    hub = make_hub({"org/m": MODEL})
    hub.script(Fault("hold", path=LARGE, skip=8, times=1, after_bytes=1000))
    outcome = await fetch(tmp_path, hub.endpoint, stall_s=60.0)
    assert outcome.error is None, outcome.error
    assert failed == [hub.endpoint]


async def test_a_small_file_on_a_crawling_connection_comes_over_another(make_hub: MakeHub, tmp_path: Path):
    files = {**MODEL, **{f"{n}.json": noise(1000, n) for n in range(6)}}
    hub = make_hub({"org/m": files})
    hub.script(Fault("hold", path="5.json", times=1, after_bytes=10))
    outcome = await fetch(tmp_path, hub.endpoint, stall_s=60.0)
    assert outcome.error is None, outcome.error
    assert outcome.contents() == files


def _only(fault: Fault, file: str) -> Fault:
    return replace(fault, path=file)


#: Faults that never end.
ALWAYS: dict[str, tuple[Fault, type[FastloadError] | None]] = {
    "503": (Fault("status", status=503), DownloadError),
    "403": (Fault("status", status=403, origin="hub"), AccessError),
    "404": (Fault("status", status=404, origin="hub"), NotFoundError),
    "hang": (Fault("hang"), DownloadError),
    "drop": (Fault("drop"), DownloadError),
    "redirect loop": (Fault("redirect_loop"), DownloadError),
    "captive portal": (Fault("captive"), DownloadError),
    "wrong etag": (Fault("wrong_etag"), None),
    "wrong commit": (Fault("wrong_commit"), None),
    "reset at once": (Fault("reset"), DownloadError),
    "truncated at once": (Fault("truncate"), DownloadError),
    "stalled at once": (Fault("stall"), DownloadError),
    "no range": (Fault("no_range"), None),
    "other range": (Fault("bad_range"), DownloadError),
    "chunked": (Fault("chunked"), None),
    "gzip": (Fault("gzip"), None),
    "flipped": (Fault("flip", after_bytes=10), IntegrityError),
    "no range, chunked": (Fault("no_range"), None),
}


@FILES
@pytest.mark.parametrize("name", ALWAYS)
async def test_a_fault_that_never_ends_is_an_error_or_is_gone_round(
    name: str, file: str, make_hub: MakeHub, tmp_path: Path
):
    fault, kind = ALWAYS[name]
    if name == "other range" and file == SMALL:
        pytest.skip("a small file may be asked for without a range")
    hub = make_hub({"org/m": MODEL})
    more = [_only(Fault("chunked"), file)] if "," in name else []
    hub.script(_only(fault, file), *more)
    outcome = await fetch(tmp_path, hub.endpoint)
    if kind is None:
        assert outcome.error is None, outcome.error
        assert outcome.contents() == MODEL
    else:
        assert type(outcome.error) is kind, outcome.error
        assert file not in in_cache(tmp_path)
        assert outcome.transfer.error is not None


@FILES
async def test_a_signature_that_is_refused_for_ever_is_an_error(file: str, make_hub: MakeHub, tmp_path: Path):
    hub = make_hub({"org/m": MODEL}, lfs=lambda path, size: True, faults=[Fault("expire", path=file)])
    outcome = await fetch(tmp_path, hub.endpoint)
    assert isinstance(outcome.error, DownloadError), outcome.error
    assert "3 attempts" in str(outcome.error)


async def test_no_error_shows_a_signature_or_the_token(make_hub: MakeHub, tmp_path: Path):
    hub = make_hub({"org/m": MODEL}, faults=[Fault("status", status=503, origin="cdn")])
    outcome = await fetch(tmp_path, hub.endpoint, token="hf_secret")
    assert outcome.error is not None
    text = str(outcome.error) + repr(outcome.events)
    assert "503" in str(outcome.error)
    assert "Signature" not in text and "hf_secret" not in text


#: Of the metadata request: once, and for ever.
METADATA = {
    "503": (Fault("status", status=503), True, OfflineError),
    "hang": (Fault("hang"), True, OfflineError),
    "drop": (Fault("drop"), True, OfflineError),
    "redirect loop": (Fault("redirect_loop"), True, OfflineError),
    "half a document": (Fault("garbage_json"), True, OfflineError),
    "captive portal": (Fault("captive"), False, OfflineError),
    "404": (Fault("status", status=404), False, NotFoundError),
    "401": (Fault("status", status=401), False, NotFoundError),
    "403": (Fault("status", status=403), False, AccessError),
    "418": (Fault("status", status=418), False, DownloadError),
}


@pytest.mark.parametrize("name", METADATA)
async def test_metadata_that_fails_once_is_asked_for_again(name: str, make_hub: MakeHub, tmp_path: Path):
    fault, again, kind = METADATA[name]
    hub = make_hub({"org/m": MODEL}, faults=[replace(fault, path="/api/*", times=1)])
    outcome = await fetch(tmp_path, hub.endpoint)
    if again:
        assert outcome.error is None, outcome.error
        assert outcome.contents() == MODEL
        assert asked(hub).total() == 2
    else:
        assert isinstance(outcome.error, kind)
        assert asked(hub).total() == 1


@pytest.mark.parametrize("name", METADATA)
async def test_metadata_that_never_comes_is_an_error_and_leaves_nothing(name: str, make_hub: MakeHub, tmp_path: Path):
    fault, again, kind = METADATA[name]
    hub = make_hub({"org/m": MODEL}, faults=[replace(fault, path="/api/*")])
    outcome = await fetch(tmp_path / "cache", hub.endpoint)
    assert isinstance(outcome.error, kind), outcome.error
    assert outcome.error.hint or kind is DownloadError
    if name not in ("redirect loop", "drop"):  # one try is many requests
        assert asked(hub).total() == (3 if again else 1)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("name", ["503", "hang", "drop", "captive portal", "half a document"])
async def test_a_hub_out_of_reach_is_replaced_by_the_cache_with_a_warning(
    name: str, make_hub: MakeHub, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    hub = make_hub({"org/m": MODEL})
    await fetch(tmp_path, hub.endpoint)
    hub.script(replace(METADATA[name][0], path="/api/*"))
    hub.clear()
    outcome = await fetch(tmp_path, hub.endpoint)
    assert outcome.error is None
    assert outcome.contents() == MODEL
    assert not hub.bytes_sent(LARGE)
    assert "using the cache" in caplog.text


# -- progress --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["reset", "truncate", "stall"])
async def test_a_line_that_is_cut_every_few_bytes_still_gets_there(kind: str, make_hub: MakeHub, tmp_path: Path):
    step = RANGE // 3 if kind == "stall" else RANGE // 9
    model = {LARGE: noise((2 if kind == "stall" else 5) * RANGE + 99)}
    hub = make_hub({"org/m": model}, faults=[Fault(kind, after_bytes=step)])
    outcome = await fetch(tmp_path, hub.endpoint, range_bytes=2 * RANGE)
    assert outcome.error is None, outcome.error
    assert outcome.contents() == model
    assert hub.bytes_sent(LARGE) == len(model[LARGE])  # nothing travels twice


async def test_only_tries_without_a_byte_are_counted(make_hub: MakeHub, tmp_path: Path):
    cuts = [Fault("reset", path=SMALL, times=1, skip=n, after_bytes=100) for n in range(10)]
    hub = make_hub({"org/m": MODEL}, faults=[*cuts])
    outcome = await fetch(tmp_path, hub.endpoint, attempts=2)
    assert outcome.error is None
    assert outcome.count("range.retried", SMALL) == 10


async def test_waits_grow_and_are_spread(make_hub: MakeHub, tmp_path: Path):
    hub = make_hub({"org/m": MODEL}, faults=[Fault("status", path=SMALL, times=5)])
    outcome = await fetch(tmp_path, hub.endpoint, attempts=9)
    assert outcome.error is None
    first, *_, last = outcome.waits
    assert 0.1 <= first <= 0.2
    assert 1.6 <= last <= 3.2


# -- what servers ask for --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("headers", [{"Retry-After": "37"}, {"RateLimit": '"api";r=0;t=37'}])
@pytest.mark.parametrize("path", ["/api/*", SMALL, LARGE])
async def test_a_server_that_asks_for_a_pause_gets_it(
    path: str, headers: dict[str, str], make_hub: MakeHub, tmp_path: Path
):
    hub = make_hub({"org/m": MODEL}, faults=[Fault("status", status=429, path=path, times=1, headers=headers)])
    outcome = await fetch(tmp_path, hub.endpoint)
    assert outcome.error is None
    assert outcome.contents() == MODEL
    assert any(37 <= wait_s <= 38 for wait_s in outcome.waits)


async def test_no_server_is_granted_a_longer_pause_than_the_setting(make_hub: MakeHub, tmp_path: Path):
    fault = Fault("status", status=503, path=SMALL, times=1, headers={"Retry-After": "86400"})
    hub = make_hub({"org/m": MODEL}, faults=[fault])
    outcome = await fetch(tmp_path, hub.endpoint, retry_after_max_s=20)
    assert outcome.error is None
    assert any(20 <= wait_s <= 21 for wait_s in outcome.waits)
    assert max(outcome.waits) <= 21


async def test_a_pause_holds_for_all_connections(make_hub: MakeHub, tmp_path: Path):
    fault = Fault("status", status=429, path=LARGE, origin="cdn", times=1, headers={"Retry-After": "60"})
    hub = make_hub({"org/m": {LARGE: MODEL[LARGE]}}, faults=[fault])
    outcome = await fetch(tmp_path, hub.endpoint, connections=4)
    assert outcome.error is None
    # The pauses are not slept, so that every request after the refusal must have asked for its own first.
    before = 4  # connections that may have been at it
    assert sum(wait_s >= 50 for wait_s in outcome.waits) >= 17 - before


# -- wrong bytes -----------------------------------------------------------------------------------------------------


@FILES
async def test_wrong_bytes_are_fetched_again_and_then_are_an_error(file: str, make_hub: MakeHub, tmp_path: Path):
    hub = make_hub({"org/m": MODEL}, faults=[Fault("flip", path=file, offset=3000)])
    outcome = await fetch(tmp_path, hub.endpoint)
    assert isinstance(outcome.error, IntegrityError)
    assert (outcome.error.file, outcome.error.mirror) == (file, hub.endpoint)
    assert outcome.error.expected != outcome.error.actual
    assert outcome.count("file.refetched", file) == 1
    assert hub.bytes_sent(file) == 2 * len(MODEL[file])
    assert file not in in_cache(tmp_path)


@FILES
async def test_wrong_bytes_are_refetched_from_another_mirror(file: str, make_hub: MakeHub, tmp_path: Path):
    liar = make_hub({"org/m": MODEL}, faults=[Fault("flip", path=file, offset=3000)])
    honest = make_hub({"org/m": MODEL}, shape="mirror")
    outcome = await fetch(tmp_path, liar.endpoint, mirrors=[honest.endpoint])
    assert outcome.error is None, outcome.error
    assert outcome.contents() == MODEL


@FILES
async def test_wrong_bytes_are_refetched_from_the_origin_where_every_mirror_lies_or_is_dead(
    file: str, make_hub: MakeHub, tmp_path: Path
):
    origin = make_hub({"org/m": MODEL}, faults=[Fault("flip", path=file, offset=3000, times=1)])
    dead = make_hub({"org/m": MODEL}, shape="mirror", faults=[Fault("drop")])
    outcome = await fetch(tmp_path, origin.endpoint, mirrors=[dead.endpoint])
    assert outcome.error is None, outcome.error
    assert outcome.contents() == MODEL


async def test_two_liars_are_one_error_and_no_file(make_hub: MakeHub, tmp_path: Path):
    hubs = [make_hub({"org/m": MODEL}, faults=[Fault("flip", path=LARGE, after_bytes=n)]) for n in (10, 20)]
    outcome = await fetch(tmp_path, hubs[0].endpoint, mirrors=[hubs[1].endpoint])
    assert isinstance(outcome.error, IntegrityError)
    assert LARGE not in in_cache(tmp_path)


# -- files that are not what was promised ----------------------------------------------------------------------------


@FILES
@pytest.mark.parametrize("other", [noise(100), noise(17 * RANGE + 5), b""])
async def test_a_file_of_another_size_is_refused(other: bytes, file: str, make_hub: MakeHub, tmp_path: Path):
    hub = make_hub({"org/m": MODEL})
    manifest = hub.manifest("org/m")
    changed = make_hub({"org/m": {**MODEL, file: other}}, shape="mirror")
    commit = changed.commit("org/m")
    files = tuple(replace(f, url_path=f.url_path.replace(manifest.commit, commit)) for f in manifest.files)
    locked = replace(manifest, files=files, endpoint=changed.endpoint)
    outcome = await fetch(tmp_path, changed.endpoint, request={"locked": locked})
    assert isinstance(outcome.error, DownloadError | IntegrityError), outcome.error
    assert file not in in_cache(tmp_path)


async def test_a_stale_mirror_is_found_out_before_its_bytes_travel(make_hub: MakeHub, tmp_path: Path):
    hub = make_hub({"org/m": MODEL})
    stale = make_hub({"org/m": MODEL}, shape="mirror", faults=[Fault("wrong_etag", method="*")])
    outcome = await fetch(tmp_path, hub.endpoint, mirrors=[stale.endpoint])
    assert outcome.error is None, outcome.error
    assert outcome.contents() == MODEL
    assert outcome.count("file.refetched") == 0


# -- mirrors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fault", [Fault("drop"), Fault("hang"), Fault("status", status=404), Fault("status", status=500), Fault("stall")]
)
@pytest.mark.parametrize("bad", ["origin", "mirror"])
async def test_every_range_that_one_mirror_lacks_comes_from_another(
    bad: str, fault: Fault, make_hub: MakeHub, tmp_path: Path
):
    hub, mirror = make_hub({"org/m": MODEL}), make_hub({"org/m": MODEL}, shape="mirror")
    hurt = hub if bad == "origin" else mirror
    hurt.script(*(replace(fault, path=file) for file in MODEL))
    outcome = await fetch(tmp_path, hub.endpoint, mirrors=[mirror.endpoint])
    assert outcome.error is None, outcome.error
    assert outcome.contents() == MODEL


async def test_a_closed_port_in_the_list_of_mirrors_costs_no_waiting(make_hub: MakeHub, tmp_path: Path):
    hub = make_hub({"org/m": MODEL})
    outcome = await fetch(tmp_path, hub.endpoint, mirrors=["http://127.0.0.1:9"])
    assert outcome.error is None
    assert outcome.contents() == MODEL
    assert not any(outcome.waits)


async def test_a_mirror_that_breaks_in_the_middle_is_left_and_its_bytes_are_kept(make_hub: MakeHub, tmp_path: Path):
    hub = make_hub({"org/m": {LARGE: MODEL[LARGE]}}, faults=[Fault("drop", origin="cdn", skip=4)])
    mirror = make_hub({"org/m": {LARGE: MODEL[LARGE]}}, shape="mirror")
    outcome = await fetch(tmp_path, hub.endpoint, mirrors=[mirror.endpoint])
    assert outcome.error is None
    assert hub.bytes_sent(LARGE) > 0
    assert hub.bytes_sent(LARGE) + mirror.bytes_sent(LARGE) == len(MODEL[LARGE])


async def test_a_busy_origin_is_asked_again_though_the_mirror_lacks_the_file(make_hub: MakeHub, tmp_path: Path):
    hub = make_hub({"org/m": MODEL}, faults=[Fault("status", status=503, path=SMALL, times=2)])
    mirror = make_hub({"org/m": MODEL}, shape="mirror", faults=[Fault("status", status=404, method="*")])
    outcome = await fetch(tmp_path, hub.endpoint, mirrors=[mirror.endpoint], attempts=6)
    assert outcome.error is None, outcome.error
    assert outcome.contents() == MODEL


@FILES
async def test_a_server_without_ranges_serves_though_the_other_mirror_is_dead(
    file: str, make_hub: MakeHub, tmp_path: Path
):
    hub = make_hub({"org/m": MODEL}, faults=[Fault("no_range", path=file), Fault("chunked", path=file)])
    outcome = await fetch(tmp_path, hub.endpoint, mirrors=["http://127.0.0.1:9"])
    assert outcome.error is None, outcome.error
    assert outcome.contents() == MODEL


async def test_the_hubs_refusal_is_the_error_though_there_are_mirrors(make_hub: MakeHub, tmp_path: Path):
    hub = make_hub({"org/m": MODEL}, gated=["org/m"])
    outcome = await fetch(tmp_path, hub.endpoint, mirrors=["http://127.0.0.1:9"])
    assert isinstance(outcome.error, AccessError), outcome.error


async def test_when_all_mirrors_fail_the_error_lists_what_each_said(make_hub: MakeHub, tmp_path: Path):
    hub = make_hub({"org/m": {LARGE: MODEL[LARGE]}}, faults=[Fault("status", status=503, origin="cdn")])
    outcome = await fetch(tmp_path, hub.endpoint, mirrors=["http://127.0.0.1:9"], attempts=4)
    assert isinstance(outcome.error, AllMirrorsFailedError)
    text = str(outcome.error)
    assert "503" in text and "127.0.0.1:9" in text and LARGE in text and "hint: " in text
    assert len(outcome.error.attempts) >= 4


# -- signatures ------------------------------------------------------------------------------------------------------


async def test_signatures_that_run_out_during_the_download_are_renewed(make_hub: MakeHub, tmp_path: Path):
    hub = make_hub({"org/m": {LARGE: MODEL[LARGE]}})
    patient = {"stall_s": 60.0, "connect_s": 60.0}  # what is asked for again on a busy machine would count
    assert (await fetch(tmp_path, hub.endpoint, **patient)).error is None
    assert asked(hub, LARGE)["hub 302"] == 1  # where to go is remembered
    hub.clear()
    hub.script(Fault("expire", path=LARGE, skip=5, times=3))
    outcome = await fetch(tmp_path / "again", hub.endpoint, **patient)
    assert outcome.error is None
    assert outcome.contents() == {LARGE: MODEL[LARGE]}
    assert 2 <= asked(hub, LARGE)["hub 302"] <= 4
    assert hub.bytes_sent(LARGE) == len(MODEL[LARGE])


@pytest.mark.parametrize("file", [SMALL, LARGE])
@pytest.mark.parametrize("framing", ["chunked", "no_range"])
async def test_a_body_that_trickles_is_left_however_it_is_framed(
    framing: str, file: str, make_hub: MakeHub, tmp_path: Path
):
    # A byte now and then keeps a connection alive for ever, as far as the single read can tell.
    slow = Fault("slow", path=file, times=1, bytes_per_s=500)
    hub = make_hub({"org/m": MODEL}, faults=[slow, Fault(framing, path=file)])
    if framing == "no_range":
        hub.script(slow, Fault("no_range", path=file), Fault("chunked", path=file))
    outcome = await fetch(tmp_path, hub.endpoint)
    assert outcome.error is None, outcome.error
    assert outcome.contents() == MODEL


async def test_a_server_that_takes_no_ranges_gets_a_second_chance_where_it_answers_otherwise(
    make_hub: MakeHub, tmp_path: Path
):
    # A portal, then the hub: what was remembered of the first answer must not stand for the others.
    hub = make_hub({"org/m": {LARGE: MODEL[LARGE]}}, faults=[Fault("captive", path=LARGE, origin="hub", times=1)])
    outcome = await fetch(tmp_path, hub.endpoint)
    assert outcome.error is None, outcome.error
    assert outcome.contents() == {LARGE: MODEL[LARGE]}


# -- odd files -------------------------------------------------------------------------------------------------------

TWINS = {"a.json": MODEL[SMALL], "b/c.json": MODEL[SMALL], "w1.bin": MODEL[LARGE], "w2.bin": MODEL[LARGE], "none": b""}


@pytest.mark.parametrize("symlinks", [True, False])
async def test_files_of_the_same_content_travel_once(symlinks: bool, make_hub: MakeHub, tmp_path: Path):
    hub = make_hub({"org/m": TWINS})
    for _ in range(2):
        outcome = await fetch(tmp_path, hub.endpoint, symlinks=symlinks)
        assert outcome.error is None, outcome.error
        assert outcome.contents() == TWINS
        assert hub.bytes_sent() == len(MODEL[SMALL]) + len(MODEL[LARGE])


@pytest.mark.parametrize("size", [1, RANGE - 1, RANGE, RANGE + 1, 2 * RANGE, 16 * RANGE + 8])
async def test_every_size_arrives_whole(size: int, make_hub: MakeHub, tmp_path: Path):
    model = {"x.bin": noise(size), "y.txt": noise(size, 1)}
    hub = make_hub({"org/m": model})
    outcome = await fetch(tmp_path, hub.endpoint)
    assert outcome.error is None, outcome.error
    assert outcome.contents() == model


async def test_weights_are_asked_for_while_every_small_file_keeps_a_connection_waiting(
    tmp_path: Path, make_hub: Callable[..., Hub]
):
    small = {f"{n}.json": noise(100, n) for n in range(10)}
    hub = make_hub({"org/m": {**small, LARGE: MODEL[LARGE]}}, faults=[Fault("hold", path="*.json", times=None)])
    task = asyncio.create_task(fetch(tmp_path, hub.endpoint, connections=2, stall_s=60))
    await asyncio.to_thread(hub.wait, lambda requests: any(r.file == LARGE for r in requests))
    task.cancel()
    await asyncio.wait({task})


async def test_one_connection_brings_everything_small_files_first(tmp_path: Path, make_hub: Callable[..., Hub]):
    """More small files than are looked at at once, and the large one after them."""
    small = {f"{n:03}.json": noise(100, n) for n in range(120)}
    hub = make_hub({"org/m": {**small, LARGE: MODEL[LARGE]}})
    outcome = await fetch(tmp_path, hub.endpoint, connections=1)
    assert outcome.error is None
    verified = [e.file for e in outcome.events if e.name == "file.verified"]
    assert verified[-1] == LARGE and len(verified) == 121


async def test_connections_that_are_given_up_leave_their_work_to_the_last_one(
    tmp_path: Path, make_hub: Callable[..., Hub], monkeypatch: pytest.MonkeyPatch
):
    """The first one waits for weights by then, which are not looked at before small files are done."""
    given_up: list[int] = []

    def look(self: Concurrency, received_bytes: int, **how: object) -> None:
        given_up.append(received_bytes)
        self.limit = 1

    monkeypatch.setattr(Concurrency, "look", look)
    small = {f"{n:03}.json": noise(100, n) for n in range(160)}
    hub = make_hub({"org/m": {**small, LARGE: MODEL[LARGE]}}, faults=[Fault("hold", path="*.json", times=7)])
    task = asyncio.create_task(fetch(tmp_path, hub.endpoint, connections=8, ring_bytes=8 * RANGE, stall_s=60))
    await asyncio.to_thread(held, hub, 7)
    await asyncio.to_thread(until, lambda: given_up)
    hub.release()
    async with asyncio.timeout(30):  # it hung for ever
        outcome = await task
    assert outcome.error is None
    assert len(outcome.contents()) == 161
