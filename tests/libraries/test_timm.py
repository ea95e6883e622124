"""A timm model that is built while its weights arrive is the one that ``timm.create_model`` gives."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("timm", reason="`tox run -e libraries` installs timm")

import fastload_timm as plugin  # noqa: E402
import safetensors.torch  # noqa: E402
import timm  # noqa: E402
from compare import diff_models  # noqa: E402

import fastload  # noqa: E402
from fastload.errors import SettingsError  # noqa: E402
from fastload.testing import Hub  # noqa: E402

MODELS = {
    "resnet10t": {"num_classes": 3},  # batch norms
    "test_vit": {"num_classes": 3},
}


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    root = tmp_path_factory.mktemp("timm")

    def saved(name: str, *, pickled: bool = False) -> Path:
        folder = root / f"{name}-{pickled}"
        if not folder.exists():
            torch.manual_seed(0)
            model = timm.create_model(name, pretrained=False, **MODELS[name])
            with torch.no_grad():
                for tensor in model.state_dict().values():
                    if tensor.is_floating_point():
                        tensor.uniform_(0.01, 1)
            timm.models.save_for_hf(model, folder, safe_serialization=not pickled)
        return folder

    return saved


def plainly(arrived: Path, **options: Any) -> Any:
    """Build as timm does from the hub: the snapshot's commit lets it find all files in the cache, without a hub."""
    model = timm.create_model(
        f"hf-hub:org/model@{arrived.name}", pretrained=True, cache_dir=arrived.parents[2], **options
    )
    for module in model.modules():
        for known in (vars(module).get("pretrained_cfg"), vars(module).get("default_cfg")):
            if known:
                known["hf_hub_id"] = "org/model"
    return model


@pytest.mark.parametrize("options", [{}, {"num_classes": 5}, {"features_only": True}], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_streamed_model_is_the_plain_one(
    zoo: Callable[..., Path], make_builder: Callable[..., Any], name: str, options: dict[str, Any]
) -> None:
    model, arrival = make_builder(plugin).streamed(zoo(name), **options)
    torch.manual_seed(7)
    plain = plainly(arrival.snapshot, **options)
    assert diff_models(model, plain) == []
    assert model.pretrained_cfg == plain.pretrained_cfg
    picture = torch.rand(1, *model.pretrained_cfg["input_size"])
    for a, b in zip(model.eval()(picture), plain.eval()(picture), strict=True):
        assert torch.equal(a, b)


def test_pickled_weights_load_alike(zoo: Callable[..., Path], make_builder: Callable[..., Any]) -> None:
    model, _ = make_builder(plugin).arrived(zoo("test_vit", pickled=True))
    expected = safetensors.torch.load_file(zoo("test_vit") / "model.safetensors")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


def test_dtype_and_device_are_applied_at_the_end(zoo: Callable[..., Path], make_builder: Callable[..., Any]) -> None:
    model, arrival = make_builder(plugin).streamed(zoo("test_vit"), dtype="bfloat16")
    assert diff_models(model, plainly(arrival.snapshot).to(torch.bfloat16)) == []


def test_repository_is_recognised_by_its_config(
    zoo: Callable[..., Path], make_hub: Callable[..., Hub], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = make_hub({"org/model": zoo("resnet10t")})
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    with fastload.profile() as profiles:
        model = fastload.load("org/model")
    ranges = sum(request.origin == "cdn" for request in hub.requests)
    assert len(hub.requests) <= 2 + profiles.loads[0].files + ranges
    assert model.pretrained_cfg["hf_hub_id"] == "org/model" and model.num_classes == 3
    hub.clear()
    again = fastload.load("org/model", revision=hub.commit("org/model"), framework="timm")
    assert hub.requests == []
    assert again.pretrained_cfg["hf_hub_id"] == f"org/model@{hub.commit('org/model')}"


@pytest.mark.parametrize("name", ["pretrained", "model_name", "checkpoint_path"])
def test_what_fastload_decides_is_refused(
    zoo: Callable[..., Path], make_builder: Callable[..., Any], name: str
) -> None:
    builder = make_builder(plugin)
    with pytest.raises(SettingsError, match=f"^{name}=") as caught:
        builder.build(builder.arrive(zoo("test_vit")), **{name: False})
    assert caught.value.hint


def test_what_is_not_timms_is_declined(tiny_model: Path, make_builder: Callable[..., Any]) -> None:
    builder = make_builder(plugin)
    assert builder.build(builder.arrive(tiny_model)) is None
