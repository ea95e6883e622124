"""The least that filling the cache takes: new files of the same sizes, written from memory that is there, on all cores."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ..floor import spread

TITLE = "writing alone, into the page cache"
REFERENCE = True
BLOCK_BYTES = 8 << 20


def run(job: dict[str, Any]) -> Any:
    """Tell what it took, with the supply of new pages as this machine's memory is now."""
    folder = Path(os.environ["HF_HOME"])
    folder.mkdir(parents=True, exist_ok=True)
    block = memoryview(bytearray(os.urandom(BLOCK_BYTES)))

    def write(numbered: tuple[int, int]) -> None:
        number, size = numbered
        descriptor = os.open(folder / str(number), os.O_RDWR | os.O_CREAT, 0o600)
        os.posix_fallocate(descriptor, 0, size)
        for start in range(0, size, BLOCK_BYTES):
            os.pwrite(descriptor, block[: min(BLOCK_BYTES, size - start)], start)
        os.close(descriptor)

    return spread(write, list(enumerate(job["sizes"])), job["cores"])
