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


def choose_words(keys: np.ndarray, counts: np.ndarray, begins: np.ndarray) -> np.ndarray:
    """As :func:`choose_tokens`, but whole words: those that begin where ``begins`` (tokens,) bool is true.

    Words are taken in random order (the key of their first piece) while they fit in ``masked_count``, so it may be a
    little less, and none where every word is longer than the count.
    """
    chosen = np.zeros(len(keys), dtype=bool)
    end = 0
    for count, wanted in zip(counts.tolist(), masked_count(counts).tolist(), strict=True):
        begin, end = end, end + count
        starts = begin + np.flatnonzero(begins[begin:end])
        sizes = np.diff(starts, append=end).tolist()
        order = np.argsort(keys[starts], kind="stable").tolist()
        starts = starts.tolist()
        for word in order:
            if sizes[word] <= wanted:
                chosen[starts[word] : starts[word] + sizes[word]] = True
                wanted -= sizes[word]
                if not wanted:
                    break
    return chosen


def replace_tokens(tokens: np.ndarray, bits: np.ndarray, mask_id: int, vocabulary: np.ndarray) -> np.ndarray:
    """What stands at the chosen positions: 80 % ``mask_id``, 10 % one of ``vocabulary``, uniform, 10 % kept.

    ``tokens`` int64 (k,); ``vocabulary`` int64, the ids that have a token; ``bits`` uint64 (k,), independent, uniform:
    the low half chooses the case, the high half the token.
    """
    case = (bits & np.uint64(0xFFFFFFFF)).astype(np.float64) / 2.0**32
    drawn = vocabulary[((bits >> np.uint64(32)) * np.uint64(len(vocabulary))) >> np.uint64(32)]
    return np.where(case < 0.8, mask_id, np.where(case < 0.9, drawn, tokens))
