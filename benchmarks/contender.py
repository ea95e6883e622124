"""The fresh process in which a rival runs.

    python -m benchmarks.contender RIVAL JOB_JSON RESULT.json

The clock stops when ``run`` returns. After that every byte of the model is read once: that is what makes memory maps and
copies comparable, and its sum tells whether everybody loaded the same. Where the job says that the clock starts with the
call, ``prepare`` has done the rival's imports before.
"""

from __future__ import annotations

import json
import os
import sys
import time
from importlib import import_module
from typing import Any

from .rivals import Delivered
from .supervise import descendants, used_cpu_s


def main(rival: str, job_json: str, target: str) -> None:
    """Run *rival* and write what came of it to *target*."""
    module, job = import_module(f"benchmarks.rivals.{rival}"), json.loads(job_json)
    record: dict[str, Any] = {}
    if job["clock"] == "call":
        getattr(module, "prepare", _nothing)(job)
        record |= {"started_cpu_s": time.process_time(), "started_s": time.monotonic()}
    used_s = _used_s()
    got = module.run(job)
    record["ready_s"] = time.monotonic()
    record["ready_cpu_s"] = _used_s() - used_s
    delivered = got if isinstance(got, Delivered) else Delivered(got)
    if delivered.weights is not None:
        used_s = time.process_time()
        record["sums"] = sums(delivered.weights)
        record["touched_s"] = time.monotonic()
        record["touch_cpu_s"] = time.process_time() - used_s
    record |= delivered.told
    with open(target, "w", encoding="utf-8") as file:
        json.dump(record, file)


def _used_s() -> float:
    """Return the CPU seconds that this process and all that it started have used so far."""
    mine = os.times()
    return sum(mine[:4]) + sum(map(used_cpu_s, descendants(os.getpid())))


def _nothing(job: dict[str, Any]) -> None:
    """Most of those that fetch files alone import nothing that takes time."""


def sums(weights: Any) -> dict[str, int]:
    """Return for each tensor of a dict, or each parameter and buffer of a model, the sum of its bytes, eight at a time."""
    import torch

    named = weights.items() if isinstance(weights, dict) else [*weights.named_parameters(), *weights.named_buffers()]
    found = {}
    for name, tensor in named:
        flat = tensor.detach().reshape(-1).view(torch.uint8)
        whole = flat.numel() // 8 * 8
        aligned = not flat.data_ptr() % 8  # of some loaders it is not, and then there is no view of eight at a time
        found[name] = int((flat[:whole] if aligned else flat[:whole].clone()).view(torch.int64).sum()) if whole else 0
        found[name] += int(flat[whole:].sum()) if flat.numel() > whole else 0
    return found


if __name__ == "__main__":
    main(*sys.argv[1:])
