"""The card of RUN/model: true, whole, and its snippets run."""

import re
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

import bert_fast
from bert_fast.run import card as cards
from bert_fast.run.metrics import read_metrics
from bert_fast.run.pretrain import pretrain
from tests.support.training_runs import train


@pytest.fixture
def quick(configure):
    return configure(steps=2, checkpoint_every=2)


def test_the_card_says_how_the_model_was_made(configure, tmp_path):
    config = configure(weight_decay=0.5, whole_word=True, phases="16:5,32:7:batch=6", push_to_hub="someone/a-bert")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bert_fast.run.hub.require_login", lambda *_: None)
        patch.setattr("bert_fast.run.hub.push", lambda *_: True)
        assert pretrain(config) == 0  # with its picture
    folder = tmp_path / "run" / "model"
    card = ModelCard.load(folder / "README.md")
    found = [line for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if line["kind"] == "validation"]
    assert [line["step"] for line in found] == [4, 8, 12]
    for line in found:
        assert re.search(rf"^\| {line['step']} \| {line['mlm_loss']:.4f} \|", card.text, re.MULTILINE)
    assert "![losses by update](loss.png)" in card.text
    assert (folder / "loss.png").read_bytes() == (tmp_path / "run" / "loss.png").read_bytes()
    for said in ("24 documents", "`data.txt`", "licence of the data is unknown", "WordPiece with 300 pieces",
                 "- updates 1 to 5: 16 tokens, 8 sequences\n- updates 6 to 12: 32 tokens, 6 sequences",
                 "| `--weight-decay` | 0.5 |", "| `--whole-word` | True |", "| `--model` | tiny.json |",
                 "(whole words)", "# a-bert", f"bert_fast {bert_fast.__version__}"):  # fmt: skip
        assert said in card.text, said
    assert "--beta2" in card.text
    assert "--clip" in card.text
    assert "--short-seq-prob" not in card.text  # the default
    assert str(tmp_path) not in card.content

    data = card.data
    assert (data.library_name, data.pipeline_tag, data.license) == ("transformers", "fill-mask", "unknown")
    assert set(data.tags) == {"bert", "bert_fast"}
    assert data.model_name == "a-bert"
    last = {result.metric_type: result.metric_value for result in data.eval_results}
    assert last == {"loss": found[-1]["mlm_loss"], "accuracy": found[-1]["mlm_accuracy"],
                    "perplexity": found[-1]["perplexity"]}  # fmt: skip


def test_the_snippets_run(quick, capsys):
    train(quick)
    folder = Path(quick.out) / "model"
    text = (folder / "README.md").read_text()
    snippets = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(snippets) == 2
    for snippet in snippets:
        assert "path/to/this/folder" in snippet
        capsys.readouterr()
        exec(snippet.replace("path/to/this/folder", str(folder)), {})
        assert capsys.readouterr().out.startswith("[")
    assert "loss.png" not in text  # there is none
    assert not (folder / "loss.png").exists()


def test_a_run_of_many_validations_shows_some_and_the_last(configure, monkeypatch):
    monkeypatch.setattr(cards, "MOST_ROWS", 3)
    config = configure(steps=10, validate_every=1, checkpoint_every=10)
    train(config)
    text = (Path(config.out) / "model" / "README.md").read_text()
    shown = [int(step) for step in re.findall(r"^\| (\d+) \|", text, re.MULTILINE)]
    assert len(shown) == 3
    assert shown == sorted(shown)
    assert shown[-1] == 10


def test_without_validation_there_are_no_results(configure, tmp_path):
    config = configure(steps=2, checkpoint_every=2, validation=0.0)
    train(config)
    card = ModelCard.load(tmp_path / "run" / "model" / "README.md")
    assert card.data.eval_results is None
    assert "Not validated" in card.text
