"""Attention for compute capability 9.0 in Gluon: products that run while the threads compute, a backward of five.

Backward. The portable one (attention.py) makes the scores, dP and dropout's bits twice, once in each of its two
kernels. Here one program owns one (sequence, head), so each is made once. It runs down blocks of KEYS keys, and for
each of them down blocks of 64 queries (S tokens, KEYS = 64 or 128):

    S^T  = K Q^T        P^T = exp2(scale S^T - lse)
    dP^T = V dO^T       dS^T = P^T * (M dP^T - delta) = (M P^T) * dP^T - P^T * delta
    dV  += (M P^T) dO   dK += dS^T Q       dQ += dS K

dK and dV stay in registers for a block of keys; dQ of the whole sequence is kept in shared memory in float32, each
element by the one thread that also adds to it, and written once. Nothing is added atomically and the order is fixed:
the same inputs give the same bits. Masks are those of every other backend, bit for bit.

Scores lie as (keys, queries), so that P^T and dS^T, as they come out of the tensor cores, already are the left operands
of dV and dK: only dS is stored, for dQ. A thread then holds 2 of the 16 keys that share a Philox call, so bits are
drawn by other threads than use them and go through shared memory, one bit a score: a thread makes two calls a tile and
puts their 32 bits into four words, one for each warp that uses them, and has its own 32 from the words of eight others.

The products are asynchronous. What runs while the tensor cores work, for each tile of KEYS x 64:
    S, dP       the second half of the bits of this tile
    dP          exponentials, dropout of P, rounding
    dV          dS, rounding
    dK, dQ      the first half of the bits of the next tile
Tiles of Q and dO are copied one tile ahead; keys and values of the next block while dK and dV are written.

Counts for one (sequence, head), 16-bit elements, n = ceil(S / KEYS) blocks of keys, no tile padding, D = 64:
    products      10 S^2 D FLOPs (attention.py: 14 S^2 D); Philox for S^2 scores (attention.py: 2 S^2)
    device memory S (16 D + 4) bytes: q, k, v, dO, out read and dq, dk, dv written once, and lse
    L2 cache      S (4 D (n - 1) + 2 D) bytes more: Q and dO for each further block of keys, dO once more for delta
    shared memory bytes moved for 64 x 64 scores at KEYS = 128: operands of S and dP 32 Ki, of dV and dK 16 Ki, of dQ
                  24 Ki; dS written 8 Ki; sums of dQ read and written 16 Ki; Q and dO written 8 Ki; bits 8 Ki
Shared memory held, bytes: 256 KEYS for K and V, 32 Ki for two tiles of Q and dO, 128 KEYS for dS, 64 KEYS for bits, 512
for each block of 64 queries of lse and delta, and 16 Ki for each of dQ's: 220 KiB at 512 (of 227), 154 at 256 and 93 at
128, where a program has 4 warps in place of 8 and two share a multiprocessor. Registers allow no more either.
One program a pair is the limit of this design: fewer pairs than multiprocessors leave some without work.

Forward. The portable one waits for each of its products; between those of one program only other programs have work
for the tensor cores and for the threads. Here a program of 8 warps owns 128 queries of one (sequence, head) and runs
down blocks of 128 keys, the last of which may be of 64. For each:

    S = Q K^T and O += P V, of the block before, are started
    S           dropout's bits of this block
    O           running maximum and sum, exponentials, dropout of P
    afterwards  O is rescaled, P becomes the left operand of the next product

A thread's scores in a row and 64 keys are those of one Philox call, so its bits are its own. The assembler takes a
wait for products as early, and arithmetic as late, as their own operands allow, and would leave nothing to run
meanwhile. It does not move a wait across a store to shared memory: one that needs the arithmetic, and that nothing
reads, stands before each wait. Twice as many queries as in the portable forward read each key and value: at its 64,
340 TFLOP/s take 5.3 TB/s from the L2 cache, here 2.7.

Counts for one (sequence, head), 16-bit elements, no tile padding, D = 64:
    products      4 S^2 D FLOPs; Philox for S^2 scores
    device memory S (8 D + 4) bytes: q, k, v read and out written once, lse written
    L2 cache      4 D S (S / 128 - 1) bytes more: K and V for each further block of queries
    shared memory 84,480 bytes held: 16 Ki for Q, 32 Ki for two blocks each of K and V, 2.5 Ki for what nothing reads

Neither is the default: nothing here has been measured. ``ONE_PASS_BACKWARD`` and ``ASYNCHRONOUS_FORWARD`` in
attention.py are where they become it.

Sources: T. Dao, "FlashAttention-2", 2023 (the equations; keys outside and queries inside); J. Shah et al.,
"FlashAttention-3", 2024 (asynchronous products on this GPU, left operands from registers, the next scores' product
beside the softmax).
"""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import async_copy

from bert_fast import reference
from bert_fast.dropout_mask import ROUNDS, dropout_scale, dropout_threshold
from bert_fast.kernels.rows import cdiv, next_power_of_2

CAPABILITY = 90
FORWARD_WARPS = 8
LONGEST = 512  # tokens of a sequence: more sums of dQ do not fit in shared memory
QUERIES = gl.constexpr(64)  # of a tile of the backward
BLOCK = gl.constexpr(128)  # queries and keys of a tile of the forward
SIZE = gl.constexpr(64)  # of a head
_LOG2_E = gl.constexpr(1.4426950408889634)
_LN_2 = gl.constexpr(0.6931471805599453)
_ROUNDS = gl.constexpr(ROUNDS)
_TAIL_PROGRAMS = 8  # write zeros to the rows that belong to no sequence, whose number the device alone knows
_DTYPES = (torch.bfloat16, torch.float16)
_UNSPECIALIZED = ("tokens", "sequences", "blocks", "heads", "threshold", "site")  # no variant for 1 or multiples of 16
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
    """Where drawn bits (groups, 128, 2, 2) lie in shared memory: block of 64 keys, drawing thread, and warp // 2 and
    warp % 2 of the reader. Neighbouring threads are neighbours: no bank conflicts, and four of them are 16 bytes.
    """
    threads = [[0, 2**i, 0, 0] for i in range(7)]
    return [*threads, [0, 0, 0, 1], [0, 0, 1, 0], [1, 0, 0, 0]][: 8 + groups]


@gluon.constexpr_function
def _read_bits(groups):
    """The registers that read such bits, (groups, 128, 2, 2, 2) with g % 2 of the reader last: see ``_draw``. A thread
    has the words of eight drawing threads, one for each c % 4 (0 .. 3) and c // 4; lanes g and g + 1, g even, the same.
    """
    bases = [[*base, 0] for base in _drawn_bits(groups)]
    lanes = [*bases[2:4], [0, 0, 0, 0, 1], *bases[4:6]]
    return gl.DistributedLinearLayout([*bases[:2], bases[6]], lanes, bases[7:], [], [groups, 128, 2, 2, 2])


@gluon.jit
def _span(cu_seqlens_ptr, sequence, tokens, sequences):
    """First token and number of tokens of a sequence; from number ``sequences`` on of the unused tail."""
    start = gl.load(cu_seqlens_ptr + gl.minimum(sequence, sequences))
    start = gl.minimum(gl.maximum(start, 0), tokens)
    end = tokens
    if sequence < sequences:
        end = gl.minimum(gl.load(cu_seqlens_ptr + sequence + 1), tokens)
    return start, end - start


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
    return gl.load(pointers, mask=mask, other=0.0)


@gluon.jit
def _store(ptr, row_stride, first, length, values, ROWS: gl.constexpr, COPY: gl.constexpr):
    pointers, mask = _tile(ptr, row_stride, first, length, ROWS, COPY)
    gl.store(pointers, values, mask=mask)


@gluon.jit
def _rows_of_delta(grad_out_ptr, out_ptr, lse_ptr, width, first, length, COPY: gl.constexpr):
    """dO, out and lse of a tile of queries, for the next round: 16-bit values as they come, nothing waits for them."""
    grad_out = _load(grad_out_ptr, width, first, length, QUERIES, COPY)
    out = _load(out_ptr, width, first, length, QUERIES, COPY)
    query = first + gl.arange(0, QUERIES, layout=gl.SliceLayout(1, COPY))
    return grad_out, out, gl.load(lse_ptr + query, mask=query < length, other=0.0)


@gluon.jit
def _philox(c0, c1, c2, c3, rng_key):
    """Philox 4x32-7 (bert_fast/dropout_mask.py): a product of 64 bits is one instruction, its halves two registers."""
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
def _majority(a, b, c):
    """Of three bits each. If c is a + b byte by byte without their top bits, its top bits are the carries of a + b."""
    return (a & b) | ((a | b) & c)


@gluon.jit
def _keep(word, threshold):
    """Whether the number that begins at a byte of ``word`` is at least the threshold, in the top bit of the byte; the
    other bits mean nothing.

    It is where 65536 - threshold more carries out of 16 bits. Added to all four at once, byte by byte: the carry of a
    byte, which is a number's lower one, goes into the byte above it, which is that number's upper one.
    """
    addend = gl.cast(65536 - threshold, gl.uint32)
    low = (addend & 0xFF) * 0x01010101
    high = (addend >> 8) * 0x01010101
    seven = word & 0x7F7F7F7F
    carry = _majority(word, low, seven + (low & 0x7F7F7F7F))
    carry = ((carry << 1) | (carry >> 31)) & 0x01010101
    return _majority(word, high, seven + (high & 0x7F7F7F7F) + carry)


@gluon.jit
def _draw(
    first_s, bits_s, PART: gl.constexpr, rng_key, sample, head, query, key, threshold, site,
    KEYS: gl.constexpr, DRAW: gl.constexpr,
):  # fmt: skip
    """Half PART (0 or 1) of the bits of the tile at ``key`` and ``query``; with the second, both to ``bits_s``.

    Key 64 b + 16 w + 8 h + g and query 2 t + u + 8 c of a tile are a score of warp w of the warp group b, lane 4 g + t;
    h, u and c (0 .. 7) number the thread's 32 scores. A call is for b, g // 2 and a query: its word w is for warp w and
    the byte 3 - 2 h - g % 2 of that for h and g % 2. A thread here makes the calls u = 0 and 1 of b, g // 2, t and c,
    one a half. Their bits in each byte of its four words are 2 (c % 4) + u, so that readers add the words of four c.
    What a thread leaves in ``first_s`` it reads itself.
    """
    GROUPS: gl.constexpr = KEYS // 64
    CALL: gl.constexpr = gl.SliceLayout(2, gl.SliceLayout(3, DRAW))
    block = gl.arange(0, GROUPS, layout=gl.SliceLayout(1, CALL))[:, None]
    thread = gl.arange(0, 128, layout=gl.SliceLayout(0, CALL))[None, :]  # c // 4, g // 2, t, c % 4
    zeros = gl.zeros([GROUPS, 128], gl.uint32, CALL)
    group = zeros + (key // 16 + 4 * block + thread // 16 % 4).to(gl.uint32)
    column = 32 * (thread // 64) + 8 * (thread % 4) + 2 * (thread // 4 % 4) + PART
    position = zeros + (query + column).to(gl.uint32)
    c2 = zeros + gl.cast(sample, gl.uint32)
    c3 = zeros + gl.cast((site << 16) | head, gl.uint32)
    w0, w1, w2, w3 = _philox(group, position, c2, c3, rng_key)
    kept = _keep(gl.join(gl.join(w0, w2), gl.join(w1, w3)), threshold)
    if PART == 0:
        first_s.store(kept)  # kept in registers, most of this would be put off until after the products
    else:
        both = (kept & 0x80808080) | ((first_s.load(DRAW) >> 1) & 0x40404040)
        shift = (6 - 2 * (thread % 4)).to(gl.uint32)
        bits_s.store(both >> shift[:, :, None, None])


@gluon.jit
def _read_word(bits_s, READ: gl.constexpr, KEYS: gl.constexpr):
    """The bits of each thread's 32 scores, (KEYS // 16, 8, 4) words: bit 2 (c % 4) + u of byte 3 - 2 h - c // 4."""
    GROUPS: gl.constexpr = KEYS // 64
    WORD: gl.constexpr = gl.BlockedLayout([1, 1, 1], [1, 8, 4], [KEYS // 16, 1, 1], [2, 1, 0])
    words = bits_s.load(gl.SliceLayout(4, READ))[:, :, :, :, None] + gl.zeros([GROUPS, 128, 2, 2, 2], gl.uint32, READ)
    words = gl.sum(gl.reshape(words, [GROUPS, 2, 4, 4, 4, 2, 2, 2]), 4)  # b, c // 4, g // 2, t, w // 2, w % 2, g % 2
    left, right = gl.split(gl.permute(words, (0, 4, 5, 2, 6, 3, 1)))
    left = gl.convert_layout(gl.reshape(left, [KEYS // 16, 8, 4]), WORD, assert_trivial=True)
    right = gl.convert_layout(gl.reshape(right, [KEYS // 16, 8, 4]), WORD, assert_trivial=True)
    g = gl.arange(0, 8, layout=gl.SliceLayout(0, gl.SliceLayout(2, WORD)))[None, :, None]
    shift = (8 * (g % 2)).to(gl.uint32)
    return ((left << shift) & 0xFF00FF00) | ((right >> (8 - shift)) & 0x00FF00FF)


@gluon.jit
def _kept(word, KEYS: gl.constexpr, SCORES: gl.constexpr):
    """Which of the scores (KEYS, 64) are kept. Every step but the last test of a bit is a name for a register."""
    x = gl.join(word, word >> 1)  # u
    x = gl.join(x, x >> 2)  # c % 2, and so on
    x = gl.join(x, x >> 4)
    x = gl.join(x >> 8, x)
    x = gl.join(x >> 16, x)  # h
    x = gl.reshape(gl.permute(x, (0, 7, 1, 6, 5, 4, 2, 3)), [KEYS, QUERIES])  # (warp, h, g), (c, t, u)
    return (gl.convert_layout(x, SCORES, assert_trivial=True) & 1) != 0


@gluon.jit(do_not_specialize=[name for name in _UNSPECIALIZED if name != "blocks"])
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
    DRAW: gl.constexpr = gl.BlockedLayout([1, 1, 2, 2], [1, 32, 1, 1], [GROUPS, 4, 1, 1], [3, 2, 1, 0])
    FIRST_SHARED: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [3, 2, 1, 0])  # 16 bytes a thread
    BITS_SHARED: gl.constexpr = gl.SharedLinearLayout(_drawn_bits(GROUPS))
    READ: gl.constexpr = _read_bits(GROUPS)

    program = gl.program_id(0) // heads
    head = gl.program_id(0) % heads
    width = heads * SIZE
    row_stride = 3 * width
    start, length = _span(cu_seqlens_ptr, program, tokens, sequences)
    grad_qkv_ptr += gl.cast(start, gl.int64) * row_stride + head * SIZE
    if program >= sequences:
        programs = gl.num_programs(0) // heads - sequences
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
    first_s = gl.allocate_shared_memory(gl.uint32, [GROUPS, 128, 2, 2], FIRST_SHARED)
    bits_s = gl.allocate_shared_memory(gl.uint32, [GROUPS, 128, 2, 2], BITS_SHARED)
    lse_s = gl.allocate_shared_memory(gl.float32, [BLOCKS, QUERIES], ROW)
    delta_s = gl.allocate_shared_memory(gl.float32, [BLOCKS, QUERIES], ROW)
    dq_s = gl.allocate_shared_memory(gl.float32, [BLOCKS, QUERIES, SIZE], SUMS_SHARED)

    _copy_in(k_s, q_ptr + width, row_stride, 0, length, KEYS, COPY)
    _copy_in(v_s, q_ptr + 2 * width, row_stride, 0, length, KEYS, COPY)
    _copy_in(q_s.index(0), q_ptr, row_stride, 0, length, QUERIES, COPY)
    _copy_in(grad_out_s.index(0), grad_out_ptr, width, 0, length, QUERIES, COPY)
    async_copy.commit_group()

    blocks = (length + QUERIES - 1) // QUERIES
    ahead = _rows_of_delta(grad_out_ptr, out_ptr, lse_ptr, width, 0, length, COPY)
    for block in range(0, blocks):
        grad_out, out, lse = ahead
        ahead = _rows_of_delta(grad_out_ptr, out_ptr, lse_ptr, width, (block + 1) * QUERIES, length, COPY)
        delta_s.index(block).store(keep * gl.sum(grad_out.to(gl.float32) * out.to(gl.float32), 1))
        lse_s.index(block).store(lse * _LOG2_E)

    sample = 0
    rng_key = gl.cast(0, gl.int64)
    if HAS_DROPOUT:
        sample = (gl.load(row_key_ptr + start) >> 32).to(gl.int32)
        rng_key = gl.load(rng_key_ptr)
        _draw(first_s, bits_s, 0, rng_key, sample, head, 0, 0, threshold, site, KEYS, DRAW)

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
                _draw(first_s, bits_s, 1, rng_key, sample, head, query, key, threshold, site, KEYS, DRAW)
                _barrier()  # the other threads' bits of this tile, both halves

            scores = hopper.warpgroup_mma_wait(1, (scores,))
            lse = lse_s.index(block).load(OF_QUERY)
            if key + KEYS > length:  # the last keys alone; 0, the score of one past the end, must not be exponentiated
                scores = gl.where(is_key, scores, float("-inf"))
            p = gl.exp2(scores * scale_log2 - lse[None, :])
            dropped = p
            if HAS_DROPOUT:
                word = _read_word(bits_s, READ, KEYS)  # no earlier: registers are short
                dropped = gl.where(_kept(word, KEYS, SCORES), p, 0.0)
            of_dv = gl.convert_layout(dropped.to(KIND), LEFT)
            dv = hopper.warpgroup_mma(of_dv, grad_out, dv, is_async=True)

            grad_p = hopper.warpgroup_mma_wait(1, (grad_p,))
            delta = delta_s.index(block).load(OF_QUERY)  # no earlier, likewise
            if HAS_DROPOUT:  # P (M dP - delta), without a second selection
                grad_scores = (dropped * grad_p - p * delta[None, :]).to(KIND)
            else:
                grad_scores = (p * (grad_p - delta[None, :])).to(KIND)
            grad_scores_s.store(grad_scores)
            of_dk = gl.convert_layout(grad_scores, LEFT)
            dk = hopper.warpgroup_mma(of_dk, q, dk, is_async=True)
            dq = dq_s.index(block).load(SUMS)  # what this thread itself stored; unused with the first keys
            hopper.fence_async_shared()
            _barrier()  # every thread has fenced its part of grad_scores_s; every thread has read its word
            dq = hopper.warpgroup_mma(grad_scores_s.permute((1, 0)), k_s, dq, use_acc=key > 0, is_async=True)
            if HAS_DROPOUT:
                _draw(
                    first_s, bits_s, 0, rng_key, sample, head, next_query, next_key, threshold, site, KEYS, DRAW
                )  # fmt: skip
            # The products of dV and dK may read their left operands' registers until here.
            dv, dk, dq, of_dv, of_dk = hopper.warpgroup_mma_wait(0, (dv, dk, dq, of_dv, of_dk))
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

    for query in range(0, length, QUERIES):  # not of ``blocks``, which Triton 3.6 would spill to keep it until here
        dq = (dq_s.index(query // QUERIES).load(COPY) * grad_scale).to(KIND)
        _store(grad_qkv_ptr, row_stride, query, length, dq, QUERIES, COPY)


# --------------------------------------------------------------------------------------------------------------
# Forward


@gluon.constexpr_function
def _calls(keys):
    """Calls (query, block of 64 keys, pair of keys): a thread makes those of the scores (128, keys) that it holds."""
    registers = [[8, 0, 0], [0, 1, 0]][: keys // 64]
    lanes = [[0, 0, 1], [0, 0, 2], [1, 0, 0], [2, 0, 0], [4, 0, 0]]
    warps = [[16, 0, 0], [32, 0, 0], [64, 0, 0]]
    return gl.DistributedLinearLayout(registers, lanes, warps, [], [128, keys // 64, 4])


@gluon.jit
def _words(first, key, sample, head, rng_key, site, KEYS: gl.constexpr):
    """The words (128, KEYS // 64, 4) of the calls for queries ``first ..`` and keys ``key ..``."""
    CALL: gl.constexpr = _calls(KEYS)
    row = first + gl.arange(0, BLOCK, layout=gl.SliceLayout(1, gl.SliceLayout(2, CALL)))[:, None, None]
    block = gl.arange(0, KEYS // 64, layout=gl.SliceLayout(0, gl.SliceLayout(2, CALL)))[None, :, None]
    pair = gl.arange(0, 4, layout=gl.SliceLayout(0, gl.SliceLayout(1, CALL)))[None, None, :]
    zeros = gl.zeros([BLOCK, KEYS // 64, 4], gl.uint32, CALL)
    group = zeros + (key // 16 + 4 * block + pair).to(gl.uint32)
    c2 = zeros + gl.cast(sample, gl.uint32)
    c3 = zeros + gl.cast((site << 16) | head, gl.uint32)
    return _philox(group, zeros + row.to(gl.uint32), c2, c3, rng_key)


@gluon.jit
def _kept_numbers(w0, w1, w2, w3, bound, KEYS: gl.constexpr, SCORES: gl.constexpr):
    """Which of the scores (128, KEYS) are kept: their number, in the upper bits of a rotated word, is above ``bound``.

    Key 64 b + 8 c + 2 t + u has word c // 2 of the call of b and t, rotated by 8 (2 (c % 2) + u) bits. A thread holds
    all c and u of its t, so every step but rotations and comparisons is a name for a register.
    """
    x = gl.join(gl.join(w0, w1), gl.join(w2, w3))  # c // 2 % 2, c // 4
    x = gl.join(x, (x << 16) | (x >> 16))  # c % 2
    x = gl.join(x, (x << 8) | (x >> 24))  # u
    x = gl.reshape(gl.permute(x, (0, 1, 4, 3, 5, 2, 6)), [BLOCK, KEYS])
    return gl.convert_layout(x, SCORES, assert_trivial=True) > bound


@gluon.jit
def _copy_block(block_s, ptr, row_stride, first, length, COPY: gl.constexpr):
    """Start to copy 128 rows from ``first`` on. Rows' offsets are from there: they are the same for every block."""
    _copy_in(block_s, ptr + gl.cast(first, gl.int64) * row_stride, row_stride, 0, length - first, BLOCK, COPY)


@gluon.jit
def _exponentials(
    scores, peak, total, scale_log2, keys, FULL: gl.constexpr, KEYS: gl.constexpr, SCORES: gl.constexpr
):  # fmt: skip
    """P of a block whose first ``keys`` keys there are, the new maxima and sums, and the factor for what was before."""
    if not FULL:
        key = gl.arange(0, KEYS, layout=gl.SliceLayout(0, SCORES))
        scores = gl.where((key < keys)[None, :], scores, float("-inf"))
    new_peak = gl.maximum(peak, gl.max(scores, 1) * scale_log2)
    p = gl.exp2(scores * scale_log2 - new_peak[:, None])
    rescale = gl.exp2(peak - new_peak)
    return p, new_peak, total * rescale + gl.sum(p, 1), rescale


@gluon.jit
def _dropped(p, w0, w1, w2, w3, bound, site, KEYS: gl.constexpr, SCORES: gl.constexpr):
    """P or 0. The compiler doesn't know that it is 0: it would round P first and then select 16-bit halves of pairs."""
    return gl.where(_kept_numbers(w0, w1, w2, w3, bound, KEYS, SCORES), p, gl.where(site < 0, 1.0, 0.0))


@gluon.jit
def _next_keys(
    sums, p, peak, total, stage, q_s, k_s, v_s, total_s, word_s, k_ptr, v_ptr, row_stride, key, length, first, sample,
    head, rng_key, scale_log2, bound, site,
    KEYS: gl.constexpr, FULL: gl.constexpr, HAS_DROPOUT: gl.constexpr, COPY: gl.constexpr, SUMS: gl.constexpr,
):  # fmt: skip
    """A block of KEYS keys from ``key`` on, all there where FULL: O of the blocks before it, its own P, the maxima and
    sums. Where it is not FULL it is the last."""
    KIND: gl.constexpr = q_s.dtype
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, KEYS, 16])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, SUMS, 2)
    async_copy.wait_group(0)
    _barrier()  # both warp groups are through with what is copied over
    if FULL:
        _copy_block(k_s.index(stage ^ 1), k_ptr, row_stride, key + BLOCK, length, COPY)
    _copy_block(v_s.index(stage), v_ptr, row_stride, key, length, COPY)
    async_copy.commit_group()
    hopper.fence_async_shared()
    _barrier()  # every thread has fenced this block of keys and the values before it
    peak = gl.convert_layout(peak, gl.SliceLayout(1, SCORES), assert_trivial=True)
    total = gl.convert_layout(total, gl.SliceLayout(1, SCORES), assert_trivial=True)
    nothing = gl.zeros([BLOCK, KEYS], gl.float32, SCORES)
    keys_s = k_s.index(stage).slice(0, KEYS).permute((1, 0))
    scores = hopper.warpgroup_mma(q_s, keys_s, nothing, use_acc=False, is_async=True)
    left = gl.convert_layout(p.to(KIND), LEFT)
    sums = hopper.warpgroup_mma(left, v_s.index(stage ^ 1), sums, is_async=True)
    if HAS_DROPOUT:
        w0, w1, w2, w3 = _words(first, key, sample, head, rng_key, site, KEYS)
        word_s.store(gl.sum(w0, 1))  # without a reader: the calls have to be made before the wait
    scores = hopper.warpgroup_mma_wait(1, (scores,))
    p, peak, total, rescale = _exponentials(scores, peak, total, scale_log2, length - key, FULL, KEYS, SCORES)
    total_s.store(total)  # likewise, the exponentials
    if HAS_DROPOUT:
        p = _dropped(p, w0, w1, w2, w3, bound, site, KEYS, SCORES)
    sums, left = hopper.warpgroup_mma_wait(0, (sums, left))
    sums = sums * gl.convert_layout(rescale, gl.SliceLayout(1, SUMS), assert_trivial=True)[:, None]
    return sums, p, peak, total


@gluon.jit
def _last_values(sums, p, v_s, stage, KEYS: gl.constexpr, SUMS: gl.constexpr):
    """O with the last block's part of it."""
    async_copy.wait_group(0)
    hopper.fence_async_shared()
    _barrier()  # every thread has fenced the last values
    left = gl.convert_layout(p.to(v_s.dtype), gl.DotOperandLayout(0, SUMS, 2))
    sums = hopper.warpgroup_mma(left, v_s.index(stage).slice(0, KEYS), sums, is_async=True)
    return hopper.warpgroup_mma_wait(0, (sums,))


@gluon.jit(do_not_specialize=_UNSPECIALIZED)
def _attention_fwd_asynchronous_kernel(
    qkv_ptr, cu_seqlens_ptr, row_key_ptr, rng_key_ptr, out_ptr, lse_ptr,
    tokens, sequences, blocks, heads, scale_log2, keep_scale, threshold, site,
    HAS_DROPOUT: gl.constexpr,
):  # fmt: skip
    """Program (block of 128 queries of one sequence, head). Those of one sequence more write zeros past cu_seqlens[-1].

    Barriers and fences: as in the backward. Keys and values past the end are copied as zeros.
    """
    KIND: gl.constexpr = qkv_ptr.dtype.element_ty
    COPY: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [8, 1], [1, 0])  # 16 bytes a thread
    COPY_ROW: gl.constexpr = gl.SliceLayout(1, COPY)
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, 128, 16])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, 64, 16])
    OF_SCORE: gl.constexpr = gl.SliceLayout(1, SCORES)
    OF_SUM: gl.constexpr = gl.SliceLayout(1, SUMS)
    OPERAND: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    ROW: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])

    first = gl.program_id(0) % blocks * BLOCK
    head = gl.program_id(0) // blocks % heads
    sequence = gl.program_id(0) // blocks // heads
    width = heads * SIZE
    row_stride = 3 * width
    start, length = _span(cu_seqlens_ptr, sequence, tokens, sequences)
    out_ptr += gl.cast(start, gl.int64) * width + head * SIZE
    lse_ptr += gl.cast(head, gl.int64) * tokens + start
    if sequence == sequences:
        for row in range(first, length, blocks * BLOCK):
            zeros = gl.zeros([BLOCK, SIZE], KIND, COPY)
            _store(out_ptr + gl.cast(row, gl.int64) * width, width, 0, length - row, zeros, BLOCK, COPY)
            token = row + gl.arange(0, BLOCK, layout=COPY_ROW)
            gl.store(lse_ptr + token, gl.zeros([BLOCK], gl.float32, COPY_ROW), mask=token < length)
        return
    if first >= length:
        return

    q_ptr = qkv_ptr + gl.cast(start, gl.int64) * row_stride + head * SIZE
    k_ptr = q_ptr + width
    v_ptr = k_ptr + width
    q_s = gl.allocate_shared_memory(KIND, [BLOCK, SIZE], OPERAND)
    k_s = gl.allocate_shared_memory(KIND, [2, BLOCK, SIZE], OPERAND)
    v_s = gl.allocate_shared_memory(KIND, [2, BLOCK, SIZE], OPERAND)
    total_s = gl.allocate_shared_memory(gl.float32, [BLOCK], ROW)
    word_s = gl.allocate_shared_memory(gl.uint32, [BLOCK, 4], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
    _copy_block(q_s, q_ptr, row_stride, first, length, COPY)
    _copy_block(k_s.index(0), k_ptr, row_stride, 0, length, COPY)
    async_copy.commit_group()
    _copy_block(k_s.index(1), k_ptr, row_stride, BLOCK, length, COPY)
    _copy_block(v_s.index(0), v_ptr, row_stride, 0, length, COPY)
    async_copy.commit_group()

    sample = 0
    rng_key = gl.cast(0, gl.int64)
    bound = gl.cast(0, gl.uint32)
    if HAS_DROPOUT:
        sample = (gl.load(row_key_ptr + start) >> 32).to(gl.int32)
        rng_key = gl.load(rng_key_ptr)
        bound = gl.cast(threshold, gl.uint32) * 65536 - 1  # number >= threshold, whatever lies below the number
    peak = gl.full([BLOCK], float("-inf"), gl.float32, OF_SCORE)
    total = gl.zeros([BLOCK], gl.float32, OF_SCORE)
    sums = gl.zeros([BLOCK, SIZE], gl.float32, SUMS)
    nothing = gl.zeros([BLOCK, BLOCK], gl.float32, SCORES)

    async_copy.wait_group(1)
    hopper.fence_async_shared()
    _barrier()  # every thread has fenced Q and the first keys
    scores = hopper.warpgroup_mma(q_s, k_s.index(0).permute((1, 0)), nothing, use_acc=False, is_async=True)
    if HAS_DROPOUT:
        w0, w1, w2, w3 = _words(first, 0, sample, head, rng_key, site, BLOCK)
        word_s.store(gl.sum(w0, 1))  # see _next_keys
    scores = hopper.warpgroup_mma_wait(0, (scores,))
    p, peak, total, _ = _exponentials(scores, peak, total, scale_log2, length, False, BLOCK, SCORES)
    if HAS_DROPOUT:
        p = _dropped(p, w0, w1, w2, w3, bound, site, BLOCK, SCORES)
    stage = 1
    whole = length // BLOCK * BLOCK
    for key in range(BLOCK, whole, BLOCK):
        sums, p, peak, total = _next_keys(
            sums, p, peak, total, stage, q_s, k_s, v_s, total_s, word_s, k_ptr, v_ptr, row_stride, key, length, first,
            sample, head, rng_key, scale_log2, bound, site, BLOCK, True, HAS_DROPOUT, COPY, SUMS,
        )  # fmt: skip
        stage ^= 1
    rest = gl.where(whole > 0, length - whole, 0)  # the first block may have been the last
    if rest > BLOCK // 2:
        sums, p, peak, total = _next_keys(
            sums, p, peak, total, stage, q_s, k_s, v_s, total_s, word_s, k_ptr, v_ptr, row_stride, whole, length, first,
            sample, head, rng_key, scale_log2, bound, site, BLOCK, False, HAS_DROPOUT, COPY, SUMS,
        )  # fmt: skip
        sums = _last_values(sums, p, v_s, stage, BLOCK, SUMS)
    elif rest > 0:  # half a block wastes less
        sums, half, peak, total = _next_keys(
            sums, p, peak, total, stage, q_s, k_s, v_s, total_s, word_s, k_ptr, v_ptr, row_stride, whole, length, first,
            sample, head, rng_key, scale_log2, bound, site, BLOCK // 2, False, HAS_DROPOUT, COPY, SUMS,
        )  # fmt: skip
        sums = _last_values(sums, half, v_s, stage, BLOCK // 2, SUMS)
        peak = gl.convert_layout(peak, OF_SCORE, assert_trivial=True)
        total = gl.convert_layout(total, OF_SCORE, assert_trivial=True)
    else:
        sums = _last_values(sums, p, v_s, stage ^ 1, BLOCK, SUMS)
    scale = gl.convert_layout(keep_scale / total, OF_SUM, assert_trivial=True)
    q_s.store((sums * scale[:, None]).to(KIND))  # through shared memory, to write whole lines
    _barrier()
    _store(out_ptr, width, first, length, q_s.load(COPY), BLOCK, COPY)
    query = first + gl.arange(0, BLOCK, layout=OF_SCORE)
    gl.store(lse_ptr + query, (peak + gl.log2(total)) * _LN_2, mask=query < length)


def takes_forward(qkv) -> bool:
    """Whether ``attention_fwd`` has this case: 16-bit types, heads of 64, a tensor that begins at a multiple of 16
    bytes, sequences of any length. What the device is, is not asked here."""
    return qkv.dtype in _DTYPES and qkv.shape[3] == 64 and qkv.data_ptr() % 16 == 0


def takes_backward(grad_out, qkv, out, max_seqlen) -> bool:
    """Whether ``attention_bwd`` has this case: as ``takes_forward`` for all three tensors, and at most 512 tokens a
    sequence."""
    aligned = all(x.data_ptr() % 16 == 0 for x in (grad_out, out))
    return takes_forward(qkv) and max_seqlen <= LONGEST and aligned


def attention_fwd(qkv, cu_seqlens, max_seqlen, row_key, rng_key, scale, p, site, bias=None):
    """-> out (T, A*D) in qkv's dtype, lse (A, T) float32: see reference.attention_fwd.

    Raises ValueError for what ``takes_forward`` has not, and where ``scale`` is not above 0.
    """
    if not takes_forward(qkv) or not scale > 0:
        raise ValueError(
            "bert_fast.attention: the asynchronous forward has bfloat16 and float16, heads of 64, tensors aligned to "
            f"16 bytes and a scale above 0, not {qkv.dtype}, {qkv.shape[3]} and {scale}; attention.py's has the others"
        )
    tokens, _, heads, head_dim = qkv.shape
    out = qkv.new_empty((tokens, heads * head_dim))
    lse = qkv.new_empty((heads, tokens), dtype=torch.float32)
    if tokens:
        blocks = max(1, cdiv(max_seqlen, BLOCK.value))
        with torch.cuda.device_of(qkv):
            _attention_fwd_asynchronous_kernel[(blocks * cu_seqlens.numel() * heads,)](
                qkv_ptr=qkv, cu_seqlens_ptr=cu_seqlens, row_key_ptr=row_key, rng_key_ptr=rng_key, out_ptr=out,
                lse_ptr=lse, tokens=tokens, sequences=cu_seqlens.numel() - 1, blocks=blocks, heads=heads,
                scale_log2=scale * _LOG2_E.value, keep_scale=dropout_scale(p), threshold=dropout_threshold(p),
                site=site, HAS_DROPOUT=dropout_threshold(p) > 0, num_warps=FORWARD_WARPS,
            )  # fmt: skip
    return out, lse


def attention_bwd(
    grad_out, qkv, out, lse, cu_seqlens, max_seqlen, row_key, rng_key, scale, p, site, bias_dtype=None
):  # fmt: skip
    """-> gradients of qkv (T, 3, A, D) in its dtype and of its bias: see reference.attention_bwd. The bias's is summed
    afterwards, in two passes over dq and dv as they were written.

    Raises ValueError for what ``takes_backward`` has not, and where ``scale`` is not above 0.
    """
    if not takes_backward(grad_out, qkv, out, max_seqlen) or not scale > 0:
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
            _attention_bwd_one_pass_kernel[((sequences + _TAIL_PROGRAMS) * heads,)](
                grad_out_ptr=grad_out, qkv_ptr=qkv, out_ptr=out, lse_ptr=lse, cu_seqlens_ptr=cu_seqlens,
                row_key_ptr=row_key, rng_key_ptr=rng_key, grad_qkv_ptr=grad_qkv, tokens=tokens, sequences=sequences,
                heads=heads, scale_log2=scale * _LOG2_E.value, grad_scale=scale * keep_scale, keep_scale=keep_scale,
                keep=1.0 / keep_scale if keep_scale else 0.0, threshold=dropout_threshold(p), site=site,
                HAS_DROPOUT=dropout_threshold(p) > 0, **_launch_config(max_seqlen),
            )  # fmt: skip
    return grad_qkv, reference.attention_grad_bias(grad_qkv, bias_dtype)
