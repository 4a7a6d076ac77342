"""The tasks of one vector a text or pair of texts: one label of several, any number of labels, a number."""

import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike
from tokenizers import Tokenizer
from torch import Tensor

from bert_fast import extras
from bert_fast.model import BertForSequenceClassification
from bert_fast.tasks.examples import (
    TABLES,
    Example,
    doubtful_labels,
    label_names,
    label_value,
    located_examples,
    number_of,
    single_label,
    well_formed_examples,
)
from bert_fast.tasks.tables import Columns, Source, rows_of, text_of
from bert_fast.tasks.task import Item, Task
from bert_fast.text import well_formed


@lru_cache
def numbers_of(labels: tuple[str, ...]) -> dict[Decimal | str, int]:
    """The row of each label, by :func:`label_value`."""
    return {label_value(name): number for number, name in enumerate(labels)}


class SentenceTask(Task):
    """What the three share: files, pairs, encoding, doubtful texts."""

    model = BertForSequenceClassification
    pairs: bool | None = None  # whether the model learnt pairs of texts; None: not known

    def read(self, path: str | Path, **columns) -> list[Example]:
        return [example for _, example in self.located(path, **columns)]

    def located(self, path: str | Path, **columns) -> list[tuple[str, Example]]:
        self.require_pairs(columns.get("pair"))
        return located_examples(path, **columns, **self.reading)

    def settle(self, train: list, validation: list) -> tuple[list, list, list[str]]:
        """Labels from ``train``; ValueError where both begin with the names of columns, too."""
        (train, replaced), (validation, more) = map(well_formed_examples, (train, validation))
        if len({example.pair is None for example in (*train, *validation)}) > 1:
            raise ValueError("some examples are pairs and others are not")
        told = list(self._settle_labels(train, validation))
        if replaced + more:
            told.append(f"{replaced + more:,} lone surrogates in the examples (cut characters) became U+FFFD")
        return train, validation, told

    def _settle_labels(self, train: list[Example], validation: list[Example]) -> Iterator[str]:
        raise NotImplementedError

    def target(self, example: Example) -> Any:
        """What the loss is made of; KeyError for a label that none of ``labels`` is."""
        raise NotImplementedError

    def unknown(self, example: Example) -> str | None:
        try:
            self.target(example)
        except KeyError:
            return str(example.label)
        return None

    @property
    def reading(self) -> dict[str, Any]:
        """Arguments of :func:`.located_examples` beside the columns."""
        return {}

    def require_pairs(self, pair: str | None) -> None:
        """ValueError where the model learnt pairs and ``pair`` names no second text, or the other way round."""
        if self.pairs is not None and self.pairs != (pair is not None):
            texts, what = ("pairs of texts", "name") if self.pairs else ("single texts", "leave out")
            raise ValueError(f"the model was fine-tuned on {texts}: {what} the column of the second one (--pair)")

    def unlabelled(self, source: Source, *, text: str | None = None, pair: str | None = None) -> Iterator[Example]:
        self.require_pairs(pair)
        default = "0" if source.kind in TABLES else "text"
        for row in rows_of(source, Columns((text or default, pair), ())):
            first = text_of(row, 0, text or default) or ""
            yield Example(
                well_formed(first)[0], None if pair is None else well_formed(text_of(row, 1, pair) or "")[0], None
            )

    def encode(self, examples: list, tokenizer: Tokenizer, max_length: int, counts: Counter) -> list[Item]:
        tokenizer.enable_truncation(max_length)
        texts = [example.text if example.pair is None else (example.text, example.pair) for example in examples]
        encodings = tokenizer.encode_batch_fast(texts)
        counts["cut"] += sum(bool(encoding.overflowing) for encoding in encodings)
        return [
            Item([(encoding.ids, encoding.type_ids)], number, None if example.label is None else self.target(example))
            for number, (example, encoding) in enumerate(zip(examples, encodings, strict=True))
        ]

    def about(self, train: list, validation: list) -> dict[str, Any]:
        """How many texts are empty, how many of ``validation`` stand in ``train``, too, and whether they are pairs."""
        texts, both = {(example.text, example.pair) for example in train}, (*train, *validation)
        return {
            "empty": sum(not text.strip() for e in both for text in (e.text, e.pair) if text is not None),
            "shared": sum((example.text, example.pair) in texts for example in validation),
            "pairs": train[0].pair is not None,
        }


class Classify(SentenceTask):
    """One label of several. ``class_weights`` weigh their losses: by name, or "balanced", n / (classes * count of it).

    A prediction is the probabilities of ``labels``, float32.
    """

    name, metric, options = "classify", "accuracy", ("class_weights",)

    def __init__(self, class_weights: str | Mapping[str, float] | None = None):
        self.class_weights = class_weights
        self._weights: Tensor | None = None

    labels: list[str]

    def _settle_labels(self, train: list[Example], validation: list[Example]) -> Iterator[str]:
        self.labels = label_names(train)
        numbers = numbers_of(tuple(self.labels))
        _require_no_header(train, validation, self.labels)
        if unknown := sorted({single_label(e) for e in validation if label_value(single_label(e)) not in numbers}):
            raise ValueError(f"the validation examples have the label {unknown[0]!r}, which no training example has")
        if self.class_weights is not None:
            self._weights = torch.tensor(_class_weights(self.class_weights, self.labels, map(self.target, train)))
        yield from doubtful_labels(train, validation)

    def config(self) -> dict[str, Any]:
        return {"problem_type": "single_label_classification"}

    def target(self, example: Example) -> int:
        return numbers_of(tuple(self.labels))[label_value(single_label(example))]

    def weight(self, items: Sequence[Item]) -> float:
        if self._weights is None:
            return len(items)
        return float(self._weights[[item.target for item in items]].sum())

    def targets(self, items: Sequence[Item]) -> dict[str, Tensor]:
        return {"labels": torch.tensor([item.target for item in items])}

    def forward(self, network, batch: dict, count: Tensor, **more) -> tuple[Tensor, Any]:
        if self._weights is None:
            return super().forward(network, batch, count, **more)
        labels = batch["labels"]
        output = network(**{name: value for name, value in batch.items() if name != "labels"}, **more)
        weights = self._weights.to(output.logits)
        return F.cross_entropy(output.logits, labels, weights, reduction="sum") / count, output

    def predictions(self, examples: list, items: Sequence[Item], scores: Sequence[np.ndarray]) -> list:
        return list(torch.from_numpy(np.stack(scores)).softmax(dim=1).numpy())

    def metrics(self, examples: list, predictions: list) -> dict[str, Any]:
        """accuracy, f1_micro, f1_macro, matthews, and f1: each label's own."""
        sklearn = extras.load("sklearn.metrics")
        true, found = [self.target(e) for e in examples], np.stack(predictions).argmax(axis=1)
        return {
            "accuracy": float(sklearn.accuracy_score(true, found)),
            **_f1(true, found, self.labels, list(range(len(self.labels)))),
            "matthews": float(sklearn.matthews_corrcoef(true, found)),
        }

    def about(self, train: list, validation: list) -> dict[str, Any]:
        """``majority``: the accuracy of always saying the most frequent label of ``train``, the first of several."""
        counts = Counter(map(self.target, train))
        most = min(counts, key=lambda label: (-counts[label], label))
        right = sum(self.target(example) == most for example in validation)
        return super().about(train, validation) | {"majority": right / len(validation)}

    def told(self, metrics: dict) -> str:
        return f"accuracy {100 * metrics['accuracy']:.2f} %"

    def line(self, example, prediction) -> dict[str, Any]:
        best = int(prediction.argmax())
        named = dict(zip(self.labels, map(float, prediction), strict=True))
        return {"label": self.labels[best], "probability": float(prediction[best]), "probabilities": named}


def _class_weights(given: str | Mapping[str, float], labels: list[str], targets: Iterator[int]) -> list[float]:
    """A weight for each of ``labels``; ValueError for names that are none of them, and for weights not above 0."""
    if given == "balanced":
        counts = Counter(targets)
        return [counts.total() / (len(labels) * counts[number]) for number in range(len(labels))]
    if isinstance(given, str):
        raise ValueError(f"class weights must be 'balanced' or a weight for each label, got {given!r}")
    weights = {label_value(name): float(weight) for name, weight in given.items()}
    if (known := {label_value(name) for name in labels}) != weights.keys():
        wrong = sorted(map(str, known ^ weights.keys()))
        raise ValueError(f"class weights need one for each of {', '.join(labels)}; {wrong[0]} is too much or lacks")
    if not all(0 < weight < math.inf for weight in weights.values()):
        raise ValueError("class weights must be above 0, and finite")
    return [weights[label_value(name)] for name in labels]


def _f1(true, found, labels: list[str], numbers: list[int]) -> dict[str, Any]:
    sklearn = extras.load("sklearn.metrics")
    each = sklearn.f1_score(true, found, labels=numbers, average=None, zero_division=0.0)
    return {
        "f1_micro": float(sklearn.f1_score(true, found, labels=numbers, average="micro", zero_division=0.0)),
        "f1_macro": float(each.mean()),
        "f1": dict(zip(labels, map(float, each), strict=True)),
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


class Multilabel(SentenceTask):
    """Any number of labels of an example. ``separator`` stands between those of a cell in a table.

    A prediction is the probabilities of ``labels``, float32; those of at least ``threshold`` are said.
    """

    name, metric, options = "multilabel", "f1_micro", ("separator", "threshold")

    def __init__(self, separator: str = ",", threshold: float = 0.5):
        if not 0 < threshold < 1:
            raise ValueError(f"the threshold must be between 0 and 1, got {threshold}")
        self.separator, self.threshold = separator, threshold

    @property
    def reading(self) -> dict[str, Any]:
        return {"separator": self.separator}

    def _settle_labels(self, train: list[Example], validation: list[Example]) -> Iterator[str]:
        spellings: dict[Decimal | str, set[str]] = defaultdict(set)
        for name in (name for example in train for name in labels_of(example)):
            spellings[label_value(name)].add(name.strip())
        if not spellings:
            raise ValueError("no training example has a label")
        self.labels = sorted(min(names, key=lambda name: (len(name), name)) for names in spellings.values())
        if unknown := sorted({n for e in validation for n in labels_of(e) if label_value(n) not in spellings}):
            raise ValueError(f"the validation examples have the label {unknown[0]!r}, which no training example has")
        if joined := [sorted(names) for names in spellings.values() if len(names) > 1]:
            yield f"labels that are one value are one: {' and '.join(map(repr, joined[0]))}"
        if everywhere := [n for n in self.labels if all(self.target(e)[self.labels.index(n)] for e in train)]:
            yield f"every training example has the label {everywhere[0]!r}: nothing is learnt of it"

    def config(self) -> dict[str, Any]:
        return {"problem_type": "multi_label_classification"}

    def target(self, example: Example) -> list[float]:
        numbers, target = numbers_of(tuple(self.labels)), [0.0] * len(self.labels)
        for name in labels_of(example):
            target[numbers[label_value(name)]] = 1.0
        return target

    def weight(self, items: Sequence[Item]) -> float:
        return len(items) * len(self.labels)

    def targets(self, items: Sequence[Item]) -> dict[str, Tensor]:
        return {"labels": torch.tensor([item.target for item in items])}

    def predictions(self, examples: list, items: Sequence[Item], scores: Sequence[np.ndarray]) -> list:
        return list(torch.from_numpy(np.stack(scores)).sigmoid().numpy())

    def metrics(self, examples: list, predictions: list) -> dict[str, Any]:
        """f1_micro, f1_macro, f1: each label's own; accuracy: of examples with all labels right and no other."""
        true, found = np.array([self.target(e) for e in examples]) > 0, np.stack(predictions) >= self.threshold
        numbers = list(range(len(self.labels)))
        if len(numbers) == 1:  # to scikit-learn two classes, of which the second is meant
            true, found, numbers = true[:, 0], found[:, 0], [1]
        each = _f1(true, found, self.labels, numbers)
        return each | {"accuracy": float((true == found).reshape(len(examples), -1).all(axis=1).mean())}

    def told(self, metrics: dict) -> str:
        return f"F1 micro {100 * metrics['f1_micro']:.2f} %, macro {100 * metrics['f1_macro']:.2f} %"

    def line(self, example, prediction) -> dict[str, Any]:
        named = dict(zip(self.labels, map(float, prediction), strict=True))
        return {"labels": [name for name, p in named.items() if p >= self.threshold], "probabilities": named}


def labels_of(example: Example) -> tuple[str, ...]:
    """The labels of an example, one of which may be no list."""
    return (example.label,) if isinstance(example.label, str) else example.label or ()


class Regress(SentenceTask):
    """A number, by the mean squared error. A prediction is a float."""

    name, metric, named = "regress", "pearson", False

    @property
    def reading(self) -> dict[str, Any]:
        return {"numbers": True}

    def _settle_labels(self, train: list[Example], validation: list[Example]) -> Iterator[str]:
        for what, part in (("training", train), ("validation", validation)):
            for number, example in enumerate(part, 1):
                if not math.isfinite(number_of(single_label(example))):
                    raise ValueError(f"{what} example {number}: the label {example.label!r} is no finite number")
        if len({self.target(example) for example in train}) == 1:
            yield f"all training examples have the number {train[0].label}: nothing is learnt"
        if len({self.target(example) for example in validation}) == 1:
            yield f"all validation examples have the number {validation[0].label}: nothing correlates with it"

    def config(self) -> dict[str, Any]:
        return {"problem_type": "regression"}

    def target(self, example: Example) -> float:
        return number_of(single_label(example))

    def targets(self, items: Sequence[Item]) -> dict[str, Tensor]:
        return {"labels": torch.tensor([item.target for item in items])}

    def predictions(self, examples: list, items: Sequence[Item], scores: Sequence[np.ndarray]) -> list:
        return [float(score[0]) for score in scores]

    def metrics(self, examples: list, predictions: list) -> dict[str, Any]:
        """pearson, spearman (see :func:`correlation`), mse."""
        true, found = np.array([self.target(e) for e in examples]), np.array(predictions)
        return {
            "pearson": correlation("pearsonr", true, found),
            "spearman": correlation("spearmanr", true, found),
            "mse": float(((true - found) ** 2).mean()),
        }

    def about(self, train: list, validation: list) -> dict[str, Any]:
        """``mse_of_mean``: that of always saying the mean of ``train``."""
        mean = np.mean([self.target(example) for example in train])
        errors = [(self.target(example) - mean) ** 2 for example in validation]
        return super().about(train, validation) | {"mse_of_mean": float(np.mean(errors))}

    def told(self, metrics: dict) -> str:
        return f"Pearson {metrics['pearson']:.4f}, Spearman {metrics['spearman']:.4f}, MSE {metrics['mse']:.4f}"

    def line(self, example, prediction) -> dict[str, Any]:
        return {"number": prediction}


def correlation(kind: str, true: ArrayLike, found: ArrayLike) -> float:
    """scipy's ``kind``, "pearsonr" or "spearmanr". It is 0 where what is ``found`` is constant: it says nothing, and so
    scikit-learn has Matthews' correlation. It is NaN where the truth is: nothing could be said of it."""
    x, y = np.asarray(true, dtype=np.float64), np.asarray(found, dtype=np.float64)
    if np.ptp(x) == 0:
        return math.nan
    return 0.0 if np.ptp(y) == 0 else float(getattr(extras.load("scipy.stats"), kind)(x, y).statistic)
