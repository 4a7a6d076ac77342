"""residual_layernorm: out = LayerNorm(dropout(x + bias) + residual), one pass each way.

With M the dropout factor of an element (0 or 1 / keep, from kernels/philox.py, never stored):

    forward   z = M * (x + bias) + residual;  mean, var of each row of z;  rstd = (var + eps)^-1/2
              xhat = (z - mean) * rstd;       out = weight * xhat + ln_bias
    backward  g = weight * d out
              d z = rstd * (g - mean(g) - xhat * mean(g * xhat)) = d residual;   d x = M * d z
              d weight = sum d out * xhat;    d ln_bias = sum d out;             d bias = sum d x

Saved: z in the residual's dtype, mean and rstd of z as stored, in fp32, so both directions see one z. The
variance is the mean of (z - mean)^2 over the row held in registers, so a large mean costs no digits. Bytes for
(T, H) in an e-byte dtype: 4 T H e forward (x, residual; out, z) and 4 T H e backward (d out, z; d x, d
residual), 3 T H e where p is 0, as d x is then d residual. About 10 FLOPs an element (and a third of Philox's
60 integer operations with dropout): bound by memory.

Source: J. Ba et al., "Layer Normalization", 2016; parameter gradients as per-program partial sums.
"""

import torch
import triton
import triton.language as tl

from bert_fast import choice
from bert_fast.dropout_mask import dropout_scale, dropout_threshold
from bert_fast.kernels import rows
from bert_fast.kernels.rows import drop, normalize, normalize_bwd

Tensor = torch.Tensor


def _elements(direction: str, dtype: torch.dtype) -> int:
    """How many elements of a row a warp holds: 1024, or half where two tiles would spill; past BERT's sizes few do."""
    return 512 if direction == "bwd" and dtype == torch.float32 else 1024


def _launch_config(columns: int, direction: str, dtype: torch.dtype) -> dict:
    """A warp a row of up to 1024 elements of 16 bits. Reasoned and counted; no GPU has measured it yet.

    Forward a program does one tile and the scheduler hides latency. Backward a program walks over tiles with its
    sums in registers, so there are few programs, and each loads its next tile while it computes this one.
    """
    return {**rows.row_tile(columns, _elements(direction, dtype)), "num_stages": 1}


@triton.jit(do_not_specialize=["tokens", "threshold", "site"])
def _residual_layernorm_fwd_kernel(
    x_ptr,
    bias_ptr,
    residual_ptr,
    weight_ptr,
    ln_bias_ptr,
    row_key_ptr,
    rng_key_ptr,
    out_ptr,
    z_ptr,
    mean_ptr,
    rstd_ptr,
    tokens,
    eps,
    threshold,
    scale,
    site,
    COLUMNS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_N)
    row_mask, column_mask = row < tokens, column[None, :] < COLUMNS
    mask = row_mask[:, None] & column_mask
    offset = row[:, None].to(tl.int64) * COLUMNS + column[None, :]

    z = tl.load(x_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    if HAS_BIAS:
        z += tl.load(bias_ptr + column[None, :], mask=column_mask, other=0.0).to(tl.float32)
    if HAS_DROPOUT:
        row_key = tl.load(row_key_ptr + row, mask=row_mask, other=0)
        z = drop(z, row_key, tl.load(rng_key_ptr), threshold, scale, site, BLOCK_M, BLOCK_N)
    if HAS_RESIDUAL:
        z += tl.load(residual_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    stored = z.to(z_ptr.dtype.element_ty)
    tl.store(z_ptr + offset, stored, mask=mask)

    normalized, mean, rstd = normalize(stored.to(tl.float32), column_mask, eps, COLUMNS)
    tl.store(mean_ptr + row, mean, mask=row_mask)
    tl.store(rstd_ptr + row, rstd, mask=row_mask)
    weight = tl.load(weight_ptr + column[None, :], mask=column_mask, other=0.0).to(tl.float32)
    ln_bias = tl.load(ln_bias_ptr + column[None, :], mask=column_mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + offset, normalized * weight + ln_bias, mask=mask)


@triton.jit
def _load_rows(
    grad_out_ptr, z_ptr, mean_ptr, rstd_ptr, row_key_ptr, first, tokens,
    COLUMNS: tl.constexpr, HAS_DROPOUT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """d out, z, mean, rstd and keys of the tile at row ``first``; rows past the end are the last one."""
    row = tl.minimum(first + tl.arange(0, BLOCK_M), tokens - 1)
    column = tl.arange(0, BLOCK_N)[None, :]
    offset = row[:, None].to(tl.int64) * COLUMNS + column
    grad_out = tl.load(grad_out_ptr + offset, mask=column < COLUMNS, other=0.0)
    z = tl.load(z_ptr + offset, mask=column < COLUMNS, other=0.0)
    row_key = tl.zeros((BLOCK_M,), tl.int64)
    if HAS_DROPOUT:
        row_key = tl.load(row_key_ptr + row)
    return grad_out, z, tl.load(mean_ptr + row), tl.load(rstd_ptr + row), row_key


@triton.jit(do_not_specialize=["tokens", "threshold", "site"])
def _residual_layernorm_bwd_kernel(
    grad_out_ptr,
    z_ptr,
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    row_key_ptr,
    rng_key_ptr,
    grad_x_ptr,
    grad_residual_ptr,
    partial_ptr,  # (programs, 3 or 2, COLUMNS) fp32: sums of d weight, d ln_bias, d bias
    tokens,
    threshold,
    scale,
    site,
    COLUMNS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    WRITE_GRAD_X: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    column = tl.arange(0, BLOCK_N)
    column_mask = column[None, :] < COLUMNS
    sum_weight = tl.zeros((BLOCK_N,), tl.float32)
    sum_ln_bias = tl.zeros((BLOCK_N,), tl.float32)
    sum_bias = tl.zeros((BLOCK_N,), tl.float32)
    rng_key = 0
    if HAS_DROPOUT:
        rng_key = tl.load(rng_key_ptr)
    step = tl.num_programs(0) * BLOCK_M
    ahead = _load_rows(
        grad_out_ptr, z_ptr, mean_ptr, rstd_ptr, row_key_ptr, tl.program_id(0) * BLOCK_M, tokens,
        COLUMNS, HAS_DROPOUT, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    for first in range(tl.program_id(0) * BLOCK_M, tokens, step):
        grad_out, z, mean, rstd, row_key = ahead
        ahead = _load_rows(
            grad_out_ptr, z_ptr, mean_ptr, rstd_ptr, row_key_ptr, first + step, tokens,
            COLUMNS, HAS_DROPOUT, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        row = first + tl.arange(0, BLOCK_M)
        mask = column_mask
        grad_out = grad_out.to(tl.float32)
        if BLOCK_M > 1:  # a single row is before the end
            mask = (row < tokens)[:, None] & column_mask
            grad_out = tl.where(mask, grad_out, 0.0)
        offset = row[:, None].to(tl.int64) * COLUMNS + column[None, :]
        # Read again for every tile, from the cache: registers are the limit.
        weight = tl.load(weight_ptr + column[None, :], mask=column_mask, other=0.0).to(tl.float32)
        normalized = tl.where(mask, (z.to(tl.float32) - mean[:, None]) * rstd[:, None], 0.0)
        grad_z = normalize_bwd(grad_out * weight, normalized, rstd, COLUMNS)
        tl.store(grad_residual_ptr + offset, grad_z, mask=mask)
        # One number a column, not one a row and column: a thread adds the rows it holds.
        sum_weight += tl.sum(grad_out * normalized, axis=0)
        sum_ln_bias += tl.sum(grad_out, axis=0)
        if HAS_DROPOUT:
            grad_z = drop(grad_z, row_key, rng_key, threshold, scale, site, BLOCK_M, BLOCK_N)
        if WRITE_GRAD_X:
            tl.store(grad_x_ptr + offset, grad_z, mask=mask)
        if HAS_BIAS:
            # Of a row past the end d out and xhat are 0, so d z is; columns past the end are not stored.
            sum_bias += tl.sum(grad_z, axis=0)

    partial_ptr += tl.program_id(0).to(tl.int64) * (3 if HAS_BIAS else 2) * COLUMNS
    inside = column < COLUMNS
    tl.store(partial_ptr + column, sum_weight, mask=inside)
    tl.store(partial_ptr + COLUMNS + column, sum_ln_bias, mask=inside)
    if HAS_BIAS:
        tl.store(partial_ptr + 2 * COLUMNS + column, sum_bias, mask=inside)


def residual_layernorm_fwd(
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    weight: Tensor,
    ln_bias: Tensor,
    row_key: Tensor,
    rng_key: Tensor,
    eps: float,
    p: float,
    site: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See bert_fast/reference.py. TypeError for float64, ValueError for H above 8192."""
    tokens, columns = x.shape
    rows.check_tensors("residual_layernorm", columns, x=x, bias=bias, residual=residual, weight=weight, ln_bias=ln_bias)
    out = torch.empty_like(x if residual is None else residual)
    z = torch.empty_like(out)
    mean = torch.empty(tokens, dtype=torch.float32, device=x.device)
    rstd = torch.empty_like(mean)
    if tokens:
        config = choice.of("residual_layernorm.fwd", _launch_config(columns, "fwd", z.dtype))
        _residual_layernorm_fwd_kernel[(rows.cdiv(tokens, config["BLOCK_M"]),)](
            x_ptr=x,
            bias_ptr=x if bias is None else bias,
            residual_ptr=x if residual is None else residual,
            weight_ptr=weight,
            ln_bias_ptr=ln_bias,
            row_key_ptr=row_key,
            rng_key_ptr=rng_key,
            out_ptr=out,
            z_ptr=z,
            mean_ptr=mean,
            rstd_ptr=rstd,
            tokens=tokens,
            eps=eps,
            threshold=dropout_threshold(p),
            scale=dropout_scale(p),
            site=site,
            COLUMNS=columns,
            HAS_BIAS=bias is not None,
            HAS_RESIDUAL=residual is not None,
            HAS_DROPOUT=p > 0.0,
            **config,
        )
    return out, z, mean, rstd


def residual_layernorm_bwd(
    grad_out: Tensor,
    z: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    row_key: Tensor,
    rng_key: Tensor,
    p: float,
    site: int,
    x_dtype: torch.dtype,
    has_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See bert_fast/reference.py: x's gradient is returned empty (0, H) where it is the residual's."""
    tokens, columns = z.shape
    rows.check_tensors("residual_layernorm", columns, grad_out=grad_out, z=z, weight=weight)
    same = p == 0.0 and x_dtype == z.dtype
    grad_x = torch.empty((0 if same else tokens, columns), dtype=x_dtype, device=z.device)
    grad_residual = torch.empty_like(z)
    grad_weight, grad_ln_bias = torch.empty_like(weight), torch.empty_like(weight)
    grad_bias = torch.empty_like(weight) if has_bias else weight.new_empty(0)
    config = choice.of("residual_layernorm.bwd", _launch_config(columns, "bwd", z.dtype))
    programs = rows.tile_programs(z.device, tokens, config, 8 * _elements("bwd", z.dtype))
    outputs = [grad_weight, grad_ln_bias] + ([grad_bias] if has_bias else [])
    partial = torch.empty((programs, len(outputs), columns), dtype=torch.float32, device=z.device)
    if tokens:
        _residual_layernorm_bwd_kernel[(programs,)](
            grad_out_ptr=grad_out,
            z_ptr=z,
            mean_ptr=mean,
            rstd_ptr=rstd,
            weight_ptr=weight,
            row_key_ptr=row_key,
            rng_key_ptr=rng_key,
            grad_x_ptr=grad_x,
            grad_residual_ptr=grad_residual,
            partial_ptr=partial,
            tokens=tokens,
            threshold=dropout_threshold(p),
            scale=dropout_scale(p),
            site=site,
            COLUMNS=columns,
            HAS_BIAS=has_bias,
            HAS_DROPOUT=p > 0.0,
            WRITE_GRAD_X=not same,
            **config,
        )
    rows.sum_partials(partial, outputs)
    return grad_x, grad_residual, grad_bias, grad_weight, grad_ln_bias
