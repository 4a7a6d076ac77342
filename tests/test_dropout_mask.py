"""Dropout as a function: Philox against its published answers, the device's bits, the masks' statistics."""

import math

import pytest
import torch

from bert_fast import dispatch, dropout_mask, ops
from tests.support.parity import DEVICE

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from bert_fast.kernels import philox as device_philox  # noqa: E402

HAS_TRITON = dispatch.why_unavailable("triton") is None
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason=f"triton: {dispatch.why_unavailable('triton')}")
KEY = 0x0123_4567_89AB_CDEF
ROUNDS = tl.constexpr(dropout_mask.ROUNDS)


def as_key(low, high):
    value = low | high << 32
    return torch.tensor([value - (1 << 64) if value >> 63 else value], device=DEVICE)


# The known-answer tests of Random123 (D. E. Shaw Research), philox4x32 with 7 rounds: counter, key, words.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A),
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_known_answers(counter, key, words):
    counter = [torch.tensor([c], device=DEVICE) for c in counter]
    assert tuple(int(w) for w in dropout_mask.philox(as_key(*key), *counter)) == words


@triton.jit
def _rand_kernel(out_ptr, seed, BLOCK: tl.constexpr):
    offset = tl.arange(0, BLOCK)
    tl.store(out_ptr + offset, tl.rand(seed, offset, n_rounds=ROUNDS))


@needs_triton
def test_equals_triton_rand():
    """tl.rand: the counter is the offset, the number the first word, folded to 31 bits and scaled."""
    out = torch.empty(256, device=DEVICE)
    _rand_kernel[(1,)](out, KEY, BLOCK=256)
    zero = torch.zeros(256, dtype=torch.int64, device=DEVICE)
    word, *_ = dropout_mask.philox(
        torch.tensor([KEY], device=DEVICE), torch.arange(256, device=DEVICE), zero, zero, zero
    )
    signed = torch.where(word >= 1 << 31, word - (1 << 32), word)
    folded = torch.where(signed < 0, -signed - 1, signed)
    assert torch.equal(out, folded.float() * 4.6566127342e-10)


@triton.jit
def _hidden_kernel(out_ptr, rng_key_ptr, row_key_ptr, start, site, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    row = tl.arange(0, BLOCK_M)
    halves = device_philox.hidden_halves(
        tl.load(rng_key_ptr), tl.load(row_key_ptr + row), start, site, BLOCK_M, BLOCK_N
    )
    tl.store(out_ptr + row[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :], halves)


@triton.jit(do_not_specialize=["threshold"])  # as attention's kernels have it: 1 would be no tensor
def _attention_kernel(
    out_ptr, rng_key_ptr, sample, head, start, threshold, site, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    row = tl.arange(0, BLOCK_M)
    key = tl.load(rng_key_ptr)
    keep = device_philox.attention_keep(key, row, sample, head, start, threshold, site, BLOCK_M, BLOCK_N)
    tl.store(out_ptr + row[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :], keep.to(tl.int32))


@needs_triton
@pytest.mark.parametrize("start", [0, 64])
@pytest.mark.parametrize(("key", "site"), [(KEY, 3), (-KEY, 300)])
@pytest.mark.parametrize("p", [0.1, 0.5])
def test_device_bits_of_hidden_dropout(start, key, site, p):
    rng_key = torch.tensor([key], device=DEVICE)
    row_key = (torch.tensor([0, 1, 5, 2**31 - 1], device=DEVICE) << 32) | torch.tensor(
        [0, 511, 2**20, 2**32 - 1], device=DEVICE
    )
    halves = torch.empty(4, 64, dtype=torch.int32, device=DEVICE)
    _hidden_kernel[(1,)](halves, rng_key, row_key, start, site, BLOCK_M=4, BLOCK_N=64)
    keep = dropout_mask.hidden_keep_mask(rng_key, row_key, start + 64, p, site)[:, start:]
    assert torch.equal(halves >= dropout_mask.dropout_threshold(p), keep)


@needs_triton
@pytest.mark.parametrize("start", [0, 128])
@pytest.mark.parametrize(("sample", "head"), [(0, 0), (77, 11), (2**31 - 1, 3)])
@pytest.mark.parametrize("p", [1 / 65536, 0.3, 0.9999, 1.0])
def test_device_bits_of_attention_dropout(start, sample, head, p):
    rng_key = torch.tensor([KEY], device=DEVICE)
    found = torch.empty(16, 128, dtype=torch.int32, device=DEVICE)
    threshold = dropout_mask.dropout_threshold(p)
    _attention_kernel[(1,)](found, rng_key, sample, head, start, threshold, 9, BLOCK_M=16, BLOCK_N=128)
    query_key = (sample << 32) | torch.arange(16, device=DEVICE)
    keep = dropout_mask.attention_keep_mask(rng_key, query_key, head + 1, start + 128, p, 9)[head, :, start:]
    assert torch.equal(found.bool(), keep)


@pytest.mark.parametrize("p", [0.0, 1e-6, 0.1, 0.5, 0.999999, 1.0])
def test_threshold_and_scale_belong_together(p):
    threshold = dropout_mask.dropout_threshold(p)
    assert abs(threshold / 65536 - p) <= 0.5 / 65536
    kept = 1 - threshold / 65536
    assert math.isclose(dropout_mask.dropout_scale(p) * kept, 1.0 if kept else 0.0)


@pytest.mark.parametrize("p", [-0.1, 1.1, math.nan])
def test_probability_outside_0_to_1(p):
    with pytest.raises(ValueError, match="between 0 and 1"):
        dropout_mask.dropout_threshold(p)


def _masks(p):
    """Three kinds of element: hidden rows of two samples, and attention of four heads."""
    rng_key = torch.tensor([KEY], device=DEVICE)
    row_key = dropout_mask.row_keys(torch.tensor([0, 256, 512], dtype=torch.int32, device=DEVICE), 512)
    yield dropout_mask.hidden_keep_mask(rng_key, row_key, 512, p, 7).double()
    yield dropout_mask.attention_keep_mask(rng_key, row_key[:256], 4, 256, p, 7).double().flatten(0, 1)


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_keep_rate(p):
    """Over all, and of every row and every column, within 5 standard deviations (the key is fixed)."""
    keep_rate = 1 - dropout_mask.dropout_threshold(p) / 65536
    for mask in _masks(p):
        for rate, count in (
            (mask.mean(), mask.numel()),
            (mask.mean(dim=0), mask.shape[0]),
            (mask.mean(dim=1), mask.shape[1]),
        ):
            deviation = math.sqrt(keep_rate * (1 - keep_rate) / count)
            assert (rate - keep_rate).abs().max() < 5 * deviation


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_neighbours_are_independent(p):
    """The correlation of elements at any small distance along rows and columns is within 5 standard deviations of 0."""
    keep_rate = 1 - dropout_mask.dropout_threshold(p) / 65536
    for mask in _masks(p):
        normal = (mask - keep_rate) / math.sqrt(keep_rate * (1 - keep_rate))
        for rows, columns in [
            (0, 1),
            (0, 2),
            (0, 4),
            (0, 7),
            (0, 8),
            (0, 64),
            (1, 0),
            (2, 0),
            (1, 1),
            (256, 0),
            (3, 5),
        ]:
            first = normal[: mask.shape[0] - rows, : mask.shape[1] - columns]
            second = normal[rows:, columns:]
            assert abs(float((first * second).mean())) < 5 / math.sqrt(first.numel()), (rows, columns)


def test_halves_are_uniform():
    """Chi-squared of the eight halves of a call over 256 bins each: 255 degrees of freedom, 5 standard deviations."""
    calls = 1 << 16
    index = torch.arange(calls, device=DEVICE)
    words = dropout_mask.philox(
        torch.tensor([KEY], device=DEVICE), index & 127, index >> 7, index * 0, index * 0 + (7 << 16)
    )
    for word in words:
        for half in (word & 0xFFFF, word >> 16):
            for byte in (half >> 8, half & 255):
                observed = torch.bincount(byte, minlength=256).double()
                statistic = float((observed - calls / 256).square().sum() / (calls / 256))
                assert abs(statistic - 255) < 5 * math.sqrt(2 * 255)


@pytest.mark.parametrize("p", [1e-4, 0.1, 0.25, 0.4999, 0.5, 0.9])
def test_what_a_shared_byte_does_to_attention_dropout(p):
    """Over all values of the bytes a, b, c and d of a word: each of the four numbers that begin at one is dropped
    exactly as often as the threshold says, and neighbours are correlated by at most 1/256."""
    threshold = dropout_mask.dropout_threshold(p)
    dropped = (torch.arange(65536).view(256, 256) < threshold).double()  # (upper byte, lower byte)
    rate = float(dropped.mean())
    assert rate == threshold / 65536
    lower_and_upper = dropped.mean(dim=0) * dropped.mean(dim=1)  # of ab and bc, for every value of the shared byte
    covariance = float(lower_and_upper.mean()) - rate**2
    assert 0 <= covariance / (rate * (1 - rate)) <= 1 / 256
    if threshold % 256 == 0:
        assert covariance == 0  # no lower byte decides

    # The model of the four numbers is what the specification draws: ab, bc, cd and da, in this order of elements.
    word = torch.tensor([0xA1B2C3D4])
    zero = torch.zeros_like(word)
    numbers = dropout_mask._windows((word, zero, zero, zero))[0].tolist()
    assert numbers == [0xA1B2, 0xB2C3, 0xC3D4, 0xD4A1] + [0] * 12


def test_every_part_of_the_name_changes_the_mask():
    """Key, site, sample, position and head: two masks that differ in one of them agree as often as chance has it."""
    cu_seqlens = torch.tensor([0, 64], dtype=torch.int32, device=DEVICE)
    rows = dropout_mask.row_keys(cu_seqlens, 64)
    key = torch.tensor([KEY], device=DEVICE)
    base = dropout_mask.hidden_keep_mask(key, rows, 256, 0.5, 1)
    others = {
        "key, low half": dropout_mask.hidden_keep_mask(key + 1, rows, 256, 0.5, 1),
        "key, high half": dropout_mask.hidden_keep_mask(key + (1 << 32), rows, 256, 0.5, 1),
        "site": dropout_mask.hidden_keep_mask(key, rows, 256, 0.5, 2),
        "sample": dropout_mask.hidden_keep_mask(key, rows + (1 << 32), 256, 0.5, 1),
        "position": dropout_mask.hidden_keep_mask(key, rows + 64, 256, 0.5, 1),
        "head": dropout_mask.attention_keep_mask(key, rows, 2, 256, 0.5, 1)[1],
    }
    for name, other in others.items():
        agree = float((base == other).double().mean())
        assert abs(agree - 0.5) < 5 * 0.5 / math.sqrt(base.numel()), name
    assert torch.equal(base, dropout_mask.hidden_keep_mask(key, rows, 256, 0.5, 1))


def test_mask_depends_on_what_a_row_is_not_where():
    """A sample's mask is the same alone, packed between others, in another order, and with fewer columns."""
    key = torch.tensor([KEY], device=DEVICE)
    cu_seqlens = torch.tensor([0, 5, 17, 30], dtype=torch.int32, device=DEVICE)
    packed = dropout_mask.hidden_keep_mask(key, dropout_mask.row_keys(cu_seqlens, 33), 64, 0.3, 2)
    alone = dropout_mask.row_keys(
        cu_seqlens[:2] * 0 + torch.tensor([0, 12], device=DEVICE), 12, torch.tensor([1], device=DEVICE)
    )
    assert torch.equal(packed[5:17], dropout_mask.hidden_keep_mask(key, alone, 64, 0.3, 2))
    assert torch.equal(packed[5:17, :50], dropout_mask.hidden_keep_mask(key, alone, 50, 0.3, 2))
    padded = (torch.arange(3, device=DEVICE)[:, None] << 32) | torch.arange(13, device=DEVICE)[None, :]
    dense = dropout_mask.hidden_keep_mask(key, padded.flatten(), 64, 0.3, 2).view(3, 13, 64)
    assert torch.equal(packed[5:17], dense[1, :12])
    assert torch.equal(packed[17:30], dense[2])


def test_row_keys():
    cu_seqlens = torch.tensor([0, 2, 2, 5], dtype=torch.int32, device=DEVICE)
    keys = dropout_mask.row_keys(cu_seqlens, 7)
    assert (keys >> 32).tolist()[:5] == [0, 0, 2, 2, 2]
    assert (keys & dropout_mask.MASK32).tolist()[:5] == [0, 1, 0, 1, 2]
    named = dropout_mask.row_keys(cu_seqlens, 7, torch.tensor([9, 4, 2**31 - 2], device=DEVICE))
    assert (named >> 32).tolist()[:5] == [9, 9, 2**31 - 2, 2**31 - 2, 2**31 - 2]
    assert not set((named[5:] >> 32).tolist()) & {9, 4, 2**31 - 2}  # the tail belongs to no sample
    assert not set((keys[5:] >> 32).tolist()) & {0, 1, 2}


def test_draw_dropout_key_follows_the_generator():
    like = torch.empty(0, device=DEVICE)
    torch.manual_seed(1)
    first, second = ops.draw_dropout_key(like), ops.draw_dropout_key(like)
    torch.manual_seed(1)
    assert torch.equal(first, ops.draw_dropout_key(like))
    assert not torch.equal(first, second)
    assert first.shape == (1,)
    assert first.dtype == torch.int64
    assert first.device == like.device
    torch.library.opcheck(torch.ops.bert_fast.draw_dropout_key, (like,), test_utils=("test_schema", "test_faketensor"))
