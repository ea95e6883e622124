"""Mystic: on_startup pipes run in a worker thread while the server is up already; sync alone."""

from __future__ import annotations

import sys
from typing import Any

import pytest
from serving import TOKENS, Server, Stage, free_port, needs, write

pytestmark = [needs("pipeline-ai", "mystic"), pytest.mark.mystic, pytest.mark.timeout(300)]

RUN = {"inputs": [{"type": "array", "value": TOKENS}], "async_run": False, "run_id": "run-1"}


def serve(stage: Stage, *options: str, **changes: str) -> Server:
    """As the image does: its command, and the variables of its Dockerfile."""
    port = free_port()
    write("Mystic", stage.folder, changes)
    command = ["uvicorn", "pipeline.container.startup:create_app", "--factory", "--host", "127.0.0.1", "--port"]
    environ = {"PIPELINE_PATH": "pipe:graph", "PIPELINE_NAME": "user/name", "PIPELINE_IMAGE": "user/name:v1"}
    words = [sys.executable, "-m", *command, str(port), *options]
    return Server(words, stage.folder, {**stage.environ, **environ}, port)


def settled(status: int, state: Any) -> bool:
    return status in (200, 500)


def test_two_workers_have_the_model_before_the_first_answer_and_share_one_transfer(stage: Stage):
    with serve(stage, "--workers", "2") as server:
        server.wait("/v4/container/state", lambda status, _: status == 200 and len(stage.processes) == 2)
        status, run = server.call("/v4/runs", RUN)
        assert (status, run["error"]) == (200, None)
        assert run["outputs"][0]["value"] == stage.good
    assert stage.once
    assert stage.platforms == {"Mystic"}


def test_a_failing_hook_is_the_state_and_the_error_of_every_run(failing: Stage):
    with serve(failing) as server:
        status, state = server.wait("/v4/container/state", settled)
        assert (status, state["state"]) == (500, "startup_failed")
        assert "org/model" in state["message"]
        status, run = server.call("/v4/runs", RUN)
        assert (status, run["error"]["type"]) == (200, "startup_error")


def test_an_async_hook_is_never_awaited_and_the_warning_says_so(stage: Stage):
    with serve(stage, **{"    def load(": "    async def load("}) as server:
        assert server.wait("/v4/container/state", settled)[0] == 200
        server.wait_log("Model.load() was called and what it returned was dropped without `await`")
        assert "Mystic calls startup functions without awaiting it" in server.log
        assert server.call("/v4/runs", RUN)[1]["error"] is not None
    assert stage.loads == []
