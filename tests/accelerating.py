"""What tests of ``fastload.accelerate()`` share: a model, huggingface_hub pointed at a hub, moments, the final look around."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import huggingface_hub
import pytest
import safetensors.torch
from huggingface_hub import file_download

from fastload import dropin, inflight
from fastload.errors import FastloadError
from fastload.ondemand import OnDemand
from fastload.testing import Hub, write_tiny_llama

KEPT = {"download": file_download._hf_hub_download_to_cache_dir, "safe_open": safetensors.safe_open}
WEIGHTS = "model-00001-of-00002.safetensors"


def write_model(folder: Path) -> Path:
    """Write a Llama in two shards of more than 1 MiB, beside which stand a tokenizer-like file and a pickled one."""
    import transformers

    write_tiny_llama(folder, shards=2, hidden=256, vocabulary=3000)
    (folder / "pytorch_model.bin").write_bytes(os.urandom(1_500_000))
    (folder / "vocab").mkdir()
    (folder / "vocab" / "tokens.txt").write_text("one two three")
    transformers.utils.logging.disable_progress_bar()
    return folder


def point_to(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let huggingface_hub, which has read the environment by now, ask *hub*."""
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.endpoint)
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", hub.endpoint)
    monkeypatch.setattr(
        huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE",
        hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}",
    )  # fmt: skip


@contextmanager
def everything_is_put_back() -> Iterator[None]:
    """After the block: the names are bound as they were, and no thread of ours is left."""
    import transformers

    before = set(threading.enumerate())
    yield
    assert file_download._hf_hub_download_to_cache_dir is KEPT["download"]
    assert safetensors.safe_open is KEPT["safe_open"] is safetensors.torch.safe_open
    assert transformers.modeling_utils.safe_open is KEPT["safe_open"]
    for thread in set(threading.enumerate()) - before:
        if thread.name.startswith("fastload-"):
            thread.join(10)
            assert not thread.is_alive(), thread.name


def links_in_flight(cache: Path) -> list[Path]:
    """Return the links in *cache* that only this process can follow."""
    return [p for p in cache.rglob("*") if p.is_symlink() and os.readlink(p).startswith("/proc/")]


def the_transfer() -> OnDemand:
    """Return the one that is under way."""
    [transfer] = dropin._state.transfers._open.values()
    return transfer


def wait_failed(transfer: OnDemand) -> None:
    """Wait until *transfer* has failed, and what it means for its files in flight has been done."""
    with suppress(FastloadError):
        transfer._transfer.wait(lambda: False)
    if (watcher := transfer._watcher) is not None:
        watcher.join(60)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Set when a file in flight has been opened."""
    event = threading.Event()
    handle = inflight.InFlight.handle

    def opening(self: inflight.InFlight, *args: object, **kwargs: object) -> object:
        event.set()
        return handle(self, *args, **kwargs)

    monkeypatch.setattr(inflight.InFlight, "handle", opening)
    return event
