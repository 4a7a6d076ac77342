"""Words with tags, answers in texts and choices, from files to a folder that transformers reads.

Each is made by a rule, which a small model learns to the last example.
"""

import json
import random

import numpy as np
import pytest
import torch
import transformers

from bert_fast.cli import main
from bert_fast.data import load_tokenizer, save_tokenizer
from bert_fast.model import BertForQuestionAnswering
from bert_fast.tasks.answers import NOWHERE
from bert_fast.tasks.finetuning import finetune, guess_task, read_task
from bert_fast.tasks.network import make_network
from bert_fast.tasks.prediction import scored
from bert_fast.tasks.task import packed
from bert_fast.tasks.trained import load_trained, predict
from bert_fast.use.inference import load_model
from tests.support.small_models import small_model

STEMS = [f"w{n}" for n in range(6)]
TASKS = ("tokens", "qa", "choice")


def tagged_words(most=9):
    """Words that end in x are entities."""
    words = [random.choice(STEMS) + random.choice(["", "", "x"]) for _ in range(random.randint(3, most))]
    return "".join(f"{word} _ {'B-END' if word.endswith('x') else 'O'}\n" for word in words) + "\n"


def question(most=9, answered=True):
    """The answer is the word after "is"."""
    words = random.choices(STEMS, k=random.randint(3, most))
    place = random.randrange(len(words))
    words.insert(place, "is" if answered else "what")
    answers = [{"text": words[place + 1], "answer_start": len(" ".join(words[: place + 1])) + 1}] if answered else []
    return {
        "question": "what is",
        "id": "q",
        "context": " ".join(words),
        "answers": answers,
        "is_impossible": not answered,
    }


def choice(most=4):
    """The right choice is the word of the context."""
    words = random.sample(STEMS, random.randint(2, min(4, most)))
    label = random.randrange(len(words))
    return {"context": words[label], "choices": words, "label": label}


def write(folder, task, name, count, **how):
    if task == "tokens":
        path = folder / f"{name}.conll"
        path.write_text("-DOCSTART- _ O\n\n" + "".join(tagged_words(**how) for _ in range(count)))
    elif task == "qa":
        path = folder / f"{name}.json"
        paragraphs = [{"context": q.pop("context"), "qas": [q]} for q in (question(**how) for _ in range(count))]
        path.write_text(json.dumps({"version": "1.1", "data": [{"title": "", "paragraphs": paragraphs}]}))
    else:
        path = folder / f"{name}.jsonl"
        path.write_text("\n".join(json.dumps(choice(**how)) for _ in range(count)))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return small_model(tmp_path_factory.mktemp("model"), [*STEMS, "##x", "is", "what"])


def prepared(folder, tmp_path, name, count=12, **how):
    """(task, its model at random without dropout, items of examples, the examples)."""
    task, train, _ = read_task("auto", *[write(tmp_path, name, "train", count, **how)] * 2)
    train, _, _ = task.settle(train, train)
    model, tokenizer, _ = make_network(task, folder, dropout=0.0)
    counts = dict.fromkeys(("cut", "windowed", "unseen", "unfound"), 0)
    return task, model, task.encode(train, tokenizer, 48, counts), train, counts


@pytest.mark.slow
@pytest.mark.parametrize(("name", "epochs"), [("tokens", 10), ("qa", 8), ("choice", 5)])
def test_a_rule_is_learnt_to_the_last_example(folder, tmp_path, capsys, name, epochs):
    """In texts of several windows, too. They are the same each time: the last example must not hang on the draw."""
    random.seed(name)
    train, validation = (write(tmp_path, name, part, count, most=40) for part, count in (("train", 600), ("dev", 60)))
    assert main([
        "finetune", str(folder), "--train", str(train), "--validation", str(validation), "--out", str(tmp_path / "out"),
        "--epochs", str(epochs), "--lr", "2e-3", "--batch-size", "16", "--dropout", "0", "--precision", "fp32", "--seq",
        "32", *([] if name == "choice" else ["--overlap", "8"]), "--json",
    ]) == 0  # fmt: skip
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["task"] == name
    assert name == "choice" or found["windowed"]["validation"] > 10
    assert found[found["metric"]] == 1


@pytest.mark.parametrize("name", TASKS)
def test_the_task_is_told_by_the_files_and_by_the_examples(tmp_path, name):
    path = write(tmp_path, name, "train", 3)
    task, train, validation = read_task("auto", path, path)
    assert task.name == name == guess_task(train)
    assert len(train) == len(validation) == 3


def reference(task, saved, items):
    """(loss, logits of each item) of transformers' own class, a sequence or example at a time, and its gradients."""
    model = getattr(transformers, task.model.__name__).from_pretrained(saved, attn_implementation="eager").eval()
    losses, logits, count = [], [], task.weight(items)
    for item in items:
        rows = [torch.tensor(part) for part in zip(*item.sequences, strict=True)] if len(item.sequences) == 1 else None
        ids = rows[0] if rows else padded([ids for ids, _ in item.sequences])[None]
        kinds = rows[1] if rows else padded([kinds for _, kinds in item.sequences])[None]
        mask = torch.ones_like(ids) if rows else padded([[1] * len(ids) for ids, _ in item.sequences])[None]
        if task.name == "qa":
            targets = {
                "start_positions": torch.tensor([item.target[0]]),
                "end_positions": torch.tensor([item.target[1]]),
            }
        else:
            targets = {"labels": torch.tensor([item.target])}
        output = model(ids, attention_mask=mask, token_type_ids=kinds, **targets)
        losses.append(output.loss * task.weight([item]) / count)
        logits.append(torch.stack([output.start_logits, output.end_logits], -1) if task.name == "qa" else output.logits)
    loss = torch.stack(losses).sum()
    loss.backward()
    return loss, [one[0].detach() for one in logits], {name: p.grad for name, p in model.named_parameters()}


def padded(rows):
    longest = max(map(len, rows))
    return torch.tensor([row + [0] * (longest - len(row)) for row in rows])


@pytest.mark.parametrize("name", TASKS)
def test_loss_gradients_and_logits_are_those_of_transformers(folder, tmp_path, name):
    """Packed, in two micro-batches; from the saved folder. Examples have different lengths and numbers of choices."""
    task, model, items, _, _ = prepared(folder, tmp_path, name)
    model.save_pretrained(tmp_path / "saved")
    loss, logits, gradients = reference(task, tmp_path / "saved", items)
    count, total = torch.tensor(float(task.weight(items))), 0.0
    scores = []
    for some in (items[:5], items[5:]):
        part, _ = task.forward(model, packed(some, range(len(some))) | task.targets(some), count)
        part.backward()
        total += part.item()
    with torch.no_grad():
        for some in (items[:5], items[5:]):
            scores += task.scores(task.forward(model, packed(some, range(len(some))), count)[1], some)
    assert total == pytest.approx(loss.item(), rel=1e-5)
    for key, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[key], rtol=1e-4, atol=1e-6)
    for item, found, expected in zip(items, scores, logits, strict=True):
        if name == "tokens":
            expected = expected[[place for _, place in item.notes[0].places]]
        elif name == "qa":
            expected = expected.T
        torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", TASKS)
def test_scores_are_of_items_in_any_batch(folder, tmp_path, name):
    task, model, items, examples, _ = prepared(folder, tmp_path, name, most=90, count=6)
    assert len(items) > 6 or name == "choice"
    together, loss = scored(task, model, items)
    apart, again = scored(task, model, items, tokens=1)
    assert loss == pytest.approx(again, rel=1e-5)
    for one, other in zip(together, apart, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
    unlabelled, none = scored(task, model, [item._replace(target=None) for item in items])
    assert none is None
    for one, other in zip(together, unlabelled, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
    lines = [task.line(*pair) for pair in zip(examples, task.predictions(examples, items, together), strict=True)]
    assert json.loads(json.dumps(lines)) == lines


@pytest.mark.parametrize("name", TASKS)
def test_a_run_that_goes_on_gives_the_same_weights(folder, tmp_path, name):
    path = write(tmp_path, name, "train", 24)
    task, train, validation = read_task(name, path, path)
    how = {"task": task, "epochs": 2, "batch_size": 8, "learning_rate": 1e-3, "checkpoint_every": 1, "max_length": 32}

    class Killed(Exception):
        pass

    def kill(step, steps, loss):
        if step == 4:
            raise Killed

    whole = finetune(folder, train, validation, tmp_path / "whole", **how)
    with pytest.raises(Killed):
        finetune(folder, train, validation, tmp_path / "parts", **how, on_step=kill)
    parts = finetune(folder, train, validation, tmp_path / "parts", **how)
    assert whole["history"] == parts["history"]
    first, second = (load_model(task.model, tmp_path / name)[0].state_dict() for name in ("whole", "parts"))
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_the_threshold_is_kept_in_the_configuration(folder, tmp_path):
    rows = [question(answered=number % 2 == 0) for number in range(16)]
    path = tmp_path / "train.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    task, train, validation = read_task("auto", path, path)
    found = finetune(folder, train, validation, tmp_path / "out", task=task, epochs=1, max_length=32, precision="fp32")
    assert {"has_answer_f1", "no_answer_exact", "no_answer_threshold"} <= found.keys()
    config = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    assert config.no_answer_threshold == found["no_answer_threshold"]
    model, tokenizer, _ = load_model(task.model, tmp_path / "out")
    again, examples, _ = read_task("qa", path, path)
    again.restore(model.config)
    items = again.encode(examples, tokenizer, 32, dict.fromkeys(("cut", "windowed", "unfound"), 0))
    predictions = again.predictions(examples, items, scored(again, model, items)[0])
    assert again.metrics(examples, predictions)["f1"] == pytest.approx(found["f1"])
    said = [again.line(*pair) for pair in zip(examples, predictions, strict=True)]
    for line, example in zip(said, examples, strict=True):
        assert line["answer"] == ("" if line["begin"] is None else example.context[line["begin"] : line["end"]])
        assert 0 <= line["probability"] <= 1


def test_a_threshold_of_an_earlier_fine_tuning_is_not_kept(folder, tmp_path):
    """Where every question has an answer, one is said for each."""
    before = BertForQuestionAnswering.from_pretrained(folder)
    before.config.no_answer_threshold = -1000.0
    before.save_pretrained(tmp_path / "before")
    save_tokenizer(load_tokenizer(folder), tmp_path / "before")
    path = write(tmp_path, "qa", "train", 4)
    task, train, validation = read_task("auto", path, path)
    finetune(tmp_path / "before", train, validation, tmp_path / "out", task=task, epochs=1, max_length=32)
    trained = load_trained(tmp_path / "out")
    assert (trained.task.threshold, trained.task.unanswerable) == (None, False)
    assert all(trained.task.line(*pair)["answer"] for pair in predict(trained, train))


def test_answers_that_are_nowhere_are_no_loss_and_are_told(folder, tmp_path):
    rows = [question() for _ in range(8)]
    lost = [row | {"answers": [{"text": "nowhere", "answer_start": 0}]} for row in rows[:3]]
    told = []
    for name, some in (("some", [*lost, *rows[3:]]), ("others", rows[3:])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, some)))
    losses = []
    for name in ("some", "others"):
        task, train, _ = read_task("auto", *[tmp_path / f"{name}.jsonl"] * 2)
        train, _, doubts = task.settle(train, train)
        told += doubts
        torch.manual_seed(1)
        model, tokenizer, _ = make_network(task, folder, dropout=0.0)
        items = task.encode(train, tokenizer, 32, dict.fromkeys(("cut", "windowed", "unfound"), 0))
        losses.append(scored(task, model, items)[1])
    assert told == [f"{tmp_path / 'some.jsonl'}: 3 answers that are not in their contexts"]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    nowhere = [item._replace(target=(NOWHERE, NOWHERE)) for item in items]
    count = torch.tensor(float(task.weight(nowhere)))
    loss, _ = task.forward(model, packed(nowhere, range(len(nowhere))) | task.targets(nowhere), count)
    loss.backward()
    assert loss == 0
    assert all((p.grad == 0).all() for p in model.parameters() if p.grad is not None)
    for only in (rows[0] | {"answers": []}, lost[0]):
        (tmp_path / "none.jsonl").write_text(json.dumps(only))
        task, train, _ = read_task("qa", *[tmp_path / "none.jsonl"] * 2)
        with pytest.raises(ValueError, match="no training question has an answer that stands in its context"):
            task.settle(train, train)


def test_columns_that_a_task_has_no_use_for_are_refused(tmp_path):
    for name, columns in (("tokens", {"pair": "1"}), ("qa", {"text": "x"}), ("choice", {"label": ["x"]})):
        path = write(tmp_path, name, "train", 2)
        with pytest.raises(ValueError, match=f"--{next(iter(columns))} is not for the task {name}"):
            read_task("auto", path, path, columns=columns)
    path = write(tmp_path, "tokens", "train", 2)
    with pytest.raises(ValueError, match="a word has one tag"):
        read_task("auto", path, path, columns={"label": ["1", "2"]})
    with pytest.raises(ValueError, match="longest_answer is not for the task tokens"):
        read_task("auto", path, path, longest_answer=3)


def test_windows_overlap_in_use_as_they_did_in_training(folder, tmp_path):
    for name in ("tokens", "qa"):
        path = write(tmp_path, name, "train", 4)
        task, train, validation = read_task("auto", path, path, overlap=5)
        finetune(folder, train, validation, tmp_path / name, task=task, epochs=1, max_length=32)
        assert load_trained(tmp_path / name).task.overlap == 5


def test_tags_that_training_lacks_are_named(tmp_path):
    train, validation = tmp_path / "t.conll", tmp_path / "v.conll"
    train.write_text("a O\nb B-X\n")
    validation.write_text("a O\n\nb O\nc B-Y\n")
    task, *parts = read_task("auto", train, validation)
    with pytest.raises(ValueError, match=r"v.conll, line 3: the tag 'B-Y', which no training sentence has"):
        task.settle(*parts)
    validation.write_text("a O\n\nb O\n")
    told = task.settle(parts[0], task.read(validation))[2]
    assert told == ["validation has no entity: F1 is 0 whatever is said"]


def test_parts_of_speech_are_judged_by_accuracy(folder, tmp_path):
    path = tmp_path / "t.conll"
    path.write_text("w1 NOUN\nw2 VERB\n\nw3 NOUN\n\u200b NOUN\n")
    task, train, validation = read_task("auto", path, path)
    found = finetune(folder, train, validation, task=task, epochs=1, max_length=32)
    assert found["metric"] == "accuracy"
    assert "f1" not in found
    assert found["unseen"] == {"train": 1, "validation": 1}
    assert found["majority"] == 0.75


def test_the_tokenizer_of_a_saved_folder_is_the_models(folder, tmp_path):
    path = write(tmp_path, "choice", "train", 4)
    task, train, validation = read_task("auto", path, path)
    finetune(folder, train, validation, tmp_path / "out", task=task, epochs=1, max_length=32)
    assert load_tokenizer(tmp_path / "out").encode("w1x").tokens == ["[CLS]", "w1", "##x", "[SEP]"]
    model = transformers.AutoModelForMultipleChoice.from_pretrained(tmp_path / "out")
    assert isinstance(model, transformers.BertForMultipleChoice)
