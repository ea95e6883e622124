"""What a revision was when it was last asked for, and which files a commit is known not to have."""

from __future__ import annotations

import os
from concurrent.futures import Executor
from contextlib import suppress
from pathlib import Path

from .disk import disk


async def write_ref(folder: Path, revision: str, commit: str, executor: Executor | None) -> None:
    """Remember that *revision* is *commit*."""
    import aiofiles
    import aiofiles.os

    path = folder / "refs" / revision
    temporary = path.with_name(f"{path.name}.{os.urandom(4).hex()}.tmp")
    with disk("write", path):
        with suppress(OSError, UnicodeDecodeError):  # none, or none that can be read: it is written
            async with aiofiles.open(path, encoding="utf-8", executor=executor) as file:
                if await file.read() == commit:
                    return  # the cache may be read-only
        await aiofiles.os.makedirs(path.parent, exist_ok=True, executor=executor)
        try:
            async with aiofiles.open(temporary, "w", encoding="utf-8", executor=executor) as file:
                await file.write(commit)
            await aiofiles.os.replace(temporary, path, executor=executor)
        except OSError:
            with suppress(OSError):
                await aiofiles.os.unlink(temporary, executor=executor)
            raise


def read_ref(folder: Path, revision: str) -> str | None:
    """Return the commit that *revision* was, if anybody remembers."""
    try:
        return (folder / "refs" / revision).read_text(encoding="utf-8").strip() or None
    except (OSError, UnicodeDecodeError):
        return None


async def write_no_exist(folder: Path, commit: str, path: str, executor: Executor | None) -> None:
    """Remember that *commit* has no file at *path*."""
    import aiofiles
    import aiofiles.os

    marker = folder / ".no_exist" / commit / path
    with disk("write", marker):
        await aiofiles.os.makedirs(marker.parent, exist_ok=True, executor=executor)
        async with aiofiles.open(marker, "a", executor=executor):
            pass
