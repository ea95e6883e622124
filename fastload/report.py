"""Profiles as text: a table of phases and a waterfall of bars, alone or two side by side. Pure: returns strings."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import zip_longest

from .phases import Intervals
from .profile import Profile, Profiles

#: What a waterfall draws: phase, start and stop in seconds; a phase may come several times.
Timeline = Sequence[tuple[str, float, float]]

# A cell says how much of its time was busy, so that gaps narrower than a cell still show as a lighter shade.
_SHADES, _ASCII_SHADES = " ░▒▓█", " .-=#"
_AXIS, _ASCII_AXIS = ("└", "─", "┘"), ("+", "-", "+")
#: Guessed: fewer columns than this and a bar says nothing.
_MIN_BAR = 8
_GAP = "  "


def render(subject: Profile | Profiles, *, width: int = 80, ascii: bool = False) -> str:
    """Return *subject* as text: for each load its table of phases, then its waterfall.

    Args:
        width: Columns of the waterfall; the table takes 71.
        ascii: Draw with ``#`` instead of block characters.
    """
    loads = subject.loads if isinstance(subject, Profiles) else [subject]
    blocks = []
    for load in tuple(loads):
        lines = [*load.lines()]
        drawn = timeline(load)
        if drawn:
            lines += ["", *(f"  {line}" for line in waterfall(drawn, width=width - 2, ascii=ascii))]
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks) or "no load"


def timeline(profile: Profile) -> list[tuple[str, float, float]]:
    """Return the busy times of *profile* as a waterfall takes them."""
    return [(phase.name, start_s, stop_s) for phase in profile.phases for start_s, stop_s in phase.intervals]


def waterfall(
    bars: Timeline, *, width: int = 80, span: tuple[float, float] | None = None, label: int = 0, ascii: bool = False
) -> list[str]:
    """Return one line a phase, in order of appearance, and a line with the axis.

    Args:
        bars: What to draw.
        width: Columns of every line.
        span: The seconds that the axis covers; from 0 (or the first bar, where that is earlier) to the last one.
        label: Least columns of the names, so that waterfalls line up.
        ascii: Draw with ``#`` instead of block characters.
    """
    rows: dict[str, Intervals] = {}
    for name, start_s, stop_s in bars:
        rows.setdefault(name, Intervals()).add(start_s, stop_s)
    start_s, stop_s = _span(bars) if span is None else span
    label = max([label, *map(len, rows)])
    columns = max(_MIN_BAR, width - label - len(" 0000.00 s "))
    lines = []
    for name, intervals in rows.items():
        cells = _cells(intervals, start_s, stop_s, columns, _ASCII_SHADES if ascii else _SHADES)
        lines.append(f"{name:<{label}} {cells} {intervals.seconds:7.2f} s")
    left, line, right = _ASCII_AXIS if ascii else _AXIS
    lines.append(f"{'':<{label}} {left}{line * (columns - 2)}{right}")
    first, last = f"{start_s:.2f}", f"{stop_s:.2f} s"
    lines.append(f"{'':<{label}} {first}{last:>{columns - len(first)}}")
    return lines


def side_by_side(
    left: Timeline | Profile,
    right: Timeline | Profile,
    width: int = 120,
    *,
    titles: tuple[str, str] = ("from_pretrained", "fastload"),
    ascii: bool = False,
) -> str:
    """Return two waterfalls on one time axis, beside each other, or above each other where *width* is too narrow.

    Args:
        left: What came before: (phase, start, stop) in seconds, or a profile.
        right: What it is compared with.
        width: Columns of the whole.
        titles: What stands above each, with its total.
        ascii: Draw with ``#`` instead of block characters.
    """
    sides = [timeline(side) if isinstance(side, Profile) else list(side) for side in (left, right)]
    spans = [_span(side) for side in sides]
    span = (min(s[0] for s in spans), max(s[1] for s in spans))
    label = max([0, *(len(name) for side in sides for name, _, _ in side)])
    beside = (width - len(_GAP)) // 2 >= label + len(" 0000.00 s ") + 2 * _MIN_BAR
    column = (width - len(_GAP)) // 2 if beside else width
    blocks = []
    for title, side, (start_s, stop_s) in zip(titles, sides, spans, strict=True):
        drawn = waterfall(side, width=column, span=span, label=label, ascii=ascii)
        blocks.append([f"{title}: {stop_s - start_s:.2f} s", *drawn])
    if not beside:
        return "\n\n".join("\n".join(block) for block in blocks)
    _pad(blocks)
    pairs = zip(blocks[0], blocks[1], strict=True)
    return "\n".join(f"{a:<{column}}{_GAP}{b}".rstrip() for a, b in pairs)


def table(rows: Sequence[Sequence[str]], *, heading: Sequence[str] = ()) -> str:
    """Return *rows* as columns that line up, the last one as long as it is."""
    lines = [heading, *rows] if heading else list(rows)
    widths = [max(map(len, column)) for column in zip_longest(*lines, fillvalue="")]
    return "\n".join(
        "  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=False)).rstrip() for line in lines
    )


def _span(bars: Iterable[tuple[str, float, float]]) -> tuple[float, float]:
    pairs = [(start_s, stop_s) for _, start_s, stop_s in bars]
    return min([0.0, *(p[0] for p in pairs)]), max([0.0, *(p[1] for p in pairs)])


def _cells(intervals: Intervals, start_s: float, stop_s: float, columns: int, shades: str) -> str:
    if stop_s <= start_s:
        return " " * columns
    cell_s = (stop_s - start_s) / columns
    covered_s = [0.0] * columns
    for a, b in intervals:
        first = min(columns - 1, max(0, int((a - start_s) / cell_s)))
        last = min(columns - 1, max(0, int((b - start_s) / cell_s)))
        for cell in range(first, last + 1):
            low_s = start_s + cell * cell_s
            # The least share keeps a moment visible.
            covered_s[cell] += max(min(b, low_s + cell_s) - max(a, low_s), 1e-9 * cell_s if first == last else 0.0)
    return "".join(_shade(seconds / cell_s, shades) for seconds in covered_s)


def _shade(share: float, shades: str) -> str:
    if share <= 0:
        return shades[0]
    return shades[min(len(shades) - 1, 1 + int(share * (len(shades) - 1) + 1e-6))] if share < 0.999 else shades[-1]


def _pad(blocks: list[list[str]]) -> None:
    """Make both blocks equally long by empty lines above their axes."""
    height = max(map(len, blocks))
    for block in blocks:
        block[-2:-2] = [""] * (height - len(block))
