"""Masked language modelling: which tokens of a sample are predicted, and what the model sees in their place.

Source: Devlin et al., BERT, section 3.1 (task 1); whole words: google-research/bert README, May 2019.
"""

import numpy as np

MASKED_FRACTION = 0.15


def masked_count(real_tokens):
    """How many of ``real_tokens`` (int or array; special tokens not counted) are predicted: max(1, round(0.15 n))."""
    return np.maximum(1, np.rint(MASKED_FRACTION * np.asarray(real_tokens))).astype(np.int64)


def choose_positions(real: np.ndarray, continues: np.ndarray | None, keys: np.ndarray) -> np.ndarray:
    """The positions to predict, ascending int64, among ``real`` (n,), the positions of real tokens.

    ``keys`` (n,) are independent uniform integers; the smallest win. Without ``continues`` exactly
    ``masked_count(n)`` single tokens are taken. ``continues`` (n,) bool marks pieces that continue the word of the
    piece before: then whole words are taken in random order while they fit in that count, so it may be a little
    less, and none where every word is longer than the count.
    """
    wanted = int(masked_count(len(real)))
    if continues is None:
        return np.sort(real[np.argsort(keys, kind="stable")[:wanted]])
    apart = np.diff(real, prepend=real[0] - 2) != 1  # a piece cut off from its word starts one
    starts = np.flatnonzero(~continues | apart)
    sizes = np.diff(starts, append=len(real))
    chosen: list[int] = []
    for word in np.argsort(keys[starts], kind="stable"):
        if len(chosen) + sizes[word] <= wanted:
            chosen.extend(range(starts[word], starts[word] + sizes[word]))
            if len(chosen) == wanted:
                break
    return np.sort(real[np.array(chosen, dtype=np.int64)])


def replace_tokens(tokens: np.ndarray, bits: np.ndarray, mask_id: int, vocab_size: int) -> np.ndarray:
    """What stands at the chosen positions: 80 % ``mask_id``, 10 % a token uniform over the vocabulary, 10 % kept.

    ``tokens`` int64 (k,), ``bits`` uint64 (k,) independent and uniform: the low half chooses the case, the high
    half the token.
    """
    case = (bits & np.uint64(0xFFFFFFFF)).astype(np.float64) / 2.0**32
    drawn = ((bits >> np.uint64(32)) * np.uint64(vocab_size)) >> np.uint64(32)
    return np.where(case < 0.8, mask_id, np.where(case < 0.9, drawn.astype(np.int64), tokens))
