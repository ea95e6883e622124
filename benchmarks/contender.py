"""The fresh process in which a rival runs.

    python -m benchmarks.contender RIVAL JOB_JSON RESULT.json

The clock stops when ``run`` returns. After that every byte of the model is read once: that is what makes memory maps and
copies comparable, and its sum tells whether everybody loaded the same.
"""

from __future__ import annotations

import json
import sys
import time
from importlib import import_module
from typing import Any


def main(rival: str, job: str, target: str) -> None:
    """Run *rival* and write what came of it to *target*."""
    got = import_module(f"benchmarks.rivals.{rival}").run(json.loads(job))
    record: dict[str, Any] = {"ready_s": time.monotonic()}
    if isinstance(got, dict):
        record.update(got)
    elif got is not None:
        used_s = time.process_time()
        record["sums"] = sums(got)
        record["touched_s"] = time.monotonic()
        record["touch_cpu_s"] = time.process_time() - used_s
    with open(target, "w", encoding="utf-8") as file:
        json.dump(record, file)


def sums(model: Any) -> dict[str, int]:
    """Return for each parameter and buffer the sum of its bytes, eight at a time."""
    import torch

    found = {}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        flat = tensor.detach().reshape(-1).view(torch.uint8)
        whole = flat.numel() // 8 * 8
        found[name] = int(flat[:whole].view(torch.int64).sum()) if whole else 0
        found[name] += int(flat[whole:].sum()) if flat.numel() > whole else 0
    return found


if __name__ == "__main__":
    main(*sys.argv[1:])
