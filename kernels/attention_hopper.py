"""Attention's backward at the minimum of five matrix products, for compute capability 9.0, in Gluon.

The portable backward (attention.py) makes the scores, dP and dropout's bits twice, once in each of its two kernels.
Here one program owns one (sequence, head), so each is made once. It runs down blocks of KEYS keys, and for each of
them down blocks of 64 queries (S tokens, KEYS = 64 or 128):

    S^T  = K Q^T        P^T = exp2(scale S^T - lse)
    dP^T = V dO^T       dS^T = P^T * (M dP^T - delta)
    dV  += (M P^T) dO   dK += dS^T Q       dQ += dS K

dK and dV stay in registers for a block of keys; dQ of the whole sequence is kept in shared memory in float32, each
element by the one thread that also adds to it, and written once. Nothing is added atomically and the order is fixed:
the same inputs give the same bits. Masks are those of every other backend, bit for bit.

Scores lie as (keys, queries), so that P^T and dS^T, as they come out of the tensor cores, already are the left operands
of dV and dK: only dS is stored, for dQ. A thread then holds 2 of the 8 keys that share a Philox call, so bits are drawn
by other threads than use them and go through shared memory, one bit a score; each thread reads its 32 bits as a word.

The products are asynchronous. What runs while the tensor cores work, for each tile of KEYS x 64:
    S, dP       the second half of the bits of this tile
    dP          exponentials, dropout of P, rounding
    dV          dropout of dP, dS, rounding
    dK, dQ      the first half of the bits of the next tile
Tiles of Q and dO are copied one tile ahead; keys and values of the next block while dK and dV are written.

Counts for one (sequence, head), 16-bit elements, n = ceil(S / KEYS) blocks of keys, no tile padding, D = 64:
    products      10 S^2 D FLOPs (attention.py: 14 S^2 D); Philox for S^2 scores (attention.py: 2 S^2)
    device memory S (16 D + 4) bytes: q, k, v, dO, out read and dq, dk, dv written once, and lse
    L2 cache      S (4 D (n - 1) + 2 D) bytes more: Q and dO for each further block of keys, dO once more for delta
    shared memory bytes moved for 64 x 64 scores at KEYS = 128: operands of S and dP 32 Ki, of dV and dK 16 Ki, of dQ
                  24 Ki; dS written 8 Ki; sums of dQ read and written 16 Ki; Q and dO written 8 Ki
Shared memory held, bytes: 256 KEYS for K and V, 32 Ki for two tiles of Q and dO, 128 KEYS for dS, 64 KEYS for bits, 512
for each block of 64 queries of lse and delta, and 16 Ki for each of dQ's: 220 KiB at 512 (of 227), 154 at 256 and 93 at
128, where a program has 4 warps in place of 8 and two share a multiprocessor. Registers allow no more either.
One program a pair is the limit of this design: fewer pairs than multiprocessors leave some without work.

Not the default: nothing here has been measured. ``ONE_PASS_BACKWARD`` in attention.py is where it becomes one.

Sources: T. Dao, "FlashAttention-2", 2023 (the equations; keys outside and queries inside); J. Shah et al.,
"FlashAttention-3", 2024 (asynchronous products on this GPU, left operands from registers).
"""

import itertools

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import async_copy

from .. import reference
from ..random import ROUNDS, dropout_scale, dropout_threshold
from .attention import attention_case
from .rows import cdiv, next_power_of_2

CAPABILITY = 90
LONGEST = 512  # tokens of a sequence: more sums of dQ do not fit in shared memory
QUERIES = gl.constexpr(64)  # of a tile
SIZE = gl.constexpr(64)  # of a head
_LOG2_E = gl.constexpr(1.4426950408889634)
_ROUNDS = gl.constexpr(ROUNDS)
_TAIL_PROGRAMS = 8  # write zeros to the rows that belong to no sequence, whose number the device alone knows
_TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16"}
_UNSPECIALIZED = ("tokens", "sequences", "heads", "threshold", "site")  # no variant for 1 or multiples of 16
# Names of Triton 3.7 and 3.9, or else of those before.
_barrier = getattr(gl, "barrier", None) or gl.thread_barrier
_async_load = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared


def _launch_config(max_seqlen: int) -> dict:
    """BLOCKS (of 64 queries, at most) and num_warps; a program's block of keys has 16 for each warp.

    Four warps where two programs then fit on a multiprocessor, in registers and shared memory; otherwise eight,
    which read every tile of Q and dO, and add to dQ, half as often.
    """
    blocks = max(1, next_power_of_2(cdiv(max_seqlen, 64)))
    return {"BLOCKS": blocks, "num_warps": 4 if blocks <= 2 else 8}


@gluon.constexpr_function
def _drawn_bits(groups):
    """Where a drawn tile of bits (groups, 32, 4, 2, 2) lies in shared memory: block of 64 keys, lane and quarter of the
    reader's word, warp % 2 and warp // 2 of the reader. A reader's four quarters are 16 bytes, and lanes neighbours.
    """
    lanes = [[0, 2**i, 0, 0, 0] for i in range(5)]
    return [[0, 0, 1, 0, 0], [0, 0, 2, 0, 0], *lanes, [0, 0, 0, 1, 0], [0, 0, 0, 0, 1], [1, 0, 0, 0, 0]][: 8 + groups]


@gluon.constexpr_function
def _read_bits(groups):
    """The registers that read such a tile: the four quarters of its word by each thread."""
    bases = _drawn_bits(groups)
    return gl.DistributedLinearLayout(bases[:2], bases[2:7], bases[7:], [], [groups, 32, 4, 2, 2])


@gluon.jit
def _tile(ptr, row_stride, first, length, ROWS: gl.constexpr, COPY: gl.constexpr):
    """Pointers (ROWS, 64) to the rows ``first ..``, and which of them are before ``length``."""
    row = first + gl.arange(0, ROWS, layout=gl.SliceLayout(1, COPY))
    column = gl.arange(0, SIZE, layout=gl.SliceLayout(0, COPY))
    return ptr + ((row * row_stride)[:, None] + column[None, :]), (row < length)[:, None]


@gluon.jit
def _copy_in(tile, ptr, row_stride, first, length, ROWS: gl.constexpr, COPY: gl.constexpr):
    """Start to copy rows ``first ..`` into shared memory; zeros past ``length``."""
    pointers, mask = _tile(ptr, row_stride, first, length, ROWS, COPY)
    _async_load(tile, pointers, mask=mask)


@gluon.jit
def _load(ptr, row_stride, first, length, ROWS: gl.constexpr, COPY: gl.constexpr):
    pointers, mask = _tile(ptr, row_stride, first, length, ROWS, COPY)
    return gl.load(pointers, mask=mask, other=0.0).to(gl.float32)


@gluon.jit
def _store(ptr, row_stride, first, length, values, ROWS: gl.constexpr, COPY: gl.constexpr):
    pointers, mask = _tile(ptr, row_stride, first, length, ROWS, COPY)
    gl.store(pointers, values, mask=mask)


@gluon.jit
def _philox(c0, c1, c2, c3, rng_key):
    """Philox 4x32-7 (bert_fast/random.py): a product of 64 bits is one instruction, its halves are two registers."""
    k0 = gl.cast(rng_key, gl.uint32)
    k1 = gl.cast(rng_key >> 32, gl.uint32)
    for _ in gl.static_range(_ROUNDS):
        a = c0.to(gl.uint64) * 0xD2511F53
        b = c2.to(gl.uint64) * 0xCD9E8D57
        c0 = (b >> 32).to(gl.uint32) ^ c1 ^ k0
        c1 = b.to(gl.uint32)
        c2 = (a >> 32).to(gl.uint32) ^ c3 ^ k1
        c3 = a.to(gl.uint32)
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    return c0, c1, c2, c3


@gluon.jit
def _keep_pair(word, bound, BIT: gl.constexpr):
    """Bits BIT and BIT + 1: whether the lower and the upper half of ``word`` are at least the threshold."""
    low = gl.where((word << 16) > bound, 1 << BIT, 0)  # whatever lies below a half: see philox.py
    high = gl.where(word > bound, 2 << BIT, 0)
    return (low | high).to(gl.int32)


@gluon.jit
def _draw(
    bits_s, PART: gl.constexpr, rng_key, sample, head, query, key, threshold, site,
    KEYS: gl.constexpr, DRAW: gl.constexpr,
):  # fmt: skip
    """Half PART (0 or 1) of the bits of the tile at ``key`` and ``query``, to shared memory.

    Key 64 b + 16 w + 8 h + g and query 2 t + u + 8 c of a tile are a score of warp w of the warp group b, lane 4 g + t;
    h, u and c (0 .. 7) number the thread's 32 scores, and bit h + 2 u + 4 c of its word is for that one. A thread here
    draws for b, g, t and c // 2 (a quarter, 8 bits of a word) the two calls, u = 0 and 1, of c % 2 = PART. They are for
    all w and h, as the words of a call are 16 keys apart and its halves 8.
    """
    GROUPS: gl.constexpr = KEYS // 64
    block = gl.arange(0, GROUPS, layout=gl.SliceLayout(1, gl.SliceLayout(2, DRAW)))[:, None, None]
    lane = gl.arange(0, 32, layout=gl.SliceLayout(0, gl.SliceLayout(2, DRAW)))[None, :, None]
    quarter = gl.arange(0, 4, layout=gl.SliceLayout(0, gl.SliceLayout(1, DRAW)))[None, None, :]
    zeros = gl.zeros([GROUPS, 32, 4], gl.uint32, DRAW)
    group = zeros + (key // 8 + 8 * block + lane // 4).to(gl.uint32)
    position = zeros + (query + 16 * quarter + 8 * PART + 2 * (lane % 4)).to(gl.uint32)
    c2 = zeros + gl.cast(sample, gl.uint32)
    c3 = zeros + gl.cast((site << 16) | head, gl.uint32)
    bound = gl.cast(threshold, gl.uint32) * 65536 - 1
    w0, w1, w2, w3 = _philox(group, position, c2, c3, rng_key)
    v0, v1, v2, v3 = _philox(group, position + 1, c2, c3, rng_key)
    shift = 8 * quarter + 4 * PART
    warp0 = (_keep_pair(w0, bound, 0) | _keep_pair(v0, bound, 2)) << shift
    warp1 = (_keep_pair(w1, bound, 0) | _keep_pair(v1, bound, 2)) << shift
    warp2 = (_keep_pair(w2, bound, 0) | _keep_pair(v2, bound, 2)) << shift
    warp3 = (_keep_pair(w3, bound, 0) | _keep_pair(v3, bound, 2)) << shift
    bits_s.index(PART).store(gl.join(gl.join(warp0, warp1), gl.join(warp2, warp3)))


@gluon.jit
def _read_word(bits_s, READ: gl.constexpr):
    """Both halves of the drawn bits: (KEYS // 64, 32, 2, 2) words, one a thread."""
    return gl.sum(bits_s.index(0).load(READ) + bits_s.index(1).load(READ), 2)


@gluon.jit
def _kept(word, KEYS: gl.constexpr, SCORES: gl.constexpr):
    """Which of the scores (KEYS, 64) are kept. Every step but the last test of a bit is a name for a register."""
    x = gl.reshape(gl.permute(word, (0, 3, 2, 1)), [KEYS // 16, 8, 4])  # warp, g, t
    x = gl.join(x, x >> 1)  # h
    x = gl.join(x, x >> 2)  # u
    x = gl.join(x, x >> 4)  # c % 2, and so on
    x = gl.join(x, x >> 8)
    x = gl.join(x, x >> 16)
    x = gl.reshape(gl.permute(x, (0, 3, 1, 7, 6, 5, 2, 4)), [KEYS, QUERIES])  # (warp, h, g), (c, t, u)
    return (gl.convert_layout(x, SCORES, assert_trivial=True) & 1) != 0


@gluon.jit(do_not_specialize=_UNSPECIALIZED)
def _attention_bwd_one_pass_kernel(
    grad_out_ptr, qkv_ptr, out_ptr, lse_ptr, cu_seqlens_ptr, row_key_ptr, rng_key_ptr, grad_qkv_ptr,
    tokens, sequences, heads, scale_log2, grad_scale, keep_scale, keep, threshold, site,
    BLOCKS: gl.constexpr, HAS_DROPOUT: gl.constexpr,
):  # fmt: skip
    """Program (sequence, head): dq, dk and dv. Programs (sequences .., head) write zeros past cu_seqlens[-1].

    A query past the end has dO = 0 and delta = 0, so it adds nothing; a key past the end has P = 0.

    Barriers and fences. Threads write shared memory in the generic proxy and products read it in the async proxy:
    between the two stand a fence and then a barrier. A warp group waits for its own products alone: between that wait
    and the next write to what they read stands a barrier too.
    """
    WARPS: gl.constexpr = gl.num_warps()
    GROUPS: gl.constexpr = WARPS // 4
    KEYS: gl.constexpr = 16 * WARPS
    KIND: gl.constexpr = qkv_ptr.dtype.element_ty
    COPY: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [WARPS, 1], [1, 0])  # 16 bytes a thread
    # Scores, dK and dV: a warp group has 64 keys. SUMS is dQ: a warp group has half of the columns, or all.
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, 64, 16])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, SCORES, 2)
    OF_QUERY: gl.constexpr = gl.SliceLayout(0, SCORES)
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, GROUPS], [16, 64 // GROUPS, 16])
    # Four numbers of a thread of SUMS are 16 bytes, and the lanes of a warp neighbours: no bank conflicts.
    SUMS_SHARED: gl.constexpr = gl.SharedLinearLayout(
        [[0, 1], [8, 0], [0, 2], [0, 4], [1, 0], [2, 0], [4, 0], [0, 8], [0, 16], [16, 0], [32, 0], [0, 32]]
    )
    OPERAND: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    ROW: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    DRAW: gl.constexpr = gl.BlockedLayout([1, 1, 1], [1, 8, 4], [GROUPS, 4, 1], [2, 1, 0])
    READ: gl.constexpr = _read_bits(GROUPS)
    BITS_SHARED: gl.constexpr = gl.SharedLinearLayout(_drawn_bits(GROUPS))

    program = gl.program_id(0)
    head = gl.program_id(1)
    width = heads * SIZE
    row_stride = 3 * width
    start = gl.load(cu_seqlens_ptr + gl.minimum(program, sequences))
    start = gl.minimum(gl.maximum(start, 0), tokens)
    end = tokens
    if program < sequences:
        end = gl.minimum(gl.load(cu_seqlens_ptr + program + 1), tokens)
    length = end - start
    grad_qkv_ptr += gl.cast(start, gl.int64) * row_stride + head * SIZE
    if program >= sequences:
        programs = gl.num_programs(0) - sequences
        for first in range((program - sequences) * QUERIES, length, programs * QUERIES):
            zeros = gl.zeros([QUERIES, SIZE], KIND, COPY)
            rows = grad_qkv_ptr + gl.cast(first, gl.int64) * row_stride
            _store(rows, row_stride, 0, length - first, zeros, QUERIES, COPY)
            _store(rows + width, row_stride, 0, length - first, zeros, QUERIES, COPY)
            _store(rows + 2 * width, row_stride, 0, length - first, zeros, QUERIES, COPY)
        return
    length = gl.minimum(length, BLOCKS * QUERIES)  # no sequence is longer than max_seqlen
    if length <= 0:
        return

    q_ptr = qkv_ptr + gl.cast(start, gl.int64) * row_stride + head * SIZE
    out_offset = gl.cast(start, gl.int64) * width + head * SIZE
    grad_out_ptr += out_offset
    out_ptr += out_offset
    lse_ptr += gl.cast(head, gl.int64) * tokens + start

    k_s = gl.allocate_shared_memory(KIND, [KEYS, SIZE], OPERAND)
    v_s = gl.allocate_shared_memory(KIND, [KEYS, SIZE], OPERAND)
    q_s = gl.allocate_shared_memory(KIND, [2, QUERIES, SIZE], OPERAND)
    grad_out_s = gl.allocate_shared_memory(KIND, [2, QUERIES, SIZE], OPERAND)
    grad_scores_s = gl.allocate_shared_memory(KIND, [KEYS, QUERIES], OPERAND)
    bits_s = gl.allocate_shared_memory(gl.int32, [2, GROUPS, 32, 4, 2, 2], BITS_SHARED)
    lse_s = gl.allocate_shared_memory(gl.float32, [BLOCKS, QUERIES], ROW)
    delta_s = gl.allocate_shared_memory(gl.float32, [BLOCKS, QUERIES], ROW)
    dq_s = gl.allocate_shared_memory(gl.float32, [BLOCKS, QUERIES, SIZE], SUMS_SHARED)

    _copy_in(k_s, q_ptr + width, row_stride, 0, length, KEYS, COPY)
    _copy_in(v_s, q_ptr + 2 * width, row_stride, 0, length, KEYS, COPY)
    _copy_in(q_s.index(0), q_ptr, row_stride, 0, length, QUERIES, COPY)
    _copy_in(grad_out_s.index(0), grad_out_ptr, width, 0, length, QUERIES, COPY)
    async_copy.commit_group()

    blocks = (length + QUERIES - 1) // QUERIES
    for block in range(0, blocks):
        first = block * QUERIES
        grad_out = _load(grad_out_ptr, width, first, length, QUERIES, COPY)
        out = _load(out_ptr, width, first, length, QUERIES, COPY)
        delta_s.index(block).store(keep * gl.sum(grad_out * out, 1))
        query = first + gl.arange(0, QUERIES, layout=gl.SliceLayout(1, COPY))
        lse_s.index(block).store(gl.load(lse_ptr + query, mask=query < length, other=0.0) * _LOG2_E)

    sample = 0
    rng_key = gl.cast(0, gl.int64)
    if HAS_DROPOUT:
        sample = (gl.load(row_key_ptr + start) >> 32).to(gl.int32)
        rng_key = gl.load(rng_key_ptr)
        _draw(bits_s, 0, rng_key, sample, head, 0, 0, threshold, site, KEYS, DRAW)

    stage = 0
    unused = gl.zeros([KEYS, QUERIES], gl.float32, SCORES)
    for key in range(0, length, KEYS):
        is_key = (key + gl.arange(0, KEYS, layout=gl.SliceLayout(1, SCORES)) < length)[:, None]
        dk = gl.zeros([KEYS, SIZE], gl.float32, SCORES)
        dv = gl.zeros([KEYS, SIZE], gl.float32, SCORES)
        for block in range(0, blocks):
            query = block * QUERIES
            next_query = gl.where(block + 1 < blocks, query + QUERIES, 0)
            next_key = gl.where(block + 1 < blocks, key, key + KEYS)
            q = q_s.index(stage)
            grad_out = grad_out_s.index(stage)

            async_copy.wait_group(0)
            _barrier()  # every warp group is through with the other stage and grad_scores_s
            if next_key < length:
                _copy_in(q_s.index(stage ^ 1), q_ptr, row_stride, next_query, length, QUERIES, COPY)
                _copy_in(grad_out_s.index(stage ^ 1), grad_out_ptr, width, next_query, length, QUERIES, COPY)
            async_copy.commit_group()
            hopper.fence_async_shared()
            _barrier()  # every thread has fenced this tile's q, dO, k and v
            scores = hopper.warpgroup_mma(k_s, q.permute((1, 0)), unused, use_acc=False, is_async=True)
            grad_p = hopper.warpgroup_mma(v_s, grad_out.permute((1, 0)), unused, use_acc=False, is_async=True)
            if HAS_DROPOUT:
                _draw(bits_s, 1, rng_key, sample, head, query, key, threshold, site, KEYS, DRAW)
                _barrier()  # the other threads' bits of this tile, both halves

            scores = hopper.warpgroup_mma_wait(1, (scores,))
            lse = lse_s.index(block).load(OF_QUERY)
            p = gl.where(is_key, gl.exp2(scores * scale_log2 - lse[None, :]), 0.0)
            dropped = p
            if HAS_DROPOUT:
                word = _read_word(bits_s, READ)  # earlier it would cost a register that is not there
                dropped = gl.where(_kept(word, KEYS, SCORES), p, 0.0)
            dv = hopper.warpgroup_mma(gl.convert_layout(dropped.to(KIND), LEFT), grad_out, dv, is_async=True)

            grad_p = hopper.warpgroup_mma_wait(1, (grad_p,))
            if HAS_DROPOUT:
                grad_p = gl.where(_kept(word, KEYS, SCORES), grad_p, 0.0)
            delta = delta_s.index(block).load(OF_QUERY)
            grad_scores = (p * (grad_p - delta[None, :])).to(KIND)
            grad_scores_s.store(grad_scores)
            dk = hopper.warpgroup_mma(gl.convert_layout(grad_scores, LEFT), q, dk, is_async=True)
            dq = dq_s.index(block).load(SUMS)  # what this thread itself stored; unused with the first keys
            hopper.fence_async_shared()
            _barrier()  # every thread has fenced its part of grad_scores_s; every thread has read its word
            dq = hopper.warpgroup_mma(grad_scores_s.permute((1, 0)), k_s, dq, use_acc=key > 0, is_async=True)
            if HAS_DROPOUT:
                _draw(bits_s, 0, rng_key, sample, head, next_query, next_key, threshold, site, KEYS, DRAW)
            dv, dk, dq = hopper.warpgroup_mma_wait(0, (dv, dk, dq))
            dq_s.index(block).store(dq)
            stage ^= 1

        _barrier()  # every warp group is through with k_s, v_s and grad_scores_s; dq_s is complete for other threads
        if key + KEYS < length:
            _copy_in(k_s, q_ptr + width, row_stride, key + KEYS, length, KEYS, COPY)
            _copy_in(v_s, q_ptr + 2 * width, row_stride, key + KEYS, length, KEYS, COPY)
        async_copy.commit_group()
        grad_scores_s.store((dv * keep_scale).to(KIND))  # through shared memory, to write whole lines
        _barrier()
        _store(grad_qkv_ptr + 2 * width, row_stride, key, length, grad_scores_s.load(COPY), KEYS, COPY)
        _barrier()
        grad_scores_s.store((dk * grad_scale).to(KIND))
        _barrier()
        _store(grad_qkv_ptr + width, row_stride, key, length, grad_scores_s.load(COPY), KEYS, COPY)

    for block in range(0, blocks):
        dq = (dq_s.index(block).load(COPY) * grad_scale).to(KIND)
        _store(grad_qkv_ptr, row_stride, block * QUERIES, length, dq, QUERIES, COPY)


def takes(grad_out, qkv, out, max_seqlen) -> bool:
    """Whether ``attention_bwd`` has this case: 16-bit types, heads of 64, at most 512 tokens a sequence, tensors that
    begin at multiples of 16 bytes. What the device is, is not asked here."""
    aligned = all(x.data_ptr() % 16 == 0 for x in (grad_out, qkv, out))
    return qkv.dtype in _TYPES and qkv.shape[3] == 64 and max_seqlen <= LONGEST and aligned


def attention_bwd(
    grad_out, qkv, out, lse, cu_seqlens, max_seqlen, row_key, rng_key, scale, p, site, bias_dtype=None
):  # fmt: skip
    """-> gradients of qkv (T, 3, A, D) in its dtype and of its bias: see reference.attention_bwd. The bias's is summed
    afterwards, in two passes over dq and dv as they were written.

    Raises ValueError for what ``takes`` has not, and where ``scale`` is not above 0.
    """
    if not takes(grad_out, qkv, out, max_seqlen) or not scale > 0:
        raise ValueError(
            "bert_fast.attention: the one-pass backward has bfloat16 and float16, heads of 64, sequences of at most "
            f"{LONGEST} tokens, tensors aligned to 16 bytes and a scale above 0, not {qkv.dtype}, {qkv.shape[3]}, "
            f"{max_seqlen} and {scale}; attention.py's has the others"
        )
    tokens, _, heads, _ = qkv.shape
    grad_qkv = torch.empty_like(qkv)
    if tokens:
        keep_scale = dropout_scale(p)
        sequences = cu_seqlens.numel() - 1
        with torch.cuda.device_of(qkv):
            _attention_bwd_one_pass_kernel[sequences + _TAIL_PROGRAMS, heads](
                grad_out_ptr=grad_out, qkv_ptr=qkv, out_ptr=out, lse_ptr=lse, cu_seqlens_ptr=cu_seqlens,
                row_key_ptr=row_key, rng_key_ptr=rng_key, grad_qkv_ptr=grad_qkv, tokens=tokens, sequences=sequences,
                heads=heads, scale_log2=scale * _LOG2_E.value, grad_scale=scale * keep_scale, keep_scale=keep_scale,
                keep=1.0 / keep_scale if keep_scale else 0.0, threshold=dropout_threshold(p), site=site,
                HAS_DROPOUT=dropout_threshold(p) > 0, **_launch_config(max_seqlen),
            )  # fmt: skip
    return grad_qkv, reference.attention_grad_bias(grad_qkv, bias_dtype)


def aot_cases(capability: int) -> list[dict]:
    """The kernel's configurations for ahead-of-time compilation, none but for compute capability 9.0."""
    if capability != CAPABILITY:
        return []
    cases = []
    for longest, element, p in itertools.product((512, 256, 128), _TYPES.values(), (0.1, 0.0)):
        config = {**_launch_config(longest), "num_stages": 1}
        name = f"attention one_pass S={longest} {element} p={p}"
        tile = (64, 16 * config["num_warps"])
        cases.append(
            attention_case(_attention_bwd_one_pass_kernel, name, element, {"HAS_DROPOUT": p > 0.0}, config, tile)
        )
    return cases
