"""Which weights of a pipeline travel: those that diffusers would take, and nothing that only others read."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fastload.asking import ask
from fastload.errors import UnsupportedSourceError
from fastload.plan import select
from fastload.testing import Hub
from fastload.types import Manifest, RemoteFile

SD15 = """
    README.md model_index.json v1-5-pruned.safetensors v1-5-pruned-emaonly.ckpt v1-inference.yaml preview.png
    feature_extractor/preprocessor_config.json scheduler/scheduler_config.json
    safety_checker/config.json safety_checker/model.fp16.safetensors safety_checker/model.safetensors
    safety_checker/pytorch_model.bin safety_checker/pytorch_model.fp16.bin
    text_encoder/config.json text_encoder/model.fp16.safetensors text_encoder/model.safetensors
    text_encoder/pytorch_model.bin text_encoder/pytorch_model.fp16.bin
    tokenizer/merges.txt tokenizer/special_tokens_map.json tokenizer/tokenizer_config.json tokenizer/vocab.json
    unet/config.json unet/diffusion_pytorch_model.bin unet/diffusion_pytorch_model.fp16.bin
    unet/diffusion_pytorch_model.fp16.safetensors unet/diffusion_pytorch_model.non_ema.safetensors
    unet/diffusion_pytorch_model.safetensors
    vae/config.json vae/diffusion_pytorch_model.bin vae/diffusion_pytorch_model.fp16.safetensors
    vae/diffusion_pytorch_model.fp16.bin vae/diffusion_pytorch_model.safetensors
""".split()
SDXL = """
    model_index.json sd_xl_base_1.0.safetensors sd_xl_offset_example-lora_1.0.safetensors
    scheduler/scheduler_config.json
    text_encoder/config.json text_encoder/flax_model.msgpack text_encoder/model.fp16.safetensors text_encoder/model.onnx
    text_encoder/model.safetensors text_encoder/openvino_model.bin text_encoder/openvino_model.xml
    text_encoder_2/config.json text_encoder_2/model.fp16.safetensors text_encoder_2/model.safetensors
    text_encoder_2/model.onnx text_encoder_2/model.onnx_data
    tokenizer/vocab.json tokenizer_2/vocab.json
    unet/config.json unet/diffusion_flax_model.msgpack unet/diffusion_pytorch_model.fp16.safetensors
    unet/diffusion_pytorch_model.safetensors unet/model.onnx unet/openvino_model.bin
    vae/config.json vae/diffusion_pytorch_model.fp16.safetensors vae/diffusion_pytorch_model.safetensors
    vae_decoder/config.json vae_decoder/model.onnx vae_decoder/openvino_model.bin
""".split()
FLUX = """
    model_index.json ae.safetensors flux1-dev.safetensors scheduler/scheduler_config.json
    text_encoder/config.json text_encoder/model.safetensors
    text_encoder_2/config.json text_encoder_2/model-00001-of-00002.safetensors
    text_encoder_2/model-00002-of-00002.safetensors text_encoder_2/model.safetensors.index.json
    tokenizer/vocab.json tokenizer_2/spiece.model tokenizer_2/tokenizer.json
    transformer/config.json transformer/diffusion_pytorch_model-00001-of-00002.safetensors
    transformer/diffusion_pytorch_model-00002-of-00002.safetensors
    transformer/diffusion_pytorch_model.safetensors.index.json
    vae/config.json vae/diffusion_pytorch_model.safetensors
""".split()
SHARDED_VARIANT = """
    model_index.json
    text_encoder/config.json text_encoder/model.safetensors text_encoder/model.fp16-00001-of-00002.safetensors
    text_encoder/model.fp16-00002-of-00002.safetensors text_encoder/model.safetensors.index.fp16.json
    unet/config.json unet/diffusion_pytorch_model-00001-of-00002.fp16.safetensors
    unet/diffusion_pytorch_model-00002-of-00002.fp16.safetensors unet/diffusion_pytorch_model.safetensors
    vae/config.json vae/diffusion_pytorch_model.safetensors
""".split()
PICKLED = """
    model_index.json scheduler/scheduler_config.json text_encoder/config.json text_encoder/pytorch_model.bin
    unet/config.json unet/diffusion_pytorch_model.bin unet/diffusion_pytorch_model.safetensors
    vae/config.json vae/diffusion_pytorch_model.bin vae/diffusion_pytorch_model.safetensors
""".split()
ONNX = """
    model_index.json scheduler/scheduler_config.json text_encoder/model.onnx unet/model.onnx unet/weights.pb
    vae_decoder/model.onnx tokenizer/vocab.json
""".split()
REPOS = {"sd15": SD15, "sdxl": SDXL, "flux": FLUX, "shards": SHARDED_VARIANT, "pickled": PICKLED}

#: repository, options → the weights that travel
CHOICES: list[tuple[str, dict[str, Any], str]] = [
    ("sd15", {}, """safety_checker/model.safetensors text_encoder/model.safetensors
     unet/diffusion_pytorch_model.safetensors vae/diffusion_pytorch_model.safetensors"""),
    ("sd15", {"variant": "fp16"}, """safety_checker/model.fp16.safetensors text_encoder/model.fp16.safetensors
     unet/diffusion_pytorch_model.fp16.safetensors vae/diffusion_pytorch_model.fp16.safetensors"""),
    ("sd15", {"variant": "non_ema"}, """safety_checker/model.safetensors text_encoder/model.safetensors
     unet/diffusion_pytorch_model.non_ema.safetensors vae/diffusion_pytorch_model.safetensors"""),
    ("sd15", {"use_safetensors": False}, """safety_checker/pytorch_model.bin text_encoder/pytorch_model.bin
     unet/diffusion_pytorch_model.bin vae/diffusion_pytorch_model.bin"""),
    ("sd15", {"use_safetensors": False, "variant": "fp16"}, """safety_checker/pytorch_model.fp16.bin
     text_encoder/pytorch_model.fp16.bin unet/diffusion_pytorch_model.fp16.bin vae/diffusion_pytorch_model.fp16.bin"""),
    ("sd15", {"components": ["safety_checker", "unet", "torch_dtype"]}, """text_encoder/model.safetensors
     vae/diffusion_pytorch_model.safetensors"""),
    ("sdxl", {}, """text_encoder/model.safetensors text_encoder_2/model.safetensors
     unet/diffusion_pytorch_model.safetensors vae/diffusion_pytorch_model.safetensors"""),
    ("sdxl", {"variant": "fp16"}, """text_encoder/model.fp16.safetensors text_encoder_2/model.fp16.safetensors
     unet/diffusion_pytorch_model.fp16.safetensors vae/diffusion_pytorch_model.fp16.safetensors"""),
    ("flux", {}, """text_encoder/model.safetensors text_encoder_2/model-00001-of-00002.safetensors
     text_encoder_2/model-00002-of-00002.safetensors transformer/diffusion_pytorch_model-00001-of-00002.safetensors
     transformer/diffusion_pytorch_model-00002-of-00002.safetensors vae/diffusion_pytorch_model.safetensors"""),
    ("shards", {"variant": "fp16"}, """text_encoder/model.fp16-00001-of-00002.safetensors
     text_encoder/model.fp16-00002-of-00002.safetensors unet/diffusion_pytorch_model-00001-of-00002.fp16.safetensors
     unet/diffusion_pytorch_model-00002-of-00002.fp16.safetensors vae/diffusion_pytorch_model.safetensors"""),
    ("shards", {}, """text_encoder/model.safetensors unet/diffusion_pytorch_model.safetensors
     vae/diffusion_pytorch_model.safetensors"""),
    ("pickled", {}, """text_encoder/pytorch_model.bin unet/diffusion_pytorch_model.bin
     vae/diffusion_pytorch_model.bin"""),
    ("pickled", {"components": ["text_encoder"]}, """unet/diffusion_pytorch_model.safetensors
     vae/diffusion_pytorch_model.safetensors"""),
]  # fmt: skip


def manifest(*paths: str) -> Manifest:
    return Manifest("org/pipe", "main", "0" * 40, "", tuple(RemoteFile(path, 1, None) for path in paths))


@pytest.mark.parametrize(
    ("repo", "options", "expected"), CHOICES, ids=lambda v: v if isinstance(v, str) and v in REPOS else ""
)
def test_weights_of_a_pipeline(repo: str, options: dict[str, Any], expected: str):
    assert set(select(manifest(*REPOS[repo]), options=options).weights) == set(expected.split())


def test_configs_and_tokenizers_travel_and_pictures_and_other_frameworks_do_not():
    for paths in (SD15, SDXL, FLUX):
        chosen = {f.path for f in select(manifest(*paths)).files}
        assert {p for p in paths if p.endswith((".json", ".txt", ".model"))} <= chosen
        assert not [
            p for p in chosen if p.endswith((".png", ".ckpt", ".msgpack", ".onnx", ".onnx_data", "openvino_model.bin"))
        ]


def test_onnx_pipeline_takes_what_its_runtime_reads():
    assert set(select(manifest(*ONNX)).weights) == {p for p in ONNX if p.endswith((".onnx", ".pb"))}
    assert "unet/model.onnx" in select(manifest(*SDXL), options={"use_onnx": True}).weights


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"subfolder": "unet"}, {"unet/diffusion_pytorch_model.safetensors"}),
        ({"subfolder": "unet/"}, {"unet/diffusion_pytorch_model.safetensors"}),
        ({"subfolder": "unet", "variant": "fp16"}, {"unet/diffusion_pytorch_model.fp16.safetensors"}),
        ({"subfolder": "text_encoder", "use_safetensors": False}, {"text_encoder/pytorch_model.bin"}),
        ({"subfolder": "unet", "variant": "bf16"}, set()),
    ],
    ids=str,
)
def test_subfolder_takes_one_model_of_a_pipeline(options: dict[str, Any], expected: set[str]):
    assert set(select(manifest(*SD15), options=options).weights) == expected


def test_pipeline_without_any_weights_to_fetch_has_none():
    names = ["safety_checker", "text_encoder", "unet", "vae"]
    assert select(manifest(*SD15), options={"components": names}).weights == ()


class Brought:
    """Stands in for a model."""

    from_pretrained = None


def test_components_are_what_could_be_one():
    options = {"unet": Brought(), "safety_checker": None, "variant": None, "torch_dtype": "float16", "revision": "x"}
    assert ask("org/pipe", options=options).request.options == {"components": ["safety_checker", "unet"]}


def test_call_with_components_may_join_a_transfer_without():
    with_unet, without = (
        ask("org/pipe", options=o) for o in ({"unet": Brought(), "variant": "fp16"}, {"variant": "fp16"})
    )
    assert with_unet.key != without.key == with_unet.key_of_more


# -- formats that no from_pretrained looks for ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("paths", "expected"),
    [
        ("config.json net.pth optimizer.pth rng_state_0.pth", {"net.pth"}),
        ("a.pt b.pth", {"a.pt"}),
        ("last.ckpt", {"last.ckpt"}),
        ("model.gguf config.json", {"model.gguf"}),
        ("m-q4-00001-of-00002.gguf m-q4-00002-of-00002.gguf", {"m-q4-00001-of-00002.gguf", "m-q4-00002-of-00002.gguf"}),
        ("a.pth b.gguf model.safetensors", {"model.safetensors"}),
        ("pytorch_model.bin training_args.bin", {"pytorch_model.bin"}),
        ("weights.bin training_args.bin optimizer.bin", {"weights.bin"}),
    ],
)
def test_other_formats_are_taken_where_there_is_nothing_better(paths: str, expected: set[str]):
    assert set(select(manifest(*paths.split())).weights) == expected


def test_several_gguf_models_are_for_the_user_to_choose_from():
    files = manifest("m-Q4_K_M.gguf", "m-Q8_0.gguf", "config.json")
    with pytest.raises(
        UnsupportedSourceError, match=r"org/pipe holds 2 GGUF models: m-Q4_K_M\.gguf, m-Q8_0\.gguf"
    ) as caught:
        select(files)
    assert 'files=["m-Q4_K_M.gguf"' in str(caught.value.hint)
    assert select(files, options={"gguf_file": "m-Q8_0.gguf"}).weights == ("m-Q8_0.gguf",)
    assert select(files, ["*Q8_0.gguf"]).weights == ("m-Q8_0.gguf",)


# -- diffusers itself -------------------------------------------------------------------------------------------------

_DOWNLOAD = """
import json, os, sys
from diffusers import DiffusionPipeline
found = []
for repo, options in json.loads(sys.argv[1]):
    path = DiffusionPipeline.download("org/" + repo, **options)
    found.append([os.path.relpath(os.path.join(d, f), path) for d, _, fs in os.walk(path) for f in fs])
print(json.dumps(found))
"""


@pytest.mark.diffusers
def test_diffusers_makes_the_same_choice(make_hub: Any, tmp_path: Path):
    pytest.importorskip("diffusers")

    def content(name: str) -> dict[str, bytes]:
        folders = sorted({path.partition("/")[0] for path in REPOS[name] if "/" in path})
        index: dict[str, Any] = {"_class_name": "DiffusionPipeline", "_diffusers_version": "0.42.1"}
        index |= {f: ["diffusers", "Any"] for f in folders if f != "vae_decoder"}
        texts = {path: f"{name} {path}".encode() for path in REPOS[name]}
        return {**texts, "model_index.json": json.dumps(index).encode()}

    # A repository each: into a cache that holds some of it already, diffusers fetches the rest alone.
    cases = [
        (f"{repo}-{n}", repo, options) for n, (repo, options, _) in enumerate(CHOICES) if "components" not in options
    ]
    hub: Hub = make_hub({f"org/{name}": content(repo) for name, repo, _ in cases})
    environment = {**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path)}
    asked = json.dumps([(name, options) for name, _, options in cases])
    command = [sys.executable, "-c", _DOWNLOAD, asked]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    for (name, repo, options), paths in zip(cases, json.loads(done.stdout.splitlines()[-1]), strict=True):
        chosen = select(manifest(*REPOS[repo]), options=options)
        weights = {p for p in paths if p.endswith((".safetensors", ".bin"))}
        assert weights == set(chosen.weights), name
        assert set(paths) <= {f.path for f in chosen.files}
