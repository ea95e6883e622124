"""After ``quiesce`` a process holds nothing of a transfer: no child, thread, socket, pipe, lock or open file."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from programs import program
from transfers import write_weights

import fastload
from fastload.engine import Engine
from fastload.errors import FastloadError
from fastload.plugins import manager
from fastload.pools import Pools
from fastload.settings import Settings
from fastload.testing import Fault, Hub
from fastload.types import Request

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")

#: Looks at the process from the inside, before and after. Nothing may wait for the collector.
LOOK = """
import gc, json, os, sys, fastload
from pathlib import Path
gc.disable()

def look():
    me = Path('/proc/self')
    threads = {(t / 'comm').read_text().strip() for t in me.glob('task/*')}
    names = [t.name for t in __import__('threading').enumerate()]
    links = []
    for fd in os.listdir(me / 'fd'):
        try:
            links.append(os.readlink(me / 'fd' / fd))
        except OSError:  # the listing's own
            pass
    inodes = {l.split()[1] for l in Path('/proc/locks').read_text().splitlines()
              if len(l.split()) > 4 and l.split()[4] == str(os.getpid())}
    children = ' '.join((t / 'children').read_text() for t in me.glob('task/*')).split()
    return {'names': sorted(names), 'links': sorted(l for l in links if l != '/dev/null'), 'locks': sorted(inodes),
            'children': children}
"""


def run(code: str, *arguments: str, **environ: str) -> Any:
    with program(LOOK + code, *arguments, environ=environ) as process:
        out, err = process.communicate()
    assert process.returncode == 0, err
    return json.loads(out.splitlines()[-1])


@pytest.fixture
def hub(make_hub: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    weights = write_weights(tmp_path / "model.safetensors")
    hub: Hub = make_hub({"org/m": {"config.json": b"{}", "model.safetensors": weights.read_bytes()}})
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    return hub


@pytest.mark.parametrize("process", ["", "0", "1"])
@pytest.mark.parametrize(
    "work",
    [
        "kept = fastload.load_tensors('org/m')",
        "kept = fastload.prefetch('org/m')",
        "kept = fastload.start('org/m')",
        "fastload.start('org/m'); kept = fastload.load_tensors('org/m')",
        "import asyncio; kept = asyncio.run(fastload.aload_tensors('org/m'))",
        "kept = [fastload.load_tensors('org/m') for _ in range(3)]",
    ],
)
def test_nothing_is_left_at_work(work: str, process: str, hub: Hub):
    code = f"""
import torch, asyncio
asyncio.run(asyncio.sleep(0))
before = look()
{work}
fastload.quiesce()
with_it = look()
del kept
print(json.dumps([before, with_it, look()]))
"""
    before, with_it, after = run(code, FASTLOAD_PROCESS=process)
    assert after == before
    # Tensors lie on a mapping, and Python's mmap keeps the mapped file open.
    with_it["links"] = [link for link in with_it["links"] if "/blobs/" not in link]
    assert with_it == before


def test_a_transfer_that_does_not_end_is_named(hub: Hub):
    hub.script(Fault("hold", path="model.safetensors"))
    running = fastload.start("org/m", settings={"stall_s": 60})
    try:
        with pytest.raises(FastloadError, match=r"1 transfers are still under way after 0.1 s: org/m"):
            fastload.quiesce(timeout_s=0.1)
    finally:
        running.cancel()
    fastload.quiesce()


def test_with_nothing_at_work_it_returns_at_once():
    fastload.quiesce()
    fastload.quiesce(timeout_s=0)


def test_a_transfer_under_way_is_waited_for(hub: Hub):
    running = fastload.start("org/m")
    fastload.quiesce()
    assert running.done
    before = len(hub.requests)
    assert fastload.load_tensors("org/m")  # and can be joined as before
    assert len(hub.requests) == before


def test_after_a_fork_the_parents_transfers_are_not_waited_for(hub: Hub):
    hub.script(Fault("hold", path="model.safetensors"))
    code = """
running = fastload.start('org/m')
pid = os.fork()
if pid == 0:
    fastload.quiesce(timeout_s=0)
    os._exit(0)
status = os.waitpid(pid, 0)[1]
running.cancel()
fastload.quiesce()
print(json.dumps(status))
"""
    assert run(code, FASTLOAD_STALL_S="60") == 0


async def test_a_transfer_that_is_cancelled_as_it_finishes_closes_its_files(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Not the collector does: whoever turned it off would keep a journal open for each model."""
    settings = Settings.resolve(cache_dir=tmp_path / "cache", endpoint=hub.endpoint)
    engine_pm = await asyncio.to_thread(manager, settings)
    busy = threading.Event()
    kinds: list[str] = []

    def emit(message: dict[str, Any]) -> None:
        kinds.append(message["kind"])
        if message["kind"] == "finished":
            for _ in range(4):  # no thread is free when the files are to be closed
                pools[0]._disk.submit(busy.wait)
            task.cancel()
            asyncio.get_running_loop().call_later(0.05, busy.set)

    pools: list[Pools] = []
    made = Pools.__init__

    def make(self: Pools) -> None:
        made(self)
        pools.append(self)

    monkeypatch.setattr(Pools, "__init__", make)
    gc.disable()
    try:
        task = asyncio.create_task(Engine(settings, emit, engine_pm).run(Request("org/m")))
        await asyncio.wait({task})
        descriptors = [Path(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")]
        links = [str(fd.readlink()) for fd in descriptors if fd.is_symlink()]  # the listing's own is gone
    finally:
        gc.enable()
    assert task.cancelled() and kinds[-1] == "finished"
    assert [link for link in links if str(tmp_path / "cache") in link] == []
