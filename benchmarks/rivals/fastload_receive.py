"""fastload's receiving alone: its connections, the same ranges, into slots that are used again; no hash, no disk."""

from __future__ import annotations

import asyncio
import os
import time
from collections import deque
from typing import Any

from ..plainhub import files
from . import Delivered

TITLE = "fastload's receiving alone"
REFERENCE = True
VERIFIES = "nothing"
RANGE_BYTES = 8 << 20


def prepare(job: dict[str, Any]) -> None:
    """Import what a program has that fetched something before."""
    import fastload.engine  # noqa: F401


def run(job: dict[str, Any]) -> Any:
    """Tell what it took, from the first request to the last byte."""
    wanted = files(job["repo"])
    started_s, used_s = time.monotonic(), time.process_time()
    asyncio.run(_receive(wanted, job["connections"]))
    return Delivered(told={"stage_s": time.monotonic() - started_s, "stage_cpu_s": time.process_time() - used_s})


async def _receive(wanted: Any, connections: int) -> None:
    from fastload.http import HttpClient
    from fastload.settings import Settings
    from fastload.sink import Fill
    from fastload.types import ByteRange

    ranges = deque(
        (file, ByteRange(start, min(start + RANGE_BYTES, file.size)))
        for file in wanted
        for start in range(0, file.size, RANGE_BYTES)
    )

    async def connection(client: HttpClient) -> None:
        slot = memoryview(bytearray(b"x") * RANGE_BYTES)  # of zeros it would not be there yet
        while ranges:
            file, span = ranges.popleft()
            await client.fetch(file.url, span, Fill(slot[: len(span)]), size=file.size)

    async with HttpClient(Settings(), os.environ["HF_ENDPOINT"]) as client, asyncio.TaskGroup() as group:
        for _ in range(connections):
            group.create_task(connection(client))
