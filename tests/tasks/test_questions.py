"""SQuAD's files and records of questions, what is wrong with them by JSON path or line, and answers found again."""

import copy
import json
from collections import Counter

import pytest

from bert_fast.tasks.questions import Answer, read_questions

CONTEXT = "Anna lives in Paris. Paris is big."
SQUAD = {
    "version": "v2.0",
    "data": [
        {
            "title": "Anna",
            "paragraphs": [
                {
                    "context": CONTEXT,
                    "qas": [
                        {
                            "id": "a",
                            "question": "Where does Anna live?",
                            "answers": [
                                {"text": "Paris", "answer_start": 14},
                                {"text": "in Paris", "answer_start": 11},
                            ],
                        },
                        {
                            "id": "b",
                            "question": "Where does Bob live?",
                            "answers": [],
                            "plausible_answers": [{"text": "Paris", "answer_start": 14}],
                            "is_impossible": True,
                        },
                    ],
                }
            ],
        }
    ],
}


def written(folder, value, name="a.json"):
    path = folder / name
    path.write_text(json.dumps(value) if name.endswith("json") else "\n".join(map(json.dumps, value)))
    return path


def test_squad(tmp_path):
    path = written(tmp_path, SQUAD)
    first, second = read_questions(path)
    assert (first.text, first.context, first.name) == ("Where does Anna live?", CONTEXT, "a")
    assert first.answers == (Answer("Paris", 14), Answer("in Paris", 11))
    assert second.answers == ()
    assert second.where == f"{path}, data[0].paragraphs[0].qas[1]"


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "data.json", "a.parquet"])
@pytest.mark.parametrize("lists", [True, False])
def test_records(tmp_path, name, lists):
    answers = [{"text": "Paris", "answer_start": 14}, {"text": "in Paris", "answer_start": 11}]
    if lists:
        answers = {key: [answer[key] for answer in answers] for key in ("text", "answer_start")}
    rows = [{"id": 7, "question": "Where?", "context": CONTEXT, "answers": answers}]
    if name == "a.parquet":
        pyarrow = pytest.importorskip("pyarrow")
        path = tmp_path / name
        pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path = written(tmp_path, {"data": rows} if name == "data.json" else rows, name)
    (found,) = read_questions(path)
    assert found.answers == (Answer("Paris", 14), Answer("in Paris", 11))
    assert found.name == "7"


def test_no_answers_mean_that_there_is_none(tmp_path):
    rows = [{"question": "?", "context": "c", "answers": {"text": [], "answer_start": []}}]
    assert read_questions(written(tmp_path, rows, "a.jsonl"))[0].answers == ()


def test_answers_are_found_again_or_counted(tmp_path):
    answers = [
        {"text": text, "answer_start": begin}
        for text, begin in (("Paris", 15), ("Paris", 20), ("Paris", -1), ("Rome", 3), ("Paris", 21), ("Paris", 999))
    ]
    counts = Counter()
    rows = [{"question": "Where?", "context": CONTEXT, "answers": answers}]
    (found,) = read_questions(written(tmp_path, rows, "a.jsonl"), counts=counts)
    assert [answer.begin for answer in found.answers] == [14, 21, 14, None, 21, 21]
    assert counts == {"answers found beside their answer_start": 4, "answers that are not in their contexts": 1}


QA = ("data", 0, "paragraphs", 0, "qas", 0)


@pytest.mark.parametrize(
    ("at", "value", "message"),
    [
        (("data",), {}, "a.json: data is no JSON array"),
        (("data", 0), 5, r"a.json, data\[0\]: no JSON object"),
        (("data", 0, "paragraphs"), 5, r"data\[0\].paragraphs is no list"),
        (("data", 0, "paragraphs", 0), "x", r"data\[0\].paragraphs\[0\] is no JSON object"),
        (("data", 0, "paragraphs", 0, "qas"), None, r"paragraphs\[0\].qas is no list"),
        (("data", 0, "paragraphs", 0, "context"), 1, r"qas\[0\]: 'context' is no text"),
        (("data", 0, "paragraphs", 0, "context"), " ", r"qas\[0\]: 'context' is empty"),
        ((*QA, "question"), None, r"qas\[0\]: 'question' is no text"),
        ((*QA, "answers"), 5, r"qas\[0\]: 'answers' is neither a list"),
        ((*QA, "answers", 1), {}, r"qas\[0\].answers\[1\]: no object with 'text'"),
        ((*QA, "answers", 0, "answer_start"), "14", r"answers\[0\]: 'answer_start' is no whole number"),
        ((*QA, "answers", 0, "text"), "", r"answers\[0\]: 'text' is empty"),
        ((*QA, "is_impossible"), "no", r"qas\[0\]: 'is_impossible' is neither"),
    ],
)
def test_what_does_not_fit_is_named_by_its_path(tmp_path, at, value, message):
    squad = copy.deepcopy(SQUAD)
    *within, key = at
    part = squad
    for step in within:
        part = part[step]
    part[key] = value
    with pytest.raises(ValueError, match=message):
        read_questions(written(tmp_path, squad))


@pytest.mark.parametrize("key", ["question", "context", "answers"])
def test_what_is_missing_is_named(tmp_path, key):
    rows = [{"question": "?", "context": "c", "answers": []}] * 2
    rows[1] = {name: value for name, value in rows[1].items() if name != key}
    with pytest.raises(ValueError, match=f"line 2: no '{key}', but "):
        read_questions(written(tmp_path, rows, "a.jsonl"))


def test_a_file_that_is_no_json_is_named(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"data": [\n}')
    with pytest.raises(ValueError, match=r"a.json, line 2, column 1: no JSON"):
        read_questions(path)
    path.write_text('{"data": []}')
    with pytest.raises(ValueError, match="holds no question"):
        read_questions(path)
