"""One stream of events: log lines, progress, profile and status are observers of it.

Times are seconds of CLOCK_MONOTONIC, which all processes of a machine share, so that what the transfer process did and
what the program did can be laid on one axis.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

log = logging.getLogger("fastload")


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened in one load.

    Attributes:
        name: One of the names below, ``phase.what``.
        at_s: When it ended (or happened), CLOCK_MONOTONIC.
        seconds: How long it took; 0 for a moment.
        file: Relative path, where it concerns one file.
        data: Further plain values, named in the table.

    ======================  =====================================================================
    ``load.started``        the program asked; data: source
    ``load.finished``       everything is delivered and verified; data: seconds since load.started
    ``load.failed``         data: error (type name), message
    ``resolve.finished``    the manifest is there; data: commit, files, bytes, requests
    ``file.planned``        a file will be delivered; data: bytes, state (cached, missing, elsewhere: another process
                            fetches it); once more with state partial and the bytes that an earlier run left
    ``range.landed``        a range is in the file; data: start, stop, mirror, attempts
    ``range.retried``       one attempt failed; data: start, stop, mirror, reason, wait_s
    ``write.finished``      a range was written to disk; data: bytes
    ``verify.advanced``     part of a file was hashed; data: bytes
    ``file.verified``       the digest matched and the file is in the cache; data: bytes
    ``file.refetched``      the digest did not match; data: mirror, expected, actual
    ``transfer.started``    the engine begins; data: pid (of its process)
    ``transfer.finished``   the last file is verified; data: bytes (travelled), requests
    ``build.started``       the framework begins; data: framework
    ``build.finished``      the framework's object is there
    ``result.measured``     what was built or collected; data: bytes (in the host's memory), zero_copy_bytes (those that
                            are views of the weight files)
    ``build.waited``        the framework waited for bytes; data: start, stop
    ``copy.finished``       bytes of a slot are on a device; seconds since the slot was taken; data: bytes, device, slot,
                            read_s (filling the slot), queued_s (until the copies before it were over)
    ======================  =====================================================================
    """

    name: str
    at_s: float
    seconds: float = 0.0
    file: str | None = None
    data: Mapping[str, Any] = field(default_factory=dict)

    def to_record(self) -> dict[str, Any]:
        """Return plain data, short names left out where empty."""
        record: dict[str, Any] = {"name": self.name, "at_s": self.at_s}
        if self.seconds:
            record["seconds"] = self.seconds
        if self.file is not None:
            record["file"] = self.file
        if self.data:
            record["data"] = dict(self.data)
        return record

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Event:
        """Return what :meth:`to_record` wrote."""
        return cls(**record)


#: Receives every event of a load, in the thread in which it was noticed; must return within microseconds.
Observer = Callable[[Event], None]


class Events:
    """Hands each event to all observers; one that raises is dropped with a warning and cannot fail a load. Thread-safe.

    Args:
        keep: Remember all events, and hand those of before to observers that come later.
    """

    def __init__(
        self, observers: Iterable[Observer] = (), clock: Callable[[], float] = time.monotonic, *, keep: bool = False
    ) -> None:
        self._observers = list(observers)
        self._kept: list[Event] | None = [] if keep else None
        self._lock = threading.RLock()
        self.clock = clock

    def add(self, observer: Observer) -> None:
        """Hand all further events (and those that were kept) to *observer* too."""
        with self._lock:
            for event in self._kept or ():
                self._tell(observer, event)
            self._observers.append(observer)

    def remove(self, observer: Observer) -> None:
        """Hand no further events to *observer*; harmless when it was dropped before."""
        with self._lock:
            self._observers = [o for o in self._observers if o != observer]

    def emit(self, name: str, *, file: str | None = None, seconds: float = 0.0, **data: Any) -> None:
        """Tell all observers that *name* happened now."""
        self.pass_on(Event(name, self.clock(), seconds, file, data))

    def pass_on(self, event: Event) -> None:
        """Hand *event*, made here or in another process, to all observers."""
        with self._lock:
            if self._kept is not None:
                self._kept.append(event)
            dropped = [o for o in self._observers if not self._tell(o, event)]
            for observer in dropped:
                self.remove(observer)

    def _tell(self, observer: Observer, event: Event) -> bool:
        try:
            observer(event)
        except Exception:  # an observer is a stranger's code: whatever it raises, the load goes on
            log.warning("observer %r raised and is dropped", observer, exc_info=True)
            return False
        return True

    @contextmanager
    def span(self, name: str, *, file: str | None = None, **data: Any) -> Iterator[dict[str, Any]]:
        """Emit *name* with the seconds that the block took, unless it raised; the block may add to the data."""
        started_s = self.clock()
        yield data
        self.emit(name, file=file, seconds=self.clock() - started_s, **data)
