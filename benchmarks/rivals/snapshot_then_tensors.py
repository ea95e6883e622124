"""huggingface_hub into the cache, then safetensors from there: memory maps, nothing copied."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .safetensors_load_file import load_files, prepare

__all__ = ["prepare"]

TITLE = "snapshot_download, then load_file"
REQUIRES = ("torch", "safetensors", "huggingface_hub")
VERIFIES = "size"


def run(job: dict[str, Any]) -> Any:
    """Return the tensors."""
    from huggingface_hub import snapshot_download

    folder = Path(snapshot_download(job["repo"]))
    return load_files(folder / name for name in job["weights"])
