"""Records with names: JSON lines, a JSON array, a Parquet file, or a table whose first line has the names."""

import csv
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from bert_fast import extras
from bert_fast.tasks.tables import csv_rows, decoded, lines, parquet_rows, tsv_rows
from bert_fast.text import well_formed

KINDS = (".jsonl", ".ndjson", ".json", ".parquet", ".csv", ".tsv")


def records(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, record) of every record of a file, ``where`` naming the file and its line, element or row.

    Raises ValueError naming what is no record, FileNotFoundError where there is no file.
    """
    path = Path(path)
    kind = path.suffix.lower()
    if kind in (".jsonl", ".ndjson"):
        found = _json_lines(path)
    elif kind == ".json":
        found = elements(path, json_of(path))
    elif kind == ".parquet":
        found = parquet_rows(str(path))
    elif kind in (".csv", ".tsv"):
        found = _table(path, kind)
    else:
        raise ValueError(f"{path}: its name must end with one of {', '.join(KINDS)}")
    return found


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


def _json_lines(path: Path) -> Iterator[tuple[str, dict]]:
    for number, line in enumerate(lines(decoded(path)), 1):
        if line.strip():
            where = f"{path}, line {number}"
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


def _table(path: Path, kind: str) -> Iterator[tuple[str, dict]]:
    content = decoded(path)
    rows = tsv_rows(lines(content)) if kind == ".tsv" else csv_rows(str(path), lines(content))
    _, header = next(rows, (0, []))
    for number, row in rows:
        where = f"{path}, line {number}"
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
