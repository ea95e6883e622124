"""What a supervisor has counted, as Prometheus text (exposition format 0.0.4): base units. Pure."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import get_args

from ..metrics import Family
from .life import Life, State
from .progress import Progress


@dataclass(slots=True)
class Counts:
    """What has been counted since the supervisor began.

    Attributes:
        wakes: By who asked: ``wake`` or ``request``.
        answers: Requests to the app, by the status of the answer.
        refused: Requests that were not passed on, by why.
        held: Requests that wait for a start right now.
        held_s: How long all those that had to wait did.
    """

    wakes: Counter[str] = field(default_factory=Counter)
    answers: Counter[int] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    held: int = 0
    held_s: float = 0.0


def exposition(counts: Counts, life: Life, progress: Progress, travelled_bytes: int) -> str:
    """Return the text.

    Args:
        travelled_bytes: In the starts before the one of *progress*.
    """
    state = Family("fastload_serve_state", "gauge", "1 for the state that the app is in.")
    for name in get_args(State):
        state.add(float(name == life.state), state=name)
    starts = Family(
        "fastload_serve_start_seconds", "summary", "From wake to the verified first output, or the failure."
    )
    for outcome, total in life.totals.items():
        starts.add(total.seconds, "_sum", outcome=outcome)
        starts.add(total.count, "_count", outcome=outcome)
    phases = Family("fastload_serve_last_start_seconds", "gauge", "How long a phase of the newest start was busy.")
    for row in progress.to_record(life.clock())["waterfall"]:
        phases.add(row["seconds"], phase=row["name"])
    travelled = Family("fastload_serve_bytes_total", "counter", "Bytes of models that came over the network.")
    travelled.add(travelled_bytes + progress.travelled_bytes)
    families = [state, starts, phases, travelled, *_counters(counts, life)]
    return "".join(f"{line}\n" for family in families for line in family.lines())


def _counters(counts: Counts, life: Life) -> list[Family]:
    wakes = Family("fastload_serve_wakes_total", "counter", "What asked for a start.")
    for cause, count in counts.wakes.items():
        wakes.add(count, cause=cause)
    answers = Family("fastload_serve_requests_total", "counter", "Requests that the app answered, by status.")
    for status, count in counts.answers.items():
        answers.add(count, code=str(status))
    refused = Family("fastload_serve_refused_total", "counter", "Requests that were not passed on to the app.")
    for reason, count in counts.refused.items():
        refused.add(count, reason=reason)
    simple = (
        ("fastload_serve_held_requests", "gauge", "Requests that wait for a start.", counts.held),
        ("fastload_serve_held_seconds_total", "counter", "How long requests waited for a start.", counts.held_s),
        ("fastload_serve_requests_in_flight", "gauge", "Requests that are with the app.", life.in_flight),
        ("fastload_serve_failures_total", "counter", "Starts that failed and crashes.", life.crashes),
    )
    families = [wakes, answers, refused]
    for name, kind, help, value in simple:
        families.append(Family(name, kind, help))
        families[-1].add(value)
    return families
