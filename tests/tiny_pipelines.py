"""Tiny random diffusers pipelines, made from configs: nothing is downloaded, each is built in well under a second."""

from __future__ import annotations

import json
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

_CLIP = {"hidden_size": 32, "intermediate_size": 37, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 300,
         "projection_dim": 32, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}  # fmt: skip


def _clip_tokenizer(folder: Path) -> Any:
    """A tokenizer that spells words letter by letter."""
    letters = list(string.ascii_lowercase + string.digits + string.punctuation)
    tokens = ["<|startoftext|>", "<|pad|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({token: n for n, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return transformers.CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), pad_token="<|endoftext|>", model_max_length=77
    )


def _t5_tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers

    pieces = ["<pad>", "</s>", "<unk>", "▁", *string.ascii_lowercase]
    tokenizer = Tokenizer(models.Unigram([(piece, -float(n)) for n, piece in enumerate(pieces)], unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=32
    )


def _t5() -> Any:
    config = transformers.T5Config(d_model=32, d_ff=37, d_kv=8, num_layers=2, num_heads=4, vocab_size=64)
    return transformers.T5EncoderModel(config)


def _clip(kind: str = "CLIPTextModel") -> Any:
    return getattr(transformers, kind)(transformers.CLIPTextConfig(**_CLIP))


def _vae(channels: tuple[int, ...] = (4, 8), **more: Any) -> Any:
    return diffusers.AutoencoderKL(
        block_out_channels=channels, down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels), norm_num_groups=1, sample_size=32,
        **{"latent_channels": 4, **more},
    )  # fmt: skip


def _unet(**more: Any) -> Any:
    return diffusers.UNet2DConditionModel(
        block_out_channels=(8, 16), layers_per_block=1, sample_size=16, norm_num_groups=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        **{"cross_attention_dim": 32, "attention_head_dim": 8, **more},
    )  # fmt: skip


def _scheduler() -> Any:
    return diffusers.PNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1
    )


def _safety_checker() -> Any:
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker

    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 32, "patch_size": 16}  # fmt: skip
    return StableDiffusionSafetyChecker(transformers.CLIPConfig(vision_config=vision, projection_dim=8))


def stable_diffusion(work: Path) -> Any:
    """As Stable Diffusion 1.5, with a safety checker."""
    return diffusers.StableDiffusionPipeline(
        vae=_vae(), text_encoder=_clip(), tokenizer=_clip_tokenizer(work / "clip"), unet=_unet(), scheduler=_scheduler(),
        safety_checker=_safety_checker(),
        feature_extractor=transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32),
    )  # fmt: skip


def stable_diffusion_xl(work: Path) -> Any:
    """As Stable Diffusion XL: two text encoders."""
    tokenizer = _clip_tokenizer(work / "clip")
    unet = _unet(
        addition_embed_type="text_time", addition_time_embed_dim=8, transformer_layers_per_block=(1, 2),
        projection_class_embeddings_input_dim=6 * 8 + 32, cross_attention_dim=64, use_linear_projection=True,
    )  # fmt: skip
    return diffusers.StableDiffusionXLPipeline(
        vae=_vae(), text_encoder=_clip(), text_encoder_2=_clip("CLIPTextModelWithProjection"), tokenizer=tokenizer,
        tokenizer_2=tokenizer, unet=unet, scheduler=diffusers.EulerDiscreteScheduler(),
    )  # fmt: skip


def stable_diffusion_3(work: Path) -> Any:
    """As Stable Diffusion 3: a transformer and three text encoders."""
    tokenizer = _clip_tokenizer(work / "clip")
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=16, patch_size=1, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=4,
        caption_projection_dim=32, joint_attention_dim=32, pooled_projection_dim=64, out_channels=4,
    )  # fmt: skip
    return diffusers.StableDiffusion3Pipeline(
        transformer=transformer, vae=_vae((4,), shift_factor=0.06, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=_clip("CLIPTextModelWithProjection"), text_encoder_2=_clip("CLIPTextModelWithProjection"),
        text_encoder_3=_t5(), tokenizer=tokenizer, tokenizer_2=tokenizer, tokenizer_3=_t5_tokenizer(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
    )  # fmt: skip


def flux(work: Path) -> Any:
    """As Flux."""
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    return diffusers.FluxPipeline(
        transformer=transformer, text_encoder=_clip(), tokenizer=_clip_tokenizer(work / "clip"), text_encoder_2=_t5(),
        tokenizer_2=_t5_tokenizer(), scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=_vae((4,), latent_channels=1, shift_factor=0.06, use_quant_conv=False, use_post_quant_conv=False),
    )  # fmt: skip


#: Name → how to make the pipeline; the argument is an empty folder to work in.
PIPELINES: dict[str, Callable[[Path], Any]] = {
    "sd": stable_diffusion,
    "sdxl": stable_diffusion_xl,
    "sd3": stable_diffusion_3,
    "flux": flux,
}


def write_single_file(folder: Path, path: Path) -> Path:
    """Write the saved Stable Diffusion pipeline of *folder* as one checkpoint, under the names that its authors gave."""
    from safetensors.torch import load_file, save_file

    parts = {
        "model.diffusion_model.": (load_file(folder / "unet" / "diffusion_pytorch_model.safetensors"), _unet_name),
        "first_stage_model.": (load_file(folder / "vae" / "diffusion_pytorch_model.safetensors"), _vae_name),
        "cond_stage_model.transformer.text_model.": (
            load_file(folder / "text_encoder" / "model.safetensors"), lambda name: name.removeprefix("text_model.")
        ),
    }  # fmt: skip
    save_file({prefix + rename(n): t for prefix, (held, rename) in parts.items() for n, t in held.items()}, path)
    return path


#: Of a resnet, and of an attention of the VAE: the name in diffusers → the name in the checkpoint.
_RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
           "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}  # fmt: skip
_ATTENTION = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out", "group_norm": "norm"}
_AROUND = {"conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
           "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2"}  # fmt: skip


def _unet_name(name: str) -> str:
    """Return the name in a checkpoint of a parameter of :func:`_unet`: two blocks each way, of one layer and of two."""
    stem, _, kind = name.rpartition(".")
    if stem in _AROUND:
        return f"{_AROUND[stem]}.{kind}"
    where, *rest = name.split(".")
    if where == "mid_block":
        place = {("resnets", "0"): "0", ("attentions", "0"): "1", ("resnets", "1"): "2"}[rest[0], rest[1]]
        prefix, rest = f"middle_block.{place}", rest[1:]
    else:
        block, part, layer, *_ = rest
        first, count, side = (1, 2, "input") if where == "down_blocks" else (0, 2, "output")
        if part == "downsamplers":
            return f"input_blocks.{count * (int(block) + 1)}.0.op.{kind}"
        if part == "upsamplers":
            return f"output_blocks.{count * int(block) + 1}.2.conv.{kind}"
        number = first + count * int(block) + int(layer)
        prefix, rest = f"{side}_blocks.{number}.{0 if part == 'resnets' else 1}", rest[2:]
    inner = ".".join(rest[1:-1])
    return f"{prefix}.{_RESNET.get(inner, inner)}.{kind}"


def _vae_name(name: str) -> str:
    """Return the name in a checkpoint of a parameter of :func:`_vae` with two blocks each way."""
    name = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    for ours, theirs in _ATTENTION.items():
        name = name.replace(f"attentions.0.{ours}.", f"attentions.0.{theirs}.")
    name = name.replace("mid_block.attentions.0", "mid.attn_1")
    for layer in (0, 1):
        name = name.replace(f"mid_block.resnets.{layer}", f"mid.block_{layer + 1}")
        name = name.replace(f"down_blocks.{layer}.", f"down.{layer}.").replace(
            f"up_blocks.{layer}.", f"up.{1 - layer}."
        )
    name = name.replace("downsamplers.0", "downsample").replace("upsamplers.0", "upsample")
    return name.replace(".resnets.", ".block.")


def image(pipeline: Any) -> torch.Tensor:
    """Return what *pipeline* paints under one seed, in two steps."""
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator("cpu").manual_seed(3)
    options: dict[str, Any] = {"guidance_scale": 3.0, "generator": generator, "num_inference_steps": 2}
    name = type(pipeline).__name__
    options |= {"max_sequence_length": 16} if name in ("StableDiffusion3Pipeline", "FluxPipeline") else {}
    size = 8 if name in ("StableDiffusion3Pipeline", "FluxPipeline") else 16
    return pipeline("a cat", height=size, width=size, output_type="pt", **options).images
