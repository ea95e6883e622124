"""tensorizer: its own format, made before, over HTTP through curl; checks its own digests only when told to."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

TITLE = "tensorizer over HTTP"
REQUIRES = ("torch", "tensorizer")
PROGRAMS = ("curl",)
VERIFIES = "nothing"


def store(model: Path, target: Path) -> None:
    """Write the model of the folder *model* in tensorizer's format."""
    from .safetensors_load_file import load_files

    unfinished = target.with_suffix(".unfinished")
    serializer = import_module("tensorizer").TensorSerializer(str(unfinished))
    serializer.write_state_dict(load_files(sorted(model.glob("*.safetensors"))))
    serializer.close()
    unfinished.rename(target)


def prepare(job: dict[str, Any]) -> None:
    """Import it."""
    import_module("tensorizer")


def run(job: dict[str, Any]) -> Any:
    """Return the tensors."""
    address = f"{job['store']}/made/tensorizer_http/{job['model']}"
    deserializer = import_module("tensorizer").TensorDeserializer
    # Its own advice for HTTP: several readers, each a curl of its own.
    with deserializer(address, device="cpu", num_readers=job["connections"]) as tensors:
        return {name: tensors[name] for name in tensors.keys()}  # noqa: SIM118
