"""Attention of packed sequences: out = dropout(softmax(scale * q k^T)) v, bidirectional and block-diagonal.

Fused: scores, softmax, dropout and both products, from packed projections qkv (T, 3, A, D) to (T, A*D); the
(S, S) scores exist one tile at a time. Per sequence of S tokens and per head, with mask M (0 or 1/keep):

    forward   P = softmax(scale q k^T), out = (P * M) v,  lse = logsumexp(scale q k^T)
    backward  P = exp(scale q k^T - lse),  dV = (P * M)^T dO,  dP = M * (dO v^T),
              dS = P * (dP - rowsum(dO * out)),  dq = scale dS k,  dk = scale dS^T q

Saved for the backward: qkv, out, lse (A, T) float32; M is drawn again (bert_fast/dropout_mask.py names its bits).
The forward runs down the keys with a running maximum and sum (online softmax). The backward is two kernels,
each of which owns what it writes, so nothing is added atomically and the same inputs give the same bits:
`dq` (a block of queries runs down the keys; it also makes rowsum(dO * out), once) and then `dkv` (a block of
keys runs down the queries). Both hold
scores as (queries, keys), the one orientation in which a thread of a tensor core's tile owns whole Philox calls.
The factor 1/keep of M is applied once, to sums: dS = (P * (K dP' - keep delta)) /
keep, with K in {0, 1} and dP' = dO v^T. Exponentials are powers of two, log2(e) is folded into the scale.

Where the gradient of a bias in qkv is wanted, each program of dq and of dkv leaves the sum of its rows of dq or dv, in
float32 and before they are rounded, and a third kernel adds those: 16 A D / BLOCK bytes a token, where a pass over dq,
dk and dv of 16 bits reads 6 A D. dk sums to 0 (reference.attention_bwd says why), so nothing sums it.

Per head and sequence, in elements of e bytes, without tile padding:
    forward   4 S^2 D FLOPs;   bytes S (4 D e + 4): q, k, v read and out written, lse written
    backward  14 S^2 D FLOPs (10 S^2 D, if both kernels shared scores and dP);
              bytes S (12 D e + 16): q, k, v, dO read twice, out read, dq, dk, dv written, lse and delta
K and V of one head and sequence (64 KiB each at S = 512, D = 64, 16 bit) are read again by each query block;
the blocks of a head and sequence are neighbours in the grid, so those reads are served by the L2 cache.

The grid has max_seqlen / BLOCK programs per head and sequence; programs past a sequence's end return at once.
One more, virtual sequence covers the rows from cu_seqlens[-1] to T and writes zeros there: their number is
known to the device alone.

Sources: T. Dao et al., "FlashAttention", 2022, and T. Dao, "FlashAttention-2", 2023 (tiling, backward);
M. Milakov, N. Gimelshein, "Online normalizer calculation for softmax", 2018.
"""

import math
import warnings

import torch
import triton
import triton.language as tl

from bert_fast import choice, compilers
from bert_fast.dropout_mask import dropout_scale, dropout_threshold
from bert_fast.kernels import rows
from bert_fast.kernels.philox import attention_keep

_LOG2_E = 1.4426950408889634
_LN_2 = tl.constexpr(0.6931471805599453)
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_SINCE_3_8 = compilers.since(3, 8)  # asked once: a launch has no time for it
_UNSPECIALIZED = ("tokens", "sequences", "blocks", "heads", "threshold", "site")  # no variant for 1 or multiples of 16
# Of the sum of the programs' sums: 32 columns are a line of 128 bytes, and 64 x 512 tokens are 5 blocks of rows.
_SUM_CONFIG = {"BLOCK_P": 128, "BLOCK_N": 32, "num_warps": 4, "num_stages": 1}

# Compute capability -> from which max_seqlen on the forward or the backward is attention_hopper.py's, where that takes
# the case. Nowhere, as nothing has been measured: `make gpu` times both ways, and after a win at 256 and at 512
# {90: 256} would be what to write.
ASYNCHRONOUS_FORWARD: dict[int, int] = {}
ONE_PASS_BACKWARD: dict[int, int] = {}
_without_gluon: set[str] = set()  # "forward", "backward": where attention_hopper.py could not be had in this process


def _launch_config(kernel: str, capability: int, head_dim: int, dtype: torch.dtype, max_seqlen: int) -> dict:
    """Tile sizes and launch options of ``kernel`` ("fwd", "dq" or "dkv"), both directions.

    BLOCK_M counts queries, BLOCK_N keys (a multiple of 64, as the dropout bits want it). Chosen by compiling
    ahead of time for compute capability 8.0, 9.0 and 10.0: at head sizes 32 to 128 nothing spills and the
    products are the target's own matrix instructions. Not yet tuned by running. Small tiles and few warps
    leave room for several programs a multiprocessor, and waste least past the end of a sequence.
    """
    block_d = max(16, rows.next_power_of_2(head_dim))
    block_m, warps, stages = 64, 4, 2
    if dtype == torch.float32:  # exact products on the ordinary units: registers are the limit
        block_m, warps, stages = (32 if block_d <= 64 else 16), 8, 1
    elif block_d == 256:
        block_m, warps, stages = (32 if kernel == "dkv" else 64), 8, 1
    elif block_d == 128:
        wide = capability >= 90 and kernel != "dkv"
        block_m = 128 if wide or capability == 90 else 64  # dkv with 64 queries spills on 9.0
        warps, stages = 8, (2 if wide else 1)
    elif kernel == "fwd" and capability < 100:
        stages = 3 if capability >= 90 else 2
    elif kernel == "dq" and capability < 90 and block_d == 64:
        block_m, warps = 128, 8
    elif capability >= 100 and max_seqlen > 64 and (kernel == "fwd" or (kernel == "dq" and block_d == 64)):
        block_m = 128  # one row of scores a thread; dq of smaller heads spills with them
    if kernel == "fwd" and capability >= 100 and block_d == 64 and _SINCE_3_8:
        stages = 1  # with two, Triton 3.8 and 3.9 spill in its loop
    if kernel == "dq" and capability >= 100:
        stages = 1  # with two, Triton before 3.9 leaves out the fence between copies and the products that read them
    return {"BLOCK_M": block_m, "BLOCK_N": 64, "BLOCK_D": block_d, "num_warps": warps, "num_stages": stages}


@triton.jit
def _sequence(cu_seqlens_ptr, tokens, sequences, blocks, heads):
    """This program's block, head, sequence's first token and number of tokens; sequence number ``sequences`` is the
    unused tail.

    Blocks of a head are neighbours, so that the L2 cache has their keys and values; then come a sequence's heads. So
    programs of a sequence start together, and where long ones are first, a kernel ends with short programs.
    """
    block, rest = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    head, sequence = rest % heads, rest // heads
    start = tl.minimum(tl.maximum(tl.load(cu_seqlens_ptr + sequence), 0), tokens)
    end = tokens
    if sequence < sequences:
        end = tl.minimum(tl.load(cu_seqlens_ptr + sequence + 1), tokens)
    return block, head, start, end - start, sequence == sequences


@triton.jit
def _tile_pointers(ptr, row_stride, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    return ptr + tl.arange(0, ROWS)[:, None] * row_stride + tl.arange(0, BLOCK_D)[None, :]


@triton.jit
def _load(ptr, row_stride, rows, HEAD_DIM: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr, FULL: tl.constexpr):
    """The tile (ROWS, BLOCK_D) at ``ptr``; zeros past ``rows`` (unless FULL: it has them all) and HEAD_DIM."""
    pointers = _tile_pointers(ptr, row_stride, ROWS, BLOCK_D)
    if FULL and HEAD_DIM == BLOCK_D:
        tile = tl.load(pointers)
    else:
        mask = (tl.arange(0, ROWS) < rows)[:, None] & (tl.arange(0, BLOCK_D) < HEAD_DIM)[None, :]
        tile = tl.load(pointers, mask=mask, other=0.0)
    return tile


@triton.jit
def _store(ptr, row_stride, rows, tile, HEAD_DIM: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    mask = (tl.arange(0, ROWS) < rows)[:, None] & (tl.arange(0, BLOCK_D) < HEAD_DIM)[None, :]
    tl.store(_tile_pointers(ptr, row_stride, ROWS, BLOCK_D), tile.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _store_zeros(ptr, row_stride, first, rows, step, HEAD_DIM: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """Zeros to every ``step``-th tile (ROWS, HEAD_DIM) of the ``rows`` rows at ``ptr``, from row ``first`` on."""
    for row in range(first, rows, step):
        zeros = tl.zeros((ROWS, BLOCK_D), tl.float32)
        _store(ptr + tl.cast(row, tl.int64) * row_stride, row_stride, rows - row, zeros, HEAD_DIM, ROWS, BLOCK_D)


@triton.jit
def _store_sum(partial_ptr, blocks, heads, rows, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """The sum of the tile ``rows`` (any, BLOCK_D) to the row of ``partial_ptr`` that the heads of a sequence's block
    share."""
    column = tl.arange(0, BLOCK_D)
    block, rest = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    row = rest // heads * blocks + block
    partial_ptr += (row.to(tl.int64) * heads + rest % heads) * HEAD_DIM
    tl.store(partial_ptr + column, tl.sum(rows, 0), mask=column < HEAD_DIM)


@triton.jit
def _sample(row_key_ptr, start):
    return (tl.load(row_key_ptr + start) >> 32).to(tl.int32)


@triton.jit
def _zero(threshold):
    """0.0, which the compiler does not know: it would round first and then select 16-bit halves of packed pairs."""
    return tl.where(threshold < 0, 1.0, 0.0)


@triton.jit
def _fwd_keys(
    acc, total, peak, q, k_ptr, v_ptr, row_stride, first, last, length, query, sample, rng_key, head,
    scale_log2, threshold, site,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    HAS_DROPOUT: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """Online softmax over keys ``first`` .. ``last``: the new sums, row totals and row maxima (in powers of two)."""
    for key in range(first, last, BLOCK_N):
        offset = tl.cast(key, tl.int64) * row_stride
        k = _load(k_ptr + offset, row_stride, length - key, HEAD_DIM, BLOCK_N, BLOCK_D, FULL)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        if not FULL:
            scores = tl.where((key + tl.arange(0, BLOCK_N) < length)[None, :], scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1) * scale_log2)
        p = tl.exp2(scores * scale_log2 - new_peak[:, None])
        rescale = tl.exp2(peak - new_peak)
        total = total * rescale + tl.sum(p, 1)
        if HAS_DROPOUT:
            keep = attention_keep(rng_key, query, sample, head, key, threshold, site, BLOCK_M, BLOCK_N)
            p = tl.where(keep, p, _zero(threshold))
        v = _load(v_ptr + offset, row_stride, length - key, HEAD_DIM, BLOCK_N, BLOCK_D, FULL)
        acc = tl.dot(p.to(v.dtype), v, acc * rescale[:, None], input_precision="ieee")
        peak = new_peak
    return acc, total, peak


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def _attention_fwd_kernel(
    qkv_ptr, cu_seqlens_ptr, row_key_ptr, rng_key_ptr, out_ptr, lse_ptr,
    tokens, sequences, blocks, heads, scale_log2, keep_scale, threshold, site,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
):  # fmt: skip
    """Program (block of queries of one sequence, head)."""
    block, head, start, length, is_tail = _sequence(cu_seqlens_ptr, tokens, sequences, blocks, heads)
    width = heads * HEAD_DIM
    first = block * BLOCK_M
    out_ptr += tl.cast(start, tl.int64) * width + head * HEAD_DIM
    lse_ptr += tl.cast(head, tl.int64) * tokens + start
    query = first + tl.arange(0, BLOCK_M)
    if is_tail:
        _store_zeros(out_ptr, width, first, length, blocks * BLOCK_M, HEAD_DIM, BLOCK_M, BLOCK_D)
        for row in range(first, length, blocks * BLOCK_M):
            rows = row + tl.arange(0, BLOCK_M)
            tl.store(lse_ptr + rows, tl.zeros((BLOCK_M,), tl.float32), mask=rows < length)
        return
    if first >= length:
        return

    row_stride = 3 * width
    q_ptr = qkv_ptr + tl.cast(start, tl.int64) * row_stride + head * HEAD_DIM
    q = _load(
        q_ptr + tl.cast(first, tl.int64) * row_stride, row_stride, length - first, HEAD_DIM, BLOCK_M, BLOCK_D, False
    )
    sample, rng_key = 0, 0
    if HAS_DROPOUT:
        sample, rng_key = _sample(row_key_ptr, start), tl.load(rng_key_ptr)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    peak = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    whole = length // BLOCK_N * BLOCK_N  # keys in full blocks need no bounds; the rest is one block more
    acc, total, peak = _fwd_keys(
        acc, total, peak, q, q_ptr + width, q_ptr + 2 * width, row_stride, 0, whole, length, query, sample, rng_key,
        head, scale_log2, threshold, site, HEAD_DIM, BLOCK_M, BLOCK_N, BLOCK_D, HAS_DROPOUT, True,
    )  # fmt: skip
    acc, total, peak = _fwd_keys(
        acc, total, peak, q, q_ptr + width, q_ptr + 2 * width, row_stride, whole, length, length, query, sample,
        rng_key, head, scale_log2, threshold, site, HEAD_DIM, BLOCK_M, BLOCK_N, BLOCK_D, HAS_DROPOUT, False,
    )  # fmt: skip
    _store(
        out_ptr + tl.cast(first, tl.int64) * width, width, length - first, acc * (keep_scale / total)[:, None],
        HEAD_DIM, BLOCK_M, BLOCK_D,
    )  # fmt: skip
    tl.store(lse_ptr + query, (peak + tl.log2(total)) * _LN_2, mask=query < length)


@triton.jit
def _dq_keys(
    dq, q, grad_out, lse_log2, delta, k_ptr, v_ptr, row_stride, first, last, length, query, sample, rng_key, head,
    scale_log2, threshold, site,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    HAS_DROPOUT: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """dS k, summed over keys ``first`` .. ``last``."""
    for key in range(first, last, BLOCK_N):
        offset = tl.cast(key, tl.int64) * row_stride
        k = _load(k_ptr + offset, row_stride, length - key, HEAD_DIM, BLOCK_N, BLOCK_D, FULL)
        v = _load(v_ptr + offset, row_stride, length - key, HEAD_DIM, BLOCK_N, BLOCK_D, FULL)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        if not FULL:
            scores = tl.where((key + tl.arange(0, BLOCK_N) < length)[None, :], scores, float("-inf"))
        p = tl.exp2(scores * scale_log2 - lse_log2[:, None])
        grad_p = tl.dot(grad_out, tl.trans(v), input_precision="ieee")
        if HAS_DROPOUT:
            keep = attention_keep(rng_key, query, sample, head, key, threshold, site, BLOCK_M, BLOCK_N)
            grad_p = tl.where(keep, grad_p, 0.0)
        grad_scores = p * (grad_p - delta[:, None])
        dq = tl.dot(grad_scores.to(k.dtype), k, dq, input_precision="ieee")
    return dq


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def _attention_bwd_dq_kernel(
    grad_out_ptr, qkv_ptr, out_ptr, lse_ptr, cu_seqlens_ptr, row_key_ptr, rng_key_ptr, grad_qkv_ptr, delta_ptr,
    partial_ptr, tokens, sequences, blocks, heads, scale_log2, grad_scale, keep, threshold, site,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    HAS_DROPOUT: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """Program (block of queries of one sequence, head): dq and delta = keep * rowsum(dO * out); the sum of dq's rows to
    ``partial_ptr`` (programs, heads * HEAD_DIM) float32. A query past the end has dO = 0 and so dq = 0."""
    block, head, start, length, is_tail = _sequence(cu_seqlens_ptr, tokens, sequences, blocks, heads)
    width = heads * HEAD_DIM
    row_stride = 3 * width
    first = block * BLOCK_M
    q_offset = tl.cast(start, tl.int64) * row_stride + head * HEAD_DIM
    if is_tail:
        _store_zeros(grad_qkv_ptr + q_offset, row_stride, first, length, blocks * BLOCK_M, HEAD_DIM, BLOCK_M, BLOCK_D)
    if is_tail | (first >= length):
        if HAS_BIAS:
            _store_sum(partial_ptr, blocks, heads, tl.zeros((1, BLOCK_D), tl.float32), HEAD_DIM, BLOCK_D)
        return

    rows = length - first
    q_ptr = qkv_ptr + q_offset
    q_first = tl.cast(first, tl.int64) * row_stride
    out_first = tl.cast(start + first, tl.int64) * width + head * HEAD_DIM
    query = first + tl.arange(0, BLOCK_M)
    statistics = tl.cast(head, tl.int64) * tokens + start + query
    q = _load(q_ptr + q_first, row_stride, rows, HEAD_DIM, BLOCK_M, BLOCK_D, False)
    grad_out = _load(grad_out_ptr + out_first, width, rows, HEAD_DIM, BLOCK_M, BLOCK_D, False)
    out = _load(out_ptr + out_first, width, rows, HEAD_DIM, BLOCK_M, BLOCK_D, False)
    delta = keep * tl.sum(grad_out.to(tl.float32) * out.to(tl.float32), 1)
    tl.store(delta_ptr + statistics, delta, mask=query < length)
    lse_log2 = tl.load(lse_ptr + statistics, mask=query < length, other=0.0) / _LN_2
    sample, rng_key = 0, 0
    if HAS_DROPOUT:
        sample, rng_key = _sample(row_key_ptr, start), tl.load(rng_key_ptr)
    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    whole = length // BLOCK_N * BLOCK_N
    dq = _dq_keys(
        dq, q, grad_out, lse_log2, delta, q_ptr + width, q_ptr + 2 * width, row_stride, 0, whole, length, query,
        sample, rng_key, head, scale_log2, threshold, site, HEAD_DIM, BLOCK_M, BLOCK_N, BLOCK_D, HAS_DROPOUT, True,
    )  # fmt: skip
    dq = _dq_keys(
        dq, q, grad_out, lse_log2, delta, q_ptr + width, q_ptr + 2 * width, row_stride, whole, length, length, query,
        sample, rng_key, head, scale_log2, threshold, site, HEAD_DIM, BLOCK_M, BLOCK_N, BLOCK_D, HAS_DROPOUT, False,
    )  # fmt: skip
    dq *= grad_scale
    if HAS_BIAS:
        _store_sum(partial_ptr, blocks, heads, dq, HEAD_DIM, BLOCK_D)
    _store(grad_qkv_ptr + q_offset + q_first, row_stride, rows, dq, HEAD_DIM, BLOCK_M, BLOCK_D)


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def _attention_bwd_dkv_kernel(
    grad_out_ptr, qkv_ptr, lse_ptr, delta_ptr, cu_seqlens_ptr, row_key_ptr, rng_key_ptr, grad_qkv_ptr,
    partial_ptr, tokens, sequences, blocks, heads, scale_log2, grad_scale, keep_scale, threshold, site,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    HAS_DROPOUT: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """Program (block of keys of one sequence, head): dk and dv, and the sum of dv's rows to ``partial_ptr``.

    No bounds on scores: a query past the end has dO = 0 and delta = 0, so it adds nothing; a key past the end
    is a column of its own, whose row of dk and dv is neither stored nor summed.
    """
    block, head, start, length, is_tail = _sequence(cu_seqlens_ptr, tokens, sequences, blocks, heads)
    width = heads * HEAD_DIM
    row_stride = 3 * width
    key = block * BLOCK_N
    offset = tl.cast(start, tl.int64) * row_stride + head * HEAD_DIM
    dk_ptr, dv_ptr = grad_qkv_ptr + offset + width, grad_qkv_ptr + offset + 2 * width
    if is_tail:
        _store_zeros(dk_ptr, row_stride, key, length, blocks * BLOCK_N, HEAD_DIM, BLOCK_N, BLOCK_D)
        _store_zeros(dv_ptr, row_stride, key, length, blocks * BLOCK_N, HEAD_DIM, BLOCK_N, BLOCK_D)
    if is_tail | (key >= length):
        if HAS_BIAS:
            _store_sum(partial_ptr, blocks, heads, tl.zeros((1, BLOCK_D), tl.float32), HEAD_DIM, BLOCK_D)
        return

    q_ptr = qkv_ptr + offset
    grad_out_ptr += tl.cast(start, tl.int64) * width + head * HEAD_DIM
    statistics = tl.cast(head, tl.int64) * tokens + start
    k_first = tl.cast(key, tl.int64) * row_stride
    k = _load(q_ptr + width + k_first, row_stride, length - key, HEAD_DIM, BLOCK_N, BLOCK_D, False)
    v = _load(q_ptr + 2 * width + k_first, row_stride, length - key, HEAD_DIM, BLOCK_N, BLOCK_D, False)
    if HAS_DROPOUT:
        sample, rng_key = _sample(row_key_ptr, start), tl.load(rng_key_ptr)
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for first in range(0, length, BLOCK_M):
        rows = length - first
        query = first + tl.arange(0, BLOCK_M)
        q = _load(q_ptr + tl.cast(first, tl.int64) * row_stride, row_stride, rows, HEAD_DIM, BLOCK_M, BLOCK_D, False)
        grad_out = _load(
            grad_out_ptr + tl.cast(first, tl.int64) * width, width, rows, HEAD_DIM, BLOCK_M, BLOCK_D, False
        )
        lse_log2 = tl.load(lse_ptr + statistics + query, mask=query < length, other=0.0) / _LN_2
        delta = tl.load(delta_ptr + statistics + query, mask=query < length, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        p = tl.exp2(scores * scale_log2 - lse_log2[:, None])
        grad_p = tl.dot(grad_out, tl.trans(v), input_precision="ieee")
        dropped = p
        if HAS_DROPOUT:
            keep = attention_keep(rng_key, query, sample, head, key, threshold, site, BLOCK_M, BLOCK_N)
            dropped = tl.where(keep, p, _zero(threshold))
            grad_p = tl.where(keep, grad_p, 0.0)
        dv = tl.dot(tl.trans(dropped.to(grad_out.dtype)), grad_out, dv, input_precision="ieee")
        grad_scores = p * (grad_p - delta[:, None])
        dk = tl.dot(tl.trans(grad_scores.to(q.dtype)), q, dk, input_precision="ieee")
    _store(dk_ptr + k_first, row_stride, length - key, dk * grad_scale, HEAD_DIM, BLOCK_N, BLOCK_D)
    dv *= keep_scale
    _store(dv_ptr + k_first, row_stride, length - key, dv, HEAD_DIM, BLOCK_N, BLOCK_D)
    if HAS_BIAS:
        is_key = (key + tl.arange(0, BLOCK_N) < length)[:, None]
        _store_sum(partial_ptr, blocks, heads, tl.where(is_key, dv, 0.0), HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=["dq_programs", "dkv_programs"])
def _attention_bias_kernel(
    partial_ptr, grad_bias_ptr, dq_programs, dkv_programs, width, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """Program (block of columns, one of q, k, v): the sum of what the programs of dq, none, or those of dkv left."""
    which = tl.program_id(1)
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = column < width
    first = tl.where(which == 0, 0, dq_programs)
    last = tl.where(which == 2, dq_programs + dkv_programs, dq_programs)
    total = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
    for start in range(first, last, BLOCK_P):
        program = start + tl.arange(0, BLOCK_P)[:, None]
        offset = program.to(tl.int64) * width + column[None, :]
        total += tl.load(partial_ptr + offset, mask=(program < last) & inside[None, :], other=0.0)
    tl.store(grad_bias_ptr + which * width + column, tl.sum(total, 0), mask=inside)


def _programs(name: str, qkv, cu_seqlens, max_seqlen: int) -> tuple[dict, int, int]:
    """The configuration of kernel ``name``, its blocks a sequence, and its programs a head."""
    config = _launch_config(name, rows.capability(qkv.device), qkv.shape[3], qkv.dtype, max_seqlen)
    config = choice.of(f"attention.{name}", config)
    blocks = max(1, rows.cdiv(max_seqlen, config["BLOCK_N" if name == "dkv" else "BLOCK_M"]))
    return config, blocks, blocks * cu_seqlens.numel()  # one sequence more than there are: the unused tail


def _launch(kernel, name, qkv, max_seqlen, arguments) -> None:
    tokens, _, heads, head_dim = qkv.shape
    cu_seqlens = arguments["cu_seqlens_ptr"]
    config, blocks, programs = _programs(name, qkv, cu_seqlens, max_seqlen)
    kernel[(programs * heads,)](
        **arguments, tokens=tokens, sequences=cu_seqlens.numel() - 1, blocks=blocks, heads=heads, HEAD_DIM=head_dim,
        **config,
    )  # fmt: skip


def _check(qkv: torch.Tensor, scale: float) -> None:
    if qkv.dtype not in _DTYPES:
        raise TypeError(
            f"bert_fast.attention: the Triton kernel has bfloat16, float16 and float32, not {qkv.dtype}; "
            'use bert_fast.set_backend(attention="reference")'
        )
    if not scale > 0:
        raise ValueError(f"bert_fast.attention: the Triton kernel needs a scale above 0, got {scale}")


def _gluon(direction: str, table: dict[int, int], qkv, max_seqlen: int, call):
    """``call`` with attention_hopper.py, where ``table`` says that it is to be used; else None.

    Also None where it cannot be had: an untested Gluon, a name that is not there, an error of the compiler. That is
    said once, and not tried again.
    """
    if direction in _without_gluon or max_seqlen < table.get(rows.capability(qkv.device), math.inf):
        return None
    try:
        compilers.refuse_untested_gluon()
        from bert_fast.kernels.experiments import attention_hopper

        return call(attention_hopper)
    except (torch.OutOfMemoryError, torch.AcceleratorError):  # of the device, not of the kernel
        raise
    except Exception as error:
        _without_gluon.add(direction)
        warnings.warn(
            f"bert_fast.attention: the Gluon {direction} cannot run here ({type(error).__name__}: {error}); the "
            "portable kernel serves in its place, with the same masks",
            RuntimeWarning,
            stacklevel=2,
        )
        return None


def attention_fwd(qkv, cu_seqlens, max_seqlen, row_key, rng_key, scale, p, site, bias=None):
    """qkv (T, 3, A, D) bf16, fp16 or fp32 -> out (T, A*D), lse (A, T) float32: see reference.attention_fwd.

    Raises TypeError for other dtypes, ValueError where ``scale`` is not above 0.
    """
    _check(qkv, scale)
    given = (qkv, cu_seqlens, max_seqlen, row_key, rng_key, scale, p, site)
    table = choice.of("attention.asynchronous", ASYNCHRONOUS_FORWARD)
    found = _gluon(
        "forward", table, qkv, max_seqlen, lambda own: own.attention_fwd(*given) if own.takes_forward(qkv) else None
    )
    if found is not None:
        choice.served("attention.asynchronous")
        return found
    tokens, _, heads, head_dim = qkv.shape
    out = qkv.new_empty((tokens, heads * head_dim))
    lse = qkv.new_empty((heads, tokens), dtype=torch.float32)
    if tokens:
        arguments = {
            "qkv_ptr": qkv, "cu_seqlens_ptr": cu_seqlens, "row_key_ptr": row_key, "rng_key_ptr": rng_key,
            "out_ptr": out, "lse_ptr": lse, "scale_log2": scale * _LOG2_E, "keep_scale": dropout_scale(p),
            "threshold": dropout_threshold(p), "site": site, "HAS_DROPOUT": dropout_threshold(p) > 0,
        }  # fmt: skip
        _launch(_attention_fwd_kernel, "fwd", qkv, max_seqlen, arguments)
    return out, lse


def attention_bwd(
    grad_out, qkv, out, lse, cu_seqlens, max_seqlen, row_key, rng_key, scale, p, site, bias_dtype=None
):  # fmt: skip
    """-> gradients of qkv (T, 3, A, D) in its dtype and of its bias (3, A, D) in ``bias_dtype``, empty (0,) where that
    is None: see reference.attention_bwd. Raises as attention_fwd."""
    _check(qkv, scale)
    given = (grad_out, qkv, out, lse, cu_seqlens, max_seqlen, row_key, rng_key, scale, p, site, bias_dtype)
    asked = (grad_out, qkv, out, max_seqlen)
    table = choice.of("attention.one_pass", ONE_PASS_BACKWARD)
    found = _gluon(
        "backward",
        table,
        qkv,
        max_seqlen,
        lambda own: own.attention_bwd(*given) if own.takes_backward(*asked) else None,
    )
    if found is not None:
        choice.served("attention.one_pass")
        return found
    grad_qkv = torch.empty_like(qkv)
    delta = torch.empty_like(lse)
    tokens, _, heads, head_dim = qkv.shape
    wanted, width = bias_dtype is not None, heads * head_dim
    if not tokens:
        return grad_qkv, qkv.new_zeros(qkv.shape[1:] if wanted else 0, dtype=bias_dtype)
    grad_bias = qkv.new_empty(qkv.shape[1:] if wanted else 0, dtype=bias_dtype)
    # The rows of dq's programs, then those of dkv's; a pointer to anything where there are none.
    programs = [_programs(name, qkv, cu_seqlens, max_seqlen)[2] for name in ("dq", "dkv")]
    partial = qkv.new_empty((sum(programs), width), dtype=torch.float32) if wanted else delta
    keep_scale = dropout_scale(p)
    arguments = {
        "grad_out_ptr": grad_out, "qkv_ptr": qkv, "lse_ptr": lse, "delta_ptr": delta,
        "cu_seqlens_ptr": cu_seqlens, "row_key_ptr": row_key, "rng_key_ptr": rng_key, "grad_qkv_ptr": grad_qkv,
        "scale_log2": scale * _LOG2_E, "grad_scale": scale * keep_scale, "threshold": dropout_threshold(p),
        "site": site, "HAS_DROPOUT": dropout_threshold(p) > 0, "HAS_BIAS": wanted,
    }  # fmt: skip
    for_dq = {"out_ptr": out, "keep": 1.0 / keep_scale if keep_scale else 0.0, "partial_ptr": partial}
    for_dkv = {"keep_scale": keep_scale, "partial_ptr": partial[programs[0] :] if wanted else partial}
    _launch(_attention_bwd_dq_kernel, "dq", qkv, max_seqlen, {**arguments, **for_dq})
    _launch(_attention_bwd_dkv_kernel, "dkv", qkv, max_seqlen, {**arguments, **for_dkv})
    if wanted:
        _attention_bias_kernel[rows.cdiv(width, _SUM_CONFIG["BLOCK_N"]), 3](
            partial_ptr=partial, grad_bias_ptr=grad_bias, dq_programs=programs[0], dkv_programs=programs[1],
            width=width, **_SUM_CONFIG,
        )  # fmt: skip
    return grad_qkv, grad_bias
