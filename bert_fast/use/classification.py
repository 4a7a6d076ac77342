"""Fine-tuning for the classification of sentences and sentence pairs, on ``transformers.Trainer``."""

import math
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from transformers import (
    BertConfig,
    DataCollatorWithPadding,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_callback import PrinterCallback

from bert_fast import extras
from bert_fast.data.tokenizer import MODEL_INPUTS, SPECIAL_NAMES, save_tokenizer
from bert_fast.model import BertForSequenceClassification
from bert_fast.run.weights import read_weights, silent_transformers
from bert_fast.use.examples import (
    Example,
    doubtful_labels,
    label_names,
    label_value,
    read_examples,
    well_formed_examples,
)
from bert_fast.use.inference import load_model, model_folder

__all__ = ["Example", "finetune", "label_names", "read_examples"]

# Only a head may be drawn, and a pooler that pre-training without next-sentence prediction did not train.
LOADING: dict[str, Any] = {"optional": ("bert.pooler.",), "drawn": ("classifier.",), "dtype": torch.float32}


def finetune(
    model: str | Path,
    train: list[Example],
    validation: list[Example],
    out: str | Path | None = None,
    *,
    epochs: float = 3,
    batch_size: int = 32,
    learning_rate: float = 3e-5,
    warmup: float = 0.1,
    weight_decay: float = 0.01,
    max_length: int | None = None,
    dropout: float | None = None,
    seed: int = 0,
    precision: str = "fp32",
    device: str = "cpu",
    from_scratch: bool = False,
    on_step: Callable[[int, int, float | None], None] | None = None,
    on_epoch: Callable[[dict], None] | None = None,
    on_note: Callable[[str], None] | None = None,
    on_warning: Callable[[str], None] = warnings.warn,
) -> dict:
    """Trains a BertForSequenceClassification from the run or Hugging Face folder ``model`` and measures it.

    Labels with one :func:`~bert_fast.use.examples.label_value` are one class. A head that ``model`` has keeps its rows
    for the labels that it names; the others are drawn. Weights are float32, whatever they were saved as. Examples are
    cut to ``max_length`` tokens (None: 128, or the model's positions if fewer). ``out`` gets the model and the
    tokenizer, as a Hugging Face folder. ``dropout`` is that of hidden states and attention (None: the model's own).
    ``from_scratch`` keeps the architecture and the tokenizer, with random weights: what pre-training is worth is the
    difference. ``precision`` is "fp32" or "bf16" (autocast). The same seed gives the same weights. Returns

    accuracy, loss      on ``validation``
    majority            the accuracy there of always saying ``train``'s most frequent label
    examples, labels    how many ``validation`` has; the names of the classes
    epochs, seq         as trained: ``max_length`` is the latter
    head                where its weights come from, in words
    cut                 how many examples of "train" and of "validation" were cut
    empty               examples with an empty text, of both
    shared              examples of ``validation`` whose texts ``train`` has, too

    ``on_step(step, steps, loss)`` is called after every update, ``on_epoch`` with the measures after every epoch,
    ``on_note`` with ``head``, ``on_warning`` with what is doubtful in the labels and how many lone surrogates became
    U+FFFD. Raises ValueError for examples that do not fit together or begin with the names of columns and for labels
    that are numbers with a fraction, FloatingPointError where the loss is not finite in the end.
    """
    extras.load("accelerate")  # transformers.Trainer's, whose own message does not say from where
    if dropout is not None and not 0 <= dropout < 1:
        raise ValueError(f"dropout must be from 0 to below 1, got {dropout}")
    if precision not in ("fp32", "bf16"):
        raise ValueError(f"precision must be 'fp32' or 'bf16', got {precision!r}")
    train, validation, labels = _examples(train, validation, on_warning)
    torch.manual_seed(seed)
    network, tokenizer, head = _network(model, labels, dropout, from_scratch)
    if on_note is not None:
        on_note(head)
    positions = network.config.max_position_embeddings
    max_length = min(128, positions) if max_length is None else max_length
    if not 8 <= max_length <= positions:
        raise ValueError(f"sequences of {max_length} tokens: it must be 8 to the model's {positions} positions")
    parts = {
        name: _encoded(part, tokenizer, labels, max_length)
        for name, part in (("train", train), ("validation", validation))
    }
    measured = _trained(
        network, tokenizer, parts, _Report(on_step, on_epoch),
        num_train_epochs=epochs, per_device_train_batch_size=batch_size, per_device_eval_batch_size=4 * batch_size,
        learning_rate=learning_rate, warmup_steps=warmup, weight_decay=weight_decay, seed=seed,
        bf16=precision == "bf16", use_cpu=device == "cpu", dataloader_pin_memory=device != "cpu",
    )  # fmt: skip
    if not math.isfinite(measured["loss"]):
        raise FloatingPointError(f"the loss is {measured['loss']}: nothing was kept; lower the learning rate")
    if out is not None:
        with silent_transformers():
            network.save_pretrained(out)
            save_tokenizer(tokenizer, out, max_length=positions)
    return {
        "accuracy": measured["accuracy"],
        "loss": measured["loss"],
        "majority": _majority(parts["train"].rows, parts["validation"].rows),
        "examples": len(validation),
        "labels": labels,
        "epochs": epochs,
        "seq": max_length,
        "head": head,
        "cut": {name: part.cut for name, part in parts.items()},
        **_doubtful_texts(train, validation),
    }


def _trained(
    network: BertForSequenceClassification, tokenizer: PreTrainedTokenizerFast, parts: dict, report: "_Report",
    **options,
) -> dict:  # fmt: skip
    """Trains ``network`` on ``parts`` ("train", "validation") with transformers' ``options``; the last measures."""
    with tempfile.TemporaryDirectory() as scratch:  # Trainer wants a folder; nothing is written there
        trainer = Trainer(
            model=network,
            args=TrainingArguments(
                output_dir=scratch,
                lr_scheduler_type="linear",
                eval_strategy="epoch",
                save_strategy="no",
                logging_steps=10,
                logging_first_step=True,
                report_to=[],
                disable_tqdm=True,
                **options,
            ),
            train_dataset=parts["train"].rows,
            eval_dataset=parts["validation"].rows,
            data_collator=DataCollatorWithPadding(tokenizer),
            compute_metrics=lambda p: {
                "accuracy": float((cast(np.ndarray, p.predictions).argmax(-1) == p.label_ids).mean())
            },
            callbacks=[report],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return report.measured


def _majority(train: list[dict], validation: list[dict]) -> float:
    """The accuracy on ``validation`` of always saying the most frequent label of ``train``, the first of several."""
    counts = Counter(row["labels"] for row in train)
    most = min(counts, key=lambda label: (-counts[label], label))
    return sum(row["labels"] == most for row in validation) / len(validation)


def _doubtful_texts(train: list[Example], validation: list[Example]) -> dict[str, int]:
    """How many examples have an empty text, and how many of ``validation`` ``train`` has, too."""
    texts = {(example.text, example.pair) for example in train}
    return {
        "empty": sum(not text.strip() for e in (*train, *validation) for text in (e.text, e.pair) if text is not None),
        "shared": sum((example.text, example.pair) in texts for example in validation),
    }


def _examples(
    train: list[Example], validation: list[Example], on_warning: Callable[[str], None]
) -> tuple[list[Example], list[Example], list[str]]:
    """(train, validation, names of the classes), checked to fit together, as well-formed text."""
    (train, replaced), (validation, more) = map(well_formed_examples, (train, validation))
    labels = label_names(train)
    _require_no_header(train, validation, labels)
    if unknown := sorted({e.label for e in validation if label_value(e.label) not in set(map(label_value, labels))}):
        raise ValueError(f"the validation examples have the label {unknown[0]!r}, which no training example has")
    if len({example.pair is None for example in (*train, *validation)}) > 1:
        raise ValueError("some examples are pairs and others are not")
    for text in doubtful_labels(train, validation):
        on_warning(text)
    if replaced + more:
        on_warning(f"{replaced + more:,} lone surrogates in the examples (cut characters) became U+FFFD")
    return train, validation, labels


def _require_no_header(train: list[Example], validation: list[Example], labels: list[str]) -> None:
    """ValueError where both files begin with the same line, whose label no other line has: names of columns."""
    first = train[0]
    if (
        first == validation[0]
        and len(labels) > 2
        and all(sum(example.label == first.label for example in part) == 1 for part in (train, validation))
    ):
        raise ValueError(
            f"both files begin with {first.text!r} and {first.label!r}, which looks like the names of their columns: "
            f"name these, as in --text {first.text} --label {first.label}"
        )


def _network(model: str | Path, labels: list[str], dropout: float | None, from_scratch: bool):
    """(the classifier, the tokenizer that it learned with, where the head comes from in words)."""
    rates: dict[str, Any] = (
        {} if dropout is None else {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    )
    folder = model_folder(model)
    network, learned, drawn = load_model(
        BertForSequenceClassification, folder, num_labels=len(labels), **LOADING, **rates
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=learned, model_input_names=MODEL_INPUTS, **SPECIAL_NAMES)
    config = network.config
    config.id2label, config.label2id = dict(enumerate(labels)), {name: i for i, name in enumerate(labels)}
    config.problem_type = "single_label_classification"
    if from_scratch:
        network, head = BertForSequenceClassification(config), "all weights are drawn at random"
    else:
        head = _set_head(network, folder, labels, drawn)
    return network, tokenizer, head


def _set_head(network: BertForSequenceClassification, folder: Path, labels: list[str], drawn: list[str]) -> str:
    """Gives the head of ``network`` the rows that ``folder``'s own has for ``labels``; what was done, in words.

    ``drawn`` are the weights of ``network`` that ``folder`` did not have, or of another shape.
    """
    names = cast(dict[int, str], BertConfig.from_pretrained(folder).id2label)
    rows = _rows_of_labels([names[row] for row in sorted(names)], labels)
    if rows:
        own, missing, _ = read_weights(BertForSequenceClassification, folder, **LOADING)
        rows = {} if "classifier.weight" in missing else rows
    if not rows and "classifier.weight" in drawn:
        return f"the model has no head for these labels: drawn at random are {', '.join(drawn)}"
    head = torch.nn.Linear(network.config.hidden_size, len(labels))
    network._init_weights(head)
    with torch.no_grad():
        for ours, theirs in rows.items():
            head.weight[ours], head.bias[ours] = own.classifier.weight[theirs], own.classifier.bias[theirs]
    network.classifier = head
    new = [name for place, name in enumerate(labels) if place not in rows]
    if not rows:
        return f"the model's head is for {', '.join(names.values())}: a new one is drawn for {', '.join(labels)}"
    left_out = [name for row, name in names.items() if row not in rows.values()]
    return "the model's head is kept, each row for the label that it names" + "".join(
        f"; {what}: {', '.join(some)}" for what, some in (("drawn at random", new), ("left out", left_out)) if some
    )


def _rows_of_labels(names: list[str], labels: list[str]) -> dict[int, int]:
    """For each of ``labels`` that a head's rows are ``names`` for, its place and that row.

    The names that transformers gives where there are none, LABEL_0 and so on, stand for 0 and so on where these are
    all the labels.
    """
    numbers = [f"LABEL_{row}" for row in range(len(names))]
    if names == numbers and {label_value(label) for label in labels} == set(range(len(names))):
        names = list(map(str, range(len(names))))
    rows = {label_value(name): row for row, name in enumerate(names)}
    return {place: rows[value] for place, value in enumerate(map(label_value, labels)) if value in rows}


class _Encoded(NamedTuple):
    """Examples as the model takes them, and how many were cut."""

    rows: list[dict]
    cut: int


def _encoded(
    examples: list[Example], tokenizer: PreTrainedTokenizerFast, labels: list[str], max_length: int
) -> _Encoded:
    numbers = {label_value(name): i for i, name in enumerate(labels)}
    pairs = None if examples[0].pair is None else [example.pair for example in examples]
    encoded = tokenizer([example.text for example in examples], pairs, truncation=True, max_length=max_length)
    columns = {**encoded, "labels": [numbers[label_value(example.label)] for example in examples]}
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    return _Encoded(rows, sum(bool(encoding.overflowing) for encoding in encoded.encodings))


class _Report(TrainerCallback):
    """Tells steps and epochs as they end."""

    def __init__(self, on_step, on_epoch):
        self.tell_step, self.tell_epoch, self.loss, self.measured = on_step, on_epoch, None, {}

    def on_step_end(self, args, state, control, **kwargs):
        if self.tell_step is not None:
            self.tell_step(state.global_step, state.max_steps, self.loss)

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.loss = (logs or {}).get("loss", self.loss)

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        self.measured = {"epoch": state.epoch} | {key: metrics[f"eval_{key}"] for key in ("accuracy", "loss")}
        if self.tell_epoch is not None:
            self.tell_epoch(self.measured)
