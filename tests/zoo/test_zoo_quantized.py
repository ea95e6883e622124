"""Checkpoints whose weights are quantised, as far as transformers loads them on a CPU without further libraries."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import safetensors.torch  # noqa: E402
from building import Builder, same_as_plain  # noqa: E402

pytestmark = pytest.mark.transformers

BLOCK = 16
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK],
       "modules_to_not_convert": ["lm_head"]}  # fmt: skip
MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router",
                                                             "model.embed_tokens", "lm_head"]}  # fmt: skip


def to_fp8(name: str, tensor: Any) -> dict[str, Any]:
    """The layout of DeepSeek-V3: a scale for each block."""
    if not name.endswith(("_proj.weight", "w1.weight", "w2.weight", "w3.weight")):
        return {name: tensor}
    rows, columns = tensor.shape
    scale = torch.rand(-(-rows // BLOCK), -(-columns // BLOCK))
    return {name: tensor.to(torch.float8_e4m3fn), f"{name}_scale_inv": scale}


def to_mxfp4(name: str, tensor: Any) -> dict[str, Any]:
    """The layout of gpt-oss: two values a byte, a power of two for each 32."""
    if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
        return {name: tensor}
    experts, inner, outer = tensor.shape
    blocks = torch.randint(0, 256, (experts, outer, inner // 32, 16), dtype=torch.uint8)
    scales = torch.randint(120, 130, (experts, outer, inner // 32), dtype=torch.uint8)
    return {f"{name}_blocks": blocks, f"{name}_scales": scales}


def quantised(folder: Path, to: Path, quantise: Callable[[str, Any], dict[str, Any]], how: dict[str, Any]) -> Path:
    """Write *folder* with quantised weights, in two files with an index."""
    to.mkdir()
    torch.manual_seed(0)
    tensors: dict[str, Any] = {}
    for path in sorted(folder.glob("*.safetensors")):
        for name, tensor in safetensors.torch.load_file(path).items():
            tensors |= quantise(name, tensor)
    config = json.loads((folder / "config.json").read_text())
    (to / "config.json").write_text(json.dumps({**config, "quantization_config": how}))
    names = sorted(tensors)
    weight_map = {name: f"model-0000{i % 2 + 1}-of-00002.safetensors" for i, name in enumerate(names)}
    for shard in sorted(set(weight_map.values())):
        held = {name: tensors[name].contiguous() for name in names if weight_map[name] == shard}
        safetensors.torch.save_file(held, to / shard, metadata={"format": "pt"})
    (to / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return to


def fp8_needs_triton() -> bool:
    try:
        import transformers.integrations.finegrained_fp8  # noqa: F401
    except ModuleNotFoundError:
        return True
    return False


@pytest.mark.skipif(fp8_needs_triton(), reason="this transformers dequantises fp8 only beside triton")
@pytest.mark.parametrize("options", [{}, {"dtype": "float32"}, {"device_map": "cpu"}], ids=str)
@pytest.mark.parametrize("name", ["llama", "qwen3-moe", "mixtral"])
def test_fp8_is_dequantised_while_it_arrives(
    zoo: Callable[..., Path], builder: Builder, tmp_path: Path, name: str, options: dict[str, Any]
) -> None:
    folder = quantised(zoo(name, shard="1GB"), tmp_path / "fp8", to_fp8, FP8)
    model = same_as_plain(builder, folder, "AutoModelForCausalLM", **options)
    assert model.dtype.itemsize > 1


@pytest.mark.parametrize("options", [{}, {"dequantize": True}], ids=str)
def test_mxfp4_is_dequantised_while_it_arrives(
    zoo: Callable[..., Path], builder: Builder, tmp_path: Path, options: dict[str, Any]
) -> None:
    folder = quantised(zoo("gpt-oss", shard="1GB"), tmp_path / "mxfp4", to_mxfp4, MXFP4)
    given = {"quantization_config": transformers.Mxfp4Config(**options)} if options else {}
    same_as_plain(builder, folder, "AutoModelForCausalLM", **given)
