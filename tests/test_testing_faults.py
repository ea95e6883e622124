"""Every fault of the embedded hub is what it says, as often as it says, and real on the wire."""

from __future__ import annotations

import asyncio
import gzip
import json
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from fastload.testing import Fault, Hub

MakeHub = Callable[..., Hub]
DATA = bytes(n * 7 % 251 for n in range(300_000))
URL = "/org/m/resolve/main/w.safetensors"


@dataclass
class Answer:
    """What a client saw: ``ended`` is ``"eof"``, ``"reset"`` or ``"short"`` (closed before the promised length)."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    ended: str = "eof"


async def get(url: str, **options: Any) -> Answer:
    answer = Answer()
    options.setdefault("allow_redirects", False)
    async with aiohttp.ClientSession(auto_decompress=False) as session:
        try:
            async with session.get(url, **options) as response:
                answer.status = response.status
                answer.headers = {n.lower(): v for n, v in response.headers.items()}
                async for chunk in response.content.iter_any():
                    answer.body += chunk
        except aiohttp.ClientPayloadError as error:
            answer.ended = "reset" if "ConnectionResetError" in str(error) else "short"
        except (aiohttp.ClientOSError, ConnectionResetError):
            answer.ended = "reset"
    return answer


def ranged(start: int, stop: int) -> dict[str, dict[str, str]]:
    return {"headers": {"Range": f"bytes={start}-{stop - 1}"}}


@pytest.fixture(params=["memory", "file"])
def mirror(request: pytest.FixtureRequest, make_hub: MakeHub, tmp_path: Path) -> Hub:
    """A plain mirror with one file, from memory (written) or from disk (sent by sendfile)."""
    (tmp_path / "w.safetensors").write_bytes(DATA)
    return make_hub({"org/m": {"w.safetensors": DATA} if request.param == "memory" else tmp_path}, shape="mirror")


async def test_reset_is_a_tcp_reset_after_exactly_n_bytes(mirror: Hub) -> None:
    mirror.script(Fault("reset", times=1, after_bytes=100_001))
    answer = await get(mirror.endpoint + URL)
    assert (answer.status, answer.body, answer.ended) == (200, DATA[:100_001], "reset")
    assert answer.headers["content-length"] == "300000"
    assert (mirror.requests[0].bytes_sent, mirror.requests[0].faults) == (100_001, ("reset",))
    assert (await get(mirror.endpoint + URL)).body == DATA


async def test_truncate_ends_the_connection_short_of_its_length(mirror: Hub) -> None:
    mirror.script(Fault("truncate", times=1, offset=50_000))
    answer = await get(mirror.endpoint + URL, **ranged(10_000, 90_000))
    assert (answer.status, answer.body, answer.ended) == (206, DATA[10_000:50_000], "short")


async def test_a_position_out_of_the_range_does_not_use_a_fault_up(mirror: Hub) -> None:
    mirror.script(Fault("truncate", times=1, offset=200_000), Fault("reset", times=1, after_bytes=1000))
    assert (await get(mirror.endpoint + URL, **ranged(0, 1000))).ended == "eof"
    assert (await get(mirror.endpoint + URL, **ranged(199_500, 200_400))).ended == "short"
    assert (await get(mirror.endpoint + URL, **ranged(0, 1001))).ended == "reset"
    assert [r.faults for r in mirror.requests] == [(), ("truncate",), ("reset",)]


async def test_stall_sends_nothing_more_until_the_client_goes(mirror: Hub) -> None:
    mirror.script(Fault("stall", after_bytes=1234))
    async with aiohttp.ClientSession() as session, session.get(mirror.endpoint + URL) as response:
        assert await response.content.readexactly(1234) == DATA[:1234]
        rest = asyncio.ensure_future(response.content.readany())
        await asyncio.to_thread(mirror.wait, lambda requests: requests[0].held)
        mirror.release()
        mirror.script()
        assert (await get(mirror.endpoint + URL)).body == DATA
        assert not rest.done() and mirror.requests[0].held
        rest.cancel()
    await asyncio.to_thread(mirror.wait, lambda requests: requests[0].ended_s is not None)
    assert mirror.requests[0].bytes_sent == 1234


async def test_a_stalled_client_is_cut_off_when_the_hub_closes() -> None:
    hub = Hub({"org/m": {"w.safetensors": DATA}}, shape="mirror", faults=[Fault("stall", after_bytes=10)]).start()
    pending = asyncio.create_task(get(hub.endpoint + URL))
    await asyncio.to_thread(hub.wait, lambda requests: requests and requests[0].held)
    await asyncio.to_thread(hub.close)
    assert (await pending).ended != "eof"


async def test_hold_goes_on_when_it_is_released(mirror: Hub) -> None:
    mirror.script(Fault("hold", after_bytes=1000))
    pending = [asyncio.create_task(get(mirror.endpoint + URL)) for _ in range(2)]
    await asyncio.to_thread(mirror.wait, lambda requests: sum(r.held for r in requests) == 2)
    assert [r.bytes_sent for r in mirror.requests] == [1000, 1000]
    mirror.release()
    assert [a.body == DATA for a in await asyncio.gather(*pending)] == [True, True]


async def test_slow_begins_at_its_position(mirror: Hub) -> None:
    mirror.script(Fault("slow", offset=299_900, bytes_per_s=500))
    answer = await get(mirror.endpoint + URL)
    await asyncio.to_thread(mirror.wait, lambda requests: requests[0].ended_s is not None)
    (request,) = mirror.requests
    assert answer.body == DATA
    assert request.ended_s is not None and request.ended_s - request.started_s >= 0.15


async def test_flip_changes_one_byte_of_the_file_whatever_the_range(mirror: Hub) -> None:
    mirror.script(Fault("flip", offset=123_456, mask=0x80))
    expected = bytearray(DATA)
    expected[123_456] ^= 0x80
    assert (await get(mirror.endpoint + URL)).body == expected
    assert (await get(mirror.endpoint + URL, **ranged(120_000, 130_000))).body == expected[120_000:130_000]
    assert (await get(mirror.endpoint + URL, **ranged(0, 120_000))).body == DATA[:120_000]
    mirror.script(Fault("flip", after_bytes=3))
    assert (await get(mirror.endpoint + URL, **ranged(100, 110))).body[3] == DATA[103] ^ 1


async def test_a_flip_after_a_hold_counts_from_the_first_byte_of_the_answer(mirror: Hub) -> None:
    mirror.script(Fault("slow", after_bytes=10, bytes_per_s=10**9), Fault("flip", after_bytes=20))
    body = (await get(mirror.endpoint + URL, **ranged(100, 200))).body
    assert [n for n in range(100) if body[n] != DATA[100 + n]] == [20]


async def test_no_range_sends_the_whole_file(mirror: Hub) -> None:
    mirror.script(Fault("no_range", times=1))
    assert (await get(mirror.endpoint + URL)).status == 200
    answer = await get(mirror.endpoint + URL, **ranged(5, 10))
    assert (answer.status, answer.body, "content-range" in answer.headers) == (200, DATA, False)
    assert (await get(mirror.endpoint + URL, **ranged(5, 10))).status == 206


async def test_bad_range_labels_the_right_bytes_wrongly(mirror: Hub) -> None:
    mirror.script(Fault("bad_range", times=1))
    answer = await get(mirror.endpoint + URL, **ranged(5, 10))
    assert (answer.headers["content-range"], answer.body) == ("bytes 6-10/300000", DATA[5:10])


async def test_chunked_has_no_length(mirror: Hub) -> None:
    mirror.script(Fault("chunked"))
    answer = await get(mirror.endpoint + URL)
    assert answer.headers["transfer-encoding"] == "chunked" and "content-length" not in answer.headers
    assert (answer.body, answer.ended) == (DATA, "eof")
    assert (await get(mirror.endpoint + URL, **ranged(7, 70_000))).body == DATA[7:70_000]


async def test_gzip_is_sent_unasked_with_a_weak_etag(mirror: Hub) -> None:
    mirror.script(Fault("gzip"))
    answer = await get(mirror.endpoint + URL, headers={"Accept-Encoding": "identity"})
    assert answer.headers["content-encoding"] == "gzip" and answer.headers["etag"].startswith('W/"')
    assert gzip.decompress(answer.body) == DATA


async def test_wrong_labels_come_with_right_bytes(make_hub: MakeHub) -> None:
    hub = make_hub({"org/m": {"w.safetensors": DATA, "a.txt": b"a"}})
    hub.script(Fault("wrong_etag"), Fault("wrong_commit", path="*.txt"))
    large = await get(hub.endpoint + URL)
    assert (large.headers["x-linked-etag"], large.headers["x-repo-commit"]) == (f'"{"0" * 64}"', hub.commit("org/m"))
    small = await get(hub.endpoint + "/org/m/resolve/main/a.txt")
    assert (small.headers["etag"], small.headers["x-repo-commit"]) == (f'"{"0" * 40}"', "f" * 40)
    assert (await get(hub.endpoint + URL, allow_redirects=True)).body == DATA


async def test_status_comes_with_its_headers_after_those_that_are_skipped(mirror: Hub) -> None:
    headers = {"Retry-After": "7", "RateLimit": '"resolvers";r=0;t=7'}
    mirror.script(Fault("status", status=429, headers=headers, skip=1, times=2))
    answers = [await get(mirror.endpoint + URL) for _ in range(4)]
    assert [a.status for a in answers] == [200, 429, 429, 200]
    assert (answers[1].headers["retry-after"], answers[1].headers["ratelimit"]) == ("7", headers["RateLimit"])


async def test_faults_keep_to_their_method_path_and_origin(make_hub: MakeHub) -> None:
    hub = make_hub({"org/m": {"w.safetensors": DATA, "a.txt": b"a"}})
    hub.script(Fault("status", path="*.txt"), Fault("status", status=500, origin="cdn", path="w.*"))
    assert (await get(hub.endpoint + "/org/m/resolve/main/a.txt")).status == 503
    redirect = await get(hub.endpoint + URL)
    assert redirect.status == 302
    assert (await get(redirect.headers["location"])).status == 500
    async with aiohttp.ClientSession() as session, session.head(hub.endpoint + "/org/m/resolve/main/a.txt") as head:
        assert head.status == 200
    hub.script(Fault("status", path="/api/*", method="*"))
    assert (await get(hub.endpoint + "/api/models/org/m")).status == 503


async def test_drop_resets_before_the_head(mirror: Hub) -> None:
    mirror.script(Fault("drop"))
    answer = await get(mirror.endpoint + URL)
    assert (answer.status, answer.ended) == (0, "reset")


async def test_hang_gives_no_answer_until_the_client_goes(mirror: Hub) -> None:
    mirror.script(Fault("hang"))
    pending = asyncio.create_task(get(mirror.endpoint + URL))
    await asyncio.to_thread(mirror.wait, lambda requests: requests and requests[0].held)
    pending.cancel()
    await asyncio.to_thread(mirror.wait, lambda requests: requests[0].ended_s is not None)
    assert mirror.requests[0].status == 0


async def test_redirect_loop_never_ends(mirror: Hub) -> None:
    mirror.script(Fault("redirect_loop"))
    with pytest.raises(aiohttp.TooManyRedirects):
        await get(mirror.endpoint + URL, allow_redirects=True)


async def test_captive_portal_says_200_and_nothing_of_a_hub(mirror: Hub) -> None:
    mirror.script(Fault("captive"))
    for path in (URL, "/api/models/org/m"):
        answer = await get(mirror.endpoint + path)
        assert answer.status == 200 and answer.headers["content-type"].startswith("text/html")
        assert "x-repo-commit" not in answer.headers and b"log in" in answer.body


async def test_expire_hits_signed_urls_only(make_hub: MakeHub) -> None:
    hub = make_hub({"org/m": {"w.safetensors": DATA}})
    hub.script(Fault("expire", times=1))
    first = await get(hub.endpoint + URL, allow_redirects=True)
    assert (first.status, b"Request has expired" in first.body) == (403, True)
    assert (await get(hub.endpoint + URL, allow_redirects=True)).body == DATA
    assert hub.counts() == {"GET hub 302": 2, "GET cdn 403": 1, "GET cdn 200": 1}


async def test_garbage_json_hits_the_api_only(mirror: Hub) -> None:
    mirror.script(Fault("garbage_json"))
    assert (await get(mirror.endpoint + URL)).body == DATA
    answer = await get(mirror.endpoint + "/api/models/org/m")
    assert answer.headers["content-type"].startswith("application/json")
    with pytest.raises(json.JSONDecodeError):
        json.loads(answer.body)


async def test_resets_and_flips_work_over_tls(make_hub: MakeHub) -> None:
    import ssl

    hub = make_hub({"org/m": {"w.safetensors": DATA}}, shape="mirror", tls=True)
    context = ssl.create_default_context(cafile=str(hub.ca_file))
    hub.script(Fault("reset", times=1, after_bytes=1000))
    answer = await get(hub.endpoint + URL, ssl=context)
    assert (answer.body, answer.ended) == (DATA[:1000], "reset")
    hub.script(Fault("flip", offset=0))
    assert (await get(hub.endpoint + URL, ssl=context)).body[0] == DATA[0] ^ 1


def test_reset_reaches_a_blocking_socket_as_econnreset(make_hub: MakeHub) -> None:
    hub = make_hub({"org/m": {"w.safetensors": DATA}}, shape="mirror", faults=[Fault("reset", after_bytes=10)])
    with socket.create_connection(("127.0.0.1", int(hub.endpoint.rpartition(":")[2]))) as connection:
        connection.sendall(f"GET {URL} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        received = b""
        with pytest.raises(ConnectionResetError):
            while chunk := connection.recv(65536):
                received += chunk
    assert received.endswith(b"\r\n\r\n" + DATA[:10])


@pytest.mark.parametrize("kind", ["memory", "file"])
def test_a_client_that_hangs_up_is_no_error_of_the_hub(
    kind: str, make_hub: MakeHub, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = bytes(16 << 20)  # more than the buffers between the two take
    (tmp_path / "w.safetensors").write_bytes(data)
    hub = make_hub({"org/m": {"w.safetensors": data} if kind == "memory" else tmp_path}, shape="mirror")
    with socket.create_connection(("127.0.0.1", int(hub.endpoint.rpartition(":")[2]))) as connection:
        connection.sendall(f"GET {URL} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        assert connection.recv(1000)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset, not an end
    hub.wait(lambda requests: requests[0].ended_s is not None)
    assert (asyncio.run(get(hub.endpoint + URL))).body == data
    assert not caplog.records


async def test_faults_of_one_answer_add_up(mirror: Hub) -> None:
    mirror.script(Fault("chunked"), Fault("flip", after_bytes=1), Fault("truncate", after_bytes=70_000))
    answer = await get(mirror.endpoint + URL)
    assert (answer.body[1] ^ 1, answer.body[2:], answer.ended) == (DATA[1], DATA[2:70_000], "short")
    assert mirror.requests[0].faults == ("chunked", "flip", "truncate")
