"""What next: what a reader waits for, then small files, then weights in order, a few files at a time."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable

from .download import Download
from .journal import BLOCK_BYTES
from .plan import cut
from .retry import Sleep
from .types import ByteRange

#: Guessed: longer than a framework imports a model's code between its configuration and its weights.
_IDLE_S = 30.0
#: Measured (225 MB at 15 MB/s a connection, medians of 7): with twice the connections that there are at first, the last
#: file is verified 4 ms after the last byte; with once as many, 32 ms, because all of them may end with a large piece at
#: the same moment; with 32 pieces, 4 ms, and more round trips.
_LAST_PIECES = 16
#: Measured: takes 0.7 ms to hash, and as a request 20 % more CPU time than 8 MiB.
_LEAST_LAST_BYTES = 1 << 20
#: Guessed: longer than a file's table of contents. Frameworks read those of all files before the first tensor.
_HEAD_BYTES = 1 << 20


class Turns:
    """Keeps the order of the plan while files are looked at and opened in threads, each in its own time.

    Without it a file that is opened a moment sooner would take all connections before the first one in order gets any.
    Use from one event loop.

    Args:
        small_bytes: Files up to this size travel in one piece.
    """

    def __init__(self, files: Iterable[Download], small_bytes: int) -> None:
        self._order = {download: index for index, download in enumerate(files)}
        self._large = {download for download in self._order if download.size > small_bytes}
        self._open = set(self._order.values())
        self._first = 0
        self._moved = asyncio.Event()

    def over(self, download: Download) -> None:
        """*download* is in the schedule, or will not be soon: those after it need not wait for it. Harmless twice."""
        self._open.discard(self._order.get(download, -1))
        self._large.discard(download)
        while self._first < len(self._order) and self._first not in self._open:
            self._first += 1
        self._moved.set()
        self._moved = asyncio.Event()

    @property
    def large_ones_come(self) -> bool:
        """Some large file is not in the schedule yet, but may soon be."""
        return bool(self._large)

    async def come(self, download: Download) -> None:
        """Wait until the turns of all files before *download* are over; one that the plan does not know has none."""
        while self._first < self._order.get(download, 0):
            await self._moved.wait()


class Wishes:
    """Which files of a transfer on demand are wanted. Use from one event loop."""

    def __init__(self) -> None:
        self._wanted: set[str] = set()
        self._asked: dict[str, asyncio.Event] = {}
        self._under_way = 0
        self._over = False

    def want(self, paths: Iterable[str]) -> None:
        """Somebody wants *paths*."""
        for path in paths:
            self._wanted.add(path)
            if path in self._asked:
                self._asked[path].set()

    def end(self) -> None:
        """Nobody will want anything more."""
        self._over = True
        for event in self._asked.values():
            event.set()

    async def end_when_idle(self, sleep: Sleep) -> None:
        """End once nothing is under way and nothing new was wanted for a while."""
        seen = -1
        while self._under_way or seen != len(self._wanted):
            seen = len(self._wanted)
            await sleep(_IDLE_S)
        self.end()

    async def come(self, download: Download) -> bool:
        """Wait until a path of *download* is wanted; False: none will be."""
        event = asyncio.Event()
        self._asked.update(dict.fromkeys(download.paths, event))
        if not self._over and self._wanted.isdisjoint(download.paths):
            await event.wait()
        coming = not self._wanted.isdisjoint(download.paths)
        self._under_way += coming
        return coming

    def fulfilled(self) -> None:
        """A file that :meth:`come` returned True for has been delivered."""
        self._under_way -= 1


class Schedule:
    """The ranges that nobody fetches yet. Use from one event loop.

    Ranges of one file go out in file order, so that its hash, which must be in order, stays close behind; *shards* files
    are open to new ranges at once, because hashing runs in parallel only across files (measured: verified 1 to 18 ms
    after the last byte, against 400 ms for ranges striped over the whole file).

    The file that a reader waits for goes before all others. Frameworks take one file after the other, in an order of their
    own: of what came before it was due, they would have the building left to do when the last byte is there (measured, a
    pipeline of diffusers: 60 ms).

    Attributes:
        one_at_a_time: All connections are for that file alone: one core keeps up with hashing what comes.
    """

    def __init__(self, shards: int) -> None:
        self._shards = shards
        self._small: deque[Download] = deque()
        self._large: list[Download] = []
        self._turn = 0
        self._awaited: Download | None = None
        self.one_at_a_time = False

    def add_small(self, download: Download) -> None:
        """One request for the whole of *download*."""
        self._small.append(download)

    def add_large(self, download: Download) -> None:
        """Ranges of *download*, in the order in which downloads are added."""
        self._large.append(download)

    def remove(self, download: Download) -> None:
        """*download* is complete."""
        self._large.remove(download)

    def give_back(self, download: Download, rest: ByteRange) -> None:
        """Nobody fetches *rest* after all: it is the oldest of its file, and late."""
        download.pending.appendleft(rest)
        download.urgent += 1

    @property
    def has_more(self) -> bool:
        """There is work for another connection."""
        return bool(self._small) or any(download.pending for download in self._large)

    def next(
        self, piece_bytes: int, *, large_first: bool = False, large_ones_come: bool = False
    ) -> tuple[Download, ByteRange] | None:
        """Take the next range, or ``None`` if there is none at the moment.

        Args:
            piece_bytes: About how much of a large file one request should bring, in whole blocks.
            large_first: A small file only if no large one is there, nor *large_ones_come*.
        """
        piece_bytes = self._evened(piece_bytes)
        wanted = self._demanded(piece_bytes)
        if wanted is not None or not large_first:
            return wanted or self._next_small() or self._in_order(piece_bytes)
        return self._in_order(piece_bytes) or (None if large_ones_come else self._next_small())

    def _evened(self, piece_bytes: int) -> int:
        """Return less than *piece_bytes* where little is left.

        So all connections end at about the same time, and little is left to be written and hashed after the last byte:
        ranges that come out of order keep the hash, which must be in order, waiting.
        """
        left = 0
        for download in self._large:
            for span in download.pending:
                left += len(span)
                if left >= _LAST_PIECES * piece_bytes:
                    return piece_bytes
        evened = left // _LAST_PIECES // BLOCK_BYTES * BLOCK_BYTES
        return min(piece_bytes, max(evened, _LEAST_LAST_BYTES))

    def _demanded(self, piece_bytes: int) -> tuple[Download, ByteRange] | None:
        for download in tuple(self._large):
            offsets = download.journal.take_demands() if download.journal is not None else []
            if offsets:
                _move_up(download, offsets, piece_bytes)
            if offsets and max(offsets) >= _HEAD_BYTES:
                self._large.remove(download)
                self._large.insert(0, download)
                self._awaited = download
        for download in self._large:
            if download.urgent and download.pending:
                download.urgent -= 1
                return download, _take(download, piece_bytes)
            download.urgent = 0
        return None

    def _next_small(self) -> tuple[Download, ByteRange] | None:
        if not self._small:
            return None
        download = self._small.popleft()
        return download, ByteRange(0, download.size)

    def _in_order(self, piece_bytes: int) -> tuple[Download, ByteRange] | None:
        window = [d for d in self._large if d.pending][: self._shards]
        if not window:
            return None
        if window[0] is self._awaited and self.one_at_a_time:
            window = window[:1]
        self._turn += 1
        download = window[self._turn % len(window)]
        return download, _take(download, piece_bytes)


def _move_up(download: Download, offsets: Iterable[int], piece_bytes: int) -> None:
    """Put what readers wait for at *offsets* first, the oldest wish before the others.

    After the first comes what follows it in the file: who waits for a tensor of many ranges wants those next.
    """
    pending = list(download.pending)
    first: list[ByteRange] = []
    for offset in offsets:
        index = next((i for i, s in enumerate(pending) if s.start <= offset < s.stop), None)
        if index is None:  # in flight already, or landed
            continue
        before, after = cut(pending[index], offset // BLOCK_BYTES * BLOCK_BYTES - pending[index].start)
        wanted, after = cut(after, min(piece_bytes, _HEAD_BYTES) if offset < BLOCK_BYTES else piece_bytes)
        rest_before, rest_after = [s for s in (before,) if s], [s for s in (after,) if s]
        if first:
            pending[index : index + 1] = rest_before + rest_after
        else:
            pending = rest_after + pending[index + 1 :] + pending[:index] + rest_before
        first.append(wanted)
    download.pending = deque(first + pending)
    download.urgent = len(first)


def _take(download: Download, piece_bytes: int) -> ByteRange:
    """Take a piece off the first pending range; a rest of less than half a piece comes along."""
    span = download.pending.popleft()
    if len(span) <= piece_bytes + piece_bytes // 2:
        return span
    piece, rest = cut(span, piece_bytes)
    download.pending.appendleft(rest)
    return piece
