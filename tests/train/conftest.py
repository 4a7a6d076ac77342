"""Prepared data and a model small enough that a run of a dozen updates takes a second."""

import json

import pytest

from bert_fast.data import prepare, read_documents, save_tokenizer, train_tokenizer
from bert_fast.train.config import PretrainConfig
from tests.parity import DEVICE

TINY = {
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
}


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
    """A folder with data/ (24 documents, a vocabulary of 300), other/ (six other documents) and tiny.json."""
    if DEVICE == "cuda":  # a GPU machine has the packages that it has
        pytest.importorskip("sentencex")
    folder = tmp_path_factory.mktemp("prepared")
    documents = sorted(read_documents(), key=len)[20:50]
    tokenizer = train_tokenizer((sentence for document in documents for sentence in document), 300)
    save_tokenizer(tokenizer, folder / "tokenizer")
    for name, part in (("data", documents[:24]), ("other", documents[24:])):
        corpus = folder / f"{name}.txt"
        corpus.write_text("\n\n".join("\n".join(document) for document in part), encoding="utf-8")
        prepare(corpus, tokenizer, folder / name, workers=1)
    (folder / "tiny.json").write_text(json.dumps(TINY), encoding="utf-8")
    return folder


@pytest.fixture
def configure(prepared, tmp_path):
    """``configure(**changes)``: the options of a run of 12 updates in ``tmp_path / "run"``, checkpoints every 4."""

    def make(**changes) -> PretrainConfig:
        options = {
            "data": str(prepared / "data"), "out": str(tmp_path / "run"), "model": str(prepared / "tiny.json"),
            "seq": 32, "steps": 12, "batch_size": 8, "lr": 1e-3, "warmup": 2.0, "checkpoint_every": 4, "log_every": 1,
            "validation": 0.1, "workers": 0, "peak_tflops": 0.1, "device": "cpu", "precision": "fp32",
        }  # fmt: skip
        return PretrainConfig(**{**options, **changes})

    return make
