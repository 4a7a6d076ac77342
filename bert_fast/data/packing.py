"""Which samples share a packed batch: bins of a fixed token budget, filled in order and closed by the best fit."""

from collections import OrderedDict
from collections.abc import Iterable
from itertools import islice
from typing import NamedTuple

import numpy as np

from bert_fast.data.masking import masked_count


class Capacities(NamedTuple):
    """The fixed sizes of packed batches: tokens, sequences, predicted tokens."""

    tokens: int
    sequences: int
    masked: int


def capacities(tokens: int, max_length: int, sequences: int | None = None, *, whole_word: bool = False) -> Capacities:
    """Capacities for batches of ``tokens`` tokens; sequences default to a mean length of a quarter ``max_length``.

    With ``whole_word`` a sample may be one word and all of it predicted: there is room for that.
    Raises ValueError where one sample of ``max_length`` would not fit.
    """
    if tokens < max_length:
        raise ValueError(f"a budget of {tokens} tokens cannot hold one sequence of max_length {max_length}")
    sequences = max(1, 4 * tokens // max_length) if sequences is None else sequences
    if sequences < 1:
        raise ValueError(f"a packed batch needs room for at least one sequence, got {sequences}")
    masked = int(np.ceil(0.15 * tokens + 0.5 * sequences))
    return Capacities(tokens, sequences, max(1, masked, max_length if whole_word else 0))


def plan_batches(
    lengths: np.ndarray, order: Iterable[int], size: Capacities, *, nsp: bool = True,
    masked: np.ndarray | None = None, pool: int = 4096,
) -> list[np.ndarray]:  # fmt: skip
    """Deals samples into batches that fit ``size``; every sample of ``order`` is in exactly one.

    A batch takes samples in the order given (sample numbers, shuffled) until the longest might not fit;
    the rest of its budget goes to the longest that do fit among the next ``pool`` samples (at least four batches of
    sequences). So batches stay mixed,
    and hardly a token is wasted. A sequence is never cut or joined to another. Returns int64 arrays of sample
    numbers. ``lengths`` (samples,) counts special tokens (3 with ``nsp``, else 2), which are not predicted. ``masked``
    (samples,) are how many tokens each sample predicts; None: as many as ``masked_count`` says, not whole words.

    Raises ValueError for a sample that is longer than the budget, or predicts more than ``size`` holds.
    """
    lengths = np.asarray(lengths)
    order = np.asarray(order)
    if not len(order):
        return []
    longest = int(lengths[order].max())
    if longest > size.tokens:
        worst = order[lengths[order].argmax()]
        raise ValueError(f"sample {worst} has {longest} tokens, more than the budget of {size.tokens}")
    masked = masked_count(lengths - (3 if nsp else 2)) if masked is None else masked
    pool = max(pool, 4 * size.sequences)
    waiting: OrderedDict[int, None] = OrderedDict()  # the next samples, in order
    by_length: list[OrderedDict[int, None]] = [OrderedDict() for _ in range(longest + 1)]
    incoming = iter(order.tolist())
    batches: list[np.ndarray] = []
    while True:
        for sample in islice(incoming, pool - len(waiting)):
            waiting[sample] = None
            by_length[lengths[sample]][sample] = None
        if not waiting:
            return batches
        members: list[int] = []
        free, room = size.tokens, size.masked
        while waiting and len(members) < size.sequences:
            if free >= longest:
                sample = next(iter(waiting))
            else:
                fitting = next((n for n in range(min(free, longest), 0, -1) if by_length[n]), None)
                if fitting is None:
                    break
                sample = next(iter(by_length[fitting]))
            if masked[sample] > room:
                break
            del waiting[sample], by_length[lengths[sample]][sample]
            members.append(sample)
            free -= int(lengths[sample])
            room -= int(masked[sample])
        if not members:
            raise ValueError(f"sample {sample} predicts {masked[sample]} tokens, more than the capacity {size.masked}")
        batches.append(np.array(members))
