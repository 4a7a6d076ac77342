"""Questions with the texts that answer them, and the answers as spans: SQuAD 1.1 and 2.0, nested or a record each."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from bert_fast.tasks.records import checked_text, elements, json_of, records, records_of
from bert_fast.tasks.tables import Source


class Answer(NamedTuple):
    """A span of the context: ``text`` begins at its character ``begin``, or None where it is nowhere in it."""

    text: str
    begin: int | None


class Question(NamedTuple):
    """A question to ``context``, which has none of its ``answers`` where these are empty; None: not known.

    ``name`` is the file's id, or the place.
    """

    text: str
    context: str
    answers: tuple[Answer, ...] | None
    name: str
    where: str


def read_questions(path: str | Path, *, counts: Counter | None = None) -> list[Question]:
    """The questions of a file: SQuAD's nested .json, JSON lines, a .json of records, or Parquet.

    A record has "question", "context" and "answers", which holds "text" and "answer_start", as lists or in a list of
    objects, as `datasets` have them; perhaps "id" and "is_impossible". No answers mean that the context has none. An
    answer that is not where ``answer_start`` says is looked for, the nearest one taken. ``counts`` gets how many were
    moved and how many are not in their contexts (their ``begin`` is None). Raises ValueError naming line or JSON path
    of what does not fit, FileNotFoundError where there is no file.
    """
    path, counts = Path(path), Counter() if counts is None else counts
    found = [
        _question(where, record, counts)
        for where, record in (_nested(path) if path.suffix.lower() == ".json" else records(path))
    ]
    if not found:
        raise ValueError(f"{path} holds no question")
    return found


def unlabelled_questions(source: Source, question: str | None = None, context: str | None = None) -> Iterator[Question]:
    """The questions of ``source``, of which no answer is known, as they are read: SQuAD's nested .json, or records with
    the keys ``question`` and ``context`` (None: these names) and perhaps "id"."""
    keys = (question or "question", context or "context")
    nested = source.kind == ".json"
    for where, record in _nested(Path(source.name)) if nested else records_of(source):
        if missing := [key for key in keys if key not in record]:
            raise ValueError(f"{where}: no {missing[0]!r}, but {', '.join(map(repr, record))}")
        text, given = (checked_text(record[key], where, key) for key in keys)
        yield Question(text, given, None, str(record.get("id", where)), where)


def _nested(path: Path) -> Iterator[tuple[str, dict]]:
    for where, article in elements(path, json_of(path)):
        if "paragraphs" not in article:
            yield where, article
            continue
        for at, paragraph in _list(article, "paragraphs", where):
            for place, asked in _list(paragraph, "qas", at):
                if "context" not in paragraph:
                    raise ValueError(f"{at}: no 'context'")
                yield place, {**asked, "context": paragraph["context"]}


def _list(value: dict, key: str, where: str) -> Iterator[tuple[str, dict]]:
    if not isinstance(value.get(key), list):
        raise ValueError(f"{where}.{key} is {'no list' if key in value else 'missing'}")
    for number, element in enumerate(value[key]):
        at = f"{where}.{key}[{number}]"
        if not isinstance(element, dict):
            raise ValueError(f"{at} is no JSON object")
        yield at, element


def _question(where: str, record: dict, counts: Counter) -> Question:
    if missing := [name for name in ("question", "context") if name not in record]:
        raise ValueError(f"{where}: no {missing[0]!r}, but {', '.join(map(repr, record))}")
    text, context = (checked_text(record[name], where, name) for name in ("question", "context"))
    impossible = record.get("is_impossible", False)
    if not isinstance(impossible, bool):
        raise ValueError(f"{where}: 'is_impossible' is neither true nor false")
    if "answers" not in record and not impossible:
        raise ValueError(f"{where}: no 'answers', but {', '.join(map(repr, record))}")
    given = [] if impossible else list(_answers(record["answers"], where))
    answers = tuple(_found(answer, begin, context, counts) for answer, begin in given)
    return Question(text, context, answers, str(record.get("id", where)), where)


def _answers(value: Any, where: str) -> Iterator[tuple[str, int]]:
    if isinstance(value, dict) and isinstance(value.get("text"), list) and isinstance(value.get("answer_start"), list):
        if len(value["text"]) != len(value["answer_start"]):
            raise ValueError(
                f"{where}: 'answers' has {len(value['text'])} text and {len(value['answer_start'])} starts"
            )
        value = [{"text": t, "answer_start": s} for t, s in zip(value["text"], value["answer_start"], strict=True)]
    if not isinstance(value, list):
        raise ValueError(f"{where}: 'answers' is neither a list nor has lists of 'text' and 'answer_start'")
    for number, answer in enumerate(value):
        at = f"{where}.answers[{number}]"
        if not isinstance(answer, dict) or not {"text", "answer_start"} <= answer.keys():
            raise ValueError(f"{at}: no object with 'text' and 'answer_start'")
        begin = answer["answer_start"]
        if isinstance(begin, bool) or not isinstance(begin, int):
            raise ValueError(f"{at}: 'answer_start' is no whole number")
        yield checked_text(answer["text"], at, "text"), begin


def _found(text: str, begin: int, context: str, counts: Counter) -> Answer:
    """The answer where it is: at ``begin``, else at the nearest place that has its text."""
    if begin >= 0 and context.startswith(text, begin):
        return Answer(text, begin)
    near = max(begin, 0)
    places = [place for place in (context.rfind(text, 0, near + len(text)), context.find(text, near)) if place >= 0]
    if not places:
        counts["answers that are not in their contexts"] += 1
        return Answer(text, None)
    counts["answers found beside their answer_start"] += 1
    return Answer(text, min(places, key=lambda place: abs(place - begin)))
