"""Masked language modelling: which tokens of a sample are predicted, and what the model sees in their place.

Sources: Devlin et al., BERT, section 3.1 (task 1); whole words: google-research/bert README, May 2019; other rates:
Wettig et al., "Should You Mask 15% in Masked Language Modeling?", 2023; a rate that falls: Yang et al., "Learning
Better Masking for Better Language Model Pre-training", 2023.
"""

import numpy as np

MASK_PROB = 0.15  # as published
MASK_SHARES = (0.8, 0.1, 0.1)  # of the predicted tokens: [MASK], a random token, the token itself


def special_count(nsp: bool) -> int:
    """How many tokens of a sample are special, and never predicted: [CLS], and [SEP] after each of its texts."""
    return 3 if nsp else 2


def masked_count(real_tokens, mask_prob: float = MASK_PROB):
    """How many of ``real_tokens`` n (int or array; special tokens not counted) are predicted, int64:
    max(1, round(``mask_prob`` n)), halves to even."""
    return np.maximum(1, np.rint(mask_prob * np.asarray(real_tokens))).astype(np.int64)


def choose_tokens(keys: np.ndarray, counts: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """bool (tokens,): the tokens to predict of samples of ``counts`` (n,) real tokens each, one after another.

    ``keys`` (tokens,) are independent uniform integers; in a sample the ``wanted`` (n,) smallest win, of equal ones the
    first. So what is predicted at one rate is predicted at every higher one.
    """
    inside = np.arange(counts.max()) < counts[:, None]
    table = np.full(inside.shape, np.iinfo(np.uint64).max, dtype=np.uint64)
    table[inside] = keys
    largest = np.take_along_axis(np.sort(table, axis=1), wanted[:, None] - 1, axis=1)
    chosen = (table <= largest) & inside
    for row in np.flatnonzero(chosen.sum(axis=1) > wanted):  # equal keys, which hardly ever happens
        chosen[row] = False
        chosen[row, np.argsort(table[row, : counts[row]], kind="stable")[: wanted[row]]] = True
    return chosen[inside]


def choose_words(
    keys: np.ndarray, turns: np.ndarray, counts: np.ndarray, wanted: np.ndarray, begins: np.ndarray
) -> np.ndarray:
    """bool (tokens,): the tokens of the words to predict, those that begin where ``begins`` (tokens,) bool is true.

    A sample's words stand around a circle in random order (the keys of their first pieces); those are chosen that begin
    within its first ``wanted`` (samples,) tokens from a random one on (``turns`` (samples,), uniform below ``counts``).
    So every word, short, long or longer than that count, is chosen with probability ``wanted`` / tokens exactly, and
    these are how many tokens are expected. How many there are differs from it by less than the longest word has pieces,
    so they may be none. Source: systematic sampling in random order, Madow, "On the Theory of Systematic Sampling, II",
    1949; `create_pretraining_data.py` of google-research/bert passes over words that do not fit what is left.
    """
    starts = np.flatnonzero(begins)
    sizes = np.diff(starts, append=len(keys))
    sample = np.repeat(np.arange(len(counts)), counts)[starts]
    order = np.lexsort((keys[starts], sample))
    ahead = np.cumsum(sizes[order]) - sizes[order] - (np.cumsum(counts) - counts)[sample]  # words stay in their sample
    chosen = np.empty(len(starts), dtype=bool)
    chosen[order] = (ahead + turns[sample]) % counts[sample] < wanted[sample]
    return np.repeat(chosen, sizes)


def replace_tokens(
    tokens: np.ndarray,
    bits: np.ndarray,
    mask_id: int,
    vocabulary: np.ndarray,
    shares: tuple[float, float, float] = MASK_SHARES,
) -> np.ndarray:
    """What stands at the chosen positions: ``mask_id``, one of ``vocabulary``, uniform, or the token, by ``shares``.

    ``tokens`` int64 (k,); ``vocabulary`` int64, the ids that may be drawn; ``bits`` uint64 (k,), independent, uniform:
    the low half chooses the case, the high half the token.
    """
    case = (bits & np.uint64(0xFFFFFFFF)).astype(np.float64) / 2.0**32
    drawn = vocabulary[((bits >> np.uint64(32)) * np.uint64(len(vocabulary))) >> np.uint64(32)]
    return np.where(case < shares[0], mask_id, np.where(case < shares[0] + shares[1], drawn, tokens))
