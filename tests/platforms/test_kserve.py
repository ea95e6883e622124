"""KServe: the program itself loads, before the server has a loop; or start_engine() does, on that loop."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from typing import Any

import pytest
from serving import MODEL, TOKENS, Server, Stage, free_port, needs, write

pytestmark = [needs("kserve", "kserve"), pytest.mark.kserve, pytest.mark.timeout(300)]

PREDICT = "/v1/models/next-token:predict"


def serve(stage: Stage, **changes: str) -> Server:
    port = free_port()
    write("KServe", stage.folder, changes)
    words = ["server.py", "--http_port", str(port)]
    environ = {**stage.environ, "INFERENCE_SERVICE_NAME": "next-token"}
    return Server([sys.executable, *words], stage.folder, environ, port)


def ready(status: int, answer: Any) -> bool:
    return status == 200 and answer["ready"]


def test_two_replicas_have_the_model_before_the_first_answer_and_share_one_transfer(stage: Stage):
    """Not two workers: KServe kills a worker process that takes longer than 5 s to import torch."""
    with ExitStack() as stack:
        servers = [stack.enter_context(serve(stage)) for _ in range(2)]
        for server in servers:
            server.wait("/v2/models/next-token/ready", ready)
            assert server.call(PREDICT, {"instances": [TOKENS]}) == (200, {"predictions": [stage.good]})
    assert len(stage.processes) == 2
    assert stage.once
    assert stage.platforms == {"KServe"}


def test_an_async_engine_is_awaited_on_the_servers_loop(stage: Stage):
    changes = {
        f'    def load(self):\n        self.model = fastload.load("{MODEL}")\n':
        "    def __init__(self, name):\n"
        "        super().__init__(name)\n        self.model, self.engine = None, True\n\n"
        "    async def healthy(self):\n        return self.model is not None\n\n"
        f'    async def start_engine(self):\n        self.model = await fastload.aload("{MODEL}")\n',
        "    model.load()\n": "    model.ready = True\n",
    }  # fmt: skip
    with serve(stage, **changes) as server:
        server.wait("/v2/models/next-token/ready", ready)
        assert server.call(PREDICT, {"instances": [TOKENS]}) == (200, {"predictions": [stage.good]})
    assert stage.once


def test_a_failing_hook_ends_the_server(failing: Stage):
    with serve(failing) as server:
        assert server.wait_end() == 1
        assert MODEL in server.log
