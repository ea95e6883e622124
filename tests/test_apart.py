"""A transfer gets a child where the program's own work would hold it up, and a thread where a child would be waited for."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pytest
import safetensors  # noqa: F401
from programs import ENVIRON, children, landed_bytes, program, run, until
from transfers import LARGE, expected_bytes, tensor_bytes, write_weights

import fastload
import fastload.loading  # both as after a first load: until then there is a child
from fastload.apart import better_apart
from fastload.cache import RepoCache
from fastload.settings import Settings
from fastload.testing import Fault, Hub

UNSET = Settings()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "model"
    made.mkdir()
    write_weights(made / LARGE)
    (made / "config.json").write_text("{}")
    return made


@pytest.fixture
def hub(folder: Path, make_hub: Callable[..., Hub], monkeypatch: pytest.MonkeyPatch) -> Hub:
    made = make_hub({"org/m": folder})
    for name, value in {**ENVIRON, "HF_ENDPOINT": made.endpoint}.items():
        monkeypatch.setenv(name, value)
    return made


@pytest.fixture
def at_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever else this machine does: to a program that waits for a core, others seem to compute."""
    monkeypatch.setattr("fastload.apart._others_compute", lambda: False)


#: As the fixture.
AT_REST = "import fastload.apart; fastload.apart._others_compute = lambda: False"


@contextmanager
def computing() -> Iterator[None]:
    """Keep the GIL busy in another thread, as imports do."""
    over = Event()

    def compute() -> None:
        while not over.is_set():
            sum(range(10_000))

    thread = Thread(target=compute)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


#: Where the engine of the first load ran, seen from the program.
WHERE = """
import json, os, sys
import fastload
def where(call):
    pids = []
    call(observers=[lambda e: pids.append(e.data["pid"]) if e.name == "transfer.started" else None])
    return ["here" if pid == os.getpid() else "child" for pid in pids]
def tensors(**options):
    return fastload.load_tensors("org/m", **options)
def stream(**options):
    with fastload.stream("org/m", **options) as weights:
        dict(weights)
def begun(**options):
    fastload.start("org/m", **options).wait()
"""


@pytest.mark.parametrize(
    ("first", "call", "process", "expected"),
    [
        ("", "tensors", "", "child"),  # it imports torch while the bytes arrive
        ("import torch", "tensors", "", "child"),  # and much of ours, the first time
        ("import torch, safetensors, fastload.loading", "tensors", "", "here"),
        ("import torch, safetensors, fastload.loading", "stream", "", "here"),
        # Who starts early has imports before him.
        ("import torch, safetensors, fastload.loading", "begun", "", "child"),
        ("import torch, safetensors, fastload.loading", "tensors", "1", "child"),
        ("", "tensors", "0", "here"),
        ("", "begun", "0", "here"),
    ],
)
def test_the_engine_runs_where_it_is_held_up_least(first: str, call: str, process: str, expected: str, hub: Hub):
    code = f"{first}\n{AT_REST}\n{WHERE}\nprint(json.dumps(where({call})))"
    assert json.loads(run(code, environ={"FASTLOAD_PROCESS": process})) == [expected]


@pytest.mark.parametrize("when", ["", "threading.main_thread().join(); "])
def test_a_load_in_another_thread_outlives_the_end_of_the_main_one(when: str, hub: Hub, folder: Path):
    """At the end of the main thread the interpreter closes all pools of threads, before it waits for other threads."""
    hub.script(*[Fault("hold", path=LARGE, offset=300_000)][: not when])
    code = f"""
import threading, torch, safetensors, fastload.loading
import fastload
def work():
    {when}print(len(fastload.load_tensors("org/m")), flush=True)
threading.Thread(target=work).start()
"""
    with program(code) as process:
        if not when:
            hub.wait(lambda requests: any(r.held for r in requests))
            hub.release()
        out, err = process.communicate(timeout=60)
    assert (out.strip(), err) == (str(len(expected_bytes(folder / LARGE))), "")


def test_a_program_with_a_busy_thread_gets_a_child(hub: Hub):
    pids: list[int] = []
    with computing():
        fastload.load_tensors("org/m", observers=[lambda e: pids.append(e.data["pid"]) if "pid" in e.data else None])
    assert pids and pids[0] != os.getpid()


@pytest.mark.usefixtures("at_rest")
@pytest.mark.parametrize(
    ("framework", "options", "imported", "expected"),
    [
        (None, None, ["torch"], False),
        (None, None, [], True),
        (None, {}, ["torch"], True),
        (None, {}, ["torch", "transformers"], True),  # its classes are imported when they are asked for
        (None, {}, ["torch", "transformers.modeling_utils"], False),
        (None, {}, ["torch", "diffusers.models.modeling_utils"], False),
        ("transformers", {}, ["torch", "diffusers.models.modeling_utils"], True),
        ("transformers", {}, ["torch", "transformers.modeling_utils"], False),
        ("diffusers", {}, ["torch", "diffusers.models.modeling_utils"], False),
        ("somebody's", {}, ["torch", "transformers.modeling_utils"], True),
        ("torch", {"into": object()}, ["torch"], False),
        (None, {"into": object()}, ["torch"], False),
        ("gguf", {}, ["torch"], False),
    ],
)
def test_imports_that_a_load_still_needs_are_beside_a_child(
    framework: str | None, options: dict[str, Any] | None, imported: list[str], expected: bool,
    monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    for name in ("torch", "transformers.modeling_utils", "diffusers.models.modeling_utils"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    for name in imported:
        monkeypatch.setitem(sys.modules, name, sys)
    assert better_apart(UNSET, framework, options) is expected
    assert better_apart(Settings(process=True), framework, options)
    assert not better_apart(Settings(process=False), framework, options)


@pytest.mark.usefixtures("at_rest")
def test_what_a_thread_fetched_is_made_safe_from_a_power_cut(hub: Hub, tmp_path: Path):
    fastload.load_tensors("org/m")
    fastload.quiesce()
    stamps = [json.loads(path.read_text()) for path in tmp_path.rglob(".fastload/verified/*")]
    assert [stamp["synced"] for stamp in stamps] == [True]


@pytest.mark.usefixtures("at_rest")
def test_what_is_gone_before_it_was_made_safe_is_no_news(hub: Hub, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    began, go = Event(), Event()
    real = RepoCache.sync

    def sync(self: RepoCache, path: Path) -> None:
        began.set()
        go.wait()
        real(self, path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RepoCache, "sync", sync)
        fastload.load_tensors("org/m", settings={"cache_dir": tmp_path / "temporary"})
        assert began.wait(30)
        shutil.rmtree(tmp_path / "temporary")
        go.set()
        fastload.quiesce()
    assert not caplog.records


def test_a_system_call_that_does_not_return_does_not_keep_an_interrupted_program(hub: Hub):
    code = """
import os, signal, socket, threading, torch, safetensors, fastload.loading
import fastload, fastload.sync
fastload.sync._PATIENCE_S = 0.2
asked, resolve = threading.Event(), socket.getaddrinfo
def never(*args, **kwargs):
    asked.set()
    threading.Event().wait()
socket.getaddrinfo = never
def interrupt():
    asked.wait()
    signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
threading.Thread(target=interrupt, daemon=True).start()
try:
    fastload.load_tensors("org/m", settings={"endpoint": "http://nowhere.invalid"})
except KeyboardInterrupt:
    print("interrupted", flush=True)
    os._exit(0)
"""
    assert run(code, environ={"FASTLOAD_PROCESS": "0"}).strip() == "interrupted"


def test_a_program_may_end_while_what_it_fetched_is_made_safe(hub: Hub, tmp_path: Path):
    """The disk is slow: the interpreter must not wait for it, nor say anything of it."""
    code = """
import threading, torch, safetensors, fastload.loading
import fastload
from fastload.cache import RepoCache
syncing = threading.Event()
RepoCache.sync = lambda self, path: (syncing.set(), threading.Event().wait())
fastload.load_tensors("org/m")
syncing.wait()
"""
    with program(code, environ={"FASTLOAD_PROCESS": "0"}) as process:
        _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (0, "")


def test_an_interrupted_load_leaves_no_thread_and_keeps_what_landed(hub: Hub, folder: Path, tmp_path: Path):
    hub.script(Fault("hold", path=LARGE, offset=300_000))
    code = """
import threading, torch, safetensors, fastload.loading
import fastload
try:
    fastload.load_tensors("org/m")
except KeyboardInterrupt:
    for thread in threading.enumerate()[1:]:
        thread.join(10)  # its work is done, and it is about to end
    print([t.name for t in threading.enumerate()], flush=True)
"""
    with program(code, environ={"FASTLOAD_PROCESS": "0"}) as process:
        hub.wait(lambda requests: any(r.held for r in requests))
        assert not children(process.pid)
        process.send_signal(2)
        out, err = process.communicate(timeout=30)
    assert (out.strip(), err) == ("['MainThread']", "")
    landed = landed_bytes(tmp_path / "hf" / "hub")
    hub.script()
    hub.clear()
    assert tensor_bytes(fastload.load_tensors("org/m")) == expected_bytes(folder / LARGE)
    assert 0 < hub.bytes_sent(LARGE) <= (folder / LARGE).stat().st_size - landed < (folder / LARGE).stat().st_size


@pytest.mark.usefixtures("at_rest")
def test_cached_weights_on_the_disk_alone_are_read_ahead_by_a_process(hub: Hub, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("fastload.sync.is_resident", lambda path: False)
    started: list[list[str]] = []
    monkeypatch.setattr("fastload.sync.ahead", lambda paths, settings: started.append([p.name for p in paths]))
    fastload.load_tensors("org/m")
    fastload.load_tensors("org/m")
    until(lambda: len(started) == 2)
    assert sorted(started) == [[], [LARGE]]  # before the first load, nothing was in the cache


@pytest.mark.usefixtures("at_rest")
def test_quiesce_ends_a_process_that_reads_ahead_for_a_thread(hub: Hub, monkeypatch: pytest.MonkeyPatch):
    fastload.load_tensors("org/m")
    monkeypatch.setattr("fastload.sync.is_resident", lambda path: False)
    before = set(children(os.getpid()))
    fastload.load_tensors("org/m")
    fastload.quiesce()
    assert set(children(os.getpid())) == before
