"""The imports that every loader of tensors pays for: torch and safetensors."""

from __future__ import annotations

from importlib import import_module
from typing import Any

TITLE = "import torch alone"
REQUIRES = ("torch", "safetensors")
REFERENCE = True
IMPORTS = True


def prepare(job: dict[str, Any]) -> None:
    """Import both."""
    import_module("torch")
    import_module("safetensors.torch")


def run(job: dict[str, Any]) -> Any:
    """Return nothing."""
    prepare(job)
