"""Which stage of a load takes longest on a machine, how long the load takes then, and what to change. Pure functions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from .rates import MIB, Rates

GB = 1e9
# Measured (loopback, 2 cores): receiving in asyncio takes 0.31 CPU-s/GB where threads that block in recv_into take 0.23.
_ASYNCIO = 1.35
# Measured (same): TLS adds 0.64 CPU-s/GB where sha256 takes 0.72, both by instructions of their own.
_TLS_OF_SHA256 = 0.9
# Guessed: three round trips until the first byte of weights: listing, redirect, range.
_ROUND_TRIPS = 3
#: Above this a core has no instructions for sha256 (measured: 0.5 to 0.7 with, over 2 without).
_NO_INSTRUCTIONS_CPU_S_PER_GB = 1.4
#: Guessed: with less of a core than this, others were using it, and no rate here is the machine's.
_OWN_SHARE = 0.7
#: Measured: 0.3 CPU-s/GB where the guest has the pages, 2 to 3 where its host must supply them.
_DEAR_PAGES_CPU_S_PER_GB = 0.8
#: Guessed: the imports of the engine take 0.3 s from a disk that is not slow.
_SLOW_START_S = 1.0


@dataclass(frozen=True, slots=True)
class Weights:
    """The files of a load.

    Attributes:
        largest_bytes: Size of the largest of them: one core hashes a file.
        cached_bytes: What of them is on this machine already.
        example: Nobody named a model.
    """

    name: str
    total_bytes: int
    files: int
    largest_bytes: int
    cached_bytes: int = 0
    example: bool = False


@dataclass(frozen=True, slots=True)
class Stage:
    """One resource that the bytes pass.

    Attributes:
        seconds: How long they would take with it alone.
        text: At which rate, in words.
        waited: Whether a load waits for it; ``prefetch`` waits for the disk, a load does not.
    """

    name: str
    seconds: float
    text: str
    waited: bool = True


@dataclass(frozen=True, slots=True)
class Estimate:
    """How long a load takes from an empty cache.

    Attributes:
        bound: Name of the stage that takes longest.
        seconds: Until everything is there, verified; the imports of torch and the framework run meanwhile.
        break_even_bytes_per_s: A link faster than this would wait for this machine.
        cached_s: From the cache, read from the disk; ``None`` where that was not measured.
        advice: What to change, most useful first.
    """

    stages: tuple[Stage, ...]
    bound: str
    seconds: float
    break_even_bytes_per_s: float
    cached_s: float | None
    advice: tuple[str, ...]


def estimate(
    weights: Weights,
    rates: Rates,
    *,
    link_bytes_per_s: float | None = None,
    tls: bool = True,
    shards: int = 2,
    dirty_bytes: int = 1 << 40,
    round_trip_s: float = 0.0,
    gives_free_pages_back: bool = False,
) -> Estimate:
    """Return how long a load of *weights* takes and why.

    Args:
        link_bytes_per_s: What the link to the hub carries, if that is known.
        shards: Weight files that are in flight, and so hashed, at once.
        dirty_bytes: What may wait to be written before writing waits for the disk.
        round_trip_s: To the hub.
        gives_free_pages_back: Free memory goes back to the host of a virtual machine.
    """
    here = tuple(_stages(weights, rates, tls=tls, shards=shards, dirty_bytes=dirty_bytes))
    slowest_s = max(stage.seconds for stage in here if stage.waited)
    link = () if link_bytes_per_s is None else (_link(weights, link_bytes_per_s),)
    stages = (*link, *here)
    bound = max((stage for stage in stages if stage.waited), key=lambda stage: stage.seconds)
    cached = rates.disk_read_bytes_per_s
    return Estimate(
        stages,
        bound.name,
        bound.seconds + rates.child_start_s + _ROUND_TRIPS * round_trip_s,
        weights.total_bytes / slowest_s,
        weights.total_bytes / cached if cached else None,
        tuple(_advice(bound, weights, rates, shards=shards, gives_back=gives_free_pages_back)),
    )


def _link(weights: Weights, bytes_per_s: float) -> Stage:
    return Stage("link", weights.total_bytes / bytes_per_s, f"{rate(bytes_per_s)}, as you said")


def _stages(weights: Weights, rates: Rates, *, tls: bool, shards: int, dirty_bytes: int) -> Iterator[Stage]:
    gigabytes = weights.total_bytes / GB
    costs = {"receive": rates.receive.cpu_s_per_gb * _ASYNCIO, "sha256": rates.sha256.cpu_s_per_gb}
    if tls:
        costs["TLS"] = rates.sha256.cpu_s_per_gb * _TLS_OF_SHA256
    if rates.write is not None:
        costs["write"] = rates.write.cpu_s_per_gb
    parts = " + ".join(f"{name} {cost:.2f}" for name, cost in costs.items())
    per_gb = sum(costs.values())
    text = f"{per_gb:.2f} CPU-s/GB ({parts}) on {rates.cores:g} cores"
    yield Stage("processor", gigabytes * per_gb / rates.cores, text)
    at_once = max(1, min(shards, weights.files, round(rates.cores)))
    together = min(rates.sha256_bytes_per_s, at_once * rates.sha256.bytes_per_s)
    hash_s = max(weights.largest_bytes / rates.sha256.bytes_per_s, weights.total_bytes / together)
    files = "1 file" if at_once == 1 else f"{at_once} files"
    yield Stage("sha256", hash_s, f"{rate(together)}, {files} at once, a core each")
    if rates.disk_write_bytes_per_s:
        over = max(0, weights.total_bytes - dirty_bytes)
        waits = f"; a load waits for what is above {size(dirty_bytes)}" if over else ""
        seconds = (over or weights.total_bytes) / rates.disk_write_bytes_per_s
        text = f"{rate(rates.disk_write_bytes_per_s)}; prefetch waits for it{waits}"
        yield Stage("disk", seconds, text, waited=over > 0)
    if rates.device is not None:
        seconds = weights.total_bytes / rates.device.copy_bytes_per_s
        yield Stage("device", seconds, f"{rate(rates.device.copy_bytes_per_s)} to {rates.device.name}")


def _advice(bound: Stage, weights: Weights, rates: Rates, *, shards: int, gives_back: bool) -> Iterator[str]:
    share = rates.sha256.bytes_per_s * rates.sha256.cpu_s_per_gb / GB
    if share < _OWN_SHARE:
        yield f"measure again when this machine is quiet: others left {share:.0%} of a core for it"
    if bound.name == "link":
        yield "the link is the limit: a mirror that is nearer (mirrors=), or weights that are already on this machine"
    if bound.name == "sha256" and weights.files == 1:
        yield "one file is hashed by one core: the same weights in several shards would use more cores"
    elif bound.name == "sha256" and shards < min(rates.cores, weights.files):
        yield f"shards={min(round(rates.cores), weights.files)}: as many files at once as there are cores (it is {shards})"
    if bound.name == "processor":
        yield "more cores: receiving, hashing and writing share them"
    if bound.name == "disk":
        yield "a cache_dir on a faster disk, or more memory: writing has to wait for the disk here"
    if bound.name == "device":
        yield "the way to the device is the limit: a smaller dtype that is stored so moves fewer bytes"
    if rates.sha256.cpu_s_per_gb > _NO_INSTRUCTIONS_CPU_S_PER_GB:
        took = f"{rates.sha256.cpu_s_per_gb:.1f} CPU-s/GB"
        yield f"sha256 takes {took}: a processor with SHA instructions (most since 2019) takes a third"
    dearest = max(rates.new_pages.cpu_s_per_gb, rates.write.cpu_s_per_gb if rates.write else 0.0)
    if dearest > _DEAR_PAGES_CPU_S_PER_GB:
        why = "this virtual machine gives free memory back to its host" if gives_back else "new memory is slow to get"
        yield f"{why}: a new page costs {dearest:.1f} CPU-s/GB, ten times what it should; turn free page reporting off"
    if rates.child_start_s > _SLOW_START_S:
        yield f"a process with the engine takes {rates.child_start_s:.1f} s to start: is Python on a slow or a network disk?"


def rate(bytes_per_s: float) -> str:
    """Return a rate in words."""
    return f"{bytes_per_s / GB:.2f} GB/s" if bytes_per_s >= GB else f"{bytes_per_s / 1e6:.0f} MB/s"


def size(count: float) -> str:
    """Return a number of bytes in words."""
    return f"{count / GB:.2f} GB" if count >= GB else f"{count / 1e6:.0f} MB" if count >= MIB else f"{count:.0f} bytes"
