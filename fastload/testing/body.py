"""Sending the bytes of a file: at full speed by sendfile, paced, or as a fault wants it."""

from __future__ import annotations

import asyncio
import fcntl
import gzip
import socket
import struct
import termios
from collections.abc import Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

from aiohttp import web

from ..types import ByteRange
from .faults import Fault
from .files import Entry
from .log import Exchange, RequestLog

# Measured on loopback: beyond 1 MiB a write gains nothing.
CHUNK_BYTES = 1 << 20
# Reasoned: 50 chunks a second look like a steady line and cost nothing.
PACE_S = 0.02
# Reasoned: a sleep that ended late is made up for, an idle connection saves nothing up.
_CATCH_UP_S = 0.2
_STOPS = ("reset", "truncate", "stall", "hold")


@dataclass(slots=True)
class Connection:
    """What a hub knows of one TCP connection."""

    number: int
    free_at_s: float = 0.0


class Bodies:
    """Sends bodies for one hub; lives in its event loop.

    Attributes:
        rate_bytes_per_s: Of each connection; ``None``: as fast as it goes.
    """

    def __init__(self, log: RequestLog, rate_bytes_per_s: float | None) -> None:
        self.rate_bytes_per_s = rate_bytes_per_s
        self._log = log
        self._connections: WeakKeyDictionary[asyncio.Transport, Connection] = WeakKeyDictionary()
        self._count = 0
        self._holds: set[asyncio.Future[None]] = set()

    def connected(self, transport: asyncio.Transport) -> None:
        """Number a new connection."""
        self._count += 1
        self._connections[transport] = Connection(self._count)

    def connection(self, request: web.BaseRequest) -> Connection:
        """Return the connection that *request* came by; number 0 where it is gone already."""
        transport = request.transport
        return Connection(0) if transport is None else self._connections[transport]

    def release(self) -> None:
        """Let every body go on that a ``hold`` has stopped."""
        for hold in self._holds:
            if not hold.done():
                hold.set_result(None)

    def abort(self) -> None:
        """Cut all connections."""
        for transport in list(self._connections):
            transport.abort()

    async def stop(self, exchange: Exchange) -> None:
        """Wait until :meth:`release`; the handler is cancelled when the client goes or the hub closes."""
        hold: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._holds.add(hold)
        exchange.held = True
        self._log.changed()
        try:
            await hold
        finally:
            self._holds.discard(hold)
            exchange.held = False

    async def stall(self, exchange: Exchange) -> None:
        """Wait until the client goes or the hub closes."""
        while True:
            await self.stop(exchange)

    async def send(
        self,
        request: web.BaseRequest,
        response: web.StreamResponse,
        exchange: Exchange,
        entry: Entry,
        span: ByteRange,
        faults: Sequence[Fault],
    ) -> web.StreamResponse:
        """Send *response* and the bytes *span* of *entry* with *faults*."""
        kinds = {f.kind for f in faults}
        exchange.status = response.status
        if "gzip" in kinds:
            return await self._send_gzip(request, response, exchange, entry, span)
        if "chunked" in kinds:
            response.enable_chunked_encoding()
        else:
            response.content_length = len(span)
        await response.prepare(request)
        sender = _Sender(self, request, response, exchange, entry, faults)
        position = span.start
        for stop_at, fault in sorted(_positions(faults, span), key=lambda pair: pair[0]):
            await sender.send(position, stop_at)
            position = max(position, stop_at)
            if fault.kind == "hold":
                await self.stop(exchange)
            elif fault.kind == "stall":
                await self.stall(exchange)
            elif fault.kind in ("reset", "truncate"):
                await hang_up(request, reset=fault.kind == "reset")
                return response
            else:
                sender.slow_bytes_per_s = fault.bytes_per_s
        await sender.send(position, span.stop)
        await response.write_eof()
        return response

    async def _send_gzip(
        self, request: web.BaseRequest, response: web.StreamResponse, exchange: Exchange, entry: Entry, span: ByteRange
    ) -> web.StreamResponse:
        body = gzip.compress(entry.read(span.start, len(span)), mtime=0)
        response.headers["Content-Encoding"] = "gzip"
        if "ETag" in response.headers:
            response.headers["ETag"] = f"W/{response.headers['ETag']}"
        response.content_length = len(body)
        await response.prepare(request)
        exchange.bytes_sent += len(body)
        await response.write(body)
        await response.write_eof()
        return response


def _positions(faults: Sequence[Fault], span: ByteRange) -> list[tuple[int, Fault]]:
    stops = [(f.position(span), f) for f in faults if f.kind in (*_STOPS, "slow")]
    return [(position, fault) for position, fault in stops if position is not None]


class _Sender:
    """Writes parts of one file to one connection."""

    def __init__(
        self,
        bodies: Bodies,
        request: web.BaseRequest,
        response: web.StreamResponse,
        exchange: Exchange,
        entry: Entry,
        faults: Sequence[Fault],
    ) -> None:
        self._bodies = bodies
        self._request = request
        self._response = response
        self._exchange = exchange
        self._entry = entry
        self._flips = [f for f in faults if f.kind == "flip"]
        self._first: int | None = None
        self._connection = bodies.connection(request)
        self._begun = False
        self.slow_bytes_per_s: int | None = None
        transport = request.transport
        plain = transport is not None and transport.get_extra_info("sslcontext") is None
        in_file = not isinstance(entry.content, bytes)
        self._by_sendfile = plain and in_file and not self._flips and not response.chunked

    async def send(self, start: int, stop: int) -> None:
        """Send the bytes from *start* to *stop*."""
        if self._first is None:
            self._first = start
        while start < stop:
            rates = [r for r in (self._bodies.rate_bytes_per_s, self.slow_bytes_per_s) if r]
            count = stop - start
            if rates:
                count = min(count, max(1, int(min(rates) * PACE_S)), CHUNK_BYTES)
                await self._pace(count / min(rates))
            elif not self._by_sendfile:
                count = min(count, CHUNK_BYTES)
            self._exchange.bytes_sent += count
            if self._by_sendfile:
                await self._sendfile(start, count)
            else:
                await self._write(start, count)
            start += count

    async def _pace(self, seconds: float) -> None:
        loop = asyncio.get_running_loop()
        connection = self._connection
        wait_s = connection.free_at_s - loop.time()
        if wait_s > 0:
            await asyncio.sleep(wait_s)
        elif not self._begun or wait_s < -_CATCH_UP_S:
            connection.free_at_s = loop.time()
        self._begun = True
        connection.free_at_s += seconds

    async def _sendfile(self, start: int, count: int) -> None:
        transport = self._request.transport
        if transport is None:
            raise ConnectionResetError("the client is gone")
        assert not isinstance(self._entry.content, bytes)
        with open(self._entry.content, "rb", buffering=0) as f:  # noqa: ASYNC230
            try:
                await asyncio.get_running_loop().sendfile(transport, f, start, count)
            except BaseException:
                self._exchange.bytes_sent -= count - max(0, f.tell() - start)
                raise

    async def _write(self, start: int, count: int) -> None:
        data = bytearray(self._entry.read(start, count))
        for fault in self._flips:
            position = (self._first or 0) + fault.after_bytes if fault.offset is None else fault.offset
            if start <= position < start + count:
                data[position - start] ^= fault.mask
        await self._response.write(bytes(data))


async def hang_up(request: web.BaseRequest, *, reset: bool) -> None:
    """End the connection when all written bytes have reached the peer's kernel: by RST, or by FIN."""
    transport = request.transport
    if transport is None:
        return
    if reset:
        await _flushed(transport)
        sock = transport.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        transport.abort()
    else:
        transport.close()


async def _flushed(transport: asyncio.Transport) -> None:
    """Wait until nothing is left in the transport and the kernel; a client that does not read ends it after 5 s."""
    fd = transport.get_extra_info("socket").fileno()
    loop = asyncio.get_running_loop()
    until_s = loop.time() + 5
    while loop.time() < until_s and not transport.is_closing():
        unsent = struct.unpack("i", fcntl.ioctl(fd, termios.TIOCOUTQ, b"\0\0\0\0"))[0]
        if not unsent and not transport.get_write_buffer_size():
            return
        await asyncio.sleep(0.001)
