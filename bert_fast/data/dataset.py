"""Datasets for PyTorch: samples as a pure function of (seed, epoch, index), and batches of them."""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from tokenizers import Tokenizer
from torch.utils.data import DataLoader, Dataset

from bert_fast.data.batches import Sample, pack_samples, pad_samples
from bert_fast.data.encoding import SentenceEncoder
from bert_fast.data.masking import choose_positions, masked_count, replace_tokens
from bert_fast.data.packing import Capacities, plan_batches
from bert_fast.data.pairs import NO_LABEL, Corpus, permutation, plan_epoch, truncated_lengths
from bert_fast.data.tokenizer import continuation_table, special_ids


def encode_documents(documents: Iterable[Sequence[str]], tokenizer: Tokenizer) -> Corpus:
    """Token ids (uint16, or uint32 for large vocabularies) of documents in memory, each a list of sentences.

    Text that looks like a special token ("[SEP]") is encoded as text. Sentences and documents without a token are
    left out; raises ValueError where nothing is left.
    """
    documents = [list(document) for document in documents]
    encoder = SentenceEncoder(tokenizer)
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
    one document; ``whole_word`` masks whole words. :meth:`set_epoch` draws new pairs and new masks.
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
    ):
        self.corpus, self.max_length, self.seed, self.nsp = corpus, max_length, seed, nsp
        self.short_seq_prob = short_seq_prob
        self.special = special_ids(tokenizer)
        self.vocab_size = tokenizer.get_vocab_size(with_added_tokens=True)
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

    def __len__(self) -> int:
        return len(self.plan)

    def order(self) -> np.ndarray:
        """int64 (samples,): the shuffled order of this epoch."""
        return permutation(len(self), seed=self.seed, epoch=self.epoch)

    def __getitem__(self, index: int) -> Sample:
        index = int(index)
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        ends, plan = self.corpus.sentence_ends, self.plan
        a_from, a_to = int(ends[plan.a_start[index]]), int(ends[plan.a_end[index]])
        b_from, b_to = int(ends[plan.b_start[index]]), int(ends[plan.b_end[index]])
        capacity = self.max_length - (3 if self.nsp else 2)
        a_kept, b_kept = truncated_lengths(a_to - a_from, b_to - b_from, capacity)
        a_cut, b_cut = a_to - a_from - a_kept, b_to - b_from - b_kept
        # raw words of the bit generator: its stream is fixed for ever, those of NumPy's distributions are not
        key = np.array([self.seed % 2**64, self.epoch << 32 | index], dtype=np.uint64)
        words = np.random.Philox(key=key)
        coins = np.unpackbits(words.random_raw((a_cut + b_cut + 63) // 64).astype("<u8").view(np.uint8))
        a_front = int(coins[:a_cut].sum())
        b_front = int(coins[a_cut : a_cut + b_cut].sum())
        a = self.corpus.tokens[a_from + a_front : a_from + a_front + a_kept]
        parts = [[self.special.cls], a, [self.special.sep]]
        if self.nsp:
            parts += [self.corpus.tokens[b_from + b_front : b_from + b_front + b_kept], [self.special.sep]]
        ids = np.concatenate(parts).astype(np.int64)
        segments = np.zeros(len(ids), dtype=np.int64)
        segments[a_kept + 2 :] = 1
        real = np.concatenate([np.arange(1, a_kept + 1), np.arange(a_kept + 2, a_kept + 2 + b_kept)])
        continues = None if self.continues is None else self.continues[ids[real]]
        positions = choose_positions(real, continues, words.random_raw(len(real)))
        labels = ids[positions]
        bits = words.random_raw(int(masked_count(len(real))))[: len(positions)]
        ids[positions] = replace_tokens(labels, bits, self.special.mask, self.vocab_size)
        label = int(plan.label[index]) if self.nsp else NO_LABEL
        return Sample(ids, segments, positions, labels, label, index)


class PackedBatches(Dataset):
    """The packed batches of a dataset's current epoch; ``batches[i]`` is :func:`pack_samples` of its i-th bin."""

    def __init__(self, dataset: PretrainingDataset, size: Capacities):
        self.dataset, self.size = dataset, size
        self.bins = plan_batches(dataset.plan.length, dataset.order(), size, nsp=dataset.nsp)

    def __len__(self) -> int:
        return len(self.bins)

    def __getitem__(self, index: int) -> dict:
        samples = [self.dataset[i] for i in self.bins[index]]
        return pack_samples(samples, self.size, pad_id=self.dataset.special.pad)


class PretrainingCollator:
    """Samples to a padded batch, for ``transformers.Trainer`` (``remove_unused_columns=False``) or a DataLoader."""

    def __init__(self, tokenizer: Tokenizer, *, length: int | None = None, multiple_of: int = 8):
        self.pad_id, self.length, self.multiple_of = special_ids(tokenizer).pad, length, multiple_of

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
