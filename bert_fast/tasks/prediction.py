"""What a model says of items, packed by length, without padding."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import nn

from bert_fast.data.bins import batches_by_length
from bert_fast.tasks.task import Item, Task, packed
from bert_fast.train.step import moved


def require_length(length: int, positions: int) -> None:
    """ValueError where sequences of ``length`` tokens are none, or more than a model has ``positions`` for."""
    if not 8 <= length <= positions:
        raise ValueError(f"sequences of {length} tokens: it must be 8 to the model's {positions} positions")


def scored(
    task: Task, model: nn.Module, items: Sequence[Item], *, tokens: int = 8192, bf16: bool = False,
    on_items: Callable[[int], None] = lambda number: None,
) -> tuple[list[np.ndarray], float | None]:  # fmt: skip
    """(the scores of each of ``items`` in their order, their mean loss: None where they have no targets).

    ``model`` is the task's, on any device, and is left in evaluation mode; a batch has about ``tokens`` tokens.
    ``on_items`` is called with how many a batch had.
    """
    model.eval()
    device = next(model.parameters()).device
    labelled = items[0].target is not None
    count = torch.tensor(task.weight(items) if labelled else 1.0, device=device)
    found: list[np.ndarray | None] = [None] * len(items)
    loss = torch.zeros((), dtype=torch.float64, device=device)
    for members in batches_by_length([item.length for item in items], tokens):
        some = [items[i] for i in members]
        batch = packed(some, range(len(some))) | (task.targets(some) if labelled else {})
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            hidden = {"hidden_dtype": torch.bfloat16} if bf16 else {}
            part, output = task.forward(model, moved(batch, device), count, **hidden)
        if labelled:
            loss += part
        for i, scores in zip(members, task.scores(output, some), strict=True):
            found[i] = scores
        on_items(len(some))
    return [scores for scores in found if scores is not None], loss.item() if labelled else None
