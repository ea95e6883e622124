"""What a load costs: no request too many, none for what is there, no byte copied that plain loading does not copy."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from architectures import ZOO  # noqa: E402

import fastload  # noqa: E402
from fastload.testing import Hub  # noqa: E402
from fastload.zerocopy import zero_copy_bytes  # noqa: E402

pytestmark = pytest.mark.transformers

#: Here transformers merges experts, or (marian) makes weights of the checkpoint anew.
COPIED = {"mixtral", "qwen3-moe", "deepseek-v3", "jamba", "marian"}


async def loaded(source: str, **options: Any) -> tuple[Any, Any]:
    """Load, and return what came of it and its profile."""
    with fastload.profile() as profiles:
        model = await fastload.aload(source, **options)
    (profile,) = profiles.loads
    return model, profile


def zero_copied_plainly(snapshot: Path, model_class: Any) -> tuple[int, int] | None:
    plain = model_class.from_pretrained(snapshot)
    return zero_copy_bytes(plain, [(os.stat(p).st_ino, str(p.resolve())) for p in snapshot.glob("*.safetensors")])


@pytest.mark.parametrize("name", ZOO)
async def test_load_asks_once_for_each_file_and_each_range(
    zoo: Callable[..., Path],
    make_hub: Callable[..., Hub],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    name: str,
) -> None:
    folder = zoo(name)
    hub = make_hub({"org/model": folder})
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    _, profile = await loaded("org/model")
    ranges = sum(request.origin == "cdn" for request in hub.requests)
    assert ranges == len(list(folder.glob("*.safetensors")))
    assert len(hub.requests) == profile.requests <= 2 + profile.files + ranges

    hub.clear()
    _, warm = await loaded("org/model", revision=hub.commit("org/model"))
    assert hub.requests == [] and warm.requests == 0

    snapshot = next((tmp_path / "hf" / "hub" / "models--org--model" / "snapshots").iterdir())
    expected = zero_copied_plainly(snapshot, getattr(transformers, ZOO[name].model))
    assert (profile.zero_copy_bytes, profile.result_bytes) == (warm.zero_copy_bytes, warm.result_bytes) == expected
    assert profile.zero_copy_share >= 0.99 or name in COPIED


async def test_cast_is_told_as_a_copy(
    zoo: Callable[..., Path], make_hub: Callable[..., Hub], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", make_hub({"org/model": zoo("llama")}).endpoint)
    _, profile = await loaded("org/model", dtype="float32")
    assert profile.zero_copy_share == 0
    assert "never copied: 0.0% of the " in str(profile)
