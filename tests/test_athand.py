"""What is in the cache, verified, and known to be the right one needs no process, no loop and no request."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pagecache import evict
from programs import alive, program, until
from transfers import expected_bytes, tensor_bytes, write_weights

import fastload
from fastload import running
from fastload.ahead import ReadAhead
from fastload.errors import NotFoundError, OfflineError
from fastload.events import Event
from fastload.lock import Lock
from fastload.readahead import is_resident
from fastload.testing import Hub


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "served").mkdir()
    write_weights(tmp_path / "served" / "model.safetensors")
    (tmp_path / "served" / "config.json").write_text("{}")
    return tmp_path / "served"


@pytest.fixture
def hub(folder: Path, make_hub: Callable[..., Hub], monkeypatch: pytest.MonkeyPatch) -> Hub:
    hub = make_hub({"org/m": folder})
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    return hub


@pytest.fixture
def snapshot(hub: Hub) -> fastload.Snapshot:
    """The model is in the cache and in memory."""
    snapshot = fastload.prefetch("org/m")
    fastload.load_tensors("org/m")
    fastload.quiesce()
    for path in snapshot.path.rglob("*"):
        if path.is_file():
            path.read_bytes()
    return snapshot


@pytest.fixture
def nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on no engine can be started, neither in a process nor in a thread."""

    def refused(*arguments: Any, **options: Any) -> None:
        raise AssertionError("an engine was started")

    monkeypatch.setattr(running, "Child", refused)
    monkeypatch.setattr(running, "InThread", refused)


def test_a_commit_in_full(snapshot: fastload.Snapshot, folder: Path, hub: Hub, nobody: None):
    asked = len(hub.requests)
    events: list[Event] = []
    tensors = fastload.load_tensors("org/m", revision=snapshot.commit, observers=[events.append])
    assert tensor_bytes(tensors) == expected_bytes(folder / "model.safetensors")
    assert fastload.prefetch("org/m", revision=snapshot.commit).path == snapshot.path
    assert len(hub.requests) == asked
    [resolved] = [e for e in events if e.name == "resolve.finished"]
    assert (resolved.data["commit"], resolved.data["requests"]) == (snapshot.commit, 0)
    assert {e.data["state"] for e in events if e.name == "file.planned"} == {"cached"}


def test_without_network(
    snapshot: fastload.Snapshot, folder: Path, hub: Hub, nobody: None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert tensor_bytes(fastload.load_tensors("org/m")) == expected_bytes(folder / "model.safetensors")
    with fastload.stream("org/m") as weights:
        assert tensor_bytes(weights) == expected_bytes(folder / "model.safetensors")


def test_a_lock(snapshot: fastload.Snapshot, folder: Path, tmp_path: Path, request: pytest.FixtureRequest):
    from fastload.loader import resolve

    Lock().with_manifest(resolve("org/m")).write(tmp_path / "fastload.lock")
    request.getfixturevalue("nobody")
    tensors = fastload.load_tensors("org/m", lock=tmp_path / "fastload.lock")
    assert tensor_bytes(tensors) == expected_bytes(folder / "model.safetensors")


async def test_in_the_callers_loop(
    snapshot: fastload.Snapshot, folder: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("fastload.inloop.engine_class", lambda: pytest.fail("an engine was started"))
    asked = len(hub.requests)
    tensors = await fastload.aload_tensors("org/m", revision=snapshot.commit)
    assert len(tensors) == len(expected_bytes(folder / "model.safetensors"))
    assert len(hub.requests) == asked


def test_start_and_a_load_that_joins(snapshot: fastload.Snapshot, nobody: None):
    started = fastload.start("org/m", revision=snapshot.commit)
    assert started.done
    assert started.wait().path == snapshot.path
    assert fastload.load_tensors("org/m", revision=snapshot.commit)
    fastload.quiesce(timeout_s=0)


def test_a_branch_may_have_moved_and_the_hub_is_asked(snapshot: fastload.Snapshot, hub: Hub):
    asked = len(hub.requests)
    fastload.load_tensors("org/m")
    assert len(hub.requests) == asked + 1


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_file_that_is_missing_is_fetched(name: str, snapshot: fastload.Snapshot, folder: Path, hub: Hub):
    (snapshot.path / name).resolve().unlink()
    (snapshot.path / name).unlink()
    tensors = fastload.load_tensors("org/m", revision=snapshot.commit)
    assert tensor_bytes(tensors) == expected_bytes(folder / "model.safetensors")
    assert any(r.file == name for r in hub.requests[-3:])


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_file_that_was_changed_is_found_out(name: str, snapshot: fastload.Snapshot, folder: Path):
    blob = (snapshot.path / name).resolve()
    content = bytearray(blob.read_bytes())
    content[-1] ^= 1
    blob.write_bytes(content)
    os.utime(blob, ns=(1, 1))
    tensors = fastload.load_tensors("org/m", revision=snapshot.commit)
    assert tensor_bytes(tensors) == expected_bytes(folder / "model.safetensors")
    assert (snapshot.path / name).read_bytes() == (folder / name).read_bytes()


def test_what_cannot_be_had_is_refused_as_always(hub: Hub, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(NotFoundError):
        fastload.load_tensors("org/m", revision="0" * 40)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(OfflineError):
        fastload.load_tensors("org/other")


@pytest.mark.skipif(sys.platform != "linux", reason="looks into the page cache")
@pytest.mark.parametrize("read_ahead", [True, False])
def test_weights_that_are_not_in_memory_are_brought_there_by_a_process_that_does_nothing_else(
    snapshot: fastload.Snapshot, folder: Path, hub: Hub, nobody: None, read_ahead: bool
):
    [weights] = [p.resolve() for p in snapshot.path.rglob("*.safetensors")]
    evict(weights)
    asked = len(hub.requests)
    tensors = fastload.load_tensors("org/m", revision=snapshot.commit, settings={"read_ahead": read_ahead})
    carrier = running._at_work[-1]._carrier
    assert isinstance(carrier, ReadAhead) == read_ahead
    carrier.join()
    if read_ahead:
        assert is_resident(weights)
        assert carrier._process.returncode == 0
    fastload.quiesce()
    assert tensor_bytes(tensors) == expected_bytes(folder / "model.safetensors")
    assert len(hub.requests) == asked


def test_a_process_that_reads_ahead_ends_when_it_is_told_to_and_with_its_program(tmp_path: Path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)  # opening it waits until somebody writes: so does the process
    reading = ReadAhead([pipe])
    assert not reading.ended
    reading.stop()
    assert not reading.ended
    assert reading.rest(60.0)
    code = """
import os, signal, sys
from pathlib import Path
from fastload.ahead import ReadAhead
print(ReadAhead([Path(sys.argv[1])])._process.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    with program(code, str(pipe)) as process:
        pid = int(process.stdout.readline()) if process.stdout is not None else 0
        assert pid
        until(lambda: not alive(pid), "it ends with its program")
