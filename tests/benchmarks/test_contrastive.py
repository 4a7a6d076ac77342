"""benchmarks/contrastive.py as a user runs it, on a tiny model."""

import json

import pytest
import torch

pytest.importorskip("sentence_transformers")

from benchmarks import contrastive, report, results

SMALL = ("--model", "micro", "--batch", "4", "--rounds", "2", "--seq", "16")


@pytest.mark.parametrize("cached", [(), ("--cached", "2")], ids=["in-batch", "cached"])
def test_it_runs_and_saves_what_it_measured(cached, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    assert contrastive.main([*SMALL, *cached, "--save"]) == 0
    (path,) = tmp_path.rglob("*.json")
    found = json.loads(path.read_text())
    assert [row["contender"] for row in found["steps"]] == list(contrastive.CONTENDERS)
    assert all(row["sequences"] == 8 and 8 * 3 < row["real_tokens"] <= 8 * 16 for row in found["steps"])
    assert found["parity"]["passed"]
    assert found["parity"]["compared"] == 2
    with_own_table = report.compared([(path, found)], tmp_path)
    assert f"contrastive micro, 8 x {found['work']['seq']}, pairs of sentences" in with_own_table
    assert "ours is" in capsys.readouterr().out


def test_what_computes_something_else_is_not_timed(monkeypatch, capsys):
    build = contrastive.build

    def wrong(name, *arguments, **options):
        loss = build(name, *arguments, **options)
        if name == "bert_fast":
            with torch.no_grad():
                loss.model[0].auto_model.embeddings.LayerNorm.bias += 0.01
        return loss

    monkeypatch.setattr(contrastive, "build", wrong)
    assert contrastive.main([*SMALL]) == 1
    shown = capsys.readouterr()
    assert "parity failed" in shown.err
    assert "sequences/s" not in shown.out


def test_a_corpus_that_is_too_small_is_refused(tmp_path, capsys):
    (tmp_path / "text.txt").write_text("One sentence is here. Another one is there.\n")
    assert contrastive.main(["--corpus", str(tmp_path / "text.txt")]) == 2
    assert "gives 1 pairs of sentences, fewer than --batch 32" in capsys.readouterr().err
