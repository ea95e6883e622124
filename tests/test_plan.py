"""Which files a load fetches, and in which ranges."""

from __future__ import annotations

from typing import Any

import pytest

from fastload.errors import NotFoundError
from fastload.plan import cut, natural_key, select, shards_of_index, split
from fastload.types import ByteRange, Manifest, RemoteFile

SIDE = ["config.json", "tokenizer.json", "README.md", ".gitattributes"]
SHARDS = [f"model-{n:05}-of-00012.safetensors" for n in range(1, 13)]
BIN_SHARDS = [f"pytorch_model-{n:05}-of-00002.bin" for n in (1, 2)]


def manifest(*paths: str) -> Manifest:
    return Manifest("org/m", "main", "c" * 40, "", tuple(RemoteFile(p, 10, None) for p in paths))


#: files beside SIDE, options, weights chosen
LAYOUTS: dict[str, tuple[list[str], dict[str, Any], list[str]]] = {
    "one file": (["model.safetensors"], {}, ["model.safetensors"]),
    "shards": ([*reversed(SHARDS), "model.safetensors.index.json"], {}, SHARDS),
    "one file goes before shards": (["model.safetensors", *SHARDS], {}, ["model.safetensors"]),
    "both kinds": (["model.safetensors", "pytorch_model.bin", *BIN_SHARDS], {}, ["model.safetensors"]),
    "bin alone": (["pytorch_model.bin", "tf_model.h5", "flax_model.msgpack"], {}, ["pytorch_model.bin"]),
    "bin in shards": (BIN_SHARDS, {}, BIN_SHARDS),
    "bin on request": (["model.safetensors", "pytorch_model.bin"], {"use_safetensors": False}, ["pytorch_model.bin"]),
    "safetensors on request": (["pytorch_model.bin"], {"use_safetensors": True}, []),
    "a second copy": (["model.safetensors", "consolidated.safetensors", "original/consolidated.00.pth"], {},
                      ["model.safetensors"]),
    "exports": (["model.safetensors", "onnx/model.onnx", "rust_model.ot", "model.tflite"], {}, ["model.safetensors"]),
    "a variant that was not asked for": (["model.safetensors", "model.fp16.safetensors"], {}, ["model.safetensors"]),
    "a variant": (["model.safetensors", "model.fp16.safetensors"], {"variant": "fp16"}, ["model.fp16.safetensors"]),
    "a variant in shards": (
        ["model.safetensors", "model.fp16-00001-of-00002.safetensors", "model.fp16-00002-of-00002.safetensors"],
        {"variant": "fp16"},
        ["model.fp16-00001-of-00002.safetensors", "model.fp16-00002-of-00002.safetensors"],
    ),
    "a variant of bin": (["model.safetensors", "pytorch_model.fp16.bin"], {"variant": "fp16"},
                         ["pytorch_model.fp16.bin"]),
    "a subfolder": (["model.safetensors", "sub/model.safetensors"], {"subfolder": "sub"}, ["sub/model.safetensors"]),
    "an adapter beside a model": (["model.safetensors", "adapter_model.safetensors"], {},
                                  ["adapter_model.safetensors", "model.safetensors"]),
    "an adapter": (["adapter_model.safetensors", "adapter_config.json"], {}, ["adapter_model.safetensors"]),
    "an adapter of bin": (["adapter_model.bin", "adapter_config.json"], {}, ["adapter_model.bin"]),
    "a stranger's format": (["weights.hello"], {}, ["weights.hello"]),
    "nothing": ([], {}, []),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_load_fetches_the_weights_that_from_pretrained_reads(name: str):
    files, options, weights = LAYOUTS[name]
    selection = select(manifest(*files, *SIDE), options=options)
    assert list(selection.weights) == weights
    chosen = [f.path for f in selection.files]
    assert {"config.json", "tokenizer.json"} <= set(chosen)
    assert chosen[len(chosen) - len(weights) :] == weights  # small files first
    assert chosen[0] == "config.json"


def test_prefetch_fetches_everything():
    files = [*SIDE, "model.safetensors", "pytorch_model.bin", "image.png", "onnx/model.onnx"]
    selection = select(manifest(*files), everything=True)
    assert sorted(f.path for f in selection.files) == sorted(files)
    assert set(selection.weights) == {"model.safetensors", "pytorch_model.bin", "onnx/model.onnx"}


@pytest.mark.parametrize(
    ("patterns", "files"),
    [
        (["*.json"], ["a/x.json", "config.json"]),
        (["a/"], ["a/b/y.bin", "a/x.json"]),
        (["*.bin", "config.json"], ["a/b/y.bin", "config.json"]),
        (["A/*"], None),
        ([], None),
    ],
)
def test_patterns_are_those_of_huggingface_hub(patterns: list[str], files: list[str] | None):
    listed = manifest("config.json", "a/x.json", "a/b/y.bin")
    if files is None:
        with pytest.raises(NotFoundError, match="none of its 3 files"):
            select(listed, patterns)
    else:
        assert sorted(f.path for f in select(listed, patterns).files) == files


def test_numbers_sort_as_numbers():
    assert sorted(["s-10", "s-9", "s-1", "t-2"], key=natural_key) == ["s-1", "s-9", "s-10", "t-2"]


@pytest.mark.parametrize(
    ("index", "shards"),
    [({"weight_map": {"a": "s-10", "b": "s-9", "c": "s-9"}}, ["s-9", "s-10"]), ({}, []), ({"weight_map": 3}, [])],
)
def test_an_index_names_its_shards(index: dict[str, Any], shards: list[str]):
    assert shards_of_index(index) == shards


@pytest.mark.parametrize(
    ("holes", "ranges"),
    [
        ([], []),
        ([(0, 10)], [(0, 8), (8, 10)]),
        ([(0, 8)], [(0, 8)]),
        ([(3, 20)], [(3, 8), (8, 16), (16, 20)]),  # aligned in the file, not in the hole
        ([(0, 1), (7, 9)], [(0, 1), (7, 8), (8, 9)]),
    ],
)
def test_holes_are_cut_where_ranges_of_the_file_begin(holes: list[Any], ranges: list[Any]):
    assert [(r.start, r.stop) for r in split([ByteRange(*h) for h in holes], 8)] == ranges


@pytest.mark.parametrize(("count", "middle"), [(-1, 5), (0, 5), (3, 8), (5, 10), (9, 10)])
def test_a_cut_never_leaves_its_range(count: int, middle: int):
    assert cut(ByteRange(5, 10), count) == (ByteRange(5, middle), ByteRange(middle, 10))


def test_modules_of_sentence_transformers_travel_as_small_files() -> None:
    paths = ["modules.json", "config.json", "model.safetensors", "pytorch_model.bin", "1_Pooling/config.json",
             "2_Dense/model.safetensors", "2_Dense/pytorch_model.bin", "onnx/model.onnx"]  # fmt: skip
    selection = select(manifest(*paths))
    assert selection.weights == ("model.safetensors",)
    assert "2_Dense/model.safetensors" in [f.path for f in selection.files]
    assert not [f.path for f in selection.files if f.path.endswith((".bin", ".onnx"))]
    old = select(manifest("modules.json", "0_Transformer/pytorch_model.bin", "1_Pooling/config.json"))
    assert old.weights == ("0_Transformer/pytorch_model.bin",)


def test_open_clip_has_weights_of_its_own_beside_others() -> None:
    paths = ["config.json", "open_clip_config.json", "model.safetensors", "open_clip_model.safetensors",
             "open_clip_pytorch_model.bin"]  # fmt: skip
    assert select(manifest(*paths)).weights == ("model.safetensors",)
    assert select(manifest(*paths), options={"framework": "open_clip"}).weights == ("open_clip_model.safetensors",)
    assert select(manifest("open_clip_pytorch_model.bin"), options={"framework": "open_clip"}).weights == (
        "open_clip_pytorch_model.bin",
    )
