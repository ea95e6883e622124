"""Overlap of link and device: how long after the last byte does a load end, and how much longer than the slower one is it?

On the emulated runtime of tests/fakecuda, at set rates:

    FAKECUDA_LIB=… python -m benchmarks.device --megabytes 512 --wire 0.25 --device 1
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import fakecuda

import fastload
from fastload.testing import random_tensor, spawn, write_safetensors


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


def measure(endpoint: str, cache: Path, pinned_bytes: int) -> dict[str, float]:
    """Load once into an empty cache; return what the events say."""
    events: list[Any] = []
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started_s = time.monotonic()
    tensors = fastload.load_tensors(
        "org/m", device="cuda", observers=[events.append],
        settings={"endpoint": endpoint, "cache_dir": cache, "pinned_bytes": pinned_bytes},
    )  # fmt: skip
    ended_s = time.monotonic()
    landed = [event for event in events if event.name == "range.landed"]
    copied = [event for event in events if event.name == "copy.finished"]
    verified = [event for event in events if event.name == "file.verified"]
    return {
        "bytes": sum(tensor.nbytes for tensor in tensors.values()),
        "load_s": ended_s - started_s,
        "first_byte_s": min(event.at_s - event.seconds for event in landed) - started_s,
        "wire_s": max(event.at_s for event in landed) - min(event.at_s - event.seconds for event in landed),
        "copied_after_last_byte_s": max(event.at_s for event in copied) - max(event.at_s for event in landed),
        "verified_after_last_byte_s": max(event.at_s for event in verified) - max(event.at_s for event in landed),
        "end_after_last_byte_s": ended_s - max(event.at_s for event in landed),
        "device_busy_s": fakecuda.stat("h2d_busy_ns") / 1e9,
        "slots_most": max_open(copied),
        # The emulated device's memory is the host's.
        "host_growth_mib": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        - sum(tensor.nbytes for tensor in tensors.values()) / (1 << 20),
    }


def max_open(copied: list[Any]) -> int:
    """Return how many slots were on their way at once."""
    moments = sorted((at, step) for e in copied for at, step in ((e.at_s - e.seconds, 1), (e.at_s, -1)))
    most = now = 0
    for _, step in moments:
        now += step
        most = max(most, now)
    return most


def main() -> None:
    """Measure, and print one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=512, help="size of the model, in 10^6 bytes")
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--wire", type=float, default=0.25, help="rate of the link, in 10^9 bytes a second")
    parser.add_argument("--device", type=float, default=1.0, help="rate of copies, in 10^9 bytes a second")
    parser.add_argument("--pinned", type=int, default=64 << 20, help="pinned_bytes")
    arguments = parser.parse_args()
    fakecuda.install(gbps=arguments.device)
    import torch

    with tempfile.TemporaryDirectory() as scratch:
        write_model(Path(scratch) / "models" / "org" / "m", arguments.megabytes * 10**6, arguments.shards)
        torch.empty(1, device="cuda")  # the context, and torch's pool of streams, each a thread here
        torch.cuda.Stream()
        with spawn(Path(scratch) / "models", rate_bytes_per_s=arguments.wire * 1e9) as hub:
            result = measure(hub.endpoint, Path(scratch) / "cache", arguments.pinned)
    print(json.dumps({**vars(arguments), **{name: round(value, 3) for name, value in result.items()}}))


if __name__ == "__main__":
    main()
