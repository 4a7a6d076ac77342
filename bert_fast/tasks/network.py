"""The model that a task trains: a pre-trained encoder with the head of the task, and rates that grow with height."""

import copy
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from tokenizers import Tokenizer
from torch import nn
from transformers import BertConfig

from bert_fast import optim
from bert_fast.run.weights import read_weights
from bert_fast.tasks.examples import label_value, unnamed
from bert_fast.tasks.task import Task
from bert_fast.use.inference import load_model


class Network(NamedTuple):
    """A ``model`` of the task's class, its ``tokenizer``, and where the weights of its ``head`` come from in words."""

    model: Any
    tokenizer: Tokenizer
    head: str


def make_network(
    task: Task, folder: Path, *, dropout: float | None = None, from_scratch: bool = False, reinit_layers: int = 0
) -> Network:
    """The model of ``folder`` with the head of a settled ``task``, float32, on the CPU.

    A head of the same class keeps its rows for the labels that it names; others are drawn, and so are all weights
    where ``from_scratch``, and those of the pooler and the ``reinit_layers`` top layers. The source of the latter: T.
    Zhang et al., "Revisiting Few-sample BERT Fine-tuning", ICLR 2021.
    """
    rates: dict[str, Any] = (
        {} if dropout is None else {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    )
    # Only a head may be drawn, and a pooler that pre-training without next-sentence prediction did not train.
    loading: dict[str, Any] = {
        "optional": ("bert.pooler.",), "drawn": (f"{task.head}.",), "dtype": torch.float32,
        "num_labels": len(task.labels) if task.named else task.rows,
    }  # fmt: skip
    model: Any
    model, tokenizer, drawn = load_model(task.model, folder, **loading, **rates)
    config = model.config
    if task.named:
        config.id2label = dict(enumerate(task.labels))
        config.label2id = {name: number for number, name in enumerate(task.labels)}
    config.update(task.config())
    if from_scratch:
        return Network(task.model(config), tokenizer, "all weights are drawn at random")
    head = _set_head(task, model, folder, drawn, loading)
    if reinit_layers:
        head += "; " + _draw_layers(model, reinit_layers)
    return Network(model, tokenizer, head)


def _set_head(task: Task, model: Any, folder: Path, drawn: list[str], loading: dict) -> str:
    """Gives the head of ``model`` the rows that ``folder``'s own has for the task's labels; what was done, in words."""
    theirs = cast(Any, BertConfig.from_pretrained(folder))
    own_head = f"{task.head}.weight" not in drawn
    kind = (theirs.architectures or [task.model.__name__])[0]
    same = kind == task.model.__name__
    if own_head and not same:
        _put_head(task, model, {}, None)
        return f"the model's head is a {kind}'s: a new one is drawn"
    if not task.named:
        return "the model's head is kept" if own_head else f"the model has no such head: drawn are {', '.join(drawn)}"
    names = [theirs.id2label[row] for row in sorted(theirs.id2label)]
    labels = task.labels
    own: Any = None
    rows = _rows_of_labels(names, labels) if same else {}
    if rows:
        own, missing, _ = read_weights(task.model, folder, **loading | {"num_labels": len(names)})
        rows = {} if f"{task.head}.weight" in missing else rows
    if not rows and not own_head:
        return f"the model has no head for these labels: drawn at random are {', '.join(drawn)}"
    _put_head(task, model, rows, own)
    if not rows:
        return f"the model's head is for {', '.join(names)}: a new one is drawn for {', '.join(labels)}"
    new = [name for place, name in enumerate(labels) if place not in rows]
    left_out = [name for row, name in enumerate(names) if row not in rows.values()]
    return "the model's head is kept, each row for the label that it names" + "".join(
        f"; {what}: {', '.join(some)}" for what, some in (("drawn at random", new), ("left out", left_out)) if some
    )


def _put_head(task: Task, model: Any, rows: dict[int, int], own: Any) -> None:
    """A head that is drawn, but for the ``rows`` (place in it: row of ``own``'s) that are known."""
    before = getattr(model, task.head)
    head = nn.Linear(before.in_features, before.out_features)
    model._init_weights(head)
    with torch.no_grad():
        for place, row in rows.items():
            known = getattr(own, task.head)
            head.weight[place], head.bias[place] = known.weight[row], known.bias[row]
    setattr(model, task.head, head)


def _rows_of_labels(names: list[str], labels: list[str]) -> dict[int, int]:
    """For each of ``labels`` that a head's rows are ``names`` for, its place and that row.

    The names that transformers gives where there are none, LABEL_0 and so on, stand for 0 and so on where these are
    all the labels.
    """
    if names == unnamed(len(names)) and {label_value(label) for label in labels} == set(range(len(names))):
        names = list(map(str, range(len(names))))
    rows = {label_value(name): row for row, name in enumerate(names)}
    return {place: rows[value] for place, value in enumerate(map(label_value, labels)) if value in rows}


def _draw_layers(model: Any, number: int) -> str:
    layers = model.bert.encoder.layer
    if number > len(layers):
        raise ValueError(f"--reinit-layers {number}: the model has {len(layers)} layers")
    fresh = type(model)(copy.deepcopy(model.config))
    for ours, drawn in zip(layers[-number:], fresh.bert.encoder.layer[-number:], strict=True):
        ours.load_state_dict(drawn.state_dict())
    if model.bert.pooler is not None:
        model.bert.pooler.load_state_dict(fresh.bert.pooler.state_dict())
    return f"the top {number} of {len(layers)} layers are drawn at random, and the pooler"


def parameter_groups(model: Any, weight_decay: float, layer_decay: float) -> list[dict]:
    """:func:`bert_fast.optim.parameter_groups` with the "scale" of each group's learning rate.

    Head, pooler and top layer have 1, a layer ``layer_decay`` times that of the one above it, and the embeddings that
    of a layer below the first. Source: C. Sun et al., "How to Fine-Tune BERT for Text Classification?", 2019, 3.4.2.
    """
    if layer_decay == 1:
        return optim.parameter_groups(model, weight_decay)
    layers = model.bert.encoder.layer
    below = [model.bert.embeddings, *layers]
    parts = [(part, layer_decay ** (len(layers) - depth)) for depth, part in enumerate(below)]
    held = {parameter for part in below for parameter in part.parameters()}
    above = nn.ParameterList([parameter for parameter in model.parameters() if parameter not in held])
    return [
        group | {"scale": scale}
        for part, scale in [*parts, (above, 1.0)]
        for group in optim.parameter_groups(part, weight_decay)
    ]
