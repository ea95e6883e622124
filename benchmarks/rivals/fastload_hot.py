"""Imports and build alone: the same program, the model in the cache and in memory, the network off."""

from __future__ import annotations

from typing import Any

from .imports_only import prepare

TITLE = "imports and build alone: fastload.load, cache hot, offline"
REQUIRES = ("transformers",)
REFERENCE = True
VERIFIES = "was verified when it came"
CACHE = "hot"


def run(job: dict[str, Any]) -> Any:
    """Return the model."""
    prepare(job)

    import fastload

    return fastload.load(job["repo"])
