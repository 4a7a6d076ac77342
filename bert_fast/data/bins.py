"""Which sequences share a packed batch. There are two ways, for two purposes:

- :func:`plan_batches` reads an epoch through, in batches of fixed capacities: it keeps the shuffled order, closes each
  batch by the best fit and leaves the last one as it comes. For ``PackedBatches``: evaluation, a loop of one's own.
- :func:`deal` parts the sequences of one update, which belong together whatever their order, into bins of nearly equal
  sums: ranks and micro-batches (:func:`micro_batches`, :func:`fitted`) then take the same time, and none is mostly
  empty.
"""

import heapq
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import NamedTuple

import numpy as np

from bert_fast.data.masking import MASK_PROB, masked_count, special_count


class Capacities(NamedTuple):
    """The fixed sizes of packed batches: tokens, sequences, predicted tokens."""

    tokens: int
    sequences: int
    masked: int


def capacities(
    tokens: int,
    max_length: int,
    sequences: int | None = None,
    *,
    whole_word: bool = False,
    mask_prob: float = MASK_PROB,
) -> Capacities:
    """Capacities for batches of ``tokens`` tokens; sequences default to a mean length of a quarter ``max_length``.

    With ``whole_word`` a sample may be one word and all of it predicted: there is room for that.
    Raises ValueError where one sample of ``max_length`` would not fit.
    """
    if tokens < max_length:
        raise ValueError(f"a budget of {tokens} tokens cannot hold one sequence of max_length {max_length}")
    sequences = max(1, 4 * tokens // max_length) if sequences is None else sequences
    if sequences < 1:
        raise ValueError(f"a packed batch needs room for at least one sequence, got {sequences}")
    masked = int(np.ceil(mask_prob * tokens + 0.5 * sequences))
    return Capacities(tokens, sequences, max(1, masked, max_length if whole_word else 0))


def plan_batches(
    lengths: np.ndarray, order: Iterable[int], size: Capacities, *, nsp: bool = True,
    masked: np.ndarray | None = None, pool: int = 4096,
) -> list[np.ndarray]:  # fmt: skip
    """Deals samples into batches that fit ``size``; every sample of ``order`` is in exactly one.

    A batch takes samples in the order given (sample numbers, shuffled) until the longest might not fit;
    the rest of its budget goes to the longest that do fit among the next ``pool`` samples (at least four batches of
    sequences). So batches stay mixed, and hardly a token is wasted. A sequence is never cut or joined to another.

    Returns int64 arrays of sample numbers. ``lengths`` (samples,) counts special tokens, which are not predicted;
    ``nsp`` says how many. ``masked`` (samples,) are how many tokens each sample predicts; None: as many
    as ``masked_count`` says, not whole words.

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
    masked = masked_count(lengths - special_count(nsp)) if masked is None else masked
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


def batches_by_length(lengths: Sequence[int], tokens: int) -> Iterator[list[int]]:
    """The numbers of sequences of ``lengths``, those of like lengths together, shortest first: batches of at most
    ``tokens`` tokens, or of one sequence that has more."""
    members: list[int] = []
    size = 0
    for number in sorted(range(len(lengths)), key=lengths.__getitem__):
        if members and size + lengths[number] > tokens:
            yield members
            members, size = [], 0
        members.append(number)
        size += lengths[number]
    if members:
        yield members


def deal(lengths: np.ndarray, bins: int) -> list[np.ndarray]:
    """Deals sequences of ``lengths`` into ``bins`` of nearly equal sums: longest first, each to the emptiest bin.

    Returns the numbers of each bin's sequences, the longest first: kernels that start them in this order end with short
    ones. Source: Graham, "Bounds on multiprocessing timing anomalies", 1969 (at most a third above the
    best possible; far less for many sequences).
    """
    heap = [(0, number) for number in range(bins)]
    members: list[list[int]] = [[] for _ in range(bins)]
    for sequence in np.argsort(-lengths, kind="stable").tolist():
        total, number = heap[0]
        members[number].append(sequence)
        heapq.heapreplace(heap, (total + int(lengths[sequence]), number))
    return [np.array(part, dtype=np.int64) for part in members]


def micro_batches(lengths: np.ndarray, members: np.ndarray, tokens: int) -> list[np.ndarray]:
    """Splits ``members`` (numbers into ``lengths``) into as few batches of at most ``tokens`` as :func:`deal` finds.

    ValueError for a longer sequence.
    """
    own = lengths[members]
    if own.max() > tokens:
        raise ValueError(f"a sequence of {own.max()} tokens does not fit a micro-batch of {tokens} tokens")
    dealt = _dealt(own, tokens)
    return [members[part] for part in next(p for p in dealt if all(own[part].sum() <= tokens for part in p))]


def fitted(lengths: np.ndarray, masked: np.ndarray, sizes: Sequence[Capacities]) -> tuple[list[np.ndarray], Capacities]:
    """As few micro-batches as :func:`deal` finds that fit one of ``sizes``, ascending, and the first that holds all.

    ``lengths`` and ``masked`` (sequences,) are an update's. ValueError where even single sequences do not fit.
    """
    for parts in _dealt(lengths, sizes[-1].tokens):
        needs = needed(lengths, masked, parts)
        for size in sizes:
            if all(has <= room for has, room in zip(needs, size, strict=True)):
                return parts, size
    raise ValueError(f"an update needs micro-batches of {needs}, more than {sizes[-1]}")


def needed(lengths: np.ndarray, masked: np.ndarray, parts: Sequence[np.ndarray]) -> Capacities:
    """The most tokens, sequences and predicted tokens that one of ``parts`` has."""
    return Capacities(
        max(int(lengths[part].sum()) for part in parts),
        max(len(part) for part in parts),
        max(int(masked[part].sum()) for part in parts),
    )


def _dealt(lengths: np.ndarray, tokens: int) -> Iterator[list[np.ndarray]]:
    """``lengths`` dealt into as few bins as could be of ``tokens`` each, into one more, and so on to one a sequence."""
    fewest = min(-(-int(lengths.sum()) // tokens), len(lengths))
    for bins in range(fewest, len(lengths) + 1):
        yield [part for part in deal(lengths, bins) if len(part)]
