"""Cog: setup(), sync or async, runs once in the worker that coglet starts."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from typing import Any

import pytest
from serving import TOKENS, Server, Stage, free_port, needs, write

pytestmark = [needs("cog", "cog"), pytest.mark.cog, pytest.mark.timeout(300)]

INPUT = {"input": {"tokens": ",".join(map(str, TOKENS))}}


def serve(stage: Stage, **changes: str) -> Server:
    """As the image does, which passes what cog.yaml says through this variable."""
    port = free_port()
    write("Cog", stage.folder, changes)
    environ = {**stage.environ, "PORT": str(port), "COG_PREDICT_TYPE_STUB": "run.py:Runner"}
    return Server([sys.executable, "-m", "cog.server.http", "--host", "127.0.0.1"], stage.folder, environ, port)


def settled(status: int, health: Any) -> bool:
    return status == 200 and health["status"] in ("READY", "SETUP_FAILED")


def test_an_async_hook_is_awaited(stage: Stage):
    changes = {"    def setup(": "    async def setup(", "    def run(": "    async def run("}
    with serve(stage, **changes) as server:
        assert server.wait("/health-check", settled)[1]["status"] == "READY"
        assert server.call("/predictions", INPUT)[1]["output"] == stage.good
    assert stage.once


def test_two_containers_have_the_model_before_the_first_answer_and_share_one_transfer(stage: Stage):
    with ExitStack() as stack:
        servers = [stack.enter_context(serve(stage)) for _ in range(2)]
        for server in servers:
            assert server.wait("/health-check", settled)[1]["status"] == "READY"
            status, prediction = server.call("/predictions", INPUT)
            assert (status, prediction["output"]) == (200, stage.good)
    assert len(stage.processes) == 2
    assert stage.once
    assert stage.platforms == {"Cog"}


def test_a_failing_hook_is_setup_failed_with_the_error_in_its_log(failing: Stage):
    with serve(failing) as server:
        health = server.wait("/health-check", settled)[1]
        assert health["status"] == "SETUP_FAILED"
        assert "org/model" in health["setup"]["logs"]
        assert server.call("/predictions", INPUT)[0] == 503
