"""Nothing is lost: whoever is killed, whenever, the next process fetches what is missing and nothing else."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from programs import ENVIRON, alive, children, held, journal_of, landed_bytes, program, run, until
from transfers import LARGE, MODEL, RANGE, SMALL

import fastload
from fastload.errors import FastloadError
from fastload.journal import BLOCK_BYTES, Journal, State
from fastload.testing import Fault, Hub
from fastload.types import ByteRange

SIZE = len(MODEL[LARGE])
PREFETCH = "import fastload; print(fastload.prefetch('org/m').path)"
START = "import fastload; fastload.start('org/m').wait()"
ASYNC = "import asyncio, fastload; asyncio.run(fastload.aprefetch('org/m'))"


@pytest.fixture
def hub(make_hub: Callable[..., Hub], monkeypatch: pytest.MonkeyPatch) -> Hub:
    """A hub with a file of 17 ranges, which programs know from their environment."""
    made = make_hub({"org/m": MODEL})
    for name, value in {**ENVIRON, "HF_ENDPOINT": made.endpoint}.items():
        monkeypatch.setenv(name, value)
    return made


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "hf" / "hub"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def hold_at(hub: Hub, offset: int) -> None:
    """From *offset* of the large file on nothing arrives."""
    hub.script(*(Fault("hold", path=LARGE, offset=o) for o in range(offset, SIZE, RANGE)))


def finish(hub: Hub, cache: Path) -> None:
    """Fetch the rest in this process; check that it was the rest, and all is right."""
    hub.script()
    missing = SIZE - landed_bytes(cache)
    hub.clear()
    assert contents(fastload.prefetch("org/m").path) == MODEL
    assert hub.bytes_sent(LARGE) == missing
    assert journal_of(cache) is None
    assert not list(cache.glob("models--*/blobs/*incomplete*"))


# -- kill -9 ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("landed", [0, 1, 9, 16])
@pytest.mark.parametrize("code", [PREFETCH, START, ASYNC], ids=["prefetch", "start", "aprefetch"])
def test_a_killed_program_loses_no_landed_range(code: str, landed: int, hub: Hub, cache: Path):
    hold_at(hub, landed * RANGE + 100)
    with program(code) as process:
        held(hub)
        until(lambda: landed_bytes(cache) >= landed * RANGE)
        transfer = children(process.pid)
        process.kill()
        process.wait()
        until(lambda: not any(map(alive, transfer)), "the transfer process outlives its program")
    assert landed_bytes(cache) == landed * RANGE
    finish(hub, cache)


@pytest.mark.parametrize("landed", [0, 7])
def test_a_killed_transfer_process_is_an_error_and_loses_no_landed_range(landed: int, hub: Hub, cache: Path):
    hold_at(hub, landed * RANGE + 100)
    before = set(children(os.getpid()))  # servers that outlive single tests
    running = fastload.start("org/m")
    held(hub)
    until(lambda: landed_bytes(cache) >= landed * RANGE)
    (pid,) = set(children(os.getpid())) - before
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(FastloadError, match=r"ended with status -9.*\n.*landed is kept"):
        running.wait()
    running.cancel()
    assert set(children(os.getpid())) == before
    finish(hub, cache)


def test_a_program_killed_while_it_asks_for_metadata_leaves_nothing_behind(hub: Hub, cache: Path):
    hub.script(Fault("hang", path="/api/*"))
    with program(START) as process:
        held(hub)
        transfer = children(process.pid)
        process.kill()
        process.wait()
        until(lambda: not any(map(alive, transfer)))
    finish(hub, cache)


def test_a_program_that_was_killed_again_and_again_gets_there_all_the_same(hub: Hub, cache: Path):
    for landed in range(2, 17, 5):
        hold_at(hub, landed * RANGE + 1)
        with program(PREFETCH):
            until(lambda landed=landed: landed_bytes(cache) >= landed * RANGE)
    hub.script()
    assert contents(Path(run(PREFETCH).strip())) == MODEL
    assert hub.bytes_sent(LARGE) <= SIZE + 3 * 2 * RANGE  # what was in flight at each death


def test_sigterm_keeps_whole_blocks_of_a_range_in_flight(hub: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FASTLOAD_RANGE_BYTES", str(8 * RANGE))
    hub.script(Fault("hold", path=LARGE, offset=3 * RANGE + 500))
    with program(START) as process:
        held(hub)
        (transfer,) = children(process.pid)
        until(lambda: any(r.held and r.bytes_sent == 3 * RANGE + 500 for r in hub.requests))
        os.kill(transfer, signal.SIGTERM)
        process.wait()
    until(lambda: landed_bytes(cache) in (2 * RANGE, 3 * RANGE))  # the last bytes may not have been read yet
    finish(hub, cache)


# -- what is found on the disk ---------------------------------------------------------------------------------------


@pytest.fixture
def half(hub: Hub, cache: Path) -> Path:
    """The journal of a file of which nine ranges landed before its process was killed."""
    hold_at(hub, 9 * RANGE)
    with program(PREFETCH):
        until(lambda: landed_bytes(cache) >= 9 * RANGE)
    hub.script()
    hub.clear()
    found = journal_of(cache)
    assert found is not None
    return found


def partial_of(journal: Path) -> Path:
    return journal.with_name(journal.name.replace(".journal", ".incomplete"))


def rewrite(journal: Path, at: int, data: bytes) -> None:
    with open(journal, "r+b") as f:
        f.seek(at)
        f.write(data)


def other_size(journal: Path) -> None:
    fd = os.open(journal, os.O_RDWR)
    Journal.create(fd, size=SIZE - RANGE, digest="").close()


def other_digest(journal: Path) -> None:
    fd = os.open(journal, os.O_RDWR)
    made = Journal.create(fd, size=SIZE, digest="sha256:" + "0" * 64)
    made.mark(ByteRange(0, SIZE))
    made.close()


def other_blocks(journal: Path) -> None:
    fd = os.open(journal, os.O_RDWR)
    made = Journal.create(fd, size=SIZE, digest="", block_bytes=2 * BLOCK_BYTES)
    made.mark(ByteRange(0, SIZE))
    made.close()


DAMAGES: dict[str, Callable[[Path], object]] = {
    "empty": lambda j: os.truncate(j, 0),
    "cut within the header": lambda j: os.truncate(j, 100),
    "cut within the blocks": lambda j: os.truncate(j, 4096 + 3),
    "another magic": lambda j: rewrite(j, 0, b"NOT OURS"),
    "blocks of no bytes": lambda j: rewrite(j, 16, bytes(8)),
    "an absurd size": lambda j: rewrite(j, 8, b"\xff" * 8),
    "of another size": other_size,
    "of another file": other_digest,
    "of other blocks": other_blocks,
    "gone": lambda j: j.unlink(),
    "a partial file that is gone": lambda j: partial_of(j).unlink(),
    "a partial file that is cut": lambda j: os.truncate(partial_of(j), 5),
    "a partial file that is longer": lambda j: os.truncate(partial_of(j), SIZE + 1),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_journal_that_cannot_be_trusted_starts_the_file_over(name: str, half: Path, hub: Hub, cache: Path):
    DAMAGES[name](half)
    assert contents(fastload.prefetch("org/m").path) == MODEL
    assert hub.bytes_sent(LARGE) == SIZE
    assert journal_of(cache) is None


def test_landed_bytes_that_a_power_cut_took_are_found_out(half: Path, hub: Hub, cache: Path):
    rewrite(partial_of(half), 5 * RANGE, bytes(4096))  # landed, says the journal
    assert contents(fastload.prefetch("org/m").path) == MODEL
    assert hub.bytes_sent(LARGE) == SIZE - 9 * RANGE + SIZE


def test_a_state_of_failure_does_not_outlive_its_process(half: Path, hub: Hub, cache: Path):
    journal = Journal.open(half)
    journal.finish(State.FAILED, b"{}")
    journal.close()
    finish(hub, cache)


# -- between two steps of publishing ---------------------------------------------------------------------------------


def landed_wholly(cache: Path, *, head: bool) -> Path:
    """Put a finished file back to before it got its name; return where that was."""
    blob = next(p for p in cache.glob("models--*/blobs/*") if p.stat().st_size == SIZE)
    partial = blob.with_name(blob.name + ".fastload.incomplete")
    fd = os.open(blob.with_name(blob.name + ".fastload.journal"), os.O_RDWR | os.O_CREAT)
    journal = Journal.create(fd, size=SIZE, digest=f"sha256:{blob.name}")
    journal.mark(ByteRange(0, SIZE))
    journal.set_head(MODEL[LARGE][:8])
    journal.close()
    os.rename(blob, partial)
    if not head:
        rewrite(partial, 0, bytes(8))
    shutil.rmtree(next(cache.glob("models--*/.fastload")))
    return blob


@pytest.mark.parametrize("step", ["all landed", "head in place", "named", "linked", "journal done"])
def test_death_between_two_steps_of_publishing_costs_no_byte(step: str, hub: Hub, cache: Path):
    snapshot = fastload.prefetch("org/m").path
    blob = landed_wholly(cache, head=step != "all landed")
    pointer = snapshot / LARGE
    if step in ("named", "linked", "journal done"):
        os.rename(blob.with_name(blob.name + ".fastload.incomplete"), blob)
    if step not in ("linked", "journal done"):
        pointer.unlink()
    if step == "journal done":
        path = journal_of(cache)
        assert path is not None
        journal = Journal.open(path)
        journal.finish(State.VERIFIED)
        journal.close()
    hub.clear()
    assert contents(fastload.prefetch("org/m").path) == MODEL
    assert hub.bytes_sent(LARGE) == 0
    assert journal_of(cache) is None
    assert pointer.resolve() == blob.resolve()


def test_what_was_put_under_a_final_name_by_others_is_hashed_before_it_is_used(hub: Hub, cache: Path):
    snapshot = fastload.prefetch("org/m").path
    rewrite(snapshot / LARGE, 70_000, b"wrong")  # the time of change tells
    hub.clear()
    assert contents(fastload.prefetch("org/m").path) == MODEL
    assert hub.bytes_sent() == SIZE


@pytest.mark.parametrize("name", [SMALL, LARGE])
def test_a_complete_cache_costs_one_request(name: str, hub: Hub, cache: Path):
    fastload.prefetch("org/m")
    hub.clear()
    fastload.prefetch("org/m")
    assert len(hub.requests) == 1
