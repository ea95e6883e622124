"""How well do link and device overlap, and what memory does it take? On the emulated CUDA runtime, at set rates.

    tox run -e cuda                                                      once: makes the environment, builds the runtime
    export FAKECUDA_LIB=.tox/cuda/fakecuda
    .tox/cuda/bin/python -m benchmarks.device                                         all cases: 5 minutes on 2 quiet cores
    .tox/cuda/bin/python -m benchmarks.device wire --megabytes 200 --repeats 1 --out /tmp/smoke
    .tox/cuda/bin/python -m benchmarks.device wire --megabytes 200 --draw docs/cuda-timeline.svg

Writes `benchmarks/results/device.md`, the runs as `device.jsonl`, and the timeline of one run of each case as SVG. Each run is
a process of its own with an empty cache. Needs nothing but gcc, torch and fastload.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import fastload
from fastload import timeline
from fastload.phases import Intervals
from fastload.settings import Settings
from fastload.testing import random_tensor, spawn, write_safetensors
from tests import fakecuda

ROOT = Path(__file__).resolve().parents[1]
MIB = 1 << 20
#: As many as a transfer opens by default; the link is shared out evenly.
CONNECTIONS = 8
Record = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Case:
    """Rates in 10^9 bytes a second; 0: no limit."""

    name: str
    title: str
    wire: float
    device: float


CASES = (
    Case("wire", "the link is slower: 0.25 GB/s, the device takes 1", 0.25, 1.0),
    Case("device", "the device is slower: 0.5 GB/s, the link brings 1", 1.0, 0.5),
    Case("warm", "files in the cache, the device takes 1 GB/s", 0.0, 1.0),
)


def write_model(folder: Path, size: int, shards: int) -> None:
    """Write *size* bytes of weights in *shards* files: tensors of 4 to 32 MiB and some small ones."""
    block = random_tensor("BF16", (1024, 1024))[2]
    for shard in range(shards):
        tensors: dict[str, Any] = {}
        left, index = size // shards, 0
        while left > 0:
            rows = min(2048 << (index % 4), max(1, left // 2048))
            data = (block * (-(-rows * 2048 // len(block))))[: rows * 2048]
            tensors[f"{shard}.{index}"] = ("BF16", (rows, 1024), data)
            tensors[f"{shard}.{index}.bias"] = ("F32", (7,), bytes(28))
            left -= rows * 2048
            index += 1
        write_safetensors(folder / f"model-{shard}.safetensors", tensors)


# -- one run ------------------------------------------------------------------------------------------------------------


def run(case: Case, folder: Path, options: argparse.Namespace, drawing: Path | None) -> Record:
    """Load the model of *folder* once, in this process; return what was measured."""
    fakecuda.install(gbps=case.device)
    import torch

    torch.cuda.Stream()  # the context, and torch's pool of streams, each a thread here
    weights = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
    if not options.memory:
        # The emulated device's memory is the host's, and slow when it is touched for the first time: do that before.
        torch.empty(weights, dtype=torch.uint8, device="cuda")
    rate = case.wire * 1e9 / CONNECTIONS or None
    with tempfile.TemporaryDirectory(prefix="fastload-device-") as scratch, spawn(folder, rate_bytes_per_s=rate) as hub:
        settings = {
            "endpoint": hub.endpoint, "cache_dir": scratch, "pinned_bytes": options.pinned << 20,
            "connections": CONNECTIONS,
        }  # fmt: skip
        if not case.wire:
            fastload.prefetch("org/m", settings=settings)
        elif not options.memory:
            _touch_memory(Path(scratch), weights)
        try:
            return _measured(case, settings, options, drawing)
        finally:
            fastload.quiesce()  # the disk's work for this run is not to fall into the next one


def _touch_memory(folder: Path, size: int) -> None:
    """Let the page cache use memory for *size* bytes once: on a virtual machine its first use may cost tenfold."""
    with open(folder / "touched", "wb") as f:
        for _ in range(-(-size // MIB)):
            f.write(bytes(MIB))
    os.unlink(folder / "touched")


def _measured(case: Case, settings: Record, options: argparse.Namespace, drawing: Path | None) -> Record:
    import torch

    transfer: list[int] = []

    def note_memory(event: fastload.Event) -> None:
        if event.name == "transfer.started":
            transfer.append(event.data["pid"])
        elif event.name == "transfer.finished":
            transfer.append(_status_bytes("VmHWM", transfer[0]))

    fakecuda.reset()
    reserved = torch.cuda.memory_reserved()
    torch.cuda.reset_peak_memory_stats()
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    resident = _status_bytes("VmRSS")
    with fastload.profile(events=True) as profiles:
        began_s = time.monotonic()
        tensors = fastload.load_tensors("org/m", device="cuda", observers=[note_memory], settings=settings)
        ended_s = time.monotonic()
    size = sum(tensor.nbytes for tensor in tensors.values())
    events = profiles.loads[0].events or []
    if drawing is not None:
        drawing.write_text(timeline.svg(profiles), encoding="utf-8")
    copied = [event for event in events if event.name == "copy.finished"]
    slot_bytes, slots = settings["pinned_bytes"] // 8, _most_open(copied)
    landed = [event for event in events if event.name == "range.landed"]
    device_memory = fakecuda.stat("device_used") if options.memory else 0  # which is this process's, too
    first_s = min(event.at_s - event.seconds for event in landed or copied)
    last_s = max((event.at_s for event in landed), default=first_s)
    return {
        "case": case.name,
        "bytes": size,
        "slot_bytes": slot_bytes,
        "load_s": ended_s - began_s,
        "before_first_s": first_s - began_s,
        "total_s": ended_s - first_s,
        "wire_s": last_s - first_s,
        "after_last_s": ended_s - last_s if landed else None,
        "copy_s": size / case.device / 1e9,
        "copies_busy_s": Intervals((e.at_s - e.seconds, e.at_s) for e in copied).seconds,
        "most_slots": slots,
        "reserved_during": torch.cuda.max_memory_reserved() - reserved - size,
        "reserved_after": torch.cuda.memory_reserved() - reserved - size,
        # Slots that were never used have no memory here.
        "host": _status_bytes("VmHWM") - resident - slots * slot_bytes - device_memory,
        "transfer": transfer[1] - Settings().ring_bytes if landed and len(transfer) > 1 else None,
    }


def _status_bytes(name: str, pid: int | str = "self") -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{name}:"))


def _most_open(copied: Sequence[fastload.Event]) -> int:
    """Return how many slots were in use at once."""
    moments = sorted((at, step) for e in copied for at, step in ((e.at_s - e.seconds, 1), (e.at_s, -1)))
    most = now = 0
    for _, step in moments:
        now += step
        most = max(most, now)
    return most


# -- all of them --------------------------------------------------------------------------------------------------------


def render(records: Sequence[Record], options: argparse.Namespace) -> str:
    """Return the page: what was to be reached, and what was."""
    return "\n".join([*_page(records, options), ""])


def _page(records: Sequence[Record], options: argparse.Namespace) -> Iterator[str]:
    shown = {case.name: [r for r in records if r["case"] == case.name and not r["memory"]] for case in CASES}
    yield "# Link and device at once"
    yield ""
    yield "`python -m benchmarks.device` on the emulated CUDA runtime ([tests/fakecuda](../../tests/fakecuda/README.md)):"
    yield f"a model of {options.megabytes} MB in {options.shards} files, {CONNECTIONS} connections, {options.pinned} MiB of"
    yield f"slots, {options.repeats} runs of each case in turns, each in a fresh process and cache. Medians (least–most)."
    yield "Seconds count from the first request for weights (warm: from the first read)."
    yield ""
    yield "| case | | reach | measured | |"
    yield "|---|---|---|---|---|"
    for case in CASES:
        for title, limit, value in _REACH.get(case.name, ()):
            yield from _row(case.title, title, limit, [value(r) for r in shown[case.name]])
    memory = [r for r in records if r["memory"]]
    for title, most, name in _MEMORY:
        values = [r[name] / MIB if most > 20 else r[name] for r in memory if r[name] is not None]
        yield from _row("memory, all cases", title, most, values)
    yield ""
    for name, runs in shown.items():
        if runs:
            yield f"![timeline](device-{name}.svg)"
            yield ""
    beyond = [r["transfer"] for r in records if r["transfer"] is not None]
    if beyond:
        yield f"The transfer process takes its ring and {median(beyond) / MIB:.0f} MiB, interpreter and libraries included."
    yield "Before the first request come the start of the transfer process and the list of files: " + ", ".join(
        f"{median(r['before_first_s'] for r in runs):.2f} s" for name, runs in shown.items() if runs and name != "warm"
    ) + "."  # fmt: skip


#: Of each case: what is limited, by how much, and how that is made of a record.
_REACH: dict[str, tuple[tuple[str, float, Callable[[Record], float]], ...]] = {
    "wire": (
        ("whole load / time on the wire", 1.05, lambda r: r["total_s"] / r["wire_s"]),
        ("end of the load after the last byte, less one slot's copy: ms", 50,
         lambda r: 1e3 * (r["after_last_s"] - r["slot_bytes"] / 1e9)),
    ),
    "device": (("whole load / time of the copies", 1.05, lambda r: r["total_s"] / r["copy_s"]),),
    "warm": (("whole load / time of the copies", 1.05, lambda r: r["total_s"] / r["copy_s"]),),
}  # fmt: skip
#: What is limited (MiB, or slots), and its name in a record.
_MEMORY = (
    ("device memory beyond the model, while it loads: MiB", 256, "reserved_during"),
    ("device memory beyond the model, afterwards: MiB", 64, "reserved_after"),
    ("host memory of the program beyond the slots: MiB", 64, "host"),
    ("slots in use at once", 8, "most_slots"),
)


def _row(case: str, title: str, limit: float, values: Sequence[float]) -> Iterator[str]:
    if values:
        digits = 3 if limit < 2 else 0
        middle, least, most = median(values), min(values), max(values)
        reached = "reached" if middle <= limit else "**missed**"
        text = f"{middle:.{digits}f} ({least:.{digits}f}–{most:.{digits}f})"
        yield f"| {case} | {title} | ≤ {limit:g} | {text} | {reached} |"


def measure(cases: Sequence[Case], options: argparse.Namespace) -> list[Record]:
    """Run *cases* in turns, each run in a process of its own."""
    records = []
    with tempfile.TemporaryDirectory(prefix="fastload-device-") as scratch:
        folder = Path(scratch) / "models"
        write_model(folder / "org" / "m", options.megabytes * 10**6, options.shards)
        for repeat in range(1 if options.draw else options.repeats + 1):
            for case in cases:
                drawing = options.draw or (options.out / f"device-{case.name}.svg" if repeat == 0 else None)
                # One run more, on a device whose memory nobody has touched.
                memory = repeat == options.repeats and not options.draw
                record = {**_one(case, folder, options, drawing, memory=memory), "repeat": repeat, "memory": memory}
                print(json.dumps(record), file=sys.stderr, flush=True)
                records.append(record)
    return records


def _one(case: Case, folder: Path, options: argparse.Namespace, drawing: Path | None, *, memory: bool) -> Record:
    command = [sys.executable, "-m", "benchmarks.device", case.name, "--run", str(folder)]
    command += ["--pinned", str(options.pinned), *(["--memory"] if memory else [])]
    command += ["--draw", str(drawing.resolve())] if drawing else []
    answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=os.environ)
    record: Record = json.loads(answer.stdout.splitlines()[-1])
    return record


def main() -> int:
    """Measure and write the page; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.device", description=__doc__.partition("\n")[0])
    parser.add_argument("cases", nargs="*", metavar="case", help=", ".join(case.name for case in CASES))
    parser.add_argument("--megabytes", type=int, default=1000, help="size of the model, in 10^6 bytes")
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--pinned", type=int, default=64, help="memory of the slots, in MiB")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument(
        "--draw", type=Path, metavar="FILE", help="run the (first) case once and draw that, nothing else"
    )
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--memory", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    cases = [case for case in CASES if case.name in (options.cases or [case.name])]
    if options.run is not None:
        print(json.dumps(run(cases[0], options.run, options, options.draw)))
        return 0
    if options.draw is not None:
        measure(cases[:1], options)
        return 0
    options.out.mkdir(parents=True, exist_ok=True)
    records = measure(cases, options)
    (options.out / "device.jsonl").write_text(
        "".join(json.dumps(record) + "\n" for record in records), encoding="utf-8"
    )
    page = render(records, options)
    (options.out / "device.md").write_text(page, encoding="utf-8")
    print(page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
