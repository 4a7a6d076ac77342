"""Answers to pieces and back, the best spans over windows, and scores as SQuAD's own."""

import random
import string
from collections import Counter

import numpy as np
import pytest
import torch
from torchmetrics.functional.text import squad

from bert_fast.data.tokenizer import SPECIAL_TOKENS, berts_tokenizer
from bert_fast.tasks.answers import decode, encode_questions, pieces_of, target
from bert_fast.tasks.questions import Answer, Question
from bert_fast.tasks.squad import best_threshold, exact, judged, measured, normalized, overlapping

WORDS = [f"w{n}" for n in range(40)]
TOKENIZER = berts_tokenizer({t: n for n, t in enumerate([*SPECIAL_TOKENS, *WORDS, "##s", "."])}, lowercase=True)


def question(context, *answers, text="w1 w2"):
    return Question(text, context, tuple(Answer(a, context.find(a)) for a in answers), "q", "file, line 1")


def encode(asked, max_length=32, **more):
    return encode_questions([asked], TOKENIZER, max_length, counts=Counter(), **more)[0]


def test_pieces_and_characters_of_an_answer():
    asked = question("W3s  w4, \u200bw5.w6", "w4", "W3", "\u200bw5", "s", "\u200b", ",")
    offsets = encode(asked).offsets
    spans = [(a.begin, a.begin + len(a.text)) for a in asked.answers]
    assert [pieces_of(*span, offsets) for span in spans] == [(2, 2), (0, 0), (4, 4), (1, 1), None, (3, 3)]
    assert pieces_of(3, 7, offsets) == (2, 2)  # "  w4"


def test_a_mark_of_a_stripped_accent_is_part_of_the_answer():
    context = "w1 w2\u0301 w3s\u0302\u0327 w4."
    for answer in ("w2\u0301", "w1 w2\u0301", "w3s\u0302\u0327", "w3s\u0302\u0327 w4", "w1"):
        found = encode(question(context, answer))
        first, last = pieces_of(context.find(answer), context.find(answer) + len(answer), found.offsets)
        logits = np.zeros((2, len(found.windows[0].ids)), np.float32)
        logits[[0, 1], [found.windows[0].first + place for place in (first, last)]] = 9
        best = decode(found, [tuple(logits)]).candidates[0]
        assert context[best.begin : best.end] == answer


def run_qa_positions(asked, window, offsets):
    """The places of an answer as transformers' run_qa.py finds them."""
    begin, end = asked.answers[0].begin, asked.answers[0].begin + len(asked.answers[0].text)
    here = {window.first + n - window.begin: offsets[n] for n in range(window.begin, window.end)}
    first, last = min(here), max(here)
    if not (here[first][0] <= begin and here[last][1] >= end):
        return 0, 0
    while first in here and here[first][0] <= begin:
        first += 1
    while here.get(last, (0, -1))[1] >= end:
        last -= 1
    return first - 1, last + 1


def test_targets_are_those_of_run_qa():
    outside = 0
    for _ in range(50):
        words = random.choices(["w3", "w4s", "w5", "."], k=60)
        first = random.randrange(60)
        count = random.randint(1, min(5, 60 - first))
        context = " ".join(words)
        begin = len(" ".join(words[:first])) + (first > 0)
        answer = " ".join(words[first : first + count])
        asked = Question("w1", context, (Answer(answer, begin),), "q", "")
        found = encode(asked, 24, overlap=random.randint(0, 9))
        pieces = pieces_of(begin, begin + len(answer), found.offsets)
        targets = [target(window, pieces) for window in found.windows]
        assert targets == [run_qa_positions(asked, window, found.offsets) for window in found.windows]
        outside += targets.count((0, 0))
        whole = [(w, t) for w, t in zip(found.windows, targets, strict=True) if t != (0, 0)]
        for window, (a, b) in whole:
            start, end = (found.offsets[window.begin + place - window.first] for place in (a, b))
            assert context[start[0] : end[1]] == answer
    assert outside


def run_qa_decoding(found, logits, longest, best):
    """(answers by score, score of none) as utils_qa.py's postprocess_qa_predictions finds them, with all as n-best."""
    candidates, none = {}, None
    for window, (start, end) in zip(found.windows, logits, strict=True):
        null = float(start[0] + end[0])
        none = null if none is None or none > null else none
        for a in np.argsort(start)[::-1]:
            for b in np.argsort(end)[::-1]:
                inner = all(window.first <= p < window.first + window.end - window.begin for p in (a, b))
                if not inner or b < a or b - a + 1 > longest:
                    continue
                offsets = [found.offsets[window.begin + p - window.first] for p in (a, b)]
                span, score = (offsets[0][0], offsets[1][1]), float(start[a] + end[b])
                candidates[span] = max(score, candidates.get(span, score))
    return sorted(candidates.items(), key=lambda item: -item[1])[:best], none


def test_answers_are_those_of_run_qas_postprocessing():
    for _ in range(10):
        found = encode(question(" ".join(random.choices(WORDS, k=random.randint(1, 60)))), 24, overlap=6)
        logits = [tuple(torch.randn(2, len(window.ids)).numpy()) for window in found.windows]
        longest = random.choice([1, 4, 30])
        decoded = decode(found, logits, longest=longest)
        theirs, none = run_qa_decoding(found, logits, longest, 20)
        assert decoded.none == pytest.approx(none)
        assert [((c.begin, c.end), pytest.approx(c.score)) for c in decoded.candidates] == theirs
        assert decoded.excess == pytest.approx(none - theirs[0][1])


def test_the_answer_of_the_window_that_is_surest_wins():
    words = WORDS[3:40]
    asked = question(" ".join(words), "w20 w21")
    found = encode(asked, 20, overlap=4)
    pieces = pieces_of(asked.answers[0].begin, asked.answers[0].begin + 7, found.offsets)
    logits = []
    for window in found.windows:
        start, end = np.zeros((2, len(window.ids)), np.float32)
        first, last = target(window, pieces)
        start[first], end[last] = 5, 5
        logits.append((start, end))
    best = decode(found, logits).candidates[0]
    assert asked.context[best.begin : best.end] == "w20 w21"


def test_questions_that_are_too_long_are_cut_and_counted():
    counts = Counter()
    long = " ".join(random.choices(WORDS, k=100))
    short, cut = encode_questions([question("w3"), question("w3", text=long)], TOKENIZER, 200, counts=counts)
    assert counts["cut"] == 1
    assert len(cut.windows[0].ids) == 64 + 1 + 3
    (cut,) = encode_questions([question("w3", text=long)], TOKENIZER, 32, counts=counts)
    assert len(cut.windows[0].ids) == 16 + 1 + 3
    assert len(short.windows[0].ids) == 2 + 1 + 3


def test_any_number_of_questions_is_encoded_in_order():
    questions = [question(f"{WORDS[n % 40]} {WORDS[n // 40]}") for n in range(1030)]
    found = encode_questions(questions, TOKENIZER, 32, counts=Counter())
    assert [TOKENIZER.decode(one.windows[0].ids) for one in found] == [f"w1 w2 {q.context}" for q in questions]


def test_a_context_without_pieces_has_no_answer():
    found = encode(question("\u200b"))
    decoded = decode(found, [(np.ones(5, np.float32),) * 2])
    assert (decoded.candidates, decoded.none, decoded.excess) == ([], 2.0, float("inf"))


@pytest.mark.parametrize(
    ("truth", "predicted", "match", "f1"),
    [
        ("The Cat", "cat!", 1, 1),
        ("the cat sat", "a cat", 0, 2 / 3),
        ("cat cat dog", "cat", 0, 0.5),
        ("x", "y", 0, 0),
        ("", "", 1, 1),
        ("", "x", 0, 0),
        ("a", "", 1, 1),  # nothing is left of "a"
        ("U.S.", "us", 1, 1),
        ("3.5", "35", 1, 1),
    ],
)
def test_scores_of_one_answer(truth, predicted, match, f1):
    assert (exact(truth, predicted), overlapping(truth, predicted)) == (match, pytest.approx(f1))


def test_scores_are_those_of_torchmetrics():
    letters = "ab .,The"
    for _ in range(20):
        questions, predicted = [], []
        while len(questions) < 10:
            answers = [" ".join(random.choices(["the", "cat", "sat,", "An", "x."], k=3)) for _ in range(2)]
            if all(map(normalized, answers)):
                questions.append(Question("?", "", tuple(Answer(a, 0) for a in answers), str(len(questions)), ""))
                predicted.append(" ".join(random.choices(["The", "cat", "sat", "x"], k=2)) + random.choice(letters))
        theirs = squad(
            [{"prediction_text": p, "id": q.name} for p, q in zip(predicted, questions, strict=True)],
            [
                {"answers": {"text": [a.text for a in q.answers], "answer_start": [0, 0]}, "id": q.name}
                for q in questions
            ],
        )
        ours = measured(questions, predicted)
        assert 100 * ours["exact"] == pytest.approx(float(theirs["exact_match"]), rel=1e-5)
        assert 100 * ours["f1"] == pytest.approx(float(theirs["f1"]), rel=1e-5)


def test_the_best_over_right_answers_counts():
    asked = question("w3 w4 w5", "w3 w4", "w5")
    assert judged(asked, "w5") == (1, 1)
    assert judged(asked, "w4 w5") == (0, pytest.approx(2 / 3))
    assert judged(asked, "") == (0, 0)
    assert judged(question("w3"), "") == (1, 1)


def test_measures_with_and_without_an_answer():
    questions = [question("w3", "w3"), question("w3", "w3"), question("w3")]
    found = measured(questions, ["w3", "", "w3"])
    assert found == {
        "exact": 1 / 3, "f1": 1 / 3, "has_answer_exact": 0.5, "has_answer_f1": 0.5, "no_answer_exact": 0,
        "no_answer_f1": 0,
    }  # fmt: skip
    assert measured(questions[:2], ["w3", "x"]) == {"exact": 0.5, "f1": 0.5}


def test_the_threshold_is_the_best_of_all():
    for _ in range(50):
        count = random.randint(1, 12)
        questions = [question("w3 w4", *(["w3"] if random.random() < 0.5 else [])) for _ in range(count)]
        answers = [random.choice(["w3", "w4", "w3 w4"]) for _ in questions]
        excesses = [random.choice([-2.0, -1.0, 0.0, 1.0, 2.0, float("inf")]) for _ in questions]

        def f1(threshold, questions=questions, answers=answers, excesses=excesses):
            said = ["" if e > threshold else a for a, e in zip(answers, excesses, strict=True)]
            return measured(questions, said)["f1"]

        threshold = best_threshold(questions, answers, excesses)
        assert np.isfinite(threshold)
        assert f1(threshold) == pytest.approx(max(f1(t) for t in (-3, -1.5, -0.5, 0.5, 1.5, 2.5)))


def test_punctuation_is_that_of_ascii():
    assert normalized("".join(string.punctuation) + "«x»") == "«x»"
