"""Real text to the batches of a benchmark: the same masked sentence pairs for every variant, padded and packed."""

from dataclasses import dataclass, field

import numpy as np
import torch
from transformers import BertConfig

from bert_fast.data import (
    PretrainingDataset,
    capacities,
    encode_documents,
    pack_samples,
    pad_samples,
    read_documents,
    special_ids,
    train_tokenizer,
    wikipedia_lengths,
)

VOCABULARY = 30522  # BERT's, whatever the corpus yields: the cost of the head must be real

MODELS = {
    "tiny": {"num_hidden_layers": 2, "hidden_size": 128, "num_attention_heads": 2, "intermediate_size": 512},
    "base": {"num_hidden_layers": 12, "hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072},
    "large": {"num_hidden_layers": 24, "hidden_size": 1024, "num_attention_heads": 16, "intermediate_size": 4096},
}


def model_config(name: str, *, dropout: float) -> BertConfig:
    """BERT as published: tiny, base or large, with ``dropout`` in hidden states and attention."""
    return BertConfig(
        vocab_size=VOCABULARY, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout, **MODELS[name]
    )


@dataclass
class Batch:
    """One batch in the forms that variants take; tensors lie on the benchmark's device.

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

    ``corpus`` is None (the Python language reference that ships with Python) or a path. Raises what
    ``bert_fast.data`` raises: FileNotFoundError, ValueError for an empty, binary or not UTF-8 file.
    """

    def __init__(self, corpus: str | None = None, *, nsp: bool = True):
        documents = read_documents(corpus)
        sentences = [sentence for document in documents for sentence in document]
        self.tokenizer = train_tokenizer(sentences, VOCABULARY)
        self.corpus, self.nsp = encode_documents(documents, self.tokenizer), nsp
        self.name = corpus or "the Python language reference (pydoc_data.topics)"
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
            samples = [self._sample(length, seed + i) for i, length in enumerate(targets)]
        return self._batch(samples, seq, device)

    def _sample(self, length: int, seed: int):
        """A sample of exactly ``length`` tokens: the first of a shuffled epoch that was cut to that length."""
        dataset = PretrainingDataset(
            self.corpus, self.tokenizer, max_length=max(length, 8), seed=seed, nsp=self.nsp, short_seq_prob=0.0
        )
        order = dataset.order()
        exact = [i for i in order if dataset.plan.length[i] == length]
        if not exact:
            raise ValueError(f"the corpus has no sample of {length} tokens: give a longer --corpus or a smaller --seq")
        return dataset[exact[0]]

    def parity_batch(self, seq: int, device: str) -> Batch:
        """A full sequence and one of Wikipedia's lower-quartile length: full length and padding in one batch."""
        short = wikipedia_quantiles(2, seq)[0]
        return self._batch([self._sample(seq, 0), self._sample(short, 1)], seq, device)

    def _batch(self, samples: list, seq: int, device: str) -> Batch:
        pad = special_ids(self.tokenizer).pad
        lengths = [len(sample.input_ids) for sample in samples]
        size = capacities(sum(lengths), max(lengths), len(lengths))

        def to_device(batch: dict) -> dict:
            if not self.nsp:
                batch = {key: value for key, value in batch.items() if key != "next_sentence_label"}
            return {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}

        return Batch(
            lengths=lengths,
            predicted=sum(len(sample.masked_positions) for sample in samples),
            seq=seq,
            padded=to_device(pad_samples(samples, pad_id=pad, length=seq)),
            longest=to_device(pad_samples(samples, pad_id=pad)),
            packed=to_device(pack_samples(samples, size, pad_id=pad)),
        )


def wikipedia_quantiles(count: int, seq: int) -> list[int]:
    """``count`` lengths at the quantiles (i + 1/2) / count of Wikipedia's histogram, scaled down where seq < 512."""
    cumulative = np.cumsum(wikipedia_lengths()) / wikipedia_lengths().sum()
    lengths = 1 + np.searchsorted(cumulative, (np.arange(count) + 0.5) / count)
    return [int(max(8, round(n * seq / 512))) for n in lengths]
