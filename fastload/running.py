"""Transfers that are under way in this process, and how a load joins one."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable
from typing import Any, Protocol

from .asking import Asked
from .events import Events, Observer, log
from .sync import InThread
from .transfer import Transfer
from .types import Snapshot
from .worker import Child, executable


class _Carrier(Protocol):
    def join(self) -> None: ...
    def stop(self) -> None: ...


class Running:
    """A transfer that :func:`fastload.start` began. Later loads of the same model in this process join it.

    Thread-safe. Ends by itself when everything is verified and in the cache.
    """

    def __init__(self, asked: Asked, *, process: bool, settle: bool = False) -> None:
        self._asked = asked
        self._users = 0
        self.transfer = Transfer(Events(keep=True))
        self._carrier = self._carry(process, settle)

    def _carry(self, process: bool, settle: bool) -> _Carrier:
        asked = self._asked
        if process and asked.settings.process:
            try:
                if executable() is None:
                    raise OSError("this interpreter does not know its own executable")
                return Child(asked.request, asked.settings, self.transfer)
            except OSError as e:
                _warn_once(e)
        return InThread(asked.request, asked.settings, self.transfer, asked.pm, settle=settle)

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

    def join(self) -> None:
        """As :meth:`wait`, without raising, and until its process or thread is gone."""
        self._carrier.join()

    def observe(self, observers: Iterable[Observer]) -> None:
        """Hand all events, those of before included, to *observers*."""
        for observer in observers:
            self.transfer.events.add(observer)

    def forget(self, observers: Iterable[Observer]) -> None:
        """Hand no further events to *observers*."""
        for observer in observers:
            self.transfer.events.remove(observer)


_lock = threading.Lock()
_started: dict[tuple[Any, ...], Running] = {}
_warned = False


def _forked() -> None:
    """The parent's transfers are the parent's, and its other threads, one of which may hold the lock, are not here."""
    global _lock
    _lock = threading.Lock()
    _started.clear()


os.register_at_fork(after_in_child=_forked)


def begin(asked: Asked) -> Running:
    """Start a transfer in a process of its own and let later loads of this process join it."""
    with _lock:
        running = _started.get(asked.key)
        if running is None or running.failed:
            running = _started[asked.key] = Running(asked, process=True)
    running.observe(asked.observers)
    return running


def join(asked: Asked) -> Running | None:
    """Return the transfer that :func:`begin` started for the same thing, if it has not failed; forget it there."""
    with _lock:
        running = _started.pop(asked.key, None) or _started.pop(asked.key_of_more, None)
    return running if running is not None and not running.failed else None


def _warn_once(error: OSError) -> None:
    global _warned
    if not _warned:
        _warned = True
        log.warning(
            "no transfer process can be started (%s): transfers run in this process, and slower beside imports", error
        )
