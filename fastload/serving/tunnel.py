"""WebSockets: once the app has agreed to switch protocols (RFC 9110, 7.8), bytes travel both ways as they come.

Nothing is unpacked, so that subprotocols, extensions, pings, fragments and close codes (RFC 6455) are those of the two ends.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import aiohttp
from aiohttp import hdrs, web
from aiohttp.http import StreamWriter


def wants_websocket(request: web.BaseRequest) -> bool:
    """Tell whether *request* asks for one."""
    words = [word.strip().lower() for value in request.headers.getall(hdrs.CONNECTION, ()) for word in value.split(",")]
    return (
        request.method == hdrs.METH_GET
        and "upgrade" in words
        and request.headers.get(hdrs.UPGRADE, "").strip().lower() == "websocket"
    )


async def tunnel(request: web.BaseRequest, answer: aiohttp.ClientResponse) -> None:
    """Pass bytes on between the client of *request* and the app, whose *answer* it has been sent, until one of them closes."""
    client, connection = request.transport, answer.connection
    app = connection.transport if connection is not None else None
    if client is None or connection is None or connection.protocol is None or app is None:
        return  # one has closed already
    over = asyncio.Event()
    there, back = _Way(client, app, over), _Way(app, client, over)
    # What aiohttp has read ahead of the switch comes first.
    request.protocol.set_parser(there)  # type: ignore[arg-type]
    connection.protocol.set_parser(back, aiohttp.EMPTY_PAYLOAD)
    drains = StreamWriter(connection.protocol, asyncio.get_running_loop()).drain, request.writer.drain
    async with asyncio.TaskGroup() as group:
        held = [group.create_task(way.hold_back(drain)) for way, drain in zip((there, back), drains, strict=True)]
        await over.wait()
        for task in held:
            task.cancel()


class _Way:
    """One direction, in the place of the parser that aiohttp gives to what follows a switch of protocols.

    Bytes are handed over within the call that brings them: the last frame of an end that closes right behind it arrives.
    """

    def __init__(self, source: asyncio.Transport, target: asyncio.Transport, over: asyncio.Event) -> None:
        self._source = source
        self._target = target
        self._over = over
        self._full = asyncio.Event()

    def feed_data(self, data: bytes) -> tuple[bool, bytes]:
        """Take in what came; ``False``: it is not the end."""
        if not self._target.is_closing():
            self._target.write(data)
            if self._target.get_write_buffer_size() > self._target.get_write_buffer_limits()[1]:
                self._source.pause_reading()
                self._full.set()
        return False, b""

    def feed_eof(self) -> None:
        """The source has closed."""
        self._over.set()

    async def hold_back(self, drain: Callable[[], Awaitable[None]]) -> None:
        """Read on, whenever the target has taken (*drain*) what filled its buffer."""
        while True:
            await self._full.wait()
            self._full.clear()
            try:
                await drain()
            except ConnectionError:  # the target has closed, which ends the tunnel
                return
            self._source.resume_reading()
