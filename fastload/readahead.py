"""Weights that lie on the disk but not in memory: brought there in large pieces, before page faults ask for small ones.

A framework maps a cached file and touches its pages one by one: measured, 1 GB on a local disk takes 1.5 s and 1.4
CPU-seconds that way, and 0.7 s and 0.4 when the kernel was told before what is wanted. On network filesystems, where each
fault is a round trip, others report factors of 8 to 50.

A process that does nothing else imports this module (:mod:`fastload.ahead`): it must stay cheap to import.
"""

from __future__ import annotations

import errno
import os

TYPE_CHECKING = False  # typing's own costs its import
if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

#: Guessed: how much a cancelled thread may still ask for.
_WINDOW_BYTES = 16 << 20
#: Specified, Linux's force_page_cache_ra(): one call brings no more than the larger of the device's largest request and
#: its read-ahead, whose default this is; the rest would be silently left out. Measured: as fast as 2 MiB.
_STEP_BYTES = 128 << 10
#: Guessed: the rest of the memory is for the program.
_SHARE_OF_MEMORY = 0.7
#: Guessed: so many places tell whether a file is in memory; a look at 64 takes 0.4 ms.
_PROBES = 16


def is_resident(path: Path | str) -> bool:
    """Tell whether most of the file is in memory, by a look at a few places; what is not there begins to be read.

    Raises:
        OSError: It cannot be read.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        size = os.fstat(fd).st_size
        page = bytearray(1)
        found = 0
        for index in range(_PROBES):
            try:
                found += os.preadv(fd, [page], size * index // _PROBES, os.RWF_NOWAIT) >= 0
            except BlockingIOError:
                pass
            except OSError as e:
                if e.errno != errno.EOPNOTSUPP:
                    raise
                return False  # this filesystem cannot tell
        return found > _PROBES // 2
    finally:
        os.close(fd)


def _available_bytes() -> int:
    """Return what programs may still take (proc_meminfo(5), MemAvailable); a lot where nothing tells."""
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            return next((int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")), 1 << 62)
    except OSError:
        return 1 << 62


def _pieces(paths: Sequence[Path | str]) -> list[tuple[Path | str, int]]:
    """Return where to read those of *paths* that are not in memory, as long as they fit there."""
    left = int(_available_bytes() * _SHARE_OF_MEMORY)
    pieces: list[tuple[Path | str, int]] = []
    for path in paths:
        size = os.stat(path).st_size
        left -= size
        if left < 0:
            break
        if not is_resident(path):
            pieces += [(path, start) for start in range(0, size, _WINDOW_BYTES)]
    return pieces


def possible() -> bool:
    """Tell whether this system has what it takes."""
    return hasattr(os, "posix_fadvise") and hasattr(os, "RWF_NOWAIT")


async def bring(paths: Sequence[Path]) -> None:
    """Let the kernel read *paths*, one after the other, from the first byte on; returns when it has been told all.

    Cancelling ends it soon. A file that cannot be read is left to whoever needs it.
    """
    import asyncio

    from .events import log

    if not possible():
        return
    try:
        # One after the other: one thread has the kernel told of 2 GB in 0.5 s, two take 0.5 to 1.0, as each of their
        # thousands of calls waits for the other one's GIL (measured).
        for path, start in await asyncio.to_thread(_pieces, paths):
            await asyncio.to_thread(_advise, path, start)
    except OSError as e:
        log.debug("files of the cache are not read ahead: %s", e)


def main(paths: Sequence[str]) -> None:
    """As :func:`bring`, as all that this process does; ends at once when standard input does. Never returns."""
    import threading

    def watch() -> None:
        os.read(0, 1)
        os._exit(0)

    threading.Thread(target=watch, daemon=True).start()
    try:
        for path, start in _pieces(paths):
            _advise(path, start)
    except OSError:  # a file has vanished: whoever needs it will say so
        pass
    os._exit(0)


def _advise(path: Path | str, start: int) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        for step in range(start, start + _WINDOW_BYTES, _STEP_BYTES):
            os.posix_fadvise(fd, step, _STEP_BYTES, os.POSIX_FADV_WILLNEED)
    finally:
        os.close(fd)
