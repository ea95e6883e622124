"""One examination: checks, the model's files, rates of the machine, and what they come to."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from ..asking import Asked, ask
from ..cache import RepoCache
from ..errors import FastloadError, MirrorStatusError
from ..listing import list_files
from ..plan import select
from ..report import table
from ..settings import Settings
from ..types import Manifest
from . import checks, limits, rates
from .bounds import GB, Estimate, Weights, estimate, rate, size
from .checks import Check
from .rates import Cost, Rates

#: What is estimated when nobody names a model.
EXAMPLE = Weights("10 GB in five files, for example", 10 * 10**9, 5, 2 * 10**9, example=True)


@dataclass(frozen=True, slots=True)
class Examination:
    """What was found.

    Attributes:
        measured_s: How long measuring took.
    """

    checks: tuple[Check, ...]
    weights: Weights
    rates: Rates
    estimate: Estimate
    measured_s: float

    @property
    def ok(self) -> bool:
        """Whether nothing is broken."""
        return not any(check.state == "broken" for check in self.checks)

    def to_record(self) -> dict[str, Any]:
        """Return plain data."""
        return {
            "ok": self.ok,
            "checks": [asdict(check) for check in self.checks],
            "weights": asdict(self.weights),
            "rates": asdict(self.rates),
            "estimate": asdict(self.estimate),
            "measured_s": self.measured_s,
        }

    def lines(self) -> Iterator[str]:
        """Yield the report as text."""
        for check in self.checks:
            yield f"{check.state:<7} {check.name}: {check.text}"
            if check.hint and check.state != "ok":
                yield f"        hint: {check.hint}"
        yield ""
        yield f"this machine (measured in {self.measured_s:.1f} s)"
        yield from (f"  {line}" for line in table(list(_rows(self.rates))).splitlines())
        yield ""
        yield from self._conclusion()

    def _conclusion(self) -> Iterator[str]:
        found = self.estimate
        files = "file" if self.weights.files == 1 else "files"
        yield (
            self.weights.name
            if self.weights.example
            else f"{self.weights.name}: {size(self.weights.total_bytes)} in {self.weights.files} {files}"
        )
        stages = sorted(found.stages, key=lambda stage: -stage.seconds)
        rows = [(stage.name, f"{stage.seconds:.2f} s", stage.text) for stage in stages]
        yield from (f"  {line}" for line in table(rows).splitlines())
        yield f"bound by: {found.bound}; about {found.seconds:.1f} s from an empty cache; the imports run meanwhile"
        if not any(stage.name == "link" for stage in stages):
            yield f"a link of {rate(found.break_even_bytes_per_s)} or more would wait for this machine (--link says yours)"
        if found.cached_s is not None:
            yield f"from the cache: about {found.cached_s:.1f} s if it is on the disk, next to nothing if in memory"
        if self.weights.cached_bytes == self.weights.total_bytes:
            yield "all of it is on this machine already: nothing of the above is waited for"
        elif self.weights.cached_bytes:
            yield f"{size(self.weights.cached_bytes)} of it are in the cache"
        yield from (f"to change: {advice}" for advice in found.advice)


def examine(
    source: str | None = None,
    *,
    revision: str | None = None,
    settings: Any = None,
    link_bytes_per_s: float | None = None,
) -> Examination:
    """Examine this machine, and what a load of *source* would wait for on it. One request to the hub.

    Args:
        link_bytes_per_s: What the link to the hub carries; nothing here measures it.

    Raises:
        SettingsError: A setting is wrong.
        PluginError: A plugin that knows platforms failed. Whatever else is wrong is among the checks.
    """
    asked = ask(source or "any/model", revision=revision, settings=settings)
    reached, weights, round_trip_s = _asked_for(asked, source)
    missing = 0 if weights.example else weights.total_bytes - weights.cached_bytes
    found = (*checks.on_this_machine(asked.settings, missing), reached)
    started_s = time.perf_counter()
    measured = rates.measure(checks.nearest(asked.settings.cache_dir))
    measured_s = time.perf_counter() - started_s
    come_to = estimate(
        weights,
        measured,
        link_bytes_per_s=link_bytes_per_s,
        tls=asked.settings.endpoint.startswith("https:"),
        shards=asked.settings.shards,
        dirty_bytes=limits.dirty_bytes(),
        round_trip_s=round_trip_s,
        gives_free_pages_back=limits.gives_free_pages_back(),
    )
    return Examination(found, weights, measured, come_to, measured_s)


def _asked_for(asked: Asked, source: str | None) -> tuple[Check, Weights, float]:
    """Return whether the hub answers, what *source* holds, and how long one answer took."""
    endpoint = asked.settings.endpoint
    started_s = time.perf_counter()
    try:
        if source is None:
            answer = _reach(asked.settings)
            return Check("hub", "ok", f"{endpoint} {answer[0]}"), EXAMPLE, answer[1]
        manifest = list_files(asked)
    except FastloadError as e:
        return Check("hub", "broken", e.message, e.hint or "check the network, HF_ENDPOINT and proxies"), EXAMPLE, 0.0
    taken_s = time.perf_counter() - started_s
    weights = _weights(manifest, asked)
    if manifest.local is not None:
        return Check("source", "ok", f"{manifest.local}: nothing travels"), weights, 0.0
    text = f"{endpoint} lists {manifest.source} at {manifest.commit} ({taken_s * 1e3:.0f} ms, imports included)"
    return Check("hub", "ok", text), weights, 0.0


def _weights(manifest: Manifest, asked: Asked) -> Weights:
    files = select(manifest, asked.request.patterns, options=asked.request.options).files
    sizes = there = [file.size for file in files]
    if manifest.local is None:
        cache = RepoCache(asked.settings.cache_dir, manifest.source, symlinks=asked.settings.symlinks)
        there = [file.size for file in files if cache.find(manifest.commit, file) is not None]
    return Weights(manifest.source, sum(sizes), len(sizes), max(sizes, default=0), sum(there))


def _reach(settings: Settings) -> tuple[str, float]:
    """Ask the endpoint for anything; return what it said and how long that took. From any thread.

    Raises:
        FastloadError: It does not answer.
    """
    if settings.offline:
        return "was not asked: the network is off", 0.0
    answer: list[tuple[str, float]] = []
    error: list[FastloadError] = []

    def main() -> None:
        try:
            with asyncio.Runner(loop_factory=asyncio.new_event_loop) as runner:
                answer.append(runner.run(_ask_endpoint(settings)))
        except FastloadError as e:
            error.append(e)

    thread = threading.Thread(target=main, name="fastload-loop", daemon=True)
    thread.start()
    thread.join()
    if error:
        raise error[0]
    return answer[0]


async def _ask_endpoint(settings: Settings) -> tuple[str, float]:
    from ..http import HttpClient

    async with HttpClient(settings, settings.endpoint) as http:
        started_s = time.perf_counter()
        try:
            await http.head(f"{settings.endpoint}/api/models")
            said = "answers"
        except MirrorStatusError as e:  # also an answer
            said = f"answers with {e.status}"
        taken_s = time.perf_counter() - started_s
        return f"{said} ({taken_s * 1e3:.0f} ms)", taken_s


def _rows(found: Rates) -> Iterator[tuple[str, str, str]]:
    def row(name: str, cost: Cost, more: str = "") -> tuple[str, str, str]:
        return name, rate(cost.bytes_per_s), f"{cost.cpu_s_per_gb:.2f} CPU-s/GB{more}"

    yield "cores", f"{found.cores:g}", ""
    yield row("sha256, one core", found.sha256)
    yield "sha256, all cores", rate(found.sha256_bytes_per_s), ""
    yield row("receive, loopback", found.receive)
    yield row("new memory", found.new_pages)
    if found.write is not None:
        yield row("write, page cache", found.write)
    for name, bytes_per_s in (
        ("disk, write", found.disk_write_bytes_per_s),
        ("disk, read", found.disk_read_bytes_per_s),
    ):
        if bytes_per_s is not None:
            yield name, rate(bytes_per_s), ""
    yield "start of a process", f"{found.child_start_s:.2f} s", ""
    if found.device is not None:
        yield row("page-locking", found.device.pin, f", once for {size(GB / 16)}")
        yield "copy to the device", rate(found.device.copy_bytes_per_s), found.device.name
