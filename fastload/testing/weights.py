"""Small weight files and models, made without torch."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping
from pathlib import Path

#: name → (dtype as safetensors spells it, shape, little-endian bytes)
Tensors = Mapping[str, tuple[str, tuple[int, ...], bytes]]

_ITEM_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "BF16": 2, "F16": 2, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}


def write_safetensors(path: Path | str, tensors: Tensors, metadata: Mapping[str, str] | None = None) -> Path:
    """Write *tensors* as a safetensors file, in the order given; return its path.

    The byte count of a tensor is not checked against dtype and shape, so that broken files can be made too.
    """
    header: dict[str, object] = {} if metadata is None else {"__metadata__": dict(metadata)}
    at = 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + len(data)]}
        at += len(data)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for _, _, data in tensors.values():
            f.write(data)
    return target


def random_tensor(dtype: str, shape: tuple[int, ...], seed: int | str = 0) -> tuple[str, tuple[int, ...], bytes]:
    """Return a tensor for :func:`write_safetensors`: the same for the same seed; floats are finite and small."""
    item_bytes = _ITEM_BYTES[dtype]
    data = bytearray(random.Random(seed).randbytes(math.prod(shape) * item_bytes))
    if dtype in ("F64", "F32", "F16", "BF16"):
        high = data[item_bytes - 1 :: item_bytes]
        data[item_bytes - 1 :: item_bytes] = bytes(0x3C ^ (b & 0x80) for b in high)  # exponent of about 1e-2, any sign
    elif dtype == "BOOL":
        data = bytearray(b & 1 for b in data)
    return dtype, shape, bytes(data)


def write_tiny_llama(
    folder: Path | str, *, shards: int = 2, layers: int = 2, hidden: int = 64, vocabulary: int = 256, seed: int = 0
) -> Path:
    """Write a Llama that transformers loads (bf16, safetensors in *shards*, no tokenizer); return its folder.

    With the defaults about 240 kB. The same arguments give the same bytes.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: random_tensor("BF16", shape, f"{seed}/{name}")
        for name, shape in _llama(layers, hidden, vocabulary).items()
    }
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16", "torch_dtype": "bfloat16",
        "hidden_size": hidden, "intermediate_size": 2 * hidden, "num_hidden_layers": layers, "vocab_size": vocabulary,
        "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 128, "rms_norm_eps": 1e-05,
        "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False, "hidden_act": "silu",
    }  # fmt: skip
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2})
    if shards == 1:
        write_safetensors(folder / "model.safetensors", tensors, {"format": "pt"})
        return folder
    names = list(tensors)
    per_shard = math.ceil(len(names) / shards)
    weight_map = {}
    for n in range(shards):
        file = f"model-{n + 1:05}-of-{shards:05}.safetensors"
        part = {name: tensors[name] for name in names[n * per_shard : (n + 1) * per_shard]}
        write_safetensors(folder / file, part, {"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    total = sum(len(data) for _, _, data in tensors.values())
    _write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})
    return folder


def _llama(layers: int, hidden: int, vocabulary: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for n in range(layers):
        layer = f"model.layers.{n}"
        shapes |= {f"{layer}.self_attn.{p}_proj.weight": (hidden, hidden) for p in "qkvo"}
        shapes |= {f"{layer}.mlp.{p}_proj.weight": (2 * hidden, hidden) for p in ("gate", "up")}
        shapes[f"{layer}.mlp.down_proj.weight"] = (hidden, 2 * hidden)
        shapes |= {f"{layer}.{p}_layernorm.weight": (hidden,) for p in ("input", "post_attention")}
    return {**shapes, "model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
