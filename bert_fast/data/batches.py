"""Samples to batches: padded as `transformers` takes them, or packed to fixed capacities as the engine does."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from bert_fast.data.bins import Capacities

IGNORED = -100


class Sample(NamedTuple):
    """One masked sequence; arrays are int64.

    input_ids              (n,)  [CLS] A [SEP] B [SEP], with what the model sees at predicted positions
    token_type_ids         (n,)  0 up to the first [SEP], 1 after it
    masked_positions       (k,)  ascending positions to predict
    masked_labels          (k,)  the tokens that stood there
    next_sentence_label    0 IsNext, 1 NotNext, -100 without NSP
    index                  number of the sample in its epoch
    """

    input_ids: np.ndarray
    token_type_ids: np.ndarray
    masked_positions: np.ndarray
    masked_labels: np.ndarray
    next_sentence_label: int
    index: int  # type: ignore[assignment]  # in place of tuple.index, which no sample needs


def pad_samples(
    samples: Sequence[Sample], *, pad_id: int, length: int | None = None, multiple_of: int = 1
) -> dict[str, Tensor]:
    """A padded batch, all int64: input_ids, token_type_ids, attention_mask, labels (B, S), next_sentence_label (B,).

    S is ``length``, or the longest sample's rounded up to ``multiple_of``. ``labels`` are -100 where nothing is
    predicted. Raises ValueError for no samples, or one longer than ``length``.
    """
    if not samples:
        raise ValueError("a batch needs at least one sample")
    longest = max(len(sample.input_ids) for sample in samples)
    if length is None:
        length = -(-longest // multiple_of) * multiple_of
    elif longest > length:
        raise ValueError(f"a sample of {longest} tokens does not fit the padded length {length}")
    shape = (len(samples), length)
    ids = np.full(shape, pad_id, dtype=np.int64)
    segments, mask = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    labels = np.full(shape, IGNORED, dtype=np.int64)
    for row, sample in enumerate(samples):
        n = len(sample.input_ids)
        ids[row, :n], segments[row, :n], mask[row, :n] = sample.input_ids, sample.token_type_ids, 1
        labels[row, sample.masked_positions] = sample.masked_labels
    return {
        "input_ids": torch.from_numpy(ids),
        "token_type_ids": torch.from_numpy(segments),
        "attention_mask": torch.from_numpy(mask),
        "labels": torch.from_numpy(labels),
        "next_sentence_label": torch.tensor([sample.next_sentence_label for sample in samples]),
    }


def pack_samples(samples: Sequence[Sample], size: Capacities, *, pad_id: int) -> dict[str, Tensor | int]:
    """A packed batch of fixed shapes for capacities (T, B, M) = ``size``; sequences follow one another.

    input_ids, token_type_ids, position_ids  (1, T) int64; the tail is ``pad_id``, 0 and 0
    cu_seq_lens_q        (B+1,) int32; entries past the last sequence repeat the total
    max_length_q         int, length of the longest sequence
    masked_positions     (M,) int64 rows of the packed tokens; the tail is 0
    masked_labels        (M,) int64; the tail is -100
    cls_positions        (B,) int64 rows of [CLS]; the tail is 0
    next_sentence_label  (B,) int64; -100 in the tail and without NSP
    sample_ids           (B,) int64 samples' numbers in the epoch; the tail is 0

    Raises ValueError for no samples, or more than ``size`` holds.
    """
    if not samples:
        raise ValueError("a batch needs at least one sample")
    lengths = np.array([len(sample.input_ids) for sample in samples])
    predicted = sum(len(sample.masked_positions) for sample in samples)
    for what, has, limit in zip(
        ("tokens", "sequences", "predicted tokens"), (lengths.sum(), len(samples), predicted), size, strict=True
    ):
        if has > limit:
            raise ValueError(f"{has} {what} do not fit the packed capacity of {limit}")
    cu = np.concatenate([[0], np.cumsum(lengths)])
    total, count = int(cu[-1]), len(samples)
    masked = np.concatenate([s.masked_positions for s in samples])
    masked += np.repeat(cu[:-1], [len(s.masked_positions) for s in samples])

    def filled(capacity, values, tail):
        out = np.full(capacity, tail, dtype=np.int64)
        out[: len(values)] = values
        return torch.from_numpy(out)

    cu_seqlens = torch.full((size.sequences + 1,), total, dtype=torch.int32)
    cu_seqlens[: count + 1] = torch.from_numpy(cu.astype(np.int32))
    return {
        "input_ids": filled(size.tokens, np.concatenate([s.input_ids for s in samples]), pad_id)[None],
        "token_type_ids": filled(size.tokens, np.concatenate([s.token_type_ids for s in samples]), 0)[None],
        "position_ids": filled(size.tokens, np.arange(total) - np.repeat(cu[:-1], lengths), 0)[None],
        "cu_seq_lens_q": cu_seqlens,
        "max_length_q": int(lengths.max()),
        "masked_positions": filled(size.masked, masked, 0),
        "masked_labels": filled(size.masked, np.concatenate([s.masked_labels for s in samples]), IGNORED),
        "cls_positions": filled(size.sequences, cu[:-1], 0),
        "next_sentence_label": filled(size.sequences, [s.next_sentence_label for s in samples], IGNORED),
        "sample_ids": filled(size.sequences, [s.index for s in samples], 0),
    }
