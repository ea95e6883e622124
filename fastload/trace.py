"""Profiles as a Chrome trace: JSON that Perfetto (https://ui.perfetto.dev) and chrome://tracing open.

One process row for the program, with the slots and devices that it feeds, and one for the process of its transfer. Network,
disk and hash work is laid on as many lanes as there was at once, which for the network is the number of connections in use.
Pure: returns plain data.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from .coldstart import process_started_s
from .events import Event
from .importing import ImportTimes
from .measured import Profile
from .profile import Profiles

#: Event → lanes that it stands on, for work of the transfer; the order is that of the rows.
_TRANSFER = {
    "resolve.finished": "resolve",
    "range.landed": "network",
    "write.finished": "disk",
    "verify.advanced": "hash",
}
_MOMENTS = ("range.retried", "file.refetched", "file.verified")


@dataclass(frozen=True, slots=True)
class Slice:
    """Something that took a while, on one of the lanes with the same name; microseconds."""

    lanes: str
    name: str
    start_us: int
    stop_us: int
    args: Mapping[str, Any] = field(default_factory=dict)


def chrome_trace(subject: Profiles | Profile) -> dict[str, Any]:
    """Return *subject* as a trace, to be written with :func:`json.dump`.

    Without events (``fastload.profile(events=True)`` keeps them) it has phases only. Time 0 is the first thing that
    happened; for a block of profiles the start of the process, unless what it joined had begun before that.
    """
    loads = tuple(subject.loads) if isinstance(subject, Profiles) else (subject,)
    imports = subject.imports if isinstance(subject, Profiles) else None
    origin_s = _origin_s(subject)
    rows = {os.getpid(): _Row()} if isinstance(subject, Profiles) else {}
    seen: set[tuple[str, float, str | None]] = set()
    if imports is not None:
        rows[os.getpid()].slices += _import_slices(imports, origin_s)
    for load in loads:
        program = rows.setdefault(load.pid, _Row())
        program.names["program"] = True
        program.slices += _program_slices(load, origin_s)
        # Loads that joined one transfer were all told of it.
        events = [e for e in load.events or () if (e.name, e.at_s, e.file) not in seen]
        seen |= {(e.name, e.at_s, e.file) for e in events}
        transfer = rows.setdefault(_transfer_pid(load), _Row())
        transfer.names["transfer"] = True
        transfer.slices += _transfer_slices(events, origin_s)
        transfer.rest += [*_moments(events, origin_s), *_received(events, origin_s)]
    drawn = [event for number, pid in enumerate(rows) for event in rows[pid].draw(pid, number)]
    return {"traceEvents": drawn, "displayTimeUnit": "ms"}


def lanes(slices: Iterable[Slice]) -> list[list[Slice]]:
    """Share *slices* out over as few lanes as hold them without two at once."""
    rows: list[list[Slice]] = []
    for item in sorted(slices, key=lambda s: (s.start_us, s.stop_us)):
        free = next((row for row in rows if row[-1].stop_us <= item.start_us), None)
        if free is None:
            rows.append([item])
        else:
            free.append(item)
    return rows


def load_slices(profile: Profile) -> list[Slice]:
    """As :func:`transfer_slices`, and what went to devices: on lanes ``slot 1`` …, and on one with the device's name."""
    return [*transfer_slices(profile), *_copy_slices(profile.events or (), profile.started_s)]


def transfer_slices(profile: Profile) -> list[Slice]:
    """Return what the transfer of *profile* did, in microseconds since the load was asked for; needs its events."""
    return list(_transfer_slices(profile.events or (), profile.started_s))


def _origin_s(subject: Profiles | Profile) -> float:
    loads = subject.loads if isinstance(subject, Profiles) else (subject,)
    begun_s = [process_started_s()] if isinstance(subject, Profiles) else []
    for load in loads:
        begun_s += [load.started_s, *(e.at_s - e.seconds for e in load.events or ())]
    return min(begun_s)


def _transfer_pid(profile: Profile) -> int:
    """Return the process that fetched; the program's own where nobody said."""
    pids = [e.data["pid"] for e in profile.events or () if e.name == "transfer.started" and "pid" in e.data]
    return int(pids[0]) if pids else profile.pid


def _us(at_s: float, origin_s: float) -> int:
    return round((at_s - origin_s) * 1e6)


def _program_slices(load: Profile, origin_s: float) -> Iterator[Slice]:
    start_s = load.started_s
    what = {"commit": load.commit, "ok": load.ok, "files": load.files, "bytes": load.planned_bytes}
    yield Slice("load", load.source or "load", _us(start_s, origin_s), _us(start_s + load.total_s, origin_s), what)
    for phase in load.phases:
        if phase.name == "build" or load.events is None:
            for a, b in phase.intervals:
                yield Slice(phase.name, phase.name, _us(start_s + a, origin_s), _us(start_s + b, origin_s))
    for event in load.events or ():
        if event.name == "build.waited" and event.at_s >= start_s:
            yield _slice(event, "waits for bytes", origin_s)
    yield from _copy_slices((e for e in load.events or () if e.at_s >= start_s), origin_s)


def _transfer_slices(events: Iterable[Event], origin_s: float) -> Iterator[Slice]:
    for event in events:
        if event.name in _TRANSFER and event.seconds:
            yield _slice(event, _TRANSFER[event.name], origin_s)


def _copy_slices(events: Iterable[Event], origin_s: float) -> Iterator[Slice]:
    """Yield what became of each slot: read into, waiting for the copies before it, copied; the last for its device too."""
    for event in events:
        if event.name == "copy.finished" and event.seconds:
            taken_s = event.at_s - event.seconds
            filled_s = taken_s + event.data.get("read_s", 0.0)
            begun_s = filled_s + event.data.get("queued_s", 0.0)
            device = str(event.data.get("device", "device"))
            slot = f"slot {event.data.get('slot', 0) + 1}"
            what = {**event.data, "file": event.file, "device": device}
            moments = [_us(at_s, origin_s) for at_s in (taken_s, filled_s, begun_s, event.at_s)]
            for name, start_us, stop_us in zip(("read", "queued", "copy"), moments, moments[1:], strict=False):
                if stop_us > start_us:
                    yield Slice(slot, name, start_us, stop_us, what)
            yield Slice(device, event.file or device, moments[2], moments[3], what)


def _import_slices(imports: ImportTimes, origin_s: float) -> Iterator[Slice]:
    threads: dict[int, int] = {}
    for module in tuple(imports.modules):
        number = threads.setdefault(module.thread, len(threads) + 1)
        row = "imports" if number == 1 else f"imports, thread {number}"
        yield Slice(row, module.name, _us(module.start_s, origin_s), _us(module.stop_s, origin_s))


def _slice(event: Event, row: str, origin_s: float) -> Slice:
    start_us, stop_us = _us(event.at_s - event.seconds, origin_s), _us(event.at_s, origin_s)
    return Slice(row, event.file or row, start_us, stop_us, event.data)


# -- as the format has it ---------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Row:
    """One process: what it was, what is on its lanes, and what stands beside them."""

    names: dict[str, bool] = field(default_factory=dict)
    slices: list[Slice] = field(default_factory=list)
    rest: list[dict[str, Any]] = field(default_factory=list)

    def draw(self, pid: int, number: int) -> Iterator[dict[str, Any]]:
        """Yield its name, its lanes in order of first use, and what is on them."""
        yield _meta("process_name", pid, 0, name=" and ".join(self.names) or "program")
        yield _meta("process_sort_index", pid, 0, sort_index=number)
        tid = 0
        for name in dict.fromkeys(s.lanes for s in self.slices):
            mine = [s for s in self.slices if s.lanes == name]
            rows = [mine] if name.startswith("imports") else lanes(mine)  # an import stands on the one that it is in
            for index, lane in enumerate(rows):
                tid += 1
                yield _meta("thread_name", pid, tid, name=f"{name} {index + 1}" if len(rows) > 1 else name)
                yield _meta("thread_sort_index", pid, tid, sort_index=tid)
                for s in sorted(lane, key=lambda s: (s.start_us, -s.stop_us)):  # what lies in another behind it
                    span = {"ts": s.start_us, "dur": s.stop_us - s.start_us}
                    yield {"ph": "X", "name": s.name, "cat": name, "pid": pid, "tid": tid, **span, "args": dict(s.args)}
        yield from ({**event, "pid": pid, "tid": 0} for event in self.rest)


def _meta(kind: str, pid: int, tid: int, **args: Any) -> dict[str, Any]:
    return {"ph": "M", "name": kind, "pid": pid, "tid": tid, "args": args}


def _moments(events: Iterable[Event], origin_s: float) -> Iterator[dict[str, Any]]:
    for event in events:
        if event.name in _MOMENTS:
            what = {"file": event.file, **event.data}
            yield {"ph": "i", "s": "p", "name": event.name, "ts": _us(event.at_s, origin_s), "args": what}


def _received(events: Iterable[Event], origin_s: float) -> Iterator[dict[str, Any]]:
    """Yield a counter of the bytes that have landed."""
    total = 0
    for event in sorted((e for e in events if e.name == "range.landed"), key=lambda e: e.at_s):
        total += event.data["stop"] - event.data["start"]
        yield {"ph": "C", "name": "received", "ts": _us(event.at_s, origin_s), "args": {"MB": total / 1e6}}
