"""Real text to the batches of a benchmark: the same masked sentence pairs for every contender, padded and packed."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from transformers import BertConfig

from bert_fast.data import (
    Capacities,
    Corpus,
    PretrainingDataset,
    Sample,
    capacities,
    encode_documents,
    pack_samples,
    pad_samples,
    read_documents,
    special_ids,
    train_tokenizer,
    wikipedia_lengths,
)

MASKED_SHARE = 0.15
TOKENS = 32768  # of a step on a GPU: they fill it
VOCABULARY = 30522  # BERT's, whatever the corpus yields: the cost of the head must be real

MODELS = {
    "micro": {  # for trials of the benchmark itself
        "num_hidden_layers": 2,
        "hidden_size": 64,
        "num_attention_heads": 2,
        "intermediate_size": 128,
        "vocab_size": 128,
        "max_position_embeddings": 64,
    },
    "tiny": {"num_hidden_layers": 2, "hidden_size": 128, "num_attention_heads": 2, "intermediate_size": 512},
    "base": {"num_hidden_layers": 12, "hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072},
    "large": {"num_hidden_layers": 24, "hidden_size": 1024, "num_attention_heads": 16, "intermediate_size": 4096},
}


def model_config(name: str, *, dropout: float) -> BertConfig:
    """BERT as published: tiny, base or large, with ``dropout`` in hidden states and attention."""
    sizes = {"vocab_size": VOCABULARY} | MODELS[name]
    return BertConfig(hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout, **sizes)


@dataclass
class Batch:
    """One batch in the forms that contenders take; tensors lie on the benchmark's device.

    padded   input_ids, token_type_ids, attention_mask, labels (B, seq), next_sentence_label (B,); all padded to seq
    longest  the same, padded to the longest sequence of the batch
    packed   the engine's packed form of fixed capacities
    """

    lengths: list[int]
    predicted: int
    seq: int
    padded: dict = field(repr=False)
    longest: dict = field(repr=False)
    packed: dict = field(repr=False)

    @property
    def real_tokens(self) -> int:
        return sum(self.lengths)


class Workload:
    """A corpus, its tokenizer and its token ids; :meth:`batch` cuts batches from it.

    ``corpus`` is None (the Python language reference that ships with Python) or a path; ``documents`` are lists of
    sentences in place of a corpus. Raises what
    ``bert_fast.data`` raises: FileNotFoundError, ValueError for an empty, binary or not UTF-8 file.
    """

    def __init__(self, corpus: str | None = None, *, nsp: bool = True, documents: list[list[str]] | None = None):
        documents = read_documents(corpus) if documents is None else documents
        sentences = [sentence for document in documents for sentence in document]
        self.tokenizer = train_tokenizer(sentences, VOCABULARY)
        self.corpus, self.nsp = encode_documents(documents, self.tokenizer), nsp
        self.name = corpus or "the Python language reference (pydoc_data.topics)"
        self.vocabulary = self.tokenizer.get_vocab_size()
        self.documents, self.tokens = len(documents), int(self.corpus.sentence_ends[-1])

    def batch(self, size: int, seq: int, lengths: str, device: str, *, seed: int = 0) -> Batch:
        """``size`` samples: of ``seq`` tokens each ("full"), of Wikipedia's lengths ("wikipedia": the histogram's
        quantiles in the middle of ``size`` equal parts, so that a small batch has its mean), or as the corpus gives
        them ("corpus")."""
        if lengths == "corpus":
            dataset = PretrainingDataset(self.corpus, self.tokenizer, max_length=seq, seed=seed, nsp=self.nsp)
            samples = [dataset[i] for i in dataset.order()[:size]]
            if len(samples) < size:
                raise ValueError(f"the corpus gives {len(samples)} samples of {seq} tokens, fewer than --batch {size}")
        else:
            targets = [seq] * size if lengths == "full" else wikipedia_quantiles(size, seq)
            samples = self._samples(targets, seed)
        return self._batch(samples, seq, device)

    def parity_batch(self, seq: int, device: str) -> Batch:
        """A full sequence and one of Wikipedia's lower-quartile length: full length and padding in one batch."""
        return self._batch(self._samples([seq, wikipedia_quantiles(2, seq)[0]], seed=0), seq, device)

    def batches(self, count: int, size: int, seq: int, device: str) -> list[Batch]:
        """``count`` batches of ``size`` samples as the corpus gives them, all of the same capacities."""
        dataset = PretrainingDataset(self.corpus, self.tokenizer, max_length=seq, seed=0, nsp=self.nsp)
        made: list[Batch] = []
        order: list[int] = []
        while len(made) < count:
            if len(order) < size:
                dataset.set_epoch(dataset.epoch + 1)
                order = dataset.order().tolist()
            samples, order = [dataset[i] for i in order[:size]], order[size:]
            made.append(self._batch(samples, seq, device, capacities(size * seq, seq, size)))
        return made

    def _samples(self, lengths: list[int], seed: int) -> list[Sample]:
        """Samples of exactly ``lengths`` tokens, epoch after epoch: of text whose every token may end a sample."""
        found, ends = {}, self.corpus.sentence_ends
        text = Corpus(self.corpus.tokens, np.arange(self.tokens + 1), ends[self.corpus.documents])
        for length in set(lengths):
            dataset = PretrainingDataset(
                text, self.tokenizer, max_length=max(length, 8), seed=seed, nsp=self.nsp, short_seq_prob=0.0
            )
            samples: list[Sample] = []
            while (missing := lengths.count(length) - len(samples)) > 0:
                exact = [i for i in dataset.order() if dataset.plan.length[i] == length][:missing]
                if not exact:
                    raise ValueError(
                        f"the corpus has no sample of {length} tokens: give a longer --corpus or a smaller --seq"
                    )
                samples += [dataset[i] for i in exact]
                dataset.set_epoch(dataset.epoch + 1)
            found[length] = iter(samples)
        return [next(found[length]) for length in lengths]

    def _batch(self, samples: list[Sample], seq: int, device: str, size: Capacities | None = None) -> Batch:
        return make_batch(samples, seq, device, pad_id=special_ids(self.tokenizer).pad, nsp=self.nsp, size=size)


def make_batch(
    samples: list[Sample], seq: int, device: str, *, pad_id: int, nsp: bool, size: Capacities | None = None
) -> Batch:
    """The samples in every form a contender takes, on ``device``; packed to ``size``, or to what they need."""
    lengths = [len(sample.input_ids) for sample in samples]
    size = size or capacities(sum(lengths), max(lengths), len(lengths))

    def finished(batch: dict) -> dict:
        if not nsp:
            batch = {key: value for key, value in batch.items() if key != "next_sentence_label"}
        return {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}

    return Batch(
        lengths=lengths,
        predicted=sum(len(sample.masked_positions) for sample in samples),
        seq=seq,
        padded=finished(pad_samples(samples, pad_id=pad_id, length=seq)),
        longest=finished(pad_samples(samples, pad_id=pad_id)),
        packed=finished(pack_samples(samples, size, pad_id=pad_id)),
    )


def random_batch(
    lengths: list[int], predicted: int, seq: int, device: str, *, nsp: bool, vocabulary: int = VOCABULARY
) -> Batch:
    """A batch of random tokens in the shape of another: what memory depends on, without its corpus."""
    draw = np.random.default_rng(0)
    shares = [predicted * n // sum(lengths) for n in lengths]
    for index in range(predicted - sum(shares)):  # fewer than there are sequences
        shares[-1 - index] += 1
    samples = []
    for index, (n, share) in enumerate(zip(lengths, shares, strict=True)):
        ids, at = draw.integers(5, vocabulary, n), np.linspace(1, n - 2, share).astype(np.int64)
        samples.append(Sample(ids, np.zeros(n, dtype=np.int64), at, ids[at], 0, index))
    return make_batch(samples, seq, device, pad_id=0, nsp=nsp)


def masked_positions(lengths: Sequence[int]) -> int:
    """How many of the tokens of sequences of ``lengths`` are predicted where nothing else says so."""
    return max(1, round(MASKED_SHARE * sum(lengths)))


def lengths_of(kind: str, seq: int, tokens: int = TOKENS) -> list[int]:
    """Sequences of about ``tokens`` tokens in all: of ``seq`` tokens each, or of Wikipedia's lengths."""
    if kind == "full":
        return [seq] * max(1, tokens // seq)
    mean = sum(wikipedia_quantiles(64, seq)) / 64
    return wikipedia_quantiles(max(2, round(tokens / mean)), seq)


def wikipedia_quantiles(count: int, seq: int) -> list[int]:
    """``count`` lengths at the quantiles (i + 1/2) / count of Wikipedia's histogram, scaled down where seq < 512."""
    cumulative = np.cumsum(wikipedia_lengths()) / wikipedia_lengths().sum()
    lengths = 1 + np.searchsorted(cumulative, (np.arange(count) + 0.5) / count)
    return [int(max(8, round(n * seq / 512))) for n in lengths]
