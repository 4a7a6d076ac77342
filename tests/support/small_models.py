"""Folders with a small pre-trained model, whose vocabulary is a few given pieces, at random weights."""

from pathlib import Path

from bert_fast import BertConfig, BertForMaskedLM
from bert_fast.data import save_tokenizer
from bert_fast.data.tokenizer import SPECIAL_TOKENS, berts_tokenizer


def small_model(folder: Path, pieces: list[str], **changed) -> Path:
    """``folder`` with a model of two layers and 64 positions, and a lower-casing tokenizer of ``pieces``."""
    vocabulary = [*SPECIAL_TOKENS, *pieces]
    settings = {
        "num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 128,
        "max_position_embeddings": 64, "initializer_range": 0.1,
    }  # fmt: skip
    BertForMaskedLM(BertConfig(vocab_size=len(vocabulary), **settings | changed)).save_pretrained(folder)
    tokenizer = berts_tokenizer({piece: number for number, piece in enumerate(vocabulary)}, lowercase=True)
    return save_tokenizer(tokenizer, folder, max_length=64)
