"""olah (PyPI, Apache-2.0) as a hub that nobody here wrote, offline, in front of real git repositories with LFS files.

It differs from the Hub in useful ways: bare ETags, HEAD without Accept-Ranges, GET ignores Range and answers 200 in
chunks without a length, every error is 401 RepoNotFound, ``/api/models/{repo}`` needs a revision.
"""

from __future__ import annotations

import http.client
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from .real import link
from .repos import NAMESPACE, Repo, model_repo

START_S = 60.0  # guessed: its imports take 3 s on a quiet machine
_POLL_S = 0.1
_TRIES = 3  # a port that was free may be taken when olah binds it

_WHO = {"NAME": "testbed", "EMAIL": "testbed@localhost", "DATE": "2026-01-01T00:00:00Z"}
_GIT_ENVIRON = {
    **{f"GIT_{role}_{key}": value for role in ("AUTHOR", "COMMITTER") for key, value in _WHO.items()},
    "GIT_CONFIG_NOSYSTEM": "1",
    "GIT_CONFIG_GLOBAL": os.devnull,
}
# Files are written as git shall store them, LFS pointers included: no filter may touch them.
_NO_LFS = ["-c", "filter.lfs.required=false", "-c", "filter.lfs.clean=cat", "-c", "filter.lfs.smudge=cat"]


def olah_command() -> str | None:
    """Return the path of ``olah-cli``: ``$FASTLOAD_OLAH``, beside this Python, or on PATH; ``None`` where it is not."""
    beside = str(Path(sys.executable).parent)
    return os.environ.get("FASTLOAD_OLAH") or shutil.which("olah-cli", path=beside) or shutil.which("olah-cli")


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *_NO_LFS, *arguments]
    environ = {**os.environ, **_GIT_ENVIRON}
    return subprocess.run(command, env=environ, check=True, capture_output=True, text=True).stdout.strip()


def write_git_repo(repo: Repo, folder: Path) -> str:
    """Write the newest commit of *repo* as a git repository with LFS objects; return the commit that git gave it."""
    folder.mkdir(parents=True)
    _git(folder, "init", "-q", "-b", "main")
    for file in repo.head.files:
        target = folder / file.path
        target.parent.mkdir(parents=True, exist_ok=True)
        content = file.content
        if file.sha256:
            pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{file.sha256}\nsize {file.size}\n"
            target.write_text(pointer, encoding="utf-8")
            stored = folder / ".git/lfs/objects" / file.sha256[:2] / file.sha256[2:4] / file.sha256
            stored.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, Path):
                link(content, stored)
            else:
                stored.write_bytes(content)
        else:
            target.write_bytes(content.read_bytes() if isinstance(content, Path) else content)
    _git(folder, "add", "-A", "-f")
    _git(folder, "commit", "-q", "-m", "first")
    return _git(folder, "rev-parse", "main")


class Olah:
    """Serves folders as ``tb/{name of the folder}`` through olah, from entering to leaving ``with``.

    Args:
        models: Folders with the files of one model each.
        folder: Where repositories, configuration and logs go.

    Attributes:
        url: Base URL: what HF_ENDPOINT wants.
        commits: Commit of each repository by its id.
    """

    def __init__(self, models: Sequence[Path], folder: Path) -> None:
        self._models = models
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None
        self.url = ""
        self.commits: dict[str, str] = {}

    def __enter__(self) -> Self:
        for repo in map(model_repo, self._models):
            self.commits[repo.id] = write_git_repo(repo, self._folder / "git/models" / NAMESPACE / repo.name)
        for last in reversed(range(_TRIES)):
            try:
                self._start()
            except RuntimeError:
                if not last:
                    raise
            else:
                break
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._process is not None:
            self._process.kill()  # it has nothing to save, and waits for idle connections when asked kindly
            self._process.wait()

    def _start(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        configuration = self._folder / "olah.toml"
        configuration.write_text(
            f'[basic]\nhost = "127.0.0.1"\nport = {port}\nrepos-path = "{self._folder}/cache"\n'
            f'mirrors-path = ["{self._folder}/git"]\n[accessibility]\noffline = true\n',
            encoding="utf-8",
        )
        command = [str(olah_command()), "-c", str(configuration), "--log-path", str(self._folder / "logs")]
        with open(self._folder / "output.log", "wb") as output:
            self._process = subprocess.Popen(
                command, cwd=self._folder, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
            )
        self._wait(self._process, port)
        self.url = f"http://127.0.0.1:{port}"

    def _wait(self, process: subprocess.Popen[bytes], port: int) -> None:
        for _ in range(int(START_S / _POLL_S)):
            try:
                process.wait(_POLL_S)
            except subprocess.TimeoutExpired:
                if _answers(port):
                    return
            else:
                break
        process.kill()
        process.wait()
        said = (self._folder / "output.log").read_text(errors="replace")[-2000:]
        raise RuntimeError(f"olah did not start: {said}")


def _answers(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=START_S)
    try:
        connection.request("GET", "/")
        connection.getresponse().read()
    except OSError:
        return False
    finally:
        connection.close()
    return True
