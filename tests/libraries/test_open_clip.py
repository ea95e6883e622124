"""An OpenCLIP model that is built while its weights arrive is the one that OpenCLIP gives, with its preprocessing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("open_clip", reason="`tox run -e libraries` installs open_clip")

import fastload_open_clip as plugin  # noqa: E402
import open_clip  # noqa: E402
import safetensors.torch  # noqa: E402
from compare import diff_models  # noqa: E402

import fastload  # noqa: E402
from fastload.errors import SettingsError  # noqa: E402
from fastload.testing import Hub  # noqa: E402

CONFIG = {
    "model_cfg": {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "head_width": 16, "patch_size": 8},
        "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    },
    "preprocess_cfg": {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4], "interpolation": "bicubic"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny CLIP; not to be changed."""
    made = tmp_path_factory.mktemp("clip") / "model"
    made.mkdir()
    (made / "open_clip_config.json").write_text(json.dumps(CONFIG))
    torch.manual_seed(0)
    state = open_clip.CLIP(**CONFIG["model_cfg"]).state_dict()
    state = {name: torch.rand_like(t) if t.is_floating_point() else t for name, t in state.items()}
    safetensors.torch.save_file(state, made / "open_clip_model.safetensors")
    return made


def plainly(folder: Path, **options: Any) -> Any:
    return open_clip.create_model_from_pretrained(f"local-dir:{folder}", **options)


@pytest.mark.parametrize("options", [{}, {"precision": "fp16"}, {"force_image_size": 64}], ids=str)
def test_streamed_model_is_the_plain_one(
    folder: Path, make_builder: Callable[..., Any], options: dict[str, Any]
) -> None:
    (model, preprocess), arrival = make_builder(plugin).streamed(folder, **options)
    plain, plain_preprocess = plainly(arrival.snapshot, **options)
    assert diff_models(model, plain) == []
    assert str(preprocess) == str(plain_preprocess)


def test_model_alone_is_returned_when_asked_for(folder: Path, make_builder: Callable[..., Any]) -> None:
    model, arrival = make_builder(plugin).streamed(folder, return_transform=False)
    assert diff_models(model, plainly(arrival.snapshot, return_transform=False)) == []


def test_repository_is_recognised_by_its_config(
    folder: Path, make_hub: Callable[..., Hub], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = make_hub({"org/model": folder})
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    with fastload.profile() as profiles:
        model, _ = fastload.load("org/model")
    ranges = sum(request.origin == "cdn" for request in hub.requests)
    assert len(hub.requests) <= 2 + profiles.loads[0].files + ranges
    assert diff_models(model, plainly(folder, return_transform=False)) == []
    hub.clear()
    fastload.load("org/model", revision=hub.commit("org/model"), framework="open_clip")
    assert hub.requests == []


def test_its_weights_travel_where_others_stand_beside_them(
    folder: Path, tiny_model: Path, make_hub: Callable[..., Hub], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    both = shutil.copytree(tiny_model, tmp_path / "both")
    shutil.copytree(folder, both, dirs_exist_ok=True)
    hub = make_hub({"org/model": both})
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    model = fastload.load("org/model", framework="open_clip", return_transform=False)
    assert type(model) is open_clip.CLIP
    travelled = {request.file for request in hub.requests if str(request.file).endswith(".safetensors")}
    assert travelled == {"open_clip_model.safetensors"}
    assert type(fastload.load("org/model")).__name__ == "LlamaForCausalLM"


@pytest.mark.parametrize("options", [{"pretrained": "x"}, {"dtype": "float16"}], ids=str)
def test_what_fastload_decides_is_refused(
    folder: Path, make_builder: Callable[..., Any], options: dict[str, Any]
) -> None:
    builder = make_builder(plugin)
    with pytest.raises(SettingsError, match=f"^{next(iter(options))}=") as caught:
        builder.build(builder.arrive(folder), **options)
    assert caught.value.hint


def test_what_is_not_openclips_is_declined(tiny_model: Path, make_builder: Callable[..., Any]) -> None:
    builder = make_builder(plugin)
    assert builder.build(builder.arrive(tiny_model)) is None
