"""The journal: what it calls landed is there, whoever looks, and whoever died."""

from __future__ import annotations

import json
import mmap
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastload.errors import CacheError
from fastload.journal import BLOCK_BYTES, HEADER_BYTES, Journal, State
from fastload.types import ByteRange

DIGEST = "sha256:" + "ab" * 32
BLOCK = 4096


def create(path: Path, size: int = 10 * BLOCK + 7, block_bytes: int = BLOCK) -> Journal:
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    return Journal.create(fd, size=size, digest=DIGEST, block_bytes=block_bytes)


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    """Ten blocks and a short one of 7 bytes."""
    made = create(tmp_path / "j")
    yield made
    made.close()


def spans(*pairs: tuple[int, int]) -> list[ByteRange]:
    return [ByteRange(a, b) for a, b in pairs]


@pytest.mark.parametrize(
    ("marked", "holes", "prefix_bytes"),
    [
        ([], [(0, 40967)], 0),
        ([(0, 4096)], [(4096, 40967)], 4096),
        ([(0, 40967)], [], 40967),  # all
        ([(40960, 40967)], [(0, 40960)], 0),  # the short last block
        ([(8192, 12288)], [(0, 8192), (12288, 40967)], 0),  # in the middle
        ([(0, 4096), (8192, 12288)], [(4096, 8192), (12288, 40967)], 4096),
        ([(4096, 8192), (0, 4096)], [(8192, 40967)], 8192),  # backwards
        ([(1, 4096)], [(0, 40967)], 0),  # no whole block: not remembered
        ([(1, 8192)], [(0, 4096), (8192, 40967)], 0),  # only the whole one
        ([(0, 5000)], [(4096, 40967)], 4096),
        ([(36864, 40966)], [(0, 36864), (40960, 40967)], 0),  # one byte short of the end
        ([(0, 4096), (0, 4096)], [(4096, 40967)], 4096),  # twice counts once
    ],
)
def test_holes_are_what_was_not_marked(journal, marked, holes, prefix_bytes):
    for span in spans(*marked):
        journal.mark(span)
    assert journal.missing() == spans(*holes)
    assert journal.prefix_bytes() == prefix_bytes
    assert journal.landed_bytes == 40967 - sum(b - a for a, b in holes)
    for a, b in holes:
        assert not journal.has(ByteRange(a, b))
        assert not journal.has(ByteRange(b - 1, b))


def test_a_span_is_there_only_when_all_its_blocks_are(journal):
    journal.mark(ByteRange(0, 8192))
    assert journal.has(ByteRange(0, 8192))
    assert journal.has(ByteRange(100, 200))
    assert not journal.has(ByteRange(8191, 8193))
    assert journal.has(ByteRange(9000, 9000))  # nothing is always there


@pytest.mark.parametrize("size", [0, 1, 7, BLOCK - 1, BLOCK, BLOCK + 1])
def test_sizes_around_a_block(tmp_path, size):
    journal = create(tmp_path / "j", size)
    assert journal.missing() == ([ByteRange(0, size)] if size else [])
    journal.mark(ByteRange(0, size))
    assert (journal.missing(), journal.prefix_bytes(), journal.landed_bytes) == ([], size, size)
    journal.close()


def test_another_process_sees_what_was_marked(tmp_path, journal):
    other = Journal.open(tmp_path / "j")
    journal.mark(ByteRange(0, BLOCK))
    journal.set_head(b"01234567")
    journal.hashed_bytes = 100
    assert (other.size, other.block_bytes, other.digest) == (journal.size, BLOCK, DIGEST)
    assert other.has(ByteRange(0, BLOCK))
    assert (other.head, other.hashed_bytes, other.landed_bytes) == (b"01234567", 100, BLOCK)
    other.close()


def test_the_end_is_seen_after_the_journal_file_is_gone(tmp_path, journal):
    other = Journal.open(tmp_path / "j")
    (tmp_path / "j").unlink()
    journal.finish(State.VERIFIED)
    assert other.state is State.VERIFIED
    assert other.has(ByteRange(0, other.size))  # a verified file has everything, whatever the blocks say
    other.close()


def test_a_failure_tells_its_error_and_the_next_owner_forgets_it(journal):
    journal.finish(State.FAILED, json.dumps({"type": "IntegrityError", "message": "long " * 20}).encode())
    assert json.loads(journal.error)["type"] == "IntegrityError"
    journal.finish(State.FAILED, b"{}")
    assert journal.error == b"{}"  # nothing of the longer one is left
    journal.own()
    assert (journal.state, journal.error, journal.owner_pid) == (State.PARTIAL, b"", os.getpid())


def test_starting_over_forgets_all_and_is_noticed(tmp_path, journal):
    reader = Journal.open(tmp_path / "j")
    before = reader.generation
    journal.mark(ByteRange(0, 3 * BLOCK))
    journal.set_head(b"badbytes")
    journal.start_over()
    assert reader.generation != before
    assert (reader.landed_bytes, reader.hashed_bytes, reader.head) == (0, 0, None)
    assert reader.missing() == [ByteRange(0, reader.size)]
    reader.close()


def test_whoever_opens_while_the_owner_starts_over_notices_too(tmp_path, journal):
    """A reader that came between the first and the last step may have seen old blocks under the new number."""
    journal.mark(ByteRange(0, BLOCK))
    seen: list[int] = []

    class LetsReaderIn(mmap.mmap):
        def __setitem__(self, key, value):
            if not seen:
                reader = Journal.open(tmp_path / "j")
                assert reader.has(ByteRange(0, BLOCK))
                seen.append(reader.generation)
                reader.close()
            super().__setitem__(key, value)

    journal._map.close()
    journal._map = LetsReaderIn(journal.fileno(), 0)
    journal.start_over()
    assert seen
    assert journal.generation != seen[0]


# -- demands ----------------------------------------------------------------------------------------------------------


def test_demands_reach_the_owner_once_each(tmp_path, journal):
    reader = Journal.open(tmp_path / "j")
    for offset in (8192, 0, 8192):
        reader.demand(offset)
    assert journal.take_demands() == [8192, 0]
    assert journal.take_demands() == []
    reader.close()


def test_a_full_table_of_demands_drops_the_wish(journal):
    for offset in range(100):
        journal.demand(offset)
    assert len(journal.take_demands()) == 32
    journal.demand(5)
    assert journal.take_demands() == [5]


def test_a_waiter_is_released_by_the_mark_and_stopped_by_the_interruption(tmp_path, journal):
    reader = Journal.open(tmp_path / "j")
    released = threading.Event()

    def wait() -> None:
        reader.wait(lambda: reader.has(ByteRange(0, BLOCK)))
        released.set()

    thread = threading.Thread(target=wait)
    thread.start()
    journal.mark(ByteRange(0, BLOCK))
    thread.join(30)
    assert released.is_set()

    def interrupted() -> None:
        raise CacheError("in vain")

    with pytest.raises(CacheError, match="in vain"):
        reader.wait(lambda: False, interrupted=interrupted)
    reader.close()


# -- crashes ----------------------------------------------------------------------------------------------------------

_WRITER = f"""
import os, sys
from fastload.journal import Journal
from fastload.types import ByteRange

data, path, blocks, stop_before_mark = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
fd = os.open(data, os.O_RDWR | os.O_CREAT, 0o600)
os.ftruncate(fd, blocks * {BLOCK})
journal = Journal.create(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), size=blocks * {BLOCK}, digest="", block_bytes={BLOCK})
journal.own()
for block in range(blocks):
    os.pwrite(fd, bytes([block % 255 + 1]) * {BLOCK}, block * {BLOCK})
    if block == stop_before_mark:
        print("written, not marked", flush=True)
        sys.stdin.read()
    journal.mark(ByteRange(block * {BLOCK}, (block + 1) * {BLOCK}))
    print(block, flush=True)
"""


def start_writer(tmp_path: Path, blocks: int, stop_before_mark: int) -> subprocess.Popen[str]:
    words = [
        sys.executable,
        "-c",
        _WRITER,
        str(tmp_path / "data"),
        str(tmp_path / "j"),
        str(blocks),
        str(stop_before_mark),
    ]
    return subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def kill(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL


def test_a_process_killed_between_write_and_mark_loses_that_block_alone(tmp_path):
    writer = start_writer(tmp_path, 8, 3)
    assert writer.stdout is not None
    while writer.stdout.readline() != "written, not marked\n":
        pass
    kill(writer)
    journal = Journal.open(tmp_path / "j")
    assert journal.missing() == [ByteRange(3 * BLOCK, 8 * BLOCK)]
    journal.own()
    assert journal.landed_bytes == 3 * BLOCK
    journal.close()


@pytest.mark.parametrize("lines", [1, 50, 400])
def test_a_process_killed_at_any_moment_marked_only_what_is_written(tmp_path, lines):
    blocks = 100_000
    writer = start_writer(tmp_path, blocks, -1)
    assert writer.stdout is not None
    for _ in range(lines):
        writer.stdout.readline()
    kill(writer)
    journal = Journal.open(tmp_path / "j")
    landed = journal.prefix_bytes() // BLOCK
    assert lines <= landed < blocks
    assert journal.missing() == [ByteRange(landed * BLOCK, blocks * BLOCK)]
    with open(tmp_path / "data", "rb") as file:
        for block in range(landed):
            assert file.read(BLOCK) == bytes([block % 255 + 1]) * BLOCK
    journal.close()


def test_a_count_that_a_killed_process_left_behind_is_put_right_by_the_next_owner(journal):
    journal.mark(ByteRange(0, 2 * BLOCK))
    journal._map[HEADER_BYTES + 2] = 1  # killed in mark(), before the sum
    assert journal.landed_bytes == 2 * BLOCK
    journal.own()
    assert journal.landed_bytes == 3 * BLOCK


# -- damage -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: b"", "empty journal"),
        (lambda data: data[:8], "not a fastload journal"),  # killed while it was made
        (lambda data: bytes(len(data)), "not a fastload journal"),  # killed before the magic
        (lambda data: b"FLJRNL\0\x02" + data[8:], "another version"),
        (lambda data: data[:HEADER_BYTES], "shorter than it says"),
        (lambda data: data[:16] + bytes(8) + data[24:], "shorter than it says"),  # blocks of nothing
        (lambda data: data[:8] + b"\xff" * 8 + data[16:], "shorter than it says"),
    ],
)
def test_a_damaged_journal_is_refused(tmp_path, journal, damage, message):
    path = tmp_path / "damaged"
    path.write_bytes(damage((tmp_path / "j").read_bytes()))
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(CacheError, match=message):
        Journal.open(path)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_missing_journal_is_not_damage(tmp_path):
    with pytest.raises(FileNotFoundError) as e:
        Journal.open(tmp_path / "none")
    assert not isinstance(e.value, CacheError)


def test_a_journal_that_may_not_be_opened_is_an_error_of_ours(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(CacheError, match="cannot be opened"):
        Journal.open(tmp_path / "folder")


def test_close_is_harmless_when_repeated(journal):
    journal.close()
    journal.close()


def test_a_journal_of_a_large_file_is_small(tmp_path):
    journal = create(tmp_path / "j", 64 << 30, BLOCK_BYTES)
    assert (tmp_path / "j").stat().st_size == HEADER_BYTES + (64 << 30) // BLOCK_BYTES
    journal.mark(ByteRange(63 << 30, 64 << 30))
    assert journal.missing() == [ByteRange(0, 63 << 30)]
    journal.close()
