"""Ring slots: the reused buffers that bytes pass through, the only throttle and the only extra memory of a transfer."""

from __future__ import annotations

import asyncio
import mmap
from collections import deque

from .events import log


class Ring:
    """A fixed number of equal slots in one anonymous mapping. Use from one event loop.

    The pages of a slot are touched when it is first used and stay with the ring until :meth:`close`, because fresh memory
    costs more than a copy (measured: 0.2 to 3 CPU-seconds a GB, against 0.1 for the copy). The last slots that were given
    back are used first, so that a transfer that needs few stays in few (and in the processor's cache).
    """

    def __init__(self, ring_bytes: int, slot_bytes: int) -> None:
        self.slot_bytes = slot_bytes
        self.slots = max(1, ring_bytes // slot_bytes)
        # Private, not the default shared: only private anonymous memory gets huge pages (a quarter of the faults' cost).
        self._map = mmap.mmap(-1, self.slots * slot_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            try:
                self._map.madvise(mmap.MADV_HUGEPAGE)
            except OSError:  # a kernel without huge pages: ordinary ones do
                pass
        self._view = memoryview(self._map)
        self._free = list(range(self.slots))
        self._waiters: deque[asyncio.Future[None]] = deque()

    async def acquire(self) -> Slot:
        """Return a free slot; waits until there is one."""
        while not self._free:
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiters.append(waiter)
            try:
                await waiter
            except asyncio.CancelledError:
                if waiter.done() and not waiter.cancelled():
                    self._wake()  # the slot was meant for us: pass it on
                raise
        index = self._free.pop()
        at = index * self.slot_bytes
        return Slot(self, index, self._view[at : at + self.slot_bytes])

    def _wake(self) -> None:
        while self._waiters:
            waiter = self._waiters.popleft()
            if not waiter.done():
                waiter.set_result(None)
                return

    def give_back(self, slot: Slot) -> None:
        """Take *slot* back; its memory may be written by others from now on."""
        slot.view.release()
        self._free.append(slot.index)
        self._wake()

    @property
    def in_use(self) -> int:
        """Slots that are out."""
        return self.slots - len(self._free)

    def close(self) -> None:
        """Unmap; memory that a cancelled read may still look at goes when that ends. All slots must be back."""
        self._view.release()
        try:
            self._map.close()
        except BufferError:  # a view of it lives on in a traceback: the mapping ends with that
            log.debug("the ring is still looked at")


class Slot:
    """One buffer of the ring; ``view`` is writable memory of ``slot_bytes`` bytes, valid until it is given back."""

    __slots__ = ("_ring", "index", "view")

    def __init__(self, ring: Ring, index: int, view: memoryview) -> None:
        self._ring = ring
        self.index = index
        self.view = view

    def release(self) -> None:
        """Give the slot back to its ring."""
        self._ring.give_back(self)
