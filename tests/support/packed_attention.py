"""Packed sequences for tests of attention, what a user of PyTorch writes for them, and how near gradients are to it."""

import itertools

import torch

from bert_fast import dropout_mask
from tests.support.parity import DEVICE, assert_near_truth

SITE = 3


def packed(lengths, heads, size, dtype=torch.float32, tail=0, scale=1.0):
    """qkv (T, 3, heads, size), cu_seqlens, the keys of a mask, and the longest length; samples 7, 10, 13, ..."""
    total = sum(lengths) + tail
    cu_seqlens = torch.tensor([0, *torch.tensor(lengths, dtype=torch.int32).cumsum(0)], dtype=torch.int32)
    samples = 7 + 3 * torch.arange(len(lengths))
    qkv = (scale * torch.randn(total, 3, heads, size)).to(dtype)
    row_key = dropout_mask.row_keys(cu_seqlens, total, samples)
    rng_key = torch.randint(-(2**62), 2**62, (1,))
    tensors = (t.to(DEVICE) for t in (qkv, cu_seqlens, row_key, rng_key))
    return *tensors, max(lengths, default=0)


def plain(qkv, cu_seqlens, row_key, rng_key, p):
    """What a user of PyTorch writes, in qkv's dtype throughout, with the mask of bert_fast.dropout_mask."""
    tokens, _, heads, size = qkv.shape
    outs = []
    bounds = cu_seqlens.tolist()
    for start, end in itertools.pairwise(bounds):
        q, k, v = qkv[start:end].permute(1, 2, 0, 3)
        probabilities = torch.softmax(size**-0.5 * (q @ k.transpose(1, 2)), dim=-1)
        if p > 0.0 and end > start:
            keep = dropout_mask.attention_keep_mask(rng_key, row_key[start:end], heads, end - start, p, SITE)
            probabilities = probabilities * keep * dropout_mask.dropout_scale(p)
        outs.append((probabilities @ v).transpose(0, 1).reshape(end - start, heads * size))
    return torch.cat([*outs, qkv.new_zeros(tokens - bounds[-1], heads * size)])


def assert_gradient_near_truth(what, lengths, ours, same_dtype, truth, but=()) -> None:
    """dq, dk and dv of gradients (..., 3, heads, size), each by itself, ``but`` some."""
    parts = {"dq": 0, "dk": 1, "dv": 2}
    if max(lengths, default=0) <= 1:  # a token alone has dq = dk = 0: no scale of their own to measure rounding by
        parts = {"dqkv": slice(0, 3)}
    # P is exp(score - lse), both rounded in fp32, where PyTorch keeps its P: floor 4. For matrices of a few rows
    # PyTorch's library adds the D terms of a score in eight sums, for larger ones, and our kernels always, in one:
    # sqrt(8) times the rounding, and so it measured (3 keys, D = 64: up to 5.8 units in the last place against 1.3).
    factor = 3.0 if min(lengths, default=0) < 16 else 1.5
    for name, part in parts.items():
        if name not in but:
            values = (t.movedim(-3, 0)[part] for t in (ours, same_dtype, truth))
            assert_near_truth(f"{name} of {what}", *values, factor=factor, floor=4.0)
