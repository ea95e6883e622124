"""Delivery: sees every file of one transfer through, and keeps the connections busy."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from .digest import Hasher, mismatch
from .download import Download
from .errors import OfflineError
from .events import Events, log
from .fetch import Fetcher
from .http import RangeIgnored
from .journal import BLOCK_BYTES
from .plan import split
from .pools import Pools
from .retry import Sleep
from .ring import Ring, Slot
from .schedule import Schedule, Turns
from .settings import Settings
from .sink import Fill
from .types import ByteRange
from .whole import fill_in_order, land_in_order

#: Files up to this size take one request, are verified in memory and need no journal (guessed: under a second to repeat).
SMALL_BYTES = 1 << 20
#: Guessed: how long a request for a piece of a large file should take, and the least that it should bring. (Measured:
#: 1 MiB pieces cost 20 % more CPU than 8 MiB ones, which matters only where they take milliseconds.)
_PIECE_S, _LEAST_PIECE_BYTES = 1.0, 1 << 20
#: Guessed: three descriptors each; the usual limit of a process is 1024.
_OPEN_DOWNLOADS = 96
#: Guessed: how often to look whether another process has finished with a file.
_FOREIGN_POLL_S = 0.05


class Delivery:
    """One transfer at work. Use once, from one event loop.

    Attributes:
        published: Large files that this transfer put into the cache, to be made safe from power cuts. (A small one
            is hashed again after a power cut: cheaper than to wait for the disk a thousand times.)
    """

    def __init__(
        self,
        settings: Settings,
        emit: Callable[[dict[str, Any]], None],
        events: Events,
        fetcher: Fetcher,
        pools: Pools,
        sleep: Sleep,
        *,
        offline: bool,
    ) -> None:
        self._settings = settings
        self._emit = emit
        self._events = events
        self._fetcher = fetcher
        self._pools = pools
        self._sleep = sleep
        self._offline = offline
        self._range_bytes = max(BLOCK_BYTES, settings.range_bytes // BLOCK_BYTES * BLOCK_BYTES)
        self._small_bytes = min(SMALL_BYTES, self._range_bytes)
        self._schedule = Schedule(settings.shards)
        self._ring = Ring(settings.ring_bytes, self._range_bytes)
        self._at_once = asyncio.Semaphore(_OPEN_DOWNLOADS)
        self._more = asyncio.Event()
        self._left = 0
        self._turns = Turns(())
        self.published: list[tuple[Download, Path]] = []

    async def run(self, downloads: list[Download]) -> None:
        """Deliver all of *downloads*; return when the last one is verified and in the cache."""
        self._left = len(downloads)
        self._turns = Turns(downloads)
        try:
            async with asyncio.TaskGroup() as group:
                for download in downloads:
                    group.create_task(self._see_through(download))
                for _ in range(min(self._settings.connections, self._ring.slots)):
                    group.create_task(self._work(group))
        finally:
            await self._pools.off(_close_all, downloads)
            self._ring.close()

    # -- one file ----------------------------------------------------------------------------------------------------

    async def _see_through(self, download: Download) -> None:
        async with self._at_once:
            places = await self._is_there(download)
            if places is not None:
                final = await self._pools.off(download.link, places)
                await self._pools.off(download.tidy)
            elif download.size <= self._small_bytes:
                final = await self._small(download)
            else:
                final = await self._large(download)
                self.published.append((download, final[download.paths[0]]))
        for path, place in final.items():
            self._events.emit("file.verified", file=path, bytes=download.size)
            self._emit({"kind": "ready", "file": path, "final": str(place)})
        self._left -= 1
        self._more.set()

    async def _is_there(self, download: Download) -> dict[str, Path] | None:
        """Return where the file is once the cache has it, or None once it is ours to fetch.

        Meanwhile another process may be at it: readers are told where its bytes land, and if it dies we go on.
        """
        planned = announced = False
        while True:
            look = await self._pools.off(download.look, self._offline)
            if look.places is not None:
                self._turns.over(download)
            if look.places is not None and await self._sound(download, look.untrusted):
                if not planned:
                    self._plan(download, "cached")
                return look.places
            if not planned:
                self._plan(download, "missing" if look.owned else "elsewhere")
                planned = True
            if not look.owned or download.size <= self._small_bytes:
                self._turns.over(download)
            if look.owned and look.places is None:
                return None
            if self._offline and look.places is None:
                raise OfflineError(f"{download.paths[0]} has vanished from the cache, and the network is off")
            if not announced and look.elsewhere:
                self._announce(download)
                announced = True
            if look.places is None:
                await self._sleep(_FOREIGN_POLL_S)

    async def _sound(self, download: Download, untrusted: tuple[Path, ...]) -> bool:
        """Hash files that somebody else put into the cache, for nobody did before us; remove those that are wrong."""
        for path in untrusted:
            with self._events.span("verify.advanced", file=download.paths[0], bytes=download.size):
                actual = await self._pools.off_hash(download.hash_file, path)
            if actual is None:  # somebody else removed it
                return False
            if actual == download.digest:
                await self._pools.off(download.trust, path)
                continue
            if self._offline:
                raise mismatch(download.paths[0], download.digest, actual, "", final=True)
            log.warning("%s: the file in the cache does not match its digest and is fetched anew", download.paths[0])
            await self._pools.off(download.discard, path)
            return False
        return True

    def _plan(self, download: Download, state: str) -> None:
        for path in download.paths:
            self._events.emit("file.planned", file=path, bytes=download.size, state=state)

    def _announce(self, download: Download) -> None:
        places = {"data": str(download.partial_path), "journal": str(download.journal_path)}
        for path in download.paths:
            self._emit({"kind": "arriving", "file": path, **places})

    async def _small(self, download: Download) -> dict[str, Path]:
        download.done = asyncio.get_running_loop().create_future()
        self._schedule.add_small(download)
        self._more.set()
        return await download.done

    async def _large(self, download: Download) -> dict[str, Path]:
        await self._pools.off(download.open, self._range_bytes)
        if download.resumed_bytes:
            self._events.emit("file.planned", file=download.paths[0], bytes=download.resumed_bytes, state="partial")
        self._announce(download)
        await self._turns.come(download)
        self._schedule.add_large(download)
        self._turns.over(download)
        self._more.set()
        await self._hash_as_it_lands(download)
        while not download.hasher.matches():
            while download.landing:  # late copies of ranges that came twice
                download.landed.clear()
                await download.landed.wait()
            self._start_over(download)
            await self._hash_as_it_lands(download)
        self._schedule.remove(download)
        return await self._pools.off(download.publish)

    async def _hash_as_it_lands(self, download: Download) -> None:
        """Hash the part of the file without holes until the file is whole."""
        while download.hasher.hashed_bytes < download.size:
            download.landed.clear()
            started_s = self._events.clock()
            count = await self._pools.off_hash(download.hash_landed)
            if count:
                seconds = self._events.clock() - started_s
                self._events.emit("verify.advanced", file=download.paths[0], seconds=seconds, bytes=count)
            else:
                await download.landed.wait()

    def _start_over(self, download: Download) -> None:
        """A wrong digest does not say which mirror lied: fetch all of it again, from one alone."""
        actual = download.hasher.actual
        self._suspect(download, actual)
        download.start_over()
        self._more.set()

    def _suspect(self, download: Download, actual: Any) -> None:
        """Choose whom to ask alone after a wrong digest; raise when all were asked."""
        culprits = ", ".join(sorted(download.contributed))
        if not download.blame(self._fetcher.mirrors.urls):
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

    # -- connections -------------------------------------------------------------------------------------------------

    async def _work(self, group: asyncio.TaskGroup) -> None:
        """One connection's worth of work: take a range, fetch it, hand it on, take the next."""
        while self._left:
            slot = await self._ring.acquire()
            job = self._schedule.next(self._piece_bytes())
            if job is None:
                slot.release()
                self._more.clear()
                await self._more.wait()
                continue
            download, span = job
            if download.done is not None:
                await self._fetch_small(download, slot)
            else:
                await self._fetch_range(download, span, slot, group)
        self._more.set()  # the other connections wait for the end too

    def _piece_bytes(self) -> int:
        """How much one request should bring: about a second's worth, so that progress, resumption and the end of the
        transfer are even on slow links, within what costs little per request on fast ones."""
        rate = self._fetcher.mirrors.best_rate_bytes_per_s
        wanted = int((rate or 0.0) * _PIECE_S) // BLOCK_BYTES * BLOCK_BYTES
        return max(min(_LEAST_PIECE_BYTES, self._range_bytes), min(wanted, self._range_bytes))

    async def _fetch_range(self, download: Download, span: ByteRange, slot: Slot, group: asyncio.TaskGroup) -> None:
        fill = Fill(slot.view[: len(span)])
        generation = download.generation
        try:
            await self._fetcher.range(download, span, fill)
        except RangeIgnored:
            slot.release()
            if not download.streaming:
                download.streaming = True
                download.pending.clear()
                await self._stream_whole(download)
        except BaseException:  # also cancelled: what arrived is kept
            await self._land(download, span, fill.filled_bytes, generation, slot)
            raise
        else:
            # The connection takes the next range while this one is written.
            group.create_task(self._land(download, span, fill.filled_bytes, generation, slot))

    async def _land(self, download: Download, span: ByteRange, filled_bytes: int, generation: int, slot: Slot) -> None:
        """Write what arrived into the partial file, then give the slot back."""
        count = filled_bytes if filled_bytes == len(span) else filled_bytes // BLOCK_BYTES * BLOCK_BYTES
        download.landing += 1
        try:
            if count and generation == download.generation:
                started_s = self._events.clock()
                await self._pools.off(download.write, slot.view[:count], span.start)
                self._events.emit(
                    "write.finished", file=download.paths[0], seconds=self._events.clock() - started_s, bytes=count
                )
        finally:
            slot.release()
            download.landing -= 1
            download.landed.set()

    async def _stream_whole(self, download: Download) -> None:
        """No mirror serves ranges: one request brings the whole file, and what landed before is skipped."""
        spans = split([ByteRange(0, download.size)], self._range_bytes)

        async def land(span: ByteRange, filled_bytes: int, slot: Slot) -> None:
            await self._land(download, span, filled_bytes, download.generation, slot)
            if filled_bytes == len(span):
                mirror = min(download.contributed, default="")
                self._events.emit(
                    "range.landed", file=download.paths[0], start=span.start, stop=span.stop, mirror=mirror, attempts=1
                )

        async def take(chunks: AsyncIterator[bytes]) -> None:
            await land_in_order(chunks, spans, self._ring, download.has, land)

        await self._fetcher.whole(download, take)

    async def _fetch_small(self, download: Download, slot: Slot) -> None:
        """Fetch, verify and publish a file that fits into one slot."""
        span = ByteRange(0, download.size)
        try:
            while True:
                fill = Fill(slot.view[: download.size])
                await self._fetch_small_bytes(download, span, fill)
                hasher = Hasher(download.digest, download.size)
                with self._events.span("verify.advanced", file=download.paths[0], bytes=download.size):
                    await self._pools.off_hash(hasher.update, fill.view)
                if hasher.matches():
                    break
                self._suspect(download, hasher.actual)
            final = await self._pools.off(download.publish_bytes, fill.view)
        finally:
            slot.release()
        if download.done is not None and not download.done.done():
            download.done.set_result(final)

    async def _fetch_small_bytes(self, download: Download, span: ByteRange, fill: Fill) -> None:
        if not download.size:
            return
        try:
            await self._fetcher.range(download, span, fill)
        except RangeIgnored:  # compressed or chunked, as hubs send small files

            async def take(chunks: AsyncIterator[bytes]) -> None:
                await fill_in_order(chunks, fill)

            await self._fetcher.whole(download, take)


def _close_all(downloads: list[Download]) -> None:
    for download in downloads:
        download.close()
