"""wrk asks for the same small files for two seconds; its rate says how long one round of them takes."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ..plainhub import files
from . import Delivered

TITLE = "wrk, the same requests"
PROGRAMS = ("wrk",)
REFERENCE = True
VERIFIES = "nothing"
_SECONDS = 2  # guessed: some thousand requests
_SCRIPT = """local paths, at = {{{paths}}}, 0
request = function() at = at % #paths + 1; return wrk.format("GET", paths[at]) end
"""


def run(job: dict[str, Any]) -> Any:
    """Tell how long as many requests took as there are files.

    Raises:
        RuntimeError: wrk failed, or the hub answered with errors.
    """
    wanted = files(job["repo"])
    script = Path(os.environ["HF_HOME"], "paths.lua")
    script.parent.mkdir(parents=True, exist_ok=True)
    quoted = ", ".join(f'"{urlsplit(file.url).path}"' for file in wanted)
    script.write_text(_SCRIPT.format(paths=quoted))
    address = urlsplit(wanted[0].url)
    options = ["-t1", f"-c{job['connections']}", f"-d{_SECONDS}s", "-s", str(script)]
    command = ["wrk", *options, f"{address.scheme}://{address.netloc}/"]
    done = subprocess.run(command, capture_output=True, text=True)
    rate = re.search(r"Requests/sec:\s*([\d.]+)", done.stdout)
    if rate is None or "Non-2xx" in done.stdout:
        raise RuntimeError(f"wrk: {done.stdout[-500:]}{done.stderr[-500:]}")
    return Delivered(told={"stage_s": len(wanted) / float(rate[1])})
