"""huggingface_hub into the cache, then fastsafetensors from there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .fastsafetensors_local import load_files, prepare

__all__ = ["prepare"]

TITLE = "snapshot_download, then fastsafetensors (nogds)"
REQUIRES = ("torch", "fastsafetensors", "huggingface_hub")
VERIFIES = "size"


def run(job: dict[str, Any]) -> Any:
    """Return the tensors."""
    from huggingface_hub import snapshot_download

    folder = Path(snapshot_download(job["repo"]))
    return load_files(folder / name for name in job["weights"])
