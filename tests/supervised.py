"""``fastload serve`` in a process of its own, its app under the test's control, and a client that waits without sleeping."""

from __future__ import annotations

import http.client
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from programs import ROOT

#: Guessed: no test waits for so long but one that fails.
PATIENCE_S = 60.0


@dataclass(frozen=True)
class Answer:
    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Supervised:
    """A running supervisor."""

    def __init__(self, process: subprocess.Popen[str], url: str) -> None:
        self.process = process
        self.url = url
        self.port = int(url.split(":")[2].split("/")[0])

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE_S)

    def call(self, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None) -> Answer:
        connection = self.connect()
        try:
            connection.request(method, path, body, dict(headers or {}))
            answer = connection.getresponse()
            return Answer(answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read())
        finally:
            connection.close()

    def predict(self, request: Any) -> Answer:
        return self.call("POST", "/predict", json.dumps(request), {"Content-Type": "application/json"})

    def state(self) -> dict[str, Any]:
        return self.call("GET", "/state").json

    def until(self, condition: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
        """Look at the live view until *condition* holds; return what it showed."""
        connection = self.connect()
        try:
            connection.request("GET", "/events")
            answer = connection.getresponse()
            while line := answer.readline():
                if line.startswith(b"data: "):
                    record = json.loads(line[6:])
                    if condition(record):
                        return record
        finally:
            connection.close()
        raise AssertionError(f"the live view ended; last of all it showed {record}")

    def until_state(self, state: str) -> dict[str, Any]:
        return self.until(lambda record: record["life"]["state"] == state)

    def end(self) -> tuple[int, str]:
        """Send SIGTERM; return the exit status, and what it said on stderr since its port was open."""
        self.process.terminate()
        _, err = self.process.communicate(timeout=PATIENCE_S)
        return self.process.returncode, err


@contextmanager
def supervised(*words: str, folder: Path, environ: Mapping[str, str] | None = None) -> Iterator[Supervised]:
    """Run ``fastload serve --port 0 WORDS`` in *folder*; killed at the end of the block if it still runs."""
    search = os.pathsep.join(filter(None, [str(ROOT), str(ROOT / "plugins"), os.environ.get("PYTHONPATH", "")]))
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "fastload", "serve", "--port", "0", *words],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=folder,
        env={**os.environ, "PYTHONPATH": search, "PYTHONDONTWRITEBYTECODE": "1", **(environ or {})},
    )  # fmt: skip
    try:
        assert process.stderr is not None
        said = []
        while " at http://" not in (line := process.stderr.readline()):
            said.append(line)  # of a plugin, perhaps
            assert line, "".join(said)
        yield Supervised(process, line.split()[-1])
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.communicate(timeout=PATIENCE_S)
            except subprocess.TimeoutExpired:
                process.kill()
        process.communicate()


class Gate:
    """A place where an app waits (``open(path).read()``) until the test opens it. Both wait for each other."""

    def __init__(self, path: Path) -> None:
        self.path = path
        os.mkfifo(path)

    def open(self) -> None:
        with open(self.path, "w"):
            pass
