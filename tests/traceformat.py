"""The rules of the Trace Event Format, as far as viewers complain or draw nonsense where they are broken.

Source: "Trace Event Format" (Duffy, Sinclair), and what Perfetto's importer counts as errors (``select * from stats``).
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

#: Kinds of metadata, and the only argument that each may have.
_METADATA = {
    "process_name": ("name", str),
    "process_sort_index": ("sort_index", int),
    "thread_name": ("name", str),
    "thread_sort_index": ("sort_index", int),
}


def breaches(document: Mapping[str, Any]) -> list[str]:
    """Return what is wrong with *document*, as ``json.load`` gives it."""
    events: Sequence[dict[str, Any]] = document["traceEvents"]
    found = [] if document.get("displayTimeUnit", "ms") in ("ms", "ns") else ["displayTimeUnit"]
    for event in events:
        found += [f"{complaint}: {event}" for complaint in _complaints(event)]
    if not found:
        found += _tracks(events)
    return found


def _complaints(event: Mapping[str, Any]) -> list[str]:
    kind, args = event.get("ph"), event.get("args", {})
    rules = {
        "ph": kind in ("X", "i", "C", "M"),  # we write no others
        "name": isinstance(event.get("name"), str) and event["name"] != "",
        "pid": isinstance(event.get("pid"), int),
        "tid": isinstance(event.get("tid"), int),
        "ts": kind == "M" or (isinstance(event.get("ts"), int) and event["ts"] >= 0),
        "dur": kind != "X" or (isinstance(event.get("dur"), int) and event["dur"] >= 0),
        "scope": kind != "i" or event.get("s") in ("g", "p", "t"),
        "args": isinstance(args, dict),
        "counter": kind != "C" or (args != {} and all(_is_number(value) for value in args.values())),
        "metadata": kind != "M" or _is_metadata(event.get("name"), args),
    }
    return [rule for rule, kept in rules.items() if not kept]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_metadata(name: Any, args: Mapping[str, Any]) -> bool:
    word, kind = _METADATA.get(name, ("", type(None)))
    return list(args) == [word] and isinstance(args[word], kind)


def _tracks(events: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return what is wrong with the rows: names, order, and slices that overlap without lying one in the other."""
    names: dict[tuple[str, int, int], list[str]] = defaultdict(list)
    rows: dict[tuple[int, int], list[Mapping[str, Any]]] = defaultdict(list)
    counters: dict[tuple[int, str], list[int]] = defaultdict(list)
    for event in events:
        if event["ph"] == "M":
            names[event["name"], event["pid"], event["tid"]].append(str(event["args"]))
        elif event["ph"] == "X":
            rows[event["pid"], event["tid"]].append(event)
        elif event["ph"] == "C":
            counters[event["pid"], event["name"]].append(event["ts"])
    found = [f"named twice: {name}" for name, values in names.items() if len(values) > 1]
    found += [f"process without a name: {pid}" for pid, _ in rows if ("process_name", pid, 0) not in names]
    found += [f"row without a name: {row}" for row in rows if ("thread_name", *row) not in names]
    found += [f"counter goes back in time: {name}" for name, ts in counters.items() if ts != sorted(ts)]
    for row, slices in rows.items():
        if any(a["ts"] > b["ts"] for a, b in itertools.pairwise(slices)):
            found.append(f"row goes back in time: {row}")
        found += [f"crosses another slice: {event}" for event in _crossing(slices)]
    return found


def _crossing(slices: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the slices that begin in one and end behind it; of two that begin at once, the first is the outer one."""
    found = []
    open_until: list[int] = []
    for event in slices:
        start, stop = event["ts"], event["ts"] + event["dur"]
        while open_until and open_until[-1] <= start:
            open_until.pop()
        if open_until and stop > open_until[-1]:
            found.append(event)
        open_until.append(stop)
    return found
