"""The imports that every other one pays for: nothing is fetched, nothing is built."""

from __future__ import annotations

from importlib import import_module
from typing import Any

TITLE = "the imports alone"
REQUIRES = ("transformers",)
REFERENCE = True


def run(job: dict[str, Any]) -> Any:
    """Return nothing."""
    import transformers

    getattr(transformers, job["auto_class"])
    getattr(import_module(f"transformers.models.{job['family']}"), job["class"])
