"""Log lines of a load, under the logger ``fastload``: one when it ends, one for each range that had to be repeated."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..events import Event, log
from ..hookspecs import hookimpl

if TYPE_CHECKING:
    from ..events import Observer
    from ..settings import Settings


@hookimpl
def fastload_observer(source: str, settings: Settings) -> Observer:
    """Log at INFO how a load of *source* ended, and what it had to repeat; the program decides who sees it."""
    travelled_bytes = 0

    def observe(event: Event) -> None:
        nonlocal travelled_bytes
        if event.name == "transfer.finished":
            travelled_bytes = event.data["bytes"]
        elif event.name == "range.retried":
            log.info("%s: again in %.1f s: %s", event.file, event.data["wait_s"], event.data["reason"])
        elif event.name == "load.finished":
            log.info("%s: ready in %.2f s, %.1f MB travelled", source, event.seconds, travelled_bytes / 1e6)
        elif event.name == "load.failed":
            log.info("%s: failed after %.2f s: %s", source, event.seconds, event.data["error"])

    return observe
