"""A process that imports aiohttp: most of what stands between the start of fastload and its first request."""

from __future__ import annotations

import sys
from typing import Any

TITLE = "python -c 'import aiohttp'"
REQUIRES = ("aiohttp",)
REFERENCE = True


def command(job: dict[str, Any]) -> list[str]:
    """Return the command."""
    return [sys.executable, "-c", "import aiohttp"]
