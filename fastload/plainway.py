"""What somebody else downloaded in our stead: hashed before it is believed."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from .cache import RepoCache, is_in_flight
from .digest import Hasher, mismatch
from .errors import IntegrityError
from .types import Digest

#: Measured for other hashes of this package: larger pieces cost nothing extra.
PIECE_BYTES = 16 << 20


def check_digest(path: Path, name: str, digest: Digest | None) -> None:
    """Hash *path*, and remove it if it is not *digest*; harmless where nobody knows what it should be.

    Raises:
        IntegrityError: It is not.
    """
    if digest is None:
        return
    hasher = Hasher(digest, os.path.getsize(path))
    with open(path, "rb") as f:
        while piece := f.read(PIECE_BYTES):
            hasher.update(piece)
    if not hasher.matches():
        Path(os.path.realpath(path)).unlink(missing_ok=True)
        path.unlink(missing_ok=True)
        raise mismatch(name, digest, hasher.actual, "the plain way", final=True)


def identity(path: Path) -> tuple[int, ...] | None:
    """Return what changes with the file at *path* whenever somebody writes or replaces it; ``None`` while it arrives."""
    try:
        stat = os.stat(path)
    except OSError:
        return None
    known = stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns
    return None if is_in_flight(path) else known


def checked(
    plain: Callable[[], Any],
    name: str,
    started_s: float,
    warn: Callable[[str], object],
    verified: tuple[int, ...] | None = None,
) -> Any:
    """Return the path that *plain* returns; a file that it downloaded is hashed, and fetched once more if it is wrong.

    Args:
        started_s: Wall clock; what changed after it is new.
        verified: The :func:`identity` of a file that need not be hashed again.

    Raises:
        IntegrityError: It was wrong twice, and is removed.
    """
    result = plain()
    try:
        if verified is None or not isinstance(result, str) or identity(Path(result)) != verified:
            _check(result, started_s)
        return result
    except IntegrityError as e:
        warn(f"{name}: {e.message}")
    result = plain()
    _check(result, started_s)
    return result


def _check(result: Any, started_s: float) -> None:
    if not isinstance(result, str) or is_in_flight(Path(result)):
        return
    blob = Path(os.path.realpath(result))
    try:
        digest = Digest.parse(blob.name) if blob.parent.name == "blobs" else None
        fresh = blob.stat().st_ctime >= started_s - 1  # a second: clocks of file systems are coarse
    except (ValueError, OSError):  # a hub whose ETags are no digests; a file that somebody else has removed
        return
    if fresh:
        check_digest(Path(result), Path(result).name, digest)


def instead(cache: RepoCache, commit: str, path: str, digest: Digest | None, plain: Callable[[bool], Path]) -> Path:
    """Put the file that *plain* downloads in the place of a link to the file in flight; return that place.

    The link stays until there is a verified file: whoever was given the path may be about to look whether it exists.

    Args:
        plain: Downloads the file into the cache, although there is a link if told so, and returns where it is.

    Raises:
        IntegrityError: It is not *digest*; it is removed, and the link stays.
        Exception: What *plain* raises.
    """
    blob = None if digest is None else cache.blob_path(digest)
    if blob is not None and not blob.exists():
        with suppress(Exception):  # somebody else's code: it says what it has to say below
            plain(True)
    if blob is not None and blob.exists() and digest is not None:
        check_digest(blob, path, digest)
        return cache.link(commit, path, digest)
    (cache.snapshot_path(commit) / path).unlink(missing_ok=True)
    place = plain(False)
    check_digest(place, path, digest)
    return place
