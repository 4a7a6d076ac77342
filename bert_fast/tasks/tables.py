"""Rows of labelled data from .tsv, .csv, JSON lines and Parquet, each with the place that an error names."""

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bert_fast import extras

LONGEST_FIELD = 2**31 - 1  # characters of a .csv, the most that csv takes everywhere
KINDS = (".tsv", ".csv", ".jsonl", ".ndjson", ".parquet")
WHOLE = (".parquet", ".json")


class Columns(NamedTuple):
    """Which cells are wanted: ``texts`` (None: that one is not) and ``labels``, by names, or by numbers from 0 as text.

    A named column of a table is found in its header, which is the first line; where all are numbers there is no header,
    and -1 is the last. JSON lines and Parquet have names alone.
    """

    texts: tuple[str | None, ...]
    labels: tuple[str, ...]


class Row(NamedTuple):
    """The cells of :class:`Columns`, strings of a table, any value of JSON lines and Parquet; ``where`` it stands."""

    where: str
    texts: tuple[Any, ...]
    labels: tuple[Any, ...]


class Source(NamedTuple):
    """What rows are read from: a file's ``name``, its ``kind`` (one of KINDS, ".text", of which each line is one, or
    another that a task knows), and its ``lines`` without their ends; None of kinds in WHOLE, read from the path
    ``name``."""

    name: str
    kind: str
    lines: Iterable[str] | None = None


def read_rows(path: str | Path, columns: Columns) -> list[Row]:
    """The rows of a .tsv, .csv, .jsonl or .parquet file; a pipe may have such a name, but for Parquet's.

    In .tsv a quotation mark is a character like any other. Lines end with a line feed, or with a carriage return in a
    file that has no line feed; no other character ends one. Raises ValueError naming the line that does not fit, one
    with more or fewer columns than the first among them, FileNotFoundError where there is no file.
    """
    path = Path(path)
    kind = path.suffix.lower()
    if kind not in KINDS:
        raise ValueError(f"{path}: its name must end with .tsv, .csv, .jsonl or .parquet")
    rows = list(rows_of(source_of(path), columns))
    if not rows:
        raise ValueError(f"{path} holds no example")
    return rows


def source_of(path: Path) -> Source:
    """The whole file at ``path``; ValueError naming the line that is no text."""
    kind = path.suffix.lower()
    return Source(str(path), kind, None if kind in WHOLE else lines(decoded(path)))


def rows_of(source: Source, columns: Columns) -> Iterator[Row]:
    """The rows of ``source`` as they are read, none held; ValueError as by :func:`read_rows`."""
    if source.kind not in (*KINDS, ".text"):
        raise ValueError(f"{source.name}: examples of {source.kind} are not for this task")
    if source.lines is None:
        return _from_parquet(source.name, columns)
    if source.kind == ".text":
        return (Row(f"{source.name}, line {n}", (line,), ()) for n, line in enumerate(source.lines, 1))
    if source.kind in (".jsonl", ".ndjson"):
        return _from_json(source.name, source.lines, columns)
    quoted = source.kind == ".csv"
    fields = csv_rows(source.name, source.lines) if quoted else tsv_rows(source.lines)
    return _from_table(source.name, fields, columns, quoted=quoted)


def text_of(row: Row, number: int, name: str | None) -> str | None:
    """The text ``number`` of ``row``; ValueError where it is none."""
    text = row.texts[number]
    if name is not None and not isinstance(text, str):
        raise ValueError(f"{row.where}: {name!r} is no text")
    return text


def decoded(path: Path) -> str:
    """The text of a file in UTF-8; ValueError naming the line that is none."""
    raw = path.read_bytes()
    try:
        return raw.decode("utf-8-sig")  # spreadsheets write a byte-order mark
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}, line {line} is not UTF-8 text: {error}") from error


def lines(content: str) -> list[str]:
    """Not ``splitlines``, which ends a line at U+2028, U+0085 and others that stand within texts."""
    end = "\n" if "\n" in content else "\r"
    return content.removesuffix(end).split(end)


def _from_json(path: str, lines: Iterable[str], columns: Columns) -> Iterator[Row]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            values = json.loads(line)
            texts = tuple(None if name is None else values[name] for name in columns.texts)
            yield Row(where, texts, tuple(values[name] for name in columns.labels))
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            names = " and ".join(repr(name) for name in (*columns.texts, *columns.labels) if name is not None)
            raise ValueError(f"{where}: no JSON object with {names}: {error}") from error


def _from_parquet(path: str, columns: Columns) -> Iterator[Row]:
    names = [name for name in (*columns.texts, *columns.labels) if name is not None]
    for where, values in parquet_rows(path, names):
        texts = tuple(None if name is None else values[name] for name in columns.texts)
        yield Row(where, texts, tuple(values[name] for name in columns.labels))


def parquet_rows(path: str, names: Sequence[str] | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, values by name) of every row, of the columns ``names`` or of all; ValueError where one is not there."""
    parquet = extras.load("pyarrow.parquet")
    try:
        with parquet.ParquetFile(path) as file:
            if missing := [name for name in names or () if name not in file.schema_arrow.names]:
                has = ", ".join(file.schema_arrow.names)
                raise ValueError(f"{path}: no column {missing[0]!r} among its own: {has}")
            number = 0
            for batch in file.iter_batches(columns=None if names is None else sorted(set(names))):
                for values in batch.to_pylist():
                    number += 1
                    yield f"{path}, row {number}", values
    except extras.load("pyarrow").ArrowException as error:
        raise ValueError(f"{path} is no Parquet file that can be read: {error}") from error


def tsv_rows(lines: Iterable[str]) -> Iterator[tuple[int, list[str]]]:
    """(line, fields) of every line that is not blank; no quoting, as fields are read where tabs separate them."""
    for number, line in enumerate(lines, 1):
        if line := line.removesuffix("\r"):
            yield number, line.split("\t")


def csv_rows(path: str, lines: Iterable[str]) -> Iterator[tuple[int, list[str]]]:
    """(last line, fields) of every row that is not blank."""
    rows = csv.reader((f"{line}\n" for line in lines), strict=True)
    while True:
        before = csv.field_size_limit(LONGEST_FIELD)  # the reader of the process has one limit
        try:
            row = next(rows, None)
        except csv.Error as error:
            what = str(error).partition(" - ")[0]  # what follows is advice to who opened the file
            raise ValueError(f"{path}, line {rows.line_num}: {what}") from error
        finally:
            csv.field_size_limit(before)
        if row is None:
            return
        if row:
            yield rows.line_num, row


def _from_table(path: str, rows: Iterator[tuple[int, list[str]]], columns: Columns, *, quoted: bool) -> Iterator[Row]:
    wanted = (*columns.texts, *columns.labels)
    header = None if _numbered(wanted) else next(rows, (0, []))[1]
    places = _places(path, wanted, header)
    width = None if header is None else len(header)
    texts = len(columns.texts)
    for number, row in rows:
        width = width or len(row)
        where = f"{path}, line {number}"
        try:
            found = tuple(None if place is None else row[place] for place in places)
        except IndexError:
            found = ()
        if len(row) < max(width, len(wanted) - wanted.count(None)) or not found:
            raise ValueError(f"{where}: only {len(row)} columns")
        if len(row) > width:
            raise ValueError(f"{where}: {len(row)} columns, where the first line has {width}")
        free = {place % width for place in places[:texts] if place is not None}
        if not quoted and (ends := [i for i, field in enumerate(row) if "\r" in field and i not in free]):
            raise ValueError(f"{where}: a carriage return in column {ends[0]}: does it end a line? Write line feeds")
        yield Row(where, found[:texts], found[texts:])


def _numbered(wanted: Sequence[str | None]) -> bool:
    return all(name is None or name.lstrip("-").isdigit() for name in wanted)


def _places(path: str, wanted: Sequence[str | None], header: list[str] | None) -> list[int | None]:
    place_of: Callable[[str], int] = int if header is None else header.index
    for name in wanted:
        if name is not None and header is not None and header.count(name) != 1:
            what = "more than one column" if name in header else "no column"
            raise ValueError(f"{path}: {what} {name!r} in its header: {', '.join(header)}")
    return [None if name is None else place_of(name) for name in wanted]
