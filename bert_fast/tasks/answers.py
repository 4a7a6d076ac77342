"""Answers in texts: encoded in overlapping windows, decoded to spans of characters, and judged as SQuAD does.

Source: transformers' run_qa.py and utils_qa.py; SQuAD's evaluate-v1.1.py and evaluate-v2.0.py.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import PreTrainedConfig

from bert_fast.model import BertForQuestionAnswering
from bert_fast.tasks.questions import Question, read_questions, unlabelled_questions
from bert_fast.tasks.records import counted_in, names_of, refuse_columns
from bert_fast.tasks.squad import best_threshold, measured
from bert_fast.tasks.tables import Source
from bert_fast.tasks.task import Item, Task
from bert_fast.tasks.windows import OVERLAP, Window, windows, with_marks

LONGEST_QUESTION = 64  # pieces, as in Google's run_squad.py
LONGEST_ANSWER = 30  # pieces
BEST = 20  # candidates for an answer that are kept


class Encoded(NamedTuple):
    """A question's windows over its context, and int32 (pieces, 2): from and to which character each piece of it is."""

    windows: list[Window]
    offsets: np.ndarray


def encode_questions(
    questions: Sequence[Question], tokenizer: Tokenizer, max_length: int, *, overlap: int = OVERLAP, counts: Counter
) -> list[Encoded]:
    """The sequences of each question: its first 64 pieces, at most half of a sequence, and a window of its context.

    ``counts`` gets how many questions were cut ("cut"), and how many contexts take several windows ("windowed").
    """
    longest, found = min(LONGEST_QUESTION, max_length // 2), []
    pairs = [(question.text.lstrip(), question.context) for question in questions]
    some = (tokenizer.encode_batch(pairs[n : n + 1024]) for n in range(0, len(pairs), 1024))
    for question, encoding in zip(questions, chain.from_iterable(some), strict=True):
        texts = encoding.sequence_ids
        counts["cut"] += texts.count(0) > longest
        parts = windows(encoding, max_length, text=1, overlap=overlap, longest_other=longest)
        counts["windowed"] += len(parts) > 1
        offsets = [offset for offset, number in zip(encoding.offsets, texts, strict=True) if number == 1]
        found.append(Encoded(parts, np.array(with_marks(question.context, offsets), np.int32).reshape(-1, 2)))
    return found


def pieces_of(answer_begin: int, answer_end: int, offsets: np.ndarray) -> tuple[int, int] | None:
    """[first, last] pieces of the context that characters ``answer_begin`` to ``answer_end`` (without it) are in.

    None where the tokenizer made no piece of them.
    """
    first = int(np.searchsorted(offsets[:, 0], answer_begin, side="right")) - 1
    last = int(np.searchsorted(offsets[:, 1], answer_end))
    if first >= 0 and offsets[first][1] <= answer_begin:  # it begins with what no piece is made of
        first += 1
    if last == len(offsets) or offsets[last][0] >= answer_end:
        last -= 1
    return (first, last) if 0 <= first <= last else None


def target(window: Window, pieces: tuple[int, int] | None) -> tuple[int, int]:
    """The places of an answer's first and last piece in a window's sequence; 0, where [CLS] is, if it is not whole."""
    if pieces is None or pieces[0] < window.begin or pieces[1] >= window.end:
        return 0, 0
    first, last = pieces
    return window.first + first - window.begin, window.first + last - window.begin


class Candidate(NamedTuple):
    """A span of characters of the context, and its score: the sum of its two logits."""

    begin: int
    end: int
    score: float


class Decoded(NamedTuple):
    """The best candidates for an answer, best first, each span once, and the score of there being none."""

    candidates: list[Candidate]
    none: float

    @property
    def excess(self) -> float:
        """How far having no answer scores above the best one: what a threshold is compared with."""
        return self.none - self.candidates[0].score if self.candidates else float("inf")


def decode(
    encoded: Encoded, logits: Sequence[tuple[np.ndarray, np.ndarray]], *, longest: int = LONGEST_ANSWER
) -> Decoded:
    """The answers that the start and end logits (S,), (S,) of each window's sequence give.

    Of all spans of up to ``longest`` pieces within a window the best are kept. There being none scores what [CLS] does
    in the window where that is least.
    """
    found: dict[tuple[int, int], float] = {}
    none = float("inf")
    for window, (start, end) in zip(encoded.windows, logits, strict=True):
        none = min(none, float(start[0] + end[0]))
        count = window.end - window.begin
        inner = slice(window.first, window.first + count)
        padded = np.concatenate([end[inner], np.full(longest, -np.inf, end.dtype)])
        sums = start[inner, None] + np.lib.stride_tricks.sliding_window_view(padded, longest)[:count]
        kept = min(BEST, sums.size)
        for place in np.argpartition(-sums, kept - 1, axis=None)[:kept] if kept else ():
            first, more = divmod(int(place), longest)
            score = float(sums[first, more])
            if score > -np.inf:
                pieces = window.begin + first, window.begin + first + more
                found[pieces] = max(score, found.get(pieces, -np.inf))
    best = sorted(found, key=lambda pieces: (-found[pieces], pieces))[:BEST]
    places = [(int(encoded.offsets[a, 0]), int(encoded.offsets[b, 1])) for a, b in best]
    return Decoded([Candidate(*span, found[pieces]) for span, pieces in zip(places, best, strict=True)], none)


NOWHERE = 1 << 30  # a place past the end of any sequence, which the loss leaves out


class Answers(Task):
    """The answer to a question in a text, as a span of it.

    overlap         pieces that the windows over a long text share
    longest_answer  pieces of an answer, at most

    A prediction is a :class:`Decoded`. Where some questions have no answer, those are given none whose
    :attr:`Decoded.excess` is above ``threshold``; None has :meth:`metrics` find the one for which F1 is best.
    """

    name, model, head, metric, options = (
        "qa",
        BertForQuestionAnswering,
        "qa_outputs",
        "f1",
        ("overlap", "longest_answer", "threshold"),
    )
    named, rows, max_length = False, 2, 384
    counted: ClassVar[dict[str, str]] = {
        "cut": "questions cut to 64 pieces, or to half of {seq} tokens",
        "windowed": "contexts in several windows of {seq} tokens",
        "unfound": "questions whose answers are no pieces of their contexts: the loss leaves them out",
    }

    def __init__(self, overlap: int = OVERLAP, longest_answer: int = LONGEST_ANSWER, threshold: float | None = None):
        self.overlap, self.longest_answer = overlap, longest_answer
        self.unanswerable, self.threshold = False, threshold
        self.odd: dict[str, Counter] = {}  # of each file that was read

    @classmethod
    def recognises(cls, path: Path) -> bool:
        names = names_of(path)
        return "paragraphs" in names or {"question", "context", "answers"} <= names

    def read(self, path: str | Path, **columns) -> list[Question]:
        refuse_columns(self.name, columns)
        self.odd[str(path)] = Counter()
        return read_questions(path, counts=self.odd[str(path)])

    def unlabelled(self, source: Source, *, text: str | None = None, pair: str | None = None) -> Iterator[Question]:
        """``text`` names the key or column of the question, ``pair`` that of its context."""
        return unlabelled_questions(source, text, pair)

    def settle(self, train: list, validation: list) -> tuple[list, list, list[str]]:
        if not any(answer.begin is not None for question in train for answer in question.answers or ()):
            raise ValueError("no training question has an answer that stands in its context")
        self.unanswerable = any(not question.answers for question in (*train, *validation))
        told = counted_in(self.odd)
        if self.unanswerable and all(question.answers for question in train):
            told.append("every training question has an answer, and some of validation have none: this is not learnt")
        return train, validation, told

    def restore(self, config: PreTrainedConfig) -> None:
        if self.threshold is None:
            self.threshold = getattr(config, "no_answer_threshold", None)
        self.unanswerable = self.threshold is not None
        self.overlap = getattr(config, "window_overlap", self.overlap)
        self.longest_answer = getattr(config, "longest_answer", self.longest_answer)

    def config(self) -> dict[str, Any]:
        # None takes the place of the threshold that a model may have from an earlier fine-tuning
        return {"window_overlap": self.overlap, "longest_answer": self.longest_answer, "no_answer_threshold": None}

    def learnt(self, metrics: dict) -> dict[str, Any]:
        return {"no_answer_threshold": metrics["no_answer_threshold"]} if self.unanswerable else {}

    def encode(self, examples: list, tokenizer: Tokenizer, max_length: int, counts: Counter) -> list[Item]:
        items = []
        made = encode_questions(examples, tokenizer, max_length, overlap=self.overlap, counts=counts)
        for number, (question, one) in enumerate(zip(examples, made, strict=True)):
            known = question.answers or ()
            spans = [(a.begin, a.begin + len(a.text)) for a in known if a.begin is not None]
            pieces = next(filter(None, (pieces_of(*span, one.offsets) for span in spans)), None)
            counts["unfound"] += bool(known) and pieces is None
            for window, sequence in enumerate(one.windows):
                place = (NOWHERE, NOWHERE) if known and pieces is None else target(sequence, pieces)
                items.append(
                    Item([(sequence.ids, sequence.segments)], number, None if question.answers is None else place,
                         (one, window))
                )  # fmt: skip
        return items

    def weight(self, items: Sequence[Item]) -> float:
        return sum(item.target[0] != NOWHERE for item in items)

    def targets(self, items: Sequence[Item]) -> dict[str, Tensor]:
        starts, ends = zip(*(item.target for item in items), strict=True)
        return {"start_positions": torch.tensor(starts), "end_positions": torch.tensor(ends)}

    def forward(self, network, batch: dict, count: Tensor, **more) -> tuple[Tensor, Any]:
        output = network(**batch, **more)
        if output.loss is None:
            return torch.zeros_like(count), output
        return output.loss * (batch["start_positions"] != NOWHERE).sum() / count.clamp(min=1), output

    def scores(self, output, items: Sequence[Item]) -> list[np.ndarray]:
        """(2, S): the logits of starts and ends in each sequence."""
        logits = torch.stack([output.start_logits[0], output.end_logits[0]]).float().cpu()
        return [part.numpy() for part in logits.split([item.length for item in items], dim=1)]

    def predictions(self, examples: list, items: Sequence[Item], scores: Sequence[np.ndarray]) -> list[Decoded]:
        found: list[Decoded] = [Decoded([], 0.0)] * len(examples)
        logits: dict[int, list] = {}
        for item, pair in zip(items, scores, strict=True):
            one, window = item.notes
            logits.setdefault(item.example, []).append(pair)
            if window + 1 == len(one.windows):
                found[item.example] = decode(one, logits.pop(item.example), longest=self.longest_answer)
        return found

    def answer(self, question: Question, decoded: Decoded, threshold: float | None = None) -> str:
        """The text that is said, "" for none; without a ``threshold`` there is one, if the context has any piece."""
        if not decoded.candidates or (threshold is not None and decoded.excess > threshold):
            return ""
        best = decoded.candidates[0]
        return question.context[best.begin : best.end]

    def metrics(self, examples: list, predictions: list) -> dict[str, Any]:
        """exact and f1 as SQuAD's own; of those with and without an answer where both occur, with the threshold."""
        pairs = list(zip(examples, predictions, strict=True))
        answers = [self.answer(*pair) for pair in pairs]
        if not self.unanswerable:
            return measured(examples, answers)
        threshold = self.threshold
        if threshold is None:
            threshold = best_threshold(examples, answers, [decoded.excess for decoded in predictions])
        found = measured(examples, [self.answer(*pair, threshold) for pair in pairs])
        return found | {"no_answer_threshold": threshold}

    def told(self, metrics: dict) -> str:
        return f"F1 {100 * metrics['f1']:.2f} %, exact match {100 * metrics['exact']:.2f} %"

    def line(self, example, prediction) -> dict[str, Any]:
        threshold = self.threshold if self.unanswerable else None
        text = self.answer(example, prediction, threshold)
        logits = [candidate.score for candidate in prediction.candidates]
        logits += [prediction.none] if self.unanswerable else []
        sure = torch.tensor(logits, dtype=torch.float64).softmax(dim=0).tolist()
        found: dict[str, Any] = {"id": example.name, "answer": text, "begin": None, "end": None, "probability": None}
        if text:
            best = prediction.candidates[0]
            found |= {"begin": best.begin, "end": best.end, "probability": sure[0]}
        elif self.unanswerable:
            found["probability"] = sure[-1]
        return found
