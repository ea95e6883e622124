"""Threads of a transfer: who is cancelled waits for what his thread does, so that nothing is taken away under it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

import pytest
from programs import until

from fastload.pools import Pools


def names() -> set[str]:
    return {t.name.rpartition("_")[0] for t in threading.enumerate() if t.name.startswith("fastload-")}


async def test_work_runs_in_threads_that_end_with_the_pools():
    async with Pools() as pools:
        here = threading.get_ident()
        assert await pools.off(threading.get_ident) != here
        assert await pools.off_hash(threading.get_ident) != here
        with pytest.raises(ZeroDivisionError):
            await pools.off(lambda: 1 // 0)
        assert names() == {"fastload-disk", "fastload-hash"}
    await asyncio.to_thread(until, lambda: not names())


@pytest.mark.parametrize("times", [1, 3])
@pytest.mark.parametrize("pool", ["off", "off_hash"])
async def test_who_is_cancelled_waits_for_the_end_of_what_runs(pool: str, times: int):
    begun, go, ended = threading.Event(), threading.Event(), []

    def work() -> None:
        begun.set()
        go.wait()
        ended.append(True)

    async with Pools() as pools:
        task = asyncio.create_task(getattr(pools, pool)(work))
        await asyncio.to_thread(begun.wait)
        for _ in range(times):
            task.cancel()
            for _ in range(5):
                await asyncio.sleep(0)
            assert not task.done()
        go.set()
        await asyncio.wait({task})
        assert task.cancelled() and ended == [True]


async def test_what_has_not_begun_when_it_is_cancelled_never_begins():
    go, ran = threading.Event(), []
    release: Callable[[], bool] = go.wait
    async with Pools() as pools:
        busy = [asyncio.create_task(pools.off(release)) for _ in range(4)]
        task = asyncio.create_task(pools.off(ran.append, 1))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait({task})
        go.set()
        await asyncio.gather(*busy)
    assert task.cancelled() and not ran


async def test_what_must_run_runs_even_if_it_has_not_begun_when_it_is_cancelled():
    go, ran = threading.Event(), []
    async with Pools() as pools:
        busy = [asyncio.create_task(pools.off(go.wait)) for _ in range(4)]
        task = asyncio.create_task(pools.surely(ran.append, 1))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.sleep(0)
        assert not task.done()
        go.set()
        await asyncio.wait({task, *busy})
        assert ran == [1]
