"""Files of one repository, put into a cache by us or by the real huggingface_hub in a process of its own."""

from __future__ import annotations

import asyncio
import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import fastload
from fastload.cache import RepoCache
from fastload.testing.files import read_commit
from fastload.types import Digest, Manifest, RemoteFile

REPO = "org/a.model"
OTHER_COMMIT = "2e" * 20
FILES = {
    ".gitattributes": b"*.safetensors filter=lfs\n",
    "config.json": b'{"architectures": []}',
    "empty.txt": b"",
    "model.safetensors": bytes(range(256)) * 40,
    "unet/deep/er/model.safetensors": b"deep" * 999,
    "awful/100 % #1 & ü?.json": b"{}",
    "awful/a b/é%41.safetensors": b"awful" * 99,
}
#: As the hub lists them: with the Git names of files and LFS pointers.
LISTED = read_commit(REPO, FILES)
COMMIT = LISTED.id
DIGESTS = {path: Digest.parse(entry.etag) for path, entry in LISTED.files.items()}
WEIGHTS = DIGESTS["model.safetensors"]

HF = "import huggingface_hub as hf, huggingface_hub.constants as c, json, os, sys; root = c.HF_HUB_CACHE\n"


class Process:
    """Runs Python in processes of their own, with a Hugging Face home of their own."""

    def __init__(self, home: Path, endpoint: str = "http://127.0.0.1:9") -> None:
        package_root = str(Path(fastload.__file__).parents[1])
        self.env = {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": package_root,
            "HF_HOME": str(home),
            "HF_ENDPOINT": endpoint,
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_SYMLINKS_WARNING": "1",
        }

    def start(self, code: str, **env: str) -> subprocess.Popen[str]:
        """Start *code*; it talks through stdin and stdout."""
        return subprocess.Popen(
            [sys.executable, "-P", "-c", code],
            env=self.env | env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, code: str, *, umask: int = -1, **env: str) -> Any:
        """Run *code* to its end; return the JSON that it printed."""
        command = [sys.executable, "-P", "-c", code]
        done = subprocess.run(command, env=self.env | env, umask=umask, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)


def manifest(*, blob_ids: bool = True) -> Manifest:
    files = [
        RemoteFile(path, entry.size, DIGESTS[path], blob_id=entry.blob_id if blob_ids else None)
        for path, entry in LISTED.files.items()
    ]
    return Manifest(REPO, "main", COMMIT, "http://127.0.0.1", tuple(files))


def arrive(cache: RepoCache, digest: Digest, data: bytes) -> None:
    cache.partial_path(digest).write_bytes(data)


def publish(cache: RepoCache, path: str, commit: str = COMMIT) -> Path:
    fd = cache.try_lock(DIGESTS[path])
    assert fd is not None
    arrive(cache, DIGESTS[path], FILES[path])
    (pointer,) = cache.publish(DIGESTS[path], commit, [path]).values()
    cache.unlock(fd)
    return pointer


def fill(cache: RepoCache) -> None:
    cache.prepare()
    cache.write_tree(manifest())
    for path in FILES:
        publish(cache, path)
    asyncio.run(cache.write_ref("main", COMMIT))
    asyncio.run(cache.write_ref("refs/pr/1", COMMIT))
    asyncio.run(cache.write_no_exist(COMMIT, ["generation config.json", "sub/none.json"]))


#: The same by huggingface_hub's own means.
FILL = f"""
hf.snapshot_download({REPO!r})
hf.snapshot_download({REPO!r}, revision="refs/pr/1")
for name in "generation config.json", "sub/none.json":
    try: hf.hf_hub_download({REPO!r}, name)
    except hf.errors.EntryNotFoundError: pass
print("null")
"""


def entries(root: Path) -> dict[str, tuple[str, int, object]]:
    """Every file, folder and link: kind, mode, and where it leads or what it holds; not what is ours alone."""
    found: dict[str, tuple[str, int, object]] = {}
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root).as_posix()
        if name == "CACHEDIR.TAG" or "/.fastload" in name:
            continue
        status = path.lstat()
        holds: object = None
        if path.is_symlink():
            holds = os.readlink(path)
        elif path.is_file():
            holds = path.read_bytes()
        found[name] = (stat.filemode(status.st_mode)[0], stat.S_IMODE(status.st_mode), holds)
    return found
