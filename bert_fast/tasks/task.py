"""What a task of fine-tuning is: the interface, and the list of all."""

from collections import Counter
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, cast

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import PreTrainedConfig

from bert_fast.tasks.tables import Source

# name: module and class. The order is that of the help, and in which files are looked at to guess the task.
TASKS = {
    "classify": ("sentences", "Classify"),
    "multilabel": ("sentences", "Multilabel"),
    "regress": ("sentences", "Regress"),
    "tokens": ("tokens", "Tokens"),
    "qa": ("answers", "Answers"),
    "choice": ("choice", "Choose"),
}


class Item(NamedTuple):
    """What a task learns, and predicts, as one: a sequence, or all choices of an example.

    sequences  each (ids, segments), as the model reads them
    example    number of the example in its list; a long one may have several items (windows)
    target     what :meth:`Task.targets` makes the loss's labels of
    notes      what :meth:`Task.predictions` reads besides, such as offsets of tokens
    """

    sequences: list[tuple[Sequence[int], Sequence[int]]]
    example: int
    target: Any
    notes: Any = None

    @property
    def length(self) -> int:
        """Tokens of all sequences."""
        return sum(len(ids) for ids, _ in self.sequences)


class Task:
    """A task, with what :meth:`settle` found of its labels.

    A subclass sets the class's attributes and has the methods without a body here.

    name     as --task says it
    model    the class of bert_fast.model that learns it
    head     the name of its head's module, a linear layer
    metric   the one of :meth:`metrics` that says which epoch is best: the highest
    max_length  tokens that sequences are cut to where the user does not say
    options  the names of what ``__init__`` takes, as keywords of ``finetune``
    named    whether the head's rows have names; where not, they are ``rows``
    counted  what :meth:`encode` counts, in words: "{seq}" is the length of sequences
    labels   these names, once settled
    """

    name: ClassVar[str]
    model: ClassVar[type]
    head: ClassVar[str] = "classifier"
    metric: ClassVar[str]
    max_length: ClassVar[int] = 128
    options: ClassVar[tuple[str, ...]] = ()
    named: ClassVar[bool] = True
    rows: ClassVar[int] = 1
    counted: ClassVar[dict[str, str]] = {"cut": "examples cut to {seq} tokens"}
    labels: list[str]

    @classmethod
    def recognises(cls, path: Path) -> bool:
        """Whether the file at ``path`` can only be this task's, by its name or first bytes."""
        return False

    def read(self, path: str | Path, **columns) -> list:
        """The examples of a file; ValueError naming file and line where it does not fit."""
        raise NotImplementedError

    def located(self, path: str | Path, **columns) -> list[tuple[str, Any]]:
        """(where it stands, in words, and the example) of all that :meth:`read` gives."""
        examples = self.read(path, **columns)
        return [(getattr(e, "where", f"{path}, example {n}"), e) for n, e in enumerate(examples, 1)]

    def unknown(self, example) -> str | None:
        """A label of ``example`` that is none of ``labels``; None where there is none."""
        return None

    def unlabelled(self, source: Source, *, text: str | None = None, pair: str | None = None) -> Iterator[Any]:
        """The examples of ``source`` as they are read, without labels: what :meth:`encode` takes to predict.

        ``text`` and ``pair`` name columns (None: as in :meth:`read`). ValueError where a line is no example.
        """
        raise ValueError(f"{source.name}: the task {self.name} reads labelled files alone")

    def settle(self, train: list, validation: list) -> tuple[list, list, list[str]]:
        """(train, validation, what is doubtful in words): examples as they are learnt, and ``labels`` from them.

        ValueError where they do not fit together.
        """
        raise NotImplementedError

    def restore(self, config: PreTrainedConfig) -> None:
        """Takes from a trained model's configuration what :meth:`settle` found when it was trained."""
        if self.named:
            names = cast(dict[int, str], config.id2label)
            self.labels = [names[row] for row in sorted(names)]

    def config(self) -> dict[str, Any]:
        """Fields of the model's configuration beside its labels."""
        return {}

    def learnt(self, metrics: dict) -> dict[str, Any]:
        """Fields of the model's configuration that the best epoch's ``metrics`` found."""
        return {}

    def encode(self, examples: list, tokenizer: Tokenizer, max_length: int, counts: Counter) -> list[Item]:
        """What the model reads of ``examples``, sequences of at most ``max_length`` tokens. ``tokenizer`` is the
        caller's own copy, without padding and truncation. ``counts`` gets "cut" and what else is worth a number."""
        raise NotImplementedError

    def weight(self, items: Sequence[Item]) -> float:
        """What the loss of ``items`` is divided by: how many labels they have."""
        return len(items)

    def targets(self, items: Sequence[Item]) -> dict[str, Tensor]:
        """The labels of packed ``items`` as the model's arguments."""
        raise NotImplementedError

    def forward(self, network, batch: dict, count: Tensor, **more) -> tuple[Tensor, Any]:
        """(the packed batch's part of the mean loss over ``count`` labels, the model's output)."""
        output = network(**batch, num_items_in_batch=count, **more)
        return output.loss, output

    def scores(self, output, items: Sequence[Item]) -> list[np.ndarray]:
        """What :meth:`predictions` needs of the packed ``items``, an array each; by default the rows of its logits."""
        return list(output.logits.float().cpu().numpy())

    def predictions(self, examples: list, items: Sequence[Item], scores: Sequence[np.ndarray]) -> list:
        """What is predicted for each of ``examples``, from the ``scores`` of each of their ``items``."""
        raise NotImplementedError

    def metrics(self, examples: list, predictions: list) -> dict[str, Any]:
        """Numbers from 0 to 1 and others by name, ``metric`` among them."""
        raise NotImplementedError

    def about(self, train: list, validation: list) -> dict[str, Any]:
        """Facts for the result that hold whatever is learnt, such as what a constant answer would reach."""
        return {}

    def told(self, metrics: dict) -> str:
        """The metrics in a few words, the deciding one first."""
        return f"{self.metric} {metrics[self.metric]:.4f}"

    def line(self, example, prediction) -> dict[str, Any]:
        """A prediction as an object of JSON."""
        raise NotImplementedError


def task_class(name: str) -> type[Task]:
    """The class of the task ``name``; ValueError where there is none."""
    if name not in TASKS:
        raise ValueError(f"the task must be one of {', '.join(TASKS)}, got {name!r}")
    module, kind = TASKS[name]
    return getattr(import_module(f"bert_fast.tasks.{module}"), kind)


def make_task(name: str, **options) -> Task:
    """The task ``name`` with those of ``options`` that are not None; ValueError for one that it does not take."""
    cls, given = task_class(name), {key: value for key, value in options.items() if value is not None}
    if unknown := sorted(given.keys() - set(cls.options)):
        raise ValueError(f"{unknown[0]} is not for the task {name}" + (
            f", which takes {', '.join(cls.options)}" if cls.options else ""))  # fmt: skip
    return cls(**given)


def packed(items: Sequence[Item], slots: Sequence[int]) -> dict[str, Any]:
    """The sequences of ``items`` one after the other, as the models of bert_fast take them (see data/batches.py).

    ``slots`` are the numbers of the items' first sequences in their update: what dropout is keyed by.
    """
    sequences = [sequence for item in items for sequence in item.sequences]
    lengths = torch.tensor([len(ids) for ids, _ in sequences])
    ends = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    return {
        "input_ids": torch.tensor([token for ids, _ in sequences for token in ids])[None],
        "token_type_ids": torch.tensor([kind for _, segments in sequences for kind in segments])[None],
        "position_ids": (torch.arange(int(ends[-1])) - ends[:-1].repeat_interleave(lengths))[None],
        "cu_seq_lens_q": ends.int(),
        "max_length_q": int(lengths.max()),
        "cls_positions": ends[:-1],
        "sample_ids": torch.tensor(
            [slot + n for slot, item in zip(slots, items, strict=True) for n in range(len(item.sequences))]
        ),
    }
