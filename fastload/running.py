"""Transfers that are under way in this process, and how a load joins one."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterable
from typing import Any

from .ahead import ahead
from .asking import Asked
from .athand import deliver
from .carrier import Carrier
from .errors import FastloadError
from .events import Events, Observer, log
from .garbage import rarely
from .rendezvous import Joined, call
from .settings import Settings
from .standby import Standby
from .sync import InThread
from .transfer import Transfer
from .types import Snapshot
from .worker import Child


class Running:
    """A transfer that :func:`fastload.start` began. Later loads of the same model in this process join it.

    Thread-safe. Ends by itself when everything is verified and in the cache.
    """

    def __init__(
        self,
        asked: Asked,
        *,
        process: bool,
        settle: bool = False,
        connection: socket.socket | None = None,
        standby: Standby | None = None,
    ) -> None:
        self._asked = asked
        self.transfer = Transfer(Events(keep=True))
        self._carrier = self._carry(process, settle, connection, standby)
        with _lock:
            _at_work[:] = [running for running in _at_work if not running._carrier.ended]
            _at_work.append(self)

    def _carry(self, process: bool, settle: bool, connection: socket.socket | None, standby: Standby | None) -> Carrier:
        asked = self._asked
        cold = deliver(asked.request, asked.settings, asked.pm, self.transfer.apply)
        if cold is not None:
            if connection is not None:
                connection.close()
            return ahead(cold, asked.settings) or Carrier()
        if connection is not None:
            return Joined(asked, self.transfer, connection, lambda: self._make(process, settle))
        return self._make(process, settle, standby)

    def _make(self, process: bool, settle: bool, standby: Standby | None = None) -> Carrier:
        asked = self._asked
        if process and asked.settings.process is not False:
            try:
                return Child(asked.request, asked.settings, self.transfer, standby)
            except OSError as e:
                _warn_once(e)
        return InThread(asked.request, asked.settings, self.transfer, asked.pm, settle=settle)

    @property
    def source(self) -> str:
        """As the user wrote it."""
        return self._asked.request.source

    def serves(self, source: str, settings: Settings) -> bool:
        """Tell whether it fetches *source* from the same hub into the same cache."""
        name = self._asked.request.source.removeprefix("hf://").partition("@")[0]
        mine = self._asked.settings
        return name == source and (mine.cache_dir, mine.endpoint) == (settings.cache_dir, settings.endpoint)

    @property
    def done(self) -> bool:
        """Whether everything is verified and in the cache."""
        return self.transfer.finished

    @property
    def failed(self) -> bool:
        """Whether it has ended early; :meth:`wait` raises why."""
        return self.transfer.error is not None

    def wait(self) -> Snapshot:
        """Block until everything is verified and in the cache.

        Raises:
            FastloadError: Why it is not.
        """
        self.transfer.wait(lambda: self.transfer.finished)
        return self.transfer.wait_manifest()

    def cancel(self) -> None:
        """End it; what has landed is kept for the next transfer. Loads that joined it fail."""
        self._carrier.stop()
        self.transfer.close()

    def want(self, path: str) -> None:
        """Let a transfer on demand deliver *path*; waits for the manifest. All others deliver it anyway.

        Raises:
            FastloadError: The transfer failed.
        """
        self.transfer.wait_manifest()
        if self._asked.request.on_demand:
            self._carrier.want([path])

    def join(self) -> None:
        """As :meth:`wait`, without raising, and until its process or thread is gone."""
        self._carrier.join()

    def rest(self, timeout_s: float) -> bool:
        """Wait up to *timeout_s* for the end of what is under way; tell whether its process or thread is gone."""
        return self._carrier.rest(timeout_s)

    def observe(self, observers: Iterable[Observer]) -> None:
        """Hand all events, those of before included, to *observers*."""
        for observer in observers:
            self.transfer.events.add(observer)

    def forget(self, observers: Iterable[Observer]) -> None:
        """Hand no further events to *observers*."""
        for observer in observers:
            self.transfer.events.remove(observer)


_lock = threading.RLock()
_started: dict[tuple[Any, ...], Running] = {}
#: Those whose process or thread was there when the last one began.
_at_work: list[Running] = []
#: What the transfers of `fastload exec` have been asked for: once each, later loads ask the hub.
_called: set[tuple[Any, ...]] = set()
_warned = False


def _forked() -> None:
    """The parent's transfers are the parent's, and its other threads, one of which may hold the lock, are not here."""
    global _lock
    _lock = threading.RLock()
    _started.clear()
    _at_work.clear()
    _called.clear()


os.register_at_fork(after_in_child=_forked)


def begin(asked: Asked, standby: Standby | None = None) -> Running:
    """Start a transfer in a process of its own, or in *standby*, and let later loads of this process join it."""
    if asked.settings.pause_gc:
        rarely.begin()
    with _lock:
        running = _started.get(asked.key)
        if running is None or running.failed:
            running = _started[asked.key] = _launched(asked) or Running(asked, process=True, standby=standby)
    running.observe(asked.observers)
    return running


def join(asked: Asked) -> Running | None:
    """Return the transfer that :func:`begin`, or ``fastload exec``, started for the same thing, if it has not failed.

    It is forgotten: who asks again asks the hub.
    """
    with _lock:
        running = _started.pop(asked.key, None) or _started.pop(asked.key_of_more, None)
    if running is None:
        return _launched(asked)
    return None if running.failed else running


def _launched(asked: Asked) -> Running | None:
    if asked.settings.process is False:
        return None
    with _lock:
        known = asked.key in _called
        _called.add(asked.key)
    connection = None if known else call()
    return None if connection is None else Running(asked, process=True, connection=connection)


def started(source: str, settings: Settings) -> list[Running]:
    """Return the transfers that :func:`begin` started of *source* for the same cache and hub, and that have not failed."""
    with _lock:
        found = [r for r in _started.values() if r.serves(source, settings) and not r.failed]
    return found


def quiesce(timeout_s: float = 60.0) -> None:
    """Return once fastload has nothing at work in this process: no child, thread, socket, lock or open file.

    For whatever comes after a load and wants a quiet process: a checkpoint of it (CRIU, cuda-checkpoint), a snapshot of
    its machine, a fork. A transfer under way is waited for; so is the disk, which may take a second after a load has
    returned. What a load returned stays as it is: its memory may be a mapping of files of the cache, which Python keeps
    open. Streams are their user's to close. Thread-safe, blocks.

    Raises:
        FastloadError: Something is still at work after *timeout_s* seconds.
    """
    until_s = time.monotonic() + timeout_s
    with _lock:
        waiting = list(_at_work)
    busy = [running for running in waiting if not running.rest(max(0.0, until_s - time.monotonic()))]
    with _lock:
        _at_work[:] = [running for running in _at_work if running not in waiting or running in busy]
    if busy:
        names = ", ".join(sorted({running.source for running in busy}))
        raise FastloadError(
            f"{len(busy)} transfers are still under way after {timeout_s:g} s: {names}",
            hint="wait for them (fastload.start(...).wait()), end them (.cancel()), or give timeout_s more",
        )


def _warn_once(error: OSError) -> None:
    global _warned
    if not _warned:
        _warned = True
        log.warning(
            "no transfer process can be started (%s): transfers run in this process, and slower beside imports", error
        )
