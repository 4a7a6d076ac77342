"""A small corpus, its tokenizer and shards made by the commands themselves, and a tiny model."""

import io
import json
import math
import sys
from pydoc_data.topics import topics
from typing import NamedTuple

import pytest
import torch

import bert_fast
from bert_fast.cli import main
from bert_fast.data import load_tokenizer, save_tokenizer


class Done(NamedTuple):
    """What a command left: its exit code and what it wrote on stdout and stderr."""

    code: int
    out: str
    err: str

    @property
    def lines(self) -> list[dict]:
        """stdout as JSON lines."""
        return [json.loads(line) for line in self.out.splitlines()]

    @property
    def result(self) -> dict:
        """The one line of kind "result"."""
        (found,) = [line for line in self.lines if line["kind"] == "result"]
        return found


@pytest.fixture
def run(capsys, monkeypatch):
    """run("tokenizer", path, ..., stdin="...") -> Done, in this process."""
    monkeypatch.setattr("bert_fast.output._LineProgress.every", math.inf)  # at the end alone, however slow the machine

    def run(*argv, stdin: str | bytes = "") -> Done:
        raw = stdin.encode() if isinstance(stdin, str) else stdin
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(raw), encoding="utf-8"))
        capsys.readouterr()
        code = main([str(argument) for argument in argv])
        return Done(code, *capsys.readouterr())

    return run


@pytest.fixture(scope="session")
def pretrained(folder):
    """A finished run of four updates on ``data``, with the checkpoints of updates 2 and 4; tests copy it."""
    made = folder / "pretrained"
    size = json.loads((folder / "model" / "config.json").read_text())
    (folder / "size.json").write_text(json.dumps({**size, "dtype": "float16"}))
    argv = ["pretrain", "--data", folder / "data", "--out", made, "--model", folder / "size.json", "--seq", 32,
            "--steps", 4, "--batch-size", 4, "--checkpoint-every", 2, "--validation", 0.3, "--seed", 5, "--workers", 0,
            "--peak-tflops", 1, "--device", "cpu", "--quiet"]  # fmt: skip
    assert main([str(argument) for argument in argv]) == 0
    return made


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """corpus.jsonl (15 topics of the Python language reference), tok, data, and model, tiny with random weights."""
    folder = tmp_path_factory.mktemp("cli")
    documents = [json.dumps({"text": topics[name]}) for name in sorted(topics)[:15]]
    (folder / "corpus.jsonl").write_text("\n".join(documents) + "\n", encoding="utf-8")
    corpus, tok, data = (str(folder / name) for name in ("corpus.jsonl", "tok", "data"))
    assert main(["tokenizer", corpus, "--vocab-size", "600", "--out", tok, "--quiet"]) == 0
    assert main(["prepare", corpus, "--tokenizer", tok, "--out", data, "--workers", "1", "--quiet"]) == 0
    torch.manual_seed(1)
    config = bert_fast.BertConfig(
        vocab_size=600, num_hidden_layers=2, hidden_size=32, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=64, initializer_range=0.5,
    )  # fmt: skip
    bert_fast.BertForPreTraining(config).save_pretrained(folder / "model")
    save_tokenizer(load_tokenizer(tok), folder / "model")
    return folder
