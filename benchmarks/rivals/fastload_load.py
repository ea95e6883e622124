"""fastload: the model, everything verified."""

from __future__ import annotations

from typing import Any

from .imports_only import prepare as prepare_framework

TITLE = "fastload.load"
VERIFIES = "sha256"


def prepare(job: dict[str, Any]) -> None:
    """Import what a server that runs already has."""
    import safetensors  # noqa: F401

    import fastload.engine  # what the first call imports, aiohttp too
    import fastload.loading
    import fastload.running  # noqa: F401

    prepare_framework(job)


def run(job: dict[str, Any]) -> Any:
    """Return the model."""
    import fastload

    return fastload.load(job["repo"])
