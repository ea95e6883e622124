"""Two pools of threads that live as long as one transfer: blocking work never runs in the event loop."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


class Pools:
    """Disk in one pool, hashing in the other, so that neither waits for the other. Use inside ``async with``."""

    def __init__(self) -> None:
        # Measured: more than two writers of one file only wait for its lock; two more for the small files beside them.
        self._disk = ThreadPoolExecutor(4, thread_name_prefix="fastload-disk")
        self._hashing = ThreadPoolExecutor(max(2, os.cpu_count() or 2), thread_name_prefix="fastload-hash")

    async def __aenter__(self) -> Pools:
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.shield(asyncio.to_thread(self._end))

    def _end(self) -> None:
        self._hashing.shutdown()
        self._disk.shutdown()

    async def off(self, function: Callable[..., T], *args: object) -> T:
        """Run *function*, which waits for the disk, in a thread."""
        return await asyncio.get_running_loop().run_in_executor(self._disk, function, *args)

    async def off_hash(self, function: Callable[..., T], *args: object) -> T:
        """Run *function*, which takes a core for a while and releases the GIL, in a thread."""
        return await asyncio.get_running_loop().run_in_executor(self._hashing, function, *args)
