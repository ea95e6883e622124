"""A model that is built while its weights arrive is the one that ``from_pretrained`` gives, bit for bit."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import safetensors  # noqa: E402
from arrival import demanded  # noqa: E402
from building import Builder  # noqa: E402
from compare import diff_models  # noqa: E402

from fastload.errors import (  # noqa: E402
    DownloadError,
    FormatError,
    PluginError,
    SettingsError,
    UnsupportedSourceError,
    to_record,
)

pytestmark = pytest.mark.transformers

TOKENS = {"vocab_size": 96, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def llama(**more: Any) -> Any:
    config = transformers.LlamaConfig(**SMALL, **TOKENS, num_key_value_heads=2, **more)
    return transformers.LlamaForCausalLM(config)


#: Name → how to make a tiny random model.
ZOO: dict[str, Callable[[], Any]] = {
    "llama": llama,
    "llama-tied": lambda: llama(tie_word_embeddings=True),
    "bert": lambda: transformers.BertForMaskedLM(transformers.BertConfig(**SMALL, vocab_size=96)),
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, **TOKENS)
    ),
    "t5-tied": lambda: transformers.T5ForConditionalGeneration(
        transformers.T5Config(d_model=32, d_ff=64, d_kv=8, num_layers=2, num_heads=4, vocab_size=96)
    ),
    "mixtral": lambda: transformers.MixtralForCausalLM(
        transformers.MixtralConfig(**SMALL, **TOKENS, num_key_value_heads=2, num_local_experts=3)
    ),
}


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return the folder of a saved model, made once."""
    root = tmp_path_factory.mktemp("zoo")
    transformers.utils.logging.disable_progress_bar()

    def saved(name: str, dtype: Any = torch.bfloat16, shard: str = "20KB", **options: Any) -> Path:
        folder = root / f"{name}-{dtype}-{shard}-{options}".replace("/", "-")
        if not folder.exists():
            torch.manual_seed(0)
            ZOO[name]().to(dtype).save_pretrained(folder, max_shard_size=shard, **options)
        return Path(folder)

    return saved


@pytest.fixture
def builder(tmp_path: Path) -> Iterator[Builder]:
    """Builds models; everything is given back after the test."""
    made = Builder(tmp_path)
    yield made
    made.close()


def class_of(folder: Path) -> Any:
    return getattr(transformers, json.loads((folder / "config.json").read_text())["architectures"][0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", ZOO)
def test_streamed_model_is_the_plain_one(zoo: Any, builder: Builder, name: str, dtype: Any) -> None:
    folder = zoo(name, dtype)
    assert len(list(folder.glob("*.safetensors"))) > 1
    model, arrival = builder.streamed(folder)
    assert diff_models(model, builder.plain(arrival, class_of(folder))) == []
    assert model.name_or_path == model.config.name_or_path == "org/model"
    assert safetensors.safe_open is KEPT["real"]


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": "float32"},
        {"dtype": torch.float16},
        {"dtype": "auto"},
        {"attn_implementation": "eager"},
        {"device_map": "cpu"},
        {"device_map": "auto"},
        {"output_attentions": True},
        {"low_cpu_mem_usage": True},
        {"key_mapping": {"^model.layers.0.": "model.layers.1."}},
    ],
    ids=str,
)
def test_options_of_from_pretrained_do_what_they_do(zoo: Any, builder: Builder, options: dict[str, Any]) -> None:
    folder = zoo("llama")
    model, arrival = builder.streamed(folder, **options)
    assert diff_models(model, builder.plain(arrival, transformers.LlamaForCausalLM, **options)) == []


def test_loading_info_is_returned_as_from_pretrained_does(zoo: Any, builder: Builder) -> None:
    (model, info), arrival = builder.streamed(zoo("bert"), auto_class="AutoModel", output_loading_info=True)
    plain, plain_info = builder.plain(arrival, transformers.AutoModel, output_loading_info=True)
    assert info == plain_info
    assert info["missing_keys"] and info["unexpected_keys"]
    assert diff_models(model, plain) == []


def test_log_lines_are_those_of_from_pretrained(zoo: Any, builder: Builder) -> None:
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("transformers").addHandler(handler)
    try:
        _, arrival = builder.streamed(zoo("bert"), auto_class="AutoModel")
        ours = lines.copy()
        lines.clear()
        builder.plain(arrival, transformers.AutoModel)
    finally:
        logging.getLogger("transformers").removeHandler(handler)
    assert ours == lines
    assert any("LOAD REPORT" in line and "org/model" in line for line in lines)


def test_mismatched_sizes_raise_or_pass_as_they_do_plainly(zoo: Any, builder: Builder) -> None:
    folder = zoo("bert")
    options: dict[str, Any] = {"auto_class": "BertForMaskedLM", "vocab_size": 50}
    with pytest.raises(RuntimeError) as ours:
        builder.streamed(folder, **options)
    arrival = builder.arrivals[-1]
    with pytest.raises(RuntimeError) as plain:
        builder.plain(arrival, transformers.BertForMaskedLM, vocab_size=50)
    assert str(ours.value) == str(plain.value)
    model, arrival = builder.streamed(folder, **options, ignore_mismatched_sizes=True)
    expected = builder.plain(arrival, transformers.BertForMaskedLM, vocab_size=50, ignore_mismatched_sizes=True)
    assert diff_models(model, expected) == []


@pytest.mark.parametrize("auto_class", ["AutoModel", "AutoModelForCausalLM", "LlamaModel", transformers.LlamaModel])
def test_auto_class_chooses_the_class(zoo: Any, builder: Builder, auto_class: Any) -> None:
    model, arrival = builder.streamed(zoo("llama"), auto_class=auto_class)
    chosen = getattr(transformers, auto_class) if isinstance(auto_class, str) else auto_class
    assert diff_models(model, builder.plain(arrival, chosen)) == []


def test_variant_and_subfolder_are_found(zoo: Any, builder: Builder, tmp_path: Path) -> None:
    folder = tmp_path / "nested"
    folder.mkdir()
    copied(zoo("llama", variant="fp16"), folder / "part")
    options = {"variant": "fp16", "subfolder": "part"}
    model, arrival = builder.streamed(folder, **options)
    assert diff_models(model, builder.plain(arrival, transformers.LlamaForCausalLM, **options)) == []


@pytest.mark.parametrize("options", [{"disable_mmap": True}, {"use_safetensors": False}], ids=str)
def test_readers_that_bypass_safe_open_wait_for_verified_files(
    zoo: Any, builder: Builder, tmp_path: Path, options: dict[str, Any]
) -> None:
    if "disable_mmap" in options and "disable_mmap" not in Path(transformers.modeling_utils.__file__).read_text():
        pytest.skip("this transformers always maps")
    folder = zoo("llama", shard="1GB")
    if "use_safetensors" in options:
        binary = tmp_path / "bin"
        binary.mkdir()
        for path in folder.glob("*.json"):
            (binary / path.name).write_bytes(path.read_bytes())
        torch.save(safetensors.torch.load_file(folder / "model.safetensors"), binary / "pytorch_model.bin")
        folder = binary
    weight = next(p.name for p in folder.iterdir() if p.suffix in (".safetensors", ".bin"))
    arrival = builder.arrive(folder, weights=[weight])
    with ThreadPoolExecutor(1) as pool:
        torch.manual_seed(7)
        building = pool.submit(builder.build, arrival, **options)
        arrival.finish()
        model = building.result()
    assert diff_models(model, builder.plain(arrival, transformers.LlamaForCausalLM, **options)) == []


@pytest.mark.parametrize(
    "options",
    [{"device_map": {"model": "cpu", "lm_head": "disk"}}, {"device_map": "auto", "max_memory": {"cpu": 30_000}}],
    ids=["dict", "auto"],
)
def test_offloaded_weights_can_be_read_after_the_load(
    zoo: Any, builder: Builder, tmp_path: Path, options: dict[str, Any]
) -> None:
    arrival = builder.arrive(zoo("llama"))
    with ThreadPoolExecutor(1) as pool:
        building = pool.submit(builder.build, arrival, **options, offload_folder=str(tmp_path / "off"))
        arrival.finish()
        model = building.result()
    assert "disk" in model.hf_device_map.values()
    tokens = torch.arange(5)[None]
    with torch.no_grad():
        expected = builder.plain(arrival, transformers.LlamaForCausalLM)(tokens).logits
        assert torch.equal(model(tokens).logits, expected)


# -- code of the repository's own -----------------------------------------------------------------------------------

REMOTE = """
import torch
from transformers import PretrainedConfig, PreTrainedModel

class FooConfig(PretrainedConfig):
    model_type = "foo"
    width: int = 8

class FooModel(PreTrainedModel):
    config_class = FooConfig

    def __init__(self, config):
        super().__init__(config)
        self.layer = torch.nn.Linear(64, 64)
        self.post_init()
"""


@pytest.fixture
def remote(tmp_path: Path) -> Path:
    """A model whose code is in its repository."""
    folder = tmp_path / "remote"
    folder.mkdir()
    (folder / "foo.py").write_text(REMOTE)
    auto_map = {"AutoConfig": "foo.FooConfig", "AutoModel": "foo.FooModel"}
    config = {"model_type": "foo", "architectures": ["FooModel"], "auto_map": auto_map}
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {"layer.weight": torch.rand(64, 64), "layer.bias": torch.rand(64)}
    safetensors.torch.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_code_of_the_repository_runs_when_it_is_trusted(remote: Path, builder: Builder) -> None:
    model, arrival = builder.streamed(remote, trust_remote_code=True)
    assert type(model).__name__ == "FooModel"
    assert "transformers_modules.org.model" in type(model).__module__
    assert diff_models(model, builder.plain(arrival, transformers.AutoModel, trust_remote_code=True)) == []


def test_code_of_the_repository_does_not_run_unasked(remote: Path, builder: Builder) -> None:
    with pytest.raises(UnsupportedSourceError, match="no class 'FooModel'") as caught:
        builder.build(builder.arrive(remote))
    assert "trust_remote_code=True" in str(caught.value.hint)


# -- declining, and failing -----------------------------------------------------------------------------------------


def repository(folder: Path, **files: Any) -> Path:
    """Make a folder of JSON files."""
    folder.mkdir()
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def test_what_is_not_for_transformers_is_declined(builder: Builder, tmp_path: Path) -> None:
    llm = {"architectures": ["LlamaForCausalLM"]}
    assert builder.build(builder.arrive(repository(tmp_path / "a", tokenizer={}))) is None
    assert builder.build(builder.arrive(repository(tmp_path / "b", config={"model_type": "x"}))) is None
    assert builder.build(builder.arrive(repository(tmp_path / "c", config=llm, model_index={}))) is None
    assert builder.build(builder.arrive(repository(tmp_path / "d", config=llm)), framework="diffusers") is None


def test_unknown_class_says_what_to_do(builder: Builder, tmp_path: Path) -> None:
    arrival = builder.arrive(repository(tmp_path / "a", config={"architectures": ["Gpt99ForCausalLM"]}))
    with pytest.raises(
        UnsupportedSourceError, match=r"org/model: transformers .* has no class 'Gpt99ForCausalLM'"
    ) as e:
        builder.build(arrival)
    assert "auto_class" in str(e.value.hint)
    with pytest.raises(UnsupportedSourceError, match="names no architecture"):
        builder.build(builder.arrive(repository(tmp_path / "b", config={})), framework="transformers")
    with pytest.raises(UnsupportedSourceError, match="no class 'AutoModle'"):
        builder.build(arrival, auto_class="AutoModle")


@pytest.mark.parametrize("content", ["{", "[]", ""])
def test_damaged_config_is_named(builder: Builder, tmp_path: Path, content: str) -> None:
    folder = repository(tmp_path / "a")
    (folder / "config.json").write_text(content)
    with pytest.raises(FormatError, match=r"^config\.json: "):
        builder.build(builder.arrive(folder))


@pytest.mark.parametrize("name", ["force_download", "proxies"])
def test_options_that_fastload_decides_are_refused(zoo: Any, builder: Builder, name: str) -> None:
    with pytest.raises(SettingsError, match=f"^{name}=") as caught:
        builder.build(builder.arrive(zoo("llama")), **{name: "x"})
    assert caught.value.hint


def test_missing_transformers_says_what_to_install(zoo: Any, builder: Builder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(PluginError, match="needs torch and transformers") as caught:
        builder.build(builder.arrive(zoo("llama")))
    assert caught.value.hint == 'pip install "fastload-weights[transformers]"'


def test_failed_transfer_ends_the_build_with_its_own_error(zoo: Any, builder: Builder) -> None:
    arrival = builder.arrive(zoo("llama"))
    for name in arrival.weights:
        arrival.land(name, 0, 1)
    with ThreadPoolExecutor(1) as pool:
        building = pool.submit(builder.build, arrival)
        demanded(arrival, arrival.weights[0])
        arrival.fail(DownloadError("the cable is cut"))
        with pytest.raises(DownloadError, match="the cable is cut"):
            building.result()
    assert safetensors.safe_open is KEPT["real"]


def test_error_that_the_framework_wrapped_is_still_the_transfers(zoo: Any, builder: Builder) -> None:
    class Wrapping:
        @classmethod
        def from_pretrained(cls, **arguments: Any) -> None:
            raise RuntimeError("could not load a shard")

    arrival = builder.arrive(zoo("llama"))
    with pytest.raises(RuntimeError, match="could not load a shard"):
        builder.build(arrival, auto_class=Wrapping)
    arrival.fail(DownloadError("the cable is cut"))
    with pytest.raises(DownloadError, match="the cable is cut") as caught:
        builder.build(arrival, auto_class=Wrapping)
    assert isinstance(caught.value.__cause__, RuntimeError)


@pytest.mark.parametrize(
    "options",
    [{"disable_mmap": True}, {"use_safetensors": False}, {"gguf_file": "x.gguf"}, {"device_map": {"": "disk"}}],
    ids=str,
)
def test_reader_that_bypasses_safe_open_never_starts_on_partial_files(
    zoo: Any, builder: Builder, options: dict[str, Any]
) -> None:
    arrival = builder.arrive(zoo("llama"))
    arrival.fail(DownloadError("the cable is cut"))
    started: list[Any] = []

    class Bypassing:
        @classmethod
        def from_pretrained(cls, **arguments: Any) -> None:
            started.append(arguments)

    with pytest.raises(DownloadError):
        builder.build(arrival, auto_class=Bypassing, **options)
    assert not started


def test_refused_file_ends_the_build_with_its_own_error(zoo: Any, builder: Builder) -> None:
    arrival = builder.arrive(zoo("llama"))
    first, *others = arrival.weights
    for name in others:
        arrival.land(name)
    arrival.tell("refused", file=first, error=to_record(DownloadError("no bytes of this one", file=first)))
    with pytest.raises(DownloadError, match="no bytes of this one"):
        builder.build(arrival)


def copied(folder: Path, to: Path) -> Path:
    to.mkdir()
    for path in folder.iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    return to


def test_corrupt_header_is_a_format_error_that_names_the_file(zoo: Any, builder: Builder, tmp_path: Path) -> None:
    folder = copied(zoo("llama", shard="1GB"), tmp_path / "bad")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:8] + b"x" + path.read_bytes()[9:])
    with pytest.raises(FormatError, match=r"^model\.safetensors: not a sound safetensors file"):
        builder.streamed(folder)


def test_missing_shard_is_a_format_error_that_names_it(zoo: Any, builder: Builder, tmp_path: Path) -> None:
    folder = copied(zoo("llama"), tmp_path / "bad")
    lost = sorted(folder.glob("*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(FormatError, match=f"should be in {lost.name}, which is not among the files"):
        builder.build(builder.arrive(folder))


def test_index_that_names_a_tensor_no_shard_has_is_a_format_error(zoo: Any, builder: Builder, tmp_path: Path) -> None:
    folder = copied(zoo("llama"), tmp_path / "bad")
    index = folder / "model.safetensors.index.json"
    table = json.loads(index.read_text())
    table["weight_map"]["model.ghost"] = sorted(table["weight_map"].values())[0]
    index.write_text(json.dumps(table))
    with pytest.raises(FormatError, match=r"model\.safetensors\.index\.json: tensor 'model\.ghost'"):
        builder.streamed(folder)


def test_models_are_built_in_several_threads_at_once(zoo: Any, builder: Builder) -> None:
    arrivals = [builder.arrive(zoo(name)) for name in ("llama", "bert", "gpt2")]
    with ThreadPoolExecutor(3) as pool:
        building = [pool.submit(builder.build, arrival) for arrival in arrivals]
        for arrival in reversed(arrivals):
            arrival.finish()
        models = [future.result() for future in building]
    for arrival, model in zip(arrivals, models, strict=True):
        assert diff_models(model, builder.plain(arrival, class_of(arrival.folder))) == []


class Recorder:
    """Stands in for a model class; tells what from_pretrained was given."""

    @classmethod
    def from_pretrained(cls, *args: Any, **arguments: Any) -> dict[str, Any]:
        return arguments


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"device": "cpu"}, {}),
        ({"device": torch.device("cpu")}, {}),
        ({"device": "cuda:1"}, {"device_map": {"": "cuda:1"}}),
        ({"device": 0}, {"device_map": {"": 0}}),
        ({"device": "cuda", "device_map": "balanced"}, {"device_map": "balanced"}),
        ({"dtype": "bfloat16"}, {"dtype": "bfloat16"}),
    ],
)
def test_device_becomes_a_device_map(
    zoo: Any, builder: Builder, options: dict[str, Any], expected: dict[str, Any]
) -> None:
    arrival = builder.arrive(zoo("llama"))
    arrival.finish()
    given = builder.build(arrival, auto_class=Recorder, **options)
    place = ("pretrained_model_name_or_path", "cache_dir", "revision", "local_files_only")
    assert {name: value for name, value in given.items() if name not in place} == expected


def test_importing_the_plugin_imports_no_framework() -> None:
    import subprocess

    program = "import sys, fastload_transformers; print(sorted({'torch', 'transformers'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


KEPT = {"real": safetensors.safe_open}  # not a global name of its own: those are rebound
