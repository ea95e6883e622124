"""fastload.start on the first line of the program, before its imports."""

from __future__ import annotations

from typing import Any

from .imports_only import prepare

TITLE = "fastload.start on the first line"
REQUIRES = ("transformers",)
VERIFIES = "sha256"


def run(job: dict[str, Any]) -> Any:
    """Return the model."""
    import fastload

    fastload.start(job["repo"])
    prepare(job)
    return fastload.load(job["repo"])
