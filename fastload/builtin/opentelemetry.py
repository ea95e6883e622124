"""OpenTelemetry spans of a load and its phases, where the program uses OpenTelemetry."""

from __future__ import annotations

import os
import sys
import time
from typing import TYPE_CHECKING, Any

from ..events import Event
from ..hookspecs import hookimpl
from ..measured import Profile

if TYPE_CHECKING:
    from ..events import Observer
    from ..settings import Settings


@hookimpl
def fastload_observer(source: str, settings: Settings) -> Observer:
    """Tell the program's tracer of the load of *source* once it has ended."""
    profile = Profile(source)
    context = None if "opentelemetry" not in sys.modules else _context()

    def observe(event: Event) -> None:
        profile.observe(event)
        # Whoever wants spans has imported it by now: without a tracer that somebody set up they go nowhere.
        if event.name in ("load.finished", "load.failed") and "opentelemetry" in sys.modules:
            _export(profile, context)

    return observe


def _context() -> Any:
    """Return what the load's span belongs to: the span that is current here, else what TRACEPARENT names."""
    from opentelemetry import context, propagate, trace

    if trace.get_current_span().get_span_context().is_valid:
        return context.get_current()
    carrier = {name.lower(): os.environ[name] for name in ("TRACEPARENT", "TRACESTATE") if name in os.environ}
    return propagate.extract(carrier)


def _export(profile: Profile, context: Any) -> None:
    from opentelemetry import trace

    tracer = trace.get_tracer("fastload")
    origin_ns = time.time_ns() - time.monotonic_ns() + round(profile.started_s * 1e9)

    def at(seconds: float) -> int:
        return origin_ns + round(seconds * 1e9)

    attributes = {
        "fastload.source": profile.source,
        "fastload.commit": profile.commit,
        "fastload.files": profile.files,
        "fastload.planned_bytes": profile.planned_bytes,
        "fastload.travelled_bytes": profile.travelled_bytes,
        "fastload.requests": profile.requests,
        "fastload.retries": profile.retries,
    }
    load = tracer.start_span("fastload.load", context=context or _context(), start_time=at(0.0), attributes=attributes)
    if profile.error is not None:
        load.set_attribute("error.type", profile.error[0])
        load.set_status(trace.StatusCode.ERROR, profile.error[1])
    inside = trace.set_span_in_context(load)
    for phase in profile.phases:
        numbers = {"fastload.busy_s": phase.busy_s, "fastload.hidden_s": phase.hidden_s, "fastload.bytes": phase.bytes}
        span = tracer.start_span(
            f"fastload.{phase.name}", context=inside, start_time=at(phase.start_s), attributes=numbers
        )
        span.end(at(phase.stop_s))
    load.end(at(profile.total_s))
