"""``--load-format fastload`` by the interfaces that SGLang publishes for plugins: modules of its real wheel, without a GPU."""

from __future__ import annotations

import contextlib
import inspect
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("orjson")

import safetensors.torch  # noqa: E402
from engines.wheel import imported  # noqa: E402

from fastload.errors import IntegrityError, SettingsError  # noqa: E402
from fastload.testing import Fault, Hub, write_tiny_llama  # noqa: E402

REAL = ["sglang.srt.arg_groups.choices", "sglang.srt.configs.load_config", "sglang.srt.model_loader.loader",
        "sglang.srt.plugins", "sglang.srt.plugins.hook_registry"]  # fmt: skip


@pytest.fixture
def sglang() -> Iterator[types.SimpleNamespace]:
    """SGLang's hook registry, loaders and configuration, after it has loaded its plugins."""
    unset = types.SimpleNamespace(get=lambda: None)
    given: dict[str, dict[str, Any]] = {
        "sglang.srt.environ": {"envs": types.SimpleNamespace(SGLANG_PLUGINS=unset, SGLANG_PLATFORM=unset)},
        "sglang.srt.utils": {"is_hip": lambda: False, "get_bool_env_var": lambda *a: False},
        "sglang.srt.utils.common": {"is_cuda_alike": lambda: False},
        "sglang.srt.kernel_plugins.amd.binding": {"monokernel_weights_iterator": lambda model, weights: weights},
        "sglang.srt.model_loader.utils": {"set_default_torch_dtype": lambda dtype: contextlib.nullcontext()},
    }
    with imported("sglang", REAL, given):
        from sglang.srt import plugins
        from sglang.srt.arg_groups import choices
        from sglang.srt.configs.load_config import LoadConfig
        from sglang.srt.model_loader import loader

        plugins.load_plugins()
        yield types.SimpleNamespace(
            loading=loader, LoadConfig=LoadConfig, Default=loader.DefaultModelLoader, choices=choices, plugins=plugins
        )


class Model(torch.nn.Module):
    """As a model of SGLang's is loaded: it gets an iterator."""

    def __init__(self) -> None:
        super().__init__()
        self.got: list[tuple[str, Any]] = []

    def load_weights(self, weights: Iterator[tuple[str, Any]]) -> None:
        self.got.extend(weights)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in three shards."""
    return write_tiny_llama(tmp_path_factory.mktemp("sglang") / "model", shards=3, hidden=256, vocabulary=3000)


@pytest.fixture
def hub(folder: Path, make_hub: Callable[..., Hub], monkeypatch: pytest.MonkeyPatch) -> Hub:
    started = make_hub({"org/model": folder})
    monkeypatch.setenv("HF_ENDPOINT", started.endpoint)
    return started


def expected(folder: Path) -> list[tuple[str, Any]]:
    """Return the shards in order, the tensors of each as safetensors' ``load_file`` has them, in the order of their bytes."""
    found: list[tuple[str, Any]] = []
    for path in sorted(folder.glob("model-*.safetensors")):
        tensors = safetensors.torch.load_file(path)
        with safetensors.safe_open(path, "pt") as f:
            found += [(name, tensors[name]) for name in f.offset_keys()]
    return found


def same(got: list[tuple[str, Any]], wanted: list[tuple[str, Any]]) -> bool:
    return [n for n, _ in got] == [n for n, _ in wanted] and all(
        a.dtype == b.dtype and torch.equal(a, b) for (_, a), (_, b) in zip(got, wanted, strict=True)
    )


def model_config(model: Any) -> types.SimpleNamespace:
    return types.SimpleNamespace(
        model_path=str(model),
        revision=None,
        dtype=torch.bfloat16,
        modelopt_quant=None,
        quantization=None,
        hf_config=None,
    )


def loader_of(sglang: Any, cache: Path, **options: Any) -> Any:
    return sglang.loading.get_model_loader(
        sglang.LoadConfig(load_format="fastload", download_dir=str(cache), **options), model_config("org/model")
    )


def load(sglang: Any, loader: Any, monkeypatch: pytest.MonkeyPatch, build: Callable[[], Model] = Model) -> Model:
    """Let SGLang's own ``load_model`` run, with *build* in the place of what makes a model of a configuration."""
    monkeypatch.setattr(sglang.loading, "_initialize_model", lambda *a, **k: build())
    monkeypatch.setattr(sglang.loading, "_get_quantization_config", lambda *a, **k: None)
    device = types.SimpleNamespace(device="cpu")
    loaded: Model = loader.load_model(model_config=model_config("org/model"), device_config=device)
    return loaded


def test_the_interface_is_the_one_that_the_plugin_was_written_for(sglang: Any):
    default = sglang.Default
    assert list(inspect.signature(default.__init__).parameters) == ["self", "load_config"]
    assert list(inspect.signature(default._get_weights_iterator).parameters)[:2] == ["self", "source"]
    assert list(inspect.signature(default.load_model).parameters) == ["self", "model_config", "device_config"]
    assert list(inspect.signature(default._filter_mtp_weights).parameters) == [
        "weights_iterator",
        "prefix",
        "draft_model_idx",
    ]
    assert {"model_or_path", "revision", "prefix", "allow_patterns_overrides", "model_config"} <= set(
        default.Source.__dataclass_fields__
    )


def test_the_command_line_knows_the_format_and_other_formats_stay(sglang: Any, tmp_path: Path):
    assert sglang.choices.LOAD_FORMAT_CHOICES.count("fastload") == 1
    from fastload_sglang import register

    register()
    assert sglang.choices.LOAD_FORMAT_CHOICES.count("fastload") == 1
    plain = sglang.LoadConfig(load_format="safetensors")
    assert plain.load_format == "safetensors"
    assert type(sglang.loading.get_model_loader(plain)) is sglang.Default
    with pytest.raises(ValueError, match="nonsense"):
        sglang.LoadConfig(load_format="nonsense")
    assert type(loader_of(sglang, tmp_path)).__name__ == "FastloadModelLoader"


def test_a_model_gets_all_weights_in_order_and_bit_for_bit(
    sglang: Any, hub: Hub, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    model = load(sglang, loader_of(sglang, tmp_path), monkeypatch)
    assert same(model.got, expected(folder))
    assert list(tmp_path.glob("models--org--model/snapshots/*/model-00001-of-00003.safetensors"))


def test_the_download_runs_while_the_model_is_built(
    sglang: Any, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    hub.script(Fault("hold", path="*.safetensors", times=None, offset=100_000))
    seen = []

    def build() -> Model:
        hub.wait(lambda requests: any(r.held for r in requests))  # weights travel, and nobody has asked for one yet
        seen.append("travelling")
        hub.script()
        hub.release()
        return Model()

    load(sglang, loader_of(sglang, tmp_path), monkeypatch, build)
    assert seen == ["travelling"]


def test_tensors_come_while_the_rest_travels(sglang: Any, hub: Hub, tmp_path: Path):
    hub.script(Fault("hold", path="model-00003-*", times=None))
    weights = loader_of(sglang, tmp_path)._get_weights_iterator(sglang.Default.Source("org/model", None))
    name, tensor = next(weights)
    assert tensor.numel() > 0
    hub.script()
    hub.release()
    assert name not in [n for n, _ in weights]


def test_prefix_and_drafts_are_honoured(sglang: Any, hub: Hub, folder: Path, tmp_path: Path):
    loader = loader_of(sglang, tmp_path)
    source = sglang.Default.Source("org/model", None, prefix="p.")
    assert same(list(loader._get_weights_iterator(source)), [(f"p.{n}", t) for n, t in expected(folder)])
    drafts = tmp_path / "drafts"
    drafts.mkdir()
    names = [f"model.mtp.layers.{n}.weight" for n in range(3)]
    safetensors.torch.save_file({n: torch.full((2,), i) for i, n in enumerate(names)}, drafts / "model.safetensors")
    loader = loader_of(sglang, tmp_path, draft_model_idx=1)
    [(name, tensor)] = loader._get_weights_iterator(sglang.Default.Source(str(drafts), None))
    assert (name, tensor[0].item()) == ("model.mtp.layers.0.weight", 1)


def test_wrong_bytes_never_become_a_model(sglang: Any, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    hub.script(Fault("flip", path="model-00002-*", times=None, offset=1000))
    with pytest.raises(IntegrityError, match="model-00002"):
        load(sglang, loader_of(sglang, tmp_path), monkeypatch)


def test_options_are_settings_by_name(sglang: Any, tmp_path: Path):
    loader = loader_of(sglang, tmp_path, model_loader_extra_config={"connections": 3})
    assert loader._settings["connections"] == 3
    with pytest.raises(SettingsError, match="conections"):
        loader_of(sglang, tmp_path, model_loader_extra_config='{"conections": 3}')


def test_what_only_sglangs_own_way_does_is_left_to_it(sglang: Any, hub: Hub, tmp_path: Path, monkeypatch: Any):
    asked = []
    monkeypatch.setattr(
        sglang.Default, "_get_weights_iterator", lambda self, source, **k: asked.append(source) or iter(())
    )
    config = types.SimpleNamespace(hf_config=types.SimpleNamespace(num_nextn_predict_layers=1))
    for options, source in (
        ({"ignore_patterns": ["*x*"]}, sglang.Default.Source("org/model", None)),
        ({}, sglang.Default.Source("org/model", None, model_config=config)),
    ):
        loader = loader_of(sglang, tmp_path, **options)
        assert loader.load_config.load_format == "auto"
        list(loader._get_weights_iterator(source))
    assert len(asked) == 2
    assert not hub.requests


def test_no_module_of_the_plugin_imports_sglang_before_it_is_called():
    sys.modules.pop("fastload_sglang", None)
    __import__("fastload_sglang")
    assert "sglang" not in sys.modules
