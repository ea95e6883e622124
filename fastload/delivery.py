"""Delivery: sees every file of one transfer through, from the first look into the cache to its final name."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from .digest import mismatch
from .download import Download
from .errors import OfflineError
from .events import Events, log
from .fetch import Fetcher
from .journal import BLOCK_BYTES
from .landing import Landing
from .plan import SMALL_BYTES
from .pools import Pools
from .retry import Sleep
from .schedule import Turns, Wishes
from .settings import Settings

#: Guessed: three descriptors each; the usual limit of a process is 1024.
_OPEN_DOWNLOADS = 96
#: Guessed, as above. They stay open so that no reader is the last to close their journals.
_PUBLISHED_OPEN = 96
#: Guessed: how often to look whether another process has finished with a file.
_FOREIGN_POLL_S = 0.05


class Delivery:
    """One transfer at work. Use once, from one event loop.

    Attributes:
        published: Large files that this transfer put into the cache, to be made safe from power cuts, and closed. (A
            small one is hashed each time: cheaper than to wait for the disk a thousand times.)
        found: Large files that the cache had already.
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
        wishes: Wishes | None = None,
    ) -> None:
        self._wishes = wishes
        self._settings = settings
        self._emit = emit
        self._events = events
        self._fetcher = fetcher
        self._pools = pools
        self._sleep = sleep
        self._offline = offline
        self._range_bytes = max(BLOCK_BYTES, settings.range_bytes // BLOCK_BYTES * BLOCK_BYTES)
        self._small_bytes = min(SMALL_BYTES, self._range_bytes)
        self._landing = Landing(settings, events, fetcher, pools, self._range_bytes)
        self._at_once = asyncio.Semaphore(_OPEN_DOWNLOADS)
        self._left = 0
        self._turns = Turns((), self._small_bytes)
        self.published: list[tuple[Download, Path]] = []
        self.found: list[Path] = []

    async def run(self, downloads: list[Download], beside: Callable[[], Awaitable[None]] | None = None) -> None:
        """Deliver all of *downloads*; return when the last one is verified and in the cache.

        With wishes: those that are wanted, until none has been for a while.

        Args:
            beside: Awaited too, but not before weights have been asked for, if any will be.
        """
        self._left = len(downloads)
        self._turns = Turns(downloads if self._wishes is None else (), self._small_bytes)
        try:
            async with asyncio.TaskGroup() as group:
                for download in downloads:
                    group.create_task(self._see_through(download))
                if downloads:
                    self._landing.start(group, lambda: self._turns.large_ones_come)
                else:
                    self._landing.end()
                if beside is not None:
                    group.create_task(self._once_begun(beside))
                if self._wishes is not None:
                    group.create_task(self._wishes.end_when_idle(self._sleep))
        except BaseException:
            await self._pools.surely(close_all, downloads)
            raise
        finally:
            self._landing.close()

    async def _once_begun(self, beside: Callable[[], Awaitable[None]]) -> None:
        await self._landing.begun.wait()
        await beside()

    # -- one file ----------------------------------------------------------------------------------------------------

    async def _see_through(self, download: Download) -> None:
        if self._wishes is not None and not await self._wishes.come(download):
            self._one_less()
            return
        async with self._at_once:
            places = await self._is_there(download)
            if places is not None:
                final = await self._pools.off(download.link, places)
                await self._pools.off(download.tidy)
                if download.size > self._small_bytes:
                    self.found.append(final[download.paths[0]])
            elif download.size <= self._small_bytes:
                final = await self._small(download)
            else:
                final = await self._large(download)
                self.published.append((download, final[download.paths[0]]))
                if len(self.published) > _PUBLISHED_OPEN:
                    await self._pools.off(self.published[-_PUBLISHED_OPEN - 1][0].close)
        for path, place in final.items():
            self._events.emit("file.verified", file=path, bytes=download.size)
            self._emit({"kind": "ready", "file": path, "final": str(place)})
        if self._wishes is not None:
            self._wishes.fulfilled()
        self._one_less()

    def _one_less(self) -> None:
        self._left -= 1
        if not self._left:
            self._landing.end()

    async def _is_there(self, download: Download) -> dict[str, Path] | None:
        """Return where the file is once the cache has it, or None once it is ours to fetch.

        Meanwhile another process may be at it: readers are told where its bytes land, and if it dies we go on.
        """
        planned = announced = False
        while True:
            look = await self._pools.off(download.look, self._offline, self._small_bytes)
            if look.places is not None:
                self._turns.over(download)
                self._landing.more()
            if look.places is not None and await self._sound(download, look.untrusted):
                if not planned:
                    self._plan(download, "cached")
                return look.places
            if not planned:
                self._plan(download, "missing" if look.owned else "elsewhere")
                planned = True
            if not look.owned or download.size <= self._small_bytes:
                self._turns.over(download)
                self._landing.more()
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
        self._landing.schedule.add_small(download)
        self._landing.more()
        return await download.done

    async def _large(self, download: Download) -> dict[str, Path]:
        await self._pools.off(download.open, self._range_bytes)
        if download.resumed_bytes:
            self._events.emit("file.planned", file=download.paths[0], bytes=download.resumed_bytes, state="partial")
        self._announce(download)
        await self._turns.come(download)
        self._landing.schedule.add_large(download)
        self._turns.over(download)
        self._landing.more()
        await self._hash_as_it_lands(download)
        while not download.hasher.matches():
            while download.landing:  # late copies of ranges that came twice
                download.landed.clear()
                await download.landed.wait()
            self._start_over(download)
            await self._hash_as_it_lands(download)
        self._landing.schedule.remove(download)
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
        self._fetcher.suspect(download, download.hasher.actual)
        download.start_over()
        self._landing.more()


def close_all(downloads: list[Download]) -> None:
    """Close *downloads*. Blocks."""
    for download in downloads:
        download.close()
