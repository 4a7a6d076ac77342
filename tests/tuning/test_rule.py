"""The rule by which a candidate takes a default's place, with a made clock and made times; and what becomes of one that
is wrong, raises, dies or hangs."""

import random
from typing import ClassVar

import pytest
import torch

from bert_fast.supervised import Worker
from bert_fast.tuning import decision, store
from bert_fast.tuning.candidates import Sizes, questions
from bert_fast.tuning.decision import Tried, named
from bert_fast.tuning.rule import MARGIN, Decision, Lost, Question, Times, decide, wins

SIZES = Sizes(64, 128, 1, 300, 32, (32, 20), 7, "float32")


def times(first: float, second: float | None = None) -> Times:
    """A challenger that takes so many times as long as the incumbent, in either order."""
    return Times(([1.0], [first]), ([1.0], [first if second is None else second]), {"a": {"tile": 64}})


def asked(*ratios) -> tuple[Question, dict]:
    """A question with a candidate for each of ``ratios`` (against the default), and what they are."""
    candidates = [{"a": {"tile": number}} for number in range(len(ratios))]
    return Question("a?", "a", candidates), dict(enumerate(ratios))


def compare_by(ratios: dict):
    def ratio(choices) -> float:
        return ratios[choices["a"]["tile"]] if choices else 1.0

    def compare(subject, incumbent, challenger) -> Times:
        if isinstance(found := ratio(challenger), Lost):
            raise found
        return times(found / ratio(incumbent))

    return compare


@pytest.mark.parametrize(
    ("first", "second", "won"),
    [
        (1.0, 1.0, False), (1 - MARGIN, 1 - MARGIN, False), (0.999 - MARGIN, 0.999 - MARGIN, True),
        (0.5, 1 - MARGIN, False), (0.98, 0.5, False), (1.5, 1.5, False),
    ],
)  # fmt: skip
def test_a_challenger_must_win_by_the_margin_in_both_orders(first, second, won):
    assert wins(times(first, second)) == won


def test_the_median_counts_and_no_single_time():
    slow_once = [0.9] * 11 + [100.0] * 9
    assert wins(Times(([1.0] * 20, slow_once), ([1.0] * 20, slow_once)))
    assert not wins(Times(([1.0] * 20, slow_once[::-1]), ([1.0] * 20, [0.1] * 9 + [1.0] * 11)))


@pytest.mark.parametrize(
    ("ratios", "chosen"),
    [
        ([1.0, 1.0], None), ([0.98, 0.99], None), ([0.9, 0.9], 0), ([0.9, 0.88, 0.8], 2), ([0.9, 0.88, 0.86], 2),
        ([0.8, 0.9], 0), ([Lost("wrong", "off"), 0.9], 1), ([], None),
    ],
)  # fmt: skip
def test_the_first_of_equals_stays(ratios, chosen):
    question, table = asked(*ratios)
    found = decide([question], compare_by(table))
    assert found.chosen == ([] if chosen is None else [("a", {"tile": 64}, {"tile": chosen})])
    assert len(found.rows) == len(ratios)


def test_a_question_sees_what_the_one_before_decided_on_its_subject_alone():
    seen = []

    def compare(subject, incumbent, challenger) -> Times:
        seen.append((subject, dict(incumbent), dict(challenger)))
        return Times(([1.0], [0.5]), ([1.0], [0.5]), {name: {} for name in challenger})

    a, b, c = {"a": {"x": 1}}, {"b": {"x": 2}}, {"c": {"x": 3}}
    found = decide([Question("1", "s", [a]), Question("2", "s", [b]), Question("3", "t", [c])], compare)
    assert seen == [("s", {}, a), ("s", a, a | b), ("t", {}, c)]
    assert found.chosen == [("a", {}, {"x": 1}), ("b", {}, {"x": 2}), ("c", {}, {"x": 3})]


def test_what_the_time_does_not_allow_is_left_out_and_said():
    question, table = asked(0.9, 0.5, 0.4)
    now = iter(range(100))
    told = []
    found = decide([question], compare_by(table), seconds=2, clock=lambda: next(now), tell=told.append)
    assert [row["outcome"] for row in found.rows] == ["won", "left out", "left out"]
    assert told == found.rows
    assert found.chosen[0][2] == {"tile": 0}


def test_once_stopped_nothing_more_is_tried():
    question, table = asked(0.9, 0.5, 0.4)
    told = []
    found = decide([question], compare_by(table), tell=told.append, stopped=lambda: len(told) == 2)
    assert [row["outcome"] for row in found.rows] == ["won", "won", "left out"]


def test_a_candidate_that_is_wrong_raises_dies_or_hangs_loses_itself_alone():
    does = [{"does": word} for word in ("wrong", "raise", "die", "hang", "chatter")]
    candidates = [{"made": made} for made in (*does[:4], {"ratio": 0.9}, does[4])]
    with Worker("tests.support.made_trials:answer", start=60) as worker:
        tried = Tried(worker, SIZES, "cpu", limit=3.0)
        found = decide([Question("made", "made", candidates)], tried)
    assert [row["outcome"] for row in found.rows] == ["wrong", "failed", "hung", "hung", "won", "slower"]
    assert found.rows[1]["why"] == "RuntimeError: out of resource"
    assert "status 3" in found.rows[2]["why"]
    assert "no answer in time" in found.rows[3]["why"]
    assert found.chosen == [("made", {"tile": 64}, {"tile": 64, "ratio": 0.9})]


def test_unsound_machine_code_is_not_even_tried():
    """What the processes that compile have found; where they found nothing, the one that tries judges itself."""

    class Never:
        asked: ClassVar[list] = []

        def ask(self, message, limit):
            self.asked.append(message["sound"])
            return {"failed": "no device"}

    a, b, c = ({"a": {"tile": n}} for n in range(3))
    tried = Tried(Never(), SIZES, "cpu", {named("s", a): "machine code: R4", named("s", b): None})
    for incumbent, challenger, how in (
        ({}, a, "wrong"), (b, b | a, "wrong"), ({}, b, "failed"), ({}, c, "failed"), ({}, b | {"b": {}}, "failed"),
    ):  # fmt: skip
        with pytest.raises(Lost) as lost:
            tried("s", incumbent, challenger)
        assert lost.value.how == how
    assert Never.asked == [True, False, False]


@pytest.mark.parametrize("capability", [80, 90, 100, 120])
@pytest.mark.parametrize("attention", ["auto", "own", "library"])
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_a_library_is_asked_of_its_own_accord_only_without_dropout(capability, attention, p):
    sizes = Sizes(64, 128, 1, 300, 32, (32, 20), 7, "bfloat16", dropout=(p, p), attention=attention)
    names = [question.name for question in questions(sizes, capability)]
    tables = {name for q in questions(sizes, capability) for candidate in q.candidates for name in candidate}
    assert ("attention.library" in tables) == (attention == "auto" and p == 0)
    assert ("attention.torch" in tables) == (attention == "library")
    assert ("attention.one_pass" in tables) == (capability == 90 and attention != "library")
    assert ("feed_forward.fwd_epilogue" in tables) == (capability in (90, 100))
    assert names[0].startswith("attention")
    assert len(names) == len(set(names))
    ahead = {c["attention.dq"]["num_stages"] for q in questions(sizes, capability) for c in q.candidates
             if "attention.dq" in c}  # fmt: skip
    assert ahead == (set() if attention == "library" else {1} if capability >= 100 else {1, 2, 3})


def test_sizes_survive_json():
    import json

    sizes = Sizes(64, 128, 1, 300, 32, tuple(random.choices(range(3, 32), k=5)), 7, "bfloat16", dropout=(0.0, 0.1))
    assert Sizes.of(json.loads(json.dumps(sizes.as_dict()))) == sizes


@pytest.mark.parametrize(("outcome", "more", "kept"), [
    ("won", {"seconds": 1.0}, True), ("default wrong", {"seconds": 1.0, "why": "off by 7"}, False),
    ("hung", {"why": "its process ended"}, False), ("left out", {}, False),
])  # fmt: skip
def test_a_decision_that_found_a_default_wrong_or_tried_nothing_is_not_kept(monkeypatch, tmp_path, outcome, more, kept):
    monkeypatch.setenv("BERT_FAST_CACHE", str(tmp_path))
    monkeypatch.setattr(store, "machine", lambda device: {"capability": 90})
    rows = [{"question": "q", "candidate": {}, "outcome": outcome} | more]
    monkeypatch.setattr(decision, "tried", lambda *asked, **how: Decision([], rows))
    found = decision.decide_now(SIZES, torch.device("cpu"))
    assert (store.read(decision.key_of(SIZES, torch.device("cpu"))) is not None) == kept
    assert found.wrong == ("q: off by 7" if outcome == "default wrong" else None)
