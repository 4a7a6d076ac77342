"""Which sentences make which sample of an epoch: next-sentence-prediction pairs, or runs of one document.

A plan is a pure function of (corpus, seed, epoch): every draw is Philox keyed by the seed, at the counter (step in
the document, document, epoch). The walk takes one step in all documents at a time, so it is NumPy throughout.
Source: Devlin et al., BERT, section A.2, and `create_pretraining_data.py` of google-research/bert. One difference:
the label is drawn first and for every pair alike, so that exactly half are expected to be NotNext; a last
sentence that is left alone in its document starts no pair (in other epochs the walk ends elsewhere).
"""

from dataclasses import dataclass

import numpy as np

from bert_fast.random import philox

IS_NEXT, NOT_NEXT, NO_LABEL = 0, 1, -100
WORD = 1 << 32
BLOCK = 1 << 20  # samples of which the random words are held at a time


@dataclass(frozen=True)
class Corpus:
    """Token ids of documents and where their sentences lie.

    tokens         (tokens,) integer array, memory-mapped or not, or anything whose slices ``[a:b]`` are arrays
    sentence_ends  int64 (sentences + 1,): token offset at which each sentence ends, after a leading 0
    documents      int64 (documents, 2): first sentence of each document and the one after its last
    """

    tokens: np.ndarray
    sentence_ends: np.ndarray
    documents: np.ndarray


@dataclass(frozen=True)
class Plan:
    """The samples of one epoch, in the order of the corpus; all arrays are (samples,) int64.

    A is sentences ``a_start .. a_end`` (exclusive), B is ``b_start .. b_end``; B is empty without NSP. ``length``
    is the number of tokens after truncation, special tokens included; ``label`` 0 IsNext, 1 NotNext, -100 no NSP.
    """

    document: np.ndarray
    a_start: np.ndarray
    a_end: np.ndarray
    b_document: np.ndarray
    b_start: np.ndarray
    b_end: np.ndarray
    label: np.ndarray
    length: np.ndarray

    def __len__(self) -> int:
        return len(self.length)

    def rows(self, indices: np.ndarray) -> np.ndarray:
        """(n, 5): a_start, a_end, b_start, b_end and label of samples ``indices`` (n,), what they are made from."""
        columns = (self.a_start, self.a_end, self.b_start, self.b_end, self.label)
        return np.stack([column[indices] for column in columns], axis=1)


def plan_epoch(
    corpus: Corpus, *, seed: int, epoch: int, max_length: int, short_seq_prob: float = 0.1, nsp: bool = True
) -> Plan:
    """Plans all samples of ``epoch``; target length ``max_length``, shorter with probability ``short_seq_prob``.

    Raises ValueError for an impossible length or probability, and for a corpus that gives no sample.
    """
    capacity = max_length - (3 if nsp else 2)
    if capacity < 2:
        raise ValueError(f"max_length {max_length} leaves fewer than two tokens beside [CLS] and [SEP]")
    if not 0.0 <= short_seq_prob <= 1.0:
        raise ValueError(f"short_seq_prob must be between 0 and 1, got {short_seq_prob}")
    if nsp and len(corpus.documents) < 2:
        raise ValueError(
            f"next-sentence prediction needs two documents, this corpus has {len(corpus.documents)}: "
            "separate documents by blank lines, or go without NSP"
        )
    ends = corpus.sentence_ends
    first, last = corpus.documents[:, 0], corpus.documents[:, 1]
    at_least = 2 if nsp else 1
    document = np.arange(len(first))
    position = np.array(first)
    steps: list[np.ndarray] = []
    step = 0
    while True:
        active = last[document] - position >= at_least
        document, position = document[active], position[active]
        if not len(document):
            break
        short, shorter, cut, coin = _draw(seed, step, document, epoch, 0)
        target = np.where(short < short_seq_prob * WORD, 2 + _below(shorter, capacity - 1), capacity)
        begin = ends[position]
        if nsp:
            end = np.clip(np.searchsorted(ends, begin + target), position + 2, last[document])
            a_end = position + 1 + _below(cut, end - position - 1)
            label = np.where(coin < WORD // 2, IS_NEXT, NOT_NEXT)
            b = _random_b(corpus, document, target - (ends[a_end] - begin), _draw(seed, step, document, epoch, 1))
            following = (document, a_end, end)
            b_document, b_start, b_end = (np.where(label == IS_NEXT, f, r) for f, r in zip(following, b, strict=True))
            position_after = np.where(label == IS_NEXT, end, a_end)
        else:
            a_end = np.searchsorted(ends, begin + target, side="right") - 1
            a_end = np.clip(a_end, position + 1, last[document])
            b_document, b_start, b_end = document, a_end, a_end
            label = np.full_like(document, NO_LABEL)
            position_after = a_end
        tokens = ends[a_end] - begin + ends[b_end] - ends[b_start]
        length = np.minimum(tokens, capacity) + max_length - capacity
        steps.append((document, position, a_end, b_document, b_start, b_end, label, length))
        position = position_after
        step += 1
    if not steps:
        raise ValueError("no document has two sentences, so there is no pair: go without NSP" if nsp else "no text")
    columns = list(zip(*steps, strict=True))
    del steps
    order = np.lexsort((np.concatenate(columns[1]), np.concatenate(columns[0])))
    return Plan(*(np.concatenate(columns.pop(0))[order] for _ in range(len(columns))))  # one at a time: they are large


def _random_b(corpus: Corpus, document, target, draws) -> tuple[np.ndarray, ...]:
    """From a random sentence of another document, sentences until ``target`` tokens or the document's end."""
    first, last = corpus.documents[:, 0], corpus.documents[:, 1]
    other = _below(draws[0], len(first) - 1)
    other = other + (other >= document)
    start = first[other] + _below(draws[1], last[other] - first[other])
    goal = corpus.sentence_ends[start] + np.maximum(target, 1)
    return other, start, np.clip(np.searchsorted(corpus.sentence_ends, goal), start + 1, last[other])


def _draw(seed: int, step: int, document: np.ndarray, epoch: int, stream: int) -> tuple[np.ndarray, ...]:
    """Four independent uniform words (0 .. 2**32 - 1) for every document."""
    seed, step, epoch, stream = (
        np.array([number], dtype=np.int64) for number in (seed, step, epoch, 0x5041 << 8 | stream)
    )
    return philox(seed, step, document, epoch, stream)


def _below(word: np.ndarray, bound) -> np.ndarray:
    """Uniform in 0 .. bound - 1 (bound < 2**31), from a uniform word."""
    return (word * bound) >> 32


def permutation(count: int, *, seed: int, epoch: int) -> np.ndarray:
    """int64 (count,): the order in which an epoch goes through its samples, a function of (seed, epoch) alone."""
    keys = np.empty(count, dtype=np.uint64)
    for begin in range(0, count, BLOCK):
        index = np.arange(begin, min(begin + BLOCK, count))
        high, low, *_ = _draw(seed, 0, index, epoch, 2)
        keys[index] = high.astype(np.uint64) << np.uint64(32) | low.astype(np.uint64)
    return np.argsort(keys, kind="stable")


def truncated_lengths(a: np.ndarray, b: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Lengths of A and B once tokens went one by one from the longer (B where equal) until both fit ``capacity``."""
    a, b = np.asarray(a), np.asarray(b)
    half = capacity // 2
    a_kept = np.where(a <= b, np.minimum(a, capacity - half), np.maximum(capacity - b, capacity - half))
    b_kept = np.where(a <= b, np.maximum(capacity - a, half), np.minimum(b, half))
    fits = a + b <= capacity
    return np.where(fits, a, a_kept), np.where(fits, b, b_kept)
