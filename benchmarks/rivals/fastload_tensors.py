"""fastload: a dict of tensors, everything verified and in the cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

TITLE = "fastload.load_tensors"
VERIFIES = "sha256"


def prepare(job: dict[str, Any]) -> None:
    """Import what a program that runs already has."""
    import safetensors  # noqa: F401
    import torch  # noqa: F401

    import fastload.engine  # what the first call imports, aiohttp too
    import fastload.loading
    import fastload.running  # noqa: F401


def run(job: dict[str, Any]) -> Any:
    """Return the tensors. Where the others are told which files, not which model, it is told the commit."""
    import fastload

    commit = Path(job["folder"]).name if job["folder"] else None
    return fastload.load_tensors(job["repo"], revision=commit)
