"""What the hub of the test bed holds: repositories with commits and Git ids, computed without git.

A file's id is the sha1 that git would give it; a large file's content is named by its sha256 and its id is that of its
LFS pointer, as on the Hub. Commit ids hang on nothing but the content.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

NAMESPACE = "tb"
#: Opens the private and the gated repository.
TOKEN = "hf_testbed"
LFS_SUFFIXES = {".safetensors", ".bin", ".gguf", ".onnx", ".pth", ".pt", ".h5", ".msgpack"}
LFS_BYTES = 5_000_000  # guessed: larger files are LFS files whatever their name

AWFUL_NAMES = (
    "config.json",
    "sub folder/100% #1 ü 你.txt",
    "a/b/c/deep.json",
    "empty.txt",
    "empty.bin",
    "plus+and&=.txt",
    "quote'.txt",
)


@dataclass(frozen=True, slots=True)
class RepoFile:
    """One file of one commit.

    Attributes:
        oid: git sha1 of what git stores: the content, or the LFS pointer.
        sha256: Of the content; ``None`` for a file that is not in LFS.
        pointer_bytes: Size of the LFS pointer, else 0.
        content: The bytes, or the file on this machine that holds them.
    """

    path: str
    size: int
    oid: str
    sha256: str | None
    pointer_bytes: int
    content: bytes | Path

    @property
    def etag(self) -> str:
        """What the hub names the content by: sha256 of large files, git sha1 of small ones."""
        return self.sha256 or self.oid


@dataclass(frozen=True, slots=True)
class Commit:
    """All files at one point of a repository's history."""

    id: str
    files: tuple[RepoFile, ...]


@dataclass(frozen=True, slots=True)
class Repo:
    """One repository: its commits, oldest first; ``main`` is the last one and the tag ``v1`` the first."""

    name: str
    commits: tuple[Commit, ...]

    @property
    def id(self) -> str:
        """``tb/name``."""
        return f"{NAMESPACE}/{self.name}"

    @property
    def first(self) -> Commit:
        """The first commit."""
        return self.commits[0]

    @property
    def head(self) -> Commit:
        """The newest commit."""
        return self.commits[-1]

    def revisions(self, *, stale: bool = False) -> dict[str, Commit]:
        """Return every name that a revision goes by; a *stale* mirror has seen the first commit only."""
        head = self.first if stale else self.head
        named = {"main": head, "v1": self.first, self.first.id: self.first, head.id: head}
        return named if stale else {**named, "refs/pr/1": self.first}


def git_sha1(content: bytes) -> str:
    """Return the id that git gives a file with *content*."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def repo_file(path: str, content: bytes | Path) -> RepoFile:
    """Return *content* as a file of a commit, hashed."""
    size = len(content) if isinstance(content, bytes) else content.stat().st_size
    if Path(path).suffix not in LFS_SUFFIXES and size <= LFS_BYTES:
        data = content if isinstance(content, bytes) else content.read_bytes()
        return RepoFile(path, size, git_sha1(data), None, 0, content)
    if isinstance(content, bytes):
        sha256 = hashlib.sha256(content).hexdigest()
    else:
        with open(content, "rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()
    return RepoFile(path, size, git_sha1(pointer), sha256, len(pointer), content)


def commit(files: Mapping[str, bytes | Path]) -> Commit:
    """Return *files* (path in the repository to content) as a commit."""
    return _commit([repo_file(path, content) for path, content in files.items()])


def _commit(files: Sequence[RepoFile]) -> Commit:
    ordered = tuple(sorted(files, key=lambda f: f.path))
    text = json.dumps([[f.path, f.oid] for f in ordered])
    return Commit(hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest(), ordered)


def model_repo(folder: Path) -> Repo:
    """Return the folder of a model as a repository with one commit."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return Repo(folder.name, (commit({p.relative_to(folder).as_posix(): p for p in files}),))


def with_second_commit(repo: Repo) -> Repo:
    """Return *repo* with another README and zeroed last bytes of its last weight file on ``main``."""
    weights = [f for f in repo.head.files if f.path.endswith(".safetensors")]
    readme = next(f for f in repo.head.files if f.path == "README.md")
    changed = {
        weights[-1].path: repo_file(weights[-1].path, _bytes(weights[-1])[:-64] + bytes(64)),
        "README.md": repo_file("README.md", _bytes(readme) + b"\nSecond commit.\n"),
    }
    files = [changed.get(f.path, f) for f in repo.head.files]
    return Repo(repo.name, (*repo.commits, _commit(files)))


def _bytes(file: RepoFile) -> bytes:
    return file.content if isinstance(file.content, bytes) else file.content.read_bytes()


def odd_repos(llama: Repo) -> Iterator[Repo]:
    """Yield *llama* behind each kind of closed door, a repository of two listing pages, and one of awful names."""
    for door in ("private", "gated", "disabled"):
        yield Repo(f"{door}-llama", (llama.first,))
    yield Repo("many-files", (commit({f"f{i:04}.txt": b"%d\n" % i for i in range(1500)}),))
    awful = {name: b"" if name.startswith("empty") else b"{}\n" + name.encode() for name in AWFUL_NAMES}
    yield Repo("awful-names", (commit(awful),))


def standard_repos(models: Sequence[Path], *, odd: bool) -> list[Repo]:
    """Return one repository a model folder; with *odd*, also two commits of llama-tiny-bf16 and :func:`odd_repos`."""
    repos = [model_repo(folder) for folder in models]
    llama = next((r for r in repos if r.name == "llama-tiny-bf16"), None)
    if llama is None or not odd:
        return repos
    rest = [r for r in repos if r is not llama]
    return [with_second_commit(llama), *rest, *odd_repos(llama)]
