"""Runs the rivals of a case in turns, each in a fresh process with an empty cache, and keeps what every run took."""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.testbed.models import cache_folder
from tests.testbed.nginx_hub import NginxHub

from . import rivals
from .cases import TINY, Case, Model
from .machine import facts, load_average
from .rivals import Rival

_MADV_POPULATE_WRITE = 23  # specified: linux/mman.h, Linux 5.14
ROOT = Path(__file__).resolve().parents[1]
TIMEOUT_S = 300.0  # guessed: ten times the slowest run on two cores
_FOREIGN = ("HF_", "FASTLOAD_", "HUGGING", "TRANSFORMERS_")
Record = dict[str, Any]


class RunFailed(Exception):
    """A rival did not do what was asked."""


@dataclass(frozen=True, slots=True)
class Bench:
    """Where one case runs.

    Attributes:
        hub: ``None`` where the case needs none.
        root: Holds the caches, one a run, on the disk that ``~/.cache`` is on.
        prime_bytes: How much memory to touch and give back before each run.
    """

    case: Case
    hub: NginxHub | None
    folders: dict[str, Path]
    root: Path
    prime_bytes: int = 0

    def prepare(self, model: Model | None) -> None:
        """Bring every run to the same start: what is served in the page cache, nothing waiting to be written."""
        for file in sorted(self.folders[model.name].rglob("*")) if model else ():
            if file.is_file():
                with open(file, "rb", buffering=0) as opened:
                    while opened.read(8 << 20):
                        pass
        os.sync()
        if self.prime_bytes:
            _prime(self.prime_bytes)

    def run(self, rival: Rival, model: Model | None) -> Record:
        """Run *rival* once; return the record.

        Raises:
            RunFailed: It ended with an error or delivered something else than what is served.
        """
        self.prepare(model)
        home = Path(tempfile.mkdtemp(prefix="cache-", dir=self.root))
        try:
            mark = self.hub.mark() if self.hub else 0
            record = self._measure(rival, model, home)
            requests = self.hub.requests(mark) if self.hub else []
            record["requests"] = len(requests)
            record["received_bytes"] = sum(r.body_bytes for r in requests)
            if model is not None and not rival.reference and "sums" not in record:
                _check_files(home, self.folders[model.name])
            return record
        finally:
            shutil.rmtree(home)

    def _measure(self, rival: Rival, model: Model | None, home: Path) -> Record:
        job = model.job if model else {}
        result, taken = home / "result.json", home / "taken.json"
        own = [sys.executable, "-m", "benchmarks.contender", rival.name, json.dumps(job), str(result)]
        command = [sys.executable, "-m", "benchmarks.supervise", str(taken), *(rival.command(job) or own)]
        with open(home / "output", "w+b") as output:
            status = _run(command, _environ(self.hub, home), output.fileno())
            output.seek(0)
            said = output.read().decode(errors="replace")
        if status:
            raise RunFailed(f"{rival.title} ended with status {status}:\n{said[-3000:]}")
        record: Record = json.loads(taken.read_text())
        spawned_s = record.pop("spawned_s")
        told = json.loads(result.read_text()) if result.exists() else {}
        record["touch_cpu_s"] = told.get("touch_cpu_s", 0.0)
        record["ready_s"] = told["ready_s"] - spawned_s if told else record["wall_s"]
        record |= {name: told[name] - spawned_s for name in ("touched_s", "verified_s") if name in told}
        if "sums" in told:
            record["sums"] = hashlib.sha256(json.dumps(told["sums"], sort_keys=True).encode()).hexdigest()[:16]
        return record


def _prime(size: int) -> None:
    """Make the host of a virtual machine give its guest *size* bytes, which are then free for whoever runs next.

    Measured: a new file of 2 GB takes 2.4 CPU-s/GB without, 0.2 right after, 0.6 for 6 s, 1.4 after 8 s.
    """
    with mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory.madvise(mmap.MADV_HUGEPAGE)
        memory.madvise(_MADV_POPULATE_WRITE)


def _environ(hub: NginxHub | None, home: Path) -> dict[str, str]:
    """Return the environment without the user's own settings of hubs and proxies."""
    rest = {k: v for k, v in os.environ.items() if not k.startswith(_FOREIGN) and not k.upper().endswith("_PROXY")}
    own = {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HOME": str(home / "home")}
    return {**rest, **own, **({"HF_ENDPOINT": hub.url} if hub else {})}


def _run(command: list[str], environ: dict[str, str], output: int) -> int:
    process = subprocess.Popen(
        command, cwd=ROOT, env=environ, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
    )
    try:
        return process.wait(TIMEOUT_S)
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise


def _check_files(home: Path, source: Path) -> None:
    """Compare every large file under *home* with what is served, by sha256."""
    wanted = {_sha256(f) for f in source.rglob("*.safetensors")}
    missing = wanted - {_sha256(f) for f in home.rglob("*") if f.is_file() and not f.is_symlink()}
    if missing:
        raise RunFailed(f"{len(missing)} of {len(wanted)} weight files did not arrive as they are served")


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def measure(case: Case, say: Callable[[str], None], *, prime_bytes: int = 0) -> Iterator[Record]:
    """Yield the facts of *case*, then one record a run, in the order in which they ran.

    Raises:
        RunFailed: A rival failed, or two of them loaded different models.
    """
    root = cache_folder() / "runs"
    root.mkdir(parents=True, exist_ok=True)
    found = [rivals.find(name) for name in case.rivals]
    present = [rival for rival in found if rival.missing is None]
    models = [] if case.model is None else list({m.name: m for m in (case.model, TINY)}.values())
    with tempfile.TemporaryDirectory(prefix="models-", dir=root) as scratch:
        folders = {m.name: m.folder(Path(scratch)) for m in models}
        yield {**_header(case, found, root, folders), "prime_bytes": prime_bytes}
        serving = NginxHub(list(folders.values()), rate_bytes_per_s=case.rate_bytes_per_s) if models else nullcontext()
        with serving as hub:
            bench = Bench(case, hub, folders, root, prime_bytes)
            yield from _rounds(bench, present, say)


def _rounds(bench: Bench, present: list[Rival], say: Callable[[str], None]) -> Iterator[Record]:
    case = bench.case
    for rival in present:  # libraries into the page cache, byte code into its files
        bench.run(rival, case.model and TINY)
    shuffle = random.Random(case.name).shuffle
    sums: dict[str, str] = {}
    for repeat in range(case.repeats):
        order = list(present)
        shuffle(order)
        for rival in order:
            record: Record = {"repeat": repeat, "rival": rival.name, "load_average": load_average()}
            record |= bench.run(rival, case.model)
            if "sums" in record:
                sums[rival.name] = record["sums"]
                if len(set(sums.values())) > 1:
                    raise RunFailed(f"{case.name}: not everybody loaded the same model: {sums}")
            say(f"{case.name} {repeat + 1}/{case.repeats} {rival.title}: {record['ready_s']:.2f} s")
            yield record


def _header(case: Case, found: list[Rival], root: Path, folders: dict[str, Path]) -> Record:
    model = None
    if case.model is not None:
        files = [f.stat().st_size for f in folders[case.model.name].rglob("*.safetensors")]
        model = {"name": case.model.name, "origin": case.model.origin, "bytes": sum(files), "files": len(files)}
    return {
        "case": case.name,
        "question": case.question,
        "ends": case.ends,
        "repeats": case.repeats,
        "model": model,
        "rate_bytes_per_s": case.rate_bytes_per_s,
        "rivals": {
            r.name: {"title": r.title, "verifies": r.verifies, "reference": r.reference, "skipped": r.missing}
            for r in found
        },
        "facts": facts(root),
    }
