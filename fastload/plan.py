"""Which files a load needs, in which order, and in which ranges. Pure functions."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from .errors import NotFoundError, UnsupportedSourceError
from .types import ByteRange, Manifest, RemoteFile

#: Files that hold weights, best first; a framework reads one kind, so a load fetches one kind.
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".ckpt", ".h5", ".msgpack", ".ot", ".onnx",
                   ".onnx_data", ".tflite", ".mlmodel", ".pb", ".npz", ".jit", ".flashpack")  # fmt: skip
#: Files up to this size take one request, are verified in memory and need no journal (guessed: under a second to repeat).
SMALL_BYTES = 1 << 20
#: Never needed to build a model, sometimes large.
_IDLE_SUFFIXES = (".png", ".jpg", ".jpeg", ".gif", ".webp", ".svg", ".mp4", ".mp3", ".wav", ".flac", ".pdf", ".zip",
                  ".gz", ".tar", ".parquet", ".arrow", ".csv", ".ipynb")  # fmt: skip
_NAME = re.compile(
    r"^(?P<stem>.+?)(?:\.(?P<variant>[A-Za-z0-9_]+))?(?:-(?P<part>\d{5})-of-\d{5})?(?:\.(?P<variant2>[A-Za-z0-9_]+))?"
    r"\.(?P<suffix>safetensors|bin)$"
)
#: Specified (diffusers): the only names under which a pipeline finds weights. Others are whole checkpoints, for programs
#: that read one file.
_IN_PIPELINES = ("diffusion_pytorch_model", "pytorch_model", "model")
_ONNX_IN_PIPELINES = ("model.onnx", "model.onnx_data", "weights.pb")
#: Kinds that no from_pretrained looks for by itself, in the order in which they are taken where there is nothing better.
_OTHER_SUFFIXES = (".pt", ".pth", ".ckpt", ".gguf", ".flashpack")
#: Specified (sentence-transformers): the folders of a model's further modules: 1_Pooling, 2_Dense.
_MODULE = re.compile(r"^\d+_\w+$")
#: Specified (open_clip): the names that it looks for, best first.
_OF_OPEN_CLIP = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
#: What trainers leave beside the weights in the same kind of file.
_OF_TRAINING = re.compile(r"^(?:training_args|optimizer|scheduler|scaler|rng_state|random_states)(?:_\d+)?\.")


@dataclass(frozen=True, slots=True)
class Selection:
    """Which files of a manifest a load delivers.

    Attributes:
        files: Everything that travels, small files first, then weights in the order in which they are read.
        weights: Paths of those that hold tensors.
    """

    files: tuple[RemoteFile, ...]
    weights: tuple[str, ...]


def natural_key(path: str) -> list[tuple[int, Any]]:
    """Sort key that puts ``shard-2`` before ``shard-10``."""
    return [(0, int(p)) if p.isdigit() else (1, p) for p in re.split(r"(\d+)", path)]


def is_weight(path: str) -> bool:
    """Tell by its name whether *path* holds weights."""
    return path.lower().endswith(WEIGHT_SUFFIXES)


def select(
    manifest: Manifest,
    patterns: Sequence[str] | None = None,
    *,
    everything: bool = False,
    options: Mapping[str, Any] | None = None,
) -> Selection:
    """Choose the files that a load needs.

    Args:
        patterns: Shell patterns (``*`` crosses ``/``, a trailing ``/`` means the folder), as huggingface_hub reads
            them; ``None`` leaves the choice to the rules below.
        everything: Without patterns: all files (``prefetch``), not just one kind of weights.
        options: The framework's keyword arguments; ``framework``, ``variant``, ``subfolder``, ``use_safetensors``,
            ``use_onnx``, ``use_flashpack``, ``gguf_file``, ``single_file`` and ``weight_name`` matter, and ``components``,
            the names of what the caller brings for a pipeline.

    Raises:
        NotFoundError: Patterns were given and match nothing.
        UnsupportedSourceError: There are several GGUF files to choose from.
    """
    options = options or {}
    if patterns is not None:
        chosen = [f for f in manifest.files if any(_matches(f.path, p) for p in patterns)]
        if not chosen:
            raise NotFoundError(
                f"{manifest.source}: none of its {len(manifest.files)} files matches {', '.join(patterns)}",
                hint=f"it holds for example {', '.join(f.path for f in manifest.files[:5])}",
            )
        weights = [f for f in chosen if not _is_side_file(f.path)]
    elif everything:
        chosen = list(manifest.files)
        weights = [f for f in chosen if is_weight(f.path)]
    else:
        weights = _framework_weights(manifest, options) or _module_weights(manifest, options)
        if (
            not weights and manifest.get("model_index.json") is None
        ):  # a format of a plugin's: whatever is neither configuration nor a picture
            weights = [f for f in manifest.files if not _is_side_file(f.path) and not is_weight(f.path)]
        modules = [f for f in _module_weights(manifest, options) if f not in weights]
        small = modules + [
            f
            for f in manifest.files
            if f not in weights and not is_weight(f.path) and not f.path.lower().endswith(_IDLE_SUFFIXES)
        ]
        chosen = small + weights
    names = {f.path for f in weights}
    small_first = sorted(
        (f for f in chosen if f.path not in names), key=lambda f: (not _is_config(f.path), f.size, f.path)
    )
    in_order = sorted(weights, key=lambda f: natural_key(f.path))
    return Selection((*small_first, *in_order), tuple(f.path for f in in_order))


def left_behind(manifest: Manifest, selection: Selection) -> list[str]:
    """Return paths of weights that a load without any leaves where they are: they are for somebody else."""
    return [] if selection.weights else [f.path for f in manifest.files if is_weight(f.path)]


def _matches(path: str, pattern: str) -> bool:
    return fnmatchcase(path, pattern + "*" if pattern.endswith("/") else pattern)


def _is_config(path: str) -> bool:
    name = path.rpartition("/")[2]
    return name in ("config.json", "model_index.json") or name.endswith(".index.json")


def _is_side_file(path: str) -> bool:
    """Configuration, tokenizer, code, documents: known not to hold tensors."""
    name = path.rpartition("/")[2].lower()
    suffixes = (".json", ".txt", ".md", ".py", ".model", ".jinja", ".yaml", ".yml", ".toml", ".xml", ".jsonl", ".tiktoken",
                ".html", ".license", *_IDLE_SUFFIXES)  # fmt: skip
    return name.startswith((".", "license", "readme", "notice")) or name.endswith(suffixes)


def _framework_weights(manifest: Manifest, options: Mapping[str, Any]) -> list[RemoteFile]:
    """One kind of weights a folder, as from_pretrained picks them: safetensors first, single file before shards."""
    subfolder = (options.get("subfolder") or "").strip("/")
    if options.get("single_file"):
        return _named(manifest, str(options["single_file"]))
    if options.get("weight_name"):
        return _named(manifest, f"{subfolder}/{options['weight_name']}".lstrip("/"))
    if options.get("use_flashpack"):
        depth = 1 if not subfolder and manifest.get("model_index.json") is not None else 0
        within = [f for f in manifest.files if f.path.startswith(f"{subfolder}/" if subfolder else "")]
        packs = [f for f in within if f.path.endswith(".flashpack")]
        return [f for f in packs if f.path.removeprefix(f"{subfolder}/").count("/") == depth]
    if not subfolder and manifest.get("model_index.json") is not None:
        return _pipeline_weights(manifest.files, options)
    here = [f for f in manifest.files if f.path.rpartition("/")[0] == subfolder and is_weight(f.path)]
    if options.get("gguf_file"):
        return [f for f in here if _name(f) == options["gguf_file"]]
    if options.get("framework") == "open_clip":
        known = sorted((f for f in here if _name(f) in _OF_OPEN_CLIP), key=lambda f: _OF_OPEN_CLIP.index(_name(f)))
        if known:
            return known[:1]
    found = _one_kind(here, options.get("variant"), options.get("use_safetensors"))
    if found or options.get("variant") is not None or options.get("use_safetensors"):
        return found
    return _other_kind(here, manifest.source)


def _module_weights(manifest: Manifest, options: Mapping[str, Any]) -> list[RemoteFile]:
    """The weights of the modules beside the main one, in a repository of sentence-transformers: small, and no second model."""
    if manifest.get("modules.json") is None or options.get("subfolder"):
        return []
    folders: dict[str, list[RemoteFile]] = {}
    for f in manifest.files:
        folder, _, _ = f.path.rpartition("/")
        if _MODULE.match(folder) and is_weight(f.path):
            folders.setdefault(folder, []).append(f)
    return [f for here in folders.values() for f in _one_kind(here, None, options.get("use_safetensors"))]


def _named(manifest: Manifest, path: str) -> list[RemoteFile]:
    file = manifest.get(path)
    if file is None:
        known = [f.path for f in manifest.files if is_weight(f.path)]
        raise NotFoundError(
            f"{manifest.source} has no file {path}",
            hint=f"it holds {', '.join(known[:8])}" if known else "it holds no weights",
        )
    return [file]


def _name(file: RemoteFile) -> str:
    return file.path.rpartition("/")[2]


def _one_kind(files: list[RemoteFile], variant: str | None, use_safetensors: bool | None) -> list[RemoteFile]:
    kinds = ["safetensors", "bin"] if use_safetensors is None else ["safetensors"] if use_safetensors else ["bin"]
    for kind in kinds:
        stems: dict[str, dict[bool, list[RemoteFile]]] = {}
        for f in files:
            match = _NAME.match(_name(f))
            if match is None or match["suffix"] != kind or _OF_TRAINING.match(_name(f)):
                continue
            if (match["variant"] or match["variant2"]) == variant:
                stems.setdefault(match["stem"], {}).setdefault(match["part"] is not None, []).append(f)
        if not stems:
            continue
        adapters = stems.pop("adapter_model", {}).get(False, [])
        main = "model" if kind == "safetensors" else "pytorch_model"
        if main not in stems and "diffusion_pytorch_model" in stems:
            main = "diffusion_pytorch_model"
        if main in stems:  # others beside it (consolidated.*, original.*) are second copies
            stems = {main: stems[main]}
        return adapters + [f for parts in stems.values() for f in parts.get(False) or parts[True]]
    return []


def _other_kind(files: list[RemoteFile], source: str) -> list[RemoteFile]:
    for suffix in _OTHER_SUFFIXES:
        found = [f for f in files if f.path.lower().endswith(suffix) and not _OF_TRAINING.match(_name(f))]
        stems = sorted({re.sub(r"-\d{5}-of-\d{5}(?=\.gguf$)", "", _name(f), flags=re.IGNORECASE) for f in found})
        if suffix == ".gguf" and len(stems) > 1:  # one model, quantised in several ways: too large to fetch them all
            raise UnsupportedSourceError(
                f"{source} holds {len(stems)} GGUF models: {', '.join(stems[:8])}{' …' if stems[8:] else ''}",
                hint=f'choose one, for example files=["{stems[0]}", "*.json"]',
            )
        if found:
            return found
    return []


def _pipeline_weights(files: Sequence[RemoteFile], options: Mapping[str, Any]) -> list[RemoteFile]:
    """The weights of all components, as diffusers chooses them.

    Safetensors where every component has them, else pickled files for all that have those; in each folder the variant
    where there is one, else the files without.
    """
    brought = set(options.get("components") or ())
    variant, use_safetensors = options.get("variant"), options.get("use_safetensors")
    folders: dict[str, dict[str, list[RemoteFile]]] = {}
    for f in files:
        folder = f.path.rpartition("/")[0]
        match = _NAME.match(_name(f))
        if match and match["stem"] in _IN_PIPELINES and "/" not in folder and folder not in brought:
            variants = folders.setdefault(folder, {})
            variants.setdefault(match["variant"] or match["variant2"] or "", []).append(f)
    chosen = {}
    for folder, variants in folders.items():
        fitting = variants.get(variant or "") or variants.get("", [])
        chosen[folder] = {kind: [f for f in fitting if f.path.endswith(kind)] for kind in (".safetensors", ".bin")}
    kinds = [".safetensors"] if use_safetensors else [".bin"] if use_safetensors is False else [".safetensors", ".bin"]
    if use_safetensors is None and not all(of[".safetensors"] for of in chosen.values() if of[".bin"]):
        kinds.reverse()
    found = [f for of in chosen.values() for f in next((of[kind] for kind in kinds if of[kind]), [])]
    if options.get("use_onnx") or not any(folders.values()):
        found += [
            f for f in files
            if f.path.count("/") == 1 and _name(f) in _ONNX_IN_PIPELINES and f.path.partition("/")[0] not in brought
        ]  # fmt: skip
    return found


def shards_of_index(index: Mapping[str, Any]) -> list[str]:
    """Return the file names that a ``*.index.json`` names, in natural order."""
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, Mapping):
        return []
    return sorted({str(v) for v in weight_map.values()}, key=natural_key)


def cut(span: ByteRange, count: int) -> tuple[ByteRange, ByteRange]:
    """Return the first *count* bytes of *span* and the rest; either may be empty."""
    middle = span.start + max(0, min(count, len(span)))
    return ByteRange(span.start, middle), ByteRange(middle, span.stop)


def split(holes: Iterable[ByteRange], range_bytes: int) -> list[ByteRange]:
    """Cut *holes* into ranges of at most *range_bytes*, aligned to it in the file."""
    ranges = []
    for hole in holes:
        start = hole.start
        while start < hole.stop:
            stop = min(hole.stop, (start // range_bytes + 1) * range_bytes)
            ranges.append(ByteRange(start, stop))
            start = stop
    return ranges
