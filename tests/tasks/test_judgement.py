"""What a judgement says and draws, of few labels and of many, and of a task that it knows nothing of."""

from typing import NamedTuple

import numpy as np
import pytest

from bert_fast.tasks.examples import Example
from bert_fast.tasks.judgement import confused_pairs, judge, plot_judgement
from bert_fast.tasks.sentences import Classify
from bert_fast.tasks.task import Task


def judged(labels: int, examples: int = 200, count: int = 3):
    """(judgement, truth, said) of random probabilities."""
    draw = np.random.default_rng()
    task = Classify()
    task.labels = [f"label {n}" for n in range(labels)]
    truth, probabilities = draw.integers(0, labels, examples), draw.dirichlet(np.ones(labels), examples)
    given = [Example(f"text {n}", None, task.labels[t]) for n, t in enumerate(truth)]
    places = [f"f.tsv, line {n}" for n in range(1, examples + 1)]
    return judge(task, given, list(probabilities.astype(np.float32)), places, count), truth, probabilities.argmax(1)


def test_every_count_of_a_small_matrix_is_printed():
    found, truth, said = judged(3)
    lines = found.text().splitlines()
    begin = next(n for n, line in enumerate(lines) if line.startswith("truth \\ said"))
    printed = [[int(cell.replace(",", "")) for cell in line.split()[-3:]] for line in lines[begin + 1 : begin + 4]]
    assert printed == [[int(((truth == t) & (said == s)).sum()) for s in range(3)] for t in range(3)]
    assert sum(line.startswith("  f.tsv, line") for line in lines) == 3


def test_of_many_labels_the_commonest_confusions_are_printed():
    found, truth, said = judged(40, 400)
    pairs = confused_pairs(found.matrix)
    assert sum(count for count, _, _ in pairs) == (truth != said).sum() == found.wrong
    assert [count for count, _, _ in pairs] == sorted((count for count, _, _ in pairs), reverse=True)
    count, row, column = pairs[0]
    assert count == ((truth == row) & (said == column)).sum()
    assert f"  {count} examples of label {row} taken for label {column}" in found.text()


@pytest.mark.parametrize("labels", [2, 40])
def test_a_matrix_is_drawn(tmp_path, labels):
    found, *_ = judged(labels)
    picture = plot_judgement(found, tmp_path / "deep" / "p.svg", "a title")
    drawn = picture.read_text(encoding="utf-8")
    assert "a title" in drawn
    assert [path.name for path in picture.parent.iterdir()] == ["p.svg"]  # nothing is left aside
    with pytest.raises(ValueError, match=r"must end with \.png"):
        plot_judgement(found, tmp_path / "p.gif", "a title")


class Riddle(NamedTuple):
    text: str
    label: str
    where: str


class Riddles(Task):
    """A task that judge knows nothing of."""

    name, metric = "riddles", "overlap"

    def metrics(self, examples, predictions):
        shared = [len({*e.label} & {*p}) / len({*e.label} | {*p}) for e, p in zip(examples, predictions, strict=True)]
        return {"overlap": sum(shared) / len(shared)}

    def line(self, example, prediction):
        return {"answer": prediction}


def test_any_task_is_judged_by_its_own_metric_of_each_example(tmp_path):
    riddles = [Riddle("one", "abc", ""), Riddle("two", "abc", ""), Riddle("three", "abc", "")]
    found = judge(Riddles(), riddles, ["abd", "abc", "xyz"], ["line 1", "line 2", "line 3"])
    assert found.metrics == {"overlap": pytest.approx(0.5)}
    assert [(v.where, v.said, v.badness) for v in found.worst] == [
        ("line 3", {"answer": "xyz"}, 1.0), ("line 1", {"answer": "abd"}, 0.5)]  # fmt: skip
    assert found.wrong == 2
    with pytest.raises(ValueError, match="nothing to draw"):
        plot_judgement(found, tmp_path / "p.png", "riddles")
