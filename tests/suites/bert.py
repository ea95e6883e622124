"""transformers' own tests of saving and loading (``ModelTesterMixin``), for a tiny BERT; copied beside the mixin by run.py."""

from __future__ import annotations

import unittest
from typing import Any

import torch
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification, BertModel

from .test_modeling_common import ModelTesterMixin  # type: ignore[import-not-found]


class Tester:
    """What the mixin asks of a model."""

    is_training = False
    batch_size, seq_length, hidden_size, num_hidden_layers, num_attention_heads, vocab_size = 2, 7, 32, 2, 4, 99

    def __init__(self, parent: Any) -> None:
        self.parent = parent

    def get_config(self) -> Any:
        return BertConfig(
            vocab_size=self.vocab_size, hidden_size=self.hidden_size, num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads, intermediate_size=37,
        )  # fmt: skip

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, Any]]:
        words = torch.randint(0, self.vocab_size, (self.batch_size, self.seq_length))
        return self.get_config(), {"input_ids": words, "attention_mask": torch.ones_like(words)}


class BertTest(ModelTesterMixin, unittest.TestCase):  # type: ignore[misc]
    """Only what saves and loads; see run.py for which."""

    all_model_classes = (BertModel, BertForMaskedLM, BertForSequenceClassification)

    def setUp(self) -> None:
        self.model_tester = Tester(self)
