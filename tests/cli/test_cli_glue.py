"""bert-fast glue: from GLUE's published files and a pre-trained model to the table beside BERT-base's scores."""

import json

import pytest
import torch

import bert_fast
from bert_fast.data import load_tokenizer, save_tokenizer
from bert_fast.tasks import glue_runs
from tests.support.glue_files import write_glue


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_glue(tmp_path_factory.mktemp("glue") / "data", train=24, development=12)


@pytest.fixture(scope="module")
def learner(folder, tmp_path_factory):
    """A folder with a model that learns quickly."""
    config = bert_fast.BertConfig.from_pretrained(
        folder / "model", initializer_range=0.1, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    torch.manual_seed(1)
    made = tmp_path_factory.mktemp("learner")
    bert_fast.BertForPreTraining(config).save_pretrained(made / "model")
    save_tokenizer(load_tokenizer(folder / "tok"), made / "model")
    return made


def glue(run, folder, data, *argv):
    return run("glue", folder / "model", "--data", data, "--batch-size", 8, "--seq", 32, "--epochs", 1, *argv)


@pytest.mark.slow
def test_a_rule_is_learnt_and_stands_beside_the_published_scores(run, learner, tmp_path):
    out, data = tmp_path / "out", write_glue(tmp_path / "data", train=96, development=24)
    argv = ("--tasks", "sts-b,sst-2", "--seeds", 1, "--epochs", 4, "--lr", 3e-3, "--out", out)
    done = glue(run, learner, data, *argv, "--json")
    assert done.code == 0, done.err
    tasks = done.result["tasks"]
    assert list(tasks) == ["SST-2", "STS-B"]
    assert tasks["SST-2"]["measures"][0]["median"] == 100  # a label is told by its words
    assert tasks["STS-B"]["measures"][1]["metric"] == "spearman"
    assert tasks["STS-B"]["measures"][1]["median"] > 60
    table = (out / "glue.md").read_text()
    (line,) = [line for line in table.splitlines() if line.startswith("| SST-2")]
    assert [cell.strip() for cell in line.split("|")[1:-1]] == [
        "SST-2", "accuracy", "100.00", "", "1", "0.003", "92.32", "93.5"]  # fmt: skip
    assert "SST-2: train.tsv has 96 examples, GLUE's 67,349." in table
    assert json.loads((out / "glue.json").read_text())["tasks"] == tasks
    assert sorted(path.name for path in (out / "runs").iterdir()) == [
        f"{name}-lr0.003-seed0.json" for name in ("SST-2", "STS-B")]  # fmt: skip


def test_it_goes_on_after_the_runs_that_ended(run, folder, data, tmp_path, monkeypatch):
    made, finetune = [], glue_runs.finetune

    def counting(*args, seed, **kwargs):
        made.append(seed)
        if len(made) == 3:
            raise KeyboardInterrupt
        return finetune(*args, seed=seed, **kwargs)

    monkeypatch.setattr(glue_runs, "finetune", counting)
    argv = ("--tasks", "rte", "--seeds", 3, "--out", tmp_path / "out", "--json")
    assert glue(run, folder, data, *argv).code == 130
    done = glue(run, folder, data, *argv)
    assert made == [0, 1, 2, 2]
    assert done.code == 0, done.err
    scores = done.result["tasks"]["RTE"]["measures"][0]["scores"]
    assert scores == glue(run, folder, data, *argv[:4], "--json").result["tasks"]["RTE"]["measures"][0]["scores"]
    done = glue(run, folder, data, *argv, "--batch-size", 4)
    assert done.code == 1
    assert "another batch_size (8 there, 4 here): use another --out" in done.err


def test_both_development_sets_of_mnli_and_the_diagnostic_set_are_measured(run, folder, data):
    full = data / "diagnostic" / "diagnostic-full.tsv"
    full.write_text("Domain\tPremise\tHypothesis\tLabel\nNews\ta\tb\tneutral\nNews\tc\td\tentailment\n")
    done = glue(run, folder, data, "--tasks", "mnli", "--seeds", 1)
    full.unlink()
    lines = [[cell.strip() for cell in line.split("|")[1:3]] for line in done.out.splitlines() if line.startswith("| ")]
    assert lines[2:] == [["MNLI", "accuracy, matched"], ["MNLI", "accuracy, mismatched"], ["AX", "matthews"]]


def test_what_is_not_there_is_named(run, folder, data, tmp_path):
    done = glue(run, folder, tmp_path, "--tasks", "rte")
    assert done.code == 1
    assert "no RTE/train.tsv, RTE/dev.tsv" in done.err
    assert "GLUE has no task 'snli'" in glue(run, folder, data, "--tasks", "snli").err
    assert glue(run, folder, data, "--lr", "2e-5,0").code == 2
