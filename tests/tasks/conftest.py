"""A tiny encoder with a vocabulary of words, to fine-tune."""

import random

import pytest
import torch

import bert_fast
from bert_fast.data.tokenizer import SPECIAL_TOKENS, berts_tokenizer, save_tokenizer

NOUNS, FILLING = ("sun", "rain", "wind", "snow"), ("the", "of", "and", "to", "a", "in", "it", "is", "on", "by")


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """A folder with a BertForPreTraining of two layers, random weights, and a tokenizer that has NOUNS and FILLING."""
    folder = tmp_path_factory.mktemp("base")
    words = [*SPECIAL_TOKENS, *NOUNS, *FILLING]
    torch.manual_seed(1)
    config = bert_fast.BertConfig(
        vocab_size=len(words), num_hidden_layers=2, hidden_size=32, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=64, initializer_range=0.1,
    )  # fmt: skip
    bert_fast.BertForPreTraining(config).save_pretrained(folder)
    save_tokenizer(berts_tokenizer({word: number for number, word in enumerate(words)}, lowercase=True), folder)
    return folder


def sentence(draw: random.Random, nouns=(), length: int = 8) -> str:
    """``nouns`` among up to ``length`` words of FILLING, in any order."""
    words = [*nouns, *draw.choices(FILLING, k=draw.randint(2, length))]
    draw.shuffle(words)
    return " ".join(words)
