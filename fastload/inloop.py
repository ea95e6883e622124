"""The engine in the caller's event loop, for the asyncio twins."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from .asking import Asked
from .athand import deliver
from .errors import FastloadError
from .events import Events
from .pools import outlast
from .sync import engine_class, unexpected
from .transfer import Transfer

T = TypeVar("T")


@asynccontextmanager
async def in_loop(asked: Asked, *, settle: bool = False) -> AsyncIterator[Transfer]:
    """Run one transfer as a task of the running loop while the block runs.

    Leaving the block ends the transfer, or, with *settle*, waits until its files are safe from a power cut.
    """
    transfer = Transfer(Events())

    async def run() -> None:
        try:
            if await asyncio.to_thread(deliver, asked.request, asked.settings, asked.pm, transfer.apply) is not None:
                return
            engine = await asyncio.to_thread(engine_class)
            await engine(asked.settings, transfer.apply, asked.pm).run(asked.request, settle=settle)
        except FastloadError:
            pass  # told as a message
        except Exception as e:  # a defect of ours must end the readers' waits too
            transfer.fail(unexpected(e))

    error: BaseException | None = None
    try:
        async with asyncio.TaskGroup() as group:
            task = group.create_task(run())
            try:
                yield transfer
            finally:
                if not (settle and transfer.finished):
                    transfer.fail(FastloadError("the transfer was stopped"))  # readers in threads end now
                    task.cancel()
            await asyncio.wait({task})
            if settle:
                transfer.check()
    except BaseExceptionGroup as e:
        error = e.exceptions[0]
    finally:
        transfer.close()
    if error is not None:  # outside the except, so that the group does not become its context
        raise error


async def in_thread(transfer: Transfer, function: Callable[..., T], *args: Any) -> T:
    """Run *function*, which waits for *transfer*, in a thread; being cancelled ends the transfer and with it the thread."""
    context = contextvars.copy_context()
    # Not in the loop's own pool: a few loads at once would fill it with threads that wait for bytes, while what brings
    # the bytes needs a thread of that pool too.
    pool = ThreadPoolExecutor(1, thread_name_prefix="fastload-build")
    work = pool.submit(context.run, function, *args)
    try:
        return await asyncio.wrap_future(work)
    except asyncio.CancelledError:
        transfer.fail(FastloadError("the load was cancelled"))
        await outlast(work)
        raise
    finally:
        pool.shutdown(wait=False)
