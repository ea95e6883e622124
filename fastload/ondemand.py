"""Transfers on demand: one a repository and revision, for code that asks for one file after another."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from . import running as started_here
from .apart import better_apart
from .asking import Asked, ask
from .cache import RepoCache
from .errors import FastloadError, IntegrityError, SourceChangedError
from .events import Event, log
from .inflight import InFlight
from .plainway import instead
from .running import Running
from .supply import Supply
from .types import Snapshot
from .view import FileView
from .weightfile import WeightFile


class OnDemand:
    """One transfer, and the files of it whose paths were given out before they are complete. Thread-safe.

    Args:
        running: A transfer that somebody else began and ends; ``None``: one on demand is begun.
    """

    def __init__(self, asked: Asked, running: Running | None = None) -> None:
        self._asked = asked
        self._owned = running is None
        if running is None:
            asked_for_parts = replace(asked, request=replace(asked.request, on_demand=True))
            running = Running(asked_for_parts, process=better_apart(asked.settings, options={}))
        self._running = running
        self._transfer = self._running.transfer
        self._lock = threading.Lock()
        self._in_flight: list[InFlight] = []
        #: Those that are not watched any more, and not yet closed.
        self._ending: list[InFlight] = []
        #: Those that neither way brought; their names stay until the end, or until they are asked for again.
        self._failed: list[InFlight] = []
        #: By identity, the errors that a reader got.
        self._heard: set[int] = set()
        self._watcher: threading.Thread | None = None
        self._stopped = False

    def serves(self, asked: Asked) -> bool:
        """Tell whether it fetches the same repository, by the same credentials, into the same cache."""
        request = replace(asked.request, revision=self._asked.request.revision)
        return self._asked.key == replace(asked, request=request).key

    @property
    def over(self) -> bool:
        """Whether it takes no more wishes."""
        return self._running.done or self._running.failed

    @property
    def known(self) -> bool:
        """Whether the files of the repository are known."""
        return self._transfer.snapshot is not None

    def snapshot(self) -> Snapshot:
        """Return what the repository holds; waits for that.

        Raises:
            FastloadError: The transfer failed.
        """
        return self._transfer.wait_manifest()

    def has(self, path: str) -> bool:
        """Tell whether it can bring *path*."""
        return path in self._transfer.files

    def size(self, path: str) -> int:
        """Return how many bytes *path* has."""
        return self._transfer.files[path].size

    # -- one file ----------------------------------------------------------------------------------------------------

    def deliver(self, path: str, progress: Callable[[int], object]) -> bool:
        """Wait until *path* is verified and in its place; False: the transfer had ended for other reasons than this file.

        Args:
            progress: Called with how many bytes of it have come.

        Raises:
            FastloadError: The transfer failed.
        """

        def observe(event: Event) -> None:
            if event.name == "write.finished" and event.file == path:
                progress(int(event.data["bytes"]))

        events = self._transfer.events
        events.add(observe)
        try:
            return self._wanted(path, lambda view: view.ready)
        finally:
            events.remove(observe)

    def give(self, path: str, plain: Callable[[bool], Path], warn: Callable[[str], object]) -> bool:
        """Let *path* be opened through ``safe_open`` from now on, complete or not; False as with :meth:`deliver`.

        Args:
            plain: Downloads it as it would have been without us, although there is a link if told so.
            warn: Called with what goes that way, and why.

        Raises:
            FastloadError: The transfer failed.
            OSError: Here are no links, or another process's is in the way.
        """
        if not self._wanted(path, lambda view: view.known):
            return False
        if self._transfer.files[path].ready:
            return True
        snapshot, settings = self.snapshot(), self._asked.settings
        cache = RepoCache(settings.cache_dir, snapshot.source, symlinks=settings.symlinks)
        digest = self._transfer.digests.get(path)
        supply = Supply(self._transfer, "cpu", None, settings)
        in_flight = InFlight(
            self._transfer,
            WeightFile(self._transfer, path, self._asked.pm),
            supply,
            snapshot.path / path,
            lambda: instead(cache, snapshot.commit, path, digest, plain),
            warn=warn,
            heard=self._told,
        )
        weakref.finalize(in_flight, supply.close)  # with the last handle
        in_flight.show()
        with self._lock:
            self._in_flight.append(in_flight)
            if self._watcher is None:
                self._watcher = threading.Thread(target=self._watch, name="fastload-in-transfer", daemon=True)
                self._watcher.start()
        return True

    def _wanted(self, path: str, enough: Callable[[FileView], bool]) -> bool:
        self._running.want(path)
        view = self._transfer.files[path]
        try:
            self._transfer.wait(lambda: enough(view) or view.error is not None or self._transfer.finished)
            if view.error is not None:
                raise view.error
        except IntegrityError as e:
            if not self._is_about(e, path):
                return False
            self._told(e)
            raise
        return enough(view)

    def _is_about(self, error: IntegrityError, path: str) -> bool:
        """Tell whether *error* is one of *path*'s, which may have come under the name of a file with the same bytes."""
        if isinstance(error, SourceChangedError):
            return False
        digest = self._transfer.digests.get(path)
        same = digest is not None and self._transfer.digests.get(error.file or path) == digest
        return error.file in (None, path) or same

    def _told(self, error: Exception) -> None:
        """A reader has got *error*: paths that stand for it need not lead anywhere any more."""
        with self._lock:
            self._heard.add(id(error))
            failed = [f for f in (*self._failed, *self._ending, *self._in_flight) if f.doomed is error]
        for file in failed:  # at once: who asks again must not find them, and the watcher may not have come to them yet
            file.unlink()

    # -- all files in flight -----------------------------------------------------------------------------------------

    def _watch(self) -> None:
        """See every file in flight to its end; bring those the plain way that the transfer does not bring."""
        while True:
            with self._lock:
                over = [f for f in self._in_flight if f.settled()]
                self._in_flight = [f for f in self._in_flight if f not in over]
                self._ending = list(over)
                if not over and not self._in_flight:
                    self._watcher = None
                    return
            for file in over:
                self._end(file, file.file.view.error)
            try:
                self._transfer.wait(lambda: any(f.settled() for f in self._in_flight) or not self._in_flight)
            except FastloadError as e:
                with self._lock:
                    self._ending, self._in_flight = self._in_flight, []
                for file in self._ending:
                    self._end(file, None if file.settled() else e)

    def _end(self, file: InFlight, error: FastloadError | None) -> None:
        try:
            if error is not None and not self._stopped:
                file.rescue(error)
        except Exception as e:  # whatever the plain way raises; its readers get it too
            with self._lock:
                self._failed.append(file)
                heard = id(e) in self._heard
            if heard:
                file.unlink()
            return
        file.close()

    def end(self) -> None:
        """Wait until all files in flight are in their places, then end the transfer.

        Raises:
            Exception: Why one of them is not, unless a reader has heard of it.
        """
        while (watcher := self._watcher) is not None:
            watcher.join()
        failures = [file.failure for file in self._failed]
        self.stop()
        for failure in failures:
            if failure is not None and id(failure) not in self._heard:
                raise failure

    def stop(self) -> None:
        """End the transfer; what has landed is kept. Links to files in flight go, and readers that wait get an error."""
        with self._lock:
            self._stopped = True
            left, self._in_flight, self._failed = [*self._in_flight, *self._ending, *self._failed], [], []
        for file in left:
            file.close()
        if self._owned:
            self._running.cancel()


class Transfers:
    """All of this process. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: dict[tuple[Any, ...], OnDemand] = {}
        #: Those that have ended and for which others were begun; their files that failed still have routes.
        self._replaced: list[OnDemand] = []

    def find(self, asked: Asked) -> OnDemand | None:
        """Return the one that has been begun for this, if it takes wishes."""
        with self._lock:
            transfer = self._open.get((os.getpid(), *asked.key))
        return None if transfer is None or transfer.over else transfer

    def begin(self, asked: Asked) -> OnDemand:
        """Return the one for this, begun now if there is none that takes wishes.

        One of a branch does for the commit that the branch stands for; waits until that is known.
        """
        for other in self._others(asked):
            try:
                if other.snapshot().commit == asked.request.revision:
                    return other
            except FastloadError:  # whoever asked for it hears of it
                continue
        with self._lock:
            key = (os.getpid(), *asked.key)
            transfer = self._open.get(key)
            if transfer is None or transfer.over:
                if transfer is not None:
                    self._replaced.append(transfer)
                transfer = self._open[key] = OnDemand(asked)
            return transfer

    def _others(self, asked: Asked) -> list[OnDemand]:
        """Return what takes wishes of the same repository at other revisions, unless there is one at this."""
        if self.find(asked) is not None:
            return []
        with self._lock:
            found = list(self._open.values())
        return [t for t in found if not t.over and t.serves(asked)]

    def started(self, asked: Asked, path: str) -> OnDemand | None:
        """Return a transfer that :func:`fastload.start` began and that brings *path* of the same commit, if there is one.

        Waits until it is known what those of the same repository bring.
        """
        request = asked.request
        for running in started_here.started(request.source, asked.settings):
            try:
                snapshot = running.transfer.wait_manifest()
            except FastloadError:  # it says so itself; this file has other ways
                continue
            if request.revision in (snapshot.commit, snapshot.revision) and path in running.transfer.files:
                with self._lock:
                    key = (os.getpid(), id(running))
                    transfer = self._open.get(key)
                    if transfer is None:
                        transfer = self._open[key] = OnDemand(asked, running)
                    return transfer
        return None

    def take(self) -> list[OnDemand]:
        """Return all, and know none any more."""
        with self._lock:
            transfers = [*self._replaced, *self._open.values()]
            self._replaced, self._open = [], {}
        return transfers


def end_all(transfers: Iterable[OnDemand]) -> None:
    """Wait for all files in flight, and end *transfers*.

    Raises:
        Exception: Why one of the files is not there.
    """
    failures = []
    for transfer in transfers:
        try:
            transfer.end()
        except Exception as e:  # the plain way's own
            failures.append(e)
    if failures:
        raise failures[0]


def asked_for(repo: str, revision: str, *, cache_dir: str, endpoint: str, token: str | None, symlinks: bool) -> Asked:
    """Return the request for all of *repo*, as somebody who has resolved everything himself asks for it.

    Raises:
        SettingsError: fastload does not take one of the values.
    """
    settings: dict[str, Any] = {"cache_dir": cache_dir, "endpoint": endpoint, "token": token or ""}
    if not symlinks:
        settings["symlinks"] = False
    asked = ask(repo, revision=revision, settings=settings, everything=True)
    log.debug("%s@%s: in the stead of huggingface_hub", repo, revision)
    return asked
