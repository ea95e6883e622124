"""MLServer: load() is awaited in each of its worker processes, and again whenever the model is loaded again."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from serving import MODEL, TOKENS, Server, Stage, free_port, needs, write

pytestmark = [needs("mlserver", "mlserver"), pytest.mark.mlserver, pytest.mark.timeout(300)]

INFER = {"inputs": [{"name": "tokens", "shape": [1, len(TOKENS)], "datatype": "INT64", "data": TOKENS}]}


def serve(stage: Stage, workers: int) -> Server:
    port = free_port()
    write("MLServer", stage.folder)
    environ = {
        **stage.environ, "MLSERVER_HOST": "127.0.0.1", "MLSERVER_HTTP_PORT": str(port),
        "MLSERVER_GRPC_PORT": str(free_port()), "MLSERVER_METRICS_PORT": str(free_port()),
        "MLSERVER_PARALLEL_WORKERS": str(workers),
    }  # fmt: skip
    return Server([str(Path(sys.executable).parent / "mlserver"), "start", "."], stage.folder, environ, port)


def infer(server: Server) -> Any:
    status, answer = server.call("/v2/models/next-token/infer", INFER)
    return answer["outputs"][0]["data"][0] if status == 200 else status


@pytest.mark.parametrize("workers", [0, 2])
def test_the_model_is_there_before_the_first_answer_and_travels_once(stage: Stage, workers: int):
    with serve(stage, workers) as server:
        server.wait("/v2/models/next-token/ready", lambda status, _: status == 200)
        assert len(stage.processes) == max(workers, 1)
        assert infer(server) == stage.good
        assert server.call("/v2/repository/models/next-token/unload", {})[0] == 200
        assert server.call("/v2/repository/models/next-token/load", {})[0] == 200
        assert infer(server) == stage.good
    assert stage.once
    assert stage.platforms == {"MLServer"}


def test_a_failing_hook_shuts_the_server_down(failing: Stage):
    with serve(failing, 0) as server:
        assert server.wait_end() == 0  # MLServer's own way
        assert MODEL in server.log
