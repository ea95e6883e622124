"""What is measured: which model, over which link, from which state, by whom."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from .models import FILES, HUNDRED, LARGE, LLAMA, MINILM, SINGLE, SMALL, TEN, TINY, Model

_LOADERS = ("fastload_load", "from_pretrained", "snapshot_then_load")
_FLOOR = ("floor_receive", "floor_hash", "floor_write")
_READY = "the model is ready"
_TENSORS = "all tensors are there"
_CACHED = "all files are in the cache, verified where the rival verifies; syncing them to disk comes after that"
_FROM_PROCESS = "From the start of the process until"
_FROM_CALL = "Imports done before the clock starts: from the call until"


@dataclass(frozen=True, slots=True)
class Case:
    """One question and those who answer it.

    Attributes:
        rivals: Names of files in ``rivals/``; the first is ours, which all others are compared with.
        ends: What stops the clock, in words.
        model: ``None``: nothing is served.
        rate_bytes_per_s: Of each connection; ``None``: as fast as loopback is.
        link_bytes_per_s: Of all connections together; ``None``: no cap.
        connections: How many curl and the bare receiver open.
        clock: What starts it: the ``process``, or the ``call``, with all imports done.
        metric: The time in the records that rivals are compared by.
        tls: The hub speaks https.
        cache: ``empty``, or the model is in it and in the page cache (``hot``) or on the disk alone (``cold``).
        usual: Whether it runs when no case is named.
    """

    name: str
    question: str
    rivals: tuple[str, ...]
    ends: str
    model: Model | None = None
    rate_bytes_per_s: int | None = None
    link_bytes_per_s: int | None = None
    connections: int = 8
    clock: str = "process"
    metric: str = "ready_s"
    tls: bool = False
    cache: str = "empty"
    repeats: int = 5
    usual: bool = True

    def quick(self) -> Case:
        """Return a smoke test of this case: a model of 8 MB, two runs each."""
        small = self.model if self.model in (None, FILES) else TINY
        return replace(self, model=small, repeats=2)


_COLD = (
    Case(
        "cold_minilm",
        f"{_FROM_PROCESS} the model is ready, cache empty, hub as fast as it can be",
        (*_LOADERS, "imports_only"),
        _READY,
        MINILM,
    ),
    Case(
        "cold_llama",
        f"{_FROM_PROCESS} the model is ready, cache empty, hub as fast as it can be",
        (*_LOADERS, "imports_only", "curl"),
        _READY,
        LLAMA,
    ),
    Case(
        "cold_llama_250",
        "As cold_llama, but a connection gets 31.25 MB/s, and so the 8 of curl 250 MB/s. fastload takes up to 16, for each"
        " brings more; huggingface_hub fetches 8 files at once, each over one: of the 5 shards here 156 MB/s",
        ("fastload_load", "from_pretrained", "curl"),
        _READY,
        LLAMA,
        rate_bytes_per_s=31_250_000,
    ),
    Case(
        "load_llama",
        f"{_FROM_CALL} the model is ready, cache empty: what a server or worker that runs already sees",
        (*_LOADERS, "hf_transfer_then_load", "imports_only"),
        _READY,
        LLAMA,
        clock="call",
    ),
    Case(
        "fetch_llama",
        f"{_FROM_PROCESS} all files are in the empty cache, without any framework",
        ("fastload_prefetch", "snapshot_download", "hf_transfer_download", "curl"),
        _CACHED,
        LLAMA,
        metric="cached_s",
    ),
)

#: The ways to start that are ours; a goal is about the one that is ready first.
STARTERS = ("fastload_exec", "fastload_start")
#: The ways to build what is in the cache already.
HOT = ("fastload_hot", "from_pretrained_hot")


def _cold_start(model: Model, short: str, megabytes_per_s: int) -> Case:
    return Case(
        f"cold_start_{short}_{megabytes_per_s}",
        f"{_FROM_PROCESS} the model is ready, cache empty, {megabytes_per_s:,} MB/s for all connections together: against"
        " the slower of its two parts, imports and build alone, and the download alone",
        (*STARTERS, *HOT, "curl", "from_pretrained"),
        _READY,
        model,
        link_bytes_per_s=megabytes_per_s * 10**6,
        repeats=3,
    )


_COLD_START = tuple(
    _cold_start(model, short, rate)
    for model, short in ((MINILM, "minilm"), (LLAMA, "llama"))
    for rate in (100, 250, 1000)
)

_WIRE = (
    Case(
        "wire_llama",
        "Bound by the wire: 40 MB/s a connection, 250 MB/s all together."
        f" {_FROM_PROCESS} every tensor is there, verified and in the cache",
        ("fastload_tensors", "snapshot_then_tensors", "curl"),
        _TENSORS,
        LLAMA,
        rate_bytes_per_s=40_000_000,
        link_bytes_per_s=250_000_000,
    ),
    Case(
        "wire_single",
        "As wire_llama, the model in one file",
        ("fastload_tensors", "snapshot_then_tensors", "curl"),
        _TENSORS,
        SINGLE,
        rate_bytes_per_s=40_000_000,
        link_bytes_per_s=250_000_000,
    ),
    Case(
        "wire_many",
        "As wire_llama, but 20 MB/s a connection: it takes 13 connections to fill the link, and curl opens 16",
        ("fastload_tensors", "curl"),
        _TENSORS,
        LLAMA,
        rate_bytes_per_s=20_000_000,
        link_bytes_per_s=250_000_000,
        connections=16,
    ),
)

_FLOORS = (
    Case(
        "floor_llama",
        f"Bound by the machine: how far from what receiving, hashing and writing take at least. {_FROM_CALL}"
        " every tensor is there, verified and in the cache",
        ("fastload_tensors", "fastload_prefetch", *_FLOOR, "imports_torch"),
        "all tensors are there; of fastload.prefetch: all files are verified and in the cache",
        LLAMA,
        clock="call",
        metric="cached_s",
    ),
    Case(
        "floor_single",
        "As floor_llama, the model in one file, which one core hashes",
        ("fastload_tensors", "fastload_prefetch", *_FLOOR, "imports_torch"),
        "all tensors are there; of fastload.prefetch: all files are verified and in the cache",
        SINGLE,
        clock="call",
        metric="cached_s",
    ),
    Case(
        "tls_llama",
        f"Over TLS, as fast as loopback is. {_FROM_CALL} all files are in the empty cache",
        ("fastload_prefetch", "snapshot_download", "fastload_receive", "curl", "floor_hash", "floor_write"),
        _CACHED,
        LLAMA,
        clock="call",
        metric="cached_s",
        tls=True,
    ),
)

_ALL_RIVALS = (
    "fastload_tensors",
    "snapshot_then_tensors",
    "hf_transfer_then_tensors",
    "snapshot_then_fastsafetensors",
    "runai_s3",
    "safetensors_streaming_http",
    "tensorizer_http",
    "imports_torch",
)
_WARM_RIVALS = ("fastload_tensors", "safetensors_load_file", "runai_local", "fastsafetensors_local", "imports_torch")
_RIVALS = (
    Case(
        "tensors_llama",
        f"{_FROM_CALL} a dict of all tensors is there and every byte has been read, cache empty, servers as fast as"
        " they can be",
        _ALL_RIVALS,
        "every byte of every tensor has been read once",
        LLAMA,
        clock="call",
        metric="touched_s",
    ),
    Case(
        "warm_hot",
        f"The model is in the cache and in the page cache. {_FROM_CALL} every byte of every tensor has been read",
        _WARM_RIVALS,
        "every byte of every tensor has been read once",
        LLAMA,
        clock="call",
        metric="touched_s",
        cache="hot",
    ),
    Case(
        "warm_cold",
        "The model is in the cache, and on the disk alone (POSIX_FADV_DONTNEED before each run)."
        f" {_FROM_CALL} every byte of every tensor has been read",
        _WARM_RIVALS,
        "every byte of every tensor has been read once",
        LLAMA,
        clock="call",
        metric="touched_s",
        cache="cold",
    ),
)


def _memory(name: str, model: Model, size: str, **more: bool | int) -> Case:
    question = f"How much memory beyond the model's own a load takes: {size}"
    rivals = ("fastload_tensors", "fastload_prefetch", "snapshot_then_tensors", "imports_torch")
    return Case(name, question, rivals, _TENSORS, model, clock="call", **more)  # type: ignore[arg-type]


def _growth(name: str, model: Model, what: str, **more: bool | int) -> Case:
    question = f"How time and requests grow: {what}. {_FROM_PROCESS} all files are in the empty cache"
    rivals = ("fastload_prefetch", "curl")
    return Case(name, question, rivals, _CACHED, model, metric="cached_s", **more)  # type: ignore[arg-type]


_GROWTH = (
    _memory("memory_100m", SMALL, "104 MB"),
    _memory("memory_2g", LLAMA, "2.08 GB"),
    _memory("memory_10g", LARGE, "10.2 GB", repeats=2, usual=False),
    _growth("growth_1", SINGLE, "2.08 GB in one shard"),
    _growth("growth_10", TEN, "2.08 GB in ten shards"),
    _growth("growth_98", HUNDRED, "2.08 GB in 98 shards"),
    _growth("growth_10g", LARGE, "10.2 GB in six shards", repeats=3, usual=False),
    Case(
        "small_files",
        f"1,000 files of 1 KB. {_FROM_CALL} all are in the empty cache",
        ("fastload_prefetch", "snapshot_download", "wrk", "curl"),
        _CACHED,
        FILES,
        clock="call",
        metric="cached_s",
    ),
)

_START = (
    Case(
        "first_byte",
        "When the hub is asked for the first weights after the start of `fastload prefetch`",
        ("fastload_command", "imports_aiohttp", "python_pass"),
        "the hub has the first request for weights; of the others: the process ends",
        TINY,
        metric="first_weight_s",
        repeats=15,
    ),
    Case(
        "import",
        "What `import fastload` adds to the start of a process",
        ("fastload_import", "python_pass"),
        "the process ends",
        repeats=21,
    ),
)

CASES = (*_COLD, *_COLD_START, *_WIRE, *_FLOORS, *_RIVALS, *_GROWTH, *_START)


def find(names: Sequence[str]) -> list[Case]:
    """Return the cases called *names*; the usual ones for none.

    Raises:
        ValueError: There is no such case.
    """
    known = {case.name: case for case in CASES}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"no case {', '.join(unknown)}; there are {', '.join(known)}")
    return [known[name] for name in names] if names else [case for case in CASES if case.usual]
