"""Weights that lie on the disk but not in memory: brought there in large pieces, before page faults ask for small ones.

A framework maps a cached file and touches its pages one by one: measured, 1 GB on a local disk takes 1.5 s and 1.4
CPU-seconds that way, and 0.7 s and 0.4 when the kernel was told before what is wanted. On network filesystems, where each
fault is a round trip, others report factors of 8 to 50.
"""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Sequence
from pathlib import Path

from .events import log

#: Guessed: how much a cancelled thread may still ask for.
_WINDOW_BYTES = 16 << 20
#: Specified, Linux's force_page_cache_ra(): one call brings no more than the larger of the device's largest request and
#: its read-ahead, whose default this is; the rest would be silently left out. Measured: as fast as 2 MiB.
_STEP_BYTES = 128 << 10
#: Measured: 4 are no faster than 2.
_AT_ONCE = 2
#: Guessed: the rest of the memory is for the program.
_SHARE_OF_MEMORY = 0.7
#: Guessed: so many places tell whether a file is in memory; a look at 64 takes 0.4 ms.
_PROBES = 16


def is_resident(path: Path) -> bool:
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
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return 1 << 62
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")), 1 << 62)


def _pieces(paths: Sequence[Path]) -> list[tuple[Path, int]]:
    """Return where to read those of *paths* that are not in memory, as long as they fit there."""
    left = int(_available_bytes() * _SHARE_OF_MEMORY)
    pieces: list[tuple[Path, int]] = []
    for path in paths:
        size = path.stat().st_size
        left -= size
        if left < 0:
            break
        if not is_resident(path):
            pieces += [(path, start) for start in range(0, size, _WINDOW_BYTES)]
    return pieces


async def bring(paths: Sequence[Path]) -> None:
    """Let the kernel read *paths*, one after the other, from the first byte on; returns when it has been told all.

    Cancelling ends it soon. A file that cannot be read is left to whoever needs it.
    """
    if not hasattr(os, "posix_fadvise") or not hasattr(os, "RWF_NOWAIT"):
        return
    try:
        pieces = iter(await asyncio.to_thread(_pieces, paths))

        async def work() -> None:
            for path, start in pieces:
                await asyncio.to_thread(_advise, path, start)

        async with asyncio.TaskGroup() as group:
            for _ in range(_AT_ONCE):
                group.create_task(work())
    except* OSError as e:
        log.debug("files of the cache are not read ahead: %s", e.exceptions)


def _advise(path: Path, start: int) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        for step in range(start, start + _WINDOW_BYTES, _STEP_BYTES):
            os.posix_fadvise(fd, step, _STEP_BYTES, os.POSIX_FADV_WILLNEED)
    finally:
        os.close(fd)
