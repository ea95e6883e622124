"""One start as it is seen from outside: files, rates and phases, folded from the events of transfers and loads. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ..builtin.progress import Tally
from ..events import Event
from ..phases import PHASES, Intervals

#: In the order in which they are drawn; the middle ones are those of :mod:`fastload.phases`.
ROWS = ("process", "imports", "hook", *PHASES, "warm-up")
#: Events whose seconds are work of a phase.
_WORK = {
    "resolve.finished": "resolve",
    "range.landed": "download",
    "range.retried": "download",
    "write.finished": "write",
    "verify.advanced": "verify",
    "copy.finished": "device",
}
#: Guessed: points of the curve of rates.
_BINS = 120
_FIRST_BIN_S = 0.25
#: Guessed: what "now" means for a rate. Ranges take about a second each and are told when they have landed.
_NOW_S = 2.0
#: Guessed: more rows say less; the rest is counted.
_MAX_FILES = 200
#: Reasoned: a gap narrower than this share of the axis is narrower than a pixel.
_FINEST = 1 / 1000


class Rates:
    """Bytes over time, in at most 120 steps of equal length, which grow with the time. Not thread-safe.

    Attributes:
        told_s: Until when all is known: bytes are told of when their range has landed, and others are on their way.

    Args:
        start_s: Where the first step begins.
    """

    def __init__(self, start_s: float) -> None:
        self.start_s = start_s
        self.bin_s = _FIRST_BIN_S
        self.told_s = start_s
        self._bins: list[float] = []

    def add(self, start_s: float, stop_s: float, count: int) -> None:
        """Take in *count* bytes that came evenly between *start_s* and *stop_s*."""
        self.told_s = max(self.told_s, start_s)
        a, b = max(0.0, start_s - self.start_s), max(0.0, stop_s - self.start_s)
        while b >= _BINS * self.bin_s:
            self._bins = [sum(self._bins[n : n + 2]) for n in range(0, len(self._bins), 2)]
            self.bin_s *= 2
        first, last = int(a / self.bin_s), int(b / self.bin_s)
        self._bins += [0.0] * (last + 1 - len(self._bins))
        for n in range(first, last + 1):
            inside_s = min(b, (n + 1) * self.bin_s) - max(a, n * self.bin_s)
            self._bins[n] += count * (inside_s / (b - a) if b > a else 1.0)

    def per_s(self, stop_s: float) -> list[float]:
        """Return bytes per second for each step until *stop_s*."""
        steps = min(_BINS, int(max(0.0, stop_s - self.start_s) / self.bin_s) + 1)
        return [count / self.bin_s for count in (self._bins + [0.0] * steps)[:steps]]

    def now_per_s(self) -> float:
        """Return bytes per second of the newest two seconds that are known (of two steps, where those are longer).

        0 until something has come for so long: one small file says nothing about the rate.
        """
        window_s = max(_NOW_S, 2 * self.bin_s)
        first = next((n for n, count in enumerate(self._bins) if count), None)
        stop = (self.told_s - self.start_s) / self.bin_s
        start = stop - window_s / self.bin_s
        if first is None or start < first:
            return 0.0
        inside = (max(0.0, min(n + 1, stop) - max(n, start)) for n in range(len(self._bins)))
        return sum(count * part for count, part in zip(self._bins, inside, strict=True)) / window_s


class Model:
    """What is known of one model that travels or is loaded. Not thread-safe."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.commit = ""
        self.error: str | None = None
        self.tally = Tally()
        self._elsewhere: set[str] = set()
        self._cached: set[str] = set()

    def observe(self, event: Event) -> None:
        """Take in one event."""
        if event.name == "resolve.finished":
            self.commit, self.error = event.data.get("commit", self.commit), None
        elif event.name == "load.failed":
            self.error = str(event.data.get("message", ""))
        elif event.name == "file.planned" and event.file is not None:
            state = event.data.get("state")
            if state == "cached" and not self.tally.landed.get(event.file):
                self._cached.add(event.file)
            (self._elsewhere.add if state == "elsewhere" else self._elsewhere.discard)(event.file)
        self.tally.observe(event)

    @property
    def cached_bytes(self) -> int:
        """What lay in the cache and needed no travel."""
        return sum(self.tally.sizes[file] for file in self._cached)

    def to_record(self) -> dict[str, Any]:
        """Return plain data."""
        tally = self.tally
        shown = set(sorted(tally.sizes, key=lambda file: -tally.sizes[file])[:_MAX_FILES])
        return {
            "source": self.source,
            "commit": self.commit,
            "error": self.error,
            "total_bytes": tally.total_bytes,
            "landed_bytes": tally.landed_bytes,
            "travelled_bytes": tally.travelled_bytes,
            "cached_bytes": self.cached_bytes,
            "retries": tally.retries,
            "files": [
                {"path": f, "bytes": size, "landed_bytes": tally.landed.get(f, 0), "state": self._state(f)}
                for f, size in tally.sizes.items()
                if f in shown
            ],
            "more_files": len(tally.sizes) - len(shown),
        }

    def _state(self, file: str) -> str:
        if file in self.tally.done:
            return "cached" if file in self._cached else "verified"
        if self.tally.landed.get(file):
            return "arriving"
        return "elsewhere" if file in self._elsewhere else "waiting"


class Progress:
    """All that is known of one start. One thread (the event loop's) uses it; times are CLOCK_MONOTONIC.

    Attributes:
        began_s: When somebody woke it.
        ended_s: When it was ready, or had failed; ``None`` while it is on its way.

    Args:
        sources: Models that are to be fetched, so that they are listed before anything is known of them.
    """

    def __init__(self, began_s: float, sources: Iterable[str] = ()) -> None:
        self.began_s = began_s
        self.ended_s: float | None = None
        self.models = {source: Model(source) for source in sources}
        self.rates = Rates(began_s)
        self._spans: dict[str, Intervals] = {}
        self._waits = Intervals()
        self._open: dict[str, float] = {}

    def observe(self, source: str, event: Event) -> None:
        """Take in one event of *source*: a transfer of ours and a load in the app both tell of the same files."""
        model = self.models.get(source) or self.models.setdefault(source, Model(source))
        model.observe(event)
        start_s = event.at_s - event.seconds
        if event.name in _WORK:
            self.phase(_WORK[event.name], start_s, event.at_s)
        elif event.name == "build.started":
            self.phase("build", event.at_s, None)
        elif event.name in ("build.finished", "load.failed"):
            self.close("build", event.at_s)
        elif event.name == "build.waited":
            self._waits.add(start_s, event.at_s)
        if event.name == "range.landed":
            count = event.data.get("stop", 0) - event.data.get("start", 0)
            self.rates.add(start_s, event.at_s, max(0, count))

    def fail_transfer(self, source: str, message: str) -> None:
        """Note that a transfer of ours failed; the app may load the model all the same."""
        self.models.setdefault(source, Model(source)).error = message

    def phase(self, name: str, start_s: float, stop_s: float | None) -> None:
        """Note when a phase was busy; without *stop_s* it has begun and lasts."""
        if stop_s is None:
            self._open[name] = start_s
        else:
            self._open.pop(name, None)
            self._spans.setdefault(name, Intervals()).add(start_s, stop_s)

    def close(self, name: str, at_s: float) -> None:
        """Note that the phase *name* is over, if it has begun."""
        if name in self._open:
            self.phase(name, self._open[name], at_s)

    def end(self, at_s: float) -> None:
        """The start is over, well or not. Only the first time counts."""
        if self.ended_s is None:
            for name in tuple(self._open):
                self.close(name, at_s)
            self.ended_s = at_s

    @property
    def travelled_bytes(self) -> int:
        """What came over the network."""
        return sum(model.tally.travelled_bytes for model in self.models.values())

    @property
    def doing(self) -> str:
        """What a start that is under way is busy with, in a word or two."""
        if "warm-up" in self._open:
            return "warming up"
        for model in self.models.values():
            if model.tally.landed_bytes < model.tally.total_bytes:
                return "downloading"
        return {"imports": "importing", "hook": "loading"}.get(next(reversed(self._open), ""), "starting")

    def phases(self, now_s: float) -> Mapping[str, Intervals]:
        """Return when each phase was busy, those that last until *now_s*; a build is not while it waits for bytes."""
        spans = {name: Intervals(self._spans.get(name, ())) for name in ROWS}
        for name, start_s in self._open.items():
            spans[name].add(start_s, now_s)
        spans["build"] = spans["build"].without(self._waits)
        return {name: intervals for name, intervals in spans.items() if intervals}

    def to_record(self, now_s: float) -> dict[str, Any]:
        """Return plain data, times in seconds since the start began."""
        stop_s = now_s if self.ended_s is None else self.ended_s
        total_s = max(0.0, stop_s - self.began_s)
        shown = {name: spans.within(self.began_s, stop_s) for name, spans in self.phases(stop_s).items()}
        rows = [
            {"name": name, "seconds": spans.seconds, "spans": _drawn(spans, self.began_s, total_s * _FINEST)}
            for name, spans in shown.items()
        ]
        left = sum(m.tally.total_bytes - m.tally.landed_bytes for m in self.models.values())
        rate = self.rates.now_per_s() if self.ended_s is None and left else 0.0
        known_s = min(stop_s, self.rates.told_s) if rate else stop_s
        return {
            "seconds": total_s,
            "over": self.ended_s is not None,
            "doing": self.doing if self.ended_s is None else "",
            "models": [model.to_record() for model in self.models.values()],
            "bytes_per_s": rate,
            "left_s": left / rate if rate else None,
            "rates": {"step_s": self.rates.bin_s, "bytes_per_s": [round(r) for r in self.rates.per_s(known_s)]},
            "waterfall": [row for row in rows if row["spans"]],
        }


def _drawn(intervals: Intervals, origin_s: float, least_gap_s: float) -> list[list[float]]:
    """Return pairs relative to *origin_s*, without gaps that nobody could see."""
    pairs: list[list[float]] = []
    for a, b in intervals:
        a, b = round(a - origin_s, 4), round(b - origin_s, 4)
        if pairs and a - pairs[-1][1] < least_gap_s:
            pairs[-1][1] = max(b, pairs[-1][1])
        else:
            pairs.append([a, b])
    return pairs
