"""From the name of a model to the list of its files: lock, source or, out of reach of both, the cache."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from .cache import RepoCache
from .errors import (
    Attempt,
    DownloadError,
    MirrorError,
    MirrorStatusError,
)
from .events import log
from .http import HttpClient
from .known import cache_of, check_listing, find_source, from_cache, known_commit
from .plugins import call_hook
from .pools import Pools
from .refusals import refusal
from .retry import Retrying, Sleep
from .settings import Settings
from .types import Manifest, Request, Source

#: Files that frameworks look for and most models lack. That the manifest lacks them is worth a marker in the cache: an
#: unchanged from_pretrained then asks nobody (specified by what transformers 5 and diffusers 0.42 were seen to ask for).
_OFTEN_ABSENT = (
    "adapter_config.json", "added_tokens.json", "chat_template.jinja", "chat_template.json", "config.json",
    "custom_generate/generate.py", "generation_config.json", "model.safetensors", "model.safetensors.index.json",
    "preprocessor_config.json", "processor_config.json", "pytorch_model.bin", "pytorch_model.bin.index.json",
    "special_tokens_map.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "video_preprocessor_config.json",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Resolved:
    """What a request stands for.

    Attributes:
        bases: Base URLs to fetch from, the origin first.
        cache: Where the files go; ``None`` for a local folder.
        offline: Nothing may travel: what the cache lacks cannot be had.
        complete: The manifest is all of the commit; a lock may hold less.
    """

    manifest: Manifest
    bases: tuple[str, ...]
    cache: RepoCache | None
    offline: bool = False
    complete: bool = True


def read_token(settings: Settings) -> str | None:
    """Return the token that was set, or the one that `hf auth login` stored. Blocks on the disk."""
    if settings.token is not None:
        return settings.token
    try:
        return "".join(settings.token_path.read_text(encoding="utf-8").split()) or None
    except (OSError, UnicodeDecodeError):
        return None


def absent_files(manifest: Manifest) -> list[str]:
    """Return the files that frameworks often look for and that this manifest lacks."""
    there = {f.path for f in manifest.files}
    return [path for path in _OFTEN_ABSENT if path not in there]


async def resolve(
    request: Request, settings: Settings, http: HttpClient, pm: Any, pools: Pools, *, token: bool, sleep: Sleep
) -> Resolved:
    """Find out which files at which commit *request* means.

    One request at the Hub; none for a lock, and none for a commit, given in full, whose listing the cache has.

    Raises:
        SourceError: The hub does not have it, or does not let us have it.
        OfflineError: The network is off or the hub out of reach, and the cache does not know it.
        DownloadError: The hub answered, but not with a listing.
    """
    source = await pools.off(find_source, request, settings, pm)
    offline = settings.offline
    if request.locked is not None:
        manifest = request.locked
    elif offline:
        manifest = await pools.off(from_cache, source, settings, None)
    elif (known := await pools.off(known_commit, source, settings)) is not None:
        manifest = known
    else:
        metadata = _Metadata(http, settings, source, token=token, sleep=sleep)
        try:
            manifest = await source.files(metadata, settings)
        except (MirrorError, DownloadError) as e:
            if isinstance(e, MirrorStatusError) and e.status < 500 and e.status != 429:
                raise
            manifest = await pools.off(from_cache, source, settings, e)
            offline = True
            log.warning("%s: the hub is out of reach, using the cache (%s)", source.name, e.message)
    if manifest.local is not None:
        return Resolved(manifest, (), None)
    check_listing(manifest)
    offered = [u for urls in call_hook(pm, "fastload_mirrors", source=source, settings=settings) if urls for u in urls]
    bases = tuple(dict.fromkeys(u.rstrip("/") for u in (manifest.endpoint, *offered)))
    return Resolved(manifest, bases, cache_of(manifest.source, settings), offline, complete=request.locked is None)


class _Metadata:
    """The Http of :mod:`fastload.types`: metadata requests with retries, whose refusals are the user's errors."""

    def __init__(self, http: HttpClient, settings: Settings, source: Source, *, token: bool, sleep: Sleep) -> None:
        self._http = http
        self._settings = replace(
            settings, attempts=min(settings.attempts, 5)
        )  # guessed: about 5 s, then the cache serves
        self._source = source
        self._token = token
        self._sleep = sleep

    async def _retried(self, operation: Any, file: str | None = None) -> Any:
        retrying = Retrying(self._settings, sleep=self._sleep)

        async def attempt() -> Any:
            try:
                return await operation()
            except MirrorError as e:
                retrying.tries.note(Attempt(e.mirror, 0.0, e.message), progress=False)
                raise

        try:
            return await retrying.run(attempt)
        except MirrorStatusError as e:
            refused = refusal(e, self._source.name, self._source.revision, token=self._token, file=file)
            raise (refused or e) from e

    async def get_json(self, url: str) -> tuple[Any, Mapping[str, str]]:
        """GET *url* with retries."""
        result: tuple[Any, Mapping[str, str]] = await self._retried(lambda: self._http.get_json(url))
        return result

    async def head(self, url: str) -> Mapping[str, str]:
        """HEAD *url* with retries."""
        result: Mapping[str, str] = await self._retried(
            lambda: self._http.head(url), file=url.rpartition("/resolve/")[2]
        )
        return result
