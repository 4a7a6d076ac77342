"""bert-fast evaluate on labelled examples: metrics, confusions and the worst errors are those that transformers' own
models give."""

import json
import random

import numpy as np
import pytest
import seqeval.metrics
import sklearn.metrics

from tests.support.fine_tuned import logits_of, outputs_of, save_head

WORDS = ["assert", "statement", "value", "name", "break", "loop", "import", "class", "the", "of", "to"]
LABELS = {0: "bad", 1: "fair", 2: "good"}


def sentences(count):
    return [" ".join(random.choices(WORDS, k=random.randrange(1, 25))) for _ in range(count)]


@pytest.fixture(scope="module")
def classifier(folder, tmp_path_factory):
    names = {"id2label": LABELS, "label2id": {name: row for row, name in LABELS.items()}}
    return save_head(folder / "model", tmp_path_factory.mktemp("classifier"), **names)


def write(path, rows):
    path.write_text("".join("\t".join(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_a_classifier_is_judged_as_its_probabilities_say(run, classifier, tmp_path):
    texts, truth = sentences(40), np.array([random.choice(range(3)) for _ in range(40)])
    data = write(tmp_path / "dev.tsv", [(t, LABELS[label]) for t, label in zip(texts, truth, strict=True)])
    probabilities = logits_of(classifier, texts).softmax(1).numpy()
    said = probabilities.argmax(1)
    done = run("evaluate", classifier, "--data", data, "--plot", tmp_path / "confusion.png", "--worst", 4, "--json")
    assert done.code == 0, done.err
    found = done.result
    matrix = np.zeros((3, 3), dtype=int)
    np.add.at(matrix, (truth, said), 1)
    assert found["labels"] == list(LABELS.values())
    assert found["confusion"] == matrix.tolist()
    assert found["accuracy"] == pytest.approx((truth == said).mean())
    assert found["matthews"] == pytest.approx(sklearn.metrics.matthews_corrcoef(truth, said))
    assert found["by_label"]["fair"]["recall"] == pytest.approx(matrix[1, 1] / max(matrix[1].sum(), 1))
    assert found["wrong"] == (truth != said).sum()
    losses = -np.log(probabilities[np.arange(40), truth])
    wrong = sorted(np.flatnonzero(truth != said), key=lambda n: -losses[n])[:4]
    assert [line["where"] for line in found["worst"]] == [f"{data}, line {n + 1}" for n in wrong]
    assert [line["badness"] for line in found["worst"]] == pytest.approx(losses[wrong], abs=1e-4)
    assert [line["said"] for line in found["worst"]] == [LABELS[n] for n in said[wrong]]
    assert (tmp_path / "confusion.png").read_bytes()[:4] == b"\x89PNG"
    text = run("evaluate", classifier, "--data", data, "--quiet").out
    assert f"accuracy  {found['accuracy']:.4f}" in text
    assert f"line {wrong[0] + 1}: {LABELS[truth[wrong[0]]]} taken for {LABELS[said[wrong[0]]]}" in text


def test_scores_are_judged_by_how_far_they_are_off(run, folder, tmp_path):
    texts, truth = sentences(20), np.array([round(random.uniform(-1, 1), 3) for _ in range(20)])
    scored = save_head(folder / "model", tmp_path / "scored", num_labels=1)
    data = write(tmp_path / "dev.tsv", [(t, f"{number}") for t, number in zip(texts, truth, strict=True)])
    said = logits_of(scored, texts)[:, 0].numpy()
    found = run("evaluate", scored, "--data", data, "--plot", tmp_path / "p.svg", "--json").result
    assert found["mse"] == pytest.approx(((said - truth) ** 2).mean(), rel=1e-4)
    assert found["pearson"] == pytest.approx(np.corrcoef(said, truth)[0, 1], abs=1e-4)
    worst = found["worst"][0]
    number = np.abs(said - truth).argmax()
    assert worst["where"] == f"{data}, line {number + 1}"
    assert worst["badness"] == pytest.approx(abs(said - truth)[number], abs=1e-4)
    assert (tmp_path / "p.svg").read_text().startswith("<?xml")


def test_sets_of_labels_are_judged_label_by_label(run, folder, tmp_path):
    texts = sentences(30)
    several = save_head(
        folder / "model", tmp_path / "several", problem_type="multi_label_classification", id2label=LABELS
    )
    probabilities = logits_of(several, texts).sigmoid().numpy()
    truth = np.random.default_rng().random((30, 3)) < 0.5
    named = [",".join(LABELS[n] for n in np.flatnonzero(row)) for row in truth]
    data = write(tmp_path / "dev.tsv", [(t, label or "bad") for t, label in zip(texts, named, strict=True)])
    truth[~truth.any(1), 0] = True  # a cell is not empty
    threshold = float(np.median(probabilities))
    found = run("evaluate", several, "--data", data, "--threshold", threshold, "--json").result
    said = probabilities >= threshold
    assert found["f1_micro"] == pytest.approx(sklearn.metrics.f1_score(truth, said, average="micro"))
    for number, name in LABELS.items():
        expected = sklearn.metrics.precision_score(truth[:, number], said[:, number], zero_division=0.0)
        assert found["by_label"][name]["precision"] == pytest.approx(expected)
    losses = -np.where(truth, np.log(probabilities), np.log(1 - probabilities)).sum(1)
    wrong = max(np.flatnonzero((truth != said).any(1)), key=lambda n: losses[n])
    assert found["worst"][0]["where"] == f"{data}, line {wrong + 1}"


def test_tagged_words_are_judged_by_word_and_by_entity(run, folder, tmp_path):
    tags = {0: "O", 1: "B-PER", 2: "I-PER"}
    tagger = save_head(folder / "model", tmp_path / "tagger", "BertForTokenClassification", id2label=tags)
    texts = [random.choices(WORDS, k=random.randint(3, 9)) for _ in range(25)]
    truth = [[random.choice(["O", "B-PER"]) for _ in words] for words in texts]
    data = tmp_path / "dev.conll"
    data.write_text("\n\n".join("\n".join(map(" ".join, zip(*pair, strict=True))) for pair in
                                zip(texts, truth, strict=True)) + "\n")  # fmt: skip
    said = []
    outputs = outputs_of(tagger, [" ".join(words) for words in texts], name="BertForTokenClassification")
    for (inputs, output), words in zip(outputs, texts, strict=True):
        ids = inputs.word_ids(0)
        said.append([tags[int(output.logits[0, ids.index(n)].argmax())] for n in range(len(words))])
    found = run("evaluate", tagger, "--data", data, "--plot", tmp_path / "p.png", "--json").result
    pairs = [pair for real, other in zip(truth, said, strict=True) for pair in zip(real, other, strict=True)]
    assert found["accuracy"] == pytest.approx(np.mean([real == other for real, other in pairs]))
    assert found["f1"] == pytest.approx(seqeval.metrics.f1_score(truth, said))
    assert found["labels"] == ["O", "PER"]
    kinds = [(real[2:] or "O", other[2:] or "O") for real, other in pairs]
    assert found["confusion"] == [[kinds.count((a, b)) for b in ("O", "PER")] for a in ("O", "PER")]
    assert found["by_label"]["PER"]["support"] == sum(tag == "B-PER" for tags in truth for tag in tags)
    assert found["wrong"] == sum(real != other for real, other in zip(truth, said, strict=True))
    first = found["worst"][0]
    number = [f"{data}, line {1 + sum(len(words) + 1 for words in texts[:n])}" for n in range(25)].index(first["where"])
    wrong = [n for n, pair in enumerate(zip(truth[number], said[number], strict=True)) if pair[0] != pair[1]]
    assert first["said"] == " ".join(f"{texts[number][n]}/{said[number][n]}" for n in wrong)
    assert "words: truth \\ said" in run("evaluate", tagger, "--data", data, "--quiet").out
    data.write_text("break B-LOC\n")
    assert f"{data}, line 1: the label 'B-LOC' is none of the model's" in run("evaluate", tagger, "--data", data).err


def test_answers_are_judged_by_what_they_share_with_the_right_ones(run, folder, tmp_path):
    reader = save_head(folder / "model", tmp_path / "reader", "BertForQuestionAnswering")
    asked = [
        {"question": "what is", "context": text.replace("the", "name"), "id": str(n)}
        for n, text in enumerate(sentences(12))
    ]
    lines = "\n".join(map(json.dumps, asked))
    said = [line["answer"] for line in run("predict", reader, "--read-as", "jsonl", stdin=lines).lines
            if line["kind"] == "prediction"]  # fmt: skip
    right = [n % 3 == 0 for n in range(12)]
    truth = [answer if right[n] else "nothing like it" for n, answer in enumerate(said)]
    for row, answer in zip(asked, truth, strict=True):
        row["answers"] = {"text": [answer], "answer_start": [max(row["context"].find(answer), 0)]}
    (tmp_path / "dev.jsonl").write_text("\n".join(map(json.dumps, asked)))
    found = run("evaluate", reader, "--data", tmp_path / "dev.jsonl", "--json").result
    assert found["exact"] == pytest.approx(4 / 12)
    assert found["wrong"] == 8
    assert {verdict["where"] for verdict in found["worst"]} == {
        f"{tmp_path / 'dev.jsonl'}, line {n + 1}" for n in range(12) if not right[n]
    }
    assert {(verdict["truth"], verdict["said"]) for verdict in found["worst"]} == {
        (truth[n], said[n]) for n in range(12) if not right[n]
    }
    for row in asked[1::3]:  # the ones that the model answers wrongly have no answer in truth
        row["answers"] = []
    (tmp_path / "dev.jsonl").write_text("\n".join(map(json.dumps, asked)))
    found = run("evaluate", reader, "--data", tmp_path / "dev.jsonl", "--json").result
    assert "the best on these examples" in found["note"]
    threshold = f"--threshold={found['no_answer_threshold']}"
    given = run("evaluate", reader, "--data", tmp_path / "dev.jsonl", threshold, "--json").result
    assert "note" not in given
    assert given["exact"] == found["exact"]
    assert found["exact"] >= 4 / 12  # the best threshold is no worse than none


def test_choices_are_judged_by_their_probabilities(run, folder, tmp_path):
    chooser = save_head(folder / "model", tmp_path / "chooser", "BertForMultipleChoice")
    rows = [{"context": text, "choices": sentences(3), "label": random.randrange(3)} for text in sentences(15)]
    data = tmp_path / "dev.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    said = [line for line in run("predict", chooser, data).lines if line["kind"] == "prediction"]
    found = run("evaluate", chooser, "--data", data, "--json").result
    wrong = [n for n, row in enumerate(rows) if said[n]["choice"] != row["label"]]
    losses = {n: -np.log(said[n]["probabilities"][rows[n]["label"]]) for n in wrong}
    assert found["accuracy"] == pytest.approx(1 - len(wrong) / 15)
    expected = sorted(wrong, key=lambda n: -losses[n])[:10]
    assert [verdict["where"] for verdict in found["worst"]] == [f"{data}, line {n + 1}" for n in expected]
    assert [verdict["badness"] for verdict in found["worst"]] == pytest.approx([losses[n] for n in expected], rel=1e-4)


@pytest.mark.parametrize("prefix", ["", "LABEL_"])  # the second as predict writes them
def test_the_names_that_transformers_gives_are_rows(run, folder, tmp_path, prefix):
    unnamed = save_head(folder / "model", tmp_path / "unnamed", num_labels=2)
    texts = sentences(10)
    said = logits_of(unnamed, texts).argmax(1).tolist()
    data = write(tmp_path / "dev.tsv", [(t, f"{prefix}{n}") for t, n in zip(texts, said, strict=True)])
    assert run("evaluate", unnamed, "--data", data, "--json").result["accuracy"] == 1


def test_evaluate_gives_the_metrics_of_finetune_by_its_length(run, folder, tmp_path):
    texts = [" ".join(WORDS * 2)[n:] for n in range(40)]  # more tokens than 12
    data = write(tmp_path / "dev.tsv", [(t, str(n % 2)) for n, t in enumerate(texts)])
    argv = ("--train", data, "--validation", data, "--seq", 12, "--epochs", 1, "--out", tmp_path / "out", "--json",
            "--precision", "fp32")  # fmt: skip
    learnt = run("finetune", folder / "model", *argv).result
    found = run("evaluate", tmp_path / "out", "--data", data, "--json").result
    assert found["seq"] == 12
    assert found["cut"] == 40
    names = ("accuracy", "f1_macro", "matthews")
    assert {name: found[name] for name in names} == {name: pytest.approx(learnt[name]) for name in names}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--seed", "0"], "--seed is for prepared data, and {data} is no folder"),
        (["--whole-word"], "--whole-word is for prepared data"),
        (["--plot", "p.jpeg"], "must end with .png, .svg or .pdf"),
        (["--label", "1", "--text", "1"], "line 1: the label 'other' is none of the model's: bad, fair, good"),
    ],
)
def test_what_does_not_fit_labelled_examples_is_refused(run, classifier, tmp_path, argv, message):
    data = write(tmp_path / "dev.tsv", [("break", "other"), ("loop", "good")])
    done = run("evaluate", classifier, "--data", data, *argv)
    assert done.code == 1
    assert message.format(data=data) in done.err


def test_options_of_labelled_examples_do_not_fit_prepared_data(run, folder, classifier):
    done = run("evaluate", folder / "model", "--data", folder / "data", "--plot", "p.png")
    assert done.code == 1
    assert "--plot is for labelled examples" in done.err
    done = run("evaluate", classifier, "--data", folder / "data")
    assert done.code == 1
    assert "fine-tuned for classify" in done.err
    done = run("evaluate", folder / "model", "--data", folder / "corpus.jsonl")
    assert done.code == 1
    assert "is not fine-tuned" in done.err
    assert "neither prepared data" in run("evaluate", folder / "model", "--data", folder / "nothing").err
