"""An adapter and its base model, both built while their weights arrive, are what PEFT gives."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("peft", reason="`tox run -e libraries` installs peft")

import peft  # noqa: E402
from building import Builder  # noqa: E402
from compare import diff_models  # noqa: E402

import fastload  # noqa: E402
from fastload.errors import NotFoundError, UnsupportedSourceError  # noqa: E402
from fastload.testing import Hub  # noqa: E402

pytestmark = [
    pytest.mark.transformers,
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # peft's own
]


def write_adapter(base: Path, folder: Path, name: str, **config: Any) -> Path:
    """Write a LoRA with random weights for the model in *base*, which it calls *name*."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    torch.manual_seed(0)
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=4, init_lora_weights=False, **config))
    adapted.save_pretrained(folder)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": name}))
    return folder


@pytest.fixture(scope="module")
def adapter(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of org/tiny; not to be changed."""
    folder = tmp_path_factory.mktemp("peft") / "adapter"
    return write_adapter(tiny_model, folder, "org/tiny", target_modules=["q_proj", "v_proj"])


@pytest.fixture
def hub(tiny_model: Path, adapter: Path, make_hub: Callable[..., Hub], monkeypatch: pytest.MonkeyPatch) -> Hub:
    started = make_hub({"org/tiny": tiny_model, "org/adapter": adapter})
    monkeypatch.setenv("HF_ENDPOINT", started.endpoint)
    return started


def plainly(tiny_model: Path, adapter: Path, to: Path, **options: Any) -> Any:
    """Load adapter and base model in PEFT's own way, from folders."""
    local = shutil.copytree(adapter, to)
    path = local / "adapter_config.json"
    path.write_text(path.read_text().replace('"org/tiny"', json.dumps(str(tiny_model))))
    return peft.AutoPeftModelForCausalLM.from_pretrained(str(local), **options)


def same(a: Any, b: Any) -> bool:
    """Compare all but the names of models."""
    lines = [line for line in diff_models(a, b) if "name_or_path" not in line and "_commit_hash" not in line]
    assert lines == []
    of_a, of_b = a.peft_config["default"].to_dict(), b.peft_config["default"].to_dict()
    differing = {key for key in of_a if str(of_a[key]) != str(of_b[key])}
    assert differing <= {"base_model_name_or_path"}
    tokens = torch.arange(5)[None]
    return torch.equal(a(tokens).logits, b(tokens).logits)


@pytest.mark.parametrize(
    "options", [{}, {"is_trainable": True}, {"dtype": "float32"}, {"adapter_name": "mine"}], ids=str
)
def test_adapter_and_base_model_are_the_plain_ones(
    hub: Hub, tiny_model: Path, adapter: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    with fastload.profile() as profiles:
        model = fastload.load("org/adapter", **options)
    assert [load.source for load in profiles.loads] == ["org/adapter", "org/tiny"]
    ranges = sum(request.origin == "cdn" for request in hub.requests)
    assert len(hub.requests) <= 4 + sum(load.files for load in profiles.loads) + ranges
    assert profiles.loads[1].zero_copy_share >= 0.99 or "dtype" in options
    plain = plainly(tiny_model, adapter, tmp_path / "plain", **options)
    if "adapter_name" in options:
        assert list(model.peft_config) == list(plain.peft_config) == ["mine"]
        assert [
            line for line in diff_models(model, plain) if "name_or_path" not in line and "_commit" not in line
        ] == []
    else:
        assert same(model, plain)


def test_lock_holds_for_the_base_model_too(hub: Hub, tmp_path: Path) -> None:
    from fastload import cli

    assert cli.main(["lock", "org/adapter", "-o", str(tmp_path / "fastload.lock")]) == 0
    with pytest.raises(NotFoundError, match="the lock holds no org/tiny"):
        fastload.load("org/adapter", lock=tmp_path / "fastload.lock")
    assert cli.main(["lock", "org/adapter", "org/tiny", "-o", str(tmp_path / "fastload.lock")]) == 0
    fastload.load("org/adapter", lock=tmp_path / "fastload.lock")


def test_adapter_that_names_no_base_model_says_what_to_do(adapter: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(adapter, tmp_path / "adapter")
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(UnsupportedSourceError, match=r"no adapter_config\.json names a base model") as caught:
        fastload.load(folder)
    assert caught.value.hint
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "org/tiny"}')
    with pytest.raises(UnsupportedSourceError, match="names neither a task nor a class") as caught:
        fastload.load(folder)
    assert "auto_class" in str(caught.value.hint)


def test_no_hub_is_asked_for_an_adapter_that_is_not_there(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import file_download

    def ask(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("the hub is asked")

    monkeypatch.setattr(file_download, "get_hf_file_metadata", ask)
    builder = Builder(tmp_path)
    try:
        builder.streamed(tiny_model, auto_class="AutoModelForCausalLM")
    finally:
        builder.close()


def test_transformers_own_way_takes_the_adapter_too(tiny_model: Path, tmp_path: Path) -> None:
    """``AutoModelForCausalLM`` loads the base model plainly, by its name, and the adapter from the served folder."""
    folder = write_adapter(tiny_model, tmp_path / "adapter", str(tiny_model), target_modules=["q_proj"])
    builder = Builder(tmp_path)
    try:
        model, arrival = builder.streamed(folder, framework="transformers", auto_class="AutoModelForCausalLM")
        plain = transformers.AutoModelForCausalLM.from_pretrained(arrival.snapshot)
        assert [line for line in diff_models(model, plain) if "name_or_path" not in line] == []
    finally:
        builder.close()
