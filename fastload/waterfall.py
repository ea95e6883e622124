"""Profiles as one HTML file: a waterfall that needs no network, no script and no other file. Pure: returns a string."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from html import escape

from .coldstart import ColdStart, Share, of_load
from .measured import Profile
from .phases import Intervals, megabytes
from .profile import Profiles
from .trace import Slice, lanes, transfer_slices

#: Guessed: more rows say less; the rest is counted in a line.
_MAX_FILES = 40
#: Guessed: points of the throughput curve.
_BINS = 120

_STYLE = """
:root { color-scheme: light dark; --ground: #fff; --ink: #1b1f24; --soft: #5c6570; --line: #d9dee4; --panel: #f5f7f9;
  --interpreter: #8a94a0; --imports: #7a63c7; --resolve: #b07d00; --download: #1f78d1; --write: #1a8f8a;
  --verify: #2e9150; --device: #b5478f; --build: #cf5a2b; --unaccounted: #c3cad2; --bad: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --ground: #14171b; --ink: #e7eaee; --soft: #9aa5b1; --line: #323941;
  --panel: #1d2228; --interpreter: #77818d; --imports: #9d8af0; --resolve: #dba52c; --download: #5ba7f5; --write: #3fb8b2;
  --verify: #57bd79; --device: #e07ab8; --build: #f0834f; --unaccounted: #4a535d; --bad: #f2877f; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem; max-width: 76rem; background: var(--ground); color: var(--ink);
  font: 15px/1.45 system-ui, sans-serif; }
h1 { font-size: 1.35rem; margin: 0 0 .2rem; overflow-wrap: anywhere; }
h2 { font-size: 1rem; margin: 1.8rem 0 .6rem; }
p { margin: 0 0 .6rem; } .soft { color: var(--soft); overflow-wrap: anywhere; }
.bad { color: var(--bad); white-space: pre-wrap; overflow-wrap: anywhere; }
.tiles { display: flex; flex-wrap: wrap; gap: .6rem; margin: 1rem 0; }
.tile { background: var(--panel); border-radius: .4rem; padding: .5rem .8rem; min-width: 7.5rem; flex: 1 1 auto; }
.tile b { display: block; font-size: 1.2rem; font-variant-numeric: tabular-nums; }
.tile span { color: var(--soft); font-size: .85rem; }
.stack { display: flex; height: 1.6rem; border-radius: .3rem; overflow: hidden; background: var(--panel); }
.stack i { display: block; height: 100%; }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; margin: .6rem 0 0; padding: 0; list-style: none; }
.legend i { display: inline-block; width: .8rem; height: .8rem; border-radius: .2rem; margin-right: .4rem;
  vertical-align: -.05rem; }
.legend span { color: var(--soft); }
.row { display: grid; grid-template-columns: 16rem 1fr 5.5rem; gap: 0 .8rem; align-items: center; padding: .12rem 0; }
.row > b { font-weight: 500; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.row > span { text-align: right; color: var(--soft); font-variant-numeric: tabular-nums; white-space: nowrap; }
.track { position: relative; height: 1.1rem; background: var(--panel); border-radius: .2rem; overflow: hidden; }
.track i { position: absolute; top: 0; bottom: 0; min-width: 1px; border-radius: .1rem; }
.track i.pale { opacity: .35; } .thin .track { height: .6rem; } .row + p { margin-top: .6rem; }
.axis .track { background: none; overflow: visible; border-top: 1px solid var(--line); border-radius: 0; height: 1.3rem; }
.axis em { position: absolute; top: .1rem; font-style: normal; font-size: .8rem; color: var(--soft);
  transform: translateX(-50%); white-space: nowrap; }
.axis em:first-child { transform: none; } .axis em:last-child { transform: translateX(-100%); }
svg { display: block; width: 100%; height: 6rem; background: var(--panel); border-radius: .2rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; width: 100%; }
th, td { text-align: right; padding: .25rem .6rem; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } th { color: var(--soft); font-weight: 500; }
@media (max-width: 40rem) { body { padding: 1rem; } .row { grid-template-columns: 1fr auto; padding: .25rem 0; }
  .row .track, .row svg { grid-column: 1 / -1; grid-row: 2; } .axis > b, .axis > span { display: none; } }
""" + "\n".join(
    f".{name} {{ background: var(--{name}); }}"
    for name in ("interpreter", "imports", "resolve", "download", "write", "verify", "device", "build", "unaccounted")
)


def html(subject: Profiles | Profile, *, title: str = "fastload") -> str:
    """Return *subject* as a page that is complete in itself, light or dark as the reader prefers.

    Files and connections are drawn where the events were kept (``fastload.profile(events=True)``).

    Args:
        title: Of the page.
    """
    body: list[str] = []
    if isinstance(subject, Profiles):
        loads = tuple(subject.loads)
        body += _cold_start(subject, loads)
    else:
        loads = (subject,)
    for load in loads:
        body += _load(load)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>\n<body>\n"
        + "\n".join(body)
        + "\n</body></html>\n"
    )


def _cold_start(subject: Profiles, loads: Sequence[Profile]) -> Iterator[str]:
    cold = subject.cold_start
    yield f"<h1>Cold start: {cold.total_s:.2f} s</h1>"
    names = ", ".join(dict.fromkeys(load.source for load in loads)) or "nothing was loaded"
    end = "" if not loads else "was ready" if cold.ok else "had failed"
    yield f'<p class="soft">from the start of the process until {escape(names)} {end}</p>'
    yield from _stack(cold)
    yield from _bars(cold.shares, 0.0, cold.total_s)
    packages = subject.imports.packages()[:8] if subject.imports is not None else []
    if packages:
        longest = ", ".join(f"{escape(name)} {seconds:.2f} s" for name, seconds in packages)
        yield f'<p class="soft">Imports that took longest, each with what it imported: {longest}</p>'


def _load(load: Profile) -> Iterator[str]:
    yield f"<h2>{escape(load.source or 'load')}</h2>"
    built = f", built by {escape(load.framework)}" if load.framework else ""
    yield f'<p class="soft">{escape(load.commit or "no commit")}{built}; {load.files} files</p>'
    if load.error is not None:
        yield f'<p class="bad">{escape(load.error[0])}: {escape(load.error[1])}</p>'
    yield from _tiles(load)
    shared = of_load(load)
    yield from _stack(shared)
    start_s = min([0.0, *(p.start_s for p in load.phases)])
    bars = [Share(p.name, p.busy_s, p.hidden_s, p.intervals) for p in load.phases]
    yield from _bars(bars, start_s, load.total_s)
    if load.events:
        slices = transfer_slices(load)
        yield from _throughput(slices, start_s, load.total_s)
        yield from _connections(slices, start_s, load.total_s)
        yield from _files(load, slices, start_s, load.total_s)
    yield from _numbers(load)


def _tiles(load: Profile) -> Iterator[str]:
    state = "failed after" if load.error else "ready after" if load.finished else "running for"
    tiles = [(f"{load.total_s:.2f} s", state), (f"{megabytes(load.travelled_bytes)} MB", "travelled")]
    if load.cached_bytes:
        tiles.append((f"{megabytes(load.cached_bytes)} MB", "from the cache"))
    if load.resumed_bytes:
        tiles.append((f"{megabytes(load.resumed_bytes)} MB", "resumed"))
    if load.first_byte_s is not None:
        tiles.append((f"{load.first_byte_s:.2f} s", "to the first bytes"))
    tiles.append((f"{load.waited_s:.2f} s", "readers waited for bytes"))
    tiles.append((f"{load.requests} / {load.retries}", "requests / retries"))
    yield '<div class="tiles">'
    yield from (f'<div class="tile"><b>{value}</b><span>{what}</span></div>' for value, what in tiles)
    yield "</div>"


def _stack(cold: ColdStart) -> Iterator[str]:
    """Yield one bar that is shared out among the phases, and what stands for what."""
    whole = max(cold.total_s, 1e-9)
    shares = [s for s in cold.shares if s.seconds > 0 or s.hidden_s > 0]
    pieces = "".join(
        f'<i class="{s.name}" style="width:{100 * s.seconds / whole:.3f}%" title="{s.name} {s.seconds:.2f} s"></i>'
        for s in shares
    )
    yield f'<div class="stack">{pieces}</div><ul class="legend">'
    for s in shares:
        hidden = f", {s.hidden_s:.2f} s hidden" if s.hidden_s >= 0.005 else ""
        rest = f"<span>{100 * s.seconds / whole:.0f} %{hidden}</span>"
        yield f'<li><i class="{s.name}"></i>{s.name} {s.seconds:.2f} s {rest}</li>'
    yield "</ul>"


def _bars(shares: Iterable[Share], start_s: float, stop_s: float) -> Iterator[str]:
    yield "<h2>Waterfall</h2>"
    for share in shares:
        if share.intervals:
            drawn = [(a, b, share.name) for a, b in share.intervals]
            yield _row(share.name, drawn, f"{Intervals(share.intervals).seconds:.2f} s", start_s, stop_s)
    yield _axis(start_s, stop_s)


def _row(
    label: str, drawn: Iterable[tuple[float, float, str]], value: str, start_s: float, stop_s: float, kind: str = ""
) -> str:
    whole = max(stop_s - start_s, 1e-9)
    pieces = []
    for a, b, css in drawn:
        a, b = max(a, start_s), min(b, stop_s)
        if b >= a:
            place = f"left:{100 * (a - start_s) / whole:.3f}%;width:{100 * (b - a) / whole:.3f}%"
            pieces.append(f'<i class="{css}" style="{place}" title="{a:.3f} to {b:.3f} s"></i>')
    name = escape(label)
    track = f'<div class="track">{"".join(pieces)}</div>'
    return f'<div class="row {kind}"><b title="{name}">{name}</b>{track}<span>{value}</span></div>'


def _axis(start_s: float, stop_s: float) -> str:
    whole = stop_s - start_s
    marks = "".join(f'<em style="left:{25 * n}%">{start_s + whole * n / 4:.2f} s</em>' for n in range(5))
    return f'<div class="row axis"><b></b><div class="track">{marks}</div><span></span></div>'


def _throughput(slices: Sequence[Slice], start_s: float, stop_s: float) -> Iterator[str]:
    """Yield a curve of what came over the network, each range spread evenly over the time that it took."""
    rates = [0.0] * _BINS
    bin_s = max(stop_s - start_s, 1e-9) / _BINS
    for s in slices:
        if s.lanes != "network":
            continue
        a, b = s.start_us / 1e6 - start_s, s.stop_us / 1e6 - start_s
        count = s.args.get("stop", 0) - s.args.get("start", 0)
        for n in range(max(0, int(a / bin_s)), min(_BINS - 1, int(b / bin_s)) + 1):
            inside_s = min(b, (n + 1) * bin_s) - max(a, n * bin_s)
            rates[n] += count * max(0.0, inside_s) / max(b - a, 1e-9) / bin_s
    top = max(rates)
    if not top:
        return
    points = " ".join(f"{n + 0.5:.1f},{100 - 95 * rate / top:.2f}" for n, rate in enumerate(rates))
    yield f"<h2>Network: up to {top / 1e6:,.0f} MB/s</h2>"
    curve = f'<polygon points="0,100 {points} {_BINS},100" fill="var(--download)" fill-opacity=".55"/>'
    svg = f'<svg viewBox="0 0 {_BINS} 100" preserveAspectRatio="none" role="img" aria-label="throughput">{curve}</svg>'
    yield f'<div class="row"><b>MB/s</b>{svg}<span></span></div>'


def _connections(slices: Sequence[Slice], start_s: float, stop_s: float) -> Iterator[str]:
    for index, lane in enumerate(lanes(s for s in slices if s.lanes == "network")):
        drawn = [(s.start_us / 1e6, s.stop_us / 1e6, "download") for s in lane]
        count = sum(s.args.get("stop", 0) - s.args.get("start", 0) for s in lane)
        yield _row(f"connection {index + 1}", drawn, _size(count), start_s, stop_s, "thin")


def _files(load: Profile, slices: Sequence[Slice], start_s: float, stop_s: float) -> Iterator[str]:
    """Yield one row for each file that took work: what travelled, and when it was hashed."""
    busy: dict[str, list[tuple[float, float, str]]] = {}
    sizes = {e.file: e.data.get("bytes", 0) for e in reversed(load.events or ()) if e.name == "file.planned" and e.file}
    for s in slices:
        if s.lanes in ("network", "hash"):
            css = "download" if s.lanes == "network" else "verify pale"
            busy.setdefault(s.name, []).append((s.start_us / 1e6, s.stop_us / 1e6, css))
    shown = sorted(busy, key=lambda file: -sizes.get(file, 0))[:_MAX_FILES]
    if not shown:
        return
    yield "<h2>Files</h2>"
    for file in (f for f in busy if f in shown):
        yield _row(file, busy[file], _size(sizes.get(file, 0)), start_s, stop_s)
    yield _axis(start_s, stop_s)
    if len(busy) > len(shown):
        yield f'<p class="soft">and {len(busy) - len(shown)} smaller files</p>'


def _size(count: int) -> str:
    return f"{megabytes(count)} MB" if count >= 100_000 else f"{count / 1e3:.1f} kB"


def _numbers(load: Profile) -> Iterator[str]:
    heads = ("phase", "from", "to", "busy", "hidden", "uncovered", "MB", "GB/s")
    yield '<h2>Numbers</h2><div class="scroll"><table><tr>' + "".join(f"<th>{h}</th>" for h in heads) + "</tr>"
    for p in load.phases:
        times = (f"{t:.3f}" for t in (p.start_s, p.stop_s, p.busy_s, p.hidden_s, p.uncovered_s))
        rate = "" if p.gb_per_s is None else f"{p.gb_per_s:.2f}"
        cells = (p.name, *times, megabytes(p.bytes) if p.bytes else "", rate)
        yield "<tr>" + "".join(f"<td>{c}</td>" for c in cells) + "</tr>"
    yield "</table></div>"
