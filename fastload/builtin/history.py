"""The history of loads, where the setting ``profile_history`` names a file for it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..events import Event
from ..hookspecs import hookimpl
from ..measured import Profile

if TYPE_CHECKING:
    from ..events import Observer
    from ..settings import Settings


@hookimpl
def fastload_observer(source: str, settings: Settings) -> Observer | None:
    """Add a line to the history when a load of *source* has ended."""
    path = settings.profile_history
    if path is None:
        return None
    from .. import history

    profile = Profile(source)

    def observe(event: Event) -> None:
        profile.observe(event)
        if event.name in ("load.finished", "load.failed"):
            history.append(path, [profile])  # a file that cannot be written: this observer is dropped with a warning

    return observe
