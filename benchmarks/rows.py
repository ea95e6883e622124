"""Does every kind of model load while its bytes arrive, without copies, and with no request too many?

    python -m benchmarks.rows                                      all rows: 10 minutes on 2 quiet cores
    python -m benchmarks.rows --memory resident llama flux         two rows, with the page cache full; others stay as they were
    python -m benchmarks.rows --quick --out /tmp/smoke gpt2        does it run? (tiny models: no figures)
    python -m benchmarks.rows --render                             the page again, from the records that are there

Writes ``benchmarks/results/rows.md`` and the runs as ``rows.jsonl``. Of each row the usual way and fastload have a process
each, in which a tiny model was loaded before, and take turns. Needs transformers, diffusers, sentence-transformers and gguf
(rows without theirs are left out); models are made on first use in ``~/.cache/fastload-testbed`` (`$FASTLOAD_TESTBED` names
another folder), 3.5 GB.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

from . import memory
from .machine import facts, load_average
from .records import Spread
from .rowmodels import folder_of
from .rowrun import RATE_BYTES_PER_S, ROWS, Row, fill, plain_runs, streamed_runs
from .runs import runs_folder

ROOT = Path(__file__).resolve().parents[1]
HERE = Path(__file__).parent / "results"
Record = dict[str, Any]
#: Of the usual way's time from the cache, and of the bytes returned: what a row is to reach.
TAIL_SHARE, ZERO_COPY_SHARE = 0.10, 0.99
_LIBRARIES = {"sd15": "diffusers", "flux": "diffusers", "sentences": "sentence_transformers", "gguf": "gguf"}


# -- measuring ----------------------------------------------------------------------------------------------------------


def measure(row: Row, repeats: int, settle: Callable[[], None], *, quick: bool) -> Iterator[Record]:
    """Yield the records of *row*: both ways in turns, each in a process of its own that has done all imports.

    Raises:
        RuntimeError: A run failed, or the two ways did not load the same model.
    """
    with tempfile.TemporaryDirectory(prefix="rows-", dir=runs_folder()) as scratch:
        caches = {tiny: Path(scratch) / ("tiny" if tiny else "large") for tiny in (True, False)}
        for tiny in {True, quick}:
            fill(row, caches[tiny], tiny=tiny)
        jobs = [
            {"way": way, "quick": quick, **{str(t): str(c) for t, c in caches.items()}} for way in ("plain", "fastload")
        ]
        with _worker(row, jobs[0]) as plain, _worker(row, jobs[1]) as streamed:
            ways = {"plain": plain, "fastload": streamed}
            for repeat in range(repeats):
                found: Record = {}
                for way in sorted(ways, reverse=bool(repeat % 2)):
                    os.sync()
                    settle()
                    memory.read(sorted(p for p in caches[quick].rglob("*") if p.is_file() and not p.is_symlink()))
                    memory.read(sorted(p for p in folder_of(row.model, tiny=quick).rglob("*") if p.is_file()))
                    found[way] = ways[way]()
                if found["plain"].pop("sums") != found["fastload"].pop("sums"):
                    raise RuntimeError(f"{row.name}: the two ways did not load the same model")
                yield {"row": row.name, "repeat": repeat, "load_average": load_average(), **found}


@contextmanager
def _worker(row: Row, job: Record) -> Iterator[Callable[[], Record]]:
    """Give what lets a process of its own do one run."""
    command = [sys.executable, "-m", "benchmarks.rows", row.name, "--run", json.dumps(job)]
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, cwd=ROOT, env=_environ()
        )
        if process.stdin is None or process.stdout is None:
            raise RuntimeError("the process has no pipes")
        orders, answers = process.stdin, process.stdout

        def once() -> Record:
            orders.write("\n")
            orders.flush()
            for line in answers:
                if line.startswith("{"):  # not what a framework prints
                    record: Record = json.loads(line)
                    return record
            errors.seek(0)
            raise RuntimeError(f"{row.name}, {job['way']}: status {process.wait()}\n{errors.read()[-3000:]}")

        try:
            yield once
            orders.close()
            process.wait(60)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
            answers.close()


def _environ() -> dict[str, str]:
    """Return the environment without the user's own settings of hubs."""
    rest = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "FASTLOAD_")) or k == "FASTLOAD_TESTBED"}
    own = {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error"}
    return {**rest, **own}


def _work(row: Row, job: Record) -> None:
    """Do one run for each line of standard input, and print its record."""
    quick = job["quick"]
    caches = {tiny: Path(job[str(tiny)]) for tiny in (True, False)}
    with plain_runs(row, caches, quick=quick) if job["way"] == "plain" else streamed_runs(row, quick=quick) as once:
        for _ in sys.stdin:
            print(json.dumps(once()), flush=True)


# -- the page -----------------------------------------------------------------------------------------------------------


def render(records: Sequence[Record], versions: Record) -> str:
    """Return the page: what each row was to reach, and what it did."""
    return "\n".join([*_page(records, versions), ""])


def _page(records: Sequence[Record], versions: Record) -> Iterator[str]:
    runs = [(row, [r for r in records if r["row"] == row.name]) for row in ROWS]
    runs = [(row, found) for row, found in runs if found]
    repeats = sorted({len(found) for _, found in runs})
    yield "# Every kind of model: overlap, copies, requests"
    yield ""
    yield f"`python -m benchmarks.rows --memory {records[0]['memory']}`: random weights from configs, "
    yield f"{'–'.join(map(str, repeats))} runs of each in turns with the usual way, each way in a process of its own with"
    yield f"all imports done, fastload's cache empty each time. The hub sends {RATE_BYTES_PER_S / 1e6:g} MB/s a connection."
    yield "Medians (least–most)."
    yield ""
    yield "The usual way maps safetensors files and reads none of their bytes: in brackets, until each has been read once."
    yield ""
    yield (
        "| row | MB | the usual way, from the cache: ms | ready after the last byte: ms | of the usual way | ≤ 10 % "
        "| never copied (the usual way) | ≥ 99 % | requests (2 + files + ranges) | | warm, pinned: 0 | |"
    )
    yield "|---|---|---|---|---|---|---|---|---|---|---|---|"
    for row, found in runs:
        yield _line(row, found)
    yield ""
    yield "Where the time after the last byte goes (medians, ms after it was received). Between `build.waited`, when the last"
    yield "tensor was there, and `build.finished` the framework does what it does at the end of the usual way too."
    yield ""
    names = ["write.finished", "verify.advanced", "file.verified", "transfer.finished", "build.waited", "build.finished",
             "load.finished"]  # fmt: skip
    yield f"| row | {' | '.join(names)} | the usual way, after its last tensor |"
    yield f"|---|{'---|' * (len(names) + 1)}"
    for row, found in runs:
        finish = [1e3 * r["plain"]["finish_s"] for r in found if "finish_s" in r["plain"]]
        cells = [*(_after_last(found, name) for name in names), f"{median(finish):.0f}" if finish else ""]
        yield f"| {row.name} | {' | '.join(cells)} |"
    yield ""
    yield "Libraries: " + ", ".join(f"{name} {version}" for name, version in versions.items()) + "."
    yield "How to read it: [benchmarks/README.md](../README.md)."


def _line(row: Row, found: Sequence[Record]) -> str:
    plain_ms = Spread.of([1e3 * r["plain"]["load_s"] for r in found])
    tail_ms = Spread.of([1e3 * r["fastload"]["tail_s"] for r in found])
    share = tail_ms.median / plain_ms.median
    read_ms = median(1e3 * (r["plain"]["load_s"] + r["plain"]["touch_s"]) for r in found)
    ours, plainly = (median(_zero_copy_share(r[way]) for r in found) for way in ("fastload", "plain"))
    counts = [(r["fastload"]["requests"], 2 + r["fastload"]["files"] + r["fastload"]["ranges"]) for r in found]
    asked, allowed = max(counts, key=lambda count: count[0] - count[1])  # of the run that comes nearest to the bound
    warm = max(r["fastload"]["warm_requests"] for r in found)
    cells = [
        row.title, f"{found[0]['fastload']['bytes'] / 1e6:.0f}", f"{plain_ms:.0f} [{read_ms:.0f}]", f"{tail_ms:.0f}",
        f"{share:.0%} [{tail_ms.median / read_ms:.0%}]",
        reached(share <= TAIL_SHARE),
        f"{ours:.1%} ({plainly:.1%})", reached(ours >= min(ZERO_COPY_SHARE, plainly)),
        f"{asked} ({allowed})", reached(asked <= allowed), str(warm), reached(warm == 0),
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def _zero_copy_share(record: Record) -> float:
    return float(record["zero_copy_bytes"] / record["result_bytes"]) if record.get("result_bytes") else 0.0


def _after_last(found: Sequence[Record], name: str) -> str:
    values = [1e3 * r["fastload"]["after_last"][name] for r in found if name in r["fastload"]["after_last"]]
    return f"{median(values):.0f}" if values else ""


def reached(yes: bool) -> str:
    """Return the word for it."""
    return "reached" if yes else "**not reached**"


# -- the command --------------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    """Measure and write the page; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rows", description=__doc__.partition("\n")[0])
    parser.add_argument("rows", nargs="*", metavar="row", help=", ".join(row.name for row in ROWS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--memory", choices=("as-is", "resident"), default="as-is", help="as of python -m benchmarks")
    parser.add_argument("--quick", action="store_true", help="a smoke test: tiny models")
    parser.add_argument("--out", type=Path, default=HERE, metavar="DIR", help="where results go (benchmarks/results)")
    parser.add_argument("--render", action="store_true", help="only write the page again")
    parser.add_argument("--run", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    chosen = [row for row in ROWS if row.name in (options.rows or [r.name for r in ROWS])]
    if unknown := set(options.rows) - {row.name for row in ROWS}:
        parser.error(f"no row is called {', '.join(sorted(unknown))}")
    if options.quick and options.out == HERE:
        parser.error("--quick is no measurement: give --out")
    if options.run is not None:
        _work(chosen[0], options.run)
        return 0
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that caches and processes go too
    options.out.mkdir(parents=True, exist_ok=True)
    kept = options.out / "rows.jsonl"
    header, *records = _read(kept)
    if not options.render:
        header = {"facts": facts(runs_folder().parent, {})}
        runs_folder().mkdir(parents=True, exist_ok=True)
        with memory.state(options.memory, runs_folder(), 0) as settle:
            for row in chosen:
                if find_spec(_LIBRARIES.get(row.name, "transformers")) is None:
                    continue
                fresh = []
                for record in measure(row, options.repeats, settle, quick=options.quick):
                    say(record)
                    fresh.append({**record, "memory": options.memory})
                records = [r for r in records if r["row"] != row.name] + fresh
                kept.write_text("".join(json.dumps(line) + "\n" for line in (header, *records)), encoding="utf-8")
    page = render(records, header["facts"]["libraries"])
    (options.out / "rows.md").write_text(page, encoding="utf-8")
    print(page)
    return 0


def _read(path: Path) -> list[Record]:
    """Return header and runs of before; a header alone where there are none."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else [{}]


def say(record: Record) -> None:
    """Tell how far it is."""
    plain_ms, tail_ms = 1e3 * record["plain"]["load_s"], 1e3 * record["fastload"]["tail_s"]
    print(
        f"{record['row']} {record['repeat'] + 1}: {plain_ms:.0f} ms, tail {tail_ms:.0f} ms", file=sys.stderr, flush=True
    )


if __name__ == "__main__":
    sys.exit(main())
