"""fastload exec: the transfer begins, then the program does, which says fastload.load instead of from_pretrained."""

from __future__ import annotations

from typing import Any

from .fastload_command import script
from .imports_only import prepare

TITLE = "fastload exec MODEL -- program"
REQUIRES = ("transformers",)
VERIFIES = "sha256"


def launcher(job: dict[str, Any]) -> list[str]:
    """Return the words that the program's own command follows."""
    return [*script(), "exec", job["repo"], "--"]


def run(job: dict[str, Any]) -> Any:
    """Return the model; the imports come first, as in a program that was written without us."""
    prepare(job)

    import fastload

    return fastload.load(job["repo"])
