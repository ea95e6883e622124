"""A hub in a process of its own, so that it shares no GIL with what is measured."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import FastloadError
from .faults import Fault
from .log import Request


@dataclass(frozen=True, slots=True)
class Served:
    """A hub that :func:`spawn` started.

    Attributes:
        endpoint: Base URL.
        cdn: Base URL of its CDN.
        pid: Of the process.
        commits: Commit of each repository's main.
        ca_file: PEM file to trust, with ``tls``.
    """

    endpoint: str
    cdn: str
    pid: int
    commits: Mapping[str, str]
    ca_file: str | None
    _process: subprocess.Popen[str]

    @property
    def requests(self) -> list[Request]:
        """All requests so far, in order of arrival."""
        return [Request(**{**r, "faults": tuple(r["faults"])}) for r in self._ask({"do": "requests"})]

    def clear(self) -> None:
        """Forget the requests so far."""
        self._ask({"do": "clear"})

    def script(self, *faults: Fault) -> None:
        """Replace all faults by *faults*."""
        self._ask({"do": "script", "faults": [asdict(f) for f in faults]})

    def release(self) -> None:
        """Let every body go on that a ``hold`` has stopped."""
        self._ask({"do": "release"})

    def _ask(self, command: Mapping[str, Any]) -> Any:
        return _exchange(self._process, command)


@contextmanager
def spawn(folder: Path | str, **options: Any) -> Iterator[Served]:
    """Serve *folder* (of ``org/name`` folders) from another process until the block ends.

    Args:
        folder: As of :class:`Hub`.
        options: Those of :class:`Hub` that are plain data: ``rate_bytes_per_s``, ``latency_s``, ``shape``, ``tls``,
            ``token``, ``gated`` …

    Raises:
        FastloadError: It did not start; the message holds what it said.
    """
    package = str(Path(__file__).resolve().parents[2])
    search = os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-P", "-m", "fastload.testing", "serve", str(folder), "--options", json.dumps(options)]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": search}
    )
    try:
        hello = _exchange(process, None)
        yield Served(hello["endpoint"], hello["cdn"], process.pid, hello["commits"], hello["ca_file"], process)
    finally:
        if process.stdin is not None and process.stdout is not None:
            process.stdin.close()
            process.stdout.close()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()


def _exchange(process: subprocess.Popen[str], command: Mapping[str, Any] | None) -> Any:
    if process.stdin is None or process.stdout is None:
        raise FastloadError("the hub's process has no pipes")
    if command is not None:
        process.stdin.write(json.dumps(command) + "\n")
        process.stdin.flush()
    line = process.stdout.readline()
    if not line:
        raise FastloadError(f"the hub's process ended with status {process.wait()}")
    return json.loads(line)
