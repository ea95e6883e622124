"""What happens before a program's first line, because its environment says so.

The wheel brings ``fastload-start.pth``, which Python runs when it starts: it imports this module if ``FASTLOAD_START`` or
``FASTLOAD_ACCELERATE`` is set, and nothing otherwise.

* ``FASTLOAD_START=org/model,org/other@v1`` begins to fetch these, as :func:`fastload.start` would on the first line.
* ``FASTLOAD_ACCELERATE=1`` (or names of models) is :func:`fastload.accelerate` for the whole process.
"""

from __future__ import annotations

import os
import sys
from contextlib import contextmanager

TYPE_CHECKING = False  # typing's own costs its import
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

_OFF = ("", "0", "off", "no", "false")
_ON = ("1", "on", "yes", "true")
#: Which process has begun the transfers: those that it starts need not.
_STARTED = "FASTLOAD_STARTED"
#: Says that `fastload exec` has (fastload.rendezvous, which costs an import).
_LAUNCHED = "FASTLOAD_LAUNCHED"

_begun = False


def begin() -> None:
    """Do what the environment says, once. Never raises: a program must not fail for what it does not know of."""
    global _begun
    if _begun or sys.flags.ignore_environment:
        return
    _begun = True
    environ = os.environ
    sources = [name.strip() for name in environ.get("FASTLOAD_START", "").split(",") if name.strip()]
    wanted = environ.get("FASTLOAD_ACCELERATE", "").strip()
    with _told("FASTLOAD_START"):  # first: the other's imports take time
        if sources and not _is_started_above(environ.get(_STARTED, "")):
            environ[_STARTED] = str(os.getpid())
            _start(sources)
        elif _LAUNCHED in environ:
            _collect_rarely()
    with _told("FASTLOAD_ACCELERATE"):
        if wanted.lower() not in _OFF or (sources and not wanted):
            from .dropin import switch_on

            everything = not wanted or wanted.lower() in _ON
            switch_on(*(() if everything else (name for name in wanted.split(",") if name.strip())))


@contextmanager
def _told(variable: str) -> Iterator[None]:
    try:
        yield
    except Exception as e:  # nobody has called us, so there is nobody to raise to
        _log().warning("%s: %s: %s", variable, type(e).__name__, e)


def _start(sources: list[str]) -> None:
    from .errors import FastloadError
    from .loader import start

    for source in sources:
        try:
            start(source)
        except FastloadError as e:
            _log().warning("FASTLOAD_START=%s: %s", source, e)


def _collect_rarely() -> None:
    """What :func:`fastload.start` would do to this program's collector, had it begun the transfer itself."""
    from .garbage import rarely
    from .settings import Settings

    if Settings.resolve().pause_gc:
        rarely.begin()


def _log() -> Any:
    from .events import log

    return log


def _is_started_above(pid: str) -> bool:
    """Tell whether the process that this one descends from, and that began the transfers, still runs."""
    try:
        os.kill(int(pid), 0)
    except PermissionError:
        return True
    except (ValueError, OverflowError, OSError):
        return False
    return int(pid) != os.getpid()
