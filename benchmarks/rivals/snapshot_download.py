"""huggingface_hub: into the cache; compares sizes, syncs nothing."""

from __future__ import annotations

from typing import Any

TITLE = "snapshot_download"
REQUIRES = ("huggingface_hub",)
VERIFIES = "size"


def run(job: dict[str, Any]) -> Any:
    """Return nothing."""
    from huggingface_hub import snapshot_download

    snapshot_download(job["repo"])
