"""The models of :mod:`benchmarks.rows`: random weights from configs, one of each kind that loads in a way of its own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.testbed.models import cache_folder

#: What one file of a sharded model holds at most.
_SHARD = "50MB"
_TEXT = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
_LLAMA = {
    "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 14, "num_attention_heads": 12,
    "num_key_value_heads": 4, "vocab_size": 16000,
}  # fmt: skip
_CLIP = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8, "num_hidden_layers": 6}


def folder_of(name: str, *, tiny: bool) -> Path:
    """Return the folder of model *name*, made now where it is missing.

    Args:
        tiny: As deep as it is wide: some MB, for whatever is to run once before the clock does.
    """
    folder = cache_folder() / "rows" / (f"{name}-tiny" if tiny else name)
    if not folder.exists():
        making = folder.with_name(f"{folder.name}.making")
        shutil.rmtree(making, ignore_errors=True)
        making.mkdir(parents=True)
        MODELS[name](making, tiny)
        making.replace(folder)
    return folder


def _config(kind: str, tiny: bool, **options: Any) -> Any:
    """Return a config of transformers; a *tiny* one has one layer of each kind and few words."""
    import transformers

    if tiny:
        layers = ("num_hidden_layers", "num_layers", "encoder_layers", "decoder_layers", "n_layer")
        options |= {name: 1 for name in layers if name in options}
        options |= {"vocab_size": 512} if "vocab_size" in options else {}
    return getattr(transformers, kind)(**options)


def _model(kind: str, config: Any) -> Any:
    """Return a model of transformers in bfloat16, its missing weights random as ever."""
    import torch
    import transformers

    torch.manual_seed(0)
    return getattr(transformers, kind)(config).to(torch.bfloat16)


def _saved(model_kind: str, config_kind: str, **options: Any) -> Callable[[Path, bool], None]:
    def make(folder: Path, tiny: bool) -> None:
        _model(model_kind, _config(config_kind, tiny, **options)).save_pretrained(folder, max_shard_size=_SHARD)

    return make


def _pickled(folder: Path, tiny: bool) -> None:
    """Four files of ``torch.save`` and their index, as they were before safetensors."""
    import torch

    model = _model("LlamaForCausalLM", _config("LlamaConfig", tiny, **_LLAMA))
    model.config.architectures = ["LlamaForCausalLM"]
    model.config.save_pretrained(folder)
    state = model.state_dict()
    names = list(state)
    table = {name: f"pytorch_model-0000{4 * at // len(names) + 1}-of-00004.bin" for at, name in enumerate(names)}
    for shard in sorted(set(table.values())):
        torch.save({name: state[name] for name in names if table[name] == shard}, folder / shard)
    size = sum(tensor.nbytes for tensor in state.values())
    index = {"metadata": {"total_size": size}, "weight_map": table}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def _gguf(folder: Path, tiny: bool) -> None:
    """One file of Q8_0 blocks and plain vectors."""
    import gguf
    import numpy as np

    numbers = np.random.default_rng(0).standard_normal((256 if tiny else 2048, 2048)).astype(np.float32)
    blocks = gguf.quants.quantize(numbers, gguf.GGMLQuantizationType.Q8_0)
    writer = gguf.GGUFWriter(folder / "model-Q8_0.gguf", "llama")
    for layer in range(2 if tiny else 48):
        writer.add_tensor(f"blk.{layer}.ffn_up.weight", blocks, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        writer.add_tensor(f"blk.{layer}.ffn_norm.weight", numbers[0])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _sentences(folder: Path, tiny: bool) -> None:
    """A BERT with pooling, as Sentence Transformers saves it."""
    import sentence_transformers

    bert = folder.with_name(f"{folder.name}-bert")
    _model("BertModel", _config("BertConfig", tiny, **_TEXT, num_hidden_layers=12, vocab_size=30522)).save_pretrained(
        bert
    )
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz"]
    (bert / "vocab.txt").write_text("\n".join(words))
    import transformers

    transformers.BertTokenizer(str(bert / "vocab.txt")).save_pretrained(bert)
    sentence_transformers.SentenceTransformer(str(bert), device="cpu").save_pretrained(str(folder))
    shutil.rmtree(bert)


# -- pipelines ----------------------------------------------------------------------------------------------------------


def _clip_text(tiny: bool, **more: Any) -> Any:
    options = {
        **_CLIP,
        "vocab_size": 16000,
        "projection_dim": 512,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 1,
    }
    return _model("CLIPTextModel", _config("CLIPTextConfig", tiny, **{**options, **more}))


def _vae(tiny: bool, **more: Any) -> Any:
    import diffusers

    widths = (32,) if tiny else (64, 128, 256, 256)
    return diffusers.AutoencoderKL(
        block_out_channels=widths, down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths), layers_per_block=1 if tiny else 2,
        **{"latent_channels": 4, **more},
    )  # fmt: skip


def _stable_diffusion(folder: Path, tiny: bool) -> None:
    """As Stable Diffusion 1.5, at half its width."""
    import diffusers
    import torch

    from tests import tiny_pipelines

    count = 2 if tiny else 4
    widths = (32, 64) if tiny else (96, 192, 384, 384)
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=widths, layers_per_block=1 if tiny else 2, sample_size=64, cross_attention_dim=512,
        down_block_types=("CrossAttnDownBlock2D",) * (count - 1) + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * (count - 1),
    )  # fmt: skip
    work = folder.with_name(f"{folder.name}-work")
    pipeline = diffusers.StableDiffusionPipeline(
        vae=_vae(tiny), text_encoder=_clip_text(tiny), tokenizer=tiny_pipelines._clip_tokenizer(work / "clip"), unet=unet,
        scheduler=tiny_pipelines._scheduler(), safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipeline.to(torch.bfloat16).save_pretrained(folder)
    shutil.rmtree(work)


def _flux(folder: Path, tiny: bool) -> None:
    """As Flux: a transformer in shards, CLIP, T5, VAE."""
    import diffusers
    import torch

    from tests import tiny_pipelines

    work = folder.with_name(f"{folder.name}-work")
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=64, num_layers=1, num_single_layers=1 if tiny else 4,
        attention_head_dim=128, num_attention_heads=2 if tiny else 8, joint_attention_dim=512, pooled_projection_dim=512,
    )  # fmt: skip
    t5 = _model("T5EncoderModel", _config("T5Config", tiny, d_model=512, d_ff=2048, d_kv=64, num_layers=4, num_heads=8))
    pipeline = diffusers.FluxPipeline(
        transformer=transformer, text_encoder=_clip_text(tiny), tokenizer=tiny_pipelines._clip_tokenizer(work / "clip"),
        text_encoder_2=t5, tokenizer_2=tiny_pipelines._t5_tokenizer(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=_vae(tiny, latent_channels=16, use_quant_conv=False, use_post_quant_conv=False),
    )  # fmt: skip
    pipeline.to(torch.bfloat16).save_pretrained(folder, max_shard_size=_SHARD)
    shutil.rmtree(work)


#: Name → what writes the model into an empty folder (its second argument: a tiny one).
MODELS: dict[str, Callable[[Path, bool], None]] = {
    "llama": _saved("LlamaForCausalLM", "LlamaConfig", **_LLAMA),
    "qwen3-moe": _saved(
        "Qwen3MoeForCausalLM", "Qwen3MoeConfig", hidden_size=768, intermediate_size=2048, num_hidden_layers=12,
        num_attention_heads=12, num_key_value_heads=4, head_dim=64, vocab_size=8000, moe_intermediate_size=256,
        num_experts=16, num_experts_per_tok=2,
    ),
    "gpt2": _saved("GPT2LMHeadModel", "GPT2Config", n_embd=768, n_layer=12, n_head=12, vocab_size=50257),
    "t5": _saved(
        "T5ForConditionalGeneration", "T5Config", d_model=768, d_ff=3072, d_kv=64, num_layers=6, num_heads=12,
        vocab_size=32128,
    ),
    "bert": _saved("BertForMaskedLM", "BertConfig", **_TEXT, num_hidden_layers=12, vocab_size=30522),
    "whisper": _saved(
        "WhisperForConditionalGeneration", "WhisperConfig", d_model=768, encoder_layers=6, decoder_layers=6,
        encoder_attention_heads=12, decoder_attention_heads=12, encoder_ffn_dim=3072, decoder_ffn_dim=3072,
        vocab_size=51865, bos_token_id=1, eos_token_id=2, pad_token_id=0, decoder_start_token_id=1,
    ),
    "vit": _saved("ViTForImageClassification", "ViTConfig", **_TEXT, num_hidden_layers=16, num_labels=1000),
    "mamba": _saved("MambaForCausalLM", "MambaConfig", hidden_size=768, num_hidden_layers=24, vocab_size=32000),
    "bin": _pickled,
    "gguf": _gguf,
    "sd15": _stable_diffusion,
    "flux": _flux,
    "sentences": _sentences,
}  # fmt: skip
