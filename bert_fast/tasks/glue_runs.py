"""GLUE by one model: its tasks fine-tuned with several seeds, and the table of their medians."""

import hashlib
import json
import math
import shutil
import tempfile
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path
from statistics import fmean, median
from typing import Any, NamedTuple

from bert_fast import extras
from bert_fast.data.files import checksum, write_atomically
from bert_fast.output import Output
from bert_fast.tasks.examples import Example
from bert_fast.tasks.finetuning import finetune
from bert_fast.tasks.glue import (
    AX,
    DEVELOPMENT_SOURCE,
    TEST_SOURCE,
    GlueTask,
    Measure,
    diagnostic_file,
    files_of,
    measured,
    missing_files,
    read_glue,
)
from bert_fast.tasks.trained import load_trained, predict

# Fine-tunes by (task, its training examples, the examples of its development sets, learning rate, seed); what the
# model says of each development set: labels, or scores.
Fit = Callable[[GlueTask, list[Example], dict[str, list[Example]], float, int], dict[str, Sequence[Any]]]


class Run(NamedTuple):
    """A task fine-tuned once: its measures by development set, or why there are none."""

    rate: float
    seed: int
    scores: dict[str, dict[str, float]] | None
    error: str | None


class TaskRuns(NamedTuple):
    """All runs of a task at the learning rate whose medians are highest, and what its files held."""

    task: GlueTask
    measures: tuple[Measure, ...]
    rate: float
    runs: list[Run]
    notes: list[str]

    def scores(self, measure: Measure) -> list[float]:
        """Of every seed that ended, in hundredths."""
        return [100 * run.scores[measure.part][measure.metric] for run in self.runs if run.scores is not None]


def run_glue(
    fit: Fit,
    data: str | Path,
    tasks: Iterable[GlueTask],
    *,
    seeds: int = 5,
    rates: Sequence[float] = (2e-5,),
    out: str | Path | None = None,
    settings: dict[str, Any] | None = None,
    output: Output | None = None,
) -> tuple[list[TaskRuns], dict[str, str]]:
    """(the runs of each task, why others have none) on the published files in the folder ``data``.

    Each task is fine-tuned with seeds 0 to ``seeds`` - 1 at each of ``rates``; a model of MNLI is measured on GLUE's
    diagnostic set, too, where that is there. ``out`` keeps every run as it ends, and those that it has are not made
    again. ``settings`` are what else a run depends on (any JSON): ValueError where ``out`` has runs by others, or of
    other files. A loss that is not finite ends that run alone.
    """
    for name in ("sklearn.metrics", "scipy.stats"):  # what is missing is told before hours of training
        extras.load(name)
    output, done, absent = output or Output(), [], {}
    for task in tasks:
        if missing := missing_files(data, task):
            absent[task.name] = f"no {', '.join(missing)} in {data}"
            output.note(f"{task.name} is left out: {absent[task.name]}")
            continue
        done.append(_task_runs(fit, Path(data), task, seeds, rates, out, settings or {}, output))
        if task.name == "MNLI" and (path_and_why := diagnostic_file(data))[0] is None:
            absent[AX.name] = path_and_why[1]
            output.note(f"{AX.name} is left out: {absent[AX.name]}")
    return done, absent


def finetuned(
    model: str | Path,
    *,
    epochs: float,
    batch_size: int,
    max_length: int,
    precision: str,
    device: str = "cpu",
    work: str | Path | None = None,
    output: Output | None = None,
) -> Fit:
    """A :data:`Fit` that fine-tunes ``model`` by :func:`bert_fast.tasks.finetuning.finetune`, to the last epoch.

    In ``work`` (None: nowhere) a run that was stopped goes on from its last checkpoint.
    """
    output = output or Output()

    def fit(task: GlueTask, train: list[Example], development: dict[str, list[Example]], rate: float, seed: int):
        name = run_name(task, rate, seed)
        with tempfile.TemporaryDirectory() if work is None else nullcontext(Path(work, "runs", name)) as folder:
            first, *_ = development.values()
            total = math.ceil(math.ceil(len(train) / batch_size) * epochs)
            with output.progress(total, name, "updates") as bar:
                made = finetune(
                    model, train, first, folder, task="classify" if task.labels else "regress", epochs=epochs,
                    batch_size=batch_size, learning_rate=rate, max_length=max_length, seed=seed, precision=precision,
                    device=device, keep="last", on_warning=lambda text: output.note(f"{name}: {text}"),
                    on_step=lambda step, steps, loss: bar.update(step, f"loss {loss:.4f}", loss=loss),
                )  # fmt: skip
            trained = load_trained(folder, max_length=max_length, device=device)
            said = {
                part: [_said(trained.task.line(e, p)) for e, p in predict(trained, e, bf16=made["precision"] == "bf16")]
                for part, e in development.items()
            }
        return said

    return fit


def _said(line: dict) -> str | float:
    return line["label"] if "label" in line else line["number"]


def run_name(task: GlueTask, rate: float, seed: int) -> str:
    """What a run's files are called."""
    return f"{task.name}-lr{rate:g}-seed{seed}"


def model_digest(folder: Path) -> str:
    """What tells the model in a Hugging Face folder from another, wherever it lies."""
    parts = [path for path in sorted(folder.glob("*")) if path.suffix in (".safetensors", ".bin")]
    parts += [folder / name for name in ("config.json", "tokenizer.json", "vocab.txt") if (folder / name).is_file()]
    return hashlib.blake2b("".join(map(checksum, parts)).encode(), digest_size=16).hexdigest()


def _task_runs(
    fit: Fit, data: Path, task: GlueTask, seeds: int, rates: Sequence[float], out: str | Path | None,
    settings: dict[str, Any], output: Output,
) -> TaskRuns:  # fmt: skip
    files = {name: (task, path) for name, path in files_of(data, task).items()}
    measures = task.measures
    if task.name == "MNLI" and (path := diagnostic_file(data)[0]) is not None:
        files["diagnostic"], measures = (AX, path), task.measures + AX.measures
    examples, notes = {}, []
    for name, (of, path) in files.items():
        examples[name], left_out = read_glue(path, of)
        if left_out:
            notes.append(
                f"{path.name}: {len(left_out):,} lines lack columns and are left out, the first is {left_out[0]}"
            )
        if len(examples[name]) != of.parts[name].examples:
            notes.append(f"{path.name} has {len(examples[name]):,} examples, GLUE's {of.parts[name].examples:,}")
    for note in notes:
        output.warn(f"{task.name}: {note}")
    made_by = {**settings, **{f"file {path.name}": checksum(path) for _, path in files.values()}}
    train = examples.pop("train")
    gold = {name: [example.label for example in part] for name, part in examples.items()}
    runs: dict[float, list[Run]] = {}
    for rate in rates:
        for seed in range(seeds):
            kept = None if out is None else Path(out, "runs", f"{run_name(task, rate, seed)}.json")
            run = None if kept is None else _kept(kept, made_by, rate, seed)
            if run is None:
                run = _one_run(fit, task, train, examples, files, gold, rate, seed)
                if kept is not None:
                    write_atomically(kept, json.dumps({"made_by": made_by, **run._asdict()}, indent=1).encode())
                    shutil.rmtree(kept.with_suffix(""), ignore_errors=True)  # what it would have gone on from
            output.note(f"{task.name}, learning rate {rate:g}, seed {seed}: {_told(run)}")
            runs.setdefault(rate, []).append(run)
    best = max(rates, key=lambda rate: _worth(runs[rate], task))
    if len(rates) > 1:
        tried = ", ".join(f"{rate:g}" for rate in rates)
        notes.append(f"the learning rate is the best of {tried} on these development sets, as in the paper")
    return TaskRuns(task, measures, best, runs[best], notes)


def _one_run(fit: Fit, task, train, examples, files, gold, rate: float, seed: int) -> Run:
    try:
        said = fit(task, train, examples, rate, seed)
    except FloatingPointError as error:
        return Run(rate, seed, None, str(error))
    return Run(rate, seed, {name: measured(files[name][0], name, gold[name], said[name]) for name in gold}, None)


def _kept(path: Path, made_by: dict, rate: float, seed: int) -> Run | None:
    """The run that ``path`` holds, None where it is not there."""
    if not path.is_file():
        return None
    found = json.loads(path.read_text(encoding="utf-8"))
    there = found.pop("made_by")
    if differing := [name for name in sorted({*there, *made_by}) if there.get(name) != made_by.get(name)]:
        name = differing[0]
        raise ValueError(
            f"{path} was made with another {name} ({there.get(name)} there, {made_by.get(name)} here): use another "
            "--out"
        )
    return Run(**found)


def _worth(runs: list[Run], task: GlueTask) -> float:
    """The mean of the task's medians; below all others where no run ended."""
    found = TaskRuns(task, task.measures, 0, runs, [])
    return fmean(median(found.scores(m)) for m in task.measures) if found.scores(task.measures[0]) else -1e9


def _told(run: Run) -> str:
    if run.scores is None:
        return f"{run.error}"
    return ", ".join(
        f"{metric}{'' if part == 'dev' else f' ({part})'} {100 * score:.2f}"
        for part, measures in run.scores.items()
        for metric, score in measures.items()
    )


def facts(done: list[TaskRuns], absent: dict[str, str]) -> dict:
    """All of it as JSON has it; scores in hundredths."""
    tasks = {}
    for found in done:
        measures = []
        for measure in found.measures:
            scores = found.scores(measure)
            measures.append({
                "part": measure.part, "metric": measure.metric,
                "median": median(scores) if scores else None, "scores": scores,
                "published_test": measure.test, "published_development": measure.development,
            })  # fmt: skip
        failed = {str(run.seed): run.error for run in found.runs if run.error is not None}
        tasks[found.task.name] = {"learning_rate": found.rate, "seeds": len(found.runs), "measures": measures,
                                  "failed": failed, "notes": found.notes}  # fmt: skip
    return {
        "tasks": tasks,
        "average": _average(done),
        "missing": absent,
        "sources": {"published_test": TEST_SOURCE, "published_development": DEVELOPMENT_SOURCE},
    }


def _average(done: list[TaskRuns]) -> dict | None:
    """As Devlin et al. have it, over the nine scores of their table 1 (so without WNLI); None where one is missing."""
    averaged = [(found, m) for found in done for m in found.measures if m.test is not None]
    if len(averaged) < 9 or not all(found.scores(m) for found, m in averaged):
        return None
    return {
        "median": fmean(median(found.scores(m)) for found, m in averaged),
        "published_test": fmean(m.test or 0.0 for _, m in averaged),
        "published_development": fmean(m.development or 0.0 for _, m in averaged),
    }


def table(done: list[TaskRuns], absent: dict[str, str]) -> str:
    """Medians over seeds beside BERT-base's published scores, as Markdown that is read on a terminal as well."""
    rows = [["task", "measure", "median", "range", "seeds", "lr", "BERT-base, dev [1]", "BERT-base, test [2]"]]
    for found in done:
        for measure in found.measures:
            scores, name = found.scores(measure), AX.name if measure in AX.measures else found.task.name
            where = "" if measure.part in ("dev", "diagnostic") else f", {measure.part}"
            spread = f"{min(scores):.2f} to {max(scores):.2f}" if len(scores) > 1 else ""
            seeds = f"{len(scores)}" if len(scores) == len(found.runs) else f"{len(scores)} of {len(found.runs)}"
            rows.append([
                name, f"{measure.metric}{where}", _shown(median(scores) if scores else None), spread, seeds,
                f"{found.rate:g}", _shown(measure.development), _shown(measure.test, 1),
            ])  # fmt: skip
    if average := _average(done):
        rows.append(["average", "of those with [2]", _shown(average["median"]), "", "", "",
                     _shown(average["published_development"]), _shown(average["published_test"], 1)])  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        f"| {' | '.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))} |".rstrip() for row in rows
    ]
    lines.insert(1, f"| {' | '.join('-' * width for width in widths)} |")
    lines += [
        "",
        "Ours are on the development sets, in hundredths.",
        f"[1] {DEVELOPMENT_SOURCE}.",
        f"[2] {TEST_SOURCE}.",
    ]
    lines += [f"{found.task.name}: {note}." for found in done for note in found.notes]
    lines += [f"{found.task.name}, seed {run.seed}: {run.error}" for found in done for run in found.runs if run.error]
    return "\n".join(lines + [f"{name} is left out: {why}." for name, why in absent.items()])


def _shown(score: float | None, digits: int = 2) -> str:
    return "" if score is None else f"{score:.{digits}f}"
