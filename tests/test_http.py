"""The contract with aiohttp that the protocol switch rests on: connections are reused, bytes land where they should."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from programs import until
from transfers import LARGE, QUICK, RANGE, noise

from fastload.errors import MirrorError, MirrorTimeoutError, RangeError
from fastload.http import HttpClient, RangeIgnored
from fastload.settings import Settings
from fastload.sink import Fill
from fastload.testing import Fault, Hub
from fastload.types import ByteRange

DATA = noise(16 * RANGE + 777)
SIZE = len(DATA)


@asynccontextmanager
async def client(hub: Hub, **settings: Any) -> AsyncIterator[HttpClient]:
    values = {**QUICK, "endpoint": hub.endpoint, **settings}
    if hub.ca_file is not None:
        values["ca_file"] = hub.ca_file
    async with HttpClient(Settings.resolve(values), hub.endpoint) as http:
        yield http


@pytest.fixture(params=["plain", "tls"])
def server(request: pytest.FixtureRequest, make_hub: Callable[..., Hub]) -> Hub:
    return make_hub({"org/m": {LARGE: DATA}}, shape="mirror", tls=request.param == "tls")


def url(hub: Hub) -> str:
    return f"{hub.endpoint}/org/m/resolve/main/{LARGE}"


def spans() -> list[ByteRange]:
    return [ByteRange(a, min(a + RANGE, SIZE)) for a in range(0, SIZE, RANGE)]


@pytest.mark.parametrize("connections", [1, 3])
async def test_ranges_on_kept_connections_open_no_others(connections: int, server: Hub):
    buffer = bytearray(SIZE)
    queue = spans()
    async with client(server) as http:

        async def work() -> None:
            while queue:
                span = queue.pop(0)
                await http.fetch(url(server), span, Fill(memoryview(buffer)[span.start : span.stop]), size=SIZE)

        await work_first(http, server, queue, buffer)
        async with asyncio.TaskGroup() as group:
            for _ in range(connections):
                group.create_task(work())
    assert buffer == DATA
    assert len({r.connection for r in server.requests}) <= connections
    assert len(server.requests) == len(spans())


async def work_first(http: HttpClient, server: Hub, queue: list[ByteRange], buffer: bytearray) -> None:
    """One alone: where the file stands is asked for once."""
    span = queue.pop(0)
    await http.fetch(url(server), span, Fill(memoryview(buffer)[span.start : span.stop]), size=SIZE)


async def test_a_redirect_is_followed_once_and_its_connection_is_kept_too(make_hub: Callable[..., Hub]):
    hub = make_hub({"org/m": {LARGE: DATA}})
    buffer = bytearray(SIZE)
    async with client(hub) as http:
        for span in spans():
            await http.fetch(url(hub), span, Fill(memoryview(buffer)[span.start : span.stop]), size=SIZE)
    assert buffer == DATA
    assert hub.counts() == {"GET hub 302": 1, "GET cdn 206": len(spans())}
    assert len({r.connection for r in hub.requests if r.origin == "cdn"}) == 1


@pytest.mark.parametrize("start", [0, 5 * RANGE + 3])
@pytest.mark.parametrize("count", [1, 100, RANGE, 5 * RANGE])
async def test_any_range_lands_exactly(count: int, start: int, server: Hub):
    around = bytearray(b"\xaa" * (count + 20))
    async with client(server) as http:
        fill = Fill(memoryview(around)[10:-10])
        await http.fetch(url(server), ByteRange(start, start + count), fill, size=SIZE)
    assert around == b"\xaa" * 10 + DATA[start : start + count] + b"\xaa" * 10


async def test_a_cancelled_body_writes_nothing_more_and_drops_its_connection(server: Hub):
    server.script(Fault("hold", path=LARGE, after_bytes=1000))
    buffer = bytearray(b"\xaa" * SIZE)
    fill = Fill(memoryview(buffer))
    async with client(server, stall_s=60) as http:
        task = asyncio.create_task(http.fetch(url(server), ByteRange(0, SIZE), fill, size=SIZE))
        await asyncio.to_thread(until, lambda: fill.filled_bytes >= 1000)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        landed = bytes(buffer)
        assert fill.filled_bytes == 1000
        server.script()
        server.release()
        await asyncio.to_thread(server.wait, lambda requests: all(r.ended_s for r in requests))
        other = bytearray(SIZE)
        await http.fetch(url(server), ByteRange(0, SIZE), Fill(memoryview(other)), size=SIZE)
        assert other == DATA
    assert bytes(buffer) == landed == DATA[:1000] + b"\xaa" * (SIZE - 1000)
    assert server.requests[0].connection != server.requests[1].connection


async def test_a_try_goes_on_where_the_last_one_ended(server: Hub):
    server.script(Fault("truncate", path=LARGE, times=1, after_bytes=3000))
    fill = Fill(memoryview(bytearray(RANGE)))
    async with client(server) as http:
        with pytest.raises(MirrorError):
            await http.fetch(url(server), ByteRange(RANGE, 2 * RANGE), fill, size=SIZE)
        assert fill.filled_bytes == 3000
        await http.fetch(url(server), ByteRange(RANGE, 2 * RANGE), fill, size=SIZE)
    assert fill.view == DATA[RANGE : 2 * RANGE]
    assert [r.range for r in server.requests] == [
        f"bytes={RANGE}-{2 * RANGE - 1}",
        f"bytes={RANGE + 3000}-{2 * RANGE - 1}",
    ]


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        (Fault("stall", path=LARGE, after_bytes=10), MirrorTimeoutError),
        (Fault("slow", path=LARGE, after_bytes=10, bytes_per_s=300), MirrorTimeoutError),
        (Fault("hang", path=LARGE), MirrorTimeoutError),
        (Fault("reset", path=LARGE, after_bytes=10), MirrorError),
        (Fault("no_range", path=LARGE), RangeIgnored),
        (Fault("gzip", path=LARGE), RangeIgnored),
        (Fault("bad_range", path=LARGE), RangeError),
        (Fault("bad_range", path=LARGE, shift=-1), RangeError),
        (Fault("captive", path=LARGE), RangeError),
        (Fault("redirect_loop", path=LARGE), MirrorError),
    ],
)
async def test_what_is_not_the_range_is_an_error(fault: Fault, kind: type[Exception], make_hub: Callable[..., Hub]):
    hub = make_hub({"org/m": {LARGE: DATA}}, shape="mirror", faults=[fault])
    fill = Fill(memoryview(bytearray(RANGE)))
    async with client(hub) as http:
        with pytest.raises(kind) as caught:
            await http.fetch(url(hub), ByteRange(RANGE, 2 * RANGE), fill, size=SIZE)
    assert type(caught.value) is kind
    assert fill.view[: fill.filled_bytes] == DATA[RANGE : RANGE + fill.filled_bytes]


async def test_chunked_ranges_land_too(make_hub: Callable[..., Hub]):
    hub = make_hub({"org/m": {LARGE: DATA}}, shape="mirror", faults=[Fault("chunked", path=LARGE)])
    fill = Fill(memoryview(bytearray(RANGE)))
    async with client(hub) as http:
        await http.fetch(url(hub), ByteRange(RANGE, 2 * RANGE), fill, size=SIZE)
        streamed = b"".join([chunk async for chunk in http.stream(url(hub))])
    assert fill.view == DATA[RANGE : 2 * RANGE]
    assert streamed == DATA


async def test_a_reader_that_takes_its_time_is_no_stall(make_hub: Callable[..., Hub]):
    hub = make_hub({"org/m": {LARGE: DATA}}, shape="mirror", faults=[Fault("chunked", path=LARGE)])
    streamed = b""
    async with client(hub, stall_s=0.05, slow_bytes_per_s=1 << 20) as http:
        async for chunk in http.stream(url(hub)):
            streamed += chunk
            if len(streamed) < 3 * RANGE:
                await asyncio.sleep(0.1)  # the disk is slow
    assert streamed == DATA


async def test_a_hundred_hops_are_too_many(make_hub: Callable[..., Hub]):
    hub = make_hub({"org/m": {LARGE: DATA}}, faults=[Fault("redirect_loop")])
    async with client(hub) as http:
        with pytest.raises(MirrorError, match="more than 20 redirects"):
            await http.get_json(f"{hub.endpoint}/api/models/org/m")
        with pytest.raises(MirrorError, match=r"127\.0\.0\.1:9"):
            await http.fetch("http://127.0.0.1:9/x", ByteRange(0, 1), Fill(memoryview(bytearray(1))), size=1)
