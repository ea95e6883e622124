"""Log lines of a load, under the logger ``fastload``: one when it ends, one for each range that had to be repeated."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from ..coldstart import of_load
from ..events import Event, log
from ..hookspecs import hookimpl
from ..measured import Profile
from ..phases import megabytes

if TYPE_CHECKING:
    from ..events import Observer
    from ..settings import Settings


@hookimpl
def fastload_observer(source: str, settings: Settings) -> Observer | None:
    """Log at INFO how a load of *source* ended, and what it had to repeat; the program decides who sees it."""
    if not log.isEnabledFor(logging.INFO):
        return None
    profile = Profile(source)

    def observe(event: Event) -> None:
        profile.observe(event)
        if event.name == "range.retried":
            log.info("%s: again in %.1f s: %s", event.file, event.data["wait_s"], event.data["reason"])
        elif event.name in ("load.finished", "load.failed"):
            log.info("%s", line(profile))

    return observe


def line(profile: Profile) -> str:
    """Return one line: how the load ended, after how long, and what took that time."""
    end = f"failed ({profile.error[0]}) after" if profile.error else "ready in"
    shared = of_load(profile)
    parts = ", ".join(f"{s.name} {s.seconds:.2f}" for s in shared.shares if s.seconds >= 0.005)
    hidden = f"; {shared.hidden_s:.2f} s hidden" if shared.hidden_s >= 0.005 else ""
    travelled = f"{megabytes(profile.travelled_bytes)} MB travelled"
    return f"{profile.source}: {end} {profile.total_s:.2f} s ({parts or 'nothing to do'}{hidden}), {travelled}"
