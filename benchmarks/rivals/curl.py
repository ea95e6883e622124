"""The wire alone: one curl fetches the same ranges over as many connections, and throws the bytes away.

Over TLS it trusts what SSL_CERT_FILE names, as all others do.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

from ..plainhub import files

TITLE = "curl to /dev/null, the same ranges"
PROGRAMS = ("curl",)
REFERENCE = True
VERIFIES = "nothing"
RANGE_BYTES = 8 << 20


def run(job: dict[str, Any]) -> Any:
    """Return nothing.

    Raises:
        RuntimeError: Not every byte arrived.
    """
    wanted = files(job["repo"])
    trusted = os.environ.get("SSL_CERT_FILE")
    trust = f'cacert = "{trusted}"\n' if trusted else ""
    blocks = [
        f'url = "{file.url}"\nrange = {start}-{min(start + RANGE_BYTES, file.size) - 1}\n'
        f'{trust}output = "/dev/null"\nwrite-out = "%{{size_download}}\\n"\n'
        for file in wanted
        for start in range(0, file.size, RANGE_BYTES)
    ]
    config = Path(os.environ["HF_HOME"], "curl")
    config.parent.mkdir(parents=True, exist_ok=True)
    config.write_text("next\n".join(blocks))
    parallel = ["-Z", "--parallel-immediate", "--parallel-max", str(job["connections"])]
    done = subprocess.run(["curl", "-sS", *parallel, "-K", str(config)], check=True, capture_output=True, text=True)
    received = sum(map(int, done.stdout.split()))
    expected = sum(file.size for file in wanted)
    if received != expected:
        raise RuntimeError(f"curl received {received} of {expected} bytes: {done.stderr[-500:]}")
