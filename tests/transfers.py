"""One transfer of the engine in the test's own loop, with waits that only count, and what came of it."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastload.engine import Engine
from fastload.errors import FastloadError
from fastload.events import Event
from fastload.plugins import manager
from fastload.settings import Settings
from fastload.testing import Hub, random_tensor, write_safetensors
from fastload.transfer import Transfer
from fastload.types import Request

KIB = 1 << 10
#: Everything small and impatient: a file of 1 MiB is many ranges, a hung server costs half a second.
QUICK: Mapping[str, Any] = {
    "range_bytes": 64 * KIB,
    "ring_bytes": 8 * 64 * KIB,
    "connections": 4,
    "stall_s": 0.3,
    "connect_s": 0.5,
    "attempts": 3,
}
RANGE = 64 * KIB
SMALL, LARGE = "config.json", "model.safetensors"


def noise(count: int, seed: int = 0) -> bytes:
    """Return *count* bytes, the same for the same seed."""
    return random.Random(seed).randbytes(count)


#: One file that takes a single request, and one of 17 ranges, the last of them short.
MODEL = {SMALL: noise(5000, 1), LARGE: noise(16 * RANGE + 777, 2)}


@dataclass
class Outcome:
    """What one transfer came to."""

    transfer: Transfer
    events: list[Event]
    error: FastloadError | None
    #: Every wait that was asked for between two tries, in seconds; none of them happened.
    waits: list[float] = field(default_factory=list)

    def count(self, name: str, file: str | None = None) -> int:
        return sum(e.name == name and file in (None, e.file) for e in self.events)

    def contents(self) -> dict[str, bytes]:
        """Return the files under their final names."""
        snapshot = self.transfer.snapshot
        assert snapshot is not None
        return {str(p.relative_to(snapshot.path)): p.read_bytes() for p in snapshot.path.rglob("*") if p.is_file()}


async def fetch(
    cache: Path, endpoint: str, source: str = "org/m", *, request: Mapping[str, Any] | None = None, **settings: Any
) -> Outcome:
    """Run one transfer of *source* into *cache* to its end, whatever that is."""
    values = {**QUICK, "cache_dir": cache, "endpoint": endpoint, **settings}
    resolved = Settings.resolve({n: v for n, v in values.items() if v is not None})
    transfer = Transfer()
    outcome = Outcome(transfer, [], None)
    transfer.events.add(outcome.events.append)

    async def count_only(seconds: float) -> None:
        outcome.waits.append(seconds)
        await asyncio.sleep(0)

    wanted = Request(source, everything=True, **(request or {}))
    try:
        plugins = await asyncio.to_thread(manager, resolved)
        await Engine(resolved, transfer.apply, plugins, sleep=count_only).run(wanted)
    except FastloadError as e:
        outcome.error = e
    finally:
        transfer.close()
    return outcome


def asked(hub: Hub, file: str | None = None) -> Counter[str]:
    """Return how often *hub* was asked for *file* (``None``: for metadata), by origin and status."""
    if file is None:
        return Counter(f"{r.origin} {r.status}" for r in hub.requests if r.path.startswith("/api/"))
    return Counter(f"{r.origin} {r.status}" for r in hub.requests if r.file == file)


def in_cache(cache: Path) -> list[str]:
    """Return the names of everything that a reader of the cache could take for a file of the model."""
    kinds = ("blobs", "snapshots")
    found = [p for kind in kinds for p in cache.glob(f"models--*/{kind}/**/*") if p.is_file()]
    return sorted(p.name for p in found if not p.name.endswith((".fastload.incomplete", ".fastload.journal")))


def write_weights(path: Path, tensors: int = 12, values: int = 25_000, seed: int = 0) -> Path:
    """Write *tensors* tensors of 100 kB each as a safetensors file: with 12 of them it takes 19 ranges."""
    return write_safetensors(path, {f"t{n:02}": random_tensor("F32", (values,), f"{seed}/{n}") for n in range(tensors)})


def tensor_bytes(tensors: Any) -> dict[str, bytes]:
    """Return the bytes of each tensor: NaNs too are what they are."""
    import torch

    return {
        n: bytes(t.cpu().contiguous().view(torch.uint8).numpy().tobytes()) for n, t in sorted(dict(tensors).items())
    }


def expected_bytes(path: Path) -> dict[str, bytes]:
    """As :func:`tensor_bytes`, of the tensors in a local file."""
    from safetensors.torch import load_file

    return tensor_bytes(load_file(path))
