"""``fastload verify``: hash every file of a cached snapshot again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..digest import Hasher
from ..errors import NotFoundError
from ..types import Digest
from . import stamps, tree
from .disk import check_path, disk
from .repo import RepoCache

#: Guessed: large against the cost of a call, small against a processor's cache.
_PIECE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class FileCheck:
    """What one file of a snapshot turned out to be.

    Attributes:
        expected: The digest that the listing, or the name of the blob, promises; ``None``: nothing does.
        actual: The digest of the bytes; ``None`` where they are missing, or there is nothing to compare them with.
        state: ``missing``: listed, and not in the cache; ``unknown``: there, and neither listed nor linked to a blob.
    """

    path: str
    expected: str | None
    actual: str | None
    state: Literal["ok", "corrupt", "missing", "unknown"]


def check_snapshot(
    root: Path,
    source: str,
    revision: str | None = None,
    progress: Callable[[str, int], None] = lambda path, added_bytes: None,
) -> list[FileCheck]:
    """Hash every file of a cached snapshot again, whatever was found before; no network.

    A file that is corrupt is not trusted any more, so the next load fetches it; one that is right is not hashed by it.

    Args:
        revision: ``None``: ``main``.
        progress: Called in this thread with a path and how many more bytes of it were hashed.

    Returns:
        One check a file, sorted by path.

    Raises:
        NotFoundError: The cache does not have this revision.
        CacheError: The disk could not be read.
    """
    cache = RepoCache(root, source)
    commit = cache.read_ref(revision)
    snapshot = cache.snapshot_path(commit) if commit is not None else None
    if commit is None or snapshot is None or not snapshot.is_dir():
        raise NotFoundError(
            f"{source} at {revision or 'main'} is not in the cache {cache.root}", hint="`fastload prefetch` fetches it"
        )
    expected: dict[str, Digest | None] = {
        path: tree.linked_digest(snapshot / path) for path in tree.present_files(snapshot)
    }
    expected |= {file.path: file.digest for file in tree.read_tree(cache.folder, commit) or ()}
    return [_check(cache, snapshot, path, expected[path], progress) for path in sorted(expected)]


def _check(
    cache: RepoCache, snapshot: Path, path: str, expected: Digest | None, progress: Callable[[str, int], None]
) -> FileCheck:
    check_path(path)
    place = snapshot / path
    promised = str(expected) if expected is not None else None
    if not place.is_file():
        return FileCheck(path, promised, None, "missing")
    if expected is None:
        return FileCheck(path, None, None, "unknown")
    with disk("read", place):
        hasher = Hasher(expected, place.stat().st_size)
        with open(place, "rb", buffering=0) as file:
            piece = memoryview(bytearray(_PIECE_BYTES))
            while added_bytes := file.readinto(piece):
                hasher.update(piece[:added_bytes])
                progress(path, added_bytes)
    if not hasher.matches():
        stamps.remove_stamp(cache.folder, expected)
    elif not cache.is_trusted(expected, place):
        cache.stamp(expected, place, synced=False)
    return FileCheck(path, promised, str(hasher.actual), "ok" if hasher.matches() else "corrupt")
