"""fastload: into the cache, everything verified and synced to disk; no torch."""

from __future__ import annotations

import time
from typing import Any

TITLE = "fastload.prefetch"
VERIFIES = "sha256"


def run(job: dict[str, Any]) -> Any:
    """Return when the last file was verified and in the cache; the call itself returns when it is on the disk too."""
    import fastload

    verified: list[float] = []
    watch = lambda e: verified.append(time.monotonic()) if e.name == "transfer.finished" else None  # noqa: E731
    fastload.prefetch(job["repo"], observers=[watch])
    return {"verified_s": verified[0]}
