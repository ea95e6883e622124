"""The cold start: every second from the start of the process to the model, given to exactly one phase.

Phases overlap; a program waits for one thing at a time. What the program itself does (starting, importing, building) comes
first; while it does nothing it waits for bytes, then for the device, for their digest, for the list of files. So the shares
of all phases, with ``unaccounted``, add up to the whole, and what a phase did while another one was on the way is ``hidden``.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .measured import Profile
from .phases import Intervals

#: In the order in which they are shown.
SHARES = ("interpreter", "imports", "resolve", "download", "write", "verify", "device", "build")
#: Who gets a moment in which several are busy.
_FIRST = ("interpreter", "imports", "build", "download", "write", "device", "verify", "resolve")


@dataclass(frozen=True, slots=True)
class Share:
    """What one phase took of the cold start.

    Attributes:
        name: One of :data:`SHARES`, or ``unaccounted``.
        seconds: Its part of the whole.
        hidden_s: How long it was busy beside something else that was on the way.
        intervals: When it was busy, in seconds since the process started.
    """

    name: str
    seconds: float
    hidden_s: float = 0.0
    intervals: tuple[tuple[float, float], ...] = ()


@dataclass(frozen=True, slots=True)
class ColdStart:
    """Where the time from the start of a process to its model went.

    Attributes:
        total_s: Equals the sum of all shares.
        shares: The phases that there were, in the order of :data:`SHARES`, then ``unaccounted``.
        ok: Whether all loads came to a good end.
    """

    total_s: float
    shares: tuple[Share, ...]
    ok: bool

    @property
    def hidden_s(self) -> float:
        """Seconds of work that cost nothing, all phases together."""
        return sum(share.hidden_s for share in self.shares)

    def __str__(self) -> str:
        parts = ", ".join(f"{share.name} {share.seconds:.2f}" for share in self.shares)
        hidden = f"; hidden {self.hidden_s:.2f} s" if self.hidden_s >= 0.005 else ""
        return f"cold start {self.total_s:.2f} s{'' if self.ok else ' (failed)'}: {parts}{hidden}"

    def to_record(self) -> dict[str, Any]:
        """Return plain data."""
        shares = {s.name: {"seconds": s.seconds, "hidden_s": s.hidden_s} for s in self.shares}
        return {"total_s": self.total_s, "hidden_s": self.hidden_s, "ok": self.ok, "phases": shares}


def partition(
    loads: Sequence[Profile],
    *,
    started_s: float,
    began_s: float,
    now_s: float | None = None,
    imports: Iterable[tuple[float, float]] = (),
) -> ColdStart:
    """Share out the time from *started_s* to the end of the last of *loads*. All times are CLOCK_MONOTONIC.

    Args:
        started_s: When the process began.
        began_s: When measuring did: what was before is the interpreter's.
        now_s: The end, where nothing was loaded.
        imports: When the program was importing.
    """
    ends = [load.started_s + load.total_s for load in loads] or [began_s if now_s is None else now_s]
    stop_s = max(began_s, *ends)
    busy = {name: Intervals() for name in SHARES}
    if began_s > started_s:
        busy["interpreter"].add(started_s, began_s)
    busy["imports"] = Intervals(imports)
    for load in loads:
        for phase in load.phases:
            for a, b in phase.intervals:
                busy[phase.name].add(load.started_s + a, load.started_s + b)
    # Nobody works, and somebody waits: for what another process fetches, which tells us nothing.
    known = Intervals(span for spans in busy.values() for span in spans)
    for load in loads:
        waits = Intervals((load.started_s + a, load.started_s + b) for a, b in load.waits)
        for span in waits.without(known):
            busy["download"].add(*span)
    busy["build"] = busy["build"].without(busy["imports"])  # the framework's own: they are in the build
    taken = Intervals()
    shares = {}
    for name in _FIRST:
        inside = busy[name].within(started_s, stop_s)
        if inside:
            seconds = inside.without(taken).seconds
            spans = tuple((a - started_s, b - started_s) for a, b in inside)
            shares[name] = Share(name, seconds, max(0.0, inside.seconds - seconds), spans)
            for a, b in inside:
                taken.add(a, b)
    total_s = stop_s - started_s
    rest = Share("unaccounted", max(0.0, total_s - taken.seconds))
    found = tuple(shares[name] for name in SHARES if name in shares)
    return ColdStart(total_s, (*found, rest), all(load.ok for load in loads))


def of_load(load: Profile) -> ColdStart:
    """Return how the time of one load alone, from the call on, is shared out."""
    return partition([load], started_s=load.started_s, began_s=load.started_s)


def process_started_s(
    *,
    stat: Path = Path("/proc/self/stat"),
    clock: Callable[[], float] = time.monotonic,
    boot_clock: Callable[[], float] = lambda: time.clock_gettime(time.CLOCK_BOOTTIME),
) -> float:
    """Return when this process began, CLOCK_MONOTONIC, to a hundredth of a second; now, where /proc does not tell."""
    now_s = clock()
    try:
        # The name, in parentheses, may hold anything; field 22 counts ticks since the machine was started.
        ticks = int(stat.read_text().rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return now_s
    return min(now_s, ticks / os.sysconf("SC_CLK_TCK") - (boot_clock() - now_s))
