"""Types, maps, names and kinds of files: each argument of ``from_pretrained`` does here what it does there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import safetensors.torch  # noqa: E402
from building import Builder, same_as_plain, same_error  # noqa: E402

pytestmark = pytest.mark.transformers

Zoo = Callable[..., Path]

# -- types and places -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "mixtral", "t5", "bert", "wav2vec2", "mamba", "resnet"])
@pytest.mark.parametrize("dtype", ["auto", "float32", "float16", torch.bfloat16], ids=str)
def test_dtype_means_what_it_means(zoo: Zoo, builder: Builder, name: str, dtype: Any) -> None:
    folder = zoo(name, torch.float16 if dtype is torch.bfloat16 else torch.bfloat16)
    config = json.loads((folder / "config.json").read_text())
    same_as_plain(builder, folder, config["architectures"][0], dtype=dtype)


@pytest.mark.parametrize("name", ["llava", "clip", "gemma3-vl"])
def test_dtype_of_each_part_means_what_it_means(zoo: Zoo, builder: Builder, name: str) -> None:
    dtype = {"text_config": "float16", "vision_config": torch.float32, "": "bfloat16"}
    same_as_plain(builder, zoo(name), "AutoModel", dtype=dtype)


def test_type_is_taken_from_the_weights_where_the_config_has_none(zoo: Zoo, builder: Builder, tmp_path: Path) -> None:
    folder = shutil.copytree(zoo("llama"), tmp_path / "model")
    rewrite(folder / "config.json", lambda config: config.pop("dtype"))
    model = same_as_plain(builder, folder, "LlamaForCausalLM")
    assert model.dtype is torch.bfloat16


DEVICE_MAPS = [
    "cpu", "auto", "balanced", "sequential", torch.device("cpu"), {"": "cpu"}, {"model": "cpu"},
    {"model.embed_tokens": "cpu", "model.layers": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"},
]  # fmt: skip


@pytest.mark.parametrize("device_map", DEVICE_MAPS, ids=lambda given: f"{type(given).__name__}-{str(given)[:9]}")
def test_device_map_means_what_it_means(zoo: Zoo, builder: Builder, device_map: Any) -> None:
    same_as_plain(builder, zoo("llama"), "LlamaForCausalLM", device_map=device_map)


@pytest.mark.parametrize("name", ["mixtral", "gpt2", "t5", "qwen2-vl"])
def test_device_map_serves_other_architectures(zoo: Zoo, builder: Builder, name: str) -> None:
    folder = zoo(name)
    architecture = json.loads((folder / "config.json").read_text())["architectures"][0]
    same_as_plain(builder, folder, architecture, device_map="auto", dtype="float32")


# -- names and shapes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mapping", [{r"^model\.layers\.0\.": "model.layers.1."}, {r"^lm_head": "model.lm_head"}, {"mlp": "absent"}], ids=str
)
def test_key_mapping_renames_the_same_keys(zoo: Zoo, builder: Builder, mapping: dict[str, str]) -> None:
    same_as_plain(builder, zoo("llama"), "LlamaForCausalLM", key_mapping=mapping, output_loading_info=True)


@pytest.mark.parametrize(
    ("name", "loaded", "options"),
    [
        ("bert", "BertForMaskedLM", {"vocab_size": 50}),
        ("vit", "ViTForImageClassification", {"num_labels": 7}),
        ("mixtral", "MixtralForCausalLM", {"num_local_experts": 2}),
        ("gpt2", "GPT2LMHeadModel", {"n_positions": 32}),
    ],
    ids=str,
)
def test_mismatched_sizes_raise_or_pass_alike(
    zoo: Zoo, builder: Builder, name: str, loaded: str, options: dict[str, Any]
) -> None:
    error = same_error(builder, zoo(name), loaded, **options)
    assert isinstance(error, RuntimeError)
    _, info = same_as_plain(
        builder, zoo(name), loaded, **options, ignore_mismatched_sizes=True, output_loading_info=True
    )
    assert info["mismatched_keys"]


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": "float31"},
        {"attn_implementation": "none_such"},
        {"device_map": "everywhere"},
        {"no_such_argument": 1},
        {"max_memory": {"cpu": "much"}, "device_map": "auto"},
        {"auto_class": "AutoModelForImageClassification"},
        {"auto_class": "AutoModelForSpeechSeq2Seq"},
    ],
    ids=str,
)
def test_wrong_argument_is_refused_in_the_same_words(zoo: Zoo, builder: Builder, options: dict[str, Any]) -> None:
    same_error(builder, zoo("llama"), **{"auto_class": "LlamaForCausalLM", **options})


@pytest.mark.parametrize(
    "options",
    [
        {"attn_implementation": "sdpa"},
        {"attn_implementation": {"": "eager"}},
        {"use_safetensors": True},
        {"low_cpu_mem_usage": False},
        {"weights_only": False},
        {"max_memory": {"cpu": "1GB"}, "device_map": "auto"},
        {"offload_state_dict": True},
        {"num_hidden_layers": 1},
        {"tie_word_embeddings": True},
        {"use_cache": False, "output_attentions": True},
    ],
    ids=str,
)
def test_further_arguments_do_what_they_do(zoo: Zoo, builder: Builder, options: dict[str, Any]) -> None:
    same_as_plain(builder, zoo("llama"), "LlamaForCausalLM", **options)


def test_config_may_be_given(zoo: Zoo, builder: Builder) -> None:
    config = transformers.AutoConfig.from_pretrained(zoo("llama"), num_hidden_layers=1)
    model = same_as_plain(builder, zoo("llama"), "AutoModelForCausalLM", config=config)
    assert len(model.model.layers) == 1


def test_generation_config_is_that_of_the_file_or_of_the_config(zoo: Zoo, builder: Builder, tmp_path: Path) -> None:
    folder = shutil.copytree(zoo("llama"), tmp_path / "without")
    (folder / "generation_config.json").unlink()
    same_as_plain(builder, folder, "LlamaForCausalLM")
    given = {"bos_token_id": 1, "eos_token_id": [2, 3], "do_sample": True, "temperature": 0.5, "top_k": 7}
    (folder / "generation_config.json").write_text(json.dumps(given))
    model = same_as_plain(builder, folder, "LlamaForCausalLM")
    assert model.generation_config.top_k == 7


# -- kinds of files -------------------------------------------------------------------------------------------------


def pickled(folder: Path, to: Path, variant: str = "") -> Path:
    """Write *folder* with pickled weights in place of its safetensors files, and an index where it had one."""
    to.mkdir(parents=True)
    dot = f".{variant}" if variant else ""
    for path in folder.iterdir():
        if path.suffix == ".safetensors":
            name = path.name.replace("model", "pytorch_model" + dot, 1).replace(".safetensors", ".bin")
            torch.save(safetensors.torch.load_file(path), to / name)
        elif path.name == "model.safetensors.index.json":
            text = path.read_text().replace('"model-', f'"pytorch_model{dot}-').replace(".safetensors", ".bin")
            (to / f"pytorch_model.bin.index{dot}.json").write_text(text)
        else:
            shutil.copy(path, to)
    return to


@pytest.mark.parametrize("shard", ["1GB", "10KB"])
@pytest.mark.parametrize("name", ["llama", "bert", "t5"])
def test_pickled_weights_load_alike(zoo: Zoo, builder: Builder, tmp_path: Path, name: str, shard: str) -> None:
    folder = pickled(zoo(name, shard=shard), tmp_path / "bin")
    architecture = json.loads((folder / "config.json").read_text())["architectures"][0]
    same_as_plain(builder, folder, architecture, streams=False)


@pytest.mark.parametrize("kind", [".safetensors", ".bin"])
@pytest.mark.parametrize("shard", ["1GB", "10KB"])
def test_variants_in_subfolders_load_alike(zoo: Zoo, builder: Builder, tmp_path: Path, shard: str, kind: str) -> None:
    saved = zoo("qwen2", shard=shard, **({"variant": "fp16"} if kind == ".safetensors" else {}))
    part = tmp_path / "model" / "deep" / "part"
    shutil.copytree(saved, part) if kind == ".safetensors" else pickled(saved, part, "fp16")
    options = {"variant": "fp16", "subfolder": "deep/part"}
    same_as_plain(builder, tmp_path / "model", "Qwen2ForCausalLM", streams=kind == ".safetensors", **options)


def rewrite(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


# -- code of the repository's own -----------------------------------------------------------------------------------

MODELING = """
import torch
from transformers import PreTrainedModel
from .configuration_bar import BarConfig
from .layers import Layer

class BarModel(PreTrainedModel):
    config_class = BarConfig
    base_model_prefix = "bar"
    _keys_to_ignore_on_load_unexpected = [r"^optimizer\\\\."]
    _keys_to_ignore_on_load_missing = [r"^late\\\\."]
    _tied_weights_keys = {"head.weight": "embed.weight"}
    _keep_in_fp32_modules_strict = ["norm"]

    def __init__(self, config):
        super().__init__(config)
        self.embed = torch.nn.Embedding(96, config.width)
        self.layers = torch.nn.ModuleList(Layer(config.width) for _ in range(config.depth))
        self.norm = torch.nn.LayerNorm(config.width)
        self.head = torch.nn.Linear(config.width, 96, bias=False)
        self.late = torch.nn.Linear(2, 2)
        self.register_buffer("positions", torch.arange(16).float() / config.width, persistent=False)
        self.register_buffer("steps", torch.zeros(4))
        self.post_init()

    def _init_weights(self, module):
        super()._init_weights(module)
        if module is self:
            torch.nn.init.constant_(self.positions, 0.5)

    def get_input_embeddings(self):
        return self.embed

    def get_output_embeddings(self):
        return self.head
"""
CONFIGURATION = """
from transformers import PretrainedConfig

class BarConfig(PretrainedConfig):
    model_type = "bar"

    def __init__(self, width=32, depth=2, **rest):
        self.width, self.depth = width, depth
        super().__init__(**{"tie_word_embeddings": True, **rest})
"""
LAYERS = """
import torch

class Layer(torch.nn.Module):
    def __init__(self, width):
        super().__init__()
        self.inner = torch.nn.Linear(width, width)
"""


@pytest.fixture
def remote(tmp_path: Path) -> Path:
    """A model whose code is in its repository: several modules, keys to ignore, buffers of both kinds, a tie."""
    folder = tmp_path / "remote"
    folder.mkdir()
    for name, code in (("modeling_bar", MODELING), ("configuration_bar", CONFIGURATION), ("layers", LAYERS)):
        (folder / f"{name}.py").write_text(code)
    auto_map = {"AutoConfig": "configuration_bar.BarConfig", "AutoModelForCausalLM": "modeling_bar.BarModel"}
    config = {"model_type": "bar", "architectures": ["BarModel"], "auto_map": auto_map, "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(0)
    shapes = {"embed.weight": (96, 32), "norm.weight": (32,), "norm.bias": (32,), "steps": (4,), "optimizer.m": (9,)}
    for i in range(2):
        shapes |= {f"layers.{i}.inner.weight": (32, 32), f"layers.{i}.inner.bias": (32,)}
    tensors = {name: torch.rand(shape, generator=generator).bfloat16() for name, shape in shapes.items()}
    safetensors.torch.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("options", [{}, {"dtype": "float32"}, {"device_map": "auto"}], ids=str)
def test_trusted_code_loads_with_its_own_rules(remote: Path, builder: Builder, options: dict[str, Any]) -> None:
    model = same_as_plain(builder, remote, "AutoModelForCausalLM", trust_remote_code=True, **options)
    assert type(model).__name__ == "BarModel"
    assert model.head.weight is model.embed.weight
