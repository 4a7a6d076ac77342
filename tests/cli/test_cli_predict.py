"""bert-fast predict: transformers' probabilities in the input's order, from any form of input, in bounded memory."""

import csv
import io
import json
import random

import numpy as np
import pyarrow
import pytest
import torch
import transformers
from pyarrow import parquet

from bert_fast.tasks import trained
from bert_fast.tasks.tables import Source
from bert_fast.tasks.trained import load_trained, predict
from tests.support.fine_tuned import logits_of, outputs_of, save_head

WORDS = ["assert", "statement", "value", "name", "break", "loop", "import", "class", "the", "of", "to"]
LABELS = {0: "bad", 1: "fair", 2: "good"}


def sentences(count, seed=None):
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randrange(1, 30))) for _ in range(count)]


@pytest.fixture(scope="module")
def classifier(folder, tmp_path_factory):
    names = {"id2label": LABELS, "label2id": {name: row for row, name in LABELS.items()}}
    return save_head(folder / "model", tmp_path_factory.mktemp("classifier"), **names)


def predictions(done):
    assert done.code == 0, done.err
    return [line for line in done.lines if line["kind"] == "prediction"]


def test_probabilities_are_those_of_the_pipeline(run, classifier):
    texts = sentences(30)
    pipeline = transformers.pipeline("text-classification", str(classifier), top_k=None, device="cpu")
    found = predictions(run("predict", classifier, stdin="\n".join(texts) + "\n"))
    assert [line["index"] for line in found] == list(range(30))
    for line, expected in zip(found, pipeline(texts), strict=True):
        scores = {row["label"]: row["score"] for row in expected}
        assert line["probabilities"] == pytest.approx(scores, abs=1e-4)
        assert line["label"] == max(scores, key=scores.get)
        assert line["probability"] == pytest.approx(max(scores.values()), abs=1e-4)


def test_the_order_is_the_inputs_through_windows_and_batches(run, classifier, monkeypatch):
    texts = sentences(50)
    expected = logits_of(classifier, texts).softmax(1).numpy()
    monkeypatch.setattr(trained, "WINDOW", 7)
    found = predictions(run("predict", classifier, "-", "--batch-tokens", 40, stdin="\n".join(texts)))
    probabilities = [list(line["probabilities"].values()) for line in found]
    np.testing.assert_allclose(probabilities, expected, atol=1e-4)


def test_a_window_is_written_before_the_next_is_read(classifier, monkeypatch):
    monkeypatch.setattr(trained, "WINDOW", 4)
    model, read = load_trained(classifier), []
    lines = (read.append(number) or text for number, text in enumerate(sentences(12)))
    found = predict(model, model.task.unlabelled(Source("stdin", ".text", lines)))
    next(found)
    assert len(read) == 4


def test_tables_and_json_lines_name_their_columns(run, classifier, tmp_path):
    texts, pairs = sentences(6), sentences(6)
    expected = logits_of(classifier, texts, pairs).softmax(1).numpy()
    rows = list(zip(texts, pairs, strict=True))
    (tmp_path / "t.tsv").write_text("".join(f"{a}\t{b}\n" for a, b in [("one", "two"), *rows]))
    with (tmp_path / "t.csv").open("w", newline="") as file:
        csv.writer(file, quoting=csv.QUOTE_ALL).writerows([("one", "two"), *rows])
    lines = "".join(json.dumps({"two": b, "one": a}) + "\n" for a, b in rows)
    (tmp_path / "t.jsonl").write_text(lines)
    parquet.write_table(pyarrow.table({"one": texts, "two": pairs}), tmp_path / "t.parquet")
    forms = [(tmp_path / f"t.{kind}",) for kind in ("tsv", "csv", "jsonl", "parquet")] + [("-", "--read-as", "jsonl")]
    for form in forms:
        found = predictions(run("predict", classifier, *form, "--text", "one", "--pair", "two", stdin=lines))
        probabilities = [list(line["probabilities"].values()) for line in found]
        np.testing.assert_allclose(probabilities, expected, atol=1e-4, err_msg=str(form))


def test_a_line_that_is_no_example_is_named_and_those_before_it_are_predicted(run, classifier, tmp_path):
    done = run("predict", classifier, stdin=b"good value\nbreak\n\xff\nloop\n")
    assert done.code == 1
    assert "stdin, line 3 is not UTF-8" in done.err
    assert [line["index"] for line in done.lines] == [0, 1]
    (tmp_path / "t.tsv").write_text("a\tb\nc\td\ne\n")
    done = run("predict", classifier, tmp_path / "t.tsv", "--out", tmp_path / "out.jsonl")
    assert done.code == 1
    assert "t.tsv, line 3: only 1 columns" in done.err
    assert [path.name for path in tmp_path.iterdir()] == ["t.tsv"]  # nothing that looks whole


def test_a_file_and_a_table_of_predictions(run, classifier, tmp_path):
    texts = sentences(5)
    (tmp_path / "texts.txt").write_text("\n".join(texts))
    done = run("predict", classifier, tmp_path / "texts.txt", "--out", tmp_path / "p.jsonl", "--json")
    assert {"task": "classify", "examples": 5}.items() <= done.result.items()
    lines = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    table = run("predict", classifier, tmp_path / "texts.txt", "--format", "tsv", "--top-k", 2).out
    rows = list(csv.DictReader(io.StringIO(table), delimiter="\t", quoting=csv.QUOTE_NONE))
    assert len(rows) == len(lines) == 5
    for row, line in zip(rows, lines, strict=True):
        assert row["label"] == line["label"]
        assert float(row["probability"]) == line["probability"]
        best = sorted(line["probabilities"].items(), key=lambda p: -p[1])[:2]
        assert list(json.loads(row["probabilities"]).items()) == best


def test_a_blank_line_of_a_table_is_told(run, classifier, tmp_path):
    (tmp_path / "a.tsv").write_text("one\n\ntwo\n")
    done = run("predict", classifier, tmp_path / "a.tsv", "--quiet")
    assert len(done.lines) == 2
    assert "a.tsv: 1 blank lines, which have no prediction in a table" in done.err
    done = run("predict", classifier, tmp_path / "a.tsv", "--read-as", "text", "--quiet")
    assert (len(done.lines), done.err) == (3, "")


def test_what_is_cut_is_counted(run, classifier):
    long = " ".join(WORDS * 20)
    done = run("predict", classifier, stdin=f"break\n{long}\n")
    assert "2 predictions of classify; 1 examples cut to 64 tokens" in done.err
    expected = logits_of(classifier, ["break", long]).softmax(1).numpy()
    probabilities = [list(line["probabilities"].values()) for line in predictions(done)]
    np.testing.assert_allclose(probabilities, expected, atol=1e-4)


def test_a_score_and_sets_of_labels(run, folder, tmp_path):
    texts = sentences(8)
    scored = save_head(folder / "model", tmp_path / "scored", num_labels=1)
    found = predictions(run("predict", scored, stdin="\n".join(texts)))
    np.testing.assert_allclose([line["number"] for line in found], logits_of(scored, texts)[:, 0], rtol=1e-4, atol=1e-4)
    several = save_head(
        folder / "model", tmp_path / "several", problem_type="multi_label_classification", id2label=LABELS
    )
    expected = logits_of(several, texts).sigmoid().numpy()
    threshold = float(np.median(expected))
    found = predictions(run("predict", several, "--threshold", threshold, stdin="\n".join(texts)))
    for line, row in zip(found, expected, strict=True):
        np.testing.assert_allclose(list(line["probabilities"].values()), row, atol=1e-4)
        assert line["labels"] == [LABELS[n] for n in np.flatnonzero(row >= threshold)]
    assert {len(line["labels"]) for line in found} != {3}


TAGS = {0: "O", 1: "B-PER", 2: "I-PER", 3: "B-LOC", 4: "I-LOC"}


def test_entities_are_those_of_the_pipeline(run, folder, tmp_path):
    """In texts, with capitals and punctuation, and in words that are given."""
    tagger = save_head(folder / "model", tmp_path / "tagger", "BertForTokenClassification", id2label=TAGS)
    texts = [f"{text.title()}, ({text})." for text in sentences(20)]
    pipeline = transformers.pipeline("token-classification", str(tagger), aggregation_strategy="first", device="cpu")
    texts = [text for text in texts if len(pipeline.tokenizer(text)["input_ids"]) <= 64]  # where that cuts
    expected = [[(e["entity_group"], e["start"], e["end"], pytest.approx(e["score"], abs=1e-4)) for e in found]
                for found in pipeline(texts)]  # fmt: skip
    assert sum(map(len, expected)) > 20
    found = predictions(run("predict", tagger, stdin="\n".join(texts)))
    keys = ("label", "begin", "end", "probability")
    assert [[tuple(e[key] for key in keys) for e in line["entities"]] for line in found] == expected
    for line, text in zip(found, texts, strict=True):
        assert all(e["text"] == text[e["begin"] : e["end"]] for e in line["entities"])
    columns = "\n\n".join("\n".join(text.split()) for text in sentences(5, seed=2))
    by_columns = predictions(run("predict", tagger, "--read-as", "conll", stdin=columns))
    lines = "\n".join(json.dumps({"tokens": text.split()}) for text in sentences(5, seed=2))
    by_lists = predictions(run("predict", tagger, "--read-as", "jsonl", stdin=lines))
    by_text = predictions(run("predict", tagger, stdin="\n".join(sentences(5, seed=2))))
    for a, b, c in zip(by_columns, by_lists, by_text, strict=True):
        assert a == b
        assert [e["text"] for e in a["entities"]] == [e["text"] for e in c["entities"]]


def best_span(inputs, output, context):
    """The span of up to 30 pieces of the context whose two logits' sum is highest, by trying all."""
    inside = [n for n, number in enumerate(inputs.sequence_ids(0)) if number == 1]
    start, end = output.start_logits[0], output.end_logits[0]
    spans = [(start[a] + end[b], a, b) for a in inside for b in inside if a <= b < a + 30]
    _, first, last = max(spans)
    encoding = inputs.encodings[0]
    return context[encoding.offsets[first][0] : encoding.offsets[last][1]]


def test_answers_are_the_best_spans(run, folder, tmp_path):
    reader = save_head(folder / "model", tmp_path / "reader", "BertForQuestionAnswering")
    asked = [(text[:20].strip(), context) for text, context in zip(sentences(8), sentences(8), strict=True)]
    outputs = outputs_of(reader, *zip(*asked, strict=True), name="BertForQuestionAnswering")
    expected = [best_span(*found, context) for found, (_, context) in zip(outputs, asked, strict=True)]
    lines = [{"q": question, "context": context, "id": f"no {n}"} for n, (question, context) in enumerate(asked)]
    found = predictions(run("predict", reader, "--read-as", "jsonl", "--text", "q",
                            stdin="\n".join(map(json.dumps, lines))))  # fmt: skip
    assert [line["answer"] for line in found] == expected
    assert [line["id"] for line in found] == [line["id"] for line in lines]
    for line, (_, context) in zip(found, asked, strict=True):
        assert context[line["begin"] : line["end"]] == line["answer"]
    data = [{"paragraphs": [{"context": c, "qas": [{"question": q, "id": q}]}]} for q, c in asked]
    (tmp_path / "squad.json").write_text(json.dumps({"data": data}))
    again = predictions(run("predict", reader, tmp_path / "squad.json"))
    assert [line["answer"] for line in again] == expected
    table = run("predict", reader, tmp_path / "squad.json", "--format", "tsv", "--threshold=-1e9").out
    rows = list(csv.DictReader(io.StringIO(table), delimiter="\t", quoting=csv.QUOTE_NONE))
    assert [row["id"] for row in rows] == [question for question, _ in asked]
    assert all((row["answer"], row["begin"], row["end"]) == ("", "null", "null") for row in rows)
    done = run("predict", reader, stdin="a text without a question\n")
    assert done.code == 1
    assert "this task reads records with names" in done.err


def test_choices_have_the_probabilities_of_transformers(run, folder, tmp_path):
    chooser = save_head(folder / "model", tmp_path / "chooser", "BertForMultipleChoice")
    rows = [{"context": sentences(1)[0], "choices": sentences(random.randint(2, 4))} for _ in range(6)]
    tokenizer = transformers.AutoTokenizer.from_pretrained(chooser)
    network = transformers.BertForMultipleChoice.from_pretrained(chooser).eval()
    found = predictions(run("predict", chooser, "--read-as", "jsonl", stdin="\n".join(map(json.dumps, rows))))
    for line, row in zip(found, rows, strict=True):
        inputs = tokenizer([row["context"]] * len(row["choices"]), row["choices"], padding=True, return_tensors="pt",
                           truncation=True)  # fmt: skip
        with torch.no_grad():
            logits = network(**{name: value[None] for name, value in inputs.items()}).logits[0]
        assert line["probabilities"] == pytest.approx(logits.softmax(0).tolist(), abs=1e-4)
        assert line["text"] == row["choices"][line["choice"]]


@pytest.mark.parametrize(
    ("argv", "stdin", "message"),
    [
        (["--threshold", 0.3], "a", "threshold is not for the task classify"),
        (["--format", "tsv", "--json"], "a", "give a table a file with --out"),
        (["--seq", 65], "a", "the model's 64 positions"),
        ([], "", "no examples: the input is empty"),
    ],
)
def test_what_does_not_fit_is_refused(run, classifier, argv, stdin, message):
    done = run("predict", classifier, *argv, stdin=stdin)
    assert done.code == 1
    assert message in done.err


def test_a_model_that_is_not_fine_tuned_is_refused(run, folder):
    done = run("predict", folder / "model", stdin="a")
    assert done.code == 1
    assert "is not fine-tuned" in done.err
    assert "bert-fast finetune" in done.err
