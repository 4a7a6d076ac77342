"""Which tokens make which sample of an epoch: next-sentence-prediction pairs, or runs of one document.

A plan is a pure function of (corpus, seed, epoch): every draw is Philox keyed by the seed, at the counter (step in
the document, document, epoch). The walk takes one step in all documents at a time, so it is NumPy throughout.

**In an epoch every token of every document is in one sample**, as A or as a B that truly follows it; what is drawn as
another document's B comes on top. So nothing of either is cut, where BERT's own script fills a sequence beyond its
target and cuts A and B down to it. A step of the walk begins where the last one ended. It takes sentences while they
fit the target length (FULL-SENTENCES in Liu et al., RoBERTa, section 4.2), and at least two for a pair. A sentence is
divided only where these two, or it alone without NSP, do not fit the longest sequence: the target ends it, and the
rest begins the next sample. A next sentence longer than any sequence is divided for what the target leaves.

**Pairs** (Devlin et al., BERT, section A.2, and `create_pretraining_data.py` of google-research/bert): A ends at any
sentence end within the text taken, each alike. If the label is NotNext, another document's text follows, and what stood
there is the next step's. The label is drawn first and for every pair alike, half of them NotNext. Its form should not
tell it:

- Where the text taken is within one sentence (a last or only one, a piece of a long one), A ends at any token of it,
  each alike, with either label. B of another document then begins at any token, too, and ends with its sentence; else
  it begins with a sentence. In both it is filled as the text taken is, to the length of the B that it stands for at a
  document's end, and its end alone is divided, never its beginning.
- No step leaves one token of a document, which could only be NotNext. Of two left NotNext takes both: with one in A,
  the other would be left. Documents of one token give no pair.

Places within a sentence are not moved to where a word ends: a plan reads no token.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from bert_fast.dropout_mask import philox

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


def require_known(corpus: Corpus, spans: Iterable[tuple[int, int]], rows: int) -> None:
    """ValueError naming the first token of ``corpus`` in ``spans``, (begin, end) each, whose id is ``rows`` or more."""
    for begin, end in spans:
        tokens = np.asarray(corpus.tokens[begin:end])
        for place in np.flatnonzero(tokens >= rows)[:1]:
            what = f"token {begin + place:,} of the corpus has id {tokens[place]}, of a vocabulary of {rows:,}"
            if hasattr(corpus.tokens, "file_of"):  # ShardedTokens
                path = corpus.tokens.file_of(begin)
                folder = path.parents[1]
                raise ValueError(f"shard {path} is damaged ({what}): `bert-fast verify {folder}` tells of every file")
            raise ValueError(f"{what}: encode it with the tokenizer that it is used with")


@dataclass(frozen=True)
class Plan:
    """The samples of one epoch, in the order of the corpus; all arrays are (samples,) int64.

    A is tokens ``a_start .. a_end`` (exclusive) of the corpus, B is ``b_start .. b_end``; B is empty without NSP.
    ``length`` is the number of tokens, special ones included; ``label`` 0 IsNext, 1 NotNext, -100 no NSP.
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

    @property
    def held(self) -> int:
        """How many tokens of the documents the epoch holds, as A or as the B that follows it."""
        return int((self.a_end - self.a_start).sum() + (self.b_end - self.b_start)[self.label == IS_NEXT].sum())

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
    special = 3 if nsp else 2
    capacity, least = max_length - special, fewest_tokens(nsp)
    if capacity < (fewest := 3 if nsp else 2):  # A of two tokens leaves room for B
        raise ValueError(f"max_length {max_length} leaves fewer than {fewest} tokens beside [CLS] and [SEP]")
    if not 0.0 <= short_seq_prob <= 1.0:
        raise ValueError(f"short_seq_prob must be between 0 and 1, got {short_seq_prob}")
    if nsp and len(corpus.documents) < 2:
        raise ValueError(
            f"next-sentence prediction needs two documents, this corpus has {len(corpus.documents)}: "
            "separate documents by blank lines, or go without NSP"
        )
    text = _Text(np.asarray(corpus.sentence_ends), np.asarray(corpus.documents), capacity)
    document = np.arange(len(text.first))
    sentence, position, short = np.array(text.first), text.ends[text.first], int(short_seq_prob * WORD)
    steps: list[tuple[np.ndarray, ...]] = []
    while True:
        active = text.ends[text.last[document]] - position >= least
        document, sentence, position = document[active], sentence[active], position[active]
        if not len(document):
            break
        length_word, *words = _draw(seed, len(steps), document, epoch, 0)
        # below ``short`` the word is uniform there: one Philox call has all words of a step
        target = np.where(length_word < short, 2 + length_word * (capacity - 1) // max(short, 1), capacity)
        if nsp:
            *sample, following, sentence = text.pairs(document, sentence, position, target, words)
        else:
            following, sentence = text.filled(position, sentence, text.last[document], target, capacity, 1)
            sample = following, document, following, following, np.full_like(document, NO_LABEL)
        a_end, b_document, b_start, b_end, label = sample
        length = a_end - position + b_end - b_start + special
        steps.append((document, position, a_end, b_document, b_start, b_end, label, length))
        position = following
    if not steps:
        raise ValueError("no document has two tokens, so there is no pair: go without NSP" if nsp else "no text")
    columns = list(zip(*steps, strict=True))
    del steps
    order = np.argsort(np.concatenate(columns[0]), kind="stable")  # a document's samples are in order already
    return Plan(*(np.concatenate(columns.pop(0))[order] for _ in range(len(columns))))  # one at a time: they are large


def fewest_tokens(nsp: bool) -> int:
    """How many tokens a document needs to give a sample."""
    return 2 if nsp else 1


def document_tokens(corpus: Corpus) -> np.ndarray:
    """int64 (documents,): how many tokens each has."""
    documents = np.asarray(corpus.documents)
    return np.asarray(corpus.sentence_ends[documents[:, 1]] - corpus.sentence_ends[documents[:, 0]])


class _Text:
    """A corpus' sentences, and one step of the walk through many of its documents; all arrays are (steps,) int64.

    A place is a token and the sentence that it is in: its number, from 0 on.
    """

    def __init__(self, ends: np.ndarray, documents: np.ndarray, capacity: int):
        self.ends, self.first, self.last, self.capacity = ends, documents[:, 0], documents[:, 1], capacity

    def filled(self, begin, sentence, last, target, room, units: int) -> tuple[np.ndarray, np.ndarray]:
        """The place where the text from ``begin`` in ``sentence`` on ends, at the latest where ``last`` begins.

        Sentences are taken while they fit ``target`` tokens, and ``units`` of them at least if they fit ``room``. Where
        those do not, or the next one is longer than any sequence, the target divides a sentence.
        """
        ends = self.ends
        whole = np.minimum(np.searchsorted(ends, begin + target, side="right") - 1, last)
        taken = np.maximum(whole, np.minimum(sentence + units, last))
        end = ends[taken]
        too_much = end - begin > room
        goes_on = (ends[np.minimum(taken + 1, last)] - end > self.capacity) & (end - begin < target)
        return np.where(too_much | goes_on, begin + target, end), np.where(too_much, whole, taken)

    def pairs(self, document, sentence, begin, target, words) -> tuple[np.ndarray, ...]:
        """a_end, b_document, b_start, b_end and label of pairs whose A begins at ``begin``; and the next step's place.

        ``words`` are three random words of each pair: for A's end and, by its lowest bit, the label; for another
        document; and for its text.
        """
        ends, capacity, last = self.ends, self.capacity, self.last[document]
        final = ends[last]
        end, after = self.filled(begin, sentence, last, target, capacity, 2)
        one_left = final - end == 1
        takes_it, leaves_two = one_left & (final - begin <= capacity), one_left & (final - begin > capacity)
        end, after = np.where(takes_it, final, end - leaves_two), np.where(takes_it, last, after)
        after = after - (ends[after] > end)

        furthest = np.minimum(end - 1, final - 2)  # where A may end
        bound = after - (ends[after] > furthest)
        bound = bound - (ends[bound] > furthest)  # the last sentence end up to there
        between = bound > sentence
        a_sentence = sentence + np.where(between, 1 + _below(words[0], bound - sentence), 0)
        inside = begin + 1 + _below(words[0], np.maximum(furthest - begin, 1))
        a_end = np.where(between, ends[a_sentence], inside)

        label = words[0] & 1  # IS_NEXT or NOT_NEXT
        next_end = np.where(end == final, end, np.maximum(end, begin + target))
        replaced = np.flatnonzero(label == NOT_NEXT)
        all_of_it = replaced[(final - begin)[replaced] == 2]
        a_end[all_of_it] = final[all_of_it]
        between[all_of_it] = True
        texts = self.other_text(
            document[replaced], between[replaced], (next_end - a_end)[replaced], (begin + capacity - a_end)[replaced],
            words[1][replaced], words[2][replaced],
        )  # fmt: skip
        b_document, b_start, b_end = document.copy(), a_end.copy(), end.copy()
        for column, values in zip((b_document, b_start, b_end), texts, strict=True):
            column[replaced] = values
        end[replaced], after[replaced] = a_end[replaced], a_sentence[replaced]
        return a_end, b_document, b_start, b_end, label, end, after

    def other_text(self, document, whole, target, room, word, place) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Document, begin and end of text of another document than ``document``, of at most ``room`` tokens.

        It begins with any of its sentences, each alike, where ``whole``; else at any of its tokens but the first, and
        then it ends with that token's sentence.
        """
        other = _below(word, len(self.first) - 1)
        other = other + (other >= document)
        first, last = self.first[other], self.last[other]
        tokens = self.ends[last] - self.ends[first]
        sentence = first + _below(place, last - first)
        within = self.ends[first] + np.minimum(1, tokens - 1) + _below(place, np.maximum(tokens - 1, 1))
        begin = np.where(whole, self.ends[sentence], within)
        sentence = np.searchsorted(self.ends, begin, side="right") - 1
        target = np.minimum(np.maximum(target, 1), room)
        end, _ = self.filled(begin, sentence, np.where(whole, last, sentence + 1), target, room, 1)
        return other, begin, end


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
