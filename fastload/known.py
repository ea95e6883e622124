"""What can be known of a source without asking anybody: which one it is, and what the cache holds of it."""

from __future__ import annotations

import re
from typing import Any

from .cache import RepoCache, check_path
from .errors import DownloadError, OfflineError, SourceError, UnsupportedSourceError
from .plugins import call_hook
from .settings import Settings
from .types import Manifest, Request, Source

#: Specified (Git): the name of a commit in full.
_COMMIT = re.compile(r"[0-9a-f]{40}")


def cache_of(name: str, settings: Settings) -> RepoCache:
    """Return the cache of the repository *name*, as *settings* want it."""
    return RepoCache(settings.cache_dir, name, symlinks=settings.symlinks, network=settings.network_cache)


def find_source(request: Request, settings: Settings, pm: Any) -> Source:
    """Ask the plugins what *request* names.

    Raises:
        UnsupportedSourceError: None of them knows.
    """
    source: Source | None = call_hook(
        pm, "fastload_source", uri=request.source, revision=request.revision, settings=settings
    )
    if source is None:
        raise UnsupportedSourceError(
            f"no plugin knows the source {request.source!r}",
            hint="a source is org/name, org/name@revision, hf://org/name or an existing folder; plugins may know more",
        )
    return source


def check_listing(manifest: Manifest) -> None:
    """Refuse paths that would leave the snapshot, and listings that cannot be true, before anything is written."""
    seen: set[str] = set()
    for file in manifest.files:
        check_path(file.path)
        if file.path in seen or file.size < 0:
            raise SourceError(
                f"{manifest.source} lists {file.path!r} ({file.size} bytes), which no honest repository holds",
                hint="the hub or mirror is broken or hostile; do not use it",
            )
        seen.add(file.path)


def known_commit(source: Source, settings: Settings) -> Manifest | None:
    """Return the listing of the commit that was asked for, if the cache has all of it: a commit never changes."""
    if not source.endpoint or _COMMIT.fullmatch(source.revision) is None:
        return None
    return cache_of(source.name, settings).read_tree(
        source.name, source.revision, source.revision, source.endpoint, whole=True
    )


def from_cache(source: Source, settings: Settings, error: DownloadError | None) -> Manifest:
    """Return what the cache holds of *source*, as far as it knows.

    Args:
        error: Why nobody else is asked; ``None``: the network is off.

    Raises:
        OfflineError: It knows nothing.
    """
    cache = cache_of(source.name, settings)
    commit = cache.read_ref(source.revision)
    manifest = cache.read_tree(source.name, commit, source.revision, source.endpoint) if commit else None
    if manifest is not None:
        return manifest
    why = "the network is off (HF_HUB_OFFLINE)" if error is None else f"the hub is out of reach: {error.message}"
    raise OfflineError(
        f"{source.name} at {source.revision} is not in the cache at {settings.cache_dir}, and {why}",
        hint="run `fastload prefetch` while online"
        if error is None
        else error.hint or "check the network, HF_ENDPOINT and proxies, and try again",
    ) from error
