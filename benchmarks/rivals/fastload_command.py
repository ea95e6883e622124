"""The command `fastload prefetch`, as a build step or an init container runs it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

TITLE = "fastload prefetch"
VERIFIES = "sha256"


def command(job: dict[str, Any]) -> list[str]:
    """Return the command: the script beside this Python, or the module where it is not installed."""
    script = Path(sys.executable).with_name("fastload")
    own = [str(script)] if script.exists() else [sys.executable, "-m", "fastload"]
    return [*own, "prefetch", "--quiet", job["repo"]]
