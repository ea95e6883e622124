"""Models with made weights: real layouts and sizes, nothing downloaded, the same bytes on every machine.

    python -m tests.testbed.models --out DIR --only tiny     llama-tiny-bf16, llama-tiny-bin (8 MB each)
    python -m tests.testbed.models --out DIR --only llama    llama-1b-bf16, llama-1b-single (2.08 GB each)
    python -m tests.testbed.models --out DIR --only growth   other sizes and cuts (14 GB)

The weights come from the standard library's Mersenne twister, so neither torch nor numpy is needed (except for
``llama-tiny-bin``, a pickle that only torch writes). They are spread like trained ones, about 0.02 wide, and do not
compress.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import BinaryIO

CHUNK_BYTES = 16 << 20  # guessed: large enough for speed, small enough for a laptop
Shapes = dict[str, tuple[int, ...]]

# (top seven bits of a bf16 exponent, how many of 128 weights have it): the octave pairs of a normal distribution
# with a deviation of 0.02, rounded. 60 means 2**-7 to 2**-5.
_OCTAVES = ((61, 4), (60, 80), (59, 30), (58, 10), (57, 3), (56, 1))
_POSITIVE = bytes(high for high, count in _OCTAVES for _ in range(count))
_HIGH_BYTE = _POSITIVE + bytes(high | 0x80 for high in _POSITIVE)  # upper half: the same, negative
_NEAR_ONE = bytes(0x80 | (i & 7) for i in range(256))  # low byte of a bf16 between 1.0 and 1.055

_GIT_ATTRIBUTES = "".join(
    f"*.{s} filter=lfs diff=lfs merge=lfs -text\n" for s in ("safetensors", "bin", "gguf", "onnx")
)


@dataclass(frozen=True, slots=True)
class LlamaShape:
    """The fields of ``config.json`` that decide the shapes of a Llama with tied embeddings."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int

    def tensors(self) -> Shapes:
        """Return name and shape of every tensor, in the order of the model."""
        kv_size = self.hidden_size // self.num_attention_heads * self.num_key_value_heads
        layer = {
            "input_layernorm": (self.hidden_size,),
            "self_attn.q_proj": (self.hidden_size, self.hidden_size),
            "self_attn.k_proj": (kv_size, self.hidden_size),
            "self_attn.v_proj": (kv_size, self.hidden_size),
            "self_attn.o_proj": (self.hidden_size, self.hidden_size),
            "post_attention_layernorm": (self.hidden_size,),
            "mlp.gate_proj": (self.intermediate_size, self.hidden_size),
            "mlp.up_proj": (self.intermediate_size, self.hidden_size),
            "mlp.down_proj": (self.hidden_size, self.intermediate_size),
        }
        shapes: Shapes = {"model.embed_tokens.weight": (self.vocab_size, self.hidden_size)}
        for i in range(self.num_hidden_layers):
            shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
        return {**shapes, "model.norm.weight": (self.hidden_size,)}


TINY = LlamaShape(256, 688, 4, 8, 4, 4096)
SMALL = LlamaShape(1024, 2816, 3, 16, 8, 16000)
ONE_B = LlamaShape(2048, 8192, 16, 32, 8, 32000)
FIVE_B = LlamaShape(4096, 11008, 28, 32, 8, 32000)
SMALL_FILES = 1000


def _bf16(name: str, shape: tuple[int, ...]) -> Iterator[bytes]:
    """Yield the little-endian bytes of one tensor; they depend on its name alone, not on the file it stands in."""
    generator = random.Random(f"fastload test bed: {name}")
    left = prod(shape)
    while left:
        count = min(left, CHUNK_BYTES // 2)
        chunk = bytearray(2 * count)
        if "norm" in name:
            chunk[0::2] = generator.randbytes(count).translate(_NEAR_ONE)
            chunk[1::2] = b"\x3f" * count
        else:
            chunk[0::2] = generator.randbytes(count)
            chunk[1::2] = generator.randbytes(count).translate(_HIGH_BYTE)
        yield bytes(chunk)
        left -= count


def _bf16_size(shapes: Shapes) -> int:
    return sum(2 * prod(shape) for shape in shapes.values())


def _write_safetensors(file: BinaryIO, shapes: Shapes) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in sorted(shapes.items()):
        start, end = end, end + 2 * prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for name, shape in sorted(shapes.items()):
        for chunk in _bf16(name, shape):
            file.write(chunk)


def _split(shapes: Shapes, shard_bytes: int) -> list[Shapes]:
    """Cut *shapes* into shards as save_pretrained does: in order, each filled as far as it goes."""
    shards: list[Shapes] = [{}]
    for name, shape in shapes.items():
        if shards[-1] and _bf16_size(shards[-1]) + 2 * prod(shape) > shard_bytes:
            shards.append({})
        shards[-1][name] = shape
    return shards


def _write_weights(folder: Path, shapes: Shapes, shard_bytes: int | None) -> None:
    shards = [shapes] if shard_bytes is None else _split(shapes, shard_bytes)
    names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    if shard_bytes is None:
        names = ["model.safetensors"]
    else:
        weight_map = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        index = {"metadata": {"total_size": _bf16_size(shapes)}, "weight_map": weight_map}
        _write_json(folder / "model.safetensors.index.json", index)
    for name, shard in zip(names, shards, strict=True):
        with open(folder / name, "wb") as file:
            _write_safetensors(file, shard)


def _write_json(path: Path, data: object) -> None:
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _byte_letters() -> list[str]:
    """The letter that byte-level BPE writes for each byte: printable ones stand for themselves."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    spare = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(spare)) for byte in range(256)]


def _write_tokenizer(folder: Path) -> None:
    """A byte-level BPE without merges: a token a byte, which decodes to exactly what was encoded."""
    special = ("<unk>", "<s>", "</s>")
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    vocabulary = {token: i for i, token in enumerate([*special, *_byte_letters()])}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": token, **flags} for i, token in enumerate(special)],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": vocabulary, "merges": []},
    }
    _write_json(folder / "tokenizer.json", tokenizer)
    names = dict(zip(("unk_token", "bos_token", "eos_token"), special, strict=True))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 4096, **names}
    _write_json(folder / "tokenizer_config.json", config)


def _write_llama(folder: Path, title: str, shape: LlamaShape, shard_bytes: int | None) -> None:
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **asdict(shape),
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-06,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2})
    _write_tokenizer(folder)
    _write_weights(folder, shape.tensors(), shard_bytes)
    card = f"---\nlicense: mit\ntags:\n- random-weights\n---\n# {title}\n\nMade weights for load tests.\n"
    (folder / "README.md").write_text(card, encoding="utf-8")
    (folder / ".gitattributes").write_text(_GIT_ATTRIBUTES, encoding="utf-8")


def _write_tiny_bin(folder: Path) -> None:
    import torch

    _write_llama(folder, "llama-tiny-bin", TINY, None)
    (folder / "model.safetensors").unlink()
    state = {}
    for name, shape in TINY.tensors().items():
        data = bytearray(b"".join(_bf16(name, shape)))
        state[name] = torch.frombuffer(data, dtype=torch.bfloat16).reshape(shape)
    torch.save(state, folder / "pytorch_model.bin")


def _write_small_files(folder: Path) -> None:
    """No model: many files of 1 KB, each of other bytes, as repositories of tokenizers, voices or configs have."""
    for number in range(SMALL_FILES):
        (folder / f"f{number:04}.json").write_text(json.dumps({"number": number, "text": "x" * 996}))


#: Every model by the name of its folder. llama-tiny-bf16 and llama-1b-bf16 have five shards.
MODELS: dict[str, Callable[[Path], None]] = {
    "llama-tiny-bf16": lambda folder: _write_llama(folder, "llama-tiny-bf16", TINY, 2_000_000),
    "llama-tiny-bin": _write_tiny_bin,
    "llama-1b-bf16": lambda folder: _write_llama(folder, "llama-1b-bf16", ONE_B, 450_000_000),
    "llama-1b-single": lambda folder: _write_llama(folder, "llama-1b-single", ONE_B, None),
    "llama-1b-10-shards": lambda folder: _write_llama(folder, "llama-1b-10-shards", ONE_B, 225_000_000),
    "llama-1b-98-shards": lambda folder: _write_llama(folder, "llama-1b-98-shards", ONE_B, 8_400_000),
    "llama-100m-bf16": lambda folder: _write_llama(folder, "llama-100m-bf16", SMALL, 25_000_000),
    "llama-5b-bf16": lambda folder: _write_llama(folder, "llama-5b-bf16", FIVE_B, 2_000_000_000),
    "small-files": _write_small_files,
}
GROUPS = {
    "tiny": ("llama-tiny-bf16", "llama-tiny-bin"),
    "llama": ("llama-1b-bf16", "llama-1b-single"),
    "growth": ("llama-1b-10-shards", "llama-1b-98-shards", "llama-100m-bf16", "llama-5b-bf16", "small-files"),
}


def cache_folder() -> Path:
    """Return where made models are kept: ``$FASTLOAD_TESTBED`` or ``~/.cache/fastload-testbed``."""
    return Path(os.environ.get("FASTLOAD_TESTBED") or Path.home() / ".cache/fastload-testbed").expanduser()


def make(name: str, root: Path | None = None) -> Path:
    """Return the folder of the model *name* under *root*, made now unless it is there.

    It appears under its name only when it is complete, so that an interrupted run is never taken for a model and
    processes may ask for the same model at the same time.

    Args:
        root: ``models`` in :func:`cache_folder` when left out.
    """
    root = cache_folder() / "models" if root is None else root
    folder = root / name
    if folder.is_dir():
        return folder
    unfinished = root / f".{name}.{os.getpid()}"
    unfinished.mkdir(parents=True)
    try:
        MODELS[name](unfinished)
        unfinished.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def main() -> None:
    """Make the models of the groups that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=cache_folder() / "models")
    parser.add_argument("--only", choices=GROUPS, action="append")
    options = parser.parse_args()
    for group in options.only or ("tiny", "llama"):
        for name in GROUPS[group]:
            print(make(name, options.out), flush=True)


if __name__ == "__main__":
    main()
