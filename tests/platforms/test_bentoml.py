"""BentoML: on_startup, sync or async, runs on the server's loop in each worker; on_deployment once, before them."""

from __future__ import annotations

import sys
from typing import Any

import pytest
from serving import MODEL, TOKENS, Server, Stage, free_port, needs, until, write

pytestmark = [needs("bentoml", "bentoml"), pytest.mark.bentoml, pytest.mark.timeout(300)]


def serve(stage: Stage, **changes: str) -> Server:
    port = free_port()
    write("BentoML", stage.folder, changes)
    words = ["-m", "bentoml", "serve", "service:NextToken", "--host", "127.0.0.1", "--port", str(port)]
    environ = {"BENTOML_HOME": str(stage.folder / "bentoml"), "BENTOML_DO_NOT_TRACK": "True"}
    return Server([sys.executable, *words], stage.folder, {**stage.environ, **environ}, port)


def ready(status: int, _: Any) -> bool:
    return status == 200


def test_two_workers_are_ready_before_the_first_answer_and_share_one_transfer(stage: Stage):
    with serve(stage) as server:
        server.wait("/readyz", ready)
        # The port is all workers' own: each answers only when its model is there.
        assert server.call("/predict", {"tokens": TOKENS}) == (200, stage.good)
        until(lambda: len(stage.processes) == 3, "the parent, and two workers")
    assert stage.once


def test_a_sync_hook_may_load_though_a_loop_runs_in_its_thread(stage: Stage):
    change = {f'    async def load(self):\n        self.model = await fastload.aload("{MODEL}")':
              f'    def load(self):\n        self.model = fastload.load("{MODEL}")'}  # fmt: skip
    with serve(stage, **change) as server:
        server.wait("/readyz", ready)
        assert server.call("/predict", {"tokens": TOKENS}) == (200, stage.good)
    assert stage.once


def test_a_failing_prefetch_ends_the_server_before_any_worker(failing: Stage):
    with serve(failing) as server:
        assert server.wait_end() != 0
        assert MODEL in server.log


def test_a_failing_hook_is_tried_for_ever_and_never_ready(failing: Stage):
    with serve(failing, **{f'        fastload.prefetch("{MODEL}")': "        pass"}) as server:
        until(lambda: len(failing.processes) > 2, "workers that came again")
        assert not ready(*server.call("/readyz"))
        assert MODEL in server.log
