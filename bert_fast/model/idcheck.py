"""Ids and labels out of range: named by their place in the caller's batch, and on a GPU without waiting for it.

On a CPU the operators check what they are given, which is packed; :func:`naming` puts the caller's place in their
errors. On a GPU reading ids would stop the queue, so the embedding kernel writes NaN for such a row, and a one-byte
answer is copied to pinned memory behind it; the next forward pass (or the end of the process) looks at the answers that
have arrived and raises. Skipped while a model is being compiled or a CUDA graph captured, and where ids have no values
to read.
"""

import atexit
import contextlib
import sys
from collections.abc import Callable, Iterator

import torch

from bert_fast.ops import out_of_range, transformed
from bert_fast.packing import unreadable

_pending: list[tuple[torch.Tensor, torch.cuda.Event, int]] = []


def naming(find: Callable[[], IndexError | None]) -> contextlib.AbstractContextManager:
    """Around what raises IndexError for a value out of range: the error that ``find`` gives is raised in its stead, if
    it gives one. Nothing is done where values cannot be read, in a forward that is compiled or transformed."""
    hidden = torch.compiler.is_compiling() or transformed()
    return contextlib.nullcontext() if hidden else _naming(find)


@contextlib.contextmanager
def _naming(find: Callable[[], IndexError | None]) -> Iterator[None]:
    try:
        yield
    except IndexError as error:
        raise find() or error from None


def misplaced(
    config, mask: torch.Tensor | None, input_ids=None, token_type_ids=None, position_ids=None
) -> IndexError | None:
    """The error that names the first value out of range in one of these, of the caller's shapes, where ``mask``, if it
    is given, attends."""
    for name, values, size in (
        ("input_ids", input_ids, config.vocab_size),
        ("position_ids", position_ids, config.max_position_embeddings),
        ("token_type_ids", token_type_ids, config.type_vocab_size),
    ):
        if values is None:
            continue
        among = None if mask is None else mask != 0
        if among is not None and values.shape != among.shape:  # positions of all sequences
            among = among.flatten(0, -2).any(dim=0).expand(values.shape)
        if (error := out_of_range(name, values, size, among=among)) is not None:
            return error
    return None


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
