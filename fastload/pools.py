"""Two pools of threads that live as long as one transfer: blocking work never runs in the event loop."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
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
        ended: Future[None] = Future()
        # Not in the loop's own pool: the program may have filled that with threads that wait for us.
        threading.Thread(target=self._end, args=(ended,), name="fastload-end").start()
        await outlast(ended)

    def _end(self, ended: Future[None]) -> None:
        self._hashing.shutdown()
        self._disk.shutdown()
        ended.set_result(None)

    async def off(self, function: Callable[..., T], *args: object) -> T:
        """Run *function*, which waits for the disk, in a thread; being cancelled waits for its end."""
        return await _run(self._disk, function, *args)

    async def surely(self, function: Callable[..., T], *args: object) -> T:
        """As :meth:`off`, for what must run: being cancelled does not keep it from beginning either."""
        work = self._disk.submit(function, *args)
        await outlast(work)
        return work.result()

    async def unbroken(self, writing: Callable[[Executor], Awaitable[None]]) -> None:
        """Await *writing*, which gets the disk's threads, to its end, however often this task is cancelled meanwhile.

        For aiofiles: cancelled while a thread opens a file, it would lose that file.
        """
        task = asyncio.ensure_future(writing(self._disk))
        cancelled = False
        while not task.done():
            try:
                await asyncio.shield(task)
            except asyncio.CancelledError:
                cancelled = True
        task.result()
        if cancelled:
            raise asyncio.CancelledError

    async def off_hash(self, function: Callable[..., T], *args: object) -> T:
        """Run *function*, which takes a core for a while and releases the GIL, in a thread."""
        return await _run(self._hashing, function, *args)


async def _run(pool: ThreadPoolExecutor, function: Callable[..., T], *args: object) -> T:
    """Run *function*; being cancelled waits for its end, so that nothing that it uses is taken away under it."""
    work = pool.submit(function, *args)
    try:
        return await asyncio.wrap_future(work)
    except asyncio.CancelledError:
        await outlast(work)
        raise


async def outlast(work: Future[T]) -> None:
    """Wait until *work* has ended, however often this task is cancelled meanwhile."""
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    work.add_done_callback(lambda _: loop.call_soon_threadsafe(ended.set))
    cancelled = False
    while not ended.is_set():
        try:
            await ended.wait()
        except asyncio.CancelledError:
            cancelled = True
    if cancelled:
        raise asyncio.CancelledError
