"""Runs the rivals of a case in turns, each in a fresh process, and keeps what every run took."""

from __future__ import annotations

import compileall
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.testbed.models import cache_folder
from tests.testbed.nginx_process import Request

from . import link, memory, rivals
from .cases import Case
from .machine import facts, load_average
from .models import TINY, Model, served_files
from .rivals import Rival
from .serving import Served, serving

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT_S = 600.0  # guessed: ten times the slowest run on two cores
# Measured: ext4 gives no inode out again for a minute or more after it was freed, and whoever makes files then searches past
# all of those: a thousand small ones took twice as long while the caches of earlier runs were removed between the runs.
_KEPT_BYTES = 16 << 20
_FOREIGN = ("HF_", "FASTLOAD_", "HUGGING", "TRANSFORMERS_", "AWS_", "RUNAI_", "FASTSAFETENSORS_", "SSL_CERT_")
Record = dict[str, Any]


def runs_folder() -> Path:
    """Return where caches and all else of a run lie."""
    return cache_folder() / "runs"


class RunFailed(Exception):
    """A rival did not do what was asked."""


@dataclass(frozen=True, slots=True)
class Bench:
    """Where one case runs.

    Attributes:
        served: ``None`` where the case needs no server.
        folders: By name of the model, where its files lie.
        root: Holds the caches, one a run, on the disk that ``~/.cache`` is on; small ones until it goes itself.
        settle: Brings memory into the state that every run starts from.
        filled: By name of the model, a cache that holds it; empty where nobody needs one.
    """

    case: Case
    served: Served | None
    folders: dict[str, Path]
    root: Path
    settle: Callable[[], None]
    filled: dict[str, Path]

    def run(self, rival: Rival, model: Model | None) -> Record:
        """Run *rival* once; return the record.

        Raises:
            RunFailed: It ended with an error or delivered something else than what is served.
        """
        scratch = Path(tempfile.mkdtemp(prefix="run-", dir=self.root))
        try:
            cache = "hot" if rival.hot else self.case.cache
            home = self.filled[model.name] if model and cache != "empty" else scratch / "home"
            self._prepare(model, home, cache)
            if self.served is None:
                return self._measure(rival, model, scratch, home)[0]
            mark, cpu_s = self.served.mark(), self.served.cpu_s()
            record, started_s = self._measure(rival, model, scratch, home)
            record |= _seen(self.served.requests(mark), started_s)
            record["server_cpu_s"] = round(self.served.cpu_s() - cpu_s, 2)
            if model is not None and not rival.reference and "sums" not in record:
                _check_files(home, self.folders[model.name])
            return record
        finally:
            if model is None or sum(f.stat().st_size for f in served_files(self.folders[model.name])) > _KEPT_BYTES:
                shutil.rmtree(scratch)

    def _prepare(self, model: Model | None, home: Path, cache: str) -> None:
        """Bring every run to the same start: what is served in the page cache, nothing waiting to be written."""
        served = served_files(self.folders[model.name]) if model else []
        memory.read(served)
        os.sync()
        cached = [] if cache == "empty" else _blobs(home)
        if cache == "hot":
            memory.read(cached)
        else:
            memory.drop(cached)
        self.settle()
        for files in (served, cached) if cache == "hot" else (served,):
            if memory.resident_share(files) < 0.99:  # settling may have taken some of it away
                memory.read(files)
        if cache == "cold" and (share := memory.resident_share(cached)) > 0.01:
            raise RunFailed(
                f"{share:.0%} of the cached model stayed in the page cache: is its disk a memory file system?"
            )

    def _measure(self, rival: Rival, model: Model | None, scratch: Path, home: Path) -> tuple[Record, float]:
        """Run *rival*; return the record, and when its clock started (CLOCK_MONOTONIC)."""
        job = self._job(model, home)
        result, taken = scratch / "result.json", scratch / "taken.json"
        own = [sys.executable, "-m", "benchmarks.contender", rival.name, json.dumps(job), str(result)]
        ran = rival.command(job) or [*rival.launcher(job), *own]
        command = [sys.executable, "-m", "benchmarks.supervise", str(taken), *ran]
        environ = _environ(self.served, home) | ({"HF_HUB_OFFLINE": "1"} if rival.hot else {})
        with open(scratch / "output", "w+b") as output:
            status = _run(command, environ, output.fileno())
            output.seek(0)
            said = output.read().decode(errors="replace")
        if status:
            raise RunFailed(f"{rival.title} ended with status {status}:\n{said[-3000:]}")
        told = json.loads(result.read_text()) if result.exists() else {}
        record, started_s = _record(json.loads(taken.read_text()), told)
        if "sums" in told:
            record["sums"] = hashlib.sha256(json.dumps(told["sums"], sort_keys=True).encode()).hexdigest()[:16]
        return record, started_s

    def _job(self, model: Model | None, home: Path) -> dict[str, Any]:
        job: dict[str, Any] = {
            "clock": self.case.clock, "connections": self.case.connections, "cores": len(os.sched_getaffinity(0)),
        }  # fmt: skip
        if model is None or self.served is None:
            return job
        folder = self.folders[model.name]
        files = served_files(folder)
        job |= model.job | {"store": self.served.store_url, "sizes": [file.stat().st_size for file in files]}
        job["weights"] = [file.relative_to(folder).as_posix() for file in files]
        job["folder"] = next(map(str, home.glob("hub/*/snapshots/*")), None)
        return job


def _record(taken: Record, told: Record) -> tuple[Record, float]:
    """Join what the supervisor took and what the contender told; times become seconds since the clock started."""
    spawned_s = taken.pop("spawned_s")
    started_s = told.get("started_s", spawned_s)
    record = {**taken, "touch_cpu_s": told.get("touch_cpu_s", 0.0), "started_cpu_s": told.get("started_cpu_s", 0.0)}
    before_s = started_s - spawned_s
    record |= {name: record[name] - before_s for name in ("wall_s", "gone_s")}
    record["ready_s"] = told["ready_s"] - started_s if told else record["wall_s"]
    record |= {name: told[name] - started_s for name in ("touched_s", "verified_s") if name in told}
    record["cached_s"] = record.get("verified_s", record["ready_s"])
    record |= {name: told[name] for name in ("stage_s", "stage_cpu_s", "ready_cpu_s") if name in told}
    return record, started_s


def _seen(requests: list[Request], started_s: float) -> Record:
    """Return what the servers' logs tell of one run."""
    epoch_s = time.time() - time.monotonic()  # the logs have the time of day
    weights = [r for r in requests if _is_weights(r)]
    record: Record = {
        "requests": len(requests),
        "api_requests": sum(r.path.startswith("/api/") for r in requests),
        "connections": len({(r.server, r.connection) for r in weights}),
        "received_bytes": sum(r.body_bytes for r in requests),
    }
    if weights:
        record["first_weight_s"] = min(r.at_s - r.seconds for r in weights) - epoch_s - started_s
    return record


def _is_weights(request: Request) -> bool:
    """Tell whether *request* is for content: of the CDN, of a mirror, of the store."""
    return request.method == "GET" and request.status in (200, 206) and (
        request.path.startswith(("/lfs/", "/models/", "/made/")) or request.path.endswith(".safetensors")
    )  # fmt: skip


def _environ(served: Served | None, home: Path) -> dict[str, str]:
    """Return the environment without the user's own settings of hubs and proxies."""
    rest = {k: v for k, v in os.environ.items() if not k.startswith(_FOREIGN) and not k.upper().endswith("_PROXY")}
    own = {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HOME": str(home)}
    own |= {"HF_ENDPOINT": served.hub_url} if served else {}
    return {**rest, **own, **({"SSL_CERT_FILE": str(served.ca_file)} if served and served.ca_file else {})}


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


def _blobs(home: Path) -> list[Path]:
    return [file for file in home.rglob("*") if file.is_file() and not file.is_symlink() and file.stat().st_size]


def _check_files(home: Path, source: Path) -> None:
    """Compare every file that counts under *home* with what is served, by sha256."""
    wanted = {_sha256(f) for f in served_files(source)}
    missing = wanted - {_sha256(f) for f in home.rglob("*") if f.is_file() and not f.is_symlink()}
    if missing:
        raise RunFailed(f"{len(missing)} of {len(wanted)} files did not arrive as they are served")


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def measure(case: Case, say: Callable[[str], None], settle: Callable[[], None], **about: Any) -> Iterator[Record]:
    """Yield the facts of *case*, then one record a run, in the order in which they ran.

    Args:
        settle: Called right before each run; brings memory into the state that all start from.
        about: More facts for the first record.

    Raises:
        RunFailed: A rival failed, or two of them loaded different models.
    """
    _compile()
    root = runs_folder()
    root.mkdir(parents=True, exist_ok=True)
    found = [rivals.find(name) for name in case.rivals]
    present = [rival for rival in found if rival.missing is None]
    models = [] if case.model is None else list({m.name: m for m in (case.model, _warm_up(case.model))}.values())
    with ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="case-", dir=root)))
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="models-", dir=root)))
        folders = {m.name: m.folder(scratch) for m in models}
        net = stack.enter_context(link.opened(case.link_bytes_per_s)) if models else None
        served = stack.enter_context(serving(case, folders, present)) if models else None
        warm = case.cache != "empty" or any(rival.hot for rival in present)
        filled = stack.enter_context(_filled(models, served, root)) if served and warm else {}
        yield {**_header(case, found, root, folders), "link": asdict(net) if net else None, **about}
        yield from _rounds(Bench(case, served, folders, root, settle, filled), present, say)


def _compile() -> None:
    """Compile fastload and all rivals' recipes, as pip does with what it installs; a checkout may have no byte code.

    Measured: without, where PYTHONDONTWRITEBYTECODE is set, a first call took 22 ms more, a process that fetches 40.
    """
    for name in ("fastload", "plugins", "benchmarks"):
        compileall.compile_dir(ROOT / name, quiet=2)


def _warm_up(model: Model) -> Model:
    """Return what is loaded once before all runs, so that libraries are in the page cache and byte code in its files."""
    return TINY if model.auto_class else model


@contextmanager
def _filled(models: list[Model], served: Served, root: Path) -> Iterator[dict[str, Path]]:
    """Yield a cache for each of *models* that holds it, as fastload leaves it."""
    homes = {model.name: Path(tempfile.mkdtemp(prefix="cache-", dir=root)) for model in models}
    try:
        for model in models:
            command = [sys.executable, "-m", "fastload", "prefetch", "--quiet", model.job["repo"]]
            environ = _environ(served, homes[model.name])
            done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True)
            if done.returncode:
                raise RunFailed(f"the cache could not be filled: {done.stderr[-2000:]}")
        yield homes
    finally:
        for home in homes.values():
            shutil.rmtree(home)


def _rounds(bench: Bench, present: list[Rival], say: Callable[[str], None]) -> Iterator[Record]:
    case = bench.case
    for rival in present:
        bench.run(rival, case.model and _warm_up(case.model))
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
            seconds = record.get("stage_s", record.get(case.metric, record["ready_s"]))
            say(f"{case.name} {repeat + 1}/{case.repeats} {rival.title}: {seconds:.2f} s")
            yield record


def _header(case: Case, found: list[Rival], root: Path, folders: dict[str, Path]) -> Record:
    model = None
    if case.model is not None:
        sizes = [f.stat().st_size for f in served_files(folders[case.model.name])]
        model = {"name": case.model.name, "origin": case.model.origin, "bytes": sum(sizes), "files": len(sizes)}
    names = ("question", "ends", "repeats", "clock", "metric", "tls", "cache", "connections", "rate_bytes_per_s")
    return {
        "case": case.name,
        **{name: getattr(case, name) for name in (*names, "link_bytes_per_s")},
        "model": model,
        "rivals": {
            r.name: {
                "title": r.title,
                "verifies": r.verifies,
                "reference": r.reference,
                "imports": r.imports,
                "skipped": r.missing,
            }
            for r in found
        },
        "facts": facts(root, rivals.versions(found)),
    }
