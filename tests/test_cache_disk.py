"""Disks that are full, read-only or no cache at all end in a CacheError that says so."""

from __future__ import annotations

import asyncio
import ctypes
import errno
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hubcache import (
    COMMIT,
    REPO,
    WEIGHTS,
    Process,
)

from fastload.cache import RepoCache, cache_error
from fastload.errors import CacheError
from fastload.types import RemoteFile


@pytest.fixture
def process(tmp_path: Path) -> Process:
    """Runs Python, and huggingface_hub, with the folder of *cache* as its cache and no hub to reach."""
    return Process(tmp_path / "home")


#: Makes a small filesystem at argv[1] that lives and dies with the process, and runs the code in argv[2] beside it.
MOUNT = 'mount -t tmpfs -o size=256k tmpfs "$1" && exec "$2" -P -c "$3" "$1"'


def on_small_disk(process: Process, folder: Path, code: str) -> Any:
    folder.mkdir()
    unshare = shutil.which("unshare")
    can = unshare and subprocess.run([unshare, "-rm", "true"], capture_output=True, check=False).returncode == 0
    if not can or unshare is None:
        pytest.skip("needs unshare(1) and user namespaces")
    command = [unshare, "-rm", "sh", "-c", MOUNT, "sh", str(folder), sys.executable, code]
    done = subprocess.run(command, env=process.env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


PRELUDE = f"""
import json, os, subprocess, sys
from pathlib import Path
from fastload.cache import RepoCache
from fastload.errors import CacheError
from fastload.types import Digest
root, digest = Path(sys.argv[1]) / "hub", Digest("sha256", "ab" * 32)
def told(act):
    try: act()
    except CacheError as e: return [e.message, e.hint, e.errno]
cache = RepoCache(root, {REPO!r}, symlinks=False)
cache.prepare()
blobs = cache.folder / "blobs"
"""


def test_full_disk_is_a_cache_error_that_says_so_and_leaves_nothing_half(process: Process, tmp_path: Path) -> None:
    found = on_small_disk(
        process,
        tmp_path / "disk",
        PRELUDE
        + """
cache.blob_path(digest).write_bytes(bytes(150_000))
error = told(lambda: cache.link("c" * 40, "model.safetensors", digest))
pointer = cache.snapshot_path("c" * 40) / "model.safetensors"
print(json.dumps([error, sorted(p.name for p in blobs.iterdir()), os.path.lexists(pointer)]))
""",
    )
    (message, hint, code), names, exists = found
    assert message.startswith("cannot link ") and message.endswith("No space left on device [ENOSPC]")
    assert "free some space (" in hint and "cache_dir" in hint
    assert code == errno.ENOSPC
    assert names == ["ab" * 32] and not exists


def test_disk_that_may_not_be_written_is_a_cache_error_before_the_download(process: Process, tmp_path: Path) -> None:
    found = on_small_disk(
        process,
        tmp_path / "disk",
        PRELUDE
        + """
subprocess.run(["mount", "-o", "remount,ro", sys.argv[1]], check=True)
print(json.dumps([told(cache.prepare), told(lambda: cache.try_lock(digest))]))
""",
    )
    for message, hint, code in found:
        assert "Read-only file system [EROFS]" in message
        assert "make it writable for user " in hint and "cache_dir" in hint
        assert code == errno.EROFS


def test_every_step_that_the_disk_refuses_is_a_cache_error(tmp_path: Path) -> None:
    (tmp_path / "hub").write_text("a file where the cache should be")
    cache = RepoCache(tmp_path / "hub", REPO)
    steps = [
        cache.prepare,
        lambda: cache.try_lock(WEIGHTS),
        lambda: cache.publish(WEIGHTS, COMMIT, ["a"]),
        lambda: cache.link(COMMIT, "a", WEIGHTS),
        lambda: cache.sync(cache.blob_path(WEIGHTS)),
        lambda: cache.discard(WEIGHTS),
    ]
    for step in steps:
        with pytest.raises(CacheError, match=r"cannot \w+.* /.*\[E\w+\]"):
            step()
    with pytest.raises(CacheError):
        asyncio.run(cache.write_ref("main", COMMIT))
    with pytest.raises(CacheError):
        asyncio.run(cache.write_no_exist(COMMIT, ["a"]))
    assert cache.find(COMMIT, RemoteFile("a", 1, WEIGHTS)) is None
    assert cache.read_ref("main") is None


@pytest.mark.parametrize(
    ("answer", "error"),
    [(0, None), (errno.ENOSYS, None), (errno.ESPIPE, None), (errno.EIO, "EIO"), (errno.ENOSPC, "ENOSPC")],
)
def test_large_file_is_made_safe_in_steps_whose_errors_count(
    answer: int, error: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What one call told of, a later fdatasync does not tell again."""
    cache = RepoCache(tmp_path / "hub", REPO)
    cache.prepare()
    blob = cache.blob_path(WEIGHTS)
    with open(blob, "wb") as file:
        file.truncate(40 << 20)
    steps: list[tuple[int, int]] = []

    class C:
        def __init__(self, *_: object, **__: object) -> None: ...

        def sync_file_range(self, fd: int, start: Any, count: Any, flags: int) -> int:
            steps.append((start.value, count.value))
            ctypes.set_errno(answer)
            return -1 if answer else 0

    cache.sync(blob)  # the real one
    monkeypatch.setattr(ctypes, "CDLL", C)
    if error is None:
        cache.sync(blob)
    else:
        with pytest.raises(CacheError, match=error):
            cache.sync(blob)
    assert steps[0] == (0, 16 << 20) and len(steps) == (1 if answer else 3)


def test_error_of_the_engine_can_be_told_in_the_same_words(tmp_path: Path) -> None:
    error = cache_error(OSError(errno.EDQUOT, "Disk quota exceeded"), "write", tmp_path / "not" / "there")
    assert isinstance(error, OSError) and error.errno == errno.EDQUOT
    assert f"cannot write {tmp_path}/not/there: Disk quota exceeded [EDQUOT]" in str(error)
