"""The engine: one transfer, from the name of a model to verified files.

Two promises, tested: nothing unverified is ever visible in the cache under a final name; and whatever ends a transfer,
the bytes that landed are kept for the next one.
"""

from __future__ import annotations

import asyncio
import errno
import os
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from .athand import by_blob, manifest_message
from .cache import RepoCache
from .delivery import Delivery, close_all
from .download import Download
from .errors import CacheError, FastloadError, OfflineError, to_record
from .events import Events, log
from .fetch import Fetcher
from .http import HttpClient
from .plan import Selection, natural_key, select
from .pools import Pools
from .readahead import bring
from .resolve import Resolved, absent_files, read_token, resolve
from .retry import Sleep
from .schedule import Wishes
from .settings import Settings
from .types import Manifest, Request

Emit = Callable[[dict[str, Any]], None]


class Engine:
    """Runs one transfer in the running event loop. All its tasks live in one TaskGroup.

    Args:
        emit: Takes each message (see :mod:`fastload.transfer`), in the loop's thread.
        pm: The plugin manager, for sources and mirrors.
        sleep: Awaited between tries and looks; injected by tests.
    """

    def __init__(self, settings: Settings, emit: Emit, pm: Any, *, sleep: Sleep = asyncio.sleep) -> None:
        self.settings = settings
        self._emit = emit
        self._pm = pm
        self._sleep = sleep
        self.events = Events([lambda event: emit({"kind": "event", "event": event.to_record()})])
        self._published: list[tuple[Download, Path]] = []
        self._open: list[Download] = []
        self._found: list[Path] = []
        self._spare = True
        self._wishes: Wishes | None = None

    def want(self, paths: Iterable[str]) -> None:
        """Deliver *paths* now; of a transfer on demand. Call it in the loop's thread, once the manifest was told."""
        if self._wishes is not None:
            self._wishes.want(paths)

    async def run(self, request: Request, *, settle: bool = False) -> None:
        """Deliver what *request* names; messages tell what happens.

        Args:
            settle: Also make the files safe from a power cut, which nobody needs to wait for: everything is told
                before.

        Raises:
            FastloadError: Why it failed; also emitted as the last message.
        """
        self.events.emit("transfer.started", pid=os.getpid())
        self._spare = not request.everything
        self._wishes = Wishes() if request.on_demand else None
        async with Pools() as pools:
            try:
                try:
                    await self._run(request, pools)
                except BaseExceptionGroup as group:
                    raise _first(group) from None
                if settle:
                    await pools.off(self.settle)
            except FastloadError as e:
                self._emit({"kind": "failed", "error": to_record(e)})
                raise
            finally:
                await pools.surely(close_all, self._open)  # see Download.close

    def settle(self) -> None:
        """Make what :meth:`run` delivered safe from a power cut. Blocks, for as long as the disk takes.

        Raises:
            CacheError: The disk failed.
        """
        while self._published:
            download, path = self._published.pop(0)
            try:
                download.sync(path)
            except CacheError as e:
                if e.errno != errno.ENOENT:  # else it was removed since: there is nothing to make safe
                    raise

    @property
    def found(self) -> list[Path]:
        """The weights that were there already and that somebody will read; none after a transfer whose aim was the cache."""
        return sorted(self._found, key=lambda path: natural_key(path.name)) if self._spare else []

    async def read_ahead(self) -> None:
        """After :meth:`run`: bring those of :attr:`found` that are not in memory there before a framework asks."""
        if self.settings.read_ahead:
            await bring(self.found)

    async def _run(self, request: Request, pools: Pools) -> None:
        token = await pools.off(read_token, self.settings)
        endpoint = request.locked.endpoint if request.locked else self.settings.endpoint
        async with HttpClient(self.settings, endpoint, token) as http:
            with self.events.span("resolve.finished") as data:
                resolved = await resolve(
                    request, self.settings, http, self._pm, pools, token=token is not None, sleep=self._sleep
                )
                manifest = resolved.manifest
                selection = select(manifest, request.patterns, everything=request.everything, options=request.options)
                if request.on_demand:  # whoever asks has another way for the rest
                    selection = replace(selection, files=tuple(f for f in selection.files if f.digest is not None))
                data.update(commit=manifest.commit, files=len(selection.files), requests=http.requests)
                data["bytes"] = sum(f.size for f in selection.files)
            received = 0
            if resolved.cache is None:
                self._deliver_local(manifest, selection)
            else:
                fetcher = Fetcher(
                    self.settings,
                    http,
                    resolved.bases,
                    manifest,
                    self.events,
                    sleep=self._sleep,
                    token=token is not None,
                )
                await self._deliver(resolved, resolved.cache, selection, fetcher, pools)
                received = fetcher.received_bytes
            self.events.emit("transfer.finished", bytes=received, requests=http.requests)
        self._emit({"kind": "finished"})

    def _deliver_local(self, manifest: Manifest, selection: Selection) -> None:
        """The files are on this machine, outside any cache: nothing travels, and nobody knows their digests."""
        folder = manifest.local or Path()
        self._emit(manifest_message(manifest, selection, folder))
        self._found = [folder / path for path in selection.weights]
        for file in selection.files:
            self.events.emit("file.planned", file=file.path, bytes=file.size, state="cached")
            self._emit({"kind": "ready", "file": file.path, "final": str(folder / file.path)})

    async def _deliver(
        self, resolved: Resolved, cache: RepoCache, selection: Selection, fetcher: Fetcher, pools: Pools
    ) -> None:
        manifest = resolved.manifest
        downloads = by_blob(manifest, selection, cache)
        writable = not resolved.offline
        if resolved.offline:
            await pools.off(_refuse_missing, downloads)
        else:
            try:
                writable = await pools.off(_prepare, cache, downloads)
            except CacheError as e:
                writable, cache = False, await self._beside(e, manifest, pools)
                downloads = by_blob(manifest, selection, cache)
        self._emit(manifest_message(manifest, selection, cache.snapshot_path(manifest.commit)))

        async def describe() -> None:
            await pools.off(cache.write_tree, manifest)
            absent = absent_files(manifest)
            await pools.unbroken(lambda threads: cache.write_no_exist(manifest.commit, absent, executor=threads))

        describes = writable and resolved.complete and self._wishes is None
        delivery = Delivery(
            self.settings, self._emit, self.events, fetcher, pools, self._sleep, offline=resolved.offline,
            wishes=self._wishes,
        )  # fmt: skip
        # Beside it: what this imports would hold up the first bytes of weights by 25 ms (measured).
        await delivery.run(downloads, describe if describes else None)
        self._found = delivery.found
        self._open = [download for download, _ in delivery.published]
        if writable:
            self._published = delivery.published
        if writable and self._wishes is None:
            # Last: a ref to a snapshot that is not there counts as damage.
            await pools.unbroken(lambda threads: cache.write_ref(manifest.revision, manifest.commit, executor=threads))

    async def _beside(self, error: CacheError, manifest: Manifest, pools: Pools) -> RepoCache:
        """Return a cache in a temporary folder, for a load that may not write the real one; nothing of it is kept.

        Raises:
            CacheError: *error* itself, where filling the cache is all that was asked for, or nothing can be written.
        """
        if not self._spare:
            raise error
        try:
            root = Path(await pools.off(tempfile.mkdtemp, "", "fastload-cache-"))
        except OSError:
            raise error from None
        self._emit({"kind": "temporary", "path": str(root)})
        log.warning("%s: this load goes through %s, and the next one fetches everything again", error.message, root)
        cache = RepoCache(root, manifest.source, symlinks=self.settings.symlinks, network=self.settings.network_cache)
        await pools.off(cache.prepare)
        return cache


def _prepare(cache: RepoCache, downloads: list[Download]) -> bool:
    """Make the cache's folders; a cache that cannot be written will do if it holds everything already."""
    try:
        cache.prepare()
    except CacheError:
        if any(d.find() is None for d in downloads):
            raise
        return False
    return True


def _refuse_missing(downloads: list[Download]) -> None:
    """Offline, say at once and completely what the cache lacks."""
    missing = [d.paths[0] for d in downloads if d.find() is None]
    if missing:
        names = ", ".join(missing[:3]) + (", …" if len(missing) > 3 else "")
        raise OfflineError(
            f"{len(missing)} of {len(downloads)} files are not in the cache ({names}),"
            " and the network is off or the hub out of reach",
            hint="run `fastload prefetch` while online; HF_HUB_OFFLINE turns the network off",
        )


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """Return the error that a user should see of those that ended a TaskGroup: ours first, then bugs."""
    leaves: list[BaseException] = []
    queue: list[BaseException] = [group]
    while queue:
        error = queue.pop(0)
        if isinstance(error, BaseExceptionGroup):
            queue.extend(error.exceptions)
        else:
            leaves.append(error)
    return next((e for e in leaves if isinstance(e, FastloadError)), leaves[0])
