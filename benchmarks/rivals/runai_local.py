"""runai-model-streamer from files that are there."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from typing import Any

TITLE = "runai-model-streamer"
REQUIRES = ("torch", "runai-model-streamer")
VERIFIES = "nothing"


def prepare(job: dict[str, Any]) -> None:
    """Import it."""
    import_module("runai_model_streamer")


def stream(paths: Iterable[str]) -> dict[str, Any]:
    """Return the tensors of all *paths* or addresses; since 0.17 the caller owns them."""
    with import_module("runai_model_streamer").SafetensorsStreamer() as streamer:
        streamer.stream_files(list(paths), device="cpu")
        return dict(streamer.get_tensors())


def run(job: dict[str, Any]) -> Any:
    """Return the tensors."""
    return stream(str(Path(job["folder"], name)) for name in job["weights"])
