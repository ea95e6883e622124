"""What images and init containers do: fetch the whole repository first, then load from its folder."""

from __future__ import annotations

from typing import Any

from .imports_only import prepare

__all__ = ["prepare"]

TITLE = "snapshot_download, then from_pretrained"
REQUIRES = ("transformers", "huggingface_hub")
VERIFIES = "size"


def run(job: dict[str, Any]) -> Any:
    """Return the model."""
    from huggingface_hub import snapshot_download

    folder = snapshot_download(job["repo"])

    import transformers

    return getattr(transformers, job["auto_class"]).from_pretrained(folder)
