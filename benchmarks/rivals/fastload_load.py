"""fastload: the model, everything verified."""

from __future__ import annotations

from typing import Any

TITLE = "fastload.load"
VERIFIES = "sha256"


def run(job: dict[str, Any]) -> Any:
    """Return the model."""
    import fastload

    return fastload.load(job["repo"])
