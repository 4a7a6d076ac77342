"""The loop of fine-tuning: the numbers of transformers' own, whatever batches are packed, and a run that goes on."""

import dataclasses
import json
import math
import os
import random
import signal
import statistics
from collections import Counter

import numpy as np
import pytest
import torch
import transformers

from bert_fast.run import checkpoint
from bert_fast.tasks.examples import Example
from bert_fast.tasks.finetuning import finetune
from bert_fast.tasks.network import make_network, parameter_groups
from bert_fast.tasks.sentences import Classify, Multilabel, Regress
from bert_fast.tasks.training import Parts, Settings, Stopped, Training
from bert_fast.train.distributed import Ranks
from tests.tasks.conftest import NOUNS, sentence

CPU = Ranks(0, 1, torch.device("cpu"))
PLAIN = Settings(
    epochs=2, batch_size=6, learning_rate=1e-3, warmup=0.2, weight_decay=0.01, layer_decay=1.0, patience=None,
    checkpoint_every=None, seed=3, bf16=False, tokens=4096,
)  # fmt: skip


def examples(kind: type, count: int, seed: int = 0) -> list[Example]:
    draw = random.Random(seed)
    found = []
    for _ in range(count):
        nouns = draw.sample(NOUNS, draw.randint(1, 3))
        label = {Classify: nouns[0], Multilabel: tuple(nouns), Regress: str(draw.gauss(0.0, 2.0))}[kind]
        found.append(Example(sentence(draw, nouns), sentence(draw) if seed % 2 else None, label))
    return found


def training(base, task, train, settings=PLAIN, **network) -> Training:
    """A training of float64 without dropout."""
    torch.manual_seed(0)
    task.settle(train, train)
    made = make_network(task, base, dropout=0.0, **network)
    items = task.encode(train, made.tokenizer, 32, Counter())
    return Training(task, made.model.double(), made.tokenizer, Parts(items, items, train), settings, CPU)


def trainers_losses(ours: Training) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The losses and weights of transformers' class, padded, by the steps of Trainer: AdamW, clipping, the schedule."""
    theirs = transformers.BertForSequenceClassification(ours.model.config).double().train()
    theirs.load_state_dict(ours.model.state_dict())
    vectors = [p for p in theirs.parameters() if p.dim() <= 1]
    groups = [{"params": [p for p in theirs.parameters() if p.dim() > 1], "weight_decay": ours.settings.weight_decay}]
    groups.append({"params": vectors, "weight_decay": 0.0})
    optimizer = torch.optim.AdamW(groups, lr=ours.settings.learning_rate)
    warmup = math.ceil(ours.total * ours.settings.warmup)
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, warmup, ours.total)
    losses = []
    for step in range(ours.total):
        items = [ours.parts.train[i] for i in ours.members(step)]
        width = max(item.length for item in items)
        ids, segments, mask = (torch.zeros(len(items), width, dtype=torch.long) for _ in range(3))
        for row, item in enumerate(items):
            ((tokens, kinds),) = item.sequences
            ids[row, : len(tokens)], segments[row, : len(tokens)] = torch.tensor(tokens), torch.tensor(kinds)
            mask[row, : len(tokens)] = 1
        labels = torch.tensor([item.target for item in items])
        labels = labels.double() if labels.is_floating_point() else labels
        loss = theirs(input_ids=ids, attention_mask=mask, token_type_ids=segments, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, theirs.state_dict()


@pytest.mark.parametrize("tokens", [4096, 24])
@pytest.mark.parametrize(("kind", "seed"), [(Classify, 0), (Multilabel, 1), (Regress, 2)])
def test_losses_and_weights_are_those_of_trainer(base, kind, seed, tokens):
    """Update for update, whether an update is one micro-batch or several; warm-up, decay and clipping included."""
    ours = training(
        base, kind(), examples(kind, 20, seed), dataclasses.replace(PLAIN, tokens=tokens, learning_rate=5e-3)
    )
    expected, weights = trainers_losses(ours)
    losses, last = [], {}
    ours.run(lambda step, steps, loss: losses.append(loss), lambda measures: last.update(ours.model.state_dict()))
    assert len(losses) == 8
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=2e-5, atol=1e-6)
    assert abs(losses[-1] - losses[0]) > 0.01
    for name, weight in weights.items():
        torch.testing.assert_close(
            last[name], weight, rtol=1e-3, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_class_weights_weigh_as_torch_does(base):
    train = examples(Classify, 18)
    task = Classify({"rain": 2.0, "sun": 0.5, "wind": 1.0, "snow": 3.0})
    ours = training(base, task, train)
    items = [ours.parts.train[i] for i in ours.members(0)]
    single = [training(base, Classify(), train).parts.train[i] for i in ours.members(0)]
    assert [item.target for item in items] == [item.target for item in single]
    with torch.no_grad():
        logits = torch.stack([
            ours.model(input_ids=torch.tensor([item.sequences[0][0]])).logits[0] for item in items
        ])  # fmt: skip
    weights = torch.tensor([2.0, 3.0, 0.5, 1.0]).double()  # rain, snow, sun, wind
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor([item.target for item in items]), weights)
    losses = []
    ours.run(lambda step, steps, loss: losses.append(loss))
    assert losses[0] == pytest.approx(expected.item(), rel=1e-6)


def test_balanced_class_weights_are_those_of_scikit_learn():
    from sklearn.utils.class_weight import compute_class_weight

    train = [Example("", None, label) for label in "aaaabbc"]
    task = Classify("balanced")
    task.settle(train, train)
    expected = compute_class_weight("balanced", classes=np.array(list("abc")), y=[e.label for e in train])
    assert task._weights.tolist() == pytest.approx(expected.tolist())


@pytest.mark.parametrize("given", [{"a": 1.0}, {"a": 1, "b": 1, "c": 1, "d": 1}, {"a": 1, "b": 0, "c": 1}, "even"])
def test_class_weights_that_do_not_fit_are_refused(given):
    train = [Example("", None, label) for label in "abc" * 3]
    with pytest.raises(ValueError, match="class weights"):
        Classify(given).settle(train, train)


def test_the_order_of_an_epoch_is_a_function_of_seed_and_epoch(base):
    ours = training(base, Classify(), examples(Classify, 20))
    epochs = [[int(i) for step in range(first, first + 4) for i in ours.members(step)] for first in (0, 4)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(20))] * 2
    assert epochs[0] != epochs[1]
    assert epochs[0] == [
        int(i) for step in range(4) for i in training(base, Classify(), examples(Classify, 20)).members(step)
    ]
    other = training(base, Classify(), examples(Classify, 20), dataclasses.replace(PLAIN, seed=4))
    assert epochs[0] != [int(i) for step in range(4) for i in other.members(step)]


def test_layers_learn_at_rates_that_decay_downwards(base):
    torch.manual_seed(0)
    task = Classify()
    task.settle(examples(Classify, 20), examples(Classify, 20))
    model = make_network(task, base).model
    rate = {p: group["scale"] for group in parameter_groups(model, 0.01, 0.5) for p in group["params"]}
    decay = {p: group["weight_decay"] for group in parameter_groups(model, 0.01, 0.5) for p in group["params"]}
    assert len(rate) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        depth = 0.25 if "embeddings" in name else 0.5 if "layer.0." in name else 1.0
        assert rate[parameter] == depth, name
        assert decay[parameter] == (0.01 if parameter.dim() > 1 else 0.0)
    # and the update follows: AdamW's first step moves each weight by its rate
    ours = training(base, Classify(), examples(Classify, 6), dataclasses.replace(
        PLAIN, layer_decay=0.5, warmup=0.0, epochs=1, weight_decay=0.0))  # fmt: skip
    before = {name: p.detach().clone() for name, p in ours.model.named_parameters()}
    ours.run()
    moved = {name: (p - before[name]).abs().max().item() for name, p in ours.model.named_parameters()}
    assert moved["classifier.weight"] == pytest.approx(1e-3, rel=1e-3)
    assert moved["bert.encoder.layer.0.attention.self.value.weight"] == pytest.approx(5e-4, rel=1e-3)
    assert moved["bert.embeddings.word_embeddings.weight"] == pytest.approx(2.5e-4, rel=1e-3)


def test_top_layers_are_drawn_anew(base):
    task = Classify()
    task.settle(examples(Classify, 20), examples(Classify, 20))
    kept, drawn = (make_network(task, base, reinit_layers=number) for number in (0, 1))
    equal = {
        name: torch.equal(p, dict(drawn.model.named_parameters())[name]) for name, p in kept.model.named_parameters()
    }
    assert all(equal[name] for name in equal if "layer.0." in name or "embeddings" in name)
    assert not any(
        equal[name] for name in equal if ("layer.1." in name or "pooler" in name) and name.endswith("dense.weight")
    )
    assert "the top 1 of 2 layers are drawn at random" in drawn.head
    with pytest.raises(ValueError, match="the model has 2 layers"):
        make_network(task, base, reinit_layers=3)


OPTIONS = {"epochs": 4, "batch_size": 6, "learning_rate": 2e-3, "seed": 5}


def interrupted(base, train, out, at: int, **options) -> None:
    """A fine-tuning that is cut off after update ``at``."""

    def stop(step, steps, loss):
        if step == at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        finetune(base, train, train, out, on_step=stop, **OPTIONS, **options)


@pytest.mark.parametrize(("at", "options"), [(9, {}), (7, {"checkpoint_every": 2, "patience": 3}), (2, {})])
def test_a_run_that_goes_on_gives_the_bits_of_one_at_once(base, tmp_path, at, options):
    """With dropout; after an epoch, within one, and before the first checkpoint."""
    train, told = examples(Classify, 20), []
    whole = finetune(base, train, train, tmp_path / "whole", **OPTIONS, **options)
    interrupted(base, train, tmp_path / "cut", at, **options)
    found = finetune(base, train, train, tmp_path / "cut", on_note=told.append, **OPTIONS, **options)
    assert found == whole
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "cut")]
    assert weights[0] == weights[1]
    assert any("going on from" in text for text in told) == (at > 2)
    for name in ("whole", "cut"):
        assert not (tmp_path / name / "checkpoints").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_writes_a_checkpoint_and_the_same_call_goes_on(base, tmp_path, number):
    train = examples(Classify, 20)
    before = signal.getsignal(number)
    with pytest.raises(Stopped, match=f"{number.name}: the same command goes on") as stopped:
        finetune(base, train, train, tmp_path, on_step=lambda step, *_: step == 6 and os.kill(os.getpid(), number),
                 **OPTIONS)  # fmt: skip
    assert stopped.value.signal == number
    assert signal.getsignal(number) == before
    assert checkpoint.newest(tmp_path)[0].step == 7
    assert finetune(base, train, train, tmp_path, **OPTIONS) == finetune(base, train, train, **OPTIONS)


def test_damaged_checkpoints_are_passed_over_or_named(base, tmp_path):
    """The newest is passed over; without the best epoch's weights a run would keep others without a word."""
    train, told = examples(Classify, 20), []
    accuracies = [0.9, 0.1, 0.2, 0.3]
    interrupted(base, train, tmp_path, 11, task=Told(accuracies))
    first, second = checkpoint.folders(tmp_path)
    (second / "model.safetensors").write_bytes(b"x")
    found = finetune(base, train, train, tmp_path, on_note=told.append, task=Told(accuracies[1:]), **OPTIONS)
    assert "is damaged and passed over" in "".join(told)
    assert f"going on from {first}" in "".join(told)
    assert found["best_epoch"] == 1

    interrupted(base, train, tmp_path, 11, task=Told(accuracies))
    first, _ = checkpoint.folders(tmp_path)
    (first / "model.safetensors").write_bytes(b"x")
    with pytest.raises(checkpoint.CheckpointError, match="step-00000004, with the best epoch's weights, is damaged"):
        finetune(base, train, train, tmp_path, task=Told(accuracies), **OPTIONS)


def test_a_run_with_other_options_is_refused_until_the_first_has_ended(base, tmp_path):
    train = examples(Classify, 20)
    interrupted(base, train, tmp_path, 9)
    for changed, named in (
        ({"learning_rate": 1e-3}, r"learning_rate \(was 0.002, now 0.001\)"),
        ({"epochs": 5}, "epochs"),
        ({"dropout": 0.3}, "dropout"),
    ):
        with pytest.raises(ValueError, match=named):
            finetune(base, train, train, tmp_path, **OPTIONS | changed)
    with pytest.raises(ValueError, match=r"differs in train \("):
        finetune(base, train[::-1], train, tmp_path, **OPTIONS)
    assert checkpoint.newest(tmp_path)[0].step == 8
    finetune(base, train, train, tmp_path, **OPTIONS)
    finetune(base, train, train, tmp_path, **OPTIONS | {"epochs": 1})  # it is done: this one is another


class Told(Classify):
    """Whose accuracy is what the test says."""

    def __init__(self, accuracies):
        super().__init__()
        self.accuracies = iter(accuracies)

    def metrics(self, examples, predictions):
        return super().metrics(examples, predictions) | {"accuracy": next(self.accuracies)}


@pytest.mark.parametrize(
    ("accuracies", "options", "epochs", "best"),
    [
        ([0.5, 0.7, 0.6, 0.6], {}, 4, 2),
        ([0.5, 0.7, 0.6, 0.6], {"patience": 1}, 3, 2),
        ([0.5, 0.4, 0.6, 0.5, 0.5, 0.9], {"patience": 2}, 5, 3),
        ([math.nan, 0.1, math.nan], {}, 3, 2),
        ([0.5, 0.7, 0.6], {"keep": "last"}, 3, 3),
    ],
)
def test_the_best_epoch_is_kept_or_the_last(base, tmp_path, accuracies, options, epochs, best):
    train, weights = examples(Classify, 12), []
    task = Told(accuracies)

    def remember(measures):
        at = checkpoint.newest(tmp_path)[0]
        assert at is None or at.step == 2 * len(weights)
        weights.append(measures)

    found = finetune(base, train, train, tmp_path, task=task, on_epoch=remember,
                     **OPTIONS | {"epochs": len(accuracies), "precision": "fp32"} | options)  # fmt: skip
    assert (found["epochs"], found["best_epoch"]) == (epochs, best)
    assert found["loss"] == found["history"][best - 1]["loss"]
    kept = transformers.BertForSequenceClassification.from_pretrained(tmp_path).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    with torch.no_grad():
        batch = tokenizer([e.text for e in train], padding=True, return_tensors="pt")
        labels = torch.tensor([kept.config.label2id[e.label] for e in train])
        loss = kept(**batch, labels=labels).loss
    assert loss.item() == pytest.approx(found["loss"], rel=1e-5)


class Broken(Classify):
    """Whose third update has a loss that is NaN."""

    updates = 0

    def forward(self, network, batch, count, **more):
        self.updates += network.training
        loss, output = super().forward(network, batch, count, **more)
        return (loss * math.nan if self.updates == 3 and network.training else loss), output


def test_an_update_that_is_not_finite_is_left_out_and_told(base):
    train, told, weights = examples(Classify, 20), [], []
    ours = training(base, Broken(), train)
    ours.run(lambda *_: weights.append(ours.model.classifier.weight.detach().clone()))
    assert torch.equal(weights[1], weights[2])
    assert not torch.equal(weights[2], weights[3])
    found = finetune(base, train, train, task=Broken(), on_warning=told.append, **OPTIONS)
    assert found["skipped"] == 1
    assert "1 of 16 updates were left out: their loss or gradient was not finite" in told
    assert all(math.isfinite(epoch["train_loss"]) for epoch in found["history"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": "last", "patience": 1}, "give one of them"),
        ({"keep": "first"}, "keep must be"),
        ({"layer_decay": 0}, "layer_decay must be"),
        ({"seeds": 0}, "patience and seeds must be 1 or more"),
        ({"max_length": 65}, "64 positions"),
    ],
)
def test_options_out_of_range_are_refused(base, options, message):
    train = examples(Classify, 20)
    with pytest.raises(ValueError, match=message):
        finetune(base, train, train, **options)


def test_several_seeds_have_a_mean_and_a_deviation_and_the_best_is_kept(base, tmp_path):
    train, validation = examples(Classify, 20), examples(Classify, 30, 2)
    options = OPTIONS | {"epochs": 2}
    single = {str(seed): finetune(base, train, validation, **options | {"seed": seed}) for seed in (5, 6, 7)}
    found = finetune(base, train, validation, tmp_path / "all", seeds=3, **options)
    values = {seed: result["accuracy"] for seed, result in single.items()}
    assert found["seeds"]["values"] == values
    mean = sum(values.values()) / 3
    assert found["seeds"]["mean"] == pytest.approx(mean)
    assert found["seeds"]["deviation"] == pytest.approx(math.sqrt(sum((v - mean) ** 2 for v in values.values()) / 2))
    best = max(values, key=lambda seed: (values[seed], -single[seed]["loss"]))
    assert found["accuracy"] == values[best]
    finetune(base, train, validation, tmp_path / "best", **options | {"seed": int(best)})
    assert (tmp_path / "all" / "model.safetensors").read_bytes() == (
        tmp_path / "best" / "model.safetensors"
    ).read_bytes()

    # cut off within the second seed, it does not train the first again
    def stop(step, steps, loss):
        trained.append(step)
        if trained == [*range(1, 9), 1, 2, 3, 4, 5]:
            raise KeyboardInterrupt

    trained: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        finetune(base, train, validation, tmp_path / "cut", seeds=3, on_step=stop, **options)
    with pytest.raises(ValueError, match="seeds"):
        finetune(base, train, validation, tmp_path / "cut", seeds=2, **options)
    trained = []
    assert finetune(base, train, validation, tmp_path / "cut", seeds=3, on_step=stop, **options) == found
    assert trained == [5, 6, 7, 8, *range(1, 9)]
    record = json.loads((tmp_path / "cut" / "finetune.json").read_text())
    assert record["done"]
    assert list(record["seeds"]) == ["5", "6", "7"]


@pytest.mark.slow
def test_with_dropout_the_scores_are_trainers_within_the_spread_of_seeds(base, tmp_path):
    """Means over six seeds, of a rule that some labels break: one epoch or two from being learnt."""
    draw = random.Random(1)

    def made(count):
        found = []
        for _ in range(count):
            nouns = draw.sample(NOUNS, 2)
            right = "wet" if "rain" in nouns else "dry"
            wrong = {"wet": "dry", "dry": "wet"}[right]
            found.append(Example(sentence(draw, nouns, 12), None, right if draw.random() < 0.9 else wrong))
        return found

    train, validation = made(300), made(400)
    options = {"epochs": 3, "batch_size": 16, "learning_rate": 2e-3, "precision": "fp32", "keep": "last"}
    ours = [finetune(base, train, validation, seed=seed, **options)["accuracy"] for seed in range(6)]
    theirs = []
    for seed in range(6):
        transformers.set_seed(seed)
        tokenizer = transformers.AutoTokenizer.from_pretrained(base)
        model = transformers.AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
        parts = [[{**tokenizer(e.text), "labels": int(e.label == "wet")} for e in part] for part in (train, validation)]
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path), num_train_epochs=3, per_device_train_batch_size=16, learning_rate=2e-3,
            warmup_steps=0.1, weight_decay=0.01, seed=seed, use_cpu=True, report_to=[], save_strategy="no",
            disable_tqdm=True, dataloader_pin_memory=False,
        )  # fmt: skip
        trainer = transformers.Trainer(
            model, arguments, train_dataset=parts[0], data_collator=transformers.DataCollatorWithPadding(tokenizer)
        )
        trainer.train()
        found = trainer.predict(parts[1])
        theirs.append(float((found.predictions.argmax(-1) == found.label_ids).mean()))
    error = math.sqrt((statistics.variance(ours) + statistics.variance(theirs)) / 6)
    assert abs(statistics.fmean(ours) - statistics.fmean(theirs)) < 3 * error + 0.005, (ours, theirs)
    assert min(statistics.fmean(ours), statistics.fmean(theirs)) > 0.7, (ours, theirs)
