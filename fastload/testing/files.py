"""What a hub holds: files with their digests, commits, repositories. Digests are computed once, on reading."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import SettingsError

#: The files of one repository: a folder, or paths with their bytes.
Content = Path | str | Mapping[str, bytes]
#: Repositories by id, or a folder of ``org/name`` folders.
Models = Path | str | Mapping[str, Content]
#: Whether the file with this path and size is stored as a large file (sha256) rather than in git (git-sha1).
LfsRule = Callable[[str, int], bool]

# Specified: what the Hub's default .gitattributes sends to LFS; above 10 MB it takes nothing else.
LFS_SUFFIXES = frozenset({".safetensors", ".bin", ".gguf", ".onnx", ".pth", ".pt", ".jit", ".h5", ".msgpack"})
LFS_ABOVE_BYTES = 5_000_000


def is_large(path: str, size_bytes: int) -> bool:
    """Tell whether the Hub would keep this file in LFS: by suffix, or above 5 MB."""
    return Path(path).suffix in LFS_SUFFIXES or size_bytes > LFS_ABOVE_BYTES


@dataclass(frozen=True, slots=True)
class Entry:
    """One file of a commit.

    Attributes:
        blob_id: The git sha1 (of the LFS pointer, where the file is a large one).
        sha256: Of the content; only large files have it.
        pointer_bytes: Size of the LFS pointer; 0 for files in git.
        content: The bytes, or the file that holds them.
    """

    path: str
    size: int
    blob_id: str
    sha256: str | None
    pointer_bytes: int
    content: Path | bytes

    @property
    def etag(self) -> str:
        """What the Hub sends as ETag: sha256 of a large file, git sha1 of any other."""
        return self.sha256 or self.blob_id

    def read(self, start: int, count: int) -> bytes:
        """Return *count* bytes from *start*."""
        if isinstance(self.content, bytes):
            return self.content[start : start + count]
        fd = os.open(self.content, os.O_RDONLY)
        try:
            return os.pread(fd, count, start)
        finally:
            os.close(fd)


@dataclass(frozen=True, slots=True)
class Commit:
    """One state of a repository; its id depends on nothing but repository, paths and contents."""

    id: str
    files: Mapping[str, Entry]


@dataclass(slots=True)
class Repository:
    """All commits that a hub knows of one repository, and the names that point to them."""

    id: str
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def find(self, revision: str) -> Commit | None:
        """Return the commit that *revision* (a name or a full id) stands for."""
        return self.commits.get(self.refs.get(revision, revision))

    def point(self, revision: str, commit: Commit) -> None:
        """Let *revision* stand for *commit*; earlier commits stay."""
        self.commits = {**self.commits, commit.id: commit}
        self.refs = {**self.refs, revision: commit.id}


def read_commit(repo: str, content: Content, is_lfs: LfsRule = is_large) -> Commit:
    """Read and hash *content*.

    Raises:
        SettingsError: The folder does not exist.
    """
    if isinstance(content, Mapping):
        entries = [_entry(path, bytes(data), is_lfs) for path, data in content.items()]
    else:
        folder = Path(content)
        if not folder.is_dir():
            raise SettingsError(f"no folder {folder} for {repo}")
        entries = [_entry(path.relative_to(folder).as_posix(), path, is_lfs) for path in _walk(folder)]
    entries.sort(key=lambda e: e.path)
    names = "".join(f"{e.path}\0{e.etag}\n" for e in entries)
    commit = hashlib.sha1(f"{repo}\n{names}".encode(), usedforsecurity=False).hexdigest()
    return Commit(commit, {e.path: e for e in entries})


def read_models(models: Models) -> dict[str, Content]:
    """Return the content of each repository id; a folder is taken as ``org/name`` folders."""
    if isinstance(models, Mapping):
        return dict(models)
    folders = sorted(p for p in Path(models).glob("*/*") if p.is_dir() and not p.parent.name.startswith("."))
    if not folders:
        raise SettingsError(f"no org/name folders in {models}")
    return {"/".join(p.parts[-2:]): p for p in folders}


def _walk(folder: Path) -> Iterator[Path]:
    for parent, folders, names in os.walk(folder):
        folders[:] = [f for f in folders if f not in (".git", ".cache")]
        yield from (Path(parent, name) for name in names)


def _entry(path: str, content: Path | bytes, is_lfs: LfsRule) -> Entry:
    size = len(content) if isinstance(content, bytes) else content.stat().st_size
    if not is_lfs(path, size):
        data = content if isinstance(content, bytes) else content.read_bytes()
        return Entry(path, size, _git_sha1(data), None, 0, content)
    if isinstance(content, bytes):
        sha256 = hashlib.sha256(content).hexdigest()
    else:
        with content.open("rb") as f:
            sha256 = hashlib.file_digest(f, "sha256").hexdigest()
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()
    return Entry(path, size, _git_sha1(pointer), sha256, len(pointer), content)


def _git_sha1(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
