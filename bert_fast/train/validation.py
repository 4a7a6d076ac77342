"""Held-out documents, and the model's losses on them."""

import copy
from collections.abc import Iterator

import numpy as np
from torch import nn

from bert_fast.data import Corpus, capacities, pack_samples, plan_batches
from bert_fast.data.dataset import PretrainingDataset
from bert_fast.data.pairs import permutation
from bert_fast.train.distributed import Ranks
from bert_fast.train.evaluation import summarize, sums

FEWEST_DOCUMENTS = 10  # a corpus of fewer has none to spare


def hold_out(corpus: Corpus, share: float, *, seed: int, nsp: bool) -> tuple[Corpus, Corpus | None]:
    """(training, validation) corpus: ``share`` of the documents, chosen by a hash of (seed, document), is held out.

    At least one document (two with ``nsp``, whose pairs need another document) where there are at least 10; None
    where there are fewer or ``share`` is 0.
    """
    documents = len(corpus.documents)
    if not share or documents < FEWEST_DOCUMENTS:
        return corpus, None
    count = min(max(round(share * documents), 2 if nsp else 1), documents - 2)
    held = np.zeros(documents, dtype=bool)
    held[permutation(documents, seed=seed, epoch=2**32 - 1)[:count]] = True
    parts = (Corpus(corpus.tokens, corpus.sentence_ends, np.asarray(corpus.documents)[part]) for part in (~held, held))
    return tuple(parts)


class Validation:
    """Evaluates a model on the same masked samples every time: epoch 0 of ``dataset``, at most ``limit`` of them.

    ``tokens`` is the budget of a batch; the processes of ``ranks`` share the batches.
    """

    def __init__(self, dataset: PretrainingDataset, *, limit: int, tokens: int, ranks: Ranks, precision: str):
        self.dataset, self.limit, self.tokens = copy.copy(dataset), limit, tokens
        self.ranks, self.precision = ranks, precision
        self.seq = None

    def __call__(self, model: nn.Module, seq: int) -> dict:
        """What ``bert_fast.train.evaluation.evaluate`` gives, on sequences of at most ``seq`` tokens."""
        if seq != self.seq:
            self.seq = self.dataset.max_length = seq
            self.dataset.set_epoch(0)
        return summarize(self.ranks.sum(sums(model, self._batches(), self.ranks.device, self.precision)))

    def _batches(self) -> Iterator[dict]:
        size = capacities(max(self.tokens, self.seq), self.seq)
        order = self.dataset.order()[: self.limit]
        bins = plan_batches(self.dataset.plan.length, order, size, nsp=self.dataset.nsp)
        for members in bins[self.ranks.rank :: self.ranks.world]:
            yield pack_samples([self.dataset[i] for i in members], size, pad_id=self.dataset.special.pad)
