"""HTTP: ranged GETs whose bodies land straight in the caller's memory. The only client door to aiohttp.

After the head of an answer the transport's protocol is switched to a buffered one whose buffer *is* the destination, so
that the kernel copies each byte once (measured: 0.31 CPU-seconds a GB, against 0.55 through the stream reader). After the
last byte the connection goes back to aiohttp's pool. Bodies that are chunked, compressed or without a length take the
stream reader.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import aclosing, asynccontextmanager
from typing import Any
from urllib.parse import urljoin, urlsplit

import aiohttp

from .access import Access
from .answers import check_content_range, length, origin, other_size, public, status_error
from .errors import MirrorError, MirrorStatusError, MirrorTimeoutError, RangeError
from .settings import Settings
from .sink import Fill, Sink, watch
from .types import ByteRange

#: As many hops as huggingface_hub and browsers follow.
_MAX_HOPS = 20
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
#: Answers to a signed address that has expired, or whose object has moved: ask the hub for a new one.
_SIGNATURE_GONE = frozenset({400, 401, 403, 404, 410})


class RangeIgnored(Exception):
    """The server answers with the whole file, whatever range it is asked for."""


class HttpClient:
    """One pool of connections for one transfer. Use from one event loop, inside ``async with``.

    Args:
        token: Sent to *endpoint*'s origin and nowhere else, whatever redirects say.
    """

    def __init__(self, settings: Settings, endpoint: str, token: str | None = None) -> None:
        self._settings = settings
        self._access = Access(settings, endpoint, token)
        self._session: aiohttp.ClientSession | None = None
        self._located: dict[str, str] = {}
        self._locating: dict[str, asyncio.Lock] = {}
        self.requests = 0

    async def __aenter__(self) -> HttpClient:
        await asyncio.to_thread(self._access.prepare)
        # trust_env is read here, not by aiohttp: that asks a thread for .netrc before every request, knows no ALL_PROXY,
        # and refuses to send a token to a host that .netrc names too.
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=30),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=self._settings.connect_s),
            headers={"User-Agent": "fastload", "Accept-Encoding": "identity"},
            cookie_jar=aiohttp.DummyCookieJar(),
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._session is not None:
            await self._session.close()

    # -- one request -------------------------------------------------------------------------------------------------

    def _options(self, url: str, more: Mapping[str, str] | None) -> dict[str, Any]:
        """Headers, proxy and certificates for *url*."""
        headers = dict(more or {})
        authorization = self._access.authorization(url)
        if authorization is not None:
            headers["Authorization"] = authorization
        options: dict[str, Any] = {"headers": headers}
        context, proxy = self._access.certificates(url), self._access.proxy(url)
        if context is not None:
            options["ssl"] = context
        if proxy is not None:
            options["proxy"] = proxy.url
            if proxy.authorization is not None:  # aiohttp makes Proxy-Authorization of it, in both kinds of request
                options["proxy_headers"] = {"Authorization": proxy.authorization}
        return options

    async def _send(self, method: str, url: str, headers: Mapping[str, str] | None) -> aiohttp.ClientResponse:
        """Send one request, follow nothing; translate what aiohttp raises."""
        if self._session is None:
            raise RuntimeError("HttpClient is used outside its async with block")
        options = self._options(url, headers)
        self.requests += 1
        patience_s = self._settings.connect_s + self._settings.stall_s
        try:
            async with asyncio.timeout(patience_s):
                return await self._session.request(method, url, allow_redirects=False, **options)
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as e:
            raise translate(e, url, f"no answer in {patience_s:g} s") from e

    async def _follow(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str] | None,
        seen: Callable[[str, aiohttp.ClientResponse], None],
    ) -> tuple[str, aiohttp.ClientResponse]:
        """Send and follow redirects; *seen* is shown every answer. Returns the last address and its answer."""
        for _ in range(_MAX_HOPS):
            response = await self._send(method, url, headers)
            try:
                seen(url, response)
                location = response.headers.get("Location")
                if response.status not in _REDIRECTS or not location:
                    return url, response
                url = urljoin(url, location)
                if urlsplit(url).scheme not in ("http", "https"):
                    raise MirrorError(
                        f"{public(url)}: redirected to something that is not http", mirror=public(url), retryable=False
                    )
            except BaseException:
                response.close()
                raise
            response.release()
        raise MirrorError(f"{public(url)}: more than {_MAX_HOPS} redirects", mirror=public(url), retryable=False)

    # -- metadata ----------------------------------------------------------------------------------------------------

    async def get_json(self, url: str) -> tuple[Any, Mapping[str, str]]:
        """GET *url* and decode its JSON body; one try.

        Raises:
            MirrorError: No answer, an error status, or something that is not JSON.
        """
        _, response = await self._follow("GET", url, {"Accept": "application/json"}, lambda u, r: None)
        try:
            async with asyncio.timeout(self._settings.connect_s + self._settings.stall_s):
                body = await response.read()
        except (aiohttp.ClientError, OSError, TimeoutError) as e:
            raise translate(e, url, "the answer stalled") from e
        finally:
            response.release()
        if response.status != 200:
            raise status_error(response.status, response.reason, response.headers, url)
        try:
            return json.loads(body), response.headers
        except ValueError as e:
            kind = response.headers.get("Content-Type", "no content type")
            raise MirrorError(
                f"{public(url)}: answered with {len(body)} bytes of {kind}, not JSON:"
                " not a Hugging Face hub, or a login page in between",
                mirror=public(url),
                retryable="json" in kind,  # half of what a hub said; a page of anything else stays what it is
            ) from e

    async def head(self, url: str) -> Mapping[str, str]:
        """HEAD *url* without following a redirect to another origin; return the headers of the hub's own answer."""
        for _ in range(_MAX_HOPS):
            response = await self._send("HEAD", url, None)
            response.release()
            location = response.headers.get("Location")
            if response.status in _REDIRECTS and location:
                target = urljoin(url, location)
                if origin(target) == origin(url) and "X-Linked-ETag" not in response.headers:
                    url = target
                    continue
                return response.headers
            if response.status != 200:
                raise status_error(response.status, response.reason, response.headers, url)
            return response.headers
        raise MirrorError(f"{public(url)}: more than {_MAX_HOPS} redirects", mirror=public(url), retryable=False)

    # -- content -----------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def _located_answer(
        self, url: str, headers: Mapping[str, str] | None, check: Callable[[Mapping[str, str]], None]
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """GET *url*, straight from where it redirected to last time; resolve it again when that address has expired.

        Of several requests for the same file only the first asks the hub; the others wait for the address it gets.
        """
        first = True

        def seen(at: str, response: aiohttp.ClientResponse) -> None:
            nonlocal first
            if first and response.status in (200, 206, *_REDIRECTS):
                check(response.headers)
            first = False

        lock = self._locating.setdefault(url, asyncio.Lock())
        response: aiohttp.ClientResponse | None = None
        cached = self._located.get(url)
        if cached is not None:
            response = await self._send("GET", cached, headers)
            if response.status in _REDIRECTS or (cached != url and response.status in _SIGNATURE_GONE):
                response.close()
                response = None
                if self._located.get(url) == cached:
                    del self._located[url]
        if response is None:
            async with lock:
                known = self._located.get(url)
                if known is None:
                    final, response = await self._follow("GET", url, headers, seen)
                    if response.status in (200, 206):
                        self._located[url] = final
            if response is None:
                _, response = await self._follow("GET", known or url, headers, lambda u, r: None)
        try:
            yield response
        except BaseException:
            response.close()
            raise
        else:
            response.release()

    async def fetch(
        self,
        url: str,
        span: ByteRange,
        fill: Fill,
        *,
        size: int,
        check: Callable[[Mapping[str, str]], None] = lambda h: None,
    ) -> None:
        """Read *span* of the file at *url* into *fill*, from where *fill* stands.

        Args:
            url: The hub's or mirror's address of the file; where it redirects to is remembered.
            span: Half-open; ``len(fill.view) == len(span)``.
            size: Of the whole file, in bytes; an answer that says otherwise is refused.
            check: Shown the headers of the first answer (before any redirect); may raise.

        Raises:
            RangeIgnored: The server sends the whole file instead.
            RangeError: The answer covers another range (RFC 9110, 15.3.7), or a file of another size.
            MirrorTimeoutError: Too few bytes for ``settings.stall_s``; what came is in *fill*.
            MirrorStatusError: An error status.
            MirrorError: The connection broke; what came is in *fill*.
        """
        want = ByteRange(span.start + fill.filled_bytes, span.stop)
        async with self._located_answer(url, {"Range": want.header}, check) as response:
            if response.status == 200 and want == ByteRange(0, size) and length(response.headers) in (None, size):
                pass  # the whole file was asked for and comes
            elif response.status == 200:
                if length(response.headers) not in (None, size) and "Content-Encoding" not in response.headers:
                    raise other_size(url, length(response.headers), size)
                raise RangeIgnored(public(url))
            elif response.status != 206:
                raise _refused(response, url)
            elif response.headers.get("Content-Encoding", "identity") != "identity":
                raise RangeIgnored(public(url))  # a range of the compressed file: of no use
            else:
                check_content_range(response.headers, url, want, size)
            await self._receive(response, url, fill, len(want))

    async def _receive(self, response: aiohttp.ClientResponse, url: str, fill: Fill, count: int) -> None:
        content, connection = response.content, response.connection
        plain = length(response.headers) == count and "Content-Encoding" not in response.headers
        stop = fill.filled_bytes + count
        try:
            if (
                plain
                and connection is not None
                and connection.transport is not None
                and connection.protocol is not None
            ):
                fill.put(content.read_nowait(-1))  # what came along with the head
                if fill.filled_bytes < stop:
                    with Sink(fill, stop, connection.transport, connection.protocol) as sink:
                        await watch(sink.done, lambda: fill.filled_bytes, self._least, self._settings.stall_s)
                content.feed_eof()  # tells aiohttp that the answer is complete: the connection returns to its pool
                return
            async with aclosing(self._chunks(response)) as chunks:
                while fill.filled_bytes < stop:
                    data = await anext(chunks, b"")
                    if not data:
                        missing = stop - fill.filled_bytes
                        raise MirrorError(f"{public(url)}: the answer ended {missing} bytes early", mirror=public(url))
                    if len(data) > stop - fill.filled_bytes:
                        raise RangeError(f"{public(url)}: the answer is longer than it said", mirror=public(url))
                    fill.put(data)
        except (aiohttp.ClientError, OSError, TimeoutError, EOFError) as e:
            raise translate(e, url, f"too slow ({str(e) or 'no byte'}), {fill.filled_bytes} bytes came") from e

    @property
    def _least(self) -> int:
        """How many bytes a body must bring in each stall_s."""
        return max(1, int(self._settings.slow_bytes_per_s * self._settings.stall_s))

    async def _chunks(self, response: aiohttp.ClientResponse) -> AsyncGenerator[bytes, None]:
        """Yield what the stream reader gets; TimeoutError as of :func:`watch`, the consumer's time left out."""
        now_s, window_s = asyncio.get_running_loop().time, self._settings.stall_s
        until_s, came = now_s() + window_s, 0
        while True:
            async with asyncio.timeout_at(until_s):
                data = await response.content.readany()
            if not data:
                return
            came += len(data)
            given_s = now_s()
            yield data
            until_s += now_s() - given_s
            if came >= self._least:
                until_s, came = now_s() + window_s, 0

    async def stream(
        self, url: str, *, check: Callable[[Mapping[str, str]], None] = lambda h: None
    ) -> AsyncGenerator[bytes, None]:
        """Yield the whole file at *url* from its first byte, decoded if the server compressed it.

        Raises:
            MirrorError: As :meth:`fetch`.
        """
        async with self._located_answer(url, None, check) as response:
            if response.status != 200:
                raise _refused(response, url)
            try:
                async with aclosing(self._chunks(response)) as chunks:
                    async for data in chunks:
                        yield data
            except (aiohttp.ClientError, OSError, TimeoutError) as e:
                raise translate(e, url, f"too few bytes in {self._settings.stall_s:g} s") from e


def _refused(response: aiohttp.ClientResponse, url: str) -> MirrorStatusError:
    """Return the error for an answer with an error status; that of a place that *url* led to may be better next time."""
    error = status_error(response.status, response.reason, response.headers, url)
    if response.status in _SIGNATURE_GONE and origin(str(response.url)) != origin(url):
        error.retryable = True
    return error


def translate(error: BaseException, url: str, timed_out: str) -> MirrorError:
    """Return what *error* of aiohttp, ssl or the system means here."""
    where = public(url)
    if isinstance(error, TimeoutError):
        return MirrorTimeoutError(f"{where}: {timed_out}", mirror=where)
    if isinstance(error, aiohttp.ClientConnectorCertificateError):
        why = f"{where}: its certificate is not trusted: {error.certificate_error}"
        hint = "for a private authority set SSL_CERT_FILE (or ca_file) to its PEM file"
        return MirrorError(why, mirror=where, retryable=False, hint=hint)
    if isinstance(error, aiohttp.InvalidURL):
        return MirrorError(f"{where}: not a URL", mirror=where, retryable=False)
    if isinstance(error, aiohttp.ClientConnectorError):  # the system's own words, without the repr of an SSLContext
        said = os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror or error.os_error
        error = OSError(f"cannot connect to {error.host}:{error.port}: {said}")
    text = str(error) or type(error).__name__
    return MirrorError(f"{where}: {text.splitlines()[0]}", mirror=where)
