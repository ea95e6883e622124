"""Loads that need nobody: every file is in the cache and verified, and no hub need be asked whether it is the right one.

That is so for a lock, for a commit given in full, and with the network off. No process is started then, no event loop, no
HTTP client imported.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from .cache import RepoCache
from .download import Download
from .errors import FastloadError, SourceError
from .events import Events
from .known import cache_of, check_listing, find_source, from_cache, known_commit
from .plan import SMALL_BYTES, Selection, left_behind, select
from .readahead import is_resident
from .settings import Settings
from .types import Manifest, Request


def manifest_message(manifest: Manifest, selection: Selection, folder: Path) -> dict[str, Any]:
    """Return the message (see :mod:`fastload.transfer`) that tells readers which files there are."""
    return {
        "kind": "manifest",
        "source": manifest.source,
        "revision": manifest.revision,
        "commit": manifest.commit,
        "endpoint": manifest.endpoint,
        "path": str(folder),
        "weights": list(selection.weights),
        "left": left_behind(manifest, selection),
        "files": [
            {"path": f.path, "size": f.size, "digest": str(f.digest) if f.digest else ""} for f in selection.files
        ],
    }


def by_blob(manifest: Manifest, selection: Selection, cache: RepoCache) -> list[Download]:
    """Return one download for each content, whatever number of paths shows it.

    Raises:
        SourceError: A file has no digest.
    """
    downloads: dict[str, Download] = {}
    for file in selection.files:
        if file.digest is None:
            raise SourceError(
                f"{manifest.source}: the hub names no digest of {file.path}: nobody could tell whether its bytes are right",
                hint="use a hub that does, or a fastload.lock",
            )
        if str(file.digest) not in downloads:
            downloads[str(file.digest)] = Download(file, file.digest, cache, manifest.commit)
        downloads[str(file.digest)].paths.append(file.path)
    return list(downloads.values())


def deliver(request: Request, settings: Settings, pm: Any, emit: Callable[[dict[str, Any]], None]) -> list[Path] | None:
    """Deliver what *request* names, if it is all there; else tell nothing and return ``None``. Blocks on the disk.

    Args:
        emit: Takes each message, as an engine's does.

    Returns:
        Those weights that are not in memory, in the order in which they will be read.
    """
    if request.on_demand:
        return None
    events = Events([lambda event: emit({"kind": "event", "event": event.to_record()})])
    started_s = events.clock()
    try:
        manifest = _manifest(request, settings, pm)
        if manifest is None:
            return None
        selection = select(manifest, request.patterns, everything=request.everything, options=request.options)
        cache = cache_of(manifest.source, settings)
        found = _find_all(by_blob(manifest, selection, cache), cache.snapshot_path(manifest.commit))
        if found is None:
            return None
        cold = [] if request.everything else [found[p] for p in selection.weights if not is_resident(found[p])]
    except (FastloadError, OSError):  # whoever does the whole work says what is wrong
        return None
    events.emit(
        "resolve.finished", seconds=events.clock() - started_s, commit=manifest.commit, files=len(selection.files),
        requests=0, bytes=sum(f.size for f in selection.files),
    )  # fmt: skip
    emit(manifest_message(manifest, selection, cache.snapshot_path(manifest.commit)))
    for file in selection.files:
        events.emit("file.planned", file=file.path, bytes=file.size, state="cached")
        events.emit("file.verified", file=file.path, bytes=file.size)
        emit({"kind": "ready", "file": file.path, "final": str(found[file.path])})
    events.emit("transfer.finished", bytes=0, requests=0)
    emit({"kind": "finished"})
    return cold


def _manifest(request: Request, settings: Settings, pm: Any) -> Manifest | None:
    """Return the listing that holds without asking; ``None``: somebody must be asked, or the cache is not involved."""
    source = find_source(request, settings, pm)
    if not source.endpoint:
        return None
    manifest = request.locked or (
        from_cache(source, settings, None) if settings.offline else known_commit(source, settings)
    )
    if manifest is None or manifest.local is not None:
        return None
    check_listing(manifest)
    return manifest


def _find_all(downloads: list[Download], folder: Path) -> dict[str, Path] | None:
    """Return where each path of the snapshot stands, if all stand there and are verified."""
    found: dict[str, Path] = {}
    for download in downloads:
        places = download.find()
        if places is None or any(place != folder / path for path, place in places.items()):
            return None
        if not all(download.is_proven(place, SMALL_BYTES) for place in dict.fromkeys(places.values())):
            return None
        found |= places
    return found
