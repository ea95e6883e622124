"""Tables and the chart, from the records alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from . import reach
from .chart import draw
from .records import Record, Results, Spread, read_all

CHART = "chart.svg"
_MEMORY = {
    "as-is": "as the machine was",
    "resident": "the page cache full, so that new pages come from old ones, as on a node that has been up for a day",
}


def render(out: Path) -> list[Path]:
    """Write a table for each record file in *out*, a summary and the chart; return what was written."""
    found = read_all(out)
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
    yield f"    {_command(header)}"
    yield ""
    yield from _facts(results)
    yield ""
    yield from _table(results)
    yield ""
    for rival, about in header["rivals"].items():
        if about["skipped"]:
            yield f"Skipped: {about['title'] or rival} ({about['skipped']})."
    yield from _notes(results)


def _command(header: Record) -> str:
    memory = f" --memory {header['memory']}" if header["memory"] != "as-is" else ""
    prime = f" --prime-gib {header['prime_bytes'] / 2**30:g}" if header["prime_bytes"] else ""
    return f"python -m benchmarks {header['case']} --repeats {header['repeats']}{memory}{prime}"


def _facts(results: Results) -> Iterator[str]:
    header, facts, model = results.header, results.header["facts"], results.header["model"]
    if model:
        yield f"- Model: {model['name']}, {model['bytes'] / 1e6:,.0f} MB in {model['files']:,} files, {model['origin']}."
        yield f"- Hub: {_link(header)}; it runs on the same cores."
        yield f"- Cache: {_cache(header['cache'])}; what the hub serves is in its page cache."
        yield f"- Memory: {_memory(header)}."
    started = "from the start of the process" if header["clock"] == "process" else "from the call, imports done,"
    yield f"- The clock runs {started} until {header['ends']}."
    yield f"- {header['repeats']} runs each, in turns and shuffled; medians, in parentheses least and most."
    kind = " (virtual)" if facts["virtual"] else ""
    sha = "with" if facts["sha_instructions"] else "without"
    gives = "; free memory goes back to its host" if facts.get("gives_free_pages_back") else ""
    yield (
        f"- Machine{kind}: {facts['cores']} cores of {facts['cpu']}, {sha} SHA instructions, {facts['memory_gib']} GiB, "
        f"Linux {facts['kernel']}, {facts['file_system']}{gives}."
    )
    libraries = ", ".join(f"{name} {version}" for name, version in facts["libraries"].items())
    yield f"- Python {facts['python']}, {libraries}, nginx {facts['nginx']}."


def _link(header: Record) -> str:
    rate, cap, link = header["rate_bytes_per_s"], header["link_bytes_per_s"], header["link"]
    words = ["nginx on loopback" + (" over TLS" if header["tls"] else "")]
    words.append(f"{rate / 1e6:g} MB/s a connection" if rate else "unthrottled")
    if cap:
        capped = link and link["rate_bytes_per_s"]
        words.append(f"{cap / 1e6:g} MB/s all together (tbf)" if capped else f"without its cap: {link['lacking']}")
    if link:
        words.append(f"{link['congestion']}" + (", in a network namespace" if link["own"] else ""))
    return ", ".join(words)


def _cache(state: str) -> str:
    filled = "it holds the model, which is"
    return {
        "empty": "empty folder, a new one for each run",
        "hot": f"{filled} in the page cache",
        "cold": f"{filled} on the disk alone (a virtual disk's host may have it in memory)",
    }[state]


def _memory(header: Record) -> str:
    if header["prime_bytes"]:
        gib = header["prime_bytes"] / 2**30
        return f"before each run {gib:g} GiB were touched and given back, so that the machine's host supplied none"
    return _MEMORY[header["memory"]]


def _table(results: Results) -> Iterator[str]:
    columns = _model_columns(results) if results.bytes else _bare_columns(results)
    yield "| | " + " | ".join(columns) + " |"
    yield "|---|" + "---|" * len(columns)
    for rival in results.runs:
        title = f"*{results.title(rival)}*" if results.is_reference(rival) else results.title(rival)
        yield f"| {title} | " + " | ".join(cell(rival) for cell in columns.values()) + " |"


def _model_columns(results: Results) -> dict[str, Callable[[str], str]]:
    beyond, others = (" beyond the imports", " and the imports") if results.imports else ("", "")
    gigabytes, metric = results.bytes / 1e9, results.header["metric"]

    def shown(value: Callable[[Record], float | None], spec: str) -> Callable[[str], str]:
        return lambda rival: _text(results.spread(rival, value), spec)

    def moves_nothing(rival: str) -> bool:
        return not any(r["requests"] or "stage_s" in r or "sums" in r for r in results.runs[rival])

    def rate(value: Callable[[Record], float], spec: str) -> Callable[[str], str]:
        return lambda rival: "" if moves_nothing(rival) else _median(results.spread(rival, value), 1, spec)

    def extra_mb(rival: str) -> str:
        if results.is_reference(rival) or "own_bytes" not in results.runs[rival][0]:
            return ""
        alone = reach.own_bytes(results, results.imports) if results.imports and results.is_loader(rival) else 0.0
        return f"{((reach.own_bytes(results, rival) or 0.0) - (alone or 0.0)) / 1e6:,.0f}"

    def until_ready(rival: str) -> str:
        if results.header["clock"] != "call" or moves_nothing(rival) or "stage_s" in results.runs[rival][0]:
            return ""
        found = results.spread(rival, lambda r: r.get("ready_cpu_s"))
        return _median(found, 1 / gigabytes, ".2f") if found else ""

    def besides(name: str) -> Callable[[Record], float | None]:
        return lambda r: r.get(name) if metric != name and "stage_s" not in r else None

    columns: dict[str, Callable[[str], str]] = {
        "verifies": lambda rival: results.header["rivals"][rival]["verifies"],
        "seconds": shown(results.seconds, ".3f" if metric == "first_weight_s" else ".2f"),
        "fastload takes": lambda rival: f"{results.ratio(rival):.2f} ×" if _comparable(results, rival) else "",
        "MB/s": rate(lambda r: results.bytes / results.seconds(r) / 1e6, ",.0f"),
        "first weights asked for": shown(besides("first_weight_s"), ".2f"),
        "verified, in the cache": shown(lambda r: r.get("verified_s") if metric == "ready_s" else None, ".2f"),
        "the call returns": shown(lambda r: None if metric == "ready_s" else besides("ready_s")(r), ".2f"),
        "every byte read": shown(besides("touched_s"), ".2f"),
        "until the last process is gone": shown(besides("gone_s"), ".2f"),
        "CPU-s": shown(results.cpu_s, ".2f"),
        f"CPU-s/GB{beyond}": rate(lambda r: results.work_s(r) / gigabytes, ".2f"),
        "CPU-s/GB until the call returned": until_ready,
        "CPU-s/GB of the server": rate(lambda r: r.get("server_cpu_s", 0) / gigabytes, ".2f"),
        f"peak resident memory beyond the model{others}, MB": lambda rival: _peak(results, rival),
        f"of no file{beyond}, MB": extra_mb,
        "connections": rate(lambda r: r.get("connections", 0), ".0f"),
        "requests": lambda rival: _median(results.spread(rival, lambda r: r["requests"]), 1, ".0f"),
        "of these to the API": rate(lambda r: r.get("api_requests", 0), ".0f"),
    }
    return {name: cell for name, cell in columns.items() if any(cell(n) not in ("", "0", "0.00") for n in results.runs)}


def _comparable(results: Results, rival: str) -> bool:
    """Tell whether a ratio to *rival* says anything: to ourselves, or to imports outside the clock, it does not."""
    outside = rival == results.imports and results.header["clock"] == "call"
    return rival != results.ours and not outside and results.header["metric"] != "first_weight_s"


def _peak(results: Results, rival: str) -> str:
    alone = results.median(results.imports or "", lambda r: r["rss_bytes"]) or 0.0
    less = results.bytes + alone if results.is_loader(rival) else 0.0
    return _text(results.spread(rival, lambda r: (r["rss_bytes"] - less) / 1e6), ",.0f")


def _bare_columns(results: Results) -> dict[str, Callable[[str], str]]:
    base = results.median(list(results.runs)[-1], lambda r: r["ready_s"] * 1e3) or 0.0
    return {
        "milliseconds": lambda rival: _text(results.spread(rival, lambda r: r["ready_s"] * 1e3), ".1f"),
        "more than the last": lambda rival: _text(results.spread(rival, lambda r: r["ready_s"] * 1e3 - base), ".1f"),
        "CPU milliseconds": lambda rival: _text(results.spread(rival, lambda r: results.cpu_s(r) * 1e3), ".1f"),
    }


def _text(spread: Spread | None, spec: str) -> str:
    return "" if spread is None else format(spread, spec)


def _median(spread: Spread | None, factor: float, spec: str) -> str:
    return "" if spread is None else format(spread.median * factor, spec)


def _notes(results: Results) -> Iterator[str]:
    if results.bytes:
        others = Spread.of([_others(r) for runs in results.runs.values() for r in runs])
        yield f"Beside the one measured, everything else (the hub too) kept {others:.2f} cores busy."
    if (floor_s := reach.floor_s(results)) is not None:
        cpu_s = (reach.floor_cpu_s(results) or 0.0) * 1e9 / results.bytes
        yield (
            f"The floor: {floor_s:.2f} s; the three stages, each alone, take {cpu_s:.2f} CPU-s/GB, and the server shares "
            f"the {results.cores} cores; where one stage alone takes longer, that is the floor."
        )
    if results.bytes:
        yield from _winners(results)
    if any(map(results.is_reference, results.runs)):
        yield "In italics: limits, for comparison; no way to load a model from a hub."
    yield "How to read the columns: [benchmarks/README.md](../README.md)."


def _others(record: Record) -> float:
    """Return how many cores others kept busy; records of before have their CPU seconds."""
    return float(record["others_cores"] if "others_cores" in record else record["others_cpu_s"] / record["gone_s"])


def _winners(results: Results) -> Iterator[str]:
    """Say who beats us."""
    for rival in results.runs:
        if not results.is_reference(rival) and not rival.startswith("fastload") and results.ratio(rival).median > 1:
            yield f"**Faster than fastload here: {results.title(rival)}.**"


def summary(found: Sequence[Results]) -> Iterator[str]:
    """Yield the lines of the page about all cases."""
    yield "# Results"
    yield ""
    yield "Written by `python -m benchmarks`; what the columns mean and how it is measured: [../README.md](../README.md)."
    yield ""
    yield f"![seconds by case]({CHART})"
    yield ""
    yield from reach.lines({results.name: results for results in found})
    yield ""
    yield "| case | fastload | against | takes | fastload takes |"
    yield "|---|---|---|---|---|"
    for results in found:
        short = not results.bytes or results.header["metric"] == "first_weight_s"
        unit, factor = ("ms", 1e3) if short else ("s", 1.0)
        for rival in results.runs:
            if not _comparable(results, rival) or "stage_cpu_s" in results.runs[rival][0]:  # the floor is a goal
                continue
            mine, theirs = (results.spread(name, results.seconds) for name in (results.ours, rival))
            name = f"[{results.name}]({results.name}.md)"
            title = f"*{results.title(rival)}*" if results.is_reference(rival) else results.title(rival)
            times = f"{_median(mine, factor, '.2f')} {unit} | {title} | {_median(theirs, factor, '.2f')} {unit}"
            yield f"| {name} | {times} | {results.ratio(rival):.2f} × |"
