"""GLUE's tasks: their published files, measures, and what BERT-base is published to reach.

Files, columns and labels are those that GLUE's download script leaves in a folder (github.com/nyu-mll/GLUE-baselines,
download_glue_data.py), measures those of Wang et al., arXiv 1804.07461.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

from bert_fast import extras
from bert_fast.tasks.examples import Example
from bert_fast.tasks.sentences import correlation
from bert_fast.tasks.tables import decoded, lines, tsv_rows

# Where the columns of published scores are from. Labels of GLUE's test sets are with its server alone.
TEST_SOURCE = "Devlin et al., arXiv 1810.04805, table 1: test sets, by GLUE's server"
DEVELOPMENT_SOURCE = (
    "README of transformers' text classification examples: run_glue, development sets; BERT-base cased, one seed, "
    "MRPC and WNLI with 5 epochs"
)


class Measure(NamedTuple):
    """A score on a development set, and BERT-base's published ones in hundredths (None: not published)."""

    part: str  # a key of Task.parts
    metric: str  # a key of METRICS
    test: float | None = None  # see TEST_SOURCE
    development: float | None = None  # see DEVELOPMENT_SOURCE


class Part(NamedTuple):
    """A file of a task, in its folder, and how many examples it has as published."""

    file: str
    examples: int


@dataclass(frozen=True)
class GlueTask:
    """One of GLUE's tasks.

    ``texts`` and ``label`` are names of columns, or numbers from 0 where the files have no header. ``labels`` are all
    that occur; none for a score from 0 to 5. ``parts`` are "train" and the development sets.
    """

    name: str
    texts: tuple[str, ...]
    label: str
    labels: tuple[str, ...]
    parts: dict[str, Part]
    measures: tuple[Measure, ...]
    tolerant: bool = False  # whether its published files have lines without all columns

    @property
    def development(self) -> list[str]:
        """The names of its development sets."""
        return [name for name in self.parts if name != "train"]


NLI = ("entailment", "neutral", "contradiction")
TASKS = {
    task.name: task
    for task in (
        GlueTask(
            "CoLA", ("3",), "1", ("0", "1"), {"train": Part("train.tsv", 8551), "dev": Part("dev.tsv", 1043)},
            (Measure("dev", "matthews", 52.1, 56.53),),
        ),
        GlueTask(
            "SST-2", ("sentence",), "label", ("0", "1"),
            {"train": Part("train.tsv", 67349), "dev": Part("dev.tsv", 872)},
            (Measure("dev", "accuracy", 93.5, 92.32),),
        ),
        GlueTask(
            "MRPC", ("#1 String", "#2 String"), "Quality", ("0", "1"),
            {"train": Part("train.tsv", 3668), "dev": Part("dev.tsv", 408)},
            (Measure("dev", "f1", 88.9, 88.85), Measure("dev", "accuracy", None, 84.07)),
        ),
        GlueTask(
            "STS-B", ("sentence1", "sentence2"), "score", (),
            {"train": Part("train.tsv", 5749), "dev": Part("dev.tsv", 1500)},
            (Measure("dev", "pearson", None, 88.64), Measure("dev", "spearman", 85.8, 88.48)),
        ),
        GlueTask(
            "QQP", ("question1", "question2"), "is_duplicate", ("0", "1"),
            {"train": Part("train.tsv", 363846), "dev": Part("dev.tsv", 40430)},
            (Measure("dev", "f1", 71.2, 87.49), Measure("dev", "accuracy", None, 90.71)),
            tolerant=True,
        ),
        GlueTask(
            "MNLI", ("sentence1", "sentence2"), "gold_label", NLI,
            {
                "train": Part("train.tsv", 392702), "matched": Part("dev_matched.tsv", 9815),
                "mismatched": Part("dev_mismatched.tsv", 9832),
            },
            (Measure("matched", "accuracy", 84.6, 83.91), Measure("mismatched", "accuracy", 83.4, 84.10)),
        ),
        GlueTask(
            "QNLI", ("question", "sentence"), "label", ("entailment", "not_entailment"),
            {"train": Part("train.tsv", 104743), "dev": Part("dev.tsv", 5463)},
            (Measure("dev", "accuracy", 90.5, 90.66),),
        ),
        GlueTask(
            "RTE", ("sentence1", "sentence2"), "label", ("entailment", "not_entailment"),
            {"train": Part("train.tsv", 2490), "dev": Part("dev.tsv", 277)},
            (Measure("dev", "accuracy", 66.4, 65.70),),
        ),
        GlueTask(
            "WNLI", ("sentence1", "sentence2"), "label", ("0", "1"),
            {"train": Part("train.tsv", 635), "dev": Part("dev.tsv", 71)},
            (Measure("dev", "accuracy", None, 56.34),),
        ),
    )
}  # fmt: skip

# GLUE's diagnostic set, which a model of MNLI is measured on. The file that GLUE's server takes has no labels.
AX = GlueTask(
    "AX", ("Premise", "Hypothesis"), "Label", NLI, {"diagnostic": Part("diagnostic-full.tsv", 1104)},
    (Measure("diagnostic", "matthews"),),
)  # fmt: skip
AX_FILES = ("diagnostic-full.tsv", "diagnostic.tsv", "AX.tsv")


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def named_tasks(names: Sequence[str] | None) -> list[GlueTask]:
    """The tasks of ``names`` (None: all), in GLUE's order; "sst2" is SST-2. ValueError for a name that is none."""
    by_name = {_plain(name): task for name, task in TASKS.items()}
    if unknown := [name for name in names or () if _plain(name) not in by_name]:
        raise ValueError(f"GLUE has no task {unknown[0]!r}: its tasks are {', '.join(TASKS)}")
    chosen = set(by_name) if names is None else set(map(_plain, names))
    return [task for name, task in by_name.items() if name in chosen]


def task_folder(data: str | Path, name: str) -> Path | None:
    """The folder of a task within ``data``, in whatever case, with or without its hyphen; None where there is none."""
    found = [path for path in sorted(Path(data).iterdir()) if path.is_dir() and _plain(path.name) == _plain(name)]
    return next((path for path in found if path.name == name), found[0] if found else None)


def files_of(data: str | Path, task: GlueTask) -> dict[str, Path]:
    """Where the files of ``task`` are, or ought to be, by the names of its parts."""
    folder = task_folder(data, task.name) or Path(data, task.name)
    return {name: folder / part.file for name, part in task.parts.items()}


def missing_files(data: str | Path, task: GlueTask) -> list[str]:
    """The files of ``task`` that ``data`` lacks, as FOLDER/FILE."""
    return [f"{path.parent.name}/{path.name}" for path in files_of(data, task).values() if not path.is_file()]


def diagnostic_file(data: str | Path) -> tuple[Path | None, str]:
    """(GLUE's diagnostic set with labels, "") or (None, why there is none)."""
    places = [Path(data), *filter(None, (task_folder(data, name) for name in ("diagnostic", "AX")))]
    there = [place / name for place in places for name in AX_FILES if (place / name).is_file()]
    for path in there:
        _, header = next(tsv_rows(lines(decoded(path))), (0, []))
        if AX.label in header:
            return path, ""
    if there:
        return None, f"{there[0]} has no labels, which diagnostic-full.tsv has"
    return None, "no diagnostic/diagnostic-full.tsv"


class GlueExamples(NamedTuple):
    """The examples of a file, and the lines that lacked columns and were left out."""

    examples: list[Example]
    left_out: list[int]


def read_glue(path: str | Path, task: GlueTask) -> GlueExamples:
    """The examples of a published file of ``task``. A quotation mark is a character like any other.

    Lines without all columns are left out of QQP, whose published files have some. ValueError names the line that does
    not fit otherwise, or whose label is none of the task's.
    """
    path = Path(path)
    rows, examples, left_out = tsv_rows(lines(decoded(path))), [], []
    if task.label.isdigit():
        places, width, short = [int(column) for column in (*task.texts, task.label)], None, "the first line"
    else:
        _, header = next(rows, (0, []))
        if lacking := [column for column in (*task.texts, task.label) if column not in header]:
            raise ValueError(f"{path}: no column {lacking[0]!r} in its first line: is it GLUE's file of {task.name}?")
        places, width, short = [header.index(c) for c in (*task.texts, task.label)], len(header), "its header"
    for number, row in rows:
        width = len(row) if width is None else width
        if len(row) < width and task.tolerant:
            left_out.append(number)
            continue
        if len(row) != width or len(row) <= max(places):
            raise ValueError(f"{path}, line {number}: {len(row)} columns, where {short} has {width}")
        *texts, label = (row[place] for place in places)
        if not _is_label(label, task):
            known = f"one of {', '.join(task.labels)}" if task.labels else "a score from 0 to 5"
            raise ValueError(f"{path}, line {number}: the label {label!r} is not {known}")
        examples.append(Example(texts[0], texts[1] if len(texts) > 1 else None, label))
    if not examples:
        raise ValueError(f"{path} holds no example")
    return GlueExamples(examples, left_out)


def _is_label(label: str, task: GlueTask) -> bool:
    if task.labels:
        return label in task.labels
    try:
        return 0 <= float(label) <= 5
    except ValueError:
        return False


def measured(task: GlueTask, part: str, gold: Sequence[str], said: Sequence[str | float]) -> dict[str, float]:
    """The measures of ``task`` on its development set ``part``, from 0 to 1 (correlations and Matthews from -1).

    ``gold`` are labels as its file has them, ``said`` the model's: labels, or scores for STS-B.
    """
    return {m.metric: METRICS[m.metric](gold, said) for m in task.measures if m.part == part}


def _metrics():
    return extras.load("sklearn.metrics")


# All from libraries; F1 is that of label "1".
METRICS: dict[str, Callable[..., float]] = {
    "accuracy": lambda gold, said: float(_metrics().accuracy_score(gold, said)),
    "f1": lambda gold, said: float(_metrics().f1_score(gold, said, pos_label="1", zero_division=0.0)),
    "matthews": lambda gold, said: float(_metrics().matthews_corrcoef(gold, said)),
    "pearson": partial(correlation, "pearsonr"),
    "spearman": partial(correlation, "spearmanr"),
}
