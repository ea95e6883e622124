"""Which blobs were hashed here: huggingface_hub checks no more than the size, so its blobs are hashed once by us.

A stamp is worth as much as what it was made from: bytes that were not yet on the disk may be gone after a power cut, so
a stamp without ``synced`` holds until the machine starts again.
"""

from __future__ import annotations

import json
import logging
import os
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from ..types import Digest

log = logging.getLogger("fastload")


@cache
def boot_id() -> str | None:
    """Return what Linux calls this boot of the machine (random(4)); ``None`` where nothing tells."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip() or None
    except OSError:
        return None


def _stamp_path(folder: Path, digest: Digest) -> Path:
    return folder / ".fastload" / "verified" / digest.value


def write_stamp(folder: Path, digest: Digest, path: Path, *, synced: bool) -> None:
    """Say that *path* was hashed and is *digest*. Without effect where nothing can be written: it is hashed again."""
    stamp = _stamp_path(folder, digest)
    temporary = stamp.with_name(f"{stamp.name}.{os.urandom(4).hex()}.tmp")
    try:
        status = os.stat(path)
        record = {"size": status.st_size, "mtime_ns": status.st_mtime_ns, "boot_id": boot_id(), "synced": synced}
        stamp.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(record), encoding="ascii")
        os.replace(temporary, stamp)
    except OSError as e:
        log.debug("no stamp for %s: %s", path, e)
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def is_trusted(folder: Path, digest: Digest, path: Path) -> bool:
    """Tell whether *path* is what was hashed here as *digest*, as far as size and time of change tell."""
    try:
        record: Any = json.loads(_stamp_path(folder, digest).read_text(encoding="ascii"))
        status = os.stat(path)
    except (OSError, ValueError):
        return False
    if not isinstance(record, dict) or record.get("size") != status.st_size:
        return False
    noted_ns = record.get("mtime_ns")
    if noted_ns != status.st_mtime_ns and not (
        # Layers of container images keep whole seconds (BuildKit and containerd cut the rest off).
        isinstance(noted_ns, int) and noted_ns - noted_ns % 1_000_000_000 == status.st_mtime_ns
    ):
        return False
    return record.get("synced") is True or (boot_id() is not None and record.get("boot_id") == boot_id())


def remove_stamp(folder: Path, digest: Digest) -> None:
    """Trust *digest* no more."""
    with suppress(OSError):
        _stamp_path(folder, digest).unlink(missing_ok=True)
