"""Which samples share a packed batch: bins of a fixed token budget, filled by best fit, decreasing."""

from bisect import bisect_left, insort
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from bert_fast.data.masking import masked_count


class Capacities(NamedTuple):
    """The fixed sizes of packed batches: tokens, sequences, predicted tokens."""

    tokens: int
    sequences: int
    masked: int


def capacities(tokens: int, max_length: int, sequences: int | None = None) -> Capacities:
    """Capacities for batches of ``tokens`` tokens; sequences default to a mean length of a quarter ``max_length``.

    Raises ValueError where one sample of ``max_length`` would not fit.
    """
    if tokens < max_length:
        raise ValueError(f"a budget of {tokens} tokens cannot hold one sequence of max_length {max_length}")
    sequences = max(1, 4 * tokens // max_length) if sequences is None else sequences
    if sequences < 1:
        raise ValueError(f"a packed batch needs room for at least one sequence, got {sequences}")
    return Capacities(tokens, sequences, max(1, int(np.ceil(0.15 * tokens + 0.5 * sequences))))


def plan_batches(
    lengths: np.ndarray, order: Iterable[int], size: Capacities, *, nsp: bool = True, window: int = 32
) -> list[np.ndarray]:
    """Deals samples into batches that fit ``size``; every sample of ``order`` is in exactly one.

    Within ``window`` budgets' worth of samples of ``order`` (sample numbers, shuffled) the longest go first, each
    into the fullest bin that still takes it; the bins keep the random order of their first samples. A sequence is
    never cut or joined to another. Returns int64 arrays of sample numbers. ``lengths`` (samples,) counts special
    tokens (3 with ``nsp``, else 2), which are not predicted.
    """
    lengths = np.asarray(lengths)
    order = np.asarray(order)
    if len(order) and lengths[order].max() > size.tokens:
        worst = order[lengths[order].argmax()]
        raise ValueError(f"sample {worst} has {lengths[worst]} tokens, more than the budget of {size.tokens}")
    masked = masked_count(lengths - (3 if nsp else 2))
    starts = np.searchsorted(np.cumsum(lengths[order]), np.arange(0, int(lengths[order].sum()), window * size.tokens))
    batches: list[np.ndarray] = []
    open_bins: list[list[int]] = []  # carried over, so that only the last window of an epoch leaves bins half full
    for begin, end in zip(starts, [*starts[1:], len(order)], strict=True):
        batches_here, open_bins = _fill(order[begin:end], lengths, masked, size, open_bins)
        batches += batches_here
    return batches + [np.array(members) for members in open_bins]


def _fill(samples, lengths, masked, size: Capacities, bins: list[list[int]]):
    """Best fit decreasing of ``samples`` into open ``bins``; returns the full bins and the one to four emptiest."""
    rank = {sample: place for place, sample in enumerate(samples)}
    bins = [list(members) for members in bins]
    free = [size.tokens - int(lengths[members].sum()) for members in bins]
    room = [size.masked - int(masked[members].sum()) for members in bins]
    by_free = sorted((space, number) for number, space in enumerate(free))
    for sample in samples[np.argsort(-lengths[samples], kind="stable")]:
        length, predicted = int(lengths[sample]), int(masked[sample])
        place = bisect_left(by_free, (length, -1))
        while place < len(by_free):
            number = by_free[place][1]
            if len(bins[number]) < size.sequences and room[number] >= predicted:
                by_free.pop(place)
                break
            place += 1
        else:
            number = len(bins)
            bins.append([])
            free.append(size.tokens)
            room.append(size.masked)
        bins[number].append(int(sample))
        free[number] -= length
        room[number] -= predicted
        insort(by_free, (free[number], number))
    emptiest = {number for space, number in by_free[-4:] if space > size.tokens // 100}
    full = [members for number, members in enumerate(bins) if number not in emptiest]
    full.sort(key=lambda members: min(rank.get(sample, -1) for sample in members))
    return [np.array(members) for members in full], [bins[number] for number in sorted(emptiest)]
