"""transformers' model tests on the eight BERT classes of one library: HF_SUITE_LIBRARY=transformers or bert_fast.

Run by compare.py; by hand, for one test:
    HF_SUITE_LIBRARY=bert_fast pytest --noconftest tests/hf_suite/hf_models.py -k test_save_load
"""

import importlib
import os
import unittest

import torch
from transformers import BertConfig
from transformers.testing_utils import torch_device

from tests.hf_suite import hf_distribution
from tests.support.class_names import CLASSES

library = importlib.import_module(os.environ["HF_SUITE_LIBRARY"])
common = hf_distribution.import_module("test_modeling_common")


class TinyBert:
    """What transformers' tests ask of a model tester: a small configuration and a batch that fits it."""

    is_training = True
    batch_size = 13
    seq_length = 7
    num_choices = 4
    hidden_size = 32
    num_hidden_layers = 2
    num_attention_heads = 4

    def __init__(self, parent: unittest.TestCase):
        self.parent = parent

    def get_config(self) -> BertConfig:
        return BertConfig(
            vocab_size=99,
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            intermediate_size=37,
            max_position_embeddings=512,
            type_vocab_size=16,
            hidden_dropout_prob=0.1,
            attention_probs_dropout_prob=0.1,
        )

    def prepare_config_and_inputs_for_common(self) -> tuple[BertConfig, dict[str, torch.Tensor]]:
        config = self.get_config()
        shape = (self.batch_size, self.seq_length)
        inputs = {
            "input_ids": torch.randint(config.vocab_size, shape),
            "token_type_ids": torch.randint(config.type_vocab_size, shape),
            "attention_mask": torch.ones(shape, dtype=torch.long).tril(),  # the last rows see everything
        }
        return config, {name: value.to(torch_device) for name, value in inputs.items()}


class BertModelsTest(common.ModelTesterMixin, unittest.TestCase):
    all_model_classes = tuple(getattr(library, name) for name in CLASSES)

    def setUp(self):
        self.model_tester = TinyBert(self)

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels=return_labels)
        if return_labels and model_class.__name__ == "BertForPreTraining":  # the common part gives it no labels
            inputs["labels"] = torch.zeros_like(inputs["input_ids"])
            inputs["next_sentence_label"] = torch.zeros(len(inputs["input_ids"]), dtype=torch.long, device=torch_device)
        return inputs
