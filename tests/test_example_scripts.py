"""The examples: what other people's programs train by one line is what transformers' classes train, and the way to a
domain runs from its first line to its last."""

import importlib
import json
import runpy
import sys

import pytest

import bert_fast
from bert_fast.data import read_documents, save_tokenizer, train_tokenizer
from tests.support.documents import ROOT

TASKS = ("classify", "tokens", "answers", "choice", "words")


@pytest.fixture
def example(monkeypatch):
    """example(name, *argv, registered=True): what main returns; the Auto classes are transformers' again after it."""
    monkeypatch.syspath_prepend(ROOT / "examples")

    def run(name: str, *argv, registered: bool = True) -> dict:
        module = importlib.import_module(name)
        (bert_fast.register if registered else bert_fast.unregister)()
        return module.main([*map(str, argv), "--device", "cpu"])

    yield run
    bert_fast.unregister()
    for name in ("trainer_tasks", "sentence_vectors"):
        sys.modules.pop(name, None)


def assert_same_training(example, *argv):
    ours, theirs = (example(*argv, registered=registered) for registered in (True, False))
    assert ours["kind"].__module__.startswith("bert_fast.")
    assert theirs["kind"].__module__.startswith("transformers.")
    assert ours["losses"] == pytest.approx(theirs["losses"], rel=1e-5)
    assert len({*ours["losses"]}) == len(ours["losses"])  # it learns something


@pytest.mark.parametrize("task", TASKS)
def test_a_task_by_trainer_has_transformers_losses(example, tmp_path, task):
    assert_same_training(example, "trainer_tasks", task, "--out", tmp_path, "--steps", 4)


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_a_task_by_trainer_learns_its_rule(example, tmp_path, task):
    assert example("trainer_tasks", task, "--out", tmp_path)["score"] == 1


@pytest.mark.parametrize("cached", [(), ("--cached",)], ids=["in-batch", "cached"])
def test_sentence_transformers_trains_with_the_same_losses(example, tmp_path, cached):
    pytest.importorskip("sentence_transformers")
    assert_same_training(example, "sentence_vectors", "--out", tmp_path, "--steps", 4, *cached)


@pytest.mark.slow
def test_sentence_transformers_learns_which_belong_together(example, tmp_path):
    pytest.importorskip("sentence_transformers")
    plain, cached = (example("sentence_vectors", "--out", tmp_path, *argv) for argv in ((), ("--cached",)))
    assert plain["score"] == cached["score"] == 1
    assert plain["losses"] == pytest.approx(cached["losses"], rel=1e-2)


def test_the_notebook_is_its_script(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    notebook = importlib.import_module("notebook").notebook
    script = (ROOT / "examples" / "domain.py").read_text(encoding="utf-8")
    written = (ROOT / "examples" / "domain.ipynb").read_text(encoding="utf-8")
    assert written == notebook(script), "python scripts/notebook.py examples/domain.py writes it anew"
    cells = json.loads(written)["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert all(f"# %%\n{text}\n" in script for text in code)
    assert len(code) == script.count("# %%\n")
    assert cells[0]["source"][0] == "# An encoder for your domain\n"
    with pytest.raises(ValueError, match="begins with # %%"):
        notebook("import os\n")


@pytest.mark.slow
def test_the_way_to_a_domain(tmp_path, monkeypatch, capsys):
    documents = read_documents()[:40]
    tokenizer = train_tokenizer((sentence for document in documents for sentence in document), 500)
    config = bert_fast.BertConfig(
        vocab_size=500, num_hidden_layers=2, hidden_size=32, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=64,
    )  # fmt: skip
    bert_fast.BertForPreTraining(config).save_pretrained(tmp_path / "base")
    save_tokenizer(tokenizer, tmp_path / "base")
    (tmp_path / "corpus").mkdir()
    for number, document in enumerate(read_documents()[40:]):
        (tmp_path / "corpus" / f"{number}.txt").write_text("\n".join(document), encoding="utf-8")
    for name, value in {"BASE": tmp_path / "base", "CORPUS": tmp_path / "corpus", "OUT": tmp_path / "out",
                        "STEPS": 6, "SEQ": 32}.items():  # fmt: skip
        monkeypatch.setenv(name, str(value))
    found = runpy.run_path(str(ROOT / "examples" / "domain.py"), run_name="__main__")
    assert found["manifest"]["documents"] == len(read_documents()) - 40
    assert found["facts"]["updates"] == 6
    assert len(found["held_out"]) == 3
    assert found["vectors"].shape == (2, 32)
    assert set(found["scores"]) == {"adapted", "base"}
    assert bert_fast.BertForMaskedLM.from_pretrained(tmp_path / "out" / "run" / "model").config.vocab_size == 800
    assert "300 pieces are new" in capsys.readouterr().err
