"""What a model says of items, packed by length, without padding."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import nn

from bert_fast.data.tokenizer import bare_tokenizer
from bert_fast.tasks.task import Item, Task, packed
from bert_fast.train.step import moved


def own_tokenizer(tokenizer: Tokenizer) -> Tokenizer:
    """A copy that :meth:`Task.encode` may change, without padding and truncation."""
    tokenizer = Tokenizer.from_str(bare_tokenizer(tokenizer).to_str())
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


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
    for members in batches_by_length(items, tokens):
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


def batches_by_length(items: Sequence[Item], tokens: int) -> Iterator[list[int]]:
    """The numbers of ``items``, those of like lengths together, about ``tokens`` tokens at a time."""
    members: list[int] = []
    size = 0
    for number in sorted(range(len(items)), key=lambda i: items[i].length):
        if members and size + items[number].length > tokens:
            yield members
            members, size = [], 0
        members.append(number)
        size += items[number].length
    if members:
        yield members
