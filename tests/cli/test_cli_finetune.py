"""bert-fast finetune, and bert-fast plot."""

import json
import os
import random
import signal

import pytest
import torch
import transformers

import bert_fast
from bert_fast.tasks.examples import Example, label_names, read_examples
from bert_fast.tasks.finetuning import finetune
from bert_fast.tasks.training import Training

GOOD, BAD = ("assert", "statement", "value", "name"), ("break", "loop", "import", "class")


def reviews(count: int, seed: int) -> list[tuple[str, str]]:
    draw = random.Random(seed)
    found = []
    for _ in range(count):
        label = draw.choice(["good", "bad"])
        words = draw.choices(GOOD if label == "good" else BAD, k=3) + draw.choices(("the", "of", "to"), k=3)
        draw.shuffle(words)
        found.append((" ".join(words), label))
    return found


def write(path, rows, separator="\t", header=None):
    lines = [separator.join(row) for row in ([header] if header else []) + list(rows)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def files(tmp_path):
    return write(tmp_path / "train.tsv", reviews(160, 0)), write(tmp_path / "dev.tsv", reviews(60, 1))


def test_finetune_learns_saves_and_is_repeatable(run, folder, files, tmp_path):
    train, dev = files
    argv = ("finetune", folder / "model", "--train", train, "--validation", dev, "--lr", "1e-2", "--batch-size", 16,
            "--epochs", 10, "--device", "cpu", "--seed", 7)  # fmt: skip
    done = run(*argv, "--out", tmp_path / "clf", "--json")
    assert done.code == 0
    found = done.result
    assert found["accuracy"] > max(found["majority"], 1 - found["majority"]) + 0.1
    assert found["labels"] == ["bad", "good"]
    assert found["examples"] == 60
    assert 0.3 < found["majority"] < 0.7
    progress = [line for line in done.lines if line["kind"] == "progress"]
    assert progress[-1]["done"] == progress[-1]["total"] == 100

    model = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "clf").eval()
    tokenizer = transformers.BertTokenizerFast.from_pretrained(tmp_path / "clf")
    texts, labels = zip(*reviews(60, 1), strict=True)
    with torch.no_grad():
        scores = model(**tokenizer(list(texts), padding=True, return_tensors="pt")).logits
    named = [model.config.id2label[i] for i in scores.argmax(-1).tolist()]
    assert sum(a == b for a, b in zip(named, labels, strict=True)) / 60 == pytest.approx(found["accuracy"])

    again = run(*argv, "--quiet")
    assert again.code == 0
    assert again.err == ""
    assert f"accuracy {100 * found['accuracy']:.2f} % on 60 examples" in again.out
    assert run(*argv, "--json").result["loss"] == found["loss"]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_measure_in_bfloat16_is_said(run, folder, files, precision):
    train, dev = files
    argv = ("--train", train, "--validation", dev, "--epochs", 0.2, "--precision", precision, "--quiet")
    said = "trained and measured in bfloat16" in run("finetune", folder / "model", *argv).out
    assert said == (precision == "bf16")


def test_finetune_from_scratch_ignores_the_weights(run, folder, files, tmp_path, monkeypatch):
    train, dev = files
    losses = {}
    for name in ("model", "shifted"):
        if name == "shifted":
            model = bert_fast.BertForPreTraining.from_pretrained(folder / "model")
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(0.01)
            model.save_pretrained(tmp_path / "shifted")
            for path in (folder / "tok").iterdir():
                (tmp_path / "shifted" / path.name).write_bytes(path.read_bytes())
        base = folder / "model" if name == "model" else tmp_path / "shifted"
        for flags in ((), ("--from-scratch",)):
            done = run("finetune", base, "--train", train, "--validation", dev, "--epochs", 0.2, "--json", *flags)
            losses[name, bool(flags)] = done.result["loss"]
    assert losses["model", False] != losses["shifted", False]
    assert losses["model", True] == losses["shifted", True]


def test_finetune_with_a_dropout_of_its_own(run, folder, files, tmp_path):
    train, dev = files
    argv = ("finetune", folder / "model", "--train", train, "--validation", dev, "--lr", "1e-2", "--epochs", 1)
    losses = {p: run(*argv, "--dropout", p, "--out", tmp_path / str(p), "--json").result["loss"] for p in (0.0, 0.3)}
    assert losses[0.0] != losses[0.3]
    config = transformers.BertConfig.from_pretrained(tmp_path / "0.3")
    assert (config.hidden_dropout_prob, config.attention_probs_dropout_prob) == (0.3, 0.3)
    refused = run(*argv, "--dropout", 1)
    assert refused.code == 1
    assert "dropout must be from 0 to below 1" in refused.err


def test_finetune_pairs_from_named_columns(run, folder, tmp_path):
    rows = [(text, "the same" if label == "good" else "other", label) for text, label in reviews(24, 3)]
    path = write(tmp_path / "pairs.csv", rows, ",", header=("premise", "hypothesis", "gold"))
    done = run("finetune", folder / "model", "--train", path, "--validation", path, "--text", "premise", "--pair",
               "hypothesis", "--label", "gold", "--epochs", 1, "--json")  # fmt: skip
    assert done.code == 0
    assert done.result["examples"] == 24


def test_a_model_of_pairs_is_not_used_on_single_texts(run, folder, tmp_path):
    """Nor the other way round: what it says would be wrong without a word."""
    path = write(tmp_path / "pairs.tsv", [("a", "b", "x"), ("c", "d", "y")] * 4)
    columns = {True: ("--text", 0, "--pair", 1, "--label", 2), False: ()}
    for pairs, message in ((True, "on pairs of texts: name the column of the second"),
                           (False, "on single texts: leave out the column of the second")):  # fmt: skip
        model = tmp_path / f"pairs-{pairs}"
        argv = ("--train", path, "--validation", path, "--epochs", 1, "--out", model)
        assert run("finetune", folder / "model", *argv, *columns[pairs]).code == 0
        assert run("evaluate", model, "--data", path, *columns[pairs]).code == 0
        for done in (run("evaluate", model, "--data", path, *columns[not pairs]),
                     run("predict", model, path, *columns[not pairs][:4])):  # fmt: skip
            assert (done.code, done.out) == (1, "")
            assert message in done.err


def test_examples_are_read_as_the_file_has_them(tmp_path):
    tsv = write(tmp_path / "a.tsv", [('a "quoted" word', "1"), ("second", "0")])
    assert read_examples(tsv) == [Example('a "quoted" word', None, "1"), Example("second", None, "0")]
    csv = write(tmp_path / "a.csv", [('"a, b"', "x", "1")], ",")
    assert read_examples(csv, text="0", pair="1", label="2") == [Example("a, b", "x", "1")]
    (tmp_path / "a.jsonl").write_text('{"text": "t", "other": "o", "label": 3}\n\n')
    assert read_examples(tmp_path / "a.jsonl") == [Example("t", None, "3")]
    assert read_examples(tmp_path / "a.jsonl", pair="other") == [Example("t", "o", "3")]
    (tmp_path / "mark.csv").write_text("text,label\nt,1\n", encoding="utf-8-sig")  # as spreadsheets write it
    assert read_examples(tmp_path / "mark.csv", text="text", label="label") == [Example("t", None, "1")]
    assert read_examples(tmp_path / "mark.csv")[0].text == "text"
    assert label_names([Example("", None, label) for label in ("10", "9", "10")]) == ["9", "10"]
    assert label_names([Example("", None, label) for label in ("10", "b", "a")]) == ["10", "a", "b"]
    for names in (["1.0", "2.0"], ["1.5", "other"], ["inf", "nan"]):  # classes, though some might be numbers
        assert label_names([Example("", None, label) for label in names]) == names


@pytest.fixture
def with_head(folder, tmp_path):
    """with_head(names, **fields): a classifier whose labels are ``names``, each row with numbers of its own."""

    def with_head(names, **fields):
        made = tmp_path / "with-head"
        config = bert_fast.BertConfig.from_pretrained(folder / "model", num_labels=len(names))
        config.update({"id2label": dict(enumerate(names)), "label2id": {n: i for i, n in enumerate(names)}, **fields})
        model = bert_fast.BertForSequenceClassification(config)
        model.classifier.bias.data = torch.randn(len(names))
        model.save_pretrained(made)
        for path in (folder / "tok").iterdir():
            (made / path.name).write_bytes(path.read_bytes())
        return made, model.classifier.weight.detach().clone(), model.classifier.bias.detach().clone()

    return with_head


def tuned_head(base, labels, out, **options):
    """(the head as it is before it learns, what was told of it) when ``base`` is fine-tuned for ``labels``."""
    told, examples = [], [Example(f"text {label}", None, label) for label in labels] * 4
    found = finetune(base, examples, examples, out, learning_rate=0.0, epochs=1, on_note=told.append,
                     on_warning=told.append, **options)  # fmt: skip
    assert told[-1] == found["head"]
    model = transformers.BertForSequenceClassification.from_pretrained(out)
    assert [model.config.id2label[i] for i in range(model.config.num_labels)] == found["labels"]
    return model.classifier, found["labels"], found["head"]


@pytest.mark.parametrize(
    ("names", "labels"),
    [
        (["positive", "negative"], ["negative", "positive"]),
        (["c", "a", "b"], ["a", "b", "c"]),
        (["2", "0", "1"], ["0.0", "1.0", "2.0"]),
        (["LABEL_0", "LABEL_1", "LABEL_2"], ["2", "0", "1"]),
        (["LABEL_1", "LABEL_0"], ["LABEL_0", "LABEL_1"]),
        (["neutral ", "good"], ["good", "neutral"]),
    ],
)
def test_the_rows_of_a_head_follow_the_names_of_their_labels(with_head, tmp_path, names, labels):
    base, weight, bias = with_head(names)
    head, found, told = tuned_head(base, labels, tmp_path / "out")
    by_name = {name.removeprefix("LABEL_").strip(): row for row, name in enumerate(names)}
    rows = [by_name[name.removeprefix("LABEL_").removesuffix(".0")] for name in found]
    assert torch.equal(head.weight, weight[rows])
    assert torch.equal(head.bias, bias[rows])
    assert "is kept, each row for the label that it names" in told
    assert "drawn" not in told


def test_rows_that_a_head_lacks_are_drawn_and_others_left_out(with_head, tmp_path):
    base, weight, bias = with_head(["good", "bad", "mixed"])
    head, found, told = tuned_head(base, ["ugly", "good", "bad"], tmp_path / "out")
    assert found == ["bad", "good", "ugly"]
    assert torch.equal(head.weight[:2], weight[[1, 0]])
    assert torch.equal(head.bias[:2], bias[[1, 0]])
    assert not any(torch.equal(head.weight[2], row) for row in weight)
    assert "drawn at random: ugly; left out: mixed" in told
    head, _, told = tuned_head(base, ["mixed", "bad"], tmp_path / "fewer")
    assert torch.equal(head.weight, weight[[1, 2]])
    assert told.endswith("left out: good")
    head, _, told = tuned_head(base, ["mixed", "bad", "good", "ugly"], tmp_path / "more")
    assert torch.equal(head.weight[:3], weight[[1, 0, 2]])
    assert told.endswith("drawn at random: ugly")


@pytest.mark.parametrize(
    ("names", "labels"),
    [
        (["LABEL_0", "LABEL_1"], ["bad", "good"]),  # whose rows these are, nobody knows
        (["LABEL_0", "LABEL_1", "LABEL_2"], ["1", "2", "3"]),
        (["LABEL_0", "LABEL_1", "LABEL_2"], ["0", "1"]),
        (["entailment", "contradiction"], ["bad", "good"]),
        (["LABEL_0"], ["0", "1"]),  # a regression
    ],
)
def test_a_head_that_names_none_of_the_labels_is_drawn_anew(with_head, tmp_path, names, labels):
    base, weight, _ = with_head(names)
    head, _, told = tuned_head(base, labels, tmp_path / "out")
    assert not any(torch.equal(ours, theirs) for ours in head.weight for theirs in weight)
    assert "drawn" in told
    again, _, _ = tuned_head(base, labels, tmp_path / "again")
    assert torch.equal(head.weight, again.weight)


def test_from_scratch_takes_no_row(with_head, tmp_path):
    base, weight, _ = with_head(["a", "b"])
    head, _, told = tuned_head(base, ["a", "b"], tmp_path / "out", from_scratch=True)
    assert not any(torch.equal(ours, theirs) for ours in head.weight for theirs in weight)
    assert told == "all weights are drawn at random"


def test_a_model_without_a_head_says_what_is_drawn(run, folder, files):
    train, dev = files
    argv = ("finetune", folder / "model", "--train", train, "--validation", dev, "--epochs", 0.2)
    assert (
        "the model has no head for these labels: drawn at random are classifier.bias, classifier.weight"
        in run(*argv).err
    )
    assert "drawn at random are" in run(*argv, "--json", "--quiet").result["head"]


def test_labels_that_are_one_value_are_learnt_as_one(run, folder, tmp_path):
    rows = [(text, {"good": "1", "bad": "0"}[label]) for text, label in reviews(60, 4)]
    plain = write(tmp_path / "plain.tsv", rows)
    mixed = write(tmp_path / "mixed.tsv", [(t, n + [".0", "", " "][i % 3]) for i, (t, n) in enumerate(rows)])
    argv = ("finetune", folder / "model", "--epochs", 1, "--lr", "1e-3", "--json", "--quiet", "--validation", mixed)
    first, second = (run(*argv, "--train", path) for path in (plain, mixed))
    assert first.result == second.result
    assert first.result["labels"] == ["0", "1"]
    (warning,) = [line["text"] for line in second.lines if line["kind"] == "warning"]
    assert "one value are one class: '0' and '0 ' and '0.0'" in warning


def test_lone_surrogates_become_replacement_characters(run, folder, tmp_path):
    path = tmp_path / "cut.jsonl"
    lines = [{"text": f"{word} \ud83d", "pair": "\udc00 pair \ud83d\ude00", "label": label} for word, label in
             [("value", "good\ud800"), ("loop", "bad")] * 4]  # fmt: skip
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    done = run("finetune", folder / "model", "--train", path, "--validation", path, "--pair", "pair", "--epochs", 1,
               "--out", tmp_path / "out")  # fmt: skip
    assert done.code == 0
    assert "40 lone surrogates in the examples (cut characters) became U+FFFD" in done.err
    config = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    assert config["id2label"] == {"0": "bad", "1": "good\ufffd"}


def test_what_was_cut_is_empty_or_in_both_files_is_counted(run, folder, tmp_path):
    train = write(tmp_path / "train.tsv", [("value " * 40, "a"), ("loop", "b"), ("", "a"), ("name " * 40, "b")] * 2)
    dev = write(tmp_path / "dev.tsv", [("loop", "b"), ("class " * 40, "a"), ("class", "a")])
    argv = ("finetune", folder / "model", "--train", train, "--validation", dev, "--epochs", 1, "--seq", 16)
    found = run(*argv, "--json").result
    assert found["cut"] == {"train": 4, "validation": 1}
    assert (found["seq"], found["empty"], found["shared"]) == (16, 2, 1)
    assert (
        "4 training examples cut to 16 tokens; 1 validation examples cut to 16 tokens; 2 empty texts; "
        "1 validation examples with texts of training examples"
    ) in run(*argv, "--quiet").out


def test_more_labels_than_half_the_examples_are_told(run, folder, tmp_path):
    for labels, told in (("abcab", "3 labels for 5 training examples"), ("abcabc", "")):
        path = write(tmp_path / "t.tsv", [("some text", label) for label in labels])
        done = run("finetune", folder / "model", "--train", path, "--validation", path, "--epochs", 1, "--quiet")
        assert done.code == 0
        assert told in done.err
        assert done.err.count("\n") == bool(told)


def test_the_loss_of_every_update_is_told(folder, files):
    told, (train, dev) = [], map(read_examples, files)
    finetune(folder / "model", train, dev, epochs=0.6, batch_size=8, on_step=lambda *about: told.append(about))
    assert [(step, steps) for step, steps, _ in told] == [(step, 12) for step in range(1, 13)]
    losses = [loss for _, _, loss in told]
    assert len(set(losses)) == 12
    assert min(losses) > 0


@pytest.mark.parametrize(
    ("name", "content", "flags", "message"),
    [
        ("t.txt", "a\t1\n", (), ".tsv, .csv, .jsonl or .parquet"),
        ("t.tsv", "", (), "no example"),
        ("t.tsv", "a\t1\nalone\n", (), "line 2: only 1 columns"),
        ("t.tsv", "a\t1\n", ("--text", "sentence"), "no column 'sentence'"),
        ("t.tsv", "a\t1\nb\t1\n", (), "two labels"),
        ("t.jsonl", '{"text": "a"}\n', (), "line 1"),
        ("t.jsonl", '{"text": 1, "label": 1}\n', (), "line 1: 'text' is no text"),
        ("t.csv", 'a,1\n"b,2\n', (), "line 2"),
        ("t.tsv", "a\t1\nb\t\n", (), "line 2: the label is empty"),
        ("t.jsonl", '{"text": "a", "label": null}\n', (), "line 1: the label is empty"),
        ("t.tsv", "a\t0.5\nb\t1.0\nc\t2\n", ("--task", "classify"), "as 0.5: as classes they would not be near"),
        (
            "t.jsonl",
            '{"text": "a", "label": 1e-3}\n{"text": "b", "label": 2}\n',
            ("--task", "classify"),
            "as 0.001: as",
        ),
        ("t.tsv", "sentence\tlabel\na\t1\nb\t0\n", (), "--text sentence --label label"),
        ("t.tsv", b"a\xff\t1\n", (), "not UTF-8"),
    ],
)
def test_bad_examples_are_one_line_and_exit_code_1(run, folder, tmp_path, name, content, flags, message):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    done = run("finetune", folder / "model", "--train", path, "--validation", path, "--quiet", *flags)
    assert done.code == 1
    assert done.err.count("\n") == 1
    assert message in done.err


def test_more_that_finetune_refuses(run, folder, files, tmp_path):
    train, dev = files
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").touch()
    stranger = write(tmp_path / "stranger.tsv", [("a", "good"), ("b", "ugly")])
    for flags, message in (
        (("--validation", stranger), "label 'ugly'"),
        (("--validation", tmp_path / "no.tsv"), "no.tsv"),
        (("--validation", dev, "--epochs", 0), "--epochs"),
        (("--validation", dev, "--epochs", "inf"), "--epochs"),
        (("--validation", dev, "--out", folder / "model"), "holds a run, or the model that is fine-tuned"),
        (("--validation", dev, "--out", tmp_path / "run"), "holds a run"),
        (("--validation", dev, "--seq", 65), "64 positions"),
        (("--validation", dev, "--out", train / "inside"), str(train)),
    ):
        done = run("finetune", folder / "model", "--train", train, "--quiet", *flags)
        assert done.code == 1
        assert done.err.count("\n") == 1
        assert message in done.err


def test_finetune_that_diverges_is_exit_code_3_and_keeps_nothing(run, folder, files, tmp_path):
    train, dev = files
    done = run("finetune", folder / "model", "--train", train, "--validation", dev, "--out", tmp_path / "out",
               "--epochs", 0.5, "--lr", 1e30, "--json")  # fmt: skip
    assert done.code == 3
    assert "the loss is nan: nothing was kept" in done.err
    assert not list((tmp_path / "out").iterdir())
    shown = [line for line in done.lines if line["kind"] == "progress"][-1]
    assert (shown["done"], shown["total"]) == (3, 3)  # half of five updates, rounded up


def test_the_task_is_guessed_and_said(run, folder, tmp_path):
    rows = [(text, "0.5" if label == "good" else "1") for text, label in reviews(24, 5)]
    path = write(tmp_path / "numbers.tsv", rows)
    argv = ("finetune", folder / "model", "--train", path, "--validation", path, "--epochs", 1)
    done = run(*argv)
    assert done.code == 0
    assert "the task is regress, by the examples" in done.err
    assert done.out.startswith("Pearson ")
    found = run(*argv, "--task", "classify", "--json")
    assert found.code == 1
    assert "--task regress" in found.err


def test_a_signal_has_its_exit_code_and_the_same_command_goes_on(run, folder, files, tmp_path, monkeypatch):
    train, dev = files
    argv = ("finetune", folder / "model", "--train", train, "--validation", dev, "--epochs", 2, "--out", tmp_path / "o")
    one = Training.one

    def signalled(self, step):
        if step == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return one(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(Training, "one", signalled)
        done = run(*argv)
    assert done.code == 143
    assert "stopped by SIGTERM: the same command goes on from its checkpoint" in done.err
    done = run(*argv)
    assert done.code == 0
    assert "going on from" in done.err
    assert "f1_macro" in done.out
    assert "matthews" in done.out


def test_seeds_class_weights_and_patience(run, folder, files, tmp_path):
    train, dev = files
    argv = ("finetune", folder / "model", "--train", train, "--validation", dev, "--epochs", 2, "--patience", 1)
    done = run(*argv, "--seeds", 2, "--class-weights", "good=2,bad=0.5", "--lr", 0, "--out", tmp_path / "out")
    assert done.code == 0
    assert "seed 1, 2 of 2" in done.err
    assert "accuracy of 2 seeds: " in done.out
    assert "the best epoch is kept, 1" in done.out  # without a learning rate the second is no better
    found = json.loads((tmp_path / "out" / "finetune.json").read_text())
    assert set(found["seeds"]) == {"0", "1"}
    for given, message in (("good=x", "balanced or LABEL=WEIGHT"), ("good=1", "one for each of bad, good")):
        refused = run(*argv, "--class-weights", given)
        assert refused.code == 1
        assert message in refused.err


def metrics(path, start: float, *, nsp: bool = True):
    path.mkdir()
    lines = []
    for step in range(10, 410, 10):
        loss = start * 0.99 ** (step / 10)
        lines.append({"kind": "train", "step": step, "mlm_loss": loss, "nsp_loss": 0.7 if nsp else None})
        if step % 100 == 0:
            lines.append({"kind": "validation", "step": step, "mlm_loss": loss, "nsp_loss": 0.7 if nsp else None})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (path / "metrics.jsonl").write_text(text + '{"kind": "train", "st')  # cut short, as a kill leaves it
    return path


def test_plot_draws_one_run_and_several(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runs = [metrics(tmp_path / "adamw", 9.0), metrics(tmp_path / "lamb", 8.0, nsp=False)]
    done = run("plot", runs[0])
    assert done.code == 0
    assert (runs[0] / "loss.png").read_bytes().startswith(b"\x89PNG")
    done = run("plot", *runs, "--out", tmp_path / "pictures" / "both.svg", "--json")
    assert done.result["out"].endswith("both.svg")
    assert b"<svg" in (tmp_path / "pictures" / "both.svg").read_bytes()
    assert run("plot", *runs).code == 0
    assert (tmp_path / "losses.png").exists()


def test_plot_refuses_what_it_cannot_draw(run, tmp_path):
    good, empty, broken = metrics(tmp_path / "good", 9.0), tmp_path / "empty", tmp_path / "broken"
    empty.mkdir()
    (empty / "metrics.jsonl").write_text('{"kind": "end", "step": 0, "reason": "done"}\n')
    broken.mkdir()
    (broken / "metrics.jsonl").write_text('no json\n{"kind": "train", "step": 1, "mlm_loss": 3.0}\n')
    for argv, message in (
        ((tmp_path / "none",), "no run"),
        ((empty,), "nothing to draw"),
        ((broken,), "line 1"),
        ((good, "--out", tmp_path / "x.doc"), ".png, .svg or .pdf"),
    ):
        done = run("plot", *argv)
        assert done.code == 1
        assert done.err.count("\n") == 1
        assert message in done.err
