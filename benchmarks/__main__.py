"""``python -m benchmarks``: measure cases, write records, tables and the chart."""

from __future__ import annotations

import argparse
import json
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from . import memory
from .cases import CASES, Case, find
from .results import render
from .runs import RunFailed, measure, runs_folder

HERE = Path(__file__).parent / "results"
PRIME_GIB = 8.0  # measured: enough for a load of 2 GB with its imports, and for the second or two until it needs them


def main(argv: list[str] | None = None) -> int:
    """Return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="fastload and its rivals, in turns, each run in a fresh process. Without a case: the usual ones.",
        epilog="cases: " + ", ".join(case.name for case in CASES),
    )
    parser.add_argument("cases", nargs="*", metavar="case")
    parser.add_argument("--repeats", type=int, help="runs of each rival")
    parser.add_argument(
        "--prime-gib",
        type=float,
        default=0.0,
        metavar="GIB",
        help="as --memory primed, with so much: for virtual machines that hand free memory to their host",
    )
    parser.add_argument(
        "--memory",
        choices=memory.STATES,
        default="as-is",
        help="before each run: leave memory as it is; touch and give back --prime-gib; or keep the page cache full",
    )
    parser.add_argument("--quick", action="store_true", help="a smoke test: a model of 8 MB, two runs")
    parser.add_argument("--out", type=Path, default=HERE, metavar="DIR", help="where results go (benchmarks/results)")
    parser.add_argument("--render", action="store_true", help="only draw again what is there")
    options = parser.parse_args(argv)
    try:
        cases = find(options.cases)
    except ValueError as error:
        parser.error(str(error))
    if options.quick and options.out == HERE:
        parser.error("--quick is no measurement: give --out")
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that servers and caches go too
    options.out.mkdir(parents=True, exist_ok=True)
    if not options.render:
        try:
            measure_all(cases, options)
        except (RunFailed, RuntimeError) as error:
            print(error, file=sys.stderr)
            return 1
    for path in render(options.out):
        print(path)
    return 0


def measure_all(cases: list[Case], options: argparse.Namespace) -> None:
    """Measure *cases*; the records of each replace those of before only when all its runs are through."""
    name = "primed" if options.prime_gib else options.memory
    prime_bytes = int((options.prime_gib or PRIME_GIB) * 2**30) if name == "primed" else 0
    with memory.state(name, runs_folder(), prime_bytes) as settle:
        for case in cases:
            chosen = case.quick() if options.quick else case
            chosen = replace(chosen, repeats=options.repeats or chosen.repeats)
            records: list[dict[str, Any]] = list(measure(chosen, say, settle, memory=name, prime_bytes=prime_bytes))
            text = "".join(json.dumps(record) + "\n" for record in records)
            (options.out / f"{case.name}.jsonl").write_text(text, encoding="utf-8")


def say(line: str) -> None:
    """Tell how far it is."""
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
