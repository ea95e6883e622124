"""Beam: endpoints await on_start on a loop that ends with it, in each worker; task queues never await it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest
from serving import MODEL, TOKENS, Server, Stage, free_port, needs, snippets, transferred_bytes, weights_bytes, write

if TYPE_CHECKING:
    from beam_gateway import Gateway

pytestmark = [needs("beam-client", "beam"), pytest.mark.beam, pytest.mark.timeout(300)]

#: The runner of endpoints, on loopback alone: it says [::] itself.
ENDPOINT = """
import os, runpy, sys
import gunicorn.app.base

class Config(gunicorn.app.base.Config):
    def set(self, name, value):
        super().set(name, [f"127.0.0.1:{os.environ['BIND_PORT']}"] if name == "bind" else value)

gunicorn.app.base.Config = Config
sys.path.insert(0, os.getcwd())
runpy.run_module("beta9.runner.endpoint", run_name="__main__", alter_sys=True)
"""
CALL = {"kwargs": {"tokens": TOKENS}}


@pytest.fixture
def gateway() -> Iterator[Gateway]:
    """What the runners talk to."""
    from beam_gateway import Gateway

    with Gateway() as started:
        yield started


def serve(stage: Stage, gateway: Gateway, kind: str, handler: str, *, workers: int = 1, **changes: str) -> Server:
    write("Beam", stage.folder, changes)
    return start(stage, gateway, kind, handler, workers)


def container(stage: Stage, gateway: Gateway, kind: str, handler: str, workers: int = 1) -> dict[str, str]:
    """Return the variables that Beam's worker sets."""
    return {
        **stage.environ, "CONTAINER_ID": "container-1", "CONTAINER_HOSTNAME": "host", "STUB_ID": "stub-1",
        "STUB_TYPE": f"{kind}/deployment", "BIND_PORT": str(free_port()), "HANDLER": f"app:{handler}", "ON_START": "app:load",
        "PYTHON_VERSION": "python3.11", "KEEP_WARM_SECONDS": "10", "TIMEOUT": "60", "CALLBACK_URL": "", "TASK_ID": "",
        "WORKERS": str(workers), "GUNICORN_NO_WAIT": "true", "BETA9_TOKEN": "none", "BETA9_GATEWAY_HOST": "127.0.0.1",
        "BETA9_GATEWAY_PORT": str(gateway.port),
    }  # fmt: skip


def start(stage: Stage, gateway: Gateway, kind: str, handler: str, workers: int = 1) -> Server:
    """As the worker does: the module of the runner."""
    environ = container(stage, gateway, kind, handler, workers)
    words = ["-c", ENDPOINT] if kind == "endpoint" else ["-m", "beta9.runner.taskqueue"]
    return Server([sys.executable, *words], stage.folder, environ, int(environ["BIND_PORT"]))


def call(server: Server) -> Any:
    return server.call("/", CALL, headers={"X-TASK-ID": "task-1"})


def test_two_workers_are_ready_before_the_first_answer_and_share_one_transfer(stage: Stage, gateway: Gateway):
    with serve(stage, gateway, "endpoint", "predict", workers=2) as server:
        server.wait("/health", lambda status, _: status == 200 and len(stage.processes) == 2)
        assert call(server) == (200, {"next": stage.good})
    assert stage.once
    assert stage.platforms == {"Beam"}


def test_an_async_hook_of_an_endpoint_is_awaited(stage: Stage, gateway: Gateway):
    with serve(stage, gateway, "endpoint", "predict", **{"\ndef load(": "\nasync def load("}) as server:
        server.wait("/health", lambda status, _: status == 200)
        assert call(server) == (200, {"next": stage.good})
    assert stage.once


def test_a_failing_hook_ends_the_container(failing: Stage, gateway: Gateway):
    with serve(failing, gateway, "endpoint", "predict") as server:
        assert server.wait_end() == 1
        assert "org/model" in server.log


def test_a_task_queue_has_the_model_before_the_first_task(stage: Stage, gateway: Gateway):
    gateway.tasks.append({"task_id": "task-1", "args": [], **CALL})
    with serve(stage, gateway, "taskqueue", "job") as server:
        server.wait_log("Task completed")
        assert f'"next": {stage.good}'.encode() in gateway.completed[0]
    assert stage.once


def test_an_async_hook_of_a_task_queue_is_never_awaited_and_the_warning_says_so(stage: Stage, gateway: Gateway):
    gateway.tasks.append({"task_id": "task-1", "args": [], **CALL})
    with serve(stage, gateway, "taskqueue", "job", **{"\ndef load(": "\nasync def load("}) as server:
        server.wait_log("TypeError: 'coroutine' object is not callable")
    # Beam keeps the coroutine as long as the worker lives.
    assert "load() was called and what it returned was dropped without `await`" in server.log
    assert "Beam's task queue calls on_start without awaiting it" in server.log
    assert stage.loads == []


def test_what_on_deploy_has_fetched_needs_no_request(stage: Stage, gateway: Gateway):
    """The recipe of docs/build-step.md: Beam runs the function of ``on_deploy``, and then the endpoint."""
    (stage.folder / "app.py").write_text(snippets("build-step.md", "Beam")["app.py"])
    for words in (["-m", "fastload", "lock", MODEL], ["-c", "import app; app.prefetch.local()"]):
        done = subprocess.run(
            [sys.executable, *words],
            cwd=stage.folder,
            env={**os.environ, **container(stage, gateway, "function", "prefetch")},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
    assert transferred_bytes(stage.hub) == weights_bytes(stage.model)
    stage.hub.clear()
    with start(stage, gateway, "endpoint", "predict") as server:
        server.wait("/health", lambda status, _: status == 200)
        answer = server.call("/", {"kwargs": {}}, headers={"X-TASK-ID": "task-1"})
        assert answer == (200, {"class": "LlamaForCausalLM"})
    assert stage.hub.requests == []
