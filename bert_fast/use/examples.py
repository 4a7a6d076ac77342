"""Labelled sentences and sentence pairs: read from .tsv, .csv and JSON lines, and their labels as classes."""

import csv
import json
import math
import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from decimal import Decimal
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from bert_fast.text import well_formed

NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d{1,3})?", re.ASCII | re.IGNORECASE)
NO_VALUE = {"nan", "na", "n/a", "none", "null"}  # how a table's missing value reads, once it is text


class Example(NamedTuple):
    """A sentence, or a pair of them, with its label as the file has it."""

    text: str
    pair: str | None
    label: str


def read_examples(
    path: str | Path, *, text: str | None = None, pair: str | None = None, label: str | None = None
) -> list[Example]:
    """The examples of a .tsv, .csv or .jsonl file; a pipe may have such a name.

    ``text``, ``pair`` and ``label`` name columns (then the first line is a header) or JSON keys, or number columns
    from 0, -1 being the last (then there is no header). Default: "text" and "label" of JSON lines, else the first
    column and the last; no pair. In .tsv a quotation mark is a character like any other. Lines end with a line feed,
    or with a carriage return in a file that has no line feed; no other character ends one. Raises ValueError naming
    the line that does not fit, one with more or fewer columns than the first among them, FileNotFoundError where there
    is no file.
    """
    path = Path(path)
    kind = path.suffix.lower()
    if kind not in (".tsv", ".csv", ".jsonl", ".ndjson"):
        raise ValueError(f"{path}: its name must end with .tsv, .csv or .jsonl")
    raw = path.read_bytes()
    try:
        content = raw.decode("utf-8-sig")  # spreadsheets write a byte-order mark
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}, line {line} is not UTF-8 text: {error}") from error
    if kind in (".jsonl", ".ndjson"):
        examples = list(_from_json(path, _lines(content), text or "text", pair, label or "label"))
    else:
        rows = _tsv_rows(content) if kind == ".tsv" else _csv_rows(path, content)
        examples = list(_from_table(path, rows, text or "0", pair, label or "-1", quoted=kind == ".csv"))
    if not examples:
        raise ValueError(f"{path} holds no example")
    return examples


def _lines(content: str) -> list[str]:
    """Not ``splitlines``, which ends a line at U+2028, U+0085 and others that stand within texts."""
    end = "\n" if "\n" in content else "\r"
    return content.removesuffix(end).split(end)


def _from_json(path: Path, lines: Iterable[str], text: str, pair: str | None, label: str) -> Iterator[Example]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
            found = Example(values[text], None if pair is None else values[pair], values[label])
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"{path}, line {number}: no JSON object with {text!r} and {label!r}: {error}") from error
        if not all(isinstance(part, str) for part in found[: 1 if pair is None else 2]):
            raise ValueError(f"{path}, line {number}: {text!r} is no text")
        if isinstance(found.label, (list, dict)):
            raise ValueError(f"{path}, line {number}: {label!r} is no label: one text or number is")
        empty = found.label is None or found.label != found.label  # NaN
        yield _labelled(found._replace(label="" if empty else str(found.label)), path, number)


def _tsv_rows(content: str) -> Iterator[tuple[int, list[str]]]:
    """(line, fields) of every line that is not blank; no quoting, as fields are read where tabs separate them."""
    for number, line in enumerate(_lines(content), 1):
        if line := line.removesuffix("\r"):
            yield number, line.split("\t")


def _csv_rows(path: Path, content: str) -> Iterator[tuple[int, list[str]]]:
    """(last line, fields) of every row that is not blank."""
    rows = csv.reader((f"{line}\n" for line in _lines(content)), strict=True)
    before = csv.field_size_limit(max(len(content), csv.field_size_limit()))  # the reader of the process has one limit
    try:
        yield from [(rows.line_num, row) for row in rows if row]
    except csv.Error as error:
        what = str(error).partition(" - ")[0]  # what follows is advice to who opened the file
        raise ValueError(f"{path}, line {rows.line_num}: {what}") from error
    finally:
        csv.field_size_limit(before)


def _from_table(
    path: Path, rows: Iterator[tuple[int, list[str]]], text: str, pair: str | None, label: str, *, quoted: bool
) -> Iterator[Example]:
    names = [name for name in (text, pair, label) if name is not None]
    numbered = all(name.lstrip("-").isdigit() for name in names)
    _, header = (0, None) if numbered else next(rows, (0, []))
    place_of: Callable[[str], int] = int if header is None else header.index
    for name in names:
        if header is not None and header.count(name) != 1:
            what = "more than one column" if name in header else "no column"
            raise ValueError(f"{path}: {what} {name!r} in its header: {', '.join(header)}")
    places = [None if n is None else place_of(n) for n in (text, pair, label)]
    width = None if header is None else len(header)
    for number, row in rows:
        width = width or len(row)
        try:
            found: list[Any] = [None if place is None else row[place] for place in places]
        except IndexError:
            found = []
        if len(row) < max(width, len(names)) or not found:
            raise ValueError(f"{path}, line {number}: only {len(row)} columns")
        if len(row) > width:
            raise ValueError(f"{path}, line {number}: {len(row)} columns, where the first line has {width}")
        texts = {place % width for place in places[:-1] if place is not None}
        if not quoted and (ends := [i for i, field in enumerate(row) if "\r" in field and i not in texts]):
            raise ValueError(
                f"{path}, line {number}: a carriage return in column {ends[0]}: does it end a line? Write line feeds"
            )
        yield _labelled(Example(*found), path, number)


def _labelled(example: Example, path: Path, line: int) -> Example:
    if not example.label.strip():
        raise ValueError(f"{path}, line {line}: the label is empty: leave out what has none")
    return example


@lru_cache
def label_value(label: str) -> Decimal | str:
    """What tells one label from another: its number where it is one, else its text in Unicode's NFC, trimmed.

    So "1", "1.0" and " 1" are one class, and so are "a " and "a", and é as one character or as two.
    """
    label = unicodedata.normalize("NFC", label.strip())
    return Decimal(label) if NUMBER.fullmatch(label) else label


def _spellings(examples: Iterable[Example]) -> dict[Decimal | str, list[str]]:
    """How each value is written, trimmed, the shortest first."""
    found = defaultdict(set)
    for label in sorted({example.label for example in examples}):
        found[label_value(label)].add(label)
    return {value: sorted(labels, key=lambda label: (len(label), label)) for value, labels in found.items()}


def label_names(examples: Iterable[Example]) -> list[str]:
    """The classes that occur, each by its shortest spelling, in order: by number where all are numbers, else by name.

    Labels with one :func:`label_value` are one class. ValueError for one class only, and for numbers of which some
    have a fraction.
    """
    names = {value: labels[0].strip() for value, labels in _spellings(examples).items()}
    if len(names) < 2:
        only = set(names.values()) or "none"
        raise ValueError(f"classification needs two labels at least; the examples have only {only}")
    if fractions := _fractions(names.values()):
        raise ValueError(
            f"the labels are numbers with a fraction, as {fractions[0]}: regression is not what finetune does; give "
            "classes names"
        )
    if all(isinstance(value, Decimal) for value in names):
        return [names[value] for value in sorted(names)]
    return sorted(names.values())


def _fractions(names: Iterable[str]) -> list[str]:
    """Those with a fraction, where all are numbers."""
    try:
        numbers = {name: float(name) for name in names}
    except ValueError:
        return []
    return sorted(name for name, number in numbers.items() if math.isfinite(number) and not number.is_integer())


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
            "here, and which are near each other is not learnt (regression is not what finetune does)"
        )
    if numbers and (lost := [name for name in names if name.strip().lower() in NO_VALUE]):
        yield f"the label {lost[0]!r} among numbers is a class like any other: is it a missing value?"
    by_case = defaultdict(list)
    for name in names:
        by_case[name.strip().lower()].append(name)
    if differing := [group for group in by_case.values() if len(group) > 1]:
        yield f"the labels {' and '.join(map(repr, sorted(differing[0])))} differ in case alone: they are two classes"
    begin = label_value(train[0].label)
    if len(spellings) > 2 and sum(label_value(example.label) == begin for example in train) == 1:
        yield (
            f"the first line alone, {train[0].text[:80]!r}, has the label {train[0].label!r}: are these "
            "the names of columns? Name them (--text, --label)"
        )
    if 2 * len(spellings) > len(train):
        yield f"{len(spellings)} labels for {len(train)} training examples: is the right column the label (--label)?"


def well_formed_examples(examples: Iterable[Example]) -> tuple[list[Example], int]:
    """``examples`` with U+FFFD for every lone surrogate, and how many there were (see :func:`well_formed`)."""
    found, replaced = [], 0
    for example in examples:
        parts: list[tuple[Any, int]] = [(None, 0) if part is None else well_formed(part) for part in example]
        found.append(Example(*(part for part, _ in parts)))
        replaced += sum(number for _, number in parts)
    return found, replaced
