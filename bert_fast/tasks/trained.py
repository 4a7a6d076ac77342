"""A fine-tuned model in use: its folder's task, and predictions for any number of examples in bounded memory."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer
from transformers import BertConfig

from bert_fast.data.tokenizer import own_tokenizer
from bert_fast.output import Output
from bert_fast.tasks.examples import unnamed
from bert_fast.tasks.finetuning import RECORD
from bert_fast.tasks.prediction import require_length, scored
from bert_fast.tasks.task import TASKS, Task, make_task, task_class
from bert_fast.use.inference import load_model, model_folder

# Examples that are sorted by length together; what is read of them is held until all are predicted.
WINDOW = 4096


class Trained(NamedTuple):
    """A fine-tuned ``model`` in evaluation mode, with its ``task`` as it was learnt. Examples are cut to ``max_length``
    tokens."""

    task: Task
    model: Any
    tokenizer: Tokenizer
    max_length: int

    def told(self, counts: Counter) -> str:
        """What the task counted, in words; empty where nothing."""
        found = ((counts[name], what) for name, what in self.task.counted.items())
        return "; ".join(f"{number:,} {what.format(seq=self.max_length)}" for number, what in found if number)


def task_of(folder: str | Path) -> str | None:
    """The name of the task that the model in a Hugging Face folder was fine-tuned for, None where for none.

    Its architecture says it, and of a BertForSequenceClassification the configuration's problem_type, or one label.
    """
    config = BertConfig.from_pretrained(folder)
    kinds = {task_class(name).model.__name__ for name in TASKS}
    architecture = next((name for name in config.architectures or () if name in kinds), None)
    if architecture is None:
        return None
    names = [name for name in TASKS if task_class(name).model.__name__ == architecture]
    if len(names) == 1:
        return names[0]
    kind = config.problem_type or ("regression" if config.num_labels == 1 else "single_label_classification")
    return next((name for name in names if task_class(name).config(task_class(name)())["problem_type"] == kind), None)


def load_trained(
    path: str | Path, *, max_length: int | None = None, device: str | torch.device = "cpu",
    output: Output | None = None, **options,
) -> Trained:  # fmt: skip
    """The fine-tuned model in the folder ``path``, of this package or any Hugging Face BERT with a head.

    ``max_length`` (None: what it was fine-tuned with, else all its positions), ``options`` are the task's. ValueError
    where the model was not fine-tuned, for a task that it does not take, and for weights that do not fit.
    """
    folder = model_folder(path, output)
    name = task_of(folder)
    if name is None:
        kinds = ", ".join(sorted({task_class(task).model.__name__ for task in TASKS}))
        raise ValueError(
            f"{path} is not fine-tuned: its config.json names none of {kinds}; `bert-fast finetune` makes one"
        )
    task: Any = make_task(name, **options)
    loaded: Any = load_model(task.model, folder, dtype=torch.float32, device=device, output=output)
    model, tokenizer, _ = loaded
    task.restore(model.config)
    positions = model.config.max_position_embeddings
    learnt = _learnt(folder)
    task.pairs = learnt.get("pairs")
    length = learnt.get("seq", positions) if max_length is None else max_length
    require_length(length, positions)
    return Trained(task, model, own_tokenizer(tokenizer), length)


def _learnt(folder: Path) -> dict[str, Any]:
    """What `bert-fast finetune` told of the first seed; empty where another program trained the model."""
    path = folder / RECORD
    found = json.loads(path.read_text(encoding="utf-8"))["seeds"] if path.is_file() else {}
    return next(iter(found.values()), {})


def predict(
    trained: Trained, examples: Iterable, *, tokens: int = 8192, bf16: bool = False, counts: Counter | None = None
) -> Iterator[tuple[Any, Any]]:
    """Yields (example, prediction) in the order of ``examples``, whose labels may be None.

    Within windows of 4096 they are sorted by length and packed, about ``tokens`` tokens a batch, without padding;
    memory does not grow with their number. Where reading ``examples`` raises, those before are predicted first.
    ``counts`` gets how many were cut, and what else the task counts. ValueError where a score is not finite.
    """
    counts, done = Counter() if counts is None else counts, 0
    for window in _windows(examples):
        items = trained.task.encode(window, trained.tokenizer, trained.max_length, counts)
        scores, _ = scored(trained.task, trained.model, items, tokens=tokens, bf16=bf16)
        for item, found in zip(items, scores, strict=True):
            if not torch.from_numpy(found).isfinite().all():
                raise ValueError(f"the scores of example {done + item.example + 1} are not finite: the model overflows")
        yield from zip(window, trained.task.predictions(window, items, scores), strict=True)
        done += len(window)


def _windows(examples: Iterable) -> Iterator[list]:
    window: list = []
    try:
        for example in examples:
            window.append(example)
            if len(window) == WINDOW:
                yield window
                window = []
    except ValueError:  # a line that is no example: those before it are not lost
        if window:
            yield window
        raise
    if window:
        yield window


def labelled(trained: Trained, path: str | Path, **columns) -> tuple[list, list[str]]:
    """(the labelled examples of a file, where each stands); see :func:`known_examples`."""
    return known_examples(trained.task, path, **columns)


def known_examples(task: Task, path: str | Path, **columns) -> tuple[list, list[str]]:
    """(the labelled examples of a file, where each stands) for a ``task`` that is restored from a model; ValueError
    naming one whose label the model does not know.

    Where the model's labels have the names that transformers gives, LABEL_0 and so on, and the file others, numbers in
    it are the model's rows, and the task's ``labels`` are these.
    """
    located = task.located(path, **columns)
    without_names = task.named and task.labels == unnamed(len(task.labels))
    if without_names and any(task.unknown(example) is not None for _, example in located):
        task.labels = list(map(str, range(len(task.labels))))
    for place, example in located:
        if (label := task.unknown(example)) is not None:
            raise ValueError(f"{place}: the label {label!r} is none of the model's: {', '.join(task.labels)}")
    return [example for _, example in located], [place for place, _ in located]
