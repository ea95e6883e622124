"""Tiny models with random weights, of every kind of architecture whose weights load in a way of their own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

TOKENS = {"vocab_size": 96, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
#: Decoders with grouped key and value heads.
GROUPED = {**SMALL, **TOKENS, "num_key_value_heads": 2, "head_dim": 8}
#: Encoders.
TEXT = {**SMALL, "vocab_size": 96, "max_position_embeddings": 64}
EXPERTS = {**GROUPED, "moe_intermediate_size": 16, "num_experts": 3, "num_experts_per_tok": 2}
PICTURE = {**SMALL, "image_size": 32, "patch_size": 8, "num_channels": 3}
#: Encoder and decoder of the BART family.
BOTH = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 64, "vocab_size": 96,
}  # fmt: skip
SPEECH = {
    **SMALL, "vocab_size": 32, "conv_dim": (16, 16), "conv_kernel": (4, 4), "conv_stride": (4, 4),
    "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2,
}  # fmt: skip
RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}


@dataclass(frozen=True)
class Architecture:
    """One tiny model.

    Attributes:
        why: What is its own about the way it loads.
        options: Of its config.
        since: First version of transformers that has it, or has it so.
    """

    why: str
    model: str
    config: str
    options: Mapping[str, Any] = field(default_factory=dict)
    since: str = "5.0"

    def make(self) -> Any:
        """Return a model whose every weight and persistent buffer is random, so that none passes for its initial value."""
        config = getattr(transformers, self.config)(**self.options)
        torch.manual_seed(0)
        model = getattr(transformers, self.model)(config)
        with torch.no_grad():
            for tensor in model.state_dict().values():
                if tensor.is_floating_point():
                    tensor.uniform_(0.01, 1)
        return model

    def save(self, folder: Path, dtype: Any = torch.bfloat16, shard: str = "10KB", **options: Any) -> Path:
        """Save the model in shards under *folder*."""
        self.make().to(dtype).save_pretrained(folder, max_shard_size=shard, **options)
        return folder


def _a(why: str, model: str, config: str, since: str = "5.0", **options: Any) -> Architecture:
    return Architecture(why, model, config, options, since)


ZOO: dict[str, Architecture] = {
    # decoders
    "llama": _a("plain", "LlamaForCausalLM", "LlamaConfig", **GROUPED),
    "llama-tied": _a("tied head", "LlamaForCausalLM", "LlamaConfig", **GROUPED, tie_word_embeddings=True),
    "mistral": _a("sliding windows", "MistralForCausalLM", "MistralConfig", **GROUPED, sliding_window=8),
    "qwen2": _a("biases, tied head", "Qwen2ForCausalLM", "Qwen2Config", **GROUPED, tie_word_embeddings=True),
    "qwen3": _a("norms of queries and keys", "Qwen3ForCausalLM", "Qwen3Config", **GROUPED),
    "phi": _a("partial rotary", "PhiForCausalLM", "PhiConfig", **SMALL, **TOKENS),
    "phi3": _a("fused projections", "Phi3ForCausalLM", "Phi3Config", **SMALL, **TOKENS, num_key_value_heads=2),
    "gemma2": _a("soft caps, tied head", "Gemma2ForCausalLM", "Gemma2Config", **GROUPED),
    "gemma3": _a("two rotary tables, scaled embedding", "Gemma3ForCausalLM", "Gemma3TextConfig", **GROUPED),
    "falcon": _a("fused heads", "FalconForCausalLM", "FalconConfig", **SMALL, **TOKENS),
    "bloom": _a("alibi, fused heads", "BloomForCausalLM", "BloomConfig", hidden_size=32, n_layer=2, n_head=4, vocab_size=96),
    "opt": _a("learned positions, tied head", "OPTForCausalLM", "OPTConfig",
              **SMALL, **TOKENS, ffn_dim=64, word_embed_proj_dim=32, max_position_embeddings=64),
    "gpt2": _a("Conv1D, tied head", "GPT2LMHeadModel", "GPT2Config", n_embd=32, n_layer=2, n_head=4, n_positions=64, **TOKENS),
    "gptj": _a("sines of positions as a buffer", "GPTJForCausalLM", "GPTJConfig",
               n_embd=32, n_layer=2, n_head=4, n_positions=64, rotary_dim=4, **TOKENS),
    "gpt-neox": _a("fused heads, two names for the head", "GPTNeoXForCausalLM", "GPTNeoXConfig", **SMALL, **TOKENS),
    "mamba": _a("A_log and D kept in float32", "MambaForCausalLM", "MambaConfig",
                hidden_size=32, state_size=8, num_hidden_layers=2, vocab_size=96),
    # experts, merged while they load
    "mixtral": _a("experts merged", "MixtralForCausalLM", "MixtralConfig", **GROUPED, num_local_experts=3),
    "qwen3-moe": _a("experts merged", "Qwen3MoeForCausalLM", "Qwen3MoeConfig", **EXPERTS),
    "deepseek-v3": _a("experts merged, latent attention, a bias as buffer", "DeepseekV3ForCausalLM", "DeepseekV3Config",
                      **SMALL, **TOKENS, num_key_value_heads=4, moe_intermediate_size=16, n_routed_experts=4, n_group=2,
                      topk_group=1, num_experts_per_tok=2, first_k_dense_replace=1, kv_lora_rank=8, q_lora_rank=8,
                      qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8),
    "gpt-oss": _a("experts as one tensor with biases, sinks", "GptOssForCausalLM", "GptOssConfig",
                  **GROUPED, num_local_experts=3, num_experts_per_tok=2),
    "jamba": _a("Mamba and experts by turns", "JambaForCausalLM", "JambaConfig",
                **SMALL, **TOKENS, num_key_value_heads=2, num_experts=2, mamba_d_state=8, mamba_dt_rank=4,
                attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, use_mamba_kernels=False),
    # encoders
    "bert": _a("tied decoder, positions as a buffer", "BertForMaskedLM", "BertConfig", **TEXT),
    "roberta": _a("head with a tied bias", "RobertaForMaskedLM", "RobertaConfig", **TEXT),
    "distilbert": _a("vocab projector", "DistilBertForMaskedLM", "DistilBertConfig",
                     dim=32, hidden_dim=64, n_layers=2, n_heads=4, vocab_size=96, max_position_embeddings=64),
    "electra": _a("generator, tied", "ElectraForMaskedLM", "ElectraConfig", **TEXT, embedding_size=16),
    "deberta-v2": _a("relative positions, legacy head", "DebertaV2ForMaskedLM", "DebertaV2Config",
                     **TEXT, relative_attention=True, pos_att_type=["p2c", "c2p"], position_buckets=8),
    "albert": _a("one layer for all", "AlbertForMaskedLM", "AlbertConfig", **TEXT, embedding_size=16),
    "modernbert": _a("rotary tables for two kinds of layers", "ModernBertForMaskedLM", "ModernBertConfig",
                     **TEXT, pad_token_id=0),
    # encoder and decoder
    "t5": _a("three ties, kept in float32", "T5ForConditionalGeneration", "T5Config",
             d_model=32, d_ff=64, d_kv=8, num_layers=2, num_heads=4, vocab_size=96),
    "bart": _a("ties, a bias as buffer", "BartForConditionalGeneration", "BartConfig", **BOTH),
    "marian": _a("sines of positions, not tied twice", "MarianMTModel", "MarianConfig",
                 **BOTH, pad_token_id=0, decoder_start_token_id=0, forced_eos_token_id=2, eos_token_id=2),
    "m2m-100": _a("positions made anew", "M2M100ForConditionalGeneration", "M2M100Config", **BOTH),
    "encoder-decoder": _a("two models in one", "EncoderDecoderModel", "EncoderDecoderConfig",
                          encoder={"model_type": "bert", **TEXT},
                          decoder={"model_type": "bert", **TEXT, "is_decoder": True, "add_cross_attention": True}),
    # sound
    "whisper": _a("fixed sines, tied head", "WhisperForConditionalGeneration", "WhisperConfig",
                  **{**BOTH, **TOKENS}, num_mel_bins=8, max_source_positions=16, max_target_positions=16,
                  decoder_start_token_id=1),
    "wav2vec2": _a("weight norm as parametrisation", "Wav2Vec2ForCTC", "Wav2Vec2Config", **SPEECH),
    "hubert": _a("weight norm, masked embedding", "HubertModel", "HubertConfig", **SPEECH),
    # pictures
    "vit": _a("class token", "ViTForImageClassification", "ViTConfig", **PICTURE, num_labels=3),
    "dinov2": _a("layer scale", "Dinov2Model", "Dinov2Config", **PICTURE),
    "swin": _a("index of positions as a buffer", "SwinForImageClassification", "SwinConfig",
               image_size=32, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=4),
    "resnet": _a("batch norms with counters", "ResNetForImageClassification", "ResNetConfig", **RESNET, num_labels=3),
    "detr": _a("frozen batch norms, a backbone inside", "DetrForObjectDetection", "DetrConfig",
               d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4,
               encoder_ffn_dim=32, decoder_ffn_dim=32, num_queries=4, num_labels=3, use_timm_backbone=False,
               use_pretrained_backbone=False, backbone=None,
               backbone_config=transformers.ResNetConfig(**RESNET, out_features=["stage2"])),
    "sam": _a("one embedding in two places", "SamModel", "SamConfig",
              vision_config={**PICTURE, "output_channels": 16, "mlp_dim": 32, "window_size": 2, "global_attn_indexes": [1],
                             "num_pos_feats": 8},
              prompt_encoder_config={"hidden_size": 16, "image_size": 32, "patch_size": 8, "mask_input_channels": 4},
              mask_decoder_config={"hidden_size": 16, "mlp_dim": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
                                   "iou_head_hidden_dim": 16}),
    # pictures and text
    "clip": _a("two towers, positions as buffers", "CLIPModel", "CLIPConfig",
               text_config={**TEXT, "projection_dim": 16}, vision_config={**PICTURE, "projection_dim": 16}, projection_dim=16),
    "siglip": _a("a head with a plain parameter", "SiglipModel", "SiglipConfig", text_config=TEXT, vision_config=PICTURE),
    "blip": _a("tied text decoder", "BlipForConditionalGeneration", "BlipConfig",
               text_config={**TEXT, "encoder_hidden_size": 32, "projection_dim": 16, "bos_token_id": 1, "eos_token_id": 2,
                            "pad_token_id": 0, "sep_token_id": 2},
               vision_config={**PICTURE, "projection_dim": 16}, projection_dim=16),
    "llava": _a("vision-language: names rewritten", "LlavaForConditionalGeneration", "LlavaConfig",
                text_config={"model_type": "llama", **GROUPED}, vision_config={"model_type": "clip_vision_model", **PICTURE},
                image_token_index=95),
    "qwen2-vl": _a("vision-language: names rewritten", "Qwen2VLForConditionalGeneration", "Qwen2VLConfig",
                   text_config={**GROUPED, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4,
                                                                "mrope_section": [1, 1, 2]}},
                   vision_config={"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "patch_size": 4},
                   image_token_id=90, video_token_id=91, vision_start_token_id=92, vision_end_token_id=93),
    "gemma3-vl": _a("vision-language, tied head", "Gemma3ForConditionalGeneration", "Gemma3Config",
                    text_config=GROUPED, vision_config={**PICTURE, "vision_use_head": False}, mm_tokens_per_image=4,
                    boi_token_index=90, eoi_token_index=91, image_token_index=92),
}  # fmt: skip
