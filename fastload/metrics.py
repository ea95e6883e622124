"""Profiles as Prometheus text (exposition format 0.0.4): base units, loads of one source added up. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

from .measured import Profile
from .profile import Profiles

_Labels = tuple[tuple[str, str], ...]


class Family:
    """One metric: its samples, added up by labels."""

    def __init__(self, name: str, kind: str, help: str) -> None:
        self.name = name
        self._kind = kind
        self._help = help
        self._samples: dict[tuple[str, _Labels], float] = {}

    def add(self, value: float, suffix: str = "", **labels: str) -> None:
        key = (suffix, tuple(labels.items()))
        self._samples[key] = self._samples.get(key, 0.0) + value

    def lines(self) -> Iterator[str]:
        if self._samples:
            yield f"# HELP {self.name} {self._help}"
            yield f"# TYPE {self.name} {self._kind}"
        for (suffix, labels), value in self._samples.items():
            inner = ",".join(f'{name}="{_escape(text)}"' for name, text in labels)
            yield (
                f"{self.name}{suffix}{{{inner}}} {float(value)!r}" if inner else f"{self.name}{suffix} {float(value)!r}"
            )


def prometheus(subject: Profiles | Profile) -> str:
    """Return *subject* as Prometheus text; loads that still run are left out."""
    loads = tuple(subject.loads) if isinstance(subject, Profiles) else (subject,)
    ended = [load for load in loads if load.finished]
    families = [_seconds(ended), *_phases(ended), _bytes(ended), *_counts(ended)]
    if isinstance(subject, Profiles):
        families += _cold_start(subject)
    return "".join(f"{line}\n" for family in families for line in family.lines())


def _seconds(loads: Iterable[Profile]) -> Family:
    family = Family("fastload_load_seconds", "summary", "From the call to the verified model.")
    for load in loads:
        labels = {"source": load.source, "outcome": "ok" if load.ok else "failed"}
        family.add(load.total_s, "_sum", **labels)
        family.add(1, "_count", **labels)
    return family


def _phases(loads: Iterable[Profile]) -> Iterator[Family]:
    busy = Family("fastload_phase_seconds_total", "counter", "How long a phase was busy.")
    hidden = Family("fastload_hidden_seconds_total", "counter", "How much of it cost the load nothing.")
    for load in loads:
        for phase in load.phases:
            busy.add(phase.busy_s, source=load.source, phase=phase.name)
            hidden.add(phase.hidden_s, source=load.source, phase=phase.name)
    yield busy
    yield hidden


def _bytes(loads: Iterable[Profile]) -> Family:
    family = Family("fastload_bytes_total", "counter", "Where the bytes came from.")
    for load in loads:
        tiers = {"network": load.travelled_bytes, "cache": load.cached_bytes, "resumed": load.resumed_bytes}
        for tier, count in tiers.items():
            family.add(count, source=load.source, tier=tier)
    return family


def _counts(loads: Iterable[Profile]) -> Iterator[Family]:
    counts: Mapping[str, tuple[str, Callable[[Profile], float]]] = {
        "fastload_requests_total": ("HTTP requests.", lambda load: load.requests),
        "fastload_retries_total": ("Attempts at ranges that failed.", lambda load: load.retries),
        "fastload_refetched_files_total": ("Files whose digest did not match at first.", lambda load: load.refetched),
        "fastload_waited_seconds_total": ("How long readers waited for bytes.", lambda load: load.waited_s),
    }
    for name, (help, count) in counts.items():
        family = Family(name, "counter", help)
        for load in loads:
            family.add(count(load), source=load.source)
        yield family


def _cold_start(profiles: Profiles) -> Iterator[Family]:
    cold = profiles.cold_start
    if not profiles.loads:
        return
    family = Family("fastload_cold_start_seconds", "gauge", "From process start to the last load, shared out.")
    for share in cold.shares:
        family.add(share.seconds, phase=share.name)
    yield family


def _escape(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
