"""``python -m benchmarks``: measure cases, write records, tables and the chart."""

from __future__ import annotations

import argparse
import json
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from .cases import CASES, Case, find
from .results import render
from .runs import RunFailed, measure

HERE = Path(__file__).parent / "results"


def main(argv: list[str] | None = None) -> int:
    """Return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="fastload and its rivals, in turns, each run in a fresh process. Without a case: all of them.",
        epilog="cases: " + ", ".join(case.name for case in CASES),
    )
    parser.add_argument("cases", nargs="*", metavar="case")
    parser.add_argument("--repeats", type=int, help="runs of each rival")
    parser.add_argument(
        "--prime-gib",
        type=float,
        default=0.0,
        metavar="GIB",
        help="touch and give back so much memory before each run: for virtual machines that hand free memory to their host",
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
            for case in cases:
                chosen = case.quick() if options.quick else case
                write(
                    replace(chosen, repeats=options.repeats or chosen.repeats),
                    options.out,
                    int(options.prime_gib * 2**30),
                )
        except (RunFailed, RuntimeError) as error:
            print(error, file=sys.stderr)
            return 1
    for path in render(options.out):
        print(path)
    return 0


def write(case: Case, out: Path, prime_bytes: int) -> None:
    """Measure *case*; its records replace those of before only when all runs are through."""
    runs = measure(case, lambda line: print(line, file=sys.stderr, flush=True), prime_bytes=prime_bytes)
    records: list[dict[str, Any]] = list(runs)
    text = "".join(json.dumps(record) + "\n" for record in records)
    (out / f"{case.name}.jsonl").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
