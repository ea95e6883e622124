"""Which files a load needs, in which order, and in which ranges. Pure functions."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from .errors import NotFoundError
from .types import ByteRange, Manifest, RemoteFile

#: Files that hold weights, best first; a framework reads one kind, so a load fetches one kind.
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".ckpt", ".h5", ".msgpack", ".ot", ".onnx",
                   ".onnx_data", ".tflite", ".mlmodel", ".pb", ".npz", ".jit")  # fmt: skip
#: Never needed to build a model, sometimes large.
_IDLE_SUFFIXES = (".png", ".jpg", ".jpeg", ".gif", ".webp", ".svg", ".mp4", ".mp3", ".wav", ".flac", ".pdf", ".zip",
                  ".gz", ".tar", ".parquet", ".arrow", ".csv", ".ipynb")  # fmt: skip
_NAME = re.compile(
    r"^(?P<stem>.+?)(?:\.(?P<variant>[A-Za-z0-9_]+))?(?:-(?P<part>\d{5})-of-\d{5})?(?:\.(?P<variant2>[A-Za-z0-9_]+))?"
    r"\.(?P<suffix>safetensors|bin)$"
)


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
        options: The framework's keyword arguments; ``variant``, ``subfolder`` and ``use_safetensors`` matter.

    Raises:
        NotFoundError: Patterns were given and match nothing.
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
        weights = _framework_weights(manifest.files, options)
        if not weights:  # a format of a plugin's: whatever is neither configuration nor a picture
            weights = [f for f in manifest.files if not _is_side_file(f.path) and not is_weight(f.path)]
        small = [
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


def _framework_weights(files: Iterable[RemoteFile], options: Mapping[str, Any]) -> list[RemoteFile]:
    """One kind of weights a folder, as from_pretrained picks them: safetensors first, single file before shards."""
    files = list(files)
    pipeline = any(f.path == "model_index.json" for f in files)
    subfolder = (options.get("subfolder") or "").strip("/")
    chosen: list[RemoteFile] = []
    for folder in sorted({f.path.rpartition("/")[0] for f in files}):
        wanted = folder == subfolder or (pipeline and "/" not in folder and not subfolder)
        if wanted:
            here = [f for f in files if f.path.rpartition("/")[0] == folder and is_weight(f.path)]
            chosen += _one_kind(here, options.get("variant"), options.get("use_safetensors"))
    return chosen


def _one_kind(files: list[RemoteFile], variant: str | None, use_safetensors: bool | None) -> list[RemoteFile]:
    kinds = ["safetensors", "bin"] if use_safetensors is None else ["safetensors"] if use_safetensors else ["bin"]
    for kind in kinds:
        stems: dict[str, dict[bool, list[RemoteFile]]] = {}
        for f in files:
            match = _NAME.match(f.path.rpartition("/")[2])
            if match and match["suffix"] == kind and (match["variant"] or match["variant2"]) == variant:
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


def shards_of_index(index: Mapping[str, Any]) -> list[str]:
    """Return the file names that a ``*.index.json`` names, in natural order."""
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, Mapping):
        return []
    return sorted({str(v) for v in weight_map.values()}, key=natural_key)


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
