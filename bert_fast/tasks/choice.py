"""One of several choices: read from SWAG's tables and JSON lines, scored from pooled outputs.

Source: SWAG's files as transformers' run_swag.py reads them; the fields of `datasets`' hellaswag, race, ai2_arc,
commonsense_qa and openbookqa.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from bert_fast.model import BertForMultipleChoice
from bert_fast.tasks.records import first_key, names_of, records, records_of, refuse_columns
from bert_fast.tasks.tables import Source
from bert_fast.tasks.task import Item, Task
from bert_fast.text import well_formed

CONTEXTS = ("context", "sent1", "ctx", "article", "premise", "passage")
QUESTIONS = ("question", "sent2", "question_stem")
CHOICES, LABELS = ("choices", "endings", "options"), ("label", "answerKey", "answer")


class Choice(NamedTuple):
    """What stands before the choices, the choices, and the number of the right one."""

    context: str
    choices: tuple[str, ...]
    label: int | None
    where: str


def read_choices(path: str | Path) -> list[Choice]:
    """The examples of a .csv, .tsv, .jsonl, .json or .parquet file whose records have choices.

    A record has a context ("context", "sent1", "ctx", "article", "premise", "passage"), a question ("question",
    "sent2", "question_stem") or both, its choices in a list ("choices", "endings", "options") or in "ending0",
    "ending1" and so on, and the right one ("label", "answerKey", "answer"): its number from 0, its letter, or what the
    choices' own "label" says. The question, where there is a context, goes before each choice. Raises ValueError naming
    the line that does not fit, FileNotFoundError where there is no file.
    """
    found = [_choice(where, record, labelled=True) for where, record in records(path)]
    if not found:
        raise ValueError(f"{path} holds no example")
    return found


def _choice(where: str, record: dict, *, labelled: bool) -> Choice:
    nested = record.get("question")
    if isinstance(
        nested, dict
    ):  # {"question": {"stem": ..., "choices": [...]}, "answerKey": ...}, as ARC's files have it
        record = {**record, **nested, "question": nested.get("stem")}
    context, question = (_first(record, names, where) for names in (CONTEXTS, QUESTIONS))
    if context is None and question is None:
        raise ValueError(f"{where}: neither a context nor a question, but {', '.join(map(repr, record))}")
    texts, names = _texts(record, where)
    if len(texts) < 2:
        raise ValueError(f"{where}: {len(texts)} choices: there must be two at least")
    before = "" if context is None or question is None else f"{question} "
    return Choice(
        (question if context is None else context) or "",
        tuple(f"{before}{text}".strip() for text in texts),
        _label(record, len(texts), names, where) if labelled else None,
        where,
    )


def _first(record: dict, names: Sequence[str], where: str) -> str | None:
    name = next((name for name in names if record.get(name) is not None), None)
    return None if name is None else _text(record[name], where, name)


def _text(value: Any, where: str, name: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{where}: {name!r} is no text")
    return well_formed(value)[0]


def _texts(record: dict, where: str) -> tuple[list[str], list[str] | None]:
    """The choices of ``record``, and what names them, where something does."""
    numbered = [f"ending{number}" for number in range(sum(name.startswith("ending") for name in record))]
    if numbered and record.keys() >= {*numbered} and not record.keys() & {*CHOICES}:
        return [_text(record[name], where, name) for name in numbered], None
    key = first_key(record, CHOICES, where, "choices")
    value, names = record[key], None
    if isinstance(value, dict) and isinstance(value.get("text"), list) and isinstance(value.get("label"), list):
        if len(value["text"]) != len(value["label"]):
            raise ValueError(f"{where}: {key!r} has {len(value['text'])} texts and {len(value['label'])} labels")
        value, names = value["text"], list(map(str, value["label"]))
    elif isinstance(value, list) and value and all(isinstance(one, dict) and "text" in one for one in value):
        named = all("label" in one for one in value)
        value, names = [one["text"] for one in value], [str(one["label"]) for one in value] if named else None
    if not isinstance(value, list):
        raise ValueError(f"{where}: {key!r} is no list of choices")
    return [_text(text, where, f"{key}[{number}]") for number, text in enumerate(value)], names


def _label(record: dict, count: int, names: list[str] | None, where: str) -> int:
    key = first_key(record, LABELS, where, "label")
    value = record[key]
    text = str(value).strip() if isinstance(value, (str, int)) and not isinstance(value, bool) else ""
    if names is not None and text in names:
        return names.index(text)
    if text.isdecimal() and int(text) < count:
        return int(text)
    if len(text) == 1 and text.isalpha() and text.isascii() and ord(text.upper()) - ord("A") < count:
        return ord(text.upper()) - ord("A")
    raise ValueError(f"{where}: {key!r} is {value!r}, none of the {count} choices")


def grouped(scores: Tensor, rows: Tensor) -> Tensor:
    """The ``scores`` (N,) of choices by example, (B, most choices): ``rows`` says which, N is none and gets -inf."""
    return F.pad(scores, (0, 1), value=-torch.inf)[rows]


class _Scored(NamedTuple):
    """The output for packed choices: a logit for each."""

    logits: Tensor


class Choose(Task):
    """One of several choices, of which examples may have different numbers. A prediction is the probability of each."""

    name, model, metric, named = "choice", BertForMultipleChoice, "accuracy", False
    counted: ClassVar[dict[str, str]] = {"cut": "examples with a choice cut to {seq} tokens"}

    @classmethod
    def recognises(cls, path: Path) -> bool:
        names = names_of(path)
        return "ending0" in names or bool(names & set(CHOICES))

    def read(self, path: str | Path, **columns) -> list[Choice]:
        refuse_columns(self.name, columns)
        return read_choices(path)

    def unlabelled(self, source: Source, *, text: str | None = None, pair: str | None = None) -> Iterator[Choice]:
        refuse_columns(self.name, {"text": text, "pair": pair})
        return (_choice(where, record, labelled=False) for where, record in records_of(source))

    def settle(self, train: list, validation: list) -> tuple[list, list, list[str]]:
        told = []
        if len(labels := {example.label for example in train}) == 1:
            told.append(
                f"the right choice of every training example is number {labels.pop()}: where it stands is enough"
            )
        return train, validation, told

    def encode(self, examples: list, tokenizer: Tokenizer, max_length: int, counts: Counter) -> list[Item]:
        tokenizer.enable_truncation(max_length)
        items = []
        for number, example in enumerate(examples):
            encodings = tokenizer.encode_batch_fast([(example.context, choice) for choice in example.choices])
            counts["cut"] += any(encoding.overflowing for encoding in encodings)
            items.append(Item([(encoding.ids, encoding.type_ids) for encoding in encodings], number, example.label))
        return items

    def targets(self, items: Sequence[Item]) -> dict[str, Tensor]:
        counts = [len(item.sequences) for item in items]
        ends = torch.tensor([0, *counts]).cumsum(0)
        rows = ends[:-1, None] + torch.arange(max(counts))
        rows = rows.where(rows < ends[1:, None], ends[-1])
        return {"labels": torch.tensor([item.target for item in items]), "rows": rows}

    def forward(self, network, batch: dict, count: Tensor, **more) -> tuple[Tensor, Any]:
        inputs = {name: value for name, value in batch.items() if name not in ("labels", "rows")}
        _, logits = network.score(**inputs, **more)
        logits = logits[:, 0]
        if "labels" not in batch:
            return torch.zeros_like(count), _Scored(logits)
        loss = F.cross_entropy(grouped(logits.float(), batch["rows"]), batch["labels"], reduction="sum")
        return loss / count, _Scored(logits)

    def scores(self, output, items: Sequence[Item]) -> list[np.ndarray]:
        """(choices,) of each."""
        return [part.numpy() for part in output.logits.float().cpu().split([len(item.sequences) for item in items])]

    def predictions(self, examples: list, items: Sequence[Item], scores: Sequence[np.ndarray]) -> list[np.ndarray]:
        return [torch.from_numpy(score).softmax(dim=0).numpy() for score in scores]

    def metrics(self, examples: list, predictions: list) -> dict[str, Any]:
        """accuracy."""
        right = [int(found.argmax()) == example.label for example, found in zip(examples, predictions, strict=True)]
        return {"accuracy": sum(right) / len(right)}

    def about(self, train: list, validation: list) -> dict[str, Any]:
        """``chance``: the accuracy of guessing."""
        return {"chance": sum(1 / len(example.choices) for example in validation) / len(validation)}

    def told(self, metrics: dict) -> str:
        return f"accuracy {100 * metrics['accuracy']:.2f} %"

    def line(self, example, prediction) -> dict[str, Any]:
        best = int(prediction.argmax())
        return {
            "choice": best,
            "text": example.choices[best],
            "probability": float(prediction[best]),
            "probabilities": [float(p) for p in prediction],
        }
