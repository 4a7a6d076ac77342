"""Labelled sentences and sentence pairs, and their labels as classes."""

import math
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from decimal import Decimal
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from bert_fast.tasks.tables import Columns, Row, read_rows, text_of
from bert_fast.text import well_formed

NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d{1,3})?", re.ASCII | re.IGNORECASE)
NO_VALUE = {"nan", "na", "n/a", "none", "null"}  # how a table's missing value reads, once it is text
TABLES = (".tsv", ".csv")  # whose cells are strings
TRUTH = {"1": True, "1.0": True, "true": True, "yes": True, "0": False, "0.0": False, "false": False, "no": False}


class Example(NamedTuple):
    """A sentence, or a pair of them, with its label as the file has it: a tuple of labels where it has any number, None
    where none is known."""

    text: str
    pair: str | None
    label: str | tuple[str, ...] | None


def read_examples(path: str | Path, **options) -> list[Example]:
    """The examples of a file; see :func:`located_examples`."""
    return [example for _, example in located_examples(path, **options)]


def located_examples(
    path: str | Path, *, text: str | None = None, pair: str | None = None, label: str | Sequence[str] | None = None,
    separator: str | None = None, numbers: bool = False,
) -> list[tuple[str, Example]]:  # fmt: skip
    """(where it stands, the example) of each in a .tsv, .csv, .jsonl or .parquet file; a pipe may have such a name, but
    for Parquet's.

    ``text``, ``pair`` and ``label`` name columns (then the first line is a header) or JSON keys, or number columns
    from 0, -1 being the last (then there is no header). Default: "text" and "label" of JSON lines and Parquet, else the
    first column and the last; no pair. Several names of ``label`` are columns of 0 and 1: the labels of an example are
    the names of those that are 1. A list as label, which JSON lines and Parquet may have, is any number of labels, and
    so is a text with a ``separator``, where that is given; ``numbers``: labels must be finite ones. Raises ValueError
    naming the line that does not fit (see :func:`bert_fast.tasks.tables.read_rows`).
    """
    path = Path(path)
    first, last = ("0", "-1") if path.suffix.lower() in TABLES else ("text", "label")
    labels = (label or last,) if label is None or isinstance(label, str) else tuple(label)
    rows = read_rows(path, Columns((text or first, pair), labels))
    several = len(labels) > 1
    return [
        (
            row.where,
            Example(
                text_of(row, 0, text or first) or "",
                text_of(row, 1, pair),
                _true_labels(row, labels) if several else _label_of(row, labels[0], separator, numbers),
            ),
        )
        for row in rows
    ]


def _label_of(row: Row, name: str, separator: str | None, numbers: bool) -> str | tuple[str, ...]:
    """ValueError where it is no label, an empty one or a missing value."""
    (value,) = row.labels
    if isinstance(value, (list, tuple)) and all(isinstance(part, (str, int)) for part in value):
        return tuple(str(part) for part in value)
    if isinstance(value, (list, dict)):
        raise ValueError(f"{row.where}: {name!r} is no label: a text, a number or a list of them is")
    missing = value is None or value != value  # NaN
    if separator is not None:
        parts = [] if missing else str(value).split(separator)
        return tuple(part.strip() for part in parts if part.strip())
    if missing or not str(value).strip():
        raise ValueError(f"{row.where}: the label is empty: leave out what has none")
    if numbers and not math.isfinite(number_of(str(value))):
        raise ValueError(f"{row.where}: the label {value!r} is no finite number")
    return str(value)


def number_of(label: str) -> float:
    """The number that ``label`` is; NaN where it is none."""
    try:
        return float(label)
    except ValueError:
        return math.nan


def _true_labels(row: Row, names: Sequence[str]) -> tuple[str, ...]:
    found = []
    for name, value in zip(names, row.labels, strict=True):
        if (truth := TRUTH.get(str(value).strip().lower())) is None:
            raise ValueError(f"{row.where}: {name!r} is {value!r}, where several columns are labels 0 or 1 is expected")
        found += [name] if truth else []
    return tuple(found)


@lru_cache
def label_value(label: str) -> Decimal | str:
    """What tells one label from another: its number where it is one, else its text in Unicode's NFC, trimmed.

    So "1", "1.0" and " 1" are one class, and so are "a " and "a", and é as one character or as two.
    """
    label = unicodedata.normalize("NFC", label.strip())
    return Decimal(label) if NUMBER.fullmatch(label) else label


def unnamed(rows: int) -> list[str]:
    """The labels that transformers gives a head's ``rows`` where they have no names."""
    return [f"LABEL_{row}" for row in range(rows)]


def _spellings(examples: Iterable[Example]) -> dict[Decimal | str, list[str]]:
    """How each value is written, trimmed, the shortest first."""
    found = defaultdict(set)
    for label in sorted({single_label(example) for example in examples}):
        found[label_value(label)].add(label)
    return {value: sorted(labels, key=lambda label: (len(label), label)) for value, labels in found.items()}


def single_label(example: Example) -> str:
    """The label of an ``example`` that has one; ValueError for a tuple of them."""
    if isinstance(example.label, str):
        return example.label
    raise ValueError(
        f"the labels {list(example.label or ())} are a list, where one is expected: learn lists with --task multilabel"
    )


def label_names(examples: Iterable[Example]) -> list[str]:
    """The classes that occur, each by its shortest spelling, in order: by number where all are numbers, else by name.

    Labels with one :func:`label_value` are one class. ValueError for one class only, and for numbers of which some
    have a fraction.
    """
    names = {value: labels[0].strip() for value, labels in _spellings(examples).items()}
    if len(names) < 2:
        only = set(names.values()) or "none"
        raise ValueError(f"classification needs two labels at least; the examples have only {only}")
    if measured := fractions(names.values()):
        raise ValueError(
            f"the labels are numbers with a fraction, as {measured[0]}: as classes they would not be near each "
            "other: learn them with --task regress, or give classes names"
        )
    if all(isinstance(value, Decimal) for value in names):
        return [names[value] for value in sorted(names)]
    return sorted(names.values())


def doubtful_labels(train: list[Example], validation: list[Example]) -> Iterator[str]:
    """What a user must know of the labels, in words: what was joined, and what may be meant as another thing."""
    spellings = _spellings([*train, *validation])
    joined = [labels for labels in spellings.values() if len(labels) > 1]
    if joined:
        shown = "; ".join(" and ".join(map(repr, labels)) for labels in joined[:5])
        yield f"labels that are one value are one class: {shown}" + (" ..." if len(joined) > 5 else "")
    names = [labels[0] for labels in spellings.values()]
    numbers = sorted(value for value in spellings if isinstance(value, Decimal))
    if len(numbers) > 2 and any(set(".eE") & set(label) for value in numbers for label in spellings[value]):
        first, last = (spellings[number][0] for number in (numbers[0], numbers[-1]))
        yield (
            f"the labels look like measurements, {first} to {last}: each of the {len(numbers)} is a class by itself "
            "here, and which are near each other is not learnt (--task regress learns it)"
        )
    if numbers and (lost := [name for name in names if name.strip().lower() in NO_VALUE]):
        yield f"the label {lost[0]!r} among numbers is a class like any other: is it a missing value?"
    by_case = defaultdict(list)
    for name in names:
        by_case[name.strip().lower()].append(name)
    if differing := [group for group in by_case.values() if len(group) > 1]:
        yield f"the labels {' and '.join(map(repr, sorted(differing[0])))} differ in case alone: they are two classes"
    begin = label_value(single_label(train[0]))
    if len(spellings) > 2 and sum(label_value(single_label(example)) == begin for example in train) == 1:
        yield (
            f"the first line alone, {train[0].text[:80]!r}, has the label {train[0].label!r}: are these "
            "the names of columns? Name them (--text, --label)"
        )
    if 2 * len(spellings) > len(train):
        yield f"{len(spellings)} labels for {len(train)} training examples: is the right column the label (--label)?"


def well_formed_examples(examples: Iterable[Example]) -> tuple[list[Example], int]:
    """``examples`` with U+FFFD for every lone surrogate, and how many there were (see :func:`well_formed`)."""
    found, replaced = [], 0

    def mended(part: Any) -> Any:
        nonlocal replaced
        if isinstance(part, tuple):
            return tuple(map(mended, part))
        if part is None:
            return None
        text, number = well_formed(part)
        replaced += number
        return text

    for example in examples:
        found.append(Example(*map(mended, example)))
    return found, replaced


def fractions(labels: Iterable[str]) -> list[str]:
    """The labels with a fraction, where all are numbers; else none."""
    try:
        numbers = {label: float(label) for label in labels}
    except ValueError:
        return []
    return sorted(label for label, number in numbers.items() if math.isfinite(number) and not number.is_integer())
