"""Requests to the app: passed on as they came, asked for readiness, asked for a first output."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable

import aiohttp
from aiohttp import HttpVersion11, hdrs, web
from multidict import CIMultiDict, CIMultiDictProxy
from yarl import URL

from ..errors import FastloadError
from ..events import log
from .tunnel import tunnel, wants_websocket

#: Specified, RFC 9110, 7.6.1: what concerns one connection is not passed on. ``Expect`` is answered here.
_HOP_BY_HOP = (
    "Connection",
    "Keep-Alive",
    "Proxy-Connection",
    "TE",
    "Trailer",
    "Transfer-Encoding",
    "Upgrade",
    "Expect",
)
#: What aiohttp would add of itself.
_NOT_ADDED = (hdrs.USER_AGENT, hdrs.ACCEPT, hdrs.ACCEPT_ENCODING, hdrs.CONTENT_TYPE)
#: Guessed: between two questions whether a program can work, and how long one answer may take.
_ASK_EVERY_S = 0.1
_ANSWER_S = 5.0
#: Guessed: how much of an answer that is no good is shown.
_SHOWN_BYTES = 300
#: Guessed: the longest line of a head, of requests and of answers; large cookies and policies have more than aiohttp's 8 KiB.
LINE_BYTES = 1 << 16


class TooLarge(Exception):
    """The body of a request is larger than may be; the answer is 413."""


class Proxy:
    """The way to one app. Use from one event loop, inside ``async with``.

    Args:
        body_bytes: Largest body of a request.
    """

    def __init__(self, body_bytes: int) -> None:
        self._body_bytes = body_bytes
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Proxy:
        # A connection for each request: one that an app has just closed as idle would fail a POST that must not be repeated.
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, force_close=True),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=10),
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            trust_env=False,
            max_line_size=LINE_BYTES,
            max_field_size=LINE_BYTES,
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._session is not None:
            await self._session.close()

    @property
    def session(self) -> aiohttp.ClientSession:
        """The open session."""
        if self._session is None:
            raise FastloadError("the proxy is not open")
        return self._session

    # -- requests of clients ------------------------------------------------------------------------------------------

    async def forward(
        self, request: web.BaseRequest, base: str, answered: Callable[[int], object]
    ) -> web.StreamResponse:
        """Let *base* answer *request*; body and answer are passed on as they come, and all of a WebSocket.

        Args:
            answered: Told the status, as soon as there is one.

        Raises:
            TooLarge: The body is; nothing has been answered.
            aiohttp.ClientError: The app did not answer.
        """
        if (request.content_length or 0) > self._body_bytes:
            raise TooLarge
        headers = _passed_on(request)
        upgrade = wants_websocket(request)
        if upgrade:
            headers[hdrs.CONNECTION], headers[hdrs.UPGRADE] = "Upgrade", "websocket"
        body = _Body(request, self._body_bytes) if request.body_exists else None
        if body is not None:
            await _let_come(request)
        try:
            async with self.session.request(
                request.method,
                URL(base + request.rel_url.raw_path_qs, encoded=True),
                headers=headers,
                data=None if body is None else body.read(),
                allow_redirects=False,
                skip_auto_headers=_NOT_ADDED,
            ) as answer:
                if answer.status == 101 and not upgrade:
                    raise aiohttp.ClientPayloadError("it switched protocols unasked")
                answered(answer.status)
                return await (_switch if answer.status == 101 else _relay)(request, answer)
        except aiohttp.ClientError:
            if body is not None and body.too_large:
                raise TooLarge from None
            raise

    # -- our own ------------------------------------------------------------------------------------------------------

    async def until_ready(self, url: str, *, strict: bool) -> None:
        """Ask *url* until the answer is 2xx, or, unless *strict*, anything that is no error of the server's."""
        while True:
            try:
                async with self.session.get(url, timeout=aiohttp.ClientTimeout(total=_ANSWER_S)) as answer:
                    if answer.status < (300 if strict else 500):
                        return
            except (aiohttp.ClientError, TimeoutError):  # it does not listen yet, or not speak yet
                pass
            await asyncio.sleep(_ASK_EVERY_S)

    async def first_output(self, url: str, body: str) -> None:
        """Post *body* to *url* and check what comes back.

        Raises:
            FastloadError: It is no output: an error, nothing at all, ``null``, or JSON that is none.
        """
        headers = {hdrs.CONTENT_TYPE: "application/json"}
        try:
            async with self.session.post(url, data=body, headers=headers) as answer:
                data = await answer.read()
        except aiohttp.ClientError as e:
            raise FastloadError(f"the warm-up request was not answered: {e}") from e
        shown = data[:_SHOWN_BYTES].decode(errors="replace")
        if not 200 <= answer.status < 300:
            raise FastloadError(f"the warm-up request was answered with {answer.status}: {shown}")
        if not data.strip() or data.strip() == b"null":
            raise FastloadError("the warm-up request was answered with nothing", hint="return what clients are to get")
        if answer.content_type == "application/json":
            try:
                json.loads(data, parse_constant=_refuse)
            except ValueError as e:
                raise FastloadError(f"the output of the warm-up request is not JSON: {e}: {shown}") from None


def _refuse(name: str) -> float:
    raise ValueError(f"it holds {name}")


class _Body:
    """The body of a request, passed on as it comes, up to a limit."""

    def __init__(self, request: web.BaseRequest, limit: int) -> None:
        self._request = request
        self._limit = limit
        self.too_large = False

    async def read(self) -> AsyncIterator[bytes]:
        count = 0
        async for chunk in self._request.content.iter_any():
            count += len(chunk)
            if count > self._limit:
                self.too_large = True
                raise aiohttp.ClientPayloadError("the body is too large")
            yield chunk


async def _let_come(request: web.BaseRequest) -> None:
    """Ask for a body that is held back until somebody wants it (RFC 9110, 10.1.1)."""
    if request.version >= HttpVersion11 and request.headers.get(hdrs.EXPECT, "").lower() == "100-continue":
        await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")


def _passed_on(request: web.BaseRequest) -> CIMultiDict[str]:
    headers = _without_hops(request.headers)
    client = request.remote or "unknown"
    before = headers.popall("X-Forwarded-For", [])
    headers["X-Forwarded-For"] = ", ".join([*before, client])
    headers.setdefault("X-Forwarded-Proto", "http")
    headers.setdefault("X-Forwarded-Host", headers.get(hdrs.HOST, ""))
    return headers


def _without_hops(headers: CIMultiDictProxy[str]) -> CIMultiDict[str]:
    rest = CIMultiDict((name, _writable(value)) for name, value in headers.items())
    named = [name.strip() for value in headers.getall(hdrs.CONNECTION, ()) for name in value.split(",")]
    for name in (*_HOP_BY_HOP, *named):
        rest.popall(name, None)
    return rest


def _writable(value: str) -> str:
    """Return the value of a header, with bytes that are no UTF-8 read as ISO 8859-1: aiohttp would leave them out."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return value.encode(errors="surrogateescape").decode("latin-1")
    return value


async def _switch(request: web.BaseRequest, answer: aiohttp.ClientResponse) -> web.StreamResponse:
    """Agree with the client to what the app has agreed to; return when their WebSocket is over."""
    headers = _without_hops(answer.headers)
    headers[hdrs.CONNECTION], headers[hdrs.UPGRADE] = "Upgrade", "websocket"
    response = web.StreamResponse(status=101, reason=answer.reason, headers=headers)
    response.force_close()
    await response.prepare(request)
    await tunnel(request, answer)
    return response


async def _relay(request: web.BaseRequest, answer: aiohttp.ClientResponse) -> web.StreamResponse:
    response = web.StreamResponse(status=answer.status, reason=answer.reason, headers=_without_hops(answer.headers))
    await response.prepare(request)
    try:
        async for chunk in answer.content.iter_any():
            await response.write(chunk)
    except (aiohttp.ClientError, asyncio.CancelledError) as e:
        # Too late for a status: a cut connection is how the client learns that this is not all.
        if request.transport is not None:
            request.transport.abort()
        if isinstance(e, asyncio.CancelledError):
            raise
        if not isinstance(e, aiohttp.ClientConnectionResetError):  # that is a client that has gone
            log.warning("fastload serve: %s %s: the app cut its answer short", request.method, request.rel_url.raw_path)
        return response
    await response.write_eof()
    return response
