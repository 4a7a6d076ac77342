"""Set-up of every test: Triton's interpreter where there is no GPU, and NaN in all memory not yet written."""

import importlib.util
import json
import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # acts when a kernel is decorated, so before any import of bert_fast

import pytest

if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None:
    from bert_fast.interpreter import correct

    correct()

from bert_fast.data import prepare, read_documents, save_tokenizer, train_tokenizer
from bert_fast.run.config import PretrainConfig
from tests.support.parity import DEVICE

TINY = {
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
}


@pytest.fixture(autouse=True)
def _fresh_random_state():
    torch.manual_seed(20181011)


@pytest.fixture(autouse=True)
def _poison_uninitialized_memory():
    """torch.empty and its relatives give NaN (or the largest integer), so an element no kernel writes is seen."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def as_first_version():
    """as_first_version(folder) -> prepared data as the first version wrote them, and still to be opened."""
    from safetensors import safe_open
    from safetensors.numpy import load_file, save_file

    from bert_fast.data.shards import _size_and_sum

    def rewrite(folder):
        path = folder / "manifest.json"
        manifest = json.loads(path.read_text())
        for key in ("files", "blake2b", "duplicate_tokens", "one_sentence_documents", "one_sentence_tokens"):
            del manifest[key]
        del manifest["made_by"]["sentences"]
        (folder / "settings.json").write_text(json.dumps(manifest["made_by"], indent=1) + "\n")
        for entry in manifest["shards"]:
            shard = folder / "shards" / entry["file"]
            with safe_open(shard, framework="np") as file:
                about = file.metadata()
            tensors = load_file(shard)
            del tensors["document_counts"]
            save_file(tensors, shard, about)
            entry |= _size_and_sum(shard)
        for key in ("sentences", "tokens"):  # duplicates were counted
            manifest[key] = sum(entry[key] for entry in manifest["shards"])
        path.write_text(json.dumps(manifest, indent=1) + "\n")

    return rewrite


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
