"""Records with names: JSON lines, a JSON array, a Parquet file, or a table whose first line has the names."""

import csv
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from bert_fast import extras
from bert_fast.tasks.tables import Source, csv_rows, decoded, parquet_rows, source_of, tsv_rows
from bert_fast.text import well_formed

KINDS = (".jsonl", ".ndjson", ".json", ".parquet", ".csv", ".tsv")


def records(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, record) of every record of a file, ``where`` naming the file and its line, element or row.

    Raises ValueError naming what is no record, FileNotFoundError where there is no file.
    """
    path = Path(path)
    if path.suffix.lower() not in KINDS:
        raise ValueError(f"{path}: its name must end with one of {', '.join(KINDS)}")
    return records_of(source_of(path))


def records_of(source: Source) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, record) of every record of ``source`` as they are read; none but of JSON and Parquet are held."""
    if source.kind == ".parquet":
        return parquet_rows(source.name)
    if source.kind == ".json":
        return elements(Path(source.name), json_of(Path(source.name)))
    if source.kind not in KINDS:
        raise ValueError(f"{source.name}: this task reads records with names: JSON lines, or a table with a header")
    assert source.lines is not None  # of kinds that are not read whole
    if source.kind in (".csv", ".tsv"):
        return _table(source.name, source.kind, source.lines)
    return _json_lines(source.name, source.lines)


def json_of(path: Path) -> Any:
    """The value of a JSON file; ValueError naming line and column where it is none."""
    try:
        return json.loads(decoded(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}, column {error.colno}: no JSON: {error.msg}") from error
    except RecursionError as error:
        raise ValueError(f"{path}: no JSON that can be read: {error}") from error


def elements(path: Path, value: Any, at: str = "") -> Iterator[tuple[str, dict]]:
    """The objects of a JSON array, or of an object's ``data``, with their places."""
    if isinstance(value, dict) and "data" in value:
        value, at = value["data"], f"{at}data"
    if not isinstance(value, list):
        raise ValueError(f"{path}: {at or 'the file'} is no JSON array of records")
    for number, element in enumerate(value):
        yield _record(f"{path}, {at}[{number}]", element)


def _json_lines(name: str, lines: Iterable[str]) -> Iterator[tuple[str, dict]]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            where = f"{name}, line {number}"
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{where}: no JSON: {error}") from error
            yield _record(where, value)


def _record(where: str, value: Any) -> tuple[str, dict]:
    if not isinstance(value, dict):
        raise ValueError(f"{where}: no JSON object")
    return where, value


def class_names(path: str | Path, column: str) -> list[str] | None:
    """The names that `datasets` left in a Parquet file for the numbers in ``column``; None where it left none."""
    if Path(path).suffix.lower() != ".parquet":
        return None
    metadata = extras.load("pyarrow.parquet").read_schema(path).metadata or {}
    described = json.loads(metadata.get(b"huggingface", b"{}")).get("info", {}).get("features", {}).get(column)
    while isinstance(described, (dict, list)):  # a list of classes is one feature within another
        if isinstance(described, dict) and "names" in described:
            return described["names"]
        described = described[0] if isinstance(described, list) else described.get("feature")
    return None


def _table(name: str, kind: str, lines: Iterable[str]) -> Iterator[tuple[str, dict]]:
    rows = tsv_rows(lines) if kind == ".tsv" else csv_rows(name, lines)
    _, header = next(rows, (0, []))
    for number, row in rows:
        where = f"{name}, line {number}"
        if len(row) != len(header):
            raise ValueError(f"{where}: {len(row)} columns, where the first line has {len(header)}")
        yield where, dict(zip(header, row, strict=True))


def first_key(record: dict, names: Iterable[str], where: str, what: str) -> str:
    """The first of ``names`` that ``record`` has; ValueError where it has none."""
    names = list(names)
    for name in names:
        if name in record:
            return name
    raise ValueError(f"{where}: no {what} ({' or '.join(map(repr, names))}), but {', '.join(map(repr, record))}")


def checked_text(value: Any, where: str, name: str) -> str:
    """``value`` as well-formed text that is not blank; ValueError where it is none."""
    if not isinstance(value, str):
        raise ValueError(f"{where}: {name!r} is no text")
    if not value.strip():
        raise ValueError(f"{where}: {name!r} is empty")
    return well_formed(value)[0]


def names_of(path: Path) -> set[str]:
    """The names in the first record of a file; none where it is a pipe, which is read once, or has no records."""
    kind = path.suffix.lower()
    if kind not in KINDS or not path.is_file():
        return set()
    if kind == ".parquet":
        return set(extras.load("pyarrow.parquet").read_schema(path).names)
    if kind == ".json":
        _, first = next(elements(path, json_of(path)), ("", {}))
        return set(first)
    with path.open(encoding="utf-8-sig", errors="replace", newline="\n") as stream:
        line = next((line for line in stream if line.strip()), "").strip("\r\n")
    if kind in (".csv", ".tsv"):
        return set(line.split("\t")) if kind == ".tsv" else set(next(csv.reader([line]), []))
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return set()
    return set(value) if isinstance(value, dict) else set()


def counted_in(files: dict[str, Counter]) -> list[str]:
    """What was counted in each of ``files``, in words."""
    return [f"{path}: {number:,} {what}" for path, counts in files.items() for what, number in counts.items()]


def refuse_columns(task: str, columns: dict) -> None:
    """ValueError for names of columns that ``task`` has no use for."""
    if given := sorted(name for name, value in columns.items() if value is not None):
        raise ValueError(f"--{given[0]} is not for the task {task}")
