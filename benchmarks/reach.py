"""What fastload is meant to reach, and whether it does: one line a goal, from the records alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from statistics import median

from fastload.settings import Settings

from .cases import CASES, HOT, STARTERS
from .records import Record, Results

MIB = 1 << 20
#: What a transfer may take: the ring, and so much beside it.
MOST_BYTES = Settings().ring_bytes + 64 * MIB


@dataclass(frozen=True, slots=True)
class Goal:
    """One figure and the most that it may be.

    Attributes:
        cases: Whose records it takes; without all of them there is no figure.
        value: ``None`` where a rival is missing in the records.
        spec: How the figures are shown.
    """

    letter: str
    text: str
    cases: tuple[str, ...]
    value: Callable[..., float | None]
    at_most: float
    spec: str = ".2f"

    def figure(self, found: Mapping[str, Results]) -> float | None:
        """Return the figure, if the records have it."""
        return self.value(*(found[name] for name in self.cases)) if set(self.cases) <= found.keys() else None


def against(rival: str, ours: str | None = None) -> Callable[[Results], float | None]:
    """Return what gives our time over that of *rival*."""
    return lambda results: results.ratio(rival, ours).median if rival in results.runs else None


def of_the_fastest(results: Results) -> float | None:
    """Return our time over that of the fastest way to load that is not ours."""
    others = [n for n in results.runs if not results.is_reference(n) and not n.startswith("fastload")]
    return max((results.ratio(name).median for name in others), default=None)


def of_the_slower_part(results: Results) -> float | None:
    """Return a cold start's time over the longer of imports and build alone, and the download alone; see :func:`_starters`."""
    return min(_starters(results))[0] if _starters(results) else None


def first_weight_s(results: Results) -> float | None:
    """Return when the hub was asked for the first weights by the one whose time :func:`of_the_slower_part` gives."""
    return results.median(min(_starters(results))[1], _first_weight_s) if _starters(results) else None


def _starters(results: Results) -> list[tuple[float, str]]:
    """Return of each way to start that is ours its ratio, the median of the rounds, and its name.

    Of the ways to build that were measured the faster one counts, in each round.
    """
    starters, built = ([name for name in names if name in results.runs] for names in (STARTERS, HOT))
    if not built or "curl" not in results.runs:
        return []
    times = {name: list(map(results.seconds, results.runs[name])) for name in (*starters, *built, "curl")}
    builds = map(min, zip(*(times[name] for name in built), strict=True))
    least = [max(build, wire) for build, wire in zip(builds, times["curl"], strict=True)]
    return [(median(mine / part for mine, part in zip(times[name], least, strict=True)), name) for name in starters]


def _first_weight_s(record: Record) -> float | None:
    return record.get("first_weight_s")


def floor_s(results: Results) -> float | None:
    """Return the least time that this machine can do with these files: all cores busy, and nothing done but the work.

    The server's CPU time counts: it runs on the same cores. Where one stage alone takes longer, because a file is hashed by
    one core, that is the floor.
    """
    used = floor_cpu_s(results)
    stages = [results.median(name, lambda r: r.get("stage_s")) for name in _STAGES]
    server = results.median("floor_receive", lambda r: r.get("server_cpu_s"))
    if used is None or server is None or None in stages:
        return None
    return max((used + server) / results.cores, *(s for s in stages if s is not None))


def floor_cpu_s(results: Results) -> float | None:
    """Return the CPU seconds of the three stages, each measured alone."""
    stages = [results.median(name, lambda r: r.get("stage_cpu_s")) for name in _STAGES]
    return None if None in stages else sum(s for s in stages if s is not None)


_STAGES = ("floor_receive", "floor_hash", "floor_write")


def _of_floor_time(results: Results) -> float | None:
    least, ours = floor_s(results), results.median(results.ours, results.seconds)
    return ours / least if least and ours else None


def _of_floor_cpu(results: Results) -> float | None:
    least, ours = floor_cpu_s(results), results.median(results.ours, lambda r: r.get("ready_cpu_s"))
    return ours / least if least and ours else None


def _receiving_alone(results: Results) -> float | None:
    ours, curl = (results.median(name, results.work_s) for name in ("fastload_receive", "curl"))
    return ours / curl if ours and curl else None


def _receiving(results: Results) -> float | None:
    """Our CPU time less what hashing and writing take alone (so all else counts as receiving, also what threads cost
    each other), over curl's."""
    ours, curl = results.median(results.ours, results.work_s), results.median("curl", results.work_s)
    stages = [results.median(name, lambda r: r.get("stage_cpu_s")) for name in ("floor_hash", "floor_write")]
    if ours is None or not curl or None in stages:
        return None
    return (ours - sum(s for s in stages if s is not None)) / curl


def own_bytes(results: Results, rival: str | None) -> float | None:
    """Return the most memory of no file that *rival* had at one moment."""
    return results.median(rival or "", lambda r: r.get("own_bytes"))


def _extra_mib(results: Results) -> float | None:
    ours, alone = own_bytes(results, results.ours), own_bytes(results, results.imports)
    return None if ours is None or alone is None else (ours - alone) / MIB


def _per_byte(small: Results, large: Results) -> float | None:
    """Time for a byte of the large model over that of the small one."""
    times = [r.median(r.ours, r.seconds) for r in (small, large)]
    return times[1] / large.bytes / (times[0] / small.bytes) if times[0] and times[1] else None


def _more_seconds(one: Results, many: Results) -> float | None:
    times = [r.median(r.ours, r.seconds) for r in (one, many)]
    return times[1] / times[0] if times[0] and times[1] else None


def _metadata(*all_results: Results) -> float | None:
    return max((r.median(r.ours, lambda record: record.get("api_requests")) or 0.0) for r in all_results)


def _after(ours: str, base: str) -> Callable[[Results], float | None]:
    def milliseconds(results: Results) -> float | None:
        mine, theirs = results.median(ours, results.seconds), results.median(base, results.seconds)
        return None if mine is None or theirs is None else (mine - theirs) * 1e3

    return milliseconds


def _curl(case: str) -> Goal:
    return Goal("A", "wire-bound: time, against bare curl", (case,), against("curl"), 1.05)


def _cold_start(case: str) -> tuple[Goal, Goal]:
    return (
        Goal(
            "I",
            "cold start: time, against the slower of imports + build and the download",
            (case,),
            of_the_slower_part,
            1.1,
        ),
        Goal("I", "cold start: first weights asked for, s after the process started", (case,), first_weight_s, 0.5),
    )


def _memory_goal(case: str) -> Goal:
    text = "memory beyond the model's own and the imports', MiB"
    return Goal("F", text, (case,), _extra_mib, MOST_BYTES / MIB, ".0f")


GOALS = (
    *map(_curl, ("wire_llama", "wire_single", "wire_many")),
    Goal("B", "CPU-bound: time, of the floor's", ("floor_llama",), _of_floor_time, 1.25),
    Goal("B", "CPU-bound: time, of the floor's", ("floor_single",), _of_floor_time, 1.25),
    Goal("B", "CPU-bound: CPU-s until then, of the floor's", ("floor_llama",), _of_floor_cpu, 1.15),
    Goal("B", "CPU-bound: CPU-s until then, of the floor's", ("floor_single",), _of_floor_cpu, 1.15),
    Goal("C", "time, against the fastest other way", ("load_llama",), of_the_fastest, 1.0),
    Goal("C", "time, against the fastest other way", ("tensors_llama",), of_the_fastest, 1.0),
    Goal("D", "TLS: CPU-s of receiving alone, against curl's", ("tls_llama",), _receiving_alone, 1.1),
    Goal("D", "TLS: CPU-s of all but hashing and writing, against curl's", ("tls_llama",), _receiving, 1.1),
    Goal("E", "page cache hot: time, against the fastest other way", ("warm_hot",), of_the_fastest, 1.02),
    Goal("E", "page cache cold: time, against the fastest other way", ("warm_cold",), of_the_fastest, 1.02),
    *map(_memory_goal, ("memory_100m", "memory_2g", "memory_10g")),
    Goal("G", "time with 98 shards, of one shard's", ("growth_1", "growth_98"), _more_seconds, 1.1),
    Goal("G", "time for a byte of 10 GB, of 2 GB", ("growth_10", "growth_10g"), _per_byte, 1.1),
    Goal("G", "metadata requests", ("growth_1", "growth_10", "growth_98"), _metadata, 1, ".0f"),
    Goal("G", "1,000 small files: time, against wrk's", ("small_files",), against("wrk"), 1.5),
    Goal("H", "import, ms beyond python -c pass", ("import",), _after("fastload_import", "python_pass"), 50, ".0f"),
    Goal(
        "H",
        "first weights asked for, ms beyond python -c pass",
        ("first_byte",),
        _after("fastload_command", "python_pass"),
        450,
        ".0f",
    ),
    *(goal for case in CASES if case.name.startswith("cold_start_") for goal in _cold_start(case.name)),
)


def lines(found: Mapping[str, Results]) -> Iterator[str]:
    """Yield a table of all goals that the records have figures for."""
    rows = [(goal, figure) for goal in GOALS if (figure := goal.figure(found)) is not None]
    if not rows:
        return
    yield "| | goal | case | at most | is | |"
    yield "|---|---|---|---|---|---|"
    for goal, figure in rows:
        cases = ", ".join(f"[{name}]({name}.md)" for name in goal.cases)
        met = "reached" if figure <= goal.at_most else "**not reached**"
        yield f"| {goal.letter} | {goal.text} | {cases} | {goal.at_most:{goal.spec}} | {figure:{goal.spec}} | {met} |"
