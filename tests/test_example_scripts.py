"""The examples for other people's programs: what they train by one line is what transformers' classes train."""

import importlib
import sys

import pytest

import bert_fast
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
