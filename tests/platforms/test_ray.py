"""Ray Serve: __init__, sync or async, runs on the loop of the replica; a failure fails the deployment."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from serving import MODEL, TOKENS, Stage, free_port, needs, write

pytestmark = [needs("ray", "ray"), pytest.mark.ray, pytest.mark.timeout(400)]

#: One machine's worth of Ray, without its dashboard; asks over HTTP, prints what came.
DRIVER = """
import json, sys, tempfile, urllib.request
import ray
from ray import serve
import app

ray.init(num_cpus=2, include_dashboard=False, _node_ip_address="127.0.0.1", object_store_memory=100 << 20,
         _temp_dir=sys.argv[2])
try:
    serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[1])})
    serve.run(app.app)
    request = urllib.request.Request(f"http://127.0.0.1:{sys.argv[1]}/", sys.argv[3].encode())
    with urllib.request.urlopen(request) as answer:
        print("ANSWER", answer.read().decode())
finally:
    serve.shutdown()
    ray.shutdown()
"""


def run(stage: Stage, tmp_path: Path, **changes: str) -> subprocess.CompletedProcess[str]:
    write("Ray Serve", stage.folder, changes)
    # Paths of sockets have at most 107 bytes: Ray wants a short folder.
    folder = tmp_path.parent / "r"
    words = [sys.executable, "-c", DRIVER, str(free_port()), str(folder), json.dumps({"tokens": TOKENS})]
    environ = {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "RAY_USAGE_STATS_ENABLED": "0", **stage.environ}
    return subprocess.run(words, cwd=stage.folder, env=environ, capture_output=True, text=True, timeout=380)


def answered(done: subprocess.CompletedProcess[str]) -> Any:
    lines = [line for line in done.stdout.splitlines() if line.startswith("ANSWER ")]
    assert lines, done.stdout + done.stderr
    return json.loads(lines[0].removeprefix("ANSWER "))


def test_two_replicas_are_ready_before_the_first_answer_and_share_one_transfer(stage: Stage, tmp_path: Path):
    assert answered(run(stage, tmp_path)) == {"next": stage.good}
    assert len(stage.processes) == 2
    assert stage.once
    assert stage.platforms == {"Ray Serve"}


def test_a_sync_hook_may_load_though_a_loop_runs_in_its_thread(stage: Stage, tmp_path: Path):
    change = {f'    async def __init__(self):\n        self.model = await fastload.aload("{MODEL}")':
              f'    def __init__(self):\n        self.model = fastload.load("{MODEL}")'}  # fmt: skip
    assert answered(run(stage, tmp_path, **change)) == {"next": stage.good}
    assert stage.once


def test_a_failing_hook_fails_the_deployment_with_the_error(failing: Stage, tmp_path: Path):
    done = run(failing, tmp_path)
    assert done.returncode != 0
    assert "NotFoundError" in done.stdout + done.stderr
