"""One process writes a blob: ours and huggingface_hub exclude each other."""

from __future__ import annotations

import os
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from hubcache import (
    REPO,
    WEIGHTS,
    Process,
)

from fastload.cache import RepoCache


@pytest.fixture
def process(tmp_path: Path) -> Process:
    """Runs Python, and huggingface_hub, with the folder of *cache* as its cache and no hub to reach."""
    return Process(tmp_path / "home")


@pytest.fixture
def cache(tmp_path: Path) -> RepoCache:
    made = RepoCache(tmp_path / "home" / "hub", REPO)
    made.prepare()
    return made


@pytest.fixture
def umask() -> Iterator[None]:
    old = os.umask(0o027)
    yield
    os.umask(old)


TRY_LOCK = f"""
import sys
from pathlib import Path
from fastload.cache import RepoCache
from fastload.testing import Hub
from fastload.types import Digest
cache = RepoCache(Path(sys.stdin.readline().strip()), {REPO!r})
fd = cache.try_lock(Digest.parse(sys.stdin.readline().strip()))
print("busy" if fd is None else "mine", flush=True)
sys.stdin.readline()
"""


def told(child: subprocess.Popen[str], *lines: str) -> None:
    assert child.stdin is not None
    child.stdin.write("".join(f"{line}\n" for line in lines))
    child.stdin.flush()


def heard(child: subprocess.Popen[str]) -> str:
    assert child.stdout is not None
    return child.stdout.readline().strip()


def ended(child: subprocess.Popen[str]) -> None:
    child.kill()
    child.communicate()


def test_of_two_processes_one_gets_the_lock_and_its_death_frees_it(cache: RepoCache, process: Process) -> None:
    children = [process.start(TRY_LOCK) for _ in range(2)]
    try:
        for child in children:
            told(child, str(cache.root), str(WEIGHTS))
        answers = [heard(child) for child in children]
        assert sorted(answers) == ["busy", "mine"]
        assert cache.try_lock(WEIGHTS) is None
        ended(children[answers.index("mine")])
        fd = cache.try_lock(WEIGHTS)
        assert fd is not None
        assert cache.try_lock(WEIGHTS) is None, "descriptors of one process exclude each other too"
        cache.unlock(fd)
    finally:
        for child in children:
            ended(child)


def test_lock_of_huggingface_hub_keeps_us_out(cache: RepoCache, process: Process) -> None:
    cache.lock_path(WEIGHTS).parent.mkdir(parents=True)
    child = process.start(
        f"""
import sys
from huggingface_hub.utils import WeakFileLock
with WeakFileLock({str(cache.lock_path(WEIGHTS))!r}):
    print("held", flush=True)
    sys.stdin.readline()
print("released", flush=True)
sys.stdin.readline()
"""
    )
    try:
        assert heard(child) == "held"
        assert cache.try_lock(WEIGHTS) is None
        told(child, "release")
        assert heard(child) == "released"
        fd = cache.try_lock(WEIGHTS)
        assert fd is not None
        cache.unlock(fd)
    finally:
        ended(child)


def test_our_lock_keeps_huggingface_hub_out(cache: RepoCache, process: Process, umask: None) -> None:
    fd = cache.try_lock(WEIGHTS)
    assert fd is not None
    assert stat.S_IMODE(cache.lock_path(WEIGHTS).stat().st_mode) == 0o664
    code = f"""
import filelock
from huggingface_hub.utils import WeakFileLock
try:
    with WeakFileLock({str(cache.lock_path(WEIGHTS))!r}, timeout=0.05): print('"got it"')
except filelock.Timeout: print('"kept out"')
"""
    assert process.run(code) == "kept out"
    cache.unlock(fd)
    assert process.run(code.replace("0.05", "30")) == "got it"


def test_lock_on_a_file_that_was_removed_meanwhile_guards_nothing(
    cache: RepoCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fcntl

    real = fcntl.flock

    def removed_first(fd: int, operation: int) -> None:
        monkeypatch.setattr(fcntl, "flock", real)
        cache.lock_path(WEIGHTS).unlink()
        real(fd, operation)

    monkeypatch.setattr(fcntl, "flock", removed_first)
    assert cache.try_lock(WEIGHTS) is None
    fd = cache.try_lock(WEIGHTS)
    assert fd is not None
    cache.unlock(fd)
