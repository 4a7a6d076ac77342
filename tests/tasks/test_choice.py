"""Files of choices: SWAG, HellaSwag, RACE, ARC, COPA's kind, and what is wrong with them."""

import json

import pytest
import torch

from bert_fast.tasks.choice import Choose, grouped, read_choices
from bert_fast.tasks.task import Item

SWAG = """,video-id,fold-ind,startphrase,sent1,sent2,gold-source,ending0,ending1,ending2,ending3,label
0,lsmdc,3,"A, she","Anna, who sings.",She,gold,"sits, now.",runs.,"eats ""it"".",sleeps.,2
"""


def lines(tmp_path, *rows):
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_swag(tmp_path):
    path = tmp_path / "swag.csv"
    path.write_text(SWAG)
    (found,) = read_choices(path)
    assert found.context == "Anna, who sings."
    assert found.choices == ("She sits, now.", "She runs.", 'She eats "it".', "She sleeps.")
    assert (found.label, found.where) == (2, f"{path}, line 2")


@pytest.mark.parametrize(
    ("record", "context", "choices", "label"),
    [
        ({"ctx": "A man", "endings": ["x", "y"], "label": "1"}, "A man", ["x", "y"], 1),
        ({"article": "T", "question": "Q?", "options": ["x", "y"], "answer": "B"}, "T", ["Q? x", "Q? y"], 1),
        ({"question": "Q", "choices": {"text": ["x", "y"], "label": ["A", "B"]}, "answerKey": "B"}, "Q", ["x", "y"], 1),
        ({"question": "Q", "choices": {"text": ["x", "y"], "label": ["1", "2"]}, "answerKey": "1"}, "Q", ["x", "y"], 0),
        (
            {"question": {"stem": "Q?", "choices": [{"text": "x", "label": "A"}, {"text": "y", "label": "B"}]},
             "answerKey": "B"},
            "Q?", ["x", "y"], 1,
        ),
        ({"context": "C", "question": "Q", "choices": ["x", "y"], "label": 0}, "C", ["Q x", "Q y"], 0),
    ],
)  # fmt: skip
def test_records(tmp_path, record, context, choices, label):
    (found,) = read_choices(lines(tmp_path, record))
    assert (found.context, list(found.choices), found.label) == (context, choices, label)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label": 2}, "line 2: 'label' is 2, none of the 2 choices"),
        ({"label": -1}, "'label' is -1, none"),
        ({"label": True}, "'label' is True, none"),
        ({"label": None}, "'label' is None, none"),
        ({"label": "C"}, "'label' is 'C', none"),
        ({"choices": ["x"]}, "1 choices: there must be two"),
        ({"choices": "xy"}, "'choices' is no list"),
        ({"choices": ["x", 5]}, r"'choices\[1\]' is no text"),
        ({"choices": {"text": ["x"], "label": []}}, "1 texts and 0 labels"),
        ({"context": 5}, "'context' is no text"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, change, message):
    record = {"context": "C", "choices": ["x", "y"], "label": 0}
    with pytest.raises(ValueError, match=message):
        read_choices(lines(tmp_path, record, record | change))


@pytest.mark.parametrize(("key", "message"), [("context", "neither a context"), ("choices", "no choices"),
                                              ("label", "no label")])  # fmt: skip
def test_what_is_missing_is_named(tmp_path, key, message):
    record = {"context": "C", "choices": ["x", "y"], "label": 0}
    del record[key]
    with pytest.raises(ValueError, match=f"line 1: {message}.*, but "):
        read_choices(lines(tmp_path, record))


def test_a_row_that_is_too_short_is_named(tmp_path):
    path = tmp_path / "swag.csv"
    path.write_text(f"{SWAG}1,x\n")
    with pytest.raises(ValueError, match="line 3: 2 columns, where the first line has 12"):
        read_choices(path)


def test_scores_are_grouped_by_example():
    items = [Item([([], [])] * count, n, 0) for n, count in enumerate((2, 4, 3))]
    scores = torch.randn(9)
    rows = grouped(scores, Choose().targets(items)["rows"])
    assert rows.shape == (3, 4)
    assert torch.equal(rows[torch.isfinite(rows)], scores)
    assert torch.equal(torch.isfinite(rows).sum(dim=1), torch.tensor([2, 4, 3]))
