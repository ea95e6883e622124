"""What passes through ``fastload serve``: WebSockets, streams, uploads and odd messages, to a real aiohttp server and back."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import WSMsgType
from supervised import PATIENCE_S, Gate, Supervised, supervised

#: Says what it saw: ``GET /noted?n=3`` answers when there are three notes. Reads and writes sockets as it is told.
APP = """
import asyncio, os, sys
from pathlib import Path
from aiohttp import WSCloseCode, WSMsgType, web

notes, changed, sockets, sent = [], asyncio.Condition(), set(), [0]

async def note(text):
    async with changed:
        notes.append(text)
        changed.notify_all()

async def noted(request):
    async with changed:
        await changed.wait_for(lambda: len(notes) >= int(request.query["n"]))
        answer, notes[:] = list(notes), []
    return web.json_response(answer)

async def listen(request, ws):
    async for message in ws:
        if message.type is WSMsgType.BINARY:
            await ws.send_bytes(message.data)
        elif message.type is WSMsgType.PING:
            await ws.pong(message.data + b" heard")
        elif message.type is WSMsgType.PONG:
            await ws.send_str("pong " + message.data.decode())
        elif message.data == "head":
            await ws.send_json(dict(request.headers))
        elif message.data == "flood":
            for _ in range(64):
                await ws.send_bytes(bytes(1 << 20))
                sent[0] += 1
        elif message.data.startswith("close "):
            await ws.close(code=int(message.data[6:]), message=b"that was all")
        else:
            await ws.send_str(message.data)

async def talk(request):
    ws = web.WebSocketResponse(protocols=("v2", "v1"), autoping=False, max_msg_size=0)
    await ws.prepare(request)
    sockets.add(ws)
    try:
        await listen(request, ws)
    except asyncio.CancelledError:
        await note("cut off")
        raise
    except ConnectionResetError:  # the same, told to somebody who was about to write
        await note("cut off")
        return ws
    sockets.discard(ws)
    await note(f"closed {ws.close_code}")
    return ws

async def count(request):
    total = 0
    async for chunk in request.content.iter_any():
        total += len(chunk)
    return web.json_response({"bytes": total, "head": dict(request.headers)})

async def events(request):
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    await response.write(b"data: 1\\n\\n")
    try:
        await asyncio.Event().wait()
    finally:
        await note("nobody listens")

async def early(request):
    response = web.Response(status=401, text="no")
    response.force_close()
    return response

async def say_goodbye(app):
    for ws in set(sockets):
        await ws.close(code=WSCloseCode.GOING_AWAY)

if Path("gate").exists():
    Path("gate").read_text()
app = web.Application()
app.on_shutdown.append(say_goodbye)
app.router.add_get("/talk", talk)
app.router.add_get("/noted", noted)
app.router.add_get("/sent", lambda request: web.json_response(sent[0]))
app.router.add_get("/told", events)
app.router.add_get("/refused", lambda request: web.Response(status=403, text="no socket for you", headers={"X-Why": "1"}))
app.router.add_get("/long", lambda request: web.Response(headers={"X-Long": "x" * 40_000}))
app.router.add_get("/pid", lambda request: web.json_response(os.getpid()))
app.router.add_get("/", lambda request: web.Response())
app.router.add_post("/count", count)
app.router.add_post("/early", early)
web.run_app(app, host="127.0.0.1", port=int(sys.argv[1]), print=None, handler_cancellation=True, shutdown_timeout=1)
"""
PROGRAM = ["--", sys.executable, "server.py", "{port}"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Supervised]:
    """A supervisor in front of the app, for tests that leave both as they were."""
    folder = tmp_path_factory.mktemp("proxy")
    (folder / "server.py").write_text(APP)
    with supervised("--body-bytes", "32MiB", *PROGRAM, folder=folder) as server:
        yield server
        assert server.end() == (0, "")  # nothing that clients or the app did is an error of ours


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where the app lies, for tests that start it themselves."""
    (tmp_path / "server.py").write_text(APP)
    return tmp_path


def url(server: Supervised, path: str) -> str:
    return f"http://127.0.0.1:{server.port}{path}"


def ask(server: Supervised, head: str, *, until: bytes) -> bytes:
    """Send *head* as it is; return what comes, up to *until*."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE_S) as client:
        client.sendall(head.encode("latin-1"))
        return read(client, until)


def read(client: socket.socket, until: bytes) -> bytes:
    got = b""
    while until not in got:
        data = client.recv(1 << 16)
        assert data, f"closed behind {got!r}"
        got += data
    return got


async def noted(session: aiohttp.ClientSession, server: Supervised, count: int = 1) -> Any:
    async with session.get(url(server, f"/noted?n={count}")) as answer:
        return await answer.json()


# -- WebSockets -------------------------------------------------------------------------------------------------------


async def test_text_bytes_pings_and_close_codes_are_those_of_the_two_ends(server: Supervised):
    async with aiohttp.ClientSession() as session:
        async with session.ws_connect(url(server, "/talk"), autoping=False) as ws:
            await ws.send_str("grüß dich")
            assert await ws.receive_str() == "grüß dich"
            await ws.send_bytes(b"\0\xff")
            assert await ws.receive_bytes() == b"\0\xff"
            await ws.ping(b"you")
            message = await ws.receive()
            assert (message.type, message.data) == (WSMsgType.PONG, b"you heard")
            await ws.pong(b"me")
            assert await ws.receive_str() == "pong me"
            await ws.send_str("close 4001")
            message = await ws.receive()
            assert (message.type, message.data, message.extra) == (WSMsgType.CLOSE, 4001, "that was all")
        async with session.ws_connect(url(server, "/talk")) as ws:
            await ws.close(code=4002)
        assert sorted(await noted(session, server, 2))[-1] == "closed 4002"


async def test_the_last_frame_of_a_client_that_closes_behind_it_arrives(server: Supervised):
    """A proxy that only then notices the end must not lose what came before."""
    frame = bytes([0x88, 0x82, 0, 0, 0, 0, *(4003).to_bytes(2, "big")])
    handshake = "GET /talk HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"  # noqa: E501
    with socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE_S) as client:
        client.sendall(handshake.encode())
        assert read(client, b"\r\n\r\n").startswith(b"HTTP/1.1 101 ")
        client.sendall(frame)
    async with aiohttp.ClientSession() as session:
        assert await noted(session, server) == ["closed 4003"]


async def test_a_client_that_is_cut_off_is_cut_off_for_the_app_too(server: Supervised):
    async with aiohttp.ClientSession() as session:
        ws = await session.ws_connect(url(server, "/talk"))
        ws._response.close()  # as a network does, without a word
        assert await noted(session, server) == ["cut off"]


async def test_subprotocols_extensions_and_headers_are_agreed_on_by_the_two_ends(server: Supervised):
    async with (
        aiohttp.ClientSession() as session,
        session.ws_connect(
            url(server, "/talk?a=%20"), protocols=("v1",), compress=15, headers={"Origin": "http://a.example"}
        ) as ws,
    ):
        assert (ws.protocol, ws.compress) == ("v1", 15)
        await ws.send_str("head")
        head = await ws.receive_json()
        assert (head["Origin"], head["Host"]) == ("http://a.example", f"127.0.0.1:{server.port}")
        assert (head["X-Forwarded-For"], head["X-Forwarded-Host"]) == ("127.0.0.1", f"127.0.0.1:{server.port}")
        await ws.close()
        await noted(session, server)


async def test_a_client_that_does_not_read_holds_the_app_back(server: Supervised):
    """64 MiB are on their way; what the app cannot send waits in the app, not here."""
    async with aiohttp.ClientSession() as session:
        async with session.ws_connect(url(server, "/talk"), max_msg_size=0) as ws:
            await ws.send_str("flood")
            await ws.receive_bytes()
            before, sent = -1, 0
            while before != sent:  # until it gets no further
                before = sent
                for _ in range(20):
                    async with session.get(url(server, "/sent")) as answer:
                        sent = await answer.json()
            assert sent < 60
            for _ in range(63):
                assert len(await ws.receive_bytes()) == 1 << 20
        await noted(session, server)


async def test_a_client_that_goes_in_the_middle_of_a_flood_leaves_nothing_behind(server: Supervised):
    async with aiohttp.ClientSession() as session:
        ws = await session.ws_connect(url(server, "/talk"), max_msg_size=0)
        await ws.send_str("flood")
        await ws.receive_bytes()
        ws._response.close()
        assert await noted(session, server) == ["cut off"]
    record = await asyncio.to_thread(server.until, lambda record: record["requests"]["in_flight"] == 0)
    assert record["life"]["state"] == "ready"


async def test_a_handshake_that_the_app_refuses_is_an_answer_like_any_other(server: Supervised):
    upgrade = {"Connection": "Upgrade", "Upgrade": "websocket"}
    async with aiohttp.ClientSession() as session, session.get(url(server, "/refused"), headers=upgrade) as answer:
        assert (answer.status, answer.headers["X-Why"], await answer.text()) == (403, "1", "no socket for you")


async def test_other_protocols_are_not_switched_to(server: Supervised):
    head = {"Connection": "Upgrade, HTTP2-Settings", "Upgrade": "h2c", "HTTP2-Settings": "AAMAAABk"}
    async with aiohttp.ClientSession() as session, session.post(url(server, "/count"), headers=head) as answer:
        assert answer.status == 200
        assert not {"Upgrade", "HTTP2-Settings"} & (await answer.json())["head"].keys()


async def test_an_open_websocket_keeps_the_app_awake(folder: Path):
    idle_s = 0.2
    with supervised("--idle-s", str(idle_s), *PROGRAM, folder=folder) as server:
        async with aiohttp.ClientSession() as session, session.ws_connect(url(server, "/talk")) as ws:
            loop = asyncio.get_running_loop()
            end_s = loop.time() + 3 * idle_s
            while loop.time() < end_s:
                await ws.send_str("x")
                assert await ws.receive_str() == "x"
            record = await asyncio.to_thread(server.state)
            assert (record["life"]["state"], record["requests"]["in_flight"]) == ("ready", 1)
            assert record["life"]["idle_in_s"] is None
        record = await asyncio.to_thread(server.until_state, "asleep")
        assert record["life"]["attempt"] == 1


async def test_a_websocket_wakes_the_app_and_waits_for_it(folder: Path):
    gate = Gate(folder / "gate")
    with supervised("--asleep", "--hold-s", "60", *PROGRAM, folder=folder) as server:
        async with aiohttp.ClientSession() as session, asyncio.TaskGroup() as group:
            connecting = group.create_task(session.ws_connect(url(server, "/talk")))
            await asyncio.to_thread(server.until, lambda record: record["requests"]["held"] == 1)
            await asyncio.to_thread(gate.open)
            async with await connecting as ws:
                await ws.send_str("awake")
                assert await ws.receive_str() == "awake"


async def test_a_websocket_that_waits_too_long_gets_503_and_retry_after(folder: Path):
    gate = Gate(folder / "gate")
    with supervised("--hold-s", "0.05", *PROGRAM, folder=folder) as server:
        async with aiohttp.ClientSession() as session:
            with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
                await session.ws_connect(url(server, "/talk"))
            assert refused.value.status == 503
            assert refused.value.headers is not None
            assert int(refused.value.headers["Retry-After"]) > 0
        await asyncio.to_thread(gate.open)


async def test_the_end_of_the_app_is_the_end_of_its_websockets(folder: Path):
    with supervised("--drain-s", "0.05", *PROGRAM, folder=folder) as server:
        async with aiohttp.ClientSession() as session:
            async with session.get(url(server, "/pid")) as answer:
                pid = await answer.json()
            async with session.ws_connect(url(server, "/talk")) as ws:
                os.kill(pid, signal.SIGKILL)
                assert (await ws.receive()).type in (WSMsgType.CLOSED, WSMsgType.ERROR)
                assert ws.close_code == 1006
            await asyncio.to_thread(server.until_state, "failed")
            async with session.ws_connect(url(server, "/talk")) as ws:  # starts it again
                server.process.terminate()
                message = await ws.receive()
                assert (message.type, message.data) == (WSMsgType.CLOSE, 1001)  # the app's own word
        assert await asyncio.to_thread(server.process.wait, PATIENCE_S) == 0


def peak_bytes(server: Supervised) -> int:
    """Return the most memory that the supervisor has ever had."""
    return int(Path(f"/proc/{server.process.pid}/status").read_text().split("VmHWM:")[1].split()[0]) * 1024


# -- bodies -----------------------------------------------------------------------------------------------------------


def test_a_body_that_waits_to_be_asked_for_is_asked_for(server: Supervised):
    with socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE_S) as client:
        client.sendall(b"POST /count HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nExpect: 100-continue\r\n\r\n")
        assert read(client, b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        client.sendall(b"abc")
        answer = read(client, b"}}")
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert b'"bytes": 3' in answer
    assert b"Expect" not in answer


def test_a_body_that_is_too_large_is_not_asked_for(server: Supervised):
    head = f"POST /count HTTP/1.1\r\nHost: x\r\nContent-Length: {33 << 20}\r\nExpect: 100-continue\r\n\r\n"
    assert ask(server, head, until=b"\r\n").startswith(b"HTTP/1.1 413 ")


async def test_a_large_upload_passes_through_and_stays_in_nobodys_memory(server: Supervised):
    size = 30 << 20

    async def body() -> Any:
        for chunk in itertools.repeat(bytes(1 << 16), size >> 16):
            yield chunk

    async with aiohttp.ClientSession() as session:
        for head, coding in (({}, "Transfer-Encoding"), ({"Content-Length": str(size)}, "Content-Length")):
            async with session.post(url(server, "/count"), data=body(), headers=head) as answer:
                seen = await answer.json()
            assert seen["bytes"] == size
            assert {"Transfer-Encoding", "Content-Length"} & seen["head"].keys() == {coding}
    assert peak_bytes(server) < 100_000_000


async def test_an_answer_that_comes_before_the_body_has_gone_is_passed_on(server: Supervised):
    head = f"POST /early HTTP/1.1\r\nHost: x\r\nContent-Length: {30 << 20}\r\n\r\n"
    assert ask(server, head + "x" * 1000, until=b"no").startswith(b"HTTP/1.1 401 ")


async def test_the_app_learns_that_nobody_listens_to_its_events_any_more(server: Supervised):
    async with aiohttp.ClientSession() as session:
        async with session.get(url(server, "/told")) as answer:
            assert answer.content_type == "text/event-stream"
            assert await answer.content.readline() == b"data: 1\n"
            answer.close()
        assert await noted(session, server) == ["nobody listens"]


# -- heads ------------------------------------------------------------------------------------------------------------


def test_bytes_of_a_head_that_are_no_utf_8_are_not_left_out(server: Supervised):
    answer = ask(server, "POST /count HTTP/1.1\r\nHost: x\r\nX-Name: caf\xe9\r\n\r\n", until=b"}}")
    assert b'"X-Name": "caf\\u00e9"' in answer


async def test_a_head_may_be_as_large_as_cookies_and_policies_are(server: Supervised):
    async with aiohttp.ClientSession(max_field_size=1 << 16) as session:
        async with session.get(url(server, "/long")) as answer:
            assert (answer.status, len(answer.headers["X-Long"])) == (200, 40_000)
        async with session.post(url(server, "/wake"), headers={"Cookie": "x" * 40_000}) as answer:
            assert answer.status == 202


@pytest.mark.parametrize(
    "head",
    [
        "\x16\x03\x01\x02\x00\x01\x00\x01\xfc\r\n\r\n",
        "GET /\xff HTTP/1.1\r\nHost: x\r\n\r\n",
        "POST /count HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    ],
    ids=["tls", "path", "smuggling"],
)
def test_what_is_not_http_is_refused_and_fills_no_log(folder: Path, head: str):
    (folder / "app.py").write_text("def setup(): return lambda request: request\n")
    with supervised("--asleep", "app:setup", folder=folder) as server:
        assert ask(server, head, until=b"\r\n").startswith(b"HTTP/1.0 400 ")
        assert server.end() == (0, "")
