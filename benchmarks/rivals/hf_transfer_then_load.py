"""hf_transfer into a folder, then transformers from there."""

from __future__ import annotations

from typing import Any

from .hf_transfer_download import download
from .imports_only import prepare

__all__ = ["prepare"]

TITLE = "hf_transfer, then from_pretrained"
REQUIRES = ("transformers", "hf_transfer")
VERIFIES = "nothing"


def run(job: dict[str, Any]) -> Any:
    """Return the model."""
    folder = download(job)

    import transformers

    return getattr(transformers, job["auto_class"]).from_pretrained(folder)
