"""Truss (Baseten): load() runs in a plain thread, is tried twice, and is never awaited."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
from serving import TOKENS, Server, Stage, free_port, needs, snippets, write

pytestmark = [needs("truss", "truss"), pytest.mark.truss, pytest.mark.timeout(300)]

#: Truss renders what its image is built from, and this puts it where the Dockerfile would.
RENDER = """
import shutil, sys
from pathlib import Path
import truss.templates
from truss.truss_handle.build import load

context, app = Path(sys.argv[2]), Path(sys.argv[3])
load(Path(sys.argv[1])).build_docker_build_context(context)
shutil.copytree(context / "server", app)
shutil.copytree(context / "model", app / "model")
shutil.copy(context / "config.yaml", app)
templates = Path(truss.templates.__file__).parent
for source in (templates / "shared", templates / "server" / "_truss_common"):
    name = "_truss_shared" if source.name == "shared" else source.name
    shutil.copytree(source, app / name, dirs_exist_ok=True)
"""
#: main.py of the image, on loopback alone: the server itself says 0.0.0.0.
MAIN = """
import os, sys
import uvicorn

class Config(uvicorn.Config):
    def __init__(self, *args, **options):
        super().__init__(*args, **{**options, "host": "127.0.0.1"})

uvicorn.Config = Config
sys.path.insert(0, os.getcwd())
from truss_server import TrussServer
TrussServer(int(os.environ["INFERENCE_SERVER_PORT"]), "config.yaml").start()
"""
READY = "/v1/models/model"


@pytest.fixture(scope="session")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What Truss makes of the snippet: ``context`` (with its Dockerfile) and ``app``; model.py is replaced by each test."""
    folder = tmp_path_factory.mktemp("truss")
    write("Truss", folder / "truss")
    render(folder)
    return folder


def render(folder: Path) -> None:
    home = {**os.environ, "HOME": str(folder)}
    done = subprocess.run(
        [sys.executable, "-c", RENDER, folder / "truss", folder / "context", folder / "app"],
        env=home, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def variables(dockerfile: Path) -> dict[str, str]:
    """Return what the image sets, but for what it makes of the base image's own values."""
    words = [shlex.split(line)[1] for line in dockerfile.read_text().splitlines() if line.startswith("ENV ")]
    pairs = dict(word.split("=", 1) for word in words if "=" in word)
    return {name: value for name, value in pairs.items() if "$" not in value}


def serve(stage: Stage, rendered: Path, **changes: str) -> Server:
    port = free_port()
    app = stage.folder / f"app-{port}"
    shutil.copytree(rendered / "app", app)
    write("Truss", app, changes, suffix=".py")  # Truss has made its own config.yaml of the other file
    environ = {**variables(rendered / "context" / "Dockerfile"), **stage.environ, "INFERENCE_SERVER_PORT": str(port)}
    return Server([sys.executable, "-c", MAIN], app, environ, port)


def test_two_replicas_have_the_model_before_the_first_answer_and_share_one_transfer(stage: Stage, rendered: Path):
    with ExitStack() as stack:
        servers = [stack.enter_context(serve(stage, rendered)) for _ in range(2)]
        for server in servers:
            server.wait(READY, lambda status, _: status == 200)
            assert server.call(f"{READY}:predict", {"tokens": TOKENS}) == (200, {"next": stage.good})
    assert len(stage.processes) == 2
    assert stage.once
    assert stage.platforms == {"Truss"}


def test_a_failing_hook_is_tried_twice_and_ends_the_server(failing: Stage, rendered: Path):
    with serve(failing, rendered) as server:
        server.wait_end()
        assert "Exception while loading model" in server.log
        assert "org/model" in server.log
    assert len(failing.loads) == 3  # the start, and two loads


def test_an_async_hook_is_never_awaited_and_the_warning_says_so(stage: Stage, rendered: Path):
    with serve(stage, rendered, **{"    def load(": "    async def load("}) as server:
        server.wait(f"{READY}/loaded", lambda status, _: status == 200)
        server.wait_log("Model.load() was called and what it returned was dropped without `await`")
        assert "Truss calls load() without awaiting it" in server.log
        assert server.call(READY)[0] == 503  # is_healthy of the snippet


def test_build_commands_come_behind_the_data_and_without_the_deployments_variables(tmp_path: Path):
    """What docs/build-step.md says of them."""
    write("Truss", tmp_path / "truss")
    config = snippets("build-step.md", "Truss")["config.yaml"]
    (tmp_path / "truss" / "config.yaml").write_text(config)
    (tmp_path / "truss" / "data").mkdir()
    (tmp_path / "truss" / "data" / "fastload.lock").write_text("{}")
    render(tmp_path)
    lines = (tmp_path / "context" / "Dockerfile").read_text().splitlines()
    [copied] = [n for n, line in enumerate(lines) if line.startswith("COPY") and line.endswith(" ${APP_HOME}/data")]
    [prefetched] = [n for n, line in enumerate(lines) if line.startswith("RUN") and "fastload prefetch" in line]
    assert lines[prefetched].removeprefix("RUN").strip() in config
    assert "WORKDIR $APP_HOME" in lines[:copied] and copied < prefetched
    assert "HF_HOME" not in variables(tmp_path / "context" / "Dockerfile")
