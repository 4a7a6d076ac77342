"""Dropout's random bits on the device: Philox 4x32-7, eight elements a call, in attention sixteen.

The counters and which bits of a call are whose are specified in bert_fast/dropout_mask.py; these two functions draw
the same bits for a tile. An element is kept where its 16 bits are >= the threshold. Attention compares here, in
the fewest instructions: they are what dropout costs it.
"""

import triton
import triton.language as tl

from bert_fast.dropout_mask import ROUNDS

_ROUNDS = tl.constexpr(ROUNDS)


@triton.jit
def _interleave8(w0, w1, w2, w3):
    """Four (M, G) words -> (M, G, 2, 2, 2) halves: the last three axes are word // 2, word % 2, half."""
    low = tl.join(tl.join(w0 & 0xFFFF, w2 & 0xFFFF), tl.join(w1 & 0xFFFF, w3 & 0xFFFF))
    high = tl.join(tl.join(w0 >> 16, w2 >> 16), tl.join(w1 >> 16, w3 >> 16))
    return tl.join(low, high)


@triton.jit
def hidden_halves(key, row_key, column_start, site, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Halves (BLOCK_M, BLOCK_N) of columns ``column_start ..``, a multiple of 8, for rows ``row_key`` (BLOCK_M,)."""
    group = column_start // 8 + tl.arange(0, BLOCK_N // 8)
    zeros = tl.zeros((BLOCK_M, BLOCK_N // 8), tl.int32)
    position = (row_key & 0xFFFFFFFF).to(tl.int32)
    sample = (row_key >> 32).to(tl.int32)
    w0, w1, w2, w3 = tl.philox(
        key, zeros + group[None, :], zeros + position[:, None], zeros + sample[:, None], zeros + (site << 16), _ROUNDS
    )
    halves = _interleave8(w0, w1, w2, w3)
    return tl.reshape(halves, (BLOCK_M, BLOCK_N)).to(tl.int32)


@triton.jit
def attention_keep(
    key, query_position, sample, head, key_start, threshold, site, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Which scores (BLOCK_M, BLOCK_N) are kept: keys ``key_start ..``, a multiple of 64, and queries
    ``query_position`` (BLOCK_M,); ``threshold`` is 1 to 65536.

    BLOCK_N is a multiple of 64. A call serves the keys k and k + 1, k even, of every 8 of 64: the columns that one
    thread holds of a tensor core's accumulator tile, so the bits can stay in the thread that drew them. Which word
    and rotation a register takes is then known to the compiler, so the selections below cost nothing. (tl.join
    would do the same, but halves the element width that Triton assumes for a product's operand made with the
    mask, and on compute capability 8.x the operand then goes through shuffles.)
    """
    group = key_start // 16 + tl.arange(0, BLOCK_N // 16)
    zeros = tl.zeros((BLOCK_M, BLOCK_N // 16), tl.int32)
    w0, w1, w2, w3 = tl.philox(
        key,
        zeros + group[None, :],
        zeros + query_position.to(tl.int32)[:, None],
        zeros + tl.cast(sample, tl.int32),
        zeros + ((site << 16) | head),
        _ROUNDS,
    )
    shape: tl.constexpr = (BLOCK_M, BLOCK_N // 64, 1, 4, 1)
    eight = tl.arange(0, 8)[None, None, :, None, None]
    is_even = tl.arange(0, 2)[None, None, None, None, :] == 0
    low = tl.where(eight < 2, tl.reshape(w0, shape), tl.reshape(w1, shape))
    high = tl.where(eight < 6, tl.reshape(w2, shape), tl.reshape(w3, shape))
    word = tl.where(eight < 4, low, high)
    first = tl.where(is_even, word, (word << 8) | (word >> 24))
    second = tl.where(is_even, (word << 16) | (word >> 16), (word << 24) | (word >> 8))
    word = tl.where(eight % 2 == 0, first, second)
    # The number in the upper bits, whatever lies below it: number >= threshold is word > (threshold << 16) - 1.
    bound = threshold.to(tl.uint32) * 65536 - 1
    return tl.reshape(word > bound, (BLOCK_M, BLOCK_N))
