"""bias_gelu: out = GELU(x + bias) with the exact normal distribution function, one pass each way.

With u = x + bias, Phi(u) = (1 + erf(u / sqrt 2)) / 2 and phi(u) = exp(-u^2 / 2) / sqrt(2 pi):

    forward   out = u * Phi(u)
    backward  d x = d out * (Phi(u) + u * phi(u));   d bias = sum over rows of d x

Saved: x; the activation is computed again in the backward. Bytes for (T, F) in an e-byte dtype: 2 T F e forward
(x; out), 3 T F e backward (d out, x; d x).

In 16 bits Phi and phi share one exponential, and the rest is a polynomial that errs less than the result rounds:
over all 16-bit inputs the error is PyTorch's. As compiled for 8.0 and 9.0 an element takes 21 instructions forward
(17.5 are arithmetic and conversions) and 25 a round of the backward's loop; for 10.0, which multiplies two numbers at
a time, 15 and 19. With libdevice's erf, which float32 keeps, it took 38 and 54, more than a GPU does in the time of
the memory traffic.

Source: D. Hendrycks and K. Gimpel, "Gaussian Error Linear Units", 2016.
"""

import torch
import triton
import triton.language as tl

from bert_fast import choice
from bert_fast.kernels import rows

Tensor = torch.Tensor


def _launch_config(columns: int, direction: str) -> dict:
    """Tiles of four rows by 1024 columns, 4 warps: 32 elements a thread. Reasoned; no GPU has measured it yet.

    BERT's 3072 and 4096 columns are whole tiles. Four rows share one read of the bias and put four 128-bit loads a
    tensor under way; the backward has two tensors to load and its sums to keep, so it takes two rows.
    """
    block_n = min(1024, max(16, rows.next_power_of_2(columns)))
    block_m = min(32, (4096 if direction == "fwd" else 2048) // block_n)
    return {
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "num_warps": max(1, min(4, block_m * block_n // 256)),
        "num_stages": 1,
    }


@triton.jit
def _tail(u):
    """For 16-bit results: exp(-u^2 / 2), and Phi(-|u|) divided by it.

    The quotient is a polynomial of degree 8 in |u|, minimax in relative error where PyTorch's float32 has that
    accuracy (2^-13 up to |u| = 3.5, found by iterated weighted least squares) and in absolute error (6e-8) beyond;
    from 4.5 on it is constant, and the exponential takes both to 0.
    """
    near = tl.minimum(tl.abs(u), 4.5)
    quotient = 1.39939e-05 * near - 0.0002869983
    quotient = quotient * near + 0.002581927
    quotient = quotient * near - 0.01361214
    quotient = quotient * near + 0.04788189
    quotient = quotient * near - 0.1228293
    quotient = quotient * near + 0.2462176
    quotient = quotient * near - 0.3983652
    quotient = quotient * near + 0.4999844
    return tl.exp2(u * u * -0.7213475204444817), quotient, near


@triton.jit
def gelu(u, EXACT: tl.constexpr):
    """GELU(u) in float32; without EXACT as near to it as a 16-bit result can tell."""
    if EXACT:
        return u * (0.5 * (1.0 + tl.erf(u * 0.7071067811865476)))
    else:
        exponential, quotient, near = _tail(u)
        return tl.maximum(u, 0.0) - exponential * quotient * near  # u Phi(u) = max(u, 0) - |u| Phi(-|u|)


@triton.jit
def gelu_slope(u, EXACT: tl.constexpr):
    """GELU'(u) = Phi(u) + u phi(u) in float32; without EXACT as near to it as a 16-bit result can tell."""
    if EXACT:
        density = tl.exp(-0.5 * u * u) * 0.3989422804014327
        return 0.5 * (1.0 + tl.erf(u * 0.7071067811865476)) + u * density
    else:
        exponential, quotient, _ = _tail(u)
        left = exponential * (quotient - tl.abs(u) * 0.3989422804014327)  # GELU'(-|u|) = 1 - GELU'(|u|)
        return tl.where(u < 0.0, left, 1.0 - left)


@triton.jit(do_not_specialize=["tokens"])
def _bias_gelu_fwd_kernel(
    x_ptr,
    bias_ptr,
    out_ptr,
    tokens,
    COLUMNS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    column_blocks: tl.constexpr = (COLUMNS + BLOCK_N - 1) // BLOCK_N
    program = tl.program_id(0)
    row = (program // column_blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = (program % column_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (row[:, None] < tokens) & (column[None, :] < COLUMNS)
    offset = row[:, None].to(tl.int64) * COLUMNS + column[None, :]
    u = tl.load(x_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    if HAS_BIAS:
        u += tl.load(bias_ptr + column[None, :], mask=column[None, :] < COLUMNS, other=0.0).to(tl.float32)
    tl.store(out_ptr + offset, gelu(u, out_ptr.dtype.element_ty == tl.float32), mask=mask)


@triton.jit(do_not_specialize=["tokens"])
def _bias_gelu_bwd_kernel(
    grad_out_ptr,
    x_ptr,
    bias_ptr,
    grad_x_ptr,
    partial_ptr,  # (row programs, COLUMNS) fp32: sums of d bias
    tokens,
    COLUMNS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    column_blocks: tl.constexpr = (COLUMNS + BLOCK_N - 1) // BLOCK_N
    program = tl.program_id(0) // column_blocks
    programs = tl.num_programs(0) // column_blocks
    column = (tl.program_id(0) % column_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    column_mask = column[None, :] < COLUMNS
    if HAS_BIAS:
        bias = tl.load(bias_ptr + column[None, :], mask=column_mask, other=0.0).to(tl.float32)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for tile in range(program, tl.cdiv(tokens, BLOCK_M), programs):
        row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        mask = (row[:, None] < tokens) & column_mask
        offset = row[:, None].to(tl.int64) * COLUMNS + column[None, :]
        grad_out = tl.load(grad_out_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        u = tl.load(x_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        if HAS_BIAS:
            u += bias
        grad_x = grad_out * gelu_slope(u, grad_x_ptr.dtype.element_ty == tl.float32)
        tl.store(grad_x_ptr + offset, grad_x, mask=mask)
        if HAS_BIAS:
            total += grad_x
    if HAS_BIAS:
        tl.store(partial_ptr + program.to(tl.int64) * COLUMNS + column, tl.sum(total, axis=0), mask=column < COLUMNS)


def bias_gelu_fwd(x: Tensor, bias: Tensor | None) -> Tensor:
    """See bert_fast/reference.py. TypeError for float64."""
    rows.check_tensors("bias_gelu", x=x, bias=bias)
    tokens, columns = x.shape
    out = torch.empty_like(x)
    if out.numel():
        config = choice.of("bias_gelu.fwd", _launch_config(columns, "fwd"))
        tiles = rows.cdiv(tokens, config["BLOCK_M"]) * rows.cdiv(columns, config["BLOCK_N"])
        _bias_gelu_fwd_kernel[(tiles,)](
            x_ptr=x,
            bias_ptr=x if bias is None else bias,
            out_ptr=out,
            tokens=tokens,
            COLUMNS=columns,
            HAS_BIAS=bias is not None,
            **config,
        )
    return out


def bias_gelu_bwd(grad_out: Tensor, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """See bert_fast/reference.py. TypeError for float64."""
    rows.check_tensors("bias_gelu", grad_out=grad_out, x=x, bias=bias)
    tokens, columns = x.shape
    grad_x = torch.empty_like(x)
    config = choice.of("bias_gelu.bwd", _launch_config(columns, "bwd"))
    column_blocks = rows.cdiv(columns, config["BLOCK_N"])
    tiles = rows.cdiv(tokens, config["BLOCK_M"])
    # Without a bias there is no sum to keep: one program a tile.
    programs = tiles if bias is None else min(tiles, rows.cdiv(rows.row_programs(x.device, 2**30), column_blocks))
    partial = torch.empty((0 if bias is None else programs, 1, columns), dtype=torch.float32, device=x.device)
    if grad_x.numel():
        _bias_gelu_bwd_kernel[(programs * column_blocks,)](
            grad_out_ptr=grad_out,
            x_ptr=x,
            bias_ptr=x if bias is None else bias,
            grad_x_ptr=grad_x,
            partial_ptr=partial,
            tokens=tokens,
            COLUMNS=columns,
            HAS_BIAS=bias is not None,
            **config,
        )
    if bias is None:
        return grad_x, x.new_empty(0)
    grad_bias = torch.empty_like(bias)
    rows.sum_partials(partial, [grad_bias])
    return grad_x, grad_bias
