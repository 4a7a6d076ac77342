"""The tasks of one vector a text learn rules to the last example, and their metrics are the libraries'."""

import json
import random

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
import transformers

from bert_fast.tasks.examples import Example, read_examples
from bert_fast.tasks.finetuning import finetune, guess_task, read_task
from bert_fast.tasks.sentences import Classify, Multilabel, Regress
from tests.tasks.conftest import NOUNS, sentence

LEARN = {"learning_rate": 3e-3, "batch_size": 16, "dropout": 0.0, "precision": "fp32"}


def rule(label, count: int, seed: int) -> list[Example]:
    """Sentences whose nouns decide by ``label``."""
    draw, found = random.Random(seed), []
    for _ in range(count):
        nouns = draw.sample(NOUNS, draw.randint(1, 3))
        found.append(Example(sentence(draw, nouns), None, label(nouns)))
    return found


def test_classify_learns_which_word_is_there(base):
    def label(nouns):
        return "wet" if "rain" in nouns else "dry"

    found = finetune(base, rule(label, 200, 0), rule(label, 60, 1), task="classify", epochs=6, **LEARN)
    assert found["accuracy"] == found["f1_macro"] == found["matthews"] == 1.0
    assert found["f1"] == {"dry": 1.0, "wet": 1.0}
    assert found["majority"] < 0.8


def test_multilabel_learns_which_words_are_there(base, tmp_path):
    train, validation = rule(tuple, 240, 0), rule(tuple, 60, 1)
    found = finetune(base, train, validation, tmp_path, epochs=8, **LEARN)
    assert (found["task"], found["labels"]) == ("multilabel", sorted(NOUNS))
    assert found["accuracy"] == found["f1_micro"] == found["f1_macro"] == 1.0
    kept = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    assert kept.config.problem_type == "multi_label_classification"
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    with torch.no_grad():
        scores = kept(**tokenizer([e.text for e in validation], padding=True, return_tensors="pt")).logits
    for row, example in zip(scores, validation, strict=True):
        assert {kept.config.id2label[i] for i in range(4) if row[i] > 0} == set(example.label)


def test_regress_learns_to_count(base, tmp_path):
    def label(nouns):
        return str(len(nouns) + 0.25 * ("sun" in nouns))

    found = finetune(base, rule(label, 240, 0), rule(label, 60, 1), tmp_path, epochs=10, **LEARN)
    assert found["task"] == "regress"
    assert found["pearson"] > 0.98
    assert found["spearman"] > 0.9  # half of the counts are ties
    assert found["mse"] < 0.1 * found["mse_of_mean"]
    assert transformers.AutoConfig.from_pretrained(tmp_path).problem_type == "regression"
    again = finetune(tmp_path, rule(label, 16, 2), rule(label, 60, 1), epochs=1, **LEARN | {"learning_rate": 0.0})
    assert again["head"] == "the model's head is kept"
    assert again["mse"] == pytest.approx(found["mse"], rel=1e-4)


def test_a_head_of_another_kind_is_not_taken_for_ones_own(base, tmp_path):
    """A classifier of tokens has a head of the same name and shape."""
    config = transformers.BertConfig.from_pretrained(base, num_labels=2, id2label={0: "a", 1: "b"})
    transformers.BertForTokenClassification(config).save_pretrained(tmp_path)
    for path in base.glob("*token*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "vocab.txt").write_bytes((base / "vocab.txt").read_bytes())
    train = [Example("the sun", None, label) for label in "abab"]
    found = finetune(tmp_path, train, train, epochs=1, **LEARN)
    assert found["head"] == "the model's head is a BertForTokenClassification's: a new one is drawn"


def settled(task, *labels):
    examples = [Example(str(number), None, label) for number, label in enumerate(labels)]
    train, _, _ = task.settle(examples, examples)
    return task, train


def test_metrics_are_those_of_the_libraries():
    from scipy import stats
    from sklearn import metrics

    draw = np.random.default_rng()
    names = np.array(["a", "b", "c"])
    task, examples = settled(Classify(), *names[draw.integers(0, 3, 50)], "a", "b", "c")
    found = draw.dirichlet([1, 1, 1], len(examples))
    true, said = [e.label for e in examples], names[found.argmax(1)]
    measured = task.metrics(examples, list(found))
    assert measured["accuracy"] == pytest.approx(metrics.accuracy_score(true, said))
    assert measured["f1_macro"] == pytest.approx(metrics.f1_score(true, said, average="macro"))
    assert measured["matthews"] == pytest.approx(metrics.matthews_corrcoef(true, said))

    task, examples = settled(Multilabel(), ("a", "b"), (), ("b",), ("a", "c"))
    found = [np.array(p) for p in ([0.9, 0.9, 0.1], [0.1, 0.2, 0.3], [0.6, 0.4, 0.1], [0.5, 0.1, 0.2])]
    measured = task.metrics(examples, found)  # a: 2 right of 3 said and 2 true; b: 1 of 1 and 2; c: 0 of 0 and 1
    assert measured["f1"] == pytest.approx({"a": 4 / 5, "b": 2 / 3, "c": 0.0})
    assert measured["f1_micro"] == pytest.approx(2 * 3 / (4 + 5))
    assert measured["accuracy"] == 0.5
    task, examples = settled(Multilabel(), ("a",), (), ("a",))
    measured = task.metrics(examples, [np.array([p]) for p in (0.9, 0.9, 0.1)])
    assert (measured["f1_micro"], measured["f1"], measured["accuracy"]) == (0.5, {"a": 0.5}, pytest.approx(1 / 3))

    task, examples = settled(Regress(), *map(str, draw.normal(size=40)))
    found = draw.normal(size=40)
    measured = task.metrics(examples, list(found))
    true = [float(e.label) for e in examples]
    assert measured["pearson"] == pytest.approx(stats.pearsonr(true, found).statistic)
    assert measured["spearman"] == pytest.approx(stats.spearmanr(true, found).statistic)
    for number in (1.0, 0.1):  # the mean of forty 0.1 is another number
        measured = task.metrics(examples, [number] * 40)
        assert (measured["pearson"], measured["spearman"]) == (0.0, 0.0)
        measured = task.metrics([Example("a", None, str(number))] * 40, list(found))
        assert np.isnan([measured["pearson"], measured["spearman"]]).all()
    told = task.settle(examples, [Example("a", None, "1.0"), Example("b", None, "1")])[2]
    assert told == ["all validation examples have the number 1.0: nothing correlates with it"]


def test_a_prediction_as_json():
    task, (example, *_) = settled(Classify(), "a", "b")
    assert task.line(example, np.array([0.25, 0.75])) == {
        "label": "b", "probability": 0.75, "probabilities": {"a": 0.25, "b": 0.75},
    }  # fmt: skip
    task, (example, *_) = settled(Multilabel(), ("a", "b"), ("b",), ())
    assert task.line(example, np.array([0.25, 0.5])) == {"labels": ["b"], "probabilities": {"a": 0.25, "b": 0.5}}
    task, (example, *_) = settled(Regress(), "0.5", "1.5")
    assert task.line(example, 1.25) == {"number": 1.25}


@pytest.mark.parametrize(
    ("labels", "task"),
    [
        (["a", "b"], "classify"),
        (["0", "1", "2"], "classify"),
        (["0.5", "1"], "regress"),
        (["1.0", "0.0"], "classify"),
        ([("a",), "b"], "multilabel"),
        ([(), ()], "multilabel"),
        (["0.5", "x", "1.5"], "classify"),
    ],
)
def test_the_task_is_guessed_from_the_labels(labels, task):
    assert guess_task([Example("", None, label) for label in labels]) == task


def test_a_header_before_numbers_is_no_label():
    with pytest.raises(ValueError, match="the first label, 'score', is no number and all others are: name the columns"):
        guess_task([Example("", None, label) for label in ("score", "0.5", "1")])


def parquet(path, **columns):
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


def test_parquet_has_the_examples_of_json_lines(tmp_path):
    columns = {
        "text": ["one", "two", "three"],
        "label": [1, 0, 1],
        "pair": ["x", "y", "z"],
        "tags": [["a"], [], ["b", "a"]],
    }
    file = parquet(tmp_path / "t.parquet", **columns)
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    (tmp_path / "t.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    for named in ({}, {"pair": "pair"}, {"label": "tags"}, {"text": "pair", "label": "tags"}):
        assert read_examples(file, **named) == read_examples(tmp_path / "t.jsonl", **named)
    assert read_examples(file, label="tags")[2] == Example("three", None, ("b", "a"))


@pytest.mark.parametrize(
    ("columns", "named", "message"),
    [
        ({"text": ["a"], "label": [1]}, {"label": "gold"}, "no column 'gold' among its own: text, label"),
        ({"text": ["a", None], "label": [1, 1]}, {}, "row 2: 'text' is no text"),
        ({"text": ["a", "b"], "label": [1, None]}, {}, "row 2: the label is empty"),
        ({"text": ["a", "b"], "label": [{"x": 1}] * 2}, {}, "row 1: 'label' is no label"),
    ],
)
def test_bad_rows_of_parquet_are_named(tmp_path, columns, named, message):
    with pytest.raises(ValueError, match=rf"t\.parquet.*{message}"):
        read_examples(parquet(tmp_path / "t.parquet", **columns), **named)


def test_what_is_no_parquet_is_named(tmp_path):
    (tmp_path / "t.parquet").write_text("no table")
    with pytest.raises(ValueError, match=r"t\.parquet is no Parquet file"):
        read_examples(tmp_path / "t.parquet")


def test_labels_of_several_columns_and_of_one_cell(tmp_path):
    (tmp_path / "t.csv").write_text("text,toxic,insult\na,1,0\nb,true,1.0\nc,0,No\n")
    task, train, _ = read_task("auto", tmp_path / "t.csv", tmp_path / "t.csv",
                               columns={"text": "text", "label": ["toxic", "insult"]})  # fmt: skip
    assert task.name == "multilabel"
    assert [e.label for e in train] == [("toxic",), ("toxic", "insult"), ()]
    (tmp_path / "t.tsv").write_text("a\tx, y\nb\t\nc\ty\n")
    _, train, _ = read_task("multilabel", tmp_path / "t.tsv", tmp_path / "t.tsv")
    assert [e.label for e in train] == [("x", "y"), (), ("y",)]
    _, train, _ = read_task("multilabel", tmp_path / "t.tsv", tmp_path / "t.tsv", separator="|")
    assert train[0].label == ("x, y",)


@pytest.mark.parametrize(
    ("task", "name", "content", "columns", "message"),
    [
        ("auto", "t.csv", "text,x,y\na,1,0\nb,2,0\n", {"text": "text", "label": ["x", "y"]}, r"line 3: 'x' is '2'"),
        ("regress", "t.tsv", "a\t1.5\nb\tx\n", {}, "line 2: the label 'x' is no finite number"),
        ("regress", "t.tsv", "a\tinf\n", {}, "line 1: the label 'inf' is no finite number"),
        ("classify", "t.jsonl", '{"text": "a", "label": ["x"]}\n' * 2, {}, "learn lists with --task multilabel"),
    ],
)
def test_bad_labels_are_named(tmp_path, task, name, content, columns, message):
    (tmp_path / name).write_text(content)

    def settled_task():
        made, *parts = read_task(task, tmp_path / name, tmp_path / name, columns=columns)
        made.settle(*parts)

    with pytest.raises(ValueError, match=message):
        settled_task()


@pytest.mark.parametrize("kind", [Classify, Multilabel])
def test_a_label_that_only_the_validation_has_is_refused(kind):
    train = [Example("", None, label) for label in ("a", "b")]
    with pytest.raises(ValueError, match="the label 'c', which no training example has"):
        kind().settle(train, [Example("", None, "c")])


def test_options_of_another_task_are_refused(base):
    with pytest.raises(ValueError, match="class_weights is not for the task regress"):
        read_task("regress", "x.tsv", "y.tsv", class_weights="balanced")
    with pytest.raises(ValueError, match="separator is not for the task classify, which takes class_weights"):
        finetune(base, [], [], task="classify", separator=",")
