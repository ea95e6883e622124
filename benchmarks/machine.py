"""Facts about the machine and the libraries: what somebody else needs to judge the figures, and no names."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

from fastload.doctor import limits

LIBRARIES = ("fastload-weights", "aiohttp", "huggingface_hub", "safetensors", "torch", "transformers")


def facts(cache_root: Path, rivals: dict[str, str]) -> dict[str, Any]:
    """Return facts for the record.

    Args:
        cache_root: A folder on the disk that caches lie on.
        rivals: Name and version of what the rivals need.
    """
    return {
        "cpu": _line("/proc/cpuinfo", "model name") or platform.processor(),
        "sha_instructions": "sha_ni" in _line("/proc/cpuinfo", "flags").split() or platform.machine() == "aarch64",
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "virtual": "hypervisor" in _line("/proc/cpuinfo", "flags").split(),
        "gives_free_pages_back": limits.gives_free_pages_back(),
        "kernel": re.match(r"[\d.]*", platform.release()).group().rstrip("."),  # type: ignore[union-attr]
        "file_system": _file_system(cache_root),
        "python": platform.python_version(),
        "libraries": {name: version for name in LIBRARIES if (version := _version(name))} | rivals,
        "nginx": _nginx(),
    }


def load_average() -> float:
    """Return how many processes have wanted a core over the last minute."""
    return round(os.getloadavg()[0], 2)


def _line(path: str, key: str) -> str:
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(key)), "")


def _file_system(folder: Path) -> str:
    mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines()]
    resolved = folder.resolve()
    holding = [(point, kind) for point, kind in mounts if resolved.is_relative_to(point)]
    return max(holding, key=lambda pair: len(pair[0]))[1] if holding else "?"


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _nginx() -> str | None:
    path = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")
    if path is None:
        return None
    said = subprocess.run([path, "-v"], capture_output=True, text=True).stderr
    return said.strip().rpartition("/")[2] or None
