"""Fixtures of the test bed. Enabled by ``pytest_plugins = ["testbed.pytest_plugin"]`` in tests/conftest.py.

A test that asks for nginx gets the marker ``nginx``, one that asks for real weights the marker ``real``. Where nginx or
its njs module is missing such tests are skipped with the reason; with FASTLOAD_REQUIRE_NGINX=1 they fail.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from . import nginx_process
from .models import make
from .nginx_faults import NginxFaults
from .nginx_hub import NginxHub
from .real import PACKAGE, make_minilm

# Read when huggingface_hub is imported: without it every client asks the real hub for a list, once a day.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

_MARKS = {"nginx_hub": pytest.mark.nginx, "nginx_faults": pytest.mark.nginx, "minilm": pytest.mark.real}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark each test by the parts of the test bed that it asks for."""
    for item in items:
        for name in getattr(item, "fixturenames", ()):
            if name in _MARKS:
                item.add_marker(_MARKS[name])


@pytest.fixture(scope="session")
def models_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where made models lie: ``$FASTLOAD_TESTBED/models``, or a folder of this test run."""
    kept = os.environ.get("FASTLOAD_TESTBED")
    return Path(kept).expanduser() / "models" if kept else tmp_path_factory.mktemp("models")


@pytest.fixture(scope="session")
def tiny_llama(models_folder: Path) -> Path:
    """Folder of llama-tiny-bf16: 8 MB in five shards, with tokenizer. Read only."""
    return make("llama-tiny-bf16", models_folder)


@pytest.fixture(scope="session")
def tiny_llama_bin(models_folder: Path) -> Path:
    """Folder of llama-tiny-bin: the same weights in one pytorch_model.bin. Read only."""
    pytest.importorskip("torch")
    return make("llama-tiny-bin", models_folder)


@pytest.fixture(scope="session")
def minilm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the real all-MiniLM-L6-v2, 91 MB. Read only."""
    folder = make_minilm(tmp_path_factory.mktemp("real"))
    if folder is None:
        pytest.skip(f"{PACKAGE} is not installed (pip install --group real)")
    return folder


@pytest.fixture(scope="session")
def nginx_hub(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Iterator[NginxHub]:
    """The hub with ``tb/llama-tiny-bf16`` (two commits), the closed doors and the odd repositories.

    With the package of real weights installed it has ``tb/all-MiniLM-L6-v2`` too.
    """
    _require_nginx()
    real = make_minilm(tmp_path_factory.mktemp("real"))
    models = [tiny_llama] if real is None else [tiny_llama, real]
    with NginxHub(models, odd=True, folder=tmp_path_factory.mktemp("hub")) as hub:
        yield hub


@pytest.fixture(scope="session")
def nginx_faults(tmp_path_factory: pytest.TempPathFactory, nginx_hub: NginxHub) -> Iterator[NginxFaults]:
    """One port a fault, in front of the mirror of ``nginx_hub``."""
    with NginxFaults(nginx_hub.endpoint("mirror"), folder=tmp_path_factory.mktemp("faults")) as faults:
        yield faults


def _require_nginx() -> None:
    reason = nginx_process.missing()
    if reason is None:
        return
    if os.environ.get("FASTLOAD_REQUIRE_NGINX") == "1":
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)
