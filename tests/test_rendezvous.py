"""A program that ``fastload exec`` began joins the transfer that was begun for it, and is none the worse where it cannot."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from transfers import write_weights

import fastload
from fastload import rendezvous, running
from fastload.asking import Asked, ask
from fastload.engine import Engine
from fastload.errors import FastloadError
from fastload.rendezvous import Feed, Host, Joined
from fastload.testing import Fault, Hub
from fastload.transfer import Transfer

SOURCE = "org/m"


@pytest.fixture
def hub(make_hub: Callable[..., Hub], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    weights = write_weights(tmp_path / "model.safetensors")
    hub = make_hub({SOURCE: {"config.json": b"{}", "model.safetensors": weights.read_bytes()}})
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    return hub


@pytest.fixture(autouse=True)
def nothing_asked_for() -> None:
    running._called.clear()


@asynccontextmanager
async def hosting(monkeypatch: pytest.MonkeyPatch, *sources: str) -> AsyncIterator[Host]:
    """A host that this process is told of."""
    listener, name = rendezvous.listen()
    monkeypatch.setenv(rendezvous.VARIABLE, name)
    async with asyncio.TaskGroup() as group:
        host = Host(listener, sources or (SOURCE,))
        host.begins((sources or (SOURCE,))[0])
        serving = group.create_task(host.serve())
        yield host
        serving.cancel()


async def deliver(asked: Asked, feed: Feed) -> None:
    await Engine(asked.settings, feed.tell, asked.pm).run(asked.request)


async def test_a_load_hears_everything_and_neither_asks_nor_fetches(hub: Hub, monkeypatch: pytest.MonkeyPatch):
    hub.script(Fault("hold", path="*.safetensors", times=None))
    async with hosting(monkeypatch) as host, asyncio.TaskGroup() as group:
        asked = await asyncio.to_thread(ask, SOURCE)
        feed = Feed(asked)
        host.feed(SOURCE, feed)
        group.create_task(deliver(asked, feed))
        seen: list[fastload.Event] = []
        planned = threading.Event()

        def observe(event: fastload.Event) -> None:
            seen.append(event)
            if event.name == "file.planned":
                planned.set()

        load = group.create_task(asyncio.to_thread(fastload.load_tensors, SOURCE, observers=[observe]))
        await asyncio.to_thread(planned.wait)  # it reads along while the bytes are held
        hub.script()
        hub.release()
        tensors = await load
        await host.heard.wait()
    assert tensors
    assert {"transfer.started", "resolve.finished", "range.landed", "transfer.finished"} <= {e.name for e in seen}
    assert sum(r.path.startswith("/api/") for r in hub.requests) == 1
    assert not [t.name for t in threading.enumerate() if t.name == "fastload-child"]


async def test_what_has_ended_is_told_to_whoever_comes_later(hub: Hub, monkeypatch: pytest.MonkeyPatch):
    async with hosting(monkeypatch) as host:
        asked = await asyncio.to_thread(ask, SOURCE)
        feed = Feed(asked)
        host.feed(SOURCE, feed)
        await deliver(asked, feed)
        hub.clear()
        tensors = await fastload.aload_tensors(SOURCE)
    assert tensors
    assert not hub.requests


async def test_a_load_does_not_wait_for_a_transfer_that_waits_for_its_turn(hub: Hub, monkeypatch: pytest.MonkeyPatch):
    async with hosting(monkeypatch, "org/first", SOURCE):
        assert await fastload.aload_tensors(SOURCE)


async def test_who_asks_again_asks_the_hub(hub: Hub, monkeypatch: pytest.MonkeyPatch):
    async with hosting(monkeypatch) as host:
        asked = await asyncio.to_thread(ask, SOURCE)
        feed = Feed(asked)
        host.feed(SOURCE, feed)
        await deliver(asked, feed)
        await fastload.aload_tensors(SOURCE)
        hub.clear()
        await fastload.aload_tensors(SOURCE)
    assert [r.path for r in hub.requests if r.path.startswith("/api/")]


@pytest.mark.parametrize("other", [{"revision": "v2"}, {"files": "*.json"}, {"settings": {"token": "hf_other"}}])
async def test_other_arguments_are_not_met(hub: Hub, monkeypatch: pytest.MonkeyPatch, other: dict[str, Any]):
    async with hosting(monkeypatch) as host:
        asked, wanted = await asyncio.to_thread(ask, SOURCE), await asyncio.to_thread(lambda: ask(SOURCE, **other))
        feed = Feed(asked)
        feed.tell({"kind": "finished"})
        host.feed(SOURCE, feed)
        assert await asyncio.to_thread(instead_of, wanted)


async def test_a_transfer_that_failed_is_not_joined(hub: Hub, monkeypatch: pytest.MonkeyPatch):
    async with hosting(monkeypatch) as host:
        asked = await asyncio.to_thread(ask, SOURCE)
        feed = Feed(asked)
        host.feed(SOURCE, feed)
        feed.tell({"kind": "failed", "error": {"type": "FastloadError", "message": "no"}})
        assert await asyncio.to_thread(instead_of, asked)


async def test_what_lies_in_a_temporary_folder_serves_one_program(hub: Hub, monkeypatch: pytest.MonkeyPatch):
    async with hosting(monkeypatch) as host:
        asked = await asyncio.to_thread(ask, SOURCE)
        feed = Feed(asked)
        host.feed(SOURCE, feed)
        feed.tell({"kind": "temporary", "path": "/nowhere/at/all"})
        feed.tell({"kind": "finished"})
        assert not await asyncio.to_thread(instead_of, asked)
        assert await asyncio.to_thread(instead_of, asked)


async def test_a_source_that_is_over_before_it_began_keeps_nobody_waiting(hub: Hub, monkeypatch: pytest.MonkeyPatch):
    async with hosting(monkeypatch, SOURCE, "org/other") as host:
        asked = await asyncio.to_thread(ask, SOURCE)
        call = asyncio.create_task(asyncio.to_thread(instead_of, asked))
        host.over(SOURCE)
        assert await call
        assert not host.heard.is_set()
        host.over("org/other")
        assert host.heard.is_set()


class Instead:
    """Stands in for the child process that goes on."""

    ended = True

    def join(self) -> None: ...

    def stop(self) -> None: ...


def instead_of(asked: Asked) -> bool:
    """Join; tell whether another carrier had to go on."""
    connection = rendezvous.call()
    assert connection is not None
    begun: list[Instead] = []

    def otherwise() -> Instead:
        begun.append(Instead())
        return begun[0]

    transfer = Transfer()
    joined = Joined(asked, transfer, connection, otherwise)
    joined.join()
    assert joined.ended
    assert transfer.finished != bool(begun)
    return bool(begun)


@pytest.mark.parametrize("said", [b"", b'{"kind": "met"}\n', b'{"kind": "met"}\n{"kind": "ev'])
def test_where_the_other_process_dies_another_one_goes_on(hub: Hub, monkeypatch: pytest.MonkeyPatch, said: bytes):
    listener, name = rendezvous.listen()
    listener.setblocking(True)
    monkeypatch.setenv(rendezvous.VARIABLE, name)

    def die() -> None:
        connection, _ = listener.accept()
        with connection:
            connection.recv(65536)
            connection.sendall(said)

    dying = threading.Thread(target=die)
    dying.start()
    with listener:
        tensors = fastload.load_tensors(SOURCE)
        dying.join()
    assert tensors


@pytest.mark.parametrize(
    "said", [b"what?\n", b"[]\n", b'{"kind": "ready", "file": "another"}\n', b'{"kind": "manifest"}\n']
)
def test_where_the_other_process_speaks_otherwise_another_one_goes_on(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, said: bytes
):
    # The program may have another version of us than whoever began the transfer.
    ours, theirs = socket.socketpair()
    with theirs:
        theirs.sendall(b'{"kind": "met"}\n' + said)
        begun: list[Instead] = []
        Joined(ask(SOURCE), Transfer(), ours, lambda: begun.append(Instead())).join()
    assert begun


def test_where_nobody_can_go_on_the_load_fails(hub: Hub):
    def otherwise() -> Any:
        raise RuntimeError("can't start new thread")

    ours, theirs = socket.socketpair()
    theirs.close()
    transfer = Transfer()
    Joined(ask(SOURCE), transfer, ours, otherwise).join()
    with pytest.raises(FastloadError, match="can't start new thread"):
        transfer.check()


def test_a_load_that_is_given_up_leaves_no_thread_and_begins_nothing(hub: Hub, monkeypatch: pytest.MonkeyPatch):
    before = set(threading.enumerate())  # of tests before, whose transfers are being made safe from power cuts
    listener, name = rendezvous.listen()  # nobody will answer
    monkeypatch.setenv(rendezvous.VARIABLE, name)
    with listener:
        transfer = fastload.start(SOURCE)
        transfer.cancel()
        transfer.cancel()
        assert transfer.failed
        with pytest.raises(FastloadError, match="stopped"):
            transfer.wait()
    assert not {t.name for t in set(threading.enumerate()) - before} & {"fastload-joined", "fastload-child"}
    assert not hub.requests


@pytest.mark.parametrize("name", ["fastload-nobody", "x" * 200, ""])
def test_names_that_lead_nowhere_cost_nothing(hub: Hub, monkeypatch: pytest.MonkeyPatch, name: str):
    monkeypatch.setenv(rendezvous.VARIABLE, name)
    assert rendezvous.call() is None
    assert fastload.load_tensors(SOURCE)


def test_another_user_is_not_met_at_either_end(monkeypatch: pytest.MonkeyPatch):
    listener, name = rendezvous.listen()
    monkeypatch.setenv(rendezvous.VARIABLE, name)
    with listener:
        mine = os.geteuid()
        monkeypatch.setattr(rendezvous.os, "geteuid", lambda: mine + 1)
        assert rendezvous.call() is None
        one, other = socket.socketpair()
        with one, other:
            assert not rendezvous._is_ours(one)
            monkeypatch.undo()
            assert rendezvous._is_ours(one)


async def test_a_stranger_that_talks_nonsense_disturbs_nobody(hub: Hub, monkeypatch: pytest.MonkeyPatch):
    async with hosting(monkeypatch) as host:
        for said in (b"\n", b"GET / HTTP/1.1\r\n", b"[]\n", b'{"source": "org/m"}\n', b'{"source": []}\n'):
            reader, writer = await asyncio.open_unix_connection(f"\0{os.environ[rendezvous.VARIABLE]}")
            writer.write(said)
            asked = await asyncio.to_thread(ask, SOURCE)
            host.feed(SOURCE, Feed(asked))
            assert await reader.read() == b""
            writer.close()
