"""Imports and build alone, without us: the model in the cache and in memory, the network off."""

from __future__ import annotations

from typing import Any

from . import from_pretrained
from .imports_only import prepare

TITLE = "imports and build alone: from_pretrained, cache hot, offline"
REQUIRES = from_pretrained.REQUIRES
REFERENCE = True
VERIFIES = "nothing"
CACHE = "hot"


def run(job: dict[str, Any]) -> Any:
    """Return the model."""
    prepare(job)
    return from_pretrained.run(job)
