"""Spans appear where the program uses OpenTelemetry, under the trace that started it, and cost nothing elsewhere."""

from __future__ import annotations

import subprocess
import sys

import pytest

import fastload
from fastload.builtin import opentelemetry as plugin
from fastload.events import Event
from fastload.settings import Settings
from fastload.testing import Hub

sdk = pytest.importorskip("opentelemetry.sdk.trace", reason="needs opentelemetry-sdk")

TRACE = "0af7651916cd43dd8448eb211c80319c"


@pytest.fixture(scope="module")
def provider():
    """The tracer provider of this process, which can be set once."""
    from opentelemetry import trace

    made = sdk.TracerProvider()
    trace.set_tracer_provider(made)
    return made


@pytest.fixture
def spans(provider):
    """Names of ended spans → spans, as the exporter got them."""
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter = InMemorySpanExporter()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return lambda: {span.name: span for span in exporter.get_finished_spans()}


def test_a_load_and_its_phases_are_spans_under_traceparent(spans, hub: Hub, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TRACEPARENT", f"00-{TRACE}-b7ad6b7169203331-01")
    fastload.prefetch("org/tiny")
    found = spans()
    load = found["fastload.load"]
    assert {"fastload.resolve", "fastload.download"} <= found.keys()
    assert format(load.context.trace_id, "032x") == TRACE
    assert format(load.parent.span_id, "016x") == "b7ad6b7169203331"
    assert found["fastload.download"].parent.span_id == load.context.span_id
    assert load.start_time <= found["fastload.download"].start_time <= found["fastload.download"].end_time
    assert found["fastload.download"].end_time <= load.end_time
    assert load.attributes["fastload.source"] == "org/tiny"
    assert load.attributes["fastload.travelled_bytes"] > 200_000
    assert load.status.is_ok or load.status.is_unset


def test_the_current_span_comes_before_traceparent(spans, hub: Hub, monkeypatch: pytest.MonkeyPatch):
    from opentelemetry import trace

    monkeypatch.setenv("TRACEPARENT", f"00-{TRACE}-b7ad6b7169203331-01")
    with trace.get_tracer("program").start_as_current_span("request") as request:
        fastload.prefetch("org/tiny")
    assert spans()["fastload.load"].parent.span_id == request.get_span_context().span_id


def test_a_failed_load_is_an_error(spans, hub: Hub):
    with pytest.raises(fastload.errors.NotFoundError):
        fastload.prefetch("org/nothing")
    load = spans()["fastload.load"]
    assert (load.status.is_ok, load.attributes["error.type"]) == (False, "NotFoundError")
    assert load.parent is None


def test_times_are_those_of_the_wall_clock(spans, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(plugin.time, "time_ns", lambda: 1_000_000_000_000)
    monkeypatch.setattr(plugin.time, "monotonic_ns", lambda: 200_000_000_000)
    observe = plugin.fastload_observer("org/model", Settings())
    observe(Event("load.started", 190.0))
    observe(Event("load.finished", 195.0, 5.0))
    load = spans()["fastload.load"]
    assert (load.start_time, load.end_time) == (990_000_000_000, 995_000_000_000)


def test_a_program_without_opentelemetry_does_not_import_it():
    code = (
        "import sys, fastload; from fastload.builtin import opentelemetry as p; from fastload.events import Event\n"
        "o = p.fastload_observer('x', None); o(Event('load.started', 1.0)); o(Event('load.finished', 2.0, 1.0))\n"
        "print('opentelemetry' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
