"""The imports that every other one pays for: nothing is fetched, nothing is built."""

from __future__ import annotations

from importlib import import_module
from typing import Any

TITLE = "the imports alone"
REQUIRES = ("transformers",)
REFERENCE = True
IMPORTS = True


def prepare(job: dict[str, Any]) -> None:
    """Import what a load with transformers imports."""
    import transformers

    getattr(transformers, job["auto_class"])
    getattr(import_module(f"transformers.models.{job['family']}"), job["class"])


def run(job: dict[str, Any]) -> Any:
    """Return nothing."""
    prepare(job)
