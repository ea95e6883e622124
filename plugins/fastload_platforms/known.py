"""The platforms: by which variables each is recognised, and where it keeps what must outlive the container.

Variables and folders are those of the platforms' own sources and pages (2026-11): of their runners, of the Dockerfiles
that they render, of their documentation.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from fastload.types import Platform

Environ = Mapping[str, str]
#: Gets the environment and the root of the file system; returns where the cache lies, or ``None``: where it always does.
Place = Callable[[Environ, Path], Path | None]


def _nowhere(environ: Environ, root: Path) -> Path | None:
    return None


def _bentoml(environ: Environ, root: Path) -> Path | None:
    """Where ``HuggingFaceModel`` has put the models of the Bento when the image was built."""
    named = environ.get("BENTOML_HF_CACHE_DIR")
    return _existing(root / named.lstrip("/")) if named else None


def _mounted_models(environ: Environ, root: Path) -> Path | None:
    """What an initContainer with ``HF_HOME=/mnt/models`` has left on the volume of the model."""
    return _existing(root / "mnt/models/hub")


def _runpod(environ: Environ, root: Path) -> Path | None:
    """The network volume of serverless workers, where RunPod itself keeps its cached models, in the Hub's layout."""
    volume = _existing(root / "runpod-volume")
    return volume and volume / "huggingface-cache/hub"


def _baseten(environ: Environ, root: Path) -> Path | None:
    """The organisation's part of the file system that replicas share; truss-transfer keeps its files there too."""
    shared = environ.get("BASETEN_FS_ENABLED", "").lower() in ("1", "true", "yes", "y")
    volume = _existing(root / "cache/org") if shared else None
    return volume and volume / "huggingface/hub"


def _beam(environ: Environ, root: Path) -> Path | None:
    """The volume, where there is exactly one; with several it is for the user to say.

    A CloudBucket is mounted beside volumes, but can neither rename nor lock. The volume of checkpoints is named by
    ``HF_HOME`` already.
    """
    try:
        names = sorted(os.listdir(root / "volumes"))
    except OSError:
        return None
    buckets = _buckets(root)
    volumes = [n for n in names if f"/volumes/{n}" not in buckets and not n.startswith("checkpoint-model-cache-")]
    return root / "volumes" / volumes[0] / "huggingface/hub" if len(volumes) == 1 else None


def _buckets(root: Path) -> set[str]:
    """Return the mount points of object storage (proc_pid_mounts(5); mountpoint-s3 has its name in the first column)."""
    try:
        lines = (root / "proc/self/mounts").read_text().splitlines()
    except OSError:
        return set()
    return {line.split()[1] for line in lines if line.startswith("mountpoint-s3 ")}


def _existing(folder: Path) -> Path | None:
    return folder if folder.is_dir() else None


@dataclass(frozen=True, slots=True)
class Known:
    """One platform.

    Attributes:
        signs: It is this one where all variables of one of these groups are set.
        cache_dir: Where its cache lies.
    """

    name: str
    signs: tuple[frozenset[str], ...]
    cache_dir: Place = _nowhere


def _known(name: str, *signs: str, cache_dir: Place = _nowhere) -> Known:
    return Known(name, tuple(frozenset(sign.split()) for sign in signs), cache_dir)


#: Servers first, then clouds: what was put into the image goes before a volume that the cloud mounts beside it.
PLATFORMS = (
    _known("BentoML", "BENTOML_CONTAINERIZED", "BENTO_PATH", "BENTOML_HF_CACHE_DIR", cache_dir=_bentoml),
    _known("KServe", "INFERENCE_SERVICE_NAME", cache_dir=_mounted_models),
    _known("MLServer", "MLSERVER_MODELS_DIR", "MLSERVER_HTTP_PORT", cache_dir=_mounted_models),
    _known("Cog", "COG_PREDICT_TYPE_STUB", "COG_TRAIN_TYPE_STUB", "R8_COG_VERSION"),
    _known("Mystic", "PIPELINE_PATH PIPELINE_NAME PIPELINE_IMAGE"),
    _known("Truss", "SERVER_START_CMD APP_HOME", "SERVER_START_CMD INFERENCE_SERVER_PORT", cache_dir=_baseten),
    _known("Beam", "CONTAINER_ID STUB_ID STUB_TYPE", cache_dir=_beam),
    _known("RunPod", "RUNPOD_ENDPOINT_ID", "RUNPOD_POD_ID", cache_dir=_runpod),
    _known("Modal", "MODAL_TASK_ID MODAL_IMAGE_ID"),
    _known("LitServe", "LITSERVE_WORKER_ID"),
    _known("Ray Serve", "RAY_JOB_ID RAY_RAYLET_PID"),
)


def recognise(environ: Environ, root: Path = Path("/")) -> Platform | None:
    """Return the platform of *environ*: the first that knows a place for the cache, else the first of all.

    Args:
        environ: Environment variables.
        root: Of the file system that its volumes are looked for in.
    """
    first = None
    for known in PLATFORMS:
        if not any(all(environ.get(variable) for variable in sign) for sign in known.signs):
            continue
        cache_dir = known.cache_dir(environ, root)
        if cache_dir is not None:
            return Platform(known.name, {"cache_dir": cache_dir})
        first = first or Platform(known.name)
    return first
