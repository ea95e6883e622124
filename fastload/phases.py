"""Phases of a load, and the arithmetic of time intervals that they rest on. Pure, no clock."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

#: Phases in the order in which bytes meet them; ``write`` shows only where ranges are copied to disk, ``device`` only where
#: tensors go to one that is fed.
PHASES = ("resolve", "download", "write", "verify", "device", "build")


class Intervals:
    """A union of time intervals, kept merged while it grows. Not thread-safe."""

    def __init__(self, pairs: Iterable[tuple[float, float]] = ()) -> None:
        self._starts: list[float] = []
        self._stops: list[float] = []
        for start_s, stop_s in pairs:
            self.add(start_s, stop_s)

    def __iter__(self) -> Iterator[tuple[float, float]]:
        return zip(self._starts, self._stops, strict=True)

    def __bool__(self) -> bool:
        return bool(self._starts)

    @property
    def seconds(self) -> float:
        """Their length all together."""
        return sum(stop_s - start_s for start_s, stop_s in self)

    def add(self, start_s: float, stop_s: float) -> None:
        """Take in one more interval."""
        if stop_s < start_s:
            return
        first = bisect_left(self._stops, start_s)
        last = bisect_right(self._starts, stop_s)
        if first < last:
            start_s = min(start_s, self._starts[first])
            stop_s = max(stop_s, self._stops[last - 1])
        self._starts[first:last] = [start_s]
        self._stops[first:last] = [stop_s]

    def without(self, other: Intervals) -> Intervals:
        """Return what is here and not in *other*."""
        rest = Intervals()
        for start_s, stop_s in self:
            at_s = start_s
            index = bisect_right(other._stops, start_s)
            while index < len(other._starts) and other._starts[index] < stop_s:
                if other._starts[index] > at_s:
                    rest.add(at_s, other._starts[index])
                at_s = max(at_s, other._stops[index])
                index += 1
            if at_s < stop_s or start_s == stop_s == at_s:
                rest.add(at_s, stop_s)
        return rest

    def within(self, start_s: float, stop_s: float) -> Intervals:
        """Return the part between *start_s* and *stop_s*."""
        return Intervals((max(a, start_s), min(b, stop_s)) for a, b in self if b >= start_s and a <= stop_s)


@dataclass(frozen=True, slots=True)
class Phase:
    """One phase of one load; times are seconds since the load was asked for, negative before that.

    Attributes:
        name: One of :data:`PHASES`.
        start_s: When it was first busy.
        stop_s: When it was last busy.
        busy_s: How long it was busy.
        uncovered_s: How long the load had nothing but this phase to show for its time.
        bytes: What passed through it; 0 where it moves none.
        intervals: When it was busy, merged, in order.
    """

    name: str
    start_s: float
    stop_s: float
    busy_s: float
    uncovered_s: float
    bytes: int = 0
    intervals: tuple[tuple[float, float], ...] = ()

    @property
    def hidden_s(self) -> float:
        """Seconds that cost the load nothing: another phase was busy too, or the load had not begun."""
        return max(0.0, self.busy_s - self.uncovered_s)

    @property
    def gb_per_s(self) -> float | None:
        """10^9 bytes per busy second; ``None`` where no bytes or no time are known."""
        return self.bytes / self.busy_s / 1e9 if self.bytes and self.busy_s > 0 else None

    def to_record(self) -> dict[str, Any]:
        """Return plain data."""
        return {
            "name": self.name,
            "start_s": self.start_s,
            "stop_s": self.stop_s,
            "busy_s": self.busy_s,
            "hidden_s": self.hidden_s,
            "uncovered_s": self.uncovered_s,
            "bytes": self.bytes,
            "gb_per_s": self.gb_per_s,
        }


def phase_of(name: str, busy: Intervals, others: Intervals, window: tuple[float, float], count: int) -> Phase:
    """Return the phase that was *busy*, beside *others*, in a load that lasted for *window*; needs one interval."""
    origin_s, _ = window
    intervals = tuple((a - origin_s, b - origin_s) for a, b in busy)
    return Phase(
        name=name,
        start_s=intervals[0][0],
        stop_s=intervals[-1][1],
        busy_s=busy.seconds,
        uncovered_s=busy.without(others).within(*window).seconds,
        bytes=count,
        intervals=intervals,
    )


def table(phases: Iterable[Phase]) -> Iterator[str]:
    """Yield a heading and one line a phase; nothing for no phases."""
    for index, p in enumerate(phases):
        if index == 0:
            yield f"{'phase':<9}{'from':>8}{'to':>8}{'busy':>8}{'hidden':>8}{'uncovered':>11}{'MB':>10}{'GB/s':>7}"
        times = f"{p.start_s:8.2f}{p.stop_s:8.2f}{p.busy_s:8.2f}{p.hidden_s:8.2f}{p.uncovered_s:11.2f}"
        rate = "" if p.gb_per_s is None else f"{p.gb_per_s:.2f}"
        yield f"{p.name:<9}{times}{megabytes(p.bytes) if p.bytes else '':>10}{rate:>7}".rstrip()


def megabytes(count: int) -> str:
    """Return *count* bytes in 10^6 bytes, without the unit."""
    return f"{count / 1e6:,.1f}"
