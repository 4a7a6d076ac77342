"""embedding_layernorm on a CPU: torch gathers and adds table rows, the C++ LayerNorm and dropout masks do the rest.

It runs once in a step, so the gathers, a few passes over (T, H), are left to torch.
"""

import torch

from ... import random, reference
from . import function
from .residual_layernorm import residual_layernorm_bwd, residual_layernorm_fwd

Tensor = torch.Tensor

_mask = function("dropout_mask", "pppllllli")


def _drop(x: Tensor, row_key: Tensor, rng_key: Tensor, p: float, site: int) -> Tensor:
    """Hidden dropout of x (T, H) float32, in place."""
    if p == 0.0:
        return x
    rows, columns = x.shape
    blocks = (columns + 63) // 64
    words = torch.empty(rows, blocks, dtype=torch.int64)
    threads = torch.get_num_threads()
    _mask(row_key, rng_key, words, rows, blocks, site, -1, random.dropout_threshold(p), threads)
    keep = (words.view(torch.uint8)[:, :, None] >> torch.arange(8, dtype=torch.uint8)) & 1
    return x.mul_(random.dropout_scale(p)).masked_fill_(keep.view(rows, 64 * blocks)[:, :columns] == 0, 0.0)


def _sum_of_rows(ids, positions, segments, word, position, segment) -> Tensor:
    return word[ids].float() + segment[segments].float() + position[positions].float()


def _table_gradient(table: Tensor, index: Tensor, rows: Tensor) -> Tensor:
    """rows (T, H) float32 summed into the shape and dtype of table by index (T,), in the order of T."""
    grad = torch.zeros_like(table)
    if table.dtype == torch.float32:
        return grad.index_add_(0, index, rows)
    used, place = index.unique(return_inverse=True)  # sums in float32 of the rows that occur, not of the whole table
    sums = rows.new_zeros(used.numel(), rows.shape[1]).index_add_(0, place, rows)
    return grad.index_copy_(0, used, sums.to(table.dtype))


def embedding_layernorm_fwd(
    ids: Tensor,
    positions: Tensor,
    segments: Tensor,
    word: Tensor,
    position: Tensor,
    segment: Tensor,
    weight: Tensor,
    bias: Tensor,
    row_key: Tensor,
    rng_key: Tensor,
    eps: float,
    p: float,
    site: int,
    padding_idx: int,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> out (T, H) out_dtype, mean, rstd (T,) float32."""
    tables = (word, position, segment)
    if torch.float64 in (*(t.dtype for t in tables), weight.dtype, bias.dtype, out_dtype):
        return reference.embedding_layernorm_fwd(
            ids, positions, segments, *tables, weight, bias, row_key, rng_key, eps, p, site, padding_idx, out_dtype
        )
    z = _sum_of_rows(ids, positions, segments, *tables)
    out, _, mean, rstd = residual_layernorm_fwd(z, None, None, weight, bias, row_key, rng_key, eps, 0.0, site)
    return _drop(out, row_key, rng_key, p, site).to(out_dtype), mean, rstd


def embedding_layernorm_bwd(
    grad_out: Tensor,
    ids: Tensor,
    positions: Tensor,
    segments: Tensor,
    word: Tensor,
    position: Tensor,
    segment: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    row_key: Tensor,
    rng_key: Tensor,
    p: float,
    site: int,
    padding_idx: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> gradients of word, position, segment, weight, bias; row ``padding_idx`` of word's is 0."""
    tables = (word, position, segment)
    if torch.float64 in (*(t.dtype for t in tables), weight.dtype, grad_out.dtype, mean.dtype):
        return reference.embedding_layernorm_bwd(
            grad_out, ids, positions, segments, *tables, weight, mean, rstd, row_key, rng_key, p, site, padding_idx
        )
    z = _sum_of_rows(ids, positions, segments, *tables)
    grad_y = _drop(grad_out.to(torch.float32, copy=True), row_key, rng_key, p, site)
    _, grad_z, _, grad_weight, grad_bias = residual_layernorm_bwd(
        grad_y, z, mean, rstd, weight.float(), row_key, rng_key, 0.0, site, torch.float32, False
    )
    pairs = ((word, ids), (position, positions), (segment, segments))
    grads = [_table_gradient(table, index, grad_z) for table, index in pairs]
    if padding_idx >= 0:
        grads[0][padding_idx] = 0.0
    return *grads, grad_weight.to(weight.dtype), grad_bias.to(weight.dtype)
