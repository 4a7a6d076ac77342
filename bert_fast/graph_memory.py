"""Memory that a CUDA graph reads and no caller holds, such as an optimiser's table of addresses.

A graph knows addresses, not tensors, and may be replayed at any time. So what it reads must live as long as it does;
and no longer, or a run that records anew in every phase only grows. The recorder of a graph owns that memory.
"""

import contextlib
from collections.abc import Iterable, Iterator

import torch

_owner: list[torch.Tensor] | None = None  # of what is being recorded by bert_fast/train/cuda_graphs.py
_of_others: list[torch.Tensor] = []  # read by graphs that others record, who do not say when these go


@contextlib.contextmanager
def owned_by(owner: list[torch.Tensor]) -> Iterator[None]:
    """Around the recording of a graph: ``owner`` takes what :func:`keep` is given."""
    global _owner
    before, _owner = _owner, owner
    try:
        yield
    finally:
        _owner = before


def recording(device: torch.device) -> bool:
    """Whether work on ``device`` is being recorded rather than done."""
    return _owner is not None or (device.type == "cuda" and torch.cuda.is_current_stream_capturing())


def keep(tensors: Iterable[torch.Tensor]) -> None:
    """Keeps ``tensors``, which the graph that is being recorded reads, for as long as that graph's owner lives; those
    of a graph that somebody else records for ever."""
    (_of_others if _owner is None else _owner).extend(tensors)
