"""The least that verifying takes: sha256 alone, over memory that is there, file by file on all cores."""

from __future__ import annotations

import hashlib
import os
from typing import Any

from ..floor import spread

TITLE = "sha256 alone"
REFERENCE = True
BLOCK_BYTES = 8 << 20


def run(job: dict[str, Any]) -> Any:
    """Tell what it took; one file goes through one core, as its digest is one chain."""
    block = memoryview(os.urandom(BLOCK_BYTES))

    def digest(size: int) -> None:
        state = hashlib.sha256()
        for start in range(0, size, BLOCK_BYTES):
            state.update(block[: min(BLOCK_BYTES, size - start)])
        state.digest()

    return spread(digest, sorted(job["sizes"], reverse=True), job["cores"])
