"""Several prepared sources as one stream of samples, in proportion to weights that count tokens.

Each source is planned alone, epoch after epoch, as if there were no other: the B of a pair, true or random, is always
of the same source as its A. (A random B of another source would tell its label by its topic.) The streams are merged:
the next sample is that of the source with the fewest tokens since the phase began, over its share; of equal ones the
first. So at every moment the tokens taken are as the shares say, to one sample of each source, special tokens counted.
A source with a share beyond its size comes round more often: its epochs repeat, with other pairs and masks. Where an
epoch of one ends, the others go on with theirs. Source: weighted fair queueing, Demers et al., "Analysis and Simulation
of a Fair Queueing Algorithm", 1989.

All draws of source k of S in its epoch e are those of epoch e S + k of a single source: no word is drawn twice.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from bert_fast.data.dataset import PretrainingDataset
from bert_fast.data.pairs import Corpus, Tokens
from bert_fast.data.places import Place, Places
from bert_fast.data.samples import SampleMaker
from bert_fast.data.shards import ShardedTokens, sums_before
from bert_fast.data.tokenizer import SpecialIds
from bert_fast.data.updates import Stream, Update


@dataclass(frozen=True)
class Mixture:
    """Sources by name, each a dataset with the same settings, and the share of the tokens that each has."""

    names: tuple[str, ...]
    datasets: tuple[PretrainingDataset, ...]
    shares: tuple[float, ...]

    @property
    def nsp(self) -> bool:
        """Whether samples are pairs."""
        return self.datasets[0].nsp

    @property
    def special(self) -> SpecialIds:
        """Of the tokenizer."""
        return self.datasets[0].special

    @property
    def continues(self) -> np.ndarray | None:
        """As of each dataset; None where single tokens are masked."""
        return self.datasets[0].continues

    def real(self, lengths: np.ndarray) -> np.ndarray:
        """As of each dataset."""
        return self.datasets[0].real(lengths)

    def each(self, change: Callable[[PretrainingDataset], PretrainingDataset]) -> "Mixture":
        """The same of ``change(dataset)`` in place of each dataset."""
        return replace(self, datasets=tuple(map(change, self.datasets)))

    def maker(self) -> SampleMaker:
        """What makes the samples from rows of a :class:`MixedStream`."""
        return replace(self.datasets[0].maker(), corpus=joined([dataset.corpus for dataset in self.datasets]))

    def mixed(self, lengths: Sequence[np.ndarray]) -> np.ndarray:
        """Of each source's samples' ``lengths``, as many as its share of the tokens makes them; some repeatedly."""
        rates = np.array([share / found.mean() for share, found in zip(self.shares, lengths, strict=True)])
        counts = np.maximum(1, np.rint(rates * (sum(map(len, lengths)) / rates.sum()))).astype(int)
        return np.concatenate([np.resize(found, count) for found, count in zip(lengths, counts, strict=True)])


def joined(corpora: Sequence[Corpus]) -> Corpus:
    """The tokens of ``corpora``, one after another, for samples of all; without sentences, where there are several."""
    if len(corpora) == 1:
        return corpora[0]
    parts = [corpus.tokens for corpus in corpora]
    tokens: Tokens
    if sharded := [part for part in parts if isinstance(part, ShardedTokens)]:
        offsets = sums_before([len(part) for part in parts])
        ends = [int(offset) + end for offset, part in zip(offsets, sharded, strict=False) for end in part.ends]
        tokens = ShardedTokens([path for part in sharded for path in part.paths], ends)
    else:
        tokens = np.concatenate([part[0 : len(part)] for part in parts])
    return Corpus(tokens, np.zeros(1, dtype=np.int64), np.zeros((0, 2), dtype=np.int64))


class MixedStream:
    """The samples of a phase of several sources from ``place`` on, merged by tokens; see :class:`Stream`.

    An update has the samples of the first source first. Its ``rows`` count tokens of all sources, one after another.
    """

    def __init__(self, mixture: Mixture, seq: int, place: Places):
        number = len(mixture.datasets)
        self.mixture, self.tokens = mixture, list(place.tokens)
        self.streams = [
            Stream(dataset, seq, start, source=(k, number))
            for k, (dataset, start) in enumerate(zip(mixture.datasets, place.of, strict=True))
        ]
        self.offsets = sums_before([len(dataset.corpus.tokens) for dataset in mixture.datasets])

    @property
    def place(self) -> Places:
        """Where the stream is."""
        return Places(tuple(stream.place for stream in self.streams), tuple(self.tokens))

    def take(self, step: int, size: int, mask_prob: float | None = None) -> Update:
        """Update ``step``: the next ``size`` sequences; see :meth:`Stream.take`."""
        parts: list[list[Update]] = [[] for _ in self.streams]
        missing = size
        while missing:
            for number, count in enumerate(self._counts(missing)):
                if count:
                    part = self.streams[number].take(step, count, mask_prob)
                    parts[number].append(part)
                    self.tokens[number] += int(part.lengths.sum())
                    missing -= count
        for of_source, offset in zip(parts, self.offsets, strict=False):
            for update in of_source:
                update.rows[:, :4] += offset
        taken = [update for of_source in parts for update in of_source]
        epochs, indices, lengths, masked, rows = (
            np.concatenate([getattr(update, name) for update in taken])
            for name in ("epochs", "indices", "lengths", "masked", "rows")
        )
        read = tuple(stream.epochs_read for stream in self.streams)
        seq, prob = taken[0].seq, taken[0].mask_prob
        return Update(step, seq, epochs, indices, lengths, masked, rows, self.place, prob, read)

    def _counts(self, size: int) -> list[int]:
        """How many samples of each source are the next, ``size`` in all or as many as come before an epoch's end."""
        begins, owners, ends = [], [], []
        for number, stream in enumerate(self.streams):
            before = self.tokens[number] + sums_before(stream.ahead(size))
            begins.append(before / self.mixture.shares[number])
            owners.append(np.full(len(before), number))
            ends.append(np.arange(len(before)) == len(before) - 1)  # what begins there is not known yet
        order = np.argsort(np.concatenate(begins), kind="stable")
        known = int(np.argmax(np.concatenate(ends)[order]))
        return np.bincount(np.concatenate(owners)[order[: min(size, known)]], minlength=len(self.streams)).tolist()


def stream_of(dataset: PretrainingDataset | Mixture, seq: int, place: Place | Places) -> Stream | MixedStream:
    """The stream of one source or of several."""
    if isinstance(dataset, Mixture):
        assert isinstance(place, Places)
        return MixedStream(dataset, seq, place)
    assert isinstance(place, Place)
    return Stream(dataset, seq, place)


def start_of(dataset: PretrainingDataset | Mixture) -> Place | Places:
    """Where a run begins in its data."""
    if isinstance(dataset, Mixture):
        return Places((Place(),) * len(dataset.datasets), (0,) * len(dataset.datasets))
    return Place()
