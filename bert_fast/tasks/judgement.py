"""What a fine-tuned model gets wrong: confusions, each label's precision and recall, the worst errors, a picture.

Precision, recall, F1 and the matrices are scikit-learn's.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import singledispatch
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bert_fast import extras
from bert_fast.pictures import written_picture
from bert_fast.tasks.answers import Answers
from bert_fast.tasks.choice import Choose
from bert_fast.tasks.entities import kind_of
from bert_fast.tasks.sentences import Classify, Multilabel, Regress
from bert_fast.tasks.squad import judged
from bert_fast.tasks.task import Task
from bert_fast.tasks.tokens import OUTSIDE, Tokens

# Labels up to which a matrix is printed and drawn whole; of more the commonest confusions are.
WHOLE = 12


class Verdict(NamedTuple):
    """One example judged. ``badness`` says which errors are worst: the loss, or how far a score is off."""

    where: str
    text: str
    truth: Any
    said: Any
    wrong: bool
    badness: float


@dataclass
class Judgement:
    """A model on labelled examples.

    ``matrix`` (labels, labels) int64 counts a ``unit`` by truth (rows) and by what is said (columns). ``by_label`` has
    precision, recall, f1 and support of each label. ``scores`` are truth and said, float64 (n,), of a regression.
    ``note`` is what must be known of the metrics.
    """

    examples: int
    metrics: dict[str, Any]
    labels: list[str] = field(default_factory=list)
    matrix: np.ndarray | None = None
    by_label: dict[str, dict[str, float]] = field(default_factory=dict)
    scores: tuple[np.ndarray, np.ndarray] | None = None
    worst: list[Verdict] = field(default_factory=list)
    wrong: int = 0
    unit: str = "examples"
    note: str = ""

    def facts(self) -> dict:
        """All of it for JSON."""
        found: dict[str, Any] = {"examples": self.examples, **self.metrics, "wrong": self.wrong}
        if self.note:
            found["note"] = self.note
        if self.by_label:
            found["by_label"] = self.by_label
        if self.matrix is not None:
            found |= {"labels": self.labels, "confusion": self.matrix.tolist()}
        return found | {"worst": [verdict._asdict() for verdict in self.worst]}

    def text(self) -> str:
        """All of it to read."""
        shown = {name: _shown(value) for name, value in self.metrics.items() if not isinstance(value, dict)}
        width = max(map(len, shown), default=0)
        lines = [f"{name:<{width}}  {value}" for name, value in shown.items()]
        lines += [f"over {self.examples:,} examples", *([self.note] if self.note else [])]
        if self.matrix is not None:
            lines += ["", *_matrix_lines(self.matrix, self.labels, self.unit)]
        if self.by_label:
            lines += ["", *_label_lines(self.by_label)]
        if self.worst:
            worst = f"worst of {self.wrong:,} errors, the number says how bad:"
            lines += ["", worst if self.scores is None else "largest errors:"]
            for verdict in self.worst:
                lines.append(f"  {verdict.where}: {_brief(verdict.truth)} taken for {_brief(verdict.said)} "
                             f"({verdict.badness:.2f}): {_brief(verdict.text)}")  # fmt: skip
        return "\n".join(lines)


def _shown(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def _brief(text: Any) -> str:
    text = " ".join((f"{text:.4g}" if isinstance(text, float) else str(text)).split())
    return text if len(text) <= 80 else f"{text[:77]}..."


@singledispatch
def judge(task: Task, examples: Sequence, predictions: Sequence, places: Sequence[str], count: int = 10) -> Judgement:
    """What ``predictions`` of labelled ``examples`` are worth, with the ``count`` worst errors and their ``places``.

    Of a task that is not told apart here an example is wrong where its own metric is below 1, by how much.
    """
    verdicts = []
    for example, prediction, place in zip(examples, predictions, places, strict=True):
        badness = 1 - task.metrics([example], [prediction])[task.metric]
        said = task.line(example, prediction)
        verdicts.append(Verdict(place, _text_of(example), _truth_of(example), said, badness > 0, badness))
    return _judgement(task, examples, predictions, verdicts, count)


def _judgement(task: Task, examples, predictions, verdicts: list[Verdict], count: int, **more) -> Judgement:
    return Judgement(
        len(examples), task.metrics(list(examples), list(predictions)), worst=worst_of(verdicts, count),
        wrong=sum(verdict.wrong for verdict in verdicts), **more,
    )  # fmt: skip


def _text_of(example: Any) -> str:
    """What of an example a reader knows it by."""
    parts = [getattr(example, name, None) for name in ("text", "pair")]
    return " | ".join(part for part in parts if isinstance(part, str)) or str(example)


def _truth_of(example: Any) -> Any:
    return next((getattr(example, n) for n in ("label", "answers", "tags") if hasattr(example, n)), None)


@judge.register
def _(task: Classify, examples, predictions, places, count: int = 10) -> Judgement:
    truth = [task.target(example) for example in examples]
    said = np.stack(predictions).argmax(axis=1)
    verdicts = [
        Verdict(place, _text_of(e), task.labels[t], task.labels[s], t != s, -math.log(max(float(p[t]), 1e-45)))
        for place, e, t, s, p in zip(places, examples, truth, said.tolist(), predictions, strict=True)
    ]
    names = [task.labels[number] for number in truth], [task.labels[number] for number in said]
    return _judgement(
        task, examples, predictions, verdicts, count, labels=task.labels, matrix=confusion(*names, task.labels),
        by_label=by_label(*names, task.labels),
    )  # fmt: skip


@judge.register
def _(task: Multilabel, examples, predictions, places, count: int = 10) -> Judgement:
    """The loss of an example is the binary cross-entropy, summed over labels."""
    truth = np.array([task.target(example) for example in examples])
    probabilities = np.stack(predictions).astype(np.float64).clip(1e-12, 1 - 1e-12)
    said = probabilities >= task.threshold
    losses = -np.where(truth > 0, np.log(probabilities), np.log1p(-probabilities)).sum(axis=1)
    named = [[[task.labels[n] for n in np.flatnonzero(row)] for row in rows] for rows in (truth, said)]
    verdicts = [
        Verdict(place, _text_of(e), t, s, t != s, loss)
        for place, e, t, s, loss in zip(places, examples, *named, losses.tolist(), strict=True)
    ]
    found = by_label(truth > 0, said, task.labels)
    return _judgement(task, examples, predictions, verdicts, count, by_label=found)


@judge.register
def _(task: Tokens, examples, predictions, places, count: int = 10) -> Judgement:
    """The matrix counts words by the kind of their tags; the worst sentences are those surest of their wrong tags."""
    scheme, verdicts = task.scheme, []
    for place, sentence, tagged in zip(places, examples, predictions, strict=True):
        rows = list(zip(sentence.words, sentence.tags, tagged.tags, tagged.probabilities, strict=True))
        wrong = [row for row in rows if row[1] != row[2]]
        real, found = (" ".join(f"{row[0]}/{row[column]}" for row in wrong) for column in (1, 2))
        verdicts.append(Verdict(place, tagged.text, real, found, bool(wrong), sum(row[3] for row in wrong)))
    words = [pair for e, p in zip(examples, predictions, strict=True) for pair in zip(e.tags, p.tags, strict=True)]
    truth, said = ([kind_of(pair[n] or OUTSIDE, scheme) for pair in words] for n in (0, 1))
    labels = sorted({*truth, *said}, key=lambda name: (name != OUTSIDE, name))
    judgement = _judgement(
        task, examples, predictions, verdicts, count, labels=labels, matrix=confusion(truth, said, labels), unit="words"
    )
    kinds = judgement.metrics.get("kinds")
    judgement.by_label = by_label(truth, said, labels) if kinds is None else {
        kind: {"precision": row["entity_precision"], "recall": row["entity_recall"], "f1": row["f1"],
               "support": row["entities"]} for kind, row in kinds.items()
    }  # fmt: skip
    return judgement


@judge.register
def _(task: Answers, examples, predictions, places, count: int = 10) -> Judgement:
    """The worst are those that are surest of an answer which shares least with a right one."""
    task.unanswerable = task.unanswerable or not all(question.answers for question in examples)
    chosen = task.unanswerable and task.threshold is None
    note = "the threshold for no answer is the best on these examples, as the model has none: --threshold gives one"
    task.threshold = task.metrics(list(examples), list(predictions)).get("no_answer_threshold", task.threshold)
    verdicts = []
    for place, question, prediction in zip(places, examples, predictions, strict=True):
        line = task.line(question, prediction)
        _, shared = judged(question, line["answer"])
        truth = " / ".join(dict.fromkeys(answer.text for answer in question.answers)) or "no answer"
        sure = 1.0 if line["probability"] is None else line["probability"]
        verdicts.append(
            Verdict(place, question.text, truth, line["answer"] or "no answer", shared < 1, (1 - shared) * sure)
        )
    return _judgement(task, examples, predictions, verdicts, count, note=note if chosen else "")


@judge.register
def _(task: Choose, examples, predictions, places, count: int = 10) -> Judgement:
    verdicts = []
    for place, e, p in zip(places, examples, predictions, strict=True):
        said, loss = int(p.argmax()), -math.log(max(float(p[e.label]), 1e-45))
        verdicts.append(Verdict(place, e.context, e.choices[e.label], e.choices[said], said != e.label, loss))
    return _judgement(task, examples, predictions, verdicts, count)


@judge.register
def _(task: Regress, examples, predictions, places, count: int = 10) -> Judgement:
    """Every score is off; the worst are those that are off most."""
    truth = np.array([task.target(example) for example in examples], dtype=np.float64)
    said = np.array([float(prediction) for prediction in predictions])
    verdicts = [
        Verdict(place, _text_of(e), t, s, t != s, abs(t - s))
        for place, e, t, s in zip(places, examples, truth.tolist(), said.tolist(), strict=True)
    ]
    return _judgement(task, examples, predictions, verdicts, count, scores=(truth, said))


def worst_of(verdicts: Sequence[Verdict], count: int) -> list[Verdict]:
    """The ``count`` errors of the greatest badness, the earlier of equal ones first."""
    return sorted((v for v in verdicts if v.wrong), key=lambda verdict: -verdict.badness)[:count]


def confusion(truth: Sequence[str], said: Sequence[str], labels: Sequence[str]) -> np.ndarray:
    """int64 (labels, labels): examples by truth (rows) and by what is said (columns)."""
    return extras.load("sklearn.metrics").confusion_matrix(list(truth), list(said), labels=list(labels))


def by_label(truth: Any, said: Any, labels: Sequence[str]) -> dict[str, dict[str, float]]:
    """Precision, recall, f1 and support of each label; ``truth`` and ``said`` are labels (n,), or bool (n, labels)."""
    several = np.ndim(truth) == 2
    found = extras.load("sklearn.metrics").precision_recall_fscore_support(
        truth, said, labels=None if several else list(labels), zero_division=0.0
    )
    names = ("precision", "recall", "f1", "support")
    rows = zip(labels, *(part.tolist() for part in found), strict=True)
    return {label: dict(zip(names, numbers, strict=True)) for label, *numbers in rows}


def _matrix_lines(matrix: np.ndarray, labels: Sequence[str], unit: str) -> list[str]:
    if len(labels) > WHOLE:
        pairs = confused_pairs(matrix)[:WHOLE]
        lines = [f"  {count:,} {unit} of {labels[row]} taken for {labels[column]}" for count, row, column in pairs]
        return [f"the commonest confusions of {len(labels)} labels:", *lines] if lines else ["no label is confused"]
    names = [_brief(label)[:20] for label in labels]
    rows = [["truth \\ said" if unit == "examples" else f"{unit}: truth \\ said", *names]]
    rows += [[name, *map("{:,}".format, counts)] for name, counts in zip(names, matrix.tolist(), strict=True)]
    return _aligned(rows)


def confused_pairs(matrix: np.ndarray) -> list[tuple[int, int, int]]:
    """(examples, row of the truth, column of what was said) of all confusions, the commonest first."""
    off = matrix.copy()
    np.fill_diagonal(off, 0)
    rows, columns = off.nonzero()
    counts = zip(off[rows, columns].tolist(), rows.tolist(), columns.tolist(), strict=True)
    return sorted(counts, key=lambda found: (-found[0], *found[1:]))


def _label_lines(found: dict[str, dict[str, float]]) -> list[str]:
    rows = [["label", "precision", "recall", "f1", "support"]]
    for label, numbers in found.items():
        shares = [f"{numbers[name]:.4f}" for name in ("precision", "recall", "f1")]
        rows.append([_brief(label)[:30], *shares, f"{numbers['support']:,.0f}"])
    return _aligned(rows)


def _aligned(rows: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]


def plot_judgement(judgement: Judgement, out: str | Path, title: str) -> Path:
    """Draws ``judgement`` into the picture ``out`` (.png, .svg, .pdf): its confusion matrix, said against true scores,
    or each label's F1. Raises ValueError where it has none of them."""
    if judgement.matrix is None and judgement.scores is None and not judgement.by_label:
        raise ValueError(f"nothing to draw: {title} has neither labels nor scores")
    size = max(5.0, min(0.35 * len(judgement.labels or judgement.by_label) + 3, 14))
    with written_picture(out, (size + 1, size)) as figure:
        axes = figure.subplots()
        axes.set_title(title, fontsize=10)
        if judgement.matrix is not None:
            _draw_matrix(axes, judgement)
        elif judgement.scores is not None:
            truth, said = judgement.scores
            ends = [min(truth.min(), said.min()), max(truth.max(), said.max())]
            axes.plot(ends, ends, color="0.6", linewidth=1)
            axes.plot(truth, said, "o", markersize=3, alpha=min(1, 30 / len(truth) ** 0.5))
            axes.set(xlabel="truth", ylabel="said")
        else:
            names = list(judgement.by_label)
            axes.barh(names, [numbers["f1"] for numbers in judgement.by_label.values()])
            axes.invert_yaxis()
            axes.set(xlabel="F1", xlim=(0, 1))
    return Path(out)


def _draw_matrix(axes, judgement: Judgement) -> None:
    """Colours are shares of the truth's examples, so that a rare label is seen; the numbers are counts."""
    assert judgement.matrix is not None
    few = len(judgement.labels) <= 2 * WHOLE
    display = extras.load("sklearn.metrics").ConfusionMatrixDisplay
    shares = judgement.matrix / np.maximum(judgement.matrix.sum(axis=1, keepdims=True), 1)
    names = [_brief(label)[:20] for label in judgement.labels]
    drawn = display(shares, display_labels=names).plot(
        ax=axes, include_values=False, cmap="Blues", colorbar=False, xticks_rotation=90 if len(names) > 4 else 0,
        im_kw={"vmin": 0, "vmax": 1},
    )  # fmt: skip
    for (row, column), count in np.ndenumerate(judgement.matrix) if few else ():
        axes.text(column, row, f"{count:,}", ha="center", va="center", fontsize=8,
                  color="white" if shares[row, column] > 0.5 else "black")  # fmt: skip
    axes.set(xlabel="said", ylabel="truth")
    axes.figure.colorbar(drawn.im_, ax=axes, label=f"share of the truth's {judgement.unit}")
