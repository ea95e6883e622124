"""Profiles as an SVG drawing: who had the bytes when, from the network through the slots to the device. Pure: returns a string.

One row for each connection, each write and hash at once, each page-locked slot, and each device. A picture of overlap:
where the load is as fast as its slowest part, that part's rows have no gaps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from html import escape

from .measured import Profile
from .phases import megabytes
from .profile import Profiles
from .trace import Slice, lanes, load_slices

#: Guessed: what stands well beside text, and is enough to see a slot of 8 MiB in a load of some seconds.
_WIDTH, _LABEL, _MARGIN = 960, 120, 16
_ROW, _GAP, _HEAD, _AXIS = 9, 10, 50, 40
#: Guessed: marks of the axis, at most.
_MARKS = 10

_STYLE = """
text { font: 12px system-ui, sans-serif; fill: #1b1f24; } .soft { fill: #5c6570; }
.ground { fill: #fff; } .track { fill: #f1f3f5; } .network { fill: #1f78d1; } .disk { fill: #1a8f8a; }
.hash { fill: #2e9150; } .read { fill: #dba52c; } .queued { fill: #e9cfe0; }
.copy { fill: #b5478f; } line { stroke: #d9dee4; } .mark { stroke: #5c6570; stroke-dasharray: 3 3; }
@media (prefers-color-scheme: dark) { text { fill: #e7eaee; } .soft { fill: #9aa5b1; } .ground { fill: #14171b; }
  .track { fill: #1d2228; } .network { fill: #5ba7f5; } .disk { fill: #3fb8b2; }
  .hash { fill: #57bd79; } .queued { fill: #4d3345; }
  .copy { fill: #e07ab8; } line { stroke: #323941; } .mark { stroke: #9aa5b1; } }
"""
#: Lanes of a trace, as what they are drawn, and what that is called.
_KINDS = {"network": "network", "disk": "write", "hash": "hash"}
_LEGEND = {
    "network": "range on its way",
    "disk": "written to the file",
    "hash": "hashed",
    "read": "read into the slot",
    "queued": "waits for its turn",
    "copy": "copied to the device",
}


@dataclass(frozen=True, slots=True)
class _Row:
    """One line of the drawing: its label ("": that of the row above), and bars of (start, stop, class) in microseconds."""

    label: str
    bars: Sequence[tuple[int, int, str]]


def svg(subject: Profiles | Profile) -> str:
    """Return *subject* as a drawing, light or dark as the reader prefers.

    Needs the events of the loads (``fastload.profile(events=True)``); loads without are left out. Several stand one below
    the other, each with an axis of its own, in seconds since it was asked for.
    """
    loads = tuple(subject.loads) if isinstance(subject, Profiles) else (subject,)
    parts: list[str] = []
    top = 0
    for load in loads:
        if load.events:
            drawn, height = _load(load, top)
            parts += drawn
            top += height
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {max(top, 1)}" width="{_WIDTH}" role="img">'
        f'<style>{_STYLE}</style><rect class="ground" width="100%" height="100%"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )


def _load(load: Profile, top: int) -> tuple[list[str], int]:
    """Return the drawing of *load* from the height *top* on, and how high it is."""
    groups = list(_groups(load_slices(load)))
    bars = [bar for group in groups for row in group for bar in row.bars]
    start_us = min([0, *(a for a, _, _ in bars)])
    stop_us = max([1, round(load.total_s * 1e6), *(b for _, b, _ in bars)])
    scale = (_WIDTH - _LABEL - _MARGIN) / (stop_us - start_us)

    def at(us: int) -> float:
        return _LABEL + (us - start_us) * scale

    parts = list(_heading(load, {css for _, _, css in bars}, top))
    y = top + _HEAD
    for group in groups:
        for row in group:
            if row.label:
                parts.append(f'<text x="{_MARGIN}" y="{y + _ROW - 1}">{escape(row.label)}</text>')
            parts.append(
                f'<rect class="track" x="{_LABEL}" y="{y}" width="{_WIDTH - _LABEL - _MARGIN}" height="{_ROW - 2}"/>'
            )
            parts += [
                f'<rect class="{css}" x="{at(a):.1f}" y="{y}" width="{max(0.4, (b - a) * scale):.1f}" height="{_ROW - 2}"/>'
                for a, b, css in row.bars
            ]
            y += _ROW
        y += _GAP
    arrived_us = max((b for _, b, css in bars if css == "network"), default=None)
    if arrived_us is not None:
        x = f"{at(arrived_us):.1f}"
        parts.append(f'<line class="mark" x1="{x}" x2="{x}" y1="{top + _HEAD - 4}" y2="{y}"/>')
        parts.append(f'<text class="soft" x="{x}" y="{y + 30}" text-anchor="end">last byte</text>')
    parts += _axis(at, start_us, stop_us, y)
    return parts, y + _AXIS - top


def _groups(slices: Sequence[Slice]) -> Iterator[list[_Row]]:
    """Yield the rows that belong together."""
    for kind, label in _KINDS.items():
        rows = lanes(s for s in slices if s.lanes == kind)
        found = [_Row("", [(s.start_us, s.stop_us, kind) for s in row]) for row in rows]
        if found:
            yield [_Row(label, found[0].bars), *found[1:]]
    slots = sorted({s.lanes for s in slices if s.lanes.startswith("slot ")}, key=lambda name: int(name[5:]))
    if slots:
        bars = [[(s.start_us, s.stop_us, s.name) for s in slices if s.lanes == name] for name in slots]
        yield [_Row("" if index else "slots", row) for index, row in enumerate(bars)]
    devices = sorted({s.lanes for s in slices if s.args.get("device") == s.lanes})
    if devices:
        yield [_Row(name, [(s.start_us, s.stop_us, "copy") for s in slices if s.lanes == name]) for name in devices]


def _heading(load: Profile, shown: Iterable[str], top: int) -> Iterator[str]:
    state = "failed after" if load.error else "ready after" if load.finished else "running for"
    size = f"{megabytes(load.planned_bytes)} MB"
    title = f"{load.source or 'load'}: {size}, {state} {load.total_s:.2f} s"
    yield f'<text x="{_MARGIN}" y="{top + 20}" font-weight="600">{escape(title)}</text>'
    x = _MARGIN
    for css, label in _LEGEND.items():
        if css in set(shown):
            yield f'<rect class="{css}" x="{x}" y="{top + 31}" width="10" height="10"/>'
            yield f'<text class="soft" x="{x + 15}" y="{top + 40}">{label}</text>'
            x += 40 + 6 * len(label)


def _axis(at: Callable[[int], float], start_us: int, stop_us: int, y: int) -> Iterator[str]:
    """Yield a line with round seconds."""
    steps = (n * 10**power for power in range(3, 12) for n in (1, 2, 5))
    step_us = next(step for step in steps if stop_us - start_us <= step * _MARKS)
    yield f'<line x1="{_LABEL}" x2="{_WIDTH - _MARGIN}" y1="{y}" y2="{y}"/>'
    for us in range(-(-start_us // step_us) * step_us, stop_us + 1, step_us):
        yield f'<text class="soft" x="{at(us):.1f}" y="{y + 16}" text-anchor="middle">{us / 1e6:g} s</text>'
