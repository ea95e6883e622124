"""Fetching: one range, or one whole file, from whichever mirror can, until it is there or hopeless."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing

from .answers import check_etag
from .digest import mismatch
from .download import Download
from .errors import AccessError, AllMirrorsFailedError, Attempt, DownloadError, MirrorError, MirrorStatusError
from .events import Events, log
from .http import HttpClient, RangeIgnored
from .mirrors import Mirrors
from .refusals import refusal
from .retry import Retrying, Sleep
from .settings import Settings
from .sink import Fill
from .types import ByteRange, Digest, Manifest


class Fetcher:
    """Chooses mirrors, retries, keeps count. Use from one event loop.

    Attributes:
        received_bytes: Bytes of file content that travelled, retries and failures included.
    """

    def __init__(
        self,
        settings: Settings,
        http: HttpClient,
        bases: tuple[str, ...],
        manifest: Manifest,
        events: Events,
        *,
        sleep: Sleep,
        token: bool,
    ) -> None:
        self._settings = settings
        self._http = http
        self._manifest = manifest
        self._events = events
        self._sleep = sleep
        self._token = token
        self.mirrors = Mirrors(bases, events.clock)
        self.received_bytes = 0

    def _url(self, download: Download, base: str) -> str:
        return download.file.url or base + download.file.url_path

    async def range(self, download: Download, span: ByteRange, fill: Fill) -> None:
        """Fill *fill* with *span*; what a failed try brought is kept for the next. Tells ``range.landed``.

        Raises:
            RangeIgnored: Every mirror sends whole files only: use :meth:`whole`.
            DownloadError: No mirror could; or SourceError where the hub itself refused.
        """

        async def once(base: str) -> None:
            started_s = self._events.clock()
            before = fill.filled_bytes
            url = self._url(download, base)
            try:
                await self._http.fetch(url, span, fill, size=download.size, check=self._checker(download, base))
            except asyncio.CancelledError:  # given up as too slow, perhaps: it rests, and others are asked first
                self.mirrors.failed(base)
                raise
            except RangeIgnored:
                download.ignores_ranges.add(base)
                if set(self.mirrors.urls) <= download.ignores_ranges | download.hopeless.keys() or download.only:
                    raise
                raise MirrorError(f"{base}: sends whole files only", mirror=base) from None
            finally:
                came = fill.filled_bytes - before
                self.received_bytes += came
                if came:
                    download.contributed.add(base)
            self.mirrors.delivered(base, came, self._events.clock() - started_s)

        began_s = self._events.clock()
        try:
            base, attempts = await self._anywhere(download, span, once, lambda: fill.filled_bytes)
        except DownloadError:
            if download.ignores_ranges - download.hopeless.keys():
                raise RangeIgnored(span.header) from None  # better from there than not at all
            raise
        self._events.emit(
            "range.landed", file=download.paths[0], seconds=self._events.clock() - began_s,
            start=span.start, stop=span.stop, mirror=base, attempts=attempts,
        )  # fmt: skip

    async def whole(self, download: Download, take: Callable[[AsyncIterator[bytes]], Awaitable[None]]) -> None:
        """Hand the file's bytes, from the first on, to *take*; from the start again after each failure.

        Args:
            take: ``async def take(chunks) -> None``; raises MirrorError when there are too few or too many.
        """
        furthest = 0

        async def counted(base: str) -> AsyncGenerator[bytes, None]:
            nonlocal furthest
            position = 0
            url = self._url(download, base)
            async with aclosing(self._http.stream(url, check=self._checker(download, base))) as chunks:
                async for data in chunks:
                    position += len(data)
                    furthest = max(furthest, position)
                    self.received_bytes += len(data)
                    download.contributed.add(base)
                    yield data

        async def once(base: str) -> None:
            started_s = self._events.clock()
            async with aclosing(counted(base)) as chunks:
                await take(chunks)
            self.mirrors.delivered(base, download.size, self._events.clock() - started_s)

        await self._anywhere(download, ByteRange(0, download.size), once, lambda: furthest, ranged=False)

    def suspect(self, download: Download, actual: Digest) -> None:
        """After a wrong digest, choose whom to ask alone.

        Raises:
            IntegrityError: All were asked.
        """
        culprits = ", ".join(sorted(download.contributed))
        if not download.blame(self.mirrors.urls):
            error = mismatch(download.paths[0], download.digest, actual, culprits, final=True)
            download.refuse(error)
            raise error
        self._events.emit(
            "file.refetched", file=download.paths[0], mirror=culprits, expected=str(download.digest), actual=str(actual)
        )
        log.warning(
            "%s from %s does not match its digest and is fetched anew from %s",
            download.paths[0],
            culprits,
            download.only,
        )

    def _checker(self, download: Download, base: str) -> Callable[[object], None]:
        # The origin's digests are the manifest's; only a mirror can be found out before its bytes travel.
        if base == self.mirrors.urls[0]:
            return lambda headers: None
        return lambda headers: check_etag(headers, download.digest, base)  # type: ignore[arg-type]

    async def _anywhere(
        self,
        download: Download,
        span: ByteRange,
        once: Callable[[str], Awaitable[None]],
        position: Callable[[], int],
        *,
        ranged: bool = True,
    ) -> tuple[str, int]:
        """As :meth:`_tried`; where one mirror alone was to be asked and fails, ask the next one alone."""
        while True:
            only = download.only
            try:
                return await self._tried(download, span, once, position, ranged)
            except DownloadError:
                if only is None or (download.only == only and not download.blame(self.mirrors.urls)):
                    raise

    async def _tried(
        self,
        download: Download,
        span: ByteRange,
        once: Callable[[str], Awaitable[None]],
        position: Callable[[], int],
        ranged: bool,
    ) -> tuple[str, int]:
        """Try *once* until it succeeds; return the mirror that did it and the number of attempts."""
        retrying = Retrying(
            self._settings,
            sleep=self._sleep,
            elsewhere=lambda: download.only is None and self.mirrors.rested(retrying.tries.avoid),
        )
        tries = retrying.tries
        everybody = {download.only} if download.only is not None else set(self.mirrors.urls)

        async def attempt() -> str:
            if tries.avoid >= everybody:
                tries.avoid.clear()
            tries.avoid |= download.hopeless.keys() | (download.ignores_ranges if ranged else set())
            base = self.mirrors.pick(avoid=tries.avoid, only=download.only)
            rest_s = self.mirrors.asked_s(base)
            if rest_s > 0:  # another range was told so
                await self._sleep(rest_s)
            started_s, before = self._events.clock(), position()
            self.mirrors.started(base)
            try:
                await once(base)
            except MirrorError as e:
                reason = Attempt(base, self._events.clock() - started_s, _reason(e, base))
                tries.note(reason, progress=position() > before)
                tries.avoid.add(base)
                if e.retryable:
                    asked_s = getattr(e, "retry_after_s", None)
                    longest_s = self._settings.retry_after_max_s
                    self.mirrors.throttled += getattr(e, "status", None) == 429
                    self.mirrors.failed(base, None if asked_s is None else min(asked_s, longest_s))
                else:
                    download.hopeless[base] = e
                    e.retryable = not everybody <= download.hopeless.keys()  # hopeless there, but not everywhere
                raise
            finally:
                self.mirrors.ended(base)
            return base

        def retried(error: MirrorError, wait_s: float) -> None:
            self._events.emit(
                "range.retried", file=download.paths[0], seconds=tries.attempts[-1].seconds,
                start=span.start, stop=span.stop, mirror=error.mirror, reason=error.message, wait_s=wait_s,
            )  # fmt: skip

        try:
            return await retrying.run(attempt, retried=retried), len(tries.attempts) + 1
        except MirrorError as e:
            raise self._final(download, span, e, tries.attempts) from e

    def _final(self, download: Download, span: ByteRange, error: MirrorError, attempts: list[Attempt]) -> Exception:
        path = download.paths[0]
        said = download.hopeless.get(self.mirrors.urls[0])  # what the hub says is what the user can act on
        if isinstance(said, MirrorStatusError):
            refused = refusal(said, self._manifest.source, self._manifest.revision, token=self._token, file=path)
            if refused is not None and (isinstance(refused, AccessError) or len(self.mirrors.urls) == 1):
                return refused
        total_s = sum(a.seconds for a in attempts)
        kind = AllMirrorsFailedError if len(self.mirrors.urls) > 1 else DownloadError
        return kind(
            f"{path} {span}: {len(attempts)} attempts at {len(self.mirrors.urls)} mirror(s) failed in {total_s:.1f} s",
            file=path,
            span=(span.start, span.stop),
            attempts=tuple(attempts[-10:]),
            hint=error.hint or "what has landed is kept: load again to go on from there",
        )


def _reason(error: MirrorError, base: str) -> str:
    return error.message.removeprefix(f"{error.mirror}: ").removeprefix(f"{base}: ")
