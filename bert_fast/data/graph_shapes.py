"""Few shapes for the micro-batches of a phase, so that a CUDA graph of each serves all of its updates.

Packed batches of exactly as many tokens as an update happens to have would each have a shape of its own. Padded to the
whole budget they would share one, and waste what the last micro-batch leaves free: 256 sequences of 115 tokens are two
batches of 14,720, not of 16,384. So the capacities are those that updates of these lengths need, learnt by dealing a
few updates out: a pure function of data and options, the same in a run that goes on as in one that never stopped.
"""

from collections.abc import Sequence

import numpy as np

from bert_fast.data import Capacities, Corpus, Sample, masked_count, pack_samples
from bert_fast.data.bins import micro_batches, needed
from bert_fast.data.dataset import PretrainingDataset
from bert_fast.data.masking import MASK_PROB, special_count
from bert_fast.data.mixture import Mixture
from bert_fast.data.pairs import document_tokens, fewest_tokens
from bert_fast.data.phase import Phase

LEVELS = 3  # shapes of a phase: of the lower, the middle and the upper third of the updates
TRIALS, TRIED_SEQUENCES = 64, 1 << 18  # updates dealt out to learn them, and how many sequences these may have in all
DOCUMENTS = 2048  # whose samples stand for the corpus
TOKENS, SEQUENCES, MASKED = 64, 8, 16  # capacities are multiples of these


def sizes_of_phases(
    dataset: PretrainingDataset | Mixture, phases: Sequence[Phase], tokens: int
) -> dict[tuple[int, int], list[Capacities]]:
    """By (longest sequence, batch size) of a phase, the capacities of its micro-batches of about ``tokens`` tokens."""
    lengths = {seq: sample_lengths(dataset, seq) for seq in {phase.seq for phase in phases}}
    special, whole_word = special_count(dataset.nsp), dataset.continues is not None
    return {
        (phase.seq, phase.batch_size): phase_sizes(
            lengths[phase.seq],
            phase.batch_size,
            max(tokens, phase.seq),
            seq=phase.seq,
            special=special,
            whole_word=whole_word,
            mask_prob=max(phase.mask_probs),
        )
        for phase in phases
    }


def sample_lengths(dataset: PretrainingDataset | Mixture, seq: int) -> np.ndarray:
    """Lengths (samples,) of sequences of at most ``seq`` tokens made from evenly spaced documents, some 2048 of each
    source."""
    if isinstance(dataset, Mixture):
        return dataset.mixed([sample_lengths(source, seq) for source in dataset.datasets])
    few = spaced_documents(dataset.corpus, nsp=dataset.nsp)
    return np.asarray(dataset.replanned(corpus=few, max_length=seq).plan.length)


def of_few_documents(dataset: PretrainingDataset | Mixture) -> PretrainingDataset | Mixture:
    """``dataset`` of evenly spaced documents, whose epoch is planned at once."""
    if isinstance(dataset, Mixture):
        return dataset.each(lambda source: source.replanned(corpus=spaced_documents(source.corpus, nsp=source.nsp)))
    return dataset.replanned(corpus=spaced_documents(dataset.corpus, nsp=dataset.nsp))


def spaced_documents(corpus: Corpus, *, nsp: bool) -> Corpus:
    """The corpus of evenly spaced documents of ``corpus``, some 2048, one of which gives a sample if one does."""
    documents = np.asarray(corpus.documents)
    spaced = np.linspace(0, len(documents) - 1, min(len(documents), DOCUMENTS)).astype(np.int64)
    one = np.argmax(document_tokens(corpus) >= fewest_tokens(nsp))
    return Corpus(corpus.tokens, corpus.sentence_ends, documents[np.unique(np.append(spaced, one))])


def phase_sizes(
    lengths: np.ndarray, batch_size: int, tokens: int, *, seq: int, special: int, whole_word: bool = False,
    mask_prob: float = MASK_PROB,
) -> list[Capacities]:  # fmt: skip
    """Capacities, ascending, for updates of ``batch_size`` sequences of ``lengths``, drawn independently.

    ``tokens`` is the budget of a micro-batch, ``special`` how many tokens of a sequence are never predicted. The last
    holds any sequence of ``seq`` tokens. An update's micro-batches all have the same capacities. ``mask_prob`` is the
    highest share of tokens that an update predicts. With ``whole_word`` the predicted tokens vary; the few batches that
    have more than there is room for get shapes of their own.
    """
    masked = masked_count(lengths - special, mask_prob)
    trials = max(4, min(TRIALS, TRIED_SEQUENCES // batch_size))
    # raw words of the bit generator: its stream is fixed for ever, those of NumPy's distributions are not
    words = np.random.Philox(key=0)
    found = []
    for _ in range(trials):
        drawn = (words.random_raw(batch_size) % np.uint64(len(lengths))).astype(np.int64)
        parts = micro_batches(lengths[drawn], np.arange(batch_size), tokens)
        found.append(needed(lengths[drawn], masked[drawn], parts))
    needs = np.array(sorted(found))
    sizes = []
    for level in range(1, LEVELS + 1):
        most = needs[: -(-level * trials // LEVELS)].max(axis=0)
        sequences, predicted = most[1] + most[1] // 16 + 4, most[2] + most[2] // 64  # cheap, and hardly varying
        if whole_word:  # four standard deviations, of two tokens a sequence
            predicted += int(np.ceil(8 * np.sqrt(most[1])))
        if level == LEVELS:
            most[0], predicted = max(most[0], seq), max(predicted, int(masked_count(seq - special, mask_prob)))
        size = Capacities(rounded(most[0], TOKENS), rounded(sequences, SEQUENCES), rounded(predicted, MASKED))
        if size not in sizes:
            sizes.append(size)
    return sizes


def examples(dataset: PretrainingDataset | Mixture, sizes: Sequence[Capacities], seq: int) -> list[dict]:
    """A batch of each of ``sizes``, the largest first, as a step is to be ready for."""
    return [example(size, seq, nsp=dataset.nsp, pad_id=dataset.special.pad) for size in sizes[::-1]]


def example(size: Capacities, seq: int, *, nsp: bool, pad_id: int) -> dict:
    """A packed batch of the names, shapes and dtypes of those of ``size``; of one short sequence."""
    short = np.full(3, pad_id, dtype=np.int64)
    batch = pack_samples([Sample(short, 0 * short, short[:1] * 0 + 1, short[:1], 0, 0)], size, pad_id=pad_id)
    if not nsp:
        del batch["next_sentence_label"]
    return {**batch, "max_length_q": seq}


def rounded(count: int, multiple: int) -> int:
    """``count`` rounded up to a multiple of ``multiple``."""
    return -(-int(count) // multiple) * multiple
