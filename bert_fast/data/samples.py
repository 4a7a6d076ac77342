"""From planned pairs to masked samples, many at a time: every step but the reading of text is one NumPy operation."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from bert_fast.data.batches import Sample
from bert_fast.data.masking import (
    MASK_PROB,
    MASK_SHARES,
    choose_tokens,
    choose_words,
    masked_count,
    replace_tokens,
    special_count,
)
from bert_fast.data.pairs import NO_LABEL, Corpus, require_known
from bert_fast.data.tokenizer import SpecialIds

RULE = 4  # of which sample is which, in plans and here; a run cannot go on by another
KEY, BITS, TURN = range(3)  # what a sample's random words are for, in this order


@dataclass
class SampleMaker:
    """Makes samples of ``corpus``; each is a function of (seed, epoch, index) and its row of the plan.

    Token ids are below ``rows``, ``vocabulary`` int64 are those that may be drawn in a token's place, and ``continues``
    (rows,) bool tells the pieces that continue a word, for whole-word masking; else None. ``mask_prob`` and
    ``mask_shares`` are as of :class:`PretrainingDataset`.
    """

    corpus: Corpus
    seed: int
    nsp: bool
    special: SpecialIds
    rows: int
    vocabulary: np.ndarray
    continues: np.ndarray | None
    mask_prob: float = MASK_PROB
    mask_shares: tuple[float, float, float] = MASK_SHARES

    def __call__(
        self, epoch: int | np.ndarray, indices: np.ndarray, rows: np.ndarray, mask_prob: float | None = None
    ) -> list[Sample]:
        """Samples ``indices`` (n,) of ``epoch``, or each of its own, from ``rows`` (n, 5) of plans (``Plan.rows``).

        ``mask_prob`` goes before that of all samples.
        """
        texts = 2 if self.nsp else 1  # A and B, or one run
        begin, sizes = rows[:, 0 : 2 * texts : 2], np.diff(rows[:, :4])[:, 0 : 2 * texts : 2]
        real = sizes.sum(axis=1)
        wanted = masked_count(real, self.mask_prob if mask_prob is None else mask_prob)
        needs = np.stack([real, wanted, 0 * real] if self.continues is None else [real, real, real**0], axis=1)
        words = random_words(self.seed, epoch, indices, needs.sum(axis=1))
        use = np.repeat(np.tile(np.arange(3, dtype=np.int8), len(needs)), needs.ravel())
        spans = list(zip(begin.ravel().tolist(), (begin + sizes).ravel().tolist(), strict=True))

        # [CLS] A [SEP] B [SEP] of all samples, one after another
        lengths = real + special_count(self.nsp)
        offsets = _before(lengths)
        cls, after_a, last = offsets[:-1], offsets[:-1] + sizes[:, 0] + 1, offsets[1:] - 1
        ids = np.empty(offsets[-1], dtype=np.int64)
        is_real = np.ones(len(ids), dtype=bool)
        for place, token in ((cls, self.special.cls), (after_a, self.special.sep), (last, self.special.sep)):
            ids[place], is_real[place] = token, False
        places = np.flatnonzero(is_real)
        ids[places] = np.concatenate([self.corpus.tokens[start:end] for start, end in spans])
        if ids.max(initial=0) >= self.rows:
            require_known(self.corpus, spans, self.rows)
        segments = (np.arange(len(ids)) > np.repeat(after_a, lengths)).astype(np.int64)

        bits = words[use == BITS]
        if self.continues is None:
            chosen = choose_tokens(words[use == KEY], real, wanted)
        else:  # a piece cut off from its word starts one
            begins = ~self.continues[ids[places]] | (np.diff(places, prepend=-1) != 1)
            turns = (words[use == TURN] >> np.uint64(32)).astype(np.int64) * real >> 32
            chosen = choose_words(words[use == KEY], turns, real, wanted, begins)
            bits = bits[chosen]
        masked = places[chosen]
        labels = ids[masked]
        ends = _before(chosen)[_before(real)]
        ids[masked] = replace_tokens(labels, bits, self.special.mask, self.vocabulary, self.mask_shares)
        masked -= np.repeat(cls, np.diff(ends))

        nsp_labels = rows[:, 4].tolist() if self.nsp else [NO_LABEL] * len(rows)
        offsets, ends = offsets.tolist(), ends.tolist()
        return [
            Sample(ids[begin:end], segments[begin:end], masked[first:last], labels[first:last], label, index)
            for begin, end, first, last, label, index in zip(
                offsets[:-1], offsets[1:], ends[:-1], ends[1:], nsp_labels, indices.tolist(), strict=True
            )
        ]


def random_words(seed: int, epoch: int | np.ndarray, indices: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """uint64 (counts.sum(),): the first ``counts`` (n,) words that Philox 4x64 keyed (seed, epoch, index) gives.

    Raw words of the bit generator: its stream is fixed for ever, those of NumPy's distributions are not. One generator
    turned to key after key, for making one costs more than drawing from it.
    """
    source = np.random.Philox(key=0)
    state: Any = source.state
    state["state"]["counter"] = state["buffer"] = (0, 0, 0, 0)  # plain numbers are read faster than arrays
    words = np.empty(counts.sum(), dtype=np.uint64)
    begin = 0
    keys = np.broadcast_to(epoch, indices.shape).astype(np.uint64) << np.uint64(32) | indices.astype(np.uint64)
    for key, count in zip(keys.tolist(), counts.tolist(), strict=True):
        state["state"]["key"] = (seed % 2**64, key)
        source.state = state
        words[begin : begin + count] = source.random_raw(count)
        begin += count
    return words


def _before(counts: np.ndarray) -> np.ndarray:
    """int64 (n + 1,): the sum of ``counts`` (n,) before each, and of all at the end."""
    sums = np.zeros(len(counts) + 1, dtype=np.int64)
    np.cumsum(counts, out=sums[1:])
    return sums
