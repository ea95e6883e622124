"""Snippets of docs/platforms.md, run inside the platforms' own servers."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest

from fastload.testing import Hub

DOCS = Path(__file__).parents[2] / "docs"
#: What the snippets load, and what is asked of it.
MODEL = "org/model"
TOKENS = [1, 2, 3, 4]

Answer = tuple[int, Any]


def needs(distribution: str, environment: str) -> pytest.MarkDecorator:
    """Return a mark that skips tests where *distribution* is not installed; *environment* is tox's that has it."""
    reason = f"{distribution} is not installed: `tox run -e {environment}` has it, on a Python that it is made for"
    return pytest.mark.skipif(not any(metadata.distributions(name=distribution)), reason=reason)


def snippets(page: str, section: str) -> dict[str, str]:
    """Return the files of a section: blocks of code that begin with their name, as a comment or behind the language.

    Args:
        section: Its heading; empty: what stands above the first one.
    """
    text = (DOCS / page).read_text()
    parts = dict(re.findall(r"(?:^## ([^\n]*)\n|\A)(.*?)(?=^## |\Z)", text, re.M | re.S))
    body = parts[section]
    blocks = re.findall(r"^```\w+(?: (\S+))?\n(?=# ([\w./-]+)\n)?(.*?)^```$", body, re.M | re.S)
    return {name or comment: block for name, comment, block in blocks if name or comment}


def write(section: str, folder: Path, changes: Mapping[str, str] | None = None, *, suffix: str = "") -> None:
    """Write the files of *section* (those with *suffix*); replace each text in *changes*, which must stand there once."""
    files = {name: text for name, text in snippets("platforms.md", section).items() if name.endswith(suffix)}
    for old, new in (changes or {}).items():
        [name] = [name for name, text in files.items() if old in text]
        assert files[name].count(old) == 1, old
        files[name] = files[name].replace(old, new)
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def until(condition: Callable[[], Any], what: str, timeout_s: float = 120.0) -> Any:
    """Return what *condition* returns, once that is true; asked seldom, because servers answer and log each time."""
    end_s = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < end_s, f"waited {timeout_s} s in vain: {what}"
        time.sleep(0.1)
    return found


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


class Server:
    """A platform's server, its workers and its log; ended with the block, and whatever it has started with it.

    Args:
        command: Arguments; the first is a name in this environment, or a path.
        cwd: Where the snippet lies.
        environ: Beside the test's own environment.
        port: Where it listens.
    """

    def __init__(self, command: Sequence[str], cwd: Path, environ: Mapping[str, str], port: int) -> None:
        self._base = f"http://127.0.0.1:{port}"
        self._command, self._cwd = [*command], cwd
        self._environ = {
            **os.environ, "PYTHONUNBUFFERED": "1", "PYTHONDONTWRITEBYTECODE": "1", "NO_PROXY": "*",
            # Of a virtual environment that is not activated: some servers start `python`.
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", **environ,
        }  # fmt: skip
        self._log = cwd / f"server-{port}.log"

    def __enter__(self) -> Server:
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                self._command, cwd=self._cwd, env=self._environ, stdout=log, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.terminate()
        try:
            self.process.wait(15)
        except subprocess.TimeoutExpired:
            pass
        try:  # the group is ours: the server was made its leader
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.process.wait()
        if error is not None:
            print(self.log)

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def call(self, path: str, body: Any = None, *, headers: Mapping[str, str] | None = None) -> Answer:
        """Return status and (decoded) body; POST where there is something to send. Status 0: nobody answers."""
        request = urllib.request.Request(
            self._base + path, None if body is None else json.dumps(body).encode(),
            {"Content-Type": "application/json", **(headers or {})},
        )  # fmt: skip
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                status, raw = answer.status, answer.read()
        except urllib.error.HTTPError as e:
            with e:
                status, raw = e.code, e.read()
        except OSError:  # refused, reset, or closed without an answer
            return 0, None
        try:
            return status, json.loads(raw)
        except ValueError:
            return status, raw.decode(errors="replace")

    def wait(self, path: str, settled: Callable[[int, Any], object]) -> Answer:
        """Ask *path* until the answer is *settled*; return it."""

        def asked() -> Answer | None:
            assert self.process.poll() is None, f"the server has ended with {self.process.returncode}"
            answer = self.call(path)
            return answer if answer[0] and settled(*answer) else None

        answer: Answer = until(asked, f"{path} of {self._command}")
        return answer

    def wait_end(self) -> int:
        """Wait until the server has ended of itself; return its exit code."""
        return self.process.wait(120)

    def wait_log(self, text: str) -> None:
        """Wait until *text* stands in the log."""
        until(lambda: text in self.log, text)


def transferred_bytes(hub: Hub) -> int:
    """Return how many bytes of weights the hub has sent."""
    return sum(r.bytes_sent for r in hub.requests if r.origin == "cdn" and r.method == "GET")


def weights_bytes(model: Path) -> int:
    """Return how many there are."""
    return sum(path.stat().st_size for path in model.glob("*.safetensors"))


@dataclass(frozen=True, slots=True)
class Stage:
    """Where a snippet runs.

    Attributes:
        folder: Empty, for its files.
        environ: Of the server: hub, cache and home of this test.
        reference: Gives the token that the model gives for TOKENS.
    """

    folder: Path
    environ: dict[str, str]
    hub: Hub
    model: Path
    reference: Callable[[], int]

    @property
    def good(self) -> int:
        """The token that every server must answer TOKENS with."""
        return self.reference()

    @property
    def loads(self) -> list[dict[str, Any]]:
        """What the witness has seen, one record a call of load, stream or start."""
        path = Path(self.environ["WITNESS"])
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    @property
    def processes(self) -> set[int]:
        """Those in which the model was loaded."""
        return {load["pid"] for load in self.loads}

    @property
    def platforms(self) -> set[str | None]:
        """What they were recognised as."""
        return {load["platform"] for load in self.loads}

    @property
    def once(self) -> bool:
        """The weights have travelled exactly once."""
        return transferred_bytes(self.hub) == weights_bytes(self.model)
