"""The lines that commands read, from a file or stdin: a line feed ends one, and no other character does."""

from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from bert_fast.output import Output


def numbered_lines(stream: BinaryIO, name: str, out: Output) -> Iterator[tuple[int, bytes]]:
    """(number from 1, bytes without line end and byte-order mark) of every line.

    Warns of the first one that holds a carriage return: where these were to end lines, all is one.
    """
    told = False
    for number, line in enumerate(stream, 1):
        line = line.removesuffix(b"\n").removesuffix(b"\r")
        if b"\r" in line and not told:
            told = True
            out.warn(f"{name}: line {number} holds carriage returns, which are white space: only line feeds end a line")
        yield number, line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line


def warn_of_columns(name: str, out: Output) -> None:
    """Warns where the ``name`` of what is read a text a line is that of a table or of records."""
    if Path(name).suffix.lower() in (".tsv", ".csv", ".jsonl", ".ndjson", ".json"):
        out.warn(f"{name} is read a text a line, with all of its columns: give a file of the texts alone")


def decoded(line: bytes, where: str) -> str:
    """The text of a line; ValueError for one that is not UTF-8."""
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} is not UTF-8 text: {error.reason} at its byte {error.start}") from error
