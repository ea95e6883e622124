"""A Sentence Transformers model that is built while its weights arrive is the one that its own class gives."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
library = pytest.importorskip("sentence_transformers", reason="`tox run -e libraries` installs sentence-transformers")

import fastload_sentence_transformers as plugin  # noqa: E402
from compare import diff_models  # noqa: E402

import fastload  # noqa: E402
from fastload.errors import PluginError, UnsupportedSourceError  # noqa: E402
from fastload.testing import Hub  # noqa: E402

NAME = "sentence_transformers"
TEXTS = ["w1 w2 w3", "w4 w5", "of another world"]
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(91))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT with a tokenizer, a pooling, a dense and a normalising module; not to be changed."""
    root = tmp_path_factory.mktemp("sentences")
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64,
    )  # fmt: skip
    bert = transformers.BertModel(config)
    bert.save_pretrained(root / "bert")
    (root / "bert" / "vocab.txt").write_text("\n".join(WORDS))
    transformers.BertTokenizerFast(vocab_file=str(root / "bert" / "vocab.txt")).save_pretrained(root / "bert")
    modules = pytest.importorskip("sentence_transformers.models")
    parts = [modules.Transformer(str(root / "bert")), modules.Pooling(64), modules.Dense(64, 8), modules.Normalize()]
    model = library.SentenceTransformer(modules=parts, device="cpu", prompts={"query": "w1 "})
    model.save_pretrained(str(root / "model"))
    return root / "model"


def plainly(cache: Path, **options: Any) -> Any:
    adapter = {"cache_dir": str(cache), "local_files_only": True}  # else, with PEFT installed, the hub is asked for one
    options["model_kwargs"] = {"adapter_kwargs": adapter, **options.get("model_kwargs", {})}
    return library.SentenceTransformer(
        "org/model", cache_folder=str(cache), local_files_only=True, device="cpu", **options
    )


def same(a: Any, b: Any) -> bool:
    """Compare two models down to their bits, tokenizers and embeddings."""
    assert diff_models(a, b) == []
    of_a, of_b = a.tokenizer, b.tokenizer
    assert (type(of_a), of_a.get_vocab(), of_a.init_kwargs.keys()) == (
        type(of_b),
        of_b.get_vocab(),
        of_b.init_kwargs.keys(),
    )
    assert (a.prompts, a.similarity_fn_name, a.get_embedding_dimension()) == (
        b.prompts, b.similarity_fn_name, b.get_embedding_dimension(),
    )  # fmt: skip
    return bool((a.encode(TEXTS) == b.encode(TEXTS)).all())


@pytest.mark.parametrize("options", [{}, {"model_kwargs": {"dtype": "float16"}}], ids=str)
def test_streamed_model_is_the_plain_one(
    folder: Path, make_builder: Callable[..., Any], options: dict[str, Any]
) -> None:
    model, arrival = make_builder(plugin).streamed(folder, framework=NAME, **options)
    assert type(model) is library.SentenceTransformer
    plain = plainly(arrival.repo.parent, **options)
    assert same(model, plain)
    left = [
        v for v in (*vars(model.tokenizer).values(), *model.tokenizer.init_kwargs.values()) if "/fastload-" in str(v)
    ]
    assert left == []


def test_dtype_is_that_of_all_modules(folder: Path, make_builder: Callable[..., Any]) -> None:
    model, arrival = make_builder(plugin).streamed(folder, framework=NAME, dtype="bfloat16")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert same(model.float(), plainly(arrival.repo.parent, model_kwargs={"dtype": "bfloat16"}).float())


def test_framework_makes_it_theirs_and_files_alone_a_transformers_model(
    folder: Path, make_hub: Callable[..., Hub], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    hub = make_hub({"org/model": folder})
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    with fastload.profile() as profiles:
        model = fastload.load("org/model", framework=NAME)
    assert type(model) is library.SentenceTransformer
    ranges = sum(request.origin == "cdn" for request in hub.requests)
    assert ranges == 2 and len(hub.requests) <= 2 + profiles.loads[0].files + ranges
    assert profiles.loads[0].zero_copy_share >= 0.99
    assert same(model, plainly(tmp_path / "hf" / "hub"))
    commit = hub.commit("org/model")
    assert (model.model_card_data.base_model, model.model_card_data.base_model_revision) == ("org/model", commit)
    hub.clear()
    assert same(fastload.load("org/model", framework=NAME, revision=commit), plainly(tmp_path / "hf" / "hub"))
    assert hub.requests == []
    assert type(fastload.load("org/model")) is transformers.BertModel
    assert type(fastload.load("org/model", auto_class="SentenceTransformer")) is library.SentenceTransformer
    assert type(fastload.load("org/model", auto_class="AutoModel")) is transformers.BertModel


def test_class_is_that_which_wrote_the_model(folder: Path, make_builder: Callable[..., Any], tmp_path: Path) -> None:
    made = tmp_path / "model"
    made.mkdir()
    (made / "modules.json").write_text("[]")
    (made / "config_sentence_transformers.json").write_text(json.dumps({"model_type": "MindReader"}))
    builder = make_builder(plugin)
    with pytest.raises(UnsupportedSourceError, match="has no class 'MindReader'"):
        builder.build(builder.arrive(made))


def test_missing_library_says_what_to_install(
    folder: Path, make_builder: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    builder = make_builder(plugin)
    with pytest.raises(PluginError, match="needs sentence-transformers") as caught:
        builder.build(builder.arrive(folder), framework=NAME)
    assert 'framework="transformers"' in str(caught.value.hint)


def test_what_is_not_theirs_is_declined(tiny_model: Path, folder: Path, make_builder: Callable[..., Any]) -> None:
    builder = make_builder(plugin)
    assert builder.build(builder.arrive(tiny_model)) is None
    assert builder.build(builder.arrive(folder)) is None  # a transformers model too
    assert builder.build(builder.arrive(folder), framework="transformers") is None
    assert builder.build(builder.arrive(folder), auto_class=transformers.AutoModel) is None
