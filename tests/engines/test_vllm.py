"""``--load-format fastload`` by the interface that vLLM publishes for plugins: the modules of its real wheel, without a GPU."""

from __future__ import annotations

import contextlib
import inspect
import logging
import sys
import types
from collections.abc import Callable, Iterator
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("pydantic")

import safetensors.torch  # noqa: E402
from engines.wheel import StandIn, imported  # noqa: E402

from fastload.errors import IntegrityError, SettingsError  # noqa: E402
from fastload.testing import Fault, Hub, write_tiny_llama  # noqa: E402

REAL = ["vllm.config.load", "vllm.config.utils", "vllm.envs", "vllm.model_executor.model_loader",
        "vllm.model_executor.model_loader.base_loader", "vllm.model_executor.model_loader.default_loader",
        "vllm.model_executor.model_loader.ep_weight_filter", "vllm.plugins"]  # fmt: skip


class _Logger(logging.LoggerAdapter[logging.Logger]):
    info_once = debug_once = warning_once = lambda self, *args, **kwargs: None


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> Iterator[types.SimpleNamespace]:
    """vLLM's registry, loaders and configuration."""
    identity: Callable[..., Any] = lambda **how: lambda function: function  # noqa: E731
    given: dict[str, dict[str, Any]] = {
        "vllm.logger": {"init_logger": lambda name: _Logger(logging.getLogger(name), {})},
        "vllm.tracing": {"instrument": identity},
        "vllm.utils.hashing": {"safe_hash": lambda *a, **k: None},
        "vllm.utils.torch_utils": {"set_default_torch_dtype": lambda dtype: contextlib.nullcontext()},
        "vllm.model_executor.model_loader.utils": {
            "initialize_model": lambda vllm_config, model_config, prefix: vllm_config.make_model(),
            "process_weights_after_loading": lambda *a: None,
        },
        "vllm.config": {
            "get_current_vllm_config": lambda: types.SimpleNamespace(parallel_config=None),
            "get_current_vllm_config_or_none": lambda: None,
        },
        "vllm.model_executor.layers.quantization.online.base": {"OnlineQuantizationConfig": StandIn},
    }
    monkeypatch.setattr(torch.accelerator, "empty_cache", lambda: None)  # raises where there is no accelerator
    with imported("vllm", REAL, given):
        from vllm.config.load import LoadConfig
        from vllm.model_executor import model_loader
        from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

        yield types.SimpleNamespace(loading=model_loader, LoadConfig=LoadConfig, Default=DefaultModelLoader)


class Model(torch.nn.Module):
    """As a model of vLLM's is loaded: it gets an iterator, and says which names it took."""

    def __init__(self) -> None:
        super().__init__()
        self.got: list[tuple[str, Any]] = []

    def load_weights(self, weights: Iterator[tuple[str, Any]]) -> set[str]:
        self.got.extend(weights)
        return {name for name, _ in self.got}


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in three shards, with a second copy of its weights in another layout beside it."""
    folder = write_tiny_llama(tmp_path_factory.mktemp("vllm") / "model", shards=3, hidden=256, vocabulary=3000)
    safetensors.torch.save_file({"other": torch.ones(3)}, folder / "consolidated.safetensors")
    return folder


@pytest.fixture
def hub(folder: Path, make_hub: Callable[..., Hub], monkeypatch: pytest.MonkeyPatch) -> Hub:
    started = make_hub({"org/model": folder})
    monkeypatch.setenv("HF_ENDPOINT", started.endpoint)
    return started


def expected(folder: Path) -> list[tuple[str, Any]]:
    """Return what vLLM's own loader yields: the shards in order, the tensors of each as safetensors' ``load_file`` has them."""
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


def model_config(model: Any, **more: Any) -> types.SimpleNamespace:
    values = {"model": str(model), "revision": None, "dtype": torch.bfloat16, "quantization": None, "is_moe": False,
              "multimodal_config": None}  # fmt: skip
    return types.SimpleNamespace(**{**values, **more})


def vllm_config(load_config: Any, make_model: Callable[[], Any] = Model) -> types.SimpleNamespace:
    device = types.SimpleNamespace(device="cpu")
    return types.SimpleNamespace(
        device_config=device, load_config=load_config, make_model=make_model, quant_config=None
    )


@pytest.fixture
def registered(vllm: Any) -> Any:
    """vLLM, after it has loaded its plugins; it does so in every process, maybe more than once."""
    [entry] = [e for e in entry_points(group="vllm.general_plugins") if e.value.startswith("fastload_vllm")]
    entry.load()()
    entry.load()()
    return vllm


def loader_of(vllm: Any, cache: Path, **options: Any) -> Any:
    return vllm.loading.get_model_loader(vllm.LoadConfig(load_format="fastload", download_dir=str(cache), **options))


def test_the_interface_is_the_one_that_the_plugin_was_written_for(vllm: Any):
    default = vllm.Default
    assert list(inspect.signature(default.__init__).parameters) == ["self", "load_config"]
    assert list(inspect.signature(default._get_weights_iterator).parameters) == ["self", "source"]
    assert list(inspect.signature(default.load_weights).parameters) == ["self", "model", "model_config"]
    assert list(inspect.signature(default.create_model).parameters) == ["self", "vllm_config", "model_config", "prefix"]
    assert {"model_or_path", "revision", "subfolder", "prefix", "allow_patterns_overrides", "is_unused_weight"} <= set(
        default.Source.__dataclass_fields__
    )
    assert list(inspect.signature(vllm.loading.register_model_loader).parameters) == ["load_format"]


def test_a_model_gets_all_weights_in_order_and_bit_for_bit(registered: Any, hub: Hub, folder: Path, tmp_path: Path):
    load_config = registered.LoadConfig(load_format="fastload", download_dir=str(tmp_path))
    model = registered.loading.get_model(vllm_config=vllm_config(load_config), model_config=model_config("org/model"),
                                         load_config=load_config)  # fmt: skip
    assert same(model.got, expected(folder))
    assert list(tmp_path.glob("models--org--model/snapshots/*/model-00001-of-00003.safetensors"))


def test_the_download_runs_while_the_model_is_built(registered: Any, hub: Hub, tmp_path: Path):
    hub.script(Fault("hold", path="*.safetensors", times=None, offset=100_000))
    seen = []

    def build() -> Model:
        hub.wait(lambda requests: any(r.held for r in requests))  # weights travel, and nobody has asked for one yet
        seen.append("travelling")
        hub.script()
        hub.release()
        return Model()

    loader = loader_of(registered, tmp_path)
    config = model_config("org/model")
    loader.load_model(vllm_config=vllm_config(loader.load_config, build), model_config=config)
    assert seen == ["travelling"]


def test_tensors_come_while_the_rest_travels(registered: Any, hub: Hub, tmp_path: Path):
    hub.script(Fault("hold", path="model-00003-*", times=None))
    loader = loader_of(registered, tmp_path)
    weights = loader._get_weights_iterator(registered.Default.Source("org/model", None))
    name, tensor = next(weights)
    assert tensor.numel() > 0
    hub.script()
    hub.release()
    assert name not in [n for n, _ in weights]


def test_prefix_filters_and_patterns_are_honoured(registered: Any, hub: Hub, folder: Path, tmp_path: Path):
    loader = loader_of(registered, tmp_path)
    source = registered.Default.Source("org/model", None, prefix="p.", is_unused_weight=lambda name: "norm" in name)
    wanted = [(f"p.{n}", t) for n, t in expected(folder) if "norm" not in n]
    assert same(list(loader._get_weights_iterator(source)), wanted)
    source = registered.Default.Source("org/model", None, allow_patterns_overrides=["consolidated*.safetensors"])
    assert [n for n, _ in loader._get_weights_iterator(source)] == ["other"]


def test_experts_of_other_ranks_are_left_out(registered: Any, tmp_path: Path):
    folder = tmp_path / "moe"
    folder.mkdir()
    names = [f"layers.0.experts.{n}.up.weight" for n in range(4)]
    safetensors.torch.save_file({n: torch.ones(2) for n in names}, folder / "model.safetensors")
    loader = loader_of(registered, tmp_path / "cache")
    loader.local_expert_ids = {1, 2}
    found = [n for n, _ in loader._get_weights_iterator(registered.Default.Source(str(folder), None))]
    assert found == names[1:3]


def test_secondary_weights_come_too(registered: Any, hub: Hub, folder: Path, tmp_path: Path):
    loader = loader_of(registered, tmp_path)
    model = Model()
    model.secondary_weights = [registered.Default.Source("org/model", None, prefix="second.")]  # type: ignore[assignment]
    loader.load_weights(model, model_config("org/model"))
    wanted = expected(folder)
    assert same(model.got, [*wanted, *((f"second.{n}", t) for n, t in wanted)])


def test_download_model_fills_the_cache_with_what_a_load_reads(registered: Any, hub: Hub, tmp_path: Path):
    loader_of(registered, tmp_path).download_model(model_config("org/model"))
    names = {p.name for p in tmp_path.glob("models--org--model/snapshots/*/*")}
    assert {"config.json", "model-00003-of-00003.safetensors"} <= names
    assert "consolidated.safetensors" not in names


def test_wrong_bytes_never_become_a_model(registered: Any, hub: Hub, tmp_path: Path):
    hub.script(Fault("flip", path="model-00002-*", times=None, offset=1000))
    loader = loader_of(registered, tmp_path)
    with pytest.raises(IntegrityError, match="model-00002"):
        loader.load_model(vllm_config=vllm_config(loader.load_config), model_config=model_config("org/model"))


def test_options_are_settings_by_name(registered: Any, tmp_path: Path):
    loader = loader_of(registered, tmp_path, model_loader_extra_config={"connections": 3})
    assert loader._settings["connections"] == 3
    with pytest.raises(SettingsError, match="conections"):
        loader_of(registered, tmp_path, model_loader_extra_config={"conections": 3})


def test_what_only_vllms_own_way_does_is_left_to_it(registered: Any, hub: Hub, tmp_path: Path, monkeypatch: Any):
    asked = []
    monkeypatch.setattr(
        registered.Default, "_get_weights_iterator", lambda self, source: asked.append(source) or iter(())
    )
    for options in ({"ignore_patterns": ["*x*"]}, {"safetensors_load_strategy": "torchao"}):
        loader = loader_of(registered, tmp_path, **options)
        assert loader.load_config.load_format == "auto"
        list(loader._get_weights_iterator(registered.Default.Source("org/model", None)))
    assert len(asked) == 2
    assert not hub.requests


def test_no_module_of_the_plugin_imports_vllm_before_it_is_called():
    sys.modules.pop("fastload_vllm", None)
    __import__("fastload_vllm")
    assert "vllm" not in sys.modules
