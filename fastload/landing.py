"""Connections at work: each takes a range, fetches it into a ring slot, and leaves it to be written while it takes the next."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

from .concurrency import Concurrency
from .digest import Hasher
from .download import Download
from .events import Events
from .fetch import Fetcher
from .flights import Flights
from .http import RangeIgnored
from .journal import BLOCK_BYTES
from .plan import split
from .pools import Pools
from .ring import Ring, Slot
from .schedule import Schedule
from .settings import Settings
from .sink import Fill
from .types import ByteRange
from .whole import fill_in_order, land_in_order

#: Guessed: how long a request for a piece of a large file should take, and the least that it should bring. (Measured:
#: 1 MiB pieces cost 20 % more CPU than 8 MiB ones, which matters only where they take milliseconds.)
_PIECE_S, _LEAST_PIECE_BYTES = 1.0, 1 << 20
#: Guessed: how often to look for slow connections and for too few of them.
_LOOK_S = 0.25
#: Guessed: a third of what one core hashes, beside whatever else it does.
_HASHED_BYTES_PER_S = 500_000_000
#: Measured: sha256 of so much takes less than handing it to a thread (0.1 ms).
_HASH_HERE_BYTES = 64 << 10


class Landing:
    """Fetches what the schedule names. Use once, from one event loop.

    Attributes:
        schedule: What is to be fetched; call :meth:`more` after adding to it.
        begun: Set once a large file has been asked for, or it is clear that none will be.
    """

    def __init__(self, settings: Settings, events: Events, fetcher: Fetcher, pools: Pools, range_bytes: int) -> None:
        self._events = events
        self._fetcher = fetcher
        self._pools = pools
        self._range_bytes = range_bytes
        self.schedule = Schedule(settings.shards)
        self._ring = Ring(settings.ring_bytes, range_bytes)
        most = min(settings.connections, self._ring.slots)
        self._concurrency = Concurrency(most, events.clock)
        self._most = most
        self._flights = Flights(events.clock)
        self._looked = events.clock(), 0
        self._more = asyncio.Event()
        self._over = asyncio.Event()
        self._large_ones_come: Callable[[], bool] = lambda: False
        self.begun = asyncio.Event()

    def start(self, group: asyncio.TaskGroup, large_ones_come: Callable[[], bool]) -> None:
        """Begin; all tasks live in *group*.

        Args:
            large_ones_come: Tells whether large files may soon be in the schedule; call :meth:`more` when that changes.
        """
        self._large_ones_come = large_ones_come
        for index in range(self._most):
            group.create_task(self._work(index, group))
        group.create_task(self._oversee())

    def more(self) -> None:
        """There is more in the schedule."""
        self._more.set()

    def end(self) -> None:
        """Nothing will come any more."""
        self._over.set()
        self._more.set()
        self.begun.set()

    def close(self) -> None:
        """Give the memory back; all tasks must have ended."""
        self._ring.close()

    # -- how many, how long ------------------------------------------------------------------------------------------

    async def _oversee(self) -> None:
        """Now and then, see whether more connections pay, and whether one crawls."""
        while not self._over.is_set():
            try:
                async with asyncio.timeout(_LOOK_S):
                    await self._over.wait()
            except TimeoutError:
                self._look()

    def _look(self) -> None:
        self._flights.give_up_the_slow()
        now_s, received_bytes = self._events.clock(), self._flights.received_bytes
        looked_s, before_bytes = self._looked
        self.schedule.one_at_a_time = received_bytes - before_bytes < _HASHED_BYTES_PER_S * (now_s - looked_s)
        self._looked = now_s, received_bytes
        limit = self._concurrency.limit
        throttled = self._fetcher.mirrors.throttled
        self._concurrency.look(received_bytes, busy=self.schedule.has_more, throttled=throttled)
        if self._concurrency.limit != limit:  # those that may take more now, and the one that has to take everything
            self._more.set()

    def _piece_bytes(self) -> int:
        """How much one request should bring: about a second's worth, so that progress, resumption and the end of the
        transfer are even on slow links, within what costs little per request on fast ones."""
        rate = self._fetcher.mirrors.best_rate_bytes_per_s
        wanted = int((rate or 0.0) * _PIECE_S) // BLOCK_BYTES * BLOCK_BYTES
        return max(min(_LEAST_PIECE_BYTES, self._range_bytes), min(wanted, self._range_bytes))

    async def _work(self, index: int, group: asyncio.TaskGroup) -> None:
        """One connection's worth of work: take a range, fetch it, hand it on, take the next."""
        while not self._over.is_set():
            slot = await self._ring.acquire() if index < self._concurrency.limit else None
            job = self._next(index) if slot is not None else None
            if slot is not None and job is not None:
                download, span = job
                if download.done is None:
                    await self._fetch_range(download, span, slot, group)
                else:
                    await self._fetch_small(download, slot, group)
                continue
            if slot is not None:
                slot.release()
            if not self._over.is_set():
                self._more.clear()
                await self._more.wait()

    def _next(self, index: int) -> tuple[Download, ByteRange] | None:
        """Take work for connection *index*: the first one's first is weights, if the others can bring the small files.

        Else the first byte of weights would wait for a round trip or more, as small files are found first.
        """
        come = self._large_ones_come()
        first = index == 0 and self._concurrency.limit > 1 and not self.begun.is_set()
        job = self.schedule.next(self._piece_bytes(), large_first=first, large_ones_come=come)
        if not come or (job is not None and job[0].done is None):
            self.begun.set()
        return job

    async def _receive(self, download: Download, span: ByteRange, fill: Fill) -> bool:
        """Fetch *span* into *fill*; False: the connection was too slow and is gone, what it brought is in *fill*."""
        loop = asyncio.get_running_loop()
        patience = asyncio.timeout(None)
        flight = self._flights.begin(
            len(span), lambda: fill.filled_bytes, lambda: patience.reschedule(loop.time())
        )  # fmt: skip
        try:
            async with patience:
                await self._fetcher.range(download, span, fill)
        except TimeoutError:  # ours: those of connections are translated long before
            if fill.filled_bytes == len(span):  # the last byte came meanwhile
                return True
            self._events.emit(
                "range.retried", file=download.paths[0], seconds=self._events.clock() - flight.started_s,
                start=span.start, stop=span.stop, mirror="", reason="much slower than the others", wait_s=0.0,
            )  # fmt: skip
            return False
        finally:
            self._flights.end(flight)
        return True

    # -- ranges of large files ---------------------------------------------------------------------------------------

    async def _fetch_range(self, download: Download, span: ByteRange, slot: Slot, group: asyncio.TaskGroup) -> None:
        fill = Fill(slot.view[: len(span)])
        generation, began_s = download.generation, self._events.clock()
        try:
            whole = await self._receive(download, span, fill)
        except RangeIgnored:
            slot.release()
            if not download.streaming:
                download.streaming = True
                download.pending.clear()
                await self._stream_whole(download)
            return
        except BaseException:  # also cancelled: what arrived is kept
            await self._land(download, span, fill.filled_bytes, generation, slot)
            raise
        if not whole and generation == download.generation and not download.streaming:
            middle = span.start + _in_blocks(fill.filled_bytes)
            self._events.emit(
                "range.landed", file=download.paths[0], seconds=self._events.clock() - began_s,
                start=span.start, stop=middle, mirror="", attempts=1,
            )  # fmt: skip
            self.schedule.give_back(download, ByteRange(middle, span.stop))
            self._more.set()
        # The connection takes the next range while this one is written.
        group.create_task(self._land(download, span, fill.filled_bytes, generation, slot))

    async def _land(self, download: Download, span: ByteRange, filled_bytes: int, generation: int, slot: Slot) -> None:
        """Write what arrived into the partial file, then give the slot back."""
        count = filled_bytes if filled_bytes == len(span) else _in_blocks(filled_bytes)
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

    # -- small files -------------------------------------------------------------------------------------------------

    async def _fetch_small(self, download: Download, slot: Slot, group: asyncio.TaskGroup) -> None:
        """Fetch and verify a file that fits into one slot; the connection does not wait until the cache has it."""
        fill = Fill(slot.view[: download.size])
        try:
            while True:
                fill.filled_bytes = 0
                await self._fetch_small_bytes(download, fill)
                hasher = Hasher(download.digest, download.size)
                with self._events.span("verify.advanced", file=download.paths[0], bytes=download.size):
                    if download.size <= _HASH_HERE_BYTES:
                        hasher.update(fill.view)
                    else:
                        await self._pools.off_hash(hasher.update, fill.view)
                if hasher.matches():
                    break
                self._fetcher.suspect(download, hasher.actual)
        except BaseException:
            slot.release()
            raise
        group.create_task(self._publish_small(download, fill, slot))

    async def _publish_small(self, download: Download, fill: Fill, slot: Slot) -> None:
        try:
            final = await self._pools.off(download.publish_bytes, fill.view)
        finally:
            slot.release()
        if download.done is not None and not download.done.done():
            download.done.set_result(final)

    async def _fetch_small_bytes(self, download: Download, fill: Fill) -> None:
        if not download.size:
            return
        try:
            while not await self._receive(download, ByteRange(0, download.size), fill):
                pass
        except RangeIgnored:  # compressed or chunked, as hubs send small files

            async def take(chunks: AsyncIterator[bytes]) -> None:
                await fill_in_order(chunks, fill)

            await self._fetcher.whole(download, take)


def _in_blocks(count: int) -> int:
    """Return how much of *count* bytes the journal can speak of: it knows whole blocks only."""
    return count // BLOCK_BYTES * BLOCK_BYTES
