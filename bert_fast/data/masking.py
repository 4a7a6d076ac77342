"""Masked language modelling: which tokens of a sample are predicted, and what the model sees in their place.

Source: Devlin et al., BERT, section 3.1 (task 1); whole words: google-research/bert README, May 2019.
"""

import numpy as np

MASKED_FRACTION = 0.15


def masked_count(real_tokens):
    """How many of ``real_tokens`` (int or array; special tokens not counted) are predicted: max(1, round(0.15 n))."""
    return np.maximum(1, np.rint(MASKED_FRACTION * np.asarray(real_tokens))).astype(np.int64)


def choose_tokens(keys: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """bool (tokens,): the tokens to predict of samples of ``counts`` (n,) real tokens each, one after another.

    ``keys`` (tokens,) are independent uniform integers; in a sample the ``masked_count`` smallest win, of equal ones
    the first.
    """
    wanted = masked_count(counts)
    inside = np.arange(counts.max()) < counts[:, None]
    table = np.full(inside.shape, np.iinfo(np.uint64).max, dtype=np.uint64)
    table[inside] = keys
    largest = np.take_along_axis(np.sort(table, axis=1), wanted[:, None] - 1, axis=1)
    chosen = (table <= largest) & inside
    for row in np.flatnonzero(chosen.sum(axis=1) > wanted):  # equal keys, which hardly ever happens
        chosen[row] = False
        chosen[row, np.argsort(table[row, : counts[row]], kind="stable")[: wanted[row]]] = True
    return chosen[inside]


def choose_words(keys: np.ndarray, turns: np.ndarray, counts: np.ndarray, begins: np.ndarray) -> np.ndarray:
    """bool (tokens,): the tokens of the words to predict, those that begin where ``begins`` (tokens,) bool is true.

    A sample's words stand around a circle in random order (the keys of their first pieces); those are chosen that begin
    within its first ``masked_count`` tokens from a random one on (``turns`` (samples,), uniform below ``counts``). So
    every word, short, long or longer than that count, is chosen with probability ``masked_count`` / tokens exactly, and
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
    chosen[order] = (ahead + turns[sample]) % counts[sample] < masked_count(counts)[sample]
    return np.repeat(chosen, sizes)


def replace_tokens(tokens: np.ndarray, bits: np.ndarray, mask_id: int, vocabulary: np.ndarray) -> np.ndarray:
    """What stands at the chosen positions: 80 % ``mask_id``, 10 % one of ``vocabulary``, uniform, 10 % kept.

    ``tokens`` int64 (k,); ``vocabulary`` int64, the ids that have a token; ``bits`` uint64 (k,), independent, uniform:
    the low half chooses the case, the high half the token.
    """
    case = (bits & np.uint64(0xFFFFFFFF)).astype(np.float64) / 2.0**32
    drawn = vocabulary[((bits >> np.uint64(32)) * np.uint64(len(vocabulary))) >> np.uint64(32)]
    return np.where(case < 0.8, mask_id, np.where(case < 0.9, drawn, tokens))
