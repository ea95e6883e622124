"""What this process may use: cores, memory, open files. Linux: cgroups, and the machine itself where they say nothing."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")
#: Specified (cgroup v1): what stands in memory.limit_in_bytes where there is no limit is near 2**63.
_NO_LIMIT_BYTES = 1 << 60


def cores() -> float:
    """Return how many cores this process may keep busy: those it may run on, or less where a cgroup has a quota."""
    present = float(len(os.sched_getaffinity(0)))
    quotas = [quota for folder in _folders() if (quota := _quota(folder)) is not None]
    return min([present, *quotas])


def memory_limit_bytes() -> int | None:
    """Return the least memory limit of the cgroups that this process is in; ``None`` without one. Page cache counts too."""
    names = ("memory.max", "memory.limit_in_bytes")
    texts = [text for folder in _folders() for name in names if (text := _text(folder / name)).isdigit()]
    limits = [limit for text in texts if (limit := int(text)) < _NO_LIMIT_BYTES]
    return min(limits, default=None)


def available_bytes() -> int:
    """Return how much memory can be had without anyone else losing theirs, the page cache's share included."""
    lines = _text(Path("/proc/meminfo")).splitlines()
    found = [int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")]
    return found[0] if found else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")


def dirty_bytes() -> int:
    """Return how much may wait to be written before the kernel makes whoever writes wait for the disk (vm.dirty_*)."""
    given = _text(Path("/proc/sys/vm/dirty_bytes"))
    if given.isdigit() and int(given):
        return int(given)
    share = _text(Path("/proc/sys/vm/dirty_ratio"))
    return available_bytes() * (int(share) if share.isdigit() else 20) // 100


def open_files() -> int:
    """Return how many files and sockets this process may have open."""
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def gives_free_pages_back() -> bool:
    """Tell whether this is a virtual machine whose free memory goes back to the host (virtio 1.2, 5.5.3)."""
    balloon, reporting = "0x0005", 5  # specified: the device's number, and the bit of VIRTIO_BALLOON_F_REPORTING
    for device in Path("/sys/bus/virtio/devices").glob("*"):
        if _text(device / "device") == balloon:
            return _text(device / "features")[reporting : reporting + 1] == "1"
    return False


def _folders() -> Iterator[Path]:
    """Yield the folders of this process's cgroups, from its own up to what the container or the machine has."""
    for line in _text(Path("/proc/self/cgroup")).splitlines():
        _, controllers, path = line.split(":", 2)
        base = _CGROUPS / controllers if controllers else _CGROUPS
        own = base / path.lstrip("/")
        yield own
        yield from (parent for parent in own.parents if parent.is_relative_to(_CGROUPS))


def _quota(folder: Path) -> float | None:
    """Return the cores that a cgroup's quota comes to; ``None`` without one."""
    words = _text(folder / "cpu.max").split() or [
        _text(folder / "cpu.cfs_quota_us"),
        _text(folder / "cpu.cfs_period_us"),
    ]
    return int(words[0]) / int(words[1]) if len(words) == 2 and all(word.isdigit() for word in words) else None


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return ""
