"""Listing the files of a source without fetching any."""

from __future__ import annotations

import asyncio
import threading

from .asking import Asked
from .types import Manifest


async def alist_files(asked: Asked) -> Manifest:
    """Ask the source for its manifest: one request at the Hub. Blocks once, to import aiohttp."""
    from .http import HttpClient
    from .pools import Pools
    from .resolve import read_token
    from .resolve import resolve as resolve_request

    async with Pools() as pools:
        token = await pools.off(read_token, asked.settings)
        async with HttpClient(asked.settings, asked.settings.endpoint, token) as http:
            resolved = await resolve_request(
                asked.request, asked.settings, http, asked.pm, pools, token=token is not None, sleep=asyncio.sleep
            )
            return resolved.manifest


def list_files(asked: Asked) -> Manifest:
    """As :func:`alist_files`, from any thread, with or without a running loop."""
    result: list[Manifest] = []
    error: list[BaseException] = []

    def main() -> None:
        try:
            with asyncio.Runner(loop_factory=asyncio.new_event_loop) as runner:
                result.append(runner.run(alist_files(asked)))
        except BaseException as e:  # the caller's, whatever it is
            error.append(e)

    thread = threading.Thread(target=main, name="fastload-loop", daemon=True)
    thread.start()
    thread.join()
    if error:
        raise error[0]
    return result[0]
