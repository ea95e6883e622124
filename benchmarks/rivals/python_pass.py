"""A process that does nothing."""

from __future__ import annotations

import sys
from typing import Any

TITLE = "python -c pass"
REFERENCE = True


def command(job: dict[str, Any]) -> list[str]:
    """Return the command."""
    return [sys.executable, "-c", "pass"]
