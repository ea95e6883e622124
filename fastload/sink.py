"""Where a body lands: memory of the caller's, filled by the kernel without a copy in between."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class Fill:
    """Memory that a range lands in, and how much of it has landed.

    Attributes:
        view: Writable, contiguous, exactly the range; owned by the caller until the fetch has returned or raised.
        filled_bytes: Landed so far; survives a failed try, so that the next one asks for the rest only.
    """

    __slots__ = ("filled_bytes", "view")

    def __init__(self, view: memoryview) -> None:
        self.view = view
        self.filled_bytes = 0

    def put(self, data: bytes) -> None:
        """Append *data*; the caller has checked that it fits."""
        self.view[self.filled_bytes : self.filled_bytes + len(data)] = data
        self.filled_bytes += len(data)


class Sink(asyncio.BufferedProtocol):
    """Stands in for aiohttp's protocol while a body arrives.

    Attributes:
        done: Completed with the last byte; fails when the connection ends before.
    """

    def __init__(self, fill: Fill, stop: int, transport: asyncio.Transport, home: asyncio.BaseProtocol) -> None:
        self._fill = fill
        self._stop = stop
        self._transport = transport
        self._home = home
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def __enter__(self) -> Sink:
        self._transport.set_protocol(self)
        if not self._transport.is_reading():
            self._transport.resume_reading()
        return self

    def __exit__(self, *_: object) -> None:
        """Hand the connection back; one with half a body in it is dropped, for nobody can use it again."""
        if self._transport.get_protocol() is self:
            self._transport.set_protocol(self._home)
        if self._fill.filled_bytes < self._stop:
            self._transport.abort()
        if not self.done.done():
            self.done.cancel()
        elif not self.done.cancelled():
            self.done.exception()  # seen: the fetch may have ended for another reason

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._fill.view[self._fill.filled_bytes : self._stop]

    def buffer_updated(self, nbytes: int) -> None:
        self._fill.filled_bytes += nbytes
        if self._fill.filled_bytes == self._stop:
            self._transport.set_protocol(self._home)
            if not self.done.done():
                self.done.set_result(None)

    def eof_received(self) -> bool | None:
        if not self.done.done():
            self.done.set_exception(EOFError("the connection closed before the end of the body"))
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.done.done():
            self.done.set_exception(exc or EOFError("the connection closed before the end of the body"))
        self._home.connection_lost(exc)

    def pause_writing(self) -> None:
        """Nothing is written while a body arrives."""

    def resume_writing(self) -> None:
        """Nothing is written while a body arrives."""


async def watch(done: asyncio.Future[None], position: Callable[[], int], least: int, window_s: float) -> None:
    """Wait until *done*; give up when *position* moves on by fewer than *least* bytes in *window_s* seconds.

    Raises:
        TimeoutError: It did.
    """
    while not done.done():
        before = position()
        await asyncio.wait({done}, timeout=window_s)
        came = position() - before
        if not done.done() and came < least:
            raise TimeoutError(f"{came} bytes in {window_s:g} s, expected {least}")
    done.result()
