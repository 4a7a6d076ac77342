"""Sentences of words with a tag each: columns as CoNLL's shared tasks have them, JSON lines and Parquet."""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from bert_fast.tasks.records import class_names, first_key, records, records_of
from bert_fast.tasks.tables import Columns, Source, rows_of, source_of, text_of
from bert_fast.text import well_formed

COLUMNS = (".conll", ".conllu", ".iob", ".bio", ".txt")
WORDS, TAGS = ("tokens", "words"), ("tags", "ner_tags", "labels", "pos_tags")
DOCUMENT = "-DOCSTART-"
RANGE = re.compile(r"\d+[-.]\d+")  # CoNLL-U's lines of several words at once, and of none


class Sentence(NamedTuple):
    """Words and the tag of each; ``where`` names the file and the line at which they begin.

    Of what is only to be predicted ``tags`` is empty, and ``words`` may be a text whose words the tokenizer tells.
    """

    words: tuple[str, ...] | str
    tags: tuple[str, ...]
    where: str


def read_sentences(
    path: str | Path, *, words: str | None = None, tags: str | None = None, counts: Counter | None = None
) -> list[Sentence]:
    """The sentences of a file of columns (.conll, .conllu, .iob, .bio, .txt), of JSON lines, JSON or Parquet.

    ``words`` and ``tags`` number columns from 0, -1 being the last, or name keys. Default: the first column and the
    last, of .conllu FORM and UPOS; the keys "tokens" or "words", and "tags", "ner_tags", "labels" or "pos_tags". A
    blank line and -DOCSTART- end a sentence; tabs separate columns where the first word's line has one, else white
    space. Numbers for tags are named as `datasets` says in a Parquet file. ``counts`` gets what was left out. Raises
    ValueError naming the line that does not fit, FileNotFoundError where there is no file.
    """
    path, counts = Path(path), Counter() if counts is None else counts
    if path.suffix.lower() in COLUMNS:
        found = list(_from_columns(source_of(path), words, tags, counts))
    else:
        found = list(_from_records(path, words, tags, counts))
    if not found:
        raise ValueError(f"{path} holds no sentence with words")
    return found


def _from_columns(
    source: Source, words: str | None, tags: str | None, counts: Counter, *, tagged: bool = True
) -> Iterator[Sentence]:
    universal, separator = source.kind == ".conllu", None
    places = [_number(words, "1" if universal else "0"), *([_number(tags, "3" if universal else "-1")] * tagged)]
    width, begin = 0, 0
    sentence: list[list[str]] = []
    for number, line in enumerate(chain(source.lines or (), [""]), 1):
        line, where = line.removesuffix("\r"), f"{source.name}, line {number}"
        if not width:
            separator = "\t" if "\t" in line else None
        columns = line.split(separator) if line.strip() else []
        if columns and columns[0] != DOCUMENT:
            if line.startswith("#") and (universal or (width and len(columns) != width)) and not sentence:
                counts["lines of comment left out"] += 1
                continue
            width = width or len(columns)
            if len(columns) != width or width < len(places):
                other = f"{len(columns)} columns, the lines before {width}"
                raise ValueError(f"{where}: {'only one column' if len(columns) == width else other}")
            if universal and RANGE.fullmatch(columns[0]):
                counts["lines of no word or of several left out"] += 1
                continue
            if any(not -width <= place < width for place in places):
                raise ValueError(f"{where}: {width} columns, no {words or 0} or no {tags or -1}")
            begin = begin or number
            sentence.append([columns[place] for place in places])
            if tagged and not sentence[-1][1].strip():
                raise ValueError(f"{where}: the word {sentence[-1][0]!r} has no tag")
        elif sentence:
            yield _sentence(sentence, f"{source.name}, line {begin}")
            begin, sentence = 0, []


def unlabelled_sentences(source: Source, words: str | None = None) -> Iterator[Sentence]:
    """The sentences of ``source`` without tags, as they are read: of columns as in :func:`read_sentences`, of lines,
    tables' cells and keys ("tokens", "words" or "text") a text or a list of words. ``words`` names the column."""
    if source.kind in COLUMNS:
        yield from _from_columns(source, words, None, Counter(), tagged=False)
    elif source.kind in (".text", ".tsv", ".csv"):
        for row in rows_of(source, Columns((words or "0",), ())):
            yield Sentence(well_formed(text_of(row, 0, words or "0") or "")[0], (), row.where)
    else:
        for where, record in records_of(source):
            key = first_key(record, (*WORDS, "text") if words is None else [words], where, "words")
            value = record[key]
            given = [value] if isinstance(value, str) else value
            if not isinstance(given, list) or not all(isinstance(word, str) for word in given):
                raise ValueError(f"{where}: {key!r} is neither a text nor a list of words")
            mended = tuple(well_formed(word)[0] for word in given)
            yield Sentence(mended[0] if isinstance(value, str) else mended, (), where)


def _number(given: str | None, default: str) -> int:
    try:
        return int(default if given is None else given)
    except ValueError as error:
        raise ValueError(f"columns of words have numbers from 0, -1 being the last, no names: {given!r}") from error


def _from_records(path: Path, words: str | None, tags: str | None, counts: Counter) -> Iterator[Sentence]:
    names: list[str] | None = None
    for number, (where, record) in enumerate(records(path)):
        word_key = first_key(record, WORDS if words is None else [words], where, "words")
        tag_key = first_key(record, TAGS if tags is None else [tags], where, "tags")
        names = class_names(path, tag_key) if number == 0 else names
        found, given = (_listed(record, key, where) for key in (word_key, tag_key))
        if len(found) != len(given):
            raise ValueError(f"{where}: {len(found)} in {word_key!r}, but {len(given)} in {tag_key!r}")
        for place, word in enumerate(found):
            if not isinstance(word, str):
                raise ValueError(f"{where}: {word_key!r}[{place}] is no text")
        if not found:
            counts["records without words left out"] += 1
            continue
        named = [_named(tag, names, f"{where}: {tag_key!r}[{place}]") for place, tag in enumerate(given)]
        yield _sentence(list(zip(found, named, strict=True)), where)


def _sentence(rows: Sequence[Sequence[str]], where: str) -> Sentence:
    """Of (word, tag), or of (word,) alone."""
    words, *tags = zip(*rows, strict=True)
    named = tuple(tag.strip() for column in tags for tag in column)
    return Sentence(tuple(well_formed(word)[0] for word in words), named, where)


def _listed(record: dict, key: str, where: str) -> Sequence[Any]:
    if not isinstance(record[key], list):
        raise ValueError(f"{where}: {key!r} is no list")
    return record[key]


def _named(tag: Any, names: list[str] | None, where: str) -> str:
    if isinstance(tag, bool) or not isinstance(tag, (str, int)) or not str(tag).strip():
        raise ValueError(f"{where} is no tag: a text or a number is")
    if names is None or isinstance(tag, str):
        return str(tag)
    if not 0 <= tag < len(names):
        raise ValueError(f"{where} is {tag}, of {len(names)} names")
    return names[tag]
