"""hf_transfer into a folder, then safetensors from there."""

from __future__ import annotations

from typing import Any

from .hf_transfer_download import download
from .safetensors_load_file import load_files, prepare

__all__ = ["prepare"]

TITLE = "hf_transfer, then load_file"
REQUIRES = ("torch", "safetensors", "hf_transfer")
VERIFIES = "nothing"


def run(job: dict[str, Any]) -> Any:
    """Return the tensors."""
    folder = download(job)
    return load_files(folder / name for name in job["weights"])
