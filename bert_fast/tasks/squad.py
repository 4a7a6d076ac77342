"""Answers compared as SQuAD does, and the threshold from which on a question has none.

Source: SQuAD's evaluate-v1.1.py and evaluate-v2.0.py.
"""

import math
import re
import string
from collections import Counter
from collections.abc import Sequence

import numpy as np

from bert_fast.tasks.questions import Question

ARTICLES = re.compile(r"\b(a|an|the)\b", re.UNICODE)
PUNCTUATION = set(string.punctuation)


def normalized(answer: str) -> str:
    """``answer`` as SQuAD compares it: lower case, without punctuation and articles, one space between words."""
    answer = "".join(character for character in answer.lower() if character not in PUNCTUATION)
    return " ".join(ARTICLES.sub(" ", answer).split())


def exact(truth: str, predicted: str) -> float:
    """1.0 where two answers are one as SQuAD compares them, else 0.0."""
    return float(normalized(truth) == normalized(predicted))


def overlapping(truth: str, predicted: str) -> float:
    """F1 of the words that two answers share; of having none ("") it is 1.0 where both have none, else 0.0."""
    real, found = normalized(truth).split(), normalized(predicted).split()
    if not real or not found:
        return float(real == found)
    shared = sum((Counter(real) & Counter(found)).values())
    return 2 * shared / (len(real) + len(found))


def judged(question: Question, predicted: str) -> tuple[float, float]:
    """(exact match, F1) of an answer, "" being none: the best over the right ones."""
    truths = [answer.text for answer in question.answers or () if normalized(answer.text)] or [""]
    return max(exact(t, predicted) for t in truths), max(overlapping(t, predicted) for t in truths)


def best_threshold(questions: Sequence[Question], answers: Sequence[str], excesses: Sequence[float]) -> float:
    """The threshold for which F1 is best where an answer is none if its excess is above it.

    ``answers`` are those without the threshold. Source: ``find_best_thresh`` of evaluate-v2.0.py.
    """
    gains = [judged(q, answer)[1] - judged(q, "")[1] for q, answer in zip(questions, answers, strict=True)]
    ordered = sorted((excess, gain) for excess, gain in zip(excesses, gains, strict=True) if math.isfinite(excess))
    if not ordered:
        return 0.0
    levels, sums = [e for e, _ in ordered], np.cumsum([gain for _, gain in ordered])
    last = [n for n in range(len(levels)) if n + 1 == len(levels) or levels[n + 1] > levels[n]]
    best = max(last, key=lambda n: (sums[n], -n))
    if sums[best] <= 0:  # no answer is the best one everywhere
        return levels[0] - 1
    return levels[best] if best == last[-1] else (levels[best] + levels[best + 1]) / 2


def measured(questions: Sequence[Question], predicted: Sequence[str]) -> dict:
    """Exact match and F1 over all questions, from 0 to 1, and of those with and without an answer where both occur."""
    found = [judged(question, answer) for question, answer in zip(questions, predicted, strict=True)]
    has = [bool(question.answers) for question in questions]
    measures = _means(found)
    if any(has) and not all(has):
        for name, which in (("has_answer", True), ("no_answer", False)):
            measures |= {
                f"{name}_{key}": value
                for key, value in _means([f for f, h in zip(found, has, strict=True) if h is which]).items()
            }
    return measures


def _means(found: Sequence[tuple[float, float]]) -> dict:
    return {"exact": sum(e for e, _ in found) / len(found), "f1": sum(f for _, f in found) / len(found)}
