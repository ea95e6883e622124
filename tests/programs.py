"""Programs in processes of their own, that are really killed, and what is left of them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transfers import KIB

from fastload.journal import Journal
from fastload.testing import Hub

ROOT = Path(__file__).parents[1]
#: As environment variables, so that programs and their transfer processes have them too. Nothing stalls by itself.
ENVIRON = {
    "FASTLOAD_RANGE_BYTES": str(64 * KIB),
    "FASTLOAD_RING_BYTES": str(8 * 64 * KIB),
    "FASTLOAD_CONNECTIONS": "2",
    "FASTLOAD_STALL_S": "60",
    "FASTLOAD_ATTEMPTS": "3",
}


def until(condition: Callable[[], Any], what: str = "", timeout_s: float = 20.0) -> Any:
    """Return what *condition* returns, once that is true."""
    end_s = time.monotonic() + timeout_s
    while not (found := condition()):
        if time.monotonic() > end_s:
            raise AssertionError(f"waited {timeout_s} s in vain: {what}")
        time.sleep(0.003)
    return found


def start(
    code: str, *arguments: str, environ: Mapping[str, str] | None = None, **options: Any
) -> subprocess.Popen[str]:
    """Start Python on *code* with the test's environment."""
    folders = [str(ROOT), str(ROOT / "plugins"), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    search = os.pathsep.join(filter(None, folders))  # an empty entry would be the current folder
    return subprocess.Popen(
        [sys.executable, "-P", "-c", code, *arguments], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": search, **(environ or {})}, **options,
    )  # fmt: skip


@contextmanager
def program(code: str, *arguments: str, **options: Any) -> Iterator[subprocess.Popen[str]]:
    """As :func:`start`, for the length of the block; killed at its end if it still runs."""
    process = start(code, *arguments, **options)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def run(code: str, *arguments: str, **options: Any) -> str:
    """Run *code* to its end; return what it printed."""
    with program(code, *arguments, **options) as process:
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
        return out


def children(pid: int) -> list[int]:
    """Return the pids of the processes that *pid* has started and that are not gone, zombies included."""
    try:
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
        return [int(p) for task in tasks for p in (task / "children").read_text().split()]
    except OSError:
        return []


def alive(pid: int) -> bool:
    """Tell whether *pid* runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def journal_of(cache: Path) -> Path | None:
    """Return the one journal in *cache*."""
    return next(cache.glob("models--*/blobs/*.fastload.journal"), None)


def landed_bytes(cache: Path) -> int:
    """Return how much the one journal in *cache* calls landed; 0 where there is none."""
    path = journal_of(cache)
    if path is None:
        return 0
    try:
        journal = Journal.open(path)
    except FileNotFoundError:
        return 0
    try:
        return journal.size - sum(map(len, journal.missing()))
    finally:
        journal.close()


def held(hub: Hub, count: int = 1) -> None:
    """Wait until *count* bodies are held."""
    hub.wait(lambda requests: sum(r.held for r in requests) >= count)
