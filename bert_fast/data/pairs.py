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
there is the next step's. The label is drawn first and for every pair alike, half of them NotNext. Only what the texts
say shall tell it, so both labels' pairs are of one distribution of forms:

- What replaces a B is what follows an A in another document, and of the form of the B that it replaces: as many tokens
  and sentences, and it begins and ends with a sentence where that does. Of all such texts in the epoch's plan each is
  taken alike. A small corpus has few of a form; there A is ended at further places, for more texts.
- Where the text taken is within one sentence (a last or only one, a piece of a long one), A ends at any token of it
  that leaves B half of it or 16 tokens, each alike. So few documents come to an end of two tokens, where form tells:
- No step leaves one token of a document, which could only be NotNext. Of two left NotNext takes both: with one in A,
  the other would be left. Documents of one token give no pair; one is taken where no other document gives any.

Places within a sentence are not moved to where a word ends: a plan reads no token.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from bert_fast.data.masking import special_count
from bert_fast.dropout_mask import philox

IS_NEXT, NOT_NEXT, NO_LABEL = 0, 1, -100
BEGINS_WITHIN, ENDS_WITHIN = 1, 2  # a sentence: their sum is a text's form
COUNTED = 16  # sentences; texts of so many and of more are alike
LEAST_LEFT = 16  # tokens, or half of the text, that A leaves B within a sentence
TEXTS = 128  # to choose from where a B is replaced, for each length that a sequence holds: a small corpus gives them by
MOST_CUTS = 64  # further ends of each A, at most
WORD = 1 << 32
BLOCK = 1 << 20  # samples of which the random words are held at a time


class Tokens(Protocol):
    """An integer array, or anything whose slices are."""

    def __len__(self) -> int: ...

    def __getitem__(self, which: slice, /) -> np.ndarray: ...


@dataclass(frozen=True)
class Corpus:
    """Token ids of documents and where their sentences lie.

    tokens         (tokens,) integer array, memory-mapped or not, or anything whose slices ``[a:b]`` are arrays
    sentence_ends  int64 (sentences + 1,): token offset at which each sentence ends, after a leading 0
    documents      int64 (documents, 2): first sentence of each document and the one after its last
    """

    tokens: Tokens
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
    special = special_count(nsp)
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
    expected = 1 + document_tokens(corpus).sum() // capacity  # pairs, about
    streams = 3 + np.arange(min(TEXTS * capacity // expected, MOST_CUTS) // 4)[:, None]  # four words each
    steps: list[tuple[np.ndarray, ...]] = []
    while True:
        active = text.ends[text.last[document]] - position >= least
        document, sentence, position = document[active], sentence[active], position[active]
        if not len(document):
            break
        length_word, cut, choice, _ = _draw(seed, len(steps), document, epoch, 0)
        # below ``short`` the word is uniform there: one Philox call has all words of a step
        target = np.where(length_word < short, 2 + length_word * (capacity - 1) // max(short, 1), capacity)
        if nsp:
            further = _draw(seed, len(steps), document, epoch, streams) if len(streams) else ()
            cuts = np.concatenate([cut[None], *further]).T
            *sample, following, sentence = text.pairs(document, sentence, position, target, cuts, choice)
        else:
            following, sentence = text.filled(position, sentence, text.last[document], target, capacity, 1)
            sample = [following, following]
        steps.append((document, position, *sample))
        position = following
    if not steps:
        raise ValueError("no document has two tokens, so there is no pair: go without NSP" if nsp else "no text")
    if nsp:
        steps.append(text.unpaired(1 + 4 * len(streams)))
    return _planned(text, steps, special)


def _planned(text: "_Text", steps: list[tuple[np.ndarray, ...]], special: int) -> Plan:
    """The plan of what the walk's steps gave: document, a_start, a_end, b_end, and with NSP what ``pairs`` adds."""
    columns = list(zip(*steps, strict=True))
    steps.clear()
    order = np.argsort(np.concatenate(columns[0]), kind="stable")  # a document's samples are in order already
    columns = [np.concatenate(columns.pop(0))[order] for _ in range(len(columns))]  # one at a time: they are large
    document, a_start, a_end, b_end, *nsp = columns
    del order, columns
    if nsp:
        b_document, b_start, b_end = text.replaced(document, b_end, *nsp)
        label = nsp.pop() & 1
    else:
        b_document, b_start, label = document, a_end, np.full_like(document, NO_LABEL)
    length = a_end - a_start + b_end - b_start + special
    plan = Plan(document, a_start, a_end, b_document, b_start, b_end, label, length)
    paired = a_start < a_end
    return plan if paired.all() else Plan(*(column[paired] for column in vars(plan).values()))


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

    def pairs(self, document, sentence, begin, target, cuts, word) -> tuple[np.ndarray, ...]:
        """Pairs whose A begins at ``begin``: a_end, the end of the B that follows, where it would begin by each cut and
        its kinds, and ``word``; and the next step's place.

        ``cuts`` (steps, cuts) are random words for A's end, of which the first decides it. The lowest bit of ``word``
        is the label.
        """
        ends, capacity, last = self.ends, self.capacity, self.last[document]
        final = ends[last]
        end, after = self.filled(begin, sentence, last, target, capacity, 2)
        one_left = final - end == 1
        takes_it, leaves_two = one_left & (final - begin <= capacity), one_left & (final - begin > capacity)
        end, after = np.where(takes_it, final, end - leaves_two), np.where(takes_it, last, after)
        after = after - (ends[after] > end)
        divided = ends[after] < end

        furthest = np.minimum(end - 1, final - 2)  # where A may end
        bound = after - (ends[after] > furthest)
        bound = bound - (ends[bound] > furthest)  # the last sentence end up to there
        between = bound > sentence
        inside = np.minimum(furthest, np.maximum((begin + end) // 2, end - LEAST_LEFT)) - begin
        choices = np.where(between, bound - sentence, np.maximum(inside, 1))
        chosen = 1 + _below(cuts, choices[:, None])
        b_sentence = sentence[:, None] + between[:, None] * chosen
        starts = np.where(between[:, None], ends[b_sentence], begin[:, None] + chosen)
        form = ~between * BEGINS_WITHIN + divided * ENDS_WITHIN
        kinds = self.kinds(form[:, None], end[:, None] - starts, (after + divided)[:, None] - b_sentence)

        replaced = word & 1 == NOT_NEXT
        a_end = np.where(replaced & (final - begin == 2), final, starts[:, 0])
        following, sentence = np.where(replaced, a_end, end), np.where(replaced, b_sentence[:, 0], after)
        return a_end, end, starts, kinds, word, following, sentence

    def kinds(self, form, length, sentences) -> np.ndarray:
        """One number for form, length and number of sentences of texts, in this order.

        Where a text begins or ends within a sentence, the longer ones come first: they can be divided to be like it.
        """
        length = np.where(form == 0, length, self.capacity - length)
        kinds = (form * self.capacity + length) * COUNTED + np.minimum(sentences, COUNTED) - 1
        return kinds.astype(np.min_scalar_type(4 * self.capacity * COUNTED))  # 16 bits are sorted many times as fast

    def unpaired(self, cuts: int) -> tuple[np.ndarray, ...]:
        """The documents of one token, as a plan's columns: each is a B that follows no A."""
        document = np.flatnonzero(self.ends[self.last] - self.ends[self.first] == 1)
        begin = self.ends[self.first[document]]
        starts, ones = np.repeat(begin[:, None], cuts, axis=1), np.ones((len(begin), cuts), dtype=np.int64)
        return document, begin, begin, begin + 1, starts, self.kinds(0, ones, ones), 0 * begin + IS_NEXT

    def replaced(self, document, end, starts, kinds, word) -> tuple[np.ndarray, ...]:
        """b_document, b_start and b_end of pairs in the order of their documents, as ``pairs`` gives them.

        What replaces a B is any text of its kind in another document. Where there is none it is a text of the nearest
        kind before it, or after it if only the number of sentences differs, and is divided where it is longer.
        """
        cuts = starts.shape[1]
        order = np.argsort(kinds.ravel(), kind="stable")  # in each kind by document
        kinds, owner = kinds.ravel()[order], document.astype(np.int32)[order // cuts]
        new_kind, new_owner = (np.append(True, values[1:] != values[:-1]) for values in (kinds, owner))
        is_b = order % cuts == 0
        is_b &= (word & 1 == NOT_NEXT)[order // cuts]
        places = np.flatnonzero(is_b)
        b_document, b_start, b_end = document.copy(), starts[:, 0].copy(), end.copy()
        for wanted in np.split(places, range(BLOCK, len(places), BLOCK)):
            pair, kind = order[wanted] // cuts, kinds[wanted].astype(np.int64)
            first, beyond = _run(new_kind, wanted)
            own, own_end = _run(new_kind | new_owner, wanted)
            others = beyond - first - (own_end - own)
            place = first + _below(word[pair], others)
            place += (place >= own) * (own_end - own)
            alone = np.flatnonzero(others == 0)
            place[alone] = _nearest(kinds, *_run(new_owner, wanted[alone]), kind[alone])

            begin, text_end = starts.ravel()[order[place]], end[order[place] // cuts]
            too_much = np.maximum(text_end - begin - (b_end[pair] - b_start[pair]), 0)
            at_front = kind // COUNTED // self.capacity & BEGINS_WITHIN > 0
            b_document[pair] = owner[place]
            b_start[pair] = begin + at_front * too_much
            b_end[pair] = text_end - ~at_front * too_much
        return b_document, b_start, b_end


def _nearest(kinds, begin, end, wanted) -> np.ndarray:
    """The place just before ``begin`` or at ``end``, by which of ``kinds`` (sorted) there is nearer to ``wanted``.

    That at the end only if the number of sentences alone differs, or nothing is before.
    """
    before, after = (kinds[place].astype(np.int64) for place in (begin - 1, np.minimum(end, len(kinds) - 1)))
    nearer = (after // COUNTED == wanted // COUNTED) & (after - wanted < wanted - before)
    return np.where((begin == 0) | nearer & (end < len(kinds)), end, begin - 1)


def _run(new: np.ndarray, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where the run that each of ``places`` is in begins and ends, if one begins wherever ``new``."""
    begins = np.append(np.flatnonzero(new), len(new))
    run = np.searchsorted(begins, places, side="right")
    return begins[run - 1], begins[run]


def _draw(seed: int, step: int, document: np.ndarray, epoch: int, stream) -> tuple[np.ndarray, ...]:
    """Four independent uniform words (0 .. 2**32 - 1) a document, (streams, documents) for streams (streams, 1)."""
    key, of_step, of_epoch, of_stream = (
        np.atleast_1d(np.asarray(number, dtype=np.int64)) for number in (seed, step, epoch, 0x5041 << 8 | stream)
    )
    return philox(key, of_step, document, of_epoch, of_stream)


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
