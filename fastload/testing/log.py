"""What a hub was asked and what it answered."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from .faults import Origin


@dataclass(frozen=True, slots=True)
class Request:
    """One request to a hub, as it stood when the record was made.

    Attributes:
        path: Of the URL, decoded, without the query.
        file: Path in the repository, where a file was asked for.
        range: The Range header.
        status: 0 before the head of the answer went out.
        bytes_sent: Of the body. A chunk counts before it is written, so that who holds the last byte sees all of them.
        headers: Of the request, names in lower case; ``authorization`` is kept, for tests against leaks.
        connection: Number of the TCP connection; kept-alive connections show the same one again.
        faults: Kinds of the faults that hit it.
        held: A ``stall``, ``hold`` or ``hang`` stops it at this moment.
        started_s: CLOCK_MONOTONIC.
        ended_s: ``None`` while it runs.
    """

    origin: Origin
    method: str
    path: str
    query: str
    file: str | None
    range: str | None
    status: int
    bytes_sent: int
    headers: Mapping[str, str]
    connection: int
    faults: tuple[str, ...]
    held: bool
    started_s: float
    ended_s: float | None

    def to_record(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)


@dataclass(slots=True)
class Exchange:
    """A request while it is answered; belongs to the hub's event loop."""

    origin: Origin
    method: str
    path: str
    query: str
    file: str | None
    headers: Mapping[str, str]
    connection: int
    status: int = 0
    bytes_sent: int = 0
    faults: list[str] = field(default_factory=list)
    held: bool = False
    started_s: float = field(default_factory=time.monotonic)
    ended_s: float | None = None

    def freeze(self) -> Request:
        """Return how it stands."""
        return Request(
            self.origin, self.method, self.path, self.query, self.file, self.headers.get("range"), self.status,
            self.bytes_sent, self.headers, self.connection, tuple(self.faults), self.held, self.started_s, self.ended_s,
        )  # fmt: skip


class RequestLog:
    """All exchanges of a hub, in order of arrival. Thread-safe."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._exchanges: list[Exchange] = []

    def begin(self, exchange: Exchange) -> None:
        """Add *exchange*."""
        with self._changed:
            self._exchanges.append(exchange)
            self._changed.notify_all()

    def changed(self) -> None:
        """Let those look again who wait."""
        with self._changed:
            self._changed.notify_all()

    def end(self, exchange: Exchange) -> None:
        """Note that the answer is out, or that the connection is gone."""
        with self._changed:
            exchange.ended_s = time.monotonic()
            exchange.held = False
            self._changed.notify_all()

    def requests(self) -> list[Request]:
        """Return all of them as they stand."""
        with self._changed:
            return [e.freeze() for e in self._exchanges]

    def clear(self) -> None:
        """Forget all of them."""
        with self._changed:
            self._exchanges = []

    def wait(self, predicate: Callable[[list[Request]], object], timeout_s: float) -> bool:
        """Wait until *predicate* holds for the requests; tell whether it did within *timeout_s*."""
        with self._changed:
            return bool(self._changed.wait_for(lambda: predicate([e.freeze() for e in self._exchanges]), timeout_s))
