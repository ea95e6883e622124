"""What a load costs, of the kinds that the zoo of architectures does not hold: requests, copies, and waiting for heads."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import safetensors  # noqa: E402
import safetensors.torch  # noqa: E402
from arrival import Arrival  # noqa: E402

import fastload  # noqa: E402
from fastload import plugins, zerocopy  # noqa: E402
from fastload.settings import Settings  # noqa: E402
from fastload.tensors import TensorStream  # noqa: E402
from fastload.testing import Hub  # noqa: E402

REAL = [safetensors.safe_open]  # no global name: those are rebound
SHARDS = 3


def state(rows: int = 600) -> dict[str, Any]:
    """Return weights that take more than one request for small files (1 MB)."""
    torch.manual_seed(0)
    return {f"{n}.weight": torch.rand(rows, 600) for n in range(SHARDS)}


def sharded(folder: Path) -> Path:
    folder.mkdir()
    for n, (name, tensor) in enumerate(state().items()):
        safetensors.torch.save_file({name: tensor}, folder / f"model-{n}.safetensors")
    return folder


def module() -> Any:
    return torch.nn.Sequential(*(torch.nn.Linear(600, 600, bias=False) for _ in range(SHARDS)))


def gguf_file(folder: Path) -> Path:
    gguf = pytest.importorskip("gguf")
    folder.mkdir()
    writer = gguf.GGUFWriter(folder / "m.gguf", "llama")
    writer.add_tensor("w", torch.rand(600, 600).numpy())
    kind = gguf.GGMLQuantizationType.Q8_0
    writer.add_tensor("q", gguf.quants.quantize(torch.rand(600, 640).numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder


def pickled(folder: Path) -> Path:
    folder.mkdir()
    torch.save(state(), folder / "pytorch_model.bin")
    return folder


def pickled_llama(folder: Path) -> Path:
    """Two ``.bin`` shards, as transformers reads them."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=1500, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4
    )
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    weights = transformers.LlamaForCausalLM(config).state_dict()
    table = {name: f"pytorch_model-0000{n % 2 + 1}-of-00002.bin" for n, name in enumerate(weights)}
    for shard in set(table.values()):
        torch.save({name: weights[name] for name in weights if table[name] == shard}, folder / shard)
    index = {"metadata": {"total_size": 1}, "weight_map": table}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return folder


#: Name → what makes the folder, what loads it, and whether the result is views of the files.
ROWS: dict[str, tuple[Callable[[Path], Path], Callable[[str], Any], bool]] = {
    "tensors": (sharded, fastload.load_tensors, True),
    "tensors of .bin": (pickled, fastload.load_tensors, True),
    "tensors of GGUF": (gguf_file, fastload.load_tensors, True),
    "transformers from .bin": (pickled_llama, fastload.load, True),
    "into a module": (sharded, lambda source: fastload.load(source, into=module()), False),
    "into a module, assigned": (sharded, lambda source: fastload.load(source, into=module(), assign=True), True),
}


@pytest.mark.parametrize("row", ROWS)
def test_each_row_asks_once_a_file_and_range_and_copies_nothing(
    make_hub: Callable[..., Hub], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, row: str
) -> None:
    make, load, views = ROWS[row]
    hub = make_hub({"org/model": make(tmp_path / "model")})
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    monkeypatch.setenv("FASTLOAD_PROCESS", "0")
    with fastload.profile() as profiles:
        kept = load("org/model")
    (profile,) = profiles.loads
    ranges = sum(request.origin == "cdn" for request in hub.requests)
    assert len(hub.requests) == profile.requests <= 2 + profile.files + ranges
    assert kept is not None and profile.zero_copy_share is not None
    assert profile.zero_copy_share >= 0.99 if views else profile.zero_copy_share == 0

    hub.clear()
    with fastload.profile() as profiles:
        kept = load(f"org/model@{hub.commit('org/model')}")
    assert hub.requests == [] and profiles.loads[0].requests == 0
    assert profiles.loads[0].zero_copy_share == profile.zero_copy_share


@pytest.mark.parametrize("name", ["sd", "sd3", "flux"])
def test_nothing_of_a_pipeline_is_copied(
    make_hub: Callable[..., Hub], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    pytest.importorskip("diffusers")
    from tiny_pipelines import PIPELINES

    PIPELINES[name](tmp_path / "work").save_pretrained(tmp_path / "pipe")
    monkeypatch.setenv("HF_ENDPOINT", make_hub({"org/pipe": tmp_path / "pipe"}).endpoint)
    with fastload.profile() as profiles:
        pipeline = fastload.load("org/pipe", settings={"process": False})
    assert pipeline is not None
    assert profiles.loads[0].zero_copy_share >= 0.99


def test_heads_of_all_shards_are_asked_for_at_once(tmp_path: Path) -> None:
    arrival = Arrival(sharded(tmp_path / "model"), tmp_path / "cache")
    try:
        with TensorStream(arrival.transfer, plugins.manager(Settings(plugins=()))).served():
            assert [journal.take_demands() for journal in arrival.journals.values()] == [[0]] * SHARDS
        arrival.land("model-0.safetensors", 0, 1)
        with TensorStream(arrival.transfer, plugins.manager(Settings(plugins=()))).served():
            asked = {name: journal.take_demands() for name, journal in arrival.journals.items()}
        assert asked == {"model-0.safetensors": [], "model-1.safetensors": [0], "model-2.safetensors": [0]}
    finally:
        arrival.close()


def test_a_shard_that_nobody_has_begun_is_not_waited_for(tmp_path: Path) -> None:
    arrival = Arrival(sharded(tmp_path / "model"), tmp_path / "cache", announce=False)
    try:
        with TensorStream(arrival.transfer, plugins.manager(Settings(plugins=()))).served() as path:
            assert len(list(path.glob("*.safetensors"))) == SHARDS
    finally:
        arrival.close()


def test_module_that_was_being_imported_gets_the_real_safe_open_back(tmp_path: Path) -> None:
    arrival = Arrival(sharded(tmp_path / "model"), tmp_path / "cache")
    early, loaded = types.ModuleType("fastload_test_early"), types.ModuleType("fastload_test_loaded")
    early.__spec__ = ModuleSpec(early.__name__, None)
    early.__spec__._initializing = True  # type: ignore[attr-defined]  # as importlib marks it
    sys.modules |= {early.__name__: early, loaded.__name__: loaded}
    try:
        with TensorStream(arrival.transfer, plugins.manager(Settings(plugins=()))).served():
            exec("from safetensors import safe_open", vars(early))
            assert early.safe_open is not REAL[0]  # type: ignore[attr-defined]
        assert early.safe_open is REAL[0]  # type: ignore[attr-defined]
    finally:
        arrival.close()
        del sys.modules[early.__name__], sys.modules[loaded.__name__]


def test_known_mappings_are_enough_where_they_hold_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arrival = Arrival(sharded(tmp_path / "model"), tmp_path / "cache")
    try:
        arrival.finish()
        tensors = TensorStream(arrival.transfer, plugins.manager(Settings(plugins=()))).collect()
        views = arrival.transfer.files.values()
        spans = [view.mapped for view in views if view.mapped is not None]
        places = [view.place for view in views if view.place is not None]
        size = sum(tensor.nbytes for tensor in tensors.values())
        assert len(spans) == len(places) == SHARDS
        assert zerocopy.zero_copy_bytes(tensors, places) == zerocopy.zero_copy_bytes(tensors, [], spans) == (size, size)
        monkeypatch.setattr(zerocopy, "_MAPS", str(tmp_path / "nowhere"))
        assert zerocopy.zero_copy_bytes(tensors, places, spans) == (size, size)
        assert zerocopy.zero_copy_bytes(tensors, places, spans[1:]) is None
    finally:
        arrival.close()
