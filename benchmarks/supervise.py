"""Runs one command and says what it and all processes that it started took, also those that outlive it.

    python -m benchmarks.supervise RECORD.json COMMAND…

A process of its own, so that it has no other children: orphans come to it (``PR_SET_CHILD_SUBREAPER``), it waits for all.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

_PR_SET_CHILD_SUBREAPER = 36  # specified: linux/prctl.h
# Guessed: a ring or a read buffer lives longer than this; a look costs 0.3 ms.
SAMPLE_S = 0.05


class Memory:
    """The most memory that the processes below this one had at one moment, looked at every :data:`SAMPLE_S`.

    Attributes:
        rss_bytes: Sum of resident sizes; a page that two of them map counts twice.
        own_bytes: Of that, what belongs to no file: the memory that goes when they end.
    """

    def __init__(self) -> None:
        self.rss_bytes = 0
        self.own_bytes = 0
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Look no more."""
        self._stopped.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._stopped.wait(SAMPLE_S):
            sizes = [size for pid in descendants(os.getpid()) if (size := _resident(pid))]
            self.rss_bytes = max(self.rss_bytes, sum(own + mapped for own, mapped in sizes))
            self.own_bytes = max(self.own_bytes, sum(own for own, _ in sizes))


def descendants(pid: int) -> Iterator[int]:
    """Yield the children of *pid*, theirs, and so on."""
    for tasks in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children = tasks.read_text().split()
        except OSError:  # gone since
            continue
        for child in map(int, children):
            yield child
            yield from descendants(child)


def _resident(pid: int) -> tuple[int, int] | None:
    """Return how many bytes *pid* has in memory: of no file (anonymous and shared), and of mapped files."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return None
    sizes = {
        name: int(size.split()[0]) << 10 for name, size in (line.split(":", 1) for line in lines) if name[:3] == "Rss"
    }
    return (sizes["RssAnon"] + sizes["RssShmem"], sizes["RssFile"]) if sizes else None  # none: it has just ended


def used_cpu_s(pid: int) -> float:
    """Return the CPU seconds that process *pid* has used, to a hundredth."""
    numbers = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(numbers[11]) + int(numbers[12])) / os.sysconf("SC_CLK_TCK")


def machine_cpu_s() -> float:
    """Return the CPU seconds that everything on this machine has used since it started."""
    user, nice, system, _, _, irq, softirq = map(int, Path("/proc/stat").read_text().split()[1:8])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def main(target: str, *command: str) -> int:
    """Run *command*, write the record to *target*, return the command's exit status."""
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl")
    memory = Memory()
    machine_s = machine_cpu_s()
    spawned_s = time.monotonic()
    pid = os.posix_spawn(command[0], command, os.environ)
    status, exited_s, user_s, system_s, most_bytes = 1, spawned_s, 0.0, 0.0, 0
    while True:
        try:
            ended, how, usage = os.wait4(-1, 0)
        except ChildProcessError:
            break
        user_s, system_s = user_s + usage.ru_utime, system_s + usage.ru_stime
        if ended == pid:
            status, exited_s = os.waitstatus_to_exitcode(how), time.monotonic()
            most_bytes = usage.ru_maxrss << 10  # exact, but of one process; the sampled sum may miss a moment
    gone_s = time.monotonic()
    memory.stop()
    record = {
        "spawned_s": spawned_s,
        "wall_s": exited_s - spawned_s,
        "gone_s": gone_s - spawned_s,
        "user_s": user_s,
        "system_s": system_s,
        "others_cores": (machine_cpu_s() - machine_s - user_s - system_s) / (gone_s - spawned_s),
        "rss_bytes": max(memory.rss_bytes, most_bytes),
        "own_bytes": memory.own_bytes,
    }
    Path(target).write_text(json.dumps(record))
    return status


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
