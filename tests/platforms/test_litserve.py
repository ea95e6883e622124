"""LitServe: setup() runs once per worker process, sync alone; the port opens before all workers are ready."""

from __future__ import annotations

import sys

import pytest
from serving import TOKENS, Server, Stage, free_port, needs, write

pytestmark = [needs("litserve", "litserve"), pytest.mark.litserve, pytest.mark.timeout(300)]


ONE_WORKER = {"workers_per_device=2": "workers_per_device=1"}


def serve(stage: Stage, **changes: str) -> Server:
    port = free_port()
    write("LitServe", stage.folder, changes)
    return Server([sys.executable, "server.py"], stage.folder, {**stage.environ, "PORT": str(port)}, port)


def test_two_workers_are_ready_before_the_first_answer_and_share_one_transfer(stage: Stage):
    with serve(stage) as server:
        server.wait("/health", lambda status, _: status == 200)
        assert len(stage.processes) == 2
        assert stage.once
        assert server.call("/predict", {"tokens": TOKENS}) == (200, {"next": stage.good})
    assert stage.platforms == {"LitServe"}


def test_a_failing_hook_ends_the_server(failing: Stage):
    with serve(failing, **ONE_WORKER) as server:
        assert server.wait_end() != 0
        assert "org/model" in server.log


def test_an_async_hook_is_never_awaited_and_the_warning_says_so(stage: Stage):
    with serve(stage, **ONE_WORKER, **{"    def setup(": "    async def setup("}) as server:
        server.wait("/health", lambda status, _: status == 200)
        server.wait_log("API.setup() was called and what it returned was dropped without `await`")
        assert "LitServe calls setup() without awaiting it" in server.log
        assert server.call("/predict", {"tokens": TOKENS})[0] == 500
    assert stage.loads == []
