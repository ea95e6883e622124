"""What everybody does: the framework fetches through huggingface_hub, then reads."""

from __future__ import annotations

from typing import Any

from .imports_only import prepare

__all__ = ["prepare"]

TITLE = "from_pretrained"
REQUIRES = ("transformers", "huggingface_hub")
VERIFIES = "size"


def run(job: dict[str, Any]) -> Any:
    """Return the model."""
    import transformers

    return getattr(transformers, job["auto_class"]).from_pretrained(job["repo"])
