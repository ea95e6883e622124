"""How a public call comes by its transfer: it joins one that was begun, or begins one, and ends it with its block.

Nothing but the settings is imported with this module. Where the call needs a child, the rest is imported while that comes up;
what only the caller's side needs, once the child has its orders.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, TypeVar

from .apart import better_apart
from .settings import Settings
from .standby import Standby, standing_by

if TYPE_CHECKING:
    from .asking import Asked
    from .loading import Loading

T = TypeVar("T")


@contextmanager
def prepared(
    source: str | os.PathLike[str], *, imports_follow: bool = False, **arguments: Any
) -> Iterator[tuple[Asked, Standby | None, bool]]:
    """Resolve *arguments*; give what is asked for, a process that will be ready to fetch it, and whether one should.

    Args:
        imports_follow: Upon this call, whatever the program has imported already.
    """
    revision, options = arguments.get("revision"), arguments.get("options")
    named = options or {}
    settings = Settings.resolve(
        arguments.get("settings"), offline=named.get("local_files_only"), cache_dir=named.get("cache_dir")
    )
    apart = imports_follow or better_apart(settings, arguments.get("framework"), options)
    locked = arguments.get("lock") is not None
    with standing_by(source, settings, revision=revision, locked=locked) if apart else nullcontext() as standby:
        from .asking import ask

        yield ask(source, **arguments), standby, apart


@contextmanager
def opened(source: str | os.PathLike[str], **arguments: Any) -> Iterator[Loading]:
    """Join the transfer that ``start`` began for this, or begin one; end it with the block."""
    with prepared(source, **arguments) as (asked, standby, apart):
        from . import running as transfers

        running = transfers.join(asked) or transfers.Running(asked, process=apart, standby=standby)
    try:
        from .loading import Loading  # now that the child has its orders

        with Loading(asked, running.transfer) as loading:
            yield loading
    finally:
        running.cancel()


@asynccontextmanager
async def aopened(source: str | os.PathLike[str], *, settle: bool = False, **arguments: Any) -> AsyncIterator[Loading]:
    """As :func:`opened`, with the engine in the running loop."""
    import asyncio

    asked = await asyncio.to_thread(_asked, source, arguments)
    from . import running as transfers
    from .inloop import in_loop
    from .loading import Loading

    running = await asyncio.to_thread(transfers.join, asked)  # apart: who is cancelled before has joined nothing
    if running is not None:
        try:
            with Loading(asked, running.transfer) as loading:
                yield loading
        finally:
            await asyncio.shield(asyncio.to_thread(running.cancel))
    else:
        async with in_loop(asked, settle=settle) as transfer:
            with Loading(asked, transfer) as loading:
                yield loading


def _asked(source: str | os.PathLike[str], arguments: dict[str, Any]) -> Asked:
    """Return what is asked for. Blocks, on imports for one thing: those of the caller too."""
    from . import inloop as inloop
    from . import loading as loading
    from . import running as running
    from .asking import ask

    return ask(source, **arguments)


async def in_thread(loading: Loading, function: Callable[..., T], *args: Any) -> T:
    """Run *function* as :func:`fastload.inloop.in_thread` does."""
    from .inloop import in_thread as run

    return await run(loading.transfer, function, *args)
