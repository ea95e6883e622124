"""A history of loads, one JSON line each, and what moved between two of them."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .coldstart import SHARES, ColdStart, of_load
from .errors import CacheError, FormatError
from .measured import Profile

#: Guessed: a change of the median below this share, or below this many seconds, is noise.
_MOVED = 0.05
_MOVED_S = 0.02


def append(
    path: str | os.PathLike[str],
    loads: Iterable[Profile],
    *,
    cold_start: ColdStart | None = None,
    clock: Callable[[], float] = time.time,
) -> None:
    """Add one line a load to *path*, which several processes may share.

    Args:
        cold_start: Of the process; without it each line shares out the time of its load alone.
        clock: Seconds since 1970.

    Raises:
        CacheError: The file cannot be written.
    """
    at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(clock()))
    lines = [
        json.dumps(
            {"at": at, "host": platform.node(), **load.to_record(), "shares": (cold_start or of_load(load)).to_record()}
        )
        for load in loads
    ]
    try:
        fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            os.write(fd, "".join(f"{line}\n" for line in lines).encode())  # one write: lines of others stay whole
        finally:
            os.close(fd)
    except OSError as e:
        raise CacheError(f"{os.fspath(path)}: the history cannot be written: {e.strerror}") from e


def read(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Return the records of *path*, in order; a last line that was cut off is left out.

    Raises:
        CacheError: It cannot be read.
        FormatError: It is no history.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError as e:
        raise CacheError(f"{os.fspath(path)}: the history cannot be read: {e.strerror}") from e
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            record["shares"]["phases"], record["total_s"], record["ok"]  # what everything below relies on
        except (ValueError, KeyError, TypeError) as e:
            if number == len(lines) and not line.endswith("}"):
                break  # its writer was killed
            raise FormatError(f"{os.fspath(path)}, line {number}: not a line of a fastload history") from e
        records.append(record)
    return records


@dataclass(frozen=True, slots=True)
class Change:
    """One number in two histories; seconds.

    Attributes:
        name: ``total``, ``first bytes``, or a phase of the cold start.
        before: (p50, p90), of the first history.
        after: Of the second one.
    """

    name: str
    before: tuple[float, float]
    after: tuple[float, float]

    @property
    def delta_s(self) -> float:
        """By how much the median grew."""
        return self.after[0] - self.before[0]

    @property
    def moved(self) -> bool:
        """Whether that is more than noise."""
        return abs(self.delta_s) >= max(_MOVED_S, _MOVED * self.before[0])

    def to_record(self) -> dict[str, Any]:
        """Return plain data."""
        values = {"before_p50_s": self.before[0], "before_p90_s": self.before[1]}
        values |= {"after_p50_s": self.after[0], "after_p90_s": self.after[1]}
        return {"name": self.name, **values, "delta_s": self.delta_s, "moved": self.moved}


def compare(before: Sequence[dict[str, Any]], after: Sequence[dict[str, Any]]) -> list[Change]:
    """Return how each number of the good loads of *before* differs in *after*: the total, then what moved most.

    Raises:
        FormatError: One of them holds no load that came to a good end.
    """
    sides = [[record for record in side if record["ok"]] for side in (before, after)]
    if not all(sides):
        raise FormatError("a history without a load that came to a good end has nothing to compare")
    total, *rest = (
        Change(name, _percentiles(map(take, sides[0])), _percentiles(map(take, sides[1]))) for name, take in _numbers()
    )
    return [total, *sorted((c for c in rest if c.before != (0, 0) or c.after != (0, 0)), key=lambda c: -abs(c.delta_s))]


def _numbers() -> list[tuple[str, Callable[[dict[str, Any]], float]]]:
    def share(name: str) -> Callable[[dict[str, Any]], float]:
        return lambda record: float(record["shares"]["phases"].get(name, {}).get("seconds", 0.0))

    numbers: list[tuple[str, Callable[[dict[str, Any]], float]]] = [
        ("total", lambda record: float(record["shares"]["total_s"])),
        ("first bytes", lambda record: float(record.get("first_byte_s") or 0.0)),
        ("hidden", lambda record: float(record["shares"]["hidden_s"])),
    ]
    return [*numbers, *((name, share(name)) for name in (*SHARES, "unaccounted"))]


def _percentiles(values: Iterable[float]) -> tuple[float, float]:
    from statistics import median, quantiles  # with what it imports it would cost a start 15 ms

    known = sorted(values)
    return median(known), quantiles(known, n=10, method="inclusive")[8] if len(known) > 1 else known[0]
