"""Dropout masks as a function: Philox 4x32-7 in plain integer arithmetic.

A mask is never stored and never depends on where an element lies in memory. The counter names *what the
element is*, so every backend (Triton, C++, PyTorch), every layout (padded, packed) and every number of
ranks draws the same mask bit for bit from one 64-bit key:

    key      (low 32, high 32) bits of ``rng_key``, one int64 drawn per forward pass
    counter  c0  column group (hidden dropout) or key group (attention dropout)
             c1  position of the row in its sample        (low  32 bits of the row key)
             c2  sample                                   (high 32 bits of the row key)
             c3  site << 16 | head                        (head is 0 for hidden dropout)

One Philox call gives four 32-bit words ``w_0 .. w_3``. An element is kept where a number of 16 bits is at least
``dropout_threshold(p)``, and scaled by ``dropout_scale(p)``, so the expectation is exact for the probability really
used. Which elements share a call, and which bits are whose, differs between the two users, as they hold their tiles and
pay for their bits differently:

    hidden     eight a call, 16 bits of its own each
               column c:  group c // 8, element j = c % 8                             (8 neighbours)
               number:    half j % 2 (0 = low) of w_(j // 2)
    attention  sixteen a call
               key k:     group (k // 64) * 4 + k % 8 // 2, element j = (k % 64) // 8 * 2 + k % 2
                          (2 neighbours in every 8 of 64 keys: a thread's columns of a tensor core's tile)
               number:    the upper half of w_(j // 4) rotated to the left by 8 (j % 4) bits

Attention's numbers are the four that begin at the four bytes of a word. Each is uniform over 65536 values, so each
score is dropped with the probability of the threshold, as with 16 bits of its own. But a byte is the upper one of one
score and the lower one of another, and lower ones decide where the upper one is the threshold's own, once in 256: the
masks of two neighbouring bytes are correlated by at most 1/256 (0.002 for p = 0.1), all others not at all. That buys
twice as many scores from a call. (FlashAttention has 8 bits a score and no more, and so rounds p to 1/256.)

Seven rounds are the fewest with which Philox 4x32 passes all of TestU01's BigCrush; ten, the usual number, have three
to spare.

Source: J. Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011 (table 2: rounds).
"""

from typing import TypeVar

import numpy as np
import torch

Words = TypeVar("Words", torch.Tensor, np.ndarray)

ROUND_A = 0xD2511F53
ROUND_B = 0xCD9E8D57
KEY_A = 0x9E3779B9
KEY_B = 0xBB67AE85
MASK32 = 0xFFFFFFFF
ROUNDS = 7  # kernels/cpu/philox.h has it again


def dropout_threshold(p: float) -> int:
    """The 16-bit threshold of drop probability ``p``: an element is kept where its 16 bits are >= this."""
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"dropout probability must be between 0 and 1, got {p}")
    return int(p * 65536 + 0.5)


def dropout_scale(p: float) -> float:
    """The factor of kept elements: one over the keep probability that the threshold realises (0 if none is kept)."""
    kept = 65536 - dropout_threshold(p)
    return 65536 / kept if kept else 0.0


def philox(key: Words, c0, c1, c2, c3) -> tuple[Words, ...]:
    """Four 32-bit words (int64 in 0 .. 2**32-1) of Philox 4x32-7; counters, tensors or arrays, broadcast together."""
    k0 = key & MASK32
    k1 = (key >> 32) & MASK32
    for _ in range(ROUNDS):
        product_a, product_b = c0 * ROUND_A, c2 * ROUND_B  # int64 wraps; all 64 bits are kept
        c0 = ((product_b >> 32) & MASK32) ^ c1 ^ k0
        c2 = ((product_a >> 32) & MASK32) ^ c3 ^ k1
        c1 = product_b & MASK32
        c3 = product_a & MASK32
        k0 = (k0 + KEY_A) & MASK32
        k1 = (k1 + KEY_B) & MASK32
    return c0, c1, c2, c3


def _halves(words: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """The eight 16-bit halves of a call: (..., 8)."""
    return torch.stack([half for word in words for half in (word & 0xFFFF, word >> 16)], dim=-1)


def _windows(words: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """The sixteen 16-bit numbers that begin at a byte of a call, the highest byte first: (..., 16)."""
    twice = [word << 32 | word for word in words]  # 48 and fewer bits to the right, so the sign does not matter
    return torch.stack([(word >> (48 - 8 * byte)) & 0xFFFF for word in twice for byte in range(4)], dim=-1)


def hidden_keep_mask(rng_key: torch.Tensor, row_key: torch.Tensor, columns: int, p: float, site: int) -> torch.Tensor:
    """Keep mask of hidden dropout, bool (T, columns), for rows with keys ``row_key`` (T,) int64."""
    groups = torch.arange((columns + 7) // 8, device=row_key.device)
    words = philox(
        rng_key,
        groups[None, :],
        (row_key & MASK32)[:, None],
        ((row_key >> 32) & MASK32)[:, None],
        torch.full_like(rng_key, site << 16),
    )
    halves = _halves(words).flatten(-2)[:, :columns]
    return halves >= dropout_threshold(p)


def attention_keep_mask(
    rng_key: torch.Tensor, query_key: torch.Tensor, heads: int, keys: int, p: float, site: int
) -> torch.Tensor:
    """Keep mask of attention dropout, bool (heads, S, keys), for queries with keys ``query_key`` (S,) int64."""
    blocks = (keys + 63) // 64
    device = query_key.device
    head = torch.arange(heads, device=device)[:, None, None]
    words = philox(
        rng_key,
        torch.arange(blocks * 4, device=device)[None, None, :],
        (query_key & MASK32)[None, :, None],
        ((query_key >> 32) & MASK32)[None, :, None],
        (site << 16) | head,
    )
    windows = _windows(words).view(heads, query_key.numel(), blocks, 4, 8, 2)  # (.., block, pair, eight, k % 2)
    windows = windows.transpose(-2, -3).flatten(-4)[..., :keys]
    return windows >= dropout_threshold(p)


def row_keys(cu_seqlens: torch.Tensor, tokens: int, samples: torch.Tensor | None = None) -> torch.Tensor:
    """Row keys (tokens,) int64 of packed sequences: ``sample << 32 | position in the sample``.

    ``cu_seqlens`` is (B+1,); ``samples`` (B,) are the samples' numbers (0 .. 2**31-1), by default 0 .. B-1.
    Tokens past ``cu_seqlens[-1]`` (the unused tail of a fixed capacity) get keys that belong to no sample.
    """
    starts, device = cu_seqlens.long(), cu_seqlens.device
    if samples is None:
        samples = torch.arange(len(starts), device=device)
    else:
        samples = torch.cat([samples, samples.new_full((1,), 2**31 - 1)])
    index = torch.arange(tokens, device=device)
    sequence = torch.searchsorted(starts, index, right=True) - 1
    return ((samples.long() << 32) - starts)[sequence] + index
