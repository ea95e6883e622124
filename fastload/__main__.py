"""``python -m fastload``: the same as the command ``fastload``."""

from __future__ import annotations

import sys

from .cli import main

sys.exit(main())
