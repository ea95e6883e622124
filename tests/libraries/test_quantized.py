"""Quantised checkpoints, and weights that are quantised while they load, are what plain loading makes of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import safetensors.torch  # noqa: E402
from building import same_as_plain  # noqa: E402
from fastload_transformers import fastload_build_model  # noqa: E402

pytestmark = [pytest.mark.transformers, pytest.mark.filterwarnings("ignore")]  # of many libraries


class Plugin:
    fastload_build_model = staticmethod(fastload_build_model)


def of_bitsandbytes(**options: Any) -> Any:
    pytest.importorskip("bitsandbytes", reason="`tox run -e libraries` installs bitsandbytes")
    return transformers.BitsAndBytesConfig(**options)


def of_torchao() -> Any:
    quantization = pytest.importorskip("torchao.quantization", reason="`tox run -e libraries` installs torchao")
    return transformers.TorchAoConfig(quantization.Int8WeightOnlyConfig())


def of_quanto(weights: str) -> Any:
    pytest.importorskip("optimum.quanto", reason="`tox run -e libraries` installs optimum-quanto")
    return transformers.QuantoConfig(weights=weights)


#: What is quantised, and how.
CONFIGS: dict[str, Callable[[], Any]] = {
    "nf4": lambda: of_bitsandbytes(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    ),
    "int8": lambda: of_bitsandbytes(load_in_8bit=True),
    "torchao": of_torchao,
}
#: What transformers quantises while it loads, and cannot save.
UNSAVED: dict[str, Callable[[], Any]] = {
    "quanto int8": lambda: of_quanto("int8"),
    "quanto int4": lambda: of_quanto("int4"),
    "quanto float8": lambda: of_quanto("float8"),
}


@pytest.mark.parametrize("name", [*CONFIGS, *UNSAVED])
def test_weights_are_quantised_while_they_load(tiny_model: Path, make_builder: Callable[..., Any], name: str) -> None:
    options = {"quantization_config": (CONFIGS | UNSAVED)[name](), "device_map": "cpu"}
    same_as_plain(make_builder(Plugin), tiny_model, "AutoModelForCausalLM", **options)


@pytest.mark.parametrize("name", CONFIGS)
def test_quantised_checkpoint_loads_alike(
    tiny_model: Path, make_builder: Callable[..., Any], tmp_path: Path, name: str
) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tiny_model, quantization_config=CONFIGS[name](), device_map="cpu"
    )
    model.save_pretrained(tmp_path / "saved", max_shard_size="40KB")
    same_as_plain(make_builder(Plugin), tmp_path / "saved", "AutoModelForCausalLM", device_map="cpu")


def test_compressed_tensors_load_alike(tiny_model: Path, make_builder: Callable[..., Any], tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors", reason="`tox run -e libraries` installs compressed-tensors")
    weights = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True, "dynamic": False}
    how = transformers.CompressedTensorsConfig(
        config_groups={"group_0": {"weights": weights, "targets": ["Linear"]}}, format="pack-quantized",
        quantization_status="compressed", ignore=["lm_head"],
    )  # fmt: skip
    config = json.loads((tiny_model / "config.json").read_text())
    folder = tmp_path / "saved"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": how.to_dict()}, default=str))
    tensors = safetensors.torch.load_file(next(iter(sorted(tiny_model.glob("*.safetensors")))))
    safetensors.torch.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    empty = transformers.AutoModelForCausalLM.from_pretrained(folder)  # has the names and shapes of packed weights
    torch.manual_seed(0)
    state = {}
    for name, tensor in empty.state_dict().items():
        state[name] = torch.rand_like(tensor) if tensor.is_floating_point() else tensor
        if name.endswith("weight_packed"):
            state[name] = torch.randint(0, 2**31 - 1, tensor.shape, dtype=tensor.dtype)
    safetensors.torch.save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    same_as_plain(make_builder(Plugin), folder, "AutoModelForCausalLM")
