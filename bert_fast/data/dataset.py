"""Datasets for PyTorch: samples as a pure function of (seed, epoch, index), and batches of them."""

import copy
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from tokenizers import Tokenizer
from torch.utils.data import DataLoader, Dataset

from bert_fast.data.batches import Sample, pack_samples, pad_samples
from bert_fast.data.bins import Capacities, plan_batches
from bert_fast.data.encoding import SentenceEncoder
from bert_fast.data.masking import MASK_PROB, MASK_SHARES, masked_count, special_count
from bert_fast.data.pairs import NO_LABEL, Corpus, permutation, plan_epoch
from bert_fast.data.samples import SampleMaker
from bert_fast.data.tokenizer import bare_tokenizer, continuation_table, replacement_ids, special_ids, vocabulary_rows

DRAWN = 4096  # samples that are made at a time to count their masks


def encode_documents(documents: Iterable[Sequence[str]], tokenizer: Tokenizer) -> Corpus:
    """Token ids (uint16, or uint32 for large vocabularies) of documents in memory, each a list of sentences.

    Text that looks like a special token ("[SEP]") is encoded as text. Sentences and documents without a token are
    left out; raises ValueError where nothing is left, TypeError for a document that is a string. ``tokenizer`` may be a
    fast one of ``transformers``, here and below.
    """
    documents = list(documents)
    if any(isinstance(document, str) for document in documents):
        raise TypeError("a document is a list of sentences, not a string: bert_fast.data.split_sentences makes one")
    documents = [list(document) for document in documents]
    encoder = SentenceEncoder(bare_tokenizer(tokenizer))
    tokens, lengths = encoder([sentence for document in documents for sentence in document])
    if not len(tokens):
        raise ValueError("the documents hold no token")
    last = np.cumsum([len(document) for document in documents])
    sentences = np.concatenate([[0], np.cumsum(lengths > 0)])  # with a token, before each sentence
    bounds = np.stack([sentences[np.concatenate([[0], last[:-1]])], sentences[last]], axis=1)
    ends = np.concatenate([[0], np.cumsum(lengths[lengths > 0])])
    return Corpus(tokens, ends, bounds[bounds[:, 0] < bounds[:, 1]])


class PretrainingDataset(Dataset):
    """The samples of an epoch, map-style; ``dataset[i]`` is a :class:`Sample`, a function of (seed, epoch, i).

    Arguments: a ``corpus``, its ``tokenizer``, ``max_length`` in tokens; ``nsp=False`` gives runs of sentences of
    one document; ``whole_word`` masks whole words. ``mask_prob`` is the share of a sample's tokens that is predicted,
    ``mask_shares`` how often [MASK], a random token and the token itself stand in their place; ValueError where they
    are no shares. :meth:`set_epoch` draws new pairs and new masks; which tokens are in which sample is said in
    ``bert_fast/data/pairs.py``, and ``plan.held`` is how many of the corpus an epoch holds.
    """

    def __init__(
        self,
        corpus: Corpus,
        tokenizer: Tokenizer,
        *,
        max_length: int = 128,
        seed: int = 0,
        nsp: bool = True,
        whole_word: bool = False,
        short_seq_prob: float = 0.1,
        mask_prob: float = MASK_PROB,
        mask_shares: tuple[float, float, float] = MASK_SHARES,
    ):
        if not 0 < mask_prob < 1:
            raise ValueError(f"mask_prob must be above 0 and below 1, got {mask_prob}")
        if len(mask_shares) != 3 or min(mask_shares) < 0 or abs(sum(mask_shares) - 1) > 1e-9:
            raise ValueError(f"mask_shares must be three shares that sum to 1, got {mask_shares}")
        self.corpus, self.max_length, self.seed, self.nsp = corpus, max_length, seed, nsp
        self.short_seq_prob, self.mask_prob = short_seq_prob, mask_prob
        of_mask, of_random, of_itself = mask_shares
        self.mask_shares = (of_mask, of_random, of_itself)
        tokenizer = bare_tokenizer(tokenizer)
        self.special = special_ids(tokenizer)
        self.vocab_size, self.vocabulary = vocabulary_rows(tokenizer), replacement_ids(tokenizer)
        self.continues = continuation_table(tokenizer) if whole_word else None
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Plans the samples of ``epoch``; their number differs a little from epoch to epoch."""
        self.epoch = epoch
        self.plan = plan_epoch(
            self.corpus,
            seed=self.seed,
            epoch=epoch,
            max_length=self.max_length,
            short_seq_prob=self.short_seq_prob,
            nsp=self.nsp,
        )

    def replanned(
        self, *, epoch: int = 0, max_length: int | None = None, corpus: Corpus | None = None
    ) -> "PretrainingDataset":
        """The samples of ``epoch`` by the same rules, with ``max_length`` and ``corpus`` if given; this one stays."""
        other = copy.copy(self)
        other.max_length = self.max_length if max_length is None else max_length
        other.corpus = self.corpus if corpus is None else corpus
        other.set_epoch(epoch)
        return other

    def __len__(self) -> int:
        return len(self.plan)

    def order(self) -> np.ndarray:
        """int64 (samples,): the shuffled order of this epoch."""
        return permutation(len(self), seed=self.seed, epoch=self.epoch)

    def __getitem__(self, index: int) -> Sample:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int] | np.ndarray) -> list[Sample]:
        """Several samples at a time, as DataLoader asks for them: many times faster than one by one."""
        numbers = np.asarray(indices, dtype=np.int64)
        for index in numbers[(numbers < 0) | (numbers >= len(self))]:
            raise IndexError(f"sample {index} of {len(self)}")
        return self.maker()(self.epoch, numbers, self.plan.rows(numbers))

    def real(self, lengths: np.ndarray) -> np.ndarray:
        """int64 (n,): how many tokens of samples of ``lengths`` (n,) are not special."""
        return lengths - special_count(self.nsp)

    def expected(self, lengths: np.ndarray, mask_prob: float | None = None) -> np.ndarray:
        """int64 (n,): how many tokens of samples of ``lengths`` (n,) are predicted, of whole words on average.

        ``mask_prob`` is the share of tokens, None the dataset's."""
        return masked_count(self.real(lengths), self.mask_prob if mask_prob is None else mask_prob)

    def predicted(self, indices: np.ndarray) -> np.ndarray:
        """int64 (n,): how many tokens of samples ``indices`` (n,) are predicted; of whole words they are drawn."""
        if self.continues is None:
            return self.expected(self.plan.length[indices])
        blocks = (self.__getitems__(indices[begin : begin + DRAWN]) for begin in range(0, len(indices), DRAWN))
        return np.array([len(sample.masked_labels) for block in blocks for sample in block], dtype=np.int64)

    def maker(self) -> SampleMaker:
        """What makes these samples from rows of a plan, which need not be here."""
        return SampleMaker(
            self.corpus, self.seed, self.nsp, self.special, self.vocab_size, self.vocabulary, self.continues,
            self.mask_prob, self.mask_shares,
        )  # fmt: skip


class PackedBatches(Dataset):
    """The packed batches of a dataset's current epoch; ``batches[i]`` is :func:`pack_samples` of its i-th bin.

    ``limit`` takes the first samples of the epoch's order alone. Of whole words it is drawn beforehand how many tokens
    each sample predicts, which takes as long as making the samples: ``capacities(..., whole_word=True)`` has room.
    """

    def __init__(self, dataset: PretrainingDataset, size: Capacities, *, limit: int | None = None):
        self.dataset, self.size = dataset, size
        order = dataset.order()[:limit]
        masked = np.zeros(len(dataset), dtype=np.int64)
        masked[order] = dataset.predicted(order)
        self.bins = plan_batches(dataset.plan.length, order, size, masked=masked)

    def __len__(self) -> int:
        return len(self.bins)

    def __getitem__(self, index: int) -> dict:
        samples = self.dataset.__getitems__(self.bins[index])
        return pack_samples(samples, self.size, pad_id=self.dataset.special.pad)


class PretrainingCollator:
    """Samples to a padded batch, for ``transformers.Trainer`` (``remove_unused_columns=False``) or a DataLoader."""

    def __init__(self, tokenizer: Tokenizer, *, length: int | None = None, multiple_of: int = 8):
        self.pad_id, self.length, self.multiple_of = special_ids(bare_tokenizer(tokenizer)).pad, length, multiple_of

    def __call__(self, samples: Sequence[Sample]) -> dict:
        batch = pad_samples(samples, pad_id=self.pad_id, length=self.length, multiple_of=self.multiple_of)
        if (batch["next_sentence_label"] == NO_LABEL).all():
            del batch["next_sentence_label"]
        return batch


def packed_loader(
    batches: PackedBatches, *, batch_indices: Iterable[int] | None = None, workers: int = 2, prefetch: int = 4
) -> DataLoader:
    """Yields packed batches in order, made ahead by ``workers`` processes and pinned where there is a GPU.

    ``batch_indices`` are the batches to make, by default all (a rank's share, or what is left after a resume).
    """
    return DataLoader(
        batches,
        batch_size=None,
        sampler=range(len(batches)) if batch_indices is None else list(batch_indices),
        num_workers=workers,
        prefetch_factor=prefetch if workers else None,
        pin_memory=torch.cuda.is_available(),
    )
