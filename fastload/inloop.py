"""The engine in the caller's event loop, for the asyncio twins."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from .asking import Asked
from .engine import Engine
from .errors import FastloadError
from .events import Events
from .running import unexpected
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
            await Engine(asked.settings, transfer.apply, asked.pm).run(asked.request, settle=settle)
        except FastloadError:
            pass  # told as a message
        except Exception as e:  # a defect of ours must end the readers' waits too
            transfer.fail(unexpected(e))
            raise

    error: BaseException | None = None
    try:
        async with asyncio.TaskGroup() as group:
            task = group.create_task(run())
            try:
                yield transfer
            finally:
                if not (settle and transfer.finished):
                    task.cancel()
    except BaseExceptionGroup as e:
        error = e.exceptions[0]
    finally:
        transfer.close()
    if error is not None:  # outside the except, so that the group does not become its context
        raise error


async def in_thread(transfer: Transfer, function: Callable[..., T], *args: Any) -> T:
    """Run *function*, which waits for *transfer*, in a thread; being cancelled ends the transfer and with it the thread."""
    context = contextvars.copy_context()
    future = asyncio.get_running_loop().run_in_executor(None, lambda: context.run(function, *args))
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        transfer.fail(FastloadError("the load was cancelled"))
        await asyncio.wait({future})
        if not future.cancelled():
            future.exception()  # what it raised has nobody to go to
        raise
