"""safetensors from files that are there: memory maps, nothing copied."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from typing import Any

TITLE = "safetensors load_file"
REQUIRES = ("torch", "safetensors")
VERIFIES = "nothing"


def prepare(job: dict[str, Any]) -> None:
    """Import what :func:`load_files` and the rivals that use it need."""
    import_module("safetensors.torch")
    import_module("huggingface_hub").snapshot_download  # noqa: B018


def load_files(paths: Iterable[Path]) -> dict[str, Any]:
    """Return the tensors of all *paths*."""
    from safetensors.torch import load_file

    tensors: dict[str, Any] = {}
    for path in paths:
        tensors.update(load_file(path))
    return tensors


def run(job: dict[str, Any]) -> Any:
    """Return the tensors."""
    return load_files(Path(job["folder"], name) for name in job["weights"])
