"""Tables and the chart, from the records alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from statistics import median
from typing import Any

from .cases import CASES

Record = dict[str, Any]
CHART = "chart.svg"


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
        """Weight bytes of the model; 0 without one."""
        return self.header["model"]["bytes"] if self.header["model"] else 0

    def title(self, rival: str) -> str:
        """Return what *rival* is called."""
        return str(self.header["rivals"][rival]["title"])

    def is_reference(self, rival: str) -> bool:
        """Tell whether *rival* is a limit and no way to load."""
        return bool(self.header["rivals"][rival]["reference"])

    def spread(self, rival: str, value: Callable[[Record], float | None]) -> Spread | None:
        """Return the spread of *value* over the runs of *rival*, if they have it."""
        values = [v for v in map(value, self.runs[rival]) if v is not None]
        return Spread.of(values) if values else None

    def ratio(self, rival: str) -> Spread:
        """Return our time over that of *rival*, run by run."""
        pairs = zip(self.runs[self.ours], self.runs[rival], strict=True)
        return Spread.of([ours["ready_s"] / theirs["ready_s"] for ours, theirs in pairs])


def render(out: Path) -> list[Path]:
    """Write a table for each record file in *out*, a summary and the chart; return what was written."""
    found = [Results.read(out / f"{c.name}.jsonl") for c in CASES if (out / f"{c.name}.jsonl").exists()]
    written = []
    for results in found:
        written.append(out / f"{results.name}.md")
        written[-1].write_text("\n".join(page(results)) + "\n", encoding="utf-8")
    if found:
        written.append(out / "README.md")
        written[-1].write_text("\n".join(summary(found)) + "\n", encoding="utf-8")
        if draw(found, out / CHART):
            written.append(out / CHART)
    return written


# -- text -----------------------------------------------------------------------------------------------------------


def page(results: Results) -> Iterator[str]:
    """Yield the lines of the page of one case."""
    header = results.header
    yield f"# {results.name}"
    yield ""
    yield f"{header['question']}."
    yield ""
    prime = f" --prime-gib {header['prime_bytes'] / 2**30:g}" if header["prime_bytes"] else ""
    yield f"    python -m benchmarks {results.name} --repeats {header['repeats']}{prime}"
    yield ""
    yield from _facts(results)
    yield ""
    yield from _table(results)
    yield ""
    for rival, about in header["rivals"].items():
        if about["skipped"]:
            yield f"Skipped: {about['title'] or rival} ({about['skipped']})."
    yield from _notes(results)


def _facts(results: Results) -> Iterator[str]:
    header, facts, model = results.header, results.header["facts"], results.header["model"]
    if model:
        rate = header["rate_bytes_per_s"]
        link = f"nginx on loopback, {rate / 1e6:g} MB/s a connection" if rate else "nginx on loopback, unthrottled"
        yield f"- Model: {model['name']}, {model['bytes'] / 1e6:,.0f} MB in {model['files']} files, {model['origin']}."
        yield f"- Hub: {link}; it runs on the same cores."
        yield "- Cache: empty folder, a new one for each run; what the hub serves is in its page cache."
    if header["prime_bytes"]:
        gib = header["prime_bytes"] / 2**30
        yield f"- Before each run {gib:g} GiB of memory were touched and given back, so that the machine's host supplied none."
    yield f"- The clock runs from the start of the process until {header['ends']}."
    yield f"- {header['repeats']} runs each, in turns and shuffled; medians, in parentheses least and most."
    kind = " (virtual)" if facts["virtual"] else ""
    sha = "with" if facts["sha_instructions"] else "without"
    yield (
        f"- Machine{kind}: {facts['cores']} cores of {facts['cpu']}, {sha} SHA instructions, {facts['memory_gib']} GiB, "
        f"Linux {facts['kernel']}, {facts['file_system']}."
    )
    libraries = ", ".join(f"{name} {version}" for name, version in facts["libraries"].items())
    yield f"- Python {facts['python']}, {libraries}, nginx {facts['nginx']}."


def _table(results: Results) -> Iterator[str]:
    columns = _model_columns(results) if results.bytes else _bare_columns(results)
    yield "| | " + " | ".join(columns) + " |"
    yield "|---|" + "---|" * len(columns)
    for rival in results.runs:
        title = f"*{results.title(rival)}*" if results.is_reference(rival) else results.title(rival)
        yield f"| {title} | " + " | ".join(cell(rival) for cell in columns.values()) + " |"


def _model_columns(results: Results) -> dict[str, Callable[[str], str]]:
    imports = results.runs.get("imports_only", ())
    imports_s = median(map(_cpu_s, imports)) if imports else 0.0
    imports_bytes = median(r["rss_bytes"] for r in imports) if imports else 0
    beyond, others = (" beyond the imports", " and the imports") if imports else ("", "")

    def shown(value: Callable[[Record], float | None], spec: str) -> Callable[[str], str]:
        return lambda rival: _text(results.spread(rival, value), spec)

    def moves_nothing(rival: str) -> bool:
        return not any(r["requests"] for r in results.runs[rival])

    def memory_mb(record: Record) -> float:
        return float(record["rss_bytes"] - (results.bytes + imports_bytes if "sums" in record else 0)) / 1e6

    def per_gb(rival: str) -> str:
        return "" if moves_nothing(rival) else _median(results.spread(rival, work_s), 1e9 / results.bytes, ".2f")

    def work_s(record: Record) -> float:
        return _cpu_s(record) - (imports_s if "sums" in record else 0.0)

    def speed(rival: str) -> str:
        spread = results.spread(rival, lambda r: results.bytes / r["ready_s"] / 1e6)
        return "" if moves_nothing(rival) else _median(spread, 1, ",.0f")

    columns: dict[str, Callable[[str], str]] = {
        "verifies": lambda rival: results.header["rivals"][rival]["verifies"],
        "seconds": shown(lambda r: r["ready_s"], ".2f"),
        "fastload takes": lambda rival: "" if rival == results.ours else f"{results.ratio(rival):.2f} ×",
        "MB/s": speed,
        "verified, in the cache": shown(lambda r: r.get("verified_s"), ".2f"),
        "every byte read": shown(lambda r: r.get("touched_s"), ".2f"),
        "until the last process is gone": shown(lambda r: r["gone_s"], ".2f"),
        "CPU-s": shown(_cpu_s, ".2f"),
        f"CPU-s/GB{beyond}": per_gb,
        f"peak memory beyond the model{others}, MB": shown(memory_mb, ",.0f"),
        "requests": lambda rival: _median(results.spread(rival, lambda r: r["requests"]), 1, ".0f"),
    }
    return {name: cell for name, cell in columns.items() if any(map(cell, results.runs))}


def _bare_columns(results: Results) -> dict[str, Callable[[str], str]]:
    base = results.spread(list(results.runs)[-1], lambda r: r["ready_s"] * 1e3)
    base_ms = base.median if base else 0.0
    return {
        "milliseconds": lambda rival: _text(results.spread(rival, lambda r: r["ready_s"] * 1e3), ".1f"),
        "more than the last": lambda rival: _text(results.spread(rival, lambda r: r["ready_s"] * 1e3 - base_ms), ".1f"),
        "CPU milliseconds": lambda rival: _text(results.spread(rival, lambda r: _cpu_s(r) * 1e3), ".1f"),
    }


def _cpu_s(record: Record) -> float:
    return float(record["user_s"] + record["system_s"] - record["touch_cpu_s"])


def _text(spread: Spread | None, spec: str) -> str:
    return "" if spread is None else format(spread, spec)


def _median(spread: Spread | None, factor: float, spec: str) -> str:
    return "" if spread is None else format(spread.median * factor, spec)


def _notes(results: Results) -> Iterator[str]:
    if results.bytes:
        others = Spread.of([r["others_cpu_s"] / r["gone_s"] for runs in results.runs.values() for r in runs])
        yield f"Beside the one measured, everything else (the hub too) kept {others:.2f} cores busy."
    if any(map(results.is_reference, results.runs)):
        yield "In italics: limits, for comparison; they load no model."
    yield "How to read the columns: [benchmarks/README.md](../README.md)."


def summary(found: Sequence[Results]) -> Iterator[str]:
    """Yield the lines of the page about all cases."""
    yield "# Results"
    yield ""
    yield "Written by `python -m benchmarks`; what the columns mean and how it is measured: [../README.md](../README.md)."
    yield ""
    yield f"![seconds by case]({CHART})"
    yield ""
    yield "| case | fastload | against | takes | fastload takes |"
    yield "|---|---|---|---|---|"
    for results in found:
        unit, factor = ("s", 1.0) if results.bytes else ("ms", 1e3)
        for rival in list(results.runs)[1:]:
            mine, theirs = (results.spread(name, lambda r: r["ready_s"]) for name in (results.ours, rival))
            name = f"[{results.name}]({results.name}.md)"
            title = f"*{results.title(rival)}*" if results.is_reference(rival) else results.title(rival)
            times = f"{_median(mine, factor, '.2f')} {unit} | {title} | {_median(theirs, factor, '.2f')} {unit}"
            yield f"| {name} | {times} | {results.ratio(rival):.2f} × |"


# -- the chart ------------------------------------------------------------------------------------------------------


def draw(found: Sequence[Results], path: Path) -> bool:
    """Draw one row of bars a case into *path*; without matplotlib nothing is drawn.

    Returns:
        Whether it was drawn.
    """
    try:
        matplotlib = import_module("matplotlib")
    except ImportError:
        return False
    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "fastload", "font.family": "sans-serif"})
    pyplot = import_module("matplotlib.pyplot")
    shown = [results for results in found if results.bytes]
    if not shown:
        return False
    rows = [len(results.runs) for results in shown]
    figure, axes = pyplot.subplots(
        len(shown), 1, figsize=(9, 0.42 * sum(rows) + 0.75 * len(rows)), height_ratios=rows, squeeze=False
    )
    for results, (axis,) in zip(shown, axes, strict=True):
        _bars(results, axis)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
    return True


def _bars(results: Results, axis: Any) -> None:
    names = list(results.runs)
    spreads = [Spread.of([r["ready_s"] for r in results.runs[name]]) for name in names]
    medians = [s.median for s in spreads]
    whiskers = [[s.median - s.least for s in spreads], [s.most - s.median for s in spreads]]
    colours = [
        "#d9480f" if name == results.ours else "#ced4da" if results.is_reference(name) else "#868e96" for name in names
    ]
    axis.barh(range(len(names)), medians, xerr=whiskers, color=colours, ecolor="#343a40", capsize=2)
    axis.set_yticks(range(len(names)), [results.title(name) for name in names])
    axis.invert_yaxis()
    for row, spread in enumerate(spreads):
        axis.annotate(
            f"{spread.median:.2f} s", (spread.most, row), xytext=(5, 0), textcoords="offset points", va="center"
        )
    axis.margins(x=0.12)
    model = results.header["model"]
    axis.set_title(f"{results.name}: {model['name']}, {model['bytes'] / 1e6:,.0f} MB", loc="left", fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)
