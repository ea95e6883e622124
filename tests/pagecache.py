"""What of a file is in memory, and how to get it out of there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def evict(path: Path) -> None:
    """Take the file out of memory; skips where it cannot leave (tmpfs)."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        before = read_bytes()
        os.pread(fd, 1, path.stat().st_size // 3)  # not where a look at the file would look
        if read_bytes() == before:
            pytest.skip("files of this filesystem never leave memory")
    finally:
        os.close(fd)


def read_bytes() -> int:
    """Return how many bytes this process has had the disk read (proc_pid_io(5))."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes:"))
