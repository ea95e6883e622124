"""Every architecture, built while its shards arrive, is the one that ``from_pretrained`` gives, in the same words."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from architectures import ZOO  # noqa: E402
from building import Builder, same_as_plain  # noqa: E402

pytestmark = pytest.mark.transformers


@pytest.mark.parametrize("name", ZOO)
def test_streamed_architecture_is_the_plain_one(zoo: Callable[..., Path], builder: Builder, name: str) -> None:
    folder = zoo(name)
    assert len(list(folder.glob("*.safetensors"))) > 1
    assert json.loads((folder / "config.json").read_text())["architectures"] == [ZOO[name].model]
    same_as_plain(builder, folder, ZOO[name].model)


#: Saved as, loaded as, and which keys are missing (m) or left over (u).
HEADS = [
    ("bert", "BertModel", "mu"),
    ("bert", "BertForSequenceClassification", "mu"),
    ("bert", "AutoModelForTokenClassification", "mu"),
    ("bert", "BertForPreTraining", "m"),
    ("bert", "BertLMHeadModel", ""),
    ("roberta", "AutoModelForSequenceClassification", "mu"),
    ("distilbert", "DistilBertForQuestionAnswering", "mu"),
    ("electra", "ElectraForPreTraining", "mu"),
    ("deberta-v2", "DebertaV2Model", "u"),
    ("gpt2", "GPT2Model", ""),
    ("gpt2", "GPT2DoubleHeadsModel", "m"),
    ("llama", "LlamaForSequenceClassification", "mu"),
    ("dinov2", "Dinov2ForImageClassification", "m"),
    ("t5", "T5EncoderModel", ""),  # ignores the keys of decoders
    ("bart", "BartModel", "u"),
    ("bart", "BartForSequenceClassification", "mu"),
    ("whisper", "WhisperForAudioClassification", "mu"),
    ("wav2vec2", "Wav2Vec2Model", "u"),
    ("vit", "ViTModel", "mu"),
    ("resnet", "ResNetModel", "u"),
    ("clip", "CLIPTextModel", "u"),
    ("clip", "CLIPVisionModelWithProjection", "u"),
    ("qwen2-vl", "AutoModel", "u"),
    ("mixtral", "MixtralForSequenceClassification", "mu"),
]


@pytest.mark.parametrize(("name", "loaded", "differs"), HEADS, ids=lambda value: str(value) or "-")
def test_other_head_gets_the_same_weights_and_the_same_report(
    zoo: Callable[..., Path], builder: Builder, name: str, loaded: str, differs: str
) -> None:
    _, info = same_as_plain(builder, zoo(name), loaded, output_loading_info=True)
    found = ("m" if info["missing_keys"] else "") + ("u" if info["unexpected_keys"] else "")
    assert found == differs, info
