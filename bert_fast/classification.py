"""Fine-tuning for the classification of sentences and sentence pairs, on ``transformers.Trainer``."""

import csv
import json
import math
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import BertTokenizerFast, DataCollatorWithPadding, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from bert_fast.inference import load_model, model_folder
from bert_fast.model import BertForSequenceClassification
from bert_fast.weights import silent_transformers


class Example(NamedTuple):
    """A sentence, or a pair of them, with its label as the file has it."""

    text: str
    pair: str | None
    label: str


def read_examples(
    path: str | Path, *, text: str | None = None, pair: str | None = None, label: str | None = None
) -> list[Example]:
    """The examples of a .tsv, .csv or .jsonl file.

    ``text``, ``pair`` and ``label`` name columns (then the first line is a header) or JSON keys, or number columns
    from 0, -1 being the last (then there is no header). Default: "text" and "label" of JSON lines, else the first
    column and the last; no pair. In .tsv a quotation mark is a character like any other. Raises ValueError naming the
    line that does not fit, FileNotFoundError where there is no file.
    """
    path = Path(path)
    kind = path.suffix.lower()
    if kind not in (".tsv", ".csv", ".jsonl", ".ndjson"):
        raise ValueError(f"{path}: its name must end with .tsv, .csv or .jsonl")
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:  # spreadsheets write a byte-order mark
            if kind in (".jsonl", ".ndjson"):
                examples = list(_from_json(path, file, text or "text", pair, label or "label"))
            else:
                columns = (text or "0", pair, label or "-1")
                examples = list(_from_table(path, file, "\t" if kind == ".tsv" else ",", *columns))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from error
    if not examples:
        raise ValueError(f"{path} holds no example")
    return examples


def _from_json(path: Path, lines: Iterable[str], text: str, pair: str | None, label: str) -> Iterator[Example]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
            name = "" if values[label] is None else str(values[label])
            found = Example(values[text], None if pair is None else values[pair], name)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: no JSON object with {text!r} and {label!r}: {error}") from error
        if not all(isinstance(part, str) for part in found[: 1 if pair is None else 2]):
            raise ValueError(f"{path}, line {number}: {text!r} is no text")
        yield _labelled(found, path, number)


def _from_table(
    path: Path, lines: Iterable[str], delimiter: str, text: str, pair: str | None, label: str
) -> Iterator[Example]:
    rows = csv.reader(
        lines, delimiter=delimiter, quoting=csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL, strict=True
    )
    names = [name for name in (text, pair, label) if name is not None]
    numbered = all(name.lstrip("-").isdigit() for name in names)
    header = None if numbered else next(rows, [])
    if header is not None and (missing := [name for name in names if name not in header]):
        raise ValueError(f"{path}: no column {missing[0]!r} in its header: {', '.join(header)}")
    places = [None if n is None else int(n) if numbered else header.index(n) for n in (text, pair, label)]
    try:
        for row in rows:
            if not row:
                continue
            try:
                found = [None if place is None else row[place] for place in places]
            except IndexError:
                raise ValueError(f"{path}, line {rows.line_num}: only {len(row)} columns") from None
            if len(row) < len(names):
                raise ValueError(f"{path}, line {rows.line_num}: only {len(row)} columns")
            yield _labelled(Example(*found), path, rows.line_num)
    except csv.Error as error:
        raise ValueError(f"{path}, line {rows.line_num}: {error}") from error


def _labelled(example: Example, path: Path, line: int) -> Example:
    if not example.label.strip():
        raise ValueError(f"{path}, line {line}: the label is empty: leave out what has none")
    return example


def label_names(examples: Iterable[Example]) -> list[str]:
    """The labels that occur, in order: by number where all are whole numbers, else by name.

    ValueError for one only, and for numbers of which some have a fraction.
    """
    names = {example.label for example in examples}
    if len(names) < 2:
        raise ValueError(f"classification needs two labels at least; the examples have only {names or 'none'}")
    if fractions := _fractions(names):
        raise ValueError(
            f"the labels are numbers with a fraction, as {fractions[0]}: regression is not what finetune does; give "
            "classes names"
        )
    try:
        return sorted(names, key=int)
    except ValueError:
        return sorted(names)


def _fractions(names: set[str]) -> list[str]:
    """Those with a fraction, where all are numbers."""
    try:
        numbers = {name: float(name) for name in names}
    except ValueError:
        return []
    return sorted(name for name, number in numbers.items() if math.isfinite(number) and not number.is_integer())


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
    on_warning: Callable[[str], None] | None = None,
) -> dict:
    """Trains a BertForSequenceClassification from the run or Hugging Face folder ``model`` and measures it.

    Examples are cut to ``max_length`` tokens (None: 128, or the model's positions if fewer). Returns {"accuracy",
    "loss", "majority", "examples", "labels", "epochs"} on ``validation``; "majority" is the accuracy of always
    saying ``train``'s most frequent label. ``out`` gets the model and the tokenizer, as a Hugging Face folder.
    ``dropout`` is that of hidden states and attention (None: the model's own). ``from_scratch`` keeps the
    architecture and the tokenizer, with random weights: what pre-training is worth is the difference. ``precision``
    is "fp32" or "bf16" (autocast). ``on_step(step, steps, loss)`` is called after every update, ``on_epoch`` with the
    measures after every epoch, ``on_warning`` where labels are more than half as many as examples. The same seed gives
    the same weights. Raises ValueError for examples that do not fit together or begin with the names of columns and for
    labels that are numbers with a fraction, FloatingPointError where the loss is not finite in the end.
    """
    if dropout is not None and not 0 <= dropout < 1:
        raise ValueError(f"dropout must be from 0 to below 1, got {dropout}")
    if precision not in ("fp32", "bf16"):
        raise ValueError(f"precision must be 'fp32' or 'bf16', got {precision!r}")
    labels = label_names(train)
    _require_no_header(train, validation, labels)
    if unknown := sorted({example.label for example in validation} - set(labels)):
        raise ValueError(f"the validation examples have the label {unknown[0]!r}, which no training example has")
    if len({example.pair is None for example in (*train, *validation)}) > 1:
        raise ValueError("some examples are pairs and others are not")
    if on_warning is not None and 2 * len(labels) > len(train):
        on_warning(f"{len(labels)} labels for {len(train)} training examples: is the right column the label (--label)?")
    torch.manual_seed(seed)
    network, tokenizer = _network(model, labels, dropout, from_scratch)
    positions = network.config.max_position_embeddings
    max_length = min(128, positions) if max_length is None else max_length
    if not 8 <= max_length <= positions:
        raise ValueError(f"sequences of {max_length} tokens: it must be 8 to the model's {positions} positions")
    report = _Report(on_step, on_epoch)
    with tempfile.TemporaryDirectory() as scratch:  # Trainer wants a folder; nothing is written there
        trainer = Trainer(
            model=network,
            args=TrainingArguments(
                output_dir=scratch,
                num_train_epochs=epochs,
                per_device_train_batch_size=batch_size,
                per_device_eval_batch_size=4 * batch_size,
                learning_rate=learning_rate,
                lr_scheduler_type="linear",
                warmup_steps=warmup,
                weight_decay=weight_decay,
                seed=seed,
                bf16=precision == "bf16",
                use_cpu=device == "cpu",
                eval_strategy="epoch",
                save_strategy="no",
                logging_steps=10,
                logging_first_step=True,
                report_to=[],
                disable_tqdm=True,
                dataloader_pin_memory=device != "cpu",
            ),
            train_dataset=_encoded(train, tokenizer, labels, max_length),
            eval_dataset=_encoded(validation, tokenizer, labels, max_length),
            data_collator=DataCollatorWithPadding(tokenizer),
            compute_metrics=lambda p: {"accuracy": float((p.predictions.argmax(-1) == p.label_ids).mean())},
            callbacks=[report],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    if not math.isfinite(report.measured["loss"]):
        raise FloatingPointError(f"the loss is {report.measured['loss']}: nothing was kept; lower the learning rate")
    if out is not None:
        with silent_transformers():
            network.save_pretrained(out)
            tokenizer.save_pretrained(out)
    most = max(labels, key=[example.label for example in train].count)
    return {
        "accuracy": report.measured["accuracy"],
        "loss": report.measured["loss"],
        "majority": sum(example.label == most for example in validation) / len(validation),
        "examples": len(validation),
        "labels": labels,
        "epochs": epochs,
    }


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
    """The classifier with a new head (or all new), and the tokenizer as ``transformers`` has it."""
    rates = {} if dropout is None else {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    network, _, _ = load_model(
        BertForSequenceClassification, model, optional=("bert.pooler.",), drawn=("classifier.",),
        num_labels=len(labels), dtype=torch.float32, **rates,
    )  # fmt: skip
    config = network.config
    config.id2label, config.label2id = dict(enumerate(labels)), {name: i for i, name in enumerate(labels)}
    config.problem_type = "single_label_classification"
    if from_scratch:
        network = BertForSequenceClassification(config)
    return network, BertTokenizerFast.from_pretrained(model_folder(model))


def _encoded(examples: list[Example], tokenizer: BertTokenizerFast, labels: list[str], max_length: int) -> list[dict]:
    numbers = {name: i for i, name in enumerate(labels)}
    pairs = None if examples[0].pair is None else [example.pair for example in examples]
    encoded = tokenizer([example.text for example in examples], pairs, truncation=True, max_length=max_length)
    columns = {**encoded, "labels": [numbers[example.label] for example in examples]}
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


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
