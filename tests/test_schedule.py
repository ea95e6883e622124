"""Which range next."""

from __future__ import annotations

import asyncio
from collections import deque
from pathlib import Path

from fastload.cache import RepoCache
from fastload.download import Download
from fastload.journal import BLOCK_BYTES
from fastload.schedule import Schedule, Turns
from fastload.types import ByteRange, Digest, RemoteFile

PIECE = BLOCK_BYTES


class Journal:
    """As far as a schedule looks into one."""

    def __init__(self) -> None:
        self.demands: list[int] = []

    def take_demands(self) -> list[int]:
        taken, self.demands = self.demands, []
        return taken


def download(name: str, blocks: int) -> Download:
    digest = Digest("sha256", name.encode().hex().ljust(64, "0"))
    made = Download(RemoteFile(name, blocks * PIECE, digest), digest, RepoCache(Path("/nowhere"), "org/m"), "c" * 40)
    made.paths.append(name)
    made.pending = deque(ByteRange(n * PIECE, (n + 1) * PIECE) for n in range(blocks))
    made.journal = Journal()  # type: ignore[assignment]
    return made


def taken(schedule: Schedule, count: int = 1000) -> list[str]:
    found: list[str] = []
    while len(found) < count and (job := schedule.next(PIECE)) is not None:
        found.append(f"{job[0].paths[0]}{job[1].start // PIECE}")
    return found


def demand(wanted: Download, *blocks: int) -> None:
    wanted.journal.demands += [n * PIECE + 5 for n in blocks]  # type: ignore[union-attr]


def test_small_files_first_then_a_few_large_ones_in_file_order():
    schedule = Schedule(shards=2)
    for name, blocks in (("a", 3), ("b", 2), ("c", 2)):
        schedule.add_large(download(name, blocks))
    schedule.add_small(download("s", 1))
    schedule.add_small(download("t", 1))
    order = taken(schedule)
    assert order[:2] == ["s0", "t0"]
    assert [x for x in order if x[0] == "a"] == ["a0", "a1", "a2"]
    assert set(order[2:5]) < {"a0", "a1", "b0", "b1"}  # two at a time
    assert order.index("c0") > order.index("b1") or order.index("c0") > order.index("a2")
    assert schedule.next(PIECE) is None


def test_one_connection_asks_for_weights_while_the_others_bring_small_files():
    schedule = Schedule(shards=2)
    schedule.add_small(download("small", 1))
    large = download("a", 1)
    assert schedule.next(PIECE, large_first=True, large_ones_come=True) is None  # it is being opened
    schedule.add_large(large)
    schedule.add_small(download("other", 1))
    jobs = [schedule.next(PIECE, large_first=True) for _ in range(3)]
    assert [job[0].paths[0] for job in jobs if job is not None] == ["a", "small", "other"]


def test_what_a_reader_waits_for_comes_next_and_what_follows_it_after_that():
    schedule = Schedule(shards=1)
    schedule.add_large(first := download("a", 3))
    schedule.add_large(second := download("b", 6))
    schedule.add_small(download("s", 1))
    demand(second, 3)
    assert taken(schedule, 2) == ["b3", "s0"]
    assert taken(schedule, 3) == ["a0", "a1", "a2"]
    assert taken(schedule) == ["b4", "b5", "b0", "b1", "b2"]
    assert not first.pending


def test_the_oldest_wish_comes_first_and_none_is_lost():
    schedule = Schedule(shards=1)
    schedule.add_large(only := download("a", 8))
    demand(only, 6, 2, 4)
    assert taken(schedule) == ["a6", "a2", "a4", "a7", "a0", "a1", "a3", "a5"]


def test_a_wish_for_what_is_in_flight_or_out_of_reach_changes_nothing():
    schedule = Schedule(shards=1)
    schedule.add_large(only := download("a", 4))
    assert taken(schedule, 1) == ["a0"]
    demand(only, 0, 99)
    assert taken(schedule) == ["a1", "a2", "a3"]


def test_a_wish_within_a_long_range_cuts_it_where_the_reader_stands():
    schedule = Schedule(shards=1)
    schedule.add_large(only := download("a", 0))
    only.pending = deque([ByteRange(0, 8 * PIECE)])
    demand(only, 5)
    job = schedule.next(PIECE)
    assert job is not None and job[1] == ByteRange(5 * PIECE, 6 * PIECE)
    rest = {n for _, s in iter(lambda: schedule.next(PIECE), None) for n in range(s.start // PIECE, s.stop // PIECE)}
    assert rest == {0, 1, 2, 3, 4, 6, 7}


def test_the_file_that_a_reader_waits_for_goes_before_all_others_and_has_a_slow_link_alone():
    schedule = Schedule(shards=2)
    for made in (download("a", 4), download("b", 4), last := download("c", 40)):
        schedule.add_large(made)
    assert set(taken(schedule, 2)) == {"a0", "b0"}
    demand(last, 20)  # behind the head, which frameworks read of every file
    order = taken(schedule, 6)
    assert order[0] == "c20" and {name[0] for name in order} == {"a", "c"}
    schedule.one_at_a_time = True
    assert {name[0] for name in taken(schedule, 4)} == {"c"}


def test_the_head_of_a_file_does_not_put_it_before_others():
    schedule = Schedule(shards=1)
    schedule.add_large(download("a", 3))
    schedule.add_large(second := download("b", 3))
    demand(second, 0)
    assert taken(schedule) == ["b0", "a0", "a1", "a2", "b1", "b2"]


def test_a_file_that_is_complete_is_asked_for_no_more():
    schedule = Schedule(shards=1)
    schedule.add_large(first := download("a", 2))
    schedule.add_large(download("b", 1))
    schedule.remove(first)
    assert taken(schedule) == ["b0"]


async def test_files_enter_in_the_order_of_the_plan_whichever_is_opened_first():
    first, second, third = files = [download(name, 1) for name in ("a", "b", "c")]
    turns, entered = Turns(files, PIECE), []

    async def enter(one: Download) -> None:
        await turns.come(one)
        entered.append(one)
        turns.over(one)

    async with asyncio.TaskGroup() as group:
        for one in (third, second, first):  # as the threads that open them might finish
            group.create_task(enter(one))
    assert entered == files


async def test_large_files_come_until_each_is_in_the_schedule_or_known_to_be_there():
    files = small, first, second = [download(name, blocks) for name, blocks in (("s", 1), ("a", 2), ("b", 2))]
    turns, come = Turns(files, PIECE), []
    for one in (first, small, second):
        come.append(turns.large_ones_come)
        turns.over(one)
    assert come == [True, True, True]
    assert not turns.large_ones_come
    assert not Turns([small], PIECE).large_ones_come


async def test_a_file_that_is_there_already_holds_nobody_up():
    first, second = files = [download(name, 1) for name in ("a", "b")]
    turns = Turns(files, PIECE)
    turns.over(first)
    await turns.come(second)


def test_the_last_pieces_are_small_so_that_little_is_left_to_hash_after_the_last_byte():
    schedule = Schedule(shards=2)
    piece, count = 8 << 20, 12
    for name in "ab":
        made = download(name, 0)
        made.pending = deque(ByteRange(n * piece, (n + 1) * piece) for n in range(count))
        schedule.add_large(made)
    sizes = []
    while (job := schedule.next(piece)) is not None:
        sizes.append(len(job[1]))
    assert sum(sizes) == 2 * count * piece
    assert sizes[:10] == [piece] * 10
    assert all(size <= 1.5 * (1 << 20) for size in sizes[-8:])
    assert len(sizes) <= 2 * count + 32


def test_small_pieces_stay_as_they_are_at_the_end():
    schedule = Schedule(shards=2)
    schedule.add_large(download("a", 5))
    assert taken(schedule) == [f"a{n}" for n in range(5)]


def test_the_heads_of_many_files_are_small_and_do_not_keep_the_first_tensor_waiting():
    schedule = Schedule(shards=2)
    piece, names = 8 << 20, [f"{n:03}" for n in range(100)]
    files = [download(name, 0) for name in names]
    for made in files:
        made.pending = deque([ByteRange(0, 4 * piece)])
        made.journal.demands.append(0)  # type: ignore[union-attr]
        schedule.add_large(made)
    heads = [schedule.next(piece) for _ in range(50)]
    assert [job[0].paths[0] for job in heads if job is not None] == names[:50]
    assert all(job is not None and job[1] == ByteRange(0, 1 << 20) for job in heads)
    files[0].journal.demands.append(3 * piece)  # type: ignore[union-attr]
    assert schedule.next(piece) == (files[0], ByteRange(3 * piece, 4 * piece))
    assert sum(len(job[1]) for job in iter(lambda: schedule.next(piece), None)) == 100 * 4 * piece - (50 << 20) - piece
