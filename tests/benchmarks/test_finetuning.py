"""The benchmark of fine-tuning: the same loss before any speed, the same examples, and every table that it promises."""

import dataclasses
import json
import statistics

import numpy as np
import pytest
import torch

from benchmarks import finetuning, run, tables
from benchmarks.workload import model_config


@pytest.fixture
def quick(monkeypatch):
    """Small rounds of a tiny model; limits that are not measured."""
    monkeypatch.setattr(run.limits, "measure", lambda *_: {"matmul_tflops": {"float32": 0.1, "bfloat16": 0.1}})
    monkeypatch.setattr(run.tables, "introduce", lambda *_: None)
    works = [dataclasses.replace(work, batch=4, updates=2, predicted=8) for work in finetuning.WORKS]
    monkeypatch.setattr(finetuning, "WORKS", works)
    return ("--mode", "finetune", "--model", "micro", "--rounds", "2", "--device", "cpu")


def test_a_whole_run(quick, tmp_path, capsys):
    assert run.main([*quick, "--dtype", "bfloat16", "--json", str(tmp_path / "r.json")]) == 0
    found = json.loads((tmp_path / "r.json").read_text())
    assert found["parity"]["passed"]
    assert found["parity"]["compared"] == 4
    names = ["bert_fast", "trainer", "trainer-grouped"]
    both = [(work.name, mode, name) for work in finetuning.WORKS for mode in ("finetune", "predict")
            for name in [*names, "trainer-padded"][: 3 + (work.task == "qa")]]  # fmt: skip
    assert [(row["lengths"], row["mode"], row["contender"]) for row in found["steps"]] == both
    for row in found["steps"]:
        assert row["dtype"] == "bfloat16"
        assert min(row[k] for k in ("real_tokens_per_s", "sequences_per_s", "executed_tflops", "mfu")) > 0
        assert ("ours_is" in row) == (row["contender"] != "bert_fast")
    assert "SQuAD-like lengths, BERT-micro, Trainer in bfloat16" in capsys.readouterr().out


def test_ours_as_it_chooses_beside_trainer_as_published_and_in_the_same_dtype(quick, tmp_path, monkeypatch):
    monkeypatch.setattr(finetuning, "has_matrix_unit", lambda *_: True)
    monkeypatch.setattr(finetuning, "WORKS", finetuning.WORKS[:1])
    path = tmp_path / "r.json"
    assert run.main([*quick, "--rounds", "1", "--peers", "trainer", "--json", str(path)]) == 0
    rows = json.loads(path.read_text())["steps"]
    assert [(row["mode"], row["contender"], row["dtype"]) for row in rows] == [
        (mode, *one)
        for table in (
            [("bert_fast", "bfloat16"), ("bert_fast-fp32", "float32"), ("trainer", "float32")],
            [("bert_fast", "bfloat16"), ("trainer", "bfloat16")],
        )
        for mode in ("finetune", "predict")
        for one in table
    ]
    for row in rows:  # a rate over its limit, whatever was timed
        assert row["share_of_peak"] == pytest.approx(row["executed_tflops"] / 0.1)
        assert row["real_tokens_per_s"] > row["sequences_per_s"]
    text = tables.compared([("cpu", rows)]).markdown()
    assert "| cpu | finetune micro, 4 x 64, SST-2's lengths, bfloat16, adamw |" in text
    assert text.count("trainer") == 4


def test_a_loss_that_differs_prints_no_speed(quick, tmp_path, monkeypatch, capsys):
    class Other(finetuning.Ours):
        """Whose weights change after theirs were taken."""

        def __init__(self, *given, **more):
            super().__init__(*given, **more)
            one = self.training.one

            def wrong(step):
                with torch.no_grad():
                    self.training.model.bert.encoder.layer[-1].output.LayerNorm.weight.mul_(1.001)
                return one(step)

            self.training.one = wrong

    monkeypatch.setattr(finetuning, "Ours", Other)
    assert run.main([*quick, "--json", str(tmp_path / "r.json")]) == 1
    assert "parity failed" in capsys.readouterr().err
    assert json.loads((tmp_path / "r.json").read_text())["steps"] == []


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("--peers", "hf-eager"), "'hf-eager' is none of trainer, trainer-grouped, trainer-padded"),
        (("--dtype", "float16"), "bert-fast trains in bfloat16 or float32"),
    ],
)
def test_bad_arguments(quick, capsys, given, message):
    with pytest.raises(SystemExit):
        run.main([*quick, *given])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "waste"), [("trainer", (1.6, 2.4)), ("trainer-grouped", (1, 1.1)), ("trainer-padded", (2.4, 3))]
)
def test_every_contender_has_the_lengths_of_the_whole_in_its_batches(name, waste):
    """Trainer's grouped sampler begins with the longest: its batches are taken in any order."""
    work, config = finetuning.WORKS[0], model_config("micro", dropout=0.0)
    items = work.items(config.vocab_size, 64)
    mean = statistics.fmean(item.length for item in items)
    assert mean == pytest.approx(np.average(np.arange(len(finetuning.SST2)), weights=finetuning.SST2), rel=0.02)
    contender = finetuning.Trainers(name, work, config, items, "cpu", False, 64)
    for _ in range(100):
        contender.next_batch()
    real, computed = contender.noted
    assert len(real) == 100 * 32
    assert statistics.fmean(real) == pytest.approx(mean, rel=0.1)
    assert waste[0] <= sum(computed) / sum(real) <= waste[1]
