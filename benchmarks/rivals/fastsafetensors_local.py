"""fastsafetensors from files that are there, without GPUDirect: threads read into one buffer a file."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from typing import Any

TITLE = "fastsafetensors (nogds)"
REQUIRES = ("torch", "fastsafetensors")
VERIFIES = "nothing"


def prepare(job: dict[str, Any]) -> None:
    """Import what :func:`load_files` and the rivals that use it need."""
    import_module("fastsafetensors")
    import_module("huggingface_hub").snapshot_download  # noqa: B018


def load_files(paths: Iterable[Path]) -> dict[str, Any]:
    """Return the tensors of all *paths*; they live in the buffers, which therefore are not closed."""
    fastsafetensors = import_module("fastsafetensors")
    loader = fastsafetensors.SafeTensorsFileLoader(fastsafetensors.SingleGroup(), device="cpu", nogds=True)
    loader.add_filenames({0: [str(path) for path in paths]})
    buffers = loader.copy_files_to_device()
    return {key: buffers.get_tensor(key).clone() for key in loader.get_keys()}


def run(job: dict[str, Any]) -> Any:
    """Return the tensors."""
    return load_files(Path(job["folder"], name) for name in job["weights"])
