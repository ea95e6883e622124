"""The ring: never more slots than it has, no slot twice, none lost."""

from __future__ import annotations

import asyncio
import random

import pytest

from fastload.ring import Ring

SLOT = 4096


async def test_slots_are_disjoint_and_there_are_no_more():
    ring = Ring(4 * SLOT + 100, SLOT)
    slots = [await ring.acquire() for _ in range(4)]
    for n, slot in enumerate(slots):
        slot.view[:] = bytes([n]) * SLOT
    assert [bytes(s.view) for s in slots] == [bytes([n]) * SLOT for n in range(4)]
    assert ring.in_use == 4
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0):
            await ring.acquire()
    for slot in slots:
        slot.release()
    assert ring.in_use == 0
    ring.close()


async def test_a_ring_has_at_least_one_slot():
    ring = Ring(1, SLOT)
    (await ring.acquire()).release()
    ring.close()


async def test_the_slot_that_was_used_last_is_used_next():
    ring = Ring(8 * SLOT, SLOT)
    first, second = await ring.acquire(), await ring.acquire()
    index = first.index
    second.release()
    first.release()
    again = await ring.acquire()
    assert again.index == index
    again.release()
    ring.close()


async def test_a_slot_that_was_given_back_cannot_be_written_any_more():
    ring = Ring(SLOT, SLOT)
    slot = await ring.acquire()
    slot.release()
    with pytest.raises(ValueError, match="released"):
        slot.view[0] = 1
    ring.close()


async def test_waiters_come_in_order():
    ring = Ring(SLOT, SLOT)
    slot = await ring.acquire()
    served: list[int] = []

    async def take(n: int) -> None:
        taken = await ring.acquire()
        served.append(n)
        await asyncio.sleep(0)
        taken.release()

    async with asyncio.TaskGroup() as group:
        for n in range(5):
            group.create_task(take(n))
        await asyncio.sleep(0)
        slot.release()
    assert served == list(range(5))
    ring.close()


@pytest.mark.parametrize("seed", range(20))
async def test_cancelled_waiters_lose_no_slot(seed: int):
    choice = random.Random(seed)
    ring = Ring(3 * SLOT, SLOT)

    async def use() -> None:
        slot = await ring.acquire()
        assert ring.in_use <= 3
        try:
            for _ in range(choice.randrange(4)):
                await asyncio.sleep(0)
        finally:
            slot.release()

    tasks = [asyncio.create_task(use()) for _ in range(40)]
    while not all(t.done() for t in tasks):
        await asyncio.sleep(0)
        if choice.random() < 0.4:
            choice.choice(tasks).cancel()
    assert ring.in_use == 0
    taken = [await ring.acquire() for _ in range(3)]
    assert len({s.index for s in taken}) == 3
    for slot in taken:
        slot.release()
    ring.close()


async def test_memory_that_somebody_still_looks_at_outlives_the_ring():
    ring = Ring(SLOT, SLOT)
    slot = await ring.acquire()
    part = slot.view[:10]
    part[:] = b"0123456789"
    slot.release()
    ring.close()
    assert bytes(part) == b"0123456789"
    part.release()


async def test_a_slot_that_was_meant_for_a_cancelled_waiter_goes_to_the_next():
    ring = Ring(SLOT, SLOT)
    slot = await ring.acquire()
    first, second = (asyncio.create_task(ring.acquire()) for _ in range(2))
    await asyncio.sleep(0)
    slot.release()  # wakes the first
    first.cancel()
    (await asyncio.wait_for(second, 1)).release()
    assert ring.in_use == 0
    ring.close()
