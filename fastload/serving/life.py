"""The life of a supervised app: in which state it is, and when that changes. No I/O; the clock is injected.

asleep ──wake──▶ starting ──first output──▶ ready ──idle──▶ stopping ──▶ asleep
                    │ ▲                       │
              fails │ │ wake, after a pause   │ crashes
                    ▼ │                       │
                   failed ◀───────────────────┘
"""

from __future__ import annotations

import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from ..errors import FastloadError

State = Literal["asleep", "starting", "ready", "stopping", "failed"]

#: Guessed: pause before the start that follows the first failure; doubles with each further one.
_FIRST_PAUSE_S = 1.0
_LONGEST_PAUSE_S = 60.0
#: Reasoned: an app that was ready for as long as the longest pause is not one that cannot start.
_SOUND_S = _LONGEST_PAUSE_S
#: Guessed: what a client is told to wait before anybody knows how long a start takes.
_RETRY_AFTER_S = 5
#: Guessed: starts that are remembered, for the page and for the estimate.
_REMEMBERED = 20


@dataclass(slots=True)
class Total:
    """How many there were, and how long they took together."""

    count: int = 0
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """One start and how it ended.

    Attributes:
        at_unix_s: When it began, seconds since 1970.
        seconds: Until the first output, or the failure.
        error: Why it failed; ``None`` where it did not.
    """

    at_unix_s: float
    seconds: float
    error: str | None = None


class Life:
    """State, wishes and counts. One thread (the event loop's) uses it.

    Attributes:
        state: See above.
        since_s: When it got into that state, on *clock*.
        wanted: Somebody woke it, and it has not been started since.
        draining: The supervisor itself is to end: nothing starts any more.
        error: Why it failed; stays until the next start has come to a good end.
        failures: Starts and lives that ended badly, one after another.
        crashes: As *failures*, all of them.
        attempt: Number of the newest start.
        starts: The newest outcomes.
        totals: All outcomes, ``ok`` and ``failed``.
        in_flight: Requests that are with the app.
        changed: Called at every change.

    Args:
        idle_s: After so long without a request a ready app is idle; 0: never.
        clock: Seconds.
        unix_clock: Seconds since 1970.
    """

    def __init__(
        self,
        *,
        idle_s: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
        unix_clock: Callable[[], float] = time.time,
    ) -> None:
        self.clock = clock
        self.state: State = "asleep"
        self.since_s = clock()
        self.wanted = False
        self.draining = False
        self.error: FastloadError | None = None
        self.failures = 0
        self.crashes = 0
        self.attempt = 0
        self.starts: deque[Outcome] = deque(maxlen=_REMEMBERED)
        self.totals = {"ok": Total(), "failed": Total()}
        self.in_flight = 0
        self.changed: Callable[[], object] = lambda: None
        self._idle_s = idle_s
        self._unix_clock = unix_clock
        self._started_s = self._started_unix_s = 0.0
        self._not_before_s = clock()
        self._used_s = clock()

    # -- wishes -------------------------------------------------------------------------------------------------------

    def wake(self) -> bool:
        """Ask for it to be started, unless it is up or on its way; tell whether that was news."""
        self._used_s = self.clock()
        if self.wanted or self.draining or self.state in ("starting", "ready"):
            return False
        self.wanted = True
        self.changed()
        return True

    def drain(self) -> None:
        """Start nothing any more."""
        self.draining, self.wanted = True, False
        self.changed()

    @contextmanager
    def request(self) -> Iterator[None]:
        """Count a request that is with the app while the block runs: it keeps the app from being idle."""
        self.in_flight += 1
        self.changed()
        try:
            yield
        finally:
            self.in_flight -= 1
            self._used_s = self.clock()
            self.changed()

    # -- what happens to it -------------------------------------------------------------------------------------------

    def starting(self) -> None:
        """A start begins."""
        self.wanted = False
        self.attempt += 1
        self._started_s, self._started_unix_s = self.clock(), self._unix_clock()
        self._become("starting")

    def ready(self) -> None:
        """The first output was right."""
        self._remember(None)
        self.error = None
        self._used_s = self.clock()
        self._become("ready")

    def failed(self, error: FastloadError) -> None:
        """The start failed, or what was ready is gone."""
        now_s = self.clock()
        if self.state == "ready" and now_s - self.since_s >= _SOUND_S:
            self.failures = 0
        if self.state == "starting":
            self._remember(error.message)
        self.failures += 1
        self.crashes += 1
        self.error = error
        self._not_before_s = now_s + min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2.0 ** min(self.failures - 1, 16))
        self._become("failed")

    def stopping(self) -> None:
        """It was told to end."""
        self._become("stopping")

    def asleep(self) -> None:
        """It has ended, as it was told."""
        self.failures = 0
        self._become("asleep")

    def _become(self, state: State) -> None:
        self.state, self.since_s = state, self.clock()
        self.changed()

    def _remember(self, error: str | None) -> None:
        seconds = self.clock() - self._started_s
        self.starts.append(Outcome(self._started_unix_s, seconds, error))
        total = self.totals["ok" if error is None else "failed"]
        total.count, total.seconds = total.count + 1, total.seconds + seconds

    # -- when ---------------------------------------------------------------------------------------------------------

    @property
    def pause_s(self) -> float:
        """Seconds until it may be started (again); 0: now."""
        return max(0.0, self._not_before_s - self.clock()) if self.failures else 0.0

    @property
    def idle_in_s(self) -> float | None:
        """Seconds until a ready app is idle, 0 when it is; ``None`` where it never will be, or is in use."""
        if not self._idle_s or self.state != "ready" or self.in_flight:
            return None
        return max(0.0, self._used_s + self._idle_s - self.clock())

    @property
    def usual_s(self) -> float | None:
        """The median of the starts that came to a good end."""
        good = [start.seconds for start in self.starts if start.error is None]
        return statistics.median(good) if good else None

    @property
    def eta_s(self) -> float | None:
        """Seconds until it is ready, by what is usual; ``None`` where nobody knows or nobody is starting it."""
        usual_s = self.usual_s
        if usual_s is None or not (self.wanted or self.state == "starting"):
            return None
        return max(0.0, usual_s - (self.clock() - self._started_s if self.state == "starting" else 0.0))

    @property
    def retry_after_s(self) -> int:
        """Whole seconds for a ``Retry-After``: until it is ready, as far as anybody knows."""
        eta_s = self.usual_s if self.eta_s is None else self.eta_s
        return max(1, math.ceil((_RETRY_AFTER_S if eta_s is None else eta_s) + self.pause_s))

    def to_record(self) -> dict[str, Any]:
        """Return plain data."""
        error = self.error
        return {
            "state": "draining" if self.draining else self.state,
            "for_s": self.clock() - self.since_s,
            "wanted": self.wanted,
            "eta_s": self.eta_s,
            "pause_s": self.pause_s if self.state == "failed" else 0.0,
            "idle_in_s": self.idle_in_s,
            "attempt": self.attempt,
            "failures": self.failures,
            "error": None if error is None else {"message": error.message, "hint": error.hint},
            "starts": [{"at_unix_s": s.at_unix_s, "seconds": s.seconds, "error": s.error} for s in self.starts],
        }
