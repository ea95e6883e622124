"""The runs of :mod:`benchmarks.rows`, in this process: a model the usual way from its cache, or by fastload from a hub."""

from __future__ import annotations

import gc
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fastload
from fastload.plan import SMALL_BYTES
from fastload.testing import Hub, spawn
from fastload.zerocopy import zero_copy_bytes

from .contender import sums
from .lasttensor import watched
from .rowmodels import folder_of
from .runs import runs_folder

Record = dict[str, Any]
#: So fast is each connection: eight bring 120 MB/s, which the slowest of builds keeps up with on two cores.
RATE_BYTES_PER_S = 15e6
REPO, _TINY = "org/m", "org/tiny"
#: Some weights are missing in some files, and then random.
_SEED = 7


@dataclass(frozen=True, slots=True)
class Place:
    """Where the usual way loads from: a cache that a hub's files were fetched into, all of it in memory.

    Attributes:
        cache: What huggingface_hub calls ``cache_dir``.
        snapshot: The model's folder there.
    """

    cache: Path
    snapshot: Path

    @property
    def of_hub(self) -> Record:
        """How a framework's ``from_pretrained`` is told to take it from there."""
        return {"cache_dir": self.cache, "local_files_only": True}


@dataclass(frozen=True, slots=True)
class Row:
    """One kind of model.

    Attributes:
        model: Of :data:`~benchmarks.rowmodels.MODELS`.
        plain: Loads it the usual way.
        load: What of fastload loads it.
        options: Of that; what is callable is called anew for each load.
        prepare: Makes of what ``load`` takes.
    """

    name: str
    title: str
    model: str
    plain: Callable[[Place, Record], Any]
    load: Callable[..., Any] = fastload.load
    options: Mapping[str, Any] = field(default_factory=dict)
    prepare: Callable[[Path], Record] = lambda folder: {}


def _plain_model(kind: str) -> Callable[[Place, Record], Any]:
    def load(place: Place, prepared: Record) -> Any:
        import transformers

        return getattr(transformers, kind).from_pretrained(REPO, **place.of_hub)

    return load


def _plain_pipeline(place: Place, prepared: Record) -> Any:
    import diffusers
    import torch

    return diffusers.DiffusionPipeline.from_pretrained(REPO, torch_dtype=torch.bfloat16, **place.of_hub)


def _plain_tensors(place: Place, prepared: Record) -> Any:
    from safetensors.torch import load_file

    return {n: t for path in sorted(place.snapshot.glob("*.safetensors")) for n, t in load_file(path).items()}


def _plain_module(place: Place, prepared: Record) -> Any:
    from safetensors.torch import load_file

    state = {n: t for path in sorted(place.snapshot.glob("*.safetensors")) for n, t in load_file(path).items()}
    prepared["into"].load_state_dict(state)
    return prepared["into"]


def _plain_gguf(place: Place, prepared: Record) -> Any:
    """What the gguf package gives: every tensor, made numbers of."""
    import gguf
    import torch

    reader = gguf.GGUFReader(place.snapshot / "model-Q8_0.gguf")
    return {
        t.name: torch.from_numpy(gguf.quants.dequantize(t.data, t.tensor_type).reshape([int(n) for n in t.shape[::-1]]))
        for t in reader.tensors
    }


def _plain_sentences(place: Place, prepared: Record) -> Any:
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(REPO, cache_folder=str(place.cache), local_files_only=True, device="cpu")


def _module(folder: Path) -> Record:
    """A module of the program's own that the weights fit, with other weights in it."""
    import torch
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    return {"into": transformers.LlamaForCausalLM(config).to(torch.bfloat16)}


def _bf16(folder: Path) -> Record:
    import torch

    return {"dtype": torch.bfloat16}


ROWS = (
    Row("llama", "transformers: Llama, shards", "llama", _plain_model("LlamaForCausalLM")),
    Row("qwen3-moe", "transformers: Qwen3-MoE, experts merged", "qwen3-moe", _plain_model("Qwen3MoeForCausalLM")),
    Row("gpt2", "transformers: GPT-2, Conv1D, tied head", "gpt2", _plain_model("GPT2LMHeadModel")),
    Row("t5", "transformers: T5, three ties", "t5", _plain_model("T5ForConditionalGeneration")),
    Row("bert", "transformers: BERT, another head", "bert", _plain_model("BertForSequenceClassification"),
        options={"auto_class": "BertForSequenceClassification"}),
    Row("whisper", "transformers: Whisper", "whisper", _plain_model("WhisperForConditionalGeneration")),
    Row("vit", "transformers: ViT", "vit", _plain_model("ViTForImageClassification")),
    Row("mamba", "transformers: Mamba", "mamba", _plain_model("MambaForCausalLM")),
    Row("bin", "transformers: Llama, `.bin` shards", "bin", _plain_model("LlamaForCausalLM")),
    Row("sd15", "diffusers: Stable Diffusion 1.5", "sd15", _plain_pipeline, prepare=_bf16),
    Row("flux", "diffusers: Flux", "flux", _plain_pipeline, prepare=_bf16),
    Row("sentences", "sentence-transformers: BERT with pooling", "sentences", _plain_sentences,
        options={"framework": "sentence_transformers"}),
    Row("gguf", "GGUF, Q8_0 dequantised", "gguf", _plain_gguf, options={"framework": "gguf"}),
    Row("tensors", "`load_tensors`: a dict of tensors", "llama", _plain_tensors, fastload.load_tensors),
    Row("module", "`into=` a module that is there", "llama", _plain_module, prepare=_module),
)  # fmt: skip


# -- one run ------------------------------------------------------------------------------------------------------------


def fill(row: Row, cache: Path, *, tiny: bool) -> None:
    """Fetch the model of *row* into *cache*, for the usual way."""
    with Hub({REPO: folder_of(row.model, tiny=tiny)}) as hub:
        fastload.prefetch(REPO, settings={"endpoint": hub.endpoint, "cache_dir": cache})


@contextmanager
def plain_runs(row: Row, caches: Mapping[bool, Path], *, quick: bool) -> Iterator[Callable[[], Record]]:
    """Give what loads the model of *row* once the usual way; the tiny one has been loaded so, and all imports are done.

    Args:
        caches: The cache with the tiny model (True) and that with the large one.
        quick: Load the tiny one instead.
    """
    row.plain(_place(caches[True]), _prepared(row, tiny=True))

    def once() -> Record:
        prepared, place = _prepared(row, tiny=quick), _place(caches[quick])
        files = [(p.stat().st_ino, str(p.resolve())) for p in place.snapshot.rglob("*") if p.is_file()]
        gc.collect()
        began_s = time.monotonic()
        result = row.plain(place, prepared)
        ready_s = time.monotonic()
        viewed, size = zero_copy_bytes(result, files) or (0, 0)
        record = {"load_s": ready_s - began_s, "result_bytes": size, "zero_copy_bytes": viewed}
        began_s = time.monotonic()
        record |= {"sums": _sums(result), "touch_s": time.monotonic() - began_s}
        del result
        return record | _finish(row, place, tiny=quick)

    yield once


def _finish(row: Row, place: Place, *, tiny: bool) -> Record:
    """Return how long the usual way goes on after its last tensor; in a run of its own, for looking costs time."""
    prepared = _prepared(row, tiny=tiny)
    gc.collect()
    with watched() as clock:
        result = row.plain(place, prepared)
        ready_s = time.monotonic()
    del result
    return {"finish_s": ready_s - clock.last_s} if clock.last_s else {}


@contextmanager
def streamed_runs(row: Row, *, quick: bool) -> Iterator[Callable[[], Record]]:
    """Give what loads the model of *row* once by fastload: from a hub with a slow link, into an empty cache.

    And then once more, pinned to its commit. The tiny model has been loaded so before.
    """
    with tempfile.TemporaryDirectory(prefix="rows-", dir=runs_folder()) as scratch:
        models = Path(scratch) / "models"
        (models / "org").mkdir(parents=True)
        for repo, tiny in ((REPO, quick), (_TINY, True)):
            (models / repo).symlink_to(folder_of(row.model, tiny=tiny))
        with spawn(models, rate_bytes_per_s=RATE_BYTES_PER_S) as hub:
            _load(row, _TINY, {"endpoint": hub.endpoint, "cache_dir": f"{scratch}/tiny"}, tiny=True)

            def once() -> Record:
                with tempfile.TemporaryDirectory(prefix="hub-", dir=scratch) as cache:
                    settings = {"endpoint": hub.endpoint, "cache_dir": cache}
                    hub.clear()
                    record = _streamed(row, settings, tiny=quick)
                    record["requests"] = len(hub.requests)
                    hub.clear()
                    _load(row, REPO, settings, tiny=quick, revision=hub.commits[REPO])
                    record["warm_requests"] = len(hub.requests)
                fastload.quiesce(60)  # the next run is not to pay for this one's disk writes
                return record

            yield once


def _streamed(row: Row, settings: Record, *, tiny: bool) -> Record:
    with fastload.profile(events=True) as profiles:
        result, began_s, ready_s = _load(row, REPO, settings, tiny=tiny)
    (profile,) = profiles.loads
    events = profile.events or []
    sizes = {e.file: e.data["bytes"] for e in events if e.name == "file.planned"}
    landed = [e for e in events if e.name == "range.landed" and sizes[e.file] > SMALL_BYTES]
    last_s = max(e.at_s for e in landed)
    return {
        "load_s": ready_s - began_s,
        "wire_s": last_s - min(e.at_s - e.seconds for e in landed),
        "tail_s": ready_s - last_s,
        "after_last": {name: at_s - last_s for name, at_s in _lasts(events)},
        "files": profile.files,
        "ranges": len(landed),
        "told_requests": profile.requests,
        "bytes": sum(sizes.values()),
        "result_bytes": profile.result_bytes,
        "zero_copy_bytes": profile.zero_copy_bytes,
        "sums": _sums(result),
    }


def _lasts(events: list[fastload.Event]) -> Iterator[tuple[str, float]]:
    """Yield when what comes between the last byte and the end was over: where a long tail is made."""
    for name in ("write.finished", "verify.advanced", "file.verified", "transfer.finished", "build.waited",
                 "build.finished", "result.measured", "load.finished"):  # fmt: skip
        moments = [e.at_s for e in events if e.name == name]
        if moments:
            yield name, max(moments)


def _load(row: Row, repo: str, settings: Record, *, tiny: bool, **more: Any) -> tuple[Any, float, float]:
    """Return what fastload gives, and when it was asked and had it."""
    prepared = _prepared(row, tiny=tiny)
    gc.collect()
    began_s = time.monotonic()
    result = row.load(repo, settings=settings, **row.options, **prepared, **more)
    return result, began_s, time.monotonic()


def _prepared(row: Row, *, tiny: bool) -> Record:
    import torch

    prepared = row.prepare(folder_of(row.model, tiny=tiny))
    torch.manual_seed(_SEED)
    return prepared


def _place(cache: Path) -> Place:
    return Place(cache, next(cache.glob("models--*/snapshots/*")))


def _sums(result: Any) -> dict[str, int]:
    """Return the sum of every tensor; of a pipeline, those of its components."""
    parts = getattr(result, "components", None)
    if not isinstance(parts, dict):
        return sums(result)
    models = {name: part for name, part in parts.items() if hasattr(part, "named_parameters")}
    return {f"{name}.{key}": count for name, model in models.items() for key, count in sums(model).items()}
