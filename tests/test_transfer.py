"""A file as its readers see it: what the owner does between two of their steps must not show."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from arrival import Arrival
from programs import until
from transfers import MODEL, QUICK, noise

from fastload import plugins
from fastload.engine import Engine
from fastload.errors import CacheError, FastloadError, IntegrityError
from fastload.journal import Journal
from fastload.settings import Settings
from fastload.testing import Hub
from fastload.types import ByteRange, Request

NAME = "w.safetensors"
DATA = noise(20_000)
ALL = ByteRange(0, len(DATA))


@pytest.fixture
def arrival(tmp_path: Path) -> Iterator[Arrival]:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / NAME).write_bytes(DATA)
    made = Arrival(tmp_path / "model", tmp_path / "cache")
    yield made
    made.close()


def before(monkeypatch: pytest.MonkeyPatch, module: object, name: str, act: Callable[[], object], nth: int = 1) -> None:
    """Let *act* happen just before the *nth* call of a function, as if another process had done it then."""
    real, calls = getattr(module, name), []

    def replaced(*args: object, **kwargs: object) -> object:
        calls.append(args)
        if len(calls) == nth:
            act()
        return real(*args, **kwargs)

    monkeypatch.setattr(module, name, replaced)


def test_a_file_that_is_published_while_its_head_is_read_has_its_head(
    arrival: Arrival, monkeypatch: pytest.MonkeyPatch
):
    arrival.land(NAME)
    view = arrival.transfer.files[NAME]
    real = os.pread

    def pread(fd: int, count: int, at: int) -> bytes:
        data = real(fd, count, at)
        arrival.finish()
        return data

    monkeypatch.setattr(os, "pread", pread)
    assert view.read(ALL) == DATA


@pytest.mark.parametrize("nth", [1, 2])
def test_a_file_that_is_published_while_it_is_opened_is_opened(
    nth: int, arrival: Arrival, monkeypatch: pytest.MonkeyPatch
):
    # Before the journal is opened, and between journal and data.
    def publish() -> None:
        threading.Thread(target=arrival.finish).start()  # its message waits for the view, which is being opened
        until(lambda: not os.path.exists(f"{arrival._blob(NAME)}.journal"))

    before(monkeypatch, os, "open", publish, nth)
    assert arrival.transfer.files[NAME].read(ALL) == DATA


def test_a_damaged_journal_makes_a_reader_wait_for_the_file(arrival: Arrival):
    path = Path(f"{arrival._blob(NAME)}.journal")
    journal = arrival.journals[NAME]
    os.rename(path, f"{path}.kept")
    path.write_bytes(b"damaged")
    found: list[bytes] = []
    reader = threading.Thread(target=lambda: found.append(arrival.transfer.files[NAME].read(ALL)))
    reader.start()
    arrival.finish()
    reader.join(10)
    assert found == [DATA]
    assert journal.has(ALL)


def test_a_journal_that_comes_anew_is_tried_anew(arrival: Arrival):
    path = Path(f"{arrival._blob(NAME)}.journal")
    arrival.land(NAME)
    os.rename(path, f"{path}.kept")
    found: list[bytes] = []
    reader = threading.Thread(target=lambda: found.append(arrival.transfer.files[NAME].read(ALL)))
    reader.start()
    os.rename(f"{path}.kept", path)
    arrival.tell("arriving", file=NAME, data=f"{arrival._blob(NAME)}.partial", journal=str(path))
    reader.join(10)
    assert found == [DATA]


def replace(arrival: Arrival) -> None:
    """Let somebody who does not know the partial file bring the whole one."""
    arrival._publish(NAME, DATA)


def test_a_file_that_somebody_else_brought_is_opened_anew_where_nothing_was_used(arrival: Arrival):
    view = arrival.transfer.files[NAME]
    view.open()
    replace(arrival)
    assert view.read(ALL) == DATA
    assert not view.changed()


@pytest.mark.parametrize("use", ["read", "mapping"])
def test_a_file_that_somebody_else_brought_is_an_error_for_who_used_the_other(use: str, arrival: Arrival):
    view = arrival.transfer.files[NAME]
    arrival.land(NAME, 0, 4096)
    if use == "read":
        view.read(ByteRange(0, 100))
    else:
        view.mapping()
    replace(arrival)
    assert view.changed()
    with pytest.raises(IntegrityError, match="replaced"):
        view.read(ALL)
    with pytest.raises(IntegrityError, match="fetched anew"):
        arrival.transfer.wait_verified()
    view.close()
    assert view.read(ALL) == DATA


def test_a_reader_wishes_for_the_part_that_is_missing(arrival: Arrival):
    arrival.land(NAME, 0, 8192)
    view = arrival.transfer.files[NAME]
    reader = threading.Thread(target=view.wait, args=(ByteRange(5000, 20_000),))
    reader.start()
    while not (wishes := arrival.journals[NAME].take_demands()):
        os.sched_yield()
    assert wishes == [8192]
    arrival.land(NAME, 8192, 12288)
    while not (wishes := [w for w in arrival.journals[NAME].take_demands() if w != 8192]):
        os.sched_yield()
    assert wishes == [12288]
    arrival.land(NAME)
    reader.join(10)
    assert not reader.is_alive()


@pytest.mark.parametrize("count", [1, 8])
def test_every_waiter_ends_with_the_transfer(count: int, arrival: Arrival):
    view, errors = arrival.transfer.files[NAME], []

    def wait(act: Callable[[], object]) -> None:
        try:
            act()
        except FastloadError as e:
            errors.append(e)

    acts: list[Callable[[], object]] = [
        lambda: view.wait(ALL),
        lambda: arrival.transfer.wait_files(),
        lambda: arrival.transfer.wait(lambda: arrival.transfer.finished),
    ]
    threads = [threading.Thread(target=wait, args=(act,)) for act in acts * count]
    for thread in threads:
        thread.start()
    arrival.fail(CacheError("full"))
    for thread in threads:
        thread.join(10)
    assert [type(e) for e in errors] == [CacheError] * 3 * count


def test_a_reader_of_a_closed_view_ends_with_an_error_of_ours(arrival: Arrival):
    view, errors = arrival.transfer.files[NAME], []

    def wait() -> None:
        try:
            view.wait(ALL)
        except FastloadError as e:
            errors.append(str(e))

    reader = threading.Thread(target=wait)
    reader.start()
    journal: Journal = arrival.journals[NAME]
    while not journal.take_demands():
        os.sched_yield()
    arrival.transfer.close()
    reader.join(10)
    assert errors == [f"{NAME} was closed while it was waited for"]


def journals_without_a_name(folder: Path) -> list[str]:
    """Return those of *folder* that this process has open."""
    found = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            found.append(os.readlink(f"/proc/self/fd/{fd}"))
        except FileNotFoundError:  # what listed them
            continue
    return [path for path in found if path.startswith(str(folder)) and path.endswith(".fastload.journal (deleted)")]


def test_a_reader_is_not_the_last_to_close_a_journal_while_files_are_synced(
    tmp_path: Path, make_hub: Callable[..., Hub], monkeypatch: pytest.MonkeyPatch
):
    hub = make_hub({"org/m": MODEL})
    open_then: dict[str, int] = {}
    monkeypatch.setattr(
        "fastload.cache.RepoCache.sync", lambda *_: open_then.update(sync=len(journals_without_a_name(tmp_path)))
    )

    def emit(message: dict[str, object]) -> None:
        if message["kind"] == "finished":  # whoever waits for this closes what it has
            open_then["finished"] = len(journals_without_a_name(tmp_path))

    settings = Settings.resolve({**QUICK, "cache_dir": tmp_path, "endpoint": hub.endpoint, "process": False})
    asyncio.run(Engine(settings, emit, plugins.manager(settings)).run(Request("org/m", everything=True), settle=True))
    # Each is open twice: its descriptor and the mapping's.
    assert open_then == {"finished": 2, "sync": 2}
    assert journals_without_a_name(tmp_path) == []
