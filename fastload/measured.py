"""The profile of one load: a fold over its events, which says where the time went. No clock of its own."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

from .events import Event
from .phases import PHASES, Intervals, Phase, megabytes, phase_of, table

#: Events whose seconds are work of a phase.
_WORK = {
    "resolve.finished": "resolve",
    "range.landed": "download",
    "range.retried": "download",
    "write.finished": "write",
    "verify.advanced": "verify",
    "copy.finished": "device",
}


class Profile:
    """Where the time of one load went. :meth:`observe` may be called from any thread; all else may be read meanwhile.

    Attributes:
        commit: What was loaded; empty until the hub has said it.
        framework: Who built the result; ``None`` where nothing was built.
        error: Type name and message, if the load failed.
        finished: Whether it came to an end, good or bad.
        files: How many files it delivers.
        planned_bytes: Their size.
        cached_bytes: What of it lay complete in the cache.
        resumed_bytes: What of it an earlier process had left in partial files.
        retries: Attempts at ranges that failed.
        refetched: Files that were started over because their digest did not match.
        requests: HTTP requests that were made.
        result_bytes: What the load returned, as far as it is in the host's memory; 0 until it is whole.
        zero_copy_bytes: What of it are views of the weight files, and was never copied.
        pid: Of the program that loads.
        events: All events, in the order in which they were told; ``None`` unless they are kept, which takes some
            hundred bytes for each range of 8 MiB.

    Args:
        keep: Keep the events.
    """

    def __init__(self, source: str = "", *, keep: bool = False) -> None:
        self.source = source
        self.pid = os.getpid()
        self.events: list[Event] | None = [] if keep else None
        self.commit = ""
        self.framework: str | None = None
        self.error: tuple[str, str] | None = None
        self.finished = False
        self.files = 0
        self.planned_bytes = 0
        self.cached_bytes = 0
        self.resumed_bytes = 0
        self.retries = 0
        self.refetched = 0
        self.requests = 0
        self.result_bytes = 0
        self.zero_copy_bytes = 0
        self._lock = threading.Lock()
        self._started_s: float | None = None
        self._first_s: float | None = None
        self._last_s: float | None = None
        self._first_landed_s: float | None = None
        self._build_started_s: float | None = None
        self._busy = {name: Intervals() for name in PHASES}
        self._bytes = dict.fromkeys(PHASES, 0)
        self._sizes: dict[str, int] = {}
        self._waits = Intervals()
        self._counted_bytes: int | None = None

    # -- the fold ----------------------------------------------------------------------------------------------------

    def observe(self, event: Event) -> None:
        """Take in one event of this load: an :data:`~fastload.events.Observer`."""
        with self._lock:
            if self.events is not None:
                self.events.append(event)
            start_s = event.at_s - event.seconds
            if event.name not in ("load.finished", "load.failed"):
                self._first_s = start_s if self._first_s is None else min(self._first_s, start_s)
            self._last_s = event.at_s if self._last_s is None else max(self._last_s, event.at_s)
            self.retries += event.name == "range.retried"
            self.refetched += event.name == "file.refetched"
            if event.name in _WORK:
                self._busy[_WORK[event.name]].add(start_s, event.at_s)
            take = _TAKERS.get(event.name)
            if take is not None:
                take(self, event)

    def _load_started(self, event: Event) -> None:
        self._started_s = event.at_s
        self.source = event.data.get("source", self.source)
        # A load that joins a transfer is told what happened before; another load's build is not its own.
        self.finished, self.error, self.framework = False, None, None
        self._busy["build"], self._waits, self._build_started_s = Intervals(), Intervals(), None

    def _load_finished(self, event: Event) -> None:
        self.finished = True
        if self._started_s is None:
            self._started_s = event.at_s - event.seconds

    def _load_failed(self, event: Event) -> None:
        self.finished = True
        self.error = (event.data.get("error", ""), event.data.get("message", ""))
        self._close_build(event.at_s)

    def _resolved(self, event: Event) -> None:
        self.commit = event.data.get("commit", self.commit)
        self.requests = max(self.requests, event.data.get("requests", 0))

    def _planned(self, event: Event) -> None:
        size, state, path = event.data.get("bytes", 0), event.data.get("state"), event.file or ""
        if path in self._sizes:  # told again, now with what an earlier process left of it
            if state == "partial":
                self.resumed_bytes += size
            return
        self._sizes[path] = size
        self.files += 1
        self.planned_bytes += size
        if state == "cached":
            self.cached_bytes += size

    def _landed(self, event: Event) -> None:
        self._bytes["download"] += max(0, event.data.get("stop", 0) - event.data.get("start", 0))
        if self._first_landed_s is None or event.at_s < self._first_landed_s:
            self._first_landed_s = event.at_s

    def _written(self, event: Event) -> None:
        self._bytes["write"] += event.data.get("bytes", 0)

    def _verified(self, event: Event) -> None:
        self._bytes["verify"] += event.data.get("bytes", 0)

    def _copied(self, event: Event) -> None:
        self._bytes["device"] += event.data.get("bytes", 0)

    def _transferred(self, event: Event) -> None:
        self._counted_bytes = event.data.get("bytes", self._counted_bytes)
        self.requests = max(self.requests, event.data.get("requests", 0))  # those of resolve included

    def _build_started(self, event: Event) -> None:
        self._close_build(event.at_s)
        self._build_started_s = event.at_s
        self.framework = event.data.get("framework", self.framework)

    def _build_finished(self, event: Event) -> None:
        if self._build_started_s is None:
            self._build_started_s = event.at_s - event.seconds
        self._close_build(event.at_s)

    def _build_waited(self, event: Event) -> None:
        self._waits.add(event.at_s - event.seconds, event.at_s)

    def _result(self, event: Event) -> None:
        self.result_bytes = event.data.get("bytes", 0)
        self.zero_copy_bytes = event.data.get("zero_copy_bytes", 0)

    def _close_build(self, at_s: float) -> None:
        if self._build_started_s is not None:
            self._busy["build"].add(self._build_started_s, at_s)
            self._build_started_s = None

    # -- what came of it ---------------------------------------------------------------------------------------------

    @property
    def ok(self) -> bool:
        """Whether it came to a good end."""
        return self.finished and self.error is None

    @property
    def total_s(self) -> float:
        """Seconds from the call to its end, or to the newest event while it runs."""
        with self._lock:
            start_s, stop_s = self._window()
            return stop_s - start_s

    @property
    def started_s(self) -> float:
        """When the load was asked for, CLOCK_MONOTONIC: what all times of :attr:`phases` are counted from."""
        with self._lock:
            return self._window()[0]

    @property
    def first_byte_s(self) -> float | None:
        """Seconds from the call until the first range had landed; ``None`` where nothing travelled."""
        with self._lock:
            return None if self._first_landed_s is None else self._first_landed_s - self._window()[0]

    @property
    def waited_s(self) -> float:
        """Seconds in which the build, or another reader, waited for bytes; several threads at once count once."""
        with self._lock:
            return self._waits.seconds

    @property
    def waits(self) -> tuple[tuple[float, float], ...]:
        """When readers waited for bytes, in seconds since the load was asked for."""
        with self._lock:
            start_s = self._window()[0]
            return tuple((a - start_s, b - start_s) for a, b in self._waits)

    @property
    def travelled_bytes(self) -> int:
        """Bytes that came over the network for this load, repeated ones included."""
        with self._lock:
            return self._bytes["download"] if self._counted_bytes is None else self._counted_bytes

    @property
    def zero_copy_share(self) -> float | None:
        """Share of the result's bytes that were never copied, 0 to 1; ``None`` where there is no result on the host."""
        return self.zero_copy_bytes / self.result_bytes if self.result_bytes else None

    @property
    def phases(self) -> tuple[Phase, ...]:
        """The phases that there were, in the order of :data:`PHASES`."""
        with self._lock:
            window = self._window()
            busy = {name: Intervals(intervals) for name, intervals in self._busy.items()}
            if self._build_started_s is not None:
                busy["build"].add(self._build_started_s, max(window[1], self._build_started_s))
            busy["build"] = busy["build"].without(self._waits)
            counts = dict(self._bytes)
        found = []
        for name in PHASES:
            if busy[name]:
                others = Intervals(pair for other in PHASES if other != name for pair in busy[other])
                found.append(phase_of(name, busy[name], others, window, counts[name]))
        return tuple(found)

    def phase(self, name: str) -> Phase | None:
        """Return the phase *name*, if there was one."""
        return next((p for p in self.phases if p.name == name), None)

    @property
    def idle_s(self) -> float:
        """Seconds of the load in which no phase was busy: imports, waiting between attempts, other processes."""
        busy = Intervals(pair for phase in self.phases for pair in phase.intervals)
        total_s = self.total_s
        return max(0.0, total_s - busy.within(0.0, total_s).seconds)

    def _window(self) -> tuple[float, float]:
        start_s = self._started_s if self._started_s is not None else self._first_s
        if start_s is None or self._last_s is None:
            return 0.0, 0.0
        return start_s, max(start_s, self._last_s)

    def to_record(self) -> dict[str, Any]:
        """Return plain data, for JSON."""
        return {
            "source": self.source,
            "commit": self.commit,
            "framework": self.framework,
            "ok": self.ok,
            "finished": self.finished,
            "error": None if self.error is None else {"type": self.error[0], "message": self.error[1]},
            "total_s": self.total_s,
            "first_byte_s": self.first_byte_s,
            "waited_s": self.waited_s,
            "idle_s": self.idle_s,
            "files": self.files,
            "planned_bytes": self.planned_bytes,
            "cached_bytes": self.cached_bytes,
            "resumed_bytes": self.resumed_bytes,
            "travelled_bytes": self.travelled_bytes,
            "requests": self.requests,
            "retries": self.retries,
            "refetched": self.refetched,
            "result_bytes": self.result_bytes,
            "zero_copy_bytes": self.zero_copy_bytes,
            "phases": [phase.to_record() for phase in self.phases],
        }

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def lines(self) -> Iterator[str]:
        """Yield one line about the load, then a table of its phases."""
        state = "failed after" if self.error else "ready after" if self.finished else "running for"
        parts = [f"{state} {self.total_s:.2f} s", f"{megabytes(self.travelled_bytes)} MB travelled"]
        if self.cached_bytes:
            parts.append(f"{megabytes(self.cached_bytes)} MB from the cache")
        if self.resumed_bytes:
            parts.append(f"{megabytes(self.resumed_bytes)} MB resumed")
        if self.first_byte_s is not None:
            parts.append(f"first bytes after {self.first_byte_s:.2f} s")
        parts.append(f"{self.requests} requests, {self.retries} retries")
        if self.refetched:
            parts.append(f"{self.refetched} files refetched")
        yield f"{self.source or 'load'}: {', '.join(parts)}"
        for line in table(self.phases):
            yield f"  {line}"
        if self.zero_copy_share is not None:
            yield f"  never copied: {self.zero_copy_share:.1%} of the {megabytes(self.result_bytes)} MB returned"
        if self.waited_s:
            yield f"  readers waited for bytes: {self.waited_s:.2f} s"
        if self.idle_s >= 0.01:
            yield f"  no phase was busy: {self.idle_s:.2f} s"
        if self.error is not None:
            yield f"  {self.error[0]}: {self.error[1]}"


_TAKERS: dict[str, Callable[[Profile, Event], None]] = {
    "load.started": Profile._load_started,
    "load.finished": Profile._load_finished,
    "load.failed": Profile._load_failed,
    "resolve.finished": Profile._resolved,
    "file.planned": Profile._planned,
    "range.landed": Profile._landed,
    "write.finished": Profile._written,
    "verify.advanced": Profile._verified,
    "copy.finished": Profile._copied,
    "transfer.finished": Profile._transferred,
    "build.started": Profile._build_started,
    "build.finished": Profile._build_finished,
    "build.waited": Profile._build_waited,
    "result.measured": Profile._result,
}
