"""hf_transfer: parallel ranges to a file, in Rust; huggingface_hub 2 no longer uses it."""

from __future__ import annotations

import os
from importlib import import_module
from pathlib import Path
from typing import Any

from ..plainhub import files

TITLE = "hf_transfer"
REQUIRES = ("hf_transfer",)
VERIFIES = "nothing"


def download(job: dict[str, Any]) -> Path:
    """Fetch all files, one after another as hf_transfer does; return the folder that they lie in."""
    hf_transfer = import_module("hf_transfer")
    folder = Path(os.environ["HF_HOME"])
    for file in files(job["repo"]):
        target = folder / file.path
        target.parent.mkdir(parents=True, exist_ok=True)
        # As huggingface_hub 1 called it: 10 MiB pieces, and here as many connections as fastload has.
        hf_transfer.download(file.url, str(target), job["connections"], 10 << 20, 3, 5, {}, None)
    return folder


def run(job: dict[str, Any]) -> Any:
    """Return nothing; the files lie in HF_HOME."""
    download(job)
