"""A process that imports fastload and ends."""

from __future__ import annotations

import sys
from typing import Any

TITLE = "python -c 'import fastload'"


def command(job: dict[str, Any]) -> list[str]:
    """Return the command."""
    return [sys.executable, "-c", "import fastload"]
