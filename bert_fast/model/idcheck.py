"""Ids out of range on a GPU, noticed without waiting for it.

On a CPU the operator checks ids itself. On a GPU reading them would stop the queue, so the embedding kernel
writes NaN for such a row, and a one-byte answer is copied to pinned memory behind it; the next forward pass (or
the end of the process) looks at the answers that have arrived and raises. Skipped while a model is being compiled
or a CUDA graph captured, and where ids have no values to read.
"""

import atexit
import sys

import torch

from ..packing import unreadable

_pending: list[tuple[torch.Tensor, torch.cuda.Event, int]] = []


def check_later(ids: torch.Tensor, size: int) -> None:
    """Ask the GPU whether an id is outside 0 .. size-1, and raise for an earlier batch that had one."""
    if not ids.is_cuda or torch.compiler.is_compiling() or unreadable(ids) or torch.cuda.is_current_stream_capturing():
        return
    raise_if_bad()
    bad = ((ids < 0) | (ids >= size)).any()
    answer = torch.empty((), dtype=torch.bool, pin_memory=True)
    answer.copy_(bad, non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    _pending.append((answer, event, size))


def raise_if_bad(wait: bool = False) -> None:
    """Raise IndexError for a batch with ids out of range whose answer has arrived (``wait``: for every batch)."""
    while _pending and (wait or _pending[0][1].query()):
        answer, event, size = _pending.pop(0)
        event.synchronize()
        if bool(answer):
            raise IndexError(
                f"bert_fast: an earlier batch had input_ids outside 0 .. {size - 1}; its outputs and loss are NaN. "
                "Compare the tokenizer's vocabulary with config.vocab_size"
            )


def _at_exit() -> None:
    try:
        raise_if_bad(wait=True)
    except IndexError as error:
        print(error, file=sys.stderr)


atexit.register(_at_exit)
