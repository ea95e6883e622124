"""safetensors-streaming: one connection a file, tensors cut out as they arrive; here as many files at once as it takes."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from typing import Any

TITLE = "safetensors-streaming over HTTP"
REQUIRES = ("torch", "safetensors-streaming")
VERIFIES = "nothing"


def prepare(job: dict[str, Any]) -> None:
    """Import it."""
    import_module("torch")
    import_module("safetensors_streaming")


def run(job: dict[str, Any]) -> Any:
    """Return the tensors."""
    prepare(job)
    load_file = import_module("safetensors_streaming").load_file
    urls = [f"{job['store']}/models/{job['model']}/{name}" for name in job["weights"]]
    tensors: dict[str, Any] = {}
    with ThreadPoolExecutor(job["connections"]) as pool:
        for found in pool.map(lambda url: load_file(url, device="cpu"), urls):
            tensors.update(found)
    return tensors
