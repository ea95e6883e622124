"""A clean environment for every test, and hubs that serve small models."""

from __future__ import annotations

import atexit
import inspect
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

pytest_plugins = ["testbed.pytest_plugin"]

# A shell without job control lets what it starts in the background ignore Ctrl-C, and nohup a hangup; so would the programs of
# our tests. Handlers are not inherited.
signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, lambda *_: None)

#: How the tests themselves are run, not how fastload behaves.
_KEPT = {
    "FASTLOAD_REQUIRE_NGINX", "FASTLOAD_TESTBED", "FASTLOAD_OLAH", "FASTLOAD_NGINX_MODULES",
    "FASTLOAD_CHROMIUM", "FASTLOAD_REQUIRE_CHROMIUM", "FASTLOAD_SCREENSHOTS",
}  # fmt: skip
_PREFIXES = ("HF_", "FASTLOAD_", "HUGGING", "TRANSFORMERS_", "DIFFUSERS_")
_NAMES = {"SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "NETRC", "XDG_CACHE_HOME"}


def _is_ours_or_networks(name: str) -> bool:
    return (name not in _KEPT and name.startswith(_PREFIXES)) or name in _NAMES or name.upper().endswith("_PROXY")


# huggingface_hub reads the environment when it is imported; whoever does so first, no test may reach the user's cache.
for _name in filter(_is_ours_or_networks, list(os.environ)):
    del os.environ[_name]
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="fastload-tests-")
atexit.register(shutil.rmtree, os.environ["HF_HOME"], ignore_errors=True)
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"

from fastload.testing import Hub, write_tiny_llama  # noqa: E402


@pytest.fixture(autouse=True)
def clean_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the user's settings, token, cache or proxies; HF_HOME is the test's own."""
    for name in filter(_is_ours_or_networks, list(os.environ)):
        monkeypatch.delenv(name)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")


@pytest.fixture(autouse=True)
def no_blocking(request: pytest.FixtureRequest) -> Iterator[None]:
    """An async test fails when this package blocks its event loop (the test and the hub may)."""
    if not inspect.iscoroutinefunction(getattr(request, "function", None)):
        yield
        return
    from blockbuster import blockbuster_ctx

    with blockbuster_ctx("fastload", excluded_modules=["fastload.testing"]):
        yield


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a Llama of 240 kB in two shards, which transformers loads; not to be changed."""
    return write_tiny_llama(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def make_hub() -> Iterator[Callable[..., Hub]]:
    """Start hubs (arguments as of ``fastload.testing.Hub``) that end with the test."""
    with ExitStack() as stack:

        def make(models: Any, **options: Any) -> Hub:
            return stack.enter_context(Hub(models, **options))

        yield make


@pytest.fixture
def hub(tiny_model: Path, make_hub: Callable[..., Hub], monkeypatch: pytest.MonkeyPatch) -> Hub:
    """A hub with ``org/tiny``, which HF_ENDPOINT points to."""
    started = make_hub({"org/tiny": tiny_model})
    monkeypatch.setenv("HF_ENDPOINT", started.endpoint)
    return started
