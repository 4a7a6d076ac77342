"""attention in C++ (kernels/cpu/attention.cpp), with the signatures of bert_fast/reference.py."""

import torch

from bert_fast import dropout_mask, reference
from bert_fast.kernels.cpu import DTYPES, function

_forward = function("attention_fwd", "ippppppllllllffi")
_backward = function("attention_bwd", "ipppppppppllllllffi")


def _dropout_arguments(row_key: torch.Tensor, rng_key: torch.Tensor, p: float):
    """row_key, rng_key (None without dropout), threshold and scale of the mask."""
    if p == 0.0:
        return None, None, 0, 1.0
    return row_key, rng_key, dropout_mask.dropout_threshold(p), dropout_mask.dropout_scale(p)


def attention_fwd(
    qkv: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    row_key: torch.Tensor,
    rng_key: torch.Tensor,
    scale: float,
    p: float,
    site: int,
    bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """qkv (T, 3, A, D), cu_seqlens (B+1,) int32 -> out (T, A*D), lse (A, T) float32. ``bias`` is not read."""
    if qkv.dtype == torch.float64:
        return reference.attention_fwd(qkv, cu_seqlens, max_seqlen, row_key, rng_key, scale, p, site)
    tokens, _, heads, size = qkv.shape
    row_key, rng_key, threshold, dropout_scale = _dropout_arguments(row_key, rng_key, p)
    out = qkv.new_empty(tokens, heads * size)
    lse = qkv.new_empty(heads, tokens, dtype=torch.float32)
    _forward(
        DTYPES[qkv.dtype], qkv, cu_seqlens, row_key, rng_key, out, lse, cu_seqlens.numel() - 1, tokens, heads, size,
        site, threshold, dropout_scale, scale, torch.get_num_threads(),
    )  # fmt: skip
    return out, lse


def attention_bwd(
    grad_out: torch.Tensor,
    qkv: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    row_key: torch.Tensor,
    rng_key: torch.Tensor,
    scale: float,
    p: float,
    site: int,
    bias_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """-> gradients of qkv (T, 3, A, D), zeros past ``cu_seqlens[-1]``, and of its bias: see reference.attention_bwd."""
    if qkv.dtype == torch.float64:
        return reference.attention_bwd(
            grad_out, qkv, out, lse, cu_seqlens, max_seqlen, row_key, rng_key, scale, p, site, bias_dtype
        )
    tokens, _, heads, size = qkv.shape
    row_key, rng_key, threshold, dropout_scale = _dropout_arguments(row_key, rng_key, p)
    grad_qkv = torch.empty_like(qkv)
    grad_bias = None if bias_dtype is None else torch.empty(qkv.shape[1:], dtype=torch.float32)
    _backward(
        DTYPES[qkv.dtype], grad_out, qkv, out, lse, cu_seqlens, row_key, rng_key, grad_qkv, grad_bias,
        cu_seqlens.numel() - 1, tokens, heads, size, site, threshold, dropout_scale, scale, torch.get_num_threads(),
    )  # fmt: skip
    return grad_qkv, qkv.new_empty(0) if grad_bias is None else grad_bias.to(bias_dtype)
