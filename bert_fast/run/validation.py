"""Held-out documents, and the model's losses on them."""

import numpy as np
from torch import nn

from bert_fast.data import Corpus, PackedBatches, capacities
from bert_fast.data.dataset import PretrainingDataset
from bert_fast.data.pairs import document_tokens, fewest_tokens, permutation
from bert_fast.train.distributed import Ranks
from bert_fast.train.evaluation import perplexity, summarize, sums

FEWEST_DOCUMENTS = 10  # a corpus of fewer has none to spare


def hold_out(corpus: Corpus, share: float, *, seed: int, nsp: bool) -> tuple[Corpus, Corpus | None]:
    """(training, validation) corpus: ``share`` of the documents, chosen by a hash of (seed, document), is held out.

    At least one document (two with ``nsp``, whose pairs need another document) where there are at least 10; None
    where there are fewer, ``share`` is 0, or one of the two corpora would give no sample.
    """
    documents = len(corpus.documents)
    if not share or documents < FEWEST_DOCUMENTS:
        return corpus, None
    count = min(max(round(share * documents), 2 if nsp else 1), documents - 2)
    held = np.zeros(documents, dtype=bool)
    held[permutation(documents, seed=seed, epoch=2**32 - 1)[:count]] = True
    gives = document_tokens(corpus) >= fewest_tokens(nsp)
    if not (gives[held].any() and gives[~held].any()):
        return corpus, None
    parts = (Corpus(corpus.tokens, corpus.sentence_ends, np.asarray(corpus.documents)[part]) for part in (~held, held))
    return tuple(parts)


class Validation:
    """Evaluates a model on the same masked samples every time: epoch 0 of ``dataset``, at most ``limit`` of them.

    ``tokens`` is the budget of a batch; the processes of ``ranks`` share the batches.
    """

    def __init__(self, dataset: PretrainingDataset, *, limit: int, tokens: int, ranks: Ranks, precision: str):
        self.dataset, self.limit, self.tokens = dataset, limit, tokens
        self.ranks, self.precision = ranks, precision
        self.seq: int | None = None  # of the last call, and its batches
        self.batches: PackedBatches

    def __call__(self, model: nn.Module, seq: int) -> dict:
        """What ``bert_fast.train.evaluation.evaluate`` gives, on sequences of at most ``seq`` tokens."""
        if seq != self.seq:
            self.seq, dataset = seq, self.dataset.replanned(max_length=seq)
            size = capacities(max(self.tokens, seq), seq, whole_word=dataset.continues is not None)
            self.batches = PackedBatches(dataset, size, limit=self.limit)
        own = (self.batches[number] for number in range(self.ranks.rank, len(self.batches), self.ranks.world))
        return summarize(self.ranks.sum(sums(model, own, self.ranks.device, self.precision)))


class ValidationBySource:
    """Evaluates on the held-out documents of each source by name; ``shares`` are those of the tokens trained on."""

    def __init__(self, parts: dict[str, Validation], shares: dict[str, float]):
        self.parts, self.shares = parts, shares

    def __call__(self, model: nn.Module, seq: int) -> dict:
        """Means over the sources, in proportion to their shares, and ``sources``: what each has by itself."""
        found = {name: part(model, seq) for name, part in self.parts.items()}
        total: dict = {}
        for key in ("mlm_loss", "mlm_accuracy", "nsp_loss", "nsp_accuracy"):
            known = {name: values[key] for name, values in found.items() if values[key] is not None}
            weight = sum(self.shares[name] for name in known)
            total[key] = sum(self.shares[name] * value for name, value in known.items()) / weight if known else None
        total |= {key: sum(values[key] for values in found.values()) for key in ("masked", "sequences")}
        return total | {"perplexity": perplexity(total["mlm_loss"]), "sources": found}
