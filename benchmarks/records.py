"""What was measured, read from the record files."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from .cases import CASES

Record = dict[str, Any]
#: Of headers that were written before these were.
_DEFAULTS: Record = {
    "clock": "process", "metric": "ready_s", "tls": False, "cache": "empty", "connections": 8, "link": None,
    "link_bytes_per_s": None, "memory": "as-is",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Spread:
    """Median, least and most of some runs."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Return that of *values*."""
        return cls(median(values), min(values), max(values))

    def __format__(self, spec: str) -> str:
        return f"{self.median:{spec}} ({self.least:{spec}}–{self.most:{spec}})"


@dataclass(frozen=True, slots=True)
class Results:
    """The records of one case: what was measured, and the runs of each rival by repeat."""

    header: Record
    runs: dict[str, list[Record]]

    @classmethod
    def read(cls, path: Path) -> Results:
        """Return what *path* holds."""
        header, *records = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
        header = {**_DEFAULTS, **header}
        runs: dict[str, list[Record]] = {}
        for record in sorted(records, key=lambda r: r["repeat"]):
            runs.setdefault(record["rival"], []).append(record)
        return cls(header, {name: runs[name] for name in header["rivals"] if name in runs})

    @property
    def name(self) -> str:
        """Of the case."""
        return str(self.header["case"])

    @property
    def ours(self) -> str:
        """Name of the rival that is fastload."""
        return next(iter(self.runs))

    @property
    def bytes(self) -> int:
        """Bytes of the weights (of all files where there are none); 0 where nothing is served."""
        return self.header["model"]["bytes"] if self.header["model"] else 0

    @property
    def cores(self) -> int:
        """Of the machine."""
        return int(self.header["facts"]["cores"])

    def title(self, rival: str) -> str:
        """Return what *rival* is called."""
        return str(self.header["rivals"][rival]["title"])

    def is_reference(self, rival: str) -> bool:
        """Tell whether *rival* is a limit and no way to load."""
        return bool(self.header["rivals"][rival]["reference"])

    @property
    def imports(self) -> str | None:
        """The rival that only imports what all others import, if there is one."""
        old = "imports_only"  # before it said so itself
        return next((n for n in self.runs if self.header["rivals"][n].get("imports", n == old)), None)

    def seconds(self, record: Record) -> float:
        """Return the time that *record* is compared by."""
        return float(record.get("stage_s") or record.get(self.header["metric"]) or record["ready_s"])

    def cpu_s(self, record: Record) -> float:
        """Return the CPU seconds of the rival and all its children: from where the clock started, without touching."""
        if "stage_cpu_s" in record:
            return float(record["stage_cpu_s"])
        used = record["user_s"] + record["system_s"] - record["touch_cpu_s"] - record.get("started_cpu_s", 0.0)
        return float(used)

    def work_s(self, record: Record) -> float:
        """Return the CPU seconds that the imports alone do not take."""
        imports = self.runs[self.imports] if self.imports else []
        alone_s = median(map(self.cpu_s, imports)) if imports and "stage_cpu_s" not in record else 0.0
        return self.cpu_s(record) - (alone_s if self.is_loader(record["rival"]) else 0.0)

    def is_loader(self, rival: str) -> bool:
        """Tell whether *rival* delivers tensors, and so imports what the imports alone import."""
        return any("sums" in record for record in self.runs[rival])

    def spread(self, rival: str, value: Callable[[Record], float | None]) -> Spread | None:
        """Return the spread of *value* over the runs of *rival*, if they have it."""
        values = [v for v in map(value, self.runs[rival]) if v is not None]
        return Spread.of(values) if values else None

    def median(self, rival: str, value: Callable[[Record], float | None]) -> float | None:
        """Return the median of *value* over the runs of *rival*; ``None`` without one."""
        spread = self.spread(rival, value) if rival in self.runs else None
        return spread.median if spread else None

    def ratio(self, rival: str, ours: str | None = None) -> Spread:
        """Return our time over that of *rival*, round by round."""
        pairs = zip(self.runs[ours or self.ours], self.runs[rival], strict=True)
        return Spread.of([self.seconds(mine) / self.seconds(theirs) for mine, theirs in pairs])


def read_all(out: Path) -> list[Results]:
    """Return what *out* holds of every case, in their order."""
    paths = [out / f"{case.name}.jsonl" for case in CASES]
    return [Results.read(path) for path in paths if path.exists()]
