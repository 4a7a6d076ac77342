"""embedding_layernorm on a CPU: torch gathers and adds table rows, the C++ LayerNorm and dropout masks do the rest.

It runs once in a step, so the gathers, a few passes over (T, H), are left to torch.
"""

import torch

from bert_fast import dropout_mask, reference
from bert_fast.kernels.cpu import function
from bert_fast.kernels.cpu.residual_layernorm import residual_layernorm_bwd, residual_layernorm_fwd

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
    _mask(row_key, rng_key, words, rows, blocks, site, -1, dropout_mask.dropout_threshold(p), threads)
    keep = (words.view(torch.uint8)[:, :, None] >> torch.arange(8, dtype=torch.uint8)) & 1
    return x.mul_(dropout_mask.dropout_scale(p)).masked_fill_(keep.view(rows, 64 * blocks)[:, :columns] == 0, 0.0)


def _sum_of_rows(ids, positions, segments, word, position, segment) -> Tensor:
    return word[ids].float() + segment[segments].float() + position[positions].float()


def _sums_by_row(index: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """The table rows that occur in index (T,), and for each the float32 sum of its rows (T, H), in the order of T."""
    used, place = index.unique(return_inverse=True)
    return used, rows.new_zeros(used.numel(), rows.shape[1]).index_add_(0, place, rows)


def _table_gradient(table: Tensor, index: Tensor, rows: Tensor) -> Tensor:
    """rows (T, H) float32 summed into the shape and dtype of table by index (T,), in the order of T."""
    grad = torch.zeros_like(table)
    if table.dtype == torch.float32:
        return grad.index_add_(0, index, rows)
    used, sums = _sums_by_row(index, rows)  # in float32, of the rows that occur and not of the whole table
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
    grad_word: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> gradients of word, position, segment, weight, bias: see bert_fast/reference.py."""
    tables = (word, position, segment)
    if torch.float64 in (*(t.dtype for t in tables), weight.dtype, grad_out.dtype, mean.dtype):
        return reference.embedding_layernorm_bwd(
            grad_out, ids, positions, segments, *tables, weight, mean, rstd, row_key, rng_key, p, site, padding_idx,
            grad_word,
        )  # fmt: skip
    z = _sum_of_rows(ids, positions, segments, *tables)
    grad_y = _drop(grad_out.to(torch.float32, copy=True), row_key, rng_key, p, site)
    _, grad_z, _, grad_weight, grad_bias = residual_layernorm_bwd(
        grad_y, z, mean, rstd, weight.float(), row_key, rng_key, 0.0, site, torch.float32, False
    )
    if grad_word is None:
        grad_word = _table_gradient(word, ids, grad_z)
        if padding_idx >= 0:
            grad_word[padding_idx] = 0.0
    else:
        used, sums = _sums_by_row(ids, grad_z)
        sums[used == padding_idx] = 0.0
        grad_word.index_add_(0, used, sums.to(word.dtype))
    return (
        grad_word,
        _table_gradient(position, positions, grad_z),
        _table_gradient(segment, segments, grad_z),
        grad_weight.to(weight.dtype),
        grad_bias.to(weight.dtype),
    )


def embedding_layernorm_bwd_add(*arguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See bert_fast/reference.py."""
    return embedding_layernorm_bwd(*arguments)[1:]
