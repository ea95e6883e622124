"""The command `fastload prefetch`, as a build step or an init container runs it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

TITLE = "fastload prefetch"
VERIFIES = "sha256"


def script() -> list[str]:
    """Return the script beside this Python, or the module where it is not installed."""
    installed = Path(sys.executable).with_name("fastload")
    return [str(installed)] if installed.exists() else [sys.executable, "-m", "fastload"]


def command(job: dict[str, Any]) -> list[str]:
    """Return the command."""
    return [*script(), "prefetch", "--quiet", job["repo"]]
